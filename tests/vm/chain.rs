//! A chain of three VMs: the one in the midst is the peer of the first and the owner of the last, and its
//! kernel routes between them.

use anyhow::{Context, Result, ensure};
use vhost_pci_tests::{Guest, Sandbox};

use crate::Scenario;
use crate::links::{Links, PEER_MODULES};
use crate::tcp::transfer;
use crate::testbed::{BOOT, COMMAND};

pub const SCENARIO: Scenario = Scenario {
    name: "chain",
    shows: "three VMs in a row, the middle one peer on one link and owner on the next: 100 pings and 16 MiB of \
            TCP each way from end to end, SHA-256 equal",
    run,
};

const BYTES: u64 = 16 << 20;
const PINGS: u32 = 100;
/// Of each VM, MiB.
const MEMORY: u32 = 256;

/// The links: from the first VM to the second, and on to the third.
const LEFT: &str = "left";
const RIGHT: &str = "right";
/// The first VM, the second one's two, the third. Two networks, a /24 each.
const FIRST: &str = "10.0.1.1";
const MIDDLE: [&str; 2] = ["10.0.1.2", "10.0.2.1"];
const LAST: &str = "10.0.2.2";

fn run(sandbox: &Sandbox) -> Result<()> {
    let mut links = Links::start(sandbox, &[LEFT, RIGHT])?;
    let (mut first, mut middle, mut last) = boot(&links)?;
    first.sh_ok(
        &format!(
            "ip addr add {FIRST}/24 dev eth0 && ip link set eth0 up && ip route add 10.0.2.0/24 via {}",
            MIDDLE[0]
        ),
        COMMAND,
    )?;
    start_tap(&mut middle, MIDDLE[0])?;
    middle.sh_ok(
        &format!(
            "ip addr add {}/24 dev eth0 && ip link set eth0 up && echo 1 >/proc/sys/net/ipv4/ip_forward",
            MIDDLE[1]
        ),
        COMMAND,
    )?;
    start_tap(&mut last, LAST)?;
    last.sh_ok(&format!("ip route add 10.0.1.0/24 via {}", MIDDLE[1]), COMMAND)?;
    wait_for_ping(&mut first, LAST)?;
    println!("first to last: {PINGS} of {PINGS}, {}", ping(&mut first, LAST)?);
    println!("last to first: {PINGS} of {PINGS}, {}", ping(&mut last, FIRST)?);
    transfer("first to last", &mut first, &mut last, LAST, BYTES)?;
    transfer("last to first", &mut last, &mut first, FIRST, BYTES)?;
    // It went by way of the middle: each end is two hops away.
    for (hops, answers) in [(2, "1"), (1, "0")] {
        let ask = format!("ping -c 1 -t {hops} -W 1 {LAST} | grep -c 'bytes from' || true");
        let said = first.sh_ok(&ask, COMMAND)?;
        ensure!(
            said == answers,
            "of a packet that may go {hops} hops there are {said} answers, not {answers}"
        );
    }
    for link in [LEFT, RIGHT] {
        ensure!(links.is_up(link)?, "the link {link} is not up: {}", links.status()?);
        // Of the middle VM, not also what that has of the first in its window.
        let shown = links.mapped_bytes(link)?;
        ensure!(
            shown == u64::from(MEMORY) << 20,
            "{shown} bytes of the owner of {link} are shown; its VM has {MEMORY} MiB"
        );
    }
    println!("broker: its threads have slept {} times", links.broker_switches()?);
    links.check_broker()
}

/// Starts the three VMs, and waits for each.
fn boot(links: &Links<'_>) -> Result<(Guest, Guest, Guest)> {
    let first = links.owner(links.guest("first", MEMORY)?, LEFT, "").modules(["virtio_net"]);
    let middle = links.with_iommu(links.guest("middle", MEMORY)?);
    let middle = links.owner(links.peer(middle, LEFT), RIGHT, "");
    let middle = middle.modules(["virtio_net"].into_iter().chain(PEER_MODULES));
    let last = links.peer(links.with_iommu(links.guest("last", MEMORY)?), RIGHT).modules(PEER_MODULES);
    let (mut first, mut middle, mut last) = (first.spawn()?, middle.spawn()?, last.spawn()?);
    for guest in [&mut first, &mut middle, &mut last] {
        guest.wait_ready(BOOT)?;
    }
    Ok((first, middle, last))
}

/// Starts a peer's driver and gives its interface an address.
fn start_tap(guest: &mut Guest, address: &str) -> Result<()> {
    let up = format!(
        "vhost-pci-guest tap --device auto --vfio --wait interrupt --ifname vp0 --json >/tmp/tap.log 2>&1 &\n\
         for i in $(seq 100); do ip link show vp0 >/dev/null 2>&1 && break; sleep 0.1; done\n\
         ip addr add {address}/24 dev vp0 && ip link set vp0 up || {{ cat /tmp/tap.log; exit 1; }}"
    );
    guest.sh_ok(&up, COMMAND).map(drop)
}

fn wait_for_ping(guest: &mut Guest, address: &str) -> Result<()> {
    let command = format!(
        "for i in $(seq 60); do ping -c 1 -W 1 {address} >/dev/null 2>&1 && exit 0; sleep 0.2; done; exit 1"
    );
    guest.sh_ok(&command, COMMAND * 2).map(drop)
}

/// Pings; fails if one is lost. Gives busybox's line of minimum/average/maximum.
fn ping(guest: &mut Guest, address: &str) -> Result<String> {
    let command = format!("ping -c {PINGS} -i 0.05 -W 5 {address}");
    let output = guest.sh(&command, COMMAND * 2)?;
    let received = format!("{PINGS} packets transmitted, {PINGS} packets received");
    ensure!(output.text.contains(&received), "`{command}` lost packets:\n{}", output.text);
    let times = output.text.lines().find(|line| line.starts_with("round-trip"));
    Ok(times.context("ping printed no times")?.to_owned())
}
