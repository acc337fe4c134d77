//! Everything that a resume needs, as tensors: weights and moments, their names, and how they are loaded.
//!
//! What is not a tensor needs no saving: the sample order, the learning rate and the seeds of a step are pure functions of
//! the configuration and the step.

use std::collections::HashMap;

use bytes::Bytes;
use tch::{Kind, Tensor};

use crate::{
    checkpoint::header,
    error::{Context, Error, Kind as ErrorKind, Result},
    model::Model,
    snapshot::plan::{Dtype, ShardKind, TensorSpec},
    torch,
};

/// One rank's tensors, in the order of [`State::specs`].
#[derive(Debug)]
pub struct State {
    specs: Vec<TensorSpec>,
    tensors: Vec<Tensor>,
    weights: usize,
}

impl State {
    /// The model's weights, with moments of zero.
    pub fn new(model: &dyn Model) -> Result<Self> {
        let weights = model.parameters().len();
        let mut specs = Vec::with_capacity(3 * weights);
        let mut tensors = Vec::with_capacity(3 * weights);
        for (prefix, kind) in
            [("", ShardKind::Model), ("exp_avg.", ShardKind::Optimizer), ("exp_avg_sq.", ShardKind::Optimizer)]
        {
            for (name, tensor) in model.parameters() {
                let shape = tensor.size().into_iter().map(|extent| u64::try_from(extent).unwrap_or(0)).collect();
                specs.push(TensorSpec { name: format!("{prefix}{name}"), dtype: Dtype::F32, shape, kind });
                tensors.push(match kind {
                    ShardKind::Model => tensor.shallow_clone(),
                    ShardKind::Optimizer => torch::tch_result("make moments", tch::no_grad(|| tensor.f_zeros_like()))?,
                });
            }
        }
        Ok(Self { specs, tensors, weights })
    }

    /// What there is, the same list on every rank.
    pub fn specs(&self) -> &[TensorSpec] {
        &self.specs
    }

    /// All tensors, in the order of [`State::specs`].
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The weights.
    pub fn weights(&self) -> &[Tensor] {
        &self.tensors[..self.weights]
    }

    /// First moments, in the order of the weights.
    pub fn exp_avgs(&self) -> &[Tensor] {
        &self.tensors[self.weights..2 * self.weights]
    }

    /// Second moments, in the order of the weights.
    pub fn exp_avg_sqs(&self) -> &[Tensor] {
        &self.tensors[2 * self.weights..]
    }

    /// Loads safetensors files. With `weights_only` the moments stay zero, other floating types are converted, and tensors that the
    /// model does not have are passed over; otherwise every tensor must be there with its very shape and type, and no other.
    pub fn load(&mut self, files: &[Bytes], weights_only: bool) -> Result<()> {
        let wanted = if weights_only { self.weights } else { self.specs.len() };
        let index: HashMap<&str, usize> =
            self.specs[..wanted].iter().enumerate().map(|(i, s)| (s.name.as_str(), i)).collect();
        let mut loaded = vec![false; wanted];
        for file in files {
            for entry in header::read(file)? {
                let Some(&i) = index.get(entry.name.as_str()) else {
                    if weights_only {
                        continue;
                    }
                    return Err(mismatch(format!(
                        "checkpoint holds tensor {}, which the model does not have",
                        entry.name
                    )));
                };
                let spec = &self.specs[i];
                if entry.shape != spec.shape || (entry.dtype != spec.dtype && !weights_only) {
                    return Err(mismatch(format!(
                        "tensor {} is {:?} {} in the files but {:?} {} in the model",
                        spec.name,
                        entry.shape,
                        entry.dtype.name(),
                        spec.shape,
                        spec.dtype.name()
                    )));
                }
                let bytes = file_range(file, &entry.range)?;
                load_tensor(&self.tensors[i], bytes, entry.dtype).context(format!("load tensor {}", spec.name))?;
                loaded[i] = true;
            }
        }
        if let Some(missing) = loaded.iter().position(|&l| !l) {
            return Err(mismatch(format!("tensor {} is in none of the files", self.specs[missing].name)));
        }
        Ok(())
    }
}

fn mismatch(message: String) -> Error {
    Error::new(ErrorKind::Config, message).with_hint(
        "the model's configuration and the files do not belong together: check model.config and model.init_from",
    )
}

fn load_tensor(tensor: &Tensor, bytes: &[u8], dtype: Dtype) -> Result<(), torch::TorchError> {
    let kind = match dtype {
        Dtype::F32 => return torch::load_bytes(tensor, bytes),
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
        Dtype::I64 => Kind::Int64,
    };
    let copied = tch::no_grad(|| {
        let given = Tensor::f_from_data_size(bytes, &tensor.size(), kind)?;
        tensor.shallow_clone().f_copy_(&given)
    });
    torch::tch_result("convert tensor", copied)
}

fn file_range<'a>(file: &'a [u8], range: &std::ops::Range<u64>) -> Result<&'a [u8]> {
    let start = usize::try_from(range.start).ok();
    let end = usize::try_from(range.end).ok();
    let bytes = start.zip(end).and_then(|(start, end)| file.get(start..end));
    bytes.ok_or_else(|| Error::new(ErrorKind::Data, "a tensor lies outside of its file"))
}
