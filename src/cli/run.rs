//! `envfabric run` and `envfabric shell`

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use super::Context;
use super::mount::start_daemon;
use super::spec::{EnvSpec, spec};
use crate::error::{Error, IoContext, Kind, Result};
use crate::mount;

/// Run a command in an environment
///
/// The command sees the version that is current when it starts, and keeps it. Mounts the store if it is not mounted.
#[derive(Debug, clap::Args)]
pub(crate) struct Run {
    /// WORKFLOW/NODE[@VERSION]
    #[arg(value_name = "WF/NODE", value_parser = spec)]
    environment: EnvSpec,
    /// The command and its arguments
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<OsString>,
}

/// Start a shell in an environment
#[derive(Debug, clap::Args)]
pub(crate) struct Shell {
    /// WORKFLOW/NODE[@VERSION]
    #[arg(value_name = "WF/NODE", value_parser = spec)]
    environment: EnvSpec,
}

impl Run {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let venv = pinned_venv(context, &self.environment)?;
        let Some((program, arguments)) = self.command.split_first() else { return Ok(ExitCode::SUCCESS) };
        let mut command = inside(&venv, Command::new(program));
        let error = command.args(arguments).exec();
        let code = if error.kind() == ErrorKind::NotFound { 127 } else { 126 };
        let error =
            Error::new(Kind::Failed, format!("{} cannot be run in {}", program.display(), self.environment.name))
                .hint(format!("programs of the environment are in {}", venv.join("bin").display()))
                .with_source(error);
        context.out.error(&error);
        Ok(ExitCode::from(code))
    }
}

impl Shell {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let venv = pinned_venv(context, &self.environment)?;
        let shell = std::env::var_os("SHELL").map(PathBuf::from).unwrap_or_else(|| "/bin/sh".into());
        let mut command = inside(&venv, Command::new(&shell));
        command.env("VIRTUAL_ENV_PROMPT", self.environment.name.to_string());
        if shell.file_name().is_some_and(|name| name == "bash") {
            // The user's own start-up file may set PATH anew, so the environment is activated behind it.
            let rc = context.settings.state.join("bashrc");
            std::fs::create_dir_all(&context.settings.state).at("creating", &context.settings.state)?;
            std::fs::write(&rc, BASHRC).at("writing", &rc)?;
            command.arg("--rcfile").arg(rc);
        }
        context.out.say(format_args!("{} in {}; leave with `exit`", shell.display(), self.environment.name));
        Err(Error::io("starting", &shell, command.exec()))
    }
}

const BASHRC: &str = "\
# Written by `envfabric shell`.
[ -f ~/.bashrc ] && . ~/.bashrc
. \"$VIRTUAL_ENV/bin/activate\"
[ -n \"${VIRTUAL_ENV_PROMPT-}\" ] && [ -n \"${PS1-}\" ] && PS1=\"($VIRTUAL_ENV_PROMPT) ${_OLD_VIRTUAL_PS1-}\"
";

/// `command` with the environment's programs first on PATH, as `activate` would have it.
fn inside(venv: &std::path::Path, mut command: Command) -> Command {
    let mut path = vec![venv.join("bin")];
    if let Some(old) = std::env::var_os("PATH") {
        path.extend(std::env::split_paths(&old));
    }
    if let Ok(path) = std::env::join_paths(path) {
        command.env("PATH", path);
    }
    command.env("VIRTUAL_ENV", venv).env_remove("PYTHONHOME");
    command
}

/// The `.venv` of the version that is meant, by its pinned path, in a mount of this store.
fn pinned_venv(context: &Context, environment: &EnvSpec) -> Result<PathBuf> {
    let store = context.store_or_default()?;
    let version = environment.resolve(&store)?;
    let mounts = mount::mounts()?;
    let mount = &context.settings.mount;
    let here = |at: &std::path::Path| mounts.iter().any(|m| m.mount_point == at && m.store == store.root());
    let at = if here(mount) {
        mount.clone()
    } else if let Some(other) = mounts.iter().find(|m| m.store == store.root() && m.mount_point.exists()) {
        other.mount_point.clone()
    } else {
        start_daemon(context, mount, &[])?;
        context.out.say(format_args!("mounted at {}", mount.display()));
        mount.clone()
    };
    let name = &version.environment;
    let dir = at.join(name.workflow()).join(name.node()).join(format!(".versions/{}/.venv", version.number));
    // A name that has just been published is seen within a second.
    let start = Instant::now();
    loop {
        match std::fs::metadata(&dir) {
            Ok(_) => return Ok(dir),
            Err(error) if error.kind() == ErrorKind::NotFound && start.elapsed() < Duration::from_secs(5) => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(error) => {
                return Err(Error::io("looking at", &dir, error)
                    .hint(format!("is the mount well? `envfabric umount {0}; envfabric mount {0}`", at.display())));
            }
        }
    }
}
