//! Each file on its own: its opening, its secrets, its linters and schemas.
use std::{path::Path, process::Command};

use serde_json::Value;

use super::{all, path, python, said, text, tool, yaml};
use crate::support::{lab::scratch, moto};

/// The files that do not open with a comment about their cost. Grafana's says so in its description.
const PLAIN: [&str; 3] = ["README.md", "container/Containerfile.dockerignore", "grafana.json"];

#[test]
fn each_file_opens_with_what_it_costs_and_how_it_is_removed() {
    for name in all().iter().filter(|name| !PLAIN.contains(&name.as_str())) {
        let text = text(name);
        let opening: String =
            text.lines().take_while(|line| line.starts_with('#')).flat_map(|line| [line, "\n"]).collect();
        let opening = opening.to_lowercase();
        for word in ["cost", "removal"] {
            assert!(
                opening.contains(word),
                "the opening comment of userdata/{name} says nothing about {word}:\n{opening}"
            );
        }
        let percent = opening
            .match_indices('%')
            .any(|(at, _)| opening[..at].trim_end().ends_with(|last: char| last.is_ascii_digit()));
        assert!(!percent, "a saving without its inputs in userdata/{name}");
    }
    let dashboard: Value = serde_json::from_str(&text("grafana.json")).expect("JSON");
    let description = dashboard["description"].as_str().expect("a description");
    assert!(description.contains("costs nothing") && description.contains("removal"), "{description}");
}

#[test]
fn the_table_names_each_file_and_no_other() {
    let table = text("README.md");
    for name in all() {
        assert!(name == "README.md" || table.contains(&format!("({name})")), "userdata/README.md does not link {name}");
    }
    for link in table.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link) {
        let heading = link.strip_prefix('#').map(|heading| format!("\n## {}\n", heading.replace('-', " ")));
        let is_there = heading.map_or_else(|| path(link).exists(), |heading| table.to_lowercase().contains(&heading));
        assert!(link.contains("://") || is_there, "userdata/README.md links {link}, which is not there");
    }
}

/// Texts that look like secrets: AWS keys, private keys, tokens of GitHub and Slack, JSON web tokens, written
/// passwords.
fn secret_in(text: &str) -> Option<&str> {
    let long = |rest: &str, least: usize| {
        rest.bytes().take_while(|byte| byte.is_ascii_alphanumeric() || b"_-+/=.".contains(byte)).count() >= least
    };
    let marks = [
        ("AKIA", 16),
        ("ASIA", 16),
        ("ghp_", 30),
        ("github_pat_", 30),
        ("xoxb-", 20),
        ("eyJ", 40),
        ("X-Amz-Signature=", 1),
    ];
    for (mark, least) in marks {
        for (at, _) in text.match_indices(mark) {
            if long(&text[at + mark.len()..], least) {
                return Some(&text[at..(at + mark.len() + 4).min(text.len())]);
            }
        }
    }
    let lower = text.to_ascii_lowercase();
    for mark in ["-----begin", "worker_token=", "password=", "secret_access_key=", "secretaccesskey="] {
        for (at, _) in lower.match_indices(mark) {
            // An empty value, a variable or a placeholder is not a secret.
            let rest = text[at + mark.len()..].trim_start_matches(['"', '\'']);
            if !rest.starts_with(['$', '<', '…', '\n', '%']) && !rest.is_empty() {
                return text.get(at..at + mark.len());
            }
        }
    }
    None
}

#[test]
fn no_file_holds_a_secret() {
    for planted in [
        "id=AKIAIOSFODNN7EXAMPLE",
        "-----BEGIN RSA PRIVATE KEY-----",
        "WORKER_TOKEN=hunter2",
        "https://b/k?X-Amz-Signature=ab",
    ] {
        assert!(secret_in(planted).is_some(), "{planted}");
    }
    assert_eq!(secret_in("WORKER_TOKEN=\"$token\""), None);
    for name in all() {
        let text = text(&name);
        assert_eq!(secret_in(&text), None, "userdata/{name}");
    }
}

#[test]
fn shell_scripts_pass_shellcheck() {
    let Some(mut shellcheck) = tool("shellcheck") else { return };
    let scripts: Vec<_> = all().into_iter().filter(|name| text(name).starts_with("#!/usr/bin/env bash")).collect();
    assert!(scripts.len() >= 6, "{scripts:?}");
    // Scripts inside cloud-config, too, once its settings are inserted.
    for kind in ["aws", "azure"] {
        let Some(config) = yaml(&text(&format!("{kind}/cloud-init.yaml"))) else { return };
        let inner = scratch().join(format!("{kind}-trainer-machine"));
        std::fs::write(&inner, script_of(&config[0], "/usr/local/sbin/trainer-machine")).expect("write a script");
        shellcheck.arg(&inner);
    }
    let output = shellcheck.args(scripts.iter().map(|name| path(name))).output().expect("start shellcheck");
    assert!(output.status.success(), "{}", said(&output));
}

pub fn script_of(cloud_config: &Value, file: &str) -> String {
    let files = cloud_config["write_files"].as_array().expect("write_files");
    let entry = files.iter().find(|entry| entry["path"] == file).unwrap_or_else(|| panic!("no {file} is written"));
    let mut content = entry["content"].as_str().expect("its content").to_owned();
    for (mark, value) in [
        ("@IMAGE@", "registry/image"),
        ("@STORE@", "az://container/runs"),
        ("@ACCOUNT@", "account"),
        ("@RUN_ID@", "reports"),
        ("@CLIENT@", "client"),
    ] {
        content = content.replace(mark, value);
    }
    content
}

#[test]
fn the_container_file_passes_hadolint_and_names_its_stop_signal() {
    let file = text("container/Containerfile");
    for line in [
        "STOPSIGNAL SIGTERM",
        "ENTRYPOINT [\"/opt/trainer/trainer\"]",
        "USER 65532:65532",
        "ENV XDG_CACHE_HOME=/tmp/cache",
    ] {
        assert!(file.lines().any(|found| found == line), "{line}");
    }
    let last = file.rsplit("\nFROM ").next().expect("the last stage");
    assert!(!last.contains("python"), "Python in the image");
    assert!(last.contains(" tzdata "), "a time zone has no meaning without its rules");
    let rust = std::fs::read_to_string(path("../Cargo.toml")).expect("Cargo.toml");
    let rust =
        rust.lines().find_map(|line| line.strip_prefix("rust-version = ")).expect("rust-version").trim_matches('"');
    assert!(file.contains(&format!("ARG RUST_VERSION={rust}\n")), "the image is built with another Rust than {rust}");
    let Some(mut hadolint) = tool("hadolint") else { return };
    let output = hadolint.arg(path("container/Containerfile")).output().expect("start hadolint");
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn the_bundle_runs_without_the_build_tree() {
    let folder = scratch().join("bundle");
    let libtorch = std::env::var("LIBTORCH").unwrap_or_else(|_| ".libtorch".into());
    let libtorch = Path::new(env!("CARGO_MANIFEST_DIR")).join(libtorch);
    for _twice in 0..2 {
        let output = Command::new(path("container/bundle"))
            .args([Path::new(env!("CARGO_BIN_EXE_trainer")), &libtorch, &folder])
            .output()
            .expect("start bundle");
        assert!(output.status.success(), "{}", said(&output));
    }
    let program = folder.join("trainer");
    let output = Command::new(&program).arg("--version").env_clear().output().expect("start the bundled program");
    assert!(output.status.success(), "{}", said(&output));
    let output =
        Command::new("ldd").arg(&program).env("LD_LIBRARY_PATH", folder.join("lib")).output().expect("start ldd");
    let libraries = said(&output);
    assert!(!libraries.contains("not found"), "{libraries}");
    for line in libraries.lines().filter_map(|line| line.split_once(" => ")).map(|(_, path)| path) {
        let of_the_system = ["/lib/", "/usr/lib/", "/lib64/"].iter().any(|place| line.starts_with(place));
        assert!(
            of_the_system || line.starts_with(folder.to_str().expect("a plain path")),
            "from the build tree: {line}"
        );
    }
    let names = std::fs::read_dir(folder.join("lib")).expect("lib").map(|entry| entry.expect("a library").file_name());
    let names: Vec<_> = names.map(|name| name.to_string_lossy().into_owned()).collect();
    assert!(names.iter().any(|name| name == "libtorch_cpu.so") && !names.iter().any(|name| name.contains("python")));
    std::fs::remove_dir_all(&folder).expect("remove half a gigabyte");
    let output =
        Command::new(path("container/bundle")).args(["/none", "/none", "/none"]).output().expect("start bundle");
    assert!(said(&output).contains("there is no /none") && output.status.code() == Some(66), "{}", said(&output));
}

/// systemd's verdict on units, including those inside scripts and cloud-config.
#[test]
fn systemd_accepts_each_unit() {
    let verify = |name: &str, unit: &str| {
        let file = scratch().join(name);
        std::fs::write(&file, unit).expect("write a unit");
        let output = Command::new("systemd-analyze").arg("verify").arg(&file).output().ok()?;
        Some(said(&output))
    };
    let mut units = vec![
        ("trainer.service", text("systemd/trainer.service")),
        ("trainer-work.service", text("systemd/trainer-work.service")),
    ];
    for script in ["aws/user-data.sh", "gcp/startup.sh"] {
        let text = text(script);
        let unit = text.split_once("\n[Unit]\n").expect("a unit").1.split_once("\nUNIT\n").expect("its end").0;
        units.push(("trainer.service", format!("[Unit]\n{unit}\n").replace("$me", "/bin/true")));
    }
    for name in ["aws/cloud-init.yaml", "azure/cloud-init.yaml"] {
        let Some(config) = yaml(&text(name)) else { return };
        units.push(("trainer.service", script_of(&config[0], "/etc/systemd/system/trainer.service")));
    }
    for (name, unit) in &units {
        // A service that may write nowhere still needs a place for datasets.
        let cache = unit.contains("\nCacheDirectory=trainer\n") && unit.contains("XDG_CACHE_HOME=/var/cache/trainer");
        assert!(cache || !unit.contains("ProtectSystem=strict"), "{unit}");
        for (key, value) in
            [("RestartForceExitStatus", "69 75 76 79"), ("RestartPreventExitStatus", "64 65 77 78 80 81")]
        {
            assert!(unit.lines().any(|line| line == format!("{key}={value}")), "{key} of\n{unit}");
        }
        // If systemd gave up a unit, its machine would be paid for without working.
        assert!(unit.contains("\nStartLimitIntervalSec=0\n"), "{unit}");
        assert!(unit.contains("KillMode=mixed") && unit.contains("Restart=on-failure"), "{unit}");
        // A container that has ended by itself is gone. If stopping it failed for that, a completed run would start
        // again.
        for stop in unit.lines().filter_map(|line| line.strip_prefix("ExecStop=")) {
            assert!(stop.starts_with("-/usr/bin/docker stop ") || stop == "/bin/true stop", "{stop}");
        }
        // A consumer that exits with 0 when the queue is empty is not there for the next job.
        assert!(*name != "trainer-work.service" || unit.contains(" work --json --idle-exit never\n"), "{unit}");
        let Some(said) = verify(name, unit) else {
            println!("skipped: there is no systemd-analyze here");
            return;
        };
        // The unit is not at fault if the program is not installed here.
        for word in ["Unknown", "Failed to parse", "Invalid", "ignoring"] {
            assert!(!said.contains(word), "{said}\n{unit}");
        }
    }
    let wrong =
        verify("wrong.service", "[Service]\nExecStart=/bin/true\nTimeoutStopSecs=1\n").expect("systemd-analyze");
    assert!(wrong.contains("Unknown"), "systemd-analyze would not say it: {wrong}");
}

#[test]
fn cloud_config_follows_its_schema() {
    const CHECK: &str = r#"
import json, sys, jsonschema, yaml
schema = json.load(open(sys.argv[1]))
config = yaml.safe_load(sys.argv[2])
# The schema of older versions lets unknown keys at the top pass.
known = set(schema.get("properties", {}))
for part in schema.get("allOf", []):
    known |= set(schema["$defs"][part["$ref"].rsplit("/", 1)[-1]].get("properties", {}))
unknown = set(config) - known
if unknown: sys.exit("unknown keys: " + ", ".join(sorted(unknown)))
jsonschema.validate(config, schema)
"#;
    let Some(tools) = moto::tools() else { return };
    let schema = tools.join("cloud-init/schema-cloud-config-v1.json");
    if !schema.is_file() {
        println!("skipped: cloud-init's schema is not installed; scripts/test takes it from Debian's package");
        return;
    }
    let check =
        |text: &str| python(CHECK, &[schema.to_str().expect("a plain path"), text]).expect("the tools are there");
    for name in ["aws/cloud-init.yaml", "azure/cloud-init.yaml"] {
        let text = text(name);
        assert!(text.starts_with("#cloud-config\n"), "{name}");
        let output = check(&text);
        assert!(output.status.success(), "{name}: {}", said(&output));
    }
    for wrong in ["runcmdd: []\n", "write_files:\n  - pth: /a\n", "runcmd: 7\n"] {
        assert!(!check(wrong).status.success(), "{wrong} passes");
    }
}

#[test]
fn kubernetes_files_follow_their_schemas() {
    // Core objects: the API's own schemas, strictly. JobSet and TrainJob: the models that Kubeflow publishes; a field
    // that is lost on a round trip is unknown to them.
    const CHECK: &str = r#"
import sys, yaml
from kubernetes_validate import utils
import kubeflow_trainer_api.models as models
kinds = {"JobSet": models.JobsetV1alpha2JobSet, "TrainJob": models.TrainerV1alpha1TrainJob,
         "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime}
def lost(given, kept, where):
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(kept, dict) or key not in kept: sys.exit(f"unknown field {where}.{key}")
            lost(value, kept[key], f"{where}.{key}")
    elif isinstance(given, list):
        for n, (a, b) in enumerate(zip(given, kept)): lost(a, b, f"{where}[{n}]")
for document in yaml.safe_load_all(sys.argv[1]):
    kind = document["kind"]
    if kind in kinds: lost(document, kinds[kind].from_dict(document).to_dict(), kind)
    else: utils.validate(document, "1.33", strict=True)
"#;
    for (name, wrong) in [
        ("kubernetes/job.yaml", ("podReplacementPolicy", "podReplacmentPolicy")),
        ("kubernetes/jobset.yaml", ("enableDNSHostnames", "enableDNSHostname")),
        ("kubernetes/jobset.yaml", ("policyTypes", "policyType")),
        ("kubernetes/trainjob.yaml", ("resourcesPerNode", "resourcePerNode")),
    ] {
        let text = text(name);
        let Some(output) = python(CHECK, &[&text]) else { return };
        assert!(output.status.success(), "{name}: {}", said(&output));
        let output = python(CHECK, &[&text.replace(wrong.0, wrong.1)]).expect("the tools are there");
        assert!(!output.status.success(), "{name}: the schema does not know {} from {}", wrong.0, wrong.1);
        for document in yaml(&text).expect("the tools are there") {
            expect_job_rules(name, &document);
        }
    }
}

/// Rules that no schema has: the effect of each exit code, and that the grace period is longer than the stop window.
fn expect_job_rules(name: &str, document: &Value) {
    match document {
        Value::Object(fields) => {
            if let Some(rules) = fields.get("podFailurePolicy") {
                let codes = rules.to_string();
                for code in [64, 65, 69, 75, 76, 77, 78, 80, 81] {
                    assert!(codes.contains(&code.to_string()), "{name}: no rule for exit code {code}: {codes}");
                }
                assert!(!codes.contains("79") && !codes.contains("[0"), "{name}: {codes}");
                assert_eq!(fields["template"]["spec"]["restartPolicy"], "Never", "{name}: podFailurePolicy needs it");
                assert_eq!(fields["podReplacementPolicy"], "Failed", "{name}");
            }
            if let Some(containers) = fields.get("containers").and_then(Value::as_array) {
                let grace = fields["terminationGracePeriodSeconds"].as_u64().expect("a grace period");
                let window = containers[0]["env"]
                    .as_array()
                    .expect("env")
                    .iter()
                    .find(|one| one["name"] == "TRAINER_STOP_WINDOW");
                let window = window.and_then(|one| one["value"].as_str()?.strip_suffix('s')?.parse().ok());
                assert!(window.is_some_and(|window: u64| window < grace), "{name}: {window:?} in {grace} s");
            }
            if let Some(Value::String(action)) = fields.get("action") {
                let known = ["Ignore", "Count", "FailJob", "RestartJobSetAndIgnoreMaxRestarts", "FailJobSet"];
                assert!(known.contains(&action.as_str()), "{name}: {action}");
            }
            fields.values().for_each(|value| expect_job_rules(name, value));
        }
        Value::Array(items) => items.iter().for_each(|value| expect_job_rules(name, value)),
        _ => {}
    }
}

#[test]
fn the_skypilot_task_recovers_on_the_codes_that_ask_for_it() {
    let Some(task) = yaml(&text("skypilot/task.yaml")) else { return };
    let keys: Vec<_> = task[0].as_object().expect("a mapping").keys().collect();
    assert_eq!(keys, ["envs", "file_mounts", "name", "resources", "run", "setup"]);
    // Fetched with SkyPilot's credentials at each recovery; the machine of another cloud would have none for the store.
    assert_eq!(task[0]["resources"]["infra"], "aws");
    let bundle = task[0]["file_mounts"]["~/trainer.tar.gz"].as_str();
    assert!(bundle.is_some_and(|bundle| bundle.starts_with("s3://")), "{bundle:?}");
    let commands = format!("{}{}", task[0]["setup"], task[0]["run"]);
    assert!(!commands.contains("curl") && !commands.contains("_URL"), "{commands}");
    // The bundle needs glibc 2.36.
    assert_eq!(task[0]["resources"]["image_id"], "docker:ubuntu:24.04");
    let recovery = &task[0]["resources"]["job_recovery"];
    assert_eq!(recovery["recover_on_exit_codes"], serde_json::json!([69, 75, 76]));
    assert_eq!(recovery["strategy"], "EAGER_NEXT_REGION");
    // Otherwise a machine looks for the bucket in its own region, and the next machine is in another one.
    let store = task[0]["envs"]["TRAINER_STORE"].as_str();
    assert!(store.is_some_and(|store| store.starts_with("s3://")) && task[0]["envs"]["AWS_REGION"].is_string());
    assert_eq!(task[0]["resources"]["use_spot"], true);
}

#[test]
fn a_build_for_gpus_finds_them() {
    // Without a flag the set-up asks the building machine, which is seldom the training one.
    for name in all() {
        let a_command = |line: &str| line.contains("&&") || line.starts_with("$ ") || line.starts_with("RUN ");
        for line in text(&name).lines().filter(|line| line.contains("scripts/setup") && a_command(line)) {
            let flavour = ["--cuda", "--cpu", "\"--${FLAVOUR}\""];
            let flavour = flavour.iter().any(|one| line.contains(&format!("scripts/setup {one}")));
            assert!(flavour, "userdata/{name}: {line}");
        }
    }
    let image = text("container/Containerfile");
    assert!(image.contains("scripts/setup \"--${FLAVOUR}\"") && image.contains("ARG FLAVOUR=cuda"), "{image}");
    // GKE has no container runtime of NVIDIA's: its device plugin mounts the driver below /usr/local/nvidia.
    for (variable, folder) in
        [("LD_LIBRARY_PATH=/opt/trainer/lib:", "/usr/local/nvidia/lib64"), ("PATH=", "/usr/local/nvidia/bin")]
    {
        let found =
            image.split_whitespace().any(|word| word.starts_with(variable) && word.split(':').any(|one| one == folder));
        assert!(found, "{variable} of the image does not name {folder}");
    }
    // A sandbox prevents the setuid nvidia-modprobe from creating /dev/nvidia-uvm when CUDA needs it.
    for name in all().iter().filter(|name| name.ends_with(".service") && text(name).contains("NoNewPrivileges=yes")) {
        let unit = text(name);
        let before = unit.lines().find(|line| line.starts_with("ExecStartPre=") && line.contains("nvidia-modprobe"));
        assert_eq!(before, Some("ExecStartPre=+-/usr/bin/nvidia-modprobe -c0 -u"), "userdata/{name}");
    }
}

/// With an older driver CUDA finds no GPU, and a program may take the CPU for what it was meant to use.
#[test]
fn every_script_that_starts_the_program_looks_at_the_drivers_number() {
    for name in [
        "aws/user-data.sh",
        "aws/cloud-init.yaml",
        "gcp/startup.sh",
        "azure/cloud-init.yaml",
        "slurm/trainer.sbatch",
        "skypilot/task.yaml",
    ] {
        let text = text(name);
        for part in ["nvidia-smi --query-gpu=driver_version --format=csv,noheader", " -ge 580 ", "CUDA 13 needs 580"] {
            assert!(text.contains(part), "userdata/{name}: {part}");
        }
    }
    // The image that Google's machines boot has it in its name.
    let family = text("gcp/instance-template.sh");
    let family =
        family.split_once("${VM_IMAGE_FAMILY:-").and_then(|(_, rest)| rest.split_once('}')).expect("a family").0;
    let driver = family.rsplit_once("-nvidia-").and_then(|(_, number)| number.parse::<u32>().ok());
    assert!(driver >= Some(580), "{family}");
}

/// Spot pools are tainted, and a pod that names none lands on machines at the full price.
#[test]
fn pods_ask_for_spot_nodes_and_nobody_moves_them() {
    fn pods<'v>(value: &'v Value, found: &mut Vec<(&'v Value, &'v Value)>) {
        match value {
            Value::Object(fields) => {
                if value["spec"].get("containers").is_some() {
                    found.push((&value["metadata"], &value["spec"]));
                }
                fields.values().for_each(|field| pods(field, found));
            }
            Value::Array(items) => items.iter().for_each(|item| pods(item, found)),
            _ => {}
        }
    }
    for name in ["kubernetes/job.yaml", "kubernetes/jobset.yaml", "kubernetes/trainjob.yaml"] {
        let Some(documents) = yaml(&text(name)) else { return };
        let mut found = Vec::new();
        documents.iter().for_each(|document| pods(document, &mut found));
        let [(metadata, pod)] = found[..] else { panic!("{name} has {} pods", found.len()) };
        let annotations = &metadata["annotations"];
        assert_eq!(annotations["karpenter.sh/do-not-disrupt"], "true", "{name}");
        assert_eq!(annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"], "false", "{name}");
        // https://learn.microsoft.com/azure/aks/spot-node-pool
        // https://cloud.google.com/kubernetes-engine/docs/concepts/spot-vms
        let tolerated: Vec<_> = pod["tolerations"]
            .as_array()
            .expect("tolerations")
            .iter()
            .map(|one| (one["key"].as_str(), one["value"].as_str(), one["effect"].as_str()))
            .collect();
        for (key, value) in [
            ("kubernetes.azure.com/scalesetpriority", Some("spot")),
            ("cloud.google.com/gke-spot", Some("true")),
            ("nvidia.com/gpu", None),
        ] {
            assert!(tolerated.contains(&(Some(key), value, Some("NoSchedule"))), "{name}: {tolerated:?}");
        }
        let terms =
            &pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"];
        // One of them is enough.
        let labels: Vec<_> = terms
            .as_array()
            .expect("terms")
            .iter()
            .map(|term| {
                (term["matchExpressions"][0]["key"].as_str(), term["matchExpressions"][0]["values"][0].as_str())
            })
            .collect();
        let wanted = [
            ("kubernetes.azure.com/scalesetpriority", "spot"),
            ("cloud.google.com/gke-spot", "true"),
            ("eks.amazonaws.com/capacityType", "SPOT"),
            ("karpenter.sh/capacity-type", "spot"),
        ];
        assert_eq!(labels, wanted.map(|(key, value)| (Some(key), Some(value))), "{name}");
        // A node whose GPU does not answer is not paid for without end.
        let all = documents.iter().map(Value::to_string).collect::<String>();
        let endless = [
            r#"{"action":"Ignore","onExitCodes":{"containerName":"trainer","operator":"In","values":[75,76]}}"#,
            r#""onJobFailureMessagePatterns":[".*exit code (75|76) .*",".*DisruptionTarget.*"]"#,
        ];
        assert!(endless.iter().any(|rule| all.contains(rule)), "{name}: {all}");
        let ignored = all.matches(r#""action":"Ignore","onExitCodes""#).count();
        assert!(ignored <= 1, "{name} ignores other codes, too: {all}");
        let (limit, restarts) = (r#""backoffLimit":20"#, r#""maxRestarts":20"#);
        assert!(all.contains(limit) || all.contains(restarts), "{name}");
        // Whoever has an older one must not find out by an error.
        let opening = text(name);
        let also = [("kubernetes/jobset.yaml", "JobSet 0.10"), ("kubernetes/trainjob.yaml", "Kubeflow Trainer 2.1")];
        let also = also.iter().filter(|(file, _)| *file == name).map(|(_, version)| *version);
        for version in also.chain(["Kubernetes 1.31"]) {
            assert!(opening.contains(version), "{name} does not name {version}");
        }
    }
}
