//! The formula against LibTorch's count of the bytes of its tensors. Each rank is a process of its own, which counts
//! from its first tensor on.

use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::*;
use crate::{
    config::{self, ALL_LINEAR, LoraConfig, ModelConfig, ModelKind, OptimizerConfig, ParallelConfig},
    ids::Step,
    model::{self, Batch, BuildSettings},
    snapshot::{image::page_size, plan::plan},
    torch::{
        self, Backend, LIMIT, ProcessGroup, Store,
        memory::{count_tensors, counted},
    },
    train::{
        lesson::Newest,
        optim::Brake,
        strategy::{self, Peers, stages},
    },
};

const LENGTH: u32 = 128;

#[derive(Clone, Copy, Debug)]
struct Case {
    /// Keys of the description beside those of a Llama.
    family: fn() -> Value,
    strategy: Strategy,
    precision: Precision,
    activations: Activations,
    lora: bool,
    fused: bool,
    sequences: u32,
    passes: u32,
}

const CASE: Case = Case {
    family: || json!({}),
    strategy: Strategy::Ddp,
    precision: Precision::Fp32,
    activations: Activations::Keep,
    lora: false,
    fused: true,
    sequences: 2,
    passes: 1,
};

fn tied() -> Value {
    json!({ "tie_word_embeddings": true })
}

fn gemma() -> Value {
    json!({
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 32, "sliding_window": 64,
        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": true, "query_pre_attn_scalar": 32,
        "rope_local_base_freq": 10_000.0, "rope_theta": 1e6,
    })
}

fn qwen() -> Value {
    json!({ "architectures": ["Qwen3ForCausalLM"], "head_dim": 32 })
}

fn olmo() -> Value {
    json!({ "architectures": ["Olmo2ForCausalLM"] })
}

/// The cases of a world: all strategies, what they keep, and both precisions, on four ranks one of them; families on
/// one rank. All of them under TRAINER_TESTS_ALL.
fn cases(world: u32) -> Vec<Case> {
    let all = std::env::var_os("TRAINER_TESTS_ALL").is_some();
    let mut cases = Vec::new();
    for precision in [Precision::Fp32, Precision::Bf16] {
        if world == 4 && precision == Precision::Fp32 && !all {
            continue;
        }
        let case = Case { precision, ..CASE };
        let strategies: &[Strategy] =
            if world == 1 { &[Strategy::Ddp] } else { &[Strategy::Ddp, Strategy::Zero1, Strategy::Shard] };
        for &strategy in strategies {
            for activations in [Activations::Keep, Activations::Block] {
                if strategy != Strategy::Shard || activations == Activations::Block {
                    cases.push(Case { strategy, activations, ..case });
                }
            }
        }
        if world == 1 && (precision == Precision::Bf16 || all) {
            cases.push(Case { fused: false, ..case });
            cases.push(Case { family: tied, activations: Activations::Block, ..case });
            cases.push(Case { lora: true, ..case });
            for family in [gemma as fn() -> Value, qwen, olmo] {
                cases.push(Case { family, ..case });
            }
        }
        if world == 2 {
            cases.push(Case { family: tied, strategy: Strategy::Shard, passes: 2, sequences: 1, ..case });
        }
    }
    cases
}

impl Case {
    fn model(&self) -> ModelConfig {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704,
            "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
            "max_position_embeddings": 512,
        });
        if let (Some(config), Value::Object(others)) = (config.as_object_mut(), (self.family)()) {
            config.extend(others);
        }
        let lora = LoraConfig { rank: 8, alpha: 16.0, targets: vec![ALL_LINEAR.into()], base: Vec::new() };
        ModelConfig { kind: ModelKind::Decoder, config, init_from: None, lora: self.lora.then_some(lora) }
    }

    fn setting<'a>(&self, plan: &'a Plan, world: WorldSize) -> Setting<'a> {
        Setting {
            plan,
            strategy: self.strategy,
            precision: self.precision,
            activations: self.activations,
            bucket_mib: 1,
            world,
            on_gpu: false,
            fused: if self.fused { Fused::ALL } else { Fused::NONE },
            extents: Extents { sequences: self.sequences, length: LENGTH, packed: false },
            accumulates: self.passes > 1,
        }
    }

    /// Two steps; the most bytes that this rank's tensors have had.
    fn run(&self, group: Option<ProcessGroup>) -> u64 {
        let before = counted().unwrap().now;
        let (rank, world) = group.as_ref().map_or((Rank(0), WorldSize(1)), |group| (group.rank(), group.world()));
        let described = self.model();
        let settings = BuildSettings { device: Device::Cpu, precision: self.precision, seed: None };
        let parallel = ParallelConfig {
            strategy: self.strategy,
            nproc_per_node: None,
            device: config::Device::Cpu,
            bucket_mib: 1,
            mixed: false,
            share_device: false,
            peak_tflops: None,
        };
        let mut model = match &described.lora {
            None if strategy::keeps_parts(&parallel, world) => {
                model::build_bare(described.kind, &described.config, &settings)
            }
            None => model::build(described.kind, &described.config, &settings),
            Some(lora) => model::lora::build(described.kind, &described.config, &settings, lora),
        }
        .unwrap();
        if self.fused {
            model.use_fused(torch::fused::verified(Device::Cpu).fused);
        }
        let (state, layout) = strategy::lay_out(&parallel, self.precision, model.as_mut(), rank, world).unwrap();
        let planned = Plan::of(&described).unwrap();
        let setting = self.setting(&planned, world);
        // What is saved, and where: exact.
        assert_eq!(setting.specs(), state.specs(), "{self:?}");
        let images = plan(state.specs(), world, page_size()).unwrap();
        assert_eq!(setting.slot_bytes().unwrap(), images.iter().map(|image| image.len).sum::<u64>());
        drop(state);

        let mut strategy = layout.connect(Peers::new(group)).unwrap();
        let optimizer = OptimizerConfig { lr: 1e-3, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, grad_clip: 1.0 };
        let (count, window) = (i64::from(self.sequences), i64::from(LENGTH) + 1);
        let mut brake = Brake::new();
        for step in 1..=2 {
            for pass in 0..self.passes {
                let tokens = (Tensor::arange(count * window, (Kind::Int64, Device::Cpu)) * 7).remainder(4096);
                let batch = Batch::plain(&tokens.view([count, window])).unwrap();
                strategy.settle().unwrap();
                let newest = Newest::Language { model: model.as_ref(), batch: &batch };
                let last = pass + 1 == self.passes;
                let divisor = |_| f64::from(self.passes);
                let loss = stages::pass(strategy.as_mut(), &newest, setting.graph(), &divisor, last, &mut ());
                let _ = torch::to_f64(&loss.unwrap()).unwrap();
            }
            strategy.reduce().unwrap();
            let _norm = strategy.step(&optimizer, Step(step), 1e-3, &mut brake).unwrap();
            strategy.zero_grad().unwrap();
        }
        strategy.settle().unwrap();
        counted().unwrap().peak - before
    }
}

/// Names the rank that a process is, the world, and the port of its store.
const VARIABLE: &str = "TRAINER_TEST_MEMORY";
const TEST: &str = "train::memory::tests::a_rank_needs_the_bytes_that_the_formula_says";
/// What a rank's process says before its peaks.
const SAID: &str = "peaks: ";

/// One rank's peaks, by case.
fn count(place: &str) {
    let place: Vec<u32> = place.split('/').map(|number| number.parse().unwrap()).collect();
    let [rank, world, port] = place[..] else { panic!("{place:?}") };
    tch::set_num_threads(1);
    count_tensors().unwrap();
    // Its own tensors are gone before the first case begins.
    let _ = torch::fused::verified(Device::Cpu);
    let store = (world > 1).then(|| Store::connect("127.0.0.1", port as u16, LIMIT).unwrap());
    let peaks = cases(world).into_iter().enumerate().map(|(number, case)| {
        let group = store.as_ref().map(|store| {
            let (prefix, rank, world) = (format!("case-{number}"), Rank(rank), WorldSize(world));
            ProcessGroup::new(Backend::Gloo, store, &prefix, rank, world, LIMIT, Device::Cpu).unwrap()
        });
        case.run(group).to_string()
    });
    println!("{SAID}{}", peaks.collect::<Vec<_>>().join(" "));
}

/// The peaks of each rank, by case.
fn measured(world: u32) -> Vec<Vec<u64>> {
    let store = Store::serve("127.0.0.1", 0, LIMIT).unwrap();
    let start = |rank| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", TEST, "--nocapture"])
            .env(VARIABLE, format!("{rank}/{world}/{}", store.port()))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let ranks: Vec<_> = (0..world).map(start).collect();
    let peaks = ranks.into_iter().map(|rank| {
        let output = rank.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let numbers = said.lines().find_map(|line| line.split_once(SAID)).map(|(_, numbers)| numbers);
        let numbers = numbers.unwrap_or_else(|| panic!("{said}\n{}", String::from_utf8_lossy(&output.stderr)));
        numbers.split(' ').map(|number| number.parse().unwrap()).collect()
    });
    peaks.collect()
}

/// Within a tenth, under every strategy, on one, two and four ranks; where nothing is exchanged, within a hundredth.
#[test]
fn a_rank_needs_the_bytes_that_the_formula_says() {
    if let Ok(place) = std::env::var(VARIABLE) {
        return count(&place);
    }
    let mut wrong = Vec::new();
    for world in [1, 2, 4] {
        let ranks = measured(world);
        for (number, case) in cases(world).into_iter().enumerate() {
            let most = ranks.iter().map(|peaks| peaks[number]).max().unwrap_or(0);
            let planned = Plan::of(&case.model()).unwrap();
            let forecast = case.setting(&planned, WorldSize(world)).forecast();
            let off = (forecast.bytes as f64 - most as f64) / most as f64;
            let line = format!("{:+.1} % on {world}: {most} measured, {case:?}: {forecast:?}", off * 100.0);
            println!("{line}");
            // Exchanges hold memory for as long as their peers take; without them the count is the same each time.
            let is_exact = case.strategy == Strategy::Ddp && case.fused;
            if off.abs() > if is_exact { 0.01 } else { 0.1 } {
                wrong.push(line);
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
