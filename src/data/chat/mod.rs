//! Chats: records of messages, rendered by the chat template of the tokenizer's folder, as ids of which those that the
//! assistant generates are targets.
//!
//! ```text
//! {"messages": […], "tools": […]} ──marked──► template ──turns──► text and turns ──open tokenizer──► ids, targets
//! ```
//! The ids are those of transformers' `apply_chat_template(messages, tools=…, tokenize=True)`. One thing differs: text
//! that spells a special token stays text, as with its `sanitize_control_tokens`: it could forge a turn or an end.
//!
//! A record is used whole or not at all. What the template refuses is an error with the record's place.

mod marked;
mod python;
mod template;
mod turns;
mod value;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use jiff::civil::Date;
use tokenizers::{ModelWrapper, Tokenizer};

use self::{
    marked::{Names, Stretch},
    template::{Failure, Template},
    turns::Conversation,
    value::Json,
};
use super::{marks::Rendering, special::Unfit, templates::Chosen, tokenizer::TextTokenizer};

/// The field that holds a chat's messages.
pub(super) const MESSAGES: &str = "messages";
/// The field that holds the tools of a chat.
pub(super) const TOOLS: &str = "tools";
/// The fields for an assistant's thoughts, as transformers knows them: the first one that is there counts.
const THOUGHTS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A chat as ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ChatIds {
    pub ids: Vec<u32>,
    /// For each id, whether it is a target.
    pub targets: Vec<bool>,
    /// The special tokens that end the assistant's turns.
    pub ends: BTreeSet<u32>,
}

/// Why a chat has no ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NoIds {
    /// The template asks for the date, and none was given.
    Date,
    /// This chat can't be used.
    Chat(String),
}

impl From<Failure> for NoIds {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Date => Self::Date,
            Failure::Chat(reason) => Self::Chat(reason),
        }
    }
}

/// Turns chats into ids. Shared by the threads that encode.
pub(super) struct Chats {
    /// For chats without tools; `None`: the folder has none for them.
    plain: Option<Template>,
    /// For chats with tools; `None`: the same.
    tools: Option<Template>,
    date: Option<Date>,
    names: Names,
    /// The tokenizer as it is stored: it finds special tokens in a text.
    open: Tokenizer,
    new_line: Vec<u32>,
    special: BTreeSet<u32>,
    bos: Option<u32>,
    /// Whether text may become a special token in other ways than by spelling it.
    may_change: bool,
}

impl Chats {
    /// `tokens`: the special tokens that the template may name.
    pub(super) fn new(
        tokenizer: &TextTokenizer,
        chosen: &Chosen,
        tokens: &BTreeMap<String, String>,
        date: Option<Date>,
    ) -> Result<Self, String> {
        let mut open = Tokenizer::from_bytes(tokenizer.json()).map_err(|error| error.to_string())?;
        open.with_padding(None);
        open.with_truncation(None).map_err(|error| error.to_string())?;
        // It would only put tokens around the text, which the template does, and move offsets.
        open.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
        if let ModelWrapper::BPE(model) = open.get_model()
            && model.dropout.is_some()
        {
            let mut model = model.clone();
            model.dropout = None;
            open.with_model(ModelWrapper::BPE(model));
        }
        let names = Names::new(tokenizer.special_tokens().values().cloned());
        let new_line = open.encode_fast("\n", false).map_err(|error| error.to_string())?.get_ids().to_vec();
        let added = open.get_added_tokens_decoder();
        let inside_model = tokenizer.special_tokens().keys().any(|id| !added.contains_key(id));
        let tools = Some(&chosen.tools).filter(|source| chosen.plain.as_ref() != Some(source));
        let may_change = inside_model || open.get_normalizer().is_some();
        Ok(Self {
            plain: chosen.plain.as_ref().map(|source| Template::new(source, tokens, date)).transpose()?,
            tools: tools.map(|source| Template::new(source, tokens, date)).transpose()?,
            date,
            names,
            new_line,
            special: tokenizer.special_tokens().keys().copied().collect(),
            bos: tokens.get("bos_token").and_then(|token| open.token_to_id(token)),
            may_change,
            open,
        })
    }

    /// How chats are rendered. `ends`: the tokens that ended turns.
    pub(super) fn rendering(&self, ends: BTreeSet<u32>) -> Rendering {
        let [plain, tools] = [&self.plain, &self.tools].map(|it| it.as_ref().map(|it| it.sha256().to_owned()));
        Rendering {
            tools_template_sha256: tools.clone().filter(|_| plain.is_some()),
            template_sha256: plain.or(tools).unwrap_or_default(),
            date: self.date.map(|date| date.to_string()),
            end_ids: ends.into_iter().collect(),
        }
    }

    /// The ids of the chat in this record.
    pub(super) fn encode(&self, tokenizer: &TextTokenizer, record: &str) -> Result<ChatIds, NoIds> {
        let chat = self.read(tokenizer, record).map_err(NoIds::Chat)?;
        let special = self.tools.as_ref().filter(|_| chat.tools.is_some());
        let template = special.or(self.plain.as_ref()).ok_or_else(|| {
            let reason =
                "has no tools, and the folder has no chat template named \"default\"; --chat-template names one";
            NoIds::Chat(reason.into())
        })?;
        let (text, turns) = turns::find(template, &self.names, &chat)?;
        self.ids(tokenizer, &text, &turns).map_err(NoIds::Chat)
    }

    /// The messages and tools of a record, marked.
    fn read(&self, tokenizer: &TextTokenizer, record: &str) -> Result<Conversation, String> {
        let json: Json = serde_json::from_str(record).map_err(|error| format!("is not JSON: {error}"))?;
        if let Some(number) = value::large_integer(record) {
            return Err(format!("holds the number {number}, which has more than 64 bits"));
        }
        let Some(Json::List(messages)) = json.get(MESSAGES).cloned() else {
            return Err(format!("has no list in {MESSAGES:?}"));
        };
        if messages.is_empty() {
            return Err("has no messages".into());
        }
        let mut mark = |text: String| {
            self.fits(tokenizer, &text)?;
            self.names.mark(text)
        };
        let messages = messages
            .into_iter()
            .enumerate()
            .map(|(number, message)| {
                self.message(message, &mut mark).map_err(|reason| format!("message {} {reason}", number + 1))
            })
            .collect::<Result<Vec<Json>, String>>()?;
        let tools = match json.get(TOOLS).cloned() {
            // Tools of different parameters fit no column of a table: many data sets have them as a text.
            Some(Json::Text(text)) => serde_json::from_str(&text)
                .map_err(|error| format!("has a text in {TOOLS:?} that is not JSON: {error}"))?,
            tools => tools.unwrap_or(Json::Null),
        };
        let tools = match tools {
            Json::Null => None,
            tools @ Json::List(_) => {
                self.check_keys(&tools)?;
                Some(tools.map_texts(&mut mark)?)
            }
            _ => return Err(format!("has no list in {TOOLS:?}")),
        };
        Ok(Conversation { messages, tools, bytes: record.len() })
    }

    fn message(&self, message: Json, mark: &mut impl FnMut(String) -> Result<String, String>) -> Result<Json, String> {
        self.check_keys(&message)?;
        let Json::Object(fields) = message else { return Err("is no object with a role and a content".into()) };
        let role = fields.iter().find(|(key, _)| key == "role").and_then(|(_, role)| role.text());
        let role = role.ok_or("has no role")?;
        if role.is_empty() || !role.chars().all(|letter| letter.is_alphanumeric() || "_-.".contains(letter)) {
            return Err(format!("has the role {role:?}; a role is a word"));
        }
        let mut marked = Vec::with_capacity(fields.len() + 1);
        // A field without a value is as good as none: many templates would print it.
        for (key, value) in fields.into_iter().filter(|(_, value)| *value != Json::Null) {
            let value = if key == "role" { value } else { value.map_texts(mark)? };
            marked.push((key, value));
        }
        let thoughts =
            THOUGHTS.iter().find_map(|name| marked.iter().find(|(key, _)| key == name)).map(|(_, value)| value.clone());
        if let Some(thoughts) = thoughts {
            // The places of the two fields are those of `{"thinking": …, **message, "reasoning_content": …}`.
            let own = marked.iter().position(|(key, _)| key == "thinking").map(|at| marked.remove(at));
            marked.insert(0, own.unwrap_or_else(|| ("thinking".into(), thoughts.clone())));
            match marked.iter_mut().find(|(key, _)| key == THOUGHTS[0]) {
                Some((_, value)) => *value = thoughts,
                None => marked.push((THOUGHTS[0].into(), thoughts)),
            }
        }
        Ok(Json::Object(marked))
    }

    /// No key may spell a special token: a template prints it as it is.
    fn check_keys(&self, value: &Json) -> Result<(), String> {
        match value {
            Json::List(items) => items.iter().try_for_each(|item| self.check_keys(item)),
            Json::Object(fields) => fields.iter().try_for_each(|(key, value)| {
                if self.names.find(key).is_some() || key.chars().any(marked::is_mark) {
                    return Err(format!("has a field {key:?}, which spells a special token"));
                }
                self.check_keys(value)
            }),
            _ => Ok(()),
        }
    }

    /// Whether a chat's text stays text: what the tokenizer's look-up and its normalizer make of it, and whether it has
    /// a token for each part.
    fn fits(&self, tokenizer: &TextTokenizer, text: &str) -> Result<(), String> {
        if tokenizer.may_lose() {
            tokenizer.encode_text(text).map_err(|unfit| told(&unfit))?;
        }
        if !self.may_change {
            return Ok(());
        }
        let mut rest = Some(text);
        while let Some(text) = rest {
            let next = self.names.find(text);
            let piece = next.map_or(text, |(at, _)| &text[..at]);
            let encoding = self.open.encode_fast(piece, false).map_err(|error| error.to_string())?;
            if let Some(id) = encoding.get_ids().iter().find(|id| self.special.contains(id)) {
                let unknown = tokenizer.unknown_id() == Some(*id);
                let name = tokenizer.special_tokens().get(id).cloned().unwrap_or_default();
                if !unknown {
                    return Err(format!("holds text that this tokenizer turns into {name:?}, a special token"));
                }
            }
            rest = next.map(|(at, name)| &text[at + name.len()..]);
        }
        Ok(())
    }

    /// Encodes a rendered text; what the turns overlap is a target.
    fn ids(&self, tokenizer: &TextTokenizer, text: &str, turns: &[Range<usize>]) -> Result<ChatIds, String> {
        let mut all = ChatIds::default();
        for (number, part) in marked::parts(text, &self.names).iter().enumerate() {
            self.part(tokenizer, part, number == 0, turns, &mut all)?;
        }
        all.ends = turns.iter().filter_map(|turn| self.end_of(text.get(turn.clone())?)).collect();
        if let Some(bos) = self.bos
            && all.ids.windows(2).any(|pair| pair == [bos, bos])
        {
            return Err("has the begin token twice in a row: the chat template puts it, and puts it again".into());
        }
        Ok(all)
    }

    /// The special token that ends a turn.
    fn end_of(&self, turn: &str) -> Option<u32> {
        let name = self.names.name_at_end(turn.trim_end())?;
        self.open.token_to_id(name)
    }

    fn part(
        &self,
        tokenizer: &TextTokenizer,
        part: &Stretch<'_>,
        first: bool,
        turns: &[Range<usize>],
        all: &mut ChatIds,
    ) -> Result<(), String> {
        let overlaps = |range: Range<usize>| {
            turns.iter().any(|turn| range.start < turn.end && turn.start < range.end.max(range.start + 1))
        };
        if part.spelt {
            // Behind a line end, so that no blank is put before it as before the beginning of a text.
            let with_line = tokenizer.encode_text(&format!("\n{}", part.text)).map_err(|unfit| told(&unfit))?;
            let ids = match with_line.strip_prefix(self.new_line.as_slice()) {
                Some(ids) => ids.to_vec(),
                None => tokenizer.encode_text(part.text).map_err(|unfit| told(&unfit))?,
            };
            let target = overlaps(part.at..part.at + part.text.len());
            all.targets.extend(std::iter::repeat_n(target, ids.len()));
            all.ids.extend(ids);
            return Ok(());
        }
        let encode = |text: &str| self.open.encode(text, false).map_err(|error| error.to_string());
        let behind_line = if first {
            None
        } else {
            let encoding = encode(&format!("\n{}", part.text))?;
            encoding.get_ids().starts_with(&self.new_line).then_some(encoding)
        };
        let (encoding, skipped, moved) = match behind_line {
            Some(encoding) => (encoding, self.new_line.len(), 1),
            None => (encode(part.text)?, 0, 0),
        };
        for (id, &(start, end)) in encoding.get_ids().iter().zip(encoding.get_offsets()).skip(skipped) {
            let place = |at: usize| part.at + at.saturating_sub(moved);
            let target = overlaps(place(start)..place(end));
            all.ids.push(*id);
            all.targets.push(target);
        }
        Ok(())
    }
}

/// Why a text has no ids, of a chat.
fn told(unfit: &Unfit) -> String {
    match unfit {
        Unfit::Special { token, .. } => {
            format!("holds {token:?}, a special token of this tokenizer, which has no other form for it")
        }
        Unfit::Unknown { part, .. } => format!("holds {part:?}, for which this tokenizer has no token"),
        Unfit::Refused(reason) => format!("is refused by the tokenizer: {reason}"),
    }
}

#[cfg(test)]
mod tests;
