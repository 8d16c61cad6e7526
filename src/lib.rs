//! Environment Fabric: Python environments built ahead of time, stored once, mounted everywhere.
//!
//! Data flows one way, and each room knows only the rooms before it:
//!
//! ```text
//! environment   names, versions, locks: plain types
//!      |
//!    store      content-addressed objects, layers, published versions
//!      |
//!    build      lock -> layers -> version (uv installs, we ingest)
//!    view       version -> merged tree, inode numbers
//!      |
//!    mount      FUSE over a view
//!      |
//!     cli       one file a verb
//! ```
//!
//! Beside them, known to all: `error`, `sys`, `private`, and `patience`, which says who may wait for a store that hangs.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod build;
pub mod cache;
pub mod cli;
pub mod environment;
pub mod error;
pub mod mount;
pub mod patience;
mod private;
pub mod store;
pub mod sys;
#[cfg(any(test, fuzzing))]
pub mod untrusted;
pub mod view;
