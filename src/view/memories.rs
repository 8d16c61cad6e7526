//! How full the memories of a tree are.

use std::path::Path;

use super::Tree;

impl Tree {
    /// Its bounded memories: name, what it holds, what it holds at most; in entries, of listings in names.
    pub fn memories(&self) -> [(&'static str, u64, u64); 5] {
        [
            ("catalogs", self.catalogs.held(), self.catalogs.most()),
            ("directories", self.dirs.held(), self.dirs.most()),
            ("files", self.locations.held(), self.locations.most()),
            ("names", self.contents.held(), self.contents.most()),
            ("versions", self.versions.held(), self.versions.most()),
        ]
    }

    /// Where it is mounted, once that is known.
    pub fn mounted_at(&self) -> Option<&Path> {
        self.mountpoint.get().map(|at| at.path.as_path())
    }
}
