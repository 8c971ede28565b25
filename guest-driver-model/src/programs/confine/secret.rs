//! What is looked for in the window: 32 bytes, repeated over a page.
//!
//! The bytes are made from a seed, a word at a time and straight into the page, so that
//! they stand together nowhere else in the owner's memory: not in a program's file, not on
//! a command line, not on a stack.

use vhost_pci_device::abi::PAGE_SIZE;

use crate::shm::{SharedMemory, ShmError};

/// Words of a secret.
const WORDS: u64 = 4;

/// A secret, known by its seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Secret {
    seed: u64,
}

impl Secret {
    /// Bytes that a secret fills.
    pub const LEN: u64 = PAGE_SIZE;

    /// The secret of a seed.
    pub const fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// One of its words: the finisher of SplitMix64. A function of its own, so that never
    /// two of them are at hand in the owner.
    #[inline(never)]
    fn word(self, index: u64) -> u64 {
        let mut word = self.seed.wrapping_mul(WORDS).wrapping_add(index % WORDS + 1);
        word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }

    /// Fills a page with it.
    ///
    /// # Errors
    /// If the memory is shorter.
    pub fn fill(self, page: &SharedMemory) -> Result<(), ShmError> {
        (0..Self::LEN / 8).try_for_each(|index| page.store_u64(index * 8, self.word(index)))
    }

    /// Whether the page is full of it, and of nothing else.
    ///
    /// # Errors
    /// If the memory is shorter.
    pub fn is_in(self, page: &SharedMemory) -> Result<bool, ShmError> {
        for index in 0..Self::LEN / 8 {
            if page.load_u64(index * 8)? != self.word(index) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// For the peer: all words.
    pub fn words(self) -> [u64; WORDS as usize] {
        std::array::from_fn(|index| self.word(index as u64))
    }

    /// For the peer: all bytes.
    pub fn bytes(self) -> [u8; 8 * WORDS as usize] {
        let mut bytes = [0; 8 * WORDS as usize];
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(self.words()) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}
