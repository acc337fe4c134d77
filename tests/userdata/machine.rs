//! `user-data.sh` on a machine of stand-ins: how it installs itself, and how it starts the program.
use std::{
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    process::{Command, Stdio},
};

use super::{
    path, said,
    stand_ins::{Cloud, Machine, expect},
};
use crate::support::s3::{S3Server, SECRET_KEY};

const IMAGE: &str = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/trainer@sha256:00";

#[test]
fn user_data_installs_itself_and_a_second_run_changes_nothing() {
    let (machine, cloud) = (Machine::new(&format!("TRAINER_IMAGE={IMAGE}\n")), Cloud::machine());
    expect(&machine.boot(&cloud), 0, &["installed"]);
    let first = machine.files();
    let calls = machine.calls();
    for call in
        ["systemctl daemon-reload", "systemctl enable trainer.service", "systemctl start --no-block trainer.service"]
    {
        assert!(calls.contains(call), "{calls}");
    }
    let installed = machine.path("root/usr/local/sbin/trainer-machine");
    assert_eq!(
        std::fs::read(&installed).expect("itself"),
        std::fs::read(path("aws/user-data.sh")).expect("user-data.sh")
    );
    assert_eq!(std::fs::metadata(&installed).expect("itself").permissions().mode() & 0o777, 0o755);
    let drop_in = std::fs::read_to_string(machine.path("root/etc/systemd/system/docker.service.d/trainer.conf"))
        .expect("drop-in");
    assert!(drop_in.contains("TimeoutStopSec=130"));
    expect(&machine.boot(&cloud), 0, &["installed"]);
    assert_eq!(machine.files(), first, "the second time writes nothing else");
    assert_eq!(machine.calls().matches("daemon-reload").count(), 1, "and has nothing to reload");
    // Two at once.
    let both: Vec<_> = (0..2)
        .map(|_| {
            machine
                .command(&path("aws/user-data.sh"), &cloud)
                .stderr(Stdio::piped())
                .spawn()
                .expect("start user-data.sh")
        })
        .collect();
    for one in both {
        expect(&one.wait_with_output().expect("its end"), 0, &[]);
    }
    assert_eq!(machine.files(), first);
}

#[test]
fn the_container_is_pulled_with_the_machines_role_and_can_be_stopped_well() {
    let settings = format!(
        "TRAINER_IMAGE={IMAGE}\nTRAINER_GPU=required\nTRAINER_SSM_PATH=/trainer/reports\nTRAINER_LOG_GROUP=training\n\
         TRAINER_RUN_ID_TEMPLATE='reports-{{year}}q{{quarter}}'\n"
    );
    // QVdTOmVjci1wYXNzd29yZA== is AWS:ecr-password.
    let token = r#"{"authorizationData":[{"authorizationToken":"QVdTOmVjci1wYXNzd29yZA==","expiresAt":1}]}"#;
    let cloud = Cloud::with(&[("GetAuthorizationToken", token)]);
    let machine = Machine::new(&settings);
    expect(&machine.boot(&cloud), 0, &[]);
    // The image does not exist before the pull; the daemon and the driver need a moment.
    machine.does(
        "docker",
        r#"case $1 in
info) [ -e "$here/up" ] || { touch "$here/up"; exit 1; } ;;
image) exit 1 ;;
login) read -r password; printf '%s' "$password" >"$here/password" ;;
run) echo trains ;;
esac"#,
    );
    machine.does(
        "nvidia-smi",
        r#"[ -e "$here/driver" ] || { touch "$here/driver"; exit 9; }
        case $1 in --query-gpu=driver_version) echo 580.95.05 ;; esac"#,
    );
    expect(&machine.unit(&cloud, "run", &[]), 0, &["trains"]);
    let calls = machine.calls();
    assert!(
        calls.contains("docker login --username AWS --password-stdin 123456789012.dkr.ecr.eu-west-1.amazonaws.com"),
        "{calls}"
    );
    assert_eq!(std::fs::read_to_string(machine.path("stand-ins/password")).expect("a log-in"), "ecr-password");
    let run = calls.lines().find(|line| line.starts_with("docker run")).expect("docker run");
    for part in [
        "--rm",
        "--init",
        "--network host",
        "--ipc host",
        "--stop-timeout 110",
        "--gpus all",
        // The place for datasets: the container's user has no home.
        "--env XDG_CACHE_HOME=/scratch",
        "awslogs-group=training",
        "mode=non-blocking",
        "boot --json",
    ] {
        assert!(run.contains(part), "{part} is not in {run}");
    }
    assert!(run.ends_with(&format!("{IMAGE} boot --json")) && !run.contains("--restart"), "{run}");
    // Without /dev/nvidia-uvm, which no sandbox lets CUDA create, a GPU is there and can't be used.
    assert!(calls.contains("nvidia-modprobe -c0 -u"), "{calls}");
    let env = std::fs::read_to_string(machine.path("root/run/trainer/env")).expect("the container's variables");
    for line in [
        "TRAINER_SSM_PATH=/trainer/reports",
        "TRAINER_STOP_WINDOW=100s",
        "TRAINER_RUN_ID_TEMPLATE=reports-{year}q{quarter}",
        "AWS_REGION=us-east-1",
    ] {
        assert!(env.lines().any(|found| found == line), "{line} is not in\n{env}");
    }
    // The log-in is requested in the registry's region, signed with the role and its session token.
    let (head, _) = cloud.asked("GetAuthorizationToken").remove(0);
    let head = head.to_ascii_lowercase();
    assert!(
        head.contains("/eu-west-1/ecr/aws4_request") && head.contains("x-amz-security-token: session-token"),
        "{head}"
    );
    assert!(!machine.calls().contains(SECRET_KEY) && !machine.calls().contains("ecr-password"));
    expect(&machine.unit(&cloud, "stop", &[]), 0, &[]);
    assert!(machine.calls().contains("docker stop --time 110 trainer"), "{}", machine.calls());
}

/// A bundle with a program that prints how it was started.
fn bundle(machine: &Machine) -> (Vec<u8>, String) {
    let folder = machine.path("bundle");
    std::fs::create_dir_all(folder.join("lib")).expect("a bundle");
    machine.executable("bundle/trainer", "#!/bin/sh\necho \"started with $* and $LD_LIBRARY_PATH\"\nexit 75\n");
    let file = machine.path("bundle.tar.gz");
    let packed =
        Command::new("tar").arg("-C").arg(&folder).arg("-czf").arg(&file).arg(".").status().expect("start tar");
    assert!(packed.success());
    let sum = Command::new("sha256sum").arg(&file).output().expect("start sha256sum");
    (std::fs::read(&file).expect("the bundle"), said(&sum)[..64].to_owned())
}

#[test]
fn a_bundle_is_downloaded_with_the_machines_role_once() {
    let (machine, cloud, server) = (Machine::new(""), Cloud::machine(), S3Server::start());
    let (body, sum) = bundle(&machine);
    server.write("bundles/trainer.tar.gz", body);
    let settings = format!(
        "TRAINER_BUNDLE=s3://bucket/bundles/trainer.tar.gz\nTRAINER_BUNDLE_SHA256={sum}\nTRAINER_QUEUE=https://queue\n"
    );
    std::fs::write(machine.path("root/etc/trainer/machine.conf"), settings).expect("settings");
    expect(&machine.boot(&cloud), 0, &[]);
    let endpoint = server.endpoint();
    let variables = [("AWS_ENDPOINT_URL", endpoint.as_str())];
    // The server checks the signature; the program's exit code is the unit's.
    expect(
        &machine.unit(&cloud, "run", &variables),
        75,
        &["started with work --json --terminate-when-idle and ", "/opt/trainer/lib"],
    );
    assert_eq!(server.count("GetObject"), 1);
    expect(&machine.unit(&cloud, "run", &variables), 75, &["started with work"]);
    assert_eq!(server.count("GetObject"), 1, "what is here is not downloaded again");
    assert!(!machine.calls().contains("docker"), "{}", machine.calls());
}

#[test]
fn each_failure_says_what_to_do() {
    let cloud = Cloud::machine();
    let run = |settings: &str, stand_ins: &[(&str, &str)], variables: &[(&str, &str)], code: i32, parts: &[&str]| {
        let machine = Machine::new(settings);
        expect(&machine.boot(&cloud), 0, &[]);
        for (name, does) in stand_ins {
            machine.does(name, does);
        }
        expect(&machine.unit(&cloud, "run", variables), code, parts);
        let log = std::fs::read_to_string(machine.path("root/var/log/trainer-boot.log")).expect("the log");
        assert!(log.contains("error: ") && log.contains("hint: "), "{log}");
        machine
    };
    // No metadata service: a port without a listener.
    let nobody = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
    let nobody = format!("http://127.0.0.1:{nobody}");
    let machine =
        run("", &[], &[("AWS_EC2_METADATA_SERVICE_ENDPOINT", &nobody)], 69, &["gives no token", "hop limit of 2"]);
    assert_eq!(machine.calls().matches("sleep ").count(), 7, "eight tries, a pause between two of them");
    run("TRAINER_GPU=required\n", &[("nvidia-smi", "exit 9")], &[], 69, &["GPU driver does not answer"]);
    for old in ["echo 570.195.03", "echo none", "exit 0"] {
        let old = format!("case $1 in --query-gpu=driver_version) {old} ;; esac");
        let parts = ["NVIDIA's driver is ", "CUDA 13 needs 580 or newer"];
        run("TRAINER_GPU=required\n", &[("nvidia-smi", &old)], &[], 78, &parts);
    }
    run("TRAINER_GPU=perhaps\n", &[], &[], 78, &["TRAINER_GPU is \"perhaps\""]);
    run("TRAINER_STOP_WINDOW=2m\n", &[], &[], 78, &["TRAINER_STOP_WINDOW is \"2m\"", "100s"]);
    run("", &[], &[], 78, &["there is no ", "set TRAINER_IMAGE or TRAINER_BUNDLE"]);
    run("TRAINER_IMAGE=a/b\n", &[("docker", "exit 1")], &[], 69, &["Docker daemon does not answer"]);
    run("TRAINER_IMAGE=a/b\n", &[("docker", "[ $1 = info ]")], &[], 69, &["image a/b can't be pulled"]);
    // The local image is good enough if the registry is away.
    let machine = Machine::new("TRAINER_IMAGE=a/b\n");
    machine.boot(&cloud);
    machine.does("docker", "[ $1 != pull ]");
    expect(&machine.unit(&cloud, "run", &[]), 0, &["using the local one"]);
    // Without Docker.
    std::fs::remove_file(machine.path("bin/docker")).expect("take Docker away");
    expect(&machine.unit(&cloud, "run", &[]), 78, &["Docker is not installed", "AMI with Docker"]);
    // Bundles.
    let server = S3Server::start();
    let (endpoint, zeros) = (server.endpoint(), "0".repeat(64));
    let s3 = [("AWS_ENDPOINT_URL", endpoint.as_str())];
    run("TRAINER_BUNDLE=s3://bucket/none\n", &[], &s3, 78, &["TRAINER_BUNDLE_SHA256 is not a SHA-256"]);
    run(
        &format!("TRAINER_BUNDLE=ftp://none\nTRAINER_BUNDLE_SHA256={zeros}\n"),
        &[],
        &s3,
        78,
        &["neither s3:// nor https://"],
    );
    run(
        &format!("TRAINER_BUNDLE=s3://bucket/none\nTRAINER_BUNDLE_SHA256={zeros}\n"),
        &[],
        &s3,
        69,
        &["can't be downloaded", "s3:GetObject"],
    );
    server.write("other.tar.gz", "something else");
    let machine = run(
        &format!("TRAINER_BUNDLE=s3://bucket/other.tar.gz\nTRAINER_BUNDLE_SHA256={zeros}\n"),
        &[],
        &s3,
        65,
        &["the bundle's SHA-256 is ", "not 000000"],
    );
    assert!(!machine.path("root/opt/trainer").exists(), "what is wrong is never installed");
    // A machine without a role says so.
    let bare =
        Cloud::start(&[("/latest/meta-data/instance-id", "i-1"), ("/latest/meta-data/placement/region", "us-east-1")]);
    let machine = Machine::new(&format!("TRAINER_BUNDLE=s3://bucket/other.tar.gz\nTRAINER_BUNDLE_SHA256={zeros}\n"));
    machine.boot(&bare);
    expect(
        &machine.unit(&bare, "run", &s3),
        69,
        &["no credentials: does the launch template name an instance profile?"],
    );
    expect(&machine.unit(&bare, "dance", &[]), 64, &["unknown command dance"]);
}

#[test]
fn local_disks_are_made_and_mounted_once_and_never_over_something() {
    let cloud = Cloud::machine();
    let scratch = |blkid: &str, lsblk: &str| {
        let machine = Machine::new("TRAINER_IMAGE=a/b\n");
        machine.boot(&cloud);
        machine.does("blkid", blkid);
        machine.does("lsblk", lsblk);
        expect(&machine.unit(&cloud, "run", &[]), 0, &[]);
        machine
    };
    let disks = r#"case $1 in
        -dnpo) echo "/dev/nvme0n1 Amazon Elastic Block Store"; echo "/dev/nvme1n1 Amazon EC2 NVMe Instance Storage" ;;
    esac"#;
    let calls = scratch("exit 2", disks).calls();
    assert!(
        calls.contains("mkfs.ext4 -q -L trainer-scratch /dev/nvme1n1")
            && calls.contains("mount -o noatime /dev/nvme1n1"),
        "{calls}"
    );
    // It has the label: no second file system.
    let calls = scratch("echo /dev/nvme1n1", disks).calls();
    assert!(!calls.contains("mkfs") && calls.contains("mount -o noatime /dev/nvme1n1"), "{calls}");
    // A file system without the label is left alone, and so is a root disk.
    let calls = scratch("exit 2", &format!("{disks}\ncase $1 in -no) echo xfs ;; esac")).calls();
    assert!(!calls.contains("mkfs") && !calls.contains("mount -o"), "{calls}");
    let calls = scratch("exit 2", "echo '/dev/nvme0n1 Amazon Elastic Block Store'").calls();
    assert!(!calls.contains("mkfs") && !calls.contains("mount -o"), "{calls}");
    // It is already mounted.
    let machine = Machine::new("TRAINER_IMAGE=a/b\n");
    machine.boot(&cloud);
    machine.does("mountpoint", "exit 0");
    std::fs::create_dir_all(machine.path("root/mnt/trainer")).expect("a mount point");
    expect(&machine.unit(&cloud, "run", &[]), 0, &[]);
    assert!(!machine.calls().contains("blkid") && !machine.calls().contains("mount -o"), "{}", machine.calls());
    // The Deep Learning AMI makes one disk of all of them, and mounts it some time after the boot.
    let dlami = |mountpoint: &str, lsblk: &str| {
        let machine = Machine::new("TRAINER_IMAGE=a/b\n");
        machine.boot(&cloud);
        machine.does("systemctl", "");
        machine.does("mountpoint", mountpoint);
        machine.does("lsblk", lsblk);
        std::fs::create_dir_all(machine.path("root/opt/dlami/nvme")).expect("a folder");
        let output = machine.unit(&cloud, "run", &[]);
        expect(&output, 0, &[]);
        let calls = machine.calls();
        assert!(!calls.contains("mkfs") && !calls.contains("mount -o"), "over the AMI's own work: {calls}");
        let own = machine.path("root/mnt/trainer");
        (calls.contains(&format!("--volume {}:/scratch", own.display())), calls, said(&output))
    };
    let later = "echo x >>\"$here/looked\"; [ \"$(grep -c x \"$here/looked\")\" = 4 ]";
    let (on_the_root_disk, calls, _) = dlami(later, disks);
    assert!(!on_the_root_disk && calls.contains("/opt/dlami/nvme:/scratch"), "{calls}");
    assert_eq!(calls.matches("sleep ").count(), 3, "{calls}");
    // Its service fails; a type has no local disk, for which nobody waits.
    let (on_the_root_disk, calls, said) = dlami("exit 1", disks);
    assert!(on_the_root_disk && said.contains("scratch space is on the root disk"), "{calls}");
    let (on_the_root_disk, calls, said) = dlami("exit 1", "");
    assert!(on_the_root_disk && !calls.contains("sleep ") && !said.contains("warning"), "{calls}");
    // The unit does not start before the AMI's.
    let unit = std::fs::read_to_string(machine.path("root/etc/systemd/system/trainer.service")).expect("the unit");
    assert!(unit.lines().any(|line| line.starts_with("After=") && line.contains(" dlami-nvme.service")), "{unit}");
}

#[test]
fn a_silent_program_is_not_reported_as_alive() {
    let cloud = Cloud::with(&[("GetParameter", r#"{"Parameter":{"Value":"token"}}"#), ("SendTask", "{}")]);
    let machine = Machine::new("TRAINER_IMAGE=a/b\nTRAINER_TASK_TOKEN=/t\n");
    machine.boot(&cloud);
    // Three times five minutes: the program said nothing in the first and the last.
    machine.does("sleep", r#"[ "$1" != 300 ] || { echo x >>"$here/beats"; [ "$(grep -c x "$here/beats")" -le 3 ]; }"#);
    machine.does("journalctl", r#"[ "$(grep -c x "$here/beats")" != 2 ] || echo '{"event":"step"}'"#);
    expect(&machine.unit(&cloud, "run", &[]), 0, &[]);
    assert_eq!(machine.calls().matches("journalctl -u trainer --since=-6min").count(), 3, "{}", machine.calls());
    assert_eq!(cloud.asked("AWSStepFunctions.SendTaskHeartbeat").len(), 1);
}
