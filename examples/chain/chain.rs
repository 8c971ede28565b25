//! One chain: its processes are started from the end to the source, packets go through, and all is
//! ended from the source to the end.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::process::Process;
use crate::report::{Hop, Measured};

/// How long packets may take that are on their way when the source has ended.
const LAST_PACKETS: Duration = Duration::from_secs(10);
/// Longer than that a source takes only if nothing moves.
const PATIENCE: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(5);

/// What a chain is to be like.
pub struct Plan<'a> {
    /// Hops.
    pub hops: u32,
    /// Length of each frame, bytes.
    pub size: usize,
    /// How long to send.
    pub seconds: f64,
    /// How much to send instead, and to look at.
    pub packets: Option<u64>,
    /// Entries of each ring.
    pub ring_size: u16,
    /// Packed ones.
    pub packed: bool,
    /// How to wait.
    pub wait: &'a str,
}

/// Arguments of an owner at one of the sockets, or two.
fn owner<'a>(program: &'a str, sockets: &[&'a str], plan: &Plan<'a>, ring: &'a str) -> Vec<&'a str> {
    let sockets = sockets.iter().flat_map(|socket| ["--socket", socket]);
    let rest = ["--wait", plan.wait, "--ring-size", ring, "--json-lines"];
    let packed = plan.packed.then_some("--packed");
    std::iter::once(program).chain(sockets).chain(rest).chain(packed).collect()
}

/// Arguments of a peer.
fn peer<'a>(program: &'a str, sockets: &[&'a str], plan: &Plan<'a>) -> Vec<&'a str> {
    let sockets = sockets.iter().flat_map(|socket| ["--socket", socket]);
    let rest = ["--wait", plan.wait, "--json-lines"];
    std::iter::once(program).chain(sockets).chain(rest).collect()
}

/// Sends packets through a chain.
///
/// # Errors
/// If a process fails, or no packet moves any more.
pub fn run(plan: &Plan<'_>) -> anyhow::Result<Measured> {
    let folder = tempfile::tempdir()?;
    // Processes end before their folder goes.
    let broker = Process::broker(folder.path(), plan.hops + 1)?;
    let path = |side: &str, link: u32| socket(folder.path(), side, link);
    let ring = plan.ring_size.to_string();
    let check = if plan.packets.is_some() { "pattern" } else { "sample" };
    let last = if plan.hops % 2 == 1 {
        let at = path("owner", plan.hops)?;
        let arguments = owner("owner", &[&at], plan, &ring);
        Process::guest("end", &[&arguments[..], &["--mode", "sink", "--check", check]].concat())?
    } else {
        let at = path("peer", plan.hops)?;
        Process::guest("end", &[&peer("sink", &[&at], plan)[..], &["--check", check]].concat())?
    };
    let mut hops = Vec::new();
    for hop in (1..=plan.hops).rev() {
        let side = if hop % 2 == 1 { "peer" } else { "owner" };
        let (left, right) = (path(side, hop - 1)?, path(side, hop)?);
        let sockets = [left.as_str(), right.as_str()];
        let arguments = match side {
            "peer" => peer("forward", &sockets, plan),
            _ => owner("owner-forward", &sockets, plan, &ring),
        };
        hops.push(Process::guest(&format!("hop {hop}"), &arguments)?);
    }
    hops.reverse();

    let before = hops.iter().map(Process::cpu_seconds).collect::<Result<Vec<_>, _>>()?;
    let broker_before = broker.cpu_seconds()?;
    let at = path("owner", 0)?;
    let size = plan.size.to_string();
    let (seconds, packets) = (plan.seconds.to_string(), plan.packets.map(|packets| packets.to_string()));
    let limit = match &packets {
        Some(packets) => ["--packets", packets],
        None => ["--seconds", &seconds],
    };
    let arguments = owner("owner", &[&at], plan, &ring);
    let more = ["--mode", "gen", "--check", check, "--size", &size];
    let start = Instant::now();
    let mut source = Process::guest("source", &[&arguments[..], &more, &limit].concat())?;
    while !source.has_ended()? {
        ensure!(
            start.elapsed() < PATIENCE + Duration::from_secs_f64(plan.seconds),
            "no packet moves any more"
        );
        for process in &mut hops {
            ensure!(!process.has_ended()?, "{} has ended", process.name());
        }
        thread::sleep(LOOK);
    }
    // The first hop has taken all that was sent; what is on its way is nothing to all packets.
    let after = hops.iter().map(Process::cpu_seconds).collect::<Result<Vec<_>, _>>()?;
    let broker_cpu = broker.cpu_seconds()? - broker_before;
    let source = source.end()?;
    let sent = number(&source, "tx_packets")?;
    let ended = Instant::now();
    let received = |value: Option<Value>| value.and_then(|value| value.get("rx_packets")?.as_u64());
    while received(last.last()) != Some(sent) && ended.elapsed() < LAST_PACKETS {
        thread::sleep(LOOK);
    }

    let mut measured = Measured {
        hops: Vec::new(),
        seconds: source.get("seconds").and_then(Value::as_f64).context("the source tells no time")?,
        sent,
        broker_cpu_seconds: broker_cpu,
        checked: check == "pattern",
        ..Measured::default()
    };
    for ((process, before), after) in hops.into_iter().zip(before).zip(after) {
        let name = process.name().to_owned();
        let value = process.end().with_context(|| name.clone())?;
        measured.hops.push(Hop {
            program: value.get("program").and_then(Value::as_str).unwrap_or_default().to_owned(),
            cpu_seconds: after - before,
            packets: number(&value, "tx_packets")?,
            bytes: number(&value, "tx_bytes")?,
            copied_bytes: number(&value, "copied_bytes")?,
            dropped: number(&value, "dropped")?,
            faults: number(&value, "faults")?,
            sleeps: number(&value, "sleeps")?,
            rescued: number(&value, "rescued")?,
        });
    }
    let end = last.end()?;
    measured.received = number(&end, "rx_packets")?;
    measured.corrupted = number(&end, "corrupted")?;
    measured.reordered = number(&end, "reordered")?;
    drop(broker);
    Ok(measured)
}

fn socket(folder: &Path, side: &str, link: u32) -> anyhow::Result<String> {
    let path = folder.join(format!("{side}-{link}"));
    path.into_os_string().into_string().ok().context("the folder for sockets has no plain name")
}

fn number(value: &Value, name: &str) -> anyhow::Result<u64> {
    value.get(name).and_then(Value::as_u64).with_context(|| format!("no number {name} in {value}"))
}
