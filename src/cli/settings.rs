//! Where everything is: flags over variables over the config file over defaults.

use std::path::{Path, PathBuf};

use super::config::Config;
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
    /// Directory of the index, locks and logs, on a local disk.
    pub(crate) state: PathBuf,
    /// Directory for builds in progress.
    pub(crate) scratch: PathBuf,
    /// What the config file says.
    pub(crate) config: Config,
}

impl Settings {
    /// Finds everything. `store` and `config` are flags or variables (clap reads both).
    pub(crate) fn load(store: Option<PathBuf>, config: Option<&Path>) -> Result<Settings> {
        let home = std::env::var_os("HOME").map(PathBuf::from).filter(|p| p.is_absolute());
        let xdg = |variable: &str, below_home: &str| -> Result<PathBuf> {
            // The XDG specification says that a relative path is to be ignored.
            let set = std::env::var_os(variable).map(PathBuf::from).filter(|p| p.is_absolute());
            set.or_else(|| home.as_ref().map(|h| h.join(below_home))).map(|p| p.join("envfabric")).ok_or_else(|| {
                Error::new(Kind::Usage, format!("neither HOME nor {variable} is set"))
                    .hint("set HOME, or name the places with --store and --mount")
            })
        };
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
        let mount = match std::env::var_os("ENVFABRIC_MOUNT").map(PathBuf::from).or_else(|| config.mount.clone()) {
            Some(path) => absolute(path)?,
            None => xdg("XDG_DATA_HOME", ".local/share")?.join("envs"),
        };
        let scratch = match std::env::var_os("ENVFABRIC_SCRATCH").map(PathBuf::from).or_else(|| config.scratch.clone())
        {
            Some(path) => absolute(path)?,
            None => xdg("XDG_CACHE_HOME", ".cache")?.join("build"),
        };
        let state = xdg("XDG_STATE_HOME", ".local/state")?;
        Ok(Settings { store, store_is_default, mount, state, scratch, config })
    }
}
