//! An image in Amazon's registry: whether it is there, and how large it is. Only asked for, never changed.

use std::time::Duration;

use aws_config::timeout::TimeoutConfig;
use serde::Deserialize;
use serde_json::json;

use super::{
    aws,
    call::{Client, ECR},
};
use crate::error::{Error, Kind, Result};

const ATTEMPT: Duration = Duration::from_secs(8);
const OPERATION: Duration = Duration::from_secs(15);

/// The name of an image in Amazon's registry: `ACCOUNT.dkr.ecr.REGION.amazonaws.com/REPOSITORY:TAG`, or `@sha256:…` in
/// place of the tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageName {
    account: String,
    region: String,
    repository: String,
    /// A digest, or else a tag.
    digest: Option<String>,
    tag: Option<String>,
}

impl ImageName {
    /// `None`: it is in another registry.
    pub fn read(text: &str) -> Option<Self> {
        let (host, path) = text.split_once('/')?;
        let (account, host) = host.split_once(".dkr.ecr.")?;
        let (region, _) = host.split_once(".amazonaws.com")?;
        let label = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if !label(account) || !label(region) {
            return None;
        }
        let (path, digest) = match path.split_once('@') {
            Some((path, digest)) => (path, Some(digest.to_owned())),
            None => (path, None),
        };
        let (repository, tag) = match path.rsplit_once(':') {
            Some((repository, tag)) => (repository, Some(tag.to_owned())),
            None => (path, None),
        };
        let (account, region, repository) = (account.to_owned(), region.to_owned(), repository.to_owned());
        Some(Self { account, region, repository, digest, tag })
    }

    /// Its region: machines of another one fetch it over a longer way, and for money.
    pub fn region(&self) -> &str {
        &self.region
    }

    /// Whether another image can take its name: a machine that starts later may then run another program.
    pub const fn may_change(&self) -> bool {
        self.digest.is_none()
    }
}

#[derive(Debug, Deserialize)]
struct Told {
    #[serde(rename = "imageDetails", default)]
    images: Vec<Detail>,
}

#[derive(Debug, Deserialize)]
struct Detail {
    #[serde(rename = "imageSizeInBytes")]
    bytes: Option<u64>,
}

/// Its bytes, compressed, as they are fetched; `None`: the registry does not say. One that is not there is an error.
pub async fn size(image: &ImageName) -> Result<Option<u64>> {
    let timeouts = TimeoutConfig::builder().operation_attempt_timeout(ATTEMPT).operation_timeout(OPERATION).build();
    let client = Client::new(&aws::config_in(&image.region).await, &ECR, timeouts, None);
    let id = match (&image.digest, &image.tag) {
        (Some(digest), _) => json!({"imageDigest": digest}),
        (None, tag) => json!({"imageTag": tag.as_deref().unwrap_or("latest")}),
    };
    let request = json!({"registryId": image.account, "repositoryName": image.repository, "imageIds": [id]});
    let told = client.json::<Told>("DescribeImages", &request).await;
    let told = told.map_err(|failure| aws::explain(failure, &format!("look for the image in {}", image.repository)))?;
    match told.images.first() {
        Some(image) => Ok(image.bytes),
        None => Err(Error::new(Kind::Config, format!("there is no such image in {}", image.repository))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_split_and_other_registries_are_left_alone() {
        let host = "123456789012.dkr.ecr.eu-west-1.amazonaws.com";
        let read = |rest: &str| ImageName::read(&format!("{host}/{rest}")).unwrap();
        let name = read("team/trainer:1");
        assert_eq!(
            (name.region(), name.repository.as_str(), name.tag.as_deref()),
            ("eu-west-1", "team/trainer", Some("1"))
        );
        assert!(name.may_change() && read("trainer").may_change());
        let fixed = read("trainer@sha256:00ff");
        assert_eq!((fixed.digest.as_deref(), fixed.may_change()), (Some("sha256:00ff"), false));
        assert_eq!(read("trainer:1@sha256:00ff").repository, "trainer");
        for other in
            ["ubuntu:24.04", "ghcr.io/team/trainer:1", "trainer", "", "x.dkr.ecr./y", ".dkr.ecr.a.amazonaws.com/y"]
        {
            assert_eq!(ImageName::read(other), None, "{other}");
        }
    }
}
