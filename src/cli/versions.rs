//! `envfabric versions`

use std::process::ExitCode;

use serde::Serialize;

use super::Context;
use super::output::{table, time};
use super::spec::name;
use crate::environment::EnvName;
use crate::error::{Error, Kind, Result};
use crate::store::Signature;

/// List the versions of an environment
#[derive(Debug, clap::Args)]
pub(crate) struct Versions {
    /// WORKFLOW/NODE
    #[arg(value_name = "WF/NODE", value_parser = name)]
    environment: EnvName,
}

#[derive(Serialize)]
struct Line {
    version: u64,
    current: bool,
    created: Option<jiff::Timestamp>,
    python: Option<String>,
    packages: Option<usize>,
    host: Option<String>,
    signature: Option<Signature>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Versions {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.plain_store()?;
        let trust = context.trusted_keys(&store)?;
        let numbers = store.version_numbers(&self.environment)?;
        if numbers.is_empty() {
            return Err(Error::new(Kind::NotFound, format!("there is no environment {}", self.environment))
                .hint("see `envfabric list`"));
        }
        let pointer = match store.pointer(&self.environment) {
            // The versions are there all the same, and one of them is to be named.
            Err(error) if error.kind() == Kind::Corrupt => Err(error),
            pointer => Ok(pointer?),
        };
        let current = pointer.as_ref().ok().cloned().flatten().and_then(|p| p.version);
        let lines: Vec<Line> = numbers
            .into_iter()
            .map(|number| {
                let version = store.version(&self.environment, number);
                // Of one that cannot be read it cannot be told, either.
                let signature = version.is_ok().then(|| store.signature(&self.environment, number, trust.as_ref()));
                let (version, error) = match version {
                    Ok(version) => (Some(version), None),
                    Err(error) => (None, Some(error.chain())),
                };
                Line {
                    version: number,
                    current: current == Some(number),
                    created: version.as_ref().map(|v| v.created),
                    python: version.as_ref().map(|v| v.interpreter.version.clone()),
                    packages: version.as_ref().map(|v| v.layers.len()),
                    host: version.map(|v| v.builder.host),
                    signature: signature.and_then(Result::ok).flatten(),
                    error,
                }
            })
            .collect();
        context.out.result(&lines, |w| {
            let rows = lines.iter().map(|line| {
                let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "?".into());
                vec![
                    line.version.to_string(),
                    if line.current { "current".into() } else { String::new() },
                    or_unknown(line.created.map(time)),
                    or_unknown(line.python.clone()),
                    or_unknown(line.packages.map(|n| n.to_string())),
                    or_unknown(line.host.clone()),
                    or_unknown(line.signature.as_ref().map(Signature::sentence)),
                ]
            });
            write!(
                w,
                "{}",
                table(
                    &["VERSION", "", "CREATED", "PYTHON", "PACKAGES", "BUILT ON", "SIGNATURE"],
                    rows.collect(),
                    &[0, 4]
                )
            )
        })?;
        pointer?;
        if current.is_none() {
            context.out.say(format_args!("{0} was removed; bring it back: envfabric rollback {0}", self.environment));
        }
        Ok(ExitCode::SUCCESS)
    }
}
