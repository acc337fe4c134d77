//! Everything that a resume needs, as tensors: weights and moments, and their names. [`super::load`] fills them.
//!
//! Only tensors need saving: the sample order, the learning rate and the seeds of a step are pure functions of the
//! configuration and the step.
//!
//! Each rank's tensors, and their stored names:
//!
//! | strategy, precision | every rank | only rank r |
//! |---|---|---|
//! | ddp | `<name>` F32, `exp_avg.<name>`, `exp_avg_sq.<name>` | |
//! | zero1, fp32 | `<name>` F32 | its slices of `exp_avg.<name>`, `exp_avg_sq.<name>` |
//! | zero1, bf16 | `<name>` BF16 | those, and its slices of `master.<name>`: the fp32 weights |
//!
//! Slices are stored as described in [`slices`](crate::format::slices). If a checkpoint has `master.<name>`, that is
//! the weight, and `<name>` is its value rounded to bf16: so a checkpoint's folder stays a model folder that anybody
//! can load, and saving needs no gather. Any rank of any world under either strategy loads from any of these: it takes
//! its own elements from the files, which are all in shared memory. Files of an earlier version have whole tensors only
//! and are loaded by the same rule.

use tch::{Kind, Tensor};

use super::partition::{Partition, Piece};
use crate::{
    config::Precision,
    error::{Context, Result},
    ids::Rank,
    model::{Model, Weight},
    snapshot::plan::{Dtype, Part, ShardKind, TensorSpec},
    torch,
};

/// The role of an element of the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Weight,
    Master,
    ExpAvg,
    ExpAvgSq,
}

impl Role {
    pub(super) const ALL: [Self; 4] = [Self::Weight, Self::Master, Self::ExpAvg, Self::ExpAvgSq];

    /// The prefix of the parameter's name.
    pub(super) fn prefix(self) -> &'static str {
        match self {
            Self::Weight => "",
            Self::Master => "master.",
            Self::ExpAvg => "exp_avg.",
            Self::ExpAvgSq => "exp_avg_sq.",
        }
    }
}

/// Elements that this rank has, from `begin` on, as a tensor of one dimension.
#[derive(Debug)]
pub(super) struct Target {
    pub role: Role,
    pub param: usize,
    pub begin: u64,
    pub tensor: Tensor,
}

/// One parameter.
#[derive(Debug)]
pub(super) struct Param {
    pub name: String,
    pub shape: Vec<u64>,
    pub len: u64,
}

/// A parameter's weights with its moments, all of it.
#[derive(Debug)]
pub struct Whole {
    /// The leaf.
    pub weight: Tensor,
    /// First moment.
    pub exp_avg: Tensor,
    /// Second moment.
    pub exp_avg_sq: Tensor,
}

/// A rank's share of one bucket. The last four have one dimension and as many elements as the rank owns of it.
#[derive(Debug)]
pub struct Share {
    /// The weights used for computing, of the whole bucket: as many chunks as there are ranks, one dimension. fp32, or
    /// bf16 beside fp32 weights of its own.
    pub gathered: Tensor,
    /// The rank's chunk of `gathered`, without padding.
    pub own: Tensor,
    /// The fp32 weights that are updated: `own` itself if that is fp32.
    pub weights: Tensor,
    /// First moment.
    pub exp_avg: Tensor,
    /// Second moment.
    pub exp_avg_sq: Tensor,
}

/// The optimizer's tensors.
#[derive(Debug)]
pub enum Held {
    /// Everything, by parameter.
    Replicated(Vec<Whole>),
    /// A share of everything, by bucket.
    Partitioned {
        /// The assignment of elements to ranks.
        partition: Partition,
        /// This rank.
        rank: Rank,
        /// One for each bucket.
        shares: Vec<Share>,
    },
}

/// One rank's tensors, in the order of [`State::specs`].
#[derive(Debug)]
pub struct State {
    pub(super) params: Vec<Param>,
    specs: Vec<TensorSpec>,
    tensors: Vec<Tensor>,
    pub(super) targets: Vec<Target>,
    held: Held,
}

impl State {
    /// The model's weights, with moments of zero. With a partition the model's tensors are replaced by views into
    /// buckets: ask for its parameters afterwards.
    pub fn new(model: &mut dyn Model, precision: Precision, split: Option<(Partition, Rank)>) -> Result<Self> {
        let params = model.parameters().iter().map(|(name, tensor)| Param {
            name: name.clone(),
            shape: tensor.size().into_iter().map(|extent| u64::try_from(extent).unwrap_or(0)).collect(),
            len: tensor.numel() as u64,
        });
        let mut state = Self {
            params: params.collect(),
            specs: Vec::new(),
            tensors: Vec::new(),
            targets: Vec::new(),
            held: Held::Replicated(Vec::new()),
        };
        let made = tch::no_grad(|| match split {
            None => state.replicate(model),
            Some((partition, rank)) => state.partition(model, precision, partition, rank),
        });
        made.context("make the state")?;
        Ok(state)
    }

    fn replicate(&mut self, model: &dyn Model) -> Result<()> {
        let leaves = || model.parameters().iter().map(|(_, leaf)| leaf);
        let zeros = || leaves().map(Tensor::f_zeros_like).collect::<Result<Vec<_>, _>>();
        let zeros = || torch::tch_result("make moments", zeros());
        let (weights, exp_avgs, exp_avg_sqs) = (leaves().map(Tensor::shallow_clone).collect(), zeros()?, zeros()?);
        for (role, list) in [(Role::Weight, &weights), (Role::ExpAvg, &exp_avgs), (Role::ExpAvgSq, &exp_avg_sqs)] {
            let list: &Vec<Tensor> = list;
            for (param, tensor) in list.iter().enumerate() {
                self.specs.push(self.spec(role, param, Dtype::F32, None));
                self.tensors.push(tensor.shallow_clone());
                let flat = tensor.f_detach().and_then(|tensor| tensor.f_view([-1]));
                self.targets.push(Target { role, param, begin: 0, tensor: torch::tch_result("lay out", flat)? });
            }
        }
        let whole = weights.into_iter().zip(exp_avgs).zip(exp_avg_sqs);
        let whole = whole.map(|((weight, exp_avg), exp_avg_sq)| Whole { weight, exp_avg, exp_avg_sq });
        self.held = Held::Replicated(whole.collect());
        Ok(())
    }

    /// Moves the model's weights into buckets, and makes this rank's share of the rest.
    fn partition(&mut self, model: &mut dyn Model, precision: Precision, split: Partition, rank: Rank) -> Result<()> {
        let (kind, dtype) = match precision {
            Precision::Fp32 => (Kind::Float, Dtype::F32),
            Precision::Bf16 => (Kind::BFloat16, Dtype::BF16),
        };
        let device = model.device();
        let world = u64::from(split.world().get());
        let fresh: Vec<Tensor> = model.parameters().iter().map(|(_, leaf)| leaf.shallow_clone()).collect();
        let mut views: Vec<Option<Tensor>> = fresh.iter().map(|_| None).collect();
        let mut shares = Vec::with_capacity(split.buckets().len());
        for (number, bucket) in split.buckets().iter().enumerate() {
            let (start, owned) = split.chunk(number, rank);
            let mut make = || {
                let gathered = Tensor::f_zeros([signed(world * bucket.chunk)], (kind, device))?;
                for member in &bucket.members {
                    let mut view = part(&gathered, member.offset, member.len)?;
                    view.f_copy_(&fresh[member.param].f_detach()?.f_view([-1])?)?;
                    views[member.param] = Some(view.f_view(fresh[member.param].size().as_slice())?);
                }
                // The chunk of a last rank may begin beyond the end.
                let own = part(&gathered, start.min(bucket.len), owned)?;
                let zeros = || Tensor::f_zeros([signed(owned)], (Kind::Float, device));
                let weights = if kind == Kind::Float { own.shallow_clone() } else { zeros()? };
                Ok(Share { gathered, own, weights, exp_avg: zeros()?, exp_avg_sq: zeros()? })
            };
            shares.push(torch::tch_result("lay out a bucket", make())?);
        }
        let views: Vec<Tensor> = views.into_iter().flatten().collect();
        for (param, view) in views.iter().enumerate() {
            self.specs.push(self.spec(Role::Weight, param, dtype, None));
            let flat = torch::tch_result("lay out", view.f_view([-1]))?;
            self.targets.push(Target { role: Role::Weight, param, begin: 0, tensor: flat });
            self.tensors.push(view.shallow_clone());
        }
        let roles = [Role::ExpAvg, Role::ExpAvgSq, Role::Master];
        let roles = if kind == Kind::Float { &roles[..2] } else { &roles };
        for &role in roles {
            for owner in (0..split.world().get()).map(Rank) {
                for piece in split.pieces(owner) {
                    let Piece { bucket, param, begin, end, at } = piece;
                    self.specs.push(self.spec(role, param, Dtype::F32, Some(Part { owner, begin, end })));
                    if owner != rank {
                        self.tensors.push(Tensor::new());
                        continue;
                    }
                    let share = &shares[bucket];
                    let all = match role {
                        Role::ExpAvg => &share.exp_avg,
                        Role::ExpAvgSq => &share.exp_avg_sq,
                        Role::Weight | Role::Master => &share.weights,
                    };
                    let tensor = torch::tch_result("lay out", part(all, at, end - begin))?;
                    if role == Role::Master {
                        let from = fresh[param].f_detach().and_then(|all| part(&all.f_view([-1])?, begin, end - begin));
                        torch::tch_result("copy weights", from.and_then(|from| tensor.shallow_clone().f_copy_(&from)))?;
                    }
                    self.tensors.push(tensor.shallow_clone());
                    self.targets.push(Target { role, param, begin, tensor });
                }
            }
        }
        let weight = |view: Tensor| {
            Ok(match precision {
                Precision::Fp32 => {
                    let leaf = view.f_detach().and_then(|leaf| leaf.f_set_requires_grad(true));
                    Weight { leaf: torch::tch_result("make parameters", leaf)?, copy: None }
                }
                Precision::Bf16 => Weight { leaf: torch::leaf_like(&view)?, copy: Some(view) },
            })
        };
        model.set_parameters(views.into_iter().map(weight).collect::<Result<_>>()?)?;
        self.held = Held::Partitioned { partition: split, rank, shares };
        Ok(())
    }

    fn spec(&self, role: Role, param: usize, dtype: Dtype, part: Option<Part>) -> TensorSpec {
        let Param { name, shape, .. } = &self.params[param];
        let kind = if role == Role::Weight { ShardKind::Model } else { ShardKind::Optimizer };
        TensorSpec { name: format!("{}{name}", role.prefix()), dtype, shape: shape.clone(), kind, part }
    }

    /// All tensors of the state, the same list on every rank.
    pub fn specs(&self) -> &[TensorSpec] {
        &self.specs
    }

    /// All tensors, in the order of [`State::specs`]; an undefined one for each part that another rank has.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// Elements of all parameters.
    pub fn parameters(&self) -> u64 {
        self.params.iter().map(|param| param.len).sum()
    }

    /// The optimizer's tensors.
    pub fn held(&self) -> &Held {
        &self.held
    }
}

pub(super) fn is_moment(role: Role) -> bool {
    matches!(role, Role::ExpAvg | Role::ExpAvgSq)
}

/// `len` elements of a tensor of one dimension, which they share their memory with.
pub(super) fn part(tensor: &Tensor, begin: u64, len: u64) -> Result<Tensor, tch::TchError> {
    tensor.f_narrow(0, signed(begin), signed(len))
}

/// Counts of a tensor's elements are below 2^63: they have memory.
pub(super) fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
