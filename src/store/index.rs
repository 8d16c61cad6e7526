//! The index: what this machine knows of one store, in a SQLite database on its local disk.
//!
//! It only repeats what the store says (layer documents, keys) or what was found out here (proofs, by a name of their
//! own), so losing it costs time and nothing else: a damaged one is thrown away and a new one begun.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rayon::prelude::*;
use rusqlite::{Connection, OptionalExtension};

use super::{LayerDoc, Store};
use crate::environment::{Digest, Summary};
use crate::error::{Error, IoContext, Kind, Result};

/// Bumped when the tables change; an index of another number is thrown away.
const INDEX_FORMAT: i64 = 2;

/// What [`Index::learn_all`] took in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Learned {
    /// Documents of layers.
    pub layers: usize,
    /// Keys.
    pub keys: usize,
    /// Documents that cannot be read.
    pub damaged: usize,
}

/// The index of one store on this machine.
#[derive(Debug)]
pub struct Index {
    db: Mutex<Connection>,
    layers: Mutex<HashMap<Digest, Arc<LayerDoc>>>,
    path: PathBuf,
}

impl Index {
    /// Opens the index of `store` in directory `dir` (made if missing).
    pub fn open(dir: &Path, store: &Store) -> Result<Index> {
        fs::create_dir_all(dir).at("creating", dir)?;
        let path = dir.join(format!("index-{}.sqlite", store.fabric().id));
        let unusable = |source: rusqlite::Error| {
            Error::new(Kind::Failed, format!("the index {} cannot be opened", path.display()))
                .hint("check that its directory is writable and on a local disk with free space")
                .with_source(source)
        };
        // It repeats what layers of all workflows are made of. SQLite's other files get the mode of this one, and SQLite
        // says why where it cannot be made.
        let own = |path: &Path| drop(crate::private::append(path));
        own(&path);
        let db = match open(&path) {
            Ok(db) => db,
            Err(error) if is_damage(&error) => {
                tracing::warn!(path = %path.display(), %error, "the index is damaged and is begun anew");
                remove(&path);
                own(&path);
                open(&path).map_err(unusable)?
            }
            Err(error) => return Err(unusable(error)),
        };
        Ok(Index { db: Mutex::new(db), layers: Mutex::default(), path })
    }

    /// Removes the index of `store` in directory `dir`. Processes that have it open go on with it.
    pub fn forget(dir: &Path, store: &Store) -> Result<()> {
        let path = dir.join(format!("index-{}.sqlite", store.fabric().id));
        remove(&path);
        match path.exists() {
            false => Ok(()),
            true => Err(Error::new(Kind::Failed, format!("the index {} cannot be removed", path.display()))
                .hint("check the owner and mode of its directory")),
        }
    }

    /// Takes in everything that `store` says: documents of layers, the summaries that versions name, keys. What cannot be
    /// read is left out and counted.
    pub fn learn_all(&self, store: &Store) -> Result<Learned> {
        let mut learned = Learned::default();
        let mut docs = Vec::new();
        for doc in super::in_parallel(&store.listed_layers()?, |layer| store.layer(layer)) {
            match doc {
                Ok(doc) => docs.push(Arc::new(doc)),
                Err(error) if error.is_not_found() => {}
                Err(_) => learned.damaged += 1,
            }
        }
        learned.layers = docs.len();
        self.keep(&docs)?;
        for summary in store.named_summaries()? {
            match store.read_blob(&summary.blob).and_then(|bytes| super::documents(&bytes)) {
                Ok(docs) => self.learn(&summary, docs)?,
                Err(_) => learned.damaged += 1,
            }
        }
        for key in store.listed_keys()? {
            match store.layer_of_key(&key) {
                Ok(Some(_)) => learned.keys += usize::from(self.layer_of_key(store, &key)?.is_some()),
                Ok(None) => {}
                Err(_) => learned.damaged += 1,
            }
        }
        Ok(learned)
    }

    /// An index that lives as long as this value, for whoever has no place to keep one.
    pub fn in_memory() -> Result<Index> {
        let db = Connection::open_in_memory().and_then(prepare);
        let db = db.map_err(|e| Error::new(Kind::Failed, "no index can be made in memory").with_source(e))?;
        Ok(Index { db: Mutex::new(db), layers: Mutex::default(), path: ":memory:".into() })
    }

    /// Tells damage that was found at work, and clears it away: the next command begins a new index.
    fn told(&self, error: rusqlite::Error) -> Error {
        let damaged = is_damage(&error);
        let told = Error::new(Kind::Corrupt, format!("the index {} cannot be used", self.path.display()));
        if damaged {
            remove(&self.path);
            return told.hint("it was only a cache and has been removed: run the command again").with_source(error);
        }
        told.hint("check its disk and mode; it is only a cache and may be deleted").with_source(error)
    }

    /// The database file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn db(&self) -> MutexGuard<'_, Connection> {
        self.db.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of `layers` whose documents are known here, with their documents.
    fn known(&self, layers: &[Digest]) -> Result<HashMap<Digest, Arc<LayerDoc>>> {
        let mut found: HashMap<Digest, Arc<LayerDoc>> = HashMap::new();
        {
            let memory = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
            found.extend(layers.iter().filter_map(|d| memory.get(d).map(|doc| (*d, doc.clone()))));
        }
        if layers.iter().any(|digest| !found.contains_key(digest)) {
            let db = self.db();
            // One look at the database instead of one per layer.
            let _reading = db.unchecked_transaction().map_err(|e| self.told(e))?;
            let mut select = db.prepare_cached("SELECT doc FROM layer WHERE digest = ?1").map_err(|e| self.told(e))?;
            for digest in layers {
                if found.contains_key(digest) {
                    continue;
                }
                let text: Option<String> =
                    select.query_row([digest.as_bytes()], |r| r.get(0)).optional().map_err(|e| self.told(e))?;
                if let Some(doc) = text.and_then(|t| serde_json::from_str::<LayerDoc>(&t).ok()) {
                    found.insert(*digest, Arc::new(doc));
                }
            }
        }
        Ok(found)
    }

    /// The layers among `layers` whose documents would have to be read from the store.
    pub fn unknown(&self, layers: &[Digest]) -> Result<Vec<Digest>> {
        let known = self.known(layers)?;
        Ok(layers.iter().filter(|digest| !known.contains_key(digest)).copied().collect())
    }

    /// Takes in the documents of a summary.
    pub fn learn(&self, summary: &Summary, docs: Vec<LayerDoc>) -> Result<()> {
        let docs = self.remember(docs);
        self.write_down(summary, &docs)
    }

    /// The same, where somebody waits for the documents: they are written down afterwards. What is lost with the process
    /// is learned again.
    pub fn learn_now(self: &Arc<Self>, summary: &Summary, docs: Vec<LayerDoc>) -> Result<()> {
        let docs = self.remember(docs);
        let (index, summary) = (self.clone(), *summary);
        let write = {
            let docs = docs.clone();
            move || {
                if let Err(error) = index.write_down(&summary, &docs) {
                    tracing::warn!(error = error.chain(), "what was learned is not written down");
                }
            }
        };
        match std::thread::Builder::new().name("learn".into()).spawn(write) {
            Ok(_) => Ok(()),
            Err(_) => self.write_down(&summary, &docs),
        }
    }

    fn remember(&self, docs: Vec<LayerDoc>) -> Vec<Arc<LayerDoc>> {
        let docs: Vec<Arc<LayerDoc>> = docs.into_iter().map(Arc::new).collect();
        // They say more than the documents alone: where the catalogs are together.
        let mut memory = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        memory.extend(docs.iter().map(|doc| (doc.digest, doc.clone())));
        docs
    }

    fn write_down(&self, summary: &Summary, docs: &[Arc<LayerDoc>]) -> Result<()> {
        let digests: Vec<Digest> = docs.iter().map(|doc| doc.digest).collect();
        self.keep(docs)?;
        self.set_summary(&digests, summary)
    }

    /// Takes `docs` for those of their layers, whatever was known of these; summaries that have other ones are forgotten.
    pub fn correct(&self, docs: Vec<LayerDoc>) -> Result<()> {
        let digests: Vec<Digest> = docs.iter().map(|doc| doc.digest).collect();
        let known = self.known(&digests)?;
        let differs = |doc: &LayerDoc| {
            let bundle = doc.bundle;
            known.get(&doc.digest).is_none_or(|known| LayerDoc { bundle, ..LayerDoc::clone(known) } != *doc)
        };
        let wrong: Vec<Arc<LayerDoc>> = docs.into_iter().filter(differs).map(Arc::new).collect();
        self.keep(&wrong)?;
        for doc in &wrong {
            self.forget_summary(&doc.digest)?;
            self.layers.lock().unwrap_or_else(PoisonError::into_inner).insert(doc.digest, doc.clone());
        }
        Ok(())
    }

    /// Forgets in which summary the document of `layer` is.
    pub fn forget_summary(&self, layer: &Digest) -> Result<()> {
        let forget = "UPDATE layer SET summary = NULL, summary_size = NULL WHERE digest = ?1";
        self.db().execute(forget, [layer.as_bytes()]).map_err(|e| self.told(e))?;
        Ok(())
    }

    fn keep(&self, docs: &[Arc<LayerDoc>]) -> Result<()> {
        let mut db = self.db();
        let transaction = db.transaction().map_err(|e| self.told(e))?;
        for doc in docs {
            let text = serde_json::to_string(&**doc).unwrap_or_default();
            let insert = "INSERT INTO layer (digest, doc) VALUES (?1, ?2) ON CONFLICT DO UPDATE SET doc = excluded.doc";
            transaction
                .prepare_cached(insert)
                .and_then(|mut insert| insert.execute((doc.digest.as_bytes(), text)))
                .map_err(|e| self.told(e))?;
        }
        transaction.commit().map_err(|e| self.told(e))
    }

    /// Those of `layers` that are known to be in a summary, with that summary.
    pub(super) fn summaries(&self, layers: &[Digest]) -> Result<Vec<(Digest, Summary)>> {
        let db = self.db();
        let _reading = db.unchecked_transaction().map_err(|e| self.told(e))?;
        let mut select = db
            .prepare_cached("SELECT summary, summary_size FROM layer WHERE digest = ?1 AND summary IS NOT NULL")
            .map_err(|e| self.told(e))?;
        let mut found = Vec::new();
        for layer in layers {
            let known = select.query_row([layer.as_bytes()], |row| {
                Ok(Summary { blob: Digest::from_bytes(row.get(0)?), size: row.get::<_, i64>(1)?.unsigned_abs() })
            });
            found.extend(known.optional().map_err(|e| self.told(e))?.map(|summary| (*layer, summary)));
        }
        Ok(found)
    }

    /// Notes that the documents of `layers` are in `summary`, except where they are known to be in a smaller one.
    pub(super) fn set_summary(&self, layers: &[Digest], summary: &Summary) -> Result<()> {
        let mut db = self.db();
        let transaction = db.transaction().map_err(|e| self.told(e))?;
        for layer in layers {
            transaction
                .prepare_cached(
                    "UPDATE layer SET summary = ?2, summary_size = ?3
                     WHERE digest = ?1 AND (summary IS NULL OR summary_size >= ?3)",
                )
                .and_then(|mut update| update.execute((layer.as_bytes(), summary.blob.as_bytes(), summary.size as i64)))
                .map_err(|e| self.told(e))?;
        }
        transaction.commit().map_err(|e| self.told(e))
    }

    /// The documents of `layers`, in their order; those not known yet are read from the store, several at a time.
    pub fn layers(&self, store: &Store, layers: &[Digest]) -> Result<Vec<Arc<LayerDoc>>> {
        let mut found = self.known(layers)?;
        let missing: Vec<Digest> = layers.iter().filter(|d| !found.contains_key(d)).copied().collect();
        if !missing.is_empty() {
            let read: Vec<Arc<LayerDoc>> =
                missing.par_iter().map(|d| store.layer(d).map(Arc::new)).collect::<Result<_>>()?;
            self.keep(&read)?;
            found.extend(read.into_iter().map(|doc| (doc.digest, doc)));
        }
        let mut memory = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut docs = Vec::with_capacity(layers.len());
        for digest in layers {
            let doc = found
                .get(digest)
                .cloned()
                .ok_or_else(|| Error::new(Kind::NotFound, format!("layer {} is not in the store", digest.short())))?;
            memory.insert(*digest, doc.clone());
            docs.push(doc);
        }
        Ok(docs)
    }

    /// The document of one layer.
    pub fn layer(&self, store: &Store, layer: &Digest) -> Result<Arc<LayerDoc>> {
        self.layers(store, std::slice::from_ref(layer))?
            .pop()
            .ok_or_else(|| Error::new(Kind::NotFound, format!("layer {} is not in the store", layer.short())))
    }

    /// The layer that `key` stands for, where its document is still in the store.
    pub fn layer_of_key(&self, store: &Store, key: &Digest) -> Result<Option<Digest>> {
        let known: Option<Vec<u8>> = self
            .db()
            .prepare_cached("SELECT layer FROM key WHERE key = ?1")
            .map_err(|e| self.told(e))?
            .query_row([key.as_bytes()], |r| r.get(0))
            .optional()
            .map_err(|e| self.told(e))?;
        let known = known.and_then(|b| <[u8; 32]>::try_from(b).ok()).map(Digest::from_bytes);
        let layer = match known {
            Some(layer) => Some(layer),
            None => store.layer_of_key(key)?,
        };
        let Some(layer) = layer else { return Ok(None) };
        // What the index repeats may have gone from the store since.
        if !store.has_layer(&layer) {
            self.db().execute("DELETE FROM key WHERE key = ?1", [key.as_bytes()]).map_err(|e| self.told(e))?;
            return Ok(None);
        }
        if known.is_none() {
            self.db()
                .execute("INSERT OR REPLACE INTO key VALUES (?1, ?2)", (key.as_bytes(), layer.as_bytes()))
                .map_err(|e| self.told(e))?;
        }
        Ok(Some(layer))
    }

    /// What was noted under `name`.
    pub fn note(&self, name: &str) -> Result<Option<String>> {
        let db = self.db();
        let mut select = db.prepare_cached("SELECT value FROM note WHERE name = ?1").map_err(|e| self.told(e))?;
        select.query_row([name], |r| r.get(0)).optional().map_err(|e| self.told(e))
    }

    /// Notes `value` under `name`.
    pub fn set_note(&self, name: &str, value: &str) -> Result<()> {
        self.db().execute("INSERT OR REPLACE INTO note VALUES (?1, ?2)", (name, value)).map_err(|e| self.told(e))?;
        Ok(())
    }
}

fn remove(path: &Path) {
    for suffix in ["", "-wal", "-shm"] {
        let mut name = path.as_os_str().to_os_string();
        name.push(suffix);
        let _ = fs::remove_file(name);
    }
}

/// True when the file is at fault, and not the disk, its mode or another process.
fn is_damage(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    matches!(error.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase))
}

fn open(path: &Path) -> Result<Connection, rusqlite::Error> {
    let db = Connection::open(path)?;
    db.busy_timeout(Duration::from_secs(30))?;
    prepare(db)
}

/// Makes the tables where they are missing or of another format.
fn prepare(db: Connection) -> Result<Connection, rusqlite::Error> {
    // See Catalog::open.
    db.set_db_config(rusqlite::config::DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    db.pragma_update(None, "journal_mode", "WAL")?;
    db.pragma_update(None, "synchronous", "NORMAL")?;
    let format = |db: &Connection| db.pragma_query_value(None, "user_version", |r| r.get::<_, i64>(0));
    if format(&db)? == INDEX_FORMAT {
        // Nothing to make, so nobody has to wait for anybody.
        db.query_row("SELECT count(*) FROM note WHERE name = ''", [], |_| Ok(()))?;
        return Ok(db);
    }
    // Looked at inside the transaction: of two that begin at once, the second finds the first one's tables.
    db.execute_batch("BEGIN IMMEDIATE")?;
    if format(&db)? != INDEX_FORMAT {
        db.execute_batch(
            "DROP TABLE IF EXISTS layer; DROP TABLE IF EXISTS key; DROP TABLE IF EXISTS note;
             CREATE TABLE layer (digest BLOB PRIMARY KEY, doc TEXT NOT NULL, summary BLOB, summary_size INTEGER) WITHOUT ROWID;
             CREATE TABLE key (key BLOB PRIMARY KEY, layer BLOB NOT NULL) WITHOUT ROWID;
             CREATE TABLE note (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;",
        )?;
        db.pragma_update(None, "user_version", INDEX_FORMAT)?;
    }
    db.execute_batch("COMMIT")?;
    db.query_row("SELECT count(*) FROM note WHERE name = ''", [], |_| Ok(()))?;
    Ok(db)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_index_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(&dir.path().join("store")).unwrap();
        let index = Index::open(dir.path(), &store).unwrap();
        index.set_note("a", "b").unwrap();
        let path = index.path().to_path_buf();
        drop(index);
        fs::write(&path, b"this is no database, and it is long enough to be looked at as one").unwrap();
        let index = Index::open(dir.path(), &store).unwrap();
        assert_eq!(index.note("a").unwrap(), None);
        index.set_note("a", "c").unwrap();
        assert_eq!(index.note("a").unwrap().as_deref(), Some("c"));
        // Damage that is met only at work.
        for n in 0..500 {
            index.set_note(&format!("n{n}"), &"x".repeat(100)).unwrap();
        }
        drop(index);
        let mut bytes = fs::read(&path).unwrap();
        bytes[4096..].fill(0xA5);
        fs::write(&path, bytes).unwrap();
        match Index::open(dir.path(), &store).and_then(|index| index.note("n7")) {
            Ok(note) => assert_eq!(note, None),
            Err(error) => assert!(error.hint_text().is_some_and(|h| h.contains("run the command again")), "{error:?}"),
        }
        Index::open(dir.path(), &store).unwrap().set_note("a", "d").unwrap();
    }
}
