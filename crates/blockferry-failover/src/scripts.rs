//! Scripts that bring an application to rest around a point, described as Azure's Linux script framework describes them
//! (`VMSnapshotScriptPluginConfig.json`: <https://learn.microsoft.com/azure/backup/backup-azure-linux-app-consistent>).
//!
//! The file belongs to root and has mode 600, the scripts belong to root and have mode 700, so that nobody else decides
//! what is run.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockferry_device::{
    CancelToken, Consistency, Error as DeviceError, ErrorKind as DeviceErrorKind,
    Result as DeviceResult,
};
use blockferry_qemu::freeze::{Freezer, Frozen, GuestFreezer};
use serde::Deserialize;

use crate::error::{Error, ErrorKind, Result};
use crate::hooks;

/// More than any description needs.
const MAX_BYTES: u64 = 64 << 10;
/// As the framework allows.
const MAX_TIMEOUT: u64 = 1800;
const PERMISSIONS: u32 = 0o7777;
const OF_THE_FILE: u32 = 0o600;
const OF_A_SCRIPT: u32 = 0o700;
/// How often it is looked whether those of another point are through.
const TICK: Duration = Duration::from_millis(20);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Config {
    /// Of the framework; there is one.
    #[serde(default)]
    #[expect(dead_code, reason = "accepted, and means nothing here")]
    plugin_name: String,
    pre_script_location: PathBuf,
    post_script_location: PathBuf,
    #[serde(default)]
    pre_script_params: Vec<String>,
    #[serde(default)]
    post_script_params: Vec<String>,
    #[serde(default)]
    pre_script_no_of_retries: u32,
    #[serde(default)]
    post_script_no_of_retries: u32,
    timeout_in_seconds: u64,
    continue_backup_on_failure: bool,
    fs_freeze_enabled: bool,
    /// The end of a script is waited for, not asked after.
    #[serde(default, rename = "ScriptsExecutionPollTimeSeconds")]
    #[expect(dead_code, reason = "accepted, and means nothing here")]
    poll_time_seconds: u64,
}

/// A script to run, once or more often.
#[derive(Debug)]
struct Script {
    step: &'static str,
    command: Vec<String>,
    retries: u32,
}

/// What is run before a point is taken, and after.
#[derive(Debug)]
pub struct Scripts {
    pre: Script,
    post: Script,
    /// For each of the two, with all its retries.
    timeout: Duration,
    continues: bool,
    freezes: bool,
    /// Locked by whoever runs them around a point.
    file: File,
}

impl Scripts {
    /// Reads what is to be run.
    ///
    /// # Errors
    /// The file or a script is not there, is not root's alone, or says something that is not known.
    pub fn load(path: &Path) -> Result<Self> {
        let wrong = |why: String| {
            let text = format!("scripts of {}: {why}", path.display());
            Error::new(ErrorKind::Usage, text)
        };
        let file = File::open(path).map_err(|cause| wrong(cause.to_string()))?;
        let found = file.metadata().map_err(|cause| wrong(cause.to_string()))?;
        check(path, &found, OF_THE_FILE).map_err(&wrong)?;
        let mut text = String::new();
        let read = (&file).take(MAX_BYTES + 1).read_to_string(&mut text);
        read.map_err(|cause| wrong(cause.to_string()))?;
        if text.len() as u64 > MAX_BYTES {
            return Err(wrong(format!("expected at most {MAX_BYTES} bytes")));
        }
        let config: Config =
            serde_json::from_str(&text).map_err(|cause| wrong(cause.to_string()))?;
        if !(1..=MAX_TIMEOUT).contains(&config.timeout_in_seconds) {
            let found = config.timeout_in_seconds;
            return Err(wrong(format!(
                "timeoutInSeconds: expected 1 to {MAX_TIMEOUT}, found {found}"
            )));
        }
        let script = |step, location: &Path, parameters: Vec<String>, retries| {
            let found = fs::metadata(location)
                .map_err(|cause| wrong(format!("{}: {cause}", location.display())))?;
            check(location, &found, OF_A_SCRIPT).map_err(&wrong)?;
            let program = location.to_str().filter(|_| location.is_absolute());
            let program = program.ok_or_else(|| {
                let location = location.display();
                wrong(format!("{location}: expected an absolute path in UTF-8"))
            })?;
            // The framework's own template has two empty ones that mean none.
            let parameters = parameters.into_iter().filter(|word| !word.is_empty());
            Ok(Script {
                step,
                command: std::iter::once(program.to_owned())
                    .chain(parameters)
                    .collect(),
                retries,
            })
        };
        Ok(Self {
            pre: script(
                "pre-script",
                &config.pre_script_location,
                config.pre_script_params,
                config.pre_script_no_of_retries,
            )?,
            post: script(
                "post-script",
                &config.post_script_location,
                config.post_script_params,
                config.post_script_no_of_retries,
            )?,
            timeout: Duration::from_secs(config.timeout_in_seconds),
            continues: config.continue_backup_on_failure,
            freezes: config.fs_freeze_enabled,
            file,
        })
    }

    /// Those of a point that was cut short may not be through.
    fn take_turn(&self) -> DeviceResult<()> {
        let end = Instant::now() + self.timeout;
        while let Err(refused) = self.file.try_lock() {
            if Instant::now() >= end {
                let text = format!(
                    "run the scripts: those of an earlier point are not through after {} s",
                    self.timeout.as_secs()
                );
                return Err(DeviceError::from_io(text, refused.into()));
            }
            std::thread::sleep(TICK);
        }
        Ok(())
    }

    /// Runs the script that lets the application go on.
    ///
    /// # Errors
    /// It failed, each time.
    pub fn run_post(&self) -> Result<()> {
        self.post.run(self.timeout)
    }
}

impl Script {
    fn run(&self, timeout: Duration) -> Result<()> {
        let end = Instant::now() + timeout;
        let mut attempt = 0;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match hooks::run(self.step, &self.command, &[], left, &CancelToken::new()) {
                Err(error) if attempt == self.retries || Instant::now() >= end => {
                    return Err(error);
                }
                Err(_) => attempt += 1,
                Ok(()) => return Ok(()),
            }
        }
    }
}

/// Only root decides what is run.
fn check(path: &Path, found: &fs::Metadata, wanted: u32) -> std::result::Result<(), String> {
    let (owner, mode) = (found.uid(), found.mode() & PERMISSIONS);
    if !found.is_file() || owner != 0 || mode != wanted {
        return Err(format!(
            "{}: expected a file of root with mode {wanted:o}, found mode {mode:o} and owner {owner}",
            path.display()
        ));
    }
    Ok(())
}

/// Brings an application to rest, then the file systems of its guest, and lets both go on in turn: by scripts as their
/// file describes them, by the agent at its socket, or by both.
#[derive(Debug)]
pub struct AtRest {
    agent: Option<PathBuf>,
    file: Option<PathBuf>,
    /// Once they were read.
    scripts: Option<Scripts>,
    /// Once it may be frozen.
    guest: Option<GuestFreezer>,
    /// When the first script began.
    since: Option<Instant>,
}

impl AtRest {
    /// By what there is.
    #[must_use]
    pub fn new(agent: Option<&Path>, scripts: Option<&Path>) -> Self {
        Self {
            agent: agent.map(ToOwned::to_owned),
            file: scripts.map(ToOwned::to_owned),
            scripts: None,
            guest: None,
            since: None,
        }
    }

    fn freeze_guest(&mut self, agent: &Path) -> DeviceResult<Frozen> {
        let guest = GuestFreezer::connect(agent)?;
        self.guest.insert(guest).freeze()
    }

    fn continues(&self) -> bool {
        self.scripts.as_ref().is_some_and(|s| s.continues)
    }

    /// What a failing script means: a remark, or an error.
    fn weigh(&self, outcome: Result<()>) -> DeviceResult<Option<String>> {
        match outcome {
            Ok(()) => Ok(None),
            Err(error) if self.continues() => Ok(Some(error.to_string())),
            Err(error) => Err(DeviceError::new(DeviceErrorKind::Io, error.to_string())),
        }
    }
}

impl Freezer for AtRest {
    /// With scripts it is the application that stands still, from the first of them on.
    fn since(&self) -> Option<Instant> {
        self.since
            .or_else(|| self.guest.as_ref().and_then(Freezer::since))
    }

    fn freeze(&mut self) -> DeviceResult<Frozen> {
        let loaded = self.file.as_deref().map(Scripts::load).transpose();
        let loaded = loaded
            .map_err(|error| DeviceError::new(DeviceErrorKind::Unsuitable, error.to_string()))?;
        // Without a turn there is nothing to let go on again.
        loaded.as_ref().map_or(Ok(()), Scripts::take_turn)?;
        self.scripts = loaded;
        self.since = self.scripts.as_ref().map(|_| Instant::now());
        let outcome = self.scripts.as_ref().map(|s| s.pre.run(s.timeout));
        let took_part = matches!(outcome, Some(Ok(())));
        let remark = outcome.map_or(Ok(None), |outcome| self.weigh(outcome))?;
        let freezes = self.scripts.as_ref().is_none_or(|scripts| scripts.freezes);
        let agent = self.agent.clone().filter(|_| freezes);
        let guest = agent.map(|agent| self.freeze_guest(&agent)).transpose();
        let mut frozen = match guest {
            Ok(frozen) => frozen.unwrap_or_else(|| Frozen::new(Consistency::Crash)),
            Err(error) if self.continues() => {
                let mut frozen = Frozen::new(Consistency::Crash);
                frozen.remark = Some(error.to_string());
                return Ok(frozen);
            }
            Err(error) => return Err(error),
        };
        if took_part {
            frozen.consistency = Consistency::Application;
        }
        frozen.remark = remark;
        Ok(frozen)
    }

    fn thaw(&mut self) -> DeviceResult<Option<String>> {
        let thawed = self.guest.as_mut().map(Freezer::thaw);
        // It goes on even where the file systems do not.
        let outcome = self.scripts.as_ref().map(Scripts::run_post);
        if let Some(scripts) = &self.scripts {
            scripts.file.unlock().ok();
        }
        let remark = outcome.map_or(Ok(None), |outcome| self.weigh(outcome));
        thawed.transpose()?;
        remark
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    struct Lab {
        place: tempfile::TempDir,
    }

    impl Lab {
        /// Nothing if not run by root, whose files they must be.
        fn new() -> Option<Self> {
            let place = tempfile::tempdir().unwrap();
            let is_root = place.path().metadata().unwrap().uid() == 0;
            #[expect(clippy::print_stderr, reason = "what is skipped is said")]
            if !is_root {
                eprintln!("SKIPPED: scripts belong to root");
            }
            let lab = Self { place };
            lab.script("pre", "echo \"pre $*\" >>\"$0.log\"");
            lab.script("post", "echo \"post $*\" >>\"${0%post}pre.log\"");
            is_root.then_some(lab)
        }

        fn path(&self, name: &str) -> PathBuf {
            self.place.path().join(name)
        }

        fn file(&self, name: &str, text: &str, mode: u32) {
            let path = self.path(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }

        fn script(&self, name: &str, text: &str) {
            self.file(name, &format!("#!/bin/sh\n{text}\n"), OF_A_SCRIPT);
        }

        fn config(&self, change: impl Fn(String) -> String) -> PathBuf {
            let place = self.place.path().display();
            let text = format!(
                r#"{{"pluginName": "ScriptRunner",
                "preScriptLocation": "{place}/pre", "postScriptLocation": "{place}/post",
                "preScriptParams": ["a", ""], "postScriptParams": ["", ""],
                "preScriptNoOfRetries": 2, "postScriptNoOfRetries": 0, "timeoutInSeconds": 30,
                "continueBackupOnFailure": true, "fsFreezeEnabled": true,
                "ScriptsExecutionPollTimeSeconds": 60}}"#
            );
            self.file("config", &change(text), OF_THE_FILE);
            self.path("config")
        }

        fn said(&self) -> String {
            fs::read_to_string(self.path("pre.log")).unwrap_or_default()
        }
    }

    #[test]
    fn an_application_is_at_rest_between_its_scripts() {
        let Some(lab) = Lab::new() else { return };
        let config = lab.config(|text| text);
        let mut resting = AtRest::new(None, Some(&config));

        let frozen = resting.freeze().unwrap();

        assert_eq!(frozen, Frozen::new(Consistency::Application));
        assert_eq!(lab.said(), "pre a\n");
        assert_eq!(resting.thaw().unwrap(), None);
        assert_eq!(lab.said(), "pre a\npost \n");
    }

    #[test]
    fn scripts_of_one_point_are_through_before_those_of_the_next_one_begin() {
        let Some(lab) = Lab::new() else { return };
        let config = lab.config(|text| text);
        let mut first = AtRest::new(None, Some(&config));
        first.freeze().unwrap();
        let next = std::thread::spawn(move || {
            let mut next = AtRest::new(None, Some(&config));
            next.freeze().and_then(|_| next.thaw())
        });
        // Long enough to be seen if it did not wait.
        std::thread::sleep(Duration::from_millis(300));
        let meanwhile = lab.said();

        first.thaw().unwrap();

        next.join().unwrap().unwrap();
        let all = lab.said();
        assert_eq!(meanwhile.lines().count(), 1, "{meanwhile}");
        assert_eq!(all.lines().count(), 4, "{all}");
    }

    #[test]
    fn whoever_waits_for_their_turn_in_vain_runs_no_script() {
        let Some(lab) = Lab::new() else { return };
        let config = lab.config(|text| text.replace("Seconds\": 30", "Seconds\": 1"));
        let mut first = AtRest::new(None, Some(&config));
        first.freeze().unwrap();

        let mut next = AtRest::new(None, Some(&config));
        let refused = next.freeze().unwrap_err().to_string();
        // As a guard does: it may have come to rest in part.
        next.thaw().unwrap();

        assert!(refused.contains("not through"), "{refused}");
        assert_eq!(lab.said(), "pre a\n");
        first.thaw().unwrap();
        assert_eq!(lab.said(), "pre a\npost \n");
    }

    #[test]
    fn a_script_that_fails_is_tried_again_and_then_decides_as_its_file_says() {
        let Some(lab) = Lab::new() else { return };
        lab.script("pre", "echo x >>\"$0.log\"; echo no disk >&2; exit 1");
        let config = lab.config(|text| text);

        let frozen = AtRest::new(None, Some(&config)).freeze().unwrap();

        assert_eq!(frozen.consistency, Consistency::Crash);
        assert!(frozen.remark.unwrap().contains("no disk"));
        assert_eq!(lab.said(), "x\nx\nx\n");

        let strict = lab.config(|text| text.replace("Failure\": true", "Failure\": false"));
        let mut resting = AtRest::new(None, Some(&strict));
        assert!(resting.freeze().is_err());
        // It may have come to rest in part.
        resting.thaw().unwrap();
        assert!(lab.said().ends_with("post \n"), "{}", lab.said());
        lab.script("post", "sleep 100");
        let slow = lab.config(|text| text.replace("Seconds\": 30", "Seconds\": 1"));
        let scripts = Scripts::load(&slow).unwrap();
        let error = scripts.run_post().unwrap_err().to_string();
        assert!(error.contains("did not end"), "{error}");
    }

    #[test]
    fn what_is_not_roots_alone_or_not_known_is_not_run() {
        let Some(lab) = Lab::new() else { return };
        let refused = |path: &Path, said: &str| {
            let error = Scripts::load(path).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        };
        refused(&lab.path("none"), "none");
        for (from, to, said) in [
            ("fsFreezeEnabled", "fsFreeze", "fsFreeze"),
            ("Seconds\": 30", "Seconds\": 0", "timeoutInSeconds"),
            ("/post\"", "/missing\"", "missing"),
            ("true", "\"yes\"", "yes"),
        ] {
            refused(&lab.config(|text| text.replace(from, to)), said);
        }
        let config = lab.config(|text| text);
        for (name, mode) in [("config", 0o644), ("pre", 0o755), ("post", 0o4700)] {
            let permissions =
                |mode| fs::set_permissions(lab.path(name), fs::Permissions::from_mode(mode));
            let before = lab.path(name).metadata().unwrap().mode() & PERMISSIONS;
            permissions(mode).unwrap();
            refused(&config, "root with mode");
            permissions(before).unwrap();
        }
        Scripts::load(&config).unwrap();
    }

    #[test]
    fn an_agent_that_is_not_there_counts_as_the_scripts_file_says() {
        let Some(lab) = Lab::new() else { return };
        let agent = lab.path("agent");
        let config = lab.config(|text| text);

        let frozen = AtRest::new(Some(&agent), Some(&config)).freeze().unwrap();

        assert_eq!(frozen.consistency, Consistency::Crash);
        assert!(frozen.remark.unwrap().contains("agent"));
        let strict = lab.config(|text| text.replace("Failure\": true", "Failure\": false"));
        assert!(AtRest::new(Some(&agent), Some(&strict)).freeze().is_err());
        // Nobody asked for the file systems.
        let without = strict;
        let text = fs::read_to_string(&without).unwrap();
        fs::write(
            &without,
            text.replace("Enabled\": true", "Enabled\": false"),
        )
        .unwrap();
        let frozen = AtRest::new(Some(&agent), Some(&without)).freeze().unwrap();
        assert_eq!(frozen, Frozen::new(Consistency::Application));
    }
}
