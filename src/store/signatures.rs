//! Who has signed what of a store, for those who ask.

use std::collections::BTreeMap;

use serde::Serialize;

use super::fsck::{Finding, FsckReport, Severity};
use super::{Signature, Store, TrustedKeys, in_parallel};
use crate::environment::EnvName;
use crate::error::Result;

/// How many versions each has signed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Signatures {
    /// By what the signatures say ([`Signature::sentence`]), in that order.
    pub counts: BTreeMap<String, usize>,
    /// Versions whose signatures this machine, or the store's policy, does not accept: `workflow/node@3`, and why.
    pub refused: Vec<(String, String)>,
}

impl Store {
    /// The signatures of every version; or of the current ones alone, and of no more environments than `most`.
    pub fn signatures(&self, trust: Option<&TrustedKeys>, current: bool, most: usize) -> Result<Signatures> {
        let plain = self.unchecked();
        let policy = plain.policy()?.map(|policy| policy.public_keys()).filter(|keys| !keys.is_empty());
        let mut names = Vec::new();
        'all: for workflow in plain.workflows()? {
            for node in plain.nodes(&workflow)? {
                if names.len() >= most {
                    break 'all;
                }
                names.push(EnvName::new(&workflow, &node)?);
            }
        }
        let of = |name: &EnvName| -> Result<Vec<(u64, Signature)>> {
            let numbers = match current {
                true => plain.pointer(name)?.and_then(|pointer| pointer.version).into_iter().collect(),
                false => plain.version_numbers(name)?,
            };
            let mut found = Vec::new();
            for number in numbers {
                found.extend(plain.signature(name, number, trust)?.map(|signature| (number, signature)));
            }
            Ok(found)
        };
        let mut all = Signatures::default();
        for (name, found) in names.iter().zip(in_parallel(&names, of)) {
            // What cannot be read is told by others.
            for (number, signature) in found.unwrap_or_default() {
                let accepted = match (&signature, trust, &policy) {
                    (Signature::Trusted { .. }, ..) | (_, None, None) => true,
                    (Signature::UnknownKey { key }, None, Some(keys)) => keys.contains(key),
                    _ => false,
                };
                if !accepted {
                    all.refused.push((format!("{name}@{number}"), signature.sentence()));
                }
                *all.counts.entry(signature.sentence()).or_default() += 1;
            }
        }
        Ok(all)
    }

    /// Adds what is to be said of signatures to `report`, where this machine or the store asks for them: an error of a
    /// version that would be refused, and a note of how many each key has signed.
    pub(super) fn check_signatures(&self, report: &mut FsckReport) -> Result<()> {
        let found = self.signatures(self.trust(), false, usize::MAX)?;
        let finding = |severity, object: &str, problem: &str| Finding {
            severity,
            object: object.into(),
            problem: problem.into(),
            affects: Vec::new(),
        };
        if found.counts.keys().any(|sentence| *sentence != Signature::Unsigned.sentence()) {
            let counts = found.counts.iter().map(|(sentence, count)| format!("{count} {sentence}"));
            let counts = counts.collect::<Vec<_>>().join(", ");
            report.findings.push(finding(Severity::Note, "versions", &counts));
        }
        for (object, why) in &found.refused {
            // Where this machine refuses it, that was told when it was read.
            if self.trust().is_none() {
                report.findings.push(finding(Severity::Error, object, why));
            }
        }
        Ok(())
    }
}
