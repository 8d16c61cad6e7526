//! Flags of the node cache.

use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use jiff::SignedDuration;

use super::Context;
use crate::cache::Options;
use crate::error::{Error, Kind, Result};

/// How to keep what of a distant store is used here.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct CacheFlags {
    /// Keep files of the store here, on a local disk, even of a local store [default: $XDG_CACHE_HOME/envfabric/files,
    /// for stores that are not read in place] [env: ENVFABRIC_CACHE]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Keep at most so much [default: 20GiB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    cache_size: Option<ByteSize>,
    /// Leave so much of the disk free [default: 1GiB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    cache_free: Option<ByteSize>,
    /// How long the store may take for one answer before a read of what is not here fails [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = time)]
    patience: Option<SignedDuration>,
}

/// A size as people write it, `20GiB`.
pub(crate) fn size(text: &str) -> std::result::Result<ByteSize, String> {
    text.parse().map_err(|_| format!("{text:?} is not a size: write for example 500MB or 20GiB"))
}

/// A time as people write it, `30s`.
pub(crate) fn time(text: &str) -> std::result::Result<SignedDuration, String> {
    let wrong = || format!("{text:?} is not a time: write for example 30s or 2m");
    let time: SignedDuration = text.parse().map_err(|_| wrong())?;
    if time.is_positive() { Ok(time) } else { Err(wrong()) }
}

impl CacheFlags {
    /// The same flags for another process.
    pub(crate) fn flags(&self) -> Vec<String> {
        let mut flags = Vec::new();
        if let Some(dir) = &self.cache {
            let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.clone());
            flags.push(format!("--cache={}", dir.display()));
        }
        let bytes = |flag: &str, size: ByteSize| format!("--{flag}={}B", size.as_u64());
        flags.extend(self.cache_size.map(|size| bytes("cache-size", size)));
        flags.extend(self.cache_free.map(|size| bytes("cache-free", size)));
        flags.extend(self.patience.map(|time| format!("--patience={}ms", time.as_millis())));
        flags
    }

    /// True when the user has asked for a cache.
    pub(crate) fn always(&self, context: &Context) -> bool {
        self.cache.is_some() || context.settings.cache_is_named
    }

    /// What they say, over the settings.
    pub(crate) fn options(&self, context: &Context) -> Result<Options> {
        let settings = &context.settings;
        let dir = self.cache.clone().or_else(|| settings.cache.clone()).ok_or_else(|| {
            Error::new(Kind::Usage, "there is no place for a cache: neither HOME nor XDG_CACHE_HOME is set")
                .hint("name one with --cache")
        })?;
        let mut options = Options::at(dir);
        let from_config = |text: &Option<String>, key: &str| {
            text.as_deref()
                .map(|text| size(text).map_err(|what| Error::new(Kind::Usage, format!("{key}: {what}"))))
                .transpose()
        };
        let limit =
            self.cache_size.map_or_else(|| from_config(&settings.config.cache_size, "cache-size"), |n| Ok(Some(n)))?;
        let free =
            self.cache_free.map_or_else(|| from_config(&settings.config.cache_free, "cache-free"), |n| Ok(Some(n)))?;
        options.limit = limit.map_or(options.limit, |size| size.as_u64());
        options.keep_free = free.map_or(options.keep_free, |size| size.as_u64());
        options.patience = self.patience.map_or(options.patience, |time| time.try_into().unwrap_or(Duration::MAX));
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_written_as_people_do() {
        assert_eq!(size("20GiB").unwrap().as_u64(), 20 << 30);
        assert_eq!(size("1 GB").unwrap().as_u64(), 1_000_000_000);
        assert_eq!(time("1m").unwrap(), SignedDuration::from_secs(60));
        for wrong in ["", "x", "20 apples", "-1GB"] {
            assert!(size(wrong).unwrap_err().contains("20GiB"), "{wrong}");
        }
        for wrong in ["", "x", "0s", "-3s"] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }
}
