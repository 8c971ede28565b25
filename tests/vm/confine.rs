//! The peer sees what the owner's card may reach, and nothing else; and not a moment longer than the
//! owner lets it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;
use vhost_pci_tests::Sandbox;

use crate::Scenario;
use crate::figures::Figures;
use crate::programs::{self, Program};
use crate::setup::{Mode, Setup};
use crate::testbed::{COMMAND, Testbed};

pub const SCENARIO: Scenario = Scenario {
    name: "confine",
    shows: "a page of the owner's is in the window while it is mapped and not a moment longer, in 1,000 revocations",
    run,
};

const ROUNDS: u64 = 1000;
const SCAN: Duration = Duration::from_secs(120);
const ALL_ROUNDS: Duration = Duration::from_secs(300);
/// Any number will do.
const SECRET: u64 = 7_201_803;

fn run(sandbox: &Sandbox) -> Result<()> {
    without_iommu(sandbox)?;
    // Small, so that all of it can be searched often.
    let mut testbed = Testbed::boot(sandbox, Setup::vfio("window = \"16MiB\""))?;
    let result = with_iommu(&mut testbed);
    result.or_else(|error| testbed.explain(&format!("{error:#}")))
}

/// The control: the search finds what is there to be found.
fn without_iommu(sandbox: &Sandbox) -> Result<()> {
    // Under TCG to read a GiB takes half a minute.
    let setup = Setup { config: "window = \"256MiB\"", owner_mib: 192, ..Mode::Poll.into() };
    let mut testbed = Testbed::boot(sandbox, setup)?;
    testbed.start_owner_network()?;
    let hold = Program::start(&mut testbed.owner, &format!("hold --secret {SECRET}"))?;
    hold.wait_lines(&mut testbed.owner, 1, COMMAND)?;
    let found = scan(&mut testbed)?;
    println!("without an IOMMU: {found}");
    ensure!(found["with_secret"] == 1, "the secret should be found in its page");
    Ok(())
}

fn with_iommu(testbed: &mut Testbed<'_>) -> Result<()> {
    let revoke = Program::start(&mut testbed.owner, &format!("revoke --secret {SECRET} --rounds {ROUNDS}"))?;
    let started = revoke.wait_lines(&mut testbed.owner, 1, COMMAND)?;
    let found = scan(testbed)?;
    println!("with an IOMMU: {found}; the owner mapped {} B", started["mapped_bytes"]);
    ensure!(found["with_secret"] == 0, "what the owner never mapped is in the window");

    let hammer = Program::start(&mut testbed.peer, "hammer --device auto")?;
    let seen = revoke.wait_lines(&mut testbed.owner, 2, ALL_ROUNDS)?;
    hammer.wait(&mut testbed.peer, COMMAND)?;
    revoke.end(&mut testbed.owner)?;
    println!("revocations: {seen}");
    let millis = |figure: &str| seen[figure].as_f64().unwrap_or_default() / 1e3;
    println!(
        "the owner's unmap took {:.1} ms in the median, {:.1} ms at most",
        millis("unmap_us_median"),
        millis("unmap_us_max")
    );
    let figures = Figures::of(&testbed.status()?)?;
    println!("broker: {figures}");
    ensure!(seen["rounds"] == ROUNDS, "not all rounds were done");
    ensure!(seen["peer"]["found"] == ROUNDS, "a mapped page did not show its secret");
    ensure!(seen["peer"]["late"] == 0, "a page was said to be mapped before it was");
    ensure!(seen["reached_while_mapped"] == ROUNDS, "the peer's stores did not reach a mapped page");
    ensure!(seen["peer"]["leaked"] == 0, "what the owner wrote after its unmap had returned was seen");
    ensure!(seen["changed_after_unmap"] == 0, "the page changed after the owner's unmap had returned");
    ensure!(figures.revoked >= ROUNDS, "fewer revocations than rounds: {figures}");
    testbed.check_broker()
}

fn scan(testbed: &mut Testbed<'_>) -> Result<Value> {
    let from = Instant::now();
    let found = programs::run(&mut testbed.peer, &format!("scan --device auto --secret {SECRET}"), SCAN)?;
    println!("the whole window was read in {:.1} s", from.elapsed().as_secs_f64());
    Ok(found)
}
