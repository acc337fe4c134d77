//! Gradients averaged over the ranks while the backward pass still runs, by the engine of PyTorch's DDP.
//!
//! A reducer gives every rank all averages ([`Reducer::new`]), or to each rank one chunk of every bucket
//! ([`Reducer::sharded`], for ZeRO-1, arXiv 1910.02054), which is half the traffic.
//!
//! Invariants, on which bit-equality across a resume rests:
//! - The bucket and position of each gradient follow only from the list of parameters and the two sizes (reverse order
//!   of the list), and never change. A ring sums each element in an order that depends on its place in its bucket.
//! - Gradients lie in the buckets from the first step on, so the first step after a resume divides like every other
//!   one.
//! - Gradients are set to zero in place ([`zero_gradients`]), never removed: a removed one would leave its bucket.

use std::ptr;

use tch::Tensor;

use super::{
    ProcessGroup, Result, TorchError,
    ffi::{self, check},
    tch_result,
};

/// The treatment of the gradients that a backward pass has added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Keeps them local: more micro-batches of this step follow.
    Accumulate,
    /// Averages the accumulated gradients over the ranks: the last micro-batch.
    Average,
}

impl Reduction {
    /// Of a rank's `last` pass of a step, or of one before it.
    pub const fn of(last: bool) -> Self {
        if last { Self::Average } else { Self::Accumulate }
    }
}

/// One bucket of a sharded reducer. All counts are elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Its parameters, as numbers in the reducer's list, in the order of their gradients.
    pub params: Vec<usize>,
    /// One rank's chunk: the number of ranks times this covers the whole bucket, the rest is padding.
    pub chunk: u64,
}

/// Averages the gradients of a list of parameters over the ranks of a group, bucket by bucket, behind the backward
/// pass.
#[derive(Debug)]
pub struct Reducer {
    handle: *mut ffi::ReducerHandle,
}

impl Reducer {
    /// Takes over the gradients of `params` (leaves that require gradients, the same list on every rank), which are
    /// zero afterwards. The first bucket is small so that the first all-reduce starts early. Keeps the parameters and
    /// the group alive.
    pub fn new(
        params: &[Tensor],
        group: &ProcessGroup,
        first_bucket_bytes: usize,
        bucket_bytes: usize,
    ) -> Result<Self> {
        let doing = "make the gradient reducer";
        let size = |bytes: usize| {
            i64::try_from(bytes)
                .ok()
                .filter(|&bytes| bytes > 0)
                .ok_or(TorchError::Number { doing, what: "a bucket size" })
        };
        let (first, rest) = (size(first_bucket_bytes)?, size(bucket_bytes)?);
        let raws = ffi::raws(params);
        let mut handle = ptr::null_mut();
        // SAFETY: pointers are valid for the call; the shim takes references of its own.
        let status =
            unsafe { ffi::trn_reducer_new(raws.as_ptr(), raws.len(), group.handle(), first, rest, &mut handle) };
        check(doing, status)?;
        Ok(Self { handle })
    }

    /// Like [`Reducer::new`], but after a [`Reduction::Average`] each rank has only the averages of its own chunk of
    /// every bucket; the other values are meaningless. `buckets` must hold each parameter once. Each element is summed
    /// in the order of ranks (Gloo), wherever it lies.
    pub fn sharded(params: &[Tensor], group: &ProcessGroup, buckets: &[Bucket]) -> Result<Self> {
        let doing = "make the gradient reducer";
        let number = |what| TorchError::Number { doing, what };
        let mut seen = vec![false; params.len()];
        let mut indices = Vec::with_capacity(params.len());
        for &index in buckets.iter().flat_map(|bucket| &bucket.params) {
            let place = seen.get_mut(index).filter(|seen| !**seen);
            *place.ok_or(number("a bucket's parameter"))? = true;
            indices.push(index as u64);
        }
        if seen.contains(&false) {
            return Err(number("the number of parameters in buckets"));
        }
        let lengths: Vec<u64> = buckets.iter().map(|bucket| bucket.params.len() as u64).collect();
        let chunks = buckets.iter().map(|bucket| i64::try_from(bucket.chunk).map_err(|_| number("a chunk")));
        let chunks = chunks.collect::<Result<Vec<_>>>()?;
        let raws = ffi::raws(params);
        let mut handle = ptr::null_mut();
        // SAFETY: pointers are valid for the call, `indices` has the sum of `lengths` elements, the two other lists
        // have one for each bucket; the shim takes references of its own.
        let status = unsafe {
            ffi::trn_reducer_new_sharded(
                raws.as_ptr(),
                raws.len(),
                group.handle(),
                indices.as_ptr(),
                lengths.as_ptr(),
                chunks.as_ptr(),
                buckets.len(),
                &mut handle,
            )
        };
        check(doing, status)?;
        Ok(Self { handle })
    }

    /// The gradients of one bucket of a sharded reducer: one dimension, as many chunks as there are ranks. They stay
    /// where they are for the reducer's life.
    pub fn bucket(&self, index: usize) -> Result<Tensor> {
        let mut memory = ptr::null_mut();
        // SAFETY: pointers are valid for the call; the shim checks the number.
        check("get a bucket", unsafe { ffi::trn_reducer_bucket(self.handle, index, &mut memory) })?;
        // SAFETY: the call succeeded, so it wrote a tensor that is ours.
        Ok(unsafe { ffi::adopt(memory) })
    }

    /// Runs the backward pass of `loss`, adding to the gradients.
    ///
    /// With [`Reduction::Average`] every gradient is, on return, the sum over this step's passes, averaged over the
    /// ranks (of a sharded reducer: those of the rank's chunks); the loss must then depend on every parameter, which is
    /// checked. All ranks must average together. After an error the gradients are undefined and the reducer is
    /// unusable.
    pub fn backward(&self, loss: &Tensor, reduction: Reduction) -> Result<()> {
        self.begin(reduction)?;
        // A gradient of 1, as autograd begins with.
        let one = tch_result("backward pass", loss.f_ones_like())?;
        backward_from(&[loss], &[&one])?;
        self.end(reduction)
    }

    /// For a backward pass that consists of several calls of [`backward_from`]: before the first of them. With
    /// [`Reduction::Average`] each parameter's gradient must arrive once, in whatever call, before [`Reducer::end`].
    pub fn begin(&self, reduction: Reduction) -> Result<()> {
        match reduction {
            Reduction::Accumulate => Ok(()),
            // SAFETY: the reducer is alive for the call.
            Reduction::Average => check("backward pass", unsafe { ffi::trn_reducer_begin(self.handle) }),
        }
    }

    /// After the last call: waits for the averages, if they are wanted.
    pub fn end(&self, reduction: Reduction) -> Result<()> {
        match reduction {
            Reduction::Accumulate => Ok(()),
            // SAFETY: the reducer is alive for the call.
            Reduction::Average => check("backward pass", unsafe { ffi::trn_reducer_end(self.handle) }),
        }
    }

    /// The most bytes that a sharded reducer has held at a time for what other ranks sent, beside its buckets: those of
    /// two buckets on a CPU, none on a GPU.
    pub fn most_held(&self) -> Result<u64> {
        let mut bytes = 0;
        // SAFETY: pointers are valid for the call.
        check("read a reducer", unsafe { ffi::trn_reducer_most_held(self.handle, &mut bytes) })?;
        Ok(bytes)
    }
}

impl Drop for Reducer {
    fn drop(&mut self) {
        // SAFETY: made by the shim and freed once; it takes its hooks off the parameters.
        unsafe { ffi::trn_reducer_free(self.handle) };
    }
}

/// Runs a backward pass from `outputs`, whose gradients are `gradients`, adding to the gradients of the leaves. A leaf
/// may be an output itself: what arrives at it from the others is added to its gradient here, and the sum to what the
/// leaf has, as one addition.
pub fn backward_from(outputs: &[&Tensor], gradients: &[&Tensor]) -> Result<()> {
    let doing = "backward pass";
    if outputs.len() != gradients.len() {
        return Err(TorchError::Lists { doing });
    }
    let raws = |tensors: &[&Tensor]| tensors.iter().map(|tensor| ffi::raw(tensor)).collect::<Vec<_>>();
    let (outputs, gradients) = (raws(outputs), raws(gradients));
    // SAFETY: the tensors are alive for the call, and the lists have one length.
    check(doing, unsafe { ffi::trn_backward_from(outputs.as_ptr(), gradients.as_ptr(), outputs.len()) })
}

/// Lets the gradient of `leaf` be added to `memory`, which has its extents, type and device.
pub fn place_gradient(leaf: &Tensor, memory: &Tensor) -> Result<()> {
    // SAFETY: both are alive for the call; the shim compares them and takes a reference of its own.
    check("place a gradient", unsafe { ffi::trn_place_gradient(ffi::raw(leaf), ffi::raw(memory)) })
}

/// Sets every parameter's gradient to zero in place; creates one if there is none.
pub fn zero_gradients(params: &[Tensor]) -> Result<()> {
    let raws = ffi::raws(params);
    // SAFETY: the tensors are alive for the call.
    check("zero gradients", unsafe { ffi::trn_zero_gradients(raws.as_ptr(), raws.len()) })
}

/// The parameters' gradients, which share their memory: with a [`Reducer`], or after [`zero_gradients`], they can be
/// fetched once and used in every step. An error if a parameter has none.
pub fn gradients(params: &[Tensor]) -> Result<Vec<Tensor>> {
    params
        .iter()
        .map(|param| {
            let mut grad = ptr::null_mut();
            // SAFETY: pointers are valid for the call.
            check("get gradient", unsafe { ffi::trn_gradient(ffi::raw(param), &mut grad) })?;
            // SAFETY: the call succeeded, so it wrote a tensor that is ours.
            Ok(unsafe { ffi::adopt(grad) })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::{
        super::{
            AdamW, Backend, Moments, Store, adamw_step,
            group::tests::{LIMIT, ranks},
            store_bytes,
        },
        *,
    };
    use crate::ids::{Rank, Step, WorldSize};

    const F32: (Kind, Device) = (Kind::Float, Device::Cpu);
    /// Three buckets for the little model below.
    const BUCKETS: (usize, usize) = (256, 2048);
    const SETTINGS: AdamW = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };

    /// Values in (-0.5, 0.5) that depend on `seed` alone, not on a generator that tests on other threads share.
    fn noise(shape: &[i64], seed: u64) -> Tensor {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let values: Vec<f32> = (0..shape.iter().product::<i64>())
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 40) as f32 / (1 << 24) as f32 - 0.5
            })
            .collect();
        Tensor::from_slice(&values).view(shape)
    }

    /// Two layers and a scale; the state is (parameters, moments).
    struct Model {
        params: Vec<Tensor>,
        exp_avgs: Vec<Tensor>,
        exp_avg_sqs: Vec<Tensor>,
    }

    impl Model {
        fn new() -> Self {
            let shapes: [&[i64]; 4] = [&[24, 16], &[24], &[8, 24], &[8]];
            let params =
                shapes.iter().zip(1..).map(|(shape, seed)| noise(shape, seed).set_requires_grad(true)).collect();
            let zeros = || shapes.iter().map(|shape| Tensor::zeros(*shape, F32)).collect();
            Self { params, exp_avgs: zeros(), exp_avg_sqs: zeros() }
        }

        fn copy(&self) -> Self {
            let copy = |list: &[Tensor]| list.iter().map(|tensor| tensor.detach().copy()).collect::<Vec<_>>();
            let params = copy(&self.params).into_iter().map(|param| param.set_requires_grad(true)).collect();
            Self { params, exp_avgs: copy(&self.exp_avgs), exp_avg_sqs: copy(&self.exp_avg_sqs) }
        }

        fn loss(&self, x: &Tensor) -> Tensor {
            let hidden = (x.matmul(&self.params[0].tr()) + &self.params[1]).tanh();
            (hidden.matmul(&self.params[2].tr()) * &self.params[3]).square().mean(Kind::Float)
        }

        fn update(&self, step: u64) {
            let grads = gradients(&self.params).unwrap();
            let moments = Moments { exp_avgs: &self.exp_avgs, exp_avg_sqs: &self.exp_avg_sqs };
            adamw_step(&self.params, &grads, moments, Step(step), &SETTINGS, None).unwrap();
            zero_gradients(&self.params).unwrap();
        }

        fn bytes(&self) -> Vec<Vec<u8>> {
            [&self.params, &self.exp_avgs, &self.exp_avg_sqs].into_iter().flatten().map(bytes).collect()
        }
    }

    fn bytes(tensor: &Tensor) -> Vec<u8> {
        let mut bytes = vec![0; super::super::byte_len(tensor).unwrap()];
        store_bytes(tensor, &mut bytes).unwrap();
        bytes
    }

    /// The batch of one step: 12 rows, of which each rank takes its share.
    fn batch(step: u64) -> Tensor {
        noise(&[12, 16], 1000 + step)
    }

    fn share(step: u64, group: &ProcessGroup) -> Tensor {
        let rows = 12 / i64::from(group.world().get());
        batch(step).narrow(0, rows * i64::from(group.rank().get()), rows)
    }

    fn train(model: &Model, group: &ProcessGroup, steps: std::ops::RangeInclusive<u64>, micro_batches: i64) {
        let reducer = Reducer::new(&model.params, group, BUCKETS.0, BUCKETS.1).unwrap();
        for step in steps {
            let parts = share(step, group).chunk(micro_batches, 0);
            for (i, part) in parts.iter().enumerate() {
                let last = i + 1 == parts.len();
                let reduction = if last { Reduction::Average } else { Reduction::Accumulate };
                reducer.backward(&(model.loss(part) / micro_batches as f64), reduction).unwrap();
            }
            model.update(step);
        }
    }

    fn run(world: u32, micro_batches: i64) -> Vec<Model> {
        ranks(world, LIMIT, |group| {
            let model = Model::new();
            train(&model, &group, 1..=20, micro_batches);
            model
        })
    }

    fn alone() -> Model {
        let model = Model::new();
        zero_gradients(&model.params).unwrap();
        for step in 1..=20 {
            model.loss(&batch(step)).backward();
            model.update(step);
        }
        model
    }

    fn assert_close(got: &Model, want: &Model) {
        for (i, (got, want)) in got.params.iter().zip(&want.params).enumerate() {
            let difference = f64::try_from((got - want).abs().max()).unwrap();
            assert!(difference < 2e-4, "parameter {i} differs by {difference}");
        }
        assert!(got.params[0] != Model::new().params[0], "nothing was learnt");
    }

    #[test]
    fn ranks_agree_to_the_last_bit_and_with_one_process_up_to_rounding() {
        let want = alone();
        for world in [2, 3] {
            let models = run(world, 1);
            for model in &models {
                assert_eq!(model.bytes(), models[0].bytes(), "{world} ranks");
            }
            assert_close(&models[0], &want);
        }
    }

    #[test]
    fn two_runs_are_equal_to_the_last_bit() {
        assert_eq!(run(3, 2)[0].bytes(), run(3, 2)[0].bytes());
    }

    #[test]
    fn two_micro_batches_of_which_the_last_is_averaged_equal_one_batch() {
        let models = run(2, 2);
        assert_eq!(models[0].bytes(), models[1].bytes());
        assert_close(&models[0], &alone());
    }

    #[test]
    fn a_resumed_run_equals_the_undisturbed_one_to_the_last_bit() {
        // Three ranks: x * (1/3) and x / 3 differ, and the ring's order of summation matters.
        let undisturbed = run(3, 1);
        let resumed = ranks(3, LIMIT, |group| {
            let model = Model::new();
            train(&model, &group, 1..=7, 1);
            let restored = model.copy();
            train(&restored, &group, 8..=20, 1);
            restored
        });
        assert_eq!(resumed[0].bytes(), undisturbed[0].bytes());
    }

    #[test]
    fn gradients_are_in_the_buckets_from_the_start_and_stay_there() {
        ranks(2, LIMIT, |group| {
            let model = Model::new();
            let reducer = Reducer::new(&model.params, &group, BUCKETS.0, BUCKETS.1).unwrap();
            let handles = gradients(&model.params).unwrap();
            assert!(handles.iter().all(|grad| f64::try_from(grad.abs().sum(Kind::Float)).unwrap() == 0.0));
            for step in 1..=3 {
                reducer.backward(&model.loss(&share(step, &group)), Reduction::Average).unwrap();
                for (handle, param) in handles.iter().zip(&model.params) {
                    assert_eq!(handle.data_ptr(), param.grad().data_ptr());
                    assert!(f64::try_from(handle.abs().sum(Kind::Float)).unwrap() > 0.0);
                }
                zero_gradients(&model.params).unwrap();
            }
        });
    }

    /// Each rank's chunk of each bucket, put together, compared with the plain reducer's result.
    #[test]
    fn a_sharded_reducer_gives_each_rank_its_chunk_of_the_averages() {
        for (world, passes) in [(1, 1), (2, 1), (3, 2), (4, 3)] {
            let whole = ranks(world, LIMIT, |group| {
                let model = Model::new();
                let reducer = Reducer::new(&model.params, &group, BUCKETS.0, BUCKETS.1).unwrap();
                let grads = reduce(&model, &reducer, &group, passes);
                grads.iter().map(|grad| Vec::<f32>::try_from(grad.flatten(0, -1)).unwrap()).collect::<Vec<_>>()
            });
            let lens: Vec<usize> = whole[0].iter().map(Vec::len).collect();
            // Two buckets, the chunk one element longer than it must be, so that there is padding.
            let buckets = [vec![3, 2], vec![1, 0]].map(|params| {
                let len: usize = params.iter().map(|&param| lens[param]).sum();
                Bucket { params, chunk: (len as u64).div_ceil(world.into()) + 1 }
            });
            let chunks = ranks(world, LIMIT, |group| {
                let model = Model::new();
                let reducer = Reducer::sharded(&model.params, &group, &buckets).unwrap();
                let handles: Vec<_> = (0..2).map(|index| reducer.bucket(index).unwrap()).collect();
                reduce(&model, &reducer, &group, passes);
                let own = |(memory, bucket): (&Tensor, &Bucket)| {
                    let chunk = bucket.chunk as i64;
                    Vec::<f32>::try_from(memory.narrow(0, chunk * i64::from(group.rank().get()), chunk)).unwrap()
                };
                let chunks: Vec<Vec<f32>> = handles.iter().zip(&buckets).map(own).collect();
                zero_gradients(&model.params).unwrap();
                for memory in &handles {
                    assert_eq!(f64::try_from(memory.abs().sum(Kind::Float)).unwrap(), 0.0, "padding stays zero");
                }
                chunks
            });
            for (index, bucket) in buckets.iter().enumerate() {
                let together: Vec<f32> = chunks.iter().flat_map(|rank| rank[index].clone()).collect();
                let expected = bucket.params.iter().flat_map(|&param| whole[0][param].clone());
                for (got, want) in together.iter().zip(expected) {
                    assert!((got - want).abs() <= 1e-6 * want.abs().max(1e-3), "{got} for {want}, {world} ranks");
                    // Halves are exact, and two numbers have one sum.
                    assert!(world > 2 || got == &want, "{got} for {want}, {world} ranks");
                }
            }
        }
    }

    /// Two buckets' worth on a CPU, however many there are, and the same averages as with all of them.
    #[test]
    fn exchanges_of_many_buckets_hold_the_memory_of_two() {
        let grads = |buckets: &'static [&'static [usize]]| {
            ranks(3, LIMIT, move |group| {
                let model = Model::new();
                let lens: Vec<u64> = model.params.iter().map(|param| param.numel() as u64).collect();
                let buckets: Vec<Bucket> = buckets
                    .iter()
                    .map(|params| {
                        let len: u64 = params.iter().map(|&param| lens[param]).sum();
                        Bucket { params: params.to_vec(), chunk: len.div_ceil(3) }
                    })
                    .collect();
                let reducer = Reducer::sharded(&model.params, &group, &buckets).unwrap();
                let mut own = Vec::new();
                for _ in 0..2 {
                    reduce(&model, &reducer, &group, 2);
                    own.clear();
                    for (index, bucket) in buckets.iter().enumerate() {
                        let chunk = bucket.chunk as i64;
                        let begin = chunk * i64::from(group.rank().get());
                        own.push(bytes(&reducer.bucket(index).unwrap().narrow(0, begin, chunk)));
                    }
                    zero_gradients(&model.params).unwrap();
                }
                let sizes: Vec<u64> = buckets.iter().map(|bucket| 3 * 4 * bucket.chunk).collect();
                (own, sizes, reducer.most_held().unwrap())
            })
        };
        for (own, sizes, held) in grads(&[&[3], &[2], &[1], &[0]]) {
            let most = sizes.windows(2).map(|pair| pair[0] + pair[1]).max().unwrap();
            assert!(held <= most && held >= *sizes.iter().max().unwrap(), "{held} bytes held of {sizes:?}");
            assert!(own.iter().any(|chunk| chunk.iter().any(|&byte| byte != 0)));
        }
    }

    /// A leaf's two contributions, of two calls, are added up before the leaf's own gradient: as in one call.
    #[test]
    fn a_backward_pass_in_several_calls_has_the_bits_of_one() {
        let mut seen = Vec::new();
        for parts in [false, true] {
            seen.push(ranks(2, LIMIT, |group| {
                let (first, second) =
                    (noise(&[16, 8], 1).set_requires_grad(true), noise(&[8], 2).set_requires_grad(true));
                let params = [first.shallow_clone(), second.shallow_clone()];
                let reducer = Reducer::new(&params, &group, 64, 64).unwrap();
                for (number, last) in [(1, false), (2, false), (3, true)] {
                    let reduction = if last { Reduction::Average } else { Reduction::Accumulate };
                    let x = noise(&[4, 16], 10 * number + u64::from(group.rank().get()));
                    let hidden = x.matmul(&first).tanh();
                    // `first` is used at both ends.
                    let end = |hidden: &Tensor| (hidden * &second).matmul(&first.tr()).square().mean(Kind::Float);
                    if parts {
                        reducer.begin(reduction).unwrap();
                        let cut = hidden.detach().set_requires_grad(true);
                        let loss = end(&cut);
                        let grads = Tensor::run_backward(&[&loss], &[&cut, &first, &second], false, false);
                        backward_from(&[&second], &[&grads[2]]).unwrap();
                        backward_from(&[&hidden, &first], &[&grads[0], &grads[1]]).unwrap();
                        reducer.end(reduction).unwrap();
                    } else {
                        reducer.backward(&end(&hidden), reduction).unwrap();
                    }
                }
                gradients(&params).unwrap().iter().map(bytes).collect::<Vec<_>>()
            }));
        }
        assert!(seen[0] == seen[1]);
        assert!(seen[0][0].iter().any(|gradient| gradient.iter().any(|&byte| byte != 0)));
    }

    #[test]
    fn gradients_are_added_to_the_memory_that_is_named() {
        let leaf = noise(&[3, 2], 1).set_requires_grad(true);
        let memory = Tensor::ones([6], F32);
        place_gradient(&leaf, &memory.view([3, 2])).unwrap();
        leaf.sum(Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(&memory).unwrap(), [2.0; 6]);
        assert!(place_gradient(&leaf, &memory).is_err(), "other extents");
        assert!(place_gradient(&memory, &memory).is_err(), "no leaf");
        assert!(backward_from(&[&leaf], &[]).is_err());
    }

    fn reduce(model: &Model, reducer: &Reducer, group: &ProcessGroup, passes: i64) -> Vec<Tensor> {
        for (i, part) in share(1, group).chunk(passes, 0).iter().enumerate() {
            let last = i as i64 + 1 == passes;
            let reduction = if last { Reduction::Average } else { Reduction::Accumulate };
            reducer.backward(&(model.loss(part) / passes as f64), reduction).unwrap();
        }
        gradients(&model.params).unwrap()
    }

    #[test]
    fn buckets_that_do_not_hold_every_parameter_once_are_refused() {
        ranks(1, LIMIT, |group| {
            let model = Model::new();
            let refuse = |params: Vec<usize>, chunk| {
                assert!(Reducer::sharded(&model.params, &group, &[Bucket { params, chunk }]).is_err());
            };
            refuse(vec![0, 1, 2], 10_000);
            refuse(vec![0, 1, 2, 2], 10_000);
            refuse(vec![0, 1, 2, 4], 10_000);
            refuse(vec![0, 1, 2, 3], 10);
            refuse(vec![0, 1, 2, 3], u64::MAX);
            let plain = Reducer::new(&model.params, &group, BUCKETS.0, BUCKETS.1).unwrap();
            assert!(plain.bucket(0).is_err(), "not sharded");
        });
    }

    #[test]
    fn a_parameter_that_the_loss_forgets_is_an_error() {
        let results = ranks(2, LIMIT, |group| {
            let model = Model::new();
            let reducer = Reducer::new(&model.params, &group, BUCKETS.0, BUCKETS.1).unwrap();
            reducer.backward(&model.params[2].square().sum(Kind::Float), Reduction::Average)
        });
        for result in results {
            let text = result.unwrap_err().to_string();
            assert!(text.starts_with("backward pass: Expected to have finished reduction"), "{text}");
        }
    }

    #[test]
    fn a_peer_that_leaves_breaks_the_backward_pass() {
        let results = ranks(2, LIMIT, |group| {
            let model = Model::new();
            let reducer = Reducer::new(&model.params, &group, BUCKETS.0, BUCKETS.1).unwrap();
            if group.rank() == Rank(1) {
                return Ok(());
            }
            reducer.backward(&model.loss(&batch(1)), Reduction::Average)
        });
        assert!(matches!(results[0], Err(TorchError::Peer { .. })), "{results:?}");
    }

    #[test]
    fn the_reducer_keeps_what_it_needs_and_leaves_nothing_behind() {
        let model = Model::new();
        let reducer = {
            let store = Store::serve("127.0.0.1", 0, LIMIT).unwrap();
            let (rank, world) = (Rank(0), WorldSize(1));
            let group = ProcessGroup::new(Backend::Gloo, &store, "p", rank, world, LIMIT, Device::Cpu).unwrap();
            assert!(Reducer::new(&[], &group, 1, 1).is_err());
            assert!(Reducer::new(&[Tensor::zeros([1], F32)], &group, 1, 1).is_err(), "no gradient wanted");
            assert!(Reducer::new(&model.params, &group, 0, 1).is_err());
            Reducer::new(&model.params, &group, BUCKETS.0, BUCKETS.1).unwrap()
        };
        reducer.backward(&model.loss(&batch(1)), Reduction::Average).unwrap();
        let with = bytes(&model.params[0].grad());
        drop(reducer);
        zero_gradients(&model.params).unwrap();
        model.loss(&batch(1)).backward();
        assert_eq!(bytes(&model.params[0].grad()), with);
    }
}
