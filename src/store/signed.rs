//! Signed documents: versions, pointers and owners that say who made them.
//!
//! ```text
//! {...,"signed":{"by":"ed25519:<64 digits>","signature":"<128 digits>"},"seal":"..."}
//!  ^ signed bytes                                                        as of every document
//! ```
//!
//! What is signed is a heading and every byte of the document before the signature:
//!
//! ```text
//! envfabric signed document 1\n  version | pointer \n  id of the store \n  workflow/node \n  number \n  {...
//! envfabric signed document 1\n  owner \n  id of the store \n  workflow \n  number \n  {...
//! ```
//!
//! The heading is not in the document: whoever checks makes it of what was asked for. So a document that is put under
//! another name or number, or into another store, has a signature of something else. None of its lines can have a line
//! feed in it, nor has the document, so no two statements have the same bytes.
//!
//! **The signature is in the document**, not beside it: one link publishes both, a reader needs no second file, and what
//! collects, copies or restores documents cannot tear them apart. For that, what is published unsigned stays so; making
//! it again with a key writes a new version, of a few KB.
//!
//! **What a version's signature covers.** The document names its summaries by sha256; these have the documents of its
//! layers, which name catalogs and packs by sha256; catalogs have names, modes, sizes and targets, and the digests of all
//! chunks. A [`TrustedKeys`] takes nothing from elsewhere: a layer's own document, `layers/<digest>.json`, is covered by
//! nothing and is not read. (`src/view/vouched.rs`)
//!
//! **Who decides** what is good enough is the node: its own configuration names the keys. What the store says of itself
//! ([`super::Policy`]) helps those who publish, and nobody else.

use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use super::seal;
use super::seen::Seen;
use super::{Pointer, Store, publish};
use crate::environment::{EnvName, PUBLIC, PublicKey, SIGNATURE_SIZE, SecretKey, Version};
use crate::error::{Error, Kind, Result};

const BEFORE: &str = ",\"signed\":{\"by\":\"ed25519:";
const BETWEEN: &str = "\",\"signature\":\"";
const AFTER: &str = "\"}";
const KEY_DIGITS: usize = 64;
const SIGNATURE_DIGITS: usize = SIGNATURE_SIZE * 2;

/// How many keys a machine may trust: a mount tells all of them in one extended attribute.
pub const KEYS_MAX: usize = 64;

/// What is signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Statement {
    Version,
    Pointer,
    Owner,
}

/// Keys that this machine trusts, and what it has seen of what they signed.
#[derive(Debug)]
pub struct TrustedKeys {
    keys: Vec<PublicKey>,
    pub(super) seen: Seen,
}

impl TrustedKeys {
    /// In `keys`, with a memory in directory `dir` of what was seen of `store`; without one in this process alone.
    ///
    /// # Errors
    /// [`Kind::Usage`] when there are more than [`KEYS_MAX`]; [`Kind::Failed`] when the memory cannot be used.
    pub fn new(keys: Vec<PublicKey>, dir: Option<&Path>, store: &Store) -> Result<TrustedKeys> {
        if keys.len() > KEYS_MAX {
            let what = format!("{} keys are too many to trust", keys.len());
            return Err(Error::new(Kind::Usage, what).hint(format!("name at most {KEYS_MAX}")));
        }
        let seen = match dir {
            Some(dir) => Seen::open(dir, &store.fabric().id)?,
            None => Seen::in_memory()?,
        };
        Ok(TrustedKeys { keys, seen })
    }

    /// The keys.
    pub fn keys(&self) -> &[PublicKey] {
        &self.keys
    }

    /// Forgets what was seen of `name`, an environment or a workflow; false when that was nothing.
    pub fn forget(&self, name: impl Display) -> Result<bool> {
        self.seen.forget(&name.to_string())
    }

    /// `key` as it is called here, where it is trusted.
    fn known(&self, key: &PublicKey) -> Option<&PublicKey> {
        self.keys.iter().find(|known| *known == key)
    }
}

/// What a store's documents are signed and checked with here.
#[derive(Debug, Clone, Default)]
pub(super) struct Signing {
    signer: Option<Arc<SecretKey>>,
    trust: Option<Arc<TrustedKeys>>,
}

/// What the signature of a document says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Signature {
    /// There is none.
    Unsigned,
    /// It is right, by a key that this machine trusts.
    Trusted {
        /// The key.
        key: PublicKey,
    },
    /// It is right, by a key that this machine was not told to trust.
    UnknownKey {
        /// The key.
        key: PublicKey,
    },
    /// It is not of this document: that was altered, or is of another name, number or store.
    Wrong {
        /// The key that is said to have signed.
        key: PublicKey,
    },
}

impl Signature {
    /// For people, `signed by release (ed25519:1a2b3c)`.
    pub fn sentence(&self) -> String {
        match self {
            Signature::Unsigned => "not signed".into(),
            Signature::Trusted { key } => format!("signed by {}", key.label()),
            Signature::UnknownKey { key } => format!("signed by {}, which is not among the trusted keys", key.label()),
            Signature::Wrong { key } => format!("the signature of {} is not of this document", key.label()),
        }
    }
}

/// The bytes that are signed.
fn message(statement: Statement, store: &str, name: &dyn Display, number: u64, body: &[u8]) -> Vec<u8> {
    let statement = match statement {
        Statement::Version => "version",
        Statement::Pointer => "pointer",
        Statement::Owner => "owner",
    };
    let heading = format!("envfabric signed document 1\n{statement}\n{store}\n{name}\n{number}\n");
    [heading.as_bytes(), body].concat()
}

/// The member that a signature is.
fn member(key: &PublicKey, signature: &[u8; SIGNATURE_SIZE]) -> Vec<u8> {
    format!("{BEFORE}{}{BETWEEN}{}{AFTER}", hex::encode(key.as_bytes()), hex::encode(signature)).into_bytes()
}

/// The signed bytes, key and signature of the document with these bytes.
fn split(bytes: &[u8]) -> Option<(&[u8], PublicKey, [u8; SIGNATURE_SIZE])> {
    let length = BEFORE.len() + KEY_DIGITS + BETWEEN.len() + SIGNATURE_DIGITS + AFTER.len();
    let text = seal::sealed(bytes)?;
    let (body, member) = text.split_at(text.len().checked_sub(length)?);
    let member = member.strip_prefix(BEFORE.as_bytes())?.strip_suffix(AFTER.as_bytes())?;
    let (digits, rest) = member.split_at_checked(KEY_DIGITS)?;
    let mut key = [0; 32];
    hex::decode_to_slice(digits, &mut key).ok()?;
    let mut signature = [0; SIGNATURE_SIZE];
    hex::decode_to_slice(rest.strip_prefix(BETWEEN.as_bytes())?, &mut signature).ok()?;
    Some((body, PublicKey::from_bytes(&key)?, signature))
}

impl Store {
    /// The same store; what is published is signed with `key`.
    #[must_use]
    pub fn signing_with(mut self, key: SecretKey) -> Store {
        self.signing.signer = Some(Arc::new(key));
        self
    }

    /// The same store; of versions and pointers only those count that `trust` admits.
    #[must_use]
    pub fn trusting(mut self, trust: TrustedKeys) -> Store {
        self.signing.trust = Some(Arc::new(trust));
        self
    }

    /// The same store for who only looks: everything is shown, signed or not.
    #[must_use]
    pub fn unchecked(&self) -> Store {
        Store { signing: Signing { trust: None, ..self.signing.clone() }, ..self.clone() }
    }

    /// Whom this machine trusts; none: it believes everybody who can write to the store.
    pub fn trust(&self) -> Option<&TrustedKeys> {
        self.signing.trust.as_deref()
    }

    /// The public half of the key that signs what is published here.
    pub fn signer(&self) -> Option<PublicKey> {
        self.signing.signer.as_ref().map(|signer| signer.public())
    }

    /// The bytes of a document to publish.
    pub(super) fn signed<T: Serialize>(
        &self,
        statement: Statement,
        name: impl Display,
        number: u64,
        value: &T,
    ) -> Result<Vec<u8>> {
        seal::write_with(value, |body| match &self.signing.signer {
            None => Vec::new(),
            Some(signer) => {
                let signature = signer.sign(&message(statement, &self.fabric.id, &name, number, body));
                member(&signer.public(), &signature)
            }
        })
    }

    /// What the signature of a document says.
    fn signature_in(
        &self,
        statement: Statement,
        name: &dyn Display,
        number: u64,
        bytes: &[u8],
        trust: Option<&TrustedKeys>,
    ) -> Signature {
        let Some((body, key, signature)) = split(bytes) else { return Signature::Unsigned };
        let known = trust.and_then(|trust| trust.known(&key)).cloned();
        if !key.has_signed(&message(statement, &self.fabric.id, name, number, body), &signature) {
            return Signature::Wrong { key: known.unwrap_or(key) };
        }
        match known {
            Some(key) => Signature::Trusted { key },
            None => Signature::UnknownKey { key },
        }
    }

    /// Refuses the bytes of a document that is not signed as this machine asks for.
    fn admit(&self, statement: Statement, name: &dyn Display, number: u64, bytes: &[u8]) -> Result<()> {
        let Some(trust) = self.trust() else { return Ok(()) };
        let why = match self.signature_in(statement, name, number, bytes, Some(trust)) {
            Signature::Trusted { .. } => return Ok(()),
            why => why.sentence(),
        };
        let what = format!("{} is refused: {why}", subject(statement, name, number));
        Err(match statement {
            Statement::Version | Statement::Pointer => rejected(&what, name),
            Statement::Owner => owner_rejected(&what, name),
        })
    }

    /// Admits the document of whose `workflow` is with these bytes.
    pub(super) fn admit_owner(&self, workflow: &str, sequence: u64, bytes: &[u8]) -> Result<()> {
        self.admit(Statement::Owner, &workflow, sequence, bytes)
    }

    /// The sequence number of the newest statement of whose `workflow` is that this machine has seen.
    pub(super) fn newest_owner_seen(&self, workflow: &str) -> Result<Option<u64>> {
        match self.trust() {
            Some(trust) => Ok(trust.seen.owner(workflow)?.map(|(sequence, _)| sequence)),
            None => Ok(None),
        }
    }

    /// Takes an admitted statement of whose `workflow` is for the newest; refuses an old one.
    pub(super) fn note_owner(&self, workflow: &str, sequence: u64, nonce: &str) -> Result<()> {
        let Some(trust) = self.trust() else { return Ok(()) };
        match trust.seen.owner(workflow)? {
            Some((seen, _)) if seen > sequence => Err(owner_replayed(workflow, seen)),
            Some((seen, known)) if seen == sequence && known != nonce => {
                let what = format!(
                    "owner {sequence} of {workflow} is refused: this machine has seen another owner {sequence} of it"
                );
                Err(owner_rejected(&what, &workflow))
            }
            Some((seen, _)) if seen == sequence => Ok(()),
            _ => trust.seen.note_owner(workflow, sequence, nonce),
        }
    }

    /// Admits the document of a version with these bytes, and remembers it.
    pub(super) fn admit_version(&self, version: &Version, bytes: &[u8]) -> Result<()> {
        let (name, number) = (&version.environment, version.number);
        self.admit(Statement::Version, name, number, bytes)?;
        let Some(trust) = self.trust() else { return Ok(()) };
        match trust.seen.version(name, number)? {
            None => trust.seen.note_version(name, number, &version.nonce),
            Some(nonce) if nonce == version.nonce => Ok(()),
            Some(_) => {
                let what = format!(
                    "version {number} of {name} is refused: this machine has seen another version {number} of it"
                );
                Err(rejected(&what, name))
            }
        }
    }

    /// Admits the document of a pointer with these bytes.
    pub(super) fn admit_pointer(&self, name: &EnvName, sequence: u64, bytes: &[u8]) -> Result<()> {
        self.admit(Statement::Pointer, name, sequence, bytes)
    }

    /// The sequence number of the newest pointer that this machine has seen of `name`.
    pub(super) fn newest_seen(&self, name: &EnvName) -> Result<Option<u64>> {
        match self.trust() {
            Some(trust) => Ok(trust.seen.pointer(name)?.map(|(sequence, _)| sequence)),
            None => Ok(None),
        }
    }

    /// The highest number of a version of `name` that this machine has seen.
    pub(super) fn highest_seen(&self, name: &EnvName) -> Result<u64> {
        self.trust().map_or(Ok(0), |trust| trust.seen.highest_version(name))
    }

    /// Takes `pointer`, which was admitted, for the newest; refuses an old one.
    pub(super) fn note_pointer(&self, name: &EnvName, pointer: &Pointer) -> Result<()> {
        let Some(trust) = self.trust() else { return Ok(()) };
        match trust.seen.pointer(name)? {
            Some((sequence, _)) if sequence > pointer.sequence => Err(replayed(name, sequence)),
            Some((sequence, nonce)) if sequence == pointer.sequence && nonce != pointer.nonce => {
                let what = format!(
                    "pointer {sequence} of {name} is refused: this machine has seen another pointer {sequence} of it"
                );
                Err(rejected(&what, name))
            }
            Some((sequence, _)) if sequence == pointer.sequence => Ok(()),
            // That version 1 is current where nothing else is said, everybody knows.
            None if pointer.sequence == 1 => Ok(()),
            _ => trust.seen.note_pointer(name, pointer.sequence, &pointer.nonce),
        }
    }

    /// What the signature of a version says; none where there is no such version.
    ///
    /// # Errors
    /// Errors of the file system. A document that is damaged counts as unsigned.
    pub fn signature(&self, name: &EnvName, number: u64, trust: Option<&TrustedKeys>) -> Result<Option<Signature>> {
        match self.read_anywhere(&self.version_path(name, number)) {
            Ok(bytes) => Ok(Some(self.signature_in(Statement::Version, name, number, &bytes, trust))),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// True when `version` need not be published again to be signed as this machine signs.
    pub(crate) fn is_signed_enough(&self, version: &Version) -> bool {
        let Some(signer) = self.signer() else { return true };
        match self.signature(&version.environment, version.number, self.trust()) {
            // Whoever changes keys publishes once more.
            Ok(Some(Signature::Trusted { key } | Signature::UnknownKey { key })) => key == signer,
            _ => false,
        }
    }

    /// Fails when `pointer` would have another signature than it has if what it says were said again by who signs here: an
    /// unsigned pointer would become a signed one.
    pub(super) fn require_repeatable(&self, name: &EnvName, pointer: &Pointer) -> Result<()> {
        let Some(signer) = self.signer() else { return Ok(()) };
        let signature = match publish::read(&self.pointer_path(name, pointer.sequence)) {
            Ok(bytes) => Some(self.signature_in(Statement::Pointer, name, pointer.sequence, &bytes, self.trust())),
            Err(error) if error.is_not_found() && pointer.sequence == 1 => self.signature(name, 1, self.trust())?,
            Err(error) => return Err(error),
        };
        match signature {
            Some(Signature::Trusted { .. }) => Ok(()),
            Some(Signature::UnknownKey { key }) if key == signer => Ok(()),
            other => {
                let why = other.unwrap_or(Signature::Unsigned).sentence();
                let what = format!("what is current of {name} is not said again with a signature: {why}");
                Err(Error::new(Kind::Rejected, what).hint(format!("say it: `envfabric rollback {name} N`")))
            }
        }
    }

    /// Fails when what would be published here would be refused: by this machine, or by those that the store's policy
    /// speaks of.
    pub fn require_signer(&self) -> Result<()> {
        let signer = self.signer();
        let refuse = |what: String| {
            let hint = "name a key: --sign-with FILE, ENVFABRIC_SIGNING_KEY, or sign-with in the config file";
            Err(Error::new(Kind::Rejected, what).hint(hint))
        };
        let allowed = |keys: &[PublicKey], whose: &str| match &signer {
            None => refuse(format!("{whose} for signed versions, and there is no key to sign with")),
            Some(signer) if !keys.contains(signer) => {
                refuse(format!("{whose} for versions signed by other keys than {}", signer.label()))
            }
            Some(_) => Ok(()),
        };
        if let Some(trust) = self.trust() {
            allowed(trust.keys(), "this machine asks")?;
        }
        match self.policy()? {
            Some(policy) if !policy.keys.is_empty() => {
                allowed(&policy.public_keys(), &format!("the store at {} asks", self.root.display()))
            }
            _ => Ok(()),
        }
    }
}

fn subject(statement: Statement, name: &dyn Display, number: u64) -> String {
    match statement {
        Statement::Version => format!("version {number} of {name}"),
        Statement::Pointer => format!("pointer {number} of {name}, which says what version is current,"),
        Statement::Owner => format!("owner {number} of {name}, which says who may look at it,"),
    }
}

/// An older pointer than the one that was seen.
pub(super) fn replayed(name: &EnvName, seen: u64) -> Error {
    let what = format!(
        "what is said to be current of {name} is refused: pointer {seen}, which this machine has seen, is gone"
    );
    Error::new(Kind::Rejected, what).hint(format!(
        "if the store was restored from a backup: `envfabric rollback {name} N` where versions are built, or here `envfabric key forget {name}`"
    ))
}

/// An older owner than the one that was seen.
pub(super) fn owner_replayed(workflow: &str, seen: u64) -> Error {
    let what =
        format!("what is said of whose {workflow} is is refused: owner {seen}, which this machine has seen, is gone");
    Error::new(Kind::Rejected, what).hint(format!(
        "if the store was restored from a backup: say it anew with `envfabric owner {workflow} --uid U` on a machine that has seen it, or here `envfabric key forget {workflow}`"
    ))
}

fn owner_rejected(what: &str, workflow: &dyn Display) -> Error {
    Error::new(Kind::Rejected, what)
        .hint(format!("say it anew, with a trusted key: `envfabric owner {workflow} --uid U --sign-with FILE`"))
}

fn rejected(what: &str, name: &dyn Display) -> Error {
    Error::new(Kind::Rejected, what).hint(format!(
        "`envfabric versions {name}` tells who signed what; make it anew with a trusted key, or trust the key with --trust-key"
    ))
}

/// True for what stands for a key itself and not for a file with keys.
pub fn is_key(text: &str) -> bool {
    text.trim_start().starts_with(PUBLIC)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::Digest;

    fn signed(value: &serde_json::Value) -> (Vec<u8>, EnvName) {
        let (key, name) = (SecretKey::new(&[7; 32], "").unwrap(), "w/n".parse().unwrap());
        let bytes = seal::write_with(value, |body| {
            member(&key.public(), &key.sign(&message(Statement::Pointer, "0123", &name, 5, body)))
        });
        (bytes.unwrap(), name)
    }

    /// Pinned: ed25519 signs the same bytes always the same way, so a change of this digest is a change of the form, and
    /// makes every signature in every store wrong.
    #[test]
    fn the_form_of_a_signed_document_is_pinned() {
        let (bytes, name) = signed(&serde_json::json!({ "format": 1 }));
        let (body, key, signature) = split(&bytes).unwrap();
        assert_eq!(body, b"{\"format\":1");
        let heading = b"envfabric signed document 1\npointer\n0123\nw/n\n5\n{\"format\":1";
        assert_eq!(message(Statement::Pointer, "0123", &name, 5, body), heading);
        assert!(key.has_signed(heading, &signature));
        assert_eq!(Digest::of(&bytes).to_string(), "61b361e521143fd8fa42bd3914e0d69e42ae37b928ca4015935e05301afa6acd");
    }

    #[test]
    fn a_signature_is_found_at_the_end_and_nowhere_else() {
        let (bytes, _) = signed(&serde_json::json!({ "format": 1 }));
        let text = String::from_utf8(bytes.clone()).unwrap();
        let member = &text[text.find(BEFORE).unwrap()..text.find(",\"seal\"").unwrap()];
        // The words of a signature inside a document are words.
        let quoted = seal::write(&serde_json::json!({ "name": member, "x": 1 })).unwrap();
        assert!(split(&quoted).is_none());
        let twice = signed(&serde_json::json!({ "format": 1, "signed": { "by": "x" } })).0;
        assert_eq!(split(&twice).unwrap().0, b"{\"format\":1,\"signed\":{\"by\":\"x\"}");
        for length in 0..bytes.len() {
            assert!(split(&bytes[..length]).is_none());
        }
        // With a right seal, so that what is behind it is looked at.
        for odd in
            ["", ",\"signed\":{}", &member.replace("ed25519", "ed25518"), &member.replace('0', "g"), &member[1..]]
        {
            let bytes = seal::write_with(&serde_json::json!({ "format": 1 }), |_| odd.as_bytes().to_vec()).unwrap();
            assert!(split(&bytes).is_none(), "{odd}");
        }
        let long = seal::write(&serde_json::json!({ "n": "\u{e4}".repeat(400) })).unwrap();
        assert!(split(&long).is_none());
    }

    #[test]
    fn what_a_collector_says_again_is_signed_and_nothing_unsigned_becomes_signed_by_it() {
        let dir = tempfile::tempdir().unwrap();
        let plain = Store::init(dir.path()).unwrap();
        let key = || SecretKey::new(&[7; 32], "").unwrap();
        let signing = plain.clone().signing_with(key());
        let trusting = || {
            let trust = TrustedKeys::new(vec![key().public()], None, &plain).unwrap();
            plain.clone().trusting(trust)
        };
        let draft = super::super::environments::tests::draft;
        let names: [EnvName; 3] = ["w/first", "w/moved", "w/unsigned"].map(|name| name.parse().unwrap());
        for name in ["w/first", "w/moved", "w/moved"] {
            signing.publish_version(draft(name)).unwrap();
        }
        plain.publish_version(draft("w/unsigned")).unwrap();
        for (name, current) in names.iter().zip([1, 2]) {
            signing.ensure_newest(name, 7).unwrap();
            let pointer = trusting().pointer(name).unwrap().unwrap();
            assert_eq!((pointer.version, pointer.newest), (Some(current), 7), "{name}");
        }
        assert_eq!(signing.ensure_newest(&names[2], 7).unwrap_err().kind(), Kind::Rejected);
        // Somebody lets the first version be current again, and hopes for a signature.
        plain.rollback(&names[1], 1).unwrap();
        assert_eq!(signing.ensure_newest(&names[1], 8).unwrap_err().kind(), Kind::Rejected);
        assert_eq!(signing.point_again(&names[2]).unwrap_err().kind(), Kind::Rejected);
    }

    #[test]
    fn who_changes_keys_publishes_once_more_whether_the_old_one_is_still_trusted_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let plain = Store::init(dir.path()).unwrap();
        let key = |n: u8| SecretKey::new(&[n; 32], "").unwrap();
        let draft = super::super::environments::tests::draft("w/n");
        let version = plain.clone().signing_with(key(1)).publish_version(draft).unwrap().version().clone();
        for trusted in [vec![1], vec![2], vec![1, 2]] {
            let public = trusted.into_iter().map(|n| key(n).public()).collect();
            let trusting = plain.clone().trusting(TrustedKeys::new(public, None, &plain).unwrap());
            let enough = [1, 2].map(|n| trusting.clone().signing_with(key(n)).is_signed_enough(&version));
            assert_eq!(enough, [true, false]);
            assert!(trusting.is_signed_enough(&version), "who signs nothing");
        }
    }
}
