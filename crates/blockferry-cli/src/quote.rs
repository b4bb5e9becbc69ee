//! Commands that can be pasted into a shell.

use std::path::Path;

use crate::file_url;

/// The word as a shell reads it back.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:@,%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// The path as a shell, and then this command, read it back.
pub(crate) fn quoted_path(path: &Path) -> String {
    quoted(&file_url::text_of(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_paths_stay_as_they_are() {
        assert_eq!(quoted("/dev/disk/by-id/a_b:0"), "/dev/disk/by-id/a_b:0");
    }

    #[test]
    fn a_shell_reads_back_what_was_quoted() {
        for word in ["", "a b", "it's", "$HOME", "a;b", "ü", "*"] {
            let output = std::process::Command::new("sh")
                .args(["-c", &format!("printf %s {}", quoted(word))])
                .output()
                .expect("a shell");
            assert_eq!(String::from_utf8_lossy(&output.stdout), word);
        }
    }
}
