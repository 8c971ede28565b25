//! Three owners on one peer that is a switch between them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vhost_pci_tests::{Guest, Sandbox};

use crate::Scenario;
use crate::links::{Links, PEER_MODULES};
use crate::testbed::{BOOT, COMMAND};

pub const SCENARIO: Scenario = Scenario {
    name: "bridge",
    shows: "three owners on one bridging peer: all pairs ping, a broadcast reaches both others once, the counters \
            agree, and an owner that reboots or is killed costs the others nothing",
    run,
};

/// The links, by the owners' names; the owner with this number has this number in its addresses.
const OWNERS: [&str; 3] = ["one", "two", "three"];
const PINGS: u32 = 20;
const BROADCASTS: u64 = 20;
/// Pings between two owners beside which a third one reboots: for as long as that takes.
const BESIDE_REBOOT: u32 = 400;
const BESIDE_KILL: u32 = 100;

fn address(owner: usize) -> String {
    format!("10.0.0.{}", owner + 1)
}

fn run(sandbox: &Sandbox) -> Result<()> {
    let mut links = Links::start(sandbox, &OWNERS)?;
    let mut bridge = links.with_iommu(links.guest("bridge", 256)?);
    for link in OWNERS {
        bridge = links.peer(bridge, link);
    }
    let mut bridge = bridge.modules(PEER_MODULES).spawn()?;
    let mut owners = Vec::new();
    for owner in 0..OWNERS.len() {
        owners.push(spawn_owner(&links, owner)?);
    }
    bridge.wait_ready(BOOT)?;
    start_bridge(&mut bridge)?;
    for (owner, guest) in owners.iter_mut().enumerate() {
        guest.wait_ready(BOOT)?;
        start_network(guest, owner)?;
    }
    for link in OWNERS {
        wait_until_up(&links, link)?;
    }

    for from in 0..owners.len() {
        for to in (0..owners.len()).filter(|to| *to != from) {
            println!(
                "{} to {}: {PINGS} of {PINGS}, {}",
                OWNERS[from],
                OWNERS[to],
                ping(&mut owners[from], to)?
            );
        }
    }
    // An owner whose interface is not up yet takes nothing, and is sent what others say when theirs is.
    let before = last_words(&mut bridge)?["dropped"].clone();
    broadcast(&mut owners)?;
    counters_agree(&mut bridge, &mut owners, &before)?;

    // The program starts anew beside running owners. One of them goes, in two ways.
    start_bridge(&mut bridge)?;
    ping(&mut owners[0], 2)?;
    let [one, _, three] = &mut owners[..] else { unreachable!("there are three owners") };
    beside(one, "reboots", BESIDE_REBOOT, || {
        three.reboot(BOOT)?;
        start_network(three, 2)
    })?;
    ping(one, 2)?;
    beside(one, "is killed", BESIDE_KILL, || three.kill())?;
    let ended = stop_bridge(&mut bridge)?;
    let down = &ended["ports"][2];
    ensure!(down["up"] == false && down["stations"] == 0, "the port of who was killed: {down}");
    for port in [0, 1] {
        let dropped = &ended["ports"][port]["dropped"];
        ensure!(dropped["full"] == 0 && dropped["loop"] == 0 && dropped["storm"] == 0, "dropped: {dropped}");
    }
    links.check_broker()
}

fn spawn_owner(links: &Links<'_>, owner: usize) -> Result<Guest> {
    let card = format!(",mac=52:54:00:00:00:{:02x}", owner + 1);
    let guest = links.guest(OWNERS[owner], 160)?;
    links.owner(guest, OWNERS[owner], &card).modules(["virtio_net"]).spawn()
}

fn start_network(guest: &mut Guest, owner: usize) -> Result<()> {
    // So that it answers to broadcasts.
    let up = format!(
        "ip addr add {}/24 broadcast 10.0.0.255 dev eth0 && ip link set eth0 up && \
         echo 0 >/proc/sys/net/ipv4/icmp_echo_ignore_broadcasts",
        address(owner)
    );
    guest.sh_ok(&up, COMMAND).map(drop)
}

fn start_bridge(guest: &mut Guest) -> Result<()> {
    let start = "vhost-pci-guest bridge --device all --vfio --wait interrupt --json-lines --report-every-ms 200 >/tmp/bridge.out 2>/tmp/bridge.log &\n\
        echo $! >/tmp/bridge.pid";
    guest.sh_ok(start, COMMAND).map(drop)
}

/// Ends the program. Returns its last words.
fn stop_bridge(guest: &mut Guest) -> Result<Value> {
    let stop = "kill $(cat /tmp/bridge.pid)\n\
        for i in $(seq 200); do kill -0 $(cat /tmp/bridge.pid) 2>/dev/null || exit 0; sleep 0.1; done; exit 1";
    guest.sh_ok(stop, COMMAND)?;
    let ended = last_words(guest)?;
    ensure!(ended["end"] == true, "the bridge ended without its last words: {ended}");
    Ok(ended)
}

/// What the program has counted when it last told.
fn last_words(guest: &mut Guest) -> Result<Value> {
    let said = guest.sh_ok("tail -n 1 /tmp/bridge.out", COMMAND)?;
    serde_json::from_str(&said).with_context(|| format!("the bridge said: {said}"))
}

fn wait_until_up(links: &Links<'_>, link: &str) -> Result<()> {
    let deadline = Instant::now() + COMMAND;
    while !links.is_up(link)? {
        ensure!(Instant::now() < deadline, "the link {link} does not come up: {}", links.status()?);
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Pings; fails if one is lost. Gives busybox's line of minimum/average/maximum.
fn ping(guest: &mut Guest, to: usize) -> Result<String> {
    // The first one waits for an address.
    let command = format!("ping -c 1 -W 10 {0} >/dev/null && ping -c {PINGS} -i 0.02 -W 10 {0}", address(to));
    let output = guest.sh(&command, COMMAND)?;
    let received = format!("{PINGS} packets transmitted, {PINGS} packets received");
    ensure!(output.text.contains(&received), "`{command}` lost packets, or got some twice:\n{}", output.text);
    ensure!(!output.text.contains("DUP"), "`{command}` was answered twice:\n{}", output.text);
    let times = output.text.lines().find(|line| line.starts_with("round-trip"));
    Ok(times.context("ping printed no times")?.to_owned())
}

/// A counter of /proc/net/snmp.
fn icmp(guest: &mut Guest, name: &str) -> Result<u64> {
    let command = format!(
        "awk '/^Icmp:/ {{ if (!seen++) {{ for (i = 1; i <= NF; i++) if ($i == \"{name}\") at = i }} else print $at }}' \
         /proc/net/snmp"
    );
    guest.sh_ok(&command, COMMAND)?.parse().with_context(|| format!("the counter {name}"))
}

/// Pings to all at once: each of the others gets each of them, once, and each answer comes back, once.
fn broadcast(owners: &mut [Guest]) -> Result<()> {
    for from in 0..owners.len() {
        let mut before = Vec::new();
        for guest in &mut *owners {
            before.push((icmp(guest, "InEchos")?, icmp(guest, "InEchoReps")?));
        }
        // It ends when each was answered by one; the others' answers come then, too.
        let command = format!("ping -c {BROADCASTS} -i 0.02 -W 10 10.0.0.255");
        owners[from].sh_ok(&command, COMMAND)?;
        // It hears itself, too, and answers.
        let answers = BROADCASTS * owners.len() as u64;
        let deadline = Instant::now() + COMMAND;
        while icmp(&mut owners[from], "InEchoReps")? < before[from].1 + answers {
            ensure!(Instant::now() < deadline, "of {answers} answers to broadcasts not all came back");
        }
        // What comes twice has had its time by a ping each way.
        for to in (0..owners.len()).filter(|to| *to != from) {
            ping(&mut owners[from], to)?;
        }
        let pings = u64::from(PINGS) + 1;
        for (owner, guest) in owners.iter_mut().enumerate() {
            let (echoes, replies) =
                (icmp(guest, "InEchos")? - before[owner].0, icmp(guest, "InEchoReps")? - before[owner].1);
            let expected = match owner == from {
                true => (BROADCASTS, answers + 2 * pings),
                false => (BROADCASTS + pings, 0),
            };
            ensure!(
                (echoes, replies) == expected,
                "after broadcasts of {}: {} has got {echoes} requests and {replies} answers, not {expected:?}",
                OWNERS[from],
                OWNERS[owner]
            );
        }
        println!("{BROADCASTS} broadcasts of {}: at each other one {BROADCASTS}", OWNERS[from]);
    }
    Ok(())
}

/// Ends the program: what it has counted is what the owners' kernels have.
fn counters_agree(bridge: &mut Guest, owners: &mut [Guest], dropped: &Value) -> Result<()> {
    let ended = stop_bridge(bridge)?;
    for (owner, guest) in owners.iter_mut().enumerate() {
        let port = &ended["ports"][owner];
        let count = |name: &str| port[name].as_u64().with_context(|| format!("no {name} in {port}"));
        let numbers =
            guest.sh_ok("cd /sys/class/net/eth0/statistics && cat rx_packets tx_packets", COMMAND)?;
        let mut numbers = numbers.lines().map(str::parse::<u64>);
        let mut next = || numbers.next().context("no counter")?.context("a counter");
        let (received, sent) = (next()?, next()?);
        ensure!(count("tx_packets")? == received, "{} has got {received} packets: {port}", OWNERS[owner]);
        // What it has sent since nobody has taken.
        ensure!(count("rx_packets")? <= sent, "{} has sent {sent} packets: {port}", OWNERS[owner]);
        ensure!(
            count("flooded")? >= BROADCASTS && port["stations"] == 1 && port["moved"] == 0,
            "port: {port}"
        );
        println!(
            "bridge: port of {}: in {}, out {} as its kernel says, flooded {}",
            OWNERS[owner], port["rx_packets"], port["tx_packets"], port["flooded"]
        );
    }
    ensure!(&ended["dropped"] == dropped && ended["faults"] == 0, "dropped or broken: {ended}");
    ensure!(ended["copied_bytes"] == ended["tx_bytes"], "more than one copy a packet: {ended}");
    Ok(())
}

/// Has two owners ping each other while a third one goes.
fn beside(from: &mut Guest, what: &str, pings: u32, goes: impl FnOnce() -> Result<()>) -> Result<()> {
    let to = address(1);
    let start = format!("ping -c {pings} -i 0.02 -W 10 {to} >/tmp/ping.log 2>&1 &\necho $! >/tmp/ping.pid");
    from.sh_ok(&start, COMMAND)?;
    goes()?;
    let wait = "for i in $(seq 600); do kill -0 $(cat /tmp/ping.pid) 2>/dev/null || break; sleep 0.1; done; cat /tmp/ping.log";
    let said = from.sh_ok(wait, COMMAND * 2)?;
    let received = format!("{pings} packets transmitted, {pings} packets received");
    ensure!(said.contains(&received), "while {} {what}, packets of others were lost:\n{said}", OWNERS[2]);
    println!("{} {what}: {pings} of {pings} between the others", OWNERS[2]);
    Ok(())
}
