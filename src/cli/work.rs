//! `trainer work`

use std::{process::ExitCode, sync::Arc, time::Duration};

use clap::Args;

use super::{
    args::{JsonArg, SsmArg, WatchersArg, WorkersArg},
    boot::duration,
    output, run, store,
};
use crate::{
    boot::{
        self, passed,
        settings::{Config, Layer},
        stop::Stop,
    },
    cloud::{
        leave::{self, Departure},
        sqs::LONGEST_HOLD,
        ssm,
    },
    config, env,
    error::{Error, Kind, Result},
    notice,
    queue::{self, Left, Said, Settings, Tools, allow::Allowed, api, lease::Terms},
    report::{self, Screen},
};

/// Take jobs from a queue, train them, and exit when the queue stays empty
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer work --queue https://sqs.eu-central-1.amazonaws.com/123/jobs --store s3://bucket/runs
  trainer work --queue \"$QUEUE\" --once --json > events.jsonl

A message is a job, as JSON:
  {\"run_id\": \"reports-2026q4\", \"config_uri\": \"s3://bucket/configs/reports.toml\",
   \"set\": {\"train.steps\": 5000}}
\"config\" may hold the TOML itself, and \"store\" the run's store. An existing run continues as it is.
A message may name only what --allow covers, and no notice.* setting: those belong to the machine.

If JOB_API_BASE_URL is set, jobs are reported to it with WORKER_TOKEN.
If the machine goes away, the job's message is sent again, so that an interruption does not
count towards the queue's maxReceiveCount. A kill counts, unless a checkpoint was committed since.

If the job's store or data does not answer, a request is tried storage.attempts times
(default 10, about 15 s; the job's configuration or \"set\" may change it).
Then the job returns to the queue after a --lease.")]
pub struct Work {
    /// The queue's URL [default: the SSM parameter queue or AWS_SQS_QUEUE_URL]
    #[arg(long, env = "TRAINER_QUEUE", value_name = "URL", hide_env_values = true)]
    queue: Option<String>,
    /// The store of runs whose jobs name none: s3://bucket/prefix, gs://…, az://…, file://path
    #[arg(long, env = "TRAINER_STORE", value_name = "URI", hide_env_values = true)]
    store: Option<String>,
    /// Messages may name stores, configurations, models and data below these URIs [default: the --store; for reading
    /// also its bucket and that of TRAINER_CONFIG or the parameter config-uri]. A local folder is allowed only if named
    /// here
    #[arg(
        long,
        env = "TRAINER_ALLOW",
        value_name = "PREFIX",
        num_args = 1..,
        value_delimiter = ',',
        hide_env_values = true
    )]
    allow: Vec<String>,
    #[command(flatten)]
    workers: WorkersArg,
    /// Exit when the queue has been empty for this long, or "never"
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = idle_exit)]
    idle_exit: Idle,
    /// Exit after one job, with its exit code
    #[arg(long)]
    once: bool,
    /// How long a message is hidden at a time; if this consumer is killed, others see its job after that
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = lease)]
    lease: Duration,
    /// Renew a message before it has been held for this long; SQS's own limit is 12h
    #[arg(long, value_name = "DURATION", default_value = "12h", value_parser = longest)]
    max_hold: Duration,
    /// When the queue stays empty, leave the Auto Scaling group and lower its desired capacity. Outside of a group,
    /// power off, or exit with 0 and leave that to the host (TRAINER_POWER_OFF=host). If none of this works, keep
    /// working
    #[arg(long)]
    terminate_when_idle: bool,
    /// How long to wait for the NVIDIA driver on a machine with GPUs, before the first job
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    device_wait: Duration,
    /// Read the SSM parameters queue, store, config-uri, job-api-base-url and worker-token below this path, if neither
    /// a flag nor the environment has them. AWS_SQS_QUEUE_URL, AWS_S3_BUCKET (its runs/), JOB_API_BASE_URL and
    /// WORKER_TOKEN are understood, too
    #[arg(long, env = "TRAINER_SSM_PATH", value_name = "PATH", hide_env_values = true)]
    ssm_path: Option<String>,
    #[command(flatten)]
    ssm: SsmArg,
    #[command(flatten)]
    watchers: WatchersArg,
    #[command(flatten)]
    json: JsonArg,
}

/// A variable of the environment; two of them may also come from a parameter.
fn variable(parameters: &Layer, name: &str) -> Option<String> {
    let given = env::text(name).filter(|value| !value.trim().is_empty());
    given.or_else(|| match name {
        api::BASE_URL => parameters.job_api.as_ref().map(|given| given.value.clone()),
        api::TOKEN => parameters.worker_token.as_ref().map(|given| given.value.reveal().to_owned()),
        _ => None,
    })
}

/// The queue's URL, of the flag or else of a parameter, whose value is shown by no error: it may be a secret, put there
/// by mistake.
fn queue_of(flag: Option<String>, parameters: &Layer) -> Result<String> {
    match (flag, &parameters.queue) {
        (Some(url), _) => Ok(url),
        (None, Some(given)) if given.value.starts_with("https://") || given.value.starts_with("http://") => {
            Ok(given.value.clone())
        }
        (None, Some(given)) => Err(Error::new(Kind::Config, format!("{} is not a queue's URL", given.origin))),
        (None, None) => Err(Error::new(Kind::Usage, "no queue is named").with_hint(
            "give --queue, TRAINER_QUEUE, or with --ssm-path the parameter queue or AWS_SQS_QUEUE_URL below it",
        )),
    }
}

/// When a consumer exits.
#[derive(Clone, Copy, Debug)]
struct Idle(Option<Duration>);

fn idle_exit(text: &str) -> Result<Idle, String> {
    match text {
        "never" => Ok(Idle(None)),
        _ => config::parse_duration(text)
            .map(|time| Idle(Some(time)))
            .ok_or_else(|| "expected a duration such as 5m, or \"never\"".into()),
    }
}

fn between(text: &str, low: Duration, high: Duration) -> Result<Duration, String> {
    config::parse_duration(text).filter(|time| (low..=high).contains(time)).ok_or_else(|| {
        format!("expected a duration from {} to {}", config::format_duration(low), config::format_duration(high))
    })
}

/// A lease below three seconds would end with one slow answer.
fn lease(text: &str) -> Result<Duration, String> {
    between(text, Duration::from_secs(3), LONGEST_HOLD / 2)
}

fn longest(text: &str) -> Result<Duration, String> {
    between(text, Duration::from_secs(3), LONGEST_HOLD)
}

impl Work {
    pub(super) fn execute(self, screen: Screen) -> Result<ExitCode> {
        // Requests that arrive between two jobs count for the next one.
        notice::running_for();
        let json = self.json.json;
        let say: Arc<dyn Fn(&Said) + Send + Sync> = Arc::new(move |said| {
            // A reader that has gone, or stalls, is no reason to leave a job.
            if json && let Ok(line) = output::json_lines([said]) {
                report::say_event(line);
            }
        });
        let stop = Stop::listen()?;
        let patterns = &self.ssm.ssm_environment;
        let parameters = match &self.ssm_path {
            Some(path) => {
                let path = path.trim_end_matches('/');
                let parameters = match stop.block_on(ssm::parameters(path)) {
                    Err(_) if stop.heard().asked() => return Ok(Kind::Interrupted.exit_code().into()),
                    parameters => parameters?,
                };
                let chosen = passed::choose(patterns, &parameters, &|name| env::raw(name).is_some())?;
                if !chosen.is_empty() && !stop.heard().asked() {
                    return Err(passed::start_anew(&chosen));
                }
                stop.block_on(boot::understood(path, parameters, patterns))?
            }
            None if !patterns.is_empty() => {
                return Err(Error::new(Kind::Usage, "--ssm-environment needs --ssm-path: there are no parameters"));
            }
            None => Layer::default(),
        };
        let parameter = parameters.config.as_ref().and_then(|given| match &given.value {
            Config::Place(place) => Some(place.clone()),
            Config::Toml(_) => None,
        });
        let configuration = env::text("TRAINER_CONFIG").or(parameter);
        let cwd = store::working_directory()?;
        let store = self.store.or_else(|| parameters.store.as_ref().map(|given| given.value.clone()));
        let allowed = Allowed::new(&self.allow, store.as_deref(), configuration.as_deref(), &cwd)?;
        let settings = Settings {
            allowed,
            queue: queue_of(self.queue, &parameters)?,
            store,
            workers: self.workers.nproc_per_node.map(|workers| (workers.setting(), workers.count())),
            idle_exit: self.idle_exit.0,
            once: self.once,
            device_wait: self.device_wait,
            terms: Terms { lease: self.lease, longest: self.max_hold },
        };
        let leave =
            || store::block_on(async { Ok(!matches!(leave::leave(leave::ANY_HOOK).await, Departure::Stays { .. })) });
        // A job's failure is reported to the job API.
        let watchers = self.watchers.start(None)?;
        let tools = Tools {
            reporter: &|listener| watchers.reporter(screen.clone(), json, Some(listener)),
            say,
            fetch: &|folder, name| {
                let (folder, name) = (folder.to_owned(), name.to_owned());
                Box::pin(async move { run::fetched(&folder, &name).await })
            },
            heard: stop.heard(),
            working_directory: &cwd,
            variable: &|name| variable(&parameters, name),
            leave: self.terminate_when_idle.then_some(&leave),
        };
        Ok(match queue::run(settings, tools)? {
            Left::Idle => ExitCode::SUCCESS,
            // Nothing is lost, and there may be jobs left.
            Left::Asked => Kind::Interrupted.exit_code().into(),
            Left::Job(code) => code.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_is_named_by_the_flag_or_by_a_parameter() {
        let parameter = |value: &str| {
            let value = crate::cloud::ssm::Parameter {
                name: "AWS_SQS_QUEUE_URL".into(),
                value: crate::cloud::ssm::Secret::new(value),
            };
            Layer::from_parameters("/p", vec![value]).unwrap().0
        };
        let named = parameter("https://sqs/1/jobs");
        assert_eq!(queue_of(Some("https://flag".into()), &named).unwrap(), "https://flag");
        assert_eq!(queue_of(None, &named).unwrap(), "https://sqs/1/jobs");
        let error = queue_of(None, &parameter("hunter2")).unwrap_err();
        assert!(error.kind() == Kind::Config && error.to_string().contains("/p/AWS_SQS_QUEUE_URL"), "{error}");
        assert!(!error.to_string().contains("hunter2"));
        let error = queue_of(None, &Layer::default()).unwrap_err();
        assert!(error.kind() == Kind::Usage && error.hint().unwrap().contains("AWS_SQS_QUEUE_URL"), "{error}");
    }

    #[test]
    fn times_stay_within_the_limits_of_sqs() {
        assert_eq!(lease("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(longest("12h"), Ok(LONGEST_HOLD));
        for bad in ["2s", "7h", "5", "x"] {
            assert!(lease(bad).is_err(), "{bad}");
        }
        assert!(longest("13h").is_err());
        assert!(matches!(idle_exit("never"), Ok(Idle(None))));
        assert!(matches!(idle_exit("90s"), Ok(Idle(Some(time))) if time == Duration::from_secs(90)));
        assert!(idle_exit("soon").is_err());
    }
}
