//! Conformance suites: what every [`BlockSource`], [`BlockTarget`] and [`StorageDir`] must do.
//!
//! Each suite checks the contracts of `blockferry_device` from outside and panics with the claim that does
//! not hold. Run them against devices of your own; ours all pass them.

use std::sync::Arc;

use blockferry_core::Extent;
use blockferry_device::{
    AlignedBuffer, BlockSource, BlockTarget, ErrorKind, ReadRequest, Status, StorageDir,
    StorageFile, WriteRequest,
};

use crate::Random;

/// Checks a source that holds exactly `expected`, at least one page, and does not change meanwhile.
///
/// # Panics
/// With the claim that does not hold.
pub fn source_conformance(source: &dyn BlockSource, expected: &[u8]) {
    assert!(expected.len() >= PAGE, "the suite needs at least one page");
    assert!(
        !source.label().is_empty(),
        "a source has a label for messages"
    );
    assert_eq!(
        source.size_bytes(),
        len64(expected),
        "the size is that of the content"
    );
    assert!(
        source.preferred_depth() >= 1,
        "at least one request is in flight"
    );
    reads_any_range(source, expected);
    refuses_ranges_past_the_end(source, expected);
    reads_batches_in_any_order(source, expected);
    serves_several_threads(source, expected);
    tells_the_truth_about_zeros(source, expected);
    assert_eq!(
        (
            source.identity().expect("identity"),
            source.evidence().expect("evidence")
        ),
        (
            source.identity().expect("identity"),
            source.evidence().expect("evidence")
        ),
        "identity and evidence of an unchanged source do not change"
    );
}

/// Checks a target. `make` gives a fresh one each time, of at least 1 MiB, with any content.
///
/// # Panics
/// With the claim that does not hold.
pub fn target_conformance(make: &dyn Fn() -> Arc<dyn BlockTarget>) {
    behaves_like_a_byte_array(&*make());
    never_writes_beside_a_refused_range(&*make());
    changes_its_evidence_when_written(&*make());
    reserves_without_changing_content(&*make());
    let target = make();
    behaves_like_a_byte_array_at_its_end(&*target);
    source_conformance(&*target, &content(&*target));
}

/// Checks a directory. It must be empty, and holds nothing new afterwards but a lock file.
///
/// # Panics
/// With the claim that does not hold.
pub fn storage_conformance(directory: &dyn StorageDir) {
    assert!(
        !directory.label().is_empty(),
        "a directory has a label for messages"
    );
    assert_eq!(
        names(directory),
        [""; 0],
        "the suite begins with an empty directory"
    );
    creates_and_finds_files(directory);
    refuses_paths_as_names(directory);
    renames_without_replacing(directory);
    exchanges_names_not_files(directory);
    grows_files_and_gives_them_identity(directory);
    clones_or_says_that_it_cannot(directory);
    locks_out_everybody_else(directory);
    assert!(
        directory.available_bytes().expect("free space") > 0,
        "there is space"
    );
}

const PAGE: usize = 4096;

fn reads_any_range(source: &dyn BlockSource, expected: &[u8]) {
    let size = expected.len();
    let offsets = [
        0,
        1,
        511,
        512,
        PAGE - 1,
        PAGE,
        size / 2,
        size - PAGE,
        size - 1,
        size,
    ];
    let lengths = [
        0,
        1,
        511,
        512,
        513,
        PAGE - 1,
        PAGE,
        PAGE + 1,
        3 * PAGE,
        100_000,
        size,
    ];
    let mut aligned = AlignedBuffer::zeroed(size.next_multiple_of(PAGE) + PAGE);
    for offset in offsets {
        for length in lengths.map(|length| length.min(size - offset)) {
            for shift in [0, 1] {
                let buffer = &mut aligned[shift..shift + length];
                buffer.fill(0x5A);
                source.read_at(offset as u64, buffer).unwrap_or_else(|e| {
                    panic!("a read of {length} bytes at {offset} succeeds: {e}");
                });
                assert!(
                    buffer == &expected[offset..offset + length],
                    "a read of {length} bytes at {offset} gives the content"
                );
            }
        }
    }
}

fn refuses_ranges_past_the_end(source: &dyn BlockSource, expected: &[u8]) {
    let size = len64(expected);
    for (offset, length) in [
        (size, 1),
        (size - 1, 2),
        (size + 4096, 1),
        (size - 4096, 8192),
    ] {
        let read = source.read_at(offset, &mut vec![0; length]);
        let refused = read.expect_err("a read past the end is an error, never a short read");
        assert_eq!(
            refused.kind(),
            ErrorKind::OutOfRange,
            "a read past the end: {refused}"
        );
    }
}

fn reads_batches_in_any_order(source: &dyn BlockSource, expected: &[u8]) {
    read_pieces(expected, |requests| source.read_batch(requests), "a batch");
    source.read_batch(&mut []).expect("an empty batch succeeds");
}

/// Reads many pieces, ascending and descending, apart, touching and of odd lengths, in one batch.
fn read_pieces(
    expected: &[u8],
    read: impl Fn(&mut [ReadRequest<'_>]) -> blockferry_device::Result<()>,
    what: &str,
) {
    let mut random = Cases::new(3);
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < expected.len() {
        let length = random.below(4 * PAGE).min(expected.len() - at);
        ranges.push((at, length));
        at += length + random.below(3) * random.below(20 * PAGE);
    }
    let middle = ranges.len() / 2;
    ranges[middle..].reverse();
    let mut buffers: Vec<Vec<u8>> = ranges.iter().map(|&(_, length)| vec![0; length]).collect();
    let mut requests: Vec<_> = ranges
        .iter()
        .zip(&mut buffers)
        .map(|(&(offset, _), buffer)| ReadRequest {
            offset: offset as u64,
            buffer,
        })
        .collect();

    read(&mut requests).unwrap_or_else(|e| panic!("{what} of reads succeeds: {e}"));

    for ((offset, length), buffer) in ranges.into_iter().zip(buffers) {
        assert!(
            buffer == expected[offset..offset + length],
            "{what} reads the content at {offset}"
        );
    }
}

fn serves_several_threads(source: &dyn BlockSource, expected: &[u8]) {
    std::thread::scope(|scope| {
        for seed in 0..4 {
            scope.spawn(move || {
                let mut random = Cases::new(seed);
                for _ in 0..20 {
                    let (offset, length) = random.range(expected.len());
                    let mut buffer = vec![0; length];
                    source
                        .read_at(offset as u64, &mut buffer)
                        .expect("a concurrent read succeeds");
                    assert!(
                        buffer == expected[offset..offset + length],
                        "concurrent reads do not disturb each other"
                    );
                }
            });
        }
    });
}

fn tells_the_truth_about_zeros(source: &dyn BlockSource, expected: &[u8]) {
    let size = len64(expected);
    let mut at = 0;
    while at < size {
        let (status, end) = source.status_at(at).expect("status");
        assert!(
            at < end && end <= size,
            "a run at {at} ends behind it and within, not at {end}"
        );
        let bytes = &expected[to_usize(at)..to_usize(end)];
        assert!(
            status == Status::Data || bytes.iter().all(|&b| b == 0),
            "what is said to be zero from {at} to {end} is zero"
        );
        at = end;
    }
}

/// The oracle: whatever is done to the target, it reads like the same done to a vector.
fn behaves_like_a_byte_array(target: &dyn BlockTarget) {
    let mut model = content(target);
    let mut random = Cases::new(1);
    assert!(
        model.len() >= 1 << 20,
        "the suite needs a target of at least 1 MiB"
    );
    for step in 0..150 {
        match random.below(8) {
            0..3 => write_once(target, &mut model, &mut random),
            3..5 => write_many(target, &mut model, &mut random),
            5 => zero_once(target, &mut model, &mut random),
            6 => punch_once(target, &mut model, &mut random),
            _ => {
                target.flush().expect("flush");
                read_pieces(&model, |r| target.read_medium(r), "the medium's batch");
            }
        }
        if step % 10 == 9 {
            assert!(
                content(target) == model,
                "after step {step} the target reads like its model"
            );
        }
    }
    target.flush().expect("flush");
    target.drop_cache();
    assert!(
        content(target) == model,
        "what was flushed is there without the cache"
    );
}

fn write_once(target: &dyn BlockTarget, model: &mut [u8], random: &mut Cases) {
    let (offset, length) = random.range(model.len());
    let bytes = random.bytes(length);
    target.write_at(offset as u64, &bytes).expect("write");
    model[offset..offset + length].copy_from_slice(&bytes);
}

fn write_many(target: &dyn BlockTarget, model: &mut [u8], random: &mut Cases) {
    let mut pieces = Vec::new();
    let mut at = random.below(16) * PAGE;
    while at < model.len() && pieces.len() < 200 {
        let whole_pages = (1 + random.below(4)) * PAGE;
        let length = if random.below(4) == 0 {
            random.below(9000)
        } else {
            whole_pages
        };
        let length = length.min(model.len() - at);
        pieces.push((at, random.bytes(length)));
        // Often touching, otherwise apart.
        at += length + random.below(2) * random.below(10) * PAGE;
    }
    let middle = pieces.len() / 2;
    pieces[middle..].reverse();
    let requests: Vec<_> = pieces
        .iter()
        .map(|(offset, bytes)| WriteRequest {
            offset: *offset as u64,
            bytes,
        })
        .collect();
    target.write_batch(&requests).expect("batch of writes");
    for (offset, bytes) in &pieces {
        model[*offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

fn zero_once(target: &dyn BlockTarget, model: &mut [u8], random: &mut Cases) {
    let (offset, length) = random.range(model.len());
    target
        .write_zeroes(extent(offset, length))
        .expect("write of zeros");
    model[offset..offset + length].fill(0);
}

fn punch_once(target: &dyn BlockTarget, model: &mut [u8], random: &mut Cases) {
    let (offset, length) = random.range(model.len());
    if target.punch(extent(offset, length)).expect("punch") {
        model[offset..offset + length].fill(0);
    }
}

fn behaves_like_a_byte_array_at_its_end(target: &dyn BlockTarget) {
    let size = target.size_bytes();
    for length in [1, 512, 4096, 5000] {
        let bytes = Cases::new(length).bytes(to_usize(length));
        target
            .write_at(size - length, &bytes)
            .expect("a write up to the end succeeds");
        let mut back = vec![0; bytes.len()];
        target
            .read_at(size - length, &mut back)
            .expect("a read up to the end succeeds");
        assert!(back == bytes, "the last {length} bytes read as written");
        assert_eq!(
            target.size_bytes(),
            size,
            "a write up to the end does not change the size"
        );
    }
    target.resize(size).expect("every target can keep its size");
}

fn never_writes_beside_a_refused_range(target: &dyn BlockTarget) {
    let before = content(target);
    let size = target.size_bytes();
    match target.write_at(size - 100, &[7; 200]) {
        Ok(()) => {
            assert_eq!(
                target.size_bytes(),
                size + 100,
                "a target that takes it has grown by it"
            );
            target
                .resize(size)
                .expect("a target that grows also shrinks");
        }
        Err(refused) => {
            assert_eq!(
                refused.kind(),
                ErrorKind::OutOfRange,
                "a write past the end: {refused}"
            );
            assert_eq!(
                target.size_bytes(),
                size,
                "a refused write does not change the size"
            );
        }
    }
    let whole = to_usize(size) - 100;
    assert!(
        content(target)[..whole] == before[..whole],
        "bytes beside the range are unchanged"
    );
}

fn changes_its_evidence_when_written(target: &dyn BlockTarget) {
    target.write_at(0, &[1; PAGE]).expect("write");
    target.flush().expect("flush");
    let before = target.evidence().expect("evidence");
    target.write_at(0, &[2; PAGE]).expect("write");
    target.flush().expect("flush");
    let after = target.evidence().expect("evidence");
    assert!(
        !before.proves_same(&after),
        "evidence never claims that a written target is unwritten"
    );
    let identity = target.identity().expect("identity");
    assert_eq!(
        identity,
        target.identity().expect("identity"),
        "writing keeps the identity"
    );
}

fn reserves_without_changing_content(target: &dyn BlockTarget) {
    let size = target.size_bytes();
    let punched = target.punch(extent(65536, 262_144)).expect("punch");
    let before = content(target);
    let extents = [extent(0, 131_072), extent(196_608, 524_288)];

    let newly = target.reserve(&extents).expect("reservation");

    assert!(content(target) == before, "reserving changes no content");
    assert_eq!(
        target.size_bytes(),
        size,
        "reserving does not change the size"
    );
    for run in &newly {
        let inside = extents
            .iter()
            .any(|e| e.start() <= run.start() && run.end() <= e.end());
        assert!(inside, "only what was asked for is reserved, not {run}");
    }
    let again = target.reserve(&extents).expect("reservation");
    // Where written and reserved space look alike, the answer may be the same again, but never more.
    let known = |run: &Extent| {
        newly
            .iter()
            .any(|n| n.start() <= run.start() && run.end() <= n.end())
    };
    assert!(
        again.iter().all(known),
        "what is reserved is not reserved again"
    );
    for run in newly {
        assert!(
            target.punch(run).expect("punch") || !punched,
            "a reservation can be given back"
        );
    }
    assert!(
        content(target) == before,
        "giving a reservation back changes no content"
    );
}

fn creates_and_finds_files(directory: &dyn StorageDir) {
    assert!(
        directory.open("one").expect("open").is_none(),
        "an absent file opens as none"
    );
    let file = directory.create("one").expect("create");
    assert_eq!(file.size_bytes(), 0, "a new file is empty");
    let again = directory
        .create("one")
        .expect_err("creating an existing file fails");
    assert_eq!(again.kind(), ErrorKind::AlreadyExists, "{again}");
    file.write_at(0, b"first").expect("write");
    file.flush().expect("flush");
    drop(directory.create("b").expect("create"));
    drop(directory.create("a").expect("create"));
    directory.sync().expect("sync");

    assert_eq!(
        names(directory),
        ["a", "b", "one"],
        "names are complete and sorted"
    );
    assert_eq!(
        content(&*open(directory, "one")),
        b"first",
        "an opened file holds what was written"
    );
    for name in ["a", "b", "one"] {
        directory.remove(name).expect("remove");
        directory
            .remove(name)
            .expect("removing what is not there succeeds");
    }
    assert_eq!(
        content(&*file),
        b"first",
        "a removed file lives on in its handles"
    );
    assert_eq!(names(directory), [""; 0], "removed files are gone");
}

fn refuses_paths_as_names(directory: &dyn StorageDir) {
    for name in ["", ".", "..", "a/b", "/a", "../a"] {
        let outcome = directory.create(name).map(|_| ());
        outcome.expect_err("a name that is not a single path component is refused");
    }
}

fn renames_without_replacing(directory: &dyn StorageDir) {
    put(directory, "from", b"moved");
    put(directory, "taken", b"stays");

    let refused = directory
        .rename_new("from", "taken")
        .expect_err("renaming replaces nothing");
    directory
        .rename_new("from", "to")
        .expect("renaming to a free name");
    directory.sync().expect("sync");

    assert_eq!(refused.kind(), ErrorKind::AlreadyExists, "{refused}");
    assert_eq!(
        names(directory),
        ["taken", "to"],
        "the old name is gone, the new one there"
    );
    assert_eq!(
        content(&*open(directory, "to")),
        b"moved",
        "renaming keeps the content"
    );
    assert_eq!(
        content(&*open(directory, "taken")),
        b"stays",
        "the taken name keeps its file"
    );
    clear(directory);
}

fn exchanges_names_not_files(directory: &dyn StorageDir) {
    put(directory, "old", b"old point");
    put(directory, "new", b"new point");
    let (old, new) = (id(directory, "old"), id(directory, "new"));
    let supported = tells_whether_it_exchanges(directory);
    match directory.exchange("old", "new") {
        Ok(()) => {
            assert!(supported, "a directory that exchanges names says so");
            directory.sync().expect("sync");
            assert_eq!(id(directory, "old"), new, "file ids go with the files");
            assert_eq!(id(directory, "new"), old, "file ids go with the files");
            assert_eq!(
                content(&*open(directory, "old")),
                b"new point",
                "contents swap names"
            );
        }
        Err(refused) => {
            assert!(!supported, "a directory that says so exchanges names");
            assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
        }
    }
    directory
        .exchange("old", "absent")
        .expect_err("exchanging with an absent name fails");
    clear(directory);
}

fn tells_whether_it_exchanges(directory: &dyn StorageDir) -> bool {
    let before = names(directory);
    for taken in [["old", "scratch"], ["scratch", "old"]] {
        let refused = directory
            .supports_exchange(taken)
            .expect_err("a file that is there is never tried on");
        assert_eq!(refused.kind(), ErrorKind::AlreadyExists, "{refused}");
        assert_eq!(names(directory), before, "nor is anything left or removed");
    }
    let tried = directory.supports_exchange(["one scratch", "other scratch"]);
    assert_eq!(names(directory), before, "what was tried on is gone");
    tried.expect("trying an exchange works whether or not that does")
}

fn grows_files_and_gives_them_identity(directory: &dyn StorageDir) {
    let file = directory.create("grows").expect("create");
    file.write_at(10_000, &[9; 100])
        .expect("writing past the end of a storage file");
    assert_eq!(
        file.size_bytes(),
        10_100,
        "a storage file grows when written past its end"
    );
    let mut expected = vec![0; 10_100];
    expected[10_000..].fill(9);
    assert!(
        content(&*file) == expected,
        "what lies between reads as zeros"
    );

    let twin = open(directory, "grows");
    put(directory, "other", b"");
    assert_eq!(
        file.file_id().expect("id"),
        twin.file_id().expect("id"),
        "handles share the id"
    );
    assert_ne!(
        id(directory, "grows"),
        id(directory, "other"),
        "files differ in their ids"
    );
    twin.resize(5000).expect("resize");
    assert!(
        content(&*file) == expected[..5000],
        "both handles see the new size"
    );
    file.resize(8192).expect("resize");
    assert!(
        content(&*twin)[5000..].iter().all(|&b| b == 0),
        "what is added reads as zeros"
    );
    source_conformance(&*file, &content(&*twin));
    clear(directory);
}

fn clones_or_says_that_it_cannot(directory: &dyn StorageDir) {
    let origin = directory.create("origin").expect("create");
    let bytes = Cases::new(5).bytes(300_000);
    origin.write_at(0, &bytes).expect("write");
    origin.flush().expect("flush");
    let copy = directory.create("copy").expect("create");
    match copy.clone_from_file(&*origin) {
        Ok(()) => {
            assert!(content(&*copy) == bytes, "a clone reads like its origin");
            copy.write_at(0, &[0xEE; PAGE]).expect("write");
            assert!(
                content(&*origin) == bytes,
                "writing a clone leaves its origin alone"
            );
        }
        Err(refused) => assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}"),
    }
    if let Err(refused) = copy.copy_metadata(&*origin) {
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
    }
    clear(directory);
}

fn locks_out_everybody_else(directory: &dyn StorageDir) {
    let held = directory.lock("lock").expect("lock");
    let refused = directory
        .lock("lock")
        .expect_err("a held lock cannot be taken again");
    assert_eq!(refused.kind(), ErrorKind::Busy, "{refused}");
    assert!(
        refused.to_string().contains("lock"),
        "the error names the lock: {refused}"
    );
    drop(held);
    drop(
        directory
            .lock("lock")
            .expect("a released lock can be taken"),
    );
}

fn content(device: &(impl BlockSource + ?Sized)) -> Vec<u8> {
    let mut bytes = vec![0; to_usize(device.size_bytes())];
    device
        .read_at(0, &mut bytes)
        .expect("a read of everything succeeds");
    bytes
}

fn put(directory: &dyn StorageDir, name: &str, bytes: &[u8]) {
    let file = directory.create(name).expect("create");
    file.write_at(0, bytes).expect("write");
    file.flush().expect("flush");
}

fn open(directory: &dyn StorageDir, name: &str) -> Arc<dyn StorageFile> {
    directory
        .open(name)
        .expect("open")
        .expect("the file is there")
}

fn id(directory: &dyn StorageDir, name: &str) -> u64 {
    open(directory, name).file_id().expect("file id")
}

fn names(directory: &dyn StorageDir) -> Vec<String> {
    directory.names().expect("names")
}

fn clear(directory: &dyn StorageDir) {
    for name in names(directory) {
        directory.remove(&name).expect("remove");
    }
}

fn extent(offset: usize, length: usize) -> Extent {
    Extent::new(offset as u64, length as u64).expect("within the device")
}

fn len64(bytes: &[u8]) -> u64 {
    bytes.len() as u64
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("test devices fit into memory")
}

/// Repeatable cases; the seeds are constants, so every run is the same.
struct Cases(Random);

impl Cases {
    fn new(seed: u64) -> Self {
        Self(Random::new(seed))
    }

    /// Less than `limit`, or 0.
    fn below(&mut self, limit: usize) -> usize {
        to_usize(self.0.below(limit as u64))
    }

    /// A range within `size` bytes: mostly whole pages, sometimes not.
    fn range(&mut self, size: usize) -> (usize, usize) {
        let unit = [PAGE, PAGE, 512, 1][self.below(4)];
        let offset = self.below(size) / unit * unit;
        let longest = [2 * PAGE, 40 * PAGE, size][self.below(3)];
        let length = (self.below(longest) / unit * unit).min(size - offset);
        (offset, length)
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.0.fill(&mut bytes);
        bytes
    }
}
