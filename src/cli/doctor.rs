//! `envfabric doctor`

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;

use super::Context;
use super::output::{bytes, table};
use crate::build::Uv;
use crate::error::Result;
use crate::mount;
use crate::store::Store;

/// Check that this machine has what envfabric needs, and say what to do where it has not
#[derive(Debug, clap::Args)]
pub(crate) struct Doctor {}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    Ok,
    Note,
    Bad,
}

#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    state: State,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

impl Check {
    fn new(name: &'static str, state: State, found: impl Into<String>) -> Check {
        Check { name, state, found: found.into(), hint: None }
    }

    fn hint(mut self, hint: impl Into<String>) -> Check {
        self.hint = Some(hint.into());
        self
    }

    fn of<T>(name: &'static str, result: Result<T>, found: impl FnOnce(T) -> String) -> Check {
        match result {
            Ok(value) => Check::new(name, State::Ok, found(value)),
            Err(error) => {
                Check { name, state: State::Bad, found: error.chain(), hint: error.hint_text().map(str::to_string) }
            }
        }
    }
}

#[derive(Serialize)]
struct Report {
    ok: bool,
    checks: Vec<Check>,
}

impl Doctor {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let settings = &context.settings;
        let mut checks = vec![kernel(), fuse()];
        checks.extend(fusermount());
        let uv = Uv::new(settings.config.uv.clone());
        let found = uv.path().and_then(|path| Ok(format!("{} ({})", uv.version()?, path.display())));
        checks.push(Check::of("uv", found, |found| found));
        let store = match Store::open(&settings.store) {
            Err(error) if error.is_not_found() && settings.store_is_default => {
                let found = format!("none yet at {} (the first `create` makes it)", settings.store.display());
                checks.push(Check::new("store", State::Note, found));
                None
            }
            Ok(store) => {
                checks.push(match writable(store.root()) {
                    Ok(()) => Check::new("store", State::Ok, describe(&store)),
                    Err(error) => Check::new("store", State::Note, format!("{}, not writable", describe(&store)))
                        .hint(format!("this machine can mount it, but not build into it: {}", error.chain())),
                });
                Some(store)
            }
            Err(error) => {
                checks.push(Check::of("store", Err::<(), _>(error), |()| String::new()));
                None
            }
        };
        if let Some(store) = &store {
            checks.push(Check::of("index", context.index(store), |i| i.path().display().to_string()));
            checks.push(Check::of("interpreters", store.interpreters(), |all| match all.len() {
                0 => "none yet (the first `create` ingests one)".into(),
                _ => all.iter().map(|i| i.python.version.clone()).collect::<Vec<_>>().join(", "),
            }));
        }
        checks.push(scratch(&settings.scratch));
        checks.push(mounted(&settings.mount, store.as_ref()));
        checks.extend(store.as_ref().map(|store| passthrough(store, &settings.mount)));

        let report = Report { ok: checks.iter().all(|c| c.state != State::Bad), checks };
        context.out.result(&report, |w| {
            let rows = report.checks.iter().map(|c| {
                let state = match c.state {
                    State::Ok => "ok",
                    State::Note => "note",
                    State::Bad => "BAD",
                };
                let hint = c.hint.as_ref().map(|h| format!("\n-> {h}")).unwrap_or_default();
                vec![state.to_string(), c.name.to_string(), format!("{}{hint}", c.found)]
            });
            write!(w, "{}", table(&["", "CHECK", "FOUND"], rows.collect(), &[]))
        })?;
        Ok(ExitCode::from(u8::from(!report.ok)))
    }
}

/// The release of the kernel, and whether it has passthrough.
fn release() -> (String, bool) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_string();
    let mut numbers = release.split(['.', '-']).filter_map(|n| n.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    (release, version >= (6, 9))
}

fn kernel() -> Check {
    let (release, has_passthrough) = release();
    if has_passthrough {
        Check::new("kernel", State::Ok, format!("Linux {release}, with FUSE passthrough"))
    } else {
        Check::new("kernel", State::Note, format!("Linux {release}, without FUSE passthrough"))
            .hint("large files are read at local speed from Linux 6.9 on")
    }
}

/// Whether large files are read straight from the store: by the mount that is there, or by one that this user would make.
fn passthrough(store: &Store, at: &Path) -> Check {
    const NAME: &str = "passthrough";
    let without = |why: &str| Check::new(NAME, State::Note, format!("not to be had: {why}"));
    let mounted = super::daemon::mount_of(store, at).ok().flatten();
    match mounted.as_deref().and_then(|at| Some((at, mount::stats(at).ok()?))) {
        Some((at, stats)) if stats.passthrough.used => {
            Check::new(NAME, State::Ok, format!("used by the mount at {}", at.display()))
        }
        Some((at, stats)) => {
            let why = stats.passthrough.why_not.unwrap_or_default();
            Check::new(NAME, State::Note, format!("not used by the mount at {}: {why}", at.display()))
        }
        None => match mount::obstacle(store.root(), true) {
            Some(why) => without(&why.to_string()),
            None if !release().1 => without(&mount::NoPassthrough::Kernel.to_string()),
            None => Check::new(NAME, State::Ok, "a mount made now would have it"),
        },
    }
}

fn fuse() -> Check {
    match fs::OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(_) => Check::new("fuse", State::Ok, "/dev/fuse can be opened"),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Check::new("fuse", State::Bad, format!("/dev/fuse: {error}")).hint("as root: chmod 666 /dev/fuse")
        }
        Err(error) => Check::new("fuse", State::Bad, format!("/dev/fuse: {error}"))
            .hint("load it with `modprobe fuse`; in a container run with --device /dev/fuse --cap-add SYS_ADMIN"),
    }
}

fn fusermount() -> Option<Check> {
    if nix::unistd::geteuid().is_root() {
        return None;
    }
    Some(match mount::fusermount() {
        Some(path) => {
            let conf = fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
            let allowed = conf.lines().any(|l| l.trim() == "user_allow_other");
            let who = if allowed { "mounts may be shown to other users" } else { "mounts are for this user alone" };
            Check::new("fusermount3", State::Ok, format!("{} ({who})", path.display()))
        }
        None => Check::new("fusermount3", State::Bad, "not found")
            .hint("install it: apt-get install fuse3 (only root mounts without it)"),
    })
}

/// Publishing needs hard links; some file systems have none.
fn writable(root: &Path) -> Result<()> {
    use crate::error::IoContext;
    let file = tempfile::NamedTempFile::new_in(root.join("tmp")).at("creating a file in", root.join("tmp"))?;
    let link = file.path().with_extension("link");
    fs::hard_link(file.path(), &link).at("linking", &link)?;
    fs::remove_file(&link).at("removing", &link)
}

fn describe(store: &Store) -> String {
    let root = store.root();
    let free = nix::sys::statvfs::statvfs(root).map(|s| s.blocks_available() * s.fragment_size()).unwrap_or(0);
    let kind = if mount::is_local(store.root()) { "local" } else { "network" };
    format!("{} ({kind} file system, {} free)", root.display(), bytes(free))
}

fn scratch(dir: &Path) -> Check {
    let existing = dir.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    match nix::sys::statvfs::statvfs(existing).map(|s| s.blocks_available() * s.fragment_size()) {
        Ok(free) if free < 2_000_000_000 => {
            Check::new("scratch", State::Note, format!("{} has {} free", dir.display(), bytes(free)))
                .hint("builds need room for what they install; name another place: ENVFABRIC_SCRATCH")
        }
        Ok(free) => Check::new("scratch", State::Ok, format!("{} ({} free)", dir.display(), bytes(free))),
        Err(error) => Check::new("scratch", State::Bad, format!("{}: {error}", dir.display())),
    }
}

fn mounted(at: &Path, store: Option<&Store>) -> Check {
    if super::daemon::is_dead(at) {
        return Check::new(
            "mount",
            State::Bad,
            format!("{} is dead: the process that served it is gone", at.display()),
        )
        .hint(format!("envfabric umount {0}; envfabric mount {0}", at.display()));
    }
    match store.map(|store| super::daemon::mount_of(store, at)).transpose() {
        Ok(Some(Some(found))) => Check::new("mount", State::Ok, found.display().to_string()),
        Ok(_) => Check::new("mount", State::Note, format!("{} is not mounted", at.display()))
            .hint("`envfabric mount`; `run` and `shell` do it by themselves"),
        Err(error) => Check::new("mount", State::Bad, error.chain()),
    }
}
