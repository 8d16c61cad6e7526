//! One object in the cache: which of its units are here, which are on their way, and who waits for them.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use super::arrival::{Arrival, Landing};
use super::fetch::AT_ONCE;
use super::state::{Failure, InMemory, Queued, State, Unit, Work};
use super::units::{Known, Units};
use super::{Inner, Key, lock};
use crate::error::{Error, IoContext, Kind, Result};
use crate::patience;
use crate::store::{CHUNK_SIZE, Object, ObjectFile};

/// Bytes that are brought together by one read at most.
const PIECE: u64 = AT_ONCE as u64 * CHUNK_SIZE;

/// See the module.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) key: Key,
    /// Bytes counted as kept.
    pub(super) bytes: AtomicU64,
    /// Milliseconds since 1970, later for whatever is used later ([`Inner::now`]).
    used: AtomicU64,
    settled: AtomicU64,
    pub(super) state: Mutex<State>,
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

    pub(super) fn touch(&self, now: u64) {
        self.used.fetch_max(now, Ordering::Relaxed);
    }

    /// When it was used, if that is later than what this said before and it has a file.
    pub(super) fn used_since_settled(&self) -> Option<(Key, u64)> {
        let used = self.used();
        (self.bytes() > 0 && self.settled.swap(used, Ordering::Relaxed) != used).then_some((self.key, used))
    }

    /// Finds out what there is of the object, the first time it is asked for.
    pub(super) fn prepare(&self, inner: &Inner, object: &Object, units: impl FnOnce() -> Result<Units>) -> Result<()> {
        let is_known = |state: &State| match &state.known {
            Some(known) if known.object == *object => Ok(true),
            // Who named it first may have been wrong about it.
            Some(_) if state.is_idle() => Ok(false),
            Some(known) => {
                let what = format!("{} has {} bytes, not {}", object.label(), known.object.size, object.size);
                Err(Error::new(Kind::Corrupt, what).hint("run `envfabric fsck`"))
            }
            None => Ok(false),
        };
        if is_known(&lock(&self.state))? {
            return Ok(());
        }
        let known = Known::new(*object, units()?)?;
        let mut state = lock(&self.state);
        if !is_known(&state)? {
            *state = State::of(known.count());
            self.take_in(inner, &known, &mut state);
            state.known = Some(Arc::new(known));
            let has_file = state.file.is_some();
            drop(state);
            if has_file {
                inner.opened_file();
            }
        }
        Ok(())
    }

    /// Bytes `offset..end`. An object that has none is compared, too.
    pub(super) fn read(self: &Arc<Self>, inner: &Arc<Inner>, offset: u64, end: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut at = offset;
        loop {
            let stop = end.min((at / PIECE + 1) * PIECE);
            let mut tries = 0..2;
            let mut piece = loop {
                match self.read_piece(inner, at, stop) {
                    // The cache's own disk: what is there is given up, and the store asked again.
                    Err((error, Some(file))) if tries.next().is_some() => self.discard(inner, &file, &error),
                    other => break other.map_err(|(error, _)| error)?,
                }
            };
            if at == offset {
                bytes = piece;
            } else {
                bytes.append(&mut piece);
            }
            if stop == end {
                return Ok(bytes);
            }
            at = stop;
        }
    }

    /// Bytes `offset..end`, which are not many; with an error comes the file that could not be read.
    fn read_piece(
        self: &Arc<Self>,
        inner: &Arc<Inner>,
        offset: u64,
        end: u64,
    ) -> Result<Vec<u8>, (Error, Option<Arc<File>>)> {
        let in_memory = self.bring(inner, offset, end).map_err(|error| (error, None))?;
        let (known, file) = {
            let state = lock(&self.state);
            (state.known.clone().ok_or_else(|| (unknown(), None))?, state.file.clone())
        };
        let mut bytes = vec![0; (end - offset) as usize];
        let from_file = |bytes: &mut [u8], at: u64| match &file {
            Some(file) => {
                let read = file.read_exact_at(bytes, at).at("reading", inner.path(&self.key));
                read.map_err(|error| (error, Some(file.clone())))
            }
            None => Err((unknown(), None)),
        };
        if in_memory.iter().all(Option::is_none) {
            from_file(&mut bytes, offset)?;
        } else {
            let first = known.at(offset);
            for (at, unit) in (first..).zip(in_memory) {
                let start = known.start(at);
                let (from, to) = (start.max(offset), (start + known.length(at)).min(end));
                let part = &mut bytes[(from - offset) as usize..(to - offset) as usize];
                match unit {
                    Some(unit) => part.copy_from_slice(&unit[(from - start) as usize..(to - start) as usize]),
                    None => from_file(part, from)?,
                }
            }
        }
        inner.counters.served_bytes.fetch_add(end - offset, Ordering::Relaxed);
        Ok(bytes)
    }

    /// Sees to it that all units of bytes `offset..end` are here; those that are not in the file are given.
    pub(super) fn bring(self: &Arc<Self>, inner: &Arc<Inner>, offset: u64, end: u64) -> Result<Vec<InMemory>> {
        let mut state = lock(&self.state);
        let known = state.known.clone().ok_or_else(unknown)?;
        let last = known.at(end.saturating_sub(1));
        let wanted = known.at(offset).min(last)..last + 1;
        if wanted.end > state.units.len() {
            return Err(unknown());
        }
        if let Some(found) = self.find(inner, &known, &mut state, &wanted) {
            inner.counters.hits.fetch_add(1, Ordering::Relaxed);
            let ahead = state.go_on_ahead(&wanted);
            drop(state);
            self.set_off(inner, &known, ahead, &Order::AHEAD);
            return Ok(found);
        }
        let may_wait = patience::may_wait();
        let hastened = state.hasten(&wanted, may_wait);
        if !may_wait {
            let runs = state.ask_now(wanted.clone());
            drop(state);
            do_now(hastened);
            self.set_off(inner, &known, runs, &Order::of(&wanted));
            return Err(patience::would_wait());
        }
        let begun = Instant::now();
        state.expect(wanted.clone());
        let runs = state.ask_now(wanted.clone());
        drop(state);
        let mut asked = !runs.is_empty();
        self.set_off(inner, &known, runs, &Order::of(&wanted));
        do_now(hastened);
        let here = self.find(inner, &known, &mut lock(&self.state), &wanted);
        asked |= here.is_none();
        let found = here.map_or_else(|| self.wait(inner, &known, &wanted, begun), Ok);
        let mut state = lock(&self.state);
        state.expect_no_more(wanted.clone());
        if found.is_ok() {
            let counter = if asked { &inner.counters.misses } else { &inner.counters.hits };
            counter.fetch_add(1, Ordering::Relaxed);
            let ahead = state.go_on_ahead(&wanted);
            drop(state);
            self.set_off(inner, &known, ahead, &Order::AHEAD);
        }
        found
    }

    /// Waits for `wanted`, of which nothing has failed since `begun`, as long as some of it comes.
    fn wait(
        self: &Arc<Self>,
        inner: &Arc<Inner>,
        known: &Arc<Known>,
        wanted: &Range<usize>,
        begun: Instant,
    ) -> Result<Vec<InMemory>> {
        let mut state = lock(&self.state);
        loop {
            if let Some(found) = self.find(inner, known, &mut state, wanted) {
                return Ok(found);
            }
            let failed = wanted.clone().find_map(|at| state.failed.get(&at).filter(|failure| failure.when >= begun));
            if let Some(failure) = failed {
                return Err(Error::new(failure.kind, failure.what.clone()));
            }
            let runs = state.ask_now(wanted.clone());
            if !runs.is_empty() {
                drop(state);
                self.set_off(inner, known, runs, &Order::of(wanted));
                state = lock(&self.state);
                continue;
            }
            let moved = state.moved(wanted).map_or(begun, |moved| moved.max(begun));
            let left = inner.patience.saturating_sub(moved.elapsed());
            if left.is_zero() {
                inner.counters.timeouts.fetch_add(1, Ordering::Relaxed);
                let what = format!("{} cannot be fetched", known.object.label());
                return Err(patience::timed_out(inner.patience).context(what));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// All of `wanted`, if it is here: those that are not in the file are given.
    fn find(&self, inner: &Inner, known: &Known, state: &mut State, wanted: &Range<usize>) -> Option<Vec<InMemory>> {
        wanted.clone().for_each(|at| self.prove(inner, known, state, at));
        let mut found = Vec::with_capacity(wanted.len());
        for at in wanted.clone() {
            match state.units[at] {
                Unit::Here => found.push(None),
                Unit::Ahead => {
                    state.put(at, Unit::Here);
                    inner.counters.ahead_used.fetch_add(1, Ordering::Relaxed);
                    found.push(None);
                }
                Unit::Loose => {
                    let handed = state.expected.get(&at).and_then(|expected| expected.bytes.clone());
                    match handed.or_else(|| lock(&inner.loose).get(&(self.key, at))) {
                        Some(bytes) => found.push(Some(bytes)),
                        None => state.put(at, Unit::Absent),
                    }
                }
                Unit::Absent | Unit::Asked | Unit::Unproven => {}
            }
        }
        (found.len() == wanted.len()).then_some(found)
    }

    /// Asks for those of units `first..end` that are not here, without waiting; false when there is no room for them.
    pub(super) fn ask_ahead(self: &Arc<Self>, inner: &Arc<Inner>, first: u64, end: u64, order: &Order) -> bool {
        let mut state = lock(&self.state);
        let Some(known) = state.known.clone() else { return true };
        let count = state.units.len();
        let bound = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(count);
        let range = bound(first)..bound(end);
        range.clone().for_each(|at| self.prove(inner, &known, &mut state, at));
        let all = !range.clone().any(|at| state.units[at] == Unit::Loose);
        let runs = state.ask(range);
        state.told |= !order.around;
        drop(state);
        self.set_off(inner, &known, runs, order);
        all
    }

    /// Has `runs`, which count as asked for, fetched. Whoever holds the state must not call this.
    fn set_off(self: &Arc<Self>, inner: &Arc<Inner>, known: &Arc<Known>, runs: Vec<Range<usize>>, order: &Order) {
        for run in runs {
            match inner.source.opened(known) {
                Some(file) => self.send_all(inner, known, self.requests(inner, known, &file, &run, order), order),
                // May hang.
                None => self.send(inner, known, run, order, true),
            }
        }
    }

    fn send_all(self: &Arc<Self>, inner: &Arc<Inner>, known: &Arc<Known>, parts: Vec<Range<usize>>, order: &Order) {
        parts.into_iter().for_each(|part| self.send(inner, known, part, order, false));
    }

    /// Has `run` fetched, which has to be divided by requests first where `divide` says so.
    fn send(self: &Arc<Self>, inner: &Arc<Inner>, known: &Arc<Known>, run: Range<usize>, order: &Order, divide: bool) {
        // Whatever becomes of the question, also if it is never asked.
        let mut landing = Landing::of(self, run.clone());
        let (inner, known, order) = (inner.clone(), known.clone(), order.clone());
        let (units, is_awaited) = (run.clone(), order.is_for(&run));
        let under_way = (!is_awaited).then(|| inner.ahead.begin());
        let work = Work::Fetch(Box::new(move || {
            let _under_way = under_way;
            let entry = landing.entry.clone();
            // It may have queued for long.
            lock(&entry.state).note_moved(run.start);
            let (mut run, mut failed) = (run, None);
            match divide.then(|| inner.source.open(&known.object)) {
                Some(Ok(file)) => {
                    let mut parts = entry.requests(&inner, &known, &file, &run, &order);
                    run = parts.remove(parts.iter().position(|part| order.is_for(part)).unwrap_or(0));
                    landing.reduce(run.clone());
                    entry.send_all(&inner, &known, parts, &order);
                }
                Some(Err(error)) => failed = Some(error),
                None => {}
            }
            let mut arrival = Arrival::new(&inner, &known, order.wanted, landing);
            inner.source.fetch(&known, run, failed, &inner.counters, &mut arrival);
        }));
        match is_awaited {
            true => do_now(vec![work]),
            false => self.queue(units, work),
        }
    }

    /// Has `work` done, which brings `units`, by threads that give way, unless somebody waits for it.
    pub(super) fn queue(&self, units: Range<usize>, work: Work) {
        let threads = match work {
            Work::Fetch(_) => &patience::AHEAD,
            Work::Unpack(_) => &patience::UNPACK,
        };
        let queued = Queued::new(work);
        let mut state = lock(&self.state);
        if state.is_expected(&units) {
            drop(state);
            return do_now(queued.take().into_iter().collect());
        }
        state.queue(units, queued.clone());
        drop(state);
        let ask = threads.ask({
            let queued = queued.clone();
            move || queued.take().into_iter().for_each(Work::run)
        });
        if let Err(error) = ask {
            tracing::debug!(error = error.chain(), "not queued");
            match queued.take() {
                // What has come is not thrown away.
                Some(work @ Work::Unpack(_)) => work.run(),
                work => drop(work),
            }
        }
    }

    /// `run` by the requests that bring it, with what else these bring if `order` says so.
    fn requests(
        &self,
        inner: &Inner,
        known: &Known,
        file: &ObjectFile,
        run: &Range<usize>,
        order: &Order,
    ) -> Vec<Range<usize>> {
        if !order.around {
            return inner.source.pieces(known, file, run);
        }
        let with_more = |request: Range<usize>| {
            let part = run.start.max(request.start)..run.end.min(request.end);
            lock(&self.state).ask_around(part, &request)
        };
        inner.source.requests(known, file, run).into_iter().map(with_more).collect()
    }

    /// Takes a unit in, compared.
    pub(super) fn take(&self, inner: &Inner, known: &Known, at: usize, bytes: Vec<u8>, ahead: bool) {
        let kept = self.keep(inner, known, at, &bytes);
        let mut state = lock(&self.state);
        state.failed.remove(&at);
        match kept {
            Some((file, room)) if state.file.as_ref().is_some_and(|current| Arc::ptr_eq(current, &file)) => {
                self.bytes.fetch_add(room, Ordering::Relaxed);
                state.landed(at, if ahead { Unit::Ahead } else { Unit::Here });
            }
            kept => {
                // There was no room, or the file was given up meanwhile.
                inner.space.give_back(kept.map_or(0, |(_, room)| room));
                inner.counters.not_kept.fetch_add(1, Ordering::Relaxed);
                let bytes = Arc::new(bytes);
                lock(&inner.loose).put((self.key, at), bytes.clone());
                if let Some(expected) = state.expected.get_mut(&at) {
                    expected.bytes = Some(bytes);
                }
                state.landed(at, Unit::Loose);
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Notes why units did not come.
    pub(super) fn fail(&self, units: impl IntoIterator<Item = usize>, kind: Kind, what: &str) {
        let mut state = lock(&self.state);
        for at in units {
            if state.units[at] == Unit::Asked {
                state.landed(at, Unit::Absent);
            }
            state.failed.insert(at, Failure { kind, what: what.to_string(), when: Instant::now() });
        }
        drop(state);
        self.changed.notify_all();
    }
}

/// How units are asked for.
#[derive(Debug, Clone)]
pub(super) struct Order {
    /// Those that somebody waits for.
    wanted: Range<usize>,
    /// With all that comes by the same requests. Programs map libraries and touch them in patches, forwards and backwards:
    /// docs/benchmarks.md has what other numbers bring.
    around: bool,
}

impl Order {
    /// Nobody waits for them yet, but will for what is around them.
    pub(super) const AHEAD: Order = Order { wanted: 0..0, around: true };
    /// It is known that these are needed, and no others.
    pub(super) const KNOWN: Order = Order { wanted: 0..0, around: false };

    fn of(wanted: &Range<usize>) -> Order {
        Order { wanted: wanted.clone(), around: true }
    }

    /// True when somebody waits for some of `run`.
    fn is_for(&self, run: &Range<usize>) -> bool {
        run.start < self.wanted.end && self.wanted.start < run.end
    }
}

/// Does `work`, for which somebody waits, or has it done where it may hang. Not while a state is held: what is not even
/// asked fails at once.
fn do_now(mut work: Vec<Work>) {
    // It takes a while to unpack, and the store needs not wait for that.
    work.sort_by_key(|work| matches!(work, Work::Unpack(_)));
    for work in work {
        match work {
            Work::Unpack(unpack) => unpack(),
            Work::Fetch(fetch) => {
                if let Err(error) = patience::BYTES.ask(fetch) {
                    tracing::debug!(error = error.chain(), "not asked");
                }
            }
        }
    }
}

fn unknown() -> Error {
    Error::new(Kind::Failed, "an object was read before it was looked up")
}
