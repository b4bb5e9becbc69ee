//! What can be typed: the verbs and their options. Values are checked here, so that a verb never sees a wrong one.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::SystemTime;

use clap::builder::{OsStringValueParser, TypedValueParser, ValueParser};
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::address::{Location, disk_here};
use crate::engine::failover::{State, parse_duration};
use crate::engine::{BlockSize, DiskAddress, ExportPoint, Mode, Strategy, Undo, nbd, parse_size};
use crate::export::PORT;
use crate::file_url;
use crate::quote::{quoted, quoted_path};

/// Brings whole disks up to date, block by block, and never leaves one torn.
///
/// Until a run commits, the target keeps its old content; after that it has the new one. Kill it at any moment: what
/// was durable is never sent again, and `blockferry status TARGET` says how to go on and how to go back.
#[derive(Debug, Parser)]
#[command(name = "blockferry", version, arg_required_else_help = true, after_help = EXIT_CODES)]
#[command(subcommand_value_name = "VERB", subcommand_help_heading = "Verbs")]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done, or equal                   6  a decision is pending (committed, not applied)
  1  differs (diff, verify A B)       7  corruption found (verify TARGET, or the proof failed)
  2  usage                            8  the other side or the way to it failed
  3  the source failed                9  a hook failed
  4  the target refused or failed    70  a bug in blockferry
  5  interrupted, resumable          130, 143  stopped cleanly by SIGINT, SIGTERM";

/// Options of every verb.
#[derive(Args, Clone, Debug)]
pub(crate) struct Global {
    /// Only errors, warnings and what was asked for
    #[arg(
        short,
        long,
        global = true,
        conflicts_with = "verbose",
        help_heading = "Every verb"
    )]
    pub(crate) quiet: bool,
    /// Also checkpoints, digests and times
    #[arg(short, long, global = true, help_heading = "Every verb")]
    pub(crate) verbose: bool,
    /// JSON lines on standard output instead of text
    #[arg(long, global = true, help_heading = "Every verb")]
    pub(crate) json: bool,
    /// Keep log and state in DIR instead of beside the target
    #[arg(long, global = true, value_name = "DIR", value_parser = directory(), help_heading = "Every verb")]
    pub(crate) state: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Show the whole story on a disk made for it, in a temporary directory
    Demo(DemoArguments),
    /// Bring TARGET to the content of SOURCE
    Sync(SyncArguments),
    /// Tell where a target stands and what can be done next
    Status(StatusArguments),
    /// Continue an interrupted run from its recorded source
    Resume(ResumeArguments),
    /// Drop what an unfinished run has staged; the target keeps its old point
    Cancel(TargetArguments),
    /// Return the target to the point before the last run
    Rollback(TargetArguments),
    /// Let go of the old point and free its space
    Accept(TargetArguments),
    /// List the extents in which two disks differ
    Diff(DiffArguments),
    /// Print the root digest of a disk
    Digest(DigestArguments),
    /// Compare two disks, or check a target against its recorded point
    Verify(VerifyArguments),
    /// Serve a point of a target over NBD, to look inside, to try it, or to boot from it
    Export(ExportArguments),
    /// Be the far end of syncs that other hosts begin: what ssh starts there, or a server
    Serve(ServeArguments),
    /// Make certificates for hosts that are to trust each other
    Certs(CertsArguments),
    /// Bring a running machine over to its replica, pass by pass, with a pause of seconds at the end
    Failover(FailoverArguments),
    /// List the jobs of this host, the newest first
    Jobs(JobsArguments),
    /// Print a completion script for a shell
    Completions(CompletionsArguments),
    /// Write the manual pages into a directory
    #[command(hide = true)]
    Man(ManArguments),
    /// Freeze a guest, and thaw it when told, at the deadline, or when whoever began it is gone
    #[command(hide = true)]
    FreezeGuard(FreezeGuardArguments),
}

impl Verb {
    /// The word the user types.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Demo(_) => "demo",
            Self::Sync(_) => "sync",
            Self::Status(_) => "status",
            Self::Resume(_) => "resume",
            Self::Cancel(_) => "cancel",
            Self::Rollback(_) => "rollback",
            Self::Accept(_) => "accept",
            Self::Diff(_) => "diff",
            Self::Digest(_) => "digest",
            Self::Verify(_) => "verify",
            Self::Export(_) => "export",
            Self::Serve(_) => "serve",
            Self::Certs(_) => "certs",
            Self::Failover(_) => "failover",
            Self::Jobs(_) => "jobs",
            Self::Completions(_) => "completions",
            Self::Man(_) => "man",
            Self::FreezeGuard(_) => "freeze-guard",
        }
    }
}

#[derive(Args, Debug)]
pub(crate) struct DemoArguments {
    /// Work in DIR instead of a temporary directory
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Size of the disk
    #[arg(long, value_name = "SIZE", default_value = "384MiB", value_parser = positive_size)]
    pub(crate) size: u64,
    /// Keep the disks, not only the receipt
    #[arg(long)]
    pub(crate) keep: bool,
}

#[derive(Args, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each one is a flag of the command line contract"
)]
pub(crate) struct SyncArguments {
    /// The disk to read: a file or block device at rest, here or as [USER@]HOST:PATH, an NBD export, an image as
    /// qcow2+file:PATH, or an export of a server
    #[arg(value_parser = location())]
    pub(crate) source: Location,
    /// The disk to bring up to date: a file (created if absent) or block device, here or as [USER@]HOST:PATH, an NBD
    /// export, an image as qcow2+file:PATH, or an export of a server
    #[arg(value_parser = location())]
    pub(crate) target: Location,
    /// How to find what to send
    #[arg(long, value_enum, default_value_t = ModeArgument::Auto)]
    pub(crate) mode: ModeArgument,
    /// Unit of digests: a power of two from 4KiB to 1MiB
    #[arg(long, value_name = "SIZE", default_value = "64KiB")]
    pub(crate) block_size: BlockSize,
    /// Whether the old point can be returned to afterwards
    #[arg(long, value_enum, default_value_t = UndoArgument::Keep)]
    pub(crate) undo: UndoArgument,
    /// Predict time, bytes and space; write nothing at all
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) pace: Pace,
    #[command(flatten)]
    pub(crate) reach: Reach,
    /// Make a target file that is larger than the source shorter
    #[arg(long)]
    pub(crate) allow_shrink: bool,
    /// Write over the old content without a log: no way back, and incomplete until done
    #[arg(long)]
    pub(crate) in_place: bool,
    /// Stop where a shortcut fails instead of falling back to comparing everything
    #[arg(long)]
    pub(crate) strict: bool,
    /// Trust no saved manifest: read both disks completely
    #[arg(long)]
    pub(crate) rescan: bool,
    /// For experts: how the target is brought to the new point, instead of the planner's choice
    #[arg(long, value_enum)]
    pub(crate) strategy: Option<StrategyArgument>,
}

/// Options about a run's appetite, also taken when it is resumed.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Pace {
    /// Most bytes per second to send, such as 100M or 1.5GiB
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) bwlimit: Option<u64>,
    /// Worker threads [default: one per processor, within the memory bound]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
    /// Most space the transfer log may take
    #[arg(long, value_name = "SIZE", value_parser = positive_size)]
    pub(crate) log_limit: Option<u64>,
    /// Believe the flush: do not read what was written back from the medium before the run counts as done
    #[arg(long)]
    pub(crate) no_read_back: bool,
    /// Accept a source that is mounted or held open for writing; its point is then only crash-consistent
    #[arg(long)]
    pub(crate) crash_consistent: bool,
}

impl Pace {
    /// The options as they are typed, each behind a blank.
    pub(crate) fn words(&self) -> String {
        let option = |name, value: Option<u64>| value.map(|value| format!(" --{name} {value}"));
        let limits = [
            option("bwlimit", self.bwlimit),
            option("threads", self.threads.map(u64::from)),
            option("log-limit", self.log_limit),
        ];
        let mut words: String = limits.into_iter().flatten().collect();
        if self.no_read_back {
            words.push_str(" --no-read-back");
        }
        if self.crash_consistent {
            words.push_str(" --crash-consistent");
        }
        words
    }
}

/// How another host is reached.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reach {
    #[command(flatten)]
    pub(crate) shell: RemoteShell,
    /// The certificates of this host, for blockferry:// [default: /etc/blockferry/certs, or in ~/.config]
    #[arg(long, value_name = "DIR", value_parser = directory())]
    pub(crate) certs: Option<PathBuf>,
}

/// How blockferry is started on another host.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RemoteShell {
    /// The remote shell, with its options [default: ssh]
    #[arg(short = 'e', long, value_name = "COMMAND")]
    pub(crate) rsh: Option<String>,
    /// How blockferry is started on the other host, by its shell
    #[arg(long, value_name = "COMMAND", default_value = "blockferry")]
    pub(crate) remote_path: String,
}

impl Reach {
    /// The options as they are typed, each behind a blank.
    pub(crate) fn words(&self) -> String {
        let mut words = String::new();
        if let Some(rsh) = &self.shell.rsh {
            words.push_str(&format!(" --rsh {}", quoted(rsh)));
        }
        let remote_path = &self.shell.remote_path;
        if remote_path != "blockferry" {
            words.push_str(&format!(" --remote-path {}", quoted(remote_path)));
        }
        if let Some(certs) = &self.certs {
            let certs = std::path::absolute(certs).unwrap_or_else(|_| certs.clone());
            words.push_str(&format!(" --certs {}", quoted_path(&certs)));
        }
        words
    }
}

#[derive(Args, Debug)]
pub(crate) struct ExportArguments {
    /// The target, or the id of one of its points
    #[arg(value_name = "TARGET|ID", value_parser = disk())]
    pub(crate) target: DiskAddress,
    /// Which of its points [default: current, or the one that has the id]
    #[arg(long, value_enum)]
    pub(crate) point: Option<PointArgument>,
    /// Let clients write: what they write is kept aside, and forgotten when the export ends
    #[arg(long)]
    pub(crate) copy_on_write: bool,
    /// Keep what clients write in DIR, in a file without a name [default: $TMPDIR, or /var/tmp]
    #[arg(long, value_name = "DIR", requires = "copy_on_write", value_parser = directory())]
    pub(crate) scratch: Option<PathBuf>,
    /// Listen at a Unix socket, which must not exist [default: one in a private directory]
    #[arg(long, value_name = "PATH", value_parser = directory())]
    pub(crate) socket: Option<PathBuf>,
    /// Listen at ADDRESS, a name or number with or without a port: who reaches it can read the disk
    #[arg(long, value_name = "ADDRESS", conflicts_with = "socket", value_parser = listening_nbd)]
    pub(crate) listen: Option<String>,
    /// The name of the export [default: the empty one]
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    pub(crate) name: String,
}

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("way").required(true).args(["stdio", "listen"]))]
pub(crate) struct ServeArguments {
    /// Talk over standard input and output, as ssh carries them
    #[arg(long)]
    pub(crate) stdio: bool,
    /// Listen at ADDRESS, a name or number with or without a port, and serve over TLS what the configuration names
    #[arg(long, value_name = "ADDRESS", requires = "config", value_parser = listening)]
    pub(crate) listen: Option<String>,
    /// The configuration: what is exported, and to whom
    #[arg(long, value_name = "FILE", requires = "listen")]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct CertsArguments {
    /// Where the authority is, and where certificates go; made if absent
    pub(crate) dir: PathBuf,
    /// A host, and after commas its other names and addresses
    #[arg(value_name = "NAME[,NAME]...", required = true)]
    pub(crate) hosts: Vec<String>,
    /// How long the certificates are valid
    #[arg(long, value_name = "DAYS", default_value_t = 825, value_parser = clap::value_parser!(u32).range(1..=36500))]
    pub(crate) days: u32,
}

#[derive(Args, Debug)]
pub(crate) struct StatusArguments {
    /// The target; without it, all targets synced from this host
    #[arg(value_parser = disk())]
    pub(crate) target: Option<DiskAddress>,
}

#[derive(Args, Debug)]
pub(crate) struct ResumeArguments {
    /// The target of the interrupted run
    #[arg(value_parser = disk())]
    pub(crate) target: DiskAddress,
    #[command(flatten)]
    pub(crate) pace: Pace,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Args, Debug)]
pub(crate) struct TargetArguments {
    /// The target
    #[arg(value_parser = disk())]
    pub(crate) target: DiskAddress,
}

#[derive(Args, Debug)]
pub(crate) struct DiffArguments {
    /// One disk
    #[arg(value_parser = disk())]
    pub(crate) a: DiskAddress,
    /// The other disk
    #[arg(value_parser = disk())]
    pub(crate) b: DiskAddress,
}

#[derive(Args, Debug)]
pub(crate) struct DigestArguments {
    /// The disk
    #[arg(value_parser = disk())]
    pub(crate) image: DiskAddress,
    /// Write the manifest (the digests of all blocks) to OUT, which must not exist
    #[arg(long, value_name = "OUT")]
    pub(crate) manifest: Option<PathBuf>,
    /// Unit of digests: a power of two from 4KiB to 1MiB
    #[arg(long, value_name = "SIZE", default_value = "64KiB")]
    pub(crate) block_size: BlockSize,
}

#[derive(Args, Debug)]
#[command(
    override_usage = "blockferry verify [OPTIONS] A B\n       blockferry verify [OPTIONS] TARGET"
)]
pub(crate) struct VerifyArguments {
    /// The target to check against its recorded point, or the first of two disks to compare
    #[arg(value_name = "A|TARGET", value_parser = disk())]
    pub(crate) first: DiskAddress,
    /// The second disk to compare
    #[arg(value_name = "B", value_parser = disk())]
    pub(crate) second: Option<DiskAddress>,
}

#[derive(Args, Debug)]
pub(crate) struct FailoverArguments {
    /// What to do with the job
    #[arg(value_enum)]
    pub(crate) action: FailoverAction,
    /// The job by its name; to start or reverse one, the file that describes it; to reverse one of another host, HOST:JOB
    #[arg(value_name = "JOB")]
    pub(crate) job: OsString,
    /// complete: not before TIME, as 2026-11-28T02:00:00Z, or +30m
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) at: Option<i64>,
    /// start, reverse: end once the job is ready, instead of refreshing the target until it is cut over
    #[arg(long, value_enum, value_name = "STATE")]
    pub(crate) until: Option<UntilArgument>,
    /// complete: the source is gone: start the replica from the last pass; what was written since is lost
    #[arg(long, conflicts_with = "at")]
    pub(crate) without_source: bool,
    /// commit: while the replica goes on; its machine, that of [reverse] in the job's file, merges what it wrote
    #[arg(long)]
    pub(crate) live: bool,
    /// commit, reverse: end the machine that the job came from, which is kept as it was stopped otherwise
    #[arg(long)]
    pub(crate) release_source: bool,
    #[command(flatten)]
    pub(crate) shell: RemoteShell,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FailoverAction {
    /// Copy what changed, pass by pass, and go on doing so
    Start,
    /// Tell where the job stands and what leads on and back
    Status,
    /// Stop the source, copy the last changes, start the replica
    Complete,
    /// Copy no more; the target stays at its last pass
    Cancel,
    /// Return the target to the point before the job, and let the source run
    Rollback,
    /// Keep what the replica wrote, and let the old point go
    Commit,
    /// Copy back to where the job came from what the replica changed since, by a job the other way round
    Reverse,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum UntilArgument {
    /// The last pass would fit the budget, or more passes bring nothing
    Ready,
}

#[derive(Args, Debug)]
pub(crate) struct JobsArguments {
    /// Only jobs in this state, as ready or committed
    #[arg(long, value_name = "STATE")]
    pub(crate) in_state: Option<State>,
    /// Only jobs of this operation: failover or reverse
    #[arg(long, value_name = "OPERATION")]
    pub(crate) operation: Option<String>,
    /// Only jobs that something happened to at TIME or later
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) from: Option<i64>,
    /// Only jobs that were created at TIME or before
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) to: Option<i64>,
}

#[derive(Args, Debug)]
pub(crate) struct FreezeGuardArguments {
    /// The socket of the guest's agent
    #[arg(long, value_name = "SOCKET")]
    pub(crate) agent: Option<PathBuf>,
    /// The file that describes the scripts
    #[arg(long, value_name = "FILE")]
    pub(crate) scripts: Option<PathBuf>,
    /// Longest time, in milliseconds
    pub(crate) deadline_ms: u64,
}

#[derive(Args, Debug)]
pub(crate) struct CompletionsArguments {
    /// The shell
    #[arg(value_enum)]
    pub(crate) shell: ShellArgument,
}

#[derive(Args, Debug)]
pub(crate) struct ManArguments {
    /// Where to write them
    pub(crate) dir: PathBuf,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ModeArgument {
    /// Sample, measure, predict both and choose
    #[default]
    Auto,
    /// Compare and send what differs
    Delta,
    /// Send everything that is not zero, without comparing
    Full,
}

impl From<ModeArgument> for Mode {
    fn from(argument: ModeArgument) -> Self {
        match argument {
            ModeArgument::Auto => Self::Auto,
            ModeArgument::Delta => Self::Delta,
            ModeArgument::Full => Self::Full,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum UndoArgument {
    /// Keep the old point until `accept`
    #[default]
    Keep,
    /// Let it go as soon as the new one is proven
    None,
}

impl From<UndoArgument> for Undo {
    fn from(argument: UndoArgument) -> Self {
        match argument {
            UndoArgument::Keep => Self::Keep,
            UndoArgument::None => Self::None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum StrategyArgument {
    /// Reflink the target, write into the clone, exchange
    Clone,
    /// Write a complete sibling, exchange
    Shadow,
    /// Stage new and old pages in the log, commit, apply
    Redo,
    /// Write in place; only where nothing old is to be kept
    Direct,
}

impl From<StrategyArgument> for Strategy {
    fn from(argument: StrategyArgument) -> Self {
        match argument {
            StrategyArgument::Clone => Self::Clone,
            StrategyArgument::Shadow => Self::Shadow,
            StrategyArgument::Redo => Self::Redo,
            StrategyArgument::Direct => Self::Direct,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PointArgument {
    /// What `rollback` would return to
    Old,
    /// What a prepared run will bring once its group of disks decides
    New,
    /// What the target holds
    Current,
}

impl From<PointArgument> for ExportPoint {
    fn from(argument: PointArgument) -> Self {
        match argument {
            PointArgument::Old => Self::Old,
            PointArgument::New => Self::New,
            PointArgument::Current => Self::Current,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum ShellArgument {
    Bash,
    Zsh,
    Fish,
}

impl From<ShellArgument> for Shell {
    fn from(argument: ShellArgument) -> Self {
        match argument {
            ShellArgument::Bash => Self::Bash,
            ShellArgument::Zsh => Self::Zsh,
            ShellArgument::Fish => Self::Fish,
        }
    }
}

fn location() -> ValueParser {
    ValueParser::new(OsStringValueParser::new().try_map(Location::parse))
}

fn disk() -> ValueParser {
    ValueParser::new(OsStringValueParser::new().try_map(disk_here))
}

/// A path, or the `file://` URL that printed commands have for one that is no text.
fn directory() -> ValueParser {
    ValueParser::new(OsStringValueParser::new().try_map(file_url::path_or_url))
}

/// With the usual port, unless it names one; 0 is any that is free.
fn listening(text: &str) -> Result<String, String> {
    listening_with(text, PORT)
}

fn listening_nbd(text: &str) -> Result<String, String> {
    listening_with(text, nbd::PORT)
}

fn listening_with(text: &str, usual_port: u16) -> Result<String, String> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => {
            let port = port.parse::<u16>();
            (host, port.map_err(|error| format!("port: {error}"))?)
        }
        _ => (text, usual_port),
    };
    let is_number = host.starts_with('[') && host.ends_with(']');
    if host.is_empty() || (host.contains(':') && !is_number) {
        return Err("expected a name or a number, in brackets if it is one of IPv6".to_owned());
    }
    Ok(format!("{host}:{port}"))
}

/// Milliseconds since 1970 of a time in UTC or with its offset, or of one that is so far from now.
fn moment(text: &str) -> Result<i64, String> {
    let since_1970 = match (text.strip_prefix('+'), text.strip_prefix('-')) {
        (None, None) => {
            let parsed = OffsetDateTime::parse(text, &Rfc3339);
            let expected = "expected a time as 2026-11-28T02:00:00Z, or +30m for one from now";
            let parsed = parsed.map_err(|_no_time| expected.to_owned())?;
            parsed.unix_timestamp_nanos() / 1_000_000
        }
        (after, before) => {
            let distance = after.or(before).unwrap_or_default();
            let distance = parse_duration(distance).map_err(|error| error.to_string())?;
            let now = OffsetDateTime::from(SystemTime::now()).unix_timestamp_nanos() / 1_000_000;
            let distance = i128::try_from(distance.as_millis()).unwrap_or(i128::MAX);
            if after.is_some() {
                now.saturating_add(distance)
            } else {
                now.saturating_sub(distance)
            }
        }
    };
    i64::try_from(since_1970).map_err(|_far| "it is too far away".to_owned())
}

fn positive_size(text: &str) -> Result<u64, String> {
    match parse_size(text) {
        Ok(0) => Err("it must be greater than zero".to_owned()),
        Ok(bytes) => Ok(bytes),
        Err(error) => Err(error.to_string()),
    }
}

/// Bytes per second; a trailing `/s` is what people write, so it is understood.
fn rate(text: &str) -> Result<u64, String> {
    positive_size(text.strip_suffix("/s").unwrap_or(text))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_knows_its_own_name() {
        for (line, name) in [
            ("demo", "demo"),
            ("sync a b", "sync"),
            ("status", "status"),
            ("resume t", "resume"),
            ("cancel t", "cancel"),
            ("rollback t", "rollback"),
            ("accept t", "accept"),
            ("diff a b", "diff"),
            ("digest a", "digest"),
            ("verify t", "verify"),
            ("export t", "export"),
            ("serve --stdio", "serve"),
            ("failover start job.toml", "failover"),
            ("jobs", "jobs"),
            ("freeze-guard --agent s 1", "freeze-guard"),
            ("completions bash", "completions"),
            ("man d", "man"),
        ] {
            let words = ["blockferry"].into_iter().chain(line.split(' '));
            assert_eq!(Cli::try_parse_from(words).expect(line).verb.name(), name);
        }
    }

    #[test]
    fn a_pace_is_the_same_when_its_words_are_typed_again() {
        for line in [
            "resume t",
            "resume t --bwlimit 1.5M --threads 3 --log-limit 4GiB --no-read-back --crash-consistent",
        ] {
            let parse = |line: &str| {
                let words = ["blockferry"].into_iter().chain(line.split(' '));
                match Cli::try_parse_from(words).expect(line).verb {
                    Verb::Resume(arguments) => arguments.pace,
                    verb => panic!("{verb:?}"),
                }
            };
            let pace = parse(line);

            assert_eq!(parse(&format!("resume t{}", pace.words())), pace);
        }
    }

    #[test]
    fn moments_are_times_or_distances_from_now() {
        assert_eq!(moment("1970-01-01T00:00:01Z"), Ok(1000));
        assert_eq!(moment("1970-01-01T01:00:00+01:00"), Ok(0));
        let (past, future) = (moment("-1h").unwrap(), moment("+1h").unwrap());
        assert!((future - past - 7_200_000).abs() < 60_000);
        for wrong in ["", "soon", "02:00", "+", "+1d", "2026-11-28"] {
            assert!(moment(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn rates_are_sizes_and_never_zero() {
        assert_eq!(rate("100M"), Ok(100 << 20));
        assert_eq!(rate("100M/s"), Ok(100 << 20));
        assert!(rate("0").is_err());
        assert!(rate("fast").is_err());
    }

    #[test]
    fn no_flag_forces_everything_or_answers_everything() {
        for flag in ["--force", "--yes"] {
            assert!(
                Cli::try_parse_from(["blockferry", "sync", "a", "b", flag]).is_err(),
                "{flag}"
            );
        }
    }
}
