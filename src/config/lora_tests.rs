//! The settings of adapters.

use super::{tests::load_least, *};

#[test]
fn adapters_have_a_rank_and_weights_to_be_trained_beside() {
    let more = |lines: &str| load_least(&format!("model.init_from = 'base'\n{lines}"));
    assert_eq!(more("").unwrap().workload.model.lora, None);
    let config = more("model.lora.rank = 8\n").unwrap();
    let all = LoraConfig { rank: 8, alpha: 16.0, targets: vec![ALL_LINEAR.into()], base: Vec::new() };
    assert_eq!(config.workload.model.lora, Some(all));
    let mut config = more("model.lora = { rank = 4, alpha = 6.5, targets = ['q_proj', 'v_proj'] }\n").unwrap();
    let base = vec![BaseFile { name: "model.safetensors".into(), bytes: 7, crc64: "0123456789abcdef".into() }];
    let lora = config.workload.model.lora.as_mut().unwrap();
    assert_eq!((lora.scale(), lora.targets.as_slice()), (1.625, &["q_proj".to_owned(), "v_proj".to_owned()][..]));
    lora.base = base;
    // What a run's journal has is what its later starts have, the base's files included.
    let stored: RunConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
    assert_eq!((&stored, &apply_overrides(&stored, &[]).unwrap()), (&config, &config));
    let shown: Vec<String> = settings(&config)
        .iter()
        .filter(|(key, _)| key.starts_with("model.lora."))
        .map(|(key, value)| format!("{key} = {value}"))
        .collect();
    let expected = ["rank = 4", "alpha = 6.5", "targets = [\"q_proj\", \"v_proj\"]", "dropout = 0.0"]
        .map(|it| format!("model.lora.{it}"));
    assert_eq!(shown, expected);
    let change = |key: &str| apply_overrides(&stored, &[(key.to_owned(), "8".to_owned())]).unwrap_err().to_string();
    assert!(change("model.lora.rank").contains("model.lora.rank"), "{}", change("model.lora.rank"));

    for (lines, said) in [
        ("model.lora.targets = ['q_proj']", "model.lora.rank is 0"),
        ("model.lora.alpha = 3", "model.lora.rank is 0"),
        ("model.lora = { rank = 4, dropout = 0.05 }", "0.05"),
        ("model.lora = { rank = 4, alpha = 0 }", "model.lora.alpha"),
        ("model.lora = { rank = 4, targets = 'q_proj' }", "all-linear"),
        ("model.lora = { rank = 4, targets = ['q_proj', 'all-linear'] }", "model.lora.targets"),
        ("model.lora = { rank = 5000 }", "4096"),
        ("model.lora.rank = 4\nparallel.strategy = 'shard'", "set parallel.strategy = \"zero1\""),
        ("model.lora = { rank = 4, droput = 0 }", "unknown key model.lora.droput"),
    ] {
        let error = more(lines).unwrap_err().to_string();
        assert!(error.contains(said), "{lines}: {error}");
    }
    let error = load_least("model.lora.rank = 4\n").unwrap_err().to_string();
    assert!(error.contains("needs model.init_from"), "{error}");
}
