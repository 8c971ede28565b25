//! A page that the owner lets its card only read: under the default policy no store of the peer's
//! reaches it, and traffic flows.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vhost_pci_tests::Sandbox;

use crate::Scenario;
use crate::figures::Figures;
use crate::programs::{self, Program};
use crate::setup::Setup;
use crate::testbed::{COMMAND, Testbed};

pub const SCENARIO: Scenario = Scenario {
    name: "readonly",
    shows: "no write of the peer's reaches what the owner lets its card only read; `widen` says that it does otherwise",
    run,
};

const SECRET: u64 = 31_337;
const PROBE: Duration = Duration::from_secs(120);
const PACKETS: u64 = 20_000;

fn run(sandbox: &Sandbox) -> Result<()> {
    for (config, check) in [
        ("one_way = \"refuse\"\nwindow = \"16MiB\"", refused as fn(&mut Testbed<'_>) -> Result<()>),
        ("one_way = \"widen\"\nwindow = \"16MiB\"", widened),
    ] {
        let mut testbed = Testbed::boot(sandbox, Setup::vfio(config))?;
        let result = check(&mut testbed);
        result.or_else(|error| testbed.explain(&format!("{error:#}")))?;
    }
    Ok(())
}

fn refused(testbed: &mut Testbed<'_>) -> Result<()> {
    let (owner, seen) = probe(testbed)?;
    println!("refuse: {seen}");
    ensure!(seen["fetch"] == serde_json::json!(["done"]) && seen["fetched_right"] == FETCHES);
    ensure!(seen["store"] == serde_json::json!(["denied", "denied"]), "a store was not denied");
    ensure!(seen["map_read"] == "copy", "mapped for reading");
    ensure!(seen["map_write"] == "denied" && seen["map_read_write"] == "denied", "mapped for writing");
    ensure!(seen["in_table"] == false, "the page is in the mapping table");
    let status = testbed.status()?;
    ensure!(status["links"][0]["window"]["widened"] == false, "not widened");

    let lines = traffic(testbed, owner)?;
    let page = lines.last().context("no last line")?;
    ensure!(page["read_only_page_intact"] == true, "the page was changed");
    println!("refuse: the page is intact; {}", Figures::of(&testbed.status()?)?);
    testbed.check_broker()
}

fn widened(testbed: &mut Testbed<'_>) -> Result<()> {
    let (owner, seen) = probe(testbed)?;
    println!("widen: {seen}");
    ensure!(seen["map_read"] == "done", "not mapped for reading");
    let status = testbed.status()?;
    let window = &status["links"][0]["window"];
    ensure!(window["one_way"] == "widen" && window["widened"] == true, "no flag in status: {window}");
    let warning = testbed.broker_log();
    let warning = warning.lines().find(|line| line.contains("WARN") && line.contains("widen"));
    println!("widen: the broker warns: {}", warning.context("the broker gave no warning")?);
    traffic(testbed, owner)?;
    testbed.check_broker()
}

/// Often enough for the broker to look whether the page can be mapped.
const FETCHES: u32 = 20;

/// Starts an owner with a read-only page, and has the peer try it.
fn probe(testbed: &mut Testbed<'_>) -> Result<(Program, Value)> {
    let command =
        format!("vfio-owner --mode echo-check --json-lines --packets {PACKETS} --read-only {SECRET}");
    let owner = Program::start(&mut testbed.owner, &command)?;
    let started = owner.wait_lines(&mut testbed.owner, 1, COMMAND)?;
    let iova = started["read_only_iova"].as_u64().context("where the page is")?;
    let command = format!("probe --device auto --iova {iova} --secret {SECRET} --fetches {FETCHES} --spray");
    Ok((owner, programs::run(&mut testbed.peer, &command, PROBE)?))
}

/// Lets the owner's packets flow to their end. Gives what it printed.
fn traffic(testbed: &mut Testbed<'_>, owner: Program) -> Result<Vec<Value>> {
    let echo = Program::start(&mut testbed.peer, "echo --device auto --json")?;
    let lines = owner.wait(&mut testbed.owner, PROBE)?;
    echo.end(&mut testbed.peer)?;
    let end = lines.iter().rfind(|line| line["end"] == true).context("no line with the owner's counters")?;
    println!("owner: {end}");
    ensure!(end["lost"] == 0 && end["corrupted"] == 0 && end["rx_packets"].as_u64() >= Some(PACKETS));
    Ok(lines)
}
