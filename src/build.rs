//! Building: from what a user names to a published version.
//!
//! ```text
//! requirements, project, lock --uv--> lock --select--> packages --key--> known layers
//!                                                          |                  |
//!                                                          +--uv, RECORD--> new layers --> check --> version
//! ```
//! [`create`] does it all. Only packages without a layer are installed; a complete `pylock.toml` of known layers on a
//! known interpreter starts no process and reads no wheel. Nothing is visible before the version is published, so a
//! build may be killed at any time: what it leaves is objects that the next build uses, and a scratch directory that
//! the next build removes.
//!
//! **Between processes of one machine**, one environment is built by one process at a time, one package is installed by
//! one process at a time, and one interpreter is ingested by one process at a time; the others wait and then find the
//! result. Machines that share the store do not wait for each other: they may do the same work twice.
//!
//! **uv's settings apply to what is resolved**: its configuration files and `UV_*` variables, apart from those that
//! would make it resolve for something else (see `settings`) or install elsewhere (see `uv`). What is installed is the
//! lock and nothing else: then uv reads no configuration file, so what sources are built with comes from the indexes of
//! the request or of uv's variables.

mod bytecode;
mod conflicts;
mod elf;
mod ingest;
mod layers;
mod limits;
pub(crate) mod metadata;
mod plan;
mod probe;
mod progress;
mod python;
pub(crate) mod record;
mod repair;
mod requirements;
mod scratch;
mod settings;
mod source;
mod stage;
mod tree;
mod uv;
pub(crate) mod validate;
mod vouch;
mod wheel;

use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::environment::lock::{Package, Target};
use crate::environment::{Builder, Conflict, Digest, EnvName, InterpreterRef, VERSION_FORMAT, Version};
use crate::error::{Error, Kind, Result};
use crate::store::{BootTime, Claimed, FRESH, Index, LayerDoc, Store, StoredInterpreter, host, now};

pub use progress::{Event, PackageState, Progress, Silent, Step};
pub use repair::{Repaired, repair};
pub use uv::Uv;
pub use validate::run_trial;

use plan::{Parts, Plan};
use scratch::Scratch;
use stage::Stage;
use validate::check_requirements;

/// Starts the interpreter of a version and fails unless it works; gets the version and its layers' documents.
pub type Trial<'a> = &'a dyn Fn(&Version, &[Arc<LayerDoc>]) -> Result<()>;

/// Where and with what a build works.
#[derive(Clone)]
pub struct Context<'a> {
    /// The store to publish to.
    pub store: &'a Store,
    /// What this machine knows of it.
    pub index: &'a Index,
    /// uv; started only when needed.
    pub uv: &'a Uv,
    /// Directory of this machine for locks between processes and copies of interpreters; on a local disk.
    pub state: PathBuf,
    /// Directory for staging venvs; not in the store, best on the file system of uv's cache (hard links).
    pub scratch: PathBuf,
    /// Told what happens.
    pub progress: &'a dyn Progress,
    /// Starts the interpreter of a version that is complete but not published (its number is 0), from a view of it;
    /// see [`run_trial`]. None skips this part of validation.
    pub trial: Option<Trial<'a>>,
}

/// What an environment is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// Requirements, as pip would take them. Relative paths in them start from the working directory.
    Requirements {
        /// PEP 508 requirements, URLs, paths of wheels and source directories.
        requirements: Vec<String>,
        /// `-r` files.
        files: Vec<PathBuf>,
        /// `-c` files.
        constraints: Vec<PathBuf>,
    },
    /// A directory with `pyproject.toml` and an up-to-date `uv.lock`. The project itself is installed too, not
    /// editable, where it has a build system; so are the members of its workspace that it needs.
    Project(PathBuf),
    /// A `pylock.toml` or a `uv.lock`. Beside a `uv.lock` without its `pyproject.toml` the project is not installed.
    Lock(PathBuf),
}

/// Where packages are looked for, in uv's words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IndexOptions {
    /// `--default-index`: instead of PyPI.
    pub index_url: Option<String>,
    /// `--index`, asked before the default one.
    pub extra_index_urls: Vec<String>,
    /// `--find-links`.
    pub find_links: Vec<String>,
    /// `--no-build`: wheels only.
    pub no_build: bool,
    /// `--offline`.
    pub offline: bool,
}

impl IndexOptions {
    /// Arguments for uv that hold no secret.
    fn arguments(&self) -> Vec<String> {
        let flags = [(self.no_build, "--no-build"), (self.offline, "--offline")];
        let mut args: Vec<String> = flags.iter().filter(|(on, _)| *on).map(|(_, flag)| flag.to_string()).collect();
        if self.find_links_by_flag() {
            args.extend(self.find_links.iter().flat_map(|place| ["--find-links".to_string(), place.clone()]));
        }
        args
    }

    /// A variable cannot hold a path with a comma.
    fn find_links_by_flag(&self) -> bool {
        self.find_links.iter().any(|place| place.contains(','))
    }

    /// Variables for uv: the addresses, which may hold credentials.
    fn variables(&self) -> Vec<(&'static str, String)> {
        let mut variables = Vec::new();
        variables.extend(self.index_url.iter().map(|url| ("UV_DEFAULT_INDEX", url.clone())));
        if !self.extra_index_urls.is_empty() {
            variables.push(("UV_INDEX", self.extra_index_urls.join(" ")));
        }
        if !self.find_links.is_empty() && !self.find_links_by_flag() {
            variables.push(("UV_FIND_LINKS", self.find_links.join(",")));
        }
        variables
    }
}

/// What to build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The environment's name.
    pub name: EnvName,
    /// What it is made from.
    pub input: Input,
    /// `--python`: a path, a version or a range.
    pub python: Option<String>,
    /// Make bytecode.
    pub bytecode: bool,
    /// Check the result before it is published.
    pub validate: bool,
    /// Build layers that are known all the same, and repair their objects in the store.
    pub rebuild: bool,
    /// Extras of a project or lock.
    pub extras: Vec<String>,
    /// Dependency groups of a project or lock, besides its default groups.
    pub groups: Vec<String>,
    /// Where packages are looked for.
    pub index: IndexOptions,
    /// Platform to choose wheels for, in uv's words (`x86_64-manylinux_2_28`): the oldest of the fleet. None means
    /// this machine.
    pub platform: Option<String>,
}

impl Request {
    /// A request with the usual settings: bytecode, validation, whatever Python fits.
    pub fn new(name: EnvName, input: Input) -> Request {
        Request {
            name,
            input,
            python: None,
            bytecode: true,
            validate: true,
            rebuild: false,
            extras: Vec::new(),
            groups: Vec::new(),
            index: IndexOptions::default(),
            platform: None,
        }
    }
}

/// What became of a request.
#[derive(Debug, Clone)]
pub struct Created {
    /// The version that has what was asked for.
    pub version: Version,
    /// How it came about.
    pub outcome: Outcome,
    /// Its interpreter.
    pub interpreter: StoredInterpreter,
    /// Its layers' documents, in order.
    pub layers: Vec<Arc<LayerDoc>>,
    /// How many of the layers were made now.
    pub installed: usize,
}

/// How a version came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was published and is current.
    Published,
    /// It was current already; nothing was written.
    Unchanged,
    /// It was published, but meanwhile another builder made this newer one current.
    Superseded(u64),
}

/// Builds what `request` asks for and publishes it.
///
/// # Errors
/// The input cannot be read or resolved, a wheel is refused, a check fails: [`Kind`] and message say which. The current
/// version of the environment stays as it is.
pub fn create(context: &Context<'_>, request: &Request) -> Result<Created> {
    match create_once(context, request) {
        // Found when the version could be seen already: what was lost is built again, which makes it whole.
        Err(error) if error.kind() == Kind::Collected => {
            tracing::warn!(error = error.chain(), "built again");
            create_once(context, &Request { rebuild: true, ..request.clone() })
        }
        other => other,
    }
}

fn create_once(context: &Context<'_>, request: &Request) -> Result<Created> {
    context.store.require_writable()?;
    context.store.require_signer()?;
    let begun = BootTime::now();
    let name = &request.name;
    let waiting = || context.progress.event(&Event::Step(Step::Waiting));
    let lock = format!("env-{}", Digest::of(format!("{} {name}", context.store.fabric().id).as_bytes()).short());
    let _lock = scratch::lock(&context.state, [lock], waiting)?;

    let opened = source::open(request, |text| Plan::pylock(context, text))?;
    let asked = request.python.clone().or_else(|| opened.python.clone());
    let resolve = || python::resolve(context, asked.as_deref(), opened.requires_python.as_deref());
    let mut interpreter = resolve()?;
    // Collected since it was found: then it is taken in again.
    if !context.store.has_interpreter(&interpreter) {
        interpreter = resolve()?;
    }
    vouch::interpreter(context, &interpreter)?;
    if let Some(platform) = &request.platform {
        python::check_platform(platform, &interpreter.python)?;
    }
    let cell = OnceCell::new();
    let scratch = || -> Result<PathBuf> {
        if cell.get().is_none() {
            let _ = cell.set(Scratch::new(&context.scratch)?);
        }
        Ok(cell.get().map_or_else(|| context.scratch.clone(), |s| s.path().to_path_buf()))
    };
    let executable = || python::runnable(context, &interpreter);
    // What was noted may come from a time without a key: who signs looks again.
    let slot = Plan::slot(&opened, request, &interpreter).filter(|_| context.store.signer().is_none());
    let (parts, installed) = match slot.as_ref().and_then(|slot| slot.find(context)) {
        Some(known) => {
            let count = known.plan.layers.len();
            context.progress.event(&Event::Planned { packages: count, known: count });
            (known, 0)
        }
        None => {
            let resolved = opened.resolve(context, request, &executable, &scratch)?;
            let packages = resolved.lock.select(&interpreter.python, &resolved.choice)?;
            let work =
                Work { context, request, interpreter: &interpreter, base: &resolved.base, index: &resolved.index };
            let (digests, keyed, installed) = work.layers(&packages, &executable, &scratch)?;
            let parts = Parts::of(context, &resolved, digests)?;
            if let Some(slot) = slot.filter(|_| keyed) {
                slot.keep(context, &parts.plan)?;
            }
            (parts, installed)
        }
    };
    let Parts { plan, layers, source } = parts;
    let all: Vec<Digest> = [interpreter.layer, interpreter.scaffold].into_iter().chain(plan.layers.clone()).collect();
    let draft = Version {
        format: VERSION_FORMAT,
        environment: name.clone(),
        number: 0,
        created: now(),
        interpreter: InterpreterRef {
            layer: interpreter.layer,
            version: interpreter.python.version.clone(),
            executable: interpreter.python.executable.clone(),
        },
        scaffold: interpreter.scaffold,
        layers: plan.layers,
        summaries: vouch::summaries(context, &all, request.rebuild)?,
        lock: Some(plan.lock),
        pyproject: plan.pyproject,
        source,
        builder: Builder {
            envfabric: env!("CARGO_PKG_VERSION").into(),
            uv: context.uv.version_if_used(),
            host: host(),
        },
        conflicts: plan.conflicts,
        nonce: String::new(),
    };
    let created = |version, outcome| Created {
        version,
        outcome,
        interpreter: interpreter.clone(),
        layers: layers.clone(),
        installed,
    };
    let bundles = context.index.layers(context.store, &all)?;
    let bundles = bundles.iter().filter_map(|doc| Some(doc.bundle?.object())).collect();
    let look = |version: &Version| context.store.require_whole(version, &bundles);
    match context.store.current(name) {
        Ok(current) if current.same_content(&draft) && context.store.is_signed_enough(&current) => {
            look(&current)?;
            return Ok(created(current, Outcome::Unchanged));
        }
        // A current version that cannot be read is no reason not to publish one that can.
        Err(error) if !matches!(error.kind(), Kind::NotFound | Kind::Corrupt | Kind::Rejected) => return Err(error),
        _ => {}
    }
    if request.validate {
        validate(context, &draft, &layers, &interpreter)?;
    }
    context.progress.event(&Event::Step(Step::Publishing));
    // What may have gone during a long build is found before anybody can see the version.
    if begun.elapsed() > FRESH {
        look(&draft)?;
    }
    Ok(match context.store.publish_version_if(draft, look)? {
        Claimed::Current(version) => created(version, Outcome::Published),
        Claimed::Superseded(version, newest) => created(version, Outcome::Superseded(newest)),
    })
}

/// Makes sure that the interpreter that `request` names (a path, a version or a range) is in the store.
pub fn add_interpreter(context: &Context<'_>, request: &str) -> Result<StoredInterpreter> {
    context.store.require_writable()?;
    let added = python::resolve(context, Some(request), None)?;
    context.index.note_made(context.store)?;
    Ok(added)
}

/// Sentences about `conflicts` for people, the first few.
pub fn describe_conflicts(conflicts: &[Conflict]) -> Vec<String> {
    const TOLD: usize = 5;
    let sentence =
        |c: &Conflict| format!("{} and {} both have {}; that of {} is shown", c.hidden, c.shown, c.path, c.shown);
    let mut told: Vec<String> = conflicts.iter().take(TOLD).map(sentence).collect();
    if conflicts.len() > TOLD {
        told.push(format!("{} more paths are there twice: `envfabric show` lists them", conflicts.len() - TOLD));
    }
    told
}

fn validate(
    context: &Context<'_>,
    draft: &Version,
    layers: &[Arc<LayerDoc>],
    interpreter: &StoredInterpreter,
) -> Result<()> {
    context.progress.event(&Event::Step(Step::Validating));
    let note = validate::proof_note(draft);
    // What was started was checked before.
    if context.trial.is_some() && context.index.note(&note)?.is_some() {
        return Ok(());
    }
    let problems = check_requirements(layers, &interpreter.python)?;
    if !problems.is_empty() {
        let count = problems.len();
        return Err(Error::new(
            Kind::Failed,
            format!("{} is inconsistent: {count} requirements are not met", draft.environment),
        )
        .detail(problems.join("\n"))
        .hint("correct the requirements or the lock, or publish it as it is with --no-validate"));
    }
    let Some(trial) = context.trial else { return Ok(()) };
    trial(draft, layers).map_err(|error| match error.kind() {
        Kind::Unsupported | Kind::Os(libc::EPERM) => {
            let first = "publish it without this check with --no-validate";
            let hint = error.hint_text().map_or_else(|| first.to_string(), |hint| format!("{first}, or {hint}"));
            error.context(format!("{} cannot be tried on this machine", draft.environment)).hint(hint)
        }
        _ => error,
    })?;
    context.index.set_note(&note, &now().to_string())
}

/// One build, once its lock is known.
struct Work<'a> {
    context: &'a Context<'a>,
    request: &'a Request,
    interpreter: &'a StoredInterpreter,
    base: &'a Path,
    index: &'a IndexOptions,
}

impl Work<'_> {
    /// A layer for each of `packages`, in order; whether all have keys, so that the same lock finds the same again; and
    /// how many were made now.
    fn layers(
        &self,
        packages: &[&Package],
        executable: &dyn Fn() -> Result<PathBuf>,
        scratch: &dyn Fn() -> Result<PathBuf>,
    ) -> Result<(Vec<Digest>, bool, usize)> {
        let (context, request) = (self.context, self.request);
        let python = &self.interpreter.python;
        let libc = python::host_libc(python);
        let target = Target { platform: request.platform.as_deref(), libc: &libc, bytecode: request.bytecode };
        let keys: Vec<Option<Digest>> = packages.iter().map(|p| p.key(python, target)).collect();
        let look = |key: &Option<Digest>| match key {
            Some(_) if request.rebuild => Ok(None),
            Some(key) => context.index.layer_of_key(context.store, key),
            None => Ok(None),
        };
        let mut found: Vec<Option<Digest>> = keys.iter().map(look).collect::<Result<_>>()?;
        let known = found.iter().flatten().count();
        context.progress.event(&Event::Planned { packages: packages.len(), known });
        let mut installed = 0;
        if known < packages.len() {
            // 4,096 locks at most, however many packages there ever were.
            let missing = keys.iter().zip(&found).filter(|(_, found)| found.is_none()).filter_map(|(key, _)| *key);
            let names: Vec<String> = missing.map(|key| format!("layer-{}", &key.to_string()[..3])).collect();
            let waiting = || context.progress.event(&Event::Step(Step::Waiting));
            let _locks = scratch::lock(&context.state, names, waiting)?;
            for (key, found) in keys.iter().zip(&mut found).filter(|(_, found)| found.is_none()) {
                *found = look(key)?;
            }
            let todo: Vec<usize> = (0..packages.len()).filter(|n| found[*n].is_none()).collect();
            installed = todo.len();
            if !todo.is_empty() {
                let wanted: Vec<&Package> = todo.iter().map(|n| packages[*n]).collect();
                let docs = self.install(&wanted, &executable()?, &scratch()?)?;
                for (number, doc) in todo.into_iter().zip(docs) {
                    found[number] = Some(match &keys[number] {
                        // A source distribution may have come out differently: the layer made now is whole.
                        Some(key) if request.rebuild => {
                            context.store.publish_key(key, &doc.digest).map(|_| doc.digest)?
                        }
                        Some(key) => context.store.publish_key(key, &doc.digest)?,
                        None => doc.digest,
                    });
                }
            }
        }
        let found: Vec<Digest> = found.into_iter().flatten().collect();
        vouch::packages(context, packages, &found, &python.layer_abi())?;
        Ok((found, keys.iter().all(Option::is_some), installed))
    }

    fn install(&self, packages: &[&Package], executable: &Path, scratch: &Path) -> Result<Vec<LayerDoc>> {
        let context = self.context;
        context.progress.event(&Event::Step(Step::Installing));
        let mut options = self.index.arguments();
        if let Some(platform) = &self.request.platform {
            options.extend(["--python-platform".to_string(), platform.clone()]);
        }
        let variables = self.index.variables();
        let stage = Stage {
            uv: context.uv,
            executable,
            python: &self.interpreter.python,
            scratch,
            options: &options,
            variables: &variables,
            base: self.base,
            progress: context.progress,
        };
        let distributions = stage.install(packages)?;
        layers::write(context.store, &stage, distributions, self.request)
    }
}
