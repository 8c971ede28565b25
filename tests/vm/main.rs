//! `vm`: runs scenarios with real virtual machines, by name. Owns the list of them; each has a
//! file of its own beside this one. `tests/vm/run` builds what they need and starts this.
#![forbid(unsafe_code)]

mod beside;
mod blk;
mod boot;
mod bridge;
mod chain;
mod confine;
mod doorbell;
mod driver;
mod figures;
mod hostile;
mod hotplug;
mod iommu;
mod iommu_static;
mod links;
mod migrate;
mod offload;
mod packed;
mod ping;
mod programs;
mod readonly;
mod restart;
mod setup;
mod tcp;
mod testbed;
mod torture;
mod torture_traffic;
mod vf;
mod vf_far_side;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use vhost_pci_tests::Sandbox;

/// Something that is shown with real virtual machines.
struct Scenario {
    name: &'static str,
    /// What it shows, in a few words.
    shows: &'static str,
    /// Prints what it sees; an error is what it should not have seen.
    run: fn(&Sandbox) -> Result<()>,
}

const SCENARIOS: &[Scenario] = &[
    boot::SCENARIO,
    ping::SCENARIO,
    doorbell::SCENARIO,
    tcp::SCENARIO,
    chain::SCENARIO,
    bridge::SCENARIO,
    restart::SCENARIO,
    driver::SCENARIO,
    packed::SCENARIO,
    offload::SCENARIO,
    iommu::SCENARIO,
    iommu_static::SCENARIO,
    confine::SCENARIO,
    readonly::SCENARIO,
    migrate::SCENARIO,
    blk::SCENARIO,
    vf::SCENARIO,
    torture::SCENARIO,
    hostile::SCENARIO,
    hotplug::SCENARIO,
];

/// What follows an option of a scenario on the command line.
fn option(name: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.next().map(|_| arguments.next().unwrap_or_default())
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        for scenario in SCENARIOS {
            println!("{:16} {}", scenario.name, scenario.shows);
        }
        return ExitCode::SUCCESS;
    }
    let mut chosen = Vec::new();
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        if torture::OPTIONS
            .iter()
            .chain(&hostile::OPTIONS)
            .chain(&migrate::OPTIONS)
            .any(|option| option == argument)
        {
            // Who has options reads them by itself.
            arguments.next();
            continue;
        }
        let Some(scenario) = SCENARIOS.iter().find(|scenario| scenario.name == argument) else {
            eprintln!("vm: there is no scenario {argument}; `vm --list` shows what there is");
            return ExitCode::from(2);
        };
        chosen.push(scenario);
    }
    if chosen.is_empty() {
        eprintln!(
            "usage: vm NAME...      runs these scenarios\n       vm --list       shows their names\n       \
             vm migrate [--break payload]   with a driver that leaves out marking: is to fail\n       \
             vm torture [--minutes N] [--seed S] [--only KIND]      how long, which strikes\n       \
             vm hostile [--seconds N] [--seed S] [--only ATTACK]    how long, which attacks"
        );
        return ExitCode::from(2);
    }

    let mut failed = 0;
    for scenario in &chosen {
        println!("=== {}: {}", scenario.name, scenario.shows);
        let from = Instant::now();
        let result = run(scenario);
        let took = from.elapsed().as_secs_f64();
        match result {
            Ok(()) => println!("=== {}: passed, {took:.1} s", scenario.name),
            Err(error) => {
                println!("=== {}: FAILED, {took:.1} s: {error:#}", scenario.name);
                failed += 1;
            }
        }
    }
    println!("{} passed, {failed} failed", chosen.len() - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(scenario: &Scenario) -> Result<()> {
    let mut sandbox = Sandbox::open()?;
    let result = (scenario.run)(&sandbox);
    if result.is_err() {
        sandbox.keep();
        println!("the logs are in {}", sandbox.dir().display());
    }
    result
}
