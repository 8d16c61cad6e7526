//! The headers of `METADATA`.

use std::str::FromStr;

use uv_normalize::PackageName;

use crate::environment::lock::strip_credentials;
use crate::error::{Error, Kind, Result};

/// What a build needs of a distribution's metadata.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Metadata {
    /// Normalised.
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) requires: Vec<String>,
    pub(crate) requires_python: Option<String>,
}

impl Metadata {
    /// Parses the headers; the body (a description of any size and encoding) is not looked at.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Metadata> {
        let text = String::from_utf8_lossy(bytes);
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in text.lines() {
            if line.trim().is_empty() {
                break;
            }
            if line.starts_with([' ', '\t']) {
                if let Some((_, value)) = fields.last_mut() {
                    value.push(' ');
                    value.push_str(line.trim());
                }
            } else if let Some((name, value)) = line.split_once(':') {
                fields.push((name.trim().to_ascii_lowercase(), value.trim().to_string()));
            }
        }
        let one = |key: &str| fields.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone());
        let need = |key: &str| {
            one(key)
                .filter(|v| !v.is_empty())
                .ok_or_else(|| Error::new(Kind::Invalid, format!("METADATA has no {key}")))
        };
        let given = need("name")?;
        let name = PackageName::from_str(&given)
            .map_err(|_| Error::new(Kind::Invalid, format!("METADATA has the unacceptable name {given:?}")))?;
        Ok(Metadata {
            name: name.as_str().to_string(),
            version: need("version")?,
            requires: fields.iter().filter(|(n, _)| n == "requires-dist").map(|(_, v)| strip_credentials(v)).collect(),
            requires_python: one("requires-python").filter(|v| !v.is_empty()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_and_the_body_is_not() {
        let text = "Metadata-Version: 2.1\r\nName: Foo.Bar\r\nVersion: 1.0\r\nrequires-dist: a>=1;\r\n  extra == 'x'\r\n\
                    Requires-Dist: b @ https://u:p@h/b.whl\r\nRequires-Python: >=3.8\r\n\r\nRequires-Dist: c\r\n";
        let metadata = Metadata::parse(text.as_bytes()).unwrap();
        assert_eq!(metadata.name, "foo-bar");
        assert_eq!(metadata.requires, ["a>=1; extra == 'x'", "b @ https://h/b.whl"]);
        assert_eq!(metadata.requires_python.as_deref(), Some(">=3.8"));
        for bad in ["", "Name: x", "Version: 1", "Name: ../x\nVersion: 1", "\n\nName: x\nVersion: 1"] {
            assert!(Metadata::parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
        assert!(Metadata::parse(b"Name: x\nVersion: 1\nAuthor: \xff\xfe\n").is_ok());
    }
}
