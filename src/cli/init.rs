//! `envfabric init`

use std::path::PathBuf;
use std::process::ExitCode;

use super::Context;
use crate::error::Result;
use crate::store::Store;

/// Make a store (or find that it is there)
#[derive(Debug, clap::Args)]
pub(crate) struct Init {
    /// Directory, empty or missing [default: the store of the settings]
    dir: Option<PathBuf>,
}

impl Init {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let dir = self.dir.as_ref().unwrap_or(&context.settings.store);
        let existed = dir.join("fabric.json").exists();
        let store = Store::init(dir)?;
        let value = serde_json::json!({ "store": store.root().to_string_lossy(), "existed": existed, "fabric": store.fabric() });
        context.out.result(&value, |w| {
            let what = if existed { "there is a store at" } else { "made a store at" };
            writeln!(w, "{what} {}", store.root().display())
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
