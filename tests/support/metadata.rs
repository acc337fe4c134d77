//! The metadata services of AWS, GCP and Azure on one port of 127.0.0.1, with the calls of AWS's Auto Scaling by which
//! a machine delays and requests its own end.
//!
//! In process, ready when `start` returns, gone when it is dropped. It does what the vendors document and what real
//! ones were seen to do: AWS's version 2 only, with tokens that are checked; GCP's `wait_for_change`; Azure's document
//! that changes when an event is approved. A test sets or removes the value of a path, breaks one path or all of them,
//! and reads the log of requests.
//!
//! - AWS: `PUT /latest/api/token` requires `X-aws-ec2-metadata-token-ttl-seconds` from 1 to 21600 (else 400), echoes
//!   it, and refuses `X-Forwarded-For` (403). Everything else below `/latest/` requires a token that it issued and that
//!   has not expired (else 401).
//! - GCP: everything below `/computeMetadata/v1/` requires `Metadata-Flavor: Google` (else 403) and answers with it and
//!   an `ETag`.
//! - Azure: everything below `/metadata/` requires `Metadata: true` and `api-version` (else 400). `POST` to the
//!   scheduled events approves the events that it names: they are `Started` from then on.
//! - Auto Scaling: `POST /`, the query protocol, XML.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use hyper::{
    Method, Request, Response,
    body::{Body, Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::trainer::LIMIT;

/// Where AWS announces that a spot instance is taken away.
pub const SPOT: &str = "/latest/meta-data/spot/instance-action";
/// Where it announces that this may happen soon.
pub const REBALANCE: &str = "/latest/meta-data/events/recommendations/rebalance";
/// Where it shows what Auto Scaling is about to do with the machine.
pub const LIFECYCLE: &str = "/latest/meta-data/autoscaling/target-lifecycle-state";
/// Where it lists maintenance.
pub const MAINTENANCE: &str = "/latest/meta-data/events/maintenance/scheduled";
/// Where it shows how the machine was bought.
pub const LIFE_CYCLE: &str = "/latest/meta-data/instance-life-cycle";
/// Where it issues tokens.
pub const TOKEN: &str = "/latest/api/token";
/// Where GCP announces that the machine is taken away.
pub const PREEMPTED: &str = "/computeMetadata/v1/instance/preempted";
/// Where it shows what maintenance does to the machine.
pub const MAINTENANCE_EVENT: &str = "/computeMetadata/v1/instance/maintenance-event";
/// Where Azure lists scheduled events.
pub const SCHEDULED_EVENTS: &str = "/metadata/scheduledevents";
/// The path of Auto Scaling's calls; the log has them as `/?Action=…`.
pub const AUTO_SCALING: &str = "/";
/// The name of the machine on every cloud.
pub const INSTANCE: &str = "i-0123456789abcdef0";
/// Its Auto Scaling group.
pub const GROUP: &str = "trainers";
/// That group's hook at the end of a machine.
pub const HOOK: &str = "drain";

/// A cloud.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cloud {
    /// Amazon.
    Aws,
    /// Google.
    Gcp,
    /// Microsoft.
    Azure,
}

/// The value of a path.
#[derive(Clone)]
pub struct Reply(Arc<dyn Fn() -> (u16, Vec<u8>) + Send + Sync>);

impl Reply {
    /// This status and body.
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self(Arc::new(move || (status, body.clone())))
    }
    /// 200, and a body that is computed for each request.
    pub fn each(make: impl Fn() -> String + Send + Sync + 'static) -> Self {
        Self(Arc::new(move || (200, make().into_bytes())))
    }
}

impl From<&str> for Reply {
    fn from(body: &str) -> Self {
        Self::new(200, body)
    }
}
impl From<String> for Reply {
    fn from(body: String) -> Self {
        Self::new(200, body)
    }
}
impl From<Value> for Reply {
    fn from(body: Value) -> Self {
        Self::new(200, body.to_string())
    }
}
/// An error with this status.
impl From<u16> for Reply {
    fn from(status: u16) -> Self {
        Self::new(status, "")
    }
}

/// One way to break a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// This status for every request.
    Status(u16),
    /// Never an answer.
    Hang,
    /// The connection closes without an answer.
    Close,
    /// 200 and meaningless bytes, more of them than any client should read.
    Garbage,
}

/// One request, in the order of arrival.
#[derive(Clone, Debug)]
pub struct Asked {
    /// When.
    pub at: Instant,
    /// `GET`, `PUT`, `POST`.
    pub method: String,
    /// Without the query; `/?Action=…` for a call of Auto Scaling.
    pub path: String,
    /// The query, without `?`.
    pub query: String,
    /// Headers, by lower-case name.
    pub headers: BTreeMap<String, String>,
    /// The body.
    pub body: String,
    /// The result of [`MetadataServer::note_posts`] at that moment.
    pub note: String,
    /// The status of its answer; `None`: none, or not yet.
    pub status: Option<u16>,
}

#[derive(Default)]
struct Table {
    only: Option<Cloud>,
    replies: BTreeMap<String, (Reply, u64)>,
    /// Tokens and their expiries.
    tokens: BTreeMap<String, Instant>,
    /// By path; "" means every path.
    faults: BTreeMap<String, Fault>,
    asked: Vec<Asked>,
    note: Option<Box<dyn Fn() -> String + Send>>,
    serial: u64,
    incarnation: u64,
    events: Vec<Value>,
    heartbeat_timeout: Option<u64>,
    /// The longest life of a token, seconds.
    longest_token: Option<u64>,
}

impl Table {
    fn put(&mut self, path: &str, reply: Reply) {
        self.serial += 1;
        let serial = self.serial;
        self.replies.insert(path.to_owned(), (reply, serial));
    }
}

#[derive(Default)]
struct State {
    table: Mutex<Table>,
    /// Wakes tests that wait for a request.
    heard: Condvar,
    /// Wakes GCP's waiting requests.
    changed: Notify,
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The server; it stops when this is dropped.
pub struct MetadataServer {
    state: Arc<State>,
    address: SocketAddr,
    runtime: Option<tokio::runtime::Runtime>,
}

impl MetadataServer {
    /// All three clouds on a free port of 127.0.0.1: a spot machine in a group, without any announcement.
    pub fn start() -> Self {
        Self::start_at("127.0.0.1").expect("port for the metadata server")
    }
    /// The same on `[::1]`; `None`: the machine has no IPv6.
    pub fn start_on_ipv6() -> Option<Self> {
        Self::start_at("[::1]").ok()
    }
    fn start_at(host: &str) -> std::io::Result<Self> {
        // Bound here, so that a test may start one within its own runtime.
        Ok(Self::start_on(std::net::TcpListener::bind(format!("{host}:0"))?))
    }
    /// The same at this listener, such as one in another network namespace.
    pub fn start_on(listener: std::net::TcpListener) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("metadata-server")
            .enable_all()
            .build()
            .expect("runtime of the metadata server");
        let state = Arc::<State>::default();
        listener.set_nonblocking(true).expect("a listener that does not block");
        let address = listener.local_addr().expect("address of the metadata server");
        runtime.spawn(serve(listener, Arc::clone(&state)));
        let server = Self { state, address, runtime: Some(runtime) };
        for (path, body) in [
            ("/latest/meta-data/instance-id", INSTANCE),
            (LIFE_CYCLE, "spot"),
            (LIFECYCLE, "InService"),
            ("/latest/meta-data/placement/region", "us-east-1"),
            ("/latest/meta-data/placement/availability-zone", "us-east-1a"),
            ("/latest/meta-data/tags/instance/aws:autoscaling:groupName", GROUP),
            ("/latest/meta-data/iam/security-credentials/", "trainer-role"),
            (PREEMPTED, "FALSE"),
            (MAINTENANCE_EVENT, "NONE"),
            ("/computeMetadata/v1/instance/id", "4242424242424242424"),
            ("/computeMetadata/v1/instance/name", INSTANCE),
            ("/metadata/instance/compute/name", INSTANCE),
        ] {
            server.set(path, body);
        }
        server.set(
            "/latest/meta-data/iam/security-credentials/trainer-role",
            json!({"Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": "ASIATEST", "SecretAccessKey": "test-secret",
                   "Token": "test-session", "LastUpdated": "2026-01-01T00:00:00Z",
                    "Expiration": "2099-01-01T00:00:00Z"}),
        );
        server.set(
            "/latest/dynamic/instance-identity/document",
            json!({"instanceId": INSTANCE, "region": "us-east-1", "availabilityZone": "us-east-1a",
                   "instanceType": "g5.xlarge", "accountId": "123456789012", "architecture": "x86_64"}),
        );
        server
    }
    /// Only this cloud: paths of the others are answered with 404.
    pub fn only(self, cloud: Cloud) -> Self {
        self.state.lock().only = Some(cloud);
        self
    }
    /// `http://127.0.0.1:<port>`, or with `[::1]`
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }
    /// The environment in which a trainer takes this server for the metadata service of every cloud, and for Auto
    /// Scaling.
    pub fn envs(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_EC2_METADATA_DISABLED", "false".to_owned()),
            ("AWS_EC2_METADATA_SERVICE_ENDPOINT", self.endpoint()),
            ("AWS_ENDPOINT_URL_AUTO_SCALING", self.endpoint()),
            ("NO_GCE_CHECK", "false".to_owned()),
            ("GCE_METADATA_HOST", self.address.to_string()),
            ("TRAINER_AZURE_METADATA_ENDPOINT", self.endpoint()),
        ]
    }
    /// Sets the value of a path.
    pub fn set(&self, path: &str, reply: impl Into<Reply>) {
        self.state.lock().put(path, reply.into());
        self.state.changed.notify_waiters();
    }
    /// Removes it: 404 from now on.
    pub fn remove(&self, path: &str) {
        self.state.lock().replies.remove(path);
        self.state.changed.notify_waiters();
    }
    /// Changes Azure's list of events; its `DocumentIncarnation` rises by one.
    pub fn events(&self, change: impl FnOnce(&mut Vec<Value>)) {
        let mut table = self.state.lock();
        change(&mut table.events);
        table.incarnation += 1;
    }
    /// Gives the group's hook another time-out, seconds; `None`: the group has no hook.
    pub fn set_hook(&self, heartbeat_timeout: Option<u64>) {
        self.state.lock().heartbeat_timeout = Some(heartbeat_timeout.unwrap_or(0));
    }
    /// Breaks everything.
    pub fn storm(&self, fault: Fault) {
        self.storm_on("", fault);
    }
    /// Breaks one path.
    pub fn storm_on(&self, path: &str, fault: Fault) {
        self.state.lock().faults.insert(path.to_owned(), fault);
    }
    /// Ends all storms. A request that hangs continues to hang.
    pub fn calm(&self) {
        self.state.lock().faults.clear();
    }
    /// Forgets all tokens, as after a restart of the service.
    pub fn forget_tokens(&self) {
        self.state.lock().tokens.clear();
    }
    /// Issues tokens that live for at most this many seconds, whatever the request says, and reports that life.
    pub fn set_longest_token(&self, seconds: u64) {
        self.state.lock().longest_token = Some(seconds);
    }
    /// Computed at each `POST`, and stored in the log with it.
    pub fn note_posts(&self, note: impl Fn() -> String + Send + 'static) {
        self.state.lock().note = Some(Box::new(note));
    }
    /// All requests so far.
    pub fn requests(&self) -> Vec<Asked> {
        self.state.lock().asked.clone()
    }
    /// The requests of one path.
    pub fn requests_of(&self, path: &str) -> Vec<Asked> {
        self.state.lock().asked.iter().filter(|asked| asked.path == path).cloned().collect()
    }
    /// Waits until N requests of this path have been answered.
    #[track_caller]
    pub fn wait_for(&self, path: &str, count: usize) {
        let deadline = Instant::now() + LIMIT;
        let mut table = self.state.lock();
        loop {
            let seen = table.asked.iter().filter(|asked| asked.path == path && asked.status.is_some()).count();
            if seen >= count {
                return;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{seen} of {count} requests of {path}");
            table = self.state.heard.wait_timeout(table, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for MetadataServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn serve(listener: std::net::TcpListener, state: Arc<State>) {
    let listener = tokio::net::TcpListener::from_std(listener).expect("listener of the metadata server");
    while let Ok((socket, _)) = listener.accept().await {
        let state = Arc::clone(&state);
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(Arc::clone(&state), request));
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(socket), service).await;
        });
    }
}

/// A body that is ready at once.
struct Whole(Option<Bytes>);

impl Body for Whole {
    type Data = Bytes;
    type Error = Infallible;
    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.take().map(|bytes| Ok(Frame::data(bytes))))
    }
}

async fn read_body(mut body: Incoming) -> String {
    let mut bytes = Vec::new();
    while let Some(Ok(frame)) = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        bytes.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The answer to send.
struct Said {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl From<u16> for Said {
    fn from(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new() }
    }
}

/// The connection closes without an answer.
#[derive(Debug, thiserror::Error)]
#[error("closed on purpose")]
struct Closed;

async fn answer(state: Arc<State>, request: Request<Incoming>) -> Result<Response<Whole>, Closed> {
    let (parts, body) = request.into_parts();
    let body = read_body(body).await;
    let query = parts.uri.query().unwrap_or_default().to_owned();
    let mut path = parts.uri.path().to_owned();
    if path == AUTO_SCALING && parts.method == Method::POST {
        path = format!("/?Action={}", parameter(&body, "Action").unwrap_or_default());
    }
    let headers = parts.headers.iter();
    let headers = headers.map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into()));
    let asked = Asked {
        at: Instant::now(),
        method: parts.method.to_string(),
        path,
        query,
        headers: headers.collect(),
        body,
        note: String::new(),
        status: None,
    };
    let (number, fault) = {
        let mut table = state.lock();
        let note = match &table.note {
            Some(note) if asked.method == "POST" => note(),
            _ => String::new(),
        };
        let fault = table.faults.get(&asked.path).or_else(|| table.faults.get("")).copied();
        table.asked.push(Asked { note, ..asked.clone() });
        (table.asked.len() - 1, fault)
    };
    let said = match fault {
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Close) => return Err(Closed),
        Some(Fault::Status(status)) => Said::from(status),
        Some(Fault::Garbage) => Said { body: garbage(), ..Said::from(200) },
        None => route(&state, &asked).await,
    };
    state.lock().asked[number].status = Some(said.status);
    state.heard.notify_all();
    let mut response = Response::builder().status(said.status);
    if said.headers.iter().all(|(name, _)| *name != "content-type") {
        response = response.header("content-type", "text/plain");
    }
    for (name, value) in said.headers {
        response = response.header(name, value);
    }
    Ok(response.body(Whole(Some(said.body.into()))).expect("a response of known parts"))
}

/// A mebibyte of every byte value; it begins like JSON.
fn garbage() -> Vec<u8> {
    let noise = (0..1_u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8);
    b"{\"action\":".iter().copied().chain(noise).collect()
}

/// A parameter of a query or form, decoded.
pub fn parameter(text: &str, name: &str) -> Option<String> {
    url::form_urlencoded::parse(text.as_bytes()).find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
}

async fn route(state: &State, asked: &Asked) -> Said {
    let clouds = [
        ("/latest/", Cloud::Aws),
        ("/?", Cloud::Aws),
        ("/computeMetadata/v1/", Cloud::Gcp),
        ("/metadata/", Cloud::Azure),
    ];
    let Some((_, cloud)) = clouds.iter().find(|(prefix, _)| asked.path.starts_with(prefix)) else { return 404.into() };
    if state.lock().only.is_some_and(|only| only != *cloud) {
        return 404.into();
    }
    match cloud {
        Cloud::Aws if asked.path.starts_with("/?") => auto_scaling(state, asked),
        Cloud::Aws => aws(state, asked),
        Cloud::Gcp => gcp(state, asked).await,
        Cloud::Azure => azure(state, asked),
    }
}

fn lying_at(state: &State, path: &str) -> Said {
    let reply = state.lock().replies.get(path).map(|(reply, _)| reply.clone());
    let Some(reply) = reply else { return 404.into() };
    let (status, body) = (reply.0)();
    Said { body, ..Said::from(status) }
}

fn aws(state: &State, asked: &Asked) -> Said {
    if asked.path == TOKEN {
        const TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";
        if asked.method != "PUT" {
            return 405.into();
        }
        if asked.headers.contains_key("x-forwarded-for") {
            return 403.into();
        }
        let ttl = asked.headers.get(TTL).and_then(|text| text.parse::<u64>().ok());
        let Some(ttl) = ttl.filter(|ttl| (1..=21_600).contains(ttl)) else { return 400.into() };
        let mut table = state.lock();
        let ttl = ttl.min(table.longest_token.unwrap_or(ttl));
        table.serial += 1;
        let token = format!("AQAEA-token-{}==", table.serial);
        table.tokens.insert(token.clone(), Instant::now() + Duration::from_secs(ttl));
        return Said { headers: vec![(TTL, ttl.to_string())], body: token.into_bytes(), ..Said::from(200) };
    }
    let until = asked.headers.get("x-aws-ec2-metadata-token").and_then(|token| state.lock().tokens.get(token).copied());
    match until {
        Some(until) if until > Instant::now() && asked.method == "GET" => lying_at(state, &asked.path),
        Some(until) if until > Instant::now() => 405.into(),
        _ => 401.into(),
    }
}

async fn gcp(state: &State, asked: &Asked) -> Said {
    if asked.headers.get("metadata-flavor").is_none_or(|flavor| flavor != "Google") {
        return 403.into();
    }
    let serial = || state.lock().replies.get(&asked.path).map_or(0, |(_, serial)| *serial);
    let etag = |serial: u64| format!("{serial:016x}");
    if parameter(&asked.query, "wait_for_change").as_deref() == Some("true") {
        let known = parameter(&asked.query, "last_etag").unwrap_or_else(|| etag(serial()));
        let seconds = parameter(&asked.query, "timeout_sec").and_then(|text| text.parse().ok()).unwrap_or(3600);
        let change = async {
            loop {
                let changed = state.changed.notified();
                tokio::pin!(changed);
                // Registered before the check, so that a change between the two is not missed.
                changed.as_mut().enable();
                if etag(serial()) != known {
                    break;
                }
                changed.await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(seconds), change).await;
    }
    let mut said = lying_at(state, &asked.path);
    said.headers = vec![("metadata-flavor", "Google".to_owned()), ("etag", etag(serial()))];
    said
}

fn azure(state: &State, asked: &Asked) -> Said {
    let versioned = parameter(&asked.query, "api-version").is_some();
    if asked.headers.get("metadata").is_none_or(|value| value != "true") || !versioned {
        return 400.into();
    }
    if asked.path != SCHEDULED_EVENTS {
        return lying_at(state, &asked.path);
    }
    let mut table = state.lock();
    if asked.method == "POST" {
        let wanted: Option<Vec<String>> = serde_json::from_str::<Value>(&asked.body).ok().and_then(|body| {
            let starts = body["StartRequests"].as_array()?;
            starts.iter().map(|start| Some(start["EventId"].as_str()?.to_owned())).collect()
        });
        let Some(wanted) = wanted else { return 400.into() };
        for event in &mut table.events {
            if wanted.iter().any(|id| event["EventId"] == json!(id)) {
                event["EventStatus"] = json!("Started");
                event["NotBefore"] = json!("");
            }
        }
        table.incarnation += 1;
        return 200.into();
    }
    let document = json!({"DocumentIncarnation": table.incarnation, "Events": table.events});
    Said { body: document.to_string().into_bytes(), ..Said::from(200) }
}

/// An event of Azure's for the machine [`INSTANCE`], this many seconds ahead.
pub fn azure_event(id: &str, kind: &str, ahead: i64, resources: &[&str]) -> Value {
    let at = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(ahead);
    let not_before = at.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
    json!({"EventId": id, "EventType": kind, "ResourceType": "VirtualMachine", "Resources": resources,
           "EventStatus": "Scheduled", "NotBefore": not_before, "Description": "", "EventSource": "Platform",
           "DurationInSeconds": -1})
}

/// AWS's text for a spot machine that is taken away in this many seconds.
pub fn spot_notice(action: &str, ahead: i64) -> String {
    let at = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(ahead);
    json!({"action": action, "time": at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()}).to_string()
}

fn auto_scaling(state: &State, asked: &Asked) -> Said {
    const NAMESPACE: &str = "http://autoscaling.amazonaws.com/doc/2011-01-01/";
    let action = parameter(&asked.body, "Action").unwrap_or_default();
    let timeout = state.lock().heartbeat_timeout.unwrap_or(300);
    let wanted = |name: &str, value: &str| parameter(&asked.body, name).is_some_and(|given| given == value);
    let refused = |code: &str, message: &str| {
        Said {
        body: format!(
            r#"<ErrorResponse xmlns="{NAMESPACE}"><Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error><RequestId>r</RequestId></ErrorResponse>"#
        )
        .into_bytes(),
        ..Said::from(400)
    }
    };
    let result = match action.as_str() {
        "DescribeAutoScalingInstances" => format!(
            "<AutoScalingInstances><member><InstanceId>{INSTANCE}</InstanceId><AutoScalingGroupName>{GROUP}</AutoScalingGroupName>\
             <AvailabilityZone>us-east-1a</AvailabilityZone><LifecycleState>InService</LifecycleState>\
             <HealthStatus>HEALTHY</HealthStatus><ProtectedFromScaleIn>false</ProtectedFromScaleIn></member></AutoScalingInstances>"
        ),
        "DescribeLifecycleHooks" if !wanted("AutoScalingGroupName", GROUP) => {
            return refused("ValidationError", "AutoScalingGroup name not found");
        }
        "DescribeLifecycleHooks" if timeout == 0 => "<LifecycleHooks></LifecycleHooks>".to_owned(),
        "DescribeLifecycleHooks" => format!(
            "<LifecycleHooks><member><LifecycleHookName>launch</LifecycleHookName><AutoScalingGroupName>{GROUP}</AutoScalingGroupName>\
             <LifecycleTransition>autoscaling:EC2_INSTANCE_LAUNCHING</LifecycleTransition><HeartbeatTimeout>60</HeartbeatTimeout></member>\
             <member><LifecycleHookName>{HOOK}</LifecycleHookName><AutoScalingGroupName>{GROUP}</AutoScalingGroupName>\
             <LifecycleTransition>autoscaling:EC2_INSTANCE_TERMINATING</LifecycleTransition>\
             <HeartbeatTimeout>{timeout}</HeartbeatTimeout><GlobalTimeout>172800</GlobalTimeout><DefaultResult>CONTINUE</DefaultResult></member></LifecycleHooks>"
        ),
        "TerminateInstanceInAutoScalingGroup" if wanted("InstanceId", INSTANCE) => String::new(),
        "RecordLifecycleActionHeartbeat" | "CompleteLifecycleAction" => {
            let known = wanted("AutoScalingGroupName", GROUP)
                && wanted("LifecycleHookName", HOOK)
                && wanted("InstanceId", INSTANCE);
            if !known {
                return refused("ValidationError", "No active Lifecycle Action found");
            }
            String::new()
        }
        _ => return refused("InvalidAction", "not a call of this server"),
    };
    let body = format!(
        r#"<{action}Response xmlns="{NAMESPACE}"><{action}Result>{result}</{action}Result><ResponseMetadata><RequestId>r</RequestId></ResponseMetadata></{action}Response>"#
    );
    Said { headers: vec![("content-type", "text/xml".to_owned())], body: body.into_bytes(), ..Said::from(200) }
}
