//! The shared memory that holds a snapshot.
//!
//! The agent creates an image as a memfd, which its worker inherits; both map the same pages. The worker writes tensor
//! bytes, the agent uploads those very pages: nothing is serialised and nothing copied again. Because the agent owns
//! the memory, a snapshot outlives the worker that took it.
//!
//! Invariants: through one [`SharedImage`], its clones and all their mappings, the image's bytes are either lent for
//! writing (as [`ImageChunk`]s) or for reading (as [`Bytes`]), never both; writers are lent to only once. Loans are
//! counted per image, not per mapping, so aborted tasks and unfinished reads still count ([`SharedImage::is_lent`]).
//! Between the processes the control protocol regulates access: a worker writes its ranges of a slot, which are no
//! other rank's, between a `SaveOrder` for it and its `Captured` answer; the agent reads the slot after *every* rank's
//! `Captured` and gives it out again only when the upload has ended.
//!
//! On a crash of either side the kernel frees the memory with its last mapping. Sealing is not used, because the agent
//! sizes an image only after the worker has reported the state's layout.

use std::{
    io,
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicIsize, AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, MemfdFlags};

use crate::{threads::together, torch::Mapped};

/// Bytes whose pages are allocated by one call: during a prefault the process can neither map nor unmap memory.
const FAULTED: usize = 4 << 20;

/// The loans of an image's bytes in this process: as many for reading as it is above zero, as many for writing as it is
/// below.
#[derive(Debug, Default)]
struct Loans(AtomicIsize);

impl Loans {
    /// Lends `count` ranges for writing, unless anything is lent.
    fn write(&self, count: usize) -> bool {
        isize::try_from(count)
            .is_ok_and(|count| self.0.compare_exchange(0, -count, Ordering::AcqRel, Ordering::Acquire).is_ok())
    }

    /// Lends a range for reading, unless anything is lent for writing.
    fn read(&self) -> bool {
        let more = |loans: isize| (loans >= 0).then_some(loans + 1);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok()
    }

    fn written(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }

    fn was_read(&self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Shared memory that can be handed to a child process.
#[derive(Debug)]
pub struct SharedImage {
    fd: OwnedFd,
    loans: Arc<Loans>,
}

impl SharedImage {
    /// An empty image. `name` shows up in `/proc/<pid>/maps`.
    pub fn create(name: &str) -> io::Result<Self> {
        Ok(Self { fd: rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?, loans: Arc::default() })
    }

    /// An image inherited from the parent process.
    pub fn inherited(fd: OwnedFd) -> Self {
        Self { fd, loans: Arc::default() }
    }

    /// Makes it at least `len` bytes long; new pages read as zero, and none is allocated before it is touched. An image
    /// never shrinks, so that a mapping of it stays valid.
    pub fn grow(&self, len: u64) -> io::Result<()> {
        if self.size()? < len {
            rustix::fs::ftruncate(&self.fd, len)?;
        }
        Ok(())
    }

    /// Allocates the memory of `range`, whoever maps it; its content stays. Unlike [`Mapping::prefault`], this may be
    /// done by a thread that yields: the process can map and unmap memory meanwhile.
    pub fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        let mut start = range.start;
        while start < range.end {
            let len = (range.end - start).min(FAULTED as u64);
            rustix::fs::fallocate(&self.fd, FallocateFlags::KEEP_SIZE, start, len)?;
            start += len;
        }
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(u64::try_from(rustix::fs::fstat(&self.fd)?.st_size).unwrap_or(0))
    }

    /// A second handle on the same memory.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()?, loans: Arc::clone(&self.loans) })
    }

    /// Whether any of its bytes are lent in this process, through any mapping.
    pub fn is_lent(&self) -> bool {
        self.loans.0.load(Ordering::Acquire) != 0
    }

    /// Maps the whole image for reading and writing.
    pub fn map(&self) -> io::Result<Mapping> {
        let len = usize::try_from(self.size()?).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let raw = if len == 0 { None } else { Some(MmapOptions::new().len(len).map_raw(&self.fd)?) };
        Ok(Mapping { shared: Arc::new(Shared { raw, len, loans: Arc::clone(&self.loans) }) })
    }
}

impl AsFd for SharedImage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<SharedImage> for OwnedFd {
    fn from(image: SharedImage) -> Self {
        image.fd
    }
}

#[derive(Debug)]
struct Shared {
    raw: Option<MmapRaw>,
    len: usize,
    loans: Arc<Loans>,
}

impl Shared {
    fn pointer(&self) -> *mut u8 {
        self.raw.as_ref().map_or(std::ptr::NonNull::dangling().as_ptr(), MmapRaw::as_mut_ptr)
    }
}

/// An image in this process's address space. Dropping it unmaps the memory once everything lent from it has come back.
#[derive(Debug)]
pub struct Mapping {
    shared: Arc<Shared>,
}

fn busy(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::ResourceBusy, format!("shared image is {what}"))
}

fn outside(range: &Range<u64>, len: usize) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("bytes {}..{} of a {len}-byte image", range.start, range.end))
}

impl Mapping {
    /// Bytes mapped.
    pub fn len(&self) -> usize {
        self.shared.len
    }

    /// Whether the image has no bytes.
    pub fn is_empty(&self) -> bool {
        self.shared.len == 0
    }

    /// Allocates every page of `range` now, on at most `threads` threads, so that the first capture does not stop for
    /// page faults. The pages' content stays.
    pub fn prefault(&self, range: Range<u64>, threads: usize) -> io::Result<()> {
        let (offset, len) = self.check(&range)?;
        let Some(raw) = &self.shared.raw else { return Ok(()) };
        let (pieces, next) = (len.div_ceil(FAULTED), AtomicUsize::new(0));
        let fault = || -> io::Result<()> {
            loop {
                let begin = next.fetch_add(1, Ordering::Relaxed).saturating_mul(FAULTED);
                if begin >= len {
                    return Ok(());
                }
                match raw.advise_range(memmap2::Advice::PopulateWrite, offset + begin, FAULTED.min(len - begin)) {
                    // Kernels before 5.14 do not know the advice: there only the first capture is slower.
                    Err(error) if error.raw_os_error() == Some(22) => return Ok(()),
                    result => result?,
                }
            }
        };
        let ended = together(threads.min(pieces).max(1), fault);
        // These threads do nothing that panics.
        ended.into_iter().try_for_each(|ended| ended.unwrap_or(Ok(())))
    }

    fn check(&self, range: &Range<u64>) -> io::Result<(usize, usize)> {
        let start = usize::try_from(range.start).map_err(|_| outside(range, self.len()))?;
        let end = usize::try_from(range.end).map_err(|_| outside(range, self.len()))?;
        if start > end || end > self.len() {
            return Err(outside(range, self.len()));
        }
        Ok((start, end - start))
    }

    /// Pages of the image, at an address that stays: nothing is lent.
    pub fn pages(&self, range: Range<u64>) -> io::Result<Pages> {
        let (offset, len) = self.check(&range)?;
        Ok(Pages { shared: Arc::clone(&self.shared), offset, len })
    }

    /// Lends disjoint ranges for writing; they must be in ascending order. Refused while anything of the image is lent.
    pub fn chunks(&self, ranges: &[Range<u64>]) -> io::Result<Vec<ImageChunk>> {
        let mut end = 0;
        let mut places = Vec::with_capacity(ranges.len());
        for range in ranges {
            places.push(self.check(range)?);
            if range.start < end {
                return Err(outside(range, self.len()));
            }
            end = range.end;
        }
        if !self.shared.loans.write(places.len()) {
            return Err(busy("in use"));
        }
        let chunk = |(offset, len)| ImageChunk { shared: Arc::clone(&self.shared), offset, len };
        Ok(places.into_iter().map(chunk).collect())
    }

    /// Lends a range for reading, without a copy. Refused while anything of the image is lent for writing.
    pub fn bytes(&self, range: Range<u64>) -> io::Result<Bytes> {
        let (offset, len) = self.check(&range)?;
        if !self.shared.loans.read() {
            return Err(busy("being written"));
        }
        Ok(Bytes::from_owner(View { shared: Arc::clone(&self.shared), offset, len }))
    }
}

/// A range of an image that stays mapped while this exists. Its bytes can't be reached through it.
#[derive(Debug)]
pub struct Pages {
    shared: Arc<Shared>,
    offset: usize,
    len: usize,
}

// SAFETY: the range was checked to lie in the mapping, which `shared` keeps alive, where it is.
unsafe impl Mapped for Pages {
    fn memory(&self) -> (*mut u8, usize) {
        // SAFETY: `offset` is at most the mapping's length.
        (unsafe { self.shared.pointer().add(self.offset) }, self.len)
    }
}

/// A range of an image, lent for writing.
#[derive(Debug)]
pub struct ImageChunk {
    shared: Arc<Shared>,
    offset: usize,
    len: usize,
}

impl AsMut<[u8]> for ImageChunk {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: `offset..offset + len` was checked to lie in the mapping, which `shared` keeps alive; chunks are
        // disjoint and no reader exists while one is lent (`Mapping::chunks`, `Mapping::bytes`), so this is the only
        // reference in this process; no other process touches these bytes during a capture (the module's protocol).
        // Any byte is a valid u8.
        unsafe { std::slice::from_raw_parts_mut(self.shared.pointer().add(self.offset), self.len) }
    }
}

impl Drop for ImageChunk {
    fn drop(&mut self) {
        self.shared.loans.written();
    }
}

struct View {
    shared: Arc<Shared>,
    offset: usize,
    len: usize,
}

impl AsRef<[u8]> for View {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the range was checked to lie in the mapping, which `shared` keeps alive; no chunk is lent for writing
        // while a view exists, and the worker does not write a slot that is being uploaded (the module's protocol).
        unsafe { std::slice::from_raw_parts(self.shared.pointer().add(self.offset), self.len) }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.shared.loans.was_read();
    }
}

/// The alignment of images and the files in them.
pub fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

#[cfg(test)]
mod tests {
    #![expect(clippy::single_range_in_vec_init, reason = "lists of ranges are what is tested")]

    use super::*;

    #[test]
    fn two_mappings_see_the_same_bytes_and_take_turns() {
        let image = SharedImage::create("test").unwrap();
        image.grow(8192).unwrap();
        image.grow(10).unwrap();
        let (worker, agent) = (image.map().unwrap(), image.try_clone().unwrap().map().unwrap());
        worker.prefault(0..8192, 1).unwrap();
        let mut chunks = worker.chunks(&[0..100, 4096..8192]).unwrap();
        assert!(worker.bytes(0..1).is_err(), "read while lent for writing");
        assert!(worker.chunks(&[0..1]).is_err(), "lent twice");
        chunks[0].as_mut().fill(7);
        chunks[1].as_mut().fill(9);
        // Memory has no other writers because it is mapped a second time.
        assert!(image.is_lent() && agent.bytes(0..1).is_err() && agent.chunks(&[0..1]).is_err());
        assert!(image.map().unwrap().chunks(&[0..1]).is_err());
        chunks.pop();
        assert!(agent.bytes(0..1).is_err(), "one of two is written on");
        drop(chunks);
        let bytes = agent.bytes(0..8192).unwrap();
        assert!(image.is_lent());
        assert!(bytes[..100].iter().all(|&b| b == 7) && bytes[100..4096].iter().all(|&b| b == 0));
        assert!(bytes[4096..].iter().all(|&b| b == 9));
        let part = bytes.slice(4096..4097);
        drop(bytes);
        assert!(agent.chunks(&[0..1]).is_err(), "written while a slice of it is read");
        assert!(worker.chunks(&[0..1]).is_err(), "read through another mapping");
        drop(part);
        assert!(!image.is_lent());
        assert!(agent.chunks(&[0..1]).is_ok());
    }

    /// Pages of the image that this process has mapped, by the kernel's count.
    fn mapped_pages(mapping: &Mapping) -> usize {
        let start = mapping.shared.pointer() as usize;
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps.lines().skip_while(|line| !line.starts_with(&format!("{start:x}-")));
        let size = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
        size.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024 / page_size() as usize
    }

    #[test]
    fn every_page_of_a_range_is_allocated_once_and_keeps_its_bytes() {
        for threads in [0, 1, 3] {
            let page = page_size() as usize;
            let image = SharedImage::create("test").unwrap();
            let len = 3 * FAULTED + 5 * page;
            image.grow(len as u64).unwrap();
            let map = image.map().unwrap();
            map.chunks(&[9..10]).unwrap()[0].as_mut()[0] = 7;
            // A kernel may give a large page for one byte.
            assert!(mapped_pages(&map) < len / page);
            map.prefault(0..len as u64, threads).unwrap();
            assert_eq!(mapped_pages(&map), len / page, "{threads} threads");
            let bytes = map.bytes(0..len as u64).unwrap();
            assert!(bytes[9] == 7 && bytes.iter().filter(|byte| **byte != 0).count() == 1);
            assert!(map.prefault(0..len as u64 + 1, threads).is_err());
        }
    }

    #[test]
    fn memory_is_allocated_before_it_is_touched_and_keeps_its_bytes() {
        let allocated = |image: &SharedImage| rustix::fs::fstat(&image.fd).unwrap().st_blocks as u64 * 512;
        let page = page_size();
        let (image, len) = (SharedImage::create("test").unwrap(), 2 * FAULTED as u64 + 3 * page);
        image.grow(len).unwrap();
        image.map().unwrap().chunks(&[page..page + 1]).unwrap()[0].as_mut()[0] = 7;
        assert!(allocated(&image) < len);
        image.allocate(page..len).unwrap();
        assert!(allocated(&image) >= len - page, "{} of {len}", allocated(&image));
        image.allocate(0..0).unwrap();
        let bytes = image.map().unwrap().bytes(0..len).unwrap();
        assert!(bytes[page as usize] == 7 && bytes.iter().filter(|byte| **byte != 0).count() == 1);
        assert_eq!(image.size().unwrap(), len);
    }

    #[test]
    fn ranges_outside_or_overlapping_are_refused() {
        let image = SharedImage::create("test").unwrap();
        image.grow(4096).unwrap();
        let map = image.map().unwrap();
        for ranges in [&[0..4097][..], &[0..10, 9..20], &[u64::MAX - 1..u64::MAX], &[4096..u64::MAX]] {
            assert!(map.chunks(ranges).is_err(), "{ranges:?}");
        }
        assert!(map.bytes(1..4097).is_err());
        // Ranges lent before the refusal have been given back.
        assert!(map.bytes(0..4096).is_ok());
        assert!(SharedImage::create("empty").unwrap().map().unwrap().bytes(0..0).is_ok());
    }
}
