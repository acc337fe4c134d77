//! Arguments shared by several commands.

use clap::Args;

use crate::{
    boot::passed::Pattern,
    config::{self, Machine},
    error::Result,
    ids::RunId,
    rendezvous::policy::ending::Wait,
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
