//! The nodes of a run of several, as lines for people.

use jiff::Timestamp;

use crate::{
    rendezvous::{
        heartbeat::State,
        overview::{NodeView, Overview, Sign},
    },
    report::human,
};

/// The most nodes that are listed one by one; of more than these only the leader and those in trouble are.
const SHOWN: usize = 32;

/// Lines of a name and a text: a summary, the members, the nodes that wait.
pub(super) fn lines(nodes: &Overview<'_>, now: Timestamp) -> Vec<(&'static str, String)> {
    let mut lines = vec![("nodes", summary(nodes))];
    let some: Vec<&NodeView<'_>> = match nodes.members.len() {
        ..=SHOWN => nodes.members.iter().collect(),
        _ => nodes.members.iter().filter(|view| is_worth_a_line(view, nodes)).take(SHOWN).collect(),
    };
    lines.extend(some.iter().map(|view| ("node", member(view, nodes, now))));
    let more = nodes.members.len() - some.len();
    if more > 0 {
        lines.push(("node", format!("{more} more; --json lists them all")));
    }
    lines.extend(waiting(nodes).take(SHOWN).map(|view| {
        let NodeView { node, workers, stays_out, waits, .. } = view;
        let mut text = format!("{node}: {}; {}", human::plural((*workers).into(), "worker"), life(view, now));
        if let Some(why) = stays_out {
            text.push_str(&format!("; {why}"));
        }
        if let Some(why) = waits {
            text.push_str(&format!("; it joins later: {}", human::plain(why)));
        }
        ("waiting", text)
    }));
    lines
}

fn is_worth_a_line(view: &NodeView<'_>, nodes: &Overview<'_>) -> bool {
    Some(view.node) == nodes.leader || view.sign != Sign::Alive || !view.out_of_reach_of.is_empty()
}

/// The live nodes outside of the newest generation.
fn waiting<'v>(nodes: &'v Overview<'_>) -> impl Iterator<Item = &'v NodeView<'v>> {
    nodes.outside.iter().filter(|view| view.sign == Sign::Alive)
}

/// `3, led by n1; 1 silent; 1 waits outside`.
fn summary(nodes: &Overview<'_>) -> String {
    let mut text = match nodes.leader {
        Some(leader) => format!("{}, led by {leader}", nodes.members.len()),
        None => "none has formed a generation yet".to_owned(),
    };
    for (sign, word) in [(Sign::Silent, "silent"), (Sign::Left, "left"), (Sign::Missing, "without a heartbeat")] {
        match nodes.members.iter().filter(|view| view.sign == sign).count() {
            0 => {}
            count => text.push_str(&format!("; {count} {word}")),
        }
    }
    match waiting(nodes).count() {
        0 => {}
        1 => text.push_str("; 1 waits outside"),
        count => text.push_str(&format!("; {count} wait outside")),
    }
    text
}

/// `n1: ranks 0 to 3, leads; alive, last beat 2 s ago; out of reach of n2`.
fn member(view: &NodeView<'_>, nodes: &Overview<'_>, now: Timestamp) -> String {
    let ranks = match view.first_rank.map(|first| u64::from(first.get())) {
        None => "a spare without workers".to_owned(),
        Some(first) if view.workers == 1 => format!("rank {first}"),
        Some(first) => format!("ranks {first} to {}", first + u64::from(view.workers) - 1),
    };
    let leads = if Some(view.node) == nodes.leader { ", leads" } else { "" };
    format!("{}: {ranks}{leads}; {}", view.node, life(view, now))
}

fn life(view: &NodeView<'_>, now: Timestamp) -> String {
    let when = view.beat_at.map(|at| human::ago(at, now)).unwrap_or_default();
    let mut text = match view.sign {
        Sign::Alive => format!("alive, last beat {when}"),
        Sign::Silent => format!("silent, last beat {when}"),
        Sign::Left => format!("left {when}"),
        Sign::Missing => "no heartbeat".to_owned(),
    };
    if view.sign == Sign::Alive && view.says == Some(State::CutOff) {
        text.push_str("; has lost its leader");
    }
    if let Some((first, others)) = view.out_of_reach_of.split_first() {
        let more = if others.is_empty() { String::new() } else { format!(" and {} more", others.len()) };
        text.push_str(&format!("; out of reach of {first}{more}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Generation, NodeId, Rank};

    fn view(node: &NodeId) -> NodeView<'_> {
        NodeView {
            node,
            workers: 1,
            first_rank: Some(Rank(0)),
            sign: Sign::Alive,
            beat_at: Some(Timestamp::from_second(1000).unwrap()),
            says: Some(State::Member),
            kind: None,
            address: None,
            out_of_reach_of: Vec::new(),
            stays_out: None,
            waits: None,
        }
    }

    #[test]
    fn of_very_many_nodes_only_those_in_trouble_have_a_line() {
        let ids: Vec<NodeId> = (0..100).map(|number| NodeId::new(format!("n{number}")).unwrap()).collect();
        let mut members: Vec<NodeView<'_>> = ids.iter().map(view).collect();
        members[70].sign = Sign::Silent;
        members[80].out_of_reach_of = vec![&ids[1], &ids[2], &ids[3]];
        let nodes = Overview {
            generation: Some(Generation(1)),
            leader: Some(&ids[0]),
            members,
            outside: vec![view(&ids[99]), NodeView { sign: Sign::Silent, ..view(&ids[98]) }],
        };
        let shown: Vec<String> = lines(&nodes, Timestamp::from_second(1005).unwrap())
            .into_iter()
            .map(|(name, text)| format!("{name} {text}"))
            .collect();
        assert_eq!(
            shown,
            [
                "nodes 100, led by n0; 1 silent; 1 waits outside",
                "node n0: rank 0, leads; alive, last beat 5s ago",
                "node n70: rank 0; silent, last beat 5s ago",
                "node n80: rank 0; alive, last beat 5s ago; out of reach of n1 and 2 more",
                "node 97 more; --json lists them all",
                "waiting n99: 1 worker; alive, last beat 5s ago",
            ]
        );
    }
}
