//! Where the host has put the two processors, as far as a guest can tell: the round trip of one
//! cache line between them. It is bimodal and flips every few seconds, and all rates through
//! shared memory go with it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use serde::Serialize;

use crate::host::{RECEIVER, SENDER, pin_this_thread};
use crate::ratios::median;

/// How long one probe takes.
const LENGTH: Duration = Duration::from_millis(20);
/// Round trips between two looks at the clock.
const CHUNK: u64 = 200;
/// A round trip below this is one between processors that are near each other, nanoseconds: the middle
/// between the two places that hosts have shown, 50 to 180 and 330 to 375.
pub const NEAR_BELOW: f64 = 200.0;
/// A round trip above this is one between processors that are far from each other, nanoseconds.
pub const FAR_ABOVE: f64 = 250.0;
/// Above this, something else had a processor and the figure says nothing, nanoseconds.
const FAR_BELOW: f64 = 2000.0;
/// Two probes that differ by no more than this part saw the processors at the same place.
const STEADY: f64 = 0.15;

/// Where the processors were during a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Near each other.
    Near,
    /// Neither near nor far.
    Middle,
    /// Far from each other.
    Far,
    /// It moved, or something else had a processor, or they were elsewhere than in most windows of
    /// the class.
    Mixed,
}

impl Class {
    /// All of them, in the order in which they are printed.
    pub const ALL: [Self; 4] = [Self::Near, Self::Middle, Self::Far, Self::Mixed];

    /// That of a window with these round trips before and after it, nanoseconds.
    pub fn of(trips: [f64; 2]) -> Self {
        let [before, after] = trips;
        if are_alike(before, after) { Self::at(middle(trips)) } else { Self::Mixed }
    }

    fn at(trip: f64) -> Self {
        if trip < NEAR_BELOW {
            Self::Near
        } else if trip <= FAR_ABOVE {
            Self::Middle
        } else if trip < FAR_BELOW {
            Self::Far
        } else {
            Self::Mixed
        }
    }

    /// Its word.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Near => "near",
            Self::Middle => "middle",
            Self::Far => "far",
            Self::Mixed => "mixed",
        }
    }
}

/// The class of each window, and of each class the round trip that is usual in it, nanoseconds. A class is
/// wide: what is compared within it was at the same place, so a window with another round trip than is
/// usual is mixed.
pub fn classes(windows: &[[f64; 2]]) -> (Vec<Class>, BTreeMap<Class, f64>) {
    let mut by_class: BTreeMap<Class, Vec<f64>> = BTreeMap::new();
    for trips in windows {
        by_class.entry(Class::of(*trips)).or_default().push(middle(*trips));
    }
    by_class.remove(&Class::Mixed);
    let usual: BTreeMap<_, _> =
        by_class.into_iter().filter_map(|(class, trips)| Some((class, median(trips)?))).collect();
    let class = |trips: &[f64; 2]| {
        let class = Class::of(*trips);
        let is_usual = usual.get(&class).is_some_and(|usual| are_alike(*usual, middle(*trips)));
        if is_usual { class } else { Class::Mixed }
    };
    (windows.iter().map(class).collect(), usual)
}

/// The round trip of a window.
pub fn middle([before, after]: [f64; 2]) -> f64 {
    (before + after) / 2.0
}

/// Whether two round trips are as good as the same.
pub fn are_alike(one: f64, other: f64) -> bool {
    one.max(other) <= one.min(other) * (1.0 + STEADY) && one.max(other) < FAR_BELOW
}

/// A cache line, and its neighbour, which some processors fetch with it.
#[derive(Default)]
#[repr(align(128))]
struct Line(AtomicU64);

/// Lines that go from one processor to the other and back.
#[derive(Default)]
struct Lines {
    /// What announces a message, and the message, unless it is on the same line.
    there: [Line; 2],
    back: [Line; 2],
    end: AtomicBool,
}

/// The median round trip of one cache line between the two processors, nanoseconds; more than any
/// class has if they were not idle.
pub fn round_trip() -> Result<f64> {
    median_trip::<1>()
}

/// The same where the answer has a line of its own: one line there, another back. No two programs
/// exchange a message and an answer by less, unless they write to the same line.
pub fn two_line_round_trip() -> Result<f64> {
    median_trip::<2>()
}

/// The same where each message is on a line of its own behind the line that announces it: two
/// lines there, two others back, as in a ring with an index.
pub fn four_line_round_trip() -> Result<f64> {
    median_trip::<4>()
}

fn median_trip<const LINES: usize>() -> Result<f64> {
    let lines = Arc::new(Lines::default());
    let theirs = Arc::clone(&lines);
    let answering = thread::spawn(move || -> Result<()> {
        pin_this_thread(RECEIVER)?;
        answer::<LINES>(&theirs);
        Ok(())
    });
    let ours = Arc::clone(&lines);
    let asking = thread::spawn(move || -> Result<Vec<f64>> {
        pin_this_thread(SENDER)?;
        Ok(ask::<LINES>(&ours))
    });
    let chunks = asking.join().map_err(|_| anyhow!("a thread of the probe panicked"))?;
    lines.end.store(true, Ordering::Relaxed);
    answering.join().map_err(|_| anyhow!("a thread of the probe panicked"))??;
    let mut chunks = chunks?;
    chunks.sort_by(f64::total_cmp);
    // None at all where something else had a processor all the time.
    Ok(chunks.get(chunks.len() / 2).copied().unwrap_or(f64::MAX))
}

/// Acquire and release in both: each load of an announcing line pairs with the other thread's
/// store of it, and what the message's line holds was stored before.
fn answer<const LINES: usize>(lines: &Lines) {
    let Lines { there: [announced, message], back: [announcing, answer], end } = lines;
    let announcing = if LINES == 1 { announced } else { announcing };
    let mut expected = 1;
    while !end.load(Ordering::Relaxed) {
        if announced.0.load(Ordering::Acquire) == expected {
            if LINES == 4 {
                answer.0.store(message.0.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            }
            announcing.0.store(expected + 1, Ordering::Release);
            expected += 2;
        }
    }
}

/// Nanoseconds a round trip, of each chunk of them.
fn ask<const LINES: usize>(lines: &Lines) -> Vec<f64> {
    let Lines { there: [announcing, message], back: [announced, answer], .. } = lines;
    let announced = if LINES == 1 { announcing } else { announced };
    let (begin, mut asked, mut chunks) = (Instant::now(), 1, Vec::with_capacity(4096));
    while begin.elapsed() < LENGTH {
        let from = Instant::now();
        for _ in 0..CHUNK {
            if LINES == 4 {
                message.0.store(asked, Ordering::Relaxed);
            }
            announcing.0.store(asked, Ordering::Release);
            let mut looks = 0_u64;
            while announced.0.load(Ordering::Acquire) != asked + 1 {
                looks += 1;
                // The other thread has died, or is kept from running.
                if looks.is_multiple_of(1 << 20) && begin.elapsed() > 100 * LENGTH {
                    return chunks;
                }
            }
            if LINES == 4 && answer.0.load(Ordering::Relaxed) != asked + 1 {
                return chunks;
            }
            asked += 2;
        }
        chunks.push(from.elapsed().as_nanos() as f64 / CHUNK as f64);
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_has_a_class_only_if_both_probes_agree() {
        assert_eq!(Class::of([55.0, 60.0]), Class::Near);
        assert_eq!(Class::of([205.0, 230.0]), Class::Middle);
        assert_eq!(Class::of([340.0, 380.0]), Class::Far);
        // Both near, but not at the same place; and across a border, at the same place.
        for trips in [[55.0, 340.0], [340.0, 55.0], [60.0, 140.0], [200.0, 300.0], [1e6, 1e6]] {
            assert_eq!(Class::of(trips), Class::Mixed, "{trips:?}");
        }
        assert_eq!(Class::of([195.0, 203.0]), Class::Near);
    }

    #[test]
    fn windows_of_a_class_were_at_its_usual_place() {
        let (classes, usual) =
            classes(&[[127.0, 130.0], [55.0, 56.0], [120.0, 125.0], [340.0, 350.0], [55.0, 340.0]]);
        assert_eq!(classes, [Class::Near, Class::Mixed, Class::Near, Class::Far, Class::Mixed]);
        assert_eq!(usual, BTreeMap::from([(Class::Near, 122.5), (Class::Far, 345.0)]));
    }

    #[test]
    fn only_neighbours_are_alike() {
        assert!(are_alike(100.0, 114.0) && are_alike(114.0, 100.0));
        assert!(!are_alike(100.0, 116.0) && !are_alike(1e6, 1e6));
    }
}
