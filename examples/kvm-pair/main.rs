//! Two virtual machines of a small KVM VMM with the real broker between them: an owner with an
//! ordinary virtio card, and a peer with the vhost-pci device embedded. Shows what embedding
//! takes, and measures notifications (docs/kvm-pair.md).
//!
//! | file | what it holds |
//! |---|---|
//! | `vm`, `vcpu`, `tables`, `layout` | a VM; its processor at CPL 3; what that finds in memory |
//! | `vmm`, `bus` | **what embedding the device takes** |
//! | `driver`, `user` | the device's driver: registers; the window |
//! | `owner`, `peer`, `broker`, `relay`, `bare` | processes |
//! | `child`, `cpu` | processes: this program again; where threads run |
//! | `guest`, `pair` | a guest, and two of them, that exchange notifications |
//! | `measure`, `wakeups`, `samples`, `report` | round trips, and how they are printed |
//! | `check` | what must hold, as programs that a test can call |
//! | `sys` | all `unsafe` |
//!
//! `cargo run --release --example kvm-pair -- --help`

#![deny(unsafe_code)]

mod bare;
mod broker;
mod bus;
mod check;
mod child;
mod cpu;
mod driver;
mod guest;
mod layout;
mod measure;
mod owner;
mod pair;
mod peer;
mod relay;
mod report;
mod samples;
#[allow(unsafe_code)]
mod sys;
mod tables;
mod user;
mod vcpu;
mod vm;
mod vmm;
mod wakeups;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use std::{process, thread};

use clap::{Parser, Subcommand};

use crate::check::Check;
use crate::child::Parent;

/// The status with which the program ends where there is no KVM to be had.
const SKIPPED: u8 = 77;
/// The status with which it ends when it has taken too long.
const TOO_LONG: i32 = 124;

/// Measures notification round trips between two VMs. Ends with status 77, having done
/// nothing, where /dev/kvm cannot be opened.
#[derive(Debug, Parser)]
#[command(max_term_width = 100)]
struct Cli {
    /// Print one JSON object a line, for each mode and direction, instead of a table.
    #[arg(long)]
    json: bool,
    /// Batches.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=1000))]
    batches: u64,
    /// Round trips of a batch, for each mode and direction.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    rounds: u64,
    /// End everything after so many seconds.
    #[arg(long, global = true, default_value_t = 900)]
    time_limit: u64,
    #[arg(long, hide = true, global = true)]
    parent: Option<u32>,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Check something instead.
    #[command(subcommand)]
    Check(Check),
    #[command(hide = true)]
    Broker { config: PathBuf },
    #[command(hide = true)]
    Owner { socket: PathBuf },
    #[command(hide = true)]
    Peer {
        socket: PathBuf,
        #[arg(long)]
        relay: bool,
    },
    #[command(hide = true)]
    Relay,
    #[command(hide = true)]
    Bare { place: usize },
}

fn main() -> ExitCode {
    // Faults of the broker or the device are worth seeing: then the figures mean nothing.
    let level = tracing_subscriber::filter::LevelFilter::WARN;
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).init();
    let cli = Cli::parse();
    let is_parent = matches!(cli.role, None | Some(Role::Check(_)));
    if is_parent && let Err(error) = kvm_ioctls::Kvm::new() {
        println!("skipped: /dev/kvm cannot be opened: {error}");
        return ExitCode::from(SKIPPED);
    }
    match execute(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvm-pair: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(cli: Cli) -> anyhow::Result<()> {
    let parent = || Parent::new(cli.parent);
    match &cli.role {
        None => {
            limit(cli.time_limit)?;
            measure(&cli)
        }
        Some(Role::Check(check)) => {
            limit(cli.time_limit)?;
            println!("{}", check.run()?);
            Ok(())
        }
        Some(Role::Broker { config }) => broker::run(&parent()?, config),
        Some(Role::Owner { socket }) => owner::run(&parent()?, socket),
        Some(Role::Peer { socket, relay }) => peer::run(&parent()?, socket, *relay),
        Some(Role::Relay) => relay::run(&parent()?),
        Some(Role::Bare { place }) => bare::run(&parent()?, *place),
    }
}

fn measure(cli: &Cli) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let progress = |what: &str| eprintln!("kvm-pair: {what}");
    let measured = measure::measure(folder.path(), cli.batches, cli.rounds, progress)?;
    let rows = report::rows(&measured);
    if cli.json {
        for row in &rows {
            println!("{}", serde_json::to_string(row)?);
        }
    } else {
        print!("{}", report::table(&rows));
    }
    measure::verify(&measured)
}

/// Ends this process, and with it those that it has started, when it takes too long.
fn limit(seconds: u64) -> std::io::Result<()> {
    thread::Builder::new().name("time limit".into()).spawn(move || {
        thread::sleep(Duration::from_secs(seconds));
        eprintln!("kvm-pair: not done after {seconds} s");
        process::exit(TOO_LONG);
    })?;
    Ok(())
}
