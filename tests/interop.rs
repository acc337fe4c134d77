//! Our folders opened by other programs: `tests/interop/look.py` opens them with both major versions of transformers.
//! `scripts/test` installs those; where they are not installed, these tests say so and pass. With TRAINER_TESTS_ALL, as
//! `scripts/test --all` sets it, the model is loaded as well and makes tokens, which needs PyTorch.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::{Value, json};
use trainer::data::tokenizer::TextTokenizer;

use crate::support::lab::{Lab, ORIGIN, data_set};

const VERSION_4: (&str, &str) = ("transformers-4", include_str!("interop/transformers-4.txt"));
const VERSION_5: (&str, &str) = ("transformers-5", include_str!("interop/transformers-5.txt"));
const TORCH: (&str, &str) = ("torch", include_str!("interop/torch.txt"));

/// Text that a tokenizer may get wrong: spaces in a row and before a mark, other alphabets, an end token that is spelt
/// out.
const TEXT: &str = "the machine counted  every step , again\n\tgr\u{fc}n \u{1f980}";

/// An environment that `tests/interop/setup` has created; `None`, with a line on standard output, if it is missing.
fn environment((name, list): (&str, &str)) -> Option<PathBuf> {
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
