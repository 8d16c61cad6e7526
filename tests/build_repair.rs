//! What was lost or collected of a store, built again with real uv.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod room;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use envfabric::build::{self, IndexOptions, Input, Outcome, Repaired};
use envfabric::environment::Digest;
use envfabric::store::GcOptions;
use room::{Room, layer, wheel};

fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

/// Checks, repairs, checks again; what became of the layers.
fn repair(room: &Room) -> (Vec<Repaired>, bool) {
    let report = room.store.fsck(&|_, _| {}).unwrap();
    let options = IndexOptions::default();
    let told = build::repair(&room.context(), report.damaged_layers(), &options).unwrap();
    room.store.repair_documents(&report).unwrap();
    (told.into_values().collect(), room.store.fsck(&|_, _| {}).unwrap().is_clean())
}

#[test]
fn damaged_layers_are_built_again_from_the_locks_of_their_versions() {
    let room = Room::new();
    let created = room.create(&["six==1.16.0", "idna==3.7"]).unwrap();
    let docs = [layer(&created, "six").clone(), layer(&created, "idna").clone()];
    let pack = |n: usize| room.store.pack_path(&docs[n].pack.unwrap());
    let harms: [&dyn Fn(); 5] = [
        &|| flip(&pack(0)),
        &|| fs::remove_file(pack(1)).unwrap(),
        &|| flip(&room.store.catalog_path(&docs[0].catalog)),
        &|| flip(&room.store.layer_path(&docs[0].digest)),
        &|| fs::remove_file(room.store.layer_path(&docs[1].digest)).unwrap(),
    ];
    for (n, harm) in harms.iter().enumerate() {
        harm();
        assert!(!room.store.fsck(&|_, _| {}).unwrap().is_clean());
        assert_eq!(repair(&room), (vec![Repaired::Rebuilt], true), "harm {n}");
    }
    // The interpreter and what makes a venv of it, from where they were taken.
    let python = room.store.layer(&created.version.interpreter.layer).unwrap();
    flip(&room.store.pack_path(&python.pack.unwrap()));
    flip(&room.store.layer_path(&created.version.scaffold));
    flip(&pack(0));
    assert_eq!(repair(&room), (vec![Repaired::Rebuilt, Repaired::Rebuilt, Repaired::Rebuilt], true));
}

#[test]
fn what_cannot_be_built_again_as_it_was_is_told_and_left_as_it_is() {
    let room = Room::new();
    let dir = room.path("wheels");
    fs::create_dir(&dir).unwrap();
    let path = wheel(&dir, "gone", &[("gone.py", "x = 1\n")]);
    let created = room.create(&[path.to_str().unwrap(), "six==1.16.0"]).unwrap();
    let gone = layer(&created, "gone").clone();
    let pack = room.store.pack_path(&gone.pack.unwrap());
    flip(&pack);
    let bad = fs::read(&pack).unwrap();
    fs::remove_file(&path).unwrap();
    let (told, clean) = repair(&room);
    assert!(matches!(&told[..], [Repaired::Failed { .. }]) && !clean, "{told:?}");
    assert_eq!(fs::read(&pack).unwrap(), bad);
    let none = build::repair(&room.context(), &BTreeSet::from([Digest::of(b"x")]), &IndexOptions::default()).unwrap();
    assert!(matches!(none.values().next(), Some(Repaired::Failed { reason }) if reason.contains("no version")));
}

#[test]
fn what_was_collected_is_built_again_and_what_lies_in_the_trash_is_not() {
    let room = Room::new();
    let created = room.create(&["six==1.16.0"]).unwrap();
    let name = "demo/a".parse().unwrap();
    let lock = room.path("pylock.toml");
    fs::write(&lock, room.lock_text(&created.version)).unwrap();
    let at_once = GcOptions { grace: Duration::ZERO, ..GcOptions::default() };
    let mut request = room.request(Input::Lock(lock));
    for (collections, installed) in [(3, 0), (5, 1)] {
        room.store.remove(&name).unwrap();
        // Retired; its document ended; its layers taken; these ended.
        for _ in 0..collections {
            room.store.gc(&at_once, &|_| {}).unwrap();
        }
        assert!(!room.store.layer_path(&created.version.layers[0]).exists());
        request.name = name.clone();
        let again = build::create(&room.context(), &request).unwrap();
        assert_eq!((again.outcome, again.installed), (Outcome::Published, installed), "{collections}");
        assert_eq!(again.version.layers, created.version.layers);
        let report = room.store.fsck(&|_, _| {}).unwrap();
        assert!(report.is_clean(), "{:#?}", report.findings);
    }
    assert_eq!(room.store.current_number(&name).unwrap(), 3, "no number was used twice");
}
