//! What a service answers: JSON or XML, a result or a refusal.
//!
//! Nothing that was answered becomes part of an error's text, except the code and the message of a refusal: a result
//! may be a secret. Pure functions.

use aws_smithy_types::error::ErrorMetadata;
use quick_xml::events::Event;
use serde::{Deserialize, de::DeserializeOwned};

use crate::cloud::aws::Failure;

/// A list in XML: `<member>` for each.
#[derive(Debug, Deserialize)]
pub(crate) struct Members<T> {
    #[serde(default = "Vec::new")]
    pub member: Vec<T>,
}

// Derived, it would ask the same of `T`.
impl<T> Default for Members<T> {
    fn default() -> Self {
        Self { member: Vec::new() }
    }
}

/// A list as EC2 has it: `<item>` for each.
#[derive(Debug, Deserialize)]
pub(crate) struct Items<T> {
    #[serde(default = "Vec::new")]
    pub item: Vec<T>,
}

// Derived, it would ask the same of `T`.
impl<T> Default for Items<T> {
    fn default() -> Self {
        Self { item: Vec::new() }
    }
}

/// A result in JSON.
pub(super) fn json<A: DeserializeOwned>(body: &[u8]) -> Result<A, Failure> {
    // Its own text repeats values.
    serde_json::from_slice(body)
        .map_err(|error| malformed(&format!("JSON, line {}, column {}", error.line(), error.column())))
}

/// A result in XML, whose root is `root`.
pub(super) fn xml<A: DeserializeOwned>(root: &str, body: &[u8]) -> Result<A, Failure> {
    let text = std::str::from_utf8(body).map_err(|_| malformed("XML, not UTF-8"))?;
    if root_of(text).as_deref() != Some(root) {
        return Err(malformed(&format!("XML, its root is not {root}")));
    }
    quick_xml::de::from_str(text).map_err(|_| malformed(&format!("XML below {root}")))
}

fn malformed(what: &str) -> Failure {
    Failure::Other(format!("the answer is not understood ({what})"))
}

/// The name of the first element, without its namespace's prefix.
fn root_of(text: &str) -> Option<String> {
    let mut reader = quick_xml::Reader::from_str(text);
    loop {
        match reader.read_event().ok()? {
            Event::Start(first) | Event::Empty(first) => {
                return String::from_utf8(first.local_name().as_ref().to_vec()).ok();
            }
            Event::Eof => return None,
            _ => {}
        }
    }
}

/// A refusal's code and message, as far as it has them; `kind` is the header `x-amzn-errortype`.
pub(super) fn refusal(kind: Option<&str>, body: &[u8]) -> ErrorMetadata {
    let (code, message) = of_json(kind, body).or_else(|| of_xml(body)).unwrap_or_default();
    let mut refusal = ErrorMetadata::builder();
    if let Some(code) = code.as_deref().map(short).filter(|code| !code.is_empty()) {
        refusal = refusal.code(code);
    }
    if let Some(message) = message {
        refusal = refusal.message(message);
    }
    refusal.build()
}

/// A code without namespace and URL: `AccessDenied` of `aws.x#AccessDenied:http://…`.
fn short(code: &str) -> &str {
    let code = code.split(':').next().unwrap_or_default();
    code.split_once('#').map_or(code, |(_, code)| code).trim()
}

type Said = (Option<String>, Option<String>);

fn of_json(kind: Option<&str>, body: &[u8]) -> Option<Said> {
    let body = serde_json::from_slice::<serde_json::Value>(body).ok().filter(serde_json::Value::is_object);
    if body.is_none() && kind.is_none() {
        return None;
    }
    let text = |name: &str| body.as_ref()?.get(name)?.as_str().map(str::to_owned);
    let code = kind.map(str::to_owned).or_else(|| text("code")).or_else(|| text("__type"));
    Some((code, text("message").or_else(|| text("Message")).or_else(|| text("errorMessage"))))
}

fn of_xml(body: &[u8]) -> Option<Said> {
    #[derive(Deserialize)]
    struct Answer {
        #[serde(rename = "Error")]
        error: Refusal,
    }
    /// EC2 lists its one error.
    #[derive(Deserialize)]
    struct Listed {
        #[serde(rename = "Errors")]
        errors: Answer,
    }
    #[derive(Deserialize)]
    struct Refusal {
        #[serde(rename = "Code")]
        code: Option<String>,
        #[serde(rename = "Message")]
        message: Option<String>,
    }
    let text = std::str::from_utf8(body).ok()?;
    let plain = quick_xml::de::from_str(text).ok();
    let answer: Answer = plain.or_else(|| Some(quick_xml::de::from_str::<Listed>(text).ok()?.errors))?;
    Some((answer.error.code, answer.error.message))
}

#[cfg(test)]
mod tests {
    use serde::de::IgnoredAny;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Listed {
        #[serde(rename = "ListResult")]
        result: Inner,
    }

    #[derive(Debug, Deserialize)]
    struct Inner {
        #[serde(rename = "Things", default)]
        things: Members<Thing>,
    }

    #[derive(Debug, Deserialize)]
    struct Thing {
        #[serde(rename = "Name")]
        name: Option<String>,
        #[serde(rename = "Count")]
        count: Option<i32>,
    }

    fn said(kind: Option<&str>, body: &[u8]) -> (String, String) {
        let refusal = refusal(kind, body);
        (refusal.code().unwrap_or("-").to_owned(), refusal.message().unwrap_or("-").to_owned())
    }

    #[test]
    fn a_refusal_has_a_code_in_every_shape() {
        let xml = br#"<?xml version="1.0"?><ErrorResponse xmlns="http://autoscaling.amazonaws.com/doc/2011-01-01/">
            <Error><Type>Sender</Type><Code>ValidationError</Code><Message>a &lt;group&gt;&#x21;</Message></Error>
            <RequestId>x</RequestId></ErrorResponse>"#;
        for (kind, body, code, message) in [
            (None, br#"{"__type":"AccessDeniedException","message":"no"}"#.as_slice(), "AccessDeniedException", "no"),
            (None, br#"{"__type":"com.amazon.coral#Throttling","Message":"slow"}"#, "Throttling", "slow"),
            (None, br#"{"__type":"a#B:http://c/","errorMessage":"m"}"#, "B", "m"),
            (None, br#"{"__type":"Type","code":"Code","message":7}"#, "Code", "-"),
            (Some("FromHeader:http://x"), br#"{"__type":"FromBody","message":"m"}"#, "FromHeader", "m"),
            (Some("FromHeader"), b"not JSON", "FromHeader", "-"),
            (None, xml, "ValidationError", "a <group>!"),
            (None, b"<ErrorResponse><Error><Code>Only</Code></Error></ErrorResponse>", "Only", "-"),
            (
                None,
                b"<Response><Errors><Error><Code>InvalidSubnetID.NotFound</Code><Message>m</Message></Error></Errors>\
                  <RequestID>x</RequestID></Response>",
                "InvalidSubnetID.NotFound",
                "m",
            ),
            // Nothing of use.
            (None, b"", "-", "-"),
            (None, b"{}", "-", "-"),
            (None, b"[1]", "-", "-"),
            (None, br#"{"__type":"Broken""#, "-", "-"),
            (None, b"\xff\xfe{}", "-", "-"),
            (None, b"<html><body>502 Bad Gateway</body></html>", "-", "-"),
            (None, b"<ErrorResponse><Error><Code>Cut</Code>", "-", "-"),
            (None, b"<ErrorResponse><Error><Code>\xff</Code></Error></ErrorResponse>", "-", "-"),
            (None, br#"<!DOCTYPE x [<!ENTITY e "ha">]><E><Error><Code>&e;</Code></Error></E>"#, "-", "-"),
        ] {
            let (code, message) = (code.to_owned(), message.to_owned());
            assert_eq!(said(kind, body), (code, message), "{}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn a_list_is_read_and_nothing_else_is_taken_for_one() {
        let list = |inner: &str| {
            format!(
                r#"<ListResponse xmlns="http://x/"><ListResult>{inner}</ListResult><More><Deep/></More></ListResponse>"#
            )
        };
        let read =
            |text: &str| xml::<Listed>("ListResponse", text.as_bytes()).map(|listed| listed.result.things.member);
        let two = "<Things><member><Count>3</Count><New>?</New><Name>a &amp; b</Name></member><member/></Things>";
        let things = read(&list(two)).unwrap();
        let expected = [(Some("a & b"), Some(3)), (None, None)];
        assert_eq!(things.iter().map(|thing| (thing.name.as_deref(), thing.count)).collect::<Vec<_>>(), expected);
        for none in ["", "<Things/>", "<Things></Things>"] {
            assert!(read(&list(none)).unwrap().is_empty(), "{none}");
        }
        let whole = list(two);
        for wrong in [
            "",
            "{}",
            "<html>Sign in</html>",
            &whole[..whole.len() - 1],
            &whole[..whole.len() / 2],
            &whole.replace("ListResponse", "OtherResponse"),
            &whole.replace("</ListResult>", "</Things>"),
            &list("<Things><member><Count>many</Count></member></Things>"),
        ] {
            let failure = read(wrong).unwrap_err();
            assert!(failure.to_string().contains("not understood"), "{wrong}: {failure}");
            assert_eq!(failure.code(), "");
        }
        assert!(xml::<Listed>("ListResponse", b"<ListResponse>\xff</ListResponse>").is_err());
        assert!(xml::<IgnoredAny>("R", b"<?xml version=\"1.0\"?>\n<!-- c --><R><Result/></R>").is_ok());
        assert!(xml::<IgnoredAny>("R", b"<R><Result>").is_err());
    }

    #[test]
    fn a_list_that_is_deep_or_hostile_ends() {
        let deep = format!("<R>{}{}</R>", "<a>".repeat(100_000), "</a>".repeat(100_000));
        assert!(xml::<IgnoredAny>("R", deep.as_bytes()).is_ok());
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(json::<serde_json::Value>(deep.as_bytes()).is_err());
        assert_eq!(said(None, deep.as_bytes()), ("-".into(), "-".into()));
    }

    #[test]
    fn no_value_becomes_part_of_an_error() {
        for body in [r#"{"Value":"hunter2"}"#, r#""hunter2""#, r#"["hunter2""#] {
            let error = json::<Vec<u8>>(body.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("not understood") && !error.contains("hunter2"), "{error}");
        }
        let error = xml::<Listed>("ListResponse", b"<ListResponse>hunter2<hunter2/></ListResponse>").unwrap_err();
        assert!(!error.to_string().contains("hunter2"), "{error}");
        assert!(json::<serde_json::Value>(b"{\"a\": \"\xff\"}").is_err());
    }
}
