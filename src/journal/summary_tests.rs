//! Summaries: written, read, damaged, wrong, missing, and raced for.

use bytes::Bytes;
use proptest::prelude::*;

use super::{
    pack,
    replay::{audit_by, read, replay_by},
    summary::{SPANS, Spans, Tail},
    testing::*,
    *,
};
use crate::{
    config::RunConfig,
    error::{Explain, Kind},
    ids::{Generation, RunId, Step},
    layout,
    storage::{
        Crc64, Store,
        faulty::{Fault, Faulty},
    },
};

/// Short spans, so that a short journal has summaries of all of them.
const SMALL: Spans = Spans(&[2, 4, 8, 16]);
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// The state that the records give, read one by one.
async fn plainly(store: &Store) -> RunState {
    let (first, _) = read(store, 0).await.unwrap().unwrap();
    let mut state = RunState::begin(&run_id(), first).unwrap();
    while let Some((entry, _)) = read(store, state.next()).await.unwrap() {
        state.apply(state.next(), entry).unwrap();
    }
    state
}

async fn begun(store: &Store) -> Journal {
    new_run(store).await;
    let mut journal = Journal::open_by(store.clone(), node("a"), run_id(), SMALL).await.unwrap();
    journal.form(forming("a", None)).await.unwrap();
    journal
}

/// A run of this many records with all its summaries.
async fn long(store: &Store, records: u64) -> Journal {
    let mut journal = begun(store).await;
    while journal.state().next() < records {
        let next = journal.state().next();
        let record = if next > 3 && next.is_multiple_of(3) { pruned(next - 2, 1) } else { committed(next, 1) };
        journal.append(record).await.unwrap();
        journal.summed_up(PATIENCE).await;
    }
    journal
}

async fn keys(store: &Store) -> Vec<String> {
    let mut keys: Vec<_> = store.list(layout::SUMMARIES).await.unwrap().into_iter().map(|info| info.key).collect();
    keys.sort_by_key(|key| layout::summary_number(key));
    keys
}

fn key(to: u64) -> String {
    SMALL.place(to).unwrap().1
}

#[test]
fn at_most_one_summary_of_each_length_leads_to_any_number() {
    let mut to = 1_500_000 / 16 * 16;
    let mut way = Vec::new();
    while to > 0 {
        let (from, _) = SPANS.place(to).unwrap();
        assert!(SPANS.folders(from).iter().any(|folder| SPANS.place(to).unwrap().1.starts_with(&format!("{folder}/"))));
        way.push(to - from);
        to = from;
    }
    assert!(way.len() <= 11 + 4, "{way:?}");
    assert_eq!(SPANS.place(144), Some((128, "summaries/16/00000000000000000128/00000000000000000144".into())));
    assert_eq!(SPANS.place(131_072), Some((0, "summaries/131072/all/00000000000000131072".into())));
    assert_eq!((SPANS.place(0), SPANS.place(17)), (None, None));
}

#[tokio::test]
async fn summaries_give_the_same_state_as_the_records() {
    let faulty = Faulty::new(|_, _, _| Fault::Pass);
    let store = Store::faulty(&faulty, &settings()).folder("run");
    let journal = long(&store, 47).await;
    assert_eq!(keys(&store).await.len(), 23, "one at every second record");
    let before = faulty.count("get");
    let state = replay_by(&store, &run_id(), SMALL).await.unwrap();
    // Two of 16, then 40, 44 and 46; records 0 and 46, which are compared, and one that does not exist.
    assert_eq!(faulty.count("get") - before, 2 + 3 + 2 + 1 + 1);
    assert_eq!(state, plainly(&store).await);
    assert_eq!(&state, journal.state());
    assert_eq!(audit_by(&store, &run_id(), SMALL).await.unwrap(), 23);
}

#[tokio::test]
async fn a_long_journal_opens_with_few_requests() {
    let (remote, server) = crate::storage::s3_tests::atomic();
    let store = memory();
    let mut journal = new_run(&store).await;
    journal.form(forming("a", None)).await.unwrap();
    while journal.state().next() < 2_200 {
        journal.append(committed(journal.state().next(), 1)).await.unwrap();
        journal.summed_up(PATIENCE).await;
    }
    for info in store.list("").await.unwrap() {
        server.write(&format!("some/prefix/run/{}", info.key), store.get(&info.key, 1 << 30).await.unwrap());
    }
    let requests = || ["GetObject", "HeadObject", "ListObjectsV2"].map(|kind| server.count(kind)).iter().sum::<u64>();
    let before = requests();
    let state = replay(&remote.folder("run"), &run_id()).await.unwrap();
    assert!(requests() - before <= 50, "{} requests", requests() - before);
    assert_eq!(&state, journal.state());
    // Neither creating a run nor listing the runs lists the whole journal.
    let before = requests();
    let taken = Journal::create(remote.folder("run"), node("b"), run_id(), config()).await.unwrap_err();
    assert!(matches!(taken, JournalError::Exists { .. }), "{taken}");
    list_runs(&remote).await.unwrap();
    assert_eq!(requests() - before, 1 + 2);
    // A gap is found wherever it is after the newest summary.
    server.remove(&format!("some/prefix/run/{}", layout::journal_entry(2_197)));
    let error = replay(&remote.folder("run"), &run_id()).await.unwrap_err().to_string();
    assert!(error.contains("2197.json") && error.contains("missing"), "{error}");
}

#[tokio::test]
async fn a_gap_in_a_long_journal_on_a_disk_is_not_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&format!("file://{}", folder.path().display()), &settings()).unwrap().folder("run");
    let memory = memory();
    let mut journal = new_run(&memory).await;
    journal.form(forming("a", None)).await.unwrap();
    while journal.state().next() < 1_100 {
        journal.append(notice(1, "x")).await.unwrap();
    }
    let place = folder.path().join("run/journal");
    std::fs::create_dir_all(&place).unwrap();
    for number in 0..1_100 {
        let body = memory.get(&layout::journal_entry(number), MAX_ENTRY).await.unwrap();
        std::fs::write(folder.path().join("run").join(layout::journal_entry(number)), body).unwrap();
    }
    assert_eq!(replay(&store, &run_id()).await.unwrap(), *journal.state());
    for number in 1_080..1_095 {
        store.delete(&layout::journal_entry(number)).await.unwrap();
    }
    let error = replay(&store, &run_id()).await.unwrap_err().to_string();
    assert!(error.contains("1080.json") && error.contains("missing"), "{error}");
}

#[tokio::test]
async fn an_unusable_summary_costs_only_time() {
    let newer = Bytes::from_static(b"{\"format\":2,\"what\":\"ever\"}\nx");
    for to in [16, 32, 40, 44, 46, 2, 30] {
        let store = memory();
        long(&store, 47).await;
        let (key, expected) = (key(to), plainly(&store).await);
        let good = store.get(&key, 1 << 20).await.unwrap();
        let mut flipped = good.to_vec();
        let middle = flipped.len() * 2 / 3;
        flipped[middle] ^= 4;
        let other = store.get(&self::key(if to == 16 { 32 } else { 16 }), 1 << 20).await.unwrap();
        let cut = good.slice(..good.len() - 1);
        for body in [flipped.into(), cut, Bytes::new(), Bytes::from_static(b"\n"), newer.clone(), other] {
            store.put(&key, body).await.unwrap();
            assert_eq!(replay_by(&store, &run_id(), SMALL).await.unwrap(), expected, "{to}");
            audit_by(&store, &run_id(), SMALL).await.unwrap();
        }
        store.delete(&key).await.unwrap();
        let mut journal = Journal::open_by(store.clone(), node("a"), run_id(), SMALL).await.unwrap().leading();
        assert_eq!(journal.state(), &expected);
        // The next writer fills in the summaries before its own.
        journal.append(notice(1, "x")).await.unwrap();
        journal.summed_up(PATIENCE).await;
        assert_eq!(store.head(&key).await.is_ok(), to == 16 || to == 32, "{to}");
        assert!(store.head(&self::key(48)).await.is_ok());
    }
}

/// The summary that ends at `to`, written by a writer that read `other` in place of record `number`.
async fn forged(store: &Store, to: u64, number: u64, other: Record) -> Bytes {
    let elsewhere = memory();
    let mut tail = Tail::new(SMALL);
    for at in 0..to {
        let (mut entry, mut body) = read(store, at).await.unwrap().unwrap();
        if at == number {
            entry.record = other.clone();
            body = entry.encode().unwrap().into();
        }
        elsewhere.put(&layout::journal_entry(at), body.clone()).await.unwrap();
        tail.push(at, entry, body);
    }
    tail.due(to).unwrap().write(elsewhere.clone()).await;
    elsewhere.get(&key(to), 1 << 20).await.unwrap()
}

#[tokio::test]
async fn a_summary_that_disagrees_with_the_records_is_named() {
    let other = |step| match committed(step, 1) {
        Record::Committed(it) => Record::Committed(Committed { manifest_crc64: "fedcba9876543210".into(), ..it }),
        _ => unreachable!(),
    };
    // The first record, the last, the newest good checkpoint's, and one in the middle, which only a check of all of
    // them finds.
    let anew = Record::Created { run_id: run_id(), config: Box::new(RunConfig { store: "x".into(), ..config() }) };
    for (to, number, record, at_once) in [
        (4, 0, anew, true),
        (14, 13, other(13), true),
        (16, 14, other(14), true),
        (8, 5, other(5), false),
        (8, 4, notice(1, "nobody said so"), true),
    ] {
        let store = memory();
        let length = if to == 16 { 16 } else { to + 1 };
        long(&store, length).await;
        store.put(&key(to), forged(&store, to, number, record).await).await.unwrap();
        for found in
            [replay_by(&store, &run_id(), SMALL).await.map(drop), audit_by(&store, &run_id(), SMALL).await.map(drop)]
                .into_iter()
                .skip(usize::from(!at_once))
        {
            let error = found.unwrap_err();
            assert!(matches!(error, JournalError::Disagrees { .. }), "{to} {number}: {error:?}");
            assert_eq!(error.kind(), Kind::Data);
            assert!(error.to_string().contains(&key(to)), "{error}");
            assert!(error.hint().unwrap().contains("delete that object"));
        }
        // It only speeds things up.
        store.delete(&key(to)).await.unwrap();
        replay_by(&store, &run_id(), SMALL).await.unwrap();
    }
}

#[tokio::test]
async fn a_summary_of_another_run_or_of_lost_records_is_skipped() {
    let store = memory();
    long(&store, 17).await;
    store.delete(&layout::journal_entry(15)).await.unwrap();
    let error = replay_by(&store, &run_id(), SMALL).await.unwrap_err().to_string();
    assert!(error.contains("00015.json is missing"), "{error}");

    let other = Store::open("memory://", &settings()).unwrap().folder("other");
    let mut journal = Journal::create(other.clone(), node("a"), RunId::new("other").unwrap(), config()).await.unwrap();
    journal.form(forming("a", None)).await.unwrap();
    let copied = store.get(&key(2), 1 << 20).await.unwrap();
    other.put(&key(2), copied).await.unwrap();
    let error = replay_by(&other, &RunId::new("other").unwrap(), SMALL).await.unwrap_err().to_string();
    assert!(error.contains(&key(2)) && error.contains("record 0"), "{error}");
}

#[tokio::test]
async fn two_writers_write_the_same_summary() {
    let store = memory();
    let mut a = begun(&store).await;
    a.append(committed(1, 1)).await.unwrap();
    // Fenced and out of date: it still knows the earlier records.
    let mut b = Journal::open_by(store.clone(), node("b"), run_id(), SMALL).await.unwrap();
    b.form(forming("b", Some(point(1, 1)))).await.unwrap();
    b.summed_up(PATIENCE).await;
    let by_b = store.get(&key(4), 1 << 20).await.unwrap();
    store.delete(&key(4)).await.unwrap();
    a.refresh().await.unwrap();
    let mut stale = a.state().tail.clone();
    stale.due(4).unwrap().write(store.clone()).await;
    assert_eq!(store.get(&key(4), 1 << 20).await.unwrap(), by_b);
    // The object there is left alone, whatever it is.
    store.put(&key(4), Bytes::from_static(b"x")).await.unwrap();
    let mut again = Tail::new(SMALL);
    for number in 0..4 {
        let (entry, body) = read(&store, number).await.unwrap().unwrap();
        again.push(number, entry, body);
    }
    again.due(4).unwrap().write(store.clone()).await;
    assert_eq!(store.get(&key(4), 1 << 20).await.unwrap(), Bytes::from_static(b"x"));
}

#[tokio::test]
async fn a_writer_whose_records_differ_from_the_stored_ones_writes_nothing() {
    let store = memory();
    let mut journal = begun(&store).await;
    journal.append(committed(1, 1)).await.unwrap();
    let mut tail = Tail::new(SMALL);
    for number in 0..3 {
        let (entry, body) = read(&store, number).await.unwrap().unwrap();
        tail.push(number, entry, body);
    }
    // One bit of a size was garbled in transfer.
    let wrong = entry(
        "a",
        match committed(2, 1) {
            Record::Committed(it) => Record::Committed(Committed { bytes: 11, ..it }),
            _ => unreachable!(),
        },
    );
    journal.append(committed(2, 1)).await.unwrap();
    journal.summed_up(PATIENCE).await;
    store.delete(&key(4)).await.unwrap();
    tail.push(3, wrong.clone(), wrong.encode().unwrap().into());
    tail.due(4).unwrap().write(store.clone()).await;
    assert!(store.head(&key(4)).await.is_err());
    // Nor does one that has missed a record.
    let mut tail = Tail::new(SMALL);
    let (entry, body) = read(&store, 0).await.unwrap().unwrap();
    tail.push(0, entry.clone(), body.clone());
    tail.push(2, entry, body);
    assert!(tail.due(2).is_none() && tail.due(3).is_none());
}

#[tokio::test]
async fn a_store_that_refuses_summaries_takes_records_and_the_run_opens() {
    let faulty = Faulty::new(|operation, path, _| match operation {
        "create" if path.contains(layout::SUMMARIES) => Fault::Denied,
        _ => Fault::Pass,
    });
    let store = Store::faulty(&faulty, &settings()).folder("run");
    let journal = long(&store, 70).await;
    assert_eq!(keys(&store).await, Vec::<String>::new());
    let state = replay_by(&store, &run_id(), SMALL).await.unwrap();
    assert_eq!(&state, journal.state());
    // An older program has left no summaries: the first newer writer makes up for all of them.
    let (good, hangs) = (
        memory(),
        Faulty::new(|operation, path, _| match operation {
            "create" if path.contains(layout::SUMMARIES) => Fault::Hang,
            _ => Fault::Pass,
        }),
    );
    for info in store.list("").await.unwrap() {
        good.put(&info.key, store.get(&info.key, 1 << 20).await.unwrap()).await.unwrap();
        hangs_put(&hangs, &info.key, store.get(&info.key, 1 << 20).await.unwrap()).await;
    }
    let mut heir = Journal::open_by(good.clone(), node("a"), run_id(), SMALL).await.unwrap().leading();
    for _ in 0..2 {
        heir.append(notice(1, "x")).await.unwrap();
    }
    heir.summed_up(PATIENCE).await;
    let all = keys(&good).await;
    assert!([16, 32, 48, 64].iter().all(|to| all.contains(&key(*to))), "{all:?}");
    assert_eq!(replay_by(&good, &run_id(), SMALL).await.unwrap(), *heir.state());
    // A summary that hangs delays no record.
    let store = Store::faulty(&hangs, &settings()).folder("run");
    let mut patient = Journal::open_by(store, node("a"), run_id(), SMALL).await.unwrap().leading();
    for _ in 0..20 {
        patient.append(notice(1, "x")).await.unwrap();
    }
    patient.summed_up(std::time::Duration::ZERO).await;

    async fn hangs_put(faulty: &std::sync::Arc<Faulty>, key: &str, body: Bytes) {
        Store::faulty(faulty, &settings()).folder("run").put(key, body).await.unwrap();
    }
}

#[derive(Clone, Debug)]
enum Op {
    Form(usize),
    Commit(usize),
    Prune(usize, u64),
    Notice(usize),
    /// Killed between a record and its summary: an append whose summary is never begun, and a new life.
    Kill(usize),
    Lose(prop::sample::Index),
    Garble(prop::sample::Index, prop::sample::Index),
}

fn op() -> impl Strategy<Value = Op> {
    let who = 0_usize..2;
    let index = any::<prop::sample::Index>;
    prop_oneof![
        1 => who.clone().prop_map(Op::Form),
        6 => who.clone().prop_map(Op::Commit),
        2 => (who.clone(), 1_u64..4).prop_map(|(who, last)| Op::Prune(who, last)),
        2 => who.clone().prop_map(Op::Notice),
        1 => who.prop_map(Op::Kill),
        1 => index().prop_map(Op::Lose),
        1 => (index(), index()).prop_map(|(which, at)| Op::Garble(which, at)),
    ]
}

async fn live(script: Vec<Op>) {
    let store = memory();
    drop(begun(&store).await);
    let open = |who: usize| Journal::open_by(store.clone(), node(["a", "b"][who]), run_id(), SMALL);
    let mut journals = [open(0).await.unwrap(), open(1).await.unwrap()];
    for (number, op) in script.into_iter().enumerate() {
        let (Op::Form(who) | Op::Commit(who) | Op::Prune(who, _) | Op::Notice(who) | Op::Kill(who)) = op else {
            let all = keys(&store).await;
            match op {
                Op::Lose(which) if !all.is_empty() => store.delete(which.get::<String>(&all)).await.unwrap(),
                Op::Garble(which, at) if !all.is_empty() => {
                    let key = which.get(&all);
                    let mut body = store.get(key, 1 << 20).await.unwrap().to_vec();
                    let at = at.index(body.len());
                    body[at] ^= 1 << (number % 8);
                    store.put(key, body.into()).await.unwrap();
                }
                _ => {}
            }
            continue;
        };
        let journal = &mut journals[who];
        journal.refresh().await.unwrap();
        let (generation, step) = (journal.state().generation().get(), number as u64 + 1);
        // A writer that does not hold the run is refused, which is fine here.
        let _ = match op {
            Op::Form(_) => {
                let resume = journal.state().newest().map(Checkpoint::point);
                journal.form(forming("a", resume)).await.map(drop)
            }
            Op::Prune(_, last) => {
                let old = journal.state().candidates().iter().skip(last as usize).map(|c| c.point()).collect();
                journal.append(Record::pruned(old)).await.map(drop)
            }
            Op::Commit(_) => journal.append(committed(step, generation)).await.map(drop),
            _ => journal.append(notice(generation, "x")).await.map(drop),
        };
        if matches!(op, Op::Kill(_)) {
            journals[who] = open(who).await.unwrap();
        } else {
            journal.summed_up(PATIENCE).await;
        }
        let read = replay_by(&store, &run_id(), SMALL).await.unwrap();
        assert_eq!(read, plainly(&store).await);
    }
    audit_by(&store, &run_id(), SMALL).await.unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]

    #[test]
    fn summaries_give_the_same_state_in_any_life(script in prop::collection::vec(op(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(live(script));
    }

    #[test]
    fn a_block_unpacks_to_its_records(records in prop::collection::vec(stored(), 1..20)) {
        let block = pack::pack(records.iter().map(|(entry, body)| (entry, body))).unwrap();
        let rows = pack::unpack(&block).unwrap();
        assert_eq!(rows.len(), records.len());
        // Kinds and fields that this program does not know are kept as well.
        for (_, body) in records.iter().filter(|(entry, body)| entry.encode().unwrap() != *body) {
            assert!(block.windows(body.len()).any(|window| window == *body));
        }
        for (row, (entry, body)) in rows.into_iter().zip(&records) {
            assert_eq!(row.crc64, Crc64::of(body));
            let again = Entry { attempt: entry.attempt.clone(), ..row.entry };
            assert_eq!(again.encode().unwrap(), entry.encode().unwrap());
        }
        for cut in 0..block.len() {
            assert!(pack::unpack(&block[..cut]).is_err());
        }
        let mut turned = block.to_vec();
        let middle = turned.len() / 2;
        turned[middle] ^= 0x20;
        assert!(pack::unpack(&turned).is_err());
    }
}

/// A record as a store may hold it: of this program, or of one that writes more than this one knows.
fn stored() -> impl Strategy<Value = (Entry, Bytes)> {
    let float = || prop_oneof![any::<f64>(), Just(f64::NAN), Just(f64::INFINITY), Just(0.1 + 0.2)];
    let number = || prop_oneof![any::<u64>(), 0_u64..1000];
    let loss = || prop_oneof![9 => float().prop_map(Some), 1 => Just(None)];
    let some = proptest::collection::btree_map("[a-z]{1,3}", float(), 1..3);
    let metrics = prop_oneof![9 => Just(Metrics::new()), 1 => some];
    let committed = (number(), number(), number(), loss(), proptest::option::of(float()), metrics, any::<[u8; 2]>())
        .prop_map(|(step, generation, bytes, loss, validation_loss, metrics, odd)| {
            let Record::Committed(usual) = committed(step, generation) else { unreachable!() };
            Record::Committed(Committed {
                manifest: if odd[0] < 50 { "elsewhere".into() } else { usual.manifest },
                manifest_crc64: if odd[1] < 50 { "ABC".into() } else { usual.manifest_crc64 },
                bytes,
                loss,
                validation_loss,
                metrics,
                ..usual
            })
        });
    let pruned = (number(), number())
        .prop_map(|(step, generation)| Record::Pruned { step: Step(step), generation: Generation(generation) });
    let record = prop_oneof![4 => committed, 3 => pruned, 1 => Just(interrupted(3)), 1 => Just(created()),
        1 => loss().prop_map(|loss| Record::Completed { generation: Generation(1), step: Step(3), loss, early: None })];
    (record, -3_000_000_000_i64..250_000_000_000, 0_i32..1_000_000_000, 0_u8..3, any::<bool>()).prop_map(
        |(record, second, nano, who, more)| {
            let mut entry = entry(&format!("n{who}"), record);
            entry.at = jiff::Timestamp::new(second, nano).unwrap();
            let mut body = entry.encode().unwrap();
            if more {
                let end = body.len() - 2;
                body.splice(end..end, *b",\"later\":[1]");
            }
            (Entry::decode(&body).unwrap(), body.into())
        },
    )
}
