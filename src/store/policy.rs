//! What a store says of the signatures of what is in it.
//!
//! `policy/<seq>.json`, claimed by linking as pointers are; the highest sequence number counts. It is for those who
//! publish: `create`, `rollback` and `remove` refuse to write what the fleet would refuse to read. It protects nothing, as
//! whoever can write to the store can write a policy; nodes decide by the keys in their own configuration.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::environments::{host, numbers};
use super::{Store, now, publish, read_json, to_json};
use crate::environment::PublicKey;
use crate::error::{Error, Kind, Result};

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Format of this document, 1.
    pub format: u32,
    /// Counts from 1.
    pub sequence: u64,
    /// Public keys of those who may sign; none: nothing need be signed.
    pub keys: Vec<String>,
    /// When.
    pub at: Timestamp,
    /// Host that wrote it.
    pub by: String,
    /// Random.
    pub nonce: String,
}

impl Policy {
    /// Its keys; what is none is left out.
    pub fn public_keys(&self) -> Vec<PublicKey> {
        self.keys.iter().filter_map(|key| key.parse().ok()).collect()
    }
}

impl Store {
    /// The policy in force, if there ever was one.
    pub fn policy(&self) -> Result<Option<Policy>> {
        let dir = self.root.join("policy");
        let Some(sequence) = numbers(&dir)?.last().copied() else { return Ok(None) };
        let hint = "write it anew: `envfabric key require KEY...`";
        let policy: Policy = read_json(&dir.join(format!("{sequence}.json"))).map_err(|error| error.hint(hint))?;
        if policy.format != 1 {
            return Err(Error::new(Kind::Unsupported, "the policy of the store is of a newer format")
                .hint("upgrade envfabric on this machine"));
        }
        Ok(Some(policy))
    }

    /// Lets the store ask for versions signed by one of `keys`; for none, by nobody.
    pub fn set_policy(&self, keys: &[PublicKey]) -> Result<Policy> {
        self.require_writable()?;
        let dir = self.root.join("policy");
        let mut policy = Policy {
            format: 1,
            sequence: 0,
            keys: keys.iter().map(PublicKey::to_string).collect(),
            at: now(),
            by: host(),
            nonce: publish::nonce()?,
        };
        loop {
            policy.sequence = numbers(&dir)?.last().copied().unwrap_or(0) + 1;
            let path = dir.join(format!("{}.json", policy.sequence));
            if publish::bytes(&self.root, &path, &to_json(&policy)?)? {
                return Ok(policy);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::SecretKey;

    #[test]
    fn the_newest_policy_counts_and_a_damaged_one_is_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(dir.path()).unwrap();
        assert_eq!(store.policy().unwrap(), None);
        let key = SecretKey::new(&[3; 32], "release").unwrap().public();
        store.set_policy(std::slice::from_ref(&key)).unwrap();
        assert_eq!(store.policy().unwrap().unwrap().public_keys(), std::slice::from_ref(&key));
        assert_eq!(store.require_signer().unwrap_err().kind(), Kind::Rejected);
        std::fs::write(dir.path().join("policy/2.json"), "{").unwrap();
        assert_eq!(store.policy().unwrap_err().kind(), Kind::Corrupt);
        assert_eq!(store.set_policy(&[]).unwrap().sequence, 3);
        assert!(store.policy().unwrap().unwrap().public_keys().is_empty());
        store.require_signer().unwrap();
    }
}
