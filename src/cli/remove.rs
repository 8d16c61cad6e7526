//! `envfabric remove`

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
        let mut pointers = Vec::new();
        for name in &self.environments {
            pointers.push(store.remove(name)?);
        }
        context.out.result(&pointers, |w| {
            for name in &self.environments {
                writeln!(w, "removed {name}; undo: envfabric rollback {name}")?;
            }
            Ok(())
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
