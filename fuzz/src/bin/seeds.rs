//! Writes the seed corpora from real files: `cargo run --bin seeds` in this directory, from a checkout.

use std::fs;
use std::path::{Path, PathBuf};

use blockferry_fuzz::pages::{FILES, pack};

fn main() -> std::io::Result<()> {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fixtures = fuzz.join("../tests/fixtures");
    let seeds = fuzz.join("seeds");
    for manifest in files_of(&fixtures.join("manifest/v1"))? {
        let name = manifest.file_name().expect("it is a file");
        write(&seeds.join("manifest").join(name), &fs::read(&manifest)?)?;
    }
    replicas(&fixtures.join("replica/v1"), &seeds)?;
    for (name, line) in COMMAND_LINES {
        let words = line.replace(' ', "\0");
        write(&seeds.join("command_line").join(name), words.as_bytes())?;
    }
    // These two read an arbitrary structure out of their bytes: any bytes will do.
    for target in ["codec", "extents", "operations"] {
        for seed in 0..4u32 {
            write(&seeds.join(target).join(seed.to_string()), &noise(seed))?;
        }
    }
    Ok(())
}

const COMMAND_LINES: [(&str, &str); 9] = [
    (
        "sync",
        "sync a.raw /dev/disk/by-id/b:c --mode delta --block-size 64KiB --undo none --threads 4 --dry-run",
    ),
    (
        "sync-strategy",
        "sync file:///a%20b%FF ./t --strategy shadow --strict --rescan --allow-shrink --json",
    ),
    (
        "resume",
        "resume t --bwlimit 1.5M/s --threads 3 --log-limit 4GiB --crash-consistent --no-read-back",
    ),
    (
        "remote",
        "diff user@host:/path nbd+unix:///export?socket=/run/nbd",
    ),
    (
        "digest",
        "digest image --manifest out --block-size 1MiB -q --state file:///s%00",
    ),
    ("verify", "verify a b -v"),
    ("decide", "rollback t --state /s"),
    ("demo", "demo --size 10.5MB --keep --dir d"),
    ("id", "completions bash 51515151515151515151515151515151"),
];

/// Every scene, on a device and on a file, before and after, with each thing to do next.
fn replicas(scenes: &Path, seeds: &Path) -> std::io::Result<()> {
    for (number, scene) in directories_of(scenes)?.into_iter().enumerate() {
        let mut pieces = Vec::new();
        let mut of_the_state = Vec::new();
        for (file, name) in FILES.iter().enumerate() {
            if let Ok(bytes) = fs::read(scene.join(name)) {
                let packed = pack(file, &bytes);
                if file == 0 {
                    of_the_state.extend(&packed);
                }
                pieces.extend(packed);
            }
        }
        let name = scene
            .file_name()
            .expect("it is a directory")
            .to_string_lossy()
            .into_owned();
        for next in 0..4u8 {
            let (on_device, is_new) = (number % 2 == 0, name == "applied");
            let choice = u8::from(!on_device && next == 3) | u8::from(is_new) << 1 | next << 2;
            let file = format!("{name}-{next}");
            write(
                &seeds.join("replay").join(&file),
                &[&[choice], &pieces[..]].concat(),
            )?;
            if !of_the_state.is_empty() && next == 3 {
                write(
                    &seeds.join("state").join(&file),
                    &[&[choice], &of_the_state[..]].concat(),
                )?;
            }
        }
    }
    Ok(())
}

/// A few bytes from a seed of their own, the same on every run.
fn noise(seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[1]
    };
    (0..200).map(step).collect()
}

fn files_of(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let below = |path: PathBuf| {
        if path.is_dir() {
            files_of(&path)
        } else {
            Ok(vec![path])
        }
    };
    let found: std::io::Result<Vec<_>> = entries(directory)?.into_iter().map(below).collect();
    Ok(found?.concat())
}

fn directories_of(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let found = entries(directory)?.into_iter().filter(|path| path.is_dir());
    // The damaged ones are files of other scenes: mutation makes more of them than anybody can keep.
    Ok(found.filter(|path| !path.ends_with("damaged")).collect())
}

fn entries(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(directory)?
        .map(|e| e.map(|e| e.path()))
        .collect::<Result<_, _>>()?;
    paths.sort();
    Ok(paths)
}

fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    fs::create_dir_all(path.parent().expect("it lies in a directory"))?;
    fs::write(path, bytes)
}
