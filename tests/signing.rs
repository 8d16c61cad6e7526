//! Signed versions: what a mount that trusts keys refuses, and what it goes on serving.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[macro_use]
mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{Fixture, SITE, file, noise, no_mounts_because};
use envfabric::environment::{Digest, SecretKey, Version};
use envfabric::error::{Kind, Result};
use envfabric::mount::{Mounted, Options, mount as mount_store};
use envfabric::store::{Codec, Index, LayerDoc, Store, TrustedKeys, sealed};
use envfabric::{cache, store};
use serde_json::Value;

fn key(n: u8) -> SecretKey {
    SecretKey::new(&[n; 32], &format!("key {n}")).unwrap()
}

const OURS: u8 = 1;
const THEIRS: u8 = 2;

/// A store with `demo/a` (three versions, the third current through pointer 3) and `demo/b` (one), all signed.
struct Signed {
    fixture: Fixture,
}

impl Signed {
    fn new(codec: Codec) -> Signed {
        let signed = Signed { fixture: Fixture::with(codec) };
        let layers = signed.fixture.packages();
        for (name, layers) in
            [("demo/a", &layers[..1]), ("demo/a", &layers[..2]), ("demo/a", &layers[..3]), ("demo/b", &layers[..1])]
        {
            signed.publish(&signed.by(OURS), name, layers.to_vec());
        }
        signed
    }

    fn store(&self) -> Store {
        Store::open(self.fixture.store.root()).unwrap()
    }

    /// The store as somebody publishes who has key `n`.
    fn by(&self, n: u8) -> Store {
        self.store().signing_with(key(n))
    }

    fn publish(&self, store: &Store, name: &str, layers: Vec<Digest>) -> u64 {
        store.publish_version(self.draft(name, layers)).unwrap().version().number
    }

    fn draft(&self, name: &str, layers: Vec<Digest>) -> Version {
        let mut draft = self.fixture.draft(name, layers);
        let all: Vec<Digest> = [draft.interpreter.layer, draft.scaffold].iter().chain(&draft.layers).copied().collect();
        draft.summaries = self.fixture.store.ensure_summaries(&self.fixture.index, &all, true).unwrap();
        draft
    }

    fn path(&self, below: &str) -> PathBuf {
        self.fixture.store.root().join(below)
    }

    /// The store as node `name` sees it, which trusts our key.
    fn trusting(&self, name: &str) -> Store {
        let dir = self.fixture.place(&format!("{name}-state"));
        let store = self.store();
        let trust = TrustedKeys::new(vec![key(OURS).public()], Some(&dir), &store).unwrap();
        store.trusting(trust)
    }

    /// A mount on node `name`, with an index that repeats whatever the store's own documents say.
    fn mounted(&self, name: &str) -> Mounted {
        let dir = self.fixture.place(name);
        let index = Index::open(&dir.join("index"), &self.store()).unwrap();
        let options = Options {
            cache: Some(cache::Options { keep_free: 0, ..cache::Options::at(dir.join("cache")) }),
            ..Options::at(dir.join("mounted"))
        };
        mount_store(self.trusting(name), Arc::new(index), &options).unwrap()
    }
}

/// Everything a program of version `version` of `name` may see: names, modes, sizes, targets and bytes.
fn read_all(at: &Path) -> std::io::Result<Vec<(PathBuf, u32, Vec<u8>)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(at)? {
        let path = entry?.path();
        let meta = fs::symlink_metadata(&path)?;
        let bytes = if meta.is_symlink() {
            fs::read_link(&path)?.into_os_string().into_encoded_bytes()
        } else if meta.is_dir() {
            found.extend(read_all(&path)?);
            Vec::new()
        } else {
            fs::read(&path)?
        };
        assert!(meta.is_dir() || meta.len() == bytes.len() as u64, "{}", path.display());
        found.push((path, meta.permissions().mode(), bytes));
    }
    found.sort();
    Ok(found)
}

#[test]
fn a_signed_environment_is_served() {
    needs_mounts!();
    for codec in [Codec::Raw, Codec::Zstd] {
        let signed = Signed::new(codec);
        let mounted = signed.mounted("node");
        let venv = mounted.mount_point().join("demo/a/.venv");
        assert_eq!(fs::read(venv.join(SITE).join("gamma/data/big.bin")).unwrap(), noise(700_000, 300));
        assert!(read_all(&mounted.mount_point().join("demo/a/.versions/3")).unwrap().len() > 30);
        mounted.unmount().unwrap();
    }
}
