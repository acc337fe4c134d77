//! `trainer work`

use std::{process::ExitCode, sync::Arc, time::Duration};

use clap::Args;

use super::{
    args::{JsonArg, WorkersArg},
    boot::duration,
    output, run, store,
};
use crate::{
    boot::stop::Stop,
    cloud::{
        leave::{self, Departure},
        sqs::LONGEST_HOLD,
        ssm::{self, Parameter},
    },
    config, env,
    error::{Kind, Result},
    notice,
    queue::{self, Left, Said, Settings, Tools, allow::Allowed, api, lease::Terms},
    report::{self, Reporter, Screen},
};

/// Take jobs from a queue, train them, and leave when it stays empty
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer work --queue https://sqs.eu-central-1.amazonaws.com/123456789012/jobs --store s3://bucket/runs
  trainer work --queue \"$QUEUE\" --once --json > events.jsonl

A message is a job, as JSON:
  {\"run_id\": \"reports-2026q4\", \"config_uri\": \"s3://bucket/configs/reports.toml\", \"set\": {\"train.steps\": 5000}}
or with the TOML itself in \"config\", and where it is kept in \"store\". A run that exists is carried on as it is. A message may name
only what --allow covers, and no notice.*: when this machine goes away is not for a message to say.

Jobs are reported to JOB_API_BASE_URL, if it is set, with WORKER_TOKEN. The message of a job whose machine goes away is sent anew, so
that an interruption does not count towards the queue's maxReceiveCount; a kill counts, unless a checkpoint was committed since.

A job whose store or data don't answer is put away for a --lease once each request was tried storage.attempts times, as its configuration
or its \"set\" says (10, about a quarter of a minute).")]
pub struct Work {
    /// The queue's URL
    #[arg(long, env = "TRAINER_QUEUE", value_name = "URL", hide_env_values = true)]
    queue: String,
    /// Where runs are kept whose jobs don't say: s3://bucket/prefix, gs://…, az://…, file://path
    #[arg(long, env = "TRAINER_STORE", value_name = "URI", hide_env_values = true)]
    store: Option<String>,
    /// What messages may name: stores, configurations, models and data below these URIs; without it, the --store, and to be read its
    /// bucket and that of TRAINER_CONFIG, or of the parameter config-uri. A folder of this machine is open only if it is named here
    #[arg(long, env = "TRAINER_ALLOW", value_name = "PREFIX", num_args = 1.., value_delimiter = ',', hide_env_values = true)]
    allow: Vec<String>,
    #[command(flatten)]
    workers: WorkersArg,
    /// Leave when the queue stayed empty for so long, or "never"
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = idle_exit)]
    idle_exit: Idle,
    /// Leave after one job, with its exit code
    #[arg(long)]
    once: bool,
    /// A message is hidden for so long at a time: when this consumer is killed, others see its job so much later
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = lease)]
    lease: Duration,
    /// A message is passed on before it was held for longer; SQS's own limit is 12h
    #[arg(long, value_name = "DURATION", default_value = "12h", value_parser = longest)]
    max_hold: Duration,
    /// When the queue stayed empty, take this machine out of its Auto Scaling group with the desired capacity lowered; outside of a group
    /// power off, or leave that to whoever started this process and sees it end with 0 (TRAINER_POWER_OFF=host); where none of it can be
    /// done, keep working
    #[arg(long)]
    terminate_when_idle: bool,
    /// How long to wait for the NVIDIA driver of a machine with GPUs, before the first job
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    device_wait: Duration,
    /// Look for what the environment does not say, the job API's address and token, in the SSM parameters job-api-base-url and
    /// worker-token below this path
    #[arg(long, env = "TRAINER_SSM_PATH", value_name = "PATH", hide_env_values = true)]
    ssm_path: Option<String>,
    #[command(flatten)]
    json: JsonArg,
}

/// A variable of the environment; for two of them a parameter does, too.
fn variable(parameters: &[Parameter], name: &str) -> Option<String> {
    let parameter = match name {
        api::BASE_URL => "job-api-base-url",
        api::TOKEN => "worker-token",
        _ => "",
    };
    let given = env::text(name).filter(|value| !value.trim().is_empty());
    given.or_else(|| Some(parameters.iter().find(|it| it.name == parameter)?.value.reveal().to_owned()))
}

/// When a consumer leaves.
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

/// Shorter than three seconds, a slow answer would end it.
fn lease(text: &str) -> Result<Duration, String> {
    between(text, Duration::from_secs(3), LONGEST_HOLD / 2)
}

fn longest(text: &str) -> Result<Duration, String> {
    between(text, Duration::from_secs(3), LONGEST_HOLD)
}

impl Work {
    pub(super) fn execute(self, screen: Screen) -> Result<ExitCode> {
        // What is said between two jobs is news to the next.
        notice::running_for();
        let json = self.json.json;
        let say: Arc<dyn Fn(&Said) + Send + Sync> = Arc::new(move |said| {
            // A reader that has gone, or stands still, is no reason to leave a job.
            if json && let Ok(line) = output::json_lines([said]) {
                report::say_event(line);
            }
        });
        let stop = Stop::listen()?;
        let parameters = match &self.ssm_path {
            Some(path) => match stop.block_on(ssm::parameters(path)) {
                Err(_) if stop.heard().asked() => return Ok(Kind::Interrupted.exit_code().into()),
                parameters => parameters?,
            },
            None => Vec::new(),
        };
        let parameter = parameters.iter().find(|it| it.name == "config-uri").map(|it| it.value.reveal().to_owned());
        let configuration = env::text("TRAINER_CONFIG").or(parameter);
        let cwd = store::working_directory()?;
        let allowed = Allowed::new(&self.allow, self.store.as_deref(), configuration.as_deref(), &cwd)?;
        let settings = Settings {
            allowed,
            queue: self.queue,
            store: self.store,
            workers: self.workers.nproc_per_node.map(|workers| (workers.setting(), workers.count())),
            idle_exit: self.idle_exit.0,
            once: self.once,
            device_wait: self.device_wait,
            terms: Terms { lease: self.lease, longest: self.max_hold },
        };
        let leave =
            || store::block_on(async { Ok(!matches!(leave::leave(leave::ANY_HOOK).await, Departure::Stays { .. })) });
        let tools = Tools {
            reporter: &|listener| Reporter::with_listener(screen.clone(), json, listener),
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
    fn times_are_held_to_what_sqs_takes() {
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
