//! What an owner's IOMMU costs: translations by the peer's driver, mapping a page into its
//! window, taking it away, and taking it away while it is used, beside what the processes
//! and system calls of each cost alone (docs/iommu-cost.md).
//!
//! | file | what it holds |
//! |---|---|
//! | `measure` | rounds, in which every figure has its turn |
//! | `translate` | translations, and a memory's latency |
//! | `owner` | the owner: a model of its VMM, in this process |
//! | `peer`, `broker` | their processes |
//! | `floor` | three processes that do nothing but what has to be done |
//! | `child`, `cpu` | processes: this program again; where threads run |
//! | `user`, `sys` | a thread that uses a page; a page that comes and goes |
//! | `samples`, `report` | figures, and how they are printed |
//!
//! `cargo run --release --example iommu-cost -- --help`
#![deny(unsafe_code)]

mod broker;
mod child;
mod cpu;
mod floor;
mod measure;
mod owner;
mod peer;
mod report;
mod samples;
mod sys;
mod translate;
mod user;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::ensure;
use clap::{Parser, Subcommand};

use crate::report::Report;

/// Measures what an owner's IOMMU costs, beside what its parts cost alone. Needs no VM and
/// no privileges.
#[derive(Debug, Parser)]
#[command(max_term_width = 100)]
struct Cli {
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
    /// Rounds; each takes a twentieth of a second on an idle machine. Unless given: as many as
    /// fit into 30 s, at most 250.
    #[arg(long)]
    rounds: Option<usize>,
    /// Other pages of the owner's that are in the window meanwhile, 0 to 200.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=200))]
    shown: u64,
    /// Let the kernel choose the processors of all threads.
    #[arg(long)]
    unpinned: bool,
    #[arg(long, hide = true, value_parser = cpu::Places::parse)]
    places: Option<cpu::Places>,
    #[command(subcommand)]
    role: Option<Role>,
}

/// Processes that the program starts by itself.
#[derive(Debug, Subcommand)]
enum Role {
    #[command(hide = true)]
    Broker { folder: PathBuf },
    #[command(hide = true)]
    Peer { folder: PathBuf, link: String },
    #[command(hide = true)]
    Middle,
    #[command(hide = true)]
    End,
}

fn main() -> ExitCode {
    // Faults of the broker or a model are worth seeing: then the figures mean nothing.
    let level = tracing_subscriber::filter::LevelFilter::WARN;
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).init();
    match execute(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("iommu-cost: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(cli: Cli) -> anyhow::Result<()> {
    let places = if cli.role.is_some() || cli.unpinned { cli.places } else { cpu::places() };
    if let Some(places) = places {
        places.keep();
    }
    match cli.role {
        Some(Role::Broker { folder }) => broker::run(&folder),
        Some(Role::Peer { folder, link }) => peer::run(&folder, &link),
        Some(Role::Middle) => floor::middle(),
        Some(Role::End) => floor::end(),
        None => {
            ensure!(cli.rounds != Some(0), "--rounds 0 measures nothing: give at least 1");
            let start = Instant::now();
            let (figures, rounds) = measure::measure(cli.rounds, cli.shown, measure::progress_line())?;
            let report = Report::new(&figures, rounds, cli.shown, start.elapsed().as_secs_f64());
            if cli.json {
                println!("{}", serde_json::to_string_pretty(&report)?);
            } else {
                print!("{}", report.table());
            }
            Ok(())
        }
    }
}
