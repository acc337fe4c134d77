//! A job API on a free port of 127.0.0.1: it records the reports, and fails or hangs when a test says so.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hyper::{Request, Response, StatusCode, body::Incoming, service::service_fn};
use s3s::Body;
use serde_json::Value;

/// The token that it accepts.
pub const TOKEN: &str = "worker-token-9c1f2b7e";

/// One request as received.
#[derive(Clone, Debug)]
pub struct Told {
    /// `/jobs/…/events`
    pub path: String,
    /// The idempotency key.
    pub key: String,
    /// Its body, parsed.
    pub body: Value,
    /// The status of its answer.
    pub status: u16,
}

impl Told {
    /// `started`, `progress`, …
    pub fn event(&self) -> &str {
        self.body["event"].as_str().unwrap_or_default()
    }
}

#[derive(Default)]
struct State {
    told: Vec<Told>,
    /// The answers of the next requests; then `always`.
    next: VecDeque<u16>,
    always: Option<u16>,
    hangs: bool,
    asked: u64,
}

/// The server; it stops when this is dropped.
pub struct JobApi {
    state: Arc<Mutex<State>>,
    address: SocketAddr,
    runtime: Option<tokio::runtime::Runtime>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl JobApi {
    /// Starts one that accepts everything.
    pub fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("runtime of the job API");
        let state: Arc<Mutex<State>> = Arc::default();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("port for the job API");
        let address = listener.local_addr().expect("address of the job API");
        let shared = Arc::clone(&state);
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let state = Arc::clone(&shared);
                let service = service_fn(move |request| hear(Arc::clone(&state), request));
                tokio::spawn(async move {
                    let server = hyper_util::server::conn::auto::Builder::new(hyper_util::rt::TokioExecutor::new());
                    let _ = server.serve_connection(hyper_util::rt::TokioIo::new(socket), service).await;
                });
            }
        });
        Self { state, address, runtime: Some(runtime) }
    }
    /// The environment with which a consumer reports to it.
    pub fn env(&self) -> Vec<(&'static str, String)> {
        vec![("JOB_API_BASE_URL", format!("http://{}/v1", self.address)), ("WORKER_TOKEN", TOKEN.to_owned())]
    }
    /// Answers the next requests with these statuses.
    pub fn answer_next(&self, statuses: &[u16]) {
        lock(&self.state).next.extend(statuses);
    }
    /// Answers all requests with this status.
    pub fn answer_always(&self, status: u16) {
        lock(&self.state).always = Some(status);
    }
    /// From now on it answers nothing.
    pub fn hang(&self) {
        lock(&self.state).hangs = true;
    }
    /// All reports, in order.
    pub fn told(&self) -> Vec<Told> {
        lock(&self.state).told.clone()
    }
    /// The accepted reports: those answered with 200.
    pub fn heard(&self) -> Vec<Told> {
        self.told().into_iter().filter(|told| told.status == 200).collect()
    }
    /// The number of requests so far, including those that hang.
    pub fn asked(&self) -> u64 {
        lock(&self.state).asked
    }
}

impl Drop for JobApi {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn hear(state: Arc<Mutex<State>>, request: Request<Incoming>) -> Result<Response<Body>, s3s::StdError> {
    lock(&state).asked += 1;
    if lock(&state).hangs {
        std::future::pending::<()>().await;
    }
    let header = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let (path, key) = (request.uri().path().to_owned(), header("idempotency-key").unwrap_or_default());
    let allowed = header("authorization") == Some(format!("Bearer {TOKEN}"));
    let body = Body::from(request.into_body()).store_all_limited(1 << 20).await?;
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let mut state = lock(&state);
    let answer = state.next.pop_front().or(state.always).unwrap_or(200);
    let status = if allowed { answer } else { 401 };
    state.told.push(Told { path, key, body, status });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::from_u16(status).expect("a status");
    Ok(response)
}
