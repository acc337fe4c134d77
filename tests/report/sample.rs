//! Runs of days, written as their programs would have written them: journals and figures, in a store of files.

use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};
use trainer::{
    config::RunConfig,
    ids::{AttemptId, Generation, NodeId, RunId, Step, WorldSize},
    journal::{
        Committed, Drain, DrainPlan, Entry, FormedReason, Happened, Means, Metrics, Record, ResumePoint, RosterEntry,
        SaveCost,
    },
    metrics::{self, Row, Series},
    random::SplitMix64,
};

/// A run to write.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub name: &'static str,
    pub interruptions: u64,
    pub steps: u64,
    /// Steps from save to save.
    pub every: u64,
}

const STEP_S: f64 = 1.1;
const STALL_S: f64 = 0.05;

/// The `created` record of the fixtures, of this run.
fn created(name: &str, steps: u64) -> Record {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats/v1/journal-created.json");
    let stored = Entry::decode(&std::fs::read(path).expect("a fixture")).expect("a record");
    let Record::Created { config, .. } = stored.record else { panic!("it is the first record") };
    let mut config: RunConfig = *config;
    config.workload.train.steps = steps;
    Record::Created { run_id: RunId::new(name).expect("an id"), config: Box::new(config) }
}

struct Writer {
    folder: PathBuf,
    number: u64,
    begun: Timestamp,
    node: NodeId,
}

impl Writer {
    fn put(&mut self, second: f64, record: Record) {
        let entry = Entry {
            format: record.format(),
            attempt: AttemptId::random(),
            at: self.at(second),
            node: self.node.clone(),
            record,
        };
        let body = entry.encode().expect("a record that can be stored");
        std::fs::write(self.folder.join(format!("journal/{:020}.json", self.number)), body).expect("write a record");
        self.number += 1;
    }

    fn at(&self, second: f64) -> Timestamp {
        self.begun + SignedDuration::from_secs_f64(second)
    }
}

/// Loss falls, and is not smooth.
fn loss(step: u64, random: &mut SplitMix64) -> f64 {
    let smooth = 1.9 + 8.0 / (1.0 + step as f64 / 400.0).powf(0.7);
    let spike = if step.is_multiple_of(7919) { 1.5 } else { 0.0 };
    smooth + 0.12 * (random.next_f64() - 0.5) + spike
}

fn notice(generation: Generation, deadline_s: f64) -> Record {
    Record::Notice { generation, source: "aws-spot".into(), deadline_s: Some(deadline_s), means: Means::Interruption }
}

fn drained(generation: Generation, step: Step, committed: Step) -> Record {
    let timeline =
        [(0.0, "aws-spot was heard, 120.0 s left"), (96.0, "all ranks stop"), (99.1, "the state is durable")];
    let timeline = timeline.map(|(after_s, what)| Happened { after_s, what: what.into() }).into();
    let drain = Drain {
        source: "aws-spot".into(),
        deadline_s: Some(120.0),
        plan: DrainPlan::FullSave,
        reason: "24.0 s left".into(),
        planned_s: Some(96.0),
        predicted_s: Some(99.0),
        actual_s: Some(99.1),
        timeline,
    };
    let lost_steps = step.get() - committed.get();
    let verdict =
        if lost_steps == 0 { "the last finished step is committed" } else { "the store did not answer in time" };
    let drain = Some(Box::new(drain));
    Record::Interrupted {
        generation,
        step,
        committed: Some(committed),
        lost_steps,
        verdict: verdict.into(),
        drain,
        cap: None,
    }
}

/// Writes the run into a store: its machines are taken away `interruptions` times. Every fourth vanishes without a
/// word, every seventh loses steps though it was warned.
pub fn write(store: &Path, sample: Sample) {
    let Sample { name, interruptions, steps, every } = sample;
    let folder = store.join(name);
    for below in ["journal", "metrics"] {
        std::fs::create_dir_all(folder.join(below)).expect("a folder");
    }
    let mut random = SplitMix64::named(7, name);
    let begun = "2026-11-20T08:00:00Z".parse().expect("a time");
    let mut writer = Writer { folder: folder.clone(), number: 0, begun, node: NodeId::random() };
    writer.put(0.0, created(name, steps));
    let mut figures = Series::default();
    let (mut now, mut from, mut resume) = (95.0, 0_u64, None::<ResumePoint>);
    for life in 0..=interruptions {
        let generation = Generation(life + 1);
        writer.node = NodeId::random();
        writer.put(
            now,
            Record::Formed {
                generation,
                roster: vec![RosterEntry::new(writer.node.clone(), 2)],
                world_size: WorldSize(2),
                resume: resume.clone(),
                overrides: Vec::new(),
                reason: FormedReason::Started,
                data: None,
                continues: None,
                gone: Vec::new(),
                joined: Vec::new(),
                why: None,
            },
        );
        let (formed, is_last) = (now, life == interruptions);
        now += 20.0 + 40.0 * random.next_f64();
        let even = (steps - from) / (interruptions + 1 - life);
        let stop = if is_last { steps } else { from + 1 + (even as f64 * (0.4 + 1.2 * random.next_f64())) as u64 };
        let stop = stop.min(steps - 1).max(from + 1);
        let stop = if is_last { steps } else { stop };
        let vanishes = !is_last && life % 4 == 3;
        let loses = !is_last && !vanishes && life % 7 == 5;
        let mut saved = from;
        for step in from + 1..=stop {
            now += STEP_S;
            let mut row =
                Row { step: Step(step), generation, at_ms: writer.at(now).as_millisecond(), figures: Metrics::new() };
            row.figures.insert("loss".into(), loss(step, &mut random));
            row.figures.insert("step_s".into(), STEP_S);
            let measured = step % (5 * every) == 0;
            let held_out = 2.05 + 8.0 / (1.0 + step as f64 / 400.0).powf(0.7);
            if measured {
                row.figures.insert("held_out_loss".into(), held_out);
            }
            figures.push(&row);
            let is_end = step == stop && !vanishes && !loses;
            if step % every == 0 || is_end {
                let durable_s = 1.5 + 2.5 * random.next_f64();
                let lived_s = now + durable_s - formed;
                writer.put(
                    now + durable_s,
                    Record::Committed(Committed {
                        step: Step(step),
                        generation,
                        manifest: "manifest.json".into(),
                        manifest_crc64: "0".repeat(16),
                        bytes: 512 << 20,
                        loss: Some(1.0),
                        validation_loss: measured.then_some(held_out),
                        metrics: Metrics::new(),
                        cost: SaveCost { stall_s: STALL_S, copy_s: 0.4, durable_s, lived_s },
                    }),
                );
                saved = step;
                now += if is_end { durable_s } else { STALL_S };
            }
        }
        if is_last {
            writer.put(now + 0.5, Record::Completed { generation, step: Step(steps), loss: Some(1.9), early: None });
        } else if vanishes {
            now += 2.0;
        } else {
            writer.put(now - 100.0_f64.min(now - formed), notice(generation, 120.0));
            now += 1.0;
            writer.put(now, drained(generation, Step(stop), Step(saved)));
        }
        now += 60.0 + 1500.0 * random.next_f64() * random.next_f64();
        if saved > from {
            resume = Some(ResumePoint { step: Step(saved), generation });
        }
        from = saved;
    }
    let body = metrics::encode(&figures).expect("a file of figures");
    let attempt = AttemptId::random();
    std::fs::write(folder.join(trainer::layout::metrics(Generation(1), Step(1), Step(steps), &attempt)), body)
        .expect("write figures");
}
