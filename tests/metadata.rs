//! Our metadata server compared with the vendors' documentation, and our client tested on that server.

use std::time::Duration;

use reqwest::{Method, header::HeaderMap};
use serde_json::{Value, json};
use trainer::cloud::{
    imds::Imds,
    metadata::{Answer, Endpoint, MetadataError},
};

use crate::support::{
    metadata::{
        AUTO_SCALING, Cloud, Fault, GROUP, HOOK, INSTANCE, MAINTENANCE, MetadataServer, PREEMPTED, REBALANCE, Reply,
        SCHEDULED_EVENTS, SPOT, TOKEN, azure_event, spot_notice,
    },
    trainer::LIMIT,
};

const TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";
const WITH: &str = "x-aws-ec2-metadata-token";
const FLAVOR: (&str, &str) = ("metadata-flavor", "Google");
const METADATA: (&str, &str) = ("metadata", "true");

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime").block_on(work)
}

async fn ask(
    server: &MetadataServer,
    method: Method,
    path: &str,
    headers: &[(&'static str, &str)],
    body: Option<String>,
) -> Answer {
    let (_, base) = server.envs().pop().expect("Azure's endpoint");
    let endpoint = Endpoint::new(&base).expect("endpoint");
    endpoint.ask(method, path, headers, body, LIMIT).await.expect("an answer")
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).map_or("", |value| value.to_str().expect("text"))
}

#[test]
fn aws_gives_tokens_and_asks_for_them() {
    block_on(async {
        let server = MetadataServer::start();
        for (headers, status) in [
            (vec![], 400),
            (vec![(TTL, "0")], 400),
            (vec![(TTL, "21601")], 400),
            (vec![(TTL, "soon")], 400),
            (vec![(TTL, "60"), ("x-forwarded-for", "10.0.0.1")], 403),
            (vec![(TTL, "60")], 200),
        ] {
            let answer = ask(&server, Method::PUT, TOKEN, &headers, None).await;
            assert_eq!(answer.status, status, "{headers:?}");
        }
        let answer = ask(&server, Method::PUT, TOKEN, &[(TTL, "60")], None).await;
        assert_eq!(header(&answer.headers, TTL), "60");
        let path = "/latest/meta-data/instance-id";
        assert_eq!(ask(&server, Method::GET, path, &[], None).await.status, 401);
        assert_eq!(ask(&server, Method::GET, path, &[(WITH, "made-up")], None).await.status, 401);
        let found = ask(&server, Method::GET, path, &[(WITH, &answer.body)], None).await;
        assert_eq!((found.status, found.body.as_str()), (200, INSTANCE));
        for absent in [SPOT, REBALANCE, MAINTENANCE] {
            assert_eq!(ask(&server, Method::GET, absent, &[(WITH, &answer.body)], None).await.status, 404);
        }
        server.forget_tokens();
        assert_eq!(ask(&server, Method::GET, path, &[(WITH, &answer.body)], None).await.status, 401);
    });
}

#[test]
fn our_client_renews_a_token_that_was_forgotten_and_gives_up_in_time() {
    block_on(async {
        let server = MetadataServer::start().only(Cloud::Aws);
        let imds = client(&server);
        let get = |limit| imds.get(SPOT, limit);
        assert_eq!(get(LIMIT).await, Ok(None));
        let notice = spot_notice("terminate", 120);
        server.set(SPOT, notice.clone());
        assert_eq!(get(LIMIT).await, Ok(Some(notice.clone())));
        assert_eq!(server.requests_of(TOKEN).len(), 1, "one token for both");
        server.forget_tokens();
        assert_eq!(get(LIMIT).await, Ok(Some(notice)));
        let last: Vec<_> = server.requests_of(SPOT).iter().map(|asked| asked.status).collect();
        assert_eq!(last, [Some(404), Some(200), Some(401), Some(200)]);
        server.storm_on(TOKEN, Fault::Hang);
        server.forget_tokens();
        let limit = Duration::from_millis(200);
        assert!(matches!(get(limit).await, Err(MetadataError::Slow { .. })), "hop limit 1");
        server.calm();
        for (fault, wanted) in [
            (Fault::Status(500), "status"),
            (Fault::Status(401), "status"),
            (Fault::Close, "unreachable"),
            (Fault::Garbage, "garbled"),
        ] {
            server.storm(fault);
            let named = match get(LIMIT).await {
                Err(MetadataError::Status { .. }) => "status",
                Err(MetadataError::Unreachable { .. }) => "unreachable",
                Err(MetadataError::Garbled { .. }) => "garbled",
                other => panic!("{fault:?}: {other:?}"),
            };
            assert_eq!(named, wanted, "{fault:?}");
        }
        server.calm();
        assert!(get(LIMIT).await.unwrap().is_some());
    });
}

/// Our client, connected to this server.
fn client(server: &MetadataServer) -> Imds {
    Imds::from(&|name| (name == "AWS_EC2_METADATA_SERVICE_ENDPOINT").then(|| server.endpoint())).expect("a client")
}

#[test]
fn our_client_replaces_a_token_before_it_ends() {
    block_on(async {
        let server = MetadataServer::start().only(Cloud::Aws);
        // The service may grant less than was requested. Of such a short life the second half is margin.
        let life = Duration::from_secs(16);
        server.set_longest_token(life.as_secs());
        let imds = client(&server);
        let began = std::time::Instant::now();
        while server.requests_of(TOKEN).len() < 2 {
            assert!(began.elapsed() < LIMIT, "the token was never replaced");
            assert_eq!(imds.get(SPOT, LIMIT).await, Ok(None));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let given = server.requests_of(TOKEN);
        assert!(given[1].at - given[0].at < life, "it had ended by then");
        let refused = server.requests_of(SPOT).iter().filter(|asked| asked.status == Some(401)).count();
        assert_eq!(refused, 0, "no request went out with a token that had ended");
    });
}

#[test]
fn our_client_reaches_a_service_on_ipv6() {
    // On a machine without IPv6 this test shows nothing.
    let Some(server) = MetadataServer::start_on_ipv6() else { return };
    let endpoint = server.endpoint();
    assert!(endpoint.starts_with("http://[::1]:"), "{endpoint}");
    block_on(async {
        let server = server.only(Cloud::Aws);
        assert_eq!(client(&server).get(SPOT, LIMIT).await, Ok(None));
        server.set(SPOT, spot_notice("terminate", 120));
        assert!(client(&server).get(SPOT, LIMIT).await.is_ok_and(|body| body.is_some()));
    });
}

#[test]
fn gcp_waits_for_a_change() {
    block_on(async {
        let server = MetadataServer::start();
        assert_eq!(ask(&server, Method::GET, PREEMPTED, &[], None).await.status, 403);
        let first = ask(&server, Method::GET, PREEMPTED, &[FLAVOR], None).await;
        assert_eq!((first.body.as_str(), header(&first.headers, "metadata-flavor")), ("FALSE", "Google"));
        let wait = format!("{PREEMPTED}?wait_for_change=true&last_etag={}", header(&first.headers, "etag"));
        let same = ask(&server, Method::GET, &format!("{wait}&timeout_sec=0"), &[FLAVOR], None).await;
        assert_eq!(same.body, "FALSE", "nothing changed in time");
        let waiting = ask(&server, Method::GET, &wait, &[FLAVOR], None);
        let change = async {
            while server.requests_of(PREEMPTED).len() < 4 {
                tokio::task::yield_now().await;
            }
            server.set(PREEMPTED, "TRUE");
        };
        assert_eq!(tokio::join!(waiting, change).0.body, "TRUE");
        assert_eq!(ask(&server, Method::GET, &wait, &[FLAVOR], None).await.body, "TRUE", "a change that was missed");
    });
}

#[test]
fn azure_starts_what_is_approved() {
    block_on(async {
        let server = MetadataServer::start();
        let path = format!("{SCHEDULED_EVENTS}?api-version=2020-07-01");
        assert_eq!(ask(&server, Method::GET, &path, &[], None).await.status, 400);
        assert_eq!(ask(&server, Method::GET, SCHEDULED_EVENTS, &[METADATA], None).await.status, 400);
        server.events(|events| events.push(azure_event("one", "Preempt", 30, &[INSTANCE])));
        let look = async || {
            let answer = ask(&server, Method::GET, &path, &[METADATA], None).await;
            serde_json::from_str::<Value>(&answer.body).unwrap()
        };
        let before = look().await;
        assert_eq!(
            (&before["DocumentIncarnation"], &before["Events"][0]["EventStatus"]),
            (&json!(1), &json!("Scheduled"))
        );
        let post =
            async |body: &str| ask(&server, Method::POST, &path, &[METADATA], Some(body.to_owned())).await.status;
        assert_eq!(post("{}").await, 400);
        server.note_posts(|| "noted".into());
        assert_eq!(post(r#"{"StartRequests":[{"EventId":"one"}]}"#).await, 200);
        assert_eq!(server.requests_of(SCHEDULED_EVENTS).last().unwrap().note, "noted");
        let after = look().await;
        assert_eq!(after["DocumentIncarnation"], 2);
        assert_eq!(
            (&after["Events"][0]["EventStatus"], &after["Events"][0]["NotBefore"]),
            (&json!("Started"), &json!(""))
        );
    });
}

#[test]
fn auto_scaling_knows_its_hook_and_no_other() {
    block_on(async {
        let server = MetadataServer::start();
        let call = async |body: String| ask(&server, Method::POST, AUTO_SCALING, &[], Some(body)).await;
        let hooks = call(format!("Action=DescribeLifecycleHooks&AutoScalingGroupName={GROUP}")).await;
        assert!(hooks.status == 200 && hooks.body.contains(HOOK), "{hooks:?}");
        let complete = |hook: &str| {
            format!(
                "Action=CompleteLifecycleAction&AutoScalingGroupName={GROUP}&LifecycleHookName={hook}&InstanceId={INSTANCE}"
            )
        };
        assert_eq!(call(complete(HOOK)).await.status, 200);
        assert_eq!(call(complete("other")).await.status, 400);
        server.wait_for("/?Action=CompleteLifecycleAction", 2);
        let asked = server.requests();
        assert!(asked.windows(2).all(|pair| pair[0].at <= pair[1].at), "the log is in order");
        assert_eq!(asked.last().map(|asked| asked.method.as_str()), Some("POST"));
        server.set_hook(None);
        let none = call(format!("Action=DescribeLifecycleHooks&AutoScalingGroupName={GROUP}")).await;
        assert!(none.status == 200 && !none.body.contains(HOOK), "{none:?}");
        let count = std::sync::atomic::AtomicU32::new(0);
        let next = move || count.fetch_add(1, std::sync::atomic::Ordering::Relaxed).to_string();
        server.set(PREEMPTED, Reply::each(next));
        for wanted in ["0", "1"] {
            assert_eq!(ask(&server, Method::GET, PREEMPTED, &[FLAVOR], None).await.body, wanted);
        }
        server.remove(PREEMPTED);
        assert_eq!(ask(&server, Method::GET, PREEMPTED, &[FLAVOR], None).await.status, 404);
        server.set(PREEMPTED, "FALSE");
        let server = server.only(Cloud::Aws);
        assert_eq!(ask(&server, Method::GET, PREEMPTED, &[FLAVOR], None).await.status, 404);
    });
}
