//! Signed versions: what a mount that trusts keys refuses, and what it goes on serving.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[macro_use]
mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{Fixture, SITE, no_mounts_because, noise};
use envfabric::cache;
use envfabric::environment::{Digest, EnvName, SecretKey, Version};
use envfabric::error::Kind;
use envfabric::mount::{Mounted, Options, mount as mount_store};
use envfabric::store::{Chunks, Codec, Index, LayerDoc, Signature, Store, TrustedKeys, sealed};
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
        for path in files(&self.path("layers")) {
            let layer = path.file_stem().unwrap().to_str().unwrap().parse().unwrap();
            let _ = index.layer(&self.store(), &layer);
        }
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

/// A process that another test starts has, for a moment, this one's open files, and keeps its mount busy.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[test]
fn a_signed_environment_is_served() {
    needs_mounts!();
    let _alone = alone();
    for codec in [Codec::Raw, Codec::Zstd] {
        let signed = Signed::new(codec);
        let mounted = signed.mounted("node");
        let venv = mounted.mount_point().join("demo/a/.venv");
        assert_eq!(fs::read(venv.join(SITE).join("gamma/data/big.bin")).unwrap(), noise(700_000, 300));
        assert!(read_all(&mounted.mount_point().join("demo/a/.versions/3")).unwrap().len() > 30);
        mounted.unmount().unwrap();
    }
}

/// What a mount makes of an attack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// Looking at the environment fails with this errno.
    Fails(i32),
    /// Exactly what was published is shown: what was altered is not looked at.
    Serves,
}

const REJECTED: Then = Then::Fails(libc::EKEYREJECTED);
const DAMAGED: Then = Then::Fails(libc::EIO);

/// Writes `bytes` in place of what is at `path`, as whoever can write to the store can.
fn put(path: &Path, bytes: &[u8]) {
    let _ = fs::remove_file(path);
    fs::write(path, bytes).unwrap();
}

/// The document at `path`, without its seal, changed by `change`, and sealed again.
fn resealed(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    value.as_object_mut().unwrap().remove("seal");
    change(&mut value);
    put(path, &sealed(&value).unwrap());
}

/// One byte of the file at `path`, in its middle, becomes another.
fn flipped(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    put(path, &bytes);
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all
}

/// Something that whoever can write to the store may do to `demo/a`, whose version 3 is current.
struct Attack {
    name: &'static str,
    then: Then,
    run: fn(&Signed),
}

const V3: &str = "envs/demo/a/versions/3.json";
const P3: &str = "envs/demo/a/current/3.json";

const ATTACKS: &[Attack] = &[
    Attack {
        name: "a version without a signature",
        then: REJECTED,
        run: |s| {
            resealed(&s.path(V3), |doc| drop(doc.as_object_mut().unwrap().remove("signed")));
        },
    },
    Attack {
        name: "a pointer without a signature",
        then: REJECTED,
        run: |s| {
            resealed(&s.path(P3), |doc| drop(doc.as_object_mut().unwrap().remove("signed")));
        },
    },
    Attack {
        name: "another version that nobody signed",
        then: REJECTED,
        run: |s| {
            s.publish(&s.store(), "demo/a", s.fixture.packages());
        },
    },
    Attack { name: "a flipped byte of the version", then: DAMAGED, run: |s| flipped(&s.path(V3)) },
    Attack { name: "a flipped byte of the pointer", then: DAMAGED, run: |s| flipped(&s.path(P3)) },
    Attack {
        name: "an altered version under a new seal",
        then: REJECTED,
        run: |s| {
            resealed(&s.path(V3), |doc| doc["layers"].as_array_mut().unwrap().truncate(1));
        },
    },
    Attack {
        name: "an altered pointer under a new seal",
        then: REJECTED,
        run: |s| {
            resealed(&s.path(P3), |doc| doc["version"] = 1.into());
        },
    },
    Attack {
        name: "the signature of another version",
        then: REJECTED,
        run: |s| {
            let other: Value =
                serde_json::from_slice(&fs::read(s.path("envs/demo/a/versions/2.json")).unwrap()).unwrap();
            resealed(&s.path(V3), |doc| doc["signed"] = other["signed"].clone());
        },
    },
    Attack {
        name: "another version in its place",
        then: DAMAGED,
        run: |s| {
            put(&s.path(V3), &fs::read(s.path("envs/demo/a/versions/2.json")).unwrap());
        },
    },
    Attack {
        name: "a version of another environment in its place",
        then: DAMAGED,
        run: |s| {
            put(&s.path("envs/demo/a/versions/1.json"), &fs::read(s.path("envs/demo/b/versions/1.json")).unwrap());
            put(&s.path(V3), &fs::read(s.path("envs/demo/b/versions/1.json")).unwrap());
        },
    },
    Attack {
        name: "the pointer of another environment",
        then: REJECTED,
        run: |s| {
            let store = s.by(OURS);
            let b: EnvName = "demo/b".parse().unwrap();
            store.rollback(&b, 1).unwrap();
            store.rollback(&b, 1).unwrap();
            put(&s.path(P3), &fs::read(s.path("envs/demo/b/current/3.json")).unwrap());
        },
    },
    Attack {
        name: "an older pointer as a new one",
        then: DAMAGED,
        run: |s| {
            put(&s.path("envs/demo/a/current/4.json"), &fs::read(s.path("envs/demo/a/current/2.json")).unwrap());
        },
    },
    Attack {
        name: "an older pointer as a new one, with its number changed",
        then: REJECTED,
        run: |s| {
            put(&s.path("envs/demo/a/current/4.json"), &fs::read(s.path("envs/demo/a/current/2.json")).unwrap());
            resealed(&s.path("envs/demo/a/current/4.json"), |doc| doc["sequence"] = 4.into());
        },
    },
    Attack {
        name: "a version signed by a key that is not trusted",
        then: REJECTED,
        run: |s| {
            s.publish(&s.by(THEIRS), "demo/a", s.fixture.packages());
        },
    },
    Attack {
        name: "a pointer signed by a key that is not trusted",
        then: REJECTED,
        run: |s| {
            s.by(THEIRS).rollback(&"demo/a".parse().unwrap(), 1).unwrap();
        },
    },
    Attack {
        name: "our key named beside their signature",
        then: REJECTED,
        run: |s| {
            s.publish(&s.by(THEIRS), "demo/a", s.fixture.packages());
            let ours = key(OURS).public().text();
            resealed(&s.path("envs/demo/a/versions/4.json"), |doc| doc["signed"]["by"] = ours.clone().into());
            resealed(&s.path("envs/demo/a/current/4.json"), |doc| doc["signed"]["by"] = ours.into());
        },
    },
    Attack {
        name: "documents of another store",
        then: REJECTED,
        run: |s| {
            let other = Signed::new(s.fixture.store.codec());
            for document in [V3, P3] {
                put(&s.path(document), &fs::read(other.path(document)).unwrap());
            }
        },
    },
    Attack {
        name: "an altered summary",
        then: DAMAGED,
        run: |s| {
            for summary in s.summaries() {
                flipped(&s.path(&format!("blobs/{summary}")));
            }
        },
    },
    Attack {
        name: "a summary that is gone",
        then: DAMAGED,
        run: |s| {
            for summary in s.summaries() {
                fs::remove_file(s.path(&format!("blobs/{summary}"))).unwrap();
            }
        },
    },
    Attack {
        name: "altered documents of layers",
        then: Then::Serves,
        run: |s| {
            for path in files(&s.path("layers")) {
                resealed(&path, |doc| {
                    doc["rows"] = 3.into();
                    doc["pack"] = Value::Null;
                    doc["name"] = "evil".into();
                    doc["spine"] = serde_json::json!([{ "row": 0, "entries": [["evil", 1, "x", 9]] }]);
                    doc["texts"] = serde_json::json!([{ "row": 1, "text": "evil" }]);
                });
            }
        },
    },
    Attack {
        name: "altered keys of layers",
        then: Then::Serves,
        run: |s| {
            fs::create_dir_all(s.path("keys")).unwrap();
            put(
                &s.path(&format!("keys/{}.json", Digest::of(b"x"))),
                &sealed(&serde_json::json!({ "layer": Digest::of(b"x") })).unwrap(),
            );
        },
    },
    Attack {
        name: "altered catalogs and bundles of them",
        then: DAMAGED,
        run: |s| {
            files(&s.path("catalogs")).iter().for_each(|path| flipped(path));
        },
    },
    Attack {
        name: "altered packs",
        then: DAMAGED,
        run: |s| files(&s.path("packs")).iter().for_each(|path| flipped(path)),
    },
    Attack {
        name: "altered blobs but for summaries",
        then: DAMAGED,
        run: |s| {
            let summaries = s.summaries();
            let is_summary = |path: &Path| summaries.iter().any(|summary| path.ends_with(summary));
            files(&s.path("blobs")).iter().filter(|path| !is_summary(path)).for_each(|path| flipped(path));
        },
    },
];

impl Signed {
    /// The names of the blobs that are summaries of version 3.
    fn summaries(&self) -> Vec<String> {
        let version: Value = serde_json::from_slice(&fs::read(self.path(V3)).unwrap()).unwrap();
        let all = version["summaries"].as_array().unwrap();
        all.iter().map(|summary| summary["blob"].as_str().unwrap().to_string()).collect()
    }
}

/// Copies a store. Nothing writes into its files, they are only replaced.
fn copied(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to).unwrap();
    for path in files(from) {
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() { copied(&path, &target) } else { fs::hard_link(&path, &target).unwrap() }
    }
}

/// Every attack, in a store of each sort, on a node that sees the store for the first time: nothing of it is shown, and
/// once it is undone all is well on the same mount.
fn every_attack_on(codec: Codec) {
    let signed = Signed::new(codec);
    let keep = signed.fixture.dir.path().join("keep");
    copied(signed.fixture.store.root(), &keep);
    let mounted = signed.mounted("healthy");
    let look = |root: &Path| read_all(&root.join("demo/a/.venv/.."));
    let relative = |found: Vec<(PathBuf, u32, Vec<u8>)>, root: &Path| -> Vec<(PathBuf, u32, Vec<u8>)> {
        let below = |path: PathBuf| path.strip_prefix(root).unwrap().to_path_buf();
        let without_config = found.into_iter().filter(|(path, ..)| !path.ends_with("pyvenv.cfg"));
        without_config.map(|(path, mode, bytes)| (below(path), mode, bytes)).collect()
    };
    let sound = relative(look(mounted.mount_point()).unwrap(), mounted.mount_point());
    mounted.unmount().unwrap();
    for attack in ATTACKS {
        let node = format!("node of {}", attack.name);
        (attack.run)(&signed);
        let mounted = signed.mounted(&node);
        let root = mounted.mount_point();
        let found = look(root);
        match (attack.then, found) {
            (Then::Serves, Ok(found)) => assert_eq!(relative(found, root), sound, "{codec:?}: {}", attack.name),
            (Then::Fails(errno), Err(error)) => {
                assert_eq!(error.raw_os_error(), Some(errno), "{codec:?}: {}: {error}", attack.name);
            }
            (then, found) => panic!("{codec:?}: {}: {then:?} but {:?}", attack.name, found.map(|all| all.len())),
        }
        mounted.unmount().unwrap();
        copied(&keep, signed.fixture.store.root());
        let mounted = signed.mounted(&node);
        let found = look(mounted.mount_point()).unwrap_or_else(|error| panic!("after {}: {error}", attack.name));
        assert_eq!(relative(found, mounted.mount_point()), sound, "after {}", attack.name);
        mounted.unmount().unwrap();
    }
}

#[test]
fn no_attack_on_a_store_as_it_is_shows_anything_that_was_not_signed() {
    needs_mounts!();
    let _alone = alone();
    every_attack_on(Codec::Raw);
}

#[test]
fn no_attack_on_a_compressed_store_shows_anything_that_was_not_signed() {
    needs_mounts!();
    let _alone = alone();
    every_attack_on(Codec::Zstd);
}

/// Lets `index` have the documents as they lie there, of all layers that are shown: then no summary is asked.
fn knows(index: &Index, signed: &Signed) {
    let version = signed.store().version(&signed.fixture.name("demo/b"), 1).unwrap();
    let layers = [version.layers, vec![version.interpreter.layer, version.scaffold]].concat();
    index.layers(&signed.store(), &layers).unwrap();
}

/// Lets `layers/<digest>.json` of `layer` name a catalog and a pack with other files than the layer has.
fn replaced(signed: &Signed, layer: &Digest, by: &Digest) {
    let store = signed.store();
    let (ours, theirs) = (store.layer(layer).unwrap(), store.layer(by).unwrap());
    let path = signed.fixture.dir.path().join("forged");
    put(&path, &fs::read(store.catalog_path(&theirs.catalog)).unwrap());
    let db = rusqlite::Connection::open(&path).unwrap();
    db.execute("UPDATE meta SET value = ?1 WHERE key = 'layer'", [layer.to_string()]).unwrap();
    drop(db);
    let bytes = fs::read(&path).unwrap();
    let catalog = Digest::of(&bytes);
    put(&store.catalog_path(&catalog), &bytes);
    let forged = LayerDoc { digest: ours.digest, catalog, catalog_size: bytes.len() as u64, ..theirs };
    put(&store.layer_path(layer), &sealed(&forged).unwrap());
}

#[test]
fn what_deceives_a_mount_that_trusts_nobody_does_not_deceive_one_that_trusts_keys() {
    needs_mounts!();
    let _alone = alone();
    let signed = Signed::new(Codec::Raw);
    let alpha = signed.fixture.packages()[0];
    let evil = vec![
        common::file(format!("{SITE}/alpha/__init__.py"), "name = 'evil'\n"),
        common::file(format!("{SITE}/alpha/empty.py"), ""),
        common::file(format!("{SITE}/alpha-1.0.dist-info/METADATA"), "Name: alpha\n"),
    ];
    let evil = signed.fixture.layer("alpha", evil);
    replaced(&signed, &alpha, &evil);
    let dir = signed.fixture.place("both");
    let at = |mounted: &Mounted| {
        fs::read_to_string(mounted.mount_point().join("demo/b/.venv").join(SITE).join("alpha/__init__.py")).unwrap()
    };
    let index = Arc::new(Index::open(&dir.join("index"), &signed.store()).unwrap());
    knows(&index, &signed);
    let options = Options {
        cache: Some(cache::Options { keep_free: 0, ..cache::Options::at(dir.join("cache")) }),
        cache_always: true,
        ..Options::at(dir.join("mounted"))
    };
    // On the same node, with the same index and the same directory for the cache.
    let mounted = mount_store(signed.store(), index.clone(), &options).unwrap();
    assert_eq!(at(&mounted), "name = 'evil'\n", "the attack is one");
    mounted.unmount().unwrap();
    let mounted = mount_store(signed.trusting("both"), index, &options).unwrap();
    assert_eq!(at(&mounted), "name = \"alpha\"\n");
    let stats = envfabric::mount::stats(mounted.mount_point()).unwrap();
    assert_eq!(stats.trusted_keys, [key(OURS).public().text()]);
    mounted.unmount().unwrap();
}

#[test]
fn what_a_mount_that_trusts_nobody_has_compared_is_not_taken_for_compared() {
    needs_mounts!();
    let _alone = alone();
    let signed = Signed::new(Codec::Raw);
    let (right, wrong) = (noise(700_000, 100), noise(700_000, 999));
    // A catalog that names the chunks of other bytes for a blob, and the blob with these.
    let store = signed.store();
    let alpha = signed.fixture.packages()[0];
    let doc = store.layer(&alpha).unwrap();
    let path = signed.fixture.dir.path().join("forged");
    put(&path, &fs::read(store.catalog_path(&doc.catalog)).unwrap());
    let db = rusqlite::Connection::open(&path).unwrap();
    let chunks = Chunks::of(&wrong).to_bytes();
    let set = "UPDATE chunk SET digests = ?1 WHERE object = ?2";
    assert_eq!(db.execute(set, (chunks, Digest::of(&right).as_bytes())).unwrap(), 1);
    drop(db);
    let bytes = fs::read(&path).unwrap();
    let catalog = Digest::of(&bytes);
    put(&store.catalog_path(&catalog), &bytes);
    let forged = LayerDoc { catalog, catalog_size: bytes.len() as u64, ..doc };
    put(&store.layer_path(&alpha), &sealed(&forged).unwrap());
    put(&store.blob_path(&Digest::of(&right)), &wrong);

    let dir = signed.fixture.place("both");
    let index = Arc::new(Index::open(&dir.join("index"), &store).unwrap());
    knows(&index, &signed);
    let options = Options {
        cache: Some(cache::Options { keep_free: 0, ..cache::Options::at(dir.join("cache")) }),
        cache_always: true,
        ..Options::at(dir.join("mounted"))
    };
    let read =
        |mounted: &Mounted| fs::read(mounted.mount_point().join("demo/b/.venv").join(SITE).join("alpha/data/big.bin"));
    let mounted = mount_store(store, index.clone(), &options).unwrap();
    assert!(read(&mounted).unwrap() == wrong, "the attack is one");
    mounted.unmount().unwrap();
    let mounted = mount_store(signed.trusting("both"), index, &options).unwrap();
    assert_eq!(read(&mounted).unwrap_err().raw_os_error(), Some(libc::EIO));
    put(&signed.store().blob_path(&Digest::of(&right)), &right);
    assert!(read(&mounted).unwrap() == right);
    mounted.unmount().unwrap();
}

#[test]
fn a_version_whose_layers_no_signed_summary_tells_of_is_refused() {
    needs_mounts!();
    let _alone = alone();
    let signed = Signed::new(Codec::Raw);
    let draft = Version { summaries: vec![], ..signed.draft("demo/c", signed.fixture.packages()) };
    signed.by(OURS).publish_version(draft).unwrap();
    let mounted = signed.mounted("node");
    let error = fs::read_dir(mounted.mount_point().join("demo/c/.venv/lib")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EKEYREJECTED));
    mounted.unmount().unwrap();
}

#[test]
fn rolling_back_to_an_older_signed_version_is_possible() {
    needs_mounts!();
    let _alone = alone();
    let signed = Signed::new(Codec::Raw);
    let mounted = signed.mounted("node");
    let link = mounted.mount_point().join("demo/a/.venv");
    assert_eq!(fs::read_link(&link).unwrap(), Path::new(".versions/3/.venv"));
    let store = signed.trusting("builder").signing_with(key(OURS));
    store.rollback(&"demo/a".parse().unwrap(), 1).unwrap();
    common::until("the rollback is seen", || fs::read_link(&link).unwrap() == Path::new(".versions/1/.venv"));
    assert!(link.join("bin/alpha").exists());
    mounted.unmount().unwrap();
}

#[test]
fn a_mount_stays_with_what_it_knows_when_something_unsigned_appears() {
    needs_mounts!();
    let _alone = alone();
    let signed = Signed::new(Codec::Raw);
    let mounted = signed.mounted("node");
    let root = mounted.mount_point().join("demo/a");
    assert_eq!(fs::read_link(root.join(".venv")).unwrap(), Path::new(".versions/3/.venv"));
    signed.publish(&signed.store(), "demo/a", signed.fixture.packages());
    common::until("the new number is listed", || root.join(".versions").read_dir().unwrap().count() == 4);
    assert_eq!(fs::read_link(root.join(".venv")).unwrap(), Path::new(".versions/3/.venv"));
    assert!(root.join(".venv/bin/alpha").exists());
    let error = fs::read_dir(root.join(".versions/4")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EKEYREJECTED));
    // A signed pointer goes over it.
    signed.trusting("builder").signing_with(key(OURS)).rollback(&"demo/a".parse().unwrap(), 2).unwrap();
    common::until("the rollback is seen", || {
        fs::read_link(root.join(".venv")).unwrap() == Path::new(".versions/2/.venv")
    });
    mounted.unmount().unwrap();
}

#[test]
fn a_node_that_saw_a_newer_pointer_refuses_the_one_before_it_until_it_is_told_to_forget() {
    let signed = Signed::new(Codec::Raw);
    let name: EnvName = "demo/a".parse().unwrap();
    assert_eq!(signed.trusting("saw").current_number(&name).unwrap(), 3);
    fs::remove_file(signed.path(P3)).unwrap();
    // Also in another process, and whatever the store's id was made.
    let error = signed.trusting("saw").pointer(&name).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (Kind::Rejected, libc::EKEYREJECTED));
    let text = format!("{error:?}");
    assert!(text.contains("demo/a") && text.contains("pointer 3") && text.contains("key forget demo/a"), "{text}");
    assert_eq!(signed.trusting("never saw").current_number(&name).unwrap(), 2, "a signature does not grow old");
    fs::remove_file(signed.path("envs/demo/a/current/2.json")).unwrap();
    assert_eq!(signed.trusting("saw").pointer(&name).unwrap_err().kind(), Kind::Rejected, "as if it were new");
    resealed(&signed.path("fabric.json"), |doc| doc["id"] = "0123456789abcdef0123456789abcdef".into());
    assert_eq!(
        signed.trusting("saw").pointer(&name).unwrap_err().kind(),
        Kind::Rejected,
        "as if it were another store"
    );

    let signed = Signed::new(Codec::Raw);
    signed.trusting("saw").current_number(&name).unwrap();
    fs::remove_file(signed.path(P3)).unwrap();
    let store = signed.trusting("saw");
    assert!(store.trust().unwrap().forget(&name).unwrap());
    assert_eq!(store.current_number(&name).unwrap(), 2);
}

#[test]
fn after_a_restored_backup_a_builder_that_saw_more_goes_on_where_nodes_believe_it() {
    let signed = Signed::new(Codec::Raw);
    let name: EnvName = "demo/a".parse().unwrap();
    let keep = signed.fixture.dir.path().join("keep");
    copied(signed.fixture.store.root(), &keep);
    signed.publish(&signed.by(OURS), "demo/a", signed.fixture.packages());
    for node in ["node", "builder"] {
        assert_eq!(signed.trusting(node).current(&name).unwrap().number, 4);
    }
    copied(&keep, signed.fixture.store.root());
    assert_eq!(signed.trusting("node").pointer(&name).unwrap_err().kind(), Kind::Rejected);
    let builder = signed.trusting("builder").signing_with(key(OURS));
    // Neither the number of the pointer nor that of the version is one that was used.
    assert_eq!(builder.rollback(&name, 3).unwrap().sequence, 5);
    assert_eq!(signed.publish(&builder, "demo/a", signed.fixture.packages()), 5);
    assert_eq!(signed.trusting("node").current(&name).unwrap().number, 5);
}

#[test]
fn a_number_that_was_seen_is_never_believed_with_another_content() {
    let signed = Signed::new(Codec::Raw);
    let name: EnvName = "demo/a".parse().unwrap();
    let keep = signed.fixture.dir.path().join("keep");
    copied(signed.fixture.store.root(), &keep);
    signed.publish(&signed.by(OURS), "demo/a", signed.fixture.packages());
    assert_eq!(signed.trusting("saw").current(&name).unwrap().number, 4);
    copied(&keep, signed.fixture.store.root());
    // A builder that knows nothing of it gives both numbers anew.
    signed.publish(&signed.by(OURS), "demo/a", signed.fixture.packages());
    for error in
        [signed.trusting("saw").version(&name, 4).unwrap_err(), signed.trusting("saw").pointer(&name).unwrap_err()]
    {
        assert_eq!(error.kind(), Kind::Rejected);
        assert!(error.to_string().contains("has seen another"), "{error:?}");
    }
    assert_eq!(signed.trusting("new").current(&name).unwrap().number, 4);
}

#[test]
fn who_would_be_refused_publishes_nothing() {
    let signed = Signed::new(Codec::Raw);
    let name: EnvName = "demo/a".parse().unwrap();
    let before = files(&signed.path("envs/demo/a/current")).len() + files(&signed.path("envs/demo/a/versions")).len();
    let refused = |store: &Store, what: &str| {
        for error in [
            store.publish_version(signed.draft("demo/a", vec![])).map(drop).unwrap_err(),
            store.rollback(&name, 1).map(drop).unwrap_err(),
            store.remove(&name).map(drop).unwrap_err(),
        ] {
            assert_eq!(error.kind(), Kind::Rejected);
            assert!(
                error.to_string().contains(what) && error.hint_text().unwrap().contains("--sign-with"),
                "{error:?}"
            );
        }
    };
    refused(&signed.trusting("builder"), "this machine asks for signed versions");
    refused(&signed.trusting("builder").signing_with(key(THEIRS)), "by other keys than key 2");
    signed.store().set_policy(&[key(OURS).public()]).unwrap();
    refused(&signed.store(), "asks for signed versions");
    refused(&signed.by(THEIRS), "by other keys than key 2");
    let after = files(&signed.path("envs/demo/a/current")).len() + files(&signed.path("envs/demo/a/versions")).len();
    assert_eq!(before, after);
    signed.by(OURS).rollback(&name, 1).unwrap();
}

#[test]
fn a_builder_that_trusts_keys_publishes_over_what_it_does_not_believe() {
    let signed = Signed::new(Codec::Raw);
    let name: EnvName = "demo/a".parse().unwrap();
    signed.by(THEIRS).rollback(&name, 1).unwrap();
    signed.publish(&signed.store(), "demo/n", signed.fixture.packages());
    let builder = signed.trusting("builder").signing_with(key(OURS));
    assert_eq!(builder.pointer(&name).unwrap_err().kind(), Kind::Rejected);
    assert_eq!(builder.rollback(&name, 2).unwrap().sequence, 5);
    assert_eq!(builder.current_number(&name).unwrap(), 2);
    // An environment whose first version nobody has signed.
    assert_eq!(builder.rollback(&"demo/n".parse().unwrap(), 1).unwrap_err().kind(), Kind::Rejected);
    assert_eq!(signed.publish(&builder, "demo/n", signed.fixture.packages()), 2);
    assert_eq!(builder.current_number(&"demo/n".parse().unwrap()).unwrap(), 2);
}

#[test]
fn signatures_are_told_and_fsck_says_what_would_be_refused() {
    let signed = Signed::new(Codec::Raw);
    let name: EnvName = "demo/a".parse().unwrap();
    signed.publish(&signed.store(), "demo/a", signed.fixture.packages());
    signed.publish(&signed.by(THEIRS), "demo/a", signed.fixture.packages());
    put(&signed.path("envs/demo/a/versions/6.json"), &fs::read(signed.path(V3)).unwrap());
    let store = signed.trusting("node");
    let said = |number| store.signature(&name, number, store.trust()).unwrap();
    assert!(matches!(said(3), Some(Signature::Trusted { key: k }) if k.to_string().ends_with("key 1")));
    assert!(matches!(said(4), Some(Signature::Unsigned)));
    assert!(matches!(said(5), Some(Signature::UnknownKey { key: k }) if k == key(THEIRS).public()));
    assert!(matches!(said(6), Some(Signature::Wrong { key: k }) if k == key(OURS).public()));
    assert_eq!(said(7), None);
    let report = store.fsck(&|_, _| ()).unwrap();
    let errors: Vec<&str> =
        report.findings.iter().filter(|f| f.problem.contains("refused")).map(|f| &*f.object).collect();
    assert_eq!(errors, ["demo/a", "demo/a@4", "demo/a@5"], "{:#?}", report.findings);
    let note = report.findings.iter().find(|finding| finding.object == "versions").unwrap();
    assert!(note.problem.contains("4 signed by key 1"), "{note:?}");
    // A machine that trusts everybody goes by what the store asks for.
    assert!(!signed.store().fsck(&|_, _| ()).unwrap().findings.iter().any(|f| f.object == "demo/a@4"));
    signed.store().set_policy(&[key(OURS).public()]).unwrap();
    let report = signed.store().fsck(&|_, _| ()).unwrap();
    assert!(
        report.findings.iter().any(|f| f.object == "demo/a@4" && f.problem == "not signed"),
        "{:#?}",
        report.findings
    );
}

/// The program, with a home of its own and no keys.
fn program(home: &Path, store: &Path) -> std::process::Command {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_envfabric"));
    command.env_clear().env("HOME", home).env("PATH", "/usr/bin:/bin").arg("--store").arg(store);
    command
}

/// Exit code, standard output and standard error.
fn ran(command: &mut std::process::Command) -> (i32, String, String) {
    let done = command.stdin(std::process::Stdio::null()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (done.status.code().unwrap(), text(done.stdout), text(done.stderr))
}

#[test]
fn keys_are_made_shown_and_never_overwritten_and_what_is_wrong_with_one_is_told() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let (home, store) = (dir.path(), dir.path().join("store"));
    let run = |args: &[&str]| ran(program(home, &store).args(args));
    let (code, made, told) = run(&["key", "new", "--name", "release"]);
    assert_eq!(code, 0, "{told}");
    assert!(made.starts_with("ed25519:") && made.ends_with(" release\n"), "{made}");
    let file = home.join(".config/envfabric/signing.key");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let secret = fs::read_to_string(&file).unwrap();
    assert_eq!(fs::read_to_string(home.join(".config/envfabric/signing.key.pub")).unwrap(), made);
    let (code, _, told) = run(&["key", "new"]);
    assert!(code == 1 && told.contains("is there already") && told.contains("--out"), "{told}");
    assert_eq!(fs::read_to_string(&file).unwrap(), secret);
    let path = file.to_str().unwrap();
    for shown in [path, &format!("{path}.pub")] {
        assert_eq!(run(&["key", "show", shown]), (0, made.clone(), String::new()));
    }
    let (code, json, _) = run(&["key", "show", path, "--json"]);
    assert_eq!((code, serde_json::from_str::<Value>(&json).unwrap()[0].as_str().unwrap()), (0, made.trim()));
    let (code, json, _) = run(&["key", "show", "--json", "--sign-with", path, "--trust-key", made.trim()]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((code, &json["signs_with"], &json["trusts"][0]), (0, &json["trusts"][0], &Value::from(made.trim())));

    let other = home.join("other");
    fs::write(&other, "this is no key\n").unwrap();
    let (other, open) = (other.to_str().unwrap(), home.join("open.key"));
    fs::write(&open, &secret).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o640)).unwrap();
    let open = open.to_str().unwrap();
    let binary = home.join("binary");
    fs::write(&binary, [0xff; 64]).unwrap();
    let binary = binary.to_str().unwrap();
    assert_eq!(run(&["init"]).0, 0);
    let digits = secret.lines().last().unwrap().to_string();
    let mistakes: &[(&[&str], i32, &[&str])] = &[
        (&["key"], 2, &["Usage"]),
        (&["key", "new", "--name", "a,b"], 2, &["cannot be the name of a key", "hint"]),
        (&["key", "new", "--out", "/dev/null/x"], 1, &["/dev/null"]),
        (&["key", "show", "/nowhere"], 1, &["/nowhere"]),
        (&["key", "show", other], 1, &["other"]),
        (&["key", "show", open], 1, &["can be read by others", "chmod 600"]),
        (&["key", "show", binary], 1, &["is no text"]),
        (&["key", "require"], 2, &["KEY|FILE"]),
        (&["key", "require", "--nobody", made.trim()], 2, &["cannot be used with"]),
        (&["key", "require", "ed25519:12"], 2, &["is not a public key", "hint"]),
        (&["key", "require", "/nowhere"], 1, &["/nowhere"]),
        (&["key", "require", path], 2, &["secret key", "public half"]),
        (&["key", "forget"], 2, &["WF/NODE"]),
        (&["key", "forget", "demo/"], 2, &["demo/"]),
        (&["key", "forget", "demo"], 2, &["trusts whoever", "trusted-keys"]),
        (&["key", "forget", "demo/a"], 2, &["trusts whoever", "trusted-keys"]),
        (&["list", "--trust-key", "ed25519:zz"], 2, &["is not a public key"]),
        (&["list", "--trust-key", other], 2, &["has no public keys", "other"]),
        (&["list", "--trust-key", path], 2, &["secret key"]),
        (&["rollback", "demo/a", "1", "--sign-with", "/nowhere"], 1, &["/nowhere"]),
        (&["rollback", "demo/a", "1", "--sign-with", open], 1, &["can be read by others"]),
        (&["rollback", "demo/a", "1", "--sign-with", &format!("{path}.pub")], 1, &["can be read by others"]),
    ];
    for (args, exit, parts) in mistakes {
        let (code, out, told) = run(args);
        assert_eq!((code, out.as_str()), (*exit, ""), "{args:?}: {told}");
        for part in *parts {
            assert!(told.contains(part), "{args:?}: {part:?} is not in {told}");
        }
        assert!(!told.contains(&digits), "{args:?}: {told}");
        let (code, _, told) = ran(program(home, &store).arg("--json").args(*args));
        assert_eq!(code, *exit, "{args:?}");
        let told: Value = serde_json::from_str(&told).unwrap_or_else(|error| panic!("{args:?}: {error}: {told}"));
        assert!(told["error"]["message"].is_string(), "{args:?}: {told}");
    }
    for help in
        [&["key", "--help"][..], &["key", "new", "--help"], &["key", "require", "--help"], &["key", "forget", "-h"]]
    {
        let (code, out, _) = run(help);
        assert!(code == 0 && out.contains("Usage: envfabric key"), "{out}");
    }
    assert_eq!(run(&["key", "require", made.trim()]).0, 0);
    assert!(run(&["key", "show"]).1.contains(&format!("store asks for  {made}")));
    assert!(run(&["remove", "demo/a"]).2.contains("there is no environment"));
    assert_eq!(run(&["key", "require", "--nobody"]).1, "the store asks for no signatures\n");
}

#[test]
fn verbs_tell_who_has_signed_what_and_a_config_file_names_the_keys() {
    needs_mounts!();
    let _alone = alone();
    let signed = Signed::new(Codec::Raw);
    signed.publish(&signed.store(), "demo/b", signed.fixture.packages());
    let home = signed.fixture.place("home");
    let config = home.join("config.toml");
    fs::write(home.join("ours.pub"), format!("# who publishes\n{}\n", key(OURS).public())).unwrap();
    put(&home.join("ours.key"), key(OURS).file().as_bytes());
    fs::set_permissions(home.join("ours.key"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&config, "trusted-keys = [\"ours.pub\"]\nsign-with = \"ours.key\"\n").unwrap();
    let store = signed.fixture.store.root().to_path_buf();
    let run = |args: &[&str]| ran(program(&home, &store).arg("--config").arg(&config).args(args));
    let (code, out, told) = run(&["versions", "demo/b"]);
    assert!(code == 0 && out.contains("signed by key 1") && out.contains("not signed"), "{out}{told}");
    let (_, json, _) = run(&["versions", "demo/b", "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (&json[0]["signature"]["state"], &json[1]["signature"]["state"]),
        (&"trusted".into(), &"unsigned".into())
    );
    let (code, out, told) = run(&["show", "demo/a"]);
    assert!(code == 0 && out.contains("signed   signed by key 1"), "{out}{told}");
    let (_, json, _) = run(&["show", "demo/b", "--json"]);
    assert_eq!(serde_json::from_str::<Value>(&json).unwrap()["signature"]["state"], "unsigned");
    let (_, json, _) = run(&["doctor", "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    let checks = json["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == "signatures").unwrap();
    let found = check["found"].as_str().unwrap();
    assert!(found.contains("1 signed by key 1") && found.contains("refused: demo/b@2 (not signed)"), "{found}");
    let (code, out, _) = run(&["fsck"]);
    assert!(code == 1 && out.contains("error: demo/b@2 version 2 of demo/b is refused: not signed"), "{out}");

    let mount = signed.fixture.place("mount");
    let mount = mount.to_str().unwrap();
    let (code, out, told) = run(&["mount", mount]);
    assert_eq!(code, 0, "{out}{told}");
    // What is published by a configured key is served, what was not signed is not.
    let (code, out, told) = run(&["rollback", "demo/a", "1"]);
    assert_eq!(code, 0, "{out}{told}");
    let at = Path::new(mount);
    common::until("the rollback is seen", || {
        fs::read_link(at.join("demo/a/.venv")).is_ok_and(|to| to == Path::new(".versions/1/.venv"))
    });
    assert_eq!(fs::metadata(at.join("demo/b/.venv")).unwrap_err().raw_os_error(), Some(libc::EKEYREJECTED));
    let (code, _, told) = run(&["run", "demo/b", "--", "true"]);
    assert!(
        code == 1 && told.contains("of demo/b, which says what version is current, is refused: not signed"),
        "{told}"
    );
    assert_eq!(run(&["run", "demo/a", "--", "true"]).0, 0);
    let log = fs::read_to_string(home.join(".local/state/envfabric/mount.log")).unwrap();
    assert_eq!(log.matches("ERROR pointer 2 of demo/b").count(), 1, "{log}");
    assert_eq!(run(&["umount", mount]).0, 0);

    // A mount that shows what anybody has written is not used by who trusts keys.
    assert_eq!(ran(program(&home, &store).args(["mount", mount])).0, 0);
    let (code, _, told) = run(&["run", "demo/a", "--", "true"]);
    assert!(
        code == 1 && told.contains("shows what anybody has written") && told.contains("envfabric umount"),
        "{told}"
    );
    // Nor is it taken for the one that was asked for.
    let (code, _, told) = run(&["mount", mount]);
    assert!(code == 1 && told.contains("shows what anybody has written"), "{told}");
    assert_eq!(ran(program(&home, &store).args(["umount", mount])).0, 0);
    let (code, out, _) = run(&["key", "forget", "demo/a", "demo/z"]);
    assert_eq!((code, out.as_str()), (0, "forgotten: demo/a\nnothing was known of demo/z\n"));
}

#[test]
fn who_takes_over_a_mount_trusts_the_keys_that_it_was_given() {
    needs_mounts!();
    let _alone = alone();
    let signed = Signed::new(Codec::Raw);
    signed.publish(&signed.store(), "demo/b", signed.fixture.packages());
    signed.publish(&signed.store(), "alone/c", vec![]);
    let home = signed.fixture.place("home");
    let store = signed.fixture.store.root().to_path_buf();
    let mount = signed.fixture.place("mount");
    let at = mount.to_str().unwrap();
    let [trust, other] = [OURS, THEIRS].map(|n| format!("--trust-key={}", key(n).public()));
    let run = |args: &[&str]| ran(program(&home, &store).args(args));
    assert_eq!(run(&["mount", &trust, at]).0, 0);
    let path = mount.join("demo/a/.venv").join(SITE).join("gamma/data/big.bin");
    let open = fs::File::open(&path).unwrap();
    let refused = || fs::metadata(mount.join("demo/b/.versions/2")).unwrap_err().raw_os_error();
    assert_eq!(refused(), Some(libc::EKEYREJECTED));
    // Also where there is nothing else in the workflow.
    let alone = |below: &str| fs::metadata(mount.join("alone/c").join(below)).unwrap_err().raw_os_error();
    assert_eq!([alone(""), alone(".versions/1")], [Some(libc::EKEYREJECTED); 2]);
    // The kernel keeps what it was shown, so another trust needs another mount.
    for other in [vec!["mount", "--replace", at], vec!["mount", "--replace", &other, at]] {
        let (code, _, told) = run(&other);
        assert!(code == 1 && told.contains("made with other trusted keys") && told.contains("umount"), "{told}");
    }
    let (code, out, told) = run(&["mount", "--replace", &trust, at]);
    assert_eq!(code, 0, "{out}{told}");
    let stats = envfabric::mount::stats(&mount).unwrap();
    assert_eq!(stats.trusted_keys, [key(OURS).public().text()]);
    // A number that the one before gave out.
    let mut bytes = vec![0; 700_000];
    std::os::unix::fs::FileExt::read_exact_at(&open, &mut bytes, 0).unwrap();
    assert!(bytes == noise(700_000, 300));
    assert_eq!(refused(), Some(libc::EKEYREJECTED));
    // Killed, it is followed by one that trusts as it did.
    let pid = stats.pid.to_string();
    assert!(std::process::Command::new("kill").args(["-9", &pid]).status().unwrap().success());
    common::until("another serves", || {
        envfabric::mount::stats(&mount).is_ok_and(|now| now.pid != stats.pid && now.trusted_keys == stats.trusted_keys)
    });
    assert_eq!(refused(), Some(libc::EKEYREJECTED));
    assert!(fs::read(&path).unwrap() == noise(700_000, 300));
    drop(open);
    assert_eq!(run(&["umount", at]).0, 0);
}
