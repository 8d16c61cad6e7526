//! What is signed, and whom this machine trusts.

use super::nas::PATIENCE;
use super::{Check, State};
use crate::cli::Context;
use crate::error::Result;
use crate::patience::within;
use crate::store::Store;

/// So many environments are looked at.
const LOOKED_AT: usize = 1000;

/// What is to be said of signatures; nothing where nobody signs or asks for it.
pub(super) fn checks(context: &Context, store: &Store) -> Vec<Check> {
    let keys = &context.settings.keys;
    let mut checks = Vec::new();
    if keys.sign_with.is_some() {
        checks.push(Check::of("signing key", keys.signer(), |key| {
            key.map(|key| format!("versions are signed with {}", key.public().label())).unwrap_or_default()
        }));
    }
    match look(context, store) {
        Ok(found) => checks.extend(found),
        Err(error) => checks.push(Check::of("signatures", Err::<(), _>(error), |()| String::new())),
    }
    checks
}

fn look(context: &Context, store: &Store) -> Result<Option<Check>> {
    let trust = context.trusted_keys(store)?;
    let trusted = trust.as_ref().map(|trust| trust.keys().iter().map(|key| key.label()).collect::<Vec<_>>());
    let of = store.clone();
    let asked = within(PATIENCE, move || of.policy())?.map(|policy| policy.public_keys()).unwrap_or_default();
    let of = store.clone();
    let found = within(PATIENCE * 2, move || of.signatures(trust.as_ref(), true, LOOKED_AT))?;
    let counts: Vec<String> = found.counts.iter().map(|(sentence, count)| format!("{count} {sentence}")).collect();
    let current = if counts.is_empty() { "no versions yet".into() } else { format!("current: {}", counts.join(", ")) };
    let check = match (&trusted, &found.refused[..]) {
        (None, []) if asked.is_empty() && !counts.iter().any(|count| count.contains("signed by")) => return Ok(None),
        (Some(keys), []) => Check::new("signatures", State::Ok, format!("trusted: {}; {current}", keys.join(", "))),
        (Some(keys), refused) => {
            let first = refused.iter().take(3).map(|(object, why)| format!("{object} ({why})")).collect::<Vec<_>>();
            let what = format!("trusted: {}; {current}; refused: {}", keys.join(", "), first.join(", "));
            Check::new("signatures", State::Note, what).hint("publish them anew with a key that is trusted here")
        }
        (None, _) => Check::new("signatures", State::Note, format!("this machine believes everybody; {current}"))
            .hint("name the keys that are to be believed: trusted-keys in the config file"),
    };
    let check = check.fact("trusted", trusted.unwrap_or_default());
    Ok(Some(check.fact("store_asks_for", asked.iter().map(ToString::to_string).collect::<Vec<_>>())))
}
