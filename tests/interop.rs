//! Our folders opened by other programs: `tests/interop/look.py` opens them with both major versions of transformers.
//! `scripts/test` installs those; where they are not installed, these tests say so and pass. With TRAINER_TESTS_ALL, as
//! `scripts/test --all` sets it, the model is loaded as well and makes tokens, which needs PyTorch.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::{Value, json};
use tch::Tensor;
use trainer::{
    config::ModelKind,
    data::tokenizer::TextTokenizer,
    model::{
        self,
        generate::{GenerateSettings, generate},
    },
};

use crate::support::lab::{Lab, ORIGIN, data_set};

pub const VERSION_4: (&str, &str) = ("transformers-4", include_str!("interop/transformers-4.txt"));
pub const VERSION_5: (&str, &str) = ("transformers-5", include_str!("interop/transformers-5.txt"));
pub const TORCH: (&str, &str) = ("torch", include_str!("interop/torch.txt"));

/// Text that a tokenizer may get wrong: spaces in a row and before a mark, other alphabets, an end token that is spelt
/// out.
const TEXT: &str = "the machine counted  every step , again\n\tgr\u{fc}n \u{1f980}";

/// An environment that `tests/interop/setup` has created; `None`, with a line on standard output, if it is missing.
pub fn environment((name, list): (&str, &str)) -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    // The script asks the same program.
    let mut sum = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
    sum.stdin.take()?.write_all(list.as_bytes()).ok()?;
    let sum = String::from_utf8(sum.wait_with_output().ok()?.stdout).ok()?;
    let place = cache.join(format!("trainer/interop-{name}-{}", sum.get(..12)?));
    if !place.is_dir() {
        println!(
            "skipped: tests/interop/{name}.txt is not installed; scripts/test does it where the package index is \
            reached"
        );
        return None;
    }
    Some(place)
}

/// Lets both versions open a folder.
#[track_caller]
fn look(folder: &Path, rope_theta: f64) {
    let tokenizer = TextTokenizer::load(&data_set().join("tokenizer.json"), None).expect("the data's tokenizer");
    let ids = tokenizer.encode(TEXT).expect("encode text");
    let eos = json!({"id": tokenizer.eos_id(), "token": "<|endoftext|>"});
    let expected = json!({"text": TEXT, "ids": ids, "eos": eos, "rope_theta": rope_theta});
    let torch = std::env::var_os("TRAINER_TESTS_ALL").and_then(|_| environment(TORCH));
    for version in [VERSION_4, VERSION_5] {
        let Some(transformers) = environment(version) else { continue };
        let mut command = Command::new("python3");
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/look.py"));
        command.arg(folder).arg(expected.to_string());
        let mut modules = transformers.into_os_string();
        if let Some(torch) = &torch {
            command.arg("--generate");
            let libraries = format!("{0}/stubs:{0}/nvidia/cu13/lib", torch.display());
            command.env("LD_LIBRARY_PATH", libraries).env("CUDA_VISIBLE_DEVICES", "");
            modules.push(":");
            modules.push(torch);
        }
        let output = command.env("PYTHONPATH", modules).output().expect("start python3");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{} of {}: {said}", version.0, folder.display());
        let made: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
        assert_eq!(made["transformers"].as_str().map(|text| &text[..1]), version.0.strip_prefix("transformers-"));
        assert_eq!(made["made"].is_array(), torch.is_some(), "{made}");
    }
}

/// The ids in `tests/fixtures/chat/expected.json`, to which the chats of `data prepare` are held, are theirs.
#[test]
fn chats_have_the_ids_that_transformers_gives() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    for version in [VERSION_4, VERSION_5] {
        let Some(transformers) = environment(version) else { continue };
        let mut command = Command::new("python3");
        command.arg(tests.join("interop/chats.py")).arg(tests.join("fixtures/chat"));
        let output = command.env("PYTHONPATH", transformers).output().expect("start python3");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {said}", version.0);
    }
}

#[test]
fn a_checkpoint_is_opened_by_transformers() {
    let lab = Lab::on_interrupted_run();
    look(&lab.path("store").join(ORIGIN).join(lab.newest_checkpoint(ORIGIN)), 10_000.0);
}

/// The older version reads the newer spelling of the rotary settings, and a run from weights keeps its folder's files.
#[test]
fn an_export_of_a_run_in_the_newest_spelling_is_opened_by_both_versions() {
    let lab = Lab::on_files();
    let mut description: Value =
        serde_json::from_slice(&std::fs::read(lab.path("model.json")).expect("read model.json")).expect("JSON");
    let map = description.as_object_mut().expect("an object");
    map.remove("rope_theta");
    map.remove("torch_dtype");
    map.insert("dtype".into(), "float32".into());
    map.insert("rope_parameters".into(), json!({"rope_type": "default", "rope_theta": 250_000.0}));
    std::fs::write(lab.path("model.json"), description.to_string()).expect("write model.json");
    let few = ["--set", "train.steps=2", "--set", "train.schedule.warmup_steps=1"];
    lab.run("first").args(&few).finish().expect_code(0);
    lab.export("first");
    let init = format!("model.init_from=file://{}", lab.path("export-first").display());
    lab.run("second").args(&few).args(&["--set", &init]).finish().expect_code(0);
    lab.export("second");
    look(&lab.path("export-second"), 250_000.0);
}

/// Runs `families.py`; `None`: something that it needs is not installed.
fn families(version: (&str, &str), arguments: &[String]) -> Option<Value> {
    let (transformers, torch) = (environment(version)?, environment(TORCH)?);
    let output = Command::new("python3")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/families.py"))
        .args(arguments)
        .env("LD_LIBRARY_PATH", format!("{0}/stubs:{0}/nvidia/cu13/lib", torch.display()))
        .env("CUDA_VISIBLE_DEVICES", "")
        .env("OMP_NUM_THREADS", "1")
        .env("PYTHONPATH", format!("{}:{}", transformers.display(), torch.display()))
        .output()
        .expect("start python3");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} {arguments:?}: {said}", version.0);
    Some(serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}")))
}

/// A prompt that is longer than the windows of those models.
const PROMPT: [u32; 12] = [3, 17, 250, 4, 99, 301, 8, 8, 44, 500, 1, 63];

/// Our logits and our greedy text for a folder against those of transformers.
#[track_caller]
fn agree(what: &str, folder: &Path, theirs: &Value) {
    let model = model::from_folder(ModelKind::Decoder, folder).unwrap_or_else(|error| panic!("{what}: {error}"));
    let ids: Vec<i64> = PROMPT.iter().map(|&id| id.into()).collect();
    let logits = model.logits(&Tensor::from_slice(&ids).unsqueeze(0)).expect("logits").detach().flatten(0, -1);
    let logits = Vec::<f32>::try_from(&logits).expect("numbers");
    let expected: Vec<f64> = serde_json::from_value(theirs["logits"].clone()).expect("numbers");
    assert_eq!(logits.len(), expected.len(), "{what}");
    let far = logits.iter().zip(&expected).map(|(&own, their)| (f64::from(own) - their).abs()).fold(0.0, f64::max);
    assert!(far < 1e-5, "{what}: logits differ by {far:e}");
    let settings = GenerateSettings { max_new_tokens: 8, temperature: 0.0, seed: 0, stop: Vec::new() };
    let made = generate(model.as_ref(), &PROMPT, &settings, |_| true).expect("text");
    assert_eq!(json!(made), theirs["made"], "{what}");
    println!("{what}: logits differ by at most {far:.1e}");
}

/// A folder of transformers gives us its model; a run starts from it, and both versions open what it exports.
#[test]
fn every_family_goes_from_transformers_to_us_and_back() {
    if std::env::var_os("TRAINER_TESTS_ALL").is_none() {
        return;
    }
    let lab = Lab::on_files();
    let path = |folder: &Path| folder.display().to_string();
    let (out, tokenizer) = (lab.path("families"), data_set().join("tokenizer.json"));
    let Some(names) = families(VERSION_5, &["make".into(), path(&out), path(&tokenizer), "512".into()]) else { return };
    let names: Vec<String> = serde_json::from_value(names).expect("names");
    assert_eq!(names.len(), 8);
    let read = |version, folders: Vec<PathBuf>| {
        let arguments = ["read".to_owned(), json!(PROMPT).to_string()].into_iter();
        families(version, &arguments.chain(folders.iter().map(|folder| path(folder))).collect::<Vec<_>>())
    };
    let theirs = read(VERSION_5, names.iter().map(|name| out.join(name)).collect()).expect("installed");
    for (at, name) in names.iter().enumerate() {
        agree(&format!("{name} of transformers"), &out.join(name), &theirs[at]);
        let settings = [
            format!("model.init_from=file://{}", out.join(name).display()),
            "model.config=\"\"".into(),
            "train.steps=2".into(),
            "train.schedule.warmup_steps=1".into(),
            "checkpoint.every=2 steps".into(),
        ];
        let settings: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
        lab.run(name).args(&settings).finish().expect_code(0);
        lab.export(name);
        let several = ["--out", &path(&lab.path(&format!("several-{name}"))), "--max-shard-size", "50KB"];
        lab.about("export", name).args(&several).finish().expect_code(0);
    }
    for version in [VERSION_5, VERSION_4] {
        let exports = names.iter().map(|name| lab.path(&format!("export-{name}")));
        let Some(theirs) = read(version, exports.collect()) else { continue };
        for (at, name) in names.iter().enumerate() {
            agree(&format!("{name} of ours in {}", version.0), &lab.path(&format!("export-{name}")), &theirs[at]);
            assert_eq!(theirs[at]["dtype"], json!(["float32", "float32"]), "{name}");
        }
        // Several files with an index are the same model, tied weights included.
        let folders: Vec<PathBuf> = names.iter().map(|name| lab.path(&format!("several-{name}"))).collect();
        assert!(folders.iter().all(|folder| folder.join("model.safetensors.index.json").is_file()));
        let several = read(version, folders).expect("installed");
        for (at, name) in names.iter().enumerate() {
            assert_eq!(several[at]["logits"], theirs[at]["logits"], "{name} of {}", version.0);
        }
    }
}

/// What an installed version makes of tokenizer folders; `None`: it is not installed.
pub fn folders(version: (&str, &str), text: &str, chats: &str, folders: &[PathBuf]) -> Option<Vec<Value>> {
    let transformers = environment(version)?;
    let mut command = Command::new("python3");
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/folders.py"));
    command.arg(text).arg(chats).args(folders);
    let output = command.env("PYTHONPATH", transformers).output().expect("start python3");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", version.0);
    Some(serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}")))
}

/// Folders whose flags contradict their post-processor: version 5 does what the latter says; version 4 obeys the flags
/// for some classes, and with the flags that our checkpoints have it does the same.
#[test]
fn tokens_around_a_text_are_those_of_the_post_processor_in_both_versions() {
    let scratch = tempfile::tempdir().expect("a folder");
    let token = |id: u32, content: &str| {
        json!({
            "id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false,
        })
    };
    let tokenizer = |begin: bool, end: bool| {
        let special = |token: &str| json!({"SpecialToken": {"id": token, "type_id": 0}});
        let mut pieces = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
        if begin {
            pieces.insert(0, special("<s>"));
        }
        if end {
            pieces.push(special("</s>"));
        }
        let known =
            [("<s>", 0), ("</s>", 1)].map(|(token, id)| (token, json!({"id": token, "ids": [id], "tokens": [token]})));
        let known: serde_json::Map<String, Value> = known.into_iter().map(|(name, it)| (name.to_owned(), it)).collect();
        let pair = [&pieces[..], &[json!({"Sequence": {"id": "B", "type_id": 1}})]].concat();
        let step = json!({"type": "TemplateProcessing", "single": pieces, "pair": pair, "special_tokens": known});
        json!({
            "version": "1.0", "added_tokens": [token(0, "<s>"), token(1, "</s>"), token(2, "<unk>")],
            "post_processor": if begin || end { step } else { Value::Null },
            "model": {
                "type": "BPE", "unk_token": "<unk>", "merges": [["a", "b"]],
                "vocab": {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "ab": 5},
            },
        })
        .to_string()
    };
    let (mut given, mut agreed, mut expected, mut contradictions) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let flags = [None, Some(true), Some(false)];
    for class in
        ["LlamaTokenizer", "GemmaTokenizerFast", "CohereTokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"]
    {
        for (begin, end) in [(false, false), (true, false), (true, true)] {
            for (bos, eos) in flags.iter().flat_map(|bos| flags.map(|eos| (*bos, eos))) {
                let mut settings = json!({
                    "tokenizer_class": class, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                });
                for (key, flag) in [("add_bos_token", bos), ("add_eos_token", eos)] {
                    flag.into_iter().for_each(|flag| settings[key] = flag.into());
                }
                let json = tokenizer(begin, end);
                let mut after = settings.as_object().expect("an object").clone();
                contradictions.push(!trainer::data::around::agree(&mut after, json.as_bytes()).is_empty());
                for (what, settings, list) in [("given", settings, &mut given), ("agreed", after.into(), &mut agreed)] {
                    let folder = scratch.path().join(format!("{what}-{}", list.len()));
                    std::fs::create_dir(&folder).expect("a folder");
                    std::fs::write(folder.join("tokenizer.json"), &json).expect("a file");
                    std::fs::write(folder.join("tokenizer_config.json"), settings.to_string()).expect("a file");
                    list.push(folder);
                }
                let around = |is: bool, id: u32| if is { vec![id] } else { Vec::new() };
                expected.push([around(begin, 0), vec![5], around(end, 1)].concat());
            }
        }
    }
    let ids = |version, list: &[PathBuf]| -> Option<Vec<Vec<u32>>> {
        let found = folders(version, "ab", "[]", list)?;
        Some(found.iter().map(|it| serde_json::from_value(it["ids"].clone()).expect("ids")).collect())
    };
    if let Some(found) = ids(VERSION_5, &given) {
        assert_eq!(found, expected);
        assert_eq!(ids(VERSION_5, &agreed).as_ref(), Some(&expected));
    }
    let Some(found) = ids(VERSION_4, &given) else { return };
    assert_eq!(ids(VERSION_4, &agreed).as_ref(), Some(&expected));
    let mut differ = 0;
    for (at, found) in found.iter().enumerate() {
        assert!(found == &expected[at] || contradictions[at], "nothing is said of {:?}", given[at]);
        differ += u32::from(found != &expected[at]);
    }
    assert!(differ > 20, "{differ} folders are read otherwise");
}
