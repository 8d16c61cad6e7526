//! The merged tree against a naive model of it, without a kernel.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use common::*;
use envfabric::environment::{Digest, Version};
use envfabric::store::{FILE_MTIME, LayerKind, LayerWriter, Staged, StagedKind, Store};
use envfabric::view::{Attr, FileKind, Ino, Object, Reader, Tree};
use proptest::prelude::*;

/// What the model has at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Thing {
    Dir,
    File(Vec<u8>, bool),
    Link(Vec<u8>),
}

type Model = BTreeMap<String, Thing>;

fn parents(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| &path[..at])
}

/// A layer from things at random paths; what does not fit what is there already is left out.
fn layer_of(things: &[(String, Thing)]) -> Model {
    let mut model = Model::new();
    for (path, thing) in things {
        let fits = parents(path).all(|p| matches!(model.get(p), None | Some(Thing::Dir)));
        if !fits || model.contains_key(path) {
            continue;
        }
        for parent in parents(path) {
            model.insert(parent.into(), Thing::Dir);
        }
        model.insert(path.clone(), thing.clone());
    }
    model
}

fn staged(model: &Model) -> Vec<Staged> {
    let stage = |(path, thing): (&String, &Thing)| Staged {
        path: path.clone().into_bytes(),
        kind: match thing {
            Thing::Dir => StagedKind::Dir,
            Thing::File(content, executable) => StagedKind::Bytes { content: content.clone(), executable: *executable },
            Thing::Link(target) => StagedKind::Symlink { target: target.clone() },
        },
    };
    model.iter().map(stage).collect()
}

fn cover(model: &mut Model, path: &str, thing: &Thing) {
    if *thing == Thing::Dir && model.get(path) == Some(&Thing::Dir) {
        return;
    }
    let below = format!("{path}/");
    model.retain(|p, _| p != path && !p.starts_with(&below));
    model.insert(path.into(), thing.clone());
}

/// One layer after the other, later wins; then what is made up.
fn merge(layers: &[&Model]) -> Model {
    let mut merged = Model::new();
    for (path, thing) in layers.iter().flat_map(|layer| layer.iter()) {
        cover(&mut merged, path, thing);
    }
    cover(&mut merged, "bin", &Thing::Dir);
    for (path, target) in
        [("bin/python", "../../.python/bin/python3.11"), ("bin/python3", "python"), ("bin/python3.11", "python")]
    {
        cover(&mut merged, path, &Thing::Link(target.into()));
    }
    cover(&mut merged, "pyvenv.cfg", &Thing::File(vec![], false));
    merged
}

fn thing() -> impl Strategy<Value = Thing> {
    prop_oneof![
        1 => Just(Thing::Dir),
        4 => (0..6u8, any::<bool>()).prop_map(|(c, x)| Thing::File(vec![c; usize::from(c) * 7], x)),
        1 => prop_oneof![Just("a"), Just("../b/c"), Just("lib")].prop_map(|t| Thing::Link(t.into())),
    ]
}

fn path() -> impl Strategy<Value = String> {
    let name =
        prop_oneof![Just("a"), Just("b"), Just("c"), Just("bin"), Just("lib"), Just("python"), Just("pyvenv.cfg")];
    prop::collection::vec(name, 1..5).prop_map(|parts| parts.join("/"))
}

fn layers() -> impl Strategy<Value = Vec<Model>> {
    let layer = prop::collection::vec((path(), thing()), 0..14).prop_map(|things| layer_of(&things));
    prop::collection::vec(layer, 1..6)
}

fn find(tree: &Tree, path: &str) -> Option<Attr> {
    let mut at = tree.attr(Ino::ROOT).unwrap();
    for part in path.split('/').filter(|p| !p.is_empty()) {
        at = tree.lookup(at.ino, part.as_bytes()).unwrap()?;
    }
    Some(at)
}

/// Everything below `dir` by path, checked against itself on the way.
fn walk(tree: &Tree, dir: Ino, parent: Ino, prefix: &str, into: &mut BTreeMap<String, Attr>) {
    let listing = tree.list(dir).unwrap();
    let names: Vec<&[u8]> = (0..listing.len()).map(|i| listing.get(i).unwrap().name).collect();
    assert_eq!(&names[..2], [b".".as_slice(), b".."]);
    assert!(names[2..].windows(2).all(|w| w[0] < w[1]), "sorted, and no name twice");
    assert_eq!((listing.get(0).unwrap().ino, listing.get(1).unwrap().ino), (dir, parent));
    assert!(listing.get(listing.len()).is_none());
    let mut subdirs = 0;
    for at in 2..listing.len() {
        let entry = listing.get(at).unwrap();
        let attr = tree.entry_attr(&listing, at).unwrap();
        assert_eq!(tree.lookup(dir, entry.name).unwrap(), Some(attr), "{prefix} {:?}", entry);
        assert_eq!(tree.attr(entry.ino).unwrap(), attr);
        assert_eq!((attr.ino, attr.kind), (entry.ino, entry.kind));
        let path = format!("{prefix}{}", String::from_utf8_lossy(entry.name));
        if attr.kind == FileKind::Dir {
            subdirs += 1;
            walk(tree, attr.ino, dir, &format!("{path}/"), into);
        }
        into.insert(path, attr);
    }
    assert_eq!(tree.attr(dir).unwrap().nlink, 2 + subdirs, "{prefix}");
    assert_eq!(tree.lookup(dir, b"no such name").unwrap(), None);
    assert_eq!(tree.lookup(dir, b"..").unwrap().map(|a| a.ino), Some(parent));
}

/// Compares `.venv` of a version with the model, and returns its inodes by path.
fn compare(tree: &Tree, version: &Version, model: &Model) -> BTreeMap<String, Attr> {
    let root = format!("{}/.versions/{}", version.environment, version.number);
    let top = find(tree, &root).unwrap();
    let venv = find(tree, &format!("{root}/.venv")).unwrap();
    let mut found = BTreeMap::new();
    walk(tree, venv.ino, top.ino, "", &mut found);
    let paths: Vec<&String> = found.keys().collect();
    assert_eq!(paths, model.keys().collect::<Vec<_>>());
    for (path, thing) in model {
        let attr = &found[path];
        assert!(attr.lasting);
        match thing {
            Thing::Dir => {
                assert_eq!((attr.kind, attr.mode), (FileKind::Dir, 0o755), "{path}");
                assert_eq!(attr.mtime, (version.created.as_second(), version.number as u32 * 1_000));
            }
            Thing::File(..) if path == "pyvenv.cfg" => assert_eq!(attr.size, 8192),
            Thing::File(content, executable) => {
                let mode = if *executable { 0o755 } else { 0o644 };
                assert_eq!((attr.kind, attr.mode, attr.size), (FileKind::File, mode, content.len() as u64), "{path}");
                assert_eq!((attr.nlink, attr.mtime), (1, (FILE_MTIME, 0)));
                assert_eq!(tree.read(attr.ino, 0, 1000, Reader::default()).unwrap(), *content, "{path}");
                assert_eq!(
                    tree.read(attr.ino, 3, 2, Reader::default()).unwrap(),
                    content[3.min(content.len())..][..2.min(content.len().saturating_sub(3))]
                );
            }
            Thing::Link(target) => {
                assert_eq!((attr.kind, attr.size), (FileKind::Symlink, target.len() as u64), "{path}");
                assert_eq!(tree.readlink(attr.ino).unwrap(), *target);
            }
        }
    }
    found
}

/// One store for all cases: layers are content-addressed, so cases do not disturb each other.
struct World {
    fixture: Fixture,
    next: u64,
}

impl World {
    fn version(&mut self, layers: &[&Model]) -> (Version, Vec<Digest>) {
        let writer = LayerWriter::new(&self.fixture.store);
        let digests: Vec<Digest> = layers
            .iter()
            .map(|model| writer.write(meta("x", LayerKind::Wheel), staged(model)).unwrap().digest)
            .collect();
        self.next += 1;
        let mut draft = self.fixture.draft(&format!("w{}/n", self.next), digests[1..].to_vec());
        draft.scaffold = digests[0];
        (self.fixture.store.publish_version(draft).unwrap().version().clone(), digests)
    }

    fn tree(&self) -> Tree {
        Tree::new(self.fixture.store.clone(), self.fixture.index.clone())
    }
}

#[test]
fn the_merged_tree_is_what_laying_one_layer_over_the_other_gives() {
    let mut world = World { fixture: Fixture::new(), next: 0 };
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 80,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let world = std::cell::RefCell::new(&mut world);
    let check = |layers: Vec<Model>| {
        let mut world = world.borrow_mut();
        let forward: Vec<&Model> = layers.iter().collect();
        let backward: Vec<&Model> = layers.iter().rev().collect();
        let (one, digests) = world.version(&forward);
        let (two, _) = world.version(&backward);
        let tree = world.tree();
        let first = compare(&tree, &one, &merge(&forward));
        let second = compare(&tree, &two, &merge(&backward));

        // A directory has one inode for one path in one version, and no other.
        let dirs = |of: &BTreeMap<String, Attr>| -> Vec<Ino> {
            of.values().filter(|a| a.kind == FileKind::Dir).map(|a| a.ino).collect()
        };
        let all: Vec<Ino> = dirs(&first).into_iter().chain(dirs(&second)).collect();
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
        // A file has the inode of its layer and row, in whatever version it is shown.
        let mut by_row: HashMap<(Digest, String), Ino> = HashMap::new();
        for (layer, model) in digests.iter().zip(&layers) {
            for path in model.keys() {
                let shown = [&first, &second].into_iter().filter_map(|of| of.get(path));
                for attr in shown.filter(|a| a.kind != FileKind::Dir) {
                    let told = tree.xattrs(attr.ino).unwrap();
                    if told.iter().any(|(n, v)| *n == "user.envfabric.layer" && *v == layer.to_string()) {
                        let known = by_row.entry((*layer, path.clone())).or_insert(attr.ino);
                        assert_eq!(*known, attr.ino);
                    }
                }
            }
        }

        // A tree that has seen none of it answers for every number, in whatever order it is asked.
        let cold = world.tree();
        for version in [&one, &two] {
            find(&cold, &format!("{}/.versions/{}/.venv", version.environment, version.number)).unwrap();
        }
        for attr in first.values().chain(second.values()).rev() {
            assert_eq!(cold.attr(attr.ino).unwrap(), *attr);
            if attr.kind == FileKind::Dir {
                assert_eq!(cold.lookup(attr.ino, b"..").unwrap(), tree.lookup(attr.ino, b"..").unwrap());
            }
        }
        // And numbers that were never given out name nothing.
        let Some(Object::Dir { version, .. }) = all.first().and_then(|ino| ino.decode()) else { return Ok(()) };
        let given: BTreeSet<Ino> = dirs(&first).into_iter().collect();
        let venv = find(&tree, &format!("{}/.versions/1/.venv", one.environment)).unwrap().ino;
        let python = world.fixture.store.layer(&world.fixture.python).unwrap().rows;
        for index in 0..200 {
            let ino = Ino::encode(Object::Dir { version, index }).unwrap();
            let python = index < python; // the interpreter's own directories
            if !python && !given.contains(&ino) && ino != venv {
                assert!(cold.attr(ino).is_err(), "{index}");
                assert!(tree.attr(ino).is_err(), "{index}");
            }
        }
        Ok(())
    };
    runner.run(&layers(), check).unwrap();
}

#[test]
fn a_directory_hidden_by_a_later_file_stays_hidden_below_a_still_later_directory() {
    let model = |things: &[(&str, Thing)]| {
        layer_of(&things.iter().map(|(p, t)| (p.to_string(), t.clone())).collect::<Vec<_>>())
    };
    let text = |s: &str| Thing::File(s.into(), false);
    let layers = [
        model(&[("x/old/deep/file", text("1")), ("x/both/one", text("1")), ("bin", text("no directory"))]),
        model(&[("x", text("a file")), ("bin/python", Thing::Dir), ("bin/python/below", text("b"))]),
        model(&[("x/new", text("2")), ("x/both/two", text("2")), ("pyvenv.cfg/a", text("c"))]),
    ];
    let refs: Vec<&Model> = layers.iter().collect();
    let mut world = World { fixture: Fixture::new(), next: 0 };
    let (version, _) = world.version(&refs);
    let merged = merge(&refs);
    assert!(!merged.contains_key("x/old") && merged.contains_key("x/both/two") && !merged.contains_key("x/both/one"));
    compare(&world.tree(), &version, &merged);
}

#[test]
fn metadata_is_the_same_for_everyone_and_names_the_packages() {
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let read = || {
        let tree = Tree::new(fixture.store.clone(), fixture.index.clone());
        let attr = find(&tree, "demo/a/.versions/1/metadata.json").unwrap();
        let bytes = tree.read(attr.ino, 0, 1 << 20, Reader::default()).unwrap();
        assert_eq!(bytes.len() as u64, attr.size);
        String::from_utf8(bytes).unwrap()
    };
    let text = read();
    assert_eq!(text, read());
    assert!(text.ends_with("}\n"));
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["packages"][1]["name"], "beta");
    assert_eq!(json["environment"], "demo/a");
}

#[test]
fn a_listing_of_100000_names_is_whole_and_positions_in_it_are_stable() {
    let fixture = Fixture::new();
    let many = |from: u32| (from..from + 60_000).map(|i| file(format!("{SITE}/many/{i:06}"), "")).collect();
    let layers = vec![fixture.layer("one", many(0)), fixture.layer("two", many(40_000))];
    fixture.publish("demo/a", layers);
    let tree = Tree::new(fixture.store.clone(), fixture.index.clone());
    let dir = find(&tree, &format!("demo/a/.versions/1/.venv/{SITE}/many")).unwrap();
    let listing = tree.list(dir.ino).unwrap();
    assert_eq!(listing.len(), 100_002);
    let again = tree.list(dir.ino).unwrap();
    for at in 0..listing.len() {
        assert_eq!(listing.get(at), again.get(at));
    }
    assert!((2..listing.len()).all(|at| listing.get(at).unwrap().name == format!("{:06}", at - 2).as_bytes()));
}

#[test]
fn names_of_documents_that_could_hide_something_are_not_shown() {
    let fixture = Fixture::new();
    for (i, name) in ["../x", ".venv", "metadata.json", "a/b", "", "pyproject.toml"].iter().enumerate() {
        let mut draft = fixture.draft(&format!("demo/n{i}"), vec![]);
        draft.lock.as_mut().unwrap().name = name.to_string();
        fixture.store.publish_version(draft).unwrap();
        let tree = Tree::new(fixture.store.clone(), fixture.index.clone());
        let dir = find(&tree, &format!("demo/n{i}/.versions/1")).unwrap();
        let listing = tree.list(dir.ino).unwrap();
        let names: Vec<_> = (2..listing.len()).map(|at| listing.get(at).unwrap().name.to_vec()).collect();
        assert_eq!(names, [&b".python"[..], b".venv", b"metadata.json", b"pyproject.toml"], "{name:?}");
        assert_eq!(find(&tree, &format!("demo/n{i}/.venv")).unwrap().kind, FileKind::Symlink);
    }
}

#[test]
fn a_tree_may_be_asked_from_many_threads() {
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let tree = Tree::new(fixture.store.clone(), fixture.index.clone());
    let whole = || {
        let mut found = BTreeMap::new();
        let venv = find(&tree, "demo/a/.versions/1/.venv").unwrap();
        let top = find(&tree, "demo/a/.versions/1").unwrap();
        walk(&tree, venv.ino, top.ino, "", &mut found);
        for attr in found.values().filter(|a| a.kind == FileKind::File) {
            tree.read(attr.ino, 0, 1 << 20, Reader::default()).unwrap();
        }
        found
    };
    let trees: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(whole)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(trees.windows(2).all(|w| w[0] == w[1]));
    let _: &Store = tree.store();
}

/// Puts `bytes` at `path` as a repair does: a new file under the old name.
fn replace(path: &std::path::Path, bytes: &[u8]) {
    let new = path.with_extension("new");
    std::fs::write(&new, bytes).unwrap();
    std::fs::rename(new, path).unwrap();
}

/// Damages the file at `path` in place, so that who has it open sees it; returns what it was.
fn cut_in_place(path: &std::path::Path, length: u64) -> Vec<u8> {
    use std::os::unix::fs::PermissionsExt;
    let bytes = std::fs::read(path).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(length).unwrap();
    bytes
}

#[test]
fn what_was_repaired_in_the_store_is_good_again_at_once() {
    let fixture = Fixture::new();
    let mut files: Vec<Staged> =
        (0..20_000).map(|i| file(format!("{SITE}/many/{i:06}-{}", "n".repeat(60)), "")).collect();
    files.push(file(format!("{SITE}/small"), noise(3_000, 1)));
    files.push(file(format!("{SITE}/big"), noise(300_000, 2)));
    let layer = fixture.layer("p", files);
    fixture.publish("demo/a", vec![layer]);
    let tree = Tree::new(fixture.store.clone(), fixture.index.clone());
    let ino = |name: &str| find(&tree, &format!("demo/a/.versions/1/.venv/{SITE}/{name}")).unwrap().ino;
    let pack = fixture.store.catalog(&layer).unwrap().pack().unwrap();
    for (name, path, content) in [
        ("small", fixture.store.object_path(&pack), noise(3_000, 1)),
        ("big", fixture.store.blob_path(&Digest::of(&noise(300_000, 2))), noise(300_000, 2)),
    ] {
        let read = || tree.read(ino(name), 0, 1 << 20, Reader::default());
        assert_eq!(read().unwrap(), content);
        let bytes = cut_in_place(&path, 10);
        assert_eq!(read().unwrap_err().errno(), libc::EIO, "{name}");
        replace(&path, &bytes);
        assert_eq!(read().unwrap(), content, "{name}");
    }
    let path = fixture.store.catalog_path(&fixture.store.layer(&layer).unwrap().catalog);
    let many = ino("many");
    let lookup = |i: u32| tree.lookup(many, format!("{i:06}-{}", "n".repeat(60)).as_bytes());
    assert!(lookup(0).unwrap().is_some());
    let bytes = cut_in_place(&path, 4096);
    assert_eq!(lookup(10_000).unwrap_err().errno(), libc::EIO);
    replace(&path, &bytes);
    assert!(lookup(10_000).unwrap().is_some());
    // And when it was replaced while it was open and damaged, with no failure told in between.
    cut_in_place(&path, 4096);
    replace(&path, &bytes);
    assert!(lookup(15_000).unwrap().is_some());
}

#[test]
fn a_layer_whose_document_counts_other_rows_than_its_catalog_has_is_damaged() {
    for (change, what) in [(-1i64, "fewer"), (3, "more")] {
        let fixture = Fixture::new();
        let packages = fixture.packages();
        let path = fixture.store.layer_path(&packages[0]);
        let mut doc: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        doc["rows"] = (doc["rows"].as_i64().unwrap() + change).into();
        doc.as_object_mut().unwrap().remove("seal");
        replace(&path, &envfabric::store::sealed(&doc).unwrap());
        fixture.publish("demo/a", packages);
        let tree = Tree::new(fixture.store.clone(), fixture.index.clone());
        let site = find(&tree, &format!("demo/a/.versions/1/.venv/{SITE}")).unwrap();
        let error = tree.lookup(site.ino, b"alpha").and_then(|dir| tree.list(dir.unwrap().ino)).unwrap_err();
        assert_eq!(error.errno(), libc::EIO, "{what}: {error:?}");
        assert!(error.chain().contains("rows"), "{what}: {error:?}");
    }
}

#[test]
fn who_lists_a_directory_in_parts_meets_every_name_once_while_others_come_and_go() {
    let fixture = Fixture::new();
    let names: Vec<String> = (0..40).map(|i| format!("n{i:02}")).collect();
    let publish = |name: &str| fixture.publish(&format!("demo/{name}"), vec![]);
    for name in &names {
        publish(name);
    }
    let tree = Tree::new(fixture.store.clone(), fixture.index.clone());
    let dir = find(&tree, "demo").unwrap().ino;
    let mut met: Vec<String> = Vec::new();
    let mut offset = 0;
    for step in 0.. {
        std::thread::sleep(envfabric::view::FRESH + std::time::Duration::from_millis(20));
        let listing = tree.list(dir).unwrap();
        let offsets: Vec<u64> = (0..listing.len()).map(|at| listing.get(at).unwrap().offset).collect();
        assert!(offsets.windows(2).all(|w| w[0] < w[1]));
        let from = listing.behind(offset);
        if from >= listing.len() {
            break;
        }
        for at in from..listing.len().min(from + 9) {
            let entry = listing.get(at).unwrap();
            met.push(String::from_utf8(entry.name.to_vec()).unwrap());
            offset = entry.offset;
        }
        if step >= 6 {
            continue; // or it would never end
        }
        // One that was met and one that was not go away, and others come.
        fixture.store.remove(&fixture.name(&format!("demo/n{:02}", step * 2))).unwrap();
        fixture.store.remove(&fixture.name(&format!("demo/n{:02}", 39 - step))).unwrap();
        publish(&format!("a{step}"));
        publish(&format!("z{step}"));
    }
    let all: BTreeSet<&String> = met.iter().collect();
    assert_eq!(all.len(), met.len(), "{met:?}");
    for name in names.iter().filter(|name| find(&tree, &format!("demo/{name}")).is_some()) {
        assert!(met.contains(name), "{name} is missing in {met:?}");
    }
}

#[test]
fn the_way_to_one_environment_waits_for_no_others() {
    let fixture = Fixture::new();
    for name in 0..70 {
        fixture.publish(&format!("demo/n{name}"), vec![]);
    }
    let tree = Tree::new(fixture.store.clone(), fixture.index.clone());
    let before = find(&tree, "demo").unwrap();
    assert!(find(&tree, "demo/n3/.versions/1").is_some());
    assert_eq!((before.nlink, find(&tree, "demo").unwrap()), (1, before));
    // Nobody has waited for that, and it is done a moment later; nothing has changed by it.
    tree.refresh();
    let after = find(&tree, "demo").unwrap();
    assert_eq!((after.nlink, after.mtime), (2 + 70, before.mtime));
    fixture.publish("demo/d", vec![]);
    std::thread::sleep(envfabric::view::FRESH);
    tree.refresh();
    let grown = find(&tree, "demo").unwrap();
    assert_eq!((grown.nlink, grown.mtime > before.mtime), (2 + 71, true));
}

#[test]
fn a_pointer_that_was_seen_is_never_followed_by_an_older_one() {
    let fixture = Fixture::new();
    for _ in 0..3 {
        fixture.publish("demo/a", vec![]);
    }
    let tree = Tree::new(fixture.store.clone(), fixture.index.clone());
    let node = find(&tree, "demo/a").unwrap().ino;
    let current = || {
        std::thread::sleep(envfabric::view::FRESH * 2);
        let link = tree.lookup(node, b".venv").unwrap().unwrap();
        String::from_utf8(tree.readlink(link.ino).unwrap().to_vec()).unwrap()
    };
    assert_eq!(current(), ".versions/3/.venv");
    let pointers = fixture.store.root().join("envs/demo/a/current");
    std::fs::rename(&pointers, pointers.with_file_name("aside")).unwrap();
    assert_eq!(current(), ".versions/3/.venv");
    std::fs::rename(pointers.with_file_name("aside"), &pointers).unwrap();
    fixture.store.rollback(&fixture.name("demo/a"), 1).unwrap();
    assert_eq!(current(), ".versions/1/.venv");
}
