//! `envfabric diff`

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;

use serde::Serialize;

use super::Context;
use super::output::{bytes, table};
use super::spec::{EnvSpec, spec};
use crate::environment::Version;
use crate::error::Result;
use crate::store::{Index, LayerDoc, Store};

/// Compare two environments, or two versions of one
#[derive(Debug, clap::Args)]
pub(crate) struct Diff {
    /// WORKFLOW/NODE[@VERSION]
    #[arg(value_name = "A", value_parser = spec)]
    a: EnvSpec,
    /// WORKFLOW/NODE[@VERSION]
    #[arg(value_name = "B", value_parser = spec)]
    b: EnvSpec,
}

#[derive(Serialize)]
struct Change {
    package: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    a: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    b: Option<String>,
    /// Bytes of `b` less those of `a`.
    bytes: i64,
    /// Same version, other files: built again, or for another ABI.
    rebuilt: bool,
}

#[derive(Serialize)]
struct Difference {
    a: String,
    b: String,
    python: Option<(String, String)>,
    changes: Vec<Change>,
    same: usize,
}

impl Diff {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.store()?;
        let index = context.index(&store)?;
        let (a, b) = (self.a.resolve(&store)?, self.b.resolve(&store)?);
        let (pa, pb) = (packages(&store, &index, &a)?, packages(&store, &index, &b)?);
        let mut changes = Vec::new();
        let mut same = 0;
        let mut names: Vec<&String> = pa.keys().chain(pb.keys()).collect();
        names.sort();
        names.dedup();
        for name in names {
            let (a, b) = (pa.get(name), pb.get(name));
            if a.map(|l| l.digest) == b.map(|l| l.digest) {
                same += 1;
                continue;
            }
            let version = |l: Option<&Arc<LayerDoc>>| l.map(|l| l.meta.version.clone());
            let size = |l: Option<&Arc<LayerDoc>>| l.map_or(0, |l| l.bytes as i64);
            changes.push(Change {
                package: name.clone(),
                rebuilt: version(a) == version(b),
                a: version(a),
                b: version(b),
                bytes: size(b) - size(a),
            });
        }
        let (va, vb) = (&a.interpreter, &b.interpreter);
        let difference = Difference {
            a: format!("{}@{}", a.environment, a.number),
            b: format!("{}@{}", b.environment, b.number),
            python: (va != vb).then(|| (va.version.clone(), vb.version.clone())),
            changes,
            same,
        };
        context.out.result(&difference, |w| {
            if let Some((a, b)) = &difference.python {
                writeln!(w, "python {a} -> {b}")?;
            }
            if !difference.changes.is_empty() {
                let rows = difference.changes.iter().map(|c| {
                    let told = |v: &Option<String>| v.clone().unwrap_or_else(|| "-".into());
                    let sign = if c.bytes < 0 { "-" } else { "+" };
                    let b = if c.rebuilt { format!("{} (rebuilt)", told(&c.b)) } else { told(&c.b) };
                    vec![c.package.clone(), told(&c.a), b, format!("{sign}{}", bytes(c.bytes.unsigned_abs()))]
                });
                let header = ["PACKAGE", difference.a.as_str(), difference.b.as_str(), "SIZE"];
                write!(w, "{}", table(&header, rows.collect(), &[3]))?;
            }
            writeln!(w, "{} packages differ, {} are the same", difference.changes.len(), difference.same)
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

fn packages(store: &Store, index: &Index, version: &Version) -> Result<BTreeMap<String, Arc<LayerDoc>>> {
    let layers = index.layers(store, &version.layers)?;
    Ok(layers.into_iter().map(|l| (l.meta.name.clone(), l)).collect())
}
