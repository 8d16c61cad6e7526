//! `envfabric fsck`

use std::collections::BTreeMap;
use std::io::Write;
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::Context;
use super::output::bytes;
use super::progress::Shown;
use crate::build::{self, IndexOptions, Repaired, Uv};
use crate::environment::Digest;
use crate::error::Result;
use crate::store::{FsckReport, PutAside, Severity, Store};

/// Check every object of the store against its name, and every reference
#[derive(Debug, clap::Args)]
pub(crate) struct Fsck {
    /// Build damaged layers again from their locks, and put aside what nobody can read or needs; keeps everything else
    #[arg(long)]
    repair: bool,
    /// Read at most so many bytes a second, to disturb nobody: 20MB
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    rate: Option<u64>,
}

/// Bytes a second for clap.
fn rate(text: &str) -> Result<u64, String> {
    let rate = super::cache::size(text)?.as_u64();
    if rate > 0 { Ok(rate) } else { Err("nothing would ever be read: write for example 20MB".into()) }
}

/// What a repair did.
#[derive(Debug, Serialize)]
struct Repair {
    layers: BTreeMap<Digest, Repaired>,
    #[serde(flatten)]
    aside: PutAside,
}

#[derive(Debug, Serialize)]
struct Told<'a> {
    #[serde(flatten)]
    report: &'a FsckReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    repair: Option<&'a Repair>,
}

impl Fsck {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.store()?;
        if self.repair {
            store.require_writable()?;
        }
        let mut report = self.check(context, &store)?;
        let mut repair = None;
        if self.repair && !report.is_clean() {
            if !context.out.json {
                context.out.result(&report, |w| tell(&report, w))?;
            }
            repair = Some(self.repair(context, &store, &report)?);
            report = self.check(context, &store)?;
        }
        let told = Told { report: &report, repair: repair.as_ref() };
        context.out.result(&told, |w| {
            if let Some(repair) = &repair {
                tell_repair(repair, w)?;
            }
            tell(&report, w)
        })?;
        Ok(ExitCode::from(u8::from(!report.is_clean())))
    }

    fn check(&self, context: &Context, store: &Store) -> Result<FsckReport> {
        let bar = if context.out.terminal && !context.out.quiet { ProgressBar::new(0) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("checking {bar:30} {pos}/{len} objects {eta}") {
            bar.set_style(style);
        }
        let report = store.fsck_at(self.rate, &|done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        });
        bar.finish_and_clear();
        report
    }

    fn repair(&self, context: &Context, store: &Store, report: &FsckReport) -> Result<Repair> {
        let mut kept = store.keep_damaged(report)?;
        let mut layers = BTreeMap::new();
        if !report.damaged_layers().is_empty() {
            // What it knows may be of documents that are damaged.
            context.forget(store)?;
            let index = context.index(store)?;
            let uv = Uv::new(context.settings.config.uv.clone());
            let shown = Shown::interruptible(&context.out)?;
            let config = &context.settings.config;
            let options = IndexOptions {
                index_url: config.index_url.clone(),
                extra_index_urls: config.extra_index_urls.clone(),
                ..IndexOptions::default()
            };
            let building = context.builds(store, &index, &uv, &*shown)?;
            let repaired = build::repair(&building, report.damaged_layers(), &options);
            shown.clear();
            layers = repaired?;
        }
        let aside = store.repair_documents(report)?;
        kept.moved.extend(aside.moved);
        kept.copied.retain(|path| !kept.moved.contains(path));
        kept.made_again = aside.made_again;
        Ok(Repair { layers, aside: kept })
    }
}

fn tell_repair(repair: &Repair, w: &mut dyn Write) -> std::io::Result<()> {
    writeln!(w)?;
    for (layer, outcome) in &repair.layers {
        let layer = layer.short();
        match outcome {
            Repaired::Rebuilt => writeln!(w, "repaired: layer {layer} was built again"),
            Repaired::Differs { layer: other } => {
                writeln!(w, "not repaired: layer {layer} comes out as {} now; what is left of it stays", other.short())
            }
            Repaired::Failed { reason } => writeln!(w, "not repaired: layer {layer}: {reason}"),
        }?;
    }
    if repair.aside.made_again > 0 {
        writeln!(w, "repaired: {} summaries and bundles", repair.aside.made_again)?;
    }
    for path in &repair.aside.moved {
        writeln!(w, "moved to quarantine/: {path}")?;
    }
    for path in &repair.aside.copied {
        writeln!(w, "kept in quarantine/ as it was: {path}")?;
    }
    Ok(())
}

fn tell(report: &FsckReport, w: &mut dyn Write) -> std::io::Result<()> {
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
}
