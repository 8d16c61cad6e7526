//! `envfabric doctor`

mod keys;
mod nas;
mod owners;
mod places;

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Context;
use super::cache::CacheFlags;
use super::output::{bytes, table};
use crate::build::Uv;
use crate::error::{Error, IoContext, Kind, Result};
use crate::mount::{self, Alive, alive, supervisor};
use crate::patience::within;
use crate::store::{Codec, Store};
use nas::PATIENCE;

/// Check that this machine has what envfabric needs, and say what to do where it has not
///
/// The store is tried out, too: what file system it is on and how that is mounted, how fast it answers, whether builds
/// can publish there, and what time its server has. Nothing stays behind, and a store that hangs is not waited for.
#[derive(Debug, clap::Args)]
pub(crate) struct Doctor {
    /// Look, and tell the starting process on standard output
    #[arg(long, hide = true)]
    apart: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    Ok,
    Note,
    Bad,
}

#[derive(Debug, Serialize, Deserialize)]
struct Check {
    name: String,
    state: State,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
    /// What was found, for programs.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    facts: Map<String, Value>,
}

impl Check {
    fn new(name: &str, state: State, found: impl Into<String>) -> Check {
        Check { name: name.into(), state, found: found.into(), hint: None, facts: Map::new() }
    }

    fn hint(mut self, hint: impl Into<String>) -> Check {
        self.hint = Some(hint.into());
        self
    }

    fn fact(mut self, name: &str, value: impl Into<Value>) -> Check {
        self.facts.insert(name.into(), value.into());
        self
    }

    fn of<T>(name: &str, result: Result<T>, found: impl FnOnce(T) -> String) -> Check {
        match result {
            Ok(value) => Check::new(name, State::Ok, found(value)),
            Err(error) => {
                let check = Check::new(name, State::Bad, error.chain());
                Check { hint: error.hint_text().map(str::to_string), ..check }
            }
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Report {
    ok: bool,
    checks: Vec<Check>,
}

impl Doctor {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        if self.apart {
            let report = look(context);
            serde_json::to_writer(std::io::stdout(), &report)
                .map_err(std::io::Error::from)
                .at("writing to", "the doctor")?;
            return Ok(ExitCode::SUCCESS);
        }
        let report = ask_apart(context.out.terminal)?;
        context.out.result(&report, |w| {
            let rows = report.checks.iter().map(|c| {
                let state = match c.state {
                    State::Ok => "ok",
                    State::Note => "note",
                    State::Bad => "BAD",
                };
                let hint = c.hint.as_ref().map(|h| format!("\n-> {h}")).unwrap_or_default();
                vec![state.to_string(), c.name.clone(), format!("{}{hint}", c.found)]
            });
            write!(w, "{}", table(&["", "CHECK", "FOUND"], rows.collect(), &[]))
        })?;
        Ok(ExitCode::from(u8::from(!report.ok)))
    }
}

/// What another process of this program sees, which is left alone once it has told: a call on a FUSE file system that
/// hangs, such as sshfs, keeps even a process that is killed from ending.
fn ask_apart(terminal: bool) -> Result<Report> {
    let program = std::env::current_exe().at("finding", "this program")?;
    let mut command = Command::new(&program);
    command.args(std::env::args_os().skip(1)).arg("--apart").stdin(Stdio::null()).stdout(Stdio::piped());
    // Who reads a pipe to its end must not wait for that process either.
    command.stderr(if terminal { Stdio::inherit() } else { Stdio::null() });
    let mut looks = command.spawn().at("starting", &program)?;
    let told = looks.stdout.take().map(|told| serde_json::Deserializer::from_reader(told).into_iter().next());
    match told.flatten() {
        Some(Ok(report)) => Ok(report),
        _ => Err(Error::new(Kind::Failed, "the process that looks at this machine ended without a word")),
    }
}

fn look(context: &Context) -> Report {
    let settings = &context.settings;
    let mut checks = vec![kernel(), survival(), fuse()];
    checks.extend(fusermount());
    let uv = Uv::new(settings.config.uv.clone());
    let found = uv.path().and_then(|path| Ok(format!("{} ({})", uv.version()?, path.display())));
    checks.push(Check::of("uv", found, |found| found));
    let root = settings.store.clone();
    let store = match within(PATIENCE, move || Store::open(&root)) {
        Err(error) if error.is_not_found() && settings.store_is_default => {
            let found = format!("none yet at {} (the first `create` makes it)", settings.store.display());
            checks.push(Check::new("store", State::Note, found));
            None
        }
        Err(error) => {
            checks.push(Check::of("store", Err::<(), _>(error), |()| String::new()));
            None
        }
        Ok(store) => Some(store),
    };
    if let Some(store) = &store {
        checks.extend(of_store(context, store));
    }
    checks.push(scratch(&settings.scratch));
    let (at, of) = (settings.mount.clone(), store.clone());
    let given_up = super::mount::given_up(context, &at);
    let found = within(PATIENCE * 3, move || Ok(mounted(&at, of.as_ref(), given_up)));
    checks.push(found.unwrap_or_else(|error| Check::of("mount", Err::<(), _>(error), |()| String::new())));
    if let Some(store) = store {
        let flags = CacheFlags::default();
        let (options, always) = (flags.options(context), flags.always(context));
        let of = store.clone();
        let in_place = within(PATIENCE, move || Ok(mount::is_local(of.root()) && of.codec() == Codec::Raw));
        // Where it does not answer it is no local disk.
        let used = always || !in_place.unwrap_or(false);
        let files = options.as_ref().ok().filter(|_| used).map(|options| options.dir.clone());
        checks.push(nas::cache(options, used));
        let at = settings.mount.clone();
        let found =
            within(PATIENCE * 2, move || Ok(passthrough(&store, files.as_deref().unwrap_or(store.root()), &at)));
        checks.push(found.unwrap_or_else(|error| Check::of("passthrough", Err::<(), _>(error), |()| String::new())));
    }

    Report { ok: checks.iter().all(|c| c.state != State::Bad), checks }
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
fn passthrough(store: &Store, files: &Path, at: &Path) -> Check {
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
        None => match mount::obstacle(files, true) {
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

/// Everything about `store`.
fn of_store(context: &Context, store: &Store) -> Vec<Check> {
    let of = store.clone();
    let described = within(PATIENCE, move || Ok(describe(&of)));
    let answers = described.is_ok();
    let mut checks = vec![Check::of("store", described, |found| found)];
    if !answers {
        return checks;
    }
    checks.extend(nas::store(store));
    checks.extend(keys::checks(context, store));
    checks.extend(owners::check(store));
    checks.push(Check::of("index", context.index(store), |i| i.path().display().to_string()));
    let of = store.clone();
    checks.push(Check::of("interpreters", within(PATIENCE, move || of.interpreters()), |all| match all.len() {
        0 => "none yet (the first `create` ingests one)".into(),
        _ => all.iter().map(|i| i.python.version.clone()).collect::<Vec<_>>().join(", "),
    }));
    checks
}

fn describe(store: &Store) -> String {
    let root = store.root();
    let free = nix::sys::statvfs::statvfs(root).map(|s| s.blocks_available() * s.fragment_size()).unwrap_or(0);
    let kind = if mount::is_local(root) { "local" } else { "distant" };
    let files = if store.codec() == Codec::Raw { "as they are" } else { "compressed" };
    format!("{} ({kind}, files lie there {files}, {} free)", root.display(), bytes(free))
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

/// How a supervised mount does, in a line.
fn supervision(status: &supervisor::Status) -> String {
    let mut told = format!("supervised by process {}", status.supervisor);
    match status.worker {
        Some(worker) => told.push_str(&format!(", served by {worker}")),
        None => told.push_str(", another process is being started to serve it"),
    }
    if status.deaths > 0 {
        let last = status.last_death.as_deref().unwrap_or("nothing is known of the last");
        told.push_str(&format!("; {} have ended before, the last one: {last}", status.deaths));
    }
    if status.poisoned > 0 {
        told.push_str(&format!("; {} requests were given up", status.poisoned));
    }
    told
}

/// What this kernel does for who uses a mount whose process ends.
fn survival() -> Check {
    const NAME: &str = "survival";
    match release().1 {
        true => {
            Check::new(NAME, State::Ok, "when the process that serves a mount ends, the next answers what it was asked")
        }
        false => Check::new(
            NAME,
            State::Note,
            "when the process that serves a mount crashes, what it was asked fails with an error",
        )
        .hint("later calls work, and --replace disturbs nobody; from Linux 6.9 on crashes disturb nobody either"),
    }
}

fn mounted(at: &Path, store: Option<&Store>, given_up: Option<String>) -> Check {
    const NAME: &str = "mount";
    let here = mount::find(at).ok().flatten();
    match here.as_ref().map(|_| alive(at, super::daemon::ANSWERS)) {
        Some(Alive::Dead) => {
            let why = given_up.map_or("the process that served it is gone".into(), |words| words);
            return Check::new(NAME, State::Bad, format!("{} is dead: {why}", at.display()))
                .hint(format!("envfabric umount {0}; envfabric mount {0}", at.display()));
        }
        Some(Alive::Silent) => {
            let told = match supervisor::status(at) {
                Ok(Some(status)) => supervision(&status),
                _ => "nobody replaces its process".into(),
            };
            return Check::new(NAME, State::Bad, format!("{} does not answer; {told}", at.display()))
                .hint("its process is stopped or its store hangs; `envfabric umount --lazy` lets go of it");
        }
        Some(Alive::Answers) | None => {}
    }
    match store.map(|store| super::daemon::mount_of(store, at)).transpose() {
        Ok(Some(Some(found))) => match supervisor::status(&found) {
            Ok(Some(status)) => {
                let state = if status.failures > 0 { State::Note } else { State::Ok };
                let facts = serde_json::to_value(&status).unwrap_or_default();
                Check::new(NAME, state, format!("{}; {}", found.display(), supervision(&status)))
                    .fact("supervision", facts)
            }
            _ if mount::stats(&found).is_ok_and(|stats| stats.supervised.is_some_and(|by| by.supervisor == 0)) => {
                Check::new(NAME, State::Bad, format!("{}: its supervisor is gone", found.display())).hint(format!(
                    "it ends with the process that serves it: envfabric umount {0}; envfabric mount {0}",
                    found.display()
                ))
            }
            _ => Check::new(NAME, State::Ok, found.display().to_string()),
        },
        Ok(_) => Check::new("mount", State::Note, format!("{} is not mounted", at.display()))
            .hint("`envfabric mount`; `run` and `shell` do it by themselves"),
        Err(error) => Check::new("mount", State::Bad, error.chain()),
    }
}
