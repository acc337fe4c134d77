//! The parent on each node.
pub mod conductor;
