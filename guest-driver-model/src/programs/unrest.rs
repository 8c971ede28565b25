//! Pauses at random moments: brings a program, in a test, to fall asleep and to be woken at
//! moments that it would never choose.

use std::time::{Duration, Instant};

/// Below this a pause spins: the system cannot sleep for so short a time.
const SHORTEST_SLEEP: Duration = Duration::from_micros(100);
/// One round in so many is followed by a pause.
const ONE_IN: u64 = 16;

/// How to pause.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct UnrestArgs {
    /// Test: pause after some rounds, for a random time of at most so long
    #[arg(long, default_value_t = 0, value_name = "MICROSECONDS", hide_short_help = true)]
    pub pauses_us: u64,
}

/// Pauses.
#[derive(Clone, Copy, Debug)]
pub struct Unrest {
    longest_us: u64,
    state: u64,
}

impl Unrest {
    /// Pauses like this, in another way in each process.
    pub fn new(args: UnrestArgs) -> Self {
        let seed = u64::from(std::process::id()) << 32 | 0x9e37_79b9;
        Self { longest_us: args.pauses_us, state: seed }
    }

    /// After a round: pauses, perhaps.
    #[inline]
    pub fn after_round(&mut self) {
        if self.longest_us > 0 && self.random().is_multiple_of(ONE_IN) {
            self.pause();
        }
    }

    #[cold]
    fn pause(&mut self) {
        // As many of one microsecond to two as of one millisecond to two.
        let doublings = self.random() % u64::from(self.longest_us.ilog2() + 1);
        let least = 1 << doublings;
        let time = Duration::from_micros((least + self.random() % least).min(self.longest_us));
        if time >= SHORTEST_SLEEP {
            std::thread::sleep(time);
            return;
        }
        let start = Instant::now();
        while start.elapsed() < time {
            std::hint::spin_loop();
        }
    }

    /// xorshift64.
    fn random(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state >> 11
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_rare_and_bounded_and_none_where_none_were_asked_for() {
        let mut unrest = Unrest::new(UnrestArgs { pauses_us: 50 });
        let start = Instant::now();
        (0..1000).for_each(|_| unrest.after_round());
        let took = start.elapsed();
        assert!(took >= Duration::from_micros(100), "{took:?}");
        let mut calm = Unrest::new(UnrestArgs::default());
        let state = calm.state;
        (0..1000).for_each(|_| calm.after_round());
        assert_eq!(calm.state, state);
    }
}
