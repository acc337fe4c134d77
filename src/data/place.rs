//! Folders on this machine that no other user can write to.
//!
//! All fetched files are verified against checksums; but another user's folder could still be changed afterwards, or
//! redirect a write by a link. So a folder is accepted only if it is no link, belongs to the user of this process, and
//! is writable for that user alone; files in it are opened without following links. If there is no such folder, one is
//! created for this process alone below the temporary one. It disappears with the process; the leftover of a kill is
//! removed by the next process that creates such a folder.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use rustix::{
    fs::{FlockOperation, OFlags, flock},
    process::geteuid,
};

use super::DataError;
use crate::ids::random_hex;

const PRIVATE_PREFIX: &str = "trainer-data-";

/// Creates a folder, and those above it, for this user alone.
pub(super) fn make(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// Flags for files that are no links.
pub(super) fn no_link() -> OpenOptions {
    let mut options = File::options();
    options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
    options
}

/// Whether `dir` is a folder of this user that no other user can write to. If only its mode is too open, the mode is
/// corrected.
///
/// # Errors
/// With the reason why not.
pub(super) fn is_ours(dir: &Path) -> io::Result<()> {
    let refused = |reason: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
    let found = std::fs::symlink_metadata(dir)?;
    if !found.is_dir() {
        return refused(format!("{} is a link, or no folder", dir.display()));
    }
    let own = geteuid().as_raw();
    if found.uid() != own {
        return refused(format!(
            "{} belongs to user {}, and this process runs as user {own}",
            dir.display(),
            found.uid()
        ));
    }
    if found.mode() & 0o022 != 0 {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(found.mode() & 0o755))?;
    }
    Ok(())
}

/// A folder for this process alone, gone when dropped.
#[derive(Debug)]
pub(super) struct Private {
    dir: PathBuf,
    /// Locked: a process that can lock it knows that its owner is gone.
    _lock: File,
}

impl Private {
    /// The folder of this process, created if there is none now.
    pub fn shared() -> Result<Arc<Self>, DataError> {
        static ONE: Mutex<Weak<Private>> = Mutex::new(Weak::new());
        let mut one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = one.upgrade() {
            return Ok(there);
        }
        let made = Arc::new(Self::below(&std::env::temp_dir())?);
        *one = Arc::downgrade(&made);
        Ok(made)
    }

    /// Creates one below `base`.
    fn below(base: &Path) -> Result<Self, DataError> {
        sweep(base);
        let dir = base.join(format!("{PRIVATE_PREFIX}{}", random_hex(16)));
        let made = || -> io::Result<File> {
            DirBuilder::new().mode(0o700).create(&dir)?;
            let lock = no_link().read(true).open(&dir)?;
            // On a file system without locks, removal is left to other clean-up.
            let _ = flock(&lock, FlockOperation::NonBlockingLockExclusive);
            // Another process may have swept it away before it was locked.
            dir.symlink_metadata()?;
            Ok(lock)
        };
        // One more attempt is enough: a sweep takes a moment, once per process.
        match made().or_else(|_: io::Error| made()) {
            Ok(lock) => Ok(Self { dir, _lock: lock }),
            Err(source) => Err(DataError::Io { doing: "make a private folder", path: dir, source }),
        }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Removes the folders of this user's processes that are gone.
fn sweep(base: &Path) {
    for entry in std::fs::read_dir(base).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if !name.to_str().is_some_and(|name| name.starts_with(PRIVATE_PREFIX)) || is_ours(&path).is_err() {
            continue;
        }
        if let Ok(lock) = no_link().read(true).open(&path)
            && flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            let _ = std::fs::remove_dir_all(&path);
        }
    }
}

/// Where datasets from stores are kept: in `root`, created if need be, or, if that is not this user's alone, in a
/// folder of this process.
pub(super) fn settle(root: Option<&Path>) -> Result<(PathBuf, Option<Arc<Private>>), DataError> {
    if let Some(root) = root {
        make(root).map_err(|source| DataError::Io { doing: "make", path: root.to_owned(), source })?;
        match is_ours(root) {
            Ok(()) => return Ok((root.to_owned(), None)),
            Err(error) => tracing::warn!(
                "datasets are not kept in that folder but in one of this process: {error}; XDG_CACHE_HOME may name \
                another"
            ),
        }
    }
    let private = Private::shared()?;
    Ok((private.dir().to_owned(), Some(private)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unusable_folder_is_replaced_by_a_private_one_that_disappears() {
        let base = tempfile::tempdir().unwrap();
        let own = base.path().join("a/b");
        let (dir, private) = settle(Some(&own)).unwrap();
        assert!(dir == own && private.is_none());
        let mode = |path: &Path| std::fs::symlink_metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&own), mode(own.parent().unwrap())), (0o700, 0o700));
        // A mode that is too open is corrected.
        std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o777)).unwrap();
        settle(Some(&own)).unwrap();
        assert_eq!(mode(&own), 0o755);

        let link = base.path().join("link");
        std::os::unix::fs::symlink(&own, &link).unwrap();
        let (of_link, first) = settle(Some(&link)).unwrap();
        let (of_none, second) = settle(None).unwrap();
        assert!(of_link == of_none && of_link != own && mode(&of_link) == 0o700, "{of_link:?} {of_none:?}");
        drop(first);
        assert!(of_none.exists());
        drop(second);
        assert!(!of_none.exists());
        if geteuid().is_root() {
            std::os::unix::fs::chown(&own, Some(65534), None).unwrap();
            let (elsewhere, private) = settle(Some(&own)).unwrap();
            assert!(elsewhere != own && private.is_some());
        }
    }

    #[test]
    fn leftovers_of_a_kill_go_and_folders_in_use_stay() {
        let base = tempfile::tempdir().unwrap();
        let alive = Private::below(base.path()).unwrap();
        std::fs::create_dir(base.path().join("trainer-data-0123")).unwrap();
        std::fs::create_dir(base.path().join("other")).unwrap();
        std::os::unix::fs::symlink(base.path().join("other"), base.path().join("trainer-data-link")).unwrap();
        let of_another = base.path().join("trainer-data-4567");
        std::fs::create_dir(&of_another).unwrap();
        if geteuid().is_root() {
            std::os::unix::fs::chown(&of_another, Some(65534), None).unwrap();
        }
        let second = Private::below(base.path()).unwrap();
        assert_eq!(of_another.exists(), geteuid().is_root(), "nothing of another user is removed");
        assert!(alive.dir().exists() && second.dir().exists() && base.path().join("other").exists());
        assert!(!base.path().join("trainer-data-0123").exists());
        assert!(base.path().join("trainer-data-link").is_symlink(), "no link is touched");
    }
}
