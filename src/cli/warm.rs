//! `envfabric warm`

use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::Context;
use super::output::bytes;
use super::run::pinned_venv;
use super::spec::{EnvSpec, spec};
use crate::error::{Error, Kind, Result};
use crate::mount::{self, Warmed};

/// Bring an environment to this node ahead of use
///
/// What its starts read (its profile; without one, what programs are likely to need) is brought from the store to the
/// node cache by the running mount. Mounts the store if it is not mounted. A store that is read in place needs nothing.
#[derive(Debug, clap::Args)]
pub(crate) struct Warm {
    /// WORKFLOW/NODE[@VERSION]
    #[arg(value_name = "WF/NODE", value_parser = spec)]
    environment: EnvSpec,
    /// Bring all files and not only what starts read
    #[arg(long)]
    all: bool,
    /// Wait until it is here
    #[arg(long)]
    wait: bool,
}

/// How often a mount is asked how far it is.
const EVERY: Duration = Duration::from_millis(200);

impl Warm {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let venv = pinned_venv(context, &self.environment)?;
        let dir = venv.parent().unwrap_or(&venv);
        let mut warmed = mount::warm(dir, self.all, true)?;
        if self.wait {
            let bar = if context.out.terminal && !context.out.quiet { bar() } else { ProgressBar::hidden() };
            while !warmed.ended {
                std::thread::sleep(EVERY);
                warmed = mount::warm(dir, self.all, false)?;
                bar.set_length(warmed.total);
                bar.set_position(warmed.done);
            }
            bar.finish_and_clear();
        }
        if let Some(why) = &warmed.failed {
            return Err(Error::new(Kind::Failed, format!("{} is not all here: {why}", self.environment.name)));
        }
        let value = serde_json::json!({ "environment": self.environment.name.to_string(), "warmed": warmed });
        context.out.result(&value, |w| match warmed {
            Warmed { ended: true, total: 0, .. } => writeln!(w, "{} needs nothing more here", self.environment.name),
            Warmed { ended: true, total, .. } => writeln!(w, "{} is here, {}", self.environment.name, bytes(total)),
            _ => writeln!(w, "{} is on its way", self.environment.name),
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {bytes} of {total_bytes}, {bytes_per_sec}");
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
