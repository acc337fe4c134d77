//! Tests of the harness: a test that relies on a server that is not atomic, or on a proxy that breaks nothing, proves
//! nothing.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, future::join_all};
use object_store::{
    ObjectStore, ObjectStoreExt, PutMode, PutOptions, WriteMultipart,
    aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey},
    path::Path,
};

use crate::support::{
    lab::Lab,
    proxy::{Fault, FaultProxy, Line, Often, Rule},
    s3::{ACCESS_KEY, BUCKET, CreateOnce, NonAtomicS3, S3Server, SECRET_KEY, crc64_text},
};

/// A test that takes such a file for an object kills a node before that object is there.
#[test]
fn a_file_that_a_folder_store_still_writes_is_no_object() {
    let lab = Lab::on_files();
    let folder = lab.path("store").join("run/checkpoints");
    std::fs::create_dir_all(&folder).expect("a folder");
    for name in ["receipt-a.json#1", "receipt-b.json", "receipt-c.json#d"] {
        std::fs::write(folder.join(name), "{}").expect("a file");
    }
    assert_eq!(lab.keys("run", "checkpoints/"), ["checkpoints/receipt-b.json", "checkpoints/receipt-c.json#d"]);
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime").block_on(work)
}

fn client(endpoint: &str, retries: usize, secret: &str) -> Arc<AmazonS3> {
    let retry = object_store::RetryConfig {
        max_retries: retries,
        backoff: object_store::BackoffConfig {
            init_backoff: Duration::from_millis(1),
            max_backoff: Duration::from_millis(5),
            base: 2.0,
        },
        ..Default::default()
    };
    let builder = AmazonS3Builder::new()
        .with_endpoint(endpoint)
        .with_allow_http(true)
        .with_region("us-east-1")
        .with_bucket_name(BUCKET)
        .with_access_key_id(ACCESS_KEY)
        .with_secret_access_key(secret)
        .with_config(AmazonS3ConfigKey::Checksum, "crc64nvme")
        .with_retry(retry);
    Arc::new(builder.build().expect("client"))
}

/// The number of 16 racing creates of `key` that win.
async fn winners(client: &Arc<AmazonS3>, key: &str) -> usize {
    let key = Path::from(key);
    let racers = (0..16).map(|racer| {
        let (client, key) = (client.clone(), key.clone());
        tokio::spawn(async move {
            let body = Bytes::from(format!("racer {racer}"));
            client.put_opts(&key, body.into(), PutOptions::from(PutMode::Create)).await.is_ok()
        })
    });
    join_all(racers).await.into_iter().filter(|won| *won.as_ref().expect("racer")).count()
}

#[test]
fn create_once_is_atomic_unless_a_test_switches_it_off() {
    let server = S3Server::start();
    block_on(async {
        let client = client(&server.endpoint(), 0, SECRET_KEY);
        for round in 0..5 {
            assert_eq!(winners(&client, &format!("atomic-{round}")).await, 1);
        }
        server.set_rules(|rules| rules.create_once = CreateOnce::Ignored);
        assert_eq!(winners(&client, "ignored").await, 16);
        server.set_rules(|rules| rules.create_once = CreateOnce::Racy);
        assert!(winners(&client, "racy").await > 1);
        assert_eq!(winners(&client, "racy").await, 0, "in sequence it refuses");
    });
}

#[test]
fn the_published_server_lets_several_racing_creates_win() {
    let root = tempfile::tempdir().expect("folder");
    let server = NonAtomicS3::start(root.path());
    block_on(async {
        let client = client(&server.endpoint(), 0, SECRET_KEY);
        let mut most = 0;
        for round in 0..100 {
            most = most.max(winners(&client, &format!("round-{round}")).await);
            if most > 1 {
                return;
            }
        }
        panic!("at most {most} of 16 racing creates won in 100 rounds");
    });
}

#[test]
fn objects_are_put_read_in_ranges_listed_and_deleted() {
    let server = S3Server::start();
    block_on(async {
        let client = client(&server.endpoint(), 0, SECRET_KEY);
        let body: Vec<u8> = (0..100_000_u32).map(|i| (i * 7) as u8).collect();
        client.put(&Path::from("a/one"), body.clone().into()).await.expect("put");
        assert_eq!(server.read("a/one").expect("stored"), body);
        let part = client.get_range(&Path::from("a/one"), 50_000..50_100).await.expect("range");
        assert_eq!(part, &body[50_000..50_100]);
        assert!(client.get_range(&Path::from("a/one"), 200_000..200_001).await.is_err());

        for i in 0..1500 {
            server.write(&format!("many/{}/{i:04}", i % 3), "x");
        }
        let listed: Vec<_> = client.list(Some(&Path::from("many"))).try_collect().await.expect("list");
        assert_eq!(listed.len(), 1500, "in two pages");
        assert_eq!(server.count("ListObjectsV2"), 2);
        let folders = client.list_with_delimiter(Some(&Path::from("many"))).await.expect("list");
        assert_eq!((folders.common_prefixes.len(), folders.objects.len()), (3, 0));

        let keys = listed.into_iter().map(|object| Ok(object.location)).take(1200).collect::<Vec<_>>();
        let deleted: Vec<_> =
            client.delete_stream(futures::stream::iter(keys).boxed()).try_collect().await.expect("delete");
        assert_eq!((deleted.len(), server.keys("many/").len()), (1200, 300));
        client.delete(&Path::from("a/one")).await.expect("delete");
        assert!(matches!(client.head(&Path::from("a/one")).await, Err(object_store::Error::NotFound { .. })));
    });
}

#[test]
fn multipart_uploads_are_whole_or_absent() {
    let server = S3Server::start();
    block_on(async {
        let client = client(&server.endpoint(), 0, SECRET_KEY);
        let body: Vec<u8> = (0..(12_u32 << 20)).map(|i| (i * 31 + (i >> 12)) as u8).collect();
        let upload = client.put_multipart(&Path::from("big")).await.expect("create");
        assert_eq!(server.open_uploads(), 1);
        let mut writer = WriteMultipart::new_with_chunk_size(upload, 5 << 20);
        writer.write(&body);
        assert!(server.read("big").is_none(), "nothing is seen before it is complete");
        writer.finish().await.expect("complete");
        assert!(server.read("big").expect("stored") == body);
        let mut dropped = client.put_multipart(&Path::from("dropped")).await.expect("create");
        dropped.put_part(body[..6 << 20].to_vec().into()).await.expect("part");
        dropped.abort().await.expect("abort");
        assert_eq!((server.open_uploads(), server.read("dropped")), (0, None));
    });
}

#[test]
fn checksums_are_written_as_s3_writes_them() {
    let mut hasher = s3s::checksum::ChecksumHasher { crc64nvme: Some(Default::default()), ..Default::default() };
    hasher.update(b"123456789");
    // The check value of CRC-64/NVME is ae8b14860a799888.
    assert_eq!(hasher.finalize().checksum_crc64nvme, Some(crc64_text(0xae8b_1486_0a79_9888)));
}

#[test]
fn wrong_keys_and_denied_writes_are_refused() {
    let server = S3Server::start();
    block_on(async {
        let stranger = client(&server.endpoint(), 0, "wrong");
        let error = stranger.put(&Path::from("x"), "x".into()).await.expect_err("a wrong signature").to_string();
        assert!(error.contains("403"), "{error}");
        server.set_rules(|rules| rules.deny_writes = true);
        let client = client(&server.endpoint(), 0, SECRET_KEY);
        let error = client.put(&Path::from("x"), "x".into()).await.expect_err("a denied write");
        assert!(matches!(error, object_store::Error::PermissionDenied { .. }), "{error}");
        assert!(server.keys("").is_empty());
    });
}

#[test]
fn each_fault_breaks_what_its_name_says() {
    let server = S3Server::start();
    let proxy = FaultProxy::start(server.address(), 1);
    let arm = |method, fault, times| proxy.arm(Rule { method, target: "", fault, often: Often::Next(times) });
    block_on(async {
        let once = client(&proxy.endpoint(), 0, SECRET_KEY);
        let patient = client(&proxy.endpoint(), 5, SECRET_KEY);
        let key = |name: &str| Path::from(name);
        let body = || Bytes::from(vec![7_u8; 10_000]);

        arm("PUT", Fault::SlowDown, 2);
        patient.put(&key("slow"), body().into()).await.expect("a retried put");
        assert_eq!(proxy.broken(), 2);

        arm("PUT", Fault::Reset, 1);
        once.put(&key("reset"), body().into()).await.expect_err("a reset put");
        assert!(server.read("reset").is_none(), "the server heard nothing");

        arm("PUT", Fault::CutRequest(100), 1);
        once.put(&key("cut"), body().into()).await.expect_err("a cut put");
        assert!(server.read("cut").is_none(), "half a body is no object");

        arm("PUT", Fault::LoseAnswer, 1);
        once.put(&key("landed"), body().into()).await.expect_err("a put without an answer");
        assert_eq!(server.read("landed"), Some(body()), "the write landed");

        arm("GET", Fault::FlipResponse(9), 1);
        let got = once.get_range(&key("landed"), 0..10_000).await.expect("a garbled get");
        assert_eq!((got[9], got.iter().filter(|b| **b != 7).count()), (6, 1), "one bit of one byte");

        arm("GET", Fault::CutResponse(9), 1);
        once.get_range(&key("landed"), 0..10_000).await.expect_err("a cut get");

        proxy.set_line(Line {
            latency: Duration::from_millis(1),
            up: Some(1 << 30),
            down: Some(1 << 30),
            ..Line::default()
        });
        assert_eq!(once.get_range(&key("landed"), 0..10).await.expect("a get"), body().slice(..10));
        assert_eq!(proxy.broken(), 7);

        let listed = || async { once.list(None).try_collect::<Vec<_>>().await.expect("a list").len() };
        let before = listed().await;
        once.put(&key("new"), body().into()).await.expect("a put");
        arm("", Fault::Stale, 2);
        assert_eq!(listed().await, before, "the list of an earlier time");
        assert!(matches!(once.head(&key("new")).await, Err(object_store::Error::NotFound { .. })), "not there yet");
        assert_eq!((listed().await, once.head(&key("new")).await.is_ok()), (before + 1, true), "and then the truth");
        assert_eq!(proxy.broken_by_kind()["stale read"], 2);

        proxy.arm(Rule { method: "GET", target: "landed", fault: Fault::SlowDown, often: Often::Percent(50) });
        for _ in 0..40 {
            let _ = once.get_range(&key("landed"), 0..10).await;
        }
        assert!((8..32).contains(&(proxy.broken() - 9)), "{} of 40", proxy.broken() - 9);
        proxy.disarm();
        once.get_range(&key("landed"), 0..10).await.expect("a get without rules");
    });
}
