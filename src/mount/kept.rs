//! What outlives the worker of a mount: a file in memory that the supervisor holds and every worker maps.
//!
//! ```text
//! word 0     layout, counters, what INIT has settled        one page
//!            texts: the INIT request and reply, the mount   one page each
//!            requests that are being answered               REQUESTS x 3 words   kept::requests
//!            handles of files that may be passed through    HANDLES x 4 words    kept::handles
//! 4 GiB on   four logs of slots, 4 GiB apart, sparse                             kept::log
//! ```
//!
//! A worker may be killed between any two stores, so every record has one word that makes it true, written last, and one
//! that takes it back, written first. Everything is written before the reply to the kernel that makes it matter.
//!
//! Nothing in it is a pointer, and whoever reads it checks it, but it is no boundary: who can write to it can write to
//! the worker.

mod handles;
mod log;
mod requests;

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

pub(super) use handles::{Handle, Handles, Record, Way};
pub(super) use requests::{Begun, RESENT, Requests};

use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::SharedWords;
use crate::view::Logs;
use log::SharedLog;

/// Changes with everything that a worker must understand of what an earlier one has left: the memory's layout, how inode
/// numbers are made, positions in listings. A program with another one is refused while a mount lives.
pub(super) const LAYOUT: u64 = u64::from_le_bytes(*b"envfab\x00\x01");

const PAGE: usize = 4096;
/// Requests that are followed at a time; more are answered, but not counted when a worker dies.
const REQUESTS: usize = 8192;
/// Open files that may be passed through; the next open fails with ENFILE.
pub(super) const HANDLES: usize = 1 << 18;
const REQUESTS_AT: usize = 6 * PAGE / 8;
const HANDLES_AT: usize = REQUESTS_AT + REQUESTS * requests::WORDS;
const WORDS: usize = HANDLES_AT + HANDLES * 4;
/// Bytes of a log at most.
const LOG_MAX: u64 = 1 << 32;

/// Texts: a page each.
const INIT_REQUEST: u64 = PAGE as u64;
const INIT_REPLY: u64 = 2 * PAGE as u64;
const ABOUT: u64 = 3 * PAGE as u64;
/// The longest, the last one, in bytes.
const ABOUT_MAX: usize = 3 * PAGE - 8;

/// A number in the first page.
#[derive(Debug, Clone, Copy)]
#[repr(usize)]
pub(super) enum Number {
    Layout = 0,
    /// Part of every file handle (`name_to_handle_at`): the numbers of another mount name other files.
    Generation,
    /// Workers that were started so far; the last one's number.
    Lives,
    /// The process that serves.
    Worker,
    Supervisor,
    /// Not zero when the connection is served as on a kernel that sends nothing again.
    NoResend,
    /// Workers that died while they served, and those of them that the watchdog has ended.
    Deaths,
    Hangs,
    /// Requests that were being answered when a worker died, and how many deaths had some.
    InFlight,
    DeathsInFlight,
    /// Requests that were given up, because they had ended several workers.
    Poisoned,
    Replacements,
    /// One more than the highest handle that was ever in use.
    HandlesUsed,
    /// The highest number of a file that the kernel reads by itself.
    LastBacking,
    /// Lengths of the logs.
    Logs = 32,
}

/// What is mounted, for a supervisor that goes on with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct About {
    /// Where, as the kernel lists it.
    pub(super) mount_point: String,
    /// Major and minor number of its device.
    pub(super) dev: (u32, u32),
    /// The store that it shows.
    pub(super) store: String,
    /// The store's own id.
    pub(super) store_id: String,
    /// Other users are let in.
    pub(super) allow_other: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Kept {
    file: File,
    words: SharedWords,
}

impl Kept {
    /// For a new mount.
    pub(super) fn new() -> Result<Kept> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let kept = memfd_create(c"envfabric", flags).map_err(io::Error::from).and_then(|file| {
            let file = File::from(file);
            file.set_len((WORDS * 8) as u64)?;
            // A worker that cut it short would take the supervisor along.
            fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL))?;
            let words = SharedWords::map(&file, WORDS)?;
            Ok(Kept { file, words })
        });
        let kept = kept.at("making", "memory that is kept for a mount")?;
        kept.set(Number::Layout, LAYOUT);
        // 32 bits are what the kernel keeps; 0 would be everybody's.
        kept.set(Number::Generation, RandomState::new().hash_one(std::process::id()) & u64::from(u32::MAX) | 1);
        Ok(kept)
    }

    /// What an earlier process has left.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] when a program left it that keeps other things or in another way.
    pub(super) fn open(file: OwnedFd) -> Result<Kept> {
        let file = File::from(file);
        let other = || {
            Error::new(Kind::Unsupported, "another version of envfabric made this mount, and keeps other things of it")
                .hint("unmount and mount again to change to this version")
        };
        let words = match SharedWords::map(&file, WORDS) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(other()),
            words => words.at("mapping", "memory that is kept for a mount")?,
        };
        let kept = Kept { file, words };
        if kept.get(Number::Layout) != LAYOUT { Err(other()) } else { Ok(kept) }
    }

    /// Its file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    fn word(&self, number: Number) -> &AtomicU64 {
        &self.words.get()[number as usize]
    }

    pub(super) fn get(&self, number: Number) -> u64 {
        self.word(number).load(Ordering::SeqCst)
    }

    pub(super) fn set(&self, number: Number, value: u64) {
        self.word(number).store(value, Ordering::SeqCst);
    }

    /// Adds and gives the sum.
    pub(super) fn add(&self, number: Number, more: u64) -> u64 {
        self.word(number).fetch_add(more, Ordering::SeqCst).wrapping_add(more)
    }

    /// What INIT has settled: the request and the reply.
    pub(super) fn init(&self) -> Result<Option<(Vec<u8>, Vec<u8>)>> {
        let (request, reply) = (self.text(INIT_REQUEST, PAGE)?, self.text(INIT_REPLY, PAGE)?);
        Ok((!request.is_empty() && !reply.is_empty()).then_some((request, reply)))
    }

    pub(super) fn set_init(&self, request: &[u8], reply: &[u8]) -> Result<()> {
        self.set_text(INIT_REQUEST, PAGE, request)?;
        self.set_text(INIT_REPLY, PAGE, reply)
    }

    pub(super) fn about(&self) -> Result<Option<About>> {
        Ok(serde_json::from_slice(&self.text(ABOUT, ABOUT_MAX)?).ok())
    }

    pub(super) fn set_about(&self, about: &About) -> Result<()> {
        self.set_text(ABOUT, ABOUT_MAX, &serde_json::to_vec(about).unwrap_or_default())
    }

    /// A text is its length, 8 bytes, and its bytes.
    fn text(&self, at: u64, most: usize) -> Result<Vec<u8>> {
        let mut length = [0; 8];
        let read = |into: &mut [u8], at| self.file.read_exact_at(into, at).at("reading", "what is kept of a mount");
        read(&mut length, at)?;
        let length = usize::try_from(u64::from_le_bytes(length)).unwrap_or(usize::MAX);
        let mut text = vec![0; if length <= most - 8 { length } else { 0 }];
        read(&mut text, at + 8)?;
        Ok(text)
    }

    fn set_text(&self, at: u64, most: usize, text: &[u8]) -> Result<()> {
        if text.len() > most - 8 {
            return Err(Error::new(Kind::Unsupported, "a text is too long to be kept for a mount"));
        }
        let write = |bytes: &[u8], at| self.file.write_all_at(bytes, at).at("writing", "what is kept of a mount");
        write(&[0; 8], at)?;
        write(text, at + 8)?;
        write(&(text.len() as u64).to_le_bytes(), at)
    }

    /// Requests that are being answered.
    pub(super) fn requests(&self) -> Requests<'_> {
        Requests::new(&self.words.get()[REQUESTS_AT..HANDLES_AT])
    }

    /// Open files that may be passed through.
    pub(super) fn handles(&self) -> Handles<'_> {
        Handles::new(&self.words.get()[HANDLES_AT..WORDS], self.word(Number::HandlesUsed))
    }
}

/// The logs of slots.
pub(super) fn logs(kept: &Arc<Kept>) -> Result<Logs> {
    let log = |n| SharedLog::open(kept.clone(), n).map(|log| Arc::new(log) as Arc<dyn crate::view::Log>);
    Ok(Logs { layers: log(0)?, versions: log(1)?, names: log(2)?, current: log(3)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_there_for_who_comes_later_and_another_layout_is_refused() {
        let kept = Kept::new().unwrap();
        let about = About {
            mount_point: "/envs with space".into(),
            dev: (0, 77),
            store: "/st\u{F6}re".into(),
            store_id: "x".into(),
            allow_other: true,
        };
        assert_eq!((kept.about().unwrap(), kept.init().unwrap()), (None, None));
        kept.set_about(&about).unwrap();
        kept.set_init(b"request", b"reply").unwrap();
        kept.add(Number::Lives, 3);
        let again = Kept::open(kept.file().try_clone().unwrap().into()).unwrap();
        assert_eq!(again.about().unwrap(), Some(about.clone()));
        assert_eq!(again.init().unwrap(), Some((b"request".to_vec(), b"reply".to_vec())));
        assert_eq!(again.get(Number::Lives), 3);
        assert_eq!(again.get(Number::Generation), kept.get(Number::Generation));
        let long = About { mount_point: "x".repeat(4096), store: "y".repeat(4096), ..about.clone() };
        kept.set_about(&long).unwrap();
        let error = kept.set_about(&About { store_id: "z".repeat(PAGE), ..long.clone() }).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert_eq!(again.about().unwrap(), Some(long), "what does not fit changes nothing");

        kept.set(Number::Layout, LAYOUT + 1);
        let open = |file: &File| Kept::open(file.try_clone().unwrap().into()).unwrap_err().kind();
        assert_eq!(open(kept.file()), Kind::Unsupported);
        let short = File::from(memfd_create(c"short", MFdFlags::MFD_CLOEXEC).unwrap());
        assert_eq!(open(&short), Kind::Unsupported);
    }

    #[test]
    fn texts_and_tables_do_not_overlap() {
        assert!(ABOUT + ABOUT_MAX as u64 + 8 <= (REQUESTS_AT * 8) as u64);
        assert!((WORDS * 8) as u64 <= LOG_MAX);
        assert!((Number::Logs as usize + 4) * 8 <= PAGE);
    }
}
