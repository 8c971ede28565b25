//! What is shown where in the model VMM's window: decides, touches no memory.
//!
//! Stricter than any VMM is known to be, so that a broker that gets along with it
//! gets along with others.

use std::collections::BTreeMap;

use vhost_pci_device::abi::{PAGE_SIZE, SHMID_WINDOW};

/// A SHMEM_MAP or SHMEM_UNMAP request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Which shared-memory region.
    pub shmid: u8,
    /// Offset into the file; 0 for an unmap.
    pub file_offset: u64,
    /// Offset into the window.
    pub offset: u64,
    /// Length, bytes.
    pub len: u64,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The window is region 0.
    #[error("there is no shared-memory region {0}")]
    NoRegion(u8),
    /// Offsets and lengths are whole pages, and not zero pages.
    #[error("not a range of pages: {0:?}")]
    NotPages(Request),
    /// The range does not end inside the window.
    #[error("outside the window of {window_len:#x} bytes: {request:?}")]
    Outside {
        /// What was asked.
        request: Request,
        /// Length of the window.
        window_len: u64,
    },
    /// Something is mapped there: nothing is ever replaced.
    #[error("{request:?} overlaps what is mapped at {offset:#x}, {len:#x} bytes")]
    Overlap {
        /// What was asked.
        request: Request,
        /// Where a mapping in the way starts.
        offset: u64,
        /// Its length.
        len: u64,
    },
    /// An unmap names exactly one mapping.
    #[error("no mapping is exactly this: {0:?}")]
    NotMapped(Request),
    /// QEMU 11.1 crashes on this one.
    #[error("a SHMEM_MAP before the device is started")]
    NotStarted,
}

/// The mappings of a window.
#[derive(Clone, Debug)]
pub struct Shown {
    window_len: u64,
    started: bool,
    /// Length by window offset. No two overlap.
    mappings: BTreeMap<u64, u64>,
}

impl Shown {
    /// An empty window.
    pub fn new(window_len: u64) -> Self {
        Self { window_len, started: false, mappings: BTreeMap::new() }
    }

    /// The driver starts the device: from now on there may be mappings.
    pub fn start(&mut self) {
        self.started = true;
    }

    /// How many mappings there are.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.mappings.len()
    }

    /// Notes a mapping.
    ///
    /// # Errors
    /// If it is impossible; then nothing has changed.
    pub fn map(&mut self, request: Request) -> Result<(), Refusal> {
        if !self.started {
            return Err(Refusal::NotStarted);
        }
        let end = self.end_of(request)?;
        let before = self.mappings.range(..end).next_back();
        if let Some((&offset, &len)) = before
            && offset + len > request.offset
        {
            return Err(Refusal::Overlap { request, offset, len });
        }
        self.mappings.insert(request.offset, request.len);
        Ok(())
    }

    /// Forgets a mapping.
    ///
    /// # Errors
    /// If no mapping is exactly that range; then nothing has changed.
    pub fn unmap(&mut self, request: Request) -> Result<(), Refusal> {
        self.end_of(request)?;
        if self.mappings.get(&request.offset) != Some(&request.len) {
            return Err(Refusal::NotMapped(request));
        }
        self.mappings.remove(&request.offset);
        Ok(())
    }

    /// Where the range ends, if it is one of pages inside the window.
    fn end_of(&self, request: Request) -> Result<u64, Refusal> {
        let Request { shmid, file_offset, offset, len } = request;
        if shmid != SHMID_WINDOW {
            return Err(Refusal::NoRegion(shmid));
        }
        let pages = [file_offset, offset, len].into_iter().all(|value| value.is_multiple_of(PAGE_SIZE));
        if !pages || len == 0 {
            return Err(Refusal::NotPages(request));
        }
        let window_len = self.window_len;
        let end = offset.checked_add(len).filter(|end| *end <= window_len);
        end.ok_or(Refusal::Outside { request, window_len })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const PAGE: u64 = PAGE_SIZE;

    fn at(offset: u64, len: u64) -> Request {
        Request { shmid: 0, file_offset: 0, offset, len }
    }

    fn started() -> Shown {
        let mut shown = Shown::new(16 * PAGE);
        shown.start();
        shown
    }

    #[test]
    fn nothing_is_mapped_over_something() {
        let mut shown = started();
        shown.map(at(4 * PAGE, 4 * PAGE)).unwrap();
        for (offset, len) in [(4, 4), (3, 2), (7, 2), (0, 16), (5, 1)] {
            let result = shown.map(at(offset * PAGE, len * PAGE));
            assert!(matches!(result, Err(Refusal::Overlap { .. })), "{offset} {len}");
        }
        shown.map(at(3 * PAGE, PAGE)).unwrap();
        shown.map(at(8 * PAGE, 8 * PAGE)).unwrap();
        assert_eq!(shown.count(), 3);
    }

    #[test]
    fn only_exactly_what_was_mapped_is_unmapped() {
        let mut shown = started();
        shown.map(at(4 * PAGE, 4 * PAGE)).unwrap();
        for (offset, len) in [(4, 3), (5, 3), (3, 5), (0, 4)] {
            assert!(matches!(shown.unmap(at(offset * PAGE, len * PAGE)), Err(Refusal::NotMapped(_))));
        }
        shown.unmap(at(4 * PAGE, 4 * PAGE)).unwrap();
        assert!(matches!(shown.unmap(at(4 * PAGE, 4 * PAGE)), Err(Refusal::NotMapped(_))));
        shown.map(at(5 * PAGE, PAGE)).unwrap();
    }

    #[test]
    fn impossible_ranges_are_refused() {
        let mut shown = started();
        assert!(matches!(shown.map(at(16 * PAGE, PAGE)), Err(Refusal::Outside { .. })));
        assert!(matches!(shown.map(at(8 * PAGE, 9 * PAGE)), Err(Refusal::Outside { .. })));
        assert!(matches!(shown.map(at(PAGE, u64::MAX - PAGE + 1)), Err(Refusal::Outside { .. })));
        assert!(matches!(shown.map(at(0, 0)), Err(Refusal::NotPages(_))));
        assert!(matches!(shown.map(at(1, PAGE)), Err(Refusal::NotPages(_))));
        assert!(matches!(shown.map(at(0, PAGE + 1)), Err(Refusal::NotPages(_))));
        let unaligned = Request { file_offset: 1, ..at(0, PAGE) };
        assert!(matches!(shown.map(unaligned), Err(Refusal::NotPages(_))));
        let other = Request { shmid: 1, ..at(0, PAGE) };
        assert!(matches!(shown.map(other), Err(Refusal::NoRegion(1))));
        assert_eq!(shown.count(), 0);
        assert_eq!(Shown::new(PAGE).map(at(0, PAGE)), Err(Refusal::NotStarted));
    }
}
