//! The program on these machines, one node a run.

use std::time::Instant;

use rustix::process::Signal;

use super::{Site, on_network};
use crate::{
    notices::{heard, interrupted_and_resumed, long},
    support::{
        lab::{EVERY, STEPS},
        metadata::{Cloud, MetadataServer, SPOT, spot_notice},
    },
};

#[test]
fn a_run_goes_on_on_another_machine() {
    on_network(2, |network| {
        let site = Site::new(network);
        let running = site.on(1, site.lab.run("moved")).hold_after(EVERY + 1).start();
        running.wait_for_step("checkpoint", EVERY);
        running.held();
        running.signal(Signal::TERM);
        running.wait_for("a notice", |event| event.kind() == "notice");
        running.let_go();
        let first = running.finish().expect_code(75);
        let second = site.on(2, site.lab.resume("moved")).finish().expect_code(0);
        assert_eq!(Some(second.resumed_from()), first.last("interrupted").step(), "{}", second.story());
        site.lab.expect_as_undisturbed("moved", &[&first, &second]);
    });
}

/// The run trains on meanwhile: every step is done before the cable is plugged in again, and none of them is stored.
#[test]
fn a_machine_without_its_cable_trains_on_and_commits_when_it_is_back() {
    on_network(1, |network| {
        if !network.is_real("a_machine_without_its_cable_trains_on_and_commits_when_it_is_back") {
            return;
        }
        let site = Site::new(network);
        let running = site.on(1, site.lab.run("unplugged")).hold_after(EVERY + 1).start();
        running.wait_for_step("checkpoint", EVERY);
        running.held();
        network.link_down(1);
        let stored = || site.lab.keys("unplugged", "journal/").len() + site.lab.keys("unplugged", "checkpoints/").len();
        let before = stored();
        running.let_go();
        running.wait_for_step("step", STEPS);
        assert_eq!(stored(), before, "stored over a cable that is pulled");
        assert_eq!(running.events("checkpoint").len(), 1);
        network.heal(1);
        let life = running.finish().expect_code(0);
        assert_eq!(life.of_kind("formed").len(), 1, "{}", life.story());
        assert_eq!(life.committed().last(), Some(&STEPS), "{}", life.story());
        site.lab.expect_as_undisturbed("unplugged", &[&life]);
    });
}

#[test]
fn a_notice_reaches_the_machine_that_it_is_for() {
    on_network(2, |network| {
        if !network.is_real("a_notice_reaches_the_machine_that_it_is_for") {
            return;
        }
        let site = Site::new(network);
        let [here, elsewhere] =
            [1, 2].map(|node| MetadataServer::start_on(network.place(node).listen_for_metadata()).only(Cloud::Aws));
        // The firmware says whose machine it is, and the service is where that cloud has it: nothing names its address.
        let firmware = site.lab.path("root/sys/class/dmi/id");
        std::fs::create_dir_all(&firmware).expect("folder of the firmware's tables");
        std::fs::write(firmware.join("sys_vendor"), "Amazon EC2\n").expect("write the vendor");
        let on_aws = [
            ("TRAINER_HOST_ROOT", site.lab.path("root").display().to_string()),
            ("AWS_EC2_METADATA_DISABLED", "false".to_owned()),
        ];
        let command = long(&site.lab).args(&["--set", "notice.lifecycle_hook=\"none\""]).envs(&on_aws);
        let running = site.on(1, command).start();
        running.wait_for_step("step", 3);
        here.wait_for(SPOT, 1);
        elsewhere.set(SPOT, spot_notice("terminate", 120));
        here.wait_for(SPOT, 3);
        assert!(running.events("notice").is_empty(), "another machine's notice was heard");
        here.set(SPOT, spot_notice("terminate", 120));
        heard(&running, "aws-spot");
        let life = running.finish();
        assert!(elsewhere.requests().is_empty(), "another machine's service was asked");
        interrupted_and_resumed(&site.lab, &life, "aws-spot");
    });
}

/// A cut node is silent for the patience of a reader of its heartbeat, half a minute of real time.
#[test]
fn another_machine_takes_over_from_one_that_is_cut_off() {
    if std::env::var_os("TRAINER_TESTS_ALL").is_none() {
        eprintln!("SKIPPED: another_machine_takes_over_from_one_that_is_cut_off: scripts/test --all runs it");
        return;
    }
    on_network(2, |network| {
        if !network.is_real("another_machine_takes_over_from_one_that_is_cut_off") {
            return;
        }
        let site = Site::new(network);
        let cut = site.on(1, site.lab.run("cut")).hold_after(EVERY + 1).start();
        cut.wait_for_step("checkpoint", EVERY);
        cut.held();
        network.cut(1);
        let begun = Instant::now();
        let heir = site.on(2, site.lab.resume("cut")).start();
        heir.wait_for("a generation", |event| event.kind() == "formed");
        eprintln!("from the cut to the next generation: {:.1} s", begun.elapsed().as_secs_f64());
        let heir = heir.finish().expect_code(0);
        let dead = heir.last("found_dead");
        assert_eq!(dead.value["same_machine"], false, "{}", heir.story());
        assert_eq!(heir.resumed_from(), EVERY, "{}", heir.story());
        network.heal(1);
        let cut = cut.finish().expect_code(79);
        assert!(cut.of_kind("completed").is_empty(), "{}", cut.story());
        site.lab.expect_as_undisturbed("cut", &[&cut, &heir]);
        site.lab.expect_all_verify("cut");
    });
}
