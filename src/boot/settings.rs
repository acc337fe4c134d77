//! This machine's settings, collected from all of their sources.
//!
//! Highest first: flags, the environment, SSM parameters, instance tags. Each setting is taken from the highest layer
//! that has it, and only from there; a run id and a run id template are the same setting in two forms, and so are a
//! configuration and its URI. Changed settings (`set`) are merged key by key.

use std::collections::BTreeMap;

use crate::{
    cloud::ssm::{Parameter, Secret},
    error::{Error, Kind, Result},
};

/// The source of a setting, as the user would find it again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// On the command line.
    Flag(&'static str),
    /// In this variable.
    Variable(&'static str),
    /// In this parameter of Systems Manager.
    Parameter(String),
    /// In this tag of the instance.
    Tag(String),
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Flag(name) => f.write_str(name),
            Self::Variable(name) => f.write_str(name),
            Self::Parameter(name) => write!(f, "parameter {name}"),
            Self::Tag(name) => write!(f, "tag {name}"),
        }
    }
}

/// A setting and its source. A parameter's value is not shown until it is known to be valid: it may be a secret, put
/// there by mistake.
#[derive(Clone, PartialEq, Eq)]
pub struct Given<T> {
    /// The value.
    pub value: T,
    /// The source.
    pub origin: Origin,
}

impl<T> std::fmt::Debug for Given<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Given({})", self.origin)
    }
}

impl Given<String> {
    /// Whether it looks like a URI or path. A parameter's value that does not is never opened, because the error would
    /// show it. A path in a parameter must begin with `/` or `.`.
    pub fn may_be_a_place(&self) -> bool {
        let plain = self.value.contains("://") || self.value.starts_with(['/', '.']);
        plain || !matches!(self.origin, Origin::Parameter(_))
    }
}

/// A run's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Config {
    /// A file's path, or the URI of an object.
    Place(String),
    /// The TOML itself.
    Toml(String),
}

/// A run's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    /// A literal id.
    Id(String),
    /// With fields of the date.
    Template(String),
}

/// The settings of one source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layer {
    /// The configuration of a new run.
    pub config: Option<Given<Config>>,
    /// The store that holds runs.
    pub store: Option<Given<String>>,
    /// The run.
    pub name: Option<Given<Name>>,
    /// The time zone of a template's date.
    pub time_zone: Option<Given<String>>,
    /// The path below which parameters are.
    pub ssm_path: Option<Given<String>>,
    /// Changed settings.
    pub set: Vec<(String, String)>,
    /// The token of the job API; for `trainer work`.
    pub worker_token: Option<Given<Secret>>,
    /// The address of the job API; for `trainer work`.
    pub job_api: Option<Given<String>>,
}

/// The variables that are read.
pub const VARIABLES: [&str; 8] = [
    "TRAINER_CONFIG",
    "TRAINER_STORE",
    "TRAINER_RUN_ID",
    "TRAINER_RUN_ID_TEMPLATE",
    "TRAINER_TIME_ZONE",
    "TRAINER_SSM_PATH",
    "WORKER_TOKEN",
    "JOB_API_BASE_URL",
];

impl Layer {
    /// The environment's settings. An empty variable counts as not set.
    pub fn from_environment(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let mut layer = Self::default();
        for name in VARIABLES {
            if let Some(value) = variable(name).filter(|value| !value.is_empty()) {
                let word = match name {
                    "TRAINER_CONFIG" => "config-uri",
                    "TRAINER_STORE" => "store",
                    "TRAINER_RUN_ID" => "run-id",
                    "TRAINER_RUN_ID_TEMPLATE" => "run-id-template",
                    "TRAINER_TIME_ZONE" => "time-zone",
                    "TRAINER_SSM_PATH" => "ssm-path",
                    "WORKER_TOKEN" => "worker-token",
                    _ => "job-api-base-url",
                };
                layer.add(word, value, Origin::Variable(name))?;
            }
        }
        Ok(layer)
    }

    /// The settings from parameters below `path`. Unknown names are returned.
    pub fn from_parameters(path: &str, parameters: Vec<Parameter>) -> Result<(Self, Vec<String>)> {
        let path = path.trim_end_matches('/');
        let (mut layer, mut unknown) = (Self::default(), Vec::new());
        for Parameter { name, value } in parameters {
            let origin = Origin::Parameter(format!("{path}/{name}"));
            // The API has no empty parameters, and a path can only come from a higher layer.
            let known = name != "ssm-path"
                && match name.strip_prefix("set/") {
                    Some(key) => layer.add_set(&key.replace('/', "."), value.reveal()),
                    None => layer.add(&name, value.reveal().to_owned(), origin)?,
                };
            if !known {
                unknown.push(name);
            }
        }
        Ok((layer, unknown))
    }

    /// The settings from tags; they come without `trainer:`. A tag is no place for a secret, nor long enough for a
    /// configuration: those are ignored here and returned, together with unknown ones.
    pub fn from_tags(tags: Vec<(String, String)>) -> Result<(Self, Vec<String>)> {
        let (mut layer, mut unknown) = (Self::default(), Vec::new());
        for (name, value) in tags.into_iter().filter(|(_, value)| !value.is_empty()) {
            let origin = Origin::Tag(format!("trainer:{name}"));
            let known = match name.strip_prefix("set:") {
                Some(key) => layer.add_set(key, &value),
                None => !matches!(name.as_str(), "config" | "worker-token") && layer.add(&name, value, origin)?,
            };
            if !known {
                unknown.push(name);
            }
        }
        Ok((layer, unknown))
    }

    /// Adds one setting; `false`: there is no such setting. Each may be given once.
    fn add(&mut self, word: &str, value: String, origin: Origin) -> Result<bool> {
        fn once<T>(place: &mut Option<Given<T>>, value: T, origin: Origin) -> Result<bool> {
            if let Some(first) = place {
                let what = format!("{} and {origin} say the same thing in two ways", first.origin);
                return Err(Error::new(Kind::Config, what).with_hint("leave one of them out"));
            }
            *place = Some(Given { value, origin });
            Ok(true)
        }
        match word {
            "config" => once(&mut self.config, Config::Toml(value), origin),
            "config-uri" => once(&mut self.config, Config::Place(value), origin),
            "store" => once(&mut self.store, value, origin),
            "run-id" => once(&mut self.name, Name::Id(value), origin),
            "run-id-template" => once(&mut self.name, Name::Template(value), origin),
            "time-zone" => once(&mut self.time_zone, value, origin),
            "ssm-path" => once(&mut self.ssm_path, value, origin),
            "worker-token" => once(&mut self.worker_token, Secret::new(value), origin),
            "job-api-base-url" => once(&mut self.job_api, value, origin),
            _ => Ok(false),
        }
    }

    fn add_set(&mut self, key: &str, value: &str) -> bool {
        if key.is_empty() {
            return false;
        }
        self.set.push((key.to_owned(), value.to_owned()));
        true
    }

    /// This layer above another.
    #[must_use]
    pub fn over(self, below: Self) -> Self {
        // Each changed setting has the last value of the highest layer that names it.
        let mut set: BTreeMap<String, String> = below.set.into_iter().collect();
        set.extend(self.set);
        Self {
            config: self.config.or(below.config),
            store: self.store.or(below.store),
            name: self.name.or(below.name),
            time_zone: self.time_zone.or(below.time_zone),
            ssm_path: self.ssm_path.or(below.ssm_path),
            set: set.into_iter().collect(),
            worker_token: self.worker_token.or(below.worker_token),
            job_api: self.job_api.or(below.job_api),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(pairs: &[(&str, &str)]) -> Vec<Parameter> {
        pairs.iter().map(|(name, value)| Parameter { name: (*name).into(), value: Secret::new(*value) }).collect()
    }

    fn environment(pairs: &[(&str, &str)]) -> Layer {
        let get = |name: &str| pairs.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        Layer::from_environment(&get).unwrap()
    }

    fn tags(pairs: &[(&str, &str)]) -> (Layer, Vec<String>) {
        Layer::from_tags(pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()).unwrap()
    }

    #[test]
    fn each_setting_comes_from_the_highest_layer_that_has_it() {
        let flags =
            Layer { store: Some(Given { value: "f".into(), origin: Origin::Flag("--store") }), ..Layer::default() };
        let environment =
            environment(&[("TRAINER_STORE", "e"), ("TRAINER_RUN_ID_TEMPLATE", "e-{year}"), ("TRAINER_CONFIG", "")]);
        let (parameters, _) = Layer::from_parameters(
            "/p/",
            parameters(&[("store", "p"), ("run-id", "p"), ("config", "p = 1"), ("set/a.b", "1"), ("set/c/d", "2")]),
        )
        .unwrap();
        let (tags, _) = tags(&[
            ("store", "t"),
            ("config-uri", "s3://t"),
            ("time-zone", "Asia/Tokyo"),
            ("set:a.b", "9"),
            ("set:x", "3"),
        ]);
        let all = flags.over(environment).over(parameters).over(tags);
        let from = |origin: &Origin| origin.to_string();
        assert_eq!(from(&all.store.as_ref().unwrap().origin), "--store");
        let name = all.name.unwrap();
        assert_eq!(
            (name.value, from(&name.origin)),
            (Name::Template("e-{year}".into()), "TRAINER_RUN_ID_TEMPLATE".into())
        );
        let config = all.config.unwrap();
        assert_eq!((config.value, from(&config.origin)), (Config::Toml("p = 1".into()), "parameter /p/config".into()));
        assert_eq!(from(&all.time_zone.unwrap().origin), "tag trainer:time-zone");
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(all.set, [pair("a.b", "1"), pair("c.d", "2"), pair("x", "3")]);
    }

    #[test]
    fn a_setting_given_twice_in_one_layer_is_an_error() {
        for names in [["config", "config-uri"], ["run-id", "run-id-template"]] {
            let error = Layer::from_parameters("/p", parameters(&names.map(|name| (name, "x")))).unwrap_err();
            assert_eq!(error.kind(), Kind::Config);
            assert!(names.iter().all(|name| error.to_string().contains(&format!("/p/{name}"))), "{error}");
        }
    }

    #[test]
    fn unknown_names_are_reported_and_ignored() {
        let (layer, unknown) = Layer::from_parameters(
            "/p",
            parameters(&[("runid", "x"), ("ssm-path", "/q"), ("set/", "1"), ("deep/er", "y")]),
        )
        .unwrap();
        assert_eq!(
            (layer, unknown),
            (Layer::default(), ["runid", "ssm-path", "set/", "deep/er"].map(String::from).to_vec())
        );
        let (layer, unknown) = tags(&[("worker-token", "x"), ("config", "y"), ("ssm-path", "/p"), ("x", "y")]);
        assert_eq!(unknown, ["worker-token", "config", "x"]);
        assert_eq!(layer.ssm_path.unwrap().value, "/p");
    }

    #[test]
    fn debug_output_shows_no_value() {
        let (layer, _) = Layer::from_parameters(
            "/p",
            parameters(&[
                ("worker-token", "hunter2"),
                ("run-id", "hunter2"),
                ("store", "hunter2"),
                ("config", "hunter2"),
            ]),
        )
        .unwrap();
        assert!(!format!("{layer:?}").contains("hunter2"));
        assert_eq!(layer.worker_token.unwrap().value.reveal(), "hunter2");
    }
}
