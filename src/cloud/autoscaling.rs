//! Leaving an Auto Scaling group.
//!
//! If a machine without work merely powers off, its group replaces it, which costs money forever. So it leaves with
//! `TerminateInstanceInAutoScalingGroup` and the desired capacity lowered by one; the group starts the termination
//! itself. The API refuses if the desired capacity would fall below the minimum.

use std::time::Duration;

use aws_config::timeout::TimeoutConfig;
use serde::de::IgnoredAny;

use super::{
    aws,
    call::{AUTO_SCALING, Client},
    identity::Identity,
};
use crate::error::Error;

/// The limit for one request, and for one with all of the SDK's own retries.
const ATTEMPT: Duration = Duration::from_secs(10);
const OPERATION: Duration = Duration::from_secs(40);
/// Attempts while the group is being changed.
const TRIES: u32 = 6;
/// The first pause between two of them; it doubles.
const PAUSE: Duration = Duration::from_secs(2);

/// The outcome.
#[derive(Debug)]
pub enum Left {
    /// The group ends this machine and starts none in its place.
    Leaving,
    /// It is in no group.
    InNoGroup,
    /// The desired capacity is the group's minimum already.
    AtMinimum {
        /// The API's message.
        said: String,
    },
    /// It can't be done.
    Failed(Error),
}

/// The meaning of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    InNoGroup,
    AtMinimum,
    /// The group is busy: ask again.
    Busy,
    Other,
}

/// Refusals differ by the API's code and, where one code has several meanings, by its message.
fn refusal(code: &str, message: &str) -> Refusal {
    let message = message.to_ascii_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| message.contains(word));
    match code {
        "ScalingActivityInProgress" | "ResourceContention" => Refusal::Busy,
        "ValidationError" if says(&["minsize", "min size", "minimum"]) => Refusal::AtMinimum,
        "ValidationError" if says(&["not found", "no managed instance", "not part of", "not in an auto scaling"]) => {
            Refusal::InNoGroup
        }
        _ => Refusal::Other,
    }
}

/// Leaves the group, its desired capacity lowered by one.
pub async fn leave(identity: &Identity) -> Left {
    let timeouts = TimeoutConfig::builder().operation_attempt_timeout(ATTEMPT).operation_timeout(OPERATION).build();
    let client = Client::new(&aws::config().await, &AUTO_SCALING, timeouts, None);
    let parameters = [("InstanceId", identity.instance_id.as_str()), ("ShouldDecrementDesiredCapacity", "true")];
    let mut tries = 0;
    loop {
        let answer = client.query::<IgnoredAny>("TerminateInstanceInAutoScalingGroup", &parameters).await;
        let Err(failure) = answer else { return Left::Leaving };
        tries += 1;
        match refusal(failure.code(), failure.message()) {
            Refusal::Busy if tries < TRIES => tokio::time::sleep(PAUSE * (1 << tries.min(5))).await,
            Refusal::InNoGroup => return Left::InNoGroup,
            Refusal::AtMinimum => return Left::AtMinimum { said: failure.message().to_owned() },
            Refusal::Busy | Refusal::Other => {
                return Left::Failed(aws::explain(failure, "leave the Auto Scaling group"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_classified_by_code_and_message() {
        for (code, message, means) in [
            (
                "ValidationError",
                "Currently, desiredSize equals minSize (1). Terminating instance without replacement will violate \
                group's min size constraint. Either set shouldDecrementDesiredCapacity flag to false or lower group's \
                min size.",
                Refusal::AtMinimum,
            ),
            (
                "ValidationError",
                "Instance Id not found - No managed instance found for instance ID: i-0abc",
                Refusal::InNoGroup,
            ),
            ("ValidationError", "1 validation error detected: Value '' at 'instanceId'", Refusal::Other),
            ("ScalingActivityInProgress", "Scaling activity x is in progress", Refusal::Busy),
            ("ResourceContention", "You already have a pending update", Refusal::Busy),
            ("AccessDenied", "User is not authorized; minimum", Refusal::Other),
            ("", "", Refusal::Other),
        ] {
            assert_eq!(refusal(code, message), means, "{code}: {message}");
        }
    }
}
