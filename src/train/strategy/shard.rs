//! `shard` (Rajbhandari et al., arXiv 1910.02054, stage 3): every rank has its chunk of each stage's weights,
//! gradients, moments and, with bf16, fp32 weights, and a stage's weights are gathered when it is computed.
//!
//! ```text
//! forward    stage by stage: its weights are gathered (those of the next are on their way), computed, and dropped
//! backward   from the head: gathered again, computed again; the gradients of a stage are collected in fp32, and each
//!            rank gets the sum of its chunk, added to what it has of the step's earlier passes
//! reduce     the sums become averages
//! norm       square of its norm, all-reduced: the norm of the whole gradient, the same number on every rank
//! update     AdamW on the chunks, round to bf16 if so computed: nothing is sent
//! ```
//!
//! *Memory.* A bucket is a stage: the embedding, each block, the head. There are two rooms for blocks, used in turns,
//! and one for the two ends, which are never needed together; a tied embedding stays in it, and the head's norm has
//! another. A room has the weights of one stage, and their gradients in fp32. So a rank of N has, in bytes of a
//! parameter, 16/N (fp32: weights 4, gradient 4, moments 8) or 18/N (bf16: 2 more), and the rooms: 8 (bf16: 6) bytes a
//! parameter of two blocks and of the larger end. On a CPU, what other ranks send of a gradient takes 4 more of up to
//! three stages.
//!
//! *Same bits.* A stage's sums are over the ranks in their order, wherever an element lies, and become averages once.
//! So with one pass a step, and without clipping, weights are those of `zero1` to the last bit, and on two ranks those
//! of `ddp`. With several passes, sums over ranks are added up, and not the ranks' sums over passes; a clipped step
//! divides by a norm whose squares are added in another order. Either differs by rounding.
//!
//! Invariants: all ranks enter the same stages in the same order, those without a batch too, so each gather and
//! exchange has its partners; a room is refilled only when the stage in it has been computed and its gradients are with
//! their owners; gathered weights count as old from the update on. *Crash:* as with any strategy, the newest checkpoint
//! stands. *Resume:* stages and chunks follow from the model and the world alone.

use std::{collections::BTreeMap, time::Duration};

use tch::{Device, Kind, TchError, Tensor};

use super::{Layout, Peers, Stages, Strategy, computed_in, leaves, norm_of_chunks, replace_trained};
use crate::{
    config::{OptimizerConfig, Precision},
    error::Result,
    ids::{Rank, Step, WorldSize},
    model::{Leaves, Stage},
    torch::{self, Pending, ProcessGroup, Reducing, TorchError},
    train::{
        optim::{Slot, Update},
        partition::Partition,
        state::{Role, Row, State, Tensors, part, signed},
    },
};

/// A rank's share of one stage. Chunks have one dimension, and padding at their end.
#[derive(Debug)]
struct Share {
    stage: Stage,
    /// Whether the head reads it as well.
    tied: bool,
    /// The rank's chunk of the weights used for computing: fp32, or bf16 beside fp32 weights.
    own: Tensor,
    /// The fp32 weights that are updated: `own` itself if that is fp32.
    weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    /// What has been added up of the step's gradient.
    gradient: Tensor,
    /// Elements of the chunk that are no padding.
    owned: u64,
    /// The number of the room that it is gathered in, and all chunks of its weights and its gradients there.
    room: usize,
    gathered: Tensor,
    collected: Tensor,
}

/// Memory that stages use in turns.
#[derive(Debug)]
struct Memory {
    weights: Tensor,
    gradients: Tensor,
}

/// The room of a stage: blocks alternate between two, so that one can be fetched while another is computed.
const fn room(stage: Stage, tied: bool) -> usize {
    match stage {
        Stage::Block(index) => index % 2,
        Stage::Head if tied => 3,
        Stage::Embed | Stage::Head => 2,
    }
}
const ROOMS: usize = 4;

/// The buckets of parameters of these stages, which the head may read as well, and these lengths: one for each stage,
/// in their order.
pub fn stage_partition(places: &[(Stage, bool)], lens: &[u64], world: WorldSize) -> (Partition, Vec<(Stage, bool)>) {
    let mut stages: BTreeMap<Stage, (Vec<usize>, bool)> = BTreeMap::new();
    for (param, &(stage, is_tied)) in places.iter().enumerate() {
        let (params, tied) = stages.entry(stage).or_default();
        params.push(param);
        *tied |= is_tied;
    }
    let groups: Vec<Vec<usize>> = stages.values().map(|(params, _)| params.clone()).collect();
    let stages = stages.into_iter().map(|(stage, (_, tied))| (stage, tied)).collect();
    (Partition::of(&groups, lens, world), stages)
}

/// The elements that each room has, for stages of these sizes.
pub fn rooms(stages: &[(Stage, bool)], sizes: &[u64]) -> [u64; ROOMS] {
    let tied = stages.iter().any(|(_, tied)| *tied);
    let mut largest = [0; ROOMS];
    for ((stage, _), size) in stages.iter().zip(sizes) {
        let room = &mut largest[room(*stage, tied)];
        *room = u64::max(*room, *size);
    }
    largest
}

/// Moves this rank's chunks of the trained weights out of the model, which computes in the rooms from here on.
pub(super) fn lay_out(
    model: &mut dyn Leaves,
    precision: Precision,
    rank: Rank,
    world: WorldSize,
) -> Result<(State, Box<dyn Layout>)> {
    let fresh = leaves(model);
    let lens: Vec<u64> = fresh.iter().map(|leaf| leaf.numel() as u64).collect();
    let trained = model.parameters().iter().filter(|parameter| parameter.leaf().is_some());
    let places: Vec<(Stage, bool)> = trained.map(|parameter| (parameter.stage, parameter.tied)).collect();
    let (partition, stages) = stage_partition(&places, &lens, world);
    let tied = stages.iter().any(|(_, tied)| *tied);
    let place = |stage| room(stage, tied);

    let (kind, device) = (computed_in(precision), model.device());
    let sizes: Vec<u64> = partition.buckets().iter().map(|bucket| bucket.chunk * u64::from(world.get())).collect();
    let memory = rooms(&stages, &sizes).map(|len| {
        let zeros = |kind| Tensor::f_zeros([signed(len)], (kind, device));
        Ok(Memory { weights: zeros(kind)?, gradients: zeros(Kind::Float)? })
    });
    let memory: Vec<Memory> = torch::tch_result("make room for blocks", memory.into_iter().collect())?;

    let mut views: Vec<Option<(Tensor, Tensor)>> = fresh.iter().map(|_| None).collect();
    let mut shares = Vec::with_capacity(stages.len());
    for (number, &(stage, tied)) in stages.iter().enumerate() {
        let room = place(stage);
        let bucket = &partition.buckets()[number];
        let sizes = (bucket.chunk, partition.chunk(number, rank).1, sizes[number]);
        let mut make = || {
            let share = Share::new((stage, tied), sizes, (room, &memory[room]))?;
            for member in &bucket.members {
                let shape = fresh[member.param].size();
                let view = |all| part(all, member.offset, member.len)?.f_view(shape.as_slice());
                views[member.param] = Some((view(&share.gathered)?, view(&share.collected)?));
            }
            Ok(share)
        };
        shares.push(torch::tch_result("lay out a block", make())?);
    }
    let trained = model.parameters().iter().zip(0..).filter(|(parameter, _)| parameter.leaf().is_some());
    let trained: Vec<usize> = trained.map(|(_, number)| number).collect();
    for piece in partition.pieces(rank) {
        let (share, len) = (&shares[piece.bucket], piece.end - piece.begin);
        // One parameter at a time: a rank has no memory for all of them.
        let drawn = model.first_values(trained[piece.param])?;
        let values = drawn.as_ref().unwrap_or(&fresh[piece.param]);
        let copy = || {
            let from = part(&values.f_detach()?.f_view([-1])?, piece.begin, len)?;
            part(&share.own, piece.at, len)?.f_copy_(&from)?;
            part(&share.weights, piece.at, len)?.f_copy_(&from)
        };
        torch::tch_result("copy weights", copy())?;
    }
    drop(fresh);
    // Each parameter is in one bucket.
    let (weights, collected): (Vec<Tensor>, Vec<Tensor>) = views.into_iter().flatten().unzip();
    replace_trained(model, precision, weights.into_iter())?;

    let state = {
        let owned = |of: fn(&Share) -> &Tensor| {
            let chunks = shares.iter().map(|share| part(of(share), 0, share.owned)).collect();
            torch::tch_result("lay out a state", chunks)
        };
        let mut roles: Vec<(Role, Vec<Tensor>)> = vec![
            (Role::Weight, owned(|share| &share.own)?),
            (Role::ExpAvg, owned(|share| &share.exp_avg)?),
            (Role::ExpAvgSq, owned(|share| &share.exp_avg_sq)?),
        ];
        if kind != Kind::Float {
            roles.push((Role::Master, owned(|share| &share.weights)?));
        }
        let mut rows = vec![Row { role: Role::Weight, tensors: Tensors::FrozenOfModel }];
        for (role, chunks) in &roles {
            let chunks = Tensors::Chunks { partition: &partition, rank, chunks: chunks.iter().collect() };
            rows.push(Row { role: *role, tensors: chunks });
        }
        State::new(model, &rows)?
    };
    Ok((state, Box::new(Unconnected { leaves: leaves(model), collected, partition, rank, shares, device })))
}

impl Share {
    /// With weights and moments of zero. `len`: elements of all chunks.
    fn new(
        (stage, tied): (Stage, bool),
        (chunk, owned, len): (u64, u64, u64),
        (room, memory): (usize, &Memory),
    ) -> Result<Self, TchError> {
        let (kind, device) = (memory.weights.kind(), memory.weights.device());
        let zeros = |kind| Tensor::f_zeros([signed(chunk)], (kind, device));
        let own = zeros(kind)?;
        Ok(Self {
            stage,
            tied,
            weights: if kind == Kind::Float { own.shallow_clone() } else { zeros(Kind::Float)? },
            own,
            exp_avg: zeros(Kind::Float)?,
            exp_avg_sq: zeros(Kind::Float)?,
            gradient: zeros(Kind::Float)?,
            owned,
            room,
            gathered: part(&memory.weights, 0, len)?,
            collected: part(&memory.gradients, 0, len)?,
        })
    }
}

#[derive(Debug)]
struct Unconnected {
    leaves: Vec<Tensor>,
    /// Where each leaf's gradient is collected.
    collected: Vec<Tensor>,
    partition: Partition,
    rank: Rank,
    shares: Vec<Share>,
    device: Device,
}

impl Layout for Unconnected {
    fn connect(self: Box<Self>, peers: Peers) -> Result<Box<dyn Strategy>> {
        let Self { leaves, collected, partition, rank, shares, device } = *self;
        let group = peers.group()?;
        for (leaf, memory) in leaves.iter().zip(&collected) {
            torch::place_gradient(leaf, memory)?;
        }
        let narrow = |tensor: &Tensor, begin, len| torch::tch_result("share out", part(tensor, begin, len));
        let mut slots: Vec<Vec<Slot>> = shares.iter().map(|_| Vec::new()).collect();
        for piece in partition.pieces(rank) {
            let share = &shares[piece.bucket];
            let of = |tensor: &Tensor| narrow(tensor, piece.at, piece.end - piece.begin);
            slots[piece.bucket].push(Slot {
                decays: leaves[piece.param].dim() >= 2,
                weight: of(&share.weights)?,
                gradient: of(&share.gradient)?,
                exp_avg: of(&share.exp_avg)?,
                exp_avg_sq: of(&share.exp_avg_sq)?,
            });
        }
        let owned = shares.iter().filter(|share| share.owned > 0);
        let gradients = owned.map(|share| narrow(&share.gradient, 0, share.owned)).collect::<Result<_, _>>()?;
        let units = shares.into_iter().zip(slots).map(|(share, slots)| Unit { share, update: Update::new(slots) });
        Ok(Box::new(Shard {
            units: units.collect(),
            rooms: (0..ROOMS).map(|_| Room::default()).collect(),
            gradients,
            group,
            device,
        }))
    }
}

#[derive(Debug)]
struct Shard {
    units: Vec<Unit>,
    rooms: Vec<Room>,
    /// This rank's chunks of the averages.
    gradients: Vec<Tensor>,
    group: ProcessGroup,
    device: Device,
}

/// One stage.
#[derive(Debug)]
struct Unit {
    share: Share,
    update: Update,
}

/// What is in a room, or under way to or from it.
#[derive(Debug, Default)]
struct Room {
    /// The number of the unit whose weights are in it, or will be.
    holds: Option<usize>,
    gathering: Option<Pending>,
    reducing: Option<Reducing>,
}

impl Room {
    /// Its weights are there.
    fn wait(&mut self) -> Result<(), TorchError> {
        self.gathering.take().map_or(Ok(()), Pending::wait)
    }

    /// Its gradients are with their owners.
    fn give(&mut self) -> Result<(), TorchError> {
        self.reducing.take().map_or(Ok(()), Reducing::finish)
    }
}

impl Shard {
    /// The numbers of the units that `stage` reads.
    fn read_by(&self, stage: Stage) -> Vec<usize> {
        let reads = |share: &Share| share.stage == stage || (share.tied && stage == Stage::Head);
        (0..self.units.len()).filter(|&unit| reads(&self.units[unit].share)).collect()
    }

    /// The unit whose gradients are collected in `stage`.
    fn of(&self, stage: Stage) -> Option<usize> {
        self.units.iter().position(|unit| unit.share.stage == stage)
    }

    /// Starts to gather a unit's weights, unless they are there or under way.
    fn fetch(&mut self, unit: usize) -> Result<(), TorchError> {
        let Share { own, gathered, room, .. } = &self.units[unit].share;
        let room = &mut self.rooms[*room];
        if room.holds != Some(unit) {
            room.wait()?;
            room.gathering = Some(self.group.all_gather_from(gathered, own)?);
            room.holds = Some(unit);
        }
        Ok(())
    }
}

impl Stages for Shard {
    fn begin(&mut self, _: bool) -> Result<(), TorchError> {
        Ok(())
    }

    /// The exchanges of the last stages go on under the next pass.
    fn end(&mut self, _: bool) -> Result<(), TorchError> {
        Ok(())
    }

    fn enter(&mut self, stage: Stage, next: Option<Stage>) -> Result<(), TorchError> {
        let units = self.read_by(stage);
        units.iter().try_for_each(|&unit| self.fetch(unit))?;
        let taken: Vec<usize> = units.iter().map(|&unit| self.units[unit].share.room).collect();
        for unit in next.map_or_else(Vec::new, |next| self.read_by(next)) {
            // What is being computed stays where it is.
            if units.contains(&unit) || !taken.contains(&self.units[unit].share.room) {
                self.fetch(unit)?;
            }
        }
        taken.into_iter().try_for_each(|room| self.rooms[room].wait())
    }

    fn open(&mut self, stage: Stage) -> Result<(), TorchError> {
        let Some(unit) = self.of(stage) else { return Ok(()) };
        let Share { collected, room, .. } = &self.units[unit].share;
        self.rooms[*room].give()?;
        let _zero = torch::tch_result("zero gradients", tch::no_grad(|| collected.shallow_clone().f_zero_()))?;
        Ok(())
    }

    fn close(&mut self, stage: Stage) -> Result<(), TorchError> {
        let Some(unit) = self.of(stage) else { return Ok(()) };
        let Share { collected, gradient, room, .. } = &self.units[unit].share;
        self.rooms[*room].reducing = Some(self.group.reduce_scatter(collected, gradient)?);
        Ok(())
    }
}

impl Strategy for Shard {
    fn is_staged(&self) -> bool {
        true
    }

    fn any(&self, here: bool) -> Result<bool, TorchError> {
        let flag = Tensor::f_full([1], f64::from(u8::from(here)), (Kind::Float, self.device));
        let mut flag = torch::tch_result("ask the ranks", flag)?;
        self.group.all_reduce_sum(&mut flag)?;
        Ok(torch::to_f64(&flag)? > 0.0)
    }

    fn reduce(&mut self) -> Result<(), TorchError> {
        self.rooms.iter_mut().try_for_each(Room::give)?;
        let world = f64::from(self.group.world().get());
        tch::no_grad(|| {
            for unit in &self.units {
                let average = unit.share.gradient.shallow_clone().f_div_scalar_(world);
                let _average = torch::tch_result("average gradients", average)?;
            }
            Ok(())
        })
    }

    fn norm(&self) -> Result<Tensor, TorchError> {
        norm_of_chunks(&self.gradients, &self.group, self.device)
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
            let Share { own, weights, .. } = &unit.share;
            if own.kind() != weights.kind() {
                torch::tch_result("round weights", own.shallow_clone().f_copy_(weights))?;
            }
        }
        // Gathered weights are those of the step before.
        self.rooms.iter_mut().for_each(|room| room.holds = None);
        // The next pass begins with these.
        let first = [self.read_by(Stage::Embed), self.read_by(Stage::Block(0))].concat();
        first.into_iter().try_for_each(|unit| self.fetch(unit))
    }

    /// Waits for the gathers that are under way: of weights that nobody updates meanwhile.
    fn settle(&mut self) -> Result<(), TorchError> {
        self.rooms.iter_mut().try_for_each(Room::wait)
    }

    fn set_patience(&self, limit: Duration) -> Result<(), TorchError> {
        self.group.set_timeout(limit)
    }

    fn zero_grad(&mut self) -> Result<(), TorchError> {
        tch::no_grad(|| {
            for unit in &self.units {
                let _zero = torch::tch_result("zero gradients", unit.share.gradient.shallow_clone().f_zero_())?;
            }
            Ok(())
        })
    }
}
