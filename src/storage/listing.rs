//! Partial listings.

use futures::{StreamExt, TryStreamExt};

use super::{
    error::StorageError,
    store::{ObjectInfo, Store, timestamp},
};

impl Store {
    /// At most `limit` objects below `prefix` (a folder), with no more requests than needed. With `after`, a key that
    /// need not exist: only those behind it in the order of their names, in which they are also returned, except on
    /// `file://`, which has no order and must read every name to skip one.
    pub async fn list_some(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<ObjectInfo>, StorageError> {
        let folder = self.path(prefix)?;
        let after = after.map(|key| self.path(key)).transpose()?;
        let request = || {
            let found = match &after {
                Some(after) => self.objects().list_with_offset(Some(&folder), after),
                None => self.objects().list(Some(&folder)),
            };
            found.take(limit).try_collect::<Vec<_>>()
        };
        let found = match self.attempts("list", 0).slow().run(request).await {
            Ok(found) => found,
            Err(failure) if failure.is_not_found() => Vec::new(),
            Err(failure) => return Err(failure.explain(&self.uri_of(prefix))),
        };
        let infos = found.into_iter().filter_map(|meta| {
            let key = self.relative(meta.location.as_ref())?.to_owned();
            Some(ObjectInfo { key, size: meta.size, last_modified: timestamp(&meta) })
        });
        Ok(infos.collect())
    }
}
