//! How many vCPUs of spot machines an account may have in a region at once, by family of instance types.
//!
//! "Max spot instance count exceeded" is the first thing that many new accounts hear: their quota for GPU machines is 0. Quotas are
//! counted in vCPUs, per region, for all machines of a family together, and open requests count too (EC2 user guide, "Spot
//! Instance quotas"). Only asked for, never changed.

use std::time::Duration;

use aws_sdk_servicequotas::Client;

use super::aws;
use crate::error::{Error, Kind, Result};

/// For the question with all of the SDK's retries.
const LIMIT: Duration = Duration::from_secs(15);

/// A family of instance types that share a quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family {
    /// What AWS calls it.
    pub name: &'static str,
    /// The code of its quota for spot machines.
    pub spot: &'static str,
}

/// The family of an instance type such as `g5.xlarge`; `None`: it is not known here.
pub fn family(instance_type: &str) -> Option<Family> {
    let (class, _) = instance_type.split_once('.')?;
    let letters: String = class.chars().take_while(char::is_ascii_lowercase).collect();
    let (name, spot) = match letters.as_str() {
        "g" | "gr" | "vt" => ("G and VT", "L-3819A6DF"),
        "p" => ("P", "L-7212CCBC"),
        "trn" => ("Trn", "L-5480EFD2"),
        "inf" => ("Inf", "L-B5D1601B"),
        "dl" => ("DL", "L-85EED4F7"),
        "f" => ("F", "L-88CF9481"),
        "x" => ("X", "L-E3A00192"),
        // A, C, D, H, I, M, R, T, Z: "Standard", in all their spellings.
        other if "acdhimrtz".contains(other.chars().next()?) && other != "hpc" && other != "mac" => {
            ("Standard", "L-34B43A08")
        }
        _ => return None,
    };
    Some(Family { name, spot })
}

/// The quota of a code, vCPUs.
pub async fn vcpus(region: &str, code: &str) -> Result<f64> {
    let client = Client::new(&aws::config_in(region).await);
    let call = client.get_service_quota().service_code("ec2").quota_code(code).send();
    let doing = format!("read quota {code} of EC2 in {region}");
    match tokio::time::timeout(LIMIT, call).await {
        Ok(answer) => {
            let answer = answer.map_err(|error| aws::explain(error, &doing))?;
            let value =
                answer.quota().and_then(|quota| quota.value()).filter(|value| value.is_finite() && *value >= 0.0);
            value.ok_or_else(|| Error::new(Kind::Unavailable, format!("{doing}: the answer has no number")))
        }
        Err(_) => Err(Error::new(Kind::Unavailable, format!("{doing}: no answer within {} s", LIMIT.as_secs()))),
    }
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
            ("p5en.48xlarge", Some("L-7212CCBC")),
            ("trn1.32xlarge", Some("L-5480EFD2")),
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
}
