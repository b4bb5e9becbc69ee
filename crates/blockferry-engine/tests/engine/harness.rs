//! A machine with a target and its state, a source whose reads are watched, and what every sync must leave behind.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use blockferry_core::{BlockSize, Extent, PAGE_BYTES, Root};
use blockferry_device::{
    BlockSource, CancelToken, Error as DeviceError, ErrorKind as DeviceErrorKind, Evidence,
    Identity, Result as DeviceResult, Status, StorageDir,
};
use blockferry_engine::{
    Context, Place, Receipt, Result, SyncOptions, Target, digest, rollback, sync, verify_target,
};
use blockferry_pipeline::Event;
use blockferry_testkit::{OperationKind, Random, SimDisk, SimOptions};

/// Where the target is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum On {
    File,
    Device,
}

/// A simulated machine with one target.
pub(crate) struct Machine {
    pub(crate) disk: SimDisk,
    on: On,
    device_bytes: u64,
}

impl Machine {
    /// A target that holds `old`; without it an absent file.
    pub(crate) fn new(on: On, clones: bool, old: Option<&[u8]>) -> Self {
        let options = SimOptions {
            clones,
            ..SimOptions::default()
        };
        let disk = SimDisk::new(options);
        let mut device_bytes = 0;
        match (on, old) {
            (On::File, Some(old)) => disk.install_sparse("home", "disk", old),
            (On::File, None) => drop(disk.dir("home")),
            (On::Device, old) => {
                let old = old.unwrap_or_default();
                device_bytes = old.len() as u64;
                disk.install_device("vda", old);
            }
        }
        drop(disk.dir("state"));
        Self {
            disk,
            on,
            device_bytes,
        }
    }

    /// A file on a file system that can exchange no names.
    pub(crate) fn without_exchange(old: &[u8]) -> Self {
        let options = SimOptions {
            exchanges: false,
            ..SimOptions::default()
        };
        let disk = SimDisk::new(options);
        disk.install_sparse("home", "disk", old);
        drop(disk.dir("state"));
        Self::on(&disk)
    }

    /// On a disk that exists, with a file as its target.
    pub(crate) fn on(disk: &SimDisk) -> Self {
        Self {
            disk: disk.clone(),
            on: On::File,
            device_bytes: 0,
        }
    }

    pub(crate) fn file(old: &[u8]) -> Self {
        Self::new(On::File, false, Some(old))
    }

    pub(crate) fn place(&self) -> Place {
        match self.on {
            On::File => Place::File {
                dir: self.disk.dir("home"),
                name: "disk".to_owned(),
            },
            On::Device => Place::Device(self.disk.device("vda", self.device_bytes)),
        }
    }

    pub(crate) fn state(&self) -> Arc<dyn StorageDir> {
        self.disk.dir("state")
    }

    pub(crate) fn open(&self) -> Target {
        Target::from_parts(self.place(), self.state()).unwrap()
    }

    pub(crate) fn sync(&self, source: &Arc<Source>, options: &SyncOptions) -> Result<Receipt> {
        self.sync_in(source, options, &Context::default())
    }

    pub(crate) fn sync_in(
        &self,
        source: &Arc<Source>,
        options: &SyncOptions,
        context: &Context,
    ) -> Result<Receipt> {
        let context = source.counting_from_the_decision(context);
        let source: Arc<dyn BlockSource> = Arc::<Source>::clone(source);
        sync(source, &mut self.open(), options, &context)
    }

    pub(crate) fn content(&self) -> Option<Vec<u8>> {
        let path = match self.on {
            On::File => "home/disk",
            On::Device => "vda",
        };
        self.disk.content(path)
    }

    /// Writes to the target as somebody else would.
    pub(crate) fn scribble(&self, offset: u64, bytes: &[u8]) {
        let target = self.open().replica().target().unwrap();
        target.write_at(offset, bytes).unwrap();
        target.flush().unwrap();
    }

    /// The saved manifest of the point with this id.
    pub(crate) fn manifest(&self, point: &str) -> Option<Vec<u8>> {
        self.disk.content(&format!("state/{point}.manifest"))
    }

    /// Operations that change something, done while `act` ran.
    pub(crate) fn changes(&self, act: impl FnOnce()) -> Vec<String> {
        self.disk.record();
        act();
        let operations = self.disk.take_trace();
        let operations = operations.into_iter().filter_map(|b| b.operation);
        operations
            .filter(|o| !matches!(o.kind, OperationKind::Flush | OperationKind::SyncDirectory))
            .map(|o| o.to_string())
            .collect()
    }
}

/// A source in memory whose reads are recorded and can be made to fail, or to do something.
pub(crate) struct Source {
    bytes: RwLock<Vec<u8>>,
    version: AtomicU64,
    /// Whether it tells where its holes are.
    tells_holes: AtomicBool,
    /// Whether it gives identity and evidence.
    is_known: bool,
    reads: Mutex<Vec<Extent>>,
    hook: Mutex<Option<Hook>>,
    /// How much was read to choose, once the choice is made.
    sampled_bytes: Mutex<Option<u64>>,
}

/// Called before every read of a scan with its number, from 1; an error fails the read. What is read to choose mode
/// and strategy is left alone and not counted: how much that is depends on the case.
type Hook = Box<dyn FnMut(u64) -> DeviceResult<()> + Send>;

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Source")
    }
}

impl Source {
    pub(crate) fn new(bytes: impl Into<Vec<u8>>) -> Arc<Self> {
        Arc::new(Self::of(bytes.into(), true))
    }

    /// Nothing proves that it did not change.
    pub(crate) fn anonymous(bytes: impl Into<Vec<u8>>) -> Arc<Self> {
        Arc::new(Self::of(bytes.into(), false))
    }

    fn of(bytes: Vec<u8>, is_known: bool) -> Self {
        Self {
            bytes: RwLock::new(bytes),
            version: AtomicU64::new(0),
            tells_holes: AtomicBool::new(true),
            is_known,
            reads: Mutex::default(),
            hook: Mutex::default(),
            sampled_bytes: Mutex::default(),
        }
    }

    /// The context of a run in which reads are counted, and can fail, once mode and strategy are chosen.
    pub(crate) fn counting_from_the_decision(self: &Arc<Self>, context: &Context) -> Context {
        *self.sampled_bytes.lock().unwrap() = None;
        self.take_reads();
        let (source, inner) = (Arc::clone(self), Arc::clone(&context.observer));
        let mut counting = context.clone();
        counting.observer = Arc::new(move |event: &Event| {
            if let Event::Decision(_) = event {
                let sampled = source.take_read_bytes();
                *source.sampled_bytes.lock().unwrap() = Some(sampled);
            }
            inner.event(event);
        });
        counting
    }

    /// Reads count, and can fail, from now on.
    pub(crate) fn count_from_now(&self) {
        *self.sampled_bytes.lock().unwrap() = Some(0);
        self.take_reads();
    }

    /// Another version from now on, of the same bytes.
    pub(crate) fn bump(&self) {
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    /// Bytes read by the last run to choose mode and strategy; nothing if it had nothing to choose.
    pub(crate) fn sampled_bytes(&self) -> Option<u64> {
        *self.sampled_bytes.lock().unwrap()
    }

    pub(crate) fn hide_holes(&self) {
        self.tells_holes.store(false, Ordering::SeqCst);
    }

    pub(crate) fn show_holes(&self) {
        self.tells_holes.store(true, Ordering::SeqCst);
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.bytes.read().unwrap().clone()
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Vec<u8>)) {
        change(&mut self.bytes.write().unwrap());
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    /// Bytes read since the last call.
    pub(crate) fn take_read_bytes(&self) -> u64 {
        self.take_reads().iter().map(|e| e.length()).sum()
    }

    /// Extents read since the last call.
    pub(crate) fn take_reads(&self) -> Vec<Extent> {
        std::mem::take(&mut self.reads.lock().unwrap())
    }

    pub(crate) fn on_read(&self, hook: impl FnMut(u64) -> DeviceResult<()> + Send + 'static) {
        self.take_reads();
        *self.hook.lock().unwrap() = Some(Box::new(hook));
    }

    pub(crate) fn fail_from(&self, first: u64) {
        self.on_read(move |n| if n >= first { Err(failure()) } else { Ok(()) });
    }

    pub(crate) fn heal(&self) {
        *self.hook.lock().unwrap() = None;
    }
}

pub(crate) fn failure() -> DeviceError {
    DeviceError::new(DeviceErrorKind::Io, "injected read error")
}

impl BlockSource for Source {
    fn label(&self) -> &'static str {
        "source"
    }

    fn size_bytes(&self) -> u64 {
        self.bytes.read().unwrap().len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> DeviceResult<()> {
        let number = {
            let mut reads = self.reads.lock().unwrap();
            reads.push(Extent::from_range(offset..offset + buffer.len() as u64));
            reads.len() as u64
        };
        let is_scan = self.sampled_bytes.lock().unwrap().is_some();
        if let Some(hook) = self.hook.lock().unwrap().as_mut().filter(|_| is_scan) {
            hook(number)?;
        }
        let bytes = self.bytes.read().unwrap();
        let start = usize::try_from(offset).unwrap();
        let found = bytes.get(start..start + buffer.len());
        let past = || DeviceError::new(DeviceErrorKind::OutOfRange, "read past the end");
        buffer.copy_from_slice(found.ok_or_else(past)?);
        Ok(())
    }

    fn status_at(&self, offset: u64) -> DeviceResult<(Status, u64)> {
        let bytes = self.bytes.read().unwrap();
        let size = bytes.len() as u64;
        if !self.tells_holes.load(Ordering::SeqCst) {
            return Ok((Status::Data, size));
        }
        let start = offset - offset % PAGE_BYTES;
        let pages = bytes[usize::try_from(start).unwrap()..].chunks(4096);
        let mut zero = pages.map(|p| p.iter().all(|b| *b == 0));
        let first = zero.next().unwrap();
        let same = zero.take_while(|z| *z == first).count() as u64;
        let status = if first { Status::Zero } else { Status::Data };
        Ok((status, size.min(start + (1 + same) * PAGE_BYTES)))
    }

    fn identity(&self) -> DeviceResult<Identity> {
        let known = Identity::from_bytes(b"the source");
        Ok(if self.is_known {
            known
        } else {
            Identity::unknown()
        })
    }

    fn evidence(&self) -> DeviceResult<Evidence> {
        if !self.is_known {
            return Ok(Evidence::unknown());
        }
        let version = self.version.load(Ordering::SeqCst);
        let mut bytes = version.to_le_bytes().to_vec();
        bytes.extend(self.size_bytes().to_le_bytes());
        Ok(Evidence::from_bytes(&bytes))
    }
}

/// Every claim a completed sync makes is checked against the bytes themselves.
pub(crate) fn assert_synced(
    machine: &Machine,
    new: &[u8],
    block_size: BlockSize,
    receipt: &Receipt,
) {
    let content = machine.content().expect("the target is there");
    assert_eq!(first_difference(&content, new), None, "target and source");
    if machine.on == On::File {
        assert_eq!(content.len(), new.len(), "size of the target");
    }
    let expected = root_of(new, block_size);
    assert_eq!(receipt.source_root, expected, "source root");
    assert_eq!(receipt.target_root, expected, "target root");
    assert_eq!(receipt.restaged_bytes, 0, "durable bytes staged again");
    assert_eq!(
        machine
            .manifest(&receipt.sync_point)
            .expect("the manifest is saved"),
        manifest_of(new, block_size),
        "saved manifest"
    );
    let report = verify_target(&mut machine.open(), &Context::default()).unwrap();
    assert!(report.matches, "verify: {report:?}");
    assert!(
        machine.disk.misuses().is_empty(),
        "{:?}",
        machine.disk.misuses()
    );
}

/// The same sync again: nothing differs, and nothing is written.
pub(crate) fn assert_second_is_identical(
    machine: &Machine,
    source: &Arc<Source>,
    options: &SyncOptions,
) {
    let point = machine.open().replica().point().map(|p| p.id.to_string());
    let mut outcome = None;

    let changes = machine.changes(|| outcome = Some(machine.sync(source, options).unwrap()));

    let receipt = outcome.unwrap();
    assert_eq!(receipt.outcome, "identical");
    assert_eq!((receipt.staged_bytes, receipt.log_bytes), (0, 0));
    assert_eq!(Some(receipt.sync_point), point);
    let changes: Vec<String> = changes
        .into_iter()
        .filter(|c| !c.contains("state/state"))
        .collect();
    assert_eq!(
        changes,
        Vec::<String>::new(),
        "an identical pair writes nothing"
    );
}

/// Rolling back returns the old bytes.
pub(crate) fn assert_rolls_back_to(machine: &Machine, old: &[u8]) {
    rollback(&mut machine.open(), &Context::default()).unwrap();
    let content = machine.content().unwrap();
    assert_eq!(first_difference(&content, old), None, "rolled back target");
    assert_eq!(content.len(), old.len(), "size after rolling back");
}

/// Offset of the first byte in which the first of them differs from the second; `None` if it begins with it.
pub(crate) fn first_difference(found: &[u8], expected: &[u8]) -> Option<usize> {
    let differs = found.iter().zip(expected).position(|(a, b)| a != b);
    differs.or((found.len() < expected.len()).then_some(found.len()))
}

pub(crate) fn root_of(bytes: &[u8], block_size: BlockSize) -> String {
    Root::of_bytes(bytes, block_size).to_string()
}

/// A manifest digested afresh.
pub(crate) fn manifest_of(bytes: &[u8], block_size: BlockSize) -> Vec<u8> {
    let source: Arc<dyn BlockSource> = Source::new(bytes);
    let mut manifest = Vec::new();
    digest(
        &source,
        block_size,
        &Context::default(),
        Some(&mut manifest),
    )
    .unwrap();
    manifest
}

pub(crate) fn block_size(bytes: u64) -> BlockSize {
    BlockSize::new(bytes).unwrap()
}

/// One of them.
pub(crate) fn one_of<T: Clone>(random: &mut Random, all: &[T]) -> T {
    let number = random.below(all.len() as u64);
    all[usize::try_from(number).unwrap()].clone()
}

/// Noise with runs of zeros in it.
pub(crate) fn image(seed: u64, bytes: u64) -> Vec<u8> {
    blockferry_testkit::images::sparse_image(seed, bytes, 0.7)
}

/// `old` grown or shrunk to `bytes`, with some pages changed, some zeroed, some filled.
pub(crate) fn edited(seed: u64, old: &[u8], bytes: u64, per_mille: u64) -> Vec<u8> {
    let mut random = Random::part(seed, 7);
    let mut new = old.to_vec();
    new.resize(usize::try_from(bytes).unwrap(), 0);
    for page in new.chunks_mut(4096) {
        if !random.chance(per_mille, 1000) {
            continue;
        }
        match random.below(4) {
            0 => page.fill(0),
            1 => random.fill(page),
            _ => {
                let at = usize::try_from(random.below(page.len() as u64)).unwrap();
                page[at] ^= 0x55;
            }
        }
    }
    new
}

/// Options with these fields.
pub(crate) fn options(change: impl FnOnce(&mut SyncOptions)) -> SyncOptions {
    let mut options = SyncOptions::default();
    options.allow_shrink = true;
    options.threads = Some(2);
    change(&mut options);
    options
}

/// Collects events; the list can be read while the context is used.
pub(crate) fn listening() -> (Context, Arc<Mutex<Vec<Event>>>) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&events);
    let context =
        Context::new().with_observer(move |event: &Event| sink.lock().unwrap().push(event.clone()));
    (context, events)
}

pub(crate) fn warnings(events: &Mutex<Vec<Event>>) -> Vec<String> {
    let events = events.lock().unwrap();
    let code = |e: &Event| match e {
        Event::Warning { code, .. } => Some(code.to_string()),
        _ => None,
    };
    events.iter().filter_map(code).collect()
}

/// What was said of older points that went with a commit.
pub(crate) fn accepted(events: &Mutex<Vec<Event>>) -> Vec<String> {
    let events = events.lock().unwrap();
    let told = |e: &Event| match e {
        Event::Accepted(text) => Some(text.clone()),
        _ => None,
    };
    events.iter().filter_map(told).collect()
}

/// A context with this token.
pub(crate) fn cancelled_by(token: &CancelToken) -> Context {
    let mut context = Context::default();
    context.cancel = token.clone();
    context
}
