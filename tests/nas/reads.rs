//! Which bytes were read: per file always, call by call when asked to.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value, json};

/// Files that are counted, and calls that are recorded, at most.
const MOST: usize = 200_000;

/// READ calls of one path.
#[derive(Debug, Default)]
pub(crate) struct FileReads {
    calls: AtomicU64,
    bytes: AtomicU64,
}

#[derive(Debug, Default)]
pub(crate) struct Reads {
    recording: AtomicBool,
    tables: Mutex<Tables>,
}

#[derive(Debug, Default)]
struct Tables {
    files: HashMap<Arc<str>, Arc<FileReads>>,
    list: Vec<(Arc<str>, u64, usize)>,
    left_out: u64,
}

impl Reads {
    /// The count of a path, for whoever opens it.
    pub(crate) fn of(&self, path: &Arc<str>) -> Arc<FileReads> {
        let mut tables = self.tables();
        if let Some(known) = tables.files.get(path) {
            return known.clone();
        }
        let new = Arc::new(FileReads::default());
        if tables.files.len() < MOST {
            tables.files.insert(path.clone(), new.clone());
        }
        new
    }

    /// Notes that a READ got `length` bytes.
    pub(crate) fn note(&self, path: &Arc<str>, file: &FileReads, offset: u64, length: usize) {
        file.calls.fetch_add(1, Ordering::Relaxed);
        file.bytes.fetch_add(length as u64, Ordering::Relaxed);
        if self.recording.load(Ordering::Relaxed) {
            let mut tables = self.tables();
            if tables.list.len() < MOST {
                tables.list.push((path.clone(), offset, length));
            } else {
                tables.left_out += 1;
            }
        }
    }

    pub(crate) fn record(&self, on: bool) {
        self.recording.store(on, Ordering::Relaxed);
    }

    pub(crate) fn reset(&self) {
        let mut tables = self.tables();
        tables.list.clear();
        tables.left_out = 0;
        // Who has a file open goes on counting in the same place.
        tables.files.retain(|_, file| Arc::strong_count(file) > 1);
        for file in tables.files.values() {
            file.calls.store(0, Ordering::Relaxed);
            file.bytes.store(0, Ordering::Relaxed);
        }
    }

    /// As `reads` answers it.
    pub(crate) fn to_json(&self) -> Map<String, Value> {
        let tables = self.tables();
        let read = tables.files.iter().filter(|(_, file)| file.calls.load(Ordering::Relaxed) > 0);
        let files: Map<_, _> = read
            .map(|(path, file)| {
                let (calls, bytes) = (file.calls.load(Ordering::Relaxed), file.bytes.load(Ordering::Relaxed));
                (path.to_string(), json!({ "calls": calls, "bytes": bytes }))
            })
            .collect();
        let list = tables
            .list
            .iter()
            .map(|(path, offset, length)| json!({ "path": path.as_ref(), "offset": offset, "length": length }));
        let mut answer = Map::new();
        answer.insert("list".into(), list.collect::<Vec<_>>().into());
        answer.insert("left_out".into(), tables.left_out.into());
        answer.insert("files".into(), files.into());
        answer
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
