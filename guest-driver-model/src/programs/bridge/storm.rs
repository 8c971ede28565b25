//! How much a port may have copied to all others: broadcasts, multicasts, and frames to stations that nobody
//! has heard of. What is more than that in a second is dropped, so that a loop in the cables, or an
//! owner that sends nothing else, takes its share of the others' rings and of this processor, and no more.
//!
//! Owns: the count of one port. Reads no clock.

use std::time::{Duration, Instant};

const SECOND: Duration = Duration::from_secs(1);
/// A port that goes on is told of so often.
const TELL: Duration = Duration::from_secs(60);

/// What became of a frame that was to go to all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// It goes.
    Open,
    /// It is one too many, and that is to be told.
    Closes,
    /// It is one too many.
    Closed,
}

/// The count.
#[derive(Clone, Copy, Debug, Default)]
pub struct Storm {
    /// The second that counts began then.
    since: Option<Instant>,
    passed: u32,
    told: Option<Instant>,
}

impl Storm {
    /// One frame more, of which `limit` may pass in a second.
    #[inline]
    pub fn pass(&mut self, limit: u32, now: Instant) -> Gate {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= SECOND) {
            (self.since, self.passed) = (Some(now), 0);
        }
        if self.passed < limit {
            self.passed += 1;
            return Gate::Open;
        }
        if self.told.is_none_or(|told| now.saturating_duration_since(told) >= TELL) {
            self.told = Some(now);
            return Gate::Closes;
        }
        Gate::Closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_the_limit_passes_in_a_second_and_it_is_told_once_a_minute() {
        let (start, mut storm) = (Instant::now(), Storm::default());
        let mut told = Vec::new();
        for second in 0..130 {
            let mut passed = 0;
            for frame in 0..100 {
                let now = start + Duration::from_secs(second) + Duration::from_millis(frame * 5);
                match storm.pass(10, now) {
                    Gate::Open => passed += 1,
                    Gate::Closes => told.push(second),
                    Gate::Closed => {}
                }
            }
            assert_eq!(passed, 10, "in second {second}");
        }
        assert_eq!(told, [0, 60, 120]);
    }

    #[test]
    fn what_stays_below_is_never_dropped() {
        let (start, mut storm) = (Instant::now(), Storm::default());
        for frame in 0..10_000 {
            let now = start + Duration::from_millis(frame * 100);
            assert_eq!(storm.pass(10, now), Gate::Open, "frame {frame}");
        }
    }
}
