//! Paths as text without loss. A path in UTF-8 is its own text; any other is a `file://` URL, in which `%FF` stands
//! for the byte 255 (RFC 8089). The state of a target records sources as text, and so does every command that is
//! printed to be pasted.

use std::ffi::OsString;
use std::fmt::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

const SCHEME: &str = "file://";

/// The path itself where that is text, else the URL of its absolute form.
pub(crate) fn text_of(path: &Path) -> String {
    match path.to_str() {
        Some(text) => text.to_owned(),
        None => url_of(&std::path::absolute(path).unwrap_or_else(|_| path.to_owned())),
    }
}

/// The URL of an absolute path.
pub(crate) fn url_of(path: &Path) -> String {
    format!("{SCHEME}{}", escaped(path))
}

/// The path as it stands in a URL.
pub(crate) fn escaped(path: &Path) -> String {
    let mut url = String::new();
    for chunk in path.as_os_str().as_bytes().utf8_chunks() {
        for character in chunk.valid().chars() {
            if stands_for_itself(character) {
                url.push(character);
            } else {
                escape(&mut url, character.encode_utf8(&mut [0; 4]).as_bytes());
            }
        }
        escape(&mut url, chunk.invalid());
    }
    url
}

/// Characters that neither a URL nor a shell takes for something else.
fn stands_for_itself(character: char) -> bool {
    character.is_alphanumeric() || "/-._~".contains(character)
}

fn escape(url: &mut String, bytes: &[u8]) {
    for byte in bytes {
        write!(url, "%{byte:02X}").expect("a string takes everything");
    }
}

/// The path of a word that is one, or such a URL.
pub(crate) fn path_or_url(word: OsString) -> Result<PathBuf, &'static str> {
    match word.to_str().and_then(path_of) {
        Some(path) => path,
        None => Ok(PathBuf::from(word)),
    }
}

/// The path that a `file://` URL means; nothing if it is no such URL, the error what is wrong with it.
pub(crate) fn path_of(text: &str) -> Option<Result<PathBuf, &'static str>> {
    let path = text.strip_prefix(SCHEME)?;
    Some(if path.starts_with('/') {
        unescaped(path).map(|bytes| PathBuf::from(OsString::from_vec(bytes)))
    } else {
        Err("expected a path that begins with / and no host after file://")
    })
}

/// What [`escaped`] made of a path.
pub(crate) fn unescaped(text: &str) -> Result<Vec<u8>, &'static str> {
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let code = part
            .get(..2)
            .filter(|c| c.bytes().all(|b| b.is_ascii_hexdigit()));
        let byte = code.and_then(|code| u8::from_str_radix(code, 16).ok());
        match byte {
            Some(0) => return Err("no path contains the byte 0"),
            Some(byte) => bytes.push(byte),
            None => return Err("expected two hexadecimal digits after each %"),
        }
        bytes.extend_from_slice(&part.as_bytes()[2..]);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use blockferry_testkit::Random;

    use super::*;

    #[test]
    fn text_stays_as_it_is() {
        for path in ["/a/b", "relative", "/größe 100%", "/a%20b", "/new\nline"] {
            assert_eq!(text_of(Path::new(path)), path);
        }
    }

    #[test]
    fn what_is_no_text_becomes_a_url_that_can_be_read() {
        let path = Path::new(OsStr::from_bytes(b"/disks/gr\xc3\xb6\xc3\x9fe \xff'%"));

        assert_eq!(text_of(path), "file:///disks/größe%20%FF%27%25");
    }

    #[test]
    fn a_url_means_exactly_the_path_it_was_made_of() {
        let mut random = Random::new(17);
        for _ in 0..2000 {
            let mut bytes = vec![0; usize::try_from(random.below(12)).expect("small")];
            random.fill(&mut bytes);
            // The first makes it no text, and 0 is not allowed in paths.
            bytes.retain(|byte| *byte != 0);
            let path = [b"/\xff", &bytes[..]].concat();
            let path = Path::new(OsStr::from_bytes(&path));

            let url = text_of(path);

            assert_eq!(path_of(&url).expect(&url).expect(&url), path, "{url}");
        }
    }

    #[test]
    fn urls_that_mean_no_local_path_are_refused() {
        for url in [
            "file://host/a",
            "file://",
            "file:///a%",
            "file:///a%f",
            "file:///%+1",
            "file:///%00",
            "file:///%é",
        ] {
            assert!(path_of(url).expect("the scheme").is_err(), "{url}");
        }
        assert!(path_of("/a/file:///b").is_none());
    }
}
