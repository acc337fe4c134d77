//! What a new run starts from: a model folder's weights, which must be those of the model, and its tokenizer, which
//! must be the data's.

use crate::{
    checkpoint::{
        CheckpointError,
        foreign::{self, Expected},
        restore::RemoteFile,
    },
    config::{self, DataConfig, ModelConfig, StorageConfig, TokenizerRule},
    data::meaning::Meaning,
    error::{Context, Error, Kind, Result},
    layout, model,
    storage::{StorageError, Store},
};

/// The largest `tokenizer.json` that is read. Those in use are smaller.
const MAX_TOKENIZER: u64 = 256 << 20;

/// Opens the folder. A local folder that does not exist is not created.
pub fn open(uri: &str, storage: &StorageConfig) -> Result<Store> {
    if config::local_path(uri).is_some_and(|path| !path.exists()) {
        return Err(Error::new(Kind::Config, format!("model.init_from: there is no folder {uri}"))
            .with_hint("name a Hugging Face model folder, here or in a store"));
    }
    if let Some(path) = config::local_path(uri) {
        if path.is_file() {
            let folder = path.parent().map(|folder| folder.display().to_string()).unwrap_or_default();
            return Err(Error::new(Kind::Config, format!("model.init_from: {} is a file", path.display()))
                .with_hint(format!("name the model folder: model.init_from = \"{folder}\"")));
        }
        let entries = std::fs::read_dir(&path).into_iter().flatten().filter_map(Result::ok);
        for file in entries.map(|entry| entry.path()) {
            let is_model = file.extension().is_some_and(|ending| ending == "json" || ending == "safetensors");
            let kind = std::fs::metadata(&file).map(|metadata| metadata.file_type());
            // Reading a pipe would wait for a writer without end.
            if is_model && kind.is_ok_and(|kind| !kind.is_file() && !kind.is_dir()) {
                let what = format!("model.init_from: {} is a pipe, a socket or a device, not a file", file.display());
                return Err(Error::new(Kind::Config, what));
            }
        }
    }
    Ok(Store::open(uri, storage)?)
}

/// The files of the folder's weights; each of their tensors belongs to the model, or is harmless.
pub async fn weights(model: &ModelConfig, uri: &str, folder: &Store) -> Result<Vec<RemoteFile>> {
    let shapes = model::parameter_shapes(model.kind, &model.config)?;
    let (head, embedding, tied) = model::head(model.kind, &model.config)?;
    let expected = Expected { shapes: &shapes, head, embedding, tied };
    let found = foreign::weights_for(folder, expected).await;
    if matches!(found, Err(CheckpointError::NotAModel { .. })) && folder.head(layout::ADAPTER_CONFIG).await.is_ok() {
        let what = format!("model.init_from: {uri} holds adapters, and not a whole model");
        return Err(Error::new(Kind::Config, what).with_hint(
            "merge them into their model: trainer export --run-id ID --merge --out DIR, or merge_and_unload in PEFT",
        ));
    }
    found.context(format!("read weights of {uri}"))
}

/// Checks the folder's tokenizer against the data's, unless the configuration says that they differ.
pub async fn check_tokenizer(settings: &DataConfig, uri: &str, folder: &Store, data: &Meaning) -> Result<()> {
    if settings.tokenizer == TokenizerRule::Differs {
        return Ok(());
    }
    const DIFFERS: &str = "data.tokenizer = \"differs\" says that the weights are to learn another vocabulary";
    let wrong = |message: String, hint: String| Err(Error::new(Kind::Config, message).with_hint(hint));
    let json = match folder.get(layout::TOKENIZER, MAX_TOKENIZER).await {
        Ok(json) => json,
        Err(StorageError::NotFound { .. }) => {
            return wrong(
                format!("{uri} has no tokenizer.json to compare the data's tokenizer with"),
                format!("put the model's tokenizer.json into that folder; {DIFFERS}"),
            );
        }
        Err(error) => return Err(Error::from(error).context(format!("read the tokenizer of {uri}"))),
    };
    let model = match Meaning::of_json(&json) {
        Ok(model) => model,
        Err(reason) => {
            let hint = format!("put the model's own tokenizer.json into that folder; {DIFFERS}");
            return wrong(format!("tokenizer.json of {uri} {reason}"), hint);
        }
    };
    let Some(difference) = data.difference(&model) else { return Ok(()) };
    let path = config::local_path(uri).map_or_else(|| uri.to_owned(), |path| path.display().to_string());
    wrong(
        format!("the tokenizer of {} is not that of {uri} (there): {difference}", settings.train),
        format!(
            "prepare the data with the model's: trainer data prepare --tokenizer {path}/tokenizer.json …; {DIFFERS}"
        ),
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::{Value, json};

    use super::*;
    use crate::{
        checkpoint::testing::memory_store,
        config::ModelKind,
        format::header::{self, Dtype},
    };

    type Tensors = BTreeMap<String, (Dtype, Vec<u64>)>;

    fn model(architecture: &str, changes: Value) -> ModelConfig {
        let mut config = json!({
            "architectures": [architecture], "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "head_dim": 4,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        });
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        ModelConfig { kind: ModelKind::Decoder, config, init_from: None, lora: None }
    }

    fn tensors(model: &ModelConfig) -> Tensors {
        let shapes = model::parameter_shapes(model.kind, &model.config).unwrap();
        shapes.into_iter().map(|(name, shape)| (name, (Dtype::BF16, shape))).collect()
    }

    /// A folder with the weights of one model, after a change to them, looked at as those of another.
    async fn look(
        of: &ModelConfig,
        change: impl FnOnce(&mut Tensors),
        expected: &ModelConfig,
    ) -> Result<Vec<RemoteFile>> {
        let mut tensors = tensors(of);
        change(&mut tensors);
        let entries = tensors.iter().map(|(name, (dtype, shape))| (name.as_str(), *dtype, shape.as_slice()));
        let mut file = header::write(entries).unwrap();
        let data: u64 = tensors.values().map(|(dtype, shape)| dtype.bytes(shape).unwrap()).sum();
        file.extend((0..data).map(|byte| byte as u8));
        let store = memory_store();
        store.put(layout::MODEL, file.into()).await.unwrap();
        weights(expected, "memory://", &store).await
    }

    #[test]
    fn a_file_in_the_place_of_the_folder_is_said_to_be_one() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        std::fs::write(&file, "x").unwrap();
        let error = open(&format!("file://{}", file.display()), &StorageConfig::plain(4, 1)).err().unwrap();
        assert_eq!(error.kind(), Kind::Config);
        assert!(error.to_string().contains("model.safetensors is a file"), "{error}");
    }

    #[tokio::test]
    async fn a_folder_of_every_family_is_accepted_and_one_of_another_family_is_refused_by_tensor() {
        let families = [
            "LlamaForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "Olmo2ForCausalLM",
            "Phi3ForCausalLM",
            "Gemma3ForCausalLM",
        ];
        for of in families {
            for expected in families {
                // Each of these has other tensors than the others.
                let tied = json!({"tie_word_embeddings": false});
                let (own, other) = (model(of, tied.clone()), model(expected, tied));
                let result = look(&own, |_| {}, &other).await;
                assert_eq!(result.is_ok(), of == expected, "{of} as {expected}: {result:?}");
                if let Err(error) = result {
                    assert_eq!(error.kind(), Kind::Config, "{of} as {expected}");
                    assert!(format!("{error:?}").contains("tensor model."), "{error:?}");
                }
            }
        }
    }

    #[tokio::test]
    async fn weights_that_the_configuration_does_not_say_are_refused_by_name() {
        type Change = fn(&mut Tensors);
        const BIAS: &str = "model.layers.1.self_attn.v_proj.bias";
        let cases: [(&str, Value, Change, &str); 9] = [
            ("MistralForCausalLM", json!({}), |t| drop(t.insert(BIAS.into(), (Dtype::F32, vec![4]))), BIAS),
            ("Qwen2ForCausalLM", json!({}), |t| drop(t.remove(BIAS)), BIAS),
            (
                "Qwen2ForCausalLM",
                json!({}),
                |t| drop(t.insert("model.layers.0.self_attn.o_proj.bias".into(), (Dtype::F32, vec![8]))),
                "model.layers.0.self_attn.o_proj.bias",
            ),
            (
                "LlamaForCausalLM",
                json!({}),
                |t| drop(t.insert("model.layers.0.self_attn.q_norm.weight".into(), (Dtype::F32, vec![4]))),
                "model.layers.0.self_attn.q_norm.weight",
            ),
            // Over all heads, as another family has it.
            (
                "Qwen3ForCausalLM",
                json!({}),
                |t| drop(t.insert("model.layers.0.self_attn.q_norm.weight".into(), (Dtype::F32, vec![8]))),
                "model.layers.0.self_attn.q_norm.weight",
            ),
            (
                "SmolLM3ForCausalLM",
                json!({}),
                |t| drop(t.insert("lm_head.weight".into(), (Dtype::BF16, vec![8, 8]))),
                "lm_head.weight",
            ),
            ("Olmo2ForCausalLM", json!({}), |t| drop(t.remove("lm_head.weight")), "lm_head.weight"),
            (
                "Phi3ForCausalLM",
                json!({}),
                |t| t.get_mut("model.layers.0.mlp.gate_up_proj.weight").unwrap().1 = vec![8, 16],
                "model.layers.0.mlp.gate_up_proj.weight",
            ),
            (
                "Gemma3ForCausalLM",
                json!({}),
                |t| t.get_mut("model.layers.1.pre_feedforward_layernorm.weight").unwrap().0 = Dtype::I64,
                "model.layers.1.pre_feedforward_layernorm.weight",
            ),
        ];
        for (architecture, changes, change, named) in cases {
            let model = model(architecture, changes);
            look(&model, |_| {}, &model).await.unwrap();
            let error = look(&model, change, &model).await.unwrap_err();
            let said = format!("{error:?}");
            assert!(said.contains(named), "{architecture}, {named}: {said}");
            assert_eq!(error.kind(), Kind::Config, "{architecture}, {named}");
        }
    }
}
