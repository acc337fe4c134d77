//! The strategies against each other, each rank on a thread of its own.

use serde_json::json;
use tch::{Device, Kind};

use super::*;
use crate::{
    config::{ModelKind, Pass, Spread, divisor, share},
    model::{self, BuildSettings, Model, Weight},
    snapshot::plan::{Dtype, ShardKind, TensorSpec, plan},
    torch::{LIMIT, byte_len, ranks, store_bytes, to_f64},
    train::partition::Partition,
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
}

struct Trained {
    losses: Vec<f64>,
    norms: Vec<f64>,
    /// The first step's reduced gradient of each parameter: as much of it as this rank updates.
    gradient: Vec<Vec<f32>>,
    specs: Vec<TensorSpec>,
    /// Each parameter as it is computed with, by name, before and after.
    weights: [Vec<(String, Vec<u8>)>; 2],
    /// Bytes of moments and of fp32 weights beside those that are computed with.
    optimizer_bytes: usize,
}

fn build(case: &Case) -> Box<dyn Model> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "attention_bias": true, "tie_word_embeddings": case.tied,
    });
    let settings = BuildSettings { device: Device::Cpu, precision: case.precision, seed: Some(7) };
    model::build(ModelKind::Decoder, &config, &settings).unwrap()
}

/// The same in every step, so that something is learnt.
fn tokens(first: u64, count: u32) -> Tensor {
    let (first, count) = (first as i64, i64::from(count));
    let values: Vec<i64> = (first * 17..(first + count) * 17).map(|i| (i * i * 7 + i * 3 + 5) % 96).collect();
    Tensor::from_slice(&values).view([count, 17])
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
    freeze(model.as_mut(), case.frozen);
    let (rank, world) = group.as_ref().map_or((Rank(0), WorldSize(1)), |group| (group.rank(), group.world()));
    let (state, layout) = lay_out_small(case.strategy, case.precision, model.as_mut(), rank, world).unwrap();
    let before = weights(model.as_ref());
    let optimizer =
        OptimizerConfig { lr: 1e-2, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, grad_clip: case.clip };
    let mut strategy = layout.connect(Peers::new(group)).unwrap();
    let (mut losses, mut norms, mut gradient) = (Vec::new(), Vec::new(), Vec::new());
    let mut brake = Brake::new();
    let passes = Spread::new(BATCH, world, case.most).unwrap().passes(rank);
    for step in 1..=STEPS {
        let mut sum = 0.0;
        let mut first = share(BATCH.into(), rank, world).start;
        for Pass { sequences, last } in passes.iter() {
            let tokens = tokens(first, sequences);
            first += u64::from(sequences);
            strategy.settle().unwrap();
            let loss = model.loss(&tokens).unwrap() / divisor(BATCH.into(), sequences.into(), world);
            strategy.backward(&loss, last).unwrap();
            sum += to_f64(&loss).unwrap();
        }
        if step == 1 {
            gradient = own_gradient(case, model.as_ref(), rank, world);
        }
        losses.push(sum);
        norms.push(to_f64(&strategy.step(&optimizer, Step(step), 1e-2, &mut brake).unwrap()).unwrap());
        strategy.zero_grad().unwrap();
    }
    strategy.settle().unwrap();
    let held = state.specs().iter().zip(state.tensors());
    let held = held.filter(|(spec, tensor)| spec.kind == ShardKind::Optimizer && tensor.defined());
    let optimizer_bytes = held.map(|(_, tensor)| byte_len(tensor).unwrap()).sum();
    let specs = state.specs().to_vec();
    Trained { losses, norms, gradient, specs, weights: [before, weights(model.as_ref())], optimizer_bytes }
}

/// The gradients as they are after a reduction, zero where this rank does not update: it has no average there.
fn own_gradient(case: &Case, model: &dyn Model, rank: Rank, world: WorldSize) -> Vec<Vec<f32>> {
    let gradients: Vec<Vec<f32>> =
        leaves(model).iter().map(|leaf| Vec::try_from(leaf.grad().flatten(0, -1)).unwrap()).collect();
    if case.strategy == config::Strategy::Ddp || world.get() == 1 {
        return gradients;
    }
    let lens: Vec<u64> = gradients.iter().map(|gradient| gradient.len() as u64).collect();
    let mut own: Vec<Vec<f32>> = gradients.iter().map(|gradient| vec![0.0; gradient.len()]).collect();
    for piece in Partition::new(&lens, world, SMALL.first, SMALL.rest).pieces(rank) {
        let range = piece.begin as usize..piece.end as usize;
        own[piece.param][range.clone()].copy_from_slice(&gradients[piece.param][range]);
    }
    own
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
    let zero1 = run(&Case { strategy: config::Strategy::Zero1, ..case });
    assert!(losses(&ddp)[STEPS as usize - 1] < losses(&ddp)[0] * 0.99, "{case:?}: nothing was learnt");
    let clipped = ddp[0].norms.iter().filter(|&&norm| norm > case.clip).count();
    assert_eq!(clipped, if case.clip > 0.0 { STEPS as usize } else { clipped }, "{case:?}: {:?}", ddp[0].norms);
    for rank in &zero1 {
        assert!(rank.weights[1] == zero1[0].weights[1], "{case:?}: ranks differ in their weights");
        assert_eq!(rank.norms, zero1[0].norms, "{case:?}: ranks differ in the norm");
    }
    if case.world == 2 && case.clip == 0.0 {
        // Two numbers have one sum, so that every cast and every product must be the same.
        assert_eq!(losses(&zero1), losses(&ddp), "{case:?}");
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
};

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
        for strategy in [config::Strategy::Ddp, config::Strategy::Zero1] {
            // 12 on 5: 2, 2, 3, 2, 3, in passes of at most 2 one pass or two; on 7 and 8: some have one, some two.
            for (world, most) in [(3, BATCH), (5, BATCH), (5, 2), (5, 1), (7, BATCH), (8, 1)] {
                let case = Case { strategy, precision, world, most, ..CASE };
                let ranks = run(&case);
                let mut whole = ranks[0].gradient.clone();
                for rank in &ranks[1..] {
                    match strategy {
                        config::Strategy::Ddp => assert!(rank.gradient == whole, "{case:?}: ranks differ"),
                        config::Strategy::Zero1 => {
                            for (sum, own) in whole.iter_mut().flatten().zip(rank.gradient.iter().flatten()) {
                                *sum += own;
                            }
                        }
                    }
                }
                let difference = distance(&whole, &alone[0].gradient);
                assert!(difference < tolerance, "{case:?}: gradients differ by {difference:e}");
                let [first, one] = [&ranks, &alone].map(|ranks| losses(ranks)[0]);
                assert!(((first - one) / one).abs() < tolerance, "{case:?}: loss {first} for {one}");
                let [norm, one] = [&ranks, &alone].map(|ranks| ranks[0].norms[0]);
                assert!(((norm - one) / one).abs() < tolerance, "{case:?}: norm {norm} for {one}");
                assert!(ranks.iter().all(|rank| rank.weights[1] == ranks[0].weights[1]), "{case:?}: ranks differ");
            }
        }
    }
}

#[test]
fn the_same_run_gives_the_same_bits() {
    let case = Case { precision: Precision::Bf16, world: 3, most: 2, clip: 0.05, ..CASE };
    let (once, again) = (run(&case), run(&case));
    assert_eq!(losses(&once), losses(&again));
    assert!(once[0].weights[1] == again[0].weights[1]);
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
    use config::Strategy::{Ddp, Zero1};
    assert_eq!([is_shared(Zero1, 1), is_shared(Ddp, 2), is_shared(Zero1, 2)], [false, false, true]);
    let alone = run(&Case { strategy: Ddp, world: 1, ..CASE });
    assert_close(&losses(&run(&CASE)), &losses(&alone), 2e-5, "loss");
    let same = run(&Case { world: 1, ..CASE });
    assert_eq!(losses(&same), losses(&alone));
}

#[test]
fn who_shares_needs_peers_and_who_is_alone_does_not() {
    for strategy in [config::Strategy::Ddp, config::Strategy::Zero1] {
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
        ] {
            let case = Case { strategy, precision, world, frozen: FROZEN, ..CASE };
            let ranks = run(&case);
            for rank in &ranks {
                let [before, after] = &rank.weights;
                for ((name, before), (_, after)) in before.iter().zip(after) {
                    assert_eq!(before == after, is_frozen(name), "{case:?}: {name}");
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
                (config::Strategy::Zero1, 2) => assert_eq!(losses(&ranks), of_ddp, "{case:?}"),
                _ => {}
            }
        }
    }
}
