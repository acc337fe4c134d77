//! All key names of a run; no other file spells one out.
//!
//! ```text
//! <store>/<run-id>/
//!   journal/00000000000000000000.json …     numbered from 0 without a gap, created once
//!   summaries/16/0…0128/0…0144 …            records 128 to 143 once more: a long run opens faster; created once
//!   nodes/<node-id>.json                    heartbeat, overwritten by its owner alone
//!   nodes/<node-id>/trace-g0003-r00002     what rank 2 of generation 3 told of its collectives before it was killed
//!   drains/g0003.json                       somebody asks generation 3 to save and stop; created once
//!   metrics/g0003-s00001101-s00001200-<attempt>.parquet   the figures of steps 1101 to 1200; created once
//!   checkpoints/s00001200-g0003/            data of one attempt; a (step, generation) pair is written once
//!      model-00001-of-00004.safetensors     model.safetensors.index.json
//!      config.json  tokenizer.json  generation_config.json
//!      tokenizer_config.json, and other files of a tokenizer where the run's weights came with them
//!      adapter_model.safetensors            adapter_config.json, instead of all weights, where adapters are trained
//!      task.json                            instead of config.json and a tokenizer, where a program's task is trained
//!      optimizer-00001-of-00004.safetensors trainer_state.json  receipt-<node-id>.json  manifest.json
//! ```
//! Numbers are padded so that listings read well, but they are compared as numbers: padding is not a limit.

use crate::ids::{AttemptId, Generation, NodeId, Rank, Step};

/// Folder of the journal.
pub const JOURNAL: &str = "journal";
/// Folder of the journal's summaries.
pub const SUMMARIES: &str = "summaries";
/// Folder of the heartbeats.
pub const NODES: &str = "nodes";
/// Folder of the requests to save and stop.
pub const DRAINS: &str = "drains";
/// Folder of the figures of steps.
pub const METRICS: &str = "metrics";
/// Folder of the checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";
/// Name of a checkpoint's manifest.
pub const MANIFEST: &str = "manifest.json";
/// Name of the file with a checkpoint's state outside the tensors.
pub const TRAINER_STATE: &str = "trainer_state.json";
/// Name of the list of weights and their files (Hugging Face).
pub const MODEL_INDEX: &str = "model.safetensors.index.json";
/// Name of the model's description (Hugging Face).
pub const MODEL_CONFIG: &str = "config.json";
/// Name of the tokenizer (Hugging Face `tokenizers`).
pub const TOKENIZER: &str = "tokenizer.json";
/// Name of the tokenizer's settings (Hugging Face).
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// Name of a list of the special tokens (Hugging Face, until version 4 of transformers).
pub const SPECIAL_TOKENS: &str = "special_tokens_map.json";
/// Names of the files of a tokenizer beside `tokenizer.json`, chat templates included (Hugging Face).
pub const TOKENIZER_FILES: [&str; 14] = [
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    "added_tokens.json",
    CHAT_TEMPLATE,
    CHAT_TEMPLATE_JSON,
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer.tiktoken",
    "vocab.json",
    "vocab.txt",
];
/// Name of the file with a tokenizer's chat template (Hugging Face, since version 4.43 of transformers).
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// Name of another file with a chat template (Hugging Face).
pub const CHAT_TEMPLATE_JSON: &str = "chat_template.json";
/// Folder, within a tokenizer's, of further chat templates (Hugging Face).
pub const ADDITIONAL_TEMPLATES: &str = "additional_chat_templates";
/// Name of the generation defaults (Hugging Face).
pub const GENERATION_CONFIG: &str = "generation_config.json";
/// Name of a whole model in one file (Hugging Face).
pub const MODEL: &str = "model.safetensors";
/// How the names of files of tensors end.
pub const SAFETENSORS: &str = ".safetensors";
/// Begins the name of a weight's fp32 values in files of moments, where the weights themselves are rounded.
pub const MASTER: &str = "master.";
/// Name of the file with a model's adapters (PEFT).
pub const ADAPTER: &str = "adapter_model.safetensors";
/// Name of the description of a model's adapters (PEFT).
pub const ADAPTER_CONFIG: &str = "adapter_config.json";

/// Name of the description of a program's own task.
pub const TASK: &str = "task.json";

/// Folder, at the root of the store, of the probe keys.
pub const PROBES: &str = ".trainer-probes";

/// Key of one journal record.
pub fn journal_entry(number: u64) -> String {
    format!("{JOURNAL}/{number:020}.json")
}

/// The number of a journal record's key; `None` for anything else.
pub fn journal_number(key: &str) -> Option<u64> {
    let digits = key.strip_prefix(JOURNAL)?.strip_prefix('/')?.strip_suffix(".json")?;
    (digits.len() == 20 && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// Folder of the summaries that end on a multiple of `span` and begin at record `from`; `None`: each begins where the
/// one before it ends.
pub fn summaries(span: u64, from: Option<u64>) -> String {
    match from {
        Some(from) => format!("{SUMMARIES}/{span}/{from:020}"),
        None => format!("{SUMMARIES}/{span}/all"),
    }
}

/// The number that a summary's key ends with; `None` for anything else.
pub fn summary_number(key: &str) -> Option<u64> {
    let (_, digits) = key.strip_prefix(SUMMARIES)?.rsplit_once('/')?;
    (digits.len() == 20 && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// Key of a node's heartbeat.
pub fn heartbeat(node: &NodeId) -> String {
    format!("{NODES}/{node}.json")
}

/// Key of the trace of a rank's collectives, which its node keeps.
pub fn trace(node: &NodeId, generation: Generation, rank: Rank) -> String {
    format!("{NODES}/{node}/trace-g{:04}-r{:05}", generation.get(), rank.get())
}

/// The generation whose ranks a trace is of; `None` for any other key.
pub fn trace_generation(key: &str) -> Option<Generation> {
    let (node, name) = key.strip_prefix(NODES)?.strip_prefix('/')?.split_once('/')?;
    let (generation, rank) = name.strip_prefix("trace-g")?.split_once("-r")?;
    let generation = Generation(generation.parse().ok()?);
    let key_is_ours = trace(&NodeId::new(node).ok()?, generation, Rank(rank.parse().ok()?)) == key;
    key_is_ours.then_some(generation)
}

/// The node of a heartbeat's key; `None` for anything else.
pub fn heartbeat_node(key: &str) -> Option<NodeId> {
    let name = key.strip_prefix(NODES)?.strip_prefix('/')?.strip_suffix(".json")?;
    NodeId::new(name).ok()
}

/// Key of the request that a generation should save and stop.
pub fn drain(generation: Generation) -> String {
    format!("{DRAINS}/g{:04}.json", generation.get())
}

/// Key of the figures of steps from `first` to `last`, the first of them from `generation`. No two have one attempt.
pub fn metrics(generation: Generation, first: Step, last: Step, attempt: &AttemptId) -> String {
    format!("{METRICS}/g{:04}-s{:08}-s{:08}-{attempt}.parquet", generation.get(), first.get(), last.get())
}

/// Whether a key is one of [`metrics`].
pub fn is_metrics(key: &str) -> bool {
    key.strip_prefix(METRICS).and_then(|key| key.strip_prefix('/')?.strip_suffix(".parquet")).is_some()
}

/// Folder of one attempt at a checkpoint.
pub fn checkpoint(step: Step, generation: Generation) -> String {
    format!("{CHECKPOINTS}/s{:08}-g{:04}", step.get(), generation.get())
}

/// The step and generation of a checkpoint folder's name (its last part); `None` for anything else.
pub fn parse_checkpoint(name: &str) -> Option<(Step, Generation)> {
    let (step, generation) = name.strip_prefix('s')?.split_once("-g")?;
    let digits =
        |text: &str| (!text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?;
    Some((Step(digits(step)?), Generation(digits(generation)?)))
}

/// Name of a node's receipt within a checkpoint folder.
pub fn receipt(node: &NodeId) -> String {
    format!("receipt-{node}.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_as_numbers() {
        assert_eq!(journal_number(&journal_entry(17)), Some(17));
        assert_eq!(journal_number("journal/17.json"), None);
        assert_eq!(journal_number("journal/0000000000000000000x.json"), None);
        let (step, generation) = (Step(123_456_789_012), Generation(70_000));
        let key = checkpoint(step, generation);
        assert_eq!(parse_checkpoint(key.rsplit('/').next().unwrap()), Some((step, generation)));
        assert_eq!(checkpoint(Step(1200), Generation(3)), "checkpoints/s00001200-g0003");
        assert_eq!(parse_checkpoint("s+1-g1"), None);
        assert_eq!(parse_checkpoint("latest"), None);
        let node = NodeId::new("n1").unwrap();
        assert_eq!(heartbeat_node(&heartbeat(&node)), Some(node));
        for other in ["nodes/n1", "nodes/a/b.json", "nodes/.json", "drains/n1.json"] {
            assert_eq!(heartbeat_node(other), None, "{other}");
        }
    }
}
