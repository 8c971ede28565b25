//! Frames to send: made a burst at a time, offered until they are taken, and no
//! faster than asked for.

use std::slice::ChunksExact;
use std::time::{Duration, Instant};

use super::pattern::Generator;
use super::quantity::{Rate, frame_len};
use super::sink::Check;
use super::wire::BURST;

/// Bytes of frames in a burst, if that is not too few of them: a part of a processor's first cache.
const NEAREST: usize = 16 << 10;
/// Frames in a burst at least.
const SHORTEST: usize = 8;

/// What to send.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct SourceArgs {
    /// Length of each frame, bytes (30 to 65535, Ethernet header included)
    #[arg(long, default_value_t = 64, value_name = "BYTES", value_parser = frame_len)]
    pub size: usize,
    /// Frames a second, more than 0; as many as can be by default
    #[arg(long, value_name = "FRAMES")]
    pub rate: Option<Rate>,
}

impl Default for SourceArgs {
    fn default() -> Self {
        Self { size: 64, rate: None }
    }
}

/// A generator with the burst that is being sent.
pub struct Source {
    generator: Generator,
    frames: Vec<u8>,
    /// Frames of the burst that are done with, and how many there are.
    sent: usize,
    made: usize,
    rate: Option<Rate>,
    start: Option<Instant>,
    total: u64,
}

impl Source {
    /// A source of frames that can be checked; of the same frames over and over for
    /// [`Check::None`].
    pub fn new(args: &SourceArgs, check: Check) -> Self {
        // Streams have to differ, nothing more: the clock and the process do.
        let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self::of_stream(args, check, clock.subsec_nanos() ^ std::process::id().rotate_left(16))
    }

    /// `count` sources that share the rate: a stream for each queue pair, as streams of
    /// different pairs overtake each other.
    pub fn several(args: &SourceArgs, check: Check, count: u16) -> Vec<Self> {
        let share = SourceArgs { rate: args.rate.map(|rate| rate.share(count)), ..*args };
        let first = Self::new(&share, check).stream();
        (0..count).map(|nth| Self::of_stream(&share, check, first.wrapping_add(nth.into()))).collect()
    }

    fn of_stream(args: &SourceArgs, check: Check, stream: u32) -> Self {
        Self {
            generator: Generator::new(args.size, stream, check == Check::Pattern),
            frames: Vec::new(),
            sent: 0,
            made: 0,
            rate: args.rate,
            start: None,
            total: 0,
        }
    }

    /// The stream's number.
    pub fn stream(&self) -> u32 {
        self.generator.stream()
    }

    /// Length of each frame, bytes.
    pub fn frame_len(&self) -> usize {
        self.generator.frame_len()
    }

    /// Offers the next frames to `send`, which says how many it is done with. Returns
    /// that number.
    pub fn offer<'s>(&'s mut self, send: impl FnOnce(ChunksExact<'s, u8>) -> usize) -> usize {
        if self.sent == self.made {
            let count = self.allowed();
            if count == 0 {
                return 0;
            }
            self.generator.fill(&mut self.frames, count);
            (self.sent, self.made) = (0, count);
        }
        let len = self.generator.frame_len();
        let waiting = self.frames.get(self.sent * len..).unwrap_or_default();
        let sent = send(waiting.chunks_exact(len));
        self.sent += sent;
        self.total += sent as u64;
        sent
    }

    /// How many frames may be made now.
    fn allowed(&mut self) -> usize {
        // Long ones fewer at once, so that they are still in the nearest cache when they are sent.
        let most = (NEAREST / self.generator.frame_len()).clamp(SHORTEST, BURST);
        let Some(rate) = self.rate else {
            return most;
        };
        let elapsed = self.start.get_or_insert_with(Instant::now).elapsed();
        self.due(most, rate, elapsed)
    }

    /// The same for a rate, so long after the first frame was asked for.
    fn due(&self, most: usize, rate: Rate, elapsed: Duration) -> usize {
        // A source that was held up catches up by bursts; never more than one at once.
        rate.due(elapsed).saturating_sub(self.total).min(most as u64) as usize
    }

    /// Whether frames are waiting for room.
    pub fn is_blocked(&self) -> bool {
        self.sent < self.made
    }

    /// How long until there may be something to send, if nobody else says so.
    pub fn patience(&self) -> Duration {
        match self.rate {
            Some(_) if !self.is_blocked() => Duration::from_millis(1),
            _ => Duration::from_secs(1),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::programs::pattern::Checker;

    #[test]
    fn a_frame_is_offered_until_it_is_taken() {
        let mut source = Source::new(&SourceArgs::default(), Check::Pattern);
        let mut checker = Checker::of_stream(source.stream());
        let mut taken = 0;
        while taken < 1000 {
            taken += source.offer(|frames| frames.take(7).map(|frame| checker.check(frame)).count());
        }
        let verdict = checker.verdict();
        assert_eq!((verdict.intact, verdict.lost, verdict.corrupted), (taken as u64, 0, 0));
        assert_eq!(source.offer(|_| 0), 0);
        assert!(source.is_blocked());
    }

    #[test]
    fn the_rate_is_kept() {
        let rate = Rate::new(1000.0).unwrap();
        let mut source = Source::new(&SourceArgs { size: 64, rate: Some(rate) }, Check::None);
        let sent_at = |source: &mut Source, millis| {
            let due = source.due(BURST, rate, Duration::from_millis(millis));
            source.total += due as u64;
            due
        };
        assert_eq!(sent_at(&mut source, 0), 0);
        assert!((1..=50).all(|millis| sent_at(&mut source, millis) == 1));
        assert_eq!(sent_at(&mut source, 50), 0);
        // Held up until there are more than a burst; and then as fast as ever.
        assert_eq!([150; 3].map(|millis| sent_at(&mut source, millis)), [BURST, 100 - BURST, 0]);
        assert_eq!(sent_at(&mut source, 151), 1);
        // By the clock: one in days is none now.
        let slow = SourceArgs { size: 64, rate: Rate::new(1e-6) };
        assert_eq!(Source::new(&slow, Check::None).offer(|frames| frames.count()), 0);
    }
}
