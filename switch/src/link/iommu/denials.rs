//! How often a peer may make the owner's VMM look for what is not there. Each look is
//! a fault in the owner's guest: a peer that asks in a loop would fill its log.

use std::time::{Duration, Instant};

/// Denials that may follow each other at once.
const BURST: u32 = 64;
/// The time after which one more is allowed.
const REFILL: Duration = Duration::from_millis(20);

/// A token bucket.
#[derive(Debug)]
pub struct Denials {
    left: u32,
    since: Option<Instant>,
}

impl Default for Denials {
    fn default() -> Self {
        Self { left: BURST, since: None }
    }
}

impl Denials {
    /// Whether the owner may be asked now.
    pub fn allow(&mut self, now: Instant) -> bool {
        let Some(since) = self.since else { return true };
        let earned = now.saturating_duration_since(since).as_millis() / REFILL.as_millis();
        let earned = u32::try_from(earned).unwrap_or(BURST).min(BURST);
        if self.left + earned >= BURST {
            *self = Self::default();
        } else if earned > 0 {
            self.left += earned;
            self.since = Some(since + REFILL * earned);
        }
        self.left > 0
    }

    /// When the owner may be asked again, if it may not be now.
    pub fn allowed_at(&self) -> Option<Instant> {
        self.since.filter(|_| self.left == 0).map(|since| since + REFILL)
    }

    /// The owner was asked in vain.
    pub fn note(&mut self, now: Instant) {
        self.left = self.left.saturating_sub(1);
        self.since.get_or_insert(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_allowed_and_then_one_for_each_interval() {
        let mut denials = Denials::default();
        let start = Instant::now();
        for _ in 0..BURST {
            assert!(denials.allow(start));
            denials.note(start);
        }
        assert!(!denials.allow(start));
        assert!(!denials.allow(start + REFILL / 2));
        assert!(denials.allow(start + REFILL));
        denials.note(start + REFILL);
        assert!(!denials.allow(start + REFILL));
        assert!(denials.allow(start + REFILL * BURST * 2));
    }
}
