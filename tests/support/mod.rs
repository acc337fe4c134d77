pub mod proxy;
pub mod s3;
