//! What links point to and what files contain.

use super::*;
use crate::store::{self, Room};

impl Tree {
    /// What symbolic link `ino` points to.
    pub fn readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        match ino.decode().ok_or_else(gone)? {
            Object::Row { layer, row } => match self.row(layer, row)?.node {
                Node::Symlink { target } => Ok(target),
                _ => Err(not_a_link()),
            },
            Object::Special { version, special } => {
                if matches!(special, Special::Python | Special::Python3 | Special::PythonMinor) {
                    self.started(version);
                }
                let target = self.version(version)?.link_target(special);
                target.map(String::into_bytes).ok_or_else(not_a_link)
            }
            _ => Err(not_a_link()),
        }
    }

    /// How the bytes of file `ino` are to be had. Nothing is kept for it: a read needs the number alone.
    pub fn open(&self, ino: Ino) -> Result<Opened> {
        match ino.decode().ok_or_else(gone)? {
            Object::Layer { file: LayerFile::Imports, .. } | Object::Special { special: Special::ImportsIndex, .. } => {
                Ok(Opened::Lasting)
            }
            Object::Row { layer, row } if self.text(ino, layer, row)?.is_some() => Ok(Opened::Lasting),
            Object::Layer { file: LayerFile::Pack, .. } | Object::Row { .. } => {
                let at = self.location(ino)?;
                if at.size < at.object.size {
                    return Ok(Opened::Lasting);
                }
                self.opened(&at);
                let (file, held) = self.whole_file(&at.object)?;
                Ok(Opened::Whole { file, size: at.size, held })
            }
            Object::Special { special: Special::Config, .. } => Ok(Opened::ByReader),
            Object::Special { special: Special::Metadata | Special::Lock | Special::Project, .. } => {
                Ok(Opened::Lasting)
            }
            _ => Err(Error::new(Kind::Os(libc::EISDIR), "this is no file")),
        }
    }

    /// Up to `size` bytes of file `ino` from `offset` on; fewer only at its end.
    pub fn read(&self, ino: Ino, offset: u64, size: u32, reader: Reader) -> Result<Vec<u8>> {
        match ino.decode().ok_or_else(gone)? {
            // Whoever reads a file to its end asks once more behind it.
            Object::Special { special: Special::Config, .. } if offset >= CONFIG_SIZE as u64 => Ok(Vec::new()),
            Object::Special { version, special: Special::Config } => {
                self.started(version);
                Ok(cut(&self.config(&*self.version(version)?, reader), offset, size))
            }
            Object::Special { version, special: Special::Metadata } => {
                let view = self.version(version)?;
                Ok(cut(&view.metadata(&*self.layers(&view)?)?, offset, size))
            }
            Object::Layer { file: LayerFile::Imports, .. } | Object::Special { special: Special::ImportsIndex, .. } => {
                Ok(cut(&self.imports_bytes(ino)?, offset, size))
            }
            object => {
                if let Object::Row { layer, row } = object
                    && let Some(text) = self.text(ino, layer, row)?
                {
                    return Ok(cut(text.as_bytes(), offset, size));
                }
                let read = self.bytes(&self.location(ino)?, offset, size);
                // The catalog may have named a wrong place and have been repaired since.
                read.inspect_err(|error| {
                    if !error.is_about_waiting() {
                        self.locations.remove(&ino);
                    }
                })
            }
        }
    }

    fn config(&self, view: &VersionView, reader: Reader) -> Vec<u8> {
        use std::os::unix::ffi::OsStrExt;
        let Some(mountpoint) = self.mountpoint.get() else { return view.config(view.path().as_bytes()) };
        // A reader that is gone, or that may not be looked at, gets the configured mount point.
        let text = reader.tid.and_then(|tid| match File::open(format!("/proc/{tid}/mountinfo")) {
            Ok(file) => mountinfo::read_all(file),
            Err(_) => self.elsewhere.get()?.mountinfo(tid).and_then(mountinfo::read_all),
        });
        let reached = text.and_then(|text| {
            mountinfo::reach(&mountinfo::parse(&text), mountpoint.dev, view.path().as_bytes(), &mountpoint.path)
        });
        let dir = reached.unwrap_or_else(|| [mountpoint.path.as_os_str().as_bytes(), view.path().as_bytes()].concat());
        view.config(&dir)
    }

    /// The bytes of a file that are known without its pack. One that has a place is not among them.
    fn text(&self, ino: Ino, layer: u32, row: RowId) -> Result<Option<String>> {
        if self.locations.get(&ino).is_some() {
            return Ok(None);
        }
        let digest = self.layer_slots.key(layer).ok_or_else(gone)?;
        let doc = self.layer_doc(&digest)?;
        Ok(doc.texts.iter().find(|text| text.row == row).map(|text| text.text.clone()))
    }

    pub(super) fn location(&self, ino: Ino) -> Result<Location> {
        if let Some(at) = self.locations.get(&ino) {
            return Ok(at);
        }
        let at = match ino.decode().ok_or_else(gone)? {
            Object::Row { layer, row } => {
                let layer = self.layer_slots.key(layer).ok_or_else(gone)?;
                self.with_catalog(&layer, |catalog| {
                    let Some(Row { node: Node::File { size, digest, place, .. }, .. }) = catalog.row(row)? else {
                        return Err(gone());
                    };
                    match (place, catalog.pack()) {
                        (Place::Blob, _) => {
                            Ok(Location::whole(store::Object { room: Room::Blobs, digest, size }, Some(layer)))
                        }
                        (Place::Pack { offset }, Some(object)) => {
                            Ok(Location { object, layer: Some(layer), offset, size })
                        }
                        (Place::Pack { .. }, None) => {
                            let what = format!("the catalog of layer {} names no pack", catalog.layer().short());
                            Err(Error::new(Kind::Corrupt, what).hint("run `envfabric fsck`"))
                        }
                    }
                })?
            }
            Object::Layer { layer, file: LayerFile::Pack } => {
                let digest = self.layer_slots.key(layer).ok_or_else(gone)?;
                let pack = self.layer_doc(&digest)?.pack_object().ok_or_else(gone)?;
                Location::whole(pack, Some(digest))
            }
            Object::Special { version, special: special @ (Special::Lock | Special::Project) } => {
                let view = self.version(version)?;
                let document = view.document(special).ok_or_else(gone)?;
                Location::document(document)
            }
            _ => return Err(Error::new(Kind::Os(libc::EISDIR), "this is no file")),
        };
        self.locations.put(ino, at);
        Ok(at)
    }
}

fn cut(bytes: &[u8], offset: u64, size: u32) -> Vec<u8> {
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
    let end = start.saturating_add(size as usize).min(bytes.len());
    bytes[start..end].to_vec()
}
