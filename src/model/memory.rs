//! The bytes that a pass of a decoder needs beside its weights and their gradients, from its description alone: pure.
//!
//! Each term is a tensor that the code of this room makes: `decoder/mod.rs` and `decoder/attention.rs` for a block,
//! `loss.rs` for the head, `rope.rs` for the tables; and what autograd saves of them. `T` is the tokens of a pass, `H`
//! the width of the residual stream, `Q` and `K` those of all query and all key heads, `I` that of the feed-forward
//! layer, `V` the vocabulary, and a *vector* is `H` elements of the type used for computing.
//!
//! ```text
//! a block's graph    after the norms 2H, queries Q, keys and values 2K, attention's output Q, the stream between the
//!                    two halves H, gate and up 2I, their product I: for each token. Its input is a vector more.
//! the loss           a chunk's scores, the gradients of the vectors, and of the output layer in fp32
//! ```
//!
//! Numbers of a row (a norm's scale, attention's sum) count; scalars and lists of tokens in Rust don't.

use serde::Serialize;

use super::{
    DecoderConfig, ModelError, Stage, decoder,
    decoder::config::{EMBEDDING, NormScale, QueryKeyNorm},
    describe, lora, loss, rope,
};
use crate::{
    config::{LoraConfig, ModelConfig, Precision},
    torch::fused::Fused,
};

/// How a pass is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arithmetic {
    /// The type of the matrix products.
    pub precision: Precision,
    /// What is computed in one pass over memory, in place of LibTorch's operations.
    pub fused: Fused,
    /// Whether a GPU computes.
    pub on_gpu: bool,
    /// Whether weights are fp32 and rounded wherever they are used, with bf16.
    pub casts: bool,
}

/// The tokens of one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Extents {
    /// Sequences.
    pub sequences: u32,
    /// Tokens of each.
    pub length: u32,
    /// Whether sequences may hold several documents.
    pub packed: bool,
}

/// One parameter, before there is a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Its Hugging Face name.
    pub name: String,
    /// Its extents.
    pub shape: Vec<u64>,
    /// The first stage that uses it.
    pub stage: Stage,
    /// Whether the head uses it as well.
    pub tied: bool,
    /// Whether it is trained; others are the base of adapters.
    pub trained: bool,
}

impl Planned {
    /// Its elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// A model that could be built.
#[derive(Clone, Debug)]
pub struct Plan {
    decoder: DecoderConfig,
    adapters: Option<Adapters>,
    parameters: Vec<Planned>,
}

/// The adapters of each block.
#[derive(Clone, Debug)]
struct Adapters {
    rank: u64,
    /// The last parts of the names of the layers that have one.
    layers: Vec<String>,
    /// Elements of those of a block.
    elements: u64,
}

/// Bytes of a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassNeeds {
    /// The vectors between two stages.
    pub vectors: u64,
    /// Each block's graph, without its input and its output.
    pub graphs: Vec<u64>,
    /// The most that a block's backward pass makes beside its graph, the gradient of its output among it.
    pub backward: u64,
    /// The most that the loss makes beside the head's input.
    pub loss: u64,
    /// What the loss keeps for its backward pass, beside the head's input.
    pub kept_by_loss: u64,
    /// The most that its backward pass makes beside that, without a gradient of the output layer.
    pub loss_backward: u64,
    /// The fp32 gradient of the output layer; 0 if it is not trained.
    pub output_gradient: u64,
    /// The most that the backward pass of the embedding makes; 0 if it is not trained.
    pub embedding: u64,
    /// Tokens, tables of rotary embeddings, and masks.
    pub constants: u64,
}

/// Bytes of an element.
pub const fn width(precision: Precision) -> u64 {
    match precision {
        Precision::Fp32 => FLOAT,
        Precision::Bf16 => 2,
    }
}

const FLOAT: u64 = 4;
const TOKEN: u64 = 8;
/// Passes whose tokens are in the host's memory: the one that is computed, one that waits, one that is read.
const READ_AHEAD: u64 = 3;

/// The last parts of the names of a block's linear layers that read the same vectors.
const INPUTS: [&str; 4] = ["q_proj", "k_proj", "v_proj", "qkv_proj"];
const OUTPUT: [&str; 1] = ["o_proj"];
const GATE: [&str; 3] = ["gate_proj", "up_proj", "gate_up_proj"];
const DOWN: [&str; 1] = ["down_proj"];

impl Plan {
    /// Of a language model, with its adapters if it has any.
    ///
    /// # Errors
    /// A description that is no model's, and adapters for layers that it does not have.
    pub fn of(model: &ModelConfig) -> Result<Self, ModelError> {
        let decoder = describe(model.kind, &model.config)?;
        let shapes = decoder.parameter_shapes();
        let mut parameters: Vec<Planned> = shapes
            .iter()
            .map(|(name, shape)| Planned {
                stage: decoder::stage(name),
                tied: name == EMBEDDING && decoder.tie_word_embeddings,
                trained: model.lora.is_none(),
                name: name.clone(),
                shape: shape.clone(),
            })
            .collect();
        let adapters = match &model.lora {
            None => None,
            Some(wanted) => Some(adapters(&mut parameters, &shapes, wanted, decoder.layers.len())?),
        };
        Ok(Self { decoder, adapters, parameters })
    }

    /// Every parameter, in the order of the model's: adapters last.
    pub fn parameters(&self) -> &[Planned] {
        &self.parameters
    }

    /// Whether adapters are trained beside a base.
    pub const fn has_adapters(&self) -> bool {
        self.adapters.is_some()
    }

    /// Whether the output layer is the embedding.
    pub const fn is_tied(&self) -> bool {
        self.decoder.tie_word_embeddings
    }

    /// Whether each weight is used in the type of the matrix products alone: see
    /// [`Leaves::needs_rounded_weights_only`](super::Leaves::needs_rounded_weights_only).
    pub fn needs_rounded_weights_only(&self) -> bool {
        self.decoder.scale == NormScale::Plain
    }

    /// Blocks.
    pub fn blocks(&self) -> usize {
        self.decoder.layers.len()
    }

    /// What a pass over this number of tokens needs.
    pub fn pass(&self, arithmetic: Arithmetic, extents: Extents) -> PassNeeds {
        let Arithmetic { precision, fused, on_gpu, casts } = arithmetic;
        let e = width(precision);
        let tokens = u64::from(extents.sequences) * u64::from(extents.length);
        let (hidden, inner) = (u64::from(self.decoder.hidden_size), u64::from(self.decoder.intermediate_size));
        let vectors = tokens * hidden * e;
        let graphs = (0..self.blocks()).map(|layer| self.graph(layer, arithmetic, extents)).collect();

        // The gradient of the product reaches the gate: those of gate and up are made beside it, and the product is
        // gone. Before, the last layer's own weight gradient is made, if it is not added where it belongs.
        let kept_product = if self.keeps_input(&DOWN) { inner } else { 0 };
        let gate = (hidden + 3 * inner - kept_product) * tokens * e;
        let product = match (self.adapters.is_some(), fused.linear && !casts, precision) {
            (true, ..) | (false, true, Precision::Fp32) => 0,
            (false, true, Precision::Bf16) => e,
            (false, false, Precision::Fp32) => FLOAT,
            (false, false, Precision::Bf16) => e + FLOAT,
        };
        let down = (hidden + inner) * tokens * e + product * inner * hidden;

        let vocabulary = u64::from(self.decoder.vocab_size);
        let matrix = vocabulary * hidden;
        let trained = self.adapters.is_none();
        let output_gradient = if trained { matrix * FLOAT } else { 0 };
        let rows = loss::rows(on_gpu, vocabulary).min(tokens);
        let several = tokens > rows;
        // log-softmax in fp32 of scores that are made fp32 first.
        let scored = if fused.loss { e } else { e + FLOAT + if precision == Precision::Bf16 { FLOAT } else { 0 } };
        let softmax =
            rows * vocabulary * scored + if several { output_gradient } else { 0 } + (tokens - rows) * hidden * e;
        let product = if trained && precision == Precision::Bf16 { matrix * e } else { 0 };
        let gradients = rows * vocabulary * e + vectors + output_gradient + product;
        let joined = 2 * vectors + output_gradient;
        let rounded = if casts { matrix * e } else { 0 };
        // Beside the norm's result, its scales.
        let norm = tokens * (1 + self.norm_copies(arithmetic) * hidden) * FLOAT;
        let loss = vectors + norm + rounded + softmax.max(gradients).max(joined);
        // In fp32, times a number, and rounded.
        let scaled = if precision == Precision::Bf16 { 2 * FLOAT + e } else { FLOAT };

        let embedding = match trained {
            true => matrix * FLOAT + tokens * hidden * if precision == Precision::Bf16 { FLOAT + e } else { FLOAT },
            false => 0,
        };
        PassNeeds {
            vectors,
            graphs,
            backward: gate.max(down),
            loss,
            kept_by_loss: vectors + output_gradient + norm,
            loss_backward: scaled * tokens * hidden,
            output_gradient,
            embedding,
            constants: self.constants(arithmetic, extents),
        }
    }

    /// Whether a linear layer of these reads vectors that its weights' gradient needs again.
    fn keeps_input(&self, layers: &[&str]) -> bool {
        self.adapters.as_ref().is_none_or(|it| it.layers.iter().any(|name| layers.contains(&name.as_str())))
    }

    fn graph(&self, layer: usize, arithmetic: Arithmetic, extents: Extents) -> u64 {
        let Arithmetic { precision, fused, casts, .. } = arithmetic;
        let (config, e) = (&self.decoder, width(precision));
        let tokens = u64::from(extents.sequences) * u64::from(extents.length);
        let (hidden, inner) = (u64::from(config.hidden_size), u64::from(config.intermediate_size));
        let (queries, keys) = (config.query_width(), config.key_width());
        let heads = u64::from(config.num_attention_heads);
        let norms = config.placement.names();

        // Elements for each token, in the type used for computing.
        let mut kept = 0;
        if norms.before_attention.is_some() && self.keeps_input(&INPUTS) {
            kept += hidden;
        }
        if config.query_key_norm.is_some() {
            kept += queries + keys;
        }
        if norms.after_attention.is_some() {
            kept += hidden;
        }
        kept += hidden;
        if norms.before_mlp.is_some() && self.keeps_input(&GATE) {
            kept += hidden;
        }
        kept += if fused.gate { 2 * inner } else { 3 * inner };
        if self.keeps_input(&DOWN) {
            kept += inner;
        }
        if norms.after_mlp.is_some() {
            kept += hidden;
        }
        if let Some(adapters) = &self.adapters {
            kept += adapters.rank * adapters.layers.len() as u64;
        }

        // Numbers for each token, fp32: the scales of norms.
        let outer = [norms.before_attention, norms.after_attention, norms.before_mlp, norms.after_mlp];
        let outer = outer.iter().flatten().count() as u64;
        let (inner_rows, inner_width) = match config.query_key_norm {
            None => (0, 0),
            Some(QueryKeyNorm::Head) => (heads + u64::from(config.num_key_value_heads), queries + keys),
            Some(QueryKeyNorm::Whole) => (2, queries + keys),
        };
        let mut exact = outer + inner_rows;
        exact += self.norm_copies(arithmetic) * (outer * hidden + inner_width);

        let rounded = match &self.adapters {
            Some(adapters) if precision == Precision::Bf16 => adapters.elements * e,
            None if casts => self.matrices_of(layer) * e,
            _ => 0,
        };
        tokens * (kept * e + exact * FLOAT) + rounded + self.attention(layer, arithmetic, extents)
    }

    /// What attention keeps: queries, keys and values, its result, and its sums in fp32. LibTorch's kernels share
    /// heads, but for some of a GPU: see `decoder/attention.rs`.
    fn attention(&self, layer: usize, arithmetic: Arithmetic, extents: Extents) -> u64 {
        let Arithmetic { precision, on_gpu, .. } = arithmetic;
        let (config, e) = (&self.decoder, width(precision));
        let (sequences, length) = (u64::from(extents.sequences), u64::from(extents.length));
        let (queries, keys) = (config.query_width(), config.key_width());
        let heads = u64::from(config.num_attention_heads);
        let window = config.layers.get(layer).and_then(|it| it.window).filter(|window| *window < extents.length);
        let repeats = on_gpu && queries != keys && (precision == Precision::Fp32 || window.is_some());
        let tokens = sequences * length;
        // Pieces of a window, and documents, are computed apart and put together.
        let is_joined = (window.is_some() || extents.packed) && self.keeps_input(&OUTPUT);
        let joined = if is_joined { tokens * queries * e } else { 0 };
        let kept = queries + 2 * if repeats { queries } else { keys } + queries;
        tokens * (kept * e + heads * FLOAT) + joined
    }

    /// The fp32 copies of its input that a norm keeps. LibTorch computes it on a CPU by single operations, in fp32: the
    /// input and the result before the weight are kept. A GPU has one kernel, for fp32 weights with fp32 input.
    fn norm_copies(&self, Arithmetic { precision, fused, on_gpu, .. }: Arithmetic) -> u64 {
        let is_rounded = precision == Precision::Bf16;
        match (fused.norm, on_gpu) {
            (true, _) => 0,
            (false, true) => u64::from(is_rounded && self.decoder.scale != NormScale::Plain),
            (false, false) => 1 + u64::from(is_rounded),
        }
    }

    /// Elements of a block's matrices.
    fn matrices_of(&self, layer: usize) -> u64 {
        let of = |it: &&Planned| it.stage == Stage::Block(layer) && it.shape.len() == 2;
        self.parameters.iter().filter(of).map(Planned::elements).sum()
    }

    fn constants(&self, arithmetic: Arithmetic, extents: Extents) -> u64 {
        let (config, length) = (&self.decoder, u64::from(extents.length));
        let passes = if arithmetic.on_gpu { 1 } else { READ_AHEAD };
        let tokens = passes * u64::from(extents.sequences) * (length + 1) * TOKEN;
        let positions = rope::positions(length, config.context.positions.into());
        let tables = config.ropes.iter().map(|rope| 2 * positions * u64::from(rope.width) * FLOAT).sum::<u64>();
        let windows = config.layers.iter().filter_map(|layer| layer.window).filter(|window| *window < extents.length);
        let mut windows: Vec<u32> = windows.collect();
        windows.sort_unstable();
        windows.dedup();
        let mask = |window: &u32| decoder::mask_elements((*window).into()) * width(arithmetic.precision);
        tokens + tables + windows.iter().map(mask).sum::<u64>()
    }
}

/// Adds the adapters to the list of parameters, as `lora::build` does.
fn adapters(
    parameters: &mut Vec<Planned>,
    shapes: &[(String, Vec<u64>)],
    wanted: &LoraConfig,
    blocks: usize,
) -> Result<Adapters, ModelError> {
    let rank = u64::from(wanted.rank);
    let targets = lora::targets(shapes, wanted)?;
    for target in &targets {
        let stage = decoder::stage(&target.weight);
        let [a, b] = lora::names(&target.weight);
        for (name, shape) in [(a, vec![rank, target.columns]), (b, vec![target.rows, rank])] {
            parameters.push(Planned { name, shape, stage, tied: false, trained: true });
        }
    }
    let layers = lora::of_each_block(&targets).into_iter().map(str::to_owned).collect();
    let all: u64 = targets.iter().map(|target| rank * (target.rows + target.columns)).sum();
    Ok(Adapters { rank, layers, elements: all / blocks.max(1) as u64 })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::{ALL_LINEAR, ModelKind};

    fn model(lora: Option<LoraConfig>) -> ModelConfig {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 128_256, "hidden_size": 2048,
            "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 8192, "tie_word_embeddings": true,
        });
        ModelConfig { kind: ModelKind::Decoder, config, init_from: None, lora }
    }

    const EXTENTS: Extents = Extents { sequences: 4, length: 2048, packed: false };

    fn arithmetic(precision: Precision, fused: Fused) -> Arithmetic {
        Arithmetic { precision, fused, on_gpu: true, casts: false }
    }

    /// 12H + 4K + 8I bytes a token in bf16, with the block's input: the sum that the manual of `train` names.
    #[test]
    fn a_blocks_graph_is_the_sum_that_the_manual_names() {
        let plan = Plan::of(&model(None)).unwrap();
        let needs = plan.pass(arithmetic(Precision::Bf16, Fused::NONE), EXTENTS);
        let tokens = 4 * 2048;
        let numbers = (32 + 2) * 4;
        assert_eq!(needs.vectors, tokens * 2048 * 2);
        let each = needs.vectors + needs.graphs[0];
        assert_eq!(each, tokens * (12 * 2048 + 4 * 512 + 8 * 8192 + numbers));
        assert_eq!(needs.graphs, vec![needs.graphs[0]; 16]);
        // Gate and up without the activated gate.
        let fused = plan.pass(arithmetic(Precision::Bf16, Fused::ALL), EXTENTS);
        assert_eq!(needs.graphs[0] - fused.graphs[0], tokens * 8192 * 2);
        // 512 MiB of fp32 scores in a chunk: 1046 rows, with log-softmax and its input beside them.
        let rows = (512 << 20) / (4 * 128_256);
        assert!(needs.loss > rows * 128_256 * 10 && needs.loss < rows * 128_256 * 10 + (2 << 30), "{needs:?}");
        assert_eq!(needs.output_gradient, 128_256 * 2048 * 4);
    }

    #[test]
    fn what_is_frozen_keeps_no_input_and_has_no_gradient() {
        let lora = |targets: &[&str]| {
            let targets = targets.iter().map(|name| (*name).to_owned()).collect();
            Plan::of(&model(Some(LoraConfig { rank: 16, alpha: 32.0, targets, base: Vec::new() }))).unwrap()
        };
        let of = |plan: &Plan| plan.pass(arithmetic(Precision::Bf16, Fused::NONE), EXTENTS);
        let (some, all) = (lora(&["q_proj"]), lora(&[ALL_LINEAR]));
        assert_eq!((of(&some).output_gradient, of(&some).embedding), (0, 0));
        let tokens = 4 * 2048;
        // Without adapters behind them: the vectors after the second norm, and the product of gate and up.
        let narrower = tokens * 2 * (2048 + 8192 + 6 * 16);
        let casts = 2 * 16 * (2 * (512 + 2048) + (2048 + 2048) + 3 * (2048 + 8192));
        assert_eq!(of(&all).graphs[0] - of(&some).graphs[0], narrower + casts);
        assert_eq!(all.parameters().len(), 16 * 9 + 2 + 2 * 7 * 16);
        let trained: u64 = all.parameters().iter().filter(|it| it.trained).map(Planned::elements).sum();
        let ModelConfig { kind, config, lora: wanted, .. } =
            model(Some(LoraConfig { rank: 16, alpha: 32.0, targets: vec![ALL_LINEAR.into()], base: Vec::new() }));
        assert_eq!(trained, lora::parameters(kind, &config, &wanted.unwrap()).unwrap());
    }
}
