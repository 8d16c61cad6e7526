//! How large what a wheel installs may be. Generous: they stop bombs and mistakes, not large packages.

/// The largest single file, in bytes (the largest real one seen is a 1.5 GB CUDA library).
pub const FILE_MAX: u64 = 16 << 30;
/// The most bytes one distribution may install.
pub const DISTRIBUTION_MAX: u64 = 64 << 30;
/// The most files one distribution may install (the largest real ones seen have 20,000).
pub const FILES_MAX: usize = 400_000;
/// How much larger the content of a local wheel may be than the wheel, once it is above 1 GiB.
pub const RATIO_MAX: u64 = 200;
