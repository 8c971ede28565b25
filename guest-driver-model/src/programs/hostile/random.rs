//! Numbers that a seed decides.

use crate::shm::{SharedMemory, ShmError};

/// Numbers that look as if there were none.
#[derive(Clone, Debug)]
pub struct Random(fastrand::Rng);

impl Random {
    /// The numbers of this seed.
    pub fn new(seed: u64) -> Self {
        Self(fastrand::Rng::with_seed(seed))
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0.u64(..)
    }

    /// A number below `end`; 0 if that is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        if end == 0 { 0 } else { self.0.u64(..end) }
    }

    /// One of several, or what is given for none.
    pub fn one<T: Copy>(&mut self, of: &[T], none: T) -> T {
        of.get(self.below(of.len() as u64) as usize).copied().unwrap_or(none)
    }

    /// A number as rings have them, or as they must not: small, at an edge, or anything.
    pub fn word(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(4),
            1 => self.below(256),
            2 => 1 << self.below(64),
            3 => (1_u64 << self.below(64)).wrapping_sub(1),
            4 => self.number() & 0xffff_ffff,
            _ => self.number(),
        }
    }

    /// Stores one word, of two, four or eight bytes, somewhere in a range of a memory. `addresses`: one in
    /// four is one of these, or close by.
    ///
    /// # Errors
    /// If the range is not in the memory.
    pub fn scribble(
        &mut self,
        memory: &SharedMemory,
        range: (u64, u64),
        addresses: &[u64],
    ) -> Result<(), ShmError> {
        let (start, len) = range;
        let value = match self.below(4) {
            0 => self.one(addresses, 0).wrapping_add(self.below(4096)),
            _ => self.word(),
        };
        match self.below(3) {
            0 if len >= 2 => memory.store_u16(start + self.below(len / 2) * 2, value as u16),
            1 if len >= 4 => memory.store_u32(start + self.below(len / 4) * 4, value as u32),
            _ if len >= 8 => memory.store_u64(start + self.below(len / 8) * 8, value),
            _ => Ok(()),
        }
    }
}
