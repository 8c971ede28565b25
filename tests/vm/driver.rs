//! The peer's driver goes and comes back, or its VM is paused, while the owner stays.

use anyhow::Result;
use serde_json::json;
use vhost_pci_tests::Sandbox;

use crate::Scenario;
use crate::setup::Mode;
use crate::testbed::{COMMAND, Testbed};

pub const SCENARIO: Scenario = Scenario {
    name: "driver",
    shows: "the peer's driver is killed and started again, and its VM paused, while the owner stays: traffic resumes",
    run,
};

const ROUNDS: u32 = 10;

fn run(sandbox: &Sandbox) -> Result<()> {
    for mode in Mode::ALL {
        let mut testbed = Testbed::start(sandbox, mode)?;
        testbed.wait_for_traffic()?;
        for round in 1..=ROUNDS {
            testbed.peer.sh_ok("kill -9 $(pidof vhost-pci-guest); sleep 0.1", COMMAND)?;
            testbed.start_peer_network()?;
            let resumed = testbed.wait_for_traffic()?.as_secs_f64();
            println!(
                "{}, killed {round}: traffic {resumed:.1} s after it, {}",
                mode.name(),
                testbed.ping(5)?
            );
        }
        for round in 1..=ROUNDS {
            for command in ["stop", "cont"] {
                testbed.peer.qmp(command, &json!({}))?;
            }
            let resumed = testbed.wait_for_traffic()?.as_secs_f64();
            println!(
                "{}, paused {round}: traffic {resumed:.1} s after it, {}",
                mode.name(),
                testbed.ping(5)?
            );
        }
        testbed.check_broker()?;
    }
    Ok(())
}
