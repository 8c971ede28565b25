//! Masking: exactly one interrupt for what came meanwhile.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;

use crate::broker::BrokerProcess;
use crate::child::Child;
use crate::pair::{DIRECT, Pair, RELAY, wiring};

/// Links, wired both ways.
const LINKS: [(&str, &str); 2] = [("direct", DIRECT), ("relay", RELAY)];
/// How long an interrupt may take to be seen.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long nothing must happen.
const QUIET: Duration = Duration::from_millis(2);

/// Checks it, on a link that is wired directly and on one that the broker relays.
///
/// # Errors
/// What does not hold.
pub fn run(rounds: u64) -> anyhow::Result<String> {
    let folder = tempfile::tempdir()?;
    let broker = BrokerProcess::start(folder.path(), &LINKS)?;
    let mut told = Vec::new();
    for (link, _) in LINKS {
        let mut pair = Pair::start(&broker, folder.path(), link, &[])?;
        pair.settle()?;
        pair.peer.tell("idle")?;
        let mut kicks = 0;
        for round in 0..rounds {
            // Every eighth round nobody kicks.
            let count = round % 8;
            kicks += count;
            one(&mut pair, count)
                .map_err(|error| error.context(format!("{link}, round {round}, {count} kicks")))?;
        }
        pair.peer.tell("stop")?;
        let wiring = wiring(&broker, link)?;
        told.push(format!("{link} (wiring: {wiring}): {rounds} rounds, {kicks} kicks"));
    }
    Ok(format!("ok: masking: one interrupt for all kicks while masked, none without: {}", told.join("; ")))
}

/// Masks, kicks, unmasks.
fn one(pair: &mut Pair, kicks: u64) -> anyhow::Result<()> {
    let Pair { owner, peer } = pair;
    let before = interrupts(peer)?;
    ensure!(!is_pending(peer)?, "pending before anybody kicked");
    peer.tell("mask")?;
    if kicks > 0 {
        owner.tell(&format!("kick {kicks}"))?;
        wait(|| is_pending(peer), "the pending bit is not set")?;
    }
    thread::sleep(QUIET);
    ensure!(interrupts(peer)? == before, "an interrupt while masked");
    ensure!(is_pending(peer)? == (kicks > 0), "the pending bit has changed");
    peer.tell("unmask")?;
    if kicks > 0 {
        wait(|| Ok(interrupts(peer)? != before), "no interrupt after unmasking")?;
    }
    thread::sleep(QUIET);
    let came = interrupts(peer)? - before;
    ensure!(came == u64::from(kicks > 0), "{came} interrupts after unmasking");
    ensure!(!is_pending(peer)?, "pending after the interrupt");
    Ok(())
}

fn interrupts(peer: &mut Child) -> anyhow::Result<u64> {
    Ok(peer.tell("interrupts")?.parse()?)
}

fn is_pending(peer: &mut Child) -> anyhow::Result<bool> {
    Ok(peer.tell("pending")? == "1")
}

fn wait(mut done: impl FnMut() -> anyhow::Result<bool>, what: &str) -> anyhow::Result<()> {
    let start = Instant::now();
    while !done()? {
        ensure!(start.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}
