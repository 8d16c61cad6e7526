//! `envfabric list`

use std::process::ExitCode;

use serde::Serialize;

use super::Context;
use super::output::{bytes, table, time};
use crate::environment::EnvName;
use crate::error::Result;

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
    version: u64,
    python: String,
    packages: usize,
    bytes: u64,
    created: jiff::Timestamp,
    /// Why it cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl List {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.store_or_default()?;
        let index = context.index(&store)?;
        let prefix = self.prefix.as_deref().unwrap_or_default();
        let mut lines = Vec::new();
        for (name, pointer) in store.environments()? {
            let Some(number) = pointer.version.filter(|_| name.to_string().starts_with(prefix)) else { continue };
            let told = store.version(&name, number).and_then(|version| {
                let layers = index.layers(&store, &version.layers)?;
                Ok((version, layers.iter().map(|l| l.bytes).sum()))
            });
            lines.push(match told {
                Ok((version, bytes)) => Line {
                    environment: name,
                    version: number,
                    python: version.interpreter.version,
                    packages: version.layers.len(),
                    bytes,
                    created: version.created,
                    error: None,
                },
                // One damaged environment does not hide the others.
                Err(error) => Line {
                    environment: name,
                    version: number,
                    python: "?".into(),
                    packages: 0,
                    bytes: 0,
                    created: pointer.at,
                    error: Some(error.chain()),
                },
            });
        }
        context.out.result(&lines, |w| {
            if lines.is_empty() {
                return writeln!(w, "no environments{}", if prefix.is_empty() { "" } else { " with that prefix" });
            }
            let rows = lines.iter().map(|line| {
                let size = if line.error.is_some() { "damaged".into() } else { bytes(line.bytes) };
                vec![
                    line.environment.to_string(),
                    line.version.to_string(),
                    line.python.clone(),
                    line.packages.to_string(),
                    size,
                    time(line.created),
                ]
            });
            let header = ["ENVIRONMENT", "VERSION", "PYTHON", "PACKAGES", "SIZE", "CREATED"];
            write!(w, "{}", table(&header, rows.collect(), &[1, 3, 4]))
        })?;
        for line in &lines {
            if let Some(error) = &line.error {
                context.out.say(format_args!("warning: {}: {error}", line.environment));
            }
        }
        if lines.is_empty() && prefix.is_empty() {
            context.out.say("make one: envfabric create demo/hello requests");
        }
        Ok(ExitCode::SUCCESS)
    }
}
