//! What the tests lean on. `s3` stands alone: the benchmarks include it too.
pub mod lab;
pub mod memory;
pub mod proxy;
pub mod s3;
pub mod samples;
pub mod trainer;
