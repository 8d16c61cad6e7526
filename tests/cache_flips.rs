//! Ten thousand single flipped bits, in every sort of file of a store and in cached files: each is detected, and none is
//! served.
//!
//! "Detected" is an error, or that the right bytes are served: a bit of a compressed frame or of a file's magic may flip
//! without another byte coming out of it. Such a flip is counted as harmless here, and `fsck` finds it all the same.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use common::*;
use envfabric::cache::{Cache, Options, Whole};
use envfabric::environment::{Digest, EnvName};
use envfabric::error::Kind;
use envfabric::store::{CHUNK_SIZE, Chunks, Codec, LayerKind, LayerWriter, Object, ObjectFile, Room, Store};
use tempfile::TempDir;

/// Flips of each of four sorts: files of a raw store, of a packed store, and what is cached of both.
const FLIPS: usize = 2_500;
const LAYERS: u64 = 24;
/// As many files are read at a time.
const READERS: usize = 64;

struct World {
    dir: TempDir,
    store: Store,
    objects: Vec<(Object, Vec<u8>)>,
    random: u64,
}

/// Where a flip was made, and what was done to notice it.
#[derive(Debug, Default)]
struct Tally {
    detected: AtomicUsize,
    harmless: AtomicUsize,
}

impl World {
    fn new(codec: Codec, random: u64) -> World {
        // These tests wait for the disk a lot.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let store = Store::init_with(&dir.path().join("store"), codec).unwrap();
        let writer = LayerWriter::new(&store);
        let fixture = Fixture { store: store.clone(), ..Fixture::new() };
        for n in 0..LAYERS {
            let name = format!("package{n}");
            let text = format!("import {name}\n").repeat(200 + n as usize);
            let files = vec![
                file(format!("{SITE}/{name}/__init__.py"), text.clone()),
                file(format!("{SITE}/{name}/data.bin"), noise(3_000, n + 1)),
                // One compresses, one does not, and one has several chunks.
                file(format!("{SITE}/{name}/text.txt"), text.repeat(40)),
                file(format!("{SITE}/{name}/big.so"), noise(140_000 + n as usize * 20_000, 1_000 + n)),
            ];
            let layer = writer.write(meta(&name, LayerKind::Wheel), files).unwrap().digest;
            store.publish_key(&Digest::of(name.as_bytes()), &layer).unwrap();
            for _ in 0..2 {
                store.publish_version(fixture.draft(&format!("demo/n{n}"), vec![layer])).unwrap();
            }
        }
        for n in 0..8 {
            store.ensure_blob(&noise(200_000 + n * 100_000, 2_000 + n as u64)).unwrap();
        }
        let mut world = World { objects: Vec::new(), random, dir, store };
        for room in Room::ALL {
            for path in files_below(&world.store.root().join(room.name())) {
                let digest = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
                let stored = fs::read(&path).unwrap();
                let size = match codec {
                    Codec::Raw => stored.len() as u64,
                    Codec::Zstd => u64::from_le_bytes(stored[16..][..8].try_into().unwrap()),
                };
                let object = Object { room, digest, size };
                let bytes = ObjectFile::open(&world.store, &object).unwrap().read().unwrap();
                world.objects.push((object, bytes));
            }
        }
        world
    }

    /// Pseudorandom, and the same at every run.
    fn random(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    /// Flips one bit of each file; returns what they were.
    fn flip_each(&mut self, files: &[PathBuf]) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut before = BTreeMap::new();
        for path in files {
            let bytes = fs::read(path).unwrap();
            if !bytes.is_empty() {
                flip(path, self.random(bytes.len() as u64 * 8));
                before.insert(path.clone(), bytes);
            }
        }
        before
    }

    fn cache(&self, name: &str) -> Cache {
        let options = Options { keep_free: 0, ..Options::at(self.dir.path().join(name)) };
        Cache::open(options, self.store.clone()).unwrap()
    }

    /// Does something with each object, several at a time.
    fn each_object(&self, what: impl Fn(&Object, &[u8]) + Sync) {
        let next = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..READERS {
                scope.spawn(|| {
                    while let Some((object, bytes)) = self.objects.get(next.fetch_add(1, Ordering::Relaxed)) {
                        what(object, bytes);
                    }
                });
            }
        });
    }
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type().unwrap().is_dir() {
            true => files.extend(files_below(&entry.path())),
            false => files.push(entry.path()),
        }
    }
    files.sort();
    files
}

fn flip(path: &Path, bit: u64) {
    let mut byte = [0];
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    file.read_exact_at(&mut byte, bit / 8).unwrap();
    byte[0] ^= 1 << (bit % 8);
    file.write_all_at(&byte, bit / 8).unwrap();
}

/// Reads all of an object as a mount does: catalogs as a whole, others by the chunk. What is served must be right;
/// returns how many pieces were refused.
fn refused(cache: &Cache, object: &Object, bytes: &[u8]) -> usize {
    let told = |error: &envfabric::error::Error| {
        assert_eq!((error.kind(), error.errno()), (Kind::Corrupt, libc::EIO), "{error:?}");
        assert!(error.chain().contains(&object.digest.to_string()), "{error:?}");
    };
    if object.room == Room::Catalogs {
        match cache.whole(object) {
            Ok(Whole::File(path, _held)) => assert!(fs::read(path).unwrap() == bytes, "{}", object.label()),
            Ok(Whole::Bytes(read)) => assert!(read == bytes, "{}", object.label()),
            Err(error) => {
                told(&error);
                return 1;
            }
        }
        return 0;
    }
    let mut refused = 0;
    for (offset, chunk) in (0..).step_by(CHUNK_SIZE as usize).zip(bytes.chunks(CHUNK_SIZE as usize)) {
        match cache.read(object, || Ok(Chunks::of(bytes)), offset, CHUNK_SIZE) {
            Ok(read) => assert!(read == chunk, "{} at {offset}", object.label()),
            Err(error) => {
                told(&error);
                refused += 1;
            }
        }
    }
    refused
}

fn flips_in_a_store(codec: Codec, random: u64) -> Tally {
    let mut world = World::new(codec, random);
    let store = world.store.clone();
    let root = store.root().to_path_buf();
    let below = |dir: &str| files_below(&root.join(dir));
    let rooms: Vec<PathBuf> = Room::ALL.iter().flat_map(|room| below(room.name())).collect();
    let documents: Vec<PathBuf> = ["layers", "keys", "envs"].into_iter().flat_map(below).collect();
    let tally = Tally::default();
    let sorts = ["blobs", "packs", "catalogs", "layers", "keys", "versions", "current"];
    let mut met = sorts.map(|sort| (sort, 0));
    for round in 0.. {
        let flipped = world.flip_each(&[rooms.clone(), documents.clone(), vec![root.join("fabric.json")]].concat());
        let cache = world.cache(&format!("cache{round}"));
        world.each_object(|object, bytes| {
            let counter = if refused(&cache, object, bytes) > 0 { &tally.detected } else { &tally.harmless };
            counter.fetch_add(1, Ordering::Relaxed);
        });
        assert!(codec == Codec::Zstd || tally.harmless.load(Ordering::Relaxed) == 0);
        drop(cache);
        for path in &documents {
            let error = read_document(&store, path).expect_err("a flipped bit of a document is believed");
            assert!(matches!(error.kind(), Kind::Corrupt | Kind::Unsupported), "{}: {error:?}", path.display());
            tally.detected.fetch_add(1, Ordering::Relaxed);
        }
        Store::open(&root).unwrap_err();
        tally.detected.fetch_add(1, Ordering::Relaxed);
        for (sort, met) in &mut met {
            let is_of = |path: &&PathBuf| path.components().any(|part| part.as_os_str() == *sort);
            *met += flipped.keys().filter(is_of).count();
        }
        if codec == Codec::Zstd && round == 0 {
            // Also those that harm nobody.
            let report = store.fsck(&|_, _| ()).unwrap();
            let told = |path: &&PathBuf| {
                let name = path.strip_prefix(&root).unwrap().display().to_string();
                report.findings.iter().any(|finding| finding.object == name)
            };
            assert!(rooms.iter().all(|path| told(&path)), "{report:#?}");
        }
        for (path, bytes) in flipped {
            fs::remove_file(&path).unwrap();
            fs::write(path, bytes).unwrap();
        }
        if tally.detected.load(Ordering::Relaxed) + tally.harmless.load(Ordering::Relaxed) >= FLIPS {
            break;
        }
    }
    assert!(met.iter().all(|(_, met)| *met > 100), "{met:?}");
    let cache = world.cache("after");
    world.each_object(|object, bytes| assert_eq!(refused(&cache, object, bytes), 0));
    tally
}

/// Reads the document at `path` as whoever needs it does.
fn read_document(store: &Store, path: &Path) -> envfabric::error::Result<()> {
    let parts: Vec<&str> = path.strip_prefix(store.root()).unwrap().iter().map(|part| part.to_str().unwrap()).collect();
    let stem = path.file_stem().unwrap().to_str().unwrap();
    let env = || EnvName::new(parts[1], parts[2]).unwrap();
    match parts[..] {
        ["layers", ..] => store.layer(&stem.parse().unwrap()).map(drop),
        ["keys", ..] => store.layer_of_key(&stem.parse().unwrap()).map(drop),
        ["envs", _, _, "versions", _] => store.version(&env(), stem.parse().unwrap()).map(drop),
        ["envs", _, _, "current", _] => store.pointer(&env()).map(drop),
        _ => panic!("{parts:?}"),
    }
}

fn flips_in_a_cache(codec: Codec, random: u64) -> Tally {
    let mut world = World::new(codec, random);
    let files = |world: &World| {
        let rooms = Room::ALL.map(|room| files_below(&world.dir.path().join("cache").join(room.name())));
        rooms.concat()
    };
    let cache = world.cache("cache");
    world.each_object(|object, bytes| assert_eq!(refused(&cache, object, bytes), 0));
    drop(cache);
    let tally = Tally::default();
    let fetched = AtomicU64::new(0);
    while tally.detected.load(Ordering::Relaxed) < FLIPS {
        // Without a flip nothing is fetched, nor compared.
        let cache = world.cache("cache");
        world.each_object(|object, bytes| assert_eq!(refused(&cache, object, bytes), 0));
        let stats = cache.stats();
        assert_eq!((stats.verified_bytes, stats.fetches, stats.corrupt_in_cache), (0, 0, 0));
        drop(cache);

        let flipped = world.flip_each(&files(&world)).len();
        let cache = world.cache("cache");
        // A file that is not as it was is not handed to the kernel, either.
        world.each_object(|object, _| assert!(cache.hold(object).unwrap().0.is_none(), "{}", object.label()));
        world.each_object(|object, bytes| assert_eq!(refused(&cache, object, bytes), 0));
        let stats = cache.stats();
        assert_eq!(stats.corrupt_in_cache, flipped as u64);
        assert_eq!(flipped, world.objects.len());
        fetched.fetch_add(stats.unpacked_bytes, Ordering::Relaxed);
        world.each_object(|object, _| assert!(cache.hold(object).unwrap().0.is_some(), "{}", object.label()));
        tally.detected.fetch_add(flipped, Ordering::Relaxed);
    }
    assert!(fetched.load(Ordering::Relaxed) > 0);
    tally
}

/// Says how many there were, and that there were enough.
fn told(sort: &str, tally: &Tally) {
    let (detected, harmless) = (tally.detected.load(Ordering::Relaxed), tally.harmless.load(Ordering::Relaxed));
    println!("{sort}: {} flips, {detected} detected, {harmless} harmless, 0 served", detected + harmless);
    assert!(detected + harmless >= FLIPS && harmless * 50 < detected, "{tally:?}");
}

#[test]
fn no_flipped_bit_of_a_raw_store_is_served() {
    told("raw store", &flips_in_a_store(Codec::Raw, 0x5EED_0001));
}

#[test]
fn no_flipped_bit_of_a_packed_store_is_served() {
    told("packed store", &flips_in_a_store(Codec::Zstd, 0x5EED_0002));
}

#[test]
fn no_flipped_bit_of_what_is_cached_of_a_raw_store_is_served() {
    told("cache of a raw store", &flips_in_a_cache(Codec::Raw, 0x5EED_0003));
}

#[test]
fn no_flipped_bit_of_what_is_cached_of_a_packed_store_is_served() {
    told("cache of a packed store", &flips_in_a_cache(Codec::Zstd, 0x5EED_0004));
}
