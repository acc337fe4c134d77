//! The built binary as a child process: started with a clean environment, observed line by line, killed with all its
//! descendants.
//!
//! Nothing here sleeps to let time pass: a test waits for an event on stdout, for a process state in /proc, or for the
//! exit, and each wait has a generous limit, after which it fails with the whole output of the process.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// The limit of every wait in a test; far beyond the duration of any of these runs, so that a loaded machine does not
/// turn it into a timing test.
pub const LIMIT: Duration = Duration::from_secs(180);

/// Marks every process that descends from one [`Trainer`], even after re-parenting.
const MARK: &str = "TRAINER_TEST_MARK";

/// One object of `--json` output.
#[derive(Clone, Debug)]
pub struct Event {
    /// The line as written: losses are compared by their text.
    pub line: String,
    /// The line, parsed.
    pub value: Value,
}

impl Event {
    /// Its kind: `step`, `checkpoint`, …
    pub fn kind(&self) -> &str {
        self.value["event"].as_str().unwrap_or_default()
    }
    /// Its step, if it has one.
    pub fn step(&self) -> Option<u64> {
        self.value["step"].as_u64()
    }
    /// Is it this kind of event, of this step?
    pub fn is(&self, kind: &str, step: u64) -> bool {
        self.kind() == kind && self.step() == Some(step)
    }
    /// The text of a member of this object that is a number, digit by digit as written.
    pub fn number_text(&self, name: &str) -> Option<&str> {
        let (_, rest) = self.line.split_once(&format!("\"{name}\":"))?;
        Some(rest[..rest.find([',', '}'])?].trim())
    }
}

#[derive(Default)]
struct Heard {
    events: Vec<Event>,
    stdout: String,
    stderr: String,
    /// Lines of stdout that are not JSON, although `--json` was given.
    not_json: Vec<String>,
    closed: bool,
}

type Ear = Arc<(Mutex<Heard>, Condvar)>;

fn hear(ear: &Ear) -> MutexGuard<'_, Heard> {
    ear.0.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A command line of the binary, to be started.
pub struct Trainer {
    command: Command,
    json: bool,
    mark: String,
    shown: String,
}

impl Trainer {
    /// `trainer` with these arguments, in `dir`, isolated from the caller's environment.
    pub fn new(dir: &Path, arguments: &[&str]) -> Self {
        Self::of(Path::new(env!("CARGO_BIN_EXE_trainer")), dir, arguments)
    }
    /// Another program that is built on the library, in the same way.
    pub fn of(program: &Path, dir: &Path, arguments: &[&str]) -> Self {
        static SERIAL: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let mark = format!("{}-{}", std::process::id(), SERIAL.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        let mut command = Command::new(program);
        command.current_dir(dir).args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if ["TRAINER_", "AWS_", "GOOGLE_", "GCE_", "NO_GCE_", "AZURE_", "SLURM_", "KUBERNETES_"]
                .iter()
                .any(|prefix| text.starts_with(prefix))
            {
                command.env_remove(&name);
            }
        }
        // A test machine may be a cloud machine, whose metadata service must not be used here.
        command.env("AWS_EC2_METADATA_DISABLED", "true").env("NO_GCE_CHECK", "true");
        command.env("TRAINER_AZURE_METADATA_ENDPOINT", "off").env("NO_COLOR", "1").env(MARK, &mark);
        // A build for CPUs is tested on machines with GPUs, too.
        if !cfg!(torch_cuda) && Path::new("/dev/nvidia0").exists() {
            command.env("TRAINER_GPU", "none");
        }
        // Data that it would keep in the user's cache belongs to this test.
        command.env("XDG_CACHE_HOME", dir.join("cache"));
        // The same holds for keys and regions of the user's profiles.
        command.env("AWS_CONFIG_FILE", "/no/such/file").env("AWS_SHARED_CREDENTIALS_FILE", "/no/such/file");
        Self { command, json: false, mark, shown: arguments.join(" ") }
    }
    /// Another program starts it and then becomes it: `nsenter`, `setpriv`.
    pub fn within(mut self, program: &[&str]) -> Self {
        let mut command = Command::new(program[0]);
        command.args(&program[1..]).arg(self.command.get_program()).args(self.command.get_args());
        for (name, value) in self.command.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        if let Some(folder) = self.command.get_current_dir() {
            command.current_dir(folder);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.command = command;
        self
    }
    /// Adds arguments.
    pub fn args(mut self, arguments: &[&str]) -> Self {
        self.command.args(arguments);
        self.shown = format!("{} {}", self.shown, arguments.join(" "));
        self
    }
    /// Adds `--json`: each line of stdout must then be one JSON object.
    pub fn json(mut self) -> Self {
        self.json = true;
        self.args(&["--json"])
    }
    /// Sets environment variables.
    pub fn envs(mut self, variables: &[(&'static str, String)]) -> Self {
        self.command.envs(variables.iter().map(|(name, value)| (*name, value)));
        self
    }
    /// Another program, which sets something up, starts it and then becomes it: `prlimit`, `unshare`.
    pub fn under(mut self, wrapper: &[&str]) -> Self {
        let mut command = Command::new(wrapper[0]);
        command.args(&wrapper[1..]).arg(self.command.get_program()).args(self.command.get_args());
        for (name, value) in self.command.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.current_dir(self.command.get_current_dir().expect("a folder to work in"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.command = command;
        self
    }
    /// Arms crash points, beside those that are armed: see `src/faults.rs`.
    pub fn faults(mut self, text: &str) -> Self {
        let is_it = |(name, _): &(&std::ffi::OsStr, _)| *name == "TRAINER_FAULTS";
        let before = self.command.get_envs().find(is_it).and_then(|(_, value)| value?.to_str().map(str::to_owned));
        let all = before.map_or_else(|| text.to_owned(), |before| format!("{before},{text}"));
        self.command.env("TRAINER_FAULTS", all);
        self
    }
    /// Lets the run finish `step` steps of this life and no more until [`Running::let_go`], so that a test in the
    /// middle of a run does not race with its end. Saves of earlier steps are committed meanwhile. A later life of the
    /// same process is held there, too, if it has that many steps left.
    pub fn hold_after(self, steps: u64) -> Self {
        self.hold_after_each(&[steps])
    }
    /// The same at several steps; each hold needs its own [`Running::let_go`].
    pub fn hold_after_each(self, steps: &[u64]) -> Self {
        let points = steps.iter().map(|steps| format!("worker.step=stop@rank=0@hit={}", steps + 1));
        self.faults(&points.collect::<Vec<_>>().join(","))
    }
    /// Gives it another standard output, which no reader here reads.
    pub fn stdout(mut self, to: impl Into<Stdio>) -> Self {
        self.command.stdout(to);
        self
    }
    /// The same for standard error.
    pub fn stderr(mut self, to: impl Into<Stdio>) -> Self {
        self.command.stderr(to);
        self
    }
    /// A shell starts it, after `before`, with these redirections.
    pub fn through_shell(mut self, before: &str, redirections: &str) -> Self {
        let script = format!("{before} exec \"$0\" \"$@\" {redirections}");
        self.shown = format!("{} {redirections}", self.shown);
        self.through("bash", &["-c", &script])
    }
    /// It becomes the first process of a separate namespace, as in a container; the namespace of users is separate,
    /// too, so that the tests need not be root.
    pub fn in_a_container(self) -> Self {
        self.through("unshare", &["--user", "--map-root-user", "--pid", "--fork", "--kill-child"])
    }
    /// Another program starts it.
    fn through(self, program: &str, arguments: &[&str]) -> Self {
        let mut shell = Command::new(program);
        shell.args(arguments);
        shell.arg(self.command.get_program()).args(self.command.get_args());
        shell.current_dir(self.command.get_current_dir().expect("a folder"));
        for (name, value) in self.command.get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { command: shell, ..self }
    }
    /// Starts it.
    pub fn start(mut self) -> Running {
        let mut child = self.command.spawn().expect("start the trainer binary");
        let ear = Ear::default();
        let json = self.json;
        let mut threads = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            let ear = ear.clone();
            threads.push(std::thread::spawn(move || listen(BufReader::new(stdout), json, &ear)));
        }
        if let Some(stderr) = child.stderr.take() {
            let ear = ear.clone();
            threads.push(std::thread::spawn(move || {
                let mut reader = BufReader::new(stderr);
                let mut line = Vec::new();
                while reader.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                    hear(&ear).stderr.push_str(&String::from_utf8_lossy(&line));
                    line.clear();
                }
            }));
        }
        let pid = Pid::from_child(&child);
        Running { child, pid, ear, threads, mark: self.mark, shown: self.shown, status: None }
    }
    /// Starts it and waits for its end.
    pub fn finish(self) -> Finished {
        self.start().finish()
    }
}

fn listen(mut reader: impl BufRead, json: bool, ear: &Ear) {
    let mut line = String::new();
    while reader.read_line(&mut line).is_ok_and(|n| n > 0) {
        let mut heard = hear(ear);
        heard.stdout.push_str(&line);
        if json {
            let text = line.trim_end();
            match serde_json::from_str(text) {
                Ok(value) => heard.events.push(Event { line: text.to_owned(), value }),
                // A killed process may leave half a line; a whole line must be an object.
                Err(_) if line.ends_with('\n') => heard.not_json.push(text.to_owned()),
                Err(_) => {}
            }
        }
        line.clear();
        drop(heard);
        ear.1.notify_all();
    }
    hear(ear).closed = true;
    ear.1.notify_all();
}

/// The state of a process: `R`, `S`, `T` for stopped, `Z`, ….
fn state(pid: Pid) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The name in parentheses may contain anything: the state follows the last one (proc(5)).
    stat.rsplit_once(") ")?.1.chars().next()
}

/// A started binary. Dropped, it and everything it started is killed.
pub struct Running {
    child: Child,
    pid: Pid,
    ear: Ear,
    threads: Vec<JoinHandle<()>>,
    mark: String,
    shown: String,
    status: Option<ExitStatus>,
}

impl Running {
    /// Waits for the first event since the start of the process that fits; fails if the process ends first.
    #[track_caller]
    pub fn wait_for(&self, what: &str, mut fits: impl FnMut(&Event) -> bool) -> Event {
        let deadline = Instant::now() + LIMIT;
        let mut seen = 0;
        let mut heard = hear(&self.ear);
        loop {
            if let Some(event) = heard.events[seen..].iter().find(|event| fits(event)) {
                return event.clone();
            }
            seen = heard.events.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if heard.closed || left.is_zero() {
                let why = if heard.closed { "ended" } else { "went on" };
                let story = story(&self.shown, &heard);
                drop(heard);
                panic!("trainer {why} without {what}\n{story}");
            }
            heard = self.ear.1.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
    /// Waits for the event of this kind and step.
    #[track_caller]
    pub fn wait_for_step(&self, kind: &str, step: u64) -> Event {
        self.wait_for(&format!("{kind} event of step {step}"), |event| event.is(kind, step))
    }
    /// Waits for the first event from number `seen` on that fits, and moves `seen` behind it; `None`: the process ends
    /// first, or [`LIMIT`] passes.
    pub fn next(&self, seen: &mut usize, mut fits: impl FnMut(&Event) -> bool) -> Option<Event> {
        let deadline = Instant::now() + LIMIT;
        let mut heard = hear(&self.ear);
        loop {
            while let Some(event) = heard.events.get(*seen) {
                *seen += 1;
                if fits(event) {
                    return Some(event.clone());
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if heard.closed || left.is_zero() {
                return None;
            }
            heard = self.ear.1.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
    /// The events from number `seen` on; moves `seen` behind them.
    pub fn heard(&self, seen: &mut usize) -> Vec<Event> {
        let heard = hear(&self.ear);
        let new = heard.events[*seen..].to_vec();
        *seen = heard.events.len();
        new
    }
    /// Whether the agent has ended, whatever of its output is still to be read.
    pub fn has_ended(&self) -> bool {
        matches!(state(self.pid), None | Some('Z' | 'X'))
    }
    /// Whether SIGSTOP has stopped the agent.
    pub fn is_stopped(&self) -> bool {
        state(self.pid) == Some('T')
    }
    /// Waits until the run is held at the step of [`Trainer::hold_after`].
    #[track_caller]
    pub fn held(&self) -> Pid {
        let mut held = None;
        self.wait_until("a worker that is held", || {
            held = self.workers().into_iter().find(|pid| state(*pid) == Some('T'));
            held.is_some()
        });
        held.expect("waited for")
    }
    /// Releases a run that [`Trainer::hold_after`] holds.
    #[track_caller]
    pub fn let_go(&self) {
        kill_process(self.held(), Signal::CONT).expect("let a worker go on");
    }
    /// Whether there is any output on standard output.
    pub fn has_said_anything(&self) -> bool {
        !hear(&self.ear).stdout.is_empty()
    }
    /// Its process.
    pub fn pid(&self) -> Pid {
        self.pid
    }
    /// Waits until SIGSTOP has stopped the agent; `false`: it ended first.
    pub fn stopped(&self) -> bool {
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            match state(self.pid) {
                Some('T') => return true,
                None | Some('Z' | 'X') => return false,
                _ => std::thread::sleep(Duration::from_millis(2)),
            }
        }
        false
    }
    /// Waits until this text is on stderr.
    #[track_caller]
    pub fn wait_until_said(&self, text: &str) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let heard = hear(&self.ear);
            if heard.stderr.contains(text) {
                return;
            }
            let over = heard.closed || Instant::now() > deadline;
            assert!(!over, "trainer did not say {text:?}\n{}", story(&self.shown, &heard));
            // Lines on stderr send no signal.
            drop(heard);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    /// How often this text is on stderr.
    pub fn said(&self, text: &str) -> usize {
        hear(&self.ear).stderr.matches(text).count()
    }
    /// Sends the agent a signal.
    pub fn signal(&self, signal: Signal) {
        // An error means that it has already gone; then the test learns the reason from its exit code.
        let _ = kill_process(self.pid, signal);
    }
    /// Events of this kind so far.
    pub fn events(&self, kind: &str) -> Vec<Event> {
        hear(&self.ear).events.iter().filter(|event| event.kind() == kind).cloned().collect()
    }
    /// Waits for a condition outside of the process; fails if the process ends first, or [`LIMIT`] passes.
    #[track_caller]
    pub fn wait_until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !holds() {
            let heard = hear(&self.ear);
            let failed = heard.closed || Instant::now() > deadline;
            assert!(!failed, "waited in vain for {what}\n{}", story(&self.shown, &heard));
            drop(heard);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    /// Sends `signal` again and again until the process has ended, or [`LIMIT`] passes.
    #[track_caller]
    pub fn ask_until_it_ends(&self, signal: Signal) {
        let deadline = Instant::now() + LIMIT;
        while !hear(&self.ear).closed {
            assert!(Instant::now() < deadline, "asked in vain\n{}", story(&self.shown, &hear(&self.ear)));
            self.signal(signal);
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    /// Living processes that descend from this one, itself excluded.
    pub fn workers(&self) -> Vec<Pid> {
        marked(&self.mark).into_iter().filter(|pid| *pid != self.pid).collect()
    }
    /// SIGKILL to the agent and to all its descendants at once, like switching the machine off.
    pub fn power_off(mut self) -> Finished {
        let workers = self.workers();
        self.signal(Signal::KILL);
        for pid in workers {
            let _ = kill_process(pid, Signal::KILL);
        }
        self.end()
    }
    /// Waits until it has no descendants any more; `false`: that takes longer than `limit`.
    pub fn childless_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while !self.workers().is_empty() {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }
    /// Waits for its end.
    #[track_caller]
    pub fn finish(mut self) -> Finished {
        self.end()
    }

    #[track_caller]
    fn end(&mut self) -> Finished {
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            match self.child.try_wait().expect("wait for the trainer binary") {
                Some(status) => break status,
                None if Instant::now() > deadline => {
                    let story = story(&self.shown, &hear(&self.ear));
                    panic!("trainer did not end\n{story}");
                }
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        self.status = Some(status);
        // A child that outlives the agent may hold the pipes open: wait only for the lines, not for the end of the
        // pipes.
        let alone = self.childless_within(Duration::from_secs(30));
        if alone {
            for thread in self.threads.drain(..) {
                let _ = thread.join();
            }
        }
        let heard = hear(&self.ear);
        Finished {
            status,
            events: heard.events.clone(),
            stdout: heard.stdout.clone(),
            stderr: heard.stderr.clone(),
            not_json: heard.not_json.clone(),
            shown: self.shown.clone(),
            alone,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for pid in marked(&self.mark) {
            let _ = kill_process(pid, Signal::KILL);
        }
        if self.status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Kills every process that descends from a [`Trainer`] of this process: for a campaign that is interrupted.
pub fn kill_all_of_this_process() {
    for pid in carrying(|item| item.starts_with(format!("{MARK}={}-", std::process::id()).as_bytes())) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// Living processes whose environment has the mark.
fn marked(mark: &str) -> Vec<Pid> {
    let wanted = format!("{MARK}={mark}");
    carrying(|item| item == wanted.as_bytes())
}

/// Living processes with such a variable in their environment. A zombie has no environment any more.
fn carrying(fits: impl Fn(&[u8]) -> bool) -> Vec<Pid> {
    let Ok(folder) = std::fs::read_dir("/proc") else { return Vec::new() };
    folder
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            std::fs::read(format!("/proc/{pid}/environ")).is_ok_and(|text| text.split(|b| *b == 0).any(&fits))
        })
        .filter_map(Pid::from_raw)
        .collect()
}

fn story(shown: &str, heard: &Heard) -> String {
    let tail = |text: &str| {
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    };
    format!("$ trainer {shown}\n--- stdout\n{}\n--- stderr\n{}", tail(&heard.stdout), tail(&heard.stderr))
}

/// A binary that has ended.
#[derive(Clone, Debug)]
pub struct Finished {
    status: ExitStatus,
    /// The events of `--json`, in order.
    pub events: Vec<Event>,
    /// All of stdout.
    pub stdout: String,
    /// All of stderr.
    pub stderr: String,
    not_json: Vec<String>,
    shown: String,
    alone: bool,
}

impl Finished {
    /// The exit code; `None`: a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }
    /// How it ended.
    pub fn status(&self) -> ExitStatus {
        self.status
    }
    /// Whether SIGKILL ended it.
    pub fn was_killed(&self) -> bool {
        use std::os::unix::process::ExitStatusExt;
        self.status.signal() == Some(Signal::KILL.as_raw())
    }
    /// Whether its descendants were still there half a minute after its end.
    pub fn left_processes(&self) -> bool {
        !self.alone
    }
    /// Lines of `--json` output that are no JSON objects.
    pub fn not_json(&self) -> &[String] {
        &self.not_json
    }
    /// Its whole output, for a failure message.
    pub fn story(&self) -> String {
        let heard = Heard { stdout: self.stdout.clone(), stderr: self.stderr.clone(), ..Heard::default() };
        format!("{}\n--- {}", story(&self.shown, &heard), self.status)
    }
    /// Demands this exit code.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code(), Some(code), "exit code\n{}", self.story());
        assert!(self.not_json.is_empty(), "stdout is data, but has {:?}\n{}", self.not_json, self.story());
        self
    }
    /// Demands that stderr contains all of these.
    #[track_caller]
    pub fn expect_said(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(part), "stderr does not say {part:?}\n{}", self.story());
        }
        self
    }
    /// Demands that a signal ended it.
    #[track_caller]
    pub fn expect_killed(self) -> Self {
        assert!(self.was_killed(), "ended by itself\n{}", self.story());
        self
    }
    /// Events of one kind.
    pub fn of_kind(&self, kind: &str) -> Vec<&Event> {
        self.events.iter().filter(|event| event.kind() == kind).collect()
    }
    /// The last event of one kind.
    #[track_caller]
    pub fn last(&self, kind: &str) -> &Event {
        self.of_kind(kind).pop().unwrap_or_else(|| panic!("no {kind} event\n{}", self.story()))
    }
    /// Steps with a `checkpoint` event.
    pub fn committed(&self) -> BTreeSet<u64> {
        self.of_kind("checkpoint").iter().filter_map(|event| event.step()).collect()
    }
    /// The step that the last `formed` event resumes from; 0 for a fresh start.
    #[track_caller]
    pub fn resumed_from(&self) -> u64 {
        self.last("formed").value["resume_step"].as_u64().unwrap_or(0)
    }
}

/// Each step's loss, digit by digit as written.
pub type Losses = BTreeMap<u64, String>;

/// The losses of several lives of a run, merged. A repeated step must have had the same loss, to the last digit.
#[track_caller]
pub fn losses(lives: &[&Finished]) -> Losses {
    let mut all = Losses::new();
    for life in lives {
        for event in life.of_kind("step") {
            let step = event.step().expect("a step event has a step");
            let text = event.number_text("loss").expect("a step event has a loss").to_owned();
            if let Some(before) = all.insert(step, text.clone()) {
                assert_eq!(before, text, "step {step} was done again with another loss\n{}", life.story());
            }
        }
    }
    all
}

/// The example of this name. `cargo test` builds examples beside its tests; one that is missing or older than `trainer`
/// is built now, because `cargo test --test integration` builds none.
pub fn example(name: &str, source: &str) -> PathBuf {
    let trainer = Path::new(env!("CARGO_BIN_EXE_trainer"));
    let folder = trainer.parent().expect("a folder of binaries");
    let program = folder.join("examples").join(name);
    let time = |path: &Path| std::fs::metadata(path).and_then(|found| found.modified()).ok();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(source);
    if time(&program) < time(trainer) || time(&program) < time(&source) {
        let mut build = Command::new(env!("CARGO"));
        build.current_dir(env!("CARGO_MANIFEST_DIR")).args(["build", "--offline", "--example", name]);
        build.arg("--target-dir").arg(folder.parent().expect("the target folder"));
        if folder.ends_with("release") {
            build.arg("--release");
        }
        let output = build.output().expect("start cargo");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    program
}

/// Reads a whole file.
#[track_caller]
pub fn read(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path);
    file.and_then(|mut file| file.read_to_end(&mut bytes)).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    bytes
}
