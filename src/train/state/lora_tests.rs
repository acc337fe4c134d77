//! The state of a model with adapters: the adapters and their moments, and nothing of the base.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::*;
use crate::{
    config::{LoraConfig, ModelKind, Precision, Strategy},
    format::{header, slices},
    ids::WorldSize,
    layout,
    model::{self, BuildSettings, Model},
    snapshot::plan::plan,
    train::strategy::lay_out_small,
};

fn description() -> serde_json::Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    })
}

fn build(precision: Precision, seed: u64) -> Box<dyn Model> {
    let targets = ["q_proj", "down_proj"].map(str::to_owned).into();
    let lora = LoraConfig { rank: 3, alpha: 6.0, targets, base: Vec::new() };
    let settings = BuildSettings { device: Device::Cpu, precision, seed: Some(seed) };
    model::lora::build(ModelKind::Decoder, &description(), &settings, &lora).unwrap()
}

fn world(strategy: Strategy, precision: Precision, world: u32, seed: u64) -> Vec<State> {
    let state = |rank| {
        let mut model = build(precision, seed);
        lay_out_small(strategy, precision, model.as_mut(), Rank(rank), WorldSize(world)).unwrap().0
    };
    (0..world).map(state).collect()
}

/// Gives every moment values of its own.
fn stir(states: &[State]) {
    for (number, tensor) in states.iter().flat_map(State::tensors).enumerate() {
        if tensor.defined() {
            let noise = Tensor::arange(tensor.numel() as i64, (Kind::Float, Device::Cpu)) + number as f64;
            let _no_grad = tch::no_grad_guard();
            tensor.detach().view([-1]).copy_(&noise.sin());
        }
    }
}

/// Every rank's files, by name.
fn files(states: &[State]) -> BTreeMap<String, Bytes> {
    let plans = plan(states[0].specs(), WorldSize(states.len() as u32), 4096).unwrap();
    let mut files = BTreeMap::new();
    for (state, plan) in states.iter().zip(plans) {
        for shard in plan.shards {
            assert!(shard.file_name != layout::ADAPTER || plan.rank == Rank(0));
            let mut file = shard.header;
            for place in shard.tensors {
                let start = file.len();
                file.resize(start + place.len as usize, 0);
                torch::store_bytes(&state.tensors()[place.tensor], &mut file[start..]).unwrap();
            }
            assert!(files.insert(shard.file_name, file.into()).is_none());
        }
    }
    files
}

/// Every tensor's bytes, put together from its slices.
fn together(files: &BTreeMap<String, Bytes>) -> BTreeMap<String, Vec<u8>> {
    let mut parts: BTreeMap<(String, u64), Vec<u8>> = BTreeMap::new();
    for file in files.values() {
        for entry in header::read(file).unwrap() {
            let (name, slice) = slices::parse_name(&entry.name);
            let bytes = file[entry.range.start as usize..entry.range.end as usize].to_vec();
            assert_eq!(entry.dtype, Dtype::F32, "{name}");
            parts.insert((name.to_owned(), slice.map_or(0, |slice| slice.start)), bytes);
        }
    }
    let mut whole: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for ((name, _), bytes) in parts {
        whole.entry(name).or_default().extend(bytes);
    }
    whole
}

#[test]
fn a_state_is_the_adapters_in_one_file_and_their_moments_and_survives_every_change_of_world() {
    let origin = world(Strategy::Zero1, Precision::Bf16, 3, 1);
    stir(&origin);
    let mut carried = files(&origin);
    let expected = together(&carried);
    // A and B of two layers in two blocks; three tensors of each.
    assert_eq!(expected.len(), 3 * 2 * 2 * 2);
    for (strategy, precision, ranks) in [
        (Strategy::Ddp, Precision::Fp32, 2),
        (Strategy::Zero1, Precision::Fp32, 4),
        (Strategy::Ddp, Precision::Bf16, 1),
        (Strategy::Zero1, Precision::Bf16, 2),
    ] {
        let mut next = world(strategy, precision, ranks, 2);
        let given: Vec<Bytes> = carried.values().cloned().collect();
        next.iter_mut().for_each(|state| state.load(&given, false).unwrap());
        carried = files(&next);
        assert!(together(&carried) == expected, "{strategy:?} {precision:?} {ranks}");
        let adapters = header::read(&carried[layout::ADAPTER]).unwrap();
        let names: BTreeSet<String> = adapters.into_iter().map(|entry| entry.name).collect();
        let weights = expected.keys().filter(|name| !name.starts_with("exp_avg")).cloned().collect();
        assert_eq!(names, weights);
        assert!(names.iter().all(|name| name.starts_with("base_model.model.model.layers.")), "{names:?}");
        assert!(!carried.keys().any(|name| name.starts_with("model")), "{:?}", carried.keys());
    }
    // The base's own tensors are no part of it.
    let mut state = world(Strategy::Ddp, Precision::Fp32, 1, 1).remove(0);
    let base = Tensor::zeros([32], (Kind::Float, Device::Cpu));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    Tensor::write_safetensors(&[("model.norm.weight", &base)], &path).unwrap();
    let mut given: Vec<Bytes> = carried.values().cloned().collect();
    given.push(std::fs::read(path).unwrap().into());
    assert!(state.load(&given, false).unwrap_err().to_string().contains("model.norm.weight"));
}

#[test]
fn a_base_is_loaded_from_a_folder_of_any_type_and_compared() {
    let source = model::build(
        ModelKind::Decoder,
        &description(),
        &BuildSettings { device: Device::Cpu, precision: Precision::Fp32, seed: Some(3) },
    );
    let source = source.unwrap();
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        let tensors: Vec<_> = source
            .parameters()
            .iter()
            .map(|parameter| (parameter.name.clone(), parameter.values().detach().to_kind(kind)))
            .collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        Tensor::write_safetensors(&tensors, &path).unwrap();
        let file = Bytes::from(std::fs::read(path).unwrap());
        for (precision, computed) in [(Precision::Fp32, Kind::Float), (Precision::Bf16, Kind::BFloat16)] {
            let models = [1, 1].map(|seed| build(precision, seed));
            let prints = models.each_ref().map(|model| {
                let mut base = State::of_base(model.as_ref()).unwrap();
                base.load(std::slice::from_ref(&file), true).unwrap();
                base.replicated().unwrap().fingerprint().unwrap()
            });
            assert_eq!(prints[0], prints[1]);
            for (name, values) in &tensors {
                let loaded = models[0].parameters().iter().find(|parameter| parameter.name == *name).unwrap();
                assert!(loaded.values().equal(&values.to_kind(computed)), "{name} {kind:?} {precision:?}");
            }
            let mut first = models[1].parameters()[0].values().view([-1]).narrow(0, 0, 1);
            let _ = first.fill_(9.0);
            let base = State::of_base(models[1].as_ref()).unwrap();
            assert_ne!(base.replicated().unwrap().fingerprint().unwrap(), prints[0], "one changed word shows");
            // A folder that lacks a tensor is refused.
            let error = State::of_base(models[0].as_ref()).unwrap().load(&[], true).unwrap_err().to_string();
            assert!(error.contains("in none of the files"), "{error}");
        }
    }
    let plain = State::of_base(source.as_ref()).unwrap();
    assert!(plain.specs().is_empty(), "a model without adapters has no base");
}
