//! Consistent points of a source (decision D7): [`PointProvider`] gives them, [`Quiesce`] makes them consistent.
//!
//! A provider is how snapshots plug in: [`PointProvider::begin`] takes one and says what changed since the last
//! sync point, [`PointProvider::release`] lets it go, which happens only once the target holds the new point. What
//! a crash leaves behind is found by [`PointProvider::leases`]. [`WholeSource`] is the provider for a source at
//! rest, [`Quiesced`] holds writes while another provider takes its point.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use blockferry_core::ChangeMap;

use crate::{BlockSource, Result};

/// What the content of a point is consistent with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Consistency {
    /// A mixture of moments: the source was being written while it is read.
    Fuzzy,
    /// As after a power loss.
    Crash,
    /// As after a freeze of its file systems.
    FileSystem,
    /// The application took part.
    Application,
    /// Nobody uses the source.
    AtRest,
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fuzzy => "fuzzy",
            Self::Crash => "crash-consistent",
            Self::FileSystem => "file-system-consistent",
            Self::Application => "application-consistent",
            Self::AtRest => "at rest",
        })
    }
}

/// A point that may be read until its lease is released.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SourcePoint {
    /// Names it to [`PointProvider::release`]; empty if there is nothing to release.
    pub lease: String,
    /// Its content, which does not change while the lease is held (unless it is fuzzy).
    pub source: Arc<dyn BlockSource>,
    /// What is known to have changed since the point that was asked about.
    pub changes: Option<Arc<ChangeMap>>,
    /// How good it is.
    pub consistency: Consistency,
}

impl SourcePoint {
    /// A point of which nothing is known but its content.
    #[must_use]
    pub fn new(
        lease: impl Into<String>,
        source: Arc<dyn BlockSource>,
        consistency: Consistency,
    ) -> Self {
        Self {
            lease: lease.into(),
            source,
            changes: None,
            consistency,
        }
    }

    /// With what changed since the point that was asked about.
    #[must_use]
    pub fn with_changes(mut self, changes: Option<Arc<ChangeMap>>) -> Self {
        self.changes = changes;
        self
    }
}

/// What is asked of a provider.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PointRequest<'a> {
    /// The sync point the target is at: changes are wanted since then. A provider that does not know it says
    /// nothing about changes.
    pub since: Option<&'a str>,
    /// A lease that an unfinished session was reading: the same point again spares reading it twice. A new point
    /// is right as well.
    pub resume: Option<&'a str>,
}

impl<'a> PointRequest<'a> {
    /// A point with the changes since `since`, if possible that of the lease `resume`.
    #[must_use]
    pub fn new(since: Option<&'a str>, resume: Option<&'a str>) -> Self {
        Self { since, resume }
    }
}

/// Gives points of one source.
pub trait PointProvider: fmt::Debug + Send + Sync {
    /// Takes a point, or takes that of a lease up again.
    ///
    /// # Errors
    /// The source or its snapshot failed.
    fn begin(&self, request: &PointRequest<'_>) -> Result<SourcePoint>;

    /// Lets a point go. Called once the target holds it, or when nobody will ask for it again; a lease that is
    /// gone already is no error.
    ///
    /// # Errors
    /// It could not be released; it is tried again by a later run.
    fn release(&self, lease: &str) -> Result<()>;

    /// Leases that were begun and not released, by this process or one before it, oldest first.
    ///
    /// # Errors
    /// They could not be listed.
    fn leases(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

/// Holds writes at a source.
pub trait Quiesce: fmt::Debug + Send + Sync {
    /// Returns once writes are held and what was written is on the disk. They are let go after `deadline` at the
    /// latest, also if this process dies.
    ///
    /// # Errors
    /// They could not be held; nothing is held then.
    fn freeze(&self, deadline: Duration) -> Result<()>;

    /// Lets writes go.
    ///
    /// # Errors
    /// The deadline had passed, so what was done meanwhile is not consistent; or letting go failed.
    fn thaw(&self) -> Result<()>;
}

/// The whole source as it is; nothing to release.
#[derive(Clone, Debug)]
pub struct WholeSource {
    source: Arc<dyn BlockSource>,
    consistency: Consistency,
}

impl WholeSource {
    /// A source that nobody uses: what [`open_source`](crate::open_source) made sure of.
    #[must_use]
    pub fn at_rest(source: Arc<dyn BlockSource>) -> Self {
        Self {
            source,
            consistency: Consistency::AtRest,
        }
    }

    /// A source that may be written meanwhile.
    #[must_use]
    pub fn fuzzy(source: Arc<dyn BlockSource>) -> Self {
        Self {
            source,
            consistency: Consistency::Fuzzy,
        }
    }
}

impl PointProvider for WholeSource {
    fn begin(&self, _request: &PointRequest<'_>) -> Result<SourcePoint> {
        let source = Arc::clone(&self.source);
        Ok(SourcePoint::new("", source, self.consistency))
    }

    fn release(&self, _lease: &str) -> Result<()> {
        Ok(())
    }
}

/// Takes the points of another provider while writes are held.
#[derive(Clone, Debug)]
pub struct Quiesced<P, Q> {
    provider: P,
    quiesce: Q,
    deadline: Duration,
}

impl<P: PointProvider, Q: Quiesce> Quiesced<P, Q> {
    /// Writes are held for `deadline` at most.
    pub fn new(provider: P, quiesce: Q, deadline: Duration) -> Self {
        Self {
            provider,
            quiesce,
            deadline,
        }
    }
}

impl<P: PointProvider, Q: Quiesce> PointProvider for Quiesced<P, Q> {
    fn begin(&self, request: &PointRequest<'_>) -> Result<SourcePoint> {
        self.quiesce.freeze(self.deadline)?;
        let begun = self.provider.begin(request);
        let thawed = self.quiesce.thaw();
        let point = begun?;
        if let Err(late) = thawed {
            // Nobody will ask for it: it may hold a mixture.
            self.provider.release(&point.lease)?;
            return Err(late);
        }
        // A point that was taken up again was not taken now.
        let is_new = request.resume != Some(point.lease.as_str());
        let consistency = match point.consistency {
            Consistency::Crash if is_new => Consistency::FileSystem,
            found => found,
        };
        Ok(SourcePoint {
            consistency,
            ..point
        })
    }

    fn release(&self, lease: &str) -> Result<()> {
        self.provider.release(lease)
    }

    fn leases(&self) -> Result<Vec<String>> {
        self.provider.leases()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::{Error, ErrorKind, MemoryDevice};

    /// A provider and a freeze that write down what they are asked for.
    #[derive(Debug, Default)]
    struct Recording {
        calls: Mutex<Vec<String>>,
        fails: Option<&'static str>,
    }

    impl Recording {
        fn note(&self, call: &str) -> Result<()> {
            self.calls.lock().unwrap().push(call.to_owned());
            match self.fails {
                Some(fails) if call.starts_with(fails) => {
                    Err(Error::new(ErrorKind::Io, "injected"))
                }
                _ => Ok(()),
            }
        }
    }

    impl PointProvider for Arc<Recording> {
        fn begin(&self, _request: &PointRequest<'_>) -> Result<SourcePoint> {
            self.note("begin")?;
            let memory = Arc::new(MemoryDevice::zeroed("memory", 4096));
            Ok(SourcePoint::new("lease", memory, Consistency::Crash))
        }

        fn release(&self, lease: &str) -> Result<()> {
            self.note(&format!("release {lease}"))
        }
    }

    impl Quiesce for Arc<Recording> {
        fn freeze(&self, _deadline: Duration) -> Result<()> {
            self.note("freeze")
        }

        fn thaw(&self) -> Result<()> {
            self.note("thaw")
        }
    }

    fn begin(fails: Option<&'static str>) -> (Result<SourcePoint>, String) {
        let calls = Mutex::default();
        let recording = Arc::new(Recording { calls, fails });
        let provider = Quiesced::new(
            Arc::clone(&recording),
            Arc::clone(&recording),
            Duration::from_secs(1),
        );
        let point = provider.begin(&PointRequest::default());
        let calls = recording.calls.lock().unwrap().join(", ");
        (point, calls)
    }

    #[test]
    fn writes_are_held_exactly_while_the_point_is_taken() {
        let (point, calls) = begin(None);

        assert_eq!(point.unwrap().consistency, Consistency::FileSystem);
        assert_eq!(calls, "freeze, begin, thaw");
    }

    #[test]
    fn writes_are_let_go_whatever_fails_and_a_late_point_is_released() {
        for (fails, expected) in [
            ("freeze", "freeze"),
            ("begin", "freeze, begin, thaw"),
            ("thaw", "freeze, begin, thaw, release lease"),
        ] {
            let (point, calls) = begin(Some(fails));

            assert!(point.is_err(), "{fails}");
            assert_eq!(calls, expected, "{fails}");
        }
    }
}
