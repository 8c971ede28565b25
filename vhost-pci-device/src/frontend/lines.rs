//! How many lines of the log a broker can cause: a few at once, and then one a minute, however
//! often it connects and whatever it sends.

use std::time::{Duration, Instant};

/// Lines at once.
const MOST: u32 = 16;
/// The time for another one.
const REFILL: Duration = Duration::from_secs(60);

/// The lines that are left.
#[derive(Debug)]
pub struct Lines {
    left: u32,
    /// When `left` was right.
    since: Instant,
}

impl Lines {
    /// All of them.
    pub fn new(now: Instant) -> Self {
        Self { left: MOST, since: now }
    }

    /// Takes a line. `false` if there is none.
    pub fn take(&mut self, now: Instant) -> bool {
        let waited = now.saturating_duration_since(self.since);
        let more = u32::try_from(waited.as_secs() / REFILL.as_secs()).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(more).min(MOST);
        if more != 0 {
            // What is left of the last minute is at most lost.
            self.since = now;
        }
        let is_left = self.left != 0;
        self.left = self.left.saturating_sub(1);
        is_left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_in_time() {
        let start = Instant::now();
        let mut lines = Lines::new(start);
        let mut count = |now| (0..100).filter(|_| lines.take(now)).count();
        assert_eq!(count(start), 16);
        assert_eq!(count(start + REFILL / 2), 0);
        assert_eq!(count(start + REFILL), 1);
        assert_eq!(count(start + 4 * REFILL), 3);
        assert_eq!(count(start + 4 * REFILL), 0);
        assert_eq!(count(start + 1000 * REFILL), 16);
    }
}
