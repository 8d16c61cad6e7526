use proptest::prelude::*;

use super::marker::Marker;
use super::*;
use crate::environment::cpython311;

const SHA: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

const HERE: Target<'static> = Target { platform: None, libc: "glibc 2.36", bytecode: true };

fn lock(body: &str) -> Lock {
    Lock::parse(&format!("lock-version = '1.0'\n{body}")).unwrap()
}

fn entry(name: &str, more: &str) -> String {
    format!(
        "[[packages]]\nname = '{name}'\nversion = '1.0'\n{more}\nwheels = [{{url = 'https://h/x.whl', hashes = {{sha256 = '{SHA}'}}}}]\n"
    )
}

fn selected(lock: &Lock, choice: &Choice) -> Result<Vec<String>> {
    Ok(lock.select(&cpython311(), choice)?.iter().map(|p| p.name.clone()).collect())
}

#[test]
fn every_kind_of_origin_is_read() {
    let lock = lock(&format!(
        "requires-python = '>=3.9'\n[[packages]]\nname = 'A_b'\nversion = '1.0'\nupload-time = 2024-01-01T00:00:00Z\n\
         sdist = {{url = 'https://h/a.tar.gz', upload-time = 2024-01-01T00:00:00Z, hashes = {{sha256 = '{SHA}'}}}}\n\
         [[packages]]\nname = 'b'\nversion = '1.0'\narchive = {{path = '../b.whl', hashes = {{sha256 = '{SHA}'}}}}\n\
         [[packages]]\nname = 'c'\nvcs = {{type = 'git', url = 'https://u:p@h/c', commit-id = '{}'}}\n\
         [[packages]]\nname = 'd'\ndirectory = {{path = '../d', editable = true}}\n",
        "0".repeat(40)
    ));
    let names: Vec<&str> = lock.packages.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(names, ["a-b", "b", "c", "d"]);
    let python = cpython311();
    let keys: Vec<_> = lock.packages.iter().map(|p| p.key(&python, HERE)).collect();
    assert!(keys[..3].iter().all(Option::is_some) && keys[3].is_none());
    assert_ne!(keys[0], lock.packages[0].key(&python, Target { bytecode: false, ..HERE }));
    let refs: Vec<&Package> = lock.packages.iter().collect();
    let copy = Lock::working_copy(&refs, Path::new("/base/dir")).unwrap();
    for part in ["path = \"/base/b.whl\"", "path = \"/base/d\"", "https://u:p@h/c"] {
        assert!(copy.contains(part), "{part} in {copy}");
    }
    assert!(!copy.contains("editable"));
    assert_eq!(Lock::parse(&copy).unwrap().packages.len(), 4);
}

#[test]
fn markers_extras_and_groups_decide_what_is_wanted() {
    let body = format!(
        "extras = ['gpu']\ndependency-groups = ['dev', 'test']\ndefault-groups = ['dev']\n{}{}{}{}{}",
        entry("always", ""),
        entry("windows", "marker = \"sys_platform == 'win32'\""),
        entry("gpu-thing", "marker = \"'gpu' in extras\""),
        entry("dev-thing", "marker = \"'dev' in dependency_groups\""),
        entry("test-thing", "marker = \"'test' in dependency_groups and python_version < '3.12'\""),
    );
    let lock = lock(&body);
    assert_eq!(selected(&lock, &Choice::default()).unwrap(), ["always", "dev-thing"]);
    let all = Choice { extras: vec!["GPU".into()], groups: vec!["test".into()] };
    assert_eq!(selected(&lock, &all).unwrap(), ["always", "gpu-thing", "dev-thing", "test-thing"]);
    let wrong = Choice { extras: vec!["cpu".into()], ..Choice::default() };
    let error = selected(&lock, &wrong).unwrap_err();
    assert_eq!(error.kind(), Kind::Usage);
    assert_eq!(error.hint_text(), Some("it has: gpu"));
}

#[test]
fn a_lock_for_another_python_or_with_two_of_a_name_is_refused() {
    for (body, part) in [
        ("requires-python = '>=3.12'".to_string(), "requires Python >=3.12"),
        ("environments = [\"sys_platform == 'win32'\"]".to_string(), "not made for"),
        (entry("a", "requires-python = '<3'"), "package \"a\""),
        (entry("a", "") + &entry("A", ""), "two entries of \"a\""),
        (entry("a", "marker = 'nonsense'"), "\"marker\" of package \"a\""),
        (entry("a", &format!("marker = \"{}\"", "(".repeat(10_000))), "not readable"),
    ] {
        let error = selected(&lock(&body), &Choice::default()).unwrap_err();
        assert!(error.chain().contains(part), "{body}: {error:?}");
    }
    let fine = entry("a", "marker = \"sys_platform == 'linux'\"") + &entry("a", "marker = \"sys_platform != 'linux'\"");
    assert_eq!(selected(&lock(&fine), &Choice::default()).unwrap(), ["a"]);
}

#[test]
fn what_is_wrong_is_named() {
    let wheel = format!("wheels = [{{url = 'https://h/x', hashes = {{sha256 = '{SHA}'}}}}]");
    for (body, part) in [
        ("[[packages]]\n".to_string(), "package 1 of the lock has no name"),
        ("[[packages]]\nname = '../x'".into(), "unacceptable name"),
        ("[[packages]]\nname = 'x'".into(), "package \"x\" of the lock does not say where"),
        ("[[packages]]\nname = 'x'\nwheels = []".into(), "neither wheels nor"),
        (format!("[[packages]]\nname = 'x'\nversion = 'banana'\n{wheel}"), "version \"banana\""),
        ("[[packages]]\nname = 'x'\nwheels = [{url = 'u'}]".into(), "without a sha256"),
        ("[[packages]]\nname = 'x'\nwheels = [{url = 'u', hashes = {md5 = 'aa'}}]".into(), "without a sha256"),
        ("[[packages]]\nname = 'x'\nwheels = [{hashes = {sha256 = 'aa'}}]".into(), "neither \"url\" nor"),
        ("[[packages]]\nname = 'x'\nwheels = [{url = 'u', hashes = {sha256 = '../..'}}]".into(), "not hexadecimal"),
        (format!("[[packages]]\nname = 'x'\n{wheel}\ndirectory = {{path = '.'}}"), "more than one place"),
        ("[[packages]]\nname = 'x'\nvcs = {type = 'git', url = 'u', commit-id = 'main'}".into(), "no full commit"),
    ] {
        let error = Lock::parse(&format!("lock-version = '1.0'\n{body}")).unwrap_err();
        assert!(error.chain().contains(part), "{body}: {error:?}");
    }
    assert_eq!(Lock::parse("lock-version = '2.0'").unwrap_err().kind(), Kind::Unsupported);
    assert!(Lock::parse("version = 1\n[[package]]\nname='x'").unwrap_err().chain().contains("uv.lock"));
}

#[test]
fn credentials_never_stay() {
    for (given, kept) in [
        ("https://user:pa%40ss@host/x", "https://host/x"),
        ("https://token@host/x", "https://host/x"),
        ("https://us@er:p@ss@host:8080?x=a@b", "https://host:8080?x=a@b"),
        ("git+ssh://git@github.com/a/b", "git+ssh://git@github.com/a/b"),
        ("ssh://git:secret@github.com/a/b", "ssh://git@github.com/a/b"),
        ("a = \"http://u:p@h\" # https://u:p@h/x b@c", "a = \"http://h\" # https://h/x b@c"),
        ("file:///a@b/c", "file:///a@b/c"),
        ("://", "://"),
    ] {
        assert_eq!(strip_credentials(given), kept);
    }
    let hidden = "a = \"http:\\u002f\\u002fuser:secret@host/x\"\n";
    let stripped = strip_document(hidden).unwrap();
    assert!(!stripped.contains("secret"), "{stripped}");
    assert_eq!(strip_document("# note\na = 1\n").unwrap(), "# note\na = 1\n");
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "(?s).{0,300}") {
        let _ = Lock::parse(&text);
        let _ = strip_document(&text);
        let _ = Marker::parse(&text);
        let stripped = strip_credentials(&text);
        prop_assert_eq!(strip_credentials(&stripped), stripped.clone());
    }

    #[test]
    fn no_values_make_it_panic(
        name in "\\PC{0,12}", version in "\\PC{0,12}", marker in "\\PC{0,40}", url in "\\PC{0,30}", hash in "[0-9a-f]{0,64}",
    ) {
        let mut wheel = Table::new();
        wheel.insert("url".into(), url.into());
        wheel.insert("hashes".into(), Value::Table([("sha256".to_string(), Value::from(hash))].into_iter().collect()));
        let mut package = Table::new();
        package.insert("name".into(), name.into());
        package.insert("version".into(), version.into());
        package.insert("marker".into(), marker.into());
        package.insert("wheels".into(), Value::Array(vec![wheel.into()]));
        let mut document = Table::new();
        document.insert("lock-version".into(), "1.0".into());
        document.insert("packages".into(), Value::Array(vec![package.into()]));
        if let Ok(lock) = Lock::parse(&toml::to_string(&document).unwrap()) {
            let _ = lock.select(&cpython311(), &Choice::default());
            let refs: Vec<&Package> = lock.packages.iter().collect();
            let copy = Lock::working_copy(&refs, Path::new("/base")).unwrap();
            prop_assert_eq!(Lock::parse(&copy).unwrap().packages.len(), lock.packages.len());
        }
    }
}
