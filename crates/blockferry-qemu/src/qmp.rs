//! A client of the QEMU Machine Protocol.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use blockferry_device::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use crate::lines::{Lines, shown};

/// For an answer. What takes long is a job in QEMU, and begins at once.
const ANSWERING: Duration = Duration::from_secs(30);
/// Events that nobody waited for; the oldest go first.
const MAX_EVENTS: usize = 1024;

/// Something that QEMU told without being asked.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Event {
    /// Its name, as `JOB_STATUS_CHANGE`.
    pub name: String,
    /// What it says; an empty object where that is nothing.
    pub data: Value,
}

/// A connection to a QMP socket, ready for commands. A socket of QEMU serves one client at a time.
#[derive(Debug)]
pub struct Qmp {
    lines: Lines,
    events: VecDeque<Event>,
    next_id: u64,
    /// A connection on which an answer was missed cannot tell answers apart any more.
    is_broken: bool,
}

impl Qmp {
    /// Connects and leaves the negotiation behind.
    ///
    /// # Errors
    /// Nobody listens there, it serves somebody else, or it does not speak QMP.
    pub fn connect(socket: &Path) -> Result<Self> {
        let mut lines = Lines::connect(socket, "the QMP server")?;
        let end = Instant::now() + ANSWERING;
        let greeting = lines.receive(end).map_err(|cause| {
            let text = format!(
                "expect the greeting of {}; it greets one client at a time: {cause}",
                lines.label()
            );
            Error::new(cause.kind(), text)
        })?;
        if greeting.get("QMP").is_none() {
            let text = format!(
                "{}: expected the greeting of QMP, found {:?}",
                lines.label(),
                shown(&greeting.to_string())
            );
            return Err(Error::new(ErrorKind::Unsuitable, text));
        }
        let mut qmp = Self {
            lines,
            events: VecDeque::new(),
            next_id: 0,
            is_broken: false,
        };
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns what it answers.
    ///
    /// # Errors
    /// QEMU refused it, with its own words; or the connection failed, after which it is of no use any more.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "a value is made where it is passed"
    )]
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let failed =
            |cause: &Error| Error::new(cause.kind(), format!("QMP command {command}: {cause}"));
        if self.is_broken {
            let text = format!("QMP command {command}: the connection failed before");
            return Err(Error::new(ErrorKind::Io, text));
        }
        self.is_broken = true;
        let id = self.next_id;
        self.next_id += 1;
        let end = Instant::now() + ANSWERING;
        let request = json!({"execute": command, "arguments": arguments, "id": id});
        self.lines
            .send(b"", &request, end)
            .map_err(|cause| failed(&cause))?;
        let answer = self.answer(id, end).map_err(|cause| failed(&cause))?;
        self.is_broken = false;
        if let Some(refusal) = answer.get("error") {
            let said = refusal.get("desc").and_then(Value::as_str);
            let said = shown(said.unwrap_or("it does not say why"));
            let text = format!("QMP command {command}: QEMU refused it: {said}");
            return Err(Error::new(ErrorKind::Unsuitable, text));
        }
        Ok(answer.get("return").cloned().unwrap_or(Value::Null))
    }

    /// Answers come in the order of the requests: one with another id is none of ours.
    fn answer(&mut self, id: u64, end: Instant) -> Result<Value> {
        loop {
            let message = self.lines.receive(end)?;
            if self.keep_event(&message) {
                continue;
            }
            let is_answer = message.get("return").is_some() || message.get("error").is_some();
            if is_answer && message.get("id").and_then(Value::as_u64) == Some(id) {
                return Ok(message);
            }
            let text = format!(
                "{}: expected the answer to request {id}, found {:?}",
                self.lines.label(),
                shown(&message.to_string())
            );
            return Err(Error::new(ErrorKind::Unsuitable, text));
        }
    }

    fn keep_event(&mut self, message: &Value) -> bool {
        let Some(name) = message.get("event").and_then(Value::as_str) else {
            return false;
        };
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        let data = message.get("data").cloned().unwrap_or_else(|| json!({}));
        self.events.push_back(Event {
            name: name.to_owned(),
            data,
        });
        true
    }

    /// The first event that is wanted, of those that came and those to come; it and what came before it is taken.
    ///
    /// # Errors
    /// None came within `patience`, or the connection failed.
    pub fn wait_event(
        &mut self,
        patience: Duration,
        mut wanted: impl FnMut(&Event) -> bool,
    ) -> Result<Event> {
        let end = Instant::now() + patience;
        loop {
            while let Some(event) = self.events.pop_front() {
                if wanted(&event) {
                    return Ok(event);
                }
            }
            let message = self.lines.receive(end)?;
            if !self.keep_event(&message) {
                self.is_broken = true;
                let text = format!("{}: an answer that nobody asked for", self.lines.label());
                return Err(Error::new(ErrorKind::Unsuitable, text));
            }
        }
    }

    /// Forgets the events that came so far: what is waited for next is to be new.
    pub fn forget_events(&mut self) {
        self.events.clear();
    }
}
