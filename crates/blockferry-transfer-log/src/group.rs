//! The group decision: several disks of one machine share one cut (I12).
//!
//! Every member reaches PREPARED(group); then one record, in a directory of the job's own, commits them all.
//! A prepared member without that record is aborted.

use std::sync::Arc;

use blockferry_core::{Decoder, Encoder};
use blockferry_device::{ReadRequest, StorageDir};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{FORMAT_VERSION, PAGE, SessionId};

const MAGIC: &[u8; 8] = b"BFRYGRP\0";

/// Most disks of one group: their ids fit one page.
const MAX_MEMBERS: usize = 200;

/// Names a group of disks that share one cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GroupId(pub(crate) [u8; 16]);

impl GroupId {
    /// From 16 random bytes, not all zero.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The 16 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

/// Proof that a group's record is durable.
#[derive(Clone, Copy, Debug)]
pub struct GroupCommitted {
    pub(crate) group: GroupId,
}

/// What a group's record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "callers decide for each")]
pub enum Verdict {
    /// All members are committed.
    Committed,
    /// None is: the record was never durable, and whoever could write it is gone.
    Aborted,
    /// The job's state cannot be reached.
    Unknown,
}

/// Answers for prepared members whose group decides.
pub trait GroupVerdicts {
    /// The verdict on a group. [`Verdict::Aborted`] only if no one can commit it any more.
    ///
    /// # Errors
    /// The job's state failed.
    fn verdict(&self, group: GroupId) -> Result<Verdict>;
}

/// The directory where a job keeps its group records.
#[derive(Clone, Debug)]
pub struct GroupDirectory {
    dir: Arc<dyn StorageDir>,
}

impl GroupDirectory {
    /// Uses `dir`, which the caller has locked.
    #[must_use]
    pub fn new(dir: Arc<dyn StorageDir>) -> Self {
        Self { dir }
    }

    /// Commits a group whose members are all prepared: the only commit point of the group.
    ///
    /// # Errors
    /// The record could not be made durable; whether it counts is known after the next open.
    pub fn commit(&self, group: GroupId, members: &[SessionId]) -> Result<GroupCommitted> {
        let name = name_of(group);
        let failed = |e| Error::log(format!("write group record {name}"), e);
        if members.len() > MAX_MEMBERS {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("a group of {} disks: at most {MAX_MEMBERS}", members.len()),
            ));
        }
        let page = encode(group, members);
        let unnamed = unnamed(group);
        self.dir.remove(&unnamed).map_err(failed)?;
        let file = self.dir.create(&unnamed).map_err(failed)?;
        // Twice: a sector that goes bad later must not take the decision back for some of the members.
        file.write_at(0, &[&page[..], &page[..]].concat())
            .map_err(failed)?;
        file.flush().map_err(failed)?;
        // It gets its name when it is whole and durable: what has the name and cannot be read is damaged, and not a
        // decision that was never made.
        self.dir.rename_new(&unnamed, &name).map_err(failed)?;
        self.dir.sync().map_err(failed)?;
        Ok(GroupCommitted { group })
    }

    /// Removes a group's record, once every member has reached its outcome.
    ///
    /// # Errors
    /// The directory failed.
    pub fn retire(&self, group: GroupId) -> Result<()> {
        for name in [name_of(group), unnamed(group)] {
            self.dir
                .remove(&name)
                .map_err(|e| Error::log(format!("remove group record {name}"), e))?;
        }
        Ok(())
    }

    /// Removes all records, once every disk that may ask for one was opened and has reached its outcome.
    ///
    /// # Errors
    /// The directory failed.
    pub fn clear(&self) -> Result<()> {
        let failed = |e| Error::log("remove group records", e);
        for name in self.dir.names().map_err(failed)? {
            if name.ends_with(".group") || name.ends_with(".group.new") {
                self.dir.remove(&name).map_err(failed)?;
            }
        }
        Ok(())
    }
}

impl GroupVerdicts for GroupDirectory {
    fn verdict(&self, group: GroupId) -> Result<Verdict> {
        let name = name_of(group);
        let failed = |e| Error::log(format!("read group record {name}"), e);
        let Some(file) = self.dir.open(&name).map_err(failed)? else {
            return Ok(Verdict::Aborted);
        };
        // What the page cache shows decides nothing before it and its name are durable.
        file.flush().map_err(failed)?;
        self.dir.sync().map_err(failed)?;
        let mut page = vec![0; PAGE];
        let mut damaged = Error::corrupt(format!("group record {name}: no copy of it can be read"));
        for copy in 0..2 {
            let offset = copy * PAGE as u64;
            let mut request = [ReadRequest {
                offset,
                buffer: &mut page,
            }];
            match file.read_medium(&mut request) {
                Ok(()) => {}
                // Cut off: damaged, and no failure of the medium that may pass.
                Err(cause) if cause.kind() == blockferry_device::ErrorKind::OutOfRange => continue,
                Err(cause) => {
                    damaged = failed(cause);
                    continue;
                }
            }
            match decode(&page, &name) {
                Ok(found) if found == group => return Ok(Verdict::Committed),
                Err(error) if error.kind() == ErrorKind::UnknownVersion => damaged = error,
                Ok(_) | Err(_) => {}
            }
        }
        Err(damaged)
    }
}

fn name_of(group: GroupId) -> String {
    format!("{}.group", SessionId::from_bytes(*group.as_bytes()))
}

fn unnamed(group: GroupId) -> String {
    format!("{}.new", name_of(group))
}

fn encode(group: GroupId, members: &[SessionId]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(PAGE);
    let mut e = Encoder::new(&mut bytes);
    e.bytes(MAGIC);
    e.u32(FORMAT_VERSION);
    e.bytes(group.as_bytes());
    e.count(members.len());
    members.iter().for_each(|m| {
        e.bytes(m.as_bytes());
    });
    crate::format::seal(bytes)
}

fn decode(page: &[u8], name: &str) -> Result<GroupId> {
    let damaged = |what: &str| Error::corrupt(format!("group record {name}: {what}"));
    let (body, _) = crate::format::unseal(page).ok_or_else(|| damaged("checksum mismatch"))?;
    let short = |e: blockferry_core::Error| damaged(&e.to_string());
    let mut d = Decoder::new(body);
    if d.array::<8>().map_err(short)? != *MAGIC {
        return Err(damaged("it is something else"));
    }
    let version = d.u32().map_err(short)?;
    if version != FORMAT_VERSION {
        return Err(Error::new(
            ErrorKind::UnknownVersion,
            format!(
                "group record {name}: format version {version}, this build reads {FORMAT_VERSION}"
            ),
        ));
    }
    d.array().map(GroupId::from_bytes).map_err(short)
}
