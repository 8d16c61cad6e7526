//! `envfabric completions` and `envfabric man`: made from the same definitions as the parser.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap_complete::Shell;

use crate::error::{IoContext, Result};

/// Print a completion script for a shell
#[derive(Debug, clap::Args)]
pub(crate) struct Completions {
    /// The shell
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(&self, command: &mut clap::Command) -> Result<ExitCode> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, command, "envfabric", &mut script);
        std::io::stdout().write_all(&script).at("writing to", "standard output")?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Write the man pages
#[derive(Debug, clap::Args)]
pub(crate) struct Man {
    /// Directory for one page a verb; without it the main page goes to standard output
    dir: Option<PathBuf>,
}

impl Man {
    pub(crate) fn run(&self, command: clap::Command) -> Result<ExitCode> {
        match &self.dir {
            Some(dir) => {
                std::fs::create_dir_all(dir).at("creating", dir)?;
                clap_mangen::generate_to(command, dir).at("writing man pages to", dir)?;
            }
            None => {
                let mut page = Vec::new();
                clap_mangen::Man::new(command).render(&mut page).at("writing", "the man page")?;
                std::io::stdout().write_all(&page).at("writing to", "standard output")?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
