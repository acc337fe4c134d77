//! The layout of tensors in files: the safetensors header, element types, and slices stored as tensors. And the pages
//! of Parquet files.
//!
//! All code that writes or reads such files builds on this: snapshots, workers, checkpoints, exports, model folders,
//! datasets, metrics.

pub mod convert;
pub mod header;
pub mod pages;
pub mod slices;
