//! The names outside versions: which workflows, nodes and versions there are, and which version is current.
//!
//! They come from the store and are kept in memory: an answer is fresh for [`FRESH`], then the store is asked again by
//! whoever needs it next. When the store cannot be read, the last answer stays, nothing counts as changed, and the log
//! is told once ([`Outage`]). Every change that a reading brings to
//! light is queued for whoever tells the kernel ([`Names::take_changes`]), and lets the modification time of the
//! directory that shows it grow.
//!
//! **Removed environments** are in no listing. But one of whose versions this mount has shown something may be in use,
//! and its paths keep working with the version that was current last, until unmount: `remove` never breaks a running
//! job.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::environment::{EnvName, Version};
use crate::error::{Error, Kind, Result};
use crate::store::{Store, in_parallel};

/// How long an answer of the store is repeated without asking again.
pub const FRESH: Duration = Duration::from_millis(250);

/// How long after the last question a name is watched for changes.
pub const WATCHED: Duration = Duration::from_secs(5);

/// So many nodes of a workflow are looked at before the way to one of them is shown; more are looked at afterwards.
const WAITED_FOR: usize = 64;

/// A point in time, seconds and nanoseconds since 1970.
pub type Time = (i64, u32);

/// Something outside versions that changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NameChange {
    /// The list of workflows.
    Workflows,
    /// The nodes of a workflow.
    Nodes(String),
    /// Which version of an environment is current.
    Current(EnvName),
    /// The versions of an environment.
    Versions(EnvName),
}

/// An answer with the modification time of the directory that shows it.
#[derive(Debug, Clone)]
pub(super) struct Known<T> {
    pub(super) value: Arc<T>,
    pub(super) mtime: Time,
}

#[derive(Debug)]
struct Cell<T> {
    value: Arc<T>,
    mtime: Time,
    /// When it was last seen to be so.
    read: Instant,
    /// When it was last read as a whole.
    whole: Instant,
    asked: Instant,
    /// The last reading failed.
    failing: bool,
}

/// Whether the store answers, so that an outage is told once and not several times a second.
#[derive(Debug, Default)]
struct Outage {
    /// Something that could be read before cannot be read now.
    on: AtomicBool,
}

impl Outage {
    /// A reading failed; true when that is to be told: the first failure of all.
    fn begins(&self, was_failing: bool) -> bool {
        // What goes on failing while the rest is read (one damaged document) is no outage.
        !was_failing && !self.on.swap(true, Ordering::Relaxed)
    }

    /// A reading succeeded; true when that ends what was told.
    fn ends(&self, was_failing: bool) -> bool {
        self.on.swap(false, Ordering::Relaxed) && was_failing
    }
}

/// Answers by key. A cell's own lock is held while the store is read, so that only those wait who ask for the same.
#[derive(Debug)]
struct Cells<K, T> {
    map: Mutex<HashMap<K, Arc<Mutex<Cell<T>>>>>,
    /// The first modification time of all directories, where some are shown before they are read.
    since: Option<Time>,
}

/// How old an answer may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Age {
    /// [`FRESH`].
    Fresh,
    /// Any; [`Names::refresh`] sees to it that it does not grow old.
    Any,
    /// None at all: before a name is said not to be there, the store is asked.
    Now,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn time_now() -> Time {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (now.as_secs() as i64, now.subsec_nanos())
}

/// The time now, or the smallest step behind `before` where the clock stands still or went back.
fn later_than(before: Time) -> Time {
    let next = if before.1 < 999_999_999 { (before.0, before.1 + 1) } else { (before.0 + 1, 0) };
    time_now().max(next)
}

/// True when a directory of the store that had something is empty or not there. Nothing in it goes when an environment
/// is removed, which is only written down: so the directory itself is away.
fn is_away<T>(now: &[T], before: Option<&Vec<T>>) -> bool {
    now.is_empty() && before.is_some_and(|before| !before.is_empty())
}

impl<K: Clone + Eq + Hash, T: PartialEq> Cells<K, T> {
    fn new() -> Self {
        Cells { map: Mutex::default(), since: None }
    }

    /// The answer for `key`, where it was read as a whole within `age` and `holds` says that it is the same now.
    fn confirm(&self, key: &K, age: Duration, holds: impl FnOnce(&T) -> bool) -> Option<Known<T>> {
        let cell = lock(&self.map).get(key).cloned()?;
        let mut cell = lock(&cell);
        if cell.whole.elapsed() >= age || !holds(&cell.value) {
            return None;
        }
        cell.read = Instant::now();
        Some(Known { value: cell.value.clone(), mtime: cell.mtime })
    }

    fn keys_asked_since(&self, since: Instant) -> Vec<K> {
        let map = lock(&self.map);
        let asked = |cell: &Arc<Mutex<Cell<T>>>| cell.try_lock().is_ok_and(|c| c.asked >= since);
        map.iter().filter(|(_, cell)| asked(cell)).map(|(key, _)| key.clone()).collect()
    }

    /// The answer for `key`. `read` asks the store; its none means that there is no such thing, and is not kept.
    /// `ask` is false when nobody but the refresher wants to know.
    fn get(
        &self,
        key: &K,
        age: Age,
        ask: bool,
        outage: &Outage,
        read: impl FnOnce(Option<&T>) -> Result<Option<T>>,
        changed: impl FnOnce(),
    ) -> Result<Option<Known<T>>> {
        let cell = lock(&self.map).get(key).cloned();
        let Some(cell) = cell else {
            let Some(value) = read(None)? else { return Ok(None) };
            let now = Instant::now();
            let cell = Cell {
                value: Arc::new(value),
                mtime: self.since.unwrap_or_else(time_now),
                read: now,
                whole: now,
                asked: now,
                failing: false,
            };
            // Whoever came first is kept, so that everyone is told the same time.
            let kept = lock(&self.map).entry(key.clone()).or_insert_with(|| Arc::new(Mutex::new(cell))).clone();
            let kept = lock(&kept);
            return Ok(Some(Known { value: kept.value.clone(), mtime: kept.mtime }));
        };
        let mut cell = lock(&cell);
        if ask {
            cell.asked = Instant::now();
        }
        if age == Age::Now || (age == Age::Fresh && cell.read.elapsed() >= FRESH) {
            match read(Some(&cell.value)) {
                // A directory that is not there (any more) says nothing about the store.
                Ok(None) => {}
                Ok(Some(value)) => {
                    if value != *cell.value {
                        cell.value = Arc::new(value);
                        cell.mtime = later_than(cell.mtime);
                        changed();
                    }
                    if outage.ends(cell.failing) {
                        tracing::warn!("the store answers again");
                    }
                    cell.failing = false;
                }
                Err(error) => {
                    if outage.begins(cell.failing) {
                        let error = error.chain();
                        tracing::warn!(error, "the store does not answer; the names known last are shown");
                    }
                    cell.failing = true;
                }
            }
            (cell.read, cell.whole) = (Instant::now(), Instant::now());
        }
        Ok(Some(Known { value: cell.value.clone(), mtime: cell.mtime }))
    }
}

/// An environment as its directory shows it.
#[derive(Debug, Clone)]
pub(super) struct Env {
    /// The version that the links lead to.
    pub(super) current: u64,
    /// False when it was removed and only stays reachable.
    pub(super) listed: bool,
    pub(super) mtime: Time,
}

/// What an environment's pointer said, and says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pointed {
    now: Option<u64>,
    last: Option<u64>,
    /// Of the pointer that said so; only grows.
    sequence: u64,
}

#[derive(Debug)]
enum Source {
    Store(Store),
    Draft(Box<Version>),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Names {
    source: Source,
    workflows: Cells<(), Vec<String>>,
    nodes: Cells<String, Vec<String>>,
    pointers: Cells<EnvName, Pointed>,
    versions: Cells<EnvName, Vec<u64>>,
    /// A live environment of each workflow, so that one look answers whether the workflow is there.
    witness: Mutex<HashMap<String, EnvName>>,
    /// Environments of which a version was shown.
    used: Mutex<HashSet<EnvName>>,
    changes: Mutex<Vec<NameChange>>,
    outage: Outage,
    begun: Time,
    /// Workflows that were shown before their nodes were read.
    uncounted: Mutex<HashSet<String>>,
    /// When the store was last seen to be itself.
    checked: Mutex<Option<Instant>>,
    /// Environments that could not be read when they were to be listed first, and that was told.
    unreadable: Mutex<HashSet<EnvName>>,
}

impl Names {
    pub(super) fn of_store(store: Store) -> Self {
        Names::new(Source::Store(store))
    }

    /// Names of one version that is not published.
    pub(super) fn of_draft(draft: Version) -> Self {
        Names::new(Source::Draft(Box::new(draft)))
    }

    fn new(source: Source) -> Self {
        let begun = time_now();
        Names {
            source,
            workflows: Cells::new(),
            nodes: Cells { since: Some(begun), ..Cells::new() },
            pointers: Cells::new(),
            versions: Cells::new(),
            witness: Mutex::default(),
            used: Mutex::default(),
            changes: Mutex::default(),
            outage: Outage::default(),
            begun,
            uncounted: Mutex::default(),
            checked: Mutex::new(None),
            unreadable: Mutex::default(),
        }
    }

    fn note(&self, change: NameChange) {
        let mut changes = lock(&self.changes);
        if !changes.contains(&change) {
            changes.push(change);
        }
    }

    /// What changed since the last call.
    pub(super) fn take_changes(&self) -> Vec<NameChange> {
        let mut changes = std::mem::take(&mut *lock(&self.changes));
        // Who sees a link change finds the version that it leads to.
        changes.sort_by_key(|change| matches!(change, NameChange::Current(_)));
        changes
    }

    /// Asks the store again for everything that somebody asked for within [`WATCHED`].
    /// False when there was nothing.
    pub(super) fn refresh(&self) -> bool {
        for workflow in std::mem::take(&mut *lock(&self.uncounted)) {
            let _ = self.nodes_asked(&workflow, Age::Fresh, false);
        }
        let Some(since) = Instant::now().checked_sub(WATCHED) else { return true };
        let workflows = self.workflows.keys_asked_since(since);
        let nodes = self.nodes.keys_asked_since(since);
        let pointers = self.pointers.keys_asked_since(since);
        let versions = self.versions.keys_asked_since(since);
        // What fails is logged and tried again next time.
        workflows.iter().for_each(|()| drop(self.workflows_asked(Age::Fresh, false)));
        nodes.iter().for_each(|workflow| drop(self.nodes_asked(workflow, Age::Fresh, false)));
        in_parallel(&pointers, |name| drop(self.env_asked(name, Age::Fresh, false)));
        versions.iter().for_each(|name| drop(self.versions_asked(name, Age::Fresh, false)));
        !(workflows.is_empty() && nodes.is_empty() && pointers.is_empty() && versions.is_empty())
    }

    /// `store`, where it is still the one that was mounted; asked once in a while.
    fn present<'s>(&self, store: &'s Store) -> Result<&'s Store> {
        let mut checked = lock(&self.checked);
        if checked.is_none_or(|at| at.elapsed() >= FRESH) {
            store.require_present()?;
            *checked = Some(Instant::now());
        }
        Ok(store)
    }

    /// The workflows to list.
    pub(super) fn workflows(&self, age: Age) -> Result<Known<Vec<String>>> {
        self.workflows_asked(age, true)
    }

    fn workflows_asked(&self, age: Age, ask: bool) -> Result<Known<Vec<String>>> {
        let read = |before: Option<&Vec<String>>| {
            Ok(Some(match &self.source {
                Source::Draft(draft) => vec![draft.environment.workflow().to_string()],
                Source::Store(store) => {
                    let mut names = self.present(store)?.workflows()?;
                    if is_away(&names, before) {
                        return Ok(None);
                    }
                    names.retain(|name| self.has_listed_node(name, Age::Fresh, ask).unwrap_or(true));
                    names
                }
            }))
        };
        let known = self.workflows.get(&(), age, ask, &self.outage, read, || self.note(NameChange::Workflows))?;
        Ok(known.unwrap_or_else(|| Known { value: Arc::new(Vec::new()), mtime: (0, 0) }))
    }

    /// The nodes of `workflow` to list.
    pub(super) fn nodes(&self, workflow: &str, age: Age) -> Result<Known<Vec<String>>> {
        self.nodes_asked(workflow, age, true)
    }

    /// The nodes of `workflow` where they were read before, or where they are few; else none, and [`Names::refresh`] reads
    /// them: until then its directory has the time [`Names::begun`].
    pub(super) fn nodes_if_read(&self, workflow: &str) -> Result<Option<Known<Vec<String>>>> {
        let read = lock(&self.nodes.map).contains_key(workflow);
        let few = || match &self.source {
            Source::Draft(_) => Ok(true),
            Source::Store(store) => store.nodes(workflow).map(|nodes| nodes.len() <= WAITED_FOR),
        };
        if read || few()? {
            return self.nodes(workflow, Age::Any).map(Some);
        }
        let mut uncounted = lock(&self.uncounted);
        if !uncounted.contains(workflow) {
            uncounted.insert(workflow.into());
        }
        Ok(None)
    }

    /// When these names began: no directory has an earlier time.
    pub(super) fn begun(&self) -> Time {
        self.begun
    }

    fn nodes_asked(&self, workflow: &str, age: Age, ask: bool) -> Result<Known<Vec<String>>> {
        let read = |before: Option<&Vec<String>>| {
            Ok(Some(match &self.source {
                Source::Draft(draft) => vec![draft.environment.node().to_string()],
                Source::Store(store) => {
                    let names = self.present(store)?.nodes(workflow)?;
                    if is_away(&names, before) {
                        return Ok(None);
                    }
                    // Not asked on behalf of each node: only the listing is watched.
                    let listed = in_parallel(&names, |node| self.is_listed(workflow, node, Age::Fresh, false));
                    names.into_iter().zip(listed).filter_map(|(name, listed)| listed.then_some(name)).collect()
                }
            }))
        };
        let changed = || self.note(NameChange::Nodes(workflow.into()));
        let known = self.nodes.get(&workflow.to_string(), age, ask, &self.outage, read, changed)?;
        Ok(known.unwrap_or_else(|| Known { value: Arc::new(Vec::new()), mtime: (0, 0) }))
    }

    fn is_listed(&self, workflow: &str, node: &str, age: Age, ask: bool) -> bool {
        let Ok(name) = EnvName::new(workflow, node) else { return false };
        match self.env_asked(&name, age, ask) {
            Ok(env) => {
                let mut unreadable = lock(&self.unreadable);
                if !unreadable.is_empty() {
                    unreadable.remove(&name);
                }
                env.is_some_and(|env| env.listed)
            }
            Err(error) => {
                // Asked again with every listing.
                if lock(&self.unreadable).insert(name.clone()) {
                    tracing::warn!(environment = %name, error = error.chain(), "an environment cannot be listed");
                }
                false
            }
        }
    }

    fn has_listed_node(&self, workflow: &str, age: Age, ask: bool) -> Result<bool> {
        let Source::Store(store) = &self.source else { return Ok(true) };
        let witness = lock(&self.witness).get(workflow).cloned();
        if witness.is_some_and(|name| self.is_listed(workflow, name.node(), age, ask)) {
            return Ok(true);
        }
        for node in self.present(store)?.nodes(workflow)? {
            if self.is_listed(workflow, &node, age, ask) {
                let name = EnvName::new(workflow, &node)?;
                lock(&self.witness).insert(workflow.into(), name);
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// True when directory `workflow` is to be found.
    pub(super) fn has_workflow(&self, workflow: &str) -> Result<bool> {
        match &self.source {
            Source::Draft(draft) => Ok(draft.environment.workflow() == workflow),
            Source::Store(_) => Ok(self.has_listed_node(workflow, Age::Fresh, true)?
                || lock(&self.used).iter().any(|name| name.workflow() == workflow)
                || self.has_listed_node(workflow, Age::Now, true)?),
        }
    }

    /// The environment `name`, where it is to be found.
    pub(super) fn env(&self, name: &EnvName, age: Age) -> Result<Option<Env>> {
        match self.env_asked(name, age, true)? {
            None if age == Age::Fresh => self.env_asked(name, Age::Now, true),
            found => Ok(found),
        }
    }

    fn env_asked(&self, name: &EnvName, age: Age, ask: bool) -> Result<Option<Env>> {
        let read = |before: Option<&Pointed>| match &self.source {
            Source::Draft(draft) => {
                let number = Some(draft.number).filter(|_| draft.environment == *name);
                Ok(number.map(|n| Pointed { now: Some(n), last: Some(n), sequence: 1 }))
            }
            Source::Store(store) => {
                let Some(pointer) = self.present(store)?.pointer(name)? else { return Ok(None) };
                // Where a newer one was seen, its directory is away, not the pointer withdrawn.
                if before.is_some_and(|before| before.sequence > pointer.sequence) {
                    return Ok(None);
                }
                let (now, last) = (pointer.version, before.and_then(|b| b.last));
                Ok(Some(Pointed { now, last: now.or(last), sequence: pointer.sequence }))
            }
        };
        let changed = || self.note(NameChange::Current(name.clone()));
        let unmoved = if ask { None } else { self.unmoved(name) };
        let known = match unmoved {
            None => self.pointers.get(name, age, ask, &self.outage, read, changed)?,
            known => known,
        };
        let Some(known) = known else { return Ok(None) };
        let listed = known.value.now.is_some();
        let current = known.value.last.filter(|_| listed || lock(&self.used).contains(name));
        Ok(current.map(|current| Env { current, listed, mtime: known.mtime }))
    }

    /// What is known of the pointer of `name`, where it was read within [`WATCHED`] and the next one is not there: one
    /// question to the store instead of several, for thousands of names that nobody asks for but a listing.
    fn unmoved(&self, name: &EnvName) -> Option<Known<Pointed>> {
        let Source::Store(store) = &self.source else { return None };
        self.present(store).ok()?;
        self.pointers.confirm(name, WATCHED, |pointed| !store.may_have_pointer(name, pointed.sequence + 1))
    }

    /// The numbers of the versions of `name`, ascending.
    pub(super) fn versions(&self, name: &EnvName, age: Age) -> Result<Known<Vec<u64>>> {
        self.versions_asked(name, age, true)
    }

    fn versions_asked(&self, name: &EnvName, age: Age, ask: bool) -> Result<Known<Vec<u64>>> {
        let read = |before: Option<&Vec<u64>>| {
            let numbers = match &self.source {
                Source::Draft(draft) => vec![draft.number],
                Source::Store(store) => self.present(store)?.version_numbers(name)?,
            };
            let away = is_away(&numbers, before);
            Ok(Some(numbers).filter(|_| !away))
        };
        let changed = || self.note(NameChange::Versions(name.clone()));
        let known = self.versions.get(name, age, ask, &self.outage, read, changed)?;
        Ok(known.unwrap_or_else(|| Known { value: Arc::new(Vec::new()), mtime: (0, 0) }))
    }

    /// The document of a version, read from the store now.
    pub(super) fn version(&self, name: &EnvName, number: u64) -> Result<Version> {
        match &self.source {
            Source::Draft(draft) if draft.environment == *name && draft.number == number => Ok((**draft).clone()),
            Source::Draft(_) => Err(Error::new(Kind::NotFound, format!("{name} has no version {number} here"))),
            Source::Store(store) => store.version(name, number),
        }
    }

    /// Says that a version of `name` was shown: from now on its paths stay, even if it is removed.
    pub(super) fn mark_used(&self, name: &EnvName) {
        let mut used = lock(&self.used);
        if !used.contains(name) {
            used.insert(name.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modification_times_grow_strictly_even_when_the_clock_does_not() {
        let far = (i64::MAX - 10, 999_999_999);
        assert_eq!(later_than(far), (i64::MAX - 9, 0));
        assert_eq!(later_than((i64::MAX - 10, 5)), (i64::MAX - 10, 6));
        assert!(later_than((5, 5)) > (1_000_000_000, 0));
    }

    #[test]
    fn an_answer_stays_when_the_store_does_not_answer() {
        let cells: Cells<u8, u32> = Cells::new();
        let outage = Outage::default();
        let get = |answer: Result<Option<u32>>| {
            let mut changed = false;
            let stale = Instant::now().checked_sub(FRESH * 2).unwrap();
            if let Some(cell) = lock(&cells.map).get(&1) {
                lock(cell).read = stale;
            }
            let known = cells.get(&1, Age::Fresh, true, &outage, |_| answer, || changed = true);
            (known.ok().flatten().map(|k| (*k.value, k.mtime)), changed)
        };
        let failed = || Err(Error::new(Kind::Os(libc::EIO), "no"));
        assert_eq!(get(failed()), (None, false));
        assert_eq!(get(Ok(None)), (None, false));
        let (first, _) = get(Ok(Some(1)));
        assert_eq!(get(failed()), (first, false));
        assert_eq!(get(Ok(Some(1))), (first, false));
        let (second, changed) = get(Ok(Some(2)));
        assert!(changed && second.unwrap().1 > first.unwrap().1);
        assert_eq!(
            cells.get(&1, Age::Fresh, true, &outage, |_| panic!("it is fresh"), || ()).unwrap().unwrap().value,
            2.into()
        );
    }

    #[test]
    fn an_outage_is_told_once_and_so_is_its_end() {
        let outage = Outage::default();
        // Two names, each asked many times; then the store is back; then the same once more.
        for _ in 0..2 {
            let told = (0..10).map(|i| (outage.begins(i > 0), outage.begins(i > 0))).filter(|t| *t != (false, false));
            assert_eq!(told.collect::<Vec<_>>(), [(true, false)]);
            assert_eq!([outage.ends(true), outage.ends(true), outage.ends(false)], [true, false, false]);
        }
        // One name that always fails among others that do not.
        let told = (0..10).map(|i| (outage.begins(i > 0), outage.ends(false))).filter(|(begins, _)| *begins);
        assert_eq!(told.count(), 1);
    }
}
