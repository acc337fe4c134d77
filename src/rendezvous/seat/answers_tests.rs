//! What a node makes of messages: invitations, answers, strangers' words.

use super::{testing::*, *};
use crate::rendezvous::policy::succession::{PROMISE, VOUCH};

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
