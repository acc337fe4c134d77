//! A task's parameters: what they are, and how a loss gets them.

use std::collections::{HashMap, HashSet};

use tch::{Device, Kind, Tensor};

use super::{Fallible, TaskError};
use crate::{
    model::{self, Leaves, ModelError, Stage, Weight, random},
    torch,
};

/// The longest name of a parameter.
const MAX_NAME: usize = 200;
/// Prefixes of the other tensors in a checkpoint.
const TAKEN: [&str; 4] = ["exp_avg.", "exp_avg_sq.", "master.", "__metadata__"];

/// One parameter: an fp32 tensor with a name.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Its name in checkpoints: up to 200 visible characters without brackets.
    pub name: String,
    /// Its extents; none: it is one number. Weight decay applies to parameters with two or more.
    pub shape: Vec<u64>,
    /// Its value before the first step.
    pub initial: Initial,
    /// Whether it is trained. One that is not has no gradient and no moments, and is in checkpoints all the same.
    pub trained: bool,
}

/// A parameter's value before the first step.
#[derive(Clone, Debug, PartialEq)]
pub enum Initial {
    /// One number for all elements.
    Constant(f32),
    /// Drawn from a normal distribution with mean 0 and this deviation. The numbers follow from `train.seed` and the
    /// parameter's name: the same bits on every machine.
    Normal(f64),
    /// These elements, row by row.
    Values(Vec<f32>),
}

impl Parameter {
    /// A trained parameter.
    pub fn new(name: impl Into<String>, shape: &[u64], initial: Initial) -> Self {
        Self { name: name.into(), shape: shape.to_vec(), initial, trained: true }
    }

    /// A trained parameter of zeros.
    pub fn zeros(name: impl Into<String>, shape: &[u64]) -> Self {
        Self::new(name, shape, Initial::Constant(0.0))
    }

    /// A trained parameter of normal draws with this deviation.
    pub fn normal(name: impl Into<String>, shape: &[u64], deviation: f64) -> Self {
        Self::new(name, shape, Initial::Normal(deviation))
    }

    /// The same, not trained.
    #[must_use]
    pub fn frozen(self) -> Self {
        Self { trained: false, ..self }
    }

    /// Its number of elements; `None` beyond 63 bits.
    pub(super) fn elements(&self) -> Option<u64> {
        let product = self.shape.iter().try_fold(1_u64, |all, extent| all.checked_mul(*extent))?;
        i64::try_from(product.checked_mul(4)?).ok().map(|_| product)
    }

    /// Its values; arbitrary ones without a seed, because they are about to be loaded.
    fn weight(&self, device: Device, seed: Option<u64>) -> Result<Weight, tch::TchError> {
        let Self { name, shape, initial, trained } = self;
        // Checked to be below 2^63.
        let extents: Vec<i64> = shape.iter().map(|&extent| i64::try_from(extent).unwrap_or(i64::MAX)).collect();
        let cpu = (Kind::Float, Device::Cpu);
        let len = usize::try_from(self.elements().unwrap_or(u64::MAX)).unwrap_or(usize::MAX);
        let drawn = |values: &[f32]| Tensor::f_from_slice(values)?.f_view(extents.as_slice());
        let values = match (seed, initial) {
            (None, _) => Tensor::f_zeros(&extents, cpu)?,
            (_, Initial::Constant(number)) => Tensor::f_full(&extents, f64::from(*number), cpu)?,
            (_, Initial::Values(values)) => drawn(values)?,
            (Some(seed), Initial::Normal(deviation)) => drawn(&random::normal(seed, name, len, *deviation))?,
        };
        let values = values.f_to_device(device)?;
        Ok(if *trained { Weight::Leaf(values.f_set_requires_grad(true)?) } else { Weight::Frozen(values) })
    }
}

/// Checks a task's list.
pub(super) fn check(parameters: &[Parameter]) -> Result<(), TaskError> {
    let wrong = |name: &str, reason: String| Err(TaskError::Parameter { name: name.to_owned(), reason });
    let mut names = HashSet::new();
    for parameter in parameters {
        let Parameter { name, shape, initial, .. } = parameter;
        let visible = |c: char| !c.is_control() && !matches!(c, '[' | ']');
        if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(visible) {
            return wrong(name, format!("needs a name of 1 to {MAX_NAME} visible characters without brackets"));
        }
        if let Some(taken) = TAKEN.iter().find(|taken| name.starts_with(**taken)) {
            return wrong(name, format!("must not begin with {taken:?}, as other tensors of a checkpoint do"));
        }
        if !names.insert(name) {
            return wrong(name, "is there twice".into());
        }
        let Some(elements) = parameter.elements() else {
            return wrong(name, format!("has extents {shape:?}, more than there can be"));
        };
        match initial {
            Initial::Values(values) if values.len() as u64 != elements => {
                let reason = format!("has {elements} elements by its shape {shape:?}, and {} values", values.len());
                return wrong(name, reason);
            }
            Initial::Normal(deviation) if !deviation.is_finite() || *deviation < 0.0 => {
                return wrong(name, format!("has a deviation of {deviation}"));
            }
            _ => {}
        }
    }
    if parameters.iter().any(|parameter| parameter.trained && parameter.elements() > Some(0)) {
        Ok(())
    } else {
        Err(TaskError::Contents("it has no parameter that is trained".into()))
    }
}

/// The parameters as tensors on one device.
#[derive(Debug)]
pub(super) struct Named {
    parameters: Vec<model::Parameter>,
    places: HashMap<String, usize>,
    /// The type used for computing.
    kind: Kind,
    device: Device,
}

impl Named {
    /// From a list that has been checked. `seed`: draw them.
    pub fn new(list: &[Parameter], kind: Kind, device: Device, seed: Option<u64>) -> Result<Self, ModelError> {
        let mut parameters = Vec::with_capacity(list.len());
        for parameter in list {
            let weight = parameter.weight(device, seed);
            let weight = weight.map_err(|source| ModelError::Torch { doing: "make parameters", source })?;
            let name = parameter.name.clone();
            parameters.push(model::Parameter { name, weight, stage: Stage::Head, tied: false });
        }
        let places = list.iter().enumerate().map(|(place, parameter)| (parameter.name.clone(), place)).collect();
        Ok(Self { parameters, places, kind, device })
    }

    /// As a loss gets them. Gradients that are recorded come back to the leaves.
    pub fn at_use(&self) -> Result<Parameters<'_>, torch::TorchError> {
        let tensors = self.parameters.iter().map(|parameter| parameter.weight.at_use(self.kind)).collect();
        Ok(Parameters {
            places: &self.places,
            tensors: torch::tch_result("prepare parameters", tensors)?,
            kind: self.kind,
            device: self.device,
        })
    }

    /// 0, as something that depends on every trained parameter: the gradient of one that a loss does not use is zero,
    /// and not missing.
    pub fn nothing(&self, parameters: &Parameters<'_>) -> Result<Tensor, tch::TchError> {
        let trained = self.parameters.iter().zip(&parameters.tensors).filter(|(own, _)| own.leaf().is_some());
        let zero = Tensor::f_zeros([], (Kind::Float, self.device))?;
        let sum =
            trained.map(|(_, tensor)| tensor).try_fold(zero, |sum, tensor| sum.f_add(&tensor.f_sum(Kind::Float)?));
        sum?.f_mul_scalar(0.0)
    }
}

impl Leaves for Named {
    fn parameters(&self) -> &[model::Parameter] {
        &self.parameters
    }

    fn set_parameters(&mut self, weights: Vec<Weight>) -> Result<(), ModelError> {
        let fits = |(own, weight): (&model::Parameter, &Weight)| weight.has_extents(&own.values().size());
        if weights.len() != self.parameters.len() || !self.parameters.iter().zip(&weights).all(fits) {
            let reason = "are others than the task's".into();
            return Err(ModelError::Input { what: "parameters", reason });
        }
        for (own, weight) in self.parameters.iter_mut().zip(weights) {
            own.weight = weight;
        }
        Ok(())
    }

    fn device(&self) -> Device {
        self.device
    }
}

/// The parameters of one pass, by name.
#[derive(Debug)]
pub struct Parameters<'a> {
    places: &'a HashMap<String, usize>,
    tensors: Vec<Tensor>,
    kind: Kind,
    device: Device,
}

impl Parameters<'_> {
    /// The parameter of this name, in the type of [`Parameters::kind`] and with the extents of its declaration.
    ///
    /// # Errors
    /// If [`super::Trainable::parameters`] does not list it.
    pub fn get(&self, name: &str) -> Fallible<&Tensor> {
        let found = self.places.get(name).and_then(|place| self.tensors.get(*place));
        found.ok_or_else(|| format!("the task has no parameter {name:?}").into())
    }

    /// The type that is computed in, and that all parameters have here: fp32, or bf16 with `train.precision = "bf16"`.
    /// Whatever meets a parameter in one operation is of that type, too; gradients come out in fp32 in any case.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The device that they are on.
    pub fn device(&self) -> Device {
        self.device
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_shapes_and_values_are_checked_before_a_run_exists() {
        let w = || Parameter::normal("w", &[2, 3], 0.1);
        assert!(check(&[w(), Parameter::zeros("b", &[]), Parameter::zeros("c", &[0])]).is_ok());
        for (list, said) in [
            (vec![w(), w()], "parameter w is there twice"),
            (vec![Parameter::zeros("", &[1])], "needs a name"),
            (vec![Parameter::zeros("a[0:3]", &[1])], "without brackets"),
            (vec![w(), Parameter::zeros("exp_avg.w", &[1])], "must not begin with \"exp_avg.\""),
            (vec![Parameter::zeros("w", &[u64::MAX, 2])], "more than there can be"),
            (vec![Parameter::new("w", &[3], Initial::Values(vec![1.0]))], "3 elements by its shape [3], and 1 values"),
            (vec![Parameter::normal("w", &[3], f64::NAN)], "deviation of NaN"),
            (vec![w().frozen()], "no parameter that is trained"),
            (vec![], "no parameter that is trained"),
        ] {
            let error = check(&list).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn values_follow_from_the_seed_and_the_name_alone() {
        let list = [
            Parameter::normal("a", &[3, 2], 0.5),
            Parameter::new("v", &[2], Initial::Values(vec![1.0, -2.0])),
            Parameter::new("c", &[], Initial::Constant(1.5)).frozen(),
        ];
        let of = |list: &[Parameter], seed| Named::new(list, Kind::Float, Device::Cpu, seed).unwrap();
        let values = |named: &Named, name: &str| {
            Vec::<f32>::try_from(named.at_use().unwrap().get(name).unwrap().flatten(0, -1)).unwrap()
        };
        let [named, reversed] = [of(&list, Some(3)), of(&[list[2].clone(), list[0].clone()], Some(3))];
        assert_eq!(values(&named, "a"), random::normal(3, "a", 6, 0.5));
        assert_eq!(values(&named, "a"), values(&reversed, "a"), "the order makes no difference");
        assert_eq!((values(&named, "v"), values(&named, "c")), (vec![1.0, -2.0], vec![1.5]));
        assert_eq!(named.at_use().unwrap().get("a").unwrap().size(), [3, 2]);
        let trained: Vec<bool> = named.parameters().iter().map(|parameter| parameter.leaf().is_some()).collect();
        assert_eq!(trained, [true, true, false]);
        let error = named.at_use().unwrap().get("x").unwrap_err().to_string();
        assert_eq!(error, "the task has no parameter \"x\"");
        let mut other = of(&list, Some(4));
        assert_ne!(values(&other, "a"), values(&named, "a"));
        other.set_parameters(named.parameters().iter().map(|parameter| parameter.weight.share()).collect()).unwrap();
        assert_eq!(values(&other, "a"), values(&named, "a"));
        assert!(other.set_parameters(reversed.parameters().iter().map(|it| it.weight.share()).collect()).is_err());
    }
}
