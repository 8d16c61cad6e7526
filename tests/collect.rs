//! Collecting, with the real store and small made-up layers.
//!
//! Time is what the files of a store say: to let an hour pass, the tests make every file an hour older ([`pass`]), so
//! nothing here waits for a clock.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::*;
use envfabric::environment::Digest;
use envfabric::error::Kind;
use envfabric::store::disk::{self, Op, Verdict, Watch};
use envfabric::store::{GcOptions, GcReport, Keep, Lease, Leased, Profile, Room, Store, Touched};
use envfabric::view::{Ino, Tree};

const HOUR: Duration = Duration::from_secs(3600);

/// Makes everything in `store` older by `time`.
fn pass(store: &Store, time: Duration) {
    fn walk(dir: &Path, time: Duration) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => walk(&path, time),
                _ => {
                    if let Ok(file) = File::open(&path) {
                        let modified = file.metadata().unwrap().modified().unwrap();
                        file.set_modified(modified - time).unwrap();
                    }
                }
            }
        }
    }
    walk(store.root(), time);
}

fn options() -> GcOptions {
    GcOptions { grace: HOUR, ..GcOptions::default() }
}

fn gc(store: &Store) -> GcReport {
    store.gc(&options(), &|_| {}).unwrap()
}

fn gc_keeping(store: &Store, keep: Keep) -> GcReport {
    store.gc(&GcOptions { keep, ..options() }, &|_| {}).unwrap()
}

/// Paths of all files of the store, but for the trash.
fn files(store: &Store) -> BTreeSet<String> {
    fn walk(root: &Path, dir: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            if entry.file_type().unwrap().is_dir() {
                walk(root, &entry.path(), found);
            } else {
                found.insert(entry.path().strip_prefix(root).unwrap().display().to_string());
            }
        }
    }
    let mut found = BTreeSet::new();
    walk(store.root(), store.root(), &mut found);
    found.retain(|path| !path.starts_with("trash/"));
    found
}

fn is_whole(store: &Store) {
    let report = store.fsck(&|_, _| {}).unwrap();
    assert!(report.is_clean(), "{:#?}", report.findings);
}

fn small(fixture: &Fixture, name: &str) -> Digest {
    fixture.layer(
        name,
        vec![
            file(format!("{SITE}/{name}.py"), format!("# {name}\n")),
            file(format!("{SITE}/{name}.so"), noise(300_000, name.bytes().map(u64::from).sum())),
        ],
    )
}

#[test]
fn what_no_version_needs_goes_after_the_grace_time_and_the_rest_stays() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let used = small(&fixture, "used");
    fixture.publish("demo/a", vec![used]);
    pass(store, HOUR * 2);
    assert_eq!(gc(store).trashed.len(), 0);
    let needed = files(store);
    let idle = small(&fixture, "idle");
    let blob = store.layer(&idle).unwrap().blobs[0];
    assert!(gc(store).trashed.is_empty(), "it is young");
    pass(store, HOUR * 2);
    let before = files(store);
    let told = store.gc(&GcOptions { dry_run: true, ..options() }, &|_| {}).unwrap();
    assert_eq!(files(store), before, "a dry run changes nothing");
    let report = gc(store);
    assert_eq!(report.trashed, told.trashed);
    assert_eq!(report.trashed.keys().collect::<Vec<_>>(), ["blobs", "catalogs", "layers", "packs"]);
    assert_eq!(files(store), needed);
    // Readers find it all the same.
    assert_eq!(store.layer(&idle).unwrap().digest, idle);
    assert_eq!(Digest::of(&store.read_blob(&blob).unwrap()), blob);
    store.catalog(&idle).unwrap();
    assert_eq!(gc(store).removed.files, 0, "not before the grace time");
    pass(store, HOUR * 2);
    let report = gc(store);
    assert_eq!((report.removed.files, report.in_trash.files), (4, 0));
    assert!(store.layer(&idle).unwrap_err().is_not_found());
    assert_eq!(fs::read_dir(store.root().join("trash")).unwrap().count(), 0, "no empty directory stays");
    assert_eq!(files(store), needed);
    is_whole(store);
}

#[test]
fn what_a_document_names_stays_for_the_grace_time_after_the_document_was_taken() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let used = small(&fixture, "used");
    fixture.publish("demo/a", vec![used]);
    let idle = small(&fixture, "idle");
    let blob = store.layer(&idle).unwrap().blobs[0];
    pass(store, HOUR * 2);
    assert_eq!(gc(store).trashed.len(), 4);
    // As it is when one collector, with an old list, took what a creator had just brought back, and both were killed.
    let generation = fs::read_dir(store.root().join("trash")).unwrap().next().unwrap().unwrap().path();
    let document = format!("layers/{idle}.json");
    fs::rename(generation.join(&document), store.root().join(&document)).unwrap();
    pass(store, HOUR * 2);
    // Whoever sees the document now relies on what it names, and may publish within the grace time.
    assert!(store.layer(&idle).is_ok());
    let report = gc(store);
    assert_eq!((report.removed.files, report.trashed.len()), (0, 1), "{report:?}");
    pass(store, HOUR / 2);
    assert_eq!(gc(store).removed.files, 0);
    assert_eq!(Digest::of(&store.read_blob(&blob).unwrap()), blob);
    pass(store, HOUR);
    assert_eq!(gc(store).removed.files, 4);
    assert!(files(store).iter().all(|path| !path.contains(&idle.to_string())));
}

#[test]
fn what_is_used_again_comes_back_from_the_trash() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    fixture.publish("demo/a", vec![]);
    let layer = small(&fixture, "idle");
    pass(store, HOUR * 2);
    gc(store);
    assert!(!store.layer_path(&layer).exists());
    // As a creator that finds the layer by its key, and as one that builds it anew.
    for again in [false, true] {
        if again {
            assert_eq!(small(&fixture, "idle"), layer);
        } else {
            let key = Digest::of(b"key");
            store.publish_key(&key, &layer).unwrap();
            assert_eq!(fixture.index.layer_of_key(store, &key).unwrap(), Some(layer));
        }
        assert!(store.layer_path(&layer).exists());
        is_whole(store);
        assert!(gc(store).trashed.is_empty(), "it is young again");
        pass(store, HOUR * 2);
        assert!(gc(store).trashed["layers"].files == 1);
    }
    // A version that was published while its layer lay in the trash.
    fixture.publish("demo/b", vec![layer]);
    assert!(gc(store).restored >= 4);
    is_whole(store);
}

#[test]
fn versions_are_kept_as_asked_and_never_the_current_leased_or_young_one() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let name = fixture.name("demo/a");
    for n in 1..=5 {
        fixture.publish("demo/a", vec![small(&fixture, &format!("layer{n}"))]);
        pass(store, HOUR);
    }
    let mut lease = Lease::new(store.clone(), "a test");
    lease.protect([Leased { environment: name.clone(), version: 2 }].into()).unwrap();
    store.rollback(&name, 1).unwrap();
    let report = gc_keeping(store, Keep::Newest(2));
    assert_eq!(report.retired, ["demo/a@3", "demo/a@4"]);
    assert_eq!(store.version_numbers(&name).unwrap(), [1, 2, 5]);
    // It is still there for who knows it, and comes back when asked for.
    assert_eq!(store.version(&name, 3).unwrap().number, 3);
    store.rollback(&name, 3).unwrap();
    assert_eq!(store.version_numbers(&name).unwrap(), [1, 2, 3, 5]);
    drop(lease);
    pass(store, HOUR * 3);
    let report = gc_keeping(store, Keep::Newest(1));
    assert_eq!(report.retired, ["demo/a@1", "demo/a@2", "demo/a@5"]);
    assert_eq!(report.trashed.get("layers"), None, "as long as a version can come back, so can its layers");
    pass(store, HOUR * 3);
    let report = gc_keeping(store, Keep::Newest(1));
    assert_eq!(report.removed.files, 3, "the documents of versions");
    assert_eq!(store.rollback(&name, 5).unwrap_err().kind(), Kind::NotFound);
    let report = gc_keeping(store, Keep::Newest(1));
    assert_eq!(report.trashed["layers"].files, 3);
    is_whole(store);
    assert_eq!(fixture.publish("demo/a", vec![]), 6, "numbers are never used twice");
}

#[test]
fn a_removed_environment_comes_back_within_the_grace_time_and_its_numbers_stay_used() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let name = fixture.name("demo/a");
    let layers = fixture.packages();
    for _ in 0..3 {
        fixture.publish("demo/a", layers.clone());
    }
    pass(store, HOUR * 2);
    store.remove(&name).unwrap();
    assert_eq!(store.undo_remove(&name).unwrap().version, Some(3));
    assert_eq!(store.undo_remove(&name).unwrap_err().kind(), Kind::Invalid);
    store.remove(&name).unwrap();
    assert!(gc(store).retired.is_empty(), "not before the grace time");
    pass(store, HOUR * 2);
    assert_eq!(gc(store).retired.len(), 3);
    // Within the grace time after, too.
    assert_eq!(store.undo_remove(&name).unwrap().version, Some(3));
    assert_eq!(store.version_numbers(&name).unwrap(), [1, 2, 3]);
    is_whole(store);
    store.remove(&name).unwrap();
    for _ in 0..4 {
        pass(store, HOUR * 2);
        gc(store);
    }
    assert!(store.undo_remove(&name).unwrap_err().is_not_found());
    let left: Vec<String> = files(store).into_iter().filter(|path| !path.starts_with("envs/")).collect();
    assert_eq!(left, ["fabric.json"], "nothing needs the interpreter either");
    assert_eq!(fixture.publish("demo/a", vec![]), 4);
}

#[test]
fn the_first_version_stays_while_there_is_no_pointer() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let name = fixture.name("demo/a");
    fixture.publish("demo/a", vec![]);
    // Another creator was killed between its version and its pointer.
    let text = fs::read_to_string(store.root().join("envs/demo/a/versions/1.json")).unwrap();
    let mut second: envfabric::environment::Version = serde_json::from_str(&text).unwrap();
    second.number = 2;
    fs::write(store.root().join("envs/demo/a/versions/2.json"), envfabric::store::sealed(&second).unwrap()).unwrap();
    pass(store, HOUR * 2);
    let report = gc_keeping(store, Keep::For(HOUR));
    assert_eq!(report.retired, ["demo/a@2"]);
    assert_eq!(store.current_number(&name).unwrap(), 1);
    for _ in 0..2 {
        pass(store, HOUR * 2);
        gc_keeping(store, Keep::Newest(1));
    }
    assert_eq!(store.current_number(&name).unwrap(), 1);
    assert_eq!(fixture.publish("demo/a", vec![]), 3, "2 was used");
}

#[test]
fn nothing_is_removed_while_a_document_cannot_be_read() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let layer = small(&fixture, "used");
    fixture.publish("demo/a", vec![layer]);
    small(&fixture, "idle");
    pass(store, HOUR * 2);
    let version = store.root().join("envs/demo/a/versions/1.json");
    for path in [version, store.layer_path(&layer)] {
        let good = fs::read(&path).unwrap();
        for bad in [&good[..good.len() / 2], b"", b"{\"format\":99}"] {
            fs::remove_file(&path).unwrap();
            fs::write(&path, bad).unwrap();
            let before = files(store);
            let error = store.gc(&options(), &|_| {}).unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt);
            assert!(error.detail_text().is_some() && error.hint_text().is_some_and(|hint| hint.contains("fsck")));
            assert_eq!(files(store), before);
        }
        fs::remove_file(&path).unwrap();
        fs::write(&path, good).unwrap();
    }
    pass(store, HOUR * 2);
    assert!(!gc(store).trashed.is_empty());
    is_whole(store);
}

#[test]
fn files_of_dead_creators_and_stale_leases_are_cleared() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    fixture.publish("demo/a", vec![]);
    fs::write(store.tmp().join("dead"), b"half").unwrap();
    let mut lease = Lease::new(store.clone(), "a test");
    lease.protect([Leased { environment: fixture.name("demo/a"), version: 1 }].into()).unwrap();
    std::mem::forget(lease);
    assert_eq!(gc(store).cleared.files, 0);
    pass(store, HOUR * 2);
    let report = gc(store);
    assert_eq!((report.cleared.files, report.leased), (2, 0));
    assert_eq!(gc(store).cleared.files, 0);
}

#[test]
fn pointers_do_not_grow_without_end() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let name = fixture.name("demo/a");
    fixture.publish("demo/a", vec![]);
    fixture.publish("demo/a", vec![]);
    for n in 0..20 {
        store.rollback(&name, 1 + n % 2).unwrap();
        pass(store, HOUR / 2);
    }
    pass(store, HOUR * 2);
    assert_eq!(gc(store).cleared.files, 19, "one for each version stays");
    assert_eq!(store.current_number(&name).unwrap(), 2);
    store.rollback(&name, 1).unwrap();
    assert_eq!(store.current_number(&name).unwrap(), 1);
}

/// Waits until the versions that are leased are `wanted`.
fn until_leased(store: &Store, wanted: &[u64]) {
    until(&format!("{wanted:?} are leased"), || {
        let leases = store.leases_told().unwrap();
        let versions: Vec<u64> =
            leases.iter().flat_map(|(doc, _)| &doc.versions).map(|leased| leased.version).collect();
        versions == wanted
    });
}

#[test]
fn a_version_that_a_mount_shows_is_not_collected() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    for n in 1..=4 {
        fixture.publish("demo/a", vec![small(&fixture, &format!("layer{n}"))]);
    }
    let tree = Arc::new(Tree::new(store.clone(), fixture.index.clone()));
    tree.hold_leases();
    let node =
        ["demo", "a"].iter().fold(Ino::ROOT, |dir, name| tree.lookup(dir, name.as_bytes()).unwrap().unwrap().ino);
    let versions = tree.lookup(node, b".versions").unwrap().unwrap().ino;
    let version = |n: u64| tree.lookup(versions, n.to_string().as_bytes()).unwrap().unwrap().ino;
    let look_inside = |n: u64| {
        let venv = tree.lookup(version(n), b".venv").unwrap().unwrap().ino;
        tree.lookup(venv, b"lib").unwrap().unwrap();
    };
    // What is only listed is not in use.
    version(3);
    look_inside(1);
    until_leased(store, &[1]);
    look_inside(2);
    until_leased(store, &[1, 2]);
    pass(store, HOUR / 2);
    let at_once = GcOptions { grace: Duration::ZERO, keep: Keep::Newest(1), dry_run: false };
    let report = store.gc(&at_once, &|_| {}).unwrap();
    assert_eq!((report.retired.as_slice(), report.leased), (["demo/a@3".to_string()].as_slice(), 2));
    // A collector that looked before the mount did: the next one brings back what is leased by then.
    fs::create_dir_all(store.root().join("trash/1-x/envs/demo/a/versions")).unwrap();
    let document = "envs/demo/a/versions/2.json";
    fs::rename(store.root().join(document), store.root().join("trash/1-x").join(document)).unwrap();
    assert_eq!(store.gc(&at_once, &|_| {}).unwrap().restored, 1);
    assert_eq!(store.version_numbers(&fixture.name("demo/a")).unwrap(), [1, 2, 4]);
    tree.end();
    until_leased(store, &[]);
    assert_eq!(store.gc(&at_once, &|_| {}).unwrap().retired, ["demo/a@1", "demo/a@2"]);
    is_whole(store);
}

#[test]
fn where_the_store_is_away_nothing_is_written_in_its_place() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    fixture.publish("demo/a", vec![]);
    let away = store.root().with_extension("away");
    fs::rename(store.root(), &away).unwrap();
    let mut lease = Lease::new(store.clone(), "a test");
    let leased = [Leased { environment: fixture.name("demo/a"), version: 1 }];
    assert!(lease.protect(leased.clone().into()).is_err());
    assert!(store.gc(&options(), &|_| {}).is_err());
    assert!(store.ensure_blob(b"x").is_err());
    assert!(!store.root().exists());
    fs::rename(&away, store.root()).unwrap();
    lease.protect(leased.into()).unwrap();
    assert_eq!(gc(store).leased, 1);
}

#[test]
fn profiles_go_with_their_versions() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let name = fixture.name("demo/a");
    for _ in 0..2 {
        fixture.publish("demo/a", vec![]);
    }
    let touched = |n: u64| Touched {
        room: Room::Packs,
        digest: Digest::of(&n.to_le_bytes()),
        size: 9,
        layer: fixture.python,
        runs: vec![(0, 1)],
    };
    for n in 0..2 {
        for version in [1, 2] {
            store.add_profile(&name, version, &Profile::of_start(vec![touched(n)])).unwrap();
        }
    }
    let profiles = || files(store).iter().filter(|path| path.contains("/profiles/")).cloned().collect::<Vec<_>>();
    assert_eq!(profiles().len(), 2, "one has all starts of its version");
    fs::create_dir(store.root().join("envs/demo/a/profiles/3")).unwrap();
    let strange = store.root().join("envs/demo/a/profiles/x");
    fs::write(&strange, "somebody's").unwrap();
    pass(store, HOUR * 2);
    gc(store);
    fs::remove_file(&strange).unwrap();
    assert_eq!(profiles().len(), 2);
    gc_keeping(store, Keep::Newest(1));
    assert_eq!(profiles().len(), 2, "a version that can come back keeps its own");
    for _ in 0..2 {
        pass(store, HOUR * 2);
        gc_keeping(store, Keep::Newest(1));
    }
    assert_eq!(profiles(), ["envs/demo/a/profiles/2.json"]);
}

/// A file system without second names.
struct NoLinks;

impl Watch for NoLinks {
    fn before(&self, op: &Op) -> Verdict {
        if matches!(op, Op::Link(..)) { Verdict::Fail(libc::EPERM) } else { Verdict::Do }
    }

    fn done(&self, _: &Op) {}
}

#[test]
fn where_there_are_no_hard_links_everything_is_collected_and_brought_back_by_renames() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let _watching = disk::watch(store.root(), Arc::new(NoLinks));
    let name = fixture.name("demo/a");
    let layer = small(&fixture, "one");
    fixture.publish("demo/a", vec![layer]);
    fixture.publish("demo/a", vec![]);
    pass(store, HOUR * 2);
    assert_eq!(gc_keeping(store, Keep::Newest(1)).retired, ["demo/a@1"]);
    pass(store, HOUR * 2);
    gc_keeping(store, Keep::Newest(1));
    assert_eq!(gc_keeping(store, Keep::Newest(1)).trashed["layers"].files, 1);
    fixture.publish("demo/a", vec![layer]);
    assert!(gc(store).restored > 0);
    store.rollback(&name, 2).unwrap();
    is_whole(store);
    assert_eq!(fs::read_dir(store.tmp()).unwrap().count(), 0);
}

/// Sees which times are set.
#[derive(Default)]
struct Touches(AtomicUsize);

impl Watch for Touches {
    fn before(&self, op: &Op) -> Verdict {
        match op {
            Op::Touch(_) => {
                self.0.fetch_add(1, Ordering::Relaxed);
                Verdict::Fail(libc::EPERM)
            }
            _ => Verdict::Do,
        }
    }

    fn done(&self, _: &Op) {}
}

#[test]
fn files_of_other_users_are_as_safe_although_their_time_cannot_be_set() {
    let fixture = Fixture::new();
    let store = &fixture.store;
    let layer = small(&fixture, "one");
    fixture.publish("demo/a", vec![]);
    pass(store, HOUR * 2);
    let touches = Arc::new(Touches::default());
    {
        let _watching = disk::watch(store.root(), touches.clone());
        assert_eq!(small(&fixture, "one"), layer, "what is there is used");
        assert!(touches.0.load(Ordering::Relaxed) > 0);
    }
    // It stayed old, and is collected before the version that needs it can be seen.
    assert_eq!(gc(store).trashed["layers"].files, 1);
    fixture.publish("demo/b", vec![layer]);
    is_whole(store);
    assert!(gc(store).restored >= 4);
    is_whole(store);
}

#[test]
fn a_creator_looks_for_what_its_summaries_name_too() {
    let fixture = Fixture::new();
    let (store, index) = (&fixture.store, &*fixture.index);
    let draft = fixture.draft("demo/a", vec![small(&fixture, "one")]);
    let all = [&[fixture.python, fixture.scaffold], &draft.layers[..]].concat();
    // Known from before, without what a summary adds.
    index.layers(store, &all).unwrap();
    let summaries = store.ensure_summaries(index, &all, false).unwrap();
    let docs = index.layers(store, &all).unwrap();
    let bundles: BTreeSet<_> = docs.iter().filter_map(|doc| Some(doc.bundle?.object())).collect();
    assert_eq!(bundles.len(), 2);
    let draft = envfabric::environment::Version { summaries, ..draft };
    store.require_whole(&draft, &bundles).unwrap();
    fs::remove_file(store.object_path(bundles.first().unwrap())).unwrap();
    assert_eq!(store.require_whole(&draft, &bundles).unwrap_err().kind(), Kind::Collected);
}
