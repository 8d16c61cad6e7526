//! `envfabric mount` and `envfabric umount`

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::Context;
use super::cache::CacheFlags;
use super::daemon::start_daemon;
use crate::error::{IoContext, Kind, Result};
use crate::mount::{self, Ended, Options};
use crate::sys;

/// Show the store's environments as directories
///
/// Goes to the background once the mount answers; its log is in $XDG_STATE_HOME/envfabric. Where the store is mounted
/// already, that stays as it is.
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
    /// Tell the starting process on standard output how it went
    #[arg(long, hide = true)]
    notify: bool,
}

impl Mount {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let dir = self.dir.clone().unwrap_or_else(|| context.settings.mount.clone());
        let dir = std::path::absolute(&dir).at("finding", &dir)?;
        if self.notify {
            return Ok(self.serve_notifying(context, &dir));
        }
        if self.foreground {
            return self.serve(context, &dir, || context.out.say(format_args!("mounted at {}", dir.display())));
        }
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
        flags.extend(self.cache.flags());
        let log = start_daemon(context, &dir, &flags)?;
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

    fn serve(&self, context: &Context, dir: &Path, ready: impl FnOnce()) -> Result<ExitCode> {
        sys::few_heaps(1);
        sys::lean_databases();
        let store = context.store()?;
        let index = Arc::new(context.index(&store)?);
        let signals = Signals::new([SIGINT, SIGTERM]).at("waiting for", "signals")?;
        let mut options = Options::at(dir);
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
        let mounted = mount::mount(store, index, &options)?;
        ready();
        match mounted.wait(signals)? {
            Ended::Unmounted => Ok(ExitCode::SUCCESS),
            // Threads may still be serving somebody; the user has said twice that they should not.
            Ended::Abandoned => std::process::exit(i32::from(Kind::Interrupted.exit_code())),
        }
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
        let served_by = if self.lazy { None } else { mount::stats(&dir).ok().map(|stats| stats.pid) };
        mount::umount(&dir, self.lazy)?;
        served_by.into_iter().for_each(wait_for_end);
        context.out.result(&serde_json::json!({ "unmounted": dir.to_string_lossy() }), |w| {
            writeln!(w, "unmounted {}", dir.display())
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
