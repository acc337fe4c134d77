//! What a run is made of: its data, and the settings under which its checkpoints were written, checked against the data
//! and settings of now.
//!
//! A run continues with the data that it was trained on: `formed` and each checkpoint's `trainer_state.json` name it by
//! checksum. Other data is refused unless a person names it, and a vocabulary in which ids mean something else is
//! refused in any case. If the journal lacks this, because an earlier version wrote it, it is taken from the checkpoint
//! as far as possible, and recorded in the next `formed`.

use std::num::NonZeroU64;

use bytes::Bytes;

use super::Workload;
use crate::{
    checkpoint::{
        CheckpointError,
        catalog::{self, Damage, Outcome},
        manifest::{Manifest, TrainerState},
        restore,
    },
    config::{Device, TrainTask, apply_overrides},
    data::identity,
    error::{Error, Kind, Result},
    ids::{DatasetId, Generation, RunId, Step},
    journal::{Committed, RunState},
    layout,
    storage::Store,
    worker::device,
};

/// Reads of a state that seems damaged before its checkpoint is skipped.
const READINGS: u32 = 3;

/// Decides the device, before anything is created or fetched: a machine whose GPUs can't be used must not take up a run
/// that was not meant for the CPU.
pub async fn compute_device(wanted: Device) -> Result<()> {
    let found = tokio::task::spawn_blocking(move || device::look(wanted)).await;
    let found = found.map_err(|error| Error::from_source(Kind::Bug, error).context("look for GPUs"))??;
    if let Some(note) = found.choose().settled()? {
        tracing::warn!("{note}");
    }
    Ok(())
}

/// Whether these changes of settings, as the journal keeps them, name other data.
pub fn names_data(overrides: &[(String, String)]) -> bool {
    overrides.iter().any(|(key, _)| DATA.contains(&key.as_str()))
}

/// The settings that lead to data. A task's own settings may, too.
pub const DATA: [&str; 2] = ["data.train", "task.settings"];

/// Checks the local data against the data that the run's newest generation was trained on. `accepted`: a person has
/// named it.
pub fn data_agrees(state: &RunState, workload: &Workload, accepted: bool) -> Result<()> {
    let Some(known) = state.data() else { return Ok(()) };
    if let Some(own) = workload.task.model.task() {
        return same_data_of_task(known, &workload.identity, accepted, &own.name, state.run_id());
    }
    same_data(known, &workload.identity, accepted, &workload.task.data.train, state.run_id())
}

fn same_data_of_task(known: &DatasetId, now: &DatasetId, accepted: bool, task: &str, run_id: &RunId) -> Result<()> {
    if known == now || accepted {
        return Ok(());
    }
    let what = format!(
        "task {task} has other data than run {run_id} was trained on: its identity has CRC64 {}, that of the run {}",
        now.index, known.index
    );
    Err(Error::new(Kind::Config, what).with_hint(format!(
        "put the run's data back, or train on this data from here on by naming the setting that leads to it, with its \
         value: --set task.settings.KEY=VALUE on resuming run {run_id}"
    )))
}

fn same_data(known: &DatasetId, now: &DatasetId, accepted: bool, uri: &str, run_id: &RunId) -> Result<()> {
    if known.vocabulary != now.vocabulary {
        return Err(other_vocabulary(&format!("run {run_id}"), uri));
    }
    if known.index == now.index || accepted {
        return Ok(());
    }
    let what = format!(
        "the dataset {uri} is not the one that run {run_id} was trained on: its index has CRC64 {}, that of the run {}",
        now.index, known.index
    );
    Err(Error::new(Kind::Config, what).with_hint(other_data(uri, run_id)))
}

fn other_data(uri: &str, run_id: &RunId) -> String {
    format!(
        "put the run's dataset back, or train on this one from here on: trainer resume --run-id {run_id} --set \
        data.train={uri}"
    )
}

fn other_vocabulary(whose: &str, uri: &str) -> Error {
    let what = format!(
        "the dataset {uri} was made with another tokenizer than that of {whose}: its token ids mean other text"
    );
    Error::new(Kind::Config, what).with_hint(
        "prepare the data with the tokenizer.json of the run's checkpoints (trainer data prepare --tokenizer FILE), or \
        start a new run",
    )
}

/// The facts that checkpoints are checked against.
pub struct MadeOf<'a> {
    state: RunState,
    workload: &'a Workload,
    accepted: bool,
}

impl<'a> MadeOf<'a> {
    /// `accepted`: a person has named the data.
    pub fn new(state: &RunState, workload: &'a Workload, accepted: bool) -> Self {
        Self { state: state.clone(), workload, accepted }
    }

    /// The task that a generation had.
    fn task_of(&self, generation: Generation) -> Result<TrainTask> {
        let until = self.state.formations().iter().filter(|formation| formation.generation <= generation);
        let overrides: Vec<_> = until.flat_map(|formation| formation.overrides.iter().cloned()).collect();
        Ok(apply_overrides(self.state.config(), &overrides)?.workload)
    }

    /// Checks a checkpoint's state against the journal and the data.
    async fn check(&self, run: &Store, manifest: &Manifest, found: &TrainerState) -> Result<()> {
        let (run_id, now) = (self.state.run_id(), &self.workload.identity);
        let uri = &self.workload.task.data.train;
        let object = format!("{}/{}", manifest.folder(), layout::TRAINER_STATE);
        let generation = manifest.generation;
        let recorded = self.state.formations().iter().find(|formation| formation.generation == generation);
        let recorded = recorded.and_then(|formation| formation.data.as_ref());
        let task = self.task_of(generation)?;
        agrees(&object, found, manifest.step, &task, recorded)?;
        if found.data.is_none() {
            // From an earlier version: its tokenizer identifies the data.
            if let Ok(tokenizer) = restore::small_file(run, manifest, layout::TOKENIZER).await
                && identity::vocabulary(&tokenizer).to_string() != now.vocabulary
            {
                return Err(other_vocabulary(&format!("{}/{}", manifest.folder(), layout::TOKENIZER), uri));
            }
        }
        if let (Some(data), None) = (&found.data, self.state.data()) {
            same_data(data, now, self.accepted, uri, run_id)?;
        }
        let Err(contradiction) = stands_at(&object, found, self.workload.sequences) else { return Ok(()) };
        match &found.data {
            Some(data) if data == now => Err(Error::new(Kind::Data, contradiction).with_hint(to_another(run_id))),
            // It was trained on other data, or its data was not recorded.
            Some(_) => Ok(()),
            None if self.accepted || self.state.data() == Some(now) => Ok(()),
            None => {
                let what =
                    format!("the dataset {uri} is not the one that run {run_id} was trained on: {contradiction}");
                Err(Error::new(Kind::Config, what).with_hint(other_data(uri, run_id)))
            }
        }
    }
}

fn to_another(run_id: &RunId) -> String {
    format!(
        "see `trainer checkpoints --run-id {run_id}`, and go on from another one: trainer resume --run-id {run_id} \
        --from STEP"
    )
}

/// Checks a state against what the journal says of the generation that wrote it.
fn agrees(
    object: &str,
    found: &TrainerState,
    step: Step,
    task: &TrainTask,
    recorded: Option<&DatasetId>,
) -> Result<()> {
    let (train, data) = (&task.train, &task.data);
    let samples = step.get().saturating_mul(train.global_batch.into());
    let numbers = [
        ("step", found.step.get(), step.get()),
        ("seed", found.seed, train.seed),
        ("global_batch", found.global_batch.into(), train.global_batch.into()),
        ("sequence_length", found.sequence_length.into(), data.sequence_length.into()),
        ("samples", found.samples, samples),
    ];
    let mut contradictions = numbers
        .iter()
        .filter(|(_, found, expected)| found != expected)
        .map(|(field, found, expected)| format!("its {field} is {found}, by the run's journal it is {expected}"));
    let data = match (&found.data, recorded) {
        (Some(found), Some(recorded)) if found != recorded => {
            Some(format!("its data is {}, by the run's journal it is {}", found.index, recorded.index))
        }
        _ => None,
    };
    match contradictions.next().or(data) {
        Some(what) => Err(Error::new(Kind::Data, format!("{object}: {what}"))
            .with_hint("the checkpoint is not of this run as its journal tells it: name an earlier one with --from")),
        None => Ok(()),
    }
}

/// Checks a state's sampler position against the number of sequences in one pass over the data.
fn stands_at(object: &str, found: &TrainerState, sequences: NonZeroU64) -> Result<(), String> {
    let (epoch, position) = (found.samples / sequences, found.samples % sequences);
    let wrong = |field: &str, found: u64, expected: u64| {
        Err(format!("{object}: its {field} is {found}, over {sequences} sequences it would be {expected}"))
    };
    if found.epoch != epoch {
        return wrong("epoch", found.epoch, epoch);
    }
    if found.position != position {
        return wrong("position", found.position, position);
    }
    Ok(())
}

/// [`catalog::newest_usable`]; the trainer's state of the result is read, too, and checked against journal and data.
///
/// # Errors
/// A contradiction with the run is an error; a damaged checkpoint is skipped.
pub async fn newest_usable(
    run: &Store,
    candidates: &[Committed],
    from: Option<Step>,
    made_of: &MadeOf<'_>,
) -> Result<Outcome> {
    let mut left = candidates.to_vec();
    let mut stepped_over: Vec<Damage> = Vec::new();
    loop {
        let outcome = catalog::newest_usable(run, &left, from).await?;
        stepped_over.extend(outcome.stepped_over);
        let Some((committed, manifest)) = outcome.found else { return Ok(Outcome { found: None, stepped_over }) };
        match read(run, &manifest).await {
            Ok(bytes) => {
                // Its bytes are those that were written: any fault in it is no damage by the store.
                let object = format!("{}/{}", manifest.folder(), layout::TRAINER_STATE);
                made_of.check(run, &manifest, &TrainerState::parse(&object, &bytes)?).await?;
                return Ok(Outcome { found: Some((committed, manifest)), stepped_over });
            }
            Err(CheckpointError::Damaged { object, reason }) => {
                let Committed { step, generation, .. } = committed;
                stepped_over.push(Damage { step, generation, object, reason: reason.to_string() });
            }
            Err(error) => return Err(error.into()),
        }
        left.retain(|c| !stepped_over.iter().any(|d| (d.step, d.generation) == (c.step, c.generation)));
        if left.iter().all(|committed| from.is_some_and(|step| step != committed.step)) {
            return Ok(Outcome { found: None, stepped_over });
        }
    }
}

async fn read(run: &Store, manifest: &Manifest) -> Result<Bytes, CheckpointError> {
    for _ in 1..READINGS {
        match restore::small_file(run, manifest, layout::TRAINER_STATE).await {
            Err(CheckpointError::Damaged { .. }) => {}
            done => return done,
        }
    }
    restore::small_file(run, manifest, layout::TRAINER_STATE).await
}
