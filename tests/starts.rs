//! Starts on cold nodes: what the first one reads is brought to the next before it asks, and what was brought ahead of
//! use needs no store any more.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod nas_client;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{Fixture, SITE, file, noise, until};
use envfabric::cache;
use envfabric::environment::Digest;
use envfabric::mount::{self, Mounted, Options, mount as mount_store, stats, warm};
use envfabric::store::{CHUNK_SIZE, Index, Store};
use nas_client::{Nas, no_nas_because};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// A store that was made locally, behind a NAS, with an environment of three packages and a large file in each.
struct Behind {
    nas: Nas,
    fixture: Fixture,
}

impl Behind {
    fn new() -> Behind {
        let fixture = Fixture::new();
        fixture.publish("demo/a", fixture.packages());
        Behind { nas: Nas::start(fixture.dir.path(), &nas_client::Options::default()), fixture }
    }

    fn store(&self) -> Store {
        Store::open(&self.nas.mount().join("store")).unwrap()
    }

    /// A node that has never seen the store.
    fn node(&self, name: &str) -> Node {
        let dir = self.fixture.place(name);
        let index = Index::in_memory().unwrap();
        let options = Options {
            cache: Some(cache::Options { keep_free: 0, ..cache::Options::at(dir.join("cache")) }),
            ..Options::at(dir.join("mounted"))
        };
        Node { mounted: Some(mount_store(self.store(), Arc::new(index), &options).unwrap()) }
    }
}

struct Node {
    mounted: Option<Mounted>,
}

impl Node {
    fn root(&self) -> &Path {
        self.mounted.as_ref().unwrap().mount_point()
    }

    fn version(&self) -> PathBuf {
        self.root().join("demo/a/.versions/1")
    }

    fn cache_stats(&self) -> cache::CacheStats {
        stats(self.root()).unwrap().cache.unwrap()
    }

    /// What an interpreter does when it starts, and a program that needs one package.
    fn start(&self) {
        let venv = self.version().join(".venv");
        fs::read_link(venv.join("bin/python")).unwrap();
        assert!(fs::read_to_string(venv.join("pyvenv.cfg")).unwrap().starts_with("home = "));
        assert_eq!(fs::read_to_string(venv.join(SITE).join("alpha/__init__.py")).unwrap(), "name = \"alpha\"\n");
        assert_eq!(fs::read(venv.join(SITE).join("alpha/data/big.bin")).unwrap(), noise(700_000, 100));
    }

    fn end(mut self) {
        self.mounted.take().unwrap().unmount().unwrap();
    }
}

macro_rules! needs_a_nas {
    () => {
        if let Some(why) = no_nas_because() {
            eprintln!("skipped: {why}");
            return;
        }
        // A process that another test starts has, for a moment, this one's open files, and keeps its mount busy.
        let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    };
}

static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[test]
fn what_a_first_start_reads_is_brought_to_the_next_cold_node_when_python_is_followed() {
    needs_a_nas!();
    let behind = Behind::new();
    let first = behind.node("first");
    first.start();
    // It is over when the mount is, if not earlier.
    first.end();
    let profile = behind.store().profile(&behind.fixture.name("demo/a"), 1).unwrap().unwrap();
    assert_eq!(profile.starts, 1);
    let blob: Vec<_> = profile.objects.iter().filter(|touched| touched.size == 700_000).collect();
    assert_eq!(blob.len(), 1, "beta's and gamma's were not read: {profile:#?}");
    assert_eq!(blob[0].runs, [(0, 700_000u64.div_ceil(CHUNK_SIZE))]);

    let second = behind.node("second");
    fs::read_link(second.version().join(".venv/bin/python")).unwrap();
    until("all of the profile is here", || second.cache_stats().ahead >= 4);
    until("nothing is under way", || {
        let ahead = second.cache_stats();
        ahead.unpacked_bytes >= profile.bytes()
    });
    // Whoever asks now is served without the store.
    behind.nas.command("hang blobs/");
    assert_eq!(
        fs::read(second.version().join(".venv").join(SITE).join("alpha/data/big.bin")).unwrap(),
        noise(700_000, 100)
    );
    behind.nas.command("heal");
    let before = second.cache_stats().fetches;
    second.start();
    assert_eq!(second.cache_stats().fetches, before);
    second.end();
    // The same again: nothing new, so that three starts are enough.
    for node in ["third", "fourth"] {
        let node = behind.node(node);
        node.start();
        node.end();
    }
    let enough = behind.store().profile(&behind.fixture.name("demo/a"), 1).unwrap().unwrap();
    assert!(enough.is_enough() && enough.objects == profile.objects, "{enough:#?}");
}

#[test]
fn where_a_profile_tells_what_is_needed_nothing_is_brought_by_guessing() {
    needs_a_nas!();
    let behind = Behind::new();
    let model = noise(20 << 20, 7);
    let blob = format!("store/blobs/{}", Digest::of(&model));
    let large = behind.fixture.layer("large", vec![file(format!("{SITE}/model.bin"), model.clone())]);
    behind.fixture.publish("demo/b", vec![large]);
    let version = |node: &Node| node.root().join("demo/b/.versions/1/.venv");
    let begin = |node: &Node| drop(fs::read_link(version(node).join("bin/python")).unwrap());
    // In order, but not to the end.
    let read = |node: &Node| {
        let file = fs::File::open(version(node).join(SITE).join("model.bin")).unwrap();
        for part in model.chunks(128 << 10).take(24).enumerate() {
            let mut bytes = vec![0; part.1.len()];
            file.read_exact_at(&mut bytes, (part.0 * part.1.len()) as u64).unwrap();
            assert_eq!(bytes, part.1);
        }
    };
    let brought = || behind.nas.command("reads")["files"][&blob]["bytes"].as_u64().unwrap();
    let first = behind.node("first");
    begin(&first);
    read(&first);
    first.end();
    let guessed = brought();
    let profile = behind.store().profile(&behind.fixture.name("demo/b"), 1).unwrap().unwrap();
    let needed: u64 = profile.objects.iter().filter(|o| o.size == model.len() as u64).map(|o| o.bytes()).sum();
    assert!((3 << 20..guessed).contains(&needed), "{needed} of {guessed}");

    // The client has them in memory, as both nodes are this machine.
    let there = fs::File::open(behind.nas.mount().join(&blob)).unwrap();
    posix_fadvise(&there, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    drop(there);
    behind.nas.command("reset");
    let second = behind.node("second");
    begin(&second);
    until("all of the profile is here", || second.cache_stats().unpacked_bytes >= profile.bytes());
    read(&second);
    second.end();
    assert_eq!(brought(), needed);
}

#[test]
fn what_is_known_of_another_version_serves_the_layers_that_are_the_same() {
    needs_a_nas!();
    let behind = Behind::new();
    let first = behind.node("first");
    first.start();
    first.end();
    let mut layers = behind.fixture.packages();
    layers.pop();
    layers.push(behind.fixture.layer("delta", vec![file(format!("{SITE}/delta.py"), "name = \"delta\"\n")]));
    assert_eq!(behind.fixture.publish("demo/a", layers), 2);
    let second = behind.node("second");
    let venv = second.root().join("demo/a/.versions/2/.venv");
    fs::read_link(venv.join("bin/python")).unwrap();
    until("the large file that the other version's starts read is here", || {
        second.cache_stats().unpacked_bytes >= 700_000
    });
    behind.nas.command("hang blobs/");
    assert_eq!(fs::read(venv.join(SITE).join("alpha/data/big.bin")).unwrap(), noise(700_000, 100));
    behind.nas.command("heal");
    second.end();
    let own = behind.store().profile(&behind.fixture.name("demo/a"), 2).unwrap();
    assert_eq!(own.unwrap().starts, 1, "it has one of its own now");
}

#[test]
fn an_environment_that_was_warmed_needs_no_store() {
    needs_a_nas!();
    let behind = Behind::new();
    let node = behind.node("node");
    let begun = warm(&node.version(), true, true).unwrap();
    assert_eq!(begun.failed, None);
    until("it is warm", || warm(&node.version(), true, false).unwrap().ended);
    let warmed = warm(&node.version(), true, false).unwrap();
    assert!(warmed.failed.is_none() && warmed.done == warmed.total && warmed.total > 2_000_000, "{warmed:?}");
    behind.nas.command("hang blobs/");
    behind.nas.command("hang packs/");
    for (package, seed) in [("alpha", 100), ("beta", 200), ("gamma", 300)] {
        let big = node.version().join(".venv").join(SITE).join(package).join("data/big.bin");
        assert_eq!(fs::read(big).unwrap(), noise(700_000, seed));
    }
    behind.nas.command("heal");
}

#[test]
fn a_profile_that_is_damaged_or_wrong_harms_no_start() {
    needs_a_nas!();
    let behind = Behind::new();
    let node = behind.node("first");
    node.start();
    node.end();
    let store = behind.fixture.store.root();
    let path = store.join("envs/demo/a/profiles/1.json");
    let sound = fs::read_to_string(&path).unwrap();
    let mut profile: serde_json::Value = serde_json::from_str(&sound).unwrap();
    profile.as_object_mut().unwrap().remove("seal");
    for touched in profile["objects"].as_array_mut().unwrap() {
        touched["size"] = (u64::MAX / 2).into();
        touched["runs"] = serde_json::json!([[0, u64::MAX], [7, 3]]);
    }
    let wrong = String::from_utf8(envfabric::store::sealed(&profile).unwrap()).unwrap();
    for (n, text) in ["", "{", &sound[..sound.len() / 2], &wrong].iter().enumerate() {
        fs::remove_file(&path).unwrap();
        fs::write(&path, text).unwrap();
        let node = behind.node(&format!("node{n}"));
        node.start();
        node.end();
        behind.store().profile(&behind.fixture.name("demo/a"), 1).unwrap().expect("it is made anew");
    }
}

/// The mount of [`mount::profile`] sees every read, whatever others have in memory.
#[test]
fn a_command_is_recorded_in_a_mount_of_its_own() {
    needs_a_nas!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let version = fixture.store.version(&fixture.name("demo/a"), 1).unwrap();
    let read = |dir: &Path| {
        let big = dir.join(".venv").join(SITE).join("beta/data/big.bin");
        fs::read_link(dir.join(".venv/bin/python")).unwrap();
        assert_eq!(fs::read(big).unwrap(), noise(700_000, 200));
        Ok(())
    };
    for _ in 0..2 {
        let (_, profile) = mount::profile(&fixture.store, fixture.index.clone(), &version, read).unwrap();
        let objects = profile.unwrap().objects;
        assert_eq!(objects.iter().filter(|touched| touched.size == 700_000).count(), 1, "{objects:#?}");
    }
}
