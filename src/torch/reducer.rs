//! Gradients averaged over the ranks while the backward pass still runs, by the engine of PyTorch's DDP.
//!
//! Invariants, on which bit-equality across a resume rests:
//! - Which gradient lies where in which bucket follows from the list of parameters and the two sizes alone (reverse
//!   order of the list), and never changes. A ring sums each element in an order that depends on its place in its bucket.
//! - Gradients lie in the buckets from the first step on, so the first step after a resume divides as every other one.
//! - Gradients are set to zero in place ([`zero_gradients`]), never removed: a removed one would leave its bucket.

use std::ptr;

use tch::Tensor;

use super::{
    ProcessGroup, Result, TorchError,
    ffi::{self, check},
};

/// What a backward pass does with the gradients it has added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Keeps them local: more micro-batches of this step follow.
    Accumulate,
    /// Averages what has been added up over the ranks: the last micro-batch.
    Average,
}

/// Averages the gradients of a list of parameters over the ranks of a group, bucket by bucket, behind the backward pass.
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

    /// Runs the backward pass of `loss`, adding to the gradients.
    ///
    /// With [`Reduction::Average`] every gradient is, on return, the sum over this step's passes, averaged over the
    /// ranks; the loss must then depend on every parameter, which is checked. All ranks must average together. After an
    /// error the gradients are undefined and the reducer is of no more use.
    pub fn backward(&self, loss: &Tensor, reduction: Reduction) -> Result<()> {
        let reduce = (reduction == Reduction::Average).into();
        // SAFETY: both are alive for the call.
        check("backward pass", unsafe { ffi::trn_reducer_backward(self.handle, ffi::raw(loss), reduce) })
    }
}

impl Drop for Reducer {
    fn drop(&mut self) {
        // SAFETY: made by the shim and freed once; it takes its hooks off the parameters.
        unsafe { ffi::trn_reducer_free(self.handle) };
    }
}

/// Sets every parameter's gradient to zero in place; makes one where there is none.
pub fn zero_gradients(params: &[Tensor]) -> Result<()> {
    let raws = ffi::raws(params);
    // SAFETY: the tensors are alive for the call.
    check("zero gradients", unsafe { ffi::trn_zero_gradients(raws.as_ptr(), raws.len()) })
}

/// The parameters' gradients, which share their memory: with a [`Reducer`], or after [`zero_gradients`], they can be
/// asked for once and used in every step. An error if a parameter has none.
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
