//! Packets that can be checked: made by a [`Generator`], judged by a [`Checker`].
//!
//! A frame is an Ethernet header with a local experimental ethertype, a sequence
//! number, the number of the stream, a CRC-32 over everything from the ethertype on,
//! and bytes that look random. The addresses may be swapped on the way; any other
//! change of any byte is found.

/// Shortest frame, bytes.
pub const MIN_LEN: usize = FILL;
/// Longest frame, bytes.
pub const MAX_LEN: usize = 65_535;

/// IEEE 802: local experimental ethertype 1.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const MAC_A: [u8; 6] = [0x02, 0x56, 0x50, 0, 0, 0x0a];
const MAC_B: [u8; 6] = [0x02, 0x56, 0x50, 0, 0, 0x0b];
/// Where the fields of a frame are.
const TYPE: usize = 12;
const SEQUENCE: usize = 14;
const STREAM: usize = 22;
const CRC: usize = 26;
const FILL: usize = 30;

/// Length of the table that fills are cut from, beyond the longest frame.
const FILL_STARTS: usize = 1 << 16;

/// Makes frames of one length.
pub struct Generator {
    len: usize,
    stream: u32,
    sequence: u64,
    /// Bytes that look random; each frame starts somewhere else in it.
    fill: Box<[u8]>,
    fresh: bool,
}

impl Generator {
    /// Frames of `len` bytes, brought between [`MIN_LEN`] and [`MAX_LEN`]. `stream`
    /// tells one generator from another. If not `fresh`, the burst is filled once and
    /// its frames repeat: for measurements in which making packets must cost nothing.
    pub fn new(len: usize, stream: u32, fresh: bool) -> Self {
        let len = len.clamp(MIN_LEN, MAX_LEN);
        let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ u64::from(stream) << 17;
        let mut byte = || {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        };
        let fill = (0..FILL_STARTS + len).map(|_| byte()).collect();
        Self { len, stream, sequence: 0, fill, fresh }
    }

    /// Length of each frame, bytes.
    pub fn frame_len(&self) -> usize {
        self.len
    }

    /// The stream's number.
    pub fn stream(&self) -> u32 {
        self.stream
    }

    /// Makes the next `count` frames, one behind the other in `frames`, replacing what
    /// was there.
    pub fn fill(&mut self, frames: &mut Vec<u8>, count: usize) {
        let filled = count * self.len;
        if !self.fresh && frames.len() == filled {
            self.sequence += count as u64;
            return;
        }
        frames.resize(filled, 0);
        for frame in frames.chunks_exact_mut(self.len) {
            // Fibonacci hashing: neighbouring sequence numbers start far apart.
            let start = (self.sequence.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as usize;
            let mut header = [0; FILL];
            header[..6].copy_from_slice(&MAC_A);
            header[6..TYPE].copy_from_slice(&MAC_B);
            header[TYPE..SEQUENCE].copy_from_slice(&ETHERTYPE);
            header[SEQUENCE..STREAM].copy_from_slice(&self.sequence.to_le_bytes());
            header[STREAM..CRC].copy_from_slice(&self.stream.to_le_bytes());
            let Some((head, rest)) = frame.split_at_mut_checked(FILL) else {
                return;
            };
            if let Some(bytes) = self.fill.get(start..start + rest.len()) {
                rest.copy_from_slice(bytes);
            }
            let crc = checksum(&header[TYPE..CRC], rest);
            header[CRC..].copy_from_slice(&crc.to_le_bytes());
            head.copy_from_slice(&header);
            self.sequence += 1;
        }
    }
}

fn checksum(head: &[u8], rest: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(head);
    crc.update(rest);
    crc.finalize()
}

/// What a checker has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Whole frames.
    pub intact: u64,
    /// Sequence numbers that have not come (yet).
    pub lost: u64,
    /// Frames that came after a later one, or twice.
    pub reordered: u64,
    /// Frames in which a byte is wrong, or that are none of a generator's.
    pub corrupted: u64,
    /// Times that another stream began.
    pub streams: u64,
}

/// Judges frames.
#[derive(Clone, Debug, Default)]
pub struct Checker {
    /// The only stream that counts, or any.
    only: Option<u32>,
    /// Number and next sequence number of the stream being received.
    stream: Option<(u32, u64)>,
    /// Frames since the last one that was sampled.
    skipped: u32,
    verdict: Verdict,
}

/// Frames of which one is looked at.
pub const SAMPLE: u32 = 64;

impl Checker {
    /// A checker of any stream: it starts where the first frame is.
    pub fn new() -> Self {
        Self::default()
    }

    /// A checker of one stream, from its first frame on.
    pub fn of_stream(stream: u32) -> Self {
        Self { only: Some(stream), stream: Some((stream, 0)), ..Self::default() }
    }

    /// Looks at every byte of one frame in [`SAMPLE`], and says nothing of those in between: frames
    /// that repeat are fine.
    #[inline]
    pub fn sample(&mut self, frame: &[u8]) {
        self.skipped += 1;
        if self.skipped == SAMPLE {
            self.skipped = 0;
            match parse(frame) {
                Some(_) => self.verdict.intact += 1,
                None => self.verdict.corrupted += 1,
            }
        }
    }

    /// What was seen so far.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Looks at every byte of a frame.
    pub fn check(&mut self, frame: &[u8]) {
        let Some((stream, sequence)) =
            parse(frame).filter(|(stream, _)| self.only.is_none_or(|only| only == *stream))
        else {
            self.verdict.corrupted += 1;
            return;
        };
        self.verdict.intact += 1;
        let expected = match self.stream {
            Some((current, expected)) if current == stream => expected,
            _ => {
                self.verdict.streams += 1;
                sequence
            }
        };
        if let Some(gap) = sequence.checked_sub(expected) {
            self.verdict.lost += gap;
            self.stream = Some((stream, sequence.wrapping_add(1)));
        } else {
            // It was counted as lost when a later one came.
            self.verdict.lost = self.verdict.lost.saturating_sub(1);
            self.verdict.reordered += 1;
        }
    }
}

/// Stream and sequence number of a frame in which every byte is right.
fn parse(frame: &[u8]) -> Option<(u32, u64)> {
    let (header, rest) = frame.split_first_chunk::<FILL>()?;
    let (one, other) = (&header[..6], &header[6..TYPE]);
    let addresses = (one == MAC_A && other == MAC_B) || (one == MAC_B && other == MAC_A);
    let crc = u32::from_le_bytes(header[CRC..].try_into().ok()?);
    if !addresses || header[TYPE..SEQUENCE] != ETHERTYPE || checksum(&header[TYPE..CRC], rest) != crc {
        return None;
    }
    let sequence = u64::from_le_bytes(header[SEQUENCE..STREAM].try_into().ok()?);
    Some((u32::from_le_bytes(header[STREAM..CRC].try_into().ok()?), sequence))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn frames(len: usize, count: usize) -> Vec<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut generator = Generator::new(len, 7, true);
        generator.fill(&mut bytes, count);
        bytes.chunks(generator.frame_len()).map(<[u8]>::to_vec).collect()
    }

    #[test]
    fn frames_of_every_length_pass_whole_and_in_order() {
        for len in [0, 30, 31, 60, 64, 1514, 65_535, 1 << 20] {
            let mut checker = Checker::new();
            for frame in frames(len, 100) {
                assert!((MIN_LEN..=MAX_LEN).contains(&frame.len()));
                checker.check(&frame);
            }
            let verdict = Verdict { intact: 100, streams: 1, ..Verdict::default() };
            assert_eq!(checker.verdict(), verdict, "{len}");
        }
    }

    #[test]
    fn any_changed_byte_is_found() {
        let frame = frames(80, 1).remove(0);
        for at in 0..frame.len() {
            for flip in [1, 0x80, 0xff] {
                let mut changed = frame.clone();
                changed[at] ^= flip;
                let mut checker = Checker::new();
                checker.check(&changed);
                assert_eq!(checker.verdict().corrupted, 1, "byte {at}");
            }
        }
        for len in 0..frame.len() {
            let mut checker = Checker::new();
            checker.check(&frame[..len]);
            assert_eq!(checker.verdict().corrupted, 1, "cut to {len}");
        }
    }

    #[test]
    fn swapped_addresses_are_fine() {
        let mut frame = frames(64, 1).remove(0);
        let (one, other) = frame.split_at_mut(6);
        one.swap_with_slice(&mut other[..6]);
        let mut checker = Checker::new();
        checker.check(&frame);
        assert_eq!(checker.verdict().intact, 1);
    }

    #[test]
    fn losses_and_late_frames_are_counted() {
        let all = frames(64, 10);
        let mut checker = Checker::new();
        for at in [2, 3, 6, 4, 9] {
            checker.check(&all[at]);
        }
        let verdict = checker.verdict();
        // 5, 7 and 8 are missing; 4 came late.
        assert_eq!((verdict.intact, verdict.lost, verdict.reordered), (5, 3, 1));
        let mut own = Checker::of_stream(7);
        own.check(&all[2]);
        assert_eq!(own.verdict().lost, 2);
        let mut others = Checker::of_stream(8);
        others.check(&all[0]);
        assert_eq!(others.verdict().corrupted, 1);
    }

    #[test]
    fn one_frame_in_so_many_is_sampled_whatever_its_number() {
        let mut all = frames(64, 200);
        all[127][40] ^= 1;
        all[10][40] ^= 1;
        let mut checker = Checker::new();
        all.iter().chain(&all[..50]).for_each(|frame| checker.sample(frame));
        assert_eq!(checker.verdict(), Verdict { intact: 2, corrupted: 1, ..Verdict::default() });
    }

    #[test]
    fn another_generator_is_another_stream_not_a_loss() {
        let mut checker = Checker::new();
        for stream in [1, 2] {
            let mut bytes = Vec::new();
            Generator::new(64, stream, true).fill(&mut bytes, 5);
            bytes.chunks(64).for_each(|frame| checker.check(frame));
        }
        let verdict = checker.verdict();
        assert_eq!((verdict.intact, verdict.lost, verdict.reordered, verdict.streams), (10, 0, 0, 2));
    }
}
