//! Packed rows against documents on their own, and losses over some of the tokens.

use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::*;

const VOCABULARY: i64 = 96;

fn model(precision: Precision) -> Box<dyn Model> {
    tch::set_num_threads(1);
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.3,
    });
    let settings = BuildSettings { device: Device::Cpu, precision, seed: Some(3) };
    build(ModelKind::Decoder, &config, &settings).unwrap()
}

fn tokens(batch: i64, len: i64) -> Tensor {
    let values: Vec<i64> = (0..batch * len).map(|i| (i * i * 7 + i * 3 + 5) % VOCABULARY).collect();
    Tensor::from_slice(&values).view([batch, len])
}

fn spans(rows: &[&[u32]], len: u32) -> Spans {
    let mut spans = Spans::whole();
    spans.set(rows.iter().copied(), len, Device::Cpu).unwrap();
    spans
}

fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.detach().to_kind(Kind::Float).flatten(0, -1)).unwrap()
}

fn furthest(a: &Tensor, b: &Tensor) -> f64 {
    (a.to_kind(Kind::Float) - b.to_kind(Kind::Float)).abs().max().double_value(&[])
}

fn logits(model: &dyn Model, tokens: &Tensor, spans: &Spans) -> Tensor {
    model.head_scores(model.vectors(tokens, spans).unwrap(), Positions::All).unwrap()
}

/// Row, begin and length of each document of the packed batch of these tests.
const DOCUMENTS: [(i64, i64, i64); 5] = [(0, 0, 7), (0, 7, 1), (0, 8, 12), (1, 0, 13), (1, 13, 7)];
const STARTS: [&[u32]; 2] = [&[0, 7, 8], &[0, 13]];

fn document(x: &Tensor, (row, start, len): (i64, i64, i64)) -> Tensor {
    x.narrow(0, row, 1).narrow(1, start, len)
}

#[test]
fn a_document_in_a_packed_row_has_the_scores_that_it_has_alone() {
    for (precision, tolerance) in [(Precision::Fp32, 1e-6), (Precision::Bf16, 2e-2)] {
        let (model, tokens) = (model(precision), tokens(2, 20));
        let packed = logits(model.as_ref(), &tokens, &spans(&STARTS, 20));
        let whole = logits(model.as_ref(), &tokens, &Spans::whole());
        let size = packed.abs().max().double_value(&[]);
        for at in DOCUMENTS {
            let alone = logits(model.as_ref(), &document(&tokens, at), &Spans::whole());
            let far = furthest(&document(&packed, at), &alone) / size;
            assert!(far <= tolerance, "{precision:?} {at:?}: {far:e}");
            let leaks = furthest(&document(&whole, at), &alone) / size;
            assert_eq!(leaks > 1e-2, at.1 > 0, "{precision:?} {at:?}: {leaks:e}");
        }
    }
}

/// Scores alone can't tell: they depend on differences of positions, so they are the same up to rounding.
#[test]
fn positions_begin_anew_with_each_document() {
    let table = Tensor::arange(30, (Kind::Float, Device::Cpu)).view([30, 1, 1]);
    let packed = spans(&STARTS, 20).of_table(&table, 20).unwrap();
    assert_eq!(packed.size(), [2, 20, 1, 1]);
    let expected: Vec<f32> = DOCUMENTS.iter().flat_map(|&(_, _, len)| (0..len).map(|place| place as f32)).collect();
    assert_eq!(values(&packed), expected);
    let whole = Spans::whole().of_table(&table, 20).unwrap();
    assert_eq!((whole.size(), values(&whole)), (vec![20, 1, 1], (0..20).map(|place| place as f32).collect()));
}

/// The scores, and the gradient of the loss by the vectors that the first block gets.
fn scores_and_gradient(model: &dyn Model, tokens: &Tensor) -> [Tensor; 2] {
    let spans = spans(&STARTS, 20);
    let scores = logits(model, tokens, &spans);
    let vectors = model.embed(tokens).unwrap().detach().set_requires_grad(true);
    let x = (0..model.blocks()).fold(vectors.shallow_clone(), |x, index| model.block(index, x, &spans).unwrap());
    // The next token is taken as if the last one of a document had none.
    let rows: Vec<i64> = DOCUMENTS
        .iter()
        .flat_map(|(row, start, len)| (row * 20 + start)..(row * 20 + start + len - 1).max(row * 20 + start))
        .collect();
    let next = tokens.roll(-1_i64, 1_i64);
    model.head_loss(x, &Targets::at(next, &rows).unwrap()).unwrap().backward();
    [scores, vectors.grad()]
}

#[test]
fn a_change_in_one_packed_document_changes_no_bit_of_the_others() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        let (model, before) = (model(precision), tokens(2, 20));
        let first = scores_and_gradient(model.as_ref(), &before);
        for changed in DOCUMENTS {
            let after = before.copy();
            let _ = document(&after, changed).f_add_scalar_(1).unwrap().f_remainder_(VOCABULARY).unwrap();
            let second = scores_and_gradient(model.as_ref(), &after);
            for at in DOCUMENTS {
                for (what, a, b) in [("scores", &first[0], &second[0]), ("gradient", &first[1], &second[1])] {
                    let same = values(&document(a, at)) == values(&document(b, at));
                    // A document of one token has no target, so nothing hears of its gradient.
                    let is_heard = at == changed && (at.2 > 1 || what == "scores");
                    assert_eq!(same, !is_heard, "{precision:?}: {what} of {at:?} after a change in {changed:?}");
                }
            }
        }
    }
}

#[test]
fn rows_of_one_document_each_have_the_bits_that_they_had_without_spans() {
    let (model, tokens) = (model(Precision::Fp32), tokens(2, 20));
    let [a, b] = [Spans::whole(), spans(&[&[0], &[0]], 20)].map(|spans| logits(model.as_ref(), &tokens, &spans));
    assert_eq!(values(&a), values(&b));
}

/// The loss and every parameter's gradient, which is zero afterwards.
fn gradients(model: &dyn Model, loss: &Tensor) -> (f64, Vec<Tensor>) {
    loss.backward();
    let of = |parameter: &Parameter| {
        let mut gradient = parameter.leaf().unwrap().grad();
        assert!(gradient.defined(), "{} has no gradient", parameter.name);
        let copy = gradient.copy();
        let _ = gradient.zero_();
        copy
    };
    (loss.double_value(&[]), model.parameters().iter().map(of).collect())
}

#[test]
fn the_loss_over_some_tokens_is_the_mean_of_their_losses_and_so_are_its_gradients() {
    for rows in [vec![0], vec![39], vec![1, 2, 5, 19, 20, 33], (0..39).collect(), (1..40).collect()] {
        let (model, tokens) = (model(Precision::Fp32), tokens(2, 21));
        let batch = Batch::marked(&tokens, &rows, spans(&STARTS, 20)).unwrap();
        assert_eq!(batch.targets.count(), rows.len() as u64);
        let (loss, ours) = gradients(model.as_ref(), &model.batch_loss(&batch).unwrap());

        let scores = logits(model.as_ref(), &tokens.narrow(1, 0, 20), &spans(&STARTS, 20)).flatten(0, 1);
        let mut targets = vec![-100; 40];
        let next: Vec<i64> = Vec::try_from(tokens.narrow(1, 1, 20).reshape(-1)).unwrap();
        rows.iter().for_each(|&row| targets[row as usize] = next[row as usize]);
        let plain =
            scores.cross_entropy_loss::<Tensor>(&Tensor::from_slice(&targets), None, tch::Reduction::Mean, -100, 0.0);
        let (expected, theirs) = gradients(model.as_ref(), &plain);
        assert!((loss - expected).abs() < 1e-6 * expected, "{rows:?}: {loss} for {expected}");
        // A first token attends to itself alone: the gradients of its query and key are rounding errors of others.
        let size = theirs.iter().map(|gradient| gradient.abs().max().double_value(&[])).fold(0.0, f64::max);
        for ((ours, theirs), parameter) in ours.iter().zip(&theirs).zip(model.parameters()) {
            let far = furthest(ours, theirs) / size;
            assert!(far <= 1e-6, "{rows:?}: gradient of {}: {far:e}", parameter.name);
        }
    }
}

#[test]
fn targets_everywhere_have_the_bits_of_plain_text() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        let (model, tokens) = (model(precision), tokens(2, 21));
        let rows: Vec<i64> = (0..40).collect();
        let batch = Batch::marked(&tokens, &rows, spans(&[&[0], &[0]], 20)).unwrap();
        let marked = gradients(model.as_ref(), &model.batch_loss(&batch).unwrap());
        let plain = gradients(model.as_ref(), &model.loss(&tokens).unwrap());
        assert_eq!(marked.0.to_bits(), plain.0.to_bits());
        assert!(marked.1.iter().zip(&plain.1).all(|(a, b)| values(a) == values(b)), "{precision:?}");
    }
}

#[test]
fn a_batch_without_a_target_has_a_loss_of_zero_and_every_parameter_hears_it() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        let (model, tokens) = (model(precision), tokens(2, 21));
        let batch = Batch::marked(&tokens, &[], spans(&STARTS, 20)).unwrap();
        let (loss, gradients) = gradients(model.as_ref(), &model.batch_loss(&batch).unwrap());
        assert_eq!((loss, batch.targets.count()), (0.0, 0));
        for (gradient, parameter) in gradients.iter().zip(model.parameters()) {
            assert!(values(gradient).iter().all(|value| *value == 0.0), "{precision:?}: {}", parameter.name);
        }
        let unrecorded = tch::no_grad(|| model.batch_loss(&batch).unwrap());
        assert_eq!(unrecorded.double_value(&[]), 0.0);
    }
}

#[test]
fn lists_that_are_none_are_refused() {
    let refused = |rows: &[&[u32]], len| {
        let error = Spans::whole().set(rows.iter().copied(), len, Device::Cpu).unwrap_err();
        assert!(error.to_string().contains("documents of a row of"), "{error}");
    };
    for starts in [&[][..], &[1], &[0, 0], &[0, 5, 4], &[0, 20], &[0, 21], &[0, u32::MAX]] {
        refused(&[&[0, 3], starts], 20);
    }
    refused(&[&[0]], 0);
    for rows in [&[-1][..], &[40], &[3, 3], &[4, 3], &[i64::MAX], &[i64::MIN, 2]] {
        let error = Targets::at(tokens(2, 20), rows).unwrap_err();
        assert!(error.to_string().contains("are not ascending places below 40"), "{error}");
    }
    let model = model(Precision::Fp32);
    let other = Batch::marked(&tokens(2, 20), &[3], spans(&STARTS, 20)).unwrap();
    let text = model.batch_loss(&other).unwrap_err().to_string();
    assert!(text.contains("2 rows of 20 tokens") && text.contains("[2, 19, 32]"), "{text}");
    let x = model.vectors(&tokens(2, 20), &Spans::whole()).unwrap();
    let text = model.head_loss(x, &Targets::all(tokens(2, 19))).unwrap_err().to_string();
    assert!(text.contains("targets are for 38 positions, the vectors for 40"), "{text}");
}
