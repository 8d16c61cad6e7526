//! Texts of locks: without credentials for keeping, and cut to a few packages for uv.

use std::path::{Component, Path, PathBuf};

use toml::{Table, Value};

use super::{Artifact, Lock, Origin, Package};
use crate::error::{Error, Kind, Result};

/// Removes `user:password@` from every URL in `text`; the rest stays as it is.
///
/// A user name without a password stays in an ssh URL (`ssh://git@host/...`), where it is part of the address.
pub fn strip_credentials(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        out.push_str(before);
        let ends = |c: char| matches!(c, '/' | '?' | '#' | '"' | '\'' | '`' | '<' | '>' | '\\') || c.is_whitespace();
        let authority = &after[..after.find(ends).unwrap_or(after.len())];
        match authority.rfind('@') {
            Some(sign) => {
                let (user, host) = authority.split_at(sign);
                let scheme = before[..at].rsplit(|c: char| !(c.is_ascii_alphanumeric() || "+-.".contains(c))).next();
                if scheme.unwrap_or_default().ends_with("ssh") {
                    out.push_str(user.split(':').next().unwrap_or_default());
                    out.push_str(host);
                } else {
                    out.push_str(&host[1..]);
                }
            }
            None => out.push_str(authority),
        }
        rest = &after[authority.len()..];
    }
    out.push_str(rest);
    out
}

/// [`strip_credentials`] for a TOML document: also what hides behind escapes of its strings.
pub fn strip_document(text: &str) -> Result<String> {
    let stripped = strip_credentials(text);
    let mut table: Table = toml::from_str(&stripped).map_err(|error| {
        Error::new(Kind::Invalid, "this is no TOML document").detail(strip_credentials(&error.to_string()))
    })?;
    let mut changed = false;
    for (_, value) in table.iter_mut() {
        strip_value(value, &mut changed);
    }
    if !changed {
        return Ok(stripped);
    }
    toml::to_string(&table)
        .map_err(|error| Error::new(Kind::Invalid, "a TOML document cannot be written").with_source(error))
}

fn strip_value(value: &mut Value, changed: &mut bool) {
    match value {
        Value::String(text) => {
            let stripped = strip_credentials(text);
            *changed |= stripped != *text;
            *text = stripped;
        }
        Value::Array(values) => values.iter_mut().for_each(|v| strip_value(v, changed)),
        Value::Table(table) => table.iter_mut().for_each(|(_, v)| strip_value(v, changed)),
        _ => {}
    }
}

impl Lock {
    /// A `pylock.toml` of just `packages`, without conditions and with absolute paths, for one `uv pip sync`.
    ///
    /// `base` is the directory that relative paths of the lock start from. Directories are not editable in it: an
    /// environment is immutable.
    pub fn working_copy(packages: &[&Package], base: &Path) -> Result<String> {
        let mut entries = Vec::new();
        for package in packages {
            let mut entry = Table::new();
            entry.insert("name".into(), package.name.clone().into());
            insert(&mut entry, "version", package.version.as_deref());
            insert(&mut entry, "index", package.index.as_deref());
            match &package.origin {
                Origin::Index { wheels, sdist } => {
                    let wheels: Vec<Value> = wheels.iter().map(|w| Value::Table(artifact(w, base))).collect();
                    if !wheels.is_empty() {
                        entry.insert("wheels".into(), wheels.into());
                    }
                    if let Some(sdist) = sdist {
                        entry.insert("sdist".into(), artifact(sdist, base).into());
                    }
                }
                Origin::Archive { artifact: file, subdirectory } => {
                    let mut table = artifact(file, base);
                    insert(&mut table, "subdirectory", subdirectory.as_deref());
                    entry.insert("archive".into(), table.into());
                }
                Origin::Vcs { kind, url, commit, subdirectory } => {
                    let mut table = Table::new();
                    insert(&mut table, "type", Some(kind));
                    if url.contains("://") || url.contains('@') {
                        insert(&mut table, "url", Some(url));
                    } else {
                        insert(&mut table, "path", Some(&absolute(url, base)));
                    }
                    insert(&mut table, "commit-id", Some(commit));
                    insert(&mut table, "subdirectory", subdirectory.as_deref());
                    entry.insert("vcs".into(), table.into());
                }
                Origin::Directory { path, subdirectory } => {
                    let mut table = Table::new();
                    insert(&mut table, "path", Some(&absolute(path, base)));
                    insert(&mut table, "subdirectory", subdirectory.as_deref());
                    entry.insert("directory".into(), table.into());
                }
            }
            entries.push(Value::Table(entry));
        }
        let mut document = Table::new();
        document.insert("lock-version".into(), "1.0".into());
        document.insert("created-by".into(), "envfabric".into());
        document.insert("packages".into(), entries.into());
        toml::to_string(&document)
            .map_err(|error| Error::new(Kind::Failed, "a working lock cannot be written").with_source(error))
    }
}

fn insert(table: &mut Table, key: &str, value: Option<&str>) {
    if let Some(value) = value {
        table.insert(key.into(), value.into());
    }
}

fn artifact(file: &Artifact, base: &Path) -> Table {
    let mut table = Table::new();
    insert(&mut table, "name", file.name.as_deref());
    insert(&mut table, "url", file.url.as_deref());
    insert(&mut table, "path", file.path.as_deref().map(|path| absolute(path, base)).as_deref());
    let hashes: Table = file.hashes.iter().map(|(k, v)| (k.clone(), Value::String(v.clone()))).collect();
    table.insert("hashes".into(), hashes.into());
    table
}

/// `path` below `base`, with `.` and `..` resolved by name alone.
fn absolute(path: &str, base: &Path) -> String {
    let mut clean = PathBuf::new();
    for part in base.join(path).components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                clean.pop();
            }
            other => clean.push(other),
        }
    }
    clean.to_string_lossy().into_owned()
}
