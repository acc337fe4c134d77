//! The only writers of output: one thread for each of the two streams.
//!
//! A reader may be slow, stall (Ctrl-S, a paused pager, a log driver that blocks) or be gone, and a device may be full.
//! A message goes into a queue and its sender continues ([`Writer::say`] never waits): only the writer's own thread
//! waits for a reader, so that a stalled stream does not delay the other. The queue is bounded. When it is full, the
//! newest messages are dropped and counted; when the reader is back, the count takes the place of the gap. [`Weight`]
//! decides which are dropped first.
//!
//! Lines that can't be written are dropped and counted in the same way, and the next line is tried again: a disk may
//! have space again, and a named pipe may get another reader. None of this is an error of the run. At its end the
//! process waits for its readers for a moment ([`Writer::flush`]).

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use super::Event;

/// The most bytes that wait for a reader.
const MOST: usize = 2 << 20;
/// How long the end of this process waits for a reader that accepts nothing.
const STANDSTILL: Duration = Duration::from_secs(1);
/// How long it waits for a slow one.
const PATIENCE: Duration = Duration::from_secs(5);
/// The interval between two looks at a reader at the end.
const LOOK: Duration = Duration::from_millis(50);

/// Decides which messages are dropped first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// A redraw of the bars, which the next one replaces: dropped when a quarter of the queue is full, and not counted.
    Picture,
    /// A frequent message, such as a step: dropped when half of the queue is full.
    Passing,
    /// A rare message that would be missed.
    Lasting,
}

impl Weight {
    /// The queue length in bytes up to which it is accepted.
    const fn limit(self) -> usize {
        match self {
            Self::Picture => MOST / 4,
            Self::Passing => MOST / 2,
            Self::Lasting => MOST,
        }
    }
}

/// The messages dropped in one place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Of [`Weight::Passing`].
    pub passing: u64,
    /// Of [`Weight::Lasting`].
    pub lasting: u64,
}

impl Lost {
    fn count(&mut self, weight: Weight) {
        match weight {
            Weight::Picture => {}
            Weight::Passing => self.passing += 1,
            Weight::Lasting => self.lasting += 1,
        }
    }
    fn add(&mut self, other: Self) {
        self.passing += other.passing;
        self.lasting += other.lasting;
    }
}

#[derive(Debug)]
enum Entry {
    Line(Vec<u8>, Weight),
    Gap(Lost),
}

#[derive(Debug, Default)]
struct Queue {
    entries: VecDeque<Entry>,
    bytes: usize,
    /// Whether the thread is writing an entry.
    writing: bool,
    /// Entries that the thread has finished.
    done: u64,
    /// Whether the thread has been started.
    started: bool,
}

/// The destination of a writer, and its message for a gap.
pub trait Sink: Send + Sync {
    /// Writes a part; waits for the reader.
    fn write(&self, bytes: &[u8]) -> io::Result<usize>;
    /// Whether a write would be accepted now.
    fn is_ready(&self) -> bool;
    /// The text in place of dropped messages.
    fn gap(&self, lost: Lost) -> Vec<u8>;
}

struct Shared {
    sink: Box<dyn Sink>,
    queue: Mutex<Queue>,
    more: Condvar,
    less: Condvar,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes to one stream. Cheap to clone.
#[derive(Clone)]
pub struct Writer(Arc<Shared>);

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Writer")
    }
}

impl Writer {
    /// A writer to `sink`. Its thread starts with the first line.
    pub fn new(sink: impl Sink + 'static) -> Self {
        let shared =
            Shared { sink: Box::new(sink), queue: Mutex::default(), more: Condvar::new(), less: Condvar::new() };
        Self(Arc::new(shared))
    }

    /// Queues whole lines, or a redraw. Does not wait.
    pub fn say(&self, bytes: Vec<u8>, weight: Weight) {
        let mut queue = self.0.queue();
        if queue.bytes + bytes.len() > weight.limit() {
            if let Some(Entry::Gap(lost)) = queue.entries.back_mut() {
                lost.count(weight);
            } else if weight != Weight::Picture {
                let mut lost = Lost::default();
                lost.count(weight);
                queue.entries.push_back(Entry::Gap(lost));
            }
            return;
        }
        queue.bytes += bytes.len();
        queue.entries.push_back(Entry::Line(bytes, weight));
        if !queue.started {
            let shared = Arc::clone(&self.0);
            let thread = std::thread::Builder::new().name("say".into()).spawn(move || write_for_ever(&shared));
            // If the machine is out of threads, the next line tries again.
            queue.started = thread.is_ok();
        }
        drop(queue);
        self.0.more.notify_one();
    }

    /// Waits until everything is written, or the reader stalls. Returns whether everything is.
    pub fn flush(&self) -> bool {
        let begin = Instant::now();
        let mut moved = begin;
        let mut queue = self.0.queue();
        loop {
            if queue.entries.is_empty() && !queue.writing {
                return true;
            }
            let done = queue.done;
            if !queue.started {
                // No thread could be started: write as much as a reader accepts at once.
                drop(queue);
                let written = self.0.sink.is_ready() && write_next(&self.0);
                queue = self.0.queue();
                if !written {
                    return false;
                }
                continue;
            }
            queue = self.0.less.wait_timeout(queue, LOOK).unwrap_or_else(PoisonError::into_inner).0;
            let now = Instant::now();
            // A thread that gets no core is not a stalled reader.
            if queue.done != done || self.0.sink.is_ready() {
                moved = now;
            }
            if now.duration_since(moved) >= STANDSTILL || now.duration_since(begin) >= PATIENCE {
                return false;
            }
        }
    }
}

fn write_for_ever(shared: &Shared) {
    let mut pen = Pen::default();
    loop {
        {
            let mut queue = shared.queue();
            while queue.entries.is_empty() {
                queue = shared.more.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        }
        pen.next(shared);
    }
}

/// Without a thread.
fn write_next(shared: &Shared) -> bool {
    let mut pen = Pen::default();
    pen.next(shared);
    pen.missing == Lost::default()
}

/// The writing state: failed writes are reported before the next entry.
#[derive(Default)]
struct Pen {
    missing: Lost,
    /// Whether a line is incomplete.
    torn: bool,
}

impl Pen {
    /// Takes the next entry and writes it.
    fn next(&mut self, shared: &Shared) {
        let entry = {
            let mut queue = shared.queue();
            let Some(entry) = queue.entries.pop_front() else { return };
            if let Entry::Line(bytes, _) = &entry {
                queue.bytes -= bytes.len();
            }
            queue.writing = true;
            entry
        };
        match entry {
            Entry::Gap(lost) => self.missing.add(lost),
            Entry::Line(bytes, weight) => {
                let told = self.tell(shared.sink.as_ref());
                if told.and_then(|()| self.put(shared.sink.as_ref(), &bytes)).is_err() {
                    self.missing.count(weight);
                }
            }
        }
        // A gap at the end would otherwise be reported only with the next line, and there may be none.
        let last = shared.queue().entries.is_empty();
        if last {
            let _ = self.tell(shared.sink.as_ref());
        }
        let mut queue = shared.queue();
        queue.writing = false;
        queue.done += 1;
        drop(queue);
        shared.less.notify_all();
    }

    /// Reports a gap, if there is one.
    fn tell(&mut self, sink: &dyn Sink) -> io::Result<()> {
        if self.missing != Lost::default() {
            let text = sink.gap(self.missing);
            self.put(sink, &text)?;
            self.missing = Lost::default();
        }
        Ok(())
    }

    fn put(&mut self, sink: &dyn Sink, bytes: &[u8]) -> io::Result<()> {
        if self.torn {
            write_all(sink, b"\n").1?;
            self.torn = false;
        }
        let (begun, result) = write_all(sink, bytes);
        self.torn = begun && result.is_err();
        result
    }
}

/// Returns whether something was written, and whether everything was.
fn write_all(sink: &dyn Sink, mut bytes: &[u8]) -> (bool, io::Result<()>) {
    let mut begun = false;
    while !bytes.is_empty() {
        match sink.write(bytes) {
            Ok(0) => return (begun, Err(io::ErrorKind::WriteZero.into())),
            Ok(written) => {
                begun = true;
                bytes = bytes.get(written..).unwrap_or_default();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (begun, Err(error)),
        }
    }
    (begun, Ok(()))
}

/// A stream of this process, bypassing the locks and buffers of the standard library: so no other code waits for its
/// reader.
#[derive(Clone, Copy, Debug)]
enum Stream {
    Out,
    Err,
}

impl Stream {
    fn poll(self, limit: Option<&Timespec>) -> bool {
        let (out, err) = (io::stdout(), io::stderr());
        let descriptor = match self {
            Self::Out => PollFd::new(&out, PollFlags::OUT),
            Self::Err => PollFd::new(&err, PollFlags::OUT),
        };
        // A failed stream counts as ready, too: a write reports the failure at once.
        poll(&mut [descriptor], limit).is_ok_and(|ready| ready > 0)
    }

    /// A failure of standard output is reported on standard error, once; not if its reader is gone.
    fn warn(self, error: Errno) {
        static SAID: AtomicBool = AtomicBool::new(false);
        let news = matches!(self, Self::Out) && !matches!(error, Errno::PIPE | Errno::INTR);
        if news && !SAID.swap(true, Ordering::Relaxed) {
            tracing::warn!("events can't be written to standard output, continuing without them: {error}");
        }
    }
}

impl Sink for Stream {
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let written = match self {
                Self::Out => rustix::io::write(io::stdout(), bytes),
                Self::Err => rustix::io::write(io::stderr(), bytes),
            };
            match written {
                // Another process that shares it has made it non-blocking.
                Err(Errno::AGAIN) => {
                    self.poll(None);
                }
                Err(error) => {
                    self.warn(error);
                    return Err(error.into());
                }
                Ok(written) => return Ok(written),
            }
        }
    }

    fn is_ready(&self) -> bool {
        self.poll(Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))
    }

    fn gap(&self, Lost { passing, lasting }: Lost) -> Vec<u8> {
        match self {
            Self::Out => {
                let event = Event::Dropped { steps: passing, others: lasting };
                // A struct of numbers always becomes JSON.
                let mut line = serde_json::to_vec(&event).unwrap_or_default();
                line.push(b'\n');
                line
            }
            Self::Err => {
                let lines = super::human::plural(passing + lasting, "line");
                format!("... {lines} missing here: standard error was not read, or accepted nothing\n").into_bytes()
            }
        }
    }
}

static OUT: LazyLock<Writer> = LazyLock::new(|| Writer::new(Stream::Out));
static ERR: LazyLock<Writer> = LazyLock::new(|| Writer::new(Stream::Err));

/// The writer of events to standard output.
pub(super) fn out() -> &'static Writer {
    &OUT
}

/// The writer of standard error.
pub(super) fn err() -> &'static Writer {
    &ERR
}

/// Columns and rows of the terminal on standard error.
pub(super) fn terminal_size() -> (u16, u16) {
    let size = rustix::termios::tcgetwinsize(io::stderr()).ok().filter(|size| size.ws_col > 0 && size.ws_row > 0);
    size.map_or((80, 24), |size| (size.ws_col, size.ws_row))
}

/// Writes a lasting message to standard error. Does not wait.
pub fn say(text: impl Into<String>) {
    ERR.say(text.into().into_bytes(), Weight::Lasting);
}

/// Writes a line of `--json` to standard output. Does not wait.
pub fn say_event(line: impl Into<String>) {
    OUT.say(line.into().into_bytes(), Weight::Lasting);
}

/// Before this process ends: waits for its readers, unless they stall.
pub fn flush() {
    OUT.flush();
    ERR.flush();
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    /// A stream whose reader reads only when allowed; it accepts this many bytes and then nothing.
    #[derive(Clone, Default)]
    struct Reader(Arc<Inner>);

    #[derive(Default)]
    struct Inner {
        reads: Mutex<bool>,
        wake: Condvar,
        text: Mutex<String>,
        /// The number of bytes after which it accepts nothing; 0: it accepts all.
        full: AtomicU64,
    }

    impl Reader {
        fn read(&self, reads: bool) {
            *self.0.reads.lock().unwrap() = reads;
            self.0.wake.notify_all();
        }
        fn text(&self) -> String {
            self.0.text.lock().unwrap().clone()
        }
        fn full_after(&self, bytes: u64) {
            self.0.full.store(bytes, Ordering::Relaxed);
        }
    }

    impl Sink for Reader {
        fn write(&self, bytes: &[u8]) -> io::Result<usize> {
            let mut reads = self.0.reads.lock().unwrap();
            while !*reads {
                reads = self.0.wake.wait(reads).unwrap();
            }
            let mut text = self.0.text.lock().unwrap();
            let full = usize::try_from(self.0.full.load(Ordering::Relaxed)).unwrap();
            let room = if full == 0 { bytes.len() } else { full.saturating_sub(text.len()).min(bytes.len()) };
            if room == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            text.push_str(std::str::from_utf8(&bytes[..room]).unwrap());
            Ok(room)
        }
        fn is_ready(&self) -> bool {
            *self.0.reads.lock().unwrap()
        }
        fn gap(&self, lost: Lost) -> Vec<u8> {
            format!("gap {} {}\n", lost.passing, lost.lasting).into_bytes()
        }
    }

    fn line(number: usize) -> Vec<u8> {
        format!("{number:0>1023}\n").into_bytes()
    }

    /// A writer that is stuck in its first line.
    fn stuck(reader: &Reader) -> Writer {
        let writer = Writer::new(reader.clone());
        writer.say(line(0), Weight::Passing);
        while !writer.0.queue().writing {
            std::thread::yield_now();
        }
        writer
    }

    #[test]
    fn a_stalled_reader_delays_nothing_and_learns_how_much_it_missed() {
        let reader = Reader::default();
        let writer = stuck(&reader);
        let many = 4 * MOST / 1024;
        for number in 1..many {
            writer.say(line(number), Weight::Passing);
            writer.say(vec![b'~'; 1024], Weight::Picture);
        }
        for number in 0..3 {
            writer.say(format!("important {number}\n").into_bytes(), Weight::Lasting);
        }
        assert!(writer.0.queue().bytes <= MOST, "the queue is bounded");
        assert!(!writer.flush(), "the end does not wait for ever");
        reader.read(true);
        assert!(writer.flush());
        writer.say(b"after\n".to_vec(), Weight::Passing);
        assert!(writer.flush());
        let text = reader.text().replace('~', "");
        let numbers: Vec<usize> = text.lines().filter(|line| line.len() == 1023).map(|l| l.parse().unwrap()).collect();
        assert_eq!(numbers, (0..numbers.len()).collect::<Vec<_>>(), "the oldest, in order");
        let rest: Vec<&str> = text.lines().filter(|line| line.len() != 1023).collect();
        let gap = format!("gap {} 0", many - numbers.len());
        assert_eq!(rest, [gap.as_str(), "important 0", "important 1", "important 2", "after"]);
    }

    #[test]
    fn lasting_messages_are_bounded_and_counted_too() {
        let reader = Reader::default();
        let writer = stuck(&reader);
        let many = 2 * MOST / 1024;
        (1..many).for_each(|number| writer.say(line(number), Weight::Lasting));
        assert!(writer.0.queue().bytes <= MOST);
        reader.read(true);
        assert!(writer.flush());
        let text = reader.text();
        let kept = text.lines().filter(|line| line.len() == 1023).count();
        assert_eq!(text.lines().last(), Some(format!("gap 0 {}", many - kept).as_str()));
    }

    /// A stream in which a signal interrupts every second write before a byte is written, and which accepts three bytes
    /// at once.
    #[derive(Clone, Default)]
    struct Disturbed(Arc<Mutex<(bool, Vec<u8>)>>);

    impl Sink for Disturbed {
        fn write(&self, bytes: &[u8]) -> io::Result<usize> {
            let mut inner = self.0.lock().unwrap();
            inner.0 = !inner.0;
            if inner.0 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let part = &bytes[..bytes.len().min(3)];
            inner.1.extend_from_slice(part);
            Ok(part.len())
        }
        fn is_ready(&self) -> bool {
            true
        }
        fn gap(&self, lost: Lost) -> Vec<u8> {
            format!("gap {} {}\n", lost.passing, lost.lasting).into_bytes()
        }
    }

    #[test]
    fn interrupted_writes_continue() {
        let stream = Disturbed::default();
        let writer = Writer::new(stream.clone());
        writer.say(b"first line\n".to_vec(), Weight::Passing);
        writer.say(b"second line\n".to_vec(), Weight::Lasting);
        assert!(writer.flush());
        assert_eq!(stream.0.lock().unwrap().1, b"first line\nsecond line\n");
    }

    #[test]
    fn writing_resumes_once_a_device_has_space_again() {
        let reader = Reader::default();
        let writer = Writer::new(reader.clone());
        reader.read(true);
        reader.full_after(9);
        for text in ["first\n", "second\n", "third\n"] {
            writer.say(text.as_bytes().to_vec(), Weight::Lasting);
        }
        assert!(writer.flush(), "what can't be written is not waited for");
        reader.full_after(0);
        writer.say(b"fourth\n".to_vec(), Weight::Passing);
        assert!(writer.flush());
        assert_eq!(reader.text(), "first\nsec\ngap 0 2\nfourth\n");
    }
}
