//! The command line, as one call into the library; one file for each subcommand.
//!
//! Standard output is data, written only by `output` and by the reporter; standard error is for people, written by the
//! writer in [`report`]: no reader of it can delay anything, or change an exit code. Exit codes are those of [`Kind`];
//! wrong usage is 64, a panic is a bug and exits with 70.
mod adapted;
mod args;
mod boot;
mod checkpoints;
mod completions;
mod data;
mod doctor;
mod drain;
mod explain;
mod export;
mod generate;
mod group;
mod metrics;
mod nodes;
mod output;
mod prune;
mod report_page;
mod resume;
mod run;
mod runs;
mod simulate;
mod status;
mod store;
mod verify;
mod work;

use std::{backtrace::Backtrace, ffi::OsString, io::IsTerminal, panic, process::ExitCode};

use clap::{Parser, Subcommand, error::ErrorKind};

use crate::{
    env,
    error::{Error, Kind, Result},
    ids::RunId,
    notice::inbox,
    report::{self, Screen, init_logging},
    shortage::{self, Shortage},
};

const AFTER_HELP: &str = "\
Exit codes:
  0   completed
  64  wrong usage
  65  data damaged
  69  store unreachable, or this machine is short of memory, open files or disk
  70  bug
  75  interrupted, nothing lost: start again
  76  interrupted, steps lost: start again
  77  permission denied
  78  wrong configuration
  79  another writer has this run
  80  at its cap (run.max_hours, run.max_wait_hours, run.max_cost)
  81  started again and again without a new checkpoint (restart.fruitless_starts)

TRAINER_LOG filters the log on standard error: debug, or trainer::agent=trace,warn.";

/// Commands that the signals to stop do not end, and that listen for them from their first instruction on.
const HEARS: [&str; 4] = ["run", "resume", "boot", "work"];

/// Train LibTorch models on machines that can disappear: checkpoint to an object store, resume by itself.
#[derive(Debug, Parser)]
#[command(name = "trainer", version, after_help = AFTER_HELP, disable_help_subcommand = true, infer_long_args = false)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Run),
    Resume(resume::Resume),
    Boot(Box<boot::Boot>),
    Work(work::Work),
    Runs(runs::Runs),
    Status(status::Status),
    Checkpoints(checkpoints::Checkpoints),
    Explain(explain::Explain),
    Metrics(metrics::Metrics),
    Report(report_page::ReportPage),
    Verify(verify::Verify),
    Drain(drain::Drain),
    Wake(group::Wake),
    Stop(group::Stop),
    Export(export::Export),
    Generate(generate::Generate),
    Prune(prune::Prune),
    Doctor(doctor::Doctor),
    Simulate(Box<simulate::Simulate>),
    #[command(subcommand)]
    Data(data::Data),
    Completions(completions::Completions),
    /// One worker process; started by the agent.
    #[command(name = crate::protocol::WORKER_SUBCOMMAND, hide = true)]
    Worker,
}

/// The whole of a program that trains `task`: every command of the command line, for runs of this task. Call it first
/// and return what it returns.
///
/// Everything works as for a language model, but for what belongs to one: `generate`, `data prepare`, `export --merge`
/// and the settings of `[model]`. Workers are this very program again, so nothing may come before the call.
pub fn main_of(task: impl crate::task::Task) -> ExitCode {
    crate::task::register(task);
    main(std::env::args_os())
}

/// Runs the command line and returns its exit code.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if arguments.get(1).is_some_and(|command| HEARS.iter().any(|name| command == *name)) {
        // This comes first. If it fails in part, later callers report that.
        let _ = inbox::open();
    }
    let traced = env::raw("RUST_BACKTRACE").is_some_and(|value| value != "0");
    panic::set_hook(Box::new(move |info| {
        let trace =
            if traced { format!("{info}\nstack backtrace:\n{}\n", Backtrace::force_capture()) } else { String::new() };
        let said = info
            .payload_as_str()
            .and_then(no_thread)
            .map_or_else(|| format!("{}\n", bug_line(info.payload_as_str(), info.location())), |error| said(&error));
        report::say(format!("{trace}{said}"));
    }));
    let code = panic::catch_unwind(|| parse_and_run(arguments)).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        text.and_then(no_thread).map_or(Kind::Bug, |error| error.kind()).exit_code().into()
    });
    report::flush();
    code
}

/// Libraries panic where the system refuses a thread: tokio, the standard library.
fn no_thread(panic: &str) -> Option<Error> {
    let refused = panic.contains("spawn") && panic.contains("thread");
    let shortage = Shortage::in_words(panic).filter(|_| refused)?;
    Some(Error::new(Kind::Unavailable, panic).with_hint(shortage.hint()))
}

fn bug_line(what: Option<&str>, place: Option<&panic::Location<'_>>) -> String {
    let place = place.map(|place| format!(" ({}:{})", place.file(), place.line())).unwrap_or_default();
    if let Some(task) = crate::task::registered().filter(|_| crate::task::at_work()) {
        return format!("task {task} panicked: {}{place}", what.unwrap_or("it says nothing more"));
    }
    format!("bug: {}{place}; please report this, with the lines above", what.unwrap_or("panic"))
}

fn parse_and_run(arguments: Vec<OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let asked_for = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            let plain = env::raw("NO_COLOR").is_some_and(|value| !value.is_empty());
            let coloured = !plain && if asked_for { output::is_terminal() } else { std::io::stderr().is_terminal() };
            let text = error.render();
            let text = if coloured { text.ansi().to_string() } else { text.to_string() };
            if asked_for {
                return output::emit(&text).map_or_else(|error| ended(&error), |()| ExitCode::SUCCESS);
            }
            report::say(text);
            return Kind::Usage.exit_code().into();
        }
    };
    let screen = match cli.command {
        Command::Run(_) | Command::Resume(_) | Command::Boot(_) | Command::Work(_) | Command::Data(_) => {
            Screen::stderr()
        }
        _ => Screen::plain(),
    };
    init_logging(&screen);
    shortage::allow_open_files();
    cli.command.execute(screen).unwrap_or_else(|error| ended(&error))
}

fn ended(error: &Error) -> ExitCode {
    report::say(said(error));
    error.kind().exit_code().into()
}

/// An error as the user reads it. Names in it may come from a store: they must not control the terminal.
fn said(error: &Error) -> String {
    let plain = crate::report::human::plain;
    let hint = error.hint().map(|hint| format!("hint: {}\n", plain(hint))).unwrap_or_default();
    format!("error: {}\n{hint}", plain(&error.to_string()))
}

impl Command {
    /// The run of a command on an existing one, and the store that was named for it.
    fn named(&self) -> Option<(RunId, String)> {
        let run = match self {
            Self::Resume(command) => &command.run,
            Self::Status(command) => &command.run,
            Self::Checkpoints(command) => &command.run,
            Self::Explain(command) => &command.run,
            Self::Metrics(command) => &command.run,
            Self::Report(command) => &command.run,
            Self::Verify(command) => &command.run,
            Self::Drain(command) => &command.run,
            Self::Export(command) => &command.run,
            Self::Generate(command) => &command.run,
            Self::Prune(command) => &command.run,
            _ => return None,
        };
        Some((run.run_id.clone(), run.store.store.clone()?))
    }

    fn execute(self, screen: Screen) -> Result<ExitCode> {
        match self.named() {
            Some((run_id, store)) => self.act(screen).map_err(|error| store::in_hints(error, &run_id, &store)),
            None => self.act(screen),
        }
    }

    fn act(self, screen: Screen) -> Result<ExitCode> {
        match self {
            Self::Run(command) => command.execute(screen),
            Self::Resume(command) => command.execute(screen),
            Self::Boot(command) => command.execute(screen),
            Self::Work(command) => command.execute(screen),
            Self::Runs(command) => command.execute(),
            Self::Status(command) => command.execute(),
            Self::Checkpoints(command) => command.execute(),
            Self::Explain(command) => command.execute(),
            Self::Metrics(command) => command.execute(),
            Self::Report(command) => command.execute(),
            Self::Verify(command) => command.execute(),
            Self::Drain(command) => command.execute(),
            Self::Wake(command) => command.execute(),
            Self::Stop(command) => command.execute(),
            Self::Export(command) => command.execute(),
            Self::Generate(command) => command.execute(),
            Self::Prune(command) => command.execute(),
            Self::Doctor(command) => command.execute(),
            Self::Simulate(command) => command.execute(),
            Self::Data(command) => command.execute(&screen),
            Self::Completions(command) => command.execute(),
            Self::Worker => crate::worker::main(),
        }
    }
}

#[cfg(test)]
mod tests;
