//! `envfabric create`

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use tempfile::TempDir;

use super::Context;
use super::output::bytes;
use super::progress::Shown;
use super::spec::name;
use crate::build::{self, Input, Outcome, Request, Uv};
use crate::environment::{EnvName, Version};
use crate::error::{Error, IoContext, Kind, Result};
use crate::mount;
use crate::store::LayerDoc;

/// Build an environment and publish it as a new version; print the interpreter path
#[derive(Debug, clap::Args)]
pub(crate) struct Create {
    /// WORKFLOW/NODE
    #[arg(value_name = "WF/NODE", value_parser = name)]
    environment: EnvName,
    /// Requirements as pip takes them: names, versions, URLs, local wheels and directories
    #[arg(value_name = "REQ", value_parser = clap::builder::NonEmptyStringValueParser::new(), conflicts_with_all = ["project", "lock"])]
    requirements: Vec<String>,
    /// Requirements file, or - for standard input (repeatable)
    #[arg(long = "requirements", short = 'r', value_name = "FILE", conflicts_with_all = ["project", "lock"])]
    files: Vec<PathBuf>,
    /// Constraints file (repeatable)
    #[arg(long = "constraints", short = 'c', value_name = "FILE", conflicts_with_all = ["project", "lock"])]
    constraints: Vec<PathBuf>,
    /// Project directory with pyproject.toml and uv.lock
    #[arg(long, value_name = "DIR", conflicts_with = "lock")]
    project: Option<PathBuf>,
    /// Lock: a pylock.toml (PEP 751) or a uv.lock
    #[arg(long, value_name = "FILE")]
    lock: Option<PathBuf>,
    /// Extra of the project or lock (repeatable)
    #[arg(long, value_name = "NAME")]
    extra: Vec<String>,
    /// Dependency group of the project or lock (repeatable)
    #[arg(long, value_name = "NAME")]
    group: Vec<String>,
    /// Python: a version (3.11, 3.11.7, '>=3.9,<3.12') or the path of an interpreter
    /// [default: what the project or lock asks for, else the newest known]
    #[arg(long, short, value_name = "X")]
    python: Option<String>,
    /// Leave bytecode out
    #[arg(long)]
    no_bytecode: bool,
    /// Publish without checking that the result fits together and starts
    #[arg(long)]
    no_validate: bool,
    /// Package index in place of PyPI
    #[arg(long, value_name = "URL")]
    index_url: Option<String>,
    /// Further package index (repeatable)
    #[arg(long, value_name = "URL")]
    extra_index_url: Vec<String>,
    /// Directory or page with wheels (repeatable)
    #[arg(long, value_name = "DIR|URL")]
    find_links: Vec<String>,
    /// Build layers that the store has anew, and repair what is damaged of them
    #[arg(long)]
    rebuild: bool,
    /// Install wheels only, build nothing from source
    #[arg(long)]
    no_build: bool,
    /// Use only what uv has in its cache
    #[arg(long)]
    offline: bool,
    /// Platform to resolve for, as uv names it (x86_64-manylinux_2_28): the oldest machine of the fleet
    #[arg(long, value_name = "PLATFORM")]
    python_platform: Option<String>,
}

#[derive(Serialize)]
struct Done<'a> {
    environment: &'a EnvName,
    version: u64,
    /// `published`, `unchanged` or `superseded`.
    outcome: &'a str,
    path: String,
    pinned_path: String,
    python: &'a str,
    packages: usize,
    installed: usize,
    bytes: u64,
    seconds: f64,
    conflicts: &'a [crate::environment::Conflict],
}

impl Create {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let begun = Instant::now();
        let is_empty = self.requirements.is_empty() && self.files.is_empty();
        if is_empty && self.project.is_none() && self.lock.is_none() {
            return Err(Error::new(Kind::Usage, format!("it is not said what {} is to have", self.environment))
                .hint("name packages, -r FILE, --lock FILE or --project DIR; with nothing in it: -r /dev/null"));
        }
        let standard_input = self.standard_input()?;
        let store = context.store_or_default()?;
        let index = Arc::new(context.index(&store)?);
        let uv = Uv::new(context.settings.config.uv.clone());
        let shown = Shown::interruptible(&context.out)?;
        let trial = |draft: &Version, layers: &[Arc<LayerDoc>]| {
            mount::trial(&store.unchecked(), index.clone(), draft, |dir| build::run_trial(dir, layers))
        };
        let building = context.builds(&store, &index, &uv, &*shown)?;
        let created = build::create(
            &build::Context { trial: Some(&trial), ..building },
            &self.request(context, standard_input.as_ref()),
        );
        shown.clear();
        let created = created?;

        let version = &created.version;
        let base = context.settings.mount.join(self.environment.workflow()).join(self.environment.node());
        let pinned = base.join(format!(".versions/{}", version.number));
        let done = Done {
            environment: &self.environment,
            version: version.number,
            outcome: match created.outcome {
                Outcome::Published => "published",
                Outcome::Unchanged => "unchanged",
                Outcome::Superseded(_) => "superseded",
            },
            path: base.join(".venv/bin/python").display().to_string(),
            pinned_path: pinned.join(".venv/bin/python").display().to_string(),
            python: &version.interpreter.version,
            packages: created.layers.len(),
            installed: created.installed,
            bytes: created.layers.iter().map(|l| l.bytes).sum(),
            seconds: begun.elapsed().as_secs_f64(),
            conflicts: &version.conflicts,
        };
        for sentence in build::describe_conflicts(&version.conflicts) {
            context.out.say(format_args!("note: {sentence}"));
        }
        let name = &self.environment;
        context.out.say(match created.outcome {
            Outcome::Published => format!(
                "{name} version {}: {} packages on Python {}, {}, {} new, {:.1} s",
                version.number,
                done.packages,
                done.python,
                bytes(done.bytes),
                done.installed,
                done.seconds
            ),
            Outcome::Unchanged => {
                format!("{name} has this already, as version {}; nothing was published", version.number)
            }
            Outcome::Superseded(newest) => format!(
                "{name} version {} is published, but version {newest} of another builder is current",
                version.number
            ),
        });
        if super::daemon::mount_of(&store, &context.settings.mount)?.is_none() && !context.out.json {
            context.out.say(format_args!("not mounted yet: envfabric mount, or envfabric run {name} -- python"));
        }
        context.out.result(&done, |w| writeln!(w, "{}", done.path))?;
        Ok(ExitCode::SUCCESS)
    }

    /// Standard input in a file, where it was asked for; uv is given none. The file always has the same name, because
    /// the version keeps that.
    fn standard_input(&self) -> Result<Option<TempDir>> {
        if !self.files.iter().any(|file| is_standard_input(file)) {
            return Ok(None);
        }
        let mut text = Vec::new();
        std::io::stdin().read_to_end(&mut text).at("reading", "standard input")?;
        let dir = tempfile::tempdir().at("creating a directory in", std::env::temp_dir())?;
        let file = dir.path().join(STANDARD_INPUT);
        std::fs::write(&file, text).at("writing", &file)?;
        Ok(Some(dir))
    }

    fn request(&self, context: &Context, standard_input: Option<&TempDir>) -> Request {
        let config = &context.settings.config;
        let input = if let Some(project) = &self.project {
            Input::Project(project.clone())
        } else if let Some(lock) = &self.lock {
            Input::Lock(lock.clone())
        } else {
            Input::Requirements {
                requirements: self.requirements.clone(),
                files: self
                    .files
                    .iter()
                    .map(|file| match standard_input {
                        Some(dir) if is_standard_input(file) => dir.path().join(STANDARD_INPUT),
                        _ => file.clone(),
                    })
                    .collect(),
                constraints: self.constraints.clone(),
            }
        };
        let mut request = Request::new(self.environment.clone(), input);
        request.python = self.python.clone();
        request.bytecode = !self.no_bytecode;
        request.validate = !self.no_validate;
        request.rebuild = self.rebuild;
        request.extras = self.extra.clone();
        request.groups = self.group.clone();
        request.index.index_url = self.index_url.clone().or_else(|| config.index_url.clone());
        request.index.extra_index_urls = if self.extra_index_url.is_empty() {
            config.extra_index_urls.clone()
        } else {
            self.extra_index_url.clone()
        };
        request.index.find_links = self.find_links.clone();
        request.index.no_build = self.no_build;
        request.index.offline = self.offline;
        request.platform = self.python_platform.clone().or_else(|| config.python_platform.clone());
        request
    }
}

/// What the version calls requirements from standard input.
const STANDARD_INPUT: &str = "stdin";

fn is_standard_input(path: &Path) -> bool {
    ["-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"].iter().any(|name| path == Path::new(name))
}
