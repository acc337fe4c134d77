//! The response to a notice: what was announced, what can still be saved before the machine goes, and how long that
//! takes.

pub mod estimate;
pub mod plan;
pub mod timeline;
