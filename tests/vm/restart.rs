//! Either side goes and comes back while the other stays.

use anyhow::{Result, ensure};
use vhost_pci_tests::Sandbox;

use crate::Scenario;
use crate::setup::Mode;
use crate::testbed::{BOOT, COMMAND, Testbed};

pub const SCENARIO: Scenario = Scenario {
    name: "restart",
    shows: "either VM reboots, re-binds its driver, is killed and started again while the other stays: traffic resumes",
    run,
};

const ROUNDS: u32 = 10;
const PEER_ROUNDS: u32 = 3;

fn run(sandbox: &Sandbox) -> Result<()> {
    let mut testbed = Testbed::start(sandbox, Mode::Interrupt)?;
    testbed.wait_for_traffic()?;
    let driver = testbed.peer.sh_ok("pidof vhost-pci-guest", COMMAND)?;

    for round in 1..=ROUNDS {
        testbed.owner.reboot(BOOT)?;
        testbed.start_owner_network()?;
        let resumed = testbed.wait_for_traffic()?;
        println!("reboot {round}: traffic {:.1} s after it, {}", resumed.as_secs_f64(), testbed.ping(5)?);
    }
    let rebind = "set -e; cd /sys/bus/virtio/drivers/virtio_net; device=$(basename $(ls -d virtio*))\n\
                  echo $device >unbind; echo $device >bind";
    for round in 1..=ROUNDS {
        testbed.owner.sh_ok(rebind, COMMAND)?;
        testbed.start_owner_network()?;
        let resumed = testbed.wait_for_traffic()?;
        println!("re-bind {round}: traffic {:.1} s after it, {}", resumed.as_secs_f64(), testbed.ping(5)?);
    }
    let now = testbed.peer.sh_ok("pidof vhost-pci-guest", COMMAND)?;
    ensure!(now == driver, "the peer's driver was restarted: process {driver}, now {now}");

    testbed.replace_owner()?;
    let resumed = testbed.wait_for_traffic()?;
    println!("owner's VM killed: traffic {:.1} s after it, {}", resumed.as_secs_f64(), testbed.ping(5)?);
    let now = testbed.peer.sh_ok("pidof vhost-pci-guest", COMMAND)?;
    ensure!(now == driver, "the peer's driver was restarted: process {driver}, now {now}");

    let uptime = "cut -d . -f 1 /proc/uptime";
    let before: u64 = testbed.owner.sh_ok(uptime, COMMAND)?.parse()?;
    for round in 1..=PEER_ROUNDS {
        testbed.replace_peer()?;
        let resumed = testbed.wait_for_traffic()?;
        println!(
            "peer's VM killed {round}: traffic {:.1} s after it, {}",
            resumed.as_secs_f64(),
            testbed.ping(5)?
        );
    }
    let after: u64 = testbed.owner.sh_ok(uptime, COMMAND)?.parse()?;
    ensure!(after >= before, "the owner was restarted");
    testbed.check_broker()
}
