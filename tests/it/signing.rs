//! Signed versions as a user meets them: `create` with a key, and machines that believe no other.

use std::fs;
use std::process::Command;

use crate::world::{World, python311, text};

#[test]
fn what_was_created_with_a_key_runs_where_only_that_key_is_trusted() {
    let world = World::new();
    let key = world.dir().join("release.key");
    let key = key.to_str().unwrap();
    let public = world.ok(["key", "new", "--out", key, "--name", "release"]);
    let python = python311();
    let create = |more: &[&str]| {
        let all = ["create", "demo/a", "six", "markdown-it-py", "--python", &python, "--json"];
        serde_json::from_str::<serde_json::Value>(&world.ok(all.iter().chain(more))).unwrap()
    };
    assert_eq!(create(&[])["version"], 1);
    // The same once more is another version for its signature alone.
    let again = create(&["--sign-with", key]);
    assert_eq!(
        (&again["version"], &again["outcome"], &again["installed"]),
        (&2.into(), &"published".into(), &0.into())
    );
    assert_eq!(create(&["--sign-with", key])["outcome"], "unchanged");
    assert_eq!(create(&["--sign-with", key, "--trust-key", public.trim()])["outcome"], "unchanged");
    let told = world.fails(1, ["create", "demo/a", "six", "--trust-key", public.trim()]);
    assert!(told.contains("no key to sign with") && told.contains("--sign-with"), "{told}");

    let trust = format!("--trust-key={}", public.trim());
    let at = world.dir().join("mnt");
    let mount = world.mount_with(&at, &[&trust]);
    let code = "import six, markdown_it, importlib.metadata as m, json; json.dumps(six.__version__); \
                print([e.name for e in m.entry_points(group='console_scripts')])";
    assert_eq!(mount.run("demo/a", code).trim(), "['markdown-it']");
    assert!(mount.venv("demo/a").join("bin/markdown-it").exists());
    let refused = fs::read_dir(at.join("demo/a/.versions/1")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EKEYREJECTED));
    drop(mount);
    // A command that is tried on a mount of its own is tried on what is signed.
    world.ok(["profile", "demo/a", &trust, "--", "python", "-c", "import six"]);
    let told = world.fails(1, ["profile", "demo/a@1", &trust, "--", "python", "-c", "import six"]);
    assert!(told.contains("version 1 of demo/a is refused: not signed"), "{told}");
    let told = world.output(["fsck", &trust]);
    assert!(String::from_utf8_lossy(&told.stdout).contains("1 signed by release"), "{told:?}");
}

#[test]
fn a_builder_signs_no_layer_that_somebody_else_has_put_into_the_store() {
    let world = World::new();
    let key = world.dir().join("release.key");
    let key = key.to_str().unwrap().to_string();
    let public = world.ok(["key", "new", "--out", &key]).trim().to_string();
    let python = python311();
    // On another machine: what it knows is in a directory of its own.
    let on = |machine: &str, args: &[&str]| -> (i32, String) {
        let mut command: Command = world.command(args);
        let done = command.env("XDG_STATE_HOME", world.dir().join(machine)).output().unwrap();
        (done.status.code().unwrap(), text(&done.stdout) + &text(&done.stderr))
    };
    let create = |machine: &str, name: &str, more: &[&str]| {
        on(machine, &[&["create", name, "six", "mdurl", "--python", "3.11", "--sign-with", &key][..], more].concat())
    };
    let (code, told) = on("somebody", &["create", "demo/a", "six", "mdurl", "--python", &python]);
    assert_eq!(code, 0, "{told}");
    // Whoever it was may have put anything there.
    let (code, told) = create("builder", "demo/b", &[]);
    assert!(code == 1 && told.contains("not known who made cpython 3.11") && told.contains("python add"), "{told}");
    let (code, told) = on("builder", &["python", "add", &python]);
    assert_eq!(code, 0, "{told}");
    let (code, told) = create("builder", "demo/b", &[]);
    assert!(code == 1 && told.contains("not known who made mdurl") && told.contains("--rebuild"), "{told}");
    let (code, told) = create("builder", "demo/b", &["--rebuild"]);
    assert_eq!(code, 0, "{told}");
    let (code, told) = create("builder", "demo/c", &[]);
    assert!(code == 0 && told.contains("0 new"), "what it has made it takes: {told}");

    // Another builder takes what a key that it trusts has signed, and nothing else.
    let (code, told) = create("second", "demo/d", &[]);
    assert_eq!(code, 1, "{told}");
    let trusting = ["--trust-key", &public];
    let (code, told) = create("second", "demo/d", &trusting);
    assert!(code == 0 && told.contains("0 new"), "{told}");

    // A key of the store that leads to another package, of which all is signed.
    let shown = world.json(["show", "demo/b"]);
    let layer = |name: &str| {
        let all = shown["packages"].as_array().unwrap();
        all.iter().find(|package| package["name"] == name).unwrap()["layer"].as_str().unwrap().to_string()
    };
    let (six, mdurl) = (layer("six"), layer("mdurl"));
    for entry in fs::read_dir(world.store().join("keys")).unwrap() {
        let path = entry.unwrap().path();
        if fs::read_to_string(&path).unwrap().contains(&six) {
            fs::remove_file(&path).unwrap();
            let forged = serde_json::json!({ "layer": mdurl });
            fs::write(&path, envfabric::store::sealed(&forged).unwrap()).unwrap();
        }
    }
    let (code, told) = create("third", "demo/e", &trusting);
    assert!(code == 1 && told.contains("says that six is layer") && told.contains("which is mdurl"), "{told}");
    // An altered document of a layer is not taken either: what is signed comes from what was signed.
    for entry in fs::read_dir(world.store().join("layers")).unwrap() {
        let path = entry.unwrap().path();
        let mut doc: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        doc.as_object_mut().unwrap().remove("seal");
        doc["texts"] = serde_json::json!([{ "row": 1, "text": "evil" }]);
        fs::remove_file(&path).unwrap();
        fs::write(&path, envfabric::store::sealed(&doc).unwrap()).unwrap();
    }
    let (code, told) = on(
        "fourth",
        &[&["create", "demo/f", "mdurl", "--python", "3.11", "--sign-with", &key][..], &trusting].concat(),
    );
    assert_eq!(code, 0, "{told}");
    let version: serde_json::Value =
        serde_json::from_slice(&fs::read(world.store().join("envs/demo/f/versions/1.json")).unwrap()).unwrap();
    let store = envfabric::store::Store::open(&world.store()).unwrap();
    for summary in version["summaries"].as_array().unwrap() {
        let bytes = store.read_blob(&summary["blob"].as_str().unwrap().parse().unwrap()).unwrap();
        let docs = envfabric::store::documents(&bytes).unwrap();
        assert!(docs.iter().flat_map(|doc| &doc.texts).all(|text| text.text != "evil"));
    }
}
