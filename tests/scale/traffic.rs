//! One link that is busy, while all others are up and are not: what that costs the broker.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;
use vhost_pci_tests::Process;

use crate::SOON;
use crate::broker::{Broker, Usage, program, socket};

/// How the two sides find out about work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// They look.
    Polling,
    /// They sleep and are notified, which the broker relays.
    Relayed,
}

impl Way {
    const fn wait(self) -> &'static str {
        match self {
            Self::Polling => "poll",
            Self::Relayed => "interrupt",
        }
    }
}

/// What the broker did for it.
#[derive(Clone, Debug, Serialize)]
pub struct Busy {
    /// How.
    pub way: Way,
    /// For how long, seconds.
    pub seconds: f64,
    /// Packets a second, about: measured over the programs' whole run.
    pub packets_a_second: f64,
    /// Notifications that were relayed, a second.
    pub relayed: f64,
    /// What the broker used in that time.
    pub used: Usage,
}

/// Frames a second that are relayed with: so few that both sides sleep in between.
const RATE: &str = "5000";

/// Lets one link be busy.
pub fn measure(broker: &mut Broker, link: u32, way: Way, time: Duration) -> Result<Busy> {
    let start = |name: &str, words: &[&str]| {
        let mut command = Command::new(program("vhost-pci-guest")?);
        command.args(words).args(["--wait", way.wait(), "--json", "--socket"]);
        command.arg(socket(broker.folder(), link, if name == "peer" { "peer" } else { "owner" }));
        Process::spawn(name, command, &broker.folder().join(format!("{name}-{}.log", way.wait())))
    };
    let mut peer = start("peer", &["sink"])?;
    peer.wait_log("the device is started", SOON)?;
    let rate: &[&str] = if way == Way::Relayed { &["--rate", RATE] } else { &[] };
    // As little memory as the links' windows have room for.
    let owner = ["owner", "--mode", "gen", "--memory-mib", "1", "--ring-size", "64", "--guest-start", "0"];
    let mut owner = start("owner", &[&owner, rate].concat())?;
    owner.wait_log("the owner's device is started", SOON)?;
    peer.wait_log("the link is up", SOON)?;
    // The link's own start is over then.
    broker.usage_when(SOON, |usage| usage.clocks == 0)?;
    let counted = (broker.relayed(link)?, Instant::now());
    // So that to be asked is no part of it.
    let used = match way {
        Way::Polling => broker.usage_at_rest(SOON)?,
        // It has something to do all the time.
        Way::Relayed => broker.usage()?,
    };
    let began = Instant::now();
    thread::sleep(time);
    let (used, seconds) = (Usage::between(&used, &broker.usage()?), began.elapsed().as_secs_f64());
    let relayed = (broker.relayed(link)? - counted.0) as f64 / counted.1.elapsed().as_secs_f64();

    ensure!(owner.terminate(SOON)?.success(), "the owner:\n{}", owner.log());
    ensure!(peer.terminate(SOON)?.success(), "the peer:\n{}", peer.log());
    // Who comes before that is turned away.
    broker.wait_until_left(link)?;
    let (sent, got) = (last_object(&owner)?, last_object(&peer)?);
    let number = |object: &Value, name: &str| object.get(name).and_then(Value::as_f64).unwrap_or(0.0);
    let (packets, took) = (number(&sent, "tx_packets"), number(&sent, "seconds"));
    ensure!(
        packets > 0.0 && number(&got, "rx_packets") == packets && number(&got, "corrupted") == 0.0,
        "of {packets} packets arrived: {got}"
    );
    Ok(Busy { way, seconds, packets_a_second: packets / took.max(1e-3), relayed, used })
}

fn last_object(program: &Process) -> Result<Value> {
    let log = program.log();
    let found = log.lines().rev().find_map(|line| serde_json::from_str(line).ok());
    found.with_context(|| format!("{} said nothing at its end", program.name()))
}
