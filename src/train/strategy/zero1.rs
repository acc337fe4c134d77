//! `zero1` (Rajbhandari et al., arXiv 1910.02054, stage 1): every rank computes with all weights, but has the moments
//! and makes the update of its chunk of each bucket alone ([`crate::train::partition`]):
//!
//! ```text
//! backward   bucket by bucket: exchange chunks ──► this rank's chunk of the averages      (torch::Reducer::sharded)
//! norm       square of its norm, all-reduced: the norm of the whole gradient, the same number on every rank
//! update     bucket by bucket: AdamW on the chunk, round to bf16 if so computed, start to gather the bucket
//! settle     wait for the gathers: before the weights are read again, by a forward pass, a validation or a capture
//! ```
//!
//! Buckets are updated and gathered from the first layers to the last. Between `update` and `settle` come the report,
//! zeroing the gradients and reading the next batch.
//!
//! With bf16 only the owner of a chunk has its fp32 weights; their bf16 rounding is gathered and used for computing. In
//! a `ddp` run every rank makes it for itself after each update. The casts are the same, so both strategies compute the
//! same function: on two ranks without clipping even to the last bit, else up to the order in which numbers are summed.
//! Bytes of one parameter on a rank, without its gradient's 4: ddp fp32 12, bf16 14; zero1 fp32 4 + 8/N,
//! bf16 2 + 12/N.

use std::time::Duration;

use tch::{Device, Kind, TchError, Tensor};

use super::{Buckets, Layout, Peers, Strategy, leaves};
use crate::{
    config::{OptimizerConfig, Precision},
    error::Result,
    ids::{Rank, Step, WorldSize},
    model::{Leaves, Weight},
    torch::{self, Pending, ProcessGroup, Reducer, Reduction, TorchError},
    train::{
        optim::{Slot, Update},
        partition::Partition,
        state::{Role, Row, State, Tensors, part, signed},
    },
};

/// A rank's share of one bucket. The last four have one dimension and as many elements as the rank owns of it.
#[derive(Debug)]
struct Share {
    /// The weights used for computing, of the whole bucket: as many chunks as there are ranks, one dimension. fp32, or
    /// bf16 beside fp32 weights of its own.
    gathered: Tensor,
    /// The rank's chunk of `gathered`, without padding.
    own: Tensor,
    /// The fp32 weights that are updated: `own` itself if that is fp32.
    weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

/// Moves the trained weights into buckets, and makes this rank's share of the rest.
pub(super) fn lay_out(
    model: &mut dyn Leaves,
    buckets: Buckets,
    precision: Precision,
    rank: Rank,
    world: WorldSize,
) -> Result<(State, Box<dyn Layout>)> {
    let fresh = leaves(model);
    let lens: Vec<u64> = fresh.iter().map(|leaf| leaf.numel() as u64).collect();
    let partition = Partition::new(&lens, world, buckets.first, buckets.rest);
    let kind = match precision {
        Precision::Fp32 => Kind::Float,
        Precision::Bf16 => Kind::BFloat16,
    };
    let mut views = Vec::with_capacity(fresh.len());
    let mut shares = Vec::with_capacity(partition.buckets().len());
    for number in 0..partition.buckets().len() {
        let share = share(&partition, number, rank, &fresh, &mut views, (kind, model.device()));
        shares.push(torch::tch_result("lay out a bucket", share)?);
    }
    if kind != Kind::Float {
        for piece in partition.pieces(rank) {
            let len = piece.end - piece.begin;
            let own = part(&shares[piece.bucket].weights, piece.at, len);
            let from = fresh[piece.param].f_detach().and_then(|all| part(&all.f_view([-1])?, piece.begin, len));
            torch::tch_result("copy weights", from.and_then(|from| own?.f_copy_(&from)))?;
        }
    }
    // Buckets begin with the last parameter.
    views.sort_by_key(|(param, _)| *param);
    replace_trained(model, precision, views.into_iter().map(|(_, view)| view))?;

    let chunks = |of: fn(&Share) -> &Tensor| Tensors::Chunks {
        partition: &partition,
        rank,
        chunks: shares.iter().map(of).collect(),
    };
    let mut rows = vec![
        Row { role: Role::Weight, tensors: Tensors::OfModel },
        Row { role: Role::ExpAvg, tensors: chunks(|share| &share.exp_avg) },
        Row { role: Role::ExpAvgSq, tensors: chunks(|share| &share.exp_avg_sq) },
    ];
    if kind != Kind::Float {
        rows.push(Row { role: Role::Master, tensors: chunks(|share| &share.weights) });
    }
    let state = State::new(model, &rows)?;
    Ok((state, Box::new(Unconnected { leaves: leaves(model), partition, rank, shares })))
}

/// One bucket, filled with the `fresh` weights; adds each parameter's view of it, in the parameter's extents.
fn share(
    partition: &Partition,
    number: usize,
    rank: Rank,
    fresh: &[Tensor],
    views: &mut Vec<(usize, Tensor)>,
    (kind, device): (Kind, Device),
) -> Result<Share, TchError> {
    let bucket = &partition.buckets()[number];
    let (start, owned) = partition.chunk(number, rank);
    let world = u64::from(partition.world().get());
    let gathered = Tensor::f_zeros([signed(world * bucket.chunk)], (kind, device))?;
    for member in &bucket.members {
        let from = &fresh[member.param];
        let mut view = part(&gathered, member.offset, member.len)?;
        view.f_copy_(&from.f_detach()?.f_view([-1])?)?;
        views.push((member.param, view.f_view(from.size().as_slice())?));
    }
    // The chunk of a last rank may begin beyond the end.
    let own = part(&gathered, start.min(bucket.len), owned)?;
    let zeros = || Tensor::f_zeros([signed(owned)], (Kind::Float, device));
    let weights = if kind == Kind::Float { own.shallow_clone() } else { zeros()? };
    Ok(Share { gathered, own, weights, exp_avg: zeros()?, exp_avg_sq: zeros()? })
}

/// Lets the model compute with `views`, one for each trained parameter; frozen ones stay as they are.
fn replace_trained(
    model: &mut dyn Leaves,
    precision: Precision,
    mut views: impl Iterator<Item = Tensor>,
) -> Result<()> {
    let mut weights = Vec::with_capacity(model.parameters().len());
    for parameter in model.parameters() {
        // A model whose parameters have no views keeps them, and `State::new` refuses it.
        let view = parameter.leaf().and_then(|_| views.next());
        weights.push(match (view, precision) {
            (None, _) => parameter.weight.share(),
            (Some(view), Precision::Fp32) => {
                let leaf = view.f_detach().and_then(|leaf| leaf.f_set_requires_grad(true));
                Weight::Leaf(torch::tch_result("make parameters", leaf)?)
            }
            (Some(view), Precision::Bf16) => Weight::Copy { leaf: torch::leaf_like(&view)?, copy: view },
        });
    }
    Ok(model.set_parameters(weights)?)
}

#[derive(Debug)]
struct Unconnected {
    leaves: Vec<Tensor>,
    partition: Partition,
    rank: Rank,
    shares: Vec<Share>,
}

impl Layout for Unconnected {
    fn connect(self: Box<Self>, peers: Peers) -> Result<Box<dyn Strategy>> {
        let Self { leaves, partition, rank, shares } = *self;
        let group = peers.group()?;
        let reducer = Reducer::sharded(&leaves, &group, &partition.for_reducer())?;
        let narrow = |tensor: &Tensor, begin, len| torch::tch_result("share out", part(tensor, begin, len));
        let mut owns = Vec::with_capacity(shares.len());
        for bucket in 0..shares.len() {
            let (start, owned) = partition.chunk(bucket, rank);
            owns.push(narrow(&reducer.bucket(bucket)?, start, owned)?);
        }
        let mut slots: Vec<Vec<Slot>> = shares.iter().map(|_| Vec::new()).collect();
        for piece in partition.pieces(rank) {
            let share = &shares[piece.bucket];
            let of = |tensor: &Tensor| narrow(tensor, piece.at, piece.end - piece.begin);
            slots[piece.bucket].push(Slot {
                decays: leaves[piece.param].dim() >= 2,
                weight: of(&share.weights)?,
                gradient: of(&owns[piece.bucket])?,
                exp_avg: of(&share.exp_avg)?,
                exp_avg_sq: of(&share.exp_avg_sq)?,
            });
        }
        // The last bucket has the first layers, which the next forward pass needs first.
        let units = shares.into_iter().zip(slots).rev().map(|(share, slots)| Unit::new(share, Update::new(slots)));
        Ok(Box::new(Zero1 {
            units: units.collect(),
            gradients: owns.into_iter().filter(|own| own.numel() > 0).collect(),
            device: leaves.first().map_or(Device::Cpu, Tensor::device),
            leaves,
            reducer,
            group,
            gathering: Vec::new(),
        }))
    }
}

#[derive(Debug)]
struct Zero1 {
    leaves: Vec<Tensor>,
    device: Device,
    /// This rank's chunks of the averages.
    gradients: Vec<Tensor>,
    units: Vec<Unit>,
    reducer: Reducer,
    group: ProcessGroup,
    gathering: Vec<Pending>,
}

/// The update of one bucket.
#[derive(Debug)]
struct Unit {
    update: Update,
    /// The whole bucket, which the other ranks need.
    bucket: Tensor,
    /// The bucket's own chunk and the fp32 weights that are rounded into it, if the two differ.
    rounded: Option<(Tensor, Tensor)>,
}

impl Unit {
    fn new(share: Share, update: Update) -> Self {
        let rounded = share.weights.kind() != share.gathered.kind();
        Self { update, bucket: share.gathered, rounded: rounded.then_some((share.own, share.weights)) }
    }
}

impl Strategy for Zero1 {
    fn backward(&self, loss: &Tensor, last: bool) -> Result<(), TorchError> {
        self.reducer.backward(loss, if last { Reduction::Average } else { Reduction::Accumulate })
    }

    fn norm(&self) -> Result<Tensor, TorchError> {
        let square = || match self.gradients.as_slice() {
            [] => Tensor::f_zeros([], (Kind::Double, self.device)),
            // In double, so that squaring a norm and taking the root again costs nothing.
            gradients => torch::grad_norm(gradients)
                .map_err(|error| TchError::Torch(error.to_string()))?
                .f_to_kind(Kind::Double)?
                .f_square(),
        };
        let mut sum = torch::tch_result("gradient norm", square())?;
        self.group.all_reduce_sum(&mut sum)?;
        torch::tch_result("gradient norm", sum.f_sqrt().and_then(|norm| norm.f_to_kind(Kind::Float)))
    }

    fn update(
        &mut self,
        config: &OptimizerConfig,
        step: Step,
        lr: f64,
        scale: Option<&Tensor>,
    ) -> Result<(), TorchError> {
        for unit in &self.units {
            unit.update.apply(config, step, lr, scale)?;
            if let Some((own, weights)) = &unit.rounded {
                torch::tch_result("round weights", own.shallow_clone().f_copy_(weights))?;
            }
            self.gathering.push(self.group.all_gather(&unit.bucket)?);
        }
        Ok(())
    }

    fn settle(&mut self) -> Result<(), TorchError> {
        self.gathering.drain(..).try_for_each(Pending::wait)
    }

    fn set_patience(&self, limit: Duration) -> Result<(), TorchError> {
        self.group.set_timeout(limit)
    }

    fn zero_grad(&mut self) -> Result<(), TorchError> {
        torch::zero_gradients(&self.leaves)
    }
}
