//! Between two attempts of a run, whose connection was lost, nobody holds its target. Whoever takes it meanwhile, with
//! another run, a roll back or anything else, keeps it: an attempt that comes back late is refused.

use blockferry_device::{StorageDir, StorageFile};
use blockferry_transfer_log::SessionId;

use crate::error::{Error, ErrorKind, Result};
use crate::sync::random_id;

/// In the state directory: the id of the run that took the target last. Only runs of several attempts leave one.
const NAME: &str = "run";
const BYTES: usize = 16;

/// One attempt of a run, which may need several where its connection does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Attempt {
    /// Of the run: the same in each attempt.
    pub run: SessionId,
    /// Not the first one: it goes on where the one before left the target, unless somebody took that meanwhile.
    pub is_another: bool,
}

impl Attempt {
    /// An attempt of `run`.
    #[must_use]
    pub fn new(run: SessionId, is_another: bool) -> Self {
        Self { run, is_another }
    }
}

/// How a target is found by who takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// As it was left, or it does not matter.
    AsLeft,
    /// Without the state that the attempt before had left there.
    WithoutItsState,
}

/// Takes a target, whose state is in `state` and locked. Whatever run was there before does not go on.
pub(crate) fn take(
    state: &dyn StorageDir,
    attempt: Option<Attempt>,
    target: &str,
) -> Result<Found> {
    let failed = |e| Error::target(format!("note in the state of {target} who took it"), e);
    let file = state.open(NAME).map_err(failed)?;
    let before = match &file {
        Some(file) => run_in(&**file).map_err(failed)?,
        None => None,
    };
    let (run, found) = match attempt {
        None if file.is_none() => return Ok(Found::AsLeft),
        None => (random_id()?, Found::AsLeft),
        Some(Attempt { run, is_another }) if !is_another => (run, Found::AsLeft),
        Some(Attempt { run, .. }) if before == Some(run) => return Ok(Found::AsLeft),
        Some(Attempt { run, .. }) if before.is_none() => (run, Found::WithoutItsState),
        Some(_) => {
            let text = format!(
                "{target} was taken by another command since the connection of this run was lost: it stays as that \
                 one left it; start this one again if its source is to win"
            );
            return Err(Error::new(ErrorKind::Target, text));
        }
    };
    // A crash in between leaves none, or one that is no id: that is said by the next attempt, and nobody is let in who
    // was not.
    drop(file);
    state.remove(NAME).map_err(failed)?;
    let new = state.create(NAME).map_err(failed)?;
    new.write_at(0, run.as_bytes()).map_err(failed)?;
    new.flush().map_err(failed)?;
    state.sync().map_err(failed)?;
    Ok(found)
}

/// What is no id is none: it was not written to its end.
fn run_in(file: &dyn StorageFile) -> blockferry_device::Result<Option<SessionId>> {
    if file.size_bytes() != BYTES as u64 {
        return Ok(None);
    }
    let mut bytes = [0; BYTES];
    file.read_at(0, &mut bytes)?;
    Ok(Some(SessionId::from_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use blockferry_testkit::{ImageLimits, SimDisk, SimOptions};

    use super::*;

    const ONE: SessionId = SessionId::from_bytes([1; 16]);
    const OTHER: SessionId = SessionId::from_bytes([2; 16]);

    fn take_on(disk: &SimDisk, attempt: Option<(SessionId, bool)>) -> Result<Found> {
        let attempt = attempt.map(|(run, is_another)| Attempt::new(run, is_another));
        take(&*disk.dir("state"), attempt, "the target")
    }

    #[test]
    fn whoever_takes_a_target_fences_the_runs_before() {
        let disk = SimDisk::new(SimOptions::default());
        assert_eq!(take_on(&disk, None).unwrap(), Found::AsLeft);
        assert!(disk.dir("state").names().unwrap().is_empty());

        for by_whom in [Some((OTHER, false)), None] {
            take_on(&disk, Some((ONE, false))).unwrap();
            for _ in 0..2 {
                let again = take_on(&disk, Some((ONE, true)));
                assert_eq!(again.unwrap(), Found::AsLeft);
            }

            take_on(&disk, by_whom).unwrap();

            let late = take_on(&disk, Some((ONE, true))).unwrap_err();
            assert_eq!(late.kind(), ErrorKind::Target);
            assert!(!late.is_resumable());
        }
        // Started again it is a run like any other.
        take_on(&disk, Some((ONE, false))).unwrap();
    }

    #[test]
    fn a_state_that_was_lost_or_cut_short_is_told_from_one_that_was_taken() {
        let disk = SimDisk::new(SimOptions::default());
        let found = take_on(&disk, Some((ONE, true))).unwrap();
        assert_eq!(found, Found::WithoutItsState);
        let dir = disk.dir("state");
        let file = dir.open(NAME).unwrap().unwrap();
        file.resize(3).unwrap();

        let found = take_on(&disk, Some((ONE, true))).unwrap();

        assert_eq!(found, Found::WithoutItsState);
        assert_eq!(take_on(&disk, Some((ONE, true))).unwrap(), Found::AsLeft);
    }

    #[test]
    fn a_target_that_was_taken_stays_taken_whatever_power_loss_leaves() {
        for by_whom in [Some((OTHER, false)), None] {
            let disk = SimDisk::new(SimOptions::default());
            take_on(&disk, Some((ONE, false))).unwrap();
            take_on(&disk, by_whom).unwrap();

            let mut images = 0;
            for image in disk.snapshot().crash_images(7, ImageLimits::default()) {
                images += 1;
                take_on(&image.disk(), Some((ONE, true))).unwrap_err();
            }
            assert!(images > 0);
        }
    }
}
