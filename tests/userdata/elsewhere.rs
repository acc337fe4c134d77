//! The scripts for Slurm, Azure and Google Cloud on a machine of stand-ins, and the program as a container's first
//! process.
use std::{
    io::{BufRead, BufReader},
    os::unix::{fs::symlink, process::CommandExt},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::{
    path, said,
    stand_ins::{Cloud, Machine, STAND_IN, expect},
};
use crate::support::{
    lab::{EVERY, Lab},
    trainer::LIMIT,
};

#[test]
fn a_slurm_job_goes_back_into_the_queue_when_it_should() {
    let cloud = Cloud::machine();
    let job = |machine: &Machine| {
        let mut job = machine.command(&path("slurm/trainer.sbatch"), &cloud);
        job.envs([("TRAINER_STORE", "file:///runs"), ("TRAINER_RUN_ID", "r"), ("SLURM_JOB_ID", "42")])
            .env("TRAINER", machine.path("bin/trainer"));
        job
    };
    let queued_again = [69, 75, 76, 79].map(|code| (code, true));
    for (code, queued) in [0, 64, 65, 70, 78, 80].map(|code| (code, false)).into_iter().chain(queued_again) {
        let machine = Machine::new("");
        machine.executable("bin/trainer", &format!("{STAND_IN}exit {code}\n"));
        let output = job(&machine).output().expect("start the batch script");
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert_eq!(machine.calls().contains("scontrol requeue 42"), queued, "exit code {code}: {}", machine.calls());
        assert!(machine.calls().contains("trainer boot --json"), "{}", machine.calls());
    }
    // A node whose driver is too old.
    let machine = Machine::new("");
    machine.does("nvidia-smi", "echo 570.195.03");
    machine.executable("bin/trainer", STAND_IN);
    expect(&job(&machine).output().expect("start the batch script"), 78, &["NVIDIA's driver is 570", "--constraint"]);
    assert!(!machine.calls().contains("trainer boot"), "{}", machine.calls());
    // Slurm's signal goes to the script, or to all its processes; trainer must receive it, and the script must wait for
    // its exit.
    use rustix::process::{Pid, Signal, kill_process, kill_process_group};
    for (signal, all) in [(Signal::USR1, false), (Signal::TERM, false), (Signal::TERM, true)] {
        let machine = Machine::new("");
        let program = format!(
            "{STAND_IN}trap 'trap \"\" TERM; echo heard; exit 75' USR1 TERM\necho ready\nexec 2>/dev/null\n\
             while :; do read -r _ <\"$here/never\" || true; done\n"
        );
        machine.executable("bin/trainer", &program);
        // srun answers SIGTERM with SIGKILL for its step.
        machine
            .executable("bin/srun", &format!("{STAND_IN}shift\n\"$@\" & trap 'kill -9 $!; exit 137' TERM\nwait $!\n"));
        let fifo = Command::new("mkfifo").arg(machine.path("stand-ins/never")).status().expect("start mkfifo");
        assert!(fifo.success());
        let mut job = job(&machine).stdout(Stdio::piped()).process_group(0).spawn().expect("start the batch script");
        let (sender, lines) = std::sync::mpsc::channel();
        let stdout = BufReader::new(job.stdout.take().expect("piped"));
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let pid = Pid::from_child(&job);
        let hears = |wanted: &str| {
            let line = lines.recv_timeout(Duration::from_secs(60));
            if line.as_deref() != Ok(wanted) {
                // The program may be waiting forever.
                let _ = kill_process_group(pid, Signal::KILL);
                panic!("{wanted} is expected: {line:?}");
            }
        };
        hears("ready");
        let send = if all { kill_process_group } else { kill_process };
        send(pid, signal).expect("signal the script");
        hears("heard");
        assert_eq!(job.wait().expect("its end").code(), Some(75));
        assert!(machine.calls().contains("scontrol requeue 42"), "{}", machine.calls());
    }
}

/// A machine with `dirname`, which scripts outside of machines use.
fn desk() -> Machine {
    let machine = Machine::new("");
    let dirname = ["/usr/bin/dirname", "/bin/dirname"].map(Path::new).into_iter().find(|path| path.is_file());
    symlink(dirname.expect("dirname is not installed"), machine.path("bin/dirname")).expect("a link");
    machine
}

/// Lines of `calls` that begin so, as one text in the order of `starts`; panics if one is missing or comes too early.
fn expect_in_order(calls: &str, starts: &[&str]) {
    let mut rest = calls;
    for start in starts {
        let at = rest.find(start).unwrap_or_else(|| panic!("{start} is not there, or too early:\n{calls}"));
        rest = &rest[at + start.len()..];
    }
}

/// Azure's command line is a stand-in that stores the machine's User Data, and has no scale set before.
#[test]
fn a_scale_set_is_created_with_everything_that_its_machine_needs() {
    let cloud = Cloud::machine();
    let machine = desk();
    let az = format!(
        "{STAND_IN}if [ \"$1 $2\" = 'vmss show' ] && [ ! -e \"$here/user-data\" ]; then exit 3; fi\n\
         case \"$*\" in *' clientId '*) echo client-1 ;; *' principalId '*) echo principal-1 ;; \
         'identity show'*) echo /identity-1 ;; 'storage account show'*) echo /account-1 ;;\n\
         'vmss show'*query*) echo /set-1 ;;\n\
         'vmss list-instances'*) cat \"$here/machines\" ;; esac\n\
         for one; do if [ \"$last\" = --custom-data ]; then cat \"$one\" >\"$here/user-data\"; fi; last=$one; done\n"
    );
    machine.executable("bin/az", &az);
    let variables = [
        ("GROUP", "training"),
        ("LOCATION", "westeurope"),
        ("IMAGE", "registry/image"),
        ("STORE", "az://container/runs"),
        ("RUN_ID", "Reports_2026.q4"),
        ("CONFIG", "az://container/reports.toml"),
    ];
    let mut make = machine.command(&path("azure/scale-set.sh"), &cloud);
    let output = make.envs(variables).output().expect("start scale-set.sh");
    assert!(!output.status.success() && said(&output).contains("ACCOUNT"), "{}", said(&output));
    let output = make.env("ACCOUNT", "storage").output().expect("start scale-set.sh");
    assert!(output.status.success(), "{}", said(&output));
    let given = std::fs::read_to_string(machine.path("stand-ins/user-data")).expect("User Data");
    // The store gets the account from there.
    assert!(given.lines().any(|line| line.trim() == "AZURE_STORAGE_ACCOUNT_NAME=storage"), "{given}");
    let marks = ["IMAGE", "ACCOUNT", "STORE", "RUN_ID", "CONFIG", "CLIENT"].map(|name| format!("@{name}@"));
    assert!(!marks.iter().any(|mark| given.contains(mark)), "{given}");
    let calls = machine.calls();
    let made = calls.lines().find(|line| line.starts_with("az vmss create")).expect("az vmss create");
    // Options that `az vmss create` does not have, and features that spot machines do not have.
    assert!(!made.contains("--nsg-rule") && !made.contains("terminate-notification"), "{made}");
    let name = made.split_once(" --name ").and_then(|(_, rest)| rest.split_once(' ')).expect("a name").0;
    assert!(name.starts_with("trainer-reports-2026-q4-") && made.contains(&format!("--nsg {name}")), "{made}");
    // The identity and its roles come before the machine, which would otherwise end itself for the lack of them.
    let storage = "--role Storage Blob Data Contributor --scope /account-1/blobServices/default/containers/container";
    // Outages of 0.8 to 3.6 hours have been seen; after this time Azure restores nothing more.
    let restores = made.split_once("--spot-restore-timeout PT").and_then(|(_, rest)| rest.split_once('H'));
    assert!(restores.and_then(|(hours, _)| hours.parse::<u32>().ok()) >= Some(4), "{made}");
    assert!(made.contains(" --instance-count 0 ") && made.contains(" --assign-identity /identity-1 "), "{made}");
    expect_in_order(
        &calls,
        &[
            "az identity create --resource-group training",
            storage,
            "az network nsg create --resource-group training",
            "az vmss create",
            "--role Virtual Machine Contributor --scope /set-1",
            &format!("az vmss scale --resource-group training --name {name} --new-capacity 1"),
        ],
    );
    assert!(said(&output).contains(&format!("az vmss delete --resource-group training --name {name}")), "{calls}");
    // From cron, after Azure has given up restoring: a machine is started, and cron mails what is said.
    for (machines, started) in [("0", true), ("1", false)] {
        std::fs::write(machine.path("stand-ins/machines"), machines).expect("how many machines the set has");
        let before = machine.calls().len();
        let output = make.output().expect("start scale-set.sh");
        assert!(output.status.success(), "{}", said(&output));
        assert_eq!(said(&output).contains("has no machine: starting one"), started, "{}", said(&output));
        assert_eq!(said(&output).is_empty(), !started);
        let calls = machine.calls()[before..].to_owned();
        assert_eq!(calls.contains("az vmss scale"), started, "{calls}");
        assert!(!calls.contains("create"), "{calls}");
    }
}

/// A role that was given a moment ago is not known everywhere: the machine waits, and does not end itself.
#[test]
fn azures_machine_waits_for_its_role() {
    let Some(azure) = super::yaml(&super::text("azure/cloud-init.yaml")) else { return };
    let script = super::files::script_of(&azure[0], "/usr/local/sbin/trainer-machine");
    let role = r#"{"access_token":"metadata-token","expires_in":1}"#;
    let token = "/metadata/identity/oauth2/token?api-version=2018-02-01&client_id=client&resource=https%3A%2F%2Fstorage.azure.com%2F";
    let list = "/container?restype=container&comp=list&maxresults=1";
    for (answer, pauses) in [("forbidden", 60), ("<EnumerationResults/>", 0)] {
        let (machine, cloud) = (Machine::new(""), Cloud::start(&[(token, role), (list, answer)]));
        machine.executable("bin/run", &script);
        let mut run = machine.command(&machine.path("bin/run"), &cloud);
        let endpoints = ["TRAINER_AZURE_METADATA_ENDPOINT", "TRAINER_AZURE_BLOB_ENDPOINT"];
        run.arg("run").envs(endpoints.map(|name| (name, cloud.endpoint())));
        let output = run.output().expect("start trainer-machine");
        expect(&output, 0, &[]);
        assert_eq!(machine.calls().matches("sleep 30").count(), pauses, "{}", machine.calls());
        assert_eq!(said(&output).contains("waiting until the identity may use container"), pauses > 0);
        // The program itself says what is wrong.
        assert!(machine.calls().contains("registry/image boot --json"), "{}", machine.calls());
        // A GPU with an old driver.
        std::fs::create_dir_all(machine.path("root/sys/bus/pci/devices/0")).expect("a device");
        std::fs::write(machine.path("root/sys/bus/pci/devices/0/vendor"), "0x10de\n").expect("its maker");
        machine.does("nvidia-smi", "case $1 in --query-gpu=driver_version) echo 570.1 ;; esac");
        expect(&run.output().expect("start trainer-machine"), 78, &["NVIDIA's driver is 570.1"]);
    }
}

fn google<'a>(run_id: &'a str, notice: &'a str) -> [(&'a str, &'a str); 7] {
    [
        ("PROJECT", "project"),
        ("REGION", "us-central1"),
        ("BUCKET", "bucket"),
        ("RUN_ID", run_id),
        ("CONFIG", "gs://bucket/reports.toml"),
        ("IMAGE", "registry/image"),
        ("SPOT_NOTICE", notice),
    ]
}

/// Nothing exists yet; the quota allows one GPU.
fn gcloud(machine: &Machine, quota: &str) {
    let gcloud = format!(
        "{STAND_IN}case \"$*\" in *project-info*) echo {quota}; exit ;; esac\n\
         [ \"$2\" != describe ] && [ \"$3\" != describe ] && [ \"$4\" != describe ]\n"
    );
    machine.executable("bin/gcloud", &gcloud);
}

#[test]
fn googles_group_is_created_with_everything_that_its_machine_needs() {
    let cloud = Cloud::machine();
    let made = |run_id: &str| {
        let machine = desk();
        gcloud(&machine, "GPUS_ALL_REGIONS,1.0");
        let mut make = machine.command(&path("gcp/instance-template.sh"), &cloud);
        let output = make.envs(google(run_id, "")).output().expect("start instance-template.sh");
        assert!(output.status.success(), "{}", said(&output));
        let calls = machine.calls();
        let name = calls.split_once("instance-templates create ").expect("a template").1;
        let name = name.split(' ').next().expect("a name").to_owned();
        assert!(said(&output).contains(&format!("managed delete {name} --region us-central1")), "{}", said(&output));
        (name, calls)
    };
    // RFC 1035: small letters, digits, hyphens; 63 characters, of which the group takes five for a machine.
    let long = "Reports_2026.Q4-".repeat(5);
    let mut names = Vec::new();
    for run_id in ["reports", "Reports", "reports_2026.q4", "reports-2026-q4", &long] {
        let (name, _) = made(run_id);
        let legal = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        assert!(legal && name.starts_with("trainer-") && name.len() <= 58 && !name.ends_with('-'), "{name}");
        assert!(!names.contains(&name), "{name} is two runs");
        names.push(name);
    }
    let (name, calls) = made("reports");
    expect_in_order(
        &calls,
        &[
            // A network has no rule by itself; the one called default lets ssh in from everywhere.
            "gcloud compute networks create trainer ",
            "gcloud iam service-accounts create trainer ",
            "gcloud iam roles create trainerLeavesGroup ",
            "--role=roles/artifactregistry.reader",
            "--role=projects/project/roles/trainerLeavesGroup",
            "gcloud storage buckets add-iam-policy-binding gs://bucket ",
            &format!("gcloud compute instance-templates create {name} "),
            " --network=trainer ",
            &format!("managed create {name} --project=project --region=us-central1 "),
            "--target-distribution-shape=any --instance-redistribution-type=none",
        ],
    );
    assert!(!calls.contains("firewall"), "{calls}");
    // It would buy nothing, for as long as the quota is 0.
    let machine = desk();
    gcloud(&machine, "GPUS_ALL_REGIONS,0.0");
    let mut make = machine.command(&path("gcp/instance-template.sh"), &cloud);
    let output = make.envs(google("reports", "")).output().expect("start instance-template.sh");
    expect(&output, 69, &["the quota GPUS_ALL_REGIONS of project is 0", "hint: "]);
    assert!(!machine.calls().contains("create"), "{}", machine.calls());
}

/// Google's images have the driver, but no Docker.
#[test]
fn googles_machine_installs_what_its_image_lacks() {
    let attribute = |name: &str| format!("/computeMetadata/v1/instance/attributes/trainer-{name}");
    let names = ["image", "store", "run-id", "config", "preemption-window"].map(attribute);
    let answers: Vec<_> = names.iter().map(|name| (name.as_str(), "registry/image")).collect();
    let cloud = Cloud::with(&answers);
    let start = |gpu: bool, driver: &str, code: i32, parts: &[&str]| {
        let machine = Machine::new("");
        std::fs::remove_file(machine.path("bin/docker")).expect("take Docker away");
        std::fs::remove_file(machine.path("bin/nvidia-ctk")).expect("take the toolkit away");
        let apt = format!(
            "{STAND_IN}for one; do case $one in docker.io) one=docker ;; nvidia-container-toolkit) one=nvidia-ctk ;; \
             *) continue ;; esac; cat \"${{0%/*}}/systemctl\" >\"${{0%/*}}/$one\"; chmod 755 \"${{0%/*}}/$one\"; done\n"
        );
        machine.executable("bin/apt-get", &apt);
        // The key of NVIDIA's packages.
        std::fs::remove_file(machine.path("bin/curl")).expect("take curl away");
        let real = std::env::split_paths(&std::env::var_os("PATH").expect("PATH"))
            .map(|folder| folder.join("curl"))
            .find(|path| path.is_file())
            .expect("curl is not installed");
        let curl =
            format!("{STAND_IN}case \"$*\" in *nvidia.github.io*) ;; *) exec {} \"$@\" ;; esac\n", real.display());
        machine.executable("bin/curl", &curl);
        if gpu {
            std::fs::create_dir_all(machine.path("root/sys/bus/pci/devices/0")).expect("a device");
            std::fs::write(machine.path("root/sys/bus/pci/devices/0/vendor"), "0x10de\n").expect("its maker");
            machine.does("nvidia-smi", &format!("case $1 in --query-gpu=driver_version) echo {driver} ;; esac"));
        }
        let mut start = machine.command(&path("gcp/startup.sh"), &cloud);
        start.arg("run").env("GCE_METADATA_HOST", cloud.endpoint().trim_start_matches("http://"));
        expect(&start.output().expect("start startup.sh"), code, parts);
        machine
    };
    let machine = start(true, "580.95.05", 0, &["installing Docker", "installing NVIDIA's container toolkit"]);
    expect_in_order(
        &machine.calls(),
        &[
            "nvidia-modprobe -c0 -u",
            "install -y --no-install-recommends docker.io",
            "https://nvidia.github.io/libnvidia-container/gpgkey",
            "install -y --no-install-recommends nvidia-container-toolkit",
            "nvidia-ctk runtime configure --runtime=docker",
            "systemctl restart docker",
            "docker pull --quiet registry/image",
            "--gpus all registry/image boot --json",
        ],
    );
    let source = std::fs::read_to_string(machine.path("root/etc/apt/sources.list.d/nvidia.list")).expect("a source");
    assert!(source.ends_with(" https://nvidia.github.io/libnvidia-container/stable/deb/$(ARCH) /\n"), "{source}");
    let calls = start(false, "", 0, &["installing Docker"]).calls();
    assert!(!calls.contains("nvidia") && calls.contains("registry/image boot --json"), "{calls}");
    let calls = start(true, "570.195.03", 78, &["NVIDIA's driver is 570.195.03: CUDA 13 needs 580 or newer"]).calls();
    assert!(!calls.contains("docker run"), "{calls}");
}

#[test]
fn googles_notice_is_as_long_as_requested() {
    for (notice, window) in [("", "30s"), ("120s", "120s")] {
        let machine = desk();
        gcloud(&machine, "GPUS_ALL_REGIONS,1.0");
        let cloud = Cloud::with(&[
            ("/computeMetadata/v1/instance/attributes/trainer-image", "registry/image"),
            ("/computeMetadata/v1/instance/attributes/trainer-store", "gs://bucket/runs"),
            ("/computeMetadata/v1/instance/attributes/trainer-run-id", "reports"),
            ("/computeMetadata/v1/instance/attributes/trainer-config", "gs://bucket/reports.toml"),
            ("/computeMetadata/v1/instance/attributes/trainer-preemption-window", window),
        ]);
        let mut make = machine.command(&path("gcp/instance-template.sh"), &cloud);
        let output = make.envs(google("reports", notice)).output().expect("start instance-template.sh");
        assert!(output.status.success(), "{}", said(&output));
        let calls = machine.calls();
        assert!(calls.contains(&format!("trainer-preemption-window={window} ")), "{calls}");
        assert_eq!(calls.contains("--preemption-notice-duration=120s"), !notice.is_empty(), "{calls}");
        // It is not known whether the image's NVIDIA modules are signed; unsigned ones would not be loaded.
        assert!(calls.contains(" --no-shielded-secure-boot --shielded-vtpm "), "{calls}");
        // The console of a machine that is gone.
        assert!(calls.contains("serial-port-logging-enable=TRUE"), "{calls}");
        // The machine's own computation.
        let mut start = machine.command(&path("gcp/startup.sh"), &cloud);
        start.arg("run").env("GCE_METADATA_HOST", cloud.endpoint().trim_start_matches("http://"));
        expect(&start.output().expect("start startup.sh"), 0, &[]);
        let env = std::fs::read_to_string(machine.path("root/run/trainer/env")).expect("the container's variables");
        for line in [
            &*format!("TRAINER_PREEMPTION_WINDOW={window}"),
            "TRAINER_STOP_WINDOW=20s",
            "TRAINER_STORE=gs://bucket/runs",
            "TRAINER_RUN_ID=reports",
            "TRAINER_CONFIG=gs://bucket/reports.toml",
            "TRAINER_POWER_OFF=host",
        ] {
            assert!(env.lines().any(|found| found == line), "{line} is not in\n{env}");
        }
    }
}

/// One machine whose AMI has the program.
#[test]
fn a_single_machine_starts_the_program_unless_its_driver_is_too_old() {
    let Some(config) = super::yaml(&super::text("aws/cloud-init.yaml")) else { return };
    let script = super::files::script_of(&config[0], "/usr/local/sbin/trainer-machine");
    let cloud = Cloud::machine();
    for (gpu, driver, code) in [(false, "echo 470.1", 75), (true, "echo 580.95.05", 75), (true, "echo 575.1", 78)] {
        let machine = Machine::new("");
        machine.executable("bin/run", &script);
        std::fs::create_dir_all(machine.path("root/opt/trainer")).expect("a folder");
        machine.executable("root/opt/trainer/trainer", "#!/bin/sh\necho \"started with $*\"\nexit 75\n");
        machine.does("nvidia-smi", driver);
        if gpu {
            std::fs::create_dir_all(machine.path("root/sys/bus/pci/devices/0")).expect("a device");
            std::fs::write(machine.path("root/sys/bus/pci/devices/0/vendor"), "0x10de\n").expect("its maker");
        }
        let mut run = machine.command(&machine.path("bin/run"), &cloud);
        let said = if code == 75 { "started with boot --json" } else { "NVIDIA's driver is 575.1" };
        expect(&run.arg("run").output().expect("start trainer-machine"), code, &[said]);
    }
}

/// A service that is briefly away is worth another start: 69, not 70 as for a bug, nor a setting without a value.
#[test]
fn googles_services_may_be_away() {
    let attribute = |name: &str| format!("/computeMetadata/v1/instance/attributes/trainer-{name}");
    let names = ["image", "store", "run-id", "config", "preemption-window"].map(attribute);
    let token = "/computeMetadata/v1/instance/service-accounts/default/token";
    let start = |docker: &str, missing: &str, part: &str| {
        let mut answers = vec![(token, r#"{"access_token":"metadata-token","expires_in":1}"#)];
        answers.extend(names.iter().map(|name| (name.as_str(), "europe-docker.pkg.dev/project/trainer")));
        answers.retain(|(name, _)| !name.ends_with(missing));
        let (machine, cloud) = (Machine::new(""), Cloud::with(&answers));
        machine.does("docker", docker);
        let mut start = machine.command(&path("gcp/startup.sh"), &cloud);
        start.arg("run").env("GCE_METADATA_HOST", cloud.endpoint().trim_start_matches("http://"));
        expect(&start.output().expect("start startup.sh"), 69, &[part, "hint: "]);
        assert!(!machine.calls().contains("docker run"), "{}", machine.calls());
    };
    start("[ $1 != login ]", "-", "registry europe-docker.pkg.dev takes no log-in");
    for name in ["store", "run-id", "config", "preemption-window"] {
        start("[ $1 != login ] || cat >/dev/null", &format!("-{name}"), &format!("names no trainer-{name}"));
    }
}

/// A process that does not outlive its test.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        // An error means that it has already ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The descendants of a process, whichever of its threads started them.
fn children(parent: rustix::process::Pid) -> Vec<rustix::process::Pid> {
    let threads = std::fs::read_dir(format!("/proc/{}/task", parent.as_raw_nonzero())).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let ids: String = lists.collect::<Vec<_>>().join(" ");
    ids.split_whitespace().filter_map(|id| rustix::process::Pid::from_raw(id.parse().ok()?)).collect()
}

/// A container's first process gets no signal that it does not handle, and inherits every orphan.
#[test]
fn the_agent_stops_well_as_a_containers_first_process() {
    let apart = ["--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"];
    let possible = Command::new("unshare").args(apart).arg("true").output();
    if !possible.is_ok_and(|output| output.status.success()) {
        println!("skipped: this machine lets nobody make a process namespace");
        return;
    }
    let lab = Lab::on_files();
    let mut first = Command::new("unshare")
        .args(apart)
        .arg(env!("CARGO_BIN_EXE_trainer"))
        .args(["run", "run.toml", "--run-id", "first", "--store", &lab.uri(), "--json"])
        .current_dir(lab.path(""))
        .env("AWS_EC2_METADATA_DISABLED", "true")
        // Held one step after a checkpoint, so that it is not complete before it is asked to stop.
        .env("TRAINER_FAULTS", format!("worker.step=stop@rank=0@hit={}", EVERY + 2))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map(Ends)
        .expect("start unshare");
    let (sender, lines) = std::sync::mpsc::channel();
    let stdout = BufReader::new(first.0.stdout.take().expect("piped"));
    std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    let wait_for = |what: &str| {
        let begun = Instant::now();
        loop {
            let line = lines.recv_timeout(LIMIT.saturating_sub(begun.elapsed()));
            if line.unwrap_or_else(|error| panic!("{what} is not said: {error}")).starts_with(what) {
                break;
            }
        }
    };
    wait_for(&format!("{{\"event\":\"step\",\"step\":{},", EVERY + 1));
    use rustix::process::{Pid, Signal, kill_process};
    let agent = children(Pid::from_child(&first.0))[0];
    let begun = Instant::now();
    let worker = loop {
        let stopped = |pid: &Pid| {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
        };
        if let Some(held) = children(agent).into_iter().find(stopped) {
            break held;
        }
        assert!(begun.elapsed() < LIMIT, "no worker is held");
        std::thread::sleep(Duration::from_millis(10));
    };
    kill_process(agent, Signal::TERM).expect("signal the agent");
    wait_for("{\"event\":\"notice\"");
    kill_process(worker, Signal::CONT).expect("let the worker go on");
    let rest: Vec<String> = std::iter::from_fn(|| lines.recv_timeout(LIMIT).ok()).collect();
    assert!(rest.iter().any(|line| line.starts_with("{\"event\":\"interrupted\"")), "{rest:?}");
    assert_eq!(first.0.wait().expect("its end").code(), Some(75), "{rest:?}");
    assert!(
        rest.iter().any(|line| line.contains("\"event\":\"interrupted\"") && line.contains("\"lost_steps\":0")),
        "{rest:?}"
    );
}
