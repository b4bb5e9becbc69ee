//! The states of a job and what leads from one to the next: pure, so that every pair of state and input can be looked at.
//!
//! ```text
//! created ─> syncing <─> ready ─> cutting over ─> commit pending ─> committing ─> committed
//!               │          │           │ failed: aborting, back to syncing │
//!               └──────────┴─> cancelled ──────> rolling back <───────────┘
//!                                                     └─> rolled back
//! committed ─> created: another job, the other way round
//! syncing, ready ─> cutting over, at its fence: the source is gone
//! ```
//! A state is durable before what it names is begun. So after a crash the state says what may have been begun, and
//! [`State::after_a_crash`] what to do about it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::exhaustive_enums, reason = "callers decide for each")]
pub enum State {
    /// Nothing was done yet.
    Created,
    /// Passes are copied while the source runs.
    Syncing,
    /// The last pass would fit the budget. The target is refreshed.
    Ready,
    /// The source is being stopped.
    Quiescing,
    /// The source is stopped, the last pass is copied.
    LastPass,
    /// The targets hold the last cut; the source is being made unable to go on by itself.
    Fencing,
    /// The replica is being started.
    Starting,
    /// The cutover failed: the source is being let go.
    Aborting,
    /// The replica may run, on overlays; to be committed or rolled back.
    CommitPending,
    /// What the replica wrote is being merged into the targets.
    Committing,
    /// The targets are what counts; the source is kept as it was at the cutover.
    Committed,
    /// The targets return to the point before the job.
    RollingBack,
    /// They did; the source may run.
    RolledBack,
    /// No passes any more; the targets are at the last one.
    Cancelled,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Created,
        Self::Syncing,
        Self::Ready,
        Self::Quiescing,
        Self::LastPass,
        Self::Fencing,
        Self::Starting,
        Self::Aborting,
        Self::CommitPending,
        Self::Committing,
        Self::Committed,
        Self::RollingBack,
        Self::RolledBack,
        Self::Cancelled,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Syncing => "syncing",
            Self::Ready => "ready",
            Self::Quiescing => "quiescing",
            Self::LastPass => "last-pass",
            Self::Fencing => "fencing",
            Self::Starting => "starting",
            Self::Aborting => "aborting",
            Self::CommitPending => "commit-pending",
            Self::Committing => "committing",
            Self::Committed => "committed",
            Self::RollingBack => "rolling-back",
            Self::RolledBack => "rolled-back",
            Self::Cancelled => "cancelled",
        }
    }

    /// The next state.
    ///
    /// # Errors
    /// The input does not fit the state: why, and what to do instead.
    pub fn after(self, input: Input) -> Result<Self, Refusal> {
        use Input as I;
        Ok(match (self, input) {
            (Self::Created | Self::Syncing | Self::Ready, I::PassBegins) => Self::Syncing,
            (Self::Syncing, I::Converged) => Self::Ready,
            (Self::Ready, I::CutoverBegins) => Self::Quiescing,
            (Self::Quiescing, I::StepDone) => Self::LastPass,
            (Self::LastPass, I::StepDone) => Self::Fencing,
            (Self::Fencing, I::StepDone) => Self::Starting,
            (Self::Starting, I::StepDone) => Self::CommitPending,
            (Self::Quiescing | Self::LastPass | Self::Fencing | Self::Starting, I::StepFailed) => {
                Self::Aborting
            }
            (Self::Aborting, I::StepDone) => Self::Syncing,
            (Self::CommitPending | Self::Cancelled, I::CommitBegins) => Self::Committing,
            (Self::Committing, I::StepDone) => Self::Committed,
            (Self::CommitPending | Self::Cancelled, I::RollbackBegins) => Self::RollingBack,
            (Self::RollingBack, I::StepDone) => Self::RolledBack,
            (Self::Created | Self::Syncing | Self::Ready, I::Cancel) => Self::Cancelled,
            (Self::Committed, I::Reverse) => Self::Created,
            (Self::Syncing | Self::Ready, I::SourceLost) => Self::Fencing,
            _ => return Err(Refusal { state: self, input }),
        })
    }

    /// What is to be done with a job that is found in this state and that nobody works on.
    #[must_use]
    pub fn after_a_crash(self) -> Recovery {
        match self {
            // Whatever was copied is in the transfer logs; the source may be stopped, or let go already.
            Self::Quiescing | Self::LastPass | Self::Aborting => Recovery::ResumeSource,
            // All targets hold the last cut: on to the end, if the source stood still since.
            Self::Fencing | Self::Starting | Self::Committing | Self::RollingBack => {
                Recovery::GoForward
            }
            _ => Recovery::Nothing,
        }
    }

    /// Whether passes are copied, or would be if somebody ran the job.
    #[must_use]
    pub fn is_live(self) -> bool {
        matches!(self, Self::Created | Self::Syncing | Self::Ready)
    }

    /// Whether nothing is left to decide.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Committed | Self::RolledBack)
    }

    /// The verb that moves on and the one that backs out, each with what it does.
    #[must_use]
    pub fn next_steps(self) -> Vec<(&'static str, &'static str)> {
        let start = ("start", "copy what changed, and go on doing so");
        let cancel = ("cancel", "copy no more; the target stays at its last pass");
        let rollback = (
            "rollback",
            "return the target to the point before the job, and let the source run",
        );
        match self {
            Self::Created | Self::Syncing => vec![start, cancel],
            Self::Ready => vec![
                (
                    "complete",
                    "stop the source, copy the last changes, start the replica",
                ),
                cancel,
            ],
            Self::Quiescing | Self::LastPass | Self::Aborting => {
                vec![("start", "let the source run, and copy on")]
            }
            Self::Fencing | Self::Starting => vec![("complete", "go on with the cutover")],
            Self::CommitPending => vec![
                (
                    "commit",
                    "keep what the replica wrote, and let the old point go",
                ),
                rollback,
            ],
            Self::Committing => vec![("commit", "go on with it")],
            Self::RollingBack => vec![("rollback", "go on with it")],
            Self::Cancelled => vec![("commit", "let the old point go"), rollback],
            Self::Committed => vec![("reverse", "copy back what the replica changed since")],
            Self::RolledBack => Vec::new(),
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for State {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|state| state.name() == text);
        found.ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("state {text:?}: expected one of {names}")
        })
    }
}

/// What happens to a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_enums, reason = "callers decide for each")]
pub enum Input {
    /// A pass is about to be copied.
    PassBegins,
    /// The last pass would fit the budget, or more passes would not make it smaller.
    Converged,
    /// The source is about to be stopped.
    CutoverBegins,
    /// What the state names is done.
    StepDone,
    /// What the state names failed.
    StepFailed,
    /// What the replica wrote is about to be merged.
    CommitBegins,
    /// The targets are about to be returned.
    RollbackBegins,
    /// No more passes are wanted.
    Cancel,
    /// What was the source is to be brought up to date, by a job of its own.
    Reverse,
    /// The source is gone, and the targets are to do with their last pass.
    SourceLost,
}

impl Input {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::PassBegins,
        Self::Converged,
        Self::CutoverBegins,
        Self::StepDone,
        Self::StepFailed,
        Self::CommitBegins,
        Self::RollbackBegins,
        Self::Cancel,
        Self::Reverse,
        Self::SourceLost,
    ];
}

/// What to do with a job that a crash left in a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "callers decide for each")]
pub enum Recovery {
    /// Nothing before the next verb.
    Nothing,
    /// Let the source run, then copy on.
    ResumeSource,
    /// Do again what the state names, and go on.
    GoForward,
}

/// An input that does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refusal {
    /// Where the job is.
    pub state: State,
    /// What was wanted.
    pub input: Input,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wanted = match self.input {
            Input::PassBegins => "copy a pass",
            Input::Converged => "become ready",
            Input::CutoverBegins => "cut over",
            Input::StepDone | Input::StepFailed => "end a step",
            Input::CommitBegins => "commit",
            Input::RollbackBegins => "roll back",
            Input::Cancel => "cancel",
            Input::Reverse => "reverse",
            Input::SourceLost => "do without its source",
        };
        write!(f, "it is {}, so it cannot {wanted}", self.state)?;
        let verbs: Vec<&str> = self.state.next_steps().iter().map(|step| step.0).collect();
        match verbs.as_slice() {
            [] => f.write_str("; nothing is left to do"),
            verbs => write!(f, "; expected {}", verbs.join(" or ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that is allowed. Whatever is not here is refused.
    const TABLE: [(State, Input, State); 26] = {
        use Input as I;
        use State as S;
        [
            (S::Created, I::PassBegins, S::Syncing),
            (S::Created, I::Cancel, S::Cancelled),
            (S::Syncing, I::PassBegins, S::Syncing),
            (S::Syncing, I::Converged, S::Ready),
            (S::Syncing, I::Cancel, S::Cancelled),
            (S::Ready, I::PassBegins, S::Syncing),
            (S::Ready, I::CutoverBegins, S::Quiescing),
            (S::Ready, I::Cancel, S::Cancelled),
            (S::Quiescing, I::StepDone, S::LastPass),
            (S::Quiescing, I::StepFailed, S::Aborting),
            (S::LastPass, I::StepDone, S::Fencing),
            (S::LastPass, I::StepFailed, S::Aborting),
            (S::Fencing, I::StepDone, S::Starting),
            (S::Fencing, I::StepFailed, S::Aborting),
            (S::Starting, I::StepDone, S::CommitPending),
            (S::Aborting, I::StepDone, S::Syncing),
            (S::Starting, I::StepFailed, S::Aborting),
            (S::CommitPending, I::CommitBegins, S::Committing),
            (S::CommitPending, I::RollbackBegins, S::RollingBack),
            (S::Committing, I::StepDone, S::Committed),
            (S::RollingBack, I::StepDone, S::RolledBack),
            (S::Cancelled, I::CommitBegins, S::Committing),
            (S::Cancelled, I::RollbackBegins, S::RollingBack),
            (S::Committed, I::Reverse, S::Created),
            (S::Syncing, I::SourceLost, S::Fencing),
            (S::Ready, I::SourceLost, S::Fencing),
        ]
    };

    #[test]
    fn every_state_meets_every_input_as_the_table_says() {
        for state in State::ALL {
            for input in Input::ALL {
                let row = TABLE.iter().find(|row| (row.0, row.1) == (state, input));
                match (state.after(input), row) {
                    (Ok(next), Some(row)) => assert_eq!(next, row.2, "{state} {input:?}"),
                    (Err(refusal), None) => {
                        let text = refusal.to_string();
                        assert!(text.contains(&state.to_string()), "{text}");
                        for (verb, _) in state.next_steps() {
                            assert!(text.contains(verb), "{text}");
                        }
                    }
                    (found, row) => panic!("{state} {input:?}: {found:?}, expected {row:?}"),
                }
            }
        }
    }

    #[test]
    fn from_every_state_something_leads_to_an_end() {
        for state in State::ALL {
            let leads_on = state.next_steps().iter().any(|step| step.0 != "reverse");
            assert_eq!(leads_on, !state.is_final(), "{state}");
            let mut reached = vec![state];
            while let Some(next) = reached.iter().find_map(|from| {
                let follows = Input::ALL.iter().filter_map(|i| from.after(*i).ok());
                follows.into_iter().find(|next| !reached.contains(next))
            }) {
                reached.push(next);
            }
            assert!(reached.iter().any(|state| state.is_final()), "{state}");
        }
    }

    #[test]
    fn a_source_that_may_be_stopped_is_let_go_until_the_targets_hold_its_last_cut() {
        for state in State::ALL {
            let expected = match state {
                State::Quiescing | State::LastPass | State::Aborting => Recovery::ResumeSource,
                State::Fencing | State::Starting | State::Committing | State::RollingBack => {
                    Recovery::GoForward
                }
                _ => Recovery::Nothing,
            };
            assert_eq!(state.after_a_crash(), expected, "{state}");
        }
    }

    #[test]
    fn names_of_states_are_read_as_they_are_written() {
        for state in State::ALL {
            assert_eq!(state.to_string().parse(), Ok(state));
            let json = serde_json::to_string(&state).unwrap();
            assert_eq!(json, format!("\"{state}\""));
        }
        assert!("done".parse::<State>().unwrap_err().contains("committed"));
    }
}
