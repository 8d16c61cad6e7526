//! The kinds of calls, and how many there were.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Map, Value};

macro_rules! calls {
    ($($call:ident = $name:literal),* $(,)?) => {
        /// A kind of call, as FUSE names it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Call { $($call),* }

        impl Call {
            const ALL: &[Call] = &[$(Call::$call),*];

            pub(crate) fn name(self) -> &'static str {
                match self { $(Call::$call => $name),* }
            }
        }
    };
}

calls! {
    Lookup = "LOOKUP", Getattr = "GETATTR", Setattr = "SETATTR", Readlink = "READLINK", Statfs = "STATFS",
    Open = "OPEN", Create = "CREATE", Read = "READ", Write = "WRITE", Fsync = "FSYNC", Release = "RELEASE",
    Opendir = "OPENDIR", Readdir = "READDIR", Readdirplus = "READDIRPLUS", Fsyncdir = "FSYNCDIR",
    Releasedir = "RELEASEDIR", Mkdir = "MKDIR", Mknod = "MKNOD", Symlink = "SYMLINK", Link = "LINK",
    Rename = "RENAME", Unlink = "UNLINK", Rmdir = "RMDIR", Forget = "FORGET",
}

impl Call {
    pub(crate) fn from_name(name: &str) -> Option<Call> {
        Call::ALL.iter().copied().find(|call| call.name() == name)
    }

    /// True for what needs room on the disk.
    pub(crate) fn needs_space(self) -> bool {
        matches!(self, Call::Write | Call::Create | Call::Mkdir | Call::Mknod | Call::Symlink | Call::Link)
    }

    /// False for what nobody waits for.
    fn is_awaited(self) -> bool {
        !matches!(self, Call::Release | Call::Releasedir | Call::Forget)
    }
}

/// Counts since the last reset, and what is under way.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    calls: [AtomicU64; Call::ALL.len()],
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    in_flight: AtomicU64,
}

impl Counts {
    pub(crate) fn arrived(&self, call: Call) {
        self.count(call, 1);
        self.in_flight.fetch_add(1, Ordering::SeqCst);
    }

    /// Called before the answer is sent, so that who has all answers finds none in flight.
    pub(crate) fn answered(&self) {
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
    }

    /// Counts calls that are answered at once.
    pub(crate) fn count(&self, call: Call, times: u64) {
        if let Some(count) = self.calls.get(call as usize) {
            count.fetch_add(times, Ordering::Relaxed);
        }
    }

    pub(crate) fn read(&self, bytes: usize) {
        self.bytes_read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn written(&self, bytes: usize) {
        self.bytes_written.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Zeroes all but what is in flight.
    pub(crate) fn reset(&self) {
        self.calls.iter().chain([&self.bytes_read, &self.bytes_written]).for_each(|n| n.store(0, Ordering::Relaxed));
    }

    /// As `stats` answers it.
    pub(crate) fn to_json(&self) -> Map<String, Value> {
        let of = |call: Call| self.calls.get(call as usize).map_or(0, |count| count.load(Ordering::Relaxed));
        let calls: Map<_, _> = Call::ALL.iter().map(|call| (call.name().to_string(), of(*call).into())).collect();
        let total: u64 = Call::ALL.iter().filter(|call| call.is_awaited()).map(|call| of(*call)).sum();
        let mut stats = Map::new();
        stats.insert("calls".into(), calls.into());
        stats.insert("total".into(), total.into());
        stats.insert("bytes_read".into(), self.bytes_read.load(Ordering::Relaxed).into());
        stats.insert("bytes_written".into(), self.bytes_written.load(Ordering::Relaxed).into());
        stats.insert("opens".into(), (of(Call::Open) + of(Call::Create)).into());
        stats.insert("in_flight".into(), self.in_flight.load(Ordering::SeqCst).into());
        stats
    }
}
