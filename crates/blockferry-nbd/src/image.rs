//! Image formats other than raw, through a qemu-nbd of our own that ends with us.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use blockferry_device::{Error, ErrorKind, Result};

use crate::address::NbdAddress;
use crate::device::{NbdDevice, NbdOptions};

const PROGRAM: &str = "qemu-nbd";
/// For the program to open the image and listen.
const STARTING: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(5);
/// Most of what it complains of that is shown.
const MOST_COMPLAINT_BYTES: u64 = 2000;

/// An image format that QEMU reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ImageFormat {
    /// QEMU's own.
    Qcow2,
    /// Microsoft's older one; QEMU calls it vpc.
    Vhd,
    /// Microsoft's newer one.
    Vhdx,
    /// That of `VMware`.
    Vmdk,
}

impl ImageFormat {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Qcow2, Self::Vhd, Self::Vhdx, Self::Vmdk];

    /// As QEMU calls it.
    const fn driver(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Vhd => "vpc",
            Self::Vhdx => "vhdx",
            Self::Vmdk => "vmdk",
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vhd => "vhd",
            other => other.driver(),
        })
    }
}

impl FromStr for ImageFormat {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL
            .into_iter()
            .find(|format| format.to_string() == text);
        found.ok_or_else(|| {
            let text = format!("image format {text:?}: expected qcow2, vhd, vhdx or vmdk");
            Error::new(ErrorKind::Unsuitable, text)
        })
    }
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
    // Missing files are said by their own words, not by QEMU's.
    File::open(path).map_err(|cause| Error::from_io(format!("open {label}"), cause))?;
    let path = std::path::absolute(path).map_err(failed)?;
    let place = tempfile::tempdir_in(scratch).map_err(failed)?;
    let socket = place.path().join("socket");
    let child = Command::new(PROGRAM)
        .args(["--read-only", "--shared=8", "--format", format.driver()])
        .arg("--socket")
        .arg(&socket)
        .arg("--")
        .arg(&path)
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
        match NbdDevice::open_as(&address, &NbdOptions::default(), label.clone()) {
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
        let said = String::from_utf8_lossy(&said);
        let said: String = said.trim().chars().filter(|c| !c.is_control()).collect();
        if said.is_empty() {
            said
        } else {
            format!(": {said}")
        }
    }
}
