//! The functions on whatever device this machine has, and how fast they are beside LibTorch's operations.
//! `scripts/gpu-check` runs these tests; on a CPU they have small sizes.

use std::time::Instant;

use serde_json::json;

use super::*;
use crate::{
    ids::LocalRank,
    torch::{Clock, pick_device},
};

fn device() -> Device {
    pick_device(LocalRank(0), false).unwrap()
}

#[test]
fn every_function_of_this_device_agrees_with_libtorch() {
    let begin = Instant::now();
    let Verified { fused, left_out } = verified(device());
    let Fused { norm, turns, gate, loss, linear } = *fused;
    let verified = json!({"norm": norm, "turns": turns, "gate": gate, "loss": loss, "linear": linear});
    let seconds = begin.elapsed().as_secs_f64();
    println!("MEASURED {}", json!({"verified": verified, "left_out": left_out, "first_s": seconds}));
    assert_eq!((*fused, left_out.as_slice()), (Fused::ALL, &[][..]));
}

/// What a worker finds that starts after another: on a GPU, kernels that are kept.
#[test]
fn kernels_are_there_again_at_once() {
    verified(device());
    let begin = Instant::now();
    if device() != Device::Cpu {
        gpu::load(device()).unwrap();
    }
    println!("MEASURED {}", json!({"kernels_again_s": begin.elapsed().as_secs_f64()}));
}

#[test]
fn the_same_numbers_have_the_same_bits_each_time() {
    let here = device();
    let all = || {
        let leaf = |shape: &[i64], phase: f64| {
            let tensor = on(here, wave(shape, phase).unwrap()).unwrap().to_kind(Kind::BFloat16);
            tensor.set_requires_grad(true)
        };
        let (x, weight, both) = (leaf(&[700, 512], 0.0), leaf(&[512], 1.0), leaf(&[700, 1024], 2.0));
        let normed = rms_norm(&x, &weight, 1e-5, false).unwrap();
        let gated = gate_of_both(&both, Activation::Silu).unwrap();
        (normed + gated).to_kind(Kind::Float).square().sum(Kind::Float).backward();
        let mut scores = leaf(&[50, 4096], 0.3).detach() * 3.0;
        let targets = Tensor::arange(50, (Kind::Int64, here));
        let losses = cross_entropy(&mut scores, &targets, true).unwrap();
        let bits = |tensor: Tensor| Vec::<f32>::try_from(tensor.to_kind(Kind::Float).flatten(0, -1)).unwrap();
        [x.grad(), weight.grad(), both.grad(), losses, scores].map(bits)
    };
    let first = all();
    for _ in 0..3 {
        assert!(all() == first);
    }
}

/// The median seconds of what is done, between two events of the device.
fn timed(work: &mut dyn FnMut()) -> f64 {
    let mut clock = Clock::new(device(), 2).unwrap();
    let mut seconds: Vec<f64> = (0..9)
        .map(|_| {
            clock.mark(0).unwrap();
            work();
            clock.mark(1).unwrap();
            clock.seconds(0, 1).unwrap()
        })
        .collect();
    // The first ones load code and fill caches.
    seconds.drain(..2);
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// Seconds of a forward pass and of a backward pass.
fn passes(inputs: &[Tensor], function: Function<'_>) -> [f64; 2] {
    let forward = timed(&mut || {
        let _no_grad = tch::no_grad_guard();
        drop(function(inputs).unwrap());
    });
    let value = function(inputs).unwrap();
    let direction = value.ones_like();
    let backward = timed(&mut || {
        // Gradients are returned, so nothing is added up beside.
        let found = Tensor::run_backward(&[(&value * &direction).sum(Kind::Float)], inputs, true, false);
        drop(found);
    });
    [forward, backward]
}

/// Figures for people, not for a verdict.
#[test]
fn measures_of_speed_beside_libtorch() {
    let here = device();
    let large = here != Device::Cpu;
    let size = |on_gpu: i64, on_cpu: i64| if large { on_gpu } else { on_cpu };
    let (rows, tokens, vocabulary) = (size(16_384, 256), size(2048, 64), size(128_256, 2048));
    let leaf = |shape: &[i64], kind: Kind| {
        let tensor = Tensor::randn(shape, (Kind::Float, here)).to_kind(kind);
        tensor.detach().set_requires_grad(true)
    };
    let verified = verified(here).fused;
    let measured = |name: &str, kind: Kind, inputs: &[Tensor], own: Function<'_>, theirs: Function<'_>| {
        let (ours, libtorch) = (passes(inputs, own), passes(inputs, theirs));
        assert!(ours.iter().chain(&libtorch).all(|seconds| *seconds > 0.0));
        println!(
            "MEASURED {}",
            json!({
                "function": name, "kind": format!("{kind:?}"),
                "forward_s": ours[0], "libtorch_forward_s": libtorch[0], "forward_gain": libtorch[0] / ours[0],
                "backward_s": ours[1], "libtorch_backward_s": libtorch[1], "backward_gain": libtorch[1] / ours[1],
            })
        );
    };
    for kind in [Kind::BFloat16, Kind::Float] {
        if verified.norm {
            let inputs = [leaf(&[rows, 2048], kind), leaf(&[2048], kind)];
            measured("norm", kind, &inputs, &|x| rms_norm(&x[0], &x[1], 1e-5, false).map_err(refused), &|x| {
                x[0].f_rms_norm([2048], Some(&x[1]), 1e-5)
            });
        }
        if verified.turns {
            let inputs = [leaf(&[rows / tokens, tokens, 32, 64], kind)];
            let table = |phase: f64| on(here, wave(&[tokens, 1, 64], phase).unwrap()).unwrap();
            let (cos, sin) = (table(0.3), table(0.7));
            measured("turns", kind, &inputs, &|x| rotate(&x[0], &cos, &sin).map_err(refused), &|x| {
                let partner = x[0].f_roll(32, -1_i64)?;
                x[0].f_mul(&cos)?.f_addcmul(&partner, &sin)?.f_to_kind(kind)
            });
        }
        if verified.gate {
            let inputs = [leaf(&[rows, size(8192, 1024)], kind), leaf(&[rows, size(8192, 1024)], kind)];
            let own: Function<'_> = &|x| gate(&x[0], &x[1], Activation::Silu).map_err(refused);
            measured("gate", kind, &inputs, own, &|x| x[0].f_silu()?.f_mul(&x[1]));
        }
        if verified.loss {
            let rows = size(4096, 64);
            let scores = leaf(&[rows, vocabulary], kind).detach();
            let targets = Tensor::arange(rows, (Kind::Int64, here));
            // Forward and gradient at once. The scores are overwritten each time, which takes no other time.
            let mut own = scores.copy();
            let ours = timed(&mut || drop(cross_entropy(&mut own, &targets, true).unwrap()));
            let libtorch = timed(&mut || {
                let logs = scores.log_softmax(-1, Kind::Float);
                let losses = logs.gather(1, &targets.unsqueeze(1), false).neg();
                let minus_one = Tensor::full_like(&losses, -1.0);
                drop(logs.exp().scatter_add_(1, &targets.unsqueeze(1), &minus_one).to_kind(kind));
            });
            let bytes = (scores.numel() * kind.elt_size_in_bytes()) as f64;
            println!(
                "MEASURED {}",
                json!({
                    "function": "loss", "kind": format!("{kind:?}"), "both_s": ours, "libtorch_both_s": libtorch,
                    "gain": libtorch / ours, "gb_per_s": 3.0 * bytes / ours / 1e9,
                })
            );
        }
    }
}
