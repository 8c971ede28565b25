//! What windows come to, and how that is printed: a table, and one JSON object.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::Result;
use serde::Serialize;

use crate::contender::{Contender, Kind};
use crate::counts::Counts;
use crate::host::Machine;
use crate::latency;
use crate::measure::{MOST_OTHERS, Measured};
use crate::probe::{self, Class, FAR_ABOVE, NEAR_BELOW, middle};
use crate::ratios::{self, Figures, Ratio, median};

/// A contender with a size, in a class.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its name.
    pub contender: &'static str,
    /// What it is compared as.
    #[serde(skip)]
    pub kind: Kind,
    /// Its place in the list of contenders.
    #[serde(skip)]
    pub order: usize,
    /// Packet size, bytes.
    pub size: usize,
    /// Where the processors were.
    pub class: Class,
    /// Million packets a second: the middle window.
    pub median: f64,
    /// The slowest.
    pub min: f64,
    /// The fastest.
    pub max: f64,
    /// How many.
    pub windows: usize,
    /// Payload of the middle one, 10^9 bytes a second.
    pub gigabytes_per_second: f64,
    /// Round trip of a cache line, nanoseconds: the middle of the windows'.
    pub round_trip_ns: f64,
}

/// Windows of a class.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct ClassCount {
    /// How many there were.
    pub windows: usize,
    /// Round trip of a cache line that is usual in it, nanoseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub round_trip_ns: Option<f64>,
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    machine: Machine,
    rounds: usize,
    /// Windows of each class.
    classes: BTreeMap<&'static str, ClassCount>,
    /// Windows in which others were too busy.
    windows_dropped: usize,
    /// Round trip of one cache line between the two processors, nanoseconds.
    round_trip: Spread,
    /// Packets of which every byte was looked at, those of which only the header was, and wrong ones.
    packets_sampled: u64,
    packets_headers_looked_at: u64,
    packets_corrupted: u64,
    contenders: BTreeMap<&'static str, About>,
    /// The figures.
    pub results: Vec<Row>,
    /// Of the steady state.
    #[serde(skip_serializing_if = "Option::is_none")]
    counts: Option<Counts>,
    /// Round trips of packets.
    latency: Vec<latency::Row>,
    /// By mode: why a start of them gave nothing.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    latency_failures: BTreeMap<&'static str, String>,
    ratios: BTreeMap<&'static str, Ratio>,
}

#[derive(Debug, Serialize)]
struct About {
    about: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    negotiated: Option<String>,
    /// Why not every packet of some was looked at before the rounds, if that was to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    unchecked: Option<String>,
    /// By size: why there is nothing, or nothing more.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    failures: BTreeMap<usize, String>,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        Some(Self { median: median(values)?, min, max })
    }
}

impl Report {
    /// From what was measured of the contenders, of which `all` are there.
    pub fn new(
        machine: Machine,
        contenders: &[Box<dyn Contender>],
        all: &[(&'static str, Kind)],
        measured: &Measured,
        counts: Option<Result<Counts>>,
    ) -> Self {
        let mut groups: BTreeMap<(usize, usize, Class), Vec<(f64, f64)>> = BTreeMap::new();
        let trips: Vec<_> = measured.windows.iter().map(|window| window.trips).collect();
        let (by_window, usual) = probe::classes(&trips);
        let count = |class: Class| ClassCount { windows: 0, round_trip_ns: usual.get(&class).copied() };
        let mut classes: BTreeMap<_, _> =
            Class::ALL.iter().map(|class| (class.word(), count(*class))).collect();
        for (window, class) in measured.windows.iter().zip(by_window) {
            let found = (window.mpps, middle(window.trips));
            groups.entry((window.size, window.contender, class)).or_default().push(found);
            classes.entry(class.word()).or_default().windows += 1;
        }
        let results: Vec<_> = groups
            .into_iter()
            .filter_map(|((size, at, class), values)| {
                let (contender, windows) = (contenders.get(at)?, values.len());
                let (values, trips): (Vec<_>, Vec<_>) = values.into_iter().unzip();
                let round_trip_ns = ratios::median(trips)?;
                let Spread { median, min, max } = Spread::of(values)?;
                let gigabytes_per_second = median * size as f64 / 1e3;
                let (contender, kind) = (contender.name(), contender.kind());
                Some(Row {
                    contender,
                    kind,
                    order: at,
                    size,
                    class,
                    median,
                    min,
                    max,
                    windows,
                    gigabytes_per_second,
                    round_trip_ns,
                })
            })
            .collect();
        let about = |(at, contender): (usize, &dyn Contender)| {
            let failures = measured.failures.iter().filter(|((whose, _), _)| *whose == at);
            let about = About {
                about: contender.about(),
                negotiated: measured.negotiated.get(&at).cloned(),
                unchecked: measured.unchecked.get(&at).map(|why| first_line(why)),
                failures: failures.map(|((_, size), why)| (*size, first_line(why))).collect(),
            };
            (contender.name(), about)
        };
        let copied = measured.copied.iter().map(|(_, size, bytes)| (*size, *bytes)).collect::<Vec<_>>();
        let counts = match counts {
            None => Err("not asked for".into()),
            Some(counts) => counts.map_err(|error| first_line(&format!("{error:#}"))),
        };
        let failures = measured
            .failures
            .iter()
            .filter_map(|((at, size), why)| Some(((contenders.get(*at)?.name(), *size), first_line(why))));
        let failures: BTreeMap<_, _> = failures.collect();
        let nothing = Spread { median: f64::NAN, min: f64::NAN, max: f64::NAN };
        Self {
            machine,
            rounds: measured.rounds,
            classes,
            windows_dropped: measured.dropped.values().sum::<usize>() + measured.dropped_latency,
            round_trip: Spread::of(measured.round_trips.clone()).unwrap_or(nothing),
            packets_sampled: measured.verdict.sampled,
            packets_headers_looked_at: measured.verdict.headers,
            packets_corrupted: measured.verdict.corrupted,
            contenders: contenders.iter().map(|contender| &**contender).enumerate().map(about).collect(),
            latency: latency::rows(&measured.latency),
            latency_failures: measured.latency_failures.clone(),
            ratios: ratios::all(&Figures {
                rows: &results,
                contenders: all,
                failures: &failures,
                windows: &measured.windows,
                latency: &measured.latency,
                latency_failures: &measured.latency_failures,
                copied: &copied,
                counts: counts.as_ref().map_err(String::as_str),
            }),
            counts: counts.ok(),
            results,
        }
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut text = self.machine.line() + "\n";
        let classes = self.classes.iter().map(|(word, ClassCount { windows, round_trip_ns })| {
            let at = round_trip_ns.map_or(String::new(), |trip| format!(" at {trip:.0} ns"));
            format!("{word} {windows}{at}")
        });
        let Spread { median, min, max } = self.round_trip;
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "{} rounds; windows of 1 s: {}; dropped {} (others used more than {MOST_OTHERS} % of a processor)\n\
             cache-line round trip {median:.0} ns ({min:.0} to {max:.0}); near below {NEAR_BELOW}, far above \
             {FAR_ABOVE}, middle between, mixed where the two probes of a window disagree, or with what is usual \
             in its class\npackets looked at {}, their headers only {}, corrupted {}",
            self.rounds,
            classes.collect::<Vec<_>>().join(", "),
            self.windows_dropped,
            self.packets_sampled,
            self.packets_headers_looked_at,
            self.packets_corrupted
        );
        for class in Class::ALL {
            if self.results.iter().any(|row| row.class == class) {
                self.class_table(class, &mut text);
            }
        }
        if !self.latency.is_empty() {
            let _ = writeln!(text, "\n{}", latency::Row::header());
        }
        for row in &self.latency {
            let _ = writeln!(text, "{}", row.line());
        }
        let _ = writeln!(text, "\nratios of medians");
        for (name, ratio) in &self.ratios {
            let _ = writeln!(text, "  {name:<50} {}", ratio.text());
        }
        let _ = writeln!(text);
        for (name, About { about, negotiated, unchecked, failures }) in &self.contenders {
            let _ = writeln!(text, "{name}: {about}");
            if let Some(words) = negotiated {
                let _ = writeln!(text, "  negotiated: {words}");
            }
            if let Some(why) = unchecked {
                let _ = writeln!(text, "  content not compared: {why}");
            }
            for (size, why) in failures {
                let _ = writeln!(text, "  {size} B: {why}");
            }
        }
        text
    }

    fn class_table(&self, class: Class, text: &mut String) {
        let _ = writeln!(
            text,
            "\n{:<7} {:<32} {:>8} {:>8} {:>8} {:>8} {:>7} {:>8} {:>8}",
            class.word(),
            "M packets a second",
            "median",
            "min",
            "max",
            "windows",
            "GB/s",
            "trip, ns",
            "to ours"
        );
        for row in self.results.iter().filter(|row| row.class == class) {
            let ours = self
                .results
                .iter()
                .find(|other| other.kind == Kind::Ours && (other.size, other.class) == (row.size, row.class));
            let ratio = ours.map_or("-".into(), |ours| format!("{:.2}", row.median / ours.median));
            let Row {
                contender, size, median, min, max, windows, gigabytes_per_second, round_trip_ns, ..
            } = row;
            let _ = writeln!(
                text,
                "{size:>5} B {contender:<32} {median:>8.2} {min:>8.2} {max:>8.2} {windows:>8} \
                 {gigabytes_per_second:>7.2} {round_trip_ns:>8.0} {ratio:>8}"
            );
        }
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().into()
}
