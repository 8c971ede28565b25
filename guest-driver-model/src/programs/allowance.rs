//! How long a program that serves several owners with one thread waits for one of them: what the device is asked
//! about an owner's memory that owner's VMM answers, or does not.
//!
//! Owns: what is left of a turn's and of a while's time. What is not answered in that time is not lost: the device
//! still has it, and nothing more is asked of it before it has answered.

use std::time::{Duration, Instant};

/// In one turn: several times what a VMM takes that has nothing else to do.
const TURN: Duration = Duration::from_millis(5);
/// The time of which [`Allowance::share`] is the most.
const WITHIN: Duration = Duration::from_millis(100);

/// An owner's time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allowance {
    /// The most in [`WITHIN`].
    share: Duration,
    /// What was waited since `since`.
    pub waited: Duration,
    /// When it was first seen that there was waited.
    since: Option<Instant>,
}

impl Allowance {
    /// Of one of many owners, none of whom has anything to do with this one: a quarter of the time.
    pub const fn of_many() -> Self {
        Self::new(Duration::from_millis(25))
    }

    /// Of one of two, who have to do with each other only: for them no more is waited at once.
    pub const fn of_one() -> Self {
        Self::new(WITHIN)
    }

    const fn new(share: Duration) -> Self {
        Self { share, waited: Duration::ZERO, since: None }
    }

    /// How long may be waited in a turn that begins now. Who is never waited for costs no look at the clock.
    pub fn left(&mut self, now: impl FnOnce() -> Instant) -> Duration {
        if !self.waited.is_zero() {
            let now = now();
            let since = *self.since.get_or_insert(now);
            if now.saturating_duration_since(since) >= WITHIN {
                (self.waited, self.since) = (Duration::ZERO, None);
            }
        }
        self.share.saturating_sub(self.waited).min(TURN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn who_uses_its_turns_up_is_waited_for_a_quarter_of_the_time() {
        let start = Instant::now();
        let mut allowance = Allowance::of_many();
        let (mut now, mut waited) = (start, Duration::ZERO);
        while now < start + ms(10_000) {
            // It answers at the very last moment, each time.
            let left = allowance.left(|| now);
            assert!(left <= TURN);
            allowance.waited += left;
            waited += left;
            now += left + ms(1);
        }
        assert!((ms(2_000)..=ms(2_600)).contains(&waited), "{waited:?}");
    }

    #[test]
    fn who_answers_at_once_is_always_waited_for() {
        let start = Instant::now();
        for mut allowance in [Allowance::of_many(), Allowance::of_one()] {
            for turn in 0..1000 {
                assert!(allowance.left(|| start + ms(turn)) > Duration::ZERO, "{turn}");
                allowance.waited += Duration::from_micros(200);
            }
        }
    }

    #[test]
    fn who_was_not_waited_for_costs_no_look_at_the_clock() {
        let mut allowance = Allowance::of_many();
        assert_eq!(allowance.left(|| unreachable!("nothing was waited")), TURN);
    }
}
