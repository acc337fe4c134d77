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
    /// The URL of the queue; for `trainer work`.
    pub queue: Option<Given<String>>,
    /// A region that a parameter names. The parameter itself was read in the region that holds: this one is compared.
    pub region: Option<Given<String>>,
}

/// Names of parameters that are common beside ours, and ours for the same. Ours win. A bucket stands for the store
/// below its `runs/`.
const SYNONYMS: [(&str, &str); 4] = [
    ("AWS_S3_BUCKET", "store"),
    ("AWS_SQS_QUEUE_URL", "queue"),
    ("JOB_API_BASE_URL", "job-api-base-url"),
    ("WORKER_TOKEN", "worker-token"),
];
/// Those of the image are for whoever pulls it: by the time this program runs, it has been pulled.
const OF_THE_IMAGE: &str = "ECR_";
const REGION: &str = "AWS_REGION";

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
        let (mut layer, mut unknown, mut synonyms) = (Self::default(), Vec::new(), Vec::new());
        for Parameter { name, value } in parameters {
            let origin = Origin::Parameter(format!("{path}/{name}"));
            if let Some((_, word)) = SYNONYMS.iter().find(|(synonym, _)| *synonym == name) {
                synonyms.push((*word, value, origin));
                continue;
            }
            if name == REGION {
                layer.region = Some(Given { value: value.reveal().to_owned(), origin });
                continue;
            }
            if name.starts_with(OF_THE_IMAGE) {
                continue;
            }
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
        for (word, value, origin) in synonyms.into_iter().filter(|(word, ..)| !layer.has(word)).collect::<Vec<_>>() {
            let value = if word == "store" { runs_in(value.reveal(), &origin)? } else { value.reveal().to_owned() };
            layer.add(word, value, origin)?;
        }
        Ok((layer, unknown))
    }

    /// Whether it has the setting of a synonym.
    fn has(&self, word: &str) -> bool {
        match word {
            "store" => self.store.is_some(),
            "queue" => self.queue.is_some(),
            "job-api-base-url" => self.job_api.is_some(),
            _ => self.worker_token.is_some(),
        }
    }

    /// The settings from tags; they come without `trainer:`. A tag is no place for a secret, nor long enough for a
    /// configuration: those are ignored here and returned, together with unknown ones.
    pub fn from_tags(tags: Vec<(String, String)>) -> Result<(Self, Vec<String>)> {
        let (mut layer, mut unknown) = (Self::default(), Vec::new());
        for (name, value) in tags.into_iter().filter(|(_, value)| !value.is_empty()) {
            let origin = Origin::Tag(format!("trainer:{name}"));
            let known = match name.strip_prefix("set:") {
                Some(key) => layer.add_set(key, &value),
                None => {
                    !matches!(name.as_str(), "config" | "worker-token" | "queue") && layer.add(&name, value, origin)?
                }
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
            "queue" => once(&mut self.queue, value, origin),
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
            queue: self.queue.or(below.queue),
            region: self.region.or(below.region),
        }
    }
}

/// The store in a bucket that is named alone. The value may be a secret, put there by mistake: no error shows it.
fn runs_in(bucket: &str, origin: &Origin) -> Result<String> {
    // https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    if !(3..=63).contains(&bucket.len()) || !bucket.bytes().all(plain) {
        return Err(Error::new(Kind::Config, format!("{origin} is not the name of a bucket"))
            .with_hint("give the bucket's name alone, or the parameter store: s3://bucket/prefix"));
    }
    Ok(format!("s3://{bucket}/runs"))
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
    fn parameters_of_common_names_are_understood_and_ours_win() {
        let common = [
            ("AWS_REGION", "eu-west-1"),
            ("AWS_S3_BUCKET", "my-bucket"),
            ("AWS_SQS_QUEUE_URL", "https://queue"),
            ("JOB_API_BASE_URL", "https://api"),
            ("WORKER_TOKEN", "hunter2"),
            ("ECR_REGISTRY", "1.dkr.ecr.eu-west-1.amazonaws.com"),
            ("ECR_REPOSITORY", "trainer"),
            ("OPENAI_API_KEY", "hunter2"),
        ];
        let (layer, unknown) = Layer::from_parameters("/p", parameters(&common)).unwrap();
        assert_eq!(unknown, ["OPENAI_API_KEY"]);
        let value = |given: &Option<Given<String>>| {
            let given = given.as_ref().unwrap();
            (given.value.clone(), given.origin.to_string())
        };
        assert_eq!(value(&layer.store), ("s3://my-bucket/runs".into(), "parameter /p/AWS_S3_BUCKET".into()));
        assert_eq!(value(&layer.queue).0, "https://queue");
        assert_eq!(value(&layer.job_api).0, "https://api");
        assert_eq!(value(&layer.region).0, "eu-west-1");
        assert_eq!(layer.worker_token.as_ref().unwrap().value.reveal(), "hunter2");
        assert!(!format!("{layer:?}").contains("hunter2"));
        // The two may stand side by side, in any order: other programs read theirs.
        for own in [0, common.len()] {
            let mut both = common.to_vec();
            both.splice(own..own, [("store", "s3://other/place"), ("worker-token", "ours"), ("queue", "https://ours")]);
            let (layer, _) = Layer::from_parameters("/p", parameters(&both)).unwrap();
            assert_eq!(value(&layer.store).0, "s3://other/place");
            assert_eq!(layer.worker_token.as_ref().unwrap().value.reveal(), "ours");
            assert_eq!(value(&layer.queue).0, "https://ours");
        }
        for wrong in ["s3://my-bucket", "hunter2 hunter2", "My-Bucket", "ab", "a/b"] {
            let error = Layer::from_parameters("/p", parameters(&[("AWS_S3_BUCKET", wrong)])).unwrap_err();
            assert!(error.kind() == Kind::Config && error.to_string().contains("/p/AWS_S3_BUCKET"), "{error}");
            assert!(!error.to_string().contains(wrong), "{error}");
        }
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
