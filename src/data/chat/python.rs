//! What Python's values do in a chat template where the template language alone does something else: how they are
//! printed, methods of texts, tests and filters.

use minijinja::{
    Environment, Error, ErrorKind, Output, State, Value, escape_formatter,
    value::{ValueKind, from_args},
};
use serde::Deserialize;

use super::value::{Json, float};

/// Filters that Jinja has not: a template that names one is refused by transformers. Jinja's `attr` does not see keys.
const UNKNOWN: [&str; 7] = ["attr", "bool", "chain", "lines", "pprint", "split", "zip"];

/// The methods of Python's dictionaries: there, an attribute of such a name is never a key.
const OF_DICTIONARIES: [&str; 11] =
    ["clear", "copy", "fromkeys", "get", "items", "keys", "pop", "popitem", "setdefault", "update", "values"];

/// Adapts an environment.
pub(super) fn adapt(environment: &mut Environment<'static>) {
    environment.set_formatter(print);
    environment.set_unknown_method_callback(method);
    for name in UNKNOWN {
        environment.remove_filter(name);
    }
    for name in ["e", "escape"] {
        environment.add_filter(name, escape);
    }
    environment.add_filter("trim", |value: Value, letters: Option<String>| {
        let text = printed(&value);
        let (from, to) = stripped(&text, letters.as_deref());
        text[from..to].to_owned()
    });
    environment.add_filter("string", |value: Value| printed(&value));
    let has = |kinds: &'static [ValueKind]| move |value: Value| kinds.contains(&value.kind());
    const SEQUENCES: [ValueKind; 4] = [ValueKind::String, ValueKind::Seq, ValueKind::Map, ValueKind::Undefined];
    environment.add_test("sequence", has(&SEQUENCES));
    const ITERABLES: [ValueKind; 5] =
        [ValueKind::String, ValueKind::Seq, ValueKind::Map, ValueKind::Iterable, ValueKind::Undefined];
    environment.add_test("iterable", has(&ITERABLES));
}

/// `{{ value }}`.
fn print(to: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map => Ok(to.write_str(&printed(value))?),
        _ => escape_formatter(to, state, value),
    }
}

/// The value as Python's `str` gives it.
fn printed(value: &Value) -> String {
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            let mut text = String::new();
            represent(value, &mut text);
            text
        }
        _ => value.to_string(),
    }
}

/// The value as Python's `repr` gives it.
fn represent(value: &Value, to: &mut String) {
    match value.kind() {
        ValueKind::Undefined => to.push_str("Undefined"),
        ValueKind::String => represent_text(value.as_str().unwrap_or_default(), to),
        ValueKind::Number => match Json::deserialize(value.clone()) {
            Ok(Json::Float(number)) => to.push_str(&float(number)),
            _ => to.push_str(&value.to_string()),
        },
        ValueKind::Seq => {
            let items: Vec<Value> = value.try_iter().into_iter().flatten().collect();
            // Of the two sequences that there are, tuples are printed in brackets.
            let is_tuple = value.to_string().starts_with('(');
            to.push(if is_tuple { '(' } else { '[' });
            for (number, item) in items.iter().enumerate() {
                if number > 0 {
                    to.push_str(", ");
                }
                represent(item, to);
            }
            if is_tuple && items.len() == 1 {
                to.push(',');
            }
            to.push(if is_tuple { ')' } else { ']' });
        }
        ValueKind::Map => {
            to.push('{');
            for (number, key) in value.try_iter().into_iter().flatten().enumerate() {
                if number > 0 {
                    to.push_str(", ");
                }
                represent(&key, to);
                to.push_str(": ");
                represent(&value.get_item(&key).unwrap_or_default(), to);
            }
            to.push('}');
        }
        _ => to.push_str(&value.to_string()),
    }
}

fn represent_text(text: &str, to: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    to.push(quote);
    for letter in text.chars() {
        let escaped = match letter {
            '\\' => "\\\\".to_owned(),
            '\n' => "\\n".to_owned(),
            '\r' => "\\r".to_owned(),
            '\t' => "\\t".to_owned(),
            letter if letter == quote => format!("\\{letter}"),
            letter if is_printable(letter) => letter.to_string(),
            letter => match u32::from(letter) {
                code @ ..0x100 => format!("\\x{code:02x}"),
                code @ ..0x1_0000 => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            },
        };
        to.push_str(&escaped);
    }
    to.push(quote);
}

/// Whether Python's `repr` shows a character as it is: it is no control, no blank but the usual one, and for no private
/// use. Those that Unicode has not assigned count as printable here.
fn is_printable(letter: char) -> bool {
    let formats = matches!(
        letter,
        '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{890}'..='\u{891}' | '\u{8e2}'
            | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' | '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1343f}'
            | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0001}' | '\u{e0020}'..='\u{e007f}'
    );
    let private = matches!(letter, '\u{e000}'..='\u{f8ff}' | '\u{f0000}'..='\u{ffffd}' | '\u{100000}'..);
    letter == ' ' || !(letter.is_control() || letter.is_whitespace() || formats || private)
}

/// The filter of markup, with the entities of Python's.
fn escape(value: Value) -> Value {
    if value.is_safe() {
        return value;
    }
    let text = printed(&value).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    Value::from_safe_string(text.replace('\'', "&#39;").replace('"', "&#34;"))
}

/// Whether Python counts a character as white space.
fn is_blank(letter: char) -> bool {
    letter.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&letter)
}

/// Where the rest begins and ends after these letters, or blanks, are cut from both ends.
fn stripped(text: &str, letters: Option<&str>) -> (usize, usize) {
    let cut = |letter: char| letters.map_or_else(|| is_blank(letter), |letters| letters.contains(letter));
    let from = text.len() - text.trim_start_matches(cut).len();
    (from, text.trim_end_matches(cut).len().max(from))
}

/// Methods of texts, else those of the library.
fn method(state: &mut State, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    let unchanged =
        |state: &mut State| minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments);
    let Some(text) = value.as_str() else { return unchanged(state) };
    match name {
        "strip" | "lstrip" | "rstrip" => {
            let (letters,): (Option<String>,) = from_args(arguments)?;
            let (from, to) = stripped(text, letters.as_deref());
            let (from, to) = match name {
                "strip" => (from, to),
                "lstrip" => (from, text.len()),
                // A text of such letters alone is cut as a whole.
                _ if from == text.len() => (0, 0),
                _ => (0, to),
            };
            Ok(Value::from(&text[from..to]))
        }
        "split" if arguments.is_empty() => {
            Ok(text.split(is_blank).filter(|part| !part.is_empty()).map(Value::from).collect())
        }
        "splitlines" => {
            let (keep,): (Option<bool>,) = from_args(arguments)?;
            Ok(lines(text, keep.unwrap_or(false)).into_iter().map(Value::from).collect())
        }
        "removeprefix" | "removesuffix" => {
            let (part,): (String,) = from_args(arguments)?;
            let rest = match name {
                "removeprefix" => text.strip_prefix(part.as_str()),
                _ => text.strip_suffix(part.as_str()),
            };
            Ok(Value::from(rest.unwrap_or(text)))
        }
        "isspace" => Ok(Value::from(!text.is_empty() && text.chars().all(is_blank))),
        "title" => Ok(Value::from(title(text))),
        // There are digits of other scripts, fractions, numbers in circles.
        "isdigit" | "isnumeric" if !text.is_ascii() && text.chars().all(char::is_numeric) => {
            Err(Error::new(ErrorKind::InvalidOperation, format!("{name} is known for ASCII only")))
        }
        _ => unchanged(state),
    }
}

/// The lines of a text, where Python sees their ends.
fn lines(text: &str, keep: bool) -> Vec<&str> {
    const ENDS: [char; 10] =
        ['\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}'];
    let (mut found, mut rest) = (Vec::new(), text);
    while let Some((at, end)) = rest.char_indices().find(|(_, letter)| ENDS.contains(letter)) {
        let behind = at + if rest[at..].starts_with("\r\n") { 2 } else { end.len_utf8() };
        found.push(&rest[..if keep { behind } else { at }]);
        rest = &rest[behind..];
    }
    if !rest.is_empty() {
        found.push(rest);
    }
    found
}

/// Each letter behind one that is none is a capital.
fn title(text: &str) -> String {
    let mut titled = String::with_capacity(text.len());
    let mut inside = false;
    for letter in text.chars() {
        match (letter.is_lowercase() || letter.is_uppercase(), inside) {
            (true, true) => titled.extend(letter.to_lowercase()),
            (true, false) => titled.extend(letter.to_uppercase()),
            (false, _) => titled.push(letter),
        }
        inside = letter.is_lowercase() || letter.is_uppercase();
    }
    titled
}

/// A method of Python's dictionaries that a template reads as if it were a key: `x.items` without a call. There it is
/// the method, which is true and prints an address; in this language it is the key.
pub(super) fn uncalled_method(source: &str) -> Option<(&str, usize)> {
    let mut at = 0;
    while let Some(begin) = source.get(at..)?.find("{{").into_iter().chain(source[at..].find("{%")).min() {
        let close = if source[at + begin..].starts_with("{{") { "}}" } else { "%}" };
        at += begin + 2;
        let mut quote = None;
        while let Some(letter) = source.get(at..)?.chars().next() {
            let rest = &source[at..];
            if quote.is_none() && rest.starts_with(close) {
                break;
            }
            match (letter, quote) {
                ('\\', Some(_)) => at += rest.chars().nth(1).map_or(0, char::len_utf8),
                (letter, Some(open)) if letter == open => quote = None,
                ('\'' | '"', None) => quote = Some(letter),
                ('.', None) => {
                    let name = rest[1..].trim_start();
                    let end = name.find(|letter: char| !letter.is_alphanumeric() && letter != '_');
                    let (name, behind) = name.split_at(end.unwrap_or(name.len()));
                    if OF_DICTIONARIES.contains(&name) && !behind.trim_start().starts_with('(') {
                        return Some((name, source[..at].matches('\n').count() + 1));
                    }
                }
                _ => {}
            }
            at += letter.len_utf8();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use minijinja::context;

    use super::*;

    fn rendered(source: &str) -> String {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(minijinja::UndefinedBehavior::Lenient);
        adapt(&mut environment);
        let text: Json = serde_json::from_str(
            r#"{"n": 1e-7, "l": [1e22, 0.1, null, true, "it's", "\u200b\u0001\ud83e\udd80"], "k": {"items": 1.0}}"#,
        )
        .unwrap();
        let rendered = environment.render_str(source, context! { x => text.to_value() });
        rendered.unwrap_or_else(|error| format!("error: {error}"))
    }

    #[test]
    fn values_are_printed_and_cut_as_in_python() {
        for (source, expected) in [
            ("{{ x.n }} {{ 1e16 }} {{ 2.0 }} {{ 7 }}", "1e-07 1e+16 2.0 7"),
            ("{{ x.l }}", "[1e+22, 0.1, None, True, \"it's\", '\\u200b\\x01\u{1f980}']"),
            ("{{ [x.k, x.n] }}", "[{'items': 1.0}, 1e-07]"),
            ("{{ (1, 'a') }}{{ (x.n,) }}", "(1, 'a')(1e-07,)"),
            ("{{ x.n | string | length }}", "5"),
            ("{{ '\u{1c} a\u{85}' | trim }}|{{ '\u{1f}a '.strip() }}|", "a|a|"),
            ("{{ ' a '.lstrip() }}|{{ '  '.rstrip() }}|{{ ' a '.rstrip() }}|", "a || a|"),
            ("{{ 'xyax'.strip('xy') }}{{ 'xax' | trim('x') }}", "aa"),
            ("{{ ' a\u{1c}b  c '.split() }}", "['a', 'b', 'c']"),
            ("{{ 'a\r\nb\rc\u{b}d\u{2028}e\n'.splitlines() }}", "['a', 'b', 'c', 'd', 'e']"),
            ("{{ 'a\r\nb\n\nc'.splitlines(true) }}", "['a\\r\\n', 'b\\n', '\\n', 'c']"),
            ("{{ \"it's o'neil X_y 3d\".title() }}", "It'S O'Neil X_Y 3D"),
            ("{{ 'abc'.removeprefix('ab') }}{{ 'abc'.removesuffix('c') }}{{ 'abc'.removeprefix('c') }}", "cababc"),
            ("{{ \"<'&\" | e }}{{ '<' | safe | e }}", "&lt;&#39;&amp;<"),
            ("{{ 'a' is sequence }}{{ {} is sequence }}{{ none is iterable }}", "TrueTrueFalse"),
            ("{{ nope is iterable }}{{ x is iterable }}{{ 'a' is iterable }}", "TrueTrueTrue"),
        ] {
            assert_eq!(rendered(source), expected, "{source}");
        }
        for unknown in ["{{ 'a' | attr('x') }}", "{{ 'a,b' | split(',') }}", "{{ '\u{bd}'.isdigit() }}"] {
            assert!(rendered(unknown).starts_with("error"), "{unknown}: {}", rendered(unknown));
        }
    }

    #[test]
    fn a_method_that_is_not_called_is_found_and_text_is_not() {
        for (source, found) in [
            ("{% if a.items %}", Some(("items", 1))),
            ("\n{{ '}}' }}\n{{ a.b . keys | length }}", Some(("keys", 3))),
            ("{{ a.items() }}{{ a.items () }}{{ a['items'] }}{{ a.items_of }}{{ '.items' }}", None),
            ("a.items {{ \"\\\".items\" }} .items {% if a %}", None),
            ("{{ a.values", Some(("values", 1))),
            ("{{ 'a", None),
        ] {
            assert_eq!(uncalled_method(source), found, "{source}");
        }
    }
}
