//! Processes under observation: the S3 server, and contenders with their memory and time.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{BufRead, BufReader, Lines},
    os::unix::fs::MetadataExt,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde::Serialize;
use serde_json::Value;

use super::{Result, s3};

/// The interval between two looks at memory. A look costs tens of microseconds: no page table is walked.
const LOOK: Duration = Duration::from_millis(50);

/// The S3 server as a separate process; it ends when this is dropped.
pub struct Server {
    child: Child,
    /// When this closes, the server ends.
    _stdin: Option<ChildStdin>,
    endpoint: String,
}

impl Server {
    pub fn start() -> Result<Self> {
        let program = std::env::current_exe()?;
        let mut child = Command::new(program).arg("serve-s3").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdin = child.stdin.take();
        let mut endpoint = String::new();
        BufReader::new(child.stdout.take().context("output of the S3 server")?).read_line(&mut endpoint)?;
        Ok(Self { child, _stdin: stdin, endpoint: endpoint.trim().to_owned() })
    }

    /// The variables that a client needs to find the server and its keys.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        s3::client_env(&self.endpoint)
    }

    /// CPU seconds so far.
    pub fn cpu_s(&self) -> f64 {
        cpu_s(self.child.id()).unwrap_or(f64::NAN)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// User and system time of a process (proc(5), `stat` fields 14 and 15, in ticks of 1/100 s on Linux).
pub fn cpu_s(pid: u32) -> Option<f64> {
    let fields = stat(pid)?;
    Some((fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?) / 100.0)
}

/// The fields of `/proc/PID/stat` after the name, which may hold spaces.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(text.rsplit_once(')')?.1.split_whitespace().map(str::to_owned).collect())
}

/// One event, with the time at which it was heard, counted from the start of the process.
pub struct Heard {
    pub at_s: f64,
    pub event: Value,
}

/// The observations of one process and its children, from start to end.
pub struct Life {
    pub events: Vec<Heard>,
    pub peak_memory_bytes: u64,
}

impl Life {
    /// The events of one kind.
    pub fn of<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Heard> {
        self.events.iter().filter(move |heard| heard.event["event"] == kind)
    }
}

/// The memory that processes hold at one moment, bytes. Program code and page cache are not counted.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Memory {
    /// Private memory of the started process.
    pub first: u64,
    /// Private memory of its descendants.
    pub others: u64,
    /// Shared memory that any of them holds, each object counted once.
    pub shared: u64,
}

impl Memory {
    pub fn total(self) -> u64 {
        self.first + self.others + self.shared
    }
}

/// A process whose events are read, and which is observed together with its descendants. Dropping it kills it.
pub struct Live {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    begun: Instant,
    events: Vec<Heard>,
    peak: Arc<Mutex<Memory>>,
    over: Arc<AtomicBool>,
    watcher: Option<JoinHandle<()>>,
    program: String,
}

impl Live {
    pub fn start(mut command: Command) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let begun = Instant::now();
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().with_context(|| format!("start {program}"))?;
        let lines = BufReader::new(child.stdout.take().context("output")?).lines();
        let (peak, over) = (Arc::new(Mutex::new(Memory::default())), Arc::new(AtomicBool::new(false)));
        let watcher = {
            let (pid, peak, over) = (child.id(), Arc::clone(&peak), Arc::clone(&over));
            thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let now = memory(pid);
                    let mut peak = peak.lock().unwrap_or_else(PoisonError::into_inner);
                    if now.total() > peak.total() {
                        *peak = now;
                    }
                    drop(peak);
                    thread::sleep(LOOK);
                }
            })
        };
        Ok(Self { child, lines, begun, events: Vec::new(), peak, over, watcher: Some(watcher), program })
    }

    /// Reads until an event of this kind, or to the end. `None`: it has ended.
    fn listen(&mut self, until: Option<&str>) -> Result<Option<&Heard>> {
        for line in self.lines.by_ref() {
            let Ok(event) = serde_json::from_str::<Value>(&line?) else { continue };
            let wanted = until.is_some_and(|kind| event["event"] == kind);
            self.events.push(Heard { at_s: self.begun.elapsed().as_secs_f64(), event });
            if wanted {
                return Ok(self.events.last());
            }
        }
        Ok(None)
    }

    /// Reads until an event of this kind.
    pub fn wait_for(&mut self, kind: &str) -> Result<&Heard> {
        let program = self.program.clone();
        self.listen(Some(kind))?.with_context(|| format!("{program} ended and never said {kind}"))
    }

    /// Its descendants, by process id.
    pub fn descendants(&self) -> Vec<u32> {
        family(self.child.id()).into_iter().filter(|&pid| pid != self.child.id()).collect()
    }

    /// The memory at the moment when most was held, since the start or since the last call.
    pub fn take_peak(&self) -> Memory {
        std::mem::take(&mut self.peak.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Kills it at once.
    pub fn kill(mut self) -> Result<Life> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(self.end())
    }

    fn end(&mut self) -> Life {
        self.over.store(true, Ordering::Relaxed);
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
        Life { events: std::mem::take(&mut self.events), peak_memory_bytes: self.take_peak().total() }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.end();
    }
}

/// Runs `command` until it ends, or kills it after the first event of kind `until`.
pub fn observe(command: Command, until: Option<&str>) -> Result<Life> {
    let mut live = Live::start(command)?;
    if live.listen(until)?.is_some() {
        return live.kill();
    }
    let status = live.child.wait()?;
    if !status.success() {
        bail!("{}: {status}", live.program);
    }
    Ok(live.end())
}

fn memory(root: u32) -> Memory {
    let mut memory = Memory::default();
    let mut shared = BTreeMap::new();
    for pid in family(root) {
        let private = private_bytes(pid).unwrap_or(0);
        *(if pid == root { &mut memory.first } else { &mut memory.others }) += private;
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for entry in descriptors.flatten() {
            let is_memory = fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:"));
            if let (true, Ok(facts)) = (is_memory, fs::metadata(entry.path())) {
                shared.insert(facts.ino(), facts.blocks() * 512);
            }
        }
    }
    Memory { shared: shared.values().sum(), ..memory }
}

fn private_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
}

pub fn family(root: u32) -> BTreeSet<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return BTreeSet::new() };
    let pids: Vec<u32> = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    let parents: Vec<(u32, u32)> =
        pids.iter().filter_map(|&pid| Some((pid, stat(pid)?.get(1)?.parse().ok()?))).collect();
    let mut family = BTreeSet::from([root]);
    loop {
        let before = family.len();
        family.extend(
            parents.iter().filter(|(_, parent)| family.contains(parent)).map(|(pid, _)| *pid).collect::<Vec<_>>(),
        );
        if family.len() == before {
            return family;
        }
    }
}
