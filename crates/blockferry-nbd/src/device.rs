//! [`NbdDevice`]: an export as a device, over as many connections as its server allows.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use blockferry_core::{ChangeMap, Content, Extent, Provenance, Trust, block_digest};
use blockferry_device::{
    BlockSource, BlockTarget, Error, ErrorKind, Evidence, Identity, ReadRequest, Result, Status,
    WriteRequest,
};

use crate::address::NbdAddress;
use crate::connection::{Channel, Connection};
use crate::handshake::Export;
use crate::image::Program;
use crate::transfer::{DEPTH, Outcome, Transfer};
use crate::wire::allocation::IS_ZERO;
use crate::wire::{ALLOCATION, Command, flag};

/// Of the layers of an image, as QEMU counts them: 0 is none, 1 the uppermost.
const DEPTH_CONTEXT: &str = "qemu:allocation-depth";
const UPPERMOST: u32 = 1;
/// Of a dirty bitmap: the run was written.
const IS_DIRTY: u32 = 1;
/// How much block status is asked for at once: whole units of any server, in the 32 bits that a request has for it.
const STATUS_BYTES: u64 = (1 << 32) - (32 << 20);
/// How much is made zero at once.
const ZERO_BYTES: u64 = 1 << 30;
/// Connections to a server that allows several.
const MOST_CONNECTIONS: usize = 4;

/// How an export is used. Build it with `default()` and set what differs.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct NbdOptions {
    /// A dirty bitmap of QEMU that the export has, by its name: see [`NbdDevice::changes`].
    pub bitmap: Option<String>,
    /// How long a server may be silent while something is asked of it.
    pub silence: Duration,
    /// Where the certificates for TLS are, unless the address says so: `ca-cert.pem`, `client-cert.pem` and
    /// `client-key.pem`, or `ca.pem`, `host.pem` and `host.key`.
    pub certificates: Option<PathBuf>,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self {
            bitmap: None,
            silence: Duration::from_secs(60),
            certificates: None,
        }
    }
}

/// An export of an NBD server.
pub struct NbdDevice {
    address: NbdAddress,
    label: String,
    contexts: Vec<String>,
    history: Option<History>,
    silence: Duration,
    certificates: Option<PathBuf>,
    export: Export,
    pool: Mutex<Pool>,
    returned: Condvar,
    /// Runs that were asked for last; forgotten with every write.
    known: Mutex<Option<Known>>,
    /// Held alone by who reads, changes and writes a unit of the server; shared by who writes whole units.
    units: RwLock<()>,
    /// Changes that were begun, and how many of these were durable last.
    begun: AtomicU64,
    durable: AtomicU64,
    /// A connection was lost while some were not: what became of them nobody knows.
    lost: AtomicBool,
    /// Ends after the connections: fields are dropped in order.
    program: Option<Program>,
}

#[derive(Default)]
struct Pool {
    idle: Vec<Connection>,
    /// In use and idle.
    made: usize,
}

/// What tells which parts of an export changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum History {
    /// A dirty bitmap of this name.
    Bitmap(String),
    /// What is allocated in the uppermost layer of an image over others.
    Overlay,
}

impl History {
    fn context(&self) -> String {
        match self {
            Self::Bitmap(name) => format!("qemu:dirty-bitmap:{name}"),
            Self::Overlay => DEPTH_CONTEXT.to_owned(),
        }
    }

    fn changed(&self, flags: u32) -> bool {
        match self {
            Self::Bitmap(_) => flags & IS_DIRTY != 0,
            Self::Overlay => flags == UPPERMOST,
        }
    }

    fn provenance(&self) -> Provenance {
        match self {
            Self::Bitmap(_) => Provenance::QemuDirtyBitmap,
            Self::Overlay => Provenance::QemuOverlay,
        }
    }
}

/// Block status from `start` on: ends of runs, and whether they read zero.
struct Known {
    start: u64,
    runs: Vec<(u64, bool)>,
}

impl NbdDevice {
    /// An export to read.
    ///
    /// # Errors
    /// Nobody answers, there is no such export, or it cannot be used.
    pub fn open_source(address: &NbdAddress, options: &NbdOptions) -> Result<Arc<Self>> {
        let history = options.bitmap.clone().map(History::Bitmap);
        Self::open_as(address, history, options, address.to_string()).map(Arc::new)
    }

    /// Under a name of its own in messages.
    pub(crate) fn open_as(
        address: &NbdAddress,
        history: Option<History>,
        options: &NbdOptions,
        label: String,
    ) -> Result<Self> {
        let mut contexts = vec![ALLOCATION.to_owned()];
        contexts.extend(history.as_ref().map(History::context));
        let (silence, certificates) = (options.silence, options.certificates.clone());
        let first = Connection::open(address, &contexts, certificates.as_deref(), silence)?;
        let export = first.export().clone();
        if export.size_bytes > i64::MAX as u64 {
            let size = export.size_bytes;
            let text = format!("open {label}: the server says that it has {size} bytes");
            return Err(Error::new(ErrorKind::Unsuitable, text));
        }
        Ok(Self {
            address: address.clone(),
            label,
            contexts,
            history,
            silence,
            certificates,
            export,
            pool: Mutex::new(Pool {
                idle: vec![first],
                made: 1,
            }),
            returned: Condvar::new(),
            known: Mutex::new(None),
            units: RwLock::new(()),
            begun: AtomicU64::new(0),
            durable: AtomicU64::new(0),
            lost: AtomicBool::new(false),
            program: None,
        })
    }

    /// The program that serves it ends with it.
    pub(crate) fn keep(&mut self, program: Program) {
        self.program = Some(program);
    }

    /// An export to write as well.
    ///
    /// # Errors
    /// As [`Self::open_source`]; or it is read-only, or its server makes nothing durable.
    pub fn open_target(address: &NbdAddress, options: &NbdOptions) -> Result<Arc<Self>> {
        let device = Self::open_source(address, options)?;
        device.refuse_unwritable()?;
        Ok(device)
    }

    pub(crate) fn refuse_unwritable(&self) -> Result<()> {
        let refused = |kind, why: &str| {
            let text = format!("open {} to write: {why}", self.label);
            Err(Error::new(kind, text))
        };
        if self.export.can(flag::READ_ONLY) {
            return refused(ErrorKind::Denied, "the server exports it read-only");
        }
        if !self.export.can(flag::FLUSH) {
            return refused(
                ErrorKind::Unsupported,
                "the server offers no flush, so nothing on it is ever known to be durable",
            );
        }
        Ok(())
    }

    /// What the bitmap of [`NbdOptions::bitmap`] says: what was written since it was begun, and that all else is the
    /// same. Of an overlay: what it holds, and that all else is its backing's. Nothing if the server does not tell.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn changes(&self) -> Result<Option<ChangeMap>> {
        let Some(history) = &self.history else {
            return Ok(None);
        };
        let Some(context) = self.context(&history.context()) else {
            return Ok(None);
        };
        let size_bytes = self.export.size_bytes;
        let mut map = ChangeMap::new(history.provenance(), Trust::Trusted, size_bytes);
        map.set(Extent::from_range(0..size_bytes), Content::Same);
        let mut offset = 0;
        while offset < size_bytes {
            for (end, flags) in self.status(context, offset)? {
                if history.changed(flags) {
                    map.set(Extent::from_range(offset..end), Content::Data);
                }
                offset = end;
            }
        }
        Ok(Some(map))
    }

    fn context(&self, name: &str) -> Option<u32> {
        let mut all = self.export.contexts.iter();
        all.find(|(_, found)| found == name).map(|(id, _)| *id)
    }

    /// Runs from `offset` on, as (end, flags), as far as the server tells at once.
    fn status(&self, context: u32, offset: u64) -> Result<Vec<(u64, u32)>> {
        let unit = u64::from(self.export.unit_bytes);
        let start = offset / unit * unit;
        let length = (self.export.size_bytes - start).min(STATUS_BYTES);
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        let mut end = start;
        let runs =
            self.with_retry(&mut |mut transfer| transfer.block_status(context, start, length))?;
        let mut told = Vec::with_capacity(runs.len());
        for (bytes, flags) in runs {
            // The last run may go on behind what was asked for.
            end = (end + u64::from(bytes)).min(self.export.size_bytes);
            if end > offset && told.last().is_none_or(|(last, _)| *last < end) {
                told.push((end, flags));
            }
        }
        if told.is_empty() {
            let text = format!(
                "block status at offset {offset} of {}: none came",
                self.label
            );
            return Err(Error::new(ErrorKind::Io, text));
        }
        Ok(told)
    }

    fn check_range(&self, what: &str, offset: u64, bytes: u64) -> Result<()> {
        let size_bytes = self.export.size_bytes;
        match offset.checked_add(bytes) {
            Some(end) if end <= size_bytes => Ok(()),
            _ => {
                let text = format!(
                    "{what} of {bytes} bytes at offset {offset} of {}: it has {size_bytes}",
                    self.label
                );
                Err(Error::new(ErrorKind::OutOfRange, text))
            }
        }
    }

    /// Whole units of the server, or its end.
    fn is_aligned(&self, offset: u64, bytes: u64) -> bool {
        let unit = u64::from(self.export.unit_bytes);
        let end = offset + bytes;
        offset.is_multiple_of(unit) && (end.is_multiple_of(unit) || end == self.export.size_bytes)
    }

    /// The whole units around a range.
    fn around(&self, offset: u64, bytes: u64) -> (u64, usize) {
        let unit = u64::from(self.export.unit_bytes);
        let start = offset / unit * unit;
        let end = (offset + bytes).next_multiple_of(unit);
        let end = end.min(self.export.size_bytes);
        (start, usize::try_from(end - start).unwrap_or(usize::MAX))
    }

    fn read_around(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let (start, bytes) = self.around(offset, buffer.len() as u64);
        let mut whole = vec![0; bytes];
        let request = ReadRequest {
            offset: start,
            buffer: &mut whole,
        };
        self.read_aligned(&mut [request])?;
        let from = usize::try_from(offset - start).unwrap_or(usize::MAX);
        buffer.copy_from_slice(&whole[from..from + buffer.len()]);
        Ok(())
    }

    /// Reading changes nothing: what a connection did not bring, another one may.
    fn read_aligned(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        self.with_retry(&mut |mut transfer| transfer.read(requests))
    }

    fn write_aligned(&self, requests: &[WriteRequest<'_>]) -> Result<()> {
        self.change(|mut transfer| transfer.write(requests))
    }

    fn zero(&self, command: Command, extent: Extent) -> Result<()> {
        let end = extent.end();
        let mut offset = extent.start();
        while offset < end {
            let bytes = (end - offset).min(ZERO_BYTES);
            let length = u32::try_from(bytes).unwrap_or(u32::MAX);
            self.change(|mut transfer| transfer.command(command, offset, length))?;
            offset += bytes;
        }
        Ok(())
    }

    /// Changes content. What is lost with a connection is lost until the end: a flush would prove nothing of it.
    fn change(&self, work: impl FnOnce(Transfer<'_, Channel>) -> Outcome) -> Result<()> {
        self.refuse_if_lost()?;
        self.begun.fetch_add(1, Ordering::SeqCst);
        let outcome = self.with_connection(work);
        *lock(&self.known) = None;
        outcome
    }

    fn refuse_if_lost(&self) -> Result<()> {
        if !self.lost.load(Ordering::SeqCst) {
            return Ok(());
        }
        let text = format!(
            "a connection to {} was lost before a flush: what was written since the flush before is not known",
            self.label
        );
        Err(Error::new(ErrorKind::Lost, text))
    }

    fn with_connection<T>(
        &self,
        work: impl FnOnce(Transfer<'_, Channel>) -> Outcome<T>,
    ) -> Result<T> {
        let mut connection = self.take()?;
        let outcome = connection.transfer(work);
        self.give_back(connection);
        outcome.map_err(|failure| failure.into_error())
    }

    fn with_retry<T>(
        &self,
        work: &mut dyn FnMut(Transfer<'_, Channel>) -> Outcome<T>,
    ) -> Result<T> {
        let mut connection = self.take()?;
        let mut outcome = connection.transfer(&mut *work);
        if connection.is_broken() {
            self.give_back(connection);
            connection = self.take()?;
            outcome = connection.transfer(&mut *work);
        }
        self.give_back(connection);
        outcome.map_err(|failure| failure.into_error())
    }

    fn take(&self) -> Result<Connection> {
        let most = if self.export.can(flag::MULTI_CONN) {
            MOST_CONNECTIONS
        } else {
            1
        };
        let mut pool = lock(&self.pool);
        loop {
            if let Some(connection) = pool.idle.pop() {
                return Ok(connection);
            }
            if pool.made < most {
                pool.made += 1;
                break;
            }
            pool = self
                .returned
                .wait(pool)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(pool);
        let opened = self.open_another().map_err(Error::into_lost);
        if opened.is_err() {
            lock(&self.pool).made -= 1;
            self.returned.notify_one();
        }
        opened
    }

    fn open_another(&self) -> Result<Connection> {
        let connection = Connection::open(
            &self.address,
            &self.contexts,
            self.certificates.as_deref(),
            self.silence,
        )?;
        let (expected, found) = (&self.export, connection.export());
        if (expected.size_bytes, expected.flags, &expected.contexts)
            != (found.size_bytes, found.flags, &found.contexts)
        {
            let text = format!(
                "connect to {} again: it is another export now, of {} bytes instead of {}",
                self.label, found.size_bytes, expected.size_bytes
            );
            return Err(Error::new(ErrorKind::Io, text));
        }
        Ok(connection)
    }

    fn give_back(&self, connection: Connection) {
        let mut pool = lock(&self.pool);
        let mut doubtful = Vec::new();
        if connection.is_broken() {
            // Those that wait have most likely lost the same server: who tries again gets a new one.
            doubtful = std::mem::take(&mut pool.idle);
            pool.made -= 1 + doubtful.len();
            if self.begun.load(Ordering::SeqCst) > self.durable.load(Ordering::SeqCst) {
                self.lost.store(true, Ordering::SeqCst);
            }
        } else {
            pool.idle.push(connection);
        }
        drop(pool);
        drop(doubtful);
        self.returned.notify_all();
    }
}

/// The meta context that tells of a bitmap.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for NbdDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NbdDevice")
            .field("label", &self.label)
            .field("export", &self.export)
            .finish_non_exhaustive()
    }
}

impl BlockSource for NbdDevice {
    fn label(&self) -> &str {
        &self.label
    }

    fn size_bytes(&self) -> u64 {
        self.export.size_bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.read_batch(&mut [ReadRequest { offset, buffer }])
    }

    fn read_batch(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        for request in &*requests {
            self.check_range("read", request.offset, request.buffer.len() as u64)?;
        }
        let aligned = |r: &ReadRequest<'_>| self.is_aligned(r.offset, r.buffer.len() as u64);
        if requests.iter().all(aligned) {
            return self.read_aligned(requests);
        }
        requests
            .iter_mut()
            .try_for_each(|request| self.read_around(request.offset, request.buffer))
    }

    fn preferred_depth(&self) -> usize {
        DEPTH
    }

    fn status_at(&self, offset: u64) -> Result<(Status, u64)> {
        let Some(context) = self.context(ALLOCATION) else {
            return Ok((Status::Data, self.export.size_bytes));
        };
        let found = |known: &Known| {
            let run = known.runs.partition_point(|(end, _)| *end <= offset);
            let run = known.runs.get(run).filter(|_| offset >= known.start);
            run.copied()
        };
        let mut known = lock(&self.known);
        let run = match known.as_ref().and_then(found) {
            Some(run) => run,
            None => {
                let runs = self.status(context, offset)?;
                let runs = runs
                    .into_iter()
                    .map(|(end, flags)| (end, flags & IS_ZERO != 0));
                let fresh = Known {
                    start: offset,
                    runs: runs.collect(),
                };
                let run = found(&fresh);
                *known = Some(fresh);
                run.unwrap_or((self.export.size_bytes, false))
            }
        };
        let status = if run.1 { Status::Zero } else { Status::Data };
        Ok((status, run.0))
    }

    /// The same for the same export, however it is reached; none of an image, which is a file like others.
    fn identity(&self) -> Result<Identity> {
        if self.program.is_some() {
            return Ok(Identity::unknown());
        }
        let name = self.address.absolute().disk().to_string();
        Ok(Identity::from_bytes(
            block_digest(name.as_bytes()).as_bytes(),
        ))
    }

    fn evidence(&self) -> Result<Evidence> {
        Ok(Evidence::unknown())
    }
}

impl BlockTarget for NbdDevice {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.write_batch(&[WriteRequest { offset, bytes }])
    }

    fn write_batch(&self, requests: &[WriteRequest<'_>]) -> Result<()> {
        for request in requests {
            self.check_range("write", request.offset, request.bytes.len() as u64)?;
        }
        let aligned = |r: &WriteRequest<'_>| self.is_aligned(r.offset, r.bytes.len() as u64);
        if requests.iter().all(aligned) {
            let _shared = self.units.read().unwrap_or_else(PoisonError::into_inner);
            return self.write_aligned(requests);
        }
        let _alone = self.units.write().unwrap_or_else(PoisonError::into_inner);
        for request in requests {
            let (start, bytes) = self.around(request.offset, request.bytes.len() as u64);
            let mut whole = vec![0; bytes];
            let read = ReadRequest {
                offset: start,
                buffer: &mut whole,
            };
            self.read_aligned(&mut [read])?;
            let from = usize::try_from(request.offset - start).unwrap_or(usize::MAX);
            whole[from..from + request.bytes.len()].copy_from_slice(request.bytes);
            let write = WriteRequest {
                offset: start,
                bytes: &whole,
            };
            self.write_aligned(&[write])?;
        }
        Ok(())
    }

    fn write_zeroes(&self, extent: Extent) -> Result<()> {
        self.check_range("write zeroes", extent.start(), extent.length())?;
        let can = self.export.can(flag::WRITE_ZEROES);
        if can && self.is_aligned(extent.start(), extent.length()) {
            let _shared = self.units.read().unwrap_or_else(PoisonError::into_inner);
            return self.zero(Command::WriteZeroesAllocated, extent);
        }
        let zeros = vec![0; 1 << 20];
        let mut offset = extent.start();
        while offset < extent.end() {
            let bytes = usize::try_from(extent.end() - offset).unwrap_or(usize::MAX);
            let bytes = bytes.min(zeros.len());
            self.write_at(offset, &zeros[..bytes])?;
            offset += bytes as u64;
        }
        Ok(())
    }

    fn punch(&self, extent: Extent) -> Result<bool> {
        self.check_range("punch", extent.start(), extent.length())?;
        let can = self.export.can(flag::WRITE_ZEROES);
        if !can || !self.is_aligned(extent.start(), extent.length()) {
            return Ok(false);
        }
        let _shared = self.units.read().unwrap_or_else(PoisonError::into_inner);
        self.zero(Command::WriteZeroes, extent).map(|()| true)
    }

    fn flush(&self) -> Result<()> {
        self.refuse_if_lost()?;
        let before = self.begun.load(Ordering::SeqCst);
        self.with_connection(|mut transfer| transfer.command(Command::Flush, 0, 0))?;
        // Lost meanwhile, it may have been before the flush.
        self.refuse_if_lost()?;
        self.durable.fetch_max(before, Ordering::SeqCst);
        Ok(())
    }

    /// The server's cache may answer: whether a flush was true, only the server knows.
    fn read_medium(&self, requests: &mut [ReadRequest<'_>]) -> Result<()> {
        self.read_batch(requests)
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        if size_bytes == self.export.size_bytes {
            return Ok(());
        }
        let text = format!(
            "resize {} from {} to {size_bytes} bytes: an export keeps its size",
            self.label, self.export.size_bytes
        );
        Err(Error::new(ErrorKind::Unsupported, text))
    }

    fn logical_block_bytes(&self) -> u32 {
        self.export.unit_bytes.clamp(512, 4096)
    }
}
