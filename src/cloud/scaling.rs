//! The size of an Auto Scaling group, as somebody outside of it sets it: up for work that waits, to 0 to end.
//!
//! [`autoscaling`](super::autoscaling) is the other side: a machine that leaves the group it is in.
//!
//! Nothing is stored. Each call states a size, never a difference, so that two callers at once, or a call whose answer
//! was lost and which is repeated, start no machine twice. A group's size may change between the look and the call: the
//! newer size loses at most what another look brings back.

use std::time::Duration;

use aws_config::timeout::TimeoutConfig;
use serde::{
    Deserialize,
    de::{DeserializeOwned, IgnoredAny},
};

use super::{
    aws,
    call::{AUTO_SCALING, Client, Members},
};
use crate::error::{Error, Kind, Result};

/// The limit for one request, and for one with all of the SDK's own retries.
const ATTEMPT: Duration = Duration::from_secs(10);
const OPERATION: Duration = Duration::from_secs(30);

/// The process of a group without which it starts no machine.
const STARTS: &str = "Launch";

/// A group as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// The least and the most machines that it may be told to have.
    pub min: u32,
    /// See [`Self::min`].
    pub max: u32,
    /// How many it is told to have.
    pub desired: u32,
    /// Its machines that take work or are about to.
    pub machines: u32,
    /// Its processes that somebody has suspended, such as `Launch`.
    pub suspended: Vec<String>,
}

impl Capacity {
    /// The size for `wanted` machines: never fewer than it has, never more than it may have.
    pub fn raised(&self, wanted: u32) -> u32 {
        wanted.min(self.max).max(self.desired)
    }

    /// The suspended process without which it starts no machine.
    pub fn starts_none(&self) -> Option<&str> {
        self.suspended.iter().map(String::as_str).find(|process| *process == STARTS)
    }

    /// Whether alarms change its size.
    pub fn hears_alarms(&self) -> bool {
        !self.suspended.iter().any(|process| process == "AlarmNotification")
    }
}

/// A group.
#[derive(Clone, Debug)]
pub struct ScalingGroup {
    client: Client,
    name: String,
}

#[derive(Debug, Deserialize)]
struct Described {
    #[serde(rename = "DescribeAutoScalingGroupsResult")]
    result: Groups,
}

#[derive(Debug, Deserialize)]
struct Groups {
    #[serde(rename = "AutoScalingGroups", default)]
    groups: Members<Entry>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    auto_scaling_group_name: String,
    min_size: u32,
    max_size: u32,
    desired_capacity: u32,
    #[serde(default)]
    instances: Members<Machine>,
    #[serde(default)]
    suspended_processes: Members<Suspended>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Machine {
    lifecycle_state: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suspended {
    process_name: Option<String>,
}

impl From<Entry> for Capacity {
    fn from(entry: Entry) -> Self {
        let leaves = |state: &str| state.starts_with("Terminat") || state.starts_with("Detach");
        let states = entry.instances.member.iter().map(|machine| machine.lifecycle_state.as_deref());
        let machines = states.filter(|state| !state.is_some_and(leaves)).count();
        let suspended = entry.suspended_processes.member;
        Self {
            min: entry.min_size,
            max: entry.max_size,
            desired: entry.desired_capacity,
            machines: u32::try_from(machines).unwrap_or(u32::MAX),
            suspended: suspended.into_iter().filter_map(|process| process.process_name).collect(),
        }
    }
}

impl ScalingGroup {
    /// The group of this name in `region`, or in the one that AWS's tools use. No request is made.
    pub async fn open(name: &str, region: Option<&str>) -> Self {
        let config = match region {
            Some(region) => aws::config_in(region).await,
            None => aws::config().await,
        };
        let timeouts = TimeoutConfig::builder().operation_attempt_timeout(ATTEMPT).operation_timeout(OPERATION).build();
        Self { client: Client::new(&config, &AUTO_SCALING, timeouts, None), name: name.to_owned() }
    }

    async fn call<A: DeserializeOwned>(&self, action: &str, doing: &str, more: &[(&str, &str)]) -> Result<A> {
        let answer = self.client.query::<A>(action, more).await;
        answer.map_err(|failure| aws::explain(failure, &format!("{doing} Auto Scaling group {}", self.name)))
    }

    /// As it is now. A group that does not exist is an error.
    pub async fn look(&self) -> Result<Capacity> {
        let parameters = [("AutoScalingGroupNames.member.1", self.name.as_str())];
        let described: Described = self.call("DescribeAutoScalingGroups", "describe", &parameters).await?;
        let mut groups = described.result.groups.member.into_iter();
        let entry = groups.find(|entry| entry.auto_scaling_group_name == self.name);
        entry.map(Capacity::from).ok_or_else(|| {
            Error::new(Kind::Config, format!("there is no Auto Scaling group {:?} in this region", self.name))
                .with_hint(
                    "aws autoscaling describe-auto-scaling-groups --query 'AutoScalingGroups[].AutoScalingGroupName' \
                 lists them; --region REGION names another region",
                )
        })
    }

    /// Tells it to have this many machines, at once.
    pub async fn set(&self, desired: u32) -> Result<()> {
        let desired = desired.to_string();
        let parameters = [
            ("AutoScalingGroupName", self.name.as_str()),
            ("DesiredCapacity", desired.as_str()),
            ("HonorCooldown", "false"),
        ];
        self.call::<IgnoredAny>("SetDesiredCapacity", "set the capacity of", &parameters).await.map(drop)
    }

    /// From now on alarms change its size, or no longer do.
    pub async fn hear_alarms(&self, hear: bool) -> Result<()> {
        let (action, doing) = match hear {
            true => ("ResumeProcesses", "resume the alarms of"),
            false => ("SuspendProcesses", "suspend the alarms of"),
        };
        let parameters =
            [("AutoScalingGroupName", self.name.as_str()), ("ScalingProcesses.member.1", "AlarmNotification")];
        self.call::<IgnoredAny>(action, doing, &parameters).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capacity(desired: u32, max: u32) -> Capacity {
        Capacity { min: 0, max, desired, machines: desired, suspended: Vec::new() }
    }

    #[test]
    fn a_size_is_raised_up_to_the_most_and_never_lowered() {
        for (desired, max, wanted, size) in
            [(0, 3, 1, 1), (0, 3, 5, 3), (2, 3, 1, 2), (2, 3, 3, 3), (3, 3, 9, 3), (0, 0, 1, 0), (5, 3, 1, 5)]
        {
            assert_eq!(capacity(desired, max).raised(wanted), size, "{desired} of {max}, {wanted} wanted");
        }
    }

    #[test]
    fn a_description_says_what_the_group_is_and_what_it_can_not_do() {
        let of = |inner: &str| {
            let text = format!(
                "<R><DescribeAutoScalingGroupsResult><AutoScalingGroups><member>\
                 <AutoScalingGroupName>g</AutoScalingGroupName><MinSize>0</MinSize><MaxSize>4</MaxSize>\
                 <DesiredCapacity>2</DesiredCapacity>{inner}</member></AutoScalingGroups>\
                 </DescribeAutoScalingGroupsResult></R>"
            );
            let described: Described = quick_xml::de::from_str(&text).unwrap();
            Capacity::from(described.result.groups.member.into_iter().next().unwrap())
        };
        let plain = of("<Instances/><SuspendedProcesses/>");
        assert_eq!(plain, Capacity { machines: 0, ..capacity(2, 4) });
        assert!(plain.starts_none().is_none() && plain.hears_alarms());
        let state = |state: &str| format!("<member><LifecycleState>{state}</LifecycleState></member>");
        let states = ["InService", "Pending:Wait", "Terminating:Wait", "Terminated", "Detaching"].map(state).concat();
        assert_eq!(of(&format!("<Instances>{states}</Instances>")).machines, 2);
        let process = |name: &str| format!("<member><ProcessName>{name}</ProcessName></member>");
        let held = of(&format!("<SuspendedProcesses>{}</SuspendedProcesses>", process("AlarmNotification")));
        assert!(!held.hears_alarms() && held.starts_none().is_none());
        let stuck = of(&format!("<SuspendedProcesses>{}</SuspendedProcesses>", process("Launch")));
        assert_eq!(stuck.starts_none(), Some("Launch"));
    }
}
