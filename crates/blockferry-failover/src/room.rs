//! Room for what a running machine overwrites while a point of it is read. Where there is none left, a write of the guest
//! would fail: the point is given up before.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use blockferry_core::format_size;
use blockferry_device::{Error, ErrorKind, Result};
use blockferry_qemu::Machine;

const TICK: Duration = Duration::from_millis(20);
/// What is left free: a tenth of the file system, within these. The most is what a fast guest writes in a second.
const LEAST_FREE_BYTES: u64 = 16 << 20;
const MOST_FREE_BYTES: u64 = 1 << 30;

/// Looks after the room in a scratch directory until it is dropped.
#[derive(Debug)]
pub(crate) struct Room {
    directory: PathBuf,
    kept_bytes: u64,
    is_over: Arc<AtomicBool>,
    has_run_out: Arc<AtomicBool>,
}

impl Room {
    /// Ends what keeps the points of `machine` once there is hardly any room left in `directory`.
    ///
    /// # Errors
    /// There is hardly any now.
    pub(crate) fn watch(directory: &Path, machine: Arc<Mutex<Option<Machine>>>) -> Result<Self> {
        let (free_bytes, all_bytes) = space(directory)?;
        let kept_bytes = (all_bytes / 10).clamp(LEAST_FREE_BYTES, MOST_FREE_BYTES);
        let room = Self {
            directory: directory.to_owned(),
            kept_bytes,
            is_over: Arc::default(),
            has_run_out: Arc::default(),
        };
        if free_bytes < kept_bytes {
            return Err(room.error(&format!("{} are free", format_size(free_bytes))));
        }
        let (directory, is_over) = (directory.to_owned(), Arc::clone(&room.is_over));
        let has_run_out = Arc::clone(&room.has_run_out);
        thread::spawn(move || {
            while !is_over.load(Ordering::SeqCst) {
                if space(&directory).is_ok_and(|(free, _)| free < kept_bytes) {
                    let mut machine = machine.lock().unwrap_or_else(PoisonError::into_inner);
                    if is_over.load(Ordering::SeqCst) {
                        return;
                    }
                    has_run_out.store(true, Ordering::SeqCst);
                    // Where it does not answer nobody can help it.
                    let _given_up = machine.as_mut().map(Machine::give_up);
                    return;
                }
                thread::sleep(TICK);
            }
        });
        Ok(room)
    }

    /// Whether a point was given up.
    ///
    /// # Errors
    /// It was.
    pub(crate) fn check(&self) -> Result<()> {
        match self.has_run_out.load(Ordering::SeqCst) {
            true => Err(self.error("the point was given up, so that no write of the guest fails")),
            false => Ok(()),
        }
    }

    fn error(&self, what: &str) -> Error {
        let text = format!(
            "scratch directory {}, which keeps what the machine overwrites while a point is read: expected at least {} \
             free; {what}",
            self.directory.display(),
            format_size(self.kept_bytes)
        );
        Error::new(ErrorKind::NoSpace, text)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
    }
}

/// Free for everybody, and all.
fn space(directory: &Path) -> Result<(u64, u64)> {
    let found = rustix::fs::statvfs(directory).map_err(|cause| {
        Error::from_io(
            format!("free space of {}", directory.display()),
            cause.into(),
        )
    })?;
    let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
    Ok((bytes(found.f_bavail), bytes(found.f_blocks)))
}
