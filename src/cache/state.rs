//! Where the units of one object are: here, on their way, or neither; and who waits for them.
//!
//! ```text
//! Absent -> Asked -> Here | Ahead | Loose            Unproven -> Here | Absent
//!              \-> Absent, and why: failed            Loose -> Absent
//! ```

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::fetch::AT_ONCE;
use super::lock;
use super::units::Known;
use crate::error::Kind;

/// Units asked for ahead of a reader that goes on and on.
const AHEAD_MAX: usize = 32;
/// Bytes of a unit that are not in the file.
pub(super) type InMemory = Option<Arc<Vec<u8>>>;

/// Where a unit is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
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

/// Units that are fetched together.
#[derive(Debug)]
pub(super) struct Flight {
    units: Range<usize>,
    /// Those of them that have not landed, by their place: no more than [`AT_ONCE`].
    up: u128,
    /// When something of it came last.
    moved: Instant,
}

impl Flight {
    fn of(units: Range<usize>) -> Flight {
        Flight { up: units.clone().fold(0, |up: u128, at| up | 1 << (at - units.start)), units, moved: Instant::now() }
    }

    fn bit(&self, at: usize) -> u128 {
        if self.units.contains(&at) { 1 << (at - self.units.start) } else { 0 }
    }

    fn has(&self, at: usize) -> bool {
        self.up & self.bit(at) != 0
    }
}

/// What brings units.
pub(super) enum Work {
    /// Asks the store, which may hang.
    Fetch(Box<dyn FnOnce() + Send>),
    /// Unpacks what has come.
    Unpack(Box<dyn FnOnce() + Send>),
}

impl Work {
    pub(super) fn run(self) {
        match self {
            Work::Fetch(work) | Work::Unpack(work) => work(),
        }
    }
}

/// Units for which nothing is done yet, as nobody waits for them; none any more once it has begun.
#[derive(Clone)]
pub(super) struct Queued(Arc<Mutex<Option<Work>>>);

impl std::fmt::Debug for Queued {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Queued")
    }
}

impl Queued {
    pub(super) fn new(work: Work) -> Queued {
        Queued(Arc::new(Mutex::new(Some(work))))
    }

    /// What is to be done, for one who does it.
    pub(super) fn take(&self) -> Option<Work> {
        lock(&self.0).take()
    }

    /// The same, for one who is not to unpack anything where `unpack` is false.
    fn take_now(&self, unpack: bool) -> Option<Work> {
        lock(&self.0).take_if(|work| unpack || matches!(work, Work::Fetch(_)))
    }

    fn is_waiting(&self) -> bool {
        lock(&self.0).is_some()
    }
}

/// Why a unit did not come, and when.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) kind: Kind,
    pub(super) what: String,
    pub(super) when: Instant,
}

/// A unit that somebody waits for.
#[derive(Debug, Default)]
pub(super) struct Expected {
    by: usize,
    /// It came, and there was no room.
    pub(super) bytes: InMemory,
}

/// A reader that goes on.
#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    /// The unit behind the one that was read last.
    next: usize,
    /// How many to ask for ahead.
    window: usize,
    /// The unit behind those that were asked for.
    ahead: usize,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) known: Option<Arc<Known>>,
    pub(super) file: Option<Arc<File>>,
    pub(super) units: Vec<Unit>,
    /// How many are in the file and compared.
    here: usize,
    /// The ledger knows that all are.
    pub(super) sealed: bool,
    pub(super) failed: HashMap<usize, Failure>,
    flights: Vec<Flight>,
    queued: Vec<(Range<usize>, Queued)>,
    pub(super) expected: HashMap<usize, Expected>,
    /// Readers that go through the object, the one that went on last first: whoever maps a library goes through its
    /// relocations and what they change at the same time.
    streams: [Stream; 4],
    /// What will be needed of it was asked for: nothing is asked for by guessing until somebody misses something.
    pub(super) told: bool,
}

impl State {
    /// Of an object with so many units, of which nothing is here.
    pub(super) fn of(units: usize) -> State {
        State { units: vec![Unit::Absent; units], ..State::default() }
    }

    pub(super) fn is_whole(&self) -> bool {
        self.known.is_some() && self.here == self.units.len()
    }

    /// Nothing of it is certain, and nobody waits for any.
    pub(super) fn is_idle(&self) -> bool {
        self.here == 0 && self.is_at_rest()
    }

    /// Nothing is on its way, and nobody waits for any of it.
    pub(super) fn is_at_rest(&self) -> bool {
        self.flights.is_empty() && self.expected.is_empty()
    }

    pub(super) fn put(&mut self, at: usize, unit: Unit) {
        let counts = |unit| usize::from(matches!(unit, Unit::Here | Unit::Ahead));
        self.here = self.here + counts(unit) - counts(self.units[at]);
        self.units[at] = unit;
    }

    /// Runs of absent units in `range`, which count as asked for from now on.
    pub(super) fn ask(&mut self, range: Range<usize>) -> Vec<Range<usize>> {
        let mut runs = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let run = (at..range.end).take(AT_ONCE).take_while(|at| self.units[*at] == Unit::Absent).count();
            if run > 0 {
                (at..at + run).for_each(|at| self.put(at, Unit::Asked));
                self.flights.push(Flight::of(at..at + run));
                runs.push(at..at + run);
            }
            at += run.max(1);
        }
        runs
    }

    /// The same for units that somebody waits for.
    pub(super) fn ask_now(&mut self, range: Range<usize>) -> Vec<Range<usize>> {
        let runs = self.ask(range);
        self.told &= runs.is_empty();
        runs
    }

    /// True when somebody waits for some of `units`.
    pub(super) fn is_expected(&self, units: &Range<usize>) -> bool {
        self.expected.keys().any(|at| units.contains(at))
    }

    /// Remembers that `units` are queued.
    pub(super) fn queue(&mut self, units: Range<usize>, work: Queued) {
        self.queued.retain(|(_, queued)| queued.is_waiting());
        self.queued.push((units, work));
    }

    /// What is queued and brings some of `wanted`, which now somebody waits for: one who may unpack it where `unpack`.
    pub(super) fn hasten(&mut self, wanted: &Range<usize>, unpack: bool) -> Vec<Work> {
        let concerns = |units: &Range<usize>| units.start < wanted.end && wanted.start < units.end;
        self.queued
            .iter()
            .filter(|(units, _)| concerns(units))
            .filter_map(|(_, queued)| queued.take_now(unpack))
            .collect()
    }

    /// Notes that something came of the flight that has unit `at`.
    pub(super) fn note_moved(&mut self, at: usize) {
        if let Some(flight) = self.flights.iter_mut().find(|flight| flight.has(at)) {
            flight.moved = Instant::now();
        }
    }

    /// When something of `units` came last, if any of it is on its way.
    pub(super) fn moved(&self, units: &Range<usize>) -> Option<Instant> {
        let concerned = |flight: &&Flight| units.clone().any(|at| flight.has(at));
        self.flights.iter().filter(concerned).map(|flight| flight.moved).max()
    }

    /// Unit `at` is not on its way any more.
    pub(super) fn landed(&mut self, at: usize, unit: Unit) {
        self.put(at, unit);
        if let Some(flight) = self.flights.iter_mut().find(|flight| flight.has(at)) {
            flight.up &= !flight.bit(at);
            flight.moved = Instant::now();
        }
        self.flights.retain(|flight| flight.up != 0);
    }

    pub(super) fn expect(&mut self, units: Range<usize>) {
        units.for_each(|at| self.expected.entry(at).or_default().by += 1);
    }

    pub(super) fn expect_no_more(&mut self, units: Range<usize>) {
        for at in units {
            if let Some(expected) = self.expected.get_mut(&at) {
                expected.by -= 1;
                if expected.by == 0 {
                    self.expected.remove(&at);
                }
            }
        }
    }

    /// Asks for absent units of `request` next to `run`, which is on its way: they come by the same request. Returns all
    /// that comes by it then.
    pub(super) fn ask_around(&mut self, run: Range<usize>, request: &Range<usize>) -> Range<usize> {
        // What could not be had is not asked for again for nobody.
        let is_open = |at: &usize| self.units[*at] == Unit::Absent && !self.failed.contains_key(at);
        let before = (request.start..run.start).rev().take_while(is_open).count();
        let behind = (run.end..request.end).take_while(is_open).count();
        self.ask(run.start - before..run.start);
        self.ask(run.end..run.end + behind);
        run.start - before..run.end + behind
    }

    /// What to ask for ahead of a reader that goes through the object and has just read `wanted`.
    pub(super) fn go_on_ahead(&mut self, wanted: &Range<usize>) -> Vec<Range<usize>> {
        if self.told || self.streams.iter().any(|stream| stream.next == wanted.end) {
            return Vec::new(); // or within the unit that was read last
        }
        let goes_on = |stream: &Stream| stream.next > 0 && (stream.next - 1..=stream.next).contains(&wanted.start);
        let Some(at) = self.streams.iter().position(goes_on) else {
            // A new one, in place of the one that went on longest ago.
            self.streams.rotate_right(1);
            self.streams[0] = Stream { next: wanted.end, ..Stream::default() };
            return Vec::new();
        };
        self.streams[..=at].rotate_right(1);
        let stream = &mut self.streams[0];
        stream.next = wanted.end;
        // Many together, when half of what was asked for is used up.
        if wanted.end + stream.window / 2 < stream.ahead {
            return Vec::new();
        }
        stream.window = (stream.window * 2).clamp(2, AHEAD_MAX);
        stream.ahead = (wanted.end + stream.window).min(self.units.len());
        let ahead = wanted.end..stream.ahead;
        self.ask(ahead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_that_take_turns_are_each_followed() {
        let mut state = State::of(1000);
        let mut asked = [0, 0];
        for step in 0..40 {
            for (reader, start) in [(0, 0), (1, 500)] {
                let at = start + step;
                let runs = state.go_on_ahead(&(at..at + 1));
                assert!(runs.iter().all(|run| run.start > at && run.end <= at + 1 + AHEAD_MAX));
                asked[reader] += runs.iter().map(Range::len).sum::<usize>();
            }
        }
        assert!(asked.iter().all(|asked| (40..80).contains(asked)), "{asked:?}");
        // Where it is known what is needed nobody is, until something is missed.
        let mut state = State { told: true, ..State::of(1000) };
        assert!((0..50).all(|at| state.go_on_ahead(&(at..at + 1)).is_empty()));
        assert_eq!(state.ask_now(50..52).first(), Some(&(50..52)));
        assert!((51..60).any(|at| !state.go_on_ahead(&(at..at + 1)).is_empty()));
        // Who jumps about is not followed.
        let mut state = State::of(1000);
        assert!((0..50).all(|n| state.go_on_ahead(&(n * 17 % 999..n * 17 % 999 + 1)).is_empty()));
    }
}
