//! The node cache, driven without a mount: whatever happens to it or to the store, every byte that it serves is the
//! right one, and what it says it holds is what lies on the disk.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use common::*;
use envfabric::cache::{Cache, Options, Whole};
use envfabric::environment::Digest;
use envfabric::error::{Error, Kind};
use envfabric::store::{CHUNK_SIZE, Chunks, Codec, Object, Room, Store};
use proptest::prelude::*;
use tempfile::TempDir;

/// A store with objects, and a place for a cache.
struct World {
    dir: TempDir,
    store: Store,
    objects: Vec<(Object, Vec<u8>)>,
}

impl World {
    fn new(sizes: &[usize]) -> World {
        World::with(Codec::Raw, sizes)
    }

    fn with(codec: Codec, sizes: &[usize]) -> World {
        let dir = scratch();
        let store = Store::init_with(&dir.path().join("store"), codec).unwrap();
        let objects = (1..).zip(sizes).map(|(seed, size)| {
            let bytes = noise(*size, seed);
            let digest = store.ensure_blob(&bytes).unwrap();
            (Object { room: Room::Blobs, digest, size: *size as u64 }, bytes)
        });
        World { objects: objects.collect(), dir, store }
    }

    fn options(&self) -> Options {
        Options { keep_free: 0, ..Options::at(self.dir.path().join("cache")) }
    }

    fn open(&self) -> Cache {
        self.open_with(self.options())
    }

    fn open_with(&self, options: Options) -> Cache {
        Cache::open(options, self.store.clone()).unwrap()
    }

    fn limited(&self, limit: u64) -> Cache {
        self.open_with(Options { limit, ..self.options() })
    }

    fn try_read(&self, cache: &Cache, n: usize, offset: u64, size: u64) -> Result<Vec<u8>, Error> {
        let (object, bytes) = &self.objects[n];
        cache.read(object, || Ok(Chunks::of(bytes)), offset, size)
    }

    /// Reads, and compares.
    fn read(&self, cache: &Cache, n: usize, offset: u64, size: u64) {
        let bytes = &self.objects[n].1;
        let end = offset.saturating_add(size).min(bytes.len() as u64) as usize;
        let read = self.try_read(cache, n, offset, size).unwrap();
        assert!(read == bytes[(offset as usize).min(end)..end], "object {n} from {offset}");
    }

    fn read_all(&self, cache: &Cache) {
        (0..self.objects.len()).for_each(|n| self.read(cache, n, 0, u64::MAX));
    }

    fn stored(&self, n: usize) -> PathBuf {
        self.store.object_path(&self.objects[n].0)
    }

    fn cached(&self, n: usize) -> PathBuf {
        let digest = self.objects[n].0.digest.to_string();
        self.dir.path().join("cache/blobs").join(&digest[..2]).join(digest)
    }
}

/// A directory in memory where there is one: these tests wait for the disk a lot.
fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Bytes of the files that a cache has on disk.
fn on_disk(cache: &Path) -> u64 {
    let names = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let shards = ["blobs", "packs", "catalogs"].into_iter().flat_map(|room| names(&cache.join(room)));
    // A file may go meanwhile.
    shards
        .flat_map(|shard| names(&shard))
        .filter_map(|file| Some(fs::symlink_metadata(file).ok()?.blocks() * 512))
        .sum()
}

fn flip(path: &Path, bit: u64) {
    let mut byte = [0];
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    file.read_exact_at(&mut byte, bit / 8).unwrap();
    byte[0] ^= 1 << (bit % 8);
    file.write_all_at(&byte, bit / 8).unwrap();
}

fn kind<T>(result: Result<T, Error>) -> Option<Kind> {
    result.err().map(|error| error.kind())
}

const CHUNK: usize = CHUNK_SIZE as usize;

/// What may happen to a cache.
#[derive(Debug, Clone)]
enum Step {
    Read {
        object: usize,
        offset: u64,
        size: u64,
    },
    Document(usize),
    Whole(usize),
    Ahead {
        object: usize,
        first: u64,
        count: u64,
    },
    Hold(usize),
    LetGo,
    Clear,
    /// It is closed, something is done to its files, and it is opened again.
    Reopen(Option<(usize, Harm)>),
}

#[derive(Debug, Clone)]
enum Harm {
    Flip(u64),
    Truncate,
    Lengthen,
    Remove,
    Directory,
    Symlink,
    Punch(u64),
    Ledger(u64),
}

const SIZES: [usize; 6] = [0, 1, 5_000, CHUNK, CHUNK + 1, 5 * CHUNK + 77];

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let object = 0..SIZES.len();
    let harm = prop_oneof![
        4 => any::<u64>().prop_map(Harm::Flip),
        1 => Just(Harm::Truncate),
        1 => Just(Harm::Lengthen),
        1 => Just(Harm::Remove),
        1 => Just(Harm::Directory),
        1 => Just(Harm::Symlink),
        1 => any::<u64>().prop_map(Harm::Punch),
        1 => any::<u64>().prop_map(Harm::Ledger),
    ];
    let step = prop_oneof![
        8 => (object.clone(), 0..6 * CHUNK_SIZE, 0..2 * CHUNK_SIZE)
            .prop_map(|(object, offset, size)| Step::Read { object, offset, size }),
        1 => object.clone().prop_map(Step::Document),
        2 => object.clone().prop_map(Step::Whole),
        2 => (object.clone(), 0..7u64, 0..7u64).prop_map(|(object, first, count)| Step::Ahead { object, first, count }),
        1 => object.clone().prop_map(Step::Hold),
        1 => Just(Step::LetGo),
        1 => Just(Step::Clear),
        3 => proptest::option::of((object, harm)).prop_map(Step::Reopen),
    ];
    proptest::collection::vec(step, 1..25)
}

fn harm(world: &World, n: usize, harm: &Harm) {
    let path = world.cached(n);
    let Ok(meta) = fs::symlink_metadata(&path) else { return };
    if let Harm::Ledger(at) = harm {
        let ledger = world.dir.path().join("cache/ledger.sqlite");
        return flip(&ledger, at % (fs::metadata(&ledger).unwrap().len() * 8));
    }
    if !meta.is_file() || meta.len() == 0 {
        return;
    }
    let open = || OpenOptions::new().write(true).open(&path).unwrap();
    match harm {
        Harm::Flip(bit) => flip(&path, bit % (meta.len() * 8)),
        Harm::Truncate => open().set_len(meta.len() / 2).unwrap(),
        Harm::Lengthen => open().set_len(meta.len() + 1).unwrap(),
        Harm::Punch(at) => {
            let how =
                nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
            nix::fcntl::fallocate(open(), how, (at % meta.len()) as i64, 4096).unwrap();
        }
        _ => {
            fs::remove_file(&path).unwrap();
            match harm {
                Harm::Directory => fs::create_dir_all(path.join("below")).unwrap(),
                Harm::Symlink => symlink(world.dir.path().join("precious"), &path).unwrap(),
                _ => {}
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, max_shrink_iters: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_byte_is_the_stores_and_what_is_held_is_what_lies_on_the_disk(
        steps in steps(),
        limit in prop_oneof![Just(u64::MAX), 0..10 * CHUNK_SIZE],
        packed in any::<bool>(),
    ) {
        let world = World::with(if packed { Codec::Zstd } else { Codec::Raw }, &SIZES);
        let precious = world.dir.path().join("precious");
        fs::write(&precious, b"precious").unwrap();
        let dir = world.options().dir;
        let mut cache = Some(world.limited(limit));
        let mut held = Vec::new();
        for step in &steps {
            let open = cache.as_ref().unwrap();
            match step {
                Step::Read { object, offset, size } => world.read(open, *object, *offset, *size),
                // What is in chunks stays so: a cache knows an object in one way.
                Step::Document(n) => assert!(open.document(&world.objects[*n].0).unwrap() == world.objects[*n].1),
                Step::Whole(n) => match open.whole(&world.objects[*n].0).unwrap() {
                    Whole::Bytes(bytes) => assert!(bytes == world.objects[*n].1),
                    Whole::File(path, _held) => assert!(fs::read(path).unwrap() == world.objects[*n].1),
                },
                Step::Ahead { object, first, count } => {
                    let (object, bytes) = &world.objects[*object];
                    open.ask_ahead(object, || Ok(Chunks::of(bytes)), *first, first + count, 4).unwrap();
                }
                Step::Hold(n) => {
                    let (file, hold) = open.hold(&world.objects[*n].0).unwrap();
                    let bytes = &world.objects[*n].1;
                    if let Some(file) = file {
                        let mut read = vec![0; bytes.len()];
                        file.read_exact_at(&mut read, 0).unwrap();
                        assert!(read == *bytes && file.metadata().unwrap().len() == bytes.len() as u64);
                    }
                    held.push(hold);
                }
                Step::LetGo => held.clear(),
                Step::Clear => {
                    // As if somebody had taken all files away under a cache that is open.
                    for n in 0..SIZES.len() {
                        let _ = fs::remove_file(world.cached(n));
                    }
                }
                Step::Reopen(what) => {
                    held.clear();
                    drop(cache.take());
                    if let Some((n, what)) = what {
                        harm(&world, *n, what);
                    }
                    cache = Some(world.limited(limit));
                }
            }
            prop_assert!(cache.as_ref().unwrap().stats().held <= limit);
        }
        // Without what somebody has taken away: after a reopening all counts.
        held.clear();
        drop(cache.take());
        let cache = world.limited(limit);
        world.read_all(&cache);
        until("what is held is on the disk", || cache.stats().held == on_disk(&dir));
        prop_assert!(cache.stats().held <= limit);
        prop_assert_eq!(fs::read(precious).unwrap(), b"precious");
        prop_assert!(fs::read_dir(dir.join("trash")).unwrap().next().is_none());
    }
}

#[test]
fn whatever_lies_in_the_place_of_a_cached_file_is_put_aside() {
    for what in [Harm::Truncate, Harm::Lengthen, Harm::Remove, Harm::Directory, Harm::Symlink, Harm::Flip(7)] {
        let world = World::new(&[CHUNK + 1, 300]);
        let precious = world.dir.path().join("precious");
        fs::write(&precious, b"precious").unwrap();
        world.read_all(&world.open());
        (0..2).for_each(|n| harm(&world, n, &what));
        let cache = world.open();
        world.read_all(&cache);
        assert!((0..2).all(|n| fs::symlink_metadata(world.cached(n)).unwrap().is_file()), "{what:?}");
        assert_eq!(fs::read(&precious).unwrap(), b"precious", "{what:?}");
        assert_eq!(cache.stats().held, on_disk(&world.options().dir), "{what:?}");
    }
}

#[test]
fn many_threads_fetch_every_chunk_once() {
    for codec in [Codec::Raw, Codec::Zstd] {
        let world = World::with(codec, &[40 * CHUNK + 5, 3 * CHUNK, 100]);
        let cache = world.open();
        let total: usize = world.objects.iter().map(|(_, bytes)| bytes.len()).sum();
        let together = Barrier::new(24);
        thread::scope(|scope| {
            for n in 0..24u64 {
                let (world, cache, together) = (&world, &cache, &together);
                scope.spawn(move || {
                    together.wait();
                    world.read_all(cache);
                    for at in 0..40 {
                        world.read(cache, 0, (at * 7 + n * 13) % 40 * CHUNK_SIZE, 100_000);
                    }
                });
            }
        });
        let stats = cache.stats();
        assert_eq!(stats.unpacked_bytes, total as u64, "{stats:#?}");
        assert_eq!((stats.verified_bytes, stats.retries, stats.timeouts), (total as u64, 0, 0));
    }
}

#[test]
fn the_limit_holds_at_every_moment_while_many_threads_read() {
    let world = World::new(&[CHUNK * 6 + 1; 12]);
    let limit = CHUNK_SIZE * 20;
    let cache = world.limited(limit);
    let (dir, over) = (world.options().dir, AtomicBool::new(false));
    let threads = 16;
    thread::scope(|scope| {
        let readers: Vec<_> = (0..threads)
            .map(|n| {
                let (world, cache) = (&world, &cache);
                scope.spawn(move || {
                    for round in 0..60u64 {
                        let pick = (round * 7 + n * 5) as usize;
                        world.read(cache, pick % 12, (pick as u64 * 3 % 6) * CHUNK_SIZE + 9, CHUNK_SIZE);
                    }
                })
            })
            .collect();
        while !readers.iter().all(|reader| reader.is_finished()) {
            // What is on its way out is unlinked a little later than it is counted out.
            let bound = limit + threads * CHUNK_SIZE;
            if cache.stats().held > limit || on_disk(&dir) > bound {
                over.store(true, Ordering::Relaxed);
            }
        }
    });
    assert!(!over.load(Ordering::Relaxed));
    assert!(cache.stats().evictions > 0);
    until("it settles", || cache.stats().held == on_disk(&dir));
}

#[test]
fn what_was_used_longest_ago_goes_first_also_after_a_restart() {
    let world = World::new(&[CHUNK; 12]);
    let limit = CHUNK_SIZE * 6;
    let cache = world.limited(limit);
    (0..6).for_each(|n| world.read(&cache, n, 0, 10));
    world.read(&cache, 0, 0, 10);
    world.read(&cache, 1, 0, 10);
    drop(cache);
    let cache = world.limited(limit);
    world.read(&cache, 2, 0, 10);
    (6..8).for_each(|n| world.read(&cache, n, 0, 10));
    let here: Vec<usize> = (0..12).filter(|n| world.cached(*n).exists()).collect();
    // Each eviction frees a little more than is needed: here 1/64 of the limit, and so one object more.
    assert!(!here.contains(&3) && !here.contains(&4), "{here:?}");
    assert!([0, 1, 2, 6, 7].iter().all(|n| here.contains(n)), "{here:?}");
    assert_eq!(cache.stats().limit, limit);
}

#[test]
fn a_clock_that_was_wrong_does_not_decide_what_goes() {
    let world = World::new(&[CHUNK; 8]);
    let cache = world.limited(u64::MAX);
    (0..4).for_each(|n| world.read(&cache, n, 0, 10));
    drop(cache);
    let ledger = rusqlite::Connection::open(world.options().dir.join("ledger.sqlite")).unwrap();
    // Used in the far future; and what is used now must still count as later.
    assert_eq!(ledger.execute("UPDATE file SET used = used * 3", ()).unwrap(), 4);
    drop(ledger);
    let cache = world.limited(CHUNK_SIZE * 5);
    world.read(&cache, 4, 0, 10);
    world.read(&cache, 0, 0, 10);
    world.read(&cache, 5, 0, 10);
    assert!([0, 4, 5].iter().all(|n| world.cached(*n).exists()));
    assert!(!world.cached(1).exists());
}

#[test]
fn a_ledger_that_is_lost_or_damaged_costs_comparing_and_nothing_else() {
    let world = World::new(&[CHUNK * 2 + 5, 100, 5_000]);
    let total: u64 = world.objects.iter().map(|(object, _)| object.size).sum();
    world.read_all(&world.open());
    let ledger = world.options().dir.join("ledger.sqlite");
    let losses: [fn(&Path); 4] = [
        |_| (),
        |ledger| fs::remove_file(ledger).unwrap(),
        |ledger| fs::write(ledger, b"no database").unwrap(),
        |ledger| OpenOptions::new().write(true).open(ledger).unwrap().write_all_at(&[0xA5; 4096], 4096).unwrap(),
    ];
    for (n, lose) in losses.iter().enumerate() {
        lose(&ledger);
        let cache = world.open();
        world.read_all(&cache);
        let stats = cache.stats();
        let compared = if n == 0 { 0 } else { total };
        assert_eq!((stats.fetches, stats.verified_bytes, stats.corrupt_in_cache), (0, compared, 0), "{n}");
    }
}

#[test]
fn what_is_open_is_never_evicted() {
    let world = World::new(&[CHUNK * 3; 8]);
    let cache = world.limited(CHUNK_SIZE * 7);
    world.read(&cache, 0, 0, u64::MAX);
    let (file, held) = cache.hold(&world.objects[0].0).unwrap();
    let (_, also) = cache.hold(&world.objects[1].0).unwrap();
    world.read(&cache, 1, 0, CHUNK_SIZE);
    (2..8).for_each(|n| world.read(&cache, n, 0, u64::MAX));
    assert!(cache.stats().evictions > 0);
    assert!(world.cached(0).exists() && world.cached(1).exists());
    let fetched = cache.stats().unpacked_bytes;
    world.read(&cache, 0, 0, u64::MAX);
    assert_eq!(cache.stats().unpacked_bytes, fetched);
    drop((file, held, also));
    (2..8).for_each(|n| world.read(&cache, n, 0, u64::MAX));
    assert!(!world.cached(0).exists());
}

#[test]
fn a_lower_limit_holds_from_the_start() {
    let world = World::new(&[CHUNK; 8]);
    world.read_all(&world.open());
    let cache = world.limited(CHUNK_SIZE * 3);
    assert!(cache.stats().held <= CHUNK_SIZE * 3);
    assert_eq!(cache.stats().held, on_disk(&world.options().dir));
}

#[test]
fn where_nothing_can_be_kept_every_byte_is_served_all_the_same() {
    let world = World::new(&[30 * CHUNK + 1, CHUNK, 10]);
    for options in [Options { limit: 0, ..world.options() }, Options { keep_free: u64::MAX, ..world.options() }] {
        let cache = world.open_with(options);
        thread::scope(|scope| {
            for _ in 0..32 {
                scope.spawn(|| world.read_all(&cache));
            }
        });
        let stats = cache.stats();
        assert_eq!((stats.held, stats.timeouts), (0, 0));
        assert!(stats.not_kept > 0);
        assert!(
            matches!(cache.whole(&world.objects[2].0).unwrap(), Whole::Bytes(bytes) if bytes == world.objects[2].1)
        );
    }
}

#[test]
fn one_wrong_chunk_of_the_store_harms_no_other_and_is_well_when_it_is_repaired() {
    for codec in [Codec::Raw, Codec::Zstd] {
        let world = World::with(codec, &[20 * CHUNK]);
        let cache = world.open();
        let magic = if codec == Codec::Raw { 0 } else { 16 };
        flip(&world.stored(0), (magic + 5 * CHUNK_SIZE + 1234) * 8);
        let (object, bytes) = &world.objects[0];
        cache.ask_ahead(object, || Ok(Chunks::of(bytes)), 0, 20, 4).unwrap();
        for at in (0..20).filter(|at| *at != 5) {
            world.read(&cache, 0, at * CHUNK_SIZE, CHUNK_SIZE);
        }
        let error = world.try_read(&cache, 0, 5 * CHUNK_SIZE + 7, 1).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (Kind::Corrupt, libc::EIO));
        assert!(error.chain().contains(&object.label()), "{error:?}");
        assert!(error.hint_text().is_none_or(|hint| hint.contains("fsck")));
        assert_eq!(kind(world.try_read(&cache, 0, 4 * CHUNK_SIZE, 3 * CHUNK_SIZE)), Some(Kind::Corrupt));
        assert!(cache.stats().corrupt_in_store > 0);
        assert!(cache.hold(object).unwrap().0.is_none());
        let report = world.store.fsck(&|_, _| ()).unwrap();
        assert!(report.findings.iter().any(|finding| finding.object.contains(&object.digest.to_string())));
        flip(&world.stored(0), (magic + 5 * CHUNK_SIZE + 1234) * 8);
        world.read_all(&cache);
        assert!(cache.hold(object).unwrap().0.is_some());
    }
}

#[test]
fn who_is_wrong_about_a_size_is_told_and_harms_nobody_else() {
    let world = World::new(&[CHUNK + 9, 100]);
    for n in 0..2 {
        let (object, bytes) = &world.objects[n];
        for size in [0, 1, object.size - 1, object.size + 1, 1 << 30, u64::MAX] {
            let cache = world.open();
            let wrong = Object { size, ..*object };
            assert_eq!(kind(cache.document(&wrong)), Some(Kind::Corrupt), "{size}");
            assert_eq!(kind(cache.whole(&wrong)), Some(Kind::Corrupt), "{size}");
            if size > 0 {
                let chunks = || Ok(Chunks::of(bytes));
                assert_eq!(kind(cache.read(&wrong, chunks, size - 1, u64::MAX)), Some(Kind::Corrupt), "{size}");
            }
            world.read(&cache, n, 0, u64::MAX);
            assert_eq!(kind(cache.document(&wrong)), Some(Kind::Corrupt), "{size}");
            world.read(&cache, n, 0, u64::MAX);
        }
    }
}

#[test]
fn a_cached_file_that_is_cut_short_while_it_is_open_is_fetched_again() {
    let world = World::new(&[CHUNK * 4]);
    let cache = world.open();
    world.read_all(&cache);
    OpenOptions::new().write(true).open(world.cached(0)).unwrap().set_len(CHUNK_SIZE).unwrap();
    world.read_all(&cache);
    world.read_all(&cache);
    assert_eq!((cache.stats().held, cache.stats().corrupt_in_cache), (on_disk(&world.options().dir), 1));
    assert_eq!(fs::metadata(world.cached(0)).unwrap().len(), CHUNK_SIZE * 4);
}

#[test]
fn a_directory_that_vanishes_while_it_is_used_is_made_again() {
    let world = World::new(&[CHUNK * 2, 700, 800]);
    let cache = world.limited(CHUNK_SIZE * 2 + 4096);
    world.read(&cache, 0, 0, u64::MAX);
    assert!(matches!(cache.whole(&world.objects[1].0).unwrap(), Whole::File(..)));
    fs::remove_dir_all(world.options().dir).unwrap();
    assert!(matches!(cache.whole(&world.objects[1].0).unwrap(), Whole::Bytes(bytes) if bytes == world.objects[1].1));
    // There is room for it as soon as nobody has another one in hand.
    until("it is kept again", || {
        world.read_all(&cache);
        world.cached(2).exists()
    });
    drop(cache);
    world.read_all(&world.open());
}

/// An object of the store whose opening hangs until a writer comes.
fn hang(world: &World, n: usize) -> PathBuf {
    let (path, away) = (world.stored(n), world.dir.path().join(format!("away{n}")));
    fs::rename(&path, &away).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR).unwrap();
    away
}

/// Whoever hangs finds an empty file; the next find it as it was.
fn let_go(world: &World, n: usize, away: &Path) {
    let fifo = world.stored(n);
    let open = OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    fs::rename(away, &fifo).unwrap();
    drop(open);
}

#[test]
fn a_cache_is_free_for_the_next_although_a_fetch_of_the_last_hangs() {
    let world = World::new(&[CHUNK * 2]);
    let options = Options { patience: Duration::from_millis(50), ..world.options() };
    let away = hang(&world, 0);
    let cache = world.open_with(options.clone());
    for _ in 0..2 {
        let error = world.try_read(&cache, 0, 0, 10).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (Kind::TimedOut, libc::EIO));
        assert!(error.chain().contains(&world.objects[0].0.label()), "{error:?}");
    }
    assert_eq!(kind(Cache::open(options.clone(), world.store.clone())), Some(Kind::Busy));
    drop(cache);
    let cache = world.open_with(world.options());
    let_go(&world, 0, &away);
    world.read_all(&cache);
    assert_eq!(cache.stats().held, on_disk(&world.options().dir));
}

#[test]
fn who_reads_what_is_here_does_not_wait_for_what_hangs() {
    let world = World::new(&[CHUNK * 2, CHUNK * 2]);
    let cache = world.open();
    world.read(&cache, 1, 0, u64::MAX);
    let away = hang(&world, 0);
    let late = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..50 {
            scope.spawn(|| {
                // It comes in the end, as the patience is long.
                world.read(&cache, 0, 5, CHUNK_SIZE);
                late.fetch_add(1, Ordering::Relaxed);
            });
        }
        until("it is asked for", || {
            envfabric::patience::at_once(|| kind(world.try_read(&cache, 0, 0, 1)) == Some(Kind::WouldWait))
        });
        for _ in 0..100 {
            envfabric::patience::at_once(|| world.read(&cache, 1, 0, u64::MAX));
        }
        assert_eq!(late.load(Ordering::Relaxed), 0);
        let_go(&world, 0, &away);
    });
    assert_eq!(cache.stats().unpacked_bytes, 4 * CHUNK_SIZE);
}

#[test]
fn a_file_that_is_not_ours_is_left_alone_and_not_counted() {
    let world = World::new(&[CHUNK]);
    let dir = world.options().dir;
    fs::create_dir_all(dir.join("blobs/zz")).unwrap();
    fs::write(dir.join("blobs/zz/note"), noise(9000, 1)).unwrap();
    let misplaced = dir.join("blobs/zz").join(Digest::of(b"x").to_string());
    fs::write(&misplaced, noise(9000, 1)).unwrap();
    let cache = world.limited(0);
    world.read_all(&cache);
    assert_eq!(cache.stats().held, 0);
    assert!(misplaced.exists() && dir.join("blobs/zz/note").exists());
}
