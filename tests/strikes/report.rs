//! What the strikes came to: a table, and one object.

use std::time::Duration;

use serde::Serialize;
use vhost_pci_tests::Usage;

use crate::program::Counts;

/// What one kind of strike did.
#[derive(Debug, Default, Serialize)]
pub struct Row {
    pub kind: String,
    pub strikes: u64,
    /// Of each strike, as [`Row::add`] has them.
    #[serde(skip)]
    pauses: Vec<Duration>,
    #[serde(skip)]
    beyond: Vec<Duration>,
    #[serde(skip)]
    other: Vec<Duration>,
    pub median_pause_ms: u64,
    pub longest_pause_ms: u64,
    /// What was left of the pause when the process ran again.
    pub longest_after_ms: u64,
    /// On the link that nobody touches.
    pub longest_pause_of_the_other_link_ms: u64,
}

impl Row {
    pub fn new(kind: &str) -> Self {
        Self { kind: kind.to_owned(), ..Self::default() }
    }

    /// A strike: the longest time without a packet either way, how long it took for packets to flow
    /// after all was undone, and the longest time without a packet on the other link.
    pub fn add(&mut self, pause: Duration, beyond: Duration, other: Duration) {
        self.strikes += 1;
        self.pauses.push(pause);
        self.beyond.push(beyond);
        self.other.push(other);
        self.pauses.sort();
        let ms = |time: Option<&Duration>| time.map_or(0, |time| time.as_millis() as u64);
        self.median_pause_ms = ms(self.pauses.get(self.pauses.len() / 2));
        self.longest_pause_ms = ms(self.pauses.last());
        self.longest_after_ms = ms(self.beyond.iter().max());
        self.longest_pause_of_the_other_link_ms = ms(self.other.iter().max());
    }
}

/// What a broker had when it was new and when it ended.
#[derive(Debug, Serialize)]
pub struct BrokerLife {
    pub strikes: u64,
    pub first: Usage,
    pub last: Usage,
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    pub seed: u64,
    pub strikes: u64,
    pub seconds: f64,
    pub kinds: Vec<Row>,
    pub struck: Counts,
    pub other: Counts,
    pub brokers: Vec<BrokerLife>,
    /// What should not have been.
    pub wrong: Vec<String>,
}

impl Report {
    /// For people.
    pub fn print(&self) {
        println!(
            "{:<18} {:>7} {:>13} {:>14} {:>16} {:>18}",
            "strike", "number", "median pause", "longest pause", "longest after it", "other link, longest"
        );
        for row in self.kinds.iter().filter(|row| row.strikes > 0) {
            println!(
                "{:<18} {:>7} {:>10} ms {:>11} ms {:>13} ms {:>15} ms",
                row.kind,
                row.strikes,
                row.median_pause_ms,
                row.longest_pause_ms,
                row.longest_after_ms,
                row.longest_pause_of_the_other_link_ms
            );
        }
        for (name, counts) in [("struck", &self.struck), ("other", &self.other)] {
            println!(
                "torture: {name} link: {} packets received, lost {}, twice or late {}, corrupted {}, faults {}, \
                 slept over {}",
                counts.rx_packets,
                counts.lost,
                counts.reordered,
                counts.corrupted,
                counts.faults,
                counts.rescued
            );
        }
        if let Some(life) = self.brokers.iter().max_by_key(|life| life.strikes) {
            println!(
                "torture: {} brokers; the one that saw most ({} strikes) had {} descriptors, {} threads, {} KiB when \
                 it was new, and {}, {}, {} KiB at its end",
                self.brokers.len(),
                life.strikes,
                life.first.descriptors,
                life.first.threads,
                life.first.anonymous_kib,
                life.last.descriptors,
                life.last.threads,
                life.last.anonymous_kib
            );
        }
    }
}
