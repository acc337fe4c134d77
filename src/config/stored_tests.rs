//! Settings of runs that exist: what their journals hold, and what a resume may change.

use super::{tests::load_least, *};

#[test]
fn a_run_from_before_a_setting_was_there_has_its_default_and_hostile_ones_are_refused() {
    let config = load_least("").unwrap();
    let stored = serde_json::to_value(&config).unwrap();
    let with = |change: &dyn Fn(&mut serde_json::Map<String, serde_json::Value>)| {
        let mut changed = stored.clone();
        change(changed["checkpoint"].as_object_mut().unwrap());
        serde_json::from_value::<RunConfig>(changed)
    };
    let older = with(&|checkpoint| {
        checkpoint.remove("scrub");
        checkpoint.remove("price_per_gib_month");
        checkpoint["keep"].as_object_mut().unwrap().remove("best");
    });
    assert_eq!(older.unwrap(), config);
    assert_eq!((config.checkpoint.slots, stored["checkpoint"].get("slots")), (SlotCount::TWO, None));
    let one = load_least("checkpoint.slots = 1").unwrap();
    let one_stored = serde_json::to_value(&one).unwrap();
    assert_eq!((one.checkpoint.slots, &one_stored["checkpoint"]["slots"]), (SlotCount::ONE, &serde_json::json!(1)));
    assert_eq!(serde_json::from_value::<RunConfig>(one_stored).unwrap(), one);
    let never = with(&|checkpoint| _ = checkpoint.insert("scrub".into(), serde_json::Value::Null));
    assert_eq!(never.unwrap().checkpoint.scrub, None);
    for (key, value) in [
        ("scrub", serde_json::json!(-1.0)),
        ("scrub", serde_json::json!(1e300)),
        ("scrub", serde_json::json!("1d")),
        ("slots", serde_json::json!(0)),
        ("slots", serde_json::json!(3)),
        ("price_per_gib_month", serde_json::json!("free")),
        ("keep", serde_json::json!({"last": 3, "every": {"seconds": -5.0}})),
        ("keep", serde_json::json!({"last": 3, "every": null, "best": -1})),
    ] {
        assert!(with(&|checkpoint| _ = checkpoint.insert(key.into(), value.clone())).is_err(), "{key} = {value}");
    }
    for (setting, expected) in [
        ("checkpoint.scrub = '10ms'", "\"never\", or a duration"),
        ("checkpoint.slots = 3", "a whole number from 1 to 2"),
        ("checkpoint.price_per_gib_month = -1", "a number, at least 0"),
        ("checkpoint.keep = { best = -1 }", "a whole number, at least 0"),
        ("checkpoint.keep = { every = '10ms' }", "\"never\", a count of steps"),
    ] {
        let error = load_least(setting).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn what_is_kept_of_a_pass_is_stored_only_if_it_is_not_everything() {
    let config = load_least("").unwrap();
    let stored = serde_json::to_value(&config).unwrap();
    assert!(stored["train"].get("activations").is_none(), "as in runs from before it could be chosen: {stored}");
    assert_eq!(serde_json::from_value::<RunConfig>(stored).unwrap(), config);
    for (text, activations) in [("block", Activations::Block), ("auto", Activations::Auto)] {
        let set = [("train.activations".to_owned(), text.to_owned()), ("parallel.strategy".to_owned(), "shard".into())];
        let changed = apply_overrides(&config, &set).unwrap();
        let stored = serde_json::to_value(&changed).unwrap();
        assert_eq!((&stored["train"]["activations"], &stored["parallel"]["strategy"]), (&text.into(), &"shard".into()));
        let read = serde_json::from_value::<RunConfig>(stored).unwrap();
        assert_eq!((read.workload.train.activations, read.workload.parallel.strategy), (activations, Strategy::Shard));
    }
}

#[test]
fn epochs_become_steps_once_the_data_is_known() {
    let mut train = load_least("train.epochs = 3").unwrap().workload.train;
    assert_eq!((train.steps, train.epochs, train.global_batch), (0, 3, 32));
    let with = |sequences| {
        let mut train = train.clone();
        train.settle_steps(sequences).map(|()| train.steps).map_err(|error| error.to_string())
    };
    // 3 × 2,000 sequences are 187.5 batches of 32.
    assert_eq!(with(2000), Ok(188));
    assert_eq!(with(32_000), Ok(3000));
    let short = "train.schedule.warmup_steps = 100 is longer than the run: train.steps = 10 (from train.epochs = 3)";
    assert_eq!(with(100), Err(short.into()));
    assert!(with(u64::MAX).unwrap_err().contains("steps"));
    // What is settled stays, with whatever data.
    train.settle_steps(2000).unwrap();
    train.settle_steps(9000).unwrap();
    assert_eq!(train.steps, 188);

    // Of an existing run: both are there, and steps alone can be changed.
    let mut base = load_least("train.epochs = 3").unwrap();
    base.workload.train.settle_steps(2000).unwrap();
    let set = |key: &str, value: &str| apply_overrides(&base, &[(key.to_owned(), value.to_owned())]);
    assert_eq!(set("checkpoint.keep.last", "9").unwrap().workload.train.steps, 188);
    assert_eq!(set("train.steps", "500").unwrap().workload.train.steps, 500);
    let text = set("train.epochs", "4").unwrap_err().to_string();
    assert!(text.contains("train.epochs can't be changed on resume"), "{text}");
    let stored = serde_json::to_value(load_least("").unwrap()).unwrap();
    assert!(stored["train"].get("epochs").is_none(), "{stored}");
}

#[test]
fn a_run_from_before_fused_functions_keeps_its_digits_and_a_new_one_has_them() {
    let config = load_least("").unwrap();
    let stored = serde_json::to_value(&config).unwrap();
    assert_eq!((config.workload.train.fused, config.workload.train.deterministic), (true, true));
    assert_eq!((&stored["train"]["fused"], stored["train"].get("deterministic")), (&serde_json::json!(true), None));
    let mut older = stored;
    older["train"].as_object_mut().unwrap().remove("fused");
    let older: RunConfig = serde_json::from_value(older).unwrap();
    assert_eq!((older.workload.train.fused, older.workload.train.deterministic), (false, true));
    // A resume reads all settings again.
    let set = |key: &str, value: &str| apply_overrides(&older, &[(key.to_owned(), value.to_owned())]).unwrap();
    assert!(!set("checkpoint.keep.last", "9").workload.train.fused);
    let changed = set("train.deterministic", "false");
    assert!(!changed.workload.train.deterministic && !changed.workload.train.fused);
    let again: RunConfig = serde_json::from_value(serde_json::to_value(&changed).unwrap()).unwrap();
    assert_eq!(again, changed);
    for key in ["train.fused", "train.deterministic"] {
        assert_eq!(effect(key), Effect::Mathematical);
    }
    assert!(set("train.fused", "true").workload.train.fused);
}
