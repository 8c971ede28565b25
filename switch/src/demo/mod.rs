//! `demo`: a broker and two guest models on one machine, over the real sockets,
//! memfds and messages. Owns the three processes, what it measures of the broker,
//! and the report. Needs neither QEMU nor root.

mod process;
mod usage;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use self::process::Child;
use self::usage::Usage;
use crate::control::client;

/// How long the link may take to come up.
const START: Duration = Duration::from_secs(20);
/// How long the guest models may take to end.
const END: Duration = Duration::from_secs(20);

/// What `demo` can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// How long packets are moved
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Length of each packet, bytes (from 30, Ethernet header included)
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(30..=2036))]
    size: u32,
    /// Give the owner an IOMMU, so that its peer sees what it maps and nothing else: its
    /// buffers for good (`static`), or each packet while it is under way (`per-packet`)
    #[arg(long, value_enum, default_value_t)]
    iommu: OwnerIommu,
    /// Print one JSON object at the end, and nothing else on stdout
    #[arg(long)]
    json: bool,
}

/// How the owner's guest uses its IOMMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum OwnerIommu {
    /// It has none
    #[default]
    Off,
    /// It maps its rings and buffers once
    Static,
    /// It maps each packet, and unmaps it when it is used
    PerPacket,
}

impl OwnerIommu {
    /// The word for the owner's model.
    const fn word(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Static => "static",
            Self::PerPacket => "per-packet",
        }
    }
}

/// A JSON line of a guest model.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct Line {
    seconds: f64,
    tx_packets: u64,
    rx_packets: u64,
    lost: u64,
    reordered: u64,
    corrupted: u64,
    faults: u64,
    end: bool,
}

/// The result.
#[derive(Debug, Serialize)]
struct Outcome {
    /// Million packets a second, both ways together.
    mpps: f64,
    /// Gbit a second of packet bytes, both ways together.
    gbps: f64,
    mpps_to_peer: f64,
    mpps_to_owner: f64,
    packets_to_peer: u64,
    packets_to_owner: u64,
    packet_bytes: u32,
    seconds: f64,
    /// CPU time of the broker's process while packets moved, milliseconds.
    broker_cpu_ms: f64,
    /// The same in percent of one core.
    broker_cpu_percent: f64,
    /// The most packets that can have passed through the broker: what it read and
    /// wrote by system calls while packets moved, in packets, as it has no guest
    /// memory mapped (checked with the kernel).
    broker_packets: u64,
    /// The most of the owner's memory that its peer had in its window at once, bytes.
    owner_bytes_in_window: u64,
    /// Notifications that the broker's relay passed on, over the whole run.
    notifications_relayed: u64,
    lost: u64,
    corrupted: u64,
}

/// Runs the demo.
///
/// # Errors
/// When a process does not start or ends early, or a packet is lost or corrupted.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let folder =
        tempfile::Builder::new().prefix("vhost-pci-demo-").tempdir().context("a folder for sockets")?;
    let at = |name: &str| folder.path().join(name);
    let config = at("broker.toml");
    fs::write(&config, configuration(folder.path()))?;
    let size = args.size.to_string();
    let seconds = args.seconds.to_string();

    let broker = Child::start("broker", &["run", "--config"], &config, &[], &at("broker.log"))?;
    broker.wait_for(&at("control.sock"), START)?;
    let peer = ["--check", "pattern", "--json-lines", "--size", &size];
    let mut peer =
        Child::start("peer", &["guest", "gen", "--socket"], &at("peer.sock"), &peer, &at("peer.log"))?;
    let iommu = args.iommu.word();
    let owner = ["--mode", "both", "--json-lines", "--size", &size, "--seconds", &seconds, "--iommu", iommu];
    let mut owner =
        Child::start("owner", &["guest", "owner", "--socket"], &at("owner.sock"), &owner, &at("owner.log"))?;
    progress(args, "a broker and two guest models, packets both ways, each checked (sequence, checksum)");
    progress(
        args,
        &format!(
            "{size:>5} B{:>22}  {:>22}  {:>6} {:>9}  {:>11}",
            "owner to peer", "peer to owner", "lost", "corrupted", "broker CPU"
        ),
    );

    let (usage, last) = watch(args, &broker, &mut owner, &mut peer)?;
    let owner_end = owner.last_line(END)?;
    peer.terminate()?;
    let peer_end = peer.last_line(END)?;
    let status = client::status(&at("control.sock"))?;

    if owner_end.faults + peer_end.faults > 0 {
        bail!("a guest model found a ring broken: {owner_end:?}, {peer_end:?}");
    }
    let outcome = outcome(args, usage, &last, &owner_end, &peer_end, &status)?;
    if args.json {
        println!("{}", serde_json::to_string(&outcome)?);
    } else {
        println!(
            "{:.2} Mpps, {:.2} Gbit/s both ways; lost {}, corrupted {}; broker: {:.1} ms of CPU in {:.1} s ({:.2} % of a core), {} packets; of the owner's memory {} KiB in the window at most",
            outcome.mpps,
            outcome.gbps,
            outcome.lost,
            outcome.corrupted,
            outcome.broker_cpu_ms,
            outcome.seconds,
            outcome.broker_cpu_percent,
            outcome.broker_packets,
            outcome.owner_bytes_in_window >> 10,
        );
    }
    match (outcome.lost, outcome.corrupted) {
        (0, 0) => Ok(()),
        (lost, corrupted) => bail!("{lost} packets lost, {corrupted} corrupted"),
    }
}

/// A line for who watches: on stderr where stdout is for a program.
fn progress(args: &Args, line: &str) {
    if args.json {
        eprintln!("{line}");
    } else {
        println!("{line}");
    }
}

fn configuration(folder: &Path) -> String {
    let socket = |name: &str| toml::Value::from(folder.join(name).display().to_string());
    format!(
        "control_socket = {}\n[[link]]\nname = \"demo\"\nowner_socket = {}\npeer_socket = {}\nwindow = \"128M\"\n",
        socket("control.sock"),
        socket("owner.sock"),
        socket("peer.sock"),
    )
}

/// Shows a line a second until the owner has sent for long enough. Gives what the
/// broker used meanwhile, and the owner's last line before its end.
fn watch(args: &Args, broker: &Child, owner: &mut Child, peer: &mut Child) -> anyhow::Result<(Usage, Line)> {
    let started = Instant::now();
    let mut first = None;
    let mut before = (Line::default(), Line::default());
    loop {
        if let Some(dead) = [broker, owner, peer].into_iter().find(|child| child.has_ended()) {
            bail!("the {} ended early:\n{}", dead.name(), dead.log());
        }
        let line = owner.next_line(START)?;
        peer.drain_lines()?;
        let now = (line, peer.latest());
        if line.tx_packets == 0 {
            if started.elapsed() > START {
                bail!("no packet moved within {} s:\n{}\n{}", START.as_secs(), owner.log(), peer.log());
            }
            continue;
        }
        let total = Usage::of(broker.pid())?;
        let start = *first.get_or_insert(total);
        let used = total.since(start);
        show(args, &before, &now, used);
        before = now;
        if line.seconds + 0.5 >= args.seconds as f64 || line.end {
            return Ok((used, line));
        }
    }
}

fn show(args: &Args, before: &(Line, Line), now: &(Line, Line), used: Usage) {
    let seconds = now.0.seconds - before.0.seconds;
    if seconds <= 0.0 {
        return;
    }
    let rate = |now: u64, before: u64| {
        let packets = now.saturating_sub(before) as f64 / seconds;
        format!("{:6.2} Mpps {:6.2} Gbit/s", packets / 1e6, packets * f64::from(args.size) * 8.0 / 1e9)
    };
    let line = format!(
        "{:4.0}s  {}  {}  {:>6} {:>9}  {:>8.1} ms",
        now.0.seconds,
        rate(now.0.tx_packets, before.0.tx_packets),
        rate(now.0.rx_packets, before.0.rx_packets),
        now.0.lost + now.1.lost,
        now.0.corrupted + now.1.corrupted,
        used.cpu.as_secs_f64() * 1e3,
    );
    progress(args, &line);
}

fn outcome(
    args: &Args,
    used: Usage,
    last: &Line,
    owner: &Line,
    peer: &Line,
    status: &crate::control::BrokerReport,
) -> anyhow::Result<Outcome> {
    if status.guest_bytes_mapped != 0 {
        bail!("the broker has {} bytes of guest memory mapped", status.guest_bytes_mapped);
    }
    let seconds = owner.seconds;
    let rate = |packets: u64| packets as f64 / seconds / 1e6;
    let packets = owner.tx_packets + owner.rx_packets;
    // The owner waits until all that it sent is used; what the peer sent and the owner
    // had not taken when it stopped was in flight, not lost.
    let lost = owner.lost + peer.lost + owner.tx_packets.saturating_sub(peer.rx_packets);
    let cpu_ms = used.cpu.as_secs_f64() * 1e3;
    Ok(Outcome {
        mpps: rate(packets),
        gbps: rate(packets) * f64::from(args.size) * 8.0 / 1e3,
        mpps_to_peer: rate(owner.tx_packets),
        mpps_to_owner: rate(owner.rx_packets),
        packets_to_peer: owner.tx_packets,
        packets_to_owner: owner.rx_packets,
        packet_bytes: args.size,
        seconds,
        broker_cpu_ms: cpu_ms,
        broker_cpu_percent: cpu_ms / last.seconds.max(f64::MIN_POSITIVE) / 10.0,
        broker_packets: used.io_bytes / u64::from(args.size),
        owner_bytes_in_window: status.links.iter().map(|link| link.window.largest_mapped_bytes).sum(),
        notifications_relayed: status.links.iter().map(|link| link.counters.notifications_relayed).sum(),
        lost: lost + owner.reordered + peer.reordered,
        corrupted: owner.corrupted + peer.corrupted,
    })
}
