//! Leases: who uses what, so that no collector takes it.
//!
//! `leases/<id>.json` says which versions a process shows. It is published as every document is, renewed by setting its
//! time, and counts until nobody has renewed it for [`STALE`] by the server's clock. When the set of versions changes, a
//! new document is published before the old one is removed, so there is no moment without one.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Store, disk, host, list_names, now, publish, read_json, to_json, trash};
use crate::environment::EnvName;
use crate::error::{Error, IoContext, Kind, Result};

/// A lease that nobody has renewed for so long does not count any more, unless the grace time is longer: then that.
pub const STALE: Duration = Duration::from_secs(60 * 60);
/// How often a lease is renewed.
const RENEWED: Duration = Duration::from_secs(60);

/// A version of an environment.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Leased {
    /// Its name.
    pub environment: EnvName,
    /// The number.
    pub version: u64,
}

/// `leases/<id>.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseDoc {
    /// Format of this document, 1.
    pub format: u32,
    /// The host of the process.
    pub host: String,
    /// The process.
    pub pid: u32,
    /// What for: `mount at /envs`.
    pub purpose: String,
    /// What must stay.
    pub versions: Vec<Leased>,
    /// When.
    pub at: Timestamp,
    /// Random.
    pub nonce: String,
}

/// A lease that was found in the store.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) path: PathBuf,
    /// When it was renewed last, by the server's clock.
    pub(super) renewed: SystemTime,
    /// What it says, if that can be read.
    pub(super) doc: Result<LeaseDoc>,
}

impl Store {
    fn leases_dir(&self) -> PathBuf {
        self.root.join("leases")
    }

    /// All leases, stale ones too.
    pub(super) fn leases(&self) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        for name in list_names(&self.leases_dir())?.into_iter().filter(|name| name.ends_with(".json")) {
            let path = self.leases_dir().join(name);
            // Given up meanwhile.
            let Some(renewed) = trash::modified(&path)? else { continue };
            let doc = read_json::<LeaseDoc>(&path).and_then(|doc| match doc.format {
                1 => Ok(doc),
                _ => Err(Error::new(Kind::Unsupported, format!("lease {} is of a newer format", path.display()))
                    .hint("upgrade envfabric on this machine")),
            });
            match doc {
                Err(error) if error.is_not_found() => {}
                doc => found.push(Found { path, renewed, doc }),
            }
        }
        Ok(found)
    }

    /// The leases that can be read, with the time since each was renewed, by this machine's clock; for people.
    pub fn leases_told(&self) -> Result<Vec<(LeaseDoc, Duration)>> {
        let told = |found: Found| Some((found.doc.ok()?, found.renewed.elapsed().unwrap_or_default()));
        Ok(self.leases()?.into_iter().filter_map(told).collect())
    }
}

/// A lease of this process. Given up when dropped.
#[derive(Debug)]
pub struct Lease {
    store: Store,
    purpose: String,
    versions: BTreeSet<Leased>,
    published: Option<PathBuf>,
    renewed: Instant,
}

impl Lease {
    /// One that protects nothing yet.
    pub fn new(store: Store, purpose: impl Into<String>) -> Lease {
        let (versions, published, renewed) = (BTreeSet::new(), None, Instant::now());
        Lease { store, purpose: purpose.into(), versions, published, renewed }
    }

    /// Lets it protect `versions`, from the return of this call on, and renews it if it is time.
    ///
    /// # Errors
    /// It cannot be written, on a node that may only read the store, say: then what was leased before stays leased until
    /// it is stale.
    pub fn protect(&mut self, versions: BTreeSet<Leased>) -> Result<()> {
        if self.versions == versions && (versions.is_empty() || self.renewed.elapsed() < RENEWED) {
            return Ok(());
        }
        if self.versions == versions
            && let Some(path) = &self.published
            && File::open(path).and_then(|file| disk::touch(&file, path)).is_ok()
        {
            self.renewed = Instant::now();
            return Ok(());
        }
        let old = self.published.clone();
        let published = if versions.is_empty() { None } else { Some(self.publish(&versions)?) };
        (self.versions, self.published, self.renewed) = (versions, published, Instant::now());
        old.map_or(Ok(()), |old| give_up(&old))
    }

    fn publish(&self, versions: &BTreeSet<Leased>) -> Result<PathBuf> {
        self.store.require_writable()?;
        self.store.require_present()?;
        let nonce = publish::nonce()?;
        let path = self.store.leases_dir().join(format!("{nonce}.json"));
        let doc = LeaseDoc {
            format: 1,
            host: host(),
            pid: std::process::id(),
            purpose: self.purpose.clone(),
            versions: versions.iter().cloned().collect(),
            at: now(),
            nonce,
        };
        publish::bytes(self.store.root(), &path, &to_json(&doc)?)?;
        Ok(path)
    }
}

fn give_up(path: &std::path::Path) -> Result<()> {
    match disk::remove(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other.at("removing", path),
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(path) = &self.published {
            let _ = give_up(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_there_without_a_gap_while_its_versions_change_and_goes_with_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(dir.path()).unwrap();
        let one = |version| Leased { environment: "demo/a".parse().unwrap(), version };
        let mut lease = Lease::new(store.clone(), "a test");
        lease.protect(BTreeSet::new()).unwrap();
        assert!(store.leases().unwrap().is_empty(), "nothing is protected, nothing is written");
        for versions in [vec![one(1)], vec![one(1), one(2)], vec![one(2)]] {
            lease.protect(versions.iter().cloned().collect()).unwrap();
            let found = store.leases().unwrap();
            assert_eq!(found.len(), 1);
            assert_eq!(found[0].doc.as_ref().unwrap().versions, versions);
        }
        // One that was taken away, as a stale one is, comes again with the next renewal.
        std::fs::remove_file(&store.leases().unwrap()[0].path).unwrap();
        lease.renewed = Instant::now().checked_sub(RENEWED).unwrap();
        lease.protect([one(2)].into()).unwrap();
        assert_eq!(store.leases().unwrap().len(), 1);
        drop(lease);
        assert!(store.leases().unwrap().is_empty());
    }
}
