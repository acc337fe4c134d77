//! How tensors lie in files: the safetensors header, and slices as tensors of their own.
//!
//! Below everything that writes or reads such files: snapshots, workers, checkpoints, exports, model folders.

pub mod header;
pub mod slices;
