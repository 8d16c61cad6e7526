//! Which keys are in force: flags and variables over the config file.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Context;
use super::config::Config;
use crate::environment::{PublicKey, SecretKey, public_keys};
use crate::error::{Error, IoContext, Kind, Result};
use crate::mount;
use crate::store::{Store, TrustedKeys, is_key};

/// Bytes of a file with keys at most.
const FILE_MAX: u64 = 1 << 20;

/// Flags of every verb.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct SigningFlags {
    /// Believe only what this key has signed: a public key, or a file with some (repeatable)
    #[arg(
        long,
        value_name = "KEY|FILE",
        env = "ENVFABRIC_TRUST_KEY",
        value_delimiter = ',',
        global = true,
        hide_env_values = true
    )]
    trust_key: Vec<String>,
    /// Sign what is published with the key in this file
    #[arg(long, value_name = "FILE", env = "ENVFABRIC_SIGNING_KEY", global = true, hide_env_values = true, value_parser = super::spec::path)]
    sign_with: Option<PathBuf>,
}

/// The keys in force.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    /// Where each stands that is trusted.
    pub(crate) trusted: Vec<String>,
    /// The file with the key to sign with.
    pub(crate) sign_with: Option<PathBuf>,
}

impl SigningFlags {
    /// What they say, over the config file.
    pub(crate) fn over(self, config: &Config) -> Result<Keys> {
        let mut named: Vec<String> = self.trust_key.into_iter().filter(|key| !key.trim().is_empty()).collect();
        for key in named.iter_mut().filter(|key| !is_key(key)) {
            // A process that is started in the background has another working directory.
            *key = std::path::absolute(&*key).at("finding", Path::new(&*key))?.to_string_lossy().into_owned();
        }
        let sign_with = self.sign_with.filter(|path| !path.as_os_str().is_empty());
        Ok(Keys {
            trusted: if named.is_empty() { config.trusted_keys.clone() } else { named },
            sign_with: sign_with.or_else(|| config.sign_with.clone()),
        })
    }
}

impl Keys {
    /// The keys that are trusted here; none when nobody has named one.
    pub(crate) fn trusted(&self) -> Result<Vec<PublicKey>> {
        let mut keys: Vec<PublicKey> = Vec::new();
        for named in &self.trusted {
            for key in public(named)? {
                if !keys.contains(&key) {
                    keys.push(key);
                }
            }
        }
        Ok(keys)
    }

    /// The key to sign with, if there is one.
    pub(crate) fn signer(&self) -> Result<Option<SecretKey>> {
        self.sign_with.as_deref().map(secret).transpose()
    }

    /// Flags that say the same to another process.
    pub(crate) fn flags(&self) -> impl Iterator<Item = String> {
        self.trusted.iter().map(|key| format!("--trust-key={key}"))
    }
}

impl Context {
    /// `store` with the keys in force.
    pub(super) fn with_keys(&self, store: Store) -> Result<Store> {
        let keys = &self.settings.keys;
        let mut store = store;
        if self.publishes
            && let Some(signer) = keys.signer()?
        {
            store = store.signing_with(signer);
        }
        match self.trusted_keys(&store)? {
            Some(trusted) => Ok(store.trusting(trusted)),
            None => Ok(store),
        }
    }

    /// Whom this machine trusts of those who publish in `store`.
    pub(super) fn trusted_keys(&self, store: &Store) -> Result<Option<TrustedKeys>> {
        let keys = self.settings.keys.trusted()?;
        if keys.is_empty() {
            return Ok(None);
        }
        let state = self.settings.state().ok();
        if state.is_none() {
            tracing::warn!("there is no place to remember signed pointers: neither HOME nor XDG_STATE_HOME is set");
        }
        TrustedKeys::new(keys, state, store).map(Some)
    }
}

/// Fails when the mount at `at` shows what this process would refuse: it trusts other keys, or whoever writes to the store.
pub(super) fn believes_no_others(at: &Path, store: &Store) -> Result<()> {
    let Some(trust) = store.trust() else { return Ok(()) };
    let theirs = mount::stats(at)?.trusted_keys;
    let ours: Vec<String> = trust.keys().iter().map(PublicKey::text).collect();
    if !theirs.is_empty() && theirs.iter().all(|key| ours.contains(key)) {
        return Ok(());
    }
    let what = match theirs.is_empty() {
        true => format!("the mount at {} shows what anybody has written", at.display()),
        false => format!("the mount at {} trusts keys that are not trusted here", at.display()),
    };
    Err(Error::new(Kind::Rejected, what)
        .hint(format!("mount again with the keys in force: `envfabric umount {0}; envfabric mount {0}`", at.display())))
}

/// The public keys that `text` stands for: itself, or those in the file of that name.
pub(super) fn public(text: &str) -> Result<Vec<PublicKey>> {
    if is_key(text) {
        return Ok(vec![text.parse()?]);
    }
    let path = Path::new(text);
    let (text, _) = read(path)?;
    public_keys(&text).map_err(|error| error.context(format!("{} has no public keys", path.display())))
}

/// The signing key in the file at `path`.
///
/// # Errors
/// [`Kind::Invalid`] when others can read the file, or there is no such key in it.
pub(super) fn secret(path: &Path) -> Result<SecretKey> {
    let (text, mode) = read(path)?;
    if mode & 0o077 != 0 {
        let what =
            format!("{} can be read by others (mode {:03o}), so its key may be known", path.display(), mode & 0o777);
        return Err(Error::new(Kind::Invalid, what).hint(format!(
            "chmod 600 {}; if somebody may have read it, make another with `envfabric key new`",
            path.display()
        )));
    }
    SecretKey::of_file(&text).map_err(|error| error.context(format!("{} cannot be used to sign", path.display())))
}

/// Text and mode of a small file.
fn read(path: &Path) -> Result<(String, u32)> {
    let file = File::open(path).at("opening", path)?;
    let mode = file.metadata().at("reading", path)?.mode();
    let mut text = String::new();
    match file.take(FILE_MAX).read_to_string(&mut text) {
        Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
            Err(Error::new(Kind::Invalid, format!("{} is no text", path.display())).hint("name a file with a key"))
        }
        other => other.at("reading", path).map(|_| (text, mode)),
    }
}
