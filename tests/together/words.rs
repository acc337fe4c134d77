//! Nodes that do not belong: one of another version, and strangers who may write into the run's folder or have
//! recorded what was said.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
};

use serde_json::{Value, json};
use trainer::{
    ids::{Generation, NodeId},
    rendezvous::channel::{Envelope, Link, LinkSettings, LocalNode, Peer, dial},
};

use super::{
    Lab, RUN, at_once, beats, create,
    faults::{SAVED, expect_sound, hold, of_kind, pair},
    next,
};
use crate::support::{
    lab::EVERY,
    trainer::{Finished, Running},
};

#[track_caller]
fn expect_undisturbed(lab: &Lab, nodes: [Running; 2]) {
    let lives = nodes.map(|node| node.finish().expect_code(0));
    for life in &lives {
        assert_eq!(life.of_kind("formed").len(), 1, "{}", life.story());
    }
    assert_eq!(of_kind(lab, "formed").len(), 1);
    lab.expect_as_undisturbed(RUN, &[&lives[0] as &Finished]);
    expect_sound(lab);
}

/// There is room for it, and it is seen in time for two saves; it stays outside, and both sides say why.
#[test]
fn a_node_of_another_version_stays_outside() {
    let lab = Lab::on_files();
    let later = SAVED + EVERY + 2;
    let faults = format!("{},worker.step=stop@rank=0@step={later}@hit={later}", hold(0));
    let (leader, follower) = pair(&lab, "2:3", &faults);
    leader.held();
    let other = next(&lab, "2:3").faults("node.version=error").start();
    leader.wait_until_said("waits to join");
    leader.let_go();
    leader.wait_for_step("checkpoint", SAVED + EVERY);
    leader.held();
    for node in [&leader, &other] {
        node.wait_until_said("runs version");
    }
    leader.let_go();
    expect_undisturbed(&lab, [leader, follower]);
    // It may have learned by now that the run is complete.
    let other = other.power_off();
    assert!(other.of_kind("formed").is_empty(), "{}", other.story());
}

/// Two nodes are needed, and these two are not alike, so nobody leads. Each says why once, and `status` does.
#[test]
fn nodes_that_are_not_alike_say_so_before_anybody_leads() {
    for (point, said, shown) in [
        ("node.version=error", "runs version", "it runs version"),
        ("node.kind=error", "of another kind", "it computes with"),
    ] {
        let lab = Lab::on_files();
        create(lab.run(RUN));
        let nodes = at_once([next(&lab, "2"), next(&lab, "2").faults(point)]);
        for node in &nodes {
            node.wait_until_said(said);
        }
        let status = lab.about("status", RUN).args(&["--json"]).finish().expect_code(0);
        let status: Value = serde_json::from_str(&status.stdout).expect("JSON");
        let outside = status["group"]["outside"].as_array().expect("nodes").clone();
        let reasons: Vec<&str> = outside.iter().filter_map(|node| node["stays_out"].as_str()).collect();
        assert!(outside.len() == 2 && reasons.len() == 1 && reasons[0].starts_with(shown), "{outside:?}");
        for node in nodes {
            let life = node.power_off();
            assert!(life.of_kind("formed").is_empty(), "{}", life.story());
        }
    }
}

/// A node that is no member: its heartbeat is in the store, so that it is let in.
struct Guest {
    me: LocalNode,
    runtime: tokio::runtime::Runtime,
}

impl Guest {
    fn new(lab: &Lab, like: &Value) -> Self {
        let node = NodeId::random();
        let me = LocalNode::new(RUN.parse().expect("a run id"), node.clone()).expect("a key");
        let mut beat = like.clone();
        beat["node"] = json!(node.as_str());
        beat["group"]["key"] = json!(me.identity.key().as_str());
        beat["group"]["state"] = json!("waiting");
        // Nobody listens there.
        beat["group"]["address"] = json!("127.0.0.1:9");
        lab.server().write(&format!("runs/{RUN}/nodes/{node}.json"), beat.to_string());
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
        Self { me, runtime }
    }
    /// Knocks at this address until it is let in: the node reads the store when a stranger knocks.
    fn enters(&self, address: SocketAddr, peer: &Peer, node: &Running) -> Link<Value, Value> {
        let mut link = None;
        node.wait_until("a guest is let in", || {
            let dialled = self.runtime.block_on(async {
                let mut link: Link<Value, Value> = dial(address, peer, &self.me, LinkSettings::default()).await.ok()?;
                link.send(Generation(1), &json!({"seat": {"ask": {"ticket": 1}}})).ok()?;
                link.recv().await.ok()?;
                Some(link)
            });
            link = dialled;
            link.is_some()
        });
        link.expect("waited for")
    }
}

fn port_of(beat: &Value) -> (SocketAddr, Peer) {
    let address = beat["group"]["address"].as_str().expect("an address").parse().expect("an address");
    let key = serde_json::from_value(beat["group"]["key"].clone()).expect("a key");
    let node = serde_json::from_value(beat["node"].clone()).expect("an id");
    (address, Peer { node, key })
}

/// All that a member or a leader can say, by one who is neither.
fn orders(guest: &NodeId) -> Vec<Value> {
    let generation = 1;
    vec![
        json!({"to_member": {"over": {"dismisses": true, "ends_the_run": true}}}),
        json!({"to_member": "kill"}),
        json!({"to_member": "give_up_save"}),
        json!({"to_leader": {"failed": "it burns"}}),
        json!({"to_leader": {"notice": {"interruption": true, "deadline_s": 1.0, "binding": true, "source": "x"}}}),
        json!({"to_leader": {"not_fetched": {"why": "no disk"}}}),
        json!({"seat": {"over": {"generation": generation}}}),
        json!({"seat": {"bye": {"generation": generation}}}),
        json!({"seat": {"hello": {"generation": generation}}}),
        json!({"seat": {"welcome": {"generation": generation}}}),
        json!({"seat": {"formed": {"generation": 9}}}),
        json!({"seat": "release"}),
        json!({"seat": {"no": {"round": 1, "leader_lives": false, "why": "no"}}}),
        // The last, because it is answered.
        json!({"seat": {"invite": {"round": 7, "generation": 2, "asked": [guest.as_str()],
            "program": env!("CARGO_PKG_VERSION")}}}),
    ]
}

/// Copies one connection to `to`, and keeps what its client says.
fn eavesdrop(to: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let (address, heard) = (listener.local_addr().expect("an address"), Arc::<Mutex<Vec<u8>>>::default());
    let keeps = heard.clone();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(mut node) = TcpStream::connect(to) else { return };
            let (Ok(mut from_node), Ok(mut to_client)) = (node.try_clone(), client.try_clone()) else { return };
            std::thread::spawn(move || _ = std::io::copy(&mut from_node, &mut to_client));
            keeps.lock().unwrap_or_else(PoisonError::into_inner).clear();
            let (mut client, mut piece) = (client, [0; 4096]);
            while let Ok(n @ 1..) = client.read(&mut piece) {
                keeps.lock().unwrap_or_else(PoisonError::into_inner).extend(&piece[..n]);
                if node.write_all(&piece[..n]).is_err() {
                    break;
                }
            }
        }
    });
    (address, heard)
}

/// Whoever is let in and is no member can order nothing; what was said once can't be said again by another.
#[test]
fn a_guest_orders_nothing_and_a_replay_is_refused() {
    let lab = Lab::on_s3();
    let (leader, follower) = pair(&lab, "2", &hold(0));
    leader.held();
    let members = beats(&lab);
    assert_eq!(members.len(), 2);
    let guest = Guest::new(&lab, &members[0]);
    for beat in &members {
        let (address, peer) = port_of(beat);
        let (by, heard) = eavesdrop(address);
        let mut link = guest.enters(by, &peer, &leader);
        let answer: Envelope<Value> = guest.runtime.block_on(async {
            for order in orders(&guest.me.node) {
                link.send(Generation(1), &order).expect("the link stands");
            }
            loop {
                let answer = link.recv().await.expect("an answer");
                if answer.body["seat"].get("ready").is_some() || answer.body["seat"].get("no").is_some() {
                    break answer;
                }
            }
        });
        assert_eq!(answer.body["seat"]["no"]["leader_lives"], true, "{answer:?}");
        // Words that nobody knows end the link, and nothing else.
        link.send(Generation(1), &json!({"sudo": "now"})).expect("the link stands");
        guest.runtime.block_on(async { while link.recv().await.is_ok() {} });
        let said = heard.lock().unwrap_or_else(PoisonError::into_inner).clone();
        assert!(said.len() > 1000, "a handshake and all orders: {} bytes", said.len());
        let mut again = TcpStream::connect(address).expect("the port answers");
        // It may close the connection before it has read all of this.
        let _ = again.write_all(&said);
        let mut answer = Vec::new();
        let _ = again.read_to_end(&mut answer);
        assert!(answer.len() < 4096, "it says {} bytes to a recording", answer.len());
    }
    leader.let_go();
    expect_undisturbed(&lab, [leader, follower]);
}
