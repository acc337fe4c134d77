//! The page's head: its policy, its title, its style.

use sha2::{Digest, Sha256};

use super::{Input, html::Html};

/// The style.
const STYLE: &str = include_str!("style.css");

pub(super) fn write(page: &mut Html, input: &Input<'_>) {
    let sum: [u8; 32] = Sha256::digest(STYLE).into();
    let policy =
        format!("default-src 'none'; style-src 'sha256-{}'; base-uri 'none'; form-action 'none'", base64(&sum));
    let title = format!("Run {}: report", input.state.run_id());
    page.raw("<head>\n<meta charset=\"utf-8\">\n");
    page.open("meta", &[("http-equiv", "Content-Security-Policy".into()), ("content", policy.as_str().into())]);
    page.raw("\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n");
    page.raw("<meta name=\"color-scheme\" content=\"light dark\">\n<meta name=\"referrer\" content=\"no-referrer\">\n");
    page.words("title", &title);
    page.raw("<style>").raw(STYLE).raw("</style>\n</head>\n");
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let mut group = 0_usize;
        for at in 0..3 {
            group = group << 8 | usize::from(three.get(at).copied().unwrap_or(0));
        }
        for at in 0..4 {
            let is_padding = at > three.len();
            text.push(if is_padding { '=' } else { DIGITS[group >> (18 - 6 * at) & 63] as char });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_standard() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    #[test]
    fn the_style_closes_no_element_and_loads_nothing() {
        for word in ["</", "url(", "@import", "\r"] {
            assert!(!STYLE.contains(word), "{word:?}");
        }
    }
}
