//! What a catalog may cost.
//!
//! A catalog may come from anywhere. SQLite keeps a hostile file from harming memory, but not from taking time and room: a
//! view in the place of a table may compute for ever, and a page that several others name is read once for each way to it,
//! so that twenty small pages have more rows than anybody can count. Therefore a catalog has our schema and nothing else,
//! no more rows than its length has room for, and each question has a number of steps after which it ends.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use rusqlite::Connection;
use rusqlite::config::DbConfig;
use rusqlite::limits::Limit;

/// What a catalog's tables and index are made with. Part of the format: a reader takes no other, to the letter.
pub(in crate::store) const SCHEMA: &str = "
    CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
    CREATE TABLE entry (
        parent INTEGER NOT NULL,
        name BLOB NOT NULL,
        id INTEGER NOT NULL,
        kind INTEGER NOT NULL,
        mode INTEGER NOT NULL,
        size INTEGER NOT NULL,
        digest BLOB,
        offset INTEGER,
        target BLOB,
        PRIMARY KEY (parent, name)
    ) WITHOUT ROWID;
    CREATE UNIQUE INDEX entry_id ON entry (id);
    CREATE TABLE chunk (object BLOB PRIMARY KEY, digests BLOB NOT NULL) WITHOUT ROWID;
";

/// Bytes that a row takes at least: its cell and that of the index, each with a header, and their places in the pages.
const ROW_MIN: u64 = 16;
/// SQLite asks whether to go on after so many steps.
const ASKS_EVERY: i32 = 1000;
/// Steps of a question that shows one row, which takes some thirty.
const STEPS: u64 = 20_000;
/// Steps for each row of a question that shows many, which takes some twenty.
const STEPS_A_ROW: u64 = 64;
/// Bytes of one value at most: the digests of the chunks of a file of 512 GiB.
const VALUE_MAX: i32 = 64 << 20;
/// Bytes of a statement at most, ours or one of the schema.
const SQL_MAX: i32 = 4096;

/// What is left to the question that is being asked, in units of [`ASKS_EVERY`].
#[derive(Debug)]
pub(super) struct Bounds(Arc<AtomicI64>);

impl Bounds {
    /// Makes `db`, which nobody has read from, safe to ask.
    pub(super) fn set(db: &mut Connection) -> rusqlite::Result<Bounds> {
        db.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
        db.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
        db.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_VIEW, false)?;
        db.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
        for (limit, most) in [
            (Limit::SQLITE_LIMIT_LENGTH, VALUE_MAX),
            (Limit::SQLITE_LIMIT_SQL_LENGTH, SQL_MAX),
            (Limit::SQLITE_LIMIT_COLUMN, 32),
            (Limit::SQLITE_LIMIT_EXPR_DEPTH, 20),
            (Limit::SQLITE_LIMIT_COMPOUND_SELECT, 2),
            (Limit::SQLITE_LIMIT_VDBE_OP, 10_000),
            (Limit::SQLITE_LIMIT_ATTACHED, 0),
            (Limit::SQLITE_LIMIT_WORKER_THREADS, 0),
        ] {
            db.set_limit(limit, most)?;
        }
        let left = Arc::new(AtomicI64::new(0));
        let bounds = Bounds(left.clone());
        bounds.begin(0);
        db.progress_handler(ASKS_EVERY, Some(move || left.fetch_sub(1, Ordering::Relaxed) <= 0))?;
        Ok(bounds)
    }

    /// A question begins, which shows so many rows at most.
    pub(super) fn begin(&self, rows: u64) {
        let steps = rows.saturating_mul(STEPS_A_ROW).saturating_add(STEPS) / ASKS_EVERY as u64;
        self.0.store(i64::try_from(steps).unwrap_or(i64::MAX), Ordering::Relaxed);
    }
}

/// True when `db` has the schema of a catalog, in whatever order.
pub(super) fn has_schema(db: &Connection) -> rusqlite::Result<bool> {
    let mut all = db.prepare("SELECT sql FROM sqlite_schema LIMIT 10")?;
    let found = all.query_map((), |row| row.get(0))?.collect::<rusqlite::Result<BTreeSet<Option<String>>>>()?;
    let ours = SCHEMA.split(';').map(str::trim).filter(|statement| !statement.is_empty());
    Ok(ours.map(|statement| Some(statement.to_string())).collect::<BTreeSet<_>>() == found)
}

/// How many rows a catalog of `length` bytes can have.
pub(super) fn rows_max(length: u64) -> u64 {
    length / ROW_MIN
}
