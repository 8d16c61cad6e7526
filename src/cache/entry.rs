//! One object in the cache: which of its units are here, which are on their way, and who waits for them.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use nix::unistd::{Whence, lseek64};

use super::ledger::{Identity, Ledger};
use super::{Inner, Key, lock};
use crate::environment::Digest;
use crate::error::{Error, IoContext, Kind, Result};
use crate::patience;
use crate::store::{CHUNK_SIZE, Chunks, Object};

/// Units that one request asks for at most.
pub(super) const AT_ONCE: usize = 16;
/// Units asked for ahead of a reader that goes on and on.
const AHEAD_MAX: usize = 32;

/// How an object is taken apart.
#[derive(Debug)]
pub(super) enum Units {
    /// Not at all: its own digest is all there is.
    Whole,
    /// Into chunks with these digests.
    Chunks(Chunks),
}

impl Units {
    fn count(&self) -> usize {
        match self {
            Units::Whole => 1,
            Units::Chunks(chunks) => chunks.len(),
        }
    }

    /// Length of unit `at`, in bytes.
    pub(super) fn length(&self, object: &Object, at: usize) -> u64 {
        match self {
            Units::Whole => object.size,
            Units::Chunks(_) => object.chunk_size(at as u64),
        }
    }

    fn at(&self, offset: u64) -> usize {
        match self {
            Units::Whole => 0,
            Units::Chunks(_) => (offset / CHUNK_SIZE) as usize,
        }
    }

    fn start(&self, at: usize) -> u64 {
        at as u64 * CHUNK_SIZE
    }

    /// True when `bytes` are those of unit `at`.
    pub(super) fn is_right(&self, object: &Object, at: usize, bytes: &[u8]) -> bool {
        let digest = match self {
            Units::Whole => Some(&object.digest),
            Units::Chunks(chunks) => chunks.get(at),
        };
        bytes.len() as u64 == self.length(object, at) && digest.is_some_and(|digest| Digest::of(bytes) == *digest)
    }
}

/// Where a unit is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    Absent,
    /// On its way.
    Asked,
    /// In the file, from another time.
    Unproven,
    /// In the file and compared; nobody has read it yet.
    Ahead,
    /// In the file and compared.
    Here,
    /// Compared, and in memory for the time being.
    Loose,
}

/// What an entry knows once somebody has asked for its object.
#[derive(Debug)]
struct Known {
    object: Object,
    units: Units,
}

#[derive(Debug, Default)]
struct State {
    known: Option<Arc<Known>>,
    file: Option<Arc<File>>,
    units: Vec<Unit>,
    /// How many are in the file and compared.
    here: usize,
    /// The ledger knows that all are.
    sealed: bool,
    failed: HashMap<usize, (Kind, String)>,
    /// The unit behind the one that was read last, and how many to ask for ahead.
    next: usize,
    window: usize,
}

impl State {
    fn is_whole(&self) -> bool {
        self.known.is_some() && self.here == self.units.len()
    }

    fn put(&mut self, at: usize, unit: Unit) {
        let counts = |unit| usize::from(matches!(unit, Unit::Here | Unit::Ahead));
        self.here = self.here + counts(unit) - counts(self.units[at]);
        self.units[at] = unit;
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Entry {
    key: Key,
    /// Bytes counted as kept.
    bytes: AtomicU64,
    /// Milliseconds since 1970.
    used: AtomicU64,
    settled: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

/// Keeps an object in the cache.
#[derive(Debug, Clone)]
pub struct Held(#[allow(dead_code, reason = "held, not looked at")] Arc<Entry>);

impl Held {
    pub(super) fn new(entry: Arc<Entry>) -> Self {
        Held(entry)
    }
}

/// Bytes of a unit that are not in the file.
type InMemory = Option<Arc<Vec<u8>>>;

impl Entry {
    pub(super) fn new(key: Key) -> Self {
        Entry::found(key, 0, 0)
    }

    /// Of a file with so many bytes on disk that was used at `used`.
    pub(super) fn found(key: Key, bytes: u64, used: u64) -> Self {
        let (bytes, settled, used) = (AtomicU64::new(bytes), AtomicU64::new(used), AtomicU64::new(used));
        Entry { key, bytes, used, settled, state: Mutex::default(), changed: Condvar::new() }
    }

    pub(super) fn key(&self) -> Key {
        self.key
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(super) fn touch(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.used.store(u64::try_from(now.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// When it was used, if that is later than what this said before.
    pub(super) fn used_since_settled(&self) -> Option<(Key, u64)> {
        let used = self.used();
        (self.settled.swap(used, Ordering::Relaxed) != used).then_some((self.key, used))
    }

    /// Finds out what there is of the object, the first time it is asked for.
    pub(super) fn prepare(&self, inner: &Inner, object: &Object, units: impl FnOnce() -> Result<Units>) -> Result<()> {
        if let Some(known) = &lock(&self.state).known {
            return self.agrees(known, object);
        }
        let units = units()?;
        let mut state = lock(&self.state);
        if let Some(known) = &state.known {
            return self.agrees(known, object);
        }
        let known = Known { object: *object, units };
        state.units = vec![Unit::Absent; known.units.count()];
        match self.open(inner, object) {
            Ok(None) => {}
            Ok(Some(file)) => {
                let identity = file.metadata().map(|meta| Identity::of(&meta));
                state.sealed = identity.is_ok_and(|identity| inner.ledger.is_sealed(self.key, &identity));
                let there = if state.sealed { Unit::Here } else { Unit::Unproven };
                for at in units_with_data(&file, &known) {
                    state.put(at, there);
                }
                // Sealed, and yet with holes: then it is not what was sealed.
                if state.sealed && state.here < state.units.len() {
                    state.sealed = false;
                    (0..state.units.len()).filter(|at| known.units.length(object, *at) > 0).for_each(|at| {
                        if state.units[at] == Unit::Here {
                            state.put(at, Unit::Unproven);
                        }
                    });
                }
                state.file = Some(Arc::new(file));
            }
            Err(error) => tracing::debug!(error = error.chain(), "a cached file cannot be used"),
        }
        state.known = Some(Arc::new(known));
        Ok(())
    }

    fn agrees(&self, known: &Known, object: &Object) -> Result<()> {
        if known.object == *object {
            return Ok(());
        }
        let what = format!("{} has {} bytes, not {}", object.label(), known.object.size, object.size);
        Err(Error::new(Kind::Corrupt, what).hint("run `envfabric fsck`"))
    }

    /// The file of an earlier time, if there is one of the right length.
    fn open(&self, inner: &Inner, object: &Object) -> Result<Option<File>> {
        let path = inner.path(&self.key);
        let file = match OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.at("opening", &path)?,
        };
        let meta = file.metadata().at("reading", &path)?;
        if meta.is_file() && meta.len() == object.size {
            return Ok(Some(file));
        }
        fs::remove_file(&path).at("removing", &path)?;
        inner.space.give_back(self.bytes.swap(0, Ordering::Relaxed));
        Ok(None)
    }

    /// The file, if all of it is here and compared.
    pub(super) fn sealed_file(&self) -> Option<Arc<File>> {
        let state = lock(&self.state);
        state.file.clone().filter(|_| state.is_whole())
    }

    /// Bytes `offset..end`, which is not empty.
    pub(super) fn read(self: &Arc<Self>, inner: &Arc<Inner>, offset: u64, end: u64) -> Result<Vec<u8>> {
        let in_memory = self.bring(inner, offset, end)?;
        let (known, file) = {
            let state = lock(&self.state);
            (state.known.clone().ok_or_else(unknown)?, state.file.clone())
        };
        inner.counters.served_bytes.fetch_add(end - offset, Ordering::Relaxed);
        let mut bytes = vec![0; (end - offset) as usize];
        let from_file = |bytes: &mut [u8], at: u64| match &file {
            Some(file) => file.read_exact_at(bytes, at).at("reading", inner.path(&self.key)),
            None => Err(unknown()),
        };
        if in_memory.iter().all(Option::is_none) {
            from_file(&mut bytes, offset)?;
            return Ok(bytes);
        }
        let first = known.units.at(offset);
        for (at, unit) in in_memory.iter().enumerate() {
            let start = known.units.start(first + at);
            let stop = start + known.units.length(&known.object, first + at);
            let (from, to) = (start.max(offset), stop.min(end));
            let part = &mut bytes[(from - offset) as usize..(to - offset) as usize];
            match unit {
                Some(unit) => part.copy_from_slice(&unit[(from - start) as usize..(to - start) as usize]),
                None => from_file(part, from)?,
            }
        }
        Ok(bytes)
    }

    /// Sees to it that all units of bytes `offset..end` are here; those that are not in the file are given.
    pub(super) fn bring(self: &Arc<Self>, inner: &Arc<Inner>, offset: u64, end: u64) -> Result<Vec<InMemory>> {
        let mut state = lock(&self.state);
        let known = state.known.clone().ok_or_else(unknown)?;
        let wanted = known.units.at(offset)..known.units.at(end.saturating_sub(1)) + 1;
        let mut begun: Option<Instant> = None;
        loop {
            wanted.clone().for_each(|at| self.prove(inner, &known, &mut state, at));
            let mut found = Vec::with_capacity(wanted.len());
            for at in wanted.clone() {
                match state.units[at] {
                    Unit::Here => found.push(None),
                    Unit::Ahead => {
                        state.put(at, Unit::Here);
                        inner.counters.ahead_used.fetch_add(1, Ordering::Relaxed);
                        found.push(None);
                    }
                    Unit::Loose => match lock(&inner.loose).get(&(self.key, at)) {
                        Some(bytes) => found.push(Some(bytes.clone())),
                        None => state.put(at, Unit::Absent),
                    },
                    _ => {}
                }
            }
            if found.len() == wanted.len() {
                let counter = if begun.is_some() { &inner.counters.misses } else { &inner.counters.hits };
                counter.fetch_add(1, Ordering::Relaxed);
                self.go_on_ahead(inner, &known, &mut state, &wanted);
                return Ok(found);
            }
            if begun.is_some()
                && let Some((kind, what)) = wanted.clone().find_map(|at| state.failed.get(&at))
                && wanted.clone().all(|at| state.units[at] != Unit::Asked)
            {
                return Err(Error::new(*kind, what.clone()));
            }
            self.ask(inner, &known, &mut state, wanted.clone(), false);
            if !patience::may_wait() {
                return Err(patience::would_wait());
            }
            let begun = *begun.get_or_insert_with(Instant::now);
            let left = inner.patience.saturating_sub(begun.elapsed());
            if left.is_zero() {
                inner.counters.timeouts.fetch_add(1, Ordering::Relaxed);
                let what = format!("{} cannot be fetched", known.object.label());
                return Err(patience::timed_out(inner.patience).context(what));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Compares a unit that was in the file before.
    fn prove(&self, inner: &Inner, known: &Known, state: &mut State, at: usize) {
        if state.units[at] != Unit::Unproven {
            return;
        }
        let mut bytes = vec![0; known.units.length(&known.object, at) as usize];
        let read =
            state.file.as_ref().is_some_and(|file| file.read_exact_at(&mut bytes, known.units.start(at)).is_ok());
        let right = read && known.units.is_right(&known.object, at, &bytes);
        inner.counters.verified_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if !right {
            tracing::warn!(object = known.object.label(), chunk = at, "cached bytes are wrong and are fetched again");
            inner.counters.corrupt_in_cache.fetch_add(1, Ordering::Relaxed);
        }
        state.put(at, if right { Unit::Here } else { Unit::Absent });
    }

    /// Asks for more, ahead of a reader that goes through the object.
    fn go_on_ahead(self: &Arc<Self>, inner: &Arc<Inner>, known: &Arc<Known>, state: &mut State, wanted: &Range<usize>) {
        if wanted.end == state.next {
            return; // within the unit that was read last
        }
        let goes_on = wanted.start == state.next || wanted.start + 1 == state.next;
        state.window = if goes_on && wanted.start > 0 { (state.window * 2).clamp(2, AHEAD_MAX) } else { 0 };
        state.next = wanted.end;
        let ahead = wanted.end..(wanted.end + state.window).min(state.units.len());
        self.ask(inner, known, state, ahead, true);
    }

    /// Asks for those of `range` that are not here, without waiting; false when there is no room for them.
    pub(super) fn ask_ahead(self: &Arc<Self>, inner: &Arc<Inner>, first: u64, end: u64) -> bool {
        let mut state = lock(&self.state);
        let Some(known) = state.known.clone() else { return true };
        let count = state.units.len();
        let range = (first as usize).min(count)..(end as usize).min(count);
        range.clone().for_each(|at| self.prove(inner, &known, &mut state, at));
        let all = !range.clone().any(|at| state.units[at] == Unit::Loose);
        self.ask(inner, &known, &mut state, range, true);
        all
    }

    fn ask(
        self: &Arc<Self>,
        inner: &Arc<Inner>,
        known: &Arc<Known>,
        state: &mut State,
        range: Range<usize>,
        ahead: bool,
    ) {
        let mut at = range.start;
        while at < range.end {
            let run = (at..range.end).take(AT_ONCE).take_while(|at| state.units[*at] == Unit::Absent).count();
            if run == 0 {
                at += 1;
                continue;
            }
            for at in at..at + run {
                state.put(at, Unit::Asked);
                state.failed.remove(&at);
            }
            if ahead {
                inner.counters.ahead.fetch_add(run as u64, Ordering::Relaxed);
            }
            let (entry, inner, known) = (self.clone(), inner.clone(), known.clone());
            let under_way = ahead.then(|| inner.ahead.begin());
            let asked = patience::BYTES.ask(move || {
                let _under_way = under_way;
                let landing = Landing { entry, units: at..at + run };
                let (first, count) = (landing.units.start, landing.units.len());
                match inner.source.fetch(&known.object, &known.units, first, count, &inner.counters) {
                    Ok(pieces) => {
                        for (at, bytes) in (first..).zip(pieces) {
                            landing.entry.take(&inner, &known, at, bytes, ahead);
                        }
                    }
                    Err(error) => landing.entry.fail(landing.units.clone(), error.kind(), &error.chain()),
                }
            });
            if let Err(error) = asked {
                for at in at..at + run {
                    state.put(at, Unit::Absent);
                    state.failed.insert(at, (error.kind(), error.to_string()));
                }
                return;
            }
            at += run;
        }
    }

    /// Takes a unit in, compared.
    fn take(&self, inner: &Inner, known: &Known, at: usize, bytes: Vec<u8>, ahead: bool) {
        let kept = self.keep(inner, known, at, &bytes);
        if !kept {
            inner.counters.not_kept.fetch_add(1, Ordering::Relaxed);
            lock(&inner.loose).put((self.key, at), Arc::new(bytes));
        }
        let unit = match (kept, ahead) {
            (false, _) => Unit::Loose,
            (true, true) => Unit::Ahead,
            (true, false) => Unit::Here,
        };
        lock(&self.state).put(at, unit);
        self.changed.notify_all();
    }

    /// Writes a unit into the file; false when there is no room or the disk does not take it.
    fn keep(&self, inner: &Inner, known: &Known, at: usize, bytes: &[u8]) -> bool {
        let length = bytes.len() as u64;
        if !inner.make_room(length) {
            return false;
        }
        let write =
            || self.file(inner, known)?.write_all_at(bytes, known.units.start(at)).at("writing", inner.path(&self.key));
        let mut written = write();
        if written.as_ref().is_err_and(|error| matches!(error.errno(), libc::ENOSPC | libc::EDQUOT)) {
            inner.evict(length.max(64 << 20));
            written = write();
        }
        match written {
            Ok(()) => {
                self.bytes.fetch_add(length, Ordering::Relaxed);
                true
            }
            Err(error) => {
                inner.space.give_back(length);
                tracing::debug!(error = error.chain(), "bytes are served without being kept");
                false
            }
        }
    }

    /// The file, made if there is none.
    fn file(&self, inner: &Inner, known: &Known) -> Result<Arc<File>> {
        let mut state = lock(&self.state);
        if let Some(file) = &state.file {
            return Ok(file.clone());
        }
        let path = inner.path(&self.key);
        let open = || OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&path);
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                path.parent().map_or(Ok(()), fs::create_dir_all).at("creating", &path)?;
                open()
            }
            other => other,
        };
        let file = file.at("creating", &path)?;
        file.set_len(known.object.size).at("writing", &path)?;
        Ok(state.file.insert(Arc::new(file)).clone())
    }

    fn fail(&self, units: Range<usize>, kind: Kind, what: &str) {
        let mut state = lock(&self.state);
        for at in units {
            if state.units[at] == Unit::Asked {
                state.put(at, Unit::Absent);
                state.failed.insert(at, (kind, what.to_string()));
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Has the ledger remember that all is here, if it is.
    pub(super) fn seal(&self, ledger: &Ledger) {
        let file = {
            let state = lock(&self.state);
            state.file.clone().filter(|_| state.is_whole() && !state.sealed)
        };
        let Some(file) = file else { return };
        // The ledger must not know of bytes that a power failure takes away.
        if file.sync_all().is_ok()
            && let Ok(meta) = file.metadata()
        {
            ledger.seal(self.key, &Identity::of(&meta), self.used());
            lock(&self.state).sealed = true;
        }
    }
}

/// Units on their way; whatever becomes of them, nobody waits for ever.
struct Landing {
    entry: Arc<Entry>,
    units: Range<usize>,
}

impl Drop for Landing {
    fn drop(&mut self) {
        let what = format!("{}/{}: a question to the store broke off", self.entry.key.0.name(), self.entry.key.1);
        self.entry.fail(self.units.clone(), Kind::Failed, &what);
    }
}

/// Units all of whose bytes are in the file, as far as the file system tells.
fn units_with_data(file: &File, known: &Known) -> Vec<usize> {
    let mut found = Vec::new();
    for at in 0..known.units.count() {
        let start = known.units.start(at) as i64;
        let end = start + known.units.length(&known.object, at) as i64;
        // The next byte of data, and the hole behind it; an empty object has none, and needs none.
        let data = lseek64(file, start, Whence::SeekData);
        if end == start || (data == Ok(start) && lseek64(file, start, Whence::SeekHole).is_ok_and(|hole| hole >= end)) {
            found.push(at);
        }
    }
    found
}

fn unknown() -> Error {
    Error::new(Kind::Failed, "an object was read before it was looked up")
}
