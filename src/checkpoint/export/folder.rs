//! A local folder that appears whole or not at all.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use crate::{checkpoint::CheckpointError, ids::random_hex};

/// A folder in the making; removed when dropped before it is published.
pub(super) struct Partial {
    pub path: PathBuf,
}

impl Partial {
    pub(super) fn create(target: &Path) -> Result<Self, CheckpointError> {
        let free = match fs::read_dir(target) {
            Ok(mut entries) => entries.next().is_none(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => true,
            Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => false,
            Err(error) => return Err(io("look at", target)(error)),
        };
        let Some(name) = target.file_name().filter(|_| free) else {
            return Err(CheckpointError::Occupied { path: target.to_owned() });
        };
        let path = target.with_file_name(format!(".{}.partial-{}", name.to_string_lossy(), random_hex(4)));
        fs::create_dir_all(&path).map_err(io("create", &path))?;
        Ok(Self { path })
    }

    /// Writes a small file.
    pub(super) fn put(&self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        let to = self.path.join(name);
        if let Some(folder) = to.parent().filter(|folder| *folder != self.path) {
            fs::create_dir_all(folder).map_err(io("create", folder))?;
        }
        fs::write(&to, bytes).and_then(|()| File::open(&to)?.sync_all()).map_err(io("write", &to))
    }

    pub(super) fn publish(self, target: &Path) -> Result<(), CheckpointError> {
        let sync = |folder: &Path| File::open(folder).and_then(|folder| folder.sync_all()).map_err(io("write", folder));
        sync(&self.path)?;
        // An empty folder is replaced; if it is no longer empty, this fails.
        fs::rename(&self.path, target).map_err(io("rename export to", target))?;
        match target.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            Some(parent) => sync(parent),
            None => sync(Path::new(".")),
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After `publish` nothing has this name.
        let _ = fs::remove_dir_all(&self.path);
    }
}

pub(super) fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::Io { doing, path, source }
}
