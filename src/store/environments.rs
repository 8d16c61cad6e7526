//! Versions and the pointers that say which one is current.
//!
//! `versions/<n>.json` is claimed by linking: whoever links a number first owns it, the loser takes the next.
//! `current/<seq>.json` likewise; the highest sequence number wins. A builder moves the pointer only forward: each
//! pointer carries the newest version that any pointer before it named, and a slow builder whose version is older than
//! that leaves the pointer alone. Going back is for `rollback`, which says so explicitly.
//!
//! **Pointer 1 is not written**: `versions/1.json` says by being there what it would say, that version 1 is current.
//! So most environments, which have one version for ever, cost one file and two directories, and their version is
//! current the moment it has its name. The next pointer is `2.json`; a `1.json` that is there counts like any other.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::gc::{BootTime, FRESH};
use super::seal::{self, Unreadable};
use super::signed::{Statement, replayed};
use super::{Store, disk, in_parallel, list_dirs, list_if_there, now, parse, publish};
use crate::environment::{EnvName, VERSION_FORMAT, Version};
use crate::error::{Error, IoContext, Kind, Result};
use std::fs::{self, File};
use std::io::ErrorKind::{NotADirectory, NotFound};
use std::path::{Path, PathBuf};

/// `current/<seq>.json`: which version is current since when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pointer {
    /// Format of this document, 1.
    pub format: u32,
    /// Counts from 1.
    pub sequence: u64,
    /// The current version; none once the environment was removed.
    pub version: Option<u64>,
    /// The newest version that this or any earlier pointer named.
    pub newest: u64,
    /// When.
    pub at: Timestamp,
    /// Host that wrote it; empty where it goes without saying (pointer 1).
    pub by: String,
    /// `create`, `rollback` or `remove`.
    pub reason: String,
    /// Random.
    pub nonce: String,
}

/// What became of a version that was published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claimed {
    /// It is the current version now.
    Current(Version),
    /// It is published, but a newer one was current already and stays.
    Superseded(Version, u64),
}

impl Claimed {
    /// The published version.
    pub fn version(&self) -> &Version {
        match self {
            Claimed::Current(version) | Claimed::Superseded(version, _) => version,
        }
    }
}

impl Store {
    pub(super) fn env_dir(&self, name: &EnvName) -> PathBuf {
        self.root.join("envs").join(name.workflow()).join(name.node())
    }

    pub(super) fn version_path(&self, name: &EnvName, number: u64) -> PathBuf {
        self.env_dir(name).join("versions").join(format!("{number}.json"))
    }

    pub(super) fn pointer_path(&self, name: &EnvName, sequence: u64) -> PathBuf {
        self.env_dir(name).join("current").join(format!("{sequence}.json"))
    }

    /// Every workflow that ever had an environment, sorted. Files that somebody has put there are not ours.
    pub fn workflows(&self) -> Result<Vec<String>> {
        let mut names = list_dirs(&self.root.join("envs"))?;
        if names.is_empty() {
            self.require_present()?;
        }
        names.retain(|name| EnvName::is_part(name));
        Ok(names)
    }

    /// Every node that ever was in `workflow`, removed ones included, sorted.
    pub fn nodes(&self, workflow: &str) -> Result<Vec<String>> {
        if !EnvName::is_part(workflow) {
            return Ok(Vec::new());
        }
        let mut names = list_dirs(&self.root.join("envs").join(workflow))?;
        if names.is_empty() {
            self.require_present()?;
        }
        names.retain(|name| EnvName::is_part(name));
        Ok(names)
    }

    /// Every environment that has a current version, with its pointer, sorted. A pointer that cannot be read is told in
    /// its place: it must not hide the others.
    pub fn environments(&self) -> Result<Vec<(EnvName, Result<Pointer>)>> {
        self.each_environment("", |_, pointer| Ok(pointer))
    }

    /// What `ask` says of every environment whose name begins with `prefix` and that has a current version, sorted;
    /// where its pointer or what `ask` wants cannot be read, the error. Many are asked at once.
    pub fn each_environment<R: Send>(
        &self,
        prefix: &str,
        ask: impl Fn(&EnvName, Pointer) -> Result<R> + Sync,
    ) -> Result<Vec<(EnvName, Result<R>)>> {
        let mut names = Vec::new();
        let workflow_of = prefix.split('/').next().unwrap_or_default();
        for workflow in self.workflows()?.into_iter().filter(|workflow| workflow.starts_with(workflow_of)) {
            for node in self.nodes(&workflow)? {
                names.push(EnvName::new(&workflow, &node)?);
            }
        }
        names.retain(|name| prefix.is_empty() || name.to_string().starts_with(prefix));
        let told = in_parallel(&names, |name| match self.pointer(name) {
            Ok(Some(pointer)) if pointer.version.is_some() => Some(ask(name, pointer)),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        });
        Ok(names.into_iter().zip(told).filter_map(|(name, told)| Some((name, told?))).collect())
    }

    /// The numbers of all published versions, ascending.
    pub fn version_numbers(&self, name: &EnvName) -> Result<Vec<u64>> {
        numbers(&self.env_dir(name).join("versions"))
    }

    /// Version `number`.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when there is none of that number, [`Kind::Unsupported`] when it is of a newer format.
    pub fn version(&self, name: &EnvName, number: u64) -> Result<Version> {
        let path = self.version_path(name, number);
        let bytes = self.read_anywhere(&path).map_err(|error| match error.is_not_found() {
            true => Error::new(Kind::NotFound, format!("{name} has no version {number}"))
                .hint(format!("see `envfabric versions {name}`")),
            false => error,
        })?;
        let corrupt = |why: Unreadable| {
            let error = Error::new(Kind::Corrupt, format!("version document {} is damaged", path.display()))
                .hint(format!("roll back to another: `envfabric versions {name}`; then run `envfabric fsck`"));
            match why {
                Unreadable::Broken => error,
                Unreadable::Other(source) => error.with_source(source),
            }
        };
        #[derive(Deserialize)]
        struct OnlyFormat {
            format: u32,
        }
        let OnlyFormat { format } =
            serde_json::from_slice(&bytes).map_err(|error| corrupt(Unreadable::Other(error)))?;
        if format > VERSION_FORMAT {
            return Err(Error::new(Kind::Unsupported, format!("version {number} of {name} has format {format}"))
                .hint("upgrade envfabric on this machine"));
        }
        let version: Version = seal::read(&bytes).map_err(corrupt)?;
        if version.environment != *name || version.number != number {
            return Err(Error::new(Kind::Corrupt, format!("{} describes another version", path.display()))
                .hint("run `envfabric fsck`"));
        }
        self.admit_version(&version, &bytes)?;
        Ok(version)
    }

    /// The pointer in force, if the name was ever used.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when the newest pointer is damaged: an older one is not taken instead, as it may have been
    /// withdrawn. `create` and `rollback` write a new one over it.
    pub fn pointer(&self, name: &EnvName) -> Result<Option<Pointer>> {
        let dir = self.env_dir(name).join("current");
        let seen = self.newest_seen(name)?;
        let mut tries = 0;
        loop {
            // A pointer that was seen is asked for by its name: the listing of it may be older.
            let listed = numbers_if_there(&dir)?;
            let (mut sequence, mut pointer) = match listed.iter().flatten().last().copied().max(seen) {
                Some(sequence) => (sequence, self.read_pointer(name, sequence)),
                None => match self.first_pointer(name)? {
                    // No name was in a directory that was not there.
                    Some(first) if listed.is_none() => return self.note_pointer(name, &first).map(|()| Some(first)),
                    Some(first) => (1, Ok(first)),
                    None => {
                        self.require_present()?;
                        return Ok(None);
                    }
                },
            };
            // A cached listing may be old; the next name is asked for directly, which NFS does not answer from it.
            while pointer.is_ok() {
                match self.read_pointer(name, sequence + 1) {
                    Err(error) if error.is_not_found() => break,
                    next => pointer = next,
                }
                sequence += 1;
            }
            match pointer {
                // Collected between listing and opening: a newer one is there.
                Err(error) if error.is_not_found() && tries < 3 => tries += 1,
                Err(error) if error.is_not_found() && seen == Some(sequence) => {
                    self.require_present()?;
                    return Err(replayed(name, sequence));
                }
                Err(error) => return Err(error),
                Ok(pointer) => return self.note_pointer(name, &pointer).map(|()| Some(pointer)),
            }
        }
    }

    /// True unless pointer `sequence` is surely not there; whether that means anything is for [`Store::pointer`] to say.
    pub(crate) fn may_have_pointer(&self, name: &EnvName, sequence: u64) -> bool {
        match File::open(self.pointer_path(name, sequence)) {
            Err(error) => !matches!(error.kind(), NotFound | NotADirectory),
            Ok(_) => true,
        }
    }

    pub(super) fn read_pointer(&self, name: &EnvName, sequence: u64) -> Result<Pointer> {
        let path = self.pointer_path(name, sequence);
        let bytes = publish::read(&path)?;
        let pointer: Pointer = parse(&path, &bytes).map_err(|e| e.hint(which(name)))?;
        let wrong = |kind, what: &str| Err(Error::new(kind, format!("pointer {} {what}", path.display())));
        if pointer.format > 1 {
            return wrong(Kind::Unsupported, "is of a newer format").map_err(|e| e.hint("upgrade envfabric"));
        }
        if pointer.sequence != sequence || pointer.version.is_some_and(|v| v > pointer.newest || v == 0) {
            return wrong(Kind::Corrupt, "contradicts itself").map_err(|e| e.hint(which(name)));
        }
        self.admit_pointer(name, sequence, &bytes)?;
        Ok(pointer)
    }

    /// Pointer 1 as the first version stands for it.
    pub(super) fn first_pointer(&self, name: &EnvName) -> Result<Option<Pointer>> {
        let path = self.version_path(name, 1);
        // Not opened: its bytes are not asked for, and that it is there is told as soon by a look.
        let modified = match fs::metadata(&path) {
            Err(error) if matches!(error.kind(), NotFound | NotADirectory) => return Ok(None),
            other => other.at("looking at", &path)?.modified().at("looking at", &path)?,
        };
        if self.trust().is_some() {
            self.version(name, 1)?;
        }
        Ok(Some(Pointer {
            format: 1,
            sequence: 1,
            version: Some(1),
            newest: 1,
            at: Timestamp::try_from(modified).unwrap_or(Timestamp::UNIX_EPOCH),
            by: String::new(),
            reason: "create".into(),
            nonce: String::new(),
        }))
    }

    /// The highest sequence number in use, and the newest pointer that can be read.
    pub(super) fn last_pointer(&self, name: &EnvName) -> Result<(u64, Option<Pointer>)> {
        let sequences = numbers(&self.env_dir(name).join("current"))?;
        match self.pointer(name) {
            Ok(pointer) => Ok((pointer.as_ref().map_or(0, |p| p.sequence), pointer)),
            Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Rejected) => {
                let older = sequences.iter().rev().find_map(|sequence| self.read_pointer(name, *sequence).ok());
                let first = || match self.first_pointer(name) {
                    Err(error) if error.kind() == Kind::Rejected => Ok(None),
                    first => first,
                };
                let older = older.map_or_else(first, |older| Ok(Some(older)))?;
                Ok((sequences.last().copied().max(self.newest_seen(name)?).unwrap_or(1), older))
            }
            Err(error) => Err(error),
        }
    }

    /// The current version of `name`.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when there is no such environment or it was removed.
    pub fn current(&self, name: &EnvName) -> Result<Version> {
        self.version(name, self.current_number(name)?)
    }

    /// The number of the current version of `name`.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when there is no such environment or it was removed.
    pub fn current_number(&self, name: &EnvName) -> Result<u64> {
        self.pointer(name)?.and_then(|p| p.version).ok_or_else(|| no_environment(name))
    }

    /// Publishes `draft` under the next free number (`number` and `nonce` of the draft are ignored) and makes it
    /// current. Every object that it names must be in the store already.
    pub fn publish_version(&self, draft: Version) -> Result<Claimed> {
        self.publish_version_if(draft, |_| Ok(()))
    }

    /// The same, where the version is made current only if `whole` finds that all it names is there. It is asked when the
    /// version can be seen: what a collector takes from then on, it brings back by itself.
    pub fn publish_version_if(&self, draft: Version, whole: impl FnOnce(&Version) -> Result<()>) -> Result<Claimed> {
        self.require_writable()?;
        self.require_signer()?;
        let draft = self.claim_number(draft)?;
        let (name, number) = (draft.environment.clone(), draft.number);
        whole(&draft)?;
        match self.point(&name, Some(number), "create")? {
            Some(_) => Ok(Claimed::Current(draft)),
            None => match self.pointer(&name)? {
                // The first version needs no pointer.
                Some(pointer) if pointer.version == Some(number) => Ok(Claimed::Current(draft)),
                pointer => Ok(Claimed::Superseded(draft, pointer.map_or(number, |p| p.newest))),
            },
        }
    }

    /// Publishes `draft` under a number that was never used.
    fn claim_number(&self, mut draft: Version) -> Result<Version> {
        let name = draft.environment.clone();
        loop {
            let looked = BootTime::now();
            draft.nonce = publish::nonce()?;
            let newest = self.last_pointer(&name)?.1.map_or(0, |p| p.newest);
            let number = self.version_numbers(&name)?.last().copied().unwrap_or(0).max(newest);
            // A store that was restored from a backup may have lost numbers that are in use.
            let mut number = number.max(self.highest_seen(&name)?) + 1;
            let path = loop {
                draft.number = number;
                let path = self.version_path(&name, number);
                if publish::bytes(&self.root, &path, &self.signed(Statement::Version, &name, number, &draft)?)? {
                    break path;
                }
                number += 1;
            };
            // A collector needs the grace time to free a number. Version 1 is free only where there never was a pointer.
            if looked.elapsed() < FRESH || number == 1 {
                return Ok(draft);
            }
            // Ours, and nothing points to it.
            disk::remove(&path).at("removing", &path)?;
        }
    }

    /// Claims the next sequence number. None when the rule of `reason` says to leave the pointer as it is.
    pub(super) fn point(&self, name: &EnvName, version: Option<u64>, reason: &str) -> Result<Option<Pointer>> {
        self.require_writable()?;
        self.require_signer()?;
        let nonce = publish::nonce()?;
        loop {
            let (last, now_current) = self.last_pointer(name)?;
            let newest = now_current.as_ref().map_or(0, |p| p.newest);
            let leave = match reason {
                "create" => version.is_some_and(|number| number <= newest),
                "remove" => now_current.as_ref().is_none_or(|p| p.version.is_none()),
                _ => false,
            };
            if leave {
                return Ok(None);
            }
            let pointer = Pointer {
                format: 1,
                sequence: last + 1,
                version,
                newest: newest.max(version.unwrap_or(0)),
                at: now(),
                by: host(),
                reason: reason.into(),
                nonce: nonce.clone(),
            };
            let path = self.pointer_path(name, pointer.sequence);
            if publish::bytes(&self.root, &path, &self.signed(Statement::Pointer, name, pointer.sequence, &pointer)?)? {
                return Ok(Some(pointer));
            }
        }
    }
}

pub(super) fn no_environment(name: &EnvName) -> Error {
    Error::new(Kind::NotFound, format!("there is no environment {name}"))
        .hint(format!("see `envfabric list`, or make it with `envfabric create {name} ...`"))
}

/// The highest number of a version or pointer: far beyond use, and exact in JSON.
const NUMBER_MAX: u64 = 1 << 53;

/// The numbers `n` of files `<n>.json`, ascending. Other names and other spellings of a number are not ours.
pub(super) fn numbers(dir: &Path) -> Result<Vec<u64>> {
    Ok(numbers_if_there(dir)?.unwrap_or_default())
}

/// The same; none where the directory is not there.
fn numbers_if_there(dir: &Path) -> Result<Option<Vec<u64>>> {
    let number = |name: &String| {
        let stem = name.strip_suffix(".json")?;
        stem.parse().ok().filter(|n: &u64| n.to_string() == stem && (1..NUMBER_MAX).contains(n))
    };
    let Some(names) = list_if_there(dir, |_| true)? else { return Ok(None) };
    let mut numbers: Vec<u64> = names.iter().filter_map(number).collect();
    numbers.sort_unstable();
    Ok(Some(numbers))
}

/// What is to be done where it cannot be told which version of `name` is current.
pub(super) fn which(name: &EnvName) -> String {
    format!("name the version that should be current: `envfabric rollback {name} N`; `envfabric versions {name}`")
}

/// The name of this host.
pub(crate) fn host() -> String {
    nix::unistd::gethostname().ok().and_then(|h| h.into_string().ok()).unwrap_or_else(|| "unknown".into())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::environment::{Builder, Digest, InterpreterRef, Source};
    use crate::store::list_names;

    pub(crate) fn draft(name: &str) -> Version {
        Version {
            format: VERSION_FORMAT,
            environment: name.parse().unwrap(),
            number: 0,
            created: now(),
            interpreter: InterpreterRef {
                layer: Digest::of(b"python"),
                version: "3.11.7".into(),
                executable: "bin/python3.11".into(),
            },
            scaffold: Digest::of(b"scaffold"),
            summaries: vec![],
            layers: vec![],
            lock: None,
            pyproject: None,
            source: Source::Requirements { requirements: vec![], files: vec![] },
            builder: Builder { envfabric: "0".into(), uv: None, host: "h".into() },
            conflicts: vec![],
            nonce: String::new(),
        }
    }

    #[test]
    fn numbers_are_never_used_twice_not_even_after_remove() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(dir.path()).unwrap();
        let name: EnvName = "demo/a".parse().unwrap();
        assert!(store.current(&name).unwrap_err().is_not_found());
        assert_eq!(store.publish_version(draft("demo/a")).unwrap().version().number, 1);
        store.remove(&name).unwrap();
        assert!(store.current(&name).unwrap_err().is_not_found());
        assert!(store.remove(&name).unwrap_err().is_not_found());
        assert_eq!(store.last_current(&name).unwrap(), Some(1));
        assert_eq!(store.publish_version(draft("demo/a")).unwrap().version().number, 2);
        store.rollback(&name, 1).unwrap();
        assert_eq!(store.current(&name).unwrap().number, 1);
        assert_eq!(store.publish_version(draft("demo/a")).unwrap().version().number, 3);
        assert_eq!(store.current(&name).unwrap().number, 3);
        assert!(store.rollback(&name, 9).unwrap_err().is_not_found());
    }

    #[test]
    fn a_version_of_160_layers_is_one_new_file_of_less_than_16_kilobytes() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(dir.path()).unwrap();
        let layers = (0..160u32).map(|n| Digest::of(&n.to_be_bytes())).collect();
        store.publish_version(Version { layers, ..draft("demo/a") }).unwrap();
        let name: EnvName = "demo/a".parse().unwrap();
        let entries = |path: PathBuf| list_names(&path).unwrap();
        assert_eq!(entries(store.env_dir(&name)), ["versions"]);
        assert_eq!(entries(store.env_dir(&name).join("versions")), ["1.json"]);
        assert!(entries(store.tmp()).is_empty());
        assert!(std::fs::metadata(store.version_path(&name, 1)).unwrap().len() <= 16_000);
    }

    #[test]
    fn the_first_version_is_current_without_a_pointer_and_the_next_pointer_is_the_second() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(dir.path()).unwrap();
        let name: EnvName = "demo/a".parse().unwrap();
        let pointers = || numbers(&store.env_dir(&name).join("current")).unwrap();
        assert_eq!(store.pointer(&name).unwrap(), None);
        assert!(matches!(store.publish_version(draft("demo/a")).unwrap(), Claimed::Current(v) if v.number == 1));
        assert_eq!((store.current(&name).unwrap().number, pointers()), (1, vec![]));
        assert_eq!(store.last_current(&name).unwrap(), Some(1));
        // A builder that claimed its number before the first was there.
        let second = Version { number: 2, ..draft("demo/a") };
        publish::bytes(dir.path(), &store.version_path(&name, 2), &seal::write(&second).unwrap()).unwrap();
        assert_eq!(store.current(&name).unwrap().number, 1);
        assert_eq!(store.point(&name, Some(2), "create").unwrap().unwrap().sequence, 2);
        assert_eq!((store.current(&name).unwrap().number, pointers()), (2, vec![2]));
        store.remove(&name).unwrap();
        assert!(store.current(&name).unwrap_err().is_not_found());
        assert_eq!(store.rollback(&name, 1).unwrap().sequence, 4);
        // Where pointer 1 is written, as it once was, it counts.
        let other: EnvName = "demo/b".parse().unwrap();
        store.publish_version(draft("demo/b")).unwrap();
        let first = store.pointer(&other).unwrap().unwrap();
        publish::bytes(dir.path(), &store.pointer_path(&other, 1), &seal::write(&first).unwrap()).unwrap();
        assert_eq!(store.pointer(&other).unwrap(), Some(first));
        assert_eq!(store.remove(&other).unwrap().sequence, 2);
    }

    #[test]
    fn a_slow_builder_never_overwrites_a_newer_version_or_a_rollback() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(dir.path()).unwrap();
        let name: EnvName = "demo/a".parse().unwrap();
        for _ in 0..3 {
            store.publish_version(draft("demo/a")).unwrap();
        }
        // As a builder would that had claimed version 2 and slept.
        assert_eq!(store.point(&name, Some(2), "create").unwrap(), None);
        store.rollback(&name, 1).unwrap();
        assert_eq!(store.point(&name, Some(2), "create").unwrap(), None);
        assert_eq!(store.current(&name).unwrap().number, 1);
    }

    #[test]
    fn many_publishers_get_a_number_each() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(dir.path()).unwrap();
        let mut numbers: Vec<u64> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        (0..10)
                            .map(|_| store.publish_version(draft("w/n")).unwrap().version().number)
                            .collect::<Vec<_>>()
                    })
                })
                .collect();
            threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
        });
        numbers.sort_unstable();
        assert_eq!(numbers, (1..=80).collect::<Vec<u64>>());
        assert_eq!(store.current(&"w/n".parse().unwrap()).unwrap().number, 80);
    }

    #[test]
    fn a_damaged_pointer_is_told_hides_nothing_else_and_is_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(dir.path()).unwrap();
        let name: EnvName = "demo/a".parse().unwrap();
        for name in ["demo/a", "demo/a", "demo/b"] {
            store.publish_version(draft(name)).unwrap();
        }
        let path = store.pointer_path(&name, 2);
        let third = store.pointer_path(&name, 3);
        let good = std::fs::read(&path).unwrap();
        for (damaged, bytes) in [(&path, b"{".to_vec()), (&third, good)] {
            std::fs::write(dir.path().join("x"), bytes).unwrap();
            let _ = std::fs::remove_file(damaged);
            std::fs::rename(dir.path().join("x"), damaged).unwrap();
            assert_eq!(store.current(&name).unwrap_err().kind(), Kind::Corrupt);
            let all = store.environments().unwrap();
            assert_eq!(all.iter().map(|(_, p)| p.is_ok()).collect::<Vec<_>>(), [false, true]);
        }
        store.rollback(&name, 1).unwrap();
        assert_eq!(store.current(&name).unwrap().number, 1);
        assert_eq!(store.publish_version(draft("demo/a")).unwrap().version().number, 3);
        assert_eq!(store.current(&name).unwrap().number, 3);
        // Files that somebody puts beside environments are not ours.
        std::fs::write(dir.path().join("envs/README"), "").unwrap();
        std::fs::write(dir.path().join("envs/demo/README"), "").unwrap();
        assert_eq!((store.workflows().unwrap(), store.nodes("demo").unwrap().len()), (vec!["demo".to_string()], 2));
        assert_eq!(store.environments().unwrap().len(), 2);
        // Names that only look like numbers are not, either.
        for odd in ["007.json", "+9.json", "18446744073709551615.json", "0.json"] {
            std::fs::write(store.env_dir(&name).join("current").join(odd), "{}").unwrap();
            std::fs::write(store.env_dir(&name).join("versions").join(odd), "{}").unwrap();
        }
        assert_eq!(store.current(&name).unwrap().number, 3);
        assert_eq!(store.version_numbers(&name).unwrap(), [1, 2, 3]);
    }

    #[test]
    fn a_store_that_is_gone_is_an_error_and_not_an_empty_store() {
        let dir = tempfile::tempdir().unwrap();
        let (at, aside) = (dir.path().join("store"), dir.path().join("aside"));
        let store = Store::init(&at).unwrap();
        let name: EnvName = "demo/a".parse().unwrap();
        store.publish_version(draft("demo/a")).unwrap();
        std::fs::rename(&at, &aside).unwrap();
        std::fs::create_dir(&at).unwrap(); // as an unmounted NAS looks
        for error in [
            store.workflows().unwrap_err(),
            store.nodes("demo").unwrap_err(),
            store.pointer(&name).unwrap_err(),
            store.environments().unwrap_err(),
        ] {
            assert!(error.to_string().contains("is gone") && !error.is_not_found(), "{error:?}");
        }
    }

    #[test]
    fn a_newer_or_damaged_version_document_is_told_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(dir.path()).unwrap();
        let name: EnvName = "demo/a".parse().unwrap();
        store.publish_version(draft("demo/a")).unwrap();
        let path = store.version_path(&name, 1);
        for (bytes, kind) in [("{\"format\":99}", Kind::Unsupported), ("{\"for", Kind::Corrupt), ("", Kind::Corrupt)] {
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(store.current(&name).unwrap_err().kind(), kind);
        }
    }
}
