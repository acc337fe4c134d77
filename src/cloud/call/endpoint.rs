//! The URL of a service in a region.
//!
//! An endpoint of the configuration wins; else the name is made by the rules that AWS publishes with its SDKs
//! (`partitions.json`, and the endpoint rules of each service, which are the same for all services here): the region's
//! prefix names its partition, and a partition has one suffix for IPv4 and one for both. Pure functions.

/// The suffixes of one partition.
struct Partition {
    /// How its regions begin.
    prefix: &'static str,
    plain: &'static str,
    dual_stack: &'static str,
}

/// All partitions but the first one, to which every other region belongs.
const PARTITIONS: [Partition; 7] = [
    Partition { prefix: "cn-", plain: "amazonaws.com.cn", dual_stack: "api.amazonwebservices.com.cn" },
    Partition { prefix: "us-gov-", plain: "amazonaws.com", dual_stack: "api.aws" },
    Partition { prefix: "eusc-", plain: "amazonaws.eu", dual_stack: "api.amazonwebservices.eu" },
    Partition { prefix: "us-iso-", plain: "c2s.ic.gov", dual_stack: "api.aws.ic.gov" },
    Partition { prefix: "us-isob-", plain: "sc2s.sgov.gov", dual_stack: "api.aws.scloud" },
    Partition { prefix: "eu-isoe-", plain: "cloud.adc-e.uk", dual_stack: "api.cloud-aws.adc-e.uk" },
    Partition { prefix: "us-isof-", plain: "csp.hci.ic.gov", dual_stack: "api.aws.hci.ic.gov" },
];
const COMMERCIAL: Partition = Partition { prefix: "", plain: "amazonaws.com", dual_stack: "api.aws" };

/// Services with one endpoint for a whole partition, by the region that they sign with; elsewhere the rule holds for
/// them, too (AWS General Reference, "IAM endpoints and quotas").
const GLOBAL: [((&str, &str), &str); 2] = [
    (("iam", "us-east-1"), "https://iam.amazonaws.com"),
    (("iam", "us-gov-west-1"), "https://iam.us-gov.amazonaws.com"),
];

/// What a configuration says about endpoints.
#[derive(Clone, Debug, Default)]
pub(super) struct Wanted {
    pub region: Option<String>,
    /// The endpoint that the configuration names.
    pub url: Option<String>,
    pub fips: bool,
    pub dual_stack: bool,
}

/// The URL of the service whose host names begin with `name`.
///
/// # Errors
/// With the reason, when the configuration contradicts itself or has no region.
pub(super) fn url(name: &str, wanted: &Wanted) -> Result<String, &'static str> {
    if let Some(url) = &wanted.url {
        return match (wanted.fips, wanted.dual_stack) {
            (true, _) => Err("Invalid Configuration: FIPS and custom endpoint are not supported"),
            (_, true) => Err("Invalid Configuration: Dualstack and custom endpoint are not supported"),
            (false, false) => Ok(url.clone()),
        };
    }
    let Some(region) = wanted.region.as_deref() else { return Err("Invalid Configuration: Missing Region") };
    // It becomes part of a host name, to which a signed request goes.
    if !region.split('.').all(is_label) {
        return Err("Invalid Configuration: the region is no part of a host name");
    }
    if let Some((_, url)) = GLOBAL.iter().find(|(of, _)| *of == (name, region)) {
        return Ok((*url).to_owned());
    }
    let partition = PARTITIONS.iter().find(|partition| region.starts_with(partition.prefix)).unwrap_or(&COMMERCIAL);
    let suffix = if wanted.dual_stack { partition.dual_stack } else { partition.plain };
    // The plain endpoints of GovCloud are those with FIPS.
    let fips = if wanted.fips && (wanted.dual_stack || partition.prefix != "us-gov-") { "-fips" } else { "" };
    Ok(format!("https://{name}{fips}.{region}.{suffix}"))
}

fn is_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && !text.starts_with('-')
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(name: &str, region: &str, fips: bool, dual_stack: bool) -> String {
        url(name, &Wanted { region: Some(region.to_owned()), url: None, fips, dual_stack }).unwrap()
    }

    #[test]
    fn a_region_names_its_endpoint() {
        // From the tests of AWS's endpoint rules.
        for (name, region, fips, dual_stack, expected) in [
            ("ssm", "eu-central-1", false, false, "https://ssm.eu-central-1.amazonaws.com"),
            ("ssm", "ca-central-1", true, false, "https://ssm-fips.ca-central-1.amazonaws.com"),
            ("ssm", "us-east-1", true, true, "https://ssm-fips.us-east-1.api.aws"),
            ("ssm", "us-east-1", false, true, "https://ssm.us-east-1.api.aws"),
            ("servicequotas", "cn-north-1", false, false, "https://servicequotas.cn-north-1.amazonaws.com.cn"),
            ("ssm", "cn-north-1", true, true, "https://ssm-fips.cn-north-1.api.amazonwebservices.com.cn"),
            ("ssm", "cn-north-1", true, false, "https://ssm-fips.cn-north-1.amazonaws.com.cn"),
            ("autoscaling", "us-gov-east-1", false, false, "https://autoscaling.us-gov-east-1.amazonaws.com"),
            ("autoscaling", "us-gov-east-1", true, false, "https://autoscaling.us-gov-east-1.amazonaws.com"),
            ("autoscaling", "us-gov-east-1", true, true, "https://autoscaling-fips.us-gov-east-1.api.aws"),
            ("autoscaling", "us-gov-east-1", false, true, "https://autoscaling.us-gov-east-1.api.aws"),
            ("ssm", "us-iso-east-1", false, false, "https://ssm.us-iso-east-1.c2s.ic.gov"),
            ("ssm", "us-isob-east-1", true, false, "https://ssm-fips.us-isob-east-1.sc2s.sgov.gov"),
            ("ssm", "us-isof-south-1", false, false, "https://ssm.us-isof-south-1.csp.hci.ic.gov"),
            ("ssm", "eu-isoe-west-1", false, false, "https://ssm.eu-isoe-west-1.cloud.adc-e.uk"),
            ("ssm", "eusc-de-east-1", false, false, "https://ssm.eusc-de-east-1.amazonaws.eu"),
            ("ssm", "of-tomorrow-1", false, false, "https://ssm.of-tomorrow-1.amazonaws.com"),
            ("iam", "us-east-1", false, false, "https://iam.amazonaws.com"),
            ("iam", "us-gov-west-1", false, false, "https://iam.us-gov.amazonaws.com"),
            ("iam", "cn-north-1", false, false, "https://iam.cn-north-1.amazonaws.com.cn"),
        ] {
            assert_eq!(made(name, region, fips, dual_stack), expected);
        }
    }

    #[test]
    fn a_contradiction_is_no_endpoint() {
        let here = || Wanted { url: Some("http://127.0.0.1:1".into()), ..Wanted::default() };
        assert_eq!(url("ssm", &here()).unwrap(), "http://127.0.0.1:1");
        assert!(url("ssm", &Wanted { fips: true, ..here() }).unwrap_err().contains("FIPS"));
        assert!(url("ssm", &Wanted { dual_stack: true, ..here() }).unwrap_err().contains("Dualstack"));
        assert!(url("ssm", &Wanted::default()).unwrap_err().contains("Missing Region"));
        for region in ["", "a b", "x/evil.example#", "-a", "a..b", "a@b", &"a".repeat(64)] {
            let wanted = Wanted { region: Some(region.to_owned()), ..Wanted::default() };
            assert!(url("ssm", &wanted).unwrap_err().contains("region"), "{region:?}");
        }
    }
}
