//! What a machine knows about itself, and its requests to its cloud: metadata services and control planes.
//!
//! Metadata services are asked through [`metadata`], which trusts no answer: each is bounded in time and size. AWS's
//! control plane is asked through the AWS SDK with the credentials of its default chain; no other module but the
//! storage layer knows the SDK. Nothing here is stored, and nothing here starts or stops a machine unless its
//! documentation says so.
pub mod ami;
pub mod autoscaling;
pub mod aws;
pub mod azure;
mod call;
mod cgroup;
pub mod credentials;
pub mod direct;
pub mod gcp;
pub mod gpus;
pub mod hardware;
pub mod identity;
pub mod imds;
pub mod leave;
pub mod lifecycle;
pub mod metadata;
pub mod network;
pub mod permission;
pub mod power;
pub mod quota;
pub mod region;
pub mod registry;
pub mod routes;
pub mod scaling;
pub mod sns;
pub mod sqs;
pub mod ssm;
#[cfg(test)]
mod testing;
