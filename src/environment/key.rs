//! Keys that versions are signed with: ed25519, in a form that people can read and paste.
//!
//! ```text
//! ed25519:<64 hex digits> name of the key             public; a name is for people and takes no part
//! ed25519-secret:<64 hex digits> name of the key      secret: the seed of RFC 8032
//! ```
//!
//! A file of keys has one a line; empty lines and those that begin with `#` are left out.

use std::fmt;
use std::str::FromStr;

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use serde::{Serialize, Serializer};

use crate::error::{Error, Kind, Result};

/// What a public key begins with.
pub const PUBLIC: &str = "ed25519:";
const SECRET: &str = "ed25519-secret:";
/// Bytes of a key's name at most.
const NAME_MAX: usize = 100;
/// Bytes of a signature.
pub const SIGNATURE_SIZE: usize = 64;

/// A key that signatures are checked with, and what people call it. Two with the same bytes are equal.
#[derive(Clone)]
pub struct PublicKey {
    key: VerifyingKey,
    name: String,
}

impl PublicKey {
    /// The key with these bytes, if they are one that nobody can forge signatures of.
    pub fn from_bytes(bytes: &[u8; 32]) -> Option<PublicKey> {
        let key = VerifyingKey::from_bytes(bytes).ok().filter(|key| !key.is_weak())?;
        Some(PublicKey { key, name: String::new() })
    }

    /// Its 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        self.key.as_bytes()
    }

    /// `ed25519:<64 hex digits>`.
    pub fn text(&self) -> String {
        format!("{PUBLIC}{}", hex::encode(self.as_bytes()))
    }

    /// For people: its name and the first digits.
    pub fn label(&self) -> String {
        let short = format!("{PUBLIC}{}", hex::encode(&self.as_bytes()[..6]));
        if self.name.is_empty() { short } else { format!("{} ({short})", self.name) }
    }

    /// True when `signature` is this key's, of `message`.
    pub fn has_signed(&self, message: &[u8], signature: &[u8; SIGNATURE_SIZE]) -> bool {
        self.key.verify_strict(message, &Signature::from_bytes(signature)).is_ok()
    }
}

impl PartialEq for PublicKey {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl Eq for PublicKey {}

/// As it stands in a file, name included.
impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text())?;
        if self.name.is_empty() { Ok(()) } else { write!(f, " {}", self.name) }
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for PublicKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl FromStr for PublicKey {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |what: &str| Error::new(Kind::Usage, format!("{text:?} {what}")).hint(PUBLIC_HINT);
        if text.trim_start().starts_with(SECRET) {
            // What is secret is not repeated in a message.
            return Err(Error::new(Kind::Usage, "this is a secret key, where a public one is wanted")
                .hint("`envfabric key show FILE` prints its public half"));
        }
        let (bytes, name) = parse(text, PUBLIC).ok_or_else(|| wrong("is not a public key"))?;
        let key = PublicKey::from_bytes(&bytes).ok_or_else(|| wrong("is no key that can be trusted"))?;
        Ok(PublicKey { name, ..key })
    }
}

const PUBLIC_HINT: &str =
    "a public key is ed25519: and 64 hex digits, and perhaps a name: `envfabric key show` prints it";

/// A key that signs. Its bytes are overwritten when it is dropped, and never printed but into its file.
pub struct SecretKey {
    key: SigningKey,
    name: String,
}

impl SecretKey {
    /// The key of `seed`, 32 random bytes.
    ///
    /// # Errors
    /// [`Kind::Usage`] when `name` cannot stand in a line.
    pub fn new(seed: &[u8; 32], name: &str) -> Result<SecretKey> {
        if !is_name(name) {
            let what = format!("{name:?} cannot be the name of a key");
            return Err(Error::new(Kind::Usage, what).hint("up to 100 bytes, without control characters or commas"));
        }
        Ok(SecretKey { key: SigningKey::from_bytes(seed), name: name.trim().into() })
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        PublicKey { key: self.key.verifying_key(), name: self.name.clone() }
    }

    /// The signature of `message`.
    pub fn sign(&self, message: &[u8]) -> [u8; SIGNATURE_SIZE] {
        self.key.sign(message).to_bytes()
    }

    /// What its file has.
    pub fn file(&self) -> String {
        let space = if self.name.is_empty() { "" } else { " " };
        format!(
            "# envfabric signing key: whoever has this file can sign versions. Its public half:\n# {}\n{SECRET}{}{space}{}\n",
            self.public(),
            hex::encode(self.key.to_bytes()),
            self.name,
        )
    }

    /// The key in the text of a file.
    ///
    /// # Errors
    /// [`Kind::Invalid`] when there is not exactly one; the message does not repeat the text.
    pub fn of_file(text: &str) -> Result<SecretKey> {
        let wrong = |what: &str| Error::new(Kind::Invalid, what).hint("make a key with `envfabric key new`");
        let mut lines = lines(text);
        let (Some(line), None) = (lines.next(), lines.next()) else {
            return Err(wrong("a file with a signing key has one line with a key"));
        };
        let (seed, name) = parse(line, SECRET).ok_or_else(|| match line.starts_with(PUBLIC) {
            true => wrong("this is a public key, which cannot sign"),
            false => wrong("this is not a signing key"),
        })?;
        SecretKey::new(&seed, &name)
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "secret half of {}", self.public())
    }
}

/// The public keys in the text of a file.
///
/// # Errors
/// [`Kind::Usage`], with the line that is none; or when there is no key at all.
pub fn public_keys(text: &str) -> Result<Vec<PublicKey>> {
    let keys = lines(text).map(str::parse).collect::<Result<Vec<PublicKey>>>()?;
    if keys.is_empty() {
        return Err(Error::new(Kind::Usage, "there is no key in it").hint(PUBLIC_HINT));
    }
    Ok(keys)
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

fn parse(text: &str, prefix: &str) -> Option<([u8; 32], String)> {
    let text = text.trim().strip_prefix(prefix)?;
    let (digits, name) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let mut bytes = [0; 32];
    hex::decode_to_slice(digits, &mut bytes).ok()?;
    is_name(name).then(|| (bytes, name.trim().to_string()))
}

fn is_name(name: &str) -> bool {
    name.len() <= NAME_MAX && !name.contains(|c: char| c.is_control() || c == ',')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> SecretKey {
        SecretKey::new(&[n; 32], "build host 1").unwrap()
    }

    #[test]
    fn keys_are_read_as_they_are_written() {
        let secret = key(7);
        let again = SecretKey::of_file(&secret.file()).unwrap();
        assert_eq!((again.public(), again.file()), (secret.public(), secret.file()));
        let public: PublicKey = secret.public().to_string().parse().unwrap();
        assert_eq!(public.to_string(), secret.public().to_string());
        assert_eq!(public_keys(&format!("# ours\n\n{public}\r\n  {}\n", key(8).public())).unwrap().len(), 2);
        let signature = secret.sign(b"text");
        assert!(public.has_signed(b"text", &signature) && !public.has_signed(b"texu", &signature));
        assert!(!key(8).public().has_signed(b"text", &signature));
        assert!(!format!("{secret:?}").contains(&hex::encode([7; 32])), "a secret is not printed");
    }

    #[test]
    fn what_is_no_key_is_refused_and_a_secret_one_is_not_repeated() {
        let digits = "07".repeat(32);
        let weak = format!("{PUBLIC}{}", "00".repeat(32));
        let secret = format!("{SECRET}{digits}");
        for wrong in ["", "x", "ed25519:", "ed25519:12", "rsa:00", &format!("{PUBLIC}{digits}00"), &weak, &secret] {
            let error = wrong.parse::<PublicKey>().unwrap_err();
            assert_eq!(error.kind(), Kind::Usage, "{wrong}");
            assert!(error.hint_text().is_some() && !format!("{error:?}").contains(&secret), "{error:?}");
        }
        let public = key(7).public().to_string();
        for wrong in ["", "# nothing\n", &public, &format!("{secret}\n{secret}"), "ed25519-secret:zz", "\0\u{1}"] {
            let error = SecretKey::of_file(wrong).unwrap_err();
            assert_eq!(error.kind(), Kind::Invalid, "{wrong}");
            assert!(!format!("{error:?}").contains(&digits));
        }
        for name in ["a\nb", "a,b", &"x".repeat(101)] {
            assert_eq!(SecretKey::new(&[1; 32], name).unwrap_err().kind(), Kind::Usage);
        }
        assert_eq!(public_keys("# none").unwrap_err().kind(), Kind::Usage);
    }
}
