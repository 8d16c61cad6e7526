//! The config file, TOML.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, IoContext, Kind, Result};
use crate::store::is_key;

/// What a config file may say; an unknown key is an error, because it is a spelling mistake.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Config {
    /// Store directory.
    pub(crate) store: Option<PathBuf>,
    /// Mount point.
    pub(crate) mount: Option<PathBuf>,
    /// Directory of the node cache.
    pub(crate) cache: Option<PathBuf>,
    /// What the cache may hold, `20GiB`.
    pub(crate) cache_size: Option<String>,
    /// What it leaves free of the disk.
    pub(crate) cache_free: Option<String>,
    /// The uv program.
    pub(crate) uv: Option<PathBuf>,
    /// Directory for builds in progress; must not be on a slow file system.
    pub(crate) scratch: Option<PathBuf>,
    /// Package index in place of PyPI.
    pub(crate) index_url: Option<String>,
    /// Further package indexes.
    #[serde(default)]
    pub(crate) extra_index_urls: Vec<String>,
    /// Platform to resolve for (the oldest of the fleet), as uv names it.
    pub(crate) python_platform: Option<String>,
    /// Public keys, or files with some: only what they have signed is believed.
    #[serde(default)]
    pub(crate) trusted_keys: Vec<String>,
    /// The file with the key that signs what is published.
    pub(crate) sign_with: Option<PathBuf>,
}

impl Config {
    /// Reads `named`, or the first default file that exists, or nothing.
    pub(crate) fn load(named: Option<&Path>, defaults: &[PathBuf]) -> Result<Config> {
        let path = match named {
            Some(path) => path,
            None => match defaults.iter().find(|p| p.is_file()) {
                Some(path) => path,
                None => return Ok(Config::default()),
            },
        };
        let text = std::fs::read_to_string(path).at("reading", path)?;
        let mut config =
            Config::parse(&text).map_err(|e| e.context(format!("config file {} is wrong", path.display())))?;
        // Relative paths in a file mean: relative to the file.
        let base = std::path::absolute(path).at("finding", path)?;
        let base = base.parent().unwrap_or(Path::new("/"));
        let paths = [&mut config.store, &mut config.mount, &mut config.cache, &mut config.uv, &mut config.scratch];
        for key in config.trusted_keys.iter_mut().filter(|key| !is_key(key)) {
            *key = base.join(&*key).to_string_lossy().into_owned();
        }
        for path in paths.into_iter().flatten().chain(&mut config.sign_with) {
            *path = base.join(&*path);
        }
        Ok(config)
    }

    /// What `text` says.
    pub(crate) fn parse(text: &str) -> Result<Config> {
        toml::from_str(text).map_err(|error| {
            Error::new(Kind::Usage, error.message().to_string())
                .detail(error.to_string().trim_end().to_string())
                .hint("keys: store, mount, cache, cache-size, cache-free, uv, scratch, index-url, extra-index-urls, python-platform, trusted-keys, sign-with")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistake_in_the_config_file_is_wrong_usage_and_says_where() {
        for (text, needle) in [("stor = 1", "stor"), ("store = 7", "line 1"), ("= =", "line 1")] {
            let error = Config::parse(text).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage);
            assert!(format!("{error:?}").contains(needle), "{error:?}");
        }
        assert_eq!(Config::parse("store = \"/nas\"").unwrap().store, Some("/nas".into()));
    }
}
