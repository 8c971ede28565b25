//! `compare`: vhost-pci beside DPDK's vhost and memif, and beside what the hardware allows, in one
//! run on the same two processors. `tests/bench/compare` installs and builds what it needs and
//! starts this.
//!
//! | file | what it holds |
//! |---|---|
//! | `measure` | rounds and windows |
//! | `probe`, `host` | where the processors are, and who else uses them |
//! | `contender` | what can be measured |
//! | `ours`, `dpdk`, `switch`, `floors` | what is |
//! | `latency`, `counts` | round trips of packets; system calls, allocations, translations |
//! | `allocations` | how often a process that is measured allocates |
//! | `broker`, `link`, `peer`, `board` | a broker, a link, our receiver's process, and its counters |
//! | `content` | whether packets arrive: all, once each, every byte |
//! | `ends` | both owners of a closed loop |
//! | `testpmd` | DPDK's program, as sender or receiver |
//! | `sys` | a bare ring: the only `unsafe` |
//! | `report`, `ratios`, `plot` | the table and the JSON object; the SVG |
#![deny(unsafe_code)]

mod allocations;
mod board;
mod broker;
mod contender;
mod content;
mod counts;
mod dpdk;
mod ends;
mod floors;
mod host;
mod latency;
mod link;
mod measure;
mod ours;
mod peer;
mod plot;
mod probe;
mod ratios;
mod report;
mod switch;
mod sys;
mod testpmd;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::{Parser, Subcommand};
use guest_driver_model::programs::owner::{self, OwnerArgs};
use guest_driver_model::programs::stop::Stop;

use crate::contender::{Contender, Verdict};
use crate::host::Machine;
use crate::measure::Plan;
use crate::report::Report;

/// Measures vhost-pci beside DPDK's vhost and memif. Keeps two processors busy; needs no VM, no
/// hugepages and no privileges.
#[derive(Debug, Parser)]
#[command(max_term_width = 100)]
struct Cli {
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    /// A first answer within 5 minutes
    #[arg(long)]
    quick: bool,
    /// Rounds, in each of which every contender has its turn with every size
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Packet sizes, bytes: 64, 256 and 1500, or 64 and 1500 of a quick run
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u16).range(60..=1514))]
    sizes: Vec<u16>,
    /// Only contenders with one of these in their names; `round trip` stands for the latency,
    /// `counts` for system calls and allocations
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Draw a plot
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(subcommand)]
    role: Option<Role>,
}

/// Processes that the program starts by itself.
#[derive(Debug, Subcommand)]
enum Role {
    #[command(hide = true)]
    Peer(peer::Args),
    /// As `vhost-pci-guest owner`, and says how often it allocates.
    #[command(hide = true)]
    Owner(Box<OwnerArgs>),
}

/// Rounds, unless told otherwise; those of a quick run end by the clock if it comes to that.
const ROUNDS: u32 = 5;
const QUICK_ROUNDS: u32 = 3;
/// Ends before this, all in all, as a start takes up to 5 seconds.
const QUICK: Duration = Duration::from_secs(285);
/// Windows a start.
const WINDOWS: usize = 2;
const QUICK_WINDOWS: usize = 1;
/// Sizes, unless told otherwise.
const SIZES: [u16; 3] = [64, 256, 1500];
const QUICK_SIZES: [u16; 2] = [64, 1500];

fn main() -> ExitCode {
    let level = tracing_subscriber::filter::LevelFilter::INFO;
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).init();
    let cli = Cli::parse();
    let result = match cli.role {
        Some(Role::Peer(args)) => peer::run(args),
        Some(Role::Owner(args)) => {
            allocations::answer();
            owner::run(&args).map_err(|error| anyhow!(error)).context("the owner")
        }
        None => compare(&cli),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn contenders() -> Vec<Box<dyn Contender>> {
    fn boxed<C: Contender + 'static>(some: impl IntoIterator<Item = C>) -> Vec<Box<dyn Contender>> {
        some.into_iter().map(|contender| Box::new(contender) as Box<dyn Contender>).collect()
    }
    let mut all = boxed(ours::OURS);
    all.extend(boxed(dpdk::PAIRS));
    all.extend(boxed(ours::INTO_OURS));
    all.extend(boxed(switch::LOOPS));
    all.extend(boxed([floors::Memcpy]));
    all.extend(boxed(floors::RINGS));
    all.extend(boxed([floors::SpscLines]));
    all
}

/// Those that are asked for: all, if nothing is.
fn chosen(only: &[String]) -> Result<Vec<Box<dyn Contender>>> {
    let mut all = contenders();
    let names = all.iter().map(|contender| contender.name().to_owned());
    let names: Vec<_> = names.chain(latency::names()).chain(["counts".to_owned()]).collect();
    for word in only {
        let known = names.join(", ");
        ensure!(
            names.iter().any(|name| name.contains(word)),
            "--only {word}: no part of a name; there are {known}"
        );
    }
    all.retain(|contender| {
        only.is_empty() || only.iter().any(|word| contender.name().contains(word.as_str()))
    });
    Ok(all)
}

fn compare(cli: &Cli) -> Result<()> {
    let (contenders, latency) = (chosen(&cli.only)?, latency::chosen(&cli.only));
    // Before the first measurement: a machine with one processor has nothing to compare.
    probe::round_trip().context("two processors, 0 and 1, are needed")?;
    let sizes = match (cli.sizes.as_slice(), cli.quick) {
        ([], false) => &SIZES[..],
        ([], true) => &QUICK_SIZES[..],
        (sizes, _) => sizes,
    };
    // Before half an hour is spent on what cannot be written.
    let svg = cli
        .svg
        .as_ref()
        .map(|path| Ok((path, File::create(path).with_context(|| path.display().to_string())?)));
    let svg = svg.transpose().map_err(|error: anyhow::Error| error.context("--svg"))?;
    let begin = Instant::now();
    let sizes: Vec<_> = sizes.iter().map(|size| usize::from(*size)).collect();
    let longest = sizes.iter().copied().max().into_iter().collect();
    let plan = Plan {
        // The longest packets have the most that can go wrong.
        content: if cli.quick { longest } else { sizes.clone() },
        sizes,
        rounds: cli.rounds.unwrap_or(if cli.quick { QUICK_ROUNDS } else { ROUNDS }) as usize,
        windows: if cli.quick { QUICK_WINDOWS } else { WINDOWS },
        until: cli.quick.then_some(begin + QUICK),
        latency,
    };
    let machine = Machine::this(testpmd::version(), testpmd::has_hugepages());
    eprintln!("compare: {}", machine.line());
    // So that processes and directories go before this one does.
    let stop = Stop::on_signals().context("signal handlers")?;
    let counts = (cli.only.is_empty() || cli.only.iter().any(|word| "counts".contains(word.as_str())))
        .then(counts::take);
    let measured = measure::measure(&contenders, &plan, &stop);
    let all: Vec<_> = self::contenders().iter().map(|one| (one.name(), one.kind())).collect();
    let report = Report::new(machine, &contenders, &all, &measured, counts);
    if cli.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", report.table());
    }
    if let Some((path, mut file)) = svg {
        file.write_all(plot::svg(&report.results).as_bytes()).with_context(|| path.display().to_string())?;
        eprintln!("compare: the plot is in {}", path.display());
    }
    let Verdict { corrupted, .. } = measured.verdict;
    ensure!(corrupted == 0, "{corrupted} packets were corrupted");
    Ok(())
}
