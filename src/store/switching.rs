//! Which version is current, when somebody says so: going back, removing, and undoing either while a collector may have
//! taken what is to come back.

use super::environments::{Pointer, no_environment, numbers};
use super::signed::Statement;
use super::{Store, host, now, publish};
use crate::environment::EnvName;
use crate::error::{Error, Kind, Result};

impl Store {
    /// Lets the newest number ever used be at least `number`, which is then never given again.
    pub(super) fn ensure_newest(&self, name: &EnvName, number: u64) -> Result<()> {
        loop {
            let (last, now_current) = self.last_pointer(name)?;
            if now_current.as_ref().is_some_and(|pointer| pointer.newest >= number) {
                return Ok(());
            }
            if let Some(pointer) = &now_current {
                self.require_repeatable(name, pointer)?;
            }
            let pointer = Pointer {
                format: 1,
                sequence: last + 1,
                version: now_current.and_then(|pointer| pointer.version),
                newest: number,
                at: now(),
                by: host(),
                reason: "collect".into(),
                nonce: publish::nonce()?,
            };
            self.require_signer()?;
            let bytes = self.signed(Statement::Pointer, name, pointer.sequence, &pointer)?;
            publish::bytes(&self.root, &self.pointer_path(name, pointer.sequence), &bytes)?;
        }
    }

    /// Writes down what version 1 says by being there, so that it need not be there for it.
    pub(super) fn point_again(&self, name: &EnvName) -> Result<()> {
        let Some(first) = self.first_pointer(name)? else { return Ok(()) };
        let pointer = Pointer { sequence: 2, by: host(), reason: "repair".into(), nonce: publish::nonce()?, ..first };
        self.require_signer()?;
        self.require_repeatable(name, &Pointer { sequence: 1, ..pointer.clone() })?;
        let bytes = self.signed(Statement::Pointer, name, 2, &pointer)?;
        publish::bytes(&self.root, &self.pointer_path(name, 2), &bytes).map(drop)
    }

    /// The sequence numbers of the pointers that are there, ascending.
    pub(super) fn pointer_sequences(&self, name: &EnvName) -> Result<Vec<u64>> {
        numbers(&self.env_dir(name).join("current"))
    }

    /// The version that was current before the environment was removed, or that is current.
    pub fn last_current(&self, name: &EnvName) -> Result<Option<u64>> {
        let sequences = numbers(&self.env_dir(name).join("current"))?;
        let versions = sequences.into_iter().rev().map(|sequence| self.read_pointer(name, sequence));
        match versions.flatten().find_map(|pointer| pointer.version) {
            None => Ok(self.first_pointer(name)?.and_then(|first| first.version)),
            last => Ok(last),
        }
    }

    /// Makes version `number` current, whatever is now. One that was collected comes back while it lies in the trash.
    pub fn rollback(&self, name: &EnvName, number: u64) -> Result<Pointer> {
        self.version(name, number)?;
        let document = self.below(&self.version_path(name, number));
        let there = || match self.bring_back(&document)? {
            true => Ok(()),
            false => Err(super::gc::collected(name, number)),
        };
        there()?;
        let pointer = self.point(name, Some(number), "rollback")?.ok_or_else(|| no_environment(name))?;
        // What a collector takes from now on, it brings back by itself.
        there()?;
        Ok(pointer)
    }

    /// Undoes [`Store::remove`]: the name is back, with the version that was current and all others that are there or in
    /// the trash.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when there never was such an environment, or its versions were collected for good;
    /// [`Kind::Invalid`] when it is there.
    pub fn undo_remove(&self, name: &EnvName) -> Result<Pointer> {
        let pointer = self.pointer(name)?.ok_or_else(|| no_environment(name))?;
        if let Some(current) = pointer.version {
            let what = format!("{name} was not removed: it is at version {current}");
            return Err(Error::new(Kind::Invalid, what).hint("nothing is to be done"));
        }
        for trashed in self.trashed()? {
            if trashed.below.path().starts_with(self.below(&self.env_dir(name)).path()) {
                self.bring_back(&trashed.below)?;
            }
        }
        let last = self.last_current(name)?;
        let number = match last {
            Some(number) if self.version(name, number).is_ok() => number,
            // What was current is gone; the newest that is there is next to it.
            _ => self.version_numbers(name)?.last().copied().ok_or_else(|| {
                Error::new(Kind::NotFound, format!("{name} was removed, and its versions were collected"))
                    .hint(format!("make it again with `envfabric create {name} ...`"))
            })?,
        };
        self.rollback(name, number)
    }

    /// Drops the name. Versions stay on the store until they are collected; [`Store::undo_remove`] brings the name back.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when there is no such environment.
    pub fn remove(&self, name: &EnvName) -> Result<Pointer> {
        self.point(name, None, "remove")?.ok_or_else(|| no_environment(name))
    }
}
