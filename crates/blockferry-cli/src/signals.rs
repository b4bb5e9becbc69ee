//! SIGINT and SIGTERM: the first one asks the run to stop cleanly, the second one ends the process at once.
//!
//! Ending at once is safe by design: before the commit the target is untouched, after it recovery finishes.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::engine::CancelToken;

/// Remembers which signal arrived.
#[derive(Clone, Debug, Default)]
pub(crate) struct Received(Arc<AtomicU8>);

impl Received {
    /// The number of the first signal, if one arrived.
    pub(crate) fn signal(&self) -> Option<u8> {
        match self.0.load(Ordering::SeqCst) {
            0 => None,
            number => Some(number),
        }
    }
}

/// Installs the handlers; from now on the first signal cancels `token`.
pub(crate) fn install(token: &CancelToken) -> io::Result<Received> {
    let received = Received::default();
    let stopping = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // Registered before the flag that arms it, so that only a second signal ends the process, and inside the
        // handler itself, so that this works even if every thread hangs.
        signal_hook::flag::register_conditional_shutdown(
            signal,
            128 + signal,
            Arc::clone(&stopping),
        )?;
        signal_hook::flag::register(signal, Arc::clone(&stopping))?;
    }
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let (token, first) = (token.clone(), received.clone());
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in signals.forever() {
                let number = u8::try_from(signal).unwrap_or(0);
                let _ = first
                    .0
                    .compare_exchange(0, number, Ordering::SeqCst, Ordering::SeqCst);
                token.cancel();
            }
        })?;
    Ok(received)
}
