//! One machine's doubt condemns nothing forever: a machine that garbles all its reads leaves a run as it was, and a
//! verdict is withdrawn once the checkpoint is read whole.

use rustix::process::Signal;
use serde_json::Value;

use crate::rules::sources;
use crate::support::{
    garble::garbled,
    lab::{EVERY, Lab, ORIGIN, STEPS, interrupted},
    proxy::{Fault, Often, Rule},
};

/// Journal records, oldest first.
fn journal(lab: &Lab, run: &str) -> Vec<Value> {
    let keys = lab.keys(run, "journal/").into_iter().filter(|key| key.ends_with(".json"));
    keys.map(|key| serde_json::from_slice(&lab.read(run, &key)).expect("a record")).collect()
}

/// The records of this kind.
fn records(lab: &Lab, run: &str, kind: &str) -> Vec<Value> {
    journal(lab, run).into_iter().filter(|entry| entry["record"]["kind"] == kind).collect()
}

fn expect_nothing_condemned(lab: &Lab, run: &str, story: &str) {
    assert_eq!(records(lab, run, "damaged"), Vec::<Value>::new(), "{story}");
}

/// A healthy machine finds the run as the broken one found it.
fn expect_resumes_from_its_newest(lab: &Lab) {
    let life = lab.resume(ORIGIN).finish().expect_code(0);
    assert_eq!(life.resumed_from(), interrupted().step, "{}", life.story());
    lab.expect_as_undisturbed(ORIGIN, &[&interrupted().life, &life]);
}

/// Flips a bit of the newest checkpoint's weights; returns the key.
fn hurt_the_newest(lab: &Lab) -> String {
    let folder = lab.newest_checkpoint(ORIGIN);
    let key = lab.keys(ORIGIN, &format!("{folder}/model-")).remove(0);
    flip(lab, &key);
    key
}

fn flip(lab: &Lab, key: &str) {
    lab.damage(ORIGIN, key, |bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    });
}

#[test]
fn a_machine_that_garbles_loads_but_not_single_reads_exits_and_says_so() {
    for (how, path) in [("bulk", "its bulk reads"), ("slot", "the memory of snapshot slot 0")] {
        let lab = Lab::on_interrupted_run();
        let life = garbled(lab.resume(ORIGIN), how).finish().expect_code(69);
        let life = life.expect_said(&["this machine garbles what it reads", path, "nothing was condemned"]);
        assert!(life.of_kind("step").is_empty(), "{}", life.story());
        expect_nothing_condemned(&lab, ORIGIN, &life.story());
        expect_resumes_from_its_newest(&lab);
    }
}

/// Bytes from a connection are copied into the slot: the slot's content counts, not the bytes that arrived.
#[test]
fn faulty_slot_memory_is_noticed() {
    let lab = Lab::on_interrupted_run_on_s3();
    let life = garbled(lab.resume(ORIGIN), "slot").finish().expect_code(69);
    let path = "the memory of snapshot slot 0";
    let life = life.expect_said(&["this machine garbles what it reads", path, "nothing was condemned"]);
    assert!(life.of_kind("step").is_empty(), "{}", life.story());
    expect_nothing_condemned(&lab, ORIGIN, &life.story());
    expect_resumes_from_its_newest(&lab);
}

#[test]
fn a_disk_that_reads_differently_each_time_differs_from_a_damaged_checkpoint() {
    let lab = Lab::on_interrupted_run();
    let life = garbled(lab.resume(ORIGIN), "disk").finish().expect_code(69);
    let life = life.expect_said(&["this machine garbles what it reads", "other bytes each time"]);
    expect_nothing_condemned(&lab, ORIGIN, &life.story());
    expect_resumes_from_its_newest(&lab);
}

#[test]
fn no_command_condemns_anything_on_a_machine_that_finds_everything_damaged() {
    let lab = Lab::on_interrupted_run();
    let before = lab.keys(ORIGIN, "checkpoints/");
    let newest = interrupted().step.to_string();
    for from in [&["--from", &newest][..], &[]] {
        let life = garbled(lab.resume(ORIGIN).args(from), "all").finish().expect_code(65);
        assert!(life.of_kind("step").is_empty(), "{}", life.story());
        expect_nothing_condemned(&lab, ORIGIN, &life.story());
        if from.is_empty() {
            let steps: Vec<_> =
                life.of_kind("formed").iter().map(|formed| formed.value["resume_step"].as_u64()).collect();
            assert_eq!(steps, [Some(interrupted().step)], "led the run back\n{}", life.story());
            life.expect_said(&["none of the 3 checkpoints", "from another machine"]);
        }
    }
    for (command, arguments) in [("prune", &["--keep-last", "1"][..]), ("verify", &["--all", "--deep"])] {
        let said = garbled(lab.about(command, ORIGIN).args(arguments), "all").finish().expect_code(65);
        expect_nothing_condemned(&lab, ORIGIN, &said.story());
    }
    assert_eq!(lab.keys(ORIGIN, "checkpoints/"), before);
    lab.expect_all_verify(ORIGIN);
    expect_resumes_from_its_newest(&lab);
}

#[test]
fn a_run_on_a_machine_that_garbles_its_reads_condemns_and_deletes_nothing() {
    let lab = Lab::on_files();
    let text =
        lab.config("\n[checkpoint.keep]\nlast = 2\n").replace("[checkpoint]\n", "[checkpoint]\nscrub = \"1s\"\n");
    lab.write_config("run.toml", &text.replace(&format!("steps = {STEPS}"), "steps = 1000000"));
    let running = garbled(lab.run("rot"), "all").start();
    running.wait_until_said("no checkpoint could be verified");
    running.signal(Signal::TERM);
    let life = running.finish().expect_code(75);
    expect_nothing_condemned(&lab, "rot", &life.story());
    assert_eq!(records(&lab, "rot", "pruned"), Vec::<Value>::new(), "{}", life.story());
    lab.expect_all_verify("rot");
}

#[test]
fn each_checkpoint_read_whole_allows_one_verdict() {
    let lab = Lab::on_interrupted_run();
    let mut hurt = vec![hurt_the_newest(&lab)];
    let middle = format!("checkpoints/s{:08}-g0001/optimizer-", 2 * EVERY);
    hurt.push(lab.keys(ORIGIN, &middle).remove(0));
    flip(&lab, &hurt[1]);
    let life = lab.resume(ORIGIN).hold_after(EVERY + 1).start();
    // With its first commit it may record the checkpoint that it skipped.
    life.wait_until("a verdict", || !records(&lab, ORIGIN, "damaged").is_empty());
    let condemned = records(&lab, ORIGIN, "damaged");
    let life = life.power_off();
    assert_eq!(life.resumed_from(), EVERY, "{}", life.story());
    assert_eq!(condemned[0]["record"]["step"], interrupted().step, "{}", life.story());
    let all = journal(&lab, ORIGIN);
    let place = |entry: &Value| all.iter().position(|other| other == entry).expect("it stands");
    let first = records(&lab, ORIGIN, "committed").into_iter().find(|c| c["record"]["generation"] != 1);
    assert!(place(&condemned[0]) > place(&first.expect("a commit")), "not before another one was read whole");
    // The next verdict needs another proof; the bytes of both stay.
    let second = lab.resume(ORIGIN).finish().expect_code(0);
    lab.expect_as_undisturbed(ORIGIN, &[&interrupted().life, &life, &second]);
    assert!(hurt.iter().all(|key| !lab.read(ORIGIN, key).is_empty()));
}

/// A run with a condemned checkpoint that is whole again; returns its step.
fn wrongly_condemned() -> (Lab, u64) {
    let lab = Lab::on_interrupted_run();
    let key = hurt_the_newest(&lab);
    let life = lab.resume(ORIGIN).finish().expect_code(0);
    assert_eq!(life.resumed_from(), 2 * EVERY, "{}", life.story());
    let condemned = records(&lab, ORIGIN, "damaged");
    assert_eq!(condemned.len(), 1, "{}", life.story());
    // While it is damaged it is refused, even by name.
    let step = interrupted().step.to_string();
    lab.about("verify", ORIGIN).args(&["--step", &step, "--deep"]).finish().expect_code(65);
    let refused = lab.about("resume", ORIGIN).args(&["--from", &step]).finish().expect_code(64);
    refused.expect_said(&["was found damaged, and is when it is read now"]);
    assert!(records(&lab, ORIGIN, "cleared").is_empty());
    flip(&lab, &key);
    (lab, interrupted().step)
}

#[test]
fn verify_deep_withdraws_a_verdict_if_every_byte_is_right() {
    let (lab, step) = wrongly_condemned();
    let named = ["--step", &step.to_string()];
    lab.about("verify", ORIGIN).args(&named).finish().expect_code(0);
    assert!(records(&lab, ORIGIN, "cleared").is_empty(), "sizes take nothing back");
    let told = lab.about("verify", ORIGIN).args(&named).args(&["--deep"]).finish().expect_code(0);
    assert!(told.stdout.contains("had been found damaged and is whole; it is good again"), "{}", told.story());
    let told = told.expect_said(&["is good again"]);
    let cleared = records(&lab, ORIGIN, "cleared");
    assert_eq!(cleared.len(), 1, "{}", told.story());
    // An older program learns that it is too old, and reports no damage.
    assert_eq!((&cleared[0]["format"], &cleared[0]["record"]["step"]), (&2.into(), &step.into()));
    let again = lab.about("verify", ORIGIN).args(&named).args(&["--deep", "--json"]).finish().expect_code(0);
    assert!(again.stdout.contains("\"cleared\":false"), "{}", again.story());
    assert_eq!(records(&lab, ORIGIN, "cleared").len(), 1, "once");
    let listed = lab.about("checkpoints", ORIGIN).finish().expect_code(0);
    assert!(listed.stdout.contains("after doubt") && !listed.stdout.contains("damaged"), "{}", listed.story());
    let life = lab.resume(ORIGIN).args(&["--from", &step.to_string()]).finish().expect_code(0);
    assert_eq!(life.resumed_from(), step, "{}", life.story());
    lab.expect_as_undisturbed(ORIGIN, &[&interrupted().life, &life]);
}

#[test]
fn resume_from_a_condemned_checkpoint_reads_it_first_and_withdraws_the_verdict() {
    let (lab, step) = wrongly_condemned();
    let life = lab.resume(ORIGIN).args(&["--from", &step.to_string()]).finish().expect_code(0);
    assert_eq!(life.resumed_from(), step, "{}", life.story());
    assert!(life.of_kind("warning").iter().any(|event| event.line.contains("good again")), "{}", life.story());
    assert_eq!(records(&lab, ORIGIN, "cleared").len(), 1, "{}", life.story());
    lab.expect_as_undisturbed(ORIGIN, &[&interrupted().life, &life]);
}

#[test]
fn prune_damaged_deletes_only_checkpoints_that_a_second_read_finds_damaged() {
    let (lab, step) = wrongly_condemned();
    let folder = format!("checkpoints/s{step:08}-g0001/");
    let before = lab.keys(ORIGIN, &folder);
    let pruned = lab.about("prune", ORIGIN).args(&["--damaged"]).finish().expect_code(0);
    assert!(pruned.stdout.contains("whole when read again"), "{}", pruned.story());
    assert_eq!(lab.keys(ORIGIN, &folder), before, "{}", pruned.story());
    assert_eq!(records(&lab, ORIGIN, "cleared").len(), 1, "{}", pruned.story());
    lab.expect_all_verify(ORIGIN);
}

/// A store's checksums vouch for the stored bytes, but not for the reader.
#[test]
fn a_machine_that_garbles_its_reads_deletes_no_condemned_checkpoint() {
    let (lab, proxy) = Lab::on_s3_through_proxy(0);
    let running = lab.run(ORIGIN).hold_after(2 * EVERY + 1).start();
    running.wait_for_step("checkpoint", 2 * EVERY);
    running.power_off();
    let key = hurt_the_newest(&lab);
    lab.resume(ORIGIN).finish().expect_code(0);
    assert_eq!(records(&lab, ORIGIN, "damaged").len(), 1);
    flip(&lab, &key);
    let before = lab.keys(ORIGIN, "checkpoints/");
    proxy.arm(Rule { method: "GET", target: "/model-", fault: Fault::FlipResponse(5000), often: Often::Percent(100) });
    let prune = || lab.about("prune", ORIGIN).args(&["--damaged", "--keep-last", "99"]).finish();
    prune().expect_code(69).expect_said(&["the machine itself may garble them"]);
    assert_eq!(lab.keys(ORIGIN, "checkpoints/"), before);
    proxy.disarm();
    let pruned = prune().expect_code(0);
    assert!(pruned.stdout.contains("whole when read again"), "{}", pruned.story());
    assert_eq!(lab.keys(ORIGIN, "checkpoints/"), before);
}

#[test]
fn verdicts_are_written_in_one_place() {
    let writes = |kind: &str| -> Vec<String> {
        let own = |text: &str| text.split("\n#[cfg(test)]").next().unwrap_or_default().contains(kind);
        let found = sources().into_iter().filter(|(name, text)| {
            let counts = !name.starts_with("journal/") && !name.ends_with("tests.rs");
            counts && own(text)
        });
        found.map(|(name, _)| name).collect()
    };
    assert_eq!(writes("Record::Damaged {"), ["checkpoint/condemn.rs"]);
    assert_eq!(writes("Record::Cleared {"), ["checkpoint/condemn.rs"]);
}
