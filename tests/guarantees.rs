//! `docs/guarantees.md` is run: each promise names the tests that keep it, and these are there.
//!
//! A promise is a row of a table with the head `promise | test`. A test is named as the test runner names it, behind the
//! name of its program for those under `tests/`: `mount::every_write...` is in `tests/mount.rs`, `it::faults::...` in
//! `tests/it/faults.rs`, `store::publish::...` in `src/store/publish.rs` or a file of tests below it. A file alone, as in
//! `it::venv`, stands for all of its tests.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A promise, and the tests that are said to keep it.
#[derive(Debug, PartialEq, Eq)]
struct Promise {
    line: usize,
    text: String,
    tests: Vec<String>,
}

/// The promises of a document, or what is wrong with it.
fn promises(text: &str) -> Result<Vec<Promise>, String> {
    let mut found = Vec::new();
    // How many lines of the table are above: its head and the rule below it are none of its rows.
    let mut above = 0;
    for (number, line) in (1..).zip(text.lines()) {
        let Some(row) = line.trim().strip_prefix('|') else {
            above = 0;
            continue;
        };
        above += 1;
        let cells: Vec<&str> = row.trim_end_matches('|').split('|').map(str::trim).collect();
        let [promise, tests] = cells[..] else { return Err(format!("line {number}: not a promise and its tests")) };
        match above {
            1 if (promise, tests) == ("promise", "test") => continue,
            1 => return Err(format!("line {number}: a table without its head: is there an empty line above?")),
            2 => continue,
            _ => {}
        }
        let tests: Vec<String> = match tests.split(", ").map(|test| test.strip_prefix('`')?.strip_suffix('`')).collect()
        {
            Some(tests) => Vec::<&str>::into_iter(tests).map(String::from).collect(),
            None => return Err(format!("line {number}: {promise:?} names no test")),
        };
        if promise.is_empty() || tests.iter().any(|test| test.is_empty() || test.contains(['`', ' '])) {
            return Err(format!("line {number}: not a promise and its tests"));
        }
        found.push(Promise { line: number, text: promise.into(), tests });
    }
    Ok(found)
}

/// The files that `modules` may be in, below the repository.
fn places(modules: &[&str]) -> Vec<String> {
    let path = modules.join("/");
    vec![
        format!("tests/{path}.rs"),
        format!("tests/{path}/main.rs"),
        format!("src/{path}.rs"),
        format!("src/{path}/tests.rs"),
    ]
}

/// Why `test` is not one that is run; none when it is. `sources` are all files by their path.
fn missing(test: &str, sources: &BTreeMap<String, String>) -> Option<String> {
    let parts: Vec<&str> = test.split("::").collect();
    let (name, modules) = parts.split_last()?;
    let here = |places: Vec<String>| places.into_iter().filter_map(|place| sources.get(&place)).collect::<Vec<_>>();
    // All tests of a file.
    let whole = here(places(&parts));
    if !whole.is_empty() {
        let has_tests = whole.iter().any(|text| text.contains("#[test]"));
        return (!has_tests).then(|| format!("{test} has no tests"));
    }
    let files = here(places(modules));
    if files.is_empty() {
        return Some(format!("there is no file for {test}"));
    }
    match files.iter().find_map(|text| attributes_of(name, text)) {
        Some(Attributes { is_test: true, is_ignored: false }) => None,
        Some(Attributes { is_test: true, .. }) => Some(format!("{test} is not run")),
        _ => Some(format!("{test} is no test")),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Attributes {
    is_test: bool,
    is_ignored: bool,
}

/// What stands above function `name` in `text`, where it is there.
fn attributes_of(name: &str, text: &str) -> Option<Attributes> {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let begins = format!("fn {name}(");
    let at = lines.iter().position(|line| line.starts_with(&begins))?;
    let above = lines[..at].iter().rev().take_while(|line| line.starts_with("#[") || line.starts_with("//"));
    let above: Vec<&&str> = above.collect();
    let has = |attribute: &str| above.iter().any(|line| line.starts_with(attribute));
    Some(Attributes { is_test: has("#[test]"), is_ignored: has("#[ignore") })
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut dirs: Vec<PathBuf> = ["src", "tests"].map(|dir| root().join(dir)).into();
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
                found.insert(name, fs::read_to_string(&path).unwrap());
            }
        }
    }
    found
}

#[test]
fn every_promise_names_tests_that_are_there_and_are_run() {
    let sources = sources();
    let text = fs::read_to_string(root().join("docs/guarantees.md")).unwrap();
    let promises = promises(&text).unwrap();
    let wrong: Vec<String> = promises
        .iter()
        .flat_map(|promise| promise.tests.iter().map(move |test| (promise.line, test)))
        .filter_map(|(line, test)| Some(format!("line {line}: {}", missing(test, &sources)?)))
        .collect();
    assert!(wrong.is_empty(), "docs/guarantees.md: {wrong:#?}");
    assert!(promises.len() > 120, "{}: were promises taken away?", promises.len());
    let mut texts: Vec<&str> = promises.iter().map(|promise| &*promise.text).collect();
    texts.sort_unstable();
    assert!(texts.windows(2).all(|two| two[0] != two[1]), "a promise is there twice");
}

#[test]
fn a_promise_without_a_test_is_told() {
    let page = |row: &str| format!("# Page\n\n| promise | test |\n|---|---|\n{row}\n\ntext\n");
    let found = promises(&page("| It works | `it::venv`, `mount::a_b` |")).unwrap();
    assert_eq!(
        found,
        [Promise { line: 5, text: "It works".into(), tests: vec!["it::venv".into(), "mount::a_b".into()] }]
    );
    for row in [
        "| It works | |",
        "| It works |",
        "| It works | venv |",
        "| It works | `a` and `b` |",
        "| | `a` |",
        "| x | `` |",
    ] {
        assert!(promises(&page(row)).unwrap_err().starts_with("line 5"), "{row}");
    }
    let torn = page("| One | `a` |\n\n| Two | `b` |");
    assert!(promises(&torn).unwrap_err().contains("empty line"));
}

#[test]
fn a_test_that_is_gone_ignored_or_elsewhere_is_told() {
    let text = "#[test]\nfn runs() {}\n\n#[test]\n#[ignore = \"slow\"]\nfn rests() {}\n\nfn helps() {}\n";
    let files = [
        ("tests/mount.rs", text),
        ("src/store/seal.rs", text),
        ("src/view.rs", "fn f() {}"),
        ("tests/it/main.rs", text),
    ];
    let sources = files.map(|(path, text)| (path.to_string(), text.to_string())).into();
    for there in ["mount::runs", "store::seal::runs", "it::runs", "mount", "store::seal"] {
        assert_eq!(missing(there, &sources), None, "{there}");
    }
    for (wrong, why) in [
        ("mount::rests", "is not run"),
        ("mount::helps", "is no test"),
        ("mount::gone", "is no test"),
        ("mount::run", "is no test"),
        ("view::runs", "is no test"),
        ("seal::runs", "no file"),
        ("runs", "no file"),
        ("view", "has no tests"),
        ("gone::runs", "no file"),
    ] {
        assert!(missing(wrong, &sources).is_some_and(|told| told.contains(why)), "{wrong}");
    }
}
