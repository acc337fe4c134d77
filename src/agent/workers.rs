//! The worker processes of a generation: start, talk, end, and learn that one has died.
//!
//! They may live on in the next generation ([`super::keep`]): then their ranks are others, and somebody else listens
//! ([`Workers::take_up`]). A death in between is not lost: whoever listens next hears of it.
//!
//! The workload says which program runs, with which arguments and environment. It inherits a few descriptors and
//! nothing else of ours: the control socket as its standard input, the node's snapshot slots, and the memory with
//! the weights that adapters are trained beside, if there are any. It runs in a process group of its own, so that a key
//! pressed at the terminal reaches the agent alone. It asks the kernel to be killed when its agent dies, and exits when
//! the control stream ends: children never outlive the agent. The agent starts children from its main thread only,
//! because that kill is tied to the thread that started them.

use std::{
    collections::VecDeque,
    os::{
        fd::OwnedFd,
        unix::{net::UnixStream as StdStream, process::ExitStatusExt},
    },
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use command_fds::{CommandFdExt, FdMapping};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    process::{Child, Command},
    sync::{Notify, mpsc},
    task::JoinHandle,
};

use crate::{
    error::{Error, Kind},
    ids::{LocalRank, NodeRanks, Rank, Step},
    protocol::{self, BASE_FD, FromWorker, MAX_MESSAGE, SLOT_FDS, ToWorker},
    snapshot::image::SharedImage,
    workload::{Collectives, Workload},
};

/// The most bytes kept of a line of a worker's standard error.
const LINE: usize = 16 << 10;

/// Why a process has ended that its agent has killed.
pub const KILLED: &str = "killed by its agent";

/// An event of a worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum WorkerEvent {
    /// It sent a message.
    Message(Rank, FromWorker),
    /// Its process has ended, for this reason.
    Exited(Rank, String),
}

impl WorkerEvent {
    /// The worker's rank.
    pub const fn rank(&self) -> Rank {
        match self {
            Self::Message(rank, _) | Self::Exited(rank, _) => *rank,
        }
    }
}

/// Who hears a worker, and as which rank. Its lock is held for moments only.
#[derive(Debug)]
struct Ear {
    rank: Rank,
    events: mpsc::UnboundedSender<WorkerEvent>,
    /// In this generation it has said that it has stopped after this step.
    stopped: Option<Step>,
    /// Its process has ended.
    exited: Option<String>,
}

impl Ear {
    /// Passes on what the worker says.
    fn says(&mut self, message: FromWorker) {
        if let FromWorker::Stopped { step } = &message {
            self.stopped = Some(*step);
        }
        let _ = self.events.send(WorkerEvent::Message(self.rank, message));
    }

    /// The step after which it has stopped, and lives.
    fn stopped_after(&self) -> Option<Step> {
        self.stopped.filter(|_| self.exited.is_none())
    }

    fn exits(&mut self, why: String) {
        let _ = self.events.send(WorkerEvent::Exited(self.rank, why.clone()));
        self.exited = Some(why);
    }

    /// From now on somebody else listens. A death that has come before is said again.
    fn moves(&mut self, rank: Rank, events: mpsc::UnboundedSender<WorkerEvent>) {
        (self.rank, self.events, self.stopped) = (rank, events, None);
        if let Some(why) = self.exited.clone() {
            let _ = self.events.send(WorkerEvent::Exited(rank, why));
        }
    }
}

fn hear(ear: &Mutex<Ear>) -> MutexGuard<'_, Ear> {
    ear.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Handle {
    ear: Arc<Mutex<Ear>>,
    orders: mpsc::UnboundedSender<ToWorker>,
    kill: Arc<Notify>,
    ended: JoinHandle<()>,
}

/// The worker processes of a generation. Dropping it ends them.
#[derive(Debug)]
pub struct Workers {
    handles: Vec<Handle>,
}

impl Workers {
    /// Starts this node's processes, of these ranks; their events go to `events`.
    pub fn start(
        workload: &Workload,
        collectives: &Collectives,
        ranks: NodeRanks,
        slots: &[&SharedImage],
        events: &mpsc::UnboundedSender<WorkerEvent>,
    ) -> Result<Self, Error> {
        let mut handles = Vec::with_capacity(ranks.workers as usize);
        for local in ranks.locals() {
            let rank = ranks.rank(local);
            let handle = start_one(rank, workload.command(collectives), (slots, workload.base()), events.clone())
                .map_err(|error| Error::from_source(Kind::Bug, error).context(format!("start worker {rank}")))?;
            handles.push(handle);
        }
        Ok(Self { handles })
    }

    /// Gives them other ranks, as many as they are; their events go to `events` from here on.
    pub fn take_up(&self, ranks: NodeRanks, events: &mpsc::UnboundedSender<WorkerEvent>) {
        for (handle, local) in self.handles.iter().zip(ranks.locals()) {
            hear(&handle.ear).moves(ranks.rank(local), events.clone());
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.handles.len()
    }

    /// The step after which all of them have stopped; `None`: one has not, or is gone.
    pub fn stopped_after(&self) -> Option<Step> {
        let mut steps = self.handles.iter().map(|handle| hear(&handle.ear).stopped_after());
        let first = steps.next()??;
        steps.all(|step| step == Some(first)).then_some(first)
    }

    /// Sends a message to one worker. A worker that is gone is reported as [`WorkerEvent::Exited`].
    pub fn tell(&self, worker: LocalRank, message: ToWorker) {
        if let Some(handle) = self.handles.get(worker.get() as usize) {
            let _ = handle.orders.send(message);
        }
    }

    /// Sends a message to every worker.
    pub fn tell_all(&self, message: &ToWorker) {
        for handle in &self.handles {
            let _ = handle.orders.send(message.clone());
        }
    }

    /// Kills every worker and waits until all are gone.
    pub async fn kill(self) {
        for handle in &self.handles {
            handle.kill.notify_one();
        }
        for handle in self.handles {
            let _ = handle.ended.await;
        }
    }

    /// Asks every worker to exit, and kills those that have not after `grace`.
    pub async fn dismiss(mut self, grace: Duration) {
        self.tell_all(&ToWorker::Exit);
        let everyone = async {
            for handle in &mut self.handles {
                let _ = (&mut handle.ended).await;
            }
        };
        if tokio::time::timeout(grace, everyone).await.is_err() {
            for handle in &self.handles {
                handle.kill.notify_one();
            }
            for handle in self.handles.into_iter().filter(|handle| !handle.ended.is_finished()) {
                let _ = handle.ended.await;
            }
        }
    }
}

fn start_one(
    rank: Rank,
    mut command: std::process::Command,
    (slots, base): (&[&SharedImage], Option<&SharedImage>),
    events: mpsc::UnboundedSender<WorkerEvent>,
) -> std::io::Result<Handle> {
    let (ours, theirs) = StdStream::pair()?;
    ours.set_nonblocking(true)?;
    let mut mappings = Vec::with_capacity(slots.len() + 1);
    let images = slots.iter().copied().zip(SLOT_FDS).chain(base.map(|base| (base, BASE_FD)));
    for (image, child_fd) in images {
        mappings.push(FdMapping { parent_fd: image.try_clone()?.into(), child_fd });
    }

    command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null()).stderr(Stdio::piped());
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    command
        .fd_mappings(mappings)
        .map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidInput, error.to_string()))?;
    let mut child = Command::from(command).kill_on_drop(true).spawn()?;

    let (mut from_worker, mut to_worker) = UnixStream::from_std(ours)?.into_split();
    let (orders, mut queue) = mpsc::unbounded_channel::<ToWorker>();
    tokio::spawn(async move {
        let mut buffer = Vec::new();
        while let Some(message) = queue.recv().await {
            let mut wire = Vec::new();
            if protocol::write_message(&mut wire, &message, &mut buffer).is_err()
                || to_worker.write_all(&wire).await.is_err()
            {
                return;
            }
        }
    });

    let ear = Arc::new(Mutex::new(Ear { rank, events, stopped: None, exited: None }));
    let last_words = Arc::new(Mutex::new(VecDeque::new()));
    let listening = tokio::spawn({
        let stderr = child.stderr.take();
        let (last_words, ear) = (Arc::clone(&last_words), Arc::clone(&ear));
        async move {
            let Some(stderr) = stderr else { return };
            let mut reader = BufReader::new(stderr);
            while let Ok(Some(line)) = read_line(&mut reader).await {
                let rank = hear(&ear).rank;
                tracing::info!(target: "trainer::worker", rank = rank.get(), "{line}");
                let mut words = last_words.lock().unwrap_or_else(PoisonError::into_inner);
                if words.len() == 3 {
                    words.pop_front();
                }
                words.push_back(line);
            }
        }
    });

    let kill = Arc::new(Notify::new());
    let ended = tokio::spawn({
        let (kill, ear) = (Arc::clone(&kill), Arc::clone(&ear));
        async move {
            // Between two generations nobody listens, and what is said then is nobody's.
            let reading = async {
                while let Some(message) = read_message(&mut from_worker).await {
                    hear(&ear).says(message);
                }
            };
            let ((status, is_ours), ()) = tokio::join!(wait(&mut child, &kill), reading);
            // A grandchild that holds stderr open must not hold us up.
            let _ = tokio::time::timeout(Duration::from_millis(200), listening).await;
            let words = last_words.lock().unwrap_or_else(PoisonError::into_inner).make_contiguous().join(" | ");
            let why = if is_ours { KILLED.to_owned() } else { reason(status, &words) };
            hear(&ear).exits(why);
        }
    });
    Ok(Handle { ear, orders, kill, ended })
}

/// One line of a stream, without its end: bytes that are not text are shown as such, and of a line that does not end at
/// most [`LINE`] bytes are kept. `None`: the stream has ended.
async fn read_line(from: &mut (impl AsyncBufRead + Unpin)) -> std::io::Result<Option<String>> {
    let (mut line, mut len, mut ended) = (Vec::new(), 0_usize, false);
    while !ended {
        let part = from.fill_buf().await?;
        if part.is_empty() {
            if len == 0 {
                return Ok(None);
            }
            break;
        }
        let end = part.iter().position(|byte| *byte == b'\n');
        let text = part.get(..end.unwrap_or(part.len())).unwrap_or_default();
        line.extend(text.iter().take(LINE - line.len()));
        len += text.len();
        let used = text.len() + usize::from(end.is_some());
        ended = end.is_some();
        from.consume(used);
    }
    let cut = len - line.len();
    let mut text = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
    if cut > 0 {
        text.push_str(&format!(" ... ({cut} more bytes)"));
    }
    Ok(Some(text))
}

/// Waits for the end of a process, and kills it when told to; with its status, whether that is what ended it. One that
/// was dead or dying before ended by itself, although its agent did not know it yet.
async fn wait(child: &mut Child, kill: &Notify) -> (std::io::Result<ExitStatus>, bool) {
    tokio::select! {
        status = child.wait() => return (status, false),
        () = kill.notified() => {}
    }
    let is_late = child.id().is_none_or(is_exiting);
    let _ = child.start_kill();
    let status = child.wait().await;
    let is_ours = !is_late && status.as_ref().is_ok_and(|status| status.signal() == Some(9));
    (status, is_ours)
}

/// Whether a process has begun to end. Its connections close after that, and only then can it be waited for: a peer may
/// say first that it is gone. The kernel's flags of its first thread say so (proc_pid_stat(5), `PF_EXITING`).
fn is_exiting(pid: u32) -> bool {
    const PF_EXITING: u64 = 0x4;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Behind the name, which may have any character: state, parent, group, session, terminal, its group, flags.
    let flags = stat.rsplit_once(')').and_then(|(_, fields)| fields.split_whitespace().nth(6)?.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & PF_EXITING != 0)
}

async fn read_message(from: &mut (impl AsyncReadExt + Unpin)) -> Option<FromWorker> {
    let len = from.read_u32_le().await.ok().filter(|&len| len <= MAX_MESSAGE)?;
    // Memory is allocated as bytes arrive, not on the word of a four-byte length.
    let mut body = Vec::new();
    if (&mut *from).take(len.into()).read_to_end(&mut body).await.ok()? != len as usize {
        return None;
    }
    match serde_json::from_slice(&body) {
        Ok(message) => Some(message),
        Err(error) => {
            tracing::error!(%error, "worker sent a message that can't be read");
            None
        }
    }
}

fn reason(status: std::io::Result<ExitStatus>, words: &str) -> String {
    let mut reason = match status {
        Err(error) => format!("exit status unknown: {error}"),
        Ok(status) => match (status.code(), status.signal()) {
            (_, Some(9)) => "killed by SIGKILL (possibly by the OOM killer)".to_owned(),
            (_, Some(signal)) => format!("killed by signal {signal}"),
            (Some(code), _) => format!("left with exit code {code}"),
            (None, None) => "left".to_owned(),
        },
    };
    if !words.is_empty() {
        reason.push_str("; its last words: ");
        reason.extend(words.chars().take(600));
    }
    reason
}

#[cfg(test)]
impl Workers {
    /// One process that does nothing, of rank 0, which has stopped after this step.
    pub fn stopped(step: Step, events: &mpsc::UnboundedSender<WorkerEvent>) -> Self {
        let mut command = std::process::Command::new("sleep");
        command.arg("600");
        let handle = start_one(Rank(0), command, (&[], None), events.clone()).expect("a process");
        hear(&handle.ear).stopped = Some(step);
        Self { handles: vec![handle] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its peers' words may reach the agent before the end of the process does, and then the agent kills all.
    #[tokio::test]
    async fn a_process_that_died_before_it_was_killed_ended_by_itself() {
        let start = |script: &str| Command::new("sh").args(["-c", script]).spawn().unwrap();
        for signal in ["KILL", "SEGV"] {
            for _ in 0..8 {
                let (mut child, kill) = (start(&format!("kill -{signal} $$")), Notify::new());
                let pid = rustix::process::Pid::from_raw(child.id().unwrap() as i32).unwrap();
                let dead = rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT;
                rustix::process::waitid(rustix::process::WaitId::Pid(pid), dead).unwrap();
                kill.notify_one();
                let (status, is_ours) = wait(&mut child, &kill).await;
                assert!(!is_ours && status.unwrap().signal().is_some(), "{signal}");
            }
        }
        // Not one that reads its input: where that is empty, it may end before it is killed.
        let (mut child, kill) = (start("exec sleep 600"), Notify::new());
        kill.notify_one();
        assert!(wait(&mut child, &kill).await.1, "it would have lived on");
    }

    fn shell(script: &str, events: &mpsc::UnboundedSender<WorkerEvent>) -> Workers {
        let mut command = std::process::Command::new("sh");
        command.args(["-c", script]);
        Workers { handles: vec![start_one(Rank(3), command, (&[], None), events.clone()).unwrap()] }
    }

    /// Whoever listens in the next generation hears of a death that came when nobody listened.
    #[tokio::test]
    async fn a_worker_that_is_taken_up_speaks_with_its_new_rank_and_its_death_is_not_lost() {
        let ranks = NodeRanks { first: Rank(7), workers: 1, world: crate::ids::WorldSize(9) };
        for dies_before in [true, false] {
            let (to, mut before) = mpsc::unbounded_channel();
            let mut workers = shell("head -c 1 >/dev/null; exit 5", &to);
            drop(to);
            let ends = |workers: &Workers| workers.tell(LocalRank(0), ToWorker::Proceed { step: Step(1) });
            if dies_before {
                ends(&workers);
                (&mut workers.handles[0].ended).await.unwrap();
                let event = before.recv().await;
                assert!(
                    matches!(&event, Some(WorkerEvent::Exited(Rank(3), why)) if why.contains("code 5")),
                    "{event:?}"
                );
            }
            let (to, mut after) = mpsc::unbounded_channel();
            workers.take_up(ranks, &to);
            assert!(before.recv().await.is_none(), "nothing more is said there");
            if !dies_before {
                ends(&workers);
            }
            let event = after.recv().await;
            assert!(matches!(&event, Some(WorkerEvent::Exited(Rank(7), why)) if why.contains("code 5")), "{event:?}");
            assert_eq!(workers.stopped_after(), None, "it is gone");
        }
    }

    #[test]
    fn workers_have_stopped_when_all_of_them_have_said_so_in_this_generation() {
        let (to, _heard) = mpsc::unbounded_channel();
        let mut ear = Ear { rank: Rank(0), events: to.clone(), stopped: None, exited: None };
        assert_eq!(ear.stopped_after(), None);
        ear.says(FromWorker::Stopped { step: Step(4) });
        assert_eq!(ear.stopped_after(), Some(Step(4)));
        ear.moves(Rank(1), to);
        assert_eq!(ear.stopped_after(), None, "that was another generation");
        ear.says(FromWorker::Stopped { step: Step(9) });
        ear.exits("killed".into());
        assert_eq!(ear.stopped_after(), None);
    }

    #[tokio::test]
    async fn lines_that_are_no_text_or_do_not_end_are_read_on() {
        let endless = "x".repeat(5 * LINE + 7);
        let said = [b"first\r\n\xff\xfe broken \xc3\n\n".as_slice(), endless.as_bytes(), b"\nlast"].concat();
        let mut reader = BufReader::with_capacity(100, said.as_slice());
        let mut lines = Vec::new();
        while let Some(line) = read_line(&mut reader).await.unwrap() {
            lines.push(line);
        }
        let cut = format!("{} ... ({} more bytes)", "x".repeat(LINE), 4 * LINE + 7);
        assert_eq!(lines, ["first", "\u{fffd}\u{fffd} broken \u{fffd}", "", cut.as_str(), "last"]);
    }
}
