//! The training of one rank, apart from the process around it: state, steps, and how ranks share the work.
//!
//! The caller ([`crate::worker`]'s shell, or a test) says when a step begins, when the state is copied, and to whom the
//! results go:
//!
//! ```text
//! build      lesson (model, data) ──► strategy lays out the state ──► Built { state }         (no peers yet)
//! start      peers ──► Training
//! step k     forward_backward: batch → passes, gradients reduced behind the last    │ the state is still that of k-1
//!            update: norm → clip → optimizer → exchange of weights                  │ the state changes
//!            evaluate: held-out loss                                                │ the state is that of k
//! ```
//!
//! Nothing here knows the agent, the store or a socket.
//!
//! Bit-equality: with the same world size, threads and device kind, every step's numbers depend on the state and the
//! step alone. Sample order, learning rate and seeds are pure functions of the step; gradient buckets have one fixed
//! layout; the reductions of LibTorch are deterministic for a given number of threads.
//!
//! *Crash, error:* the state is useless afterwards; that of the newest checkpoint stands. *Retry:* none here; the agent
//! starts the group again. *Cancel:* between two steps, and in [`Training::evaluate`] between two passes.
#![doc = include_str!("README.md")]

mod activations;
mod batch;
mod lesson;
pub mod memory;
mod optim;
mod partition;
mod reader;
mod schedule;
pub mod state;
mod step;
pub mod strategy;
mod timing;

pub use self::{
    batch::Batches,
    lesson::{Language, Lesson, Own},
    step::{Built, HeldOut, Pass, Place, Training, Update},
    timing::{Part, Timer},
};
