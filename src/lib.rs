//! `trainer`: trains LibTorch models on machines that may vanish.
//!
//! ```text
//!              ┌───────────────────────── one node ─────────────────────────┐
//!  notices ──► │ agent (tokio; no LibTorch in its work)                     │
//!  (IMDS, GCP, │   event loop · policy · heartbeats · uploads · journal     │ ◄──► object store
//!   Azure, OS) │      ▲ control socket        ▲ snapshot images (memfd)     │
//!              │      ▼                       │                             │
//!              │ worker 0 … worker N-1  (one per GPU; synchronous; LibTorch)│ ◄──► workers of other nodes
//!              └────────────────────────────────────────────────────────────┘      (c10d: NCCL or Gloo)
//! ```
//!
//! The modules stand in the order in which data flows, and imports point down this list only: a test compares this
//! file's `pub mod` lines with every `use crate::` line.
//!
//! A program with a model of its own is built on this library: see [`task`].
#![warn(missing_docs)]

/// LibTorch in Rust, in the version that this library is built with: a task's tensors are of its types.
pub use tch;

pub use crate::cli::main_of as main;

pub mod cli;
pub mod doctor;
pub mod queue;
pub mod boot;
pub mod alerts;
pub mod run;
pub mod agent;
pub mod rendezvous;
pub mod workload;
pub mod worker;
pub mod train;
pub mod protocol;
pub mod task;
pub mod model;
pub mod data;
pub mod notice;
pub mod snapshot;
pub mod page;
pub mod history;
pub mod goodput;
pub mod checkpoint;
pub mod journal;
pub mod metrics;
pub mod format;
pub mod torch;
pub mod storage;
pub mod cloud;
pub mod report;
pub mod config;
pub mod layout;
pub mod error;
pub mod ids;
pub mod shortage;
pub mod random;
pub mod faults;
pub mod threads;
pub mod env;
