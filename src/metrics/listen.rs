//! Shows a run's figures to those who watch machines: an HTTP address that Prometheus scrapes, and a file for a node
//! exporter's textfile collector.
//!
//! A thread of its own serves and writes; whoever reports an event only changes a few numbers in memory. Nothing waits
//! for a scraper or a disk. *Crash:* the file keeps its last content, in which `trainer_step` no longer moves. *Retry:*
//! a file that can't be written is tried again at the next turn, and reported once. *Cancel:* the last figures are
//! written when the listener of events is dropped.

use std::{
    convert::Infallible,
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Semaphore;

use super::exposition::{Exposition, Form};
use crate::report::{Event, Listener};

/// Between two looks whether the file is to be written anew.
const TURN: Duration = Duration::from_secs(5);
/// Scrapers that are served at once; others wait.
const AT_ONCE: usize = 8;
/// A client has this long to send its request.
const REQUEST: Duration = Duration::from_secs(10);
/// And its connection lives no longer than this.
const CONNECTION: Duration = Duration::from_secs(30);

/// Where figures are shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// Served here, at `/metrics`.
    pub listen: Option<SocketAddr>,
    /// Written to this file.
    pub file: Option<PathBuf>,
}

/// An address as a person writes it: a port is one of this machine alone.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    let port = text.strip_prefix(':').unwrap_or(text);
    if let Ok(port) = port.parse() {
        return Ok(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port));
    }
    text.parse()
        .map_err(|_| "expected a port, such as 9400, or an address with a port, such as 0.0.0.0:9400".to_owned())
}

#[derive(Debug, Default)]
struct Shared {
    now: Mutex<Exposition>,
    /// Something has changed since the file was written.
    changed: AtomicBool,
    file: Option<PathBuf>,
    /// Nobody is told twice that the file can't be written.
    told: AtomicBool,
}

impl Shared {
    fn now(&self) -> MutexGuard<'_, Exposition> {
        // A panic in another thread leaves whole numbers.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the file, if there is one and it says something else.
    fn write(&self) {
        let Some(file) = &self.file else { return };
        if !self.changed.swap(false, Ordering::Relaxed) {
            return;
        }
        let text = self.now().text(Form::Prometheus);
        if let Err(error) = replace(file, &text) {
            self.changed.store(true, Ordering::Relaxed);
            if !self.told.swap(true, Ordering::Relaxed) {
                tracing::warn!(%error, "figures can't be written to {}; trying again", file.display());
            }
        }
    }
}

/// A collector sees the old text or the new one.
fn replace(file: &Path, text: &str) -> io::Result<()> {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    // A collector reads files that end with .prom.
    name.push(".part");
    let part = file.with_file_name(name);
    fs::write(&part, text)?;
    fs::rename(&part, file)
}

/// Shows figures until the process ends.
#[derive(Clone, Debug)]
pub struct Exporter(Arc<Shared>);

/// Takes in events; its end is the end of a run.
struct Feed(Arc<Shared>);

impl Drop for Feed {
    fn drop(&mut self) {
        self.0.write();
    }
}

impl Exporter {
    /// Begins to show figures. Returns the address that is served, if one is.
    pub fn start(places: Places) -> io::Result<(Self, Option<SocketAddr>)> {
        let shared = Arc::new(Shared { file: places.file, ..Shared::default() });
        let bound = places.listen.map(TcpListener::bind).transpose()?;
        let at = bound.as_ref().map(TcpListener::local_addr).transpose()?;
        if let Some(bound) = &bound {
            bound.set_nonblocking(true)?;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let serving = Arc::clone(&shared);
        std::thread::Builder::new().name("metrics".into()).spawn(move || {
            runtime.block_on(async {
                tokio::join!(write_now_and_then(&serving), async {
                    if let Some(bound) = bound {
                        serve(bound, &serving).await;
                    }
                });
            });
        })?;
        Ok((Self(shared), at))
    }

    /// Takes in the events of one run.
    pub fn listener(&self) -> Listener {
        let feed = Feed(Arc::clone(&self.0));
        Box::new(move |event: &Event| {
            feed.0.now().hear(event);
            feed.0.changed.store(true, Ordering::Relaxed);
        })
    }
}

async fn write_now_and_then(shared: &Shared) {
    if shared.file.is_none() {
        return;
    }
    loop {
        tokio::time::sleep(TURN).await;
        shared.write();
    }
}

async fn serve(bound: TcpListener, shared: &Arc<Shared>) {
    let listener = match tokio::net::TcpListener::from_std(bound) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(%error, "figures are not served");
            return;
        }
    };
    let at_once = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let Ok(turn) = Arc::clone(&at_once).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: a moment later there may be some.
                tracing::debug!(%error, "a connection for figures was not accepted");
                tokio::time::sleep(TURN).await;
                continue;
            }
        };
        let shared = Arc::clone(shared);
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let answer = answer(&shared, &request);
                async move { Ok::<_, Infallible>(answer) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(REQUEST)
                .serve_connection(TokioIo::new(stream), service);
            if let Ok(Err(error)) = tokio::time::timeout(CONNECTION, connection).await {
                tracing::debug!(%error, "a connection for figures ended");
            }
            drop(turn);
        });
    }
}

fn answer(shared: &Shared, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let respond = |status, kind: &str, text: String| {
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        if let Ok(kind) = kind.parse() {
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
        }
        response
    };
    let plain = "text/plain; charset=utf-8";
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return respond(StatusCode::METHOD_NOT_ALLOWED, plain, "only GET and HEAD\n".into());
    }
    if request.uri().path() != "/metrics" {
        return respond(StatusCode::NOT_FOUND, plain, "the figures are at /metrics\n".into());
    }
    let accept = request.headers().get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let form = Form::accepted(accept);
    let text = shared.now().text(form);
    respond(StatusCode::OK, form.media_type(), text)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::{super::exposition::tests::counted, *};

    fn ask(at: SocketAddr, request: &str) -> String {
        let mut stream = std::net::TcpStream::connect(at).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    fn get(at: SocketAddr, path: &str, headers: &str) -> String {
        ask(at, &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n"))
    }

    #[test]
    fn a_port_is_one_of_this_machine_alone() {
        assert_eq!(address("9400"), Ok(([127, 0, 0, 1], 9400).into()));
        assert_eq!(address(":9400"), Ok(([127, 0, 0, 1], 9400).into()));
        assert_eq!(address("0.0.0.0:9400"), Ok(([0, 0, 0, 0], 9400).into()));
        assert_eq!(address("[::1]:1").unwrap().port(), 1);
        for bad in ["", "localhost", "99999", "1.2.3.4"] {
            assert!(address(bad).unwrap_err().contains("9400"), "{bad}");
        }
    }

    #[test]
    fn scrapers_get_the_newest_figures_in_the_form_that_they_ask_for() {
        let (exporter, at) = Exporter::start(Places { listen: Some(address("0").unwrap()), file: None }).unwrap();
        let at = at.unwrap();
        let mut listener = exporter.listener();
        let empty = get(at, "/metrics", "");
        assert!(empty.starts_with("HTTP/1.1 200 ") && !empty.contains("trainer_"), "{empty}");
        listener(&counted(5, 6));
        let plain = get(at, "/metrics", "");
        assert!(plain.contains("trainer_checkpoints_total{run_id=\"first\"} 5\n"), "{plain}");
        assert!(plain.contains("content-type: text/plain; version=0.0.4"), "{plain}");
        listener(&counted(6, 8));
        let open = get(at, "/metrics", "Accept: application/openmetrics-text; version=1.0.0\r\n");
        assert!(
            open.contains("trainer_checkpoints_total{run_id=\"first\"} 6\n") && open.ends_with("# EOF\n"),
            "{open}"
        );
        assert!(get(at, "/", "").starts_with("HTTP/1.1 404 "));
        let posted = ask(at, "POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        assert!(posted.starts_with("HTTP/1.1 405 "), "{posted}");
        // What is no request ends its own connection.
        ask(at, "\x16\x03\x01 hello\r\n\r\n");
        assert!(get(at, "/metrics", "").contains("trainer_checkpoints_total"));
    }

    #[test]
    fn the_file_has_the_last_figures_when_the_run_ends() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("trainer.prom");
        let (exporter, at) = Exporter::start(Places { listen: None, file: Some(file.clone()) }).unwrap();
        assert_eq!(at, None);
        let mut listener = exporter.listener();
        listener(&counted(5, 6));
        drop(listener);
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.contains("trainer_durable_steps_total{run_id=\"first\"} 6\n"), "{text}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
        // A folder that has gone costs the run nothing.
        let mut listener = exporter.listener();
        fs::remove_dir_all(folder.path()).unwrap();
        listener(&counted(6, 8));
        drop(listener);
    }
}
