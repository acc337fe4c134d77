//! Copies of tensors to host memory, made while LibTorch continues to compute.
//!
//! [`HostCopier`] owns a few threads. [`start`](HostCopier::start) hands them a list of tensors and one destination,
//! which consists of any number of pieces of memory; they copy until the last byte is there, run the callback, and wake
//! the waiting thread. On the CPU the tensors are cut into chunks that the threads take one by one; they run only while
//! a core would be idle (Linux's `SCHED_IDLE`), so that they do not slow computing threads, and a thread that
//! [waits](CopyTicket::wait) copies the rest itself, so that it never waits for a thread that gets no core. On a GPU
//! `start` marks the point in the compute stream, and one thread orders the copies after that point on a separate
//! stream: into [`Pinned`] memory they run beside the kernels. There the compute stream can wait for them in the host's
//! place: [`hold`](CopyTicket::hold).
//!
//! Invariants: from `start` to the end of [`wait`](CopyTicket::wait), or to what is launched behind a `hold`, the
//! tensors must not change (reading is allowed); otherwise the bytes come from two moments. The destination belongs to
//! the copy until `wait` returns it; it and the tensors are kept alive whatever happens to the ticket. Dropping a
//! ticket waits first.
//!
//! [`Pinned`]: super::Pinned

use std::{
    collections::VecDeque,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tch::Tensor;

use super::{
    Result, TorchError,
    ffi::{self, Run, check},
};
use crate::threads::give_way;

/// Bytes of a tensor that a thread takes at a time: small enough that threads finish together.
const CHUNK: usize = 1 << 20;

const DOING: &str = "copy to host";

/// One tensor to copy.
#[derive(Debug)]
pub struct CopyJob {
    /// The tensor, contiguous; a shallow clone that keeps its memory alive.
    pub tensor: Tensor,
    /// The piece of the destination that it goes into.
    pub piece: usize,
    /// Its first byte within that piece.
    pub offset: u64,
    /// Its bytes; checked against the tensor.
    pub len: u64,
}

/// A finished copy.
#[derive(Debug)]
pub struct Copied<D> {
    /// The destination, piece by piece.
    pub destination: Vec<D>,
    /// From `start` to the last byte.
    pub took: Duration,
}

/// A few threads that copy tensors to host memory in the background.
#[derive(Debug)]
pub struct HostCopier {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
    yielding: bool,
    /// Whether copies on a CPU are made as on a GPU, for tests.
    as_on_a_gpu: bool,
}

impl HostCopier {
    /// Starts `threads` copy threads; at least one. `yielding`: they leave every core to computing threads. This suits
    /// the CPU; on a GPU the one thread that issues the copies does almost nothing itself.
    pub fn new(threads: usize, yielding: bool) -> Result<Self> {
        let mut copier = Self { queue: Arc::default(), threads: Vec::new(), yielding, as_on_a_gpu: false };
        for index in 0..threads.max(1) {
            let queue = Arc::clone(&copier.queue);
            let builder = std::thread::Builder::new().name(format!("copy-{index}"));
            let serve = move || {
                if yielding {
                    give_way();
                }
                queue.serve();
            };
            copier.threads.push(builder.spawn(serve).map_err(TorchError::Thread)?);
        }
        Ok(copier)
    }

    /// Makes copies on a CPU in the way of a GPU: behind a mark, ordered by one thread, as a whole.
    #[cfg(test)]
    pub(crate) fn as_on_a_gpu(threads: usize) -> Result<Self> {
        let mut copier = Self::new(threads, false)?;
        copier.as_on_a_gpu = true;
        Ok(copier)
    }

    /// Whether its threads leave every core to computing threads.
    pub const fn is_yielding(&self) -> bool {
        self.yielding
    }

    /// Starts copying `jobs` into `destination` and returns at once.
    ///
    /// The jobs are checked first: contiguous tensors, all on the CPU or all on one GPU, lengths as stated, ranges that
    /// are within their piece of the destination and do not overlap. `on_done` runs on a copy thread when the last byte
    /// is there, before the waiter wakes; it does not run if the copy fails. Keep it short.
    pub fn start<D>(
        &self,
        destination: Vec<D>,
        jobs: Vec<CopyJob>,
        on_done: impl FnOnce(Duration) + Send + 'static,
    ) -> Result<CopyTicket<D>>
    where
        D: AsMut<[u8]> + Send + 'static,
    {
        let mut held = Held::new(destination);
        let pieces = held.memory();
        let mut runs = Vec::with_capacity(jobs.len());
        let mut device = None;
        let mut ranges = Vec::with_capacity(jobs.len());
        for CopyJob { tensor, piece, offset, len } in &jobs {
            let facts = ffi::facts(DOING, tensor)?;
            if facts.bytes != *len {
                return Err(TorchError::Length { doing: DOING, tensor: facts.bytes, given: *len });
            }
            if *device.get_or_insert(facts.device) != facts.device {
                return Err(TorchError::MixedDevices { doing: DOING });
            }
            if *len == 0 {
                continue;
            }
            let (base, size) = pieces.get(*piece).copied().unwrap_or((ptr::null_mut(), 0));
            let range = TorchError::Range { offset: *offset, len: *len, size: size as u64 };
            let Some(end) = offset.checked_add(*len).filter(|&end| end <= size as u64) else { return Err(range) };
            ranges.push((*piece, *offset, end));
            // SAFETY: `offset + len` was just found to lie within the piece.
            let target = unsafe { base.add(*offset as usize) };
            runs.push(Run { source: facts.data.cast(), target, bytes: *len });
        }
        ranges.sort_unstable();
        if let Some(pair) = ranges.windows(2).find(|pair| pair[0].0 == pair[1].0 && pair[0].2 > pair[1].1) {
            let (piece, offset, end) = pair[1];
            return Err(TorchError::Range { offset, len: end - offset, size: pieces[piece].1 as u64 });
        }

        let is_marked = |&device: &i32| (device >= 0 || self.as_on_a_gpu) && !runs.is_empty();
        let mark = device.filter(is_marked).map(Mark::now).transpose()?;
        let runs = if mark.is_some() { runs } else { chunks(&runs) };
        let units = if mark.is_some() { OF_A_MARK } else { runs.len() };
        let batch = Arc::new(Batch {
            runs,
            mark,
            units,
            next: AtomicUsize::new(0),
            left: AtomicUsize::new(units),
            begun: Instant::now(),
            end: Mutex::new(End {
                held: Some(held),
                tensors: jobs.into_iter().map(|job| job.tensor).collect(),
                on_done: Some(Box::new(on_done)),
                failure: None,
                ordered: false,
                took: None,
            }),
            ended: Condvar::new(),
        });
        if units == 0 {
            batch.finish();
        } else {
            self.queue.push(batch.clone());
        }
        Ok(CopyTicket { batch })
    }
}

impl Drop for HostCopier {
    /// Finishes the copies under way, then ends the threads.
    fn drop(&mut self) {
        lock(&self.queue.waiting).closed = true;
        self.queue.changed.notify_all();
        for thread in self.threads.drain(..) {
            // Copy threads do not panic: they only copy and run callbacks, whose panics they catch.
            let _ = thread.join();
        }
    }
}

/// A copy under way.
#[must_use = "the tensors must not change before the copy is done"]
pub struct CopyTicket<D: Send> {
    batch: Arc<Batch<D>>,
}

impl<D: Send> CopyTicket<D> {
    /// Whether the last byte is there and the callback has run.
    pub fn is_done(&self) -> bool {
        lock(&self.batch.end).took.is_some()
    }

    /// Whether there is a stream that can wait for it.
    pub fn can_be_held(&self) -> bool {
        self.batch.mark.is_some()
    }

    /// Lets the calling thread's current stream wait for the last byte, and does not wait itself: what it launches from
    /// here on may change the tensors. False: there is no such stream, or the copy could not be ordered, so the host
    /// must [wait](Self::wait).
    pub fn hold(&self) -> Result<bool> {
        let Some(mark) = &self.batch.mark else { return Ok(false) };
        if self.batch.next.compare_exchange(0, 1, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.batch.run(0);
        }
        let end = self.batch.until(|end| end.ordered);
        if end.failure.is_some() {
            return Ok(false);
        }
        drop(end);
        // SAFETY: the mark is alive, and its copies are ordered.
        check(DOING, unsafe { ffi::trn_copy_hold(mark.0) })?;
        Ok(true)
    }

    /// Waits until the last byte is there and the callback has run; returns the destination. The calling thread copies
    /// the parts that no copy thread has taken.
    pub fn wait(self) -> Result<Copied<D>> {
        let mut end = self.batch.wait();
        if let Some(failure) = end.failure.take() {
            return Err(failure);
        }
        match (end.took, end.held.take()) {
            (Some(took), Some(held)) => Ok(Copied { destination: held.into_inner(), took }),
            // `Batch::wait` returns when `took` is set, and only this consuming function takes the destination.
            _ => Err(TorchError::Callback),
        }
    }
}

impl<D: Send> Drop for CopyTicket<D> {
    fn drop(&mut self) {
        drop(self.batch.wait());
    }
}

impl<D: Send> fmt::Debug for CopyTicket<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CopyTicket").field("done", &self.is_done()).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code under these locks panics halfway through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Cuts runs into pieces of at most [`CHUNK`] bytes.
fn chunks(runs: &[Run]) -> Vec<Run> {
    let mut pieces = Vec::with_capacity(runs.iter().map(|run| (run.bytes as usize).div_ceil(CHUNK)).sum());
    for run in runs {
        let len = run.bytes as usize;
        for start in (0..len).step_by(CHUNK) {
            // SAFETY: `start` is less than the run's length.
            let (source, target) = unsafe { (run.source.add(start), run.target.add(start)) };
            pieces.push(Run { source, target, bytes: CHUNK.min(len - start) as u64 });
        }
    }
    pieces
}

/// The destination, held by address: its memory is written to while the value is moved.
struct Held<D>(*mut [D]);

impl<D> Held<D> {
    fn new(destination: Vec<D>) -> Self {
        Self(Box::into_raw(destination.into_boxed_slice()))
    }

    fn into_inner(self) -> Vec<D> {
        let this = std::mem::ManuallyDrop::new(self);
        // SAFETY: made by `Box::into_raw`, and `self` is not dropped.
        unsafe { Box::from_raw(this.0) }.into_vec()
    }
}

impl<D: AsMut<[u8]>> Held<D> {
    /// First byte and length of each piece. No other code touches the destination before the copy is done.
    fn memory(&mut self) -> Vec<(*mut u8, usize)> {
        // SAFETY: the box is alive and this is its only reference.
        let pieces = unsafe { &mut *self.0 }.iter_mut();
        let memory = |piece: &mut D| {
            let memory = piece.as_mut();
            (memory.as_mut_ptr(), memory.len())
        };
        pieces.map(memory).collect()
    }
}

impl<D> Drop for Held<D> {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw` and freed once.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

/// A point in a GPU's compute stream.
struct Mark(*mut ffi::MarkHandle);

impl Mark {
    fn now(device: i32) -> Result<Self> {
        let mut mark = ptr::null_mut();
        // SAFETY: the pointer is valid for the call.
        check(DOING, unsafe { ffi::trn_mark(device, &mut mark) })?;
        Ok(Self(mark))
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: made by the shim and freed once.
        unsafe { ffi::trn_mark_free(self.0) };
    }
}

struct End<D> {
    held: Option<Held<D>>,
    tensors: Vec<Tensor>,
    on_done: Option<Box<dyn FnOnce(Duration) + Send>>,
    failure: Option<TorchError>,
    /// Of a marked batch: its copies are in their stream, or never will be.
    ordered: bool,
    /// Set last.
    took: Option<Duration>,
}

/// Units of a batch behind a mark: all its copies are ordered, then they are waited for.
const OF_A_MARK: usize = 2;

/// One call of `start`.
struct Batch<D> {
    /// Chunks on the CPU; whole tensors on a GPU.
    runs: Vec<Run>,
    mark: Option<Mark>,
    units: usize,
    /// The next unit that no thread has taken.
    next: AtomicUsize,
    /// Units that are not finished.
    left: AtomicUsize,
    begun: Instant,
    end: Mutex<End<D>>,
    ended: Condvar,
}

// SAFETY: the pointers in `runs` lead into the tensors and the destination, which `end` keeps alive until the last unit
// is finished; targets do not overlap, each is written by the one thread that took it from `next`, and `left` orders
// the writes before the end. One thread orders the copies behind the mark; `ordered` comes before all other uses of it,
// which read it.
unsafe impl<D: Send> Send for Batch<D> {}
// SAFETY: as above; everything else is behind the mutex.
unsafe impl<D: Send> Sync for Batch<D> {}

impl<D> Batch<D> {
    fn finish(&self) {
        let took = self.begun.elapsed();
        let (failed, on_done) = {
            let mut end = lock(&self.end);
            (end.failure.is_some(), end.on_done.take())
        };
        let panicked = match on_done {
            Some(on_done) if !failed => catch_unwind(AssertUnwindSafe(|| on_done(took))).is_err(),
            _ => false,
        };
        let mut end = lock(&self.end);
        if panicked {
            end.failure = Some(TorchError::Callback);
        }
        end.tensors.clear();
        end.took = Some(took);
        self.ended.notify_all();
    }
}

/// Work that threads take in units until none is left.
trait Units: Send + Sync {
    fn work(&self);
}

impl<D> Batch<D> {
    fn until(&self, is_so: impl Fn(&End<D>) -> bool) -> MutexGuard<'_, End<D>> {
        self.ended.wait_while(lock(&self.end), |end| !is_so(end)).unwrap_or_else(PoisonError::into_inner)
    }

    /// Does one unit, which the calling thread has taken.
    fn run(&self, unit: usize) {
        match &self.mark {
            None => {
                let run = self.runs[unit];
                // SAFETY: both are alive (see above), and no tensor lies in a destination that someone else owns.
                unsafe { ptr::copy_nonoverlapping(run.source, run.target, run.bytes as usize) };
            }
            Some(mark) if unit == 0 => {
                // SAFETY: sources and targets are alive (see above) until the copies have been waited for.
                let status = unsafe { ffi::trn_copy_after(mark.0, self.runs.as_ptr(), self.runs.len()) };
                let failure = check(DOING, status).err();
                let mut end = lock(&self.end);
                end.failure = failure;
                end.ordered = true;
                self.ended.notify_all();
            }
            Some(mark) => {
                drop(self.until(|end| end.ordered));
                // SAFETY: the mark is alive, and its copies are ordered, or some of them.
                if let Err(error) = check(DOING, unsafe { ffi::trn_copy_wait(mark.0) }) {
                    lock(&self.end).failure.get_or_insert(error);
                }
            }
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.finish();
        }
    }
}

impl<D: Send> Batch<D> {
    fn wait(&self) -> MutexGuard<'_, End<D>> {
        self.work();
        self.until(|end| end.took.is_some())
    }
}

impl<D: Send> Units for Batch<D> {
    fn work(&self) {
        loop {
            let unit = self.next.fetch_add(1, Ordering::Relaxed);
            if unit >= self.units {
                return;
            }
            self.run(unit);
        }
    }
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    batches: VecDeque<Arc<dyn Units>>,
    closed: bool,
}

impl Queue {
    fn push(&self, batch: Arc<dyn Units>) {
        lock(&self.waiting).batches.push_back(batch);
        self.changed.notify_all();
    }

    /// The life of a copy thread.
    fn serve(&self) {
        loop {
            let batch = {
                let mut waiting = lock(&self.waiting);
                loop {
                    if let Some(batch) = waiting.batches.front() {
                        break Arc::clone(batch);
                    }
                    if waiting.closed {
                        return;
                    }
                    waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
                }
            };
            batch.work();
            let mut waiting = lock(&self.waiting);
            // All its units are taken; the first thread that notices removes it.
            if waiting.batches.front().is_some_and(|front| ptr::addr_eq(Arc::as_ptr(front), Arc::as_ptr(&batch))) {
                waiting.batches.pop_front();
            }
        }
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("batches", &lock(&self.waiting).batches.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tch::{Device, Kind};

    use super::*;

    /// Tensors of many sizes, some longer than a chunk, one empty, and where they go: packed, one byte apart.
    fn jobs() -> (Vec<Tensor>, Vec<CopyJob>, usize) {
        let elements = [1, 0, CHUNK as i64 / 4, 5, CHUNK as i64 * 3 / 4 + 3, 77_777];
        let tensors: Vec<_> = elements
            .iter()
            .zip(1..)
            .map(|(&n, seed)| (Tensor::arange(n, (Kind::Float, Device::Cpu)) * 0.7 + f64::from(seed)).sin())
            .collect();
        let mut offset = 1;
        let jobs = tensors
            .iter()
            .map(|tensor| {
                let len = tensor.numel() as u64 * 4;
                let job = CopyJob { tensor: tensor.shallow_clone(), piece: 0, offset, len };
                offset += len + 1;
                job
            })
            .collect();
        (tensors, jobs, offset as usize)
    }

    fn expected(tensors: &[Tensor], size: usize) -> Vec<u8> {
        let mut bytes = vec![0xee; size];
        let mut offset = 1;
        for tensor in tensors {
            let len = tensor.numel() * 4;
            super::super::store_bytes(tensor, &mut bytes[offset..offset + len]).unwrap();
            offset += len + 1;
        }
        bytes
    }

    #[test]
    fn bytes_are_exact_while_compute_reads_the_tensors() {
        for threads in [1, 3] {
            let copier = HostCopier::new(threads, true).unwrap();
            let (tensors, list, size) = jobs();
            let (sender, receiver) = mpsc::channel();
            let ticket = copier.start(vec![vec![0xee; size]], list, move |took| sender.send(took).unwrap()).unwrap();
            let sum: f64 = tensors.iter().map(|tensor| f64::try_from(tensor.sum(Kind::Double)).unwrap()).sum();
            let Copied { destination, took } = ticket.wait().unwrap();
            assert!(sum.is_finite());
            assert!(destination[0] == expected(&tensors, size), "{threads} threads");
            assert_eq!(receiver.try_recv(), Ok(took), "the callback runs before the waiter wakes");
        }
    }

    #[test]
    fn a_copy_behind_a_mark_is_held_by_the_stream_or_waited_for_and_has_its_bytes() {
        for threads in [1, 3] {
            let copier = HostCopier::as_on_a_gpu(threads).unwrap();
            for hold in [false, true] {
                let (tensors, list, size) = jobs();
                let (sender, receiver) = mpsc::channel();
                let ticket =
                    copier.start(vec![vec![0xee; size]], list, move |took| sender.send(took).unwrap()).unwrap();
                if hold {
                    assert!(ticket.hold().unwrap() && ticket.hold().unwrap());
                }
                let Copied { destination, took } = ticket.wait().unwrap();
                assert!(destination[0] == expected(&tensors, size), "{threads} threads");
                assert_eq!(receiver.try_recv(), Ok(took));
            }
        }
    }

    /// Nothing waits for the copy thread, which is busy: whoever holds orders the copies itself.
    #[test]
    fn a_hold_does_not_wait_for_a_copy_thread() {
        let copier = HostCopier::as_on_a_gpu(1).unwrap();
        let (_held_up, list, size) = jobs();
        let (go, gate) = mpsc::channel::<()>();
        let (begun, beginning) = mpsc::channel::<()>();
        let first = copier
            .start(vec![vec![0; size]], list, move |_| {
                begun.send(()).unwrap();
                gate.recv().unwrap();
            })
            .unwrap();
        beginning.recv().unwrap();
        let (tensors, list, size) = jobs();
        let second = copier.start(vec![vec![0xee; size]], list, |_| ()).unwrap();
        assert!(second.hold().unwrap());
        assert!(!second.is_done(), "its end is a copy thread's, or that of whoever waits");
        // The stream has passed the copies: the tensors may change.
        for tensor in &tensors {
            let _ = tensor.shallow_clone().zero_();
        }
        let copied = second.wait().unwrap().destination;
        assert!(copied[0] == expected(&jobs().0, size));
        go.send(()).unwrap();
        drop(first);
    }

    #[test]
    fn a_cpu_has_no_stream_that_could_wait() {
        let copier = HostCopier::new(1, true).unwrap();
        let (tensors, list, size) = jobs();
        let ticket = copier.start(vec![vec![0xee; size]], list, |_| ()).unwrap();
        assert!(!ticket.hold().unwrap());
        assert!(ticket.wait().unwrap().destination[0] == expected(&tensors, size));
        let nothing = HostCopier::as_on_a_gpu(1).unwrap().start(Vec::<Vec<u8>>::new(), Vec::new(), |_| ()).unwrap();
        assert!(!nothing.hold().unwrap(), "nothing is copied");
    }

    #[test]
    fn a_copier_serves_many_copies_and_finishes_them_before_it_goes() {
        let copier = HostCopier::new(2, true).unwrap();
        let tickets: Vec<_> = (0..10)
            .map(|_| {
                let (tensors, list, size) = jobs();
                (tensors, size, copier.start(vec![vec![0xee; size]], list, |_| ()).unwrap())
            })
            .collect();
        drop(copier);
        for (tensors, size, ticket) in tickets {
            assert!(ticket.is_done());
            assert!(ticket.wait().unwrap().destination[0] == expected(&tensors, size));
        }
    }

    #[test]
    fn a_copy_is_not_done_before_its_callback_and_a_dropped_ticket_waits_for_it() {
        let copier = HostCopier::new(2, true).unwrap();
        let (_tensors, list, size) = jobs();
        let (go, gate) = mpsc::channel::<()>();
        let (sender, receiver) = mpsc::channel();
        let ticket = copier
            .start(vec![vec![0; size]], list, move |_| {
                gate.recv().unwrap();
                sender.send(()).unwrap();
            })
            .unwrap();
        assert!(!ticket.is_done());
        go.send(()).unwrap();
        drop(ticket);
        assert_eq!(receiver.try_recv(), Ok(()));
    }

    #[test]
    fn a_waiting_thread_copies_what_no_other_has_taken() {
        let copier = HostCopier::new(1, true).unwrap();
        // The callback of another copy keeps the one thread busy.
        let (_held_up, list, size) = jobs();
        let (go, gate) = mpsc::channel::<()>();
        let (begun, beginning) = mpsc::channel::<()>();
        let first = copier
            .start(vec![vec![0; size]], list, move |_| {
                begun.send(()).unwrap();
                gate.recv().unwrap();
            })
            .unwrap();
        beginning.recv().unwrap();
        let (tensors, list, size) = jobs();
        let second = copier.start(vec![vec![0xee; size]], list, |_| ()).unwrap();
        assert!(second.wait().unwrap().destination[0] == expected(&tensors, size));
        go.send(()).unwrap();
        drop(first);
    }

    #[test]
    fn an_empty_copy_is_done_at_once() {
        let copier = HostCopier::new(1, true).unwrap();
        let ticket = copier.start(Vec::<Vec<u8>>::new(), Vec::new(), |_| ()).unwrap();
        assert!(ticket.is_done());
        assert!(ticket.wait().unwrap().destination.is_empty());
    }

    #[test]
    fn a_callback_that_panics_is_an_error_and_the_threads_live_on() {
        let copier = HostCopier::new(1, true).unwrap();
        let (_tensors, list, size) = jobs();
        let ticket = copier.start(vec![vec![0; size]], list, |_| panic!("on purpose")).unwrap();
        assert!(matches!(ticket.wait(), Err(TorchError::Callback)));
        let (tensors, list, size) = jobs();
        let copied = copier.start(vec![vec![0xee; size]], list, |_| ()).unwrap().wait().unwrap();
        assert!(copied.destination[0] == expected(&tensors, size));
    }

    #[test]
    fn the_destination_may_hold_its_bytes_within_itself() {
        let copier = HostCopier::new(1, true).unwrap();
        let job = CopyJob { tensor: Tensor::from_slice(&[1_u8, 2, 3]), piece: 0, offset: 1, len: 3 };
        let copied = copier.start(vec![[0_u8; 5]], vec![job], |_| ()).unwrap().wait().unwrap();
        assert_eq!(copied.destination, [[0, 1, 2, 3, 0]]);
    }

    /// The same place in two pieces is no overlap.
    #[test]
    fn every_piece_of_the_destination_gets_its_own_tensors() {
        let copier = HostCopier::new(2, true).unwrap();
        let job = |value: u8, piece, offset| CopyJob { tensor: Tensor::from_slice(&[value; 3]), piece, offset, len: 3 };
        let jobs = vec![job(1, 2, 1), job(2, 0, 0), job(3, 2, 4), job(4, 0, 3)];
        let copied = copier.start(vec![vec![0_u8; 6], vec![9; 2], vec![0; 7]], jobs, |_| ()).unwrap().wait().unwrap();
        let expected: [&[u8]; 3] = [&[2, 2, 2, 4, 4, 4], &[9, 9], &[0, 1, 1, 1, 3, 3, 3]];
        assert_eq!(copied.destination, expected);
    }

    #[test]
    fn jobs_that_do_not_fit_are_refused() {
        let copier = HostCopier::new(1, true).unwrap();
        let tensor = Tensor::zeros([2, 4], (Kind::Float, Device::Cpu));
        let job = |tensor: &Tensor, offset, len| CopyJob { tensor: tensor.shallow_clone(), piece: 0, offset, len };
        let start = |jobs| copier.start(vec![vec![0; 64], vec![0; 8]], jobs, |_| panic!("ran")).unwrap_err();
        assert!(matches!(start(vec![job(&tensor.tr(), 0, 32)]), TorchError::NotContiguous { .. }));
        assert!(matches!(start(vec![job(&tensor, 0, 31)]), TorchError::Length { tensor: 32, given: 31, .. }));
        for offset in [33, u64::MAX - 8] {
            assert!(matches!(start(vec![job(&tensor, offset, 32)]), TorchError::Range { .. }));
        }
        let overlapping = vec![job(&tensor, 32, 32), job(&tensor, 1, 32)];
        assert!(matches!(start(overlapping), TorchError::Range { offset: 32, len: 32, size: 64 }));
        assert!(matches!(start(vec![job(&Tensor::new(), 0, 0)]), TorchError::Refused { .. }));
        for (piece, size) in [(1, 8), (2, 0)] {
            let elsewhere = CopyJob { piece, ..job(&tensor, 0, 32) };
            assert!(matches!(start(vec![elsewhere]), TorchError::Range { size: of, .. } if of == size));
        }
    }
}
