//! `envfabric init`

use std::path::PathBuf;
use std::process::ExitCode;

use super::Context;
use crate::error::{Error, IoContext, Kind, Result};
use crate::mount;
use crate::store::{Codec, Store};

/// Make a store (or find that it is there)
#[derive(Debug, clap::Args)]
pub(crate) struct Init {
    /// Directory, empty or missing [default: the store of the settings]
    dir: Option<PathBuf>,
    /// How files lie in a new store: `none` lets machines with the store on a local disk read them in place, `zstd` makes
    /// them smaller on the way over a network [default: none on a local disk, else zstd]
    #[arg(long, value_name = "HOW")]
    compression: Option<Compression>,
}

/// How files lie in a store.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Compression {
    None,
    Zstd,
}

impl Init {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let dir = self.dir.as_ref().unwrap_or(&context.settings.store);
        let existed = dir.join("fabric.json").exists();
        std::fs::create_dir_all(dir).at("creating", dir)?;
        let codec = match self.compression {
            Some(Compression::None) => Codec::Raw,
            Some(Compression::Zstd) => Codec::Zstd,
            None if mount::is_local(dir) => Codec::Raw,
            None => Codec::Zstd,
        };
        let store = Store::init_with(dir, codec)?;
        if self.compression.is_some() && store.codec() != codec {
            let what = format!("the store at {} is there already, with another compression", dir.display());
            return Err(Error::new(Kind::Invalid, what).hint("it is decided once: make another store"));
        }
        let value = serde_json::json!({ "store": store.root().to_string_lossy(), "existed": existed, "fabric": store.fabric() });
        context.out.result(&value, |w| {
            let what = if existed { "there is a store at" } else { "made a store at" };
            writeln!(w, "{what} {}", store.root().display())
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
