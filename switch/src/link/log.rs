//! The owner's dirty log: a bit for each page of its guest-physical memory, in a file of its VMM, which
//! wants to know what is written while it migrates its VM. What of a log can be taken, and where in
//! the peer's window it is. Nothing here reads or writes it.

use iommu::{Gpa, MemoryTable, PAGE_SIZE, Span, WindowOffset};
use vhost_pci_device::abi;

use super::descriptor::MemoryFile;
use super::fault::Fault;

/// Pages that a byte of the log has bits for.
const PAGES_PER_BYTE: u64 = 8;
/// The longest log, bytes: the link page numbers pages by 32 bits.
const MAX_LEN: u64 = (1 << 32) / PAGES_PER_BYTE;

/// A log that was checked.
#[derive(Clone, Debug, PartialEq)]
pub struct DirtyLog {
    file: MemoryFile,
    offset: u64,
    len: u64,
}

impl DirtyLog {
    /// The `len` bytes at `offset` of a file that is `file_len` bytes long.
    ///
    /// # Errors
    /// When they cannot be mapped for the peer, or be made shorter by the VMM.
    pub fn new(file: MemoryFile, file_len: u64, offset: u64, len: u64) -> Result<Self, Fault> {
        let fault = |reason: String| Err(Fault::Log(reason));
        if file.can_shrink() {
            return fault(
                "its VMM can shorten its file, which would stop or kill the peer's VM: it is to be a memfd with \
                 F_SEAL_SHRINK, as QEMU's is"
                    .into(),
            );
        }
        if file.page_size() != PAGE_SIZE {
            return fault(format!(
                "its file has pages of {:#x} bytes (hugetlbfs), of which no smaller piece can be mapped, and which may \
                 be missing when they are written: it is to be a memfd of ordinary pages, as QEMU's is",
                file.page_size()
            ));
        }
        let end = len.checked_next_multiple_of(PAGE_SIZE).and_then(|len| offset.checked_add(len));
        if len == 0 || len > MAX_LEN || !offset.is_multiple_of(PAGE_SIZE) {
            return fault(format!(
                "{len:#x} bytes at {offset:#x} of a file are not from 1 to {MAX_LEN:#x} bytes from a page on"
            ));
        }
        if end.is_none_or(|end| end > file_len) {
            return fault(format!(
                "{len:#x} bytes at {offset:#x} of a file of {file_len:#x} bytes: the peer's VMM maps whole pages, which \
                 the file has to have; with memory in multiples of 128 MiB it has"
            ));
        }
        Ok(Self { file, offset, len })
    }

    /// The file.
    pub fn file(&self) -> &MemoryFile {
        &self.file
    }

    /// Where it starts in the file, bytes; a multiple of the page size.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Refuses a log that has no bit for some page of the owner's memory.
    ///
    /// # Errors
    /// Which length it should have.
    pub fn check_covers(&self, memory: &MemoryTable<MemoryFile>) -> Result<(), Fault> {
        let needed = needed(memory);
        if self.len < needed {
            return Err(Fault::Log(format!(
                "it has {} bytes, and the owner's memory, a bit for each page up to its highest guest-physical \
                 address, needs {needed}",
                self.len
            )));
        }
        Ok(())
    }
}

/// Bytes of a log for this memory.
fn needed(memory: &MemoryTable<MemoryFile>) -> u64 {
    let last = memory.regions().iter().map(|region| region.guest().last().raw()).max();
    last.map_or(0, |last| last / PAGE_SIZE / PAGES_PER_BYTE + 1)
}

/// A log, and where the window has it.
#[derive(Clone, Debug, PartialEq)]
pub struct PlacedLog {
    /// The log.
    pub log: DirtyLog,
    /// Its place.
    pub window: Span<WindowOffset>,
}

impl PlacedLog {
    /// In a window of `window_len` bytes; `None`: it is too long for that.
    pub fn new(log: DirtyLog, window_len: u64) -> Option<Self> {
        // It was found to be shorter than that, by far.
        let len = log.len.next_multiple_of(PAGE_SIZE);
        let start = match is_low(&log) {
            true => abi::LOG_OFFSET,
            false => window_len.checked_sub(high_len(&log)).filter(|start| *start > abi::DATA_OFFSET)?,
        };
        let window = Span::new(WindowOffset::new(start), len).ok()?;
        Some(Self { log, window })
    }
}

fn is_low(log: &DirtyLog) -> bool {
    log.len <= abi::MAX_LOW_LOG
}

/// Bytes at the end of the window that a log takes away from the owner's memory.
pub fn high_len(log: &DirtyLog) -> u64 {
    match is_low(log) {
        true => 0,
        false => log.len.next_multiple_of(iommu::LARGE_PAGE_SIZE),
    }
}

/// A number of pages of the owner's, one behind the other, as the log numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    /// The first.
    pub first: u64,
    /// How many.
    pub count: u64,
}

impl Pages {
    /// Those that have a byte of this range.
    pub fn of(start: Gpa, len: u64) -> Self {
        let first = start.raw() / PAGE_SIZE;
        let end = start.raw().saturating_add(len).div_ceil(PAGE_SIZE);
        Self { first, count: end - first }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs::File;
    use std::os::fd::OwnedFd;

    use iommu::{FrontendVa, NewRegion};

    use super::*;

    fn file() -> MemoryFile {
        MemoryFile::new(OwnedFd::from(File::open("/dev/null").unwrap()), 0, 0)
    }

    #[test]
    fn a_log_that_cannot_be_mapped_or_can_be_shortened_is_refused() {
        assert!(DirtyLog::new(file(), 8192, 4096, 4096).is_ok());
        assert!(DirtyLog::new(file(), 8192, 4096, 1).is_ok());
        for (file_len, offset, len) in [
            (8192, 4096, 4097),
            (8191, 4096, 4095),
            (8192, 0, 0),
            (8192, 8, 64),
            (u64::MAX, u64::MAX - 4095, 4096),
            (u64::MAX, 0, MAX_LEN + 1),
            (u64::MAX, 0, u64::MAX),
        ] {
            assert!(DirtyLog::new(file(), file_len, offset, len).is_err(), "{file_len} {offset} {len}");
        }
        assert!(
            DirtyLog::new(file().with_no_seal(), 8192, 0, 64)
                .unwrap_err()
                .to_string()
                .contains("SEAL_SHRINK")
        );
    }

    #[test]
    fn a_log_in_huge_pages_is_refused() {
        let huge = file().with_page_size(2 << 20);
        let error = DirtyLog::new(huge, 2 << 20, 0, 4096).unwrap_err().to_string();
        assert!(error.contains("0x200000") && error.contains("hugetlbfs"), "{error}");
    }

    #[test]
    fn a_log_needs_a_bit_for_the_highest_page_and_says_how_many_bytes_that_are() {
        let region = |guest: u64, len| NewRegion {
            guest: Gpa::new(guest),
            frontend: FrontendVa::new(guest),
            len,
            handle: file(),
            offset: 0,
            file_len: len,
        };
        let memory = MemoryTable::new(4).replace(vec![region(1 << 32, 1 << 20), region(0, 1 << 20)]).unwrap();
        let log = |len| DirtyLog::new(file(), 1 << 30, 0, len).unwrap().check_covers(&memory);
        let least = ((1 << 32) + (1 << 20)) / 4096 / 8;
        assert!(log(least).is_ok());
        let error = log(least - 1).unwrap_err().to_string();
        assert!(error.contains(&least.to_string()) && error.contains(&(least - 1).to_string()), "{error}");
        assert!(DirtyLog::new(file(), 4096, 0, 1).unwrap().check_covers(&MemoryTable::new(1)).is_ok());
    }

    #[test]
    fn a_log_is_below_the_owners_memory_or_at_the_end_of_the_window() {
        let placed = |len, window| PlacedLog::new(DirtyLog::new(file(), 1 << 40, 0, len).unwrap(), window);
        let low = placed(abi::MAX_LOW_LOG, 4 << 20).unwrap().window;
        assert_eq!((low.start().raw(), low.last().raw() + 1), (abi::LOG_OFFSET, abi::DATA_OFFSET));
        let high = placed(abi::MAX_LOW_LOG + 1, 64 << 20).unwrap().window;
        assert_eq!((high.start().raw(), high.len()), (62 << 20, abi::MAX_LOW_LOG + 4096));
        assert_eq!(placed(abi::MAX_LOW_LOG + 1, 4 << 20), None);
    }

    #[test]
    fn pages_are_those_that_a_range_touches() {
        assert_eq!(Pages::of(Gpa::new(4095), 2), Pages { first: 0, count: 2 });
        assert_eq!(Pages::of(Gpa::new(4096), 4096), Pages { first: 1, count: 1 });
    }
}
