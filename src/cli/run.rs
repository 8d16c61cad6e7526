//! `envfabric run` and `envfabric shell`

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use super::Context;
use super::daemon::{is_disconnected, mount_of, start_daemon};
use super::spec::{EnvSpec, spec};
use crate::environment::Version;
use crate::error::{Error, IoContext, Kind, Result};
use crate::store::Store;

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
        let mut command = inside(&venv, Command::new(program))?;
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
        let shell = std::env::var_os("SHELL").filter(|s| !s.is_empty());
        let shell = shell.map(PathBuf::from).unwrap_or_else(|| "/bin/sh".into());
        let mut command = inside(&venv, Command::new(&shell))?;
        command.env("ENVFABRIC_VENV", &venv).env("ENVFABRIC_NAME", self.environment.name.to_string());
        if shell.file_name().is_some_and(|name| name == "bash") {
            // The user's own start-up file may set PATH anew, so the environment is activated behind it.
            match start_up_file(context) {
                Ok(rc) => drop(command.arg("--rcfile").arg(rc)),
                Err(error) => tracing::warn!(error = error.chain(), "the prompt is left as it is"),
            }
        }
        context.out.say(format_args!("{} in {}; leave with `exit`", shell.display(), self.environment.name));
        Err(Error::io("starting", &shell, command.exec()))
    }
}

const BASHRC: &str = "\
# Written by `envfabric shell`.
[ -f ~/.bashrc ] && . ~/.bashrc
. \"$ENVFABRIC_VENV/bin/activate\"
[ -n \"${PS1-}\" ] && PS1=\"($ENVFABRIC_NAME) ${_OLD_VIRTUAL_PS1-}\"
";

/// The file that bash reads first; written whole, as another shell may be starting.
fn start_up_file(context: &Context) -> Result<PathBuf> {
    let state = context.settings.state()?;
    std::fs::create_dir_all(state).at("creating", state)?;
    let rc = state.join("bashrc");
    let mut file = tempfile::NamedTempFile::new_in(state).at("creating a file in", state)?;
    std::io::Write::write_all(&mut file, BASHRC.as_bytes()).at("writing", &rc)?;
    file.persist(&rc).map_err(|error| error.error).at("writing", &rc)?;
    Ok(rc)
}

/// `command` with the environment's programs first on PATH, as `activate` would have it.
pub(super) fn inside(venv: &Path, mut command: Command) -> Result<Command> {
    let mut path = vec![venv.join("bin")];
    if let Some(old) = std::env::var_os("PATH") {
        path.extend(std::env::split_paths(&old));
    }
    let path = std::env::join_paths(path).map_err(|source| {
        Error::new(Kind::Invalid, format!("{} cannot stand in PATH", venv.display()))
            .hint("mount at a directory without a colon in its path")
            .with_source(source)
    })?;
    command.env("PATH", path).env("VIRTUAL_ENV", venv).env_remove("PYTHONHOME");
    Ok(command)
}

/// Fails when the mount shows another version of that number: the store was replaced under it.
fn same_version(venv: &Path, version: &Version) -> Result<()> {
    let path = venv.with_file_name("metadata.json");
    let shown: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).at("reading", &path)?).unwrap_or_default();
    if shown["nonce"] == version.nonce.as_str() {
        return Ok(());
    }
    Err(Error::new(Kind::Failed, format!("{} is of another store than {}", venv.display(), version.environment))
        .hint("the store was replaced under the mount: unmount it and mount again"))
}

/// The `.venv` of the version that is meant, by its pinned path, in a mount of this store.
pub(super) fn pinned_venv(context: &Context, environment: &EnvSpec) -> Result<PathBuf> {
    let store = context.store()?;
    let version = environment.resolve(&store)?;
    let name = &version.environment;
    let below = Path::new(name.workflow()).join(name.node()).join(format!(".versions/{}/.venv", version.number));
    let start = Instant::now();
    loop {
        let at = mounted(context, &store)?;
        let dir = at.join(&below);
        let error = match std::fs::metadata(&dir) {
            Ok(_) => return same_version(&dir, &version).map(|()| dir),
            Err(error) => error,
        };
        // A name that has just been published is seen within a second; a mount whose server is being killed is seen
        // to be dead in the next round.
        let passes = error.kind() == ErrorKind::NotFound || is_disconnected(&error);
        if !passes || start.elapsed() > Duration::from_secs(5) {
            return Err(Error::io("looking at", &dir, error)
                .hint(format!("is the mount well? `envfabric umount {0}; envfabric mount {0}`", at.display())));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Where the store is mounted; mounts it where it is not.
fn mounted(context: &Context, store: &Store) -> Result<PathBuf> {
    let mount = &context.settings.mount;
    if let Some(at) = mount_of(store, mount)? {
        super::signing::believes_no_others(&at, store)?;
        return Ok(at);
    }
    if start_daemon(context, mount, &[])?.is_some() {
        context.out.say(format_args!("mounted at {}", mount.display()));
    }
    Ok(mount.clone())
}
