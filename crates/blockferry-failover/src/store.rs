//! All jobs of a host and what happened to them, in a database: a transition counts once it is durable there.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use blockferry_core::{Extent, ExtentSet};
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::Serialize;

use crate::convergence::Pass;
use crate::error::{Error, ErrorKind, Result};
use crate::spec::JobSpec;
use crate::state::State;

const FILE_NAME: &str = "jobs.sqlite";
/// In `user_version`.
const SCHEMA_VERSION: i64 = 2;
/// For another process to end its transaction.
const BUSY: Duration = Duration::from_secs(10);
/// Passes that are looked back on.
const PASSES: i64 = 32;
/// Of a job, however many weeks it is refreshed.
const MOST_EVENTS: i64 = 1000;
const MOST_PASSES: i64 = 1000;

const SCHEMA: &str = "
    CREATE TABLE jobs (
        id           INTEGER PRIMARY KEY,
        name         TEXT NOT NULL,
        operation    TEXT NOT NULL,
        state        TEXT NOT NULL,
        spec         TEXT NOT NULL,
        created_ms   INTEGER NOT NULL,
        updated_ms   INTEGER NOT NULL,
        next_number  INTEGER NOT NULL DEFAULT 1,
        downtime     REAL,
        problem      TEXT
    ) STRICT;
    CREATE INDEX jobs_by_name ON jobs (name, id);
    CREATE TABLE events (
        job     INTEGER NOT NULL REFERENCES jobs (id),
        at_ms   INTEGER NOT NULL,
        state   TEXT NOT NULL,
        text    TEXT NOT NULL
    ) STRICT;
    CREATE INDEX events_by_job ON events (job);
    CREATE TABLE passes (
        job             INTEGER NOT NULL REFERENCES jobs (id),
        number          INTEGER NOT NULL,
        ended_ms        INTEGER NOT NULL,
        changed_bytes   INTEGER NOT NULL,
        seconds         REAL NOT NULL,
        since_last_cut  REAL,
        consistency     TEXT NOT NULL,
        PRIMARY KEY (job, number)
    ) STRICT;
    CREATE TABLE requests (
        job    INTEGER NOT NULL REFERENCES jobs (id),
        verb   TEXT NOT NULL,
        at_ms  INTEGER NOT NULL
    ) STRICT;
";

/// What came with version 2.
const SCHEMA_2: &str = "
    CREATE TABLE origins (
        job      INTEGER NOT NULL REFERENCES jobs (id),
        disk     INTEGER NOT NULL,
        number   INTEGER NOT NULL,
        root     TEXT NOT NULL,
        changed  TEXT NOT NULL,
        PRIMARY KEY (job, disk)
    ) STRICT;
";

const FAILOVER: &str = "failover";
const REVERSE: &str = "reverse";

/// What a disk was when its machine was stopped for good, and what became of its replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    /// From this cut on the replica's machine records what changes.
    pub(crate) number: u64,
    /// Of the last cut.
    pub(crate) root: String,
    /// What was written between that and this.
    pub(crate) changed: ExtentSet,
}

/// The database of jobs in a directory.
#[derive(Debug)]
pub(crate) struct Store {
    database: Connection,
    directory: PathBuf,
}

/// A job as it is recorded.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct JobRecord {
    /// Tells it from jobs before it that had the same name.
    pub id: i64,
    /// Its name.
    pub name: String,
    /// `failover`, or `reverse` of one that leads back.
    pub operation: String,
    /// Where it is.
    pub state: State,
    /// Milliseconds since 1970.
    pub created_ms: i64,
    /// Milliseconds since 1970.
    pub updated_ms: i64,
    /// Number of the next cut.
    #[serde(skip)]
    pub next_number: u64,
    /// How long the source stood still, in seconds, once it was cut over.
    pub downtime_seconds: Option<f64>,
    /// Why the last step failed, or what keeps it from becoming ready.
    pub problem: Option<String>,
    /// What it is to do.
    #[serde(skip)]
    pub spec: JobSpec,
}

impl JobRecord {
    pub(crate) fn leads_back(&self) -> bool {
        self.operation == REVERSE
    }

    /// Seconds since something happened to it, by this host's clock.
    #[must_use]
    pub fn age_seconds(&self) -> u64 {
        (now_ms() - self.updated_ms).max(0).unsigned_abs() / 1000
    }
}

/// Something that happened to a job.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct JobEvent {
    /// Milliseconds since 1970.
    pub at_ms: i64,
    /// Where the job was after it.
    pub state: State,
    /// For people.
    pub text: String,
}

/// Which jobs are listed; what is `None` does not matter.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Filter {
    /// In this state.
    pub state: Option<State>,
    /// Of this operation.
    pub operation: Option<String>,
    /// Changed at this time or later, in milliseconds since 1970.
    pub from_ms: Option<i64>,
    /// Created at this time or before, in milliseconds since 1970.
    pub to_ms: Option<i64>,
}

/// What another process wants of the one that works on a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// Cut over at this time, in milliseconds since 1970.
    Complete(i64),
    /// Copy no more.
    Cancel,
}

impl Store {
    /// Opens the database in `directory`, or creates it.
    ///
    /// # Errors
    /// It is damaged, of another version, or cannot be written.
    pub(crate) fn open(directory: &Path) -> Result<Self> {
        let failed = |cause| {
            let text = format!("open the database of jobs in {}", directory.display());
            Error::store(text, cause)
        };
        std::fs::create_dir_all(directory).map_err(|cause| {
            let text = format!("create {} for the database of jobs", directory.display());
            Error::because(ErrorKind::Store, text, cause)
        })?;
        let database = Connection::open(directory.join(FILE_NAME)).map_err(failed)?;
        let store = Self {
            database,
            directory: directory.to_owned(),
        };
        store.configure().map_err(failed)?;
        store.check_version()?;
        Ok(store)
    }

    fn configure(&self) -> rusqlite::Result<()> {
        self.database.busy_timeout(BUSY)?;
        self.use_log()?;
        // A transition that was told of must be there after a power loss.
        self.database.pragma_update(None, "synchronous", "FULL")?;
        self.database.pragma_update(None, "foreign_keys", true)
    }

    /// Its own log ahead of the database. To begin with that takes a moment in which nobody else has it open, and for that
    /// `SQLite` does not wait by itself.
    fn use_log(&self) -> rusqlite::Result<()> {
        let end = Instant::now() + BUSY;
        loop {
            let mode = self
                .database
                .pragma_update_and_check(None, "journal_mode", "WAL", |row| {
                    row.get::<_, String>(0)
                });
            match mode {
                Err(error)
                    if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy)
                        && Instant::now() < end =>
                {
                    std::thread::sleep(Duration::from_millis(10));
                }
                other => return other.map(drop),
            }
        }
    }

    fn check_version(&self) -> Result<()> {
        let failed = |cause| Error::store("look at the database of jobs", cause);
        let begun = self.database.execute_batch("BEGIN IMMEDIATE");
        begun.map_err(failed)?;
        let version: i64 = self
            .database
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .map_err(failed)?;
        let steps: &[&str] = match version {
            0 => &[SCHEMA, SCHEMA_2],
            1 => &[SCHEMA_2],
            _ => &[],
        };
        let made = steps.iter().try_for_each(|step| {
            self.database.execute_batch(step)?;
            self.database
                .pragma_update(None, "user_version", SCHEMA_VERSION)
        });
        made.and_then(|()| self.database.execute_batch("COMMIT"))
            .map_err(failed)?;
        if !(0..=SCHEMA_VERSION).contains(&version) {
            let text = format!(
                "the database of jobs in {} has version {version}; this build knows {SCHEMA_VERSION}",
                self.directory.display()
            );
            return Err(Error::new(ErrorKind::Store, text));
        }
        Ok(())
    }

    /// Records a new job.
    ///
    /// # Errors
    /// A job of this name is not at its end, or the database failed.
    pub(crate) fn create(&mut self, spec: &JobSpec) -> Result<JobRecord> {
        self.insert(spec, FAILOVER, &[])
    }

    /// Records a new job that leads back from one whose disks were `origins`.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub(crate) fn create_way_back(
        &mut self,
        spec: &JobSpec,
        origins: &[Origin],
    ) -> Result<JobRecord> {
        self.insert(spec, REVERSE, origins)
    }

    fn insert(&mut self, spec: &JobSpec, operation: &str, origins: &[Origin]) -> Result<JobRecord> {
        if let Some(earlier) = self.find(&spec.name)?
            && !earlier.state.is_final()
        {
            let text = format!(
                "job {} exists and is {}: finish it first, or give the new one another name",
                spec.name, earlier.state
            );
            return Err(Error::new(ErrorKind::Refused, text));
        }
        let (now, toml) = (now_ms(), spec.to_toml()?);
        let failed = |cause| Error::store(format!("record job {}", spec.name), cause);
        let transaction = self.database.transaction().map_err(failed)?;
        // No cut has the number of one before.
        let last = origins.iter().map(|origin| origin.number).max();
        let next = i64::try_from(last.unwrap_or(0) + 1).unwrap_or(i64::MAX);
        let sql =
            "INSERT INTO jobs (name, operation, state, spec, created_ms, updated_ms, next_number)
                   VALUES (?1, ?2, ?3, ?4, ?5, ?5, ?6)";
        let state = State::Created.to_string();
        let values = params![spec.name, operation, state, toml, now, next];
        transaction.execute(sql, values).map_err(failed)?;
        let id = transaction.last_insert_rowid();
        insert_origins(&transaction, id, origins)?;
        note(&transaction, id, State::Created, "the job was created").map_err(failed)?;
        transaction.commit().map_err(failed)?;
        self.load(id)
    }

    /// The newest job of this name.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) fn find(&self, name: &str) -> Result<Option<JobRecord>> {
        let sql = "SELECT * FROM jobs WHERE name = ?1 ORDER BY id DESC LIMIT 1";
        let found = self.database.query_row(sql, [name], record).optional();
        let found = found.map_err(|cause| Error::store(format!("look for job {name}"), cause))?;
        found.transpose()
    }

    /// A job by its id.
    ///
    /// # Errors
    /// There is none, or the database failed.
    pub(crate) fn load(&self, id: i64) -> Result<JobRecord> {
        let sql = "SELECT * FROM jobs WHERE id = ?1";
        let found = self.database.query_row(sql, [id], record);
        found.map_err(|cause| Error::store(format!("load job {id}"), cause))?
    }

    /// The jobs that pass `filter`, the newest first.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) fn list(&self, filter: &Filter) -> Result<Vec<JobRecord>> {
        let failed = |cause| Error::store("list jobs", cause);
        let sql = "SELECT * FROM jobs
                   WHERE (?1 IS NULL OR state = ?1) AND (?2 IS NULL OR operation = ?2)
                     AND (?3 IS NULL OR updated_ms >= ?3) AND (?4 IS NULL OR created_ms <= ?4)
                   ORDER BY id DESC";
        let mut statement = self.database.prepare(sql).map_err(failed)?;
        let wanted = params![
            filter.state.map(|state| state.to_string()),
            filter.operation,
            filter.from_ms,
            filter.to_ms
        ];
        let rows = statement.query_map(wanted, record).map_err(failed)?;
        rows.map(|row| row.map_err(failed)?).collect()
    }

    /// Makes a transition durable, with what is told of it.
    ///
    /// # Errors
    /// The database failed: then it may or may not count.
    pub(crate) fn move_to(&mut self, job: i64, state: State, text: &str) -> Result<()> {
        let failed = |cause| Error::store(format!("record that a job is {state}"), cause);
        let transaction = self.database.transaction().map_err(failed)?;
        transaction
            .execute(
                "UPDATE jobs SET state = ?2, updated_ms = ?3 WHERE id = ?1",
                params![job, state.to_string(), now_ms()],
            )
            .map_err(failed)?;
        note(&transaction, job, state, text).map_err(failed)?;
        transaction.commit().map_err(failed)
    }

    /// Notes what happened, or what stands in the way; nothing clears that.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) fn note_problem(&mut self, job: i64, problem: Option<&str>) -> Result<()> {
        let sql = "UPDATE jobs SET problem = ?2, updated_ms = ?3 WHERE id = ?1";
        let done = self.database.execute(sql, params![job, problem, now_ms()]);
        done.map(drop)
            .map_err(|cause| Error::store("note what became of a job", cause))
    }

    /// How long the source stood still.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) fn note_downtime(&mut self, job: i64, seconds: f64) -> Result<()> {
        let sql = "UPDATE jobs SET downtime = ?2 WHERE id = ?1";
        let done = self.database.execute(sql, params![job, seconds]);
        done.map(drop)
            .map_err(|cause| Error::store("note the downtime of a job", cause))
    }

    /// Takes a number for a cut: durable before anything has it, so that no two cuts share one.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) fn take_number(&mut self, job: i64, at_least: u64) -> Result<u64> {
        let failed = |cause| Error::store("number a cut", cause);
        let at_least = i64::try_from(at_least).unwrap_or(i64::MAX);
        let sql = "UPDATE jobs SET next_number = max(next_number, ?2) + 1 WHERE id = ?1
                   RETURNING next_number - 1";
        let taken: i64 = self
            .database
            .query_row(sql, params![job, at_least], |row| row.get(0))
            .map_err(failed)?;
        Ok(taken.unsigned_abs())
    }

    /// Records what the disks of a job were at its last cut, one for each, in place of what was recorded.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) fn note_origins(&mut self, job: i64, origins: &[Origin]) -> Result<()> {
        let failed = |cause| Error::store("note what the last cut was", cause);
        let transaction = self.database.transaction().map_err(failed)?;
        insert_origins(&transaction, job, origins)?;
        transaction.commit().map_err(failed)
    }

    /// What the disks of a job were at the last cut of it, or of the one before that it leads back from: one for each, or
    /// nothing.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) fn origins(&self, job: i64) -> Result<Vec<Origin>> {
        let failed = |cause| Error::store("look up what the last cut was", cause);
        let sql = "SELECT number, root, changed FROM origins WHERE job = ?1 ORDER BY disk";
        let mut statement = self.database.prepare(sql).map_err(failed)?;
        let rows = statement.query_map([job], |row| {
            let number: i64 = row.get(0)?;
            Ok((number, row.get(1)?, row.get(2)?))
        });
        let origin = |row: rusqlite::Result<(i64, String, String)>| {
            let (number, root, changed) = row.map_err(failed)?;
            let damaged = || {
                let text = format!("the database of jobs: extents {changed:?}: expected ranges");
                Error::new(ErrorKind::Store, text)
            };
            let runs: Vec<[u64; 2]> =
                serde_json::from_str(&changed).map_err(|_no_ranges| damaged())?;
            let mut extents = ExtentSet::new();
            for [start, end] in runs {
                let bytes = end.checked_sub(start).ok_or_else(damaged)?;
                extents.insert(Extent::new(start, bytes).ok_or_else(damaged)?);
            }
            Ok(Origin {
                number: number.unsigned_abs(),
                root,
                changed: extents,
            })
        };
        rows.map_err(failed)?.map(origin).collect()
    }

    /// Records a pass.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) fn add_pass(&mut self, job: i64, pass: &Pass, consistency: &str) -> Result<()> {
        let sql = "INSERT OR REPLACE INTO passes VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
        let bytes = i64::try_from(pass.changed_bytes).unwrap_or(i64::MAX);
        let number = i64::try_from(pass.number).unwrap_or(i64::MAX);
        let values = params![
            job,
            number,
            now_ms(),
            bytes,
            pass.seconds,
            pass.since_last_cut,
            consistency
        ];
        let failed = |cause| Error::store("record a pass", cause);
        let transaction = self.database.transaction().map_err(failed)?;
        transaction.execute(sql, values).map_err(failed)?;
        let sql = "DELETE FROM passes WHERE job = ?1 AND number <= ?2";
        let old = params![job, number.saturating_sub(MOST_PASSES)];
        transaction.execute(sql, old).map_err(failed)?;
        transaction.commit().map_err(failed)
    }

    /// The last passes of a job, the oldest first, each with the time of its end and its consistency.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) fn passes(&self, job: i64) -> Result<Vec<(Pass, i64, String)>> {
        let failed = |cause| Error::store("look up the passes of a job", cause);
        let sql = "SELECT number, changed_bytes, seconds, since_last_cut, ended_ms, consistency FROM passes
                   WHERE job = ?1 ORDER BY number DESC LIMIT ?2";
        let mut statement = self.database.prepare(sql).map_err(failed)?;
        let rows = statement.query_map([job, PASSES], |row| {
            let (number, bytes): (i64, i64) = (row.get(0)?, row.get(1)?);
            let pass = Pass::new(
                number.unsigned_abs(),
                bytes.unsigned_abs(),
                row.get(2)?,
                row.get(3)?,
            );
            Ok((pass, row.get(4)?, row.get(5)?))
        });
        let rows: rusqlite::Result<Vec<_>> = rows.map_err(failed)?.collect();
        let mut passes = rows.map_err(failed)?;
        passes.reverse();
        Ok(passes)
    }

    /// What happened to a job, the oldest first.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) fn events(&self, job: i64) -> Result<Vec<JobEvent>> {
        let failed = |cause| Error::store("look up the events of a job", cause);
        let sql = "SELECT at_ms, state, text FROM events WHERE job = ?1 ORDER BY rowid";
        let mut statement = self.database.prepare(sql).map_err(failed)?;
        let rows = statement.query_map([job], |row| {
            let state: String = row.get(1)?;
            Ok((row.get(0)?, state, row.get(2)?))
        });
        rows.map_err(failed)?
            .map(|row| {
                let (at_ms, state, text) = row.map_err(failed)?;
                let state = parse_state(&state)?;
                Ok(JobEvent { at_ms, state, text })
            })
            .collect()
    }

    /// Leaves a request for whoever works on the job. A problem that is noted from now on is the answer to it.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) fn ask(&mut self, job: i64, request: Request) -> Result<()> {
        let (verb, at_ms) = match request {
            Request::Complete(at_ms) => ("complete", at_ms),
            Request::Cancel => ("cancel", 0),
        };
        let sql = "INSERT INTO requests VALUES (?1, ?2, ?3)";
        let done = self.database.execute(sql, params![job, verb, at_ms]);
        done.map(drop)
            .map_err(|cause| Error::store("leave a request", cause))
    }

    /// Whether a request waits to be taken.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) fn has_request(&self, job: i64) -> Result<bool> {
        let sql = "SELECT EXISTS (SELECT 1 FROM requests WHERE job = ?1)";
        let found = self.database.query_row(sql, [job], |row| row.get(0));
        found.map_err(|cause| Error::store("look for requests", cause))
    }

    /// Takes the oldest request whose time has come; nobody else gets it. What was noted before is no answer to it.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) fn take_request(&mut self, job: i64, now_ms: i64) -> Result<Option<Request>> {
        let failed = |cause| Error::store("take a request", cause);
        let sql = "DELETE FROM requests WHERE rowid =
                     (SELECT rowid FROM requests WHERE job = ?1 AND at_ms <= ?2 ORDER BY rowid LIMIT 1)
                   RETURNING verb, at_ms";
        let transaction = self.database.transaction().map_err(failed)?;
        let taken = transaction
            .query_row(sql, [job, now_ms], |row| {
                let (verb, at_ms): (String, i64) = (row.get(0)?, row.get(1)?);
                Ok(match verb.as_str() {
                    "complete" => Some(Request::Complete(at_ms)),
                    "cancel" => Some(Request::Cancel),
                    _ => None,
                })
            })
            .optional()
            .map_err(failed)?;
        if taken.is_some() {
            let sql = "UPDATE jobs SET problem = NULL WHERE id = ?1";
            transaction.execute(sql, [job]).map_err(failed)?;
        }
        transaction.commit().map_err(failed)?;
        Ok(taken.flatten())
    }

    /// Forgets all requests: the job does not run any more.
    ///
    /// # Errors
    /// The database failed.
    pub(crate) fn drop_requests(&mut self, job: i64) -> Result<()> {
        let dropped = self
            .database
            .execute("DELETE FROM requests WHERE job = ?1", [job]);
        dropped
            .map(drop)
            .map_err(|cause| Error::store("forget requests", cause))
    }
}

/// What the disks of a job were, one row for each.
fn insert_origins(database: &Connection, job: i64, origins: &[Origin]) -> Result<()> {
    let failed = |cause| Error::store("note what the last cut was", cause);
    for (disk, origin) in (0_i64..).zip(origins) {
        let runs: Vec<[u64; 2]> = origin
            .changed
            .iter()
            .map(|e| [e.start(), e.end()])
            .collect();
        let changed = serde_json::to_string(&runs)
            .map_err(|cause| Error::because(ErrorKind::Internal, "note extents", cause))?;
        let number = i64::try_from(origin.number).unwrap_or(i64::MAX);
        let sql = "INSERT OR REPLACE INTO origins VALUES (?1, ?2, ?3, ?4, ?5)";
        let values = params![job, disk, number, origin.root, changed];
        database.execute(sql, values).map_err(failed)?;
    }
    Ok(())
}

fn note(database: &Connection, job: i64, state: State, text: &str) -> rusqlite::Result<()> {
    let sql = "INSERT INTO events VALUES (?1, ?2, ?3, ?4)";
    let values = params![job, now_ms(), state.to_string(), text];
    database.execute(sql, values)?;
    let sql = "DELETE FROM events WHERE rowid IN
                 (SELECT rowid FROM events WHERE job = ?1 ORDER BY rowid DESC LIMIT -1 OFFSET ?2)";
    database.execute(sql, [job, MOST_EVENTS]).map(drop)
}

fn record(row: &Row<'_>) -> rusqlite::Result<Result<JobRecord>> {
    let (state, spec): (String, String) = (row.get("state")?, row.get("spec")?);
    let next: i64 = row.get("next_number")?;
    let (id, name) = (row.get("id")?, row.get("name")?);
    let (operation, problem) = (row.get("operation")?, row.get("problem")?);
    let (created_ms, updated_ms) = (row.get("created_ms")?, row.get("updated_ms")?);
    let downtime_seconds = row.get("downtime")?;
    Ok(parse_state(&state).and_then(|state| {
        Ok(JobRecord {
            id,
            name,
            operation,
            state,
            created_ms,
            updated_ms,
            next_number: next.unsigned_abs(),
            downtime_seconds,
            problem,
            spec: JobSpec::from_toml(&spec)?,
        })
    }))
}

fn parse_state(text: &str) -> Result<State> {
    State::from_str(text).map_err(|why| {
        let text = format!("the database of jobs is damaged: {why}");
        Error::new(ErrorKind::Store, text)
    })
}

pub(crate) fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str) -> JobSpec {
        let text = format!(
            "name = \"{name}\"\n[machine]\nqmp = \"/q\"\n[[disk]]\nnode = \"d\"\ntarget = \"/t\"\n"
        );
        JobSpec::from_toml(&text).unwrap()
    }

    #[test]
    fn a_job_is_there_again_as_it_was_with_all_that_happened() {
        let place = tempfile::tempdir().unwrap();
        let mut store = Store::open(place.path()).unwrap();
        let job = store.create(&spec("web1")).unwrap();
        store
            .move_to(job.id, State::Syncing, "the first pass")
            .unwrap();
        let pass = Pass::new(1, 1 << 40, 1.5, None);
        store.add_pass(job.id, &pass, "crash-consistent").unwrap();
        store.note_problem(job.id, Some("slow")).unwrap();
        assert_eq!(store.take_number(job.id, 0).unwrap(), 1);
        assert_eq!(store.take_number(job.id, 9).unwrap(), 9);
        drop(store);

        let mut store = Store::open(place.path()).unwrap();

        let found = store.find("web1").unwrap().unwrap();
        assert_eq!((found.state, found.next_number), (State::Syncing, 10));
        assert_eq!(
            (found.spec, found.problem.as_deref()),
            (job.spec, Some("slow"))
        );
        assert_eq!(store.passes(job.id).unwrap()[0].0, pass);
        let told: Vec<String> = store
            .events(job.id)
            .unwrap()
            .into_iter()
            .map(|e| e.text)
            .collect();
        assert_eq!(told, ["the job was created", "the first pass"]);
        let refused = store.create(&spec("web1")).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Refused);
        store.move_to(job.id, State::RolledBack, "done").unwrap();
        assert!(store.create(&spec("web1")).unwrap().id > job.id);
    }

    #[test]
    fn a_request_is_taken_once_by_the_job_it_is_for() {
        let place = tempfile::tempdir().unwrap();
        let mut store = Store::open(place.path()).unwrap();
        let (one, other) = (
            store.create(&spec("a")).unwrap().id,
            store.create(&spec("b")).unwrap().id,
        );
        let mut asking = Store::open(place.path()).unwrap();
        asking.ask(one, Request::Complete(77)).unwrap();
        asking.ask(one, Request::Cancel).unwrap();

        let later = 1_000_000;
        assert_eq!(store.take_request(other, later).unwrap(), None);
        // The time of the first has not come.
        assert_eq!(store.take_request(one, 76).unwrap(), Some(Request::Cancel));
        assert_eq!(store.take_request(one, 76).unwrap(), None);
        assert!(store.has_request(one).unwrap());
        store.note_problem(one, Some("old")).unwrap();
        let taken = store.take_request(one, 77).unwrap();
        assert_eq!(taken, Some(Request::Complete(77)));
        assert_eq!(store.load(one).unwrap().problem, None);
        assert!(!store.has_request(one).unwrap());
    }

    #[test]
    fn jobs_are_listed_by_state_operation_and_time() {
        let place = tempfile::tempdir().unwrap();
        let mut store = Store::open(place.path()).unwrap();
        for name in ["a", "b", "c"] {
            store.create(&spec(name)).unwrap();
        }
        let b = store.find("b").unwrap().unwrap();
        store.move_to(b.id, State::Ready, "ready").unwrap();
        let listed = |filter: Filter| -> Vec<String> {
            let jobs = store.list(&filter).unwrap();
            jobs.into_iter().map(|job| job.name).collect()
        };

        assert_eq!(listed(Filter::default()), ["c", "b", "a"]);
        let ready = Filter {
            state: Some(State::Ready),
            ..Filter::default()
        };
        assert_eq!(listed(ready), ["b"]);
        let reverse = Filter {
            operation: Some("reverse".to_owned()),
            ..Filter::default()
        };
        assert_eq!(listed(reverse), Vec::<String>::new());
        let later = Filter {
            from_ms: Some(now_ms() + 10_000),
            ..Filter::default()
        };
        assert_eq!(listed(later), Vec::<String>::new());
        let before = Filter {
            to_ms: Some(b.created_ms + 10_000),
            ..Filter::default()
        };
        assert_eq!(listed(before).len(), 3);
    }

    #[test]
    fn a_job_that_is_refreshed_for_months_keeps_the_last_of_its_story() {
        let place = tempfile::tempdir().unwrap();
        let mut store = Store::open(place.path()).unwrap();
        let other = store.create(&spec("a")).unwrap().id;
        let job = store.create(&spec("b")).unwrap().id;
        let many = "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 5000)
                    INSERT INTO events SELECT ?1, n, 'syncing', 'old' FROM n";
        store.database.execute(many, [job]).unwrap();
        let many = "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 5000)
                    INSERT INTO passes SELECT ?1, n, 0, 0, 0.1, NULL, 'x' FROM n";
        store.database.execute(many, [job]).unwrap();

        store.move_to(job, State::Ready, "new").unwrap();
        store
            .add_pass(job, &Pass::new(5001, 1, 0.1, None), "x")
            .unwrap();

        let events = store.events(job).unwrap();
        assert_eq!(events.len(), 1000);
        assert_eq!(events.last().unwrap().text, "new");
        assert_eq!(store.events(other).unwrap().len(), 1);
        let count = "SELECT count(*) FROM passes";
        let passes: i64 = store
            .database
            .query_row(count, [], |row| row.get(0))
            .unwrap();
        assert_eq!(passes, 1000);
        assert_eq!(store.passes(job).unwrap().last().unwrap().0.number, 5001);
    }

    #[test]
    fn a_way_back_has_what_was_noted_of_the_way_there() {
        let place = tempfile::tempdir().unwrap();
        // As the version before left it.
        let old = Connection::open(place.path().join(FILE_NAME)).unwrap();
        old.execute_batch(SCHEMA).unwrap();
        old.pragma_update(None, "user_version", 1).unwrap();
        drop(old);
        let mut store = Store::open(place.path()).unwrap();
        let job = store.create(&spec("web1")).unwrap();
        assert_eq!(store.origins(job.id).unwrap(), []);
        let mut changed = ExtentSet::new();
        changed.insert(Extent::from_range(4096..8192));
        changed.insert(Extent::from_range(1 << 40..(1 << 40) + 1));
        let origin = |number, changed: &ExtentSet| Origin {
            number,
            root: "00ff".to_owned(),
            changed: changed.clone(),
        };
        let number = store.take_number(job.id, 7).unwrap();
        let noted = [origin(number, &changed), origin(number, &ExtentSet::new())];
        store.note_origins(job.id, &noted).unwrap();
        let before = [origin(9, &changed), origin(9, &changed)];
        store.note_origins(job.id, &before).unwrap();
        store.note_origins(job.id, &noted).unwrap();
        store.move_to(job.id, State::Committed, "").unwrap();

        let back = store.create_way_back(&spec("web1"), &noted).unwrap();

        assert!(back.leads_back() && !job.leads_back());
        assert_eq!(store.origins(back.id).unwrap(), noted);
        assert!(store.take_number(back.id, 0).unwrap() > number);
        let damage = "UPDATE origins SET changed = '[[9,4]]'";
        store.database.execute(damage, []).unwrap();
        let error = store.origins(back.id).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Store, "{error}");
    }

    #[test]
    fn a_database_that_is_none_or_of_another_version_is_refused_with_words() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join(FILE_NAME);
        std::fs::write(&file, vec![b'x'; 8192]).unwrap();
        let error = Store::open(place.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Store, "{error}");

        std::fs::remove_file(&file).unwrap();
        let store = Store::open(place.path()).unwrap();
        store
            .database
            .pragma_update(None, "user_version", 7)
            .unwrap();
        drop(store);
        let error = Store::open(place.path()).unwrap_err().to_string();
        assert!(
            error.contains("version 7") && error.contains("knows 2"),
            "{error}"
        );
    }
}
