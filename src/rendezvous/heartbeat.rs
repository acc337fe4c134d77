//! A node's heartbeat, and how another node reads it.
//!
//! Stored layout: `nodes/<node-id>.json`, overwritten by its owner alone: a counter and where the process runs. No
//! clock of another machine is trusted: a node is dead when *this* process has not seen the counter change for long
//! enough ([`PATIENCE`], [`NEAR`]) of its own monotonic time, or when it is a process of this very machine that the
//! kernel no longer knows. A beat is sent only if the [event loop](Turning) has turned since the last one: an agent
//! whose loop hangs looks dead, and is. A live node that looks dead loses its steps. A network may lose a few beats in
//! a row, so a reader waits for several of them; a failed beat is not repeated, since the next is newer. A heartbeat
//! decides only whether a node waits before it forms a generation; safety comes from the journal's fencing.
//!
//! Each beat on S3 is a paid PUT; a month of them costs as much as some gigabytes of checkpoints. There they are
//! [`INTERVAL`] apart (0.11 USD a day at 0.005 USD for 1,000; one a second would be 0.43), on disk [`NEAR_INTERVAL`].
//!
//! After a crash the object stays and its counter no longer changes. A clean exit deletes it.
//!
//! A node of a run with several nodes writes more (`group`, format 2): where its channel listens and with which key,
//! how often it beats, what it has and whom it can't reach. Its clean exit leaves the object with `left` as a
//! tombstone: a heartbeat that is missing proves nothing, since any node may have deleted it by mistake. A program
//! that reads only format 1 sees that the beat is newer, and goes by its changes. `membership.rs` judges several
//! nodes' beats, and `cost.rs` says what they cost.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};

use crate::{
    ids::{NodeId, NodeKey},
    layout,
    storage::{StorageError, Store},
};

/// Time between two beats.
pub const INTERVAL: Duration = Duration::from_secs(4);
/// The same on a store in this machine.
pub const NEAR_INTERVAL: Duration = Duration::from_secs(1);
/// The pause between two reads of another node's heartbeat.
const READ_AGAIN: Duration = Duration::from_millis(250);
/// The most nodes that are looked at together.
const LOOKS: usize = 64;
/// A counter that has not changed for this long belongs to a dead node. Several of the longest beats may fail
/// meanwhile.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// The same for a process of this machine with a store on it: there is no network in between.
pub const NEAR: Duration = Duration::from_secs(6);
/// The first limit for a beat's answer. It doubles with each consecutive failure: a line filled by a checkpoint is
/// slow, and with a limit that is always too short there would be no beat.
const SHORTEST: Duration = Duration::from_secs(2);
/// The highest limit.
const LONGEST: Duration = Duration::from_secs(8);
/// The highest layout that is read.
const FORMAT: u32 = 2;
/// The layout without `group`, which every version reads.
const ALONE: u32 = 1;
/// The longest heartbeat that is read, bytes.
pub(super) const LIMIT: u64 = 64 << 10;
/// A heartbeat that claims to come less often than this is not waited for longer.
pub(super) const MOST_SELDOM_S: u32 = 60;
/// A beat older than this many of its intervals belongs to a dead node.
pub const MISSED: u32 = 3;
/// The most nodes that a heartbeat names as out of reach: with the longest ids it stays well below [`LIMIT`].
const MOST_UNREACHABLE: usize = 256;

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
    /// Of a node of a run with several nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<Group>,
}

/// What a node of a run with several nodes says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Where its channel listens: host and port.
    pub address: String,
    /// The key by which its channel is known.
    pub key: NodeKey,
    /// Seconds between two of its beats.
    pub every_s: u32,
    /// Its part.
    pub state: State,
    /// What it computes with; see `policy::Member`.
    pub kind: String,
    /// Its workers.
    pub workers: u32,
    /// The version of its program; empty: one that did not say so.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub program: String,
    /// Nodes that it can't reach, if there are any; at most 256 are named.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unreachable: Vec<NodeId>,
    /// It has left, and this is its last beat.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub left: bool,
    /// Of a leader: why nodes that could join wait longer than until the next checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub puts_off: Option<String>,
}

/// A node's own view of its part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// In no generation: it waits to be asked.
    Waiting,
    /// A member of the newest generation.
    Member,
    /// It leads the newest generation.
    Leader,
    /// A member that lost its leader.
    CutOff,
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
        // The version comes first, since a newer layout may share nothing else with this one.
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

    /// Whether it is certainly gone: it ran under this kernel, in this namespace, and no longer exists.
    pub fn is_gone(&self) -> bool {
        let here = Self::current();
        !self.boot_id.is_empty()
            && self.boot_id == here.boot_id
            && self.pid_namespace == here.pid_namespace
            && start_time(self.pid) != Some(self.started)
    }

    /// Whether it is certainly running: this kernel knows it, in this namespace, and has not stopped it.
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
    process: Process,
    /// What the beats of a node of several say.
    group: Option<watch::Sender<Group>>,
    task: JoinHandle<()>,
}

impl Pulse {
    /// Writes the first beat, so that no other node can take this one for dead, then one every [`INTERVAL`]
    /// ([`NEAR_INTERVAL`]). A beat that is due waits until the loop behind `turning` has turned.
    pub async fn start(run: Store, node: NodeId, turning: Turning) -> Result<Self, StorageError> {
        let process = Process::current();
        run.put(&layout::heartbeat(&node), body(&node, &process, 0, None)).await?;
        let task = tokio::spawn({
            let (run, node, process) = (run.clone(), node.clone(), process.clone());
            async move { beats(&run, &node, &process, &turning, interval(run.is_local()), limit).await }
        });
        Ok(Self { run, node, process, group: None, task })
    }

    /// The same for a node of a run with several nodes, which says `group` of itself and beats as often as that says.
    pub async fn start_in_group(
        run: Store,
        node: NodeId,
        turning: Turning,
        group: Group,
    ) -> Result<Self, StorageError> {
        let process = Process::current();
        run.put(&layout::heartbeat(&node), body(&node, &process, 0, Some(&group))).await?;
        let (sender, receiver) = watch::channel(group);
        let task = tokio::spawn({
            let (run, node, process) = (run.clone(), node.clone(), process.clone());
            async move { beats_in_group(&run, &node, &process, &turning, receiver, limit).await }
        });
        Ok(Self { run, node, process, group: Some(sender), task })
    }

    /// Its voice, for another task.
    pub fn voice(&self) -> Voice {
        Voice(self.group.clone())
    }

    /// Stops beating and deletes the heartbeat: this node is gone, and no other node need wait to find out. A node of
    /// several leaves a tombstone instead.
    pub async fn stop(self) {
        self.task.abort();
        let key = layout::heartbeat(&self.node);
        let left = self.group.as_ref().map(|said| Group { left: true, ..said.borrow().clone() });
        let gone = match left {
            // No beat has this number, and whoever reads it looks at `left` alone.
            Some(left) => self.run.put(&key, body(&self.node, &self.process, u64::MAX, Some(&left))).await,
            None => self.run.delete(&key).await,
        };
        if let Err(error) = gone {
            tracing::debug!(%error, "the end of this node's heartbeat is not recorded");
        }
    }
}

/// Changes what a heartbeat says.
#[derive(Clone, Debug)]
pub struct Voice(Option<watch::Sender<Group>>);

impl Voice {
    /// Says `group` from now on; the next beat comes at once. A node alone has nothing to say.
    pub fn say(&self, group: Group) {
        if let Some(said) = &self.0 {
            said.send_if_modified(|before| {
                let changed = *before != group;
                *before = group;
                changed
            });
        }
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Beats forever; `limit` gives the limit for a beat after that many failures.
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
        beat(run, node, body(node, process, counter, None), &mut failed, &limit).await;
    }
}

/// Beats as often as the node's group says, and at once when it says something new.
async fn beats_in_group(
    run: &Store,
    node: &NodeId,
    process: &Process,
    turning: &Turning,
    mut group: watch::Receiver<Group>,
    limit: impl Fn(u32) -> Duration,
) {
    let (mut failed, mut due) = (0_u32, tokio::time::Instant::now());
    for counter in 1.. {
        // As with `interval` above: a beat is due one interval after the one before it, or at once if that took longer.
        let every = Duration::from_secs(u64::from(group.borrow().every_s.max(1)));
        tokio::select! {
            () = tokio::time::sleep_until(due + every) => {}
            said = group.changed() => if said.is_err() { return },
        }
        due = tokio::time::Instant::now();
        turning.turned().await;
        let body = body(node, process, counter, Some(&group.borrow_and_update()));
        beat(run, node, body, &mut failed, &limit).await;
    }
}

/// One beat; `failed`: how many have failed in a row.
async fn beat(run: &Store, node: &NodeId, body: Bytes, failed: &mut u32, limit: impl Fn(u32) -> Duration) {
    match run.put_once(&layout::heartbeat(node), body, limit(*failed)).await {
        Ok(()) => *failed = 0,
        Err(error) => {
            *failed = failed.saturating_add(1);
            tracing::debug!(%error, failed, "heartbeat missed");
        }
    }
}

const fn interval(local_store: bool) -> Duration {
    if local_store { NEAR_INTERVAL } else { INTERVAL }
}

fn limit(failed: u32) -> Duration {
    SHORTEST.saturating_mul(1 << failed.min(16)).min(LONGEST)
}

fn body(node: &NodeId, process: &Process, counter: u64, group: Option<&Group>) -> Bytes {
    let group = group.map(|group| Group {
        unreachable: group.unreachable.iter().take(MOST_UNREACHABLE).cloned().collect(),
        ..group.clone()
    });
    // The lowest layout that has all of it, so that an earlier version reads what it can.
    let format = if group.is_some() { FORMAT } else { ALONE };
    let heartbeat = Heartbeat { format, node: node.clone(), counter, process: process.clone(), group };
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

/// A node's heartbeat; `None`: there is none, or it is not one that this version reads.
pub async fn read(run: &Store, node: &NodeId) -> Result<Option<Heartbeat>, StorageError> {
    Ok(stored(run, node).await?.and_then(|body| Heartbeat::parse(&body).ok()))
}

/// The known state of another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// Its counter rises.
    Alive,
    /// It is gone; its last process, if it left its heartbeat behind.
    Gone(Option<Process>),
}

/// How long a counter may stay unchanged. A disk may delay the beats of a working process, since they go through the
/// same queue as all writes on this machine.
const fn patience(local_store: bool, of_this_machine: bool, at_work: bool) -> Duration {
    if local_store && of_this_machine && !at_work { NEAR } else { PATIENCE }
}

/// Whether one of `nodes` is still alive. Takes up to the longest of their patience if none is, and no longer than the
/// first sign of life otherwise.
pub async fn any_lives(run: &Store, nodes: &[&NodeId]) -> Result<bool, StorageError> {
    let looks = futures::stream::iter(nodes.iter().map(|node| look(run, node))).buffer_unordered(LOOKS);
    tokio::pin!(looks);
    while let Some(found) = looks.next().await {
        if found? == Liveness::Alive {
            return Ok(true);
        }
    }
    Ok(false)
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
    // Of an unreadable heartbeat (a newer version's, or one garbled in transfer) only changes count.
    let mut strange: Option<Bytes> = None;
    loop {
        // From here on a change of the counter can be seen: the duration of this look proves nothing.
        let watched = begin.elapsed();
        let process = first.as_ref().map(|first| &first.process);
        if process.is_some_and(Process::is_gone) {
            return Ok(Liveness::Gone(process.cloned()));
        }
        let Some(body) = stored(run, node).await? else { return Ok(Liveness::Gone(None)) };
        match (Heartbeat::parse(&body), &first) {
            (Ok(now), _) if now.group.as_ref().is_some_and(|group| group.left) => {
                return Ok(Liveness::Gone(Some(now.process)));
            }
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
        let patience = patience(here, process.is_some_and(Process::is_at_work));
        if watched >= patience.max(first.as_ref().map_or(Duration::ZERO, seldom)) {
            return Ok(Liveness::Gone(process.cloned()));
        }
        tokio::time::sleep(READ_AGAIN).await;
    }
}

/// How long the counter of a node that says how often it beats may stand still.
fn seldom(heartbeat: &Heartbeat) -> Duration {
    let every_s = heartbeat.group.as_ref().map_or(0, |group| group.every_s.min(MOST_SELDOM_S));
    MISSED * Duration::from_secs(u64::from(every_s))
}

/// Deletes the heartbeat of a dead node. One that was only asleep writes its own again.
pub async fn remove_stale(run: &Store, node: &NodeId) {
    if let Err(error) = run.delete(&layout::heartbeat(node)).await {
        tracing::debug!(%error, %node, "heartbeat of a dead node not deleted");
    }
}

/// What tests of other files use.
#[cfg(test)]
pub mod testing {
    use super::{Group, State};
    use crate::ids::NodeKey;

    /// A node that waits.
    pub fn group() -> Group {
        Group {
            address: "10.0.0.7:7077".into(),
            key: NodeKey::new("0f".repeat(32)).unwrap(),
            every_s: 30,
            state: State::Waiting,
            kind: "NVIDIA A100-SXM4-40GB".into(),
            workers: 8,
            program: String::new(),
            unreachable: Vec::new(),
            puts_off: None,
            left: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{testing::group, *};
    use crate::{
        config::StorageConfig,
        storage::faulty::{Fault, Faulty},
    };

    #[test]
    fn a_node_whose_beats_the_network_loses_is_not_taken_for_dead() {
        assert_eq!(patience(true, true, false), NEAR);
        for (local_store, of_this_machine) in [(false, false), (false, true), (true, false)] {
            assert_eq!(patience(local_store, of_this_machine, false), PATIENCE, "{local_store} {of_this_machine}");
        }
        // A stalled disk does not mean the death of a process that the kernel knows.
        assert_eq!(patience(true, true, true), PATIENCE);
        // Three beats in a row fail, and the fourth takes nearly as long.
        let limits = [0, 1, 2, 3, 1000].map(limit);
        assert_eq!(limits.map(|limit| limit.as_secs()), [2, 4, 8, 8, 8]);
        // A beat is due one interval after the one before it, or at once if that took longer.
        let pauses: Duration = limits[..3].iter().map(|limit| (*limit).max(interval(false))).sum();
        let longest = interval(false) + pauses + limits[3];
        assert!(longest < PATIENCE, "{longest:?}");
        let near = interval(true) + limits[0].max(interval(true)) + limits[1] / 2;
        assert!(near < NEAR, "{near:?}");
    }

    /// A process of another machine.
    fn elsewhere() -> Process {
        Process { boot_id: "b".into(), pid_namespace: "pid:[1]".into(), pid: 7, started: 9 }
    }

    #[test]
    fn a_node_alone_writes_what_it_always_wrote() {
        let node = NodeId::new("n1").unwrap();
        let stored = r#"{"format":1,"node":"n1","counter":3,"process":{"boot_id":"b","pid_namespace":"pid:[1]","pid":7,"started":9}}"#;
        assert_eq!(body(&node, &elsewhere(), 3, None), stored);
        let parsed = Heartbeat::parse(stored.as_bytes()).unwrap();
        assert_eq!((parsed.counter, parsed.group, parsed.process), (3, None, elsewhere()));
    }

    #[test]
    fn a_node_of_several_says_more_and_every_version_of_it_is_read() {
        let node = NodeId::new("n1").unwrap();
        let start = r#"{"format":2,"node":"n1","counter":3,"process":{"boot_id":"b","pid_namespace":"pid:[1]","pid":7,"started":9},"group":{"address":"10.0.0.7:7077","key":"0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f","every_s":30,"state":"waiting","kind":"NVIDIA A100-SXM4-40GB","workers":8"#;
        assert_eq!(body(&node, &elsewhere(), 3, Some(&group())), format!("{start}}}}}"));
        let (unreachable, program) = (vec![NodeId::new("n2").unwrap()], "0.2.0".to_owned());
        let all = Group { unreachable, program, left: true, state: State::CutOff, ..group() };
        let end = r#","program":"0.2.0","unreachable":["n2"],"left":true}}"#;
        let stored = format!("{}{end}", start.replace("waiting", "cut_off"));
        assert_eq!(body(&node, &elsewhere(), 3, Some(&all)), stored);
        assert_eq!(Heartbeat::parse(stored.as_bytes()).unwrap().group, Some(all));
        assert!(matches!(Heartbeat::parse(br#"{"format":3}"#), Err(InvalidHeartbeat::Newer(3))));
        // However many nodes are out of reach, the beat can be read.
        let longest = |at| NodeId::new(format!("{}{at:04}", "n".repeat(96))).unwrap();
        let lost = Group { unreachable: (0..1000).map(longest).collect(), ..group() };
        let stored = body(&node, &elsewhere(), 3, Some(&lost));
        assert!(stored.len() < LIMIT as usize, "{}", stored.len());
        let parsed = Heartbeat::parse(&stored).unwrap().group.unwrap();
        assert_eq!(parsed.unreachable, lost.unreachable[..MOST_UNREACHABLE]);
    }

    #[tokio::test]
    async fn a_node_of_several_leaves_a_tombstone_and_one_alone_leaves_nothing() {
        let store = Store::faulty_with(&Faulty::new(|_, _, _| Fault::Pass), &StorageConfig::plain(4, 8), None);
        let node = NodeId::new("n1").unwrap();
        let pulse = Pulse::start(store.clone(), node.clone(), Turning::default()).await.unwrap();
        assert_eq!(read(&store, &node).await.unwrap().unwrap().group, None);
        pulse.stop().await;
        assert_eq!(stored(&store, &node).await.unwrap(), None);
        let pulse = Pulse::start_in_group(store.clone(), node.clone(), Turning::default(), group()).await.unwrap();
        assert_eq!(read(&store, &node).await.unwrap().unwrap().group, Some(group()));
        pulse.stop().await;
        let tombstone = read(&store, &node).await.unwrap().unwrap();
        assert_eq!(tombstone.group, Some(Group { left: true, ..group() }));
        let gone = look_for(&store, &node, |_, _| Duration::MAX).await.unwrap();
        assert_eq!(gone, Liveness::Gone(Some(Process::current())), "nobody waits for a node that left");
    }

    #[tokio::test]
    async fn a_node_says_what_is_new_at_once_and_then_beats_as_often_as_it_says() {
        let store = Store::faulty_with(&Faulty::new(|_, _, _| Fault::Pass), &StorageConfig::plain(4, 8), None);
        let (node, turning) = (NodeId::new("n1").unwrap(), Turning::default());
        let seldom = Group { every_s: 36_000, ..group() };
        let pulse = Pulse::start_in_group(store.clone(), node.clone(), turning.clone(), seldom).await.unwrap();
        let said = async |news: &Group| {
            pulse.voice().say(news.clone());
            loop {
                let beat = read(&store, &node).await.unwrap().unwrap();
                if beat.group.as_ref() == Some(news) {
                    return beat.counter;
                }
                tokio::task::yield_now().await;
            }
        };
        let work = turning.during(async {
            assert_eq!(said(&Group { every_s: 36_000, state: State::Member, ..group() }).await, 1);
            assert_eq!(said(&Group { every_s: 1, state: State::Leader, ..group() }).await, 2);
            beats_on(&store, &node, 2).await;
        });
        tokio::time::timeout(Duration::from_secs(60), work).await.expect("no beat came through");
        let sender = pulse.group.as_ref().unwrap();
        let mut heard = sender.subscribe();
        let before = sender.borrow().clone();
        pulse.voice().say(before);
        assert!(!heard.has_changed().unwrap(), "nothing new is no reason to beat");
        pulse.voice().say(Group { left: true, ..group() });
        heard.changed().await.unwrap();
    }

    #[test]
    fn a_node_that_beats_seldom_is_waited_for_and_not_for_ever() {
        let says = |group| Heartbeat {
            format: FORMAT,
            node: NodeId::new("n1").unwrap(),
            counter: 0,
            process: elsewhere(),
            group,
        };
        assert_eq!(seldom(&says(None)), Duration::ZERO);
        assert_eq!(seldom(&says(Some(group()))), Duration::from_secs(90));
        let never = Group { every_s: u32::MAX, ..group() };
        assert_eq!(seldom(&says(Some(never))), Duration::from_secs(180));
    }

    #[tokio::test]
    async fn a_beat_that_fails_is_followed_by_a_newer_one() {
        for fault in [Fault::Hang, Fault::SlowDown, Fault::Lost] {
            // One beat hangs, is refused or is lost for good, and the next ones arrive.
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
    async fn a_group_lives_while_one_of_its_nodes_does() {
        let store = Store::faulty_with(&Faulty::new(|_, _, _| Fault::Pass), &StorageConfig::plain(4, 8), None);
        let [left, missing, alive] = ["n1", "n2", "n3"].map(|name| NodeId::new(name).unwrap());
        let tombstone = Group { left: true, ..group() };
        store.put(&layout::heartbeat(&left), body(&left, &elsewhere(), 1, Some(&tombstone))).await.unwrap();
        assert!(!any_lives(&store, &[&left, &missing]).await.unwrap());
        assert!(!any_lives(&store, &[]).await.unwrap());
        let beat = async |counter| {
            store.put(&layout::heartbeat(&alive), body(&alive, &elsewhere(), counter, None)).await.unwrap();
        };
        // Whoever looks before the first beat sees no node at all.
        beat(0).await;
        let beats = async {
            for counter in 1.. {
                tokio::time::sleep(READ_AGAIN).await;
                beat(counter).await;
            }
        };
        let all = [&left, &missing, &alive];
        tokio::select! {
            lives = any_lives(&store, &all) => assert!(lives.unwrap()),
            () = beats => {}
        }
    }

    #[tokio::test]
    async fn an_unreadable_heartbeat_does_not_mean_death() {
        let store = Store::faulty_with(&Faulty::new(|_, _, _| Fault::Pass), &StorageConfig::plain(4, 8), None);
        let (node, key) = (NodeId::new("n1").unwrap(), layout::heartbeat(&NodeId::new("n1").unwrap()));
        let elsewhere = Process { boot_id: "elsewhere".into(), ..Process::current() };
        let look = async |patience| look_for(&store, &node, |_, _| patience).await.unwrap();
        assert_eq!(look(Duration::MAX).await, Liveness::Gone(None), "there is none");
        // Garbled in transfer, and then as stored: only its counter matters.
        store.put(&key, Bytes::from_static(b"\xffgarbled")).await.unwrap();
        let beats = async {
            for counter in 0.. {
                tokio::time::sleep(READ_AGAIN).await;
                store.put(&key, body(&node, &elsewhere, counter, None)).await.unwrap();
            }
        };
        tokio::select! {
            life = look(Duration::from_secs(60)) => assert_eq!(life, Liveness::Alive),
            () = beats => {}
        }
        // It is readable, and its counter does not change.
        store.put(&key, body(&node, &elsewhere, 7, None)).await.unwrap();
        assert_eq!(look(Duration::from_millis(1)).await, Liveness::Gone(Some(elsewhere.clone())));
        // One of a newer version is alive while it changes.
        let newer = |counter| Bytes::from(format!("{{\"format\":9,\"beats\":{counter}}}"));
        store.put(&key, newer(0)).await.unwrap();
        assert_eq!(look(Duration::from_millis(1)).await, Liveness::Gone(None), "its counter does not change");
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

    /// As in the agent: the loop has its own thread, and the beats have another.
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
                    // This stands for a write to a pipe without a reader, or for a lock that is never released.
                    let _ = blocked.recv();
                    ended.await.unwrap();
                }));
            }
        });
        beats_on(&store, &node, 3).await;
        go_on.send(()).unwrap();
        is_blocked.await.unwrap();
        // One beat may be on its way, and another may follow from an earlier turn.
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
