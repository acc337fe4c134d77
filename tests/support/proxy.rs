//! An HTTP proxy on loopback that injects faults between a client and an S3 server.
//!
//! The first armed [`Rule`] that fits a request applies to it; all other requests are forwarded unchanged, `Host`
//! included, so that signatures stay valid. Bodies are held whole, so that "the write arrived, its answer was lost" is
//! exact. Percentages come from a seeded generator: the same seed and the same order of requests break the same
//! requests.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use s3s::{Body, dto::StreamingBlob};

/// One way to break a request.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// 503 `SlowDown`; the server receives nothing.
    SlowDown,
    /// The connection closes; the server receives nothing.
    Reset,
    /// The server receives this many bytes of the body, then both connections close.
    CutRequest(usize),
    /// The client receives this many bytes of the answer's body, then its connection closes.
    CutResponse(usize),
    /// The lowest bit of this byte of the request's body is flipped.
    FlipRequest(usize),
    /// The lowest bit of this byte of the answer's body is flipped.
    FlipResponse(usize),
    /// No answer for this long, then the connection closes.
    Stall(Duration),
    /// The server carries out the request and answers; the client gets no answer.
    LoseAnswer,
    /// A read returns an earlier state: a listing as it was last answered, an object as if it did not exist yet.
    Stale,
}

impl Fault {
    /// Its name, in counts.
    pub fn name(self) -> &'static str {
        match self {
            Self::SlowDown => "503",
            Self::Reset => "reset",
            Self::CutRequest(_) => "cut request",
            Self::CutResponse(_) => "cut response",
            Self::FlipResponse(_) => "flipped bit",
            Self::FlipRequest(_) => "bit flipped on its way up",
            Self::Stall(_) => "stall",
            Self::LoseAnswer => "lost answer",
            Self::Stale => "stale read",
        }
    }
}

/// How often a rule breaks the requests that it fits.
#[derive(Clone, Copy, Debug)]
pub enum Often {
    /// The next N requests, then no more.
    Next(u32),
    /// This share of them, 0 to 100.
    Percent(u64),
}

/// Which requests are broken, how, and how often.
#[derive(Clone, Debug)]
pub struct Rule {
    /// The HTTP method; empty: any.
    pub method: &'static str,
    /// Must occur in path and query; empty: any.
    pub target: &'static str,
    /// How it breaks.
    pub fault: Fault,
    /// How often.
    pub often: Often,
}

/// The fate of a request that hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lands {
    /// The server never receives it.
    Never,
    /// The server carries it out at once; its answer hangs.
    AtOnce,
    /// The server receives it when it is released, whether or not the client is still there.
    Late,
}

/// Requests that hang, also chosen by the content of their bodies.
#[derive(Clone, Copy, Debug)]
pub struct Hang {
    /// The HTTP method; empty: any.
    pub method: &'static str,
    /// Must occur in path and query; empty: any.
    pub target: &'static str,
    /// Must occur in the body; empty: any.
    pub body: &'static str,
    /// The next N.
    pub times: u32,
    /// For at most this long; [`FaultProxy::let_go`] releases them, too.
    pub time: Duration,
    /// Its fate.
    pub lands: Lands,
}

impl Hang {
    /// All such requests, forever.
    pub const fn all(method: &'static str, target: &'static str, body: &'static str) -> Self {
        let time = Duration::from_secs(100_000);
        Self { method, target, body, times: u32::MAX, time, lands: Lands::Never }
    }
}

/// The quality of the line.
#[derive(Clone, Copy, Debug, Default)]
pub struct Line {
    /// Before each request.
    pub latency: Duration,
    /// Bytes a second towards the server; `None`: no limit.
    pub up: Option<u64>,
    /// Bytes a second towards the client; `None`: no limit.
    pub down: Option<u64>,
    /// Bytes a second of all objects of checkpoints together, one after the other, towards the server; `None`: no
    /// limit.
    pub bulk: Option<u64>,
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    hangs: Vec<Hang>,
    /// Requests that hung, and whether they have been released.
    hung: u64,
    let_go: tokio::sync::watch::Sender<bool>,
    line: Line,
    random: u64,
    /// When the line will have carried all bulk given to it.
    free_at: Option<tokio::time::Instant>,
    /// Bulk that the line has carried.
    carried: u64,
    broken: BTreeMap<&'static str, u64>,
    /// The last answer to each listing, by its target.
    listings: HashMap<String, Bytes>,
}

impl State {
    /// The fault for this request, counted.
    fn decide(&mut self, method: &str, target: &str) -> Option<Fault> {
        let fits = |rule: &Rule| {
            let reads = !matches!(rule.fault, Fault::Stale) || method == "GET" || method == "HEAD";
            reads && (rule.method.is_empty() || rule.method == method) && target.contains(rule.target)
        };
        for index in 0..self.rules.len() {
            if !fits(&self.rules[index]) {
                continue;
            }
            let fires = match &mut self.rules[index].often {
                Often::Next(left) => std::mem::replace(left, left.saturating_sub(1)) > 0,
                Often::Percent(share) => {
                    // SplitMix64 (Steele, Lea, Flood 2014).
                    self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
                    let mut z = self.random;
                    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                    (z ^ (z >> 31)) % 100 < *share
                }
            };
            if fires {
                let fault = self.rules[index].fault;
                *self.broken.entry(fault.name()).or_default() += 1;
                return Some(fault);
            }
        }
        None
    }
    /// How this request hangs, if it does; counted.
    fn hang(&mut self, method: &str, target: &str, body: &[u8]) -> Option<Hang> {
        let holds = |wanted: &str| wanted.is_empty() || String::from_utf8_lossy(body).contains(wanted);
        let hang = self.hangs.iter_mut().find(|hang| {
            let fits = (hang.method.is_empty() || hang.method == method) && target.contains(hang.target);
            hang.times > 0 && fits && holds(hang.body)
        })?;
        hang.times = hang.times.saturating_sub(u32::from(hang.times != u32::MAX));
        self.hung += 1;
        *self.broken.entry("long stall").or_default() += 1;
        Some(*hang)
    }
}

/// The proxy; it stops when this is dropped.
pub struct FaultProxy {
    state: Arc<Mutex<State>>,
    address: SocketAddr,
    runtime: Option<tokio::runtime::Runtime>,
}

impl FaultProxy {
    /// Runs in front of `upstream`; `seed` decides which requests a percentage hits.
    pub fn start(upstream: SocketAddr, seed: u64) -> Self {
        Self::start_on(std::net::TcpListener::bind("127.0.0.1:0").expect("port for the proxy"), upstream, seed)
    }
    /// The same at this listener, such as one in another network namespace; it reaches `upstream` from its own process.
    pub fn start_on(listener: std::net::TcpListener, upstream: SocketAddr, seed: u64) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("fault-proxy")
            .enable_all()
            .build()
            .expect("runtime of the proxy");
        let state = Arc::new(Mutex::new(State { random: seed, ..State::default() }));
        let shared = state.clone();
        listener.set_nonblocking(true).expect("a listener that does not block");
        let address = listener.local_addr().expect("address of the proxy");
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("listener of the proxy");
            while let Ok((socket, _)) = listener.accept().await {
                let state = shared.clone();
                let service = service_fn(move |request| pass(request, upstream, state.clone()));
                tokio::spawn(async move {
                    let server = hyper::server::conn::http1::Builder::new();
                    let _ = server.serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Self { state, address, runtime: Some(runtime) }
    }

    /// `http://127.0.0.1:<port>`
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }
    /// Arms a rule; earlier ones come first.
    pub fn arm(&self, rule: Rule) {
        lock(&self.state).rules.push(rule);
    }
    /// From now on such requests hang.
    pub fn hang(&self, hang: Hang) {
        let mut state = lock(&self.state);
        state.let_go.send_replace(false);
        state.hangs.push(hang);
    }
    /// Requests that hung so far.
    pub fn hung(&self) -> u64 {
        lock(&self.state).hung
    }
    /// Releases the hanging requests.
    pub fn let_go(&self) {
        let mut state = lock(&self.state);
        state.hangs.clear();
        state.let_go.send_replace(true);
    }
    /// Forgets all rules.
    pub fn disarm(&self) {
        lock(&self.state).rules.clear();
        self.let_go();
    }
    /// Changes the line.
    pub fn set_line(&self, line: Line) {
        lock(&self.state).line = line;
    }
    /// Bytes of checkpoints that have gone through.
    pub fn carried(&self) -> u64 {
        lock(&self.state).carried
    }
    /// Requests broken so far.
    pub fn broken(&self) -> u64 {
        lock(&self.state).broken.values().sum()
    }
    /// The same, by the name of the fault.
    pub fn broken_by_kind(&self) -> BTreeMap<&'static str, u64> {
        lock(&self.state).broken.clone()
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn broken(what: &'static str) -> s3s::StdError {
    Box::new(io::Error::new(io::ErrorKind::ConnectionReset, what))
}

/// The first `keep` bytes of `body`, then an error, which makes hyper close the connection.
fn cut(body: &Bytes, keep: usize) -> Body {
    let head = body.slice(..keep.min(body.len()));
    let pieces = [Ok(head), Err(io::Error::new(io::ErrorKind::ConnectionReset, "cut on purpose"))];
    StreamingBlob::wrap(futures::stream::iter(pieces)).into()
}

fn flip(body: Bytes, at: usize) -> Bytes {
    let mut changed = body.to_vec();
    if let Some(byte) = changed.get_mut(at) {
        *byte ^= 1;
    }
    changed.into()
}

async fn pass_time(bytes: usize, rate: Option<u64>) {
    if let Some(rate) = rate {
        tokio::time::sleep(Duration::from_secs_f64(bytes as f64 / rate as f64)).await;
    }
}

/// Waits until the line has carried `bytes` of bulk, after all that was given to it before.
async fn pass_bulk(state: &Mutex<State>, bytes: usize) {
    let until = {
        let mut state = lock(state);
        let Some(rate) = state.line.bulk else { return };
        let now = tokio::time::Instant::now();
        let begin = state.free_at.unwrap_or(now).max(now);
        *state.free_at.insert(begin + Duration::from_secs_f64(bytes as f64 / rate as f64))
    };
    tokio::time::sleep_until(until).await;
    lock(state).carried += bytes as u64;
}

async fn pass(
    request: Request<Incoming>,
    upstream: SocketAddr,
    state: Arc<Mutex<State>>,
) -> Result<Response<Body>, s3s::StdError> {
    let target = request.uri().path_and_query().map(ToString::to_string).unwrap_or_default();
    let (fault, line) = {
        let mut state = lock(&state);
        (state.decide(request.method().as_str(), &target), state.line)
    };
    tokio::time::sleep(line.latency).await;
    let (head, body) = request.into_parts();
    let body = whole(body).await?;
    pass_time(body.len(), line.up).await;
    if head.method == "PUT" && target.contains("/checkpoints/") {
        pass_bulk(&state, body.len()).await;
    }
    let hang = lock(&state).hang(head.method.as_str(), &target, &body);
    if let Some(hang) = hang {
        let mut let_go = lock(&state).let_go.subscribe();
        // Its own task: a client that goes away cancels the rest of this function.
        let end = tokio::spawn(async move {
            let request = Request::from_parts(head, Body::from(body));
            let mut request = Some(request);
            if let Some(request) = request.take_if(|_| hang.lands == Lands::AtOnce) {
                let _ = forward(request, upstream).await;
            }
            let _ = tokio::time::timeout(hang.time, let_go.wait_for(|let_go| *let_go)).await;
            if let Some(request) = request.take_if(|_| hang.lands == Lands::Late) {
                let _ = forward(request, upstream).await;
            }
        });
        let _ = end.await;
        return Err(broken("hung on purpose"));
    }
    match fault {
        Some(Fault::SlowDown) => {
            let text = "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>SlowDown</Code><Message>on \
                purpose</Message></Error>";
            let mut answer = Response::new(Body::from(Bytes::from_static(text.as_bytes())));
            *answer.status_mut() = hyper::StatusCode::SERVICE_UNAVAILABLE;
            return Ok(answer);
        }
        Some(Fault::Reset) => return Err(broken("reset on purpose")),
        Some(Fault::Stall(time)) => {
            tokio::time::sleep(time).await;
            return Err(broken("stalled on purpose"));
        }
        _ => {}
    }
    let listing = target.contains("list-type=");
    if matches!(fault, Some(Fault::Stale)) {
        let remembered = lock(&state).listings.get(&target).cloned();
        match remembered {
            Some(earlier) => return Ok(Response::new(Body::from(earlier))),
            // No earlier listing: this reader is the first and gets the current one.
            None if listing => {}
            None => {
                let text = "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>NoSuchKey</Code><Message>on \
                    purpose</Message></Error>";
                let mut answer = Response::new(Body::from(Bytes::from_static(text.as_bytes())));
                *answer.status_mut() = hyper::StatusCode::NOT_FOUND;
                return Ok(answer);
            }
        }
    }
    let body = match fault {
        Some(Fault::FlipRequest(at)) => flip(body, at),
        _ => body,
    };
    if let Some(Fault::CutRequest(keep)) = fault {
        let _ = forward(Request::from_parts(head, cut(&body, keep)), upstream).await;
        return Err(broken("request cut on purpose"));
    }
    let (head, body) = forward(Request::from_parts(head, Body::from(body)), upstream).await?.into_parts();
    let mut body = whole(body).await?;
    if listing && head.status.is_success() {
        lock(&state).listings.insert(target, body.clone());
    }
    pass_time(body.len(), line.down).await;
    match fault {
        Some(Fault::LoseAnswer) => return Err(broken("answer lost on purpose")),
        Some(Fault::CutResponse(keep)) => return Ok(Response::from_parts(head, cut(&body, keep))),
        Some(Fault::FlipResponse(at)) => body = flip(body, at),
        _ => {}
    }
    Ok(Response::from_parts(head, Body::from(body)))
}

async fn forward(request: Request<Body>, upstream: SocketAddr) -> Result<Response<Incoming>, s3s::StdError> {
    let socket = tokio::net::TcpStream::connect(upstream).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(socket)).await?;
    tokio::spawn(connection);
    Ok(sender.send_request(request).await?)
}

async fn whole(body: Incoming) -> Result<Bytes, s3s::StdError> {
    Body::from(body).store_all_limited(1 << 30).await
}
