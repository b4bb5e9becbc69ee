//! What the end-to-end tests share: a directory with disks, the real command run on them, and its answers.

mod nbd;
mod places;
mod run;
mod traced;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use blockferry_testkit::{Random, images};

pub(crate) use nbd::{EXPORT, NbdServer, Nbdkit};
pub(crate) use places::{LoopDevice, MountedFileSystem, skipped};
pub(crate) use run::{
    Answer, Child, command, command_of, output, tool, while_starting, with_files,
};
pub(crate) use traced::{Position, all_positions, some_positions};

pub(crate) const MIB: u64 = 1 << 20;

/// A directory on a disk, with a state root of its own; gone when dropped.
pub(crate) struct Lab {
    directory: tempfile::TempDir,
}

impl Lab {
    pub(crate) fn new() -> Self {
        // Built before anything is timed.
        run::binary();
        // Not in /tmp, which may be a tmpfs: a state there is refused.
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        Self { directory }
    }

    pub(crate) fn root(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs `blockferry LINE --json` in the directory.
    pub(crate) fn run(&self, line: &str) -> Answer {
        run::answer(self.command(line).arg("--json"))
    }

    /// Runs where no file may be written beyond `bytes`, or half of that: such a write fails, as on a full disk.
    pub(crate) fn run_with_small_files(&self, bytes: u64, line: &str) -> Answer {
        let run = self.command(line);
        let mut shell = command_of(self.root(), "sh");
        // Some shells count in blocks of 1,024 bytes, others in blocks of 512.
        let limited = format!(
            "trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"",
            bytes / 1024
        );
        shell.args(["-c", &limited]).arg(run.get_program());
        run::answer(shell.args(run.get_args()).arg("--json"))
    }

    /// Runs what must succeed.
    #[track_caller]
    pub(crate) fn must(&self, line: &str) -> Answer {
        let answer = self.run(line);
        assert_eq!(answer.code, Some(0), "{line}: {answer:#?}");
        answer
    }

    /// Starts `blockferry LINE --json` and lets it run.
    pub(crate) fn start(&self, line: &str) -> Child {
        Child::start(self.command(line).arg("--json"))
    }

    pub(crate) fn command(&self, line: &str) -> std::process::Command {
        let mut command = command(self.root());
        command.args(line.split_whitespace());
        command
    }

    /// A disk of noise and zeros, half and half.
    pub(crate) fn disk(&self, name: &str, seed: u64, bytes: u64) -> Vec<u8> {
        let image = images::sparse_image(seed, bytes, 0.5);
        self.write(name, &image);
        image
    }

    /// A disk that differs from `old` in about this share of its pages; some of them are zero now.
    pub(crate) fn edited(&self, name: &str, seed: u64, old: &[u8], fraction: f64) -> Vec<u8> {
        let mut image = old.to_vec();
        let edited = images::edit_image(seed, &mut image, fraction);
        for page in edited.into_iter().step_by(5) {
            let start = usize::try_from(page * 4096).expect("the image is in memory");
            let end = (start + 4096).min(image.len());
            image[start..end].fill(0);
        }
        self.write(name, &image);
        image
    }

    /// Overwrites some bytes of a file, or of a device, and makes that durable.
    pub(crate) fn patch(&self, name: &str, offset: u64, bytes: &[u8]) {
        with_files(|| {
            let file = OpenOptions::new()
                .write(true)
                .open(self.path(name))
                .expect("opened");
            file.write_all_at(bytes, offset).expect("written");
            file.sync_all().expect("flushed");
        });
    }

    /// Writes a file with holes where the bytes are zero.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        write_sparse(&self.path(name), bytes);
    }

    #[track_caller]
    pub(crate) fn assert_holds(&self, name: &str, bytes: &[u8]) {
        assert!(
            same(&self.path(name), bytes),
            "{name} is not bit for bit what was expected"
        );
    }

    /// Everything below the directory that `keep` selects: path, size, mtime, ctime.
    pub(crate) fn footprint(&self, keep: impl Fn(&Path) -> bool) -> Vec<String> {
        let mut found = Vec::new();
        collect(self.root(), &mut found);
        found.retain(|path| keep(path));
        found.sort();
        found.iter().map(|path| stamp(path)).collect()
    }
}

pub(crate) fn write_sparse(path: &Path, bytes: &[u8]) {
    with_files(|| write_pieces(path, bytes));
}

fn write_pieces(path: &Path, bytes: &[u8]) {
    let file = File::create(path).expect("created");
    file.set_len(bytes.len() as u64).expect("sized");
    for (piece, number) in bytes.chunks(64 * 1024).zip(0u64..) {
        if piece.iter().any(|byte| *byte != 0) {
            file.write_all_at(piece, number * 64 * 1024)
                .expect("written");
        }
    }
}

/// Whether a file or device begins with `bytes`, and a file ends with them.
pub(crate) fn same(path: &Path, bytes: &[u8]) -> bool {
    with_files(|| equals(path, bytes))
}

fn equals(path: &Path, bytes: &[u8]) -> bool {
    let Ok(file) = File::open(path) else {
        return false;
    };
    let metadata = file.metadata().expect("it can be examined");
    if metadata.is_file() && metadata.len() != bytes.len() as u64 {
        return false;
    }
    let mut found = vec![0; 1 << 20];
    bytes.chunks(1 << 20).zip(0u64..).all(|(expected, number)| {
        let found = &mut found[..expected.len()];
        file.read_exact_at(found, number << 20).is_ok() && found == expected
    })
}

/// Bytes that the files below `path` take on the disk.
pub(crate) fn disk_usage(path: &Path) -> u64 {
    let mut found = Vec::new();
    collect(path, &mut found);
    found.iter().map(|path| file_usage(path)).sum()
}

pub(crate) fn file_usage(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::symlink_metadata(path).map_or(0, |found| found.blocks() * 512)
}

fn collect(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("it can be listed").flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            collect(&path, found);
        }
        found.push(path);
    }
}

fn stamp(path: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    let m = fs::symlink_metadata(path).expect("it can be examined");
    let (modified, changed) = ((m.mtime(), m.mtime_nsec()), (m.ctime(), m.ctime_nsec()));
    format!(
        "{} {} {} {modified:?} {changed:?}",
        path.display(),
        m.ino(),
        m.len()
    )
}

/// A sequence from a seed that is printed, and can be given again as `BLOCKFERRY_TEST_SEED`.
pub(crate) fn seeded(test: &str) -> Random {
    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(1, |d| d.as_secs())
    };
    let given = std::env::var("BLOCKFERRY_TEST_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(now);
    #[expect(
        clippy::print_stderr,
        reason = "a failed run is repeated with its seed"
    )]
    {
        eprintln!("{test}: BLOCKFERRY_TEST_SEED={seed}");
    }
    Random::new(seed)
}

/// Whether everything is to be tried that is there to try, however long it takes: `BLOCKFERRY_TEST_LONG` is set.
pub(crate) fn thorough() -> bool {
    std::env::var_os("BLOCKFERRY_TEST_LONG").is_some()
}
