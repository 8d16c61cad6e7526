//! What is checked of a version before it is published.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use serde::Deserialize;
use uv_normalize::PackageName;
use uv_pep440::{Version as PythonVersion, VersionSpecifiers};
use uv_pep508::{Requirement, VerbatimUrl, VersionOrUrl};

use super::uv::clean_environment;
use crate::environment::lock::{Marker, marker_environment};
use crate::environment::{Digest, Interpreter, Version};
use crate::error::{Error, IoContext, Kind, Result};
use crate::store::LayerDoc;
use crate::sys::Child;

/// What `uv pip check` would say of `layers` on `python`, without starting it: one sentence per problem, in uv's words.
pub(super) fn check_requirements(layers: &[Arc<LayerDoc>], python: &Interpreter) -> Result<Vec<String>> {
    let environment = marker_environment(&python.markers)?;
    let python_version = PythonVersion::from_str(&python.version).ok();
    let installed: BTreeMap<&str, &str> =
        layers.iter().map(|layer| (layer.meta.name.as_str(), layer.meta.version.as_str())).collect();
    let mut problems = Vec::new();
    for layer in layers {
        let name = &layer.meta.name;
        if let (Some(text), Some(version)) = (&layer.meta.requires_python, &python_version)
            && VersionSpecifiers::from_str(text).is_ok_and(|wanted| !wanted.contains(version))
        {
            problems.push(format!("The package `{name}` requires Python {text}, but `{version}` is installed"));
        }
        for text in &layer.meta.requires {
            // What no tool can read cannot be checked; uv installed it all the same.
            let Some((requirement, marker)) = requirement(text) else { continue };
            if marker.is_some_and(|marker| !marker.holds(&|comparison| comparison.evaluate(&environment, &[]))) {
                continue;
            }
            let specifiers = match &requirement.version_or_url {
                Some(VersionOrUrl::VersionSpecifier(specifiers)) => specifiers.clone(),
                _ => VersionSpecifiers::empty(),
            };
            let listed: Vec<String> = specifiers.iter().map(ToString::to_string).collect();
            let wanted = format!("{}{}", requirement.name, listed.join(","));
            match installed.get(requirement.name.as_str()) {
                None => problems.push(format!("The package `{name}` requires `{wanted}`, but it's not installed")),
                Some(there) => {
                    if PythonVersion::from_str(there).is_ok_and(|version| !specifiers.contains(&version)) {
                        problems.push(format!("The package `{name}` requires `{wanted}`, but `{there}` is installed"));
                    }
                }
            }
        }
    }
    problems.sort();
    problems.dedup();
    Ok(problems)
}

/// What a `Requires-Dist` says, and when it is wanted, if that can be read.
pub(crate) fn requirement(text: &str) -> Option<(Requirement<VerbatimUrl>, Option<Marker>)> {
    // In an address a semicolon may stand for itself, unless there is a space before it.
    let address = text.find('@').is_some_and(|sign| text.find(';').is_none_or(|end| sign < end));
    let (what, marker) = match text.split_once(if address { " ;" } else { ";" }) {
        Some((what, marker)) => (what, Some(Marker::parse(marker).ok()?)),
        None => (text, None),
    };
    // uv's parser panics at other characters, and at extras that end otherwise than in a letter or digit.
    let is_in_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let extras = what.split_once('[').and_then(|(_, behind)| behind.split(']').next()).unwrap_or_default();
    let ends_well = |extra: &str| {
        let end = extra.trim_start().split(|c| !is_in_name(c)).next().unwrap_or_default();
        end.is_empty() || end.ends_with(|c: char| c.is_ascii_alphanumeric())
    };
    let readable = what.is_ascii() && extras.split(',').all(ends_well);
    Some((readable.then(|| Requirement::from_str(what).ok()).flatten()?, marker))
}

/// Runs in the environment and tells, as JSON, where it is and what it finds.
const TRIAL: &str = "\
import json, os, sys
from importlib.metadata import distributions
found = [(d.metadata['Name'], d.version) for d in distributions()]
print(json.dumps({'prefix': os.path.realpath(sys.prefix), 'base_prefix': os.path.realpath(sys.base_prefix), 'found': found}))
";

/// How long the interpreter of a view may take to start; a view on a cold NAS takes seconds.
const TRIAL_TIME: Duration = Duration::from_secs(120);

/// Starts the interpreter of a version shown at `version_dir` (the directory with `.venv` in it), and fails unless it
/// runs from the view and finds every distribution of `layers`.
///
/// # Errors
/// [`Kind::Failed`], with what Python printed as detail; also when it takes longer than two minutes.
pub fn run_trial(version_dir: &Path, layers: &[Arc<LayerDoc>]) -> Result<()> {
    let output = start_trial(version_dir, TRIAL_TIME)?;
    judge_trial(version_dir, layers, &output)
}

/// Runs the trial for at most `limit`. What runs at its start may be anything: whatever it leaves behind, this returns.
fn start_trial(version_dir: &Path, limit: Duration) -> Result<Output> {
    let python = version_dir.join(".venv/bin/python");
    let mut command = Command::new(&python);
    command.args(["-I", "-B", "-c", TRIAL]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    clean_environment(&mut command);
    command.env_remove("LD_LIBRARY_PATH").env_remove("LD_PRELOAD").process_group(0);
    Child::default().prepare(&mut command).at("preparing", &python)?;
    let mut child = command.spawn().at("starting", &python)?;
    let group = nix::unistd::Pid::from_raw(child.id() as i32);
    let (stdout, stderr) = (child.stdout.take().map(collect), child.stderr.take().map(collect));
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait().at("waiting for", &python)? {
            break Some(status);
        }
        if Instant::now() >= deadline {
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    // Processes that it started go with it; they may hold its pipes open.
    let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
    let said = |pipe: Option<Receiver<Vec<u8>>>| {
        pipe.and_then(|pipe| pipe.recv_timeout(Duration::from_secs(1)).ok()).unwrap_or_default()
    };
    let (stdout, stderr) = (said(stdout), said(stderr));
    match status {
        Some(status) => Ok(Output { status, stdout, stderr }),
        None => {
            let _ = child.wait();
            let message = format!("the interpreter did not start from the view within {} seconds", limit.as_secs());
            Err(Error::new(Kind::Failed, message)
                .detail(String::from_utf8_lossy(&stderr).trim().to_string())
                .hint("something of a package runs at every start (a .pth file, sitecustomize) and does not end"))
        }
    }
}

/// Reads `pipe` to its end in a thread of its own; keeps at most 16 MiB.
fn collect(mut pipe: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.by_ref().take(16 << 20).read_to_end(&mut bytes);
        let _ = std::io::copy(&mut pipe, &mut std::io::sink());
        sender.send(bytes)
    });
    receiver
}

/// Judges what the trial printed.
fn judge_trial(version_dir: &Path, layers: &[Arc<LayerDoc>], output: &Output) -> Result<()> {
    let words = String::from_utf8_lossy(&output.stderr).trim().to_string();
    let fail = |message: String| {
        Err(Error::new(Kind::Failed, message)
            .detail(words.clone())
            .hint("the current version stays as it is; --no-validate publishes without this check"))
    };
    if !output.status.success() {
        return fail(format!("the interpreter does not start from the view ({})", output.status));
    }
    #[derive(Deserialize)]
    struct Answer {
        prefix: String,
        base_prefix: String,
        found: Vec<(Option<String>, Option<String>)>,
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let Ok(answer) = serde_json::from_str::<Answer>(text.lines().last().unwrap_or_default()) else {
        return fail("the interpreter started from the view does not answer".into());
    };
    let real = version_dir.canonicalize().unwrap_or_else(|_| version_dir.to_path_buf());
    for (what, path, expected) in
        [("prefix", &answer.prefix, real.join(".venv")), ("base_prefix", &answer.base_prefix, real.join(".python"))]
    {
        if Path::new(path) != expected {
            return fail(format!("sys.{what} of the view is {path}, where {} was expected", expected.display()));
        }
    }
    let mut found = BTreeMap::new();
    for (name, version) in answer.found {
        if let (Some(name), Some(version)) = (name, version) {
            let name = PackageName::from_str(&name).map_or(name, |n| n.as_str().to_string());
            found.insert(name, version);
        }
    }
    for layer in layers {
        let (name, version) = (&layer.meta.name, &layer.meta.version);
        match found.get(name) {
            Some(there) if there == version => {}
            Some(there) => return fail(format!("the view shows {name} {there}, where {version} was expected")),
            None => return fail(format!("the view does not show {name} {version} to importlib.metadata")),
        }
    }
    Ok(())
}

/// Name of the note that a version like this has started here before: the same interpreter, scaffold and layers, in the
/// same order, so that what was seen of its view is what this one shows.
pub(super) fn proof_note(version: &Version) -> String {
    let mut text = format!("{} {}", version.interpreter.layer, version.scaffold);
    for layer in &version.layers {
        text.push_str(&format!(" {layer}"));
    }
    format!("started {}", Digest::of(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{LayerKind, LayerMeta};

    fn layer(name: &str, version: &str, requires: &[&str], python: Option<&str>) -> Arc<LayerDoc> {
        let meta = LayerMeta {
            kind: LayerKind::Wheel,
            name: name.into(),
            version: version.into(),
            abi: String::new(),
            requires: requires.iter().map(|r| r.to_string()).collect(),
            requires_python: python.map(str::to_string),
            startup_files: vec![],
            uncompiled: BTreeMap::new(),
            bytecode: true,
        };
        let digest = Digest::of(name.as_bytes());
        Arc::new(LayerDoc::bare(digest, meta))
    }

    #[test]
    fn a_start_that_does_not_end_is_ended_with_everything_it_started() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let python = dir.path().join(".venv/bin/python");
        std::fs::create_dir_all(python.parent().unwrap()).unwrap();
        let write = |script: &str| {
            std::fs::write(&python, script).unwrap();
            std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
        };
        write("#!/bin/sh\necho loop >&2\nsleep 60 &\nwait\n");
        let start = Instant::now();
        let error = start_trial(dir.path(), Duration::from_millis(300)).unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        assert_eq!((error.kind(), error.detail_text()), (Kind::Failed, Some("loop")), "{error:?}");
        // One that ends, but leaves a process that holds its pipes.
        write("#!/bin/sh\nsleep 60 &\necho '{}'\n");
        let start = Instant::now();
        assert!(run_trial(dir.path(), &[]).is_err());
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    }

    #[test]
    fn problems_are_told_in_the_words_of_uv() {
        let python = crate::environment::cpython311();
        let layers = [
            layer(
                "requests",
                "2.31.0",
                &["idna<4,>=2.5", "urllib3<3,>=1.21.1", "PySocks>=1 ; extra == 'socks'", "???"],
                None,
            ),
            layer("urllib3", "1.20", &["win ; sys_platform == 'win32'"], Some(">=3.12")),
        ];
        let problems = check_requirements(&layers, &python).unwrap();
        assert_eq!(
            problems,
            [
                "The package `requests` requires `idna>=2.5,<4`, but it's not installed",
                "The package `requests` requires `urllib3>=1.21.1,<3`, but `1.20` is installed",
                "The package `urllib3` requires Python >=3.12, but `3.11.7` is installed",
            ]
        );
    }
}
