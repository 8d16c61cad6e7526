//! The node cache: what of a distant store this machine has on its own disk.
//!
//! ```text
//! read(object, range)
//!   here              -> local file -> bytes
//!   not here          -> asked for once, whoever else wants it waits too
//!     store thread    -> store -> unpack -> compare with its digest -> local file (or memory, if there is no room)
//! ```
//!
//! The unit is a chunk of an object (see [`crate::store::Chunks`]); catalogs and documents, which have no list of chunks,
//! come whole. A unit is served only after it was compared with its digest in this process, or belongs to a file that is
//! *sealed*: whole, compared, on disk, and with the same inode, size and times as then (`ledger`). Everything else that
//! lies in the directory is *unproven* and is compared before it is believed. So nothing has to be cleared up after a
//! crash, and a ledger that is lost costs the comparing anew, nothing else.
//!
//! **Room.** The sum of what is kept stays within a limit, and the disk keeps some space free; what was used longest ago
//! goes first, what is open stays. Where there is no room, units are served from a small memory and not kept.
//!
//! **Files** are opened when they are needed and stay open for the next reader; of those that nobody reads at the moment,
//! the ones used longest ago are closed when there are 512. What of them was not sealed is compared again.
//!
//! **Waiting** follows [`crate::patience`]: no session thread waits here. Whoever may wait does so for a limited time, as
//! calls on the store are made by threads that may hang.

mod ahead;
mod arrival;
mod counters;
mod entry;
mod fetch;
mod file;
mod keeper;
mod ledger;
mod loose;
mod scrub;
mod space;
mod state;
mod units;

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};

pub use counters::{CacheStats, Histogram};
pub use entry::Held;

use crate::environment::Digest;
use crate::error::{Error, IoContext, Kind, Result};
use crate::patience;
use crate::store::{CHUNK_SIZE, Chunks, Object, Room, Store};
use ahead::Ahead;
use arrival::PackedBytes;
use counters::Counters;
use entry::{Entry, Order};
use fetch::Source;
use keeper::Keeper;
use ledger::Ledger;
use loose::Loose;
use space::Space;
use units::Units;

/// How a cache is to be kept.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its directory, on a local disk; made if missing.
    pub dir: PathBuf,
    /// It holds at most so many bytes.
    pub limit: u64,
    /// So many bytes of the disk stay free.
    pub keep_free: u64,
    /// How long the store may take for one answer. Whoever waits for many bytes has it anew with each part that comes.
    pub patience: Duration,
    /// So many bytes a second of what is kept are read again and compared; 0 for none.
    pub scrub: u64,
}

impl Options {
    /// What is usual in `dir`: 20 GiB at most, 1 GiB of the disk stays free, half a minute of patience, 1 MiB a second is
    /// compared again (20 GiB in six hours).
    pub fn at(dir: impl Into<PathBuf>) -> Options {
        Options {
            dir: dir.into(),
            limit: 20 << 30,
            keep_free: 1 << 30,
            patience: Duration::from_secs(30),
            scrub: 1 << 20,
        }
    }

    /// The same for `store`: where versions must be signed, a directory of its own for what these keys vouch for. What a
    /// mount that trusts everybody has compared was compared with what anybody may have written.
    #[must_use]
    pub fn for_keys_of(mut self, store: &Store) -> Options {
        if let Some(trust) = store.trust() {
            let mut keys: Vec<&[u8; 32]> = trust.keys().iter().map(|key| key.as_bytes()).collect();
            keys.sort_unstable();
            self.dir.push(format!(
                "signed-{}",
                Digest::of(&keys.into_iter().copied().collect::<Vec<_>>().concat()).short()
            ));
        }
        self
    }
}

/// Files that are open at most, besides those that somebody reads.
const FILES_MAX: usize = 512;

/// What an object is called here.
type Key = (Room, Digest);

/// See the module.
#[derive(Debug)]
pub struct Cache {
    inner: Arc<Inner>,
    keeper: Keeper,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    patience: Duration,
    source: Source,
    space: Space,
    entries: Mutex<HashMap<Key, Arc<Entry>>>,
    ledger: Ledger,
    counters: Counters,
    /// About how many files are open: more are counted than there are until somebody counts anew.
    files: AtomicUsize,
    ahead: Arc<Ahead>,
    packed: PackedBytes,
    /// Units for which there was no room.
    loose: Mutex<Loose>,
    /// The latest time at which something was used, see [`Inner::now`].
    clock: AtomicU64,
    /// Of what is on its way out, the number of the next.
    leaving: AtomicU64,
    /// Held by one who looks for what can go, so that not all do at once.
    evicting: Mutex<()>,
    /// Held as long as the cache is open. Fetches that hang outlive it: nothing is written then, as the directory may be
    /// another's.
    lock: RwLock<Option<Flock<File>>>,
}

/// All of an object.
#[derive(Debug)]
pub enum Whole {
    /// It is this file, as long as it is held.
    File(PathBuf, Held),
    /// There was no room for it.
    Bytes(Vec<u8>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cache {
    /// Opens the cache in `options.dir` for objects of `store`. A cache serves one process at a time.
    ///
    /// # Errors
    /// [`Kind::Busy`] when another process has it; errors of the file system.
    pub fn open(options: Options, store: Store) -> Result<Cache> {
        let dir = std::path::absolute(&options.dir).at("finding", &options.dir)?;
        fs::create_dir_all(&dir).at("creating", &dir)?;
        let path = dir.join("lock");
        let file =
            OpenOptions::new().write(true).create(true).truncate(false).custom_flags(libc::O_NOFOLLOW).open(&path);
        let file = file.at("opening", &path)?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::Error::EWOULDBLOCK => {
                Error::new(Kind::Busy, format!("the cache {} is in use by another process", dir.display()))
                    .hint("name another directory with --cache")
            }
            errno => Error::io("locking", &path, errno.into()),
        })?;
        for room in Room::ALL {
            fs::create_dir_all(dir.join(room.name())).at("creating", dir.join(room.name()))?;
        }
        // What was on its way out when the last process ended.
        let trash = dir.join("trash");
        let _ = fs::remove_dir_all(&trash);
        fs::create_dir_all(&trash).at("creating", &trash)?;
        let ledger = Ledger::open(&dir.join("ledger.sqlite"))?;
        let inner = Inner {
            patience: options.patience,
            source: Source::new(store, options.patience),
            space: Space::new(&dir, options.limit, options.keep_free),
            entries: Mutex::default(),
            ledger,
            counters: Counters::default(),
            files: AtomicUsize::new(0),
            ahead: Arc::default(),
            packed: PackedBytes::default(),
            loose: Mutex::default(),
            clock: AtomicU64::new(0),
            leaving: AtomicU64::new(0),
            evicting: Mutex::default(),
            lock: RwLock::new(Some(lock)),
            dir,
        };
        inner.find_files()?;
        // The limit may be lower than it was.
        if inner.space.lacking(0) > 0 {
            inner.evict(|| inner.space.lacking(0));
        }
        let inner = Arc::new(inner);
        let keeper = Keeper::start(&inner, options.scrub)?;
        Ok(Cache { inner, keeper })
    }

    /// How long the store may take for one answer.
    pub fn patience(&self) -> Duration {
        self.inner.patience
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// Up to `size` bytes of `object` from `offset` on; fewer only at its end. `chunks` is asked for its chunks where
    /// they are not known yet.
    ///
    /// # Errors
    /// [`Kind::WouldWait`] where this thread must not wait; [`Kind::TimedOut`]; [`Kind::Corrupt`] when the store has
    /// other bytes than it should; errors of the store.
    pub fn read(
        &self,
        object: &Object,
        chunks: impl FnOnce() -> Result<Chunks>,
        offset: u64,
        size: u64,
    ) -> Result<Vec<u8>> {
        let end = offset.saturating_add(size).min(object.size);
        if offset >= end {
            return Ok(Vec::new());
        }
        let entry = self.inner.entry(object)?;
        entry.prepare(&self.inner, object, || Ok(Units::Chunks(chunks()?)))?;
        entry.read(&self.inner, offset, end)
    }

    /// All of `object`, which is not large.
    ///
    /// # Errors
    /// As [`Cache::read`].
    pub fn whole(&self, object: &Object) -> Result<Whole> {
        let entry = self.inner.entry(object)?;
        entry.prepare(&self.inner, object, || Ok(Units::Whole))?;
        entry.bring(&self.inner, 0, object.size)?;
        let path = self.inner.path(&entry.key());
        match entry.is_file_at(&path) {
            true => Ok(Whole::File(path, Held::new(entry))),
            // There was no room; or somebody has cleared the directory.
            false => Ok(Whole::Bytes(entry.read(&self.inner, 0, object.size)?)),
        }
    }

    /// Asks for all of `object`, which is fetched as a whole, without waiting.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when it cannot be as large as it is said to be.
    pub fn ask_whole(&self, object: &Object) -> Result<()> {
        let entry = self.inner.entry(object)?;
        entry.prepare(&self.inner, object, || Ok(Units::Whole))?;
        entry.ask_ahead(&self.inner, 0, 1, &Order::KNOWN);
        Ok(())
    }

    /// A part of an object that is fetched as a whole.
    ///
    /// # Errors
    /// As [`Cache::read`].
    pub fn part(&self, object: &Object, offset: u64, size: u64) -> Result<Vec<u8>> {
        let end = offset.saturating_add(size).min(object.size);
        let entry = self.inner.entry(object)?;
        entry.prepare(&self.inner, object, || Ok(Units::Whole))?;
        entry.read(&self.inner, offset.min(end), end)
    }

    /// The bytes of a document.
    ///
    /// # Errors
    /// As [`Cache::read`].
    pub fn document(&self, object: &Object) -> Result<Vec<u8>> {
        self.part(object, 0, object.size)
    }

    /// The file of `object`, if all of it is here and was compared; and what keeps it here in any case.
    pub fn hold(&self, object: &Object) -> Result<(Option<Arc<File>>, Held)> {
        let entry = self.inner.entry(object)?;
        Ok((entry.whole_file(&self.inner, object), Held::new(entry)))
    }

    /// Asks for chunks `first..end` of `object` where they are not here yet, without waiting for them; but where this
    /// thread may wait, only as soon as fewer than `most` requests are under way ahead of readers. False when there is no
    /// room, so that asking ahead is of no use.
    ///
    /// # Errors
    /// Those of `chunks`; [`Kind::TimedOut`] when too much stays under way.
    pub fn ask_ahead(
        &self,
        object: &Object,
        chunks: impl FnOnce() -> Result<Chunks>,
        first: u64,
        end: u64,
        most: usize,
    ) -> Result<bool> {
        let entry = self.inner.entry(object)?;
        entry.prepare(&self.inner, object, || Ok(Units::Chunks(chunks()?)))?;
        let (mut at, end) = (first, end.min(object.chunks()));
        while at < end {
            let patience = self.inner.patience;
            if patience::may_wait() && !self.inner.ahead.wait_for_less_than(most, patience) {
                return Err(patience::timed_out(patience));
            }
            let next = (at + fetch::AT_ONCE as u64).min(end);
            if !entry.ask_ahead(&self.inner, at, next, &Order::KNOWN) {
                return Ok(false);
            }
            at = next;
        }
        Ok(true)
    }

    /// Asks for chunks `first..end` of `object`, and for what comes by the same requests, without waiting.
    ///
    /// # Errors
    /// Those of `chunks`.
    pub fn ask_around(
        &self,
        object: &Object,
        chunks: impl FnOnce() -> Result<Chunks>,
        first: u64,
        end: u64,
    ) -> Result<()> {
        let entry = self.inner.entry(object)?;
        entry.prepare(&self.inner, object, || Ok(Units::Chunks(chunks()?)))?;
        entry.ask_ahead(&self.inner, first, end, &Order::AHEAD);
        Ok(())
    }

    /// Waits until chunks `first..end` of `object` are here; `chunks` as for [`Cache::read`].
    ///
    /// # Errors
    /// As [`Cache::read`].
    pub fn wait_for(
        &self,
        object: &Object,
        chunks: impl FnOnce() -> Result<Chunks>,
        first: u64,
        end: u64,
    ) -> Result<()> {
        let entry = self.inner.entry(object)?;
        entry.prepare(&self.inner, object, || Ok(Units::Chunks(chunks()?)))?;
        for at in first..end.min(object.chunks()) {
            let start = at * CHUNK_SIZE;
            entry.bring(&self.inner, start, start + object.chunk_size(at))?;
        }
        Ok(())
    }

    /// What the cache has done and holds.
    pub fn stats(&self) -> CacheStats {
        let inner = &self.inner;
        let mut stats = inner.counters.stats();
        stats.dir = inner.dir.to_string_lossy().into_owned();
        (stats.held, stats.limit, stats.keep_free) = (inner.space.used(), inner.space.limit, inner.space.keep_free);
        stats.objects = lock(&inner.entries).len() as u64;
        stats
    }

    /// Its bounded memories: name, what it holds (of files about), what it holds at most.
    pub fn memories(&self) -> [(&'static str, u64, u64); 2] {
        let files = self.inner.files.load(Ordering::Relaxed).min(FILES_MAX);
        let packed = self.inner.packed.now();
        [("open cached files", files as u64, FILES_MAX as u64), ("bytes to unpack", packed, arrival::PACKED_MAX)]
    }

    /// Reads everything that is sealed once more and compares it, now. Done slowly by itself, see [`Options::scrub`].
    pub fn scrub(&self) {
        scrub::Scrub::default().go_on(&self.inner, u64::MAX);
    }

    /// Lets another process have the directory. What is open here can still be read; what is fetched is not kept.
    pub fn let_go(&self) {
        self.settle();
        *self.inner.lock.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Writes down what is known of the cache's files. Done by itself every few seconds and when the cache is dropped.
    pub fn settle(&self) {
        self.inner.settle();
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.keeper.end();
        self.inner.settle();
        *self.inner.lock.write().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Inner {
    fn path(&self, key: &Key) -> PathBuf {
        let name = key.1.to_string();
        self.dir.join(key.0.name()).join(&name[..2]).join(name)
    }

    /// Later than all times before, whatever the clock does: milliseconds since 1970, or a little more.
    fn now(&self) -> u64 {
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let clock = u64::try_from(clock.as_millis()).unwrap_or_default();
        let later = |last: u64| Some(clock.max(last.saturating_add(1)));
        self.clock.fetch_update(Ordering::Relaxed, Ordering::Relaxed, later).map_or(clock, |last| clock.max(last + 1))
    }

    /// The entry of `object`, marked as used now.
    fn entry(&self, object: &Object) -> Result<Arc<Entry>> {
        let key = (object.room, object.digest);
        let entry = lock(&self.entries).entry(key).or_insert_with(|| Arc::new(Entry::new(key))).clone();
        entry.touch(self.now());
        Ok(entry)
    }

    /// Kept while the directory is written to; none when it is not ours any more.
    fn while_open(&self) -> Option<RwLockReadGuard<'_, Option<Flock<File>>>> {
        let lock = self.lock.read().unwrap_or_else(PoisonError::into_inner);
        lock.is_some().then_some(lock)
    }

    /// Takes in what lies in the directory.
    fn find_files(&self) -> Result<()> {
        let used = self.ledger.used()?;
        // A time from a far future, of a clock that was wrong, must not be the last for ever.
        self.clock.store(used.values().copied().max().unwrap_or(0).min(u64::MAX / 2), Ordering::Relaxed);
        let mut entries = lock(&self.entries);
        for room in Room::ALL {
            for shard in names(&self.dir.join(room.name()))? {
                for name in names(&shard)? {
                    let digest = name.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
                    let (Some(digest), Ok(meta)) = (digest, fs::symlink_metadata(&name)) else { continue };
                    let key = (room, digest);
                    if !meta.is_file() || self.path(&key) != name {
                        continue; // not ours
                    }
                    let bytes = file::blocks(&meta);
                    self.space.take(bytes);
                    entries.insert(key, Arc::new(Entry::found(key, bytes, used.get(&key).copied().unwrap_or(0))));
                }
            }
        }
        self.ledger.forget(used.into_keys().filter(|key| !entries.contains_key(key)));
        Ok(())
    }

    /// Room for `bytes` more, for which others may have to go; false when it cannot be had.
    fn make_room(&self, bytes: u64) -> bool {
        if self.space.reserve(bytes) {
            return true;
        }
        // Some more than needed, so that not every unit has to look for who goes; but not anew for each who waited.
        self.evict(|| match self.space.lacking(bytes) {
            0 => 0,
            lacking => lacking.saturating_add((self.space.limit / 64).min(256 << 20)),
        });
        self.space.reserve(bytes)
    }

    /// Removes what was used longest ago and is not open, until as many bytes are free as `wanted` says when it begins.
    fn evict(&self, wanted: impl FnOnce() -> u64) {
        let _one = lock(&self.evicting);
        let wanted = wanted();
        let mut gone = Vec::new();
        let mut entries = lock(&self.entries);
        // Only the map has it: nobody reads it, and nobody can begin to while the map is locked.
        let idle = entries.values().filter(|entry| Arc::strong_count(entry) == 1);
        let mut idle: Vec<_> = idle.map(|entry| (entry.used(), entry.key(), entry.bytes())).collect();
        idle.sort_unstable();
        let mut freed = 0;
        for (_, key, bytes) in idle {
            if freed >= wanted {
                break;
            }
            if bytes > 0 {
                match self.leave(&self.path(&key)) {
                    Ok(name) => gone.push((name, bytes)),
                    Err(_) => continue,
                }
                self.counters.evictions.fetch_add(1, Ordering::Relaxed);
                self.counters.evicted_bytes.fetch_add(bytes, Ordering::Relaxed);
            }
            entries.remove(&key);
            freed += bytes;
            if bytes > 0 {
                self.ledger.forget(std::iter::once(key));
            }
        }
        drop(entries);
        for (name, bytes) in gone {
            let _ = name.map(fs::remove_file);
            // Not before: what lies there still takes room.
            self.space.give_back(bytes);
        }
    }

    /// A file was opened, for which others may have to be closed.
    fn opened_file(&self) {
        if self.files.fetch_add(1, Ordering::Relaxed) < FILES_MAX {
            return;
        }
        let entries = lock(&self.entries);
        let mut open: Vec<&Arc<Entry>> = entries.values().filter(|entry| Arc::strong_count(entry) == 1).collect();
        // Only the map has them, so nobody waits for their states.
        open.retain(|entry| entry.has_file());
        open.sort_unstable_by_key(|entry| entry.used());
        // Some more than needed, so that not every file has to look for who goes.
        let (close, stay) = open.split_at(open.len().saturating_sub(FILES_MAX * 3 / 4));
        close.iter().for_each(|entry| entry.close());
        self.files.store(stay.len(), Ordering::Relaxed);
    }

    /// Takes `path` away under its name, as that is quick; what is to be removed is returned, if there is any.
    fn leave(&self, path: &Path) -> io::Result<Option<PathBuf>> {
        let trash = self.dir.join("trash");
        let name = trash.join(self.leaving.fetch_add(1, Ordering::Relaxed).to_string());
        match fs::rename(path, &name) {
            Ok(()) => Ok(Some(name)),
            // Without a directory for it, it goes at once.
            Err(error) if error.kind() == io::ErrorKind::NotFound => match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(None),
            },
            Err(error) => Err(error),
        }
    }

    /// Removes whatever is at `path`.
    fn clear_away(&self, path: &Path) -> Result<()> {
        if let Some(name) = self.leave(path).at("removing", path)?
            && fs::remove_file(&name).is_err()
        {
            let _ = fs::remove_dir_all(&name);
        }
        Ok(())
    }

    /// Seals what is whole and writes down when everything was used last.
    fn settle(&self) {
        let Some(_open) = self.while_open() else { return };
        // One at a time: what is held here cannot be evicted.
        let keys: Vec<Key> = lock(&self.entries).keys().copied().collect();
        let mut used = Vec::new();
        for key in keys {
            let Some(entry) = lock(&self.entries).get(&key).cloned() else { continue };
            entry.seal(&self.ledger);
            used.extend(entry.used_since_settled());
        }
        if let Err(error) = self.ledger.note_used(used.into_iter()) {
            tracing::debug!(error = error.chain(), "the cache's ledger cannot be written");
        }
    }
}

/// Everything in a directory; nothing where there is none.
fn names(dir: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| entry.map(|entry| entry.path()).at("reading", dir)).collect(),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(Vec::new()),
        Err(error) => Err(Error::io("reading", dir, error)),
    }
}
