//! The key by which the layer of a lock entry is found.

use super::{Artifact, Origin, Package, strip_credentials};
use crate::environment::{Digest, Interpreter};

/// Bumped when what installs into a layer changes, so that older layers are not taken for new ones.
const KEY_FORMAT: u32 = 1;

impl Package {
    /// The key of this package's layer for `python`.
    ///
    /// It covers name, version, every hash of the entry (so that no wheel tags need ranking here), the ABI, whether
    /// bytecode is wanted, and the platform that wheels are chosen for when that is not the builder's. A directory has
    /// no key, as its files may change at any time.
    pub fn key(&self, python: &Interpreter, bytecode: bool, platform: Option<&str>) -> Option<Digest> {
        self.key_text(&python.layer_abi(), bytecode, platform).map(|text| Digest::of(text.as_bytes()))
    }

    /// The text that [`Package::key`] digests: one item a line, every text quoted.
    fn key_text(&self, abi: &str, bytecode: bool, platform: Option<&str>) -> Option<String> {
        let mut text = format!("envfabric key {KEY_FORMAT}\nname {:?}\n", self.name);
        text.push_str(&format!("version {:?}\n", self.version.as_deref().unwrap_or_default()));
        match &self.origin {
            Origin::Index { wheels, sdist } => {
                let mut lines: Vec<String> = wheels.iter().flat_map(|wheel| hashes("wheel", wheel)).collect();
                lines.extend(sdist.iter().flat_map(|sdist| hashes("sdist", sdist)));
                lines.sort();
                lines.dedup();
                text.push_str(&lines.concat());
            }
            Origin::Archive { artifact, subdirectory } => {
                text.push_str(&hashes("archive", artifact).concat());
                text.push_str(&format!("subdirectory {:?}\n", subdirectory.as_deref().unwrap_or_default()));
            }
            Origin::Vcs { kind, url, commit, subdirectory } => {
                let url = strip_credentials(url);
                let subdirectory = subdirectory.as_deref().unwrap_or_default();
                let commit = commit.to_ascii_lowercase();
                text.push_str(&format!("vcs {kind:?} {url:?} {commit:?}\nsubdirectory {subdirectory:?}\n"));
            }
            Origin::Directory { .. } => return None,
        }
        text.push_str(&format!("abi {abi:?}\nbytecode {bytecode}\n"));
        if let Some(platform) = platform {
            text.push_str(&format!("platform {platform:?}\n"));
        }
        Some(text)
    }
}

fn hashes(kind: &str, artifact: &Artifact) -> Vec<String> {
    artifact.hashes.iter().map(|(algorithm, value)| format!("{kind} {algorithm:?} {value:?}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Lock;

    /// Pinned: a change of this text makes every wheel in every store be installed again.
    #[test]
    fn the_text_of_a_key_is_pinned_and_does_not_depend_on_urls_or_order() {
        let entry = |urls: [&str; 2], order: [usize; 2]| {
            let wheels = [
                format!("{{url='{}', hashes={{sha256='aa'}}}}", urls[0]),
                format!("{{url='{}', hashes={{sha256='bb'}}}}", urls[1]),
            ];
            let text = format!(
                "lock-version='1.0'\n[[packages]]\nname='Foo.Bar'\nversion='1.0'\nwheels=[{},{}]\nsdist={{path='x', hashes={{sha256='cc'}}}}\n",
                wheels[order[0]], wheels[order[1]]
            );
            Lock::parse(&text).unwrap().packages[0].key_text("abi", true, None)
        };
        let one = entry(["https://a/x.whl", "https://a/y.whl"], [0, 1]);
        assert_eq!(one, entry(["https://u:p@b/x.whl", "file:///y.whl"], [1, 0]));
        let expected = "envfabric key 1\nname \"foo-bar\"\nversion \"1.0\"\nsdist \"sha256\" \"cc\"\nwheel \"sha256\" \"aa\"\nwheel \"sha256\" \"bb\"\nabi \"abi\"\nbytecode true\n";
        assert_eq!(one.as_deref(), Some(expected));
    }
}
