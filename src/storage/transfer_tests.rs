//! Transfers against a real server and real disks: checksums that the store checks, answers that are lost, storms,
//! priorities.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;

use super::{
    backend::Large,
    faulty::{Fault, Faulty},
    s3_tests::{
        atomic, client,
        proxy::{self, FaultProxy, Often, Rule},
        server::{Asked, S3Server},
    },
    tests::{pattern, settings},
    *,
};
use crate::{
    config::{Encryption, StorageConfig},
    error::{Explain, Kind},
    threads::testing::{SCHED_IDLE, policy},
};

const KEY: &str = "some/prefix/k";

/// A server behind a proxy, and a store that reaches it through both.
fn behind_proxy(seed: u64) -> (Store, S3Server, FaultProxy) {
    let (_, server) = atomic();
    let upstream = server.address();
    let proxy = std::thread::spawn(move || FaultProxy::start(upstream, seed)).join().unwrap();
    (client(&proxy.endpoint(), &settings()), server, proxy)
}

fn next(count: u32, method: &'static str, target: &'static str, fault: proxy::Fault) -> Rule {
    Rule { method, target, fault, often: Often::Next(count) }
}

/// Whether the store's own checksum of an object is `expected`.
async fn keeps(store: &Store, expected: Crc64) -> Option<bool> {
    let Large::S3(s3) = &store.inner.connections.backend.large else { panic!("not on S3") };
    s3.look(&store.path("k").unwrap(), expected).await.unwrap().1
}

#[tokio::test]
async fn a_bit_that_flips_on_its_way_is_refused_by_the_store_and_sent_again() {
    for (len, target, requests) in [(11 << 20, "partNumber=2", "UploadPart"), (1 << 20, "prefix/k", "PutObject")] {
        let (store, server, proxy) = behind_proxy(0);
        proxy.arm(next(1, "PUT", target, proxy::Fault::FlipRequest(4321)));
        let body = pattern(len);
        let put = store.upload("k", body.clone(), |_| {}).await.unwrap();
        assert_eq!((put.crc64, proxy.broken()), (Crc64::of(&body), 1));
        let parts = if len > 5 << 20 { 3 } else { 1 };
        assert_eq!(server.count(requests), parts + 1, "the damaged one was sent again");
        assert!(server.read(KEY).unwrap() == body);
    }
}

#[tokio::test]
async fn the_store_keeps_the_checksum_of_the_whole_object() {
    let (store, server) = atomic();
    for len in [0, 1 << 20, 23 << 20] {
        let body = pattern(len);
        let put = store.upload("k", body.clone(), |_| {}).await.unwrap();
        assert_eq!(put.crc64, Crc64::of(&body));
        assert_eq!(keeps(&store, put.crc64).await, Some(true), "{len}");
        assert_eq!(keeps(&store, Crc64(put.crc64.0 ^ 1)).await, Some(false), "{len}");
    }
    let parts = |operation| server.asked(KEY, operation).unwrap();
    let asked = Asked { checksum_type: Some("FULL_OBJECT".into()), ..Asked::default() };
    let begun = Asked { checksum_algorithm: Some("CRC64NVME".into()), ..asked.clone() };
    assert_eq!(parts("CreateMultipartUpload"), begun);
    // Sent with each body, so that the store refuses one that was changed in transfer.
    assert_eq!(parts("PutObject").checksum, Some(Crc64::of(&pattern(1 << 20)).base64()));
    assert!(parts("UploadPart").checksum.is_some());
    let whole = Crc64::of(&pattern(23 << 20)).base64();
    assert_eq!(parts("CompleteMultipartUpload"), Asked { checksum: Some(whole), summed_parts: 5, ..asked });
}

#[tokio::test]
async fn a_completion_whose_answer_is_lost_is_settled_by_the_stores_checksum() {
    let body = pattern(11 << 20);
    for keeps_checksums in [true, false] {
        let (store, server, proxy) = behind_proxy(0);
        server.set_rules(|rules| rules.keeps_checksums = keeps_checksums);
        proxy.arm(next(1, "POST", "uploadId=", proxy::Fault::LoseAnswer));
        store.upload("k", body.clone(), |_| {}).await.unwrap();
        assert_eq!((server.count("CompleteMultipartUpload"), server.count("HeadObject")), (2, 1));
        assert_eq!(server.count("GetObject"), u64::from(!keeps_checksums), "read back only where nothing else helps");
        assert!(server.read(KEY).unwrap() == body);

        // The answer is the same if the upload was aborted before and an older object exists: one of the same size, or
        // a longer one.
        let mut older = body.to_vec();
        older[0] ^= 1;
        let server = Arc::new(server);
        for older in [older, [&body[..], b"more"].concat()] {
            server.write(KEY, older.clone());
            proxy.arm(next(1, "POST", "uploadId=", proxy::Fault::Reset));
            let (forgets, left) = (Arc::clone(&server), AtomicU64::new(body.len() as u64));
            let upload = store.upload("k", body.clone(), move |n| {
                if left.fetch_sub(n, Ordering::SeqCst) == n {
                    forgets.forget_uploads();
                }
            });
            let error = upload.await.unwrap_err();
            assert_eq!(error.kind(), Kind::Unavailable, "{error:?}");
            assert!(server.read(KEY).unwrap() == older);
        }
    }
}

/// A part sent twice has the name that the store gave it last, whichever answer came first; with keys of KMS each time
/// another one.
#[tokio::test]
async fn parts_that_were_stored_again_after_their_answer_are_completed_all_the_same() {
    let (store, server) = atomic();
    let Large::S3(s3) = &store.inner.connections.backend.large else { panic!("not on S3") };
    let path = store.path("k").unwrap();
    let body = pattern(13 << 20);
    let parts: Vec<Bytes> = (0..3).map(|n| body.slice(n * (5 << 20)..body.len().min((n + 1) * (5 << 20)))).collect();
    for again in [vec![0], vec![1, 2], vec![]] {
        let id = s3.begin(&path).await.unwrap();
        let mut taken = Vec::new();
        for (n, part) in parts.iter().enumerate() {
            taken.push(s3.part(&path, &id, n, part.clone(), Crc64::of(part)).await.unwrap());
        }
        for &n in &again {
            s3.part(&path, &id, n, parts[n].clone(), Crc64::of(&parts[n])).await.unwrap();
        }
        let lists = server.count("ListParts");
        s3.complete(&path, &id, &taken, Crc64::of(&body)).await.unwrap();
        assert!(server.read(KEY).unwrap() == body);
        assert_eq!(server.count("ListParts") - lists, if again.is_empty() { 0 } else { 2 }, "pages of two");
        server.remove(KEY);
    }
    // Other bytes in its place are no part of ours.
    let id = s3.begin(&path).await.unwrap();
    let mut taken = Vec::new();
    for (n, part) in parts.iter().enumerate() {
        taken.push(s3.part(&path, &id, n, part.clone(), Crc64::of(part)).await.unwrap());
    }
    let other = pattern((5 << 20) + 1).slice(1..);
    s3.part(&path, &id, 1, other.clone(), Crc64::of(&other)).await.unwrap();
    let error = s3.complete(&path, &id, &taken, Crc64::of(&body)).await.unwrap_err();
    assert!(error.to_string().contains("InvalidPart"), "{error}");
    assert_eq!(server.read(KEY), None);
}

#[tokio::test]
async fn cut_or_refused_ranges_are_requested_again_whole() {
    let (store, server, proxy) = behind_proxy(0);
    let body = pattern(3 << 20);
    server.write(KEY, body.clone());
    proxy.arm(next(1, "GET", "", proxy::Fault::CutResponse(1_000_000)));
    proxy.arm(next(1, "GET", "", proxy::Fault::SlowDown));
    let sum = store.get_into("k", 1, vec![0; (3 << 20) - 1]).await.unwrap();
    assert_eq!((sum, proxy.broken()), (Crc64::of(&body[1..]), 2));
    // A transfer can't detect a flipped bit: it sums the bytes that arrived.
    proxy.disarm();
    proxy.arm(next(1, "GET", "", proxy::Fault::FlipResponse(77)));
    let sum = store.get_into("k", 0, vec![0; 3 << 20]).await.unwrap();
    assert_ne!(sum, Crc64::of(&body));
}

#[tokio::test]
async fn transfers_slow_down_in_a_storm_of_refusals_and_succeed() {
    let seed = 20_260_101;
    println!("seed {seed}");
    let (store, server, proxy) = behind_proxy(seed);
    proxy.arm(Rule { method: "", target: "", fault: proxy::Fault::SlowDown, often: Often::Percent(25) });
    let body = pattern(42 << 20);
    let put = store.upload("k", body.clone(), |_| {}).await.unwrap();
    assert!(server.read(KEY).unwrap() == body && server.open_uploads() == 0);
    let got = (0..8).map(|i| store.get_into("k", i << 20, vec![0; 1 << 20]));
    futures::future::try_join_all(got).await.unwrap();
    assert_eq!(put.crc64, Crc64::of(&body));
    assert!(proxy.broken() > 0);
}

#[tokio::test]
async fn a_store_that_says_slow_down_is_asked_more_often_than_one_that_is_down() {
    let slow = |n| n < 12 || n == 13;
    let faulty = Faulty::new(move |op, _, n| if op == "put" && slow(n) { Fault::SlowDown } else { Fault::Pass });
    let store = Store::faulty(&faulty, &settings());
    store.put("k", Bytes::new()).await.unwrap();
    assert_eq!(faulty.count("put"), 13, "its policy gives up after 5 attempts otherwise");
    let connections = &store.inner.connections;
    assert_eq!(
        (connections.up.limit(), connections.down.limit()),
        (4, 4),
        "a small request is none of the transfers' business"
    );
    store.upload("k", pattern(100), |_| {}).await.unwrap();
    assert_eq!((connections.up.limit(), connections.down.limit()), (2, 4));
}

#[tokio::test]
async fn every_object_carries_encryption_and_storage_class() {
    let server = atomic().1;
    for (encryption, key, header) in [
        (Encryption::SseS3, None, "AES256"),
        (Encryption::SseKms, None, "aws:kms"),
        (Encryption::SseKms, Some("arn:aws:kms:us-east-1:1:key/2"), "aws:kms"),
    ] {
        let settings = StorageConfig {
            encryption,
            kms_key_id: key.map(str::to_owned),
            storage_class: Some("STANDARD_IA".into()),
            ..settings()
        };
        let store = client(&server.endpoint(), &settings);
        store.upload("parts", pattern(6 << 20), |_| {}).await.unwrap();
        store.upload("whole", pattern(6), |_| {}).await.unwrap();
        store.create(&format!("{encryption:?}{}", key.is_some()), Bytes::from_static(b"x")).await.unwrap();
        store.put("heartbeat", Bytes::new()).await.unwrap();
        let expected = Asked {
            encryption: Some(header.into()),
            kms_key_id: key.map(str::to_owned),
            storage_class: Some("STANDARD_IA".into()),
            ..Asked::default()
        };
        let asked = |key: &str, operation| {
            let asked = server.asked(&format!("some/prefix/{key}"), operation).unwrap();
            Asked { checksum: None, ..asked }
        };
        let begun = asked("parts", "CreateMultipartUpload");
        assert_eq!(Asked { checksum_type: None, checksum_algorithm: None, ..begun }, expected);
        assert_eq!(asked("whole", "PutObject"), expected);
        assert_eq!(asked(&format!("{encryption:?}{}", key.is_some()), "PutObject"), expected);
        // An object that is overwritten every few seconds would pay a class's minimum storage time for each version.
        assert_eq!(asked("heartbeat", "PutObject"), Asked { storage_class: None, ..expected });
    }
    let store = client(&server.endpoint(), &settings());
    store.upload("plain", pattern(6), |_| {}).await.unwrap();
    let asked = server.asked("some/prefix/plain", "PutObject").unwrap();
    assert_eq!(Asked { checksum: None, ..asked }, Asked::default());
}

#[test]
fn settings_for_s3_are_refused_on_other_stores() {
    let folder = tempfile::tempdir().unwrap();
    for (setting, settings) in [
        ("storage.encryption", StorageConfig { encryption: Encryption::SseS3, ..settings() }),
        ("storage.storage_class", StorageConfig { storage_class: Some("STANDARD_IA".into()), ..settings() }),
    ] {
        for uri in ["memory://", "gs://bucket/x", "az://container/x", &format!("file://{}", folder.path().display())] {
            let error = Store::open_with(uri, &settings, &[]).unwrap_err();
            assert_eq!(error.kind(), Kind::Config);
            assert!(error.to_string().contains(setting) && error.to_string().contains(uri), "{error}");
            assert!(error.hint().unwrap().contains("leave"));
        }
    }
}

/// A broken promise is a failure, not a hang.
async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), work).await.expect("it waits for what it should not wait for")
}

#[test]
fn under_a_cap_a_part_is_what_passes_in_half_a_second() {
    let settings = StorageConfig { max_upload_mib_per_s: Some(12), part_mib: 16, ..settings() };
    let store = Store::open("memory://", &settings).unwrap();
    assert_eq!((store.part(), store.at_priority(Priority::Urgent).part()), (6 << 20, 16 << 20));
    let fast = StorageConfig { max_upload_mib_per_s: Some(1000), ..settings };
    assert_eq!(Store::open("memory://", &fast).unwrap().part(), 16 << 20);
}

#[tokio::test]
async fn the_cap_does_not_delay_an_urgent_upload() {
    let settings = StorageConfig { max_upload_mib_per_s: Some(1), ..settings() };
    let folder = tempfile::tempdir().unwrap();
    for store in [
        Store::open("memory://", &settings).unwrap(),
        Store::open(&format!("file://{}", folder.path().display()), &settings).unwrap(),
    ] {
        // The upload under way will take twelve days.
        store.rate_limit().unwrap().take(1 << 40).await;
        let waiting = tokio::spawn({
            let store = store.clone();
            async move { store.upload("held", pattern(100), |_| {}).await }
        });
        soon(store.at_priority(Priority::Urgent).upload("k", pattern(12 << 20), |_| {})).await.unwrap();
        soon(store.put("heartbeat", Bytes::new())).await.unwrap();
        assert!(!waiting.is_finished() && store.head("held").await.is_err());
        waiting.abort();
    }
}

/// Memory that records which kind of thread filled it.
struct Watched(Vec<u8>, Arc<AtomicU64>);
impl AsMut<[u8]> for Watched {
    fn as_mut(&mut self) -> &mut [u8] {
        self.1.fetch_max(policy().into(), Ordering::SeqCst);
        &mut self.0
    }
}

#[tokio::test]
async fn only_background_transfers_run_on_threads_that_yield() {
    let (store, _server) = atomic();
    for (priority, expected) in [(Priority::Background, SCHED_IDLE), (Priority::Normal, 0), (Priority::Urgent, 0)] {
        let store = store.at_priority(priority);
        let seen = Arc::new(AtomicU64::new(0));
        let sees = Arc::clone(&seen);
        store
            .upload("k", pattern(11 << 20), move |_| _ = sees.fetch_max(policy().into(), Ordering::SeqCst))
            .await
            .unwrap();
        assert_eq!(seen.swap(0, Ordering::SeqCst), u64::from(expected), "{priority:?} up");
        store.get_into("k", 0, Watched(vec![0; 1 << 20], Arc::clone(&seen))).await.unwrap();
        assert_eq!(seen.load(Ordering::SeqCst), u64::from(expected), "{priority:?} down");
    }
    assert_eq!(policy(), 0, "the caller's own thread is as it was");
    for (priority, expected) in [(Priority::Background, SCHED_IDLE), (Priority::Normal, 0), (Priority::Urgent, 0)] {
        let seen = Arc::new(AtomicU64::new(0));
        let sees = Arc::clone(&seen);
        let faulty = Faulty::new(move |op, _, _| {
            if op == "get" {
                sees.fetch_max(policy().into(), Ordering::SeqCst);
            }
            Fault::Pass
        });
        let store = Store::faulty(&faulty, &settings()).at_priority(priority);
        store.put("k", Bytes::from_static(b"bytes")).await.unwrap();
        assert_eq!(store.get_range("k", 1..3).await.unwrap(), "yt");
        assert_eq!(seen.load(Ordering::SeqCst), u64::from(expected), "{priority:?}, a range");
    }
}

/// The caller has a runtime with one thread; a restore uses more threads, which end with it.
#[tokio::test]
async fn urgent_reads_have_their_own_threads_while_they_last() {
    let (store, server) = atomic();
    server.write(KEY, pattern(1 << 20));
    let store = store.at_priority(Priority::Urgent);
    let caller = std::thread::current().id();
    let filled = Arc::new(std::sync::Mutex::new(Vec::new()));
    struct Where(Vec<u8>, Arc<std::sync::Mutex<Vec<std::thread::ThreadId>>>);
    impl AsMut<[u8]> for Where {
        fn as_mut(&mut self) -> &mut [u8] {
            self.1.lock().unwrap().push(std::thread::current().id());
            &mut self.0
        }
    }
    let got = (0..8).map(|_| store.get_into("k", 0, Where(vec![0; 1 << 20], Arc::clone(&filled))));
    for sum in futures::future::try_join_all(got).await.unwrap() {
        assert_eq!(sum, Crc64::of(&pattern(1 << 20)));
    }
    let filled = filled.lock().unwrap();
    assert!(!filled.is_empty() && !filled.contains(&caller), "{caller:?}: {filled:?}");
    assert!(store.inner.urgent.lock().unwrap().upgrade().is_none(), "its threads are gone");
}

/// Every thread that works on background transfers is stuck, as on a machine whose cores are all taken.
#[tokio::test]
async fn a_heartbeat_does_not_wait_for_background_threads() {
    let (store, _server) = atomic();
    let background = store.at_priority(Priority::Background);
    // This opens the background's connections, too, for both directions.
    background.upload("k", pattern(6 << 20), |_| {}).await.unwrap();
    background.get_into("k", 0, vec![0; 6 << 20]).await.unwrap();
    assert!(
        !Arc::ptr_eq(&background.background().unwrap().connections, &store.inner.connections),
        "they are no others' connections"
    );
    let (stuck, mut stuck_now) = tokio::sync::mpsc::unbounded_channel();
    let (release, held) = std::sync::mpsc::channel::<()>();
    let held = Arc::new(std::sync::Mutex::new(held));
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    let pool = background.background().unwrap();
    let tasks: Vec<_> = (0..threads)
        .map(|_| {
            let (stuck, held) = (stuck.clone(), Arc::clone(&held));
            let holds = async move {
                stuck.send(()).unwrap();
                // The first transfer waits for the test, the others for the first.
                let _ = held.lock().unwrap().recv();
            };
            pool.threads.spawn(holds).unwrap()
        })
        .collect();
    for _ in 0..threads {
        stuck_now.recv().await.unwrap();
    }
    let upload = tokio::spawn({
        let background = background.clone();
        async move { background.upload("waits", pattern(6 << 20), |_| {}).await }
    });
    // On this thread's runtime, through the other connections, with either handle.
    for store in [&store, &background] {
        soon(store.put("heartbeat", Bytes::from_static(b"alive"))).await.unwrap();
        assert_eq!(soon(store.get("heartbeat", 9)).await.unwrap(), "alive");
    }
    soon(store.at_priority(Priority::Urgent).upload("last", pattern(6 << 20), |_| {})).await.unwrap();
    assert!(!upload.is_finished() && store.head("waits").await.is_err());
    drop(release);
    for task in tasks {
        task.end().await.unwrap();
    }
    upload.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_dropped_background_transfer_stops_and_is_aborted() {
    let faulty = Faulty::new(|op, _, n| if op == "part" && n >= 1 { Fault::Hang } else { Fault::Pass });
    let store = Store::faulty(&faulty, &settings()).at_priority(Priority::Background);
    let (heard, mut first) = tokio::sync::mpsc::unbounded_channel();
    {
        let upload = store.upload("k", pattern(18 << 20), move |n| heard.send(n).unwrap());
        tokio::select! {
            biased;
            _ = first.recv() => {}
            done = upload => panic!("finished first: {done:?}"),
        }
    }
    let aborted = async {
        while faulty.count("abort") == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), aborted).await.expect("it was never aborted");
}
