//! Which rank writes which tensor bytes, and their places in its image.
//!
//! A replicated tensor is written once, by the rank that the plan assigns it to: the largest first, always to the rank
//! with the fewest bytes so far, so that every rank writes about the same amount. A tensor's [`Part`] that only one
//! rank has (under ZeRO-1) is written by that rank, under the name of a slice ([`slices`]); adapters are written by the
//! first rank, because their readers know one file. The plan is a pure function of (tensors, world size): every process
//! makes the same plan from the same list.
//!
//! Stored layout of one rank's image: its model shard, or the adapters; then, at the next page boundary, its optimizer
//! shard. A shard is a complete safetensors file ([`crate::format::header`]) whose tensors follow one another without a
//! gap, those with the largest elements first, so that each is aligned, then by name. Shapes never change during a run,
//! so headers are written once, when the plan is made; a capture writes tensor bytes only.

use std::{collections::HashSet, ops::Range};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Explain, Kind},
    format::{header, slices},
    ids::{Rank, WorldSize},
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
    /// Sizes beyond 64 bits, or a header beyond what readers accept.
    #[error("tensor {0:?} makes the state too large for a file")]
    TooLarge(String),
}

impl Explain for PlanError {
    fn kind(&self) -> Kind {
        // The list is the model's own: a person can fix it only by choosing another model.
        Kind::Bug
    }
}

/// Divides `tensors` over the ranks and lays out every rank's image; one [`ImagePlan`] per rank, in the order of ranks.
///
/// Parts go to their owners. The others are assigned largest first, each to the rank with the fewest bytes so far
/// (ties: the lowest rank; equal sizes: by name), so without parts no rank has more than the average plus one largest
/// tensor (Graham 1969, list scheduling). `page`: bytes of a memory page.
pub fn plan(tensors: &[TensorSpec], world: WorldSize, page: u64) -> Result<Vec<ImagePlan>, PlanError> {
    if world.get() == 0 || !page.is_power_of_two() {
        return Err(PlanError::World { world, page });
    }
    let sizes = checked_sizes(tensors, world)?;
    let owned = assign(tensors, &sizes, world);

    let count = |kind| owned.iter().filter(|own| own.iter().any(|&t| tensors[t].kind == kind)).count();
    let mut model = Numbering { stem: "model", next: 1, of: count(ShardKind::Model) };
    let mut optimizer = Numbering { stem: "optimizer", next: 1, of: count(ShardKind::Optimizer) };
    let mut plans = Vec::with_capacity(owned.len());
    for (rank, own) in (0..).map(Rank).zip(&owned) {
        let mut image = ImagePlan { rank, len: 0, shards: Vec::new() };
        for kind in [ShardKind::Adapter, ShardKind::Model, ShardKind::Optimizer] {
            let own: Vec<usize> = own.iter().copied().filter(|&t| tensors[t].kind == kind).collect();
            if let Some(&last) = own.last() {
                let name = match kind {
                    ShardKind::Adapter => layout::ADAPTER.to_owned(),
                    ShardKind::Model => model.next(),
                    ShardKind::Optimizer => optimizer.next(),
                };
                let shard = lay_out(tensors, &sizes, own, kind, name, image.len);
                let end = shard.as_ref().and_then(|shard| shard.image_offset.checked_add(shard.len));
                let (Some(shard), Some(len)) = (shard, end.and_then(|end| end.checked_next_multiple_of(page))) else {
                    return Err(PlanError::TooLarge(tensors[last].name.clone()));
                };
                image.len = len;
                image.shards.push(shard);
            }
        }
        plans.push(image);
    }
    Ok(plans)
}

/// Bytes of every tensor; the error says why the list is not a valid state.
fn checked_sizes(tensors: &[TensorSpec], world: WorldSize) -> Result<Vec<u64>, PlanError> {
    if tensors.is_empty() {
        return Err(PlanError::Empty);
    }
    let mut names = HashSet::with_capacity(tensors.len());
    let mut total = 0_u64;
    let mut sizes = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        if tensor.name.is_empty() || tensor.name == header::METADATA {
            return Err(PlanError::Name(tensor.name.clone()));
        }
        let whole = tensor.dtype.bytes(&tensor.shape).ok_or_else(|| PlanError::TooLarge(tensor.name.clone()))?;
        if let Some(part) = &tensor.part
            && (part.begin >= part.end || part.end > whole / tensor.dtype.size() || part.owner.get() >= world.get())
        {
            return Err(PlanError::Part(tensor.name.clone()));
        }
        let stored = tensor.stored_name();
        if names.contains(&stored) {
            return Err(PlanError::Duplicate(stored));
        }
        names.insert(stored);
        let bytes = tensor.dtype.bytes(&tensor.stored_shape());
        let sum = bytes.and_then(|bytes| total.checked_add(bytes));
        let (Some(bytes), Some(sum)) = (bytes, sum) else {
            return Err(PlanError::TooLarge(tensor.name.clone()));
        };
        total = sum;
        sizes.push(bytes);
    }
    Ok(sizes)
}

/// Which tensors each rank writes, in file order.
fn assign(tensors: &[TensorSpec], sizes: &[u64], world: WorldSize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by(|&a, &b| sizes[b].cmp(&sizes[a]).then_with(|| tensors[a].name.cmp(&tensors[b].name)));
    let mut owned = vec![Vec::new(); world.get() as usize];
    // Adapters are one file.
    let owner = |tensor: usize| match (&tensors[tensor].part, tensors[tensor].kind) {
        (Some(part), _) => Some(part.owner.get() as usize),
        (None, ShardKind::Adapter) => Some(0),
        (None, _) => None,
    };
    let (fixed, free): (Vec<usize>, Vec<usize>) = order.into_iter().partition(|&tensor| owner(tensor).is_some());
    let mut fixed_loads = vec![0; owned.len()];
    for tensor in fixed {
        if let Some(owner) = owner(tensor) {
            owned[owner].push(tensor);
            fixed_loads[owner] += sizes[tensor];
        }
    }
    let mut loads: std::collections::BTreeSet<(u64, u32)> = fixed_loads.into_iter().zip(0..).collect();
    for tensor in free {
        // There is at least one rank, and each one taken out is put back.
        if let Some((load, rank)) = loads.pop_first() {
            owned[rank as usize].push(tensor);
            loads.insert((load + sizes[tensor], rank));
        }
    }
    for own in &mut owned {
        own.sort_by(|&a, &b| file_order(&tensors[a], &tensors[b]));
    }
    owned
}

/// The order of tensors in a file: largest elements first, so that each is aligned to its own; then by name.
fn file_order(a: &TensorSpec, b: &TensorSpec) -> std::cmp::Ordering {
    header::file_order((a.dtype, &a.stored_name()), (b.dtype, &b.stored_name()))
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
fn lay_out(
    tensors: &[TensorSpec],
    sizes: &[u64],
    own: Vec<usize>,
    kind: ShardKind,
    file_name: String,
    image_offset: u64,
) -> Option<ShardPlan> {
    let stored = |&t: &usize| (tensors[t].stored_name(), tensors[t].dtype, tensors[t].stored_shape());
    let stored: Vec<_> = own.iter().map(stored).collect();
    let header = header::write(stored.iter().map(|(name, dtype, shape)| (name.as_str(), *dtype, shape.as_slice())))?;
    let mut len = header.len() as u64;
    let mut placements = Vec::with_capacity(own.len());
    for tensor in own {
        placements.push(Placement { tensor, offset: image_offset.checked_add(len)?, len: sizes[tensor] });
        len = len.checked_add(sizes[tensor])?;
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

/// The elements of a tensor that only one rank has, counted in row-major order.
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
    /// Its name in a file, unique over the whole state.
    pub fn stored_name(&self) -> String {
        match &self.part {
            Some(part) => slices::stored_name(&self.name, &(part.begin..part.end), self.elements()),
            None => self.name.clone(),
        }
    }

    /// Its extents in a file.
    pub fn stored_shape(&self) -> Vec<u64> {
        match &self.part {
            Some(part) if (part.begin..part.end) != (0..self.elements()) => vec![part.end.saturating_sub(part.begin)],
            _ => self.shape.clone(),
        }
    }

    /// Bytes of its data in a file; `u64::MAX` if they don't fit 64 bits, which no plan accepts.
    pub fn bytes(&self) -> u64 {
        self.dtype.bytes(&self.stored_shape()).unwrap_or(u64::MAX)
    }

    /// Elements of the whole tensor; `u64::MAX` if they don't fit 64 bits.
    fn elements(&self) -> u64 {
        self.dtype.bytes(&self.shape).map_or(u64::MAX, |bytes| bytes / self.dtype.size())
    }
}

/// The place of one tensor's bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Index into the list of [`TensorSpec`]s that the plan was made from.
    pub tensor: usize,
    /// First byte, counted from the start of the *image*.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// One shard file of one rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardPlan {
    /// Which of the two files.
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

/// One rank's image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagePlan {
    /// The rank that writes it.
    pub rank: Rank,
    /// Bytes of the image, a multiple of the page size; 0 if the rank writes nothing.
    pub len: u64,
    /// Its files; a rank with no tensor of a kind has no file of that kind.
    pub shards: Vec<ShardPlan>,
}

#[cfg(test)]
mod tests {
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
