//! What the documentation says is looked at.

use std::fs;
use std::path::{Path, PathBuf};

fn files(dir: &Path, suffix: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, suffix, found);
        } else if path.to_string_lossy().ends_with(suffix) {
            found.push(path);
        }
    }
}

#[test]
fn every_promise_names_a_test_that_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut sources = Vec::new();
    files(&root.join("src"), ".rs", &mut sources);
    files(&root.join("tests"), ".rs", &mut sources);
    let sources: Vec<(String, String)> =
        sources.iter().map(|p| (p.display().to_string(), fs::read_to_string(p).unwrap())).collect();
    let text = fs::read_to_string(root.join("docs/guarantees.md")).unwrap();
    let mut promises = 0;
    for line in text.lines().filter(|l| l.starts_with("| ") && !l.starts_with("| promise")) {
        let cell = line.trim_end_matches([' ', '|']).rsplit('|').next().unwrap().trim();
        let names =
            cell.strip_prefix('`').and_then(|c| c.strip_suffix('`')).unwrap_or_else(|| panic!("no test: {line}"));
        for name in names.split("`, `") {
            let last = name.rsplit("::").next().unwrap();
            let is_test = |text: &str| {
                // A property has arguments.
                let at = text.find(&format!("fn {last}("));
                at.is_some_and(|at| text[..at].trim_end().ends_with("#[test]"))
            };
            let is_module = |path: &str, text: &str| path.ends_with(&format!("/{last}.rs")) && text.contains("#[test]");
            assert!(sources.iter().any(|(path, text)| is_test(text) || is_module(path, text)), "no such test: {name}");
        }
        promises += 1;
    }
    assert!(promises > 30, "{promises}");
}

#[test]
fn links_between_documents_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut documents = vec![root.join("README.md")];
    files(&root.join("docs"), ".md", &mut documents);
    for document in documents {
        let text = fs::read_to_string(&document).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let path = document.parent().unwrap().join(target);
            assert!(path.exists(), "{}: {link} leads nowhere", document.display());
        }
    }
}
