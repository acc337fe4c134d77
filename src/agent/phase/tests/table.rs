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
    ("ready, the last", |_| said(Rank(1), FromWorker::Ready)),
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
    ("stalled by 10", |_| said(Rank(0), FromWorker::Stalled { step: Step(10), stall_s: 0.1 })),
    ("validated, the last", |rig| {
        let validated = || FromWorker::Validated { step: Step(10), loss_sum: 4.0, sequences: 2 };
        let _ = rig.feed(said(Rank(0), validated()));
        said(Rank(1), validated())
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
    ("retry", |rig| {
        let _ = rig.feed(save_failed(10, 0));
        Event::Retry { slot: 0 }
    }),
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

fn generated() -> Vec<String> {
    let mut lines: Vec<[String; 4]> = Vec::new();
    for (name, provoke) in ROWS {
        for phase in PHASES {
            let mut rig = phase();
            let before = rig.phase();
            let event = provoke(&mut rig);
            if rig.phase() == "Ended" {
                continue;
            }
            let effects = rig.feed(event);
            let end = ended(&effects).map(|end| end.split([':', ' ']).next().unwrap().to_owned());
            let next = match end {
                Some(end) => format!("Ended: {end}"),
                None if rig.phase() == before => String::new(),
                None => rig.phase().to_owned(),
            };
            let row = [(*name).to_owned(), before.to_owned(), list(&effects), next];
            if row[2].is_empty() && row[3].is_empty() {
                continue;
            }
            match lines.last_mut() {
                Some(last) if last[0] == row[0] && last[2..] == row[2..] => last[1] = format!("{}, {before}", last[1]),
                _ => lines.push(row),
            }
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
