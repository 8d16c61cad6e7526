//! Small wheels made on the spot.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use zip::ZipWriter;
use zip::write::SimpleFileOptions;

/// A wheel in the making, `py3-none-any`.
pub struct Wheel {
    name: String,
    version: String,
    files: Vec<(String, Vec<u8>)>,
    requires: Vec<String>,
    console: Vec<String>,
}

impl Wheel {
    pub fn new(name: &str, version: &str) -> Wheel {
        Wheel { name: name.into(), version: version.into(), files: vec![], requires: vec![], console: vec![] }
    }

    pub fn file(mut self, path: &str, content: impl Into<Vec<u8>>) -> Wheel {
        self.files.push((path.into(), content.into()));
        self
    }

    pub fn requires(mut self, requirement: &str) -> Wheel {
        self.requires.push(requirement.into());
        self
    }

    /// A console entry point, `tool = module:function`.
    pub fn console(mut self, entry_point: &str) -> Wheel {
        self.console.push(entry_point.into());
        self
    }

    /// Writes it to a directory of its own below `dir`, returns its path.
    pub fn write(mut self, dir: &Path) -> PathBuf {
        let info = format!("{}-{}.dist-info", self.name, self.version);
        let mut metadata = format!("Metadata-Version: 2.1\nName: {}\nVersion: {}\n", self.name, self.version);
        for requirement in &self.requires {
            metadata.push_str(&format!("Requires-Dist: {requirement}\n"));
        }
        self.files.push((format!("{info}/METADATA"), metadata.into()));
        let wheel = "Wheel-Version: 1.0\nGenerator: envfabric-tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n";
        self.files.push((format!("{info}/WHEEL"), wheel.into()));
        if !self.console.is_empty() {
            let text = format!("[console_scripts]\n{}\n", self.console.join("\n"));
            self.files.push((format!("{info}/entry_points.txt"), text.into()));
        }
        let mut record: String = self.files.iter().map(|(path, _)| format!("{path},,\n")).collect();
        record.push_str(&format!("{info}/RECORD,,\n"));
        self.files.push((format!("{info}/RECORD"), record.into()));

        let dir = tempfile::Builder::new().prefix("wheel").tempdir_in(dir).unwrap().keep();
        let path = dir.join(format!("{}-{}-py3-none-any.whl", self.name, self.version));
        let mut zip = ZipWriter::new(File::create(&path).unwrap());
        for (name, content) in &self.files {
            zip.start_file(name.as_str(), SimpleFileOptions::default()).unwrap();
            zip.write_all(content).unwrap();
        }
        zip.finish().unwrap();
        path
    }
}
