//! Running uv: finding it, giving it a clean environment, reading what it tells.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use super::limits::FILE_MAX;
use super::progress::{Progress, parse_line};
use crate::environment::lock::strip_credentials;
use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::Child;

/// Variables that would make uv install elsewhere, for another Python, or otherwise than asked. All that begin with
/// `PYTHON` go too. The rest of the caller's environment is passed on: proxies, certificates, `UV_*` and credentials.
const REMOVED: [&str; 30] = [
    "CLICOLOR_FORCE",
    "CONDA_DEFAULT_ENV",
    "CONDA_PREFIX",
    "FORCE_COLOR",
    "UV_BREAK_SYSTEM_PACKAGES",
    "UV_COMPILE_BYTECODE",
    "UV_INSECURE_NO_ZIP_VALIDATION",
    "UV_ISOLATED",
    "UV_LINK_MODE",
    "UV_NO_INSTALLER_METADATA",
    "UV_NO_PROGRESS",
    "UV_NO_VERIFY_HASHES",
    "UV_OUTPUT_FORMAT",
    "UV_PREFIX",
    "UV_PREVIEW",
    "UV_PROJECT",
    "UV_PROJECT_ENVIRONMENT",
    "UV_PYTHON",
    "UV_PYTHON_PLATFORM",
    "UV_PYTHON_VERSION",
    "UV_QUIET",
    "UV_SKIP_WHEEL_FILENAME_CHECK",
    "UV_SYSTEM_PYTHON",
    "UV_TARGET",
    "UV_VENV_CLEAR",
    "UV_VENV_RELOCATABLE",
    "UV_VENV_SEED",
    "UV_WORKING_DIR",
    "UV_WORKING_DIRECTORY",
    "VIRTUAL_ENV",
];

/// Further variables that are removed where no configuration is to be read: `UV_CONFIG_FILE` counts in spite of
/// `--no-config`, and `UV_NO_BINARY` would put something else into the layer of a wheel.
const REMOVED_SEALED: [&str; 4] = ["UV_CONFIG_FILE", "UV_NO_BINARY", "UV_NO_BINARY_PACKAGE", "UV_NO_CONFIG"];

/// One run of uv.
#[derive(Debug, Default)]
pub(super) struct Call<'a> {
    pub(super) args: Vec<OsString>,
    /// What it reads from its stdin.
    pub(super) input: Option<&'a str>,
    /// Settings with credentials in them: other users can read a command line, but not an environment.
    pub(super) variables: &'a [(&'static str, String)],
    /// Reads no configuration file: not of the working directory, the user or the system.
    pub(super) sealed: bool,
}

/// Where Linux distributions keep the certificates that TLS clients trust.
const BUNDLES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem"];

/// The uv program. Nothing is started before it is needed.
#[derive(Debug)]
pub struct Uv {
    asked: Option<PathBuf>,
    found: OnceLock<PathBuf>,
    version: OnceLock<String>,
}

impl Uv {
    /// uv at `path`, or wherever it is found: `ENVFABRIC_UV`, `PATH`, `~/.local/bin`,
    /// `~/.local/share/envfabric/tools/bin`, `~/.cargo/bin`.
    pub fn new(path: Option<PathBuf>) -> Uv {
        Uv { asked: path, found: OnceLock::new(), version: OnceLock::new() }
    }

    /// Where it is.
    ///
    /// # Errors
    /// [`Kind::NotFound`], with how to get it.
    pub fn path(&self) -> Result<&Path> {
        if let Some(path) = self.found.get() {
            return Ok(path);
        }
        let asked =
            self.asked.clone().or_else(|| env::var_os("ENVFABRIC_UV").filter(|v| !v.is_empty()).map(Into::into));
        let path = match asked {
            Some(path) => {
                let path = std::path::absolute(&path).at("finding", &path)?;
                if !path.is_file() {
                    return Err(Error::new(Kind::NotFound, format!("there is no uv at {}", path.display()))
                        .hint("name the uv program with ENVFABRIC_UV, or unset it and put uv on PATH"));
                }
                path
            }
            None => find().ok_or_else(|| {
                Error::new(Kind::NotFound, "uv was not found on PATH or in ~/.local/bin")
                    .hint("install it (https://docs.astral.sh/uv/), or name it with ENVFABRIC_UV")
            })?,
        };
        Ok(self.found.get_or_init(|| path))
    }

    /// Its version, `0.13.8`; asked once.
    pub fn version(&self) -> Result<&str> {
        if let Some(version) = self.version.get() {
            return Ok(version);
        }
        let out = self.run(["--version"], &super::Silent)?;
        let version = out.split_whitespace().nth(1).unwrap_or("unknown").to_string();
        Ok(self.version.get_or_init(|| version))
    }

    /// The version, where uv was started before.
    pub fn version_if_used(&self) -> Option<String> {
        self.found.get()?;
        self.version().ok().map(str::to_string)
    }

    /// Runs uv in the caller's working directory and returns its stdout; what it tells goes to `progress`.
    ///
    /// # Errors
    /// [`Kind::Failed`] with uv's own words as detail; [`Kind::Interrupted`] when a signal ended it.
    pub fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>, progress: &dyn Progress) -> Result<String> {
        let args = args.into_iter().map(|a| a.as_ref().to_os_string()).collect();
        self.call(Call { args, ..Call::default() }, progress)
    }

    /// [`Uv::run`] with everything that can be told.
    pub(super) fn call(&self, call: Call<'_>, progress: &dyn Progress) -> Result<String> {
        let path = self.path()?;
        let Call { args, input, variables, sealed } = call;
        let verb: Vec<_> = args.iter().take_while(|a| !a.as_encoded_bytes().starts_with(b"-")).take(2).collect();
        let what = verb.iter().fold("uv".to_string(), |text, word| text + " " + &word.to_string_lossy());
        let mut command = Command::new(path);
        command.args(&args).args(["--color", "never"]);
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        clean_environment(&mut command);
        command.envs(variables.iter().map(|(name, value)| (*name, value)));
        if sealed {
            command.arg("--no-config");
            REMOVED_SEALED.iter().for_each(|name| {
                command.env_remove(name);
            });
        }
        Child { file_size_max: Some(FILE_MAX), ..Child::default() }.prepare(&mut command).at("preparing", path)?;
        tracing::debug!(command = %strip_credentials(&format!("{args:?}")), "starting uv");
        let mut child = command.spawn().at("starting", path)?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (out, words) = std::thread::scope(|scope| {
            let feeder =
                stdin.zip(input).map(|(mut stdin, input)| scope.spawn(move || stdin.write_all(input.as_bytes())));
            let reader = scope.spawn(move || {
                let mut text = Vec::new();
                stdout.map(|mut s| s.read_to_end(&mut text));
                text
            });
            let mut words = String::new();
            for line in stderr.into_iter().flat_map(|s| BufReader::new(s).split(b'\n')).map_while(|l| l.ok()) {
                let line = String::from_utf8_lossy(&line);
                match parse_line(&line) {
                    Some(event) => progress.event(&event),
                    None => {
                        words.push_str(line.trim_end());
                        words.push('\n');
                    }
                }
            }
            drop(feeder);
            (reader.join().unwrap_or_default(), words)
        });
        let status = child.wait().at("waiting for", path)?;
        if status.success() {
            return Ok(String::from_utf8_lossy(&out).into_owned());
        }
        use std::os::unix::process::ExitStatusExt;
        let error = match status.signal() {
            Some(libc::SIGINT | libc::SIGTERM) => Error::new(Kind::Interrupted, format!("{what} was interrupted")),
            Some(libc::SIGXFSZ) => {
                Error::new(Kind::Invalid, format!("{what} wrote a file larger than {FILE_MAX} bytes"))
            }
            Some(signal) => Error::new(Kind::Failed, format!("{what} was ended by signal {signal}")),
            None => Error::new(Kind::Failed, format!("{what} failed")),
        };
        Err(error.detail(own_words(&words)))
    }
}

/// What uv printed, without lines that the user can do nothing with.
fn own_words(words: &str) -> String {
    let kept: Vec<&str> = words
        .lines()
        .filter(|line| !line.starts_with("Using Python ") && !line.contains("is experimental and may change"))
        .collect();
    strip_credentials(kept.join("\n").trim())
}

/// Removes what would lead uv or a Python astray, and adds certificates where the caller has none.
pub(super) fn clean_environment(command: &mut Command) {
    for (name, _) in env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"PYTHON") {
            command.env_remove(name);
        }
    }
    for name in REMOVED {
        command.env_remove(name);
    }
    if env::var_os("SSL_CERT_FILE").is_none()
        && env::var_os("SSL_CERT_DIR").is_none()
        && let Some(bundle) = BUNDLES.iter().find(|b| Path::new(b).is_file())
    {
        command.env("SSL_CERT_FILE", bundle);
    }
}

fn find() -> Option<PathBuf> {
    let home = env::var_os("HOME").map(PathBuf::from);
    let own = ["local/bin", "local/share/envfabric/tools/bin"].map(|d| format!(".{d}"));
    let own = own.into_iter().chain([".cargo/bin".to_string()]).filter_map(|dir| home.as_ref().map(|h| h.join(dir)));
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).filter(|d| d.is_absolute()).chain(own).map(|dir| dir.join("uv"));
    found.into_iter().find(|file| nix::unistd::access(file, nix::unistd::AccessFlags::X_OK).is_ok() && file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_cut_from_what_uv_says_and_credentials_never_show() {
        let words = "warning: The `--pylock` option is experimental and may change without warning.\n\
                     Using Python 3.11.7 environment at: V\nerror: x\n  cause: https://u:p@h/y\n";
        assert_eq!(own_words(words), "error: x\n  cause: https://h/y");
    }
}
