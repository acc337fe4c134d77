//! The response to a notice: what was announced (`timeline`), what can still be saved before the machine goes (`plan`),
//! and how long that takes (`estimate`).
//!
//! Values and decisions without I/O. Nothing is stored here: the timeline becomes a part of the generation's last
//! record.
//! *Crash:* a drain that was under way is forgotten; the journal keeps what was committed. *Retry:* every notice, and
//! every tick while a notice stands, decides anew. *Cancel:* a drain that has begun is never taken back.

pub mod estimate;
pub mod plan;
pub mod timeline;
