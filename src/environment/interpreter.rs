//! What is known of a Python installation.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A Python installation as environments need to know it.
///
/// Paths are relative to the root of the installation's layer (which the mount shows as `.python`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interpreter {
    /// `cpython`.
    pub implementation: String,
    /// Full version, `3.11.7`.
    pub version: String,
    /// Extension-module ABI, architecture and C library in one (`SOABI`), `cpython-311-x86_64-linux-gnu`.
    pub abi: String,
    /// The magic number of its bytecode in hex, `a70d0d0a`.
    pub magic: String,
    /// The executable, `bin/python3.11`.
    pub executable: String,
    /// The C library it was built for, `glibc 2.36` or `musl`.
    pub libc: String,
    /// Values of the environment markers (PEP 508).
    pub markers: Markers,
    /// File names of shared libraries that it takes from the host, sorted (`libssl.so.3`).
    pub host_libraries: Vec<String>,
    /// Modules of its standard library that do not import, with the reason, as its origin had them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub broken_modules: BTreeMap<String, String>,
}

impl Interpreter {
    /// `3.11` of `3.11.7`.
    pub fn minor(&self) -> &str {
        match self.version.match_indices('.').nth(1) {
            Some((at, _)) => &self.version[..at],
            None => &self.version,
        }
    }

    /// The directory of the standard library below a prefix, `lib/python3.11` (`lib/python3.13t` without the GIL).
    pub fn lib_dir(&self) -> String {
        let suffix = if self.is_free_threaded() { "t" } else { "" };
        format!("lib/python{}{suffix}", self.minor())
    }

    /// `lib/python3.11/site-packages`.
    pub fn site_packages(&self) -> String {
        format!("{}/site-packages", self.lib_dir())
    }

    /// What a wheel's files depend on: ABI and bytecode.
    pub fn layer_abi(&self) -> String {
        format!("{}+{}", self.abi, self.magic)
    }

    /// True for a build without the global interpreter lock.
    pub fn is_free_threaded(&self) -> bool {
        self.abi.split('-').nth(1).is_some_and(|tag| tag.ends_with('t'))
    }
}

/// The environment markers of PEP 508 for one interpreter on one machine.
///
/// `platform_release` and `platform_version` are those of the machine that ingested the interpreter.
#[allow(missing_docs)] // the names are PEP 508's
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Markers {
    pub implementation_name: String,
    pub implementation_version: String,
    pub os_name: String,
    pub platform_machine: String,
    pub platform_python_implementation: String,
    pub platform_release: String,
    pub platform_system: String,
    pub platform_version: String,
    pub python_full_version: String,
    pub python_version: String,
    pub sys_platform: String,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A CPython 3.11 on x86_64, for tests that need some interpreter.
    pub(crate) fn cpython311() -> Interpreter {
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
            broken_modules: BTreeMap::new(),
        }
    }

    #[test]
    fn paths_follow_the_minor_version_and_the_gil() {
        let mut python = cpython311();
        assert_eq!((python.minor(), python.site_packages().as_str()), ("3.11", "lib/python3.11/site-packages"));
        python.version = "3.13.0".into();
        python.abi = "cpython-313t-x86_64-linux-gnu".into();
        assert_eq!(python.lib_dir(), "lib/python3.13t");
    }
}
