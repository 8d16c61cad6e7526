//! A mounted environment works as a venv, whatever Python it has.

use std::path::Path;
use std::process::Command;

use crate::world::{Mount, World, check, clean, is_root, python, python311, sh, text};

const PACKAGES: &[&str] = &["numpy", "requests", "pip", "certifi", "pyyaml"];

/// Environment `venv/<minor>` on that Python; None (with the reason printed) when this machine has none.
fn environment(minor: &str) -> Option<String> {
    let Some(python) = python(minor) else {
        println!("skipped for Python {minor}: this machine has none");
        return None;
    };
    let name = format!("venv/py{}", minor.replace('.', ""));
    let python = python.display().to_string();
    let mut args = PACKAGES.to_vec();
    args.extend(["--python", &python]);
    World::shared().ensure(&name, &args);
    Some(name)
}

fn works_as_a_venv(minor: &str) {
    let Some(name) = environment(minor) else { return };
    let world = World::shared();
    let mount = world.mount();
    let venv = mount.venv(&name);
    let at = venv.display().to_string();

    // Prefixes: the venv as it was called, the interpreter inside the mount.
    let prefixes = mount.run(
        &name,
        "import sys, os; print(sys.prefix); print(os.path.realpath(sys.base_prefix)); print(sys.exec_prefix); \
         print(sys.version_info[:2] == tuple(map(int, sys.argv[1:] or '0.0'.split('.'))) or sys.version.split()[0])",
    );
    let lines: Vec<&str> = prefixes.lines().collect();
    assert_eq!(lines[0], at);
    assert_eq!(lines[2], at);
    let pinned = mount.at.join(&name).join(".versions/1");
    assert_eq!(Path::new(lines[1]), pinned.join(".python"));
    assert!(lines[3].starts_with(minor), "{prefixes}");

    // source activate, which goes to the pinned path (it resolves symlinks); a console script; pip.
    let activated = sh(&format!(
        "source {at}/bin/activate; command -v python; echo $VIRTUAL_ENV; python -m pip list; deactivate; echo ok"
    ));
    let active = pinned.join(".venv").display().to_string();
    assert!(activated.starts_with(&format!("{active}/bin/python\n{active}\n")), "{activated}");
    for package in ["numpy", "requests", "pip"] {
        assert!(activated.contains(package), "{activated}");
    }
    assert!(check(Command::new(venv.join("bin/pip")).arg("--version")).contains(&format!("python {minor}")));
    // ... also through a symlink to the script, and from another directory.
    let link = world.dir().join(format!("pip-link-{minor}"));
    let _ = std::fs::remove_file(&link);
    std::os::unix::fs::symlink(venv.join("bin/pip"), &link).unwrap();
    check(Command::new(&link).arg("--version").current_dir("/"));

    // Metadata of every distribution.
    let listed = mount.run(
        &name,
        "from importlib.metadata import distributions\nfor d in distributions(): print(d.metadata['Name'].lower(), d.version, len(d.files) > 0)",
    );
    for package in PACKAGES {
        assert!(listed.lines().any(|l| l.starts_with(&format!("{package} ")) && l.ends_with("True")), "{listed}");
    }

    // Extensions with bundled libraries, the standard library's own, isolated mode.
    let loaded = check(&mut clean(Command::new(mount.python(&name)).args([
        "-I",
        "-c",
        "import numpy, ssl, sqlite3, ctypes, zlib, bz2, lzma, hashlib, yaml, certifi\n\
         assert numpy.linalg.inv(numpy.eye(3)).sum() == 3.0\n\
         ssl.create_default_context(cafile=certifi.where())\n\
         assert sqlite3.connect(':memory:').execute('select 6*7').fetchone() == (42,)\n\
         assert ctypes.CDLL(None).getpid() > 0\n\
         print(sorted({l.split()[-1] for l in open('/proc/self/maps') if '.libs/' in l or 'libpython' in l}))",
    ])));
    assert!(loaded.contains("numpy.libs/"), "{loaded}");
    // Whatever is bundled or is Python itself comes from the mount.
    let pinned_text = pinned.display().to_string();
    assert!(loaded.split('\'').filter(|p| p.starts_with('/')).all(|p| p.starts_with(&pinned_text)), "{loaded}");

    // Bytecode is valid: nothing is compiled again.
    let verbose = clean(Command::new(mount.python(&name)).args(["-v", "-c", "import numpy, json"])).output().unwrap();
    let verbose = text(&verbose.stderr);
    assert!(verbose.contains("matches") && !verbose.contains("bytecode is stale"), "{verbose}");
    assert!(
        !verbose.lines().any(|l| l.contains("code object from '") && l.ends_with(".py'")),
        "compiled anew: {verbose}"
    );

    // Tracebacks show the mount's paths, and the source lines.
    let failed =
        clean(Command::new(mount.python(&name)).args(["-c", "import json; json.loads('{')"])).output().unwrap();
    let stderr = text(&failed.stderr);
    assert!(
        stderr.contains(&format!("{}/", pinned.join(".python").display())) || stderr.contains(".python/lib"),
        "{stderr}"
    );
    assert!(stderr.contains("obj, end = self.raw_decode"), "{stderr}");
    let failed = clean(Command::new(mount.python(&name)).args(["-c", "import requests; requests.get('nope')"]))
        .output()
        .unwrap();
    assert!(
        text(&failed.stderr).contains(&format!("{at}/lib/python{minor}/site-packages/requests/")),
        "{}",
        text(&failed.stderr)
    );

    // multiprocessing with spawn and with forkserver.
    let script = world.dir().join(format!("mp-{minor}.py"));
    std::fs::write(
        &script,
        "import multiprocessing as mp, sys, os, numpy\n\
         def f(x): return (os.path.realpath(sys.prefix), int(numpy.square(x)))\n\
         if __name__ == '__main__':\n\
         \x20   for method in ('spawn', 'forkserver'):\n\
         \x20       with mp.get_context(method).Pool(2) as pool: print(pool.map(f, [3]))\n",
    )
    .unwrap();
    let spawned = check(&mut clean(Command::new(mount.python(&name)).arg(&script)));
    assert_eq!(spawned.matches(&format!("('{}', 9)", pinned.join(".venv").display())).count(), 2, "{spawned}");

    // A venv made from it, with pip of its own where the interpreter brings one.
    let nested = world.dir().join(format!("nested-{minor}"));
    let _ = std::fs::remove_dir_all(&nested);
    check(&mut clean(Command::new(mount.python(&name)).args(["-m", "venv", nested.to_str().unwrap()])));
    let nested = check(&mut clean(
        Command::new(nested.join("bin/python"))
            .args(["-c", "import sys, pip, os; print(sys.prefix, os.path.realpath(sys.base_prefix))"]),
    ));
    assert!(nested.contains(&pinned.join(".python").display().to_string()), "{nested}");
}

#[test]
fn an_environment_on_python_3_9_works_as_a_venv() {
    works_as_a_venv("3.9");
}

#[test]
fn an_environment_on_python_3_11_works_as_a_venv() {
    works_as_a_venv("3.11");
}

#[test]
fn an_environment_on_python_3_13_works_as_a_venv() {
    works_as_a_venv("3.13");
}

/// Debian's python3 is spread over /usr, links nothing of its own and has other traps than pyenv's.
#[test]
fn an_environment_on_the_distributions_python_works() {
    let system = Path::new("/usr/bin/python3");
    if !system.exists() {
        println!("skipped: no /usr/bin/python3");
        return;
    }
    let world = World::shared();
    world.ensure("venv/system", &["numpy", "pip", "--python", "/usr/bin/python3"]);
    let mount = world.mount();
    let out = mount.run(
        "venv/system",
        "import sys, ssl, sqlite3, ctypes, numpy, sysconfig; print(sys.base_prefix); print(sysconfig.get_path('include'))",
    );
    let base = mount.at.join("venv/system/.versions/1/.python").display().to_string();
    assert!(out.lines().all(|l| l.starts_with(&base)), "{out}");
}

/// Runs `script` in a private mount namespace in which the interpreter's origin is hidden.
fn with_origin_hidden(origin: &Path, script: &str) -> String {
    sh(&format!(
        "unshare --mount --propagation private bash -euc 'mount -t tmpfs none {}; test ! -e {}/bin; {}'",
        origin.display(),
        origin.display(),
        script.replace('\'', "'\\''")
    ))
}

#[test]
fn code_runs_at_another_path_with_the_original_interpreter_hidden() {
    if !is_root() {
        println!("skipped: a mount namespace with a hidden directory needs root");
        return;
    }
    let Some(name) = environment("3.11") else { return };
    let python = python311();
    let origin = Path::new(&python).parent().unwrap().parent().unwrap();
    if origin == Path::new("/usr") {
        println!("skipped: this machine's python3.11 lives in /usr, which cannot be hidden");
        return;
    }
    let world = World::shared();
    let mount = world.mount();
    let code = "import sys, numpy, ssl, sqlite3; print(sys.base_prefix); print(sys.prefix); \
                print(open(sys.prefix + \"/pyvenv.cfg\").readline().strip())";
    let elsewhere = world.dir().join("else where");
    std::fs::create_dir_all(&elsewhere).unwrap();
    let at = elsewhere.display();
    // (what is bound, where the environment is below it)
    let binds = [
        (mount.at.clone(), format!("{name}/")),
        (mount.at.join("venv"), "py311/".to_string()),
        (mount.at.join(&name), String::new()),
    ];
    for (bound, below) in binds {
        let out = with_origin_hidden(
            origin,
            &format!(
                "mount --bind {} \"{at}\"; umount {}; \"{at}/{below}.venv/bin/python\" -c '{code}'",
                bound.display(),
                mount.at.display()
            ),
        );
        let base = format!("{at}/{below}.versions/1/.python");
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines, [base.as_str(), &format!("{at}/{below}.venv"), &format!("home = {base}/bin")]);
    }
    // One version alone.
    let out = with_origin_hidden(
        origin,
        &format!(
            "mount --bind {} \"{at}\"; umount {}; \"{at}/.venv/bin/python\" -c '{code}'",
            mount.at.join(&name).join(".versions/1").display(),
            mount.at.display()
        ),
    );
    assert!(out.starts_with(&format!("{at}/.python\n{at}/.venv\nhome = {at}/.python/bin")), "{out}");
}

#[test]
fn a_c_extension_builds_in_a_venv_made_from_an_environment() {
    let Some(name) = environment("3.11") else { return };
    let world = World::shared();
    let mount: Mount<'_> = world.mount();
    let dir = world.dir().join("extension");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(
        dir.join("hi.c"),
        "#include <Python.h>\n\
         static struct PyModuleDef m = {PyModuleDef_HEAD_INIT, \"hi\", 0, -1, 0};\n\
         PyMODINIT_FUNC PyInit_hi(void) { return PyModule_Create(&m); }\n",
    )
    .unwrap();
    let flags = mount.run(
        &name,
        "import sysconfig as s; print(s.get_path('include'), s.get_config_var('EXT_SUFFIX'), s.get_config_var('LIBDIR'))",
    );
    let [include, suffix, _libdir] = flags.split_whitespace().collect::<Vec<_>>()[..] else { panic!("{flags}") };
    assert!(include.starts_with(mount.at.to_str().unwrap()), "{flags}");
    sh(&format!("cd {}; gcc -shared -fPIC -I{include} hi.c -o hi{suffix}", dir.display()));
    check(&mut clean(Command::new(mount.python(&name)).args(["-c", "import hi"]).current_dir(&dir)));
}
