//! Signed versions as a user meets them: `create` with a key, and machines that believe no other.

use std::fs;

use crate::world::{World, python311};

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
