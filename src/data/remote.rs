//! Inputs in stores, fetched to this machine: several at once, ahead of the reader, each once.
//!
//! Files fetched by a first pass are kept for the second one, as long as the disk has room; otherwise the second pass
//! fetches them again. The files are in a folder that only this user can read and that is removed with this value.

use std::{
    collections::BTreeMap,
    fs::DirBuilder,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{runtime::Handle, task::JoinHandle};

use super::{
    DataError,
    fetch::fetch,
    input::{Input, Place},
    prepare::PrepareEvent,
};
use crate::ids::random_hex;

/// Inputs that are fetched at once.
const AT_ONCE: usize = 4;
/// How often a wait for an input is reported.
const TELL: Duration = Duration::from_secs(1);

/// Fetches inputs; used by one thread.
pub(super) struct Remote<'a> {
    inputs: &'a [Input],
    runtime: Handle,
    part: u64,
    stop: &'a AtomicBool,
    progress: &'a (dyn Fn(PrepareEvent) + Send + Sync),
    /// Created for the first file.
    folder: Option<Folder>,
    /// Bytes that may be on disk at once.
    room: u64,
    /// Being fetched.
    flights: BTreeMap<usize, JoinHandle<Result<(), DataError>>>,
    /// Fetched.
    here: BTreeMap<usize, PathBuf>,
    fetched: Arc<AtomicU64>,
    total: u64,
}

impl<'a> Remote<'a> {
    pub(super) fn new(
        inputs: &'a [Input],
        runtime: Handle,
        part: u64,
        stop: &'a AtomicBool,
        progress: &'a (dyn Fn(PrepareEvent) + Send + Sync),
    ) -> Self {
        let is_remote = |input: &&Input| matches!(input.place, Place::Remote { .. });
        let total = inputs.iter().filter(is_remote).map(|input| input.bytes).sum();
        let free =
            rustix::fs::statvfs(std::env::temp_dir()).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
        Self {
            inputs,
            runtime,
            part,
            stop,
            progress,
            folder: None,
            // The disk has other users, too.
            room: free - free / 8,
            flights: BTreeMap::new(),
            here: BTreeMap::new(),
            fetched: Arc::default(),
            total,
        }
    }

    /// The path of input `number` on this machine, once it is here. The inputs after it are fetched meanwhile.
    pub(super) fn path(&mut self, number: usize) -> Result<PathBuf, DataError> {
        if !self.here.contains_key(&number) && !self.flights.contains_key(&number) {
            self.make_room(self.bytes(number));
            self.start(number)?;
        }
        for next in (number + 1..self.inputs.len()).take(AT_ONCE * AT_ONCE) {
            if self.flights.len() >= AT_ONCE || self.held() + self.bytes(next) > self.room {
                break;
            }
            let remote = matches!(self.inputs[next].place, Place::Remote { .. });
            if remote && !self.here.contains_key(&next) && !self.flights.contains_key(&next) {
                self.start(next)?;
            }
        }
        if let Some(flight) = self.flights.remove(&number) {
            self.wait(flight)?;
            let path = self.file(number)?;
            self.here.insert(number, path);
        }
        self.file(number)
    }

    /// Input `number` was read. `again`: it will be read once more.
    pub(super) fn done(&mut self, number: usize, again: bool) {
        if !(again && self.held() <= self.room) {
            self.drop_file(number);
        }
    }

    fn bytes(&self, number: usize) -> u64 {
        self.inputs.get(number).map_or(0, |input| input.bytes)
    }

    /// Bytes that are here or on their way.
    fn held(&self) -> u64 {
        self.here.keys().chain(self.flights.keys()).map(|&number| self.bytes(number)).sum()
    }

    /// Removes kept files, the last first, until there is room for `bytes` more.
    fn make_room(&mut self, bytes: u64) {
        while self.held() + bytes > self.room
            && let Some(&last) = self.here.keys().next_back()
        {
            self.drop_file(last);
        }
    }

    fn drop_file(&mut self, number: usize) {
        if let Some(path) = self.here.remove(&number) {
            let _ = std::fs::remove_file(path);
        }
    }

    fn folder(&mut self) -> Result<&Path, DataError> {
        let folder = match self.folder.take() {
            Some(folder) => folder,
            None => Folder::new()?,
        };
        Ok(&self.folder.insert(folder).0)
    }

    fn file(&mut self, number: usize) -> Result<PathBuf, DataError> {
        Ok(self.folder()?.join(number.to_string()))
    }

    fn start(&mut self, number: usize) -> Result<(), DataError> {
        let to = self.file(number)?;
        let Some(Input { place: Place::Remote { store, key }, bytes, .. }) = self.inputs.get(number).cloned() else {
            return Ok(());
        };
        let (part, fetched) = (self.part, self.fetched.clone());
        let flight = self.runtime.spawn(async move {
            let count = |bytes| {
                fetched.fetch_add(bytes, Ordering::Relaxed);
            };
            fetch(&store, &key, bytes, part, &to, &count).await.map(|_| ())
        });
        self.flights.insert(number, flight);
        Ok(())
    }

    fn wait(&self, mut flight: JoinHandle<Result<(), DataError>>) -> Result<(), DataError> {
        loop {
            if self.stop.load(Ordering::Relaxed) {
                flight.abort();
                return Err(DataError::Stopped { reason: "cancelled".into() });
            }
            match self.runtime.block_on(async { tokio::time::timeout(TELL, &mut flight).await }) {
                Ok(ended) => return ended.map_err(|error| DataError::Stopped { reason: error.to_string() })?,
                Err(_) => (self.progress)(PrepareEvent::Fetching {
                    bytes: self.fetched.load(Ordering::Relaxed),
                    bytes_total: self.total,
                }),
            }
        }
    }
}

impl Drop for Remote<'_> {
    fn drop(&mut self) {
        for flight in self.flights.values() {
            flight.abort();
        }
    }
}

/// A temporary folder, gone when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self, DataError> {
        let path = std::env::temp_dir().join(format!("trainer-inputs-{}", random_hex(16)));
        DirBuilder::new().mode(0o700).create(&path).map_err(|source| DataError::Io {
            doing: "make temporary folder",
            path: path.clone(),
            source,
        })?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::{config::StorageConfig, storage::Store};

    async fn inputs(sizes: &[usize]) -> Vec<Input> {
        let store = Store::open("memory://", &StorageConfig::plain(4, 1)).unwrap();
        let mut inputs = Vec::new();
        for (number, &size) in sizes.iter().enumerate() {
            let key = format!("{number}.txt");
            store.put(&key, vec![b'a' + number as u8; size].into()).await.unwrap();
            let place = Place::Remote { store: store.clone(), key: key.clone() };
            inputs.push(Input { name: key, bytes: size as u64, place, named: false, stamp: None });
        }
        inputs
    }

    #[tokio::test]
    async fn inputs_are_fetched_in_parallel_and_once_for_both_passes() {
        let inputs = inputs(&[1000; 9]).await;
        let runtime = Handle::current();
        tokio::task::spawn_blocking(move || {
            let stop = AtomicBool::new(false);
            let mut remote = Remote::new(&inputs, runtime, 300, &stop, &|_| ());
            remote.room = u64::MAX;
            let first = remote.path(0).unwrap();
            assert_eq!(std::fs::read(&first).unwrap(), vec![b'a'; 1000]);
            assert_eq!(remote.flights.keys().copied().collect::<Vec<_>>(), [1, 2, 3], "others come meanwhile");
            for pass in [true, false] {
                for (number, input) in inputs.iter().enumerate() {
                    let path = remote.path(number).unwrap();
                    assert_eq!(std::fs::metadata(&path).unwrap().len(), input.bytes);
                    remote.done(number, pass);
                    assert_eq!(path.exists(), pass);
                }
            }
            assert_eq!(remote.fetched.load(Ordering::Relaxed), 9000, "each was fetched once");
            let folder = first.parent().unwrap().to_owned();
            let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode(&folder), 0o700, "what is trained on is nobody else's");
            drop(remote);
            assert!(!folder.exists());
        })
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn on_a_small_disk_no_more_is_kept_than_fits() {
        let inputs = inputs(&[1000; 5]).await;
        let runtime = Handle::current();
        tokio::task::spawn_blocking(move || {
            let stop = AtomicBool::new(false);
            let mut remote = Remote::new(&inputs, runtime, 300, &stop, &|_| ());
            remote.room = 2500;
            for pass in [true, false] {
                for number in 0..inputs.len() {
                    let path = remote.path(number).unwrap();
                    assert!(path.exists() && remote.held() <= 2500, "{number}");
                    remote.done(number, pass);
                }
            }
        })
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn an_input_that_cannot_be_fetched_says_so() {
        let mut inputs = inputs(&[1000; 2]).await;
        inputs[1].bytes = 5000;
        let runtime = Handle::current();
        tokio::task::spawn_blocking(move || {
            let stop = AtomicBool::new(false);
            let mut remote = Remote::new(&inputs, runtime, 300, &stop, &|_| ());
            assert!(remote.path(0).is_ok());
            assert!(remote.path(1).is_err());
            stop.store(true, Ordering::Relaxed);
            assert!(matches!(remote.path(1), Err(DataError::Stopped { .. })));
        })
        .await
        .unwrap();
    }
}
