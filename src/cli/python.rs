//! `envfabric python`

use std::process::ExitCode;

use super::Context;
use super::output::{table, time};
use super::progress::Shown;
use crate::build::{self, Uv};
use crate::error::Result;
use crate::store::StoredInterpreter;

/// List the interpreters of the store, or add one
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Python {
    /// List the interpreters of the store
    #[command(visible_alias = "ls")]
    List,
    /// Make sure that an interpreter is in the store
    Add {
        /// A version (3.11, 3.11.7, '>=3.9,<3.12') or the path of an interpreter
        #[arg(value_name = "X")]
        python: String,
    },
}

impl Python {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        match self {
            Python::List => {
                let store = context.store()?;
                let all = store.interpreters()?;
                context.out.result(&all, |w| {
                    if all.is_empty() {
                        return writeln!(w, "no interpreters yet; `create` adds what it needs");
                    }
                    let rows = all.iter().map(|i| {
                        vec![
                            i.python.version.clone(),
                            i.python.abi.clone(),
                            i.python.host_libraries.len().to_string(),
                            time(i.created),
                            i.origin.clone(),
                        ]
                    });
                    write!(w, "{}", table(&["PYTHON", "ABI", "HOST LIBS", "ADDED", "TAKEN FROM"], rows.collect(), &[2]))
                })?;
            }
            Python::Add { python } => {
                let store = context.store_or_default()?;
                let index = context.index(&store)?;
                let uv = Uv::new(context.settings.config.uv.clone());
                let shown = Shown::interruptible(&context.out)?;
                let build = context.builds(&store, &index, &uv, &*shown)?;
                let added = build::add_interpreter(&build, python);
                shown.clear();
                let added = added?;
                context.out.result(&added, |w| describe(w, &added))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn describe(w: &mut dyn std::io::Write, added: &StoredInterpreter) -> std::io::Result<()> {
    writeln!(w, "{} (from {})", added.name, added.origin)?;
    writeln!(w, "needs from the host: {}", added.python.host_libraries.join(" "))?;
    for (module, reason) in &added.python.broken_modules {
        writeln!(w, "does not import: {module}: {reason}")?;
    }
    Ok(())
}
