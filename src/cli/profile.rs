//! `envfabric profile`

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;

use super::Context;
use super::interrupt;
use super::output::bytes;
use super::run::inside;
use super::spec::{EnvSpec, spec};
use crate::error::{Error, IoContext, Kind, Result};
use crate::mount;

/// Record what a command reads of an environment, for cold nodes
///
/// The command runs in a mount of its own, so that everything it reads is seen. What it read is added to the profile in
/// the store, which nodes bring ahead of the environment's next first start there. Mounts of a distant store do so by
/// themselves for the first starts they see.
#[derive(Debug, clap::Args)]
pub(crate) struct Profile {
    /// WORKFLOW/NODE[@VERSION]
    #[arg(value_name = "WF/NODE", value_parser = spec)]
    environment: EnvSpec,
    /// The command and its arguments
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<OsString>,
}

impl Profile {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.store()?;
        store.require_writable()?;
        let index = Arc::new(context.index(&store)?);
        let version = self.environment.resolve(&store)?;
        interrupt::exit_on_signal(|| ())?;
        let Some((program, arguments)) = self.command.split_first() else { return Ok(ExitCode::SUCCESS) };
        let (status, read) = mount::profile(&store, index, &version, |dir| {
            let mut command = inside(&dir.join(".venv"), Command::new(program))?;
            command.args(arguments).status().at("running", Path::new(program))
        })?;
        if !status.success() {
            let what = format!("{} did not succeed ({status}): nothing was recorded", program.display());
            return Err(Error::new(Kind::Failed, what));
        }
        let read = read.unwrap_or_default();
        let profile = store.add_profile(&version.environment, version.number, &read)?;
        let value = serde_json::json!({
            "environment": version.environment.to_string(), "version": version.number, "starts": profile.starts,
            "read": { "objects": read.objects.len(), "bytes": read.bytes() },
            "profile": { "objects": profile.objects.len(), "bytes": profile.bytes() },
        });
        context.out.result(&value, |w| {
            let (count, all) = (read.objects.len(), profile.starts);
            writeln!(
                w,
                "read {} of {count} objects; the profile has {all} starts and {}",
                bytes(read.bytes()),
                bytes(profile.bytes())
            )
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
