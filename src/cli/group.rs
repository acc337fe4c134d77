//! `trainer wake`, `trainer stop`: the machines of a group, told from outside to come or to go.
//!
//! `wake` states how many machines the work needs, so that calling it twice starts nothing twice. It never lowers a
//! group: machines without work leave by themselves. `stop` sets the size to 0 before it asks the run to save: in the
//! other order the group would replace a machine that has saved and left.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::{args::JsonArg, drain::Drain, output, store};
use crate::{
    cloud::{
        scaling::{Capacity, ScalingGroup},
        sqs::{Depth, Queue},
    },
    error::{Error, Kind, Result},
    ids::RunId,
    report::{self, human},
};

/// Which group of machines.
#[derive(Clone, Debug, Args)]
pub(super) struct GroupArg {
    /// The Auto Scaling group; of the stack in userdata/ it has the stack's name
    #[arg(long, env = "TRAINER_GROUP", value_name = "NAME", hide_env_values = true)]
    group: String,
    /// Its region [default: as for AWS's tools]
    #[arg(long, value_name = "REGION")]
    region: Option<String>,
}

/// Start machines of an Auto Scaling group for work that waits
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer wake --group trainer                       # at least one machine
  trainer wake --group trainer --queue https://sqs.eu-central-1.amazonaws.com/123456789012/jobs

With --queue, the group gets a machine for each job that waits or is at work, up to its maximum.
A job that was just sent may not be counted yet: --machines covers it (1 is the default).
The group is never made smaller: a machine without work leaves by itself (trainer work --terminate-when-idle).
Called again, or twice at once, it starts nothing twice.
A group is held if its alarms are suspended: a machine that gave up did that, so that no other one fails in its place,
or `trainer stop --hold` did. Then nothing is started, unless --release is given.

Permissions: autoscaling:DescribeAutoScalingGroups, autoscaling:SetDesiredCapacity; with --queue also
sqs:GetQueueAttributes; with --release also autoscaling:ResumeProcesses.")]
pub struct Wake {
    #[command(flatten)]
    group: GroupArg,
    /// The URL of the queue whose jobs wait
    #[arg(long, env = "TRAINER_QUEUE", value_name = "URL", hide_env_values = true)]
    queue: Option<String>,
    /// At least this many machines; with --queue, this many beside those at work
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    machines: u32,
    /// End the hold of a group that a machine gave up in, or that was stopped with --hold
    #[arg(long)]
    release: bool,
    #[command(flatten)]
    json: JsonArg,
}

/// Let all machines of an Auto Scaling group save and end
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer stop --group trainer
  trainer stop --group trainer --run-id first --store s3://bucket/runs     # waits until the run has saved
  trainer stop --group trainer --hold                # nor do alarms start machines again

The group's capacity is set to 0 first, so that no machine is replaced; then the run is asked to save and stop.
Jobs that wait in a queue start machines again through the stack's alarm, unless --hold is given; `trainer wake
--release` ends that.

Permissions: autoscaling:DescribeAutoScalingGroups, autoscaling:SetDesiredCapacity; with --hold also
autoscaling:SuspendProcesses.")]
pub struct Stop {
    #[command(flatten)]
    group: GroupArg,
    /// A run that is at work on the group's machines: wait until it has saved
    #[arg(long, env = "TRAINER_RUN_ID", value_name = "ID", hide_env_values = true)]
    run_id: Option<RunId>,
    /// The store of the run: s3://bucket/prefix, …
    #[arg(long, env = "TRAINER_STORE", value_name = "URI", hide_env_values = true)]
    store: Option<String>,
    /// Keep alarms from starting machines again
    #[arg(long)]
    hold: bool,
    #[command(flatten)]
    json: JsonArg,
}

/// What `--json` prints.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Report<'a> {
    group: &'a str,
    /// The capacity before, and now.
    before: u32,
    capacity: u32,
    max: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    at_work: Option<u32>,
    /// Whether alarms change the capacity.
    alarms: bool,
}

/// How many machines the work needs: one for each job that is at work, and for each that waits or was just sent.
fn wanted(depth: Option<Depth>, machines: u32) -> u32 {
    depth.map_or(machines, |depth| depth.at_work.saturating_add(depth.waiting.max(machines)))
}

impl Wake {
    pub(super) fn execute(self) -> Result<ExitCode> {
        store::block_on(async {
            let Self { group: GroupArg { group: name, region }, queue, machines, release, .. } = &self;
            let depth = match queue {
                Some(url) => Some(Queue::open(url).await?.depth().await?),
                None => None,
            };
            let group = ScalingGroup::open(name, region.as_deref()).await;
            let found = group.look().await?;
            if let Some(process) = found.starts_none() {
                return Err(Error::new(
                    Kind::Config,
                    format!(
                        "group {name} starts no machine: somebody has suspended \
                    its process {process}"
                    ),
                )
                .with_hint(format!("aws autoscaling resume-processes --auto-scaling-group-name {name}")));
            }
            if !found.hears_alarms() && !release {
                return Err(held(name));
            }
            let wanted = wanted(depth, *machines);
            let capacity = found.raised(wanted);
            if capacity == 0 {
                return Err(Error::new(Kind::Config, format!("group {name} may have no machine: its MaxSize is 0"))
                    .with_hint("raise the group's MaxSize (the parameter MaxSize of the stack)"));
            }
            if !found.hears_alarms() {
                group.hear_alarms(true).await?;
                report::say(format!("group {name} hears alarms again\n"));
            }
            if capacity > found.desired {
                group.set(capacity).await?;
            }
            report::say(woken(name, &found, capacity, wanted));
            self.report(&found, capacity, depth)
        })
    }

    fn report(&self, found: &Capacity, capacity: u32, depth: Option<Depth>) -> Result<ExitCode> {
        let (waiting, at_work) = (depth.map(|depth| depth.waiting), depth.map(|depth| depth.at_work));
        let (group, before, max) = (self.group.group.as_str(), found.desired, found.max);
        if self.json.json {
            let report = Report { group, before, capacity, max, waiting, at_work, alarms: true };
            output::emit(&output::json_lines([report])?)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Nobody looked at why a machine gave up, or a person wants none.
fn held(name: &str) -> Error {
    let what = format!("group {name} is held: its alarms are suspended, and nothing is started");
    Error::new(Kind::Unavailable, what).with_hint(format!(
        "a machine gave up, or somebody called `trainer stop --hold`; look at the log of the last machine, then: \
         trainer wake --group {name} --release"
    ))
}

/// What a call to wake a group has done.
fn woken(name: &str, found: &Capacity, capacity: u32, wanted: u32) -> String {
    let of = |count: u32| human::plural(count.into(), "machine");
    let short = match wanted > capacity {
        true => format!("; {} would have work, but its MaxSize is {}", of(wanted), found.max),
        false => String::new(),
    };
    match capacity > found.desired {
        true => format!("group {name} is told to have {} (before: {}){short}\n", of(capacity), found.desired),
        false => format!("group {name} has {} already{short}\n", of(capacity)),
    }
}

impl Stop {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let GroupArg { group: name, region } = &self.group;
        let found = store::block_on(async {
            let group = ScalingGroup::open(name, region.as_deref()).await;
            let found = group.look().await?;
            if found.min > 0 {
                let what =
                    format!("group {name} always has {}: its MinSize", human::plural(found.min.into(), "machine"));
                return Err(Error::new(Kind::Config, what).with_hint(format!(
                    "aws autoscaling update-auto-scaling-group --auto-scaling-group-name {name} --min-size 0; then \
                     again"
                )));
            }
            // An alarm between the two would raise the capacity again.
            if self.hold && found.hears_alarms() {
                group.hear_alarms(false).await?;
            }
            if found.desired > 0 {
                group.set(0).await?;
            }
            Ok(found)
        })?;
        report::say(stopped(name, &found, self.hold));
        if self.json.json {
            let alarms = !self.hold && found.hears_alarms();
            let (before, max) = (found.desired, found.max);
            let report = Report { group: name, before, capacity: 0, max, waiting: None, at_work: None, alarms };
            output::emit(&output::json_lines([report])?)?;
        }
        match self.run_id {
            Some(run_id) => Drain::of(run_id, self.store, self.json).execute(),
            None => Ok(ExitCode::SUCCESS),
        }
    }
}

/// What a call to stop a group has done.
fn stopped(name: &str, found: &Capacity, hold: bool) -> String {
    let ends = match found.machines {
        0 => "it has none at the moment".to_owned(),
        count => format!("{} will save and end", human::plural(count.into(), "machine")),
    };
    let held = match hold {
        true => format!("; alarms start none until `trainer wake --group {name} --release`"),
        false => String::new(),
    };
    format!("group {name} is told to have no machine: {ends}{held}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_job_that_waits_or_is_at_work_wants_a_machine() {
        let depth = |waiting, at_work| Some(Depth { waiting, at_work });
        assert_eq!(wanted(None, 1), 1);
        assert_eq!(wanted(None, 3), 3);
        assert_eq!(wanted(depth(0, 0), 1), 1, "the job that was just sent is not counted yet");
        assert_eq!(wanted(depth(4, 0), 1), 4);
        assert_eq!(wanted(depth(1, 2), 1), 3);
        assert_eq!(wanted(depth(0, 2), 1), 3, "machines at work can't take it");
        assert_eq!(wanted(depth(u32::MAX, 5), 1), u32::MAX);
    }

    #[test]
    fn what_was_done_is_said() {
        let found = Capacity { min: 0, max: 2, desired: 1, machines: 1, suspended: Vec::new() };
        assert_eq!(woken("g", &found, 2, 2), "group g is told to have 2 machines (before: 1)\n");
        assert_eq!(woken("g", &found, 1, 1), "group g has 1 machine already\n");
        assert_eq!(
            woken("g", &found, 2, 5),
            "group g is told to have 2 machines (before: 1); 5 machines would have work, but its MaxSize is 2\n"
        );
        assert_eq!(stopped("g", &found, false), "group g is told to have no machine: 1 machine will save and end\n");
        assert!(
            stopped("g", &Capacity { machines: 0, ..found }, true)
                .ends_with("until `trainer wake --group g --release`\n")
        );
    }
}
