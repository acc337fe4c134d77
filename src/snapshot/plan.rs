//! Which rank writes which tensor bytes, and their places in the images of the ranks.
//!
//! An image is what a file lies in; a copy is what a rank writes. A replicated tensor is stored once, in the image of
//! the rank that the plan assigns it to, which copies it: the largest first, always to the rank with the fewest bytes
//! so far, so that every rank has about the same amount. A tensor's [`Part`] that only one rank has is stored in one of
//! two ways:
//!
//! - *A weight* of which each rank has a range ([`ShardKind::Model`]) is stored whole under its plain name, in the file
//!   that a replicated weight would be in: model files are the same whatever the strategy. Each rank copies its own
//!   range into that file, wherever it lies; so the ranks write into each other's images, never the same byte, and need
//!   no collective to save. They share memory, so all of them must be on one node ([`within`]).
//! - *Everything else* (moments) is stored by its rank under the name of a slice ([`slices`]).
//!
//! Adapters are written by the first rank, because their readers know one file. The plan is a pure function of
//! (tensors, world size): every process makes the same plan from the same list.
//!
//! Stored layout of one image: the rank's model shard, or the adapters; then, at the next page boundary, its optimizer
//! shard. A shard is a complete safetensors file ([`crate::format::header`]) whose tensors follow one another without a
//! gap, those with the largest elements first, so that each is aligned, then by name. A part is counted in elements, so
//! it begins and ends on one. Shapes never change during a run, so headers are written once, when the plan is made; a
//! capture writes tensor bytes only.
//!
//! Invariant: the copies of all ranks together write each byte of tensor data exactly once; the parts of a weight are
//! checked to hold each of its elements exactly once before there is a plan.
//!
//! Nothing here is stored. *Crash of a rank* in the middle of its copies: every file that it writes into is unusable,
//! which is why no file of a node is read before all of its ranks have captured the step ([`super`]).

use std::{collections::HashMap, ops::Range};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Explain, Kind},
    format::{header, slices},
    ids::{NodeRanks, Rank, WorldSize},
    layout,
};

pub use crate::format::header::{Dtype, HeaderError};

/// Why no plan can be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// There is no state to save.
    #[error("state has no tensors")]
    Empty,
    /// No ranks, or the page size is invalid.
    #[error("no plan for {world} ranks and pages of {page} bytes")]
    World {
        /// Ranks.
        world: WorldSize,
        /// As given.
        page: u64,
    },
    /// A name that a safetensors file can't hold.
    #[error("tensor name {0:?} is empty or reserved")]
    Name(String),
    /// Two tensors of one name.
    #[error("state has two tensors of the name {0:?}")]
    Duplicate(String),
    /// A part that is not within its tensor, or belongs to a rank that does not exist.
    #[error("tensor {0:?} has a part outside of it, or of a rank outside of the world")]
    Part(String),
    /// Parts of one weight that differ in their extents or element type.
    #[error("the parts of tensor {0:?} are of different extents or element types")]
    Mixed(String),
    /// Parts of one weight that are not all of it, or hold an element twice.
    #[error("tensor {name:?} {why}")]
    Cover {
        /// The weight.
        name: String,
        /// The elements, and what is wrong with them.
        why: String,
    },
    /// A rank would copy its part of a weight into the memory of another node.
    #[error("tensor {name:?} is in parts on several nodes: rank {owner} has one, and its file is one of rank {image}")]
    Elsewhere {
        /// The weight.
        name: String,
        /// The rank that has the part.
        owner: Rank,
        /// The rank whose image has the file.
        image: Rank,
    },
    /// Sizes beyond 64 bits, or a header beyond what readers accept.
    #[error("tensor {0:?} makes the state too large for a file")]
    TooLarge(String),
}

impl Explain for PlanError {
    fn kind(&self) -> Kind {
        match self {
            Self::Elsewhere { .. } => Kind::Config,
            // The list is the model's own: a person can fix it only by choosing another model.
            _ => Kind::Bug,
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = "use one node, or a strategy whose ranks have whole weights: --set parallel.strategy=zero1";
        matches!(self, Self::Elsewhere { .. }).then(|| hint.to_owned())
    }
}

/// Divides `tensors` over the ranks and lays out every rank's image; one [`ImagePlan`] per rank, in the order of ranks.
///
/// Slices go to their owners. The others are assigned largest first, each to the rank with the fewest bytes so far
/// (ties: the lowest rank; equal sizes: by name), so without slices no rank has more than the average plus one largest
/// tensor (Graham 1969, list scheduling). `page`: bytes of a memory page.
pub fn plan(tensors: &[TensorSpec], world: WorldSize, page: u64) -> Result<Vec<ImagePlan>, PlanError> {
    if world.get() == 0 || !page.is_power_of_two() {
        return Err(PlanError::World { world, page });
    }
    let stored = stored(tensors, world)?;
    let assigned = assign(&stored, world);

    let count = |kind| assigned.iter().filter(|own| own.iter().any(|&at| stored[at].kind == kind)).count();
    let mut model = Numbering { stem: "model", next: 1, of: count(ShardKind::Model) };
    let mut optimizer = Numbering { stem: "optimizer", next: 1, of: count(ShardKind::Optimizer) };
    let mut plans = Vec::with_capacity(assigned.len());
    for (rank, own) in (0..).map(Rank).zip(&assigned) {
        let mut image = ImagePlan { rank, len: 0, shards: Vec::new(), copies: Vec::new() };
        for kind in [ShardKind::Adapter, ShardKind::Model, ShardKind::Optimizer] {
            let own: Vec<&Stored> = own.iter().map(|&at| &stored[at]).filter(|it| it.kind == kind).collect();
            if let Some(last) = own.last() {
                let name = match kind {
                    ShardKind::Adapter => layout::ADAPTER.to_owned(),
                    ShardKind::Model => model.next(),
                    ShardKind::Optimizer => optimizer.next(),
                };
                let shard = lay_out(&own, kind, name, image.len);
                let end = shard.as_ref().and_then(|shard| shard.image_offset.checked_add(shard.len));
                let (Some(shard), Some(len)) = (shard, end.and_then(|end| end.checked_next_multiple_of(page))) else {
                    return Err(PlanError::TooLarge(last.name.clone()));
                };
                image.len = len;
                image.shards.push(shard);
            }
        }
        plans.push(image);
    }
    add_copies(&mut plans, tensors, &stored);
    Ok(plans)
}

/// Checks that no rank of `plans`, made from `tensors`, writes into the memory of another node: `ranks` are this one's.
pub fn within(plans: &[ImagePlan], tensors: &[TensorSpec], ranks: NodeRanks) -> Result<(), PlanError> {
    let is_here = |rank| ranks.local(rank).is_some();
    for plan in plans {
        if let Some(copy) = plan.copies.iter().find(|copy| is_here(copy.image) != is_here(plan.rank)) {
            let name = tensors.get(copy.tensor).map(|tensor| tensor.name.clone()).unwrap_or_default();
            return Err(PlanError::Elsewhere { name, owner: plan.rank, image: copy.image });
        }
    }
    Ok(())
}

/// What a file holds under one name.
#[derive(Debug)]
struct Stored {
    /// Indices into the list of tensors: one, or the parts of a weight in the order of their elements.
    tensors: Vec<usize>,
    /// They are the parts of a weight.
    in_parts: bool,
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    kind: ShardKind,
    bytes: u64,
    /// The name of the tensor that it is of.
    of: String,
    /// The rank whose file it must be in; `None`: any.
    owner: Option<Rank>,
}

/// What the files hold, in the order of `tensors`; the error says why the list is not a valid state.
fn stored(tensors: &[TensorSpec], world: WorldSize) -> Result<Vec<Stored>, PlanError> {
    if tensors.is_empty() {
        return Err(PlanError::Empty);
    }
    let mut places: HashMap<String, usize> = HashMap::with_capacity(tensors.len());
    let mut all: Vec<Stored> = Vec::with_capacity(tensors.len());
    let mut total = 0_u64;
    for (index, tensor) in tensors.iter().enumerate() {
        if tensor.name.is_empty() || tensor.name == header::METADATA {
            return Err(PlanError::Name(tensor.name.clone()));
        }
        let too_large = || PlanError::TooLarge(tensor.name.clone());
        let whole = tensor.dtype.bytes(&tensor.shape).ok_or_else(too_large)?;
        if let Some(part) = &tensor.part
            && (part.begin >= part.end || part.end > whole / tensor.dtype.size() || part.owner.get() >= world.get())
        {
            return Err(PlanError::Part(tensor.name.clone()));
        }
        let (name, in_parts) = (tensor.stored_name(), tensor.is_part_of_whole());
        match places.get(&name).and_then(|&at| all.get_mut(at)) {
            Some(one) if in_parts && one.in_parts => {
                if (one.dtype, &one.shape) != (tensor.dtype, &tensor.shape) {
                    return Err(PlanError::Mixed(name));
                }
                one.tensors.push(index);
                continue;
            }
            Some(_) => return Err(PlanError::Duplicate(name)),
            None => {}
        }
        let shape = tensor.stored_shape();
        let bytes = tensor.dtype.bytes(&shape).ok_or_else(too_large)?;
        total = total.checked_add(bytes).ok_or_else(too_large)?;
        let owner = match (&tensor.part, tensor.kind) {
            (Some(part), _) if !in_parts => Some(part.owner),
            // Adapters are one file.
            (None, ShardKind::Adapter) => Some(Rank(0)),
            _ => None,
        };
        let TensorSpec { name: of, dtype, kind, .. } = tensor.clone();
        places.insert(name.clone(), all.len());
        all.push(Stored { tensors: vec![index], in_parts, name, dtype, shape, kind, bytes, of, owner });
    }
    for one in all.iter_mut().filter(|one| one.in_parts) {
        let range = |&index: &usize| tensors[index].part.map_or(0..0, |part| part.begin..part.end);
        one.tensors.sort_by_key(|index| range(index).start);
        slices::check_cover(one.tensors.iter().map(range), one.bytes / one.dtype.size())
            .map_err(|why| PlanError::Cover { name: one.name.clone(), why })?;
    }
    Ok(all)
}

/// Which of what is stored each rank's files hold, in file order.
fn assign(stored: &[Stored], world: WorldSize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..stored.len()).collect();
    order.sort_by(|&a, &b| stored[b].bytes.cmp(&stored[a].bytes).then_with(|| stored[a].of.cmp(&stored[b].of)));
    let mut assigned = vec![Vec::new(); world.get() as usize];
    let (fixed, free): (Vec<usize>, Vec<usize>) = order.into_iter().partition(|&at| stored[at].owner.is_some());
    let mut fixed_loads = vec![0; assigned.len()];
    for at in fixed {
        if let Some(Rank(owner)) = stored[at].owner {
            assigned[owner as usize].push(at);
            fixed_loads[owner as usize] += stored[at].bytes;
        }
    }
    let mut loads: std::collections::BTreeSet<(u64, u32)> = fixed_loads.into_iter().zip(0..).collect();
    for at in free {
        // There is at least one rank, and each one taken out is put back.
        if let Some((load, rank)) = loads.pop_first() {
            assigned[rank as usize].push(at);
            loads.insert((load + stored[at].bytes, rank));
        }
    }
    // The order in a file: largest elements first, so that each is aligned to its own; then by name.
    for own in &mut assigned {
        let key = |at: usize| (stored[at].dtype, stored[at].name.as_str());
        own.sort_by(|&a, &b| header::file_order(key(a), key(b)));
    }
    assigned
}

/// Adds to every rank's plan what it copies, into which image and where.
fn add_copies(plans: &mut [ImagePlan], tensors: &[TensorSpec], stored: &[Stored]) {
    let in_parts = stored.iter().filter(|one| one.in_parts);
    let parts: HashMap<usize, &[usize]> = in_parts.map(|one| (one.tensors[0], one.tensors.as_slice())).collect();
    let mut copies = vec![Vec::new(); plans.len()];
    for plan in plans.iter() {
        for &Placement { tensor, offset, len } in plan.shards.iter().flat_map(|shard| &shard.tensors) {
            let Some(parts) = parts.get(&tensor) else {
                copies[plan.rank.get() as usize].push(CopyPlan { tensor, image: plan.rank, offset, len });
                continue;
            };
            for &tensor in *parts {
                let spec = &tensors[tensor];
                if let Some(Part { owner, begin, .. }) = spec.part {
                    // Within the weight, whose bytes fit: checked before.
                    let offset = offset + begin * spec.dtype.size();
                    copies[owner.get() as usize].push(CopyPlan { tensor, image: plan.rank, offset, len: spec.bytes() });
                }
            }
        }
    }
    for (plan, copies) in plans.iter_mut().zip(copies) {
        plan.copies = copies;
    }
}

/// Hands out the names `stem-00001-of-0000N.safetensors` and so on.
struct Numbering {
    stem: &'static str,
    next: usize,
    of: usize,
}

impl Numbering {
    fn next(&mut self) -> String {
        let name = format!("{}-{:05}-of-{:05}.safetensors", self.stem, self.next, self.of);
        self.next += 1;
        name
    }
}

/// One file at `image_offset`; `None` if it would be too long.
fn lay_out(own: &[&Stored], kind: ShardKind, file_name: String, image_offset: u64) -> Option<ShardPlan> {
    let header = header::write(own.iter().map(|one| (one.name.as_str(), one.dtype, one.shape.as_slice())))?;
    let mut len = header.len() as u64;
    let mut placements = Vec::with_capacity(own.len());
    for one in own {
        placements.push(Placement { tensor: one.tensors[0], offset: image_offset.checked_add(len)?, len: one.bytes });
        len = len.checked_add(one.bytes)?;
    }
    Some(ShardPlan { kind, file_name, image_offset, len, header, tensors: placements })
}

/// `model.safetensors.index.json`: which weight is in which file, and the bytes and elements of all weights.
///
/// `plans` are all ranks' plans, made from `tensors`.
pub fn model_index(plans: &[ImagePlan], tensors: &[TensorSpec]) -> serde_json::Value {
    let mut weight_map = serde_json::Map::new();
    let (mut total_size, mut total_parameters) = (0, 0);
    for shard in plans.iter().flat_map(|plan| &plan.shards).filter(|shard| shard.kind == ShardKind::Model) {
        for placement in &shard.tensors {
            if let Some(tensor) = tensors.get(placement.tensor) {
                weight_map.insert(tensor.stored_name(), shard.file_name.clone().into());
                total_size += placement.len;
                total_parameters += placement.len / tensor.dtype.size();
            }
        }
    }
    let metadata = serde_json::json!({ "total_parameters": total_parameters, "total_size": total_size });
    serde_json::json!({ "metadata": metadata, "weight_map": weight_map })
}

/// Reads the header of a whole safetensors file that is not trusted (`bytes`: header and data).
///
/// Returns name, element type, shape and the range of each tensor, counted from the start of `bytes`, in file order.
/// All ranges are within `bytes`, do not overlap, and are as long as the shape says.
#[expect(clippy::type_complexity, reason = "four fields, taken apart at once by the caller")]
pub fn read_header(bytes: &[u8]) -> Result<Vec<(String, Dtype, Vec<u64>, Range<u64>)>, HeaderError> {
    let entries = header::read(bytes)?.into_iter();
    Ok(entries.map(|entry| (entry.name, entry.dtype, entry.shape, entry.range)).collect())
}

/// Which of the files of a rank a tensor goes into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShardKind {
    /// Adapters under PEFT's names: `adapter_model.safetensors`, which one rank writes.
    Adapter,
    /// Weights under Hugging Face names: `model-0000r-of-0000N.safetensors`.
    Model,
    /// Moments, and fp32 weights if the model's files have them in bf16: `optimizer-0000r-of-0000N.safetensors`.
    Optimizer,
}

/// The elements of a tensor that only one rank has, counted in row-major order: of a weight that is stored whole, of
/// anything else a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The rank that has and writes them.
    pub owner: Rank,
    /// The first.
    pub begin: u64,
    /// The one after the last.
    pub end: u64,
}

/// One tensor of the state, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSpec {
    /// Weights: the Hugging Face name. Others: `exp_avg.<name>`, `exp_avg_sq.<name>`, `master.<name>`.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Extents of the whole tensor, outermost first.
    pub shape: Vec<u64>,
    /// The file it goes into.
    pub kind: ShardKind,
    /// The part; `None`: all of it, on every rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<Part>,
}

impl TensorSpec {
    /// Whether a file holds it as a range of the whole tensor, beside the ranges of other ranks.
    fn is_part_of_whole(&self) -> bool {
        self.kind == ShardKind::Model && self.part.is_some()
    }

    /// Its name in a file, unique over the whole state but for the parts of one weight, which share it.
    pub fn stored_name(&self) -> String {
        match &self.part {
            Some(part) if !self.is_part_of_whole() => {
                slices::stored_name(&self.name, &(part.begin..part.end), self.elements())
            }
            _ => self.name.clone(),
        }
    }

    /// The extents of what a file has under that name.
    pub fn stored_shape(&self) -> Vec<u64> {
        match &self.part {
            Some(part) if !self.is_part_of_whole() && (part.begin..part.end) != (0..self.elements()) => {
                vec![part.end.saturating_sub(part.begin)]
            }
            _ => self.shape.clone(),
        }
    }

    /// Bytes of it that its rank has; `u64::MAX` if they don't fit 64 bits, which no plan accepts.
    pub fn bytes(&self) -> u64 {
        let bytes = match &self.part {
            Some(part) => part.end.saturating_sub(part.begin).checked_mul(self.dtype.size()),
            None => self.dtype.bytes(&self.shape),
        };
        bytes.unwrap_or(u64::MAX)
    }

    /// Elements of the whole tensor; `u64::MAX` if they don't fit 64 bits.
    fn elements(&self) -> u64 {
        self.dtype.bytes(&self.shape).map_or(u64::MAX, |bytes| bytes / self.dtype.size())
    }
}

/// The place of what a file has under one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Index into the list of [`TensorSpec`]s that the plan was made from; of a weight in parts, that of the part with
    /// its first element.
    pub tensor: usize,
    /// First byte, counted from the start of the *image*.
    pub offset: u64,
    /// Bytes, of all parts.
    pub len: u64,
}

/// One shard file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardPlan {
    /// Which of the files.
    pub kind: ShardKind,
    /// The object's name within the checkpoint folder.
    pub file_name: String,
    /// First byte of the file within the image; a multiple of the page size.
    pub image_offset: u64,
    /// Bytes of the whole file, header included.
    pub len: u64,
    /// The safetensors header with its length prefix and padding; it begins the file.
    pub header: Vec<u8>,
    /// Its tensors, in file order.
    pub tensors: Vec<Placement>,
}

/// What a rank copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyPlan {
    /// Index into the list of [`TensorSpec`]s that the plan was made from: a tensor that this rank has.
    pub tensor: usize,
    /// The rank whose image it is copied into: this one, unless the tensor is a part of a weight.
    pub image: Rank,
    /// First byte within that image.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl CopyPlan {
    /// Its place in a slot in which that image begins at byte `base`; `None`: beyond 64 bits.
    pub fn within(&self, base: u64) -> Option<SlotCopy> {
        let offset = base.checked_add(self.offset)?;
        Some(SlotCopy { tensor: self.tensor, offset, len: self.len })
    }
}

/// One rank's image, and what the rank copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImagePlan {
    /// The rank.
    pub rank: Rank,
    /// Bytes of the image, a multiple of the page size; 0 if no file is in it.
    pub len: u64,
    /// Its files; a rank with no tensor of a kind has no file of that kind.
    pub shards: Vec<ShardPlan>,
    /// What this rank writes, by image and place.
    pub copies: Vec<CopyPlan>,
}

/// What a worker copies, and where to: a [`CopyPlan`] whose image has its place in the node's slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotCopy {
    /// Index into the list of [`TensorSpec`]s that the plan was made from.
    pub tensor: usize,
    /// First byte within a slot.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn tensor(name: &str, dtype: Dtype, shape: &[u64], kind: ShardKind) -> TensorSpec {
        TensorSpec { name: name.into(), dtype, shape: shape.to_vec(), kind, part: None }
    }

    /// A rank's image with byte `i % 251` of every tensor's data in place.
    fn fill(image: &ImagePlan) -> Vec<u8> {
        let mut bytes = vec![0; image.len as usize];
        for shard in &image.shards {
            let start = shard.image_offset as usize;
            bytes[start..start + shard.header.len()].copy_from_slice(&shard.header);
            for place in &shard.tensors {
                for (i, byte) in bytes[place.offset as usize..][..place.len as usize].iter_mut().enumerate() {
                    *byte = ((i + place.tensor) % 251) as u8;
                }
            }
        }
        bytes
    }

    fn sample() -> Vec<TensorSpec> {
        let mut tensors = Vec::new();
        for (name, shape) in [("embed", vec![16, 8]), ("norm", vec![8]), ("up", vec![8, 24]), ("down", vec![24, 8])] {
            tensors.push(tensor(name, Dtype::F32, &shape, ShardKind::Model));
            tensors.push(tensor(&format!("exp_avg.{name}"), Dtype::F32, &shape, ShardKind::Optimizer));
        }
        tensors
    }

    #[test]
    fn files_are_numbered_as_hugging_face_does_and_only_if_they_exist() {
        let tensors = [
            tensor("a", Dtype::F32, &[100], ShardKind::Model),
            tensor("b", Dtype::F32, &[90], ShardKind::Optimizer),
            tensor("c", Dtype::F32, &[80], ShardKind::Model),
        ];
        let plans = plan(&tensors, WorldSize(4), 4096).unwrap();
        let names: Vec<Vec<&str>> =
            plans.iter().map(|p| p.shards.iter().map(|s| s.file_name.as_str()).collect()).collect();
        assert_eq!(
            names,
            [
                vec!["model-00001-of-00002.safetensors"],
                vec!["optimizer-00001-of-00001.safetensors"],
                vec!["model-00002-of-00002.safetensors"],
                vec![]
            ]
        );
        assert_eq!(plans[3].len, 0);
        let index = model_index(&plans, &tensors);
        assert_eq!(index["metadata"]["total_size"], 720);
        assert_eq!(
            index["weight_map"],
            serde_json::json!({ "a": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors" })
        );
    }

    #[test]
    fn every_file_is_one_that_the_reference_implementation_reads() {
        let tensors = sample();
        for world in 1..=5 {
            for image in plan(&tensors, WorldSize(world), 4096).unwrap() {
                let bytes = fill(&image);
                for shard in &image.shards {
                    let file = &bytes[shard.image_offset as usize..][..shard.len as usize];
                    let read = safetensors::SafeTensors::deserialize(file).unwrap();
                    assert_eq!(read.len(), shard.tensors.len());
                    assert_eq!(shard.header.len() % 64, 0);
                    for place in &shard.tensors {
                        let view = read.tensor(&tensors[place.tensor].name).unwrap();
                        assert_eq!(view.data(), &bytes[place.offset as usize..][..place.len as usize]);
                        assert!(view.shape().iter().map(|&n| n as u64).eq(tensors[place.tensor].shape.iter().copied()));
                    }
                    let ours = read_header(file).unwrap();
                    for ((name, .., range), place) in ours.iter().zip(&shard.tensors) {
                        assert_eq!(*name, tensors[place.tensor].name);
                        assert_eq!(range.start + shard.image_offset, place.offset);
                    }
                }
            }
        }
    }

    #[test]
    fn parts_are_written_by_their_owners_as_slices() {
        let part = |name: &str, owner, begin, end| TensorSpec {
            part: Some(Part { owner: Rank(owner), begin, end }),
            ..tensor(name, Dtype::F32, &[10, 10], ShardKind::Optimizer)
        };
        let tensors = [
            part("exp_avg.w", 1, 0, 64),
            part("exp_avg.w", 2, 64, 100),
            part("exp_avg.v", 2, 0, 100),
            tensor("w", Dtype::F32, &[10, 10], ShardKind::Model),
            tensor("v", Dtype::F32, &[10], ShardKind::Model),
        ];
        let plans = plan(&tensors, WorldSize(3), 4096).unwrap();
        let stored = |plan: &ImagePlan| {
            let image = fill(plan);
            let file = |s: &ShardPlan| read_header(&image[s.image_offset as usize..][..s.len as usize]).unwrap();
            plan.shards.iter().flat_map(file).map(|(name, _, shape, _)| (name, shape)).collect::<Vec<_>>()
        };
        let entry = |name: &str, shape: &[u64]| (name.to_owned(), shape.to_vec());
        // Whole tensors balance the uneven parts.
        assert_eq!(stored(&plans[0]), [entry("w", &[10, 10])]);
        assert_eq!(stored(&plans[1]), [entry("v", &[10]), entry("exp_avg.w[0:64]", &[64])]);
        assert_eq!(stored(&plans[2]), [entry("exp_avg.v", &[10, 10]), entry("exp_avg.w[64:100]", &[36])]);
        let sent = serde_json::to_string(&tensors).unwrap();
        assert_eq!(serde_json::from_str::<Vec<TensorSpec>>(&sent).unwrap(), tensors);

        let twice = [part("w", 0, 0, 64), part("w", 1, 0, 64)];
        assert_eq!(plan(&twice, WorldSize(2), 4096), Err(PlanError::Duplicate("w[0:64]".into())));
        for bad in [part("w", 0, 64, 101), part("w", 0, 9, 9), part("w", 3, 0, 9), part("w", 0, 9, u64::MAX)] {
            assert_eq!(plan(&[bad], WorldSize(3), 4096), Err(PlanError::Part("w".into())));
        }
    }

    /// The files of all ranks, by name, as the copies of all ranks fill them: a byte says its tensor's
    /// name and its place in the whole tensor.
    fn files(tensors: &[TensorSpec], plans: &[ImagePlan]) -> BTreeMap<String, Vec<u8>> {
        let whole = |name: &str, at: u64| (name.bytes().map(u64::from).sum::<u64>() + at) as u8;
        let mut images: Vec<Vec<u8>> = plans.iter().map(|plan| vec![0xee; plan.len as usize]).collect();
        for (rank, plan) in (0..).map(Rank).zip(plans) {
            for copy in &plan.copies {
                let spec = &tensors[copy.tensor];
                let begin = spec.part.map_or(0, |part| part.begin) * spec.dtype.size();
                assert!(spec.part.is_none_or(|part| part.owner == rank), "copied by another than its owner");
                assert_eq!(copy.len, spec.bytes());
                let target = &mut images[copy.image.get() as usize][copy.offset as usize..][..copy.len as usize];
                target.iter_mut().zip(begin..).for_each(|(byte, at)| *byte = whole(&spec.name, at));
            }
        }
        let mut files = BTreeMap::new();
        for (plan, image) in plans.iter().zip(images) {
            for shard in &plan.shards {
                let mut file = image[shard.image_offset as usize..][..shard.len as usize].to_vec();
                file[..shard.header.len()].copy_from_slice(&shard.header);
                assert!(files.insert(shard.file_name.clone(), file).is_none());
            }
        }
        files
    }

    /// `tensors` with every weight in as many parts as there are ranks, cut as a flat bucket of all weights would be.
    fn in_parts(tensors: &[TensorSpec], world: u32) -> Vec<TensorSpec> {
        let weights = || tensors.iter().filter(|tensor| tensor.kind == ShardKind::Model);
        let all: u64 = weights().map(TensorSpec::elements).sum();
        let chunk = all.div_ceil(u64::from(world)).max(1);
        let mut parts: Vec<TensorSpec> =
            tensors.iter().filter(|tensor| tensor.kind != ShardKind::Model).cloned().collect();
        for owner in 0..world {
            let (from, to) = (chunk * u64::from(owner), chunk * u64::from(owner + 1));
            let mut start = 0;
            for tensor in weights() {
                let end = start + tensor.elements();
                let (first, last) = (from.max(start), to.min(end));
                if first < last {
                    let part = Part { owner: Rank(owner), begin: first - start, end: last - start };
                    parts.push(TensorSpec { part: Some(part), ..tensor.clone() });
                }
                start = end;
            }
        }
        // A tensor without elements has no parts.
        parts.extend(weights().filter(|tensor| tensor.elements() == 0).cloned());
        parts
    }

    #[test]
    fn weights_in_parts_make_the_files_of_whole_weights_to_the_last_byte() {
        let slices = |world: u32| -> Vec<TensorSpec> {
            let slice = |owner: u32, name: &str| TensorSpec {
                part: Some(Part { owner: Rank(owner), begin: u64::from(owner) * 2, end: u64::from(owner) * 2 + 2 }),
                ..tensor(&format!("exp_avg.{name}"), Dtype::F32, &[u64::from(world) * 2], ShardKind::Optimizer)
            };
            (0..world).flat_map(|owner| ["norm", "up"].map(|name| slice(owner, name))).collect()
        };
        let weights: Vec<_> = sample().into_iter().filter(|tensor| tensor.kind == ShardKind::Model).collect();
        for world in 1..=5 {
            for (what, whole) in [
                ("ddp", sample()),
                ("weights alone", weights.clone()),
                ("zero1", [weights.clone(), slices(world)].concat()),
            ] {
                let parts = in_parts(&whole, world);
                let (one, other) =
                    (plan(&whole, WorldSize(world), 4096).unwrap(), plan(&parts, WorldSize(world), 4096).unwrap());
                assert_eq!(files(&whole, &one), files(&parts, &other), "{what}, {world} ranks");
                assert_eq!(model_index(&one, &whole), model_index(&other, &parts), "{what}, {world} ranks");
                let elsewhere = |plans: &[ImagePlan]| {
                    plans.iter().flat_map(|plan| plan.copies.iter().filter(|copy| copy.image != plan.rank)).count()
                };
                assert_eq!(elsewhere(&one), 0, "whole tensors are copied into the rank's own image");
                assert_eq!(elsewhere(&other) > 0, world > 1, "{what}, {world} ranks");
            }
        }
    }

    #[test]
    fn parts_that_are_not_one_whole_weight_are_refused_by_name() {
        let part = |shape: &[u64], owner, begin, end| TensorSpec {
            part: Some(Part { owner: Rank(owner), begin, end }),
            ..tensor("w", Dtype::F32, shape, ShardKind::Model)
        };
        let of = |tensors: &[TensorSpec]| plan(tensors, WorldSize(2), 4096).map(|_| ());
        let cover = |why: &str| Err(PlanError::Cover { name: "w".into(), why: why.into() });
        assert_eq!(of(&[part(&[4, 4], 1, 6, 16), part(&[4, 4], 0, 0, 6)]), Ok(()));
        assert_eq!(of(&[part(&[4, 4], 0, 0, 16)]), Ok(()), "one rank may have all of it");
        assert_eq!(of(&[part(&[4, 4], 0, 0, 6), part(&[4, 4], 1, 7, 16)]), cover("lacks its elements from 6 on"));
        assert_eq!(of(&[part(&[4, 4], 1, 1, 16)]), cover("lacks its elements from 0 on"));
        assert_eq!(of(&[part(&[4, 4], 0, 0, 6)]), cover("lacks its elements from 6 on"));
        assert_eq!(of(&[part(&[4, 4], 0, 0, 7), part(&[4, 4], 1, 6, 16)]), cover("has its elements 6:7 twice"));
        assert_eq!(of(&[part(&[4, 4], 0, 0, 16), part(&[4, 4], 1, 0, 16)]), cover("has its elements 0:16 twice"));
        let mixed = Err(PlanError::Mixed("w".into()));
        assert_eq!(of(&[part(&[4, 4], 0, 0, 6), part(&[2, 8], 1, 6, 16)]), mixed);
        let other = TensorSpec { dtype: Dtype::BF16, ..part(&[4, 4], 1, 6, 16) };
        assert_eq!(of(&[part(&[4, 4], 0, 0, 6), other]), mixed);
        assert_eq!(of(&[part(&[4, 4], 0, 0, 17)]), Err(PlanError::Part("w".into())));
        let whole = tensor("w", Dtype::F32, &[4, 4], ShardKind::Model);
        let twice = Err(PlanError::Duplicate("w".into()));
        assert_eq!(of(&[part(&[4, 4], 0, 0, 16), whole.clone()]), twice);
        assert_eq!(of(&[whole, part(&[4, 4], 0, 0, 16)]), twice);
    }

    /// The list says which elements a part has; its order says nothing.
    #[test]
    fn the_parts_of_a_weight_have_their_places_in_whatever_order_they_are_listed() {
        let listed = in_parts(&sample(), 3);
        for tensors in [listed.iter().rev().cloned().collect::<Vec<_>>(), listed.clone()] {
            let plans = plan(&tensors, WorldSize(3), 4096).unwrap();
            assert_eq!(files(&tensors, &plans), files(&listed, &plan(&listed, WorldSize(3), 4096).unwrap()));
            let stored = stored(&tensors, WorldSize(3)).unwrap();
            for one in stored.iter().filter(|one| one.in_parts) {
                let begins: Vec<u64> = one.tensors.iter().map(|&at| tensors[at].part.unwrap().begin).collect();
                assert!(begins.is_sorted() && begins[0] == 0, "{}: {begins:?}", one.name);
            }
            // A placement names the part with the first element.
            for place in plans.iter().flat_map(|plan| &plan.shards).flat_map(|shard| &shard.tensors) {
                assert_eq!(tensors[place.tensor].part.map_or(0, |part| part.begin), 0);
            }
        }
    }

    #[test]
    fn a_weight_in_parts_stays_on_one_node() {
        let tensors = in_parts(&sample(), 3);
        let plans = plan(&tensors, WorldSize(3), 4096).unwrap();
        assert_eq!(within(&plans, &tensors, NodeRanks::alone(3)), Ok(()));
        for (first, workers) in [(0, 1), (1, 2), (0, 2)] {
            let error = within(&plans, &tensors, NodeRanks { first: Rank(first), workers, world: WorldSize(3) });
            let error = error.unwrap_err();
            assert!(matches!(error, PlanError::Elsewhere { .. }), "{error:?}");
            assert_eq!(error.kind(), Kind::Config);
            assert!(error.hint().is_some_and(|hint| hint.contains("parallel.strategy")));
        }
        let whole = sample();
        let plans = plan(&whole, WorldSize(3), 4096).unwrap();
        assert_eq!(within(&plans, &whole, NodeRanks { first: Rank(1), workers: 1, world: WorldSize(3) }), Ok(()));
    }

    #[test]
    fn lists_that_are_not_a_state_are_refused() {
        let one = tensor("a", Dtype::F32, &[1], ShardKind::Model);
        let huge = tensor("h", Dtype::I64, &[1 << 61], ShardKind::Model);
        let most = tensor("m", Dtype::I64, &[(1 << 61) - 1], ShardKind::Model);
        let twice = TensorSpec { kind: ShardKind::Optimizer, ..one.clone() };
        assert_eq!(plan(&[], WorldSize(1), 4096), Err(PlanError::Empty));
        assert_eq!(plan(&[one.clone(), twice], WorldSize(2), 4096), Err(PlanError::Duplicate("a".into())));
        assert_eq!(plan(&[huge], WorldSize(1), 4096), Err(PlanError::TooLarge("h".into())));
        assert_eq!(plan(std::slice::from_ref(&most), WorldSize(1), 4096), Err(PlanError::TooLarge("m".into())));
        let other = TensorSpec { name: "n".into(), ..most.clone() };
        assert_eq!(plan(&[most, other], WorldSize(2), 4096), Err(PlanError::TooLarge("n".into())));
        assert!(matches!(plan(std::slice::from_ref(&one), WorldSize(0), 4096), Err(PlanError::World { .. })));
        assert!(matches!(plan(std::slice::from_ref(&one), WorldSize(1), 0), Err(PlanError::World { .. })));
        let reserved = TensorSpec { name: "__metadata__".into(), ..one };
        assert!(matches!(plan(&[reserved], WorldSize(1), 4096), Err(PlanError::Name(_))));
    }

    fn tensors() -> impl Strategy<Value = Vec<TensorSpec>> {
        let dtype = proptest::sample::select(Dtype::ALL.to_vec());
        let shape = proptest::collection::vec(0_u64..40, 0..3);
        proptest::collection::vec((dtype, shape, any::<bool>()), 1..40).prop_map(|list| {
            let kind = |model| if model { ShardKind::Model } else { ShardKind::Optimizer };
            let spec = |(i, (dtype, shape, model)): (usize, (Dtype, Vec<u64>, bool))| {
                tensor(&format!("t{}", (i * 7919) % 1000), dtype, &shape, kind(model))
            };
            list.into_iter().enumerate().map(spec).collect()
        })
    }

    /// The whole path of a state: images by the plan of one world, objects, a restore image, tensors by name.
    #[tokio::test]
    async fn a_state_saved_by_any_world_size_is_read_back_from_its_objects() {
        use crate::{
            checkpoint::restore::{RemoteFile, fetch, plan_pieces},
            config::StorageConfig,
            storage::Store,
        };

        let tensors = sample();
        let store = Store::open("memory://", &StorageConfig::plain(4, 8)).unwrap();
        for world in 1..=4 {
            let folder = format!("w{world}");
            let mut files = Vec::new();
            for image in plan(&tensors, WorldSize(world), 4096).unwrap() {
                let bytes = bytes::Bytes::from(fill(&image));
                for shard in &image.shards {
                    let body = bytes.slice(shard.image_offset as usize..(shard.image_offset + shard.len) as usize);
                    let put = store.upload(&format!("{folder}/{}", shard.file_name), body, |_| {}).await.unwrap();
                    files.push(RemoteFile { name: shard.file_name.clone(), bytes: put.bytes, crc64: Some(put.crc64) });
                }
            }
            let layout = plan_pieces(&files, 700).unwrap();
            let (filled, chunks) = std::sync::mpsc::channel();
            let chunk = |at: u64, len: u64| Chunk { at, bytes: vec![0; len as usize], filled: filled.clone() };
            let pieces = layout.pieces.iter().map(|piece| (*piece, chunk(piece.image_offset, piece.len))).collect();
            fetch(&store, &folder, &files, pieces, |_| {}).await.unwrap();
            drop(filled);
            let mut image = vec![0; layout.total as usize];
            for (at, bytes) in chunks {
                image[at as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
            let mut seen = 0;
            for &(at, len) in &layout.files {
                let file = &image[at as usize..(at + len) as usize];
                for (name, dtype, shape, range) in read_header(file).unwrap() {
                    let index = tensors.iter().position(|tensor| tensor.name == name).unwrap();
                    assert_eq!((dtype, &shape), (tensors[index].dtype, &tensors[index].shape));
                    let expected = (0..tensors[index].bytes() as usize).map(|i| ((i + index) % 251) as u8);
                    assert!(file[range.start as usize..range.end as usize].iter().copied().eq(expected), "{name}");
                    seen += 1;
                }
            }
            assert_eq!(seen, tensors.len());
        }
    }

    /// A part of the restore image, handed over once it is filled.
    struct Chunk {
        at: u64,
        bytes: Vec<u8>,
        filled: std::sync::mpsc::Sender<(u64, Vec<u8>)>,
    }
    impl AsMut<[u8]> for Chunk {
        fn as_mut(&mut self) -> &mut [u8] {
            &mut self.bytes
        }
    }
    impl Drop for Chunk {
        fn drop(&mut self) {
            self.filled.send((self.at, std::mem::take(&mut self.bytes))).unwrap();
        }
    }

    proptest! {
        #[test]
        fn every_tensor_has_one_place_and_ranks_are_balanced(
            tensors in tensors(), world in 1_u32..9, shuffle in any::<u64>()
        ) {
            let plans = plan(&tensors, WorldSize(world), 4096).unwrap();
            prop_assert_eq!(plans.len(), world as usize);
            let mut seen = vec![0; tensors.len()];
            let mut loads = Vec::new();
            for (rank, image) in plans.iter().enumerate() {
                prop_assert_eq!(image.rank.get() as usize, rank);
                prop_assert_eq!(image.len % 4096, 0);
                let mut end = 0;
                let mut load = 0;
                for shard in &image.shards {
                    prop_assert_eq!(shard.image_offset % 4096, 0);
                    prop_assert!(shard.image_offset >= end);
                    prop_assert!(!shard.tensors.is_empty());
                    end = shard.image_offset + shard.header.len() as u64;
                    for place in &shard.tensors {
                        seen[place.tensor] += 1;
                        prop_assert_eq!(place.offset, end);
                        prop_assert_eq!(place.offset % tensors[place.tensor].dtype.size(), 0);
                        prop_assert_eq!(place.len, tensors[place.tensor].bytes());
                        prop_assert_eq!(shard.kind, tensors[place.tensor].kind);
                        end += place.len;
                        load += place.len;
                    }
                    prop_assert_eq!(end, shard.image_offset + shard.len);
                    prop_assert!(end <= image.len);
                }
                loads.push(load);
            }
            prop_assert!(seen.iter().all(|&n| n == 1));
            let total: u64 = loads.iter().sum();
            let largest = tensors.iter().map(TensorSpec::bytes).max().unwrap();
            let most = loads.iter().copied().max().unwrap();
            prop_assert!((most - largest.min(most)) * u64::from(world) <= total);

            // Every rank copies what is in its own image, in that order.
            for image in &plans {
                let placed: Vec<_> = image.shards.iter().flat_map(|shard| &shard.tensors).collect();
                prop_assert_eq!(image.copies.len(), placed.len());
                for (copy, place) in image.copies.iter().zip(placed) {
                    let CopyPlan { tensor, image: of, offset, len } = copy.clone();
                    prop_assert_eq!((tensor, of, offset, len), (place.tensor, image.rank, place.offset, place.len));
                }
            }

            // With the weights in parts, the files are the same, and the copies write each byte of data once.
            let parts = in_parts(&tensors, world);
            let split = plan(&parts, WorldSize(world), 4096).unwrap();
            prop_assert_eq!(files(&tensors, &plans), files(&parts, &split));
            for (image, whole) in split.iter().zip(&plans) {
                let copies = split.iter().flat_map(|plan| &plan.copies).filter(|copy| copy.image == image.rank);
                let mut copied: Vec<_> = copies.map(|copy| copy.offset..copy.offset + copy.len).collect();
                copied.retain(|range| !range.is_empty());
                copied.sort_by_key(|range| range.start);
                prop_assert!(copied.windows(2).all(|pair| pair[0].end <= pair[1].start));
                let data = |image: &ImagePlan| -> u64 {
                    image.shards.iter().flat_map(|shard| &shard.tensors).map(|place| place.len).sum()
                };
                prop_assert_eq!(copied.iter().map(|range| range.end - range.start).sum::<u64>(), data(whole));
            }

            // The order of the list does not matter: only names and sizes do.
            let mut order: Vec<usize> = (0..tensors.len()).collect();
            order.sort_by_key(|&i| (i as u64).wrapping_mul(shuffle | 1).rotate_left(17));
            let shuffled: Vec<TensorSpec> = order.iter().map(|&i| tensors[i].clone()).collect();
            let again = super::plan(&shuffled, WorldSize(world), 4096).unwrap();
            for (a, b) in plans.iter().zip(&again) {
                let headers = |image: &ImagePlan| image.shards.iter().map(|s| s.header.clone()).collect::<Vec<_>>();
                prop_assert_eq!(headers(a), headers(b));
            }
        }
    }
}
