//! Memory between pages that nobody may touch, with a copy of what was put there: what else has
//! changed, the code under test has written.

use std::ops::Range;

use guest_driver_model::shm::SharedMemory;

use crate::sys;

/// Memory of one process, used by one input after the other.
#[derive(Debug)]
pub struct Guarded {
    memory: SharedMemory,
    /// What was put there.
    expected: Vec<u8>,
    seen: Vec<u8>,
}

impl Guarded {
    /// Zeroed; whole pages.
    pub fn new(len: usize) -> Self {
        Self { memory: sys::guarded(len), expected: vec![0; len], seen: vec![0; len] }
    }

    /// The memory itself.
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// Length, bytes.
    pub fn len(&self) -> u64 {
        self.memory.len()
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        self.memory.is_empty()
    }

    /// Zeroes all of it.
    pub fn clear(&mut self) {
        self.memory.zero(0, self.memory.len()).expect("all of it");
        self.expected.fill(0);
    }

    /// Puts bytes there, as far as they fit.
    pub fn put(&mut self, offset: u64, bytes: &[u8]) {
        let offset = offset.min(self.memory.len()) as usize;
        let len = bytes.len().min(self.expected.len() - offset);
        self.memory.write(offset as u64, &bytes[..len]).expect("inside");
        self.expected[offset..offset + len].copy_from_slice(&bytes[..len]);
    }

    /// Asserts that nothing has changed that was not put there or accepted.
    pub fn check_unchanged(&mut self) {
        self.memory.read(0, &mut self.seen).expect("all of it");
        let changed = || self.seen.iter().zip(&self.expected).position(|(seen, expected)| seen != expected);
        assert!(self.seen == self.expected, "the byte at {:#x} was written", changed().unwrap_or(0));
    }

    /// What is there now counts as put there.
    pub fn accept(&mut self, range: Range<u64>) {
        let end = range.end.min(self.memory.len()) as usize;
        let range = (range.start as usize).min(end)..end;
        self.memory.read(range.start as u64, &mut self.expected[range]).expect("inside");
    }
}
