//! Mounts of a store behind a simulated NAS: what is here is served whatever becomes of the NAS, what is not is fetched
//! once, and nothing wrong is ever shown.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod nas_client;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use common::*;
use envfabric::cache::{self, Cache, CacheStats};
use envfabric::environment::Digest;
use envfabric::mount::{self, Mounted, Options, mount as mount_store, stats};
use envfabric::store::{CHUNK_SIZE, Chunks, Codec, Index, Object, Room, Store};
use nas_client::{Nas, no_nas_because};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// One test at a time: they look at the log of the process, and a process that another starts keeps mounts busy.
macro_rules! needs_nas {
    () => {{
        if let Some(why) = no_nas_because() {
            eprintln!("skipped: {why}");
            return;
        }
        alone()
    }};
}

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = tracing_subscriber::fmt().with_ansi(false).with_writer(|| Log).try_init();
    log().clear();
    alone
}

fn log() -> MutexGuard<'static, Vec<u8>> {
    LOG.lock().unwrap_or_else(PoisonError::into_inner)
}

static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Log;

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        log().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Lines of the log that name `object`.
fn logged(object: &Digest) -> Vec<String> {
    let name = object.to_string();
    let text = String::from_utf8(log().clone()).unwrap();
    text.lines().filter(|line| line.contains(&name)).map(String::from).collect()
}

/// A store that was made locally, behind a NAS. The mount goes first, then the NAS.
struct World {
    mounted: Option<Mounted>,
    nas: Nas,
    fixture: Fixture,
}

impl World {
    fn new(codec: Codec) -> World {
        let fixture = Fixture::with(codec);
        World { mounted: None, nas: Nas::start(fixture.dir.path(), &nas_client::Options::default()), fixture }
    }

    fn store(&self) -> Store {
        Store::open(&self.nas.mount().join("store")).unwrap()
    }

    fn options(&self) -> Options {
        let cache = cache::Options { keep_free: 0, ..cache::Options::at(self.fixture.dir.path().join("cache")) };
        Options { cache: Some(cache), ..Options::at(self.fixture.dir.path().join("mounted")) }
    }

    fn mount(&mut self, change: impl FnOnce(&mut Options)) {
        let mut options = self.options();
        change(&mut options);
        let index = Arc::new(Index::in_memory().unwrap());
        self.mounted = Some(mount_store(self.store(), index, &options).unwrap());
    }

    fn root(&self) -> &Path {
        self.mounted.as_ref().unwrap().mount_point()
    }

    /// A file below `site-packages` of an environment.
    fn site(&self, env: &str, path: &str) -> PathBuf {
        self.root().join(env).join(".versions/1/.venv").join(SITE).join(path)
    }

    fn cache_stats(&self) -> CacheStats {
        stats(self.root()).unwrap().cache.unwrap()
    }

    fn unmount(&mut self) {
        self.mounted.take().unwrap().unmount().unwrap();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // What hangs in a test that failed must not keep the mount from going.
        if self.nas.try_command("heal").is_ok() {
            drop(self.mounted.take());
        }
    }
}

/// Reads a file from the mount, and not from the kernel's memory.
fn read_anew(path: &Path) -> std::io::Result<Vec<u8>> {
    let file = File::open(path)?;
    posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut &file, &mut bytes)?;
    Ok(bytes)
}

/// What `noise` makes; it is compared with so often that it is made once.
fn known(length: usize, seed: u64) -> Arc<Vec<u8>> {
    type Known = BTreeMap<(usize, u64), Arc<Vec<u8>>>;
    static KNOWN: Mutex<Known> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    known.entry((length, seed)).or_insert_with(|| Arc::new(noise(length, seed))).clone()
}

/// None when it succeeded.
fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

#[test]
fn a_store_is_cached_unless_it_is_local_and_raw_or_when_that_is_asked_for() {
    let _alone = needs_nas!();
    for (codec, behind_nas, always, cached) in [
        (Codec::Raw, false, false, false),
        (Codec::Raw, false, true, true),
        (Codec::Zstd, false, false, true),
        (Codec::Raw, true, false, true),
        (Codec::Zstd, true, false, true),
    ] {
        let mut world = World::new(codec);
        world.fixture.publish("demo/a", world.fixture.packages());
        let index = Arc::new(Index::in_memory().unwrap());
        let options = Options { cache_always: always, ..world.options() };
        let store = if behind_nas { world.store() } else { world.fixture.store.clone() };
        world.mounted = Some(mount_store(store, index, &options).unwrap());
        assert!(fs::read(world.site("demo/a", "beta/data/big.bin")).unwrap() == *known(700_000, 200));
        assert_eq!(fs::read(world.site("demo/a", "beta/data/small.bin")).unwrap(), noise(5_000, 201));
        let of_cache = stats(world.root()).unwrap().cache;
        assert_eq!(of_cache.is_some(), cached, "{codec:?} {behind_nas} {always}");
        assert_eq!(world.fixture.dir.path().join("cache").exists(), cached);
        assert!(of_cache.is_none_or(|stats| stats.held >= 700_000));
        world.unmount();
    }
}

#[test]
fn sixteen_cold_environments_that_share_layers_fetch_every_byte_once() {
    for codec in [Codec::Raw, Codec::Zstd] {
        let _alone = needs_nas!();
        let mut world = World::new(codec);
        let layers: Vec<_> = (0..6u64)
            .map(|n| {
                let big = file(format!("{SITE}/p{n}/big.bin"), noise(1_300_000, n + 1));
                let small = (0..20).map(|m| file(format!("{SITE}/p{n}/{m}.py"), noise(9_000, 100 * n + m + 50)));
                world.fixture.layer(&format!("p{n}"), small.chain([big]).collect())
            })
            .collect();
        for env in 0..16 {
            // Each has four of the six.
            let some = (0..4).map(|n| layers[(env + n * 5) % 6]).collect();
            world.fixture.publish(&format!("demo/e{env}"), some);
        }
        world.mount(|_| ());
        world.nas.command("record on");
        let together = Barrier::new(32);
        thread::scope(|scope| {
            for reader in 0..32usize {
                let (world, together) = (&world, &together);
                scope.spawn(move || {
                    let env = reader % 16;
                    together.wait();
                    for n in 0..4 {
                        let package = (env + n * 5) % 6;
                        let at = |name: &str| world.site(&format!("demo/e{env}"), &format!("p{package}/{name}"));
                        let seed = package as u64;
                        assert!(fs::read(at("big.bin")).unwrap() == *known(1_300_000, seed + 1));
                        for m in 0..20u64 {
                            assert!(fs::read(at(&format!("{m}.py"))).unwrap() == *known(9_000, 100 * seed + m + 50));
                        }
                    }
                });
            }
        });
        // What the NAS was asked for: no byte of an object twice.
        let reads = world.nas.command("reads");
        let mut asked: BTreeMap<String, Vec<(u64, u64)>> = BTreeMap::new();
        for read in reads["list"].as_array().unwrap() {
            let path = read["path"].as_str().unwrap();
            if ["blobs/", "packs/", "catalogs/"].iter().any(|room| path.contains(room)) {
                let (offset, length) = (read["offset"].as_u64().unwrap(), read["length"].as_u64().unwrap());
                asked.entry(path.to_string()).or_default().push((offset, length));
            }
        }
        assert!(asked.len() >= 6, "{asked:#?}");
        for (path, mut reads) in asked {
            reads.sort_unstable();
            let disjoint = reads.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0);
            assert!(disjoint, "{path}: {reads:?}");
        }
        // And what the cache asked for, which the kernel may have had in memory: each chunk once.
        let stats = world.cache_stats();
        assert_eq!((stats.retries, stats.not_kept, stats.timeouts, stats.corrupt_in_store), (0, 0, 0, 0));
        assert_eq!(stats.verified_bytes, stats.unpacked_bytes);
        let held: u64 = objects_in(&world.fixture.dir.path().join("cache"));
        assert_eq!(stats.unpacked_bytes, held);
        world.unmount();
    }
}

/// Bytes of the objects that a cache has, which all are whole.
fn objects_in(cache: &Path) -> u64 {
    let names = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let shards = ["blobs", "packs", "catalogs"].into_iter().flat_map(|room| names(&cache.join(room)));
    shards.flat_map(|shard| names(&shard)).map(|file| file.metadata().unwrap().len()).sum()
}

#[test]
fn who_goes_through_a_file_is_read_ahead_for_and_who_jumps_is_not() {
    let _alone = needs_nas!();
    let world = World::new(Codec::Raw);
    let bytes = noise(64 * CHUNK_SIZE as usize, 9);
    let object = Object {
        room: Room::Blobs,
        digest: world.fixture.store.ensure_blob(&bytes).unwrap(),
        size: bytes.len() as u64,
    };
    let read = |cache: &Cache, at: u64| {
        assert!(
            cache.read(&object, || Ok(Chunks::of(&bytes)), at * CHUNK_SIZE, 4096).unwrap()[..]
                == bytes[(at * CHUNK_SIZE) as usize..][..4096]
        );
    };
    let open = |name: &str| {
        Cache::open(cache::Options { keep_free: 0, ..cache::Options::at(world.fixture.place(name)) }, world.store())
            .unwrap()
    };
    let jumps = open("jumps");
    [40u64, 3, 21, 60, 10, 33].iter().for_each(|at| read(&jumps, *at));
    // Nothing but what comes by the same requests.
    assert!(jumps.stats().fetches == 6 && jumps.stats().fetched_bytes <= 6 << 20, "{:#?}", jumps.stats());
    let goes = open("goes");
    (0..64).for_each(|at| read(&goes, at));
    let stats = goes.stats();
    // Requests of a MiB but for the first, most of it before it was asked for, and nothing twice.
    assert_eq!(stats.unpacked_bytes, object.size);
    assert!(stats.ahead > 40 && stats.ahead_used == stats.ahead, "{stats:#?}");
    assert!(stats.fetches <= 17, "{stats:#?}");
}

#[test]
fn what_is_queued_ahead_of_readers_is_fetched_at_once_when_one_comes() {
    let _alone = needs_nas!();
    let world = World::new(Codec::Raw);
    let object = |seed| {
        let bytes = noise(64 * CHUNK_SIZE as usize, seed);
        let digest = world.fixture.store.ensure_blob(&bytes).unwrap();
        (Object { room: Room::Blobs, digest, size: bytes.len() as u64 }, bytes)
    };
    let [(hanging, hanging_bytes), (wanted, bytes)] = [21, 22].map(object);
    let options = cache::Options { keep_free: 0, ..cache::Options::at(world.fixture.place("queue")) };
    let cache = Cache::open(options, world.store()).unwrap();
    // As much as all threads that bring bytes ahead of readers can wait for.
    cache.read(&hanging, || Ok(Chunks::of(&hanging_bytes)), 0, 1).unwrap();
    world.nas.command(&format!("hang blobs/{}", hanging.digest));
    cache.ask_ahead(&hanging, || unreachable!(), 8, 64, usize::MAX).unwrap();
    cache.ask_ahead(&wanted, || Ok(Chunks::of(&bytes)), 0, 64, usize::MAX).unwrap();
    let read = cache.read(&wanted, || unreachable!(), 40 * CHUNK_SIZE, 4096).unwrap();
    assert!(read == bytes[40 * CHUNK_SIZE as usize..][..4096]);
    world.nas.command("heal");
    until("all that was asked for is here", || cache.stats().unpacked_bytes >= (56 + 64) * CHUNK_SIZE);
}

#[test]
fn what_came_around_a_read_is_served_whatever_hangs_then_and_is_bounded_until_it_is_unpacked() {
    const REQUEST: u64 = 4;
    let _alone = needs_nas!();
    let world = World::new(Codec::Raw);
    let object = |chunks: u64, seed| {
        let bytes = noise((chunks * CHUNK_SIZE) as usize, seed);
        let digest = world.fixture.store.ensure_blob(&bytes).unwrap();
        (Object { room: Room::Blobs, digest, size: bytes.len() as u64 }, bytes)
    };
    // More than may be kept to be unpacked later.
    let [(hanging, hanging_bytes), (wanted, bytes)] = [object(64, 23), object(70 * REQUEST, 24)];
    let options = cache::Options { keep_free: 0, ..cache::Options::at(world.fixture.place("around")) };
    let cache = Cache::open(options, world.store()).unwrap();
    let to_unpack = || {
        let [_, (name, now, most)] = cache.memories();
        assert!(name == "bytes to unpack" && now <= most, "{now} of {most}");
        now
    };
    let read = |at: u64| {
        let read = cache.read(&wanted, || Ok(Chunks::of(&bytes)), at * CHUNK_SIZE, CHUNK_SIZE).unwrap();
        assert!(read == bytes[(at * CHUNK_SIZE) as usize..][..CHUNK_SIZE as usize], "chunk {at}");
    };
    cache.read(&hanging, || Ok(Chunks::of(&hanging_bytes)), 0, 1).unwrap();
    until("all is unpacked", || to_unpack() == 0);
    world.nas.command(&format!("hang blobs/{}", hanging.digest));
    cache.ask_ahead(&hanging, || unreachable!(), 8, 64, usize::MAX).unwrap();
    world.nas.wait_until_hung(4);
    // From the end, so that nobody is read ahead for.
    for request in (0..70).rev() {
        read(request * REQUEST + 1);
        to_unpack();
    }
    world.nas.command("hang");
    (0..wanted.chunks()).for_each(read);
    until("all is unpacked", || to_unpack() == 0);
    assert!(cache.stats().ahead_used >= 69 * (REQUEST - 1), "{:#?}", cache.stats());
    world.nas.command("heal");
}

#[test]
fn a_whole_file_is_passed_through_as_soon_as_no_other_handle_of_it_is_open() {
    let _alone = needs_nas!();
    let mut world = World::new(Codec::Zstd);
    world.fixture.publish("demo/a", world.fixture.packages());
    let big = world.fixture.layer("big", vec![file(format!("{SITE}/big.bin"), noise(5_000_000, 77))]);
    world.fixture.publish("demo/b", vec![big]);
    world.mount(|_| ());
    if let Some(why) = stats(world.root()).unwrap().passthrough.why_not {
        eprintln!("skipped: {why}");
        return;
    }
    let passed = |world: &World| stats(world.root()).unwrap().opens.passthrough;
    let (path, bytes) = (world.site("demo/b", "big.bin"), noise(5_000_000, 77));
    let first = File::open(&path).unwrap();
    let mut part = [0; 1000];
    first.read_exact_at(&mut part, 3_000_000).unwrap();
    assert!(part == bytes[3_000_000..3_001_000]);
    assert!(fs::read(&path).unwrap() == bytes);
    assert_eq!(passed(&world), 0, "a cached handle is open");
    drop(first);
    // Its release is not waited for.
    until("it is passed through", || {
        assert!(fs::read(&path).unwrap() == bytes);
        passed(&world) > 0
    });
    world.unmount();
    // After a restart from the first opening on, without a read; the store is not even asked for its bytes.
    world.mount(|_| ());
    assert!(fs::read(&path).unwrap() == bytes);
    assert_eq!((passed(&world), world.cache_stats().verified_bytes < 5_000_000), (1, true));
    world.unmount();

    // Both sorts come and go, from cold.
    let dir = world.fixture.place("second");
    world.mount(|options| options.cache = Some(cache::Options { keep_free: 0, ..cache::Options::at(dir) }));
    let before = passed(&world);
    thread::scope(|scope| {
        for n in 0..12u64 {
            let (world, path, bytes) = (&world, &path, &bytes);
            scope.spawn(move || {
                for round in 0..40u64 {
                    let file = File::open(path).unwrap();
                    let from = ((round * 31 + n * 7) * 100_003 % 4_900_000) as usize;
                    let mut part = vec![0; 99_000];
                    file.read_exact_at(&mut part, from as u64).unwrap();
                    assert!(part == bytes[from..from + 99_000]);
                    if round % 8 == n % 8 {
                        assert!(fs::read(path).unwrap() == *bytes);
                    }
                    let other = world.site("demo/a", "alpha/data/big.bin");
                    assert!(fs::read(other).unwrap() == *known(700_000, 100));
                }
            });
        }
    });
    until("it is passed through", || {
        assert!(fs::read(&path).unwrap() == bytes);
        passed(&world) > before
    });
    world.unmount();
}

/// Two environments: what is read before the trouble, and a large file that is not.
fn warm_and_cold(world: &mut World) -> Object {
    world.fixture.publish("demo/warm", world.fixture.packages());
    let bytes = noise(COLD, 5);
    let cold = world.fixture.layer("cold", vec![file(format!("{SITE}/cold.bin"), bytes.clone())]);
    world.fixture.publish("demo/cold", vec![cold]);
    Object { room: Room::Blobs, digest: Digest::of(&bytes), size: COLD as u64 }
}

const COLD: usize = 8 << 20;

/// What somebody reads who works with what is here.
fn work(world: &World) {
    for (name, seed) in [("alpha", 100), ("beta", 200), ("gamma", 300)] {
        assert!(read_anew(&world.site("demo/warm", &format!("{name}/data/big.bin"))).unwrap() == *known(700_000, seed));
        assert!(
            read_anew(&world.site("demo/warm", &format!("{name}/data/small.bin"))).unwrap() == *known(5_000, seed + 1)
        );
    }
}

#[test]
fn one_thread_serves_what_is_here_while_hundreds_of_reads_hang() {
    const MANY: u64 = 220;
    let _alone = needs_nas!();
    let mut world = World::new(Codec::Raw);
    let object = warm_and_cold(&mut world);
    world.mount(|options| {
        (options.threads, options.passthrough) = (1, false);
        options.cache.as_mut().unwrap().patience = Duration::from_secs(5);
    });
    work(&world);
    let cold = File::open(world.site("demo/cold", "cold.bin")).unwrap();
    // Each for itself.
    posix_fadvise(cold.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM).unwrap();
    let reads = |world: &World| stats(world.root()).unwrap().requests["READ"];
    let read = |n: u64| {
        let mut part = vec![0; 4096];
        cold.read_exact_at(&mut part, n * 32_768).map(|()| part)
    };
    world.nas.command("hang");
    let before = reads(&world);
    let (ended, served) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let hung: Vec<_> = (0..MANY).map(|n| scope.spawn(move || errno(read(n)))).collect();
        until("all have asked", || reads(&world) >= before + MANY);
        let workers: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    while !ended.load(Ordering::Relaxed) {
                        work(&world);
                        served.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        until("all of them were served meanwhile", || served.load(Ordering::Relaxed) >= 16);
        let all_hang = hung.iter().all(|thread| !thread.is_finished());
        for thread in hung {
            assert_eq!(thread.join().unwrap(), Some(libc::EIO));
        }
        let so_far = served.load(Ordering::Relaxed);
        until("it goes on", || served.load(Ordering::Relaxed) >= so_far + 16);
        ended.store(true, Ordering::Relaxed);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        assert!(all_hang);
    });
    let told = logged(&object.digest);
    assert_eq!(told.len(), 1, "{told:#?}");
    assert!(told[0].contains("has not answered for 5 s"), "{told:?}");
    assert!(world.cache_stats().timeouts >= 100);

    world.nas.command("heal");
    let bytes = noise(COLD, 5);
    until("all is as before", || {
        (0..MANY).all(|n| read(n).is_ok_and(|part| part == bytes[n as usize * 32_768..][..4096]))
    });
    assert!(read_anew(&world.site("demo/cold", "cold.bin")).unwrap() == bytes);
    work(&world);
    assert_eq!(logged(&object.digest).len(), 1);
    drop(cold);
    world.unmount();
}

#[test]
fn a_nas_that_fails_fails_nothing_that_is_here_and_is_told_once() {
    let _alone = needs_nas!();
    let mut world = World::new(Codec::Zstd);
    let object = warm_and_cold(&mut world);
    world.mount(|options| options.passthrough = false);
    work(&world);
    // Its beginning, and so where the rest is.
    File::open(world.site("demo/cold", "cold.bin")).unwrap().read_exact_at(&mut [0; 10], 0).unwrap();
    world.nas.command("fail EIO");
    let failed = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                assert_eq!(errno(fs::read(world.site("demo/cold", "cold.bin"))), Some(libc::EIO));
                failed.fetch_add(1, Ordering::Relaxed);
            });
            scope.spawn(|| {
                while failed.load(Ordering::Relaxed) < 4 {
                    work(&world);
                }
            });
        }
    });
    let told = logged(&object.digest);
    assert_eq!(told.len(), 1, "{}", String::from_utf8_lossy(&log()));
    world.nas.command("heal");
    assert!(fs::read(world.site("demo/cold", "cold.bin")).unwrap() == *known(COLD, 5));
    world.unmount();
}

#[test]
fn stale_handles_and_short_answers_are_tried_again() {
    let _alone = needs_nas!();
    let mut world = World::new(Codec::Raw);
    world.fixture.publish("demo/a", world.fixture.packages());
    world.mount(|_| ());
    fs::metadata(world.site("demo/a", "alpha/data/big.bin")).unwrap();
    for (fault, name, seed) in [
        ("fail ESTALE blobs/ 2 on OPEN", "alpha", 100),
        ("fail ESTALE blobs/ 2 on READ", "beta", 200),
        ("truncate blobs/ 2", "gamma", 300),
    ] {
        let before = world.cache_stats().retries;
        world.nas.command(fault);
        assert!(fs::read(world.site("demo/a", &format!("{name}/data/big.bin"))).unwrap() == *known(700_000, seed));
        world.nas.command("heal");
        // The kernel asks again for what is short, and once after ESTALE.
        assert!(fault.starts_with("truncate") || world.cache_stats().retries > before, "{fault}");
    }
    assert_eq!(String::from_utf8_lossy(&log()).lines().filter(|line| line.contains("ERROR")).count(), 0);
    world.unmount();
}

#[test]
fn what_the_nas_has_wrong_is_an_error_that_names_it_and_never_served() {
    let _alone = needs_nas!();
    for codec in [Codec::Raw, Codec::Zstd] {
        let mut world = World::new(codec);
        let object = warm_and_cold(&mut world);
        let one = world.fixture.layer("one", vec![file(format!("{SITE}/one.bin"), noise(200_000, 6))]);
        world.fixture.publish("demo/one", vec![one]);
        log().clear();
        world.mount(|_| ());
        work(&world);
        let cold = world.site("demo/cold", "cold.bin");
        fs::metadata(&cold).unwrap();
        // Each answer comes with a flipped bit: all there is of one chunk, and some of a large file, are wrong.
        let one = world.site("demo/one", "one.bin");
        File::open(&one).unwrap();
        world.nas.command("flip blobs/");
        world.nas.command("flip packs/");
        let answers: Vec<_> = (0..4).map(|_| errno(fs::read(&one))).collect();
        assert_eq!(answers, [Some(libc::EIO); 4]);
        for _ in 0..4 {
            match fs::read(&cold) {
                Ok(bytes) => assert!(bytes == *known(COLD, 5)),
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EIO)),
            }
        }
        let told = String::from_utf8(log().clone()).unwrap();
        assert!(told.lines().any(|line| line.contains("does not have the bytes of its digest")), "{told}");
        work(&world);
        world.nas.command("heal");
        assert!(fs::read(&one).unwrap() == *known(200_000, 6) && fs::read(&cold).unwrap() == *known(COLD, 5));
        world.unmount();

        // The same on its disk.
        let behind = world.fixture.store.object_path(&object);
        let alter = || {
            let file = fs::OpenOptions::new().read(true).write(true).open(&behind).unwrap();
            let (middle, mut byte) = (file.metadata().unwrap().len() / 2, [0]);
            file.read_exact_at(&mut byte, middle).unwrap();
            file.write_all_at(&[byte[0] ^ 4], middle).unwrap();
        };
        alter();
        let dir = world.fixture.place("second");
        log().clear();
        world.mount(|options| options.cache = Some(cache::Options { keep_free: 0, ..cache::Options::at(dir) }));
        assert_eq!(errno(fs::read(&cold)), Some(libc::EIO));
        let told = logged(&object.digest);
        assert!(!told.is_empty() && told.len() <= 2, "{told:#?}");
        // All but the one chunk is served.
        let file = File::open(&cold).unwrap();
        let mut part = vec![0; 4096];
        file.read_exact_at(&mut part, 0).unwrap();
        file.read_exact_at(&mut part, COLD as u64 - 4096).unwrap();
        assert!(part == noise(COLD, 5)[COLD - 4096..]);
        let report = world.fixture.store.fsck(&|_, _| ()).unwrap();
        let found = report.findings.iter().filter(|finding| finding.object.contains(&object.digest.to_string()));
        assert!(found.count() > 0, "{report:#?}");
        alter();
        drop(file);
        until("it is well again", || read_anew(&cold).is_ok_and(|bytes| bytes == *known(COLD, 5)));
        world.unmount();
    }
}

#[test]
fn a_slow_nas_that_goes_on_answering_is_waited_for() {
    let _alone = needs_nas!();
    let world = World::new(Codec::Raw);
    let bytes = noise(10 << 20, 3);
    let digest = world.fixture.store.ensure_blob(&bytes).unwrap();
    let object = Object { room: Room::Blobs, digest, size: bytes.len() as u64 };
    let store = world.store();
    // All of it takes much longer than one answer may.
    let patience = Duration::from_secs(3);
    world.nas.command("set bandwidth 2MB/s");
    let options = |name| cache::Options { keep_free: 0, patience, ..cache::Options::at(world.fixture.place(name)) };
    let cache = Cache::open(options("chunks"), store.clone()).unwrap();
    assert!(cache.read(&object, || Ok(Chunks::of(&bytes)), 0, object.size).unwrap() == bytes);
    assert_eq!((cache.stats().timeouts, cache.stats().retries), (0, 0));
    drop(cache);
    // Nor does a document, which comes whole.
    let other = noise(10 << 20, 4);
    let digest = world.fixture.store.ensure_blob(&other).unwrap();
    let cache = Cache::open(options("document"), store).unwrap();
    assert!(cache.document(&Object { digest, ..object }).unwrap() == other);
    assert_eq!((cache.stats().timeouts, cache.stats().retries), (0, 0));
}

/// A file system of its own for a cache, in memory.
struct Disk(PathBuf);

impl Disk {
    fn new(at: PathBuf, bytes: u64) -> Disk {
        let options = format!("size={bytes}");
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), &at, Some("tmpfs"), flags, Some(options.as_str())).unwrap();
        Disk(at)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_makes_room_and_a_disk_that_takes_nothing_keeps_nobody_from_reading() {
    let _alone = needs_nas!();
    let mut world = World::new(Codec::Raw);
    let layers: Vec<_> = (0..12u64)
        .map(|n| world.fixture.layer(&format!("p{n}"), vec![file(format!("{SITE}/p{n}.bin"), noise(1_000_000, n + 1))]))
        .collect();
    world.fixture.publish("demo/a", layers);
    let all = |world: &World| {
        thread::scope(|scope| {
            for reader in 0..4 {
                scope.spawn(move || {
                    for n in (0..12u64).map(|n| (n + reader * 3) % 12) {
                        let read = read_anew(&world.site("demo/a", &format!("p{n}.bin"))).unwrap();
                        assert!(read == *known(1_000_000, n + 1));
                    }
                });
            }
        });
    };
    const SIZE: u64 = 5 << 20;
    for keep_free in [0, 1 << 20] {
        let disk = Disk::new(world.fixture.place(&format!("disk{keep_free}")), SIZE);
        let dir = disk.0.join("cache");
        world.mount(|options| {
            options.cache = Some(cache::Options { keep_free, ..cache::Options::at(&dir) });
            options.passthrough = false;
        });
        all(&world);
        all(&world);
        let stats = world.cache_stats();
        assert!(stats.evictions > 0 && stats.held <= SIZE - keep_free, "{stats:#?}");
        // Somebody else fills the disk: what is kept goes, and reads go on.
        let filler = disk.0.join("filler");
        let _ = fs::write(&filler, vec![1; SIZE as usize]);
        all(&world);
        fs::remove_file(&filler).unwrap();
        let before = world.cache_stats();
        all(&world);
        assert!(world.cache_stats().held >= 1_000_000, "it keeps again: {before:#?}");
        // It can only be read from now on.
        let flags = nix::mount::MsFlags::MS_REMOUNT | nix::mount::MsFlags::MS_RDONLY;
        match nix::mount::mount(None::<&str>, &disk.0, None::<&str>, flags, None::<&str>) {
            // Not while files are open for writing.
            Err(nix::Error::EBUSY) => {}
            other => other.unwrap(),
        }
        all(&world);
        world.unmount();
    }
}

#[test]
fn a_mount_leaves_no_cache_behind_that_was_not_asked_for() {
    let _alone = needs_nas!();
    let mut world = World::new(Codec::Raw);
    world.fixture.publish("demo/a", world.fixture.packages());
    world.mount(|options| options.cache = None);
    let dir = PathBuf::from(world.cache_stats().dir);
    assert!(fs::read(world.site("demo/a", "beta/data/big.bin")).unwrap() == *known(700_000, 200));
    assert!(dir.join("blobs").exists());
    world.unmount();
    until("it is gone", || !dir.exists());
    let left = mount::mounts().unwrap();
    assert!(left.iter().all(|mount| !mount.mount_point.starts_with(world.fixture.dir.path())));
}
