//! How long a process has after it was asked to stop. The request does not say. So the time comes from the
//! configuration or, failing that, from the known surroundings; a pure function decides. A configured window binds:
//! work that does not fit into it is not begun. A window that follows from the surroundings is a default that many
//! people change, and not every stop there is followed by a kill. So it is only reported, and never a reason to give up
//! a save.
//!
//! The defaults of the surroundings, each as documented by its maker: Kubernetes `terminationGracePeriodSeconds` 30 s
//! (<https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/>), Slurm `KillWait` 30 s and `--signal` 60 s
//! ahead (<https://slurm.schedmd.com/slurm.conf.html>, <https://slurm.schedmd.com/sbatch.html>), `docker stop` 10 s
//! (<https://docs.docker.com/reference/cli/docker/container/stop/>), systemd `DefaultTimeoutStopSec` 90 s
//! (systemd-system.conf(5)).

use std::{io::IsTerminal, path::Path, time::Duration};

use crate::config::{self, NoticeConfig};

/// GCP's time from the ACPI signal to the end of a preempted machine (`scheduling.skipGuestOsShutdown` in the Compute
/// API).
const PREEMPTION: Duration = Duration::from_secs(30);
/// The longest window: a year is as good as no limit.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Time from the request to the end; `None`: no limit is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// After SIGTERM or SIGINT.
    pub stop: Option<Duration>,
    /// After SIGUSR1.
    pub usr1: Option<Duration>,
    /// After GCP's preemption notice.
    pub preemption: Duration,
    /// Whether `stop` was configured.
    pub stop_is_known: bool,
    /// Whether `usr1` was configured.
    pub usr1_is_known: bool,
}

/// The surroundings of this process. More than one may be true: a pod is a container on a machine that systemd runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// In a pod.
    pub kubernetes: bool,
    /// In a Slurm job.
    pub slurm: bool,
    /// In a container.
    pub container: bool,
    /// As a service of systemd.
    pub systemd: bool,
}

impl Surroundings {
    /// Detects the surroundings.
    pub fn look(variable: &dyn Fn(&str) -> Option<String>) -> Self {
        let container = ["/.dockerenv", "/run/.containerenv"].iter().any(|path| Path::new(path).exists());
        Self::of(
            variable,
            container,
            std::io::stdin().is_terminal(),
            [std::process::id(), std::os::unix::process::parent_id()],
        )
    }

    fn of(variable: &dyn Fn(&str) -> Option<String>, container: bool, terminal: bool, family: [u32; 2]) -> Self {
        // A shell opened by a service inherits the service's variables: so the test is whether systemd has started this
        // process or its parent (SYSTEMD_EXEC_PID, systemd.exec(5)), with no terminal attached.
        let started = variable("SYSTEMD_EXEC_PID").and_then(|pid| pid.parse().ok());
        let systemd =
            variable("INVOCATION_ID").is_some() && started.is_none_or(|pid| family.contains(&pid)) && !terminal;
        Self {
            kubernetes: variable("KUBERNETES_SERVICE_HOST").is_some(),
            slurm: variable("SLURM_JOB_ID").is_some(),
            container,
            systemd,
        }
    }

    const fn stop(self) -> Option<Duration> {
        let seconds = match self {
            // The closest supervisor sends the kill.
            Self { kubernetes: true, .. } | Self { slurm: true, .. } => 30,
            Self { container: true, .. } => 10,
            Self { systemd: true, .. } => 90,
            Self { .. } => return None,
        };
        Some(Duration::from_secs(seconds))
    }
}

/// The windows in force: the environment's, else the configuration's, else those of the surroundings.
pub fn windows(
    settings: &NoticeConfig,
    variable: &dyn Fn(&str) -> Option<String>,
    surroundings: Surroundings,
) -> Windows {
    let given = |name: &str, configured: Option<Duration>| {
        let named = variable(name).and_then(|text| {
            let window = parse(&text);
            if window.is_none() {
                tracing::warn!("{name} is not a duration such as \"110s\": ignoring it");
            }
            window
        });
        named.or(configured).map(|window| window.min(LONGEST))
    };
    let slurm = surroundings.slurm.then_some(Duration::from_secs(60));
    let stop = given("TRAINER_STOP_WINDOW", settings.stop_window);
    let usr1 = given("TRAINER_USR1_WINDOW", settings.usr1_window);
    Windows {
        stop_is_known: stop.is_some(),
        usr1_is_known: usr1.is_some(),
        stop: stop.or_else(|| surroundings.stop()),
        usr1: usr1.or(slurm),
        preemption: given("TRAINER_PREEMPTION_WINDOW", settings.preemption_window).unwrap_or(PREEMPTION),
    }
}

/// A duration as in configurations, or a whole number of seconds.
fn parse(text: &str) -> Option<Duration> {
    config::parse_duration(text).or_else(|| text.trim().parse().ok().map(Duration::from_secs))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(seconds: u64) -> Option<Duration> {
        Some(Duration::from_secs(seconds))
    }

    #[test]
    fn surroundings_are_recognised_by_their_traces() {
        let of = |variables: &[(&str, &str)], container, terminal| {
            let variable =
                |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
            Surroundings::of(&variable, container, terminal, [40, 30])
        };
        let none = Surroundings::default();
        assert_eq!(of(&[], false, false), none);
        assert_eq!(of(&[], true, true), Surroundings { container: true, ..none });
        assert_eq!(of(&[("SLURM_JOB_ID", "1")], false, true), Surroundings { slurm: true, ..none });
        let pod = of(&[("KUBERNETES_SERVICE_HOST", "10.0.0.1")], true, false);
        assert_eq!(pod, Surroundings { kubernetes: true, container: true, ..none });
        for (pid, terminal, systemd) in [
            (None, false, true),
            (Some("40"), false, true),
            (Some("30"), false, true),
            (Some("7"), false, false),
            (Some("40"), true, false),
            (None, true, false),
        ] {
            let mut variables = vec![("INVOCATION_ID", "abc")];
            variables.extend(pid.map(|pid| ("SYSTEMD_EXEC_PID", pid)));
            assert_eq!(of(&variables, false, terminal).systemd, systemd, "{pid:?}, terminal: {terminal}");
        }
    }

    #[test]
    fn windows_come_from_environment_configuration_or_surroundings() {
        let none = Surroundings::default();
        let auto = NoticeConfig::default();
        let set = NoticeConfig {
            stop_window: seconds(25),
            usr1_window: seconds(7),
            preemption_window: seconds(150),
            ..auto.clone()
        };
        let pod = Surroundings { kubernetes: true, container: true, systemd: true, ..none };
        let slurm = Surroundings { slurm: true, container: true, ..none };
        let (docker, service) = (Surroundings { container: true, ..none }, Surroundings { systemd: true, ..none });
        for (settings, environment, surroundings, stop, usr1, preemption) in [
            (&auto, None, none, None, None, 30),
            (&auto, None, pod, seconds(30), None, 30),
            (&auto, None, slurm, seconds(30), seconds(60), 30),
            (&auto, None, docker, seconds(10), None, 30),
            (&auto, None, service, seconds(90), None, 30),
            (&set, None, docker, seconds(25), seconds(7), 150),
            (&set, Some("110s"), docker, seconds(110), seconds(110), 110),
            (&set, Some("45"), none, seconds(45), seconds(45), 45),
            (&set, Some("soon"), docker, seconds(25), seconds(7), 150),
            (&auto, Some("-1"), docker, seconds(10), None, 30),
            (&auto, Some("0"), none, seconds(0), seconds(0), 0),
            (&auto, Some("18446744073709551615"), none, Some(LONGEST), Some(LONGEST), LONGEST.as_secs()),
        ] {
            let variable = |name: &str| environment.filter(|_| name.starts_with("TRAINER_")).map(str::to_owned);
            let found = windows(settings, &variable, surroundings);
            let wanted = Windows { stop, usr1, preemption: Duration::from_secs(preemption), ..found };
            assert_eq!(found, wanted, "{environment:?}, {surroundings:?}");
            let said = environment.is_some_and(|text| !text.contains(['n', '-'])) || settings.stop_window.is_some();
            assert_eq!((found.stop_is_known, found.usr1_is_known), (said, said), "{environment:?}, {surroundings:?}");
        }
    }
}
