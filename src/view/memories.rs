//! How full the memories of a tree are.

use std::path::Path;

use super::{SLOTS_MAX, Tree};

impl Tree {
    /// Its bounded memories: name, what it holds, what it holds at most; in entries, of listings in names. Numbers that
    /// were given out to layers and versions, of which inode numbers are made, are never taken back.
    pub fn memories(&self) -> [(&'static str, u64, u64); 8] {
        [
            ("catalogs", self.catalogs.held(), self.catalogs.most()),
            ("directories", self.dirs.held(), self.dirs.most()),
            ("files", self.locations.held(), self.locations.most()),
            ("layer numbers", self.layer_slots.held(), SLOTS_MAX.into()),
            ("names", self.contents.held(), self.contents.most()),
            ("open objects", self.objects.held(), self.objects.most()),
            ("version numbers", self.version_slots.held(), SLOTS_MAX.into()),
            ("versions", self.versions.held(), self.versions.most()),
        ]
    }

    /// Where it is mounted, once that is known.
    pub fn mounted_at(&self) -> Option<&Path> {
        self.mountpoint.get().map(|at| at.path.as_path())
    }
}
