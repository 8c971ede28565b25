//! How the figures are printed.

use serde::Serialize;

use crate::measure::{Figures, Measured, Mode};
use crate::samples::Samples;

/// One mode in one direction. Times in microseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    mode: &'static str,
    direction: &'static str,
    /// How the broker says that the vring is wired.
    wiring: String,
    samples: usize,
    rtt_us_median: f64,
    rtt_us_p99: f64,
    rtt_us_min: f64,
    rtt_us_max: f64,
    /// Voluntary context switches of all threads of the broker, over all these round trips.
    broker_wakeups: u64,
    notifications_relayed: u64,
    /// One hop between two plain VMs: half of the round trip there.
    bare_hop_us_median: f64,
    bare_rtt_us_median: f64,
    /// What the mode adds to the bare round trip: the difference of the medians.
    added_us: f64,
    /// How many times as long as the bare round trip: median of batches.
    times_bare: f64,
    /// How many times as long as the direct one.
    times_direct: f64,
}

/// The rows.
pub fn rows(measured: &Measured) -> Vec<Row> {
    let none = Samples::default();
    measured
        .figures
        .iter()
        .map(|figures| {
            let Figures { mode, direction, times, .. } = figures;
            let bare =
                measured.bare.iter().find(|(bare, _)| bare == direction).map_or(&none, |(_, times)| times);
            let is_direct = |other: &&Figures| other.mode == Mode::Direct && other.direction == *direction;
            let direct = measured.figures.iter().find(is_direct).map_or(&none, |direct| &direct.times);
            Row {
                mode: mode.name(),
                direction: direction.name(),
                wiring: figures.wiring.clone(),
                samples: times.count(),
                rtt_us_median: rounded(times.quantile(0.5)),
                rtt_us_p99: rounded(times.quantile(0.99)),
                rtt_us_min: rounded(times.quantile(0.0)),
                rtt_us_max: rounded(times.quantile(1.0)),
                broker_wakeups: figures.broker_wakeups.sum(),
                notifications_relayed: figures.notifications_relayed,
                bare_hop_us_median: rounded(bare.quantile(0.5) / 2.0),
                bare_rtt_us_median: rounded(bare.quantile(0.5)),
                added_us: rounded(times.quantile(0.5) - bare.quantile(0.5)),
                times_bare: rounded(times.over(bare)),
                times_direct: rounded(times.over(direct)),
            }
        })
        .collect()
}

/// Thousandths are more than can be measured.
fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

/// For people.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "round trips, us\n{:<14} {:<17} {:>9} {:>9} {:>9} {:>9} {:>9}   {:>7} {:>8} {:>9} {:>8}\n",
        "mode",
        "direction",
        "median",
        "p99",
        "min",
        "max",
        "added",
        "x bare",
        "x direct",
        "wake-ups",
        "relayed"
    );
    for row in rows {
        text += &format!(
            "{:<14} {:<17} {:>9.1} {:>9.1} {:>9.1} {:>9.1} {:>9.1}   {:>7.3} {:>8.2} {:>9} {:>8}\n",
            row.mode,
            row.direction,
            row.rtt_us_median,
            row.rtt_us_p99,
            row.rtt_us_min,
            row.rtt_us_max,
            row.added_us,
            row.times_bare,
            row.times_direct,
            row.broker_wakeups,
            row.notifications_relayed
        );
    }
    if let Some(row) = rows.first() {
        text += &format!(
            "\n{} round trips a row; between two plain VMs, joined by eventfds alone: {:.1}\n\
             wake-ups: voluntary context switches of the broker; relayed: notifications, as it says\n",
            row.samples, row.bare_rtt_us_median
        );
    }
    text
}
