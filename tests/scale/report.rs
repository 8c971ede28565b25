//! What was found, beside the targets: as a table, and as JSON.

use std::fmt::Write;
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::broker::Usage;
use crate::fronts::Time;
use crate::traffic::{Busy, Way};

/// A link's share of the broker, at most.
const MAX_KIB: f64 = 256.0;
const MAX_THREADS: f64 = 4.0;
const MAX_DESCRIPTORS: f64 = 20.0;
/// What a link takes more when all have left and come back, at most: the allocator's luck.
const MAX_GROWN_KIB: f64 = 32.0;
/// A link should be up in less than so many milliseconds: told, not demanded.
const SOON_MS: f64 = 10.0;

/// All figures.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Links of the broker.
    pub links: u32,
    /// Of these, those that were up together (all but the one kept for traffic).
    pub links_up: u32,
    /// How each came up: summed up by side.
    #[serde(serialize_with = "by_side")]
    pub times: Vec<Time>,
    /// A broker with one link, to which nobody is connected.
    pub few: Usage,
    /// The broker before anybody connected.
    pub configured: Usage,
    /// When all are up.
    pub up: Usage,
    /// When all have left.
    pub left: Usage,
    /// When as many have come back.
    pub again: Usage,
    /// Nothing happened for so long.
    pub idle: Duration,
    /// What the broker used in that time.
    pub idled: Usage,
    /// One link was busy.
    pub busy: Vec<Busy>,
}

/// How long links took to come up, by which side came second.
#[derive(Debug, Serialize)]
struct Times {
    links: usize,
    median_ms: f64,
    p99_ms: f64,
    longest_ms: f64,
    /// Not within [`SOON_MS`].
    late: usize,
}

impl Times {
    fn of(times: &[Time], peer_second: bool) -> Option<Self> {
        let mut ms: Vec<_> =
            times.iter().filter(|time| time.peer_second == peer_second).map(|time| time.ms).collect();
        ms.sort_by(f64::total_cmp);
        let last = *ms.last()?;
        let at = |part: f64| ms.get((ms.len() as f64 * part) as usize).copied().unwrap_or(last);
        Some(Self {
            links: ms.len(),
            median_ms: at(0.5),
            p99_ms: at(0.99),
            longest_ms: last,
            late: ms.iter().filter(|ms| **ms >= SOON_MS).count(),
        })
    }
}

fn by_side<S: Serializer>(times: &[Time], serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Sides {
        owner_second: Option<Times>,
        peer_second: Option<Times>,
    }
    Sides { owner_second: Times::of(times, false), peer_second: Times::of(times, true) }.serialize(serializer)
}

impl Report {
    fn a_link(&self, of: impl Fn(&Usage) -> u64) -> f64 {
        of(&self.up).saturating_sub(of(&self.few)) as f64 / f64::from(self.links_up.max(1))
    }

    /// What misses its target. No times.
    pub fn missed(&self) -> Vec<String> {
        let mut missed = Vec::new();
        let mut expect = |met: bool, what: String| {
            if !met {
                missed.push(what)
            }
        };
        expect(
            self.links_up + 1 == self.links,
            format!("{} links are up, not {}", self.links_up, self.links - 1),
        );
        let kib = self.a_link(|usage| usage.resident_kib);
        expect(
            kib < MAX_KIB,
            format!("a link takes {kib:.0} KiB of memory; less than {MAX_KIB} is the target"),
        );
        let threads = self.a_link(|usage| usage.threads);
        expect(
            threads <= MAX_THREADS,
            format!("a link takes {threads:.2} threads; {MAX_THREADS} is the target"),
        );
        let fds = self.a_link(|usage| usage.descriptors);
        expect(
            fds <= MAX_DESCRIPTORS,
            format!("a link takes {fds:.1} descriptors; {MAX_DESCRIPTORS} is the target"),
        );
        let used = |usage: &Usage| format!("{} us in {} wake-ups", usage.processor_us, usage.switches);
        expect(self.idled.switches == 0, format!("with nothing to do the broker used {}", used(&self.idled)));
        for busy in self.busy.iter().filter(|busy| busy.way == Way::Polling) {
            expect(
                busy.relayed == 0.0 && busy.used.switches == 0,
                format!(
                    "a link that polls had {:.0} notifications a second relayed; {}",
                    busy.relayed,
                    used(&busy.used)
                ),
            );
        }
        let left = &self.left;
        expect(
            left.threads == self.configured.threads && left.descriptors <= self.configured.descriptors,
            format!(
                "when all had left there were {} threads and {} descriptors; before they came {} and {}",
                left.threads, left.descriptors, self.configured.threads, self.configured.descriptors
            ),
        );
        let grown =
            self.again.resident_kib.saturating_sub(self.up.resident_kib) as f64 / f64::from(self.links);
        expect(
            grown < MAX_GROWN_KIB,
            format!(
                "a link takes {grown:.1} KiB more when all come back; less than {MAX_GROWN_KIB} is the target"
            ),
        );
        missed
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut text = format!("{} links in one broker, {} up together\n", self.links, self.links_up);
        let mut line = |what: &str, found: String| {
            // Writing to a string does not fail.
            let _ = writeln!(text, "  {what:<44} {found}");
        };
        for (peer_second, name) in
            [(false, "up, from the owner's connection"), (true, "up, from the peer's connection")]
        {
            let Some(Times { median_ms: median, p99_ms: p99, longest_ms: max, late, .. }) =
                Times::of(&self.times, peer_second)
            else {
                continue;
            };
            line(
                name,
                format!(
                    "median {median:.2} ms, 99 % {p99:.2} ms, longest {max:.2} ms; {late} over {SOON_MS} ms"
                ),
            );
        }
        let share = |of: fn(&Usage) -> u64| self.a_link(of);
        line(
            "resident memory a link",
            format!(
                "{:.1} KiB ({:.1} its own, the rest shared; proportional {:.1}); page tables {:.1} KiB",
                share(|usage| usage.resident_kib),
                share(|usage| usage.anonymous_kib),
                share(|usage| usage.proportional_kib),
                share(|usage| usage.page_tables_kib),
            ),
        );
        line("threads a link", format!("{:.2}", share(|usage| usage.threads)));
        line("descriptors a link", format!("{:.2}", share(|usage| usage.descriptors)));
        line("mapped ranges a link", format!("{:.2}", share(|usage| usage.mappings)));
        let states = [
            ("one link, nobody there", &self.few),
            ("nobody there", &self.configured),
            ("all up", &self.up),
            ("all left", &self.left),
            ("all came back", &self.again),
        ];
        for (name, usage) in states {
            let Usage { resident_kib, threads, descriptors, .. } = usage;
            line(
                &format!("the broker: {name}"),
                format!(
                    "{:.1} MiB, {threads} threads, {descriptors} descriptors",
                    *resident_kib as f64 / 1024.0
                ),
            );
        }
        let used = |usage: &Usage, seconds: f64| {
            let share = usage.processor_us as f64 / seconds / 1e4;
            format!(
                "{} us of processor time ({share:.3} %), {} context switches",
                usage.processor_us, usage.switches
            )
        };
        let idle = self.idle.as_secs_f64();
        line(&format!("all idle for {idle:.1} s"), used(&self.idled, idle));
        for busy in &self.busy {
            let name = match busy.way {
                Way::Polling => "one link busy, polling",
                Way::Relayed => "one link busy, relayed",
            };
            line(
                &format!("{name}, {:.1} s", busy.seconds),
                format!(
                    "{}; {:.0} notifications/s relayed; {:.0} packets/s",
                    used(&busy.used, busy.seconds),
                    busy.relayed,
                    busy.packets_a_second
                ),
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn times_are_summed_up_by_side() {
        let times: Vec<_> = (1..=100)
            .flat_map(|ms| [(true, f64::from(ms)), (false, f64::from(ms) / 100.0)])
            .map(|(peer_second, ms)| Time { peer_second, ms })
            .collect();
        let Times { links, median_ms, p99_ms, longest_ms, late } = Times::of(&times, true).unwrap();
        assert_eq!((links, median_ms, p99_ms, longest_ms, late), (100, 51.0, 100.0, 100.0, 91));
        let value = by_side(&times, serde_json::value::Serializer).unwrap();
        assert_eq!(value["owner_second"]["longest_ms"], 1.0);
        assert!(Times::of(&[], true).is_none());
    }
}
