//! How long one packet takes to the peer and back, polled and by notifications: our owner's pings,
//! which our peer echoes, beside the least that two processors need for the same.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guest_driver_model::programs::ping::RoundTrips;
use serde::{Deserialize, Serialize};
use vhost_pci_tests::Process;

use crate::broker::{Broker, SOON, guest};
use crate::host::{RECEIVER, SENDER, Ticks};
use crate::measure::MOST_OTHERS;
use crate::probe::{self, Class, middle};
use crate::ratios::median;

/// How both sides find out about a packet.
pub struct Mode {
    /// Short.
    pub name: &'static str,
    /// What that means.
    pub about: &'static str,
    wait: &'static str,
    rate: Option<u32>,
}

/// The first one: its ratio has a target.
pub const POLLED: usize = 0;
/// All that are measured.
pub const MODES: [Mode; 4] = [
    Mode { name: "polled", about: "both sides look all the time", wait: "poll", rate: None },
    Mode {
        name: "adaptive",
        about: "both look for 50 us, then sleep until notified: never, as one packet follows the other",
        wait: "adaptive",
        rate: None,
    },
    Mode {
        name: "adaptive, 1000 a second",
        about: "the same, and each packet finds the peer asleep",
        wait: "adaptive",
        rate: Some(1000),
    },
    Mode { name: "interrupt", about: "both sleep until notified", wait: "interrupt", rate: None },
];

/// Packets of so many bytes.
const SIZE: usize = 64;
/// Between the start and the window, and the window.
const SETTLE: Duration = Duration::from_millis(200);
const WINDOW: Duration = Duration::from_secs(1);

/// What they are called by who asks for them.
pub fn names() -> impl Iterator<Item = String> {
    MODES.iter().map(name)
}

fn name(mode: &Mode) -> String {
    format!("round trip {}", mode.name)
}

/// Places among [`MODES`] of those that are asked for: all, if nothing else is.
pub fn chosen(only: &[String]) -> Vec<usize> {
    let wanted = |mode| only.is_empty() || only.iter().any(|word| name(mode).contains(word.as_str()));
    MODES.iter().enumerate().filter(|(_, mode)| wanted(mode)).map(|(at, _)| at).collect()
}

/// What one start has given.
#[derive(Clone, Debug)]
pub struct Latency {
    /// A place among [`MODES`].
    pub mode: usize,
    /// Round trips of one cache line before and after, nanoseconds.
    pub trips: [f64; 2],
    /// Round trips over two cache lines, one there and one back, likewise.
    pub two_lines: [f64; 2],
    /// Round trips over four, two there and two back, likewise.
    pub four_lines: [f64; 2],
    /// The packets'.
    pub round_trips: RoundTrips,
}

impl Latency {
    /// Where the processors were.
    pub fn class(&self) -> Class {
        Class::of(self.trips)
    }

    /// The packets' median over that of two cache lines.
    pub fn over_two_lines(&self) -> f64 {
        self.round_trips.p50_ns as f64 / middle(self.two_lines)
    }

    /// The packets' median over that of four.
    pub fn over_four_lines(&self) -> f64 {
        self.round_trips.p50_ns as f64 / middle(self.four_lines)
    }
}

/// The owner's last line.
#[derive(Deserialize)]
struct Line {
    round_trips: RoundTrips,
}

/// One start; `None` if others used the processors.
///
/// # Errors
/// If it does not work: with the logs of what failed.
pub fn take(mode: usize) -> Result<Option<Latency>> {
    let Mode { wait, rate, .. } = MODES.get(mode).context("no such mode")?;
    let probes =
        || anyhow::Ok([probe::round_trip()?, probe::two_line_round_trip()?, probe::four_line_round_trip()?]);
    let before = probes()?;
    let broker = Broker::start(1)?;
    let mut command = guest(RECEIVER)?;
    command.args(["echo", "--wait", wait, "--socket"]).arg(broker.peer_socket(0));
    let mut echo = Process::spawn("echo", command, &broker.path("echo.log"))?;
    echo.wait_log("the device is started", SOON)?;
    let mut command = guest(SENDER)?;
    command.args(["owner", "--mode", "ping", "--wait", wait, "--size", &SIZE.to_string(), "--json"]);
    if let Some(rate) = rate {
        command.args(["--rate", &rate.to_string()]);
    }
    command.arg("--socket").arg(broker.owner_socket(0));
    let mut owner = Process::spawn("owner", command, &broker.path("owner.log"))?;
    owner.wait_log("the owner's device is started", SOON)?;
    thread::sleep(SETTLE);
    let pids = [owner.pid(), echo.pid(), broker.pid()];
    let ticks = Ticks::now(&pids)?;
    thread::sleep(WINDOW);
    let others = Ticks::now(&pids)?.others_percent_since(ticks);
    owner.terminate(SOON)?;
    let logs = || format!("{}echo:\n{}\nowner:\n{}", broker.logs(), echo.log(), owner.log());
    let text = owner.log();
    let line = text.lines().rev().find(|line| line.starts_with('{')).with_context(logs)?;
    let Line { round_trips } = serde_json::from_str(line).with_context(logs)?;
    ensure!(round_trips.count > 0, "no packet came back\n{}", logs());
    ensure!(round_trips.corrupted + round_trips.lost == 0, "packets came back wrong, or not\n{}", logs());
    echo.terminate(SOON)?;
    drop((echo, broker));
    let after = probes()?;
    let [trips, two_lines, four_lines] = [0, 1, 2].map(|which| [before[which], after[which]]);
    Ok((others <= MOST_OTHERS).then_some(Latency { mode, trips, two_lines, four_lines, round_trips }))
}

/// All starts of a mode in one class.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    mode: &'static str,
    about: &'static str,
    /// Where the processors were.
    pub class: Class,
    /// Starts, and round trips of packets in all of them.
    windows: usize,
    count: u64,
    /// Round trip over two cache lines, one there and one back, and over four, nanoseconds.
    two_lines_ns: f64,
    four_lines_ns: f64,
    /// Of the starts the middle one's.
    min_ns: f64,
    p50_ns: f64,
    p90_ns: f64,
    p99_ns: f64,
    p99_9_ns: f64,
    p99_99_ns: f64,
    max_ns: f64,
    /// The median over that of lines: the middle start's.
    p50_over_two_lines: f64,
    p50_over_four_lines: f64,
    /// What reading the clock adds to each trip, nanoseconds.
    clock_ns: f64,
    /// Of all starts: trips of at most so many nanoseconds, and more than the bucket before.
    histogram: Vec<(u64, u64)>,
}

impl Row {
    /// The table's first line.
    pub fn header() -> String {
        format!(
            "{:<33} {:>7} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9} {:>7} {:>6} {:>7} {:>6}",
            format!("round trip of {SIZE} B, ns"),
            "starts",
            "median",
            "90 %",
            "99 %",
            "99.9 %",
            "99.99 %",
            "max",
            "2 lines",
            "to it",
            "4 lines",
            "to it"
        )
    }

    /// The others.
    pub fn line(&self) -> String {
        let Self { mode, class, windows, p50_ns, p90_ns, p99_ns, p99_9_ns, p99_99_ns, max_ns, .. } = self;
        let Self { two_lines_ns, p50_over_two_lines, four_lines_ns, p50_over_four_lines, .. } = self;
        format!(
            "{:<7} {mode:<25} {windows:>7} {p50_ns:>8.0} {p90_ns:>8.0} {p99_ns:>8.0} {p99_9_ns:>8.0} \
             {p99_99_ns:>8.0} {max_ns:>9.0} {two_lines_ns:>7.0} {p50_over_two_lines:>6.2} {four_lines_ns:>7.0} \
             {p50_over_four_lines:>6.2}",
            class.word()
        )
    }
}

/// By mode and class.
pub fn rows(latency: &[Latency]) -> Vec<Row> {
    let mut groups: BTreeMap<(usize, Class), Vec<&Latency>> = BTreeMap::new();
    for latency in latency {
        groups.entry((latency.mode, latency.class())).or_default().push(latency);
    }
    let row = |((mode, class), starts): ((usize, Class), Vec<&Latency>)| {
        let of = |value: &dyn Fn(&Latency) -> f64| median(starts.iter().map(|start| value(start)).collect());
        let ns = |value: fn(&RoundTrips) -> u64| of(&|start| value(&start.round_trips) as f64);
        let mut histogram = BTreeMap::new();
        for (until, count) in starts.iter().flat_map(|start| &start.round_trips.histogram) {
            *histogram.entry(*until).or_default() += count;
        }
        let Mode { name, about, .. } = MODES.get(mode)?;
        Some(Row {
            mode: name,
            about,
            class,
            windows: starts.len(),
            count: starts.iter().map(|start| start.round_trips.count).sum(),
            two_lines_ns: of(&|start| middle(start.two_lines))?,
            four_lines_ns: of(&|start| middle(start.four_lines))?,
            min_ns: ns(|trips| trips.min_ns)?,
            p50_ns: ns(|trips| trips.p50_ns)?,
            p90_ns: ns(|trips| trips.p90_ns)?,
            p99_ns: ns(|trips| trips.p99_ns)?,
            p99_9_ns: ns(|trips| trips.p99_9_ns)?,
            p99_99_ns: ns(|trips| trips.p99_99_ns)?,
            max_ns: ns(|trips| trips.max_ns)?,
            p50_over_two_lines: of(&Latency::over_two_lines)?,
            p50_over_four_lines: of(&Latency::over_four_lines)?,
            clock_ns: of(&|start| start.round_trips.clock_ns)?,
            histogram: histogram.into_iter().collect(),
        })
    };
    groups.into_iter().filter_map(row).collect()
}
