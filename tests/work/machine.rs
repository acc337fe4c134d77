//! The consumer's machine: what it waits for at the start, and when it is let go.

use super::*;

#[test]
fn a_machine_that_cannot_leave_continues_with_the_next_job() {
    let Some(shop) = Shop::open(3) else { return };
    // A machine of no cloud, without a command that powers off.
    let bare = [("PATH", shop.lab.path("bin").display().to_string())];
    let running = shop.worker().args(&["--terminate-when-idle"]).envs(&bare).start();
    running.wait_for("an empty queue", |event| event.kind() == "idle");
    running.wait_until_said("this machine stays on and may cost money");
    shop.send(&shop.job("late", json!({"train.steps": STEPS})));
    wait_for_job(&running, "completed");
    running.signal(Signal::TERM);
    let life = running.finish().expect_code(75);
    shop.lab.expect_as_undisturbed("late", &[&life]);
    shop.expect_empty();
}

#[test]
fn a_container_leaves_the_power_off_to_its_host() {
    let Some(shop) = Shop::open(3) else { return };
    // A container: it has no command that powers off.
    let host = [("PATH", shop.lab.path("bin").display().to_string()), ("TRAINER_POWER_OFF", "host".into())];
    let life = shop.worker().args(&["--terminate-when-idle"]).envs(&host).finish().expect_code(0);
    assert_eq!(life.of_kind("idle").len(), 1, "{}", life.story());
}

/// A consumer with an endless job, on a machine of this cloud, once the run trains. The metadata server notes the state
/// of the queue at each `POST`.
fn training_on(shop: &Shop, cloud: Cloud) -> (MetadataServer, Running) {
    let server = MetadataServer::start().only(cloud);
    server.note_posts({
        let (moto, queue) = (Arc::clone(&shop.moto), shop.queue.clone());
        move || format!("{:?}", count(&moto, &queue))
    });
    // Only the operator's configuration, which the message names, may say when a machine goes away.
    shop.lab.write_config("run.toml", &shop.lab.config("[notice]\nspare_time = \"stop\"\n"));
    let set = json!({"train.steps": 1_000_000, "train.schedule.kind": "constant", "checkpoint.every": "100000 steps"});
    shop.send(&shop.job("leaving", set));
    let running = shop.worker().envs(&server.envs()).start();
    running.wait_for_step("step", 3);
    (server, running)
}

/// Demands that one request let the machine go, when the copy was visible and the message deleted.
#[track_caller]
fn expect_renewed_before(asked: &[Asked], life: &Finished) {
    let notes: Vec<&str> = asked.iter().map(|asked| asked.note.as_str()).collect();
    assert_eq!(notes, ["[1, 0, 0]"], "to be seen, in flight, delayed\n{}", life.story());
    assert_eq!(states(life), ["claimed", "interrupted"], "{}", life.story());
}

#[test]
fn the_message_is_renewed_before_the_lifecycle_hook_is_completed() {
    let Some(shop) = Shop::open(1) else { return };
    let (server, running) = training_on(&shop, Cloud::Aws);
    // The hook is found before it is needed.
    server.wait_for("/?Action=DescribeLifecycleHooks", 1);
    server.set(LIFECYCLE, "Terminated");
    let life = running.finish().expect_code(75);
    expect_renewed_before(&server.requests_of("/?Action=CompleteLifecycleAction"), &life);
    let kept = server.requests_of("/?Action=RecordLifecycleActionHeartbeat");
    assert_eq!(kept.first().map(|asked| asked.note.as_str()), Some("[0, 1, 0]"), "{}", life.story());
}

#[test]
fn a_machine_is_let_go_even_if_the_queue_does_not_answer() {
    let Some(shop) = Shop::open(1) else { return };
    let (server, running) = training_on(&shop, Cloud::Aws);
    server.wait_for("/?Action=DescribeLifecycleHooks", 1);
    server.note_posts(String::new);
    shop.moto.hang();
    server.set(LIFECYCLE, "Terminated");
    let life = running.finish().expect_code(75).expect_said(&["message was not renewed within 10 s"]);
    assert_eq!(server.requests_of("/?Action=CompleteLifecycleAction").len(), 1, "{}", life.story());
    assert_eq!(shop.api.heard().last().map(Told::event), Some("interrupted"), "{}", life.story());
}

#[test]
fn the_message_is_renewed_before_a_scheduled_event_is_approved() {
    let Some(shop) = Shop::open(1) else { return };
    let (server, running) = training_on(&shop, Cloud::Azure);
    server.wait_for(SCHEDULED_EVENTS, 1);
    server.events(|events| events.push(azure_event("ours", "Preempt", 30, &[INSTANCE])));
    let life = running.finish().expect_code(75);
    let asked = server.requests_of(SCHEDULED_EVENTS);
    let approvals: Vec<Asked> = asked.into_iter().filter(|asked| asked.method == "POST").collect();
    expect_renewed_before(&approvals, &life);
}

#[test]
fn a_machine_leaves_its_group_when_the_queue_stays_empty() {
    let Some(shop) = Shop::open(3) else { return };
    let server = MetadataServer::start().only(Cloud::Aws);
    shop.send(&shop.job("last", json!({})));
    let life = shop.worker().args(&["--terminate-when-idle"]).envs(&server.envs()).finish().expect_code(0);
    assert_eq!(states(&life), ["claimed", "completed"], "{}", life.story());
    assert_eq!(life.of_kind("idle").len(), 1, "{}", life.story());
    let calls = server.requests().into_iter().filter(|asked| asked.path.starts_with("/?Action="));
    let calls: Vec<Asked> = calls.filter(|asked| !asked.path.contains("Describe")).collect();
    let paths: Vec<&str> = calls.iter().map(|asked| asked.path.as_str()).collect();
    let expected = ["/?Action=TerminateInstanceInAutoScalingGroup", "/?Action=CompleteLifecycleAction"];
    assert_eq!(paths, expected, "{}", life.story());
    assert_eq!(parameter(&calls[0].body, "InstanceId").as_deref(), Some(INSTANCE));
    assert_eq!(parameter(&calls[0].body, "ShouldDecrementDesiredCapacity").as_deref(), Some("true"));
    shop.expect_empty();
}

#[test]
fn an_idle_consumer_exits_and_lets_its_machine_go() {
    let Some(shop) = Shop::open(1) else { return };
    let server = MetadataServer::start().only(Cloud::Aws);
    let idle = || {
        let running = shop.leasing_worker("1h", "never").envs(&server.envs()).start();
        running.wait_until_said("waiting for jobs");
        // A request to save although there is nothing to save.
        running.signal(Signal::USR2);
        running
    };
    let running = idle();
    // The hook is found before it is needed.
    server.wait_for("/?Action=DescribeLifecycleHooks", 1);
    server.set(LIFECYCLE, "Terminated");
    let life = running.finish().expect_code(75).expect_said(&["asked to exit", "aws-asg"]);
    assert_eq!(server.requests_of("/?Action=CompleteLifecycleAction").len(), 1, "{}", life.story());

    server.set(LIFECYCLE, "InService");
    let running = idle();
    server.set(SPOT, spot_notice("terminate", 120));
    // Jobs that arrive now are for others.
    running.finish().expect_code(75).expect_said(&["asked to exit", "aws-spot"]);
}

#[test]
fn a_consumer_waits_for_its_gpus_before_its_first_job() {
    let Some(shop) = Shop::open(1) else { return };
    let device = shop.lab.path("gpus/sys/bus/pci/devices/0000:00:1e.0");
    std::fs::create_dir_all(&device).expect("a folder");
    std::fs::write(device.join("vendor"), "0x10de\n").expect("a file");
    std::fs::write(device.join("class"), "0x030200\n").expect("a file");
    shop.send(&shop.job("patient", json!({})));
    let root = [("TRAINER_HOST_ROOT", shop.lab.path("gpus").display().to_string())];
    let life = shop.worker().args(&["--device-wait", "0s"]).envs(&root).finish();
    if cfg!(torch_cuda) {
        let life = life.expect_code(69).expect_said(&["1 NVIDIA devices are on the bus and 0 can be used"]);
        assert!(life.events.is_empty(), "{}", life.story());
        assert_eq!(shop.count(&shop.queue), [1, 0, 0], "nothing was received");
    } else {
        life.expect_code(0).expect_said(&["1 GPUs of this machine are not used: this build has no CUDA"]);
    }
}
