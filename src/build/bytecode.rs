//! Bytecode that is the same on every builder.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::progress::{Event, Progress};
use super::uv::clean_environment;
use crate::environment::Interpreter;
use crate::error::{Error, IoContext, Kind, Result};
use crate::store::FILE_MTIME;
use crate::sys::Child;

const DRIVER: &str = include_str!("compile_driver.py");

/// One file to compile.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Job {
    /// The source.
    pub(super) src: PathBuf,
    /// Directory that the bytecode is written to.
    pub(super) out: PathBuf,
    /// Source name without `.py`.
    pub(super) stem: String,
    /// The path that tracebacks would show if CPython did not correct it at import; the same for everybody.
    pub(super) name: String,
    pub(super) mtime: i64,
    /// Files of one wheel have one number: what is compiled together must be the same whatever else is installed.
    pub(super) group: usize,
}

impl Job {
    /// `name` is the canonical path. None when a path is not UTF-8 or the file is no Python source.
    pub(super) fn new(src: PathBuf, out: PathBuf, name: String) -> Option<Job> {
        let stem = src.file_name()?.to_str()?.strip_suffix(".py")?.to_string();
        let utf8 = src.to_str().is_some() && out.to_str().is_some() && !stem.is_empty();
        utf8.then_some(Job { src, out, stem, name, mtime: FILE_MTIME, group: 0 })
    }
}

/// Compiles `jobs` with the Python at `executable`; returns what did not compile, by canonical path, with the reason.
pub(super) fn compile(
    executable: &Path,
    python: &Interpreter,
    jobs: &[Job],
    scratch: &Path,
    progress: &dyn Progress,
) -> Result<BTreeMap<String, String>> {
    if jobs.is_empty() {
        return Ok(BTreeMap::new());
    }
    let driver = scratch.join("compile_driver.py");
    fs::write(&driver, DRIVER).at("writing", &driver)?;
    let parallel = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut command = Command::new(executable);
    let old = matches!(python.minor(), "3.9" | "3.10");
    // A fresh child costs some 600 page faults a file when it compiles one, 130 when it compiles 16, and 75 when 64. What
    // is compiled together is always the same, so its bytecode is, too; only old Pythons need a child for each file.
    let together = if old { 1 } else { 64 };
    command.args(["-I", "-S", "-B"]).arg(&driver).args([parallel, together].map(|n| n.to_string()));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    clean_environment(&mut command);
    Child { fixed_addresses: old, ..Child::default() }.prepare(&mut command).at("preparing", executable)?;
    let mut child = command.spawn().at("starting", executable)?;
    let mut input = String::new();
    for job in jobs {
        input.push_str(&serde_json::to_string(job).map_err(|e| failed("a job cannot be written").with_source(e))?);
        input.push('\n');
    }
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Answer {
        Chunk { ok: usize, failed: Vec<(String, String)> },
        Done { done: bool },
    }
    let mut uncompiled = BTreeMap::new();
    let mut complete = false;
    let words = std::thread::scope(|scope| {
        scope.spawn(move || stdin.map(|mut s| s.write_all(input.as_bytes())));
        let words = scope.spawn(move || {
            let mut text = String::new();
            stderr.map(|mut s| s.read_to_string(&mut text));
            text
        });
        let mut done = 0;
        for line in stdout.into_iter().flat_map(|s| BufReader::new(s).lines()).map_while(|l| l.ok()) {
            match serde_json::from_str::<Answer>(&line) {
                Ok(Answer::Chunk { ok, failed }) => {
                    done += ok + failed.len();
                    uncompiled.extend(failed);
                    progress.event(&Event::Compiled { done, total: jobs.len() });
                }
                Ok(Answer::Done { done }) => complete = done,
                Err(_) => {}
            }
        }
        words.join().unwrap_or_default()
    });
    let status = child.wait().at("waiting for", executable)?;
    if !status.success() || !complete {
        return Err(failed("compiling bytecode failed")
            .detail(words)
            .hint(format!("see that {} works, or build with --no-bytecode", executable.display())));
    }
    Ok(uncompiled)
}

fn failed(message: &str) -> Error {
    Error::new(Kind::Failed, message)
}
