//! The suites: what runs in which order, and how the results are combined.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use super::{
    Result, Settings,
    contender::{self, Contender, Place, Task, Who},
    lab::Life,
    large::{self, Large},
    machine::Machine,
    report::{self, Results, Rounds},
    transfer::{self, Ceiling},
};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const OURS: [Contender; 2] =
    [Contender { who: Who::Trainer, place: Place::Disk }, Contender { who: Who::Trainer, place: Place::S3 }];
/// The allowed difference of the two implementations' losses.
const SAME_LOSS: f64 = 1e-4;

/// `trainer` alone.
pub fn own(settings: &Settings) -> Result<()> {
    let bench = Bench::prepare(settings)?;
    let results = bench.run(&OURS, None, |_, _| Ok(()))?;
    let large = bench.wants(large::NAME).then(|| Large::measure(&bench.task, bench.quick)).transpose()?;
    let mut markdown = bench.heading("trainer");
    if !results.is_empty() {
        markdown += &(bench.caption() + &report::table(&results, true));
    }
    if let Some(large) = &large {
        markdown += &format!("\n{}", large.table());
    }
    bench.conclude("trainer", &results, None, large.as_ref(), &markdown)?;
    large.as_ref().map_or(Ok(()), Large::check)
}

/// `trainer` and PyTorch, alternating.
pub fn peers(settings: &Settings, python: &Path) -> Result<()> {
    let bench = Bench::prepare(settings)?;
    let dcp = |blocking, place| Contender { who: Who::Dcp { blocking }, place };
    let contenders = [
        OURS[0],
        dcp(false, Place::Disk),
        dcp(true, Place::Disk),
        OURS[1],
        dcp(false, Place::S3),
        dcp(true, Place::S3),
    ];
    let mut losses = None;
    let results = bench.run(&contenders, Some(python), |life, folder| {
        if losses.is_none() {
            losses = Some(compare_losses(&bench.task, python, life, folder)?);
        }
        Ok(())
    })?;

    let mut markdown = bench.heading("trainer and PyTorch DCP") + &bench.caption();
    markdown += &report::table(&results, false);
    for place in [Place::Disk, Place::S3] {
        let of = |ours: bool| {
            let matching = contenders.iter().filter(move |c| c.place == place && (c.who == Who::Trainer) == ours);
            matching.filter_map(|c| results.iter().find(|rounds| rounds.contender == c.name()))
        };
        if let (Some(ours), theirs) = (of(true).next(), of(false).collect::<Vec<_>>())
            && !theirs.is_empty()
        {
            markdown.push('\n');
            markdown += &report::ratios(ours, &theirs);
        }
    }
    if let Some((ours, theirs)) = losses {
        let difference = (ours - theirs).abs();
        markdown += &format!(
            "\nThe same weights and {} validation sequences: loss {ours:.7} in trainer, {theirs:.7} in PyTorch \
            (difference {difference:.1e}).\n",
            bench.task.validation
        );
    }
    bench.conclude("peers", &results, losses, None, &markdown)?;
    if let Some((ours, theirs)) = losses {
        ensure!(
            (ours - theirs).abs() <= SAME_LOSS,
            "the two models differ: loss {ours} in trainer, {theirs} in PyTorch"
        );
    }
    Ok(())
}

/// The validation loss that trainer measured after its last step, and PyTorch's with the exported weights.
fn compare_losses(task: &Task, python: &Path, life: &Life, store: &Path) -> Result<(f64, f64)> {
    let ours = life.of("validation").last().and_then(|heard| heard.event["loss"].as_f64());
    let folder = task.scratch.join("exported");
    contender::export(store, &folder)?;
    let done = contender::peer_script(task, python, "loss").arg("--weights").arg(&folder).output()?;
    ensure!(done.status.success(), "peer.py loss: {}", String::from_utf8_lossy(&done.stderr));
    let theirs: Value = serde_json::from_slice(&done.stdout).context("loss of peer.py")?;
    fs::remove_dir_all(&folder)?;
    Ok((ours.context("trainer measured no validation loss")?, theirs["loss"].as_f64().context("loss of peer.py")?))
}

struct Bench {
    task: Task,
    machine: Machine,
    rounds: u32,
    quick: bool,
    only: Option<String>,
}

impl Bench {
    fn prepare(settings: &Settings) -> Result<Self> {
        let scratch = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("benches");
        fs::create_dir_all(&scratch)?;
        let machine = Machine::describe(&scratch);
        let (steps, every, rounds) = if settings.quick { (12, 4, 1) } else { (23, 5, 3) };
        let task = Task {
            model: Path::new(ROOT).join("configs/models/bench-42m.json"),
            data: scratch.join("data"),
            scratch,
            ranks: 2,
            threads: settings.threads.unwrap_or((machine.cores / 2).max(1)),
            steps,
            every,
            global_batch: 4,
            sequence_length: 256,
            validation: 8,
        };
        prepare_data(&task.data)?;
        Ok(Self {
            task,
            machine,
            rounds: settings.rounds.unwrap_or(rounds),
            quick: settings.quick,
            only: settings.only.clone(),
        })
    }

    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|part| name.contains(part.as_str()))
    }

    /// The throughput of each store in this round.
    fn ceilings(&self, chosen: &[Contender]) -> Result<Vec<(Place, Ceiling)>> {
        // As many bytes as the state has, moved as trainer moves them by default.
        let mib = if self.quick { 64 } else { 240 };
        let task = transfer::Task { mib, rounds: 1, concurrency: 16, part_mib: 16 };
        let field = transfer::Field::prepare(task, &self.task.scratch)?;
        let places = [Place::Disk, Place::S3].into_iter().filter(|&place| chosen.iter().any(|c| c.place == place));
        places.map(|place| Ok((place, field.ceiling(place)?))).collect()
    }

    /// Runs every contender once a round, in turns, so that a disturbance of the machine disturbs all of them.
    fn run(
        &self,
        contenders: &[Contender],
        python: Option<&Path>,
        mut look: impl FnMut(&Life, &Path) -> Result<()>,
    ) -> Result<Vec<Rounds>> {
        let chosen: Vec<Contender> =
            contenders.iter().copied().filter(|contender| self.wants(contender.name())).collect();
        if chosen.is_empty() {
            return Ok(Vec::new());
        }
        let mut results: Vec<Rounds> = chosen.iter().map(|&contender| Rounds::of(contender)).collect();
        for round in 1..=self.rounds {
            let ceilings = self.ceilings(&chosen)?;
            for (&contender, rounds) in chosen.iter().zip(&mut results) {
                let begun = Instant::now();
                let mut figures = contender::round(contender, &self.task, python, |life, folder| {
                    let ours_on_disk = contender.who == Who::Trainer && contender.place == Place::Disk;
                    if ours_on_disk { look(life, folder) } else { Ok(()) }
                })
                .with_context(|| contender.name())?;
                if let Some((_, ceiling)) = ceilings.iter().find(|(place, _)| *place == contender.place) {
                    figures.add_ceiling(ceiling, contender.who == Who::Trainer);
                }
                let show = |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.1}"));
                eprintln!(
                    "round {round} of {}: {}: {} checkpoints, stall {} ms, durable {} s, restore {} s, {} tokens/s; \
                    took {:.0} s",
                    self.rounds,
                    contender.name(),
                    figures.checkpoints,
                    show(figures.stall_ms),
                    show(figures.durable_s),
                    show(figures.restore_s),
                    show(figures.quiet_tokens_s),
                    begun.elapsed().as_secs_f64()
                );
                rounds.rounds.push(figures);
            }
        }
        Ok(results)
    }

    fn settings(&self) -> Value {
        let task = &self.task;
        json!({
            "model": "configs/models/bench-42m.json",
            "ranks": task.ranks, "threads": task.threads, "precision": "fp32",
            "global_batch": task.global_batch, "sequence_length": task.sequence_length,
            "steps": task.steps, "checkpoint_every": task.every, "rounds": self.rounds,
        })
    }

    /// The subject, the time and the machine.
    fn heading(&self, what: &str) -> String {
        let machine = &self.machine;
        format!(
            "{what}: {}, commit {}. {}; {} cores, {} GiB, {}; load before: {:.1}.{}\n",
            machine.date,
            machine.commit,
            machine.processor,
            machine.cores,
            machine.memory_gib,
            machine.disk,
            machine.load_before,
            if self.quick { " A quick run: not a measurement." } else { "" }
        )
    }

    /// The caption of the contenders' table.
    fn caption(&self) -> String {
        let task = &self.task;
        format!(
            "42 M parameters, fp32, {} ranks of {} threads, {} sequences of {} tokens a step, {} steps, a checkpoint \
            every {}; \
             median over {} {} (least – most).\n\n",
            task.ranks,
            task.threads,
            task.global_batch,
            task.sequence_length,
            task.steps,
            task.every,
            self.rounds,
            if self.rounds == 1 { "round" } else { "rounds" },
        )
    }

    fn conclude(
        &self,
        suite: &str,
        results: &[Rounds],
        losses: Option<(f64, f64)>,
        large: Option<&Large>,
        markdown: &str,
    ) -> Result<()> {
        println!("{markdown}");
        if self.quick || self.only.is_some() {
            return Ok(());
        }
        let results = Results { suite, machine: &self.machine, settings: self.settings(), results, losses, large };
        report::keep(&Path::new(ROOT).join("benches/results"), &results, markdown)
    }
}

/// This program's own source as text: it is always available, and its content does not matter here.
pub fn prepare_data(out: &Path) -> Result<()> {
    let text = format!("{ROOT}/src/**/*.rs");
    let done = Command::new(env!("CARGO_BIN_EXE_trainer"))
        .args([
            "data",
            "prepare",
            "--tokenizer",
            "train:2048",
            "--validation-ratio",
            "0.1",
            "--overwrite",
            "--input",
            &text,
            "--out",
        ])
        .arg(out)
        .output()?;
    ensure!(done.status.success(), "trainer data prepare: {}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}
