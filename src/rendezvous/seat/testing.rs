//! A seat on a desk: what the tests of the machine share.

use std::{collections::BTreeSet, time::Duration};

use jiff::Timestamp;

use super::{Beat, Body, Input, Line, Me, Output, Seat, Sound, Timer};
use crate::{
    ids::{Generation, NodeId},
    rendezvous::{
        heartbeat::{Group, State, testing::group},
        membership::{Listed, Role},
        policy::{
            Bounds, Member, Roster,
            roster::{Candidate, Formation},
        },
    },
};

pub(super) const BOUNDS: Bounds = Bounds { min: 2, max: 8, global_batch: 64, mixed: false };

pub(super) fn id(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

pub(super) fn ids(names: &str) -> Vec<NodeId> {
    names.split_whitespace().map(id).collect()
}

pub(super) fn set(names: &str) -> BTreeSet<NodeId> {
    ids(names).into_iter().collect()
}

pub(super) fn member(name: &str) -> Member {
    Member { node: id(name), workers: 1, kind: "A100".into() }
}

pub(super) fn roster(generation: u64, names: &str) -> Roster {
    Roster { generation: Generation(generation), members: names.split_whitespace().map(member).collect() }
}

pub(super) fn formed(generation: u64, names: &str) -> Line {
    Line::Formed(roster(generation, names))
}

pub(super) fn candidate(name: &str) -> Candidate {
    Candidate { member: member(name), program: "1".into(), unreachable: BTreeSet::new(), kills: 0, failed_saves: 0 }
}

pub(super) fn invite(round: u64, generation: u64, asked: &str) -> Body {
    Body::Invite { round, generation: Generation(generation), asked: ids(asked), program: "1".into() }
}

/// A seat, its time and its timers.
pub(super) struct Desk {
    pub(super) seat: Seat<Sound>,
    pub(super) now: Duration,
    timers: Vec<(Duration, Timer)>,
}

impl Desk {
    pub(super) fn new(name: &str, bounds: Bounds) -> Self {
        let me = Me { member: member(name), program: "1".into() };
        let now = Duration::from_secs(1000);
        let (seat, out) = Seat::new(me, bounds, Sound, now);
        let mut desk = Self { seat, now, timers: Vec::new() };
        let out = desk.keep_timers(out);
        assert_eq!(out, [Output::Say { role: Role::Waiting, left: false }, Output::ReadJournal]);
        desk
    }

    /// A leader, whose members have come; the first of `names`.
    pub(super) fn leader(names: &str, bounds: Bounds) -> Self {
        let (me, others) = names.split_once(' ').unwrap_or((names, ""));
        let mut desk = Self::new(me, bounds);
        let out = desk.tell(Input::Journal(vec![formed(3, names)]));
        assert!(out.contains(&Output::Lead(roster(3, names))), "{out:?}");
        for other in ids(others) {
            assert_eq!(desk.hear(other.as_str(), hello(3)), [send(other.as_str(), welcome(3))]);
        }
        desk
    }

    /// A follower that its leader has welcomed.
    pub(super) fn follower(me: &str, names: &str) -> Self {
        let mut desk = Self::new(me, BOUNDS);
        let out = desk.tell(Input::Journal(vec![formed(3, names)]));
        let leader = names.split_once(' ').unwrap().0;
        assert!(out.contains(&Output::Follow(roster(3, names))) && out.contains(&send(leader, hello(3))), "{out:?}");
        assert_eq!(desk.hear(leader, welcome(3)), []);
        desk
    }

    pub(super) fn keep_timers(&mut self, out: Vec<Output>) -> Vec<Output> {
        let mut told = Vec::new();
        for output in out {
            match output {
                Output::After(pause, timer) => self.timers.push((self.now + pause, timer)),
                Output::Log(_) => {}
                output => told.push(output),
            }
        }
        told
    }

    /// What it does, without timers and lines of the log.
    pub(super) fn tell(&mut self, input: Input) -> Vec<Output> {
        let out = self.seat.handle(input, self.now);
        self.keep_timers(out)
    }

    pub(super) fn hear(&mut self, from: &str, body: Body) -> Vec<Output> {
        self.tell(Input::Message { from: id(from), body })
    }

    /// Lets time pass; looks at the store are left out.
    pub(super) fn pass(&mut self, time: Duration) -> Vec<Output> {
        let (end, mut told) = (self.now + time, Vec::new());
        loop {
            let due = self.timers.iter().enumerate().filter(|(_, (at, _))| *at <= end).min_by_key(|(_, (at, _))| *at);
            let Some(at) = due.map(|(at, _)| at) else { break };
            let (due, timer) = self.timers.remove(at);
            self.now = self.now.max(due);
            told.extend(self.tell(Input::Timer(timer)));
        }
        self.now = end;
        told.retain(|it| !matches!(it, Output::ReadJournal | Output::List | Output::ReadBeats(_)));
        told
    }

    pub(super) fn lose(&mut self, peer: &str, refused: bool) -> Vec<Output> {
        self.tell(Input::Lost { peer: id(peer), refused })
    }

    /// Reads the journal; what it does besides.
    pub(super) fn journal(&mut self, lines: Vec<Line>) -> Vec<Output> {
        self.tell(Input::Journal(lines))
    }

    /// Lists nodes whose beats are all fresh.
    pub(super) fn list(&mut self, names: &str) -> Vec<Output> {
        self.tell(Input::Listed(ids(names).into_iter().map(|node| listed(node, 1000)).collect()))
    }

    pub(super) fn beats(&mut self, beats: Vec<(&str, Option<Beat>)>) -> Vec<Output> {
        let (began, beats) = (self.now, beats.into_iter().map(|(name, beat)| (id(name), beat)).collect());
        self.tell(Input::Beats { began, beats })
    }
}

pub(super) fn listed(node: NodeId, second: i64) -> Listed {
    Listed { node, stored: Timestamp::from_second(second).unwrap() }
}

pub(super) fn beat(state: State, every_s: u32) -> Option<Beat> {
    Some(Beat { counter: 7, group: Group { state, every_s, ..group() } })
}

pub(super) fn left() -> Option<Beat> {
    Some(Beat { counter: u64::MAX, group: Group { left: true, ..group() } })
}

pub(super) fn hello(generation: u64) -> Body {
    Body::Hello { generation: Generation(generation) }
}

pub(super) fn welcome(generation: u64) -> Body {
    Body::Welcome { generation: Generation(generation) }
}

pub(super) fn over(generation: u64) -> Body {
    Body::Over { generation: Generation(generation) }
}

pub(super) fn send(to: &str, body: Body) -> Output {
    Output::Send { to: id(to), body }
}

pub(super) fn ready(round: u64, name: &str) -> Body {
    Body::Ready { round, candidate: candidate(name) }
}

/// The round and those that are invited to it.
pub(super) fn invited(out: &[Output]) -> Option<(u64, String)> {
    let mut rounds = BTreeSet::new();
    let mut names = Vec::new();
    for output in out {
        if let Output::Send { to, body: Body::Invite { round, .. } } = output {
            rounds.insert(*round);
            names.push(to.as_str());
        }
    }
    assert!(rounds.len() < 2, "{out:?}");
    rounds.first().map(|round| (*round, names.join(" ")))
}

pub(super) fn names(formation: &Formation) -> String {
    formation.places.iter().map(|place| place.member.node.as_str()).collect::<Vec<_>>().join(" ")
}

/// The nodes of what it forms.
pub(super) fn forms(out: &[Output]) -> Option<String> {
    out.iter().find_map(|output| match output {
        Output::Form { formation, .. } => Some(names(formation)),
        _ => None,
    })
}

pub(super) fn parted(out: &[Output]) -> Vec<&str> {
    let mut nodes = Vec::new();
    for output in out {
        if let Output::Parted { node, .. } = output {
            nodes.push(node.as_str());
        }
    }
    nodes
}

pub(super) const MOMENT: Duration = Duration::from_millis(1);

pub(super) fn no(round: u64, why: &str) -> Body {
    Body::No { round, leader_lives: true, why: why.into() }
}
