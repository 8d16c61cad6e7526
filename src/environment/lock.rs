//! PEP 751 locks (`pylock.toml`): what they say, which of it an interpreter wants, and by which key a layer is found.
//!
//! A lock comes from outside and may be hostile: whatever it holds, parsing ends in a [`Lock`] or in an error that
//! names the package. What is kept with a version has no credentials in it ([`strip_credentials`]); what is handed to
//! uv keeps them ([`Lock::working_copy`]).

mod key;
mod marker;
mod select;
mod text;

use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;

use toml::{Table, Value};
use uv_normalize::PackageName;

use crate::error::{Error, Kind, Result};

pub use key::Target;
pub(crate) use marker::Marker;
pub use select::{Choice, marker_environment};
pub use text::{strip_credentials, strip_document};

/// The longest lock that is read, in bytes; the lock of 1,000 packages for every platform has about 5 MB.
const LOCK_MAX: u64 = 64 << 20;

/// A parsed `pylock.toml`.
#[derive(Debug, Clone, PartialEq)]
pub struct Lock {
    /// Which Pythons it is for, as a version specifier.
    pub requires_python: Option<String>,
    /// Extras that can be chosen.
    pub extras: Vec<String>,
    /// Dependency groups that can be chosen.
    pub dependency_groups: Vec<String>,
    /// Groups chosen when the user names none.
    pub default_groups: Vec<String>,
    /// Markers of the environments it was made for; none means any.
    pub environments: Vec<String>,
    /// Its packages, in its order.
    pub packages: Vec<Package>,
}

/// One `[[packages]]` entry.
#[derive(Debug, Clone, PartialEq)]
pub struct Package {
    /// Normalised name.
    pub name: String,
    /// Version; a directory has none.
    pub version: Option<String>,
    /// When it is wanted, as a PEP 508 marker.
    pub marker: Option<String>,
    /// Which Pythons it is for.
    pub requires_python: Option<String>,
    /// Where it comes from.
    pub origin: Origin,
    /// The index that it was found on.
    index: Option<String>,
}

/// Where a package comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Files of an index: wheels to choose from, and perhaps a source distribution.
    Index {
        /// Wheels.
        wheels: Vec<Artifact>,
        /// Source distribution.
        sdist: Option<Artifact>,
    },
    /// One file named directly, a wheel or a source distribution.
    Archive {
        /// The file.
        artifact: Artifact,
        /// Where in it the project lies.
        subdirectory: Option<String>,
    },
    /// A commit of a repository.
    Vcs {
        /// `git`.
        kind: String,
        /// Its address.
        url: String,
        /// The full commit.
        commit: String,
        /// Where in it the project lies.
        subdirectory: Option<String>,
    },
    /// A directory of this machine; may change at any time.
    Directory {
        /// As written.
        path: String,
        /// Where in it the project lies.
        subdirectory: Option<String>,
    },
}

/// One file that a lock names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// File name, where the lock says one.
    pub name: Option<String>,
    /// Where to fetch it.
    pub url: Option<String>,
    /// Where it lies, as written (relative to the lock's directory).
    pub path: Option<String>,
    /// Algorithm -> hexadecimal digest.
    pub hashes: BTreeMap<String, String>,
}

impl Lock {
    /// Parses the text of a `pylock.toml`.
    ///
    /// # Errors
    /// [`Kind::Invalid`], naming the package.
    pub fn parse(text: &str) -> Result<Lock> {
        if text.len() as u64 > LOCK_MAX {
            return Err(invalid(format!("the lock is larger than {LOCK_MAX} bytes")));
        }
        let document: Table = toml::from_str(text)
            .map_err(|error| invalid("the lock is no TOML document").detail(strip_credentials(&error.to_string())))?;
        let lock_version = document.get("lock-version").and_then(Value::as_str);
        match lock_version.map(|v| v.split('.').next().unwrap_or_default()) {
            Some("1") => {}
            Some(_) => {
                let shown = lock_version.unwrap_or_default();
                return Err(Error::new(Kind::Unsupported, format!("the lock has lock-version {shown:?}"))
                    .hint("upgrade envfabric, or write a lock of lock-version 1.0"));
            }
            None if document.contains_key("package") && document.contains_key("version") => {
                return Err(invalid("this is a uv.lock, where a pylock.toml was expected"));
            }
            None => {
                return Err(
                    invalid("the lock has no lock-version").hint("a pylock.toml begins with lock-version = \"1.0\"")
                );
            }
        }
        let top = Entry { table: &document, what: "the lock" };
        let mut packages = Vec::new();
        if let Some(value) = document.get("packages") {
            let entries = value.as_array().ok_or_else(|| invalid("\"packages\" of the lock is no array of tables"))?;
            for (number, entry) in entries.iter().enumerate() {
                packages.push(Package::parse(number, entry)?);
            }
        }
        Ok(Lock {
            requires_python: top.text("requires-python")?,
            extras: top.texts("extras")?,
            dependency_groups: top.texts("dependency-groups")?,
            default_groups: top.texts("default-groups")?,
            environments: top.texts("environments")?,
            packages,
        })
    }
}

impl Package {
    fn parse(number: usize, value: &Value) -> Result<Package> {
        let table =
            value.as_table().ok_or_else(|| invalid(format!("package {} of the lock is no table", number + 1)))?;
        let given = table
            .get("name")
            .and_then(Value::as_str)
            .ok_or_else(|| invalid(format!("package {} of the lock has no name", number + 1)))?;
        let name = PackageName::from_str(given)
            .map_err(|_| invalid(format!("package {} of the lock has the unacceptable name {given:?}", number + 1)))?
            .as_str()
            .to_string();
        let what = format!("package {name:?} of the lock");
        let entry = Entry { table, what: &what };
        let version = entry.text("version")?;
        if let Some(version) = &version {
            uv_pep440::Version::from_str(version)
                .map_err(|_| invalid(format!("{what} has the unacceptable version {version:?}")))?;
        }
        Ok(Package {
            version,
            marker: entry.text("marker")?,
            requires_python: entry.text("requires-python")?,
            origin: Origin::parse(&entry)?,
            index: entry.text("index")?,
            name,
        })
    }

    /// `numpy 2.1.0`, or the name alone.
    pub fn label(&self) -> String {
        match &self.version {
            Some(version) => format!("{} {version}", self.name),
            None => self.name.clone(),
        }
    }
}

impl Origin {
    fn parse(entry: &Entry<'_>) -> Result<Origin> {
        let what = entry.what;
        let kinds = ["archive", "vcs", "directory"];
        let direct: Vec<&str> = kinds.into_iter().filter(|k| entry.table.contains_key(*k)).collect();
        let indexed = entry.table.contains_key("wheels") || entry.table.contains_key("sdist");
        match (direct.as_slice(), indexed) {
            ([], true) => {
                let mut wheels = Vec::new();
                if let Some(value) = entry.table.get("wheels") {
                    let list = value.as_array().ok_or_else(|| invalid(format!("\"wheels\" of {what} is no array")))?;
                    for wheel in list {
                        let table =
                            wheel.as_table().ok_or_else(|| invalid(format!("a wheel of {what} is no table")))?;
                        wheels.push(Artifact::parse(&Entry { table, what })?);
                    }
                }
                let sdist = match entry.sub("sdist")? {
                    Some(sdist) => Some(Artifact::parse(&sdist)?),
                    None => None,
                };
                if wheels.is_empty() && sdist.is_none() {
                    return Err(invalid(format!("{what} has neither wheels nor a source distribution")));
                }
                Ok(Origin::Index { wheels, sdist })
            }
            (["archive"], false) => {
                let archive = entry.need("archive")?;
                Ok(Origin::Archive {
                    artifact: Artifact::parse(&archive)?,
                    subdirectory: archive.text("subdirectory")?,
                })
            }
            (["vcs"], false) => {
                let vcs = entry.need("vcs")?;
                let need =
                    |key: &str| vcs.text(key)?.ok_or_else(|| invalid(format!("\"vcs\" of {what} has no {key:?}")));
                let url = match vcs.text("url")? {
                    Some(url) => url,
                    None => need("path")?,
                };
                let commit = need("commit-id")?;
                if commit.len() < 40 || !commit.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(invalid(format!("commit-id {commit:?} of {what} is no full commit")));
                }
                Ok(Origin::Vcs { kind: need("type")?, url, commit, subdirectory: vcs.text("subdirectory")? })
            }
            (["directory"], false) => {
                let directory = entry.need("directory")?;
                let path = directory
                    .text("path")?
                    .ok_or_else(|| invalid(format!("\"directory\" of {what} has no \"path\"")))?;
                Ok(Origin::Directory { path, subdirectory: directory.text("subdirectory")? })
            }
            ([], false) => Err(invalid(format!("{what} does not say where it comes from"))),
            _ => Err(invalid(format!("{what} says more than one place where it comes from"))),
        }
    }
}

/// Algorithms that are strong enough to name bytes.
const STRONG: [&str; 5] = ["sha256", "sha384", "sha512", "blake2b", "sha3_256"];

impl Artifact {
    fn parse(entry: &Entry<'_>) -> Result<Artifact> {
        let what = entry.what;
        let mut hashes = BTreeMap::new();
        if let Some(table) = entry.sub("hashes")? {
            for key in table.table.keys() {
                let value = table.text(key)?.unwrap_or_default();
                if value.is_empty() || !value.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(invalid(format!("hash {value:?} of {what} is not hexadecimal")));
                }
                hashes.insert(key.to_ascii_lowercase(), value.to_ascii_lowercase());
            }
        }
        if !hashes.keys().any(|algorithm| STRONG.contains(&algorithm.as_str())) {
            return Err(invalid(format!("{what} has a file without a sha256 or stronger hash"))
                .hint("write the lock again with `uv pip compile --format pylock.toml` or `uv export`"));
        }
        let artifact =
            Artifact { name: entry.text("name")?, url: entry.text("url")?, path: entry.text("path")?, hashes };
        if artifact.url.is_none() && artifact.path.is_none() {
            return Err(invalid(format!("{what} has a file with neither \"url\" nor \"path\"")));
        }
        Ok(artifact)
    }

    /// Its file name: as the lock says, else the end of its path or address.
    pub fn file_name(&self) -> Option<String> {
        let last = |text: &str| text.rsplit('/').next().filter(|name| !name.is_empty()).map(str::to_string);
        if let Some(name) = &self.name {
            return Some(name.clone());
        }
        if let Some(path) = &self.path {
            return last(path);
        }
        let url = self.url.as_deref()?.split(['#', '?']).next()?;
        last(&percent_decode(url))
    }

    /// The file on this machine that it names, where it names one; `base` is the directory of the lock.
    pub fn local_path(&self, base: &Path) -> Option<std::path::PathBuf> {
        if let Some(path) = &self.path {
            return Some(base.join(path));
        }
        let url = self.url.as_deref()?;
        let rest = url.strip_prefix("file://")?;
        let rest = rest.strip_prefix("localhost").unwrap_or(rest);
        let rest = rest.split(['#', '?']).next().unwrap_or_default();
        Some(std::path::PathBuf::from(percent_decode(rest)))
    }
}

fn percent_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let decoded = (*first == b'%').then(|| tail.get(..2).and_then(|pair| hex::decode(pair).ok())).flatten();
        match decoded {
            Some(value) => {
                bytes.extend(value);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A table of the document and how to call it in an error.
struct Entry<'a> {
    table: &'a Table,
    what: &'a str,
}

impl<'a> Entry<'a> {
    fn text(&self, key: &str) -> Result<Option<String>> {
        match self.table.get(key) {
            None => Ok(None),
            Some(Value::String(text)) if !text.contains('\0') => Ok(Some(text.clone())),
            Some(_) => Err(invalid(format!("{key:?} of {} is no text", self.what))),
        }
    }

    fn texts(&self, key: &str) -> Result<Vec<String>> {
        let bad = || invalid(format!("{key:?} of {} is no array of texts", self.what));
        match self.table.get(key) {
            None => Ok(Vec::new()),
            Some(value) => {
                let list = value.as_array().ok_or_else(bad)?;
                list.iter().map(|v| v.as_str().map(str::to_string).ok_or_else(bad)).collect()
            }
        }
    }

    fn sub(&self, key: &str) -> Result<Option<Entry<'a>>> {
        match self.table.get(key) {
            None => Ok(None),
            Some(Value::Table(table)) => Ok(Some(Entry { table, what: self.what })),
            Some(_) => Err(invalid(format!("{key:?} of {} is no table", self.what))),
        }
    }

    fn need(&self, key: &str) -> Result<Entry<'a>> {
        self.sub(key)?.ok_or_else(|| invalid(format!("{} has no {key:?}", self.what)))
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(Kind::Invalid, message)
}

#[cfg(test)]
mod tests;
