//! `envfabric key`

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::Context;
use super::signing::{public, secret};
use super::spec::name_or_workflow;
use crate::environment::{PublicKey, SecretKey};
use crate::error::{Error, IoContext, Kind, Result};
use crate::store::Store;

/// Keys to sign versions with, and to check them
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Key {
    /// Make a signing key
    ///
    /// The file, readable by its owner alone, has the secret half; FILE.pub has the public one, for `--trust-key` or
    /// `trusted-keys` of the machines that are to believe it. Nothing is overwritten.
    New {
        /// Where to write it [default: $XDG_CONFIG_HOME/envfabric/signing.key]
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// What to call it; for people alone [default: the name of this host]
        #[arg(long, value_name = "TEXT")]
        name: Option<String>,
    },
    /// Print the public keys in a file (of a signing key its public half), or what is in force here
    Show {
        /// A file with keys
        file: Option<PathBuf>,
    },
    /// Let the store ask for versions signed by these keys
    ///
    /// For those who publish: `create`, `rollback` and `remove` then refuse to write what is not signed so. It protects
    /// nothing by itself; what a machine believes is told by its own `trusted-keys`.
    Require {
        /// A public key, or a file with some
        #[arg(value_name = "KEY|FILE", required_unless_present = "nobody")]
        keys: Vec<String>,
        /// Ask for no signatures any more
        #[arg(long, conflicts_with = "keys")]
        nobody: bool,
    },
    /// Forget what this machine has seen of environments and workflows, so that an older statement is believed again
    ///
    /// For a store that was restored from a backup. Of a workflow alone: whose it is. Until the next newer pointer, this machine cannot tell an old one
    /// from the newest.
    Forget {
        /// WORKFLOW/NODE, or WORKFLOW
        #[arg(value_name = "WF/NODE|WF", value_parser = name_or_workflow, required = true)]
        names: Vec<String>,
    },
}

impl Key {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        match self {
            Key::New { out, name } => new(context, out.clone(), name.as_deref()),
            Key::Show { file: Some(file) } => show(context, file),
            Key::Show { file: None } => in_force(context),
            Key::Require { keys, .. } => require(context, keys),
            Key::Forget { names } => forget(context, names),
        }?;
        Ok(ExitCode::SUCCESS)
    }
}

fn new(context: &Context, out: Option<PathBuf>, name: Option<&str>) -> Result<()> {
    let out = out.map_or_else(|| context.settings.own_signing_key(), Ok)?;
    let mut seed = [0; 32];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut seed))
        .at("reading", "/dev/urandom")?;
    let host = crate::store::host();
    let key = SecretKey::new(&seed, name.unwrap_or(&host))?;
    if let Some(dir) = out.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        std::fs::create_dir_all(dir).at("creating", dir)?;
    }
    let mut beside = out.clone().into_os_string();
    beside.push(".pub");
    let beside = PathBuf::from(beside);
    let write = |path: &PathBuf, mode: u32, text: &str| -> Result<()> {
        let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
        let mut file = file.map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Error::new(Kind::Invalid, format!("{} is there already", path.display()))
                    .hint("a key is not overwritten: name another file with --out, or move that one away")
            }
            _ => Error::io("creating", path, error),
        })?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).at("writing", path)
    };
    write(&out, 0o600, &key.file())?;
    write(&beside, 0o644, &format!("{}\n", key.public())).inspect_err(|_| drop(std::fs::remove_file(&out)))?;
    let told = json!({ "key": key.public(), "file": out.to_string_lossy(), "public_file": beside.to_string_lossy() });
    context.out.result(&told, |w| writeln!(w, "{}", key.public()))?;
    context.out.say(format_args!(
        "{} signs: --sign-with, ENVFABRIC_SIGNING_KEY or sign-with\n{} is for those who check: --trust-key or trusted-keys",
        out.display(),
        beside.display()
    ));
    Ok(())
}

fn show(context: &Context, file: &std::path::Path) -> Result<()> {
    // A signing key that others can read is told, too.
    let keys = match secret(file) {
        Ok(key) => vec![key.public()],
        Err(no_secret) => match public(&std::path::absolute(file).at("finding", file)?.to_string_lossy()) {
            Ok(keys) => keys,
            Err(error) if error.is_not_found() => return Err(error),
            Err(_) => return Err(no_secret),
        },
    };
    context.out.result(&keys, |w| keys.iter().try_for_each(|key| writeln!(w, "{key}")))
}

/// What this machine signs with and trusts, and what the store asks for.
fn in_force(context: &Context) -> Result<()> {
    let keys = &context.settings.keys;
    let signer = keys.signer()?.map(|key| key.public());
    let trusted = keys.trusted()?;
    let policy = match context.plain_store() {
        Ok(store) => store.policy()?.map(|policy| policy.public_keys()),
        // There need not be a store to ask for one's own keys.
        Err(error) if error.is_not_found() => None,
        Err(error) => return Err(error),
    };
    let asked = policy.unwrap_or_default();
    let told = json!({ "signs_with": signer, "trusts": trusted, "store_asks_for": asked });
    context.out.result(&told, |w| {
        match &signer {
            Some(key) => writeln!(w, "signs with      {key}")?,
            None => writeln!(w, "signs with      nothing")?,
        }
        let all = |keys: &[PublicKey], none: &str| match keys {
            [] => none.to_string(),
            keys => keys.iter().map(PublicKey::to_string).collect::<Vec<_>>().join("\n                "),
        };
        writeln!(w, "trusts          {}", all(&trusted, "whoever can write to the store"))?;
        writeln!(w, "store asks for  {}", all(&asked, "no signatures"))
    })
}

fn require(context: &Context, named: &[String]) -> Result<()> {
    let mut keys: Vec<PublicKey> = Vec::new();
    for key in named.iter().map(|named| public(named)).collect::<Result<Vec<_>>>()?.into_iter().flatten() {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    let policy = context.plain_store()?.set_policy(&keys)?;
    context.out.result(&policy, |w| match &keys[..] {
        [] => writeln!(w, "the store asks for no signatures"),
        keys => {
            writeln!(w, "the store asks for versions signed by:")?;
            keys.iter().try_for_each(|key| writeln!(w, "{key}"))
        }
    })
}

fn forget(context: &Context, names: &[String]) -> Result<()> {
    let store: Store = context.plain_store()?;
    let trust = context.trusted_keys(&store)?.ok_or_else(|| {
        Error::new(Kind::Usage, "this machine trusts whoever can write to the store, and remembers nothing")
            .hint("name the keys that are trusted, as for mounting: --trust-key or trusted-keys")
    })?;
    let mut told = Vec::new();
    for name in names {
        told.push(json!({ "environment": name, "forgotten": trust.forget(name)? }));
    }
    context.out.result(&told, |w| {
        told.iter().try_for_each(|line| match line["forgotten"] == true {
            true => writeln!(w, "forgotten: {}", line["environment"].as_str().unwrap_or_default()),
            false => writeln!(w, "nothing was known of {}", line["environment"].as_str().unwrap_or_default()),
        })
    })
}
