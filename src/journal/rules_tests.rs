//! The rules, each with a record that breaks it.

use super::{testing::*, *};
use crate::ids::{Generation, Step};

fn points(checkpoints: &[&Checkpoint]) -> Vec<(u64, u64)> {
    checkpoints.iter().map(|c| (c.committed.step.get(), c.committed.generation.get())).collect()
}

fn held(generation: u64) -> Option<Generation> {
    Some(Generation(generation))
}

// Replay.

#[test]
fn record_0_must_be_created_and_of_this_run() {
    let begin = |record| RunState::begin(&run_id(), entry("a", record)).map_err(|e| e.to_string());
    assert!(begin(created()).is_ok());
    assert!(begin(formed(1, None)).unwrap_err().contains("not created"));
    let other = Record::Created { run_id: crate::ids::RunId::new("other").unwrap(), config: Box::new(config()) };
    assert!(begin(other).unwrap_err().contains("copied"));
    let newer = Entry { format: FORMAT + 1, ..entry("a", created()) };
    assert!(RunState::begin(&run_id(), newer).unwrap_err().to_string().contains("format"));
}

#[test]
fn a_record_that_contradicts_earlier_ones_is_refused() {
    let base = || vec![formed(1, None), committed(10, 1), formed(3, Some(point(10, 1)))];
    for (bad, part) in [
        (created(), "only the first"),
        (formed(3, None), "after generation 3"),
        (formed(2, None), "after generation 3"),
        (formed(4, Some(point(11, 1))), "never committed"),
        (committed(20, 1), "while 3 is the newest"),
        (committed(20, 4), "while 3 is the newest"),
        (notice(1, "sigterm"), "while 3 is the newest"),
        (interrupted(2), "while 3 is the newest"),
        (completed(10, 1), "while 3 is the newest"),
        (failed(1), "while 3 is the newest"),
        (damaged(11, 1), "never committed"),
        (pruned(10, 3), "never committed"),
        (cleared(10, 3), "never committed"),
    ] {
        let mut state = state(base());
        let before = state.clone();
        let error = state.apply(4, entry("a", bad.clone())).unwrap_err().to_string();
        assert!(error.contains(part), "{bad:?}: {error}");
        assert_eq!(state, before, "an error changes nothing");
    }
    let mut twice = state(base());
    twice.apply(4, entry("a", committed(20, 3))).unwrap();
    assert!(twice.apply(5, entry("a", committed(20, 3))).unwrap_err().to_string().contains("a second time"));
    for number in [0, 3, 5, 7, u64::MAX] {
        assert!(twice.apply(number, entry("a", notice(3, "x"))).is_err() || number == 5, "{number}");
    }
    let mut early = state([]);
    assert!(early.apply(1, entry("a", committed(1, 1))).unwrap_err().to_string().contains("none was formed"));
}

#[test]
fn the_state_follows_from_the_records() {
    let state = state([
        formed(1, None),
        committed(9, 1),
        notice(1, "aws-spot"),
        interrupted(1),
        formed(2, Some(point(9, 1))),
        committed(10, 2),
        committed(11, 2),
        damaged(11, 2),
    ]);
    assert_eq!((state.next(), state.generation()), (9, Generation(2)));
    assert_eq!(state.formed().unwrap().resume, Some(point(9, 1)));
    assert_eq!(state.overrides(), [1, 2].map(|g| ("train.steps".to_owned(), g.to_string())));
    assert_eq!(state.config(), &config());
    assert_eq!(state.notices()[0].source, "aws-spot");
    assert_eq!(state.interruptions()[0].lost_steps, 2);
    assert_eq!(state.newest().unwrap().point(), point(10, 2));
    assert_eq!(
        state.checkpoint(Step(11), Generation(2)).unwrap().status,
        CheckpointStatus::Damaged { reason: "a hole".into() }
    );
    assert_eq!(*state.outcome(), Outcome::Open);
    assert_eq!(state.last_activity().1, &node("a"));
}

#[test]
fn the_newest_checkpoint_is_by_number_and_on_the_line_that_the_run_took() {
    // As text, step 9 would be newer than step 100.
    let numbers = state([formed(1, None), committed(9, 1), committed(100, 1)]);
    assert_eq!(points(&numbers.candidates()), [(100, 1), (9, 1)]);

    // Back to step 50: later checkpoints are no longer on the line, even before anything new is committed.
    let back = [formed(1, None), committed(20, 1), committed(50, 1), committed(90, 1), formed(2, Some(point(50, 1)))];
    assert_eq!(points(&state(back.clone()).candidates()), [(50, 1), (20, 1)]);
    assert_eq!(points(&state(back.clone()).good()), [(90, 1), (50, 1), (20, 1)]);
    let on = back.clone().into_iter().chain([committed(60, 2), formed(3, Some(point(60, 2)))]);
    assert_eq!(points(&state(on).candidates()), [(60, 2), (50, 1), (20, 1)]);

    // Damage goes back along the line, across generations.
    let hurt = back.into_iter().chain([committed(60, 2), damaged(60, 2), damaged(50, 1)]);
    assert_eq!(points(&state(hurt).candidates()), [(20, 1)]);

    // From the beginning means from the beginning.
    let anew = [formed(1, None), committed(50, 1), formed(2, None)];
    assert_eq!(points(&state(anew).candidates()), []);
}

#[test]
fn forming_a_generation_reopens_a_run_that_ended() {
    let done = [formed(1, None), committed(9, 1), completed(9, 1)];
    assert!(matches!(state(done.clone()).outcome(), Outcome::Completed { step: Step(9), .. }));
    assert_eq!(*state(done.into_iter().chain([formed(2, Some(point(9, 1)))])).outcome(), Outcome::Open);
    assert!(matches!(state([formed(1, None), failed(1)]).outcome(), Outcome::Failed { .. }));
}

// The rule book.

#[test]
fn an_older_holder_is_fenced_whatever_it_writes() {
    let state = state([formed(1, None), committed(9, 1), formed(2, Some(point(9, 1)))]);
    let fenced = Err(Refusal::Fenced { node: node("a"), generation: Generation(2) });
    let of_all_kinds = [
        committed(10, 1),
        notice(1, "x"),
        interrupted(1),
        completed(9, 1),
        failed(1),
        damaged(9, 1),
        cleared(9, 1),
        formed(3, None),
    ];
    for record in of_all_kinds {
        assert_eq!(admit(&state, held(1), &record), fenced, "{record:?}");
    }
    // Even if its record names the newest generation, or it never held one and writes on behalf of an older one.
    assert_eq!(admit(&state, held(1), &committed(10, 2)), fenced);
    assert_eq!(admit(&state, None, &committed(10, 1)), fenced);
    assert_eq!(admit(&state, held(2), &committed(10, 2)), Ok(()));
}

#[test]
fn only_the_holder_commits_and_ends_the_run() {
    let state = state([formed(1, None), committed(8, 1), committed(9, 1)]);
    for record in [committed(10, 1), completed(9, 1), failed(1)] {
        assert!(matches!(admit(&state, None, &record), Err(Refusal::Wrong(_))), "{record:?}");
        assert_eq!(admit(&state, held(1), &record), Ok(()), "{record:?}");
    }
    for record in [notice(1, "drain"), interrupted(1), damaged(9, 1), cleared(9, 1), formed(2, Some(point(9, 1)))] {
        assert_eq!(admit(&state, None, &record), Ok(()), "{record:?}");
    }
    // No record names a generation that does not exist.
    assert!(matches!(admit(&state, held(2), &committed(10, 2)), Err(Refusal::Wrong(_))));
}

#[test]
fn only_housekeeping_follows_the_end() {
    for end in [completed(20, 1), failed(1)] {
        let state = state([formed(1, None), committed(9, 1), committed(20, 1), end]);
        for record in [committed(21, 1), notice(1, "x"), interrupted(1), completed(20, 1), failed(1)] {
            assert!(matches!(admit(&state, held(1), &record), Err(Refusal::Wrong(_))), "{record:?}");
        }
        for record in [damaged(9, 1), cleared(9, 1), pruned(9, 1), formed(2, Some(point(20, 1)))] {
            assert_eq!(admit(&state, held(1), &record), Ok(()), "{record:?}");
        }
    }
}

#[test]
fn the_newest_good_checkpoint_and_the_one_resumed_from_are_never_pruned() {
    let mut records = vec![formed(1, None), committed(5, 1), committed(9, 1), formed(2, Some(point(9, 1)))];
    let refused = |records: &[Record], record: &Record| {
        matches!(admit(&state(records.iter().cloned()), None, record), Err(Refusal::Wrong(_)))
    };
    assert!(refused(&records, &pruned(9, 1)), "newest and resumed from");
    assert!(!refused(&records, &pruned(5, 1)));
    records.push(committed(12, 2));
    assert!(refused(&records, &pruned(9, 1)), "resumed from");
    assert!(refused(&records, &pruned(12, 2)), "newest");
    records.push(damaged(12, 2));
    assert!(!refused(&records, &pruned(12, 2)), "damaged, so of no use");
    records.extend([formed(3, Some(point(5, 1))), committed(6, 3)]);
    assert!(!refused(&records, &pruned(9, 1)), "the line left it behind");
    assert!(refused(&records, &pruned(5, 1)), "resumed from");
    records.push(completed(6, 3));
    assert!(!refused(&records, &pruned(5, 1)), "nothing lives on it");
    assert!(refused(&records, &pruned(6, 3)), "the result");
}

#[test]
fn a_generation_resumes_from_a_good_checkpoint_and_a_run_completes_at_one() {
    let state = state([formed(1, None), committed(5, 1), committed(9, 1), damaged(9, 1)]);
    let wrong = |record: &Record| matches!(admit(&state, held(1), record), Err(Refusal::Wrong(_)));
    assert!(wrong(&formed(2, Some(point(9, 1)))), "damaged");
    assert!(wrong(&formed(2, Some(point(7, 1)))), "never committed");
    assert!(!wrong(&formed(2, Some(point(5, 1)))));
    assert!(wrong(&formed(2, None)), "what was committed would be left behind unsaid");
    assert!(wrong(&completed(9, 1)) && wrong(&completed(10, 1)) && !wrong(&completed(5, 1)));
    let Record::Formed { generation, resume, overrides, reason, data, .. } = formed(2, None) else { unreachable!() };
    let world_size = crate::ids::WorldSize(1);
    assert!(wrong(&Record::Formed { generation, roster: Vec::new(), world_size, resume, overrides, reason, data }));
}

// Verdicts.

fn refused(records: &[Record], record: &Record) -> Option<String> {
    match admit(&state(records.iter().cloned()), None, record) {
        Ok(()) => None,
        Err(Refusal::Wrong(reason)) => Some(reason),
        Err(fenced) => panic!("{fenced:?}"),
    }
}

#[test]
fn the_last_good_checkpoint_is_never_condemned() {
    let mut records = vec![formed(1, None), committed(5, 1), committed(9, 1)];
    assert_eq!(refused(&records, &damaged(9, 1)), None);
    records.push(damaged(9, 1));
    assert!(refused(&records, &damaged(5, 1)).unwrap().contains("last good"));
    assert_eq!(refused(&records, &damaged(9, 1)), None, "what is condemned may be so once more");
    // A checkpoint that the run abandoned does not replace it.
    let turned = [formed(1, None), committed(5, 1), committed(9, 1), formed(2, Some(point(5, 1)))];
    assert!(refused(&turned, &damaged(5, 1)).unwrap().contains("last good"));
    assert_eq!(refused(&turned, &damaged(9, 1)), None);
}

#[test]
fn the_checkpoint_last_read_whole_is_never_condemned() {
    let mut records = vec![formed(1, None), committed(5, 1), committed(9, 1), formed(2, Some(point(9, 1)))];
    assert_eq!(refused(&records, &damaged(9, 1)), None, "nobody has trained from it yet");
    let told = |step: u64| -> Vec<Record> {
        let stopped = Record::Interrupted {
            generation: Generation(2),
            step: Step(step),
            committed: Some(Step(9)),
            lost_steps: step - 9,
            verdict: String::new(),
            drain: None,
        };
        records.iter().cloned().chain([stopped]).collect()
    };
    assert!(refused(&told(10), &damaged(9, 1)).unwrap().contains("read whole"), "a step was made from it");
    assert_eq!(refused(&told(9), &damaged(9, 1)), None, "it may have left before it had loaded it");
    records.push(committed(12, 2));
    assert!(refused(&records, &damaged(9, 1)).unwrap().contains("read whole"));
    assert_eq!((refused(&records, &damaged(12, 2)), refused(&records, &damaged(5, 1))), (None, None));
    // A later one that was read whole takes its place.
    records.extend([damaged(5, 1), cleared(5, 1)]);
    assert!(refused(&records, &damaged(5, 1)).unwrap().contains("read whole"));
    assert_eq!(refused(&records, &damaged(9, 1)), None);
    records.extend([formed(3, Some(point(12, 2))), committed(15, 3)]);
    assert!(refused(&records, &damaged(12, 2)).unwrap().contains("read whole"));
    assert_eq!(refused(&records, &damaged(5, 1)), None);
    // If it is pruned, the one before it counts.
    records.extend([completed(15, 3), pruned(12, 2)]);
    assert!(refused(&records, &damaged(5, 1)).unwrap().contains("read whole"));
}

#[test]
fn a_verdict_can_be_withdrawn() {
    let mut records = vec![formed(1, None), committed(5, 1), committed(9, 1), damaged(9, 1)];
    assert_eq!(points(&state(records.clone()).candidates()), [(5, 1)]);
    records.push(cleared(9, 1));
    let cleared_once = state(records.clone());
    assert_eq!(points(&cleared_once.candidates()), [(9, 1), (5, 1)]);
    assert_eq!(cleared_once.clearances().iter().map(|c| c.point.clone()).collect::<Vec<_>>(), [point(9, 1)]);
    // Withdrawing it twice changes nothing; a pruned checkpoint stays pruned.
    records.push(cleared(9, 1));
    assert_eq!(state(records.clone()).clearances().len(), 1);
    records.push(pruned(5, 1));
    assert!(refused(&records, &cleared(5, 1)).unwrap().contains("is pruned"));
    records.push(cleared(5, 1));
    assert_eq!(points(&state(records).candidates()), [(9, 1)]);
}
