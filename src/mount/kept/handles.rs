//! Handles of files that may be passed through, one record each: what is open of an inode, and in which way, is the sum
//! of its records. So nothing has to be counted twice in step, and an OPEN or RELEASE that comes twice changes nothing.
//!
//! ```text
//! word 0   times this place was used << 8 | state; written last by open, first by release
//! word 1   the kernel's number of the OPEN
//! word 2   inode
//! word 3   number of the file that the kernel reads by itself; 0: through the worker
//! ```

use std::sync::atomic::{AtomicU64, Ordering};

/// Of a place.
const FREE: u64 = 0;
const OPEN: u64 = 1;
/// It was the last of its inode, and the kernel is being told to let go of the file.
const CLOSING: u64 = 2;

/// How a file is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::mount) enum Way {
    /// Through the worker.
    Cached,
    /// The kernel reads file number so.
    Passed(u32),
}

/// A handle as the kernel gives it back: a place, and how often that was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::mount) struct Handle(u64);

impl Handle {
    /// As the kernel keeps it; never 0.
    pub(in crate::mount) fn raw(self) -> u64 {
        self.0
    }

    pub(in crate::mount) fn from_raw(raw: u64) -> Self {
        Handle(raw)
    }

    fn new(index: usize, uses: u64) -> Self {
        Handle(uses << 32 | (index as u64 + 1))
    }

    fn index(self) -> Option<usize> {
        ((self.0 & 0xffff_ffff) as usize).checked_sub(1)
    }
}

/// What a place has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::mount) enum Record {
    Free,
    Open {
        handle: Handle,
        unique: u64,
        ino: u64,
        way: Way,
    },
    /// To be finished: the file must be let go of, and then the place.
    Closing {
        handle: Handle,
        backing: u32,
    },
}

/// See the module. One process at a time may change it.
#[derive(Debug, Clone, Copy)]
pub(in crate::mount) struct Handles<'a> {
    words: &'a [AtomicU64],
    used: &'a AtomicU64,
}

impl<'a> Handles<'a> {
    pub(super) fn new(words: &'a [AtomicU64], used: &'a AtomicU64) -> Self {
        Handles { words, used }
    }

    /// Places that were ever used.
    pub(in crate::mount) fn used(&self) -> usize {
        (self.used.load(Ordering::Acquire) as usize).min(self.words.len() / 4)
    }

    fn place(&self, index: usize) -> Option<[&'a AtomicU64; 4]> {
        let [state, unique, ino, backing] = self.words.get(index * 4..index * 4 + 4)? else { return None };
        Some([state, unique, ino, backing])
    }

    /// What place `index` has.
    pub(in crate::mount) fn record(&self, index: usize) -> Record {
        let Some([state, unique, ino, backing]) = self.place(index) else { return Record::Free };
        let word = state.load(Ordering::Acquire);
        let handle = Handle::new(index, word >> 8 & 0x7fff_ffff);
        let backing = backing.load(Ordering::Relaxed) as u32;
        match word & 0xff {
            OPEN => {
                let way = if backing == 0 { Way::Cached } else { Way::Passed(backing) };
                let (unique, ino) = (unique.load(Ordering::Relaxed), ino.load(Ordering::Relaxed));
                Record::Open { handle, unique, ino, way }
            }
            CLOSING => Record::Closing { handle, backing },
            _ => Record::Free,
        }
    }

    /// The handle that OPEN number `unique` has got already.
    pub(in crate::mount) fn of_open(&self, unique: u64) -> Option<(Handle, Way)> {
        (0..self.used()).find_map(|index| match self.record(index) {
            Record::Open { handle, unique: of, way, .. } if of == unique => Some((handle, way)),
            _ => None,
        })
    }

    /// A handle for inode `ino` in a free place: `index`, or a new one. None when there are none left.
    pub(in crate::mount) fn open(&self, index: Option<usize>, unique: u64, ino: u64, way: Way) -> Option<Handle> {
        let index = index.unwrap_or_else(|| self.used());
        let [state, of_unique, of_ino, backing] = self.place(index)?;
        let uses = (state.load(Ordering::Relaxed) >> 8).wrapping_add(1) & 0x7fff_ffff;
        of_unique.store(unique, Ordering::Relaxed);
        of_ino.store(ino, Ordering::Relaxed);
        let number = match way {
            Way::Cached => 0,
            Way::Passed(number) => number,
        };
        backing.store(number.into(), Ordering::Relaxed);
        // Places are looked at up to this, so it comes first.
        self.used.fetch_max(index as u64 + 1, Ordering::AcqRel);
        state.store(uses << 8 | OPEN, Ordering::Release);
        Some(Handle::new(index, uses))
    }

    /// What `handle` has, if it is open.
    pub(in crate::mount) fn get(&self, handle: Handle) -> Option<(usize, Way)> {
        let index = handle.index()?;
        match self.record(index) {
            Record::Open { handle: here, way, .. } if here == handle => Some((index, way)),
            _ => None,
        }
    }

    /// Says that the kernel is about to be told to let go of the file of `index`.
    pub(in crate::mount) fn closing(&self, index: usize) {
        self.state(index, CLOSING);
    }

    /// Frees place `index`.
    pub(in crate::mount) fn free(&self, index: usize) {
        self.state(index, FREE);
    }

    fn state(&self, index: usize, value: u64) {
        if let Some([state, ..]) = self.place(index) {
            state.store(state.load(Ordering::Relaxed) & !0xff | value, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_that_comes_twice_does_not_close_what_took_its_place() {
        let words: Vec<AtomicU64> = (0..8).map(|_| AtomicU64::new(0)).collect();
        let used = AtomicU64::new(0);
        let handles = Handles::new(&words, &used);
        let first = handles.open(None, 10, 7, Way::Passed(3)).unwrap();
        let second = handles.open(None, 12, 8, Way::Cached).unwrap();
        assert_eq!(handles.open(None, 14, 9, Way::Cached), None, "there are two places");
        assert_eq!(handles.of_open(10), Some((first, Way::Passed(3))));
        assert_eq!((handles.get(first), handles.of_open(11)), (Some((0, Way::Passed(3))), None));
        handles.closing(0);
        assert_eq!(handles.record(0), Record::Closing { handle: first, backing: 3 });
        assert_eq!(handles.get(first), None);
        handles.free(0);
        let third = handles.open(Some(0), 16, 7, Way::Passed(4)).unwrap();
        assert_ne!(first, third);
        assert_eq!((handles.get(first), handles.get(third)), (None, Some((0, Way::Passed(4)))));
        assert_eq!(handles.get(second), Some((1, Way::Cached)));
        for forged in [0, 3, u64::MAX, 1 << 40] {
            assert_eq!(handles.get(Handle::from_raw(forged)), None);
        }
    }
}
