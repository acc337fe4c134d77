//! The hook at the end of a machine of an AWS Auto Scaling group.
//!
//! With such a hook a machine that the group is about to end waits until the hook is completed, or until the hook's
//! heartbeat time-out has passed since the last heartbeat (30 s to 2 h; in all at most 48 h, or a hundred time-outs).
//! Without one it is ended at once. A hook delays a scale-in, a rebalance or a refresh; it does not delay EC2 from
//! taking a spot machine back (<https://docs.aws.amazon.com/autoscaling/ec2/userguide/lifecycle-hooks.html>).
//!
//! Which group: `TRAINER_AUTO_SCALING_GROUP`; else the machine's tag `aws:autoscaling:groupName`, where its metadata
//! has tags; else `DescribeAutoScalingInstances`. Which hook: `TRAINER_LIFECYCLE_HOOK` or the configuration; else the
//! group's one hook at the end of a machine, by `DescribeLifecycleHooks`, which also gives its time-out. If group and
//! hook are named, the role needs only `RecordLifecycleActionHeartbeat` and `CompleteLifecycleAction` on that group,
//! but then the time-out is not known.
//!
//! Nothing is stored. A process that dies sends no more heartbeats, and the group continues after the time-out. A call
//! is bounded by [`LIMIT`], its retries included.

use std::time::Duration;

use aws_config::{retry::RetryConfig, timeout::TimeoutConfig};
use serde::{Deserialize, de::IgnoredAny};

use super::{
    aws,
    call::{AUTO_SCALING, Client, Members},
    imds::Imds,
};
use crate::error::{Error, Kind};

/// The longest that one call takes.
pub const LIMIT: Duration = Duration::from_secs(5);
/// The limit for one attempt.
const ATTEMPT: Duration = Duration::from_secs(2);
/// The limit for one request to the metadata service.
const LOOK: Duration = Duration::from_secs(2);
const TERMINATING: &str = "autoscaling:EC2_INSTANCE_TERMINATING";
const INSTANCE_ID: &str = "/latest/meta-data/instance-id";
const GROUP_TAG: &str = "/latest/meta-data/tags/instance/aws:autoscaling:groupName";

/// A hook that delays the end of this machine.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    client: Client,
    instance: String,
    group: String,
    hook: String,
    timeout: Option<Duration>,
}

/// An answer of `DescribeLifecycleHooks`.
#[derive(Debug, Deserialize)]
struct Hooks {
    #[serde(rename = "DescribeLifecycleHooksResult")]
    result: HooksResult,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HooksResult {
    #[serde(default)]
    lifecycle_hooks: Members<Hook>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Hook {
    lifecycle_hook_name: Option<String>,
    lifecycle_transition: Option<String>,
    heartbeat_timeout: Option<i32>,
}

/// An answer of `DescribeAutoScalingInstances`.
#[derive(Debug, Deserialize)]
struct Instances {
    #[serde(rename = "DescribeAutoScalingInstancesResult")]
    result: InstancesResult,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct InstancesResult {
    #[serde(default)]
    auto_scaling_instances: Members<Instance>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Instance {
    instance_id: Option<String>,
    auto_scaling_group_name: Option<String>,
}

impl Lifecycle {
    /// Finds this machine's hook. `configured`: `auto`, `none`, or its name. `None`: nothing delays its end.
    ///
    /// # Errors
    /// If the metadata service does not name the machine, or Auto Scaling does not answer or refuses.
    pub async fn find(
        imds: &Imds,
        configured: &str,
        variable: &(dyn Fn(&str) -> Option<String> + Sync),
    ) -> Result<Option<Self>, Error> {
        let named = variable("TRAINER_LIFECYCLE_HOOK").unwrap_or_else(|| configured.to_owned());
        if named == "none" {
            return Ok(None);
        }
        let Some(instance) = ask(imds, INSTANCE_ID).await? else {
            return Err(Error::new(Kind::Unavailable, "the metadata service does not name this machine"));
        };
        let timeouts = TimeoutConfig::builder().operation_timeout(LIMIT).operation_attempt_timeout(ATTEMPT).build();
        let retries = RetryConfig::standard().with_max_attempts(3);
        let client = Client::new(&aws::config().await, &AUTO_SCALING, timeouts, Some(retries));
        let group = match variable("TRAINER_AUTO_SCALING_GROUP") {
            Some(group) => group,
            // 404 if tags are not in the metadata, or there is no such tag.
            None => match ask(imds, GROUP_TAG).await? {
                Some(group) => group,
                None => match group_of(&client, &instance).await? {
                    Some(group) => group,
                    None => return Ok(None),
                },
            },
        };
        let mut parameters = vec![("AutoScalingGroupName", group.as_str())];
        if named != "auto" {
            parameters.push(("LifecycleHookNames.member.1", &named));
        }
        let answer = client.query::<Hooks>("DescribeLifecycleHooks", &parameters).await;
        let (hook, timeout) = match answer {
            Ok(hooks) => match choose(&hooks.result.lifecycle_hooks.member) {
                Some(found) => found,
                None if named == "auto" => return Ok(None),
                None => {
                    return Err(Error::new(
                        Kind::Config,
                        format!("group {group} has no hook {named} at the end of a machine"),
                    ));
                }
            },
            Err(error) if named == "auto" => {
                return Err(aws::explain(error, &format!("ask for the lifecycle hooks of group {group}")));
            }
            // Only its name is needed; its time-out stays unknown.
            Err(error) => {
                let error = aws::explain(error, &format!("ask for lifecycle hook {named} of group {group}"));
                tracing::debug!(%error, "the hook's time-out is not known");
                (named, None)
            }
        };
        Ok(Some(Self { client, instance, group, hook, timeout }))
    }

    /// How long the hook waits after a heartbeat, if known.
    pub const fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    /// The group's name and the hook's, for people.
    pub fn name(&self) -> String {
        format!("{} of group {}", self.hook, self.group)
    }

    /// Makes the hook wait for another time-out from now.
    pub async fn heartbeat(&self) -> Result<(), Error> {
        let sent = self.act("RecordLifecycleActionHeartbeat", None).await;
        sent.map_err(|failure| aws::explain(failure, &format!("keep lifecycle hook {} waiting", self.name())))
    }

    /// Ends the wait: the machine may go.
    pub async fn complete(&self) -> Result<(), Error> {
        let sent = self.act("CompleteLifecycleAction", Some(("LifecycleActionResult", "CONTINUE"))).await;
        sent.map_err(|failure| aws::explain(failure, &format!("complete lifecycle hook {}", self.name())))
    }

    async fn act(&self, action: &str, more: Option<(&str, &str)>) -> Result<(), aws::Failure> {
        let mut parameters = vec![
            ("InstanceId", self.instance.as_str()),
            ("AutoScalingGroupName", &self.group),
            ("LifecycleHookName", &self.hook),
        ];
        parameters.extend(more);
        self.client.query::<IgnoredAny>(action, &parameters).await.map(drop)
    }
}

/// A name from the metadata service.
async fn ask(imds: &Imds, path: &str) -> Result<Option<String>, Error> {
    let found = imds.get(path, LOOK).await.map_err(|error| Error::from_source(Kind::Unavailable, error))?;
    Ok(found.map(|text| text.trim().to_owned()).filter(|name| is_name(name)))
}

/// The group that a machine belongs to, if any.
async fn group_of(client: &Client, instance: &str) -> Result<Option<String>, Error> {
    let parameters = [("InstanceIds.member.1", instance)];
    let answer = client.query::<Instances>("DescribeAutoScalingInstances", &parameters).await;
    let answer = answer.map_err(|failure| {
        aws::explain(failure, &format!("ask for the Auto Scaling group of {instance}"))
            .with_hint("enable the machine's tags in its metadata, or set TRAINER_AUTO_SCALING_GROUP")
    })?;
    let members = answer.result.auto_scaling_instances.member;
    let mut ours = members.into_iter().filter(|member| member.instance_id.as_deref() == Some(instance));
    Ok(ours.find_map(|member| member.auto_scaling_group_name))
}

/// The hook that matters: the one with the shortest wait, since the first hook that ends its wait with ABANDON ends
/// them all.
fn choose(hooks: &[Hook]) -> Option<(String, Option<Duration>)> {
    let ending = hooks.iter().filter(|hook| hook.lifecycle_transition.as_deref() == Some(TERMINATING));
    let named = ending.filter_map(|hook| Some((hook.lifecycle_hook_name.clone()?, waits(hook.heartbeat_timeout))));
    named.min_by(|(a, a_waits), (b, b_waits)| {
        (a_waits.unwrap_or(Duration::MAX), a).cmp(&(b_waits.unwrap_or(Duration::MAX), b))
    })
}

/// A heartbeat time-out within its documented bounds.
fn waits(seconds: Option<i32>) -> Option<Duration> {
    let seconds = u64::try_from(seconds?).ok()?;
    Some(Duration::from_secs(seconds.clamp(30, 7200)))
}

/// Whether a text from the metadata service may become part of a request.
fn is_name(text: &str) -> bool {
    !text.is_empty() && text.len() <= 255 && !text.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_termination_hook_with_the_shortest_wait_is_chosen() {
        let hook = |name: &str, transition: &str, timeout: Option<i32>| Hook {
            lifecycle_hook_name: Some(name.to_owned()),
            lifecycle_transition: Some(transition.to_owned()),
            heartbeat_timeout: timeout,
        };
        let launch = hook("launch", "autoscaling:EC2_INSTANCE_LAUNCHING", Some(30));
        let (long, short) = (hook("long", TERMINATING, Some(3600)), hook("short", TERMINATING, Some(120)));
        let (unknown, nameless) = (hook("unknown", TERMINATING, None), Hook::default());
        let chosen = |hooks: &[&Hook]| {
            let hooks: Vec<Hook> = hooks.iter().map(|hook| (*hook).clone()).collect();
            choose(&hooks).map(|(name, timeout)| (name, timeout.map(|timeout| timeout.as_secs())))
        };
        assert_eq!(chosen(&[]), None);
        assert_eq!(chosen(&[&launch, &nameless]), None);
        assert_eq!(chosen(&[&launch, &long, &short, &unknown]), Some(("short".into(), Some(120))));
        assert_eq!(chosen(&[&unknown]), Some(("unknown".into(), None)));
        for (given, waited) in [(Some(0), 30), (Some(300), 300), (Some(i32::MAX), 7200)] {
            assert_eq!(waits(given), Some(Duration::from_secs(waited)), "{given:?}");
        }
        assert_eq!((waits(Some(-1)), waits(None)), (None, None));
    }

    #[test]
    fn names_from_the_metadata_service_are_bounded() {
        assert!(is_name("trainers 1/a"));
        assert!(!is_name("") && !is_name("a\nb") && !is_name(&"x".repeat(256)));
    }
}
