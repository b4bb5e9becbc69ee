//! What the documents say about the tree is true: links lead somewhere, decisions are numbered, the tests
//! that a guarantee names exist, and nothing points to a place that only one machine has.

use std::collections::BTreeSet;
use std::fs;

use blockferry_tests::{project_files, texts_with_extension, workspace_root};

#[test]
fn relative_links_in_documents_resolve() {
    let mut broken = Vec::new();

    for (path, text) in texts_with_extension("md") {
        let directory = path.parent().expect("a file lies in a directory");
        for link in links(&text).filter(|link| !is_external(link)) {
            let file = link.split('#').next().unwrap_or_default();
            if !file.is_empty() && !directory.join(file).exists() {
                broken.push(format!("{}: {link}", path.display()));
            }
        }
    }

    assert!(
        broken.is_empty(),
        "links that lead nowhere:\n{}",
        broken.join("\n")
    );
}

#[test]
fn links_are_found_outside_of_code_only() {
    let text = "see [a](one.md) and [b](two.md#part)\n```\nbuffers[i](not.md)\n```\n[c](https://example.org)";

    let found: Vec<&str> = links(text).collect();

    assert_eq!(found, ["one.md", "two.md#part", "https://example.org"]);
}

#[test]
fn decisions_are_numbered_without_gaps() {
    let directory = workspace_root().join("docs/decisions");
    let mut names: Vec<String> = fs::read_dir(&directory)
        .expect("docs/decisions can be listed")
        .map(|entry| {
            entry
                .expect("docs/decisions can be listed")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();

    for (index, name) in names.iter().enumerate() {
        let number = format!("{:04}", index + 1);
        assert!(
            name.starts_with(&format!("{number}-")),
            "{name} where {number} is expected"
        );
        let text = fs::read_to_string(directory.join(name)).expect("a decision is text");
        assert!(
            text.starts_with(&format!("# {number} ")),
            "the title of {name} has another number"
        );
    }
    assert!(!names.is_empty(), "there are no decisions");
}

#[test]
fn every_test_that_a_guarantee_names_exists() {
    let text = guarantees();
    let existing = test_names();

    let missing: Vec<&str> = named_tests(&text)
        .filter(|name| !existing.contains(*name))
        .collect();

    assert!(named_tests(&text).count() > 100, "few names were found");
    assert!(
        missing.is_empty(),
        "docs/guarantees.md names tests that do not exist: {missing:?}"
    );
}

#[test]
fn every_promise_names_a_test_that_proves_it() {
    let text = guarantees();
    let promises: Vec<&str> = table_rows(&text, "## Promises and their tests").collect();

    let unproven: Vec<&&str> = promises
        .iter()
        .filter(|row| named_tests(row).next().is_none())
        .collect();

    assert!(promises.len() > 20, "the table of promises was not found");
    assert!(
        unproven.is_empty(),
        "promises without a test: {unproven:#?}"
    );
}

#[test]
fn names_of_tests_are_told_from_other_code_in_a_document() {
    let text = "| `--dry-run` | `it_holds_at_all_times`, `a_run_2_ends_well` | `SOME_LONG_UPPER_CASE`, `fn_x` |";
    let code =
        "#[test]\nfn one_is_one() {}\nfn helper_of_the_tests() {}\n#[test]\n#[ignore]\nfn two() {}";

    let named: Vec<&str> = named_tests(text).collect();

    assert_eq!(named, ["it_holds_at_all_times", "a_run_2_ends_well"]);
    assert_eq!(tests_in(code), ["one_is_one", "two"]);
}

#[test]
fn no_file_points_into_somebodys_own_directories() {
    // Put together here, so that this file passes its own test.
    let place = ["/wo", "rk/"].concat();

    for path in project_files() {
        let bytes = fs::read(&path).unwrap_or_else(|e| panic!("reading {}: {e}", path.display()));
        let text = String::from_utf8_lossy(&bytes);
        assert!(
            !text.contains(&place),
            "{} names a path below {place}",
            path.display()
        );
    }
}

/// The targets of `[text](target)` in a document, code blocks left out.
fn links(text: &str) -> impl Iterator<Item = &str> {
    // Text between fences has an odd index.
    text.split("```").step_by(2).flat_map(|prose| {
        prose
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split_once(')').map(|(target, _)| target))
    })
}

fn is_external(link: &str) -> bool {
    link.contains("://") || link.starts_with("mailto:")
}

fn guarantees() -> String {
    fs::read_to_string(workspace_root().join("docs/guarantees.md"))
        .expect("docs/guarantees.md is text")
}

/// What stands between backticks and is named as tests are: at least four words joined by underscores.
fn named_tests(text: &str) -> impl Iterator<Item = &str> {
    let is_part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    // Code has an odd index.
    let code = text.split('`').skip(1).step_by(2);
    code.filter(move |name| name.chars().all(is_part) && name.matches('_').count() >= 3)
}

/// The rows of the first table below a heading, without the table's own.
fn table_rows<'t>(text: &'t str, heading: &str) -> impl Iterator<Item = &'t str> {
    let section = text.split(heading).nth(1).unwrap_or_default();
    let section = section.split("\n## ").next().unwrap_or_default();
    section.lines().filter(|line| line.starts_with('|')).skip(2)
}

/// The names of all tests in the Rust files of the project.
fn test_names() -> BTreeSet<String> {
    texts_with_extension("rs")
        .iter()
        .flat_map(|(_, text)| tests_in(text))
        .collect()
}

fn tests_in(text: &str) -> Vec<String> {
    text.split("#[test]")
        .skip(1)
        .filter_map(|rest| rest.split_once("fn "))
        .filter_map(|(_, name)| {
            name.split(|c: char| !c.is_alphanumeric() && c != '_')
                .next()
        })
        .map(ToOwned::to_owned)
        .collect()
}
