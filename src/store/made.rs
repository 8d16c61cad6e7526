//! Which layers this machine has made itself: what a builder that signs may vouch for.
//!
//! The documents of layers that were written here are noted whole in the index, under names of their own. Nothing that
//! the index learns from a store is noted so. Losing them costs making the layers once more.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::{Index, LayerDoc, Store};
use crate::environment::Digest;
use crate::error::Result;

/// Documents of layers that this process has written, until they are noted.
#[derive(Debug, Default)]
pub(super) struct Made(Mutex<Vec<LayerDoc>>);

fn note_of(layer: &Digest) -> String {
    format!("made {layer}")
}

impl Store {
    /// Says that every byte of this layer came from this process.
    pub(super) fn has_made(&self, doc: &LayerDoc) {
        self.made.0.lock().unwrap_or_else(PoisonError::into_inner).push(doc.clone());
    }
}

impl Index {
    /// Notes what was made for `store` by this process since the last time.
    pub fn note_made(&self, store: &Store) -> Result<()> {
        let made = std::mem::take(&mut *store.made.0.lock().unwrap_or_else(PoisonError::into_inner));
        for doc in made {
            self.set_note(&note_of(&doc.digest), &serde_json::to_string(&doc).unwrap_or_default())?;
        }
        Ok(())
    }

    /// The documents of those of `layers` that this machine has made.
    pub fn made(&self, layers: &[Digest]) -> Result<HashMap<Digest, LayerDoc>> {
        let mut found = HashMap::new();
        for layer in layers {
            let doc = self.note(&note_of(layer))?.and_then(|text| serde_json::from_str::<LayerDoc>(&text).ok());
            found.extend(doc.filter(|doc| doc.digest == *layer).map(|doc| (*layer, doc)));
        }
        Ok(found)
    }
}
