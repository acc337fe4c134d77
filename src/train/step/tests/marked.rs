//! Steps over data with marks: several documents in a sequence, and tokens that are no targets.

use super::*;
use crate::{
    config::Strategy::{Ddp, Shard, Zero1},
    train::lesson::Loss,
};

/// Where documents start, and the targets: every third sequence is dense, every third has two, every third none.
fn usual(token: usize) -> (bool, bool) {
    let (sequence, at) = (token.saturating_sub(1) / SEQUENCE, token % SEQUENCE);
    let start = token == 0 || token % 7 == 5;
    let target = match sequence % 3 {
        0 => at != 3,
        1 => at == 2 || at == 9,
        _ => false,
    };
    (start, target && !start)
}

/// A run over the same tokens as ever, with these marks.
fn marked(strategy: config::Strategy, most: u32, mark: impl Fn(usize) -> (bool, bool)) -> Run {
    let run = run(strategy, Precision::Fp32, most);
    let path = run.folder.path().join("index.json");
    let mut index: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    index["format"] = json!(2);
    index["documents"] = json!({});
    for split in ["train", "validation"] {
        let tokens = index[split][0]["tokens"].as_u64().unwrap() as usize;
        let mut bytes = vec![0_u8; tokens.div_ceil(4)];
        let (mut documents, mut targets) = (0, 0);
        for token in 0..tokens {
            let (start, target) = mark(token);
            bytes[token / 4] |= (u8::from(start) | u8::from(target) << 1) << (2 * (token % 4));
            documents += u64::from(start);
            targets += u64::from(target);
        }
        let file = format!("{split}-00000.marks");
        std::fs::write(run.folder.path().join(&file), &bytes).unwrap();
        index[split][0]["marks"] = json!({
            "file": file, "bytes": bytes.len(), "crc64": "0000000000000000",
            "documents": documents, "targets": targets,
        });
    }
    std::fs::write(path, index.to_string()).unwrap();
    run
}

/// What one rank has of a step: its part of the loss, the norm, and its state afterwards.
fn first_step(run: &Run, group: Option<ProcessGroup>) -> (f64, f64, Held) {
    let (mut training, state) = rank(run, group, None);
    let Pass { loss, .. } = training.forward_backward(Step(1)).unwrap();
    let norm = torch::to_f64(&training.update(Step(1)).unwrap().grad_norm).unwrap();
    training.settle().unwrap();
    (torch::to_f64(&loss).unwrap(), norm, held(&state))
}

/// Loss, norm and gradient of the first step of all ranks together. The first moments are the gradient times one
/// factor.
fn whole_step(run: &Run, world: u32) -> (f64, f64, Vec<f32>) {
    let ranks = everywhere(world, |group| first_step(run, group));
    let loss = ranks.iter().map(|(loss, ..)| loss).sum::<f64>() / f64::from(world);
    let norm = ranks[0].1;
    let (_, states): (Vec<_>, Vec<Held>) = ranks.into_iter().map(|(loss, _, held)| (loss, held)).unzip();
    let moments = together(&states).into_iter().filter(|(name, _)| name.starts_with("exp_avg."));
    let bytes: Vec<u8> = moments.flat_map(|(_, bytes)| bytes).collect();
    let gradient = bytes.chunks_exact(4).map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]]));
    (loss, norm, gradient.collect())
}

#[test]
fn loss_and_gradients_do_not_depend_on_passes_or_ranks_however_unequal_the_targets() {
    let (loss, norm, gradient) = whole_step(&marked(Ddp, 8, usual), 1);
    let size = gradient.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    for strategy in [Ddp, Zero1, Shard] {
        // On 8 ranks with a sequence each, some have no target at all.
        for (most, world) in [1, 2, 4].into_iter().flat_map(|most| [1, 2, 3].map(|world| (most, world))).chain([(1, 8)])
        {
            let ours = whole_step(&marked(strategy, most, usual), world);
            let case = format!("{strategy:?}, passes of {most}, {world} ranks");
            assert!(((ours.0 - loss) / loss).abs() < 1e-6, "{case}: loss {} for {loss}", ours.0);
            assert!(((ours.1 - norm) / norm).abs() < 1e-6, "{case}: norm {} for {norm}", ours.1);
            let apart = ours.2.iter().zip(&gradient).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
            assert!(apart / size < 1e-6, "{case}: a gradient differs by {apart:e} of {size:e}");
        }
    }
}

#[test]
fn the_loss_of_a_step_is_the_mean_over_its_targets() {
    let run = marked(Ddp, 3, usual);
    let (mut training, _) = rank(&run, None, None);
    // The whole sum, sequence by sequence.
    let (mut sum, mut count) = (0.0, 0);
    for position in 0..8 {
        training.lesson.read(position..position + 1).unwrap();
        let Loss { mean, targets } = tch::no_grad(|| training.lesson.newest().unwrap().loss().unwrap());
        sum += torch::to_f64(&mean).unwrap() * targets as f64;
        count += targets;
    }
    assert_eq!(training.lesson.targets(0..8).unwrap(), count);
    assert!((1..128).contains(&count), "{count}");
    let loss = torch::to_f64(&training.forward_backward(Step(1)).unwrap().loss).unwrap();
    assert!((loss - sum / count as f64).abs() < 1e-6 * loss, "{loss} for {sum} of {count}");
}

#[test]
fn marks_that_say_nothing_have_the_bits_of_data_without_marks() {
    for (strategy, world) in [(Ddp, 1), (Zero1, 3), (Shard, 3)] {
        let plain = run(strategy, Precision::Fp32, 2);
        // One document, in which every token is a target.
        let same = marked(strategy, 2, |token| (token == 0, token > 0));
        let [a, b] = [&plain, &same].map(|run| everywhere(world, |group| train(&mut rank(run, group, None).0, 1..=3)));
        assert_eq!(a, b, "{strategy:?} on {world}");
    }
}

#[test]
fn a_run_over_marked_data_resumes_to_the_bit() {
    for (strategy, world) in [(Ddp, 2), (Zero1, 3), (Shard, 3)] {
        assert_resumes(&marked(strategy, 2, usual), world);
    }
}

#[test]
fn the_held_out_loss_is_the_mean_over_targets_on_any_world() {
    let run = marked(Zero1, 2, usual);
    let of = |world| {
        let shares = everywhere(world, |group| rank(&run, group, None).0.evaluate(|| false).unwrap().unwrap());
        let targets: u64 = shares.iter().map(|share| share.0[0].targets).sum();
        (targets, shares.iter().map(|share| share.0[0].loss).sum::<f64>() / targets as f64)
    };
    let (targets, loss) = of(1);
    let expected = (1..=HELD_OUT as usize * SEQUENCE).filter(|&token| usual(token).1).count();
    assert_eq!(targets, expected as u64);
    for world in [2, 4] {
        let ours = of(world);
        assert!(ours.0 == targets && (ours.1 - loss).abs() < 1e-6 * loss, "{world}: {ours:?} for {loss}");
    }
}

#[test]
fn a_step_without_any_target_is_refused_by_every_rank() {
    let run = marked(Ddp, 2, |token| (token == 0, false));
    let errors = everywhere(2, |group| {
        let error = rank(&run, group, None).0.forward_backward(Step(3)).unwrap_err();
        (error.to_string(), error.kind(), error.hint().map(str::to_owned))
    });
    for (text, kind, hint) in errors {
        assert_eq!((text.as_str(), kind), ("none of the 8 sequences of step 3 has a token to learn", Kind::Config));
        assert!(hint.unwrap().contains("train.global_batch"));
    }
}

/// The source of a token: three in turn, and one that has no target.
fn source(token: usize) -> u8 {
    [0, 2, 3][token % 3]
}

/// The same run, whose tokens for validation have sources.
fn with_sources(run: Run) -> Run {
    let path = run.folder.path().join("index.json");
    let mut index: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let tokens = index["validation"][0]["tokens"].as_u64().unwrap() as usize;
    let bytes: Vec<u8> = (0..tokens).map(source).collect();
    let file = "validation-00000.sources";
    std::fs::write(run.folder.path().join(file), &bytes).unwrap();
    index["sources"] = json!(["a", "b", "c", "d"]);
    index["validation"][0]["sources"] = json!({ "file": file, "bytes": tokens, "crc64": "0000000000000000" });
    std::fs::write(path, index.to_string()).unwrap();
    run
}

/// Sums over all ranks, by source.
fn held_out(run: &Run, world: u32) -> Vec<(String, u64, f64)> {
    let shares = everywhere(world, |group| rank(run, group, None).0.evaluate(|| false).unwrap().unwrap());
    let mut sums: Vec<(String, u64, f64)> = Vec::new();
    for (number, first) in shares[0].0.iter().enumerate() {
        let all = || shares.iter().map(|share| &share.0[number]);
        sums.push((first.source.clone(), all().map(|sum| sum.targets).sum(), all().map(|sum| sum.loss).sum()));
    }
    sums
}

#[test]
fn the_held_out_loss_of_each_source_is_that_of_its_targets_whatever_ranks_and_passes() {
    for mark in [usual as fn(usize) -> (bool, bool), |token| (token == 0, token > 0)] {
        let run = |most| with_sources(marked(Ddp, most, mark));
        let sums = held_out(&run(8), 1);
        for (number, name) in ["a", "b", "c", "d"].into_iter().enumerate() {
            let of_it = |token: &usize| mark(*token).1 && usize::from(source(*token)) == number;
            let targets = (1..=HELD_OUT as usize * SEQUENCE).filter(of_it).count() as u64;
            assert_eq!((sums[number].0.as_str(), sums[number].1), (name, targets));
            assert_eq!(sums[number].2 > 0.0, targets > 0);
        }
        // Together they are the loss of all.
        let whole = held_out(&marked(Ddp, 8, mark), 1);
        let [(_, targets, loss)] = whole.as_slice() else { panic!("{whole:?}") };
        assert_eq!(sums.iter().map(|sum| sum.1).sum::<u64>(), *targets);
        assert_eq!(sums.iter().map(|sum| sum.2).sum::<f64>().to_bits(), loss.to_bits(), "sums are exact");
        for (most, world) in [(1, 1), (3, 1), (2, 2), (1, 3), (2, 4)] {
            for (ours, theirs) in held_out(&run(most), world).iter().zip(&sums) {
                assert_eq!((&ours.0, ours.1), (&theirs.0, theirs.1), "passes of {most}, {world} ranks");
                assert!((ours.2 - theirs.2).abs() <= 1e-6 * theirs.2, "passes of {most}, {world} ranks: {ours:?}");
            }
        }
    }
}

#[test]
fn a_few_sequences_of_data_with_sources_are_spread_over_all_of_them() {
    let mut run = with_sources(marked(Ddp, 8, |token| (token == 0, token > 0)));
    let path = run.folder.path().join("validation-00000.sources");
    // The sources lie one behind the other.
    let tokens = HELD_OUT as usize * SEQUENCE + 1;
    std::fs::write(path, (0..tokens).map(|token| if token * 2 > tokens { 1 } else { 0 }).collect::<Vec<u8>>()).unwrap();
    run.data.validation_sequences = 2;
    let sums = held_out(&run, 1);
    assert_eq!([sums[0].1, sums[1].1, sums[2].1].map(|targets| targets > 0), [true, true, false]);
    assert_eq!(sums[0].1 + sums[1].1, 2 * SEQUENCE as u64);
}
