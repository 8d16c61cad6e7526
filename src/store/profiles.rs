//! Profiles: what of a version its programs touched when they started.
//!
//! `envs/<workflow>/<node>/profiles/<n>.json`, which the union with another start replaces: beside `fabric.json` the
//! only documents that change under their name. Nothing needs them: a profile that is lost or wrong makes a first start
//! slower, or brings bytes that are not used, and of two starts that are added at the same time one may be lost. A name that
//! can be told costs a cold node three requests less than a directory to be listed.

use std::collections::HashMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::chunks::CHUNK_SIZE;
use super::object::{Object, Room};
use super::{Store, list_names, publish, read_json, to_json};
use crate::environment::{Digest, EnvName};
use crate::error::{Error, Kind, Result};

/// Starts after which a profile is taken for complete.
pub const STARTS_ENOUGH: u32 = 3;
/// Chunks that are not touched are brought along where they lie between touched ones, up to so many: a request less.
const GAP: u64 = 6;

/// What programs of a version touched when they started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// Format of this document, 1.
    pub format: u32,
    /// How many starts are in it.
    pub starts: u32,
    /// Objects in the order in which they were touched first.
    pub objects: Vec<Touched>,
}

/// What was touched of an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touched {
    /// Where it is.
    pub room: Room,
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// The layer whose catalog knows its chunks.
    pub layer: Digest,
    /// Runs of chunks, ascending: the first, and the one behind the last.
    pub runs: Vec<(u64, u64)>,
}

impl Touched {
    /// The object.
    pub fn object(&self) -> Object {
        Object { room: self.room, digest: self.digest, size: self.size }
    }

    /// Bytes of all its runs.
    pub fn bytes(&self) -> u64 {
        let at = |chunk: u64| chunk.saturating_mul(CHUNK_SIZE).min(self.size);
        self.runs.iter().fold(0, |sum: u64, (first, end)| sum.saturating_add(at(*end).saturating_sub(at(*first))))
    }
}

impl Profile {
    /// Of one start.
    pub fn of_start(objects: Vec<Touched>) -> Profile {
        let mut profile = Profile { format: 1, starts: 1, objects };
        profile.objects.iter_mut().for_each(|touched| touched.runs = joined(std::mem::take(&mut touched.runs)));
        profile
    }

    /// Bytes of everything in it.
    pub fn bytes(&self) -> u64 {
        self.objects.iter().fold(0, |sum, touched| sum.saturating_add(touched.bytes()))
    }

    /// True when there is nothing to learn from more starts.
    pub fn is_enough(&self) -> bool {
        self.starts >= STARTS_ENOUGH
    }

    /// The union with `other`; objects that are new come last.
    pub fn merged(mut self, other: Profile) -> Profile {
        let mut places: HashMap<Object, usize> =
            self.objects.iter().enumerate().map(|(at, touched)| (touched.object(), at)).collect();
        for touched in other.objects {
            match places.get(&touched.object()) {
                Some(at) => {
                    let known = &mut self.objects[*at].runs;
                    known.extend(touched.runs);
                    *known = joined(std::mem::take(known));
                }
                None => {
                    places.insert(touched.object(), self.objects.len());
                    self.objects.push(touched);
                }
            }
        }
        Profile { format: 1, starts: self.starts.saturating_add(other.starts), objects: self.objects }
    }
}

/// Runs in order, those that touch or nearly do made one.
fn joined(mut runs: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    runs.retain(|(first, end)| first < end);
    runs.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::with_capacity(runs.len());
    for (first, end) in runs {
        match joined.last_mut() {
            Some((_, last)) if first <= last.saturating_add(GAP) => *last = end.max(*last),
            _ => joined.push((first, end)),
        }
    }
    joined
}

impl Store {
    fn profiles_dir(&self, name: &EnvName) -> PathBuf {
        self.env_dir(name).join("profiles")
    }

    fn profile_path(&self, name: &EnvName, number: u64) -> PathBuf {
        self.profiles_dir(name).join(format!("{number}.json"))
    }

    /// Profiles of versions that are not among `versions`. What others have put beside them is not ours.
    pub(super) fn idle_profiles(&self, name: &EnvName, versions: &[u64]) -> Result<Vec<PathBuf>> {
        let is_idle = |file: &String| number_of(file).is_some_and(|number| !versions.contains(&number));
        let dir = self.profiles_dir(name);
        Ok(list_names(&dir)?.into_iter().filter(is_idle).map(|file| dir.join(file)).collect())
    }

    /// What is known of the starts of a version.
    pub fn profile(&self, name: &EnvName, number: u64) -> Result<Option<Profile>> {
        let profile: Profile = match read_json(&self.profile_path(name, number)) {
            Err(error) if error.is_not_found() => return Ok(None),
            profile => profile?,
        };
        if profile.format != 1 {
            return Err(Error::new(Kind::Unsupported, format!("the profile of {name}@{number} is of a newer format"))
                .hint("upgrade envfabric on this machine"));
        }
        Ok(Some(profile))
    }

    /// What is known of the starts of another version of `name`, the one whose number is nearest to `number`.
    pub fn profile_like(&self, name: &EnvName, number: u64) -> Result<Option<Profile>> {
        let files = list_names(&self.profiles_dir(name))?;
        let others = files.iter().filter_map(|file| number_of(file)).filter(|other| *other != number);
        match others.min_by_key(|other| (number.abs_diff(*other), *other > number)) {
            Some(other) => self.profile(name, other),
            None => Ok(None),
        }
    }

    /// Adds `start` to what is known of the starts of a version. One that shows nothing new counts as a start even if not
    /// all of it was seen: there is no more to learn from its like.
    pub fn add_profile(&self, name: &EnvName, number: u64, start: &Profile) -> Result<Profile> {
        self.require_writable()?;
        self.version(name, number)?;
        let known = match self.profile(name, number) {
            // Nothing is lost with it.
            Err(error) if error.kind() == Kind::Corrupt => None,
            known => known?,
        };
        let known = known.unwrap_or_default();
        if known.is_enough() {
            return Ok(known);
        }
        let mut profile = known.clone().merged(start.clone());
        if profile.objects == known.objects {
            profile.starts = profile.starts.max(known.starts + 1);
        }
        publish::make_dirs(&self.profiles_dir(name))?;
        publish::replace(&self.root, &self.profile_path(name, number), &to_json(&profile)?)?;
        Ok(profile)
    }
}

/// The version whose profile `file` is.
fn number_of(file: &str) -> Option<u64> {
    file.strip_suffix(".json")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touched(name: &[u8], runs: &[(u64, u64)]) -> Touched {
        let digest = Digest::of(name);
        Touched { room: Room::Blobs, digest, size: 100 << 20, layer: digest, runs: runs.to_vec() }
    }

    #[test]
    fn starts_are_merged_and_what_lies_close_is_brought_in_one_go() {
        let first = Profile::of_start(vec![touched(b"a", &[(19, 20), (0, 2), (3, 4)]), touched(b"b", &[(5, 6)])]);
        assert_eq!(first.objects[0].runs, [(0, 4), (19, 20)]);
        let second = Profile::of_start(vec![touched(b"c", &[(1, 2)]), touched(b"a", &[(4, 8)])]);
        let both = first.merged(second);
        assert_eq!((both.starts, both.is_enough()), (2, false));
        assert_eq!(both.objects[0].runs, [(0, 8), (19, 20)]);
        assert_eq!(
            both.objects.iter().map(|t| t.digest).collect::<Vec<_>>(),
            [b"a", b"b", b"c"].map(|n| Digest::of(n))
        );
        assert_eq!(both.objects[1].bytes(), CHUNK_SIZE);
        let wrong = Touched { size: 7, runs: vec![(0, u64::MAX), (5, 2), (u64::MAX, 0)], ..touched(b"d", &[]) };
        assert_eq!(wrong.bytes(), 7);
    }
}
