//! The errors of a journal, and what to do about them.

use crate::{
    error::{Explain, Kind},
    faults::Injected,
    ids::{Generation, NodeId, RunId},
    storage::StorageError,
};

/// The errors of a journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The run id is taken.
    #[error("run id {run_id} exists already in store {store}")]
    Exists {
        /// The run id.
        run_id: RunId,
        /// The store.
        store: String,
    },
    /// There is no such run.
    #[error("run id {run_id} does not exist in store {store}")]
    NoSuchRun {
        /// The run id.
        run_id: RunId,
        /// The store.
        store: String,
    },
    /// The folder holds another run's journal.
    #[error("{folder} holds run {found}, not {wanted}: the folder was copied or renamed")]
    Copied {
        /// The folder.
        folder: String,
        /// The run whose journal this is.
        found: RunId,
        /// The run that was asked for.
        wanted: RunId,
    },
    /// A record is missing, unreadable, or contradicts those before it.
    #[error("journal record {object} {reason}")]
    Damaged {
        /// The object.
        object: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A record can't be read, and still can't when it is read again.
    #[error("journal record {object} {reason}")]
    Garbled {
        /// The object.
        object: String,
        /// What the object is instead.
        reason: String,
        /// Whether no record follows it.
        last: bool,
    },
    /// A summary of the journal contradicts the records, which are right.
    #[error("{object} disagrees with the records of the journal: {reason}")]
    Disagrees {
        /// The summary's key.
        object: String,
        /// The contradiction.
        reason: String,
    },
    /// A record was written by a newer version of this program.
    #[error("journal record {object} has format {format}, which this version can't read")]
    Newer {
        /// The object.
        object: String,
        /// Its format.
        format: u32,
    },
    /// Another node formed a newer generation than the one this writer holds: stop, write nothing more.
    #[error("fenced: node {node} formed generation {generation} of this run")]
    Fenced {
        /// Who formed it.
        node: NodeId,
        /// The newest generation.
        generation: Generation,
    },
    /// The group of nodes that this writer belonged to goes on without it: stop, write nothing more under this id.
    #[error("left out: node {node} formed generation {generation} of this run without this node: {why}")]
    LeftOut {
        /// Who formed it.
        node: NodeId,
        /// The newest generation.
        generation: Generation,
        /// The reason that its record gives.
        why: String,
    },
    /// Another node formed a generation while this one was about to.
    #[error("node {node} formed generation {generation} of this run first")]
    Overtaken {
        /// Who formed it.
        node: NodeId,
        /// The newest generation.
        generation: Generation,
    },
    /// A checkpoint was committed, damaged, cleared or pruned, or the run ended, just before a generation was formed:
    /// choose its resume point again from the current state.
    #[error("the run changed just before generation {generation} was formed: {what}")]
    Moved {
        /// The generation that was not formed.
        generation: Generation,
        /// The change.
        what: String,
    },
    /// The record would contradict the run's state.
    #[error("record {record} can't be appended: {reason}")]
    Refused {
        /// Its kind.
        record: &'static str,
        /// What it contradicts.
        reason: String,
    },
    /// The task that owns the journal has ended, which it does only when it panics.
    #[error("the task that writes the journal has ended")]
    NoWriter,
    /// The store failed. After an append the outcome is unknown; appending the same record again settles it.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A crash point asked for an error.
    #[error(transparent)]
    Injected(#[from] Injected),
}

impl Explain for JournalError {
    fn kind(&self) -> Kind {
        match self {
            Self::Exists { .. } => Kind::Usage,
            Self::NoSuchRun { .. } | Self::Copied { .. } | Self::Newer { .. } => Kind::Config,
            Self::Damaged { .. } | Self::Garbled { .. } | Self::Disagrees { .. } => Kind::Data,
            Self::Fenced { .. } | Self::LeftOut { .. } | Self::Overtaken { .. } => Kind::Fenced,
            Self::Moved { .. } | Self::Injected(_) => Kind::Unavailable,
            Self::Refused { .. } | Self::NoWriter => Kind::Bug,
            Self::Storage(error) => error.kind(),
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Exists { run_id, .. } => {
                Some(format!("continue it with `trainer resume --run-id {run_id}`, or choose another id"))
            }
            Self::NoSuchRun { .. } => {
                Some("check --run-id and --store; `trainer runs --store URI` lists the runs of a store".into())
            }
            Self::Copied { found, wanted, .. } => Some(format!(
                "a run keeps its id: name the folder {found}, in a store of its own if {found} goes on elsewhere; \
                 `trainer run --run-id {wanted}` begins a new run, and model.init_from takes a checkpoint's weights"
            )),
            Self::Newer { .. } => Some(
                "install the version of trainer that wrote it, or a newer one; `trainer --version` shows yours".into(),
            ),
            Self::Damaged { object, .. } | Self::Garbled { object, last: false, .. } => {
                Some(format!("nothing has been changed; {}", restore(object)))
            }
            Self::Garbled { object, last: true, .. } => Some(format!(
                "nothing has been changed; {}. If there is no copy, the run can continue from the record before this \
                newest one: move it away while no trainer works on this run: `{}`",
                restore(object),
                aside(object)
            )),
            Self::Disagrees { .. } => Some(
                "delete that object and try again: it only makes opening the run faster, and nothing else reads it"
                    .into(),
            ),
            Self::Fenced { .. } | Self::LeftOut { .. } | Self::Overtaken { .. } => Some(
                "the other node continues this run: `trainer status` shows its progress, and there is nothing to do \
                here"
                    .into(),
            ),
            Self::Moved { .. } => Some("run the same command again".into()),
            Self::Storage(error) => error.hint(),
            Self::Refused { .. } | Self::NoWriter | Self::Injected(_) => None,
        }
    }
}

/// How to restore an older version of an object.
fn restore(object: &str) -> String {
    let versions = object.strip_prefix("s3://").and_then(|rest| rest.split_once('/')).map(|(bucket, key)| {
        format!(", or from an older version: `aws s3api list-object-versions --bucket {bucket} --prefix {key}`")
    });
    format!("restore the object from a copy{}", versions.unwrap_or_default())
}

/// How to move an object to a name that is no record's.
fn aside(object: &str) -> String {
    let (command, path) = match object.split_once("://") {
        Some(("s3", _)) => ("aws s3 mv", object),
        Some(("gs", _)) => ("gcloud storage mv", object),
        Some(("file", path)) => ("mv", path),
        _ => ("move", object),
    };
    format!("{command} {path} {path}.bad")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_garbled_record_comes_with_the_command_to_type() {
        let hint = |object: &str, last| {
            let garbled = JournalError::Garbled { object: object.into(), reason: "is nothing".into(), last };
            garbled.hint().unwrap()
        };
        let versions = "`aws s3api list-object-versions --bucket b --prefix r/journal/7.json`";
        for last in [false, true] {
            let hint = hint("s3://b/r/journal/7.json", last);
            assert!(hint.contains(versions), "{hint}");
            let way_out = "`aws s3 mv s3://b/r/journal/7.json s3://b/r/journal/7.json.bad`";
            assert_eq!(hint.contains(way_out), last, "{hint}");
        }
        let hint = hint("file:///store/r/journal/7.json", true);
        assert!(hint.contains("`mv /store/r/journal/7.json /store/r/journal/7.json.bad`"), "{hint}");
        assert!(!hint.contains("aws"), "{hint}");
    }
}
