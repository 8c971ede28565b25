//! Checksum and segmentation offload: TCP segments of up to 64 KiB from one kernel to the other.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vhost_pci_tests::Sandbox;

use crate::Scenario;
use crate::setup::{Mode, Setup};
use crate::tcp::transfer;
use crate::testbed::{COMMAND, OWNER, PEER, Testbed};

pub const SCENARIO: Scenario = Scenario {
    name: "offload",
    shows: "checksum and segmentation offload (offloads = true): TCP each way in packets longer than the MTU, SHA-256 equal",
    run,
};

const BYTES: u64 = 16 << 20;
const FEATURES: [&str; 4] =
    ["VIRTIO_NET_F_CSUM", "VIRTIO_NET_F_GUEST_CSUM", "VIRTIO_NET_F_GUEST_TSO4", "VIRTIO_NET_F_HOST_TSO4"];

fn run(sandbox: &Sandbox) -> Result<()> {
    let mut testbed = Testbed::start(sandbox, Setup { config: "offloads = true", ..Mode::Poll.into() })?;
    let result = traffic(&mut testbed);
    result.or_else(|error| testbed.explain(&format!("{error:#}")))
}

fn traffic(testbed: &mut Testbed<'_>) -> Result<()> {
    testbed.wait_for_traffic()?;
    let status = testbed.status()?;
    let features = status["links"][0]["owner"]["features"].as_array().cloned().unwrap_or_default();
    let missing: Vec<_> = FEATURES.iter().filter(|name| !features.iter().any(|has| has == **name)).collect();
    ensure!(missing.is_empty(), "the owner's driver did not accept {missing:?}: {features:?}");
    let Testbed { owner, peer, .. } = testbed;
    transfer("owner to peer", owner, peer, PEER, BYTES)?;
    transfer("peer to owner", peer, owner, OWNER, BYTES)?;
    testbed.check_broker()?;

    // Its counters come when it ends.
    let end = "kill $(pidof vhost-pci-guest); for i in $(seq 100); do grep -q '^{' /tmp/tap.log && break; sleep 0.1; done; \
               grep '^{' /tmp/tap.log";
    let counters = testbed.peer.sh_ok(end, COMMAND)?;
    let counters: Value = serde_json::from_str(counters.trim()).context("tap's counters")?;
    let count = |name: &str| counters[name].as_u64().with_context(|| format!("no {name} in {counters}"));
    for way in ["rx", "tx"] {
        let (long, packets, bytes) = (
            count(&format!("{way}_long"))?,
            count(&format!("{way}_packets"))?,
            count(&format!("{way}_bytes"))?,
        );
        println!("{way}: {long} of {packets} packets ({bytes} bytes) were longer than the MTU");
        ensure!(long > 0, "no packet was longer than the MTU: {counters}");
        // With an MTU of 1500 at most 1460 bytes of payload go by a packet that is not.
        let most = (packets - long) * 1460;
        ensure!(bytes > BYTES && most < BYTES, "{way}: the packets that were not hold all of it");
    }
    ensure!(count("bad_headers")? == 0, "headers were refused: {counters}");
    Ok(())
}
