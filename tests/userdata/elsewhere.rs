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
    for (code, queued) in
        [(0, false), (69, true), (75, true), (76, true), (79, true), (64, false), (65, false), (70, false), (78, false)]
    {
        let machine = Machine::new("");
        machine.executable("bin/trainer", &format!("{STAND_IN}exit {code}\n"));
        let output = job(&machine).output().expect("start the batch script");
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert_eq!(machine.calls().contains("scontrol requeue 42"), queued, "exit code {code}: {}", machine.calls());
        assert!(machine.calls().contains("trainer boot --json"), "{}", machine.calls());
    }
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

/// Azure's command line is a stand-in that stores the machine's User Data and knows no scale set.
#[test]
fn a_scale_set_is_created_with_everything_that_its_machine_needs() {
    let cloud = Cloud::machine();
    let machine = Machine::new("");
    let az = format!(
        "{STAND_IN}if [ \"$2\" = show ] && [ ! -e \"$here/user-data\" ]; then exit 3; fi\n\
         for one; do if [ \"$last\" = --custom-data ]; then cat \"$one\" >\"$here/user-data\"; fi; last=$one; done\n"
    );
    machine.executable("bin/az", &az);
    let dirname = ["/usr/bin/dirname", "/bin/dirname"].map(Path::new).into_iter().find(|path| path.is_file());
    symlink(dirname.expect("dirname is not installed"), machine.path("bin/dirname")).expect("a link");
    let variables = [
        ("GROUP", "training"),
        ("LOCATION", "westeurope"),
        ("IMAGE", "registry/image"),
        ("STORE", "az://container/runs"),
        ("RUN_ID", "reports"),
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
    assert!(!given.contains("@ACCOUNT@") && !given.contains("@STORE@"), "{given}");
    let calls = machine.calls();
    let made = calls.lines().find(|line| line.starts_with("az vmss create")).expect("az vmss create");
    // Options that `az vmss create` does not have, and features that spot machines do not have.
    assert!(!made.contains("--nsg-rule") && !made.contains("terminate-notification"), "{made}");
    assert!(made.contains("--nsg trainer-reports"), "{made}");
    assert!(calls.contains("az network nsg create --resource-group training"), "{calls}");
}

#[test]
fn googles_notice_is_as_long_as_requested() {
    for (notice, window) in [("", "30s"), ("120s", "120s")] {
        let machine = Machine::new("");
        machine.executable("bin/gcloud", &format!("{STAND_IN}[ \"$2\" != describe ] && [ \"$3\" != describe ]\n"));
        let dirname = ["/usr/bin/dirname", "/bin/dirname"].map(Path::new).into_iter().find(|path| path.is_file());
        symlink(dirname.expect("dirname is not installed"), machine.path("bin/dirname")).expect("a link");
        let cloud = Cloud::with(&[
            ("/computeMetadata/v1/instance/attributes/trainer-image", "registry/image"),
            ("/computeMetadata/v1/instance/attributes/trainer-store", "gs://bucket/runs"),
            ("/computeMetadata/v1/instance/attributes/trainer-run-id", "reports"),
            ("/computeMetadata/v1/instance/attributes/trainer-config", "gs://bucket/reports.toml"),
            ("/computeMetadata/v1/instance/attributes/trainer-preemption-window", window),
        ]);
        let variables = [
            ("PROJECT", "project"),
            ("ZONE", "zone"),
            ("BUCKET", "bucket"),
            ("RUN_ID", "reports"),
            ("CONFIG", "gs://bucket/reports.toml"),
            ("IMAGE", "registry/image"),
            ("SPOT_NOTICE", notice),
        ];
        let mut make = machine.command(&path("gcp/instance-template.sh"), &cloud);
        let output = make.envs(variables).output().expect("start instance-template.sh");
        assert!(output.status.success(), "{}", said(&output));
        let calls = machine.calls();
        assert!(calls.contains(&format!("trainer-preemption-window={window} ")), "{calls}");
        assert_eq!(calls.contains("--preemption-notice-duration=120s"), !notice.is_empty(), "{calls}");
        // It is not known whether the image's NVIDIA modules are signed; unsigned ones would not be loaded.
        assert!(calls.contains(" --no-shielded-secure-boot --shielded-vtpm "), "{calls}");
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
