//! The child, one per device.
pub mod gate;
