//! An owner whose driver is a program that maps its memory once: once the broker knows that, packets
//! cost neither a miss nor a change of the window.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vhost_pci_tests::Sandbox;

use crate::Scenario;
use crate::figures::Figures;
use crate::programs::Program;
use crate::setup::Setup;
use crate::testbed::{COMMAND, Testbed};

pub const SCENARIO: Scenario = Scenario {
    name: "iommu-static",
    shows: "an owner's driver in user space maps once (VFIO): a million packets, no miss and no change of the window",
    run,
};

const PACKETS: u64 = 1_000_000;
/// Before they count: every buffer was used by then.
const WARM_UP: u64 = 20_000;
/// The figures stand still when they did not change for so long.
const STILL: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(500);
const TRAFFIC: Duration = Duration::from_secs(240);

fn run(sandbox: &Sandbox) -> Result<()> {
    let mut testbed = Testbed::boot(sandbox, Setup::vfio(""))?;
    let result = packets(&mut testbed);
    result.or_else(|error| testbed.explain(&format!("{error:#}")))
}

fn packets(testbed: &mut Testbed<'_>) -> Result<()> {
    let echo = Program::start(&mut testbed.peer, "echo --device auto --json")?;
    let owner =
        Program::start(&mut testbed.owner, "vfio-owner --device auto --mode echo-check --json-lines")?;
    let started = owner.wait_lines(&mut testbed.owner, 1, COMMAND)?;
    let mapped = started["mapped_bytes"].as_u64().context("how much the owner mapped")?;

    let (first, before) = warm_up(testbed, &owner)?;
    println!("after {first} packets: {before}");
    ensure!(before.in_use == mapped, "the owner mapped {mapped} B, the window shows {} B", before.in_use);

    let from = Instant::now();
    let last = wait_packets(testbed, &owner, first + PACKETS)?;
    let after = Figures::of(&testbed.status()?)?;
    let (packets, took) = (last - first, from.elapsed().as_secs_f64());
    println!("after {packets} more, each there and back, in {took:.1} s: {after}");
    ensure!(after == before, "something changed");
    println!(
        "{packets} packets: 0 misses, 0 changes, 0 bytes copied; the window shows the {} KiB that the owner mapped",
        mapped >> 10
    );

    let sent = owner.end(&mut testbed.owner)?;
    let echoed = echo.end(&mut testbed.peer)?;
    let sent = sent.iter().rfind(|line| line["end"] == true).context("no last line of the owner's")?;
    let echoed = echoed.last().context("no line of the peer's")?;
    println!("owner: {sent}\npeer: {echoed}");
    for (who, traffic) in [("owner", sent), ("peer", echoed)] {
        for count in ["lost", "corrupted", "reordered", "faults", "dropped"] {
            ensure!(traffic[count] == 0, "{who}: {count}: {}", traffic[count]);
        }
    }
    testbed.check_broker()
}

/// Packets that came back, and the figures once they stand still.
fn warm_up(testbed: &mut Testbed<'_>, owner: &Program) -> Result<(u64, Figures)> {
    wait_packets(testbed, owner, WARM_UP)?;
    let deadline = Instant::now() + TRAFFIC;
    let (mut figures, mut since) = (Figures::of(&testbed.status()?)?, Instant::now());
    while since.elapsed() < STILL {
        ensure!(Instant::now() < deadline, "the broker never comes to rest: {figures}");
        std::thread::sleep(PAUSE);
        let now = Figures::of(&testbed.status()?)?;
        if now != figures {
            (figures, since) = (now, Instant::now());
        }
    }
    Ok((received(testbed, owner)?, figures))
}

fn wait_packets(testbed: &mut Testbed<'_>, owner: &Program, count: u64) -> Result<u64> {
    let deadline = Instant::now() + TRAFFIC;
    loop {
        let received = received(testbed, owner)?;
        if received >= count {
            return Ok(received);
        }
        ensure!(Instant::now() < deadline, "only {received} of {count} packets came back");
        std::thread::sleep(PAUSE);
    }
}

fn received(testbed: &mut Testbed<'_>, owner: &Program) -> Result<u64> {
    let lines = owner.lines(&mut testbed.owner)?;
    Ok(lines.iter().rev().find_map(|line: &Value| line["rx_packets"].as_u64()).unwrap_or(0))
}
