//! What a role may do, by IAM's own simulator. Only asked for, never changed.
//!
//! The simulator knows the role's own policies. Policies of a bucket, of a key or of an organization may still refuse.

use std::time::Duration;

use aws_config::timeout::TimeoutConfig;
use serde::Deserialize;

use super::{
    aws,
    call::{Client, IAM, Members},
};
use crate::error::{Error, Kind, Result};

const ATTEMPT: Duration = Duration::from_secs(8);
const OPERATION: Duration = Duration::from_secs(15);

/// An answer of `SimulatePrincipalPolicy`.
#[derive(Debug, Deserialize)]
struct Response {
    #[serde(rename = "SimulatePrincipalPolicyResult")]
    result: Simulated,
}

#[derive(Debug, Deserialize)]
struct Simulated {
    #[serde(rename = "EvaluationResults", default)]
    results: Members<Evaluation>,
}

#[derive(Debug, Deserialize)]
struct Evaluation {
    #[serde(rename = "EvalDecision")]
    decision: String,
}

/// What the role's own policies say of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// They allow it.
    Allowed,
    /// A policy denies it.
    Denied,
    /// No policy allows it.
    Unsaid,
}

/// The ARN of an object of S3, in the partition of the role.
pub fn object(role: &str, bucket: &str, key: &str) -> String {
    let partition = role.split(':').nth(1).unwrap_or("aws");
    format!("arn:{partition}:s3:::{bucket}/{key}")
}

/// Whether `role` (an ARN) may do `action` with `resource`.
pub async fn simulate(role: &str, action: &str, resource: &str) -> Result<Decision> {
    let timeouts = TimeoutConfig::builder().operation_attempt_timeout(ATTEMPT).operation_timeout(OPERATION).build();
    // IAM has one endpoint in a partition, which signs with one region.
    let region = match role.split(':').nth(1) {
        Some("aws-us-gov") => "us-gov-west-1",
        Some("aws-cn") => "cn-north-1",
        _ => "us-east-1",
    };
    let client = Client::new(&aws::config_in(region).await, &IAM, timeouts, None);
    let request = [("PolicySourceArn", role), ("ActionNames.member.1", action), ("ResourceArns.member.1", resource)];
    let doing = format!("simulate {action} of {role}");
    let answer = client.query::<Response>("SimulatePrincipalPolicy", &request).await;
    let answer = answer.map_err(|failure| aws::explain(failure, &doing))?;
    decision(&answer).ok_or_else(|| Error::new(Kind::Unavailable, format!("{doing}: the answer has no decision")))
}

fn decision(answer: &Response) -> Option<Decision> {
    match answer.result.results.member.first()?.decision.as_str() {
        "allowed" => Some(Decision::Allowed),
        "explicitDeny" => Some(Decision::Denied),
        "implicitDeny" => Some(Decision::Unsaid),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_is_read_from_the_documented_answer() {
        // https://docs.aws.amazon.com/IAM/latest/APIReference/API_SimulatePrincipalPolicy.html
        let answer = |decision: &str| {
            let text = format!(
                "<SimulatePrincipalPolicyResponse><SimulatePrincipalPolicyResult><IsTruncated>false</IsTruncated>\
                 <EvaluationResults><member><MatchedStatements/><MissingContextValues/>\
                 <EvalResourceName>arn:aws:s3:::b/k</EvalResourceName><EvalDecision>{decision}</EvalDecision>\
                 <EvalActionName>s3:GetObject</EvalActionName></member></EvaluationResults>\
                 </SimulatePrincipalPolicyResult></SimulatePrincipalPolicyResponse>"
            );
            decision_of(&text)
        };
        fn decision_of(text: &str) -> Option<Decision> {
            super::decision(&quick_xml::de::from_str(text).unwrap())
        }
        assert_eq!(answer("allowed"), Some(Decision::Allowed));
        assert_eq!(answer("explicitDeny"), Some(Decision::Denied));
        assert_eq!(answer("implicitDeny"), Some(Decision::Unsaid));
        assert_eq!(answer("perhaps"), None);
    }

    #[test]
    fn an_object_is_named_in_the_partition_of_the_role() {
        assert_eq!(object("arn:aws:iam::1:role/x", "b", "c/r.toml"), "arn:aws:s3:::b/c/r.toml");
        assert_eq!(object("arn:aws-cn:iam::1:role/x", "b", "k"), "arn:aws-cn:s3:::b/k");
    }
}
