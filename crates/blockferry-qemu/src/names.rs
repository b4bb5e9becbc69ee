//! The names of what is added to a machine.
//!
//! QEMU allows 31 bytes for the name of a node. What belongs to cut 7 of job `web1` is called `bf-web1-f7-0` (the overlay
//! that keeps what disk 0 overwrites), `bf-web1-j7-0` (the job that fills it), `bf-web1-e7-0` (its export), and
//! `bf-web1-b7` (the bitmap on each disk). `bf-web1-tls` are the credentials with which memory travels.

use std::fmt;
use std::str::FromStr;

use blockferry_device::{Error, ErrorKind, Result};

/// Longest tag: with a number of seven digits and a disk of two, a node's name has 31 bytes.
const MAX_TAG_BYTES: usize = 16;
/// The largest number of a cut.
pub(crate) const MAX_NUMBER: u64 = 9_999_999;
/// Most disks of a machine that share a cut.
pub(crate) const MAX_DISKS: usize = 100;
const LONGEST_NODE_NAME: usize = 31;
const _: () =
    assert!("bf-".len() + MAX_TAG_BYTES + "-f".len() + 7 + "-99".len() == LONGEST_NODE_NAME);

/// Tells what belongs to one job from what belongs to another: 1 to 16 of `a` to `z`, `0` to `9` and `-`, beginning with a
/// letter or digit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tag(String);

impl FromStr for Tag {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let allowed = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        let fits = (1..=MAX_TAG_BYTES).contains(&text.len())
            && text.bytes().all(allowed)
            && !text.starts_with('-');
        if fits {
            return Ok(Self(text.to_owned()));
        }
        let text = format!(
            "name {text:?}: expected 1 to {MAX_TAG_BYTES} of a-z, 0-9 and -, not beginning with -"
        );
        Err(Error::new(ErrorKind::Unsuitable, text))
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a thing of ours is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The file below an overlay.
    File,
    /// The overlay that keeps what is overwritten.
    Overlay,
    /// What fills it.
    Job,
    Export,
}

impl Kind {
    fn letter(self) -> char {
        match self {
            Self::File => 'i',
            Self::Overlay => 'f',
            Self::Job => 'j',
            Self::Export => 'e',
        }
    }
}

impl Tag {
    pub(crate) fn of(&self, kind: Kind, number: u64, disk: usize) -> String {
        format!("bf-{self}-{}{number}-{disk}", kind.letter())
    }

    pub(crate) fn bitmap(&self, number: u64) -> String {
        format!("bf-{self}-b{number}")
    }

    pub(crate) fn credentials(&self) -> String {
        format!("bf-{self}-tls")
    }

    /// The number of the cut, if this is the name of a bitmap of this job.
    pub(crate) fn number_of_bitmap(&self, name: &str) -> Option<u64> {
        let digits = name.strip_prefix(&format!("bf-{self}-b"))?;
        number(digits)
    }

    /// Whether a thing of this kind and name belongs to this job.
    pub(crate) fn owns(&self, kind: Kind, name: &str) -> bool {
        let rest = name.strip_prefix(&format!("bf-{self}-{}", kind.letter()));
        let parts = rest.and_then(|rest| rest.split_once('-'));
        parts.is_some_and(|(cut, disk)| number(cut).is_some() && number(disk).is_some())
    }

    /// The name of the file that an overlay lies in, and its ending.
    pub(crate) fn overlay_file(&self, number: u64, disk: usize) -> String {
        format!("{}.qcow2", self.of(Kind::Overlay, number, disk))
    }

    pub(crate) fn owns_file(&self, name: &str) -> bool {
        name.strip_suffix(".qcow2")
            .is_some_and(|overlay| self.owns(Kind::Overlay, overlay))
    }
}

fn number(digits: &str) -> Option<u64> {
    let is_plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    digits.parse().ok().filter(|_| is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_tell_jobs_apart() {
        let long: Tag = "a234567890123456".parse().unwrap();
        let name = long.of(Kind::Overlay, MAX_NUMBER, MAX_DISKS - 1);
        assert_eq!(name.len(), LONGEST_NODE_NAME);
        assert!(long.owns(Kind::Overlay, &name) && !long.owns(Kind::Export, &name));

        let (web, web1): (Tag, Tag) = ("web".parse().unwrap(), "web-1".parse().unwrap());
        assert_eq!(web.number_of_bitmap(&web1.bitmap(3)), None);
        assert_eq!(web1.number_of_bitmap(&web1.bitmap(3)), Some(3));
        assert!(!web.owns(Kind::Job, &web1.of(Kind::Job, 3, 0)));
        assert!(web.owns_file(&web.overlay_file(3, 0)) && !web.owns_file("bf-web-f3-0"));
    }

    #[test]
    fn what_is_no_tag_is_refused() {
        for text in ["", "-a", "A", "a_b", "a b", "a2345678901234567", "ä"] {
            let error = text.parse::<Tag>().expect_err(text);
            assert!(error.to_string().contains("expected"), "{error}");
        }
    }
}
