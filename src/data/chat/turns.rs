//! Where in a rendered chat the assistant's turns are, so that the loss counts them and nothing else.
//!
//! A turn is what the assistant generates: what follows its header, up to and including the special token that ends it.
//! Three ways lead there, the first that applies is taken:
//!
//! 1. `{% generation %}` blocks of the template say it themselves.
//! 2. The chat is rendered up to the turn with the header behind it (`add_generation_prompt`), and up to and including
//!    the turn. If each text begins the next one, the turn is the difference.
//! 3. Templates that show a turn differently once others follow (they leave out its thoughts) are given marks around
//!    the assistant's text; if nothing else changes, the marks say where it is. It begins behind its header, and ends
//!    with the token that ends it where nothing follows: behind its text there may be calls of tools. A turn without
//!    text begins where the text before it ends.
//!
//! A header is no part of a turn, whether the template can put it behind a chat or not. What a template puts behind the
//! end of a whole chat is no part of its last turn.
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
        let turn = search.turn(&text, at, after)?;
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

    /// The turn of message `at`, which begins behind `after`, with the special token that ends it.
    fn turn(&self, text: &str, at: usize, after: usize) -> Result<Range<usize>, Failure> {
        if let Some(turn) = self.by_prefix(text, at).filter(|turn| turn.start >= after) {
            // Behind the special token there may be a line end.
            let end = turn.start + text[turn.clone()].trim_end().len();
            let ended = self.names.at_end(&text[turn.start..end]);
            return self.closed(text, if ended { turn.start..end } else { turn });
        }
        let whole = self.by_end(text, at, after);
        match (self.by_marks(text, at, after), whole) {
            (Ok(turn), Some(whole)) if whole.end > turn.end => Ok(turn.start..whole.end),
            (Ok(turn), _) => self.closed(text, turn),
            (Err(failure), whole) => whole.ok_or(failure),
        }
    }

    /// The turn of message `at` by the second way.
    fn by_prefix(&self, text: &str, at: usize) -> Option<Range<usize>> {
        let before = self.text(self.values.get(..at)?, true).ok()?;
        let until = if at + 1 == self.values.len() {
            let end = self.end_of_last(text, before.len(), &self.values);
            text.get(..end)?.to_owned()
        } else {
            self.text(self.values.get(..=at)?, false).ok()?
        };
        let turn = before.len()..until.len();
        if !text.starts_with(&until) || !until.starts_with(&before) || turn.is_empty() {
            return None;
        }
        // Without a prompt, the difference has the turn's header, too.
        let header = if self.header(at).is_none() { self.header_of_probe(at, &before) } else { None };
        let header = header.filter(|header| text[turn.clone()].starts_with(header.as_str()));
        Some(turn.start + header.map_or(0, |header| header.len())..turn.end)
    }

    /// The turn of message `at`, which begins behind `after`, by the third way: where its text ends, and its beginning.
    fn by_marks(&self, text: &str, at: usize, after: usize) -> Result<Range<usize>, Failure> {
        let unknown = || {
            Failure::Chat(format!(
                "has an assistant's turn (message {}) that can't be found in the text of the chat template; surround \
                 it with {{% generation %}} and {{% endgeneration %}} in the template",
                at + 1
            ))
        };
        let message = self.chat.messages.get(at).ok_or_else(unknown)?;
        let whole = self.with(at, with_marks(message, false).ok_or_else(unknown)?)?;
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
        let (Some(mut start), Some(end)) = (start, end.filter(|end| *end > after)) else { return Err(unknown()) };
        // Blanks that the text begins with, if the template leaves them: without them it begins where they do.
        if let Some(bare) = with_marks(message, true)
            && let Ok(whole) = self.with(at, bare)
            && let Some((before, _)) = whole.split_once(TURN)
            && before.len() < start
            && text.starts_with(before)
        {
            start = before.len();
        }
        let start = Some(start).filter(|start| *start >= after).ok_or_else(unknown)?;
        let start = self.behind_header(text, at, after..start);
        if start < end { Ok(start..end) } else { Err(unknown()) }
    }

    /// The text with another message in the place of `at`.
    fn with(&self, at: usize, message: Json) -> Result<String, Failure> {
        let mut values = self.values.clone();
        if let Some(value) = values.get_mut(at) {
            *value = message.to_value();
        }
        self.text(&values, false)
    }

    /// Where the turn of message `at` begins: within `before`, whose end is the beginning of its content.
    fn behind_header(&self, text: &str, at: usize, before: Range<usize>) -> usize {
        let messages = self.values.get(..at).unwrap_or_default();
        let rendered = [false, true].map(|prompt| self.text(messages, prompt));
        let ([Ok(without), Ok(with)], Some(stretch)) = (rendered, text.get(before.clone())) else { return before.end };
        let behind = |part: &str| stretch.rfind(part).map(|found| found + part.len());
        if let Some(found) = self.header(at).and_then(|header| behind(&header)) {
            return before.start + found;
        }
        // The prompt's last special token, and what is behind it.
        let Some((last, token)) = self.names.last_own(&with) else { return before.end };
        let Some(found) = behind(&with[last..]) else { return before.end };
        let is_header = with != without && !with[last + token.len()..].trim().is_empty();
        // Otherwise it ended the message before: what is between may be a header, but not blanks alone.
        if is_header || stretch[found..].trim().is_empty() { before.start + found } else { before.end }
    }

    /// The turn of message `at`, which begins behind `after`, by the text before it and the token that ends it where
    /// nothing follows.
    fn by_end(&self, text: &str, at: usize, after: usize) -> Option<Range<usize>> {
        let before = self.text(self.values.get(..at)?, true).ok()?;
        let messages = self.values.get(..=at)?;
        let alone = self.text(messages, false).ok()?;
        let rest = text.strip_prefix(&before)?;
        let end = self.end_of_last(&alone, before.len(), messages);
        let turn = alone.get(..end)?.strip_prefix(&before)?.trim_end();
        let end = self.names.name_at_end(turn)?;
        // The same token may be inside the turn, too.
        let last = self.names.own(turn, end).count().checked_sub(1)?;
        let found = self.names.own(rest, end).nth(last)?;
        let found = before.len()..before.len() + found + end.len();
        // Where another token ends turns that others follow, it may be the end of a later one.
        let next = (at + 1..self.values.len()).find_map(|next| self.begin_of(text, next));
        let fits = at + 1 == self.values.len() || next.is_some_and(|next| found.end <= next);
        (found.start >= after && fits).then_some(found)
    }

    /// Where the text of message `at` begins.
    fn begin_of(&self, text: &str, at: usize) -> Option<usize> {
        let whole = self.with(at, with_marks(self.chat.messages.get(at)?, false)?).ok()?;
        if without_turns(&whole) != text {
            return None;
        }
        whole.find(TURN)
    }

    /// Where the last turn of `whole` ends, the rendered text of `messages`: before what the template puts behind a
    /// whole chat, such as a token that ends it. The turn begins behind `from`.
    fn end_of_last(&self, whole: &str, from: usize, messages: &[Value]) -> usize {
        let shorter = |end: usize| {
            let turn = whole.get(from..end)?.trim_end();
            let token = self.names.name_at_end(turn)?;
            let inner = turn.strip_suffix(token)?.trim_end();
            self.names.at_end(inner).then_some(from + inner.len())
        };
        let mut end = whole.len();
        let Some(mut next) = shorter(end) else { return end };
        let Some(content) = self.content_end(whole, messages) else { return end };
        let followed = [messages, &[probe("user").to_value()]].concat();
        let Ok(followed) = self.text(&followed, false) else { return end };
        // The token is a part of the turn if it is there when another message follows, too.
        while next > content && followed.starts_with(&whole[..next]) && !followed.starts_with(whole[..end].trim_end()) {
            end = next;
            match shorter(end) {
                Some(before) => next = before,
                None => break,
            }
        }
        end
    }

    /// Where the content of the last of `messages` ends, at the latest: before what stands behind any.
    fn content_end(&self, whole: &str, messages: &[Value]) -> Option<usize> {
        let (_, before) = messages.split_last()?;
        let messages = [before, &[with_marks(&probe("assistant"), false)?.to_value()]].concat();
        let text = self.text(&messages, false).ok()?;
        let (_, behind) = text.split_once(TURN_END)?;
        Some(whole.strip_suffix(behind)?.len())
    }

    /// What the template puts before a turn of the assistant.
    fn header(&self, at: usize) -> Option<String> {
        let messages = self.values.get(..at)?;
        let (without, with) = (self.text(messages, false).ok()?, self.text(messages, true).ok()?);
        let header = with.strip_prefix(&without)?;
        (!header.trim().is_empty()).then(|| header.to_owned())
    }

    /// The same of a template that can't put it behind a chat: what stands before the text of a turn in the place of
    /// message `at`. `before`: the text before that message.
    fn header_of_probe(&self, at: usize, before: &str) -> Option<String> {
        let probe = with_marks(&probe("assistant"), false)?.to_value();
        let messages = [self.values.get(..at)?, &[probe]].concat();
        let whole = self.text(&messages, false).ok()?;
        let (header, _) = whole.strip_prefix(before)?.split_once(TURN)?;
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

/// A message of a role that says little.
fn probe(role: &str) -> Json {
    let field = |key: &str, text: &str| (key.to_owned(), Json::Text(text.to_owned()));
    Json::Object(vec![field("role", role), field("content", "x")])
}

/// The message with marks around its text, within the blanks at its ends, which a template may remove; `None`: it has
/// no text. `bare`: without the blanks that it begins with.
fn with_marks(message: &Json, bare: bool) -> Option<Json> {
    let mut message = message.clone();
    let Json::Object(fields) = &mut message else { return None };
    let (_, content) = fields.iter_mut().find(|(key, _)| key == "content")?;
    match content {
        Json::Text(text) => {
            mark(text, true, true, bare)?;
        }
        Json::List(parts) => {
            let mut texts: Vec<&mut String> = parts.iter_mut().filter_map(text_of_part).collect();
            if let [only] = texts.as_mut_slice() {
                mark(only, true, true, bare)?;
            } else {
                mark(texts.first_mut()?, true, false, bare)?;
                mark(texts.last_mut()?, false, true, false)?;
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

fn mark(text: &mut String, begins: bool, ends: bool, bare: bool) -> Option<()> {
    let from = text.len() - text.trim_start().len();
    let to = text.trim_end().len();
    let inside = text.get(from..to).filter(|inside| !inside.is_empty())?;
    let sign = |wanted: bool, mark: char| if wanted { mark.to_string() } else { String::new() };
    let (before, behind) = (sign(begins, TURN), sign(ends, TURN_END));
    let blanks = if bare { "" } else { &text[..from] };
    *text = format!("{blanks}{before}{inside}{behind}{}", &text[to..]);
    Some(())
}
