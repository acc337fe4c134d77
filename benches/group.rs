//! Several nodes of one run on this machine: how long it takes until they go on when one of them is killed, stopped or
//! told to leave, and what an agent costs that only keeps in touch with 16 others.
//!
//! Times are counted from the signal to the event of a survivor, as the reader of its output hears it. The model is
//! tiny: nothing here depends on the amount of state, and starting workers is part of every figure but the first.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::{Result, figures::median, lab, machine::Machine, report, suite};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// Longer than any of these waits on a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);
/// The time over which an idle agent's CPU time is counted.
const IDLE: Duration = Duration::from_secs(30);
/// The time for which it is left alone before.
const SETTLE: Duration = Duration::from_secs(15);
/// Saves of a group at work whose holds are measured in one round.
const HELD: usize = 20;
/// Nodes of the idle group.
const MANY: usize = 17;

struct Heard {
    from: usize,
    at: Instant,
    event: Value,
}

/// Agents of one run, by the order of their starts. Dropped, they and their workers are killed.
struct Group {
    folder: PathBuf,
    bounds: String,
    faults: &'static str,
    agents: Vec<Option<Child>>,
    heard: mpsc::Receiver<Heard>,
    said: mpsc::Sender<Heard>,
}

impl Drop for Group {
    fn drop(&mut self) {
        (0..self.agents.len()).for_each(|at| self.signal(at, Signal::KILL));
        for agent in self.agents.iter_mut().flatten() {
            let _ = agent.wait();
        }
    }
}

impl Group {
    fn new(folder: PathBuf, bounds: &str, faults: &'static str) -> Result<Self> {
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder)?;
        let (said, heard) = mpsc::channel();
        Ok(Self { folder, bounds: bounds.to_owned(), faults, agents: Vec::new(), heard, said })
    }

    /// Starts one more node.
    fn start(&mut self, config: &Path) -> Result<usize> {
        let number = self.agents.len();
        let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
        command.arg("run").arg(config).args(["--run-id", "bench", "--json", "--nproc-per-node", "1"]);
        command.args(["--nodes", &self.bounds, "--set", "network.address=127.0.0.1", "--store"]);
        command.arg(format!("file://{}", self.folder.display())).env("NO_COLOR", "1");
        command.env("AWS_EC2_METADATA_DISABLED", "true").env("NO_GCE_CHECK", "true");
        command.env("TRAINER_AZURE_METADATA_ENDPOINT", "off").env("TRAINER_FAULTS", self.faults);
        command.env("TRAINER_LOG", "trainer::agent::lead=debug");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("start a node")?;
        let lines = BufReader::new(child.stdout.take().context("output")?).lines();
        let said = self.said.clone();
        thread::spawn(move || {
            for line in lines.map_while(std::io::Result::ok) {
                let Ok(event) = serde_json::from_str(&line) else { continue };
                let _ = said.send(Heard { from: number, at: Instant::now(), event });
            }
        });
        let log = BufReader::new(child.stderr.take().context("log")?).lines();
        let said = self.said.clone();
        thread::spawn(move || {
            for line in log.map_while(std::io::Result::ok) {
                for what in ["held_ms", "agreed_ms"] {
                    let Some(ms) = number_of(&line, what) else { continue };
                    let event = json!({"event": what, "ms": ms});
                    let _ = said.send(Heard { from: number, at: Instant::now(), event });
                }
            }
        });
        self.agents.push(Some(child));
        Ok(number)
    }

    fn pid(&self, number: usize) -> Option<u32> {
        Some(self.agents.get(number)?.as_ref()?.id())
    }

    /// Sends a signal to a node's agent; SIGKILL and SIGSTOP go to its workers, too, as a machine's loss does.
    fn signal(&self, number: usize, signal: Signal) {
        let Some(agent) = self.pid(number) else { return };
        let whole = signal == Signal::KILL || signal == Signal::STOP;
        let all = if whole { lab::family(agent) } else { [agent].into() };
        for pid in all.into_iter().filter_map(|pid| Pid::from_raw(pid as i32)) {
            let _ = kill_process(pid, signal);
        }
    }

    /// A node is no more.
    fn forget(&mut self, number: usize) -> Result<()> {
        self.signal(number, Signal::KILL);
        if let Some(mut agent) = self.agents[number].take() {
            agent.wait()?;
        }
        Ok(())
    }

    /// The next event that fits.
    fn next(&self, what: &str, mut fits: impl FnMut(&Heard) -> bool) -> Result<Heard> {
        let until = Instant::now() + PATIENCE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let heard = self.heard.recv_timeout(left).with_context(|| format!("waited in vain for {what}"))?;
            if fits(&heard) {
                return Ok(heard);
            }
        }
    }

    /// The next generation of `nodes` nodes: its leader, and when it formed.
    fn formed(&self, nodes: usize) -> Result<(usize, Instant)> {
        let wanted = json!(nodes);
        let heard = self.next(&format!("a generation of {nodes}"), |heard| {
            let event = &heard.event;
            event["event"] == "formed" && event.get("leader").is_none() && event["nodes"] == wanted
        })?;
        Ok((heard.from, heard.at))
    }

    /// The same, and it has saved: then it is at work, and whoever joins next finds a save soon.
    fn works(&self, nodes: usize) -> Result<usize> {
        let (leader, _) = self.formed(nodes)?;
        self.next("a checkpoint", |heard| heard.from == leader && heard.event["event"] == "checkpoint")?;
        Ok(leader)
    }

    fn another(&self, than: usize) -> Result<usize> {
        let mut others = (0..self.agents.len()).filter(|at| *at != than && self.agents[*at].is_some());
        others.next_back().context("another node")
    }
}

/// The number behind `what=` in a line of the log.
fn number_of(line: &str, what: &str) -> Option<f64> {
    let (_, text) = line.split_once(&format!("{what}="))?;
    text.split_whitespace().next()?.parse().ok()
}

/// Seconds by figure, one for each round.
type Figures = BTreeMap<&'static str, Vec<f64>>;

const NAMES: [(&str, &str); 10] = [
    ("held", "freeze to thaw of 3 nodes, ms"),
    ("agreed", "SIGTERM at a follower to the agreed step, ms"),
    ("follower", "kill -9 of a follower's machine to `formed`, s"),
    ("leader", "kill -9 of the leader's machine to `formed`, s"),
    ("silent follower", "a silent follower (SIGSTOP) to `formed`, s"),
    ("silent leader", "a silent leader (SIGSTOP) to `formed`, s"),
    ("notice", "SIGTERM at a follower to the checkpoint of the agreed step, s"),
    ("left", "SIGTERM at a follower to `formed` of the others, s"),
    ("idle leader", "idle leader of 17 nodes, % of a core"),
    ("idle follower", "idle follower of 17 nodes, % of a core"),
];

/// One round with three nodes, of which one is lost after the other.
fn lose(config: &Path, folder: PathBuf, figures: &mut Figures) -> Result<()> {
    let mut group = Group::new(folder, "1:3", "")?;
    for _ in 0..3 {
        group.start(config)?;
    }
    let mut leader = group.works(3)?;
    for (name, lead, signal) in [
        ("follower", false, Signal::KILL),
        ("leader", true, Signal::KILL),
        ("silent follower", false, Signal::STOP),
        ("silent leader", true, Signal::STOP),
    ] {
        let lost = if lead { leader } else { group.another(leader)? };
        let begun = Instant::now();
        group.signal(lost, signal);
        let (next, at) = group.formed(2)?;
        figures.entry(name).or_default().push(at.duration_since(begun).as_secs_f64());
        eprintln!("{name}: {:.2} s", at.duration_since(begun).as_secs_f64());
        if !lead && next != leader {
            bail!("another node leads after the loss of a follower");
        }
        group.forget(lost)?;
        group.start(config)?;
        leader = group.works(3)?;
    }
    for _ in 0..HELD {
        let held = group.next("a save", |heard| heard.from == leader && heard.event["event"] == "held_ms")?;
        figures.entry("held").or_default().push(held.event["ms"].as_f64().unwrap_or(f64::NAN));
    }
    let leaves = group.another(leader)?;
    let begun = Instant::now();
    group.signal(leaves, Signal::TERM);
    // The last save before the others form is that of the agreed step; one under way may be committed before it.
    let mut saved = begun;
    let formed = group.next("a generation of the others", |heard| {
        if heard.from == leader && heard.event["event"] == "agreed_ms" {
            figures.entry("agreed").or_default().push(1e3 * heard.at.duration_since(begun).as_secs_f64());
        }
        if heard.from == leader && heard.event["event"] == "checkpoint" {
            saved = heard.at;
        }
        heard.event["event"] == "formed" && heard.event.get("leader").is_none()
    })?;
    let at = formed.at;
    figures.entry("notice").or_default().push(saved.duration_since(begun).as_secs_f64());
    figures.entry("left").or_default().push(at.duration_since(begun).as_secs_f64());
    Ok(())
}

/// Seventeen nodes whose workers are stopped: their agents only keep in touch.
fn idle(config: &Path, folder: PathBuf, figures: &mut Figures) -> Result<()> {
    let mut group = Group::new(folder, &format!("{MANY}:{MANY}"), "worker.step=stop@hit=2")?;
    for _ in 0..MANY {
        group.start(config)?;
    }
    let (leader, _) = group.formed(MANY)?;
    thread::sleep(SETTLE);
    let follower = group.another(leader)?;
    let pids = [("idle leader", leader), ("idle follower", follower)];
    let cpu = |number: usize| group.pid(number).and_then(lab::cpu_s).context("CPU time of an agent");
    let before = [cpu(leader)?, cpu(follower)?];
    let begun = Instant::now();
    thread::sleep(IDLE);
    for ((name, number), before) in pids.into_iter().zip(before) {
        let share = 100.0 * (cpu(number)? - before) / begun.elapsed().as_secs_f64();
        figures.entry(name).or_default().push(share);
        eprintln!("{name}: {share:.2} %");
    }
    Ok(())
}

/// Measures and prints; stores the result unless `quick`.
pub fn run(rounds: u32, quick: bool) -> Result<()> {
    let scratch = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("bench-group");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir_all(&scratch)?;
    let machine = Machine::describe(&scratch);
    suite::prepare_data(&scratch.join("data"))?;
    let config = scratch.join("group.toml");
    fs::write(&config, text(&scratch))?;
    let mut figures = Figures::new();
    for round in 0..rounds {
        lose(&config, scratch.join(format!("lose-{round}")), &mut figures)?;
    }
    if !quick {
        idle(&config, scratch.join("idle"), &mut figures)?;
    }
    let mut markdown = format!(
        "groups: {}, commit {}. {}; {} cores, {} GiB; load before: {:.1}. {}.\n\n",
        machine.date,
        machine.commit,
        machine.processor,
        machine.cores,
        machine.memory_gib,
        machine.load_before,
        if cfg!(debug_assertions) { "Built without optimisation" } else { "Built with optimisation" },
    );
    report::head(&mut markdown, ["figure", "median", "least", "most"].map(str::to_owned).to_vec());
    for (name, told) in NAMES {
        let Some(values) = figures.get(name) else { continue };
        let (least, most) = values.iter().fold((f64::MAX, f64::MIN), |(low, high), &v| (low.min(v), high.max(v)));
        let middle = median(values).unwrap_or(f64::NAN);
        let cells = [middle, least, most].map(|value| format!("{value:.2}"));
        report::row(&mut markdown, std::iter::once(told.to_owned()).chain(cells));
    }
    let _ = writeln!(markdown, "\n3 nodes on one machine, a folder as the store; {rounds} rounds.");
    println!("{markdown}");
    fs::remove_dir_all(&scratch)?;
    if quick {
        return Ok(());
    }
    let folder = Path::new(ROOT).join("benches/results");
    let slug = machine.slug("groups");
    let stored = json!({"suite": "groups", "machine": &machine, "rounds": rounds, "results": figures});
    fs::write(folder.join(format!("{slug}.json")), serde_json::to_string_pretty(&stored)? + "\n")?;
    fs::write(folder.join(format!("{slug}.md")), markdown)?;
    eprintln!("kept: benches/results/{slug}.json and .md");
    Ok(())
}

/// A model that trains in milliseconds, and a run that nothing here outlives.
fn text(scratch: &Path) -> String {
    let model = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 2048, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "initializer_range": 0.02, "tie_word_embeddings": false, "attention_bias": false,
        "mlp_bias": false, "torch_dtype": "float32"
    });
    let file = scratch.join("model.json");
    // An error shows when the program reads it.
    let _ = fs::write(&file, model.to_string());
    format!(
        "[model]\nkind = \"llama\"\nconfig = \"{}\"\n[data]\ntrain = \"file://{}\"\nsequence_length = 16\n[train]\n\
        steps = 1000000\nglobal_batch = 17\nmax_micro_batch = 2\nseed = 1\nthreads = 1\n[checkpoint]\nevery = \"50 \
        steps\"\n[restart]\nbackoff = \"50ms\"\n",
        file.display(),
        scratch.join("data").display()
    )
}
