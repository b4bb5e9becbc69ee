//! Handing the memory of a guest over, so that it never boots: QEMU's own migration, whose last step waits for ours.
//!
//! ```text
//! source:  runs ── memory travels ── stands still (pre-switchover) ── disks are brought over ── rest of it ── ended
//! replica: waits ─────────────────────────────────────────────────────────────────────────────────────────── runs
//! ```
//! Until the last step the source goes on if anything fails. The replica does not touch its disks before.

use std::path::Path;
use std::time::{Duration, Instant};

use blockferry_device::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use crate::machine::Machine;

/// How often a migration is looked at while a guest stands still.
const TICK: Duration = Duration::from_millis(2);
/// For the rest of it, and for a replica to go on.
const SWITCHING: Duration = Duration::from_secs(30);
/// As much as the way takes: whoever wants less limits the way.
const MAX_BANDWIDTH: u64 = 1 << 40;
/// Bytes per second: less than what any guest writes that does something. Nobody else sets just this, so it is known again.
const HELD_BANDWIDTH: u64 = (1 << 20) + 7;

/// How far the memory of a machine was handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HandOver {
    /// Nothing is under way, or what was is undone: the machine has its guest.
    None,
    /// Memory travels, the guest runs.
    Travelling {
        /// Bytes that are missing yet, as far as that is known: what the guest wrote since is looked at now and then.
        remaining: Option<u64>,
    },
    /// The guest stands still and waits for the last step.
    Waiting,
    /// The last step is under way.
    Switching,
    /// The guest is the other machine's.
    Done,
}

impl HandOver {
    fn of(found: &Value) -> Self {
        let status = found.get("status").and_then(Value::as_str);
        match status.unwrap_or_default() {
            "setup" | "active" | "postcopy-active" | "wait-unplug" => {
                let remaining = found.pointer("/ram/remaining");
                Self::Travelling {
                    remaining: remaining.and_then(Value::as_u64),
                }
            }
            "pre-switchover" => Self::Waiting,
            "device" | "cancelling" => Self::Switching,
            "completed" => Self::Done,
            _ => Self::None,
        }
    }
}

impl Machine {
    /// Waits for memory at `uri`, as `unix:/run/memory` or `tcp:0.0.0.0:4444`. The machine was started with `-incoming defer`.
    /// With `credentials` it travels by TLS: a directory of the machine's host in which QEMU finds `ca-cert.pem`,
    /// `server-cert.pem` and `server-key.pem`, or `keys.psk` with a key of `qemu`.
    ///
    /// # Errors
    /// It was not, the credentials are none, or the machine refused.
    pub fn receive_memory(&mut self, uri: &str, credentials: Option<&Path>) -> Result<()> {
        self.set_capabilities()?;
        self.present(credentials, "server")?;
        let arguments = json!({"uri": uri});
        self.qmp().execute("migrate-incoming", arguments).map(drop)
    }

    /// Begins to send the memory to whoever waits at `uri`, while the guest runs: it stands still once it is
    /// [`HandOver::Waiting`], when sending the rest takes `pause` or less. `credentials` as in [`Self::receive_memory`], with
    /// `client-cert.pem` and `client-key.pem`.
    ///
    /// # Errors
    /// The credentials are none, or the machine refused.
    pub fn send_memory(
        &mut self,
        uri: &str,
        pause: Duration,
        credentials: Option<&Path>,
    ) -> Result<()> {
        self.set_capabilities()?;
        self.present(credentials, "client")?;
        let limit_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        let limits = json!({"downtime-limit": limit_ms, "max-bandwidth": MAX_BANDWIDTH});
        self.set_parameters(limits)?;
        let arguments = json!({"uri": uri});
        self.qmp().execute("migrate", arguments).map(drop)
    }

    fn present(&mut self, credentials: Option<&Path>, endpoint: &str) -> Result<()> {
        self.forget_credentials()?;
        let Some(directory) = credentials else {
            return Ok(());
        };
        let kind = match directory.join("keys.psk").exists() {
            true => "tls-creds-psk",
            false => "tls-creds-x509",
        };
        let id = self.tag().credentials();
        let object = json!({"qom-type": kind, "id": id, "dir": directory, "endpoint": endpoint});
        self.qmp().execute("object-add", object)?;
        self.set_parameters(json!({"tls-creds": id}))
    }

    /// Takes what a hand-over left away from a machine with a guest.
    pub(crate) fn forget_memory(&mut self) -> Result<()> {
        self.forget_credentials()?;
        self.forget_held_memory()
    }

    fn forget_credentials(&mut self) -> Result<()> {
        let id = self.tag().credentials();
        let objects = self
            .qmp()
            .execute("qom-list", json!({"path": "/objects"}))?;
        let mut objects = objects.as_array().into_iter().flatten();
        if !objects.any(|object| object.get("name").and_then(Value::as_str) == Some(&id)) {
            return Ok(());
        }
        let parameters = self.qmp().execute("query-migrate-parameters", json!({}))?;
        if parameters.get("tls-creds").and_then(Value::as_str) == Some(&id) {
            self.set_parameters(json!({"tls-creds": ""}))?;
        }
        let arguments = json!({"id": id});
        self.qmp().execute("object-del", arguments).map(drop)
    }

    /// Whether memory is to travel so slowly that the guest hardly comes to stand still.
    ///
    /// # Errors
    /// The machine refused.
    pub fn hold_memory_back(&mut self, held: bool) -> Result<()> {
        let bandwidth = if held { HELD_BANDWIDTH } else { MAX_BANDWIDTH };
        self.set_parameters(json!({"max-bandwidth": bandwidth}))
    }

    fn set_parameters(&mut self, parameters: Value) -> Result<()> {
        let done = self.qmp().execute("migrate-set-parameters", parameters);
        done.map(drop)
    }

    /// The last step: the guest goes on in the other machine. May be called again, whatever came of it before.
    ///
    /// # Errors
    /// It did not come to that: the guest has to be taken back.
    pub fn hand_over(&mut self) -> Result<()> {
        let end = Instant::now() + SWITCHING;
        let mut was_asked = false;
        loop {
            match self.hand_over_state()? {
                HandOver::Done => return Ok(()),
                HandOver::Waiting if !was_asked => {
                    let state = json!({"state": "pre-switchover"});
                    self.qmp().execute("migrate-continue", state)?;
                    was_asked = true;
                }
                HandOver::Waiting | HandOver::Switching if Instant::now() < end => {
                    std::thread::sleep(TICK);
                }
                HandOver::Waiting | HandOver::Switching => {
                    let text = format!(
                        "hand the guest over: it did not go on within {} s",
                        SWITCHING.as_secs()
                    );
                    return Err(Error::new(ErrorKind::Io, text));
                }
                HandOver::None | HandOver::Travelling { .. } => return Err(self.not_handed_over()),
            }
        }
    }

    /// Ends a hand-over that did not come to its last step. Harmless where there is none, or where it is done.
    ///
    /// # Errors
    /// The machine failed, or does not let go of it.
    pub fn take_back(&mut self) -> Result<()> {
        let end = Instant::now() + SWITCHING;
        let mut was_asked = false;
        loop {
            match self.hand_over_state()? {
                HandOver::None | HandOver::Done => {
                    // No reason not to let a guest go on: what is left of it goes when the machine is left.
                    self.forget_memory().ok();
                    return Ok(());
                }
                _ if !was_asked => {
                    self.qmp().execute("migrate_cancel", json!({}))?;
                    was_asked = true;
                }
                _ if Instant::now() >= end => {
                    let text = "take the guest back: its hand-over does not end";
                    return Err(Error::new(ErrorKind::Io, text));
                }
                _ => std::thread::sleep(TICK),
            }
        }
    }

    /// Who hands its memory over later would wonder.
    fn forget_held_memory(&mut self) -> Result<()> {
        let found = self.qmp().execute("query-migrate-parameters", json!({}))?;
        match found.get("max-bandwidth").and_then(Value::as_u64) {
            Some(HELD_BANDWIDTH) => self.hold_memory_back(false),
            _ => Ok(()),
        }
    }

    /// How far it is.
    ///
    /// # Errors
    /// The machine did not answer.
    pub fn hand_over_state(&mut self) -> Result<HandOver> {
        let found = self.qmp().execute("query-migrate", json!({}))?;
        Ok(HandOver::of(&found))
    }

    /// That it failed, with the words of QEMU.
    pub fn not_handed_over(&mut self) -> Error {
        let found = self.qmp().execute("query-migrate", json!({}));
        let why = found.ok().and_then(|found| {
            let why = found.get("error-desc").and_then(Value::as_str);
            why.map(crate::lines::shown)
        });
        let why = why.unwrap_or_else(|| "QEMU does not say why".to_owned());
        let text = format!("hand the memory of the guest over: {why}");
        Error::new(ErrorKind::Io, text)
    }

    /// Waits until a guest that was handed over to this machine runs.
    ///
    /// # Errors
    /// It does not, or the machine did not answer.
    pub fn wait_until_it_runs(&mut self) -> Result<()> {
        let end = Instant::now() + SWITCHING;
        while self.is_running()? != Some(true) {
            if Instant::now() >= end {
                let text = format!(
                    "the guest that was handed over does not run after {} s",
                    SWITCHING.as_secs()
                );
                return Err(Error::new(ErrorKind::Io, text));
            }
            std::thread::sleep(TICK);
        }
        // It runs, whatever becomes of this.
        self.forget_credentials().ok();
        Ok(())
    }

    /// The same on both sides: the last step waits, and the source hears whether the guest arrived.
    fn set_capabilities(&mut self) -> Result<()> {
        let on = ["pause-before-switchover", "return-path"];
        let on = on.map(|capability| json!({"capability": capability, "state": true}));
        let arguments = json!({"capabilities": on});
        self.qmp()
            .execute("migrate-set-capabilities", arguments)
            .map(drop)
    }
}
