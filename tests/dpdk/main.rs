//! `dpdk`: runs the checks with DPDK's testpmd. `tests/dpdk/run` installs and builds what they need
//! and starts this.
#![forbid(unsafe_code)]

mod cpu;
mod link;
mod owner;
mod testpmd;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;

use crate::link::Link;

/// Something that is shown over a link of its own.
struct Check {
    /// What it shows, in a few words.
    shows: &'static str,
    /// Prints what it sees; an error is what it should not have seen.
    run: fn(&mut Link) -> Result<()>,
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if arguments != ["owner"] {
        eprintln!("usage: dpdk owner      testpmd is the owner, {} checks", owner::CHECKS.len());
        return ExitCode::from(2);
    }
    let mut failed = 0;
    for check in owner::CHECKS {
        println!("=== {}", check.shows);
        let from = Instant::now();
        let result = run(check);
        let took = from.elapsed().as_secs_f64();
        match result {
            Ok(()) => println!("=== passed, {took:.1} s"),
            Err(error) => {
                println!("=== FAILED, {took:.1} s: {error:#}");
                failed += 1;
            }
        }
    }
    println!("{} passed, {failed} failed", owner::CHECKS.len() - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(check: &Check) -> Result<()> {
    let mut link = Link::open()?;
    let result = (check.run)(&mut link);
    if result.is_err() {
        println!("the logs are in {}", link.keep().display());
    }
    result
}
