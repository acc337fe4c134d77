//! How commands open stores, and the asynchronous runtime for reading from them.

use std::{future::Future, path::PathBuf};

use crate::{
    config::{self, StorageConfig},
    error::{Error, Kind, Result},
    storage::Store,
};

/// The store of runs if nothing says otherwise; `default.toml` has the same.
pub(super) const DEFAULT: &str = "file://./runs";
/// Limits of commands that read; a run's own limits are in its configuration.
pub(super) const LIMITS: StorageConfig = StorageConfig::plain(16, 16);

/// Opens an existing store by its URI or path. A relative path starts at the working directory. A folder that does not
/// exist is a mistake, not a store to create.
pub(super) fn open(uri: &str) -> Result<Store> {
    let uri = absolute(uri)?;
    if let Some(path) = config::local_path(&uri)
        && !path.is_dir()
    {
        return Err(Error::new(
            Kind::Config,
            format!("store {uri} does not exist: there is no folder {}", path.display()),
        )
        .with_hint("check --store and TRAINER_STORE"));
    }
    Ok(Store::open(&uri, &LIMITS)?)
}

/// A URI or path, made absolute.
pub(super) fn absolute(uri: &str) -> Result<String> {
    config::absolute_uri(uri, &working_directory()?)
        .map_err(|expected| Error::new(Kind::Config, format!("store {uri:?}: expected {expected}")))
}

pub(super) fn working_directory() -> Result<PathBuf> {
    std::env::current_dir().map_err(|error| Error::from_source(Kind::Config, error).context("find working directory"))
}

/// Runs `work` to its end.
pub(super) fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::from_source(Kind::Bug, error).context("start runtime"))?;
    runtime.block_on(work)
}
