//! Room in the cache: which datasets are in use, and which are removed when the disk is short.
//!
//! Every user of a dataset's folder, from the first byte of its download on, holds a shared lock on `.use` in it; a
//! folder is locked exclusively before it is removed, so that no folder in use is removed. When room is short, the
//! datasets taken into use longest ago are removed, complete or not, until there is enough, and no more.
//!
//! # Crash, two at once
//! A folder is renamed to `.evicted-<random>` before it is deleted: under its own name a dataset is never partly
//! deleted. A crash's leftovers under that name are deleted by the next process that is short of room. A lock belongs
//! to the open file, so it vanishes with its process. A file system without locks can't show what is in use: there
//! nothing is removed.

use std::{
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rustix::{
    fs::{FlockOperation, flock, statvfs},
    io::Errno,
};

use super::place;
use crate::ids::random_hex;

/// Locked by all users of the folder that holds it; its time is that of the last use.
const USE: &str = ".use";
const EVICTED_PREFIX: &str = ".evicted-";
/// How often a process checks whether a folder about to be removed is gone.
const POLL: Duration = Duration::from_millis(50);
/// The space left free for others on the same disk, bytes.
const SPARE: u64 = 1 << 30;

/// A folder in use: it stays until this value is dropped.
#[derive(Debug)]
pub(super) struct InUse {
    /// `None`: the folder can't be locked, and nobody else can tell that it is in use.
    _lock: Option<File>,
}

/// Creates the folder if need be, and takes it into use.
pub(super) async fn take(dir: &Path) -> io::Result<InUse> {
    let mut gone = 0;
    // A file system on which an open file is never the one at its path can't show what is in use.
    while gone < 100 {
        place::make(dir)?;
        match place::is_ours(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                gone += 1;
                continue;
            }
            done => done?,
        }
        match try_take(dir) {
            Taken::Yes(lock) => return Ok(InUse { _lock: lock }),
            Taken::Gone => gone += 1,
            Taken::Going => tokio::time::sleep(POLL).await,
        }
    }
    Ok(InUse { _lock: None })
}

enum Taken {
    /// With its lock, if it has one.
    Yes(Option<File>),
    /// It has been moved away meanwhile.
    Gone,
    /// Another process is about to move it away.
    Going,
}

fn try_take(dir: &Path) -> Taken {
    let path = dir.join(USE);
    let opened = place::no_link().create(true).append(true).open(&path);
    let Ok(file) = opened else {
        return if dir.is_dir() { Taken::Yes(None) } else { Taken::Gone };
    };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) if !is_at(&file, &path) => Taken::Gone,
        Ok(()) => {
            #[expect(clippy::disallowed_methods, reason = "only the order of removal follows from it")]
            let _ = file.set_modified(SystemTime::now());
            Taken::Yes(Some(file))
        }
        Err(Errno::WOULDBLOCK | Errno::INTR) => Taken::Going,
        Err(_) => Taken::Yes(None),
    }
}

/// Whether the open file is still the one at `path`.
fn is_at(file: &File, path: &Path) -> bool {
    let (Ok(open), Ok(there)) = (file.metadata(), std::fs::symlink_metadata(path)) else { return false };
    (open.dev(), open.ino()) == (there.dev(), there.ino())
}

/// Bytes that may still be written on the disk of `dir`; `None`: the file system does not say.
pub(super) fn free(dir: &Path) -> Option<u64> {
    let found = statvfs(dir).ok()?;
    found.f_bavail.checked_mul(found.f_frsize)
}

/// Makes room for `needed` bytes below `root`, as far as possible without touching folders in use. Folders that can't
/// be read or removed are left alone: whether the room is enough shows on writing.
pub(super) fn make(root: &Path, needed: u64, free: impl Fn(&Path) -> Option<u64>) {
    let is_enough = || free(root).is_none_or(|free| free >= needed.saturating_add(SPARE));
    if is_enough() {
        return;
    }
    let entries = std::fs::read_dir(root).into_iter().flatten().flatten();
    let is_folder = |entry: &std::fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    let folders: Vec<PathBuf> = entries.filter(is_folder).map(|entry| entry.path()).collect();
    for left in folders.iter().filter(|path| name(path).starts_with(EVICTED_PREFIX)) {
        let _ = std::fs::remove_dir_all(left);
    }
    let mut datasets: Vec<(SystemTime, &PathBuf)> =
        folders.iter().filter(|path| is_dataset(name(path))).map(|path| (last_use(path), path)).collect();
    datasets.sort();
    for (_, dir) in datasets {
        if is_enough() {
            return;
        }
        match evict(root, dir) {
            Ok(true) => {
                tracing::info!(dataset = %dir.display(), "removed from the cache: nobody uses it, and room is short")
            }
            Ok(false) => {}
            Err(error) => tracing::warn!(dataset = %dir.display(), %error, "not removed from the cache"),
        }
    }
}

/// Moves a dataset away and deletes it; `false`: it is in use, or that can't be determined.
fn evict(root: &Path, dir: &Path) -> io::Result<bool> {
    let path = dir.join(USE);
    let lock = place::no_link().create(true).append(true).open(&path)?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() || !is_at(&lock, &path) {
        return Ok(false);
    }
    let away = root.join(format!("{EVICTED_PREFIX}{}", random_hex(8)));
    std::fs::rename(dir, &away)?;
    std::fs::remove_dir_all(&away)?;
    Ok(true)
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// `<index CRC64>-<index length>`: no other names in the folder are ours.
fn is_dataset(name: &str) -> bool {
    let Some((crc, length)) = name.split_once('-') else { return false };
    crc.len() == 16
        && crc.bytes().all(|b| b.is_ascii_hexdigit())
        && !length.is_empty()
        && length.bytes().all(|b| b.is_ascii_digit())
}

/// A folder never marked as used is the first to be removed.
fn last_use(dir: &Path) -> SystemTime {
    let marked = std::fs::metadata(dir.join(USE)).and_then(|metadata| metadata.modified());
    marked.unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1000;

    /// A dataset of [`SIZE`] bytes that was last used at this second.
    fn dataset(root: &Path, number: u32, used_at: Option<u64>) -> PathBuf {
        let dir = root.join(format!("{number:016x}-77"));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("train-00000.bin"), vec![0; SIZE as usize]).unwrap();
        if let Some(second) = used_at {
            let file = File::create(dir.join(USE)).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(second)).unwrap();
        }
        dir
    }

    /// The free bytes of a disk whose capacity is `bytes` and [`SPARE`].
    fn disk(bytes: u64) -> impl Fn(&Path) -> Option<u64> {
        move |root| {
            let each = |dir: PathBuf| std::fs::metadata(dir.join("train-00000.bin")).map_or(0, |file| file.len());
            let used: u64 = std::fs::read_dir(root).unwrap().map(|entry| each(entry.unwrap().path())).sum();
            Some((bytes + SPARE).saturating_sub(used))
        }
    }

    fn names(root: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn the_least_recently_used_goes_until_there_is_room_and_nothing_that_is_in_use() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let [old, older, oldest] = [(1, 300), (2, 200), (3, 100)].map(|(n, at)| dataset(root, n, Some(at)));
        let before_marks = dataset(root, 4, None);
        // Not ours.
        std::fs::create_dir_all(root.join("my-notes")).unwrap();
        std::fs::write(root.join("my-notes/train-00000.bin"), "").unwrap();

        make(root, SIZE, disk(5 * SIZE));
        assert_eq!(names(root).len(), 5, "there is room");
        make(root, SIZE, disk(4 * SIZE));
        assert!(!before_marks.exists() && oldest.exists(), "one is enough: {:?}", names(root));
        // In use: it stays, and the next one goes.
        let in_use = take(&oldest).await.unwrap();
        std::fs::File::open(oldest.join(USE)).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        make(root, SIZE, disk(3 * SIZE));
        assert!(oldest.exists() && !older.exists() && old.exists(), "{:?}", names(root));
        make(root, 100 * SIZE, disk(3 * SIZE));
        assert_eq!(names(root), [name(&oldest), "my-notes"], "all but the one in use and what is not ours");
        drop(in_use);
        make(root, 100 * SIZE, disk(3 * SIZE));
        assert_eq!(names(root), ["my-notes"]);
    }

    #[tokio::test]
    async fn what_is_taken_into_use_is_the_newest() {
        let root = tempfile::tempdir().unwrap();
        let [first, second] = [(1, 100), (2, 200)].map(|(n, at)| dataset(root.path(), n, Some(at)));
        drop(take(&first).await.unwrap());
        make(root.path(), SIZE, disk(2 * SIZE));
        assert!(first.exists() && !second.exists());
    }

    #[test]
    fn a_disk_that_does_not_say_loses_nothing_and_rests_of_a_crash_go() {
        let root = tempfile::tempdir().unwrap();
        let kept = dataset(root.path(), 1, Some(100));
        std::fs::rename(dataset(root.path(), 2, None), root.path().join(".evicted-0123")).unwrap();
        make(root.path(), u64::MAX, |_| None);
        assert_eq!(names(root.path()).len(), 2);
        make(root.path(), SIZE, disk(2 * SIZE));
        assert_eq!(names(root.path()), [name(&kept)]);
    }

    /// A process that waits for the lock of a folder being removed creates it anew.
    #[tokio::test]
    async fn a_folder_that_goes_while_it_is_taken_is_made_anew() {
        let root = tempfile::tempdir().unwrap();
        let dir = dataset(root.path(), 1, Some(100));
        let lock = File::options().append(true).open(dir.join(USE)).unwrap();
        flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        assert!(matches!(try_take(&dir), Taken::Going));
        std::fs::rename(&dir, root.path().join(".evicted-1")).unwrap();
        let in_use = take(&dir).await.unwrap();
        assert!(in_use._lock.is_some() && dir.join(USE).exists() && !dir.join("train-00000.bin").exists());
        // The lock of the folder that has gone says nothing of the one that is there.
        assert!(!is_at(&lock, &dir.join(USE)));
        drop(lock);
        assert!(!evict(root.path(), &dir).unwrap());
    }
}
