//! A model from a Hugging Face model folder, for inspection: `config.json` and `model.safetensors`.

use std::path::Path;

use tch::{Device, Tensor};

use super::{BuildSettings, Doing, Model, ModelError, build};
use crate::{
    config::{self, ModelKind, Precision},
    layout,
};

/// The longest `config.json` that is read, bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// Builds the model of a folder that `trainer export` wrote, with its weights, on the CPU, in fp32.
///
/// # Errors
/// On files that can't be read, a description that is not a model's, and weights that are missing or have other shapes.
pub fn from_folder(kind: ModelKind, folder: &Path) -> Result<Box<dyn Model>, ModelError> {
    let input = |what, reason: String| ModelError::Input { what, reason };
    let config = folder.join(layout::MODEL_CONFIG);
    let config = config::read_small(&config, MAX_CONFIG)
        .map_err(|error| error.to_string())
        .and_then(|bytes| serde_json::from_slice(config::without_bom(&bytes)).map_err(|error| error.to_string()))
        .map_err(|reason| input("config.json", format!("can't be read: {reason}")))?;
    let settings = BuildSettings { device: Device::Cpu, precision: Precision::Fp32, seed: None };
    let model = build(kind, &config, &settings)?;
    let weights = Tensor::read_safetensors(folder.join(layout::MODEL)).doing("read model.safetensors")?;
    let _no_grad = tch::no_grad_guard();
    for parameter in model.parameters() {
        let (name, values) = (&parameter.name, parameter.values());
        let (_, weight) = weights
            .iter()
            .find(|(other, _)| other == name)
            .ok_or_else(|| ModelError::NoParameter { name: name.clone() })?;
        if weight.size() != values.size() {
            let (found, wanted) = (weight.size(), values.size());
            return Err(input("model.safetensors", format!("has {name} of shape {found:?}, not {wanted:?}")));
        }
        values.shallow_clone().f_copy_(weight).doing("copy weights")?;
    }
    Ok(model)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(hidden: u32) -> serde_json::Value {
        serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "hidden_size": hidden,
            "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
            "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
        })
    }

    #[test]
    fn a_model_comes_back_with_its_weights() {
        let folder = tempfile::tempdir().unwrap();
        let settings = BuildSettings { device: Device::Cpu, precision: Precision::Fp32, seed: Some(7) };
        let model = build(ModelKind::Decoder, &config(16), &settings).unwrap();
        let tensors = model.parameters().iter().map(|parameter| (&parameter.name, parameter.values()));
        Tensor::write_safetensors(&tensors.collect::<Vec<_>>(), folder.path().join(layout::MODEL)).unwrap();
        std::fs::write(folder.path().join(layout::MODEL_CONFIG), config(16).to_string()).unwrap();
        let read = from_folder(ModelKind::Decoder, folder.path()).unwrap();
        for (a, b) in model.parameters().iter().zip(read.parameters()) {
            assert!(a.values().equal(b.values()), "{}", a.name);
        }

        std::fs::write(folder.path().join(layout::MODEL_CONFIG), config(8).to_string()).unwrap();
        let error = from_folder(ModelKind::Decoder, folder.path()).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("model.embed_tokens.weight of shape [32, 16], not [32, 8]"), "{error}");
        std::fs::write(folder.path().join(layout::MODEL_CONFIG), "{").unwrap();
        assert!(from_folder(ModelKind::Decoder, folder.path()).is_err());
    }
}
