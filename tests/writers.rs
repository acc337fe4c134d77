//! Two agents for one run: one continues to commit, the other is fenced, and nothing is lost.

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{
    lab::{EVERY, Lab, ORIGIN, interrupted},
    trainer::Running,
};

fn signal_all(running: &Running, pids: &[Pid], signal: Signal) {
    running.signal(signal);
    for pid in pids {
        let _ = kill_process(*pid, signal);
    }
}

#[test]
fn a_writer_that_slept_while_another_took_over_is_fenced() {
    let lab = Lab::on_files();
    let sleeper = lab.run("fence").hold_after(EVERY + 1).start();
    sleeper.wait_for_step("checkpoint", EVERY);
    sleeper.held();
    let workers = sleeper.workers();
    signal_all(&sleeper, &workers, Signal::STOP);

    let heir = lab.resume("fence").finish().expect_code(0);
    signal_all(&sleeper, &workers, Signal::CONT);
    let sleeper = sleeper.finish().expect_code(79);
    assert!(heir.resumed_from() >= EVERY, "{}", heir.story());
    assert!(sleeper.of_kind("completed").is_empty(), "{}", sleeper.story());
    lab.expect_as_undisturbed("fence", &[&sleeper, &heir]);
    lab.expect_all_verify("fence");
}

/// Its workers have died, and it waits to start them again.
#[test]
fn a_writer_that_slept_between_two_generations_leaves_although_its_heir_is_dead() {
    let lab = Lab::on_files();
    let backoff = ["--set", "restart.backoff=\"10s\""];
    let sleeper = lab.run("fence").args(&backoff).hold_after(EVERY + 1).start();
    sleeper.wait_for_step("checkpoint", EVERY);
    kill_process(sleeper.held(), Signal::KILL).expect("kill a worker");
    sleeper.wait_for("the end of its workers", |event| event.kind() == "worker_died");
    sleeper.signal(Signal::STOP);
    assert!(sleeper.stopped(), "it ended");

    let heir = lab.resume("fence").hold_after(1).start();
    heir.wait_for("a generation", |event| event.kind() == "formed");
    let heir = heir.power_off();
    sleeper.signal(Signal::CONT);
    let sleeper = sleeper.finish().expect_code(79);
    assert_eq!((sleeper.of_kind("formed").len(), heir.of_kind("formed").len()), (1, 1), "{}", sleeper.story());
    let last = lab.resume("fence").finish().expect_code(0);
    lab.expect_as_undisturbed("fence", &[&sleeper, &heir, &last]);
    lab.expect_all_verify("fence");
}

#[test]
fn one_of_two_agents_started_at_once_commits_and_the_other_exits() {
    let lab = Lab::on_interrupted_run();
    let (one, other) = (lab.resume(ORIGIN).start(), lab.resume(ORIGIN).start());
    let (one, other) = (one.finish(), other.finish());
    let (winner, loser) = if one.code() == Some(0) { (one, other) } else { (other, one) };
    let winner = winner.expect_code(0);
    // The second agent may come so late that all is done: then it forms no generation and has nothing to lose.
    if !(loser.code() == Some(0) && (loser.of_kind("formed").is_empty() || winner.of_kind("formed").is_empty())) {
        assert_eq!(loser.code(), Some(79), "exit code\n{}\n{}", loser.story(), winner.story());
    }
    lab.expect_as_undisturbed(ORIGIN, &[&interrupted().life, &loser, &winner]);
    lab.expect_all_verify(ORIGIN);
}

#[test]
fn one_of_two_agents_that_create_a_run_at_once_is_refused() {
    let lab = Lab::on_files();
    let (one, other) = (lab.run("birth").start(), lab.run("birth").start());
    let (one, other) = (one.finish(), other.finish());
    let (winner, loser) = if one.code() == Some(0) { (one, other) } else { (other, one) };
    let winner = winner.expect_code(0);
    assert!(matches!(loser.code(), Some(64 | 79)), "exit code\n{}", loser.story());
    lab.expect_as_undisturbed("birth", &[&winner]);
}
