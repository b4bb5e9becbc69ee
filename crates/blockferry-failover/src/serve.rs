//! The side that has the machine of a job on another host, see [`far`](crate::far).

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockferry_nbd::NbdAddress;
use blockferry_transport::message::Failed as FailedMessage;
use blockferry_transport::{Connection, Message};

use crate::changes::{Runs, Travelling};
use crate::error::{Error, ErrorKind, Result};
use crate::far::{Answer, Ask, Failed, FarCut, milliseconds, packed};
use crate::jobs::Jobs;
use crate::source::{Sent, Source, SourceMachine, Taken, open_point};

/// How often it is looked whether a machine that stands still is to go on.
const TICK: Duration = Duration::from_millis(50);
/// A machine that does not go on is asked to so often, each a second after the other.
const RESUMING: u32 = 30;

/// Does with a machine of this host what the job at the other end of `connection` asks, until that ends. Overlays are kept
/// in a directory of the job in `directory` unless the job names another; `freeze_guard` is as in
/// [`JobContext`](crate::JobContext).
///
/// A machine that was stopped goes on when the connection ends, or the time is over that the job gave, unless the job asked to
/// hold it.
///
/// # Errors
/// The other side asks what cannot be understood, or a machine that is to go on cannot be let go.
pub fn serve_machine(
    connection: Connection,
    directory: &Path,
    freeze_guard: Option<Vec<OsString>>,
) -> Result<()> {
    connection.trust();
    let mut serving = Serving {
        directory: directory.to_owned(),
        freeze_guard,
        source: None,
        stopped: Stopped::Never,
    };
    let outcome = serving.run(&connection);
    // Whatever ended it.
    let gone_on = serving.let_go();
    if let Err(error) = &outcome {
        let failed = Message::Failed(FailedMessage {
            kind: u8::MAX,
            resumable: false,
            text: error.to_string(),
        });
        connection.outbox().send(failed).ok();
    }
    connection.finish();
    outcome.and(gone_on)
}

/// Whether the machine stands still for the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stopped {
    /// As far as it was asked over this connection.
    Never,
    /// It goes on at this moment, unless it is to be held.
    Until(Instant),
    /// The guest's memory travels; once it stands still it goes on after this time.
    Once(Duration),
    /// It went on by itself.
    Over,
}

#[derive(Debug)]
struct Serving {
    directory: PathBuf,
    freeze_guard: Option<Vec<OsString>>,
    source: Option<Source>,
    stopped: Stopped,
}

impl Serving {
    /// Until the other side ends, which is no failure.
    fn run(&mut self, connection: &Connection) -> Result<()> {
        loop {
            let message = match connection.receiver().recv_timeout(TICK) {
                Ok(Ok(message)) => message,
                Ok(Err(_lost)) => return Ok(()),
                Err(waited) if waited.is_timeout() => {
                    if connection.check_alive().is_err() {
                        return Ok(());
                    }
                    self.let_go_if_due()?;
                    continue;
                }
                Err(_ended) => return Ok(()),
            };
            let Message::Ask(json) = message else {
                let text = format!("expected an ask, found a message {}", message.name());
                return Err(Error::new(ErrorKind::Usage, text));
            };
            let ask = serde_json::from_slice(&json).map_err(|cause| {
                let version = env!("CARGO_PKG_VERSION");
                let text = format!(
                    "version {version} of blockferry does not understand what is asked of it: {cause}"
                );
                Error::new(ErrorKind::Usage, text)
            })?;
            self.let_go_if_due()?;
            let answer = self
                .answer(ask)
                .and_then(|answer| packed(&answer))
                .or_else(|error| packed(&Answer::Failed(Failed::of(&error))))?;
            if connection.outbox().send(Message::Answer(answer)).is_err() {
                return Ok(());
            }
        }
    }

    fn answer(&mut self, ask: Ask) -> Result<Answer> {
        if let Ask::Job(name) = &ask {
            let (spec, origins) = Jobs::open(&self.directory)?.to_reverse(name)?;
            let origins = origins.into_iter();
            let told =
                origins.map(|origin| (origin.number, origin.root, Runs::of(&origin.changed)));
            return Ok(Answer::Job(Box::new(spec), told.collect()));
        }
        if let Ask::Machine(spec) = ask {
            spec.check()?;
            let scratch = self.directory.join(&spec.name);
            std::fs::create_dir_all(&scratch).map_err(|cause| {
                let text = format!("make {}", scratch.display());
                Error::because(ErrorKind::Store, text, cause)
            })?;
            self.source = Some(Source::new(&spec, &scratch, self.freeze_guard.clone()));
            return Ok(Answer::Done);
        }
        let stopped = self.stopped;
        let source = self.source()?;
        match ask {
            Ask::Machine(_) | Ask::Job(_) => {}
            Ask::Reach => source.reach()?,
            Ask::Settle(held) => {
                let lost = source.settle(&held)?.into_iter();
                let lost = lost.map(|lost| (lost.disk, lost.why)).collect();
                return Ok(Answer::Settled(lost));
            }
            Ask::Cut(number, live) => return cut(source.take(number, live)?),
            Ask::CutAtRest(number) => {
                stands_still(stopped)?;
                return cut(source.take_at_rest(number)?);
            }
            Ask::Check(number) => source.check(number)?,
            Ask::Quiesce(patience_ms) => return self.quiesce(Duration::from_millis(patience_ms)),
            Ask::Hold => {
                stands_still(stopped)?;
                self.stopped = Stopped::Never;
            }
            Ask::SendMemory(uri, pause_ms, patience_ms) => {
                let patience = Duration::from_millis(patience_ms);
                self.stopped = Stopped::Once(patience);
                let pause = Duration::from_millis(pause_ms);
                self.source()?.send_memory(&uri, pause, patience)?;
            }
            Ask::HoldMemoryBack(held) => source.hold_memory_back(held)?,
            Ask::Sent => {
                let sent = source.sent()?;
                if let Stopped::Once(patience) = stopped
                    && sent == Sent::Standing
                {
                    self.stopped = Stopped::Until(Instant::now() + patience);
                }
                return Ok(Answer::Sent(sent));
            }
            Ask::HandOver => source.hand_over()?,
            Ask::StoodStill(number) => source.stood_still(number)?,
            Ask::Resume => {
                source.resume()?;
                self.stopped = Stopped::Never;
            }
            Ask::Leave => source.leave()?,
            Ask::End => source.end()?,
        }
        Ok(Answer::Done)
    }

    fn source(&mut self) -> Result<&mut Source> {
        self.source.as_mut().ok_or_else(|| {
            let text = "expected to be told first which machine it is";
            Error::new(ErrorKind::Usage, text)
        })
    }

    fn quiesce(&mut self, patience: Duration) -> Result<Answer> {
        // However far it comes.
        self.stopped = Stopped::Until(Instant::now() + patience);
        let (consistency, warnings) = self.source()?.quiesce(patience)?;
        // It stands still from now on.
        self.stopped = Stopped::Until(Instant::now() + patience);
        Ok(Answer::Quiesced(consistency.to_string(), warnings))
    }

    fn let_go_if_due(&mut self) -> Result<()> {
        match self.stopped {
            Stopped::Until(end) if Instant::now() >= end => self.let_go(),
            _ => Ok(()),
        }
    }

    /// Nobody said that it is to be held.
    fn let_go(&mut self) -> Result<()> {
        if let Stopped::Never | Stopped::Over = self.stopped {
            return Ok(());
        }
        self.stopped = Stopped::Over;
        let mut attempt = 1;
        loop {
            match self.source()?.resume() {
                Err(_again) if attempt < RESUMING => attempt += 1,
                outcome => return outcome,
            }
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

fn stands_still(stopped: Stopped) -> Result<()> {
    let why = match stopped {
        Stopped::Until(_) => return Ok(()),
        Stopped::Never | Stopped::Once(_) => "it was not stopped over this connection",
        Stopped::Over => "it went on, since nobody said in time that it is to be held",
    };
    let text = format!("the machine does not stand still for the job: {why}");
    Err(Error::new(ErrorKind::Source, text))
}

fn cut(taken: Taken) -> Result<Answer> {
    let mut points = Vec::new();
    for point in &taken.points {
        let changes = match point.bitmap {
            Some(_) => open_point(point)?.1,
            None => None,
        };
        let address = NbdAddress::unix(&point.socket, &point.export)
            .map_err(|cause| Error::source(format!("name the point of {}", point.disk), cause))?;
        points.push((address.to_string(), changes.as_ref().map(Travelling::of)));
    }
    Ok(Answer::Cut(Box::new(FarCut {
        consistency: taken.consistency.to_string(),
        held_up_ms: milliseconds(taken.held_up),
        warnings: taken.warnings,
        points,
    })))
}
