//! A small writer of FAT16 volumes (Microsoft, "FAT: General Overview of On-Disk Format", 1.03, 2000), for
//! machines without `mke2fs`: files in the root directory, each in one run of clusters.
//!
//! ```text
//! | boot sector, 4 KiB reserved | FAT | FAT | root directory, 16 KiB | clusters … |
//! ```
//! Everything before the clusters is a multiple of 4 KiB, and so is the start of each file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::content;
use crate::random::count;

const SECTOR: u64 = 512;
const RESERVED_SECTORS: u64 = 8;
const ROOT_ENTRIES: u64 = 512;
const ROOT_BYTES: u64 = ROOT_ENTRIES * 32;
const ALIGNMENT: u64 = 4096;
/// FAT16 by definition has more clusters than FAT12 may have and fewer than FAT32 must have.
const CLUSTERS: std::ops::Range<u64> = 4_085..65_525;
const MAX_FILES: usize = 300;

/// Where things are in a volume.
struct Layout {
    sectors: u64,
    cluster_bytes: u64,
    fat_bytes: u64,
    clusters: u64,
}

impl Layout {
    /// The smallest clusters that make FAT16; `None` if the volume is too small for it (about 2 MiB). What
    /// is beyond 2,047 MiB stays unused.
    fn new(bytes: u64) -> Option<Self> {
        let sectors = (bytes / ALIGNMENT * ALIGNMENT).min(2047 << 20) / SECTOR;
        (9..=15)
            .map(|shift| Self::with_clusters(sectors, 1 << shift))
            .find_map(|layout| layout.filter(|layout| CLUSTERS.contains(&layout.clusters)))
    }

    fn with_clusters(sectors: u64, cluster_bytes: u64) -> Option<Self> {
        let most_clusters = sectors * SECTOR / cluster_bytes;
        let fat_bytes = (2 * (most_clusters + 2)).next_multiple_of(ALIGNMENT);
        let before = RESERVED_SECTORS * SECTOR + 2 * fat_bytes + ROOT_BYTES;
        let clusters = (sectors * SECTOR).checked_sub(before)? / cluster_bytes;
        Some(Self {
            sectors,
            cluster_bytes,
            fat_bytes,
            clusters,
        })
    }

    fn fat_start(copy: u64, fat_bytes: u64) -> u64 {
        RESERVED_SECTORS * SECTOR + copy * fat_bytes
    }

    fn root_start(&self) -> u64 {
        Self::fat_start(2, self.fat_bytes)
    }

    fn data_start(&self) -> u64 {
        self.root_start() + ROOT_BYTES
    }

    fn boot_sector(&self, seed: u64) -> Vec<u8> {
        let mut sector = vec![0; 512];
        let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
        let narrow = |value: u64| {
            u16::try_from(value)
                .expect("bounded by the format")
                .to_le_bytes()
        };
        put(0, &[0xEB, 0x3C, 0x90]);
        put(3, b"TESTKIT ");
        put(11, &narrow(SECTOR));
        put(
            13,
            &[u8::try_from(self.cluster_bytes / SECTOR).expect("at most 64 sectors")],
        );
        put(14, &narrow(RESERVED_SECTORS));
        put(16, &[2]);
        put(17, &narrow(ROOT_ENTRIES));
        // The 16-bit total must be used where it suffices.
        match u16::try_from(self.sectors) {
            Ok(sectors) => put(19, &sectors.to_le_bytes()),
            Err(_) => {
                let sectors = u32::try_from(self.sectors).expect("at most 2 GiB of sectors");
                put(32, &sectors.to_le_bytes());
            }
        }
        put(21, &[0xF8]);
        put(22, &narrow(self.fat_bytes / SECTOR));
        put(24, &narrow(63));
        put(26, &narrow(255));
        put(36, &[0x80, 0, 0x29]);
        put(39, &seed.to_le_bytes()[..4]);
        put(43, b"NO NAME    FAT16   ");
        put(510, &[0x55, 0xAA]);
        sector
    }
}

/// Makes `file`, `bytes` long and empty, a FAT16 volume with files generated from the seed.
pub(super) fn write_volume(file: &File, bytes: u64, seed: u64) -> io::Result<()> {
    let layout = Layout::new(bytes).ok_or_else(|| {
        let text = format!("FAT16 volume of {bytes} bytes: needs at least about 2.2 MiB");
        io::Error::new(io::ErrorKind::InvalidInput, text)
    })?;
    let mut fat: Vec<u16> = vec![0xFFF8, 0xFFFF];
    let mut root = Vec::new();
    let capacity = layout.clusters * layout.cluster_bytes / 5 * 3;
    for (number, size) in (0..).zip(content::file_sizes(seed, capacity, MAX_FILES)) {
        let first_cluster = allocate(&mut fat, size, layout.cluster_bytes);
        root.extend(directory_entry(number, first_cluster, size));
        let start = layout.data_start() + u64::from(first_cluster - 2) * layout.cluster_bytes;
        write_file(file, seed, number, start, size)?;
    }
    let fat: Vec<u8> = fat.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    file.write_all_at(&layout.boot_sector(seed), 0)?;
    for copy in 0..2 {
        file.write_all_at(&fat, Layout::fat_start(copy, layout.fat_bytes))?;
    }
    file.write_all_at(&root, layout.root_start())
}

/// Chains the clusters of a file, from a multiple of 4 KiB on.
fn allocate(fat: &mut Vec<u16>, size: u64, cluster_bytes: u64) -> u16 {
    let clusters = size.next_multiple_of(ALIGNMENT.max(cluster_bytes)) / cluster_bytes;
    let used = size.div_ceil(cluster_bytes);
    let first = u16::try_from(fat.len()).expect("fewer than 65,525 clusters");
    for number in 0..clusters {
        let next = u16::try_from(fat.len() + 1).expect("fewer than 65,525 clusters");
        fat.push(match number + 1 {
            n if n < used => next,
            n if n == used => 0xFFFF,
            _ => 0,
        });
    }
    first
}

fn directory_entry(number: u64, first_cluster: u16, size: u64) -> [u8; 32] {
    let mut entry = [0; 32];
    entry[..11].copy_from_slice(format!("FILE{number:04}BIN").as_bytes());
    entry[11] = 0x20;
    // 1 January 2024.
    entry[24..26].copy_from_slice(&(44_u16 << 9 | 1 << 5 | 1).to_le_bytes());
    entry[26..28].copy_from_slice(&first_cluster.to_le_bytes());
    let size = u32::try_from(size).expect("a file is smaller than its volume of at most 2 GiB");
    entry[28..32].copy_from_slice(&size.to_le_bytes());
    entry
}

fn write_file(file: &File, seed: u64, number: u64, start: u64, size: u64) -> io::Result<()> {
    let block_bytes = count(content::BLOCK_BYTES);
    for block in 0..size.div_ceil(block_bytes) {
        let length = crate::random::index(block_bytes.min(size - block * block_bytes));
        let bytes = content::block(seed, number, block, length);
        file.write_all_at(&bytes, start + block * block_bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::index;

    /// Reads a volume from its boot sector alone: (name, content) of every file.
    fn files(image: &[u8]) -> Vec<(String, Vec<u8>)> {
        let narrow = |at: usize| usize::from(u16::from_le_bytes([image[at], image[at + 1]]));
        let cluster = usize::from(image[13]) * narrow(11);
        let fat = narrow(14) * narrow(11);
        let root = fat + usize::from(image[16]) * narrow(22) * narrow(11);
        let data = root + narrow(17) * 32;
        let entries = image[root..data]
            .chunks(32)
            .take_while(|entry| entry[0] != 0);
        let entry = |entry: &[u8]| {
            let size = u32::from_le_bytes(*entry.last_chunk().unwrap());
            let mut at = usize::from(u16::from_le_bytes([entry[26], entry[27]]));
            let mut content = Vec::new();
            while at < 0xFFF8 {
                assert!(at >= 2, "a chain leads to a free cluster");
                let start = data + (at - 2) * cluster;
                content.extend_from_slice(&image[start..start + cluster]);
                at = narrow(fat + 2 * at);
            }
            assert_eq!(content.len(), (size as usize).next_multiple_of(cluster));
            content.truncate(size as usize);
            (String::from_utf8_lossy(&entry[..11]).into_owned(), content)
        };
        entries.map(entry).collect()
    }

    #[test]
    fn a_volume_holds_the_generated_files() {
        for mib in [3, 5, 20, 64] {
            let bytes = mib << 20;
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("fat");
            let file = File::create_new(&path).unwrap();
            file.set_len(bytes).unwrap();

            write_volume(&file, bytes, 9).unwrap();

            let image = std::fs::read(&path).unwrap();
            assert_eq!(count(image.len()), bytes);
            let files = files(&image);
            assert!(files.len() > 5, "{} files in {mib} MiB", files.len());
            for (number, (name, content)) in (0_u64..).zip(files) {
                assert_eq!(name, format!("FILE{number:04}BIN"));
                for (block, piece) in (0..).zip(content.chunks(4096)) {
                    assert_eq!(piece, content::block(9, number, block, piece.len()));
                }
            }
        }
    }

    #[test]
    fn every_size_from_three_mebibytes_on_makes_a_volume_of_the_right_kind() {
        for mib in [3, 16, 17, 31, 33, 255, 257, 1024, 2048, 9000] {
            let layout = Layout::new(mib << 20).unwrap();

            assert!(CLUSTERS.contains(&layout.clusters), "{mib} MiB");
            assert!(layout.data_start().is_multiple_of(ALIGNMENT), "{mib} MiB");
            assert!(layout.fat_bytes / 2 >= layout.clusters + 2, "{mib} MiB");
            assert!(index(layout.fat_bytes / SECTOR) <= 0xFFFF, "{mib} MiB");
        }
        assert!(Layout::new(1 << 20).is_none());
    }
}
