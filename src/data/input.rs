//! The files that `trainer data prepare` reads.
//!
//! They are named by path, folder, glob or store URI; all are found before the first is read. They are sorted by name,
//! and each is taken once. Hidden files and folders are left out unless named, and so are files in the output folder.
//! [`super::scan`] finds the local ones.

use std::{
    cmp::Ordering,
    ffi::OsString,
    fs::Metadata,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::{DataError, scan::Scan};
use crate::{
    config::StorageConfig,
    storage::{StorageError, Store},
};

/// A file to read.
#[derive(Clone, Debug)]
pub(super) struct Input {
    /// Path or URI: for messages, and the order.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Where it is.
    pub place: Place,
    /// Whether it was named directly, not found in a folder or by a pattern.
    pub named: bool,
    /// What a local file was when it was found.
    pub stamp: Option<Stamp>,
}

/// By these a file shows that it was written to: its length, and when it was last changed, seconds and nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp(u64, i64, i64);

impl Stamp {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self(metadata.len(), metadata.mtime(), metadata.mtime_nsec())
    }
}

impl Input {
    /// Refuses a local file that was written to after it was found: its text is neither the old nor the new one.
    pub(super) fn unchanged(&self) -> Result<(), DataError> {
        let (Some(stamp), Place::Local(path)) = (self.stamp, &self.place) else { return Ok(()) };
        if std::fs::metadata(path).is_ok_and(|metadata| Stamp::of(&metadata) == stamp) {
            return Ok(());
        }
        let reason = "changed while it was read; start again when nothing writes to it".into();
        Err(DataError::Input { input: self.name.clone(), reason })
    }

    /// The last part of its name, for the recipe.
    pub(super) fn last_name(&self) -> String {
        match &self.place {
            // Bytes that are not UTF-8 count, too.
            Place::Local(path) if path.to_str().is_none() => format!("{:?}", path.file_name().unwrap_or_default()),
            _ => format!("{:?}", self.name.rsplit('/').next().unwrap_or_default()),
        }
    }
}

#[derive(Clone, Debug)]
pub(super) enum Place {
    Local(PathBuf),
    Remote {
        store: Store,
        key: String,
    },
    /// Can't be read, for this reason.
    Unreadable(String),
}

/// The path of a `file://` URI or of a plain path; `None` for other stores.
pub(super) fn local_path(uri: &str) -> Option<PathBuf> {
    match uri.split_once("://") {
        Some(("file", path)) => Some(PathBuf::from(path)),
        Some(_) => None,
        None => Some(PathBuf::from(uri)),
    }
}

pub(super) fn is_glob(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

pub(super) const MATCH: glob::MatchOptions =
    glob::MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };

/// Finds all inputs, sorted by name, each once. Files below `out` are left out: they are our own output.
pub(super) async fn find(
    specs: &[String],
    out: Option<&Path>,
    storage: &StorageConfig,
) -> Result<Vec<Input>, DataError> {
    let (mut remote, mut scan) = (Vec::new(), Scan::default());
    for spec in specs {
        let found = match local_path(spec) {
            Some(path) => scan.add(spec, &path, out)?,
            None => {
                let before = remote.len();
                find_remote(spec, storage, &mut remote).await?;
                remote.len() > before
            }
        };
        if !found {
            return Err(DataError::Input { input: spec.clone(), reason: "matches no file".into() });
        }
    }
    remote.sort_by(|a: &Input, b| a.name.cmp(&b.name));
    remote.dedup_by(|a, b| a.name == b.name);
    let mut inputs = scan.finish();
    inputs.append(&mut remote);
    inputs.sort_by(order);
    Ok(inputs)
}

/// The order of inputs. Two names may look the same, so the bytes decide.
pub(super) fn order(a: &Input, b: &Input) -> Ordering {
    let bytes = |input: &Input| {
        if let Place::Local(path) = &input.place { path.clone().into_os_string() } else { OsString::new() }
    };
    a.name.cmp(&b.name).then_with(|| bytes(a).cmp(&bytes(b)))
}

async fn find_remote(spec: &str, storage: &StorageConfig, inputs: &mut Vec<Input>) -> Result<(), DataError> {
    let failed = |source| DataError::Store { doing: "list", uri: spec.to_owned(), source };
    // The part before the first folder with a wildcard is listed; the rest is matched.
    let (base, pattern) = match spec.find(['*', '?', '[']) {
        Some(wildcard) => {
            let cut = spec[..wildcard].rfind('/').map_or(0, |slash| slash + 1);
            let pattern = glob::Pattern::new(&spec[cut..])
                .map_err(|error| DataError::Input { input: spec.to_owned(), reason: error.to_string() })?;
            (&spec[..cut], Some(pattern))
        }
        None => (spec, None),
    };
    let base = base.trim_end_matches('/');
    let store = Store::open(base, storage).map_err(failed)?;
    let objects = store.list("").await.map_err(failed)?;
    for object in objects {
        let hidden = object.key.split('/').any(|part| part.starts_with('.'));
        let wanted = pattern.as_ref().map_or(!hidden, |pattern| pattern.matches_with(&object.key, MATCH));
        if wanted {
            inputs.push(Input {
                name: format!("{base}/{}", object.key),
                bytes: object.size,
                place: Place::Remote { store: store.clone(), key: object.key },
                named: false,
                stamp: None,
            });
        }
    }
    // A single object: nothing is below it, but it is in its folder.
    if inputs.is_empty()
        && pattern.is_none()
        && let Some((folder, key)) = base.rsplit_once('/').filter(|(folder, _)| !folder.ends_with('/'))
    {
        let store = Store::open(folder, storage).map_err(failed)?;
        match store.head(key).await {
            Ok(object) => {
                let place = Place::Remote { store, key: key.to_owned() };
                inputs.push(Input { name: base.to_owned(), bytes: object.size, place, named: true, stamp: None });
            }
            Err(StorageError::NotFound { .. }) => {}
            Err(source) => return Err(DataError::Store { doing: "look for", uri: spec.to_owned(), source }),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Explain, Kind};

    const STORAGE: StorageConfig = StorageConfig::plain(4, 1);

    fn write(dir: &Path, name: &str, body: impl AsRef<[u8]>) {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, body).unwrap();
    }

    #[tokio::test]
    async fn inputs_are_found_by_path_folder_and_glob_in_one_order() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_str().unwrap();
        for name in [
            "b.rs",
            "a/x.rs",
            "a/y.txt",
            "a/deep/z.rs",
            ".git/objects/o.rs",
            "a/.hidden.rs",
            "out/train-00000.bin",
            "we[i]rd/w.rs",
        ] {
            write(dir.path(), name, name);
        }
        let out = dir.path().join("out");
        let find = async |specs: &[&str]| -> Result<Vec<String>, DataError> {
            let specs: Vec<String> = specs.iter().map(|spec| spec.replace('~', root)).collect();
            let found = super::find(&specs, Some(&out), &STORAGE).await?;
            assert!(found.iter().all(|input| input.bytes > 0));
            Ok(found.iter().map(|input| input.name.strip_prefix(root).unwrap()[1..].to_owned()).collect())
        };
        assert_eq!(find(&["~"]).await.unwrap(), ["a/deep/z.rs", "a/x.rs", "a/y.txt", "b.rs", "we[i]rd/w.rs"]);
        assert_eq!(find(&["file://~/"]).await.unwrap().len(), 5);
        assert_eq!(find(&["~/b.rs", "~/**/*.rs"]).await.unwrap(), ["a/deep/z.rs", "a/x.rs", "b.rs", "we[i]rd/w.rs"]);
        assert_eq!(find(&["~/a/*.rs"]).await.unwrap(), ["a/x.rs"]);
        assert_eq!(find(&["~/we[i]rd", "~/we[i]rd/w.rs"]).await.unwrap(), ["we[i]rd/w.rs"]);
        assert_eq!(find(&["~/a/.hidden.rs"]).await.unwrap(), ["a/.hidden.rs"]);
        for nothing in ["~/c.rs", "~/*.py", "~/out"] {
            let error = find(&[nothing]).await.unwrap_err();
            assert!(error.to_string().contains("matches no file"), "{error}");
            assert_eq!(error.kind(), Kind::Config);
        }
        assert!(find(&["~/a**b"]).await.unwrap_err().to_string().contains("a**b"));
    }
}
