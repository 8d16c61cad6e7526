//! `envfabric list`

use std::process::ExitCode;

use serde::Serialize;

use super::Context;
use super::output::{bytes, table, time};
use crate::environment::EnvName;
use crate::error::Result;
use crate::store::Store;

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
        let mut lines = Vec::new();
        for (name, pointer) in store.environments()? {
            if !name.to_string().starts_with(prefix) {
                continue;
            }
            let told = pointer.and_then(|pointer| {
                let version = store.version(&name, pointer.version.unwrap_or_default())?;
                let layers = index.layers(store, &version.layers)?;
                Ok((version, layers.iter().map(|l| l.bytes).sum()))
            });
            lines.push(match told {
                Ok((version, bytes)) => Line {
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
            });
        }
        Ok(lines)
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
