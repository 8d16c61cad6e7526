//! Mounts served by a process in the background: finding one, and starting one.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::Context;
use crate::error::{Error, IoContext, Kind, Result};
use crate::mount::{self, Alive, MountInfo, alive};
use crate::store::Store;

/// Where all of `store` is mounted: at `preferred`, or else anywhere.
pub(super) fn mount_of(store: &Store, preferred: &Path) -> Result<Option<PathBuf>> {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let of_store = |mount: &MountInfo| real(&mount.store) == real(store.root());
    if mount::find(preferred)?.is_some_and(|mount| of_store(&mount)) {
        match alive(preferred, ANSWERS) {
            Alive::Answers => return Ok(Some(preferred.to_path_buf())),
            Alive::Silent => {
                let what = format!("the mount at {} has not answered for {} s", preferred.display(), ANSWERS.as_secs());
                return Err(Error::new(Kind::TimedOut, what)
                    .hint("its process is stopped, or its store hangs; `envfabric doctor` tells more"));
            }
            Alive::Dead => {}
        }
    }
    let mut others = mount::mounts()?.into_iter().filter(|mount| mount.root == Path::new("/") && of_store(mount));
    // A dead one may seem to exist for as long as the kernel keeps its attributes.
    let usable = |mount: &MountInfo| alive(&mount.mount_point, ANSWERS) == Alive::Answers && mount.mount_point.exists();
    Ok(others.find(usable).map(|mount| mount.mount_point))
}

/// How long a mount may take to answer; another process may just begin to serve it.
pub(super) const ANSWERS: Duration = Duration::from_secs(5);

/// True for what calls into a mount say whose server is gone.
pub(super) fn is_disconnected(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED))
}

/// Starts `envfabric mount DIR` in the background and waits until it answers. Returns the path of its log, or none when
/// another process has meanwhile mounted the same store there.
pub(crate) fn start_daemon(context: &Context, dir: &Path, flags: &[String]) -> Result<Option<PathBuf>> {
    let state = context.settings.state()?;
    std::fs::create_dir_all(state).at("creating", state)?;
    // Of many that find nothing mounted, one mounts.
    let lock = File::create(state.join("mount.lock")).at("opening", state.join("mount.lock"))?;
    lock.lock().at("locking", state.join("mount.lock"))?;
    // What can be told without a process is told here, with nothing started.
    let store = context.store()?;
    if mount_of(&store, dir)?.is_some_and(|at| at == dir) {
        return Ok(None);
    }
    if mount::find(dir)?.is_some() && alive(dir, ANSWERS) == Alive::Dead {
        context.out.say(format_args!("the process that served {} is gone; mounting anew", dir.display()));
        mount::umount(dir, true)?;
    }
    mount::preflight(dir)?;
    let log_path = state.join("mount.log");
    let log = crate::private::append(&log_path).at("opening", &log_path)?;
    let program = std::env::current_exe().at("finding", "this program")?;
    let mut child = Command::new(program)
        .arg("--store")
        .arg(&context.settings.store)
        .args(context.config.iter().flat_map(|config| ["--config".as_ref(), config.as_os_str()]))
        .args((0..context.verbose).map(|_| "-v"))
        .args(context.settings.keys.flags())
        .arg("mount")
        .arg("--notify")
        .args(flags)
        .arg(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .at("starting", "the mount process")?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line).at("hearing from", "the mount process")?;
    }
    let told: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
    if told["ready"] == true {
        return Ok(Some(log_path));
    }
    let _ = child.wait();
    let message = told["error"].as_str().unwrap_or("the mount process ended without a word").to_string();
    let mut error = Error::new(Kind::Failed, message);
    if let Some(detail) = told["detail"].as_str() {
        error = error.detail(detail);
    }
    error = match told["hint"].as_str() {
        Some(hint) => error.hint(hint),
        None => error.hint(format!("its log is {}", log_path.display())),
    };
    Err(error)
}
