//! The snapshot slots of a node: the state's list of tensors, as `State::new` makes it of a strategy's rows, and its
//! layout.

use super::Setting;
use crate::{
    config::{Precision, Strategy},
    ids::Rank,
    model::memory::Planned,
    snapshot::{
        image::page_size,
        plan::{Dtype, Part, PlanError, ShardKind, TensorSpec, plan},
    },
    train::{
        partition::Partition,
        state::Role,
        strategy::{Buckets, stage_partition},
    },
};

impl Setting<'_> {
    /// Bytes of one snapshot slot: the images of all ranks. On several nodes a node's slot has those of its own ranks,
    /// and of all of them while a checkpoint is loaded.
    ///
    /// # Errors
    /// A state that no file holds.
    pub fn slot_bytes(&self) -> Result<u64, PlanError> {
        let images = plan(&self.specs(), self.world, page_size())?;
        Ok(images.iter().map(|image| image.len).sum())
    }

    /// Bytes of the files that hold the weights beside which adapters are trained, if they are in the type used for
    /// computing: the agent keeps them for its workers.
    pub fn base_bytes(&self) -> u64 {
        self.base()
    }

    /// All tensors of the state.
    pub(super) fn specs(&self) -> Vec<TensorSpec> {
        let trained: Vec<&Planned> = self.plan.parameters().iter().filter(|it| it.trained).collect();
        let rounds = self.state_precision() == Precision::Bf16 && !self.casts();
        let weights = if rounds { Dtype::BF16 } else { Dtype::F32 };
        let parts = self.parts();
        let mut roles = vec![(Role::Weight, weights), (Role::ExpAvg, Dtype::F32), (Role::ExpAvgSq, Dtype::F32)];
        if rounds {
            roles.push((Role::Master, Dtype::F32));
        }
        let mut specs = Vec::new();
        for (role, dtype) in roles {
            let spec = |param: &Planned, part| {
                let kind = match role.traits().file {
                    ShardKind::Model if self.plan.has_adapters() => ShardKind::Adapter,
                    kind => kind,
                };
                TensorSpec { name: role.name_of(&param.name), dtype, shape: param.shape.clone(), kind, part }
            };
            let is_shared = self.is_staged() || (role != Role::Weight && parts.is_some());
            match parts.as_ref().filter(|_| is_shared) {
                Some(parts) => specs.extend(parts.iter().map(|(param, part)| spec(trained[*param], Some(*part)))),
                None => specs.extend(trained.iter().map(|param| spec(param, None))),
            }
        }
        specs
    }

    /// Which rank has which elements of what is shared out; `None`: everything is on every rank.
    fn parts(&self) -> Option<Vec<(usize, Part)>> {
        let partition = match self.strategy {
            _ if !self.is_shared() => return None,
            Strategy::Ddp => return None,
            Strategy::Zero1 => {
                let Buckets { first, rest } = Buckets::of(self.bucket_mib);
                Partition::new(&self.lens(), self.world, first, rest)
            }
            Strategy::Shard => stage_partition(&self.stages(), &self.lens(), self.world).0,
        };
        let of = |owner| {
            let pieces = partition.pieces(owner);
            pieces.map(move |piece| (piece.param, Part { owner, begin: piece.begin, end: piece.end }))
        };
        Some((0..self.world.get()).map(Rank).flat_map(of).collect())
    }
}
