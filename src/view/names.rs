//! The names outside versions: which workflows, nodes and versions there are, and which version is current.
//!
//! They come from the store and are kept in memory: an answer is fresh for [`FRESH`], then the store is asked again by
//! whoever needs it next. When the store cannot be read, the last answer stays, nothing counts as changed, and the log
//! is told once ([`Outage`]). Every change that a reading brings to
//! light is queued for whoever tells the kernel ([`Names::take_changes`]), and lets the modification time of the
//! directory that shows it grow.
//!
//! **A distant store** may hang. Each question to it is asked by a thread that is left alone when it does, and that keeps
//! the answer even when nobody waits for it any more. Whoever waits does so for a limited time and holds no lock. What
//! was not answered in time counts as unchanged, and until the store answers again all that is known is told at once; a
//! probe that is always under way then notices when it does.
//!
//! **Removed environments** are in no listing. But one of whose versions this mount has shown something may be in use,
//! and its paths keep working with the version that was current last, until unmount: `remove` never breaks a running
//! job.

mod cells;
mod sorts;

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::keys::WasCurrent;
use super::slots::Slots;
use crate::environment::{EnvName, Owner, Version};
use crate::error::{Error, Kind, Result};
use crate::patience::{self, Answered, Flights};
use crate::store::{Store, in_parallel};
pub(super) use cells::{Age, Known};
use cells::{Cells, Outage, lock, time_now};
use sorts::{Nodes, Owners, Pointers, Sort, Versions, Workflows};

/// How long an answer of the store is repeated without asking again.
pub const FRESH: Duration = Duration::from_millis(250);

/// How long the store counts as itself after it was seen to be.
const SEEN: Duration = Duration::from_millis(500);

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
    /// Who may look at a workflow.
    Owner(String),
}

/// Whose a workflow is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    /// Of everybody who is let into the mount.
    Everybodys,
    /// This user's and group's.
    Of(Owner),
    /// It cannot be told: it is for root and who mounted alone.
    Nobodys,
}

/// Who may look at a workflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) whose: Whose,
    /// Of the document that says so; 0 for none.
    sequence: u64,
}

impl Access {
    /// Nothing was said.
    const OPEN: Access = Access { whose: Whose::Everybodys, sequence: 0 };
}

/// Whether a workflow has an environment to list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Live {
    Yes,
    /// It has some, and none is to be listed.
    No,
    /// It has some, and what they are cannot be told of some.
    Unknown,
    /// It never had any.
    Never,
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
    owners: Cells<String, Access>,
    /// A live environment of each workflow, so that one look answers whether the workflow is there.
    witness: Mutex<HashMap<String, EnvName>>,
    /// Environments of which a version was shown.
    used: Mutex<HashSet<EnvName>>,
    /// Which of their versions were current, for processes that serve the mount after this one.
    shown: OnceLock<Slots<WasCurrent>>,
    /// The version of each that was current last, as processes before this one saw it.
    before: OnceLock<HashMap<EnvName, u64>>,
    changes: Mutex<Vec<NameChange>>,
    outage: Outage,
    begun: Time,
    /// Workflows that were shown before their nodes were read.
    uncounted: Mutex<HashSet<String>>,
    /// When the store was last seen to be itself, and whether anything may be said of owners there.
    checked: Mutex<Option<(Instant, bool)>>,
    /// Environments that could not be read when they were to be listed first, and that was told.
    unreadable: Mutex<HashSet<EnvName>>,
    /// Where the store is distant: how long it is waited for.
    limit: OnceLock<Duration>,
    /// Questions to a distant store whose answers are not kept here: whether a workflow has an environment, what
    /// a version's document says, whether the store is there.
    witnesses: Flights<String, Live>,
    documents: Flights<(EnvName, u64), Option<Version>>,
    probes: Flights<(), ()>,
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
            workflows: Cells::new(Some(begun)),
            nodes: Cells::new(Some(begun)),
            pointers: Cells::new(None),
            versions: Cells::new(Some(begun)),
            owners: Cells::new(Some(begun)),
            witness: Mutex::default(),
            used: Mutex::default(),
            shown: OnceLock::new(),
            before: OnceLock::new(),
            changes: Mutex::default(),
            outage: Outage::default(),
            begun,
            uncounted: Mutex::default(),
            checked: Mutex::new(None),
            unreadable: Mutex::default(),
            limit: OnceLock::new(),
            witnesses: Flights::default(),
            documents: Flights::default(),
            probes: Flights::default(),
        }
    }

    /// Says that the store is distant, and is to be waited for no longer than `limit`.
    pub(super) fn set_distant(&self, limit: Duration) {
        // It is said once.
        let _ = self.limit.set(limit);
    }

    /// The store where it is distant, and how long it is waited for.
    fn distant(&self) -> Option<(&Store, Duration)> {
        match &self.source {
            Source::Store(store) => self.limit.get().map(|limit| (store, *limit)),
            Source::Draft(_) => None,
        }
    }

    /// True while the store does not answer.
    pub(super) fn are_cut_off(&self) -> bool {
        self.outage.is_on()
    }

    /// The answer for `key`; see [`Cells::get`].
    fn asked<S: Sort>(self: &Arc<Self>, key: &S::Key, age: Age, ask: bool) -> Result<Option<Known<S::Value>>> {
        let cells = S::cells(self);
        let Some((_, limit)) = self.distant() else {
            let unmoved = if ask { None } else { S::unmoved(self, key) };
            if unmoved.is_some() {
                return Ok(unmoved);
            }
            let read = |before: Option<&S::Value>| S::read(self, key, before, ask);
            return cells.get(key, age, ask, &self.outage, read, || self.note(S::change(key)));
        };
        let known = match cells.look(key, age, ask) {
            Some((known, enough)) if enough || self.outage.is_on() || cells.flights.is_late(key) => {
                return Ok(Some(known));
            }
            known => known.map(|(known, _)| known),
        };
        // What was being read already may be older than the question.
        let settled = |answer: &Option<_>| age == Age::Fresh && answer.is_some();
        let read = || {
            let (names, key) = (self.clone(), key.clone());
            move || names.read::<S>(&key, ask)
        };
        match self.question(&cells.flights, key, limit, settled, read) {
            Err(error) if error.kind() == Kind::WouldWait => Err(error),
            Err(error) => {
                if error.kind() == Kind::TimedOut {
                    cells.fails(key);
                }
                known.map(Some).ok_or(error)
            }
            answer => answer,
        }
    }

    /// Reads from a distant store, which may hang, and keeps the answer.
    fn read<S: Sort>(self: &Arc<Self>, key: &S::Key, ask: bool) -> Result<Option<Known<S::Value>>> {
        let cells = S::cells(self);
        let known = match S::unmoved(self, key) {
            None => {
                let begun = Instant::now();
                let before = cells.look(key, Age::Any, false).map(|(known, _)| known.value);
                let answer = S::read(self, key, before.as_deref(), ask);
                cells.keep(key, begun, ask, answer, &self.outage, || self.note(S::change(key)))
            }
            known => Ok(known),
        };
        patience::progress();
        known
    }

    /// Asks a distant store, or waits for the answer that others wait for, where that is `settled`.
    fn question<K, T, W>(
        self: &Arc<Self>,
        flights: &Flights<K, T>,
        key: &K,
        limit: Duration,
        settled: impl Fn(&T) -> bool,
        what: impl Fn() -> W,
    ) -> Result<T>
    where
        K: Clone + Eq + Hash + Send + 'static,
        T: Clone + Send + 'static,
        W: FnOnce() -> Result<T> + Send + 'static,
    {
        if !patience::may_wait() {
            return Err(patience::would_wait());
        }
        // Of a store that does not answer nothing more is asked: each question may cost a thread.
        if self.outage.is_on() && !patience::asks() {
            self.probes.ask(&(), limit, self.probing())?;
        }
        let was_late = flights.is_late(key);
        let answered = match flights.ask(key, limit, what()) {
            Ok(Answered { answer, anew: false }) if !settled(&answer) => flights.ask(key, limit, what()),
            answered => answered,
        };
        answered.map(|answered| answered.answer).inspect_err(|error| {
            if error.kind() == Kind::TimedOut {
                self.outage.feel(was_late, error);
            }
            if error.kind() != Kind::WouldWait && self.outage.is_on() {
                self.probe();
            }
        })
    }

    /// Sees to it that the end of an outage is noticed, and waits for nothing.
    fn probe(self: &Arc<Self>) {
        self.probes.begin(&(), self.probing());
    }

    /// Looks whether the store is there.
    fn probing(self: &Arc<Self>) -> impl FnOnce() -> Result<()> + Send + use<> {
        let names = self.clone();
        move || {
            let Some((store, _)) = names.distant() else { return Ok(()) };
            let found = store.require_present();
            names.outage.probed(&found);
            found
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
    pub(super) fn refresh(self: &Arc<Self>) -> bool {
        if self.outage.is_on() && self.distant().is_some() {
            self.probe();
            return true;
        }
        for workflow in std::mem::take(&mut *lock(&self.uncounted)) {
            if self.nodes_asked(&workflow, Age::Fresh, false).is_err_and(|error| error.kind() == Kind::TimedOut) {
                lock(&self.uncounted).insert(workflow);
            }
        }
        let Some(since) = Instant::now().checked_sub(WATCHED) else { return true };
        let workflows = self.workflows.keys_asked_since(since);
        let nodes = self.nodes.keys_asked_since(since);
        let pointers = self.pointers.keys_asked_since(since);
        let versions = self.versions.keys_asked_since(since);
        let owners = self.owners.keys_asked_since(since);
        // What fails is logged and tried again next time. First who may look at all.
        owners.iter().for_each(|workflow| drop(self.access_asked(workflow, false)));
        workflows.iter().for_each(|()| drop(self.workflows_asked(Age::Fresh, false)));
        nodes.iter().for_each(|workflow| drop(self.nodes_asked(workflow, Age::Fresh, false)));
        in_parallel(&pointers, |name| drop(self.env_asked(name, Age::Fresh, false)));
        versions.iter().for_each(|name| drop(self.versions_asked(name, Age::Fresh, false)));
        let nothing = workflows.is_empty() && nodes.is_empty() && pointers.is_empty() && versions.is_empty();
        !(nothing && owners.is_empty())
    }

    /// `store`, where it is still the one that was mounted; asked once in a while.
    fn present<'s>(&self, store: &'s Store) -> Result<&'s Store> {
        self.may_have_owners(store).map(|_| store)
    }

    /// False where nothing was ever said of whose a workflow is, in `store`, which is still the one that was mounted; asked
    /// once in a while.
    fn may_have_owners(&self, store: &Store) -> Result<bool> {
        let checked = *lock(&self.checked);
        if let Some((at, owners)) = checked
            && at.elapsed() < SEEN
        {
            return Ok(owners);
        }
        let owners = store.may_have_owners()?;
        patience::progress();
        *lock(&self.checked) = Some((Instant::now(), owners));
        Ok(owners)
    }

    /// The workflows to list.
    pub(super) fn workflows(self: &Arc<Self>, age: Age) -> Result<Known<Vec<String>>> {
        self.workflows_asked(age, true)
    }

    fn workflows_asked(self: &Arc<Self>, age: Age, ask: bool) -> Result<Known<Vec<String>>> {
        self.asked::<Workflows>(&(), age, ask).map(or_nothing)
    }

    /// The nodes of `workflow` to list.
    pub(super) fn nodes(self: &Arc<Self>, workflow: &str, age: Age) -> Result<Known<Vec<String>>> {
        self.nodes_asked(workflow, age, true)
    }

    /// The workflows, where they were read before or the store is near.
    pub(super) fn workflows_if_read(self: &Arc<Self>) -> Result<Option<Known<Vec<String>>>> {
        if self.distant().is_some() && !self.workflows.has(&()) {
            return Ok(None);
        }
        self.workflows(Age::Fresh).map(Some)
    }

    /// The nodes of `workflow` where they were read before, or where they are few; else none, and [`Names::refresh`] reads
    /// them: until then its directory has the time [`Names::begun`].
    pub(super) fn nodes_if_read(self: &Arc<Self>, workflow: &str, age: Age) -> Result<Option<Known<Vec<String>>>> {
        let read = self.nodes.has(&workflow.to_string());
        // On the way to one environment a distant store is asked for that one alone.
        if !read && self.distant().is_some() {
            return Ok(None);
        }
        if read || age != Age::Any || self.has_few_nodes(workflow)? {
            return self.nodes(workflow, age).map(Some);
        }
        let mut uncounted = lock(&self.uncounted);
        if !uncounted.contains(workflow) {
            uncounted.insert(workflow.into());
        }
        Ok(None)
    }

    fn has_few_nodes(self: &Arc<Self>, workflow: &str) -> Result<bool> {
        let Source::Store(store) = &self.source else { return Ok(true) };
        Ok(store.nodes(workflow)?.len() <= WAITED_FOR)
    }

    /// When these names began: no directory has an earlier time.
    pub(super) fn begun(&self) -> Time {
        self.begun
    }

    fn nodes_asked(self: &Arc<Self>, workflow: &str, age: Age, ask: bool) -> Result<Known<Vec<String>>> {
        self.asked::<Nodes>(&workflow.to_string(), age, ask).map(or_nothing)
    }

    /// True when `node` has a current version.
    ///
    /// # Errors
    /// None but those of [`patience`]: who cannot be read is not listed.
    fn is_listed(self: &Arc<Self>, workflow: &str, node: &str, age: Age, ask: bool) -> Result<bool> {
        let Ok(name) = EnvName::new(workflow, node) else { return Ok(false) };
        match self.env_asked(&name, age, ask) {
            Ok(env) => {
                let mut unreadable = lock(&self.unreadable);
                if !unreadable.is_empty() {
                    unreadable.remove(&name);
                }
                Ok(env.is_some_and(|env| env.listed))
            }
            Err(error) if matches!(error.kind(), Kind::WouldWait | Kind::TimedOut) => Err(error),
            Err(error) => {
                // Asked again with every listing.
                if lock(&self.unreadable).insert(name.clone()) {
                    tracing::warn!(environment = %name, error = error.chain(), "an environment cannot be listed");
                }
                Ok(false)
            }
        }
    }

    fn has_listed_node(self: &Arc<Self>, workflow: &str, age: Age, ask: bool) -> Result<Live> {
        let Source::Store(store) = &self.source else { return Ok(Live::Yes) };
        let witness = lock(&self.witness).get(workflow).cloned();
        if let Some(name) = witness
            && self.is_listed(workflow, name.node(), age, ask)?
        {
            return Ok(Live::Yes);
        }
        let Some((_, limit)) = self.distant() else { return self.find_witness(store, workflow, age) };
        let find = || {
            let (names, store, workflow) = (self.clone(), store.clone(), workflow.to_string());
            move || names.find_witness(&store, &workflow, age)
        };
        self.question(&self.witnesses, &workflow.to_string(), limit, |found| *found == Live::Yes, find)
    }

    fn find_witness(self: &Arc<Self>, store: &Store, workflow: &str, age: Age) -> Result<Live> {
        let nodes = self.present(store)?.nodes(workflow)?;
        if nodes.is_empty() {
            return Ok(Live::Never);
        }
        let mut live = Live::No;
        for node in nodes {
            // Not asked on its behalf: it may be another that somebody is on the way to.
            if self.is_listed(workflow, &node, age, false)? {
                let name = EnvName::new(workflow, &node)?;
                lock(&self.witness).insert(workflow.into(), name);
                return Ok(Live::Yes);
            }
            if EnvName::new(workflow, &node).is_ok_and(|name| lock(&self.unreadable).contains(&name)) {
                live = Live::Unknown;
            }
        }
        Ok(live)
    }

    /// True when directory `workflow` is to be found.
    pub(super) fn has_workflow(self: &Arc<Self>, workflow: &str) -> Result<bool> {
        if let Source::Draft(draft) = &self.source {
            return Ok(draft.environment.workflow() == workflow);
        }
        let listed = self.has_listed_node(workflow, Age::Fresh, true);
        // One that is damaged or refused must not look as if it had never been there.
        if matches!(listed, Ok(Live::Yes | Live::Unknown))
            || lock(&self.used).iter().any(|name| name.workflow() == workflow)
        {
            return Ok(true);
        }
        // What was known already may be older than a version that has come since.
        Ok(listed? == Live::No && self.has_listed_node(workflow, Age::Now, true)? == Live::Yes)
    }

    /// The environment `name`, where it is to be found.
    pub(super) fn env(self: &Arc<Self>, name: &EnvName, age: Age) -> Result<Option<Env>> {
        // What is not known is read now in any case.
        let age = if self.pointers.has(name) { age } else { Age::Now };
        let found = match self.env_asked(name, age, true)? {
            None if age == Age::Fresh => self.env_asked(name, Age::Now, true)?,
            found => found,
        };
        // It is asked for anyway, and so costs nothing as the one that is looked at.
        if found.as_ref().is_some_and(|env| env.listed) {
            let mut witnesses = lock(&self.witness);
            if witnesses.get(name.workflow()) != Some(name) {
                witnesses.insert(name.workflow().into(), name.clone());
            }
        }
        Ok(found)
    }

    fn env_asked(self: &Arc<Self>, name: &EnvName, age: Age, ask: bool) -> Result<Option<Env>> {
        let Some(known) = self.asked::<Pointers>(name, age, ask)? else { return Ok(None) };
        let listed = known.value.now.is_some();
        let current = known.value.last.filter(|_| listed || lock(&self.used).contains(name));
        Ok(current.map(|current| Env { current, listed, mtime: known.mtime }))
    }

    /// The numbers of the versions of `name`, ascending.
    pub(super) fn versions(self: &Arc<Self>, name: &EnvName, age: Age) -> Result<Known<Vec<u64>>> {
        self.versions_asked(name, age, true)
    }

    /// The numbers of the versions of `name`, where they were read before or the store is near.
    pub(super) fn versions_if_read(self: &Arc<Self>, name: &EnvName, age: Age) -> Result<Option<Known<Vec<u64>>>> {
        if self.distant().is_some() && !self.versions.has(name) {
            return Ok(None);
        }
        self.versions(name, age).map(Some)
    }

    fn versions_asked(self: &Arc<Self>, name: &EnvName, age: Age, ask: bool) -> Result<Known<Vec<u64>>> {
        self.asked::<Versions>(name, age, ask).map(or_nothing)
    }

    /// Whose `workflow` is. Never older than [`FRESH`] while the store answers; when it does not, as it was known last.
    ///
    /// # Errors
    /// Where nothing is known of it: then nobody may be let in.
    pub(super) fn whose(self: &Arc<Self>, workflow: &str) -> Result<Whose> {
        let known = self.access_asked(workflow, true)?;
        let unknown = || Error::new(Kind::Failed, format!("whose {workflow} is cannot be told"));
        known.map(|known| known.value.whose).ok_or_else(unknown)
    }

    fn access_asked(self: &Arc<Self>, workflow: &str, ask: bool) -> Result<Option<Known<Access>>> {
        self.asked::<Owners>(&workflow.to_string(), Age::Fresh, ask)
    }

    /// The document of a version, read from the store now.
    pub(super) fn version(self: &Arc<Self>, name: &EnvName, number: u64) -> Result<Version> {
        let none = |here: &str| Error::new(Kind::NotFound, format!("{name} has no version {number}{here}"));
        let store = match &self.source {
            Source::Draft(draft) if draft.environment == *name && draft.number == number => {
                return Ok((**draft).clone());
            }
            Source::Draft(_) => return Err(none(" here")),
            Source::Store(store) => store,
        };
        let Some((_, limit)) = self.distant() else { return store.version(name, number) };
        let read = || {
            let (store, name) = (store.clone(), name.clone());
            move || match store.version(&name, number) {
                Err(error) if error.is_not_found() => Ok(None),
                version => version.map(Some),
            }
        };
        let found = self.question(&self.documents, &(name.clone(), number), limit, Option::is_some, read)?;
        found.ok_or_else(|| none("").hint(format!("see `envfabric versions {name}`")))
    }

    /// Says that a version of `name` was shown: from now on its paths stay, even if it is removed.
    pub(super) fn mark_used(self: &Arc<Self>, name: &EnvName) {
        let mut used = lock(&self.used);
        if used.contains(name) {
            return;
        }
        used.insert(name.clone());
        drop(used);
        if let Some((known, _)) = self.pointers.look(name, Age::Any, false)
            && let Some(last) = known.value.last
        {
            self.note_shown(name, last, known.value.sequence);
        }
    }

    /// Goes on where an earlier process has ended: `shown` are the versions that were current, in order.
    pub(super) fn go_on(&self, shown: Slots<WasCurrent>) {
        let before: HashMap<EnvName, u64> = shown.keys().into_iter().map(|was| (was.env, was.number)).collect();
        lock(&self.used).extend(before.keys().cloned());
        // It is said once.
        let _ = self.before.set(before);
        let _ = self.shown.set(shown);
    }

    /// The version of `name` that an earlier process saw as current last.
    fn seen_before(&self, name: &EnvName) -> Option<u64> {
        self.before.get()?.get(name).copied()
    }

    /// Writes down that `number` is current by pointer `sequence`, where a version of `name` was shown.
    fn note_shown(&self, name: &EnvName, number: u64, sequence: u64) {
        if let Some(shown) = self.shown.get()
            && let Err(error) = shown.ensure(&WasCurrent { env: name.clone(), number, sequence })
        {
            tracing::warn!(error = error.chain(), "what is shown cannot be written down");
        }
    }
}

fn or_nothing<T: Default>(known: Option<Known<T>>) -> Known<T> {
    known.unwrap_or_else(|| Known { value: Arc::default(), mtime: (0, 0) })
}
