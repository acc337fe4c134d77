//! The leader's memory of the steps that it hears of, until they are in the store.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::task::JoinHandle;

use super::{
    read::{self as files, MANY},
    series::{Row, Series},
};
use crate::{
    ids::{Generation, Step},
    report::{Event, Spent},
    storage::{Priority, Store},
};

/// Rows are put at least this often, saves or not.
const OFTEN: Duration = Duration::from_secs(300);
/// And as soon as there are this many of them.
const MANY_ROWS: usize = 100_000;
/// The longest time for which a save waits for its rows, once everything else of it is in the store. It may be the last
/// one before the machine goes away, and a checkpoint is worth more than a curve without a gap.
const PATIENCE: Duration = Duration::from_secs(2);

/// Rows on their way to the store. Dropping it stops nothing: they arrive, or go with the next ones.
#[derive(Debug)]
pub struct Put(Option<JoinHandle<()>>);

impl Put {
    /// Waits until the rows are in the store; for a bounded time, since a save must not fail because of them.
    pub async fn arrived(self) {
        if let Some(putting) = self.0
            && tokio::time::timeout(PATIENCE, putting).await.is_err()
        {
            tracing::warn!("figures of the last steps have not reached the store yet; the checkpoint does not wait");
        }
    }
}

/// Rows that are not in the store.
#[derive(Debug)]
struct Waiting {
    rows: Series,
    /// When rows were last put.
    put_at: Instant,
    /// Small files in the store, as far as this process knows.
    small: usize,
    merging: bool,
}

/// Keeps rows, and puts them. Clones share the rows.
#[derive(Clone, Debug)]
pub struct Recorder {
    run: Store,
    generation: Generation,
    waiting: Arc<Mutex<Waiting>>,
}

fn locked(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    // A panic in another thread leaves whole rows: they are added under the lock alone.
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Recorder {
    /// For a generation; `run` is the run's folder.
    pub fn new(run: &Store, generation: Generation) -> Self {
        // Small files of earlier generations are counted with the first merge.
        let waiting = Waiting { rows: Series::default(), put_at: Instant::now(), small: MANY / 2, merging: false };
        Self { run: run.clone(), generation, waiting: Arc::new(Mutex::new(waiting)) }
    }

    /// Keeps the figures of an event, if it has any.
    pub fn hear(&self, event: &Event, at_ms: i64) {
        let Some((step, figures)) = figures(event) else { return };
        let row = Row { step, generation: self.generation, at_ms, figures };
        let due = {
            let mut waiting = locked(&self.waiting);
            waiting.rows.push(&row);
            waiting.rows.len() >= MANY_ROWS || waiting.put_at.elapsed() >= OFTEN
        };
        if due {
            // They arrive, or go with the next ones.
            drop(self.put(step));
        }
    }

    /// Puts the rows of all steps up to `last`.
    pub fn put(&self, last: Step) -> Put {
        let rows = {
            let mut waiting = locked(&self.waiting);
            waiting.put_at = Instant::now();
            waiting.rows.take_until(last)
        };
        if rows.is_empty() {
            return Put(None);
        }
        let (run, waiting) = (self.run.clone(), Arc::clone(&self.waiting));
        Put(Some(tokio::spawn(async move {
            if let Err(error) = files::put(&run, rows.clone()).await {
                tracing::warn!(%error, "figures of steps could not be stored; they go with the next save");
                locked(&waiting).rows.append(rows);
                return;
            }
            let merges = {
                let mut waiting = locked(&waiting);
                waiting.small += 1;
                let due = waiting.small >= MANY && !waiting.merging;
                waiting.merging |= due;
                due
            };
            if merges {
                tokio::spawn(merge(run, waiting));
            }
        })))
    }
}

/// In the background, on idle cores: a failure is tried again after as many files.
async fn merge(run: Store, waiting: Arc<Mutex<Waiting>>) {
    let left = files::merge(&run.at_priority(Priority::Background).for_upkeep()).await;
    let mut waiting = locked(&waiting);
    waiting.merging = false;
    waiting.small = match left {
        Ok(left) => left,
        Err(error) => {
            tracing::debug!(%error, "files of metrics were not put together");
            0
        }
    };
}

/// The parts of a step's time, and the memory that it used.
fn split(spent: &Spent) -> Vec<(&'static str, f64)> {
    let Spent { data_s, forward_s, backward_s, reduce_s, capture_s, optimizer_s, mfu, memory } = *spent;
    let mut all = vec![
        ("data_s", data_s),
        ("forward_s", forward_s),
        ("backward_s", backward_s),
        ("reduce_s", reduce_s),
        ("capture_s", capture_s),
        ("optimizer_s", optimizer_s),
    ];
    all.extend(mfu.map(|mfu| ("mfu", mfu)));
    if let Some(memory) = memory {
        all.push(("host_peak_bytes", memory.host_peak_bytes as f64));
        all.extend(memory.device_peak_bytes.map(|bytes| ("device_peak_bytes", bytes as f64)));
        all.extend(memory.device_reserved_bytes.map(|bytes| ("device_reserved_bytes", bytes as f64)));
    }
    all
}

/// What an event says of a step.
fn figures(event: &Event) -> Option<(Step, BTreeMap<String, f64>)> {
    let named = |figures: &[(&str, f64)]| figures.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
    match event {
        Event::Step { step, loss, lr, grad_norm, tokens_per_s, step_s, stall_s, lag_s, spent, .. } => {
            // What a run computes is kept to the last digit, what is measured in single precision.
            let mut figures: BTreeMap<String, f64> = named(&[("loss", *loss), ("lr", *lr), ("grad_norm", *grad_norm)]);
            let measured =
                [("tokens_per_s", *tokens_per_s), ("step_s", *step_s), ("stall_s", *stall_s), ("lag_s", *lag_s)];
            let split = spent.as_deref().map(split).unwrap_or_default();
            let measured = measured.into_iter().chain(split);
            figures.extend(measured.map(|(name, value)| (name.to_owned(), f64::from(value as f32))));
            Some((*step, figures))
        }
        Event::Validation { step, loss, sources } => {
            let mut figures: BTreeMap<String, f64> = named(&[("held_out_loss", *loss)]);
            figures.extend(sources.iter().map(|(source, loss)| (format!("held_out/{source}"), *loss)));
            Some((*step, figures))
        }
        Event::Checkpoint { step, durable_s, copy_s, .. } => {
            Some((*step, named(&[("durable_s", *durable_s), ("copy_s", *copy_s)])))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::StorageConfig,
        layout,
        metrics::{Series, read},
        report::Memory,
    };

    fn store() -> Store {
        Store::open("memory://", &StorageConfig::plain(8, 8)).unwrap().folder("run")
    }

    fn step(step: u64) -> Event {
        Event::Step {
            step: Step(step),
            loss: 1.0 / step as f64,
            lr: 1e-3,
            grad_norm: 0.5,
            tokens: 10 * step,
            tokens_per_s: 100.0,
            step_s: 0.1,
            stall_s: 0.0,
            lag_steps: 0,
            lag_s: 0.0,
            spent: (step == 3).then(|| {
                let memory = Some(Memory { host_peak_bytes: 1 << 30, ..Memory::default() });
                Box::new(Spent { data_s: 0.1, forward_s: 0.25, mfu: Some(0.5), memory, ..Spent::default() })
            }),
        }
    }

    async fn steps(run: &Store) -> Vec<(u64, u64)> {
        let (all, broken) = read(run).await.unwrap();
        assert_eq!(broken, Vec::<String>::new());
        all.curve().rows().map(|row| (row.step.get(), row.generation.get())).collect()
    }

    #[tokio::test]
    async fn a_save_has_the_figures_of_all_steps_up_to_its_own() {
        let run = store();
        let recorder = Recorder::new(&run, Generation(1));
        (1..=7).for_each(|number| recorder.hear(&step(number), 0));
        recorder.put(Step(5)).arrived().await;
        assert_eq!(steps(&run).await, (1..=5).map(|step| (step, 1)).collect::<Vec<_>>());
        recorder.put(Step(5)).arrived().await;
        assert_eq!(run.list(layout::METRICS).await.unwrap().len(), 1, "nothing new, so no request");
        // It dies. The next generation goes on from step 5, and does step 6 again.
        let next = Recorder::new(&run, Generation(2));
        recorder.put(Step(7)).arrived().await;
        next.hear(&step(6), 0);
        next.put(Step(6)).arrived().await;
        let expected = [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 2)];
        assert_eq!(steps(&run).await, expected);
        let curve = read(&run).await.unwrap().0.curve();
        let third = |name: &str| curve.column(name).map(|values| values[2]);
        assert_eq!(third("loss"), Some(1.0 / 3.0));
        // What is measured has the digits of single precision.
        let expected = [0.1_f32, 0.25, 0.5, 1.073_741_8e9].map(|value| Some(f64::from(value)));
        assert_eq!(["data_s", "forward_s", "mfu", "host_peak_bytes"].map(third), expected);
        assert_eq!(third("device_peak_bytes"), None, "nobody has measured it");
    }

    #[tokio::test]
    async fn small_files_are_put_together_and_say_the_same() {
        let run = store();
        for generation in [1, 2] {
            let recorder = Recorder::new(&run, Generation(generation));
            for number in 1..=100 {
                recorder.hear(&step(number), 0);
                let rows = locked(&recorder.waiting).rows.take_until(Step(number));
                files::put(&run, rows).await.unwrap();
            }
        }
        // Row by row: a figure that a row lacks is NaN in its column, which equals nothing.
        let curve = async || read(&run).await.unwrap().0.curve().rows().collect::<Vec<_>>();
        let before = curve().await;
        assert_eq!(before.len(), 100);
        let mut left = 200;
        while left >= MANY {
            left = files::merge(&run).await.unwrap();
        }
        assert_eq!(run.list(layout::METRICS).await.unwrap().len(), left);
        assert_eq!(curve().await, before);
        // A merge that died after its write: rows are there twice.
        let (all, _) = read(&run).await.unwrap();
        files::put(&run, all).await.unwrap();
        assert_eq!(curve().await, before);
    }

    #[tokio::test]
    async fn a_damaged_file_is_named_and_the_others_count() {
        let run = store();
        let recorder = Recorder::new(&run, Generation(1));
        recorder.hear(&step(1), 0);
        recorder.put(Step(1)).arrived().await;
        run.put("metrics/g0001-s00000002-s00000002-x.parquet", "PAR1 of no use".into()).await.unwrap();
        run.put("metrics/notes.txt", "mine".into()).await.unwrap();
        let (all, broken) = read(&run).await.unwrap();
        assert_eq!((all.len(), broken.len()), (1, 1));
        assert!(broken[0].starts_with("metrics/g0001-s00000002"), "{broken:?}");
    }

    #[tokio::test]
    async fn rows_that_the_store_refuses_go_with_the_next_save() {
        // The folder of the store is a file: nothing can be written into it.
        let folder = tempfile::tempdir().unwrap();
        let uri = format!("file://{}", folder.path().join("store").display());
        std::fs::create_dir(folder.path().join("store")).unwrap();
        let run = Store::open(&uri, &StorageConfig::plain(8, 1)).unwrap().folder("run");
        std::fs::create_dir(folder.path().join("store/run")).unwrap();
        std::fs::write(folder.path().join("store/run/metrics"), "a file").unwrap();
        let recorder = Recorder::new(&run, Generation(1));
        recorder.hear(&step(1), 0);
        recorder.put(Step(1)).arrived().await;
        std::fs::remove_file(folder.path().join("store/run/metrics")).unwrap();
        assert_eq!(read(&run).await.unwrap().0, Series::default());
        recorder.hear(&step(2), 0);
        recorder.put(Step(2)).arrived().await;
        assert_eq!(steps(&run).await, [(1, 1), (2, 1)]);
    }
}
