//! What a job is to do, as a person writes it down: a TOML file.
//!
//! ```toml
//! name = "web1"
//! downtime-budget = "2s"
//! refresh = "1m"
//!
//! [machine]
//! qmp = "/run/web1/qmp.sock"
//! agent = "/run/web1/qga.sock"
//! quiesce = "freeze-and-stop"
//!
//! [[disk]]
//! node = "disk0"
//! target = "/srv/replicas/web1.raw"
//!
//! [hooks]
//! start-target = ["/usr/local/bin/start-replica", "web1"]
//!
//! [reverse.machine]
//! qmp = "/run/web1-replica/qmp.sock"
//!
//! [[reverse.disk]]
//! node = "disk0"
//! target = "/srv/web1.raw"
//! ```

use std::path::PathBuf;
use std::time::Duration;

use blockferry_engine::Mode;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, ErrorKind, Result};

/// As many as share one cut.
const MAX_DISKS: usize = 100;

/// A job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[non_exhaustive]
pub struct JobSpec {
    /// Names it: 1 to 16 of `a` to `z`, `0` to `9` and `-`.
    pub name: String,
    /// How the first pass is copied.
    #[serde(default)]
    pub mode: Mode,
    /// How long the source may stand still.
    #[serde(default = "two_seconds", with = "duration")]
    pub downtime_budget: Duration,
    /// What becomes of the guest at the cutover.
    #[serde(default)]
    pub hand_over: HandOverBy,
    /// How often the target is refreshed while the job waits for its cutover.
    #[serde(default = "a_minute", with = "duration")]
    pub refresh: Duration,
    /// Longest time for which the file systems of the guest are frozen.
    #[serde(default = "five_seconds", with = "duration")]
    pub freeze_deadline: Duration,
    /// The machine whose disks are copied.
    pub machine: MachineSpec,
    /// Its disks.
    pub disk: Vec<DiskSpec>,
    /// What else is run.
    #[serde(default)]
    pub hooks: Hooks,
    /// The way back, once the replica is committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reverse: Option<Reverse>,
}

/// The way back: the replica becomes the source, and the disks that it came from the targets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Reverse {
    /// The machine that `start-target` of the job starts on the targets. Started stopped, it is made to record what it
    /// writes, and let go: then no more than that has to be read.
    pub machine: MachineSpec,
    /// Its disks, in the order of the job's: each with the disk that the job's came from as its target.
    pub disk: Vec<DiskSpec>,
    /// What else is run: `start-target` starts the machine that the job came from.
    #[serde(default)]
    pub hooks: Hooks,
}

/// How a machine is reached and stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[non_exhaustive]
pub struct MachineSpec {
    /// The host that it runs on, as ssh names it: `host` or `user@host`; without one it is this host. All paths here are
    /// on that host, where blockferry has to be as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Its QMP socket.
    pub qmp: PathBuf,
    /// The socket of its guest's agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<PathBuf>,
    /// The file that describes scripts which bring an application to rest around a point, as Azure's framework does: its
    /// owner is root and its mode 600, that of the scripts 700.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scripts: Option<PathBuf>,
    /// The socket of its NBD server, if somebody else started one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd: Option<PathBuf>,
    /// A directory where the machine's process can write, for what it overwrites while a point is read; by default that
    /// of the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<PathBuf>,
    /// How it is stopped for the last pass.
    #[serde(default)]
    pub quiesce: QuiesceBy,
    /// Where it takes the memory of a guest that is handed over to it, as QEMU names it: `tcp:HOST:PORT`; by default a
    /// socket of the job, which another host does not reach.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// A directory of TLS credentials with which memory travels, as QEMU has them: `ca-cert.pem` and the `cert.pem` and
    /// `key.pem` of `server-` to take it and of `client-` to send it, or `keys.psk` with a key of `qemu`. Without one it is
    /// not encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_tls: Option<PathBuf>,
}

/// How a machine is stopped for the last pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::exhaustive_enums, reason = "callers decide for each")]
pub enum QuiesceBy {
    /// Its file systems are frozen if it has an agent, then its processors are stopped.
    #[default]
    FreezeAndStop,
    /// Its power button is pressed, and its shutdown waited for.
    PowerDown,
    /// Its processors are stopped.
    Stop,
}

/// What becomes of the guest at the cutover.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::exhaustive_enums, reason = "callers decide for each")]
pub enum HandOverBy {
    /// Its replica boots.
    #[default]
    Cold,
    /// It goes on in the machine of the replica, that of [`JobSpec::reverse`], with its memory.
    Warm,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[non_exhaustive]
pub struct DiskSpec {
    /// The node of the machine.
    pub node: String,
    /// The file or device that becomes the replica.
    pub target: PathBuf,
    /// NBD exports of the machine through which others write this disk, by id: they are taken away when the machine is
    /// stopped, and given back when it goes on. Of a qemu-storage-daemon, which has no processors to stop.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub writers: Vec<String>,
}

/// Programs that are run, each with its arguments. What they are told is in their environment: `BLOCKFERRY_JOB`,
/// `BLOCKFERRY_STEP`, and for each disk, counted from 0, `BLOCKFERRY_DISK_0_TARGET` and, where there is one,
/// `BLOCKFERRY_DISK_0_OVERLAY`; and `BLOCKFERRY_HAND_OVER=warm` where the replica is to wait for the memory of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
#[non_exhaustive]
pub struct Hooks {
    /// Makes the source unable to start by itself: after its last pass, before the target starts.
    pub fence_source: Vec<String>,
    /// Undoes that.
    pub unfence_source: Vec<String>,
    /// Starts the replica on the overlays.
    pub start_target: Vec<String>,
    /// Stops it.
    pub stop_target: Vec<String>,
    /// For how long each of them may run.
    #[serde(with = "duration")]
    pub timeout: HookTimeout,
}

/// For how long a hook may run: five minutes unless it is said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_structs, reason = "a duration with a default")]
pub struct HookTimeout(pub Duration);

impl Default for HookTimeout {
    fn default() -> Self {
        Self(Duration::from_secs(300))
    }
}

impl From<Duration> for HookTimeout {
    fn from(duration: Duration) -> Self {
        Self(duration)
    }
}

impl From<HookTimeout> for Duration {
    fn from(timeout: HookTimeout) -> Self {
        timeout.0
    }
}

fn two_seconds() -> Duration {
    Duration::from_secs(2)
}

fn five_seconds() -> Duration {
    Duration::from_secs(5)
}

fn a_minute() -> Duration {
    Duration::from_secs(60)
}

impl JobSpec {
    /// Reads a job.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub fn from_toml(text: &str) -> Result<Self> {
        let spec: Self = toml::from_str(text)
            .map_err(|cause| Error::new(ErrorKind::Usage, cause.to_string().trim().to_owned()))?;
        spec.check()?;
        Ok(spec)
    }

    /// As it is read again.
    ///
    /// # Errors
    /// A path is no UTF-8.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self)
            .map_err(|cause| Error::because(ErrorKind::Usage, "write the job down", cause))
    }

    pub(crate) fn check(&self) -> Result<()> {
        let refused = |why: String| Err(Error::new(ErrorKind::Usage, why));
        self.name
            .parse::<blockferry_qemu::Tag>()
            .map_err(|cause| Error::new(ErrorKind::Usage, format!("name: {cause}")))?;
        check_disks(&self.disk).or_else(|why| refused(format!("disk: {why}")))?;
        let Some(way) = &self.reverse else {
            return match self.hand_over {
                HandOverBy::Cold => Ok(()),
                HandOverBy::Warm => refused(
                    "hand-over: a warm one needs the machine of the replica: expected [reverse]"
                        .to_owned(),
                ),
            };
        };
        if self.hand_over == HandOverBy::Warm
            && self.machine.host.is_some()
            && way.machine.memory.is_none()
        {
            let why = "reverse.machine.memory: expected tcp:HOST:PORT, where a machine on another host sends its memory";
            return refused(why.to_owned());
        }
        if self.machine.memory_tls.is_some() != way.machine.memory_tls.is_some() {
            let why = "memory-tls: expected for both machines, or for neither";
            return refused(why.to_owned());
        }
        let directories = [&self.machine.memory_tls, &way.machine.memory_tls];
        if let Some(relative) = directories.into_iter().flatten().find(|d| !d.is_absolute()) {
            let relative = relative.display();
            return refused(format!("memory-tls {relative}: expected an absolute path"));
        }
        check_disks(&way.disk).or_else(|why| refused(format!("reverse.disk: {why}")))?;
        if way.machine.host.is_some() {
            let why = "reverse.machine: expected no host: the replica runs where its disks are";
            return refused(why.to_owned());
        }
        if way.disk.len() != self.disk.len() {
            return refused(format!(
                "reverse.disk: expected as many as there are disks, {}, found {}",
                self.disk.len(),
                way.disk.len()
            ));
        }
        let back = |disk: &&DiskSpec| self.disk.iter().any(|other| other.target == disk.target);
        match way.disk.iter().find(back) {
            Some(disk) => refused(format!(
                "reverse.disk: target {} is a target of the job: expected the disk that it came from",
                disk.target.display()
            )),
            None => Ok(()),
        }
    }

    /// The job that leads back, if this one says how: what was the source is its target, and its own way back is this
    /// job's way.
    #[must_use]
    pub fn reversed(&self) -> Option<Self> {
        let way = self.reverse.clone()?;
        Some(Self {
            machine: way.machine,
            disk: way.disk,
            hooks: way.hooks,
            reverse: Some(Reverse {
                machine: self.machine.clone(),
                disk: self.disk.clone(),
                hooks: self.hooks.clone(),
            }),
            ..self.clone()
        })
    }
}

fn check_disks(disks: &[DiskSpec]) -> std::result::Result<(), String> {
    if !(1..=MAX_DISKS).contains(&disks.len()) {
        return Err(format!(
            "expected 1 to {MAX_DISKS} of them, found {}",
            disks.len()
        ));
    }
    for (index, disk) in disks.iter().enumerate() {
        let others = &disks[..index];
        let target = disk.target.display();
        if others.iter().any(|other| other.node == disk.node) {
            return Err(format!("node {:?} is named twice", disk.node));
        }
        if others.iter().any(|other| other.target == disk.target) {
            return Err(format!("target {target} is named twice"));
        }
        if !disk.target.is_absolute() {
            return Err(format!("target {target}: expected an absolute path"));
        }
    }
    Ok(())
}

/// A time as people write it: `500ms`, `2s`, `5m`, `1h`.
///
/// # Errors
/// What was expected.
pub fn parse_duration(text: &str) -> Result<Duration> {
    let wrong = || {
        let why = format!("duration {text:?}: expected a number with ms, s, m or h, as 500ms");
        Error::new(ErrorKind::Usage, why)
    };
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_not_a_number| wrong())?;
    let unit_ms = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    let ms = number.checked_mul(unit_ms).ok_or_else(wrong)?;
    Ok(Duration::from_millis(ms))
}

mod duration {
    use super::{Deserialize, Deserializer, Duration, Serializer, parse_duration};

    pub(super) fn serialize<S: Serializer, T: Copy + Into<Duration>>(
        duration: &T,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let duration: Duration = (*duration).into();
        serializer.collect_str(&format_args!("{}ms", duration.as_millis()))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>, T: From<Duration>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parsed = parse_duration(&text).map_err(serde::de::Error::custom)?;
        Ok(parsed.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = r#"
        name = "web1"
        mode = "delta"
        downtime-budget = "500ms"
        refresh = "5m"
        freeze-deadline = "3s"

        [machine]
        qmp = "/run/qmp"
        agent = "/run/qga"
        nbd = "/run/nbd"
        quiesce = "power-down"

        [[disk]]
        node = "disk0"
        target = "/srv/a.raw"
        writers = ["w0"]

        [[disk]]
        node = "disk1"
        target = "/srv/b.raw"

        [hooks]
        start-target = ["start", "web1"]
        timeout = "1h"

        [reverse.machine]
        qmp = "/run/other/qmp"

        [[reverse.disk]]
        node = "root"
        target = "/srv/old-a.raw"

        [[reverse.disk]]
        node = "data"
        target = "/srv/old-b.raw"
    "#;

    #[test]
    fn a_job_is_read_as_it_is_written() {
        let spec = JobSpec::from_toml(WHOLE).unwrap();

        assert_eq!(spec.downtime_budget, Duration::from_millis(500));
        assert_eq!(spec.machine.quiesce, QuiesceBy::PowerDown);
        assert_eq!(spec.hooks.timeout.0, Duration::from_secs(3600));
        assert_eq!(JobSpec::from_toml(&spec.to_toml().unwrap()).unwrap(), spec);
    }

    #[test]
    fn a_way_back_and_back_again_is_the_same_job() {
        let spec = JobSpec::from_toml(WHOLE).unwrap();

        let back = spec.reversed().unwrap();

        assert_eq!(back.disk[1].target, PathBuf::from("/srv/old-b.raw"));
        assert_eq!(back.machine.qmp, PathBuf::from("/run/other/qmp"));
        assert_eq!(JobSpec::from_toml(&back.to_toml().unwrap()).unwrap(), back);
        assert_eq!(back.reversed().unwrap(), spec);
        let shorter = WHOLE.rsplit_once("[[reverse.disk]]").unwrap().0;
        let error = JobSpec::from_toml(shorter).expect_err("a disk is missing");
        assert!(error.to_string().contains("as many"), "{error}");
    }

    #[test]
    fn a_warm_hand_over_needs_a_machine_that_takes_it_and_a_way_to_it() {
        let warm = WHOLE.replace("mode = \"delta\"", "hand-over = \"warm\"");
        let far = warm.replacen("[machine]", "[machine]\nhost = \"b\"", 1);
        let to = "qmp = \"/run/other/qmp\"";
        let reached = far.replace(to, &format!("{to}\nmemory = \"tcp:a:4444\""));

        let encrypted = warm.replace("qmp = ", "memory-tls = \"/pki\"\nqmp = ");
        for good in [&warm, &reached, &encrypted] {
            let spec = JobSpec::from_toml(good).unwrap();
            assert_eq!(spec.hand_over, HandOverBy::Warm);
            assert_eq!(JobSpec::from_toml(&spec.to_toml().unwrap()).unwrap(), spec);
        }
        let error = JobSpec::from_toml(&far).expect_err("a socket of this host");
        assert!(error.to_string().contains("tcp:HOST:PORT"), "{error}");
        let half = warm.replacen("qmp = ", "memory-tls = \"/pki\"\nqmp = ", 1);
        let error = JobSpec::from_toml(&half).expect_err("the other side does not know it");
        assert!(error.to_string().contains("both"), "{error}");
        let relative = encrypted.replace("/pki", "pki");
        let error = JobSpec::from_toml(&relative).expect_err("whose?");
        assert!(error.to_string().contains("absolute"), "{error}");
        let alone = warm.split("[reverse").next().unwrap();
        let error = JobSpec::from_toml(alone).expect_err("nobody takes it");
        assert!(error.to_string().contains("[reverse]"), "{error}");
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        for (from, to, said) in [
            ("name = \"web1\"", "name = \"Web 1\"", "name"),
            ("\"500ms\"", "\"soon\"", "500ms"),
            ("\"500ms\"", "\"1d\"", "duration"),
            ("\"power-down\"", "\"kill\"", "freeze-and-stop"),
            ("node = \"disk1\"", "node = \"disk0\"", "twice"),
            ("/srv/b.raw", "/srv/a.raw", "twice"),
            ("/srv/b.raw", "b.raw", "absolute"),
            ("qmp =", "qpm =", "qpm"),
            ("start-target", "start_target", "start_target"),
            ("node = \"data\"", "node = \"root\"", "reverse.disk: node"),
            ("/srv/old-b.raw", "/srv/a.raw", "came from"),
            ("[[disk]]", "[[disc]]", "disc"),
            (
                "qmp = \"/run/other/qmp\"",
                "qmp = \"/q\"\nhost = \"b\"",
                "no host",
            ),
            ("mode = \"delta\"", "hand-over = \"hot\"", "cold"),
        ] {
            let error = JobSpec::from_toml(&WHOLE.replace(from, to)).expect_err(to);
            assert!(error.to_string().contains(said), "{to}: {error}");
        }
    }
}
