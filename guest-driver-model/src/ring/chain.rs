//! Descriptor chains as the device half hands them out: validated, translated and
//! private. What is in here was in shared memory once and is not any more.

use super::walk::Usual;
use crate::shm::SharedMemory;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

/// One descriptor (virtio 1.3, 2.7.5), fetched once into private memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    flags: u16,
    pub(crate) next: u16,
}

impl Descriptor {
    pub(crate) const NEXT: u16 = VRING_DESC_F_NEXT as u16;
    pub(crate) const WRITE: u16 = VRING_DESC_F_WRITE as u16;
    pub(crate) const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

    pub(crate) const fn new(addr: u64, len: u32, flags: u16, next: u16) -> Self {
        Self { addr, len, flags, next }
    }

    /// The next descriptor of the chain, if there is one.
    #[inline]
    pub(crate) fn next(&self) -> Option<u16> {
        (self.flags & Self::NEXT != 0).then_some(self.next)
    }

    /// Whether it is all of its chain, and for the device to do what it nearly always does.
    #[inline]
    pub(super) fn is_usual(&self, usual: &Usual) -> bool {
        self.flags & (Self::NEXT | Self::WRITE | Self::INDIRECT) == usual.flags
    }

    /// Whether the device writes the buffer; otherwise it reads it.
    #[inline]
    pub(crate) fn is_writable(&self) -> bool {
        self.flags & Self::WRITE != 0
    }

    /// Whether the buffer is a table of descriptors (2.7.5.3).
    #[inline]
    pub(crate) fn is_indirect(&self) -> bool {
        self.flags & Self::INDIRECT != 0
    }

    /// From the two halves as they are in memory, in native order.
    #[inline]
    pub(crate) const fn from_halves([addr, rest]: [u64; 2]) -> Self {
        Self { addr, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }

    /// The two halves as they are in memory, in native order.
    #[inline]
    pub(crate) const fn halves(&self) -> [u64; 2] {
        [self.addr, self.len as u64 | (self.flags as u64) << 32 | (self.next as u64) << 48]
    }
}

/// Where a piece of a buffer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the window: bytes from its start.
    Window(u64),
    /// With the owner only: the device has to fetch it, or to store it there.
    Owner,
}

/// A piece of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// As the owner's driver names it.
    pub iova: u64,
    /// Where it was when the chain was popped. All of a segment in the window was in one
    /// mapping then.
    pub place: Place,
    /// Length, bytes; not 0, and at most `MAX_COPY` with the owner.
    pub len: u32,
    /// The device writes it; otherwise the device reads it.
    pub writable: bool,
}

/// What the chains of a queue are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device only reads (a transmit queue).
    DeviceReads,
    /// The device only writes (a receive queue).
    DeviceWrites,
    /// A readable part, then a writable part; either may be missing.
    Both,
}

/// One chain of a burst.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'burst> {
    /// What the used ring calls it.
    pub head: u16,
    /// Sum of the segments' lengths, bytes.
    pub len: u64,
    /// In the order of the chain; never empty.
    pub segments: &'burst [Segment],
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    head: u16,
    segments: u16,
    first: u32,
    len: u64,
}

/// Length of a cache line, bytes.
const LINE: usize = 64;

/// A burst of chains. Meant to be cleared and filled again: it stops allocating once
/// it has seen the largest burst.
#[derive(Clone, Debug, Default)]
pub struct ChainBurst {
    segments: Vec<Segment>,
    chains: Vec<Entry>,
    /// Whether there may be a segment that is not in the window.
    outside: bool,
}

impl ChainBurst {
    /// Room for `chains` chains of one or two segments without an allocation.
    pub fn with_capacity(chains: usize) -> Self {
        Self { segments: Vec::with_capacity(2 * chains), chains: Vec::with_capacity(chains), outside: false }
    }

    /// Forgets all chains, keeps the room.
    #[inline]
    pub fn clear(&mut self) {
        self.segments.clear();
        self.chains.clear();
        self.outside = false;
    }

    /// Whether there may be a segment that is not in the window.
    #[inline]
    pub fn is_outside(&self) -> bool {
        self.outside
    }

    /// How many chains there are.
    #[inline]
    pub fn len(&self) -> usize {
        self.chains.len()
    }

    /// Whether there is no chain.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// The chain at a position.
    #[inline]
    pub fn chain(&self, at: usize) -> Option<Chain<'_>> {
        self.chains.get(at).map(|entry| self.chain_of(entry))
    }

    #[inline]
    fn chain_of(&self, entry: &Entry) -> Chain<'_> {
        let first = entry.first as usize;
        let segments = self.segments.get(first..first + usize::from(entry.segments)).unwrap_or_default();
        Chain { head: entry.head, len: entry.len, segments }
    }

    /// All chains, in the order in which the driver made them available.
    #[inline]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Chain<'_>> {
        self.chains.iter().map(|entry| self.chain_of(entry))
    }

    /// Forgets the first `count` chains; the others move to the front.
    pub fn discard(&mut self, count: usize) {
        let gone = self.chains.get(count).map_or(self.segments.len(), |next| next.first as usize);
        self.segments.drain(..gone);
        self.chains.drain(..count.min(self.chains.len()));
        for entry in &mut self.chains {
            entry.first -= gone as u32;
        }
    }

    /// Forgets all chains but the first `count`.
    #[inline]
    pub fn truncate(&mut self, count: usize) {
        if let Some(next) = self.chains.get(count) {
            self.segments.truncate(next.first as usize);
            self.chains.truncate(count);
        }
    }

    /// Asks the processor for the first cache line of what each chain holds behind a header of
    /// `header` bytes, so that they come together.
    #[inline]
    pub(crate) fn prefetch(&self, header: usize, window: &SharedMemory) {
        for chain in self.iter() {
            if let Some(Segment { place: Place::Window(offset), .. }) = chain.segments.first() {
                window.prefetch_read(offset + header as u64);
            }
        }
    }

    /// Asks the processor for the cache lines of the chain at a position in which a header of
    /// `header` bytes, and `len` bytes behind it, are to be written.
    #[inline]
    pub(crate) fn prefetch_write(&self, at: usize, (header, len): (usize, usize), window: &SharedMemory) {
        if let Some(&Segment { place: Place::Window(offset), len: room, .. }) =
            self.chain(at).and_then(|chain| chain.segments.first())
        {
            window.prefetch_write(offset);
            let behind = offset + header as u64;
            for line in 0..len.min(room as usize).div_ceil(LINE) {
                window.prefetch_write(behind + (line * LINE) as u64);
            }
        }
    }

    /// Where the segments of the next chain will start.
    #[inline]
    pub(crate) fn mark(&self) -> usize {
        self.segments.len()
    }

    #[inline]
    pub(crate) fn push_segment(&mut self, segment: Segment) {
        self.segments.push(segment);
    }

    /// A chain of one segment.
    #[inline]
    pub(crate) fn push_one(&mut self, head: u16, segment: Segment) {
        let first = self.segments.len() as u32;
        self.segments.push(segment);
        self.chains.push(Entry { head, segments: 1, first, len: u64::from(segment.len) });
    }

    /// A segment that is not in the window.
    pub(crate) fn push_outside(&mut self, iova: u64, len: u32, writable: bool) {
        self.segments.push(Segment { iova, place: Place::Owner, len, writable });
        self.outside = true;
    }

    /// Makes the segments since `mark` a chain.
    #[inline]
    pub(crate) fn finish(&mut self, head: u16, mark: usize, len: u64) {
        let segments = (self.segments.len() - mark) as u16;
        self.chains.push(Entry { head, segments, first: mark as u32, len });
    }

    /// Drops the segments since `mark`.
    #[inline]
    pub(crate) fn abandon(&mut self, mark: usize) {
        self.segments.truncate(mark);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn chains_left_after_a_discard_keep_their_segments() {
        let mut burst = ChainBurst::default();
        for head in 0..5_u16 {
            let mark = burst.mark();
            for piece in 0..=head {
                let offset = u64::from(head) << 8 | u64::from(piece);
                let place = Place::Window(offset);
                burst.push_segment(Segment { iova: 0, place, len: 1, writable: false });
            }
            burst.finish(head, mark, u64::from(head) + 1);
        }
        burst.discard(3);
        let heads: Vec<_> = burst.iter().map(|chain| (chain.head, chain.segments.len())).collect();
        assert_eq!(heads, [(3, 4), (4, 5)]);
        assert_eq!(burst.chain(1).unwrap().segments[4].place, Place::Window(4 << 8 | 4));
        burst.truncate(2);
        assert_eq!(burst.len(), 2);
        burst.truncate(1);
        assert_eq!((burst.len(), burst.mark()), (1, 4));
        burst.discard(2);
        assert!(burst.is_empty() && burst.mark() == 0);
    }

    #[test]
    fn a_descriptor_has_the_layout_of_the_specification() {
        let descriptor = Descriptor::new(0x1122_3344_5566_7788, 0xaabb_ccdd, Descriptor::NEXT, 0x0102);
        assert_eq!(descriptor.halves(), [0x1122_3344_5566_7788, 0x0102_0001_aabb_ccdd]);
        assert_eq!(Descriptor::from_halves(descriptor.halves()), descriptor);
    }
}
