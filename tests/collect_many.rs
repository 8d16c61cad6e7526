//! Publish and collect: creators, collectors and readers of one store at once, as threads and as processes that are
//! killed, with faults at every step, against a model of what must be there.
//!
//! A case is a number, from which everything follows but the order in which threads and processes run. Its rounds begin
//! and end with nobody at work; between them time passes, for all files at once, so that nothing depends on how fast
//! this machine is. Some creators have prepared a version in one round and publish it in a later one, when what they
//! wanted to reuse may be gone.
//!
//! With `ENVFABRIC_NAS=300ms` threads and processes reach the store through two simulated NAS clients, each of which
//! remembers names, misses, attributes and listings for so long, as machines of a fleet do.
//!
//! `ENVFABRIC_ROUNDS=200 cargo test --test collect_many` runs so many cases; cases that failed once are kept in
//! `tests/collect_many.seeds` and run first.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod nas_client;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{SITE, file, meta, noise};
use envfabric::environment::{Builder, Digest, Document, EnvName, InterpreterRef, Source, VERSION_FORMAT, Version};
use envfabric::error::{Error, Kind, Result};
use envfabric::store::disk::{self, Op, Verdict, Watch};
use envfabric::store::{
    GcOptions, Index, Keep, LayerKind, LayerWriter, Lease, Leased, Object, ObjectFile, Room, Severity, Store,
    documents, now,
};
use nas_client::Nas;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

const CREATORS: usize = 16;
const COLLECTORS: usize = 4;
const READERS: usize = 8;
/// Different layers.
const LAYERS: u64 = 60;
/// Environments; those that begin with `kept` are never removed.
const NAMES: [&str; 4] = ["kept/a", "kept/b", "loose/c", "loose/d"];
/// How many versions collectors keep, in cases where they do not keep all.
const NEWEST: usize = 3;
const GRACE: Duration = Duration::from_secs(3600);

#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

thread_local! {
    /// Decides what goes wrong on this thread; 0: nothing.
    static FAULTS: Cell<u64> = const { Cell::new(0) };
}

/// Lets operations of some threads fail.
struct Faults {
    made: AtomicU64,
}

impl Watch for Faults {
    fn before(&self, op: &Op) -> Verdict {
        let seed = FAULTS.get();
        if seed == 0 {
            return Verdict::Do;
        }
        let mut random = Random(seed);
        let verdict = match random.below(40) {
            0 => Verdict::Fail([libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::ESTALE][random.below(4) as usize]),
            1 => Verdict::DoAndFail([libc::EIO, libc::ESTALE, libc::EEXIST][random.below(3) as usize]),
            2 if matches!(op, Op::Sync(_) | Op::SyncDir(_)) => Verdict::Pretend,
            2 if matches!(op, Op::Write(..)) => Verdict::Short,
            _ => Verdict::Do,
        };
        FAULTS.set(random.next());
        if verdict != Verdict::Do {
            self.made.fetch_add(1, Ordering::Relaxed);
        }
        verdict
    }

    fn done(&self, _: &Op) {}
}

/// Kills this process at an operation.
struct Killer {
    left: AtomicU64,
    afterwards: bool,
}

impl Killer {
    fn count(&self) {
        if self.left.fetch_sub(1, Ordering::SeqCst) == 0 {
            let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

impl Watch for Killer {
    fn before(&self, _: &Op) -> Verdict {
        if !self.afterwards {
            self.count();
        }
        Verdict::Do
    }

    fn done(&self, _: &Op) {
        if self.afterwards {
            self.count();
        }
    }
}

/// What an actor works with.
struct World {
    /// Where other processes see the same directory.
    elsewhere: PathBuf,
    /// Where it is looked at without a cache.
    backing: PathBuf,
    store: Store,
    keep: Keep,
}

/// A version that is ready to be published.
struct Prepared {
    draft: Version,
    wanted: Vec<u64>,
    bundles: BTreeSet<Object>,
}

fn is_collected(error: &Error) -> bool {
    error.kind() == Kind::Collected
}

impl World {
    fn open(dir: &Path, keep: Keep) -> World {
        let store = Store::open(&dir.join("store")).unwrap();
        let dir = dir.to_path_buf();
        World { elsewhere: dir.clone(), backing: dir, store, keep }
    }

    /// Layer `n`: 0 is an interpreter, 1 a scaffold.
    fn build(&self, n: u64) -> Result<Digest> {
        let name = format!("layer{n}");
        let kind = match n {
            0 => LayerKind::Interpreter,
            1 => LayerKind::Scaffold,
            _ => LayerKind::Wheel,
        };
        let files = vec![
            file(format!("{SITE}/{name}.py"), format!("# {name}\n")),
            // Shared by neighbours, so that layers have blobs in common.
            file(format!("{SITE}/{name}.so"), noise(140_000, n / 2)),
        ];
        let layer = LayerWriter::new(&self.store).write(meta(&name, kind), files)?.digest;
        self.store.publish_key(&key(n), &layer)
    }

    fn layers(&self, index: &Index, wanted: &[u64]) -> Result<Vec<Digest>> {
        wanted
            .iter()
            .map(|n| match index.layer_of_key(&self.store, &key(*n))? {
                Some(layer) => Ok(layer),
                None => self.build(*n),
            })
            .collect()
    }

    fn prepare(&self, index: &Index, random: &mut Random) -> Result<Prepared> {
        let name = NAMES[random.below(NAMES.len() as u64) as usize];
        let mut wanted = vec![0, 1];
        // Some are wanted by most, and others by hardly anybody.
        let most = if random.one_in(2) { 6 } else { LAYERS };
        wanted.extend((0..1 + random.below(3)).map(|_| 2 + random.below(most)));
        wanted.dedup();
        let all = self.layers(index, &wanted)?;
        let text = format!("lock {}", random.below(5));
        let lock = Document {
            name: "pylock.toml".into(),
            blob: self.store.ensure_blob(text.as_bytes())?,
            size: text.len() as u64,
        };
        let summaries = self.store.ensure_summaries(index, &all, false)?;
        let docs = index.layers(&self.store, &all)?;
        let draft = Version {
            format: VERSION_FORMAT,
            environment: name.parse()?,
            number: 0,
            created: now(),
            interpreter: InterpreterRef { layer: all[0], version: "3.11.7".into(), executable: "bin/python".into() },
            scaffold: all[1],
            layers: all[2..].to_vec(),
            summaries,
            lock: Some(lock),
            pyproject: None,
            source: Source::Requirements { requirements: vec![], files: vec![] },
            builder: Builder { envfabric: "0".into(), uv: None, host: "h".into() },
            conflicts: vec![],
            nonce: String::new(),
        };
        let bundles = docs.iter().filter_map(|doc| Some(doc.bundle?.object())).collect();
        Ok(Prepared { draft, wanted, bundles })
    }

    /// As `create` ends: what is gone is built again; then the version is published, and looked at once more.
    fn publish(&self, index: &Index, prepared: Prepared) -> Result<()> {
        let Prepared { mut draft, wanted, mut bundles } = prepared;
        for _ in 0..3 {
            match self.store.require_whole(&draft, &bundles) {
                Err(error) if is_collected(&error) => {
                    let all = wanted.iter().map(|n| self.build(*n)).collect::<Result<Vec<_>>>()?;
                    draft.summaries = self.store.ensure_summaries(index, &all, false)?;
                    let docs = index.layers(&self.store, &all)?;
                    bundles = docs.iter().filter_map(|doc| Some(doc.bundle?.object())).collect();
                    for n in 0..5 {
                        self.store.ensure_blob(format!("lock {n}").as_bytes())?;
                    }
                }
                other => {
                    other?;
                    break;
                }
            }
        }
        let claimed = self.store.publish_version_if(draft, |draft| self.store.require_whole(draft, &bundles))?;
        let version = claimed.version();
        self.log(&format!("{} {} {}", version.environment, version.number, version.nonce));
        Ok(())
    }

    fn create(&self, index: &Index, random: &mut Random) -> Result<()> {
        let prepared = self.prepare(index, random)?;
        self.publish(index, prepared)
    }

    /// Notes what this process was told that it has published.
    fn log(&self, line: &str) {
        let mut log = OpenOptions::new().append(true).create(true).open(self.backing.join("log")).unwrap();
        log.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    fn switch(&self, random: &mut Random) -> Result<()> {
        let name: EnvName = NAMES[random.below(NAMES.len() as u64) as usize].parse()?;
        let numbers = self.store.version_numbers(&name)?;
        let ended = match random.below(3) {
            0 if name.workflow() == "loose" => self.store.remove(&name),
            1 if name.workflow() == "loose" => self.store.undo_remove(&name),
            _ if numbers.is_empty() => return Ok(()),
            _ => self.store.rollback(&name, numbers[random.below(numbers.len() as u64) as usize]),
        };
        match ended {
            // Removed, brought back or collected by somebody else.
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Invalid) => Ok(()),
            other => other.map(drop),
        }
    }

    fn collect(&self) -> Result<()> {
        let options = GcOptions { grace: GRACE, keep: self.keep, dry_run: false };
        self.store.gc(&options, &|_| {}).map(drop)
    }

    /// Reads every byte of a current version.
    fn read(&self, random: &mut Random, existing: &BTreeSet<EnvName>) -> Result<()> {
        let name: EnvName = NAMES[random.below(NAMES.len() as u64) as usize].parse()?;
        let store = &self.store;
        let version = match store.current(&name) {
            Err(error) if error.is_not_found() && (name.workflow() == "loose" || !existing.contains(&name)) => {
                return Ok(());
            }
            other => other?,
        };
        let label = format!("{name}@{}", version.number);
        let whole = || -> Result<()> {
            for layer in version.layers.iter().chain([&version.interpreter.layer, &version.scaffold]) {
                let doc = store.layer(layer)?;
                store.catalog_of(&doc)?.verify()?;
                let mut objects = vec![doc.catalog_object()];
                objects.extend(doc.pack_object());
                objects.extend(doc.blobs.iter().map(|digest| Object {
                    room: Room::Blobs,
                    digest: *digest,
                    size: 140_000,
                }));
                for object in objects {
                    if ObjectFile::open(store, &object)?.hash()? != object.digest {
                        return Err(Error::new(Kind::Corrupt, format!("{} has other bytes", object.label())));
                    }
                }
            }
            for summary in &version.summaries {
                let bundles = documents(&store.read_blob(&summary.blob)?)?;
                for bundle in bundles.iter().filter_map(|doc| doc.bundle) {
                    ObjectFile::open(store, &bundle.object())?.hash()?;
                }
            }
            version.lock.iter().try_for_each(|lock| store.read_blob(&lock.blob).map(drop))
        };
        whole().map_err(|error| error.context(format!("{label} was seen in part")))
    }
}

fn key(n: u64) -> Digest {
    Digest::of(format!("key {n}").as_bytes())
}

/// An actor in a process of its own, told by its environment what to do; otherwise no test.
#[test]
fn child() {
    let Ok(role) = std::env::var("TEST_ROLE") else { return };
    let number = |name: &str| std::env::var(name).unwrap().parse::<u64>().unwrap();
    let keep = if number("TEST_KEEP") == 0 { Keep::All } else { Keep::Newest(NEWEST) };
    let world = World::open(Path::new(&std::env::var("TEST_DIR").unwrap()), keep);
    let world = World { backing: std::env::var("TEST_BACKING").unwrap().into(), ..world };
    let mut random = Random::new(number("TEST_SEED"));
    let killer = Killer { left: AtomicU64::new(number("TEST_LEFT")), afterwards: random.one_in(2) };
    let _watching = disk::watch(world.store.root(), Arc::new(killer));
    let index = Index::in_memory().unwrap();
    loop {
        match role.as_str() {
            "create" => world.create(&index, &mut random).unwrap(),
            "switch" => world.switch(&mut random).unwrap(),
            _ => world.collect().unwrap(),
        }
    }
}

fn start(world: &World, role: &str, random: &mut Random) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture"]).env("TEST_ROLE", role).env("TEST_DIR", &world.elsewhere);
    command.env("TEST_BACKING", &world.backing);
    command.env("TEST_SEED", random.next().to_string()).env("TEST_LEFT", random.below(60).to_string());
    command.env("TEST_KEEP", if world.keep == Keep::All { "0" } else { "1" });
    command.stdout(std::process::Stdio::null()).spawn().unwrap()
}

/// Makes everything in `dir` older by `time`.
fn pass(dir: &Path, time: Duration) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() {
            pass(&entry.path(), time);
        } else {
            let file = File::open(entry.path()).unwrap();
            file.set_modified(file.metadata().unwrap().modified().unwrap() - time).unwrap();
        }
    }
}

/// Lets `time` pass for a store that nobody works with.
fn pass_all(store: &Store, time: Duration) {
    pass(store.root(), time);
    let trash = store.root().join("trash");
    for entry in fs::read_dir(&trash).into_iter().flatten().flatten() {
        let name = entry.file_name().into_string().unwrap();
        let (seconds, rest) = name.split_once('-').unwrap();
        let earlier = seconds.parse::<u64>().unwrap() - time.as_secs();
        fs::rename(entry.path(), trash.join(format!("{earlier}-{rest}"))).unwrap();
    }
}

/// What must be there.
#[derive(Default)]
struct Model {
    /// Every number that was ever seen, with the nonce of whoever has it.
    numbers: BTreeMap<(EnvName, u64), String>,
    /// Published, as their creators were told.
    told: BTreeSet<(EnvName, u64)>,
    leased: BTreeSet<(EnvName, u64)>,
    /// Collectors may remember what was there before something was published, and retire by that: then the trash has it
    /// until the next one.
    is_distant: bool,
}

impl Model {
    fn see(&mut self, name: &EnvName, number: u64, nonce: &str) {
        let known = self.numbers.entry((name.clone(), number)).or_insert_with(|| nonce.to_string());
        assert_eq!(known, nonce, "{name}@{number} was used twice");
    }

    fn there(&self, store: &Store, name: &EnvName) -> Vec<u64> {
        match self.is_distant {
            true => (1..500).filter(|number| store.version(name, *number).is_ok()).collect(),
            false => store.version_numbers(name).unwrap(),
        }
    }

    /// Looks at a store that nobody works with.
    fn check(&mut self, world: &World) {
        let store = &world.store;
        for line in fs::read_to_string(world.backing.join("log")).unwrap_or_default().lines() {
            let parts: Vec<&str> = line.split(' ').collect();
            let (name, number): (EnvName, u64) = (parts[0].parse().unwrap(), parts[1].parse().unwrap());
            self.see(&name, number, parts[2]);
            self.told.insert((name, number));
        }
        for name in NAMES.map(|name| name.parse::<EnvName>().unwrap()) {
            let there = self.there(store, &name);
            for number in &there {
                self.see(&name, *number, &store.version(&name, *number).unwrap().nonce);
            }
            if let Some(current) = store.pointer(&name).unwrap().and_then(|pointer| pointer.version) {
                assert!(there.contains(&current), "{name} is at {current}, and has {there:?}");
            }
            let told = self.told.iter().filter(|(other, _)| *other == name).map(|(_, number)| *number);
            let told: Vec<u64> = told.collect();
            let ever: Vec<u64> = self.numbers.keys().filter(|(other, _)| *other == name).map(|(_, n)| *n).collect();
            if name.workflow() == "kept" {
                // The current one counts, and may be any.
                let newest = if world.keep == Keep::All { usize::MAX } else { NEWEST - 1 };
                let oldest_kept = ever.iter().rev().take(newest).next_back().copied().unwrap_or(0);
                for number in told.iter().filter(|number| **number >= oldest_kept) {
                    assert!(there.contains(number), "{name}@{number} was lost: {there:?} of {ever:?}");
                }
                assert!(told.is_empty() || store.current(&name).is_ok(), "{name} was lost");
            }
        }
        for (name, number) in &self.leased {
            assert!(self.there(store, name).contains(number), "{name}@{number} was leased");
        }
        let report = store.fsck(&|_, _| {}).unwrap();
        let broken = report.findings.iter().filter(|f| f.severity == Severity::Error).collect::<Vec<_>>();
        assert!(broken.is_empty(), "{broken:#?}");
    }
}

fn run(seed: u64) {
    let mut random = Random::new(seed);
    let shared = Path::new("/dev/shm");
    let dir = if shared.is_dir() { tempfile::tempdir_in(shared) } else { tempfile::tempdir() }.unwrap();
    Store::init(&dir.path().join("store")).unwrap();
    let keep = if random.one_in(2) { Keep::All } else { Keep::Newest(NEWEST) };
    let nas: Vec<Nas> = match std::env::var("ENVFABRIC_NAS") {
        Ok(attr_ttl) => {
            let options = nas_client::Options { attr_ttl, ..nas_client::Options::default() };
            (0..2).map(|_| Nas::start(dir.path(), &options)).collect()
        }
        Err(_) => vec![],
    };
    let seen = |n: usize| nas.get(n).map_or_else(|| dir.path().to_path_buf(), |nas| nas.mount().to_path_buf());
    let world = World { elsewhere: seen(1), backing: dir.path().to_path_buf(), ..World::open(&seen(0), keep) };
    let truth = World::open(dir.path(), keep);
    let faults = Arc::new(Faults { made: AtomicU64::new(0) });
    let _watching = disk::watch(world.store.root(), faults.clone());
    let mut model = Model { is_distant: !nas.is_empty(), ..Model::default() };
    let mut waiting: Vec<Prepared> = Vec::new();
    let (mut kills, mut started) = (0, 0);
    for _ in 0..4 + random.below(4) {
        let told: Vec<(EnvName, u64)> = model.told.iter().cloned().collect();
        let existing: BTreeSet<EnvName> = told.iter().map(|(name, _)| name.clone()).collect();
        // A mount that shows some versions.
        let there: Vec<&(EnvName, u64)> =
            told.iter().filter(|(name, n)| truth.store.version_numbers(name).unwrap().contains(n)).collect();
        let shown = (0..there.len().min(3)).map(|_| there[random.below(there.len() as u64) as usize].clone());
        model.leased = shown.collect();
        let mut lease = Lease::new(world.store.clone(), "a test");
        let leased = |(environment, version): (EnvName, u64)| Leased { environment, version };
        lease.protect(model.leased.iter().cloned().map(leased).collect()).unwrap();

        let roles = ["create", "create", "create", "switch", "collect"];
        let mut children: Vec<Child> = roles.iter().map(|role| start(&world, role, &mut random)).collect();
        let working = AtomicBool::new(true);
        let next = Mutex::new(Vec::new());
        let seeds: Vec<u64> = (0..CREATORS + COLLECTORS + READERS).map(|_| random.next() | 1).collect();
        // Each sleeps for a few rounds, or for as long as it takes until somebody publishes it.
        let (late, asleep): (Vec<_>, Vec<_>) = std::mem::take(&mut waiting).into_iter().partition(|_| random.one_in(3));
        let late = Mutex::new(late);
        waiting = asleep;
        std::thread::scope(|scope| {
            let mut writers = Vec::new();
            let is_distant = !nas.is_empty();
            let (world, next, late, existing, working) = (&world, &next, &late, &existing, &working);
            for (n, seed) in seeds.iter().copied().enumerate() {
                let mut random = Random::new(seed);
                if n >= CREATORS + COLLECTORS {
                    scope.spawn(move || {
                        while working.load(Ordering::Relaxed) {
                            let again = random.clone();
                            let mut read = world.read(&mut random, existing);
                            // What is remembered of the trash may be old, and what was just taken not yet seen there.
                            let begun = Instant::now();
                            while is_distant && read.is_err() && begun.elapsed() < Duration::from_secs(5) {
                                read = world.read(&mut again.clone(), existing);
                            }
                            read.unwrap();
                        }
                    });
                    continue;
                }
                writers.push(scope.spawn(move || {
                    let faulty = random.one_in(3);
                    FAULTS.set(if faulty { seed } else { 0 });
                    let index = Index::in_memory().unwrap();
                    let done = match n < CREATORS {
                        false => world.collect().and_then(|()| world.collect()),
                        true if random.one_in(4) => world.switch(&mut random).and_then(|()| world.switch(&mut random)),
                        true if random.one_in(3) => {
                            let prepared = world.prepare(&index, &mut random);
                            prepared.map(|prepared| next.lock().unwrap().push(prepared))
                        }
                        true => match late.lock().unwrap().pop() {
                            Some(prepared) => world.publish(&index, prepared),
                            None => world.create(&index, &mut random).and_then(|()| world.create(&index, &mut random)),
                        },
                    };
                    // Who meets no fault does not fail, whatever others do.
                    assert!(faulty || done.is_ok(), "{:?}", done.err());
                }));
            }
            let ended: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
            started += children.len() as u64;
            for child in &mut children {
                let status = child.wait().unwrap();
                kills += u64::from(std::os::unix::process::ExitStatusExt::signal(&status) == Some(libc::SIGKILL));
            }
            working.store(false, Ordering::Relaxed);
            ended.into_iter().for_each(|ended| ended.unwrap());
            waiting.extend(std::mem::take(&mut *late.lock().unwrap()));
        });
        waiting.extend(next.into_inner().unwrap());
        model.check(&truth);
        drop(lease);
        pass_all(&truth.store, Duration::from_secs(60 * [0, 40, 70, 200, 200][random.below(5) as usize]));
    }
    assert_eq!(kills, started, "every process was killed, and none failed");
    // In the end only what is needed is there.
    model.leased.clear();
    model.is_distant = false;
    truth.collect().unwrap();
    for _ in 0..8 {
        truth.collect().unwrap();
        model.check(&truth);
        pass_all(&truth.store, GRACE * 2);
    }
    truth.collect().unwrap();
    let left =
        Command::new("find").arg(truth.store.root().join("trash")).args(["-printf", "%P %T+\n"]).output().unwrap();
    let left = String::from_utf8(left.stdout).unwrap();
    assert_eq!(left.lines().count(), 1, "{left}");
    assert_eq!(fs::read_dir(truth.store.tmp()).unwrap().count(), 0);
    model.check(&truth);
    TOTALS[0].fetch_add(kills, Ordering::Relaxed);
    TOTALS[1].fetch_add(faults.made.load(Ordering::Relaxed), Ordering::Relaxed);
    TOTALS[2].fetch_add(model.numbers.len() as u64, Ordering::Relaxed);
}

/// Kills, faults, versions.
static TOTALS: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

#[test]
fn whatever_creators_collectors_and_readers_do_at_once_nothing_is_lost() {
    if std::env::var("TEST_ROLE").is_ok() {
        return;
    }
    let cases = std::env::var("ENVFABRIC_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(4);
    let config = ProptestConfig {
        cases,
        max_shrink_iters: 0,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct("tests/collect_many.seeds"))),
        ..ProptestConfig::default()
    };
    proptest!(config, |(seed in any::<u64>())| run(seed));
    let [kills, faults, versions] = TOTALS.each_ref().map(|total| total.load(Ordering::Relaxed));
    println!("{cases} cases: {versions} versions, {kills} kills, {faults} faults");
    assert!(kills > 0 && faults > 0 && versions > 0);
}
