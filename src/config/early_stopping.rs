//! When a run ends before its last step: its held-out loss has stopped falling.
//!
//! Stored layout: `early_stopping` in the section `train`, if the run may stop early.

use serde::{Deserialize, Serialize};

use super::{Cadence, CheckpointConfig, ConfigError, RunConfig, error::Origin, raw::Raw};

/// A run ends early once its held-out loss has stopped falling.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EarlyStopping {
    /// Validations in a row without a lower loss after which the run ends; at least 1.
    pub patience: u32,
    /// A loss counts as lower if it is lower than the best by more than this.
    pub min_delta: f64,
}

/// When the run ends early, if it may.
pub(super) fn read(raw: &Raw) -> Result<Option<EarlyStopping>, ConfigError> {
    let patience = raw.whole("train.early_stopping.patience", 0..=u32::MAX)?;
    let expected = "a number, at least 0";
    let min_delta = raw.number("train.early_stopping.min_delta", |n| n >= 0.0 && n.is_finite(), expected)?;
    match (patience, raw.origin("train.early_stopping.min_delta")) {
        (0, Origin::Default | Origin::Run) => Ok(None),
        (0, _) => Err(ConfigError::Together(
            "train.early_stopping.min_delta is set, but train.early_stopping.patience is 0, so the run never stops \
             early: set train.early_stopping.patience, such as 3"
                .into(),
        )),
        _ => Ok(Some(EarlyStopping { patience, min_delta })),
    }
}

/// A run that may stop early measures its states, and saves and keeps the best of them.
pub(super) fn check(config: &RunConfig) -> Result<(), ConfigError> {
    let Some(EarlyStopping { patience, .. }) = config.workload.train.early_stopping else { return Ok(()) };
    let (validated, CheckpointConfig { every, keep, .. }) = (config.workload.data.validation_every, &config.checkpoint);
    let refuse = |why: String| Err(ConfigError::Together(format!("train.early_stopping.patience = {patience} {why}")));
    if validated == 0 {
        return refuse("needs a held-out loss: set data.validation_every, such as 100".into());
    }
    if keep.best == 0 {
        return refuse(
            "needs checkpoint.keep.best of at least 1: the best checkpoint is the one that is wanted".into(),
        );
    }
    match every {
        Cadence::Steps(every) if !validated.is_multiple_of((*every).max(1)) => refuse(format!(
            "needs a checkpoint of each validated step: make data.validation_every = {validated} a multiple of \
             checkpoint.every = \"{every} steps\", or set checkpoint.every = \"auto\""
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{apply_overrides, tests::load_least};

    fn refused(lines: &str) -> String {
        load_least(lines).unwrap_err().to_string()
    }

    #[test]
    fn a_run_that_may_stop_early_keeps_its_best_checkpoint() {
        let config = load_least("data.validation_every = 10\n[train.early_stopping]\npatience = 3").unwrap();
        let stopping = config.workload.train.early_stopping;
        assert_eq!(stopping, Some(EarlyStopping { patience: 3, min_delta: 0.0 }));
        assert_eq!(config.checkpoint.keep.best, 1);
        // Off by default, and on a resume.
        assert_eq!(load_least("").unwrap().workload.train.early_stopping, None);
        let set = |pairs: &[(&str, &str)]| {
            let pairs: Vec<_> = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            apply_overrides(&config, &pairs).map(|config| config.workload.train.early_stopping)
        };
        assert_eq!(set(&[("train.early_stopping.patience", "0")]).unwrap(), None);
        let both = [("train.early_stopping.patience", "5"), ("train.early_stopping.min_delta", "0.25")];
        assert_eq!(set(&both).unwrap(), Some(EarlyStopping { patience: 5, min_delta: 0.25 }));
        assert!(set(&[("data.validation_every", "0")]).is_err());
    }

    #[test]
    fn contradictions_are_refused_by_name() {
        let on = "[train.early_stopping]\npatience = 3";
        for (lines, names) in [
            (on.to_owned(), "data.validation_every"),
            (format!("data.validation_every = 10\ncheckpoint.keep.best = 0\n{on}"), "checkpoint.keep.best"),
            (format!("data.validation_every = 10\ncheckpoint.every = \"20 steps\"\n{on}"), "a multiple of"),
            ("train.early_stopping.min_delta = 0.1".to_owned(), "patience is 0"),
            ("train.early_stopping.min_delta = -1".to_owned(), "min_delta"),
        ] {
            let message = refused(&lines);
            assert!(message.contains(names) && message.contains("train.early_stopping"), "{message}");
        }
        let lines = format!("data.validation_every = 40\ncheckpoint.every = \"20 steps\"\n{on}");
        assert!(load_least(&lines).is_ok());
    }
}
