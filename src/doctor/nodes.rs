//! The nodes of a run of several, seen from this machine: which of them can be dialled, and whom they can't reach
//! themselves. A dial is a bare TCP connection, which is closed at once: nobody here has a key that they know.

use std::{io, net::SocketAddr, time::Duration};

use futures::StreamExt;
use jiff::Timestamp;
use tokio::net::{TcpStream, lookup_host};

use super::{LIMIT, fabric, verdict::Line};
use crate::{
    error::{Error, Kind},
    ids::NodeId,
    journal::RunState,
    rendezvous::overview::{NodeView, Overview, Sighting, Sign, overview, sightings},
    report::human,
    storage::Store,
};

const CHECK: &str = "nodes";
const LINKS: &str = "node links";
/// The limit for one dial, its look-up included. A connection within a region takes milliseconds.
const DIAL: Duration = Duration::from_secs(4);
/// The most dials at once.
const DIALS: usize = 128;
/// The most nodes that are dialled.
const DIALLED: usize = 512;
/// The most nodes that one line names.
const NAMED: usize = 8;
/// What lets the nodes of a run talk.
const OPEN: &str = "let the nodes' security group allow all traffic from and to itself, inbound and outbound by the \
                    group's id, and see that no network ACL, firewall or NetworkPolicy drops TCP between them";

/// The lines about the nodes of a run of several, whose folder is `run`; none for a run of one node.
pub(super) async fn look(run: &Store, state: &RunState) -> Vec<Line> {
    let Some(formed) = state.formed().filter(|formed| formed.is_of_several()) else { return Vec::new() };
    let seen = match tokio::time::timeout(LIMIT, sightings(run)).await {
        Ok(Ok(seen)) => seen,
        Ok(Err(error)) => return vec![Line::error(CHECK, &Error::from(error))],
        Err(_) => {
            let found = format!("no heartbeat can be read within {} s", LIMIT.as_secs());
            return vec![Line::fail(CHECK, Kind::Unavailable, found, "check the network, proxies and endpoints")];
        }
    };
    let Some(nodes) = overview(Some(formed), &seen, Timestamp::now(), true) else { return Vec::new() };
    let dialled = futures::stream::iter(targets(&nodes)).map(|(node, address)| async move {
        let found = tokio::time::timeout(DIAL, dial(address)).await;
        Dialled { node, address, found: found.unwrap_or(Answer::Silent) }
    });
    let dialled: Vec<Dialled<'_>> = dialled.buffered(DIALS).collect().await;
    let here = seen.iter().any(is_here);
    let mut lines = vec![reach(&dialled, here), links(&nodes)];
    let toward = dialled.iter().find_map(|dialled| dialled.address.parse::<SocketAddr>().ok());
    lines.extend(fabric::look(toward.map(|address| address.ip())));
    lines
}

/// Whether the node is a process of this machine.
fn is_here(sighting: &Sighting) -> bool {
    sighting.heartbeat.as_ref().is_some_and(|heartbeat| heartbeat.process.is_of_this_machine())
}

/// The live nodes, and where their channels listen.
fn targets<'a>(nodes: &Overview<'a>) -> Vec<(&'a NodeId, &'a str)> {
    let all = nodes.members.iter().chain(&nodes.outside).filter(|view| view.sign == Sign::Alive);
    all.filter_map(|view| Some((view.node, view.address?))).take(DIALLED).collect()
}

/// The answer to a dial.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Answer {
    Reached,
    /// The machine is there, and nothing listens.
    Refused,
    /// No answer in time.
    Silent,
    /// There is no way to the address, or no such name.
    NoWay(String),
}

/// One dial.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Dialled<'a> {
    node: &'a NodeId,
    address: &'a str,
    found: Answer,
}

async fn dial(address: &str) -> Answer {
    let mut answer = Answer::NoWay("it has no address".to_owned());
    let addresses = match lookup_host(address).await {
        Ok(addresses) => addresses,
        Err(error) => return Answer::NoWay(error.to_string()),
    };
    for address in addresses {
        answer = match TcpStream::connect(address).await {
            Ok(_) => return Answer::Reached,
            Err(error) => failed(&error),
        };
    }
    answer
}

/// What a failed connect means.
fn failed(error: &io::Error) -> Answer {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Answer::Refused,
        io::ErrorKind::TimedOut => Answer::Silent,
        _ => Answer::NoWay(error.to_string()),
    }
}

/// Whether this machine reaches the live nodes. `here`: one of them runs on it; elsewhere silence is what a closed
/// network should answer.
fn reach(dialled: &[Dialled<'_>], here: bool) -> Line {
    let failed: Vec<&Dialled<'_>> = dialled.iter().filter(|dialled| dialled.found != Answer::Reached).collect();
    let count = human::plural(dialled.len() as u64, "live node");
    if dialled.is_empty() {
        return Line::skipped(CHECK, "no node of the run lives, by its heartbeats");
    }
    if failed.is_empty() {
        return Line::ok(CHECK, format!("{count} reached by TCP at the address in each heartbeat"));
    }
    let told = |dialled: &Dialled<'_>| {
        let Dialled { node, address, found } = dialled;
        match found {
            Answer::Reached => format!("{node} at {address} is reached"),
            Answer::Refused => format!("{node} at {address} refuses"),
            Answer::Silent => format!("{node} at {address} is silent"),
            Answer::NoWay(why) => format!("{node} at {address} can't be dialled: {why}"),
        }
    };
    let some: Vec<String> = failed.iter().take(NAMED).map(|dialled| told(dialled)).collect();
    let more = failed.len().saturating_sub(NAMED);
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    let found = format!("{} of {count} not reached: {}{more}", failed.len(), some.join("; "));
    let is = |wanted: fn(&Answer) -> bool| failed.iter().any(|dialled| wanted(&dialled.found));
    let mut todo = Vec::new();
    if is(|found| matches!(found, Answer::Silent | Answer::NoWay(_))) {
        todo.push(OPEN);
        if !here {
            todo.push("run doctor on a machine of the run, since others may well be kept out");
        }
    }
    if is(|found| matches!(found, Answer::NoWay(_))) {
        todo.push("see that network.address is an address which the other nodes have a route to");
    }
    if is(|found| *found == Answer::Refused) {
        todo.push("where a node refuses, see its agent's log: the machine is up, and nothing listens there");
    }
    let todo = todo.join("; ");
    if here { Line::fail(CHECK, Kind::Unavailable, found, todo) } else { Line::warn(CHECK, found, todo) }
}

/// The links that the nodes themselves miss.
fn links(nodes: &Overview<'_>) -> Line {
    let all = || nodes.members.iter().chain(&nodes.outside);
    if all().all(|view| view.says.is_none()) {
        return Line::skipped(LINKS, "no heartbeat says whom its node can't reach");
    }
    let missed: Vec<&NodeView<'_>> = all().filter(|view| !view.out_of_reach_of.is_empty()).collect();
    if missed.is_empty() {
        return Line::ok(LINKS, "no live node names another one that it can't reach");
    }
    let names = |view: &NodeView<'_>| {
        let others: Vec<&str> = view.out_of_reach_of.iter().take(NAMED).map(|node| node.as_str()).collect();
        let more = if view.out_of_reach_of.len() > NAMED { " and others" } else { "" };
        format!("{} is out of reach of {}{more}", view.node, others.join(", "))
    };
    let told: Vec<String> = missed.iter().take(NAMED).map(|view| names(view)).collect();
    Line::warn(LINKS, told.join("; "), OPEN)
}

#[cfg(test)]
mod tests {
    use super::{
        super::testing::{FAIL, OK, SKIPPED, WARN, is},
        *,
    };
    use crate::rendezvous::overview::testing::sighting;

    fn id(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    #[test]
    fn silence_points_to_the_security_group_and_a_refusal_to_the_agent() {
        let (a, b) = (id("a"), id("b"));
        let line = |found: Answer, here| {
            let reached = Dialled { node: &a, address: "10.0.0.1:7077", found: Answer::Reached };
            reach(&[reached, Dialled { node: &b, address: "10.0.0.2:7077", found }], here)
        };
        assert_eq!(is(&reach(&[], true)), SKIPPED);
        let good = line(Answer::Reached, true);
        assert_eq!((is(&good), good.found.starts_with("2 live nodes reached")), (OK, true), "{}", good.found);
        let silent = line(Answer::Silent, true);
        assert_eq!(is(&silent), FAIL);
        assert_eq!(silent.kind, Some(Kind::Unavailable));
        assert_eq!(silent.found, "1 of 2 live nodes not reached: b at 10.0.0.2:7077 is silent");
        let advice = |line: &Line| line.todo.clone().unwrap_or_default();
        assert!(advice(&silent).contains("security group") && !advice(&silent).contains("on a machine of the run"));
        let outside = line(Answer::Silent, false);
        assert_eq!(is(&outside), WARN, "a closed network is as it should be");
        assert!(advice(&outside).contains("on a machine of the run"), "{}", advice(&outside));
        let refused = line(Answer::Refused, false);
        assert!(advice(&refused).contains("agent's log") && !advice(&refused).contains("security group"));
        assert!(refused.found.contains("b at 10.0.0.2:7077 refuses"), "{}", refused.found);
        let no_way = line(Answer::NoWay("no route to host".into()), true);
        assert!(advice(&no_way).contains("network.address") && no_way.found.contains("no route to host"));
        let many = vec![Dialled { node: &a, address: "x:1", found: Answer::Silent }; NAMED + 2];
        assert!(reach(&many, true).found.ends_with("; and 2 more"), "{}", reach(&many, true).found);
    }

    #[test]
    fn a_failed_connect_is_a_refusal_silence_or_no_way() {
        let of = |kind: io::ErrorKind| failed(&kind.into());
        assert_eq!(of(io::ErrorKind::ConnectionRefused), Answer::Refused);
        assert_eq!(of(io::ErrorKind::TimedOut), Answer::Silent);
        assert!(matches!(of(io::ErrorKind::HostUnreachable), Answer::NoWay(_)));
    }

    #[tokio::test]
    async fn a_listener_is_reached_and_a_closed_port_refuses() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        assert_eq!(dial(&address).await, Answer::Reached);
        drop(listener);
        assert_eq!(dial(&address).await, Answer::Refused);
        for bad in ["", "no port", "no-such-host.invalid:1"] {
            assert!(matches!(dial(bad).await, Answer::NoWay(_)), "{bad:?}");
        }
    }

    #[test]
    fn live_nodes_are_dialled_and_links_that_they_miss_are_told() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let healthy = [sighting("a", 1000, |_| {}), sighting("b", 1000, |_| {})];
        let nodes = overview(None, &healthy, at(1000), true).unwrap();
        assert_eq!(is(&links(&nodes)), OK);
        assert_eq!(targets(&nodes), [(&id("a"), "10.0.0.7:7077"), (&id("b"), "10.0.0.7:7077")]);
        assert!(!is_here(&healthy[0]), "its kernel is another one");
        let cut = [sighting("a", 1000, |group| group.unreachable = vec![id("b")]), sighting("b", 100, |_| {})];
        let nodes = overview(None, &cut, at(1000), true).unwrap();
        let line = links(&nodes);
        assert_eq!((is(&line), line.found.as_str()), (WARN, "b is out of reach of a"));
        assert_eq!(targets(&nodes).len(), 1, "a silent node is not dialled");
        let unread = Overview { generation: None, leader: None, members: Vec::new(), outside: Vec::new() };
        assert_eq!(is(&links(&unread)), SKIPPED);
    }
}
