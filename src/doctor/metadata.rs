//! The clouds' metadata services, the sources of notices: one line each.

use std::time::Duration;

use reqwest::Method;

use super::{verdict::Line, within};
use crate::{
    cloud::{
        azure::Azure,
        gcp::Gcp,
        hardware::{self, Maker},
        imds::Imds,
        metadata::{Endpoint, MetadataError},
    },
    env,
    error::Kind,
};

/// The limit for one request.
const QUESTION: Duration = Duration::from_secs(2);

/// Asks all of them.
pub(super) async fn look() -> Vec<Line> {
    let maker = hardware::maker(&hardware::root());
    let line = |service: Service, home: Maker, variable: &str, heard| {
        let named = env::raw(variable).is_some_and(|value| !value.is_empty());
        verdict(service, heard, maker == home, named)
    };
    let (aws, gcp, azure) = tokio::join!(
        within(Service::Aws.check(), async {
            line(Service::Aws, Maker::Amazon, "AWS_EC2_METADATA_SERVICE_ENDPOINT", aws().await)
        }),
        within(Service::Gcp.check(), async { line(Service::Gcp, Maker::Google, "GCE_METADATA_HOST", gcp().await) }),
        within(Service::Azure.check(), async {
            line(Service::Azure, Maker::Azure, "TRAINER_AZURE_METADATA_ENDPOINT", azure().await)
        }),
    );
    vec![aws, gcp, azure]
}

fn heard<T>(answer: Result<Option<T>, MetadataError>) -> Heard {
    match answer {
        Ok(Some(_)) => Heard::Answers,
        Ok(None) => Heard::Refused(404),
        Err(MetadataError::Slow { .. }) => Heard::Silent { get: None },
        Err(MetadataError::Unreachable { .. }) => Heard::Absent,
        Err(MetadataError::Status { status, .. }) => Heard::Refused(status),
        Err(MetadataError::Garbled { .. }) => Heard::Garbled,
    }
}

/// With a token, and whether a hop limit blocks it.
async fn aws() -> Heard {
    const PATH: &str = "/latest/meta-data/instance-id";
    let Some(imds) = Imds::from_environment() else { return Heard::Off };
    let heard = heard(imds.get(PATH, QUESTION).await);
    if heard != (Heard::Silent { get: None }) {
        return heard;
    }
    // A plain GET's answer may arrive although the hop limit drops the PUT's.
    let get = match Endpoint::new(imds.uri()) {
        Some(endpoint) => endpoint.ask(Method::GET, PATH, &[], None, QUESTION).await.ok(),
        None => None,
    };
    Heard::Silent { get: get.map(|answer| answer.status) }
}

async fn gcp() -> Heard {
    let Some(gcp) = Gcp::from_environment() else { return Heard::Off };
    heard(gcp.get("/instance/preempted", QUESTION).await)
}

/// Asks for the machine's name, because a request for scheduled events would switch them on.
async fn azure() -> Heard {
    let Some(azure) = Azure::from_environment() else { return Heard::Off };
    heard(azure.name(QUESTION).await.map(Some))
}

/// A cloud's metadata service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    /// EC2's.
    Aws,
    /// Compute Engine's.
    Gcp,
    /// Azure's.
    Azure,
}

impl Service {
    /// The name of its line.
    const fn check(self) -> &'static str {
        match self {
            Self::Aws => "instance metadata",
            Self::Gcp => "gcp metadata",
            Self::Azure => "azure metadata",
        }
    }

    /// The setting that switches it off.
    const fn switch(self) -> &'static str {
        match self {
            Self::Aws => "AWS_EC2_METADATA_DISABLED",
            Self::Gcp => "NO_GCE_CHECK",
            Self::Azure => "TRAINER_AZURE_METADATA_ENDPOINT",
        }
    }

    /// The variable that names it.
    const fn variable(self) -> &'static str {
        match self {
            Self::Aws => "AWS_EC2_METADATA_SERVICE_ENDPOINT",
            Self::Gcp => "GCE_METADATA_HOST",
            Self::Azure => "TRAINER_AZURE_METADATA_ENDPOINT",
        }
    }

    const fn answers(self) -> &'static str {
        match self {
            Self::Aws => "IMDSv2 answers: notices and the machine's role are available",
            Self::Gcp => "the metadata server answers: preemption notices are available",
            Self::Azure => "the metadata service answers: scheduled events are available",
        }
    }

    const fn machine(self) -> &'static str {
        match self {
            Self::Aws => "EC2 instance",
            Self::Gcp => "machine of Google Cloud",
            Self::Azure => "machine of Azure",
        }
    }

    const fn refused(self) -> &'static str {
        match self {
            Self::Aws => "check that HttpEndpoint is enabled in the instance's metadata options",
            Self::Gcp => {
                "check for a proxy or GKE's metadata server in between; a pod with hostNetwork reaches the \
                machine's own"
            }
            Self::Azure => "check for a proxy in between: the service refuses forwarded requests",
        }
    }
}

/// The behaviour of a metadata service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    /// Switched off by the environment.
    Off,
    /// It answers.
    Answers,
    /// It does not answer; on EC2 it is the token's `PUT` that has no answer.
    Silent {
        /// On EC2 the status of a plain `GET`; `None`: no answer either.
        get: Option<u16>,
    },
    /// There is no service.
    Absent,
    /// It refused, with this status.
    Refused(u16),
    /// Its answer was malformed.
    Garbled,
}

/// Whether this service can deliver notices. `at_home`: the machine belongs to its cloud; `named`: the environment
/// gives its address. All three clouds have theirs at one address, so a refusal on another machine is just another
/// cloud's answer.
fn verdict(service: Service, heard: Heard, at_home: bool, named: bool) -> Line {
    let (check, machine) = (service.check(), service.machine());
    match heard {
        Heard::Off => Line::skipped(check, format!("switched off by {}", service.switch())),
        Heard::Answers => Line::ok(check, service.answers()),
        Heard::Silent { get: Some(401 | 200) } => Line::fail(
            check,
            Kind::Config,
            "a plain request is answered but a request for a token is not: the hop limit is 1",
            "set HttpPutResponseHopLimit to 2 in the launch template (aws ec2 modify-instance-metadata-options), or \
            run the container \
             with --network host",
        ),
        Heard::Absent | Heard::Silent { .. } if at_home => Line::warn(
            check,
            format!(
                "this is a{} {machine}, but its metadata service can't be reached",
                if service == Service::Aws { "n" } else { "" }
            ),
            "let this process reach 169.254.169.254; without it no notice is heard before the machine goes away",
        ),
        Heard::Refused(status) if at_home || named => {
            Line::warn(check, format!("the metadata service answers {status}"), service.refused())
        }
        Heard::Garbled if at_home || named => Line::warn(
            check,
            "something answers that is not a metadata service",
            format!("see {}, or what listens at 169.254.169.254", service.variable()),
        ),
        Heard::Absent | Heard::Silent { .. } | Heard::Refused(_) | Heard::Garbled => {
            Line::skipped(check, format!("no {machine}, as far as can be seen"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::testing::{FAIL, OK, SKIPPED, WARN, is},
        *,
    };

    #[test]
    fn a_hop_limit_is_told_from_a_machine_that_is_no_instance() {
        for (heard, at_home, expected) in [
            (Heard::Off, true, SKIPPED),
            (Heard::Answers, false, OK),
            (Heard::Silent { get: Some(401) }, false, FAIL),
            (Heard::Silent { get: Some(200) }, true, FAIL),
            (Heard::Silent { get: None }, false, SKIPPED),
            (Heard::Silent { get: None }, true, WARN),
            (Heard::Absent, false, SKIPPED),
            (Heard::Absent, true, WARN),
            (Heard::Refused(403), true, WARN),
            (Heard::Garbled, true, WARN),
        ] {
            assert_eq!(is(&verdict(Service::Aws, heard, at_home, false)), expected, "{heard:?} {at_home}");
        }
    }

    /// Three clouds share one address: a refusal there means nothing, unless the environment names that service.
    #[test]
    fn another_clouds_answer_is_not_a_failure() {
        for service in [Service::Aws, Service::Gcp, Service::Azure] {
            for heard in [Heard::Refused(400), Heard::Refused(404), Heard::Refused(405), Heard::Garbled] {
                assert_eq!(is(&verdict(service, heard, false, false)), SKIPPED, "{service:?} {heard:?}");
                assert_eq!(is(&verdict(service, heard, false, true)), WARN, "{service:?} {heard:?}");
                assert_eq!(is(&verdict(service, heard, true, false)), WARN, "{service:?} {heard:?}");
            }
        }
        let advice = verdict(Service::Gcp, Heard::Refused(403), true, false).todo.unwrap();
        assert!(!advice.contains("HttpEndpoint"), "{advice}");
    }
}
