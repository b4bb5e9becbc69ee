//! Keeps `docs/command-line.md` true: same verbs, same options, same exit codes as the definition.

use std::collections::{BTreeMap, BTreeSet};

use clap::{Command, CommandFactory};

use crate::arguments::Cli;
use crate::exit::Exit;

fn page() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/command-line.md");
    std::fs::read_to_string(path).expect("the page is in the repository")
}

/// The body under each heading of this level.
fn sections<'a>(page: &'a str, level: &str) -> BTreeMap<&'a str, &'a str> {
    let mark = format!("\n{level} ");
    let body = |section: &'a str| section.split("\n## ").next().unwrap_or(section);
    let parts = page.split(mark.as_str()).skip(1);
    parts
        .filter_map(|part| part.split_once('\n'))
        .map(|(title, rest)| (title, body(rest)))
        .collect()
}

/// The first cells of the tables of a section; alternatives inside a cell are separated by `\|`.
fn first_cells(section: &str) -> impl Iterator<Item = &str> {
    section
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split(" |").next())
}

fn long_options(cells: &str) -> BTreeSet<String> {
    let option = |word: &str| {
        word.trim_matches(|c| "`,".contains(c))
            .strip_prefix("--")
            .map(str::to_owned)
    };
    cells.split_whitespace().filter_map(option).collect()
}

fn documented_options(section: &str) -> BTreeSet<String> {
    first_cells(section).flat_map(long_options).collect()
}

fn defined_options(command: &Command, global: bool) -> BTreeSet<String> {
    command
        .get_arguments()
        .filter(|argument| argument.is_global_set() == global)
        .filter_map(|argument| argument.get_long())
        .filter(|&long| long != "help" && long != "version")
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_verb_and_no_other_is_documented_with_its_options() {
    let page = page();
    let documented: BTreeMap<String, BTreeSet<String>> = sections(&page, "###")
        .into_iter()
        .map(|(title, body)| (title.trim_matches('`').to_owned(), documented_options(body)))
        .collect();

    let defined: BTreeMap<String, BTreeSet<String>> = Cli::command()
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
        .map(|command| {
            (
                command.get_name().to_owned(),
                defined_options(command, false),
            )
        })
        .collect();

    assert_eq!(documented, defined);
}

#[test]
fn the_options_of_every_verb_are_documented() {
    let page = page();

    let documented = documented_options(sections(&page, "##")["Options of every verb"]);

    assert_eq!(documented, defined_options(&Cli::command(), true));
}

#[test]
fn the_exit_codes_are_documented() {
    let page = page();
    let table = sections(&page, "##")["Exit codes"];
    let documented: BTreeSet<u8> = first_cells(table)
        .flat_map(|cell| cell.split(", "))
        .filter_map(|code| code.parse().ok())
        .collect();

    let defined = [
        Exit::Done,
        Exit::Differs,
        Exit::Usage,
        Exit::Source,
        Exit::Target,
        Exit::Interrupted,
        Exit::DecisionPending,
        Exit::Corruption,
        Exit::Peer,
        Exit::Hook,
        Exit::Internal,
        Exit::Signal(2),
        Exit::Signal(15),
    ];

    assert_eq!(documented, defined.map(Exit::code).into());
}
