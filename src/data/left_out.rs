//! The inputs that are not trained on: counted, reported, and only a small part of all.

use std::collections::BTreeMap;

use super::{
    DataError,
    documents::Outcome,
    input::{Input, Place},
    prepare::{PrepareEvent, PrepareSettings},
};
use crate::report::human::plural;

/// This many inputs per hundred may be left out without an option: a source tree has some pictures.
const PER_CENT: usize = 5;
/// The most inputs that an error names.
const NAMED: usize = 3;

/// Counts the inputs left out of one preparation.
pub(super) struct LeftOut<'a> {
    settings: &'a PrepareSettings,
    inputs: &'a [Input],
    progress: &'a (dyn Fn(PrepareEvent) + Send + Sync),
    skipped: BTreeMap<usize, String>,
    bad_records: u64,
    objects_as_text: u64,
}

impl<'a> LeftOut<'a> {
    pub(super) fn new(
        settings: &'a PrepareSettings,
        inputs: &'a [Input],
        progress: &'a (dyn Fn(PrepareEvent) + Send + Sync),
    ) -> Self {
        Self { settings, inputs, progress, skipped: BTreeMap::new(), bad_records: 0, objects_as_text: 0 }
    }

    /// Leaves out the inputs that are known to be unreadable before any is read.
    pub(super) fn unreadable(&mut self) -> Result<(), DataError> {
        for (number, input) in self.inputs.iter().enumerate() {
            if let Place::Unreadable(reason) = &input.place {
                self.add(number, Outcome::Skipped(reason.clone()))?;
            }
        }
        Ok(())
    }

    pub(super) fn contains(&self, number: usize) -> bool {
        self.skipped.contains_key(&number)
    }

    /// Records the outcome of an input; too many left out are an error.
    pub(super) fn add(&mut self, number: usize, outcome: Outcome) -> Result<(), DataError> {
        let Some(input) = self.inputs.get(number) else { return Ok(()) };
        match outcome {
            Outcome::Done(notes) => {
                self.objects_as_text += u64::from(notes.object_as_text);
                self.bad_records += notes.bad_records;
                if let Some(bad) = notes.bad {
                    let left_out = plural(notes.bad_records, "record");
                    self.warn(format!("{left_out} of {} left out, the first: {bad}", input.name));
                } else if notes.records && notes.documents == 0 {
                    self.warn(format!("{} holds no record with a text in {:?}", input.name, self.settings.text_field));
                }
                Ok(())
            }
            Outcome::Skipped(reason) => {
                if !self.settings.skip_unreadable && input.named {
                    let files = plural(self.inputs.len() as u64, "file");
                    let reason = format!("{reason} (1 of {files}; --skip-unreadable continues without it)");
                    return Err(DataError::Input { input: input.name.clone(), reason });
                }
                (self.progress)(PrepareEvent::Skipped { input: input.name.clone(), reason: reason.clone() });
                self.skipped.insert(number, reason);
                if self.settings.skip_unreadable || self.skipped.len() * 100 <= self.inputs.len() * PER_CENT {
                    return Ok(());
                }
                Err(self.too_many())
            }
        }
    }

    fn too_many(&self) -> DataError {
        let first: Vec<String> = self
            .skipped
            .iter()
            .take(NAMED)
            .filter_map(|(&number, reason)| Some(format!("{} {reason}", self.inputs.get(number)?.name)))
            .collect();
        let reason = format!(
            "{} of {} files, of those looked at so far, can't be read. More than {PER_CENT} % are an error without \
             --skip-unreadable. The first: {}",
            self.skipped.len(),
            self.inputs.len(),
            first.join("; ")
        );
        DataError::Input { input: self.settings.inputs_in_words(), reason }
    }

    fn warn(&self, message: String) {
        (self.progress)(PrepareEvent::Warning { message });
    }

    /// Reports the rest, and returns how many inputs and records were left out.
    pub(super) fn finish(self) -> (u64, u64) {
        if self.objects_as_text > 0 {
            self.warn(format!(
                "{} of {} files hold one JSON object without a text in {:?} and were taken as plain text; name another \
                 field with --text-field",
                self.objects_as_text,
                self.inputs.len(),
                self.settings.text_field
            ));
        }
        (self.skipped.len() as u64, self.bad_records)
    }
}
