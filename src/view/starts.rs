//! Starts of interpreters: what they touch is recorded, and brought to the node before the next one asks for it.
//!
//! ```text
//! python is followed, or pyvenv.cfg read    -> the version is being started
//!   a profile is known                      -> its chunks are asked for, in parallel, in order of first touch
//!   it has too few starts                   -> what is read of the version's layers is noted; when nothing new was
//!                                              read for a while, it is added to the profile in the store
//! ```
//!
//! What the kernel reads from its own memory, or straight from a file, is not seen here: a profile is the union of what
//! several cold starts read.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::bytes::Location;
use super::*;
use crate::patience;
use crate::store::{self, CHUNK_SIZE, Chunks, Profile, Room, Touched};

/// A start is over when it has read nothing new for so long,
const QUIET: Duration = Duration::from_secs(5);
/// or after so long.
const LONGEST: Duration = Duration::from_secs(120);
/// How often it is looked whether one is over.
const TEND: Duration = Duration::from_secs(1);
/// Requests under way ahead of readers.
const AHEAD: usize = 16;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Starts {
    /// Versions of which this mount has seen a start.
    seen: Mutex<HashSet<u32>>,
    /// True while something is recorded.
    recording: AtomicBool,
    recorded: Mutex<HashMap<u32, Recording>>,
    queue: Mutex<VecDeque<Task>>,
    queued: Condvar,
    /// Starts that are still being prepared.
    preparing: AtomicUsize,
    warmed: Mutex<HashMap<(u32, bool), Arc<Warming>>>,
    ended: AtomicBool,
}

/// What one start has read so far.
#[derive(Debug)]
struct Recording {
    begun: Instant,
    last: Instant,
    order: Vec<(store::Object, Digest)>,
    /// Large files that were opened.
    opened: HashMap<store::Object, Digest>,
    chunks: HashMap<store::Object, BTreeSet<u64>>,
    /// What was brought because another version needs it.
    guessed: HashMap<store::Object, Touched>,
}

impl Recording {
    fn begin() -> Recording {
        let now = Instant::now();
        let (order, opened, chunks, guessed) = Default::default();
        Recording { begun: now, last: now, order, opened, chunks, guessed }
    }

    /// What was read of `layers`.
    fn profile(self, layers: &HashSet<Digest>) -> Profile {
        let touched = self.order.iter().filter(|(_, layer)| layers.contains(layer)).map(|(object, layer)| {
            let (object, layer) = (*object, *layer);
            let chunks = self.chunks.get(&object);
            let runs = chunks.into_iter().flatten().map(|at| (*at, at + 1)).collect();
            Touched { room: object.room, digest: object.digest, size: object.size, layer, runs }
        });
        // What was opened and not read here was read from the kernel's memory or in place: there is more to learn, unless
        // it was here only because it was guessed right.
        let opened = self.opened.iter().filter(|(_, layer)| layers.contains(*layer));
        let unseen = opened.map(|(object, _)| object).filter(|object| !self.chunks.contains_key(*object));
        let guessed: Vec<_> = unseen.map(|object| self.guessed.get(object)).collect();
        let unseen = guessed.iter().any(Option::is_none);
        let profile = Profile::of_start(touched.chain(guessed.into_iter().flatten().cloned()).collect());
        Profile { starts: u32::from(!unseen), ..profile }
    }
}

/// Work for the thread that brings bytes ahead of readers.
#[derive(Debug)]
enum Task {
    Start(u32),
    Warm(u32, bool, Arc<Warming>),
}

/// How far it is to bring a version to this node.
#[derive(Debug, Default)]
pub struct Warming {
    /// Bytes to bring.
    pub total: AtomicU64,
    /// Bytes that are here.
    pub done: AtomicU64,
    ended: AtomicBool,
    failed: Mutex<Option<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tree {
    /// An interpreter of `version` is being started.
    pub(super) fn started(&self, version: u32) {
        if !self.records && self.cache.is_none() || !lock(&self.starts.seen).insert(version) {
            return;
        }
        if self.records {
            self.record(version);
        }
        self.starts.preparing.fetch_add(1, Ordering::Relaxed);
        self.enqueue(Task::Start(version));
    }

    /// True while it is being found out, or asked for, what a start needs: then nothing is asked for by guessing.
    pub(super) fn is_preparing(&self) -> bool {
        self.starts.preparing.load(Ordering::Relaxed) > 0
    }

    fn enqueue(&self, task: Task) {
        lock(&self.starts.queue).push_back(task);
        self.starts.queued.notify_one();
    }

    /// Bytes of `at` are read.
    pub(super) fn touched(&self, at: &Location, offset: u64, size: u64) {
        if !self.starts.recording.load(Ordering::Relaxed) {
            return;
        }
        let Some(layer) = at.layer else { return };
        let from = at.offset.saturating_add(offset);
        let chunks = from / CHUNK_SIZE..from.saturating_add(size).min(at.object.size).div_ceil(CHUNK_SIZE);
        let mut recorded = lock(&self.starts.recorded);
        for recording in recorded.values_mut() {
            let known = recording.chunks.entry(at.object).or_insert_with(|| {
                recording.order.push((at.object, layer));
                BTreeSet::new()
            });
            let before = known.len();
            known.extend(chunks.clone());
            if known.len() > before {
                recording.last = Instant::now();
            }
        }
    }

    /// A large file is opened.
    pub(super) fn opened(&self, at: &Location) {
        if !self.starts.recording.load(Ordering::Relaxed) || at.object.room != Room::Blobs {
            return;
        }
        let Some(layer) = at.layer else { return };
        for recording in lock(&self.starts.recorded).values_mut() {
            recording.opened.insert(at.object, layer);
        }
    }

    /// Begins to note what is read; what is of other versions is left out in the end.
    fn record(&self, version: u32) {
        lock(&self.starts.recorded).entry(version).or_insert_with(Recording::begin);
        self.starts.recording.store(true, Ordering::Relaxed);
    }

    /// Ends the recording of a version.
    fn take_recorded(&self, version: u32) -> Option<Recording> {
        let mut recorded = lock(&self.starts.recorded);
        let taken = recorded.remove(&version);
        self.starts.recording.store(!recorded.is_empty(), Ordering::Relaxed);
        taken
    }

    /// Ends the recording of the only version and gives what it says.
    pub fn take_profile(&self) -> Option<Profile> {
        let version = *lock(&self.starts.recorded).keys().next()?;
        self.profile_from(version, self.take_recorded(version)?).ok()
    }

    fn profile_from(&self, version: u32, recording: Recording) -> Result<Profile> {
        let layers = self.layers(&*self.version(version)?)?.docs.iter().map(|doc| doc.digest).collect();
        Ok(recording.profile(&layers))
    }

    /// Adds what is recorded to profiles in the store: of starts that are over, or of all.
    pub fn publish_profiles(&self, all: bool) {
        if !self.starts.recording.load(Ordering::Relaxed) {
            return;
        }
        let over =
            |recording: &Recording| all || recording.last.elapsed() > QUIET || recording.begun.elapsed() > LONGEST;
        let ended: Vec<u32> = {
            let recorded = lock(&self.starts.recorded);
            recorded.iter().filter(|(_, recording)| over(recording)).map(|(version, _)| *version).collect()
        };
        for version in ended {
            let profile = self.take_recorded(version).map(|recording| self.profile_from(version, recording));
            let Some(Ok(profile)) = profile.filter(|profile| profile.as_ref().is_ok_and(|p| !p.objects.is_empty()))
            else {
                continue;
            };
            let Some((env, number)) = self.version_slots.key(version) else { continue };
            let store = self.store.clone();
            let publish = move || {
                store.add_profile(&env, number, &profile).map(drop).inspect_err(|error| {
                    // A store that this node may only read: other nodes may do better.
                    tracing::info!(environment = %env, error = error.chain(), "what a start reads is not kept");
                })
            };
            // A store that hangs must not keep this thread. At the end it is waited for, but not for long.
            let _ = match all {
                true => patience::within(Duration::from_secs(5), publish),
                false => patience::BYTES.ask(move || drop(publish())),
            };
        }
    }

    /// Brings bytes ahead of readers, until [`Tree::end`]. For a thread of its own.
    pub fn run_ahead(&self) {
        while let Some(task) = self.next_task() {
            match task {
                Task::Start(version) => {
                    if let Err(error) = self.prepare_start(version) {
                        tracing::debug!(error = error.chain(), "nothing is brought ahead of a start");
                    }
                    self.starts.preparing.fetch_sub(1, Ordering::Relaxed);
                }
                Task::Warm(version, all, warming) => {
                    if let Err(error) = self.bring(version, all, &warming) {
                        *lock(&warming.failed) = Some(error.chain());
                    }
                    warming.ended.store(true, Ordering::Release);
                }
            }
        }
    }

    fn next_task(&self) -> Option<Task> {
        let mut queue = lock(&self.starts.queue);
        loop {
            if self.starts.ended.load(Ordering::Relaxed) {
                return None;
            }
            if let Some(task) = queue.pop_front() {
                return Some(task);
            }
            queue = match self.starts.recording.load(Ordering::Relaxed) {
                false => self.starts.queued.wait(queue).unwrap_or_else(PoisonError::into_inner),
                true => {
                    let waited = self.starts.queued.wait_timeout(queue, TEND);
                    drop(waited.unwrap_or_else(PoisonError::into_inner));
                    self.publish_profiles(false);
                    lock(&self.starts.queue)
                }
            };
        }
    }

    /// Lets the threads of [`Tree::run_ahead`] and [`Tree::hold_leases`] end.
    pub fn end(&self) {
        self.starts.ended.store(true, Ordering::Relaxed);
        {
            let _queue = lock(&self.starts.queue);
            self.starts.queued.notify_all();
        }
        self.leases.end();
    }

    fn profile_of(&self, version: u32) -> Result<Option<Profile>> {
        let (env, number) = self.version_slots.key(version).ok_or_else(gone)?;
        self.within_patience(move |store| store.profile(&env, number))
    }

    /// What starts of another version touched of the layers that this one has as well.
    fn guess(&self, version: u32) -> Result<Vec<Touched>> {
        let (env, number) = self.version_slots.key(version).ok_or_else(gone)?;
        let Some(profile) = self.within_patience(move |store| store.profile_like(&env, number))? else {
            return Ok(Vec::new());
        };
        let layers: HashSet<Digest> =
            self.layers(&*self.version(version)?)?.docs.iter().map(|doc| doc.digest).collect();
        Ok(profile.objects.into_iter().filter(|touched| layers.contains(&touched.layer)).collect())
    }

    fn within_patience<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&store::Store) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let store = self.store.clone();
        let limit = self.cache.as_ref().map_or(patience::LIMIT, |cache| cache.patience());
        patience::within(limit, move || ask(&store))
    }

    fn prepare_start(&self, version: u32) -> Result<()> {
        // Whatever is started, what it imports is looked for in merged directories.
        if let Some(cache) = &self.cache {
            let layers = self.layers(&*self.version(version)?)?;
            let bundles: HashSet<_> = layers.docs.iter().filter_map(|doc| Some(doc.bundle?.object())).collect();
            bundles.iter().try_for_each(|bundle| cache.ask_whole(bundle))?;
        }
        let profile = self.profile_of(version)?;
        if profile.as_ref().is_some_and(Profile::is_enough) {
            self.take_recorded(version);
        }
        if let Some(cache) = &self.cache {
            let known = match profile {
                Some(profile) => profile.objects,
                None => {
                    let guessed = self.guess(version)?;
                    if let Some(recording) = lock(&self.starts.recorded).get_mut(&version) {
                        recording.guessed = guessed.iter().map(|touched| (touched.object(), touched.clone())).collect();
                    }
                    guessed
                }
            };
            known.iter().for_each(|touched| self.begun.put(touched.object(), Needed::Known));
            for touched in &known {
                // Without room, what is brought would be gone before it is asked for.
                if !self.ask_for(cache, touched)? {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Asks for what `touched` says, as soon as not too much is under way; false when there is no room for it.
    fn ask_for(&self, cache: &Cache, touched: &Touched) -> Result<bool> {
        let object = touched.object();
        let chunks = || self.chunks_of(touched);
        self.begun.put(object, Needed::Known);
        for (first, end) in &touched.runs {
            if self.starts.ended.load(Ordering::Relaxed) || !cache.ask_ahead(&object, chunks, *first, *end, AHEAD)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A profile is not to be believed more than the catalog.
    fn chunks_of(&self, touched: &Touched) -> Result<Chunks> {
        self.with_catalog(&touched.layer, |catalog| catalog.chunks(&touched.digest, touched.size))
    }

    /// Begins to bring what starts of the version at `dir` touch, or all of it, to this node, unless that is under way.
    /// `dir` is an environment's directory, or that of a version.
    pub fn warm(&self, dir: Ino, all: bool) -> Result<Arc<Warming>> {
        let version = self.version_at(dir)?;
        let mut warmed = lock(&self.starts.warmed);
        if let Some(warming) = warmed.get(&(version, all)).filter(|warming| !warming.has_ended()) {
            return Ok(warming.clone());
        }
        let warming = Arc::new(Warming { ended: AtomicBool::new(self.cache.is_none()), ..Warming::default() });
        warmed.insert((version, all), warming.clone());
        drop(warmed);
        if !warming.has_ended() {
            self.enqueue(Task::Warm(version, all, warming.clone()));
        }
        Ok(warming)
    }

    /// How far [`Tree::warm`] is, if it was called.
    pub fn warming(&self, dir: Ino, all: bool) -> Result<Option<Arc<Warming>>> {
        let version = self.version_at(dir)?;
        Ok(lock(&self.starts.warmed).get(&(version, all)).cloned())
    }

    fn version_at(&self, dir: Ino) -> Result<u32> {
        match dir.decode() {
            Some(Object::Special { version, special: Special::Root }) => Ok(version),
            Some(Object::Name { slot }) => match self.name_slots.key(slot) {
                Some(NameKey::Node(env)) => {
                    let current = self.names.env(&env, Age::Fresh)?.ok_or_else(gone)?.current;
                    Ok(self.version_of(&env, current)?.slot)
                }
                _ => Err(Error::new(Kind::Invalid, "this is no environment")),
            },
            _ => Err(Error::new(Kind::Invalid, "this is no environment")),
        }
    }

    fn bring(&self, version: u32, all: bool, warming: &Warming) -> Result<()> {
        let Some(cache) = &self.cache else { return Ok(()) };
        let touched = match (all, self.profile_of(version)?) {
            (false, Some(profile)) => profile.objects,
            // Nothing is known of it: what programs are likely to need.
            (false, None) => {
                let mut guessed = self.guess(version)?;
                let packs: HashSet<_> = guessed.iter().map(Touched::object).collect();
                guessed.extend(self.likely(version)?.into_iter().filter(|likely| !packs.contains(&likely.object())));
                guessed
            }
            (true, _) => self.everything(version)?,
        };
        let total = touched.iter().fold(0, |sum: u64, touched| sum.saturating_add(touched.bytes()));
        warming.total.store(total, Ordering::Relaxed);
        for touched in &touched {
            if !self.ask_for(cache, touched)? {
                let what = format!("there is no room for {}", touched.object().label());
                return Err(Error::new(Kind::Failed, what).hint("give the cache more room: --cache-size, --cache-free"));
            }
        }
        for touched in &touched {
            for (first, end) in &touched.runs {
                cache.wait_for(&touched.object(), || self.chunks_of(touched), *first, *end)?;
            }
            warming.done.fetch_add(touched.bytes(), Ordering::Relaxed);
        }
        Ok(())
    }

    fn likely(&self, version: u32) -> Result<Vec<Touched>> {
        let docs = self.layers(&*self.version(version)?)?.docs.clone();
        let hot = docs.iter().filter_map(|doc| {
            let end = doc.pack_hot.div_ceil(CHUNK_SIZE);
            doc.pack_object().map(|pack| whole(&pack, doc.digest, end))
        });
        Ok(hot.filter(|touched| touched.runs[0].1 > 0).collect())
    }

    fn everything(&self, version: u32) -> Result<Vec<Touched>> {
        let docs = self.layers(&*self.version(version)?)?.docs.clone();
        let mut all = Vec::new();
        let mut seen = HashSet::new();
        for doc in docs {
            let pack = doc.pack_object();
            all.extend(pack.iter().map(|pack| whole(pack, doc.digest, pack.chunks())));
            if doc.blobs.is_empty() {
                continue;
            }
            for row in self.with_catalog(&doc.digest, |catalog| catalog.all())? {
                if let Node::File { size, digest, place: Place::Blob, .. } = row.node {
                    let object = store::Object { room: Room::Blobs, digest, size };
                    all.extend(seen.insert(object).then(|| whole(&object, doc.digest, object.chunks())));
                }
            }
        }
        Ok(all)
    }
}

fn whole(object: &store::Object, layer: Digest, end: u64) -> Touched {
    Touched { room: object.room, digest: object.digest, size: object.size, layer, runs: vec![(0, end)] }
}

impl Warming {
    /// True when it is over.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Why it did not succeed.
    pub fn failure(&self) -> Option<String> {
        lock(&self.failed).clone()
    }
}
