//! Values that are written as text: durations, cadences, URIs. Each is read and written here, so that both agree.

use std::{
    net::IpAddr,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use super::{Cadence, Spacing};

/// Reads `90s`, `2h`, `1h30m`, `250ms`, `1d`. `None` for anything else, and on overflow.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    let mut total = Duration::ZERO;
    let mut last_unit = u64::MAX;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = rest.split_at(digits);
        let letters = after.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, after) = after.split_at(letters);
        let millis: u64 = match unit {
            "d" => 86_400_000,
            "h" => 3_600_000,
            "m" | "min" => 60_000,
            "s" => 1_000,
            "ms" => 1,
            _ => return None,
        };
        // "30m1h" or "1h1h" is more likely a slip than meant.
        if millis >= last_unit {
            return None;
        }
        last_unit = millis;
        let part = number.parse::<u64>().ok()?.checked_mul(millis)?;
        total = total.checked_add(Duration::from_millis(part))?;
        rest = after.trim_start();
    }
    Some(total)
}

/// Writes a duration the way [`parse_duration`] reads it; milliseconds are the finest.
pub fn format_duration(duration: Duration) -> String {
    let mut millis = duration.as_millis();
    if millis == 0 {
        return "0s".into();
    }
    let mut text = String::new();
    for (name, size) in [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)] {
        if millis >= size {
            text.push_str(&format!("{}{name}", millis / size));
            millis %= size;
        }
    }
    text
}

/// Reads `500 steps` or `1 step`; at least 1.
pub fn parse_steps(text: &str) -> Option<u64> {
    let text = text.trim();
    let number = text.strip_suffix("steps").or_else(|| text.strip_suffix("step"))?.trim_end();
    number.parse().ok().filter(|steps| *steps > 0)
}

/// Writes a count of steps the way `parse_steps` reads it.
pub fn format_steps(steps: u64) -> String {
    format!("{steps} step{}", if steps == 1 { "" } else { "s" })
}

/// Reads `auto`, `500 steps` or a duration of at least a second.
pub fn parse_cadence(text: &str) -> Option<Cadence> {
    if text.trim() == "auto" {
        return Some(Cadence::Auto);
    }
    parse_steps(text)
        .map(Cadence::Steps)
        .or_else(|| parse_duration(text).filter(|time| *time >= Duration::from_secs(1)).map(Cadence::Time))
}

/// Writes a cadence the way `parse_cadence` reads it.
pub fn format_cadence(cadence: Cadence) -> String {
    match cadence {
        Cadence::Auto => "auto".into(),
        Cadence::Steps(steps) => format_steps(steps),
        Cadence::Time(time) => format_duration(time),
    }
}

/// Reads `1000 steps` or a duration of at least a second.
pub fn parse_spacing(text: &str) -> Option<Spacing> {
    let time = || parse_duration(text).filter(|time| *time >= Duration::from_secs(1));
    parse_steps(text).map(Spacing::Steps).or_else(|| time().map(|seconds| Spacing::Time { seconds }))
}

/// Writes a spacing the way [`parse_spacing`] reads it.
pub fn format_spacing(spacing: Spacing) -> String {
    match spacing {
        Spacing::Steps(steps) => format_steps(steps),
        Spacing::Time { seconds } => format_duration(seconds),
    }
}

/// Why another machine can't dial `address`; `None`: it may.
pub fn undialable(address: IpAddr) -> Option<&'static str> {
    let (unspecified, multicast) = (address.is_unspecified(), address.is_multicast());
    let local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    match (unspecified, multicast, local) {
        (true, ..) => Some("it is no address"),
        (_, true, _) => Some("it is a group's"),
        (.., true) => Some("it holds on one line only"),
        _ => None,
    }
}

/// The schemes of stores.
const SCHEMES: [&str; 5] = ["s3", "gs", "az", "file", "memory"];

/// Makes a store's URI, or a path, absolute: a relative path is taken from `cwd`. Remote URIs lose trailing slashes
/// only.
///
/// # Errors
/// With a phrase that says what would be right.
pub fn absolute_uri(text: &str, cwd: &Path) -> Result<String, &'static str> {
    const EXPECTED: &str = "a URI such as s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, \
                            file://path or memory://, or a path";
    let text = text.trim();
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err(EXPECTED);
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        // "s3:/bucket" and "s3:bucket" are slips, not paths.
        if text.split_once(':').is_some_and(|(scheme, _)| SCHEMES.contains(&scheme)) {
            return Err(EXPECTED);
        }
        return file_uri(Path::new(text), cwd).ok_or(EXPECTED);
    };
    match scheme {
        // The rest is a path, letter by letter: "file://./runs" is no URI by the standard, and nothing is encoded.
        "file" => match on_this_machine(rest) {
            "" => Err(EXPECTED),
            path => file_uri(Path::new(path), cwd).ok_or(EXPECTED),
        },
        "memory" => Ok(text.to_owned()),
        "s3" | "gs" | "az" => {
            let url = url::Url::parse(text).map_err(|_| EXPECTED)?;
            if url.password().is_some() || !url.username().is_empty() {
                return Err("a URI without credentials (they come from the environment or the machine's role)");
            }
            if url.host_str().is_none_or(str::is_empty) {
                return Err(EXPECTED);
            }
            Ok(text.trim_end_matches('/').to_owned())
        }
        _ => Err(EXPECTED),
    }
}

/// The path in the part of a URI after `file://`, which may name this machine before it: `localhost/srv/runs` (RFC
/// 8089). The folder `localhost` is `./localhost`.
fn on_this_machine(rest: &str) -> &str {
    const HOST: &str = "localhost";
    match rest.split_at_checked(HOST.len()) {
        Some((host, path)) if host.eq_ignore_ascii_case(HOST) && (path.is_empty() || path.starts_with('/')) => path,
        _ => rest,
    }
}

/// The absolute `file://` URI of a path, without `.` and `..`.
fn file_uri(path: &Path, cwd: &Path) -> Option<String> {
    let mut clean = PathBuf::new();
    for part in cwd.join(path).components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                clean.pop();
            }
            other => clean.push(other),
        }
    }
    Some(format!("file://{}", clean.to_str()?))
}

/// Reads a file of at most `limit` bytes; its stated length is not trusted, but counted. Opening a named pipe would
/// wait for a writer without end: only regular files are read, and descriptors that the caller's shell has opened.
///
/// # Errors
/// The file system's, `FileTooLarge`, and `InvalidInput` for a pipe, a socket or a device.
pub fn read_small(path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
    use std::io::{Error, ErrorKind};
    let is_open = ["/dev/stdin", "/dev/fd", "/proc"].iter().any(|open| path.starts_with(open));
    let kind = std::fs::metadata(path)?.file_type();
    if !kind.is_file() && !kind.is_dir() && !is_open {
        return Err(Error::new(ErrorKind::InvalidInput, "it is a pipe, a socket or a device, not a file"));
    }
    read_at_most(path, limit)
}

/// The same for what a person names on purpose, a named pipe, too: it waits for the writer, and a signal ends the wait.
pub fn read_at_most(path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
    use std::io::{Error, ErrorKind, Read};
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(Error::new(ErrorKind::FileTooLarge, format!("longer than {limit} bytes")));
    }
    Ok(bytes)
}

/// A text without the byte order mark that some editors put before it.
pub fn without_bom(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

/// The local path behind a path or a `file://` URI; `None` for a remote one.
pub fn local_path(uri: &str) -> Option<PathBuf> {
    match uri.split_once("://") {
        None => Some(PathBuf::from(uri)),
        Some(("file", path)) => Some(PathBuf::from(on_this_machine(path))),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_and_written_alike() {
        for (text, millis) in [
            ("90s", 90_000),
            ("2h", 7_200_000),
            ("1h30m", 5_400_000),
            ("1h 30m", 5_400_000),
            ("250ms", 250),
            ("1d", 86_400_000),
        ] {
            let duration = parse_duration(text).unwrap();
            assert_eq!(duration.as_millis(), millis, "{text}");
            assert_eq!(parse_duration(&format_duration(duration)), Some(duration), "{text}");
        }
        assert_eq!(format_duration(Duration::from_secs(5400)), "1h30m");
        assert_eq!(format_duration(Duration::ZERO), "0s");
        for bad in [
            "",
            " ",
            "2",
            "h",
            "-2h",
            "2 weeks",
            "1.5h",
            "30m1h",
            "1h1h",
            "99999999999999999999s",
            "18446744073709551615d",
            "2hé",
        ] {
            assert_eq!(parse_duration(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn cadences_are_read_and_written_alike() {
        for (text, cadence) in [
            ("auto", Cadence::Auto),
            ("500 steps", Cadence::Steps(500)),
            ("1 step", Cadence::Steps(1)),
            ("2h", Cadence::Time(Duration::from_secs(7200))),
        ] {
            assert_eq!(parse_cadence(text), Some(cadence));
            assert_eq!(format_cadence(cadence), text);
        }
        assert_eq!(parse_cadence("500steps"), Some(Cadence::Steps(500)));
        for bad in ["0 steps", "-1 steps", "steps", "500", "0s", "10ms", "sometimes"] {
            assert_eq!(parse_cadence(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn spacings_are_read_and_written_alike() {
        let six_hours = Spacing::Time { seconds: Duration::from_secs(6 * 3600) };
        for (text, spacing) in [("1000 steps", Spacing::Steps(1000)), ("6h", six_hours)] {
            assert_eq!(parse_spacing(text), Some(spacing));
            assert_eq!(format_spacing(spacing), text);
        }
        for bad in ["0 steps", "0s", "10ms", "auto", "1000", ""] {
            assert_eq!(parse_spacing(bad), None, "{bad:?}");
        }
        // As journals keep it: a plain number has always been steps.
        assert_eq!(serde_json::to_string(&Spacing::Steps(1000)).unwrap(), "1000");
        assert_eq!(serde_json::to_string(&six_hours).unwrap(), r#"{"seconds":21600.0}"#);
        for (stored, spacing) in [("1000", Spacing::Steps(1000)), (r#"{"seconds":21600}"#, six_hours)] {
            assert_eq!(serde_json::from_str::<Spacing>(stored).unwrap(), spacing);
        }
        for bad in ["-1", "1.5", r#"{"seconds":-1.0}"#, r#"{"seconds":1e300}"#, "{}", r#""6h""#, "[]"] {
            assert!(serde_json::from_str::<Spacing>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn uris_become_absolute() {
        let cwd = Path::new("/home/me");
        for (text, absolute) in [
            ("file://./runs", "file:///home/me/runs"),
            ("file://runs/a", "file:///home/me/runs/a"),
            ("file://../x", "file:///home/x"),
            ("file:///srv/./runs/", "file:///srv/runs"),
            ("./my runs", "file:///home/me/my runs"),
            ("file://./a%20b", "file:///home/me/a%20b"),
            ("/srv/runs", "file:///srv/runs"),
            ("file://localhost/srv/runs", "file:///srv/runs"),
            ("file://LocalHost/srv/../a", "file:///a"),
            ("file://./localhost/runs", "file:///home/me/localhost/runs"),
            ("file://localhosts/runs", "file:///home/me/localhosts/runs"),
            ("localhost/runs", "file:///home/me/localhost/runs"),
            ("s3://bucket/prefix/", "s3://bucket/prefix"),
            ("gs://bucket", "gs://bucket"),
            ("memory://", "memory://"),
        ] {
            assert_eq!(absolute_uri(text, cwd).as_deref(), Ok(absolute), "{text}");
        }
        for bad in [
            "",
            "s3:/bucket",
            "s3://",
            "ftp://host/x",
            "file://",
            "file://localhost",
            "s3://key:secret@bucket/x",
            "a\nb",
            "s4://x",
        ] {
            assert!(absolute_uri(bad, cwd).is_err(), "{bad:?}");
        }
        assert_eq!(local_path("file:///a b").unwrap(), Path::new("/a b"));
        assert_eq!(local_path("file://localhost/a").unwrap(), Path::new("/a"));
        assert_eq!(local_path("s3://b/x"), None);
    }
}
