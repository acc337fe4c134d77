//! Sampling from a model: to see what it has learnt, not to serve it.
//!
//! Each token is a forward pass over the last positions (at most the model's longest sequence), with no cache of
//! keys and values: a few hundred tokens of a small model take seconds, and there is no second copy of the network to
//! keep equal to the first. The choice is made on the CPU from one seed.

use tch::Tensor;

use super::{Doing, Model, ModelError, random::SplitMix64};

/// How to sample.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateSettings {
    /// The most tokens to add.
    pub max_new_tokens: u32,
    /// Scores are divided by it; 0: always the most likely token.
    pub temperature: f64,
    /// Seed of the choices.
    pub seed: u64,
    /// Each of these ends the text; it is not returned.
    pub stop: Vec<u32>,
}

/// The tokens that follow `prompt`, which has at least one; each is passed to `heard` as soon as it is known, which
/// returns whether to go on.
pub fn generate(
    model: &dyn Model,
    prompt: &[u32],
    settings: &GenerateSettings,
    mut heard: impl FnMut(u32) -> bool,
) -> Result<Vec<u32>, ModelError> {
    if prompt.is_empty() {
        return Err(ModelError::Input { what: "prompt", reason: "is empty".into() });
    }
    if let Some(token) = prompt.iter().find(|&&token| token >= model.vocab_size()) {
        let reason = format!("has token {token}; the model knows {} tokens", model.vocab_size());
        return Err(ModelError::Input { what: "prompt", reason });
    }
    if !(settings.temperature >= 0.0 && settings.temperature.is_finite()) {
        let reason = format!("is {}, not a finite number from 0", settings.temperature);
        return Err(ModelError::Input { what: "temperature", reason });
    }
    let _no_grad = tch::no_grad_guard();
    let mut random = SplitMix64::named(settings.seed, "generate");
    let mut tokens: Vec<i64> = prompt.iter().map(|&token| token.into()).collect();
    let mut new = Vec::new();
    let window = model.max_sequence_length() as usize;
    for _ in 0..settings.max_new_tokens {
        let context = &tokens[tokens.len().saturating_sub(window)..];
        let context = Tensor::f_from_slice(context)
            .and_then(|context| context.f_unsqueeze(0)?.f_to_device(model.device()))
            .doing("move tokens to the device")?;
        let scores = model.last_logits(&context)?.f_flatten(0, -1).doing("read logits")?;
        let scores = Vec::<f32>::try_from(&scores).doing("read logits")?;
        let token = choose(&scores, settings.temperature, random.next_f64()).ok_or_else(|| ModelError::Input {
            what: "model",
            reason: "gives scores that are not numbers; its weights are damaged or training diverged".into(),
        })?;
        if settings.stop.contains(&token) {
            break;
        }
        new.push(token);
        if !heard(token) {
            break;
        }
        tokens.push(token.into());
    }
    Ok(new)
}

/// Index of the chosen score; `uniform` is from [0, 1). `None` if a score is NaN or infinite, or there is none.
fn choose(scores: &[f32], temperature: f64, uniform: f64) -> Option<u32> {
    let best = scores.iter().enumerate().max_by(|(_, a), (_, b)| a.total_cmp(b))?;
    if !scores.iter().all(|score| score.is_finite()) {
        return None;
    }
    let best = if temperature == 0.0 {
        best.0
    } else {
        let top = f64::from(*best.1);
        let weights: Vec<f64> = scores.iter().map(|&s| ((f64::from(s) - top) / temperature).exp()).collect();
        let mut left = uniform * weights.iter().sum::<f64>();
        // Rounding may leave a rest after the last weight: then the best one is chosen.
        weights
            .iter()
            .position(|weight| {
                left -= weight;
                left < 0.0
            })
            .unwrap_or(best.0)
    };
    u32::try_from(best).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tch::Device;

    use super::*;
    use crate::{
        config::{ModelKind, Precision},
        model::{BuildSettings, build},
    };

    fn model() -> Box<dyn Model> {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 8, "initializer_range": 0.5,
        });
        let settings = BuildSettings { device: Device::Cpu, precision: Precision::Fp32, seed: Some(5) };
        build(ModelKind::Decoder, &config, &settings).unwrap()
    }

    const GREEDY: GenerateSettings =
        GenerateSettings { max_new_tokens: 12, temperature: 0.0, seed: 1, stop: Vec::new() };

    #[test]
    fn greedy_text_is_the_most_likely_one_even_beyond_the_longest_sequence() {
        let model = model();
        let mut heard = Vec::new();
        let text = generate(&*model, &[3, 1, 4], &GREEDY, |token| {
            heard.push(token);
            true
        })
        .unwrap();
        assert_eq!((text.len(), &heard), (12, &text));
        let mut all = vec![3_i64, 1, 4];
        for &token in &text {
            let context = Tensor::f_from_slice(&all[all.len().saturating_sub(8)..]).unwrap().f_unsqueeze(0).unwrap();
            let best = model.last_logits(&context).unwrap().f_argmax(-1, false).unwrap();
            assert_eq!(best.f_int64_value(&[0]).unwrap(), i64::from(token));
            all.push(token.into());
        }
        // Before a token that has not come yet, the text ends there.
        let stop = *text.iter().find(|token| **token != text[0]).unwrap();
        let cut = text.iter().position(|token| *token == stop).unwrap();
        let stopped =
            generate(&*model, &[3, 1, 4], &GenerateSettings { stop: vec![99_999, stop], ..GREEDY }, |_| true).unwrap();
        assert_eq!(stopped, text[..cut]);
    }

    #[test]
    fn a_seed_gives_its_text_again_and_another_seed_another() {
        let model = model();
        let text = |seed| {
            let settings = GenerateSettings { temperature: 1.0, seed, ..GREEDY };
            generate(&*model, &[0], &settings, |_| true).unwrap()
        };
        assert_eq!(text(1), text(1));
        assert_ne!(text(1), text(2));
    }

    #[test]
    fn choices_follow_the_probabilities() {
        let scores = [0.0, 3.0_f32.ln(), f32::MIN];
        let mut random = SplitMix64::new(11);
        let mut counts = [0; 3];
        for _ in 0..4000 {
            counts[choose(&scores, 1.0, random.next_f64()).unwrap() as usize] += 1;
        }
        assert!((900..1100).contains(&counts[0]) && counts[2] == 0, "{counts:?}");
        // At half the temperature probabilities are squared: 1 to 9.
        let colder = (0..4000).filter(|_| choose(&scores, 0.5, random.next_f64()) == Some(0)).count();
        assert!((330..470).contains(&colder), "{colder}");
        assert_eq!(choose(&scores, 0.0, 0.999), Some(1));
        assert_eq!(choose(&[0.0, f32::NAN], 1.0, 0.5), None);
        assert_eq!(choose(&[0.0, f32::INFINITY], 0.0, 0.5), None);
        assert_eq!(choose(&[], 1.0, 0.5), None);
    }

    #[test]
    fn prompts_that_do_not_fit_are_errors() {
        let model = model();
        for (prompt, temperature) in
            [(&[][..], 1.0), (&[40], 1.0), (&[1], -1.0), (&[1], f64::NAN), (&[1], f64::INFINITY)]
        {
            let settings = GenerateSettings { temperature, ..GREEDY };
            assert!(matches!(generate(&*model, prompt, &settings, |_| true), Err(ModelError::Input { .. })));
        }
    }
}
