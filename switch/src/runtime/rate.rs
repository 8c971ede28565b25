//! How often something may happen. Whoever comes too often is made to wait; nothing is lost.

use std::time::{Duration, Instant};

/// Waits are at least so long, and then for several at once.
const STEP: Duration = Duration::from_millis(1);

/// So many a second, and as many at once after a second without any.
#[derive(Clone, Debug)]
pub struct Rate {
    per_second: f64,
    left: f64,
    at: Instant,
}

impl Rate {
    /// So many a second, at least one.
    pub fn new(per_second: u32, now: Instant) -> Self {
        let per_second = f64::from(per_second.max(1));
        Self { per_second, left: per_second, at: now }
    }

    /// Takes one. If it comes too early it is not taken: how long to wait before it is tried again.
    pub fn take(&mut self, now: Instant) -> Option<Duration> {
        let since = now.saturating_duration_since(self.at);
        self.at = self.at.max(now);
        self.left = (self.left + since.as_secs_f64() * self.per_second).min(self.per_second);
        if self.left >= 1.0 {
            self.left -= 1.0;
            return None;
        }
        let missing = Duration::from_secs_f64((1.0 - self.left) / self.per_second);
        Some(missing.max(STEP))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// How many are taken in so long by who waits as long as it is told and no longer.
    fn taken(rate: &mut Rate, start: Instant, time: Duration) -> u32 {
        let (mut now, mut count) = (start, 0);
        while now < start + time {
            match rate.take(now) {
                None => count += 1,
                Some(wait) => now += wait,
            }
        }
        count
    }

    #[test]
    fn what_comes_without_end_is_taken_at_the_rate() {
        let start = Instant::now();
        for per_second in [1, 20, 999, 50_000] {
            let mut rate = Rate::new(per_second, start);
            assert_eq!(taken(&mut rate, start, Duration::from_nanos(1)), per_second, "at once");
            let later = taken(&mut rate, start, Duration::from_secs(10));
            assert!((per_second * 10).abs_diff(later) <= 60, "{later} of {per_second}");
        }
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_gives_nothing() {
        let start = Instant::now() + Duration::from_secs(10);
        let mut rate = Rate::new(1, start);
        assert_eq!(rate.take(start), None);
        assert_eq!(rate.take(start), Some(Duration::from_secs(1)));
        assert_eq!(rate.take(start - Duration::from_secs(5)), Some(Duration::from_secs(1)));
        assert_eq!(rate.take(start + Duration::from_secs(1)), None);
    }
}
