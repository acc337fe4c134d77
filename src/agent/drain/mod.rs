//! What is done about a notice: what was announced, what can still be saved before the machine goes, and how long it
//! takes.

pub mod estimate;
pub mod plan;
pub mod timeline;
