//! Masking: exactly one interrupt for what came meanwhile.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};

use crate::broker::BrokerProcess;
use crate::child::Child;
use crate::pair::{DIRECT, Pair, RELAY, wiring};

/// Links, wired both ways.
const LINKS: [(&str, &str); 2] = [("direct", DIRECT), ("relay", RELAY)];
/// Kicks while masked, one number a round. A relay may pass on one of several after the vector
/// was unmasked: there it is one.
const KICKS: [&[u64]; 2] = [&[1, 2, 3, 0, 4, 5, 6, 7], &[1, 1, 1, 0]];
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
    for ((link, _), numbers) in LINKS.into_iter().zip(KICKS) {
        let mut pair = Pair::start(&broker, folder.path(), link, &[])?;
        pair.settle()?;
        pair.peer.tell("idle")?;
        let mut kicks = 0;
        for (round, &count) in (0..rounds).zip(numbers.iter().cycle()) {
            kicks += count;
            one(&mut pair, count)
                .map_err(|error| error.context(format!("{link}, round {round}, {count} kicks")))?;
        }
        pair.peer.tell("stop")?;
        let masked = meanwhile(&mut pair, rounds)
            .map_err(|error| error.context(format!("{link}, masking meanwhile")))?;
        let wiring = wiring(&broker, link)?;
        told.push(format!("{link} (wiring: {wiring}): {rounds} rounds, {kicks} kicks, then masked {masked} times during {rounds} round trips"));
    }
    Ok(format!(
        "ok: masking: one interrupt for all kicks while masked, none without, none lost: {}",
        told.join("; ")
    ))
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

/// Round trips, each of which needs exactly one kick to arrive exactly once, while the peer's vector
/// is masked and unmasked all the time. Gives how often it was.
fn meanwhile(pair: &mut Pair, rounds: u64) -> anyhow::Result<u64> {
    let Pair { owner, peer } = pair;
    peer.tell("echo")?;
    let mut masked = 0;
    let measured = thread::scope(|scope| {
        let measuring = scope.spawn(|| owner.tell(&format!("measure {rounds}")));
        while !measuring.is_finished() {
            peer.tell("mask")?;
            peer.tell("unmask")?;
            masked += 1;
        }
        measuring.join().unwrap_or_else(|_| bail!("the thread that measures has panicked"))
    });
    let answered: u64 = peer.tell("stop")?.parse()?;
    measured?;
    ensure!(answered == rounds, "{answered} interrupts came for {rounds} kicks");
    Ok(masked)
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
