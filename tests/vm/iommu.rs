//! An owner whose kernel maps each packet's buffer by itself and takes it back at once: each goes
//! through the broker. Under the default policy, and under the one that widens.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
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
    let name = format!("{} {}", setup.iommu.name(), setup.config);
    let result = packets(&mut testbed, name.trim_end(), pings, bytes);
    result.or_else(|error| testbed.explain(&format!("{error:#}")))
}

fn packets(testbed: &mut Testbed<'_>, name: &str, pings: u32, bytes: u64) -> Result<()> {
    testbed.wait_for_traffic()?;
    let before = Passed::at_rest(testbed)?;
    println!("{name}: {pings} of {pings} pings, {}", testbed.ping(pings)?);
    let Testbed { owner, peer, .. } = testbed;
    transfer(&format!("{name}: owner to peer"), owner, peer, PEER, bytes)?;
    transfer(&format!("{name}: peer to owner"), peer, owner, OWNER, bytes)?;
    let passed = Passed::at_rest(testbed)?.since(before);
    println!("{name}: {passed:?}");
    ensure!(passed.is_whole(), "packets were lost between the two network interfaces");
    testbed.check_broker()?;
    println!("{name}: {}", Figures::of(&testbed.status()?)?);
    Ok(())
}

/// Packets of the two guests' network interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Passed {
    owner_sent: u64,
    peer_received: u64,
    peer_sent: u64,
    owner_received: u64,
}

impl Passed {
    /// What has passed so far, when nothing is on its way.
    fn at_rest(testbed: &mut Testbed<'_>) -> Result<Self> {
        let mut last = Self::now(testbed)?;
        for _ in 0..50 {
            std::thread::sleep(Duration::from_millis(200));
            let now = Self::now(testbed)?;
            if now == last {
                return Ok(now);
            }
            last = now;
        }
        bail!("packets never cease: {last:?}")
    }

    fn since(self, before: Self) -> Self {
        Self {
            owner_sent: self.owner_sent - before.owner_sent,
            peer_received: self.peer_received - before.peer_received,
            peer_sent: self.peer_sent - before.peer_sent,
            owner_received: self.owner_received - before.owner_received,
        }
    }

    fn now(testbed: &mut Testbed<'_>) -> Result<Self> {
        let [owner_sent, owner_received] = counted(&mut testbed.owner, "eth0")?;
        let [peer_sent, peer_received] = counted(&mut testbed.peer, "vp0")?;
        Ok(Self { owner_sent, peer_received, peer_sent, owner_received })
    }

    fn is_whole(&self) -> bool {
        self.owner_sent == self.peer_received && self.peer_sent == self.owner_received
    }
}

/// Packets that an interface sent and received.
fn counted(guest: &mut Guest, interface: &str) -> Result<[u64; 2]> {
    let counters = format!("cd /sys/class/net/{interface}/statistics; echo $(cat tx_packets rx_packets)");
    let text = guest.sh_ok(&counters, COMMAND)?;
    let numbers = text.split_once(' ').context("two numbers")?;
    Ok([numbers.0.parse()?, numbers.1.parse()?])
}
