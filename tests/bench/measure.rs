//! Rounds, in which every contender has its turn with every size: it is started, runs for a few
//! windows with a probe before and after each, and is ended.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use guest_driver_model::programs::stop::Stop;

use crate::contender::{Contender, Count, Kind, Running, Verdict};
use crate::host::Ticks;
use crate::latency::{self, Latency, MODES};
use crate::probe::{self, Class};

/// Length of a window.
const WINDOW: Duration = Duration::from_secs(1);
/// Between the end of a pause and the beginning of a window.
const SETTLE: Duration = Duration::from_millis(60);
/// Between a signal to stand still and the probe.
const STILL: Duration = Duration::from_millis(5);
/// Until packets flow.
const FLOW: Duration = Duration::from_secs(10);
/// Packets that have to have arrived before the first window.
const ENOUGH: u64 = 100_000;
/// How long to wait, before a start, for others to leave the processors alone, and how long one
/// look at that takes.
const QUIET: Duration = Duration::from_secs(15);
const LOOK: Duration = Duration::from_millis(150);
/// Windows that are tried for each that is wanted, as some may be dropped.
const TRIES: usize = 2;
/// A window in which others used more of a processor than this is worth nothing, percent.
pub const MOST_OTHERS: f64 = 6.0;
/// Packets of which the receiver may have counted one thing and not yet the other.
const SLACK: u64 = 256;

/// How much is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Packet sizes, bytes.
    pub sizes: Vec<usize>,
    /// Rounds.
    pub rounds: usize,
    /// Windows of a contender a start.
    pub windows: usize,
    /// No contender is started later than this.
    pub until: Option<Instant>,
    /// Places among [`MODES`] of round trips.
    pub latency: Vec<usize>,
}

/// One window of a contender.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Which, as a place in the list of contenders.
    pub contender: usize,
    /// Packet size, bytes.
    pub size: usize,
    /// Round trips of one cache line before and after it, nanoseconds.
    pub trips: [f64; 2],
    /// In which round.
    pub round: usize,
    /// Million packets a second.
    pub mpps: f64,
}

impl Window {
    /// Where the processors were.
    pub fn class(&self) -> Class {
        Class::of(self.trips)
    }
}

/// All that was measured.
#[derive(Debug, Default)]
pub struct Measured {
    /// The windows that count.
    pub windows: Vec<Window>,
    /// Rounds that were begun.
    pub rounds: usize,
    /// Windows dropped because of others.
    pub dropped: usize,
    /// Round trips of one cache line, nanoseconds: of every probe.
    pub round_trips: Vec<f64>,
    /// By contender and size: why it could not run, or gave nothing.
    pub failures: BTreeMap<(usize, usize), String>,
    /// Round trips of packets.
    pub latency: Vec<Latency>,
    /// By contender: what its sides agreed on.
    pub negotiated: BTreeMap<usize, String>,
    /// By contender and size: bytes copied for each packet, of each start that counted them.
    pub copied: Vec<(usize, usize, f64)>,
    /// By contender: why no packet of it was looked at.
    pub unchecked: BTreeMap<usize, String>,
    /// Packets of which every byte was looked at.
    pub sampled: u64,
    /// Those that were wrong.
    pub corrupted: u64,
}

/// Measures, with a line on stderr for each start, until `stop` is requested at the latest.
pub fn measure(contenders: &[Box<dyn Contender>], plan: &Plan, stop: &Stop) -> Measured {
    let mut measured = Measured::default();
    let begin = Instant::now();
    check_content(contenders, plan, (&mut measured, stop));
    'rounds: for round in 0..plan.rounds {
        measured.rounds += 1;
        let mut turns: Vec<(usize, usize)> = Vec::new();
        for (at, contender) in contenders.iter().enumerate() {
            turns.extend(contender.sizes(&plan.sizes).into_iter().map(|size| (size, at)));
        }
        // The same size by all in turn; and each round begins with another contender.
        turns.sort_unstable_by_key(|(size, at)| (*size, (at + round) % contenders.len()));
        for (size, at) in turns {
            let Some(contender) = contenders.get(at).filter(|_| !measured.failures.contains_key(&(at, size)))
            else {
                continue;
            };
            if plan.until.is_some_and(|until| Instant::now() > until) {
                eprintln!("compare: round {} ends before its time, which is over", round + 1);
                break 'rounds;
            }
            wait_until_quiet();
            let windows = if contender.kind() == Kind::Floor { 1 } else { plan.windows };
            let taken = take(&**contender, (at, size), windows, (&mut measured, stop));
            let name = contender.name();
            // Who is interrupted at a terminal has seen the contender's processes end, too.
            if stop.is_requested() {
                eprintln!("compare: interrupted");
                break 'rounds;
            }
            match taken {
                Ok(line) => eprintln!(
                    "compare: {:4.0} s, round {}/{}: {name:<22} {size:>6} B  {line}",
                    begin.elapsed().as_secs_f64(),
                    round + 1,
                    plan.rounds
                ),
                Err(error) => {
                    eprintln!("compare: {name}, {size} B: left out from now on: {error:#}");
                    measured.failures.insert((at, size), format!("{error:#}"));
                }
            }
        }
        for mode in &plan.latency {
            if stop.is_requested() || plan.until.is_some_and(|until| Instant::now() > until) {
                break 'rounds;
            }
            wait_until_quiet();
            take_latency(*mode, &mut measured);
        }
    }
    measured
}

/// Looks at the packets of those who do not do so while they run. Who loses or changes one is left
/// out.
fn check_content(contenders: &[Box<dyn Contender>], plan: &Plan, (measured, stop): (&mut Measured, &Stop)) {
    for (at, contender) in contenders.iter().enumerate() {
        // The longest packets have the most that can go wrong.
        for size in plan.sizes.iter().copied().max().into_iter().filter(|_| !stop.is_requested()) {
            let name = contender.name();
            match contender.check_content(size) {
                Ok(None) => {}
                Ok(Some(Verdict { sampled, corrupted })) => {
                    eprintln!("compare: {name}: {sampled} packets of {size} B compared, {corrupted} wrong");
                    measured.sampled += sampled;
                    measured.corrupted += corrupted;
                    if corrupted > 0 {
                        let why = format!("{corrupted} of {sampled} packets were corrupted");
                        measured.failures.extend(plan.sizes.iter().map(|size| ((at, *size), why.clone())));
                    }
                }
                Err(error) => {
                    eprintln!("compare: {name}: content not looked at: {error:#}");
                    measured.unchecked.insert(at, format!("{error:#}"));
                }
            }
        }
    }
}

/// Measures round trips once, with a line on stderr.
fn take_latency(mode: usize, measured: &mut Measured) {
    let Some(name) = MODES.get(mode).map(|mode| mode.name) else { return };
    match latency::take(mode) {
        Ok(Some(latency)) => {
            let (class, over) = (latency.class().word(), latency.over_two_lines());
            let trips = &latency.round_trips;
            let (p50, p99_9) = (trips.p50_ns, trips.p99_9_ns);
            eprintln!(
                "compare: round trip {name}: median {p50} ns ({over:.2} of two lines), 99.9 % {p99_9} ns, {class}"
            );
            measured.latency.push(latency);
        }
        Ok(None) => {
            eprintln!("compare: round trip {name}: dropped, as others used the processors");
            measured.dropped += 1;
        }
        Err(error) => eprintln!("compare: round trip {name}: {error:#}"),
    }
}

/// Waits for others to leave the processors alone; not for ever.
pub fn wait_until_quiet() {
    let begin = Instant::now();
    while begin.elapsed() < QUIET {
        let Ok(before) = Ticks::now(&[]) else { return };
        thread::sleep(LOOK);
        let Ok(after) = Ticks::now(&[]) else { return };
        // A tick is more than `MOST_OTHERS` of so short a time.
        if after.others_percent_since(before, LOOK.as_secs_f64()) < 2.0 * MOST_OTHERS {
            return;
        }
    }
}

/// Measures one contender for some windows. Says how it was.
fn take(
    contender: &dyn Contender,
    (at, size): (usize, usize),
    windows: usize,
    (measured, stop): (&mut Measured, &Stop),
) -> Result<String> {
    let mut running = contender.start(size)?;
    let result = watch(&mut *running, (at, size), windows, measured);
    if result.is_err() && !stop.is_requested() {
        eprintln!("{}", running.logs());
    }
    result
}

fn watch(
    running: &mut dyn Running,
    (at, size): (usize, usize),
    windows: usize,
    measured: &mut Measured,
) -> Result<String> {
    let flow = Instant::now();
    while running.received()?.packets < ENOUGH {
        ensure!(flow.elapsed() < FLOW, "it moved fewer than {ENOUGH} packets in {FLOW:?}");
        thread::sleep(Duration::from_millis(20));
    }
    if let Some(words) = running.negotiated() {
        measured.negotiated.insert(at, words);
    }
    let mut line = String::new();
    let mut taken = Vec::new();
    let mut before = standing_still(running, measured)?;
    for _ in 0..windows * TRIES {
        if taken.len() == windows {
            break;
        }
        thread::sleep(SETTLE);
        let (rate, others) = window(running, size)?;
        let after = standing_still(running, measured)?;
        let class = Class::of([before, after]);
        let busy = others > MOST_OTHERS;
        line += &format!(" {rate:7.2} M/s {:5}", class.word());
        if busy {
            line += &format!(" (dropped: others used {others:.0} %)");
            measured.dropped += 1;
        } else {
            taken.push(Window {
                contender: at,
                size,
                trips: [before, after],
                round: measured.rounds,
                mpps: rate,
            });
        }
        before = after;
    }
    let verdict = running.verdict()?;
    measured.sampled += verdict.sampled;
    measured.corrupted += verdict.corrupted;
    if verdict.corrupted > 0 {
        line += &format!(": counts 0, as {} packets were corrupted", verdict.corrupted);
        taken.iter_mut().for_each(|window| window.mpps = 0.0);
    }
    measured.windows.extend(taken);
    if let Some(copied) = running.copied_per_packet()? {
        line += &format!("; {copied:.1} bytes copied a packet");
        measured.copied.push((at, size, copied));
    }
    Ok(line)
}

/// The probe, while the contender stands still. It runs again afterwards.
fn standing_still(running: &mut dyn Running, measured: &mut Measured) -> Result<f64> {
    running.pause()?;
    thread::sleep(STILL);
    let trip = probe::round_trip();
    running.resume()?;
    let trip = trip.context("the probe")?;
    measured.round_trips.push(trip);
    Ok(trip)
}

/// Million packets a second, and what others used meanwhile, percent of a processor.
fn window(running: &mut dyn Running, size: usize) -> Result<(f64, f64)> {
    let pids = running.pids();
    let ticks = Ticks::now(&pids)?;
    let from = running.received()?;
    thread::sleep(WINDOW);
    let to = running.received()?;
    let seconds = to.at.duration_since(from.at).as_secs_f64();
    let others = Ticks::now(&pids)?.others_percent_since(ticks, seconds);
    Ok((rate(from, to, size)? / seconds / 1e6, others))
}

/// Packets, if all of them had the right length.
fn rate(from: Count, to: Count, size: usize) -> Result<f64> {
    let (packets, bytes) = (to.packets - from.packets, to.bytes - from.bytes);
    let off = bytes.abs_diff(packets * size as u64);
    ensure!(off <= SLACK * size as u64, "{packets} packets of {size} bytes would not be {bytes} bytes");
    Ok(packets as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_of_another_length_are_no_rate() {
        let at = Instant::now();
        let count = |packets, bytes| Count { at, packets, bytes };
        assert!(rate(count(0, 0), count(10_000, 640_064), 64).is_ok_and(|packets| packets == 10_000.0));
        assert!(rate(count(0, 0), count(10_000, 600_000), 64).is_err());
    }
}
