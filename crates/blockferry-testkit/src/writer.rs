//! Somebody who keeps writing disks, and knows what they hold at any moment.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use blockferry_device::BlockTarget;

use crate::random::Random;

const PAGE: usize = 4096;

/// What was written until the end.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Written {
    /// What was acknowledged, disk by disk.
    pub content: Vec<Vec<u8>>,
    /// Disk and first byte of the page whose write failed: it holds either content.
    pub unsure: Option<(usize, usize)>,
    initial: Vec<Vec<u8>>,
    seed: u64,
    writes: u64,
}

impl Written {
    /// After how many of the writes the disks held exactly this, all of them at one moment; `None` if they never did.
    #[must_use]
    pub fn moment_of(&self, disks: &[Vec<u8>]) -> Option<u64> {
        let (mut content, mut random) = (self.initial.clone(), Random::new(self.seed));
        let same = |content: &[Vec<u8>], disk: usize, start: usize| {
            let found = disks.get(disk).and_then(|d| d.get(start..start + PAGE));
            found == content[disk].get(start..start + PAGE)
        };
        let pages = |disk: usize| (0..content[disk].len() / PAGE).map(|page| page * PAGE);
        let mut different = (0..content.len())
            .map(|disk| pages(disk).filter(|at| !same(&content, disk, *at)).count())
            .sum::<usize>();
        // The write whose end nobody knows may count.
        for number in 0..=self.writes + 1 {
            if different == 0 {
                return Some(number);
            }
            let (disk, start, page) = next_write(&content, &mut random);
            different -= usize::from(!same(&content, disk, start));
            content[disk][start..start + PAGE].copy_from_slice(&page);
            different += usize::from(!same(&content, disk, start));
        }
        None
    }

    /// Whether `disks` hold all that was acknowledged, and nothing else.
    #[must_use]
    pub fn is_on(&self, disks: &[Vec<u8>]) -> bool {
        let mut expected = self.content.clone();
        if let Some((disk, start)) = self.unsure
            && let Some(found) = disks.get(disk).and_then(|d| d.get(start..start + PAGE))
        {
            expected[disk][start..start + PAGE].copy_from_slice(found);
        }
        expected == disks
    }
}

/// Writes pages of several disks, one after the other, until it is dropped or a write fails.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    initial: Vec<Vec<u8>>,
    seed: u64,
}

#[derive(Debug)]
struct Shared {
    /// What was acknowledged; held during each write.
    content: Mutex<Vec<Vec<u8>>>,
    unsure: Mutex<Option<(usize, usize)>>,
    writes: AtomicU64,
    stop: AtomicBool,
}

impl Writer {
    /// Begins to write `devices`, which hold `content`, a page each `pause`.
    #[must_use]
    pub fn start(
        devices: Vec<Arc<dyn BlockTarget>>,
        content: Vec<Vec<u8>>,
        pause: Duration,
        seed: u64,
    ) -> Self {
        let initial = content.clone();
        let shared = Arc::new(Shared {
            content: Mutex::new(content),
            unsure: Mutex::new(None),
            writes: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let writing = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            let mut random = Random::new(seed);
            while !writing.stop.load(Ordering::SeqCst) && writing.write(&devices, &mut random) {
                thread::sleep(pause);
            }
        });
        Self {
            shared,
            thread: Some(thread),
            initial,
            seed,
        }
    }

    /// What all disks hold at the moment in which `act` runs: nothing is written meanwhile.
    pub fn at<T>(&self, act: impl FnOnce() -> T) -> (Vec<Vec<u8>>, T) {
        let content = self.shared.lock();
        let done = act();
        (content.clone(), done)
    }

    /// Ends it, and returns what was written.
    #[must_use]
    pub fn stop(mut self) -> Written {
        self.end();
        let unsure = self.shared.unsure.lock();
        Written {
            content: self.shared.lock().clone(),
            unsure: *unsure.unwrap_or_else(PoisonError::into_inner),
            initial: std::mem::take(&mut self.initial),
            seed: self.seed,
            writes: self.shared.writes.load(Ordering::SeqCst),
        }
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes one page; `false` if that failed, after which nobody knows what it holds.
    fn write(&self, devices: &[Arc<dyn BlockTarget>], random: &mut Random) -> bool {
        let mut content = self.lock();
        let (disk, start, page) = next_write(&content, random);
        if devices[disk].write_at(start as u64, &page).is_err() {
            let mut unsure = self.unsure.lock().unwrap_or_else(PoisonError::into_inner);
            *unsure = Some((disk, start));
            return false;
        }
        content[disk][start..start + PAGE].copy_from_slice(&page);
        self.writes.fetch_add(1, Ordering::SeqCst);
        true
    }
}

/// Disk, first byte, and the new page.
fn next_write(content: &[Vec<u8>], random: &mut Random) -> (usize, usize, [u8; PAGE]) {
    let mut below = |bound: usize| usize::try_from(random.below(bound as u64)).unwrap_or_default();
    let disk = below(content.len());
    let start = below(content[disk].len() / PAGE) * PAGE;
    let mut page = [0; PAGE];
    random.fill(&mut page);
    (disk, start, page)
}
