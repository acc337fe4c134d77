//! A pass over a language model, stage by stage: embed → blocks → head, and back.
//!
//! ```text
//! forward    each block without recording; its input stays
//! head       loss, and its gradients with respect to the last block's vectors and the head's weights
//! backward   from the last block: compute it again from its input, recorded; backward with the vectors' gradient
//! embedding  its lookup was recorded in the forward pass: that keeps tokens and nothing else
//! ```
//!
//! The last blocks may keep their graph, and are not computed again ([`Graph`]).
//!
//! Same bits: the operations of a stage are those of a pass in one graph, and each is a function of its inputs alone,
//! so that it gives the same values when it is done again. (A model that drew random numbers would have to draw the
//! same ones again; none does.) A parameter's gradient is added to once in a pass, by the sum of what its uses give. A
//! tied embedding has two, at both ends: the head's is held back until the lookup's is there, as autograd does it; or
//! it is added at once where the loss would do so in a pass of one graph ([`Model::adds_in_place`]).
//!
//! A loss that is not finite has a gradient that is no number ([`torch::telling`]), so that all ranks hear of it.
//!
//! [`Stages`] is what a strategy does between them. All ranks call it in one order, so it may communicate.
//!
//! *Memory.* Of a block with `T` tokens and width `H` a pass keeps `T · H` elements instead of its graph; one block's
//! graph is there at a time. *Error:* a pass that failed leaves gradients undefined; the worker ends.

use tch::Tensor;

use super::{Graph, Strategy};
use crate::{
    error::{Error, Kind, Result},
    model::{Batch, Model, Parameter, Stage},
    torch::{self, TorchError},
    train::lesson::{Loss, Newest},
};

/// What a strategy does before and after the stages of a pass.
pub trait Stages {
    /// A backward pass begins; `last`: it is the rank's last one of the step.
    fn begin(&mut self, last: bool) -> Result<(), TorchError>;

    /// It has ended: after the last one, gradients are averaged over the ranks.
    fn end(&mut self, last: bool) -> Result<(), TorchError>;

    /// The weights that `stage` reads are there on return; those of `next` are on their way.
    fn enter(&mut self, _stage: Stage, _next: Option<Stage>) -> Result<(), TorchError> {
        Ok(())
    }

    /// The gradients of the parameters that `stage` is the first to use are about to arrive.
    fn open(&mut self, _stage: Stage) -> Result<(), TorchError> {
        Ok(())
    }

    /// They are complete, for this pass.
    fn close(&mut self, _stage: Stage) -> Result<(), TorchError> {
        Ok(())
    }
}

/// Hears how far a pass has come, to measure its parts.
pub trait Watch {
    /// The forward pass has ended and the backward pass begins; `last`: gradients are reduced under it.
    fn backward_begins(&mut self, last: bool) -> Result<(), TorchError>;

    /// The backward pass has ended.
    fn backward_ends(&mut self) -> Result<(), TorchError>;
}

/// Nobody listens.
impl Watch for () {
    fn backward_begins(&mut self, _: bool) -> Result<(), TorchError> {
        Ok(())
    }

    fn backward_ends(&mut self) -> Result<(), TorchError> {
        Ok(())
    }
}

/// One pass over the newest batch: adds to the gradients, those of its loss divided by `divisor` of its targets.
/// Returns that loss.
pub fn pass(
    strategy: &mut dyn Strategy,
    newest: &Newest<'_>,
    graph: Graph,
    divisor: &dyn Fn(u64) -> f64,
    last: bool,
    laps: &mut dyn Watch,
) -> Result<Tensor> {
    match (newest, graph) {
        (_, Graph::Whole) => whole(strategy, newest, divisor, last, laps),
        (Newest::Language { model, batch }, Graph::Blocks { keep }) => {
            by_blocks(strategy, *model, batch, keep, divisor(batch.targets.count()), last, laps)
        }
        (Newest::Own(_), Graph::Blocks { .. }) => Err(no_blocks()),
    }
}

/// Settings that need blocks are refused together with a task when a configuration is read.
fn no_blocks() -> Error {
    Error::new(Kind::Config, "a task has no blocks: train.activations = \"block\" and \"shard\" need a language model")
}

fn whole(
    strategy: &mut dyn Strategy,
    newest: &Newest<'_>,
    divisor: &dyn Fn(u64) -> f64,
    last: bool,
    laps: &mut dyn Watch,
) -> Result<Tensor> {
    let Loss { mean, targets } = newest.loss()?;
    let loss = scaled(&mean, divisor(targets))?;
    let one = torch::tch_result("backward pass", loss.f_ones_like())?;
    laps.backward_begins(last)?;
    strategy.begin(last)?;
    torch::backward_from(&[&torch::telling(&loss)?], &[&one])?;
    strategy.end(last)?;
    laps.backward_ends()?;
    Ok(loss.detach())
}

fn scaled(mean: &Tensor, divisor: f64) -> Result<Tensor, TorchError> {
    torch::tch_result("scale loss", mean.f_div_scalar(divisor))
}

/// What a block starts from: the vectors of the stage before, with a gradient of their own if anybody there learns.
fn input(x: &Tensor, learns: bool) -> Result<Tensor, TorchError> {
    torch::tch_result("cut a graph", x.f_detach().and_then(|x| x.f_set_requires_grad(learns)))
}

/// The first stage that learns anything; `None`: nothing does.
fn first_trained(model: &dyn Model) -> Option<Stage> {
    model.parameters().iter().filter(|parameter| parameter.leaf().is_some()).map(|parameter| parameter.stage).min()
}

/// The stage after this one.
const fn after(stage: Stage, blocks: usize) -> Stage {
    match stage {
        Stage::Embed if blocks > 0 => Stage::Block(0),
        Stage::Block(index) if index + 1 < blocks => Stage::Block(index + 1),
        _ => Stage::Head,
    }
}

/// The block that the way back reaches after `stage`, down to the first stage that learns.
fn before(stage: Stage, blocks: usize, first: Option<Stage>) -> Option<Stage> {
    let index = match stage {
        Stage::Head => blocks.checked_sub(1),
        Stage::Block(index) => index.checked_sub(1),
        Stage::Embed => None,
    };
    index.map(Stage::Block).filter(|block| first.is_some_and(|first| first <= *block))
}

fn by_blocks(
    strategy: &mut dyn Strategy,
    model: &dyn Model,
    Batch { inputs, targets, spans }: &Batch,
    keep: usize,
    divisor: f64,
    last: bool,
    laps: &mut dyn Watch,
) -> Result<Tensor> {
    let blocks = model.blocks();
    let first = first_trained(model);
    let learns_before = |stage| first.is_some_and(|first| first < stage);

    strategy.enter(Stage::Embed, Some(after(Stage::Embed, blocks)))?;
    let embedded = model.embed(inputs)?;
    let mut x = input(&embedded, learns_before(after(Stage::Embed, blocks)))?;
    let mut kept = Vec::with_capacity(blocks);
    for index in 0..blocks {
        let (stage, next) = (Stage::Block(index), after(Stage::Block(index), blocks));
        strategy.enter(stage, Some(next))?;
        let compute = || model.block(index, x.shallow_clone(), spans);
        let is_kept = index + keep >= blocks;
        let y = if is_kept { compute()? } else { tch::no_grad(compute)? };
        let begin = input(&y, learns_before(next))?;
        kept.push((std::mem::replace(&mut x, begin), is_kept.then_some(y)));
    }

    strategy.enter(Stage::Head, before(Stage::Head, blocks, first))?;
    let loss = scaled(&model.head_loss(x.shallow_clone(), targets)?, divisor)?;
    laps.backward_begins(last)?;
    strategy.begin(last)?;
    let (mut gradient, tied) = head_gradients(strategy, model, &torch::telling(&loss)?, &x)?;
    let loss = loss.detach();
    drop(x);

    let mut stage = Stage::Head;
    while let Some(block) = before(stage, blocks, first) {
        stage = block;
        let (Stage::Block(index), Some((x, y))) = (block, kept.pop()) else { break };
        strategy.enter(block, before(block, blocks, first))?;
        let y = match y {
            Some(y) => y,
            None => model.block(index, x.shallow_clone(), spans)?,
        };
        strategy.open(block)?;
        torch::backward_from(&[&y], &[&gradient])?;
        drop(y);
        gradient = torch::tch_result("backward pass", x.f_grad())?;
        strategy.close(block)?;
    }

    if first == Some(Stage::Embed) {
        strategy.open(Stage::Embed)?;
        let (mut outputs, mut gradients) = (vec![&embedded], vec![&gradient]);
        for (leaf, gradient) in &tied {
            outputs.push(leaf);
            gradients.push(gradient);
        }
        torch::backward_from(&outputs, &gradients)?;
        strategy.close(Stage::Embed)?;
    }
    strategy.end(last)?;
    laps.backward_ends()?;
    Ok(loss)
}

/// The head's backward pass: adds to the gradients of its own weights. Returns that of its input `x`, undefined if
/// nobody before it learns, and those of weights that it shares with the embedding, to be added with the embedding's.
fn head_gradients(
    strategy: &mut dyn Strategy,
    model: &dyn Model,
    loss: &Tensor,
    x: &Tensor,
) -> Result<(Tensor, Vec<(Tensor, Tensor)>)> {
    let used = |parameter: &&Parameter| parameter.is_used_by(Stage::Head);
    let trained = model.parameters().iter().filter(used).filter_map(|it| Some((it.leaf()?, it.stage == Stage::Head)));
    let (mut leaves, own): (Vec<&Tensor>, Vec<bool>) = trained.unzip();
    if x.requires_grad() {
        leaves.push(x);
    }
    if leaves.is_empty() {
        return Ok((Tensor::new(), Vec::new()));
    }
    let found = Tensor::f_run_backward(&[loss], &leaves, false, false);
    let mut found = torch::tch_result("backward pass", found)?;
    let gradient = if x.requires_grad() { found.pop() } else { None };
    let (mut outputs, mut gradients, mut tied) = (Vec::new(), Vec::new(), Vec::new());
    for ((leaf, gradient), own) in leaves.iter().zip(found).zip(own).filter(|((_, gradient), _)| gradient.defined()) {
        if own {
            outputs.push(*leaf);
            gradients.push(gradient);
        } else {
            tied.push((leaf.shallow_clone(), gradient));
        }
    }
    if model.adds_in_place() && !strategy.is_staged() {
        // So does the loss in a pass of one graph. A staged strategy has not made room for the embedding's gradient
        // yet, which is zero before: the sum is the same.
        for (leaf, gradient) in tied.drain(..) {
            let sum = tch::no_grad(|| leaf.f_grad()?.f_add_(&gradient));
            let _sum = torch::tch_result("backward pass", sum)?;
        }
    }
    strategy.open(Stage::Head)?;
    if !outputs.is_empty() {
        torch::backward_from(&outputs, &gradients.iter().collect::<Vec<_>>())?;
    }
    drop(gradients);
    strategy.close(Stage::Head)?;
    Ok((gradient.unwrap_or_else(Tensor::new), tied))
}

/// What a rank does in a pass of the others for which it has no batch: its gradients are zero.
pub fn idle_pass(strategy: &mut dyn Strategy, model: &dyn Model) -> Result<()> {
    let (blocks, first) = (model.blocks(), first_trained(model));
    walk(strategy, blocks, before(Stage::Head, blocks, first))?;
    strategy.begin(false)?;
    let mut stage = Stage::Head;
    loop {
        strategy.open(stage)?;
        strategy.close(stage)?;
        let Some(block) = before(stage, blocks, first) else { break };
        stage = block;
        strategy.enter(stage, before(stage, blocks, first))?;
    }
    if first == Some(Stage::Embed) {
        strategy.open(Stage::Embed)?;
        strategy.close(Stage::Embed)?;
    }
    Ok(strategy.end(false)?)
}

/// The cross entropy (nats) of each of the batch's targets, in their order: fp32 `[count]`.
pub fn target_losses(strategy: &mut dyn Strategy, model: &dyn Model, batch: &Batch) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let blocks = model.blocks();
    strategy.enter(Stage::Embed, Some(after(Stage::Embed, blocks)))?;
    let mut x = model.embed(&batch.inputs)?;
    for index in 0..blocks {
        let stage = Stage::Block(index);
        strategy.enter(stage, Some(after(stage, blocks)))?;
        x = model.block(index, x, &batch.spans)?;
    }
    strategy.enter(Stage::Head, None)?;
    Ok(model.head_losses(x, &batch.targets)?)
}

/// What a rank does in a measurement of the others for which it has no samples.
pub fn idle_losses(strategy: &mut dyn Strategy, model: &dyn Model) -> Result<()> {
    walk(strategy, model.blocks(), None)
}

/// All stages in their order, with nothing computed; after the head comes `then`.
fn walk(strategy: &mut dyn Strategy, blocks: usize, then: Option<Stage>) -> Result<()> {
    let mut stage = Stage::Embed;
    while stage != Stage::Head {
        let next = after(stage, blocks);
        strategy.enter(stage, Some(next))?;
        stage = next;
    }
    Ok(strategy.enter(Stage::Head, then)?)
}
