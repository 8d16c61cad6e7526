//! Whose workflows are.
//!
//! `owners/<workflow>/<seq>.json`, claimed by linking as pointers are; the highest sequence number counts, and every one
//! that was ever written stays, so that none can be overlooked because a listing is old. A mount gives the directories of
//! the workflow this user, group and mode, and the kernel holds everybody to them.
//!
//! **Whoever cannot read what is said must let nobody in**: a document that is damaged, or that is not signed as this
//! machine asks for, is an error, and never stands for "nothing was said".
//!
//! A program that knows nothing of owners would show everything to everybody. So before the first of these documents is
//! written, `fabric.json` gets a feature (`owners`) with which such a program leaves the store alone.

use std::fs::File;
use std::io::ErrorKind::NotFound;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::environments::{host, numbers};
use super::fabric::OWNERS;
use super::fsck::{Finding, FsckReport, Severity};
use super::signed::Statement;
use super::{Fabric, Store, list_dirs, now, parse, publish, read_json, to_json};
use crate::environment::{EnvName, Owner};
use crate::error::{Error, IoContext, Kind, Result};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ownership {
    /// Format of this document, 1.
    pub format: u32,
    /// The workflow.
    pub workflow: String,
    /// Counts from 1.
    pub sequence: u64,
    /// Whose it is; none: everybody's who is let into the mount, as before anything was said.
    pub owner: Option<Owner>,
    /// When.
    pub at: Timestamp,
    /// Host that wrote it.
    pub by: String,
    /// Random.
    pub nonce: String,
}

impl Store {
    fn owner_path(&self, workflow: &str, sequence: u64) -> PathBuf {
        self.root.join("owners").join(workflow).join(format!("{sequence}.json"))
    }

    /// What is said of whose `workflow` is; none when nothing was ever said. There need not be such a workflow yet.
    ///
    /// # Errors
    /// [`Kind::Corrupt`], [`Kind::Unsupported`] or [`Kind::Rejected`] when the newest document cannot be believed: an
    /// older one is not taken instead. [`Store::set_owner`] writes a new one over it.
    pub fn owner(&self, workflow: &str) -> Result<Option<Ownership>> {
        let seen = self.newest_owner_seen(workflow)?;
        match self.last_owner(workflow)?.max(seen.unwrap_or(0)) {
            0 => {
                self.require_present()?;
                Ok(None)
            }
            sequence => match self.read_owner(workflow, sequence) {
                Err(error) if error.is_not_found() && seen == Some(sequence) => {
                    self.require_present()?;
                    Err(super::signed::owner_replayed(workflow, sequence))
                }
                Err(error) if error.is_not_found() => {
                    let what = format!("what was said of whose {workflow} is was taken away meanwhile");
                    Err(Error::new(Kind::Failed, what).with_source(error))
                }
                read => {
                    let ownership = read?;
                    self.note_owner(workflow, sequence, &ownership.nonce)?;
                    Ok(Some(ownership))
                }
            },
        }
    }

    /// False where nothing was ever said of any workflow. One request, which also shows that the store is still there. Where
    /// versions must be signed it says nothing: `fabric.json` is not signed.
    ///
    /// # Errors
    /// As [`Store::require_present`].
    pub(crate) fn may_have_owners(&self) -> Result<bool> {
        let features = self.features_now()?;
        Ok(self.trust().is_some() || features.incompatible.iter().any(|feature| feature == OWNERS))
    }

    /// The highest sequence number in use for `workflow`, 0 for none.
    fn last_owner(&self, workflow: &str) -> Result<u64> {
        require_workflow(workflow)?;
        let mut last = numbers(&self.root.join("owners").join(workflow))?.last().copied().unwrap_or(0);
        // A cached listing may be old; the next name is asked for directly, which NFS does not answer from it.
        loop {
            let path = self.owner_path(workflow, last + 1);
            match File::open(&path) {
                Err(error) if error.kind() == NotFound => return Ok(last),
                other => other.at("opening", &path)?,
            };
            last += 1;
        }
    }

    /// True unless document `sequence` is surely not there; whether that means anything is for [`Store::owner`] to say.
    pub(crate) fn may_have_owner(&self, workflow: &str, sequence: u64) -> bool {
        !File::open(self.owner_path(workflow, sequence)).is_err_and(|error| error.kind() == NotFound)
    }

    fn read_owner(&self, workflow: &str, sequence: u64) -> Result<Ownership> {
        let path = self.owner_path(workflow, sequence);
        let named = |error: Error| error.hint(format!("say it anew: `envfabric owner {workflow} --uid U`"));
        let bytes = publish::read(&path)?;
        let ownership: Ownership = parse(&path, &bytes).map_err(named)?;
        let wrong = |kind, what: &str| Error::new(kind, format!("{} {what}", path.display()));
        if ownership.format > 1 {
            return Err(wrong(Kind::Unsupported, "is of a newer format").hint("upgrade envfabric on this machine"));
        }
        let is_it = ownership.workflow == workflow && ownership.sequence == sequence;
        if !is_it || ownership.owner.is_some_and(|owner| !owner.is_valid()) {
            return Err(named(wrong(Kind::Corrupt, "says what it cannot say")));
        }
        self.admit_owner(workflow, sequence, &bytes)?;
        Ok(ownership)
    }

    /// Lets `workflow` be `owner`'s; for none, everybody's. What mounts show follows within about a second.
    pub fn set_owner(&self, workflow: &str, owner: Option<Owner>) -> Result<Ownership> {
        self.require_writable()?;
        self.require_signer()?;
        if owner.is_some_and(|owner| !owner.is_valid()) {
            return Err(Error::new(Kind::Usage, format!("{} stands for no user and no group", u32::MAX)));
        }
        let mut ownership = Ownership {
            format: 1,
            workflow: workflow.into(),
            sequence: 0,
            owner,
            at: now(),
            by: host(),
            nonce: publish::nonce()?,
        };
        let mut last = self.last_owner(workflow)?;
        self.ensure_owners_are_known()?;
        loop {
            // A store that was restored from a backup may have lost numbers that are in use.
            last = last.max(self.newest_owner_seen(workflow)?.unwrap_or(0));
            ownership.sequence = last + 1;
            let bytes = self.signed(Statement::Owner, workflow, ownership.sequence, &ownership)?;
            if publish::bytes(&self.root, &self.owner_path(workflow, ownership.sequence), &bytes)? {
                self.note_owner(workflow, ownership.sequence, &ownership.nonce)?;
                return Ok(ownership);
            }
            last = self.last_owner(workflow)?.max(last + 1);
        }
    }

    /// Has programs that know nothing of owners leave this store alone.
    fn ensure_owners_are_known(&self) -> Result<()> {
        self.require_present()?;
        let path = self.root.join("fabric.json");
        let mut fabric: Fabric = read_json(&path)?;
        let used = &mut fabric.features.incompatible;
        if used.iter().any(|feature| feature == OWNERS) {
            return Ok(());
        }
        used.push(OWNERS.into());
        // Two that do this at once write the same, and nothing else in it ever changes.
        publish::replace(&self.root, &path, &to_json(&fabric)?)
    }

    /// Workflows of whose owner something was said, sorted.
    pub fn owned_workflows(&self) -> Result<Vec<String>> {
        let mut names = list_dirs(&self.root.join("owners"))?;
        names.retain(|name| EnvName::is_part(name));
        Ok(names)
    }

    /// Adds to `report` what is wrong with what is said of owners.
    pub(super) fn check_owners(&self, report: &mut FsckReport) -> Result<()> {
        for workflow in self.owned_workflows()? {
            if let Err(error) = self.owner(&workflow) {
                report.findings.push(Finding {
                    severity: Severity::Error,
                    object: format!("owner of {workflow}"),
                    problem: error.chain(),
                    affects: Vec::new(),
                });
            }
        }
        Ok(())
    }
}

fn require_workflow(workflow: &str) -> Result<()> {
    match EnvName::is_part(workflow) {
        true => Ok(()),
        false => Err(Error::new(Kind::Usage, format!("{workflow:?} is not the name of a workflow"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::Mode;
    use crate::store::disk::{self, Op, Verdict, Watch};
    use std::sync::{Arc, Mutex};

    fn owner(uid: u32) -> Owner {
        Owner { uid, gid: 7, mode: Mode::GROUP }
    }

    #[test]
    fn the_newest_statement_counts_and_a_damaged_one_is_an_error_until_another_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(dir.path()).unwrap();
        assert_eq!(store.owner("w").unwrap(), None);
        assert_eq!(store.set_owner("w", Some(owner(5))).unwrap().sequence, 1);
        assert_eq!(store.set_owner("w", Some(owner(6))).unwrap().sequence, 2);
        assert_eq!(store.owner("w").unwrap().unwrap().owner, Some(owner(6)));
        assert_eq!(store.owner("other").unwrap(), None);
        let third = dir.path().join("owners/w/3.json");
        let other = std::fs::read(dir.path().join("owners/w/1.json")).unwrap();
        for bytes in [&b"{"[..], b"", &other] {
            std::fs::write(&third, bytes).unwrap();
            assert_eq!(store.owner("w").unwrap_err().kind(), Kind::Corrupt);
            assert!(!store.fsck(&|_, _| {}).unwrap().is_clean());
        }
        std::fs::remove_file(&third).unwrap();
        std::fs::create_dir(&third).unwrap();
        assert!(store.owner("w").is_err());
        assert_eq!(store.set_owner("w", None).unwrap().sequence, 4);
        assert_eq!(store.owner("w").unwrap().unwrap().owner, None);
        assert!(store.fsck(&|_, _| {}).unwrap().is_clean());
        // Something that is no directory says nothing, and that is not "nothing was said".
        std::fs::write(dir.path().join("owners/x"), "").unwrap();
        assert!(store.owner("x").is_err());
        for wrong in ["../w", "", ".w", "a/b"] {
            assert_eq!(store.owner(wrong).unwrap_err().kind(), Kind::Usage);
        }
        assert_eq!(store.set_owner("w", Some(owner(u32::MAX))).unwrap_err().kind(), Kind::Usage);
    }

    #[derive(Default)]
    struct Named(Mutex<Vec<PathBuf>>);

    impl Watch for Named {
        fn before(&self, _: &Op) -> Verdict {
            Verdict::Do
        }

        fn done(&self, op: &Op) {
            if let Op::Link(_, to) | Op::Rename(_, to) = op {
                self.0.lock().unwrap().push(to.clone());
            }
        }
    }

    #[test]
    fn programs_that_know_nothing_of_owners_are_kept_out_before_the_first_is_set() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(dir.path()).unwrap();
        let named = Arc::new(Named::default());
        let watching = disk::watch(dir.path(), named.clone());
        store.set_owner("w", Some(owner(5))).unwrap();
        store.set_owner("w", Some(owner(6))).unwrap();
        drop(watching);
        let expected = ["fabric.json", "owners/w/1.json", "owners/w/2.json"].map(|path| dir.path().join(path));
        assert_eq!(*named.0.lock().unwrap(), expected);
        let fabric = Store::open(dir.path()).unwrap().fabric().clone();
        assert_eq!(fabric.features.incompatible, [OWNERS]);
        assert_eq!((fabric.id, fabric.created), (store.fabric().id.clone(), store.fabric().created));
    }
}
