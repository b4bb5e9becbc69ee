//! Image formats other than raw, through a qemu-nbd of our own that ends with us.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
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
/// Becomes the program that is named behind it, which is ended when the standard input ends without a word: when we are
/// killed. By itself it would wait for its first client for ever, and leave what its socket lies in.
const WATCHED: &str = r#"exec 3<&0
(read -r word <&3 || { kill $$; rm -f "$BLOCKFERRY_PLACE"/socket; rmdir "$BLOCKFERRY_PLACE"; }) 2>/dev/null &
exec "$0" "$@" 3<&- </dev/null"#;
/// What a shell says of a program that is not there.
const NOT_FOUND: i32 = 127;
/// For the program to open the image and listen.
const STARTING: Duration = Duration::from_secs(30);
/// For it to close an image that was written, once nobody is connected.
const CLOSING: Duration = Duration::from_secs(10);
/// For the program of somebody who was killed to do so.
const LOCKED: Duration = Duration::from_secs(3);
const TICK: Duration = Duration::from_millis(5);
/// It says so when somebody else has the image open.
const IS_LOCKED: &str = "Failed to get \"write\" lock";
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

/// The program that serves an image. It ends when nobody is connected any more, and at the latest when we are gone.
#[derive(Debug)]
pub(crate) struct Program {
    child: Child,
    to: Use,
    _place: tempfile::TempDir,
}

impl Drop for Program {
    fn drop(&mut self) {
        // An image that was written is better closed than left as a crash leaves it.
        let end = Instant::now() + CLOSING;
        let is_open = |child: &mut Child| matches!(child.try_wait(), Ok(None));
        while self.to == Use::Write && is_open(&mut self.child) && Instant::now() < end {
            thread::sleep(TICK);
        }
        self.child.kill().ok();
        if let Some(mut watch) = self.child.stdin.take() {
            watch.write_all(b"ended\n").ok();
        }
        self.child.wait().ok();
    }
}

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Read,
    Write,
}

/// An image to read. A file that it is based on, if it names one, is read as well. The socket between is in a private
/// directory of its own below `scratch`, whose path must be short: usually `/tmp`.
///
/// # Errors
/// qemu-nbd is not installed, or does not open the image: it is none of this format, or a machine is writing it.
pub fn open_image(format: ImageFormat, path: &Path, scratch: &Path) -> Result<Arc<NbdDevice>> {
    open(format, path, Use::Read, scratch)
}

/// As [`open_image`], to write as well. The image has to be there, and nobody else can open it meanwhile. Only qcow2: QEMU
/// writes its tables in an order that leaves it sound at every moment, which it does not for other formats.
///
/// # Errors
/// As [`open_image`]; or it is of another format.
pub fn open_image_target(
    format: ImageFormat,
    path: &Path,
    scratch: &Path,
) -> Result<Arc<NbdDevice>> {
    if format != ImageFormat::Qcow2 {
        let text = format!(
            "open {format}+file:{} to write: expected {}, which alone stays sound when {PROGRAM} is killed",
            path.display(),
            ImageFormat::Qcow2
        );
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    let end = Instant::now() + LOCKED;
    loop {
        match open(format, path, Use::Write, scratch) {
            Err(error) if error.to_string().contains(IS_LOCKED) && Instant::now() < end => {
                thread::sleep(TICK);
            }
            opened => {
                let device = opened?;
                device.refuse_unwritable()?;
                return Ok(device);
            }
        }
    }
}

fn open(format: ImageFormat, path: &Path, to: Use, scratch: &Path) -> Result<Arc<NbdDevice>> {
    let label = format!("{format}+file:{}", path.display());
    let driver = driver(format).ok_or_else(|| {
        let text = format!("open {label}: {PROGRAM} is not known to read it");
        Error::new(ErrorKind::Unsupported, text)
    })?;
    // Missing files are said by their own words, not by QEMU's.
    let opened = File::open(path).and_then(|_image| std::path::absolute(path));
    let path = opened.map_err(|cause| Error::from_io(format!("open {label}"), cause))?;
    let image = [
        "--format".as_ref(),
        driver.as_ref(),
        "--".as_ref(),
        path.as_os_str(),
    ];
    serve(&label, &image, None, to, scratch)
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
    serve(&label, &image, Some(&History::Overlay), Use::Read, scratch)
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
    to: Use,
    scratch: &Path,
) -> Result<Arc<NbdDevice>> {
    let options = NbdOptions::default();
    let failed = |cause| Error::from_io(format!("open {label} with {PROGRAM}"), cause);
    let mut private = tempfile::Builder::new();
    let place = private
        .prefix("blockferry-")
        .tempdir_in(scratch)
        .map_err(failed)?;
    let socket = place.path().join("socket");
    let child = Command::new("/bin/sh")
        .args(["-c", WATCHED, PROGRAM, "--shared=8"])
        .env("BLOCKFERRY_PLACE", place.path())
        .arg(match to {
            Use::Read => "--read-only",
            Use::Write => "--discard=unmap",
        })
        .arg("--socket")
        .arg(&socket)
        .args(image)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // What a terminal sends us is for us to carry out.
        .process_group(0)
        .spawn();
    let mut program = Program {
        child: child.map_err(failed)?,
        to,
        _place: place,
    };
    let address = NbdAddress::unix(&socket, "")?;
    let end = Instant::now() + STARTING;
    loop {
        // The first to connect keeps the program, and whoever only tries would end it.
        let ended = program.child.try_wait().map_err(failed)?;
        if ended.and_then(|status| status.code()) == Some(NOT_FOUND) {
            let text = format!("open {label}: {PROGRAM} is needed for it and not installed");
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
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
        let lines: Vec<String> = said
            .trim_ascii()
            .split(|byte| *byte == b'\n')
            .map(shown)
            .collect();
        let said = lines.join("; ");
        if said.is_empty() {
            said
        } else {
            format!(": {said}")
        }
    }
}
