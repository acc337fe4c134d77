//! Shared by the tests. `s3` and `moto` depend on nothing else here, since other crates include them, too.
pub mod job_api;
pub mod garble;
pub mod lab;
pub mod memory;
pub mod metadata;
pub mod moto;
pub mod mounts;
pub mod proxy;
pub mod s3;
pub mod samples;
pub mod search;
pub mod trainer;
