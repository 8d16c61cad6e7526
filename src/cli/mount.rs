//! `envfabric mount` and `envfabric umount`

use std::cell::Cell;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::SignedDuration;

use super::Context;
use super::cache::CacheFlags;
use super::daemon::start_daemon;
use crate::environment::{Digest, PublicKey};
use crate::error::{Error, IoContext, Kind, Result};
use crate::mount::supervisor::{self, Program};
use crate::mount::{self, Ended, Options};
use crate::store::{Index, Store};
use crate::sys;

/// Show the store's environments as directories
///
/// Goes to the background once the mount answers; its log is in $XDG_STATE_HOME/envfabric. Where the store is mounted
/// already, that stays as it is; --replace changes how it is served, without anybody noticing.
#[derive(Debug, clap::Args)]
pub(crate) struct Mount {
    /// Mount point, made if missing [default: $XDG_DATA_HOME/envfabric/envs] [env: ENVFABRIC_MOUNT]
    dir: Option<PathBuf>,
    /// Stay in the foreground
    #[arg(long, short)]
    foreground: bool,
    /// Let only the mounting user in, although root
    #[arg(long, conflicts_with = "allow_other")]
    no_allow_other: bool,
    /// Let other users in (root does by default; others need user_allow_other in /etc/fuse.conf)
    #[arg(long)]
    allow_other: bool,
    /// Serve large files through the daemon even where the kernel could read them directly
    #[arg(long)]
    no_passthrough: bool,
    /// Do not offer environments what makes their imports cheaper
    #[arg(long)]
    plain_imports: bool,
    #[command(flatten)]
    cache: CacheFlags,
    /// Threads that answer the kernel
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: Option<u16>,
    /// Have the mount that is there served by this program and with these flags; if that cannot be, it is served as
    /// before
    #[arg(long, conflicts_with = "foreground")]
    replace: bool,
    /// Replace the process that serves when it has not answered for so long [default: 60s]
    #[arg(long, value_name = "TIME", value_parser = watchdog)]
    watchdog: Option<SignedDuration>,
    /// Give the mount up when so many processes in a row have failed to serve it (0: never) [default: 10]
    #[arg(long, value_name = "N")]
    restarts: Option<u32>,
    /// Do as on a kernel that does not send requests again (before Linux 6.9)
    #[arg(long, hide = true)]
    no_resend: bool,
    /// Tell the starting process on standard output how it went
    #[arg(long, hide = true)]
    notify: bool,
    /// As root: let a process of this user serve, without privilege; the one that mounts stays root's
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// Serve what the process at the other end of standard input has mounted
    #[arg(long, hide = true)]
    worker: bool,
}

/// After so long without an answer a process that serves is replaced.
const WATCHDOG: Duration = Duration::from_secs(60);
/// So many failures in a row are followed by another start.
const RESTARTS: u32 = 10;

/// A shorter one would end processes that are well.
const WATCHDOG_LEAST: SignedDuration = SignedDuration::from_secs(1);

fn watchdog(text: &str) -> std::result::Result<SignedDuration, String> {
    let time = super::cache::time(text)?;
    match time < WATCHDOG_LEAST {
        true => Err("a process that is well may take a second to answer: write 1s or more".into()),
        false => Ok(time),
    }
}

impl Mount {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let dir = self.dir.clone().unwrap_or_else(|| context.settings.mount.clone());
        let dir = std::path::absolute(&dir).at("finding", &dir)?;
        if self.worker {
            return self.work(context, &dir);
        }
        self.require_user()?;
        if self.replace {
            return self.replace(context, &dir);
        }
        if self.notify {
            return Ok(self.serve_notifying(context, &dir));
        }
        if self.foreground {
            return self.serve(context, &dir, || context.out.say(format_args!("mounted at {}", dir.display())));
        }
        let mut flags = self.flags();
        flags.extend(self.watchdog.map(|time| format!("--watchdog={}ms", time.as_millis())));
        flags.extend(self.restarts.map(|n| format!("--restarts={n}")));
        flags.extend(self.no_resend.then(|| "--no-resend".into()));
        let log = start_daemon(context, &dir, &flags)?;
        if log.is_none() {
            super::signing::believes_no_others(&dir, &context.store()?)?;
            self.require_served_by(&dir)?;
        }
        let store = &context.settings.store;
        let value = serde_json::json!({
            "mount": dir.to_string_lossy(),
            "store": store.to_string_lossy(),
            "existed": log.is_none(),
            "log": log.as_ref().map(|log| log.to_string_lossy()),
        });
        let already = if log.is_none() { "already " } else { "" };
        context.out.result(&value, |w| writeln!(w, "{already}mounted at {}", dir.display()))?;
        Ok(ExitCode::SUCCESS)
    }

    /// What concerns who serves, as flags for another process.
    fn flags(&self) -> Vec<String> {
        let mut flags = Vec::new();
        for (flag, set) in [
            ("--no-allow-other", self.no_allow_other),
            ("--allow-other", self.allow_other),
            ("--no-passthrough", self.no_passthrough),
            ("--plain-imports", self.plain_imports),
        ] {
            if set {
                flags.push(flag.to_string());
            }
        }
        flags.extend(self.threads.map(|n| format!("--threads={n}")));
        flags.extend(self.user.iter().map(|user| format!("--user={user}")));
        flags.extend(self.cache.flags());
        flags
    }

    /// This program as a process that serves.
    fn program(&self, context: &Context, dir: &Path) -> Result<Program> {
        let mut args: Vec<OsString> = vec!["--store".into(), context.settings.store.clone().into()];
        if let Some(config) = &context.config {
            args.extend(["--config".into(), std::path::absolute(config).at("finding", config)?.into()]);
        }
        args.extend((0..context.verbose).map(|_| "-v".into()));
        args.extend(context.settings.keys.flags().map(OsString::from));
        args.extend(["mount", "--worker"].map(OsString::from));
        args.extend(self.flags().into_iter().map(OsString::from));
        args.push(dir.into());
        let program = Program::this(args)?;
        Ok(match &self.user {
            // Its own places, and not root's.
            Some(user) => program.at_home_in(&supervisor::ordinary_user(user)?.dir),
            None => program,
        })
    }

    /// Fails for a user as whom nobody can serve.
    fn require_user(&self) -> Result<()> {
        match &self.user {
            Some(_) if !nix::unistd::geteuid().is_root() => {
                Err(Error::new(Kind::Usage, "only root can let another user serve a mount")
                    .hint("leave --user out: a mount of an ordinary user is served by that user"))
            }
            Some(user) => supervisor::ordinary_user(user).map(drop),
            None => Ok(()),
        }
    }

    /// Fails where another user than is wanted serves `dir`.
    fn require_served_by(&self, dir: &Path) -> Result<()> {
        let Some(user) = &self.user else { return Ok(()) };
        let Some(serves) = user_of(mount::stats(dir)?.pid) else { return Ok(()) };
        if serves == supervisor::ordinary_user(user)?.uid.as_raw() {
            return Ok(());
        }
        Err(Error::new(Kind::Failed, format!("the mount at {} is served by user {serves}", dir.display()))
            .hint(format!("envfabric mount --replace --user {user} {}", dir.display())))
    }

    /// What serves, as its supervisor says.
    fn work(&self, context: &Context, dir: &Path) -> Result<ExitCode> {
        // Before anything of the store or the cache is opened.
        if let Some(user) = &self.user {
            supervisor::become_user(&supervisor::ordinary_user(user)?)?;
        }
        sys::few_heaps(1);
        sys::lean_databases();
        // It was started from an open file, after whose number the kernel has called it.
        let _ = nix::sys::prctl::set_name(c"envfabric");
        // Its own, as nobody else reads it.
        let control = std::io::stdin().as_fd().try_clone_to_owned().at("listening to", "the supervisor")?;
        supervisor::work(control, self.user.is_some(), || self.open(context, dir))?;
        Ok(ExitCode::SUCCESS)
    }

    /// What is to be shown, and how.
    fn open(&self, context: &Context, dir: &Path) -> Result<(Store, Arc<Index>, Options)> {
        let store = context.store()?;
        let index = Arc::new(context.index(&store)?);
        let mut options = Options::at(dir);
        // Root has mounted, whoever serves.
        options.allow_other |= self.user.is_some();
        if self.allow_other || self.no_allow_other {
            options.allow_other = self.allow_other;
        }
        options.passthrough = !self.no_passthrough;
        options.imports = !self.plain_imports;
        options.cache_always = self.cache.always(context);
        options.cache = Some(self.cache.options(context)?);
        if let Some(threads) = self.threads {
            options.threads = usize::from(threads);
        }
        Ok((store, index, options))
    }

    /// As the supervisor.
    fn serve(&self, context: &Context, dir: &Path, ready: impl FnOnce()) -> Result<ExitCode> {
        let settings = supervisor::Settings {
            mount_point: dir.to_path_buf(),
            program: self.program(context, dir)?,
            resend: !self.no_resend,
            watchdog: self.watchdog.map_or(WATCHDOG, |time| time.try_into().unwrap_or(Duration::MAX)),
            restarts: Some(self.restarts.unwrap_or(RESTARTS)).filter(|limit| *limit > 0),
        };
        let words = given_up_file(context, dir);
        let began = Cell::new(false);
        let ended = supervisor::supervise(settings, || {
            began.set(true);
            // What was said of an earlier mount.
            words.iter().for_each(|words| _ = std::fs::remove_file(words));
            ready();
        });
        if let (Err(error), Some(words), true) = (&ended, &words, began.get()) {
            let _ = std::fs::write(words, error.chain());
        }
        match ended? {
            Ended::Unmounted => Ok(ExitCode::SUCCESS),
            // The user has said twice that nobody is to be waited for.
            Ended::Abandoned => Ok(ExitCode::from(Kind::Interrupted.exit_code())),
        }
    }

    /// Puts this program and these flags in the place of what serves `dir`.
    fn replace(&self, context: &Context, dir: &Path) -> Result<ExitCode> {
        // One that does not answer is to be replaced all the same.
        let stats = mount::stats(dir).ok();
        if let Some(stats) = &stats {
            let ours = context.settings.keys.trusted()?.iter().map(PublicKey::text).collect::<BTreeSet<_>>();
            if ours != stats.trusted_keys.iter().cloned().collect() {
                let what = format!("the mount at {} was made with other trusted keys", dir.display());
                return Err(Error::new(Kind::Rejected, what).hint(format!(
                    "the kernel keeps what it was shown, so mount anew: envfabric umount {0}; envfabric mount {0}",
                    dir.display()
                )));
            }
        }
        let before = stats.and_then(|stats| user_of(stats.pid));
        let status = supervisor::replace(dir, self.program(context, dir)?.with_settings())?;
        if let (None, Some(before)) = (&self.user, before.filter(|uid| *uid != nix::unistd::geteuid().as_raw())) {
            context.out.say(format_args!("it is served with privilege now, and was by user {before}: see --user"));
        }
        let value = serde_json::json!({ "mount": dir.to_string_lossy(), "replaced": true, "supervision": status });
        context.out.result(&value, |w| {
            let version = status.worker_version.as_deref().unwrap_or("?");
            let pid = status.worker.unwrap_or_default();
            writeln!(w, "{} is served by envfabric {version}, process {pid}", dir.display())
        })?;
        Ok(ExitCode::SUCCESS)
    }

    /// As the background process: one line of JSON tells the parent how it went.
    fn serve_notifying(&self, context: &Context, dir: &Path) -> ExitCode {
        // Out of the terminal's session, so that closing it does not end the mount; and out of every directory.
        let _ = nix::unistd::setsid();
        let _ = std::env::set_current_dir("/");
        let tell = |value: serde_json::Value| {
            let _ = writeln!(std::io::stdout(), "{value}");
        };
        match self.serve(context, dir, || tell(serde_json::json!({ "ready": true }))) {
            Ok(code) => code,
            Err(error) => {
                tracing::error!(error = %error.chain(), "the mount ended");
                tell(serde_json::json!({
                    "error": error.chain(), "detail": error.detail_text(), "hint": error.hint_text(),
                }));
                ExitCode::from(error.kind().exit_code())
            }
        }
    }
}

/// Whose process `pid` is, where that can be seen.
fn user_of(pid: u32) -> Option<u32> {
    // The directory is root's where a process has given privilege up.
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    users.split_whitespace().nth(1)?.parse().ok()
}

/// Where it is written down why the mount at `dir` was given up.
fn given_up_file(context: &Context, dir: &Path) -> Option<PathBuf> {
    let name = Digest::of(dir.as_os_str().as_encoded_bytes());
    Some(context.settings.state().ok()?.join(format!("given-up-{}", name.short())))
}

/// Why the mount at `dir` was given up, if it was.
pub(super) fn given_up(context: &Context, dir: &Path) -> Option<String> {
    let dir = std::path::absolute(dir).ok()?;
    std::fs::read_to_string(given_up_file(context, &dir)?).ok()
}

/// Take a mount away
#[derive(Debug, clap::Args)]
#[command(visible_alias = "unmount")]
pub(crate) struct Umount {
    /// Mount point [default: as `mount`]
    dir: Option<PathBuf>,
    /// Take the name away now; whoever still uses the mount goes on until done
    #[arg(long, short)]
    lazy: bool,
}

/// How long a process that served a mount is waited for.
const ENDS: Duration = Duration::from_secs(15);

/// Waits until process `pid` is gone, if it is one of this program that can be seen here.
fn wait_for_end(pid: u32) {
    // A process that nobody has waited for is there still, without a program.
    let exe = format!("/proc/{pid}/exe");
    let is_ours = || {
        let name = std::fs::read_link(&exe).ok().and_then(|path| path.file_name().map(|name| name.to_os_string()));
        name.is_some_and(|name| name.as_encoded_bytes().starts_with(b"envfabric"))
    };
    let begun = Instant::now();
    while begun.elapsed() < ENDS && is_ours() {
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Umount {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let dir = self.dir.clone().unwrap_or_else(|| context.settings.mount.clone());
        let dir = std::path::absolute(&dir).at("finding", &dir)?;
        // What serves it writes down what it knows before it ends; whoever mounts again needs that to be done.
        let served_by = if self.lazy { None } else { mount::stats(&dir).ok() };
        let served_by: Vec<u32> = served_by
            .map(|stats| std::iter::once(stats.pid).chain(stats.supervised.map(|by| by.supervisor)).collect())
            .unwrap_or_default();
        mount::umount(&dir, self.lazy)?;
        served_by.into_iter().for_each(wait_for_end);
        context.out.result(&serde_json::json!({ "unmounted": dir.to_string_lossy() }), |w| {
            writeln!(w, "unmounted {}", dir.display())
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
