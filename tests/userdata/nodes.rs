//! Several nodes: what is open between them and to nobody else, how many there are, and what starts each of them.
use std::{
    io::{BufRead, BufReader, Write},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::{
    path, said,
    stack::{create_nodes, properties, tagged, with_nodes},
    stand_ins::{Cloud, Machine, STAND_IN, expect},
    text, yaml,
};
use crate::support::moto::Moto;

/// The numbers that the parts of the stack buy: the group's upper bound, its begin, the schedule's and the loop's.
fn sizes(stack: &Value) -> [Value; 4] {
    let group = properties(stack, "Group");
    let input = properties(stack, "BootSchedule")["Target"]["Input"]["Fn::Sub"].as_str().expect("an input");
    let input: Value = serde_json::from_str(input).expect("JSON");
    [
        group["MaxSize"].clone(),
        group["DesiredCapacity"].clone(),
        input["DesiredCapacity"].to_string().into(),
        properties(stack, "Loop")["DefinitionSubstitutions"]["Size"].clone(),
    ]
}

fn if_begun(size: Value) -> Value {
    json!({"Fn::If": ["BeginNow", size, {"Ref": "AWS::NoValue"}]})
}

/// The settings of `user-data.sh` that depend on other parameters.
fn settings(stack: &Value) -> &Value {
    &properties(stack, "Settings")["Value"]["Fn::Sub"]
}

/// The kinds of GPU that the group may buy.
fn types(stack: &Value) -> &Value {
    let overrides = &properties(stack, "Group")["MixedInstancesPolicy"]["LaunchTemplate"]["Overrides"];
    &overrides[0]["InstanceRequirements"]["AllowedInstanceTypes"]
}

#[test]
fn one_node_gets_what_it_always_got() {
    let Some(stack) = with_nodes("1") else { return };
    assert_eq!(stack["Parameters"]["Nodes"]["Default"], "1");
    let resources = stack["Resources"].as_object().expect("resources");
    assert_eq!(resources.len(), 38, "a resource for several nodes only needs the condition: {:?}", resources.keys());
    let group = properties(&stack, "Group");
    assert_eq!(group["VPCZoneIdentifier"], json!({"Ref": "SubnetIds"}));
    assert_eq!(group.get("PlacementGroup"), None);
    let asked = if_begun(json!({"Ref": "DesiredCapacity"}));
    assert_eq!(sizes(&stack), [json!({"Ref": "MaxSize"}), asked, json!("1"), json!("1")]);
    assert_eq!(types(&stack), &json!({"Fn::Split": [",", {"Ref": "InstanceTypes"}]}));
    assert_eq!(settings(&stack)[1]["JobNodes"], "", "the program gets no --nodes");
    // Nothing else depends on the number.
    let mut rest = stack["Resources"].to_string();
    for known in ["TRAINER_NODES='${JobNodes}'", "\"JobNodes\":\"\""] {
        assert!(rest.contains(known), "{known}");
        rest = rest.replace(known, "");
    }
    assert!(!rest.contains("Nodes\"") && !rest.contains("NODES") && !rest.contains("Several"), "{rest}");
}

/// All rules of the stack: whether they let in, and what they let through.
fn rules(stack: &Value) -> Vec<(bool, Value)> {
    let group = properties(stack, "SecurityGroup");
    let mut rules = Vec::new();
    for (key, inward) in [("SecurityGroupIngress", true), ("SecurityGroupEgress", false)] {
        rules.extend(group[key].as_array().expect("rules").iter().map(|rule| (inward, rule.clone())));
    }
    for resource in stack["Resources"].as_object().expect("resources").values() {
        match resource["Type"].as_str().expect("a type") {
            "AWS::EC2::SecurityGroupIngress" => rules.push((true, resource["Properties"].clone())),
            "AWS::EC2::SecurityGroupEgress" => rules.push((false, resource["Properties"].clone())),
            _ => {}
        }
    }
    rules
}

#[test]
fn nodes_reach_each_other_and_nobody_else_reaches_them() {
    let Some(one) = with_nodes("1") else { return };
    let of_one = rules(&one);
    // One for the store, and one for a job API on another port.
    let (https, api) = match &of_one[..] {
        [(false, https), (false, api)] => (https.clone(), api.clone()),
        other => panic!("{other:?}"),
    };
    assert_eq!((&https["FromPort"], &https["ToPort"]), (&json!(443), &json!(443)));
    assert_eq!((&api["FromPort"], &api["ToPort"]), (&json!({"Ref": "ApiPort"}), &json!({"Ref": "ApiPort"})));
    assert_eq!(one["Resources"]["ToApi"]["Condition"], "HasApiPort");
    let own = json!({"Fn::GetAtt": "SecurityGroup.GroupId"});
    // EFA demands all protocols, in both directions, and the group's own id.
    let of_several = [
        (false, https),
        (true, json!({"GroupId": own, "IpProtocol": "-1", "SourceSecurityGroupId": own})),
        (false, api),
        (false, json!({"GroupId": own, "IpProtocol": "-1", "DestinationSecurityGroupId": own})),
    ];
    for (nodes, size) in [("2", "2"), ("2:4", "4"), ("10:16", "16")] {
        let stack = with_nodes(nodes).expect("the tools are there");
        assert_eq!(rules(&stack), of_several, "{nodes}");
        let kinds = stack["Resources"].to_string();
        assert!(!kinds.contains("NatGateway") && !kinds.contains("LoadBalancing"), "{nodes}");
        let group = properties(&stack, "Group");
        assert_eq!(group["VPCZoneIdentifier"], json!([{"Fn::Select": [0, {"Ref": "SubnetIds"}]}]), "one zone");
        assert_eq!(group["PlacementGroup"], json!({"Ref": "PlacementGroup"}));
        assert_eq!(properties(&stack, "PlacementGroup"), &json!({"Strategy": "cluster"}));
        assert_eq!(sizes(&stack), [json!(size), if_begun(json!(size)), json!(size), json!(size)]);
        assert_eq!(group["MinSize"], "0", "a machine that is done could not leave");
        // A generation has one kind of device.
        assert_eq!(types(&stack), &json!(["g6.*"]));
        assert_eq!(settings(&stack)[1]["JobNodes"], nodes);
        assert!(settings(&stack)[0].as_str().is_some_and(|head| head.contains("TRAINER_NODES='${JobNodes}'\n")));
        // A job in the queue has one node.
        let rule = &stack["Rules"]["OneNodeAJob"];
        assert_eq!(rule["RuleCondition"], json!({"Fn::Equals": [{"Ref": "Work"}, "queue"]}));
        assert_eq!(rule["Assertions"][0]["Assert"], json!({"Fn::Equals": [nodes, "1"]}));
    }
    // Each machine that the loop provides, and again after a silence.
    let loops = properties(&one, "Loop")["DefinitionString"].as_str().expect("a definition").to_owned();
    assert_eq!(loops.matches("\"DesiredCapacity\": ${Size}}").count(), 1, "{loops}");
    assert_eq!(loops.matches("\"DesiredCapacity\": 0}").count(), 2, "{loops}");
    // The pattern of the parameter, by examples.
    let pattern = one["Parameters"]["Nodes"]["AllowedPattern"].as_str().expect("a pattern");
    const MATCH: &str = "import re, sys; print(*[bool(re.fullmatch(sys.argv[1], one)) for one in sys.argv[2:]])";
    let examples = [pattern, "1", "16", "2:4", "9999:9999", "0", "2:0", "2:", ":2", "2-4", "2:4:8", "2 :4", ""];
    let output = super::python(MATCH, &examples).expect("the tools are there");
    assert_eq!(said(&output).trim(), "True True True True False False False False False False False False");
}

#[test]
fn a_stack_of_several_nodes_is_created() {
    let Some(moto) = Moto::start("configs") else { return };
    create_nodes(&moto, "several", "boot", "2:4");
    let request = [("Filter.1.Name", "description"), ("Filter.1.Value.1", "Nothing in, https out")];
    let groups = moto.query("ec2", "2016-11-15", "DescribeSecurityGroups", &request);
    let own = tagged(&groups, "groupId");
    let inward = tagged(&groups, "ipPermissions");
    assert!(inward.contains("<ipProtocol>-1</ipProtocol>") && inward.contains(&format!("<groupId>{own}<")), "{inward}");
    assert!(!inward.contains("cidr"), "{inward}");
    let request = [("AutoScalingGroupNames.member.1", "several")];
    let groups = moto.query("autoscaling", "2011-01-01", "DescribeAutoScalingGroups", &request);
    assert_eq!((tagged(&groups, "MaxSize"), tagged(&groups, "DesiredCapacity")), ("4", "0"));
    let zone = tagged(&groups, "VPCZoneIdentifier");
    assert!(zone.starts_with("subnet-") && !zone.contains(','), "{zone}");
    // What moto drops, and the tests above look at.
    for kind in ["AWS::EC2::PlacementGroup", "AWS::EC2::SecurityGroupEgress"] {
        assert!(moto.log().contains(&format!("No Moto CloudFormation support for {kind}")), "{kind}");
    }
}

#[test]
fn user_data_hands_the_number_of_nodes_on() {
    let cloud = Cloud::machine();
    let started = |settings: &str, efa: bool| {
        let machine = Machine::new(&format!("TRAINER_IMAGE=a/b\n{settings}"));
        expect(&machine.boot(&cloud), 0, &[]);
        if efa {
            std::fs::create_dir_all(machine.path("root/dev/infiniband")).expect("EFA's devices");
        }
        expect(&machine.unit(&cloud, "run", &[]), 0, &[]);
        machine.calls().lines().find(|line| line.starts_with("docker run")).expect("docker run").to_owned()
    };
    let run = started("TRAINER_NODES='2:4'\n", false);
    assert!(run.ends_with(" a/b boot --json --nodes 2:4") && run.contains("--ulimit memlock=-1"), "{run}");
    assert!(run.contains("--network host") && !run.contains("infiniband"), "{run}");
    // As the stack writes it for one node.
    for settings in ["", "TRAINER_NODES=''\n"] {
        assert!(started(settings, false).ends_with(" a/b boot --json"), "{settings}");
    }
    let run = started("TRAINER_NODES='2:4'\nTRAINER_QUEUE='https://queue'\n", false);
    assert!(run.ends_with(" a/b work --json --terminate-when-idle"), "{run}");
    assert!(started("", true).contains(" --device /dev/infiniband "), "a container sees no device by itself");
    // A program in the AMI.
    let machine = Machine::new("TRAINER_NODES='2:4'\n");
    expect(&machine.boot(&cloud), 0, &[]);
    std::fs::create_dir_all(machine.path("root/opt/trainer")).expect("a folder");
    machine.executable("root/opt/trainer/trainer", "#!/bin/sh\necho \"started with $*\"\n");
    expect(&machine.unit(&cloud, "run", &[]), 0, &["started with boot --json --nodes 2:4\n"]);
}

#[test]
fn the_pods_of_a_job_set_reach_each_other_and_nobody_else_reaches_them() {
    let Some(documents) = yaml(&text("kubernetes/jobset.yaml")) else { return };
    let [policy, set] = &documents[..] else { panic!("{} documents", documents.len()) };
    assert_eq!((&policy["kind"], &set["kind"]), (&json!("NetworkPolicy"), &json!("JobSet")));
    let pods = json!({"matchLabels": {"jobset.sigs.k8s.io/jobset-name": set["metadata"]["name"]}});
    let spec = &policy["spec"];
    assert_eq!((&spec["podSelector"], &spec["policyTypes"]), (&pods, &json!(["Ingress", "Egress"])));
    // No port is named: Gloo, NCCL and TCPStore take any.
    let among = |way: &str| json!({way: [{"podSelector": pods}], "ports": [{"protocol": "TCP"}]});
    assert_eq!(spec["ingress"], json!([among("from")]), "and nothing else");
    assert_eq!(spec["egress"][0], among("to"));
    let rest = json!([
        {"ports": [{"protocol": "TCP", "port": 443}]},
        {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]},
        {"to": [{"ipBlock": {"cidr": "169.254.0.0/16"}}], "ports": [{"protocol": "TCP"}]},
    ]);
    assert_eq!(spec["egress"].as_array().map(|rules| json!(rules[1..])), Some(rest), "store, names, metadata");
    let network = json!({"enableDNSHostnames": true, "publishNotReadyAddresses": true});
    assert_eq!(set["spec"]["network"], network, "its headless service");
    let job = &set["spec"]["replicatedJobs"][0]["template"]["spec"];
    assert_eq!(set["spec"]["replicatedJobs"][0]["replicas"], 1);
    assert_eq!(job["completionMode"], "Indexed");
    assert_eq!(job["completions"], job["parallelism"]);
    let pod = &job["template"]["spec"];
    let most = job["completions"].as_u64().expect("a number");
    let arguments = pod["containers"][0]["args"].as_array().expect("arguments");
    let at = arguments.iter().position(|one| one == "--nodes").expect("--nodes");
    let (least, upper) = arguments[at + 1].as_str().and_then(|bounds| bounds.split_once(':')).expect("MIN:MAX");
    assert!(upper.parse() == Ok(most) && least.parse::<u64>().is_ok_and(|least| least < most), "{arguments:?}");
    // A pod that goes is replaced alone: a failed job would take the others with it.
    let policy = job["podFailurePolicy"]["rules"].as_array().expect("rules");
    for rule in policy {
        let fails = rule["action"] == "FailJob";
        let hopeless = rule["onExitCodes"]["values"] == json!([64, 65, 77, 78, 80, 81]);
        assert_eq!(fails, hopeless, "{rule}");
    }
    assert_eq!(set["spec"]["failurePolicy"], json!({"maxRestarts": 0}), "the job counts");
    let term = &pod["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0];
    assert_eq!(term, &json!({"topologyKey": "topology.kubernetes.io/zone", "labelSelector": pods}), "one zone");
    assert_eq!(pod.get("hostNetwork"), None);
}

/// An agent that says when it is ready and when it heard a signal; it leaves when it may.
const AGENT: &str = "trap 'trap \"\" TERM; echo heard; read -r _ <\"$here/leave\"; exit 75' USR1 TERM\n\
    echo $$ >>\"$here/agents\"\necho ready\nexec 2>/dev/null\n\
    while :; do read -r _ <\"$here/never\" || true; done\n";
/// Two agents; a SIGTERM to srun itself kills them. Its exit code is the highest of theirs.
const SRUN: &str = "trap 'echo srun is killed >>\"$here/calls\"; kill -9 $agents; exit 137' TERM\n\
    while :; do case $1 in --*) shift ;; *) break ;; esac; done\n\
    agents= code=0\n\
    for node in 1 2; do \"$@\" & agents=\"$agents $!\"; done\n\
    for agent in $agents; do\n\
        wait \"$agent\"; one=$?; if [ \"$one\" -gt \"$code\" ]; then code=$one; fi\n\
    done\n\
    exit \"$code\"\n";
const SCANCEL: &str = "[ \"$2\" = 42 ] && kill -\"${1#--signal=}\" $(cat \"$here/agents\")\n";

fn cluster(agent: &str) -> Machine {
    let machine = Machine::new("");
    machine.executable("bin/trainer", &format!("{STAND_IN}{agent}"));
    machine.executable("bin/srun", &format!("{STAND_IN}{SRUN}"));
    machine.executable("bin/scancel", &format!("{STAND_IN}{SCANCEL}"));
    machine
}

fn job(machine: &Machine, cloud: &Cloud) -> Command {
    let mut job = machine.command(&path("slurm/trainer.sbatch"), cloud);
    job.envs([("TRAINER_STORE", "file:///runs"), ("TRAINER_RUN_ID", "r"), ("SLURM_JOB_ID", "42")])
        .envs([("SLURM_JOB_NUM_NODES", "2"), ("SLURM_CPUS_PER_TASK", "8")])
        .env("TRAINER", machine.path("bin/trainer"));
    job
}

#[test]
fn a_slurm_job_starts_an_agent_on_each_node() {
    let head = text("slurm/trainer.sbatch");
    // `--ntasks` would lower the number of nodes to it.
    assert!(head.contains("#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=1\n") && !head.contains("SBATCH --ntasks="));
    let cloud = Cloud::machine();
    for (asked, nodes) in [(None, "2"), (Some("1:2"), "1:2")] {
        for (code, queued) in [(0, false), (69, true), (75, true), (79, true), (70, false), (78, false)] {
            let machine = cluster(&format!("exit {code}\n"));
            let mut job = job(&machine, &cloud);
            job.envs(asked.map(|bounds| ("TRAINER_NODES", bounds)));
            let output = job.output().expect("start the batch script");
            assert_eq!(output.status.code(), Some(code), "{}", said(&output));
            let calls = machine.calls();
            assert_eq!(calls.contains("scontrol requeue 42"), queued, "exit code {code}: {calls}");
            let srun = calls.lines().find(|line| line.starts_with("srun ")).expect("srun");
            for part in [
                " --nodes=2 --ntasks=2 --ntasks-per-node=1 ",
                // Since Slurm 22.05 srun does not take it from the job.
                " --cpus-per-task=8 ",
                // The end of one agent ends no other.
                " --kill-on-bad-exit=0 --wait=0 ",
            ] {
                assert!(srun.contains(part), "{part} is not in {srun}");
            }
            let agent = format!("trainer boot --json --nodes {nodes} --wait 10m");
            assert_eq!(calls.lines().filter(|line| **line == agent).count(), 2, "{calls}");
        }
    }
}

/// SIGUSR1 comes to the batch script alone, SIGTERM to it and to the agents.
#[test]
fn the_agents_of_a_slurm_job_hear_each_signal_once() {
    for signal in [Signal::USR1, Signal::TERM] {
        let (machine, cloud) = (cluster(AGENT), Cloud::machine());
        let fifos = ["stand-ins/never", "stand-ins/leave"].map(|name| machine.path(name));
        assert!(Command::new("mkfifo").args(&fifos).status().expect("start mkfifo").success());
        let mut job =
            job(&machine, &cloud).stdout(Stdio::piped()).process_group(0).spawn().expect("start the batch script");
        let pid = Pid::from_child(&job);
        let (sender, lines) = std::sync::mpsc::channel();
        let stdout = BufReader::new(job.stdout.take().expect("piped"));
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let both_say = |wanted: &str| {
            for _ in 0..2 {
                let line = lines.recv_timeout(Duration::from_secs(60));
                if line.as_deref() != Ok(wanted) {
                    // The agents may be waiting forever.
                    let _ = rustix::process::kill_process_group(pid, Signal::KILL);
                    panic!("{wanted} is expected: {line:?}");
                }
            }
        };
        both_say("ready");
        kill_process(pid, signal).expect("signal the script");
        if signal == Signal::TERM {
            let agents = std::fs::read_to_string(machine.path("stand-ins/agents")).expect("the agents");
            for agent in agents.split_whitespace() {
                let agent = Pid::from_raw(agent.parse().expect("an id")).expect("an id");
                kill_process(agent, signal).expect("signal an agent");
            }
        }
        both_say("heard");
        // Open until both have read: a pipe without a writer is at its end.
        let mut leave = std::fs::File::options().read(true).write(true).open(&fifos[1]).expect("the agents' way out");
        leave.write_all(b"leave\nleave\n").expect("let both leave");
        assert_eq!(job.wait().expect("its end").code(), Some(75));
        let calls = machine.calls();
        assert!(calls.contains("scontrol requeue 42"), "{calls}");
        assert!(!calls.contains("srun is killed"), "{calls}");
        let passed = calls.lines().filter(|line| line.starts_with("scancel ")).collect::<Vec<_>>();
        let wanted: &[&str] = if signal == Signal::USR1 { &["scancel --signal=USR1 42"] } else { &[] };
        assert_eq!(passed, wanted, "a second SIGTERM ends an agent before it has saved");
    }
}
