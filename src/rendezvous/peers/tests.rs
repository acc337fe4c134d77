//! Agents on loopback, and what each hears of the others.

use futures::FutureExt;

use super::*;
use crate::rendezvous::channel::testing::{Line, PATIENT, Relay, TestLink, node, say};

/// More time than any of these takes; a test that hangs fails.
const ENOUGH: Duration = Duration::from_secs(60);

type Events = mpsc::UnboundedReceiver<PeerEvent<String>>;

struct Agent {
    me: Arc<LocalNode>,
    peers: Peers<String>,
    events: Events,
}

impl Agent {
    async fn new(name: &str) -> Self {
        Self::with(name, PATIENT).await
    }
    async fn with(name: &str, settings: LinkSettings) -> Self {
        let me = node(name);
        let (peers, events) = Peers::start(me.clone(), "127.0.0.1:0".parse().unwrap(), settings).await.unwrap();
        Self { me, peers, events }
    }
    /// Two that have read each other's objects.
    async fn two() -> (Self, Self) {
        let (a, b) = (Self::new("a").await, Self::new("b").await);
        a.meets(&b);
        b.meets(&a);
        (a, b)
    }
    fn meets(&self, other: &Self) {
        self.finds(&other.me, other.peers.address());
    }
    fn finds(&self, other: &LocalNode, address: SocketAddr) {
        self.peers.know(other.node.clone(), address, other.identity.key().clone());
    }
    fn says(&self, to: &Self, text: &str) {
        self.peers.send(&to.me.node, Generation(7), text.to_owned());
    }
    async fn next(&mut self) -> PeerEvent<String> {
        let event = timeout(ENOUGH, self.events.recv()).await;
        event.unwrap_or_else(|_| panic!("{} hears nothing", self.me.node)).expect("the events have ended")
    }
    async fn hears(&mut self, from: &LocalNode, text: &str) {
        let expected = PeerEvent::Message { from: from.node.clone(), generation: Generation(7), body: text.into() };
        assert_eq!(self.next().await, expected);
    }
    async fn loses(&mut self, node: &LocalNode) -> End {
        match self.next().await {
            PeerEvent::Lost { peer, end } if peer == node.node => end,
            other => panic!("{} is not lost: {other:?}", node.node),
        }
    }
    async fn links(&self, to: &LocalNode) -> usize {
        let (answer, reply) = oneshot::channel();
        self.peers.ask(Ask::Links(to.node.clone(), answer));
        reply.await.unwrap()
    }
    async fn has_links(&self, to: &LocalNode, count: usize) {
        let waiting = async {
            while self.links(to).await != count {
                tokio::task::yield_now().await;
            }
        };
        timeout(ENOUGH, waiting).await.expect("another number of links");
    }
    /// A link that a node opens without a table of its own.
    async fn entered_by(&self, guest: &LocalNode, address: SocketAddr) -> TestLink {
        dial(address, &self.me.as_peer(), guest, PATIENT).await.unwrap()
    }
}

async fn heard(link: &mut TestLink) -> String {
    timeout(ENOUGH, link.recv()).await.expect("nothing is heard").unwrap().body
}

/// An address at which nobody listens.
async fn nowhere() -> SocketAddr {
    tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

/// A machine that accepts connections and says nothing.
async fn mute() -> (tokio::net::TcpListener, SocketAddr) {
    let port = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = port.local_addr().unwrap();
    (port, address)
}

#[tokio::test]
async fn a_message_opens_a_link_that_both_sides_use() {
    let (mut a, mut b) = Agent::two().await;
    a.says(&b, "to");
    b.hears(&a.me, "to").await;
    b.says(&a, "fro");
    a.hears(&b.me, "fro").await;
    assert_eq!((a.links(&b.me).await, b.links(&a.me).await), (1, 1));
    // Clones are the same agent, and a node talks to itself.
    a.peers.clone().send(&a.me.node.clone(), Generation(7), "mine".into());
    let me = a.me.clone();
    a.hears(&me, "mine").await;
    assert_eq!(a.links(&me).await, 0);
}

#[tokio::test]
async fn messages_keep_their_order_over_the_dial() {
    let (a, mut b) = Agent::two().await;
    for number in 0..300 {
        a.says(&b, &number.to_string());
    }
    for number in 0..300 {
        if number < 200 {
            a.says(&b, &(300 + number).to_string());
        }
        b.hears(&a.me, &number.to_string()).await;
    }
    for number in 300..500 {
        b.hears(&a.me, &number.to_string()).await;
    }
}

/// Two agents that have dialled each other at once, through a relay each.
async fn linked_twice() -> (Agent, Agent, Relay, Relay) {
    let (mut a, mut b) = (Agent::new("a").await, Agent::new("b").await);
    let (to_a, to_b) = (Relay::to(a.peers.address()).await, Relay::to(b.peers.address()).await);
    a.finds(&b.me, to_b.address);
    b.finds(&a.me, to_a.address);
    // Neither task runs before both messages are there.
    a.says(&b, "0");
    b.says(&a, "0");
    a.has_links(&b.me, 2).await;
    b.has_links(&a.me, 2).await;
    a.hears(&b.me, "0").await;
    b.hears(&a.me, "0").await;
    (a, b, to_a, to_b)
}

#[tokio::test]
async fn two_that_dial_at_once_talk_in_order_over_both_links() {
    let (mut a, mut b, _to_a, _to_b) = linked_twice().await;
    for number in 1..=200 {
        a.says(&b, &format!("to {number}"));
        b.says(&a, &format!("fro {number}"));
    }
    for number in 1..=200 {
        a.hears(&b.me, &format!("fro {number}")).await;
        b.hears(&a.me, &format!("to {number}")).await;
    }
}

#[tokio::test]
async fn a_peer_is_lost_once_if_one_of_its_two_links_breaks() {
    for which in ["to_a", "to_b"] {
        let (mut a, mut b, to_a, to_b) = linked_twice().await;
        let relay = if which == "to_a" { &to_a } else { &to_b };
        relay.line.send(Line::Break).unwrap();
        let (here, there) = (a.me.clone(), b.me.clone());
        for (agent, other) in [(&mut a, &there), (&mut b, &here)] {
            let end = agent.loses(other).await;
            assert!(matches!(end, End::Lost(_) | End::Closed), "{which}: {end}");
        }
        // Sending begins anew, and nothing is left of what was.
        a.meets(&b);
        b.meets(&a);
        a.says(&b, "again");
        b.hears(&a.me, "again").await;
        b.says(&a, "well");
        a.hears(&b.me, "well").await;
    }
}

#[tokio::test]
async fn the_older_link_is_used_until_the_peer_says_goodbye() {
    let (mut a, guest) = (Agent::new("a").await, node("guest"));
    a.finds(&guest, nowhere().await);
    let address = a.peers.address();
    let mut first = a.entered_by(&guest, address).await;
    a.has_links(&guest, 1).await;
    let mut second = a.entered_by(&guest, address).await;
    a.has_links(&guest, 2).await;
    let tell = |text: &str| a.peers.send(&guest.node, Generation(7), text.into());
    tell("one");
    assert_eq!(heard(&mut first).await, "one");
    drop(first);
    a.has_links(&guest, 1).await;
    tell("two");
    assert_eq!(heard(&mut second).await, "two");
    say(&mut second, 7, "last").await;
    drop(second);
    a.hears(&guest, "last").await;
    assert_eq!(a.loses(&guest).await, End::Closed);
}

#[tokio::test]
async fn what_a_peer_said_comes_before_its_loss() {
    let (mut a, mut b) = Agent::two().await;
    a.says(&b, "open");
    b.hears(&a.me, "open").await;
    for number in 0..500 {
        b.says(&a, &number.to_string());
    }
    let me = b.me.clone();
    drop(b);
    for number in 0..500 {
        a.hears(&me, &number.to_string()).await;
    }
    assert_eq!(a.loses(&me).await, End::Closed);
}

#[tokio::test]
async fn the_last_words_on_the_link_that_stands_come_before_the_loss_for_the_one_that_broke() {
    let (mut a, guest) = (Agent::with("a", LinkSettings { inbox: 1, ..PATIENT }).await, node("guest"));
    a.finds(&guest, nowhere().await);
    let (breaks, stands) = (Relay::to(a.peers.address()).await, Relay::to(a.peers.address()).await);
    let _first = a.entered_by(&guest, breaks.address).await;
    a.has_links(&guest, 1).await;
    let mut second = a.entered_by(&guest, stands.address).await;
    a.has_links(&guest, 2).await;
    let text = "x".repeat(10_000);
    for _ in 0..100 {
        say(&mut second, 7, &text).await;
    }
    // All has left the guest.
    while stands.recorded.lock().unwrap().len() < 100 * text.len() {
        tokio::task::yield_now().await;
    }
    breaks.line.send(Line::Break).unwrap();
    for _ in 0..100 {
        a.hears(&guest, &text).await;
    }
    let end = a.loses(&guest).await;
    assert!(matches!(end, End::Lost(_)), "{end}");
    assert_eq!(second.recv().await.unwrap_err(), End::Closed);
}

#[tokio::test]
async fn a_new_link_does_not_wait_for_the_last_words_of_broken_ones() {
    let (mut a, guest) = (Agent::new("a").await, node("guest"));
    a.finds(&guest, nowhere().await);
    let (first, second) = (Relay::to(a.peers.address()).await, Relay::to(a.peers.address()).await);
    let _one = a.entered_by(&guest, first.address).await;
    let _two = a.entered_by(&guest, second.address).await;
    a.has_links(&guest, 2).await;
    // The goodbye on the second does not arrive.
    second.line.send(Line::Hold).unwrap();
    first.line.send(Line::Break).unwrap();
    a.has_links(&guest, 0).await;
    // Sent before the loss is heard of: lost with the rest.
    a.peers.send(&guest.node, Generation(7), "lost".into());
    let mut third = a.entered_by(&guest, a.peers.address()).await;
    say(&mut third, 7, "back").await;
    assert!(matches!(a.loses(&guest).await, End::Lost(_)));
    a.hears(&guest, "back").await;
    a.peers.send(&guest.node, Generation(7), "welcome".into());
    assert_eq!(heard(&mut third).await, "welcome");
}

#[tokio::test]
async fn a_killed_peer_is_lost_and_its_port_says_that_it_is_gone() {
    let (mut a, mut b) = (Agent::new("a").await, Agent::new("b").await);
    let relay = Relay::to(b.peers.address()).await;
    a.finds(&b.me, relay.address);
    b.meets(&a);
    a.says(&b, "last");
    b.hears(&a.me, "last").await;
    relay.line.send(Line::Break).unwrap();
    let end = a.loses(&b.me).await;
    assert!(matches!(end, End::Lost(_)) && !is_gone(&end), "{end}");

    let port = nowhere().await;
    a.finds(&b.me, port);
    a.says(&b, "are you there?");
    let end = a.loses(&b.me).await;
    assert_eq!(end, End::Refused(port));
    assert!(is_gone(&end));
    // Another process has the port now.
    let (c, d) = (Agent::new("c").await, node("d"));
    a.finds(&d, c.peers.address());
    a.peers.send(&d.node, Generation(7), "?".into());
    let end = a.loses(&d).await;
    assert_eq!(end, End::OtherKey(c.peers.address()));
    assert!(is_gone(&end));
    for end in [End::Silent, End::Closed, End::NotKnown, End::Lost(String::new()), End::Slow] {
        assert!(!is_gone(&end), "{end}");
    }
}

#[tokio::test]
async fn a_node_that_is_not_known_is_lost_at_once() {
    let (mut a, mut b) = Agent::two().await;
    assert!(a.peers.knows(&b.me.node) && a.peers.knows(&a.me.node));
    a.peers.forget(&b.me.node);
    assert!(!a.peers.knows(&b.me.node));
    a.says(&b, "who?");
    let end = a.loses(&b.me).await;
    assert!(matches!(&end, End::Unreachable { why, .. } if why == "nothing says where node b listens"), "{end}");
    // An open link outlives the entry.
    a.meets(&b);
    a.says(&b, "one");
    b.hears(&a.me, "one").await;
    a.peers.forget(&b.me.node);
    a.says(&b, "two");
    b.hears(&a.me, "two").await;
}

#[tokio::test]
async fn a_peer_that_has_not_read_this_nodes_object_yet_is_dialled_until_it_has() {
    let (mut a, mut b) = (Agent::new("a").await, Agent::new("b").await);
    a.meets(&b);
    a.says(&b, "one");
    a.says(&b, "two");
    assert_eq!(b.next().await, PeerEvent::Stranger);
    b.meets(&a);
    // Another knock may have come meanwhile.
    let mut first = b.next().await;
    while first == PeerEvent::Stranger {
        first = b.next().await;
    }
    assert_eq!(first, PeerEvent::Message { from: a.me.node.clone(), generation: Generation(7), body: "one".into() });
    b.hears(&a.me, "two").await;
    b.says(&a, "three");
    a.hears(&b.me, "three").await;
}

#[tokio::test]
async fn a_peer_that_does_not_learn_of_this_node_is_lost() {
    let hasty = LinkSettings { handshake: Duration::from_secs(2), ..PATIENT };
    let (mut a, b) = (Agent::with("a", hasty).await, Agent::new("b").await);
    a.meets(&b);
    a.says(&b, "one");
    assert_eq!(a.loses(&b.me).await, End::NotKnown);
}

#[test]
fn only_a_peer_that_may_learn_of_this_node_is_dialled_again_and_only_so_long() {
    let limit = Duration::from_secs(5);
    let spent = Duration::from_millis;
    assert!(may_learn(&End::NotKnown, spent(0), limit));
    assert!(may_learn(&End::NotKnown, spent(4699), limit));
    assert!(!may_learn(&End::NotKnown, spent(4700), limit));
    assert!(!may_learn(&End::NotKnown, Duration::MAX, limit));
    for end in [End::Silent, End::Closed, End::Refused("127.0.0.1:1".parse().unwrap())] {
        assert!(!may_learn(&end, spent(0), limit), "{end}");
    }
}

#[tokio::test]
async fn strangers_are_reported_at_most_once_a_second() {
    let mut a = Agent::new("a").await;
    let begun = Instant::now();
    for number in 0..2 {
        for _ in 0..3 {
            let refused = dial::<String, String>(a.peers.address(), &a.me.as_peer(), &node("guest"), PATIENT).await;
            assert_eq!(refused.unwrap_err(), End::NotKnown);
        }
        assert_eq!(a.next().await, PeerEvent::Stranger);
        assert!(begun.elapsed() >= number * QUIET, "{number}");
    }
}

#[tokio::test]
async fn a_peer_that_is_parted_from_is_told_and_not_lost() {
    let (mut a, mut b) = Agent::two().await;
    a.says(&b, "one");
    b.hears(&a.me, "one").await;
    a.says(&b, "two");
    a.peers.part(&b.me.node);
    b.hears(&a.me, "two").await;
    assert_eq!(b.loses(&a.me).await, End::Closed);
    // The next event is of a new link.
    b.says(&a, "back");
    a.hears(&b.me, "back").await;
    a.peers.part(&node("nobody").node);
}

#[tokio::test]
async fn what_waits_for_a_dial_is_dropped_when_its_sender_parts() {
    let (mut a, mut b) = (Agent::new("a").await, Agent::new("b").await);
    let (_port, silent) = mute().await;
    b.meets(&a);
    a.finds(&b.me, silent);
    a.says(&b, "one");
    a.peers.part(&b.me.node);
    a.meets(&b);
    a.says(&b, "two");
    b.hears(&a.me, "two").await;
    b.says(&a, "three");
    a.hears(&b.me, "three").await;
}

#[tokio::test]
async fn another_address_is_dialled_at_once_with_all_that_waits() {
    let (_port, silent) = mute().await;
    // The dial of the old address has no answer, or a bad one too late.
    for old in [silent, nowhere().await] {
        let (mut a, mut b) = (Agent::new("a").await, Agent::new("b").await);
        b.meets(&a);
        a.finds(&b.me, old);
        a.says(&b, "one");
        a.meets(&b);
        a.says(&b, "two");
        b.hears(&a.me, "one").await;
        b.hears(&a.me, "two").await;
        b.says(&a, "three");
        a.hears(&b.me, "three").await;
    }
}

#[tokio::test]
async fn a_link_that_the_peer_opens_takes_what_waits_for_a_dial() {
    let (mut a, mut b) = (Agent::new("a").await, Agent::new("b").await);
    let (_port, silent) = mute().await;
    b.meets(&a);
    a.finds(&b.me, silent);
    a.says(&b, "one");
    assert_eq!(a.links(&b.me).await, 0);
    b.says(&a, "here I am");
    a.hears(&b.me, "here I am").await;
    b.hears(&a.me, "one").await;
}

#[tokio::test]
async fn too_much_for_a_peer_that_is_being_dialled_loses_it() {
    let mut a = Agent::with("a", LinkSettings { queue: 8, ..PATIENT }).await;
    let (b, (_port, silent)) = (node("b"), mute().await);
    a.finds(&b, silent);
    for _ in 0..8 {
        a.peers.send(&b.node, Generation(7), "x".into());
    }
    assert_eq!(a.links(&b).await, 0);
    assert!(a.events.try_recv().is_err());
    a.peers.send(&b.node, Generation(7), "x".into());
    assert_eq!(a.loses(&b).await, End::Slow);
}

#[tokio::test]
async fn a_message_that_can_not_be_sent_loses_its_peer_because_it_would_be_missing() {
    let (mut a, mut b) = Agent::two().await;
    let long = "x".repeat(super::super::channel::MAX_MESSAGE);
    for open in [false, true] {
        if open {
            a.says(&b, "open");
            b.hears(&a.me, "open").await;
        }
        a.says(&b, &long);
        let end = a.loses(&b.me).await;
        assert!(matches!(&end, End::Protocol(text) if text.contains("is too long")), "{end}");
        assert_eq!(b.loses(&a.me).await, End::Closed);
    }
}

#[tokio::test]
async fn more_than_fifty_nodes_are_probed_side_by_side() {
    let mut me = Agent::new("me").await;
    let mut there = Vec::new();
    let mut missing = BTreeSet::new();
    for number in 0..13 {
        let agent = Agent::new(&format!("there-{number}")).await;
        me.meets(&agent);
        agent.meets(&me);
        // Another process at a known node's port, a port that refuses, and a name without an address.
        for (name, address) in [
            (format!("other-{number}"), Some(agent.peers.address())),
            (format!("gone-{number}"), Some(nowhere().await)),
            (format!("unknown-{number}"), None),
        ] {
            let absent = node(&name);
            if let Some(address) = address {
                me.finds(&absent, address);
            }
            missing.insert(absent.node.clone());
        }
        there.push(agent);
    }
    // One of them is linked already, through an entry that is gone since.
    me.says(&there[0], "hello");
    let to = me.me.clone();
    there[0].hears(&to, "hello").await;
    me.peers.forget(&there[0].me.node);
    let names = there.iter().map(|agent| agent.me.node.clone()).chain(missing.iter().cloned());
    let found = me.peers.unreachable(names.chain([me.me.node.clone()]).collect(), ENOUGH).await;
    assert_eq!(found, missing);
    // The links stay, and the probe was no message.
    for agent in &mut there {
        assert_eq!(me.links(&agent.me).await, 1);
        me.says(agent, "well?");
        agent.hears(&to, "well?").await;
        agent.peers.send(&to.node, Generation(7), "well".into());
        me.hears(&agent.me, "well").await;
    }
}

#[tokio::test]
async fn nodes_that_do_not_answer_in_time_are_not_reached() {
    let mut me = Agent::new("me").await;
    let mut ports = Vec::new();
    let mut silent = BTreeSet::new();
    for number in 0..10 {
        let (port, address) = mute().await;
        ports.push(port);
        let name = node(&format!("silent-{number}"));
        me.finds(&name, address);
        silent.insert(name.node.clone());
    }
    assert_eq!(me.peers.unreachable(silent.iter().cloned().collect(), Duration::from_millis(50)).await, silent);
    assert!(me.events.try_recv().is_err());
    assert!(me.peers.unreachable(vec![], Duration::MAX).await.is_empty());
}

#[tokio::test]
async fn only_so_many_nodes_are_dialled_side_by_side() {
    let me = Agent::new("me").await;
    let (port, address) = mute().await;
    let silent: Vec<_> = (0..3 * PROBES).map(|number| node(&format!("silent-{number:02}"))).collect();
    silent.iter().for_each(|node| me.finds(node, address));
    let probing = me.peers.unreachable(silent.iter().map(|it| it.node.clone()).collect(), Duration::MAX);
    // A first look at it begins all dials that may begin; they go on when it is dropped.
    assert!(probing.now_or_never().is_none());
    let mut dials = Vec::new();
    while dials.len() < PROBES {
        dials.push(port.accept().await.unwrap());
    }
    let last = tokio::net::TcpStream::connect(address).await.unwrap();
    let (_, from) = port.accept().await.unwrap();
    assert_eq!(from, last.local_addr().unwrap(), "one more dial");
}

#[tokio::test]
async fn dropping_the_last_handle_says_goodbye_to_all_and_closes_the_port() {
    let (a, mut b) = Agent::two().await;
    let mut c = Agent::new("c").await;
    a.meets(&c);
    c.meets(&a);
    a.says(&b, "one");
    a.says(&c, "one");
    b.hears(&a.me, "one").await;
    c.hears(&a.me, "one").await;
    let Agent { me, peers, mut events } = a;
    let address = peers.address();
    let again = peers.clone();
    drop(peers);
    again.send(&b.me.node, Generation(7), "still here".into());
    b.hears(&me, "still here").await;
    drop(again);
    assert_eq!(b.loses(&me).await, End::Closed);
    assert_eq!(c.loses(&me).await, End::Closed);
    assert_eq!(timeout(ENOUGH, events.recv()).await.unwrap(), None);
    // The port closes when the task that holds it has been dropped.
    loop {
        b.peers.send(&me.node, Generation(7), "gone?".into());
        match b.loses(&me).await {
            End::Refused(refused) => break assert_eq!(refused, address),
            end => assert!(matches!(end, End::Lost(_)), "{end}"),
        }
    }
}

#[tokio::test]
async fn a_port_that_is_taken_is_an_error_of_the_start() {
    let a = Agent::new("a").await;
    let again = Peers::<String>::start(node("b"), a.peers.address(), PATIENT).await;
    assert_eq!(again.unwrap_err().kind(), io::ErrorKind::AddrInUse);
}
