//! Quotas of Google Cloud and Azure, as their own command-line tools tell them: those programs know how to log in. A
//! tool that is missing, or that fails, leaves the quota unchecked, and the line says so by name.

use std::{process::Stdio, time::Duration};

use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use tokio::process::Command;

use super::{account::Machines, verdict::Line};
use crate::error::Kind;

const GPUS: &str = "gcp gpu quota";
const LOW_PRIORITY: &str = "azure spot quota";
/// Both tools take seconds to start.
const PATIENCE: Duration = Duration::from_secs(25);
/// The most of an answer that is read.
const LARGEST: usize = 4 << 20;

/// The lines about the clouds that are named.
pub(super) async fn look(wanted: &Machines) -> Vec<Line> {
    let google = async {
        let project = wanted.gcp_project.as_deref()?;
        let arguments = ["compute", "project-info", "describe", "--project", project, "--format", "json"];
        Some(match ask::<Project>("gcloud", &arguments).await {
            Ok(project) => gpus(&project, wanted.count),
            Err(why) => unchecked(GPUS, &why, "IAM & Admin, Quotas: GPUs (all regions)"),
        })
    };
    let azure = async {
        let location = wanted.azure_location.as_deref()?;
        let arguments = ["vm", "list-usage", "--location", location, "--output", "json"];
        Some(match ask::<Vec<Usage>>("az", &arguments).await {
            Ok(usages) => low_priority(&usages, location),
            Err(why) => unchecked(LOW_PRIORITY, &why, "Quotas, Compute: Total Regional Low-priority vCPUs"),
        })
    };
    let (google, azure) = tokio::join!(google, azure);
    google.into_iter().chain(azure).collect()
}

fn unchecked(check: &'static str, why: &str, place: &str) -> Line {
    Line::warn(check, format!("not checked: {why}"), format!("look in the console: {place}"))
}

/// The answer of a tool, or why there is none.
async fn ask<A: DeserializeOwned>(tool: &str, arguments: &[&str]) -> Result<A, String> {
    let mut command = Command::new(tool);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = match tokio::time::timeout(PATIENCE, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(format!("{tool} is not installed"));
        }
        Ok(Err(error)) => return Err(format!("{tool} does not start: {error}")),
        Err(_) => return Err(format!("{tool} does not answer within {} s", PATIENCE.as_secs())),
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it says nothing");
        return Err(format!("{tool} failed: {}", last.chars().take(300).collect::<String>()));
    }
    if output.stdout.len() > LARGEST {
        return Err(format!("{tool} answered {} bytes", output.stdout.len()));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| format!("the answer of {tool} is not understood: {error}"))
}

/// A project of Google Cloud (<https://cloud.google.com/compute/docs/reference/rest/v1/projects>).
#[derive(Debug, Deserialize)]
struct Project {
    #[serde(default)]
    quotas: Vec<Quota>,
}

#[derive(Debug, Deserialize)]
struct Quota {
    metric: String,
    limit: f64,
    #[serde(default)]
    usage: f64,
}

/// Whether `count` machines of one GPU each fit into what the project may have over all regions; new projects may have
/// none.
fn gpus(project: &Project, count: u32) -> Line {
    let Some(quota) = project.quotas.iter().find(|quota| quota.metric == "GPUS_ALL_REGIONS") else {
        return unchecked(GPUS, "the project has no GPUS_ALL_REGIONS", "IAM & Admin, Quotas: GPUs (all regions)");
    };
    let Quota { limit, usage, .. } = quota;
    let found = format!("{limit} GPUs in all regions together, {usage} of them in use");
    if limit - usage >= f64::from(count) {
        return Line::ok(GPUS, found);
    }
    let todo = "request more: IAM & Admin, Quotas, \"GPUs (all regions)\"; the region's quota of preemptible GPUs of \
                the type counts, too";
    Line::fail(GPUS, Kind::Config, format!("{found}; {count} are wanted"), todo)
}

/// One usage of Azure (<https://learn.microsoft.com/rest/api/compute/usage/list>); its tool writes numbers as text.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Usage {
    name: UsageName,
    #[serde(deserialize_with = "number")]
    current_value: f64,
    #[serde(deserialize_with = "number")]
    limit: f64,
}

#[derive(Debug, Deserialize)]
struct UsageName {
    value: String,
}

fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Number(f64),
        Text(String),
    }
    match Written::deserialize(deserializer)? {
        Written::Number(number) => Ok(number),
        Written::Text(text) => text.parse().map_err(serde::de::Error::custom),
    }
}

/// Whether spot machines have any vCPUs left in the region. How many a type needs is not known here.
fn low_priority(usages: &[Usage], location: &str) -> Line {
    let Some(usage) = usages.iter().find(|usage| usage.name.value == "lowPriorityCores") else {
        let why = format!("{location} tells no lowPriorityCores");
        return unchecked(LOW_PRIORITY, &why, "Quotas, Compute: Total Regional Low-priority vCPUs");
    };
    let Usage { current_value, limit, .. } = usage;
    let found = format!("{limit} low-priority vCPUs in {location}, {current_value} of them in use");
    if limit > current_value {
        return Line::ok(LOW_PRIORITY, found);
    }
    let todo = "request more: Quotas, Compute, \"Total Regional Low-priority vCPUs\" of that region";
    Line::fail(LOW_PRIORITY, Kind::Config, found, todo)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::verdict::Verdict;

    #[test]
    fn gpus_of_all_regions_are_compared_with_what_is_wanted() {
        let project = |quotas: &str| serde_json::from_str::<Project>(&format!(r#"{{"name":"p",{quotas}}}"#)).unwrap();
        let of = |limit: u32, usage: u32| {
            let gpus = format!(r#"{{"limit":{limit}.0,"metric":"GPUS_ALL_REGIONS","usage":{usage}.0}}"#);
            project(&format!(r#""quotas":[{{"limit":1000.0,"metric":"SNAPSHOTS","usage":0.0}},{gpus}]"#))
        };
        for (limit, usage, count, verdict) in
            [(0, 0, 1, Verdict::Fail), (1, 0, 1, Verdict::Ok), (4, 3, 2, Verdict::Fail), (4, 2, 2, Verdict::Ok)]
        {
            assert_eq!(gpus(&of(limit, usage), count).verdict, verdict, "{limit} {usage} {count}");
        }
        let line = gpus(&project(r#""quotas":[]"#), 1);
        assert!(line.verdict == Verdict::Warn && line.found.starts_with("not checked"), "{line:?}");
    }

    #[test]
    fn low_priority_cores_are_numbers_or_text() {
        let usages = |current: &str, limit: &str| {
            let text = format!(
                r#"[{{"currentValue":"0","limit":"100","name":{{"localizedValue":"x","value":"cores"}}}},
                    {{"currentValue":{current},"limit":{limit},"localName":"Total Regional Low-priority vCPUs",
                      "name":{{"localizedValue":"Total Regional Low-priority vCPUs","value":"lowPriorityCores"}}}}]"#
            );
            serde_json::from_str::<Vec<Usage>>(&text).unwrap()
        };
        for (current, limit, verdict) in
            [("\"0\"", "\"3\"", Verdict::Ok), ("0", "0", Verdict::Fail), ("\"8\"", "8", Verdict::Fail)]
        {
            assert_eq!(low_priority(&usages(current, limit), "westeurope").verdict, verdict, "{current} {limit}");
        }
        assert!(low_priority(&[], "westeurope").found.contains("not checked: westeurope"));
    }

    #[tokio::test]
    async fn a_tool_that_is_missing_or_fails_leaves_it_unchecked() {
        let why = ask::<Project>("no-such-tool-of-any-cloud", &[]).await.unwrap_err();
        assert_eq!(why, "no-such-tool-of-any-cloud is not installed");
        let why = ask::<Project>("sh", &["-c", "echo 'ERROR: log in' >&2; exit 1"]).await.unwrap_err();
        assert_eq!(why, "sh failed: ERROR: log in");
        let why = ask::<Project>("sh", &["-c", "echo '{'"]).await.unwrap_err();
        assert!(why.starts_with("the answer of sh is not understood"), "{why}");
        let project = ask::<Project>("sh", &["-c", r#"echo '{"quotas": []}'"#]).await.unwrap();
        assert!(project.quotas.is_empty());
    }
}
