//! See `src/untrusted.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| envfabric::untrusted::records(bytes));
