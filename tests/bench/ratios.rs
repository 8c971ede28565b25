//! The ratios that have a target, by name: medians of one run, within one class. And beside each
//! the same over all classes, from windows of one round during which the processors were at the
//! same place.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::contender::Kind;
use crate::counts::Counts;
use crate::floors;
use crate::latency::{self, Latency, POLLED};
use crate::measure::Window;
use crate::probe::{Class, are_alike, middle};
use crate::report::Row;
use crate::switch;

/// Fewer windows than this say little.
const FEW: usize = 3;

/// What a figure is to be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
}

impl Target {
    fn is_met_by(self, value: f64) -> bool {
        match self {
            Self::AtLeast(target) => value >= target,
            Self::AtMost(target) => value <= target,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtLeast(target) => format!("at least {target}"),
            Self::AtMost(target) => format!("at most {target}"),
        }
    }
}

/// A ratio, or another figure with a target.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// None if it was not measured, or not in the class that it is for.
    value: Option<f64>,
    /// None if it is told for information.
    target: Option<Target>,
    /// Whether the value is what is wanted, and all of those that are compared were measured.
    met: Option<bool>,
    /// Windows above and below the line.
    windows: [usize; 2],
    /// Over all classes: no substitute for the class that the target is for.
    #[serde(skip_serializing_if = "Option::is_none")]
    all_classes: Option<Paired>,
    /// Why there is no value, or what is to be known of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

/// Ratios of windows that belong together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Paired {
    /// The median round's.
    value: f64,
    /// Rounds that had such windows.
    rounds: usize,
}

impl Ratio {
    fn new(value: Option<f64>, target: impl Into<Option<Target>>, windows: [usize; 2]) -> Self {
        let target = target.into();
        let met = target.map(|target: Target| value.is_some_and(|value| target.is_met_by(value)));
        let few = value.is_some() && windows.iter().any(|count| *count < FEW);
        let note = few.then(|| format!("fewer than {FEW} windows say little"));
        Self { value, target, met, windows, all_classes: None, note }
    }

    fn missing(target: impl Into<Option<Target>>, why: impl Into<String>) -> Self {
        Self { note: Some(why.into()), ..Self::new(None, target, [0, 0]) }
    }

    /// The value is not what it should be.
    fn discredit(&mut self, why: &str) {
        self.met = self.met.map(|_| false);
        self.tell(why);
    }

    fn tell(&mut self, what: &str) {
        let before = self.note.take().map(|note| note + "; ").unwrap_or_default();
        self.note = Some(before + what);
    }

    /// For people.
    pub fn text(&self) -> String {
        let Self { value, target, met, windows: [above, below], all_classes, note } = self;
        let wanted = target.map_or("for information".into(), Target::text);
        let mut text = match value {
            Some(value) => {
                let verdict = match met {
                    Some(true) => " met",
                    Some(false) => " missed",
                    None => "",
                };
                format!("{value:7.3}  {wanted}{verdict} ({above} and {below} windows)")
            }
            None => format!("      -  {wanted}, not measured"),
        };
        if let Some(note) = note {
            text += &format!("; {note}");
        }
        if let Some(Paired { value, rounds }) = all_classes {
            text += &format!("; over all classes {value:.3} ({rounds} rounds)");
        }
        text
    }
}

/// What ratios are made of.
#[derive(Clone, Copy, Debug)]
pub struct Figures<'a> {
    /// Contender, size and class.
    pub rows: &'a [Row],
    /// All contenders that there are, also those that were not asked for.
    pub contenders: &'a [(&'static str, Kind)],
    /// By contender and size: why it was not measured.
    pub failures: &'a BTreeMap<(&'static str, usize), String>,
    /// What the rows are made of.
    pub windows: &'a [Window],
    /// Round trips of packets, and by mode why there are none.
    pub latency: &'a [Latency],
    pub latency_failures: &'a BTreeMap<&'static str, String>,
    /// By size: bytes that our forwarder copied for each packet.
    pub copied: &'a [(usize, f64)],
    /// What our programs do besides, or why it was not counted.
    pub counts: Result<&'a Counts, &'a str>,
}

/// Figures with a target that other programs measure.
const ELSEWHERE: [(&str, Target, &str); 5] = [
    ("chain_of_5_hops_packets_per_cpu_second_over_1_hop", Target::AtLeast(0.85), CHAIN),
    ("1000_links_slowest_up_ms", Target::AtMost(10.0), SCALE),
    ("1000_links_resident_kib_per_link", Target::AtMost(256.0), SCALE),
    ("1000_links_threads_per_link", Target::AtMost(4.0), SCALE),
    ("1000_links_idle_cpu_percent", Target::AtMost(0.0), SCALE),
];
const CHAIN: &str = "examples/chain";
const SCALE: &str = "tests/bench/scale";

type Which = fn(&'static str, Kind) -> bool;

/// A ratio of rates: name, class, size, above the line, below it, at least.
type Rates = (&'static str, Class, usize, Which, Which, Option<f64>);

const COPY: Which = |_, kind| kind == Kind::Ours;
const IN_PLACE: Which = |_, kind| kind == Kind::InPlace;
const MEMIF: Which = |_, kind| kind == Kind::Memif;
const VHOST: Which = |_, kind| kind == Kind::Vhost;
const PEER: Which = |_, kind| matches!(kind, Kind::Memif | Kind::Vhost);
const RING: Which = |name, _| floors::is_ring(name);
const INTO_OURS: Which = |_, kind| kind == Kind::Mixed;
const OUR_SWITCH: Which = |_, kind| kind == Kind::OurSwitch;
const SWITCH: Which = |_, kind| kind == Kind::Switch;
/// Between owners of ours, and between DPDK's.
const OUR_SWITCH_OURS: Which = |name, kind| kind == Kind::OurSwitch && name.contains(switch::OUR_OWNERS);
const OUR_SWITCH_DPDK: Which = |name, kind| kind == Kind::OurSwitch && !name.contains(switch::OUR_OWNERS);
const SWITCH_OURS: Which = |name, kind| kind == Kind::Switch && name.contains(switch::OUR_OWNERS);
const SWITCH_DPDK: Which = |name, kind| kind == Kind::Switch && !name.contains(switch::OUR_OWNERS);

const RATES: [Rates; 17] = [
    ("near_64_copy_over_best_memif", Class::Near, 64, COPY, MEMIF, Some(1.3)),
    ("near_64_copy_over_best_vhost", Class::Near, 64, COPY, VHOST, Some(2.0)),
    ("near_1500_copy_over_best_memif", Class::Near, 1500, COPY, MEMIF, Some(1.1)),
    ("near_1500_copy_over_spsc_copy_floor", Class::Near, 1500, COPY, RING, Some(0.8)),
    ("near_64_in_place_over_best_memif", Class::Near, 64, IN_PLACE, MEMIF, Some(1.5)),
    ("near_1500_in_place_over_best_memif", Class::Near, 1500, IN_PLACE, MEMIF, Some(3.0)),
    ("far_64_copy_over_best_peer", Class::Far, 64, COPY, PEER, Some(1.5)),
    ("far_1500_copy_over_best_peer", Class::Far, 1500, COPY, PEER, Some(1.5)),
    ("near_64_same_sender_ours_over_vhost", Class::Near, 64, INTO_OURS, VHOST, Some(1.25)),
    ("near_256_same_sender_ours_over_vhost", Class::Near, 256, INTO_OURS, VHOST, Some(1.25)),
    ("near_1500_same_sender_ours_over_vhost", Class::Near, 1500, INTO_OURS, VHOST, Some(1.25)),
    ("near_64_forwarding_over_best_vhost_switch", Class::Near, 64, OUR_SWITCH, SWITCH, Some(1.5)),
    ("near_1500_forwarding_over_best_vhost_switch", Class::Near, 1500, OUR_SWITCH, SWITCH, Some(2.0)),
    ("near_64_forwarding_our_owners_over_vhost_switch", Class::Near, 64, OUR_SWITCH_OURS, SWITCH_OURS, None),
    (
        "near_1500_forwarding_our_owners_over_vhost_switch",
        Class::Near,
        1500,
        OUR_SWITCH_OURS,
        SWITCH_OURS,
        None,
    ),
    ("near_64_forwarding_dpdk_owners_over_vhost_switch", Class::Near, 64, OUR_SWITCH_DPDK, SWITCH_DPDK, None),
    (
        "near_1500_forwarding_dpdk_owners_over_vhost_switch",
        Class::Near,
        1500,
        OUR_SWITCH_DPDK,
        SWITCH_DPDK,
        None,
    ),
];

/// All of them, also those that were not measured.
pub fn all(figures: &Figures<'_>) -> BTreeMap<&'static str, Ratio> {
    let mut all: BTreeMap<_, _> = RATES.iter().map(|rates| (rates.0, of_rates(figures, rates))).collect();
    all.insert("near_polled_round_trip_over_two_lines", of_latency(figures));
    for (size, name) in
        [(64, "forwarding_64_copied_over_payload"), (1500, "forwarding_1500_copied_over_payload")]
    {
        let copied = figures.copied.iter().filter(|(whose, _)| *whose == size);
        let copied: Vec<_> = copied.map(|(_, bytes)| bytes / size as f64).collect();
        let count = copied.len();
        // The start that copied most.
        let most = copied.into_iter().reduce(f64::max);
        let mut ratio = Ratio::new(most, Target::AtMost(1.0), [count, count]);
        ratio.note =
            most.is_none().then(|| "our forwarder was not measured with packets of that size".into());
        all.insert(name, ratio);
    }
    all.extend(of_counts(figures.counts));
    all.extend(
        ELSEWHERE.map(|(name, target, who)| (name, Ratio::missing(target, format!("{who} measures it")))),
    );
    all
}

/// Once a second each program looks whether the broker is there, however many packets pass: less
/// than this for each packet is nothing. Yields of who finds nothing are not counted here, but told.
const NOTHING: f64 = 1e-6;

fn of_counts(counts: Result<&Counts, &str>) -> [(&'static str, Ratio); 3] {
    type Share = fn(&Counts) -> f64;
    let of = |share: Share, target, words: fn(&Counts) -> String| match counts {
        Err(why) => Ratio::missing(target, why),
        Ok(counts) => {
            let share = share(counts);
            Ratio { note: Some(words(counts)), ..Ratio::new(Some(share), target, [1, 1]) }
        }
    };
    let calls = of(
        |counts| counts.system_calls.iter().sum::<u64>() as f64 / counts.packets_during_calls as f64,
        Target::AtMost(NOTHING),
        |counts| {
            let Counts { packets_during_calls: packets, counted_by, .. } = counts;
            let Counts { system_calls_by_name, others_percent, .. } = counts;
            let calls = system_calls_by_name.join(", ");
            format!(
                "in {packets} packets, by {counted_by}: {calls}; others used {others_percent:.0} % of a processor"
            )
        },
    );
    let allocations = of(
        |counts| counts.allocations.iter().sum::<u64>() as f64 / counts.packets as f64,
        Target::AtMost(NOTHING),
        |counts| format!("in {} packets: {:?} by owner and peer", counts.packets, counts.allocations),
    );
    let hits = of(
        |counts| 1.0 - counts.searches as f64 / counts.packets as f64,
        Target::AtLeast(0.99),
        |counts| format!("{} of {} buffers were searched for", counts.searches, counts.packets),
    );
    [
        ("system_calls_per_packet", calls),
        ("allocations_per_packet", allocations),
        ("translation_last_range_hits", hits),
    ]
}

fn of_rates(figures: &Figures<'_>, (_, class, size, above, below, target): &Rates) -> Ratio {
    let rows = |which: Which| {
        figures.rows.iter().filter(move |row| row.size == *size && which(row.contender, row.kind))
    };
    let counts = |row: &&Row| row.class == *class && row.median > 0.0;
    let best =
        |which: Which| rows(which).filter(counts).max_by(|one, other| one.median.total_cmp(&other.median));
    // Who else might have been the best.
    let absent = |which: Which| {
        let all = figures.contenders.iter().filter(move |(name, kind)| which(name, *kind));
        let absent =
            all.filter(move |(name, _)| !rows(which).filter(counts).any(|row| row.contender == *name));
        let told = absent.map(|(name, _)| match figures.failures.get(&(*name, *size)) {
            Some(why) => format!("{name}: {why}"),
            None if rows(which).any(|row| row.contender == *name) => {
                format!("{name}: no windows of class {}", class.word())
            }
            None => format!("{name}: not asked for"),
        });
        told.collect::<Vec<_>>().join("; ")
    };
    let target = target.map(Target::AtLeast);
    let mut ratio = match (best(*above), best(*below)) {
        (Some(above), Some(below)) => {
            let windows = [above.windows, below.windows];
            let mut ratio = Ratio::new(Some(above.median / below.median), target, windows);
            if !are_alike(above.round_trip_ns, below.round_trip_ns) {
                let [above, below] = [above, below].map(|row| row.round_trip_ns);
                ratio.discredit(&format!("not at the same place: round trips {above:.0} and {below:.0} ns"));
            }
            ratio
        }
        _ => Ratio::missing(target, format!("no windows of class {} on both sides", class.word())),
    };
    // A best of fewer is easier to beat.
    match absent(*below) {
        none if none.is_empty() => {}
        some => ratio.discredit(&format!("below the line are missing: {some}")),
    }
    match absent(*above) {
        none if none.is_empty() => {}
        some => ratio.tell(&format!("above the line are missing: {some}")),
    }
    let orders = |which| rows(which).map(|row| row.order).collect::<BTreeSet<_>>();
    let lowest = |above| {
        let all =
            orders(*below).into_iter().filter_map(|below| pair_up(figures.windows, *size, above, below));
        all.min_by(|one, other| one.value.total_cmp(&other.value))
    };
    let all = orders(*above).into_iter().filter_map(lowest);
    ratio.all_classes = all.max_by(|one, other| one.value.total_cmp(&other.value));
    ratio
}

/// The ratio of two contenders in the middle round, from windows with the processors at the same
/// place before and after each, and during both.
fn pair_up(windows: &[Window], size: usize, above: usize, below: usize) -> Option<Paired> {
    let mut rounds: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    let of = |contender| {
        let windows =
            windows.iter().filter(move |window| (window.contender, window.size) == (contender, size));
        windows.filter(|window| are_alike(window.trips[0], window.trips[1]))
    };
    for above in of(above) {
        let below = of(below).filter(|below| below.round == above.round && below.mpps > 0.0);
        for below in below.filter(|below| are_alike(middle(below.trips), middle(above.trips))) {
            rounds.entry(above.round).or_default().push(above.mpps / below.mpps);
        }
    }
    let medians: Vec<_> = rounds.into_values().filter_map(median).collect();
    Some(Paired { rounds: medians.len(), value: median(medians)? })
}

fn of_latency(figures: &Figures<'_>) -> Ratio {
    let target = Target::AtMost(3.0);
    let polled = figures.latency.iter().filter(|latency| latency.mode == POLLED);
    let all: Vec<_> = polled.clone().map(Latency::over_two_lines).collect();
    let near = polled.filter(|latency| latency.class() == Class::Near);
    let near: Vec<_> = near.map(Latency::over_two_lines).collect();
    let (count, rounds) = (near.len(), all.len());
    let mut ratio = match median(near) {
        Some(value) => Ratio::new(Some(value), target, [count, count]),
        None if rounds == 0 => {
            let why = figures.latency_failures.get(latency::MODES[POLLED].name);
            Ratio::missing(target, why.map_or("round trips were not measured", String::as_str))
        }
        None => Ratio::missing(target, "no windows of class near"),
    };
    ratio.all_classes = median(all).map(|value| Paired { value, rounds });
    ratio
}

/// Of an even number the mean of the middle two.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.get(values.len().checked_sub(1)? / 2)?, values.get(values.len() / 2)?);
    Some((low + high) / 2.0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const CONTENDERS: [(&str, Kind); 3] =
        [("ours copy", Kind::Ours), ("memif copy", Kind::Memif), ("memif zero-copy", Kind::Memif)];

    fn row(order: usize, class: Class, median: f64) -> Row {
        let (contender, kind) = CONTENDERS[order];
        let (size, windows, min, max) = (64, 3, 0.0, 0.0);
        let (gigabytes_per_second, round_trip_ns) = (0.0, 100.0);
        Row {
            contender,
            kind,
            order,
            size,
            class,
            median,
            min,
            max,
            windows,
            gigabytes_per_second,
            round_trip_ns,
        }
    }

    fn ratio(rows: &[Row], windows: &[Window], name: &str) -> Ratio {
        ratio_with(rows, windows, &BTreeMap::new(), name)
    }

    fn ratio_with(
        rows: &[Row],
        windows: &[Window],
        failures: &BTreeMap<(&'static str, usize), String>,
        name: &str,
    ) -> Ratio {
        let figures = Figures {
            rows,
            contenders: &CONTENDERS,
            failures,
            windows,
            latency: &[],
            latency_failures: &BTreeMap::new(),
            copied: &[],
            counts: Err("not counted"),
        };
        all(&figures).remove(name).unwrap()
    }

    #[test]
    fn the_best_of_a_kind_is_compared_and_only_within_a_class() {
        let rows = [
            row(0, Class::Near, 30.0),
            row(1, Class::Near, 20.0),
            row(2, Class::Near, 10.0),
            row(2, Class::Far, 100.0),
        ];
        let near = ratio(&rows, &[], "near_64_copy_over_best_memif");
        assert_eq!((near.value, near.met, near.windows, near.note), (Some(1.5), Some(true), [3, 3], None));
        let far = ratio(&rows, &[], "far_64_copy_over_best_peer");
        assert_eq!((far.value, far.met), (None, Some(false)));
        assert!(far.note.unwrap().contains("far"));
    }

    #[test]
    fn no_target_is_met_while_one_who_may_be_the_best_of_the_others_is_missing() {
        let rows = [row(0, Class::Near, 30.0), row(1, Class::Near, 20.0)];
        let name = "near_64_copy_over_best_memif";
        let found = ratio(&rows, &[], name);
        assert_eq!((found.value, found.met), (Some(1.5), Some(false)));
        assert!(found.note.unwrap().contains("memif zero-copy: not asked for"));
        let failures = BTreeMap::from([(("memif zero-copy", 64), "it hung".to_owned())]);
        let found = ratio_with(&rows, &[], &failures, name);
        assert!(found.met == Some(false) && found.note.unwrap().contains("it hung"));
        let corrupted = [&rows[..], &[row(2, Class::Near, 0.0)]].concat();
        let found = ratio(&corrupted, &[], name);
        assert_eq!((found.value, found.met), (Some(1.5), Some(false)));
        let elsewhere = [&rows[..], &[row(2, Class::Far, 90.0)]].concat();
        let found = ratio(&elsewhere, &[], name);
        assert!(found.met == Some(false) && found.note.unwrap().contains("no windows of class near"));
    }

    #[test]
    fn what_was_at_two_places_is_not_compared() {
        let mut rows = [0, 1, 2].map(|order| row(order, Class::Near, 30.0 / (order + 1) as f64));
        rows[1].round_trip_ns = 120.0;
        let found = ratio(&rows, &[], "near_64_copy_over_best_memif");
        assert!(found.met == Some(false) && found.note.unwrap().contains("100 and 120 ns"));
    }

    #[test]
    fn windows_are_paired_within_a_round_and_at_the_same_place() {
        let window = |contender, round, trip, mpps| {
            let trips = [trip, trip * 1.05];
            Window { contender, size: 64, trips, round, mpps }
        };
        let windows = [
            window(0, 1, 180.0, 20.0),
            window(1, 1, 190.0, 10.0),
            window(2, 1, 190.0, 5.0),
            // Somewhere else, and in another round.
            window(1, 1, 120.0, 1.0),
            window(1, 2, 180.0, 1.0),
            // It moved.
            Window { trips: [180.0, 300.0], ..window(1, 1, 180.0, 1.0) },
        ];
        let rows = [0, 1, 2].map(|order| row(order, Class::Middle, 1.0));
        let ratio = ratio(&rows, &windows, "near_64_copy_over_best_memif");
        assert_eq!(ratio.value, None);
        assert_eq!(ratio.all_classes, Some(Paired { value: 2.0, rounds: 1 }));
    }

    #[test]
    fn few_windows_are_told_of() {
        let rows = [Row { windows: 2, ..row(0, Class::Near, 30.0) }, row(1, Class::Near, 20.0)];
        assert!(ratio(&rows, &[], "near_64_copy_over_best_memif").note.is_some());
    }
}
