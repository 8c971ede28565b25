//! Where a side of a packed ring is: a slot, and the lap in which it is meant (virtio 1.3,
//! 2.8.1).
//!
//! Owns: no memory. [`publish`] and [`observe`] are all that orders a slot's flags against
//! the rest of it.

use crate::ring::word::Word;

/// VIRTQ_DESC_F_AVAIL (2.8.1).
pub const AVAIL: u16 = 1 << 7;
/// VIRTQ_DESC_F_USED.
pub const USED: u16 = 1 << 15;

/// A slot and the side's wrap counter when it is there: as an event suppression area names a
/// descriptor (2.8.14), bits 0 to 14 and bit 15. One word, so that it is loaded as it was
/// stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position(u16);

impl Position {
    /// Where both sides of a fresh ring start.
    pub const START: Self = Self(Self::WRAP);

    const WRAP: u16 = 1 << 15;

    /// The slot; below the ring's size.
    #[inline]
    pub fn slot(self) -> u16 {
        self.0 & !Self::WRAP
    }

    #[inline]
    fn wrap(self) -> bool {
        self.0 & Self::WRAP != 0
    }

    /// `count` slots on, in a ring of `size`, which is not smaller.
    #[inline]
    pub fn advanced(self, count: u16, size: u16) -> Self {
        let slot = u32::from(self.slot()) + u32::from(count);
        let wrap = self.0 & Self::WRAP;
        // The slots are below the size, which is at most 2^15.
        match slot.checked_sub(u32::from(size)) {
            None => Self(slot as u16 | wrap),
            Some(slot) => Self(slot as u16 | (wrap ^ Self::WRAP)),
        }
    }

    /// `count` slots back, in a ring of `size`, which is not smaller.
    #[inline]
    pub fn put_back(self, count: u16, size: u16) -> Self {
        let wrap = self.0 & Self::WRAP;
        match self.slot().checked_sub(count) {
            Some(slot) => Self(slot | wrap),
            None => Self(self.slot().wrapping_add(size).wrapping_sub(count) | (wrap ^ Self::WRAP)),
        }
    }

    /// The flags by which a driver makes the slot available.
    #[inline]
    pub fn avail_flags(self) -> u16 {
        if self.wrap() { AVAIL } else { USED }
    }

    /// Flags that make the slot nobody's news: those by which a device gave it back the lap
    /// before.
    #[inline]
    pub fn not_yet_flags(self) -> u16 {
        if self.wrap() { 0 } else { AVAIL | USED }
    }

    /// The flags by which a device gives it back.
    #[inline]
    pub fn used_flags(self) -> u16 {
        if self.wrap() { AVAIL | USED } else { 0 }
    }

    /// Whether these flags make it available.
    #[inline]
    pub fn is_available(self, flags: u16) -> bool {
        flags & (AVAIL | USED) == self.avail_flags()
    }

    /// Whether these flags give it back.
    #[inline]
    pub fn is_used(self, flags: u16) -> bool {
        flags & (AVAIL | USED) == self.used_flags()
    }

    /// As an event suppression area names a descriptor.
    #[inline]
    pub fn event(self) -> u16 {
        self.0
    }

    /// From what an event suppression area names. The slot can be anything.
    #[inline]
    pub fn of_event(event: u16) -> Self {
        Self(event)
    }

    /// As the device half leaves it for the next one (`docs/vhost-pci-device.md`, 8.2): an
    /// event with the wrap counter's bit turned over, so that a fresh area, all zero, is
    /// [`Self::START`].
    #[inline]
    pub fn left(self) -> u16 {
        self.event() ^ Self::WRAP
    }

    /// From what a device half left; `None` if it is no position in a ring of `size`.
    pub fn of_left(left: u16, size: u16) -> Option<Self> {
        Some(Self::of_event(left ^ Self::WRAP)).filter(|position| position.slot() < size)
    }

    /// How many slots `self`, in a ring of `size`, is ahead of another position that is at
    /// most a lap behind; not positive if it is not ahead.
    #[inline]
    pub fn ahead_of(self, other: Self, size: u16) -> i32 {
        let lap = if self.wrap() == other.wrap() { 0 } else { i32::from(size) };
        i32::from(self.slot()) - i32::from(other.slot()) + lap
    }
}

/// Shows a slot, and all that was stored before, to the other side.
#[inline]
pub fn publish<W: Word>(word: &W, flags: u16) {
    word.store_release(flags);
}

/// A slot's flags. If they say that it is this side's, the rest may be loaded.
#[inline]
pub fn observe<W: Word>(word: &W) -> u16 {
    word.load_acquire()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn positions_go_round_and_come_back_with_their_lap() {
        for size in [1_u16, 2, 3, 100, 32_767, 32_768] {
            let mut position = Position::START;
            let steps = [1_u16, size / 2, size, size - 1, size / 3 + 1, 1, size];
            for count in steps.into_iter().cycle().take(50) {
                let count = count.min(size);
                let next = position.advanced(count, size);
                assert!(next.slot() < size);
                assert_eq!(next.put_back(count, size), position);
                assert_eq!(next.ahead_of(position, size), i32::from(count));
                assert_eq!(Position::of_event(next.event()), next);
                assert_eq!(Position::of_left(next.left(), size), Some(next));
                position = next;
            }
            assert_eq!(Position::of_left(size - 1, size).map(|left| left.wrap()), Some(true));
            assert!(size == 32_768 || Position::of_left(size, size).is_none());
        }
        assert_eq!(Position::START.left(), 0);
    }

    #[test]
    fn flags_are_one_sides_in_one_lap_only() {
        let [first, second] = [Position::START, Position(0)];
        assert_eq!([first.avail_flags(), first.used_flags()], [0x80, 0x8080]);
        assert_eq!([second.avail_flags(), second.used_flags()], [0x8000, 0]);
        for flags in [0, 0x80, 0x8000, 0x8080] {
            let meanings = [
                first.is_available(flags),
                first.is_used(flags),
                second.is_available(flags),
                second.is_used(flags),
            ];
            assert_eq!(meanings.into_iter().filter(|meaning| *meaning).count(), 1);
        }
    }
}
