//! `trainer generate`

use std::{
    io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;
use serde::Serialize;

use super::{
    adapted::Adapted,
    args::{JsonArg, RunArg},
    export, output, store,
};
use crate::{
    checkpoint::export::{Form, Target},
    config::ModelKind,
    data::tokenizer::{EndToken, TextTokenizer},
    error::{Error, Kind, Result},
    history::{self, Which},
    ids::{Step, random_hex},
    layout,
    model::{self, ModelError, generate::GenerateSettings},
};

/// Generate text with a checkpoint's model
#[derive(Debug, Args)]
#[command(after_help = "Example: trainer generate --run-id first --prompt 'fn main() {' --tokens 100")]
pub struct Generate {
    #[command(flatten)]
    pub(super) run: RunArg,
    /// The checkpoint of this step, or `best`: of the lowest held-out loss [default: the newest]
    #[arg(long, value_name = "STEP")]
    step: Option<Which>,
    /// The beginning of the text
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// The maximum number of tokens to add
    #[arg(long, value_name = "N", default_value_t = 128)]
    tokens: u32,
    /// Randomness: 0 always takes the most likely token, 1 follows the model's own distribution, more is more random
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    temperature: f64,
    /// The same seed gives the same text
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
    /// The token that ends the text and precedes an empty prompt [default: the training data's]
    #[arg(long, value_name = "TOKEN")]
    eos_token: Option<String>,
    #[command(flatten)]
    json: JsonArg,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Generated<'a> {
    step: Step,
    prompt: &'a str,
    text: &'a str,
    tokens: usize,
}

impl Generate {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let folder = Scratch::new()?;
        // Below the private folder, since an export replaces the target with a folder of its own.
        let exported = folder.folder();
        let target = Target::Folder(exported.clone());
        let (step, adapted) = store::block_on(async {
            let state = history::read(&self.run.store.open()?, &self.run.run_id).await?;
            let model = &state.config().workload.model;
            // A program's own task is refused by name, before anything is fetched.
            model::context(model.kind, &model.config)?;
            let (step, _) = export::export(&self.run, self.step, &target, &Form::plain(export::part())).await?;
            Ok((step, Adapted::load(model, &exported).await?))
        })?;
        let ends = end_ids(&exported.join(layout::GENERATION_CONFIG))?;
        let tokenizer = tokenizer(&exported, self.eos_token.as_deref(), &ends)?;
        let model = match adapted {
            Some(adapted) => adapted.model,
            None => model::from_folder(ModelKind::Decoder, &exported)?,
        };
        // The files are no longer needed, and a long text may be interrupted.
        drop(folder);

        let mut prompt: Vec<u32> = tokenizer.bos_id()?.into_iter().collect();
        prompt.extend(tokenizer.encode(&self.prompt)?);
        if prompt.is_empty() {
            // A document begins after the end of another one.
            prompt.push(tokenizer.eos_id());
        }
        let settings = GenerateSettings {
            max_new_tokens: self.tokens,
            temperature: self.temperature,
            seed: self.seed,
            stop: if self.eos_token.is_some() { vec![tokenizer.eos_id()] } else { with(ends, tokenizer.eos_id()) },
        };
        let mut live =
            Live { tokenizer: &tokenizer, tokens: Vec::new(), shown: 0, quiet: self.json.json, read: Ok(true) };
        live.say(&self.prompt);
        let new = model::generate::generate(model.as_ref(), &prompt, &settings, |token| live.token(token))
            .map_err(|error| as_usage(error, self.temperature))?;
        let text = tokenizer.decode(&new)?;
        live.say(text.get(live.shown..).unwrap_or_default());
        live.say("\n");
        live.read?;
        let longest = model.max_sequence_length() as usize;
        // The last token that is made is no input.
        if (prompt.len() + new.len()).saturating_sub(1) > longest {
            tracing::warn!(
                "the model reads {longest} positions: tokens beyond follow from the last {longest} alone, and programs \
                 that go on with more positions make others"
            );
        }
        if self.json.json {
            let generated = Generated { step, prompt: &self.prompt, text: &text, tokens: new.len() };
            output::emit(&output::json_lines([&generated])?)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The tokenizer of a checkpoint, with the requested end token or else the data's. Of several tokens that end a text,
/// that is the one in the tokenizer's settings.
fn tokenizer(folder: &Path, asked: Option<&str>, ends: &[u32]) -> Result<TextTokenizer> {
    let path = folder.join(layout::TOKENIZER);
    if let Some(token) = asked {
        return Ok(TextTokenizer::load_with(&path, EndToken::Named(token))?);
    }
    let settings = std::fs::read(folder.join(layout::TOKENIZER_CONFIG)).unwrap_or_default();
    let settings: serde_json::Value = serde_json::from_slice(&settings).unwrap_or_default();
    let token = settings.get("eos_token").map(|token| token.get("content").unwrap_or(token));
    if let Some(token) = token.and_then(serde_json::Value::as_str)
        && let Ok(tokenizer) = TextTokenizer::load_with(&path, EndToken::Named(token))
        && ends.contains(&tokenizer.eos_id())
    {
        return Ok(tokenizer);
    }
    Ok(TextTokenizer::load_with(&path, EndToken::OneOf(ends))?)
}

/// The end tokens that a checkpoint names: the one between its data's documents, or those of the model's configuration.
fn end_ids(generation_config: &Path) -> Result<Vec<u32>> {
    let text = match std::fs::read(generation_config) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            let doing = format!("read {}", generation_config.display());
            return Err(Error::from_source(Kind::Unavailable, error).context(doing));
        }
    };
    // Written by this program, and verified against its checksum: the file is trusted.
    let config: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    let id = |value: &serde_json::Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    Ok(match config.get("eos_token_id") {
        Some(serde_json::Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    })
}

fn with(mut ids: Vec<u32>, id: u32) -> Vec<u32> {
    if !ids.contains(&id) {
        ids.push(id);
    }
    ids
}

/// An unusable temperature was typed here: wrong usage, not wrong configuration.
fn as_usage(error: ModelError, temperature: f64) -> Error {
    if temperature >= 0.0 && temperature.is_finite() {
        return error.into();
    }
    Error::from_source(Kind::Usage, error)
}

/// Shows text as it comes. A character's bytes may be spread over tokens: incomplete ones wait.
struct Live<'a> {
    tokenizer: &'a TextTokenizer,
    tokens: Vec<u32>,
    /// Bytes of the decoded text that are shown.
    shown: usize,
    /// Nothing is shown.
    quiet: bool,
    /// Whether someone still reads.
    read: Result<bool>,
}

impl Live<'_> {
    /// Adds a token; returns whether anybody still reads the text.
    fn token(&mut self, token: u32) -> bool {
        self.tokens.push(token);
        if !self.quiet {
            self.show();
        }
        matches!(self.read, Ok(true))
    }

    fn show(&mut self) {
        let Ok(text) = self.tokenizer.decode(&self.tokens) else { return };
        let whole = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        if let Some(new) = whole.get(self.shown..) {
            self.say(new);
            self.shown = whole.len().max(self.shown);
        }
    }

    fn say(&mut self, text: &str) {
        if !self.quiet && matches!(self.read, Ok(true)) {
            self.read = output::show(text);
        }
    }
}

/// A temporary folder; empty at first.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("trainer-generate-{}", random_hex(8)));
        make_private(&path).map_err(|error| {
            let kind = match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Kind::Config,
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Kind::Permission,
                _ => Kind::Unavailable,
            };
            let error = Error::from_source(kind, error).context(format!("make temporary folder {}", path.display()));
            match kind {
                Kind::Unavailable => error,
                _ => error.with_hint("set TMPDIR to a folder that exists, which you may write to"),
            }
        })?;
        Ok(Self(path))
    }

    /// A folder in it that does not exist yet.
    pub(super) fn folder(&self) -> PathBuf {
        self.0.join("model")
    }
}

/// Makes a folder private: other users of this machine must not read the weights.
fn make_private(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().mode(0o700).create(path)
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(folder = %self.0.display(), %error, "can't remove a temporary folder");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_tokens_are_those_of_the_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(layout::GENERATION_CONFIG);
        assert!(end_ids(&path).unwrap().is_empty());
        for (text, ids) in [
            ("{\"eos_token_id\": 7}", &[7][..]),
            ("{\"eos_token_id\": [7, 9]}", &[7, 9]),
            ("{\"eos_token_id\": null}", &[]),
            ("{}", &[]),
        ] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(end_ids(&path).unwrap(), ids, "{text}");
        }
        assert_eq!(with(vec![7], 7), [7]);
        assert_eq!(with(vec![], 7), [7]);
    }

    #[test]
    fn of_several_end_tokens_the_one_of_the_data_begins_a_text() {
        let dir = tempfile::tempdir().unwrap();
        let added = |id: u32, content: &str| {
            serde_json::json!({
                "id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false,
            })
        };
        let json = serde_json::json!({
            "version": "1.0", "added_tokens": [added(1, "<|stop|>"), added(2, "<|data|>")],
            "model": { "type": "WordLevel", "unk_token": "?", "vocab": { "a": 0 } },
        });
        std::fs::write(dir.path().join(layout::TOKENIZER), json.to_string()).unwrap();
        let begins = |settings: &str, asked, ends: &[u32]| {
            std::fs::write(dir.path().join(layout::TOKENIZER_CONFIG), settings).unwrap();
            tokenizer(dir.path(), asked, ends).unwrap().eos_id()
        };
        assert_eq!(begins("{\"eos_token\": \"<|data|>\"}", None, &[1, 2]), 2);
        assert_eq!(begins("{\"eos_token\": {\"content\": \"<|data|>\"}}", None, &[1, 2]), 2);
        assert_eq!(begins("{\"eos_token\": \"<|data|>\"}", Some("<|stop|>"), &[1, 2]), 1);
        // Tokens that the settings name but no text ends with, or that don't exist.
        assert_eq!(begins("{\"eos_token\": \"<|data|>\"}", None, &[1]), 1);
        for settings in ["{\"eos_token\": \"<|other|>\"}", "{\"eos_token\": null}", "{}", ""] {
            assert_eq!(begins(settings, None, &[2, 1]), 2, "{settings}");
        }
    }
}
