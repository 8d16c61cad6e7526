use std::collections::BTreeSet;

use super::*;
use crate::environment::{Builder, Document, InterpreterRef, Source, VERSION_FORMAT, Version};
use crate::store::{
    Index, LayerKind, LayerMeta, LayerWriter, Lease, Leased, Staged, StagedKind, StoredInterpreter, Touched,
    hostile_catalogs, now,
};

fn seeds() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds")
}

#[test]
fn seeds_and_findings_do_no_harm() {
    for (target, run) in TARGETS {
        let files: Vec<PathBuf> =
            fs::read_dir(seeds().join(target)).unwrap().map(|file| file.unwrap().path()).collect();
        assert!(files.len() >= 3, "{target} has no seeds");
        for file in files {
            eprintln!("{}", file.display());
            run(&fs::read(&file).unwrap());
        }
    }
}

/// Each seed, cut off and with bytes changed, as far as that goes in a moment.
#[test]
fn seeds_that_are_cut_or_changed_do_no_harm() {
    for (target, run) in TARGETS {
        for file in fs::read_dir(seeds().join(target)).unwrap() {
            let bytes = fs::read(file.unwrap().path()).unwrap();
            for at in (0..bytes.len()).step_by((bytes.len() / 40).max(1)) {
                run(&bytes[..at]);
                let mut changed = bytes.clone();
                changed[at] ^= 0x81;
                run(&changed);
            }
        }
    }
}

#[test]
fn every_target_is_one_of_cargo_fuzz_and_has_seeds() {
    let below = |dir: &str| -> BTreeSet<String> {
        let files = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(dir)).unwrap();
        files.map(|file| file.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned()).collect()
    };
    let targets: BTreeSet<String> = TARGETS.iter().map(|(name, _)| name.to_string()).collect();
    assert_eq!(below("fuzz/fuzz_targets"), targets);
    assert_eq!(below("fuzz/seeds"), targets);
}

/// Writes the seeds that are made from real documents: `cargo test --lib -- --ignored seeds_are_made`.
#[test]
#[ignore = "writes into the repository"]
fn seeds_are_made() {
    for codec in [Codec::Raw, Codec::Zstd] {
        seeds_of(codec);
    }
}

fn keep(target: &str, name: &str, bytes: &[u8]) {
    fs::write(seeds().join(target).join(name), bytes).unwrap();
}

/// A document without its seal, behind the letter of its sort.
fn keep_document(kind: u8, name: &str, path: &Path) {
    let bytes = fs::read(path).unwrap();
    let end = bytes.windows(9).rposition(|part| part == b",\"seal\":\"").unwrap();
    keep("documents", name, &[&[kind], &bytes[..end]].concat());
}

fn seeds_of(codec: Codec) {
    let place = Place::with(codec);
    let how = u8::from(codec == Codec::Zstd) * 3;
    let store = place.store.clone().signing_with(seed_key());
    let index = std::sync::Arc::new(Index::in_memory().unwrap());
    let meta = LayerMeta {
        kind: LayerKind::Wheel,
        name: "alpha".into(),
        version: "1.0".into(),
        abi: "cpython-311-x86_64-linux-gnu+a70d0d0a".into(),
        requires: vec!["numpy>=1.26; python_version < \"3.12\"".into()],
        requires_python: Some(">=3.9".into()),
        startup_files: vec![],
        uncompiled: Default::default(),
        bytecode: true,
    };
    let site = "lib/python3.11/site-packages";
    let file = |path: &str, content: &[u8]| Staged {
        path: format!("{site}/{path}").into(),
        kind: StagedKind::Bytes { content: content.to_vec(), executable: false },
    };
    let link = Staged { path: b"bin/alpha".to_vec(), kind: StagedKind::Symlink { target: b"../lib/a".to_vec() } };
    let files = vec![
        file("alpha/__init__.py", b"import os\n"),
        file("alpha/data.bin", &[7; 600_000]),
        file("alpha-1.0.dist-info/entry_points.txt", b"[console_scripts]\nalpha = alpha:main\n"),
        link,
    ];
    let doc = LayerWriter::new(&store).write(meta, files).unwrap();
    let catalog = ObjectFile::open(&store, &doc.catalog_object()).unwrap().read().unwrap();
    let mut pack = vec![how];
    pack.extend(doc.pack_size.to_le_bytes());
    pack.extend(fs::read(store.pack_path(&doc.pack.unwrap())).unwrap());
    keep("objects", &format!("pack-{codec:?}"), &pack);
    let zeros = vec![0; 800_000];
    let blob = store.ensure_blob(&zeros).unwrap();
    let stored = fs::read(store.blob_path(&blob)).unwrap();
    keep(
        "objects",
        &format!("blob-{codec:?}"),
        &[&[how], &800_000u64.to_le_bytes()[..], &stored[..stored.len().min(3_000)]].concat(),
    );
    if codec == Codec::Zstd {
        return;
    }
    keep("catalogs", "real", &catalog);
    for (what, bytes) in hostile_catalogs() {
        keep("catalogs", &what.replace(' ', "-"), &bytes);
    }
    let layer = fs::read_to_string(store.layer_path(&doc.digest)).unwrap();
    let layer = layer.replace(&doc.digest.to_string(), &Digest::of(b"layer").to_string());
    keep("documents", "layer", format!("l{}", &layer[..layer.rfind(",\"seal\":").unwrap()]).as_bytes());
    let name: EnvName = "demo/a".parse().unwrap();
    let summaries = store.ensure_summaries(&index, &[doc.digest], false).unwrap();
    let summary = store.read_blob(&summaries[0].blob).unwrap();
    keep("documents", "summary-packed", &[b"s", &summary[..]].concat());
    keep("documents", "summary", &[b"s", &zstd::bulk::decompress(&summary, 1 << 20).unwrap()[..]].concat());
    let lock = "lock-version = \"1.0\"\n";
    let draft = Version {
        format: VERSION_FORMAT,
        environment: name.clone(),
        number: 1,
        created: now(),
        interpreter: InterpreterRef {
            layer: doc.digest,
            version: "3.11.7".into(),
            executable: "bin/python3.11".into(),
        },
        scaffold: doc.digest,
        layers: vec![doc.digest],
        summaries,
        lock: Some(Document {
            name: "pylock.toml".into(),
            blob: store.ensure_blob(lock.as_bytes()).unwrap(),
            size: lock.len() as u64,
        }),
        pyproject: None,
        source: Source::Requirements { requirements: vec!["alpha".into()], files: vec![] },
        builder: Builder { envfabric: "0".into(), uv: None, host: "h".into() },
        conflicts: vec![],
        nonce: String::new(),
    };
    store.publish_version(draft.clone()).unwrap();
    let root = store.root();
    keep_document(b'v', "version-signed", &root.join("envs/demo/a/versions/1.json"));
    store.publish_version(Version { environment: "demo/p".parse().unwrap(), ..draft.clone() }).unwrap();
    store.publish_version(Version { environment: "demo/p".parse().unwrap(), ..draft.clone() }).unwrap();
    keep_document(b'p', "pointer-signed", &root.join("envs/demo/p/current/2.json"));
    let key = Digest::of(b"key");
    store.publish_key(&key, &doc.digest).unwrap();
    keep_document(b'k', "key", &root.join(format!("keys/{key}.json")));
    let interpreter = StoredInterpreter {
        name: "cpython-3.11.7".into(),
        layer: doc.digest,
        scaffold: doc.digest,
        python: python(),
        origin: "/usr/bin/python3.11".into(),
        created: now(),
    };
    store.publish_interpreter(&interpreter).unwrap();
    keep_document(b'i', "interpreter", &root.join("interpreters/cpython-3.11.7.json"));
    let touched = Touched {
        room: Room::Packs,
        digest: doc.pack.unwrap(),
        size: doc.pack_size,
        layer: doc.digest,
        runs: vec![(0, 1), (2, 3)],
    };
    store.add_profile(&name, 1, &Profile::of_start(vec![touched])).unwrap();
    keep_document(b'r', "profile", &root.join("envs/demo/a/profiles/1.json"));
    store.set_policy(&[seed_key().public()]).unwrap();
    keep_document(b'o', "policy", &root.join("policy/1.json"));
    let mut lease = Lease::new(store.clone(), "mount at /envs");
    lease.protect([Leased { environment: name.clone(), version: 1 }].into()).unwrap();
    let lease = fs::read_dir(root.join("leases")).unwrap().next().unwrap().unwrap().path();
    keep_document(b'e', "lease", &lease);
    keep_document(b'f', "fabric", &root.join("fabric.json"));
    let unsigned = place.store.clone();
    unsigned.publish_version(Version { environment: "demo/u".parse().unwrap(), ..draft }).unwrap_err();
    keep("names", "key", seed_key().public().to_string().as_bytes());
    keep("names", "secret", seed_key().file().as_bytes());
}
