//! Typed events of the run, shown by one reporter: a live view on a terminal, plain lines elsewhere, JSON lines on
//! stdout.
//!
//! Standard output is data: with `--json` one object per line, the events named in [`Event`]'s documentation, and never
//! anything else. Standard error is for people. Each has its own thread (`writer.rs`), so that a reader that is slow,
//! stopped (Ctrl-S) or gone never delays training: [`Reporter::event`] does not wait. The other receiver of events, the
//! [`Listener`], gets them where they happen, so no reader delays it.
//!
//! *Crash:* queued lines of this process are lost; the journal has everything that matters. *Retry:* a line that can't
//! be written is dropped and counted, and the next one is tried. *Cancel:* no event that was reported before
//! [`Reporter::finish`] returns is lost, if its reader reads.
#![doc = include_str!("README.md")]
mod event;
pub mod human;
mod screen;
mod summary;
mod views;
mod writer;

use std::{
    io::Write,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

pub use event::{Counted, Event, Memory, Spent, StartParts};
pub use screen::{LOG_VARIABLE, Screen, init_logging};
use summary::Summary;
use views::{Bars, Lines};
use writer::Weight;
pub use writer::{flush, say, say_event};

/// Receives every event where it happens; it must not wait.
pub type Listener = Box<dyn FnMut(&Event) + Send>;

/// The destination of JSON lines.
enum Json {
    Stdout,
    Other(Box<dyn Write + Send>),
}

/// The receiver of events. Cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Reporter {
    /// `None`: nothing is shown, or no longer.
    view: Arc<Mutex<Option<View>>>,
}

impl std::fmt::Debug for Reporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reporter")
    }
}

impl Reporter {
    /// Shows events on `screen`, and with `json` as JSON lines on standard output.
    pub fn new(screen: Screen, json: bool) -> Self {
        Self::with_listener(screen, json, Box::new(|_| {}))
    }

    /// Shows events on `screen`, and writes JSON lines to `json`, which must not wait.
    pub fn with_output(screen: Screen, json: Option<Box<dyn Write + Send>>) -> Self {
        Self::start(screen, json.map(Json::Other), Box::new(|_| {}))
    }

    /// [`Reporter::new`], whose events also go to `listener`.
    pub fn with_listener(screen: Screen, json: bool, listener: Listener) -> Self {
        Self::start(screen, json.then_some(Json::Stdout), listener)
    }

    fn start(screen: Screen, json: Option<Json>, listener: Listener) -> Self {
        let bars = screen.is_live().then(|| Bars::new(screen));
        let lines = Lines::new(bars.is_none());
        let view = View { begin: Instant::now(), json, listener, bars, lines, summary: Summary::default() };
        Self { view: Arc::new(Mutex::new(Some(view))) }
    }

    /// Shows nothing; for callers that want no output.
    pub fn silent() -> Self {
        Self { view: Arc::default() }
    }

    /// Reports an event. Does not wait for a reader.
    pub fn event(&self, event: &Event) {
        if let Some(view) = &mut *self.view.lock().unwrap_or_else(PoisonError::into_inner) {
            view.show(event);
        }
    }

    /// Removes the bars and shows the summary. Later events are dropped.
    pub fn finish(&self) {
        let view = self.view.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(view) = view {
            view.end();
        }
    }
}

/// All outputs of events.
struct View {
    begin: Instant,
    json: Option<Json>,
    listener: Listener,
    bars: Option<Bars>,
    lines: Lines,
    summary: Summary,
}

impl View {
    fn show(&mut self, event: &Event) {
        // This comes first, whatever happens to the rest.
        (self.listener)(event);
        self.summary.add(event);
        if let Some(json) = &mut self.json
            && let Err(error) = write_json(json, event)
        {
            if error.kind() != std::io::ErrorKind::BrokenPipe {
                tracing::warn!(%error, "can't write events, continuing without them");
            }
            self.json = None;
        }
        if !self.summary.repeats(event) {
            self.lines.show(event, Instant::now());
        }
        if let Some(bars) = &mut self.bars {
            bars.show(event);
        }
    }

    fn end(mut self) {
        if let Some(bars) = &mut self.bars {
            bars.clear();
        }
        if let Some(line) = self.summary.line(self.begin.elapsed().as_secs_f64()) {
            tracing::info!("{line}");
        }
    }
}

/// Writes one event as one line. `upload`, `phase` and `counted` are only for displays and not part of the API.
fn write_json(output: &mut Json, event: &Event) -> std::io::Result<()> {
    if matches!(event, Event::Upload { .. } | Event::Phase { .. } | Event::Counted(_)) {
        return Ok(());
    }
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    match output {
        Json::Stdout => {
            let weight = if matches!(event, Event::Step { .. }) { Weight::Passing } else { Weight::Lasting };
            writer::out().say(line, weight);
            Ok(())
        }
        Json::Other(output) => {
            output.write_all(&line)?;
            output.flush()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::Shares,
        ids::{Generation, Step, WorldSize},
    };

    pub(super) fn step(step: u64, loss: f64) -> Event {
        Event::Step {
            step: Step(step),
            loss,
            lr: 3e-4,
            grad_norm: 1.5,
            tokens: step * 512,
            tokens_per_s: 1024.0,
            step_s: 0.5,
            stall_s: 0.0,
            lag_steps: 1,
            lag_s: 0.5,
            spent: None,
        }
    }

    fn one_of_each() -> Vec<Event> {
        vec![
            Event::Phase { doing: "downloading".into() },
            Event::Counted(Box::default()),
            Event::Formed {
                generation: Generation(1),
                world_size: WorldSize(2),
                resume_step: None,
                total_steps: 9,
                shares: None,
                nodes: None,
                leader: None,
            },
            Event::Formed {
                generation: Generation(2),
                world_size: WorldSize(2),
                resume_step: Some(Step(4)),
                total_steps: 9,
                shares: None,
                nodes: None,
                leader: None,
            },
            Event::Formed {
                generation: Generation(3),
                world_size: WorldSize(3),
                resume_step: Some(Step(4)),
                total_steps: 9,
                shares: Some(Shares { sequences: 8, ranks: vec![2, 3, 3], efficiency: 0.75 }),
                nodes: None,
                leader: None,
            },
            Event::FoundDead {
                node: "n-1".into(),
                generation: Generation(1),
                same_machine: Some(true),
                pid: Some(77),
                checkpoint: Some(Step(4)),
            },
            Event::Kept { step: Step(4), workers: 2, loads: false },
            Event::Restored {
                step: Step(4),
                bytes: 10,
                fetch_s: 0.25,
                restore_s: 0.5,
                from: "memory",
                peer_bytes: None,
                store_bytes: None,
            },
            step(5, 5.432_198_7),
            Event::FirstStep {
                step: Step(5),
                generation: Generation(2),
                parts: Box::new(StartParts {
                    invite_s: 0.125,
                    built_s: 0.5,
                    model_s: 0.25,
                    fetch_s: Some(0.25),
                    load_s: 0.0625,
                    step_s: 1.0,
                    total_s: 2.5,
                    ..StartParts::default()
                }),
            },
            step(6, 0.1 + 0.2),
            step(7, f64::NAN),
            Event::Validation { step: Step(6), loss: 5.5, sources: [("code".to_owned(), 2.5)].into() },
            Event::Upload { step: Step(6), sent: 1, total: 2 },
            Event::Checkpoint {
                step: Step(6),
                generation: Generation(2),
                bytes: 10,
                stall_s: 0.001,
                copy_s: 0.125,
                durable_s: 1.5,
            },
            Event::NoProgress { step: Step(6), quiet_s: 600.0, lag_steps: 2, lag_s: 601.5 },
            Event::WorkerDied { step: Step(6), reason: "signal 9".into(), restarts: 1, backoff_s: 1.0 },
            Event::Warning { message: "checkpoint of step 4 is skipped".into() },
            Event::Notice { source: "aws-spot".into(), deadline_s: Some(120.0), means: "interruption", binding: true },
            Event::Notice { source: "sigterm".into(), deadline_s: None, means: "stop", binding: false },
            Event::Drain {
                plan: "full_save",
                left_s: Some(28.5),
                predicted_s: Some(3.0),
                reason: "28.5 s left".into(),
            },
            Event::Dropped { steps: 12, others: 1 },
            Event::Interrupted { step: Step(6), lost_steps: 0, cap: None },
            Event::Completed { step: Step(9), loss: Some(1.25), early: None },
        ]
    }

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);
    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn json_lines_are_an_api() {
        let output = Shared::default();
        let reporter = Reporter::with_output(Screen::plain(), Some(Box::new(output.clone())));
        for event in one_of_each() {
            reporter.clone().event(&event);
        }
        reporter.finish();
        reporter.event(&step(8, 1.0));
        let text = String::from_utf8(output.0.lock().unwrap().clone()).unwrap();
        assert_eq!(
            text,
            r#"{"event":"formed","generation":1,"world_size":2,"resume_step":null,"total_steps":9}
{"event":"formed","generation":2,"world_size":2,"resume_step":4,"total_steps":9}
{"event":"formed","generation":3,"world_size":3,"resume_step":4,"total_steps":9,"shares":{"sequences":8,"ranks":[2,3,3],"efficiency":0.75}}
{"event":"found_dead","node":"n-1","generation":1,"same_machine":true,"pid":77,"checkpoint":4}
{"event":"kept","step":4,"workers":2,"loads":false}
{"event":"restored","step":4,"bytes":10,"fetch_s":0.25,"restore_s":0.5,"from":"memory"}
{"event":"step","step":5,"loss":5.4321987,"lr":0.0003,"grad_norm":1.5,"tokens":2560,"tokens_per_s":1024.0,"step_s":0.5,"stall_s":0.0,"lag_steps":1,"lag_s":0.5}
{"event":"first_step","step":5,"generation":2,"invite_s":0.125,"built_s":0.5,"model_s":0.25,"group_s":0.0,"slots_s":0.0,"fetch_s":0.25,"load_s":0.0625,"compare_s":0.0,"step_s":1.0,"total_s":2.5}
{"event":"step","step":6,"loss":0.30000000000000004,"lr":0.0003,"grad_norm":1.5,"tokens":3072,"tokens_per_s":1024.0,"step_s":0.5,"stall_s":0.0,"lag_steps":1,"lag_s":0.5}
{"event":"step","step":7,"loss":null,"lr":0.0003,"grad_norm":1.5,"tokens":3584,"tokens_per_s":1024.0,"step_s":0.5,"stall_s":0.0,"lag_steps":1,"lag_s":0.5}
{"event":"validation","step":6,"loss":5.5,"sources":{"code":2.5}}
{"event":"checkpoint","step":6,"generation":2,"bytes":10,"stall_s":0.001,"copy_s":0.125,"durable_s":1.5}
{"event":"no_progress","step":6,"quiet_s":600.0,"lag_steps":2,"lag_s":601.5}
{"event":"worker_died","step":6,"reason":"signal 9","restarts":1,"backoff_s":1.0}
{"event":"warning","message":"checkpoint of step 4 is skipped"}
{"event":"notice","source":"aws-spot","deadline_s":120.0,"means":"interruption","binding":true}
{"event":"notice","source":"sigterm","deadline_s":null,"means":"stop","binding":false}
{"event":"drain","plan":"full_save","left_s":28.5,"predicted_s":3.0,"reason":"28.5 s left"}
{"event":"dropped","steps":12,"others":1}
{"event":"interrupted","step":6,"lost_steps":0}
{"event":"completed","step":9,"loss":1.25}
"#
        );
    }

    #[test]
    fn a_closed_output_stops_nothing() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let reporter = Reporter::with_output(Screen::plain(), Some(Box::new(Closed)));
        for event in one_of_each() {
            reporter.event(&event);
        }
        reporter.finish();
        reporter.finish();
        Reporter::silent().event(&step(1, 1.0));
        Reporter::silent().finish();
    }

    #[test]
    fn bars_take_every_event() {
        let mut bars = Bars::new(Screen::plain());
        for event in one_of_each() {
            bars.show(&event);
        }
        bars.clear();
    }
}
