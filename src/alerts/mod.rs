//! Tells somebody: by web hook, by SNS, by pings that stop, and by a TrainJob's status.
//!
//! A thread of its own delivers. Whoever reports an event only looks at it and perhaps puts an alert into a queue;
//! training never waits, and no failure here is one of the run. Addresses may be secrets: they come from flags or the
//! environment, never from the configuration, so no journal has them, and nothing prints them.
//!
//! *Crash:* alerts on their way are lost; that is what pings are for: a service that expects one a minute says so when
//! none comes, whatever has happened to the machine. *Retry:* five tries in half a minute, then a line in the log.
//! *Cancel:* at the end of the process its last alerts have a few seconds.
#![doc = include_str!("README.md")]

mod kubeflow;
mod post;
mod watch;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc as threads,
    },
    time::Duration,
};

use jiff::Timestamp;
use tokio::{sync::mpsc, task::JoinSet};

use self::{
    kubeflow::{Progress, Server},
    watch::Watch,
};
pub use self::{
    post::{Hook, Receiver},
    watch::{Alert, Cause},
};
use crate::{
    ids::RunId,
    report::{Event, Listener},
};

/// Between two pings.
const PING: Duration = Duration::from_secs(60);
/// Between two reports of progress: Kubeflow asks for five seconds at least.
const REPORT: Duration = Duration::from_secs(10);
/// Alerts that wait for the thread; more of them are dropped.
const QUEUE: usize = 64;
/// How long the end of the process waits for its last alerts.
const LAST: Duration = Duration::from_secs(8);

/// Who is told, and of what.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Who gets alerts.
    pub receivers: Vec<Receiver>,
    /// Who is asked for each minute in which the run moves.
    pub ping: Option<Hook>,
    /// The oldest that the newest checkpoint may become.
    pub lag: Option<Duration>,
}

enum Order {
    Tell(Box<Alert>),
    /// Nothing follows; says so when all is delivered.
    End(threads::Sender<()>),
}

struct Shared {
    watch: Mutex<Watch>,
    orders: mpsc::Sender<Order>,
    /// Something has moved since the last ping.
    moved: AtomicBool,
    progress: Mutex<Progress>,
    /// There is progress that was not reported.
    news: AtomicBool,
}

impl Shared {
    fn tell(&self, alert: Alert) {
        if self.orders.try_send(Order::Tell(Box::new(alert))).is_err() {
            tracing::warn!("an alert was dropped: too many are waiting to be delivered");
        }
    }
}

/// Alerts of one run. Cheap to clone.
#[derive(Clone)]
pub struct Alerts(Arc<Shared>);

impl std::fmt::Debug for Alerts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Alerts")
    }
}

impl Alerts {
    /// Starts the thread that delivers; `None`: nobody is to be told.
    ///
    /// # Errors
    /// If there can be no thread.
    pub fn start(settings: Settings, run_id: Option<RunId>) -> std::io::Result<Option<Self>> {
        let Settings { receivers, ping, lag } = settings;
        let server = Server::of_environment();
        if receivers.is_empty() && ping.is_none() && server.is_none() {
            return Ok(None);
        }
        let (orders, queue) = mpsc::channel(QUEUE);
        let watch = Mutex::new(Watch::new(run_id, lag));
        let (progress, news) = (Mutex::default(), AtomicBool::new(false));
        let shared = Arc::new(Shared { watch, orders, moved: AtomicBool::new(true), progress, news });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let seen = Arc::clone(&shared);
        std::thread::Builder::new().name("alerts".into()).spawn(move || {
            runtime.block_on(async {
                let done = tokio::select! {
                    done = deliver(queue, receivers) => done,
                    () = ping_while_it_moves(ping, &seen.moved) => None,
                    () = report_progress(server.as_ref(), &seen) => None,
                };
                if let Some(done) = done {
                    if let Some(server) = &server {
                        report(server, &seen).await;
                    }
                    // The process may have stopped waiting.
                    let _ = done.send(());
                }
            });
        })?;
        Ok(Some(Self(shared)))
    }

    /// Watches the events of the run.
    pub fn listener(&self) -> Listener {
        let shared = Arc::clone(&self.0);
        Box::new(move |event: &Event| {
            if watch::moves(event) {
                shared.moved.store(true, Ordering::Relaxed);
            }
            if shared.progress.lock().unwrap_or_else(PoisonError::into_inner).hear(event) {
                shared.news.store(true, Ordering::Relaxed);
            }
            // A panic in another thread leaves a watch that has told too little or too much.
            let alert = shared.watch.lock().unwrap_or_else(PoisonError::into_inner).hear(event);
            if let Some(alert) = alert {
                shared.tell(alert);
            }
        })
    }

    /// The run has ended with this error.
    pub fn failed(&self, error: &str) {
        let alert = self.0.watch.lock().unwrap_or_else(PoisonError::into_inner).failed(error);
        self.0.tell(alert);
    }

    /// Waits for a few seconds until everything is delivered.
    pub fn finish(self) {
        let (done, all) = threads::channel();
        if self.0.orders.try_send(Order::End(done)).is_ok() && all.recv_timeout(LAST).is_err() {
            tracing::warn!("the last alerts have not been delivered within {} s", LAST.as_secs());
        }
    }
}

/// Returns who waits for the end.
async fn deliver(mut queue: mpsc::Receiver<Order>, receivers: Vec<Receiver>) -> Option<threads::Sender<()>> {
    let mut under_way = JoinSet::new();
    while let Some(order) = queue.recv().await {
        match order {
            Order::Tell(alert) => {
                let at = Timestamp::now();
                for receiver in &receivers {
                    under_way.spawn(post::deliver(receiver.clone(), (*alert).clone(), at));
                }
                // Those that have arrived.
                while under_way.try_join_next().is_some() {}
            }
            Order::End(done) => {
                while under_way.join_next().await.is_some() {}
                return Some(done);
            }
        }
    }
    None
}

/// Reports what is new, if anything is; whether that failed.
async fn report(server: &Server, shared: &Shared) -> Option<String> {
    if !shared.news.swap(false, Ordering::Relaxed) {
        return None;
    }
    let progress = shared.progress.lock().unwrap_or_else(PoisonError::into_inner).clone();
    server.report(&progress).await.err()
}

/// Does not end.
async fn report_progress(server: Option<&Server>, shared: &Shared) {
    let Some(server) = server else { return std::future::pending().await };
    let mut told = false;
    loop {
        if let Some(why) = report(server, shared).await {
            // With what is newest then.
            shared.news.store(true, Ordering::Relaxed);
            if !std::mem::replace(&mut told, true) {
                tracing::warn!("Kubeflow has not taken the run's progress: {why}");
            }
        }
        tokio::time::sleep(REPORT).await;
    }
}

/// Does not end.
async fn ping_while_it_moves(ping: Option<Hook>, moved: &AtomicBool) {
    let Some(hook) = ping else { return std::future::pending().await };
    let mut told = false;
    loop {
        if moved.swap(false, Ordering::Relaxed)
            && let Err(why) = hook.ping().await
        {
            // The next one may arrive; a service that misses too many says so itself.
            moved.store(true, Ordering::Relaxed);
            if !std::mem::replace(&mut told, true) {
                tracing::warn!("{hook} has not taken a ping: {why}");
            }
        }
        tokio::time::sleep(PING).await;
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::TcpListener,
    };

    use super::*;
    use crate::ids::Step;

    /// Answers each request with the next of these statuses, then ends; returns what it was sent.
    fn receiver(statuses: &'static [u16]) -> (String, std::thread::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/hush", listener.local_addr().unwrap());
        let serve = move || {
            statuses
                .iter()
                .map(|status| {
                    let (mut stream, _) = listener.accept().unwrap();
                    let mut request = Vec::new();
                    let mut buffer = [0; 4096];
                    let whole = |request: &[u8]| {
                        let text = String::from_utf8_lossy(request).into_owned();
                        let (head, body) = text.split_once("\r\n\r\n")?;
                        let length = head.to_lowercase();
                        let length = length
                            .split_once("content-length: ")
                            .map_or(0, |(_, rest)| rest.split("\r\n").next().unwrap().parse::<usize>().unwrap());
                        (body.len() >= length).then(|| text.clone())
                    };
                    let text = loop {
                        if let Some(text) = whole(&request) {
                            break text;
                        }
                        let read = stream.read(&mut buffer).unwrap();
                        assert!(read > 0, "{}", String::from_utf8_lossy(&request));
                        request.extend_from_slice(&buffer[..read]);
                    };
                    write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
                    text
                })
                .collect()
        };
        (url, std::thread::spawn(serve))
    }

    #[test]
    fn an_alert_arrives_although_its_receiver_is_away_at_first() {
        let (url, received) = receiver(&[503, 200]);
        let settings = Settings { receivers: vec![url.parse().unwrap()], ..Settings::default() };
        let run_id = RunId::new("first").unwrap();
        let alerts = Alerts::start(settings, Some(run_id)).unwrap().unwrap();
        let mut listener = alerts.listener();
        listener(&Event::Interrupted { step: Step(9), lost_steps: 0, cap: None });
        drop(listener);
        alerts.finish();
        let received = received.join().unwrap();
        assert_eq!(received.len(), 2);
        let (head, body) = received[1].split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("POST /hush HTTP/1.1") && head.contains("application/json"), "{head}");
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(
            (&body["alert"], &body["run_id"], &body["step"]),
            (&"interrupted".into(), &"first".into(), &9.into())
        );
    }

    #[test]
    fn a_run_that_moves_is_pinged_for_at_once() {
        let (url, received) = receiver(&[200]);
        let settings = Settings { ping: Some(url.parse().unwrap()), ..Settings::default() };
        let alerts = Alerts::start(settings, None).unwrap().unwrap();
        let received = received.join().unwrap();
        assert!(received[0].starts_with("GET /hush HTTP/1.1"), "{received:?}");
        alerts.finish();
    }

    #[test]
    fn without_a_receiver_there_is_no_thread() {
        assert!(Alerts::start(Settings { lag: Some(PING), ..Settings::default() }, None).unwrap().is_none());
    }
}
