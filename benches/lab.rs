//! Processes under observation: the S3 server, and contenders with their memory and time.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::MetadataExt,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde_json::Value;

use super::{Result, s3};

/// How often memory is looked at. A look costs tens of microseconds: no page table is walked.
const LOOK: Duration = Duration::from_millis(50);

/// The S3 server as a process of its own; it ends when this is dropped.
pub struct Server {
    child: Child,
    /// Its end is the server's end.
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

    /// What a client needs to find it and be let in.
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

/// One event, and when it was heard, counted from the start of the process.
pub struct Heard {
    pub at_s: f64,
    pub event: Value,
}

/// What was seen of one process and its children, from start to end.
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

/// Runs `command` until it ends, or kills it after the first event of kind `until`.
pub fn observe(mut command: Command, until: Option<&str>) -> Result<Life> {
    let program = command.get_program().to_string_lossy().into_owned();
    let begun = Instant::now();
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().with_context(|| format!("start {program}"))?;
    let pid = child.id();
    let over = Arc::new(AtomicBool::new(false));
    let watcher = {
        let over = Arc::clone(&over);
        thread::spawn(move || {
            let mut peak = 0;
            while !over.load(Ordering::Relaxed) {
                peak = peak.max(memory(pid));
                thread::sleep(LOOK);
            }
            peak
        })
    };

    let mut events = Vec::new();
    let mut killed = false;
    for line in BufReader::new(child.stdout.take().context("output")?).lines() {
        let line = line?;
        let Ok(event) = serde_json::from_str::<Value>(&line) else { continue };
        let last = until.is_some_and(|kind| event["event"] == kind);
        events.push(Heard { at_s: begun.elapsed().as_secs_f64(), event });
        if last {
            killed = true;
            child.kill()?;
            break;
        }
    }
    let status = child.wait()?;
    over.store(true, Ordering::Relaxed);
    let peak_memory_bytes = watcher.join().unwrap_or(0);
    if !killed && !status.success() {
        bail!("{program}: {status}");
    }
    Ok(Life { events, peak_memory_bytes })
}

/// Private memory of a process and its descendants, and the shared memory that they hold, each object counted once.
/// Program code and page cache are not counted.
fn memory(root: u32) -> u64 {
    let mut private = 0;
    let mut shared = BTreeMap::new();
    for pid in family(root) {
        private += private_bytes(pid).unwrap_or(0);
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for entry in descriptors.flatten() {
            let is_memory = fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:"));
            if let (true, Ok(facts)) = (is_memory, fs::metadata(entry.path())) {
                shared.insert(facts.ino(), facts.blocks() * 512);
            }
        }
    }
    private + shared.values().sum::<u64>()
}

fn private_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
}

fn family(root: u32) -> BTreeSet<u32> {
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
