//! `envfabric index`

use std::process::ExitCode;

use super::Context;
use crate::error::Result;

/// What this machine knows of the store
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Index {
    /// Begin the index anew from what the store says; nothing else is lost with it
    Rebuild(Rebuild),
}

/// Begin the index anew
#[derive(Debug, clap::Args)]
pub(crate) struct Rebuild {}

impl Index {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let Index::Rebuild(_) = self;
        let store = context.store()?;
        context.settings.state()?;
        context.forget(&store)?;
        let index = context.index(&store)?;
        let learned = index.learn_all(&store)?;
        let path = index.path().display().to_string();
        let value = serde_json::json!({
            "index": path, "layers": learned.layers, "keys": learned.keys, "damaged": learned.damaged,
        });
        context.out.result(&value, |w| {
            writeln!(w, "{path}: {} layers, {} keys", learned.layers, learned.keys)?;
            if learned.damaged > 0 {
                writeln!(w, "{} documents cannot be read: run `envfabric fsck`", learned.damaged)?;
            }
            Ok(())
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
