//! Two VMs and what joins them: the parties of a measurement.

use std::path::Path;
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context, ensure};
use vhost_pci_switch::link::report::VringReport;

use crate::broker::{BrokerProcess, owner_socket, peer_socket};
use crate::child::Child;
use crate::guest;
use crate::owner::VRING;

/// How long a link may take to come up.
const PATIENCE: Duration = Duration::from_secs(20);

/// A link that the broker joins directly if it can. The owner's memory takes 8 MiB of the window.
pub const DIRECT: &str = "window = \"64M\"";
/// A link that it relays.
pub const RELAY: &str = "window = \"64M\"\nwiring = \"relay\"";

/// For how long nothing comes any more when all that had to come has come.
const QUIET: Duration = Duration::from_millis(2);

/// How the broker calls notifications without itself.
pub const DIRECT_WAY: &str = "direct";

/// Who begins a round trip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// A kick of the owner's, and the peer's call.
    OwnerFirst,
    /// A call of the peer's, and the owner's kick.
    PeerFirst,
}

impl Direction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::OwnerFirst, Self::PeerFirst];

    /// As it is printed.
    pub const fn name(self) -> &'static str {
        match self {
            Self::OwnerFirst => "owner-peer-owner",
            Self::PeerFirst => "peer-owner-peer",
        }
    }
}

/// Two processes, a VM each.
#[derive(Debug)]
pub struct Pair {
    /// The owner's VMM.
    pub owner: Child,
    /// The peer's.
    pub peer: Child,
}

impl Pair {
    /// The two sides of a link of this broker's. Waits until it is up. `more` is for the
    /// peer's process.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(broker: &BrokerProcess, folder: &Path, link: &str, more: &[&str]) -> anyhow::Result<Self> {
        let owner = owner_socket(folder, link);
        let owner = Child::start(&["owner", owner.to_str().context("a path")?])?;
        let peer = start_peer(folder, link, more)?;
        wait_until_up(broker, link, None)?;
        Ok(Self { owner, peer })
    }

    /// Waits until what belongs to the start of a link has come: notifications without a cause.
    ///
    /// # Errors
    /// If they do not end.
    pub fn settle(&mut self) -> anyhow::Result<()> {
        let start = Instant::now();
        self.owner.tell("idle")?;
        self.peer.tell("idle")?;
        let mut before = None;
        loop {
            let now = (self.owner.tell("interrupts")?, self.peer.tell("interrupts")?);
            if before.as_ref() == Some(&now) {
                break;
            }
            ensure!(start.elapsed() < PATIENCE, "notifications go on and on");
            before = Some(now);
            thread::sleep(QUIET);
        }
        self.owner.tell("stop")?;
        self.peer.tell("stop").map(drop)
    }

    /// So many round trips, in microseconds each.
    ///
    /// # Errors
    /// If one gets lost, or too many notifications come.
    pub fn measure(&mut self, direction: Direction, rounds: u64) -> anyhow::Result<Vec<f64>> {
        let (first, second) = match direction {
            Direction::OwnerFirst => (&mut self.owner, &mut self.peer),
            Direction::PeerFirst => (&mut self.peer, &mut self.owner),
        };
        let khz: f64 = first.tell("khz")?.parse()?;
        second.tell("echo")?;
        let answer = first.tell(&format!("measure {rounds}"));
        let echoed: u64 = second.tell("stop")?.parse()?;
        let times = guest::times(&answer?, khz)?;
        ensure!(echoed == rounds, "{echoed} notifications arrived in {rounds} round trips");
        Ok(times)
    }
}

/// A peer's process.
///
/// # Errors
/// If it does not start.
pub fn start_peer(folder: &Path, link: &str, more: &[&str]) -> anyhow::Result<Child> {
    let peer = peer_socket(folder, link);
    Child::start(&[&["peer", peer.to_str().context("a path")?], more].concat())
}

/// Waits until the broker says that the link is up, its vrings live, and their notifications
/// wired in one way or another. `before`: the generation of the link that was up before, if that
/// may not have ended yet. Gives the generation.
///
/// # Errors
/// If that takes too long.
pub fn wait_until_up(broker: &BrokerProcess, link: &str, before: Option<u64>) -> anyhow::Result<u64> {
    let start = Instant::now();
    loop {
        let report = broker.link(link)?;
        // Until the peer's VMM has answered the broker relays, without a reason.
        let is_wired = |vring: &VringReport| match vring.indirect_because {
            Some(_) => true,
            None => vring.kicks == DIRECT_WAY && vring.calls == DIRECT_WAY,
        };
        let is_live = report.vrings.iter().all(|vring| vring.state == "live" && is_wired(vring));
        if report.state == "up" && is_live && Some(report.generation) != before {
            return Ok(report.generation);
        }
        ensure!(start.elapsed() < PATIENCE, "the link does not come up: {report:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// How the notifications of the vring go, as the broker says.
///
/// # Errors
/// If it does not answer.
pub fn wiring(broker: &BrokerProcess, link: &str) -> anyhow::Result<String> {
    let report = broker.link(link)?;
    let vring = report.vrings.into_iter().find(|vring| vring.index == VRING);
    let vring = vring.context("the broker does not show the vring")?;
    Ok(if vring.kicks == vring.calls { vring.kicks } else { format!("{}, {}", vring.kicks, vring.calls) })
}

/// How many descriptors a process has open.
///
/// # Errors
/// If it is gone.
pub fn descriptors(process: u32) -> anyhow::Result<usize> {
    Ok(fs::read_dir(format!("/proc/{process}/fd"))?.count())
}
