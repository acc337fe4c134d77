//! Where in a rendered chat the assistant's turns are, so that the loss counts them and nothing else.
//!
//! A turn is what the assistant generates: what follows its header, up to and including the special token that ends it.
//! Three ways lead there, the first that applies is taken:
//!
//! 1. `{% generation %}` blocks of the template say it themselves.
//! 2. The chat is rendered up to the turn with the header behind it (`add_generation_prompt`), and up to and including
//!    the turn. If each text begins the next one, the turn is the difference.
//! 3. Templates that show a turn differently once others follow (they leave out its thoughts) are given marks around
//!    the assistant's text; if nothing else changes, the marks say where it is. It begins behind its header. A turn
//!    without text, such as a call of a tool, begins where the text before it ends, and ends with the token that ends
//!    it where nothing follows.
//!
//! A turn that no special token ends is refused: a model trained on it would never stop. So is one of which the
//! template leaves nothing.

use std::ops::Range;

use minijinja::Value;

use super::{
    marked::{Names, TURN, TURN_END, without_turns},
    template::{Failure, Template},
    value::Json,
};

/// A chat, its texts marked.
#[derive(Clone, Debug)]
pub(super) struct Conversation {
    pub messages: Vec<Json>,
    pub tools: Option<Json>,
    /// The length of its record, bytes.
    pub bytes: usize,
}

/// Renders a chat; returns the text with marks of spelt tokens, and the assistant's turns in it.
pub(super) fn find(
    template: &Template,
    names: &Names,
    chat: &Conversation,
) -> Result<(String, Vec<Range<usize>>), Failure> {
    let values: Vec<Value> = chat.messages.iter().map(Json::to_value).collect();
    let tools = chat.tools.as_ref().map_or_else(|| Value::from(()), Json::to_value);
    let search = Search { template, names, chat, values, tools };
    let whole = search.text(&search.values, false)?;
    let (text, turns) = split(&whole)?;
    if template.has_generation() {
        let turns = turns.into_iter().map(|turn| search.closed(&text, turn)).collect::<Result<_, _>>()?;
        return Ok((text, turns));
    }
    let mut turns: Vec<Range<usize>> = Vec::new();
    let assistants = (0..chat.messages.len()).filter(|&at| role(&chat.messages[at]) == Some("assistant"));
    for at in assistants {
        let after = turns.last().map_or(0, |turn| turn.end);
        let turn = match search.by_prefix(&text, at).filter(|turn| turn.start >= after) {
            Some(turn) => turn,
            None => match search.by_marks(&text, at, after) {
                Ok(turn) => turn,
                Err(failure) => search.by_end(&text, at).filter(|turn| turn.start >= after).ok_or(failure)?,
            },
        };
        // Behind the special token there may be a line end.
        let end = turn.start + text[turn.clone()].trim_end().len();
        let ended = names.at_end(&text[turn.start..end]);
        let turn = search.closed(&text, if ended { turn.start..end } else { turn })?;
        let end = names.name_at_end(&text[turn.clone()]).unwrap_or_default();
        if text[turn.clone()].strip_suffix(end).is_some_and(|said| said.trim().is_empty()) {
            return Err(Failure::Chat(format!(
                "has an assistant's turn (message {}) of which the chat template leaves nothing",
                at + 1
            )));
        }
        turns.push(turn);
    }
    Ok((text, turns))
}

pub(super) fn role(message: &Json) -> Option<&str> {
    message.get("role")?.text()
}

/// The text without marks of turns, and the turns between them.
fn split(whole: &str) -> Result<(String, Vec<Range<usize>>), Failure> {
    let (mut text, mut turns, mut open) = (String::with_capacity(whole.len()), Vec::new(), None);
    for letter in whole.chars() {
        match (letter, open) {
            (TURN, None) => open = Some(text.len()),
            (TURN_END, Some(start)) => {
                turns.push(start..text.len());
                open = None;
            }
            (TURN | TURN_END, _) => {
                return Err(Failure::Chat("has {% generation %} blocks in one another in its chat template".into()));
            }
            (letter, _) => text.push(letter),
        }
    }
    Ok((text, turns))
}

struct Search<'a> {
    template: &'a Template,
    names: &'a Names,
    chat: &'a Conversation,
    values: Vec<Value>,
    tools: Value,
}

impl Search<'_> {
    fn text(&self, messages: &[Value], prompt: bool) -> Result<String, Failure> {
        self.template.render(messages, &self.tools, self.chat.bytes, prompt)
    }

    /// The turn of message `at` by the second way.
    fn by_prefix(&self, text: &str, at: usize) -> Option<Range<usize>> {
        let before = self.text(self.values.get(..at)?, true).ok()?;
        let until = if at + 1 == self.values.len() {
            text.to_owned()
        } else {
            self.text(self.values.get(..=at)?, false).ok()?
        };
        let turn = before.len()..until.len();
        (text.starts_with(&until) && until.starts_with(&before) && !turn.is_empty()).then_some(turn)
    }

    /// The turn of message `at`, which begins behind `after`, by the third way.
    fn by_marks(&self, text: &str, at: usize, after: usize) -> Result<Range<usize>, Failure> {
        let unknown = || {
            Failure::Chat(format!(
                "has an assistant's turn (message {}) that can't be found in the text of the chat template; surround \
                 it with {{% generation %}} and {{% endgeneration %}} in the template",
                at + 1
            ))
        };
        let marked = with_marks(self.chat.messages.get(at).ok_or_else(unknown)?).ok_or_else(unknown)?;
        let mut values = self.values.clone();
        values[at] = marked.to_value();
        let whole = self.text(&values, false)?;
        if without_turns(&whole) != text {
            return Err(unknown());
        }
        let (mut end, mut start, mut length) = (None, None, 0);
        for letter in whole.chars() {
            match letter {
                TURN => start = start.or(Some(length)),
                TURN_END => end = Some(length),
                letter => length += letter.len_utf8(),
            }
        }
        let end = end.filter(|end| *end > after).ok_or_else(unknown)?;
        let header = self.header(at);
        let behind_header = header.and_then(|header| {
            let found = text.get(after..end)?.rfind(&header)?;
            Some(after + found + header.len())
        });
        let start = behind_header.or(start.filter(|start| *start >= after)).ok_or_else(unknown)?;
        if start < end { Ok(start..end) } else { Err(unknown()) }
    }

    /// The turn of message `at`, by the text before it and the token that ends it.
    fn by_end(&self, text: &str, at: usize) -> Option<Range<usize>> {
        let before = self.text(self.values.get(..at)?, true).ok()?;
        let alone = self.text(self.values.get(..=at)?, false).ok()?;
        let rest = text.strip_prefix(&before)?;
        let turn = alone.strip_prefix(&before)?.trim_end();
        let end = self.names.name_at_end(turn)?;
        // The same token may be inside the turn, too.
        let last = self.names.own(turn, end).count().checked_sub(1)?;
        let found = self.names.own(rest, end).nth(last)?;
        Some(before.len()..before.len() + found + end.len())
    }

    /// What the template puts before a turn of the assistant.
    fn header(&self, at: usize) -> Option<String> {
        let messages = self.values.get(..at)?;
        let (without, with) = (self.text(messages, false).ok()?, self.text(messages, true).ok()?);
        let header = with.strip_prefix(&without)?;
        (!header.trim().is_empty()).then(|| header.to_owned())
    }

    /// The turn with the special token that ends it.
    fn closed(&self, text: &str, turn: Range<usize>) -> Result<Range<usize>, Failure> {
        if self.names.at_end(text[turn.clone()].trim_end()) {
            return Ok(turn);
        }
        let rest = &text[turn.end..];
        let blank = rest.len() - rest.trim_start().len();
        match self.names.at_start(rest.trim_start()) {
            Some(token) => Ok(turn.start..turn.end + blank + token.len()),
            None => Err(Failure::Chat(
                "has an assistant's turn that no special token ends in the chat template: a model trained on it would \
                 never stop"
                    .into(),
            )),
        }
    }
}

/// The message with marks around its text, within the blanks at its ends, which a template may remove; `None`: it has
/// no text.
fn with_marks(message: &Json) -> Option<Json> {
    let mut message = message.clone();
    let Json::Object(fields) = &mut message else { return None };
    let (_, content) = fields.iter_mut().find(|(key, _)| key == "content")?;
    match content {
        Json::Text(text) => {
            mark(text, true, true)?;
        }
        Json::List(parts) => {
            let mut texts: Vec<&mut String> = parts.iter_mut().filter_map(text_of_part).collect();
            if let [only] = texts.as_mut_slice() {
                mark(only, true, true)?;
            } else {
                mark(texts.first_mut()?, true, false)?;
                mark(texts.last_mut()?, false, true)?;
            }
        }
        _ => return None,
    }
    Some(message)
}

fn text_of_part(part: &mut Json) -> Option<&mut String> {
    let Json::Object(fields) = part else { return None };
    fields.iter_mut().find_map(|(key, value)| match value {
        Json::Text(text) if key == "text" => Some(text),
        _ => None,
    })
}

fn mark(text: &mut String, begins: bool, ends: bool) -> Option<()> {
    let from = text.len() - text.trim_start().len();
    let to = text.trim_end().len();
    let inside = text.get(from..to).filter(|inside| !inside.is_empty())?;
    let sign = |wanted: bool, mark: char| if wanted { mark.to_string() } else { String::new() };
    let (before, behind) = (sign(begins, TURN), sign(ends, TURN_END));
    *text = format!("{}{before}{inside}{behind}{}", &text[..from], &text[to..]);
    Some(())
}
