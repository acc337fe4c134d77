//! Low-rank adapters (LoRA: Hu et al., arXiv 2106.09685) beside a model's frozen weights.
//!
//! A linear layer with weights W, `[out, in]`, that has an adapter computes W·x + scale · B·(A·x), where A is
//! `[rank, in]`, B is `[out, rank]`, and scale is alpha / rank. A and B are trained, in fp32; W is part of the *base*,
//! which no step changes, which has no gradient, and which no checkpoint holds. Like every trained parameter, A and B
//! are cast to the type used for computing where they are used.
//!
//! Names are those of PEFT's files: `base_model.model.<layer>.lora_A.weight`. As there, A begins uniform in ±1/√in
//! (Kaiming with a = √5) and B at zero, so that a fresh model is its base. A is drawn from a stream that is keyed by
//! seed and name: it has the same bits on every machine, whatever its rank in the world.
//!
//! *Crash, error:* nothing is kept outside of the model.

use std::collections::HashMap;

use tch::{Device, Kind, TchError, Tensor};

use super::{BuildSettings, Doing, Model, ModelError, Parameter, Weight, init::extents, random::SplitMix64};
use crate::config::{ALL_LINEAR, LoraConfig, ModelKind, Precision};

/// The beginning of the names of PEFT's parameters, before the layer's own name.
const PREFIX: &str = "base_model.model.";
/// The endings of the names of the two parameters of an adapter, after the layer's own name.
const ENDINGS: [&str; 2] = [".lora_A.weight", ".lora_B.weight"];
/// The ending of the name of a layer's weights.
const WEIGHT: &str = ".weight";

/// The names of A and B for the layer with these weights.
pub fn names(weight: &str) -> [String; 2] {
    let layer = weight.strip_suffix(WEIGHT).unwrap_or(weight);
    ENDINGS.map(|ending| format!("{PREFIX}{layer}{ending}"))
}

/// The adapter of one linear layer.
pub(super) struct Adapter {
    a: Weight,
    b: Weight,
    scale: f64,
}

impl Adapter {
    /// The one of the layer with the weights `weight`, if it has one. `scale`: of the model's adapters, if it has any.
    pub(super) fn find(named: &HashMap<&str, &Weight>, weight: &str, scale: Option<f64>) -> Option<Self> {
        let [a, b] = names(weight).map(|name| named.get(name.as_str()).map(|weight| weight.share()));
        Some(Self { a: a?, b: b?, scale: scale? })
    }

    /// The layer's own result `y` for `x`, with what the adapter adds; `kind` is the type used for computing.
    pub(super) fn add(&self, y: Tensor, x: &Tensor, kind: Kind) -> Result<Tensor, TchError> {
        let narrow = x.f_linear(&self.a.at_use(kind)?, None::<&Tensor>)?;
        let added = narrow.f_linear(&self.b.at_use(kind)?, None::<&Tensor>)?;
        y.f_add(&added.f_mul_scalar(self.scale)?)
    }
}

/// A linear layer that has an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// The name of its weights.
    pub weight: String,
    pub rows: u64,
    pub columns: u64,
}

/// The last part of a layer's name: `q_proj`.
fn short(weight: &str) -> &str {
    let layer = weight.strip_suffix(WEIGHT).unwrap_or(weight);
    layer.rsplit('.').next().unwrap_or(layer)
}

/// The layers that have adapters, in the order of the model's parameters.
///
/// # Errors
/// On a name that no linear layer of a block has.
pub(super) fn targets(shapes: &[(String, Vec<u64>)], lora: &LoraConfig) -> Result<Vec<Target>, ModelError> {
    let linear = shapes.iter().filter_map(|(name, shape)| match shape.as_slice() {
        &[rows, columns] if name.contains(".layers.") && name.ends_with("_proj.weight") => {
            Some(Target { weight: name.clone(), rows, columns })
        }
        _ => None,
    });
    let linear: Vec<Target> = linear.collect();
    if lora.targets.iter().any(|name| name == ALL_LINEAR) {
        return Ok(linear);
    }
    if let Some(unknown) = lora.targets.iter().find(|name| linear.iter().all(|it| short(&it.weight) != name.as_str())) {
        let known = of_each_block(&linear).join(", ");
        let reason = format!("name {unknown:?}, and the linear layers of this model's blocks are {known}");
        return Err(ModelError::Input { what: "model.lora.targets", reason });
    }
    let named = linear.into_iter().filter(|it| lora.targets.iter().any(|name| short(&it.weight) == name));
    Ok(named.collect())
}

/// The different last parts of the layers' names, in order.
pub(super) fn of_each_block(layers: &[Target]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for name in layers.iter().map(|layer| short(&layer.weight)) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// The last parts of the names of the layers that have adapters: PEFT's `target_modules`.
///
/// # Errors
/// On a name that no linear layer of the model's blocks has.
pub fn target_modules(
    kind: ModelKind,
    config: &serde_json::Value,
    lora: &LoraConfig,
) -> Result<Vec<String>, ModelError> {
    let targets = targets(&super::parameter_shapes(kind, config)?, lora)?;
    Ok(of_each_block(&targets).into_iter().map(str::to_owned).collect())
}

/// Elements of all adapters of a model.
///
/// # Errors
/// On a name that no linear layer of the model's blocks has.
pub fn parameters(kind: ModelKind, config: &serde_json::Value, lora: &LoraConfig) -> Result<u64, ModelError> {
    let targets = targets(&super::parameter_shapes(kind, config)?, lora)?;
    Ok(targets.iter().map(|it| u64::from(lora.rank) * (it.rows + it.columns)).sum())
}

/// A model with adapters. The base's values are arbitrary and to be loaded, in the type used for computing. The
/// adapters are fresh if there is a seed; otherwise their values are arbitrary, too.
///
/// # Errors
/// As [`super::build`], and on targets that the model does not have.
pub fn build(
    kind: ModelKind,
    config: &serde_json::Value,
    settings: &BuildSettings,
    lora: &LoraConfig,
) -> Result<Box<dyn Model>, ModelError> {
    let targets = targets(&super::parameter_shapes(kind, config)?, lora)?;
    let mut model = super::build_base(kind, config, settings)?;
    let mut adapters = Vec::with_capacity(2 * targets.len());
    for target in targets {
        let of = model.parameters().iter().find(|parameter| parameter.name == target.weight);
        let stage = of.ok_or_else(|| ModelError::NoParameter { name: target.weight.clone() })?.stage;
        let [a, b] = fresh(&target, lora.rank, settings).doing("make adapters")?;
        for (name, leaf) in names(&target.weight).into_iter().zip([a, b]) {
            adapters.push(Parameter { name, weight: Weight::Leaf(leaf), stage, tied: false });
        }
    }
    model.adapt(adapters, lora.scale())?;
    Ok(model)
}

/// The frozen weights of one parameter, of arbitrary values, in the type used for computing.
pub(super) fn base(shape: &[u64], settings: &BuildSettings) -> Result<Weight, TchError> {
    let kind = match settings.precision {
        Precision::Fp32 => Kind::Float,
        Precision::Bf16 => Kind::BFloat16,
    };
    Tensor::f_empty(extents(shape), (kind, settings.device)).map(Weight::Base)
}

/// A and B of one layer; drawn on the CPU, so that the device makes no difference.
fn fresh(target: &Target, rank: u32, settings: &BuildSettings) -> Result<[Tensor; 2], TchError> {
    let (a, b) = ([u64::from(rank), target.columns], [target.rows, u64::from(rank)]);
    let cpu = (Kind::Float, Device::Cpu);
    let (a, b) = match settings.seed {
        None => (Tensor::f_empty(extents(&a), cpu)?, Tensor::f_empty(extents(&b), cpu)?),
        Some(seed) => {
            let [name, _] = names(&target.weight);
            let values = uniform(seed, &name, a.iter().product(), 1.0 / (target.columns as f64).sqrt());
            (Tensor::f_from_slice(&values)?.f_view(extents(&a).as_slice())?, Tensor::f_zeros(extents(&b), cpu)?)
        }
    };
    let leaf = |tensor: Tensor| tensor.f_to_device(settings.device)?.f_set_requires_grad(true);
    Ok([leaf(a)?, leaf(b)?])
}

/// `len` draws, uniform in ±`bound`, of the stream of (`seed`, `name`).
fn uniform(seed: u64, name: &str, len: u64, bound: f64) -> Vec<f32> {
    let mut random = SplitMix64::named(seed, name);
    (0..len).map(|_| ((2.0 * random.next_f64() - 1.0) * bound) as f32).collect()
}

/// Merges the adapters into the base of a model in fp32, W + scale · B·A, and rounds each weight of the base once, to
/// `kind`; B is zero afterwards, so that the model computes with the merged weights alone.
///
/// # Errors
/// Only on LibTorch's errors.
pub fn merge(model: &dyn Model, lora: &LoraConfig, kind: Kind) -> Result<(), ModelError> {
    let named: HashMap<&str, &Tensor> =
        model.parameters().iter().map(|parameter| (parameter.name.as_str(), parameter.values())).collect();
    let _no_grad = tch::no_grad_guard();
    for parameter in model.parameters().iter().filter(|parameter| parameter.is_base()) {
        let mut weight = parameter.values().shallow_clone();
        let rounded = match names(&parameter.name).map(|name| named.get(name.as_str()).copied()) {
            [Some(a), Some(b)] => {
                let rounded = merged(&weight, a, b, lora.scale(), kind)?;
                let _ = b.shallow_clone().f_zero_().doing("merge adapters")?;
                rounded
            }
            _ => weight.f_to_kind(kind).doing("round weights")?,
        };
        weight.f_copy_(&rounded).doing("merge adapters")?;
    }
    Ok(())
}

/// One layer's weights merged with its adapter, in fp32, and rounded once to `kind`.
///
/// # Errors
/// Only on LibTorch's errors.
pub fn merged(weight: &Tensor, a: &Tensor, b: &Tensor, scale: f64, kind: Kind) -> Result<Tensor, ModelError> {
    let merge = || weight.f_add(&b.f_matmul(a)?.f_mul_scalar(scale)?)?.f_to_kind(kind);
    merge().doing("merge adapters")
}

#[cfg(test)]
mod tests;
