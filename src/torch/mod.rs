//! LibTorch beyond what `tch` offers: process groups, the gradient reducer, the fused optimizer, random number state,
//! raw bytes of tensors, and copies to the host behind the compute.
//!
//! A C++ shim (`shim/`) holds the calls; this is its safe face, and with `snapshot/image.rs` the only place that may
//! use `unsafe`. No C++ exception gets through: the shim catches it, and it arrives here as a [`TorchError`]. Nothing
//! here is async or polls.
//!
//! One source, two flavours, chosen by the LibTorch folder (see `build.rs`): with `libtorch_cuda.so` the crate is built
//! with CUDA and NCCL and `cfg(torch_cuda)` is set; otherwise it runs on the CPU, and a request for a GPU gets an error
//! that says so.
//!
//! After a crash nothing here outlives the process. A peer that dies breaks its Gloo connections, and the others'
//! collectives fail at once with [`TorchError::Peer`]; if a peer hangs, they fail at the time limit given to
//! [`ProcessGroup::new`]. After either, the group and the reducer are unusable: exit and start again. NCCL's watchdog
//! ends the process when a collective exceeds its time limit.

mod bytes;
mod clock;
mod copier;
mod copies;
mod ffi;
pub mod fused;
mod gpu;
mod group;
#[cfg(test)]
pub(crate) mod memory;
mod optim;
mod reducer;
mod runtime;
mod signals;
mod transfer;
mod words;

use crate::{
    error::{Explain, Kind},
    shortage::is_out_of_memory,
};

pub use bytes::{Mapped, Pinned, byte_len, load_bytes, store_bytes};
pub use clock::{Clock, DeviceKind, DeviceMemory, device_kind, device_memory, forbid_waits};
pub use copier::{Copied, CopyJob, CopyTicket, HostCopier};
pub use copies::{Known, bare_leaf, copy_at_use, copy_lookup, leaf_like, with_gradients};
#[cfg(test)]
pub(crate) use group::tests::{LIMIT, ranks};
pub use group::{Backend, Pending, ProcessGroup, Reducing, Store};
pub use optim::{AdamW, Moments, adamw_step, grad_norm};
pub use reducer::{Bucket, Reducer, Reduction, backward_from, gradients, place_gradient, zero_gradients};
pub use runtime::{
    device_count, manual_seed, pick_device, rng_state, set_deterministic, set_interop_threads, set_num_threads,
    set_rng_state,
};
pub use signals::release_signals;
pub use transfer::{Readback, pinned, telling, upload};
pub use words::row_sums;

/// Shorthand for this module's results.
pub type Result<T, E = TorchError> = std::result::Result<T, E>;

/// The result of one of tch's own functions, as ours.
pub fn tch_result<T>(doing: &'static str, result: std::result::Result<T, tch::TchError>) -> Result<T> {
    result.map_err(|error| TorchError::refused(doing, error.to_string()))
}

/// The value of a tensor of one element; waits for the device.
pub fn to_f64(tensor: &tch::Tensor) -> Result<f64> {
    tch_result("read number", tensor.f_double_value(&[]))
}

/// Why a request to LibTorch failed.
#[derive(Debug, thiserror::Error)]
pub enum TorchError {
    /// LibTorch refused: extents, types or states that do not fit together.
    #[error("{doing}: {message}")]
    Refused {
        /// The operation.
        doing: &'static str,
        /// LibTorch's message.
        message: String,
    },
    /// A peer is gone or silent, or the network fails.
    #[error("{doing}: {message}")]
    Peer {
        /// The operation.
        doing: &'static str,
        /// LibTorch's message.
        message: String,
    },
    /// Memory ran out, on the host or on the device.
    #[error("{doing}: {message}")]
    OutOfMemory {
        /// The operation.
        doing: &'static str,
        /// LibTorch's message.
        message: String,
    },
    /// A tensor's elements are not contiguous in memory.
    #[error("{doing}: the tensor is not contiguous")]
    NotContiguous {
        /// The operation.
        doing: &'static str,
    },
    /// The number of bytes given differs from the tensor's.
    #[error("{doing}: the tensor has {tensor} bytes, {given} were given")]
    Length {
        /// The operation.
        doing: &'static str,
        /// Bytes of the tensor.
        tensor: u64,
        /// Bytes given.
        given: u64,
    },
    /// Two copies would write the same byte, or one would write past the end of its destination.
    #[error(
        "copy to host: bytes {offset}..{offset}+{len} overlap another copy or leave the destination of {size} bytes"
    )]
    Range {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Bytes of the destination.
        size: u64,
    },
    /// Tensors that belong together are on different devices.
    #[error("{doing}: tensors lie on different devices")]
    MixedDevices {
        /// The operation.
        doing: &'static str,
    },
    /// Lists that belong together have different lengths.
    #[error("{doing}: the lists have different lengths")]
    Lists {
        /// The operation.
        doing: &'static str,
    },
    /// A number outside the range that LibTorch accepts.
    #[error("{doing}: {what} is out of range")]
    Number {
        /// The operation.
        doing: &'static str,
        /// The number's name.
        what: &'static str,
    },
    /// A device of a kind that is not supported.
    #[error("{0:?} is not supported: neither the CPU nor a CUDA device")]
    Device(tch::Device),
    /// NCCL was requested for tensors on the CPU, or in a program built without CUDA.
    #[error("NCCL works between GPUs, in a program that is built with CUDA")]
    NoNccl,
    /// More workers than GPUs.
    #[error("worker {local_rank} of this node has no GPU: there are {devices}")]
    NoDevice {
        /// The worker's rank on its node.
        local_rank: u32,
        /// GPUs of the node.
        devices: u32,
    },
    /// An address that is invalid, or that cannot be listened on.
    #[error("{doing} {host}")]
    Address {
        /// The operation.
        doing: &'static str,
        /// The host.
        host: String,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// A thread could not be started.
    #[error("start copy thread")]
    Thread(#[source] std::io::Error),
    /// The callback of a copy panicked; the bytes were copied.
    #[error("the callback of a copy to the host panicked")]
    Callback,
}

impl TorchError {
    /// An error with LibTorch's message.
    pub(crate) fn refused(doing: &'static str, message: String) -> Self {
        if is_out_of_memory(&message) { Self::OutOfMemory { doing, message } } else { Self::Refused { doing, message } }
    }
}

impl Explain for TorchError {
    fn kind(&self) -> Kind {
        match self {
            Self::Peer { .. } | Self::Address { .. } => Kind::Unavailable,
            Self::OutOfMemory { .. } | Self::NoNccl | Self::NoDevice { .. } | Self::Device(_) => Kind::Config,
            Self::Refused { .. }
            | Self::NotContiguous { .. }
            | Self::Length { .. }
            | Self::Range { .. }
            | Self::MixedDevices { .. }
            | Self::Lists { .. }
            | Self::Number { .. }
            | Self::Thread(_)
            | Self::Callback => Kind::Bug,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::OutOfMemory { .. } => Some("lower train.max_micro_batch: --set train.max_micro_batch=N".into()),
            Self::NoNccl => Some("run scripts/setup --cuda and build again".into()),
            Self::NoDevice { .. } => Some("start at most one worker a GPU (--nproc-per-node)".into()),
            Self::Address { .. } => Some(
                "the address must be this machine's, of an interface that is up: `ip addr` shows them, `ip link set lo \
                up` sets up loopback"
                    .into(),
            ),
            _ => None,
        }
    }
}
