//! The owner's kernel pings the peer through the window.

use anyhow::{Result, ensure};
use vhost_pci_tests::Sandbox;

use crate::Scenario;
use crate::setup::Mode;
use crate::testbed::Testbed;

pub const SCENARIO: Scenario = Scenario {
    name: "ping",
    shows: "100 pings from one VM's kernel to another's, none lost, with the peer polling and with interrupts",
    run,
};

fn run(sandbox: &Sandbox) -> Result<()> {
    for mode in Mode::ALL {
        let mut testbed = Testbed::start(sandbox, mode)?;
        testbed.wait_for_traffic()?;
        let before = testbed.status()?;
        println!("{}: 100 of 100, {}", mode.name(), testbed.ping(100)?);
        testbed.check_broker()?;
        let after = testbed.status()?;
        let link = &after["links"][0];
        ensure!(link["state"] == "up", "the link is {}", link["state"]);
        ensure!(link["vrings"][0]["state"] == "live" && link["vrings"][1]["state"] == "live");
        let driver = match mode {
            Mode::Poll => "polling",
            Mode::Interrupt => "interrupt",
        };
        ensure!(link["peer"]["driver"] == driver, "the driver is {}", link["peer"]["driver"]);
        let kicks = |status: &serde_json::Value| status["links"][0]["counters"]["kicks_relayed"].as_u64();
        let kicked = kicks(&after).zip(kicks(&before)).map(|(after, before)| after - before);
        match mode {
            Mode::Poll => ensure!(kicked == Some(0), "a polling peer was kicked: {kicked:?}"),
            Mode::Interrupt => ensure!(kicked >= Some(1), "no kick was relayed: {kicked:?}"),
        }
    }
    Ok(())
}
