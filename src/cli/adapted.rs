//! A run's adapters together with the weights that they were trained beside: for generating text, and for merging.
//!
//! The base is read from `model.init_from` and held against the checksums of the run's journal, as at every start of
//! the run. *Memory:* of a model, all weights in fp32, and the base's files meanwhile; of a merge, one layer at a time.

use std::{collections::HashMap, path::Path, sync::Arc};

use bytes::Bytes;
use tch::{Device, Kind as Element, Tensor};

use super::store;
use crate::{
    checkpoint::{
        export::{self, Change, Exported, Form, Target},
        restore::RemoteFile,
    },
    config::{LoraConfig, ModelConfig, Precision},
    error::{Context, Error, Kind, Result},
    format::header::{self, Dtype, TensorEntry},
    layout,
    model::{self, BuildSettings, Model},
    storage::Store,
    torch,
    train::state::{Role, Row, State, Tensors},
    workload::{self, Base},
};

/// Positions of the sequence on which a merged model is compared with an unmerged one.
const COMPARED: u32 = 64;

/// A model with a checkpoint's adapters, on the CPU, in fp32.
pub(super) struct Adapted {
    pub model: Box<dyn Model>,
    lora: LoraConfig,
}

impl Adapted {
    /// The model of a run whose configuration has `config`; `None`: its checkpoints are whole models. `folder`: where
    /// the checkpoint was exported to.
    pub async fn load(config: &ModelConfig, folder: &Path) -> Result<Option<Self>> {
        let ModelConfig { kind, config: description, init_from, lora } = config;
        let (Some(lora), Some(uri)) = (lora, init_from) else { return Ok(None) };
        let base = Base::of_existing_run(uri, lora, &store::LIMITS).await?.files()?;
        let adapters = adapters(folder)?;
        let settings = BuildSettings { device: Device::Cpu, precision: Precision::Fp32, seed: None };
        let model = model::lora::build(*kind, description, &settings, lora)?;
        State::of_base(model.as_ref())?.load(&base, true).context(format!("load the weights of {uri}"))?;
        let row = Row { role: Role::Weight, tensors: Tensors::OfModel };
        State::new(model.as_ref(), &[row])?.load(&[adapters], true).context("load the adapters")?;
        Ok(Some(Self { model, lora: lora.clone() }))
    }

    /// The largest difference that merging the adapters into weights of this type makes to a score of the next token,
    /// over a fixed sequence.
    pub fn difference(self, dtype: Dtype) -> Result<f64> {
        let before = self.scores()?;
        model::lora::merge(self.model.as_ref(), &self.lora, element(dtype)?)?;
        let apart = self.scores()?.f_sub(&before).and_then(|apart| apart.f_abs()?.f_max()?.f_double_value(&[]));
        Ok(torch::tch_result("compare scores", apart)?)
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

/// The adapters of an exported folder.
fn adapters(folder: &Path) -> Result<Bytes> {
    let path = folder.join(layout::ADAPTER);
    let read = std::fs::read(&path);
    let failed = |error| Error::from_source(Kind::Unavailable, error).context(format!("read {}", path.display()));
    read.map(Bytes::from).map_err(failed)
}

/// A run's base and its adapters, not merged yet: no weights are in memory.
pub(super) struct Merger<'a> {
    model: &'a ModelConfig,
    uri: &'a str,
    base: Store,
    files: Vec<RemoteFile>,
    layers: Layers,
    /// The element type of merged weights.
    pub dtype: Dtype,
}

impl<'a> Merger<'a> {
    /// `None`: the run with this configuration has no adapters. `folder`: where the checkpoint was exported to. Without
    /// an `asked` type, that of the base: bf16 if all of its weights are, else fp32.
    pub async fn open(model: &'a ModelConfig, folder: &Path, asked: Option<Dtype>) -> Result<Option<Self>> {
        let (Some(lora), Some(uri)) = (&model.lora, &model.init_from) else { return Ok(None) };
        let (base, files) = Base::look(uri, lora, &store::LIMITS).await?;
        let dtype = match asked {
            Some(dtype) => dtype,
            None => match export::all_are(&base, files.clone(), Dtype::BF16).await {
                Ok(true) => Dtype::BF16,
                Ok(false) => Dtype::F32,
                Err(error) => return Err(workload::unlike(uri, error)),
            },
        };
        let bytes = adapters(folder)?;
        let tensors = header::read(&bytes).map_err(Error::from).context("read the adapters")?;
        let tensors = tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
        let layers = Layers { bytes, tensors, scale: lora.scale() };
        Ok(Some(Self { model, uri, base, files, layers, dtype }))
    }

    /// Writes the merged model, layer by layer, and these files beside it.
    pub async fn write(self, small: Vec<(String, Bytes)>, target: &Target, form: &Form) -> Result<Exported> {
        if let Target::Store(to) = target
            && to.uri() == self.base.uri()
        {
            let what = format!("{} has the weights that the adapters were trained beside", to.uri());
            return Err(Error::new(Kind::Usage, what).with_hint("name another folder: an export would replace them"));
        }
        let shapes = model::parameter_shapes(self.model.kind, &self.model.config)?;
        let form = Form { dtype: Some(self.dtype), ..*form };
        let base = (&self.base, self.files);
        let exported = export::changed(base, &shapes, Arc::new(self.layers), small, target, &form).await;
        exported.map_err(|error| workload::unlike(self.uri, error))
    }
}

/// The adapters of all layers.
struct Layers {
    /// The file that they are in.
    bytes: Bytes,
    tensors: HashMap<String, TensorEntry>,
    scale: f64,
}

impl Layers {
    fn get(&self, name: &str) -> Option<Result<Tensor, String>> {
        let TensorEntry { dtype, shape, range, .. } = self.tensors.get(name)?;
        let range = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
        let bytes = range.and_then(|(start, end)| self.bytes.get(start..end)).unwrap_or_default();
        Some(tensor(bytes, shape, *dtype))
    }
}

impl Change for Layers {
    fn concerns(&self, name: &str) -> bool {
        model::lora::names(name).iter().all(|name| self.tensors.contains_key(name))
    }

    fn apply(&self, name: &str, shape: &[u64], bytes: &[u8], stored: Dtype, written: Dtype) -> Result<Vec<u8>, String> {
        let [a, b] = model::lora::names(name).map(|name| self.get(&name));
        let (a, b) = a.zip(b).ok_or("it has no adapter")?;
        let weight = tensor(bytes, shape, stored)?;
        let kind = element(written).map_err(|error| error.to_string())?;
        let merged = model::lora::merged(&weight, &a?, &b?, self.scale, kind).map_err(|error| error.to_string())?;
        let said = |error: torch::TorchError| error.to_string();
        let mut bytes = vec![0; torch::byte_len(&merged).map_err(said)?];
        torch::store_bytes(&merged, &mut bytes).map_err(said)?;
        Ok(bytes)
    }
}

/// A tensor of these bytes, in fp32.
fn tensor(bytes: &[u8], shape: &[u64], dtype: Dtype) -> Result<Tensor, String> {
    let extents: Vec<i64> = shape.iter().map(|&extent| i64::try_from(extent).unwrap_or(i64::MAX)).collect();
    if dtype.bytes(shape) != Some(bytes.len() as u64) {
        return Err(format!("{} bytes are no tensor of shape {shape:?}", bytes.len()));
    }
    let kind = element(dtype).map_err(|error| error.to_string())?;
    let tensor = Tensor::f_from_data_size(bytes, &extents, kind).and_then(|tensor| tensor.f_to_kind(Element::Float));
    tensor.map_err(|error| error.to_string())
}

/// LibTorch's name of a float type.
fn element(dtype: Dtype) -> Result<Element> {
    match dtype {
        Dtype::F32 => Ok(Element::Float),
        Dtype::BF16 => Ok(Element::BFloat16),
        Dtype::F16 => Ok(Element::Half),
        Dtype::I64 => Err(Error::new(Kind::Data, "weights can't be whole numbers")),
    }
}
