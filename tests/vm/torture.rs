//! Owner, peer and broker struck down at random, and what of the guests' traffic survives.
//!
//! A defect of QEMU's that ends a VMM is no failure of the switch: it is counted by itself, with
//! QEMU's message, and the VMM is started anew.
//!
//! A packet that a kernel drops for its checksum is a failure as well: somebody read a buffer that
//! had gone back to its owner (docs/architecture.md, Death and return).

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use vhost_pci_tests::{Random, Sandbox, Usage};

use crate::setup::{Mode, Setup};
use crate::testbed::{BOOT, COMMAND, OWNER, PEER, Testbed};
use crate::torture_traffic::{Received, begin, look, start, wait_for_file, wait_for_more};
use crate::{Scenario, option};

pub const SCENARIO: Scenario = Scenario {
    name: "torture",
    shows: "owner, peer and broker are killed, stopped and rebooted at random (--minutes N, --seed S): traffic resumes, \
            nothing comes corrupted or twice",
    run,
};

/// What the scenario can be told, each with a value.
pub const OPTIONS: [&str; 3] = ["--minutes", "--seed", "--only"];

/// How long traffic may take to resume when all is undone: TCP waits longer and longer between two
/// tries.
const RESUME: Duration = Duration::from_secs(60);
/// How long the broker may take to let go of what it has no use for.
const LET_GO: Duration = Duration::from_secs(10);
/// Memory that it may have more than when it was new, KiB: heaps keep a little.
const GROWTH: u64 = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    OwnerReset,
    OwnerKilled,
    PeerKilled,
    BrokerKilled,
    OwnerStopped,
    PeerStopped,
    BrokerStopped,
}

/// Those that cost a boot are in here once.
const KINDS: [Kind; 12] = [
    Kind::OwnerReset,
    Kind::OwnerKilled,
    Kind::PeerKilled,
    Kind::BrokerKilled,
    Kind::BrokerKilled,
    Kind::BrokerKilled,
    Kind::OwnerStopped,
    Kind::OwnerStopped,
    Kind::PeerStopped,
    Kind::PeerStopped,
    Kind::BrokerStopped,
    Kind::BrokerStopped,
];
const NAMES: [(Kind, &str); 7] = [
    (Kind::OwnerReset, "owner reset"),
    (Kind::OwnerKilled, "owner killed"),
    (Kind::PeerKilled, "peer killed"),
    (Kind::BrokerKilled, "broker killed"),
    (Kind::OwnerStopped, "owner stopped"),
    (Kind::PeerStopped, "peer stopped"),
    (Kind::BrokerStopped, "broker stopped"),
];

impl Kind {
    fn name(self) -> &'static str {
        NAMES.iter().find(|(kind, _)| *kind == self).map_or("", |(_, name)| name)
    }
}

fn run(sandbox: &Sandbox) -> Result<()> {
    let number = |name: &str| -> Result<Option<f64>> {
        option(name).map(|text| text.parse().with_context(|| format!("{name} {text}: no number"))).transpose()
    };
    let minutes = number("--minutes")?.unwrap_or(1.0);
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let seed = number("--seed")?.map_or(u64::from(clock.subsec_nanos()), |seed| seed as u64);
    let only = option("--only").map(|text| text.replace('-', " "));
    let kinds: Vec<_> =
        KINDS.into_iter().filter(|kind| only.as_ref().is_none_or(|only| only == kind.name())).collect();
    ensure!(
        !kinds.is_empty(),
        "--only: there is {}",
        NAMES.map(|(_, name)| name.replace(' ', "-")).join(", ")
    );
    println!("{minutes} minutes, seed {seed}");

    let setup = Setup { reconnect: true, ..Mode::Interrupt.into() };
    let mut torture = Torture::start(sandbox, setup, Random::new(seed))?;
    let began = Instant::now();
    while began.elapsed().as_secs_f64() < 60.0 * minutes {
        let kind = *torture.random.one(&kinds);
        let result = torture.strike(kind);
        result.or_else(|error| torture.bed.explain(&format!("{}: {error:#}", kind.name())))?;
    }
    torture.end()
}

/// The guest that a test of its own end is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Owner,
    Peer,
}

struct Torture<'s> {
    bed: Testbed<'s>,
    random: Random,
    began: Instant,
    /// By guests that are no more.
    past: Received,
    /// By the present ones, when they were last asked.
    owner: Received,
    peer: Received,
    driver: String,
    /// What the broker had when it had both.
    usual: Option<Usage>,
    pauses: Vec<(Kind, u64)>,
    /// Packets that both present kernels have dropped for their checksum.
    bad_checksums: u64,
    /// Times that a VMM ended by itself: whose, and what it said.
    defects: Vec<String>,
}

impl<'s> Torture<'s> {
    fn start(sandbox: &'s Sandbox, setup: Setup, random: Random) -> Result<Self> {
        let mut bed = Testbed::start(sandbox, setup)?;
        bed.wait_for_traffic()?;
        let mut torture = Self {
            bed,
            random,
            began: Instant::now(),
            past: Received::default(),
            owner: Received::default(),
            peer: Received::default(),
            driver: String::new(),
            usual: None,
            pauses: Vec::new(),
            bad_checksums: 0,
            defects: Vec::new(),
        };
        torture.started(Side::Owner)?;
        torture.started(Side::Peer)?;
        torture.flows()?;
        torture.look_at_broker()?;
        Ok(torture)
    }

    /// A guest has its network: it gets its traffic.
    fn started(&mut self, side: Side) -> Result<()> {
        let went = if side == Side::Owner { self.owner } else { self.peer };
        self.bad_checksums = self.bad_checksums.saturating_sub(went.bad_checksums);
        match side {
            Side::Owner => {
                self.past = self.past.and(std::mem::take(&mut self.owner));
                start(&mut self.bed.owner, OWNER, PEER)
            }
            Side::Peer => {
                self.past = self.past.and(std::mem::take(&mut self.peer));
                self.driver = self.bed.peer.sh_ok("pidof vhost-pci-guest", COMMAND)?;
                start(&mut self.bed.peer, PEER, OWNER)
            }
        }
    }

    /// Waits until datagrams come on both sides.
    fn flows(&mut self) -> Result<()> {
        self.owner = wait_for_more(&mut self.bed.owner, self.owner, RESUME).context("the owner")?;
        self.peer = wait_for_more(&mut self.bed.peer, self.peer, RESUME).context("the peer")?;
        Ok(())
    }

    fn strike(&mut self, kind: Kind) -> Result<()> {
        begin(&mut self.bed.owner)?;
        begin(&mut self.bed.peer)?;
        self.owner = look(&mut self.bed.owner)?;
        self.peer = look(&mut self.bed.peer)?;
        let lasts = match (kind, self.random.below(100)) {
            (Kind::OwnerStopped | Kind::PeerStopped | Kind::BrokerStopped, 0..60) => {
                self.random.between_ms(5, 500)
            }
            // Longer than the peer's VMM has for a change of its window, and than an owner waits.
            (Kind::OwnerStopped | Kind::PeerStopped | Kind::BrokerStopped, _) => {
                self.random.between_ms(2100, 5000)
            }
            (Kind::BrokerKilled, _) => self.random.between_ms(0, 500),
            _ => Duration::ZERO,
        };
        let at = self.began.elapsed().as_secs_f64();
        match kind {
            Kind::OwnerReset => {
                self.bed.owner.qmp("system_reset", &json!({}))?;
                self.bed.owner.wait_ready(BOOT)?;
                self.bed.start_owner_network()?;
                self.started(Side::Owner)?;
            }
            Kind::OwnerKilled => {
                self.bed.replace_owner()?;
                self.started(Side::Owner)?;
            }
            Kind::PeerKilled => {
                self.bed.replace_peer()?;
                self.started(Side::Peer)?;
            }
            Kind::BrokerKilled => {
                self.look_at_broker()?;
                self.bed.broker().kill()?;
                std::thread::sleep(lasts);
                self.bed.start_broker()?;
                self.usual = None;
                self.bed.replug_peer()?;
            }
            Kind::OwnerStopped => stop(self.bed.owner.qemu(), lasts)?,
            Kind::PeerStopped => stop(self.bed.peer.qemu(), lasts)?,
            Kind::BrokerStopped => stop(self.bed.broker(), lasts)?,
        }
        let resumed = self.wait_for_link().and_then(|()| self.flows());
        self.survive(resumed)?;
        // The guest that was not struck says how long it was without datagrams.
        let gap = match kind {
            Kind::OwnerReset | Kind::OwnerKilled => self.peer.gap_ms,
            Kind::PeerKilled => self.owner.gap_ms,
            _ => self.owner.gap_ms.max(self.peer.gap_ms),
        };
        self.pauses.push((kind, gap));
        println!(
            "{at:6.1} s: {} ({} ms): {gap} ms without datagrams; {} and {} files",
            kind.name(),
            lasts.as_millis(),
            self.owner.whole,
            self.peer.whole
        );
        let driver = self.bed.peer.sh_ok("pidof vhost-pci-guest", COMMAND)?;
        let lives = driver.split(' ').any(|pid| pid == self.driver);
        ensure!(lives, "the peer's driver, process {}, has ended; there are {driver}", self.driver);
        self.judge(kind)?;
        self.look_at_broker()
    }

    /// Waits until the broker says that the link is up: packets may flow a while longer by what was.
    fn wait_for_link(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            for guest in [&mut self.bed.owner, &mut self.bed.peer] {
                ensure!(guest.qemu().exited()?.is_none(), "QEMU ended");
            }
            let status = self.bed.status()?;
            if status["links"][0]["state"] == "up" {
                return Ok(());
            }
            ensure!(start.elapsed() < RESUME, "the link is not up after {RESUME:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// If a VMM has ended by itself, that is noted, and it is started anew.
    fn survive(&mut self, resumed: Result<()>) -> Result<()> {
        let Err(error) = resumed else { return Ok(()) };
        // It may be about to end.
        std::thread::sleep(Duration::from_millis(500));
        let mut ended = false;
        for side in [Side::Owner, Side::Peer] {
            let (name, guest) = match side {
                Side::Owner => ("owner", &mut self.bed.owner),
                Side::Peer => ("peer", &mut self.bed.peer),
            };
            let Some(status) = guest.qemu().exited()? else { continue };
            ended = true;
            let log = guest.qemu().log();
            let said = log.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("nothing");
            let defect = format!("the {name}'s QEMU: {status}, having said: {said}");
            println!("        {defect}; it is started anew");
            self.defects.push(defect);
            match side {
                Side::Owner => self.bed.replace_owner()?,
                Side::Peer => self.bed.replace_peer()?,
            }
            self.started(side)?;
        }
        if !ended {
            return Err(error);
        }
        self.wait_for_link()?;
        self.flows()
    }

    /// Nothing may be corrupted or come twice.
    fn judge(&mut self, kind: Kind) -> Result<()> {
        for (name, received) in [("owner", self.owner), ("peer", self.peer)] {
            let Received { reordered, corrupted, wrong, .. } = received;
            ensure!(
                (reordered, corrupted, wrong) == (0, 0, 0),
                "the {name} has received what it should not: {received:?}"
            );
        }
        let now = self.owner.bad_checksums + self.peer.bad_checksums;
        let new = now.saturating_sub(std::mem::replace(&mut self.bad_checksums, now));
        ensure!(
            new == 0,
            "{new} packets came with a wrong checksum after '{}': {:?}, {:?}",
            kind.name(),
            self.owner,
            self.peer
        );
        Ok(())
    }

    /// Whether the broker has no more than it had when it was new and had both guests.
    fn look_at_broker(&mut self) -> Result<()> {
        let pid = self.bed.broker().pid();
        let start = Instant::now();
        let mut now = Usage::of(pid)?;
        let Some(usual) = self.usual else {
            // What goes soon was not there for long.
            std::thread::sleep(Duration::from_millis(300));
            self.usual = Some(Usage::of(pid)?);
            return Ok(());
        };
        while !now.is_within(&usual) || now.anonymous_kib > usual.anonymous_kib + GROWTH {
            if start.elapsed() > LET_GO {
                bail!("the broker has {now:?} and had {usual:?}; {GROWTH} KiB more are allowed");
            }
            std::thread::sleep(Duration::from_millis(50));
            now = Usage::of(pid)?;
        }
        Ok(())
    }

    /// The last look, and what it all came to.
    fn end(mut self) -> Result<()> {
        self.owner = wait_for_file(&mut self.bed.owner, self.owner, 2 * RESUME).context("the owner")?;
        self.peer = wait_for_file(&mut self.bed.peer, self.peer, 2 * RESUME).context("the peer")?;
        // What came late, if the last strike was the broker's death.
        let last = self.pauses.last().map_or(Kind::OwnerStopped, |(kind, _)| *kind);
        self.judge(last)?;
        self.bed.check_broker()?;
        println!("{:<16} {:>7} {:>13} {:>14}", "strike", "number", "median pause", "longest pause");
        for (kind, name) in NAMES {
            let mut pauses: Vec<_> =
                self.pauses.iter().filter(|(of, _)| *of == kind).map(|(_, pause)| pause).collect();
            pauses.sort();
            if let (Some(median), Some(longest)) = (pauses.get(pauses.len() / 2), pauses.last()) {
                println!("{name:<16} {:>7} {median:>10} ms {longest:>11} ms", pauses.len());
            }
        }
        let all = self.past.and(self.owner).and(self.peer);
        println!(
            "{} strikes: {} datagrams received, {} lost, {} twice or late, {} corrupted; {} files whole (SHA-256 \
             equal), {} cut off, {} wrong",
            self.pauses.len(),
            all.received,
            all.lost,
            all.reordered,
            all.corrupted,
            all.whole,
            all.cut,
            all.wrong
        );
        println!("packets that were dropped for their checksum: 0");
        println!("defects of QEMU: {}", self.defects.len());
        self.defects.iter().for_each(|defect| println!("  {defect}"));
        Ok(())
    }
}

fn stop(process: &mut vhost_pci_tests::Process, lasts: Duration) -> Result<()> {
    process.signal(Signal::SIGSTOP)?;
    std::thread::sleep(lasts);
    process.signal(Signal::SIGCONT)
}
