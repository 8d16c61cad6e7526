//! What is known of the cache's files over the life of a process: which are sealed, and when they were used last.
//!
//! A file is sealed by its identity: inode, length, and times of modification and change to the nanosecond. Whoever
//! writes to it, or restores it from somewhere, changes at least the time of change, which nobody can set. What this
//! cannot see are bytes that a disk changes by itself.

use std::collections::HashMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rusqlite::{Connection, OptionalExtension};

use super::{Key, lock};
use crate::environment::Digest;
use crate::error::{Error, Kind, Result};
use crate::store::Room;

/// Bumped when the table changes; a ledger of another number is thrown away.
const FORMAT: i64 = 1;

/// What tells a file from what it was before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    inode: i64,
    size: i64,
    modified: i64,
    changed: i64,
}

impl Identity {
    pub(super) fn of(meta: &Metadata) -> Identity {
        let time = |seconds: i64, nanos: i64| seconds.wrapping_mul(1_000_000_000).wrapping_add(nanos);
        Identity {
            inode: meta.ino() as i64,
            size: meta.size() as i64,
            modified: time(meta.mtime(), meta.mtime_nsec()),
            changed: time(meta.ctime(), meta.ctime_nsec()),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Ledger {
    db: Mutex<Connection>,
    path: PathBuf,
}

fn room_number(room: Room) -> i64 {
    match room {
        Room::Blobs => 0,
        Room::Packs => 1,
        Room::Catalogs => 2,
    }
}

impl Ledger {
    /// Opens the ledger at `path`; one that cannot be read is begun anew.
    pub(super) fn open(path: &Path) -> Result<Ledger> {
        let db = open(path).or_else(|error| {
            tracing::warn!(%error, "the cache's ledger is begun anew");
            for suffix in ["", "-wal", "-shm"] {
                let mut name = path.as_os_str().to_os_string();
                name.push(suffix);
                let _ = std::fs::remove_file(name);
            }
            open(path)
        });
        let db = db.map_err(|source| {
            Error::new(Kind::Failed, format!("the cache's ledger {} cannot be opened", path.display()))
                .hint("check that the cache is writable and on a local disk with free space")
                .with_source(source)
        })?;
        Ok(Ledger { db: Mutex::new(db), path: path.to_path_buf() })
    }

    fn told(&self, source: rusqlite::Error) -> Error {
        Error::new(Kind::Failed, format!("the cache's ledger {} cannot be used", self.path.display()))
            .with_source(source)
    }

    /// When each file was used last, in milliseconds since 1970.
    pub(super) fn used(&self) -> Result<HashMap<Key, u64>> {
        let db = lock(&self.db);
        let mut select = db.prepare("SELECT room, digest, used FROM file").map_err(|e| self.told(e))?;
        let rows =
            select.query_map((), |row| Ok((row.get::<_, i64>(0)?, row.get::<_, [u8; 32]>(1)?, row.get::<_, i64>(2)?)));
        let mut used = HashMap::new();
        for row in rows.map_err(|e| self.told(e))?.flatten() {
            let room = Room::ALL.into_iter().find(|room| room_number(*room) == row.0);
            used.extend(room.map(|room| ((room, Digest::from_bytes(row.1)), row.2.max(0) as u64)));
        }
        Ok(used)
    }

    /// True when `key` was sealed as a file that is still the one with `identity`.
    pub(super) fn is_sealed(&self, key: Key, identity: &Identity) -> bool {
        let db = lock(&self.db);
        let select = "SELECT inode, size, modified, changed FROM file WHERE room = ?1 AND digest = ?2 AND sealed";
        let known = db.prepare_cached(select).and_then(|mut select| {
            let identity = |row: &rusqlite::Row<'_>| {
                Ok(Identity { inode: row.get(0)?, size: row.get(1)?, modified: row.get(2)?, changed: row.get(3)? })
            };
            select.query_row((room_number(key.0), key.1.as_bytes()), identity).optional()
        });
        known.ok().flatten().is_some_and(|known| known == *identity)
    }

    pub(super) fn seal(&self, key: Key, identity: &Identity, used: u64) {
        let db = lock(&self.db);
        let insert = "INSERT OR REPLACE INTO file VALUES (?1, ?2, ?3, 1, ?4, ?5, ?6, ?7)";
        let Identity { inode, size, modified, changed } = *identity;
        let row = (room_number(key.0), key.1.as_bytes(), used as i64, inode, size, modified, changed);
        // What is not written down is compared again one day.
        let _ = db.prepare_cached(insert).and_then(|mut insert| insert.execute(row));
    }

    pub(super) fn note_used(&self, used: impl Iterator<Item = (Key, u64)>) -> Result<()> {
        let mut db = lock(&self.db);
        let transaction = db.transaction().map_err(|e| self.told(e))?;
        let upsert = "INSERT INTO file (room, digest, used, sealed) VALUES (?1, ?2, ?3, 0)
                      ON CONFLICT DO UPDATE SET used = excluded.used";
        for (key, used) in used {
            transaction
                .prepare_cached(upsert)
                .and_then(|mut upsert| upsert.execute((room_number(key.0), key.1.as_bytes(), used as i64)))
                .map_err(|e| self.told(e))?;
        }
        transaction.commit().map_err(|e| self.told(e))
    }

    /// Removes what is known of files that are gone.
    pub(super) fn forget(&self, keys: impl Iterator<Item = Key>) {
        let mut db = lock(&self.db);
        // A row without a file says nothing.
        let _ = db.transaction().and_then(|transaction| {
            for key in keys {
                transaction
                    .prepare_cached("DELETE FROM file WHERE room = ?1 AND digest = ?2")?
                    .execute((room_number(key.0), key.1.as_bytes()))?;
            }
            transaction.commit()
        });
    }
}

fn open(path: &Path) -> Result<Connection, rusqlite::Error> {
    let db = Connection::open(path)?;
    db.pragma_update(None, "journal_mode", "WAL")?;
    // It must not outlive the files that it speaks of; those are synced before.
    db.pragma_update(None, "synchronous", "NORMAL")?;
    if db.pragma_query_value(None, "user_version", |r| r.get::<_, i64>(0))? != FORMAT {
        db.execute_batch(
            "DROP TABLE IF EXISTS file;
             CREATE TABLE file (
                 room INTEGER NOT NULL, digest BLOB NOT NULL, used INTEGER NOT NULL, sealed INTEGER NOT NULL,
                 inode INTEGER, size INTEGER, modified INTEGER, changed INTEGER,
                 PRIMARY KEY (room, digest)
             ) WITHOUT ROWID;",
        )?;
        db.pragma_update(None, "user_version", FORMAT)?;
    }
    // All of it, so that damage shows now.
    db.query_row("SELECT total(used), total(sealed) FROM file", (), |_| Ok(()))?;
    Ok(db)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Identity = Identity { inode: 1, size: 2, modified: 3, changed: 4 };

    fn key(n: u8) -> Key {
        (Room::Blobs, Digest::of(&[n]))
    }

    #[test]
    fn what_is_sealed_stays_sealed_until_anything_about_the_file_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.sqlite");
        let ledger = Ledger::open(&path).unwrap();
        ledger.seal(key(1), &ONE, 7);
        ledger.note_used([(key(1), 8), (key(2), 9)].into_iter()).unwrap();
        drop(ledger);
        let ledger = Ledger::open(&path).unwrap();
        assert_eq!(ledger.used().unwrap(), HashMap::from([(key(1), 8), (key(2), 9)]));
        assert!(ledger.is_sealed(key(1), &ONE) && !ledger.is_sealed(key(2), &ONE));
        assert!(!ledger.is_sealed((Room::Packs, key(1).1), &ONE));
        let others = [
            Identity { inode: 2, ..ONE },
            Identity { size: 3, ..ONE },
            Identity { modified: 4, ..ONE },
            Identity { changed: 5, ..ONE },
        ];
        assert!(others.iter().all(|other| !ledger.is_sealed(key(1), other)));
        ledger.forget([key(1)].into_iter());
        assert!(!ledger.is_sealed(key(1), &ONE));
    }

    #[test]
    fn a_damaged_ledger_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.sqlite");
        let fill = || {
            let ledger = Ledger::open(&path).unwrap();
            for n in 0..200 {
                ledger.seal(key(n), &ONE, 1);
            }
        };
        fill();
        let whole = std::fs::read(&path).unwrap();
        let damaged: [fn(&mut Vec<u8>); 5] = [
            |bytes| bytes.fill(0x5A),
            |bytes| bytes.truncate(1000),
            |bytes| bytes[4096..].fill(0xA5),
            |bytes| bytes[100] ^= 1,
            Vec::clear,
        ];
        for (n, damage) in damaged.iter().enumerate() {
            let mut bytes = whole.clone();
            damage(&mut bytes);
            std::fs::write(&path, bytes).unwrap();
            let ledger = Ledger::open(&path).unwrap();
            ledger.used().unwrap();
            ledger.seal(key(201), &ONE, 1);
            assert!(ledger.is_sealed(key(201), &ONE), "damage {n}");
            drop(ledger);
            fill();
        }
    }

    #[test]
    fn a_ledger_of_another_format_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.sqlite");
        Ledger::open(&path).unwrap().seal(key(1), &ONE, 1);
        Connection::open(&path).unwrap().pragma_update(None, "user_version", FORMAT + 1).unwrap();
        assert!(Ledger::open(&path).unwrap().used().unwrap().is_empty());
    }
}
