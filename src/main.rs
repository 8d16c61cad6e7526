//! The `envfabric` program.

fn main() {}
