//! The clouds' metadata services, through which notices are heard: one line each.

use std::time::Duration;

use reqwest::Method;

use super::{
    verdict::{self, Heard, Line, Service},
    within,
};
use crate::cloud::{
    azure::Azure,
    gcp::Gcp,
    hardware::{self, Maker},
    imds::Imds,
    metadata::{Endpoint, MetadataError},
};

/// One question.
const QUESTION: Duration = Duration::from_secs(2);

/// Asks all of them.
pub(super) async fn look() -> Vec<Line> {
    let maker = hardware::maker(&hardware::root());
    let line = |service: Service, home: Maker, variable: &str, heard| {
        let named = std::env::var_os(variable).is_some_and(|value| !value.is_empty());
        verdict::metadata(service, heard, maker == home, named)
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

/// With a token, and whether a hop limit is in its way.
async fn aws() -> Heard {
    const PATH: &str = "/latest/meta-data/instance-id";
    let Some(imds) = Imds::from_environment() else { return Heard::Off };
    let heard = heard(imds.get(PATH, QUESTION).await);
    if heard != (Heard::Silent { get: None }) {
        return heard;
    }
    // The answer to a plain GET has more hops to live than that to the PUT.
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

/// The machine's name: a question for scheduled events would switch them on.
async fn azure() -> Heard {
    let Some(azure) = Azure::from_environment() else { return Heard::Off };
    heard(azure.name(QUESTION).await.map(Some))
}
