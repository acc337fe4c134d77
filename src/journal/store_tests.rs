//! Journals on stores that race, fail and give wrong answers.

use std::{collections::HashSet, sync::Arc};

use bytes::Bytes;

use super::{testing::*, *};
use crate::{
    error::{Explain, Kind},
    ids::{Generation, NodeId},
    layout,
    storage::{
        Store,
        faulty::{Fault, Faulty},
    },
};

fn points(checkpoints: &[&Checkpoint]) -> Vec<(u64, u64)> {
    checkpoints.iter().map(|c| (c.committed.step.get(), c.committed.generation.get())).collect()
}

fn held(generation: u64) -> Option<Generation> {
    Some(Generation(generation))
}

async fn on_every_store<F: Future<Output = ()>>(test: impl Fn(Store) -> F) {
    test(memory()).await;
    let folder = tempfile::tempdir().unwrap();
    let uri = format!("file://{}", folder.path().display());
    test(Store::open(&uri, &settings()).unwrap().folder("run")).await;
    let (store, _server) = crate::storage::s3_tests::atomic();
    test(store.folder("run")).await;
}

#[tokio::test]
async fn a_run_is_created_once() {
    on_every_store(|store| async move {
        let creates = (0..8).map(|i| {
            let store = store.clone();
            tokio::spawn(Journal::create(store, node(&format!("n{i}")), run_id(), config()))
        });
        let mut won = 0;
        for result in futures::future::join_all(creates).await {
            match result.unwrap() {
                Ok(journal) => {
                    won += 1;
                    assert_eq!(journal.state().next(), 1);
                }
                Err(error @ JournalError::Exists { .. }) => {
                    assert_eq!(error.kind(), Kind::Usage);
                    assert!(error.hint().unwrap().contains("trainer resume --run-id run"));
                }
                Err(error) => panic!("{error:?}"),
            }
        }
        assert_eq!(won, 1);
        assert_eq!(opened(&store, "b").await.state().config(), &config());
    })
    .await;
}

#[tokio::test]
async fn a_missing_run_differs_from_a_damaged_one() {
    let error = Journal::open(memory(), node("a"), run_id()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Config);
    assert!(error.hint().unwrap().contains("trainer runs"));
    assert!(error.to_string().contains("run id run does not exist in store memory:"), "{error}");
}

#[tokio::test]
async fn the_journal_of_another_run_is_not_called_damaged() {
    on_every_store(|store| async move {
        new_run(&store).await;
        let other = crate::ids::RunId::new("copy").unwrap();
        let error = Journal::open(store.clone(), node("a"), other).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Config, "{error}");
        assert!(error.to_string().contains("holds run run, not copy"), "{error}");
        let hint = error.hint().unwrap();
        assert!(hint.contains("name the folder run") && hint.contains("--run-id copy"), "{hint}");
    })
    .await;
}

#[tokio::test]
async fn many_writers_lose_nothing_and_leave_no_gap() {
    const WRITERS: usize = 8;
    const RECORDS: usize = 12;
    on_every_store(|store| async move {
        let mut first = new_run(&store).await;
        first.form(forming("a", None)).await.unwrap();
        let writers = (0..WRITERS).map(|writer| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut journal = opened(&store, &format!("n{writer}")).await.leading();
                let mut numbers = Vec::new();
                for i in 0..RECORDS {
                    numbers.push(journal.append(notice(1, &format!("{writer}.{i}"))).await.unwrap());
                }
                numbers
            })
        });
        let numbers: Vec<Vec<u64>> =
            futures::future::join_all(writers).await.into_iter().map(|numbers| numbers.unwrap()).collect();
        let state = replay(&store, &run_id()).await.unwrap();
        assert_eq!(state.next() as usize, 2 + WRITERS * RECORDS);
        let found: HashSet<_> = state.notices().iter().map(|n| n.source.clone()).collect();
        assert_eq!(found.len(), WRITERS * RECORDS, "none twice, none missing");
        for (writer, numbers) in numbers.iter().enumerate() {
            for (i, number) in numbers.iter().enumerate() {
                let notice = state.notices().iter().find(|n| n.number == *number).unwrap();
                assert_eq!(notice.source, format!("{writer}.{i}"), "it stands where its writer was told");
            }
        }
        assert_eq!(first.refresh().await.unwrap() as usize, WRITERS * RECORDS);
        assert_eq!(first.state(), &state);
    })
    .await;
}

#[tokio::test]
async fn a_writer_of_an_older_generation_is_fenced() {
    on_every_store(|store| async move {
        let mut a = new_run(&store).await;
        assert_eq!(a.form(forming("a", None)).await.unwrap(), Generation(1));
        a.append(committed(10, 1)).await.unwrap();
        let mut b = opened(&store, "b").await;
        assert_eq!(b.form(forming("b", Some(point(10, 1)))).await.unwrap(), Generation(2));

        for record in [committed(20, 1), notice(1, "late"), failed(1), damaged(10, 1)] {
            match a.append(record).await {
                Err(error @ JournalError::Fenced { .. }) => {
                    assert_eq!(error.kind(), Kind::Fenced);
                    assert_eq!(error.to_string(), "fenced: node b formed generation 2 of this run");
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(a.form(forming("a", None)).await, Err(JournalError::Overtaken { .. })));
        b.append(committed(20, 2)).await.unwrap();
        assert_eq!(points(&replay(&store, &run_id()).await.unwrap().candidates()), [(20, 2), (10, 1)]);
    })
    .await;
}

#[tokio::test]
async fn if_two_nodes_form_at_once_one_is_overtaken() {
    let store = memory();
    new_run(&store).await;
    let (mut a, mut b) = (opened(&store, "a").await, opened(&store, "b").await);
    a.form(forming("a", None)).await.unwrap();
    match b.form(forming("b", None)).await {
        Err(JournalError::Overtaken { node, generation }) => {
            assert_eq!((node, generation), (NodeId::new("a").unwrap(), Generation(1)));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!((b.held(), a.held()), (None, held(1)));
    // Having looked at a's heartbeat, it may.
    assert_eq!(b.form(forming("b", None)).await.unwrap(), Generation(2));
}

#[tokio::test]
async fn a_resume_point_that_is_no_longer_the_newest_is_not_used() {
    let store = memory();
    let mut a = new_run(&store).await;
    a.form(forming("a", None)).await.unwrap();
    a.append(committed(10, 1)).await.unwrap();
    let mut b = opened(&store, "b").await;
    // b has chosen step 10; before it forms, a commits step 20.
    a.append(committed(20, 1)).await.unwrap();
    match b.form(forming("b", Some(point(10, 1)))).await {
        Err(JournalError::Moved { what, .. }) => assert!(what.contains("committed"), "{what}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(b.state().newest().unwrap().point(), point(20, 1));
    // A notice changes nothing about the choice.
    a.append(notice(1, "sigterm")).await.unwrap();
    assert_eq!(b.form(forming("b", Some(point(20, 1)))).await.unwrap(), Generation(2));
}

/// Another task of the same process has read on since: the journal itself meets no record that it does not know.
#[tokio::test]
async fn a_choice_made_from_an_earlier_state_forms_nothing() {
    let store = memory();
    let mut a = new_run(&store).await;
    a.form(forming("a", None)).await.unwrap();
    a.append(committed(10, 1)).await.unwrap();
    let mut b = opened(&store, "b").await;
    let basis = b.state().basis();
    a.append(committed(20, 1)).await.unwrap();
    b.refresh().await.unwrap();
    match b.form_upon(forming("b", Some(point(10, 1))), &basis).await {
        Err(JournalError::Moved { generation, .. }) => assert_eq!(generation, Generation(2)),
        other => panic!("{other:?}"),
    }
    let basis = b.state().basis();
    a.append(notice(1, "sigterm")).await.unwrap();
    b.refresh().await.unwrap();
    assert_eq!(b.form_upon(forming("b", Some(point(20, 1))), &basis).await.unwrap(), Generation(2));
    // One proposal of a generation does not become the one behind it.
    let mut c = opened(&store, "c").await;
    match c.form_upon(forming("c", Some(point(20, 1))), &basis).await {
        Err(JournalError::Overtaken { node, generation }) => {
            assert_eq!((node, generation), (NodeId::new("b").unwrap(), Generation(2)));
        }
        other => panic!("{other:?}"),
    }
    let basis = c.state().basis();
    b.append(completed(20, 2)).await.unwrap();
    c.refresh().await.unwrap();
    let ended = c.form_upon(forming("c", Some(point(20, 1))), &basis).await;
    assert!(matches!(ended, Err(JournalError::Moved { .. })), "{ended:?}");
}

#[tokio::test]
async fn an_append_whose_answer_was_lost_is_written_once() {
    let faulty = Faulty::new(|op, _, n| if op == "create" && n % 2 == 1 { Fault::AnswerLost } else { Fault::Pass });
    let store = Store::faulty(&faulty, &settings()).folder("run");
    let mut a = new_run(&store).await;
    a.form(forming("a", None)).await.unwrap();
    for step in 1..20 {
        assert_eq!(a.append(committed(step, 1)).await.unwrap(), step + 1);
    }
    let state = replay(&store, &run_id()).await.unwrap();
    assert_eq!((state.next(), state.checkpoints().len()), (21, 19));
}

/// A store on which creates number `from` to `to` succeed without an answer, so that the store's own retry fails too.
fn deaf(from: usize, to: usize, fault: Fault) -> (Arc<Faulty>, Store) {
    let faulty =
        Faulty::new(move |op, _, n| if op == "create" && (from..to).contains(&n) { fault } else { Fault::Pass });
    let store = Store::faulty(&faulty, &settings()).folder("run");
    (faulty, store)
}

#[tokio::test]
async fn an_append_that_failed_can_be_repeated_and_is_written_once() {
    for (fault, refresh) in
        [(Fault::AnswerLost, false), (Fault::AnswerLost, true), (Fault::Lost, false), (Fault::Lost, true)]
    {
        // Creates 0 and 1 are `created` and `formed`; then one append's five attempts.
        let (_, store) = deaf(2, 7, fault);
        let mut a = new_run(&store).await;
        a.form(forming("a", None)).await.unwrap();
        let failed = a.append(committed(5, 1)).await.unwrap_err();
        assert_eq!(failed.kind(), Kind::Unavailable);
        if refresh {
            a.refresh().await.unwrap();
        }
        assert_eq!(a.append(committed(5, 1)).await.unwrap(), 2, "{fault:?} {refresh}");
        assert_eq!(a.append(committed(6, 1)).await.unwrap(), 3);
        assert_eq!(points(&replay(&store, &run_id()).await.unwrap().good()), [(6, 1), (5, 1)]);
    }
}

#[tokio::test]
async fn two_commits_of_one_manifest_are_the_same_commit() {
    // A save whose record seemed to fail is tried again: its times differ, its manifest does not.
    let again = |durable_s| match committed(5, 1) {
        Record::Committed(first) => {
            Record::Committed(Committed { cost: SaveCost { durable_s, ..first.cost }, ..first })
        }
        other => other,
    };
    for fault in [Fault::AnswerLost, Fault::Lost] {
        let (_, store) = deaf(2, 7, fault);
        let mut a = new_run(&store).await;
        a.form(forming("a", None)).await.unwrap();
        a.append(again(1.0)).await.unwrap_err();
        assert_eq!(a.append(again(2.0)).await.unwrap(), 2, "{fault:?}");
        assert_eq!(a.append(again(3.0)).await.unwrap(), 2, "{fault:?}");
        // Also if it has been fenced since: the record exists.
        let mut b = opened(&store, "b").await;
        b.form(forming("b", Some(point(5, 1)))).await.unwrap();
        a.refresh().await.unwrap();
        assert_eq!(a.append(again(4.0)).await.unwrap(), 2, "{fault:?}");
        assert!(matches!(a.append(committed(6, 1)).await, Err(JournalError::Fenced { .. })));
        assert_eq!(replay(&store, &run_id()).await.unwrap().checkpoints().len(), 1);
    }
}

#[tokio::test]
async fn a_journal_with_the_highest_number_is_an_error_and_no_panic() {
    let store = memory();
    let mut a = new_run(&store).await;
    let last = Entry { record: formed(u64::MAX, None), ..entry("a", created()) };
    store.put(&layout::journal_entry(1), last.encode().unwrap().into()).await.unwrap();
    a.refresh().await.unwrap();
    assert!(matches!(a.form(forming("a", None)).await, Err(JournalError::Refused { .. })));
}

#[tokio::test]
async fn a_generation_whose_formation_seemed_to_fail_is_held_once_its_record_is_read() {
    let (_, store) = deaf(1, 6, Fault::AnswerLost);
    let mut a = new_run(&store).await;
    assert_eq!(a.form(forming("a", None)).await.unwrap_err().kind(), Kind::Unavailable);
    assert_eq!(a.held(), None);
    a.refresh().await.unwrap();
    assert_eq!(a.held(), held(1));
    a.append(committed(1, 1)).await.unwrap();

    let (_, store) = deaf(1, 6, Fault::AnswerLost);
    let mut a = new_run(&store).await;
    a.form(forming("a", None)).await.unwrap_err();
    assert_eq!(a.form(forming("a", None)).await.unwrap(), Generation(1), "repeated, it is the same one");
}

#[tokio::test]
async fn a_dropped_append_is_settled_like_a_lost_answer() {
    // The create happens, and its future is dropped while it waits for the answer.
    let faulty = Faulty::new(|op, _, n| if op == "get" && n == 0 { Fault::Hang } else { Fault::Pass });
    let store = Store::faulty(&faulty, &settings()).folder("run");
    let mut a = new_run(&store).await;
    a.form(forming("a", None)).await.unwrap();
    let mut b = opened_without_reading(&store).await;
    // b takes a's number, so a's create reads the record there, and hangs.
    b.append(notice(1, "b")).await.unwrap();
    {
        let append = a.append(notice(1, "a"));
        tokio::pin!(append);
        while faulty.count("get") == 0 {
            assert!(futures::poll!(&mut append).is_pending());
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(a.append(notice(1, "a")).await.unwrap(), 3);
    let sources: Vec<_> = replay(&store, &run_id()).await.unwrap().notices().iter().map(|n| n.source.clone()).collect();
    assert_eq!(sources, ["b", "a"]);

    /// Node b, which has read the records through another door: the faulty one counts.
    async fn opened_without_reading(store: &Store) -> Journal {
        let mut journal = Journal::create(memory(), node("b"), run_id(), config()).await.unwrap();
        journal.form(forming("b", None)).await.unwrap();
        journal.moved_to(store.clone())
    }
}

#[tokio::test]
async fn a_dropped_append_that_arrives_late_is_one_more_record_for_the_next() {
    // The notice is put, its answer is lost, and its future is dropped while the store asks whose record has the
    // number.
    let faulty = Faulty::new(|op, _, n| match (op, n) {
        ("create", 2) => Fault::AnswerLost,
        ("get", 0) => Fault::Hang,
        _ => Fault::Pass,
    });
    let store = Store::faulty(&faulty, &settings()).folder("run");
    let mut a = new_run(&store).await;
    a.form(forming("a", None)).await.unwrap();
    {
        let append = a.append(notice(1, "sigterm"));
        tokio::pin!(append);
        while faulty.count("get") == 0 {
            assert!(futures::poll!(&mut append).is_pending());
            tokio::task::yield_now().await;
        }
    }
    // It is given up for good: the next record is a different one.
    assert_eq!(a.append(committed(5, 1)).await.unwrap(), 3);
    let state = replay(&store, &run_id()).await.unwrap();
    assert_eq!((state.next(), state.notices().len(), points(&state.good())), (4, 1, vec![(5, 1)]));
}

#[tokio::test]
async fn a_refused_record_is_not_written() {
    let store = memory();
    let mut a = new_run(&store).await;
    a.form(forming("a", None)).await.unwrap();
    a.append(committed(5, 1)).await.unwrap();
    let Record::Committed(first) = committed(5, 1) else { unreachable!() };
    let other = Record::Committed(Committed { manifest_crc64: "fedcba9876543210".into(), ..first });
    for record in [other, pruned(5, 1), completed(6, 1), created(), formed(2, None)] {
        let error = a.append(record).await.unwrap_err();
        assert!(matches!(error, JournalError::Refused { .. }), "{error:?}");
    }
    assert_eq!(replay(&store, &run_id()).await.unwrap().next(), 3);
}

#[tokio::test]
async fn damage_names_its_object() {
    let key = |number| format!("memory:///run/{}", layout::journal_entry(number));
    let newer = Entry { format: FORMAT + 1, ..entry("a", notice(1, "x")) };
    let encoded = |entry: &Entry| Bytes::from(serde_json::to_vec(entry).unwrap());
    let cases: Vec<(u64, Option<Bytes>, &str)> = vec![
        (0, None, "is missing"),
        (2, None, "is missing"),
        (2, Some(Bytes::new()), "not a journal record"),
        (2, Some(Bytes::from_static(b"\xff\x00garbage")), "not a journal record"),
        (2, Some(Bytes::from(vec![b'['; 100_000])), "not a journal record"),
        (2, Some(Bytes::from(vec![b' '; (4 << 20) + 1])), "too large"),
        (2, Some(encoded(&newer)), "format 8"),
        (2, Some(encoded(&entry("a", created()))), "only the first"),
        (2, Some(encoded(&entry("a", committed(9, 7)))), "while 1 is the newest"),
        (0, Some(encoded(&entry("a", notice(1, "x")))), "not created"),
    ];
    for (number, body, part) in cases {
        let store = memory();
        let mut a = new_run(&store).await;
        a.form(forming("a", None)).await.unwrap();
        a.append(committed(5, 1)).await.unwrap();
        a.append(notice(1, "x")).await.unwrap();
        match body {
            Some(body) => store.put(&layout::journal_entry(number), body).await.unwrap(),
            None => store.delete(&layout::journal_entry(number)).await.unwrap(),
        }
        let error = replay(&store, &run_id()).await.unwrap_err();
        let text = crate::error::Error::from(error).to_string();
        assert!(text.contains(&key(number)) && text.contains(part), "{text}");
    }
}

#[tokio::test]
async fn other_objects_in_the_folder_are_not_records() {
    let store = memory();
    new_run(&store).await;
    for name in ["journal/5.json", "journal/notes.txt", "journal/99999999999999999999.json"] {
        store.put(name, Bytes::from_static(b"x")).await.unwrap();
    }
    assert_eq!(replay(&store, &run_id()).await.unwrap().next(), 1);
    // But a distant number is one, and those in between are missing.
    store.put("journal/10000000000000000000.json", Bytes::from_static(b"x")).await.unwrap();
    let error = replay(&store, &run_id()).await.unwrap_err().to_string();
    assert!(error.contains("00000000000000000001.json") && error.contains("missing"), "{error}");
}

#[tokio::test]
async fn a_listing_may_miss_records_but_cannot_hide_a_gap() {
    let hidden = layout::journal_entry(2);
    let faulty = Faulty::new(move |op, path, _| match op {
        "listed" if path.ends_with(&hidden) => Fault::Lost,
        _ => Fault::Pass,
    });
    let store = Store::faulty(&faulty, &settings()).folder("run");
    let mut a = new_run(&store).await;
    a.form(forming("a", None)).await.unwrap();
    for step in 1..5 {
        a.append(committed(step, 1)).await.unwrap();
    }
    assert_eq!(replay(&store, &run_id()).await.unwrap().next(), 6);
    // Listed: 0, 1 and 5. Present: 0, 1, 2 and 5.
    for number in [3, 4] {
        store.delete(&layout::journal_entry(number)).await.unwrap();
    }
    let error = replay(&store, &run_id()).await.unwrap_err().to_string();
    assert!(error.contains("00000000000000000003.json") && error.contains("missing"), "{error}");
}

#[tokio::test]
async fn our_own_record_is_recognised_by_its_attempt_under_any_number() {
    let (_, store) = deaf(2, 7, Fault::AnswerLost);
    let mut a = new_run(&store).await;
    a.form(forming("a", None)).await.unwrap();
    a.append(committed(5, 1)).await.unwrap_err();
    let (here, next) = (layout::journal_entry(2), layout::journal_entry(3));
    let ours = store.get(&here, MAX_ENTRY).await.unwrap();
    store.put(&next, ours).await.unwrap();
    store.put(&here, Bytes::from(entry("b", notice(1, "x")).encode().unwrap())).await.unwrap();
    assert_eq!(a.append(committed(5, 1)).await.unwrap(), 3);
    assert_eq!(replay(&store, &run_id()).await.unwrap().next(), 4);
}

#[tokio::test]
async fn a_run_id_with_leftovers_of_another_journal_is_not_used() {
    let store = memory();
    store.put(&layout::journal_entry(3), Bytes::from_static(b"x")).await.unwrap();
    let error = Journal::create(store, node("a"), run_id(), config()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Data);
}

#[tokio::test]
async fn a_run_is_a_folder_with_a_first_record() {
    let root = Store::open("memory://", &settings()).unwrap();
    assert_eq!(list_runs(&root).await.unwrap(), []);
    for name in ["b", "a10", "a9"] {
        let run_id = crate::ids::RunId::new(name).unwrap();
        Journal::create(root.folder(name), node("a"), run_id, config()).await.unwrap();
    }
    root.put("data/shard", Bytes::new()).await.unwrap();
    root.put(".trainer-probes/journal/00000000000000000000.json", Bytes::new()).await.unwrap();
    let names: Vec<_> = list_runs(&root).await.unwrap().iter().map(ToString::to_string).collect();
    assert_eq!(names, ["a10", "a9", "b"]);
}

// Two writers in every order against a small model.

#[derive(Clone, Copy, Debug)]
enum Does {
    Form,
    Commit,
    Refresh,
}

/// The whole protocol in a few lines. A generation is the number of formations before it; only the last former may add
/// records; a writer forms only if it knows all records. A writer tries no record that it knows to be wrong.
#[derive(Default)]
struct Model {
    log: Vec<Does>,
    seen: [usize; 2],
    holds: [u64; 2],
}

impl Model {
    fn generation(&self, upto: usize) -> u64 {
        self.log[..upto].iter().filter(|does| matches!(does, Does::Form)).count() as u64
    }

    fn step(&mut self, who: usize, does: Does) -> bool {
        let (known, holds) = (self.seen[who], self.holds[who]);
        let may = |newest: u64| matches!(does, Does::Form) && holds == 0 || holds == newest && holds != 0;
        let tries = matches!(does, Does::Refresh) || may(self.generation(known));
        if tries {
            self.seen[who] = self.log.len();
        }
        let newest = self.generation(self.log.len());
        let done = tries
            && match does {
                Does::Refresh => return true,
                Does::Form => known == self.log.len(),
                Does::Commit => may(newest),
            };
        if done {
            self.log.push(does);
            self.seen[who] += 1;
            if matches!(does, Does::Form) {
                self.holds[who] = newest + 1;
            }
        }
        done
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]
    #[test]
    fn two_writers_in_any_order_do_what_the_model_does(
        script in proptest::collection::vec(
            (0_usize..2, proptest::sample::select(vec![Does::Form, Does::Commit, Does::Commit, Does::Refresh])),
            1..40,
        )
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let store = memory();
            new_run(&store).await;
            let mut journals = [opened(&store, "n0").await, opened(&store, "n1").await];
            let mut model = Model::default();
            for (step, (who, does)) in script.into_iter().enumerate() {
                let journal = &mut journals[who];
                let holds = journal.held().map_or(0, Generation::get);
                let went_well = match does {
                    Does::Refresh => journal.refresh().await.map(drop),
                    Does::Form => {
                        let resume = journal.state().newest().map(Checkpoint::point);
                        journal.form(forming(&format!("n{who}"), resume)).await.map(drop)
                    }
                    Does::Commit => journal.append(committed(step as u64 + 1, holds)).await.map(drop),
                };
                let expected = model.step(who, does);
                assert_eq!(went_well.is_ok(), expected, "step {step}: n{who} {does:?}: {went_well:?}");
            }
            let state = replay(&store, &run_id()).await.unwrap();
            assert_eq!(state.next() as usize, 1 + model.log.len());
            assert_eq!(state.generation().get(), model.generation(model.log.len()));
            let commits = model.log.iter().filter(|does| matches!(does, Does::Commit)).count();
            assert_eq!(state.checkpoints().len(), commits);
        });
    }
}

/// One bit of a record flips on its way: in its kind, in its content, or in its format.
#[tokio::test]
async fn a_garbled_record_is_read_again_before_it_is_reported() {
    use crate::storage::s3_tests::{
        self,
        proxy::{self, FaultProxy, Often, Rule},
    };
    let (direct, server) = s3_tests::atomic();
    let upstream = server.address();
    let proxy = std::thread::spawn(move || FaultProxy::start(upstream, 0)).join().unwrap();
    let store = s3_tests::client(&proxy.endpoint(), &settings()).folder("run");
    let mut writer = new_run(&direct.folder("run")).await;
    let early = writer.state().clone();
    writer.form(forming("a", None)).await.unwrap();
    writer.append(committed(5, 1)).await.unwrap();
    writer.append(notice(1, "x")).await.unwrap();
    let text = String::from_utf8(store.get(&layout::journal_entry(2), 1 << 20).await.unwrap().to_vec()).unwrap();
    let at = |part: &str| text.find(part).unwrap() + part.len();
    let places = [
        ("no JSON", 0),
        // 1 becomes 0, a generation that never existed. To become 3 (bit 1) two bits must flip, so the kind is garbled
        // instead.
        ("a generation that was not formed", at("\"generation\":")),
        ("a kind that is none", at("\"kind\":\"")),
    ];
    for (what, place) in places {
        let garble = |times| {
            let target = "00000000000000000002.json";
            proxy.arm(Rule {
                method: "GET",
                target,
                fault: proxy::Fault::FlipResponse(place),
                often: Often::Next(times),
            });
        };
        let before = proxy.broken();
        garble(1);
        let state = replay(&store, &run_id()).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!((state.next(), proxy.broken() - before), (4, 1), "{what}");
        // Garbled twice in the same way: the store holds it like that.
        garble(2);
        let error = replay(&store, &run_id()).await.unwrap_err();
        assert_eq!((error.kind(), proxy.broken() - before), (Kind::Data, 3), "{what}");
        assert!(error.to_string().contains("run/journal/00000000000000000002.json"), "{what}: {error}");
        assert!(!error.hint().unwrap().contains(".bad"), "others are built on it: {error:?}");
        // A reader that continues meets it, too.
        garble(1);
        let follower = Journal::follow(store.clone(), node("b"), early.clone()).await;
        let follower = follower.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!((follower.state().next(), proxy.broken() - before), (4, 4), "{what}");
    }
    // So does a writer that appends, and finds another's record in its place.
    let mut late = Journal::open(store.clone(), node("a"), run_id()).await.unwrap().leading();
    writer.append(notice(1, "y")).await.unwrap();
    let target = "00000000000000000004.json";
    // The first request asks whether the record there is its own.
    proxy.arm(Rule { method: "GET", target, fault: proxy::Fault::FlipResponse(0), often: Often::Next(2) });
    assert_eq!(late.append(notice(1, "z")).await.unwrap(), 5);
    assert_eq!(late.state().notices().len(), 3);
}

#[tokio::test]
async fn a_garbled_newest_record_comes_with_the_command_that_moves_it_away() {
    let folder = tempfile::tempdir().unwrap();
    let uri = format!("file://{}", folder.path().display());
    let store = Store::open(&uri, &settings()).unwrap().folder("run");
    let mut a = new_run(&store).await;
    a.form(forming("a", None)).await.unwrap();
    store.put(&layout::journal_entry(2), Bytes::from_static(b"not ours")).await.unwrap();
    let errors = [a.append(notice(1, "x")).await.unwrap_err(), replay(&store, &run_id()).await.unwrap_err()];
    for error in errors {
        assert_eq!(error.kind(), Kind::Data);
        let hint = error.hint().unwrap();
        let (_, rest) = hint.split_once("no trainer works on this run: `").expect("what to type");
        let typed = rest.trim_end_matches('`');
        assert!(typed.ends_with(".json.bad"), "{typed}");
    }
    // The command in the hint.
    let hint = replay(&store, &run_id()).await.unwrap_err().hint().unwrap();
    let command = hint.split('`').nth(1).unwrap();
    assert!(std::process::Command::new("sh").args(["-c", command]).status().unwrap().success(), "{command}");
    assert_eq!(replay(&store, &run_id()).await.unwrap().next(), 2);
    assert_eq!(a.append(notice(1, "x")).await.unwrap(), 2);
    // If others follow it, the hint is another one.
    store.put(&layout::journal_entry(1), Bytes::from_static(b"not ours")).await.unwrap();
    let error = replay(&store, &run_id()).await.unwrap_err();
    assert!(!error.hint().unwrap().contains(".bad"), "{error:?}");
}
