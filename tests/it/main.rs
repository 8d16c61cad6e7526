//! Whole-program tests: the real binary, the real uv, real wheels, real FUSE mounts.
//!
//! One binary, so that the environments that several tests look at are built once.

#![allow(unreachable_pub)] // nobody else reaches a test binary
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod cli;
mod cold;
mod copies;
mod documents;
mod faults;
mod imports;
mod keeping;
mod network;
mod side_by_side;
mod signing;
mod sources;
mod suites;
mod switching;
mod tree;
mod venv;
mod wheels;
mod world;
