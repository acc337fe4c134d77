use serde_json::{Value, json};

use super::*;
use crate::model::build as build_whole;

fn description(changes: Value) -> Value {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn lora(targets: &[&str]) -> LoraConfig {
    let targets = targets.iter().map(|&name| name.to_owned()).collect();
    LoraConfig { rank: 4, alpha: 8.0, targets, base: Vec::new() }
}

fn settings(precision: Precision, seed: Option<u64>) -> BuildSettings {
    tch::set_num_threads(1);
    BuildSettings { device: Device::Cpu, precision, seed }
}

fn of<'a>(model: &'a dyn Model, name: &str) -> &'a Parameter {
    model.parameters().iter().find(|parameter| parameter.name == name).unwrap()
}

fn copy(from: &Tensor, to: &Tensor) {
    let _no_grad = tch::no_grad_guard();
    to.shallow_clone().copy_(from);
}

/// A whole model, and one of the same weights with adapters.
fn pair(changes: Value, precision: Precision, targets: &[&str]) -> [Box<dyn Model>; 2] {
    let config = description(changes);
    let whole = build_whole(ModelKind::Decoder, &config, &settings(precision, Some(1))).unwrap();
    let adapted = build(ModelKind::Decoder, &config, &settings(precision, Some(7)), &lora(targets)).unwrap();
    for parameter in whole.parameters() {
        copy(parameter.values(), of(adapted.as_ref(), &parameter.name).values());
    }
    [whole, adapted]
}

fn tokens() -> Tensor {
    let ids: Vec<i64> = (0..34_i64).map(|i| (i * i + 3) % 96).collect();
    Tensor::from_slice(&ids).view([2, 17])
}

fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.detach().to_kind(Kind::Float).view([-1])).unwrap()
}

fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Gives every B values that are not zero.
fn stir(model: &dyn Model) {
    for parameter in model.parameters().iter().filter(|parameter| parameter.name.ends_with(ENDINGS[1])) {
        let values = parameter.values();
        let len = values.numel() as i64;
        let noise = Tensor::arange(len, (Kind::Float, Device::Cpu)).sin() * 0.1;
        copy(&noise.view(values.size().as_slice()), values);
    }
}

#[test]
fn a_fresh_model_is_its_base_to_the_last_bit() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        let [whole, adapted] = pair(json!({"tie_word_embeddings": true}), precision, &[ALL_LINEAR]);
        let [a, b] = [&whole, &adapted].map(|model| values(&model.logits(&tokens()).unwrap()));
        assert_eq!(a, b, "{precision:?}");
    }
}

#[test]
fn adapters_alone_have_gradients_and_their_base_is_in_the_type_of_computing() {
    for (precision, kind) in [(Precision::Fp32, Kind::Float), (Precision::Bf16, Kind::BFloat16)] {
        let [_, adapted] = pair(json!({"attention_bias": true}), precision, &["q_proj", "down_proj"]);
        stir(adapted.as_ref());
        adapted.loss(&tokens()).unwrap().backward();
        let mut adapters = 0;
        for parameter in adapted.parameters() {
            let name = &parameter.name;
            let gradient = parameter.values().grad();
            match parameter.leaf() {
                None => {
                    assert!(parameter.is_base() && !gradient.defined(), "{name}");
                    assert!(!parameter.values().requires_grad() && parameter.values().kind() == kind, "{name}");
                }
                Some(leaf) => {
                    assert!(!parameter.is_base() && leaf.kind() == Kind::Float, "{name}");
                    assert!(values(&gradient).iter().any(|value| *value != 0.0), "{name}");
                    adapters += 1;
                }
            }
        }
        assert_eq!(adapters, 2 * 2 * 2, "A and B of two layers in two blocks");
    }
}

#[test]
fn a_model_with_adapters_computes_what_the_merged_weights_compute() {
    let [whole, adapted] = pair(json!({}), Precision::Fp32, &["q_proj", "v_proj", "gate_proj", "o_proj"]);
    stir(adapted.as_ref());
    let before = values(&whole.logits(&tokens()).unwrap());
    for parameter in whole.parameters() {
        let [a, b] = names(&parameter.name).map(|name| adapted.parameters().iter().find(|it| it.name == name));
        let (Some(a), Some(b)) = (a, b) else { continue };
        // alpha / rank = 8 / 4.
        let merged = parameter.values() + b.values().matmul(a.values()) * 2.0;
        copy(&merged.detach(), parameter.values());
    }
    let [merged, unmerged] = [&whole, &adapted].map(|model| values(&model.logits(&tokens()).unwrap()));
    assert!(furthest(&before, &merged) > 0.05, "the adapters change something");
    assert!(furthest(&merged, &unmerged) < 1e-5, "{}", furthest(&merged, &unmerged));

    // The same by the function that exports use, without and with rounding.
    merge(adapted.as_ref(), &lora(&[]), Kind::Float).unwrap();
    assert!(furthest(&merged, &values(&adapted.logits(&tokens()).unwrap())) < 1e-6);
    for parameter in whole.parameters() {
        let other = of(adapted.as_ref(), &parameter.name).values();
        assert!(furthest(&values(parameter.values()), &values(other)) < 1e-6, "{}", parameter.name);
    }
    merge(adapted.as_ref(), &lora(&[]), Kind::BFloat16).unwrap();
    let rounded = of(adapted.as_ref(), "model.layers.1.mlp.up_proj.weight").values();
    assert_eq!(values(rounded), values(&rounded.to_kind(Kind::BFloat16)));
}

#[test]
fn adapters_begin_as_peft_begins_them_and_with_the_same_bits_everywhere() {
    let make = |seed| {
        let config = description(json!({}));
        let adapted = build(ModelKind::Decoder, &config, &settings(Precision::Fp32, Some(seed)), &lora(&[ALL_LINEAR]));
        let model = adapted.unwrap();
        let of_a = |parameter: &&Parameter| parameter.name.ends_with(ENDINGS[0]);
        let a: Vec<Vec<f32>> = model.parameters().iter().filter(of_a).map(|it| values(it.values())).collect();
        let of_b = |parameter: &&Parameter| parameter.name.ends_with(ENDINGS[1]);
        assert!(model.parameters().iter().filter(of_b).all(|it| values(it.values()).iter().all(|value| *value == 0.0)));
        a
    };
    let first = make(1);
    assert_eq!(first.len(), 2 * 7);
    tch::manual_seed(99);
    assert_eq!(first, make(1));
    assert_ne!(first, make(2));
    for a in &first {
        // 4 rows of 32 or, before `down_proj`, 48 columns.
        let bound = 1.0 / (a.len() as f32 / 4.0).sqrt();
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        let deviation = (a.iter().map(|value| value * value).sum::<f32>() / a.len() as f32).sqrt();
        assert!(a.iter().all(|value| value.abs() <= bound), "{bound}");
        assert!((deviation / (bound / 3_f32.sqrt()) - 1.0).abs() < 0.2 && mean.abs() < bound / 4.0, "{deviation}");
    }
    assert_ne!(first[0], first[7], "each layer has a stream of its own");
    // A stream that never changes: a resume on other machines draws nothing, but a new run repeats an old one.
    let bits: Vec<u32> = uniform(1, "x", 3, 1.0).iter().map(|value| value.to_bits()).collect();
    assert_eq!(uniform(1, "x", 2, 1.0), bits.iter().take(2).map(|&bits| f32::from_bits(bits)).collect::<Vec<_>>());
}

#[test]
fn names_are_those_of_peft() {
    let expected = ["A", "B"].map(|it| format!("base_model.model.model.layers.0.self_attn.q_proj.lora_{it}.weight"));
    assert_eq!(names("model.layers.0.self_attn.q_proj.weight"), expected);
    let config = description(json!({}));
    let all = target_modules(ModelKind::Decoder, &config, &lora(&[ALL_LINEAR])).unwrap();
    assert_eq!(all, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]);
    assert_eq!(
        target_modules(ModelKind::Decoder, &config, &lora(&["v_proj", "q_proj"])).unwrap(),
        ["q_proj", "v_proj"]
    );
    let elements = parameters(ModelKind::Decoder, &config, &lora(&["v_proj", "q_proj"])).unwrap();
    assert_eq!(elements, 2 * 4 * ((16 + 32) + (32 + 32)));
    for wrong in ["lm_head", "embed_tokens", "proj", "q_projs", "input_layernorm"] {
        let error = target_modules(ModelKind::Decoder, &config, &lora(&["q_proj", wrong])).unwrap_err().to_string();
        assert!(error.contains(wrong) && error.contains("q_proj, k_proj"), "{error}");
    }
}

#[test]
fn adapters_alone_learn_a_batch() {
    let [_, model] = pair(json!({}), Precision::Fp32, &[ALL_LINEAR]);
    let loss = || model.loss(&tokens()).unwrap();
    let first = loss().double_value(&[]);
    for _ in 0..60 {
        loss().backward();
        let _no_grad = tch::no_grad_guard();
        for leaf in model.parameters().iter().filter_map(Parameter::leaf) {
            let mut gradient = leaf.grad();
            let _ = leaf.shallow_clone().f_add_(&(gradient.sign() * -1e-2)).unwrap();
            let _ = gradient.zero_();
        }
    }
    let last = loss().double_value(&[]);
    assert!(last < first - 0.02, "{first} to {last}");
}
