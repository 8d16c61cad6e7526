//! The documents of layers: known to the index, or learned from summaries, or read one by one.

use super::*;
use crate::environment::Summary;
use crate::patience;
use crate::store;

impl Tree {
    /// The document of one layer.
    pub(super) fn layer_doc(&self, layer: &Digest) -> Result<Arc<LayerDoc>> {
        if self.store.trust().is_some() {
            return self.vouched_doc(layer);
        }
        let mut docs = self.layer_docs(std::slice::from_ref(layer), &[])?;
        docs.pop().ok_or_else(gone)
    }

    /// The documents of `layers`, some of which may be in `summaries`.
    pub(super) fn layer_docs(&self, layers: &[Digest], summaries: &[Summary]) -> Result<Vec<Arc<LayerDoc>>> {
        if self.store.trust().is_some() {
            return self.vouched_docs(layers, summaries);
        }
        let Some(cache) = &self.cache else { return self.index.layers(&self.store, layers).map_err(damaged) };
        if self.index.unknown(layers)?.is_empty() {
            return self.index.layers(&self.store, layers).map_err(damaged);
        }
        ask_for_all(cache, summaries)?;
        for summary in summaries {
            let learned = cache.document(&summary.into()).and_then(|bytes| store::documents(&bytes));
            match learned {
                Ok(docs) => self.index.learn_now(summary, docs)?,
                Err(error) if error.is_about_waiting() => return Err(error),
                // The documents themselves are there, too.
                Err(error) => self.tell(&error),
            }
        }
        let (index, store, layers) = (self.index.clone(), self.store.clone(), layers.to_vec());
        if self.index.unknown(&layers)?.is_empty() {
            return index.layers(&store, &layers).map_err(damaged);
        }
        patience::within(cache.patience(), move || index.layers(&store, &layers)).map_err(damaged)
    }
}

/// Asks for `summaries`, which are read one by one, at once; the first is asked for by who waits for it.
pub(super) fn ask_for_all(cache: &Cache, summaries: &[Summary]) -> Result<()> {
    summaries.iter().skip(1).try_for_each(|summary| cache.ask_whole(&summary.into()))
}
