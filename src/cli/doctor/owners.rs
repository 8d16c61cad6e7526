//! Whose workflows are, and whether that keeps anybody out here.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::nas::PATIENCE;
use super::{Check, State};
use crate::error::{IoContext, Result};
use crate::patience::within;
use crate::store::Store;

const NAME: &str = "owners";

/// What is to be said of owners; nothing where there are none.
pub(super) fn check(store: &Store) -> Option<Check> {
    let of = store.clone();
    match within(PATIENCE, move || look(&of)) {
        Ok(check) => check,
        Err(error) => Some(Check::of(NAME, Err::<(), _>(error), |()| String::new())),
    }
}

fn look(store: &Store) -> Result<Option<Check>> {
    let mut owned = 0;
    for workflow in store.owned_workflows()? {
        owned += usize::from(store.owner(&workflow)?.is_some_and(|said| said.owner.is_some()));
    }
    if owned == 0 {
        return Ok(None);
    }
    let found = format!("{owned} {} an owner", if owned == 1 { "workflow has" } else { "workflows have" });
    let root = store.root();
    let mode = fs::metadata(root).at("looking at", root)?.permissions().mode() & 0o777;
    let check = match mode & 0o007 {
        0 => Check::new(NAME, State::Ok, found),
        _ => Check::new(NAME, State::Note, format!("{found}, and {} has mode {mode:04o}", root.display()))
            .hint("who can read the store itself needs no mount: let only who mounts and builds into its directory"),
    };
    Ok(Some(check.fact("workflows", owned)))
}
