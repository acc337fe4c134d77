//! The machine's seams. What groups of it do is tested by the simulation (`tests/rendezvous_sim.rs`).

use std::{collections::BTreeSet, time::Duration};

use jiff::Timestamp;

use super::{Beat, Body, Input, JOIN, Line, MOST_ASKED, Me, Output, Seat, Sound, Timer, WELCOME};
use crate::{
    ids::{Generation, NodeId},
    rendezvous::{
        heartbeat::{Group, PATIENCE, State, testing::group},
        membership::{Listed, Role},
        policy::{
            Bounds, Member, Roster,
            roster::{Candidate, Formation},
            succession::{ANSWER, PROMISE, VOUCH},
        },
    },
};

const BOUNDS: Bounds = Bounds { min: 2, max: 8, global_batch: 64, mixed: false };

fn id(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

fn ids(names: &str) -> Vec<NodeId> {
    names.split_whitespace().map(id).collect()
}

fn set(names: &str) -> BTreeSet<NodeId> {
    ids(names).into_iter().collect()
}

fn member(name: &str) -> Member {
    Member { node: id(name), workers: 1, kind: "A100".into() }
}

fn roster(generation: u64, names: &str) -> Roster {
    Roster { generation: Generation(generation), members: names.split_whitespace().map(member).collect() }
}

fn formed(generation: u64, names: &str) -> Line {
    Line::Formed(roster(generation, names))
}

fn candidate(name: &str) -> Candidate {
    Candidate { member: member(name), program: "1".into(), unreachable: BTreeSet::new(), kills: 0, failed_saves: 0 }
}

fn invite(round: u64, generation: u64, asked: &str) -> Body {
    Body::Invite { round, generation: Generation(generation), asked: ids(asked), program: "1".into() }
}

/// A seat, its time and its timers.
struct Desk {
    seat: Seat<Sound>,
    now: Duration,
    timers: Vec<(Duration, Timer)>,
}

impl Desk {
    fn new(name: &str, bounds: Bounds) -> Self {
        let me = Me { member: member(name), program: "1".into() };
        let now = Duration::from_secs(1000);
        let (seat, out) = Seat::new(me, bounds, Sound, now);
        let mut desk = Self { seat, now, timers: Vec::new() };
        let out = desk.keep_timers(out);
        assert_eq!(out, [Output::Say { role: Role::Waiting, left: false }, Output::ReadJournal]);
        desk
    }

    /// A leader, whose members have come; the first of `names`.
    fn leader(names: &str, bounds: Bounds) -> Self {
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
    fn follower(me: &str, names: &str) -> Self {
        let mut desk = Self::new(me, BOUNDS);
        let out = desk.tell(Input::Journal(vec![formed(3, names)]));
        let leader = names.split_once(' ').unwrap().0;
        assert!(out.contains(&Output::Follow(roster(3, names))) && out.contains(&send(leader, hello(3))), "{out:?}");
        assert_eq!(desk.hear(leader, welcome(3)), []);
        desk
    }

    fn keep_timers(&mut self, out: Vec<Output>) -> Vec<Output> {
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
    fn tell(&mut self, input: Input) -> Vec<Output> {
        let out = self.seat.handle(input, self.now);
        self.keep_timers(out)
    }

    fn hear(&mut self, from: &str, body: Body) -> Vec<Output> {
        self.tell(Input::Message { from: id(from), body })
    }

    /// Lets time pass; looks at the store are left out.
    fn pass(&mut self, time: Duration) -> Vec<Output> {
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

    fn lose(&mut self, peer: &str, refused: bool) -> Vec<Output> {
        self.tell(Input::Lost { peer: id(peer), refused })
    }

    /// Reads the journal; what it does besides.
    fn journal(&mut self, lines: Vec<Line>) -> Vec<Output> {
        self.tell(Input::Journal(lines))
    }

    /// Lists nodes whose beats are all fresh.
    fn list(&mut self, names: &str) -> Vec<Output> {
        self.tell(Input::Listed(ids(names).into_iter().map(|node| listed(node, 1000)).collect()))
    }

    fn beats(&mut self, beats: Vec<(&str, Option<Beat>)>) -> Vec<Output> {
        let (began, beats) = (self.now, beats.into_iter().map(|(name, beat)| (id(name), beat)).collect());
        self.tell(Input::Beats { began, beats })
    }
}

fn listed(node: NodeId, second: i64) -> Listed {
    Listed { node, stored: Timestamp::from_second(second).unwrap() }
}

fn beat(state: State, every_s: u32) -> Option<Beat> {
    Some(Beat { counter: 7, group: Group { state, every_s, ..group() } })
}

fn left() -> Option<Beat> {
    Some(Beat { counter: u64::MAX, group: Group { left: true, ..group() } })
}

fn hello(generation: u64) -> Body {
    Body::Hello { generation: Generation(generation) }
}

fn welcome(generation: u64) -> Body {
    Body::Welcome { generation: Generation(generation) }
}

fn over(generation: u64) -> Body {
    Body::Over { generation: Generation(generation) }
}

fn send(to: &str, body: Body) -> Output {
    Output::Send { to: id(to), body }
}

fn ready(round: u64, name: &str) -> Body {
    Body::Ready { round, candidate: candidate(name) }
}

/// The round and those that are invited to it.
fn invited(out: &[Output]) -> Option<(u64, String)> {
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

fn names(formation: &Formation) -> String {
    formation.places.iter().map(|place| place.member.node.as_str()).collect::<Vec<_>>().join(" ")
}

/// The nodes of what it forms.
fn forms(out: &[Output]) -> Option<String> {
    out.iter().find_map(|output| match output {
        Output::Form { formation, .. } => Some(names(formation)),
        _ => None,
    })
}

fn parted(out: &[Output]) -> Vec<&str> {
    let node = |output| match output {
        &Output::Parted { ref node, .. } => Some(node.as_str()),
        _ => None,
    };
    out.iter().filter_map(node).collect()
}

const MOMENT: Duration = Duration::from_millis(1);

#[test]
fn the_lowest_node_proposes_forms_reads_and_leads() {
    let mut desk = Desk::new("a", Bounds { max: 3, ..BOUNDS });
    assert_eq!(desk.list("a b c"), [], "nothing is known before the journal was read");
    assert_eq!(desk.seat.explain(), "reads the journal");
    let out = desk.journal(vec![]);
    assert_eq!(invited(&out), Some((1, "b c".into())));
    assert_eq!(desk.hear("b", ready(1, "b")), []);
    let out = desk.hear("c", ready(1, "c"));
    let Some(Output::Form { generation, formation, previous, ended, ground }) = out.first() else { panic!("{out:?}") };
    assert_eq!((*generation, names(formation), previous, *ended), (Generation(1), "a b c".into(), &None, false));
    assert_eq!(ground, "3 nodes are ready, of at least 2 and at most 3");
    assert_eq!(desk.seat.explain(), format!("writes into the journal, after generation 0: {ground}"));
    assert_eq!(desk.pass(ANSWER), [], "it proposes nothing while it appends");
    assert_eq!(desk.tell(Input::Appended { stands: Some(true) }), [Output::ReadJournal]);
    assert_eq!(desk.tell(Input::Appended { stands: Some(true) }), [], "it did not ask for that");
    let out = desk.journal(vec![formed(1, "a b c")]);
    let tells = |to| send(to, Body::Formed { generation: Generation(1) });
    let leads = Output::Lead(roster(1, "a b c"));
    assert_eq!(out, [Output::Say { role: Role::Leader, left: false }, tells("b"), tells("c"), leads]);
    assert_eq!(desk.seat.explain(), "leads generation 1: 1 of 3 nodes have come");
    for name in ["b", "c"] {
        assert_eq!(desk.hear(name, hello(1)), [send(name, welcome(1))]);
    }
    assert_eq!(desk.seat.explain(), "leads generation 1 of 3 nodes");
    assert_eq!((desk.seat.newest(), desk.seat.nodes()), (Some(&roster(1, "a b c")), 3));
    assert_eq!(parted(&desk.pass(JOIN)), [""; 0]);
}

#[test]
fn a_member_that_does_not_come_is_lost() {
    let mut desk = Desk::new("a", BOUNDS);
    desk.journal(vec![formed(3, "a b c")]);
    desk.hear("b", hello(3));
    assert_eq!(parted(&desk.pass(JOIN - MOMENT)), [""; 0]);
    let out = desk.pass(MOMENT);
    assert_eq!((parted(&out), invited(&out)), (vec!["c"], Some((1, "b c".into()))));
}

#[test]
fn a_hello_that_comes_before_its_record_waits_for_it() {
    let mut desk = Desk::new("a", BOUNDS);
    desk.journal(vec![]);
    assert_eq!(desk.hear("b", hello(3)), [Output::ReadJournal]);
    assert_eq!(desk.journal(vec![]), []);
    let out = desk.journal(vec![formed(3, "a b")]);
    assert!(out.contains(&send("b", welcome(3))), "{out:?}");
    assert_eq!(desk.hear("x", hello(3)), [send("x", over(3))], "not a member");
    assert_eq!(desk.hear("b", hello(2)), [send("b", over(2))]);
}

#[test]
fn while_workers_are_being_ended_it_asks_nobody() {
    let mut desk = Desk::leader("a b c d", BOUNDS);
    let out = desk.lose("b", true);
    assert_eq!((parted(&out), out.len()), (vec!["b"], 1), "the owner can say that it is busy");
    assert_eq!(desk.tell(Input::Busy(true)), []);
    assert_eq!(desk.pass(Duration::from_secs(30)), []);
    assert!(desk.seat.explain().ends_with("; workers of the last generation are still being ended"));
    assert_eq!(desk.hear("c", invite(9, 4, "a c")), [send("c", no(9, "this node is in touch with the leader, a"))]);
    assert_eq!(invited(&desk.tell(Input::Busy(false))), Some((1, "c d".into())));
}

fn no(round: u64, why: &str) -> Body {
    Body::No { round, leader_lives: true, why: why.into() }
}

#[test]
fn a_round_that_is_answered_while_workers_end_is_held_as_long_as_promises_last() {
    for (pause, held) in [(PROMISE, true), (PROMISE + MOMENT, false)] {
        let mut desk = Desk::leader("a b c", BOUNDS);
        desk.lose("b", true);
        assert_eq!(invited(&desk.pass(Duration::ZERO)), Some((1, "c".into())));
        desk.tell(Input::Busy(true));
        assert_eq!(desk.hear("c", ready(1, "c")), [], "it appends nothing");
        assert_eq!(desk.pass(pause), []);
        let out = desk.tell(Input::Busy(false));
        if held {
            assert_eq!((forms(&out), invited(&out)), (Some("a c".into()), None));
        } else {
            assert_eq!((forms(&out), invited(&out)), (None, Some((2, "c".into()))));
            assert!(out.contains(&send("c", Body::Release)));
        }
    }
}

#[test]
fn a_follower_without_a_leader_is_busy_first_and_then_proposes() {
    let mut desk = Desk::follower("b", "a b c");
    let out = desk.lose("a", true);
    assert!(matches!(&out[..], [Output::CutOff { .. }]), "{out:?}");
    desk.tell(Input::Busy(true));
    assert_eq!(desk.pass(Duration::from_secs(5)), []);
    assert_eq!(invited(&desk.tell(Input::Busy(false))), Some((1, "c".into())), "a is gone");
    assert_eq!(forms(&desk.hear("c", ready(1, "c"))), Some("b c".into()));
}

#[test]
fn a_generation_that_ended_here_is_formed_anew() {
    let mut desk = Desk::leader("a b c", BOUNDS);
    desk.list("a b c x");
    desk.beats(vec![("x", beat(State::Waiting, 30)), ("b", None), ("c", None)]);
    let out = desk.tell(Input::Again { kills: 1 });
    assert_eq!(invited(&out), Some((1, "b c x".into())));
    for name in ["b", "c"] {
        assert_eq!(desk.hear(name, ready(1, name)), []);
    }
    let out = desk.hear("x", ready(1, "x"));
    assert_eq!(forms(&out), Some("a b c x".into()), "{out:?}");
    // If the store did not take it, it is tried again.
    assert_eq!(desk.tell(Input::Appended { stands: None }), [Output::ReadJournal]);
    assert_eq!(invited(&desk.journal(vec![])), Some((2, "b c x".into())));
}

#[test]
fn members_that_have_not_come_yet_count_when_a_generation_ends_at_once() {
    let mut desk = Desk::new("a", Bounds { min: 4, ..BOUNDS });
    desk.journal(vec![formed(3, "a b c d")]);
    let out = desk.tell(Input::Again { kills: 0 });
    assert_eq!(invited(&out), Some((1, "b c d".into())));
    for name in ["b", "c", "d"] {
        let out = desk.hear(name, ready(1, name));
        assert_eq!(forms(&out).is_some(), name == "d");
    }
}

#[test]
fn a_leader_with_too_few_steps_down_after_it_has_asked() {
    let mut desk = Desk::leader("a b c", Bounds { min: 3, ..BOUNDS });
    assert_eq!(invited(&desk.tell(Input::Again { kills: 0 })), Some((1, "b c".into())));
    desk.hear("b", ready(1, "b"));
    let out = desk.pass(ANSWER);
    assert_eq!(parted(&out), ["c"]);
    assert!(out.contains(&Output::StepDown { generation: Generation(3) }), "{out:?}");
    assert_eq!(desk.tell(Input::Appended { stands: Some(true) }), [Output::ReadJournal]);
    let out = desk.journal(vec![Line::Ended(Generation(3))]);
    let waits = [Output::Say { role: Role::Waiting, left: false }, Output::Wait];
    assert_eq!(out, [&[send("b", over(3))][..], &waits].concat());
}

#[test]
fn a_node_that_ends_the_group_too_often_is_no_member_until_a_generation_gets_further() {
    let mut desk = Desk::leader("a b c", BOUNDS);
    desk.tell(Input::Again { kills: 3 });
    desk.hear("b", ready(1, "b"));
    let out = desk.hear("c", ready(1, "c"));
    assert_eq!(out, [Output::StepDown { generation: Generation(3) }], "others do better");

    let mut desk = Desk::follower("b", "a b c");
    assert_eq!(desk.tell(Input::Again { kills: 2 }), [], "it does not lead");
    let kills = |desk: &mut Desk, generation| {
        desk.hear("a", invite(generation, generation, "a b"));
        match &desk.hear("a", invite(generation, generation, "a b"))[..] {
            [Output::Send { body: Body::Ready { candidate, .. }, .. }] => candidate.kills,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(kills(&mut desk, 4), 2);
    desk.journal(vec![Line::Committed(Generation(3)), formed(4, "a b c")]);
    assert_eq!(kills(&mut desk, 5), 2, "that checkpoint was there before");
    desk.journal(vec![Line::Committed(Generation(4))]);
    assert_eq!(kills(&mut desk, 5), 0);
}

#[test]
fn whoever_leaves_is_not_asked_and_counts_as_gone() {
    let mut desk = Desk::leader("a b c d e", BOUNDS);
    desk.tell(Input::Leaving(set("a c d e")));
    assert_eq!(desk.seat.nodes(), 2);
    assert_eq!(invited(&desk.tell(Input::Again { kills: 0 })), Some((1, "b".into())));
    let out = desk.hear("b", ready(1, "b"));
    assert_eq!((forms(&out), parted(&out)), (Some("a b".into()), vec![]), "2 of 5, and the others are not silent");
}

#[test]
fn a_node_that_is_asked_finds_out_whom_it_reaches_and_then_is_ready() {
    let mut desk = Desk::new("b", BOUNDS);
    desk.journal(vec![]);
    let out = desk.hear("a", invite(7, 1, "a b c d"));
    assert_eq!(out, [Output::Probe { round: 7, by: id("a"), nodes: ids("c d") }]);
    // It has promised itself from now on.
    let why = "this node is ready for a".to_owned();
    assert_eq!(desk.hear("c", invite(1, 1, "b c")), [send("c", Body::No { round: 1, leader_lives: false, why })]);
    let probed = |round, by| Input::Probed { round, by: id(by), unreachable: set("d x") };
    assert_eq!(desk.tell(probed(6, "a")), []);
    assert_eq!(desk.tell(probed(7, "c")), []);
    let candidate = Candidate { unreachable: set("d"), ..candidate("b") };
    assert_eq!(desk.tell(probed(7, "a")), [send("a", Body::Ready { round: 7, candidate })]);
    assert_eq!(desk.tell(probed(7, "a")), [], "once");
    // It is free again.
    desk.pass(PROMISE);
    assert_eq!(desk.hear("c", invite(2, 1, "b c")).len(), 1);
    desk.hear("d", Body::Release);
    let why = "this node is ready for c".to_owned();
    let no = send("d", Body::No { round: 3, leader_lives: false, why });
    assert_eq!(desk.hear("d", invite(3, 1, "b d")), [no], "whoever it promised nothing releases nothing");
    desk.hear("c", Body::Release);
    assert_eq!(desk.hear("d", invite(4, 1, "b d e")), [Output::Probe { round: 4, by: id("d"), nodes: ids("e") }]);
    desk.pass(PROMISE);
    let late = Input::Probed { round: 4, by: id("d"), unreachable: set("") };
    assert_eq!(desk.tell(late), [], "its promise is over");
}

#[test]
fn a_promise_to_a_dead_proposer_is_void() {
    for (refused, free) in [(false, false), (true, true)] {
        let mut desk = Desk::new("b", BOUNDS);
        desk.journal(vec![]);
        desk.hear("a", invite(1, 1, "a b"));
        desk.lose("a", refused);
        let out = desk.hear("c", invite(1, 1, "b c"));
        let ready = matches!(&out[..], [Output::Send { body: Body::Ready { .. }, .. }]);
        assert_eq!(ready, free, "{out:?}");
    }
}

#[test]
fn a_follower_asks_its_leader_before_it_vouches_for_it() {
    let mut desk = Desk::follower("b", "a b c");
    assert_eq!(desk.hear("c", invite(1, 4, "b c")), [send("a", Body::Ask { ticket: 1 })]);
    assert_eq!(desk.hear("x", invite(5, 4, "b x")), [send("a", Body::Ask { ticket: 2 })]);
    assert_eq!(desk.hear("c", Body::Here { ticket: 2 }), [], "not the leader");
    assert_eq!(desk.hear("a", Body::Here { ticket: 0 }), [], "an older question");
    let lives = "this node is in touch with the leader, a";
    assert_eq!(desk.hear("a", Body::Here { ticket: 1 }), [send("c", no(1, lives))]);
    assert_eq!(desk.hear("a", Body::Here { ticket: 2 }), [send("x", no(5, lives))]);
    assert_eq!(desk.pass(VOUCH), [], "all are answered");
    // A leader that does not answer is lost, and the others are answered accordingly.
    desk.hear("c", invite(2, 4, "b c"));
    assert_eq!(desk.pass(VOUCH - MOMENT), []);
    let out = desk.pass(MOMENT);
    let says = send("c", ready(2, "b"));
    assert!(matches!(&out[..], [Output::CutOff { .. }, said] if *said == says), "{out:?}");
    // Its own leader needs nobody's word.
    let mut desk = Desk::follower("b", "a b c");
    assert_eq!(desk.hear("a", invite(1, 4, "a b")), [send("a", ready(1, "b"))]);
}

#[test]
fn a_leader_says_that_it_is_there_to_its_members() {
    let mut desk = Desk::leader("a b", BOUNDS);
    assert_eq!(desk.hear("b", Body::Ask { ticket: 9 }), [send("b", Body::Here { ticket: 9 })]);
    assert_eq!(desk.hear("x", Body::Ask { ticket: 9 }), [send("x", over(3))]);
    assert_eq!(Desk::new("a", BOUNDS).hear("b", Body::Ask { ticket: 9 }), []);
}

#[test]
fn whoever_is_lost_in_a_round_is_not_waited_for() {
    for (refused, then) in [(false, "c d e x"), (true, "d e x")] {
        let mut desk = Desk::leader("a b d e", BOUNDS);
        desk.list("a b c d e x");
        desk.beats(["b", "c", "d", "e", "x"].map(|name| (name, beat(State::Waiting, 30))).to_vec());
        desk.lose("b", true);
        assert_eq!(invited(&desk.pass(Duration::ZERO)), Some((1, "c d e x".into())));
        for name in ["d", "e", "x"] {
            assert_eq!(desk.hear(name, ready(1, name)), []);
        }
        // One that was ready, and one that had not answered.
        assert_eq!(desk.lose("x", false), []);
        assert_eq!(forms(&desk.lose("c", refused)), Some("a d e".into()));
        desk.tell(Input::Appended { stands: None });
        assert_eq!(invited(&desk.journal(vec![])), Some((2, then.into())));
    }
}

#[test]
fn a_member_that_is_lost_in_a_round_is_parted_in_it() {
    let mut desk = Desk::leader("a b c d", BOUNDS);
    desk.lose("b", true);
    desk.pass(Duration::ZERO);
    desk.hear("c", ready(1, "c"));
    let out = desk.lose("d", true);
    assert_eq!((parted(&out), forms(&out)), (vec!["d"], Some("a c".into())));
}

#[test]
fn a_process_that_was_gone_and_beats_again_is_asked_again() {
    let mut desk = Desk::leader("a b", BOUNDS);
    desk.lose("x", true);
    let list = |desk: &mut Desk, at: i64| {
        let list = vec![listed(id("a"), 1000), listed(id("b"), 1000), listed(id("x"), at)];
        desk.tell(Input::Listed(list));
        desk.beats(vec![("b", None), ("x", beat(State::Waiting, 30))]);
        let out = desk.tell(Input::Saved { ok: true });
        invited(&out)
    };
    assert_eq!(list(&mut desk, 990), None, "its last beat may be older than its end");
    assert_eq!(list(&mut desk, 990), None);
    assert_eq!(list(&mut desk, 991), Some((1, "b x".into())));
}

#[test]
fn strangers_and_old_words_change_nothing() {
    let far = u64::MAX;
    let many = (0..=MOST_ASKED).map(|n| id(&format!("n{n}"))).collect::<Vec<_>>();
    let big = Body::Invite { round: 1, generation: Generation(4), asked: many.clone(), program: "1".into() };
    let wide = Candidate { unreachable: many.into_iter().collect(), ..candidate("x") };
    let words = |from: &str| {
        vec![
            Body::Ready { round: far, candidate: candidate(from) },
            ready(1, "a"),
            Body::Ready { round: 1, candidate: wide.clone() },
            Body::No { round: far, leader_lives: true, why: "x".repeat(1000) },
            Body::Release,
            Body::Formed { generation: Generation(1) },
            Body::Here { ticket: far },
            Body::Over { generation: Generation(1) },
            Body::Over { generation: Generation(3) },
            Body::Bye { generation: Generation(far) },
            big.clone(),
        ]
    };
    for mut desk in [Desk::leader("a b c", BOUNDS), Desk::follower("b", "a b c")] {
        let before = desk.seat.explain();
        for from in ["x", "c"] {
            for body in words(from) {
                assert_eq!(desk.hear(from, body.clone()), [], "{body:?}");
            }
        }
        // These are read about, or answered.
        for body in [Body::Formed { generation: Generation(far) }, over(far), hello(far)] {
            assert_eq!(desk.hear("x", body), [Output::ReadJournal]);
        }
        let bye = Body::Bye { generation: Generation(3) };
        assert_eq!(desk.hear("x", welcome(3)), [send("x", bye)]);
        assert_eq!(desk.hear("x", invite(1, far, "x a")), [Output::ReadJournal]);
        let why = "this node has read of generation 3 only".to_owned();
        assert_eq!(desk.journal(vec![]), [send("x", Body::No { round: 1, leader_lives: false, why })]);
        assert_eq!(desk.lose("x", true), []);
        assert_eq!(desk.pass(JOIN), [], "nothing is pending");
        assert_eq!(desk.seat.explain(), before);
    }
}

#[test]
fn answers_count_once_and_only_from_whoever_was_asked() {
    let mut desk = Desk::leader("a b c", BOUNDS);
    desk.tell(Input::Again { kills: 0 });
    assert_eq!(desk.hear("x", ready(1, "x")), []);
    assert_eq!(desk.hear("b", ready(1, "c")), [], "it speaks for another one");
    assert_eq!(desk.hear("b", ready(2, "b")), []);
    assert_eq!(desk.hear("b", ready(1, "b")), []);
    assert_eq!(desk.hear("b", ready(1, "b")), []);
    assert_eq!(forms(&desk.hear("c", ready(1, "c"))), Some("a b c".into()));
}

#[test]
fn the_invitations_that_wait_are_bounded() {
    let mut desk = Desk::follower("b", "a b c");
    for n in 0..200 {
        desk.hear(&format!("x{n}"), invite(1, 4, "b"));
        desk.hear("c", invite(n, 4, "b"));
    }
    let out = desk.hear("a", Body::Here { ticket: u64::MAX });
    assert_eq!(out.len(), super::answers::MOST_WAITING);
    let mut desk = Desk::leader("a b", BOUNDS);
    for n in 0..MOST_ASKED + 10 {
        desk.hear(&format!("x{n}"), hello(9));
    }
    assert_eq!(desk.journal(vec![formed(9, "a b")]).len(), MOST_ASKED + 2, "each is told once");
}

#[test]
fn the_lowest_are_read_until_three_of_them_live() {
    let mut desk = Desk::new("m", BOUNDS);
    desk.journal(vec![]);
    assert_eq!(desk.list("a b c d e m z"), [Output::ReadBeats(ids("a b c"))]);
    assert_eq!(desk.seat.nodes(), 1, "not judged yet");
    let old = |name: &str| listed(id(name), 950);
    assert_eq!(desk.beats(vec![("a", left()), ("b", beat(State::Waiting, 30))]), []);
    assert_eq!(desk.beats(vec![("c", None)]), [Output::ReadBeats(ids("d e"))]);
    assert_eq!(desk.beats(vec![("d", beat(State::Waiting, 30)), ("e", beat(State::Waiting, 30))]), []);
    assert_eq!(desk.seat.nodes(), 5, "b d e m z");
    // One that left is not read again; a beat that is old for its pace is a dead one's.
    let list = ["a", "m"].map(|name| listed(id(name), 1000)).into_iter().chain(["b", "c"].map(old)).collect();
    assert_eq!(desk.tell(Input::Listed(list)), [Output::ReadBeats(ids("b c"))]);
    desk.beats(vec![("b", beat(State::Leader, 4)), ("c", beat(State::Waiting, 30))]);
    assert_eq!(desk.seat.nodes(), 2, "c m");
    assert_eq!(desk.list("a b c"), [], "without this node's own beat nothing is known");
    assert_eq!(desk.seat.nodes(), 2);
}

#[test]
fn a_leader_reads_the_dead_to_bury_them_and_who_is_new() {
    let mut desk = Desk::leader("a b", BOUNDS);
    let list = || {
        let mut list: Vec<Listed> = ids("a b x").into_iter().map(|node| listed(node, 1000)).collect();
        list.extend(ids("b2 dead slow").into_iter().map(|node| listed(node, 900)));
        Input::Listed(list)
    };
    assert_eq!(desk.tell(list()), [Output::ReadBeats(ids("b b2 dead slow x"))]);
    let waits = |every_s| beat(State::Waiting, every_s);
    let beats = [("b", waits(30)), ("b2", left()), ("dead", waits(30)), ("slow", waits(60)), ("x", waits(30))];
    assert_eq!(desk.beats(beats.to_vec()), [Output::Bury(ids("b2 dead"))]);
    assert_eq!(desk.tell(list()), [Output::ReadBeats(ids("b2 dead slow"))], "x and b are known");
    assert_eq!(desk.seat.nodes(), 3);
}

#[test]
fn a_leader_that_a_list_shows_dead_is_watched_and_then_succeeded() {
    let mut desk = Desk::new("x", Bounds { min: 1, ..BOUNDS });
    desk.journal(vec![formed(3, "a b")]);
    let list = vec![listed(id("x"), 1000), listed(id("a"), 950)];
    assert_eq!(desk.tell(Input::Listed(list)), [Output::ReadBeats(ids("a"))]);
    desk.beats(vec![("a", beat(State::Leader, 4))]);
    let mut seen = None;
    let begin = desk.now;
    while seen.is_none() && desk.now < begin + PATIENCE {
        desk.now += Duration::from_secs(2);
        seen = invited(&desk.beats(vec![("a", beat(State::Leader, 4))]));
    }
    assert_eq!(desk.now - begin, Duration::from_secs(12), "CONFIRM, and x waited longer than its turn needs");
}

#[test]
fn a_generation_that_ended_opens_a_cold_start() {
    let mut desk = Desk::follower("b", "a b c");
    let out = desk.journal(vec![Line::Ended(Generation(2))]);
    assert_eq!(out, [], "an old one");
    let out = desk.journal(vec![Line::Ended(Generation(3))]);
    assert_eq!(out, [Output::Say { role: Role::Waiting, left: false }, Output::Wait]);
    assert_eq!(desk.seat.explain(), "waits for generation 4: 0 of at least 2 nodes live");
    desk.list("b c");
    let out = desk.pass(Duration::from_secs(6));
    assert_eq!(invited(&out), Some((1, "c".into())), "{out:?}");
    let out = desk.hear("c", ready(1, "c"));
    let Some(Output::Form { generation, previous, ended, .. }) = out.first() else { panic!("{out:?}") };
    assert_eq!((*generation, previous.as_ref(), *ended), (Generation(4), Some(&roster(3, "a b c")), true));
}

#[test]
fn a_node_that_is_left_out_does_nothing_more() {
    let mut desk = Desk::leader("a b c", BOUNDS);
    let out = desk.journal(vec![formed(4, "b c")]);
    let ends = [Output::Say { role: Role::Waiting, left: true }, Output::LeftOut];
    assert_eq!(out, [&[send("b", over(3)), send("c", over(3))][..], &ends].concat());
    assert_eq!(desk.hear("b", invite(1, 5, "a b")), []);
    assert_eq!(desk.pass(Duration::from_secs(600)), []);
    // A node outside was no member before, and just waits.
    let mut desk = Desk::new("x", BOUNDS);
    assert_eq!(desk.journal(vec![formed(3, "a b")]), [Output::Wait]);
    assert_eq!(desk.journal(vec![formed(4, "b")]), [Output::Wait]);
}

#[test]
fn a_follower_that_is_not_welcomed_in_time_lost_its_leader() {
    let mut desk = Desk::new("b", BOUNDS);
    desk.journal(vec![formed(3, "a b c")]);
    assert_eq!(desk.pass(WELCOME - MOMENT), []);
    assert!(matches!(desk.pass(MOMENT).first(), Some(Output::CutOff { .. })));
    // One that says it is over is lost a moment later, if the journal says nothing new.
    for (newer, lost) in [(false, true), (true, false)] {
        let mut desk = Desk::follower("b", "a b c");
        assert_eq!(desk.hear("a", over(3)), [Output::ReadJournal]);
        desk.journal(if newer { vec![formed(4, "c b")] } else { vec![] });
        let out = desk.pass(Duration::from_secs(1));
        assert_eq!(out.iter().any(|it| matches!(it, Output::CutOff { .. })), lost, "{out:?}");
    }
}

#[test]
fn a_leader_grows_after_a_commit_and_only_if_somebody_can_join() {
    let mut desk = Desk::leader("a b", Bounds { max: 3, ..BOUNDS });
    assert_eq!(desk.tell(Input::Saved { ok: true }), [], "nobody waits");
    desk.list("a b x y");
    desk.beats(["b", "x", "y"].map(|name| (name, beat(State::Waiting, 30))).to_vec());
    desk.tell(Input::Busy(true));
    assert_eq!(desk.tell(Input::Saved { ok: true }), []);
    desk.tell(Input::Busy(false));
    assert_eq!(invited(&desk.tell(Input::Saved { ok: true })), Some((1, "b x y".into())));
    desk.hear("x", ready(1, "x"));
    desk.hear("y", ready(1, "y"));
    let out = desk.pass(ANSWER);
    assert_eq!(out, [send("x", Body::Release), send("y", Body::Release)], "b would be left out");
    desk.tell(Input::Saved { ok: true });
    desk.hear("b", ready(2, "b"));
    desk.hear("x", ready(2, "x"));
    assert_eq!(forms(&desk.hear("y", ready(2, "y"))), Some("a b x".into()));
}

#[test]
fn a_generation_that_ends_while_it_asks_who_may_join_is_formed_anew_at_once() {
    let mut desk = Desk::leader("a b", BOUNDS);
    desk.list("a b x");
    desk.beats(["b", "x"].map(|name| (name, beat(State::Waiting, 30))).to_vec());
    assert_eq!(invited(&desk.tell(Input::Saved { ok: true })), Some((1, "b x".into())));
    assert_eq!(desk.tell(Input::Again { kills: 0 }), []);
    desk.hear("b", ready(1, "b"));
    let out = desk.hear("x", Body::No { round: 1, leader_lives: false, why: String::new() });
    assert_eq!(out, [send("b", Body::Release)], "nobody can join");
    assert_eq!(invited(&desk.pass(Duration::ZERO)), Some((2, "b x".into())));
}

#[test]
fn a_leader_whose_saves_fail_hands_over_and_a_followers_count() {
    let mut desk = Desk::leader("a b", BOUNDS);
    for _ in 0..2 {
        assert_eq!(desk.tell(Input::Saved { ok: false }), []);
    }
    desk.journal(vec![Line::Committed(Generation(3))]);
    for _ in 0..2 {
        assert_eq!(desk.tell(Input::Saved { ok: false }), [], "one of them stood after all");
    }
    let ends = [Output::Say { role: Role::Waiting, left: true }, Output::HandOver];
    assert_eq!(desk.tell(Input::Saved { ok: false }), [&[send("b", over(3))][..], &ends].concat());

    let mut desk = Desk::follower("b", "a b");
    for _ in 0..5 {
        assert_eq!(desk.tell(Input::Saved { ok: false }), []);
    }
    let out = desk.hear("a", invite(1, 4, "a b"));
    let failed = Candidate { failed_saves: 5, ..candidate("b") };
    assert_eq!(out, [send("a", Body::Ready { round: 1, candidate: failed })]);
}

#[test]
fn a_member_that_forms_nothing_releases_those_that_were_ready() {
    let mut desk = Desk::follower("b", "a b c d e");
    desk.lose("a", false);
    assert_eq!(invited(&desk.pass(Duration::ZERO)), Some((1, "a c d e".into())));
    desk.hear("c", ready(1, "c"));
    desk.beats(vec![("a", beat(State::Leader, 4))]);
    assert_eq!(desk.pass(ANSWER), [send("c", Body::Release)], "2 of 5");
    let why = "2 of 5 workers of generation 3 are ready, not more than half, and the leader may be alive";
    assert_eq!(desk.seat.explain(), format!("lost a, which leads generation 3: {why}"));
    assert_eq!(desk.tell(Input::Failed), []);
    assert!(desk.seat.explain().ends_with("; the store did not answer the last request"));
}

#[test]
fn the_form_on_the_wire() {
    let text = |body: &Body| serde_json::to_string(body).unwrap();
    let bodies = [
        (invite(1, 2, "a b"), r#"{"invite":{"round":1,"generation":2,"asked":["a","b"],"program":"1"}}"#),
        (Body::Release, r#""release""#),
        (hello(2), r#"{"hello":{"generation":2}}"#),
        (
            Body::Ready { round: 1, candidate: Candidate { unreachable: set("c"), ..candidate("a") } },
            concat!(
                r#"{"ready":{"round":1,"candidate":{"member":{"node":"a","workers":1,"kind":"A100"},"program":"1","#,
                r#""unreachable":["c"],"kills":0,"failed_saves":0}}}"#
            ),
        ),
        (
            Body::No { round: 1, leader_lives: true, why: "x".into() },
            r#"{"no":{"round":1,"leader_lives":true,"why":"x"}}"#,
        ),
    ];
    for (body, wire) in bodies {
        assert_eq!(text(&body), wire);
        assert_eq!(serde_json::from_str::<Body>(wire).unwrap(), body);
    }
    assert!(serde_json::from_str::<Body>(r#"{"hello":{"generation":-1}}"#).is_err());
}
