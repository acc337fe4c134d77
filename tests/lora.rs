//! LoRA: adapters beside a frozen base. Killed and resumed runs end as undisturbed ones, to the last digit and byte;
//! checkpoints hold the adapters alone; another base is refused; merged folders begin new runs.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

use crate::{
    interop,
    support::{
        lab::{EVERY, Lab, ORIGIN, STEPS},
        trainer::{Finished, Losses, Trainer, losses, read},
    },
    together,
};

const RANK: usize = 4;
/// alpha / rank.
const SCALE: f32 = 2.0;
const PREFIX: &str = "base_model.model.";

/// A lab with a model folder that runs train adapters beside.
struct Tuning {
    lab: Lab,
    base: PathBuf,
    settings: Vec<String>,
}

impl Tuning {
    fn new(more: &[&str]) -> Self {
        let lab = Lab::on_interrupted_run();
        lab.export(ORIGIN);
        let base = lab.path(&format!("export-{ORIGIN}"));
        let mut settings = vec![
            format!("model.init_from=file://{}", base.display()),
            format!("model.lora.rank={RANK}"),
            "model.lora.alpha=8".into(),
            "train.optimizer.lr=0.03".into(),
            r#"model.lora.targets=["q_proj", "v_proj", "down_proj"]"#.into(),
        ];
        settings.extend(more.iter().map(|&setting| setting.to_owned()));
        Self { lab, base, settings }
    }
    fn run(&self, run: &str) -> Trainer {
        let set: Vec<&str> = self.settings.iter().flat_map(|setting| ["--set", setting]).collect();
        self.lab.run(run).args(&set)
    }
    /// The adapters of the newest checkpoint.
    fn adapters(&self, run: &str) -> Vec<u8> {
        self.lab.read(run, &format!("{}/adapter_model.safetensors", self.lab.newest_checkpoint(run)))
    }
    /// An undisturbed run's losses and adapters.
    fn undisturbed(&self) -> (Losses, Vec<u8>) {
        let life = self.run("undisturbed").finish().expect_code(0);
        let losses = losses(&[&life]);
        assert_eq!(losses.len() as u64, STEPS, "{}", life.story());
        let adapters = self.adapters("undisturbed");
        for (name, tensor) in tensors(&adapters) {
            assert!(floats(&tensor).iter().any(|value| *value != 0.0), "{name} has learnt nothing");
        }
        (losses, adapters)
    }
    #[track_caller]
    fn expect(&self, expected: &(Losses, Vec<u8>), run: &str, lives: &[&Finished]) {
        let last = lives.last().expect("a life");
        assert_eq!(losses(lives), expected.0, "{}", last.story());
        assert!(self.adapters(run) == expected.1, "other adapters\n{}", last.story());
    }
}

pub type Tensors = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

pub fn tensors(bytes: &[u8]) -> Tensors {
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let header: BTreeMap<String, Value> = serde_json::from_slice(&bytes[8..start]).expect("a header");
    let tensor = |entry: &Value| {
        let at = |i: usize| start + entry["data_offsets"][i].as_u64().expect("an offset") as usize;
        let shape = serde_json::from_value(entry["shape"].clone()).expect("a shape");
        (entry["dtype"].as_str().expect("a type").to_owned(), shape, bytes[at(0)..at(1)].to_vec())
    };
    let named = header.iter().filter(|(name, _)| *name != "__metadata__");
    named.map(|(name, entry)| (name.clone(), tensor(entry))).collect()
}

pub fn floats((dtype, _, bytes): &(String, Vec<usize>, Vec<u8>)) -> Vec<f32> {
    match dtype.as_str() {
        "F32" => bytes.chunks(4).map(|x| f32::from_le_bytes(x.try_into().expect("4 bytes"))).collect(),
        "BF16" => bytes.chunks(2).map(|x| f32::from_bits(u32::from(u16::from_le_bytes([x[0], x[1]])) << 16)).collect(),
        other => panic!("a type {other}"),
    }
}

/// One run of each kind is killed in its save and resumed, one of its workers is killed and replaced.
#[track_caller]
fn survives(settings: &[&str]) {
    let tuning = Tuning::new(settings);
    let expected = tuning.undisturbed();
    let kill = format!("save.after-manifest=kill@step={}", 2 * EVERY);
    let first = tuning.run("killed").faults(&kill).finish().expect_killed();
    let second = tuning.lab.resume("killed").finish().expect_code(0);
    assert_eq!(second.resumed_from(), EVERY, "{}", second.story());
    tuning.expect(&expected, "killed", &[&first, &second]);

    // A quick run may pass over saves while one is under way: this one has no other before it.
    let every = format!("checkpoint.every=\"{} steps\"", 4 * EVERY);
    let running = tuning.run("worker").args(&["--set", &every]).hold_after(4 * EVERY + 1).start();
    running.held();
    running.wait_for_step("checkpoint", 4 * EVERY);
    kill_process(running.workers().pop().expect("a worker"), Signal::KILL).expect("kill a worker");
    let life = running.finish().expect_code(0);
    assert_eq!(life.last("restored").value["from"], "memory", "{}", life.story());
    tuning.expect(&expected, "worker", &[&life]);
    for run in ["killed", "worker"] {
        tuning.lab.expect_all_verify(run);
    }
}

#[test]
fn a_killed_run_ends_as_an_undisturbed_one_with_ddp() {
    survives(&["train.global_batch=7"]);
}

#[test]
fn a_killed_run_ends_as_an_undisturbed_one_with_zero1_and_bf16() {
    survives(&["parallel.strategy=zero1", "train.precision=bf16"]);
}

#[test]
fn a_killed_run_ends_as_an_undisturbed_one_on_one_worker() {
    survives(&["parallel.nproc_per_node=1", "train.precision=bf16"]);
}

#[test]
fn a_checkpoint_is_an_adapter_folder_and_holds_no_weight_of_the_base() {
    let tuning = Tuning::new(&[]);
    tuning.run("run").finish().expect_code(0);
    let adapters = tensors(&tuning.adapters("run"));
    let mut expected = Vec::new();
    for layer in 0..2 {
        for (name, rows, columns) in
            [("self_attn.q_proj", 64, 64), ("self_attn.v_proj", 32, 64), ("mlp.down_proj", 64, 160)]
        {
            let name = format!("{PREFIX}model.layers.{layer}.{name}");
            expected.push((format!("{name}.lora_A.weight"), "F32".to_owned(), vec![RANK, columns]));
            expected.push((format!("{name}.lora_B.weight"), "F32".to_owned(), vec![rows, RANK]));
        }
    }
    expected.sort();
    let found = adapters.iter().map(|(name, (dtype, shape, _))| (name.clone(), dtype.clone(), shape.clone()));
    let found: Vec<_> = found.collect();
    assert_eq!(found, expected);

    let checkpoints = tuning.lab.keys("run", "checkpoints/");
    let mut folders: Vec<&str> = checkpoints.iter().filter_map(|key| key.strip_suffix("/manifest.json")).collect();
    folders.sort_unstable();
    assert!(folders.len() >= 2, "{checkpoints:?}");
    let (mut stored, mut of_adapters) = (0, 0);
    for key in checkpoints.iter().filter(|key| key.starts_with(folders[1])) {
        let bytes = tuning.lab.read("run", key);
        stored += bytes.len();
        if !key.ends_with(".safetensors") {
            continue;
        }
        if key.ends_with("/adapter_model.safetensors") {
            of_adapters = bytes.len();
        }
        for name in tensors(&bytes).keys() {
            let own = ["exp_avg.", "exp_avg_sq."].iter().find_map(|role| name.strip_prefix(role)).unwrap_or(name);
            let own = own.split('[').next().expect("a name");
            assert!(adapters.contains_key(own), "{key} holds {name}");
        }
    }
    assert!(of_adapters > 0 && stored <= 3 * of_adapters + (1 << 20), "{stored} bytes for {of_adapters}");

    let folder = tuning.lab.newest_checkpoint("run");
    let config: Value =
        serde_json::from_slice(&tuning.lab.read("run", &format!("{folder}/adapter_config.json"))).expect("JSON");
    for (key, value) in [
        ("peft_type", json!("LORA")),
        ("task_type", json!("CAUSAL_LM")),
        ("base_model_name_or_path", json!(tuning.base.display().to_string())),
        ("r", json!(RANK)),
        ("lora_alpha", json!(8)),
        ("target_modules", json!(["q_proj", "v_proj", "down_proj"])),
        ("bias", json!("none")),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    let names: Vec<&String> = checkpoints.iter().filter(|key| key.starts_with(&folder)).collect();
    assert!(names.iter().any(|name| name.ends_with("/tokenizer.json")), "{names:?}");
    assert!(!names.iter().any(|name| name.contains("/model")), "{names:?}");
    // Old programs see that they must not read this run.
    let created: Value =
        serde_json::from_slice(&tuning.lab.read("run", "journal/00000000000000000000.json")).expect("JSON");
    assert_eq!(created["format"], 5);
    let base = &created["record"]["config"]["model"]["lora"]["base"];
    assert_eq!(base[0]["name"], "model.safetensors");
    assert_eq!(base[0]["bytes"], read(&tuning.base.join("model.safetensors")).len());
    for command in ["status", "checkpoints", "explain"] {
        tuning.lab.about(command, "run").finish().expect_code(0);
    }
    tuning.lab.about("prune", "run").args(&["--keep-last", "1"]).finish().expect_code(0);
    tuning.lab.expect_all_verify("run");
}

#[test]
fn another_base_is_refused_and_the_run_goes_on_beside_its_own() {
    let tuning = Tuning::new(&[]);
    let expected = tuning.undisturbed();
    let kill = format!("save.after-manifest=kill@step={}", 2 * EVERY);
    let first = tuning.run("run").faults(&kill).finish().expect_killed();
    let file = tuning.base.join("model.safetensors");
    let before = read(&file);
    let mut other = before.clone();
    *other.last_mut().expect("a byte") ^= 1;
    for changed in [&other[..], &before[..before.len() - 4]] {
        std::fs::write(&file, changed).expect("change the base");
        let said = ["model.safetensors", "is not the file that this run's adapters are trained beside"];
        tuning.lab.resume("run").finish().expect_code(78).expect_said(&said);
        tuning.lab.about("export", "run").args(&["--merge", "--out", "x"]).finish().expect_code(78).expect_said(&said);
    }
    std::fs::write(&file, before).expect("put the base back");
    let second = tuning.lab.resume("run").finish().expect_code(0);
    tuning.expect(&expected, "run", &[&first, &second]);
}

fn export(tuning: &Tuning, run: &str, name: &str, more: &[&str]) -> (PathBuf, Value) {
    let out = tuning.lab.path(name);
    let arguments = [&["--json", "--out", out.to_str().expect("UTF-8")], more].concat();
    let done = tuning.lab.about("export", run).args(&arguments).finish().expect_code(0);
    (out, serde_json::from_str(&done.stdout).unwrap_or_else(|error| panic!("{error}: {}", done.story())))
}

#[test]
fn merged_weights_are_w_plus_scaled_b_a_and_begin_a_new_run() {
    let tuning = Tuning::new(&[]);
    tuning.run("run").finish().expect_code(0);
    let (folder, plain) = export(&tuning, "run", "adapters", &[]);
    assert_eq!(tensors(&read(&folder.join("adapter_model.safetensors"))), tensors(&tuning.adapters("run")));
    assert!(folder.join("adapter_config.json").is_file() && !folder.join("model.safetensors").exists());
    assert_eq!(plain.get("max_logit_difference"), None);

    let init = format!("model.init_from=file://{}", folder.display());
    let set = ["--set", &init];
    let from_adapters = tuning.lab.run("adapters").args(&set).finish();
    from_adapters.expect_code(78).expect_said(&["holds adapters, and not a whole model", "--merge"]);
    let (merged, done) = export(&tuning, "run", "merged", &["--merge"]);
    let apart = done["max_logit_difference"].as_f64().expect("a number");
    assert!(apart < 1e-4, "{apart}");
    assert!(!merged.join("adapter_config.json").exists());
    let (base, adapters) = (of(&tuning.base), tensors(&tuning.adapters("run")));
    let now = of(&merged);
    assert_eq!(now.keys().collect::<Vec<_>>(), base.keys().collect::<Vec<_>>());
    let mut changed = 0;
    for (name, before) in &base {
        let layer = format!("{PREFIX}{}", name.trim_end_matches(".weight"));
        let Some(a) = adapters.get(&format!("{layer}.lora_A.weight")) else {
            assert!(now[name] == *before, "{name}");
            continue;
        };
        let b = floats(&adapters[&format!("{layer}.lora_B.weight")]);
        let (a, columns) = (floats(a), a.1[1]);
        let mut moved = 0.0_f32;
        for (at, (now, before)) in floats(&now[name]).into_iter().zip(floats(before)).enumerate() {
            let (row, column) = (at / columns, at % columns);
            let product: f32 = (0..RANK).map(|k| b[row * RANK + k] * a[k * columns + column]).sum();
            assert!((now - (before + SCALE * product)).abs() < 1e-6, "{name}[{at}]");
            moved = moved.max((now - before).abs());
        }
        assert!(moved > 1e-3, "{name} is as before");
        changed += 1;
    }
    assert_eq!(changed, 6);

    let (rounded, done) = export(&tuning, "run", "rounded", &["--merge", "--dtype", "bf16"]);
    assert!(done["max_logit_difference"].as_f64().expect("a number") > apart);
    assert!(of(&rounded).values().all(|(dtype, ..)| dtype == "BF16"));
    let description: Value = serde_json::from_slice(&read(&rounded.join("config.json"))).expect("JSON");
    assert_eq!(description["torch_dtype"], "bfloat16");

    // The merged model begins where the adapters ended: its first loss is that of the whole model.
    let few = ["--set", "train.steps=2", "--set", "train.schedule.warmup_steps=1"];
    let init = format!("model.init_from=file://{}", merged.display());
    let whole = tuning.lab.run("whole").args(&few).args(&["--set", &init]).finish().expect_code(0);
    let origin = format!("model.init_from=file://{}", tuning.base.display());
    let before = tuning.lab.run("before").args(&few).args(&["--set", &origin]).finish().expect_code(0);
    let first = |life: &Finished| losses(&[life])[&1].parse::<f64>().expect("a loss");
    assert!(first(&whole) < first(&before), "{} and {}", first(&whole), first(&before));

    let text = tuning.lab.about("generate", "run").args(&["--prompt", "the machine", "--tokens", "4"]);
    let text = text.args(&["--temperature", "0"]).finish().expect_code(0);
    assert!(text.stdout.contains("the machine"), "{}", text.story());
    let no_adapters = tuning.lab.about("export", ORIGIN).args(&["--merge", "--out", "y"]).finish();
    no_adapters.expect_code(64).expect_said(&["has no adapters to merge", "without --merge"]);
}

/// PEFT loads the adapter folder, and its own merge computes what ours does.
#[test]
fn peft_opens_a_checkpoint_and_merges_it_to_the_same_scores() {
    const REAL: (&str, &str) = ("real", include_str!("interop/real.txt"));
    if std::env::var_os("TRAINER_TESTS_ALL").is_none() {
        return;
    }
    let environments = [interop::VERSION_5, interop::TORCH, REAL].map(interop::environment);
    let [Some(transformers), Some(torch), Some(peft)] = environments else { return };
    let tuning = Tuning::new(&[r#"model.lora.targets="all-linear""#, "train.precision=bf16"]);
    tuning.run("run").finish().expect_code(0);
    let (merged, done) = export(&tuning, "run", "merged", &["--merge"]);
    let folder = tuning.lab.path("store").join("run").join(tuning.lab.newest_checkpoint("run"));
    let mut command = std::process::Command::new("python3");
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/real.py"));
    command.arg("adapter").args([&folder, &tuning.base, &merged]).arg("the machine counted every step");
    let modules = std::env::join_paths([&peft, &transformers, &torch]).expect("paths without colons");
    let libraries = format!("{0}/stubs:{0}/nvidia/cu13/lib", torch.display());
    command.env("PYTHONPATH", modules).env("LD_LIBRARY_PATH", libraries).env("CUDA_VISIBLE_DEVICES", "");
    let output = command.output().expect("start python3");
    let said = String::from_utf8_lossy(&output.stderr);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    let number = |key: &str| found[key].as_f64().expect("a number");
    assert!(number("learnt") > 0.01, "the adapters change something: {found}");
    assert!(number("peft") < 1e-4 && number("merged") < 1e-5, "{found}, {done}");
    assert_eq!(found["best"], true, "{found}");
}

fn of(folder: &Path) -> Tensors {
    tensors(&read(&folder.join("model.safetensors")))
}

#[test]
fn adapters_that_can_not_be_are_refused_before_the_run_exists() {
    let tuning = Tuning::new(&[]);
    for (setting, said) in [
        (r#"model.lora.targets=["lm_head"]"#, &["\"lm_head\"", "q_proj, k_proj"][..]),
        (r#"model.lora.targets=["q_proj", "q_proj"]"#, &["model.lora.targets"]),
        ("model.lora.targets=[]", &["model.lora.targets", "all-linear"]),
        ("model.lora.dropout=0.1", &["model.lora.dropout", "0.1"]),
        ("model.lora.alpha=0", &["model.lora.alpha"]),
        ("model.lora.rank=0", &["model.lora.rank is 0"]),
        ("model.init_from=\"\"", &["needs model.init_from"]),
    ] {
        tuning.run("refused").args(&["--set", setting]).finish().expect_code(78).expect_said(said);
        assert_eq!(tuning.lab.keys("refused", ""), Vec::<String>::new(), "{setting}");
    }
    tuning.run("run").args(&["--set", "train.steps=4"]).finish().expect_code(0);
    let resume = tuning.lab.resume("run").args(&["--set", "model.lora.rank=8"]).finish();
    resume.expect_code(78).expect_said(&["model.lora.rank", "belong to this model"]);
}

/// Two nodes of one worker each: the losses of two workers on one node.
#[test]
fn two_nodes_train_as_one_and_each_restores_from_its_own_slots() {
    let tuning = Tuning::new(&[]);
    let expected = tuning.undisturbed();
    let few = ["--nodes", "2:2", "--nproc-per-node", "1", "--set", "network.address=127.0.0.1"];
    together::create(tuning.run("nodes"));
    let hold = format!("worker.step=stop@rank=1@step={0}@hit={0}", 2 * EVERY + 2);
    let node = || tuning.lab.resume("nodes").args(&few).faults(&hold);
    let [one, two] = together::at_once([node(), node()]);
    let (leader, follower) = together::leader_and_follower(one, two);
    leader.wait_for_step("checkpoint", 2 * EVERY);
    kill_process(follower.held(), Signal::KILL).expect("kill a worker");
    let [leader, follower] = [leader, follower].map(|node| node.finish().expect_code(0));
    assert_eq!(leader.last("restored").step(), Some(2 * EVERY), "{}", leader.story());
    tuning.expect(&expected, "nodes", &[&leader, &follower]);
    tuning.lab.expect_all_verify("nodes");
}
