//! How a preparation lays its documents out: what the settings and the tokenizer's folder come to.

use std::collections::BTreeMap;

use jiff::civil::Date;

use super::{
    DataError,
    chat::Chats,
    given::Given,
    marks::Documents,
    prepare::PrepareSettings,
    shards::FileEntry,
    tokenizer::{EndToken, Framing, TextTokenizer, framing},
};
use crate::storage::Crc64;

/// What an input's records hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DocumentFormat {
    /// A text each.
    #[default]
    Text,
    /// Messages.
    Chat,
}

/// How documents are laid out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayoutSettings {
    /// What records hold.
    pub format: DocumentFormat,
    /// Whole documents in rows, for text.
    pub pack: bool,
    /// The sequence length that rows are cut for.
    pub sequence_length: Option<u32>,
    /// Whether documents of a stream are marked, so that they don't attend to each other.
    pub apart: bool,
    /// The day that a chat template is told.
    pub date: Option<Date>,
    /// The name of the chat template, of several; `None`: as transformers chooses.
    pub chat_template: Option<String>,
    /// Leave out documents that are longer than a row; without, they are an error.
    pub drop_too_long: bool,
    /// Leave out chats without a target; without, they are an error.
    pub drop_without_target: bool,
}

impl LayoutSettings {
    /// Whether whole documents are packed into rows.
    pub(super) fn in_rows(&self) -> bool {
        self.pack || self.format == DocumentFormat::Chat
    }

    /// Refuses contradictions.
    pub(super) fn check(&self) -> Result<(), DataError> {
        let refuse = |setting, reason: &str| Err(DataError::Setting { setting, reason: reason.into() });
        match self.sequence_length {
            None if self.in_rows() => {
                return refuse(
                    "--sequence-length",
                    "is missing: whole documents are packed into rows for one data.sequence_length; give the run's",
                );
            }
            Some(_) if !self.in_rows() => {
                return refuse("--sequence-length", "is of no use without --pack or --format chat; leave it out");
            }
            Some(length) if !(1..=1 << 24).contains(&length) => {
                return refuse("--sequence-length", "is not between 1 and 16,777,216");
            }
            _ => {}
        }
        if self.apart && self.in_rows() {
            return refuse("--documents", "rows keep documents apart already; leave it out");
        }
        if self.format == DocumentFormat::Text {
            if self.date.is_some() {
                return refuse("--date", "is told to a chat template, so it needs --format chat");
            }
            if self.chat_template.is_some() {
                return refuse("--chat-template", "is about chats, so it needs --format chat");
            }
            if self.drop_without_target {
                return refuse("--without-target", "is about chats, so it needs --format chat");
            }
        }
        if self.drop_too_long && !self.in_rows() {
            return refuse("--too-long", "is about rows, so it needs --pack or --format chat");
        }
        Ok(())
    }

    /// What of it decides the output, for the recipe; nothing for a stream as it always was.
    pub(super) fn recipe(&self) -> String {
        if *self == Self::default() {
            return String::new();
        }
        let Self { format, pack, sequence_length, apart, date, chat_template, drop_too_long, drop_without_target } =
            self;
        let date = date.map(|date| date.to_string()).unwrap_or_default();
        let template = chat_template.as_ref().map(|name| format!(" template {name:?}")).unwrap_or_default();
        format!(
            "{format:?} pack {pack} length {sequence_length:?} apart {apart} date {date} without too long \
             {drop_too_long} without targetless {drop_without_target}{template}\n"
        )
    }
}

/// The tokenizer of a preparation, and what goes with it.
pub(super) struct Prepared {
    pub tokenizer: TextTokenizer,
    /// What the tokenizer puts around a text.
    pub framing: Framing,
    /// Set for chats.
    pub chats: Option<Chats>,
}

/// Loads a given tokenizer, with the end token that the settings, the folder or the tokenizer name, in this order. A
/// folder's tokenizer may name another end than its model has: the model's counts, since it is the model that ends.
pub(super) fn load(given: &Given, settings: &PrepareSettings) -> Result<Prepared, DataError> {
    let framing = framing(&given.json, &given.name)?;
    for message in given.contradictions()? {
        tracing::warn!("{}: {message}", given.name);
    }
    let (tokens, models) = (given.special_tokens()?, given.eos_ids()?);
    let load = |end| TextTokenizer::from_json(given.json.clone(), &given.name, end);
    let tokenizer = match (&settings.eos_token, tokens.get("eos_token"), framing.eos_id) {
        (Some(token), ..) => load(EndToken::Named(token))?,
        (None, Some(token), _) => {
            let named = load(EndToken::Named(token))?;
            let ends = models.is_empty() || models.contains(&named.eos_id());
            if ends { named } else { of_the_model(given, token, load(EndToken::OneOf(&models))?) }
        }
        (None, None, Some(id)) => load(EndToken::OneOf(&[id]))?,
        (None, None, None) if models.is_empty() => load(EndToken::Known)?,
        (None, None, None) => load(EndToken::OneOf(&models))?,
    };
    let chats = match settings.layout.format {
        DocumentFormat::Text => None,
        DocumentFormat::Chat => Some(chats(given, settings, &tokenizer, &tokens)?),
    };
    Ok(Prepared { tokenizer, framing, chats })
}

/// Says that the model's end token is taken, not the one that the tokenizer's settings name.
fn of_the_model(given: &Given, token: &str, model: TextTokenizer) -> TextTokenizer {
    let ids = [model.eos_id()];
    let text = model.decode(&ids).unwrap_or_default();
    tracing::warn!(
        "{}: the tokenizer's settings end a text with {token:?}, the model with {text:?}, which is taken; --eos-token \
         names another one",
        given.name
    );
    model
}

fn chats(
    given: &Given,
    settings: &PrepareSettings,
    tokenizer: &TextTokenizer,
    tokens: &BTreeMap<String, String>,
) -> Result<Chats, DataError> {
    let failed = |reason: String| DataError::Tokenizer { file: given.name.clone(), reason };
    let templates = given.chat_templates()?.ok_or_else(|| {
        failed(
            "has no chat template; give the folder of a chat model, or put a chat_template.jinja into a folder beside \
             its tokenizer.json"
                .into(),
        )
    })?;
    let chosen = templates.choose(settings.layout.chat_template.as_deref()).map_err(failed)?;
    Chats::new(tokenizer, &chosen, tokens, settings.layout.date).map_err(failed)
}

/// What the index says beyond format 1; `None`: nothing.
pub(super) fn documents(given: Option<&Given>, settings: &PrepareSettings, framing: Framing) -> Option<Documents> {
    let files: Vec<FileEntry> = given
        .map(|given| &given.files)
        .into_iter()
        .flatten()
        .map(|(name, bytes)| FileEntry { file: name.clone(), bytes: bytes.len() as u64, crc64: Crc64::of(bytes) })
        .collect();
    let plain = settings.layout == LayoutSettings::default() && framing.bos_id.is_none() && files.is_empty();
    (!plain).then(|| Documents {
        bos_id: framing.bos_id.filter(|_| settings.layout.format == DocumentFormat::Text),
        packed: settings.layout.sequence_length.filter(|_| settings.layout.in_rows()),
        files,
        ..Documents::default()
    })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::json;

    use super::*;
    use crate::{
        data::prepare::TokenizerSource,
        layout::{GENERATION_CONFIG, MODEL_CONFIG, TOKENIZER_CONFIG},
    };

    #[test]
    fn a_text_ends_with_the_tokenizers_end_token_unless_the_model_has_others() {
        let added = |id: u32, content: &str| {
            json!({
                "id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false,
            })
        };
        let tokenizer = json!({
            "version": "1.0", "added_tokens": [added(1, "<|stop|>"), added(2, "<|data|>"), added(3, "</s>")],
            "model": { "type": "WordLevel", "unk_token": "?", "vocab": { "a": 0 } },
        });
        let file = |name: &str, value: serde_json::Value| (name.to_owned(), Bytes::from(value.to_string()));
        let ends = |model: serde_json::Value, generation: serde_json::Value, asked: Option<&str>| {
            let files = vec![
                file(TOKENIZER_CONFIG, json!({"eos_token": "<|data|>"})),
                file(MODEL_CONFIG, json!({ "eos_token_id": model })),
                file(GENERATION_CONFIG, json!({ "eos_token_id": generation })),
            ];
            let given = Given { name: "model".into(), json: tokenizer.to_string().into_bytes(), files };
            let mut settings = PrepareSettings::new(Vec::new(), TokenizerSource::File("model".into()), "out");
            settings.eos_token = asked.map(str::to_owned);
            load(&given, &settings).unwrap().tokenizer.eos_id()
        };
        assert_eq!(ends(json!(null), json!(null), None), 2);
        assert_eq!(ends(json!(2), json!(null), None), 2);
        assert_eq!(ends(json!([1, 2]), json!(null), None), 2, "one of several");
        assert_eq!(ends(json!(1), json!([2, 1]), None), 2, "the generation settings know it");
        assert_eq!(ends(json!(1), json!(null), None), 1, "the model has another one");
        assert_eq!(ends(json!(null), json!([1]), None), 1);
        assert_eq!(ends(json!(1), json!(1), Some("</s>")), 3, "a person names one");
    }
}
