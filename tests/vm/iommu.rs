//! An owner whose kernel maps each packet's buffer by itself and takes it back at once: each goes
//! through the broker. Under the default policy, and under the one that widens.

use anyhow::{Context, Result};
use vhost_pci_tests::{Guest, Sandbox};

use crate::Scenario;
use crate::figures::Figures;
use crate::setup::{Iommu, Mode, Setup};
use crate::tcp::transfer;
use crate::testbed::{COMMAND, OWNER, PEER, Testbed};

pub const SCENARIO: Scenario = Scenario {
    name: "iommu",
    shows: "100 pings and 16 MiB of TCP each way with an owner behind virtio-iommu and intel-iommu (strict), none lost",
    run,
};

/// Bytes each way. Under `widen` each packet takes a mapping from the peer's VMM, which costs 50 ms.
const BYTES: u64 = 16 << 20;
const BYTES_WIDENED: u64 = 128 << 10;

fn run(sandbox: &Sandbox) -> Result<()> {
    // Each IOMMU with one of the peer's two ways to wait.
    for (iommu, mode) in [(Iommu::Virtio, Mode::Poll), (Iommu::Intel, Mode::Interrupt)] {
        round(sandbox, Setup { iommu, ..mode.into() }, 100, BYTES)?;
    }
    let setup = Setup { iommu: Iommu::Intel, config: "one_way = \"widen\"", ..Mode::Poll.into() };
    round(sandbox, setup, 20, BYTES_WIDENED)
}

fn round(sandbox: &Sandbox, setup: Setup, pings: u32, bytes: u64) -> Result<()> {
    let mut testbed = Testbed::start(sandbox, setup)?;
    let result = packets(&mut testbed, &format!("{} {}", setup.iommu.name(), setup.config), pings, bytes);
    result.or_else(|error| testbed.explain(&format!("{error:#}")))
}

fn packets(testbed: &mut Testbed<'_>, name: &str, pings: u32, bytes: u64) -> Result<()> {
    testbed.wait_for_traffic()?;
    println!("{name}: {pings} of {pings} pings, {}", testbed.ping(pings)?);
    let Testbed { owner, peer, .. } = testbed;
    transfer(&format!("{name}: owner to peer"), owner, peer, PEER, bytes)?;
    transfer(&format!("{name}: peer to owner"), peer, owner, OWNER, bytes)?;
    println!(
        "{name}: TCP segments sent again: owner {}, peer {}",
        retransmitted(owner)?,
        retransmitted(peer)?
    );
    testbed.check_broker()?;
    println!("{name}: {}", Figures::of(&testbed.status()?)?);
    Ok(())
}

/// TCP segments that a guest sent again.
fn retransmitted(guest: &mut Guest) -> Result<u64> {
    let text = guest.sh_ok("grep ^Tcp: /proc/net/snmp", COMMAND)?;
    let mut lines = text.lines().map(str::split_whitespace);
    let (names, values) = lines.next().zip(lines.next()).context("two lines of TCP counters")?;
    let segments = names.zip(values).find(|(name, _)| *name == "RetransSegs");
    Ok(segments.context("RetransSegs")?.1.parse()?)
}
