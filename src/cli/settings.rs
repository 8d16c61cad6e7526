//! Where everything is: flags over variables over the config file over defaults.

use std::path::{Path, PathBuf};

use super::config::Config;
use super::signing::{Keys, SigningFlags};
use crate::error::{Error, IoContext, Kind, Result};

/// The paths and options in force.
#[derive(Debug)]
pub(crate) struct Settings {
    /// Store directory, absolute.
    pub(crate) store: PathBuf,
    /// True when nobody named a store.
    pub(crate) store_is_default: bool,
    /// Mount point, absolute.
    pub(crate) mount: PathBuf,
    /// Directory of the node cache; none when there is no home.
    pub(crate) cache: Option<PathBuf>,
    /// True when somebody named it.
    pub(crate) cache_is_named: bool,
    /// Directory of the index, locks and logs, on a local disk; none when there is no home.
    state: Option<PathBuf>,
    /// Directory for builds in progress.
    pub(crate) scratch: PathBuf,
    /// Keys that sign and that are trusted.
    pub(crate) keys: Keys,
    /// What the config file says.
    pub(crate) config: Config,
}

impl Settings {
    /// Finds everything. `store` and `config` are flags or variables (clap reads both).
    pub(crate) fn load(store: Option<PathBuf>, config: Option<&Path>, signing: SigningFlags) -> Result<Settings> {
        let home = std::env::var_os("HOME").map(PathBuf::from).filter(|p| p.is_absolute());
        let xdg = |variable: &str, below_home: &str| -> Result<PathBuf> {
            // The XDG specification says that a relative path is to be ignored.
            let set = std::env::var_os(variable).map(PathBuf::from).filter(|p| p.is_absolute());
            set.or_else(|| home.as_ref().map(|h| h.join(below_home))).map(|p| p.join("envfabric")).ok_or_else(|| {
                Error::new(Kind::Usage, format!("neither HOME nor {variable} is set"))
                    .hint("set HOME, or ENVFABRIC_STORE, ENVFABRIC_MOUNT, ENVFABRIC_SCRATCH and XDG_STATE_HOME")
            })
        };
        let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let mut defaults = vec![PathBuf::from("/etc/envfabric/config.toml")];
        if let Ok(dir) = xdg("XDG_CONFIG_HOME", ".config") {
            defaults.insert(0, dir.join("config.toml"));
        }
        let config = Config::load(config, &defaults)?;
        let named_store = store.or_else(|| config.store.clone());
        let store_is_default = named_store.is_none();
        let absolute = |path: PathBuf| std::path::absolute(&path).at("finding", &path);
        let store = match named_store {
            Some(path) => absolute(path)?,
            None => xdg("XDG_DATA_HOME", ".local/share")?.join("store"),
        };
        let mount = match variable("ENVFABRIC_MOUNT").or_else(|| config.mount.clone()) {
            Some(path) => absolute(path)?,
            None => xdg("XDG_DATA_HOME", ".local/share")?.join("envs"),
        };
        let scratch = match variable("ENVFABRIC_SCRATCH").or_else(|| config.scratch.clone()) {
            Some(path) => absolute(path)?,
            None => xdg("XDG_CACHE_HOME", ".cache").map_or_else(|_| std::env::temp_dir(), |dir| dir.join("build")),
        };
        let named_cache = variable("ENVFABRIC_CACHE").or_else(|| config.cache.clone());
        let cache_is_named = named_cache.is_some();
        let cache = match named_cache {
            Some(path) => Some(absolute(path)?),
            None => xdg("XDG_CACHE_HOME", ".cache").ok().map(|dir| dir.join("files")),
        };
        let state = xdg("XDG_STATE_HOME", ".local/state").ok();
        Ok(Settings {
            store,
            store_is_default,
            mount,
            cache,
            cache_is_named,
            state,
            scratch,
            keys: signing.over(&config)?,
            config,
        })
    }

    /// Where a signing key is put when nobody says where.
    pub(crate) fn own_signing_key(&self) -> Result<PathBuf> {
        let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let dir = absolute("XDG_CONFIG_HOME").or_else(|| absolute("HOME").map(|home| home.join(".config")));
        dir.map(|dir| dir.join("envfabric/signing.key")).ok_or_else(|| {
            Error::new(Kind::Usage, "there is no place for a key: neither HOME nor XDG_CONFIG_HOME is set")
                .hint("name a file with --out")
        })
    }

    /// Directory of the index, locks and logs.
    pub(crate) fn state(&self) -> Result<&Path> {
        self.state.as_deref().ok_or_else(|| {
            Error::new(
                Kind::Usage,
                "there is no place for the index, locks and logs: neither HOME nor XDG_STATE_HOME is set",
            )
            .hint("set XDG_STATE_HOME to a directory on a local disk")
        })
    }
}
