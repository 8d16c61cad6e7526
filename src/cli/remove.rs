//! `envfabric remove`

use std::collections::BTreeSet;
use std::process::ExitCode;

use super::Context;
use super::spec::name;
use crate::environment::EnvName;
use crate::error::Result;
use crate::store::Store;

/// Drop an environment's name; `--undo` brings it back until its versions are collected
#[derive(Debug, clap::Args)]
#[command(visible_alias = "rm")]
pub(crate) struct Remove {
    /// WORKFLOW/NODE
    #[arg(value_name = "WF/NODE", value_parser = name, required = true)]
    environments: Vec<EnvName>,
    /// Bring back what was removed, at the version that was current
    #[arg(long)]
    undo: bool,
}

impl Remove {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.store()?;
        let names: BTreeSet<&EnvName> = self.environments.iter().collect();
        if self.undo {
            return self.bring_back(context, &store, &names);
        }
        // All or none: a mistake in the last name removes nothing.
        for name in &names {
            store.current_number(name)?;
        }
        let pointers = names.iter().map(|name| store.remove(name)).collect::<Result<Vec<_>>>()?;
        context.out.result(&pointers, |w| {
            for name in &names {
                writeln!(w, "removed {name}; undo: envfabric remove --undo {name}")?;
            }
            Ok(())
        })?;
        Ok(ExitCode::SUCCESS)
    }

    fn bring_back(&self, context: &Context, store: &Store, names: &BTreeSet<&EnvName>) -> Result<ExitCode> {
        let pointers = names.iter().map(|name| store.undo_remove(name)).collect::<Result<Vec<_>>>()?;
        context.out.result(&pointers, |w| {
            for (name, pointer) in names.iter().zip(&pointers) {
                writeln!(w, "{name} is back, at version {}", pointer.version.unwrap_or_default())?;
            }
            Ok(())
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
