//! `envfabric remove`

use std::collections::BTreeSet;
use std::process::ExitCode;

use super::Context;
use super::spec::name;
use crate::environment::EnvName;
use crate::error::Result;

/// Drop an environment's name; its versions stay and `rollback` brings it back
#[derive(Debug, clap::Args)]
#[command(visible_alias = "rm")]
pub(crate) struct Remove {
    /// WORKFLOW/NODE
    #[arg(value_name = "WF/NODE", value_parser = name, required = true)]
    environments: Vec<EnvName>,
}

impl Remove {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.store()?;
        let names: BTreeSet<&EnvName> = self.environments.iter().collect();
        // All or none: a mistake in the last name removes nothing.
        for name in &names {
            store.current_number(name)?;
        }
        let pointers = names.iter().map(|name| store.remove(name)).collect::<Result<Vec<_>>>()?;
        context.out.result(&pointers, |w| {
            for name in &names {
                writeln!(w, "removed {name}; undo: envfabric rollback {name}")?;
            }
            Ok(())
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
