//! One contract, checked on every kind of store, and every fault that a store may have.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::FutureExt;
use object_store::{multipart::MultipartStore, path::Path};

use super::{
    faulty::{Fault, Faulty},
    store::UPKEEP_CONCURRENCY,
    *,
};
use crate::{
    config::StorageConfig,
    error::{Explain, Kind},
};

pub(super) fn settings() -> StorageConfig {
    StorageConfig::plain(4, 5)
}

fn memory() -> Store {
    Store::open("memory://", &settings()).unwrap()
}

fn on_disk() -> (Store, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&format!("file://{}", folder.path().display()), &settings()).unwrap();
    (store, folder)
}

/// Bytes that differ from place to place, so that a misplaced part is noticed.
pub(super) fn pattern(len: usize) -> Bytes {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect::<Vec<_>>().into()
}

/// Lets the other tasks run until `happened`; gives up after a minute, so that a broken promise is a failure, not a
/// hang.
async fn eventually(happened: impl Fn() -> bool) {
    let wait = async {
        while !happened() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait).await.expect("it never happened");
}

/// Memory whose content can still be read after it was given away.
struct Place {
    bytes: Vec<u8>,
    seen: Arc<std::sync::Mutex<Vec<u8>>>,
}
impl Place {
    fn new(len: usize) -> (Self, Arc<std::sync::Mutex<Vec<u8>>>) {
        let seen = Arc::default();
        (Self { bytes: vec![0xaa; len], seen: Arc::clone(&seen) }, seen)
    }
}
impl AsMut<[u8]> for Place {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}
impl Drop for Place {
    fn drop(&mut self) {
        *self.seen.lock().unwrap() = std::mem::take(&mut self.bytes);
    }
}

/// What every store must do; leaves nothing behind.
pub(super) async fn contract(store: &Store) {
    let folder = store.folder("contract").folder("inner");
    assert_eq!(folder.uri(), format!("{}/contract/inner", store.uri()));

    // Reading an object that does not exist.
    assert!(matches!(folder.get("none", 10).await, Err(StorageError::NotFound { key }) if key.ends_with("inner/none")));
    assert!(matches!(folder.get_range("none", 0..1).await, Err(StorageError::NotFound { .. })));
    assert!(matches!(folder.head("none").await, Err(StorageError::NotFound { .. })));
    assert!(matches!(folder.stored("none").await, Err(StorageError::NotFound { key }) if key.ends_with("inner/none")));
    assert_eq!(folder.list("").await.unwrap(), []);
    assert_eq!(folder.list_folders("").await.unwrap(), Vec::<String>::new());
    folder.delete("none").await.unwrap();

    // Create once.
    let (ours, theirs) = (Bytes::from_static(b"ours"), Bytes::from_static(b"theirs"));
    assert_eq!(folder.create("a/once", ours.clone()).await.unwrap(), CreateOutcome::Created);
    assert_eq!(folder.create("a/once", theirs.clone()).await.unwrap(), CreateOutcome::Exists);
    assert_eq!(folder.create("a/once", ours.clone()).await.unwrap(), CreateOutcome::Created, "settled by the body");
    assert_eq!(folder.get("a/once", 4).await.unwrap(), ours);

    // Overwriting.
    folder.put("a/once", theirs.clone()).await.unwrap();
    assert_eq!(folder.get("a/once", 6).await.unwrap(), theirs);
    assert_eq!(folder.head("a/once").await.unwrap().size, 6);
    match folder.get("a/once", 5).await {
        Err(StorageError::TooLarge { size: 6, limit: 5, .. }) => {}
        other => panic!("{other:?}"),
    }

    // Ranges.
    assert_eq!(folder.get_range("a/once", 1..4).await.unwrap(), theirs.slice(1..4));
    assert_eq!(folder.get_range("a/once", 2..2).await.unwrap(), Bytes::new());
    for beyond in [4..7, 6..7, 100..200] {
        match folder.get_range("a/once", beyond.clone()).await {
            Err(StorageError::Short { size: 6, .. }) => {}
            other => panic!("{beyond:?}: {other:?}"),
        }
    }

    // Into the caller's memory.
    let place = || Place::new(4);
    let (target, filled) = place();
    assert_eq!(folder.get_into("a/once", 1, target).await.unwrap(), Crc64::of(b"heir"));
    assert_eq!(*filled.lock().unwrap(), b"heir");
    assert_eq!(folder.get_into("none", 5, Vec::new()).await.unwrap(), Crc64::EMPTY, "nothing is asked for nothing");
    assert!(matches!(folder.get_into("none", 0, place().0).await, Err(StorageError::NotFound { .. })));
    for beyond in [3, 6, 100] {
        match folder.get_into("a/once", beyond, place().0).await {
            Err(StorageError::Short { size: 6, end, .. }) => assert_eq!(end, beyond + 4),
            other => panic!("{beyond}: {other:?}"),
        }
    }

    // Large, small and empty uploads.
    for len in [0, 1, 5 << 20, (5 << 20) + 1, (16 << 20) + 3] {
        let body = pattern(len);
        let heard = Arc::new(AtomicU64::new(0));
        let sum = Arc::clone(&heard);
        let put =
            folder.upload("b/large", body.clone(), move |n| _ = sum.fetch_add(n, Ordering::Relaxed)).await.unwrap();
        assert_eq!((put.bytes, put.crc64), (len as u64, Crc64::of(&body)), "{len}");
        // A checksum that a store keeps may be wrong (s3s-fs keeps that of the object before): it is not checked here.
        assert_eq!(folder.stored("b/large").await.unwrap().size, len as u64);
        assert_eq!(heard.load(Ordering::Relaxed), len as u64);
        assert!(folder.get("b/large", 32 << 20).await.unwrap() == body, "{len} bytes came back otherwise");
    }
    let end = (16 << 20) + 3;
    assert_eq!(
        folder.get_range("b/large", end - 5..end).await.unwrap(),
        pattern(end as usize).slice(end as usize - 5..)
    );

    let (target, filled) = Place::new(8 << 20);
    let sum = folder.get_into("b/large", 3 << 20, target).await.unwrap();
    let expected = pattern(end as usize).slice(3 << 20..11 << 20);
    assert!(*filled.lock().unwrap() == expected && sum == Crc64::of(&expected));

    // Listing.
    let mut keys: Vec<_> = folder.list("").await.unwrap().into_iter().map(|info| (info.key, info.size)).collect();
    keys.sort();
    assert_eq!(keys, [("a/once".to_owned(), 6), ("b/large".to_owned(), end)]);
    assert_eq!(folder.list("a").await.unwrap()[0].key, "a/once");
    assert_eq!(folder.list_folders("").await.unwrap(), ["a", "b"]);
    assert_eq!(store.folder("contract").list_folders("").await.unwrap(), ["inner"]);
    // A folder's name is not a prefix of text.
    assert_eq!(store.list("contract/inn").await.unwrap(), []);

    for key in ["a/once", "b/large"] {
        folder.delete(key).await.unwrap();
        folder.delete(key).await.unwrap();
    }
    assert_eq!(folder.list("").await.unwrap(), []);
}

#[tokio::test]
async fn memory_holds_the_contract() {
    contract(&memory()).await;
    contract(&memory().at_priority(Priority::Background)).await;
}

/// The test's end waits for the runtime's threads: one that waited for a writer would hold it for ever.
#[tokio::test]
async fn a_named_pipe_in_a_folder_is_an_error_and_nobody_waits_for_its_writer() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("model.json");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
    let store = Store::open(&format!("file://{}", folder.path().display()), &settings()).unwrap();
    let whole = store.get("model.json", 10).await.unwrap_err();
    let part = store.get_range("model.json", 0..1).await.unwrap_err();
    let size = store.head("model.json").await.unwrap_err();
    for error in [whole, part, size] {
        let said = format!("{error}: {}", std::error::Error::source(&error).unwrap());
        assert!(said.contains("it is a pipe, a socket or a device, not a file"), "{said}");
    }
}

#[tokio::test]
async fn files_hold_the_contract() {
    let (store, _folder) = on_disk();
    contract(&store).await;
    contract(&store.at_priority(Priority::Background)).await;
}

#[tokio::test]
async fn a_store_that_loses_every_fifth_request_or_answer_keeps_the_contract() {
    contract(&Store::faulty(&Faulty::new(|_, _, _| Fault::Pass), &settings())).await;
    let loses = Faulty::new(|operation, _, n| match (operation, n % 10) {
        // The fault plan counts no listings; it decides what they show.
        ("listed", _) => Fault::Pass,
        (_, 4) => Fault::Lost,
        (_, 9) => Fault::AnswerLost,
        _ => Fault::Pass,
    });
    contract(&Store::faulty(&loses, &settings())).await;
    assert!(loses.count("get") > 10 && loses.count("part") > 4, "something was lost");
}

#[tokio::test]
async fn a_relative_file_uri_is_made_absolute_and_opens_the_same_place() {
    let folder = tempfile::tempdir_in(".").unwrap();
    let name = folder.path().file_name().unwrap().to_str().unwrap();
    for uri in [format!("file://./{name}/new folder"), format!("file://{name}/new folder/")] {
        let store = Store::open(&uri, &settings()).unwrap();
        store.put("x", Bytes::from_static(b"1")).await.unwrap();
        assert!(store.uri().starts_with("file:///") && store.uri().ends_with("/new folder"), "{}", store.uri());
        assert!(folder.path().join("new folder/x").is_file());
        let again = Store::open(&store.uri(), &settings()).unwrap();
        assert_eq!(again.uri(), store.uri());
        assert_eq!(again.get("x", 1).await.unwrap(), "1");
    }
}

#[tokio::test]
async fn keys_that_could_leave_the_folder_are_refused() {
    let store = memory().folder("run");
    for key in ["../x", "a/../../x", "a//b", "/../x", "a/./b", &"x".repeat(2000)] {
        let error = store.put(key, Bytes::new()).await.unwrap_err();
        assert!(matches!(error, StorageError::InvalidKey { .. }), "{key}: {error:?}");
    }
    assert!(store.folder("../other").put("x", Bytes::new()).await.is_err());
}

#[tokio::test]
async fn memory_and_files_create_atomically() {
    memory().prove_create_is_atomic().await.unwrap();
    let (store, _folder) = on_disk();
    store.prove_create_is_atomic().await.unwrap();
    assert_eq!(store.list("").await.unwrap(), [], "probes are cleaned up");
}

#[tokio::test]
async fn one_of_many_racing_creates_wins_on_files() {
    let (store, _folder) = on_disk();
    for round in 0..5 {
        let creates = (0..16).map(|i| {
            let store = store.clone();
            tokio::spawn(async move { store.create(&format!("k{round}"), format!("{i}").into()).await.unwrap() })
        });
        let outcomes = futures::future::join_all(creates).await;
        let won = outcomes.iter().filter(|o| *o.as_ref().unwrap() == CreateOutcome::Created).count();
        assert_eq!(won, 1);
    }
}

#[tokio::test]
async fn a_create_whose_answer_was_lost_is_ours() {
    let faulty = Faulty::new(|op, _, n| if op == "create" && n == 0 { Fault::AnswerLost } else { Fault::Pass });
    let store = Store::faulty(&faulty, &settings());
    assert_eq!(store.create("k", Bytes::from_static(b"a")).await.unwrap(), CreateOutcome::Created);
    assert_eq!(faulty.count("create"), 2, "it was asked again");
    assert_eq!(store.create("k", Bytes::from_static(b"b")).await.unwrap(), CreateOutcome::Exists);
}

#[tokio::test]
async fn a_create_that_met_a_conflict_is_repeated() {
    let faulty = Faulty::new(|op, _, n| if op == "create" && n < 2 { Fault::Conflict } else { Fault::Pass });
    let store = Store::faulty(&faulty, &settings());
    assert_eq!(store.create("k", Bytes::from_static(b"a")).await.unwrap(), CreateOutcome::Created);
    assert_eq!(store.get("k", 9).await.unwrap(), "a");
}

#[tokio::test]
async fn passing_errors_are_retried_and_lasting_ones_reported_at_once() {
    let faulty = Faulty::new(|op, path, n| match (op, path) {
        ("get", "twice") if n < 2 => Fault::Lost,
        ("get", "always") => Fault::Lost,
        (_, "denied") => Fault::Denied,
        (_, "full") => Fault::Full,
        _ => Fault::Pass,
    });
    let store = Store::faulty(&faulty, &settings());
    store.put("twice", Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(store.get("twice", 9).await.unwrap(), "x");
    let error = store.get("always", 9).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable);
    assert_eq!(faulty.count("get"), 3 + 5);

    let error = store.head("denied").await.unwrap_err();
    assert_eq!((error.kind(), faulty.count("head")), (Kind::Permission, 1));
    let puts = faulty.count("put");
    let error = crate::error::Error::from(store.put("full", Bytes::new()).await.unwrap_err());
    assert_eq!(faulty.count("put"), puts + 1);
    assert!(error.to_string().contains("no space left"), "{error}");
    assert!(error.hint().unwrap().contains("free space"));
}

#[tokio::test]
async fn a_request_without_an_answer_is_given_up_and_repeated() {
    let faulty = Faulty::new(|op, _, n| if op == "put" && n == 0 { Fault::Hang } else { Fault::Pass });
    let store = Store::faulty_with(&faulty, &settings(), Some(Duration::from_millis(1)));
    store.put("k", Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(faulty.count("put"), 2);
    let faulty = Faulty::new(|_, _, _| Fault::Hang);
    let store = Store::faulty_with(&faulty, &settings(), Some(Duration::from_millis(1)));
    let error = store.head("k").await.unwrap_err();
    let text = crate::error::Error::from(error).to_string();
    assert!(text.contains("no answer within"), "{text}");
}

/// A request that hangs here is never given up.
#[tokio::test]
async fn a_hanging_write_is_sent_again() {
    let tests = ["create", "put", "begin", "part"].map(|hangs| async move {
        // An upload of three parts comes first; none of it hangs.
        let before = if hangs == "part" { 3 } else { 1 };
        let faulty = Faulty::new(move |op, _, n| if op == hangs && n == before { Fault::Hang } else { Fault::Pass });
        let store = Store::faulty_with(&faulty, &settings(), Some(Duration::MAX));
        let body = pattern(11 << 20);
        let written = async {
            for name in ["a", "b"] {
                let store = store.folder(name);
                store.create("1", Bytes::from_static(b"x")).await.unwrap();
                store.put("2", Bytes::from_static(b"x")).await.unwrap();
                store.upload("3", body.clone(), |_| {}).await.unwrap();
            }
        };
        tokio::time::timeout(Duration::from_secs(60), written)
            .await
            .unwrap_or_else(|_| panic!("{hangs} is waited for"));
        assert_eq!(faulty.count(hangs), 2 * before + 1, "{hangs} is sent once more");
        assert!(store.get("b/3", 32 << 20).await.unwrap() == body);
    });
    futures::future::join_all(tests).await;
}

#[tokio::test]
async fn failed_parts_are_sent_again_and_a_lost_completion_is_confirmed() {
    let faulty = Faulty::new(|op, _, n| match op {
        "begin" | "part" if n == 0 => Fault::Lost,
        "part" if n == 2 => Fault::AnswerLost,
        "complete" if n == 0 => Fault::AnswerLost,
        _ => Fault::Pass,
    });
    let store = Store::faulty(&faulty, &settings());
    let body = pattern(18 << 20);
    let put = store.upload("k", body.clone(), |_| {}).await.unwrap();
    assert_eq!(put.crc64, Crc64::of(&body));
    assert!(store.get("k", 32 << 20).await.unwrap() == body);
    // This store keeps no checksum of ours: the existing object was read back.
    assert_eq!((faulty.count("complete"), faulty.count("abort")), (2, 0));
}

/// A request that is sent twice may be carried out twice, and the answer that comes be that to the second.
#[tokio::test]
async fn an_upload_that_is_gone_because_it_was_completed_is_a_success() {
    let faulty = Faulty::new(|op, _, _| if op == "complete" { Fault::Gone } else { Fault::Pass });
    let store = Store::faulty(&faulty, &settings());
    let body = pattern(11 << 20);
    store.upload("k", body.clone(), |_| {}).await.unwrap();
    assert!(store.get("k", 32 << 20).await.unwrap() == body);
    assert_eq!((faulty.count("complete"), faulty.count("abort")), (1, 0));
}

#[tokio::test]
async fn an_upload_aborted_before_its_completion_is_not_a_success() {
    // It was aborted elsewhere, and an older object has the key: one of another size, or of the same.
    let body = pattern(11 << 20);
    let mut same_size = body.to_vec();
    same_size[7 << 20] ^= 1;
    for old in [Bytes::from_static(b"old"), same_size.into()] {
        gone_before_it_was_completed(body.clone(), old).await;
    }
}

async fn gone_before_it_was_completed(body: Bytes, old: Bytes) {
    let faulty = Faulty::new(|op, _, n| match op {
        "complete" if n == 0 => Fault::Lost,
        _ => Fault::Pass,
    });
    let store = Store::faulty(&faulty, &settings());
    store.put("k", old.clone()).await.unwrap();
    let multipart: Arc<dyn MultipartStore> = faulty.clone();
    let path = Path::from("k");
    let sent = AtomicU64::new(0);
    let upload = store.upload("k", body, move |n| {
        // The memory store numbers puts and uploads from 0; this is the second.
        if sent.fetch_add(n, Ordering::Relaxed) + n == 11 << 20 {
            multipart.abort_multipart(&path, &"1".to_owned()).now_or_never().unwrap().unwrap();
        }
    });
    let error = upload.await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error:?}");
    assert_eq!(faulty.count("complete"), 2);
    assert!(store.get("k", 1 << 30).await.unwrap() == old);
}

#[tokio::test]
async fn a_failed_upload_is_aborted() {
    let faulty = Faulty::new(|op, _, n| if op == "part" && n >= 1 { Fault::Denied } else { Fault::Pass });
    let store = Store::faulty(&faulty, &settings());
    let error = store.upload("k", pattern(18 << 20), |_| {}).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Permission);
    eventually(|| faulty.count("abort") == 1).await;
    assert!(matches!(store.head("k").await, Err(StorageError::NotFound { .. })));
}

/// An outage counts once: the upload's caller gets the error, and the parts are removed in the background.
#[tokio::test]
async fn a_failed_upload_is_reported_before_its_parts_are_aborted() {
    let faulty = Faulty::new(|op, _, _| match op {
        "part" => Fault::Denied,
        "abort" => Fault::Hang,
        _ => Fault::Pass,
    });
    let store = Store::faulty_with(&faulty, &settings(), Some(Duration::MAX));
    let upload = store.upload("k", pattern(18 << 20), |_| {});
    let told = tokio::time::timeout(Duration::from_secs(60), upload).await.expect("it waits for the abort");
    assert_eq!(told.unwrap_err().kind(), Kind::Permission);
    eventually(|| faulty.count("abort") == 1).await;
}

#[tokio::test]
async fn hanging_deletions_and_listings_delay_neither_journal_nor_heartbeat() {
    let faulty = Faulty::new(|_, path, _| if path.starts_with("checkpoints/") { Fault::Hang } else { Fault::Pass });
    let store = Store::faulty_with(&faulty, &settings(), Some(Duration::MAX));
    let upkeep = store.for_upkeep();
    let hanging: Vec<_> = (0..64)
        .map(|i| {
            let store = upkeep.folder("checkpoints");
            tokio::spawn(async move {
                match i % 2 {
                    0 => store.delete("a").await.map(drop),
                    _ => store.head("a").await.map(drop),
                }
            })
        })
        .collect();
    eventually(|| faulty.count("delete") + faulty.count("head") == UPKEEP_CONCURRENCY).await;
    let small = async {
        store.put("heartbeat", Bytes::new()).await.unwrap();
        store.create("record", Bytes::new()).await.unwrap();
    };
    tokio::time::timeout(Duration::from_secs(60), small).await.expect("held up");
    hanging.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn a_dropped_upload_is_aborted() {
    let faulty = Faulty::new(|op, _, n| if op == "part" && n >= 1 { Fault::Hang } else { Fault::Pass });
    let store = Store::faulty(&faulty, &settings());
    let (heard, mut first) = tokio::sync::mpsc::unbounded_channel();
    let upload = tokio::spawn({
        let store = store.clone();
        async move { store.upload("k", pattern(18 << 20), move |n| heard.send(n).unwrap()).await }
    });
    first.recv().await.unwrap();
    upload.abort();
    assert!(upload.await.unwrap_err().is_cancelled());
    eventually(|| faulty.count("abort") == 1).await;
}

#[test]
fn a_runtime_may_stop_during_an_upload() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let faulty = Faulty::new(|op, _, n| if op == "part" && n >= 1 { Fault::Hang } else { Fault::Pass });
    let store = Store::faulty(&faulty, &settings());
    runtime.block_on(async {
        let (heard, mut first) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move { store.upload("k", pattern(18 << 20), move |n| heard.send(n).unwrap()).await });
        first.recv().await.unwrap();
    });
    drop(runtime);
}

#[tokio::test]
async fn bulk_transfers_are_limited_and_do_not_delay_small_requests() {
    // Down and up.
    let counts = || Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
    let (flying, most) = (counts(), counts());
    let faulty = Faulty::new({
        let (flying, most) = (flying.clone(), most.clone());
        move |op, path, _| {
            let way = match (op, path) {
                (_, "heartbeat") => return Fault::Pass,
                ("get", _) => 0,
                ("part", _) => 1,
                _ => return Fault::Pass,
            };
            most[way].fetch_max(flying[way].fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            Fault::Hang
        }
    });
    let store = Store::faulty(&faulty, &settings());
    let mut transfers: Vec<_> = (0..20)
        .map(|i| {
            // Folders and clones share the limit.
            let store = store.folder(&format!("f{}", i % 3));
            tokio::spawn(async move { store.get_range("k", 0..1).await.map(drop) })
        })
        .collect();
    transfers.extend((0..3).map(|i| {
        let store = store.folder(&format!("f{i}"));
        tokio::spawn(async move { store.upload("k", pattern(11 << 20), |_| {}).await.map(drop) })
    }));
    let both = |counts: &[AtomicUsize; 2]| counts.each_ref().map(|count| count.load(Ordering::SeqCst));
    eventually(|| both(&flying) == [4, 4]).await;
    let small = async {
        store.put("heartbeat", Bytes::new()).await.unwrap();
        store.create("record", Bytes::new()).await.unwrap();
        store.get("heartbeat", 9).await.unwrap();
        store.list("").await.unwrap();
    };
    tokio::time::timeout(Duration::from_secs(60), small).await.expect("small requests wait behind transfers");
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    assert_eq!(both(&most), [4, 4]);
    transfers.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn an_interrupted_upload_to_files_is_invisible_and_swept() {
    let (store, folder) = on_disk();
    store.put("a/k", Bytes::from_static(b"old")).await.unwrap();
    // The leftover of a killed process.
    std::fs::write(folder.path().join("a/k#1"), b"half").unwrap();
    std::fs::write(folder.path().join("a/k#x"), b"not ours").unwrap();
    assert_eq!(store.get("a/k", 9).await.unwrap(), "old");
    assert!(store.list("").await.unwrap().iter().all(|info| info.key != "a/k#1"));
    let begun = jiff::Timestamp::now();
    let found = store.unfinished().await.unwrap();
    assert!(found.len() == 1 && found[0].key == "a/k" && found[0].since <= begun, "{found:?}");
    let found = store.folder("a").unfinished().await.unwrap();
    assert!(found.len() == 1 && found[0].key == "k", "{found:?}");
    for _ in 0..2 {
        store.folder("a").discard(&found[0]).await.unwrap();
    }
    assert!(!folder.path().join("a/k#1").exists() && folder.path().join("a/k#x").exists());
    assert_eq!(store.get("a/k", 9).await.unwrap(), "old");
    assert_eq!(store.folder("none").unfinished().await.unwrap(), []);
}

#[tokio::test]
async fn an_upload_to_files_dropped_half_way_leaves_nothing() {
    let (store, folder) = on_disk();
    let (heard, mut first) = tokio::sync::mpsc::unbounded_channel();
    let upload = store.upload("k", pattern(30 << 20), move |n| heard.send(n).unwrap());
    tokio::select! {
        biased;
        _ = first.recv() => {}
        done = upload => panic!("finished first: {done:?}"),
    }
    assert!(!folder.path().join("k").exists());
    // Its hidden file is removed by a thread of the runtime.
    eventually(|| std::fs::read_dir(folder.path()).unwrap().count() == 0).await;
}

/// Runs as a child whose files may have 8 MiB.
#[tokio::test]
#[ignore = "child of a_file_that_reaches_its_limit_gives_a_clear_error_and_no_partial_object"]
async fn child_with_small_files() {
    let uri = format!("file://{}", std::env::var("TRAINER_TEST_FOLDER").unwrap());
    let store = Store::open(&uri, &settings()).unwrap();
    store.put("k", Bytes::from_static(b"old")).await.unwrap();
    for body in [pattern(18 << 20), pattern(11 << 20)] {
        let error = crate::error::Error::from(store.upload("k", body, |_| {}).await.unwrap_err());
        assert!(!error.to_string().contains("no space left"), "the disk has room: {error}");
        assert!(error.hint().unwrap().contains("ulimit -f"), "{error:?}");
    }
    let error = store.create("once", pattern(9 << 20)).await.unwrap_err();
    assert!(matches!(error, StorageError::FileSize { .. }), "{error:?}");
    assert_eq!(store.get("k", 9).await.unwrap(), "old");
    // Threads of the runtime remove hidden files, and end with it.
    let folder = std::env::var("TRAINER_TEST_FOLDER").unwrap();
    eventually(|| std::fs::read_dir(&folder).unwrap().count() == 1).await;
}

#[test]
fn a_file_that_reaches_its_limit_gives_a_clear_error_and_no_partial_object() {
    let folder = tempfile::tempdir().unwrap();
    let child = std::process::Command::new("bash")
        .args([
            "-c",
            "ulimit -f 8192; trap '' XFSZ; exec \"$0\" --ignored --exact storage::tests::child_with_small_files",
        ])
        .arg(std::env::current_exe().unwrap())
        .env("TRAINER_TEST_FOLDER", folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&child.stderr));
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["k"], "hidden files are removed too");
}

#[tokio::test]
async fn folders_disappear_with_their_last_object() {
    let (store, folder) = on_disk();
    store.put("a/b/c", Bytes::new()).await.unwrap();
    store.put("a/d", Bytes::new()).await.unwrap();
    store.delete("a/b/c").await.unwrap();
    assert_eq!(store.list_folders("a").await.unwrap(), Vec::<String>::new());
    store.delete("a/d").await.unwrap();
    assert!(folder.path().is_dir() && !folder.path().join("a").exists());
}
