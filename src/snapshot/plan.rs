//! Which rank writes which tensor bytes, and where in its image they lie.
//!
//! State is replicated over the ranks (DDP), so each tensor is written once, by the rank that the plan gives it to:
//! largest first, always to the rank with the fewest bytes so far, so that every rank writes about the same. The plan is
//! a pure function of (tensors, world size): every process that makes it from the same list makes the same one.
//!
//! Stored layout of one rank's image: its model shard, then, at the next page boundary, its optimizer shard. A shard is a
//! complete safetensors file: 8 bytes little-endian header length, JSON header padded with spaces so that the data
//! begins on a 64-byte boundary, then the tensors without a gap. Shapes never change during a run, so headers are
//! written once, when the plan is made; a capture writes tensor bytes only.

use serde::{Deserialize, Serialize};

use crate::ids::Rank;

/// Element types that checkpoints may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// bfloat16.
    BF16,
    /// 16-bit float.
    F16,
    /// 64-bit integer.
    I64,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::BF16 | Self::F16 => 2,
            Self::I64 => 8,
        }
    }
    /// The name in a safetensors header.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::BF16 => "BF16",
            Self::F16 => "F16",
            Self::I64 => "I64",
        }
    }
}

/// Which of the two files of a rank a tensor goes into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShardKind {
    /// Weights under Hugging Face names: `model-0000r-of-0000N.safetensors`.
    Model,
    /// Moments: `optimizer-0000r-of-0000N.safetensors`.
    Optimizer,
}

/// One tensor of the state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSpec {
    /// Unique over the whole state. Weights: the Hugging Face name. Moments: `exp_avg.<name>`, `exp_avg_sq.<name>`.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Extents, outermost first.
    pub shape: Vec<u64>,
    /// The file it goes into.
    pub kind: ShardKind,
}

impl TensorSpec {
    /// Bytes of the tensor's data.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<u64>() * self.dtype.size()
    }
}

/// Where one tensor's bytes lie.
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
    /// Who writes it.
    pub rank: Rank,
    /// Bytes of the image, a multiple of the page size; 0 if the rank writes nothing.
    pub len: u64,
    /// Its files; a rank with no tensor of a kind has no file of that kind.
    pub shards: Vec<ShardPlan>,
}
