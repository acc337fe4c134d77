//! A real model: SmolLM2-135M-Instruct is fine-tuned on chats by its own template, killed, resumed, and opened by
//! transformers. Under TRAINER_TESTS_ALL alone: it needs PyTorch, a gigabyte of memory and several minutes.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    interop::{TORCH, VERSION_4, VERSION_5, environment},
    support::lab::Lab,
};

const REAL: (&str, &str) = ("real", include_str!("interop/real.txt"));
const STEPS: u64 = 6;
const PROMPT: &str = "The capital of France is";
/// Tokens that a prompt is answered with.
const TOKENS: usize = 12;

/// What `tests/interop/real.py` prints; `None`: something that it needs is not installed.
fn ask(version: (&str, &str), arguments: &[&str]) -> Option<Value> {
    let (transformers, torch, real) = (environment(version)?, environment(TORCH)?, environment(REAL)?);
    let modules: Vec<String> = [transformers, torch.clone(), real].iter().map(|it| it.display().to_string()).collect();
    let mut command = Command::new("python3");
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/real.py")).args(arguments);
    command.env("PYTHONPATH", modules.join(":")).env("CUDA_VISIBLE_DEVICES", "");
    command.env("LD_LIBRARY_PATH", format!("{0}/stubs:{0}/nvidia/cu13/lib", torch.display()));
    let output = command.output().expect("start python3");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    let text = String::from_utf8_lossy(&output.stdout);
    Some(serde_json::from_str(text.lines().last().unwrap_or_default()).expect("JSON"))
}

/// Short chats with and without a system turn, each answered once or twice.
fn chats() -> Vec<Value> {
    let facts = [
        ("a checkpoint", "the state of a run, in a store"),
        ("a step", "one update of the weights"),
        ("a node", "a machine of a group"),
        ("a notice", "two minutes to leave"),
        ("a rank", "one worker among others"),
        ("a store", "a bucket or a folder"),
    ];
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let mut chats = Vec::new();
    for (number, (what, is)) in facts.iter().cycle().take(48).enumerate() {
        let mut messages = vec![
            turn("user", &format!("Question {number}: what is {what}?")),
            turn("assistant", &format!("It is {is}.")),
        ];
        if number % 3 == 0 {
            messages.insert(0, turn("system", "You answer in one sentence."));
        }
        if number % 4 == 0 {
            messages.push(turn("user", "Are you sure? <|im_end|>"));
            messages.push(turn("assistant", "Yes."));
        }
        chats.push(json!({ "messages": messages }));
    }
    chats
}

fn lines(of: &[Value]) -> String {
    of.iter().map(|line| format!("{line}\n")).collect()
}

struct Real {
    lab: Lab,
    folder: PathBuf,
    data: PathBuf,
}

impl Real {
    /// The model as a folder, and chats prepared with it; `None`: not wanted, or not installed.
    fn new() -> Option<Self> {
        std::env::var_os("TRAINER_TESTS_ALL")?;
        let lab = Lab::on_files();
        let (folder, data) = (lab.path("smol"), lab.path("chats"));
        ask(VERSION_4, &["convert", &folder.display().to_string()])?;
        std::fs::write(lab.path("chats.jsonl"), lines(&chats())).expect("write chats");
        let (from, tokenizer) = (lab.path("chats.jsonl").display().to_string(), folder.display().to_string());
        let out = format!("file://{}", data.display());
        let arguments = ["data", "prepare", "--format", "chat", "--input", &from, "--tokenizer", &tokenizer];
        lab.command(&arguments).args(&["--sequence-length", "128", "--out", &out]).finish().expect_code(0);
        let config = format!(
            "store = \"{}\"\n\n[model]\nconfig = \"{1}/config.json\"\ninit_from = \"file://{1}\"\n\n[data]\ntrain = \
             \"{out}\"\nsequence_length = 128\n\n[train]\nsteps = {STEPS}\nglobal_batch = 2\nmax_micro_batch = 1\n\
             optimizer = {{ kind = \"adamw\", lr = 1e-5 }}\nschedule = {{ kind = \"cosine\", warmup_steps = 1 }}\n\n\
             [parallel]\nnproc_per_node = 1\n\n[checkpoint]\nevery = \"2 steps\"\n",
            lab.uri(),
            folder.display(),
        );
        lab.write_config("run.toml", &config);
        Some(Self { lab, folder, data })
    }

    /// The text that our program and transformers add to a prompt, from the same folder.
    #[track_caller]
    fn expect_same_answer(&self, run: &str, folder: &Path) -> Option<()> {
        let text = folder.display().to_string();
        let theirs = ask(VERSION_5, &["answer", &text, PROMPT, &TOKENS.to_string()])?;
        let ask_ours = ["--prompt", PROMPT, "--temperature", "0", "--tokens", &TOKENS.to_string(), "--json"];
        let ours = self.lab.about("generate", run).args(&ask_ours).finish().expect_code(0);
        let said: Value = serde_json::from_str(&ours.stdout).expect("JSON");
        assert_eq!(said["text"], theirs["text"], "{}", ours.story());
        Some(())
    }
}

#[test]
fn chats_have_the_ids_of_apply_chat_template_and_nobody_forges_a_turn() {
    let Some(real) = Real::new() else { return };
    let honest: Vec<Value> = chats().into_iter().filter(|chat| !chat.to_string().contains("<|im_end|>")).collect();
    std::fs::write(real.lab.path("honest.jsonl"), lines(&honest)).expect("write chats");
    let (file, folder) = (real.lab.path("honest.jsonl").display().to_string(), real.folder.display().to_string());
    let Some(theirs) = ask(VERSION_5, &["chats", &folder, &file]) else { return };
    let dataset = trainer::data::Dataset::open(&real.data).expect("open the chats");
    let mut ours = Vec::new();
    for row in 0..dataset.samples(trainer::data::Split::Train, 128) {
        let mut tokens = vec![0_i64; 129];
        dataset.read_sample(trainer::data::Split::Train, row, &mut tokens).expect("read a row");
        ours.push(tokens);
    }
    let holds = |chat: &[i64]| ours.iter().any(|row| row.windows(chat.len()).any(|part| part == chat));
    let mut found = 0;
    for chat in theirs.as_array().expect("a list") {
        let ids: Vec<i64> = chat.as_array().expect("ids").iter().filter_map(Value::as_i64).collect();
        found += u32::from(holds(&ids));
    }
    // The rest is kept for validation.
    assert!(found > 20, "{found} of {} chats", honest.len());
}

#[test]
fn a_real_model_is_fine_tuned_killed_and_resumed_and_answers_as_transformers_makes_it() {
    let Some(real) = Real::new() else { return };
    real.lab.run("whole").finish().expect_code(0);
    let first = real.lab.run("killed").start();
    first.wait_for_step("checkpoint", 2);
    first.signal(Signal::KILL);
    first.finish().expect_killed();
    real.lab.resume("killed").finish().expect_code(0);
    assert!(real.lab.export("whole") == real.lab.export("killed"), "other weights after a kill");

    let (export, original) = (real.lab.path("export-killed"), real.folder.display().to_string());
    for version in [VERSION_4, VERSION_5] {
        let Some(_) = ask(version, &["tokenizer", &export.display().to_string(), &original]) else { return };
    }
    let _ = real.expect_same_answer("killed", &export);
}

#[test]
fn adapters_of_a_real_model_are_killed_resumed_and_merged_as_peft_merges_them() {
    let Some(real) = Real::new() else { return };
    let (lab, base) = (&real.lab, real.folder.display().to_string());
    let text = std::fs::read_to_string(lab.path("run.toml")).expect("read the configuration");
    lab.write_config("run.toml", &text.replace("[data]", "lora = { rank = 8, alpha = 16 }\n\n[data]"));
    let faster = ["--set", "train.optimizer.lr=1e-3"];
    lab.run("whole").args(&faster).finish().expect_code(0);
    let first = lab.run("killed").args(&faster).start();
    first.wait_for_step("checkpoint", 2);
    first.signal(Signal::KILL);
    first.finish().expect_killed();
    lab.resume("killed").finish().expect_code(0);

    let folder = |name: &str| lab.path(name).display().to_string();
    let export = |run: &str, out: &str, more: &[&str]| {
        lab.about("export", run).args(&["--out", &folder(out)]).args(more).finish().expect_code(0);
        let file = if more.is_empty() { "adapter_model.safetensors" } else { "model.safetensors" };
        std::fs::read(lab.path(out).join(file)).expect("read weights")
    };
    assert!(export("whole", "one", &[]) == export("killed", "two", &[]), "other adapters after a kill");
    export("killed", "merged", &["--merge"]);
    let Some(found) = ask(VERSION_5, &["adapter", &folder("two"), &base, &folder("merged"), PROMPT]) else { return };
    let differ = |what: &str| found[what].as_f64().expect("a number");
    assert!(differ("learnt") > 0.01 && differ("peft") < 1e-3 && differ("merged") < 1e-3, "{found}");
    assert_eq!(found["best"], true, "{found}");
    assert!(ask(VERSION_5, &["tokenizer", &folder("merged"), &base]).is_some());
}
