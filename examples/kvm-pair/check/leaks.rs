//! Descriptors: as many after many resets as before.

use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{bail, ensure};

use crate::broker::BrokerProcess;
use crate::pair::{DIRECT, Direction, Pair, descriptors, start_peer, wait_until_up, wiring};

const LINK: &str = "direct";
/// What is done before anything counts.
const WARM_UP: u64 = 5;
/// One VM is killed for so many resets.
const KILL_EVERY: u64 = 20;
/// Round trips that show that a link works.
const ROUND_TRIPS: u64 = 3;
/// How long the counts may take to become what they are to be.
const PATIENCE: u32 = 200;

/// How many descriptors broker, owner's VMM and peer's VMM have open.
type Counts = [usize; 3];

/// Checks it.
///
/// # Errors
/// What does not hold.
pub fn run(rounds: u64) -> anyhow::Result<String> {
    let folder = tempfile::tempdir()?;
    let broker = BrokerProcess::start(folder.path(), &[(LINK, DIRECT)])?;
    let mut pair = Pair::start(&broker, folder.path(), LINK, &[])?;
    let mut generation = wait_until_up(&broker, LINK, None)?;
    let was = wiring(&broker, LINK)?;
    let mut told = Vec::new();
    let kinds: [(&str, u64, Step); 3] = [
        ("driver unbound", rounds, unbind),
        ("FLR", rounds, reset),
        ("VM killed", rounds.div_ceil(KILL_EVERY), kill),
    ];
    for (name, rounds, step) in kinds {
        let mut link = Link { broker: &broker, folder: folder.path(), pair: &mut pair, generation };
        let context = |error: anyhow::Error, round| error.context(format!("{name}, round {round}"));
        for round in 0..WARM_UP {
            step(&mut link).map_err(|error| context(error, round))?;
        }
        let before = link.counts()?;
        for round in 0..rounds {
            step(&mut link).map_err(|error| context(error, round))?;
        }
        let after = link.counts_at(before)?;
        ensure!(
            after == before,
            "{name}: descriptors of broker, owner, peer: {before:?} before, {after:?} after {rounds} rounds"
        );
        generation = link.generation;
        let now = wiring(&broker, LINK)?;
        ensure!(now == was, "{name}: the wiring was {was} and is {now}: an eventfd is still registered");
        told.push(format!("{name} {rounds} times: {before:?}"));
    }
    Ok(format!(
        "ok: leaks: descriptors of broker, owner, peer as before, wiring {was} again: {}",
        told.join("; ")
    ))
}

type Step = fn(&mut Link<'_>) -> anyhow::Result<()>;

struct Link<'a> {
    broker: &'a BrokerProcess,
    folder: &'a Path,
    pair: &'a mut Pair,
    /// Of the link when it was up last.
    generation: u64,
}

impl Link<'_> {
    /// The counts, when they stay the same.
    fn counts(&self) -> anyhow::Result<Counts> {
        let mut before = self.count()?;
        loop {
            thread::sleep(Duration::from_millis(50));
            let now = self.count()?;
            if now == before {
                return Ok(now);
            }
            before = now;
        }
    }

    /// The counts, when they are these, or have had time to become so.
    fn counts_at(&self, wanted: Counts) -> anyhow::Result<Counts> {
        for _ in 0..PATIENCE {
            if self.count()? == wanted {
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
        self.count()
    }

    fn count(&self) -> anyhow::Result<Counts> {
        let Pair { owner, peer } = &*self.pair;
        Ok([descriptors(self.broker.process.id())?, descriptors(owner.id())?, descriptors(peer.id())?])
    }

    /// Waits until the broker has seen that the peer's VMM is gone: there can be but one.
    fn wait_until_gone(&self) -> anyhow::Result<()> {
        for _ in 0..PATIENCE {
            if self.broker.link(LINK)?.peer.state == "absent" {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(10));
        }
        bail!("the broker does not see the end of the peer's VMM")
    }

    /// Waits for the link, and sees that notifications pass both ways.
    fn works(&mut self) -> anyhow::Result<()> {
        self.generation = wait_until_up(self.broker, LINK, Some(self.generation))?;
        self.pair.settle()?;
        self.pair.measure(Direction::OwnerFirst, ROUND_TRIPS).map(drop)
    }
}

fn unbind(link: &mut Link<'_>) -> anyhow::Result<()> {
    link.pair.peer.tell("reset")?;
    link.pair.peer.tell("start")?;
    link.works()
}

fn reset(link: &mut Link<'_>) -> anyhow::Result<()> {
    link.pair.peer.tell("flr")?;
    link.pair.peer.tell("start")?;
    link.works()
}

fn kill(link: &mut Link<'_>) -> anyhow::Result<()> {
    link.pair.peer.kill()?;
    link.wait_until_gone()?;
    link.pair.peer = start_peer(link.folder, LINK, &[])?;
    link.works()
}
