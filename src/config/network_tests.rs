//! Settings of several nodes: stored only by the runs that have them, so that older programs read all others.

use super::{
    tests::{LEAST, folder, load_least, load_with},
    *,
};

#[test]
fn settings_of_several_nodes_are_stored_only_by_runs_that_have_them() {
    let dir = folder();
    let load = |more: &str| load_with(dir.path(), &format!("{LEAST}{more}"), vec![], &[]);
    let usual = load("").unwrap();
    let stored = serde_json::to_string(&usual).unwrap();
    // As every earlier version wrote it: the same bytes, and read by it.
    assert!(!stored.contains("network") && !stored.contains("mixed"), "{stored}");
    assert_eq!(serde_json::from_str::<RunConfig>(&stored).unwrap(), usual);
    let spelled_out = "network = { address = 'auto', port = 0, store_port = 0 }\nparallel.mixed = false";
    assert_eq!(serde_json::to_string(&load(spelled_out).unwrap()).unwrap(), stored);

    let config =
        load_least("network = { address = 'fd00::7', port = 7077 }\nparallel = { strategy = 'zero1', mixed = true }")
            .unwrap();
    let expected = NetworkConfig { address: Some("fd00::7".parse().unwrap()), port: 7077, store_port: 0 };
    assert_eq!((config.network, config.workload.parallel.mixed), (expected, true));
    let stored = serde_json::to_value(&config).unwrap();
    let network = serde_json::json!({"address": "fd00::7", "port": 7077, "store_port": 0});
    assert_eq!((&stored["network"], &stored["parallel"]["mixed"]), (&network, &serde_json::json!(true)));
    assert_eq!(serde_json::from_value::<RunConfig>(stored.clone()).unwrap(), config);
    for (key, value) in [
        ("address", serde_json::json!("node7")),
        ("port", serde_json::json!(65536)),
        ("store_port", serde_json::json!(-1)),
        ("store_port", serde_json::json!("any")),
    ] {
        let mut hostile = stored.clone();
        hostile["network"][key] = value.clone();
        assert!(serde_json::from_value::<RunConfig>(hostile).is_err(), "{key} = {value}");
    }

    // A resume changes them back, and together with what they need.
    let set = |pairs: &[(&str, &str)]| {
        let pairs: Vec<_> = pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        canonical_overrides(&config, &pairs).and_then(|canonical| apply_overrides(&config, &canonical))
    };
    let back = set(&[("network.address", "auto"), ("network.port", "0"), ("parallel.mixed", "false")]).unwrap();
    assert_eq!((back.network, back.workload.parallel.mixed), (NetworkConfig::default(), false));
    let error = set(&[("parallel.strategy", "ddp")]).unwrap_err().to_string();
    assert!(error.starts_with("parallel.mixed = true needs parallel.strategy"), "{error}");
}
