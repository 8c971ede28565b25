//! Where the host has put the two processors, as far as a guest can tell: the round trip of one
//! cache line between them. It is bimodal and flips every few seconds, and all rates through
//! shared memory go with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use serde::Serialize;

use crate::host::{RECEIVER, SENDER, pin_this_thread};

/// How long one probe takes.
const LENGTH: Duration = Duration::from_millis(20);
/// Round trips between two looks at the clock.
const CHUNK: u64 = 200;
/// A round trip below this is one between processors that are near each other, nanoseconds.
pub const NEAR_BELOW: f64 = 150.0;
/// A round trip above this is one between processors that are far from each other, nanoseconds.
pub const FAR_ABOVE: f64 = 250.0;

/// Above this, something else had a processor and the figure says nothing, nanoseconds.
const FAR_BELOW: f64 = 2000.0;

/// Where the processors were during a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Near before and after.
    Near,
    /// Far before and after.
    Far,
    /// Anything else: it moved, or is neither.
    Mixed,
}

impl Class {
    /// All of them, in the order in which they are printed.
    pub const ALL: [Self; 3] = [Self::Near, Self::Far, Self::Mixed];

    /// That of a window with these round trips before and after it, nanoseconds.
    pub fn of(before: f64, after: f64) -> Self {
        let both = |is: fn(f64) -> bool| is(before) && is(after);
        if both(|trip| trip < NEAR_BELOW) {
            Self::Near
        } else if both(|trip| trip > FAR_ABOVE && trip < FAR_BELOW) {
            Self::Far
        } else {
            Self::Mixed
        }
    }

    /// Its word.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Near => "near",
            Self::Far => "far",
            Self::Mixed => "mixed",
        }
    }
}

/// A cache line, and its neighbour, which some processors fetch with it.
#[derive(Default)]
#[repr(align(128))]
struct Line(AtomicU64);

/// The median round trip of one cache line between the two processors, nanoseconds; more than any
/// class has if they were not idle.
pub fn round_trip() -> Result<f64> {
    let line = Arc::new((Line::default(), AtomicBool::new(false)));
    let theirs = Arc::clone(&line);
    let answering = thread::spawn(move || -> Result<()> {
        pin_this_thread(RECEIVER)?;
        let (line, end) = &*theirs;
        let mut expected = 1;
        while !end.load(Ordering::Relaxed) {
            // Acquire and release: the two stores of the one word answer each other.
            if line.0.load(Ordering::Acquire) == expected {
                line.0.store(expected + 1, Ordering::Release);
                expected += 2;
            }
        }
        Ok(())
    });
    let other = Arc::clone(&line);
    let asking = thread::spawn(move || -> Result<Vec<f64>> {
        pin_this_thread(SENDER)?;
        let line = &other.0;
        let (begin, mut asked, mut chunks) = (Instant::now(), 1, Vec::with_capacity(4096));
        while begin.elapsed() < LENGTH {
            let from = Instant::now();
            for _ in 0..CHUNK {
                line.0.store(asked, Ordering::Release);
                let mut looks = 0_u64;
                while line.0.load(Ordering::Acquire) != asked + 1 {
                    looks += 1;
                    // The other thread has died, or is kept from running.
                    if looks.is_multiple_of(1 << 20) && begin.elapsed() > 100 * LENGTH {
                        return Ok(chunks);
                    }
                }
                asked += 2;
            }
            chunks.push(from.elapsed().as_nanos() as f64 / CHUNK as f64);
        }
        Ok(chunks)
    });
    let chunks = asking.join().map_err(|_| anyhow!("a thread of the probe panicked"))?;
    line.1.store(true, Ordering::Relaxed);
    answering.join().map_err(|_| anyhow!("a thread of the probe panicked"))??;
    let mut chunks = chunks?;
    chunks.sort_by(f64::total_cmp);
    // None at all where something else had a processor all the time.
    Ok(chunks.get(chunks.len() / 2).copied().unwrap_or(f64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_has_a_class_only_if_both_probes_agree() {
        assert_eq!(Class::of(55.0, 60.0), Class::Near);
        assert_eq!(Class::of(340.0, 380.0), Class::Far);
        for (before, after) in [(55.0, 340.0), (340.0, 55.0), (200.0, 55.0), (200.0, 200.0), (1e6, 1e6)] {
            assert_eq!(Class::of(before, after), Class::Mixed);
        }
    }
}
