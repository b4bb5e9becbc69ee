//! Which parts of a file hold data, read as zeros, or have no space of their own.

use std::fs::File;
use std::io;

use blockferry_core::Extent;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::Status;
use crate::sys;

/// Status at `offset` (less than `size`) and the end of its run, from `SEEK_DATA` and `SEEK_HOLE`.
///
/// Both move the file position, which nothing else here uses.
pub(crate) fn status_at(file: &File, offset: u64, size: u64) -> io::Result<(Status, u64)> {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) if data > offset => Ok((Status::Zero, data.min(size))),
        Ok(_) => {
            let hole = rustix::fs::seek(file, SeekFrom::Hole(offset))?;
            Ok((Status::Data, hole.clamp(offset + 1, size)))
        }
        // No data behind `offset`.
        Err(Errno::NXIO) => Ok((Status::Zero, size)),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok((Status::Data, size)),
        Err(error) => Err(error.into()),
    }
}

/// Runs within `extent` without space of their own, ascending. May reach behind the end of the file.
pub(crate) fn unallocated_runs(file: &File, extent: Extent) -> io::Result<Vec<Extent>> {
    let mut runs = Vec::new();
    let mut at = extent.start();
    while at < extent.end() {
        let (allocated, complete) = allocated_within(file, at, extent.end())?;
        for (start, length) in allocated {
            if start > at {
                runs.push(Extent::from_range(at..start.min(extent.end())));
            }
            at = at.max(start.saturating_add(length)).min(extent.end());
        }
        if complete {
            runs.extend((at < extent.end()).then(|| Extent::from_range(at..extent.end())));
            break;
        }
    }
    Ok(runs)
}

/// Allocated runs from `start` to `end`, and whether these are all.
fn allocated_within(file: &File, start: u64, end: u64) -> io::Result<(Vec<(u64, u64)>, bool)> {
    match sys::allocated_runs(file, start, end - start) {
        Ok(found) => Ok(found),
        // tmpfs and others: unwritten space counts as unallocated there.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY)) => {
            data_within(file, start, end)
        }
        Err(error) => Err(error),
    }
}

fn data_within(file: &File, start: u64, end: u64) -> io::Result<(Vec<(u64, u64)>, bool)> {
    let data = match rustix::fs::seek(file, SeekFrom::Data(start)) {
        Ok(data) if data < end => data,
        Ok(_) | Err(Errno::NXIO) => return Ok((Vec::new(), true)),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok((vec![(start, end - start)], true)),
        Err(error) => return Err(error.into()),
    };
    let hole = rustix::fs::seek(file, SeekFrom::Hole(data))?;
    Ok((vec![(data, hole.max(data + 1) - data)], false))
}
