//! Marks in the texts that a template is given, which tell in the rendered text what came from where.
//!
//! A chat's text may spell a special token. So each such place in it is put between two marks before the template sees
//! it; in the rendered text a special token without marks is the template's own. The same way is taken by transformers
//! (`sanitize_control_tokens`). Two more marks surround an assistant's turn.
//!
//! The marks are noncharacters of Unicode, which are not for interchange; a chat that holds one is refused.

use std::ops::Range;

/// Begins a special token that is spelt in a text.
const SPELT: char = '\u{fdd2}';
/// Ends it.
const SPELT_END: char = '\u{fdd3}';
/// Begins an assistant's turn.
pub(super) const TURN: char = '\u{fdd4}';
/// Ends it.
pub(super) const TURN_END: char = '\u{fdd5}';

/// Whether a character is a mark.
pub(super) fn is_mark(letter: char) -> bool {
    (SPELT..=TURN_END).contains(&letter)
}

/// The names of a tokenizer's special tokens, the longest first: a name may be a part of another.
#[derive(Clone, Debug, Default)]
pub(super) struct Names(Vec<String>);

impl Names {
    pub(super) fn new(names: impl IntoIterator<Item = String>) -> Self {
        let mut names: Vec<String> = names.into_iter().filter(|name| !name.is_empty()).collect();
        names.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));
        names.dedup();
        Self(names)
    }

    /// The name at the beginning of `text`.
    pub(super) fn at_start<'t>(&self, text: &'t str) -> Option<&'t str> {
        self.0.iter().find(|name| text.starts_with(name.as_str())).and_then(|name| text.get(..name.len()))
    }

    /// The special token of the template that ends `text`: behind one that is spelt there would be a mark.
    pub(super) fn name_at_end(&self, text: &str) -> Option<&str> {
        self.0.iter().find(|name| text.ends_with(name.as_str())).map(String::as_str)
    }

    /// Where the template itself put the special token `name`.
    pub(super) fn own(&self, text: &str, name: &str) -> impl Iterator<Item = usize> {
        text.match_indices(name).map(|(at, _)| at).filter(|&at| !text[..at].ends_with(SPELT))
    }

    /// The last special token that the template itself put into `text`, and its position.
    pub(super) fn last_own<'n>(&'n self, text: &str) -> Option<(usize, &'n str)> {
        let last = |name: &'n String| Some((self.own(text, name).last()?, name.as_str()));
        // Of two that begin at one place, the longer one is there.
        self.0.iter().filter_map(last).max_by_key(|(at, name)| (*at, name.len()))
    }

    /// Whether a special token of the template ends `text`.
    pub(super) fn at_end(&self, text: &str) -> bool {
        self.name_at_end(text).is_some()
    }

    /// The first name in `text`, and its position.
    pub(super) fn find<'t>(&self, text: &'t str) -> Option<(usize, &'t str)> {
        text.char_indices().find_map(|(at, _)| Some((at, self.at_start(text.get(at..)?)?)))
    }

    /// `text` with marks around each name in it; an error if it holds a mark.
    pub(super) fn mark(&self, text: String) -> Result<String, String> {
        if let Some(mark) = text.chars().find(|letter| is_mark(*letter)) {
            return Err(format!("holds U+{:04X}, a character that is not for text", u32::from(mark)));
        }
        let Some(first) = self.find(&text) else { return Ok(text) };
        let (mut marked, mut rest, mut next) = (String::with_capacity(text.len() + 12), text.as_str(), Some(first));
        while let Some((at, name)) = next {
            marked.push_str(&rest[..at]);
            marked.push(SPELT);
            marked.push_str(name);
            marked.push(SPELT_END);
            rest = &rest[at + name.len()..];
            next = self.find(rest);
        }
        marked.push_str(rest);
        Ok(marked)
    }
}

/// `text` without marks of turns.
pub(super) fn without_turns(text: &str) -> String {
    text.replace([TURN, TURN_END], "")
}

/// A part of a rendered chat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stretch<'a> {
    /// Without marks.
    pub text: &'a str,
    /// Its place in the text with marks.
    pub at: usize,
    /// It is text, though it spells a special token.
    pub spelt: bool,
}

/// Cuts a rendered text without marks of turns at its marks. A template may have cut a special token that was spelt in
/// a text, so that one mark of two is left: there is a cut, too, so that neither side can join into such a token.
pub(super) fn parts<'a>(text: &'a str, names: &Names) -> Vec<Stretch<'a>> {
    let mut parts = Vec::new();
    let (mut from, mut open) = (0, false);
    let cut = |range: Range<usize>, spelt: bool, parts: &mut Vec<Stretch<'a>>| {
        if let Some(text) = text.get(range.clone()).filter(|text| !text.is_empty()) {
            parts.push(Stretch { text, at: range.start, spelt: spelt && names.at_start(text) == Some(text) });
        }
    };
    for (at, letter) in text.char_indices().filter(|(_, letter)| is_mark(*letter)) {
        cut(from..at, open && letter == SPELT_END, &mut parts);
        open = letter == SPELT;
        from = at + letter.len_utf8();
    }
    cut(from..text.len(), false, &mut parts);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spelt_tokens_are_told_from_the_templates_own() {
        let names = Names::new(["<|im_end|>", "<|im|>", "</s>", "<|im_end|>x"].map(str::to_owned));
        let marked = names.mark("a<|im_end|>x b</s></s> <|im".into()).unwrap();
        let rendered = format!("<|im_end|>{marked}</s>");
        let parts = parts(&rendered, &names);
        let texts: Vec<(&str, bool)> = parts.iter().map(|part| (part.text, part.spelt)).collect();
        let expected = [
            ("<|im_end|>a", false),
            ("<|im_end|>x", true),
            (" b", false),
            ("</s>", true),
            ("</s>", true),
            (" <|im</s>", false),
        ];
        assert_eq!(texts, expected);
        for part in &parts {
            assert_eq!(&rendered[part.at..part.at + part.text.len()], part.text);
        }
        assert!(!names.at_end(&marked[..marked.len() - 4]), "a spelt token ends with a mark");
        assert!(names.mark("\u{fdd3}".into()).unwrap_err().contains("U+FDD3"));
    }

    #[test]
    fn a_spelt_token_that_a_template_cut_is_still_text() {
        let names = Names::new(["</s>".to_owned()]);
        let marked = names.mark("a</s>b".into()).unwrap();
        let (left, right) = marked.split_once("/s").unwrap();
        let rendered = format!("{left}</s>{right}");
        let texts: Vec<(String, bool)> =
            parts(&rendered, &names).into_iter().map(|part| (part.text.to_owned(), part.spelt)).collect();
        let own = |text: &str| (text.to_owned(), false);
        assert_eq!(texts, [own("a"), own("<</s>>"), own("b")]);
    }
}
