//! The only file that reads the environment. [`OURS`] explains our own variables; those of others (`AWS_REGION`,
//! `NO_COLOR`, …) are interpreted beside the code that needs them.
//!
//! A test compares [`OURS`] with the names in the source. The environment is read on demand and never changed: threads
//! may run.

use std::{ffi::OsString, path::PathBuf};

/// Our variables and their meanings. A flag wins over its variable.
pub const OURS: [(&str, &str); 27] = [
    ("TRAINER_ALERT", "who is told when the run ends or needs somebody; as --alert, separated by commas"),
    ("TRAINER_ALERT_LAG", "the oldest that the newest checkpoint may become; as --alert-lag"),
    ("TRAINER_ALERT_PING", "a dead man's switch; as --alert-ping"),
    ("TRAINER_ALLOW", "what messages of a queue may name; as --allow, separated by commas"),
    ("TRAINER_AUTO_SCALING_GROUP", "the group of this machine, if its tags can't be read"),
    ("TRAINER_AZURE_METADATA_ENDPOINT", "the address of Azure's metadata service, or `off`"),
    ("TRAINER_CONFIG", "the configuration of `boot` and `work`: a file or a URI"),
    ("TRAINER_CUDA", "scripts/setup: which flavour of LibTorch to fetch"),
    ("TRAINER_FAULTS", "crash points, for tests"),
    ("TRAINER_GPU", "`none`: compute on the CPU although the machine has GPUs"),
    ("TRAINER_GROUP", "the Auto Scaling group of `wake` and `stop`; as --group"),
    ("TRAINER_HOST_ROOT", "the folder of the machine's /sys, /proc and /dev, in a container that has them elsewhere"),
    ("TRAINER_LIFECYCLE_HOOK", "the hook of the group that delays this machine's end"),
    ("TRAINER_LOG", "which log lines to write, such as debug or trainer::storage=debug"),
    ("TRAINER_METRICS_FILE", "the file of the run's figures; as --metrics-file"),
    ("TRAINER_METRICS_LISTEN", "where the run's figures are served; as --metrics-listen"),
    ("TRAINER_POWER_OFF", "`host`: the host powers the machine off after exit code 0 or 80"),
    ("TRAINER_PREEMPTION_WINDOW", "seconds from a preemption notice to the end of the machine"),
    ("TRAINER_QUEUE", "the queue of `work`; as --queue"),
    ("TRAINER_RUN_ID", "the run; as --run-id"),
    ("TRAINER_RUN_ID_TEMPLATE", "the run of the day; as --run-id-template"),
    ("TRAINER_SSM_ENVIRONMENT", "SSM parameters that become variables; as --ssm-environment, separated by commas"),
    ("TRAINER_SSM_PATH", "the path of the SSM parameters; as --ssm-path"),
    ("TRAINER_STOP_WINDOW", "seconds from SIGTERM to the end of the process; as notice.stop_window"),
    ("TRAINER_STORE", "where runs are kept; as --store"),
    ("TRAINER_TIME_ZONE", "the time zone of the day; as --time-zone"),
    ("TRAINER_USR1_WINDOW", "seconds from SIGUSR1 to the end of the process; as notice.usr1_window"),
];

/// A variable's text; `None`: it is not set, is empty, or is not UTF-8.
pub fn text(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// A variable's text, empty or not; `None`: it is not set, or is not UTF-8.
pub fn given(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// A variable's value as it is, empty or not.
pub fn raw(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}

/// The folder of this program's caches (the XDG base directory specification); `None`: this user has no such place.
pub fn cache_folder() -> Option<PathBuf> {
    let named = |name| raw(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")));
    Some(base?.join("trainer"))
}

/// All variables.
pub fn all() -> impl Iterator<Item = (OsString, OsString)> {
    std::env::vars_os()
}
