//! Asking a Python what it is.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

use super::uv::clean_environment;
use crate::environment::Markers;
use crate::error::{Error, IoContext, Kind, Result};
use crate::sys::Child;

const PROBE: &str = include_str!("probe.py");

/// What every interpreter is asked.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Brief {
    pub(super) implementation: String,
    pub(super) version: String,
    pub(super) prefix: PathBuf,
    pub(super) base_prefix: PathBuf,
    pub(super) base_executable: PathBuf,
    pub(super) soabi: Option<String>,
    pub(super) sys_platform: String,
}

/// What one is asked that is to be ingested.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Full {
    #[serde(flatten)]
    pub(super) brief: Brief,
    pub(super) executable: PathBuf,
    pub(super) magic: String,
    pub(super) platlibdir: String,
    pub(super) stdlib: PathBuf,
    pub(super) include: PathBuf,
    pub(super) multiarch: Option<String>,
    pub(super) wheel_pkg_dir: Option<PathBuf>,
    pub(super) libdir: Option<PathBuf>,
    pub(super) soname: Option<String>,
    pub(super) sysconfigdata: String,
    pub(super) libc: (String, String),
    pub(super) markers: Markers,
    /// Modules that do not import.
    pub(super) failed: BTreeMap<String, String>,
    /// Files mapped after every extension module was imported.
    pub(super) mapped: Vec<PathBuf>,
}

impl Brief {
    /// Fails, with the reason, for what cannot be used.
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        let refuse = |why: String| {
            Err(Error::new(Kind::Unsupported, format!("{} cannot be used: {why}", path.display()))
                .hint("name a CPython 3.9 or later with --python; `uv python install 3.12` gets one"))
        };
        if self.implementation != "cpython" {
            return refuse(format!("it is {}, and only CPython is supported", self.implementation));
        }
        if self.sys_platform != "linux" {
            return refuse(format!("it is for {}", self.sys_platform));
        }
        let mut numbers = self.version.split('.').map(|n| n.parse::<u32>().unwrap_or(0));
        if (numbers.next(), numbers.next()) < (Some(3), Some(9)) {
            return refuse(format!("it is Python {}, and 3.9 is the oldest supported", self.version));
        }
        if self.soabi.is_none() {
            return refuse("it does not tell its ABI (SOABI)".into());
        }
        Ok(())
    }
}

/// Asks the Python at `path` briefly; no module but the standard library's smallest is imported.
pub(super) fn brief(path: &Path) -> Result<Brief> {
    let out = run(path, "-c", PROBE.as_ref(), "brief", &[])?;
    parse(path, &out)
}

/// Asks everything. `script` is a file that the probe is written to; paths in `hide` are hidden from the interpreter.
pub(super) fn full(path: &Path, script: &Path, hide: &[PathBuf]) -> Result<Full> {
    fs::write(script, PROBE).at("writing", script)?;
    let out = run(path, "-B", script.as_os_str(), "full", hide)?;
    parse(path, &out)
}

fn parse<T: for<'de> Deserialize<'de>>(path: &Path, out: &str) -> Result<T> {
    // Modules may print on import; the answer is the last line.
    serde_json::from_str(out.lines().last().unwrap_or_default()).map_err(|source| {
        let message = format!("{} does not answer as a Python would", path.display());
        Error::new(Kind::Invalid, message).hint("name another with --python").with_source(source)
    })
}

fn run(path: &Path, flag: &str, script: &std::ffi::OsStr, mode: &str, hide: &[PathBuf]) -> Result<String> {
    let mut command = Command::new(path);
    command.arg("-I").arg(flag).arg(script).arg(mode);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    clean_environment(&mut command);
    command.env_remove("LD_LIBRARY_PATH").env_remove("LD_PRELOAD");
    Child { hide: hide.to_vec(), ..Child::default() }.prepare(&mut command).at("preparing", path)?;
    let output = command.output().at("starting", path)?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr).trim().to_string();
        return Err(Error::new(Kind::Failed, format!("{} does not work as a Python", path.display())).detail(words));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
