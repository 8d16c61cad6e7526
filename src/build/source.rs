//! From what the user names to a lock: uv resolves, we keep what it decided.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::progress::{Event, Step};
use super::settings;
use super::uv::Call;
use super::{Context, IndexOptions, Input, Request, requirements};
use crate::environment::Source;
use crate::environment::lock::{Choice, Lock, strip_credentials, strip_document};
use crate::error::{Error, IoContext, Kind, Result};

/// A source that was read, but not resolved yet.
pub(super) struct Opened {
    kind: Opening,
    /// Which Pythons it is for, where it says so.
    pub(super) requires_python: Option<String>,
    /// What it asks for as `.python-version`.
    pub(super) python: Option<String>,
}

/// What has to be known of a `pylock.toml` before an interpreter is chosen.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Pylock {
    pub(super) requires_python: Option<String>,
}

enum Opening {
    Requirements,
    Project { dir: PathBuf, pyproject: String, lock: String },
    Pylock { path: PathBuf, text: String },
    UvLock { path: PathBuf, text: String, pyproject: Option<String> },
}

/// A lock with everything that a version keeps of where it came from.
pub(super) struct Resolved {
    pub(super) lock: Lock,
    /// Directory that relative paths of the lock start from.
    pub(super) base: PathBuf,
    /// What of the lock is wanted.
    pub(super) choice: Choice,
    /// Name and text of the lock that is shown; no credentials.
    pub(super) document: (String, String),
    pub(super) pyproject: Option<String>,
    /// Where the installation looks: what was asked for, and what the source names; with credentials.
    pub(super) index: IndexOptions,
    pub(super) source: Source,
}

impl Opened {
    /// The text of a `pylock.toml`, which alone decides what is in it.
    pub(super) fn pylock(&self) -> Option<&str> {
        match &self.kind {
            Opening::Pylock { text, .. } => Some(text),
            _ => None,
        }
    }

    /// What a version says of a `pylock.toml` that was taken for `request`.
    pub(super) fn pylock_source(&self, request: &Request) -> Option<Source> {
        let Opening::Pylock { path, .. } = &self.kind else { return None };
        Some(Source::Lock { file: file_name(path), extras: request.extras.clone(), groups: request.groups.clone() })
    }
}

/// Reads what `request` names; starts nothing. `known` tells what a lock is that was read before, by its text.
pub(super) fn open(request: &Request, known: impl FnOnce(&str) -> Option<Pylock>) -> Result<Opened> {
    match &request.input {
        Input::Requirements { files, constraints, .. } => {
            for file in files.iter().chain(constraints) {
                let remote = file.to_str().is_some_and(|f| f.contains("://"));
                if !remote && fs::File::open(file).is_err() {
                    return Err(Error::new(
                        Kind::NotFound,
                        format!("requirements file {} is not there", file.display()),
                    )
                    .hint("check the path given with -r or -c"));
                }
            }
            Ok(Opened { kind: Opening::Requirements, requires_python: None, python: None })
        }
        Input::Project(dir) => {
            let dir = dir.canonicalize().at("finding", dir)?;
            let pyproject = read(&dir.join("pyproject.toml")).map_err(|error| match error.is_not_found() {
                true => Error::new(Kind::NotFound, format!("{} has no pyproject.toml", dir.display()))
                    .hint("name the directory of a project with --project"),
                false => error,
            })?;
            let lock = read(&dir.join("uv.lock")).map_err(|error| match error.is_not_found() {
                true => Error::new(Kind::NotFound, format!("{} has no uv.lock", dir.display()))
                    .hint(format!("make one: `uv lock --project {}`", dir.display())),
                false => error,
            })?;
            let python = fs::read_to_string(dir.join(".python-version")).ok().and_then(|text| {
                let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
                lines.next().map(str::to_string)
            });
            let requires_python = requires_python(&lock);
            Ok(Opened { kind: Opening::Project { dir, pyproject, lock }, requires_python, python })
        }
        Input::Lock(path) => {
            let path = std::path::absolute(path).at("finding", path)?;
            let text = read(&path)?;
            if let Some(Pylock { requires_python }) = known(&text) {
                return Ok(Opened { kind: Opening::Pylock { path, text }, requires_python, python: None });
            }
            let requires_python = requires_python(&text);
            let table: Table = toml::from_str(&text).map_err(|error| {
                Error::new(Kind::Invalid, format!("{} is no TOML document", path.display()))
                    .detail(strip_credentials(&error.to_string()))
            })?;
            let kind = if table.contains_key("lock-version") {
                Opening::Pylock { path, text }
            } else if table.contains_key("version") && table.contains_key("requires-python") {
                let pyproject = path.with_file_name("pyproject.toml");
                let beside = path.file_name().is_some_and(|n| n == "uv.lock") && pyproject.is_file();
                Opening::UvLock { path, text, pyproject: beside.then(|| read(&pyproject)).transpose()? }
            } else {
                return Err(Error::new(
                    Kind::Invalid,
                    format!("{} is neither a pylock.toml nor a uv.lock", path.display()),
                )
                .hint("write one with `uv pip compile --format pylock.toml` or `uv lock`"));
            };
            Ok(Opened { kind, requires_python, python: None })
        }
    }
}

impl Opened {
    /// Resolves for the Python at `executable`, which is only called where uv is needed.
    pub(super) fn resolve(
        self,
        context: &Context<'_>,
        request: &Request,
        executable: &dyn Fn() -> Result<PathBuf>,
        scratch: &dyn Fn() -> Result<PathBuf>,
    ) -> Result<Resolved> {
        let choice = Choice { extras: request.extras.clone(), groups: request.groups.clone() };
        let (extras, groups) = (request.extras.clone(), request.groups.clone());
        match self.kind {
            Opening::Requirements => compile(context, request, &executable()?),
            Opening::Pylock { path, text } => {
                let file = file_name(&path);
                let lock = Lock::parse(&text).map_err(|e| e.context(format!("{} cannot be used", path.display())))?;
                Ok(Resolved {
                    lock,
                    base: path.parent().unwrap_or(Path::new("/")).to_path_buf(),
                    choice,
                    document: ("pylock.toml".into(), strip_document(&text)?),
                    pyproject: None,
                    index: request.index.clone(),
                    source: Source::Lock { file, extras, groups },
                })
            }
            Opening::Project { dir, pyproject, lock } => {
                let (parsed, base) = export(context, request, &dir, &["--locked"], &executable()?, &scratch()?)
                    .map_err(|error| stale(error, &dir))?;
                let table: Table = toml::from_str(&pyproject).unwrap_or_default();
                let name = table.get("project").and_then(|p| p.get("name")).and_then(Value::as_str);
                let project = name.map_or_else(|| file_name(&dir), str::to_string);
                Ok(Resolved {
                    lock: parsed,
                    base,
                    choice: Choice::default(),
                    document: ("uv.lock".into(), strip_document(&lock)?),
                    pyproject: Some(strip_document(&pyproject)?),
                    index: with_indexes_of(&table, &request.index),
                    source: Source::Project { project, extras, groups },
                })
            }
            Opening::UvLock { path, text, pyproject } => {
                let scratch = scratch()?;
                let parent = path.parent().unwrap_or(Path::new("/"));
                let (parsed, base) = if pyproject.is_some() {
                    export(context, request, parent, &["--frozen"], &executable()?, &scratch)?
                } else {
                    // uv takes a lock for a project's only beside nothing or its own pyproject.toml.
                    let dir = scratch.join("lock");
                    fs::create_dir_all(&dir).at("creating", &dir)?;
                    fs::write(dir.join("uv.lock"), &text).at("writing", &dir)?;
                    export(context, request, &dir, &["--frozen", "--no-emit-workspace"], &executable()?, &scratch)?
                };
                Ok(Resolved {
                    lock: parsed,
                    base,
                    choice: Choice::default(),
                    document: ("uv.lock".into(), strip_document(&text)?),
                    index: with_indexes_of(
                        &pyproject.as_deref().and_then(|text| toml::from_str(text).ok()).unwrap_or_default(),
                        &request.index,
                    ),
                    pyproject: pyproject.map(|text| strip_document(&text)).transpose()?,
                    source: Source::Lock { file: file_name(&path), extras, groups },
                })
            }
        }
    }
}

/// `uv pip compile` in the caller's directory, as relative requirements start from there.
fn compile(context: &Context<'_>, request: &Request, executable: &Path) -> Result<Resolved> {
    let Input::Requirements { requirements, files, constraints } = &request.input else {
        return Err(Error::new(Kind::Failed, "these are no requirements"));
    };
    if !request.extras.is_empty() || !request.groups.is_empty() {
        return Err(Error::new(Kind::Usage, "extras and groups belong to projects and locks")
            .hint("write an extra into the requirement: 'package[extra]'"));
    }
    let base = env::current_dir().at("finding", ".")?;
    let said = requirements::read(requirements, files)?;
    let mut index = request.index.clone();
    index.index_url = index.index_url.or(said.index_url.clone());
    index.extra_index_urls.extend(said.extra_index_urls.iter().cloned());
    let text = if requirements.is_empty() && files.is_empty() {
        "lock-version = \"1.0\"\ncreated-by = \"envfabric\"\npackages = []\n".to_string()
    } else {
        settings::check(&base, request.platform.is_some())?;
        context.progress.event(&Event::Step(Step::Resolving));
        let mut args: Vec<OsString> =
            ["pip", "compile", "--format", "pylock.toml", "--no-header"].map(Into::into).to_vec();
        args.extend(["--python".into(), executable.into()]);
        if let Some(platform) = &request.platform {
            args.extend(["--python-platform".into(), platform.into()]);
        }
        args.extend(request.index.arguments().into_iter().map(Into::into));
        for file in constraints {
            args.extend(["--constraints".into(), file.into()]);
        }
        if !requirements.is_empty() {
            args.push("-".into());
        }
        args.extend(files.iter().map(Into::into));
        let input = requirements.iter().map(|r| format!("{r}\n")).collect::<String>();
        let variables = request.index.variables();
        let call = Call { args, input: Some(&input), variables: &variables, sealed: false };
        let resolved = context.uv.call(call, context.progress);
        said.restrict(resolved.map_err(|e| e.context("the requirements could not be resolved"))?)?
    };
    Ok(Resolved {
        lock: Lock::parse(&text)?,
        base,
        choice: Choice::default(),
        document: ("pylock.toml".into(), strip_document(&text)?),
        pyproject: None,
        index,
        source: Source::Requirements {
            requirements: requirements.iter().map(|r| strip_credentials(r)).collect(),
            files: files.iter().map(|f| file_name(f)).collect(),
        },
    })
}

/// `uv export` of the lock in `dir`; writes nothing there. Returns the lock and the directory its paths start from.
fn export(
    context: &Context<'_>,
    request: &Request,
    dir: &Path,
    flags: &[&str],
    executable: &Path,
    scratch: &Path,
) -> Result<(Lock, PathBuf)> {
    context.progress.event(&Event::Step(Step::Resolving));
    let out = scratch.join("pylock.toml");
    let mut args: Vec<OsString> =
        ["export", "--format", "pylock.toml", "--no-header", "--no-editable", "--quiet"].map(Into::into).to_vec();
    args.extend(flags.iter().map(Into::into));
    for extra in &request.extras {
        args.extend(["--extra".into(), extra.into()]);
    }
    for group in &request.groups {
        args.extend(["--group".into(), group.into()]);
    }
    // With another default index than the one it was made with, uv takes a lock for out of date.
    let lock = fs::read_to_string(dir.join("uv.lock")).unwrap_or_default();
    let mut index = request.index.clone();
    index.index_url = index.index_url.filter(|url| lock.contains(strip_credentials(url).trim_end_matches('/')));
    args.extend(index.arguments().into_iter().map(Into::into));
    // A workspace root that is no project itself stands for its members.
    let pyproject = fs::read_to_string(dir.join("pyproject.toml")).unwrap_or_default();
    let table: Table = toml::from_str(&pyproject).unwrap_or_default();
    if !table.is_empty() && !table.contains_key("project") {
        args.push("--all-packages".into());
    }
    args.extend([
        "--project".into(),
        dir.into(),
        "--python".into(),
        executable.into(),
        "-o".into(),
        out.clone().into(),
    ]);
    let call = Call { args, variables: &index.variables(), ..Call::default() };
    context
        .uv
        .call(call, context.progress)
        .map_err(|e| e.context(format!("{} could not be read", dir.join("uv.lock").display())))?;
    Ok((Lock::parse(&read(&out)?)?, scratch.to_path_buf()))
}

/// `index` and the indexes of a project, which uv is not told otherwise when it installs from the exported lock.
fn with_indexes_of(pyproject: &Table, index: &IndexOptions) -> IndexOptions {
    let mut index = index.clone();
    let own = pyproject.get("tool").and_then(|t| t.get("uv")).and_then(|t| t.get("index")).and_then(Value::as_array);
    let urls = own.into_iter().flatten().filter_map(|entry| entry.get("url")?.as_str());
    index.extra_index_urls.extend(urls.filter(|url| url.contains("://")).map(str::to_string));
    index
}

/// Says what to do about a lock that does not match its project.
fn stale(error: Error, dir: &Path) -> Error {
    match error.detail_text().is_some_and(|words| words.contains("needs to be updated")) {
        true => error.hint(format!("the lock is older than pyproject.toml; run `uv lock --project {}`", dir.display())),
        false => error,
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).at("reading", path)
}

fn file_name(path: &Path) -> String {
    strip_credentials(&path.file_name().unwrap_or(path.as_os_str()).to_string_lossy())
}

/// `requires-python` of the first lines of a lock of either kind.
fn requires_python(text: &str) -> Option<String> {
    let table: Table = toml::from_str(text).ok()?;
    table.get("requires-python").and_then(Value::as_str).map(str::to_string)
}
