//! Verifies files of a dataset against the checksums of its index: once per process, on several threads.

use std::{
    collections::HashSet,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use crc_fast::{CrcAlgorithm, Digest};
use tokio::task::JoinHandle;

use super::{DataError, shards::FileEntry};
use crate::{storage::Crc64, threads};

/// Bytes read at once.
const CHUNK: usize = 1 << 20;
/// The most threads: more would not make a disk or the page cache faster.
const THREADS: usize = 8;

/// The files that this process has read to the end and found right, or has written itself.
static RIGHT: Mutex<Option<HashSet<(PathBuf, u64)>>> = Mutex::new(None);

fn is_known(path: &Path, crc64: Crc64) -> bool {
    let right = RIGHT.lock().unwrap_or_else(PoisonError::into_inner);
    right.as_ref().is_some_and(|right| right.contains(&(path.to_owned(), crc64.0)))
}

/// Notes that the file at `path` has this sum.
pub(super) fn know(path: &Path, crc64: Crc64) {
    let mut right = RIGHT.lock().unwrap_or_else(PoisonError::into_inner);
    right.get_or_insert_default().insert((path.to_owned(), crc64.0));
}

/// A file that does not match its index, and its actual checksum.
pub(super) type Wrong = (FileEntry, Crc64);

/// Files being read; returns the wrong ones.
type Check = JoinHandle<Result<Vec<Wrong>, DataError>>;

/// Files being read on other threads; dropped, it stops them.
#[derive(Debug)]
pub(super) struct Checking {
    running: tokio::sync::Mutex<Option<Check>>,
    ended: Arc<AtomicBool>,
}

impl Checking {
    /// Starts reading those of `files`, which are in `dir`, that this process has not read yet.
    pub fn begin(dir: &Path, files: Vec<FileEntry>) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let (dir, stop) = (dir.to_owned(), Arc::clone(&ended));
        let running = tokio::task::spawn_blocking(move || wrong(&dir, &files, &stop));
        Self { running: tokio::sync::Mutex::new(Some(running)), ended }
    }

    /// The wrong ones, in the order of the index; none if that was reported before.
    pub async fn wrong(&self) -> Result<Vec<Wrong>, DataError> {
        let mut running = self.running.lock().await;
        let Some(handle) = running.as_mut() else { return Ok(Vec::new()) };
        let result = handle.await;
        *running = None;
        result.map_err(|error| DataError::Stopped { reason: error.to_string() })?
    }
}

impl Drop for Checking {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

fn wrong(dir: &Path, files: &[FileEntry], ended: &AtomicBool) -> Result<Vec<Wrong>, DataError> {
    let files: Vec<&FileEntry> = files.iter().filter(|file| !is_known(&dir.join(&file.file), file.crc64)).collect();
    let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || -> Result<(), DataError> {
        let mut buffer = vec![0; CHUNK];
        while let Some(entry) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            let path = dir.join(&entry.file);
            let Some(crc64) = sum(&path, &mut buffer, ended)? else { return Ok(()) };
            if crc64 == entry.crc64 {
                know(&path, crc64);
            } else {
                found.lock().unwrap_or_else(PoisonError::into_inner).push(((*entry).clone(), crc64));
            }
        }
        Ok(())
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS).min(files.len());
    let died =
        |_: Box<dyn std::any::Any + Send>| DataError::Stopped { reason: "a thread that reads shards died".into() };
    threads::together(threads, work).into_iter().try_for_each(|done| done.map_err(died)?)?;
    let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    found.sort_by(|(a, _), (b, _)| a.file.cmp(&b.file));
    Ok(found)
}

/// The checksum of a file; `None`: the caller has gone.
fn sum(path: &Path, buffer: &mut [u8], ended: &AtomicBool) -> Result<Option<Crc64>, DataError> {
    let failed = |source| DataError::Io { doing: "read", path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    loop {
        if ended.load(Ordering::Relaxed) {
            return Ok(None);
        }
        match file.read(buffer) {
            Ok(0) => return Ok(Some(Crc64(digest.finalize()))),
            Ok(read) => digest.update(&buffer[..read]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn wrong_files_are_named_and_right_ones_are_read_once() {
        let dir = tempfile::tempdir().unwrap();
        let entry = |name: &str, bytes: &[u8]| {
            std::fs::write(dir.path().join(name), bytes).unwrap();
            FileEntry { file: name.into(), bytes: bytes.len() as u64, crc64: Crc64::of(bytes) }
        };
        let long = vec![7; 3 * CHUNK + 5];
        let mut files = vec![entry("b", &long), entry("a", b"short"), entry("empty", b"")];
        assert!(Checking::begin(dir.path(), files.clone()).wrong().await.unwrap().is_empty());
        files[0].crc64 = Crc64(1);
        files[1].crc64 = Crc64(2);
        let checking = Checking::begin(dir.path(), files.clone());
        let wrong = checking.wrong().await.unwrap();
        assert_eq!(wrong, [(files[1].clone(), Crc64::of(b"short")), (files[0].clone(), Crc64::of(&long))]);
        assert!(checking.wrong().await.unwrap().is_empty(), "told once");
        // It was read before: that it is gone now is not noticed.
        std::fs::remove_file(dir.path().join("empty")).unwrap();
        assert!(Checking::begin(dir.path(), vec![files[2].clone()]).wrong().await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_check_without_a_caller_ends_silently() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), b"text").unwrap();
        let files = vec![FileEntry { file: "a".into(), bytes: 4, crc64: Crc64(1) }];
        let checking = Checking::begin(dir.path(), files.clone());
        let ended = checking.ended.clone();
        drop(checking);
        assert!(ended.load(Ordering::Relaxed));
        assert!(wrong(dir.path(), &files, &ended).unwrap().is_empty());
        assert_eq!(wrong(dir.path(), &files, &AtomicBool::new(false)).unwrap().len(), 1, "it was not taken for right");
    }
}
