//! `envfabric rollback`

use std::process::ExitCode;

use super::Context;
use super::spec::name;
use crate::environment::EnvName;
use crate::error::{Error, Kind, Result};

/// Make another version the current one (also brings back what was removed)
#[derive(Debug, clap::Args)]
pub(crate) struct Rollback {
    /// WORKFLOW/NODE
    #[arg(value_name = "WF/NODE", value_parser = name)]
    environment: EnvName,
    /// Version number [default: the one before the current; of a removed environment the one it had]
    #[arg(value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    version: Option<u64>,
}

impl Rollback {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.store()?;
        let name = &self.environment;
        let (current, number) = match self.version {
            // Named explicitly: goes over a damaged pointer too.
            Some(number) => match store.pointer(name) {
                Ok(pointer) => (Some(pointer.and_then(|p| p.version)), number),
                Err(_) => (None, number),
            },
            None => {
                let current = store.pointer(name)?.and_then(|p| p.version);
                let before = match current {
                    Some(current) => store.version_numbers(name)?.into_iter().rfind(|n| *n < current),
                    None => store.last_current(name)?,
                };
                let number = before.ok_or_else(|| match current {
                    Some(current) => Error::new(Kind::NotFound, format!("{name} has no version before {current}"))
                        .hint(format!("name one: `envfabric versions {name}`")),
                    None => Error::new(Kind::NotFound, format!("there is no environment {name}"))
                        .hint("see `envfabric list`"),
                })?;
                (Some(current), number)
            }
        };
        let pointer = store.rollback(name, number)?;
        context.out.result(&pointer, |w| match current {
            Some(Some(before)) => writeln!(w, "{name} is at version {number} now (was {before})"),
            Some(None) => writeln!(w, "{name} is back, at version {number}"),
            None => writeln!(w, "{name} is at version {number} now"),
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
