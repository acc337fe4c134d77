//! Settings that a later command changes: what may change, what a run keeps for life, what each change does.

use super::{tests::load_least, *};

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
}

#[test]
fn a_resume_changes_what_it_names_and_nothing_else() {
    let base =
        load_least("train.schedule.kind = 'linear'\nnotice.sources = ['file', 'signals']\nrestart.backoff = '1500ms'")
            .unwrap();
    assert_eq!(apply_overrides(&base, &[]).unwrap(), base);
    assert!(diff(&base, &base).is_empty());

    let overrides = pairs(&[
        ("checkpoint.every", "2h"),
        ("parallel.strategy", "zero1"),
        ("train.optimizer.lr", "1"),
        ("train.optimizer", "{grad_clip=0}"),
    ]);
    let changed = apply_overrides(&base, &overrides).unwrap();
    let differences: Vec<_> =
        diff(&base, &changed).into_iter().map(|d| (d.key, d.from, d.to, is_mathematical(d.key))).collect();
    assert_eq!(
        differences,
        [
            ("train.optimizer.lr", "0.0003".to_owned(), "1.0".to_owned(), true),
            ("train.optimizer.grad_clip", "1.0".to_owned(), "0.0".to_owned(), true),
            ("parallel.strategy", "\"ddp\"".to_owned(), "\"zero1\"".to_owned(), false),
            ("checkpoint.every", "\"auto\"".to_owned(), "\"2h\"".to_owned(), false),
        ]
    );
    let canonical = canonical_overrides(&base, &overrides).unwrap();
    assert_eq!(apply_overrides(&base, &canonical).unwrap(), changed);
    let moved = canonical_overrides(&base, &pairs(&[("data.train", "elsewhere")])).unwrap();
    assert!(moved[0].1.starts_with("\"file:///"), "{moved:?}");
}

#[test]
fn what_a_run_keeps_for_life_is_refused_with_the_reason() {
    let base = load_least("").unwrap();
    for (key, value, message) in [
        (
            "model.config",
            "x.json",
            "model.config can't be changed on resume: the checkpoints' tensors belong to this model",
        ),
        (
            "model",
            "{kind='llama'}",
            "model.kind can't be changed on resume: the checkpoints' tensors belong to this model",
        ),
        (
            "store",
            "s3://b",
            "store can't be changed on resume: the run lives there (a copy of it is named with --store)",
        ),
        (
            "data.sequence_length",
            "64",
            "data.sequence_length can't be changed on resume: it cuts the samples: those already seen would come \
            again, others never",
        ),
        (
            "train.seed",
            "1",
            "train.seed can't be changed on resume: it orders the samples: those already seen would come again, others \
            never",
        ),
        (
            "train.threads",
            "auto",
            "--set: train.threads = \"auto\": expected a whole number (\"auto\" is settled once, when the run is \
            created)",
        ),
        ("train.lr", "1", "--set: unknown key train.lr"),
        ("train.steps", "50", "train.schedule.warmup_steps = 100 is longer than the run: train.steps = 50"),
    ] {
        assert_eq!(apply_overrides(&base, &pairs(&[(key, value)])).unwrap_err().to_string(), message);
    }
}

#[test]
fn a_store_is_read_as_the_caller_says_before_the_run_can_say_anything() {
    let set = [
        ("train.steps", "5"),
        ("storage.attempts", "3"),
        ("storage.part_mib", "8"),
        // Right only with what the run says.
        ("storage.kms_key_id", "alias/run"),
        ("storage.storage_class", "STANDARD_IA"),
    ];
    let expected = StorageConfig { attempts: 3, ..StorageConfig::plain(16, 8) };
    assert_eq!(reading_settings(&pairs(&set)).unwrap(), expected);
    for (key, value) in [("storage.attempts", "0"), ("storage.attemps", "3")] {
        let error = reading_settings(&pairs(&[(key, value)])).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn every_key_has_an_effect_that_was_thought_about() {
    let base = load_least("").unwrap();
    let free: Vec<&str> =
        settings(&base).into_iter().map(|(key, _)| key).filter(|key| effect(key) == Effect::Free).collect();
    assert_eq!(
        free,
        [
            "data.tokenizer",
            "data.validation_every",
            "train.activations",
            "train.early_stopping.patience",
            "train.early_stopping.min_delta",
            "parallel.strategy",
            "parallel.nproc_per_node",
            "parallel.device",
            "parallel.mixed",
            "parallel.share_device",
            "parallel.peak_tflops",
            "checkpoint.every",
            "checkpoint.scrub",
            "checkpoint.slots",
            "checkpoint.price_per_gib_month",
            "checkpoint.keep.last",
            "checkpoint.keep.every",
            "checkpoint.keep.best",
            "notice.sources",
            "notice.spare_time",
            "notice.file",
            "notice.stop_window",
            "notice.usr1_window",
            "notice.preemption_window",
            "notice.lifecycle_hook",
            "run.max_hours",
            "run.max_wait_hours",
            "run.max_cost",
            "run.price_per_hour",
            "on_complete.action",
            "restart.max",
            "restart.same_step",
            "restart.backoff",
            "restart.hang",
            "restart.fruitless_starts",
            "storage.concurrency",
            "storage.part_mib",
            "storage.attempts",
            "storage.max_upload_mib_per_s",
            "storage.encryption",
            "storage.kms_key_id",
            "storage.storage_class",
            "network.address",
            "network.port",
            "network.store_port",
        ]
    );
}
