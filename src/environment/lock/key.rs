//! The key by which the layer of a lock entry is found.

use super::{Artifact, Origin, Package, strip_credentials};
use crate::environment::{Digest, Interpreter};

/// Bumped when what installs into a layer changes, or a key covers something else, so that older layers are not taken
/// for new ones.
const KEY_FORMAT: u32 = 2;

/// What decides which file of an entry becomes its layer, besides the interpreter's ABI.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The platform that wheels are chosen for, in uv's words; none means the machine that installs.
    pub platform: Option<&'a str>,
    /// The C library of the machine that installs, `glibc 2.36`.
    pub libc: &'a str,
    /// Whether bytecode is wanted.
    pub bytecode: bool,
}

impl Package {
    /// The key of this package's layer for `python`.
    ///
    /// It covers name, version, every file of the entry with its hashes (so that no wheel tags need ranking here; a
    /// file's name has its tags, which decide the choice), the ABI and whether bytecode is wanted. Where the choice
    /// between the files or the building of one depends on the platform, it covers that too; an entry whose wheels all
    /// fit anywhere (`none-any`) has one key everywhere. A directory has no key, as its files may change at any time.
    pub fn key(&self, python: &Interpreter, target: Target<'_>) -> Option<Digest> {
        self.key_text(&python.layer_abi(), target).map(|text| Digest::of(text.as_bytes()))
    }

    /// The text that [`Package::key`] digests: one item a line, every text quoted.
    fn key_text(&self, abi: &str, target: Target<'_>) -> Option<String> {
        let mut text = format!("envfabric key {KEY_FORMAT}\nname {:?}\n", self.name);
        text.push_str(&format!("version {:?}\n", self.version.as_deref().unwrap_or_default()));
        let needs = match &self.origin {
            Origin::Index { wheels, sdist } => {
                let mut lines: Vec<String> = wheels.iter().flat_map(|wheel| hashes("wheel", wheel)).collect();
                lines.extend(sdist.iter().flat_map(|sdist| hashes("sdist", sdist)));
                lines.sort();
                lines.dedup();
                text.push_str(&lines.concat());
                match wheels.is_empty() {
                    true => Needs::Builder,
                    false if wheels.iter().all(fits_anywhere) => Needs::Nothing,
                    false => Needs::Platform,
                }
            }
            Origin::Archive { artifact, subdirectory } => {
                text.push_str(&hashes("archive", artifact).concat());
                text.push_str(&format!("subdirectory {:?}\n", subdirectory.as_deref().unwrap_or_default()));
                match artifact.file_name() {
                    Some(name) if !is_wheel(&name) => Needs::Builder,
                    _ if fits_anywhere(artifact) => Needs::Nothing,
                    _ => Needs::Platform,
                }
            }
            Origin::Vcs { kind, url, commit, subdirectory } => {
                let url = strip_credentials(url);
                let subdirectory = subdirectory.as_deref().unwrap_or_default();
                let commit = commit.to_ascii_lowercase();
                text.push_str(&format!("vcs {kind:?} {url:?} {commit:?}\nsubdirectory {subdirectory:?}\n"));
                Needs::Builder
            }
            Origin::Directory { .. } => return None,
        };
        text.push_str(&format!("abi {abi:?}\nbytecode {}\n", target.bytecode));
        if let (Needs::Platform | Needs::Builder, Some(platform)) = (needs, target.platform) {
            text.push_str(&format!("platform {platform:?}\n"));
        }
        if needs == Needs::Builder || (needs == Needs::Platform && target.platform.is_none()) {
            text.push_str(&format!("libc {:?}\n", target.libc));
        }
        Some(text)
    }
}

/// What a layer depends on besides the files of its entry.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    /// All of its wheels fit anywhere.
    Nothing,
    /// The platform chooses between wheels.
    Platform,
    /// It is built on the machine that installs.
    Builder,
}

fn is_wheel(name: &str) -> bool {
    name.to_ascii_lowercase().ends_with(".whl")
}

fn fits_anywhere(artifact: &Artifact) -> bool {
    artifact.file_name().is_some_and(|name| name.to_ascii_lowercase().ends_with("-none-any.whl"))
}

fn hashes(kind: &str, artifact: &Artifact) -> Vec<String> {
    let name = artifact.file_name().unwrap_or_default();
    artifact.hashes.iter().map(|(algorithm, value)| format!("{kind} {name:?} {algorithm:?} {value:?}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Lock;
    use super::*;

    const HERE: Target<'static> = Target { platform: None, libc: "glibc 2.36", bytecode: true };

    fn key_text(files: &str, target: Target<'_>) -> String {
        let text = format!("lock-version='1.0'\n[[packages]]\nname='Foo.Bar'\nversion='1.0'\n{files}\n");
        Lock::parse(&text).unwrap().packages[0].key_text("abi", target).unwrap()
    }

    /// Pinned: a change of this text makes every wheel in every store be installed again.
    #[test]
    fn the_text_of_a_key_is_pinned_and_does_not_depend_on_places_or_order() {
        let sdist = "sdist={path='d/x.tar.gz', hashes={sha256='cc'}}";
        let entry = |one: &str, two: &str| {
            let wheel = |(url, hash): (&str, &str)| format!("{{url='{url}', hashes={{sha256='{hash}'}}}}");
            let files = |a, b| format!("wheels=[{},{}]\n{sdist}", wheel(a), wheel(b));
            let texts = [files((one, "aa"), (two, "bb")), files((two, "bb"), (one, "aa"))].map(|f| key_text(&f, HERE));
            assert_eq!(texts[0], texts[1]);
            texts[0].clone()
        };
        let one = entry("https://a/x-cp311-linux.whl", "https://a/b/y+1-py3-none-any.whl#f");
        assert_eq!(one, entry("https://u:p@b/x-cp311-linux.whl?q=/z", "file:///y%2B1-py3-none-any.whl"));
        let expected = "envfabric key 2\nname \"foo-bar\"\nversion \"1.0\"\nsdist \"x.tar.gz\" \"sha256\" \"cc\"\n\
                        wheel \"x-cp311-linux.whl\" \"sha256\" \"aa\"\nwheel \"y+1-py3-none-any.whl\" \"sha256\" \"bb\"\n\
                        abi \"abi\"\nbytecode true\nlibc \"glibc 2.36\"\n";
        assert_eq!(one, expected);
    }

    #[test]
    fn the_platform_counts_where_it_decides() {
        let hashes = "hashes={sha256='aa'}";
        let pure = format!("wheels=[{{url='https://h/a-py3-none-any.whl', {hashes}}}]");
        let native = format!("wheels=[{{url='https://h/a-cp311-manylinux_2_17.whl', {hashes}}}]");
        let source = format!("sdist={{url='https://h/a.tar.gz', {hashes}}}");
        let vcs = format!("vcs={{type='git', url='https://h/a', commit-id='{}'}}", "0".repeat(40));
        let old = Target { libc: "glibc 2.28", ..HERE };
        let named = Target { platform: Some("x86_64-manylinux_2_28"), ..HERE };
        let named_old = Target { libc: "glibc 2.28", ..named };
        for (files, libc, platform, both) in [
            (pure.clone(), false, false, false),
            (format!("{pure}\n{source}"), false, false, false),
            (format!("archive={{url='https://h/a-py3-none-any.whl', {hashes}}}"), false, false, false),
            (native.clone(), true, true, false),
            (format!("{native}\n{source}"), true, true, false),
            (source, true, true, true),
            (format!("archive={{url='https://h/a.zip', {hashes}}}"), true, true, true),
            (format!("archive={{url='https://h/a-cp311-linux.whl', {hashes}}}"), true, true, false),
            (vcs, true, true, true),
        ] {
            let text = key_text(&files, HERE);
            assert_eq!(text != key_text(&files, old), libc, "{files}");
            assert_eq!(text != key_text(&files, named), platform, "{files}");
            assert_eq!(key_text(&files, named) != key_text(&files, named_old), both, "{files}");
        }
        let renamed = native.replace("manylinux_2_17", "manylinux_2_28");
        assert_ne!(key_text(&native, HERE), key_text(&renamed, HERE), "tags are in the name of the file");
    }
}
