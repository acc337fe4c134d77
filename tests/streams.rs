//! Streams of this program that have no reader, are stalled, were closed before it began, or are on a full device. No
//! run stops, no agent waits and no exit code changes because of them, except for data that was requested on standard
//! output.

use std::{
    fmt,
    io::{PipeReader, Write},
    os::unix::process::ExitStatusExt,
    process::Stdio,
};

use rustix::{
    pipe::{fcntl_getpipe_size, fcntl_setpipe_size},
    process::{Pid, Signal},
};

use crate::support::{
    lab::{EVERY, Lab, ORIGIN, reference},
    trainer::{Finished, Running, Trainer},
};

/// The fault of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Its reader disappears before the first line.
    Gone,
    /// Its reader reads nothing, and the pipe is full.
    StandsStill,
    /// It is closed before the program starts.
    Closed,
    /// It is a full device.
    Full,
}

const HOWS: [How; 4] = [How::Gone, How::StandsStill, How::Closed, How::Full];

/// Which stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    Out,
    Err,
    Both,
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Out => "standard output",
            Self::Err => "standard error",
            Self::Both => "both streams",
        })
    }
}

/// A command with such a stream. Keep the second value for as long as the command runs.
pub fn broken(command: Trainer, which: Which, how: How) -> (Trainer, Option<PipeReader>) {
    // No reader here listens to a redirected stream.
    let shell = |command: Trainer, redirection: &str| match which {
        Which::Out => command.through_shell("", &format!(">{redirection}")).stdout(Stdio::null()),
        Which::Err => command.through_shell("", &format!("2>{redirection}")).stderr(Stdio::null()),
        Which::Both => {
            let command = command.through_shell("", &format!(">{redirection} 2>{redirection}"));
            command.stdout(Stdio::null()).stderr(Stdio::null())
        }
    };
    let piped = |command: Trainer, writer: std::io::PipeWriter| match which {
        Which::Out => command.stdout(writer),
        Which::Err => command.stderr(writer),
        Which::Both => command.stdout(writer.try_clone().expect("one more")).stderr(writer),
    };
    match how {
        How::Closed => (shell(command, "&-"), None),
        How::Full => (shell(command, "/dev/full"), None),
        How::Gone => {
            let (_, writer) = std::io::pipe().expect("a pipe");
            (piped(command, writer), None)
        }
        How::StandsStill => {
            let (reader, mut writer) = std::io::pipe().expect("a pipe");
            fcntl_setpipe_size(&writer, 4096).expect("a small pipe");
            let size = fcntl_getpipe_size(&writer).expect("its size");
            writer.write_all(&vec![b'\n'; size]).expect("fill it");
            (piped(command, writer), Some(reader))
        }
    }
}

/// Waits until the journal of a run has a record that contains this text.
fn recorded(running: &Running, lab: &Lab, run: &str, what: &str) {
    let folder = lab.path("store").join(run);
    // A record that is being written has another name until it is complete.
    let text = |key: &String| std::fs::read_to_string(folder.join(key)).unwrap_or_default();
    running.wait_until(what, || lab.keys(run, "journal/").iter().any(|key| text(key).contains(what)));
}

/// Asks a held run to stop, and releases it.
fn drained(running: Running, lab: &Lab, run: &str, signal: Signal) -> Finished {
    running.held();
    running.signal(signal);
    recorded(&running, lab, run, "\"kind\":\"notice\"");
    running.let_go();
    running.finish().expect_code(75)
}

/// Runs, drains and resumes with such a stream.
fn runs_drains_and_resumes(which: Which, how: How) {
    let (lab, run) = (Lab::on_files(), "broken");
    // With many messages, so that a stalled stream fills up.
    let wordy = [("TRAINER_LOG", "trainer=trace".to_owned())];
    let (first, reader) = broken(lab.run(run).envs(&wordy).hold_after(EVERY + 1), which, how);
    drained(first.start(), &lab, run, Signal::TERM);
    drop(reader);
    let status = lab.about("status", run).args(&["--json"]).finish().expect_code(0);
    let status: serde_json::Value = serde_json::from_str(&status.stdout).expect("an object");
    assert_eq!((&status["lost_steps"], &status["lag_steps"]), (&0.into(), &0.into()), "{which} {how:?}: {status}");

    let (second, _reader) = broken(lab.resume(run).envs(&wordy), which, how);
    second.finish().expect_code(0);
    assert!(lab.export(run) == reference().model, "{which} {how:?}: other weights than the undisturbed run's");
}

#[test]
fn a_run_whose_standard_error_is_broken_drains_and_resumes() {
    HOWS.iter().for_each(|how| runs_drains_and_resumes(Which::Err, *how));
}

#[test]
fn a_run_whose_standard_output_is_broken_drains_and_resumes() {
    HOWS.iter().for_each(|how| runs_drains_and_resumes(Which::Out, *how));
}

#[test]
fn a_run_with_both_streams_broken_drains_and_resumes() {
    HOWS.iter().for_each(|how| runs_drains_and_resumes(Which::Both, *how));
}

#[test]
fn a_reader_that_disappears_in_the_middle_stops_nothing() {
    let (lab, run) = (Lab::on_files(), "left");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let running = lab.run(run).hold_after(EVERY + 1).stderr(writer).start();
    running.held();
    drop(reader);
    let first = drained(running, &lab, run, Signal::TERM);
    assert_eq!(first.last("interrupted").value["lost_steps"], 0, "{}", first.story());
    let second = lab.resume(run).finish().expect_code(0);
    lab.expect_as_undisturbed(run, &[&first, &second]);
}

/// The event loop itself reports a notice with time to spare: it must not wait for the reader.
#[test]
fn a_notice_with_time_to_spare_is_obeyed_while_standard_error_is_stalled() {
    let lab = Lab::on_files();
    let told = lab.path("told");
    let setting = format!("notice.file={:?}", told.display().to_string());
    let command = lab.run("spare").args(&["--set", "train.steps=1000000", "--set", "checkpoint.every=\"1h\""]);
    let (command, _reader) = broken(command.args(&["--set", &setting]), Which::Err, How::StandsStill);
    let running = command.start();
    running.wait_for_step("step", 3);
    // The time of a save must be known, or there would be no estimate.
    running.signal(Signal::USR2);
    let first = running.wait_for("a checkpoint", |event| event.kind() == "checkpoint").step();
    std::fs::write(&told, "3600").expect("write the file");
    running.wait_for("an insurance", |event| event.kind() == "checkpoint" && event.step() > first);
    running.signal(Signal::TERM);
    let life = running.finish().expect_code(75);
    assert_eq!(life.last("interrupted").value["lost_steps"], 0, "{}", life.story());
}

/// Commands that print requested data, and the streams to which they write it.
fn reading_commands(lab: &Lab) -> Vec<(&'static str, Trainer)> {
    let uri = lab.uri();
    let out = lab.path("model-folder");
    let _ = std::fs::remove_dir_all(&out);
    vec![
        ("status", lab.about("status", ORIGIN)),
        ("status --json", lab.about("status", ORIGIN).args(&["--json"])),
        ("checkpoints", lab.about("checkpoints", ORIGIN)),
        ("explain", lab.about("explain", ORIGIN)),
        ("verify", lab.about("verify", ORIGIN)),
        ("runs", lab.command(&["runs", "--store", &uri])),
        ("export", lab.about("export", ORIGIN).args(&["--out", &out.display().to_string()])),
        ("prune", lab.about("prune", ORIGIN).args(&["--keep-last", "9", "--dry-run"])),
        ("generate", lab.about("generate", ORIGIN).args(&["--prompt", "a", "--tokens", "3"])),
        (
            "simulate",
            lab.command(&["simulate", "--lifetimes", "spot", "--mtbf", "2h", "--trials", "40", "--seed", "1"]),
        ),
        ("completions", lab.command(&["completions", "bash"])),
        ("--help", lab.command(&["--help"])),
    ]
}

#[test]
fn requested_data_arrives_whatever_happens_to_standard_error() {
    let lab = Lab::on_interrupted_run();
    for how in HOWS {
        for (name, command) in reading_commands(&lab) {
            let (command, _reader) = broken(command, Which::Err, how);
            let life = command.finish().expect_code(0);
            assert!(!life.stdout.is_empty(), "{name} with standard error {how:?}\n{}", life.story());
        }
        for (code, command) in [(78, lab.about("status", "nobody")), (64, lab.command(&["status", "--no-such-flag"]))] {
            let (command, _reader) = broken(command, Which::Err, how);
            command.finish().expect_code(code);
        }
    }
}

#[test]
fn a_standard_output_that_accepts_nothing_is_an_error_unless_its_reader_has_gone() {
    let lab = Lab::on_interrupted_run();
    for (how, code) in [(How::Gone, 0), (How::Closed, 0), (How::Full, 69)] {
        for (name, command) in reading_commands(&lab) {
            let life = broken(command, Which::Out, how).0.finish();
            assert_eq!(life.code(), Some(code), "{name} with standard output {how:?}\n{}", life.story());
            let named = life.stderr.contains("standard output");
            assert_eq!(named, how == How::Full, "{name} with standard output {how:?}\n{}", life.story());
        }
    }
}

#[test]
fn watching_ends_when_its_reader_has_gone() {
    let lab = Lab::on_files();
    let running = lab.run("watched").hold_after(2).start();
    running.held();
    let watch = lab.about("status", "watched").args(&["--watch"]);
    broken(watch, Which::Out, How::Gone).0.finish().expect_code(0);
}

#[test]
fn streams_closed_at_the_start_are_never_reused() {
    let (lab, run) = (Lab::on_files(), "closed");
    let running = lab.run(run).hold_after(EVERY + 1).through_shell("", "<&- >&- 2>&-");
    let running = running.stdout(Stdio::null()).stderr(Stdio::null()).start();
    let worker = running.held();
    let leads_to = |pid: Pid, fd: u32| {
        let link = std::fs::read_link(format!("/proc/{}/fd/{fd}", pid.as_raw_nonzero())).expect("an open descriptor");
        link.display().to_string()
    };
    for fd in 0..3 {
        assert_eq!(leads_to(running.pid(), fd), "/dev/null", "descriptor {fd} of the agent");
    }
    let kinds = [(0, "socket:"), (1, "/dev/null"), (2, "pipe:")];
    for (fd, kind) in kinds {
        assert!(leads_to(worker, fd).starts_with(kind), "descriptor {fd} of a worker: {}", leads_to(worker, fd));
    }
    assert!(!in_mask(worker, "SigBlk:", Signal::TERM), "a worker does not hold signals back");
    drained(running, &lab, run, Signal::TERM);
}

#[test]
fn sighup_saves_the_last_step_and_loses_none() {
    let (lab, run) = (Lab::on_files(), "hung-up");
    let first = drained(lab.run(run).hold_after(EVERY + 1).start(), &lab, run, Signal::HUP);
    assert_eq!(first.last("notice").value["source"], "sighup", "{}", first.story());
    assert_eq!(first.last("interrupted").value["lost_steps"], 0, "{}", first.story());
    let second = lab.resume(run).finish().expect_code(0);
    lab.expect_as_undisturbed(run, &[&first, &second]);
}

#[test]
fn sighup_that_was_ignored_at_the_start_stays_ignored() {
    let (lab, run) = (Lab::on_files(), "nohup");
    let running = lab.run(run).hold_after(EVERY + 1).through_shell("trap '' HUP;", "").start();
    running.held();
    for pid in running.workers().into_iter().chain([running.pid()]) {
        rustix::process::kill_process(pid, Signal::HUP).expect("send SIGHUP");
    }
    running.let_go();
    let life = running.finish().expect_code(0);
    assert!(life.of_kind("notice").is_empty(), "{}", life.story());
    lab.expect_as_undisturbed(run, &[&life]);
}

/// Whether a process's mask contains a signal: the bit below its number (proc(5)).
fn in_mask(pid: Pid, mask: &str, signal: Signal) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap_or_default();
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix(mask)?.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal.as_raw() - 1) & 1 == 1)
}

/// A terminal that stops jobs in the background which write to it.
#[test]
fn a_run_in_the_background_of_a_terminal_is_not_stopped_by_its_own_output() {
    // Events go to the standard output of before, the terminal's text to standard error.
    const TERMINAL: &str = "import os, pty, sys\n\
        os.dup2(1, 3)\n\
        os.dup2(2, 1)\n\
        job = 'stty tostop; \"$0\" \"$@\" >&3 & wait $!'\n\
        sys.exit(os.waitstatus_to_exitcode(pty.spawn(['bash', '-mc', job] + sys.argv[1:])))";
    let (lab, run) = (Lab::on_files(), "background");
    let life = lab.run(run).under(&["python3", "-c", TERMINAL]).finish().expect_code(0).expect_said(&["completed"]);
    lab.expect_as_undisturbed(run, &[&life]);
}

/// Started with a configuration that does not arrive: the agent has not started yet.
#[test]
fn signals_count_before_the_configuration_is_read() {
    let lab = Lab::on_files();
    let fifo = lab.path("fifo.toml");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().expect("make a pipe with a name");
    assert!(made.success());
    for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
        let commands = [vec!["run", "fifo.toml"], vec!["boot", "fifo.toml", "--run-id", "x"]];
        for (arguments, early) in commands.iter().flat_map(|arguments| [(arguments, true), (arguments, false)]) {
            let running = lab.command(arguments).envs(&[("TRAINER_HOST_ROOT", "/nowhere".to_owned())]).start();
            // Blocked before main, as soon as libraries are mapped; handled in main.
            running.wait_until("signals to be heard", || {
                let handled = in_mask(running.pid(), "SigCgt:", signal);
                handled || early && in_mask(running.pid(), "SigBlk:", signal)
            });
            running.signal(signal);
            running.finish().expect_code(75).expect_said(&["nothing lost"]);
        }
    }
    assert!(lab.keys("x", "").is_empty(), "a run was begun");
}

/// The kernel sends the first process of a container no signal that it does not handle.
#[test]
fn the_first_process_of_a_container_receives_signals_from_its_start() {
    let lab = Lab::on_files();
    let fifo = lab.path("fifo.toml");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().expect("make a pipe with a name");
    assert!(made.success());
    let running = lab.command(&["run", "fifo.toml"]).in_a_container().start();
    let mut first = None;
    running.wait_until("the first process to hear", || {
        first = running.workers().into_iter().find(|pid| in_mask(*pid, "SigCgt:", Signal::TERM));
        first.is_some()
    });
    rustix::process::kill_process(first.expect("waited for"), Signal::TERM).expect("send SIGTERM");
    running.finish().expect_code(75).expect_said(&["nothing lost"]);
}

#[test]
fn commands_that_only_read_end_with_the_signal() {
    let lab = Lab::on_files();
    let running = lab.run("read").hold_after(2).start();
    running.held();
    let watch = lab.about("status", "read").args(&["--watch"]).start();
    watch.wait_until("a first look", || watch.has_said_anything());
    watch.signal(Signal::TERM);
    assert_eq!(watch.finish().status().signal(), Some(Signal::TERM.as_raw()));
}
