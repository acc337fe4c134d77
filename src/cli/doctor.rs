//! `trainer doctor`

use std::{path::PathBuf, process::ExitCode};

use clap::Args;

use super::{
    args::{JsonArg, Workers, WorkersArg},
    output, run, store,
};
use crate::{
    config::{self, Machine, RunConfig, Sources},
    doctor::{self, Account, Line, Machines, Verdict, exit_code},
    error::{Error, Kind, Result},
    ids::RunId,
    report::human,
};

/// Check whether this machine, its store and its account have what a run needs
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer doctor
  trainer doctor config.toml --store s3://bucket/runs
  trainer doctor config.toml --run-id reports-2026q4     # also its saves and its nodes
  trainer doctor config.toml --gpu-memory 24GiB --nproc-per-node 8  # which micro-batch fits, under each strategy
  trainer doctor --instance-type g5.xlarge --region us-east-1 --count 3       # checks the quota
  trainer doctor --instance-type g5.xlarge --region us-east-1 --subnet subnet-1 --subnet subnet-2 \\
    --image 123456789012.dkr.ecr.us-east-1.amazonaws.com/trainer@sha256:…     # before a deployment
  trainer doctor --ami ami-0123 --region us-east-1 --reads s3://bucket/run.toml --role arn:aws:iam::1:role/x
  trainer doctor --gcp-project my-project --azure-location westeurope         # asks gcloud and az

Exit codes: 0 if nothing failed (warnings are possible), else that of the worst failure:
  69  a service does not answer, or the machine is short of something
  77  permission denied
  78  wrong configuration")]
pub struct Doctor {
    /// The configuration of a run: its store, its model's memory
    config: Option<PathBuf>,
    /// The store of the runs: s3://bucket/prefix, gs://…, az://…, file://path [default: the configuration's]
    #[arg(long, env = "TRAINER_STORE", value_name = "URI", hide_env_values = true)]
    store: Option<String>,
    /// A run whose saves are compared with the time to stop, and whose other nodes are dialled
    #[arg(long, env = "TRAINER_RUN_ID", value_name = "ID", hide_env_values = true)]
    run_id: Option<RunId>,
    #[command(flatten)]
    workers: WorkersArg,
    /// The memory of each GPU that the run is to have, such as 24GiB [default: this machine's, or the type's]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    gpu_memory: Option<u64>,
    #[command(flatten)]
    machines: MachinesArg,
    #[command(flatten)]
    json: JsonArg,
}

/// The wanted machines.
#[derive(Clone, Debug, Args)]
pub struct MachinesArg {
    /// The EC2 instance type wanted as spot machines, such as g5.xlarge [default: this machine's, if on EC2]
    #[arg(long, value_name = "TYPE", value_parser = name)]
    instance_type: Option<String>,
    /// The region they run in [default: as for AWS's tools]
    #[arg(long, value_name = "REGION", value_parser = name)]
    region: Option<String>,
    /// How many machines at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,
    /// A subnet of AWS that they are to be started in; repeatable
    #[arg(long = "subnet", value_name = "SUBNET", value_parser = name)]
    subnets: Vec<String>,
    /// The container image that they run
    #[arg(long, value_name = "IMAGE")]
    image: Option<String>,
    /// The machine image of AWS that they start from: ami-…, or the SSM parameter that names one
    #[arg(long, value_name = "AMI", value_parser = path)]
    ami: Option<String>,
    /// The URI of an object that they read at their start, such as the configuration; repeatable
    #[arg(long = "reads", value_name = "URI")]
    reads: Vec<String>,
    /// The ARN of the role with which they read it
    #[arg(long, value_name = "ARN", value_parser = arn)]
    role: Option<String>,
    /// The project on Google Cloud that they run in: gcloud is asked for its quota of GPUs
    #[arg(long, value_name = "PROJECT", value_parser = name)]
    gcp_project: Option<String>,
    /// The region of Azure that they run in: az is asked for its quota of low-priority vCPUs
    #[arg(long, value_name = "REGION", value_parser = name)]
    azure_location: Option<String>,
}

/// These become part of requests.
fn name(text: &str) -> Result<String, String> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b);
    let is_plain = (1..=64).contains(&text.len()) && text.bytes().all(plain);
    is_plain.then(|| text.to_owned()).ok_or_else(|| "expected small letters, digits, \"-\" and \".\"".into())
}

/// Bytes: a number and one of the binary units.
fn size(text: &str) -> Result<u64, String> {
    let expected = || "expected a number and MiB, GiB or TiB, such as 24GiB".to_owned();
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[number.len()..] {
        "MiB" => 1_u64 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return Err(expected()),
    };
    let number = number.trim_end().parse::<f64>().ok().filter(|number| (0.001..1e6).contains(number));
    // At most 2^60, and the fraction of a byte is of no use.
    number.map(|number| (number * unit as f64) as u64).ok_or_else(expected)
}

/// The same for longer names.
fn path(text: &str) -> Result<String, String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_./".contains(&b);
    let is_plain = (1..=900).contains(&text.len()) && text.bytes().all(plain) && !text.starts_with('-');
    is_plain.then(|| text.to_owned()).ok_or_else(|| "expected ami-…, or a parameter such as /aws/service/…".into())
}

fn arn(text: &str) -> Result<String, String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_./:+=,@".contains(&b);
    let is_role = text.starts_with("arn:aws") && text.contains(":iam::") && text.contains(":role/");
    let is_plain = is_role && text.len() <= 600 && text.bytes().all(plain);
    is_plain.then(|| text.to_owned()).ok_or_else(|| "expected arn:aws:iam::ACCOUNT:role/NAME".into())
}

impl Doctor {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let Self { store: named, run_id, workers, gpu_memory, machines, json, .. } = &self;
        let wanted = machines.clone();
        let MachinesArg { instance_type, subnets, image, ami, .. } = &wanted;
        let names_none = instance_type.is_none() && subnets.is_empty() && image.is_none() && ami.is_none();
        if wanted.region.is_some() && names_none {
            let what = "--region needs --instance-type, --subnet, --image or --ami: what is to be checked there?";
            return Err(Error::new(Kind::Usage, what));
        }
        if wanted.role.is_some() && wanted.reads.is_empty() {
            let what = "--role needs --reads: what is it to read?";
            return Err(Error::new(Kind::Usage, what));
        }
        let doctor = doctor::Doctor {
            config: self.configuration(),
            store: named.as_deref().map(store::absolute),
            run_id: run_id.clone(),
            nproc_per_node: workers.nproc_per_node.map(Workers::count),
            gpu_memory: *gpu_memory,
            machines: Machines {
                instance_type: wanted.instance_type,
                region: wanted.region,
                count: wanted.count,
                subnets: wanted.subnets,
                image: wanted.image,
                ami: wanted.ami,
                reads: wanted.reads,
                role: wanted.role,
                gcp_project: wanted.gcp_project,
                azure_location: wanted.azure_location,
            },
        };
        let lines = store::block_on(async { Ok(doctor.look().await) })?;
        let text = if json.json { output::json_lines(&lines)? } else { shown(&lines) };
        output::emit(&text)?;
        Ok(exit_code(&lines).into())
    }

    fn configuration(&self) -> Option<Result<RunConfig>> {
        let file = self.config.as_ref()?;
        let read = || {
            let flags = self.store.iter().map(|uri| ("--store or TRAINER_STORE", "store", uri.clone())).collect();
            Ok(config::load(&Sources {
                file: Some(file),
                text: None,
                flags,
                set: &[],
                working_directory: &store::working_directory()?,
                machine: Machine::detect(),
                fetch: &run::fetch,
            })?)
        };
        Some(read())
    }
}

/// Lines for people.
fn shown(lines: &[Line]) -> String {
    let plain = human::plain;
    let width = lines.iter().map(|line| line.check.len()).max().unwrap_or(0);
    let mut text = String::new();
    for line in lines {
        let word = match line.verdict {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
            Verdict::Skipped => "-",
        };
        text.push_str(&format!("{word:<5} {:<width$}  {}\n", line.check, plain(&line.found)));
        if let Some(todo) = &line.todo {
            text.push_str(&format!("{:<5} {:<width$}  → {}\n", "", "", plain(todo)));
        }
        if let Some(account) = line.memory.as_ref().filter(|account| !account.strategies.is_empty()) {
            for row in table(account) {
                text.push_str(&format!("{:<5} {:<width$}  {row}\n", "", ""));
            }
        }
    }
    text
}

/// What a worker needs under each strategy: a line of names, and one of figures for each.
fn table(account: &Account) -> Vec<String> {
    let head =
        ["a worker's", "weights", "moments", "gradients", "gathered", "activations", "loss, work", "all", "fits"];
    let mut rows = vec![head.map(str::to_owned)];
    for row in &account.strategies {
        let terms = &row.forecast.terms;
        let strategy = match (account.workers, row.is_chosen) {
            (0 | 1, _) => "alone".to_owned(),
            (_, true) => format!("{} *", doctor::strategy_name(row.strategy)),
            (_, false) => doctor::strategy_name(row.strategy).to_owned(),
        };
        let figures = [
            terms.weights + terms.masters,
            terms.moments,
            terms.gradients,
            terms.rooms + terms.exchanges,
            terms.activations + terms.constants,
            terms.loss + terms.work,
            row.forecast.bytes,
        ];
        let [a, b, c, d, e, f, all] = figures.map(human::bytes);
        rows.push([strategy, a, b, c, d, e, f, all, row.largest_micro_batch.to_string()]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |row: &[String; 9]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_has_a_binary_unit() {
        assert_eq!(size("24GiB"), Ok(24 << 30));
        assert_eq!(size("22.5 GiB"), Ok(45 << 29));
        assert_eq!(size("500MiB"), Ok(500 << 20));
        assert_eq!(size("1TiB"), Ok(1 << 40));
        for wrong in ["24", "24GB", "GiB", "-1GiB", "0GiB", "nanGiB", "infGiB", "1e9TiB", ""] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
