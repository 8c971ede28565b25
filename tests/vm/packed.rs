//! An owner whose card has packed rings, which its kernel takes if its VMM offers them.

use anyhow::{Result, ensure};
use vhost_pci_tests::Sandbox;

use crate::Scenario;
use crate::setup::{Iommu, Mode, Setup};
use crate::tcp::transfer;
use crate::testbed::{COMMAND, OWNER, PEER, Testbed};

pub const SCENARIO: Scenario = Scenario {
    name: "packed",
    shows: "pings and TCP each way through packed rings (packed=on), also behind an IOMMU; the peer's driver is killed amid traffic",
    run,
};

const BYTES: u64 = 8 << 20;
const ROUNDS: u32 = 5;

fn run(sandbox: &Sandbox) -> Result<()> {
    for mode in Mode::ALL {
        let mut testbed = Testbed::start(sandbox, Setup { packed: true, ..mode.into() })?;
        let result = killed_amid_traffic(&mut testbed, mode.name());
        result.or_else(|error| testbed.explain(&format!("{error:#}")))?;
    }
    let mut testbed =
        Testbed::start(sandbox, Setup { packed: true, iommu: Iommu::Virtio, ..Mode::Poll.into() })?;
    let result = traffic(&mut testbed, Iommu::Virtio.name(), BYTES / 8);
    result.or_else(|error| testbed.explain(&format!("{error:#}")))
}

fn traffic(testbed: &mut Testbed<'_>, name: &str, bytes: u64) -> Result<()> {
    testbed.wait_for_traffic()?;
    let status = testbed.status()?;
    let features = status["links"][0]["owner"]["features"].as_array().cloned().unwrap_or_default();
    ensure!(
        features.iter().any(|feature| feature == "VIRTIO_F_RING_PACKED"),
        "the rings are split: {features:?}"
    );
    println!("{name}: 50 of 50 pings, {}", testbed.ping(50)?);
    let Testbed { owner, peer, .. } = testbed;
    transfer(&format!("{name}: owner to peer"), owner, peer, PEER, bytes)?;
    transfer(&format!("{name}: peer to owner"), peer, owner, OWNER, bytes)?;
    testbed.check_broker()
}

fn killed_amid_traffic(testbed: &mut Testbed<'_>, name: &str) -> Result<()> {
    traffic(testbed, name, BYTES)?;
    let flood = format!("(while :; do ping -c 1000 -i 0.002 -s 1400 {PEER}; done) >/dev/null 2>&1 & echo $!");
    let flood = testbed.owner.sh_ok(&flood, COMMAND)?;
    for round in 1..=ROUNDS {
        testbed.peer.sh_ok("kill -9 $(pidof vhost-pci-guest); sleep 0.1", COMMAND)?;
        testbed.start_peer_network()?;
        let resumed = testbed.wait_for_traffic()?.as_secs_f64();
        println!("{name}, killed {round}: traffic {resumed:.1} s after it");
    }
    testbed.owner.sh_ok(&format!("kill {flood}; killall ping; sleep 0.2"), COMMAND)?;
    // The rings are where they should be: nothing is missing and nothing comes twice.
    println!("{name}: 50 of 50 pings, {}", testbed.ping(50)?);
    let Testbed { owner, peer, .. } = testbed;
    transfer(&format!("{name}, after it: owner to peer"), owner, peer, PEER, BYTES)?;
    transfer(&format!("{name}, after it: peer to owner"), peer, owner, OWNER, BYTES)?;
    testbed.check_broker()
}
