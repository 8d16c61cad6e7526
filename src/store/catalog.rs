//! Catalogs: a layer's tree as an immutable SQLite file.
//!
//! ```sql
//! meta(key, value)                                              -- format, layer, rows, pack, pack_size
//! entry(parent, name, id, kind, mode, size, digest, offset, target, PRIMARY KEY (parent, name)) WITHOUT ROWID
//! entry_id(id)                                                  -- unique index, for answers by inode number
//! chunk(object, digests)                                        -- digests of the chunks of pack and large files
//! ```
//!
//! Rows are numbered from 0, the root, in order of path, so a parent's number is below its children's. A file of the
//! catalog is opened `immutable=1`, read-only, with `trusted_schema` off and defensive mode on, and is asked within
//! [`bounds`]: it may come from anywhere.

mod bounds;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, OptionalExtension};

use super::chunks::{CHUNK_SIZE, Chunks};
use super::layer::Canon;
use super::object::{Object, Room};
use super::row::{Node, Place, Row, RowId, is_component};
use crate::environment::Digest;
use crate::error::{Error, IoContext, Kind, Result};
use bounds::Bounds;
pub(super) use bounds::SCHEMA;

/// The catalog format that this program writes.
pub(super) const CATALOG_FORMAT: i64 = 2;

/// Bytes of a path below a layer's root at most: nothing longer can be opened (`PATH_MAX`).
pub(super) const PATH_LENGTH_MAX: usize = 4095;
/// Bytes of the header of a SQLite file.
const HEADER: usize = 100;

const COLUMNS: &str = "id, parent, name, kind, mode, size, digest, offset, target";

/// An open catalog.
///
/// Holds one SQLite connection (about 150 KB and a descriptor), so it is `Send` but not `Sync`.
#[derive(Debug)]
pub struct Catalog {
    db: Connection,
    bounds: Bounds,
    layer: Digest,
    rows: u32,
    /// Bytes of its file.
    length: u64,
    pack: Option<(Digest, u64)>,
}

impl Catalog {
    /// Opens the file at `path`, which must be the catalog of `layer`.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when it is missing; [`Kind::Corrupt`] when it is cut off, of another layer, or no catalog.
    pub fn open(path: &Path, layer: &Digest) -> Result<Catalog> {
        let length = length_of(path)?;
        let damaged = |source: rusqlite::Error| corrupt(path, "cannot be read").with_source(source);
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
        let db = Connection::open_with_flags(immutable_uri(path), flags).map_err(damaged)?;
        Catalog::of_connection(db, path, length, layer)
    }

    /// A catalog whose file has these bytes; `path` is where they come from.
    ///
    /// # Errors
    /// As [`Catalog::open`].
    pub fn of_bytes(bytes: Vec<u8>, path: &Path, layer: &Digest) -> Result<Catalog> {
        let damaged = |source: rusqlite::Error| corrupt(path, "cannot be read").with_source(source);
        let length = bytes.len();
        check_header(&bytes, length as u64, path)?;
        let mut db = Connection::open_in_memory().map_err(damaged)?;
        db.deserialize_read_exact(rusqlite::MAIN_DB, &*bytes, length, true).map_err(damaged)?;
        Catalog::of_connection(db, path, length as u64, layer)
    }

    fn of_connection(mut db: Connection, path: &Path, length: u64, layer: &Digest) -> Result<Catalog> {
        let damaged = |source: rusqlite::Error| corrupt(path, "cannot be read").with_source(source);
        let bounds = Bounds::set(&mut db).map_err(damaged)?;
        // Or SQLite prepares a statement anew whenever it is given another value, which takes longer than the answer.
        db.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true).map_err(damaged)?;
        db.set_prepared_statement_cache_capacity(8);
        // A mount keeps hundreds open; what SQLite does not keep, the page cache does.
        db.execute_batch("PRAGMA cache_size=-256; PRAGMA cell_size_check=ON").map_err(damaged)?;
        if !bounds::has_schema(&db).map_err(damaged)? {
            return Err(corrupt(path, "has other tables than a catalog"));
        }
        // Each statement costs some 20 us to prepare, and a first look at an environment opens all of its catalogs.
        let meta: BTreeMap<String, String> = db
            .prepare("SELECT key, CAST(value AS TEXT) FROM meta WHERE octet_length(value) < 100 LIMIT 100")
            .and_then(|mut all| all.query_map((), |row| Ok((row.get(0)?, row.get(1)?)))?.collect())
            .map_err(damaged)?;
        let text = |key: &str| meta.get(key).map(String::as_str);
        let format = text("format").and_then(|v| v.parse::<i64>().ok());
        match format {
            Some(CATALOG_FORMAT) => {}
            Some(newer) if newer > CATALOG_FORMAT => {
                return Err(Error::new(Kind::Unsupported, format!("catalog {} has format {newer}", path.display()))
                    .hint("upgrade envfabric on this machine"));
            }
            _ => return Err(corrupt(path, "has no format number")),
        }
        if text("layer") != Some(layer.to_string().as_str()) {
            return Err(corrupt(path, "belongs to another layer"));
        }
        let rows = text("rows").and_then(|v| v.parse::<u32>().ok()).ok_or_else(|| corrupt(path, "has no row count"))?;
        if rows == 0 || u64::from(rows) > bounds::rows_max(length) {
            return Err(corrupt(path, &format!("counts {rows} rows, for which it has no room")));
        }
        let pack = match (text("pack"), text("pack_size").and_then(|v| v.parse::<u64>().ok())) {
            (Some(pack), Some(size)) => Some((pack.parse()?, size)),
            (Some(_), None) => return Err(corrupt(path, "does not say how long its pack is")),
            (None, _) => None,
        };
        Ok(Catalog { db, bounds, layer: *layer, rows, length, pack })
    }

    /// The layer.
    pub fn layer(&self) -> &Digest {
        &self.layer
    }

    /// How many rows there are, the root included.
    pub fn len(&self) -> u32 {
        self.rows
    }

    /// Never true: there is always a root.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// The pack of the small files.
    pub fn pack(&self) -> Option<Object> {
        self.pack.map(|(digest, size)| Object { room: Room::Packs, digest, size })
    }

    /// The chunks of `object`, with `size` bytes: the pack, or a file of this layer.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when there is more than one and this catalog does not know them.
    pub fn chunks(&self, object: &Digest, size: u64) -> Result<Chunks> {
        match self.known_chunks(object, size)? {
            Some(chunks) => Ok(chunks),
            None if size <= CHUNK_SIZE => Ok(Chunks::single(*object)),
            None => Err(self.damaged(&format!("does not have the chunks of {}", object.short()))),
        }
    }

    fn known_chunks(&self, object: &Digest, size: u64) -> Result<Option<Chunks>> {
        let read = |e: rusqlite::Error| self.damaged("cannot be read").with_source(e);
        self.bounds.begin(1);
        let mut select = self.db.prepare_cached("SELECT digests FROM chunk WHERE object = ?1").map_err(read)?;
        let bytes: Option<Vec<u8>> =
            select.query_row([object.as_bytes()], |row| row.get(0)).optional().map_err(read)?;
        let wrong = || self.damaged(&format!("has a wrong number of chunks of {}", object.short()));
        bytes.map(|bytes| Chunks::from_bytes(&bytes, size).ok_or_else(wrong)).transpose()
    }

    /// The row called `name` in directory `parent`.
    pub fn lookup(&self, parent: RowId, name: &[u8]) -> Result<Option<Row>> {
        self.one(&format!("SELECT {COLUMNS} FROM entry WHERE parent = ?1 AND name = ?2 AND id > 0"), (parent, name))
    }

    /// The row with number `id`.
    pub fn row(&self, id: RowId) -> Result<Option<Row>> {
        self.one(&format!("SELECT {COLUMNS} FROM entry WHERE id = ?1"), (id,))
    }

    /// All rows in order of their numbers.
    pub fn all(&self) -> Result<Vec<Row>> {
        self.many(&format!("SELECT {COLUMNS} FROM entry ORDER BY id"), ())
    }

    /// Shows every row but the root to `look`: directory by directory in order of their numbers, which are above their
    /// parents', and by name within each. Cheaper than [`Catalog::all`] for those who need few of them.
    pub fn scan(&self, look: impl FnMut(Scanned<'_>)) -> Result<()> {
        self.scan_where("id > 0", (), look)
    }

    /// Shows everything directly in `parent` to `look`, sorted by name (bytes).
    pub fn scan_dir(&self, parent: RowId, look: impl FnMut(Scanned<'_>)) -> Result<()> {
        self.scan_where("parent = ?1 AND id > 0", (parent,), look)
    }

    fn scan_where(&self, which: &str, params: impl rusqlite::Params, mut look: impl FnMut(Scanned<'_>)) -> Result<()> {
        let read = |e: rusqlite::Error| self.damaged("cannot be read").with_source(e);
        let sql = format!(
            "SELECT parent, id, kind, size, offset, name, mode, length(target) FROM entry WHERE {which} ORDER BY parent, name"
        );
        self.bounds.begin(u64::from(self.rows));
        let mut statement = self.db.prepare_cached(&sql).map_err(read)?;
        let mut rows = statement.query(params).map_err(read)?;
        let mut left = self.rows;
        while let Some(row) = rows.next().map_err(read)? {
            left = left.checked_sub(1).ok_or_else(|| self.damaged("has more rows than it counts"))?;
            let number = |at| row.get::<_, u32>(at).ok().filter(|n| *n < self.rows);
            let bytes = |value: i64| u64::try_from(value).map_err(|_| self.damaged("has a negative size or offset"));
            let (Some(parent), Some(id)) = (number(0), number(1)) else {
                return Err(self.damaged("has a row number out of range"));
            };
            let kind = match row.get(2).map_err(read)? {
                0 => {
                    ScannedKind::Dir { subdirs: row.get::<_, u32>(3).map_err(|_| self.damaged("has a bad directory"))? }
                }
                1 => ScannedKind::File {
                    size: bytes(row.get(3).map_err(read)?)?,
                    offset: row.get::<_, Option<i64>>(4).map_err(read)?.map(bytes).transpose()?,
                    executable: row.get::<_, i64>(6).map_err(read)? & 0o111 != 0,
                },
                2 => ScannedKind::Symlink { size: bytes(row.get::<_, Option<i64>>(7).map_err(read)?.unwrap_or(0))? },
                _ => return Err(self.damaged(&format!("has a row {id} of no known kind"))),
            };
            let name = row.get_ref(5).map_err(read)?.as_blob().map_err(|_| self.damaged("has a name that is none"))?;
            if parent >= id || !is_component(name) {
                return Err(self.damaged(&format!("has a bad row {id}")));
            }
            look(Scanned { id, parent, name, kind });
        }
        Ok(())
    }

    /// The path of row `id` below the layer's root, components joined by `/`; empty for the root.
    pub fn path_of(&self, id: RowId) -> Result<Vec<u8>> {
        let mut parts: Vec<Vec<u8>> = Vec::new();
        let mut next = id;
        while next != 0 {
            let row = self.row(next)?.ok_or_else(|| self.damaged(&format!("has no row {next}")))?;
            parts.push(row.name);
            next = row.parent; // below `next`, or `decode` would have refused it: this ends
        }
        parts.reverse();
        Ok(parts.join(&b'/'))
    }

    /// The row at `path` below the root (components joined by `/`).
    pub fn find(&self, path: &[u8]) -> Result<Option<Row>> {
        let Some(mut at) = self.row(0)? else { return Ok(None) };
        for part in path.split(|b| *b == b'/').filter(|p| !p.is_empty()) {
            match self.lookup(at.id, part)? {
                Some(row) => at = row,
                None => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// Reads every row and computes the layer's digest from them; an error when it is not the layer's.
    /// Returns the rows.
    pub fn verify(&self) -> Result<Vec<Row>> {
        let rows = self.all()?;
        if rows.len() as u32 != self.rows || rows.iter().enumerate().any(|(i, r)| i as u32 != r.id) {
            return Err(self.damaged("does not have the rows it counts"));
        }
        let mut canon = Canon::default();
        // Rows are in order of path, so what is above one comes just before it: its row, and the length of its path.
        let mut above: Vec<(RowId, usize)> = vec![(0, 0)];
        let mut path = Vec::new();
        for row in &rows {
            if row.id > 0 {
                while above.pop_if(|(parent, _)| *parent != row.parent).is_some() {}
                let (_, length) =
                    above.last().ok_or_else(|| self.damaged("does not have its rows in order of path"))?;
                path.truncate(*length);
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(&row.name);
                if path.len() > PATH_LENGTH_MAX {
                    return Err(self.damaged(&format!("has a path of more than {PATH_LENGTH_MAX} bytes")));
                }
                if row.node.is_dir() {
                    above.push((row.id, path.len()));
                }
            }
            let chunks = match &row.node {
                Node::File { size, digest, .. } if *size > CHUNK_SIZE => Some(self.chunks(digest, *size)?),
                _ => None,
            };
            canon.row(&path, &row.node, chunks.as_ref());
        }
        if canon.finish() != self.layer {
            return Err(self.damaged("does not have the rows that its digest names"));
        }
        Ok(rows)
    }

    fn damaged(&self, what: &str) -> Error {
        Error::new(Kind::Corrupt, format!("the catalog of layer {} {what}", self.layer.short()))
            .hint("run `envfabric fsck`")
    }

    fn one(&self, sql: &str, params: impl rusqlite::Params) -> Result<Option<Row>> {
        let read = |e: rusqlite::Error| self.damaged("cannot be read").with_source(e);
        self.bounds.begin(1);
        let mut statement = self.db.prepare_cached(sql).map_err(read)?;
        let raw = statement.query_row(params, RawRow::read).optional().map_err(read)?;
        raw.map(|raw| raw.decode(self.rows).map_err(|what| self.damaged(&what))).transpose()
    }

    fn many(&self, sql: &str, params: impl rusqlite::Params) -> Result<Vec<Row>> {
        let read = |e: rusqlite::Error| self.damaged("cannot be read").with_source(e);
        self.bounds.begin(u64::from(self.rows));
        let mut statement = self.db.prepare_cached(sql).map_err(read)?;
        let mut found = Vec::new();
        let mut bytes = 0;
        for raw in statement.query_map(params, RawRow::read).map_err(read)? {
            let raw = raw.map_err(read)?;
            bytes += raw.bytes();
            // Pages that are named more than once show more than there is.
            if found.len() as u64 == u64::from(self.rows) || bytes > self.length {
                return Err(self.damaged("has more rows than it counts"));
            }
            found.push(raw.decode(self.rows).map_err(|what| self.damaged(&what))?);
        }
        Ok(found)
    }
}

/// A row as [`Catalog::scan`] shows it.
#[derive(Debug, Clone, Copy)]
pub struct Scanned<'a> {
    /// Its number.
    pub id: RowId,
    /// The directory that it is in.
    pub parent: RowId,
    /// One path component.
    pub name: &'a [u8],
    /// What it is.
    pub kind: ScannedKind,
}

/// What a scanned row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScannedKind {
    /// A directory.
    Dir {
        /// How many directories are directly in it.
        subdirs: u32,
    },
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
        /// Where in the layer's pack it is, if it is there.
        offset: Option<u64>,
        /// Mode 0755 instead of 0644.
        executable: bool,
    },
    /// A symbolic link.
    Symlink {
        /// Bytes of what it points to.
        size: u64,
    },
}

struct RawRow {
    id: i64,
    parent: i64,
    name: Vec<u8>,
    kind: i64,
    mode: i64,
    size: i64,
    digest: Option<Vec<u8>>,
    offset: Option<i64>,
    target: Option<Vec<u8>>,
}

impl RawRow {
    fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<RawRow> {
        Ok(RawRow {
            id: row.get(0)?,
            parent: row.get(1)?,
            name: row.get(2)?,
            kind: row.get(3)?,
            mode: row.get(4)?,
            size: row.get(5)?,
            digest: row.get(6)?,
            offset: row.get(7)?,
            target: row.get(8)?,
        })
    }

    /// Bytes of what has no fixed length.
    fn bytes(&self) -> u64 {
        (self.name.len() + self.target.as_ref().map_or(0, Vec::len)) as u64
    }

    /// Checks everything that the rest of the program relies on.
    fn decode(self, rows: u32) -> Result<Row, String> {
        let id = u32::try_from(self.id).ok().filter(|id| *id < rows).ok_or("has a row number out of range")?;
        let parent = u32::try_from(self.parent).ok().filter(|p| *p < id || (id == 0 && *p == 0));
        let parent = parent.ok_or_else(|| format!("has row {id} above its parent"))?;
        if !is_component(&self.name) && id != 0 {
            return Err(format!("has a bad name in row {id}"));
        }
        let size = u64::try_from(self.size).map_err(|_| format!("has a negative size in row {id}"))?;
        let node = match (self.kind, self.digest, self.target) {
            (0, None, None) => {
                Node::Dir { subdirs: u32::try_from(size).map_err(|_| "has a bad directory".to_string())? }
            }
            (1, Some(digest), None) => {
                let digest =
                    <[u8; 32]>::try_from(digest.as_slice()).map_err(|_| format!("has a bad digest in row {id}"))?;
                let place = match self.offset {
                    None => Place::Blob,
                    Some(offset) => Place::Pack {
                        offset: u64::try_from(offset).map_err(|_| format!("has a bad offset in row {id}"))?,
                    },
                };
                Node::File { size, executable: self.mode & 0o111 != 0, digest: Digest::from_bytes(digest), place }
            }
            (2, None, Some(target)) if !target.is_empty() && target.len() < 4096 && !target.contains(&0) => {
                Node::Symlink { target }
            }
            _ => return Err(format!("has a row {id} of no known kind")),
        };
        Ok(Row { id, parent, name: self.name, node })
    }
}

fn corrupt(path: &Path, what: &str) -> Error {
    Error::new(Kind::Corrupt, format!("catalog {} {what}", path.display())).hint("run `envfabric fsck`")
}

/// The length of the file at `path`, which begins as a catalog of that length does.
fn length_of(path: &Path) -> Result<u64> {
    let mut file = File::open(path).at("opening", path)?;
    let length = file.metadata().at("reading", path)?.len();
    let mut header = Vec::with_capacity(HEADER);
    file.by_ref().take(HEADER as u64).read_to_end(&mut header).at("reading", path)?;
    check_header(&header, length, path).map(|()| length)
}

/// A cut-off file is told before SQLite meets it: the header says how many pages there are.
fn check_header(bytes: &[u8], length: u64, path: &Path) -> Result<()> {
    let header = bytes.get(..HEADER).filter(|header| header.starts_with(b"SQLite format 3\0"));
    let header = header.ok_or_else(|| corrupt(path, "is not a SQLite file or is cut off"))?;
    let page_size = match u16::from_be_bytes([header[16], header[17]]) {
        1 => 65536,
        n => u64::from(n),
    };
    let pages = u64::from(u32::from_be_bytes([header[28], header[29], header[30], header[31]]));
    if page_size * pages != length {
        return Err(corrupt(path, &format!("is cut off: {length} bytes of {}", page_size * pages)));
    }
    Ok(())
}

/// `file:` URI of an absolute path, everything but safe characters escaped.
fn immutable_uri(path: &Path) -> String {
    let mut uri = String::from("file:");
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'/' | b'.' | b'_' | b'-' => uri.push(*byte as char),
            other => uri.push_str(&format!("%{other:02X}")),
        }
    }
    uri.push_str("?immutable=1");
    uri
}

#[cfg(test)]
pub(crate) mod tests;
