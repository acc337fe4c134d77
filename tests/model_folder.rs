//! Starting from a model folder: its tokenizer, its tensors, its description, and the files that travel from it into
//! checkpoints and exports.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use crate::support::{
    lab::{Lab, ORIGIN, data_set},
    trainer::{Finished, read},
};

/// A model folder from an export, as another program might leave it, and a lab that can start from it.
struct Folder {
    lab: Lab,
    path: PathBuf,
}

impl Folder {
    fn new() -> Self {
        let lab = Lab::on_interrupted_run();
        lab.export(ORIGIN);
        let path = lab.path(&format!("export-{ORIGIN}"));
        Self { lab, path }
    }
    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path.join(name), bytes).expect("write a file of the folder");
    }
    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&read(&self.path.join(name))).expect(name)
    }
    fn change(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let mut value = self.json(name);
        change(&mut value);
        self.write(name, value.to_string());
    }
    /// A short run that starts from the folder.
    fn run(&self, run: &str, settings: &[&str]) -> Finished {
        let init = format!("model.init_from=file://{}", self.path.display());
        let few = ["train.steps=4", "train.schedule.warmup_steps=1", "checkpoint.every=2 steps"];
        let settings = [&few[..], &[&init], settings].concat();
        let settings: Vec<&str> = settings.into_iter().flat_map(|setting| ["--set", setting]).collect();
        self.lab.run(run).args(&settings).finish()
    }
    /// Demands that a run is refused with 78 before it exists, and that the message contains all of these words.
    #[track_caller]
    fn expect_refused(&self, run: &str, settings: &[&str], parts: &[&str]) {
        self.run(run, settings).expect_code(78).expect_said(parts);
        assert_eq!(self.lab.keys(run, ""), Vec::<String>::new(), "a run that was refused");
    }
    /// Rewrites `model.safetensors`: tensors by name, with their type, shape and bytes.
    fn rewrite(&self, change: impl FnOnce(&mut Tensors)) {
        let mut tensors = tensors(&self.path.join("model.safetensors"));
        change(&mut tensors);
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, (dtype, shape, bytes)) in tensors {
            let begin = data.len();
            data.extend(bytes);
            header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]}));
        }
        let header = Value::Object(header).to_string();
        self.write("model.safetensors", [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat());
    }
    /// A file of the newest checkpoint of a run.
    fn of_checkpoint(&self, run: &str, name: &str) -> Vec<u8> {
        self.lab.read(run, &format!("{}/{name}", self.lab.newest_checkpoint(run)))
    }
}

type Tensors = BTreeMap<String, (String, Vec<u64>, Vec<u8>)>;

fn tensors(path: &Path) -> Tensors {
    let bytes = read(path);
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let header: BTreeMap<String, Value> = serde_json::from_slice(&bytes[8..start]).expect("a header");
    let tensor = |entry: &Value| {
        let at = |i: usize| start + entry["data_offsets"][i].as_u64().expect("an offset") as usize;
        let shape = serde_json::from_value(entry["shape"].clone()).expect("a shape");
        (entry["dtype"].as_str().expect("a type").to_owned(), shape, bytes[at(0)..at(1)].to_vec())
    };
    header
        .iter()
        .filter(|(name, _)| *name != "__metadata__")
        .map(|(name, entry)| (name.clone(), tensor(entry)))
        .collect()
}

#[test]
fn a_folder_with_another_tokenizer_is_refused_unless_the_configuration_says_so() {
    let folder = Folder::new();
    // Another spelling of the same tokenizer.
    folder.change("tokenizer.json", |json| json["added_tokens"][0]["rstrip"] = false.into());
    folder.run("same", &[]).expect_code(0);

    folder.change("tokenizer.json", |json| {
        let vocabulary = json["model"]["vocab"].as_object_mut().expect("a vocabulary");
        let (a, b) = (vocabulary["a"].clone(), vocabulary["b"].clone());
        vocabulary.insert("a".into(), b);
        vocabulary.insert("b".into(), a);
    });
    folder.expect_refused("swapped", &[], &["tokenizer", "\"a\" here and \"b\" there", "data.tokenizer = \"differs\""]);
    std::fs::write(folder.path.join("chat_template.jinja"), "of another vocabulary").expect("write a template");
    folder.run("differs", &["data.tokenizer=differs"]).expect_code(0);
    assert_eq!(folder.of_checkpoint("differs", "tokenizer.json"), read(&data_set().join("tokenizer.json")));
    let names = folder.lab.keys("differs", "checkpoints/");
    assert!(!names.iter().any(|name| name.ends_with("chat_template.jinja")), "{names:?}");

    std::fs::remove_file(folder.path.join("tokenizer.json")).expect("remove the tokenizer");
    folder.expect_refused("none", &[], &["has no tokenizer.json", "data.tokenizer = \"differs\""]);
}

#[test]
fn a_superfluous_or_missing_tensor_is_named_before_the_run_exists() {
    let folder = Folder::new();
    let buffer = ("F64".to_owned(), vec![2], vec![0; 16]);
    folder.rewrite(|tensors| {
        tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), buffer.clone());
    });
    folder.run("buffer", &[]).expect_code(0);

    let extra = "model.layers.0.self_attn.q_norm.weight";
    folder.rewrite(|tensors| {
        tensors.insert(extra.into(), ("U8".into(), vec![16], vec![0; 16]));
    });
    folder.expect_refused("extra", &[], &[extra, "model.safetensors"]);

    folder.rewrite(|tensors| {
        tensors.remove(extra);
        tensors.remove("lm_head.weight");
    });
    folder.expect_refused("headless", &[], &["lm_head.weight", "model.safetensors", "\"tie_word_embeddings\": true"]);
    let mut description: Value = serde_json::from_slice(&read(&folder.lab.path("model.json"))).expect("a description");
    description["tie_word_embeddings"] = true.into();
    std::fs::write(folder.lab.path("tied.json"), description.to_string()).expect("write a description");
    let tied = format!("model.config={}", folder.lab.path("tied.json").display());
    folder.run("tied", &[&tied]).expect_code(0);
    folder.rewrite(|tensors| {
        let embedding = tensors["model.embed_tokens.weight"].clone();
        tensors.insert("lm_head.weight".into(), embedding);
    });
    folder.run("twins", &[&tied]).expect_code(0);
    folder.rewrite(|tensors| tensors.get_mut("lm_head.weight").expect("a head").2[5] ^= 1);
    folder.expect_refused("unlike", &[&tied], &["lm_head.weight", "\"tie_word_embeddings\": false"]);
}

#[test]
fn a_key_that_may_change_the_model_is_refused_only_for_a_new_run() {
    let folder = Folder::new();
    let lab = &folder.lab;
    folder.change("config.json", |config| config["partial_rotary_factor"] = 0.5.into());
    folder.expect_refused("partial", &["model.config=\"\""], &["partial_rotary_factor"]);

    // An earlier version created it like this.
    lab.damage(ORIGIN, "journal/00000000000000000000.json", |record| {
        let mut json: Value = serde_json::from_slice(record).expect("a record");
        json["record"]["config"]["model"]["config"]["a_key_of_old"] = 1.into();
        *record = json.to_string().into_bytes();
    });
    let life = lab.resume(ORIGIN).finish().expect_code(0);
    // The next export has the same target.
    std::fs::remove_dir_all(&folder.path).expect("remove the folder");
    lab.expect_as_undisturbed(ORIGIN, &[&crate::support::lab::interrupted().life, &life]);
}

#[test]
fn the_tokenizers_files_travel_into_checkpoints_and_exports_and_outlive_their_folder() {
    let folder = Folder::new();
    let end = "<|endoftext|>";
    let verbatim: [(&str, Vec<u8>); 4] = [
        ("chat_template.jinja", b"{{ messages }}".to_vec()),
        ("tokenizer.model", vec![0, 255, 10]),
        ("added_tokens.json", b"{ }".to_vec()),
        ("tokenizer_config.json", format!("{{ \"eos_token\": \"{end}\", \"chat_template\": \"x\"}}").into_bytes()),
    ];
    for (name, bytes) in &verbatim {
        folder.write(name, bytes);
    }
    folder.write("generation_config.json", r#"{"eos_token_id": 7, "top_p": 0.9}"#);
    folder.write("special_tokens_map.json", r#"{"eos_token": "<|turn|>"}"#);
    let life = folder.run("run", &[]).expect_code(0);
    let warnings: Vec<String> = life.of_kind("warning").iter().map(|event| event.line.clone()).collect();
    for file in ["generation_config.json has 7", "special_tokens_map.json has \\\"<|turn|>\\\""] {
        assert!(warnings.iter().any(|warning| warning.contains(file)), "{file}\n{}", life.story());
    }
    assert_eq!(warnings.len(), 2, "{}", life.story());

    let check = |of: &dyn Fn(&str) -> Vec<u8>| {
        for (name, bytes) in &verbatim {
            assert_eq!(&of(name), bytes, "{name}");
        }
        let json = |name: &str| -> Value { serde_json::from_slice(&of(name)).expect(name) };
        assert_eq!(json("generation_config.json"), json!({"eos_token_id": 0, "top_p": 0.9}));
        assert_eq!(json("special_tokens_map.json"), json!({"eos_token": end}));
        assert_eq!(json("config.json")["eos_token_id"], 0);
        assert_eq!(of("tokenizer.json"), read(&data_set().join("tokenizer.json")));
    };
    check(&|name| folder.of_checkpoint("run", name));
    std::fs::remove_dir_all(&folder.path).expect("remove the folder");
    let first = folder.lab.newest_checkpoint("run");
    folder.lab.resume("run").args(&["--set", "train.steps=6"]).finish().expect_code(0);
    assert_ne!(folder.lab.newest_checkpoint("run"), first, "a checkpoint of the second life");
    check(&|name| folder.of_checkpoint("run", name));
    folder.lab.export("run");
    check(&|name| read(&folder.lab.path("export-run").join(name)));
    folder.lab.expect_all_verify("run");
}

#[test]
fn a_run_from_random_weights_has_its_tokenizers_settings() {
    let lab = Lab::on_interrupted_run();
    lab.export(ORIGIN);
    let folder = lab.newest_checkpoint(ORIGIN);
    let settings: Value =
        serde_json::from_slice(&lab.read(ORIGIN, &format!("{folder}/tokenizer_config.json"))).expect("JSON");
    let expected = json!({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>",
        "model_max_length": 128, "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": false});
    assert_eq!(settings, expected);
    let exported = read(&lab.path(&format!("export-{ORIGIN}")).join("tokenizer_config.json"));
    assert_eq!(serde_json::from_slice::<Value>(&exported).expect("JSON"), expected);
}

#[test]
fn doctor_compares_a_model_folder_with_the_model_and_the_data() {
    let folder = Folder::new();
    let doctor = || {
        let config = folder.lab.config("").replace(
            "kind = \"llama\"\n",
            &format!("kind = \"llama\"\ninit_from = \"file://{}\"\n", folder.path.display()),
        );
        folder.lab.write_config("doctor.toml", &config);
        let life = folder.lab.command(&["doctor", "doctor.toml"]).json().finish();
        let line = life.events.iter().find(|event| event.value["check"] == "initial weights");
        line.unwrap_or_else(|| panic!("no such line\n{}", life.story())).value.clone()
    };
    assert_eq!(doctor()["verdict"], "ok");
    folder.change("tokenizer.json", |json| json["added_tokens"][0]["special"] = false.into());
    let line = doctor();
    assert_eq!(line["verdict"], "fail", "{line}");
    assert!(line.to_string().contains("data.tokenizer"), "{line}");
    folder.rewrite(|tensors| drop(tensors.remove("model.norm.weight")));
    assert!(doctor().to_string().contains("model.norm.weight"));
}
