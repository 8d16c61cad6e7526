//! Catalogs that somebody has made to do harm.

use std::time::Duration;

use rusqlite::MAIN_DB;

use super::*;
use crate::store::catalog::bounds::SCHEMA;

const PAGE: usize = 512;

fn layer() -> Digest {
    Digest::of(b"layer")
}

/// What a file has whose database `make` fills, which has pages of 512 bytes.
fn file_of(make: impl FnOnce(&Connection)) -> Vec<u8> {
    let mut db = Connection::open_in_memory().unwrap();
    db.execute_batch(&format!("PRAGMA page_size={PAGE}")).unwrap();
    make(&db);
    db.serialize(MAIN_DB).unwrap().to_vec()
}

fn meta(db: &Connection, rows: u32) {
    for (key, value) in
        [("format", CATALOG_FORMAT.to_string()), ("layer", layer().to_string()), ("rows", rows.to_string())]
    {
        db.execute("INSERT INTO meta VALUES (?1, ?2)", (key, value)).unwrap();
    }
}

fn row(db: &Connection, parent: i64, name: &[u8], id: i64) {
    db.execute("INSERT INTO entry VALUES (?1, ?2, ?3, 0, 493, 0, NULL, NULL, NULL)", (parent, name, id)).unwrap();
}

/// A catalog with so many directories below its root, and whatever `change` does to it.
fn catalog_of(rows: u32, change: impl FnOnce(&Connection)) -> Vec<u8> {
    file_of(|db| {
        db.execute_batch(SCHEMA).unwrap();
        meta(db, rows);
        row(db, 0, b"", 0);
        (1..rows.min(20)).for_each(|id| row(db, 0, format!("d{id:03}").as_bytes(), i64::from(id)));
        change(db);
    })
}

/// A catalog whose schema is ours but for `entry`, which is `instead`.
fn with_entry(instead: &str) -> Vec<u8> {
    file_of(|db| {
        let begin = SCHEMA.find("CREATE TABLE entry").unwrap();
        let end = SCHEMA.find("CREATE TABLE chunk").unwrap();
        db.execute_batch(&format!("{}{instead};{}", &SCHEMA[..begin], &SCHEMA[end..])).unwrap();
        meta(db, 3);
    })
}

/// The page that `table` begins on, from 1.
fn root_page(bytes: &[u8], table: &str) -> usize {
    let mut copy = Connection::open_in_memory().unwrap();
    copy.deserialize_read_exact(MAIN_DB, bytes, bytes.len(), true).unwrap();
    let page: u32 =
        copy.query_row("SELECT rootpage FROM sqlite_schema WHERE name = ?1", [table], |row| row.get(0)).unwrap();
    page as usize
}

/// A row of `entry` as it lies in a page, that of a directory.
fn record(parent: u8, name: &[u8], id: u8) -> Vec<u8> {
    // Types of the values: a byte each for numbers, 12 + 2n for bytes, 0 for nothing.
    let types = [1, 12 + 2 * name.len() as u8, 1, 1, 2, 8, 0, 0, 0];
    let values = [&[parent], name, &[id, 0, 1, 0xed]].concat();
    [&[10][..], &types, &values].concat()
}

/// A page of an index: the cells, and the page behind the last where it is no leaf.
fn page(cells: &[Vec<u8>], last: Option<u32>) -> Vec<u8> {
    let mut page = vec![0; PAGE];
    let mut end = PAGE;
    let head = if last.is_some() { 12 } else { 8 };
    for (at, cell) in cells.iter().enumerate() {
        end -= cell.len();
        page[end..end + cell.len()].copy_from_slice(cell);
        page[head + 2 * at..head + 2 * at + 2].copy_from_slice(&(end as u16).to_be_bytes());
    }
    page[0] = if last.is_some() { 2 } else { 10 };
    page[3..5].copy_from_slice(&(cells.len() as u16).to_be_bytes());
    page[5..7].copy_from_slice(&(end as u16).to_be_bytes());
    if let Some(last) = last {
        page[8..12].copy_from_slice(&last.to_be_bytes());
    }
    page
}

/// A catalog of a few KB whose table of rows has 3^19 of them: each page names the next one three times.
fn more_rows_than_can_be_counted(id: u8) -> Vec<u8> {
    const LEVELS: u32 = 19;
    let mut bytes = catalog_of(100, |_| ());
    let root = root_page(&bytes, "entry");
    let first = (bytes.len() / PAGE) as u32 + 1;
    let cell = |id: u8, below: Option<u32>| {
        let record = record(0, b"x", id);
        let below = below.map(|page| page.to_be_bytes().to_vec()).unwrap_or_default();
        [&below[..], &[record.len() as u8], &record].concat()
    };
    for level in 0..LEVELS {
        let next = first + level;
        let below = (level + 1 < LEVELS).then_some(next);
        let page = page(&[cell(id, below), cell(id, below)], below);
        if level == 0 {
            bytes[(root - 1) * PAGE..root * PAGE].copy_from_slice(&page);
        } else {
            bytes.extend(page);
        }
    }
    let pages = (bytes.len() / PAGE) as u32;
    bytes[28..32].copy_from_slice(&pages.to_be_bytes());
    bytes
}

/// Hostile catalogs by what they do. Those that have something beside our schema, "a view" or the like, are not opened; of
/// others some are, and are refused at the first look at all rows.
pub(crate) fn hostile() -> Vec<(&'static str, Vec<u8>)> {
    let endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)";
    let columns = "0 AS kind, 493 AS mode, 0 AS size, NULL AS digest, NULL AS offset, NULL AS target";
    let view = format!("CREATE VIEW entry AS {endless} SELECT 0 AS parent, x'61' AS name, i AS id, {columns} FROM n");
    let generated = "CREATE TABLE entry (parent INTEGER, name BLOB, id INTEGER, kind INTEGER, mode INTEGER, size INTEGER,
        digest BLOB AS (hex(zeroblob(400000000))), offset INTEGER, target BLOB, PRIMARY KEY (parent, name)) WITHOUT ROWID";
    let meta_view = file_of(|db| {
        let sql = format!("CREATE VIEW meta AS {endless} SELECT 'format' AS key, i AS value FROM n WHERE i < 0");
        db.execute_batch(&sql).unwrap();
    });
    let mut cut = catalog_of(100, |_| ());
    cut.truncate(cut.len() - PAGE);
    vec![
        ("a view in the place of the rows", with_entry(&view)),
        ("a view in the place of what describes it", meta_view),
        ("a column that is computed", with_entry(generated)),
        (
            "a table that SQLite asks a module for",
            with_entry("CREATE VIRTUAL TABLE entry USING fts5(parent, name, id)"),
        ),
        (
            "a trigger more",
            catalog_of(3, |db| {
                db.execute_batch("CREATE TRIGGER t AFTER INSERT ON meta BEGIN SELECT 1; END").unwrap();
            }),
        ),
        ("more rows than it has room for", catalog_of(u32::MAX, |_| ())),
        ("fewer rows than it has", catalog_of(4, |db| row(db, 0, b"more", 2_000))),
        ("no rows", catalog_of(0, |_| ())),
        ("pages that are named more than once", more_rows_than_can_be_counted(7)),
        ("such pages with rows that are left out", more_rows_than_can_be_counted(0)),
        ("cut off", cut),
    ]
}

#[test]
fn a_hostile_catalog_is_refused_and_takes_neither_long_nor_much_memory() {
    let dir = tempfile::tempdir().unwrap();
    for (what, bytes) in hostile() {
        let path = dir.path().join("catalog");
        std::fs::write(&path, &bytes).unwrap();
        for opened in [Catalog::open(&path, &layer()), Catalog::of_bytes(bytes.clone(), &path, &layer())] {
            if what.starts_with("a ") {
                let error = opened.as_ref().unwrap_err().to_string();
                assert!(error.contains("other tables"), "{what}: {error}");
            }
            // Without bounds some of it would never end: who waits for it on another thread can tell.
            let (done, is_done) = std::sync::mpsc::channel();
            let asked = std::thread::spawn(move || {
                let all = opened.and_then(|catalog| {
                    let (mut scanned, mut listed) = (0, 0);
                    let _ = (catalog.scan(|_| scanned += 1), catalog.scan_dir(0, |_| listed += 1));
                    let _ = catalog.lookup(0, b"x");
                    assert!(scanned <= catalog.len() && listed <= catalog.len());
                    catalog.verify()
                });
                let _ = done.send(all.map(|rows| rows.len()));
            });
            let refused = is_done.recv_timeout(Duration::from_secs(60)).unwrap_or_else(|_| panic!("{what}: no end"));
            assert_eq!(refused.map_err(|error| error.kind()), Err(Kind::Corrupt), "{what}");
            asked.join().unwrap();
        }
    }
}

#[test]
fn a_path_that_nobody_could_open_is_refused_before_it_takes_memory() {
    let name = [b'n'; 255];
    let deep = |depth: i64| {
        catalog_of(1, |db| {
            db.execute("UPDATE meta SET value = ?1 WHERE key = 'rows'", [depth + 1]).unwrap();
            (1..=depth).for_each(|id| row(db, id - 1, &name, id));
        })
    };
    for (depth, refused) in [(16, "digest names"), (17, "4095 bytes"), (400, "4095 bytes")] {
        let catalog = Catalog::of_bytes(deep(depth), Path::new("x"), &layer()).unwrap();
        assert_eq!(catalog.path_of(depth as u32).unwrap().len() as i64, depth * 256 - 1);
        let error = catalog.verify().unwrap_err();
        assert!(error.to_string().contains(refused), "{depth}: {error}");
    }
}
