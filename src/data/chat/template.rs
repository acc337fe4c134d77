//! A chat template, rendered as transformers renders it.
//!
//! The language is Jinja (`minijinja`), with what transformers adds to it (`utils/chat_template_utils.py`):
//! `raise_exception`, `strftime_now`, `tojson` as `json.dumps` without escapes for HTML, `{% generation %}` blocks, the
//! values of Python ([`python`]), and blocks that take the line end behind them along.
//!
//! # Limits
//! A template is untrusted input. Its length is limited, and so is the work of one rendering, in proportion to the
//! chat: loops in loops end with an error. It sees no files and no clock.

use std::collections::BTreeMap;

use jiff::civil::Date;
use minijinja::{
    Environment, Error, ErrorKind, State, UndefinedBehavior, Value, context, syntax::SyntaxConfig, value::Kwargs,
};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{
    marked::{TURN, TURN_END},
    python,
    value::{Json, Style, dump},
};

/// The longest template, bytes. The longest in use have a tenth.
const LONGEST: usize = 1 << 20;
/// Work that every rendering may do: instructions, and 64 bytes each of data.
const WORK: u64 = 4 << 20;
/// Further work for each byte of the chat.
const WORK_PER_BYTE: u64 = 64;
/// The deepest nesting of calls and blocks: it fits the stack of a thread.
const DEEPEST: usize = 200;
/// The function behind a `{% generation %}` block.
const GENERATION: &str = "__assistants_turn";
/// Begins the message of an error that the template raised itself.
const RAISED: &str = "the chat template refuses it: ";
/// The message of a template that asks for the date.
const NO_DATE: &str = "the chat template asks for the date";

/// Why a chat can't be rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The template asks for the date, and there is none.
    Date,
    /// Anything else.
    Chat(String),
}

/// A template, compiled.
pub(super) struct Template {
    environment: Environment<'static>,
    sha256: String,
    has_generation: bool,
}

impl Template {
    /// Compiles `source`. `tokens`: the special tokens that it may name, such as `bos_token`.
    pub(super) fn new(source: &str, tokens: &BTreeMap<String, String>, date: Option<Date>) -> Result<Self, String> {
        if source.len() > LONGEST {
            return Err(format!("the chat template has {} bytes; {LONGEST} are the most", source.len()));
        }
        let mut environment = Environment::new();
        let syntax =
            SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|error| error.to_string())?;
        environment.set_syntax(syntax);
        // Jinja's own: an undefined value prints nothing, and has no fields.
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_recursion_limit(DEEPEST);
        python::adapt(&mut environment);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
        });
        environment.add_function("strftime_now", move |format: String| strftime(date, &format));
        environment.add_function(GENERATION, turn);
        for (name, token) in tokens {
            environment.add_global(name.clone(), token.clone());
        }
        if let Some((name, line)) = python::uncalled_method(source) {
            return Err(format!(
                "line {line} of the chat template reads .{name} without calling it, which in Python is never the key \
                 of that name: write ['{name}']"
            ));
        }
        // As Jinja reads a file.
        let lines = source.replace("\r\n", "\n").replace('\r', "\n");
        let (body, has_generation) = with_generation_calls(&lines);
        environment
            .add_template_owned("chat", body)
            .map_err(|error| format!("the chat template can't be read: {}", told(&error)))?;
        let sha256 = Sha256::digest(source.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { environment, sha256, has_generation })
    }

    /// SHA-256 of the source, in hexadecimal digits.
    pub(super) fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Whether the template says itself which parts an assistant generates.
    pub(super) fn has_generation(&self) -> bool {
        self.has_generation
    }

    /// Renders messages. `bytes`: the length of the chat. `prompt`: with the beginning of an assistant's turn behind
    /// them. In the text, [`TURN`] and [`TURN_END`] surround what `{% generation %}` blocks hold.
    pub(super) fn render(
        &self,
        messages: &[Value],
        tools: &Value,
        bytes: usize,
        prompt: bool,
    ) -> Result<String, Failure> {
        let chat = |error: &Error| Failure::Chat(format!("can't be rendered by the chat template: {}", told(error)));
        // A copy shares its templates and functions.
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(WORK.saturating_add(WORK_PER_BYTE.saturating_mul(bytes as u64))));
        let values = context! {
            messages => messages.to_vec(), tools => tools, documents => (), add_generation_prompt => prompt,
        };
        let template = environment.get_template("chat").map_err(|error| chat(&error))?;
        template.render(values).map_err(|error| match error.detail() {
            Some(NO_DATE) => Failure::Date,
            Some(detail) if detail.starts_with(RAISED) => Failure::Chat(detail.to_owned()),
            _ => chat(&error),
        })
    }
}

/// An error with its causes, on one line.
fn told(error: &Error) -> String {
    let mut text = match error.kind() {
        ErrorKind::OutOfFuel => "it does more work than a template may for a chat of this length".to_owned(),
        kind => error.detail().map_or_else(|| kind.to_string(), str::to_owned),
    };
    if let Some(line) = error.line() {
        text.push_str(&format!(" (line {line} of the template)"));
    }
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

/// `strftime_now` on a fixed day, at midnight.
fn strftime(date: Option<Date>, format: &str) -> Result<String, Error> {
    let Some(date) = date else { return Err(Error::new(ErrorKind::InvalidOperation, NO_DATE)) };
    let failed = |reason: String| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {reason}"));
    let format = as_in_c(format).map_err(failed)?;
    jiff::fmt::strtime::format(format, date.at(0, 0, 0, 0)).map_err(|error| failed(error.to_string()))
}

/// The directives that depend on a locale, as those of C's, and the microseconds of midnight.
fn as_in_c(format: &str) -> Result<String, String> {
    let mut expanded = String::with_capacity(format.len());
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            expanded.push(letter);
            continue;
        }
        match letters.next() {
            Some('c') => expanded.push_str("%a %b %e %H:%M:%S %Y"),
            Some('x') => expanded.push_str("%m/%d/%y"),
            Some('f') => expanded.push_str("000000"),
            Some(flag @ ('-' | '_' | '0' | '^' | '#')) => match letters.clone().next() {
                Some(directive @ ('c' | 'x' | 'f')) => return Err(format!("%{flag}{directive} is not known")),
                _ => expanded.extend(['%', flag]),
            },
            Some(other) => expanded.extend(['%', other]),
            None => expanded.push('%'),
        }
    }
    Ok(expanded)
}

/// A `{% generation %}` block: its text, between the marks of a turn.
fn turn(state: &mut State, arguments: Kwargs) -> Result<String, Error> {
    let caller: Value = arguments.get("caller")?;
    let body = caller.call(state, &[])?;
    Ok(format!("{TURN}{body}{TURN_END}"))
}

/// Python's `json.dumps`, as transformers gives it to templates.
fn to_json(value: Value, arguments: Kwargs) -> Result<String, Error> {
    let invalid = |reason: String| Error::new(ErrorKind::InvalidOperation, reason);
    if value.is_undefined() {
        return Err(invalid("tojson: the value is undefined".into()));
    }
    let indent = match arguments.get::<Option<Value>>("indent")?.filter(|indent| !indent.is_none()) {
        Some(indent) => {
            let indent = usize::try_from(indent).ok().filter(|indent| *indent <= 64);
            Some(indent.ok_or_else(|| invalid("tojson: indent is no number below 65".into()))?)
        }
        None => None,
    };
    let mut style = Style::new(indent);
    style.ascii = arguments.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    style.sort_keys = arguments.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    if let Some(separators) = arguments.get::<Option<Value>>("separators")?.filter(|separators| !separators.is_none()) {
        let pair: Vec<String> = separators.try_iter()?.map(|part| part.to_string()).collect();
        let [items, key] = pair.as_slice() else { return Err(invalid("tojson: separators are two texts".into())) };
        (style.between_items, style.after_key) = (items.clone(), key.clone());
    }
    arguments.assert_all_used()?;
    let json = Json::deserialize(value).map_err(|error| invalid(format!("tojson: {error}")))?;
    Ok(dump(&json, &style))
}

/// The source with `{% generation %}` blocks as calls, which the language has; and whether there are any. Both kinds of
/// block treat the blanks around them alike.
fn with_generation_calls(source: &str) -> (String, bool) {
    let (mut body, mut rest, mut found) = (String::with_capacity(source.len()), source, false);
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        body.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let inside = &tag[2..end];
        let word = inside.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        let replaced = match word {
            "generation" => Some(format!("call {GENERATION}()")),
            "endgeneration" => Some("endcall".to_owned()),
            _ => None,
        };
        match replaced {
            Some(new) => {
                found = true;
                body.push_str("{%");
                // The signs at its ends stay.
                body.push_str(&inside.replacen(word, &format!(" {new} "), 1));
                body.push_str("%}");
                rest = &tag[end + 2..];
            }
            None => {
                body.push_str("{%");
                rest = &tag[2..];
            }
        }
    }
    body.push_str(rest);
    (body, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(source: &str, messages: &str, date: Option<&str>) -> Result<String, Failure> {
        let tokens = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
        let template = Template::new(source, &tokens, date.map(|date| date.parse().unwrap())).map_err(Failure::Chat)?;
        let messages: Vec<Json> = serde_json::from_str(messages).unwrap();
        let messages: Vec<Value> = messages.iter().map(Json::to_value).collect();
        template.render(&messages, &Value::from(()), 100, true)
    }

    fn refused(source: &str) -> String {
        match rendered(source, r#"[{"role": "user", "content": "x"}]"#, None).unwrap_err() {
            Failure::Chat(reason) => reason,
            Failure::Date => "date".into(),
        }
    }

    #[test]
    fn blocks_filters_and_methods_are_those_of_transformers() {
        let messages = r#"[{"role": "user", "content": " a</think>b ", "n": 1.0, "t": {"z": "<é>", "a": null}}]"#;
        let turn = format!("{TURN}b{TURN_END}");
        for (source, expected) in [
            ("{{ bos_token }}{% if eos_token %}x{% endif %}{{ eos_token }}", "<s>"),
            ("{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\n", "user\n"),
            ("{{ messages[0].t | tojson }}", "{\"z\": \"<\u{e9}>\", \"a\": null}"),
            ("{{ messages[0].t | tojson(indent=1) }}", "{\n \"z\": \"<\u{e9}>\",\n \"a\": null\n}"),
            ("{{ messages[0].t | tojson(separators=(',', ':'), sort_keys=true) }}", "{\"a\":null,\"z\":\"<\u{e9}>\"}"),
            ("{{ messages[0]['content'].split('</think>')[-1].strip() }}", "b"),
            ("{% generation %}\nb{% endgeneration %}\n", turn.as_str()),
            ("x  {%- generation -%}\n b {%- endgeneration -%}  y", &format!("x{turn}y")),
            ("{{ none }} {{ true }} {{ messages[0].n }}", "None True 1.0"),
            ("{{ strftime_now('%d %b %Y, %A') }}", "05 Mar 2026, Thursday"),
            ("{{ strftime_now('%c|%x|%f|%%f %-d') }}", "Thu Mar  5 00:00:00 2026|03/05/26|000000|%f 5"),
            ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ tools is none }}", "True"),
            ("{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 2 %}{{ ns.n }}", "2"),
            ("a\r\n{% if true %}\r\nb{{ 'c\r\nd' | length }}\r{% endif %}\r\n", "a\nb3\n"),
        ] {
            assert_eq!(rendered(source, messages, Some("2026-03-05")).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn what_a_template_refuses_or_can_not_do_is_told() {
        assert_eq!(refused("{{ raise_exception('no ' + messages[0].role) }}"), format!("{RAISED}no user"));
        assert_eq!(refused("{{ strftime_now('%Y') }}"), "date");
        assert!(matches!(rendered("{{ strftime_now('%-f') }}", "[]", Some("2026-03-05")), Err(Failure::Chat(_))));
        for (source, said) in [
            ("{% if %}", "can't be read"),
            ("\n{{ messages[0].content.nope() }}", "line 2 of the template"),
            ("{{ messages[9].role }}", "undefined"),
            ("{{ nope | tojson }}", "undefined"),
            ("{{ messages | nope }}", "nope"),
            ("{% include 'x' %}", "can't be read"),
            ("{{ 1 }}\n{% if messages[0].items %}x{% endif %}", "line 2 of the chat template reads .items"),
        ] {
            assert!(refused(source).contains(said), "{source}: {}", refused(source));
        }
    }

    #[test]
    fn a_template_without_end_or_of_any_size_is_an_error() {
        let loops = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}";
        assert!(refused(loops).contains("more work"), "{}", refused(loops));
        let doubles = "{% set ns = namespace(s='x') %}{% for a in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}";
        assert!(refused(doubles).contains("more work"), "{}", refused(doubles));
        let deep = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
        assert!(refused(deep).contains("can't be rendered"), "{}", refused(deep));
        let nested = "{% if true %}".repeat(5000);
        assert!(refused(&nested).contains("can't be read"), "{}", refused(&nested));
        assert!(refused(&"x".repeat(LONGEST + 1)).contains("are the most"));
    }
}
