//! How commands open stores, and the asynchronous runtime for reading from them.

use std::{future::Future, path::PathBuf};

use crate::{
    config::{self, StorageConfig},
    error::{Error, Kind, Result},
    ids::RunId,
    report::human,
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

/// Names the store in a hint's commands on this run: as typed, they would look in the default one.
pub(super) fn in_hints(error: Error, run_id: &RunId, store: &str) -> Error {
    let Some(hint) = error.hint() else { return error };
    let named = format!("--run-id {run_id}");
    let mut parts = hint.split(&named);
    let mut text = parts.next().unwrap_or_default().to_owned();
    for rest in parts {
        text.push_str(&named);
        // A longer id is that of another run.
        let ends = !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_');
        if ends && !rest.starts_with(" --store") {
            text.push_str(&format!(" --store {}", human::shell(store)));
        }
        text.push_str(rest);
    }
    error.with_hint(text)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_of_a_hint_name_the_store() {
        let run_id: RunId = "b1".parse().unwrap();
        let hint = |text: &str| {
            let error = in_hints(Error::new(Kind::Data, "x").with_hint(text), &run_id, "file:///a b");
            error.hint().unwrap().to_owned()
        };
        for (before, after) in [
            (
                "`trainer status --run-id b1`, trainer resume --run-id b1 --from 7",
                "`trainer status --run-id b1 --store 'file:///a b'`, trainer resume --run-id b1 --store 'file:///a b' \
                 --from 7",
            ),
            ("trainer resume --run-id b1 --store s3://b", "trainer resume --run-id b1 --store s3://b"),
            ("trainer run CONFIG --run-id NEW", "trainer run CONFIG --run-id NEW"),
            ("trainer status --run-id b12", "trainer status --run-id b12"),
            ("none", "none"),
        ] {
            assert_eq!(hint(before), after);
        }
        assert_eq!(in_hints(Error::new(Kind::Data, "x"), &run_id, "s3://b").hint(), None);
    }
}
