//! Everything that a resume needs, as tensors: weights and moments, and their names. [`State::load`] fills them.
//!
//! Only tensors need saving: the sample order, the learning rate and the seeds of a step are pure functions of the
//! configuration and the step.
//!
//! A state is a table: a strategy gives one [`Row`] a [`Role`], with this rank's tensors of it. Each rank's tensors,
//! and their stored names:
//!
//! | strategy, precision | every rank | only rank r |
//! |---|---|---|
//! | single, ddp, fp32 | `<name>` F32, `exp_avg.<name>`, `exp_avg_sq.<name>` | |
//! | single, ddp, bf16, if the model needs rounded weights only | `<name>` BF16, those two, `master.<name>` F32 | |
//! | zero1, fp32 | `<name>` F32 | its slices of `exp_avg.<name>`, `exp_avg_sq.<name>` |
//! | zero1, bf16 | `<name>` BF16 | those, and its slices of `master.<name>`: the fp32 weights |
//! | shard, fp32 | | its elements of `<name>` F32, its slices of `exp_avg.<name>`, `exp_avg_sq.<name>` |
//! | shard, bf16 | | its elements of `<name>` BF16, and those slices and `master.<name>`'s |
//! | each, of a frozen parameter | `<name>` in its own type | |
//!
//! Elements of `<name>` are not stored as slices: ranks write their ranges of one whole tensor, so that a checkpoint's
//! folder stays a model folder.
//!
//! The base of a model with adapters is no part of the state. Its weights are loaded by [`State::of_base`]; the state
//! has the adapters, which are in fp32 under every strategy, and go into a file of their own.
//!
//! Slices are stored as described in [`slices`](crate::format::slices). If a checkpoint has `master.<name>`, that is
//! the weight, and `<name>` is its value rounded to bf16: so a checkpoint's folder stays a model folder that anybody
//! can load, and saving needs no gather. Any rank of any world under any strategy loads from any of these: it takes
//! its own elements from the files, which are all in shared memory. Files of an earlier version have whole tensors only
//! and are loaded by the same rule.

mod fingerprint;
mod load;
mod roles;

use tch::{Kind, TchError, Tensor};

pub use self::{fingerprint::Replicated, roles::Role};
use super::partition::{Partition, Piece};
use crate::{
    error::{Error, Kind as ErrorKind, Result},
    ids::Rank,
    model::{Leaves, Parameter},
    snapshot::plan::{Dtype, Part, ShardKind, TensorSpec},
    torch,
};

/// A role, and the tensors that this rank has of it.
#[derive(Clone, Debug)]
pub struct Row<'a> {
    /// The role.
    pub role: Role,
    /// Its tensors.
    pub tensors: Tensors<'a>,
}

/// The tensors of a role on one rank.
#[derive(Clone, Debug)]
pub enum Tensors<'a> {
    /// Every parameter's values, frozen ones too but for a base: the model has them, whole, on every rank.
    OfModel,
    /// Every frozen parameter's values but a base's.
    FrozenOfModel,
    /// One for each trained parameter, whole, on every rank.
    Whole(&'a [Tensor]),
    /// This rank's chunk of each bucket, without padding: one dimension.
    Chunks {
        /// The assignment of the trained parameters' elements to ranks.
        partition: &'a Partition,
        /// This rank.
        rank: Rank,
        /// By bucket.
        chunks: Vec<&'a Tensor>,
    },
}

/// Elements that this rank has, from `begin` on, as a tensor of one dimension.
#[derive(Debug)]
struct Target {
    role: Role,
    param: usize,
    begin: u64,
    tensor: Tensor,
}

/// One parameter.
#[derive(Debug)]
struct Param {
    name: String,
    shape: Vec<u64>,
    len: u64,
    trained: bool,
}

/// One rank's tensors, in the order of [`State::specs`].
#[derive(Debug)]
pub struct State {
    params: Vec<Param>,
    specs: Vec<TensorSpec>,
    tensors: Vec<Tensor>,
    targets: Vec<Target>,
    /// The weights are adapters.
    adapters: bool,
}

impl State {
    /// The state of `model`, row by row.
    pub fn new(model: &dyn Leaves, rows: &[Row<'_>]) -> Result<Self> {
        let own: Vec<&Parameter> = model.parameters().iter().filter(|parameter| !parameter.is_base()).collect();
        let adapters = own.len() < model.parameters().len();
        Self::of(&own, adapters, rows)
    }

    /// The base of a model with adapters: to be loaded, and to be compared. Of other models it is empty.
    pub fn of_base(model: &dyn Leaves) -> Result<Self> {
        let base: Vec<&Parameter> = model.parameters().iter().filter(|parameter| parameter.is_base()).collect();
        Self::of(&base, false, &[Row { role: Role::Weight, tensors: Tensors::OfModel }])
    }

    fn of(parameters: &[&Parameter], adapters: bool, rows: &[Row<'_>]) -> Result<Self> {
        let params = parameters.iter().map(|parameter| Param {
            name: parameter.name.clone(),
            shape: parameter.values().size().into_iter().map(|extent| u64::try_from(extent).unwrap_or(0)).collect(),
            len: parameter.values().numel() as u64,
            trained: parameter.leaf().is_some(),
        });
        let params: Vec<Param> = params.collect();
        let trained: Vec<usize> = (0..params.len()).filter(|&param| params[param].trained).collect();
        let mut state = Self { params, specs: Vec::new(), tensors: Vec::new(), targets: Vec::new(), adapters };
        for Row { role, tensors } in rows {
            match tensors {
                Tensors::OfModel => {
                    for (param, parameter) in parameters.iter().enumerate() {
                        state.add_whole(*role, param, parameter.values())?;
                    }
                }
                Tensors::FrozenOfModel => {
                    for (param, parameter) in parameters.iter().enumerate().filter(|(_, it)| it.leaf().is_none()) {
                        state.add_whole(*role, param, parameter.values())?;
                    }
                }
                Tensors::Whole(tensors) => {
                    check_count(*role, tensors.len(), trained.len())?;
                    for (&param, tensor) in trained.iter().zip(*tensors) {
                        state.add_whole(*role, param, tensor)?;
                    }
                }
                Tensors::Chunks { partition, rank, chunks } => {
                    check_count(*role, chunks.len(), partition.buckets().len())?;
                    for owner in (0..partition.world().get()).map(Rank) {
                        for piece in partition.pieces(owner) {
                            let param = *trained.get(piece.param).ok_or_else(|| short(*role))?;
                            state.add_part(*role, param, owner, piece, chunks[piece.bucket], owner == *rank)?;
                        }
                    }
                }
            }
        }
        Ok(state)
    }

    fn add_whole(&mut self, role: Role, param: usize, tensor: &Tensor) -> Result<()> {
        let spec = self.spec(role, param, dtype(role, tensor)?, None);
        let flat = tensor.f_detach().and_then(|tensor| tensor.f_view([-1]));
        self.specs.push(spec);
        self.tensors.push(tensor.shallow_clone());
        self.targets.push(Target { role, param, begin: 0, tensor: torch::tch_result("lay out", flat)? });
        Ok(())
    }

    fn add_part(
        &mut self,
        role: Role,
        param: usize,
        owner: Rank,
        piece: Piece,
        chunk: &Tensor,
        own: bool,
    ) -> Result<()> {
        let Piece { begin, end, at, .. } = piece;
        let spec = self.spec(role, param, dtype(role, chunk)?, Some(Part { owner, begin, end }));
        self.specs.push(spec);
        if own {
            let tensor = torch::tch_result("lay out", part(chunk, at, end - begin))?;
            self.tensors.push(tensor.shallow_clone());
            self.targets.push(Target { role, param, begin, tensor });
        } else {
            self.tensors.push(Tensor::new());
        }
        Ok(())
    }

    fn spec(&self, role: Role, param: usize, dtype: Dtype, part: Option<Part>) -> TensorSpec {
        let Param { name, shape, .. } = &self.params[param];
        let kind = match role.traits().file {
            ShardKind::Model if self.adapters => ShardKind::Adapter,
            kind => kind,
        };
        TensorSpec { name: role.name_of(name), dtype, shape: shape.clone(), kind, part }
    }

    /// All tensors of the state, the same list on every rank.
    pub fn specs(&self) -> &[TensorSpec] {
        &self.specs
    }

    /// All tensors, in the order of [`State::specs`]; an undefined one for each part that another rank has.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// Elements of all trained parameters.
    pub fn trained(&self) -> u64 {
        self.params.iter().filter(|param| param.trained).map(|param| param.len).sum()
    }
}

/// The type that a tensor is stored in.
fn dtype(role: Role, tensor: &Tensor) -> Result<Dtype> {
    let dtype = match tensor.kind() {
        Kind::Float => Some(Dtype::F32),
        Kind::BFloat16 => Some(Dtype::BF16),
        _ => None,
    };
    let dtype = dtype.filter(|dtype| role.traits().dtypes.contains(dtype));
    dtype.ok_or_else(|| Error::new(ErrorKind::Bug, format!("{role:?} tensors can't be of {:?}", tensor.kind())))
}

fn check_count(role: Role, given: usize, wanted: usize) -> Result<()> {
    if given == wanted { Ok(()) } else { Err(short(role)) }
}

fn short(role: Role) -> Error {
    Error::new(ErrorKind::Bug, format!("the strategy's {role:?} tensors are not those of the model"))
}

/// `len` elements of a tensor of one dimension, which they share their memory with.
pub(super) fn part(tensor: &Tensor, begin: u64, len: u64) -> Result<Tensor, TchError> {
    tensor.f_narrow(0, signed(begin), signed(len))
}

/// Counts of a tensor's elements are below 2^63: they have memory.
pub(super) fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod lora_tests;
#[cfg(test)]
pub mod testing;
