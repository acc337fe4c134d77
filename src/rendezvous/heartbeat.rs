//! A node's heartbeat, and how another node reads it.
//!
//! Stored layout: `nodes/<node-id>.json`, overwritten by its owner alone: a counter and where the process runs. No
//! clock of another machine is trusted: a node is dead when *this* process has not seen the counter change for long
//! enough ([`PATIENCE`], [`NEAR`]) of its own monotonic time, or when it is a process of this very machine that the
//! kernel no longer knows. A beat is sent only if the [event loop](Turning) has turned since the last one: an agent
//! whose loop hangs looks dead, and is. A live node that is taken for dead loses its steps. A network may lose a few
//! beats in a row, so a reader waits for several of them; a failed beat is not repeated, since the next is newer. A
//! heartbeat decides only whether it is polite to form a generation; safety comes from the journal's fencing.
//!
//! Each beat on S3 is a paid PUT; a month of them costs as much as some gigabytes of checkpoints. There they are
//! [`INTERVAL`] apart (0.11 USD a day at 0.005 USD for 1,000; one a second would be 0.43), on disk [`NEAR_INTERVAL`].
//!
//! After a crash the object stays and its counter stands still. A clean exit deletes it.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::{sync::Notify, task::JoinHandle};

use crate::{
    ids::NodeId,
    layout,
    storage::{StorageError, Store},
};

/// Time between two beats.
pub const INTERVAL: Duration = Duration::from_secs(4);
/// The same on a store in this machine.
pub const NEAR_INTERVAL: Duration = Duration::from_secs(1);
/// The pause between two reads of another node's heartbeat.
const READ_AGAIN: Duration = Duration::from_millis(250);
/// A counter that has not changed for this long belongs to a dead node: time for several of the longest beats to fail.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// The same for a process of this machine with a store in it: there is no network between.
pub const NEAR: Duration = Duration::from_secs(6);
/// The first limit for a beat's answer; it doubles with each consecutive failure, since a line that a checkpoint fills
/// is slow, and a limit that is always too short would mean no beat at all.
const SHORTEST: Duration = Duration::from_secs(2);
/// The highest limit.
const LONGEST: Duration = Duration::from_secs(8);
/// The layout that is written, and the highest that is read.
const FORMAT: u32 = 1;
const LIMIT: u64 = 64 << 10;

/// The stored object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Version of this layout.
    pub format: u32,
    /// The node.
    pub node: NodeId,
    /// Incremented with every beat.
    pub counter: u64,
    /// Where the process runs.
    pub process: Process,
}

/// Why an object is not a heartbeat.
#[derive(Debug, thiserror::Error)]
pub enum InvalidHeartbeat {
    /// Written by a newer version of this program.
    #[error("has format {0}, and this version reads up to {FORMAT}")]
    Newer(u32),
    /// Not a heartbeat at all.
    #[error("is not a heartbeat: {0}")]
    Garbled(#[from] serde_json::Error),
}

impl Heartbeat {
    /// Reads a stored heartbeat.
    pub fn parse(body: &[u8]) -> Result<Self, InvalidHeartbeat> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        // First, since a newer layout need not resemble this one in anything else.
        let Version { format } = serde_json::from_slice(body)?;
        if format > FORMAT {
            return Err(InvalidHeartbeat::Newer(format));
        }
        Ok(serde_json::from_slice(body)?)
    }
}

/// A process, named so that only the same kernel can recognise it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// The kernel's random id of this boot.
    pub boot_id: String,
    /// The process id namespace; each container on a machine has its own.
    pub pid_namespace: String,
    /// The process id.
    pub pid: u32,
    /// Its start, in clock ticks since the boot: process ids are reused.
    pub started: u64,
}

impl Process {
    /// This process.
    pub fn current() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let pid = std::process::id();
        Self {
            boot_id: read("/proc/sys/kernel/random/boot_id"),
            pid_namespace: std::fs::read_link("/proc/self/ns/pid")
                .map_or_else(|_| String::new(), |p| p.display().to_string()),
            pid,
            started: start_time(pid).unwrap_or(0),
        }
    }

    /// Whether it ran on this machine, since its last boot.
    pub fn is_of_this_machine(&self) -> bool {
        !self.boot_id.is_empty() && self.boot_id == Self::current().boot_id
    }

    /// Whether it is surely gone: it ran under this kernel, in this namespace, and no longer exists.
    pub fn is_gone(&self) -> bool {
        let here = Self::current();
        !self.boot_id.is_empty()
            && self.boot_id == here.boot_id
            && self.pid_namespace == here.pid_namespace
            && start_time(self.pid) != Some(self.started)
    }

    /// Whether it is surely at work: this kernel knows it, in this namespace, and has not stopped it.
    fn is_at_work(&self) -> bool {
        let here = Self::current();
        self.boot_id == here.boot_id
            && self.pid_namespace == here.pid_namespace
            && start_time(self.pid) == Some(self.started)
            && !matches!(state(self.pid).as_deref(), None | Some("T" | "t"))
    }
}

/// The kernel's letter for a process's state.
fn state(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    Some(stat.rsplit_once(')')?.1.split_ascii_whitespace().next()?.to_owned())
}

/// Start of a process in clock ticks since the boot: field 22 of `/proc/<pid>/stat` (proc(5)); `None` if there is none,
/// or it is a zombie, which no longer does anything.
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    // The name in parentheses may contain anything, so count from the last one.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The interval between two turns of an idle event loop: several within the shortest time between two beats.
const TURN: Duration = Duration::from_millis(200);

/// Shows whether an event loop turns. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Turning(Arc<Notify>);

impl Turning {
    /// Runs all of an event loop's work, and shows meanwhile that the loop turns. `work` may wait for as long as it
    /// likes (a download, a store that does not answer): the same task watches the clock, so the signal stops only if
    /// `work` does not yield its thread.
    pub async fn during<T>(&self, work: impl Future<Output = T>) -> T {
        tokio::pin!(work);
        let mut turn = tokio::time::interval(TURN);
        turn.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done,
                _ = turn.tick() => self.0.notify_one(),
            }
        }
    }

    /// Waits until it has turned since the last such wait.
    async fn turned(&self) {
        self.0.notified().await;
    }
}

/// Beats until it is dropped or [`stopped`](Self::stop).
#[derive(Debug)]
pub struct Pulse {
    run: Store,
    node: NodeId,
    task: JoinHandle<()>,
}

impl Pulse {
    /// Writes the first beat, so that no other node can take this one for dead, then one every [`INTERVAL`]
    /// ([`NEAR_INTERVAL`]). A beat that is due waits until the loop behind `turning` has turned.
    pub async fn start(run: Store, node: NodeId, turning: Turning) -> Result<Self, StorageError> {
        let process = Process::current();
        run.put(&layout::heartbeat(&node), body(&node, &process, 0)).await?;
        let task = tokio::spawn({
            let (run, node) = (run.clone(), node.clone());
            async move { beats(&run, &node, &process, &turning, interval(run.is_local()), limit).await }
        });
        Ok(Self { run, node, task })
    }

    /// Stops beating and deletes the heartbeat: this node is gone, and nobody need wait to find out.
    pub async fn stop(self) {
        self.task.abort();
        if let Err(error) = self.run.delete(&layout::heartbeat(&self.node)).await {
            tracing::debug!(%error, "heartbeat not deleted");
        }
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Beats for ever; `limit` gives the limit for a beat after that many failures.
async fn beats(
    run: &Store,
    node: &NodeId,
    process: &Process,
    turning: &Turning,
    every: Duration,
    limit: impl Fn(u32) -> Duration,
) {
    let mut interval = tokio::time::interval(every);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut failed = 0_u32;
    for counter in 1.. {
        interval.tick().await;
        turning.turned().await;
        match run.put_once(&layout::heartbeat(node), body(node, process, counter), limit(failed)).await {
            Ok(()) => failed = 0,
            Err(error) => {
                failed = failed.saturating_add(1);
                tracing::debug!(%error, failed, "heartbeat missed");
            }
        }
    }
}

const fn interval(local_store: bool) -> Duration {
    if local_store { NEAR_INTERVAL } else { INTERVAL }
}

fn limit(failed: u32) -> Duration {
    SHORTEST.saturating_mul(1 << failed.min(16)).min(LONGEST)
}

fn body(node: &NodeId, process: &Process, counter: u64) -> Bytes {
    let heartbeat = Heartbeat { format: FORMAT, node: node.clone(), counter, process: process.clone() };
    // A struct of numbers and strings always becomes JSON.
    serde_json::to_vec(&heartbeat).unwrap_or_default().into()
}

/// The stored bytes of a heartbeat; `None`: there is none.
async fn stored(run: &Store, node: &NodeId) -> Result<Option<Bytes>, StorageError> {
    match run.get(&layout::heartbeat(node), LIMIT).await {
        Ok(body) => Ok(Some(body)),
        Err(StorageError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The known state of another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// Its counter rises.
    Alive,
    /// It is gone; its last process, if it left its heartbeat behind.
    Gone(Option<Process>),
}

/// How long a counter may stand still. A disk may delay a process that is at work: its beats go through the same queue
/// as all writes on this machine.
const fn patience(local_store: bool, of_this_machine: bool, at_work: bool) -> Duration {
    if local_store && of_this_machine && !at_work { NEAR } else { PATIENCE }
}

/// Checks whether `node` is still alive. Takes up to [`PATIENCE`] if it is not, less if the kernel knows.
pub async fn look(run: &Store, node: &NodeId) -> Result<Liveness, StorageError> {
    let near = run.is_local();
    look_for(run, node, |of_this_machine, at_work| patience(near, of_this_machine, at_work)).await
}

/// The same; `patience`: for a process that may be on this machine and may be seen at work.
async fn look_for(
    run: &Store,
    node: &NodeId,
    patience: impl Fn(bool, bool) -> Duration,
) -> Result<Liveness, StorageError> {
    let mut begin = tokio::time::Instant::now();
    let mut first: Option<Heartbeat> = None;
    // For an unreadable heartbeat (a newer version's, or one garbled in transfer) only its changes count.
    let mut strange: Option<Bytes> = None;
    loop {
        // From here on it is known whether the counter has changed: the duration of this look proves nothing.
        let watched = begin.elapsed();
        let process = first.as_ref().map(|first| &first.process);
        if process.is_some_and(Process::is_gone) {
            return Ok(Liveness::Gone(process.cloned()));
        }
        let Some(body) = stored(run, node).await? else { return Ok(Liveness::Gone(None)) };
        match (Heartbeat::parse(&body), &first) {
            (Ok(now), Some(first)) if now.counter != first.counter => return Ok(Liveness::Alive),
            (Ok(now), None) => {
                (first, begin) = (Some(now), tokio::time::Instant::now());
                continue;
            }
            (Err(_), _) if strange.as_ref().is_some_and(|before| *before != body) => return Ok(Liveness::Alive),
            (Err(error), None) if strange.is_none() => {
                tracing::debug!(%node, "heartbeat {error}");
                strange = Some(body);
            }
            _ => {}
        }
        let here = process.is_some_and(Process::is_of_this_machine);
        if watched >= patience(here, process.is_some_and(Process::is_at_work)) {
            return Ok(Liveness::Gone(process.cloned()));
        }
        tokio::time::sleep(READ_AGAIN).await;
    }
}

/// Deletes the heartbeat of a dead node. One that was only asleep writes its own again.
pub async fn remove_stale(run: &Store, node: &NodeId) {
    if let Err(error) = run.delete(&layout::heartbeat(node)).await {
        tracing::debug!(%error, %node, "heartbeat of a dead node not deleted");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::StorageConfig,
        storage::faulty::{Fault, Faulty},
    };

    #[test]
    fn a_node_whose_beats_the_network_swallows_is_not_taken_for_dead() {
        assert_eq!(patience(true, true, false), NEAR);
        for (local_store, of_this_machine) in [(false, false), (false, true), (true, false)] {
            assert_eq!(patience(local_store, of_this_machine, false), PATIENCE, "{local_store} {of_this_machine}");
        }
        // A disk that stalls is no death of a process that the kernel knows.
        assert_eq!(patience(true, true, true), PATIENCE);
        // Three in a row fail and the fourth takes nearly as long.
        let limits = [0, 1, 2, 3, 1000].map(limit);
        assert_eq!(limits.map(|limit| limit.as_secs()), [2, 4, 8, 8, 8]);
        // A beat is due an interval after the one before it, or at once when that took longer.
        let pauses: Duration = limits[..3].iter().map(|limit| (*limit).max(interval(false))).sum();
        let longest = interval(false) + pauses + limits[3];
        assert!(longest < PATIENCE, "{longest:?}");
        let near = interval(true) + limits[0].max(interval(true)) + limits[1] / 2;
        assert!(near < NEAR, "{near:?}");
    }

    #[tokio::test]
    async fn a_beat_that_fails_is_followed_by_a_newer_one() {
        for fault in [Fault::Hang, Fault::SlowDown, Fault::Lost] {
            // One hangs, is refused or is lost for good, and the ones after it get through.
            let faulty = Faulty::new(move |op, _, n| if op == "put" && n == 0 { fault } else { Fault::Pass });
            let store = Store::faulty_with(&faulty, &StorageConfig::plain(4, 8), Some(Duration::MAX));
            let (node, process) = (NodeId::new("n1").unwrap(), Process::current());
            let beating = tokio::spawn({
                let (store, node) = (store.clone(), node.clone());
                let (every, limit) = (Duration::from_millis(1), |_| Duration::from_millis(20));
                async move {
                    let turning = Turning::default();
                    turning.during(beats(&store, &node, &process, &turning, every, limit)).await;
                }
            });
            let seen = async {
                loop {
                    if let Some(heartbeat) = read(&store, &node).await.unwrap() {
                        return heartbeat.counter;
                    }
                    tokio::task::yield_now().await;
                }
            };
            let first = tokio::time::timeout(Duration::from_secs(60), seen).await.expect("no beat came through");
            assert!(first > 1, "{fault:?}: beat {first} was sent again");
            beating.abort();
        }
    }

    async fn read(run: &Store, node: &NodeId) -> Result<Option<Heartbeat>, StorageError> {
        Ok(stored(run, node).await?.and_then(|body| Heartbeat::parse(&body).ok()))
    }

    #[tokio::test]
    async fn a_heartbeat_that_can_not_be_read_is_no_death() {
        let store = Store::faulty_with(&Faulty::new(|_, _, _| Fault::Pass), &StorageConfig::plain(4, 8), None);
        let (node, key) = (NodeId::new("n1").unwrap(), layout::heartbeat(&NodeId::new("n1").unwrap()));
        let elsewhere = Process { boot_id: "elsewhere".into(), ..Process::current() };
        let look = async |patience| look_for(&store, &node, |_, _| patience).await.unwrap();
        assert_eq!(look(Duration::MAX).await, Liveness::Gone(None), "there is none");
        // Garbled on its way, and then as it is: its counter is what counts.
        store.put(&key, Bytes::from_static(b"\xffgarbled")).await.unwrap();
        let beats = async {
            for counter in 0.. {
                tokio::time::sleep(READ_AGAIN).await;
                store.put(&key, body(&node, &elsewhere, counter)).await.unwrap();
            }
        };
        tokio::select! {
            life = look(Duration::from_secs(60)) => assert_eq!(life, Liveness::Alive),
            () = beats => {}
        }
        // Read well, and it stands still.
        store.put(&key, body(&node, &elsewhere, 7)).await.unwrap();
        assert_eq!(look(Duration::from_millis(1)).await, Liveness::Gone(Some(elsewhere.clone())));
        // One of a newer version, which lives as long as it changes.
        let newer = |counter| Bytes::from(format!("{{\"format\":9,\"beats\":{counter}}}"));
        store.put(&key, newer(0)).await.unwrap();
        assert_eq!(look(Duration::from_millis(1)).await, Liveness::Gone(None), "it stands still");
        let beats = async {
            for counter in 1.. {
                tokio::time::sleep(READ_AGAIN).await;
                store.put(&key, newer(counter)).await.unwrap();
            }
        };
        tokio::select! {
            life = look(Duration::from_secs(60)) => assert_eq!(life, Liveness::Alive),
            () = beats => {}
        }
    }

    /// Counts beats until there are `more` of them; fails after a time that no machine needs.
    async fn beats_on(store: &Store, node: &NodeId, more: u64) -> u64 {
        let begin = read(store, node).await.unwrap().map_or(0, |heartbeat| heartbeat.counter);
        let look = async {
            loop {
                if let Some(heartbeat) = read(store, node).await.unwrap().filter(|beat| beat.counter >= begin + more) {
                    return heartbeat.counter;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), look).await.expect("no beat came through")
    }

    /// As in the agent: the loop has a thread of its own, and the beats another.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_loop_that_waits_beats_and_one_that_is_blocked_does_not() {
        let store = Store::faulty_with(&Faulty::new(|_, _, _| Fault::Pass), &StorageConfig::plain(4, 8), None);
        let (node, process, turning) = (NodeId::new("n1").unwrap(), Process::current(), Turning::default());
        let beating = tokio::spawn({
            let (store, node, turning) = (store.clone(), node.clone(), turning.clone());
            async move { beats(&store, &node, &process, &turning, Duration::from_millis(1), limit).await }
        });
        let (block, blocked) = std::sync::mpsc::channel::<()>();
        let (go_on, waits) = tokio::sync::oneshot::channel();
        let (says_blocked, is_blocked) = tokio::sync::oneshot::channel();
        let (after, ended) = tokio::sync::oneshot::channel::<()>();
        let the_loop = tokio::task::spawn_blocking({
            let (runtime, turning) = (tokio::runtime::Handle::current(), turning.clone());
            move || {
                runtime.block_on(turning.during(async {
                    waits.await.unwrap();
                    says_blocked.send(()).unwrap();
                    // What a write to a pipe that nobody reads does, or a lock that is never given back.
                    let _ = blocked.recv();
                    ended.await.unwrap();
                }));
            }
        });
        beats_on(&store, &node, 3).await;
        go_on.send(()).unwrap();
        is_blocked.await.unwrap();
        // One may be on its way, and one more be due to a turn from before.
        tokio::time::sleep(TURN).await;
        let before = read(&store, &node).await.unwrap().unwrap().counter;
        tokio::time::sleep(5 * TURN).await;
        assert!(read(&store, &node).await.unwrap().unwrap().counter <= before + 2, "it beats and its loop is blocked");
        block.send(()).unwrap();
        beats_on(&store, &node, 3).await;
        after.send(()).unwrap();
        the_loop.await.unwrap();
        beating.abort();
    }

    #[test]
    fn a_process_is_gone_only_when_this_kernel_says_so() {
        let me = Process::current();
        assert!(!me.is_gone());
        assert!(Process { started: me.started + 1, ..me.clone() }.is_gone(), "the number was given to another process");
        assert!(
            !Process { boot_id: "elsewhere".into(), started: 1, ..me.clone() }.is_gone(),
            "another machine's process"
        );
        assert!(
            !Process { pid_namespace: "pid:[1]".into(), started: 1, ..me }.is_gone(),
            "another container's process"
        );
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let sleeping = Process { pid: child.id(), started: start_time(child.id()).unwrap(), ..Process::current() };
        assert!(sleeping.is_at_work() && !sleeping.is_gone());
        assert!(!Process { boot_id: "elsewhere".into(), ..sleeping.clone() }.is_at_work());
        assert!(!Process { started: sleeping.started + 1, ..sleeping.clone() }.is_at_work());
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::STOP).unwrap();
        while sleeping.is_at_work() {
            std::thread::yield_now();
        }
        assert!(!sleeping.is_gone(), "it is only stopped");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!sleeping.is_at_work() && sleeping.is_gone());
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        let started = start_time(pid).unwrap_or(1);
        child.wait().unwrap();
        assert!(Process { pid, started, ..Process::current() }.is_gone());
    }
}
