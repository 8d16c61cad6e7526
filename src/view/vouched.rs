//! The documents of layers where versions must be signed: from summaries that a signed version names, and from nowhere
//! else.
//!
//! A layer's document says what is in shared directories, what entry points there are, and which catalog and pack the
//! layer has. In the store it lies under the layer's name, and nothing tells whether it was altered; what the index
//! repeats is no better. A summary is named by its sha256 in the signed document of the version.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::documents::ask_for_all;
use super::*;
use crate::environment::Summary;
use crate::store;

/// Documents that signed versions vouch for, by layer.
#[derive(Debug, Default)]
pub(super) struct Vouched(Mutex<HashMap<Digest, Arc<LayerDoc>>>);

impl Vouched {
    /// Those of `layers`, in their order; or the first that is not known.
    fn find(&self, layers: &[Digest]) -> Result<Vec<Arc<LayerDoc>>, Digest> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        layers.iter().map(|layer| known.get(layer).cloned().ok_or(*layer)).collect()
    }

    /// What is known stays: inodes were numbered by it.
    fn learn(&self, docs: Vec<LayerDoc>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for doc in docs {
            known.entry(doc.digest).or_insert_with(|| Arc::new(doc));
        }
    }
}

impl Tree {
    /// The documents of `layers`, all of which are in `summaries`.
    ///
    /// # Errors
    /// [`Kind::Rejected`] when one is not; [`Kind::Corrupt`] when a summary is missing or altered.
    pub(super) fn vouched_docs(&self, layers: &[Digest], summaries: &[Summary]) -> Result<Vec<Arc<LayerDoc>>> {
        if let Ok(docs) = self.vouched.find(layers) {
            return Ok(docs);
        }
        // Only through a cache is everything compared that is below these documents.
        let cache = self.cache.as_ref().ok_or_else(|| {
            Error::new(Kind::Failed, "a tree of signed versions has no cache, and would show what was not compared")
        })?;
        ask_for_all(cache, summaries)?;
        for summary in summaries {
            let mut docs = store::documents(&cache.document(&summary.into())?)?;
            // A summary may tell of more, which this version does not speak of.
            docs.retain(|doc| layers.contains(&doc.digest));
            self.vouched.learn(docs);
        }
        self.vouched.find(layers).map_err(|layer| {
            let what = format!("nothing that is signed tells what is in layer {}", layer.short());
            Error::new(Kind::Rejected, what)
                .hint("publish the version anew: `envfabric create` with --rebuild and a trusted key")
        })
    }

    /// The document of one layer, which some version that was shown has.
    pub(super) fn vouched_doc(&self, layer: &Digest) -> Result<Arc<LayerDoc>> {
        let find = || self.vouched.find(std::slice::from_ref(layer)).ok().and_then(|mut docs| docs.pop());
        if let Some(doc) = find() {
            return Ok(doc);
        }
        // A number that is older than this process: what it was given out for is read again.
        for slot in (0..).take_while(|slot| self.version_slots.key(*slot).is_some()) {
            match self.version(slot).and_then(|view| self.layers(&view)) {
                Err(error) if error.is_about_waiting() => return Err(error),
                _ => {}
            }
            if let Some(doc) = find() {
                return Ok(doc);
            }
        }
        Err(gone())
    }
}
