//! What this machine has seen of what was signed, in a SQLite database on its local disk.
//!
//! A signature does not grow old: who can write to the store can take the newest pointer away, and the one before it is
//! as good as it was. Only memory helps. Of each environment the newest pointer is remembered, and every version that was
//! read; of each workflow the newest statement of whose it is. Unlike the index this repeats nothing, so a database that is damaged is an error and is not begun anew.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension};

use crate::environment::EnvName;
use crate::error::{Error, IoContext, Kind, Result};

/// Rows of pointers.
const POINTER: i64 = 0;
/// Rows of versions.
const VERSION: i64 = 1;
/// Rows of owners, of a workflow instead of an environment: the one has no slash in its name, the other has.
const OWNER: i64 = 2;

/// See the module.
#[derive(Debug)]
pub(super) struct Seen {
    db: Mutex<Connection>,
    path: PathBuf,
}

impl Seen {
    /// Opens the memory of the store called `id` in directory `dir` (made if missing).
    pub(super) fn open(dir: &Path, id: &str) -> Result<Seen> {
        std::fs::create_dir_all(dir).at("creating", dir)?;
        // The id comes from the store, which is not to be trusted with names.
        let id: String = id.chars().filter(char::is_ascii_alphanumeric).take(64).collect();
        let path = dir.join(format!("seen-{id}.sqlite"));
        // SQLite says why where it cannot be made.
        drop(crate::private::append(&path));
        let opened = Connection::open(&path).and_then(prepare);
        let db = opened.map_err(|error| told(&path, error))?;
        Ok(Seen { db: Mutex::new(db), path })
    }

    /// One that lives as long as this value.
    pub(super) fn in_memory() -> Result<Seen> {
        let path = PathBuf::from(":memory:");
        let db = Connection::open_in_memory().and_then(prepare).map_err(|error| told(&path, error))?;
        Ok(Seen { db: Mutex::new(db), path })
    }

    fn db(&self) -> MutexGuard<'_, Connection> {
        self.db.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sequence number and nonce of the newest pointer of `name`.
    pub(super) fn pointer(&self, name: &EnvName) -> Result<Option<(u64, String)>> {
        self.newest(&name.to_string(), POINTER)
    }

    /// Sequence number and nonce of the newest statement of whose `workflow` is.
    pub(super) fn owner(&self, workflow: &str) -> Result<Option<(u64, String)>> {
        self.newest(workflow, OWNER)
    }

    fn newest(&self, name: &str, kind: i64) -> Result<Option<(u64, String)>> {
        let select = "SELECT number, nonce FROM seen WHERE environment = ?1 AND kind = ?2 ORDER BY number DESC LIMIT 1";
        let found = self.db().prepare_cached(select).and_then(|mut select| {
            let read = |row: &rusqlite::Row<'_>| Ok((row.get::<_, i64>(0)?.unsigned_abs(), row.get(1)?));
            select.query_row((name, kind), read).optional()
        });
        found.map_err(|error| told(&self.path, error))
    }

    /// The nonce of version `number` of `name`.
    pub(super) fn version(&self, name: &EnvName, number: u64) -> Result<Option<String>> {
        let select = "SELECT nonce FROM seen WHERE environment = ?1 AND kind = ?2 AND number = ?3";
        let found = self.db().prepare_cached(select).and_then(|mut select| {
            select.query_row((name.to_string(), VERSION, number as i64), |row| row.get(0)).optional()
        });
        found.map_err(|error| told(&self.path, error))
    }

    /// The highest number of a version of `name`; 0 when there is none.
    pub(super) fn highest_version(&self, name: &EnvName) -> Result<u64> {
        let select = "SELECT coalesce(max(number), 0) FROM seen WHERE environment = ?1 AND kind = ?2";
        let found = self.db().query_row(select, (name.to_string(), VERSION), |row| row.get::<_, i64>(0));
        found.map(i64::unsigned_abs).map_err(|error| told(&self.path, error))
    }

    /// Remembers a pointer as the newest, unless a newer one is.
    pub(super) fn note_pointer(&self, name: &EnvName, sequence: u64, nonce: &str) -> Result<()> {
        self.note_newest(&name.to_string(), POINTER, sequence, nonce)
    }

    /// The same for whose `workflow` is.
    pub(super) fn note_owner(&self, workflow: &str, sequence: u64, nonce: &str) -> Result<()> {
        self.note_newest(workflow, OWNER, sequence, nonce)
    }

    fn note_newest(&self, name: &str, kind: i64, sequence: u64, nonce: &str) -> Result<()> {
        self.note(name, kind, sequence, nonce)?;
        let older = "DELETE FROM seen WHERE environment = ?1 AND kind = ?2 AND number <
                     (SELECT max(number) FROM seen WHERE environment = ?1 AND kind = ?2)";
        let done = self.db().execute(older, (name, kind));
        done.map(|_| ()).map_err(|error| told(&self.path, error))
    }

    /// Remembers a version.
    pub(super) fn note_version(&self, name: &EnvName, number: u64, nonce: &str) -> Result<()> {
        self.note(&name.to_string(), VERSION, number, nonce)
    }

    fn note(&self, name: &str, kind: i64, number: u64, nonce: &str) -> Result<()> {
        let insert = "INSERT OR IGNORE INTO seen VALUES (?1, ?2, ?3, ?4)";
        let done = self.db().execute(insert, (name, kind, number as i64, nonce));
        done.map(|_| ()).map_err(|error| told(&self.path, error))
    }

    /// Forgets everything of `name`, an environment or a workflow; false when that was nothing.
    pub(super) fn forget(&self, name: &str) -> Result<bool> {
        let done = self.db().execute("DELETE FROM seen WHERE environment = ?1", [name]);
        done.map(|rows| rows > 0).map_err(|error| told(&self.path, error))
    }
}

fn prepare(db: Connection) -> rusqlite::Result<Connection> {
    db.busy_timeout(Duration::from_secs(30))?;
    db.pragma_update(None, "journal_mode", "WAL")?;
    // A power cut may cost what was seen last; to wait for the disk with every name would cost minutes of a listing.
    db.pragma_update(None, "synchronous", "NORMAL")?;
    db.execute_batch(
        "CREATE TABLE IF NOT EXISTS seen (environment TEXT NOT NULL, kind INTEGER NOT NULL, number INTEGER NOT NULL,
             nonce TEXT NOT NULL, PRIMARY KEY (environment, kind, number)) WITHOUT ROWID;",
    )?;
    db.query_row("SELECT count(*) FROM (SELECT 1 FROM seen LIMIT 1)", [], |_| Ok(()))?;
    Ok(db)
}

fn told(path: &Path, error: rusqlite::Error) -> Error {
    let what = format!("what this machine has seen of signed versions, {}, cannot be used", path.display());
    Error::new(Kind::Failed, what).with_source(error).hint(
        "check its disk and mode; if it is damaged, move it away: then the newest signed statements of the store are believed",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_is_remembered_by_the_next_process_and_only_forgotten_when_told() {
        let dir = tempfile::tempdir().unwrap();
        let (name, other): (EnvName, EnvName) = ("w/a".parse().unwrap(), "w/b".parse().unwrap());
        let seen = Seen::open(dir.path(), "ab/../12").unwrap();
        for (sequence, nonce) in [(3, "c"), (7, "d"), (5, "e"), (7, "x")] {
            seen.note_pointer(&name, sequence, nonce).unwrap();
        }
        seen.note_version(&name, 2, "v").unwrap();
        drop(seen);
        let seen = Seen::open(dir.path(), "ab/../12").unwrap();
        assert_eq!(seen.pointer(&name).unwrap(), Some((7, "d".into())));
        assert_eq!((seen.version(&name, 2).unwrap(), seen.version(&name, 1).unwrap()), (Some("v".into()), None));
        assert_eq!((seen.highest_version(&name).unwrap(), seen.highest_version(&other).unwrap()), (2, 0));
        seen.note_owner("w", 4, "o").unwrap();
        assert!(seen.forget("w/a").unwrap() && !seen.forget("w/a").unwrap());
        assert_eq!(seen.pointer(&name).unwrap(), None);
        assert_eq!(seen.owner("w").unwrap(), Some((4, "o".into())));
        assert!(seen.forget("w").unwrap() && seen.owner("w").unwrap().is_none());
        assert!(dir.path().join("seen-ab12.sqlite").exists());
    }

    #[test]
    fn a_damaged_memory_is_an_error_and_is_not_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seen-1.sqlite");
        std::fs::write(&path, "this is no database, and it is long enough to be looked at as one".repeat(20)).unwrap();
        let before = std::fs::read(&path).unwrap();
        let error = Seen::open(dir.path(), "1").unwrap_err();
        assert!(error.hint_text().is_some_and(|hint| hint.contains("move it away")), "{error:?}");
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }
}
