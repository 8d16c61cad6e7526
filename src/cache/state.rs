//! Where the units of one object are: here, on their way, or neither; and who waits for them.
//!
//! ```text
//! Absent -> Asked -> Here | Ahead | Loose            Unproven -> Here | Absent
//!              \-> Absent, and why: failed            Loose -> Absent
//! ```

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::fetch::AT_ONCE;
use super::units::Known;
use crate::error::Kind;

/// Units asked for ahead of a reader that goes on and on.
const AHEAD_MAX: usize = 32;
/// Units asked for behind one that was not here: programs map libraries, and touch them in patches.
const BEHIND: usize = 3;

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
    /// When something of it came last.
    moved: Instant,
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
    pub(super) expected: HashMap<usize, Expected>,
    /// The unit behind the one that was read last, and how many to ask for ahead.
    next: usize,
    window: usize,
    /// The unit behind those that were asked for ahead.
    ahead: usize,
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
        self.here == 0 && self.flights.is_empty() && self.expected.is_empty()
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
                self.flights.push(Flight { units: at..at + run, moved: Instant::now() });
                runs.push(at..at + run);
            }
            at += run.max(1);
        }
        runs
    }

    /// Notes that something came of the flight that has unit `at`.
    pub(super) fn note_moved(&mut self, at: usize) {
        if let Some(flight) = self.flights.iter_mut().find(|flight| flight.units.contains(&at)) {
            flight.moved = Instant::now();
        }
    }

    /// When something of `units` came last, if any of it is on its way.
    pub(super) fn moved(&self, units: &Range<usize>) -> Option<Instant> {
        let concerned = |flight: &&Flight| flight.units.start < units.end && units.start < flight.units.end;
        self.flights.iter().filter(concerned).map(|flight| flight.moved).max()
    }

    /// Unit `at` is not on its way any more.
    pub(super) fn landed(&mut self, at: usize, unit: Unit) {
        self.put(at, unit);
        if let Some(flight) = self.flights.iter_mut().find(|flight| flight.units.contains(&at)) {
            // They land in order.
            flight.units.start = at + 1;
            flight.moved = Instant::now();
        }
        self.flights.retain(|flight| !flight.units.is_empty());
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

    /// What to ask for together with `wanted`, which are not all here; nothing of it is waited for.
    pub(super) fn ask_behind(&mut self, wanted: &Range<usize>) -> Vec<Range<usize>> {
        let end = (wanted.end + BEHIND.max(self.window)).min(self.units.len());
        self.ask(wanted.end..end)
    }

    /// What to ask for ahead of a reader that goes through the object and has just read `wanted`.
    pub(super) fn go_on_ahead(&mut self, wanted: &Range<usize>) -> Vec<Range<usize>> {
        if wanted.end == self.next {
            return Vec::new(); // within the unit that was read last
        }
        let goes_on = wanted.start > 0 && (wanted.start == self.next || wanted.start + 1 == self.next);
        self.next = wanted.end;
        if !goes_on {
            (self.window, self.ahead) = (0, 0);
            return Vec::new();
        }
        // Many together, when half of what was asked for is used up.
        if wanted.end + self.window / 2 < self.ahead {
            return Vec::new();
        }
        self.window = (self.window * 2).clamp(2, AHEAD_MAX);
        self.ahead = (wanted.end + self.window).min(self.units.len());
        self.ask(wanted.end..self.ahead)
    }
}
