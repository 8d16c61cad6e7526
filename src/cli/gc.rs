//! `envfabric gc`

use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::output::bytes;
use super::{Context, interrupt, spec};
use crate::error::Result;
use crate::store::{Amount, GRACE, GcOptions, GcStep, Keep};

/// Remove what no version needs; safe while others build, mount and collect
#[derive(Debug, clap::Args)]
#[command(after_help = "\
What is not needed moves to the trash, where readers still find it, and goes for good with the first
collection after the grace time. Versions in use by a mount stay.")]
pub(crate) struct Gc {
    /// Change nothing, tell what would be done
    #[arg(long)]
    dry_run: bool,
    /// Leave alone what is younger, and keep the trash for so long: longer than any build takes [default: 24h]
    #[arg(long, value_name = "TIME", value_parser = spec::duration)]
    grace: Option<Duration>,
    /// Keep the newest N versions of each environment, the current one counted [default: all]
    #[arg(long, value_name = "N", conflicts_with = "keep_for", value_parser = clap::value_parser!(u32).range(1..))]
    keep: Option<u32>,
    /// Keep versions that were published, or current, within TIME [default: all]
    #[arg(long, value_name = "TIME", value_parser = spec::duration)]
    keep_for: Option<Duration>,
}

impl Gc {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.store()?;
        let keep = match (self.keep, self.keep_for) {
            (Some(count), _) => Keep::Newest(count as usize),
            (None, Some(time)) => Keep::For(time),
            (None, None) => Keep::All,
        };
        let options = GcOptions { grace: self.grace.unwrap_or(GRACE), keep, dry_run: self.dry_run };
        let bar =
            if context.out.terminal && !context.out.quiet { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{spinner:.green} {msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        let shown = bar.clone();
        interrupt::exit_on_signal(move || shown.finish_and_clear())?;
        let report = store.gc(&options, &|step| match step {
            GcStep::Marking => bar.set_message("reading what is needed"),
            GcStep::Sweeping(files) => bar.set_message(format!("looked at {files} files")),
            GcStep::LookingAgain => bar.set_message("reading what was published meanwhile"),
            GcStep::Removing(files) => bar.set_message(format!("removed {files} files")),
        });
        bar.finish_and_clear();
        let report = report?;
        context.out.result(&report, |w| {
            let amount = |amount: &Amount| format!("{} files, {}", amount.files, bytes(amount.bytes));
            let would = if report.dry_run { "would be " } else { "" };
            for version in &report.retired {
                writeln!(w, "{would}retired: {version}")?;
            }
            for (room, trashed) in &report.trashed {
                writeln!(w, "{would}moved to the trash: {room}, {}", amount(trashed))?;
            }
            if report.restored > 0 {
                writeln!(w, "{would}brought back: {} files", report.restored)?;
            }
            if report.removed.files > 0 {
                writeln!(w, "{would}removed for good: {}", amount(&report.removed))?;
            }
            if report.cleared.files > 0 {
                writeln!(w, "{would}cleared: {} (unfinished or superseded)", amount(&report.cleared))?;
            }
            writeln!(
                w,
                "{} versions stay, {} of them in use; in the trash: {}",
                report.versions,
                report.leased,
                amount(&report.in_trash)
            )
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
