//! The rules, each with a record that breaks it.

use super::{testing::*, *};
use crate::ids::{Generation, NodeId, NodeKey, Rank, Step, WorldSize};

fn points(checkpoints: &[&Checkpoint]) -> Vec<(u64, u64)> {
    checkpoints.iter().map(|c| (c.committed.step.get(), c.committed.generation.get())).collect()
}

fn held(generation: u64) -> Option<Generation> {
    Some(Generation(generation))
}

/// The rule book's word to node `a`.
fn admit(state: &RunState, held: Option<Generation>, record: &Record) -> Result<(), Refusal> {
    super::admit(state, &node("a"), held, record)
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
    let mut state = state([formed(1, None), committed(9, 1)]);
    let mut by_b = formed(2, Some(point(9, 1)));
    if let Record::Formed { roster, .. } = &mut by_b {
        *roster = vec![RosterEntry::new(node("b"), 2)];
    }
    state.apply(3, entry("b", by_b)).unwrap();
    let fenced = Err(Refusal::Fenced { node: node("b"), generation: Generation(2) });
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
    assert_eq!(super::admit(&state, &node("b"), held(2), &committed(10, 2)), Ok(()));
}

#[test]
fn only_members_commit_and_only_the_leader_speaks_of_the_end() {
    let state = state([formed(1, None), committed(8, 1), committed(9, 1)]);
    let by = |name: &str, held, record: &Record| super::admit(&state, &node(name), held, record);
    // Node a is a member that has not formed the generation through this very journal.
    assert_eq!(by("a", None, &committed(10, 1)), Ok(()));
    assert!(matches!(by("stranger", None, &committed(10, 1)), Err(Refusal::Wrong(_))));
    assert_eq!(by("a", held(1), &committed(10, 1)), Ok(()));
    for record in [completed(9, 1), failed(1), notice(1, "drain"), interrupted(1)] {
        assert!(matches!(by("a", None, &record), Err(Refusal::Wrong(_))), "{record:?}");
        assert_eq!(by("a", held(1), &record), Ok(()), "{record:?}");
    }
    for record in [damaged(9, 1), cleared(9, 1)] {
        assert_eq!(by("stranger", None, &record), Ok(()), "{record:?}");
    }
    assert_eq!(by("a", None, &formed(2, Some(point(9, 1)))), Ok(()));
    // A group is formed by its first node.
    assert!(matches!(by("stranger", None, &formed(2, Some(point(9, 1)))), Err(Refusal::Wrong(_))));
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
    let roster = Vec::new();
    let (continues, gone, joined) = (None, Vec::new(), Vec::new());
    let empty = Record::Formed {
        generation,
        roster,
        world_size,
        resume,
        overrides,
        reason,
        data,
        continues,
        gone,
        joined,
        why: None,
    };
    assert!(wrong(&empty));
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
            cap: None,
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

// Members.

/// A generation of these nodes, with this many workers each; it continues generation `continues`.
fn group(generation: u64, continues: Option<u64>, nodes: &[(&str, u32)]) -> Record {
    let mut next = 0;
    let roster: Vec<RosterEntry> = nodes
        .iter()
        .map(|(name, workers)| {
            let first_rank = Some(Rank(next));
            next += workers;
            let address = Some(format!("10.0.0.{next}:29400"));
            RosterEntry { first_rank, address, ..RosterEntry::new(node(name), *workers) }
        })
        .collect();
    Record::Formed {
        generation: Generation(generation),
        roster,
        world_size: WorldSize(next),
        resume: None,
        overrides: Vec::new(),
        reason: FormedReason::Started,
        data: None,
        continues: continues.map(Generation),
        gone: Vec::new(),
        joined: Vec::new(),
        why: None,
    }
}

/// The same with who came and who went.
fn changed(record: Record, went: &[&str], came: &[&str]) -> Record {
    match record {
        Record::Formed { generation, roster, world_size, resume, overrides, data, continues, .. } => Record::Formed {
            generation,
            roster,
            world_size,
            resume,
            overrides,
            data,
            continues,
            reason: FormedReason::NodeLost,
            gone: went.iter().map(|name| Gone { node: node(name), why: "it does not answer".into() }).collect(),
            joined: came.iter().map(|name| node(name)).collect(),
            why: None,
        },
        other => other,
    }
}

/// Nodes a and b; then b, which lost a and found c; then c alone, resumed by a person.
fn chain() -> Vec<Record> {
    vec![
        group(1, None, &[("a", 2), ("b", 2)]),
        committed(5, 1),
        changed(resumed(group(2, Some(1), &[("b", 2), ("c", 1)]), 5, 1), &["a"], &["c"]),
    ]
}

fn resumed(mut record: Record, step: u64, from: u64) -> Record {
    if let Record::Formed { resume, .. } = &mut record {
        *resume = Some(point(step, from));
    }
    record
}

/// The state after these, each `formed` written by the first of its nodes, and all else by node `a`.
fn told(records: impl IntoIterator<Item = Record>) -> RunState {
    let mut state = state([]);
    for record in records {
        let writer = match &record {
            Record::Formed { roster, .. } => roster[0].node.to_string(),
            _ => "a".to_owned(),
        };
        state.apply(state.next(), entry(&writer, record)).unwrap();
    }
    state
}

#[test]
fn the_state_knows_who_is_a_member_of_which_generation() {
    let state = told(chain());
    let is = |name: &str, generation| state.is_member(&node(name), Generation(generation));
    assert_eq!([is("a", 1), is("b", 1), is("c", 1), is("x", 1)], [true, true, false, false]);
    assert_eq!([is("a", 2), is("b", 2), is("c", 2), is("c", 3)], [false, true, true, false]);
    let formed = state.formed().unwrap();
    assert_eq!(formed.member(&node("c")).map(|member| member.first_rank), Some(Some(Rank(2))));
    assert_eq!(formed.succession.gone[0].node, node("a"));
    assert_eq!(state.formation(Generation(1)).unwrap().roster.len(), 2);
    assert_eq!(state.formation(Generation(3)), None);
}

#[test]
fn a_request_holds_for_the_generations_that_continue_the_one_that_was_asked() {
    let state = told(chain());
    assert_eq!(state.continued(Generation(2)), [Generation(1)]);
    assert!(state.heeds(Generation(1)) && state.heeds(Generation(2)));
    assert!(!state.heeds(Generation(0)) && !state.heeds(Generation(3)));
    // A person resumes.
    let state = told(chain().into_iter().chain([resumed(group(3, None, &[("d", 1), ("e", 1)]), 5, 1)]));
    assert_eq!(state.continued(Generation(3)), []);
    assert!(state.heeds(Generation(3)) && !state.heeds(Generation(2)) && !state.heeds(Generation(1)));
    // One node alone never says what it continues: the process that formed both went on.
    let alone = self::state([formed(1, None), formed(2, None), formed(3, None)]);
    assert_eq!(alone.continued(Generation(3)), [Generation(2), Generation(1)]);
    assert!(alone.heeds(Generation(1)));
    let mut another = self::state([formed(1, None)]);
    another.apply(2, entry("b", formed(2, None))).unwrap();
    assert!(!another.heeds(Generation(1)) && another.heeds(Generation(2)));
    assert!(!self::state([]).heeds(Generation(0)));
}

#[test]
fn a_follower_is_not_fenced_by_its_own_generation() {
    let state = told(chain());
    let of = |name: &str, generation| fenced(&state, &node(name), Generation(generation));
    // Node c has formed nothing and is at home; so is b, which the newest names, too.
    assert_eq!([of("b", 2), of("c", 2), of("b", 1)], [None, None, None]);
    // Node a slept; whoever never was a member has lost to another group.
    let (by, generation) = (node("b"), Generation(2));
    let why = "it does not answer".to_owned();
    assert_eq!(of("a", 1), Some(Refusal::LeftOut { node: by.clone(), generation, why: why.clone() }));
    assert_eq!(of("x", 1), Some(Refusal::Fenced { node: by.clone(), generation }));
    let left_out = Err(Refusal::LeftOut { node: by.clone(), generation, why });
    for record in [committed(9, 1), interrupted(1), notice(1, "x")] {
        assert_eq!(super::admit(&state, &node("a"), held(1), &record), left_out, "{record:?}");
    }
    assert_eq!(super::admit(&state, &node("a"), held(1), &damaged(5, 1)), left_out, "whatever it writes");
    // What a member of the newest still does for an older generation is fenced; the node is not.
    let late = Err(Refusal::Fenced { node: by, generation });
    assert_eq!(super::admit(&state, &node("b"), None, &committed(9, 1)), late);
    assert_eq!(super::admit(&state, &node("b"), held(1), &committed(9, 2)), Ok(()), "it led the older one");
    // In the next generation of a person a is fenced: its group does not go on.
    let resumed = told(chain().into_iter().chain([resumed(group(3, None, &[("d", 1), ("e", 1)]), 5, 1)]));
    let fenced_off = Refusal::Fenced { node: node("d"), generation: Generation(3) };
    assert_eq!(fenced(&resumed, &node("a"), Generation(1)), Some(fenced_off));
}

#[test]
fn a_follower_commits_and_says_nothing_of_the_end() {
    let state = told(chain());
    let by = |name: &str, record: &Record| super::admit(&state, &node(name), None, record);
    assert_eq!([by("b", &committed(9, 2)), by("c", &committed(9, 2))], [Ok(()), Ok(())]);
    assert!(matches!(by("x", &committed(9, 2)), Err(Refusal::Wrong(_))));
    for record in [interrupted(2), completed(5, 2), failed(2), notice(2, "sigterm")] {
        assert!(matches!(by("c", &record), Err(Refusal::Wrong(_))), "{record:?}");
        assert_eq!(super::admit(&state, &node("b"), held(2), &record), Ok(()), "{record:?}");
    }
    // Earlier versions let any node write these: they are still read.
    let mut old = told(chain());
    old.apply(old.next(), entry("x", notice(2, "sigterm"))).unwrap();
    old.apply(old.next(), entry("x", interrupted(2))).unwrap();
}

#[test]
fn a_node_that_was_left_out_comes_back_under_a_new_id() {
    let state = told(chain());
    let again = |name: &str| changed(group(3, Some(2), &[("b", 2), ("c", 1), (name, 2)]), &[], &[name]);
    let by_b = |record: &Record| super::admit(&state, &node("b"), held(2), record);
    assert_eq!(by_b(&resumed(again("new"), 5, 1)), Ok(()));
    let Err(Refusal::Wrong(reason)) = by_b(&resumed(again("a"), 5, 1)) else { panic!("it came back") };
    assert!(reason.contains("new id"), "{reason}");
}

#[test]
fn a_roster_that_is_none_is_neither_written_nor_read() {
    type Change = fn(&mut Vec<RosterEntry>);
    let with = |change: Change| match group(1, None, &[("a", 2), ("b", 2)]) {
        Record::Formed { generation, mut roster, world_size, resume, overrides, reason, data, .. } => {
            change(&mut roster);
            let (continues, gone, joined) = (None, Vec::new(), Vec::new());
            Record::Formed {
                generation,
                roster,
                world_size,
                resume,
                overrides,
                reason,
                data,
                continues,
                gone,
                joined,
                why: None,
            }
        }
        other => other,
    };
    let key = |digit: char| NodeKey::new(digit.to_string().repeat(64)).ok();
    let changes: [(Change, &str); 10] = [
        (|roster| roster[1].node = node("a"), "twice"),
        (|roster| roster[1].first_rank = Some(Rank(1)), "begin the ranks"),
        (|roster| roster[0].first_rank = None, "begin the ranks"),
        (|roster| roster[1].first_rank = Some(Rank(3)), "begin the ranks"),
        (|roster| roster[1].workers = 3, "world of 4"),
        (|roster| roster[1].workers = u32::MAX, "world of 4"),
        (|roster| roster[1].address = Some(String::new()), "an address that is none"),
        (|roster| roster[1].address = Some("a b:1".into()), "an address that is none"),
        (|roster| roster[1].address = Some("x".repeat(261)), "an address that is none"),
        (
            |roster| {
                let spare =
                    |n: u32| RosterEntry { first_rank: Some(Rank(4)), ..RosterEntry::new(node(&n.to_string()), 0) };
                roster.extend((0..4096).map(spare));
            },
            "more than 4096",
        ),
    ];
    for (change, part) in changes {
        let error = state([]).apply(1, entry("a", with(change))).unwrap_err().to_string();
        assert!(error.contains(part), "{part}: {error}");
    }
    let keys = |first, second| {
        let Record::Formed { generation, mut roster, world_size, resume, overrides, reason, data, .. } = with(|_| {})
        else {
            unreachable!()
        };
        (roster[0].key, roster[1].key) = (key(first), key(second));
        let (continues, gone, joined) = (None, Vec::new(), Vec::new());
        Record::Formed {
            generation,
            roster,
            world_size,
            resume,
            overrides,
            reason,
            data,
            continues,
            gone,
            joined,
            why: None,
        }
    };
    assert!(state([]).apply(1, entry("a", keys('a', 'a'))).unwrap_err().to_string().contains("one key"));
    state([]).apply(1, entry("a", keys('a', 'b'))).unwrap();
    // Without ranks, with an IPv6 address, and with a spare.
    state([]).apply(1, entry("a", with(|roster| roster.iter_mut().for_each(|m| m.first_rank = None)))).unwrap();
    state([]).apply(1, entry("a", with(|roster| roster[1].address = Some("[fe80::1]:29400".into())))).unwrap();
    let spare = |roster: &mut Vec<RosterEntry>| {
        roster.push(RosterEntry { first_rank: Some(Rank(4)), ..RosterEntry::new(node("c"), 0) });
    };
    state([]).apply(1, entry("a", with(spare))).unwrap();
}

#[test]
fn a_generation_accounts_for_everyone_of_the_one_that_it_continues() {
    let next =
        |continues, went: &[&str], came: &[&str]| changed(group(2, continues, &[("b", 2), ("c", 1)]), went, came);
    let first = group(1, None, &[("a", 2), ("b", 2)]);
    let refused = |record: Record| told([first.clone()]).apply(2, entry("b", record)).map_err(|e| e.to_string());
    assert_eq!(refused(next(Some(1), &["a"], &["c"])), Ok(()));
    for (record, part) in [
        (next(Some(1), &[], &["c"]), "that are gone"),
        (next(Some(1), &["a", "b"], &["c"]), "that are gone"),
        (next(Some(1), &["a", "a"], &["c"]), "that are gone"),
        (next(Some(1), &["a"], &[]), "did not have"),
        (next(Some(1), &["a"], &["b", "c"]), "did not have"),
        (next(Some(1), &["a"], &["c", "c"]), "did not have"),
        (next(Some(0), &["a"], &["c"]), "continues generation 0 after generation 1"),
        (next(Some(2), &["a"], &["c"]), "continues generation 2 after generation 1"),
        (next(None, &["a"], &[]), "continues no generation"),
        (next(None, &[], &["c"]), "continues no generation"),
    ] {
        assert!(refused(record).unwrap_err().contains(part), "{part}");
    }
    for why in [String::new(), "two\nlines".into(), "x".repeat(501)] {
        let Record::Formed {
            generation, roster, world_size, resume, overrides, reason, data, continues, joined, ..
        } = next(Some(1), &["a"], &["c"])
        else {
            unreachable!()
        };
        let gone = vec![Gone { node: node("a"), why }];
        let record = Record::Formed {
            generation,
            roster,
            world_size,
            resume,
            overrides,
            reason,
            data,
            continues,
            gone,
            joined,
            why: None,
        };
        assert!(refused(record).unwrap_err().contains("in a short line"));
    }
    // Only the newest can be continued.
    let third = changed(group(3, Some(1), &[("a", 2), ("b", 2)]), &[], &[]);
    let error = told([first.clone(), next(Some(1), &["a"], &["c"])]).apply(3, entry("a", third)).unwrap_err();
    assert!(error.to_string().contains("continues generation 1 after generation 2"), "{error}");
}

#[test]
fn a_formation_is_written_in_the_lowest_format_that_has_its_words() {
    assert_eq!(formed(1, None).format(), 1);
    assert_eq!(group(1, None, &[("a", 1)]).format(), 4, "it has a place");
    type Change = fn(&mut Vec<RosterEntry>, &mut FormedReason, &mut Succession);
    let changes: [Change; 9] = [
        |roster, _, _| roster.push(RosterEntry::new(node("b"), 1)),
        |roster, _, _| roster[0].first_rank = Some(Rank(0)),
        |roster, _, _| roster[0].address = Some("h:1".into()),
        |roster, _, _| roster[0].key = NodeKey::new("0".repeat(64)).ok(),
        |_, reason, _| *reason = FormedReason::NodeLost,
        |_, reason, _| *reason = FormedReason::NodeLeft,
        |_, reason, _| *reason = FormedReason::NodeJoined,
        |_, _, succession| succession.continues = Some(Generation(1)),
        |_, _, succession| succession.joined = vec![node("a")],
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let Record::Formed { generation, mut roster, world_size, resume, overrides, mut reason, data, .. } =
            formed(2, None)
        else {
            unreachable!()
        };
        let mut succession = Succession::default();
        change(&mut roster, &mut reason, &mut succession);
        let Succession { continues, gone, joined, why } = succession;
        let record = Record::Formed {
            generation,
            roster,
            world_size,
            resume,
            overrides,
            reason,
            data,
            continues,
            gone,
            joined,
            why,
        };
        assert_eq!(record.format(), 4, "{number}");
        let stored = entry("a", record);
        let body = stored.encode().unwrap();
        assert_eq!(Entry::decode(&body).unwrap(), stored, "{number}");
        let older = String::from_utf8(body).unwrap().replace("\"format\":4", "\"format\":1");
        assert!(Entry::decode(older.as_bytes()).is_err(), "an older program would not know it to be newer");
    }
}

#[test]
fn a_node_alone_is_written_as_ever() {
    let text = serde_json::to_string(&formed(1, None)).unwrap();
    let as_ever = r#"{"kind":"formed","generation":1,"roster":[{"node":"a","workers":2}],"world_size":2,"resume":null,"overrides":[["train.steps","1"]],"reason":"started"}"#;
    assert_eq!(text, as_ever);
    let id: NodeId = node("a");
    assert!(state([formed(1, None)]).is_member(&id, Generation(1)));
}
