//! S3 over HTTP, in this process: a store that is known not to be atomic, and a server with prepared answers.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;

use super::{tests::settings, *};
use crate::{
    config::StorageConfig,
    error::{Explain, Kind},
};

fn environment(address: std::net::SocketAddr) -> Vec<(String, String)> {
    [
        ("AWS_ENDPOINT_URL", format!("http://{address}")),
        ("AWS_ACCESS_KEY_ID", "key".into()),
        ("AWS_SECRET_ACCESS_KEY", "hunter2".into()),
        ("AWS_REGION", "us-east-1".into()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// The integration tests' own server, which is atomic.
#[path = "../../tests/support/s3.rs"]
#[allow(dead_code, reason = "the integration tests use the rest")]
pub(super) mod server;
/// And their proxy that breaks things.
#[path = "../../tests/support/proxy.rs"]
#[allow(dead_code, reason = "the integration tests use the rest")]
pub(crate) mod proxy;

/// A server of others, if it is installed.
#[path = "../../tests/support/moto.rs"]
#[allow(dead_code, reason = "the integration tests use the rest")]
mod moto;

/// A store on a server that does what S3 does, as long as the server is kept.
pub(crate) fn atomic() -> (Store, server::S3Server) {
    // It brings a runtime of its own, which can't be started from within one.
    let server = std::thread::spawn(server::S3Server::start).join().unwrap();
    (client(&server.endpoint(), &settings()), server)
}

/// A store at `endpoint`, which leads to such a server.
pub(crate) fn client(endpoint: &str, settings: &StorageConfig) -> Store {
    let environment: Vec<_> =
        server::client_env(endpoint).into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Store::open_with(&format!("s3://{}/some/prefix", server::BUCKET), settings, &environment).unwrap()
}

/// A server over s3s-fs with the bucket `bucket`: it answers conditional puts rightly in sequence, but isn't atomic.
async fn not_atomic() -> (Store, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("bucket")).unwrap();
    let mut service = s3s::service::S3ServiceBuilder::new(s3s_fs::FileSystem::new(folder.path()).unwrap());
    service.set_auth(s3s::auth::SimpleAuth::from_single("key", "hunter2"));
    let service = service.build();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let service = service.clone();
            tokio::spawn(async move {
                let server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                let _ = server.serve_connection(TokioIo::new(socket), service).await;
            });
        }
    });
    (Store::open_with("s3://bucket/some/prefix", &settings(), &environment(address)).unwrap(), folder)
}

pub(super) type Answer = Response<http_body::Full>;

/// What a body is made of, with no more crates than are here anyway.
pub(super) mod http_body {
    use std::{
        convert::Infallible,
        pin::Pin,
        task::{Context, Poll},
    };

    use bytes::Bytes;
    use hyper::body::{Body, Frame};

    /// One piece of bytes.
    pub(in super::super) struct Full(pub Option<Bytes>);
    impl Body for Full {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Ready(self.0.take().map(|bytes| Ok(Frame::data(bytes))))
        }
    }
}

pub(super) fn answer(status: u16, body: &str) -> Answer {
    let length = body.len();
    let body = http_body::Full(Some(Bytes::from(body.to_owned())));
    Response::builder()
        .status(status)
        .header("content-length", length)
        .header("etag", "\"e\"")
        .header("last-modified", "Thu, 01 Jan 1970 00:00:00 GMT")
        .body(body)
        .unwrap()
}

/// A store whose n-th request (from 0) is answered by `says`; `None` cuts the connection.
pub(super) async fn told(
    says: impl Fn(&Request<Incoming>, usize) -> Option<Answer> + Send + Sync + 'static,
) -> (Store, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (says, count) = (Arc::new(says), Arc::new(AtomicUsize::new(0)));
    let seen = Arc::clone(&count);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (says, count) = (Arc::clone(&says), Arc::clone(&count));
            let service =
                service_fn(move |request: Request<Incoming>| -> BoxFuture<'static, Result<Answer, std::io::Error>> {
                    let answer = says(&request, count.fetch_add(1, Ordering::SeqCst));
                    Box::pin(async move { answer.ok_or_else(|| std::io::Error::other("cut")) })
                });
            tokio::spawn(async move {
                let server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                let _ = server.serve_connection(TokioIo::new(socket), service).await;
            });
        }
    });
    let store = Store::open_with("s3://bucket/p", &settings(), &environment(address)).unwrap();
    (store, seen)
}

pub(super) fn error_body(code: &str) -> String {
    format!(
        "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>said the \
        store</Message><StringToSign>SECRET</StringToSign></Error>"
    )
}

#[tokio::test]
async fn s3_holds_the_contract() {
    let (store, _folder) = not_atomic().await;
    tests::contract(&store).await;
    let (store, server) = atomic();
    tests::contract(&store).await;
    tests::contract(&store.at_priority(Priority::Background)).await;
    assert_eq!(server.open_uploads(), 0);
}

#[tokio::test]
async fn an_atomic_store_is_taken() {
    let (store, server) = atomic();
    store.prove_create_is_atomic().await.unwrap();
    assert_eq!(server.keys(""), Vec::<String>::new(), "probes are cleaned up");
}

#[tokio::test]
async fn a_store_that_looks_first_and_writes_later_is_refused() {
    let (store, server) = atomic();
    for create_once in [server::CreateOnce::Ignored, server::CreateOnce::Racy] {
        server.set_rules(|rules| rules.create_once = create_once);
        let error = store.prove_create_is_atomic().await.unwrap_err();
        assert!(matches!(error, StorageError::Unfit { .. }), "{create_once:?}: {error:?}");
    }
}

#[tokio::test]
async fn an_upload_that_is_refused_half_way_shows_nothing() {
    let (store, server) = atomic();
    let server = Arc::new(server);
    let denies = Arc::clone(&server);
    let upload =
        store.upload("k", tests::pattern(40 << 20), move |_| denies.set_rules(|rules| rules.deny_writes = true));
    let error = upload.await.unwrap_err();
    assert_eq!(error.kind(), Kind::Permission, "{error:?}");
    assert_eq!(server.keys(""), Vec::<String>::new());
}

#[tokio::test]
async fn a_store_that_is_not_atomic_is_refused() {
    let (store, _folder) = not_atomic().await;
    let error = store.prove_create_is_atomic().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Config);
    let text = error.to_string();
    assert!(text.contains("of 16 parallel creates of one key succeeded"), "{text}");
    assert!(error.hint().unwrap().contains("Amazon S3"));
    assert_eq!(store.list(crate::layout::PROBES).await.unwrap(), [], "the probe is cleaned up");
}

#[tokio::test]
async fn a_store_that_ignores_the_condition_is_refused() {
    let (store, _) = told(|request, _| Some(answer(if request.method() == "HEAD" { 404 } else { 200 }, ""))).await;
    let text = store.prove_create_is_atomic().await.unwrap_err().to_string();
    assert!(text.contains("16 of 16 parallel creates"), "{text}");
}

#[tokio::test]
async fn a_store_without_conditional_puts_is_refused() {
    let (store, _) = told(|request, _| match request.method().as_str() {
        "PUT" => Some(answer(501, &error_body("NotImplemented"))),
        _ => Some(answer(404, "")),
    })
    .await;
    let error = store.prove_create_is_atomic().await.unwrap_err();
    assert!(matches!(&error, StorageError::Unfit { reason } if reason.contains("does not know")), "{error:?}");
}

#[tokio::test]
async fn answers_of_a_server_are_sorted_and_hinted() {
    for (status, code, kind, hint) in [
        (403, "AccessDenied", Kind::Permission, "trainer doctor"),
        (403, "SignatureDoesNotMatch", Kind::Permission, "AWS_SECRET_ACCESS_KEY"),
        (400, "ExpiredToken", Kind::Permission, "expired"),
        (404, "NoSuchBucket", Kind::Config, "create the bucket"),
        (400, "InvalidToken", Kind::Permission, "expired"),
        (403, "InvalidAccessKeyId", Kind::Permission, "AWS_ACCESS_KEY_ID"),
        (403, "RequestTimeTooSkewed", Kind::Permission, "clock"),
        (301, "PermanentRedirect", Kind::Config, "AWS_REGION"),
        (400, "AuthorizationHeaderMalformed", Kind::Config, "AWS_REGION"),
    ] {
        let (store, count) = told(move |_, _| Some(answer(status, &error_body(code)))).await;
        for error in [
            store.put("k", Bytes::new()).await.unwrap_err(),
            store.create("k", Bytes::new()).await.unwrap_err(),
            store.get("k", 9).await.unwrap_err(),
            store.list("").await.unwrap_err(),
            store.delete("k").await.unwrap_err(),
            store.upload("k", Bytes::from(vec![0; 11 << 20]), |_| {}).await.unwrap_err(),
        ] {
            let error = crate::error::Error::from(error);
            let text = error.to_string();
            assert_eq!(error.kind(), kind, "{code}: {text}");
            assert!(error.hint().is_some_and(|given| given.contains(hint)), "{code}: {error:?} {:?}", error.hint());
            assert!(!text.contains("SECRET") && !text.contains("hunter2"), "{text}");
            assert!(text.contains("s3://bucket/p"), "{text}");
        }
        assert_eq!(count.load(Ordering::SeqCst), 6, "{code} is not tried again");
    }
}

#[tokio::test]
async fn a_busy_server_is_asked_again() {
    let (store, count) = told(|_, n| match n {
        0 => Some(answer(503, &error_body("SlowDown"))),
        1 => Some(answer(500, &error_body("InternalError"))),
        2 => None,
        _ => Some(answer(200, "")),
    })
    .await;
    store.put("k", Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 4);
}

#[tokio::test]
async fn a_create_that_met_412_after_a_cut_connection_is_settled_by_reading() {
    for (standing, outcome) in [("ours", CreateOutcome::Created), ("other", CreateOutcome::Exists)] {
        let (store, _) = told(move |request, n| match (request.method().as_str(), n) {
            (_, 0) => None,
            ("PUT", _) => {
                assert_eq!(request.headers()["if-none-match"], "*");
                Some(answer(412, &error_body("PreconditionFailed")))
            }
            _ => Some(answer(200, standing)),
        })
        .await;
        assert_eq!(store.create("k", Bytes::from_static(b"ours")).await.unwrap(), outcome);
    }
}

#[tokio::test]
async fn every_put_carries_its_crc64() {
    let (store, _) = told(|request, _| {
        let sum = Crc64::of(b"123456789").0.to_be_bytes();
        // Base64 of the check value of CRC-64/NVME.
        assert_eq!(sum, [0xae, 0x8b, 0x14, 0x86, 0x0a, 0x79, 0x98, 0x88]);
        let fits = request.headers().get("x-amz-checksum-crc64nvme").is_some_and(|value| value == "rosUhgp5mIg=");
        let unsigned = request.headers()["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD";
        Some(answer(if fits && unsigned { 200 } else { 400 }, ""))
    })
    .await;
    store.put("k", Bytes::from_static(b"123456789")).await.unwrap();
}

#[tokio::test]
async fn a_range_that_comes_short_long_or_as_another_one_is_asked_again() {
    let says = |_: &Request<Incoming>, n| {
        let (range, body) = match n {
            0 => ("bytes 0-1/9", "ab"),
            // Request 1 is the question how large the object is.
            2 => ("bytes 0-3/9", "ab"),
            3 => ("bytes 0-3/9", "abcdef"),
            _ => ("bytes 0-3/9", "abcd"),
        };
        let mut answer = answer(206, body);
        answer.headers_mut().insert("content-range", range.parse().unwrap());
        Some(answer)
    };
    let (store, count) = told(says).await;
    assert_eq!(store.get_range("k", 0..4).await.unwrap(), "abcd");
    assert_eq!(count.load(Ordering::SeqCst), 5);
    let (store, count) = told(says).await;
    assert_eq!(store.get_into("k", 0, vec![0; 4]).await.unwrap(), Crc64::of(b"abcd"));
    assert_eq!(count.load(Ordering::SeqCst), 5);
}

#[tokio::test]
async fn the_stores_own_checksum_is_of_the_whole_object_however_it_was_put() {
    let (store, server) = atomic();
    for len in [0, 9, (11 << 20) + 1] {
        let body = tests::pattern(len);
        store.upload("k", body.clone(), |_| {}).await.unwrap();
        let stored = store.stored("k").await.unwrap();
        assert_eq!(stored, StoredObject { size: len as u64, crc64: Some(Crc64::of(&body)) });
    }
    server.set_rules(|rules| rules.keeps_checksums = false);
    assert_eq!(store.stored("k").await.unwrap().crc64, None);
}

#[tokio::test]
async fn unfinished_uploads_of_this_folder_are_found_over_all_pages_and_discarded() {
    let (store, server) = atomic();
    let hour = std::time::Duration::from_secs(3600);
    for i in 0..5 {
        server.leave_upload(&format!("some/prefix/run/a/{i}"), i * hour);
    }
    // The same key twice; a run whose name begins like ours; the folder above.
    server.leave_upload("some/prefix/run/a/0", hour);
    server.leave_upload("some/prefix/run2/a/0", hour);
    server.leave_upload("some/run/a/0", hour);
    let lists = server.count("ListMultipartUploads");
    let found = store.folder("run").unfinished().await.unwrap();
    let keys: Vec<&str> = found.iter().map(|left| left.key.as_str()).collect();
    assert_eq!(keys, ["a/0", "a/0", "a/1", "a/2", "a/3", "a/4"]);
    assert_eq!(server.count("ListMultipartUploads") - lists, 3, "pages of two");
    assert!(found.iter().any(|left| left.since < jiff::Timestamp::now() - 3 * hour));
    for left in found.iter().chain(&found[..1]) {
        store.folder("run").discard(left).await.unwrap();
    }
    assert_eq!(server.upload_keys(), ["some/prefix/run2/a/0", "some/run/a/0"]);
    server.set_rules(|rules| rules.deny_upload_list = true);
    let error = store.unfinished().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Permission, "{error:?}");
}

#[tokio::test]
async fn the_second_client_is_told_the_same_and_asks_again_like_the_first() {
    for (status, code, kind) in [
        (403, "AccessDenied", Kind::Permission),
        (400, "ExpiredToken", Kind::Permission),
        (404, "NoSuchBucket", Kind::Config),
        (301, "PermanentRedirect", Kind::Config),
    ] {
        let (store, count) = told(move |_, _| Some(answer(status, &error_body(code)))).await;
        let error = crate::error::Error::from(store.unfinished().await.unwrap_err());
        let text = error.to_string();
        assert_eq!(error.kind(), kind, "{code}: {text}");
        assert!(text.contains("s3://bucket/p") && text.contains(code), "{text}");
        assert!(!text.contains("SECRET") && !text.contains("hunter2"), "{text}");
        assert_eq!(count.load(Ordering::SeqCst), 1, "{code} is not tried again");
    }
    let (store, count) = told(|_, n| match n {
        0 => Some(answer(503, &error_body("SlowDown"))),
        1 => None,
        _ => Some(answer(200, "12345")),
    })
    .await;
    assert_eq!(store.stored("k").await.unwrap(), StoredObject { size: 5, crc64: None });
    assert_eq!(count.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_listing_that_leads_nowhere_is_an_error_and_strange_entries_are_left_alone() {
    // Says that there is more, and means the same page.
    let page = |next: &str, upload: &str| {
        format!(
            "<?xml version=\"1.0\"?><ListMultipartUploadsResult><IsTruncated>{}</IsTruncated>{next}{upload}</ListMultipartUploadsResult>",
            !next.is_empty()
        )
    };
    let turn = page("<NextKeyMarker>k</NextKeyMarker><NextUploadIdMarker>i</NextUploadIdMarker>", "");
    let (store, _) = told(move |_, n| (n < 100).then(|| answer(200, &turn))).await;
    let error = tokio::time::timeout(std::time::Duration::from_secs(120), store.bare_uploads()).await.unwrap();
    assert!(error.unwrap_err().to_string().contains("S3"));
    // Of another folder, without an id, without a time, and one that is sound.
    let entries = "<Upload><Key>q/k</Key><UploadId>1</UploadId><Initiated>2026-01-01T00:00:00Z</Initiated></Upload>\
                   <Upload><Key>p/a</Key><Initiated>2026-01-01T00:00:00Z</Initiated></Upload>\
                   <Upload><Key>p/b</Key><UploadId>2</UploadId></Upload>\
                   <Upload><Key>p/c</Key><UploadId>3</UploadId><Initiated>2026-01-01T00:00:00Z</Initiated></Upload>";
    let entries = page("", entries);
    let (store, _) = told(move |_, _| Some(answer(200, &entries))).await;
    let found = store.unfinished().await.unwrap();
    assert!(found.len() == 1 && found[0].key == "c", "{found:?}");
}

impl Store {
    /// One listing of unfinished uploads, without retries.
    async fn bare_uploads(&self) -> object_store::Result<usize> {
        let bucket = self.inner.connections.backend.s3.as_ref().expect("a store on S3");
        bucket.uploads("p/").await.map(|found| found.len())
    }
}

#[tokio::test]
async fn a_server_that_others_have_written_holds_the_contract() {
    let Some(moto) = moto::Moto::start(server::BUCKET) else { return };
    let environment: Vec<_> =
        server::client_env(&moto.endpoint()).into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let uri = format!("s3://{}/some/prefix", server::BUCKET);
    let store = Store::open_with(&uri, &settings(), &environment).unwrap();
    // It looks first and writes later, on threads: racing creates are not for it.
    tests::contract(&store).await;
    assert_eq!(store.list("").await.unwrap(), [], "nothing is left behind");
}
