//! Whether packets arrive: all of some, each of them once, in order, and every byte of each. Before the
//! rounds, as it is not about speed. While a contender is measured its packets repeat, so that a store
//! that is missing, or a buffer that comes twice, would leave the same bytes where they were.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use vhost_pci_tests::{Process, pcap};

use crate::broker::{SOON, guest};
use crate::contender::Verdict;
use crate::ends::card;
use crate::host::SENDER;
use crate::link::Link;
use crate::peer::{Content, Contract};
use crate::testpmd::{DEEP, Depth, Role, Testpmd};

/// Packets of ours: many times as many as any ring has entries.
const OURS: u64 = 64_000;
/// For the two sides to connect.
const CONNECT: Duration = Duration::from_millis(300);
/// For all packets to arrive.
const ARRIVE: Duration = Duration::from_secs(5);
/// For one that should not.
const LAST: Duration = Duration::from_millis(50);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// Packets of DPDK's, of which none can be dropped: fewer than the rings have entries.
const fn fewer_than(depth: Depth) -> u64 {
    (depth.ring / 2) as u64
}

/// Testpmd looks into no packet that it receives: it sends those of a capture file, and receives into
/// another, by the devices of a receiver and a sender.
///
/// # Errors
/// If it cannot be tried, or not all packets arrive.
pub fn of_pair(dir: &Path, [receiver, sender]: [String; 2], size: usize) -> Result<Verdict> {
    let (from, to) = (dir.join("sent.pcap"), dir.join("received.pcap"));
    pcap::write(&from, fewer_than(DEEP), size)?;
    let into_file = format!("net_pcap0,tx_pcap={}", to.display());
    let mut receiver = Testpmd::start(dir, Role::Forwarder, DEEP, &[receiver, into_file])?;
    let out_of_file = format!("net_pcap0,rx_pcap={}", from.display());
    let mut sender = Testpmd::start(dir, Role::Ends(size), DEEP, &[out_of_file, sender])?;
    thread::sleep(CONNECT);
    sender.forward()?;
    // The file's port has received nothing.
    wait_for(&mut receiver, fewer_than(DEEP))?;
    receiver.quit().context("the receiver writes its file")?;
    compared(&from, &to, fewer_than(DEEP))
}

/// Out of a capture file by one card of a testpmd, through a forwarder that runs, and in by the other
/// into another file.
///
/// # Errors
/// As [`of_pair`].
pub fn of_dpdks_owners(
    dir: &Path,
    size: usize,
    sockets: &[impl AsRef<Path>; 2],
    (options, depth): (&str, Depth),
) -> Result<Verdict> {
    let (from, to) = (dir.join("sent.pcap"), dir.join("received.pcap"));
    let count = fewer_than(depth);
    pcap::write(&from, count, size)?;
    let [one, other] = sockets;
    // Ports are pairs in this order.
    let devices = [
        format!("net_pcap0,rx_pcap={}", from.display()),
        card(0, one, options),
        card(1, other, options),
        format!("net_pcap1,tx_pcap={}", to.display()),
    ];
    let mut ends = Testpmd::start(dir, Role::Ends(size), depth, &devices)?;
    thread::sleep(CONNECT);
    ends.forward()?;
    // Out of the file and by the other card.
    wait_for(&mut ends, 2 * count)?;
    ends.quit().context("the owners write their file")?;
    compared(&from, &to, count)
}

fn wait_for(testpmd: &mut Testpmd, count: u64) -> Result<()> {
    let begin = Instant::now();
    loop {
        let arrived = testpmd.received()?.packets;
        if arrived >= count {
            return Ok(());
        }
        if begin.elapsed() > ARRIVE {
            bail!("{arrived} of {count} packets arrived\n{}", testpmd.logs());
        }
        thread::sleep(LOOK);
    }
}

fn compared(from: &Path, to: &Path, count: u64) -> Result<Verdict> {
    let (same, all) = pcap::compare(from, to)?;
    let corrupted = if all { 0 } else { count - same.min(count - 1) };
    Ok(Verdict { sampled: count, corrupted, ..Verdict::default() })
}

/// An owner's last line.
#[derive(Clone, Copy, Deserialize)]
struct Line {
    tx_packets: u64,
    rx_packets: u64,
    lost: u64,
    reordered: u64,
    corrupted: u64,
    checked: u64,
}

impl Line {
    fn of(owner: &Process) -> Result<Self> {
        let log = owner.log();
        let line = log.lines().rev().find(|line| line.starts_with('{'));
        serde_json::from_str(line.with_context(|| format!("it says nothing:\n{log}"))?)
            .context("its last line")
    }
}

/// Our owner, with packets that differ, into our peer, which looks at all of them.
///
/// # Errors
/// As [`of_pair`].
pub fn of_ours(size: usize, contract: Contract, rings: &[&str]) -> Result<Verdict> {
    let link = Link::open(size, Content::Sequence, contract)?;
    let mut command = guest(SENDER)?;
    command.args(["owner", "--mode", "gen", "--wait", "poll", "--json", "--packets", &OURS.to_string()]);
    command.args(rings).args(["--size", &size.to_string(), "--socket"]).arg(link.owner_socket());
    let mut owner = Process::spawn("owner", command, &link.path("owner.log"))?;
    owner.wait(SOON)?;
    of_link(&link, Line::of(&owner)?.tx_packets)
}

/// A testpmd with packets of a capture file into our peer.
///
/// # Errors
/// As [`of_pair`].
pub fn into_ours(size: usize, options: &str) -> Result<Verdict> {
    let link = Link::open(size, Content::Sequence, Contract::Copy)?;
    let from = link.path("sent.pcap");
    pcap::write(&from, fewer_than(DEEP), size)?;
    let devices = [format!("net_pcap0,rx_pcap={}", from.display()), card(0, link.owner_socket(), options)];
    let mut owner = Testpmd::start(&link.path(""), Role::Ends(size), DEEP, &devices)?;
    thread::sleep(CONNECT);
    owner.forward()?;
    of_link(&link, fewer_than(DEEP))
}

/// What our peer has found when all that were sent have arrived.
fn of_link(link: &Link, sent: u64) -> Result<Verdict> {
    let begin = Instant::now();
    while link.received()?.packets < sent {
        let arrived = link.received()?.packets;
        ensure!(begin.elapsed() < ARRIVE, "{arrived} of {sent} packets arrived\n{}", link.logs());
        thread::sleep(LOOK);
    }
    thread::sleep(LAST);
    let verdict = link.verdict()?;
    Ok(Verdict { corrupted: verdict.corrupted + verdict.sampled.abs_diff(sent), ..verdict })
}

/// Our owner, with packets that differ, through a forwarder that runs, to another one, which looks at
/// all of them. `count` of them: what drops packets gets fewer than a ring has entries.
///
/// # Errors
/// As [`of_pair`].
pub fn of_our_owners(
    dir: &Path,
    size: usize,
    sockets: &[impl AsRef<Path>; 2],
    (rings, count): (&[&str], Option<u64>),
) -> Result<Verdict> {
    let owner = |mode: &str, socket: &Path| -> Result<Process> {
        let mut command = guest(SENDER)?;
        command.args(["owner", "--mode", mode, "--json", "--size", &size.to_string()]).args(rings);
        if mode == "gen" {
            command.args(["--packets", &count.unwrap_or(OURS).to_string()]);
        }
        command.arg("--socket").arg(socket);
        Process::spawn(mode, command, &dir.join(format!("{mode}.log")))
    };
    let [one, other] = sockets;
    let mut receiver = owner("sink", other.as_ref())?;
    receiver.wait_log("the owner's device is started", SOON)?;
    thread::sleep(CONNECT);
    let mut sender = owner("gen", one.as_ref())?;
    sender.wait(SOON)?;
    let sent = Line::of(&sender)?.tx_packets;
    thread::sleep(CONNECT);
    receiver.terminate(SOON)?;
    let Line { rx_packets, lost, reordered, corrupted, checked, .. } = Line::of(&receiver)?;
    ensure!(rx_packets > 0, "no packet arrived\n{}\n{}", sender.log(), receiver.log());
    let corrupted = corrupted + lost + reordered + checked.abs_diff(sent);
    Ok(Verdict { sampled: checked, corrupted, ..Verdict::default() })
}
