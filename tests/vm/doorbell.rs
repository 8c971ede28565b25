//! Notifications between two unmodified QEMUs without the broker: the peer's VM has QEMU's
//! `ivshmem-doorbell`, which takes the owner's eventfds.
//!
//! QEMU 11.1.3 without KVM does not survive a signal to an eventfd of a function that was unplugged
//! (it goes on watching it). So the function is unplugged here when the owner has made new ones.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use vhost_pci_tests::Sandbox;

use crate::Scenario;
use crate::setup::{DOORBELL_SOCKET, Mode, Setup};
use crate::testbed::{BOOT, COMMAND, PEER, Testbed};

pub const SCENARIO: Scenario = Scenario {
    name: "doorbell",
    shows: "1000 pings between unmodified QEMUs by ivshmem-doorbell, the broker asleep; a reboot of the owner, \
            vectors used up, the function plugged anew",
    run,
};

/// How long a change of the way may take: the peer's driver looks once a second.
const SOON: Duration = Duration::from_secs(30);
/// How long a broker sleeps that has nothing left to do: a link's clock may still wake up at a
/// deadline that was met, two seconds after a change.
const QUIET: Duration = Duration::from_secs(3);

fn run(sandbox: &Sandbox) -> Result<()> {
    direct(sandbox)?;
    used_up(sandbox)
}

fn setup(vectors: u16) -> Setup {
    Setup { doorbell: Some(vectors), ..Mode::Interrupt.into() }
}

/// With vectors enough.
fn direct(sandbox: &Sandbox) -> Result<()> {
    let mut testbed = Testbed::start(sandbox, setup(8))?;
    testbed.wait_for_traffic()?;
    wait_for_ways(&mut testbed, "doorbell", "doorbell")?;
    quiet_pings(&mut testbed, "8 vectors", 1000)?;

    testbed.owner.reboot(BOOT)?;
    testbed.start_owner_network()?;
    testbed.wait_for_traffic()?;
    wait_for_ways(&mut testbed, "doorbell", "doorbell")?;
    quiet_pings(&mut testbed, "the owner rebooted", 100)?;

    // Another driver process takes the function over, with the vectors that it has.
    testbed.peer.sh_ok("kill -9 $(pidof vhost-pci-guest); sleep 0.1", COMMAND)?;
    testbed.start_peer_network()?;
    testbed.wait_for_traffic()?;
    wait_for_ways(&mut testbed, "doorbell", "doorbell")?;
    quiet_pings(&mut testbed, "the peer's driver was killed", 100)?;

    for command in ["stop", "cont"] {
        testbed.peer.qmp(command, &json!({}))?;
    }
    testbed.wait_for_traffic()?;
    wait_for_ways(&mut testbed, "doorbell", "doorbell")?;
    quiet_pings(&mut testbed, "the peer's VM was paused", 100)?;

    testbed.peer.reboot(BOOT)?;
    testbed.start_peer_network()?;
    testbed.wait_for_traffic()?;
    wait_for_ways(&mut testbed, "doorbell", "doorbell")?;
    quiet_pings(&mut testbed, "the peer rebooted", 100)?;
    testbed.check_broker()
}

/// With two vectors, which one start of the owner's device uses up.
fn used_up(sandbox: &Sandbox) -> Result<()> {
    let mut testbed = Testbed::start(sandbox, setup(2))?;
    testbed.wait_for_traffic()?;
    wait_for_ways(&mut testbed, "doorbell", "doorbell")?;
    quiet_pings(&mut testbed, "2 vectors", 100)?;

    testbed.owner.reboot(BOOT)?;
    testbed.start_owner_network()?;
    testbed.wait_for_traffic()?;
    let reason = wait_for_ways(&mut testbed, "relayed", "doorbell")?.context("no reason is given")?;
    let before = counter(&testbed, "kicks_relayed")?;
    let times = testbed.ping(200)?;
    let relayed = counter(&testbed, "kicks_relayed")? - before;
    ensure!(relayed > 0, "no kick was relayed");
    println!("vectors used up: 200 of 200, {times}, {relayed} kicks relayed, \"{reason}\"");

    // Ten seconds or more, within which the function is plugged anew.
    testbed.owner.sh_ok(&format!("ping -c 1000 -i 0.01 -W 5 {PEER} >/tmp/plug.log 2>&1 &"), COMMAND)?;
    plug_anew(&mut testbed)?;
    wait_for_ways(&mut testbed, "doorbell", "doorbell")?;
    let over = "while pidof ping >/dev/null; do sleep 0.1; done; tail -n 2 /tmp/plug.log";
    let pings = testbed.owner.sh_ok(over, 2 * COMMAND)?;
    ensure!(
        pings.contains("1000 packets transmitted, 1000 packets received"),
        "while the function was plugged anew: {pings}"
    );
    println!("while the function was plugged anew: {}", pings.replace('\n', ", "));
    quiet_pings(&mut testbed, "plugged anew", 100)?;
    testbed.check_broker()
}

/// Pings while nothing wakes the broker.
fn quiet_pings(testbed: &mut Testbed<'_>, when: &str, count: u32) -> Result<()> {
    let relayed = counter(testbed, "notifications_relayed")?;
    let switches = asleep(testbed)?;
    let times = testbed.ping_every(count, 0.01)?;
    let switches = testbed.broker_switches()? - switches;
    let relayed = counter(testbed, "notifications_relayed")? - relayed;
    println!("{when}: {count} of {count}, {times}, {relayed} relayed, {switches} switches of the broker");
    if relayed != 0 || switches != 0 {
        testbed.explain("the broker took part")?;
    }
    Ok(())
}

/// Waits until the broker has slept for a while: what came before has all been done, the answer
/// to `status` included. Gives how often its threads have gone to sleep.
fn asleep(testbed: &mut Testbed<'_>) -> Result<u64> {
    let deadline = Instant::now() + SOON;
    let (mut switches, mut since) = (testbed.broker_switches()?, Instant::now());
    while since.elapsed() < QUIET {
        if Instant::now() >= deadline {
            testbed.explain("the broker does not come to rest")?;
        }
        thread::sleep(Duration::from_millis(50));
        let now = testbed.broker_switches()?;
        if now != switches {
            (switches, since) = (now, Instant::now());
        }
    }
    Ok(switches)
}

fn counter(testbed: &Testbed<'_>, name: &str) -> Result<u64> {
    testbed.status()?["links"][0]["counters"][name].as_u64().context("no such counter")
}

/// Waits until kicks and calls of each vring in use go these ways. Gives the reason for a relay.
fn wait_for_ways(testbed: &mut Testbed<'_>, kicks: &str, calls: &str) -> Result<Option<String>> {
    let deadline = Instant::now() + SOON;
    loop {
        let status = testbed.status()?;
        let vrings = status["links"][0]["vrings"].as_array().cloned().unwrap_or_default();
        let live: Vec<&Value> = vrings.iter().filter(|vring| vring["state"] == "live").collect();
        let goes = |vring: &&Value| vring["kicks"] == kicks && vring["calls"] == calls;
        if !live.is_empty() && live.iter().all(goes) {
            return Ok(live[0]["indirect_because"].as_str().map(str::to_owned));
        }
        if Instant::now() >= deadline {
            testbed.explain(&format!("kicks do not go by {kicks}, or calls by {calls}"))?;
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Unplugs the peer's doorbell function and plugs another, with more vectors.
fn plug_anew(testbed: &mut Testbed<'_>) -> Result<()> {
    testbed.peer.qmp("device_del", &json!({"id": "bell"}))?;
    // Another function needs another connection, as its greeting comes once. QEMU refuses to remove
    // the old one until the guest has let the function go.
    let deadline = Instant::now() + SOON;
    while let Err(error) = testbed.peer.qmp("chardev-remove", &json!({"id": "vpd"})) {
        if Instant::now() >= deadline {
            let log = testbed.peer.sh("cat /tmp/tap.log", COMMAND)?.text;
            bail!("the function is not let go: {error:#}\n{log}");
        }
        thread::sleep(Duration::from_millis(100));
    }
    let path = testbed.sandbox().dir().join(DOORBELL_SOCKET);
    let address = json!({"type": "unix", "data": {"path": path}});
    let backend = json!({"type": "socket", "data": {"server": false, "addr": address}});
    testbed.peer.qmp("chardev-add", &json!({"id": "vpd", "backend": backend}))?;
    let device = json!({"driver": "ivshmem-doorbell", "id": "bell", "bus": "bell-port", "vectors": 8, "chardev": "vpd"});
    testbed.peer.qmp("device_add", &device)?;
    Ok(())
}
