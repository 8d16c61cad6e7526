//! The agreement of creators, collectors and readers (`src/store/gc.rs`), as a small model whose threads are scheduled in
//! every order that a search comes upon.
//!
//! One layer document names one object. A creator reuses it and publishes a version; collectors, which may be killed
//! at any step, take what is old and not needed; time passes in between. Each lock of the disk is one call to a server.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use shuttle::Runner;
use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::PctScheduler;
use shuttle::sync::atomic::{AtomicBool, Ordering};
use shuttle::sync::{Arc, Mutex};
use shuttle::thread;

const GRACE: u32 = 2;
/// Orders that are looked at.
const RUNS: usize = 20_000;
const SEED: u64 = 7;
/// As often as `Store::bring_back` does.
const LOOKS: usize = 4;

const DOC: usize = 0;
const OBJECT: usize = 1;

/// A file: its time where it is in its place, and where it lies in the trash, since when.
#[derive(Debug, Clone, Default)]
struct File {
    place: Option<u32>,
    trash: Vec<(u32, u32)>,
}

#[derive(Debug, Default)]
struct Disk {
    clock: u32,
    generations: u32,
    files: [File; 2],
    version: bool,
}

/// What is left out of the agreement, to see that the model notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Without {
    Nothing,
    CreatorsLook,
    CollectorsLook,
    ReadersTrash,
    DocumentsHold,
    Generations,
}

#[derive(Clone)]
struct World {
    disk: Arc<Mutex<Disk>>,
    without: Without,
}

impl World {
    fn in_place(&self, file: usize) -> bool {
        self.disk.lock().unwrap().files[file].place.is_some()
    }

    fn lies_in(&self, file: usize) -> Vec<u32> {
        self.disk.lock().unwrap().files[file].trash.iter().map(|(generation, _)| *generation).collect()
    }

    fn clock(&self) -> u32 {
        self.disk.lock().unwrap().clock
    }

    /// A reader: in its place, else in the trash.
    fn finds(&self, file: usize) -> bool {
        for _ in 0..LOOKS {
            if self.in_place(file) {
                return true;
            }
            if self.without == Without::ReadersTrash {
                return false;
            }
            for generation in self.lies_in(file) {
                if self.lies_in(file).contains(&generation) {
                    return true;
                }
            }
        }
        false
    }

    fn bring_back(&self, file: usize) -> bool {
        self.bring_back_since(file, u32::MAX).unwrap_or(false)
    }

    /// None when it was `looked` for the grace time ago: what is assumed is that nobody sleeps so long just here.
    fn bring_back_since(&self, file: usize, looked: u32) -> Option<bool> {
        for _ in 0..LOOKS {
            if self.in_place(file) {
                return Some(true);
            }
            for generation in self.lies_in(file) {
                let linked = {
                    let mut disk = self.disk.lock().unwrap();
                    let clock = disk.clock;
                    if clock.saturating_sub(looked) >= GRACE {
                        return None;
                    }
                    let file = &mut disk.files[file];
                    let there = file.trash.iter().any(|(other, _)| *other == generation);
                    if there && file.place.is_none() {
                        file.place = Some(clock);
                    }
                    there
                };
                if linked {
                    self.unlink(file, generation);
                    return Some(true);
                }
            }
        }
        Some(false)
    }

    fn unlink(&self, file: usize, generation: u32) {
        let any = self.without == Without::Generations;
        self.disk.lock().unwrap().files[file].trash.retain(|(other, _)| !any && *other != generation);
    }

    fn write(&self, file: usize) {
        let mut disk = self.disk.lock().unwrap();
        let clock = disk.clock;
        disk.files[file].place.get_or_insert(clock);
    }

    /// `Store::has_layer`.
    fn has_layer(&self) -> bool {
        if self.in_place(DOC) {
            return true;
        }
        loop {
            let looked = self.clock();
            if !self.bring_back(OBJECT) {
                return false;
            }
            if let Some(back) = self.bring_back_since(DOC, looked) {
                return back && self.bring_back(OBJECT);
            }
        }
    }

    /// `LayerWriter::write`.
    fn build(&self) {
        loop {
            let looked = self.clock();
            if !self.bring_back(OBJECT) {
                self.write(OBJECT);
            }
            {
                let mut disk = self.disk.lock().unwrap();
                let clock = disk.clock;
                if clock - looked >= GRACE {
                    continue;
                }
                disk.files[DOC].place.get_or_insert(clock);
            }
            if self.has_layer() && self.bring_back(OBJECT) {
                return;
            }
        }
    }

    fn create(&self, may_touch: bool, may_oversleep: bool) {
        loop {
            let looked = self.clock();
            match self.has_layer() {
                // Of another user, perhaps: then it stays as old as it is.
                true if may_touch => {
                    let mut disk = self.disk.lock().unwrap();
                    let clock = disk.clock;
                    disk.files[DOC].place.iter_mut().for_each(|time| *time = clock);
                }
                true => {}
                false => self.build(),
            }
            let mut disk = self.disk.lock().unwrap();
            if disk.clock - looked < GRACE || may_oversleep {
                disk.version = true;
                break;
            }
        }
        if self.without != Without::CreatorsLook && !self.has_layer() {
            self.build();
        }
    }

    fn collect(&self, may_be_killed: bool) {
        let killed = || may_be_killed && thread_rng().gen_range(0..12) == 0;
        // Before the trash is listed: what moves there in between is seen in one of the two.
        let standing = self.in_place(DOC);
        let (now, generation, old) = {
            let mut disk = self.disk.lock().unwrap();
            disk.generations += 1;
            let old = [DOC, OBJECT].map(|file| disk.files[file].trash.clone());
            (disk.clock, disk.generations, old)
        };
        let is_old = |time: u32| now - time.min(now) >= GRACE;
        // A creator may have seen the document, and looks for no object then.
        let held = standing || old[DOC].iter().any(|(_, since)| !is_old(*since));
        let held = held && self.without != Without::DocumentsHold;
        let needed = || {
            let disk = self.disk.lock().unwrap();
            disk.version || disk.files[DOC].place.is_some_and(|time| !is_old(time))
        };
        let mut before = needed();
        for file in [DOC, OBJECT] {
            if before || killed() {
                break;
            }
            match self.disk.lock().unwrap().files[file].place {
                None => continue,
                // A young document keeps what it names; a young object only itself.
                Some(time) if !is_old(time) => {
                    before |= file == DOC;
                    continue;
                }
                Some(_) => {}
            }
            let mut disk = self.disk.lock().unwrap();
            let clock = disk.clock;
            if disk.files[file].place.take().is_some() {
                disk.files[file].trash.push((generation, clock));
            }
        }
        if killed() {
            return;
        }
        let after = self.without != Without::CollectorsLook && needed();
        if after && self.bring_back(OBJECT) && !killed() {
            self.bring_back(DOC);
        }
        for file in [DOC, OBJECT] {
            for (generation, since) in &old[file] {
                let held = held && file == OBJECT;
                if !before && !after && !held && is_old(*since) && !killed() {
                    self.unlink(file, *generation);
                }
            }
        }
    }
}

/// Who may sleep for the grace time between looking for a layer and publishing a version of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Creators {
    Awake,
    /// What they publish may lack something until they have looked again: nobody reads it before.
    Oversleep,
}

fn scenario(creators: Creators, without: Without) {
    let world = World { disk: Arc::default(), without };
    {
        let mut disk = world.disk.lock().unwrap();
        disk.clock = 10;
        disk.generations = 1;
        // Old and in its place, or in the trash for a while, or one of each, as killed collectors leave it.
        for file in 0..2 {
            match thread_rng().gen_range(0..4) {
                0 => disk.files[file].trash.push((1, thread_rng().gen_range(5..11))),
                _ => disk.files[file].place = Some(thread_rng().gen_range(5..9)),
            }
        }
    }
    let ended = Arc::new(AtomicBool::new(false));
    let mut threads = Vec::new();
    for _ in 0..2 {
        let world = world.clone();
        threads.push(thread::spawn(move || (0..2).for_each(|_| world.collect(true))));
    }
    let all: &[bool] = if creators == Creators::Awake { &[true, false] } else { &[false] };
    for may_touch in all.iter().copied() {
        let world = world.clone();
        threads.push(thread::spawn(move || world.create(may_touch, creators == Creators::Oversleep)));
    }
    let passing = world.clone();
    threads.push(thread::spawn(move || {
        for _ in 0..6 {
            thread::yield_now();
            passing.disk.lock().unwrap().clock += 1;
        }
    }));
    let (reading, reads_ended) = (world.clone(), ended.clone());
    let reader = thread::spawn(move || {
        while !reads_ended.load(Ordering::SeqCst) {
            let version = reading.disk.lock().unwrap().version;
            if version && creators == Creators::Awake {
                assert!(reading.finds(DOC) && reading.finds(OBJECT), "a reader saw half a version: {:?}", reading.disk);
            }
            thread::yield_now();
        }
    });
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    ended.store(true, Ordering::SeqCst);
    reader.join().unwrap();
    assert!(world.finds(DOC) && world.finds(OBJECT), "a version lost something: {:?}", world.disk);
    world.disk.lock().unwrap().clock += GRACE * 2;
    (0..2).for_each(|_| world.collect(false));
    assert!(world.in_place(DOC) && world.in_place(OBJECT), "something did not come back: {:?}", world.disk);
}

/// Looks at the same orders each time; at `ENVFABRIC_SCHEDULES` others where that is set.
#[test]
fn the_agreement_of_creators_collectors_and_readers_loses_nothing_in_any_order() {
    let others: Option<usize> = std::env::var("ENVFABRIC_SCHEDULES").ok().and_then(|n| n.parse().ok());
    for creators in [Creators::Awake, Creators::Oversleep] {
        let run = move || scenario(creators, Without::Nothing);
        match others {
            Some(runs) => {
                shuttle::check_random(run, runs);
                shuttle::check_pct(run, runs, 3);
            }
            None => {
                shuttle::check_random_with_seed(run, SEED, RUNS);
                Runner::new(PctScheduler::new_from_seed(SEED, 3, RUNS), Default::default()).run(run);
            }
        }
    }
}

#[test]
fn every_part_of_the_agreement_is_needed() {
    let all = [
        (Creators::Oversleep, Without::CreatorsLook),
        (Creators::Awake, Without::CollectorsLook),
        (Creators::Awake, Without::ReadersTrash),
        (Creators::Awake, Without::DocumentsHold),
        (Creators::Awake, Without::Generations),
    ];
    for (creators, without) in all {
        let run = move || shuttle::check_random_with_seed(move || scenario(creators, without), SEED, 10 * RUNS);
        assert!(std::panic::catch_unwind(run).is_err(), "{without:?} is not noticed");
    }
}
