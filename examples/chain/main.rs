//! A chain of VMs: packets go from an owner through so many VMs to the other end, and what each VM on
//! the way costs is measured in packets per second of processor time.
//!
//! ```text
//! source ---0--> hop 1 ---1--> hop 2 ---2--> hop 3 ---3--> end
//! owner          peer of two   owner of two  peer of two   owner
//! ```
//!
//! A link joins an owner to a peer, so hops take turns. An odd one is a *peer on two links*
//! (`vhost-pci-guest forward`): it copies each packet once, from one owner's buffers into the
//! other's. An even one is an *owner with two cards* (`vhost-pci-guest owner-forward`): it transmits
//! the very buffer that it received, with no copy. The end is an owner (`owner --mode sink`) behind
//! an odd number of hops, and a peer (`sink`) behind an even one.
//!
//! | file | what it holds |
//! |---|---|
//! | `chain` | the processes of one chain, from the first packet to the last |
//! | `process` | a process: this program again, with what it prints and what it costs |
//! | `report` | figures, and how they are printed |
//!
//! All run the programs' own code, each in a process of its own, with one broker, on whatever
//! processors there are. `cargo run --release --example chain -- --help`
#![forbid(unsafe_code)]

mod chain;
mod process;
mod report;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::ensure;
use clap::{Parser, Subcommand};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use crate::chain::Plan;
use crate::report::Report;

/// Sends packets through chains of VMs, and says what each VM costs. Needs no VM and no privileges.
#[derive(Debug, Parser)]
#[command(max_term_width = 100)]
struct Cli {
    /// Hops between source and end, 1 to 15; several chains in turn: 1,2,3
    #[arg(long, value_delimiter = ',', default_value = "1,2,3,4,5",
        value_parser = clap::value_parser!(u32).range(1..=15))]
    hops: Vec<u32>,
    /// Length of each frame, bytes
    #[arg(long, default_value_t = 64, value_name = "BYTES")]
    size: usize,
    /// How long each chain is measured. One packet in 64 is looked at
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
    /// Send so many packets instead, and look at every byte of each
    #[arg(long)]
    packets: Option<u64>,
    /// Entries of each ring
    #[arg(long, default_value_t = 1024)]
    ring_size: u16,
    /// Packed rings
    #[arg(long)]
    packed: bool,
    /// How hops and ends wait
    #[arg(long, default_value = "adaptive=0", value_name = "poll|interrupt|adaptive[=MICROSECONDS]")]
    wait: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    role: Option<Role>,
}

/// Processes that the program starts by itself.
#[derive(Debug, Subcommand)]
enum Role {
    #[command(hide = true)]
    Broker { folder: PathBuf, links: u32 },
    /// `vhost-pci-guest`
    #[command(hide = true, disable_help_flag = true)]
    Guest {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    match execute(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("chain: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(cli: Cli) -> anyhow::Result<()> {
    if cli.role.is_some() {
        // Whatever becomes of the parent, nothing of the chain is left running.
        set_pdeathsig(Signal::SIGKILL)?;
    }
    match cli.role {
        Some(Role::Broker { folder, links }) => return process::broker(&folder, links),
        Some(Role::Guest { arguments }) => return guest_driver_model::programs::main(arguments),
        None => {}
    }
    ensure!(cli.seconds > 0.0, "--seconds {} measures nothing: give more than 0", cli.seconds);
    let Cli { size, seconds, packets, ring_size, packed, ref wait, .. } = cli;
    let mut report = Report { size, ring_size, packed, wait: wait.clone(), chains: Vec::new() };
    for hops in cli.hops {
        let plan = Plan { hops, size, seconds, packets, ring_size, packed, wait };
        let measured = chain::run(&plan)?;
        eprintln!("chain: {}", measured.line());
        report.chains.push(measured);
    }
    if cli.json {
        println!("{}", serde_json::to_string_pretty(&report.object())?);
    } else {
        print!("{}", report.table());
    }
    report.check()
}
