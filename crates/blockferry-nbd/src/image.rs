//! Image formats other than raw, through a qemu-nbd of our own that ends with us.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use blockferry_device::{Error, ErrorKind, ImageFormat, Result};

use crate::address::NbdAddress;
use crate::device::{History, NbdDevice, NbdOptions};
use crate::wire::shown;

const PROGRAM: &str = "qemu-nbd";
/// For the program to open the image and listen.
const STARTING: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(5);
/// Most of what it complains of that is shown.
const MOST_COMPLAINT_BYTES: u64 = 2000;

/// As QEMU calls the format; `None` is one that came later than this.
fn driver(format: ImageFormat) -> Option<&'static str> {
    Some(match format {
        ImageFormat::Qcow2 => "qcow2",
        ImageFormat::Vhd => "vpc",
        ImageFormat::Vhdx => "vhdx",
        ImageFormat::Vmdk => "vmdk",
        _ => return None,
    })
}

/// The program that serves an image. It ends when nobody is connected any more, so also when we are killed.
#[derive(Debug)]
pub(crate) struct Program {
    child: Child,
    _place: tempfile::TempDir,
}

impl Drop for Program {
    fn drop(&mut self) {
        // It only reads: nothing is lost.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// An image to read. A file that it is based on, if it names one, is read as well. The socket between is in a private
/// directory of its own below `scratch`, whose path must be short: usually `/tmp`.
///
/// # Errors
/// qemu-nbd is not installed, or does not open the image: it is none of this format, or a machine is writing it.
pub fn open_image(format: ImageFormat, path: &Path, scratch: &Path) -> Result<Arc<NbdDevice>> {
    let label = format!("{format}+file:{}", path.display());
    let failed = |cause| Error::from_io(format!("open {label} with {PROGRAM}"), cause);
    let driver = driver(format).ok_or_else(|| {
        let text = format!("open {label}: {PROGRAM} is not known to read it");
        Error::new(ErrorKind::Unsupported, text)
    })?;
    // Missing files are said by their own words, not by QEMU's.
    File::open(path).map_err(|cause| Error::from_io(format!("open {label}"), cause))?;
    let path = std::path::absolute(path).map_err(failed)?;
    let image = [
        "--format".as_ref(),
        driver.as_ref(),
        "--".as_ref(),
        path.as_os_str(),
    ];
    serve(&label, &image, None, scratch)
}

/// A qcow2 overlay to read, over a raw `backing` that is not locked for it: whoever reads it keeps others from writing the
/// backing meanwhile. Where to find the backing is not taken from the overlay. [`NbdDevice::changes`] says what it holds.
///
/// # Errors
/// As [`open_image`].
pub fn open_overlay(path: &Path, backing: &Path, scratch: &Path) -> Result<Arc<NbdDevice>> {
    let label = format!("{}+file:{}", ImageFormat::Qcow2, path.display());
    let mut options = OsString::from("driver=qcow2,file.driver=file,file.filename=");
    let absolute = |path: &Path| {
        File::open(path)
            .and_then(|_file| std::path::absolute(path))
            .map_err(|cause| Error::from_io(format!("open {}", path.display()), cause))
    };
    options.push(in_options(&absolute(path)?));
    options.push(",backing.driver=raw,backing.file.driver=file,backing.file.locking=off");
    options.push(",backing.file.filename=");
    options.push(in_options(&absolute(backing)?));
    let image = [
        "--allocation-depth".as_ref(),
        "--image-opts".as_ref(),
        "--".as_ref(),
        options.as_os_str(),
    ];
    serve(&label, &image, Some(&History::Overlay), scratch)
}

/// A comma ends a value, two of them are one.
fn in_options(path: &Path) -> OsString {
    let commas = path.as_os_str().as_bytes().split(|byte| *byte == b',');
    let parts: Vec<&[u8]> = commas.collect();
    OsString::from_vec(parts.join(&b",,"[..]))
}

/// What qemu-nbd serves when it is told of the image by `image`.
fn serve(
    label: &str,
    image: &[&OsStr],
    history: Option<&History>,
    scratch: &Path,
) -> Result<Arc<NbdDevice>> {
    let options = NbdOptions::default();
    let failed = |cause| Error::from_io(format!("open {label} with {PROGRAM}"), cause);
    let place = tempfile::tempdir_in(scratch).map_err(failed)?;
    let socket = place.path().join("socket");
    let child = Command::new(PROGRAM)
        .args(["--read-only", "--shared=8"])
        .arg("--socket")
        .arg(&socket)
        .args(image)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut program = Program {
        child: child.map_err(|cause| match cause.kind() {
            std::io::ErrorKind::NotFound => {
                let text = format!("open {label}: {PROGRAM} is needed for it and not installed");
                Error::new(ErrorKind::Unsupported, text)
            }
            _ => failed(cause),
        })?,
        _place: place,
    };
    let address = NbdAddress::unix(&socket, "")?;
    let end = Instant::now() + STARTING;
    loop {
        // The first to connect keeps the program, and whoever only tries would end it.
        let ended = program.child.try_wait().map_err(failed)?;
        if ended.is_some() || Instant::now() >= end {
            let complaint = program.complaint();
            let text = format!("open {label}: {PROGRAM} does not serve it{complaint}");
            return Err(Error::new(ErrorKind::Unsuitable, text));
        }
        match NbdDevice::open_as(&address, history.cloned(), &options, label.to_owned()) {
            Ok(mut device) => {
                device.keep(program);
                return Ok(Arc::new(device));
            }
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Io) => {
                thread::sleep(TICK);
            }
            Err(error) => return Err(error),
        }
    }
}

impl Program {
    fn complaint(&mut self) -> String {
        self.child.kill().ok();
        let mut said = Vec::new();
        if let Some(stderr) = self.child.stderr.take() {
            stderr
                .take(MOST_COMPLAINT_BYTES)
                .read_to_end(&mut said)
                .ok();
        }
        let said = shown(said.trim_ascii());
        if said.is_empty() {
            said
        } else {
            format!(": {said}")
        }
    }
}
