//! What links point to and what files contain.

use super::*;

impl Tree {
    /// What symbolic link `ino` points to.
    pub fn readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        match ino.decode().ok_or_else(gone)? {
            Object::Row { layer, row } => match self.row(layer, row)?.node {
                Node::Symlink { target } => Ok(target),
                _ => Err(not_a_link()),
            },
            Object::Special { version, special } => {
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
            Object::Layer { file: LayerFile::Pack, .. } => {
                let at = self.location(ino)?;
                Ok(Opened::Whole(self.objects.open(&self.store, at.holder)?, at.size))
            }
            Object::Row { .. } => {
                let at = self.location(ino)?;
                match at.holder {
                    Holder::Blob(_) => Ok(Opened::Whole(self.objects.open(&self.store, at.holder)?, at.size)),
                    Holder::Pack(_) => Ok(Opened::Lasting),
                }
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
                Ok(cut(&self.config(&*self.version(version)?, reader), offset, size))
            }
            Object::Special { version, special: Special::Metadata } => {
                let view = self.version(version)?;
                Ok(cut(&view.metadata(&*self.layers(&view)?)?, offset, size))
            }
            Object::Layer { file: LayerFile::Imports, .. } | Object::Special { special: Special::ImportsIndex, .. } => {
                Ok(cut(&self.imports_bytes(ino)?, offset, size))
            }
            _ => {
                let read = self.objects.read(&self.store, &self.location(ino)?, offset, size);
                // The catalog may have named a wrong place and have been repaired since.
                read.inspect_err(|_| self.locations.remove(&ino))
            }
        }
    }

    fn config(&self, view: &VersionView, reader: Reader) -> Vec<u8> {
        use std::os::unix::ffi::OsStrExt;
        let Some(mountpoint) = self.mountpoint.get() else { return view.config(view.path().as_bytes()) };
        // A reader that is gone, or that may not be looked at, gets the configured mount point.
        let text = reader.tid.and_then(|tid| mountinfo::read(format!("/proc/{tid}/mountinfo").as_ref()));
        let reached = text.and_then(|text| {
            mountinfo::reach(&mountinfo::parse(&text), mountpoint.dev, view.path().as_bytes(), &mountpoint.path)
        });
        let dir = reached.unwrap_or_else(|| [mountpoint.path.as_os_str().as_bytes(), view.path().as_bytes()].concat());
        view.config(&dir)
    }

    pub(super) fn location(&self, ino: Ino) -> Result<Location> {
        if let Some(at) = self.locations.get(&ino) {
            return Ok(at);
        }
        let at = match ino.decode().ok_or_else(gone)? {
            Object::Row { layer, row } => {
                let digest = self.layer_slots.key(layer).ok_or_else(gone)?;
                self.with_catalog(&digest, |catalog| {
                    let Some(Row { node: Node::File { size, digest, place, .. }, .. }) = catalog.row(row)? else {
                        return Err(gone());
                    };
                    match (place, catalog.pack()) {
                        (Place::Blob, _) => Ok(Location { holder: Holder::Blob(digest), offset: 0, size }),
                        (Place::Pack { offset }, Some(pack)) => {
                            Ok(Location { holder: Holder::Pack(*pack), offset, size })
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
                let pack = self.index.layer(&self.store, &digest).map_err(damaged)?.pack.ok_or_else(gone)?;
                let size = self.objects.length(&self.store, Holder::Pack(pack))?;
                Location { holder: Holder::Pack(pack), offset: 0, size }
            }
            Object::Special { version, special: special @ (Special::Lock | Special::Project) } => {
                let view = self.version(version)?;
                let document = view.document(special).ok_or_else(gone)?;
                Location { holder: Holder::Blob(document.blob), offset: 0, size: document.size }
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
