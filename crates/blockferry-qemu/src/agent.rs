//! A client of the QEMU guest agent.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use blockferry_device::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use crate::lines::{Lines, shown};

/// Between two attempts to be heard.
const TICK: Duration = Duration::from_millis(50);
/// For one answer to such an attempt: what is sent before the agent runs is swallowed by the socket.
const HEARING: Duration = Duration::from_millis(500);
/// The byte that tells the agent to forget what was said before.
const SENTINEL: &[u8] = &[0xFF];

/// The agent of a guest, in step with us.
#[derive(Debug)]
pub struct Agent {
    lines: Lines,
}

impl Agent {
    /// Connects and makes sure that the agent listens. Its socket serves one client at a time.
    ///
    /// # Errors
    /// Nobody listens there, or no agent answered within `patience`.
    pub fn connect(socket: &Path, patience: Duration) -> Result<Self> {
        let end = Instant::now() + patience;
        let lines = Lines::connect(socket, "the guest agent")?;
        let mut agent = Self { lines };
        let mut id = 1u64;
        while !agent.is_in_step(id, end)? {
            if Instant::now() >= end {
                let text = format!(
                    "{}: it did not answer within {} ms; expected a guest that runs qemu-guest-agent",
                    agent.lines.label(),
                    patience.as_millis()
                );
                return Err(Error::new(ErrorKind::Io, text));
            }
            thread::sleep(TICK);
            id += 1;
        }
        Ok(agent)
    }

    /// Whether the agent repeats a number that nobody said before.
    fn is_in_step(&mut self, id: u64, end: Instant) -> Result<bool> {
        let request = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}});
        let end = end.min(Instant::now() + HEARING);
        self.lines.send(SENTINEL, &request, end)?;
        while Instant::now() < end {
            match self.lines.receive(end) {
                Ok(answer) if answer.get("return").and_then(Value::as_u64) == Some(id) => {
                    return Ok(true);
                }
                // An answer to what somebody else asked, or what is left of one.
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Unsuitable => {}
                Err(_) if Instant::now() >= end => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Holds the writes of all file systems of the guest, and returns how many.
    ///
    /// # Errors
    /// The agent refused, or did not answer within `patience`: then they may be held.
    pub fn freeze(&mut self, patience: Duration) -> Result<u64> {
        let frozen = self.execute("guest-fsfreeze-freeze", patience)?;
        Ok(frozen.as_u64().unwrap_or(0))
    }

    /// Lets the writes of all file systems go, and returns how many were held.
    ///
    /// # Errors
    /// The agent refused, or did not answer within `patience`.
    pub fn thaw(&mut self, patience: Duration) -> Result<u64> {
        let thawed = self.execute("guest-fsfreeze-thaw", patience)?;
        Ok(thawed.as_u64().unwrap_or(0))
    }

    /// Whether writes are held.
    ///
    /// # Errors
    /// The agent did not answer within `patience`.
    pub fn is_frozen(&mut self, patience: Duration) -> Result<bool> {
        let status = self.execute("guest-fsfreeze-status", patience)?;
        Ok(status.as_str() == Some("frozen"))
    }

    /// Asks the guest to shut down. There is no answer to that.
    ///
    /// # Errors
    /// The agent cannot be spoken to.
    pub fn shut_down(&mut self) -> Result<()> {
        let request = json!({"execute": "guest-shutdown", "arguments": {"mode": "powerdown"}});
        self.lines.send(b"", &request, Instant::now() + HEARING)
    }

    fn execute(&mut self, command: &str, patience: Duration) -> Result<Value> {
        let end = Instant::now() + patience;
        let failed = |cause: &Error| {
            Error::new(
                cause.kind(),
                format!("guest agent command {command}: {cause}"),
            )
        };
        self.lines
            .send(b"", &json!({"execute": command}), end)
            .map_err(|cause| failed(&cause))?;
        let answer = self.lines.receive(end).map_err(|cause| failed(&cause))?;
        if let Some(refusal) = answer.get("error") {
            let said = refusal.get("desc").and_then(Value::as_str);
            let said = shown(said.unwrap_or("it does not say why"));
            let text = format!("guest agent command {command}: the agent refused it: {said}");
            return Err(Error::new(ErrorKind::Unsuitable, text));
        }
        answer.get("return").cloned().ok_or_else(|| {
            let said = shown(&answer.to_string());
            let text = format!("guest agent command {command}: expected an answer, found {said:?}");
            Error::new(ErrorKind::Unsuitable, text)
        })
    }
}
