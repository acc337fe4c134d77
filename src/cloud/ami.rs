//! A machine image (AMI): whether it is there, its root disk, and NVIDIA's driver, where its name or description says
//! it. Only asked for, never changed.

use std::time::Duration;

use aws_config::timeout::TimeoutConfig;
use serde::Deserialize;
use serde_json::json;

use super::{
    aws,
    call::{Client, EC2, Items, SSM},
};
use crate::error::{Error, Kind, Result};

const ATTEMPT: Duration = Duration::from_secs(8);
const OPERATION: Duration = Duration::from_secs(15);

/// What EC2 says of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineImage {
    /// Its id, `ami-…`.
    pub id: String,
    /// Its name.
    pub name: String,
    /// `x86_64`, `arm64`.
    pub architecture: String,
    /// Its root device, such as `/dev/sda1`.
    pub root_device: Option<String>,
    /// GiB of its root disk.
    pub disk_gib: Option<u64>,
    /// The major number of NVIDIA's driver; `None`: neither its name nor its description has one.
    pub driver: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Images {
    #[serde(default)]
    images_set: Items<Entry>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    image_id: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    description: String,
    #[serde(default)]
    architecture: String,
    root_device_name: Option<String>,
    #[serde(default)]
    block_device_mapping: Items<Mapping>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mapping {
    device_name: Option<String>,
    ebs: Option<Ebs>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ebs {
    volume_size: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Told {
    parameter: Named,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Named {
    value: String,
}

/// Looks for an image in `region`: `ami-…`, or the SSM parameter that names one (`/aws/service/…`).
pub async fn look(region: &str, named: &str) -> Result<MachineImage> {
    let timeouts = TimeoutConfig::builder().operation_attempt_timeout(ATTEMPT).operation_timeout(OPERATION).build();
    let config = aws::config_in(region).await;
    let id = if named.starts_with('/') {
        let ssm = Client::new(&config, &SSM, timeouts.clone(), None);
        let told = ssm.json::<Told>("GetParameter", &json!({"Name": named})).await;
        told.map_err(|failure| aws::explain(failure, &format!("read parameter {named}")))?.parameter.value
    } else {
        named.to_owned()
    };
    let plain = |id: &str| id.starts_with("ami-") && id.len() <= 64 && id.bytes().all(|b| b.is_ascii_graphic());
    if !plain(&id) {
        return Err(Error::new(Kind::Config, format!("{named} names no machine image (ami-…)")));
    }
    let ec2 = Client::new(&config, &EC2, timeouts, None);
    let images = ec2.query::<Images>("DescribeImages", &[("ImageId.1", &id)]).await;
    let images = images.map_err(|failure| aws::explain(failure, &format!("describe image {id}")))?;
    let entry = images.images_set.item.into_iter().next();
    entry.map(image).ok_or_else(|| Error::new(Kind::Config, format!("there is no image {id} in {region}")))
}

fn image(entry: Entry) -> MachineImage {
    let Entry { image_id, name, description, architecture, root_device_name, block_device_mapping } = entry;
    let is_root = |mapping: &&Mapping| mapping.device_name.is_some() && mapping.device_name == root_device_name;
    let root = block_device_mapping.item.iter().find(is_root);
    MachineImage {
        id: image_id,
        disk_gib: root.and_then(|root| root.ebs.as_ref()?.volume_size),
        root_device: root_device_name,
        driver: driver(&name).or_else(|| driver(&description)),
        name,
        architecture,
    }
}

/// The driver's major number in a text such as "NVIDIA driver 580.95.05" or "ubuntu-2204-nvidia-570": the first number
/// of three digits from 300 that follows one of these words, with nothing but such words and signs in between.
pub fn driver(text: &str) -> Option<u32> {
    let text = text.to_ascii_lowercase();
    let mut after_word = false;
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '.').filter(|word| !word.is_empty());
    for word in words {
        let number = word.trim_start_matches('v');
        let major: String = number.chars().take_while(char::is_ascii_digit).collect();
        let is_version = major.len() == 3 && number[3..].chars().all(|c| c.is_ascii_digit() || c == '.');
        if after_word && is_version {
            return major.parse().ok().filter(|major| *major >= 300);
        }
        after_word = matches!(word, "nvidia" | "driver" | "drivers") || (after_word && word == "version");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_is_read_where_a_text_has_one() {
        for (text, major) in [
            ("common-cu128-ubuntu-2204-nvidia-570-v20260101", Some(570)),
            ("AMI with NVIDIA driver 580.95.05 and CUDA 13", Some(580)),
            ("Nvidia Driver Version: 595.10", Some(595)),
            ("Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 24.04) 20260115", None),
            ("nvidia 24.04", None),
            ("al2023-ami-ecs-gpu-hvm-2023.0.20260101-kernel-6.1-x86_64-ebs", None),
            ("driver 5800", None),
            ("driver 120", None),
            ("", None),
        ] {
            assert_eq!(driver(text), major, "{text}");
        }
    }

    #[test]
    fn an_image_has_the_disk_of_its_root_device() {
        let text = "<R><imagesSet><item><imageId>ami-1</imageId><name>x nvidia-580</name>\
                    <architecture>x86_64</architecture><rootDeviceName>/dev/sda1</rootDeviceName><blockDeviceMapping>\
                    <item><deviceName>/dev/sdb</deviceName><virtualName>ephemeral0</virtualName></item>\
                    <item><deviceName>/dev/sda1</deviceName><ebs><volumeSize>75</volumeSize></ebs></item>\
                    </blockDeviceMapping></item></imagesSet></R>";
        let mut images: Images = quick_xml::de::from_str(text).unwrap();
        let found = image(images.images_set.item.remove(0));
        let expected = MachineImage {
            id: "ami-1".into(),
            name: "x nvidia-580".into(),
            architecture: "x86_64".into(),
            root_device: Some("/dev/sda1".into()),
            disk_gib: Some(75),
            driver: Some(580),
        };
        assert_eq!(found, expected);
    }
}
