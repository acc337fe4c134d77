//! Commands that read, with a run of three nodes: its journal is written by the library, its heartbeats by hand.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use serde_json::Value;
use trainer::{
    config::StorageConfig,
    ids::{Generation, NodeId, NodeKey, Rank, RunId, Step, WorldSize},
    journal::{Formed, FormedReason, Gone, Journal, Record, RosterEntry, Succession},
    rendezvous::heartbeat::{Group, Heartbeat, Process, State},
    storage,
};

use crate::support::lab::{Lab, ORIGIN, Store};

/// Between two beats, and two looks at what a command has written.
const BEAT: Duration = Duration::from_millis(50);

fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

/// A lab with a run of nodes n1, n2 and n3, the second generation of [`ORIGIN`].
struct Nodes {
    lab: Lab,
    folder: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Nodes {
    fn start() -> Self {
        let lab = Lab::on_interrupted_run();
        let Store::File(store) = &lab.store else { panic!("made on files") };
        let folder = store.join(ORIGIN);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let nodes = Self { lab, folder, runtime };
        nodes.form("n1", &["n1", "n2", "n3"], Succession::default(), FormedReason::Started);
        nodes
    }

    fn journal(&self, writer: &str) -> Journal {
        let uri = format!("file://{}", self.folder.display());
        let store = storage::Store::open(&uri, &StorageConfig::plain(4, 4)).unwrap();
        self.runtime.block_on(Journal::open(store, node(writer), RunId::new(ORIGIN).unwrap())).unwrap()
    }

    /// A generation of nodes with two workers each, and the journal of its leader.
    fn form(&self, leader: &str, members: &[&str], succession: Succession, reason: FormedReason) -> Journal {
        let mut journal = self.journal(leader);
        let entry = |(index, name): (u32, &&str)| RosterEntry {
            first_rank: Some(Rank(2 * index)),
            address: Some("127.0.0.1:1".into()),
            ..RosterEntry::new(node(name), 2)
        };
        let roster: Vec<RosterEntry> = (0..).zip(members).map(entry).collect();
        let formed = Formed {
            world_size: WorldSize(2 * roster.len() as u32),
            roster,
            resume: journal.state().newest().map(|checkpoint| checkpoint.point()),
            overrides: Vec::new(),
            reason,
            data: None,
            succession,
        };
        self.runtime.block_on(journal.form(formed)).unwrap();
        journal
    }

    /// Writes a node's heartbeat; its channel listens at `address`.
    fn beat(&self, name: &str, counter: u64, address: &str, change: impl FnOnce(&mut Group)) {
        beat(&self.folder, name, counter, address, change);
    }
}

fn beat(folder: &std::path::Path, name: &str, counter: u64, address: &str, change: impl FnOnce(&mut Group)) {
    let mut group = Group {
        address: address.to_owned(),
        key: NodeKey::new("0f".repeat(32)).unwrap(),
        every_s: 30,
        state: State::Member,
        kind: "cpu".into(),
        workers: 2,
        program: String::new(),
        unreachable: Vec::new(),
        left: false,
        puts_off: None,
    };
    change(&mut group);
    let process = Process { boot_id: "elsewhere".into(), pid_namespace: "pid:[1]".into(), pid: 7, started: 9 };
    let heartbeat = Heartbeat { format: 2, node: node(name), counter, process, group: Some(group) };
    let nodes = folder.join("nodes");
    std::fs::create_dir_all(&nodes).unwrap();
    // As a store does it: nobody reads half of it.
    let (path, next) = (nodes.join(format!("{name}.json")), folder.join(format!("{name}.next")));
    std::fs::write(&next, serde_json::to_vec(&heartbeat).unwrap()).unwrap();
    std::fs::rename(next, path).unwrap();
}

/// A node that beats until this is dropped.
struct Beating(Arc<AtomicBool>, Option<JoinHandle<()>>);

impl Beating {
    fn start(nodes: &Nodes, name: &'static str) -> Self {
        let (folder, stop) = (nodes.folder.clone(), Arc::new(AtomicBool::new(false)));
        let stopped = Arc::clone(&stop);
        let beats = std::thread::spawn(move || {
            for counter in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                beat(&folder, name, counter, "127.0.0.1:1", |_| {});
                std::thread::sleep(BEAT);
            }
        });
        Self(stop, Some(beats))
    }
}

impl Drop for Beating {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        let _ = self.1.take().map(JoinHandle::join);
    }
}

fn json(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn status_shows_the_nodes_of_a_run_and_explain_their_history() {
    let nodes = Nodes::start();
    nodes.beat("n1", 3, "127.0.0.1:1", |group| {
        (group.state, group.unreachable) = (State::Leader, vec![node("n2")]);
    });
    nodes.beat("n2", 3, "127.0.0.1:1", |group| group.left = true);
    nodes.beat("n9", 3, "127.0.0.1:1", |group| group.state = State::Waiting);
    let lab = &nodes.lab;
    let status = lab.about("status", ORIGIN).finish().expect_code(0);
    for said in [
        "3, led by n1; 1 left; 1 without a heartbeat; 1 waits outside\n",
        "n1: ranks 0 to 1, leads; alive, last beat ",
        "n2: ranks 2 to 3; left ",
        "n3: ranks 4 to 5; no heartbeat\n",
        "n9: 2 workers; alive, last beat ",
    ] {
        assert!(status.stdout.contains(said), "{said:?}\n{}", status.story());
    }
    let status = lab.about("status", ORIGIN).args(&["--json"]).finish().expect_code(0);
    let group = &json(&status.stdout)[0]["group"];
    assert_eq!((&group["leader"], &group["members"][1]["sign"]), (&"n1".into(), &"left".into()), "{}", status.story());
    assert_eq!(group["outside"][0]["node"], "n9", "{}", status.story());

    let gone = vec![Gone { node: node("n1"), why: "its channel was silent".into() }];
    let succession = Succession { continues: Some(Generation(2)), gone, joined: vec![node("n9")], why: None };
    nodes.form("n2", &["n2", "n3", "n9"], succession, FormedReason::NodeLost);
    let explain = lab.about("explain", ORIGIN).finish().expect_code(0);
    for said in [
        ", 3 nodes with 6 workers, led by n2: a node was lost\n",
        "   gone       n1: its channel was silent\n   joined     n9\n",
    ] {
        assert!(explain.stdout.contains(said), "{said:?}\n{}", explain.story());
    }
    assert!(!explain.stdout.contains("USD"), "a folder costs nothing\n{}", explain.story());
    let explain = lab.about("explain", ORIGIN).args(&["--json"]).finish().expect_code(0);
    let last = json(&explain.stdout).pop().unwrap();
    assert_eq!(last["generations"].as_array().map(Vec::len), Some(3), "{}", explain.story());
    assert_eq!(last["generations"][2]["gone"][0]["node"], "n1", "{}", explain.story());
}

#[test]
fn a_run_of_one_node_is_shown_without_a_word_of_nodes() {
    let lab = Lab::on_interrupted_run();
    for command in ["status", "explain"] {
        let text = lab.about(command, ORIGIN).finish().expect_code(0);
        assert!(!text.stdout.contains("nodes"), "{}", text.story());
        let life = lab.about(command, ORIGIN).args(&["--json"]).finish().expect_code(0);
        let last = json(&life.stdout).pop().unwrap();
        for field in ["group", "generations", "requests"] {
            assert!(last.get(field).is_none(), "{field}\n{}", life.story());
        }
    }
}

#[test]
fn a_request_to_stop_follows_the_group_when_its_leader_is_lost() {
    let nodes = Nodes::start();
    // Its leader has no heartbeat any more; n2 lives, and the run goes on.
    let beating = Beating::start(&nodes, "n2");
    let drain = nodes.lab.about("drain", ORIGIN).args(&["--json"]).start();
    let asked = |generation: u32| nodes.folder.join(format!("drains/g{generation:04}.json"));
    drain.wait_until("the generation is asked", || asked(2).exists());
    let gone = vec![Gone { node: node("n1"), why: "it does not answer".into() }];
    let succession = Succession { continues: Some(Generation(2)), gone, joined: Vec::new(), why: None };
    let mut journal = nodes.form("n2", &["n2", "n3"], succession, FormedReason::NodeLost);
    drain.wait_until("the one that continues it is asked", || asked(3).exists());
    let step = journal.state().newest().unwrap().committed.step;
    let ended = Record::Interrupted {
        generation: Generation(3),
        step: Step(step.get() + 1),
        committed: Some(step),
        lost_steps: 1,
        verdict: "asked to stop".into(),
        drain: None,
        cap: None,
    };
    nodes.runtime.block_on(journal.append(ended)).unwrap();
    let life = drain.finish().expect_code(0);
    drop(beating);
    let report = json(&life.stdout).pop().unwrap();
    assert_eq!((&report["nodes"], &report["state"]), (&3.into(), &"interrupted".into()), "{}", life.story());
    assert_eq!(report["lost_steps"], 1, "{}", life.story());
    assert!(life.stderr.contains("(the whole run: 3 nodes) is asked to save and stop"), "{}", life.story());
    // Now nothing is at work.
    let again = nodes.lab.about("drain", ORIGIN).finish().expect_code(64);
    assert!(again.stderr.contains("nodes that wait go on"), "{}", again.story());
}

#[test]
fn doctor_dials_the_live_nodes() {
    let nodes = Nodes::start();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let open = listener.local_addr().unwrap().to_string();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).unwrap().to_string();
    nodes.beat("n1", 3, &open, |_| {});
    nodes.beat("n2", 3, &closed, |_| {});
    nodes.beat("n3", 3, &closed, |group| group.left = true);
    let root = nodes.lab.path("host");
    let device = root.join("sys/class/infiniband/rdmap0s6/device");
    std::fs::create_dir_all(&device).unwrap();
    std::fs::write(device.join("vendor"), "0x1d0f\n").unwrap();
    let envs = [("TRAINER_STOP_WINDOW", "1h".to_owned()), ("TRAINER_HOST_ROOT", root.display().to_string())];
    let doctor = || nodes.lab.command(&["doctor", "run.toml", "--run-id", ORIGIN]).json().envs(&envs);
    let life = doctor().finish().expect_code(0);
    let line = |check: &str| {
        let found = life.events.iter().find(|event| event.value["check"] == check);
        found.unwrap_or_else(|| panic!("no line {check}\n{}", life.story())).value.clone()
    };
    let found = line("nodes");
    assert_eq!(found["verdict"], "warn", "{}", life.story());
    assert_eq!(found["found"], format!("1 of 2 live nodes not reached: n2 at {closed} refuses"), "{}", life.story());
    assert!(found["todo"].to_string().contains("agent's log"), "{}", life.story());
    assert_eq!(line("node links")["verdict"], "ok", "{}", life.story());
    assert_eq!(line("mtu")["verdict"], "skipped", "they are on this machine\n{}", life.story());
    assert!(line("efa devices")["todo"].to_string().contains("/dev/infiniband"), "{}", life.story());
    assert_eq!(line("efa plugin")["verdict"], "warn", "{}", life.story());
    drop(listener);

    // A run of one node has no such lines.
    let lab = Lab::on_interrupted_run();
    let life = lab.command(&["doctor", "run.toml", "--run-id", ORIGIN]).json().envs(&envs).finish().expect_code(0);
    let checks: Vec<_> = life.events.iter().map(|event| event.value["check"].to_string()).collect();
    assert!(!checks.iter().any(|check| check.contains("node") || check.contains("efa")), "{checks:?}");
}
