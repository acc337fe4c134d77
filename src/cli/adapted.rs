//! A run's adapters together with the weights that they were trained beside: for generating text, and for merging.
//!
//! The base is read from `model.init_from` and held against the checksums of the run's journal, as at every start of
//! the run. *Memory:* all weights in fp32, and the base's files meanwhile.

use std::{collections::BTreeMap, path::Path};

use bytes::Bytes;
use tch::{Device, Kind as Element, Tensor};

use super::store;
use crate::{
    config::{LoraConfig, ModelConfig, Precision},
    error::{Context, Error, Kind, Result},
    format::header::{self, Dtype},
    layout,
    model::{self, BuildSettings, Model},
    torch,
    train::state::{Role, Row, State, Tensors},
    workload::Base,
};

/// Positions of the sequence on which a merged model is compared with an unmerged one.
const COMPARED: u32 = 64;

/// A model with a checkpoint's adapters, on the CPU, in fp32.
pub(super) struct Adapted {
    pub model: Box<dyn Model>,
    lora: LoraConfig,
    /// The base's own files have all weights in bf16.
    is_bf16: bool,
}

impl Adapted {
    /// The model of a run whose configuration has `config`; `None`: its checkpoints are whole models. `folder`: where
    /// the checkpoint was exported to.
    pub async fn load(config: &ModelConfig, folder: &Path) -> Result<Option<Self>> {
        let ModelConfig { kind, config: description, init_from, lora } = config;
        let (Some(lora), Some(uri)) = (lora, init_from) else { return Ok(None) };
        let base = Base::of_existing_run(uri, lora, &store::LIMITS).await?.files()?;
        let path = folder.join(layout::ADAPTER);
        let adapters: Bytes = std::fs::read(&path)
            .map_err(|error| Error::from_source(Kind::Unavailable, error).context(format!("read {}", path.display())))?
            .into();
        let settings = BuildSettings { device: Device::Cpu, precision: Precision::Fp32, seed: None };
        let model = model::lora::build(*kind, description, &settings, lora)?;
        let mut is_bf16 = true;
        for file in &base {
            is_bf16 &= header::read_foreign(file)?.iter().all(|tensor| tensor.dtype == Dtype::BF16.name());
        }
        State::of_base(model.as_ref())?.load(&base, true).context(format!("load the weights of {uri}"))?;
        let row = Row { role: Role::Weight, tensors: Tensors::OfModel };
        State::new(model.as_ref(), &[row])?.load(&[adapters], true).context("load the adapters")?;
        Ok(Some(Self { model, lora: lora.clone(), is_bf16 }))
    }

    /// The element type of merged weights, unless one is asked for: that of the base.
    pub const fn dtype(&self) -> Dtype {
        if self.is_bf16 { Dtype::BF16 } else { Dtype::F32 }
    }

    /// Merges the adapters into the weights; returns `model.safetensors` with elements of this type, and the largest
    /// difference that merging and rounding make to a score of the next token, over a fixed sequence.
    pub fn merge(self, dtype: Dtype) -> Result<(Bytes, f64)> {
        let kind = if dtype == Dtype::BF16 { Element::BFloat16 } else { Element::Float };
        let before = self.scores()?;
        model::lora::merge(self.model.as_ref(), &self.lora, kind)?;
        let apart = self.scores()?.f_sub(&before).and_then(|apart| apart.f_abs()?.f_max()?.f_double_value(&[]));
        let apart = torch::tch_result("compare scores", apart)?;

        let mut weights: BTreeMap<&str, Tensor> = BTreeMap::new();
        for parameter in self.model.parameters().iter().filter(|parameter| parameter.is_base()) {
            let rounded = torch::tch_result("round weights", parameter.values().f_to_kind(kind))?;
            weights.insert(&parameter.name, rounded);
        }
        let extents = |tensor: &Tensor| tensor.size().into_iter().map(|it| u64::try_from(it).unwrap_or(0)).collect();
        let shapes: Vec<(&str, Vec<u64>)> = weights.iter().map(|(name, tensor)| (*name, extents(tensor))).collect();
        let header = header::write(shapes.iter().map(|(name, shape)| (*name, dtype, shape.as_slice())));
        let mut file = header.ok_or_else(|| Error::new(Kind::Config, "the weights are too large for one file"))?;
        for tensor in weights.values() {
            let start = file.len();
            file.resize(start + torch::byte_len(tensor)?, 0);
            torch::store_bytes(tensor, &mut file[start..])?;
        }
        Ok((file.into(), apart))
    }

    fn scores(&self) -> Result<Tensor> {
        let len = i64::from(self.model.max_sequence_length().min(COMPARED));
        let vocabulary = i64::from(self.model.vocab_size());
        // Different tokens of the whole vocabulary, the same at every merge.
        let ids: Vec<i64> = (0..len).map(|at| (at * at * 7919 + at * 31 + 1) % vocabulary).collect();
        let tokens = Tensor::f_from_slice(&ids).and_then(|ids| ids.f_view([1, len]));
        let tokens = torch::tch_result("make tokens", tokens)?;
        Ok(tch::no_grad(|| self.model.logits(&tokens))?)
    }
}

/// A model's description with the element type of its files, in the spellings of all versions of transformers.
pub(super) fn described(config: &[u8], dtype: Dtype) -> Result<Bytes> {
    let mut config: serde_json::Value = serde_json::from_slice(config)
        .map_err(|error| Error::from_source(Kind::Data, error).context("read config.json"))?;
    let name = if dtype == Dtype::BF16 { "bfloat16" } else { "float32" };
    if let Some(map) = config.as_object_mut() {
        if map.contains_key("dtype") {
            map.insert("dtype".into(), name.into());
        }
        map.insert("torch_dtype".into(), name.into());
    }
    serde_json::to_vec_pretty(&config).map(Bytes::from).map_err(|error| Error::from_source(Kind::Bug, error))
}
