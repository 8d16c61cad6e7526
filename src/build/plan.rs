//! What a lock came to the last time, so that the next environment of it parses nothing.
//!
//! A `pylock.toml` whose packages all have keys decides, together with the request and the interpreter, which layers
//! there are, in which order, and what conflicts. That is noted in the index under a digest of all it depends on. A
//! note is believed only while the store has every layer and the lock's text: else the long way is gone, which repairs
//! what it finds missing.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::source::{Opened, Pylock, Resolved};
use super::{Context, Request, conflicts, python};
use crate::environment::{Conflict, Digest, Document, Source};
use crate::error::Result;
use crate::store::{LayerDoc, StoredInterpreter};

/// What of a version is decided by lock, request and interpreter.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    pub(super) layers: Vec<Digest>,
    pub(super) lock: Document,
    pub(super) pyproject: Option<Document>,
    pub(super) conflicts: Vec<Conflict>,
}

/// A plan whose layers and documents are in the store.
pub(super) struct Parts {
    pub(super) plan: Plan,
    /// The documents of the plan's layers.
    pub(super) layers: Vec<Arc<LayerDoc>>,
    pub(super) source: Source,
}

/// Where a plan is noted.
pub(super) struct Slot {
    note: String,
    reading: (String, Pylock),
    source: Source,
}

fn reading_of(text: &str) -> String {
    format!("pylock {}", Digest::of(text.as_bytes()))
}

impl Plan {
    /// What was noted of the lock with this text, if it was used before.
    pub(super) fn pylock(context: &Context<'_>, text: &str) -> Option<Pylock> {
        read(context, &reading_of(text))
    }

    /// Where the plan of `request` is noted; none when it does not depend on known things alone.
    pub(super) fn slot(opened: &Opened, request: &Request, interpreter: &StoredInterpreter) -> Option<Slot> {
        let (text, source) = (opened.pylock()?, opened.pylock_source(request)?);
        if request.rebuild {
            return None;
        }
        let reading = reading_of(text);
        let depends_on = serde_json::json!([
            env!("CARGO_PKG_VERSION"),
            reading,
            request.extras,
            request.groups,
            request.bytecode,
            request.platform,
            python::host_libc(&interpreter.python),
            interpreter,
        ]);
        let note = format!("plan {}", Digest::of(depends_on.to_string().as_bytes()));
        Some(Slot { note, reading: (reading, Pylock { requires_python: opened.requires_python.clone() }), source })
    }
}

impl Slot {
    /// The plan that is noted here, if the store has all of it.
    pub(super) fn find(&self, context: &Context<'_>) -> Option<Parts> {
        let plan: Plan = read(context, &self.note)?;
        let there = context.store.has_layers(&plan.layers) && context.store.has_document(&plan.lock);
        let layers = there.then(|| context.index.layers(context.store, &plan.layers).ok())??;
        Some(Parts { plan, layers, source: self.source.clone() })
    }

    pub(super) fn keep(&self, context: &Context<'_>, plan: &Plan) -> Result<()> {
        let (reading, pylock) = &self.reading;
        context.index.set_note(&self.note, &serde_json::to_string(plan).unwrap_or_default())?;
        context.index.set_note(reading, &serde_json::to_string(pylock).unwrap_or_default())
    }
}

impl Parts {
    /// The long way: from a resolved lock and its layers; puts the lock into the store.
    pub(super) fn of(context: &Context<'_>, resolved: &Resolved, digests: Vec<Digest>) -> Result<Parts> {
        let layers = context.index.layers(context.store, &digests)?;
        let document = |name: &str, text: &str| {
            let blob = context.store.ensure_blob(text.as_bytes())?;
            Ok(Document { name: name.to_string(), blob, size: text.len() as u64 })
        };
        let (name, text) = &resolved.document;
        let lock = document(name, text)?;
        let pyproject = resolved.pyproject.as_ref().map(|text| document("pyproject.toml", text)).transpose()?;
        let conflicts = conflicts::find(context, &layers)?;
        let plan = Plan { layers: digests, lock, pyproject, conflicts };
        Ok(Parts { plan, layers, source: resolved.source.clone() })
    }
}

/// A note that can be read; the index is a cache, so one that cannot is none.
fn read<T: serde::de::DeserializeOwned>(context: &Context<'_>, name: &str) -> Option<T> {
    let text = context.index.note(name).ok()??;
    serde_json::from_str(&text).ok()
}
