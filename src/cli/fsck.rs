//! `envfabric fsck`

use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};

use super::Context;
use super::output::bytes;
use crate::error::Result;
use crate::store::Severity;

/// Check every object of the store against its name, and every reference
#[derive(Debug, clap::Args)]
pub(crate) struct Fsck {
    /// Read at most so many bytes a second, to disturb nobody: 20MB
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    rate: Option<u64>,
}

/// Bytes a second for clap.
fn rate(text: &str) -> Result<u64, String> {
    let rate = super::cache::size(text)?.as_u64();
    if rate > 0 { Ok(rate) } else { Err("nothing would ever be read: write for example 20MB".into()) }
}

impl Fsck {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.store()?;
        let bar = if context.out.terminal && !context.out.quiet { ProgressBar::new(0) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("checking {bar:30} {pos}/{len} objects {eta}") {
            bar.set_style(style);
        }
        let report = store.fsck_at(self.rate, &|done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        });
        bar.finish_and_clear();
        let report = report?;
        context.out.result(&report, |w| {
            for finding in &report.findings {
                let severity = match finding.severity {
                    Severity::Error => "error",
                    Severity::Note => "note",
                };
                writeln!(w, "{severity}: {} {}", finding.object, finding.problem)?;
                if !finding.affects.is_empty() {
                    writeln!(w, "       needed by {}", finding.affects.join(", "))?;
                }
            }
            let errors = report.findings.iter().filter(|f| f.severity == Severity::Error).count();
            writeln!(
                w,
                "{} versions, {} layers, {} objects, {} checked: {}",
                report.versions,
                report.layers,
                report.objects,
                bytes(report.bytes),
                if errors == 0 { "all sound".to_string() } else { format!("{errors} damaged") }
            )
        })?;
        Ok(ExitCode::from(u8::from(!report.is_clean())))
    }
}
