//! `scale`: many links in one broker, each with the model of an owner's VMM and of a peer's. How
//! long each takes to come up, what it takes of the broker's memory, threads and descriptors,
//! and what the broker does while nobody, or one link of all, is busy. `tests/bench/scale` builds
//! the programs and starts this.
//!
//! | file | what it holds |
//! |---|---|
//! | `broker` | the broker, and what the kernel says of its process |
//! | `fronts` | processes with both front-ends of many links |
//! | `traffic` | one link that is busy |
//! | `report` | targets, the table and the JSON object |
#![forbid(unsafe_code)]

mod broker;
mod fronts;
mod report;
mod traffic;

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use tempfile::TempDir;

use crate::broker::{Broker, Usage};
use crate::fronts::Fronts;
use crate::report::Report;
use crate::traffic::Way;

/// For whatever should take a moment.
const SOON: Duration = Duration::from_secs(60);
/// How long one link is busy.
const BUSY: Duration = Duration::from_secs(2);

/// Brings up many links in one broker and measures what they take. Needs no VM and no privileges.
#[derive(Debug, Parser)]
#[command(max_term_width = 100)]
struct Cli {
    /// Links
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(2..=100_000))]
    links: u32,
    /// Seconds for which nobody does anything
    #[arg(long, default_value_t = 5.0)]
    idle: f64,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    role: Option<Role>,
}

/// Processes that the program starts by itself.
#[derive(Debug, Subcommand)]
enum Role {
    #[command(hide = true)]
    Fronts(fronts::Args),
}

fn main() -> ExitCode {
    let level = tracing_subscriber::filter::LevelFilter::INFO;
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).init();
    let cli = Cli::parse();
    let result = match cli.role {
        Some(Role::Fronts(args)) => fronts::run(&args),
        None => scale(&cli),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("scale: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn scale(cli: &Cli) -> Result<()> {
    let mut folder = tempfile::Builder::new()
        .prefix("scale-")
        // Short and below /tmp: a socket's path may have no more than 107 bytes.
        .tempdir_in("/tmp")
        .context("a directory for sockets and logs")?;
    let result = measure(cli, &folder);
    match &result {
        Ok(report) if cli.json => println!("{}", serde_json::to_string(report)?),
        Ok(report) => print!("{}", report.table()),
        Err(_) => {
            folder.disable_cleanup(true);
            eprintln!("scale: logs are in {}", folder.path().display());
        }
    }
    let missed = result?.missed();
    ensure!(missed.is_empty(), "{}", missed.join("; "));
    Ok(())
}

fn measure(cli: &Cli, folder: &TempDir) -> Result<Report> {
    let idle = Duration::try_from_secs_f64(cli.idle).context("--idle")?;
    let few = Broker::start(folder.path(), "few", 1)?.usage()?;

    let mut broker = Broker::start(folder.path(), "many", cli.links)?;
    let configured = broker.usage()?;
    // The last one's front-ends are programs of their own.
    let fronts = Fronts::start(broker.folder(), cli.links - 1)?;
    let times = fronts.times()?;
    let links_up = broker.links_up()?;
    let up = broker.usage_at_rest(SOON)?;
    thread::sleep(idle);
    let idled = Usage::between(&up, &broker.usage()?);

    let last = cli.links - 1;
    let busy = [Way::Polling, Way::Relayed]
        .into_iter()
        .map(|way| traffic::measure(&mut broker, last, way, BUSY))
        .collect::<Result<Vec<_>>>()?;

    fronts.leave()?;
    let gone =
        |usage: &Usage| usage.threads <= configured.threads && usage.descriptors <= configured.descriptors;
    let left = broker.usage_when(SOON, gone)?;
    // What was kept is for those that come next.
    let fronts = Fronts::start(broker.folder(), cli.links - 1)?;
    let again = broker.usage_at_rest(SOON)?;
    fronts.leave()?;
    broker.usage_when(SOON, gone)?;
    broker.end()?;
    Ok(Report { links: cli.links, links_up, times, few, configured, up, left, again, idle, idled, busy })
}
