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
    /// Those whose content is compared before the rounds.
    pub content: Vec<usize>,
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

/// All that was measured.
#[derive(Debug, Default)]
pub struct Measured {
    /// The windows that count.
    pub windows: Vec<Window>,
    /// Rounds that were begun.
    pub rounds: usize,
    /// By contender and size: windows dropped because of others.
    pub dropped: BTreeMap<(usize, usize), usize>,
    /// Starts of round trips dropped because of others.
    pub dropped_latency: usize,
    /// Round trips of one cache line, nanoseconds: of every probe.
    pub round_trips: Vec<f64>,
    /// By contender and size: why it could not run, or gave nothing.
    pub failures: BTreeMap<(usize, usize), String>,
    /// Round trips of packets, and by mode why there are none.
    pub latency: Vec<Latency>,
    pub latency_failures: BTreeMap<&'static str, String>,
    /// By contender: what its sides agreed on.
    pub negotiated: BTreeMap<usize, String>,
    /// By contender and size: bytes copied for each packet, of each start that counted them.
    pub copied: Vec<(usize, usize, f64)>,
    /// By contender: why not every packet of some was looked at before the rounds.
    pub unchecked: BTreeMap<usize, String>,
    /// What was found in packets.
    pub verdict: Verdict,
}

impl Measured {
    /// A contender that delivers wrong packets has moved none, in this start and in those before, and is
    /// not started again.
    fn disqualify(&mut self, of: (usize, usize), verdict: Verdict) {
        let why = format!("counts 0: {} packets were corrupted", verdict.corrupted);
        let windows = self.windows.iter_mut().filter(|window| (window.contender, window.size) == of);
        windows.for_each(|window| window.mpps = 0.0);
        self.failures.insert(of, why);
    }

    /// Says of each of these that has no window and no failure why that is.
    fn explain(&mut self, wanted: impl IntoIterator<Item = (usize, usize)>, ended: Option<&str>) {
        for of in wanted {
            if self.windows.iter().any(|window| (window.contender, window.size) == of) {
                continue;
            }
            let why = match (self.dropped.get(&of), ended) {
                (Some(count), _) => {
                    format!(
                        "all of its {count} windows were dropped, as others used more than \
                         {MOST_OTHERS} % of a processor"
                    )
                }
                (None, Some(ended)) => format!("{ended} before its turn"),
                (None, None) => "it had no turn".into(),
            };
            self.failures.entry(of).or_insert(why);
        }
    }
}

/// Measures, with a line on stderr for each start, until `stop` is requested at the latest.
pub fn measure(contenders: &[Box<dyn Contender>], plan: &Plan, stop: &Stop) -> Measured {
    let mut measured = Measured::default();
    let begin = Instant::now();
    let sizes = contenders.iter().enumerate().map(|(at, contender)| (at, contender.sizes(&plan.sizes)));
    let wanted: Vec<_> =
        sizes.flat_map(|(at, sizes)| sizes.into_iter().map(move |size| (at, size))).collect();
    let mut ended = None;
    check_content(contenders, plan, (&mut measured, stop));
    'rounds: for round in 0..plan.rounds {
        measured.rounds += 1;
        let mut turns = wanted.clone();
        // The same size by all in turn; and each round begins with another contender.
        turns.sort_unstable_by_key(|(at, size)| (*size, (at + round) % contenders.len()));
        for (at, size) in turns {
            let Some(contender) = contenders.get(at).filter(|_| !measured.failures.contains_key(&(at, size)))
            else {
                continue;
            };
            if plan.until.is_some_and(|until| Instant::now() > until) {
                eprintln!("compare: round {} ends early: the time is over", round + 1);
                ended = Some("the time was over");
                break 'rounds;
            }
            wait_until_quiet();
            let windows = if contender.kind() == Kind::Floor { 1 } else { plan.windows };
            let taken = take(&**contender, (at, size), windows, (&mut measured, stop));
            let name = contender.name();
            // Who is interrupted at a terminal has seen the contender's processes end, too.
            if stop.is_requested() {
                eprintln!("compare: interrupted");
                ended = Some("it was interrupted");
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
                ended = Some("the time was over");
                break 'rounds;
            }
            wait_until_quiet();
            take_latency(*mode, &mut measured);
        }
    }
    measured.explain(wanted, ended);
    measured
}

/// Looks at packets that differ. Who loses or changes one is left out.
fn check_content(contenders: &[Box<dyn Contender>], plan: &Plan, (measured, stop): (&mut Measured, &Stop)) {
    for (at, contender) in contenders.iter().enumerate() {
        for size in &plan.content {
            if stop.is_requested() {
                return;
            }
            let (size, name) = (*size, contender.name());
            match contender.check_content(size) {
                Ok(None) => {}
                Ok(Some(verdict)) => {
                    let Verdict { sampled, corrupted, .. } = verdict;
                    eprintln!("compare: {name}: {sampled} packets of {size} B compared, {corrupted} wrong");
                    measured.verdict += verdict;
                    if corrupted > 0 {
                        for size in contender.sizes(&plan.sizes) {
                            measured.disqualify((at, size), verdict);
                        }
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
            measured.dropped_latency += 1;
        }
        Err(error) => {
            eprintln!("compare: round trip {name}: {error:#}");
            measured.latency_failures.insert(name, format!("{error:#}"));
        }
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
        if after.others_percent_since(before) < 2.0 * MOST_OTHERS {
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
            *measured.dropped.entry((at, size)).or_default() += 1;
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
    measured.verdict += verdict;
    measured.windows.extend(taken);
    if verdict.corrupted > 0 {
        line += &format!(": counts 0, now and before, as {} packets were corrupted", verdict.corrupted);
        measured.disqualify((at, size), verdict);
    }
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
    let others = Ticks::now(&pids)?.others_percent_since(ticks);
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

    fn window(contender: usize) -> Window {
        Window { contender, size: 64, trips: [100.0; 2], round: 1, mpps: 10.0 }
    }

    #[test]
    fn who_corrupts_a_packet_has_moved_none_in_any_start() {
        let mut measured = Measured { windows: vec![window(0), window(1), window(0)], ..Measured::default() };
        measured.disqualify((0, 64), Verdict { corrupted: 1, ..Verdict::default() });
        let mpps: Vec<_> = measured.windows.iter().map(|window| window.mpps).collect();
        assert_eq!(mpps, [0.0, 10.0, 0.0]);
        assert!(measured.failures[&(0, 64)].contains("1 packets"));
    }

    #[test]
    fn who_has_no_window_has_a_reason() {
        let mut measured = Measured { windows: vec![window(0)], ..Measured::default() };
        measured.dropped.insert((1, 64), 2);
        measured.failures.insert((2, 64), "no such program".into());
        measured.explain((0..4).map(|at| (at, 64)), Some("the time was over"));
        assert_eq!(measured.failures.keys().map(|(at, _)| *at).collect::<Vec<_>>(), [1, 2, 3]);
        assert!(measured.failures[&(1, 64)].contains("others"));
        assert_eq!(measured.failures[&(2, 64)], "no such program");
        assert_eq!(measured.failures[&(3, 64)], "the time was over before its turn");
    }

    #[test]
    fn packets_of_another_length_are_no_rate() {
        let at = Instant::now();
        let count = |packets, bytes| Count { at, packets, bytes };
        assert!(rate(count(0, 0), count(10_000, 640_064), 64).is_ok_and(|packets| packets == 10_000.0));
        assert!(rate(count(0, 0), count(10_000, 600_000), 64).is_err());
    }
}
