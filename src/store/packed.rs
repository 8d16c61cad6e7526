//! Packed objects: each chunk is compressed by itself, so that any of them can be had alone.
//!
//! ```text
//! packed object    "envfabric-zobj2\n"
//!                  u64 bytes of the object
//!                  per chunk: u32 stored length; the top bit says that the bytes are as they are
//!                  32 bytes sha256 of that number and the lengths
//!                  per chunk: its bytes as a zstd frame, or as they are where that is not shorter
//! ```
//!
//! What says where the chunks are comes first, so that one request brings it together with the first of them, which are
//! those that are used first. Numbers are little-endian.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use zstd::bulk::{Compressor, Decompressor};

use super::Codec;
use super::chunks::{CHUNK_SIZE, Chunks};
use crate::environment::Digest;
use crate::error::{Error, IoContext, Kind, Result};

const MAGIC: &[u8; 16] = b"envfabric-zobj2\n";
/// Of a stored length: the chunk is not compressed.
const AS_IT_IS: u32 = 1 << 31;
/// Where the lengths begin.
const LENGTHS: usize = MAGIC.len() + 8;
/// Where the number of the object's bytes is.
pub(super) const NUMBER_AT: u64 = MAGIC.len() as u64;
/// So many bytes of a packed object are read when it is opened: what one request of a network file system brings.
pub(super) const HEAD: u64 = 1 << 20;

/// Where the chunks of a packed object are.
#[derive(Debug)]
pub(super) struct Packed {
    /// Stored lengths, as they are in the file.
    lengths: Box<[u32]>,
    /// Where each begins, and where the last ends.
    pub(super) starts: Box<[u64]>,
    /// The first bytes of the file, all where it is short.
    pub(super) head: Box<[u8]>,
}

/// Reads all of `bytes` from `offset` on.
pub(super) fn read_exact(file: &File, path: &Path, bytes: &mut [u8], offset: u64) -> Result<()> {
    file.read_exact_at(bytes, offset).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => too_short(path),
        _ => Error::io("reading", path, error),
    })
}

/// The file at `path` has less than it should.
pub(super) fn too_short(path: &Path) -> Error {
    Error::new(Kind::Corrupt, format!("{} is shorter than its catalog says", path.display()))
        .hint("run `envfabric fsck` to see which environments need it")
}

impl Packed {
    /// What says where the chunks of an object of `size` bytes are, with `head` of the first bytes, or more.
    pub(super) fn read(file: &File, path: &Path, size: u64, head: u64) -> Result<Packed> {
        let damaged = || {
            Error::new(Kind::Corrupt, format!("{} is not a packed object of {size} bytes", path.display()))
                .hint("run `envfabric fsck` to see which environments need it")
        };
        let stored = file.metadata().at("reading", path)?.len();
        let count = Chunks::count(size);
        // A size that no file can have is somebody's lie.
        let first = count.checked_mul(4).and_then(|lengths| lengths.checked_add(LENGTHS as u64 + 32));
        let first = first.filter(|first| *first <= stored).ok_or_else(damaged)?;
        let mut head = vec![0; stored.min(first.max(head)) as usize];
        read_exact(file, path, &mut head, 0)?;
        let (table, seal) = head[..first as usize].split_at(first as usize - 32);
        let counted = table.strip_prefix(MAGIC).ok_or_else(damaged)?;
        let (number, lengths) = counted.split_at(8);
        if Digest::of(counted).as_bytes() != seal || number != size.to_le_bytes() {
            return Err(damaged());
        }
        let lengths: Box<[u32]> = lengths.as_chunks::<4>().0.iter().map(|n| u32::from_le_bytes(*n)).collect();
        let mut at = first;
        let mut starts = Vec::with_capacity(lengths.len() + 1);
        for length in &lengths {
            starts.push(at);
            at += u64::from(length & !AS_IT_IS);
        }
        starts.push(at);
        if at != stored {
            return Err(damaged());
        }
        Ok(Packed { lengths, starts: starts.into(), head: head.into() })
    }

    /// True when chunk `at` is compressed.
    pub(super) fn is_packed(&self, at: usize) -> bool {
        self.lengths.get(at).is_some_and(|length| length & AS_IT_IS == 0)
    }
}

/// Writes an object's bytes in the way of its store.
pub(super) enum Sink<W: Write + Seek> {
    Raw(W),
    Packed { out: W, level: i32, chunk: Vec<u8>, table: Vec<u8>, size: u64 },
}

impl<W: Write + Seek> Sink<W> {
    /// For `size` bytes into `out`, which is empty.
    pub(super) fn new(mut out: W, codec: Codec, size: u64) -> io::Result<Self> {
        Ok(match codec {
            Codec::Raw => Sink::Raw(out),
            Codec::Zstd => {
                // Filled in at the end.
                let first = LENGTHS as u64 + Chunks::count(size) * 4 + 32;
                io::copy(&mut io::repeat(0).take(first), &mut out)?;
                let chunk = Vec::with_capacity(CHUNK_SIZE as usize);
                Sink::Packed { out, level: LEVEL, chunk, table: size.to_le_bytes().into(), size: 0 }
            }
        })
    }

    /// Takes the next bytes.
    pub(super) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        match self {
            Sink::Raw(out) => out.write_all(bytes),
            Sink::Packed { chunk, .. } if chunk.len() + bytes.len() < CHUNK_SIZE as usize => {
                chunk.extend_from_slice(bytes);
                Ok(())
            }
            Sink::Packed { out, level, chunk, table, size } => {
                while !bytes.is_empty() {
                    let (now, rest) = bytes.split_at((CHUNK_SIZE as usize - chunk.len()).min(bytes.len()));
                    chunk.extend_from_slice(now);
                    bytes = rest;
                    if chunk.len() == CHUNK_SIZE as usize {
                        pack(out, *level, chunk, table, size)?;
                    }
                }
                Ok(())
            }
        }
    }

    /// All was written.
    ///
    /// # Errors
    /// When it is not as much as was said.
    pub(super) fn finish(self) -> io::Result<()> {
        match self {
            Sink::Raw(mut out) => out.flush(),
            Sink::Packed { mut out, level, mut chunk, mut table, mut size } => {
                if !chunk.is_empty() || table.len() == 8 {
                    pack(&mut out, level, &mut chunk, &mut table, &mut size)?;
                }
                if table[..8] != size.to_le_bytes() {
                    return Err(io::Error::other("it has another length than was said"));
                }
                out.seek(io::SeekFrom::Start(0))?;
                out.write_all(MAGIC)?;
                out.write_all(&table)?;
                out.write_all(Digest::of(&table).as_bytes())?;
                out.flush()
            }
        }
    }
}

/// How hard objects are compressed: see docs/benchmarks.md.
const LEVEL: i32 = 3;

thread_local! {
    // To make one takes as long as to use it: half a megabyte that is new each time.
    static COMPRESSOR: RefCell<Option<Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

fn compress(chunk: &[u8], level: i32) -> io::Result<Vec<u8>> {
    COMPRESSOR.with_borrow_mut(|kept| {
        let compressor = match kept {
            Some(compressor) => compressor,
            None => kept.insert(Compressor::new(level)?),
        };
        compressor.set_compression_level(level)?;
        compressor.compress(chunk)
    })
}

/// What `frame` unpacks to, at most `length` bytes.
pub(super) fn decompress(frame: &[u8], length: usize) -> io::Result<Vec<u8>> {
    DECOMPRESSOR.with_borrow_mut(|kept| {
        let decompressor = match kept {
            Some(decompressor) => decompressor,
            None => kept.insert(Decompressor::new()?),
        };
        decompressor.decompress(frame, length)
    })
}

fn pack(out: &mut impl Write, level: i32, chunk: &mut Vec<u8>, table: &mut Vec<u8>, size: &mut u64) -> io::Result<()> {
    let packed = compress(chunk, level)?;
    // What saves next to nothing is not worth unpacking.
    let length = if packed.len() < chunk.len() - chunk.len() / 16 {
        out.write_all(&packed)?;
        packed.len() as u32
    } else {
        out.write_all(chunk)?;
        chunk.len() as u32 | AS_IT_IS
    };
    table.extend(length.to_le_bytes());
    *size += chunk.len() as u64;
    chunk.clear();
    Ok(())
}
