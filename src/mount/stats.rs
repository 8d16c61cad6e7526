//! What a mount has done and how it is served, told by itself.
//!
//! Whoever wants to know reads an extended attribute of the mount point, [`ATTRIBUTE`], which no listing names. So there
//! is no socket and no file that could go stale, whoever the kernel lets into the mount may ask, and the answer comes
//! from the process that serves, through bind mounts and in containers too.
//!
//! Counting costs one relaxed addition a request; everything else is looked at when somebody asks.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use super::attach;
use super::kept::{HANDLES, Number};
use super::passthrough::Passthrough;
use super::shift::Shift;
use super::table::{self, MountInfo};
use crate::cache::CacheStats;
use crate::error::{Error, IoContext, Kind, Result};
use crate::patience::THREADS_MAX;
use crate::sys;
use crate::view::Tree;

/// The extended attribute, of any directory or file of a mount, that has [`Stats`] as JSON.
pub(super) const ATTRIBUTE: &std::ffi::CStr = c"user.envfabric.stats";
/// As long as the kernel lets an attribute be (`XATTR_SIZE_MAX`), in bytes.
const ANSWER_MAX: usize = 65_536;
/// Threads that come and go, or keep things in order: those that ask a distant store for a listing, and a few more.
const OTHER_THREADS: usize = 64;
/// How long a mount may take to answer: it may have been stopped.
const ANSWERS: Duration = Duration::from_secs(5);

macro_rules! requests {
    ($($variant:ident $name:literal,)*) => {
        /// What the kernel may ask for. `FORGET` counts inodes, because `fuser` takes batches of them apart; requests
        /// that it answers by itself (`INTERRUPT`) are not counted.
        #[derive(Debug, Clone, Copy)]
        pub(super) enum Op { $($variant),* }

        impl Op {
            /// By number, as the kernel calls them.
            const NAMES: &[&str] = &[$($name),*];
        }
    };
}

requests! {
    Lookup "LOOKUP",
    Forget "FORGET",
    Getattr "GETATTR",
    Readlink "READLINK",
    Open "OPEN",
    Read "READ",
    Release "RELEASE",
    Ioctl "IOCTL",
    Opendir "OPENDIR",
    Readdir "READDIR",
    Readdirplus "READDIRPLUS",
    Statfs "STATFS",
    Getxattr "GETXATTR",
    Listxattr "LISTXATTR",
    Other "OTHER",
}

/// How a file was opened.
#[derive(Debug, Clone, Copy)]
pub(super) enum How {
    Passthrough,
    Cached,
    Direct,
}

/// What has been counted since the mount was made.
#[derive(Debug)]
pub(super) struct Counters {
    since: Instant,
    requests: [AtomicU64; Op::NAMES.len()],
    opens: [AtomicU64; 3],
    bytes_read: AtomicU64,
    /// What the kernel speaks, from its INIT request.
    kernel: OnceLock<(u32, u32)>,
}

impl Default for Counters {
    fn default() -> Self {
        Counters {
            since: Instant::now(),
            requests: Default::default(),
            opens: Default::default(),
            bytes_read: AtomicU64::new(0),
            kernel: OnceLock::new(),
        }
    }
}

impl Counters {
    pub(super) fn count(&self, op: Op) {
        self.requests[op as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn opened(&self, how: How) {
        self.opens[how as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self, bytes: usize) {
        self.bytes_read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn heard(&self, kernel: (u32, u32)) {
        // INIT comes once.
        let _ = self.kernel.set(kernel);
    }

    /// What [`Stats`] tells, as JSON.
    pub(super) fn tell(&self, tree: &Tree, passthrough: &Passthrough, threads: usize, shift: &Shift) -> Vec<u8> {
        let number = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let requests = Op::NAMES.iter().zip(&self.requests).map(|(name, n)| (name.to_string(), number(n)));
        let [passed, cached, direct] = self.opens.each_ref().map(number);
        let (major, minor) = self.kernel.get().copied().unwrap_or_default().min(SPOKEN);
        let open = ("open large files", passthrough.handles(), HANDLES as u64);
        let in_cache = tree.cache().into_iter().flat_map(|cache| cache.memories());
        let memories = tree.memories().into_iter().chain([open]).chain(in_cache);
        let memories = memories.map(|(name, held, most)| (name.to_string(), Memory { held, most }));
        let why_not = passthrough.why_not();
        let stats = Stats {
            mount_point: tree.mounted_at().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
            store: tree.store().root().to_string_lossy().into_owned(),
            envfabric: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            up_seconds: self.since.elapsed().as_secs(),
            cpu_seconds: cpu_seconds(),
            resident_bytes: resident_bytes(),
            open_files: fs::read_dir("/proc/self/fd").map_or(0, |all| all.count() as u64),
            open_files_most: getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft),
            threads: threads as u64,
            process_threads: fs::read_dir("/proc/self/task").map_or(0, |all| all.count() as u64),
            process_threads_most: (threads + THREADS_MAX + OTHER_THREADS) as u64,
            store_hangs: tree.is_cut_off(),
            protocol: format!("{major}.{minor}"),
            passthrough: PassthroughUse { used: why_not.is_none(), why_not: why_not.map(|why| why.to_string()) },
            requests: requests.collect(),
            bytes_read: number(&self.bytes_read),
            opens: Opens { passthrough: passed, cached, direct },
            memories: memories.collect(),
            cache: tree.cache().map(|cache| cache.stats()),
            trusted_keys: tree.store().trust().iter().flat_map(|trust| trust.keys()).map(|key| key.text()).collect(),
            supervised: shift.of_supervised(|number| Supervised {
                supervisor: number(Number::Supervisor) as u32,
                workers: number(Number::Lives),
                deaths: number(Number::Deaths),
                replacements: number(Number::Replacements),
                poisoned: number(Number::Poisoned),
            }),
        };
        // Numbers and texts can always be written.
        serde_json::to_vec(&stats).unwrap_or_default()
    }
}

/// The protocol that `fuser` speaks; the kernel takes the lower of its own and this.
const SPOKEN: (u32, u32) = (7, 40);

/// What a mount has done since it was made, and how it is served.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Where it was mounted, as its process sees it.
    pub mount_point: String,
    /// The store that it shows.
    pub store: String,
    /// Version of the program that serves it.
    pub envfabric: String,
    /// Process that serves it, as that process sees itself.
    pub pid: u32,
    /// Since the process began to serve; what is counted is counted since then.
    pub up_seconds: u64,
    /// What its process has used of the processors.
    pub cpu_seconds: f64,
    /// Memory of its process.
    pub resident_bytes: u64,
    /// Descriptors of its process.
    pub open_files: u64,
    /// Descriptors that it may have.
    #[serde(default)]
    pub open_files_most: u64,
    /// Threads that answer the kernel.
    pub threads: u64,
    /// Threads of its process, with those that wait for the store or ask it.
    #[serde(default)]
    pub process_threads: u64,
    /// Threads that it may have.
    #[serde(default)]
    pub process_threads_most: u64,
    /// True while the store is distant and does not answer.
    #[serde(default)]
    pub store_hangs: bool,
    /// FUSE protocol that is spoken with the kernel, `7.40`.
    pub protocol: String,
    /// Whether the kernel reads large files straight from the store or the cache.
    pub passthrough: PassthroughUse,
    /// Requests by the kernel's name for them. What it answers from its own memory is not among them.
    pub requests: BTreeMap<String, u64>,
    /// Bytes of files that were read through the process; with passthrough none are.
    pub bytes_read: u64,
    /// Files opened.
    pub opens: Opens,
    /// Its bounded memories.
    pub memories: BTreeMap<String, Memory>,
    /// The cache, where it has one.
    #[serde(default)]
    pub cache: Option<CacheStats>,
    /// Keys of those whom it believes; none: whoever can write to the store.
    #[serde(default)]
    pub trusted_keys: Vec<String>,
    /// Who sees to it that it is served, where somebody does.
    #[serde(default)]
    pub supervised: Option<Supervised>,
}

/// The supervisor of a mount, and what has become of the processes that served it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Supervised {
    /// Its process; 0 when it is gone, and the mount ends with the process that serves it.
    pub supervisor: u32,
    /// Processes that were started to serve.
    pub workers: u64,
    /// Those of them that ended while they served.
    pub deaths: u64,
    /// Planned replacements.
    pub replacements: u64,
    /// Requests that were answered with an error because they had ended several processes.
    pub poisoned: u64,
}

/// Whether the kernel reads large files straight from the store or the cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassthroughUse {
    /// True when it does.
    pub used: bool,
    /// The reason when it does not.
    pub why_not: Option<String>,
}

/// Files opened, by how their bytes are to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opens {
    /// Straight from the store or the cache.
    pub passthrough: u64,
    /// Through the process, and kept by the kernel.
    pub cached: u64,
    /// Through the process each time, because they differ by who reads.
    pub direct: u64,
}

/// How full a bounded memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// What it holds now.
    pub held: u64,
    /// What it holds at most.
    pub most: u64,
}

fn resident_bytes() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = text.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or(4096);
    pages * page.unsigned_abs()
}

fn cpu_seconds() -> f64 {
    use nix::sys::resource::{UsageWho, getrusage};
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    getrusage(UsageWho::RUSAGE_SELF).map_or(0.0, |usage| seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// Asks the mount at `dir`, which may also be a bind mount of a part of it.
///
/// Root is told of every mount; it asks in the name of the user who mounted it where only that one is let in.
///
/// # Errors
/// [`Kind::NotFound`] when nothing is mounted there, [`Kind::Usage`] when it is not ours, [`Kind::Failed`] when its
/// process is gone or does not answer within five seconds.
pub fn stats(dir: &Path) -> Result<Stats> {
    let shown = dir.display();
    let here = table::absolute(dir)?;
    let Some(line) = table::on_top(&here)? else {
        return Err(Error::new(Kind::NotFound, format!("nothing is mounted at {shown}"))
            .hint(format!("mount it: envfabric mount {shown}")));
    };
    let Some(mount) = table::of_this_program(&line) else {
        let what = format!("what is mounted at {shown} ({}) is not envfabric's", line.fs_type);
        return Err(Error::new(Kind::Usage, what).hint("name a directory where `envfabric mount` has mounted"));
    };
    // Opened in this way, the file system that is mounted there is not asked.
    let root = nix::fcntl::open(&here, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).at("opening", &here)?;
    let ask = |user| sys::xattr_apart::<ANSWER_MAX>(&root, ATTRIBUTE, user, ANSWERS);
    let answer = match (ask(None), mount.owner) {
        (Err(error), Some(owner)) if error.raw_os_error() == Some(libc::EACCES) && attach::is_root() => {
            ask(Some(owner))
        }
        (answer, _) => answer,
    };
    let Some(text) = answer.map_err(|error| refused(&mount, error))? else {
        let what = format!("the mount at {shown} has not answered for {} s", ANSWERS.as_secs());
        return Err(Error::new(Kind::Failed, what)
            .hint("its process is stopped or waits for a store that hangs; `envfabric umount --lazy` lets go of it"));
    };
    serde_json::from_slice(&text).map_err(|source| {
        Error::new(Kind::Unsupported, format!("what the mount at {shown} tells of itself cannot be understood"))
            .hint("another version of envfabric serves it: ask with that one")
            .with_source(source)
    })
}

fn refused(mount: &MountInfo, error: io::Error) -> Error {
    let at = mount.mount_point.display();
    match error.raw_os_error() {
        Some(libc::ENOTCONN | libc::ECONNABORTED) => {
            Error::new(Kind::Failed, format!("the mount at {at} is dead: the process that served it is gone"))
                .hint(format!("mount again: envfabric mount {at}"))
        }
        Some(libc::EACCES | libc::EPERM) => {
            let whose = mount.owner.map_or("another user".to_string(), |(user, _)| format!("user {user}"));
            Error::io("asking the mount at", &mount.mount_point, error)
                .hint(format!("only {whose} is let into it: ask as that user or as root"))
        }
        Some(libc::ENODATA | libc::EOPNOTSUPP) => {
            Error::new(Kind::Unsupported, format!("the mount at {at} does not tell of itself"))
                .hint("an older envfabric serves it: unmount and mount again")
        }
        _ => Error::io("asking the mount at", &mount.mount_point, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Histogram;
    use crate::store::KEYS_MAX;

    #[test]
    fn the_longest_answer_fits_an_attribute_and_older_mounts_are_understood() {
        // Bytes that are no text take three each.
        let path = String::from_utf8_lossy(&[0xff; 4096]).into_owned();
        let most = u64::MAX;
        let names = |n: usize| (0..n).map(|i| format!("{i:>24}"));
        let stats = Stats {
            mount_point: path.clone(),
            store: path.clone(),
            envfabric: "10.10.10".into(),
            pid: u32::MAX,
            up_seconds: most,
            cpu_seconds: 1e9 / 3.0,
            resident_bytes: most,
            open_files: most,
            open_files_most: most,
            threads: most,
            process_threads: most,
            process_threads_most: most,
            store_hangs: false,
            protocol: "7.40".into(),
            passthrough: PassthroughUse { used: false, why_not: Some("x".repeat(200)) },
            requests: names(Op::NAMES.len()).map(|name| (name, most)).collect(),
            bytes_read: most,
            opens: Opens { passthrough: most, cached: most, direct: most },
            memories: names(50).map(|name| (name, Memory { held: most, most })).collect(),
            cache: Some(CacheStats {
                dir: path,
                served_bytes: most,
                latency: Histogram { up_to_microseconds: vec![most; 20], counts: vec![most; 21] },
                ..CacheStats::default()
            }),
            trusted_keys: vec!["x".repeat(72); KEYS_MAX],
            supervised: Some(Supervised {
                supervisor: u32::MAX,
                workers: most,
                deaths: most,
                replacements: most,
                poisoned: most,
            }),
        };
        let mut value = serde_json::to_value(&stats).unwrap();
        assert!(serde_json::to_vec(&value).unwrap().len() < ANSWER_MAX);
        assert_eq!(serde_json::from_value::<Stats>(value.clone()).unwrap(), stats);
        for new in [
            "open_files_most",
            "process_threads",
            "process_threads_most",
            "store_hangs",
            "cache",
            "supervised",
            "trusted_keys",
        ] {
            value.as_object_mut().unwrap().remove(new);
        }
        assert_eq!(serde_json::from_value::<Stats>(value).unwrap().cache, None);
    }
}
