//! The sorts of names, and of what is said of them, and how the store is asked for each.

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;

use super::cells::{Age, Cells, Known, lock};
use super::{Access, Live, NameChange, Names, Pointed, Source, WATCHED, Whose};
use crate::environment::EnvName;
use crate::error::{Error, Kind, Result};
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
        found.retain(|workflow| names.has_listed_node(workflow, Age::Fresh, ask).unwrap_or(Live::Yes) == Live::Yes);
        // Whoever lists them asks for each one's owner next; many are asked at once.
        let leave = Leave::of_this_thread();
        in_parallel(&found, |workflow| leave.run(|| drop(names.access_asked(workflow, false))));
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

/// Who may look at a workflow.
#[derive(Debug)]
pub(super) struct Owners;

/// True for what is wrong with a document, or with the way to it; else it is the store that does not answer as it should.
fn is_about_document(error: &Error) -> bool {
    match error.kind() {
        Kind::Corrupt | Kind::Unsupported | Kind::Rejected => true,
        Kind::Os(errno) => [libc::EACCES, libc::EPERM, libc::ENOTDIR, libc::EISDIR].contains(&errno),
        _ => false,
    }
}

impl Sort for Owners {
    type Key = String;
    type Value = Access;

    fn cells(names: &Names) -> &Cells<String, Access> {
        &names.owners
    }

    fn read(names: &Arc<Names>, workflow: &String, before: Option<&Access>, _: bool) -> Result<Option<Access>> {
        let store = match &names.source {
            Source::Draft(_) => return Ok(Some(Access::OPEN)),
            Source::Store(store) => store,
        };
        let nothing_was_said = before.is_none_or(|before| *before == Access::OPEN);
        if !names.may_have_owners(store)? && nothing_was_said {
            return Ok(Some(Access::OPEN));
        }
        let said = match store.owner(workflow) {
            Err(error) if is_about_document(&error) => {
                if before.is_none_or(|before| before.whose != Whose::Nobodys) {
                    let error = error.chain();
                    tracing::error!(
                        workflow,
                        error,
                        "whose a workflow is cannot be told, so nobody is let in but root and who mounted"
                    );
                }
                let sequence = before.map_or(0, |before| before.sequence);
                return Ok(Some(Access { whose: Whose::Nobodys, sequence }));
            }
            said => said?,
        };
        let sequence = said.as_ref().map_or(0, |said| said.sequence);
        // As for pointers: where a newer one was seen, its directory is away.
        if before.is_some_and(|before| before.sequence > sequence) {
            return Ok(None);
        }
        let whose = said.and_then(|said| said.owner).map_or(Whose::Everybodys, Whose::Of);
        Ok(Some(Access { whose, sequence }))
    }

    fn change(workflow: &String) -> NameChange {
        NameChange::Owner(workflow.clone())
    }

    /// As for pointers.
    fn unmoved(names: &Names, workflow: &String) -> Option<Known<Access>> {
        let Source::Store(store) = &names.source else { return None };
        let owners = names.may_have_owners(store).ok()?;
        let stands = |access: &Access| match *access {
            Access::OPEN if !owners => true,
            Access { whose: Whose::Nobodys, .. } => false,
            Access { sequence, .. } => !store.may_have_owner(workflow, sequence + 1),
        };
        names.owners.confirm(workflow, WATCHED, stands)
    }
}
