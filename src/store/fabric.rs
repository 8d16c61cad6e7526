//! What a store says of itself: `fabric.json`, its format and the features that it uses.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::seal::{self, write as to_json};
use super::{LATER_NAMES, ROOM_NAMES, Store, list_names, now, publish, read_json, signed};
use crate::error::{Error, IoContext, Kind, Result};

/// The store format that this program writes.
pub const STORE_FORMAT: u32 = 3;

/// Features that this program understands, of the kind that makes a store unreadable without them.
const INCOMPATIBLE_KNOWN: &[&str] = &[ZSTD_OBJECTS, OWNERS];
/// Features that this program understands, of the kind that only a writer must know.
const READ_COMPATIBLE_KNOWN: &[&str] = &[];

/// Feature: objects are compressed ([`Codec::Zstd`]).
const ZSTD_OBJECTS: &str = "zstd-objects";
/// Feature: workflows may have owners, to whom a mount must show them alone (`owners`).
pub(super) const OWNERS: &str = "owners";

/// How objects lie in a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// As they are, so that the kernel can read them in place.
    Raw,
    /// Chunk by chunk compressed, so that less is fetched.
    Zstd,
}

/// `fabric.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fabric {
    /// [`STORE_FORMAT`].
    pub format: u32,
    /// Random, 32 hex digits; a node's index is kept per store id.
    pub id: String,
    /// When the store was made.
    pub created: Timestamp,
    /// Features in use, by what an older program may do without knowing them.
    pub features: Features,
}

/// Feature flags, after ext4's: what may a program do that does not know a flag?
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// Everything.
    #[serde(default)]
    pub compatible: Vec<String>,
    /// Read.
    #[serde(default)]
    pub read_compatible: Vec<String>,
    /// Nothing.
    #[serde(default)]
    pub incompatible: Vec<String>,
}

impl Store {
    /// Makes a store in `root` (made if missing, else an empty directory), or opens the one that is there.
    ///
    /// # Errors
    /// [`Kind::Invalid`] when the directory has other things in it; errors of the file system.
    pub fn init(root: &Path) -> Result<Store> {
        Store::init_with(root, Codec::Raw)
    }

    /// The same, with objects that lie there in another way, if it is made.
    pub fn init_with(root: &Path, codec: Codec) -> Result<Store> {
        if root.join("fabric.json").exists() {
            return Store::open(root);
        }
        fs::create_dir_all(root).at("creating", root)?;
        let foreign = fs::read_dir(root)
            .at("reading", root)?
            .filter_map(|entry| entry.ok())
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .find(|name| {
                let name = name.as_str();
                !ROOM_NAMES.contains(&name) && !LATER_NAMES.contains(&name) && name != "lost+found"
            });
        if let Some(foreign) = foreign {
            return Err(Error::new(Kind::Invalid, format!("{} is not empty: it has {foreign:?}", root.display()))
                .hint("name an empty or missing directory for the store"));
        }
        // A store without its description is no empty directory: a new one would claim what another program wrote.
        for room in ROOM_NAMES.iter().filter(|room| **room != "tmp") {
            if list_names(&root.join(room))?.is_empty() {
                continue;
            }
            return Err(Error::new(
                Kind::Corrupt,
                format!("{} is a store that has lost its fabric.json", root.display()),
            )
            .hint("restore fabric.json from a backup; nothing else in the store is affected"));
        }
        for room in ROOM_NAMES {
            fs::create_dir_all(root.join(room)).at("creating", root.join(room))?;
        }
        let fabric = Fabric {
            format: STORE_FORMAT,
            id: publish::nonce()?,
            created: now(),
            features: Features {
                incompatible: [ZSTD_OBJECTS].into_iter().filter(|_| codec == Codec::Zstd).map(String::from).collect(),
                ..Features::default()
            },
        };
        let bytes = to_json(&fabric)?;
        // Another `init` may win: then its store is the store.
        publish::bytes(root, &root.join("fabric.json"), &bytes)?;
        Store::open(root)
    }

    /// Opens the store in `root`.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when there is none; [`Kind::Unsupported`] when it is of a newer format.
    pub fn open(root: &Path) -> Result<Store> {
        let root = std::path::absolute(root).at("finding", root)?;
        let path = root.join("fabric.json");
        let bytes = match publish::read(&path) {
            Err(error) if error.is_not_found() => {
                return Err(Error::new(Kind::NotFound, format!("there is no store at {}", root.display()))
                    .hint("make one with `envfabric init`, or name another with --store"));
            }
            other => other?,
        };
        let newer = |what: String| {
            Error::new(Kind::Unsupported, format!("the store at {} {what}", root.display()))
                .hint("upgrade envfabric on this machine; the store was left as it is")
        };
        // The format number is read alone first: a newer format may have changed everything else.
        #[derive(Deserialize)]
        struct OnlyFormat {
            format: u32,
        }
        let corrupt = || {
            Error::new(Kind::Corrupt, format!("{} is not readable as a store description", path.display()))
                .hint("restore fabric.json from a backup; nothing else in the store is affected")
        };
        let OnlyFormat { format } = serde_json::from_slice(&bytes).map_err(|source| corrupt().with_source(source))?;
        if format > STORE_FORMAT {
            return Err(newer(format!("has format {format}, and this program knows up to {STORE_FORMAT}")));
        }
        if format < STORE_FORMAT {
            let what = format!("the store at {} has format {format}, of before the first release", root.display());
            return Err(Error::new(Kind::Unsupported, what).hint("make a new store and create its environments again"));
        }
        let fabric: Fabric = serde_json::from_slice(&bytes).map_err(|source| corrupt().with_source(source))?;
        let unknown = |used: &[String], known: &[&str]| used.iter().find(|f| !known.contains(&f.as_str())).cloned();
        if let Some(feature) = unknown(&fabric.features.incompatible, INCOMPATIBLE_KNOWN) {
            return Err(newer(format!("uses {feature:?}, which this program does not know")));
        }
        if !seal::is_whole(&bytes) {
            return Err(corrupt());
        }
        let writable = unknown(&fabric.features.read_compatible, READ_COMPATIBLE_KNOWN).is_none();
        Ok(Store { root, fabric, writable, signing: signed::Signing::default(), made: Arc::default() })
    }

    /// How objects lie here.
    pub fn codec(&self) -> Codec {
        match self.fabric.features.incompatible.iter().any(|feature| feature == ZSTD_OBJECTS) {
            true => Codec::Zstd,
            false => Codec::Raw,
        }
    }

    /// Fails when the store is not there any more, or another was put in its place: then nothing that is missing was
    /// removed by anybody.
    pub fn require_present(&self) -> Result<()> {
        self.features_now().map(drop)
    }

    /// The features that the store has by now, if it is still there, as [`Store::require_present`] finds out.
    pub(crate) fn features_now(&self) -> Result<Features> {
        let gone = |what: &str, hint: &str| {
            Err(Error::new(Kind::Failed, format!("the store at {} {what}", self.root.display())).hint(hint))
        };
        match read_json::<Fabric>(&self.root.join("fabric.json")) {
            Ok(fabric) if fabric.id == self.fabric.id => Ok(fabric.features),
            Ok(_) => gone("was replaced by another store", "unmount and mount again to use the new one"),
            Err(error) if error.is_not_found() => gone("is gone", "is its file system mounted?"),
            Err(error) => Err(error),
        }
    }

    /// Fails when the store has features that a writer must know and this program does not.
    pub fn require_writable(&self) -> Result<()> {
        if self.writable {
            return Ok(());
        }
        Err(Error::new(
            Kind::Unsupported,
            format!("the store at {} has features that this program may only read", self.root.display()),
        )
        .hint("upgrade envfabric on this machine to write to this store"))
    }
}
