//! How large what a wheel installs may be. Generous: they stop bombs and mistakes, not large packages.
//!
//! A wheel of this machine is measured before uv unpacks it, one that uv fetches afterwards: it can fill the scratch
//! directory before it is refused, though no file of it can be larger than [`FILE_MAX`].

/// The largest single file, in bytes (the largest real one seen is a 1.5 GB CUDA library).
pub(super) const FILE_MAX: u64 = 16 << 30;
/// The most bytes one distribution may install.
pub(super) const DISTRIBUTION_MAX: u64 = 64 << 30;
/// The most files one distribution may install (the largest real ones seen have 20,000).
pub(super) const FILES_MAX: usize = 400_000;
/// How much larger the content of a local wheel may be than the wheel, once it is above 1 GiB.
pub(super) const RATIO_MAX: u64 = 200;
/// The largest `METADATA` that is read, in bytes; the largest real ones, with a manual in them, have less than 1 MiB.
pub(super) const METADATA_MAX: u64 = 16 << 20;
/// The largest `RECORD` that is read, in bytes: 160 for each of [`FILES_MAX`] files.
pub(super) const RECORD_MAX: u64 = 64 << 20;
