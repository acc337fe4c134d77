//! Progress reports of a preparation.

use serde::Serialize;

/// The phase of a preparation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// It reads text to train a tokenizer on.
    Sampling,
    /// It trains the tokenizer.
    TokenizerTraining,
    /// It encodes all inputs.
    Encoding,
    /// It writes the rest: the tokenizer and the index.
    Writing,
}

/// The events of a preparation.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum PrepareEvent {
    /// The inputs are known.
    Found {
        /// Files.
        files: u64,
        /// Their bytes, as stored.
        bytes: u64,
    },
    /// A tokenizer is being trained.
    TokenizerTraining {
        /// Bytes of text that it is trained on.
        sample_bytes: u64,
    },
    /// The tokenizer is ready.
    TokenizerReady {
        /// Entries of its vocabulary.
        vocab_size: u32,
    },
    /// A phase begins or, with seconds, continues.
    Phase {
        /// The phase.
        phase: Phase,
        /// How long it has taken.
        seconds: u64,
    },
    /// Text for the tokenizer is being read.
    Sampling {
        /// Bytes of the input files read or skipped, as stored.
        input_bytes: u64,
        /// Bytes of all input files.
        input_bytes_total: u64,
        /// Text taken, bytes.
        sample_bytes: u64,
    },
    /// Inputs are being fetched from their stores.
    Fetching {
        /// Bytes fetched.
        bytes: u64,
        /// Bytes of all inputs that lie in stores.
        bytes_total: u64,
    },
    /// The work done so far.
    Progress {
        /// Bytes of finished input files, as stored.
        input_bytes: u64,
        /// Bytes of all input files.
        input_bytes_total: u64,
        /// Text encoded, bytes.
        text_bytes: u64,
        /// Tokens of both splits.
        tokens: u64,
    },
    /// An input was left out.
    Skipped {
        /// Its path or URI.
        input: String,
        /// Why.
        reason: String,
    },
    /// A person should know this.
    Warning {
        /// The message.
        message: String,
    },
}
