//! Large files on this machine's disks, moved past the page cache.
//!
//! A checkpoint is written once and read perhaps once, much later: keeping a copy of it in the page cache costs the CPU
//! a page fault and a copy for every 4 KiB, and other files their place. If memory, offset and file system allow it,
//! bytes go straight between the caller's pages and the disk (`O_DIRECT`, open(2)); if they don't (tmpfs, memory that
//! does not begin on a page, the odd end of a file), through the page cache. The file's content is the same either way.
//!
//! *Stored layout:* parts are written into a hidden `<name>#<number>` beside the file's place, as object_store names
//! them, which is synced, renamed into its place, and its folder synced. *Crash:* a kill leaves the hidden file, which
//! listings don't show and a sweep removes. *Cancel:* dropping the [`Staged`] removes it, once no write of it is under
//! way.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, IoSliceMut},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::{
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::{Errno, ReadWriteFlags, preadv2},
};

use super::crc::{Crc64, Summing};

/// The alignment of memory, offset and length of a direct transfer: no disk has larger logical blocks, and pages are no
/// smaller.
const BLOCK: usize = 4096;
/// Bytes read before they are summed: they are still in the processor's cache then.
const READ: usize = 1 << 20;

fn is_aligned(bytes: &[u8], offset: u64) -> bool {
    (bytes.as_ptr() as usize).is_multiple_of(BLOCK) && offset.is_multiple_of(BLOCK as u64)
}

/// The whole blocks at the start of `len` bytes, in bytes.
const fn whole_blocks(len: usize) -> usize {
    len - len % BLOCK
}

fn set_direct(file: &File, direct: bool) -> io::Result<()> {
    let flags = fcntl_getfl(file)?;
    Ok(fcntl_setfl(file, if direct { flags | OFlags::DIRECT } else { flags - OFlags::DIRECT })?)
}

/// Whether the file system refuses direct transfers.
fn is_refusal(error: &io::Error) -> bool {
    [Errno::INVAL, Errno::OPNOTSUPP].iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// A file that is being written and is not yet in its place.
pub(super) struct Staged {
    file: File,
    /// `None` once renamed.
    hidden: Option<PathBuf>,
    place: PathBuf,
    direct: AtomicBool,
}

impl Staged {
    /// Begins a file for `place`; missing folders are created, durably.
    pub(super) fn begin(place: PathBuf) -> io::Result<Self> {
        let mut number = 1_u32;
        loop {
            let mut hidden = place.clone().into_os_string();
            hidden.push(format!("#{number}"));
            let hidden = PathBuf::from(hidden);
            match OpenOptions::new().write(true).create_new(true).open(&hidden) {
                Ok(file) => {
                    // Not every file system can do this; the first write would report that, too.
                    let direct = AtomicBool::new(set_direct(&file, true).is_ok());
                    return Ok(Self { file, hidden: Some(hidden), place, direct });
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    number = number.checked_add(1).ok_or(error)?;
                }
                Err(error) if error.kind() == ErrorKind::NotFound => make_folder(parent(&place)?)?,
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes `bytes` at `offset`. Several threads may do so at once.
    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        if self.direct.load(Ordering::Acquire) && is_aligned(bytes, offset) {
            let blocks = whole_blocks(bytes.len());
            match self.file.write_all_at(&bytes[..blocks], offset) {
                Ok(()) => done = blocks,
                Err(error) if is_refusal(&error) => {}
                Err(error) => return Err(error),
            }
        }
        if done < bytes.len() {
            // This is final: only the end of a file has an odd length. Each thread checks for itself before it records
            // that.
            if self.direct.load(Ordering::Acquire) {
                set_direct(&self.file, false)?;
                self.direct.store(false, Ordering::Release);
            }
            self.file.write_all_at(&bytes[done..], offset + done as u64)?;
        }
        Ok(())
    }

    /// Puts the file into its place, durably, replacing any file there.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        if let Some(hidden) = &self.hidden {
            fs::rename(hidden, &self.place)?;
        }
        self.hidden = None;
        sync_folder(parent(&self.place)?)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        let Some(hidden) = self.hidden.take() else { return };
        // Best effort: a leftover is hidden, and deleted later. Removing a large file takes a while.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || fs::remove_file(hidden))),
            Err(_) => drop(fs::remove_file(hidden)),
        }
    }
}

fn parent(path: &Path) -> io::Result<&Path> {
    path.parent().ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "a file has no folder"))
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Creates a folder and those above it, each durable in its parent.
fn make_folder(folder: &Path) -> io::Result<()> {
    match fs::create_dir(folder) {
        Ok(()) => sync_folder(parent(folder)?),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            make_folder(parent(folder)?)?;
            match fs::create_dir(folder) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
                _ => sync_folder(parent(folder)?),
            }
        }
        Err(error) => Err(error),
    }
}

/// Fills `target` with the bytes at `offset` and sums them: from the page cache if they begin there, else directly.
pub(super) fn read(file: &File, offset: u64, target: &mut [u8]) -> io::Result<Crc64> {
    let mut direct = is_aligned(target, offset) && !is_cached(file, offset) && set_direct(file, true).is_ok();
    let mut summing = Summing::new();
    let mut at = offset;
    for slice in target.chunks_mut(READ) {
        if direct {
            let blocks = whole_blocks(slice.len());
            let read = match file.read_exact_at(&mut slice[..blocks], at) {
                Ok(()) => blocks,
                // The same bytes are read again in the other way.
                Err(error) if is_refusal(&error) => 0,
                Err(error) => return Err(error),
            };
            if read < slice.len() {
                set_direct(file, false)?;
                direct = false;
                file.read_exact_at(&mut slice[read..], at + read as u64)?;
            }
        } else {
            file.read_exact_at(slice, at)?;
        }
        summing.add(slice);
        at += slice.len() as u64;
    }
    Ok(summing.sum())
}

/// Whether the page at `offset` is in memory already.
fn is_cached(file: &File, offset: u64) -> bool {
    let mut byte = [0];
    matches!(preadv2(file, &mut [IoSliceMut::new(&mut byte)], offset, ReadWriteFlags::NOWAIT), Ok(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory that begins on a page and has no pattern.
    fn pages(len: usize) -> memmap2::MmapMut {
        let mut pages = memmap2::MmapMut::map_anon(len.max(1)).unwrap();
        let mut state = len as u64;
        for byte in pages.iter_mut() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = (state >> 56) as u8;
        }
        pages
    }

    #[test]
    fn files_hold_the_same_bytes_however_they_are_written() {
        // The build folder lies on a disk; the temporary folder may be on tmpfs. Both must do.
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap()];
        for folder in &folders {
            for len in [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 7, READ, 2 * READ + BLOCK + 1] {
                for skip in [0, 1] {
                    let body = pages(len + skip);
                    let body = &body[skip..skip + len];
                    let place = folder.path().join(format!("a/b/{len}-{skip}"));
                    let staged = Staged::begin(place.clone()).unwrap();
                    // Two parts, the second first.
                    let cut = whole_blocks(len / 2);
                    staged.write(&body[cut..], cut as u64).unwrap();
                    staged.write(&body[..cut], 0).unwrap();
                    assert!(!place.exists());
                    staged.finish().unwrap();
                    assert!(fs::read(&place).unwrap() == body, "{len} bytes from {skip}");

                    let file = File::open(&place).unwrap();
                    // They are cached now; after the advice they are not, if the kernel heeds it.
                    for advice in [rustix::fs::Advice::WillNeed, rustix::fs::Advice::DontNeed] {
                        rustix::fs::fadvise(&file, 0, None, advice).unwrap();
                        let mut target = pages(len + skip);
                        let sum = read(&file, 0, &mut target[skip..skip + len]).unwrap();
                        assert!(target[skip..skip + len] == *body, "{len} bytes to {skip}");
                        assert_eq!(sum, Crc64::of(body));
                        set_direct(&file, false).unwrap();
                    }
                    let mut more = pages(len + BLOCK);
                    assert_eq!(read(&file, 0, &mut more).unwrap_err().kind(), ErrorKind::UnexpectedEof, "{len}");
                }
            }
            assert!(
                !fs::read_dir(folder.path().join("a/b")).unwrap().any(|e| e
                    .unwrap()
                    .file_name()
                    .to_string_lossy()
                    .contains('#'))
            );
        }
    }

    /// A thread that learns of the change while it still writes directly would have its odd bytes refused.
    #[test]
    fn threads_that_stop_writing_directly_at_once_do_not_disturb_each_other() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let body = &pages(BLOCK + 1)[1..];
        let barrier = std::sync::Barrier::new(4);
        for round in 0..300 {
            let staged = Staged::begin(folder.path().join("k")).unwrap();
            std::thread::scope(|scope| {
                for part in 0..4 {
                    let (staged, barrier) = (&staged, &barrier);
                    scope.spawn(move || {
                        barrier.wait();
                        staged.write(body, part * body.len() as u64).unwrap_or_else(|e| panic!("round {round}: {e}"));
                    });
                }
            });
        }
    }

    #[test]
    fn an_unfinished_file_is_invisible_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("k");
        fs::write(&place, "old").unwrap();
        let (first, second) = (Staged::begin(place.clone()).unwrap(), Staged::begin(place.clone()).unwrap());
        first.write(b"first", 0).unwrap();
        second.write(b"second", 0).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
        drop(first);
        assert_eq!(fs::read(&place).unwrap(), b"old");
        second.finish().unwrap();
        assert_eq!(fs::read(&place).unwrap(), b"second");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
