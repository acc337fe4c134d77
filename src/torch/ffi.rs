//! The shim's C ABI (`shim/*.cpp`), and the conversion of a status into a [`TorchError`].

use std::ffi::{CStr, CString, c_char, c_void};

use tch::{Device, Tensor};

use super::{DeviceMemory, Result, TorchError};

/// An `at::Tensor`, the pointee of a [`Tensor`].
#[repr(C)]
pub(super) struct AtTensor {
    _opaque: [u8; 0],
}

macro_rules! opaque {
    ($($name:ident),*) => { $(
        #[repr(C)]
        pub(super) struct $name {
            _opaque: [u8; 0],
        }
    )* };
}
opaque!(
    StoreHandle,
    GroupHandle,
    PendingHandle,
    ReducingHandle,
    ReducerHandle,
    MarkHandle,
    ClockHandle,
    ReadbackHandle,
    CompilerHandle,
    CompiledHandle
);

#[repr(C)]
pub(super) struct Facts {
    pub data: *const c_void,
    pub bytes: u64,
    pub device: i32,
    pub contiguous: i32,
}

/// One run of memory to copy.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub source: *const u8,
    pub target: *mut u8,
    pub bytes: u64,
}

unsafe extern "C" {
    fn trn_last_error() -> *const c_char;

    pub(super) fn trn_release_signals();

    pub(super) fn trn_tensor_facts(tensor: *const AtTensor, out: *mut Facts) -> i32;
    pub(super) fn trn_tensor_load(tensor: *const AtTensor, source: *const c_void, bytes: u64) -> i32;
    pub(super) fn trn_tensor_store(tensor: *const AtTensor, target: *mut c_void, bytes: u64) -> i32;
    pub(super) fn trn_adamw_step(
        count: usize,
        params: *const *const AtTensor,
        grads: *const *const AtTensor,
        exp_avgs: *const *const AtTensor,
        exp_avg_sqs: *const *const AtTensor,
        step: u64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        weight_decay: f64,
        grad_scale: *const AtTensor,
    ) -> i32;
    pub(super) fn trn_row_sums(words: *const AtTensor, numbers: *const AtTensor, out: *mut *mut AtTensor) -> i32;
    pub(super) fn trn_norm(tensors: *const *const AtTensor, count: usize, out: *mut *mut AtTensor) -> i32;
    pub(super) fn trn_zero_gradients(params: *const *const AtTensor, count: usize) -> i32;
    pub(super) fn trn_gradient(param: *const AtTensor, out: *mut *mut AtTensor) -> i32;
    pub(super) fn trn_copy_at_use(leaf: *const AtTensor, copy: *const AtTensor, out: *mut *mut AtTensor) -> i32;
    pub(super) fn trn_copy_lookup(
        leaf: *const AtTensor,
        copy: *const AtTensor,
        tokens: *const AtTensor,
        out: *mut *mut AtTensor,
    ) -> i32;
    pub(super) fn trn_with_gradients(
        loss: *const AtTensor,
        hidden: *const AtTensor,
        hidden_gradient: *const AtTensor,
        leaf: *const AtTensor,
        leaf_gradient: *const AtTensor,
        divisor: f64,
        direct: i32,
        out: *mut *mut AtTensor,
    ) -> i32;
    pub(super) fn trn_fused_levels(out: *mut u64) -> i32;
    pub(super) fn trn_fused_use_level(level: u64) -> i32;
    pub(super) fn trn_fused_rms_norm(
        x: *const AtTensor,
        weight: *const AtTensor,
        eps: f64,
        plus_one: i32,
        out: *mut *mut AtTensor,
    ) -> i32;
    pub(super) fn trn_fused_rotate(
        x: *const AtTensor,
        cos: *const AtTensor,
        sin: *const AtTensor,
        out: *mut *mut AtTensor,
    ) -> i32;
    pub(super) fn trn_fused_gate(gate: *const AtTensor, up: *const AtTensor, act: i32, out: *mut *mut AtTensor) -> i32;
    pub(super) fn trn_fused_linear(
        x: *const AtTensor,
        leaf: *const AtTensor,
        values: *const AtTensor,
        bias: *const AtTensor,
        out: *mut *mut AtTensor,
    ) -> i32;
    pub(super) fn trn_fused_cross_entropy(
        scores: *const AtTensor,
        targets: *const AtTensor,
        gradient: i32,
        out: *mut *mut AtTensor,
    ) -> i32;
    pub(super) fn trn_gpu_driver(version: *mut i32) -> i32;
    pub(super) fn trn_gpu_load(device: i32, image: *const c_void) -> i32;
    #[cfg(test)]
    pub(super) fn trn_gpu_emulate(on: i32) -> i32;
    #[cfg(test)]
    pub(super) fn trn_gpu_emulated(all: *mut u64, done: *mut u64) -> i32;
    pub(super) fn trn_nvrtc_open(library: *const c_char, version: *mut i32, out: *mut *mut CompilerHandle) -> i32;
    pub(super) fn trn_nvrtc_free(compiler: *mut CompilerHandle) -> i32;
    pub(super) fn trn_nvrtc_compile(
        compiler: *const CompilerHandle,
        source: *const c_char,
        options: *const *const c_char,
        count: i32,
        out: *mut *mut CompiledHandle,
    ) -> i32;
    pub(super) fn trn_compiled_parts(
        compiled: *const CompiledHandle,
        image: *mut *const c_char,
        image_bytes: *mut usize,
        log: *mut *const c_char,
        log_bytes: *mut usize,
    ) -> i32;
    pub(super) fn trn_compiled_free(compiled: *mut CompiledHandle) -> i32;
    pub(super) fn trn_set_num_threads(threads: i32) -> i32;
    pub(super) fn trn_set_interop_threads(threads: i32) -> i32;
    pub(super) fn trn_set_deterministic(on: i32) -> i32;
    pub(super) fn trn_manual_seed(seed: u64) -> i32;
    pub(super) fn trn_rng_state(device: i32, out: *mut *mut AtTensor) -> i32;
    pub(super) fn trn_set_rng_state(device: i32, state: *const AtTensor) -> i32;

    pub(super) fn trn_store_serve(
        host: *const c_char,
        port: u16,
        listener: i32,
        timeout_ms: i64,
        out: *mut *mut StoreHandle,
    ) -> i32;
    pub(super) fn trn_store_connect(host: *const c_char, port: u16, timeout_ms: i64, out: *mut *mut StoreHandle)
    -> i32;
    pub(super) fn trn_store_free(store: *mut StoreHandle) -> i32;
    pub(super) fn trn_group_new(
        nccl: i32,
        store: *const StoreHandle,
        prefix: *const c_char,
        address: *const c_char,
        rank: i32,
        size: i32,
        timeout_ms: i64,
        device: i32,
        out: *mut *mut GroupHandle,
    ) -> i32;
    #[cfg(test)]
    pub(super) fn trn_group_share(group: *const GroupHandle, out: *mut *mut GroupHandle) -> i32;
    #[cfg(test)]
    pub(super) fn trn_group_begun(group: *const GroupHandle, out: *mut u64) -> i32;
    pub(super) fn trn_group_set_timeout(group: *const GroupHandle, timeout_ms: i64) -> i32;
    pub(super) fn trn_group_free(group: *mut GroupHandle) -> i32;
    pub(super) fn trn_group_all_reduce_sum(group: *const GroupHandle, tensor: *const AtTensor) -> i32;
    pub(super) fn trn_group_broadcast(group: *const GroupHandle, tensor: *const AtTensor, root: i32) -> i32;
    pub(super) fn trn_group_barrier(group: *const GroupHandle) -> i32;
    pub(super) fn trn_group_all_gather(
        group: *const GroupHandle,
        flat: *const AtTensor,
        own: *const AtTensor,
        out: *mut *mut PendingHandle,
    ) -> i32;
    pub(super) fn trn_group_reduce_scatter(
        group: *const GroupHandle,
        flat: *const AtTensor,
        into: *const AtTensor,
        out: *mut *mut ReducingHandle,
    ) -> i32;
    pub(super) fn trn_reducing_finish(reducing: *mut ReducingHandle) -> i32;
    pub(super) fn trn_reducing_free(reducing: *mut ReducingHandle) -> i32;
    pub(super) fn trn_pending_wait(pending: *const PendingHandle) -> i32;
    pub(super) fn trn_pending_free(pending: *mut PendingHandle) -> i32;
    pub(super) fn trn_group_abort(group: *const GroupHandle) -> i32;
    pub(super) fn trn_reducer_new(
        params: *const *const AtTensor,
        count: usize,
        group: *const GroupHandle,
        first_bucket_bytes: i64,
        bucket_bytes: i64,
        out: *mut *mut ReducerHandle,
    ) -> i32;
    pub(super) fn trn_reducer_new_sharded(
        params: *const *const AtTensor,
        count: usize,
        group: *const GroupHandle,
        indices: *const u64,
        lengths: *const u64,
        chunks: *const i64,
        bucket_count: usize,
        out: *mut *mut ReducerHandle,
    ) -> i32;
    pub(super) fn trn_reducer_bucket(reducer: *const ReducerHandle, index: usize, out: *mut *mut AtTensor) -> i32;
    pub(super) fn trn_reducer_free(reducer: *mut ReducerHandle) -> i32;
    pub(super) fn trn_reducer_begin(reducer: *mut ReducerHandle) -> i32;
    pub(super) fn trn_reducer_end(reducer: *mut ReducerHandle) -> i32;
    pub(super) fn trn_reducer_most_held(reducer: *const ReducerHandle, out: *mut u64) -> i32;
    pub(super) fn trn_backward_from(
        outputs: *const *const AtTensor,
        gradients: *const *const AtTensor,
        count: usize,
    ) -> i32;
    pub(super) fn trn_place_gradient(leaf: *const AtTensor, memory: *const AtTensor) -> i32;

    pub(super) fn trn_device_count(out: *mut i32) -> i32;
    pub(super) fn trn_use_device(index: i32) -> i32;
    pub(super) fn trn_mark(device: i32, out: *mut *mut MarkHandle) -> i32;
    pub(super) fn trn_mark_free(mark: *mut MarkHandle) -> i32;
    pub(super) fn trn_copy_after(mark: *mut MarkHandle, runs: *const Run, count: usize) -> i32;
    pub(super) fn trn_copy_wait(mark: *const MarkHandle) -> i32;
    pub(super) fn trn_copy_hold(mark: *mut MarkHandle) -> i32;
    pub(super) fn trn_clock_new(device: i32, count: usize, out: *mut *mut ClockHandle) -> i32;
    pub(super) fn trn_clock_free(clock: *mut ClockHandle) -> i32;
    pub(super) fn trn_clock_mark(clock: *mut ClockHandle, index: usize) -> i32;
    pub(super) fn trn_clock_seconds(clock: *const ClockHandle, from: usize, to: usize, out: *mut f64) -> i32;
    pub(super) fn trn_clock_follow(clock: *mut ClockHandle, leaves: *const *const AtTensor, count: usize) -> i32;
    pub(super) fn trn_clock_watch(clock: *mut ClockHandle, index: usize) -> i32;
    pub(super) fn trn_clock_noted(clock: *const ClockHandle, out: *mut i32) -> i32;
    pub(super) fn trn_forbid_waits(on: i32) -> i32;
    #[cfg(test)]
    pub(super) fn trn_count_memory() -> i32;
    #[cfg(test)]
    pub(super) fn trn_counted_memory(now: *mut u64, peak: *mut u64, again: i32) -> i32;
    pub(super) fn trn_device_memory(index: i32, out: *mut DeviceMemory) -> i32;
    pub(super) fn trn_device_name(index: i32, name: *mut c_char, room: usize, capability: *mut i32) -> i32;
    pub(super) fn trn_readback_new(device: i32, count: usize, out: *mut *mut ReadbackHandle) -> i32;
    pub(super) fn trn_readback_free(readback: *mut ReadbackHandle) -> i32;
    pub(super) fn trn_readback_start(
        readback: *mut ReadbackHandle,
        scalars: *const *const AtTensor,
        count: usize,
    ) -> i32;
    pub(super) fn trn_readback_wait(readback: *const ReadbackHandle, out: *mut f64, count: usize) -> i32;
    pub(super) fn trn_pinned(tensor: *const AtTensor, out: *mut *mut AtTensor) -> i32;
    pub(super) fn trn_upload(tensor: *const AtTensor, device: i32, out: *mut *mut AtTensor) -> i32;
    pub(super) fn trn_pin(memory: *mut c_void, bytes: u64) -> i32;
    pub(super) fn trn_unpin(memory: *mut c_void) -> i32;
}

/// Turns a shim function's status into a result. Call it right after the function, on the same thread.
pub(super) fn check(doing: &'static str, status: i32) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: the text is a NUL-terminated thread-local of the shim; it is copied before this thread calls the shim
    // again.
    let message = unsafe { CStr::from_ptr(trn_last_error()) }.to_string_lossy().trim().to_owned();
    Err(match status {
        2 => TorchError::Peer { doing, message },
        3 => TorchError::OutOfMemory { doing, message },
        _ => TorchError::refused(doing, message),
    })
}

/// The tensor in the shim's form; valid as long as `tensor`.
pub(super) fn raw(tensor: &Tensor) -> *const AtTensor {
    tensor.as_ptr().cast()
}

/// Tensors in the shim's form; valid as long as `tensors`.
pub(super) fn raws(tensors: &[Tensor]) -> Vec<*const AtTensor> {
    tensors.iter().map(raw).collect()
}

/// Takes over a tensor made by a shim function.
///
/// # Safety
/// `tensor` was written by a shim function that returned success, and no other code frees it.
pub(super) unsafe fn adopt(tensor: *mut AtTensor) -> Tensor {
    // SAFETY: the shim made it with `new at::Tensor`, which is what `tch` frees it with.
    unsafe { Tensor::from_ptr(tensor.cast()) }
}

/// The shim's number of a device.
pub(super) fn device_index(device: Device) -> Result<i32> {
    match device {
        Device::Cpu => Ok(-1),
        Device::Cuda(index) => i32::try_from(index).map_err(|_| TorchError::Device(device)),
        Device::Mps | Device::Vulkan => Err(TorchError::Device(device)),
    }
}

/// `text` for C.
pub(super) fn c_text(doing: &'static str, text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| TorchError::Refused { doing, message: format!("{text:?} has a NUL in it") })
}

/// The tensor's size, place and device.
pub(super) fn facts(doing: &'static str, tensor: &Tensor) -> Result<Facts> {
    let mut facts = Facts { data: std::ptr::null(), bytes: 0, device: -1, contiguous: 0 };
    // SAFETY: both pointers are valid for the call; the shim checks that the tensor is defined and dense.
    check(doing, unsafe { trn_tensor_facts(raw(tensor), &mut facts) })?;
    if facts.contiguous == 0 {
        return Err(TorchError::NotContiguous { doing });
    }
    Ok(facts)
}
