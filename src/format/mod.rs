//! The layout of tensors in files: the safetensors header, element types, and slices stored as tensors.
//!
//! All code that writes or reads such files builds on this: snapshots, workers, checkpoints, exports, model folders.

pub mod convert;
pub mod header;
pub mod slices;
