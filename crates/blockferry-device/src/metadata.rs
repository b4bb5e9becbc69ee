//! Copies what a file is besides its content: owner, mode, ACL, extended attributes, times.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::{Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

/// Makes `to` look like `from`. ACLs and file capabilities are extended attributes.
pub(crate) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let origin = rustix::fs::fstat(from)?;
    let found = rustix::fs::fstat(to)?;
    if (origin.st_uid, origin.st_gid) != (found.st_uid, found.st_gid) {
        let (owner, group) = (Uid::from_raw(origin.st_uid), Gid::from_raw(origin.st_gid));
        rustix::fs::fchown(to, Some(owner), Some(group))?;
    }
    // After the owner: changing that clears the set-user-ID bit and file capabilities.
    rustix::fs::fchmod(to, Mode::from_raw_mode(origin.st_mode))?;
    copy_attributes(from, to)?;
    // Last: everything above changes times.
    let at = |tv_sec, tv_nsec: u64| -> io::Result<Timespec> {
        let tv_nsec = tv_nsec.try_into().map_err(io::Error::other)?;
        Ok(Timespec { tv_sec, tv_nsec })
    };
    let times = Timestamps {
        last_access: at(origin.st_atime, origin.st_atime_nsec)?,
        last_modification: at(origin.st_mtime, origin.st_mtime_nsec)?,
    };
    Ok(rustix::fs::futimens(to, &times)?)
}

fn copy_attributes(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let wanted = attribute_names(from)?;
    for name in attribute_names(to)?
        .iter()
        .filter(|name| !wanted.contains(name))
    {
        rustix::fs::fremovexattr(to, name.as_c_str())?;
    }
    for name in wanted {
        let value = attribute(from, &name)?;
        // Security labels are often the same already where setting them is not allowed.
        if value.is_some() && attribute(to, &name)? != value {
            let value = value.unwrap_or_default();
            rustix::fs::fsetxattr(to, name.as_c_str(), &value, XattrFlags::empty())?;
        }
    }
    Ok(())
}

fn attribute_names(file: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    let mut list = match rustix::fs::flistxattr_query(file) {
        Ok(length) => vec![0; length],
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let length = rustix::fs::flistxattr(file, &mut list[..])?;
    let names = list[..length].split_inclusive(|&byte| byte == 0);
    Ok(names
        .filter_map(|n| CStr::from_bytes_with_nul(n).ok())
        .map(CStr::to_owned)
        .collect())
}

fn attribute(file: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<Vec<u8>>> {
    let mut value = match rustix::fs::fgetxattr_query(file, name) {
        Ok(length) => vec![0; length],
        Err(Errno::NODATA) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let length = rustix::fs::fgetxattr(file, name, &mut value[..])?;
    value.truncate(length);
    Ok(Some(value))
}
