//! One scenario, played: each life is started, disturbed, waited for, and checked against all promises.

use std::{collections::BTreeMap, fmt::Write as _, sync::OnceLock, time::Duration};

use rustix::process::{Pid, Signal, kill_process};

use super::{
    audit::{Auditor, Checked, Promise, View, Violation, demand},
    plan::{Action, Disturbance, Garbling, Life, Moment, Process, STEPS, Scenario, Sharing},
    streams::Manner,
    tally::Tally,
};
use crate::support::{
    garble::garbled,
    lab::{Lab, data_set},
    mounts::Namespace,
    proxy::{FaultProxy, Line},
    trainer::{Event, Finished, Losses, Running, Trainer, losses},
};

/// The run's id.
pub const RUN: &str = "run";

/// The learning rate of runs whose world is the same throughout: they are equal to the last digit.
const RATE: &str = "3e-3";
/// The one of groups. Worlds of other sizes differ in the rounding of sums; at ten times this rate such a difference
/// grows to 3e-4 of the loss within 300 steps, at this one it stays below 2e-7.
pub const RATE_OF_GROUPS: &str = "3e-4";

/// The results of an undisturbed run.
struct Reference {
    losses: Losses,
    /// `model.safetensors` as exported.
    model: Vec<u8>,
    /// Every file with tensors in the last checkpoint.
    tensors: BTreeMap<String, Vec<u8>>,
}

/// The undisturbed run of this kind, done once in a test process.
fn reference(ranks: u32, sharing: Sharing) -> &'static Reference {
    static REFERENCES: [[OnceLock<Reference>; 3]; 2] = [const { [const { OnceLock::new() }; 3] }; 2];
    REFERENCES[ranks as usize - 1][sharing as usize].get_or_init(|| {
        let (lab, life) = undisturbed(ranks, sharing);
        let losses = losses(&[&life]);
        assert_eq!(losses.len() as u64, STEPS, "{}", life.story());
        // The states of its checkpoints are the reference for every other run.
        let view = Auditor::of(sharing).audit(&lab, RUN, ranks).expect("the undisturbed run is sound");
        Reference { losses, model: lab.export(RUN), tensors: tensors(&lab, &view) }
    })
}

/// The losses of the undisturbed run with the settings of groups, done once in a test process.
pub fn losses_of_groups() -> &'static Losses {
    static LOSSES: OnceLock<Losses> = OnceLock::new();
    LOSSES.get_or_init(|| {
        let (lab, life) = undisturbed_at(1, Sharing::Ddp, RATE_OF_GROUPS);
        Auditor::of_groups().audit(&lab, RUN, 1).expect("the undisturbed run is sound");
        losses(&[&life])
    })
}

/// An undisturbed run, and its one life.
pub fn undisturbed(ranks: u32, sharing: Sharing) -> (Lab, Finished) {
    undisturbed_at(ranks, sharing, RATE)
}

fn undisturbed_at(ranks: u32, sharing: Sharing, rate: &str) -> (Lab, Finished) {
    let lab = Lab::on_files_at_once();
    let Scenario { every, keep, .. } = Scenario::of(0);
    prepare(&lab, (ranks, sharing), every, keep, rate);
    let life = begin(&lab).finish().expect_code(0);
    (lab, life)
}

fn tensors(lab: &Lab, view: &View) -> BTreeMap<String, Vec<u8>> {
    let (step, generation) = view.newest().expect("a checkpoint");
    let folder = format!("checkpoints/s{step:08}-g{generation:04}/");
    let files = lab.keys(RUN, &folder).into_iter().filter(|key| key.ends_with(".safetensors"));
    files.map(|key| (key[folder.len()..].to_owned(), lab.read(RUN, &key))).collect()
}

/// Writes the configuration: the smallest model that is still a model, so that a life is over in a second.
pub fn prepare(lab: &Lab, (ranks, sharing): (u32, Sharing), every: u64, keep: u64, rate: &str) {
    let model = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","vocab_size":512,"hidden_size":32,
"intermediate_size":64,"num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":1,"head_dim":16,
"hidden_act":"silu","max_position_embeddings":64,"rms_norm_eps":1e-5,"rope_theta":10000.0,
"initializer_range":0.02,"tie_word_embeddings":false,"attention_bias":false,"mlp_bias":false,"torch_dtype":"float32"}"#;
    std::fs::write(lab.path("small.json"), model).expect("write small.json");
    let text = format!(
        r#"store = "{}"

[model]
kind = "llama"
config = "{}"

[data]
train = "file://{}"
sequence_length = 16

[train]
steps = {STEPS}
global_batch = 4
max_micro_batch = 2
seed = 99
threads = 1
optimizer = {{ kind = "adamw", lr = {rate} }}
schedule = {{ kind = "cosine", warmup_steps = 4 }}

[parallel]
nproc_per_node = {ranks}
strategy = "{}"

[checkpoint]
every = "{every} steps"
keep = {{ last = {keep} }}

[restart]
max = 6
same_step = 4
fruitless_starts = "none"
backoff = "1ms"
"#,
        lab.uri(),
        lab.path("small.json").display(),
        data_set().display(),
        sharing.name(),
    );
    lab.write_config("torture.toml", &text);
}

/// The command that starts the run, or continues it if it exists.
pub fn begin(lab: &Lab) -> Trainer {
    begin_in(lab, &lab.uri())
}

/// The same, with another place for the run's store.
fn begin_in(lab: &Lab, store: &str) -> Trainer {
    if lab.keys(RUN, "journal/").iter().any(|key| key.ends_with("/00000000000000000000.json")) {
        lab.command(&["resume", "--run-id", RUN, "--store", store]).json()
    } else {
        lab.command(&["run", "torture.toml", "--run-id", RUN, "--store", store]).json()
    }
}

/// A started agent, and the number of its events heard so far.
struct Watched {
    running: Running,
    seen: usize,
}

impl Watched {
    fn start(command: Trainer) -> Self {
        Self { running: command.start(), seen: 0 }
    }
    /// Waits for the moment; `false`: the process ended first.
    fn wait(&mut self, moment: &Moment) -> bool {
        if let Some(kind) = moment.kind {
            for _ in 0..moment.nth {
                if self.running.next(&mut self.seen, |event| event.kind() == kind).is_none() {
                    return false;
                }
            }
        }
        // Spreads the blows over the time after the event; no check depends on where they strike.
        std::thread::sleep(moment.delay);
        true
    }
    fn all(&self, whole: bool) -> Vec<Pid> {
        if whole { self.running.workers() } else { Vec::new() }
    }
    fn signal(&self, workers: &[Pid], signal: Signal) {
        self.running.signal(signal);
        for pid in workers {
            let _ = kill_process(*pid, signal);
        }
    }
    /// Kills one worker after the other, while there are any.
    fn lose_workers(&mut self, kills: &[(Moment, u64)]) {
        for (at, which) in kills {
            if !self.wait(at) {
                return;
            }
            let workers = self.running.workers();
            let Some(pid) = workers.get((*which % workers.len().max(1) as u64) as usize) else { continue };
            let _ = kill_process(*pid, Signal::KILL);
            let heard = |event: &Event| matches!(event.kind(), "worker_died" | "completed");
            if self.running.next(&mut self.seen, heard).is_none_or(|event| event.kind() == "completed") {
                return;
            }
        }
    }
    /// Its end, and that of its workers, which must not outlive it.
    fn end(self) -> Checked<Finished> {
        let life = self.running.finish();
        demand(!life.left_processes(), Promise::Other, || format!("workers outlive their agent\n{}", life.story()))?;
        Ok(life)
    }
}

/// A process that has ended, and the output that its exit code allows.
struct Ended {
    life: Finished,
    codes: &'static [i32],
    /// How the SIGKILL that it was sent, or armed for, is counted.
    killed: Option<&'static str>,
}

/// The place of a scenario.
pub struct Stage<'a> {
    scenario: &'a Scenario,
    lab: Lab,
    proxy: Option<FaultProxy>,
    auditor: Auditor,
    view: View,
    /// The tally so far.
    pub tally: Tally,
    story: String,
}

impl<'a> Stage<'a> {
    /// Sets it up.
    pub fn new(scenario: &'a Scenario) -> Self {
        let (lab, proxy) = if scenario.on_s3 {
            let (lab, proxy) = Lab::on_s3_through_proxy_at_once(scenario.seed);
            (lab, Some(proxy))
        } else {
            (Lab::on_files_at_once(), None)
        };
        prepare(&lab, (scenario.ranks, scenario.sharing), scenario.every, scenario.keep, RATE);
        let auditor = Auditor::of(scenario.sharing);
        Self { scenario, lab, proxy, auditor, view: View::default(), tally: Tally::default(), story: String::new() }
    }

    /// Plays it: its lives while `go_on` allows, then an undisturbed one, which must complete.
    pub fn play(&mut self, go_on: &dyn Fn() -> bool) -> Checked {
        let scenario = self.scenario;
        for life in &scenario.lives {
            if !go_on() || self.view.completed.is_some() {
                break;
            }
            self.live(life)?;
        }
        self.live(&Life { disturbance: Disturbance::Nothing, then: None, weather: None })?;
        demand(self.view.completed == Some(STEPS), Promise::Other, || "the undisturbed life did not complete".into())?;
        let reference = reference(scenario.ranks, scenario.sharing);
        demand(tensors(&self.lab, &self.view) == reference.tensors, Promise::DamagedResume, || {
            "weights or moments differ from the undisturbed run's".into()
        })?;
        demand(self.lab.export(RUN) == reference.model, Promise::DamagedResume, || {
            "exported weights differ from the undisturbed run's".into()
        })?;
        if let Some(proxy) = &self.proxy {
            self.tally.store_faults(proxy.broken_by_kind());
        }
        self.tally.scenarios += 1;
        Ok(())
    }

    /// Keeps everything for a person to look at: the folder, the store, and the output of every process.
    pub fn keep(self, to: &std::path::Path, violation: &Violation) {
        self.lab.keep(to);
        let text = format!("{:?}: {}\n\n{}\n{}", violation.promise, violation.how, self.scenario, self.story);
        std::fs::write(to.join("story.txt"), text).expect("write story.txt");
    }

    fn live(&mut self, life: &Life) -> Checked {
        let _ = writeln!(self.story, "\n===== {life}");
        let weather = life.weather.as_ref().filter(|_| self.proxy.is_some());
        if let (Some(weather), Some(proxy)) = (weather, &self.proxy) {
            weather.rules.iter().for_each(|rule| proxy.arm(rule.clone()));
            weather.hangs.iter().for_each(|hang| proxy.hang(*hang));
            proxy.set_line(Line { latency: weather.latency, ..Line::default() });
        }
        let ended = self.disturb(life)?;
        if let Some(proxy) = &self.proxy {
            proxy.disarm();
            proxy.set_line(Line::default());
        }
        for ended in &ended {
            let _ = writeln!(self.story, "{}\n", ended.life.story());
        }
        let before = std::mem::take(&mut self.view);
        self.view = self.auditor.audit(&self.lab, RUN, self.scenario.ranks)?;
        for Ended { life: process, codes, killed } in &ended {
            self.tally.lives += 1;
            // A reader that sees an earlier state may find a record missing, or no run at all: it says so and changes
            // nothing.
            let stale = weather.is_some_and(super::plan::Weather::is_stale) && matches!(process.code(), Some(65 | 78));
            let unreachable = weather.is_some() && process.code() == Some(69);
            let fits = match process.code() {
                Some(code) => codes.contains(&code) || stale || unreachable,
                None => killed.is_some() && process.was_killed(),
            };
            demand(fits, Promise::Other, || {
                format!("exit code {:?} is none of {codes:?} after: {}\n{}", process.code(), life, process.story())
            })?;
            self.check_against_the_journal(process)?;
            if matches!(life.disturbance, Disturbance::Garbled(_)) {
                demand(
                    before.newest().is_none() || process.of_kind("step").is_empty(),
                    Promise::DamagedResume,
                    || format!("continued from garbled bytes\n{}", process.story()),
                )?;
            }
            if process.code() == Some(79) {
                self.tally.fenced += 1;
            }
        }
        self.count(life, &ended, &before);
        Ok(())
    }

    /// Starts the processes that the disturbance needs, each with its allowed exit codes.
    fn disturb(&mut self, life: &Life) -> Checked<Vec<Ended>> {
        // 70 means that a group of workers died again and again: `check_against_the_journal` makes sure of it.
        let (codes, killed): (&[i32], _) = match &life.disturbance {
            Disturbance::Overtaken { at, whole, kill_heir } => {
                // Held half-way, so that on a busy machine the run isn't over before it is stopped.
                let mut sleeper = Watched::start(begin(&self.lab).hold_after(STEPS / 2));
                let workers = if sleeper.wait(at) { sleeper.all(*whole) } else { Vec::new() };
                sleeper.signal(&workers, Signal::STOP);
                return self.overtake(sleeper, kill_heir.as_ref());
            }
            Disturbance::Asleep { point, hit, kill_heir } => {
                let sleeper = Watched::start(begin(&self.lab).faults(&format!("{}=stop@hit={hit}", point.name)));
                return self.overtake(sleeper, Some(kill_heir));
            }
            Disturbance::Rivals { lag, kill } => return self.rival(*lag, kill.as_ref()),
            Disturbance::Unmounted(at) => return self.unmount(at, life.then.as_ref()),
            Disturbance::Garbled(_) if self.view.newest().is_some() => (&[65, 69], None),
            // There is nothing to read yet.
            Disturbance::Garbled(_) => (&[0], None),
            Disturbance::Nothing | Disturbance::Nap { .. } => (&[0], None),
            Disturbance::Agent(_) => (&[0], Some("agent")),
            Disturbance::Both(_) => (&[0], Some("both")),
            Disturbance::Workers(_) => (&[0, 70], None),
            Disturbance::Point { point, .. } if point.of == Process::Worker => (&[0, 70], None),
            Disturbance::Point { point, action: Action::Kill, .. } => (&[0], Some(point.name)),
            Disturbance::Point { action: Action::Panic, .. } => (&[0, 70], None),
            Disturbance::Point { action: Action::Error, .. } => (&[0, 69, 70], None),
            Disturbance::Terminate { kill_after, .. } => (&[0, 75, 76], kill_after.map(|_| "agent")),
        };
        let manner = Manner::of(self.scenario, self.tally.lives, &life.disturbance);
        let _ = writeln!(self.story, "{manner}");
        let (mut command, _reader) = manner.apply(begin(&self.lab));
        if let Disturbance::Point { point, action, hit } = &life.disturbance {
            command = command.faults(&format!("{}={action}@hit={hit}", point.name));
        }
        if let Disturbance::Garbled(how) = &life.disturbance {
            command = garbled(command, how.name());
        }
        let mut agent = Watched::start(command);
        match &life.disturbance {
            Disturbance::Agent(at) if agent.wait(at) => agent.signal(&[], Signal::KILL),
            Disturbance::Both(at) if agent.wait(at) => agent.signal(&agent.all(true), Signal::KILL),
            Disturbance::Workers(kills) => agent.lose_workers(kills),
            Disturbance::Terminate { at, kill_after } if agent.wait(at) => {
                agent.signal(&[], manner.signal);
                if let Some(time) = kill_after {
                    std::thread::sleep(*time);
                    agent.signal(&[], Signal::KILL);
                }
            }
            Disturbance::Nap { at, whole, time } if agent.wait(at) => {
                let workers = agent.all(*whole);
                agent.signal(&workers, Signal::STOP);
                std::thread::sleep(*time);
                agent.signal(&workers, Signal::CONT);
            }
            _ => {}
        }
        // A survivor is killed later, so that the run has steps left for the next lives.
        let struck = life.then.as_ref().is_some_and(|then| agent.wait(then));
        if struck {
            agent.signal(&[], Signal::KILL);
        }
        Ok(vec![Ended { life: agent.end()?, codes, killed: if struck { Some("agent") } else { killed } }])
    }

    /// An agent falls asleep, or will, while another takes over the run. When it wakes, it must exit and commit
    /// nothing.
    fn overtake(&mut self, sleeper: Watched, kill_heir: Option<&Moment>) -> Checked<Vec<Ended>> {
        if !sleeper.running.stopped() {
            return Ok(vec![Ended { life: sleeper.end()?, codes: &[0], killed: None }]);
        }
        let mut heir = Watched::start(begin(&self.lab));
        if kill_heir.is_some_and(|at| heir.wait(at)) {
            heir.signal(&[], Signal::KILL);
        }
        let heir = heir.end()?;
        // No agent writes now: the sleeper must not touch this state.
        let taken = self.auditor.audit(&self.lab, RUN, self.scenario.ranks)?.generation();
        sleeper.signal(&sleeper.all(true), Signal::CONT);
        let sleeper = sleeper.end()?;
        let own = sleeper.of_kind("formed").last().and_then(|event| event.value["generation"].as_u64());
        let codes: &[i32] = match own {
            Some(own) if own < taken => &[79],
            Some(_) => &[0],
            // It slept before it had a generation: the run is taken, complete, or free again.
            None => &[0, 64, 79],
        };
        let killed = kill_heir.map(|_| "agent");
        let heir_codes: &[i32] = if taken == 0 { &[0, 64, 78] } else { &[0] };
        Ok(vec![Ended { life: heir, codes: heir_codes, killed }, Ended { life: sleeper, codes, killed: None }])
    }

    /// The run's folder is on a separate disk, which is taken away by force. The agent must exit, and everything that
    /// it reported as durable must be on that disk.
    fn unmount(&self, at: &Moment, then: Option<&Moment>) -> Checked<Vec<Ended>> {
        let (disk, place) = (self.lab.path("store"), self.lab.path("mounted"));
        for folder in [&disk, &place] {
            std::fs::create_dir_all(folder).expect("mount point");
        }
        let namespace = Namespace::with_folder_at(&disk, &place);
        let store = format!("file://{}", if namespace.is_some() { place.display() } else { disk.display() });
        let mut command = begin_in(&self.lab, &store);
        if let Some(namespace) = &namespace {
            command = command.within(&namespace.enter(&self.lab.path("")).each_ref().map(String::as_str));
        }
        let mut agent = Watched::start(command);
        let gone = agent.wait(at) && namespace.as_ref().is_some_and(|namespace| namespace.unmount(&place, &["--lazy"]));
        let struck = then.is_some_and(|then| agent.wait(then));
        if struck {
            agent.signal(&[], Signal::KILL);
        }
        let life = agent.end()?;
        // An agent that had nothing left to write has completed.
        let codes: &[i32] = if gone { &[0, 69] } else { &[0] };
        let _ = std::fs::remove_dir_all(place);
        Ok(vec![Ended { life, codes, killed: struck.then_some("agent") }])
    }

    /// Two agents at once: one may be killed, the others exit or complete.
    fn rival(&self, lag: Duration, kill: Option<&(bool, Moment)>) -> Checked<Vec<Ended>> {
        let mut first = Watched::start(begin(&self.lab));
        std::thread::sleep(lag);
        let mut second = Watched::start(begin(&self.lab));
        if let Some((of_second, at)) = kill {
            let chosen = if *of_second { &mut second } else { &mut first };
            if chosen.wait(at) {
                chosen.signal(&[], Signal::KILL);
            }
        }
        let (first, second) = (first.end()?, second.end()?);
        demand(kill.is_some() || first.code() != Some(79) || second.code() != Some(79), Promise::Other, || {
            format!("neither of two agents continued\n{}\n{}", first.story(), second.story())
        })?;
        // 64: both created the run at once, and one was refused.
        let codes: &[i32] = if self.view.generation() == 0 { &[0, 64, 79] } else { &[0, 79] };
        let killed = |second| kill.and_then(|(of_second, _)| (*of_second == second).then_some("agent"));
        Ok(vec![
            Ended { life: first, codes, killed: killed(false) },
            Ended { life: second, codes, killed: killed(true) },
        ])
    }

    /// Checks the whole output of a process against the undisturbed run and the journal.
    fn check_against_the_journal(&self, process: &Finished) -> Checked {
        let reference = reference(self.scenario.ranks, self.scenario.sharing);
        let other = |holds, how: &str| demand(holds, Promise::Other, || format!("{how}\n{}", process.story()));
        other(process.not_json().is_empty(), "stdout is data, but not all of it is JSON")?;
        let (mut last, mut generation) = (None, 0);
        for event in &process.events {
            let step = event.step().unwrap_or_default();
            match event.kind() {
                "formed" => {
                    generation = event.value["generation"].as_u64().unwrap_or_default();
                    let formed = self.view.formed.iter().find(|formed| formed.generation == generation);
                    let resume = formed.map(|formed| formed.resume.map(|(step, _)| step));
                    let said = event.value["resume_step"].as_u64();
                    demand(resume == Some(said), Promise::DamagedResume, || {
                        format!("generation {generation} says it resumes from {said:?}; the journal: {resume:?}")
                    })?;
                    last = Some(said.unwrap_or(0));
                }
                "step" => {
                    demand(last.is_some_and(|last| step == last + 1), Promise::DamagedResume, || {
                        format!("step {step} was done after {last:?}\n{}", process.story())
                    })?;
                    last = Some(step);
                    let (loss, wanted) = (event.number_text("loss"), reference.losses.get(&step));
                    demand(loss == wanted.map(String::as_str), Promise::DamagedResume, || {
                        format!("the loss of step {step} is {loss:?}, undisturbed {wanted:?}\n{}", process.story())
                    })?;
                }
                "checkpoint" => {
                    let place = (step, event.value["generation"].as_u64().unwrap_or_default());
                    demand(self.view.committed.contains(&place), Promise::LostCheckpoint, || {
                        format!("checkpoint {place:?} was announced, the journal has none\n{}", process.story())
                    })?;
                }
                "completed" => other(self.view.completed == Some(step), "completed, but the journal does not say so")?,
                "interrupted" => {
                    let lost = event.value["lost_steps"].as_u64().unwrap_or_default();
                    let code = if lost == 0 { 75 } else { 76 };
                    other(
                        process.code() == Some(code) || process.was_killed(),
                        "the exit code says nothing of the loss",
                    )?;
                    let committed = self.view.committed.iter().rfind(|(_, of)| *of == generation);
                    let resumed = self.view.formed.iter().find(|formed| formed.generation == generation);
                    let newest = committed.copied().or_else(|| resumed.and_then(|formed| formed.resume));
                    other(newest.map_or(0, |(step, _)| step) + lost == step, "lost steps do not add up")?;
                }
                _ => {}
            }
        }
        if process.code() == Some(70) && !said_bug(process) {
            let failed = self.view.failed.as_deref().unwrap_or_default();
            other(failed.starts_with("workers died"), "left with 70 for another reason than its workers' deaths")?;
        }
        Ok(())
    }

    fn count(&mut self, life: &Life, ended: &[Ended], before: &View) {
        let tally = &mut self.tally;
        let new = &self.view.formed[before.formed.len().min(self.view.formed.len())..];
        tally.resumes += new.iter().filter(|formed| formed.resume.is_some()).count() as u64;
        for Ended { life: process, killed, .. } in ended {
            if let Some(whom) = killed.filter(|_| process.was_killed()) {
                tally.kill(whom, 1);
            }
            let left = |code| u64::from(process.code() == Some(code));
            match &life.disturbance {
                Disturbance::Garbled(how) => {
                    let whole = if *how == Garbling::All { left(65) } else { 0 };
                    tally.machine("garbling, all is damaged", whole);
                    tally.machine("garbling, found out", left(69) + left(65) - whole);
                }
                Disturbance::Unmounted(_) => tally.machine("store unmounted", left(69)),
                _ => {}
            }
            let failed = process.code() == Some(70) && !said_bug(process);
            let deaths = process.of_kind("worker_died").len() as u64 + u64::from(failed);
            match &life.disturbance {
                Disturbance::Point { point, action, .. } if point.of == Process::Worker => match action {
                    Action::Kill => tally.kill(point.name, deaths),
                    _ => tally.point(point.name, *action, deaths),
                },
                Disturbance::Point { point, action, .. } if *action != Action::Kill => {
                    let said = format!("fault injected at {}", point.name);
                    let fired = process.stderr.contains(&said) || process.stdout.contains(&said);
                    tally.point(point.name, *action, fired.into());
                }
                _ => tally.kill("worker", deaths),
            }
            // The cost of the death: reported steps that are repeated.
            let last = process.of_kind("step").last().and_then(|event| event.step());
            if let Some(last) = last.filter(|_| process.was_killed()) {
                tally.lost_steps(last.saturating_sub(self.view.newest_step()));
            }
        }
    }
}

/// Whether it exited because of an injected panic.
fn said_bug(process: &Finished) -> bool {
    process.stderr.contains("bug: fault injected at")
}
