//! Copies of a mounted environment by ordinary tools are identical to it.

use crate::tree;
use crate::world::{World, python311, sh};

#[test]
fn cp_tar_rsync_and_find_see_the_same_tree() {
    let world = World::shared();
    let python = python311();
    world.ensure("copies/one", &["requests", "numpy", "pip", "ipykernel", "--python", &python]);
    let mount = world.mount();
    let source = mount.at.join("copies/one/.versions/1");
    let expected = tree::walk(&source);
    assert!(expected.len() > 3000, "{}", expected.len());
    let s = source.display();
    let out = tempfile::tempdir_in(world.dir()).unwrap();
    let o = out.path().display();
    for (tool, script) in [
        ("cp", format!("cp -a {s} {o}/cp")),
        ("tar", format!("mkdir {o}/tar; tar -C {s} -cf - . | tar -C {o}/tar -xf -")),
        ("rsync", format!("rsync -a {s}/ {o}/rsync")),
    ] {
        sh(&script);
        let copy = out.path().join(tool);
        // Time: the copies have it as the mount tells it.
        sh(&format!(
            "rsync -an --delete --itemize-changes {s}/ {}/ > {o}/changes; test ! -s {o}/changes || (head {o}/changes; false)",
            copy.display()
        ));
        let differences = tree::differences(("mount", &expected), (tool, &tree::walk(&copy)), |_, a, b| a == b);
        // pyvenv.cfg names where it was read, and these were read at one place.
        assert!(differences.is_empty(), "{tool}: {}", differences.join("\n"));
    }
    let found = sh(&format!("cd {s}; find . -mindepth 1 | wc -l"));
    assert_eq!(found.trim(), expected.len().to_string());
    let twice =
        sh(&format!("cd {s}; find . -printf '%i %y %p\\n' | awk '$2==\"d\"{{print $1}}' | sort | uniq -d | wc -l"));
    assert_eq!(twice.trim(), "0", "a directory inode number was used twice");
}
