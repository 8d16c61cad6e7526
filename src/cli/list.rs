//! `envfabric list`

use std::collections::{HashMap, HashSet};
use std::process::ExitCode;

use serde::Serialize;

use super::Context;
use super::output::{bytes, table, time};
use crate::environment::{Digest, EnvName, Version};
use crate::error::Result;
use crate::store::{Index, Store};

/// List environments
#[derive(Debug, clap::Args)]
#[command(visible_alias = "ls")]
pub(crate) struct List {
    /// Only environments whose name begins with this
    prefix: Option<String>,
}

#[derive(Serialize)]
struct Line {
    environment: EnvName,
    version: Option<u64>,
    python: Option<String>,
    packages: Option<usize>,
    bytes: Option<u64>,
    created: Option<jiff::Timestamp>,
    /// Why it cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Bytes of layers; thousands of environments share hundreds of them.
struct Sizes(HashMap<Digest, u64>);

impl Sizes {
    fn of<'a>(store: &Store, index: &Index, versions: impl Iterator<Item = &'a Version>) -> Sizes {
        let layers: HashSet<Digest> = versions.flat_map(|version| version.layers.iter().copied()).collect();
        let layers: Vec<Digest> = layers.into_iter().collect();
        // Where one is damaged, each version is asked for alone.
        let docs = index.layers(store, &layers).unwrap_or_default();
        Sizes(docs.iter().map(|doc| (doc.digest, doc.bytes)).collect())
    }

    fn of_version(&self, store: &Store, index: &Index, version: &Version) -> Result<u64> {
        match version.layers.iter().map(|layer| self.0.get(layer)).sum::<Option<u64>>() {
            Some(bytes) => Ok(bytes),
            None => Ok(index.layers(store, &version.layers)?.iter().map(|layer| layer.bytes).sum()),
        }
    }
}

impl List {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let prefix = self.prefix.as_deref().unwrap_or_default();
        let lines = match context.store() {
            Ok(store) => self.lines(context, &store, prefix)?,
            // A new user has nothing yet, and that is no failure.
            Err(error) if error.is_not_found() && context.settings.store_is_default => Vec::new(),
            Err(error) => return Err(error),
        };
        self.print(context, &lines, prefix)?;
        Ok(ExitCode::SUCCESS)
    }

    fn lines(&self, context: &Context, store: &Store, prefix: &str) -> Result<Vec<Line>> {
        let index = context.index(store)?;
        let told =
            store.each_environment(prefix, |name, pointer| store.version(name, pointer.version.unwrap_or_default()))?;
        let sizes = Sizes::of(store, &index, told.iter().filter_map(|(_, version)| version.as_ref().ok()));
        let line = |(name, version): (EnvName, Result<Version>)| {
            let told = version.and_then(|version| Ok((sizes.of_version(store, &index, &version)?, version)));
            match told {
                Ok((bytes, version)) => Line {
                    environment: name,
                    version: Some(version.number),
                    python: Some(version.interpreter.version),
                    packages: Some(version.layers.len()),
                    bytes: Some(bytes),
                    created: Some(version.created),
                    error: None,
                },
                // One damaged environment does not hide the others.
                Err(error) => Line {
                    environment: name,
                    version: None,
                    python: None,
                    packages: None,
                    bytes: None,
                    created: None,
                    error: Some(error.chain()),
                },
            }
        };
        Ok(told.into_iter().map(line).collect())
    }

    fn print(&self, context: &Context, lines: &[Line], prefix: &str) -> Result<()> {
        context.out.result(&lines, |w| {
            if lines.is_empty() {
                return writeln!(w, "no environments{}", if prefix.is_empty() { "" } else { " with that prefix" });
            }
            let rows = lines.iter().map(|line| {
                let or_damaged = |text: Option<String>| text.unwrap_or_else(|| "?".into());
                vec![
                    line.environment.to_string(),
                    or_damaged(line.version.map(|v| v.to_string())),
                    or_damaged(line.python.clone()),
                    or_damaged(line.packages.map(|n| n.to_string())),
                    line.bytes.map_or("damaged".into(), bytes),
                    or_damaged(line.created.map(time)),
                ]
            });
            let header = ["ENVIRONMENT", "VERSION", "PYTHON", "PACKAGES", "SIZE", "CREATED"];
            write!(w, "{}", table(&header, rows.collect(), &[1, 3, 4]))
        })?;
        for line in lines {
            if let Some(error) = &line.error {
                context.out.say(format_args!("warning: {}: {error}", line.environment));
            }
        }
        if lines.is_empty() && prefix.is_empty() {
            context.out.say("make one: envfabric create demo/hello requests");
        }
        Ok(())
    }
}
