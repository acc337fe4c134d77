//! The places that a queue's message may name: its sender may not be allowed to use everything that this consumer can
//! read and write.
//!
//! A consumer holds a role; a message comes from anyone who may write to the queue. So a message decides which run is
//! trained, but its places (the run's store, its configuration, model, initial weights and data) must be covered by
//! `--allow`. Without `--allow` these are the consumer's own `--store`; its bucket may be read, and the bucket of the
//! configuration that its machine was given for `trainer boot` (`TRAINER_CONFIG`, or the parameter `config-uri`).
//!
//! # Invariants
//! - A place covers itself and everything below it, folder by folder: `s3://b/runs` does not cover
//!   `s3://b/runs-of-others`.
//! - A URI is compared as text. One that a store might interpret differently (`..`, `%2e`, an empty folder) is refused.
//! - A path or a `file://` URI is covered only if `--allow` or `--store` names a folder of this machine.
//! - `notice.*` belongs to the machine: a message that could say when it goes away could end one consumer after the
//!   other, each time with a renewed message that never reaches the dead-letter queue.
//! - `storage.kms_key_id` belongs to the operator: whoever owns the key could make all checkpoints unreadable.
//!
//! No I/O. A refusal is an error of the job (exit code 78): its receives count.

use std::path::Path;

use super::job::{Job, Source};
use crate::{
    config,
    error::{Error, Kind, Result},
};

/// How a message uses a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// To read from it.
    Read,
    /// To keep a run there.
    Write,
}

/// The places that messages may name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// For reading and writing.
    places: Vec<String>,
    /// For reading only.
    readable: Vec<String>,
}

impl Allowed {
    /// From `--allow`; if that is empty, from the consumer's own store and the configuration that its machine was
    /// given.
    ///
    /// # Errors
    /// On a place that is no URI of a store, or if nothing is allowed, so that no job could be taken.
    pub fn new(allow: &[String], store: Option<&str>, configuration: Option<&str>, cwd: &Path) -> Result<Self> {
        let absolute = |name: &str, uri: &str| {
            let uri = config::absolute_uri(uri, cwd)
                .map_err(|expected| Error::new(Kind::Usage, format!("{name} {uri}: expected {expected}")))?;
            match is_plain(&uri) {
                true => Ok(uri),
                false => Err(Error::new(Kind::Usage, format!("{name} {uri}: has an empty folder, \".\" or \"..\""))),
            }
        };
        let mut places = allow.iter().map(|uri| absolute("--allow", uri)).collect::<Result<Vec<_>>>()?;
        let mut readable = Vec::new();
        if let Some(store) = store {
            let store = absolute("--store", store)?;
            if allow.is_empty() {
                readable.extend(bucket(&store));
            }
            places.push(store);
        }
        // The configuration that the machine was given for `trainer boot`; a file of this machine allows nothing.
        if allow.is_empty() {
            readable.extend(configuration.and_then(bucket));
        }
        if places.is_empty() {
            return Err(Error::new(Kind::Usage, "messages may name no place, so no job could be taken").with_hint(
                "say where runs are kept with --store s3://bucket/runs, or what messages may name with --allow",
            ));
        }
        Ok(Self { places, readable })
    }

    /// Whether a message may name `uri`, an absolute one, as its `what`.
    pub fn check(&self, what: &str, uri: &str, used: Use) -> Result<()> {
        let more = self.readable.iter().filter(|_| used == Use::Read);
        if is_plain(uri) && self.places.iter().chain(more).any(|place| covers(place, uri)) {
            return Ok(());
        }
        let verb = match used {
            Use::Read => "read",
            Use::Write => "write to",
        };
        let what = format!("{what} of the message: this consumer may not {verb} {uri} for a queue");
        Err(Error::new(Kind::Config, what)
            .with_hint(format!("start the consumer with --allow {uri}, or a folder above it")))
    }

    /// Whether a message may set a setting itself. The places that it names are [checked](Self::check) when they are
    /// known.
    pub fn check_settings(&self, job: &Job) -> Result<()> {
        let mut keys: Vec<String> = job.set.iter().map(|(key, _)| key.clone()).collect();
        // Text that is not TOML is reported where it is parsed.
        if let Source::Inline(text) = &job.config
            && let Ok(table) = text.parse::<toml::Table>()
        {
            keys_of(&table, "", &mut keys);
        }
        let Some((key, why, hint)) = keys.iter().find_map(|key| refused(key).map(|(why, hint)| (key, why, hint)))
        else {
            return Ok(());
        };
        Err(Error::new(Kind::Config, format!("{key} of the message: {why}")).with_hint(hint))
    }
}

/// Why a message may not set this, and what to do instead.
fn refused(key: &str) -> Option<(&'static str, &'static str)> {
    let parts: Vec<&str> = key.split('.').map(str::trim).collect();
    match parts.as_slice() {
        ["notice", ..] => {
            Some(("a message can't say when this machine goes away", "leave notice.* out of the message"))
        }
        ["storage", "kms_key_id", ..] => Some((
            "a message can't choose the key that checkpoints are encrypted with",
            "leave it out: the bucket's default encryption may name a key",
        )),
        _ => None,
    }
}

/// The dotted keys of all values, behind those there are. A quoted key with dots in it is the same key.
fn keys_of(table: &toml::Table, above: &str, keys: &mut Vec<String>) {
    for (key, value) in table {
        let key = if above.is_empty() { key.clone() } else { format!("{above}.{key}") };
        match value {
            toml::Value::Table(below) if !below.is_empty() => keys_of(below, &key, keys),
            _ => keys.push(key),
        }
    }
}

/// Whether a store has only one way to read it.
fn is_plain(uri: &str) -> bool {
    let Some((_, rest)) = uri.split_once("://") else { return false };
    let rest = rest.strip_prefix('/').unwrap_or(rest);
    let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
    let decoded = rest.to_ascii_lowercase().replace("%2e", ".").replace("%2f", "/").replace('\\', "/");
    [rest, decoded.as_str()].iter().all(|rest| rest.split('/').all(plain))
}

fn covers(place: &str, uri: &str) -> bool {
    uri.strip_prefix(place).is_some_and(|below| below.is_empty() || below.starts_with('/'))
}

/// The whole bucket of a remote URI.
fn bucket(uri: &str) -> Option<String> {
    let (scheme, rest) = uri.split_once("://")?;
    let name = rest.split('/').next().filter(|name| !name.is_empty())?;
    matches!(scheme, "s3" | "gs" | "az").then(|| format!("{scheme}://{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(allow: &[&str], store: Option<&str>, configuration: Option<&str>) -> Allowed {
        let allow: Vec<String> = allow.iter().map(|place| (*place).to_owned()).collect();
        Allowed::new(&allow, store, configuration, Path::new("/here")).unwrap()
    }

    fn job(text: &str) -> Job {
        Job::parse(text).unwrap()
    }

    #[test]
    fn a_consumer_opens_its_own_store_and_reads_its_buckets() {
        let allowed = allowed(&[], Some("s3://b/runs"), Some("s3://configs/a/run.toml"));
        for (uri, read, write) in [
            ("s3://b/runs", true, true),
            ("s3://b/runs/deep/er", true, true),
            ("s3://b/runs-of-others", true, false),
            ("s3://b/data/x", true, false),
            ("s3://configs/data", true, false),
            ("s3://bb/runs", false, false),
            ("S3://b/runs", false, false),
            ("gs://b/runs", false, false),
            ("file:///etc", false, false),
            ("memory://", false, false),
            ("memory://x", false, false),
            ("/etc", false, false),
            ("s3://b/runs/../secret", false, false),
            ("s3://b/runs/%2e%2E/secret", false, false),
            ("s3://b/runs/..%2fsecret", false, false),
            ("s3://b/runs\\..\\secret", false, false),
            ("s3://b//runs", false, false),
            ("s3://b/./runs", false, false),
            ("s3://", false, false),
        ] {
            assert_eq!(allowed.check("store", uri, Use::Read).is_ok(), read, "read {uri}");
            assert_eq!(allowed.check("store", uri, Use::Write).is_ok(), write, "write {uri}");
        }
    }

    #[test]
    fn allow_replaces_every_default_except_the_store() {
        let allowed = allowed(&["gs://d/sets", "./models/"], Some("s3://b/runs"), Some("s3://configs/run.toml"));
        for (uri, expected) in [
            ("gs://d/sets/one", true),
            ("gs://d/other", false),
            ("file:///here/models/tiny", true),
            ("file:///here/modelsx", false),
            ("s3://b/runs/x", true),
            ("s3://b/conf", false),
            ("s3://configs/run.toml", false),
        ] {
            assert_eq!(allowed.check("data.train", uri, Use::Read).is_ok(), expected, "{uri}");
        }
        let error = allowed.check("data.train", "s3://else/data", Use::Read).unwrap_err();
        assert_eq!(error.kind(), Kind::Config);
        assert!(error.to_string().contains("data.train") && error.hint().unwrap().contains("--allow s3://else/data"));
    }

    #[test]
    fn a_consumer_that_could_take_no_job_does_not_start() {
        let new = |allow: &[String], store, configuration| Allowed::new(allow, store, configuration, Path::new("/"));
        for configuration in [None, Some("s3://configs/run.toml")] {
            assert_eq!(new(&[], None, configuration).unwrap_err().kind(), Kind::Usage);
        }
        for bad in ["", "ftp://x/y", "s3:/b", "s3://b/../c"] {
            assert_eq!(new(&[bad.to_owned()], Some("s3://b/runs"), None).unwrap_err().kind(), Kind::Usage, "{bad}");
        }
    }

    #[test]
    fn a_message_sets_neither_the_machines_end_nor_a_key() {
        let allowed = allowed(&[], Some("s3://b/runs"), None);
        for (text, expected) in [
            (r#"{"run_id":"r","config":"","set":{"train.steps":1}}"#, true),
            (r#"{"run_id":"r","config":"","set":{"notice.file":"/tmp/x"}}"#, false),
            (r#"{"run_id":"r","config":"","set":{" notice . file":"/tmp/x"}}"#, false),
            (r#"{"run_id":"r","config":"","set":{"noticed":1}}"#, true),
            (r#"{"run_id":"r","config":"[notice]\nfile='/tmp/x'"}"#, false),
            (r#"{"run_id":"r","config":"notice.file='/tmp/x'"}"#, false),
            (r#"{"run_id":"r","config":"\"notice\" = {file='/tmp/x'}"}"#, false),
            (r#"{"run_id":"r","config":"\"notice.file\" = '/tmp/x'"}"#, false),
            (r#"{"run_id":"r","config":"\"notice.file\".x = 1"}"#, false),
            (r#"{"run_id":"r","config":"noticed = 1"}"#, true),
            (r#"{"run_id":"r","config":"[not toml"}"#, true),
            (r#"{"run_id":"r","config":"[notice]"}"#, false),
            (r#"{"run_id":"r","config_uri":"s3://b/c.toml"}"#, true),
            (r#"{"run_id":"r","config":"","set":{"storage.kms_key_id":"alias/x"}}"#, false),
            (r#"{"run_id":"r","config":"storage = {encryption='sse-kms', kms_key_id='alias/x'}"}"#, false),
            (r#"{"run_id":"r","config":"[storage]\nkms_key_id='alias/x'"}"#, false),
            (r#"{"run_id":"r","config":"\"storage.kms_key_id\" = 'alias/x'"}"#, false),
            (r#"{"run_id":"r","config":"storage.\"kms_key_id\" = 'alias/x'"}"#, false),
            (r#"{"run_id":"r","config":"","set":{"storage.encryption":"sse-kms"}}"#, true),
            (r#"{"run_id":"r","config":"[storage]\nencryption='sse-kms'"}"#, true),
        ] {
            assert_eq!(allowed.check_settings(&job(text)).is_ok(), expected, "{text}");
        }
    }
}
