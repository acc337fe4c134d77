//! Messages to a topic of the Simple Notification Service.

use std::time::Duration;

use aws_config::timeout::TimeoutConfig;
use serde::de::IgnoredAny;

use super::{
    aws,
    call::{Client, SNS},
};

/// The limit for one request, and for one with all of the SDK's own retries.
const ATTEMPT: Duration = Duration::from_secs(10);
const OPERATION: Duration = Duration::from_secs(40);

/// The region of a topic's ARN, if it is one.
pub fn region_of(arn: &str) -> Option<&str> {
    let parts: Vec<&str> = arn.split(':').collect();
    match parts[..] {
        ["arn", _, "sns", region, account, topic] => {
            [region, account, topic].iter().all(|part| !part.is_empty()).then_some(region)
        }
        _ => None,
    }
}

/// Publishes a message; subscribers may get it twice. The error is the service's own.
pub async fn publish(arn: &str, subject: &str, message: &str) -> Result<(), String> {
    let region = region_of(arn).ok_or_else(|| format!("{arn} is not the ARN of a topic"))?;
    let timeouts = TimeoutConfig::builder().operation_attempt_timeout(ATTEMPT).operation_timeout(OPERATION).build();
    let client = Client::new(&aws::config_in(region).await, &SNS, timeouts, None);
    let parameters = [("TopicArn", arn), ("Subject", subject), ("Message", message)];
    let published = client.query::<IgnoredAny>("Publish", &parameters).await;
    published.map(drop).map_err(|failure| format!("{}: {}", failure.code(), failure.message()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topics_arn_names_its_region() {
        assert_eq!(region_of("arn:aws-cn:sns:cn-north-1:123456789012:alarms"), Some("cn-north-1"));
        for other in ["", "arn:aws:sqs:us-east-1:1:q", "arn:aws:sns:us-east-1::a", "arn:aws:sns:us-east-1:1:a:b"] {
            assert_eq!(region_of(other), None, "{other}");
        }
    }
}
