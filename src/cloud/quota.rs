//! How many vCPUs of spot machines an account may have in a region at once, by family of instance types.
//!
//! "Max spot instance count exceeded" is the first answer that many new accounts get: their quota for GPU machines is
//! 0. Quotas are counted in vCPUs, per region, for all machines of a family together, and open requests count too (EC2
//! user guide, "Spot Instance quotas"; the codes: AWS General Reference, "Amazon EC2 endpoints and quotas"). Only asked
//! for, never changed.

use std::time::Duration;

use aws_config::timeout::TimeoutConfig;
use serde::Deserialize;
use serde_json::json;

use super::{
    aws,
    call::{Client, QUOTAS},
};
use crate::error::{Error, Kind, Result};

/// The limit for all requests with the SDK's retries.
const LIMIT: Duration = Duration::from_secs(15);

/// A family of instance types that share a quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family {
    /// AWS's name for it.
    pub name: &'static str,
    /// The code of its quota for spot machines.
    pub spot: &'static str,
}

/// The family of an instance type such as `g5.xlarge`; `None`: unknown here.
pub fn family(instance_type: &str) -> Option<Family> {
    let (class, _) = instance_type.split_once('.')?;
    let letters: String = class.chars().take_while(char::is_ascii_lowercase).collect();
    let generation: String = class.chars().skip(letters.len()).take_while(char::is_ascii_digit).collect();
    let (name, spot) = match (letters.as_str(), generation.as_str()) {
        ("g" | "gr" | "vt", _) => ("G and VT", "L-3819A6DF"),
        ("p", "2" | "3" | "4") => ("P4, P3 and P2", "L-7212CCBC"),
        ("p", "5") => ("P5", "L-C4BD4855"),
        // AWS's list does not say which of them counts P6.
        ("p", _) => return None,
        ("trn", _) => ("Trn", "L-6B0D517C"),
        ("inf", _) => ("Inf", "L-B5D1601B"),
        ("dl", _) => ("DL", "L-85EED4F7"),
        ("f", _) => ("F", "L-88CF9481"),
        ("x", _) => ("X", "L-E3A00192"),
        // A, C, D, H, I, M, R, T, Z: "Standard", in all their spellings.
        (other, _) if "acdhimrtz".contains(other.chars().next()?) && other != "hpc" && other != "mac" => {
            ("Standard", "L-34B43A08")
        }
        _ => return None,
    };
    Some(Family { name, spot })
}

/// Types whose size does not give their vCPUs.
const ODD: [(&str, u32); 4] = [("g4dn.metal", 96), ("g5g.metal", 64), ("c4.8xlarge", 36), ("d2.8xlarge", 36)];
/// Classes from before sizes meant the same for every type.
const OLD: [&str; 9] = ["c1", "cc2", "cg1", "cr1", "hi1", "hs1", "m1", "m2", "t1"];

/// The vCPUs of an instance type, by its size: `large` has 2, `xlarge` 4, `<n>xlarge` and `metal-<n>xl` 4 n (EC2
/// instance types guide, specifications). `None`: its size does not give them.
pub fn vcpus(instance_type: &str) -> Option<u32> {
    if let Some((_, vcpus)) = ODD.iter().find(|(odd, _)| *odd == instance_type) {
        return Some(*vcpus);
    }
    let (class, size) = instance_type.split_once('.')?;
    if OLD.contains(&class) {
        return None;
    }
    match size {
        "large" => Some(2),
        "xlarge" => Some(4),
        _ => {
            let times = size.strip_suffix("xlarge").or_else(|| size.strip_prefix("metal-")?.strip_suffix("xl"))?;
            times.parse::<u32>().ok().filter(|n| (1..=256).contains(n)).map(|n| 4 * n)
        }
    }
}

/// A quota.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quota {
    /// How many may run at once.
    pub vcpus: f64,
    /// Whether it is AWS's default: none was ever applied to this account.
    pub is_default: bool,
}

/// An answer about one quota.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Told {
    quota: Option<Entry>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    value: Option<f64>,
}

/// The quota with a code. If none was ever applied to the account, the answer may be "no such resource" (aws-cli issue
/// 6629): then AWS's default counts.
pub async fn read(region: &str, code: &str) -> Result<Quota> {
    let client = Client::new(&aws::config_in(region).await, &QUOTAS, TimeoutConfig::builder().build(), None);
    let doing = format!("read quota {code} of EC2 in {region}");
    let work = async {
        let request = json!({"ServiceCode": "ec2", "QuotaCode": code});
        let (told, is_default) = match client.json::<Told>("GetServiceQuota", &request).await {
            Ok(told) => (told, false),
            Err(failure) if failure.code() == "NoSuchResourceException" => {
                let default = client.json::<Told>("GetAWSDefaultServiceQuota", &request).await;
                let told = default.map_err(|failure| aws::explain(failure, &format!("{doing}, AWS's default")))?;
                (told, true)
            }
            Err(failure) => return Err(aws::explain(failure, &doing)),
        };
        let value = told.quota.and_then(|quota| quota.value);
        let vcpus = value.filter(|value| value.is_finite() && *value >= 0.0);
        let vcpus = vcpus.ok_or_else(|| Error::new(Kind::Unavailable, format!("{doing}: the answer has no number")))?;
        Ok(Quota { vcpus, is_default })
    };
    let late = |_| Error::new(Kind::Unavailable, format!("{doing}: no answer within {} s", LIMIT.as_secs()));
    tokio::time::timeout(LIMIT, work).await.map_err(late)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_type_names_its_family() {
        for (instance_type, code) in [
            ("g5.xlarge", Some("L-3819A6DF")),
            ("g6e.48xlarge", Some("L-3819A6DF")),
            ("gr6.4xlarge", Some("L-3819A6DF")),
            ("vt1.3xlarge", Some("L-3819A6DF")),
            ("p4d.24xlarge", Some("L-7212CCBC")),
            ("p3dn.24xlarge", Some("L-7212CCBC")),
            ("p5.48xlarge", Some("L-C4BD4855")),
            ("p5en.48xlarge", Some("L-C4BD4855")),
            ("p6-b200.48xlarge", None),
            ("trn1.32xlarge", Some("L-6B0D517C")),
            ("trn2u.48xlarge", Some("L-6B0D517C")),
            ("inf2.xlarge", Some("L-B5D1601B")),
            ("dl1.24xlarge", Some("L-85EED4F7")),
            ("x2idn.16xlarge", Some("L-E3A00192")),
            ("m7g.large", Some("L-34B43A08")),
            ("c7i-flex.large", Some("L-34B43A08")),
            ("im4gn.large", Some("L-34B43A08")),
            ("t4g.micro", Some("L-34B43A08")),
            ("u-6tb1.metal", None),
            ("hpc7a.96xlarge", None),
            ("mac2.metal", None),
            ("5.xlarge", None),
            ("", None),
        ] {
            assert_eq!(family(instance_type).map(|family| family.spot), code, "{instance_type}");
        }
    }

    #[test]
    fn a_size_names_its_vcpus() {
        for (instance_type, count) in [
            ("g5.xlarge", Some(4)),
            ("g5.12xlarge", Some(48)),
            ("g6e.48xlarge", Some(192)),
            ("p3.2xlarge", Some(8)),
            ("p4d.24xlarge", Some(96)),
            ("p5.48xlarge", Some(192)),
            ("trn1.32xlarge", Some(128)),
            ("inf1.6xlarge", Some(24)),
            ("c7i.metal-24xl", Some(96)),
            ("m7g.large", Some(2)),
            ("g4dn.metal", Some(96)),
            ("c4.8xlarge", Some(36)),
            ("c7g.metal", None),
            ("t3.medium", None),
            ("m2.xlarge", None),
            ("g5.0xlarge", None),
            ("g5.-1xlarge", None),
            ("g5.99999999999xlarge", None),
            ("xlarge", None),
            ("", None),
        ] {
            assert_eq!(vcpus(instance_type), count, "{instance_type}");
        }
    }
}
