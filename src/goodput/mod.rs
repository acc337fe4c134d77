//! The cost of vanishing machines: the expected goodput, before any money is spent.
//!
//! Goodput is the training time that counts, divided by the time that is paid for. It is computed in two ways, which
//! tests compare: `model` gives it in closed form for a fixed interval between saves, `replay` simulates lives of
//! machines one after the other with the saves of this program in them, random lives ([`Gang`]) or recorded ones
//! ([`Trace`]). `observed` reads the costs of saves and restarts from a run's journal.
//!
//! Both assume: saves are asynchronous (training stops for the stall and continues while the state is uploaded; the
//! save counts only once it is durable), one is in flight at a time, and a restart is dead time. After a notice long
//! enough for a save, training continues until twice the time of a save is left, then everything is saved; the machine
//! is paid for until it is taken. Waiting for a machine costs wall time and, on a run of several nodes, the idle ones'
//! money. Steps are assumed to be short: the part of the running step lost in a kill is not counted. All times are
//! seconds.
//!
//! Nothing is stored, and every function returns the same answer for the same input and seed.
#![doc = include_str!("README.md")]
mod elastic;
mod model;
mod observed;
mod replay;
mod trace;

pub use elastic::{Elastic, Fleet, simulate_elastic};
pub use model::{Costs, LEAST_RESERVE_S, Lives, Notice, best_interval, goodput};
pub use observed::{Observed, credible_s};
pub use replay::{Estimate, Gang, Job, Machines, Seen, Span, Unfinished, simulate};
pub use trace::{Trace, TraceError};
