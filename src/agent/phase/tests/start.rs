//! What the start of a group was spent on, as it is reported.

use super::*;
use crate::{protocol::StartSplit, report::StartParts};

fn first_steps(effects: &Effects) -> Vec<(Step, Generation, StartParts)> {
    let of = |effect: &Effect| match effect {
        Effect::Report(report::Event::FirstStep { step, generation, parts }) => Some((*step, *generation, **parts)),
        _ => None,
    };
    effects.list().iter().filter_map(of).collect()
}

fn machine(load: Load, source: Incoming) -> Rig {
    let machine = StateMachine::new(settings(load), estimates(), Loading::new(WorldSize(2), source));
    Rig { machine, now: Moment::ZERO, ticket: 0 }
}

#[test]
fn the_first_step_says_what_the_slowest_rank_spent_the_start_on() {
    let from = Source::Store { folder: "folder".into(), files: Vec::new() };
    let load = Load::Checkpoint { step: Step(5), generation: Generation(2), from };
    let mut rig = machine(load, Incoming::UnderWay(0, vec![(0, BYTES)]));
    rig.pass(1.0).feed_all([built(Rank(1))]);
    rig.pass(0.5).feed_all([built(Rank(0))]);
    rig.pass(0.5).feed_all([Event::LaidOut { bytes: BYTES }, fetched()]);
    let split = |model_s, group_s, load_s| StartSplit { model_s, group_s, load_s, ..StartSplit::default() };
    let splits = [split(0.5, 0.125, 0.75), StartSplit { slots_s: 0.25, compare_s: 0.5, ..split(0.75, 0.0625, 0.5) }];
    for (rank, split) in RANKS.into_iter().zip(splits) {
        rig.pass(0.5).feed_all([said(rank, FromWorker::Ready { fingerprint: None, split })]);
    }
    assert_eq!(rig.phase(), "Training");
    let effects = rig.pass(2.0).feed(finished(Rank(0), 6));
    assert_eq!(first_steps(&effects), [], "a step ends with its last rank");
    let effects = rig.pass(1.0).feed(finished(Rank(1), 6));
    assert!(list(&effects).starts_with("report step, report first_step"), "{}", list(&effects));
    let parts = StartParts {
        invite_s: 0.25,
        built_s: 1.5,
        model_s: 0.75,
        group_s: 0.125,
        slots_s: 0.25,
        fetch_s: Some(1.0),
        load_s: 0.75,
        compare_s: 0.5,
        step_s: 3.0,
        total_s: 6.25,
    };
    assert_eq!(first_steps(&effects), [(Step(6), Generation(3), parts)]);
    for rank in RANKS {
        assert_eq!(first_steps(&rig.pass(1.0).feed(finished(rank, 7))), [], "only the first");
    }
}

#[test]
fn a_run_that_begins_has_nothing_to_fetch() {
    let mut rig = machine(Load::Nothing, Incoming::Nothing);
    rig.feed_all(RANKS.map(built));
    rig.feed_all([Event::LaidOut { bytes: BYTES }]);
    rig.feed_all(RANKS.map(|rank| said(rank, FromWorker::Ready { fingerprint: None, split: StartSplit::default() })));
    rig.feed_all([finished(Rank(0), 1)]);
    let told = first_steps(&rig.feed(finished(Rank(1), 1)));
    assert!(matches!(told.as_slice(), [(Step(1), _, StartParts { fetch_s: None, .. })]), "{told:?}");
}
