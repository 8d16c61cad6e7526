//! `envfabric show`

use std::process::ExitCode;

use serde::Serialize;

use super::Context;
use super::output::{bytes, table, time};
use super::spec::{EnvSpec, spec};
use crate::environment::{Digest, Owner, Source, Version};
use crate::error::Result;
use crate::store::{Ownership, Signature};

/// Show one environment: interpreter path, source, packages
#[derive(Debug, clap::Args)]
pub(crate) struct Show {
    /// WORKFLOW/NODE, or WORKFLOW/NODE@VERSION for another than the current version
    #[arg(value_name = "WF/NODE", value_parser = spec)]
    environment: EnvSpec,
}

#[derive(Serialize)]
struct Package {
    name: String,
    version: String,
    layer: Digest,
    files: u32,
    bytes: u64,
}

#[derive(Serialize)]
struct Shown<'a> {
    path: String,
    pinned_path: String,
    current: bool,
    bytes: u64,
    packages: Vec<Package>,
    host_libraries: Vec<String>,
    signature: Option<Signature>,
    owner: Option<Owner>,
    #[serde(flatten)]
    version: &'a Version,
}

impl Show {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.plain_store()?;
        let trust = context.trusted_keys(&store)?;
        let index = context.index(&store)?;
        let version = self.environment.resolve(&store)?;
        let layers = index.layers(&store, &version.layers)?;
        let name = &version.environment;
        let current = store.pointer(name)?.and_then(|p| p.version) == Some(version.number);
        let base = context.settings.mount.join(name.workflow()).join(name.node());
        let pinned = base.join(format!(".versions/{}", version.number));
        let python = store.interpreters()?.into_iter().find(|i| i.layer == version.interpreter.layer);
        let ownership: Option<Ownership> = store.owner(name.workflow())?;
        let shown = Shown {
            path: base.join(".venv/bin/python").display().to_string(),
            pinned_path: pinned.join(".venv/bin/python").display().to_string(),
            current,
            bytes: layers.iter().map(|l| l.bytes).sum(),
            packages: layers
                .iter()
                .map(|l| Package {
                    name: l.meta.name.clone(),
                    version: l.meta.version.clone(),
                    layer: l.digest,
                    files: l.files,
                    bytes: l.bytes,
                })
                .collect(),
            host_libraries: python.map(|p| p.python.host_libraries).unwrap_or_default(),
            signature: store.signature(name, version.number, trust.as_ref())?,
            owner: ownership.as_ref().and_then(|ownership| ownership.owner),
            version: &version,
        };
        context.out.result(&shown, |w| {
            let state = if current { "current" } else { "not current" };
            writeln!(w, "{name}, version {} ({state}), {}", version.number, time(version.created))?;
            writeln!(w, "python   {}", version.interpreter.version)?;
            writeln!(w, "path     {}", shown.path)?;
            writeln!(w, "pinned   {}", shown.pinned_path)?;
            writeln!(w, "source   {}", source(&version.source))?;
            if let Some(signature) = &shown.signature {
                writeln!(w, "signed   {}", signature.sentence())?;
            }
            if ownership.is_some() {
                writeln!(w, "for      {}", super::owner::sentence(ownership.as_ref()))?;
            }
            if let Some(lock) = &version.lock {
                writeln!(w, "lock     {} ({})", lock.name, bytes(lock.size))?;
            }
            writeln!(w, "size     {} in {} packages", bytes(shown.bytes), shown.packages.len())?;
            for conflict in &version.conflicts {
                writeln!(w, "conflict {}: {} hides {}", conflict.path, conflict.shown, conflict.hidden)?;
            }
            if shown.packages.is_empty() {
                return Ok(());
            }
            writeln!(w)?;
            let rows = shown
                .packages
                .iter()
                .map(|p| vec![p.name.clone(), p.version.clone(), p.files.to_string(), bytes(p.bytes), p.layer.short()]);
            write!(w, "{}", table(&["PACKAGE", "VERSION", "FILES", "SIZE", "LAYER"], rows.collect(), &[2, 3]))
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

fn source(source: &Source) -> String {
    let chosen = |extras: &[String], groups: &[String]| {
        let extras = extras.iter().map(|e| format!(" --extra {e}"));
        extras.chain(groups.iter().map(|g| format!(" --group {g}"))).collect::<String>()
    };
    match source {
        Source::Requirements { requirements, files } => {
            let mut parts = requirements.clone();
            parts.extend(files.iter().map(|f| format!("-r {f}")));
            if parts.is_empty() { "no requirements".into() } else { parts.join(" ") }
        }
        Source::Project { project, extras, groups } => format!("project {project}{}", chosen(extras, groups)),
        Source::Lock { file, extras, groups } => format!("lock {file}{}", chosen(extras, groups)),
    }
}
