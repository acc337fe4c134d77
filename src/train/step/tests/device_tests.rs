//! The same on whatever device this machine has: on a GPU these tests check it, on a CPU they check themselves.
//! `scripts/gpu-check` runs them.

use std::time::Instant;

use tch::Kind;

use super::*;
use crate::{
    config::Strategy::Ddp,
    ids::LocalRank,
    model::{BuildSettings, Parameter, build},
    snapshot::image::{ImageChunk, Pages, SharedImage},
    torch::{AdamW, CopyJob, HostCopier, Moments, Pinned, Readback, adamw_step},
};

fn device() -> Device {
    torch::pick_device(LocalRank(0), false).unwrap()
}

/// On the CPU.
fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.to_kind(Kind::Float).to_device(Device::Cpu).flatten(0, -1)).unwrap()
}

fn assert_close(ours: &Tensor, theirs: &Tensor, within: f32, what: &str) {
    let (ours, theirs) = (floats(ours), floats(theirs));
    let scale = theirs.iter().fold(1e-6, |most: f32, value| most.max(value.abs()));
    for (a, b) in ours.iter().zip(&theirs) {
        assert!((a - b).abs() <= within * scale, "{what}: {a} for {b}, of {scale}");
    }
}

#[test]
fn a_model_has_the_loss_and_the_gradients_that_it_has_on_the_cpu_in_fp32() {
    let run = run(Ddp, Precision::Fp32, 8);
    let tokens = Tensor::from_slice(&(0..4 * 33).map(|i| i * 7 % 96).collect::<Vec<i64>>()).view([4, 33]);
    let of = |device, precision| {
        let settings = BuildSettings { device, precision, seed: Some(3) };
        let model = build(run.model.kind, &run.model.config, &settings).unwrap();
        let loss = model.loss(&tokens.to_device(device)).unwrap();
        loss.backward();
        let leaves: Vec<Tensor> =
            model.parameters().iter().filter_map(Parameter::leaf).map(|leaf| leaf.grad()).collect();
        (loss, leaves)
    };
    let exact = of(Device::Cpu, Precision::Fp32);
    for (precision, within) in [(Precision::Fp32, 1e-4), (Precision::Bf16, 0.05)] {
        let ours = of(device(), precision);
        assert_close(&ours.0, &exact.0, within, "loss");
        for (number, (ours, theirs)) in ours.1.iter().zip(&exact.1).enumerate() {
            assert_close(ours, theirs, within, &format!("gradient {number} in {precision:?}"));
        }
    }
}

#[test]
fn an_update_is_that_of_exact_arithmetic_and_none_is_made_where_the_scale_is_no_number() {
    let here = (Kind::Float, device());
    let wave = |phase: f64| (Tensor::arange(1000, here) * 0.37 + phase).sin();
    let settings = AdamW { lr: 3e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let (weight, first, second) = ([wave(0.0)], [wave(1.0)], [wave(2.0).square()]);
    let before: Vec<Vec<f32>> = [&weight, &first, &second].map(|list| floats(&list[0])).to_vec();
    let gradient = floats(&wave(3.0));
    let moments = || Moments { exp_avgs: &first, exp_avg_sqs: &second };
    let scale = |value: f32| Tensor::from(value).to_device(device());
    adamw_step(&weight, &[wave(3.0)], moments(), Step(5), &settings, Some(&scale(f32::NAN))).unwrap();
    assert_eq!([&weight, &first, &second].map(|list| floats(&list[0])).to_vec(), before, "nothing is changed");
    adamw_step(&weight, &[wave(3.0)], moments(), Step(5), &settings, Some(&scale(2.0))).unwrap();
    let (ours, AdamW { lr, beta1, beta2, eps, weight_decay }) = (floats(&weight[0]), settings);
    for at in 0..1000 {
        let value = |list: &[f32]| f64::from(list[at]);
        let g = value(&gradient) / 2.0;
        let m = beta1 * value(&before[1]) + (1.0 - beta1) * g;
        let v = beta2 * value(&before[2]) + (1.0 - beta2) * g * g;
        let (m, v) = (m / (1.0 - beta1.powi(5)), v / (1.0 - beta2.powi(5)));
        let expected = value(&before[0]) * (1.0 - lr * weight_decay) - lr * m / (v.sqrt() + eps);
        assert!((f64::from(ours[at]) - expected).abs() < 1e-6, "{at}: {} for {expected}", ours[at]);
    }
}

/// Shared memory as a capture has it, and the seconds to touch and to pin it.
fn memory(bytes: u64) -> (Vec<ImageChunk>, Pinned<Pages>, [f64; 2]) {
    let image = SharedImage::create("memory").unwrap();
    image.grow(bytes).unwrap();
    let mapping = image.map().unwrap();
    let begin = Instant::now();
    mapping.prefault(0..bytes, 4).unwrap();
    let touched_s = begin.elapsed().as_secs_f64();
    let begin = Instant::now();
    let pinned = Pinned::new(mapping.pages(0..bytes).unwrap());
    let pinned_s = begin.elapsed().as_secs_f64();
    let chunks = mapping.chunks(&[std::ops::Range { start: 0, end: bytes }]).unwrap();
    (chunks, pinned, [touched_s, pinned_s])
}

#[test]
fn captures_have_the_state_of_their_step_however_busy_the_device_is() {
    let here = (Kind::Float, device());
    let size = if device() == Device::Cpu { 64 } else { 4096 };
    let (mut state, busy) = (Tensor::zeros([1 << 18], here), Tensor::ones([size, size], here));
    let copier = HostCopier::new(1, device() == Device::Cpu).unwrap();
    let (mut slot, _pinned, _) = memory(4 << 18);
    for step in 1..=50 {
        // Work that is not done when the copy is ordered.
        let _ = busy.matmul(&busy);
        let _ = state.fill_(f64::from(step));
        let job = CopyJob { tensor: state.shallow_clone(), piece: 0, offset: 0, len: 4 << 18 };
        let ticket = copier.start(slot, vec![job], |_| {}).unwrap();
        let _ = busy.matmul(&busy);
        // On a GPU the stream waits for the copy, and what it does behind that may overwrite the state.
        let held = ticket.hold().unwrap();
        assert_eq!(held, device() != Device::Cpu);
        if held {
            let _ = state.fill_(-1.0);
        }
        slot = ticket.wait().unwrap().destination;
        let expected = (step as f32).to_le_bytes();
        assert!(slot[0].as_mut().chunks_exact(4).all(|bytes| bytes == expected), "step {step}");
    }
}

#[test]
fn steps_wait_for_nothing_that_the_device_computes() {
    let run = run(Ddp, Precision::Bf16, 2);
    let (mut training, _) = rank_on(&run, None, None, device());
    let mut numbers = [Readback::<2>::new(device()).unwrap(), Readback::new(device()).unwrap()];
    // Tables are made, and kernels are loaded.
    train(&mut training, 1..=2);
    torch::forbid_waits(true).unwrap();
    let mut losses = Vec::new();
    for step in 3..=8_u64 {
        training.timer().begin().unwrap();
        let Pass { loss } = training.forward_backward(Step(step)).unwrap();
        let Update { grad_norm, .. } = training.update(Step(step)).unwrap();
        numbers[(step % 2) as usize].start([&loss, &grad_norm]).unwrap();
        if step > 3 {
            losses.push(numbers[((step + 1) % 2) as usize].wait().unwrap()[0]);
            training.timer().split_before().unwrap();
        }
    }
    torch::forbid_waits(false).unwrap();
    assert!(losses.iter().all(|loss| loss.is_finite() && *loss > 0.0), "{losses:?}");
}

/// Figures for people, not for a verdict: how fast host memory is touched, pinned and copied to.
#[test]
fn measures_of_the_hosts_memory() {
    let all = std::env::var("TRAINER_TESTS_ALL").is_ok_and(|all| all == "1");
    let sizes: &[u64] = if all { &[1 << 30, 8 << 30, 32 << 30] } else { &[64 << 20] };
    for &bytes in sizes {
        let (slot, _pinned, [touched_s, pinned_s]) = memory(bytes);
        let tensor = Tensor::ones([64 << 20], (Kind::Uint8, device()));
        let job = CopyJob { tensor, piece: 0, offset: 0, len: 64 << 20 };
        let copier = HostCopier::new(2, device() == Device::Cpu).unwrap();
        let copied = copier.start(slot, vec![job], |_| {}).unwrap().wait().unwrap();
        let copied_s = copied.took.as_secs_f64();
        assert!(copied_s > 0.0);
        println!(
            "MEASURED {}",
            json!({"bytes": bytes, "touched_s": touched_s, "pinned_s": pinned_s, "copied_64_mib_s": copied_s})
        );
    }
}
