//! A directory on a real disk with a source and a target, for the benches that write.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockferry::core::Geometry;
use blockferry::transfer_log::{Plan, Session, SourceStamp, Strategy};
use blockferry::{
    BlockSize, BlockSource, Connection, Context, Deadlines, Link, Receipt, SourceOptions,
    SyncOptions, Target, TargetOptions, open_source, serve_source, sync, sync_from_peer,
};

use crate::{noise, with_changed_pages};

/// Removed with everything in it when dropped. It lies below cargo's target directory: a state on a file system in
/// memory is refused, and would measure nothing.
#[derive(Debug)]
pub struct Place {
    directory: PathBuf,
    image: Vec<u8>,
}

impl Place {
    /// A target of `bytes` of noise; the source differs in one byte of every `stride`-th page.
    ///
    /// # Panics
    /// The directory cannot be written.
    #[must_use]
    pub fn new(name: &str, bytes: usize, stride: usize) -> Self {
        let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
        let directory = Path::new(&target).join(format!("bench-{name}-{}", std::process::id()));
        let image = noise(1, bytes);
        fs::create_dir_all(&directory).expect("the target directory can be written");
        let new = with_changed_pages(&image, stride);
        fs::write(directory.join("new.raw"), new).expect("there is room for a bench");
        let place = Self { directory, image };
        place.reset();
        place
    }

    /// The target as it was at first, without any state.
    ///
    /// # Panics
    /// The directory cannot be written.
    pub fn reset(&self) {
        fs::remove_dir_all(self.directory.join(".old.raw.blockferry")).ok();
        fs::write(self.path(), &self.image).expect("there is room for a bench");
    }

    /// The target's path.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.directory.join("old.raw")
    }

    /// The source.
    ///
    /// # Panics
    /// It cannot be opened.
    #[must_use]
    pub fn source(&self) -> Arc<dyn BlockSource> {
        open_source(&self.directory.join("new.raw"), SourceOptions::default())
            .expect("nobody else uses it")
    }

    /// Changes one byte of the source's page `number`, which was written by nobody else.
    ///
    /// # Panics
    /// It cannot be written.
    pub fn change_source(&self, number: usize) {
        use std::os::unix::fs::FileExt;
        let path = self.directory.join("new.raw");
        let file = fs::File::options().read(true).write(true).open(path);
        let file = file.expect("the source is there");
        let mut byte = [0];
        let offset = number as u64 * 4096 + 77;
        file.read_exact_at(&mut byte, offset)
            .expect("the page is there");
        file.write_all_at(&[byte[0] ^ 1], offset)
            .expect("there is room for a bench");
    }

    /// The target, opened and locked.
    ///
    /// # Panics
    /// It is refused.
    #[must_use]
    pub fn open(&self) -> Target {
        Target::open(self.path(), &TargetOptions::new(&self.directory))
            .expect("nobody else uses it")
    }

    /// A whole sync.
    ///
    /// # Panics
    /// It failed.
    #[must_use]
    pub fn sync(&self, options: &SyncOptions) -> Receipt {
        sync(
            self.source(),
            &mut self.open(),
            options,
            &Context::default(),
        )
        .expect("a sync works")
    }

    /// The same from a source on the other side of a pair of sockets, which is served by threads of its own.
    ///
    /// # Panics
    /// It failed.
    #[must_use]
    pub fn sync_over_sockets(&self, options: &SyncOptions) -> Receipt {
        self.sync_over(Link::pair().expect("the system has sockets"), options)
    }

    /// The same over a link with these ends.
    ///
    /// # Panics
    /// It failed.
    #[must_use]
    pub fn sync_over(&self, (here, there): (Link, Link), options: &SyncOptions) -> Receipt {
        let source = self.source();
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        let serving = std::thread::spawn(move || {
            let connection = Connection::open(there, Deadlines::default())?;
            let served = serve_source(&source, connection, threads, &Context::default());
            Ok::<_, blockferry::transport::Error>(served)
        });
        let connection =
            Connection::open(here, Deadlines::default()).expect("both are of one build");
        let receipt = sync_from_peer(connection, &mut self.open(), options, &Context::default());
        let served = serving
            .join()
            .expect("no panic")
            .expect("both are of one build");
        served.expect("the source is served");
        receipt.expect("a sync works")
    }

    /// A redo session on `target` that nothing is staged in yet.
    ///
    /// # Panics
    /// It cannot be begun.
    #[must_use]
    pub fn begin<'t>(&self, target: &'t mut Target) -> Session<'t> {
        let geometry = Geometry::new(self.image.len() as u64, BlockSize::DEFAULT);
        let unknown = (
            blockferry::device::Identity::unknown(),
            blockferry::device::Evidence::unknown(),
        );
        let stamp = SourceStamp::new("bench", unknown.0, unknown.1);
        let id = Target::random_id().expect("the system has randomness");
        let plan = Plan::new(id, Strategy::Redo, geometry, stamp);
        target
            .replica()
            .begin(&plan)
            .expect("the session is the only one")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.directory).ok();
    }
}
