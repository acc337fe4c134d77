//! Tests of the decoder.

use serde::Deserialize;
use serde_json::{Value, json};

use super::attention::repeat_heads;
use super::*;
use crate::{
    config::ModelKind,
    model::{self, families},
};

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

fn make(changes: Value, precision: Precision, seed: u64) -> Decoder {
    // Tests run side by side, and products this small gain nothing from threads that wait for each other.
    tch::set_num_threads(1);
    let settings = BuildSettings { device: Device::Cpu, precision, seed: Some(seed) };
    Decoder::new(families::read(&description(changes)).unwrap(), &settings).unwrap()
}

fn fp32(changes: Value) -> Decoder {
    make(changes, Precision::Fp32, 1)
}

fn tokens(batch: i64, len: i64) -> Tensor {
    let values: Vec<i64> = (0..batch * len).map(|i| (i * i * 7 + i * 3 + 5) % 96).collect();
    Tensor::f_from_slice(&values).unwrap().f_view([batch, len]).unwrap()
}

pub(super) fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.f_detach().unwrap().f_to_kind(Kind::Float).unwrap().f_flatten(0, -1).unwrap()).unwrap()
}

pub(super) fn value(tensor: &Tensor) -> f64 {
    tensor.f_double_value(&[]).unwrap()
}

pub(super) fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Fills parameter `p` of the list with f(p, i) of each element's index.
pub(super) fn fill(model: &Decoder, f: impl Fn(usize, &str, usize) -> f64) {
    let _no_grad = tch::no_grad_guard();
    for (p, parameter) in model.parameters().iter().enumerate() {
        let tensor = parameter.values();
        let new: Vec<f32> = (0..tensor.numel()).map(|i| f(p, &parameter.name, i) as f32).collect();
        let new = Tensor::f_from_slice(&new).unwrap().f_view(tensor.size().as_slice()).unwrap();
        tensor.shallow_clone().f_copy_(&new).unwrap();
    }
}

#[derive(Deserialize)]
struct Parity {
    cases: Vec<Case>,
}
#[derive(Clone, Deserialize)]
struct Case {
    name: String,
    config: Value,
    tokens: Vec<Vec<i64>>,
    parameters: Vec<String>,
    logits: Vec<f32>,
    loss: f64,
    gradients: Vec<[f64; 2]>,
}

/// The fixture is what Hugging Face transformers computed; its script lies beside it.
#[test]
fn logits_loss_and_gradients_are_those_of_hugging_face() {
    let parity: Parity = serde_json::from_str(include_str!("../../../tests/fixtures/llama-parity.json")).unwrap();
    assert_eq!(parity.cases.len(), 5);
    let both = |case: Case| [Fused::NONE, Fused::ALL].map(|fused| (case.clone(), fused));
    for (case, fused) in parity.cases.into_iter().flat_map(both) {
        let settings = BuildSettings { device: Device::Cpu, precision: Precision::Fp32, seed: Some(0) };
        let mut model = Decoder::new(families::read(&case.config).unwrap(), &settings).unwrap();
        model.use_fused(fused);
        let names: Vec<_> = model.parameters().iter().map(|parameter| parameter.name.clone()).collect();
        assert_eq!(names, case.parameters, "{}", case.name);
        fill(&model, |p, name, i| {
            let norm = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
            (0.37 * i as f64 + p as f64).sin() * 0.3 + norm
        });

        let rows = case.tokens.len() as i64;
        let all = Tensor::f_from_slice(&case.tokens.concat()).unwrap().f_view([rows, -1]).unwrap();
        let inputs = all.f_narrow(1, 0, all.size()[1] - 1).unwrap();
        let far = furthest(&values(&model.logits(&inputs).unwrap()), &case.logits);
        assert!(far < 2e-6, "{}: logits differ by {far}", case.name);

        let loss = model.loss(&all).unwrap();
        assert!((value(&loss) - case.loss).abs() < 2e-6, "{}: loss {}", case.name, value(&loss));
        loss.f_backward().unwrap();
        for (Parameter { name, weight, .. }, expected) in model.parameters().iter().zip(&case.gradients) {
            let gradient = values(&weight.values().f_grad().unwrap());
            let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            let inner: f64 = gradient.iter().enumerate().map(|(i, &g)| f64::from(g) * (i as f64).cos()).sum();
            let close = |a: f64, b: f64| (a - b).abs() < 2e-6 + 2e-5 * expected[0];
            assert!(
                close(norm, expected[0]) && close(inner, expected[1]),
                "{}: gradient of {name} is {norm} {inner}, not {expected:?}",
                case.name
            );
        }
    }
}

#[test]
fn an_untrained_model_knows_nothing_and_every_parameter_hears_of_it() {
    let model = fp32(json!({"attention_bias": true, "mlp_bias": true}));
    let loss = model.loss(&tokens(4, 33)).unwrap();
    assert_eq!((loss.size(), loss.f_kind().unwrap()), (vec![], Kind::Float));
    assert!((value(&loss) - 96_f64.ln()).abs() < 0.05, "{}", value(&loss));
    loss.f_backward().unwrap();
    for Parameter { name, weight, .. } in model.parameters() {
        let gradient = weight.values().f_grad().unwrap();
        assert!(gradient.defined() && gradient.f_kind().unwrap() == Kind::Float, "{name} has no fp32 gradient");
        // Adding one number to all scores of a query changes no softmax: a key's bias has no effect.
        if !name.ends_with("k_proj.bias") {
            assert!(values(&gradient).iter().any(|g| *g != 0.0), "{name} has a gradient of zero");
        }
    }
}

#[test]
fn later_tokens_do_not_change_earlier_scores() {
    let model = fp32(json!({}));
    let before = tokens(1, 20);
    let changed = before.f_mul_scalar(1).unwrap();
    let _ = changed.f_narrow(1, 12, 8).unwrap().f_fill_(1).unwrap();
    let (a, b) = (model.logits(&before).unwrap(), model.logits(&changed).unwrap());
    let part = |x: &Tensor, from, len| values(&x.f_narrow(1, from, len).unwrap());
    assert_eq!(part(&a, 0, 12), part(&b, 0, 12));
    assert!(furthest(&part(&a, 12, 8), &part(&b, 12, 8)) > 1e-3);
    let last = values(&model.last_logits(&before).unwrap());
    assert!(furthest(&part(&a, 19, 1), &last) < 1e-6);
}

#[test]
fn shared_heads_are_repeated_heads() {
    let shared = fp32(json!({}));
    let plain = fp32(json!({"num_key_value_heads": 4}));
    let _no_grad = tch::no_grad_guard();
    for (Parameter { name, weight, .. }, to) in shared.parameters().iter().zip(plain.parameters()) {
        let from = weight.values();
        let from = match name.contains("k_proj") || name.contains("v_proj") {
            // Rows of head 0 twice, then those of head 1 twice.
            true => from.f_view([2, 1, 8, 32]).unwrap().f_repeat([1, 2, 1, 1]).unwrap().f_view([32, 32]).unwrap(),
            false => from.shallow_clone(),
        };
        to.values().shallow_clone().f_copy_(&from).unwrap();
    }
    let [a, b] = [&shared, &plain].map(|model| values(&model.logits(&tokens(2, 16)).unwrap()));
    assert!(furthest(&a, &b) < 1e-6);

    let x = Tensor::f_arange(8, (Kind::Float, Device::Cpu)).unwrap().f_view([1, 1, 2, 4]).unwrap();
    let repeated = values(&repeat_heads(&x, 2).unwrap());
    assert_eq!(repeated, [0., 1., 2., 3., 0., 1., 2., 3., 4., 5., 6., 7., 4., 5., 6., 7.]);
}

#[test]
fn tied_models_have_one_matrix_that_both_ends_train() {
    let (tied, untied) = (fp32(json!({"tie_word_embeddings": true})), fp32(json!({})));
    assert!(tied.parameters().iter().all(|parameter| parameter.name != OUTPUT));
    assert_eq!(untied.parameters().last().unwrap().name, OUTPUT);
    let _ = tied.loss(&tokens(2, 9)).unwrap().f_backward();
    // A token that never stands in the input gets its gradient through the output alone.
    let seen = values(&tokens(2, 9));
    let unseen = (0..96).find(|token| !seen.contains(&(*token as f32))).unwrap();
    let gradient = tied.parameters()[0].values().f_grad().unwrap();
    assert!(values(&gradient.f_get(unseen).unwrap()).iter().any(|g| *g != 0.0));
}

#[test]
fn bf16_is_close_to_fp32_and_keeps_fp32_weights_and_gradients() {
    let [exact, rough] = [Precision::Fp32, Precision::Bf16].map(|precision| make(json!({}), precision, 1));
    let batch = tokens(4, 33);
    let [a, b] = [&exact, &rough].map(|model| model.loss(&batch).unwrap());
    assert!((value(&a) - value(&b)).abs() < 5e-3, "{} and {}", value(&a), value(&b));
    assert_eq!(rough.logits(&batch).unwrap().f_kind().unwrap(), Kind::Float);
    a.f_backward().unwrap();
    b.f_backward().unwrap();
    for (a, b) in exact.parameters().iter().zip(rough.parameters()) {
        let (name, a, b) = (&a.name, a.values(), b.values());
        assert_eq!((b.f_kind().unwrap(), b.f_grad().unwrap().f_kind().unwrap()), (Kind::Float, Kind::Float));
        let [a, b] = [a, b].map(|tensor| values(&tensor.f_grad().unwrap()));
        let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
        let apart: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
        assert!(norm(&apart) > 0.0, "{name}: bf16 gave fp32's own bits");
        assert!(norm(&apart) < 0.05 * norm(&a), "{name}: {} of {}", norm(&apart), norm(&a));
    }
}

#[test]
fn a_small_batch_is_memorised() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        let model = make(json!({"tie_word_embeddings": true}), precision, 3);
        let batch = tokens(2, 17);
        let mut loss = f64::NAN;
        for _ in 0..60 {
            let now = model.loss(&batch).unwrap();
            loss = value(&now);
            now.f_backward().unwrap();
            let _no_grad = tch::no_grad_guard();
            for tensor in model.parameters().iter().map(Parameter::values) {
                let mut gradient = tensor.f_grad().unwrap();
                let step = gradient.f_sign().unwrap().f_mul_scalar(-4e-3).unwrap();
                let _ = tensor.shallow_clone().f_add_(&step).unwrap();
                let _ = gradient.f_zero_().unwrap();
            }
        }
        assert!(loss < 0.5, "{precision:?}: {loss}");
    }
}

#[test]
fn weights_follow_from_the_seed_alone() {
    let bits = |model: &Decoder| -> Vec<Vec<u32>> {
        let bits = |tensor: &Tensor| values(tensor).iter().map(|value| value.to_bits()).collect();
        model.parameters().iter().map(|parameter| bits(parameter.values())).collect()
    };
    let model = fp32(json!({}));
    tch::manual_seed(99);
    assert_eq!(bits(&model), bits(&make(json!({}), Precision::Bf16, 1)));
    assert_ne!(bits(&model)[0], bits(&make(json!({}), Precision::Fp32, 2))[0]);
    // A layer more changes no tensor that both have, but for the depth's factor on two of them.
    let deeper = fp32(json!({"num_hidden_layers": 3}));
    for (Parameter { name, weight, .. }, b) in model.parameters().iter().zip(deeper.parameters()).take(19) {
        let depends = name.contains("o_proj") || name.contains("down_proj");
        assert_eq!(values(weight.values()) == values(b.values()), !depends, "{name}");
    }
    let deviation = |name: &str| {
        let parameter = model.parameters().iter().find(|have| have.name.contains(name)).unwrap();
        parameter.values().f_std(false).unwrap().f_double_value(&[]).unwrap()
    };
    for (name, expected) in [("up_proj", 0.02), ("down_proj", 0.01)] {
        assert!((deviation(name) / expected - 1.0).abs() < 0.1, "{name}: {}", deviation(name));
    }
}

#[test]
fn shapes_are_known_without_building() {
    for changes in [json!({}), json!({"tie_word_embeddings": true, "attention_bias": true, "head_dim": 16})] {
        let shapes = model::parameter_shapes(ModelKind::Decoder, &description(changes.clone())).unwrap();
        let settings = BuildSettings { device: Device::Cpu, precision: Precision::Fp32, seed: Some(0) };
        let model = model::build(ModelKind::Decoder, &description(changes), &settings).unwrap();
        let built: Vec<_> = model.parameters().iter().map(|p| (p.name.clone(), p.values().size())).collect();
        let planned: Vec<_> = shapes.into_iter().map(|(n, s)| (n, s.into_iter().map(|e| e as i64).collect())).collect();
        assert_eq!(built, planned);
        for parameter in model.parameters() {
            let leaf = parameter.leaf().unwrap();
            assert!(leaf.requires_grad() && leaf.f_is_leaf().unwrap(), "{} is not a leaf", parameter.name);
        }
    }
}

/// A strategy that has the parameters of one stage at a time needs no others for it.
#[test]
fn each_stage_reads_the_parameters_that_are_listed_for_it_and_no_others() {
    for tied in [true, false] {
        let changes = json!({"tie_word_embeddings": tied, "attention_bias": true, "mlp_bias": true});
        let mut stages = vec![Stage::Embed, Stage::Head];
        stages.extend((0..fp32(changes.clone()).blocks()).map(Stage::Block));
        for stage in stages {
            let mut model = fp32(changes.clone());
            let x = model.embed(&tokens(2, 9)).unwrap().f_detach().unwrap();
            // Whatever the stage does not use is not a number.
            let weights = model.parameters().iter().map(|parameter| match parameter.is_used_by(stage) {
                true => parameter.weight.share(),
                false => Weight::Frozen(parameter.values().f_full_like(f64::NAN).unwrap()),
            });
            let weights = weights.collect();
            model.set_parameters(weights).unwrap();
            let out = match stage {
                Stage::Embed => model.embed(&tokens(2, 9)).unwrap(),
                Stage::Block(index) => model.block(index, x, &Spans::whole()).unwrap(),
                Stage::Head => model.head_loss(x, &Targets::all(tokens(2, 9))).unwrap(),
            };
            assert!(values(&out).iter().all(|value| value.is_finite()), "{stage:?} reads more, tied {tied}");
            out.f_sum(Kind::Float).unwrap().f_backward().unwrap();
            for parameter in model.parameters().iter().filter(|parameter| parameter.is_used_by(stage)) {
                let gradient = parameter.leaf().unwrap().f_grad().unwrap();
                assert!(gradient.defined(), "{stage:?} does not read {}, tied {tied}", parameter.name);
            }
        }
    }
    let beyond = Tensor::zeros([1, 1, 32], (Kind::Float, Device::Cpu));
    assert!(fp32(json!({})).block(2, beyond, &Spans::whole()).is_err());
}

#[test]
fn a_frozen_parameter_gets_no_gradient_and_the_others_get_the_same() {
    for (precision, tied) in [(Precision::Fp32, false), (Precision::Bf16, false), (Precision::Fp32, true)] {
        for frozen in ["model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"] {
            let changes = json!({"tie_word_embeddings": tied});
            let (mut model, whole) = (make(changes.clone(), precision, 1), make(changes, precision, 1));
            let weights = model.parameters().iter().map(|parameter| match parameter.name == frozen {
                true => Weight::Frozen(parameter.values().f_detach().unwrap()),
                false => parameter.weight.share(),
            });
            let weights = weights.collect();
            model.set_parameters(weights).unwrap();
            let [a, b] = [&model, &whole].map(|model| model.loss(&tokens(2, 9)).unwrap());
            assert_eq!(value(&a).to_bits(), value(&b).to_bits(), "{frozen}");
            a.f_backward().unwrap();
            b.f_backward().unwrap();
            for (have, want) in model.parameters().iter().zip(whole.parameters()) {
                match have.leaf() {
                    None => assert!(have.name == frozen && !have.values().f_grad().unwrap().defined()),
                    Some(leaf) => {
                        let want = want.values().f_grad().unwrap();
                        assert_eq!(values(&leaf.f_grad().unwrap()), values(&want), "{}", have.name);
                    }
                }
            }
        }
    }
}

/// What a strategy takes its part of: the weights of a model that is built whole, without its memory.
#[test]
fn a_bare_model_has_the_first_values_of_one_that_is_built() {
    for seed in [1, 2] {
        let settings = BuildSettings { device: Device::Cpu, precision: Precision::Bf16, seed: Some(seed) };
        let described = || families::read(&description(json!({"tie_word_embeddings": true}))).unwrap();
        let (whole, mut bare) =
            (Decoder::new(described(), &settings).unwrap(), Decoder::bare(described(), &settings).unwrap());
        assert!(whole.first_values(0).unwrap().is_none());
        for (number, (built, bare_one)) in whole.parameters().iter().zip(bare.parameters()).enumerate() {
            assert_eq!((&built.name, built.values().size()), (&bare_one.name, bare_one.values().size()));
            assert!(bare_one.values().stride().iter().all(|stride| *stride == 0), "it has memory");
            assert_eq!(values(&bare.first_values(number).unwrap().unwrap()), values(built.values()));
        }
        let weights = whole.parameters().iter().map(|parameter| parameter.weight.share()).collect();
        bare.set_parameters(weights).unwrap();
        assert!(bare.first_values(0).unwrap().is_none());
    }
}

#[test]
fn the_kernel_that_computes_attention_has_a_name() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        let kernel = make(json!({}), precision, 1).attention_kernel(9).unwrap();
        assert!(matches!(kernel, Some("flash" | "math")), "{kernel:?}");
    }
}

#[test]
fn tokens_that_do_not_fit_are_errors() {
    let model = fp32(json!({}));
    for shape in [vec![4], vec![2, 66], vec![2, 1], vec![2, 0], vec![0, 8], vec![1, 2, 3]] {
        let tokens = Tensor::f_zeros(&shape, (Kind::Int64, Device::Cpu)).unwrap();
        assert!(matches!(model.loss(&tokens), Err(ModelError::Input { .. })), "{shape:?}");
    }
    let unknown = Tensor::f_full([1, 4], 96, (Kind::Int64, Device::Cpu)).unwrap();
    assert!(matches!(model.loss(&unknown), Err(ModelError::Torch { .. })));
    assert!(model.loss(&tokens(1, 65)).is_ok());
}
