//! How many floating-point operations a model needs: for comparing speeds with what devices can do. Pure.
//!
//! A product of an `[a, b]` matrix and a vector takes 2·a·b operations; gradients with respect to the vector and to the
//! matrix take as many each. Norms, activations and rotary embeddings count nothing, as is usual (Chowdhery et al.,
//! arXiv 2204.02311, appendix B). Attention is causal here: on average a token attends to half of the sequence, or to
//! its window. Forward passes that are made again to save memory count nothing either: it is the model's need.

use super::{DecoderConfig, ModelError, decoder::config::EMBEDDING, describe};
use crate::config::{LoraConfig, ModelKind};

/// Operations of a training step for each of its tokens, in sequences of `length` tokens: forward, backward, no update.
/// With `lora`, the weights beside the adapters get no gradients.
///
/// # Errors
/// A description that is no model's.
pub fn per_token(
    kind: ModelKind,
    config: &serde_json::Value,
    lora: Option<&LoraConfig>,
    length: u32,
) -> Result<u64, ModelError> {
    let model = describe(kind, config)?;
    let (matrices, attention) = (matrices(&model), attention(&model, length.into()));
    Ok(match lora {
        None => 3 * 2 * matrices + 3 * attention,
        Some(lora) => {
            let adapters = super::lora::parameters(kind, config, lora)?;
            2 * 2 * matrices + 3 * 2 * adapters + 3 * attention
        }
    })
}

/// Elements of the matrices that a token is multiplied with: all but an embedding that is not the output layer, too.
fn matrices(model: &DecoderConfig) -> u64 {
    let looked_up = |name: &str| name == EMBEDDING && !model.tie_word_embeddings;
    let shapes = model.parameter_shapes();
    let matrices = shapes.iter().filter(|(name, shape)| shape.len() == 2 && !looked_up(name));
    matrices.map(|(_, shape)| shape.iter().product::<u64>()).sum()
}

/// Forward operations for each token: scores and the mix of values, with as many positions as it attends to on average.
fn attention(model: &DecoderConfig, length: u64) -> u64 {
    let twice_attended = |window: Option<u32>| {
        let window = window.map_or(length, |window| u64::from(window).min(length));
        // Of `length` tokens, the first `window` attend to 1, 2, … positions, the others to `window` each.
        (window * (window + 1) + 2 * (length - window) * window).checked_div(length).unwrap_or(0)
    };
    model.layers.iter().map(|layer| 2 * model.query_width() * twice_attended(layer.window)).sum()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// 2 layers of width 8: 2 heads of 4, 1 of them for keys; 16 tokens.
    fn config() -> serde_json::Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        })
    }

    #[test]
    fn products_with_weights_and_between_tokens_are_counted() {
        // q, k, v, o; gate, up, down; the output layer.
        let matrices = 2 * (8 * 8 + 4 * 8 + 4 * 8 + 8 * 8 + 3 * 12 * 8) + 16 * 8;
        // 1 + 2 + … + 6 positions for 6 tokens, twice 2·8 operations each, in 2 layers.
        let attention = 2 * (2 * 2 * 8) * 21 / 6;
        let flops = |config: &serde_json::Value| per_token(ModelKind::Decoder, config, None, 6).unwrap();
        assert_eq!(flops(&config()), 6 * matrices + 3 * attention);
        // One that is tied has the same products.
        let mut tied = config();
        tied["tie_word_embeddings"] = true.into();
        assert_eq!(flops(&tied), flops(&config()));
    }

    #[test]
    fn a_window_is_all_that_a_token_attends_to() {
        let mut model = describe(ModelKind::Decoder, &config()).unwrap();
        model.layers.truncate(1);
        model.layers[0].window = Some(3);
        // 1, 2, 3, 3, 3, 3 positions.
        assert_eq!(attention(&model, 6), 2 * 2 * 8 * 15 / 6);
        model.layers[0].window = Some(100);
        assert_eq!(attention(&model, 6), 2 * 2 * 8 * 21 / 6);
    }

    #[test]
    fn weights_beside_adapters_get_no_gradient() {
        let lora =
            LoraConfig { rank: 2, alpha: 4.0, targets: vec![crate::config::ALL_LINEAR.into()], base: Vec::new() };
        let flops = |lora| per_token(ModelKind::Decoder, &config(), lora, 6).unwrap();
        let adapters = super::super::lora::parameters(ModelKind::Decoder, &config(), &lora).unwrap();
        let model = describe(ModelKind::Decoder, &config()).unwrap();
        assert_eq!(flops(None) + 6 * adapters, flops(Some(&lora)) + 2 * matrices(&model));
        // The bundled model of a thousand million parameters: 7.8 thousand million operations a token.
        let config = serde_json::from_str(include_str!("../../configs/models/llama-1b.json")).unwrap();
        let flops = per_token(ModelKind::Decoder, &config, None, 2048).unwrap();
        assert!((7.7e9..7.9e9).contains(&(flops as f64)), "{flops}");
    }
}
