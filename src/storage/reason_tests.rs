//! The reason of a refusal: the bucket's place, the refused key or session, and a request that the store does not know.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use hyper::{Request, body::Incoming};

use super::{
    s3_tests::{Answer, answer, error_body, told},
    *,
};
use crate::error::{Explain, Kind};

/// S3's answer to a request in the wrong region; to a HEAD it has no body.
fn elsewhere(request: &Request<Incoming>, status: u16, region: Option<&str>) -> Answer {
    let body = if request.method() == "HEAD" { String::new() } else { error_body("Moved") };
    let mut answer = answer(status, &body);
    if let Some(region) = region {
        answer.headers_mut().insert("x-amz-bucket-region", region.parse().unwrap());
    }
    if status == 307 {
        answer.headers_mut().insert("location", "http://127.0.0.1:9/nowhere".parse().unwrap());
    }
    answer
}

#[tokio::test]
async fn a_bucket_in_another_region_is_reported_with_that_region() {
    for status in [301, 307, 400] {
        let (store, _) = told(move |request, _| Some(elsewhere(request, status, Some("eu-south-2")))).await;
        for error in [
            store.prove_create_is_atomic().await.unwrap_err(),
            store.create("k", Bytes::from_static(b"x")).await.unwrap_err(),
            store.head("k").await.unwrap_err(),
            store.list("").await.unwrap_err(),
            store.put("k", Bytes::new()).await.unwrap_err(),
            store.upload("k", Bytes::from(vec![0; 11 << 20]), |_| {}).await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), Kind::Config, "{status}: {error:?}");
            let text = crate::error::Error::from(error);
            assert!(text.to_string().contains("s3://bucket/p") && text.to_string().contains("eu-south-2"), "{text:?}");
            assert!(text.hint().unwrap().contains("export AWS_REGION=eu-south-2"), "{:?}", text.hint());
        }
    }
    // The words of the answer to a request that was signed for another region.
    let words = "<Error><Code>AuthorizationHeaderMalformed</Code><Message>The authorization header is malformed; \
                 the region 'us-east-1' is wrong; expecting 'ap-south-1'</Message><Region>ap-south-1</Region></Error>";
    let (store, _) = told(move |_, _| Some(answer(400, words))).await;
    let error = store.prove_create_is_atomic().await.unwrap_err();
    assert!(error.hint().unwrap().contains("AWS_REGION=ap-south-1"), "{error:?}");
}

#[tokio::test]
async fn a_request_to_a_very_new_bucket_is_repeated() {
    let (store, count) = told(|request, n| match n {
        0 => Some(elsewhere(request, 307, Some("us-east-1"))),
        1 => Some(elsewhere(request, 307, None)),
        _ => Some(answer(200, "")),
    })
    .await;
    store.put("k", Bytes::new()).await.unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn one_get_finds_out_why_a_head_was_refused() {
    for (status, code, hint) in [
        (400, "ExpiredToken", "aws sso login"),
        (403, "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        (403, "RequestTimeTooSkewed", "clock"),
        (403, "AccessDenied", "trainer doctor"),
    ] {
        let says = move |request: &Request<Incoming>, _| match request.method().as_str() {
            "HEAD" => Some(answer(status, "")),
            _ => Some(answer(status, &error_body(code))),
        };
        let (store, count) = told(says).await;
        for error in [store.head("k").await.unwrap_err(), store.stored("k").await.unwrap_err()] {
            assert_eq!(error.kind(), Kind::Permission, "{code}: {error:?}");
            let error = crate::error::Error::from(error);
            assert!(error.to_string().contains(code), "{error:?}");
            assert!(error.hint().unwrap().contains(hint), "{:?}", error.hint());
        }
        assert_eq!(count.load(Ordering::SeqCst), 4, "{code}: each HEAD and one GET after it");
    }
}

#[tokio::test]
async fn a_create_refused_for_another_reason_does_not_mean_missing_conditional_puts() {
    let refused = |request: &Request<Incoming>| request.method() == "PUT";
    // The condition alone is refused.
    let (store, _) = told(move |request, _| match request.headers().contains_key("if-none-match") {
        true => Some(answer(400, &error_body("InvalidArgument"))),
        false => Some(answer(if request.method() == "HEAD" { 404 } else { 200 }, "")),
    })
    .await;
    let error = store.prove_create_is_atomic().await.unwrap_err();
    assert!(matches!(&error, StorageError::Unfit { reason } if reason.contains("InvalidArgument")), "{error:?}");
    // Every put is.
    let (store, _) = told(move |request, _| match refused(request) {
        true => Some(answer(400, &error_body("InvalidRequest"))),
        false => Some(answer(404, "")),
    })
    .await;
    let error = store.prove_create_is_atomic().await.unwrap_err();
    assert!(matches!(error, StorageError::Unavailable { .. }), "{error:?}");
    assert!(crate::error::Error::from(error).to_string().contains("InvalidRequest"));
}

#[tokio::test]
async fn for_a_bucket_that_takes_only_encrypted_objects_the_hint_names_the_setting() {
    let (store, _) = told(|_, _| Some(answer(403, &error_body("AccessDenied")))).await;
    let puts = [
        store.put("k", Bytes::new()).await.unwrap_err(),
        store.create("k", Bytes::new()).await.unwrap_err(),
        store.upload("k", Bytes::from(vec![0; 11 << 20]), |_| {}).await.unwrap_err(),
    ];
    assert!(puts.iter().all(|error| error.hint().unwrap().contains("storage.encryption")), "{puts:?}");
    assert!(!store.list("").await.unwrap_err().hint().unwrap().contains("storage.encryption"));
    let body = "<Error><Code>AccessDenied</Code><Message>not authorized to perform: \
     kms:GenerateDataKey</Message></Error>";
    let (store, _) = told(move |_, _| Some(answer(403, body))).await;
    let error = store.put("k", Bytes::new()).await.unwrap_err();
    assert!(error.hint().unwrap().contains("allow kms:GenerateDataKey"), "{:?}", error.hint());
}
