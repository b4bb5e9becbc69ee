//! The root agrees with `docs/format/oracle.py`, an independent implementation of about 20 lines.
//!
//! Needs python3 and, once, the network for the `blake3` package from `PyPI`, which is installed
//! into a virtual environment below cargo's target directory. Without them the test says so and
//! passes, except where the environment says `CI=true`.
#![expect(clippy::print_stderr, reason = "a skipped test must say so")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::env;
use std::fs::{self, File};
use std::io::{Read, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use blockferry_core::{BlockSize, Geometry, RegionIndex, RegionLeaves, Root, TreeHasher};

const ORACLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/format/oracle.py");
const TMPDIR: &str = env!("CARGO_TARGET_TMPDIR");

/// A python that can import blake3: the system's, or one in an environment of our own.
fn python() -> Result<PathBuf, String> {
    let system = PathBuf::from("python3");
    if run(Command::new(&system).args(["-c", "import blake3"])).is_ok() {
        return Ok(system);
    }
    let environment = Path::new(TMPDIR).join("python-oracle");
    let python = environment.join("bin/python");
    if run(Command::new(&python).args(["-c", "import blake3"])).is_err() {
        run(Command::new(&system)
            .args(["-m", "venv", "--clear"])
            .arg(&environment))?;
        run(Command::new(&python).args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--retries",
            "2",
            "blake3",
        ]))?;
    }
    Ok(python)
}

fn run(command: &mut Command) -> Result<Output, String> {
    let output = command
        .output()
        .map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(output);
    }
    Err(format!(
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    ))
}

fn oracle_root(python: &Path, image: &Path, block_size: BlockSize) -> String {
    let mut command = Command::new(python);
    command
        .arg(ORACLE)
        .arg(image)
        .arg(block_size.bytes().to_string());
    let output = run(&mut command).expect("the oracle runs where blake3 can be imported");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Our root of a file, region by region.
fn our_root(image: &Path, block_size: BlockSize) -> String {
    let mut file = File::open(image).unwrap();
    let geometry = Geometry::new(file.metadata().unwrap().len(), block_size);
    let mut tree = TreeHasher::new(geometry);
    for region in (0..geometry.region_count()).map(RegionIndex::new) {
        let length = geometry.region_extent(region).length();
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        file.read_exact(&mut bytes).unwrap();
        let leaves = RegionLeaves::of_bytes(&geometry, region, &bytes);
        // Regions of zeros are left out, as they are by a scan that knows the holes.
        if !leaves.is_zero() {
            tree.push(&leaves);
        }
    }
    tree.finish().to_string()
}

/// What an image holds: noise in these ranges, zeros elsewhere.
struct Image {
    name: &'static str,
    bytes: u64,
    noise: Vec<std::ops::Range<u64>>,
}

fn image(name: &'static str, bytes: u64, noise: &[(u64, u64)]) -> Image {
    Image {
        name,
        bytes,
        noise: noise
            .iter()
            .map(|&(start, length)| start..start + length)
            .collect(),
    }
}

fn images() -> Vec<Image> {
    let mut images = vec![image("empty", 0, &[])];
    for bytes in [1, 4095, 4096, 4097, 65_535, 65_536, 65_537] {
        images.push(image("all data", bytes, &[(0, bytes)]));
        images.push(image("all zero", bytes, &[]));
    }
    let mib = 1 << 20;
    images.push(image("regions of 4 KiB blocks", 3 * mib, &[(0, 3 * mib)]));
    images.push(image(
        "256 regions of 4 KiB blocks",
        256 * mib,
        &[(255 * mib, mib)],
    ));
    images.push(image(
        "257 regions of 4 KiB blocks",
        256 * mib + 1,
        &[(0, 10), (256 * mib, 1)],
    ));
    images.push(image(
        "holes between regions, odd end",
        53 * mib + 12_345,
        &[
            (5, 100_000),
            (20 * mib, 65_536),
            (33 * mib - 1, 2),
            (53 * mib, 12_345),
        ],
    ));
    images.push(image("hole at the end", 40 * mib + 4097, &[(mib, mib)]));
    images.push(image(
        "sparse, several regions of 1 MiB",
        300 * mib,
        &[(270 * mib, 70_000)],
    ));
    images
}

fn create(image: &Image, path: &Path) {
    let mut file = File::create(path).unwrap();
    file.set_len(image.bytes).unwrap();
    for range in &image.noise {
        let hasher = blake3::Hasher::new()
            .update(&range.start.to_le_bytes())
            .finalize_xof();
        file.seek(SeekFrom::Start(range.start)).unwrap();
        let mut noise = Vec::new();
        hasher
            .take(range.end - range.start)
            .read_to_end(&mut noise)
            .unwrap();
        file.write_all(&noise).unwrap();
    }
}

#[test]
fn the_python_oracle_computes_the_same_roots() {
    let python = match python() {
        Ok(python) => python,
        Err(reason) => {
            let in_ci = env::var("CI").is_ok_and(|value| value == "true");
            assert!(!in_ci, "the python oracle must run in CI: {reason}");
            eprintln!("SKIPPED: the python oracle, for want of python3 with blake3: {reason}");
            return;
        }
    };
    let path = Path::new(TMPDIR).join(format!("oracle-{}.raw", std::process::id()));
    for image in images() {
        create(&image, &path);
        for block_size in [BlockSize::MIN, BlockSize::DEFAULT, BlockSize::MAX] {
            let (name, bytes) = (image.name, image.bytes);
            let (ours, oracle) = (
                our_root(&path, block_size),
                oracle_root(&python, &path, block_size),
            );
            assert_eq!(
                ours, oracle,
                "{name}: {bytes} bytes in blocks of {block_size}"
            );
        }
    }
    fs::remove_file(&path).unwrap();
    // The empty image is the one value that is also written down in the document.
    let empty = Root::of_bytes(&[], BlockSize::DEFAULT).to_string();
    assert!(include_str!("../../../docs/format/manifest.md").contains(&empty));
}
