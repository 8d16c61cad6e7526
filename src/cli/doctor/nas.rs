//! The store and the cache of this machine, tried out. Every question has a limited time.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde_json::json;

use super::places::{self, Sort};
use super::{Check, State};
use crate::cache::Options;
use crate::cli::output::bytes;
use crate::error::{IoContext, Kind, Result};
use crate::mount;
use crate::patience::within;
use crate::store::{Named, Store};
use crate::view::mountinfo::{self, MountLine};

/// What does not answer for so long hangs.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// How often something is measured.
const TIMES: usize = 11;

/// The mount that `path` is on, or the directory nearest to it that exists.
fn mount_of(path: &Path) -> Result<Option<MountLine>> {
    let path = path.to_path_buf();
    let real = within(PATIENCE, move || {
        let real = path.ancestors().find_map(|dir| dir.canonicalize().ok());
        Ok(real.unwrap_or_else(|| PathBuf::from("/")))
    })?;
    let lines = mountinfo::read(Path::new("/proc/self/mountinfo")).map(|text| mountinfo::parse(&text));
    Ok(places::mount_of(&real, &lines.unwrap_or_default()).cloned())
}

fn free(dir: &Path) -> Option<u64> {
    let dir = dir.ancestors().find(|dir| dir.exists())?;
    nix::sys::statvfs::statvfs(dir).map(|stat| stat.blocks_available() * stat.fragment_size()).ok()
}

/// Everything about where `store` lies. The first question that is not answered is the last.
pub(super) fn store(store: &Store) -> Vec<Check> {
    let mut checks = Vec::new();
    match file_system(store.root()) {
        Ok(found) => checks.extend(found),
        Err(error) => checks.push(Check::of("file system", Err::<(), _>(error), |()| String::new())),
    }
    for check in [latency, publishing] {
        let store = store.clone();
        match within(PATIENCE, move || Ok(check(&store))) {
            Ok(found) => checks.extend(found),
            Err(error) => {
                checks.push(Check::of("store", Err::<(), _>(error), |()| String::new()));
                break;
            }
        }
    }
    checks
}

fn file_system(root: &Path) -> Result<Vec<Check>> {
    let Some(mount) = mount_of(root)? else { return Ok(Vec::new()) };
    let (sort, state, says) = places::known(&mount.fs_type);
    let check = Check::new("file system", state, format!("{}: {says}", mount.fs_type));
    let check =
        check.fact("type", mount.fs_type.as_str()).fact("mount_point", mount.mount_point_path().to_string_lossy());
    let mut checks = vec![check];
    if sort == Sort::Network {
        let advice = places::advice(&mount.fs_type, &mount.options);
        checks.push(places::options_check(&mount.options, &advice).fact("options", mount.options.as_str()));
    }
    Ok(checks)
}

/// How long the store takes for what mounts ask most: to open a file, to say that a name is not there, to read.
fn latency(store: &Store) -> Vec<Check> {
    const NAME: &str = "latency";
    let path = store.root().join("fabric.json");
    let mut times = [const { Vec::new() }; 3];
    for i in 0..TIMES {
        let tried = (|| -> io::Result<()> {
            let start = Instant::now();
            let file = File::open(&path)?;
            times[0].push(start.elapsed());
            // What the kernel has of it is let go, so that the server is asked. Where that fails it may not be.
            let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
            let start = Instant::now();
            file.read_at(&mut [0; 4096], 0)?;
            times[1].push(start.elapsed());
            let missing = store.root().join(format!("doctor-{}-{i}", std::process::id()));
            let start = Instant::now();
            let _ = File::open(missing);
            times[2].push(start.elapsed());
            Ok(())
        })();
        if let Err(error) = tried.at("reading", &path) {
            return vec![Check::of(NAME, Err::<(), _>(error), |()| String::new())];
        }
    }
    let medians = times.map(places::median);
    let millis = medians.map(|time| time.as_secs_f64() * 1e3);
    let [open, read, miss] = millis.map(|ms| if ms < 10.0 { format!("{ms:.2}") } else { format!("{ms:.0}") });
    let (state, says) = places::latency(medians.into_iter().max().unwrap_or_default());
    let found = format!("open {open} ms, read {read} ms, missing name {miss} ms: {says}");
    let [open, read, miss] = millis;
    vec![Check::new(NAME, state, found).fact("median_ms", json!({ "open": open, "read": read, "missing": miss }))]
}

/// Whether builds can publish here, how, and what time the server has.
fn publishing(store: &Store) -> Vec<Check> {
    const NAME: &str = "publishing";
    match store.try_publishing() {
        Ok(tried) => {
            let check = match tried.named {
                Named::ByLinks => Check::new(NAME, State::Ok, "by hard links"),
                Named::ByRenames => Check::new(NAME, State::Note, "by renames that never replace: no hard links here"),
            };
            let by = if tried.named == Named::ByLinks { "links" } else { "renames" };
            let ahead = places::ahead(tried.server, tried.before, tried.after);
            let clock = (!mount::is_local(store.root())).then(|| places::clock_check(ahead));
            [check.fact("by", by)].into_iter().chain(clock).collect()
        }
        Err(error) if error.kind() == Kind::Corrupt => vec![Check::of(NAME, Err::<(), _>(error), |()| String::new())],
        Err(error) => {
            let hint = "this machine can mount it, but not build into it";
            vec![Check::new(NAME, State::Note, format!("not possible: {}", error.chain())).hint(hint)]
        }
    }
}

/// The cache that a mount would have, if it is `used`.
pub(super) fn cache(options: Result<Options>, used: bool) -> Check {
    const NAME: &str = "cache";
    let options = match options {
        Ok(options) => options,
        Err(error) if used => return Check::of(NAME, Err::<(), _>(error), |()| String::new()),
        Err(_) => return Check::new(NAME, State::Ok, "none needed: files are read in place"),
    };
    let dir = options.dir.display();
    if !used {
        return Check::new(NAME, State::Ok, format!("none needed: files are read in place (else {dir})"));
    }
    let fs_type = match mount_of(&options.dir) {
        Ok(mount) => mount.map_or_else(|| "unknown".to_string(), |mount| mount.fs_type),
        Err(error) => return Check::of(NAME, Err::<(), _>(error), |()| String::new()),
    };
    let at = options.dir.clone();
    let free = match within(PATIENCE, move || Ok(free(&at))) {
        Ok(free) => free.unwrap_or(0),
        Err(error) => return Check::of(NAME, Err::<(), _>(error), |()| String::new()),
    };
    let (limit, keep_free) = (bytes(options.limit), bytes(options.keep_free));
    let found = format!("{dir} ({fs_type}), at most {limit}; {} free, of which it leaves {keep_free}", bytes(free));
    let check = match places::known(&fs_type).0 {
        Sort::Network => {
            Check::new(NAME, State::Bad, found).hint("it must lie on a local disk: name another with --cache")
        }
        _ if free <= options.keep_free => {
            Check::new(NAME, State::Note, found).hint("nothing more is kept: make room, or lower --cache-free")
        }
        Sort::Local => Check::new(NAME, State::Ok, found),
        Sort::NoPassthrough | Sort::Unknown => Check::new(NAME, State::Note, found)
            .hint("large files are read faster from ext4, xfs or btrfs: see --cache"),
    };
    let check = check.fact("dir", options.dir.to_string_lossy()).fact("type", fs_type);
    check.fact("limit", options.limit).fact("keep_free", options.keep_free).fact("free", free)
}
