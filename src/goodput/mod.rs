//! What machines that vanish cost: expected goodput, before any money is spent.
//!
//! Goodput is training time that counts over time that is paid. It is found twice, and the two are held together by
//! tests: `model` sums it up in closed form for a fixed interval between saves, `replay` plays lives of machines one
//! after the other with the saves of this program in them, random lives ([`Gang`]) or recorded ones ([`Trace`]).
//! `observed` reads the costs of saves and restarts from a run's journal.
//!
//! What is assumed, by both: saves are asynchronous (training stands still for the stall, goes on while the state is
//! uploaded, and the save counts only once it is durable), one is in flight at a time, and nothing is done in the time
//! that a restart takes. After a notice into which a save fits training goes on until twice the time of a save is left,
//! then all of it is saved; the machine is paid for until it is taken. Waiting for a machine costs wall time and, on a
//! run of several nodes, the idle ones' money. Steps are taken to be short: what a kill loses of the running step is
//! not counted. All times are seconds.
//!
//! Nothing is stored, and every function gives the same answer for the same input and seed.
#![doc = include_str!("README.md")]
mod model;
mod observed;
mod replay;
mod trace;

pub use model::{Costs, LEAST_RESERVE_S, Lives, Notice, best_interval, goodput};
pub use observed::Observed;
pub use replay::{Estimate, Gang, Job, Machines, Seen, Span, Unfinished, simulate};
pub use trace::{Trace, TraceError};
