//! Plain types and their parsing: what an environment, a version and an interpreter are.
//!
//! Nothing here touches disk, kernel or network.

/// Lets a type that is parsed and displayed travel as a JSON string.
macro_rules! serde_as_text {
    ($type:ty) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

mod digest;
mod interpreter;
mod key;
pub mod lock;
mod name;
mod owner;
mod version;

#[cfg(test)]
pub(crate) use interpreter::tests::cpython311;

pub use digest::{Digest, Hasher};
pub use interpreter::{Interpreter, Markers};
pub use key::{PUBLIC, PublicKey, SIGNATURE_SIZE, SecretKey, public_keys};
pub use name::EnvName;
pub use owner::{Mode, Owner};
pub use version::{Builder, Conflict, Document, InterpreterRef, Source, Summary, VERSION_FORMAT, Version};
