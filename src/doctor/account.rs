//! The account's quota for spot machines of a type, whether this machine is one or not.

use super::{
    verdict::{self, Line},
    within,
};
use crate::{
    cloud::{hardware, identity, quota, region},
    error::Kind,
};

const CHECK: &str = "spot quota";

/// The wanted machines.
#[derive(Clone, Debug)]
pub struct Machines {
    /// The EC2 instance type; `None`: this machine's, if it is one.
    pub instance_type: Option<String>,
    /// The region they are to run in; `None`: the one that AWS's tools use.
    pub region: Option<String>,
    /// How many of them at once.
    pub count: u32,
    /// The subnets that they are to be started in.
    pub subnets: Vec<String>,
    /// The container image that they run.
    pub image: Option<String>,
    /// Their machine image: an id, or the SSM parameter that names one.
    pub ami: Option<String>,
    /// What they read at their start: URIs of objects.
    pub reads: Vec<String>,
    /// The ARN of their role.
    pub role: Option<String>,
    /// The project on Google Cloud that they are to run in.
    pub gcp_project: Option<String>,
    /// The region of Azure that they are to run in.
    pub azure_location: Option<String>,
}

/// The account's quota for these machines.
pub(super) async fn spot_quota(wanted: &Machines) -> Line {
    within(CHECK, look(wanted)).await
}

async fn look(wanted: &Machines) -> Line {
    let (instance_type, region, here) = match &wanted.instance_type {
        Some(instance_type) => {
            let region = match &wanted.region {
                Some(region) => Some(region.clone()),
                None => region::find().await.map(|(name, _)| name),
            };
            let Some(region) = region else {
                return Line::warn(CHECK, "not known: no region is named", "give --region, or set AWS_REGION");
            };
            (instance_type.clone(), region, None)
        }
        None => {
            let Some(identity) = identity::read().await else {
                let found = "not an EC2 instance; pass --instance-type to ask about a type";
                return Line::skipped(CHECK, found);
            };
            // A container or an affinity may show this process fewer; the quota counts the machine's.
            let here = hardware::processors(&hardware::root());
            (identity.instance_type.clone(), identity.region.clone(), here)
        }
    };
    let vcpus = quota::vcpus(&instance_type).or(here);
    let machines = verdict::SpotRequest { instance_type: &instance_type, region: &region, count: wanted.count, vcpus };
    let Some(family) = quota::family(&instance_type) else {
        let found = format!("which quota {instance_type:?} counts towards is not known here");
        return match wanted.instance_type {
            Some(_) => {
                Line::warn(CHECK, found, "see the spot quotas of Amazon EC2 under Service Quotas in the console")
            }
            None => Line::skipped(CHECK, found),
        };
    };
    match quota::read(&region, family.spot).await {
        Ok(quota) => verdict::quota(machines, family, quota),
        Err(error) => {
            let todo = match error.kind() {
                Kind::Permission => {
                    "allow servicequotas:GetServiceQuota and servicequotas:GetAWSDefaultServiceQuota, or see Service \
                    Quotas in the console"
                }
                _ => {
                    "see that AWS is reached with credentials (aws sts get-caller-identity), or see Service Quotas in \
                    the console"
                }
            };
            Line::warn(CHECK, format!("not known: {error}"), todo)
        }
    }
}
