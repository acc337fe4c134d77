//! Arguments shared by several commands.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;

use crate::{
    alerts::{self, Alerts},
    boot::passed::Pattern,
    config::{self, Machine},
    error::{Context, Error, Kind, Result},
    ids::RunId,
    metrics::{self, Exporter, Places},
    rendezvous::policy::ending::Wait,
    report::{Listener, Reporter, Screen},
    run::NodeBounds,
    storage::Store,
};

/// Which store.
#[derive(Clone, Debug, Args)]
pub(super) struct StoreArg {
    /// The store of the runs: s3://bucket/prefix, gs://…, az://…, file://path [default: the configuration's, or
    /// file://./runs]
    #[arg(long, env = "TRAINER_STORE", value_name = "URI", hide_env_values = true)]
    pub store: Option<String>,
}

/// Which run.
#[derive(Clone, Debug, Args)]
pub(super) struct RunArg {
    /// The run's id
    #[arg(long, env = "TRAINER_RUN_ID", value_name = "ID", hide_env_values = true)]
    pub run_id: RunId,
    #[command(flatten)]
    pub store: StoreArg,
}

/// How the answer is written.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct JsonArg {
    /// Print JSON, one object per line
    #[arg(long)]
    pub json: bool,
}

/// Settings that are changed.
#[derive(Clone, Debug, Args)]
pub(super) struct SetArg {
    /// Change a setting, such as train.steps=500 or checkpoint.every=2h; repeatable
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub set: Vec<(String, String)>,
}

/// Workers on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Workers {
    Auto,
    Count(u32),
}

impl Workers {
    /// The number, where it is given or can be found out; "auto" counts the GPUs of this machine.
    pub fn count(self) -> u32 {
        match self {
            Self::Auto => Machine::detect().gpus.max(1),
            Self::Count(count) => count,
        }
    }

    /// As the configuration has it.
    pub fn setting(self) -> String {
        match self {
            Self::Auto => "auto".into(),
            Self::Count(count) => count.to_string(),
        }
    }
}

/// Workers on this node.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct WorkersArg {
    /// Workers on this node, or "auto": one per GPU, or one without GPUs [default: the configuration's]
    #[arg(long, value_name = "N|auto", value_parser = workers)]
    pub nproc_per_node: Option<Workers>,
}

/// Nodes of the run.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct NodesArg {
    /// Machines that train together: a number, or MIN:MAX. Start the same run on each. Below MIN they save and wait,
    /// above MAX the others wait
    #[arg(long, value_name = "MIN[:MAX]", default_value = "1")]
    pub nodes: NodeBounds,
    /// How long to wait for MIN machines: a duration such as 30m, or "forever" [default: 10m, with boot forever]
    #[arg(long, value_name = "TIME", value_parser = wait)]
    pub wait: Option<Wait>,
}

fn wait(text: &str) -> Result<Wait, String> {
    if text == "forever" {
        return Ok(Wait { at_most: None });
    }
    let time = config::parse_duration(text).ok_or("expected \"forever\", or a duration such as 90s, 30m or 1h30m")?;
    Ok(Wait { at_most: Some(time) })
}

fn workers(text: &str) -> Result<Workers, String> {
    match text {
        "auto" => Ok(Workers::Auto),
        _ => text
            .parse()
            .ok()
            .filter(|count| (1..=1024).contains(count))
            .map(Workers::Count)
            .ok_or_else(|| "expected \"auto\", or a whole number from 1 to 1024".into()),
    }
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE, such as train.steps=500")?;
    if key.trim().is_empty() {
        return Err("expected a key before '='".into());
    }
    Ok((key.trim().to_owned(), value.to_owned()))
}

impl StoreArg {
    /// The store that the flag or the environment names, or the default one. Nothing is created in it.
    pub fn open(&self) -> Result<Store> {
        super::store::open(self.store.as_deref().unwrap_or(super::store::DEFAULT))
    }
}

/// Who watches the run from outside.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct WatchersArg {
    /// Serve the run's figures for Prometheus at /metrics: on a port for this machine alone, or on ADDRESS:PORT
    #[arg(long, env = "TRAINER_METRICS_LISTEN", value_name = "[ADDRESS:]PORT", value_parser = metrics::address,
          hide_env_values = true)]
    metrics_listen: Option<SocketAddr>,
    /// Keep the run's figures in this file, for a node exporter's textfile collector (NAME.prom)
    #[arg(long, env = "TRAINER_METRICS_FILE", value_name = "FILE", hide_env_values = true)]
    metrics_file: Option<PathBuf>,
    // Text: an error of the command line would print a value that may be a secret.
    /// Tell a web hook (Slack, Discord, JSON) or an SNS topic when the run ends or needs somebody; repeatable
    #[arg(long, env = "TRAINER_ALERT", value_name = "URL|ARN", value_delimiter = ',', hide_env_values = true)]
    alert: Vec<String>,
    /// Ask for this URL each minute in which the run moves: a dead man's switch
    #[arg(long, env = "TRAINER_ALERT_PING", value_name = "URL", hide_env_values = true)]
    alert_ping: Option<String>,
    /// Alert when the newest checkpoint is older than this: a duration such as 2h
    #[arg(long, env = "TRAINER_ALERT_LAG", value_name = "TIME", value_parser = lag, hide_env_values = true)]
    alert_lag: Option<Duration>,
}

/// Who watches, at work.
#[derive(Debug)]
pub(super) struct Watchers {
    exporter: Option<Exporter>,
    pub alerts: Option<Alerts>,
}

impl WatchersArg {
    /// Begins to show figures and to tell people, if they are asked for.
    pub fn start(&self, run_id: Option<RunId>) -> Result<Watchers> {
        let wrong = |name: &str, what: String| {
            Error::new(Kind::Config, format!("{name}: {what}")).with_hint("src/alerts/README.md has examples")
        };
        let receivers = self.alert.iter().map(|text| text.parse());
        let receivers: Result<Vec<_>, String> = receivers.collect();
        let settings = alerts::Settings {
            receivers: receivers.map_err(|what| wrong("--alert or TRAINER_ALERT", what))?,
            ping: self
                .alert_ping
                .as_ref()
                .map(|text| text.parse())
                .transpose()
                .map_err(|what| wrong("--alert-ping or TRAINER_ALERT_PING", what))?,
            lag: self.alert_lag,
        };
        let started = Alerts::start(settings, run_id).map_err(|error| Error::from_source(Kind::Bug, error));
        let alerts = started.context("start the thread of alerts")?;
        Ok(Watchers { exporter: self.exporter()?, alerts })
    }

    fn exporter(&self) -> Result<Option<Exporter>> {
        let places = Places { listen: self.metrics_listen, file: self.metrics_file.clone() };
        if places == Places::default() {
            return Ok(None);
        }
        let started = Exporter::start(places).map_err(|error| {
            let at = self.metrics_listen.map_or_else(String::new, |at| format!(" at {at}"));
            Error::from_source(Kind::Config, error)
                .context(format!("show figures{at}"))
                .with_hint("choose another port, such as --metrics-listen 9401")
        });
        let (exporter, at) = started?;
        if let Some(at) = at {
            tracing::info!("figures for Prometheus: http://{at}/metrics");
        }
        Ok(Some(exporter))
    }
}

impl Watchers {
    /// The reporter of one run, whose events they get, and `first`.
    pub fn reporter(&self, screen: Screen, json: bool, first: Option<Listener>) -> Reporter {
        let own = [self.exporter.as_ref().map(Exporter::listener), self.alerts.as_ref().map(Alerts::listener)];
        let mut all: Vec<Listener> = first.into_iter().chain(own.into_iter().flatten()).collect();
        Reporter::with_listener(screen, json, Box::new(move |event| all.iter_mut().for_each(|one| one(event))))
    }
}

fn lag(text: &str) -> Result<Duration, String> {
    config::parse_duration(text).ok_or_else(|| "expected a duration such as 30m or 2h".into())
}

/// Parameters that become variables.
#[derive(Clone, Debug, Args)]
pub(super) struct SsmArg {
    /// Set these SSM parameters as variables of the environment, which wins where it has them: names, or beginnings
    /// such as NCCL_*; not PATH, LD_* or TRAINER_*
    #[arg(long, env = "TRAINER_SSM_ENVIRONMENT", value_name = "NAMES", value_delimiter = ',', hide_env_values = true)]
    pub ssm_environment: Vec<Pattern>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_split_at_the_first_equals_sign() {
        let pair = |key: &str, value: &str| Ok((key.to_owned(), value.to_owned()));
        assert_eq!(key_value("a.b=1"), pair("a.b", "1"));
        assert_eq!(key_value(" a = x=y"), pair("a", " x=y"));
        assert_eq!(key_value("a="), pair("a", ""));
        assert!(key_value("a").is_err() && key_value("=1").is_err());
    }

    #[test]
    fn workers_are_a_number_or_auto() {
        assert_eq!(workers("auto"), Ok(Workers::Auto));
        assert_eq!(workers("4"), Ok(Workers::Count(4)));
        for bad in ["0", "-1", "1025", "many", ""] {
            assert!(workers(bad).is_err(), "{bad:?}");
        }
        assert!(Workers::Auto.count() >= 1);
    }

    #[test]
    fn a_wait_is_a_duration_or_has_no_end() {
        assert_eq!(wait("forever"), Ok(Wait::BOOT));
        assert_eq!(wait("10m"), Ok(Wait::RUN));
        assert_eq!(wait("0s"), Ok(Wait { at_most: Some(std::time::Duration::ZERO) }));
        for bad in ["", "never", "10", "-1s", "Forever"] {
            assert!(wait(bad).unwrap_err().contains("\"forever\", or a duration"), "{bad:?}");
        }
    }
}
