//! The four sorts of names, and how the store is asked for each.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;

use super::cells::{Age, Cells, Known, lock};
use super::{NameChange, Names, Pointed, Source, WATCHED};
use crate::environment::EnvName;
use crate::error::Result;
use crate::patience::{self, Leave};
use crate::store::in_parallel;

/// A sort of names: what is asked for, where the answers are kept, and how the store is asked.
pub(super) trait Sort: 'static {
    type Key: Debug + Clone + Eq + Hash + Send + 'static;
    type Value: Debug + Clone + PartialEq + Send + Sync + 'static;

    fn cells(names: &Names) -> &Cells<Self::Key, Self::Value>;

    /// Asks the store. None when there is no such thing, which is not kept. `before` is what was known.
    fn read(
        names: &Arc<Names>,
        key: &Self::Key,
        before: Option<&Self::Value>,
        ask: bool,
    ) -> Result<Option<Self::Value>>;

    fn change(key: &Self::Key) -> NameChange;

    /// What is known, where one cheap question to the store shows that it is still so.
    fn unmoved(_names: &Names, _key: &Self::Key) -> Option<Known<Self::Value>> {
        None
    }
}

/// True when a directory of the store that had something is empty or not there. Nothing in it goes when an environment
/// is removed, which is only written down: so the directory itself is away.
fn is_away<T>(now: &[T], before: Option<&Vec<T>>) -> bool {
    now.is_empty() && before.is_some_and(|before| !before.is_empty())
}

/// The workflows that have an environment.
#[derive(Debug)]
pub(super) struct Workflows;

impl Sort for Workflows {
    type Key = ();
    type Value = Vec<String>;

    fn cells(names: &Names) -> &Cells<(), Vec<String>> {
        &names.workflows
    }

    fn read(names: &Arc<Names>, (): &(), before: Option<&Vec<String>>, ask: bool) -> Result<Option<Vec<String>>> {
        let store = match &names.source {
            Source::Draft(draft) => return Ok(Some(vec![draft.environment.workflow().to_string()])),
            Source::Store(store) => names.present(store)?,
        };
        let mut found = store.workflows()?;
        if is_away(&found, before) {
            return Ok(None);
        }
        found.retain(|workflow| names.has_listed_node(workflow, Age::Fresh, ask).unwrap_or(true));
        Ok(Some(found))
    }

    fn change((): &()) -> NameChange {
        NameChange::Workflows
    }
}

/// The nodes of a workflow that have a current version.
#[derive(Debug)]
pub(super) struct Nodes;

impl Sort for Nodes {
    type Key = String;
    type Value = Vec<String>;

    fn cells(names: &Names) -> &Cells<String, Vec<String>> {
        &names.nodes
    }

    fn read(
        names: &Arc<Names>,
        workflow: &String,
        before: Option<&Vec<String>>,
        _: bool,
    ) -> Result<Option<Vec<String>>> {
        let store = match &names.source {
            Source::Draft(draft) => return Ok(Some(vec![draft.environment.node().to_string()])),
            Source::Store(store) => names.present(store)?,
        };
        let found = store.nodes(workflow)?;
        patience::progress();
        if is_away(&found, before) {
            return Ok(None);
        }
        let leave = Leave::of_this_thread();
        // Not asked on behalf of each node: only the listing is watched.
        let listed = in_parallel(&found, |node| leave.run(|| names.is_listed(workflow, node, Age::Fresh, false)));
        let mut nodes = Vec::with_capacity(found.len());
        for (node, listed) in found.into_iter().zip(listed) {
            if listed? {
                nodes.push(node);
            }
        }
        Ok(Some(nodes))
    }

    fn change(workflow: &String) -> NameChange {
        NameChange::Nodes(workflow.clone())
    }
}

/// Which version is current.
#[derive(Debug)]
pub(super) struct Pointers;

impl Sort for Pointers {
    type Key = EnvName;
    type Value = Pointed;

    fn cells(names: &Names) -> &Cells<EnvName, Pointed> {
        &names.pointers
    }

    fn read(names: &Arc<Names>, name: &EnvName, before: Option<&Pointed>, _: bool) -> Result<Option<Pointed>> {
        let store = match &names.source {
            Source::Draft(draft) => {
                let number = Some(draft.number).filter(|_| draft.environment == *name);
                return Ok(number.map(|n| Pointed { now: Some(n), last: Some(n), sequence: 1 }));
            }
            Source::Store(store) => store,
        };
        // That there is none was made sure of by looking for the store itself.
        let Some(pointer) = store.pointer(name)? else { return Ok(None) };
        names.present(store)?;
        // Where a newer one was seen, its directory is away, not the pointer withdrawn.
        if before.is_some_and(|before| before.sequence > pointer.sequence) {
            return Ok(None);
        }
        let (now, last) = (pointer.version, before.map_or_else(|| names.seen_before(name), |before| before.last));
        if let Some(now) = now.filter(|now| Some(*now) != last)
            && lock(&names.used).contains(name)
        {
            names.note_shown(name, now, pointer.sequence);
        }
        Ok(Some(Pointed { now, last: now.or(last), sequence: pointer.sequence }))
    }

    fn change(name: &EnvName) -> NameChange {
        NameChange::Current(name.clone())
    }

    /// Where the pointer was read within [`WATCHED`] and the next one is not there: one question to the store instead of
    /// several, for thousands of names that nobody asks for but a listing, and for a distant store. One that is away, or
    /// another, has no next one either: that is noticed when the pointer is read again.
    fn unmoved(names: &Names, name: &EnvName) -> Option<Known<Pointed>> {
        let Source::Store(store) = &names.source else { return None };
        names.pointers.confirm(name, WATCHED, |pointed| !store.may_have_pointer(name, pointed.sequence + 1))
    }
}

/// Which versions there are.
#[derive(Debug)]
pub(super) struct Versions;

impl Sort for Versions {
    type Key = EnvName;
    type Value = Vec<u64>;

    fn cells(names: &Names) -> &Cells<EnvName, Vec<u64>> {
        &names.versions
    }

    fn read(names: &Arc<Names>, name: &EnvName, before: Option<&Vec<u64>>, _: bool) -> Result<Option<Vec<u64>>> {
        let numbers = match &names.source {
            Source::Draft(draft) => vec![draft.number],
            Source::Store(store) => names.present(store)?.version_numbers(name)?,
        };
        let away = is_away(&numbers, before);
        Ok(Some(numbers).filter(|_| !away))
    }

    fn change(name: &EnvName) -> NameChange {
        NameChange::Versions(name.clone())
    }
}
