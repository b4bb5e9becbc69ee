//! What every verb gets: where to write, how it is cancelled, where state lives.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::address::typed;
use crate::arguments::Global;
use crate::engine::nbd::NbdOptions;
use crate::engine::{self, CancelToken, Context, DiskAddress, TargetOptions};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::{Output, Verbosity};
use crate::progress::{Display, Look};
use crate::quote::{quoted, quoted_path};
use crate::remote::certs_dir;
use crate::signals::{self, Received};

/// Names another place for the state of devices and the list of targets, as tests and the demo need it.
pub(crate) const STATE_ROOT_VARIABLE: &str = "BLOCKFERRY_STATE_ROOT";

/// One invocation of the command.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    pub(crate) output: Arc<Output>,
    cancel: CancelToken,
    received: Received,
    state: Option<PathBuf>,
}

impl Session {
    /// Installs the signal handlers and decides how to write.
    pub(crate) fn start(global: &Global) -> Result<Self, Failure> {
        let cancel = CancelToken::new();
        let received = signals::install(&cancel).map_err(|error| {
            Failure::new(
                Exit::Internal,
                format!("cannot install signal handlers: {error}"),
            )
        })?;
        let output = Arc::new(Output::new(global.json, verbosity(global)));
        Ok(Self {
            output,
            cancel,
            received,
            state: global.state.clone(),
        })
    }

    /// A context for one operation and the display that shows it.
    pub(crate) fn context(&self, look: Look) -> (Context, Display) {
        let display = Display::start(&self.output, &self.received, look);
        let mut context = self.silent_context();
        context.observer = display.observer();
        (context, display)
    }

    /// A context for an operation that somebody else watches.
    pub(crate) fn silent_context(&self) -> Context {
        let mut context = Context::default();
        context.cancel = self.cancel.clone();
        context
    }

    /// The token that a signal cancels.
    pub(crate) fn cancel_token(&self) -> CancelToken {
        self.cancel.clone()
    }

    /// The signal that asked to stop.
    pub(crate) fn signal(&self) -> Option<u8> {
        self.received.signal()
    }

    /// Whether a signal asked to stop.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// Stops the operation under way.
    pub(crate) fn stop(&self) {
        self.cancel.cancel();
    }

    /// Where the state of targets is, and how exports are reached.
    pub(crate) fn target_options(&self) -> TargetOptions {
        let mut options = TargetOptions::new(device_state_root());
        options.nbd = nbd_options();
        options.scratch = std::env::temp_dir();
        options.state_dir.clone_from(&self.state);
        options
    }

    /// Where the caller wants the state of targets, instead of its usual place.
    pub(crate) fn state_dir(&self) -> Option<&Path> {
        self.state.as_deref()
    }

    /// The engine's error as a failure, with the signal that caused it.
    pub(crate) fn failure(&self, error: &engine::Error) -> Failure {
        let exit = Exit::for_kind(error.kind(), self.received.signal());
        Failure::from_error(exit, error).resumable(error.is_resumable())
    }

    /// The command for `verb` on `target` that works from any directory.
    pub(crate) fn command(&self, verb: &str, target: &DiskAddress) -> String {
        let state = self.state.as_ref().map_or_else(String::new, |dir| {
            let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.clone());
            format!(" --state {}", quoted_path(&dir))
        });
        format!("blockferry {verb} {}{state}", quoted(&typed(target)))
    }
}

/// How exports are reached.
pub(crate) fn nbd_options() -> NbdOptions {
    let mut options = NbdOptions::default();
    options.certificates = Some(certs_dir(None));
    options
}

/// This command again, as it was typed.
pub(crate) fn same_command() -> String {
    let words = std::env::args_os().skip(1);
    let words = words.map(|word| quoted_path(Path::new(&word)));
    let words: Vec<String> = std::iter::once("blockferry".to_owned())
        .chain(words)
        .collect();
    words.join(" ")
}

fn verbosity(global: &Global) -> Verbosity {
    match (global.quiet, global.verbose) {
        (true, _) => Verbosity::Quiet,
        (_, true) => Verbosity::Verbose,
        _ => Verbosity::Normal,
    }
}

/// `$BLOCKFERRY_STATE_ROOT`, else `/var/lib/blockferry` for root, else `$XDG_STATE_HOME/blockferry` or `~/.local/state/blockferry`.
pub(crate) fn device_state_root() -> PathBuf {
    if let Some(root) = std::env::var_os(STATE_ROOT_VARIABLE).filter(|root| !root.is_empty()) {
        return PathBuf::from(root);
    }
    if is_root() {
        return PathBuf::from("/var/lib/blockferry");
    }
    user_dir("XDG_STATE_HOME", ".local/state").join("blockferry")
}

/// What the variable of the XDG base directories names, or that place in the home of the user.
pub(crate) fn user_dir(variable: &str, in_home: &str) -> PathBuf {
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute(variable)
        .or_else(|| absolute("HOME").map(|home| home.join(in_home)))
        .unwrap_or_else(std::env::temp_dir)
}

/// `/proc/self` belongs to the effective user.
pub(crate) fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}
