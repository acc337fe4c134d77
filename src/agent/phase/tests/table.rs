//! Every phase, with every event: what the table in the header of `phase.rs` says.

use super::*;

/// The event, after what must have come before it in this phase.
type Provoke = fn(&mut Rig) -> Event;

const PHASES: [fn() -> Rig; 4] = [loading, training, draining, salvage];

const ROWS: &[(&str, Provoke)] = &[
    ("notice, 25 s", |_| spot(25)),
    ("notice, 12 s", |_| spot(12)),
    ("notice, 1 s", |_| spot(1)),
    ("notice, 15 min", |_| spot(900)),
    ("SIGTERM", |_| sigterm()),
    ("SIGTERM again", |rig| {
        let _ = rig.feed(sigterm());
        rig.pass(2.0);
        sigterm()
    }),
    ("rebalance", |_| rebalance()),
    ("listening", |_| said(Rank(0), FromWorker::Listening { port: 1 })),
    ("built, the last", |_| built(Rank(0))),
    ("laid out", |_| Event::LaidOut { bytes: BYTES }),
    ("fetched", |_| fetched()),
    ("fetch damaged", |_| Event::Fetched(Err(CheckpointError::Damaged { object: "x".into(), reason: "y".into() }))),
    ("fetch fails", |_| Event::Fetched(Err(CheckpointError::Internal("x".into())))),
    ("ready, the last", |_| said(Rank(1), FromWorker::Ready { fingerprint: None, split: StartSplit::default() })),
    ("ready, the last, and differs", |rig| {
        if rig.phase() == "Loading" {
            *rig = fetching();
        }
        let ready = |of| FromWorker::Ready { fingerprint: Some(Fingerprint(of)), split: StartSplit::default() };
        let _ = rig.feed(said(Rank(0), ready(1)));
        said(Rank(1), ready(2))
    }),
    ("frozen, the last", |rig| {
        if rig.phase() == "Training" {
            let _ = rig.feed(rebalance());
            let _ = rig.frozen(Rank(0), 12);
        }
        said(Rank(1), FromWorker::Frozen { ticket: rig.ticket, started: Step(13) })
    }),
    ("step, the last", |rig| {
        let _ = rig.feed(finished(Rank(0), 13));
        finished(Rank(1), 13)
    }),
    ("step, NaN", |rig| {
        let _ = rig.feed(finished(Rank(0), 13));
        report(Rank(1), 13, f64::NAN)
    }),
    ("captured 20, the last", |rig| {
        if rig.phase() != "Salvaging" {
            let _ = rig.feed(saved(10, 0));
        }
        rig.feed_all((13..=20).flat_map(|step| RANKS.map(|rank| finished(rank, step))));
        let _ = rig.feed(captured(Rank(0), 20, 1));
        captured(Rank(1), 20, 1)
    }),
    ("captured 20, and differs", |rig| {
        rig.feed_all((13..=20).flat_map(|step| RANKS.map(|rank| finished(rank, step))));
        let _ = rig.feed(captured_other(Rank(0), 20, 1));
        captured_other(Rank(1), 20, 1)
    }),
    ("stalled by 10", |_| said(Rank(0), FromWorker::Stalled { step: Step(10), stall_s: 0.1 })),
    ("validated, the last", |rig| {
        let _ = rig.feed(validated(Rank(0), 10, 2.0));
        validated(Rank(1), 10, 2.0)
    }),
    ("stopped, the last", |rig| {
        let _ = rig.feed(stopped(Rank(0), 12));
        stopped(Rank(1), 12)
    }),
    ("a worker fails", |_| failed(true)),
    ("and exits", |rig| {
        let _ = rig.feed(failed(true));
        exited()
    }),
    ("a worker exits", |_| exited()),
    ("upload comes on", |_| Event::Save(SaveEvent::Progress { step: Step(10), bytes: 1 })),
    ("saved 10", |_| saved(10, 0)),
    ("save of 10 fails", |_| save_failed(10, 0)),
    ("no journal's writer", |_| save_failed_by(JournalError::NoWriter.into())),
    ("no store's folder", |_| {
        let (operation, key, source) = ("put", "x".into(), Box::new(Adrift::example()));
        save_failed_by(StorageError::Adrift { operation, key, source }.into())
    }),
    ("retry", |rig| {
        let _ = rig.feed(save_failed(10, 0));
        Event::Retry { slot: 0 }
    }),
    ("save held up", |_| Event::HeldUp { after_s: 120 }),
    ("lost to another", |_| lost()),
    ("tick after 5 s", |rig| {
        rig.pass(5.0);
        Event::Tick
    }),
    ("tick after 24 s", |rig| {
        rig.pass(24.0);
        Event::Tick
    }),
    ("tick after 10 min", |rig| {
        rig.pass(600.0);
        Event::Tick
    }),
];

/// The event, the state before it, and what must have come before.
type Ending = (&'static str, fn() -> Rig, Provoke);

/// How a generation ends when all goes well: the event, after what must have come before it in one phase.
const ENDS: &[Ending] = &[
    (
        "saved 13, as planned",
        || {
            let mut rig = draining();
            let _ = rig.frozen(Rank(1), 13);
            rig.feed_all(RANKS.map(|rank| finished(rank, 13)));
            rig.feed_all(RANKS.map(|rank| captured(rank, 13, 1)));
            rig.feed_all(RANKS.map(|rank| stopped(rank, 13)));
            let _ = rig.feed(saved(10, 0));
            rig
        },
        |_| saved(13, 1),
    ),
    (
        "all stopped, no save left",
        || {
            let mut rig = draining();
            let _ = rig.feed(spot(12));
            assert_eq!(rig.planned(), DrainPlan::FinishInFlight);
            let _ = rig.frozen(Rank(1), 13);
            rig.feed_all(RANKS.map(|rank| finished(rank, 13)));
            let _ = rig.feed(saved(10, 0));
            rig
        },
        |rig| {
            let _ = rig.feed(stopped(Rank(0), 13));
            stopped(Rank(1), 13)
        },
    ),
    ("saved 100, the last step", uploading_the_last_step, |_| saved(100, 0)),
];

fn save_failed_by(error: Error) -> Event {
    Event::Save(SaveEvent::Ended { step: Step(10), slot: 0, result: Err(error) })
}

/// What the event did in this phase: a row of the table.
fn row(name: &str, mut rig: Rig, provoke: Provoke) -> Option<[String; 4]> {
    let before = rig.phase();
    let event = provoke(&mut rig);
    if rig.phase() == "Ended" {
        return None;
    }
    let effects = rig.feed(event);
    let end = ended(&effects).map(|end| end.split([':', ' ']).next().unwrap().to_owned());
    let next = match end {
        Some(end) => format!("Ended: {end}"),
        None if rig.phase() == before => String::new(),
        None => rig.phase().to_owned(),
    };
    let row = [name.to_owned(), before.to_owned(), list(&effects), next];
    (!row[2].is_empty() || !row[3].is_empty()).then_some(row)
}

fn generated() -> Vec<String> {
    let everywhere = ROWS.iter().flat_map(|(name, provoke)| PHASES.map(|phase| row(name, phase(), *provoke)));
    let ends = ENDS.iter().map(|(name, phase, provoke)| row(name, phase(), *provoke));
    let mut lines: Vec<[String; 4]> = Vec::new();
    for row in everywhere.chain(ends).flatten() {
        match lines.last_mut() {
            Some(last) if last[0] == row[0] && last[2..] == row[2..] => last[1] = format!("{}, {}", last[1], row[1]),
            _ => lines.push(row),
        }
    }
    lines.iter().map(|row| format!("//! | {} |", row.join(" | ")).replace("|  |", "| |")).collect()
}

#[test]
fn the_table_in_the_header_is_what_happens() {
    let source = include_str!("../../phase.rs");
    let written: Vec<&str> = source
        .lines()
        .skip_while(|line| *line != "//! |---|---|---|---|")
        .skip(1)
        .take_while(|line| *line != "//!")
        .collect();
    let generated = generated();
    assert!(written == generated, "the table is:\n{}", generated.join("\n"));
    assert!(generated.iter().all(|line| line.chars().count() <= 120), "too wide");
}

/// The match from every event to a row of its kind, and the list of these rows: a new variant of [`Event`] or
/// [`FromWorker`] does not compile until it has one.
macro_rules! kinds {
    ($($event:pat => $row:literal,)*) => {
        const KINDS: &[&str] = &[$($row),*];

        fn kind(event: &Event) -> &'static str {
            match event {
                $($event => $row,)*
            }
        }
    };
}

kinds! {
    Event::Notice(_) => "notice, 25 s",
    Event::Worker(WorkerEvent::Message(_, FromWorker::Listening { .. })) => "listening",
    Event::Worker(WorkerEvent::Message(_, FromWorker::Built { .. })) => "built, the last",
    Event::Worker(WorkerEvent::Message(_, FromWorker::Ready { .. })) => "ready, the last",
    Event::Worker(WorkerEvent::Message(_, FromWorker::Frozen { .. })) => "frozen, the last",
    Event::Worker(WorkerEvent::Message(_, FromWorker::Step(_))) => "step, the last",
    Event::Worker(WorkerEvent::Message(_, FromWorker::Captured { .. })) => "captured 20, the last",
    Event::Worker(WorkerEvent::Message(_, FromWorker::Stalled { .. })) => "stalled by 10",
    Event::Worker(WorkerEvent::Message(_, FromWorker::Validated { .. })) => "validated, the last",
    Event::Worker(WorkerEvent::Message(_, FromWorker::Stopped { .. })) => "stopped, the last",
    Event::Worker(WorkerEvent::Message(_, FromWorker::Failed { .. })) => "a worker fails",
    Event::Worker(WorkerEvent::Exited(..)) => "a worker exits",
    Event::LaidOut { .. } => "laid out",
    Event::Fetched(Ok(_)) => "fetched",
    Event::Fetched(Err(CheckpointError::Damaged { .. })) => "fetch damaged",
    Event::Fetched(Err(_)) => "fetch fails",
    Event::Save(SaveEvent::Progress { .. }) => "upload comes on",
    Event::Save(SaveEvent::Ended { result: Ok(_), .. }) => "saved 10",
    Event::Save(SaveEvent::Ended { result: Err(_), .. }) => "save of 10 fails",
    Event::Retry { .. } => "retry",
    Event::HeldUp { .. } => "save held up",
    Event::Lost(_) => "lost to another",
    Event::Tick => "tick after 5 s",
}

#[test]
fn every_kind_of_event_has_a_row() {
    for wanted in KINDS {
        let (_, provoke) = ROWS.iter().find(|(name, _)| name == wanted).unwrap_or_else(|| panic!("no row {wanted:?}"));
        assert_eq!(kind(&provoke(&mut training())), *wanted);
    }
}
