//! What goes wrong: rules that are asked once for every call, and calls that hang.
//!
//! A hung call is parked as a closure and holds no thread, so any number may hang while others are served.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use crate::calls::Call;

/// What a rule does to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    Fail(Errno),
    /// Whatever needs room fails with ENOSPC.
    Full,
    /// A READ returns half of what it should.
    Truncate,
    /// A READ comes back with bit 0 of its middle byte flipped.
    Flip,
}

impl Effect {
    fn concerns(self, call: Call) -> bool {
        match self {
            Effect::Fail(_) => true,
            Effect::Full => call.needs_space(),
            Effect::Truncate | Effect::Flip => call == Call::Read,
        }
    }
}

/// Which calls are meant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Which {
    /// A part of the path; none: all paths.
    pub(crate) pattern: Option<String>,
    /// Empty: all kinds.
    pub(crate) calls: Vec<Call>,
}

impl Which {
    fn takes(&self, call: Call, paths: &[String]) -> bool {
        (self.calls.is_empty() || self.calls.contains(&call)) && self.names(paths)
    }

    fn names(&self, paths: &[String]) -> bool {
        self.pattern.as_ref().is_none_or(|pattern| paths.iter().any(|path| path.contains(pattern.as_str())))
    }
}

#[derive(Debug)]
struct Rule {
    effect: Effect,
    which: Which,
    /// How many more calls; none: until `heal`.
    left: Option<u64>,
}

/// How a call shall come out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Well,
    Fail(Errno),
    Truncated,
    Flipped,
}

struct Parked {
    call: Call,
    paths: Vec<String>,
    go_on: Box<dyn FnOnce(Outcome) + Send>,
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    hangs: Vec<Which>,
    parked: Vec<Parked>,
    closed: bool,
}

/// The faults that are set, and whoever hangs.
#[derive(Default)]
pub(crate) struct Faults {
    /// False: no call need ask.
    any: AtomicBool,
    state: Mutex<State>,
}

/// A place among the hung, for a call that has to take it.
pub(crate) struct Place<'a> {
    state: MutexGuard<'a, State>,
    call: Call,
    paths: Vec<String>,
}

impl Place<'_> {
    /// `go_on` is called once: after `resume`, or with an error at the end.
    pub(crate) fn park(mut self, go_on: impl FnOnce(Outcome) + Send + 'static) {
        let parked = Parked { call: self.call, paths: self.paths, go_on: Box::new(go_on) };
        self.state.parked.push(parked);
    }
}

impl Faults {
    pub(crate) fn set(&self, effect: Effect, which: Which, left: Option<u64>) {
        self.change(|state| state.rules.push(Rule { effect, which, left }));
    }

    pub(crate) fn hang(&self, which: Which) {
        self.change(|state| state.hangs.push(which));
    }

    /// Where a call has to wait, if it hangs.
    pub(crate) fn place(&self, call: Call, paths: impl FnOnce() -> Vec<String>) -> Option<Place<'_>> {
        if !self.any.load(Ordering::SeqCst) {
            return None;
        }
        let paths = paths();
        let state = self.state();
        let hangs = state.hangs.iter().any(|which| which.takes(call, &paths));
        hangs.then_some(Place { state, call, paths })
    }

    /// How a call shall come out. Uses up one of a rule's calls.
    pub(crate) fn outcome(&self, call: Call, paths: impl FnOnce() -> Vec<String>) -> Outcome {
        if !self.any.load(Ordering::SeqCst) {
            return Outcome::Well;
        }
        let paths = paths();
        let mut state = self.state();
        if state.closed {
            return Outcome::Fail(Errno::EIO);
        }
        let of = |rule: &&mut Rule| rule.effect.concerns(call) && rule.which.takes(call, &paths);
        let Some(rule) = state.rules.iter_mut().find(of) else { return Outcome::Well };
        let effect = rule.effect;
        if let Some(left) = &mut rule.left {
            *left -= 1;
            self.tidy(&mut state);
        }
        match effect {
            Effect::Fail(errno) => Outcome::Fail(errno),
            Effect::Full => Outcome::Fail(Errno::ENOSPC),
            Effect::Truncate => Outcome::Truncated,
            Effect::Flip => Outcome::Flipped,
        }
    }

    /// True when reads of this path do not return what is there, so that the kernel must not keep it.
    pub(crate) fn distort(&self, path: &str) -> bool {
        let distorts = |rule: &Rule| {
            matches!(rule.effect, Effect::Truncate | Effect::Flip) && rule.which.names(&[path.to_string()])
        };
        self.any.load(Ordering::SeqCst) && self.state().rules.iter().any(distorts)
    }

    /// How many calls hang.
    pub(crate) fn hung(&self) -> usize {
        self.state().parked.len()
    }

    /// Lets the hung go on, and hangs no more.
    pub(crate) fn resume(self: &Arc<Self>) {
        let parked = self.change(|state| {
            state.hangs.clear();
            std::mem::take(&mut state.parked)
        });
        let faults = self.clone();
        go_on(parked, move |call, paths| faults.outcome(call, || paths));
    }

    /// Takes everything back that was set.
    pub(crate) fn heal(self: &Arc<Self>) {
        self.change(|state| state.rules.clear());
        self.resume();
    }

    /// The hung fail, and so does whatever would hang.
    pub(crate) fn abandon_hung(&self) {
        let parked = self.change(|state| {
            // The kernel asks again for what it could not read ahead.
            let hangs = state.hangs.drain(..);
            let instead = hangs.map(|which| Rule { effect: Effect::Fail(Errno::EIO), which, left: None });
            state.rules.splice(..0, instead);
            std::mem::take(&mut state.parked)
        });
        go_on(parked, |_, _| Outcome::Fail(Errno::EIO));
    }

    /// From now on every call fails.
    pub(crate) fn close(&self) {
        self.change(|state| state.closed = true);
        self.abandon_hung();
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state();
        let changed = change(&mut state);
        self.tidy(&mut state);
        changed
    }

    fn tidy(&self, state: &mut State) {
        state.rules.retain(|rule| rule.left != Some(0));
        let any = !state.rules.is_empty() || !state.hangs.is_empty() || state.closed;
        self.any.store(any, Ordering::SeqCst);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Threads that let parked calls go on: their transfers still have to wait for the line, one thread each.
const RESUMING: usize = 16;

fn go_on(parked: Vec<Parked>, outcome: impl Fn(Call, Vec<String>) -> Outcome + Send + Sync + 'static) {
    let threads = parked.len().min(RESUMING);
    let queue = Arc::new(Mutex::new(VecDeque::from(parked)));
    let outcome = Arc::new(outcome);
    for _ in 0..threads {
        let (queue, outcome) = (queue.clone(), outcome.clone());
        let next = move || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let work = move || {
            while let Some(parked) = next() {
                (parked.go_on)(outcome(parked.call, parked.paths));
            }
        };
        // Without a thread a call is dropped with the queue, which answers it with EIO.
        let _ = std::thread::Builder::new().name("resumed".into()).spawn(work);
    }
}
