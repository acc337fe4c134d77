//! The task of this process, and the runs that it may train.

use std::sync::OnceLock;

use serde_json::Value;

use super::{
    Parameter, Samples, Task, Trainable, guard,
    parameters::{self, Named},
    settings,
};
use crate::{
    config::OwnTask,
    error::{Explain, Kind},
    ids::DatasetId,
    storage::Crc64,
};

/// Why a task can't be trained.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// The run belongs to another program.
    #[error("the run trains task {wanted}, and this program {has}")]
    Other {
        /// The run's task, with its version.
        wanted: String,
        /// What this program trains.
        has: String,
    },
    /// The run's settings are not what the task takes.
    #[error("task.settings of task {task} {reason}")]
    Settings {
        /// The task.
        task: String,
        /// What is wrong, with its key.
        reason: String,
    },
    /// The task's list of parameters can't be used.
    #[error("the task's parameter {name} {reason}")]
    Parameter {
        /// The parameter.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The run trains a language model, which this program does not.
    #[error("the run trains a language model, and this program trains the task {has}")]
    LanguageModel {
        /// What this program trains.
        has: String,
    },
    /// What the task is made of can't be trained.
    #[error("the task can't be trained: {0}")]
    Contents(String),
    /// The task's code returned an error.
    #[error("task {task} failed to {doing}")]
    Failed {
        /// The task.
        task: String,
        /// The call.
        doing: &'static str,
        /// Its own words.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The task's code panicked.
    #[error("task {task} panicked as it should {doing}: {what}")]
    Panicked {
        /// The task.
        task: String,
        /// The call.
        doing: &'static str,
        /// The panic's words.
        what: String,
    },
}

/// The call that only reads settings: what goes wrong in it is wrong with them.
const OPEN: &str = "open its settings";

impl Explain for TaskError {
    fn kind(&self) -> Kind {
        match self {
            Self::Other { .. }
            | Self::Settings { .. }
            | Self::Parameter { .. }
            | Self::LanguageModel { .. }
            | Self::Contents(_) => Kind::Config,
            Self::Failed { doing, .. } if *doing == OPEN => Kind::Config,
            Self::Failed { .. } | Self::Panicked { .. } => Kind::Bug,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Other { wanted, .. } => Some(format!(
                "give the same arguments to the program that was built for task {wanted}: its main calls trainer::main"
            )),
            Self::LanguageModel { has } => Some(format!(
                "`trainer` itself trains language models; for the task, the configuration has task.name = {has:?} in \
                 place of [model]"
            )),
            Self::Settings { .. } => Some("correct [task.settings]; on a resume: --set task.settings.KEY=VALUE".into()),
            Self::Parameter { .. } | Self::Contents(_) => Some("correct the task's own code".into()),
            Self::Failed { doing, .. } if *doing == OPEN => Some("correct [task.settings], or what they name".into()),
            Self::Failed { .. } | Self::Panicked { .. } => {
                Some("the task's own code stopped here, and the run can go on once it is corrected".into())
            }
        }
    }
}

/// [`Task`] without its types.
trait AnyTask: Send + Sync {
    fn name(&self) -> &str;
    fn version(&self) -> u32;
    fn open(&self, settings: &Value) -> Result<(Box<dyn Trainable>, Value), TaskError>;
}

impl<T: Task> AnyTask for T {
    fn name(&self) -> &str {
        Task::name(self)
    }

    fn version(&self) -> u32 {
        Task::version(self)
    }

    fn open(&self, table: &Value) -> Result<(Box<dyn Trainable>, Value), TaskError> {
        let name = Task::name(self);
        let wrong = |reason| TaskError::Settings { task: name.to_owned(), reason };
        let (settings, complete) = settings::read::<T::Settings>(table).map_err(wrong)?;
        let opened = guard::call(name, OPEN, || Task::open(self, settings))?;
        Ok((Box::new(opened), complete))
    }
}

static TASK: OnceLock<Box<dyn AnyTask>> = OnceLock::new();

/// This process is a program of `task`: called once, first of all.
pub fn register(task: impl Task) {
    // A second one would be a mistake of `main`, which ends with the first call.
    let _ = TASK.set(Box::new(task));
}

/// The name of this program's task; `None`: it trains language models.
pub fn registered() -> Option<&'static str> {
    TASK.get().map(|task| task.name())
}

/// Checks that this program trains language models.
///
/// # Errors
/// [`TaskError::LanguageModel`] in the program of a task.
pub fn check_language_model() -> Result<(), TaskError> {
    match TASK.get() {
        None => Ok(()),
        Some(task) => Err(TaskError::LanguageModel { has: task.name().to_owned() }),
    }
}

/// A task with its settings, opened by this program.
pub struct Opened {
    /// The task, with its version and complete settings.
    pub task: OwnTask,
    /// How many samples it has.
    pub samples: Samples,
    /// Which data it has.
    pub identity: String,
    /// Its parameters, checked.
    pub parameters: Vec<Parameter>,
    pub(super) trainable: Box<dyn Trainable>,
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opened").field("task", &self.task).field("samples", &self.samples).finish_non_exhaustive()
    }
}

/// Opens the task of a run. Its version is 0 if the run is about to be created: then it is this program's.
///
/// # Errors
/// If this program has another task, or another version of it; and everything that is wrong with the task.
pub fn open(wanted: &OwnTask) -> Result<Opened, TaskError> {
    open_by(TASK.get().map(AsRef::as_ref), wanted)
}

fn open_by(task: Option<&dyn AnyTask>, wanted: &OwnTask) -> Result<Opened, TaskError> {
    let numbered = |version| if version == 0 { String::new() } else { format!(" (version {version})") };
    let other = |has: String| {
        let wanted = format!("{}{}", wanted.name, numbered(wanted.version));
        Err(TaskError::Other { wanted, has })
    };
    let Some(task) = task else { return other("trains language models alone".into()) };
    let (name, version) = (task.name(), task.version());
    if !crate::config::is_name(name) || version == 0 {
        let reason = "its name must be up to 64 letters, digits, '-' and '_', and its version at least 1";
        return Err(TaskError::Contents(format!("{name:?}, version {version}: {reason}")));
    }
    if name != wanted.name || (wanted.version != 0 && wanted.version != version) {
        return other(format!("trains task {name}{}", numbered(version)));
    }
    let (trainable, settings) = task.open(&wanted.settings)?;
    let looked = guard::call(name, "say what it is made of", || {
        Ok((trainable.samples(), trainable.identity(), trainable.parameters()))
    });
    let (samples, identity, parameters) = looked?;
    if samples.train == 0 {
        return Err(TaskError::Contents("it has no samples to train on".into()));
    }
    parameters::check(&parameters)?;
    let task = OwnTask { name: name.to_owned(), version, settings };
    Ok(Opened { task, samples, identity, parameters, trainable })
}

impl Opened {
    /// Elements of all parameters.
    pub fn elements(&self) -> u64 {
        self.parameters.iter().filter_map(Parameter::elements).fold(0, u64::saturating_add)
    }

    /// The identity of its data, as a run keeps it. All data of one task means the same to its parameters.
    pub fn data(&self) -> DatasetId {
        let sum = |text: &str| Crc64::of(text.as_bytes()).to_string();
        DatasetId { index: sum(&self.identity), vocabulary: sum(&self.task.name) }
    }

    pub(super) fn named(
        &self,
        kind: tch::Kind,
        device: tch::Device,
        seed: Option<u64>,
    ) -> Result<Named, crate::model::ModelError> {
        Named::new(&self.parameters, kind, device, seed)
    }
}

#[cfg(test)]
pub(super) fn open_for_test(task: impl Task, settings: Value) -> Result<Opened, TaskError> {
    let wanted = OwnTask { name: Task::name(&task).to_owned(), version: 0, settings };
    open_by(Some(&task), &wanted)
}
