//! The owner's dirty log: pages that this side has written are marked in it, while the owner is being
//! migrated (`docs/vhost-pci-device.md`, 8.7).
//!
//! Owns: which part of the window is which of the owner's pages. Every store of
//! [`SharedMemory`] comes by here when the memory has a log, so that no user of it
//! can forget to.

use std::fmt;
use std::ptr::NonNull;
use std::sync::{PoisonError, RwLock};

use vhost_pci_device::abi::PAGE_SIZE;

use super::SharedMemory;

/// A part of the window that shows pages of the owner's one behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoggedRange {
    /// First byte, bytes from the window's start; a multiple of the page size.
    pub window_offset: u64,
    /// Bytes.
    pub len: u64,
    /// The number of its first page.
    pub page: u64,
}

/// What a store was of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "unlogged"), allow(dead_code))]
pub(super) enum Wrote {
    /// A word of a ring.
    Ring,
    /// Bytes of a buffer.
    Payload,
}

/// The log of one window.
pub struct WriteLog {
    /// Where the window is in this process.
    window: usize,
    bits: SharedMemory,
    /// By window offset.
    ranges: RwLock<Box<[LoggedRange]>>,
}

impl fmt::Debug for WriteLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WriteLog({:?})", self.bits)
    }
}

/// Whether each page of these ranges has a bit in a log of `len` bytes.
pub fn has_bits(len: u64, page: u64, bytes: u64) -> bool {
    let end = page.checked_add(bytes.div_ceil(PAGE_SIZE));
    end.is_some_and(|end| end.div_ceil(8) <= len)
}

impl WriteLog {
    /// The log in `bits` of a window with these ranges.
    pub fn new(window: &SharedMemory, bits: SharedMemory, ranges: Vec<LoggedRange>) -> Self {
        let log = Self { window: window.base.addr().get(), bits, ranges: RwLock::default() };
        log.set_ranges(ranges);
        log
    }

    /// From now on the window shows these.
    pub fn set_ranges(&self, mut ranges: Vec<LoggedRange>) {
        ranges.sort_by_key(|range| range.window_offset);
        // It is whole, or the one before it.
        *self.ranges.write().unwrap_or_else(PoisonError::into_inner) = ranges.into();
    }

    /// Marks the pages of what was stored. What is none of the owner's memory has none.
    #[cold]
    pub(super) fn mark(&self, at: NonNull<u8>, len: usize, what: Wrote) {
        if is_left_out(what) {
            return;
        }
        // In the window, whose length has 64 bits.
        let mut at = at.addr().get().wrapping_sub(self.window) as u64;
        let end = at.saturating_add(len as u64);
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let before = ranges.partition_point(|range| range.window_offset <= at);
        for range in ranges.iter().skip(before.saturating_sub(1)) {
            if range.window_offset >= end {
                break;
            }
            let range_end = range.window_offset.saturating_add(range.len);
            at = at.max(range.window_offset);
            if at >= range_end {
                continue;
            }
            let first = (at - range.window_offset) / PAGE_SIZE;
            let last = (end.min(range_end) - 1 - range.window_offset) / PAGE_SIZE;
            for page in first..=last {
                let page = range.page.saturating_add(page);
                // Each range was checked to have its bits in the log: nothing is ever set outside of it.
                let _ = self.bits.set_bit(page / 8, (page % 8) as u32);
            }
            at = range_end;
        }
    }
}

/// Of a build that is to be found out: what it does not mark.
#[cfg(feature = "unlogged")]
fn is_left_out(what: Wrote) -> bool {
    use std::sync::OnceLock;
    static LEFT_OUT: OnceLock<Option<Wrote>> = OnceLock::new();
    let left_out = LEFT_OUT.get_or_init(|| match std::env::var("VHOST_PCI_UNLOGGED").as_deref() {
        Ok("ring") => Some(Wrote::Ring),
        Ok("payload") => Some(Wrote::Payload),
        _ => None,
    });
    *left_out == Some(what)
}

#[cfg(not(feature = "unlogged"))]
#[inline(always)]
fn is_left_out(_what: Wrote) -> bool {
    false
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::*;

    const BASE: u64 = 4 * PAGE_SIZE;

    /// A window of 16 pages, whose first have the log; pages 4 and 5 are the owner's 100 and 101, page 6 is its 7, and
    /// page 8 its 63.
    fn logged() -> (SharedMemory, SharedMemory) {
        let window = SharedMemory::private(16 * PAGE_SIZE as usize).unwrap();
        let bits = window.part(PAGE_SIZE, 16).unwrap();
        let range =
            |at, pages, page| LoggedRange { window_offset: at * PAGE_SIZE, len: pages * PAGE_SIZE, page };
        let ranges = vec![range(6, 1, 7), range(4, 2, 100), range(8, 1, 63)];
        assert!(ranges.iter().all(|range| has_bits(16, range.page, range.len)));
        let log = Arc::new(WriteLog::new(&window, bits.clone(), ranges));
        (window.logged(&log), bits)
    }

    fn marked(bits: &SharedMemory) -> Vec<u64> {
        let mut bytes = vec![0; bits.len() as usize];
        bits.read(0, &mut bytes).unwrap();
        (0..8 * bits.len()).filter(|page| bytes[(page / 8) as usize] >> (page % 8) & 1 == 1).collect()
    }

    #[test]
    fn every_store_marks_the_pages_that_it_touches_and_no_others() {
        type Store = fn(&SharedMemory);
        let stores: [(Store, &[u64]); 10] = [
            (|memory| memory.store_u16(BASE, 1).unwrap(), &[100]),
            (|memory| memory.store_u32_release(BASE + PAGE_SIZE, 1).unwrap(), &[101]),
            (|memory| memory.store_u64(BASE + 2 * PAGE_SIZE + 8, 1).unwrap(), &[7]),
            (|memory| memory.write(BASE + PAGE_SIZE - 1, &[1, 2]).unwrap(), &[100, 101]),
            (|memory| memory.write(BASE + 1, &[0; 3 * 4096 - 1]).unwrap(), &[7, 100, 101]),
            // From before the owner's memory to behind it, and over the hole.
            (|memory| memory.zero(BASE - 1, 6 * PAGE_SIZE).unwrap(), &[7, 63, 100, 101]),
            (|memory| memory.write_array(8 * PAGE_SIZE, &[1; 12]).unwrap(), &[63]),
            (|memory| memory.copy_to(0, memory, BASE + 10, 1).unwrap(), &[100]),
            (|memory| memory.part(BASE, 8).unwrap().store_u16(2, 1).unwrap(), &[100]),
            // None of the owner's.
            (|memory| memory.write(7 * PAGE_SIZE, &[1; 4096]).unwrap(), &[]),
        ];
        for (number, (store, pages)) in stores.into_iter().enumerate() {
            let (memory, bits) = logged();
            store(&memory);
            assert_eq!(marked(&bits), pages, "store {number}");
            // What was marked stays.
            memory.store_u16(6 * PAGE_SIZE, 0).unwrap();
            assert!(marked(&bits).contains(&7));
        }
    }

    #[test]
    fn a_store_that_fails_or_writes_nothing_marks_nothing() {
        let (memory, bits) = logged();
        assert!(memory.write(16 * PAGE_SIZE, &[1]).is_err() && memory.store_u16(BASE + 1, 1).is_err());
        memory.write(BASE, &[]).unwrap();
        assert!(marked(&bits).is_empty());
    }

    #[test]
    fn pages_beyond_the_log_have_no_bits_whatever_the_numbers_add_up_to() {
        assert!(has_bits(2, 0, 16 * PAGE_SIZE) && has_bits(2, 15, PAGE_SIZE) && has_bits(2, 15, 1));
        assert!(!has_bits(2, 0, 16 * PAGE_SIZE + 1) && !has_bits(2, 16, 1) && !has_bits(0, 0, 1));
        assert!(!has_bits(u64::MAX, u64::MAX, 1) && !has_bits(2, u64::MAX - 1, 3 * PAGE_SIZE));
    }
}
