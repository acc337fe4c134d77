//! The starting point of most tests: a place to work in, a store, a tiny dataset, a tiny model, and the results of the
//! undisturbed run, with which every disturbed one is compared.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, OnceLock, PoisonError},
};

use rustix::process::Signal;

use super::{
    moto::Moto,
    proxy::FaultProxy,
    s3::{self, S3Server},
    trainer::{Finished, Losses, Trainer, losses, read},
};

/// Optimizer steps of a run.
pub const STEPS: u64 = 24;
/// Steps from checkpoint to checkpoint.
pub const EVERY: u64 = 4;
/// Sequences in one step: divisible by 1, 2, 3 and 4 ranks.
pub const GLOBAL_BATCH: u32 = 12;

/// At most two tests that start process groups run at once, whatever the number of test threads: each starts a handful
/// of processes, and two cores are enough for the suite.
pub struct Turn(());

static TURNS: (Mutex<u32>, Condvar) = (Mutex::new(2), Condvar::new());

impl Turn {
    /// Waits for its turn.
    pub fn take() -> Self {
        let mut free = TURNS.0.lock().unwrap_or_else(PoisonError::into_inner);
        while *free == 0 {
            free = TURNS.1.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= 1;
        Self(())
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *TURNS.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        TURNS.1.notify_one();
    }
}

/// The folder of this test process; folders of test processes that are gone are removed first.
pub fn scratch() -> &'static Path {
    static SCRATCH: OnceLock<PathBuf> = OnceLock::new();
    SCRATCH.get_or_init(|| {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR"));
        for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some(pid) = name.strip_prefix("integration-")
                && !Path::new("/proc").join(pid).exists()
            {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        let own = root.join(format!("integration-{}", std::process::id()));
        std::fs::create_dir_all(&own).expect("scratch folder");
        own
    })
}

/// Text for the tokenizer and the model: plain, varied, and the same on every machine.
pub fn sample_text() -> String {
    const WORDS: [&str; 40] = [
        "the",
        "machine",
        "went",
        "away",
        "before",
        "night",
        "and",
        "a",
        "new",
        "one",
        "came",
        "with",
        "morning",
        "so",
        "work",
        "was",
        "never",
        "lost",
        "checkpoint",
        "stood",
        "in",
        "store",
        "while",
        "rain",
        "fell",
        "over",
        "quiet",
        "rivers",
        "of",
        "light",
        "they",
        "counted",
        "every",
        "step",
        "again",
        "until",
        "numbers",
        "agreed",
        "to",
        "end",
    ];
    let mut state = 20_261_122_u64;
    let mut text = String::new();
    for sentence in 0..2500 {
        for word in 0..6 + sentence % 9 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            if word > 0 {
                text.push(' ');
            }
            text.push_str(WORDS[(state >> 33) as usize % WORDS.len()]);
        }
        text.push_str(if sentence % 12 == 11 { ".\n\n" } else { ". " });
    }
    text
}

/// The folder of the tiny dataset, created by the binary itself once in a test process.
pub fn data_set() -> &'static Path {
    static DATA: OnceLock<PathBuf> = OnceLock::new();
    DATA.get_or_init(|| {
        let (input, out) = (scratch().join("input.txt"), scratch().join("data"));
        std::fs::write(&input, sample_text()).expect("write sample text");
        let (from, to) = (input.display().to_string(), format!("file://{}", out.display()));
        let arguments = ["data", "prepare", "--input", &from, "--tokenizer", "train:512", "--out", &to];
        Trainer::new(scratch(), &arguments).finish().expect_code(0);
        out
    })
}

/// A Hugging Face `config.json` of a model that trains in milliseconds.
pub fn model_config(vocabulary: u32) -> String {
    format!(
        r#"{{"architectures":["LlamaForCausalLM"],"model_type":"llama","vocab_size":{vocabulary},"hidden_size":64,
"intermediate_size":160,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":16,
"hidden_act":"silu","max_position_embeddings":128,"rms_norm_eps":1e-5,"rope_theta":10000.0,
"initializer_range":0.02,"tie_word_embeddings":false,"attention_bias":false,"mlp_bias":false,"torch_dtype":"float32"}}"#
    )
}

/// Where a lab keeps its runs.
#[derive(Clone)]
pub enum Store {
    /// A folder.
    File(PathBuf),
    /// A server, which clients reach at this endpoint (its own, or that of a proxy before it).
    S3(Arc<S3Server>, String),
    /// Another project's server; tests reach it by commands alone.
    Moto(Arc<Moto>),
}

/// A place to work in: a folder, a store, and commands that know both.
pub struct Lab {
    dir: tempfile::TempDir,
    /// The store.
    pub store: Store,
    _turn: Option<Turn>,
}

impl Lab {
    /// With a folder as its store.
    pub fn on_files() -> Self {
        Self::make(Some(Turn::take()), |dir| Store::File(dir.join("store")))
    }
    /// With its own S3 server as its store.
    pub fn on_s3() -> Self {
        let server = Arc::new(S3Server::start());
        let endpoint = server.endpoint();
        Self::make(Some(Turn::take()), |_| Store::S3(server, endpoint))
    }
    /// With its own S3 server as its store, reached through a proxy that injects faults.
    pub fn on_s3_through_proxy(seed: u64) -> (Self, FaultProxy) {
        let server = Arc::new(S3Server::start());
        let proxy = FaultProxy::start(server.address(), seed);
        let endpoint = proxy.endpoint();
        (Self::make(Some(Turn::take()), |_| Store::S3(server, endpoint)), proxy)
    }
    /// With another project's server as its store; `None`: it is not installed.
    pub fn on_moto() -> Option<Self> {
        let moto = Arc::new(Moto::start(s3::BUCKET)?);
        Some(Self::make(Some(Turn::take()), |_| Store::Moto(moto)))
    }
    /// On files, for a campaign that counts its own processes: it waits for no turn.
    pub fn on_files_at_once() -> Self {
        Self::make(None, |dir| Store::File(dir.join("store")))
    }
    /// The same on S3, through a proxy.
    pub fn on_s3_through_proxy_at_once(seed: u64) -> (Self, FaultProxy) {
        let server = Arc::new(S3Server::start());
        let proxy = FaultProxy::start(server.address(), seed);
        let endpoint = proxy.endpoint();
        (Self::make(None, |_| Store::S3(server, endpoint)), proxy)
    }
    /// With a folder as its store, which holds a copy of [`interrupted`]'s run.
    pub fn on_interrupted_run() -> Self {
        let lab = Self::on_files();
        let Store::File(store) = &lab.store else { unreachable!("made on files") };
        copy_folder(&interrupted().store, store);
        lab
    }
    /// With its own S3 server as its store, which holds a copy of [`interrupted`]'s run.
    pub fn on_interrupted_run_on_s3() -> Self {
        let lab = Self::on_s3();
        let mut keys = Vec::new();
        walk(&interrupted().store, "", &mut keys);
        for key in keys {
            lab.server().write(&format!("runs/{key}"), read(&interrupted().store.join(&key)));
        }
        lab
    }
    fn make(turn: Option<Turn>, store: impl FnOnce(&Path) -> Store) -> Self {
        let dir = tempfile::Builder::new().prefix("lab-").tempdir_in(scratch()).expect("folder of the lab");
        let store = store(dir.path());
        let lab = Self { dir, store, _turn: turn };
        std::fs::write(lab.path("model.json"), model_config(512)).expect("write model.json");
        lab.write_config("run.toml", &lab.config(""));
        lab
    }
    /// Copies its folder and every object of its store to `to`, for a person to look at.
    pub fn keep(self, to: &Path) {
        let _ = std::fs::remove_dir_all(to);
        copy_folder(self.dir.path(), to);
        if let Store::S3(server, _) = &self.store {
            for key in server.keys("") {
                let path = to.join("store").join(&key);
                std::fs::create_dir_all(path.parent().expect("below the store")).expect("folder of an object");
                std::fs::write(path, server.read(&key).unwrap_or_default()).expect("write an object");
            }
        }
    }
    /// A path in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    /// The store's URI.
    pub fn uri(&self) -> String {
        match &self.store {
            Store::File(path) => format!("file://{}", path.display()),
            Store::S3(..) | Store::Moto(_) => format!("s3://{}/runs", s3::BUCKET),
        }
    }
    /// The server, if the lab has one.
    pub fn server(&self) -> &S3Server {
        match &self.store {
            Store::S3(server, _) => server,
            Store::File(_) | Store::Moto(_) => panic!("this lab has no S3 server of ours"),
        }
    }
    /// The text of a run configuration, with `more` at its end.
    pub fn config(&self, more: &str) -> String {
        format!(
            r#"store = "{}"

[model]
kind = "llama"
config = "{}"

[data]
train = "file://{}"
sequence_length = 32

[train]
steps = {STEPS}
global_batch = {GLOBAL_BATCH}
max_micro_batch = 2
seed = 1234
threads = 1
optimizer = {{ kind = "adamw", lr = 3e-3 }}
schedule = {{ kind = "cosine", warmup_steps = 4 }}

[parallel]
nproc_per_node = 2

[checkpoint]
every = "{EVERY} steps"

[restart]
backoff = "50ms"
{more}"#,
            self.uri(),
            self.path("model.json").display(),
            data_set().display()
        )
    }
    /// Writes a configuration file.
    pub fn write_config(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("write configuration");
    }
    /// Any command of the binary, with the lab's credentials.
    pub fn command(&self, arguments: &[&str]) -> Trainer {
        let trainer = Trainer::new(self.dir.path(), arguments);
        match &self.store {
            Store::File(_) => trainer,
            Store::S3(_, endpoint) => trainer.envs(&s3::client_env(endpoint)),
            Store::Moto(moto) => trainer.envs(&s3::client_env(&moto.endpoint())),
        }
    }
    /// A command about one run: `status`, `verify`, …
    pub fn about(&self, command: &str, run: &str) -> Trainer {
        self.command(&[command, "--run-id", run, "--store", &self.uri()])
    }
    /// `trainer run run.toml --json`
    pub fn run(&self, run: &str) -> Trainer {
        self.command(&["run", "run.toml", "--run-id", run]).json()
    }
    /// `trainer resume --json`
    pub fn resume(&self, run: &str) -> Trainer {
        self.about("resume", run).json()
    }
    /// The bytes of `model.safetensors` as `trainer export` writes it.
    #[track_caller]
    pub fn export(&self, run: &str) -> Vec<u8> {
        let out = self.path(&format!("export-{run}"));
        self.about("export", run).args(&["--out", &out.display().to_string()]).finish().expect_code(0);
        read(&out.join("model.safetensors"))
    }
    /// Keys of a run below `prefix`, relative to the run, sorted.
    pub fn keys(&self, run: &str, prefix: &str) -> Vec<String> {
        let mut keys = match &self.store {
            Store::S3(server, _) => {
                let root = format!("runs/{run}/");
                server.keys(&root).iter().map(|key| key[root.len()..].to_owned()).collect()
            }
            Store::Moto(_) => panic!("reached by commands alone"),
            Store::File(path) => {
                let mut found = Vec::new();
                walk(&path.join(run), "", &mut found);
                found
            }
        };
        keys.retain(|key| key.starts_with(prefix));
        keys.sort();
        // A folder in which a file is replaced meanwhile may list it twice.
        keys.dedup();
        keys
    }
    /// An object of a run.
    #[track_caller]
    pub fn read(&self, run: &str, key: &str) -> Vec<u8> {
        match &self.store {
            Store::S3(server, _) => {
                server.read(&format!("runs/{run}/{key}")).unwrap_or_else(|| panic!("no object {key}")).to_vec()
            }
            Store::Moto(_) => panic!("reached by commands alone"),
            Store::File(path) => read(&path.join(run).join(key)),
        }
    }
    /// Changes an object of a run in place.
    #[track_caller]
    pub fn damage(&self, run: &str, key: &str, change: impl FnOnce(&mut Vec<u8>)) {
        match &self.store {
            Store::S3(server, _) => server.rot(&format!("runs/{run}/{key}"), change),
            Store::Moto(_) => panic!("reached by commands alone"),
            Store::File(path) => {
                let path = path.join(run).join(key);
                let mut bytes = read(&path);
                change(&mut bytes);
                std::fs::write(&path, bytes).expect("write damaged object");
            }
        }
    }
    /// Removes an object of a run.
    #[track_caller]
    pub fn remove(&self, run: &str, key: &str) {
        match &self.store {
            Store::S3(server, _) => server.remove(&format!("runs/{run}/{key}")),
            Store::Moto(_) => panic!("reached by commands alone"),
            Store::File(path) => std::fs::remove_file(path.join(run).join(key)).expect("remove object"),
        }
    }
    /// The folder of the newest checkpoint by step, then generation: `checkpoints/s…-g…`.
    #[track_caller]
    pub fn newest_checkpoint(&self, run: &str) -> String {
        let manifests = self.keys(run, "checkpoints/");
        let newest = manifests.iter().rfind(|key| key.ends_with("/manifest.json"));
        newest.expect("a checkpoint").trim_end_matches("/manifest.json").to_owned()
    }
    /// Demands the result that every disturbed run must reach: the losses and the weights of the undisturbed one, to
    /// the last digit and the last byte.
    #[track_caller]
    pub fn expect_as_undisturbed(&self, run: &str, lives: &[&Finished]) {
        let reference = reference();
        let last = lives.last().expect("at least one life");
        assert_eq!(losses(lives), reference.losses, "losses differ from the undisturbed run's\n{}", last.story());
        assert!(self.export(run) == reference.model, "weights differ from the undisturbed run's\n{}", last.story());
    }
    /// Demands that every byte of every checkpoint of a run matches its manifest.
    #[track_caller]
    pub fn expect_all_verify(&self, run: &str) {
        self.about("verify", run).args(&["--all", "--deep"]).finish().expect_code(0);
    }
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("folder of a copy");
    for entry in std::fs::read_dir(from).expect("folder to copy").map(|entry| entry.expect("entry to copy")) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("copy a file");
        }
    }
}

fn walk(folder: &Path, prefix: &str, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => walk(&entry.path(), &format!("{name}/"), found),
            // A file that is still being written is no object, as `src/storage/local.rs` names it.
            _ if name.rsplit_once('#').is_some_and(|(_, number)| number.parse::<u32>().is_ok()) => {}
            _ => found.push(name),
        }
    }
}

/// The results of an undisturbed run.
pub struct Reference {
    /// Each step's loss, as written.
    pub losses: Losses,
    /// `model.safetensors`, whole.
    pub model: Vec<u8>,
}

/// The undisturbed run of the lab's configuration on two ranks, done once in a test process.
pub fn reference() -> &'static Reference {
    static REFERENCE: OnceLock<Reference> = OnceLock::new();
    REFERENCE.get_or_init(|| {
        // Tests that wait here hold their own turns, so this run takes none.
        let lab = Lab::make(None, |dir| Store::File(dir.join("store")));
        let life = lab.run("reference").finish().expect_code(0);
        let losses = losses(&[&life]);
        assert_eq!(losses.len() as u64, STEPS, "{}", life.story());
        Reference { losses, model: lab.export("reference") }
    })
}

/// A run that SIGTERM ended half-way, with at least two checkpoints before its last.
pub struct Interrupted {
    /// The folder of its store.
    pub store: PathBuf,
    /// Its one life.
    pub life: Finished,
    /// The step of its newest checkpoint.
    pub step: u64,
}

/// The run id of [`interrupted`].
pub const ORIGIN: &str = "origin";

/// The interrupted run, done once in a test process; tests work on copies of it.
pub fn interrupted() -> &'static Interrupted {
    static INTERRUPTED: OnceLock<Interrupted> = OnceLock::new();
    INTERRUPTED.get_or_init(|| {
        // On a busy machine such a short run may be further than the tests expect, or complete, before the signal is
        // heard: then it is repeated once.
        let in_time = |life: &Finished| {
            life.of_kind("interrupted").last().is_some_and(|event| event.step() < Some(3 * EVERY))
                && life.committed().is_superset(&[EVERY, 2 * EVERY].into())
        };
        let asked = || {
            let lab = Lab::make(None, |dir| Store::File(dir.join("store")));
            let running = lab.run(ORIGIN).hold_after(2 * EVERY + 1).start();
            running.wait_for_step("checkpoint", 2 * EVERY);
            running.held();
            running.signal(Signal::TERM);
            running.wait_for("a notice", |event| event.kind() == "notice");
            running.let_go();
            (lab, running.finish())
        };
        let (lab, life) = (0..20).map(|_| asked()).find(|(_, life)| in_time(life)).expect("asked in time");
        let life = life.expect_code(75);
        let step = life.last("interrupted").step().expect("an interrupted event has a step");
        let store = scratch().join("interrupted");
        copy_folder(&lab.path("store"), &store);
        Interrupted { store, life, step }
    })
}
