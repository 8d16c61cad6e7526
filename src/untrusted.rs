//! What comes from elsewhere, met by what reads it: one function for each target of `fuzz/`.
//!
//! Built for tests and for fuzzing (`--cfg fuzzing`) alone. In both the same functions take bytes that may be anything and
//! hand them to the program's own parsers, some of which are not public. They return when nothing is wrong: what a parser
//! makes of the bytes is its business, as long as it ends soon, takes memory in proportion, and does not panic. Where
//! something must hold whatever the bytes are, it is asserted.
//!
//! The seeds in `fuzz/seeds` are made from real documents by `tests::seeds_are_as_they_are_made`; inputs that once did
//! harm are beside them, and an ordinary `cargo test` feeds all of them through.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::build::metadata::Metadata;
use crate::build::record;
use crate::build::validate::requirement;
use crate::cli::{cache, config::Config, spec};
use crate::environment::lock::{self, Choice, Lock, strip_credentials, strip_document};
use crate::environment::{Digest, EnvName, Interpreter, Markers, PublicKey, SecretKey, public_keys};
use crate::store::{
    self, CHUNK_SIZE, Catalog, Chunks, Codec, Node, Object, ObjectFile, Profile, Room, Store, TrustedKeys,
};

/// Meets bytes.
pub type Target = fn(&[u8]);

/// The targets by their names, which are those of the folders of their seeds.
pub const TARGETS: [(&str, Target); 7] = [
    ("catalogs", catalogs),
    ("config", config),
    ("documents", documents),
    ("locks", locks),
    ("names", names),
    ("objects", objects),
    ("records", records),
];

/// Bytes that are unpacked at most, where what is looked for needs no more.
const UNPACKED_MAX: u64 = 16 << 20;

/// A store in memory with nothing in it but what the function that asked for it puts there.
struct Place {
    _dir: tempfile::TempDir,
    store: Store,
}

impl Place {
    fn with(codec: Codec) -> Place {
        let memory = Path::new("/dev/shm");
        let dir = match memory.is_dir() {
            true => tempfile::tempdir_in(memory),
            false => tempfile::tempdir(),
        };
        let dir = dir.unwrap();
        let store = Store::init_with(&dir.path().join("store"), codec).unwrap();
        Place { _dir: dir, store }
    }

    /// Writes `bytes` at `path` below the store.
    fn put(&self, path: &str, bytes: &[u8]) -> PathBuf {
        let path = self.store.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }
}

fn text_of(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

/// Names of environments, their versions, digests, keys, and times and sizes as options take them.
pub fn names(bytes: &[u8]) {
    let Some(text) = text_of(bytes) else { return };
    if let Ok(name) = text.parse::<EnvName>() {
        assert_eq!(name.to_string(), text);
        let safe = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains(['/', '\0']);
        assert!(safe(name.workflow()) && safe(name.node()));
    }
    if let Ok(spec) = spec::spec(text) {
        assert!(text.starts_with(&spec.name.to_string()));
    }
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
    }
    if let Ok(key) = text.parse::<PublicKey>() {
        assert_eq!(key.to_string().parse::<PublicKey>().ok(), Some(key));
    }
    if let Ok(key) = SecretKey::of_file(text) {
        assert_eq!(SecretKey::of_file(&key.file()).unwrap().public(), key.public());
    }
    let _ = (public_keys(text), spec::duration(text), cache::size(text), cache::time(text), store::is_key(text));
}

/// A config file.
pub fn config(bytes: &[u8]) {
    let Some(text) = text_of(bytes) else { return };
    if let Ok(config) = Config::parse(text) {
        let sizes = [&config.cache_size, &config.cache_free];
        let _ = sizes.map(|text| text.as_deref().map(cache::size));
        config.trusted_keys.iter().for_each(|key| {
            let _ = (store::is_key(key), key.parse::<PublicKey>());
        });
    }
}

/// `RECORD` and `METADATA` of a wheel, and what that requires.
pub fn records(bytes: &[u8]) {
    if let Some(text) = text_of(bytes) {
        let lines = record::parse(text);
        // A quote that nothing ends takes in what is put behind it.
        if text.matches('"').count().is_multiple_of(2) {
            assert_eq!(record::parse(&record::rewrite(&lines, |_| false)), lines);
        }
        for line in &lines {
            if let Some(path) = record::resolve("lib/python3.11/site-packages", &line.path) {
                assert!(!path.split(|b| *b == b'/').any(|part| part == b".."));
            }
        }
        let _ = requirement(text);
    }
    if let Ok(metadata) = Metadata::parse(bytes) {
        are_required(&metadata.requires);
    }
}

fn are_required(texts: &[String]) {
    for text in texts {
        if let Some((requirement, marker)) = requirement(text) {
            let _ = (requirement.to_string(), marker.map(|marker| marker.holds(&|_| true)));
        }
    }
}

/// `pylock.toml` and `uv.lock`.
pub fn locks(bytes: &[u8]) {
    let Some(text) = text_of(bytes) else { return };
    let stripped = strip_credentials(text);
    assert!(stripped.len() <= text.len());
    if let Ok(stripped) = strip_document(text) {
        assert_eq!(strip_document(&stripped).ok(), Some(stripped), "what was stripped has nothing to strip");
    }
    let Ok(parsed) = Lock::parse(text) else { return };
    let python = python();
    let choice = Choice { extras: parsed.extras.clone(), groups: parsed.dependency_groups.clone() };
    let chosen = [Choice::default(), choice].map(|choice| parsed.select(&python, &choice));
    let target = lock::Target { platform: None, libc: "glibc 2.36", bytecode: true };
    for package in &parsed.packages {
        let _ = (package.key(&python, target), package.label());
    }
    for packages in chosen.into_iter().flatten() {
        let copy = Lock::working_copy(&packages, Path::new("/project")).unwrap();
        assert_eq!(Lock::parse(&copy).map(|lock| lock.packages.len()).ok(), Some(packages.len()), "{copy}");
    }
}

fn python() -> Interpreter {
    Interpreter {
        implementation: "cpython".into(),
        version: "3.11.7".into(),
        abi: "cpython-311-x86_64-linux-gnu".into(),
        magic: "a70d0d0a".into(),
        executable: "bin/python3.11".into(),
        libc: "glibc 2.36".into(),
        markers: Markers {
            implementation_name: "cpython".into(),
            implementation_version: "3.11.7".into(),
            os_name: "posix".into(),
            platform_machine: "x86_64".into(),
            platform_python_implementation: "CPython".into(),
            platform_release: "6.1".into(),
            platform_system: "Linux".into(),
            platform_version: "#1".into(),
            python_full_version: "3.11.7".into(),
            python_version: "3.11".into(),
            sys_platform: "linux".into(),
        },
        host_libraries: vec![],
        broken_modules: Default::default(),
    }
}

/// A document of a store: a letter that says which, and its text up to where it is sealed.
///
/// The seal is put to it, as nothing that is changed at random would have the right one; and once it is left out.
pub fn documents(bytes: &[u8]) {
    static PLACE: OnceLock<(Place, Store)> = OnceLock::new();
    let Some((kind, text)) = bytes.split_first() else { return };
    let (place, trusting) = PLACE.get_or_init(|| {
        let place = Place::with(Codec::Raw);
        let trust = TrustedKeys::new(vec![seed_key().public()], None, &place.store).unwrap();
        let trusting = place.store.clone().trusting(trust);
        (place, trusting)
    });
    let seal = Digest::of(text).to_string();
    for bytes in [text, &[text, b",\"seal\":\"", seal.as_bytes(), b"\"}\n"].concat()] {
        document(place, trusting, *kind, bytes);
    }
}

fn document(place: &Place, trusting: &Store, kind: u8, bytes: &[u8]) {
    let store = &place.store;
    let name: EnvName = "demo/a".parse().unwrap();
    let layer = Digest::of(b"layer");
    match kind {
        b'v' => {
            place.put("envs/demo/a/versions/1.json", bytes);
            let version = store.version(&name, 1);
            let _ = (trusting.version(&name, 1), store.signature(&name, 1, trusting.trust()));
            let _ = trusting.trust().unwrap().forget(&name);
            if let Ok(version) = version {
                assert_eq!((version.number, &version.environment), (1, &name));
                assert_eq!(serde_json::from_slice::<crate::environment::Version>(bytes).ok().as_ref(), Some(&version));
            }
        }
        b'p' => {
            place.put("envs/demo/p/current/2.json", bytes);
            let name = "demo/p".parse().unwrap();
            if let Ok(Some(pointer)) = store.pointer(&name) {
                assert!(pointer.sequence == 2 && pointer.version.is_none_or(|version| version <= pointer.newest));
            }
            let _ = (trusting.pointer(&name), trusting.trust().unwrap().forget(&name));
        }
        b'l' => {
            place.put(&format!("layers/{layer}.json"), bytes);
            if let Ok(doc) = store.layer(&layer) {
                assert_eq!(doc.digest, layer);
                let _ = (doc.catalog_object().chunks(), doc.pack_object().map(|pack| pack.chunks()));
                assert!(doc.spine.iter().all(|dir| dir.scanned().count() == dir.entries.len()));
                are_required(&doc.meta.requires);
            }
        }
        b'k' => {
            place.put(&format!("keys/{layer}.json"), bytes);
            let _ = store.layer_of_key(&layer);
        }
        b'i' => {
            place.put("interpreters/cpython.json", bytes);
            for found in store.interpreters().into_iter().flatten() {
                let _ = (found.python.minor(), found.python.site_packages(), found.python.layer_abi());
            }
        }
        b'o' => {
            place.put("policy/1.json", bytes);
            let _ = store.policy().map(|policy| policy.map(|policy| policy.public_keys()));
        }
        b'r' => {
            place.put("envs/demo/a/profiles/1.json", bytes);
            if let Ok(Some(profile)) = store.profile(&name, 1) {
                let _ = profile.bytes();
                let start = Profile::of_start(profile.objects.clone());
                let _ = profile.merged(start).bytes();
            }
        }
        b'e' => {
            place.put("leases/1.json", bytes);
            let _ = store.leases_told();
        }
        b'f' => {
            let path = place.put("../other/fabric.json", bytes);
            let _ = Store::open(path.parent().unwrap()).map(|store| store.codec());
        }
        b's' => {
            let _ = store::documents(bytes);
            let _ = store::documents(&zstd::bulk::compress(bytes, 1).unwrap());
        }
        _ => {}
    }
}

/// The key that signs the seeds, and that is trusted.
fn seed_key() -> SecretKey {
    SecretKey::new(&[7; 32], "seeds").unwrap()
}

/// A catalog.
///
/// It is opened as the one of the layer that it names: whoever makes a hostile one can choose that.
pub fn catalogs(bytes: &[u8]) {
    static PLACE: OnceLock<Place> = OnceLock::new();
    let named = bytes.windows(69).find_map(|part| text_of(part.strip_prefix(b"layer")?)?.parse().ok());
    let layer = named.unwrap_or_else(|| Digest::of(b"layer"));
    let path = PLACE.get_or_init(|| Place::with(Codec::Raw)).put("catalogs/x", bytes);
    let opened = [Catalog::open(&path, &layer), Catalog::of_bytes(bytes.to_vec(), &path, &layer)];
    for catalog in opened.into_iter().flatten() {
        catalog_is_asked(&catalog, bytes.len());
    }
}

fn catalog_is_asked(catalog: &Catalog, length: usize) {
    const ASKED: u32 = 50;
    assert!((1..=length).contains(&(catalog.len() as usize)));
    let all = catalog.all();
    assert!(all.as_ref().map_or(0, Vec::len) <= catalog.len() as usize);
    let mut scanned = 0;
    let _ = catalog.scan(|row| {
        assert!(row.parent < row.id && row.id < catalog.len());
        scanned += 1;
    });
    assert!(scanned <= catalog.len());
    for row in all.iter().flatten().take(ASKED as usize) {
        let _ = (catalog.lookup(row.parent, &row.name), catalog.scan_dir(row.id, |_| ()));
        if let Ok(path) = catalog.path_of(row.id) {
            assert!(path.len() <= length * 2);
            let _ = catalog.find(&path);
        }
        if let Node::File { size, digest, .. } = &row.node {
            let _ = catalog.chunks(digest, *size);
        }
    }
    (0..ASKED.min(catalog.len())).for_each(|id| {
        let _ = catalog.row(id);
    });
    let _ = catalog.pack().map(|pack| catalog.chunks(&pack.digest, pack.size));
    let _ = catalog.verify();
}

/// A pack or blob as it lies in a store: a byte that says how, eight for the length that is said of it, and its bytes.
///
/// The digest of the lengths of a compressed one is put right, as nothing that is changed at random would have it.
pub fn objects(bytes: &[u8]) {
    static PLACES: OnceLock<[Place; 2]> = OnceLock::new();
    let Some((how, rest)) = bytes.split_first() else { return };
    let Some((said, stored)) = rest.split_first_chunk::<8>() else { return };
    let size = u64::from_le_bytes(*said);
    let place = &PLACES.get_or_init(|| [Codec::Raw, Codec::Zstd].map(Place::with))[usize::from(how & 1)];
    let mut stored = stored.to_vec();
    // Its number of bytes, then four for the length of each chunk, then the digest of both.
    let table = 16 + 8 + usize::try_from(Chunks::count(size)).unwrap_or(usize::MAX / 8) * 4;
    if how & 2 != 0 && stored.len() >= table + 32 {
        let digest = Digest::of(&stored[16..table]);
        stored[table..table + 32].copy_from_slice(digest.as_bytes());
    }
    let object = Object { room: Room::Packs, digest: Digest::of(b"object"), size };
    place.put(&format!("packs/{}", object.digest), &stored);
    place.put(&format!("blobs/{}", object.digest), &stored);
    let _ = place.store.read_blob(&object.digest);
    let Ok(file) = ObjectFile::open(&place.store, &object) else { return };
    let mut unpacked = 0;
    let mut at = 0;
    while at < object.chunks() && unpacked < UNPACKED_MAX {
        let request = file.request(at);
        assert!(request.contains(&at) && request.end - request.start <= u64::from(u32::MAX));
        if let Ok(chunks) = file.read_stored(request.start, request.end - request.start) {
            assert!(chunks.length() <= stored.len() as u64);
            for chunk in request.clone() {
                let _ = chunks.unpack(chunk).map(|bytes| assert_eq!(bytes.len() as u64, object.chunk_size(chunk)));
            }
        }
        unpacked += (request.end - at) * CHUNK_SIZE;
        at = request.end;
    }
    if size <= UNPACKED_MAX {
        let read = file.read();
        assert_eq!(file.hash().ok(), read.as_ref().ok().map(|bytes| Digest::of(bytes)));
        assert!(read.is_err() || read.is_ok_and(|bytes| bytes.len() as u64 == size));
    }
}

#[cfg(test)]
mod tests;
