//! How much memory a rank and its node need, from the configuration alone: pure, exact arithmetic on the tensors that
//! the strategies and the model make.
//!
//! | term | what it is | made in |
//! |---|---|---|
//! | weights | what is computed with; of a base, too | `strategy/*.rs` |
//! | masters | fp32 weights beside rounded ones | `strategy/*.rs` |
//! | moments | both of AdamW | `strategy/*.rs` |
//! | gradients | fp32, whole or a chunk | `strategy/*.rs`, `torch/shim/group.cpp` |
//! | rooms | gathered stages of `shard`, and their gradients | `strategy/shard.rs` |
//! | exchanges | what other ranks send on a CPU: chunks of gradients, gathered weights | `torch/shim/group.cpp` |
//! | activations | what the forward passes keep: [`model::memory`](crate::model::memory) | `strategy/stages.rs` |
//! | loss | scores, and gradients that are computed along with the loss | `model/loss.rs` |
//! | work | what a backward pass makes beside all that | `model/decoder` |
//! | constants | tokens, tables, masks | `batch.rs`, `model/rope.rs` |
//!
//! A rank's need is that of its fullest [`Moment`]. The allocator of a GPU takes more from the device than tensors
//! have, and each process needs some of its own ([`PROCESS`]): whoever compares adds that. On the host, each snapshot
//! slot takes a whole state ([`Setting::slot_bytes`]), which is laid out as a run lays it out.
//!
//! `tests.rs` compares the formula with LibTorch's own count of bytes.

mod fit;
mod slots;
#[cfg(test)]
mod tests;

use serde::Serialize;

pub use self::fit::{Fit, fits};
use super::{
    partition::{Partition, Section},
    strategy::{Buckets, Graph},
};
use crate::{
    config::{Activations, ConfigError, Precision, Spread, Strategy, TrainTask},
    ids::{Rank, WorldSize},
    model::{
        Stage,
        memory::{Arithmetic, Extents, PassNeeds, Plan, width},
    },
    torch::fused::Fused,
};

/// Bytes that a worker needs beside its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Process {
    /// In the host's memory: LibTorch's libraries, threads, buffers of connections.
    pub host: u64,
    /// On its GPU: the context of CUDA, work space of cuBLAS, channels of NCCL.
    pub gpu: u64,
}

/// Bytes that a worker needs beside its tensors: an estimate, to be replaced by what workers show.
pub const PROCESS: Process = Process { host: 512 << 20, gpu: 1 << 30 };

/// All that one rank's memory depends on.
#[derive(Clone, Copy, Debug)]
pub struct Setting<'a> {
    /// The model.
    pub plan: &'a Plan,
    /// How ranks share the work; in a world of one it makes no difference.
    pub strategy: Strategy,
    /// Arithmetic.
    pub precision: Precision,
    /// What passes keep. [`Activations::Auto`] is the least that it keeps on a GPU.
    pub activations: Activations,
    /// Size of the buckets, MiB.
    pub bucket_mib: u32,
    /// Ranks.
    pub world: WorldSize,
    /// Whether GPUs compute.
    pub on_gpu: bool,
    /// What is computed in one pass over memory.
    pub fused: Fused,
    /// The tokens of a pass.
    pub extents: Extents,
    /// Whether a step has several passes.
    pub accumulates: bool,
}

/// Bytes of a rank, by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Terms {
    /// Weights that are computed with.
    pub weights: u64,
    /// fp32 weights beside rounded ones.
    pub masters: u64,
    /// Moments of the optimizer.
    pub moments: u64,
    /// Gradients.
    pub gradients: u64,
    /// Gathered blocks and their gradients.
    pub rooms: u64,
    /// What other ranks send.
    pub exchanges: u64,
    /// What forward passes keep.
    pub activations: u64,
    /// Scores, and gradients that come with the loss.
    pub loss: u64,
    /// What is made beside them.
    pub work: u64,
    /// Tokens and tables.
    pub constants: u64,
}

impl Terms {
    /// All of them.
    pub const fn sum(&self) -> u64 {
        let Self { weights, masters, moments, gradients, rooms, exchanges, activations, loss, work, constants } = *self;
        weights + masters + moments + gradients + rooms + exchanges + activations + loss + work + constants
    }
}

/// When a rank needs the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Moment {
    /// At its start, when it takes its share of the fresh weights.
    Start,
    /// When the loss is computed.
    Loss,
    /// In a block's backward pass.
    Backward,
    /// In the embedding's backward pass.
    Embedding,
    /// When gradients are averaged, or weights gathered.
    Exchange,
}

/// The need of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Forecast {
    /// Bytes of all tensors at the fullest moment.
    pub bytes: u64,
    /// That moment.
    pub fullest: Moment,
    /// What the bytes are for.
    pub terms: Terms,
}

impl<'a> Setting<'a> {
    /// Of a configuration, in a world of this size.
    ///
    /// # Errors
    /// More ranks than a step has sequences.
    pub fn of(task: &TrainTask, plan: &'a Plan, world: WorldSize, on_gpu: bool) -> Result<Self, ConfigError> {
        let TrainTask { data, train, parallel, .. } = task;
        let spread = Spread::new(train.global_batch, world, train.max_micro_batch)?;
        // GPUs have LibTorch's operations, or need no more than they do.
        let fused = if train.fused && !on_gpu { Fused::ALL } else { Fused::NONE };
        let sequences = spread.largest_pass();
        Ok(Self {
            plan,
            strategy: parallel.strategy,
            precision: train.precision,
            activations: train.activations,
            bucket_mib: parallel.bucket_mib,
            world,
            on_gpu,
            fused,
            extents: Extents { sequences, length: data.sequence_length, packed: false },
            accumulates: spread.most_passes() > 1,
        })
    }

    /// The same with passes of another number of sequences.
    pub const fn with_sequences(self, sequences: u32) -> Self {
        Self { extents: Extents { sequences, ..self.extents }, ..self }
    }

    /// Whether ranks share the work at all.
    const fn is_shared(&self) -> bool {
        self.world.get() > 1
    }

    const fn is_staged(&self) -> bool {
        self.is_shared() && matches!(self.strategy, Strategy::Shard)
    }

    /// Adapters are in fp32.
    const fn state_precision(&self) -> Precision {
        if self.plan.has_adapters() { Precision::Fp32 } else { self.precision }
    }

    /// Whether every rank has all fp32 weights, and rounds them where they are used.
    fn casts(&self) -> bool {
        let is_whole = !self.is_shared() || self.strategy == Strategy::Ddp;
        is_whole && self.state_precision() == Precision::Bf16 && !self.plan.needs_rounded_weights_only()
    }

    fn arithmetic(&self) -> Arithmetic {
        Arithmetic { precision: self.precision, fused: self.fused, on_gpu: self.on_gpu, casts: self.casts() }
    }

    /// What passes keep, as `activations.rs` begins.
    const fn graph(&self) -> Graph {
        match self.activations {
            Activations::Keep if !self.is_staged() => Graph::Whole,
            Activations::Auto if !self.is_staged() && !self.on_gpu => Graph::Whole,
            _ => Graph::Blocks { keep: 0 },
        }
    }

    /// Elements of each trained parameter.
    fn lens(&self) -> Vec<u64> {
        self.plan.parameters().iter().filter(|it| it.trained).map(|it| it.elements()).collect()
    }

    /// The stage of each trained parameter.
    fn stages(&self) -> Vec<(Stage, bool)> {
        self.plan.parameters().iter().filter(|it| it.trained).map(|it| (it.stage, it.tied)).collect()
    }

    /// Bytes of the weights beside which adapters are trained.
    fn base(&self) -> u64 {
        let frozen = self.plan.parameters().iter().filter(|it| !it.trained);
        frozen.map(|it| it.elements()).sum::<u64>() * width(self.precision)
    }

    /// The need of a rank that has the largest chunks.
    pub fn forecast(&self) -> Forecast {
        let pass = self.plan.pass(self.arithmetic(), self.extents);
        let shares = Shares::of(self);
        let moments = self.moments(&pass, &shares);
        let most = moments.into_iter().max_by_key(|(_, terms)| terms.sum());
        let (fullest, terms) = most.unwrap_or((Moment::Start, shares.state));
        Forecast { bytes: terms.sum(), fullest, terms }
    }

    fn moments(&self, pass: &PassNeeds, shares: &Shares) -> Vec<(Moment, Terms)> {
        let blocks = pass.graphs.len();
        let is_whole = self.graph() == Graph::Whole;
        let state = Terms { constants: pass.constants, ..shares.state };
        let vectors = pass.vectors;
        // A loss that can't add the output layer's gradient where it belongs makes it a second time.
        let adds = is_whole && self.fused.linear;
        let again = if adds { 0 } else { pass.output_gradient };
        // An output layer that is the embedding waits for the embedding's gradient.
        let in_place = self.fused.linear && !self.is_staged();
        let waits = if self.plan.is_tied() && !in_place { pass.output_gradient } else { 0 };

        let inputs = (blocks as u64 + 1) * vectors;
        let before_head = inputs + if is_whole { pass.graphs.iter().sum() } else { 0 };
        let mut moments = vec![(Moment::Start, Terms { constants: pass.constants, ..shares.start })];
        let with =
            |moment, stage, terms: Terms| (moment, Terms { exchanges: shares.under_way(self, moment, stage), ..terms });
        let loss = Terms { activations: before_head, ..state };
        moments.push(with(Moment::Loss, Stage::Head, Terms { loss: pass.loss, ..loss }));
        // The vectors' gradient, in their type, is the last that is made; the other gradient comes after it.
        let backward = pass.loss_backward.max(vectors + again);
        moments.push(with(Moment::Loss, Stage::Head, Terms { loss: pass.kept_by_loss + backward, ..loss }));

        let mut graphs: u64 = if is_whole { pass.graphs.iter().sum() } else { 0 };
        for index in (0..blocks).rev() {
            let graph = pass.graphs[index];
            let inputs = (index as u64 + 1) * vectors;
            // A block that is computed again has its result beside it.
            let activations = inputs + if is_whole { graphs } else { graph + vectors };
            let stage = Stage::Block(index);
            let backward = Terms { activations, work: pass.backward + waits, ..state };
            moments.push(with(Moment::Backward, stage, backward));
            if self.is_staged() {
                let again = Terms { activations, work: vectors + waits, ..state };
                let exchanges = shares.under_way(self, Moment::Backward, stage) + shares.not_given(self, index);
                moments.push((Moment::Backward, Terms { exchanges, ..again }));
            }
            graphs = graphs.saturating_sub(graph);
        }
        if pass.embedding > 0 {
            let work = pass.embedding + waits;
            moments.push(with(Moment::Embedding, Stage::Embed, Terms { activations: vectors, work, ..state }));
        }
        moments.push(with(Moment::Exchange, Stage::Embed, state));
        moments
    }
}

/// What a rank has of the state, and what it exchanges.
struct Shares {
    /// Bytes that are there for as long as the rank lives.
    state: Terms,
    /// At its start, when there is the most.
    start: Terms,
    /// What is reduced, in order: the stage with whose gradients it is complete, and bytes of all its chunks in fp32.
    buckets: Vec<(Stage, u64)>,
}

impl Shares {
    fn of(setting: &Setting<'_>) -> Self {
        match (setting.is_shared(), setting.strategy) {
            (false, _) | (true, Strategy::Ddp) => Self::whole(setting),
            (true, Strategy::Zero1) => Self::zero1(setting),
            (true, Strategy::Shard) => Self::shard(setting),
        }
    }

    /// `strategy/single.rs`, which `ddp` shares.
    fn whole(setting: &Setting<'_>) -> Self {
        let elements: u64 = setting.lens().iter().sum();
        let rounds = setting.state_precision() == Precision::Bf16 && !setting.casts();
        let state = Terms {
            weights: elements * if rounds { 2 } else { FLOAT } + setting.base(),
            masters: if rounds { elements * FLOAT } else { 0 },
            moments: elements * 2 * FLOAT,
            gradients: elements * FLOAT,
            ..Terms::default()
        };
        Self { state, start: state, buckets: Vec::new() }
    }

    /// `strategy/zero1.rs`.
    fn zero1(setting: &Setting<'_>) -> Self {
        let lens = setting.lens();
        let buckets = Buckets::of(setting.bucket_mib);
        let partition = Partition::new(&lens, setting.world, buckets.first, buckets.rest);
        let stages = setting.stages();
        let padded = |bucket: &Section| bucket.chunk * u64::from(setting.world.get());
        let of_all: u64 = partition.buckets().iter().map(padded).sum();
        let owned: u64 = (0..partition.buckets().len()).map(|bucket| partition.chunk(bucket, Rank(0)).1).sum();
        let is_rounded = setting.state_precision() == Precision::Bf16;
        let state = Terms {
            weights: of_all * width(setting.state_precision()) + setting.base(),
            masters: if is_rounded { owned * FLOAT } else { 0 },
            moments: owned * 2 * FLOAT,
            gradients: of_all * FLOAT,
            ..Terms::default()
        };
        // The fresh weights while they are copied; then a bucket of gradients moves at a time.
        let fresh = lens.iter().sum::<u64>() * FLOAT;
        let largest = partition.buckets().iter().map(padded).max().unwrap_or(0) * FLOAT;
        let copied = Terms { gradients: 0, work: fresh, ..state };
        let moved = Terms { work: largest, ..state };
        let start = if copied.sum() > moved.sum() { copied } else { moved };
        let complete = |bucket: &Section| {
            let first = bucket.members.iter().map(|member| stages[member.param].0).min();
            (first.unwrap_or(Stage::Embed), padded(bucket) * FLOAT)
        };
        Self { state, start, buckets: partition.buckets().iter().map(complete).collect() }
    }

    /// `strategy/shard.rs`.
    fn shard(setting: &Setting<'_>) -> Self {
        let (lens, e) = (setting.lens(), width(setting.precision));
        let (partition, stages) = super::strategy::stage_partition(&setting.stages(), &lens, setting.world);
        let padded = |bucket: &Section| bucket.chunk * u64::from(setting.world.get());
        let own: u64 = partition.buckets().iter().map(|bucket| bucket.chunk).sum();
        let sizes: Vec<u64> = partition.buckets().iter().map(padded).collect();
        let rooms = super::strategy::rooms(&stages, &sizes).iter().sum::<u64>() * (e + FLOAT);
        let state = Terms {
            weights: own * e,
            masters: if setting.precision == Precision::Bf16 { own * FLOAT } else { 0 },
            moments: own * 2 * FLOAT,
            gradients: own * FLOAT,
            rooms,
            ..Terms::default()
        };
        // Weights are drawn one after the other, in the host's memory.
        let drawn = if setting.on_gpu { 0 } else { lens.iter().max().copied().unwrap_or(0) * FLOAT };
        let start = Terms { work: drawn, ..state };
        let buckets = stages.iter().zip(sizes).map(|((stage, _), size)| (*stage, size * FLOAT)).rev().collect();
        Self { state, start, buckets }
    }

    /// Bytes of the stage's gradients in fp32.
    fn of_stage(&self, stage: Stage) -> u64 {
        self.buckets.iter().filter(|(of, _)| *of == stage).map(|(_, bytes)| bytes).sum()
    }

    /// Bytes of exchanges beside the tensors that they are of. NCCL needs none.
    fn under_way(&self, setting: &Setting<'_>, moment: Moment, stage: Stage) -> u64 {
        if setting.on_gpu || !setting.is_shared() {
            return 0;
        }
        match setting.strategy {
            Strategy::Ddp => 0,
            Strategy::Zero1 => self.of_zero1(setting, moment, stage),
            Strategy::Shard => self.of_shard(setting, moment, stage),
        }
    }

    /// Two exchanges hold memory at a time, in the order of the buckets. Gathers have two threads.
    fn of_zero1(&self, setting: &Setting<'_>, moment: Moment, stage: Stage) -> u64 {
        let bytes = |buckets: &[(Stage, u64)]| buckets.iter().map(|(_, bytes)| bytes).sum::<u64>();
        match moment {
            Moment::Start | Moment::Loss => 0,
            Moment::Exchange => {
                let reduced = self.buckets.windows(2).map(bytes).max().unwrap_or_else(|| bytes(&self.buckets));
                let mut largest: Vec<u64> = self.buckets.iter().map(|(_, bytes)| *bytes).collect();
                largest.sort_unstable();
                let gathered = largest.iter().rev().take(2).sum::<u64>() / FLOAT * width(setting.state_precision());
                reduced.max(gathered)
            }
            Moment::Backward | Moment::Embedding => {
                let begun = self.buckets.iter().take_while(|(complete, _)| *complete > stage).count();
                bytes(&self.buckets[begun.saturating_sub(2)..begun])
            }
        }
    }

    /// A stage's exchange holds its memory until its room is wanted again: see `Shard::open`. The weights of the next
    /// stage are gathered meanwhile, into memory of their own at first.
    fn of_shard(&self, setting: &Setting<'_>, moment: Moment, stage: Stage) -> u64 {
        let last = setting.plan.blocks().saturating_sub(1);
        let gathered = |stage| self.of_stage(stage) / FLOAT * width(setting.precision);
        let of_block = |index: usize| self.of_stage(Stage::Block(index));
        let before = if setting.accumulates { of_block(0) + of_block(1) } else { 0 };
        match (moment, stage) {
            (Moment::Start, _) => 0,
            (Moment::Loss, _) => {
                let ends = if setting.accumulates { self.of_stage(Stage::Embed) } else { 0 };
                gathered(Stage::Block(last)) + before + ends
            }
            (Moment::Backward, Stage::Block(index)) => {
                let next = index.checked_sub(1).map_or(0, |next| gathered(Stage::Block(next)));
                let other = if index < last { of_block(index + 1) } else { before / 2 };
                self.of_stage(Stage::Head) + other + next
            }
            (Moment::Embedding, _) => of_block(0) + of_block(1) + self.head_beside_embedding(setting),
            _ => of_block(0) + of_block(1) + self.of_stage(Stage::Embed) + self.head_beside_embedding(setting),
        }
    }

    /// The head has a room of its own where the embedding is the output layer.
    fn head_beside_embedding(&self, setting: &Setting<'_>) -> u64 {
        if setting.plan.is_tied() { self.of_stage(Stage::Head) } else { 0 }
    }

    /// Until a block has been computed again, the exchange of the last one in its room holds its memory.
    fn not_given(&self, setting: &Setting<'_>, index: usize) -> u64 {
        let is_there = !setting.on_gpu && index + 2 < setting.plan.blocks();
        if is_there { self.of_stage(Stage::Block(index + 2)) } else { 0 }
    }
}

const FLOAT: u64 = 4;
