//! A node's part: how it forms, leads, follows, loses and looks. What groups of it do is tested by the simulation
//! (`tests/rendezvous_sim.rs`).

use super::{testing::*, *};
use crate::rendezvous::{
    heartbeat::State,
    membership::Listed,
    policy::{
        roster::Why,
        succession::{ANSWER, PROMISE},
    },
};

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
fn a_leader_that_said_good_bye_is_not_said_to_be_silent() {
    for (beat, why) in [(left(), Why::Left), (beat(State::Leader, 30), Why::Silent)] {
        let mut desk = Desk::follower("b", "a b c");
        desk.lose("a", true);
        desk.beats(vec![("a", beat)]);
        desk.pass(Duration::ZERO);
        let out = desk.hear("c", ready(1, "c"));
        let told = out.iter().find_map(|output| match output {
            Output::Form { formation, .. } => Some(formation.out.clone()),
            _ => None,
        });
        assert_eq!(told, Some(vec![(id("a"), why)]), "{out:?}");
    }
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
fn whoever_leaves_is_not_asked_and_counts_as_gone() {
    let mut desk = Desk::leader("a b c d e", BOUNDS);
    desk.tell(Input::Leaving(set("a c d e")));
    assert_eq!(desk.seat.nodes(), 2);
    assert_eq!(invited(&desk.tell(Input::Again { kills: 0 })), Some((1, "b".into())));
    let out = desk.hear("b", ready(1, "b"));
    assert_eq!((forms(&out), parted(&out)), (Some("a b".into()), vec![]), "2 of 5, and the others are not silent");
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
        let out = desk.tell(Input::Saved);
        invited(&out)
    };
    assert_eq!(list(&mut desk, 990), None, "its last beat may be older than its end");
    assert_eq!(list(&mut desk, 990), None);
    assert_eq!(list(&mut desk, 991), Some((1, "b x".into())));
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
    assert_eq!(desk.tell(Input::Saved), [], "nobody waits");
    desk.list("a b x y");
    desk.beats(["b", "x", "y"].map(|name| (name, beat(State::Waiting, 30))).to_vec());
    desk.tell(Input::Busy(true));
    assert_eq!(desk.tell(Input::Saved), []);
    desk.tell(Input::Busy(false));
    assert_eq!(invited(&desk.tell(Input::Saved)), Some((1, "b x y".into())));
    desk.hear("x", ready(1, "x"));
    desk.hear("y", ready(1, "y"));
    let out = desk.pass(ANSWER);
    assert_eq!(out, [send("x", Body::Release), send("y", Body::Release)], "b would be left out");
    desk.tell(Input::Saved);
    desk.hear("b", ready(2, "b"));
    desk.hear("x", ready(2, "x"));
    assert_eq!(forms(&desk.hear("y", ready(2, "y"))), Some("a b x".into()));
}

#[test]
fn a_generation_that_ends_while_it_asks_who_may_join_is_formed_anew_at_once() {
    let mut desk = Desk::leader("a b", BOUNDS);
    desk.list("a b x");
    desk.beats(["b", "x"].map(|name| (name, beat(State::Waiting, 30))).to_vec());
    assert_eq!(invited(&desk.tell(Input::Saved)), Some((1, "b x".into())));
    assert_eq!(desk.tell(Input::Again { kills: 0 }), []);
    desk.hear("b", ready(1, "b"));
    let out = desk.hear("x", Body::No { round: 1, leader_lives: false, why: String::new() });
    assert_eq!(out, [send("b", Body::Release)], "nobody can join");
    assert_eq!(invited(&desk.pass(Duration::ZERO)), Some((2, "b x".into())));
}

#[test]
fn a_leader_hands_over_and_says_goodbye() {
    let mut desk = Desk::leader("a b", BOUNDS);
    let hand_over = || Input::HandOver { why: "its saves fail".into() };
    let ends = [Output::Say { role: Role::Waiting, left: true }, Output::HandOver];
    assert_eq!(desk.tell(hand_over()), [&[send("b", over(3))][..], &ends].concat());
    assert_eq!(desk.tell(Input::Again { kills: 0 }), [], "this machine has ended");
    let mut desk = Desk::follower("b", "a b");
    assert_eq!(desk.tell(hand_over()), [], "it leads nothing by now");
}

#[test]
fn a_node_whose_saves_failed_says_so_until_it_is_trusted_again() {
    for (said, told) in [(vec![3], 3), (vec![3, 0], 0)] {
        let mut desk = Desk::follower("b", "a b");
        for saves in said {
            assert_eq!(desk.tell(Input::Fails { saves }), []);
        }
        let out = desk.hear("a", invite(1, 4, "a b"));
        let candidate = Candidate { failed_saves: told, ..candidate("b") };
        assert_eq!(out, [send("a", Body::Ready { round: 1, candidate })]);
    }
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
