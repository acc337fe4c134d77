//! Whether a folder's file system has hard links: a write-once object gets its name by one ([`super::Store::create`]).
//!
//! exFAT and other FATs, SMB shares and buckets that are mounted as folders have none, and report that in several ways
//! (link(2): EPERM, ENOTSUP, EMLINK, ENOSYS), the first of which looks like a missing permission.

use std::{fs, io, path::Path};

use rustix::io::Errno;

use super::{backend::Large, error::StorageError, store::Store};
use crate::ids::random_hex;

/// Tries it in `folder`, or in the closest existing one above it, up to `uri`. Leaves nothing behind; other errors are
/// left for the next request to report.
fn prove(folder: &Path, uri: &str) -> Result<(), StorageError> {
    let Some(folder) = folder.ancestors().find(|folder| folder.is_dir()) else { return Ok(()) };
    let name = random_hex(16);
    let (file, link) = (folder.join(format!("link-{name}#1")), folder.join(format!("link-{name}#2")));
    let tried = fs::write(&file, "").map(|()| fs::hard_link(&file, &link));
    for path in [&file, &link] {
        // A kill leaves a hidden file, which a later sweep removes.
        let _ = fs::remove_file(path);
    }
    match tried {
        Ok(Err(error)) if is_refusal(&error) => {
            Err(StorageError::NoLinks { uri: uri.to_owned(), source: error.to_string().into() })
        }
        _ => Ok(()),
    }
}

impl Store {
    /// On `file://`: an error if the folder that holds `key` can't have hard links.
    pub(super) fn prove_links(&self, key: &str) -> Result<(), StorageError> {
        let Large::File(files) = &self.inner.connections.backend.large else { return Ok(()) };
        match files.path_to_filesystem(&self.path(key)?) {
            Ok(place) => prove(place.parent().unwrap_or(&place), &self.uri()),
            Err(_) => Ok(()),
        }
    }
}

/// Whether a link failed between two files just created side by side by the same user.
fn is_refusal(error: &io::Error) -> bool {
    const REFUSALS: [Errno; 6] =
        [Errno::PERM, Errno::NOTSUP, Errno::OPNOTSUPP, Errno::MLINK, Errno::NOSYS, Errno::INVAL];
    REFUSALS.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_with_links_passes_and_is_left_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        prove(&folder.path().join("probes"), "file:///x").unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        prove(Path::new("/proc/no/such"), "file:///x").unwrap();
    }

    #[test]
    fn every_word_for_no_links_is_known_and_no_other_error() {
        for (number, refused) in [(1, true), (95, true), (31, true), (38, true), (13, false), (28, false), (24, false)]
        {
            assert_eq!(is_refusal(&io::Error::from_raw_os_error(number)), refused, "{number}");
        }
    }
}
