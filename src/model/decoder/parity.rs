//! Every family against what Hugging Face transformers computes: the fixture is `tests/fixtures/family-parity.json`,
//! and the script that made it lies beside it.

use serde::Deserialize;

use super::{super::families, tests::*, *};
use crate::{config::ModelKind, ids::Step, model, torch};

#[derive(Deserialize)]
struct Fixture {
    tokens: Vec<Vec<i64>>,
    adamw: AdamW,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct AdamW {
    lr: f64,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    config: serde_json::Value,
    saved_by_4: serde_json::Value,
    saved_by_5: serde_json::Value,
    parameters: Vec<String>,
    logits: Vec<f32>,
    loss: f64,
    gradients: Vec<[f64; 2]>,
    loss_after_step: f64,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("../../../tests/fixtures/family-parity.json")).unwrap()
}

/// Each case by LibTorch's operations, and by the fused functions.
fn both_ways(cases: &[Case]) -> impl Iterator<Item = (&Case, Fused)> {
    cases.iter().flat_map(|case| [Fused::NONE, Fused::ALL].map(|fused| (case, fused)))
}

fn with_formula(case: &Case, precision: Precision) -> Decoder {
    tch::set_num_threads(1);
    let settings = BuildSettings { device: Device::Cpu, precision, seed: Some(0) };
    let model = Decoder::new(families::read(&case.config).unwrap(), &settings).unwrap();
    let names: Vec<_> = model.parameters().iter().map(|parameter| parameter.name.clone()).collect();
    assert_eq!(names, case.parameters, "{}", case.name);
    let plus_one = model.config.scale == NormScale::PlusOne;
    fill(&model, |p, name, i| {
        let norm = if name.ends_with("norm.weight") && !plus_one { 1.0 } else { 0.0 };
        (0.37 * i as f64 + p as f64).sin() * 0.3 + norm
    });
    model
}

fn batch(fixture: &Fixture) -> Tensor {
    let rows = fixture.tokens.len() as i64;
    Tensor::f_from_slice(&fixture.tokens.concat()).unwrap().f_view([rows, -1]).unwrap()
}

#[test]
fn every_family_has_cases() {
    let fixture = fixture();
    for family in families::FAMILIES {
        let of_family = |case: &&Case| case.config["model_type"] == family.model_type;
        assert!(fixture.cases.iter().filter(of_family).count() >= 2, "{}", family.model_type);
    }
    assert_eq!(fixture.cases.len(), 16);
}

/// As given, and as either version of transformers writes it: in both spellings, with all of their own keys.
#[test]
fn each_spelling_of_a_configuration_is_the_same_model() {
    for case in fixture().cases {
        let read = families::read(&case.config).unwrap();
        for config in [&case.config, &case.saved_by_4, &case.saved_by_5] {
            model::check_description(ModelKind::Decoder, config)
                .unwrap_or_else(|error| panic!("{}: {error}", case.name));
            assert_eq!(families::read(config).unwrap(), read, "{}", case.name);
        }
    }
}

#[test]
fn logits_gradients_and_a_step_are_those_of_hugging_face() {
    let fixture = fixture();
    let all = batch(&fixture);
    let inputs = all.f_narrow(1, 0, all.size()[1] - 1).unwrap();
    for (case, fused) in both_ways(&fixture.cases) {
        let mut model = with_formula(case, Precision::Fp32);
        model.use_fused(fused);
        let logits = values(&model.logits(&inputs).unwrap().f_get(0).unwrap());
        let far = furthest(&logits, &case.logits);
        assert!(far < 1e-5, "{}: logits differ by {far}", case.name);

        let loss = model.loss(&all).unwrap();
        assert!((value(&loss) - case.loss).abs() < 5e-6, "{}: loss {}, not {}", case.name, value(&loss), case.loss);
        loss.f_backward().unwrap();
        let leaves: Vec<Tensor> = model.parameters().iter().map(|p| p.values().shallow_clone()).collect();
        let gradients: Vec<Tensor> = leaves.iter().map(|leaf| leaf.f_grad().unwrap()).collect();
        for ((name, gradient), expected) in case.parameters.iter().zip(&gradients).zip(&case.gradients) {
            let gradient = values(gradient);
            let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            let inner: f64 = gradient.iter().enumerate().map(|(i, &g)| f64::from(g) * (i as f64).cos()).sum();
            let close = |a: f64, b: f64| (a - b).abs() < 5e-6 + 5e-5 * expected[0];
            assert!(
                close(norm, expected[0]) && close(inner, expected[1]),
                "{}: gradient of {name} is {norm} {inner}, not {expected:?}",
                case.name
            );
        }

        let zeros = || leaves.iter().map(|leaf| leaf.f_detach().unwrap().f_zeros_like().unwrap()).collect::<Vec<_>>();
        let (exp_avgs, exp_avg_sqs) = (zeros(), zeros());
        let AdamW { lr, betas: [beta1, beta2], eps, weight_decay } = fixture.adamw;
        let settings = torch::AdamW { lr, beta1, beta2, eps, weight_decay };
        let moments = torch::Moments { exp_avgs: &exp_avgs, exp_avg_sqs: &exp_avg_sqs };
        let _no_grad = tch::no_grad_guard();
        torch::adamw_step(&leaves, &gradients, moments, Step(1), &settings, None).unwrap();
        let after = value(&model.loss(&all).unwrap());
        // A first step is the sign of the gradient: where one is nearly zero, its sign is rounding.
        assert!((after - case.loss_after_step).abs() < 1e-3, "{}: {after}, not {}", case.name, case.loss_after_step);
    }
}

/// Windows and positions, too, stay within a document.
#[test]
fn a_packed_document_has_the_scores_that_it_has_alone_in_every_family() {
    let fixture = fixture();
    let tokens = batch(&fixture).f_narrow(1, 0, 12).unwrap();
    let mut spans = Spans::whole();
    spans.set([&[0, 3][..], &[0]], 12, Device::Cpu).unwrap();
    for (case, fused) in both_ways(&fixture.cases) {
        let mut model = with_formula(case, Precision::Fp32);
        model.use_fused(fused);
        let scores = |tokens: &Tensor, spans: &Spans| {
            let x = model.vectors(tokens, spans).unwrap();
            model.head_scores(x, Positions::All).unwrap()
        };
        let packed = scores(&tokens, &spans);
        for (row, begin, len) in [(0, 0, 3), (0, 3, 9), (1, 0, 12)] {
            let part = |x: &Tensor| x.f_narrow(0, row, 1).unwrap().f_narrow(1, begin, len).unwrap();
            let far = furthest(&values(&part(&packed)), &values(&scores(&part(&tokens), &Spans::whole())));
            assert!(far < 1e-5, "{}: {far} in row {row} from {begin}", case.name);
        }
    }
}

/// Each part of a description shows in the scores: the fixture would notice if it were left out.
#[test]
fn no_part_of_a_description_can_be_left_out() {
    type Change = fn(&mut DecoderConfig);
    let fixture = fixture();
    let inputs = batch(&fixture).f_narrow(1, 0, 12).unwrap();
    let changes: [(&str, &str, Change); 13] = [
        ("qwen3", "query_key_norm", |config| config.query_key_norm = None),
        ("olmo2", "query_key_norm", |config| config.query_key_norm = None),
        ("qwen2", "biases", |config| config.biases.inputs = false),
        ("llama", "the output's bias", |config| config.biases.output = false),
        ("smollm3_interval", "biases of the feed-forward layer", |config| config.biases.mlp = false),
        ("smollm3", "a layer without positions", |config| config.layers[1].rope = Some(0)),
        ("mistral_window", "window", |config| config.layers.iter_mut().for_each(|layer| layer.window = None)),
        ("mistral_window", "one position more", |config| config.layers[0].window = Some(6)),
        ("gemma3", "local wavelengths", |config| config.layers[0].rope = Some(0)),
        ("gemma3", "embedding_scale", |config| config.embedding_scale = None),
        ("gemma3", "attention_scale", |config| config.attention_scale = None),
        ("gemma3", "activation", |config| config.activation = Activation::Silu),
        ("llama_linear_rope", "scaling", |config| config.ropes[0].scaling = None),
    ];
    for (name, what, change) in changes {
        let case = fixture.cases.iter().find(|case| case.name == name).unwrap();
        let mut config = families::read(&case.config).unwrap();
        change(&mut config);
        let settings = BuildSettings { device: Device::Cpu, precision: Precision::Fp32, seed: None };
        let changed = Decoder::new(config, &settings).unwrap();
        let whole = with_formula(case, Precision::Fp32);
        let _no_grad = tch::no_grad_guard();
        for parameter in changed.parameters() {
            let from = whole.parameters().iter().find(|whole| whole.name == parameter.name).unwrap();
            parameter.values().shallow_clone().f_copy_(from.values()).unwrap();
        }
        let logits = values(&changed.logits(&inputs).unwrap().f_get(0).unwrap());
        let far = furthest(&logits, &case.logits);
        assert!(far > 1e-4, "{name}: without {what} the scores differ by {far}");
    }
}

/// How far bf16 is from fp32: the figure that `src/model/README.md` states.
#[test]
fn bf16_differs_by_its_rounding_in_every_family() {
    let fixture = fixture();
    let all = batch(&fixture);
    for (case, fused) in both_ways(&fixture.cases) {
        let mut model = with_formula(case, Precision::Bf16);
        model.use_fused(fused);
        let loss = model.loss(&all).unwrap();
        assert!((value(&loss) - case.loss).abs() < 0.02 * case.loss, "{}: {} {}", case.name, value(&loss), case.loss);
    }
}
