//! `data prepare` with a model's folder: chats and packed rows, begin tokens, the files that travel, and a run on them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use rustix::process::Signal;
use serde_json::{Value, json};
use trainer::data::{Dataset, Marks, Split};

use crate::{
    interop,
    support::{
        lab::{EVERY, Lab, data_set},
        trainer::{Finished, losses, read},
    },
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat").join(name)
}

/// The folder of a chat model: the fixtures' tokenizer with one of their templates, and a file of its chats, a line
/// each.
struct Model {
    lab: Lab,
}

impl Model {
    fn new(template: &str) -> Self {
        let lab = Lab::on_files_at_once();
        let corpus: Value = serde_json::from_slice(&read(&fixture("chats.json"))).expect("JSON");
        std::fs::create_dir(lab.path("model")).expect("a folder");
        std::fs::copy(fixture("tokenizer.json"), lab.path("model/tokenizer.json")).expect("copy");
        let source = fixture(&format!("templates/{template}.jinja"));
        std::fs::copy(source, lab.path("model/chat_template.jinja")).expect("copy");
        let model = Self { lab };
        model.write("model/tokenizer_config.json", corpus["templates"][template].to_string());
        model.write("model/config.json", "{}");
        model.write("model/generation_config.json", "{\"temperature\": 0.25}");
        let chats = corpus["chats"].as_object().expect("chats").iter().filter(|(name, _)| *name != "calls");
        model.write("chats.jsonl", chats.map(|(_, chat)| format!("{chat}\n")).collect::<String>());
        model
    }

    fn write(&self, name: &str, body: impl AsRef<[u8]>) {
        std::fs::write(self.lab.path(name), body).expect("write a file");
    }

    /// Prepares `input` into `out`, nothing of it for validation.
    fn prepare(&self, input: &str, out: &str, more: &[&str]) -> Finished {
        let [input, model] = [input, "model"].map(|name| self.lab.path(name).display().to_string());
        let out = format!("file://{}", self.lab.path(out).display());
        let arguments = ["data", "prepare", "--input", &input, "--tokenizer", &model, "--out", &out];
        self.lab.command(&arguments).args(&["--validation-ratio", "0"]).args(more).finish()
    }

    fn index(&self, out: &str) -> Value {
        serde_json::from_slice(&read(&self.lab.path(out).join("index.json"))).expect("JSON")
    }
}

fn json_of(done: &Finished) -> Value {
    serde_json::from_str(&done.stdout).expect("a summary")
}

const CHAT: [&str; 4] = ["--format", "chat", "--sequence-length", "120"];

/// The documents of a packed dataset: ids, each with whether it is a target; the filler aside.
fn documents(dir: &Path, length: u32, eos: i64) -> Vec<Vec<(i64, bool)>> {
    let data = Dataset::open(dir).expect("a dataset");
    let mut found = Vec::new();
    for row in 0..data.samples(Split::Train, length) {
        let (mut marks, mut tokens) = (Marks::default(), vec![0; length as usize + 1]);
        data.read_marks(Split::Train, row, length, &mut marks).expect("marks");
        data.read_sample(Split::Train, row, &mut tokens).expect("tokens");
        let targets = std::iter::once(false).chain(marks.targets.iter().copied());
        let row: Vec<(i64, bool)> = tokens.into_iter().zip(targets).collect();
        let ends = marks.starts.iter().skip(1).map(|&start| start as usize).chain([row.len()]);
        for (&start, end) in marks.starts.iter().zip(ends) {
            let document = &row[start as usize..end];
            if document.iter().any(|token| token.0 != eos) {
                found.push(document.to_vec());
            }
        }
    }
    found.sort();
    found
}

#[test]
fn chats_become_rows_of_whole_chats_and_their_folder_travels() {
    let model = Model::new("chatml");
    let done = model.prepare("chats.jsonl", "out", &[&CHAT[..], &["--json"]].concat()).expect_code(0);
    let summary = json_of(&done);
    let counts = ["documents", "too_long", "without_target"].map(|count| summary[count].as_u64());
    assert_eq!(counts, [Some(4), Some(0), Some(0)]);
    let index = model.index("out");
    assert_eq!((&index["format"], &index["eos_id"]), (&json!(2), &json!(7)), "the folder's end token");
    let documents_said = &index["documents"];
    assert_eq!((&documents_said["packed"], &documents_said["chat"]["end_ids"]), (&json!(120), &json!([7])));
    assert_eq!(documents_said["chat"]["template_sha256"].as_str().map(str::len), Some(64));
    for file in documents_said["files"].as_array().expect("files") {
        let name = file["file"].as_str().expect("a name");
        assert_eq!(read(&model.lab.path("out").join(name)), read(&model.lab.path("model").join(name)), "{name}");
    }
    let expected: Value = serde_json::from_slice(&read(&fixture("expected.json"))).expect("JSON");
    let mut ids: Vec<Vec<i64>> = ["one", "turns", "thoughts", "system"]
        .iter()
        .map(|chat| serde_json::from_value(expected["chatml"][chat].clone()).expect("ids"))
        .collect();
    ids.sort();
    let found = documents(&model.lab.path("out"), 120, 7);
    let found_ids: Vec<Vec<i64>> = found.iter().map(|chat| chat.iter().map(|token| token.0).collect()).collect();
    assert_eq!(found_ids, ids);
    for chat in &found {
        let last = chat.iter().rposition(|token| token.1).expect("a target");
        assert_eq!(chat[last].0, 7, "the turn's end is a target");
        assert!(!chat[..3].iter().any(|token| token.1), "a header is none");
    }
    let again = model.prepare("chats.jsonl", "out", &[&CHAT[..], &["--json"]].concat()).expect_code(0);
    assert_eq!(json_of(&again)["reused"], true);
    model.prepare("chats.jsonl", "out", &[&CHAT[..], &["--too-long", "drop"]].concat()).expect_code(78);
    let copy = model.prepare("chats.jsonl", "copy", &[&CHAT[..], &["--threads", "1"]].concat());
    copy.expect_code(0);
    for name in ["index.json", "train-00000.bin", "train-00000.marks"] {
        assert_eq!(read(&model.lab.path("out").join(name)), read(&model.lab.path("copy").join(name)), "{name}");
    }
    // Another template is another dataset.
    std::fs::copy(fixture("templates/thinking.jinja"), model.lab.path("model/chat_template.jinja")).expect("copy");
    model.prepare("chats.jsonl", "out", &CHAT).expect_code(78).expect_said(&["--overwrite"]);
}

#[test]
fn chats_that_can_not_be_used_are_counted_and_named() {
    let model = Model::new("inst");
    model.write(
        "bad.jsonl",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n\
         {\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n\n\
         {\"messages\": [{\"role\": \"user\", \"content\": \"LONG\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n"
            .replace("LONG", &"long ".repeat(200)),
    );
    let all = [&CHAT[..], &["--without-target", "drop"]].concat();
    let said = ["1 document longer than a row of 121 tokens", "bad.jsonl:4", "--too-long drop", "--sequence-length"];
    model.prepare("bad.jsonl", "out", &all).expect_code(78).expect_said(&said);
    let said = ["1 chat without a turn of the assistant", "bad.jsonl:2", "--without-target drop"];
    let drop_long = [&CHAT[..], &["--too-long", "drop"]].concat();
    model.prepare("bad.jsonl", "out", &drop_long).expect_code(78).expect_said(&said);
    assert!(!model.lab.path("out/index.json").exists());
    let both = [&all[..], &["--too-long", "drop", "--json"]].concat();
    let summary = json_of(&model.prepare("bad.jsonl", "out", &both).expect_code(0));
    assert_eq!((&summary["too_long"], &summary["without_target"]), (&json!(1), &json!(1)));
    assert_eq!(model.index("out")["documents"]["dropped"], json!({"too_long": 1, "without_target": 1}));
    assert_eq!(documents(&model.lab.path("out"), 120, 1).len(), 1);

    model.write("roles.jsonl", "\n{\"messages\": [{\"role\": \"tool\", \"content\": \"a\"}]}\n");
    let said = ["roles.jsonl:2", "the chat template refuses it: Turns must alternate"];
    model.prepare("roles.jsonl", "roles", &CHAT).expect_code(78).expect_said(&said);
    model.write("text.txt", "no chat");
    model.prepare("text.txt", "text", &CHAT).expect_code(78).expect_said(&["holds no JSON records"]);
    model.prepare("bad.jsonl", "text", &[]).expect_code(78).expect_said(&["--format chat"]);
    for (options, said) in [
        (&["--format", "chat"][..], "--sequence-length: is missing"),
        (&["--sequence-length", "9"], "of no use without --pack"),
        (&["--date", "2026-01-31"], "needs --format chat"),
        (&["--pack", "--sequence-length", "9", "--documents", "apart"], "leave it out"),
        (&["--without-target", "drop"], "needs --format chat"),
        (&["--too-long", "drop"], "needs --pack"),
    ] {
        model.prepare("bad.jsonl", "text", options).expect_code(78).expect_said(&[said]);
    }
    std::fs::remove_file(model.lab.path("model/chat_template.jinja")).expect("remove");
    model.prepare("bad.jsonl", "text", &CHAT).expect_code(78).expect_said(&["has no chat template"]);
}

#[test]
fn a_template_that_asks_for_the_date_needs_one() {
    let model = Model::new("header");
    let said = ["--date: is missing", "--date 2026-01-31"];
    let long = ["--format", "chat", "--sequence-length", "400"];
    model.prepare("chats.jsonl", "out", &long).expect_code(78).expect_said(&said);
    model.prepare("chats.jsonl", "out", &[&long[..], &["--date", "2026-03-05"]].concat()).expect_code(0);
    assert_eq!(model.index("out")["documents"]["chat"]["date"], "2026-03-05");
    model.prepare("chats.jsonl", "out", &[&long[..], &["--date", "2026-03-06"]].concat()).expect_code(78);
}

#[test]
fn texts_get_the_tokenizers_begin_token_once() {
    let model = Model::new("inst");
    model.write("texts.jsonl", "{\"text\": \"the machine\"}\n{\"text\": \"every step\"}\n");
    for (name, options) in
        [("joined", &[][..]), ("apart", &["--documents", "apart"]), ("rows", &["--pack", "--sequence-length", "20"])]
    {
        model.prepare("texts.jsonl", name, options).expect_code(0);
        let index = model.index(name);
        let said = &index["documents"];
        assert_eq!((&index["format"], &said["bos_id"], &index["eos_id"]), (&json!(2), &json!(0), &json!(1)), "{name}");
        let ids: Vec<u16> = read(&model.lab.path(name).join("train-00000.bin"))
            .chunks(2)
            .map(|id| u16::from_le_bytes([id[0], id[1]]))
            .collect();
        let (ends, begins) = (ids.iter().filter(|id| **id == 1).count(), ids.iter().filter(|id| **id == 0).count());
        assert_eq!((ids[0], begins), (0, 2), "{name}: {ids:?}");
        let marks = index["train"][0].get("marks");
        match name {
            "joined" => assert!(marks.is_none() && ends == 2),
            "apart" => assert_eq!((&marks.expect("marks")["documents"], ends), (&json!(2), 2)),
            _ => assert_eq!(documents(&model.lab.path(name), 20, 1).len(), 2),
        }
    }
    let data = Dataset::open(model.lab.path("apart")).expect("a dataset");
    let all = data.index().tokens(Split::Train) as u32 - 1;
    let mut marks = Marks::default();
    data.read_marks(Split::Train, 0, all, &mut marks).expect("marks");
    let second = marks.starts[1] as usize;
    assert!(marks.starts.len() == 2 && !marks.targets[second - 1], "not across the start of a document");
    assert_eq!(marks.targets.iter().filter(|target| **target).count(), all as usize - 1);
    // A bare file without such a rule stays as it was.
    let index: Value = serde_json::from_slice(&read(&data_set().join("index.json"))).expect("JSON");
    assert!(index["format"] == 1 && index.get("documents").is_none() && index["train"][0].get("marks").is_none());
}

#[test]
fn a_run_takes_the_datas_files_along_and_no_other_sequence_length() {
    let model = Model::new("chatml");
    let chats = String::from_utf8(read(&model.lab.path("chats.jsonl"))).expect("text");
    model.write("chats.jsonl", (0..40).map(|number| chats.replace('?', &format!(" {number}?"))).collect::<String>());
    let ratio = [&CHAT[..], &["--validation-ratio", "0.3"]].concat();
    let lab = &model.lab;
    let uri = format!("file://{}", lab.path("out").display());
    let input = lab.path("chats.jsonl").display().to_string();
    let folder = lab.path("model").display().to_string();
    let arguments = ["data", "prepare", "--input", &input, "--tokenizer", &folder, "--out", &uri];
    lab.command(&arguments).args(&ratio).finish().expect_code(0);
    lab.write_config("run.toml", &lab.config("").replace(&format!("file://{}", data_set().display()), &uri));
    let few = ["--set", "train.steps=2", "--set", "train.schedule.warmup_steps=1"];
    let said = ["packed for sequences of 120 tokens", "data.sequence_length is 32", "set data.sequence_length to 120"];
    lab.run("run").args(&few).finish().expect_code(78).expect_said(&said);
    lab.run("run").args(&few).args(&["--set", "data.sequence_length=120"]).finish().expect_code(0);
    lab.export("run");
    let export = lab.path("export-run");
    for name in ["chat_template.jinja", "tokenizer_config.json", "tokenizer.json"] {
        assert_eq!(read(&export.join(name)), read(&lab.path("model").join(name)), "{name}");
    }
    let generation: Value = serde_json::from_slice(&read(&export.join("generation_config.json"))).expect("JSON");
    assert_eq!((&generation["temperature"], &generation["eos_token_id"]), (&json!(0.25), &json!(7)));

    // Marks that changed are noticed before the run trains on them.
    let marks = lab.path("out/train-00000.marks");
    let good = read(&marks);
    let damages: BTreeMap<&str, Vec<u8>> = BTreeMap::from([
        ("has CRC64", good.iter().enumerate().map(|(at, byte)| if at == 9 { byte ^ 2 } else { *byte }).collect()),
        ("its index says", good[1..].to_vec()),
    ]);
    for (said, bytes) in damages {
        std::fs::write(&marks, bytes).expect("damage");
        let life = lab.run("damaged").args(&few).args(&["--set", "data.sequence_length=120"]).finish();
        assert_ne!(life.code(), Some(0));
        life.expect_said(&["train-00000.marks", said]);
    }
}

#[test]
fn a_run_over_chats_is_killed_and_resumed_to_the_last_digit_on_ranks_with_unequal_targets() {
    let model = Model::new("chatml");
    let chats = String::from_utf8(read(&model.lab.path("chats.jsonl"))).expect("text");
    model.write("chats.jsonl", (0..40).map(|number| chats.replace('?', &format!(" {number}?"))).collect::<String>());
    let lab = &model.lab;
    model.prepare("chats.jsonl", "out", &CHAT).expect_code(0);
    let uri = format!("file://{}", lab.path("out").display());
    let text = lab.config("").replace(&format!("file://{}", data_set().display()), &uri);
    lab.write_config("run.toml", &text.replace("sequence_length = 32", "sequence_length = 120"));
    for strategy in ["ddp", "zero1"] {
        let (whole, killed) = (format!("{strategy}-whole"), format!("{strategy}-killed"));
        let set = format!("parallel.strategy={strategy}");
        let undisturbed = lab.run(&whole).args(&["--set", &set]).finish().expect_code(0);
        let first = lab.run(&killed).args(&["--set", &set]).hold_after(EVERY + 1).start();
        first.wait_for_step("checkpoint", EVERY);
        first.signal(Signal::KILL);
        let first = first.finish().expect_killed();
        let second = lab.resume(&killed).finish().expect_code(0);
        assert!(second.resumed_from() >= EVERY, "{}", second.story());
        assert_eq!(losses(&[&first, &second]), losses(&[&undisturbed]), "{strategy}");
        assert!(lab.export(&whole) == lab.export(&killed), "{strategy}: other weights after a kill");
    }
}

#[test]
fn chats_in_parquet_give_the_rows_that_json_lines_give() {
    let model = Model::new("tools");
    let names = ["one", "turns", "thoughts", "calls", "system"];
    // No column holds a list of values of several types.
    let lines = names.map(|name| as_written(name).replace(", \"a\": [true, null, {}]", "") + "\n");
    model.write("lines.jsonl", lines.concat());
    std::fs::copy(fixture("chats.parquet"), model.lab.path("chats.parquet")).expect("copy");
    let long = ["--format", "chat", "--sequence-length", "600", "--json"];
    let of_lines = json_of(&model.prepare("lines.jsonl", "lines", &long).expect_code(0));
    let of_columns = json_of(&model.prepare("chats.parquet", "columns", &long).expect_code(0));
    for count in ["documents", "train_tokens", "targets"] {
        assert_eq!(of_lines[count], of_columns[count], "{count}");
    }
    let [lines, columns] = ["lines", "columns"].map(|name| documents(&model.lab.path(name), 600, 7));
    assert_eq!(lines.len(), 5);
    assert_eq!(lines, columns);
    model.prepare("chats.parquet", "text", &[]).expect_code(78).expect_said(&["--format chat"]);
}

/// A chat of the fixtures on one line, its keys in the order in which they are written: templates print tools.
fn as_written(name: &str) -> String {
    let text = String::from_utf8(read(&fixture("chats.json"))).expect("text");
    let key = format!("\"{name}\": {{");
    let start = text.find(&key).expect("a chat") + key.len() - 1;
    let mut depth = 0;
    // Brackets within texts come in pairs there.
    let end = text[start..].find(|letter| {
        depth += i32::from(letter == '{') - i32::from(letter == '}');
        depth == 0
    });
    text[start..=start + end.expect("its end")].replace('\n', " ")
}

/// A folder with a template for chats with tools: both are used, both travel, and both versions of transformers find
/// them in the dataset and in the checkpoint.
#[test]
fn several_templates_are_chosen_as_transformers_does_and_travel() {
    let model = Model::new("chatml");
    let lab = &model.lab;
    // Transformers 4 opens no folder of an unknown model.
    model.write("model/config.json", "{\"model_type\": \"llama\"}");
    let settings = json!({"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"});
    model.write("model/tokenizer_config.json", settings.to_string());
    std::fs::create_dir(lab.path("model/additional_chat_templates")).expect("a folder");
    let (tools, rag) = (fixture("templates/tools.jinja"), "model/additional_chat_templates/rag.jinja");
    std::fs::copy(&tools, lab.path("model/additional_chat_templates/tool_use.jinja")).expect("copy");
    model.write(rag, "{% for m in messages %}rag {{ m.content }}<|im_end|>\n{% endfor %}");
    let chats = ["one", "calls"].map(as_written);
    let lines = |count: usize| chats.iter().map(|chat| format!("{chat}\n")).collect::<String>().repeat(count);
    model.write("both.jsonl", lines(1));
    let long = ["--format", "chat", "--sequence-length", "600"];
    model.prepare("both.jsonl", "out", &long).expect_code(0);
    let ids = |out: &str| -> Vec<Vec<i64>> {
        let found = documents(&lab.path(out), 600, 7);
        found.iter().map(|chat| chat.iter().map(|token| token.0).collect()).collect()
    };
    let expected: Value = serde_json::from_slice(&read(&fixture("expected.json"))).expect("JSON");
    let of = |template: &str, chat: &str| -> Vec<i64> {
        serde_json::from_value(expected[template][chat].clone()).expect("ids")
    };
    let sorted = |mut all: Vec<Vec<i64>>| {
        all.sort();
        all
    };
    // Neither alone gives both.
    assert_eq!(ids("out"), sorted(vec![of("chatml", "one"), of("tools", "calls")]));
    let rendering = &model.index("out")["documents"]["chat"];
    assert_ne!(rendering["template_sha256"], rendering["tools_template_sha256"]);
    let named =
        |name: &str, out: &str| model.prepare("both.jsonl", out, &[&long[..], &["--chat-template", name]].concat());
    named("tool_use", "named").expect_code(0);
    assert_eq!(ids("named"), sorted(vec![of("tools", "one"), of("tools", "calls")]));
    assert_eq!(model.index("named")["documents"]["chat"].get("tools_template_sha256"), None);
    named("tool_use", "out").expect_code(78).expect_said(&["--overwrite"]);
    named("nope", "nope")
        .expect_code(78)
        .expect_said(&["no chat template \"nope\"", "\"default\", \"rag\", \"tool_use\""]);
    model.prepare("both.jsonl", "x", &["--chat-template", "rag"]).expect_code(78).expect_said(&["needs --format chat"]);

    let settings: Value = serde_json::from_slice(&read(&lab.path("out/tokenizer_config.json"))).expect("JSON");
    let list = settings["chat_template"].as_array().expect("a list");
    let names: Vec<&Value> = list.iter().map(|one| &one["name"]).collect();
    assert_eq!(names, ["default", "rag", "tool_use"]);
    assert!(!lab.path("out/chat_template.jinja").exists());

    // Enough for a run of two steps, whose checkpoint has them, too.
    model.write("many.jsonl", lines(20));
    model.prepare("many.jsonl", "many", &long).expect_code(0);
    let uri = format!("file://{}", lab.path("many").display());
    let text = lab.config("").replace(&format!("file://{}", data_set().display()), &uri);
    let longer = String::from_utf8(read(&lab.path("model.json"))).expect("text").replace(":128,", ":1024,");
    model.write("model.json", longer);
    lab.write_config("run.toml", &text.replace("sequence_length = 32", "sequence_length = 600"));
    let few = ["--set", "train.steps=1", "--set", "train.schedule.warmup_steps=0"];
    lab.run("run").args(&few).finish().expect_code(0);
    lab.export("run");
    let list = format!("[{}]", chats.join(","));
    for version in [interop::VERSION_4, interop::VERSION_5] {
        let folders = ["model", "out", "export-run"].map(|name| lab.path(name));
        let Some(found) = interop::folders(version, "the machine", &list, &folders) else { continue };
        assert_eq!(found[0], found[1], "{}", version.0);
        assert_eq!(found[0], found[2], "{}", version.0);
        assert_eq!(found[0]["templates"], json!(["default", "rag", "tool_use"]));
        assert_eq!(found[0]["chats"][0], json!(of("chatml", "one")), "{}", version.0);
        // Version 4 prints fields without a value.
        if version == interop::VERSION_5 {
            assert_eq!(found[0]["chats"][1], json!(of("tools", "calls")));
        }
    }
}
