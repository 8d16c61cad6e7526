//! Trees as sorted lists of what is in them, for comparing.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use sha2::{Digest, Sha256};

/// Kind, mode and content of one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    Dir { mode: u32 },
    File { mode: u32, size: u64, sha256: String },
    Symlink { target: Vec<u8> },
}

/// Everything below `root`, by path relative to it.
pub fn walk(root: &Path) -> BTreeMap<String, Entry> {
    let mut found = BTreeMap::new();
    let mut open = vec![root.to_path_buf()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let mode = meta.permissions().mode() & 0o7777;
            let entry = if meta.is_dir() {
                open.push(path.clone());
                Entry::Dir { mode }
            } else if meta.is_symlink() {
                Entry::Symlink { target: fs::read_link(&path).unwrap().into_os_string().into_vec() }
            } else {
                let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                assert_eq!(bytes.len() as u64, meta.size(), "{}", path.display());
                Entry::File { mode, size: meta.size(), sha256: hex::encode(Sha256::digest(&bytes)) }
            };
            let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes();
            found.insert(String::from_utf8_lossy(name).into_owned(), entry);
        }
    }
    found
}

/// What differs between two trees, a line each; `same` decides what counts as equal for a path both have.
pub fn differences(
    a: (&str, &BTreeMap<String, Entry>),
    b: (&str, &BTreeMap<String, Entry>),
    mut same: impl FnMut(&str, &Entry, &Entry) -> bool,
) -> Vec<String> {
    let mut lines = Vec::new();
    for (path, entry) in a.1 {
        match b.1.get(path) {
            None => lines.push(format!("only in {}: {path}", a.0)),
            Some(other) if !same(path, entry, other) => {
                lines.push(format!("differs: {path}\n  {}: {entry:?}\n  {}: {other:?}", a.0, b.0));
            }
            Some(_) => {}
        }
    }
    lines.extend(b.1.keys().filter(|p| !a.1.contains_key(*p)).map(|p| format!("only in {}: {p}", b.0)));
    lines
}
