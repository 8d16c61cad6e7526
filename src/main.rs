//! The `envfabric` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    envfabric::cli::main()
}
