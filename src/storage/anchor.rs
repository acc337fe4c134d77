//! A folder on a disk, held open while it is written to, so that no write goes elsewhere.
//!
//! A disk that is unmounted leaves its mount point behind, an empty folder of the same name, in which a checkpoint
//! would seem durable. So the folder is held open, which keeps `umount` from taking it away (EBUSY), and before each
//! write its path is looked up: it must still lead to the held folder. That detects the cases that the kernel permits:
//! a lazy unmount, another file system mounted over it, and a folder that was moved or deleted. After a create, on
//! which others rely, it is looked up once more: it may have gone away in between.
//!
//! Nothing is stored. *Crash:* the kernel closes the held folder.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// A folder held open.
#[derive(Debug)]
pub(super) struct Anchor {
    folder: File,
    path: PathBuf,
}

/// The path no longer leads to the held folder.
#[derive(Debug, thiserror::Error)]
#[error("{path} is no longer the folder that it was: {how}")]
pub struct Adrift {
    path: String,
    how: &'static str,
}

#[cfg(test)]
impl Adrift {
    /// One, for tests of what follows from it.
    pub fn example() -> Self {
        Self { path: "/store".into(), how: "it is gone" }
    }
}

impl Anchor {
    /// Holds an existing folder open.
    pub(super) fn hold(path: &Path) -> io::Result<Self> {
        Ok(Self { folder: File::open(path)?, path: path.to_owned() })
    }

    /// Whether its path still leads to it. A path that can't be looked up for another reason proves nothing: the write
    /// itself will.
    pub(super) fn check(&self) -> Result<(), Adrift> {
        let Ok(held) = self.folder.metadata() else { return Ok(()) };
        let adrift = |how| Err(Adrift { path: self.path.display().to_string(), how });
        match fs::metadata(&self.path) {
            Ok(found) if found.dev() != held.dev() => adrift("a disk was unmounted, or another one mounted over it"),
            Ok(found) if found.ino() != held.ino() => adrift("another folder is in its place"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                adrift("it was deleted or moved, or its disk was unmounted")
            }
            Ok(_) | Err(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use object_store::local::LocalFileSystem;

    use super::*;
    use crate::{
        checkpoint::testing::STORAGE,
        error::{Error, Kind},
        storage::{
            Store,
            backend::{Backend, Large},
            faulty::{Fault, Faulty},
            retry::Policy,
        },
    };

    #[test]
    fn a_moved_deleted_or_replaced_folder_differs_from_the_held_one() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("run");
        fs::create_dir(&path).unwrap();
        let anchor = Anchor::hold(&path).unwrap();
        anchor.check().unwrap();
        fs::rename(&path, root.path().join("elsewhere")).unwrap();
        let text = anchor.check().unwrap_err().to_string();
        assert!(text.contains("/run is no longer") && text.contains("moved"), "{text}");
        fs::create_dir(&path).unwrap();
        assert!(anchor.check().unwrap_err().to_string().contains("another folder"));
        fs::remove_dir(&path).unwrap();
        fs::rename(root.path().join("elsewhere"), &path).unwrap();
        anchor.check().unwrap();
    }

    /// A write into a mount point would miss the store: no kind of write does that.
    #[tokio::test]
    async fn no_write_misses_a_held_folder() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(&format!("file://{}", root.path().display()), &STORAGE).unwrap().folder("run");
        store.put("first", Bytes::from_static(b"1")).await.unwrap();
        let held = store.hold().await.unwrap();
        store.folder("inner").put("second", Bytes::from_static(b"2")).await.unwrap();
        let path = root.path().join("run");
        fs::rename(&path, root.path().join("elsewhere")).unwrap();
        // The way an unmount leaves a mount point.
        for bare in [false, true] {
            if bare {
                fs::create_dir(&path).unwrap();
            }
            let body = || Bytes::from_static(b"3");
            let errors = [
                store.create("third", body()).await.unwrap_err(),
                store.put("third", body()).await.unwrap_err(),
                store.put_once("third", body(), std::time::Duration::MAX).await.unwrap_err(),
                store.upload("third", body(), |_| {}).await.unwrap_err(),
                store.folder("inner").put("third", body()).await.unwrap_err(),
                store.delete("first").await.unwrap_err(),
            ];
            for error in errors {
                let error = Error::from(error);
                assert_eq!(error.kind(), Kind::Unavailable);
                assert!(error.to_string().contains("is no longer the folder"), "{error}");
                assert!(error.hint().is_some_and(|hint| hint.contains("mount")), "{error:?}");
            }
            assert_eq!(path.exists(), bare);
        }
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
        assert_eq!(fs::read_dir(root.path().join("elsewhere")).unwrap().count(), 2);
        // Only while it is held.
        drop(held);
        store.put("third", Bytes::new()).await.unwrap();
    }

    /// The folder existed before the write, but not after it. The object may have been written elsewhere, so it is not
    /// reported as written.
    #[tokio::test]
    async fn a_create_is_not_reported_as_done_if_its_folder_goes_away() {
        for fault in [Fault::Pass, Fault::Denied] {
            let root = tempfile::tempdir().unwrap();
            let (path, elsewhere) = (root.path().join("run"), root.path().join("elsewhere"));
            fs::create_dir(&path).unwrap();
            let from = path.clone();
            let objects = Faulty::new(move |operation, _, _| {
                if operation != "create" {
                    return Fault::Pass;
                }
                fs::rename(&from, &elsewhere).unwrap();
                fault
            });
            let files = LocalFileSystem::new_with_prefix(root.path()).unwrap();
            let backend = Backend { objects, large: Large::File(files.into()), s3: None };
            let again = backend.clone();
            let reopen = Box::new(move || Ok(again.clone()));
            let store = Store::assemble(backend, "file://x".into(), String::new(), Policy::LOCAL, &STORAGE, reopen);
            let store = store.folder("run");
            let _held = store.hold().await.unwrap();
            let error = Error::from(store.create("record", Bytes::from_static(b"1")).await.unwrap_err());
            assert_eq!(error.kind(), Kind::Unavailable, "{error}");
            assert!(error.comes_of::<Adrift>(), "{error}");
        }
    }
}
