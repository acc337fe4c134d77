//! The project's benchmark: the cost of a checkpoint for the training loop, the time until it is durable, and the
//! restore.
//!
//! ```text
//! benches/run        figures own     trainer alone: file:// and s3://, the fastest client's share, a state of 2 GB
//! benches/peers/run  figures peers   trainer and PyTorch DCP, alternating, and the ratios between them
//!                    figures transfer  bytes up and down with no training: MB/s and CPU time
//!                    figures journal   opening a run of a million records: seconds and requests
//!                    figures serve-s3  the S3 server that all of them talk to, as a process of its own
//! ```
//! A contender is a command that prints `trainer`'s own JSON events; `peers/peer.py` prints them too, so both go
//! through the same reading, the same arithmetic ([`figures`]) and the same tables ([`report`]). A benchmark reports
//! and asserts nothing about time; memory has a bound ([`large`]).
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a benchmark that meets what it does not expect ends")]
#![allow(clippy::disallowed_methods, reason = "it polls other processes from threads of its own")]

mod contender;
mod figures;
mod group;
mod journal;
mod lab;
mod large;
mod machine;
mod report;
#[path = "../tests/support/s3.rs"]
#[expect(dead_code, reason = "the tests look into the server, the benchmarks only talk to it")]
mod s3;
mod suite;
mod transfer;

use std::{io::Read, process::ExitCode};

use clap::{Args, Parser, Subcommand};

type Result<T> = anyhow::Result<T>;

#[derive(Parser)]
struct Command {
    #[command(subcommand)]
    what: What,
    /// Given by `cargo bench`
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum What {
    /// trainer alone
    Own(Settings),
    /// trainer and PyTorch, alternating
    Peers {
        #[command(flatten)]
        settings: Settings,
        /// A Python with torch and s3torchconnector
        #[arg(long)]
        python: std::path::PathBuf,
    },
    /// trainer's transfers and the barest client's: MB/s and CPU time
    Transfer {
        /// Size of each of the two files, MiB
        #[arg(long, default_value_t = 512)]
        mib: u64,
        /// Rounds that count, after one that does not
        #[arg(long, default_value_t = 5)]
        rounds: u32,
        /// The most requests at once
        #[arg(long, default_value_t = 16)]
        concurrency: u32,
        /// Size of a part, MiB
        #[arg(long, default_value_t = 16)]
        part_mib: u32,
        /// Folder for the files
        #[arg(long, default_value = "target")]
        scratch: std::path::PathBuf,
    },
    /// Opening a run that has lived for months: seconds and requests, with summaries and without
    Journal {
        /// Records of its journal
        #[arg(long, default_value_t = 130_000)]
        records: u64,
        /// A journal's first record
        #[arg(long, default_value = "tests/fixtures/formats/v1/journal-created.json")]
        created: std::path::PathBuf,
        /// Folder for the files
        #[arg(long, default_value = "target")]
        scratch: std::path::PathBuf,
    },
    /// Several nodes on this machine: what the loss of one costs, and an idle agent
    Group {
        /// Rounds, each of five losses
        #[arg(long, default_value_t = 3)]
        rounds: u32,
        /// Prove the script: nothing is kept, and no idle group is measured
        #[arg(long)]
        quick: bool,
    },
    /// The S3 server: prints its endpoint, serves until its standard input ends
    ServeS3,
}

/// Options of every suite.
#[derive(Args)]
struct Settings {
    /// One short round that proves the scripts; its figures mean little and are not kept
    #[arg(long)]
    quick: bool,
    /// Rounds; each runs every contender once [default: 3, or 1 with --quick]
    #[arg(long)]
    rounds: Option<u32>,
    /// Threads of one rank [default: cores / 2]
    #[arg(long)]
    threads: Option<usize>,
    /// Only contenders and parts whose name contains this: "disk", "S3", "memory"
    #[arg(long)]
    only: Option<String>,
}

fn main() -> ExitCode {
    let outcome = match Command::parse().what {
        What::Own(settings) => suite::own(&settings),
        What::Peers { settings, python } => suite::peers(&settings, &python),
        What::Transfer { mib, rounds, concurrency, part_mib, scratch } => {
            transfer::run(transfer::Task { mib, rounds, concurrency, part_mib }, &scratch)
        }
        What::Journal { records, created, scratch } => journal::run(records, &created, &scratch),
        What::Group { rounds, quick } => group::run(rounds, quick),
        What::ServeS3 => serve(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("benches: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> Result<()> {
    let server = s3::S3Server::start();
    println!("{}", server.endpoint());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
