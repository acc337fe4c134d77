//! Markup whose text can't be markup: only words of this program are written as they are, all else is escaped.

use std::fmt::{self, Write};

/// The most characters of one text: a reason in a journal may have megabytes.
const MOST_CHARS: usize = 2000;

/// A part of a document.
#[derive(Debug, Default)]
pub(super) struct Html(String);

/// An attribute's value.
pub(super) enum Value<'a> {
    /// Text of whatever origin.
    Text(&'a str),
    /// A coordinate, shortened to two digits after the point; a number that is none is 0.
    Number(f64),
}

impl From<f64> for Value<'_> {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(text: &'a str) -> Self {
        Self::Text(text)
    }
}

impl Html {
    /// Markup of this program.
    pub fn raw(&mut self, markup: &'static str) -> &mut Self {
        self.0.push_str(markup);
        self
    }

    /// Text of whatever origin. Of a very long one the beginning is shown.
    pub fn text(&mut self, text: &str) -> &mut Self {
        match text.char_indices().nth(MOST_CHARS) {
            Some((end, _)) => {
                escape(&text[..end], &mut self.0);
                self.0.push('…');
            }
            None => escape(text, &mut self.0),
        }
        self
    }

    /// An element, and what is in it.
    pub fn element(
        &mut self,
        name: &'static str,
        attributes: &[(&'static str, Value<'_>)],
        inside: impl FnOnce(&mut Self),
    ) -> &mut Self {
        self.open(name, attributes);
        inside(self);
        self.close(name)
    }

    /// An element that has nothing but text in it.
    pub fn words(&mut self, name: &'static str, text: &str) -> &mut Self {
        self.element(name, &[], |html| {
            html.text(text);
        })
    }

    /// The beginning of an element.
    pub fn open(&mut self, name: &'static str, attributes: &[(&'static str, Value<'_>)]) -> &mut Self {
        self.0.push('<');
        self.0.push_str(name);
        for (attribute, value) in attributes {
            self.0.push(' ');
            self.0.push_str(attribute);
            self.0.push_str("=\"");
            match value {
                Value::Text(text) => escape(text, &mut self.0),
                Value::Number(number) => number_in(*number, &mut self.0),
            }
            self.0.push('"');
        }
        self.0.push('>');
        self
    }

    /// Its end.
    pub fn close(&mut self, name: &'static str) -> &mut Self {
        self.0.push_str("</");
        self.0.push_str(name);
        self.0.push_str(">\n");
        self
    }

    /// A table with these headings. A heading that starts with `>` heads a column of numbers.
    pub fn table(&mut self, caption: &str, headings: &[&str], rows: impl IntoIterator<Item = Vec<String>>) {
        // Whoever has no mouse scrolls a wide table with the keys.
        self.open(
            "div",
            &[
                ("class", "scroll".into()),
                ("tabindex", "0".into()),
                ("role", "region".into()),
                ("aria-label", caption.into()),
            ],
        );
        self.open("table", &[]).words("caption", caption).raw("<thead><tr>");
        let is_number = |column: usize| headings.get(column).is_some_and(|heading| heading.starts_with('>'));
        for (column, heading) in headings.iter().enumerate() {
            let class = if is_number(column) { "number" } else { "words" };
            self.open("th", &[("scope", "col".into()), ("class", class.into())]);
            self.text(heading.trim_start_matches('>')).close("th");
        }
        self.raw("</tr></thead><tbody>\n");
        for row in rows {
            self.raw("<tr>");
            for (column, cell) in row.iter().enumerate() {
                let class = if is_number(column) { "number" } else { "words" };
                let name = if column == 0 {
                    self.open("th", &[("scope", "row".into()), ("class", class.into())]);
                    "th"
                } else {
                    self.open("td", &[("class", class.into())]);
                    "td"
                };
                self.text(cell).close(name);
            }
            self.raw("</tr>\n");
        }
        self.raw("</tbody></table></div>\n");
    }

    /// Puts a part behind this one.
    pub fn add(&mut self, part: &Self) -> &mut Self {
        self.0.push_str(&part.0);
        self
    }

    /// The whole.
    pub fn into_string(self) -> String {
        self.0
    }
}

/// A coordinate.
pub(super) fn number_in(number: f64, out: &mut String) {
    if !number.is_finite() {
        out.push('0');
        return;
    }
    let at = out.len();
    // Writing to a String cannot fail.
    let _: fmt::Result = write!(out, "{number:.2}");
    let short = out[at..].trim_end_matches('0').trim_end_matches('.').len();
    out.truncate(at + short);
    if &out[at..] == "-0" {
        out.truncate(at);
        out.push('0');
    }
}

/// Characters that no text of a run has a use for: controls, and those that turn the direction of what follows.
fn is_hidden(c: char) -> bool {
    let turns = matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}');
    let none = (u32::from(c) & 0xfffe) == 0xfffe || matches!(c, '\u{fdd0}'..='\u{fdef}');
    c.is_control() || turns || none || matches!(c, '\u{2028}' | '\u{2029}')
}

fn escape(text: &str, out: &mut String) {
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if is_hidden(c) => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_never_markup() {
        let mut html = Html::default();
        let hostile = "</title><script>alert('1')</script>\" onload=\"x&\u{1b}\u{202e}\u{0}\n".to_owned();
        html.open("p", &[("title", hostile.as_str().into()), ("x", f64::NAN.into())]).text(&hostile).close("p");
        html.table(&hostile, &["a", ">b"], [vec![hostile.clone(), hostile.clone()]]);
        let text = html.into_string();
        assert!(!text.contains("<script") && !text.contains("</title") && !text.contains("\" onload"), "{text}");
        assert!(!text.contains(['\u{1b}', '\u{202e}', '\0']), "{text}");
        assert!(text.contains("\\u{1b}\\u{202e}\\u{0}\\u{a}") && text.contains("x=\"0\""), "{text}");
        let mut long = Html::default();
        long.text(&"é".repeat(MOST_CHARS + 1));
        assert_eq!(long.into_string(), format!("{}…", "é".repeat(MOST_CHARS)));
        assert!(text.starts_with("<p title=\"&lt;/title&gt;&lt;script&gt;alert(&#39;1&#39;)"), "{text}");
    }

    #[test]
    fn coordinates_are_short() {
        let short = |number| {
            let mut out = "M".to_owned();
            number_in(number, &mut out);
            out
        };
        for (number, text) in [
            (1.0, "M1"),
            (100.0, "M100"),
            (0.5, "M0.5"),
            (12.345, "M12.35"),
            (-0.001, "M0"),
            (-1.10, "M-1.1"),
            (f64::INFINITY, "M0"),
            (0.0, "M0"),
        ] {
            assert_eq!(short(number), text, "{number}");
        }
    }
}
