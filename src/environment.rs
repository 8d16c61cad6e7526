//! Plain types and their parsing: what an environment, a version and an interpreter are.
//!
//! Nothing here touches disk, kernel or network.

mod digest;
mod interpreter;
pub mod lock;
mod name;
mod version;

#[cfg(test)]
pub(crate) use interpreter::tests::cpython311;

pub use digest::{Digest, Hasher};
pub use interpreter::{Interpreter, Markers};
pub use name::EnvName;
pub use version::{Builder, Conflict, Document, InterpreterRef, Source, VERSION_FORMAT, Version};
