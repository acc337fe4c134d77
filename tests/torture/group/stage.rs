//! One scenario of a group, played: nodes are started, struck and replaced until the run is complete, and the store is
//! checked after every blow, while they are at work.

use std::{
    fmt::Write as _,
    path::Path,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use super::{Armed, Blow, GroupScenario, Refill, Strike, Whom};
use crate::{
    support::{
        lab::{Lab, Store},
        proxy::{FaultProxy, Line},
        s3,
        trainer::{Event, Finished, Losses, Running},
    },
    torture::{
        audit::{Auditor, Checked, Promise, View, Violation, demand},
        plan::{Moment, STEPS, Sharing},
        stage::{RATE_OF_GROUPS, RUN, begin, losses_of_groups, prepare},
        tally::Tally,
    },
};

/// Between two looks at the nodes.
const LOOK: Duration = Duration::from_millis(3);
/// No event and no end of any node for so long: the group stands still. It is many times the longest pause of the
/// protocol, which is a minute.
const STILL: Duration = Duration::from_secs(400);
/// A sleeper is woken after this time even if the others do nothing without it.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// A node that is alive.
struct Node {
    /// Its number, from 0 in the order of starts.
    number: usize,
    running: Running,
    proxy: Option<FaultProxy>,
    seen: usize,
    /// The newest generation that it says it leads, 0 for none.
    leads: u64,
    told: bool,
    /// How the SIGKILL that it was sent, or is armed for, is counted.
    killed: Option<&'static str>,
    armed: Option<Armed>,
    /// When it wakes, and who else does.
    asleep: Option<(Instant, Vec<Pid>)>,
    /// The store was bad for it.
    foul: bool,
    /// It may have read an earlier state.
    stale: bool,
}

impl Node {
    /// Whether the group can count on it.
    fn is_able(&self) -> bool {
        !self.told && self.asleep.is_none()
    }
    fn wake(&mut self) {
        if let Some((_, workers)) = self.asleep.take() {
            self.running.signal(Signal::CONT);
            workers.into_iter().for_each(|pid| _ = kill_process(pid, Signal::CONT));
        }
    }
    /// The exit codes that fit what was done to it.
    fn codes(&self) -> Vec<i32> {
        let mut codes = vec![0];
        if self.told {
            codes.extend([75, 76]);
        }
        if self.foul {
            codes.push(69);
        }
        // A reader that sees an earlier state may find no run at all: it says so and changes nothing.
        if self.stale {
            codes.extend([65, 78]);
        }
        codes
    }
}

/// What a moment has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Came {
    /// The moment.
    There,
    /// The end of the run.
    Over,
}

/// The place of a scenario.
pub struct Stage<'a> {
    scenario: &'a GroupScenario,
    lab: Lab,
    auditor: Auditor,
    nodes: Vec<Node>,
    ended: Vec<Finished>,
    started: usize,
    /// Nodes that come with the next generation.
    due: usize,
    over: bool,
    begun: Instant,
    last_heard: Instant,
    /// The tally so far.
    pub tally: Tally,
    story: String,
}

impl<'a> Stage<'a> {
    /// Sets it up.
    pub fn new(scenario: &'a GroupScenario) -> Self {
        let lab =
            if scenario.on_s3 { Lab::on_s3_through_proxy_at_once(scenario.seed).0 } else { Lab::on_files_at_once() };
        prepare(&lab, (1, Sharing::Ddp), scenario.every, scenario.keep, RATE_OF_GROUPS);
        let now = Instant::now();
        Self {
            scenario,
            lab,
            auditor: Auditor::of_groups(),
            nodes: Vec::new(),
            ended: Vec::new(),
            started: 0,
            due: 0,
            over: false,
            begun: now,
            last_heard: now,
            tally: Tally::default(),
            story: String::new(),
        }
    }

    /// Plays it: its blows while `go_on` allows, then the group is left alone and must complete.
    pub fn play(&mut self, go_on: &dyn Fn() -> bool) -> Checked {
        let scenario = self.scenario;
        // It is done before anything is measured by it.
        let losses = losses_of_groups();
        (0..scenario.nodes).for_each(|_| self.start());
        for blow in &scenario.blows {
            if !go_on() || self.wait(&blow.at)? == Came::Over {
                break;
            }
            self.strike(blow);
            self.audit()?;
        }
        self.clear();
        self.nodes.iter_mut().for_each(Node::wake);
        self.note("left alone");
        while self.able() < scenario.nodes as usize && !self.over {
            self.start();
        }
        while !self.nodes.is_empty() {
            self.look(None)?;
        }
        let view = self.audit()?;
        self.tally.generations += view.formed.len() as u64;
        self.tally.commits += view.committed.len() as u64;
        self.tally.resumes += view.formed.iter().filter(|formed| formed.resume.is_some()).count() as u64;
        demand(view.completed == Some(STEPS), Promise::Other, || "every node has left, and the run is open".into())?;
        for life in &self.ended {
            check_against_the_journal(life, &view, losses)?;
        }
        self.tally.scenarios += 1;
        Ok(())
    }

    /// Keeps everything for a person to look at: the folder, the store, and the output of every process.
    pub fn keep(self, to: &Path, violation: &Violation) {
        let Self { lab, mut nodes, ended, scenario, mut story, .. } = self;
        let _ = writeln!(story, "\nstill there: {:?}", nodes.iter().map(|node| node.number).collect::<Vec<_>>());
        // What they have said so far; then they end.
        let alive: Vec<Finished> = nodes.drain(..).map(|node| node.running.power_off()).collect();
        lab.keep(to);
        for (number, life) in ended.iter().chain(&alive).enumerate() {
            let text = format!("{}\n{}\n{}", life.story().lines().next().unwrap_or_default(), life.stdout, life.stderr);
            std::fs::write(to.join(format!("process-{number}.txt")), text).expect("write the output of a process");
        }
        let blows: Vec<String> = scenario.blows.iter().map(ToString::to_string).collect();
        let blows = blows.join("\n");
        let text = format!("{:?}: {}\n\n{scenario}\n{blows}\n\n{story}", violation.promise, violation.how);
        std::fs::write(to.join("story.txt"), text).expect("write story.txt");
    }

    fn note(&mut self, what: &str) {
        let _ = writeln!(self.story, "{:8.3} {what}", self.begun.elapsed().as_secs_f64());
    }

    fn audit(&mut self) -> Checked<View> {
        self.auditor.audit_group(&self.lab, RUN, self.scenario.nodes)
    }

    fn able(&self) -> usize {
        self.nodes.iter().filter(|node| node.is_able()).count()
    }

    /// Starts one more node.
    fn start(&mut self) {
        let number = self.started;
        self.started += 1;
        let Self { scenario, lab, .. } = self;
        let bounds = format!("{}:{}", scenario.min, scenario.nodes);
        let mut command = begin(lab)
            .args(&["--nodes", &bounds, "--nproc-per-node", "1", "--set", "network.address=127.0.0.1"])
            .envs(&[("TRAINER_LOG", "trainer=debug".to_owned())]);
        let mut proxy = None;
        if let Store::S3(server, _) = &lab.store {
            let own = FaultProxy::start(server.address(), scenario.seed.wrapping_add(number as u64));
            command = command.envs(&s3::client_env(&own.endpoint()));
            proxy = Some(own);
        }
        let armed = scenario.armed.get(number).copied().flatten();
        if let Some(armed) = &armed {
            command = command.faults(&armed.to_string());
        }
        let running = command.start();
        let with = armed.map(|armed| format!(", {armed}")).unwrap_or_default();
        self.note(&format!("node {number} starts, process {}{with}", running.pid().as_raw_nonzero()));
        self.tally.lives += 1;
        let killed = armed.filter(|armed| armed.sleeps.is_none()).map(|armed| armed.point.name);
        let (seen, leads, told, asleep, foul, stale) = (0, 0, false, None, false, false);
        self.nodes.push(Node { number, running, proxy, seen, leads, told, killed, armed, asleep, foul, stale });
    }

    /// Waits for the moment, or until the run is over.
    fn wait(&mut self, moment: &Moment) -> Checked<Came> {
        let mut left = moment.kind.map_or(0, |_| moment.nth);
        while left > 0 && !self.over {
            let heard = self.look(moment.kind)?;
            left = left.saturating_sub(heard);
        }
        let until = Instant::now() + moment.delay;
        while Instant::now() < until && !self.over {
            self.look(None)?;
        }
        Ok(if self.over { Came::Over } else { Came::There })
    }

    /// One look at all nodes: what they say, who has ended, who wakes, who is missing. Returns how often a leader said
    /// something of this kind.
    fn look(&mut self, kind: Option<&str>) -> Checked<u32> {
        std::thread::sleep(LOOK);
        let (mut heard, mut formed) = (0, false);
        for node in &mut self.nodes {
            for event in node.running.heard(&mut node.seen) {
                self.last_heard = Instant::now();
                self.over |= event.kind() == "completed";
                let follows = event.value.get("leader").is_some();
                if event.kind() == "formed" && !follows {
                    node.leads = event.value["generation"].as_u64().unwrap_or_default();
                    formed = true;
                }
                heard += u32::from(!follows && kind.is_some_and(|kind| event.kind() == kind));
            }
            // An armed point has stopped it.
            if node.asleep.is_none()
                && let Some(sleeps) = node.armed.and_then(|armed| armed.sleeps)
                && node.running.is_stopped()
            {
                node.asleep = Some((Instant::now() + sleeps, Vec::new()));
                let _ = writeln!(self.story, "{:8.3} node {} sleeps", self.begun.elapsed().as_secs_f64(), node.number);
            }
            let now = Instant::now();
            if self.over || node.asleep.as_ref().is_some_and(|(until, _)| *until < now) {
                if node.asleep.is_some() {
                    let at = self.begun.elapsed().as_secs_f64();
                    let _ = writeln!(self.story, "{at:8.3} node {} wakes", node.number);
                    self.tally.sleepers += 1;
                }
                node.wake();
            }
        }
        self.reap()?;
        if formed {
            let due = std::mem::take(&mut self.due);
            (0..due).for_each(|_| self.refill());
        }
        while !self.over && self.able() < self.scenario.min as usize {
            self.start();
        }
        let silence = self.last_heard.elapsed();
        if self.tally.silence < silence {
            self.tally.silence = silence;
        }
        demand(self.nodes.is_empty() || silence < STILL, Promise::Other, || {
            let there: Vec<usize> = self.nodes.iter().map(|node| node.number).collect();
            format!("nodes {there:?} have done nothing for {silence:.0?}")
        })?;
        Ok(heard)
    }

    /// Those that have ended.
    fn reap(&mut self) -> Checked {
        while let Some(at) = self.nodes.iter().position(|node| node.running.has_ended()) {
            let node = self.nodes.remove(at);
            self.last_heard = Instant::now();
            let (codes, killed) = (node.codes(), node.killed);
            let proxy = node.proxy;
            let number = node.number;
            let life = node.running.finish();
            self.note(&format!("node {number} has ended: {}", life.status()));
            if let Some(proxy) = proxy {
                self.tally.store_faults(proxy.broken_by_kind());
            }
            let (code, was_killed) = (life.code(), life.was_killed());
            let unheard = life.events.is_empty() && life.status().to_string().contains("SIGTERM");
            let fits = match code {
                Some(code) => codes.contains(&code),
                // A process that is told to end before it listens ends at once.
                None => (killed.is_some() && was_killed) || (codes.contains(&75) && unheard),
            };
            if let Some(whom) = killed.filter(|_| was_killed) {
                self.tally.kill(whom, 1);
            }
            self.tally.left += u64::from(matches!(code, Some(75 | 76)));
            self.over |= code == Some(0);
            let left = life.left_processes();
            self.ended.push(life);
            let life = &self.ended[self.ended.len() - 1];
            demand(!left, Promise::Other, || format!("workers outlive node {number}\n{}", life.story()))?;
            demand(fits, Promise::Other, || {
                format!("node {number} has exit code {code:?}, none of {codes:?}\n{}", life.story())
            })?;
        }
        Ok(())
    }

    fn refill(&mut self) {
        if !self.over && self.able() < self.scenario.nodes as usize {
            self.start();
        }
    }

    /// The places of these nodes among the living.
    fn places(&self, whom: &[Whom]) -> Vec<usize> {
        let alive = |node: &&Node| !node.running.has_ended();
        let newest = self.nodes.iter().filter(alive).map(|node| node.leads).max().unwrap_or(0);
        let leader = self.nodes.iter().position(|node| node.leads == newest && alive(&node)).filter(|_| newest > 0);
        let others: Vec<usize> =
            (0..self.nodes.len()).filter(|place| Some(*place) != leader && alive(&&self.nodes[*place])).collect();
        let place = |whom: &Whom| match whom {
            Whom::Leader => leader.or_else(|| others.first().copied()),
            Whom::Follower(which) => {
                let which = (*which % others.len().max(1) as u64) as usize;
                others.get(which).copied().or(leader)
            }
        };
        let mut places: Vec<usize> = whom.iter().filter_map(place).collect();
        places.sort_unstable();
        places.dedup();
        places
    }

    fn is_leader(&self, place: usize) -> bool {
        self.places(&[Whom::Leader]) == [place] && self.nodes[place].leads > 0
    }

    fn kill(&mut self, places: &[usize], whole: bool) {
        // Who is what is decided before the first one dies.
        let leaders: Vec<bool> = places.iter().map(|place| self.is_leader(*place)).collect();
        let workers: Vec<Pid> =
            places.iter().filter(|_| whole).flat_map(|at| self.nodes[*at].running.workers()).collect();
        for (place, leads) in places.iter().zip(leaders) {
            let node = &mut self.nodes[*place];
            node.killed = Some(if leads { "leader" } else { "follower" });
            node.running.signal(Signal::KILL);
        }
        workers.into_iter().for_each(|pid| _ = kill_process(pid, Signal::KILL));
    }

    fn clear(&mut self) {
        for proxy in self.nodes.iter().filter_map(|node| node.proxy.as_ref()) {
            proxy.disarm();
            proxy.set_line(Line::default());
        }
    }

    fn strike(&mut self, blow: &Blow) {
        self.clear();
        let everybody: Vec<usize> = (0..self.nodes.len()).collect();
        let places = match &blow.strike {
            Strike::Kill { whom, .. } | Strike::Terminate { whom, .. } => self.places(whom),
            Strike::Worker(whom) | Strike::Stop { whom, .. } | Strike::Weather(whom, _) => self.places(&[*whom]),
            Strike::KillAll { .. } | Strike::TerminateAll => everybody,
            Strike::Newcomer => Vec::new(),
        };
        let numbers: Vec<usize> = places.iter().map(|place| self.nodes[*place].number).collect();
        self.note(&format!("{}: nodes {numbers:?}", blow.strike));
        let mut cost = places.len();
        match &blow.strike {
            Strike::Kill { whole, .. } | Strike::KillAll { whole } => self.kill(&places, *whole),
            Strike::Worker(_) => {
                cost = 0;
                let worker = places.first().and_then(|place| self.nodes[*place].running.workers().first().copied());
                if worker.is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok()) {
                    self.tally.kill("worker", 1);
                }
            }
            Strike::Stop { whole, time, .. } => {
                for place in &places {
                    let node = &mut self.nodes[*place];
                    let mut workers = if *whole { node.running.workers() } else { Vec::new() };
                    node.running.signal(Signal::STOP);
                    workers.iter().for_each(|pid| _ = kill_process(*pid, Signal::STOP));
                    // A second blow may fall on a sleeper: whoever sleeps already wakes, too.
                    let before = node.asleep.take().map(|(_, before)| before);
                    workers.extend(before.unwrap_or_default());
                    node.asleep = Some((Instant::now() + (*time).min(LONGEST_SLEEP), workers));
                }
            }
            Strike::Terminate { kill_after, .. } => {
                self.tell(&places);
                if let Some(time) = kill_after {
                    std::thread::sleep(*time);
                    self.kill(&places, false);
                }
            }
            Strike::TerminateAll => self.tell(&places),
            Strike::Newcomer => {
                cost = 0;
                self.start();
            }
            Strike::Weather(_, weather) => {
                cost = 0;
                for place in &places {
                    let node = &mut self.nodes[*place];
                    let Some(proxy) = &node.proxy else { continue };
                    weather.rules.iter().for_each(|rule| proxy.arm(rule.clone()));
                    weather.hangs.iter().for_each(|hang| proxy.hang(*hang));
                    proxy.set_line(Line { latency: weather.latency, ..Line::default() });
                    (node.foul, node.stale) = (true, node.stale || weather.is_stale());
                }
            }
        }
        match blow.refill {
            Refill::Now => (0..cost).for_each(|_| self.start()),
            Refill::Later => self.due += cost,
            Refill::Never => {}
        }
    }

    fn tell(&mut self, places: &[usize]) {
        for place in places {
            let node = &mut self.nodes[*place];
            node.told = true;
            node.running.signal(Signal::TERM);
        }
    }
}

/// Whether a loss is the undisturbed run's but for the rounding of sums.
fn is_nearly(loss: &str, wanted: &str) -> bool {
    let (Ok(loss), Ok(wanted)) = (loss.parse::<f64>(), wanted.parse::<f64>()) else { return false };
    (loss - wanted).abs() <= 1e-5 * wanted.abs()
}

/// Checks the whole output of a process against the undisturbed run and the journal.
fn check_against_the_journal(life: &Finished, view: &View, losses: &Losses) -> Checked {
    let other = |holds, how: &str| demand(holds, Promise::Other, || format!("{how}\n{}", life.story()));
    other(life.not_json().is_empty(), "stdout is data, but not all of it is JSON")?;
    let mut last = None;
    for event in &life.events {
        let step = event.step().unwrap_or_default();
        let uint = |name: &str| event.value[name].as_u64();
        match event.kind() {
            "formed" => {
                let generation = uint("generation").unwrap_or_default();
                let formed = view.formed.iter().find(|formed| formed.generation == generation);
                let said = uint("resume_step");
                let resume = formed.map(|formed| formed.resume.map(|(step, _)| step));
                demand(resume == Some(said), Promise::DamagedResume, || {
                    format!("generation {generation} says it resumes from {said:?}; the journal: {resume:?}")
                })?;
                let nodes = formed.map(|formed| formed.roster.len() as u64);
                other(uint("nodes") == nodes && uint("world_size") == nodes, "formed with other nodes")?;
                let leader = formed.and_then(|formed| formed.roster.first()).map(String::as_str);
                let said = event.value["leader"].as_str();
                other(said.is_none() || said == leader, "another node leads it")?;
                last = said.is_none().then(|| uint("resume_step").unwrap_or(0));
            }
            "step" => step_fits(event, &mut last, losses, life)?,
            "checkpoint" => {
                let place = (step, uint("generation").unwrap_or_default());
                demand(view.committed.contains(&place), Promise::LostCheckpoint, || {
                    format!("checkpoint {place:?} was announced, the journal has none\n{}", life.story())
                })?;
            }
            "completed" => other(view.completed == Some(step), "completed, but the journal does not say so")?,
            "interrupted" => {
                let lost = uint("lost_steps").unwrap_or_default();
                let code = if lost == 0 { 75 } else { 76 };
                other(life.code() == Some(code) || life.was_killed(), "the exit code says nothing of the loss")?;
                let base = step.checked_sub(lost);
                let is_saved = base == Some(0) || view.committed.iter().any(|(step, _)| Some(*step) == base);
                other(is_saved, "lost steps do not add up")?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// A step follows the one before it, and has its loss.
fn step_fits(event: &Event, last: &mut Option<u64>, losses: &Losses, life: &Finished) -> Checked {
    let step = event.step().unwrap_or_default();
    demand(last.is_some_and(|last| step == last + 1), Promise::DamagedResume, || {
        format!("step {step} was done after {last:?}\n{}", life.story())
    })?;
    *last = Some(step);
    let (loss, wanted) = (event.number_text("loss").unwrap_or_default(), losses.get(&step).map_or("", String::as_str));
    demand(is_nearly(loss, wanted), Promise::DamagedResume, || {
        format!("the loss of step {step} is {loss}, undisturbed {wanted}\n{}", life.story())
    })
}
