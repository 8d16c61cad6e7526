//! The file of an [`Entry`]: what is believed of it, what is written into it, and when it is given up.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use super::entry::Entry;
use super::ledger::{Identity, Ledger};
use super::state::{State, Unit};
use super::units::{Known, room};
use super::{Inner, lock};
use crate::error::{Error, IoContext, Result};
use crate::store::Object;

/// Before Linux 6.13 the times of files go on in steps of up to 10 ms: who writes within the same step leaves no trace.
const STEP: Duration = Duration::from_millis(20);

/// Bytes that a file takes on disk.
pub(super) fn blocks(meta: &Metadata) -> u64 {
    meta.blocks().saturating_mul(512)
}

impl Entry {
    /// The file of an earlier time, if there is one of the right length; another is removed.
    fn open(&self, inner: &Inner, object: &Object) -> Result<Option<File>> {
        let path = inner.path(&self.key);
        let file = match OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            other => Some(other.at("opening", &path)?),
        };
        if let Some(file) = file {
            let meta = file.metadata().at("reading", &path)?;
            if meta.is_file() && meta.len() == object.size {
                return Ok(Some(file));
            }
            inner.clear_away(&path)?;
        }
        self.count(inner, 0);
        Ok(None)
    }

    /// Counts the file as taking `bytes` from now on.
    fn count(&self, inner: &Inner, bytes: u64) {
        inner.space.take(bytes);
        inner.space.give_back(self.bytes.swap(bytes, Ordering::Relaxed));
    }

    /// Takes in what the file of an earlier time has, if there is one.
    pub(super) fn take_in(&self, inner: &Inner, known: &Known, state: &mut State) {
        let file = match self.open(inner, &known.object) {
            Ok(Some(file)) => file,
            Ok(None) => return,
            Err(error) => return tracing::debug!(error = error.chain(), "a cached file cannot be used"),
        };
        let Ok(meta) = file.metadata() else { return };
        let there = known.with_data(&file);
        // Sealed, and yet with holes: then it is not what was sealed.
        state.sealed = there.len() == known.count() && inner.ledger.is_sealed(self.key, &Identity::of(&meta));
        let unit = if state.sealed { Unit::Here } else { Unit::Unproven };
        there.iter().for_each(|at| state.put(*at, unit));
        // Parts of units are of no use.
        let counted = there.iter().map(|at| room(known.length(*at))).sum();
        if blocks(&meta) > counted {
            holes(known.count(), &there).for_each(|hole| known.punch(&file, hole));
        }
        self.count(inner, counted);
        state.file = Some(Arc::new(file));
    }

    /// The file, if all of it is here and compared, now or at an earlier time.
    pub(super) fn whole_file(&self, inner: &Inner, object: &Object) -> Option<Arc<File>> {
        let state = lock(&self.state);
        if state.known.is_some() {
            return state.file.clone().filter(|_| state.is_whole());
        }
        if self.bytes() == 0 {
            return None;
        }
        let file = self.open(inner, object).ok()??;
        let meta = file.metadata().ok()?;
        inner.ledger.is_sealed(self.key, &Identity::of(&meta)).then(|| Arc::new(file))
    }

    /// The file and its length, if it is sealed.
    pub(super) fn sealed(&self, inner: &Inner) -> Option<(Arc<File>, u64)> {
        let state = lock(&self.state);
        if let Some(known) = &state.known {
            return state.file.clone().filter(|_| state.sealed).map(|file| (file, known.object.size));
        }
        let open = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(inner.path(&self.key));
        let file = open.ok()?;
        let meta = file.metadata().ok()?;
        inner.ledger.is_sealed(self.key, &Identity::of(&meta)).then(|| (Arc::new(file), meta.len()))
    }

    /// True when all of it is here and compared, and `path` leads to it.
    pub(super) fn is_file_at(&self, path: &std::path::Path) -> bool {
        let state = lock(&self.state);
        let open = state.file.as_ref().filter(|_| state.is_whole()).and_then(|file| file.metadata().ok());
        let named = fs::symlink_metadata(path).ok();
        open.zip(named).is_some_and(|(open, named)| (open.dev(), open.ino()) == (named.dev(), named.ino()))
    }

    /// Compares a unit that was in the file before.
    pub(super) fn prove(&self, inner: &Inner, known: &Known, state: &mut State, at: usize) {
        if state.units[at] != Unit::Unproven {
            return;
        }
        let mut bytes = vec![0; known.length(at) as usize];
        let file = state.file.clone();
        let read = file.as_ref().is_some_and(|file| file.read_exact_at(&mut bytes, known.start(at)).is_ok());
        inner.counters.verified_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if read && known.is_right(at, &bytes) {
            return state.put(at, Unit::Here);
        }
        tracing::warn!(object = known.object.label(), chunk = at, "cached bytes are wrong and are fetched again");
        inner.counters.corrupt_in_cache.fetch_add(1, Ordering::Relaxed);
        state.put(at, Unit::Absent);
        if let Some(file) = file {
            known.punch(&file, at..at + 1);
        }
        self.count(inner, self.bytes().saturating_sub(room(known.length(at))));
    }

    /// Writes a unit into the file; none when there is no room or the disk does not take it. Returns the file, and room
    /// that was reserved and is not yet counted as the entry's.
    pub(super) fn keep(&self, inner: &Inner, known: &Known, at: usize, bytes: &[u8]) -> Option<(Arc<File>, u64)> {
        let _open = inner.while_open()?;
        let needed = room(bytes.len() as u64);
        if !inner.make_room(needed) {
            return None;
        }
        let write = || {
            let file = self.file(inner, known)?;
            file.write_all_at(bytes, known.start(at)).at("writing", inner.path(&self.key))?;
            Ok::<_, Error>(file)
        };
        let had_file = self.has_file();
        let mut written = write();
        if written.as_ref().is_err_and(|error| matches!(error.errno(), libc::ENOSPC | libc::EDQUOT)) {
            inner.evict(|| needed.max(64 << 20));
            written = write();
        }
        match written {
            Ok(file) => {
                if !had_file {
                    inner.opened_file();
                }
                Some((file, needed))
            }
            Err(error) => {
                tracing::debug!(error = error.chain(), "bytes are served without being kept");
                if let Some(file) = &lock(&self.state).file {
                    known.punch(file, at..at + 1);
                }
                inner.space.give_back(needed);
                None
            }
        }
    }

    /// The file, made if there is none.
    fn file(&self, inner: &Inner, known: &Known) -> Result<Arc<File>> {
        let mut state = lock(&self.state);
        if let Some(file) = &state.file {
            return Ok(file.clone());
        }
        let path = inner.path(&self.key);
        let make = || OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let file = match make() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                path.parent().map_or(Ok(()), fs::create_dir_all).at("creating", &path)?;
                make()
            }
            // What could not be used, or nobody knows how it came there.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                inner.clear_away(&path)?;
                make()
            }
            other => other,
        };
        let file = file.at("creating", &path)?;
        file.set_len(known.object.size).at("writing", &path)?;
        Ok(state.file.insert(Arc::new(file)).clone())
    }

    /// True when its file is open.
    pub(super) fn has_file(&self) -> bool {
        lock(&self.state).file.is_some()
    }

    /// Closes the file, which nobody reads; what of it is right is found out again when somebody does.
    pub(super) fn close(&self) {
        let mut state = lock(&self.state);
        if state.is_at_rest() {
            *state = State::default();
        }
    }

    /// Gives `file` up, which the disk does not give back.
    pub(super) fn discard(&self, inner: &Inner, file: &Arc<File>, error: &Error) {
        let mut state = lock(&self.state);
        if state.file.as_ref().is_some_and(|current| !Arc::ptr_eq(current, file)) {
            return;
        }
        tracing::warn!(error = error.chain(), "a cached file cannot be read and is fetched again");
        inner.counters.corrupt_in_cache.fetch_add(1, Ordering::Relaxed);
        (state.file, state.sealed) = (None, false);
        for at in 0..state.units.len() {
            if matches!(state.units[at], Unit::Here | Unit::Ahead | Unit::Unproven) {
                state.put(at, Unit::Absent);
            }
        }
        let _ = inner.clear_away(&inner.path(&self.key));
        self.count(inner, 0);
    }

    /// Has the ledger remember that all is here, if it is.
    pub(super) fn seal(&self, ledger: &Ledger) {
        let file = {
            let state = lock(&self.state);
            state.file.clone().filter(|_| state.is_whole() && !state.sealed)
        };
        let Some(file) = file else { return };
        // The ledger must not know of bytes that a power failure takes away.
        if file.sync_all().is_ok()
            && let Ok(meta) = file.metadata()
            && let Some(identity) = Identity::of(&meta).once_settled(&meta)
        {
            ledger.seal(self.key, &identity, self.used());
            lock(&self.state).sealed = true;
        }
    }
}

impl Identity {
    /// This, once a later change is sure to have another time; none when the clock was put back.
    fn once_settled(self, meta: &Metadata) -> Option<Identity> {
        let seconds = u64::try_from(meta.ctime()).ok()?;
        let changed = SystemTime::UNIX_EPOCH + Duration::new(seconds, u32::try_from(meta.ctime_nsec()).ok()?);
        let age = SystemTime::now().duration_since(changed).ok()?;
        std::thread::sleep(STEP.saturating_sub(age));
        Some(self)
    }
}

/// Runs of numbers below `count` that are not in `there`, which is sorted.
fn holes(count: usize, there: &[usize]) -> impl Iterator<Item = Range<usize>> {
    let starts = std::iter::once(0).chain(there.iter().map(|at| at + 1));
    let ends = there.iter().copied().chain([count]);
    starts.zip(ends).filter(|(start, end)| start < end).map(|(start, end)| start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_what_is_not_there() {
        let holes = |count, there: &[usize]| holes(count, there).map(|hole| (hole.start, hole.end)).collect::<Vec<_>>();
        assert_eq!(holes(5, &[]), [(0, 5)]);
        assert_eq!(holes(5, &[0, 2, 4]), [(1, 2), (3, 4)]);
        assert_eq!(holes(2, &[0, 1]), []);
    }
}
