//! The strategies against each other, each rank on a thread of its own.

use std::collections::BTreeMap;

use serde_json::json;
use tch::{Device, Kind};

use super::*;
use crate::{
    config::{LoraConfig, ModelKind, Pass, Spread, divisor, share},
    model::{self, Batch, BuildSettings, Model, Spans, Stage, Weight},
    snapshot::plan::{Dtype, ShardKind, TensorSpec, plan},
    torch::{LIMIT, byte_len, ranks, store_bytes, to_f64},
    train::{
        lesson::Newest,
        state::testing::{Held, held, together},
    },
};

const STEPS: u64 = 6;
const BATCH: u32 = 12;

#[derive(Clone, Copy, Debug)]
struct Case {
    strategy: config::Strategy,
    precision: Precision,
    world: u32,
    /// Sequences of a pass, at most.
    most: u32,
    clip: f64,
    tied: bool,
    frozen: &'static [(&'static str, Kind)],
    graph: Graph,
    blocks: u32,
    lora: bool,
    /// Several documents in a sequence, and not every token a target.
    marked: bool,
    /// Computed by functions of one pass each, which add gradients in place.
    fused: bool,
}

struct Trained {
    losses: Vec<f64>,
    norms: Vec<f64>,
    /// The state after the first step, and after the last one.
    states: [Held; 2],
    specs: Vec<TensorSpec>,
    /// Each parameter as it is computed with, by name, before and after.
    weights: [Vec<(String, Vec<u8>)>; 2],
    /// Bytes of moments and of fp32 weights beside those that are computed with.
    optimizer_bytes: usize,
    /// Where each parameter is, as it is computed with, and its stage.
    places: Vec<(usize, Stage)>,
}

fn build(case: &Case) -> Box<dyn Model> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": case.blocks, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "attention_bias": true, "tie_word_embeddings": case.tied,
    });
    let settings = BuildSettings { device: Device::Cpu, precision: case.precision, seed: Some(7) };
    let plain = model::build(ModelKind::Decoder, &config, &settings).unwrap();
    if !case.lora {
        return plain;
    }
    let lora = LoraConfig { rank: 3, alpha: 6.0, targets: vec!["q_proj".into(), "down_proj".into()], base: vec![] };
    let model = model::lora::build(ModelKind::Decoder, &config, &settings, &lora).unwrap();
    for (base, own) in model.parameters().iter().zip(plain.parameters()) {
        assert_eq!(base.name, own.name);
        tch::no_grad(|| base.values().shallow_clone().copy_(own.values()));
    }
    model
}

/// The same in every step, so that something is learnt.
fn tokens(first: u64, count: u32) -> Tensor {
    let (first, count) = (first as i64, i64::from(count));
    let values: Vec<i64> = (first * 17..(first + count) * 17).map(|i| (i * i * 7 + i * 3 + 5) % 96).collect();
    Tensor::from_slice(&values).view([count, 17])
}

fn batch(case: &Case, first: u64, count: u32) -> Batch {
    let tokens = tokens(first, count);
    if !case.marked {
        return Batch::plain(&tokens).unwrap();
    }
    let mut spans = Spans::whole();
    let starts: Vec<Vec<u32>> = (0..u64::from(count)).map(|row| vec![0, 3 + (first + row) as u32 % 9]).collect();
    spans.set(starts.iter().map(Vec::as_slice), 16, Device::Cpu).unwrap();
    // Every third sequence has no target.
    let has = |row: u64| (first + row) % 3 != 2;
    let rows = (0..u64::from(count)).filter(|&row| has(row)).flat_map(|row| [1, 4, 5, 11].map(|at| row * 16 + at));
    let rows: Vec<i64> = rows.map(|place| place as i64).collect();
    Batch::marked(&tokens, &rows, spans).unwrap()
}

fn targets(case: &Case) -> u64 {
    batch(case, 0, BATCH).targets.count()
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    let mut bytes = vec![0; byte_len(tensor).unwrap()];
    store_bytes(tensor, &mut bytes).unwrap();
    bytes
}

fn weights(model: &dyn Model) -> Vec<(String, Vec<u8>)> {
    model.parameters().iter().map(|parameter| (parameter.name.clone(), bytes(parameter.values()))).collect()
}

/// The parameters that are named have values of their own from here on, and no gradient.
fn freeze(model: &mut dyn Model, frozen: &[(&str, Kind)]) {
    let weights =
        model.parameters().iter().map(|parameter| match frozen.iter().find(|(name, _)| *name == parameter.name) {
            Some((_, kind)) => Weight::Frozen(parameter.values().detach().to_kind(*kind)),
            None => parameter.weight.share(),
        });
    let weights = weights.collect();
    model.set_parameters(weights).unwrap();
}

fn train(case: &Case, group: Option<ProcessGroup>) -> Trained {
    tch::set_num_threads(1);
    let mut model = build(case);
    if case.fused {
        model.use_fused(crate::torch::fused::verified(Device::Cpu).fused);
    }
    freeze(model.as_mut(), case.frozen);
    let (rank, world) = group.as_ref().map_or((Rank(0), WorldSize(1)), |group| (group.rank(), group.world()));
    let (state, layout) = lay_out_small(case.strategy, case.precision, model.as_mut(), rank, world).unwrap();
    let before = weights(model.as_ref());
    let optimizer =
        OptimizerConfig { lr: 1e-2, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, grad_clip: case.clip };
    let mut strategy = layout.connect(Peers::new(group)).unwrap();
    let graph = if strategy.is_staged() { Graph::Blocks { keep: 0 } } else { case.graph };
    let (mut losses, mut norms, mut first_state) = (Vec::new(), Vec::new(), Held::new());
    let spread = Spread::new(BATCH, world, case.most).unwrap();
    let passes = spread.passes(rank);
    let mut brake = Brake::new();
    for step in 1..=STEPS {
        let mut sum = 0.0;
        let mut first = share(BATCH.into(), rank, world).start;
        for Pass { sequences, last } in passes.iter() {
            let batch = batch(case, first, sequences);
            first += u64::from(sequences);
            strategy.settle().unwrap();
            let newest = Newest::Language { model: model.as_ref(), batch: &batch };
            let divisor = |count| divisor(targets(case), count, world);
            let loss = stages::pass(strategy.as_mut(), &newest, graph, &divisor, last, &mut ()).unwrap();
            assert!(!loss.requires_grad());
            sum += to_f64(&loss).unwrap();
        }
        if strategy.is_staged() {
            let idle = passes.iter().count()..spread.most_passes();
            idle.for_each(|_| stages::idle_pass(strategy.as_mut(), model.as_ref()).unwrap());
        }
        strategy.reduce().unwrap();
        losses.push(sum);
        norms.push(to_f64(&strategy.step(&optimizer, Step(step), 1e-2, &mut brake).unwrap()).unwrap());
        strategy.zero_grad().unwrap();
        if step == 1 {
            strategy.settle().unwrap();
            first_state = held(&state);
        }
    }
    strategy.settle().unwrap();
    let optimizer = state.specs().iter().zip(state.tensors());
    let optimizer = optimizer.filter(|(spec, tensor)| spec.kind == ShardKind::Optimizer && tensor.defined());
    let optimizer_bytes = optimizer.map(|(_, tensor)| byte_len(tensor).unwrap()).sum();
    let states = [first_state, held(&state)];
    let places = model.parameters().iter().map(|it| (it.values().data_ptr() as usize, it.stage)).collect();
    let specs = state.specs().to_vec();
    Trained { losses, norms, states, specs, weights: [before, weights(model.as_ref())], optimizer_bytes, places }
}

/// Every tensor of the state after the last step, of all ranks together.
fn last_state(ranks: &[Trained]) -> BTreeMap<String, Vec<u8>> {
    together(&ranks.iter().map(|rank| rank.states[1].clone()).collect::<Vec<_>>())
}

/// The first step's gradient times one factor, of all ranks together: the first moments after it.
fn gradient(ranks: &[Trained]) -> Vec<Vec<f32>> {
    let moments = together(&ranks.iter().map(|rank| rank.states[0].clone()).collect::<Vec<_>>());
    let moments = moments.into_iter().filter(|(name, _)| name.starts_with("exp_avg."));
    let floats = |bytes: Vec<u8>| {
        bytes.chunks_exact(4).map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
    };
    moments.map(|(_, bytes)| floats(bytes)).collect()
}

/// fp32 weights under the weights' names, and no rounded ones.
fn exact(mut tensors: BTreeMap<String, Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
    let masters: Vec<String> = tensors.keys().filter(|name| name.starts_with("master.")).cloned().collect();
    for name in masters {
        let master = tensors.remove(&name).unwrap();
        tensors.insert(name["master.".len()..].to_owned(), master);
    }
    tensors
}

/// By rank.
fn run(case: &Case) -> Vec<Trained> {
    if case.world == 1 { vec![train(case, None)] } else { ranks(case.world, LIMIT, |group| train(case, Some(group))) }
}

/// The mean over the ranks of each step's loss.
fn losses(ranks: &[Trained]) -> Vec<f64> {
    let mean = |step: usize| ranks.iter().map(|rank| rank.losses[step]).sum::<f64>() / ranks.len() as f64;
    (0..STEPS as usize).map(mean).collect()
}

fn assert_close(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
    for (step, (got, want)) in got.iter().zip(want).enumerate() {
        let difference = (got - want).abs() / want.abs();
        assert!(difference <= tolerance, "{what} of step {}: {got} for {want} differs by {difference:e}", step + 1);
    }
}

fn compare(case: Case) {
    let ddp = run(&Case { strategy: config::Strategy::Ddp, ..case });
    let zero1 = run(&case);
    assert!(losses(&ddp)[STEPS as usize - 1] < losses(&ddp)[0] * 0.99, "{case:?}: nothing was learnt");
    let clipped = ddp[0].norms.iter().filter(|&&norm| norm > case.clip).count();
    assert_eq!(clipped, if case.clip > 0.0 { STEPS as usize } else { clipped }, "{case:?}: {:?}", ddp[0].norms);
    for rank in &zero1 {
        let is_whole = case.strategy != config::Strategy::Shard;
        assert!(!is_whole || rank.weights[1] == zero1[0].weights[1], "{case:?}: ranks differ in their weights");
        assert_eq!(rank.norms, zero1[0].norms, "{case:?}: ranks differ in the norm");
    }
    let passes = Spread::new(BATCH, WorldSize(case.world), case.most).unwrap().most_passes();
    if case.world == 2 && case.clip == 0.0 && (case.strategy == config::Strategy::Zero1 || passes == 1) {
        // Two numbers have one sum, so that every cast and every product must be the same.
        assert_eq!(losses(&zero1), losses(&ddp), "{case:?}");
        assert!(exact(last_state(&zero1)) == exact(last_state(&ddp)), "{case:?}: other bits in the state");
        assert_close(&zero1[0].norms, &ddp[0].norms, 1e-6, "norm");
    } else {
        let tolerance = if case.precision == Precision::Bf16 { 2e-3 } else { 2e-5 };
        assert_close(&losses(&zero1), &losses(&ddp), tolerance, &format!("{case:?}: loss"));
        assert_close(&zero1[0].norms, &ddp[0].norms, 20.0 * tolerance, &format!("{case:?}: norm"));
    }
}

const CASE: Case = Case {
    strategy: config::Strategy::Zero1,
    precision: Precision::Fp32,
    world: 2,
    most: BATCH,
    clip: 0.0,
    tied: false,
    frozen: &[],
    graph: Graph::Whole,
    blocks: 2,
    lora: false,
    marked: false,
    fused: false,
};
const SHARD: Case = Case { strategy: config::Strategy::Shard, blocks: 3, ..CASE };

#[test]
fn on_two_ranks_without_clipping_losses_are_those_of_ddp_to_the_last_bit() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        for (most, tied) in [(BATCH, false), (2, true)] {
            compare(Case { precision, most, tied, ..CASE });
        }
    }
}

#[test]
fn on_more_ranks_and_with_clipping_losses_are_those_of_ddp_up_to_rounding() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        for (world, most, clip) in [(3, BATCH, 0.0), (3, 2, 0.05), (2, 3, 0.05), (4, BATCH, 0.05), (5, 2, 0.05)] {
            compare(Case { precision, world, most, clip, ..CASE });
        }
    }
}

/// The distance of two gradients, relative to the second's norm.
fn distance(got: &[Vec<f32>], want: &[Vec<f32>]) -> f64 {
    let pairs = || got.iter().flatten().zip(want.iter().flatten()).map(|(a, b)| (f64::from(*a), f64::from(*b)));
    assert_eq!(got.iter().map(Vec::len).collect::<Vec<_>>(), want.iter().map(Vec::len).collect::<Vec<_>>());
    (pairs().map(|(a, b)| (a - b).powi(2)).sum::<f64>() / pairs().map(|(_, b)| b.powi(2)).sum::<f64>()).sqrt()
}

#[test]
fn every_world_has_the_gradients_of_one_rank_whether_or_not_it_divides_the_batch() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        let tolerance = if precision == Precision::Bf16 { 2e-2 } else { 2e-6 };
        let alone = run(&Case { strategy: config::Strategy::Ddp, precision, world: 1, ..CASE });
        for strategy in [config::Strategy::Ddp, config::Strategy::Zero1, config::Strategy::Shard] {
            // 12 on 5: 2, 2, 3, 2, 3, in passes of at most 2 one pass or two; on 7 and 8: some have one, some two.
            for (world, most) in [(3, BATCH), (5, BATCH), (5, 2), (5, 1), (7, BATCH), (8, 1)] {
                let case = Case { strategy, precision, world, most, ..CASE };
                let ranks = run(&case);
                let difference = distance(&gradient(&ranks), &gradient(&alone));
                assert!(difference < tolerance, "{case:?}: gradients differ by {difference:e}");
                let [first, one] = [&ranks, &alone].map(|ranks| losses(ranks)[0]);
                assert!(((first - one) / one).abs() < tolerance, "{case:?}: loss {first} for {one}");
                let [norm, one] = [&ranks, &alone].map(|ranks| ranks[0].norms[0]);
                assert!(((norm - one) / one).abs() < tolerance, "{case:?}: norm {norm} for {one}");
            }
        }
    }
}

#[test]
fn the_same_run_gives_the_same_bits() {
    for strategy in [config::Strategy::Zero1, config::Strategy::Shard] {
        let case = Case { strategy, precision: Precision::Bf16, world: 3, most: 2, clip: 0.05, ..CASE };
        let (once, again) = (run(&case), run(&case));
        assert_eq!(losses(&once), losses(&again));
        assert!(last_state(&once) == last_state(&again));
    }
}

/// One pass a step: the sums are the same. Weights, moments and losses, whatever is tied, frozen or masked.
#[test]
fn on_two_ranks_with_one_pass_a_sharded_run_has_the_bits_of_ddp() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        for blocks in [1, 2, 3, 4] {
            compare(Case { precision, blocks, ..SHARD });
        }
        for fused in [false, true] {
            compare(Case { precision, tied: true, fused, ..SHARD });
            compare(Case { precision, marked: true, fused, ..SHARD });
        }
    }
}

#[test]
fn on_any_world_with_one_pass_a_sharded_run_has_the_bits_of_zero1() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        for (world, tied) in [(3, false), (3, true), (4, false), (5, true)] {
            let case = Case { precision, world, tied, fused: world == 3, ..SHARD };
            let [shard, zero1] = [case, Case { strategy: config::Strategy::Zero1, ..case }].map(|case| run(&case));
            assert_eq!(losses(&shard), losses(&zero1), "{case:?}");
            assert!(last_state(&shard) == last_state(&zero1), "{case:?}: other bits in the state");
        }
    }
}

#[test]
fn a_sharded_run_with_several_passes_or_clipping_is_that_of_ddp_up_to_rounding() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        for (world, most, clip) in [(2, 2, 0.0), (3, 2, 0.05), (2, 3, 0.05), (5, 1, 0.05)] {
            compare(Case { precision, world, most, clip, tied: most == 2, ..SHARD });
        }
    }
}

/// The rank's part of everything that stays, and two rooms for all blocks.
#[test]
fn a_sharded_rank_keeps_its_share_of_the_state_and_two_blocks() {
    for (precision, element) in [(Precision::Fp32, 12), (Precision::Bf16, 14)] {
        for (world, tied) in [(2, false), (3, true), (4, false)] {
            let case = Case { precision, world, tied, blocks: 5, ..SHARD };
            let model = build(&case);
            let elements: usize = model.parameters().iter().map(|parameter| parameter.values().numel()).sum();
            let stages = case.blocks as usize + 2;
            let ranks = run(&case);
            let total: usize = ranks.iter().flat_map(|rank| &rank.states[1]).map(|(_, bytes)| bytes.len()).sum();
            assert_eq!(total, element * elements, "{case:?}: nothing is there twice");
            for rank in &ranks {
                let bytes: usize = rank.states[1].iter().map(|(_, bytes)| bytes.len()).sum();
                let average = element * elements / world as usize;
                assert!(bytes <= average + element * 65 * stages, "{case:?}: {bytes} of {average} on average");
                // The first tensors of the stages begin where a room does.
                let mut firsts: BTreeMap<Stage, usize> = BTreeMap::new();
                for (place, stage) in &rank.places {
                    firsts.entry(*stage).or_insert(*place);
                }
                let rooms: std::collections::BTreeSet<usize> = firsts.into_values().collect();
                assert_eq!(rooms.len(), if tied { 4 } else { 3 }, "{case:?}");
            }
        }
    }
}

/// Whatever is cut, recomputed or kept: not a bit differs.
#[test]
fn a_pass_by_blocks_has_the_bits_of_one_graph() {
    use config::Strategy::{Ddp, Zero1};
    let same = |case: Case| {
        let whole = run(&Case { graph: Graph::Whole, ..case });
        for keep in [0, 1, 5] {
            let blocks = run(&Case { graph: Graph::Blocks { keep }, ..case });
            for (whole, blocks) in whole.iter().zip(&blocks) {
                let bits = |values: &[f64]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&whole.losses), bits(&blocks.losses), "{case:?} {keep}");
                assert_eq!(bits(&whole.norms), bits(&blocks.norms), "{case:?} {keep}");
                assert!(whole.states == blocks.states, "{case:?} {keep}: other bits in the state");
            }
        }
        assert!(losses(&whole)[STEPS as usize - 1] < losses(&whole)[0] * 0.999, "{case:?}: nothing was learnt");
    };
    const FROZEN: &[(&str, Kind)] =
        &[("model.embed_tokens.weight", Kind::Float), ("model.layers.1.mlp.up_proj.weight", Kind::BFloat16)];
    const ENDS: &[(&str, Kind)] = &[("model.norm.weight", Kind::Float), ("lm_head.weight", Kind::Float)];
    for precision in [Precision::Fp32, Precision::Bf16] {
        let case = Case { precision, clip: 0.05, ..CASE };
        for (strategy, world) in [(Ddp, 1), (Ddp, 2), (Zero1, 2), (Zero1, 3)] {
            let case = Case { strategy, world, ..case };
            for fused in [false, true] {
                same(Case { tied: true, most: 2, fused, ..case });
                same(Case { most: 5, marked: true, fused, ..case });
            }
            same(Case { lora: true, fused: true, ..case });
        }
        same(Case { strategy: Ddp, frozen: FROZEN, ..case });
        same(Case { strategy: Ddp, frozen: ENDS, ..case });
    }
}

#[test]
fn each_rank_has_its_share_of_the_optimizer_state_and_no_more() {
    for (precision, element) in [(Precision::Fp32, 8), (Precision::Bf16, 12)] {
        for world in [2, 3, 4] {
            let case = Case { precision, world, ..CASE };
            let elements: i64 =
                build(&case).parameters().iter().map(|parameter| parameter.values().numel() as i64).sum();
            let per_rank: Vec<usize> = run(&case).iter().map(|rank| rank.optimizer_bytes).collect();
            let average = element * elements as usize / world as usize;
            assert_eq!(per_rank.iter().sum::<usize>(), element * elements as usize, "{case:?}");
            for bytes in per_rank {
                assert!(bytes <= average + average / 20 + 4096, "{case:?}: {bytes} of {average} on average");
            }
        }
    }
}

#[test]
fn a_world_of_one_has_nothing_to_share() {
    let is_shared = |strategy, world| {
        let mut model = build(&CASE);
        let (state, _) = lay_out_small(strategy, CASE.precision, model.as_mut(), Rank(0), WorldSize(world)).unwrap();
        state.specs().iter().any(|spec| spec.part.is_some())
    };
    use config::Strategy::{Ddp, Shard, Zero1};
    let shared =
        [is_shared(Zero1, 1), is_shared(Shard, 1), is_shared(Ddp, 2), is_shared(Zero1, 2), is_shared(Shard, 2)];
    assert_eq!(shared, [false, false, false, true, true]);
    let alone = run(&Case { strategy: Ddp, world: 1, ..CASE });
    assert_close(&losses(&run(&CASE)), &losses(&alone), 2e-5, "loss");
    let same = run(&Case { world: 1, ..CASE });
    assert_eq!(losses(&same), losses(&alone));
}

#[test]
fn who_shares_needs_peers_and_who_is_alone_does_not() {
    for strategy in [config::Strategy::Ddp, config::Strategy::Zero1, config::Strategy::Shard] {
        let connect = |world| {
            let mut model = build(&CASE);
            let made = lay_out_small(strategy, CASE.precision, model.as_mut(), Rank(0), WorldSize(world));
            made.unwrap().1.connect(Peers::new(None))
        };
        assert!(connect(1).is_ok());
        assert_eq!(connect(2).unwrap_err().to_string(), "agent named no peers", "{strategy:?}");
    }
}

#[test]
fn the_first_bucket_is_small_unless_all_are() {
    for (mib, first) in [(1, 1 << 20), (25, 1 << 20)] {
        assert_eq!(Buckets::of(mib), Buckets { first, rest: u64::from(mib) << 20 });
    }
}

/// The way of LoRA: weights that are there and computed with, and that nobody trains.
#[test]
fn frozen_parameters_are_stored_once_and_no_step_changes_them() {
    const FROZEN: &[(&str, Kind)] = &[
        ("model.embed_tokens.weight", Kind::Float),
        ("model.layers.0.self_attn.q_proj.bias", Kind::Float),
        ("model.layers.1.mlp.up_proj.weight", Kind::BFloat16),
    ];
    let is_frozen = |name: &str| FROZEN.iter().any(|(frozen, _)| *frozen == name);
    for precision in [Precision::Fp32, Precision::Bf16] {
        let mut of_ddp = Vec::new();
        for (strategy, world) in [
            (config::Strategy::Ddp, 1),
            (config::Strategy::Ddp, 2),
            (config::Strategy::Zero1, 2),
            (config::Strategy::Zero1, 3),
            (config::Strategy::Shard, 2),
            (config::Strategy::Shard, 3),
        ] {
            let case = Case { strategy, precision, world, frozen: FROZEN, ..CASE };
            let ranks = run(&case);
            for rank in &ranks {
                let [before, after] = &rank.weights;
                for ((name, before), (_, after)) in before.iter().zip(after) {
                    // What is trained is gathered there, with this strategy.
                    let is_known = is_frozen(name) || strategy != config::Strategy::Shard;
                    assert!(!is_known || (before == after) == is_frozen(name), "{case:?}: {name}");
                }
                assert_eq!(rank.specs, ranks[0].specs);
            }
            let [first, .., last] = ranks[0].losses.as_slice() else { panic!("no steps") };
            assert!(last < first, "{case:?}: nothing was learnt");

            let specs = &ranks[0].specs;
            for (name, kind) in FROZEN {
                let of_it: Vec<_> = specs.iter().filter(|spec| spec.name.ends_with(name)).collect();
                let [spec] = of_it.as_slice() else { panic!("{case:?}: {of_it:?}") };
                let dtype = if *kind == Kind::Float { Dtype::F32 } else { Dtype::BF16 };
                assert_eq!((spec.name.as_str(), spec.kind, spec.dtype), (*name, ShardKind::Model, dtype));
                assert_eq!(spec.part, None);
            }
            let plans = plan(specs, WorldSize(world), 4096).unwrap();
            let placed = plans.iter().flat_map(|plan| &plan.shards).flat_map(|shard| &shard.tensors);
            let placed: Vec<&str> = placed.map(|place| specs[place.tensor].name.as_str()).collect();
            for (name, _) in FROZEN {
                assert_eq!(placed.iter().filter(|placed| placed == &name).count(), 1, "{case:?}: {name}");
                assert!(!placed.iter().any(|placed| placed.ends_with(&format!(".{name}"))), "{case:?}: {name}");
            }
            match (strategy, world) {
                (config::Strategy::Ddp, 2) => of_ddp = losses(&ranks),
                (config::Strategy::Zero1 | config::Strategy::Shard, 2) => {
                    assert_eq!(losses(&ranks), of_ddp, "{case:?}");
                }
                _ => {}
            }
        }
    }
}
