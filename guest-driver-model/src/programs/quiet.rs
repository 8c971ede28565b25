//! Keeps what the other VM can cause from filling the log.

use std::time::{Duration, Instant};

/// Lines that may follow each other at once.
const BURST: u32 = 20;
/// After that, one line in this time.
const INTERVAL: Duration = Duration::from_secs(1);

/// Says whether a line may be written.
#[derive(Clone, Copy, Debug)]
pub struct Quiet {
    left: u32,
    since: Instant,
}

impl Default for Quiet {
    fn default() -> Self {
        Self { left: BURST, since: Instant::now() }
    }
}

impl Quiet {
    /// Whether a line may be written now.
    pub fn allows_line(&mut self) -> bool {
        let passed = self.since.elapsed();
        if passed >= INTERVAL {
            self.since = Instant::now();
            let earned = u32::try_from(passed.as_secs()).unwrap_or(BURST);
            self.left = self.left.saturating_add(earned).min(BURST);
        }
        let allowed = self.left > 0;
        self.left = self.left.saturating_sub(1);
        allowed
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_flood_is_cut_off() {
        let mut quiet = Quiet::default();
        let lines = (0..100_000).filter(|_| quiet.allows_line()).count();
        assert!((20..=22).contains(&lines), "{lines}");
    }
}
