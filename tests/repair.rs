//! Repairing a store without building: what is put aside, what stays, what is made again.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use common::*;
use envfabric::environment::{Digest, Summary, Version};
use envfabric::store::{Codec, GcOptions, Index, LayerDoc, Store, documents};

/// Replaces the file at `path`, which is read-only.
fn replace(path: &Path, bytes: &[u8]) {
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

fn flip(path: &Path) -> Vec<u8> {
    let good = fs::read(path).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    replace(path, &bad);
    good
}

/// A version with a summary and its bundle, as `create` makes it.
fn publish(fixture: &Fixture, name: &str) -> Version {
    publish_of(fixture, name, fixture.packages())
}

fn publish_of(fixture: &Fixture, name: &str, layers: Vec<Digest>) -> Version {
    let draft = fixture.draft(name, layers);
    let all: Vec<Digest> = [fixture.python, fixture.scaffold].into_iter().chain(draft.layers.clone()).collect();
    let summaries = fixture.store.ensure_summaries(&fixture.index, &all, false).unwrap();
    fixture.store.publish_version(Version { summaries, ..draft }).unwrap().version().clone()
}

fn findings(store: &Store) -> usize {
    store.fsck(&|_, _| {}).unwrap().findings.iter().filter(|f| f.severity == envfabric::store::Severity::Error).count()
}

#[test]
fn what_nobody_needs_is_moved_and_what_can_still_be_read_in_part_stays() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let version = publish(&fixture, "demo/a");
    let idle = store.ensure_blob(b"nobody needs this").unwrap();
    let needed = store.blob_path(&store.layer(&version.layers[0]).unwrap().blobs[0]);
    flip(&store.blob_path(&idle));
    flip(&needed);
    let bad = fs::read(&needed).unwrap();
    let key = Digest::of(b"key");
    store.publish_key(&key, &version.layers[0]).unwrap();
    let key_path = store.root().join(format!("keys/{key}.json"));
    flip(&key_path);
    let report = store.fsck(&|_, _| {}).unwrap();
    assert_eq!(report.damaged_layers().iter().collect::<Vec<_>>(), [&version.layers[0]]);
    let done = store.repair_documents(&report).unwrap();
    assert_eq!((done.moved.len(), done.copied.len()), (2, 1), "{done:?}");
    assert!(!store.blob_path(&idle).exists() && !key_path.exists());
    assert_eq!(fs::read(&needed).unwrap(), bad, "what is sound of it is still served");
    assert_eq!(fixture.index.layer_of_key(store, &key).unwrap(), None);
    // Once more changes nothing but that.
    let report = store.fsck(&|_, _| {}).unwrap();
    assert!(store.repair_documents(&report).unwrap().moved.is_empty());
}

/// Damages the summary of `version` and its bundles, one by one and all, and sees them come back.
fn is_made_again(store: &Store, version: &Version) {
    let summary = store.blob_path(&version.summaries[0].blob);
    let [base, packages] = bundles(store, &version.summaries[0]).map(|bundle| store.catalog_path(&bundle));
    for paths in [vec![&summary], vec![&base], vec![&packages], vec![&summary, &base, &packages]] {
        let good: Vec<Vec<u8>> = paths.iter().map(|path| flip(path)).collect();
        assert!(findings(store) > 0);
        let report = store.fsck(&|_, _| {}).unwrap();
        assert!(report.damaged_layers().is_empty());
        assert!(store.repair_documents(&report).unwrap().made_again > 0);
        assert_eq!(findings(store), 0);
        for (path, good) in paths.iter().zip(good) {
            assert_eq!(fs::read(path).unwrap(), good);
        }
        for path in paths {
            fs::remove_file(path).unwrap();
        }
        store.repair_documents(&store.fsck(&|_, _| {}).unwrap()).unwrap();
        assert_eq!(findings(store), 0);
    }
}

fn told(store: &Store, summary: &Summary) -> Vec<LayerDoc> {
    documents(&store.read_blob(&summary.blob).unwrap()).unwrap()
}

/// The bundle of the interpreter, and that of packages.
fn bundles(store: &Store, summary: &Summary) -> [Digest; 2] {
    let docs = told(store, summary);
    let (base, packages) = docs.split_at(2);
    [base, packages].map(|docs| {
        let digest = docs[0].bundle.unwrap().digest;
        assert!(docs.iter().all(|doc| doc.bundle.unwrap().digest == digest));
        digest
    })
}

#[test]
fn summaries_and_bundles_are_made_again_as_they_were() {
    for codec in [Codec::Raw, Codec::Zstd] {
        let fixture = Fixture::with(codec);
        let version = publish(&fixture, "demo/a");
        is_made_again(&fixture.store, &version);
    }
}

#[test]
fn a_summary_that_is_written_anyway_repeats_what_little_is_needed_of_others() {
    let fixture = Fixture::with(Codec::Zstd);
    let store = &fixture.store;
    let new = |name: &str| fixture.layer(name, vec![file(format!("{SITE}/{name}.py"), "")]);
    let packages = fixture.packages();
    // The bundle of one catalog would be that catalog.
    let few = vec![new("one"), new("uno")];
    let first = publish_of(&fixture, "demo/a", few.clone());
    let second = publish_of(&fixture, "demo/b", packages.clone());
    let [summary] = second.summaries[..] else { panic!("{:?}", second.summaries) };
    assert_ne!(first.summaries, second.summaries);
    let docs = told(store, &summary);
    let layers = [&[fixture.python, fixture.scaffold], &packages[..]].concat();
    assert_eq!(docs.iter().map(|doc| doc.digest).collect::<Vec<_>>(), layers);
    // Whoever has seen one of the two has the interpreter's catalog.
    let [ours, theirs] = [&first, &second].map(|version| bundles(store, &version.summaries[0]));
    assert!(ours[0] == theirs[0] && ours[1] != theirs[1]);
    is_made_again(store, &second);
    is_made_again(store, &first);
    // For little that is new not much is repeated: not the packages.
    let third = publish_of(&fixture, "demo/b", [&packages[..], &[new("two")]].concat());
    assert_eq!(third.summaries.len(), 2);
    assert!(third.summaries.contains(&summary));
    // What is known is written by nobody, and a small environment names no large summary for the interpreter.
    assert_eq!(publish_of(&fixture, "demo/a", few).summaries, first.summaries);
    assert!(second.summaries[0].size > first.summaries[0].size);
}

#[test]
fn a_version_that_cannot_be_read_is_put_aside_and_its_number_stays_used() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let name = fixture.name("demo/a");
    publish(&fixture, "demo/a");
    flip(&store.root().join("envs/demo/a/versions/1.json"));
    assert!(store.gc(&GcOptions::default(), &|_| {}).is_err(), "nobody knows what it needs");
    let done = store.repair_documents(&store.fsck(&|_, _| {}).unwrap()).unwrap();
    assert_eq!(done.moved, ["envs/demo/a/versions/1.json"]);
    store.gc(&GcOptions::default(), &|_| {}).unwrap();
    assert!(store.current(&name).unwrap_err().is_not_found());
    assert_eq!(publish(&fixture, "demo/a").number, 2);
    assert_eq!(findings(store), 0);
    flip(&store.root().join("envs/demo/a/versions/2.json"));
    store.repair_documents(&store.fsck(&|_, _| {}).unwrap()).unwrap();
    assert_eq!(publish(&fixture, "demo/a").number, 3);
}

#[test]
fn who_has_a_damaged_pointer_is_told_which_versions_there_are_and_names_one() {
    let fixture = Fixture::with(Codec::Zstd);
    (0..3).for_each(|_| drop(publish(&fixture, "demo/a")));
    fixture.store.rollback(&fixture.name("demo/a"), 2).unwrap();
    let pointers = fixture.store.root().join("envs/demo/a/current");
    let newest = fs::read_dir(&pointers).unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
    flip(&newest);
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_envfabric"));
        command.arg("--store").arg(fixture.store.root()).args(args).env("HOME", fixture.place("home"));
        let output = command.env_remove("ENVFABRIC_CONFIG").output().unwrap();
        let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
        (output.status.code(), said.concat())
    };
    let hint = "envfabric rollback demo/a N";
    let (code, said) = run(&["versions", "demo/a"]);
    let numbers = said.lines().filter(|line| line.trim_start().starts_with(['1', '2', '3'])).count();
    assert!(code == Some(1) && numbers == 3 && said.contains(hint), "{said}");
    let (code, said) = run(&["fsck"]);
    assert!(code == Some(1) && said.contains(hint) && said.contains("(there are 1, 2, 3)"), "{said}");
    for verb in ["show", "rollback", "remove"] {
        let (code, said) = run(&[verb, "demo/a"]);
        assert!(code == Some(1) && said.contains(hint), "{said}");
    }
    assert_eq!(run(&["rollback", "demo/a", "3"]), (Some(0), "demo/a is at version 3 now\n".into()));
    assert_eq!(findings(&fixture.store), 0);
}

#[test]
fn an_index_is_built_again_from_the_store() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let version = publish(&fixture, "demo/a");
    let key = Digest::of(b"key");
    store.publish_key(&key, &version.layers[0]).unwrap();
    let dir = fixture.place("another index");
    let index = Index::open(&dir, store).unwrap();
    let path = index.path().to_path_buf();
    drop(index);
    Index::forget(&dir, store).unwrap();
    assert!(!path.exists());
    let index = Index::open(&dir, store).unwrap();
    let learned = index.learn_all(store).unwrap();
    assert_eq!((learned.layers, learned.keys, learned.damaged), (5, 1, 0));
    assert!(index.unknown(&version.layers).unwrap().is_empty());
    assert_eq!(index.layer_of_key(store, &key).unwrap(), Some(version.layers[0]));
    // A summary that is known is not written again.
    let before = fs::read_dir(store.tmp()).unwrap().count();
    assert_eq!(store.ensure_summaries(&index, &version.layers, false).unwrap(), version.summaries);
    assert_eq!(fs::read_dir(store.tmp()).unwrap().count(), before);
}

#[test]
fn a_check_reads_no_faster_than_it_is_told() {
    let fixture = Fixture::new();
    publish(&fixture, "demo/a");
    let begun = Instant::now();
    let report = fixture.store.fsck_at(Some(20_000_000), &|_, _| {}).unwrap();
    // What was read last need not be paid for.
    let least = Duration::from_secs_f64((report.bytes - 1_000_000) as f64 / 20_000_000.0);
    assert!(begun.elapsed() >= least, "{:?} for {} bytes", begun.elapsed(), report.bytes);
    assert!(report.is_clean());
}
