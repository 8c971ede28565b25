//! What the device half of a ring cannot reach by its mapping table, and what was found
//! out about it meanwhile (`docs/vhost-pci-device.md`, 7.3 and 9.4).
//!
//! Owns: two short lists. Asks nobody: whoever has the control ring takes the misses to
//! the device and brings the findings.

use vhost_pci_device::abi::{MAX_MAP, PAGE_SIZE};

use crate::translate::Access;

/// What a ring does about a buffer that is not in the mapping table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnMiss {
    /// All that the owner may name is in the table: the vring is at fault.
    #[default]
    Fault,
    /// The device has to be asked for a mapping.
    Map,
    /// The device has to fetch it, or to store there.
    Copy,
}

/// What the device is to be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// A mapping with this access.
    Map(Access),
    /// The bytes: they are an indirect table of the chain at this index.
    Table(u16),
}

/// A range that is needed before a ring can go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss {
    /// First address.
    pub iova: u64,
    /// Length, bytes: whole pages and at most `MAX_MAP` for a mapping, at most `MAX_COPY`
    /// for a table.
    pub len: u64,
    /// What for.
    pub want: Want,
}

/// What the device said about a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// It is not to be mapped: the device fetches it, or stores there.
    Copy,
    /// The owner does not allow it.
    Denied,
    /// The indirect table that is there has been put here, bytes from the start of the
    /// window.
    Fetched(u64),
}

/// The most misses that a ring notes at once: as many commands as the control ring takes.
pub const MAX_MISSES: usize = 32;
/// The most findings that a ring keeps at once.
const MAX_FINDINGS: usize = 8 * MAX_MISSES;

/// The misses of one burst, and the findings of the tries before.
#[derive(Clone, Debug, Default)]
pub(super) struct Misses {
    noted: Vec<Miss>,
    findings: Vec<(Miss, Finding)>,
}

impl Misses {
    pub(super) fn noted(&self) -> &[Miss] {
        &self.noted
    }

    #[inline]
    pub(super) fn clear(&mut self) {
        self.noted.clear();
    }

    pub(super) fn is_full(&self) -> bool {
        self.noted.len() >= MAX_MISSES
    }

    /// Notes whole pages around the bytes, as much of them as one command may ask for,
    /// unless all of it was noted already. `len` is not 0, and the bytes do not wrap.
    pub(super) fn note_map(&mut self, iova: u64, len: u32, access: Access) {
        let start = iova - iova % PAGE_SIZE;
        let end = iova.saturating_add(u64::from(len) - 1) / PAGE_SIZE * PAGE_SIZE + (PAGE_SIZE - 1);
        let len = (end - start).saturating_add(1).min(MAX_MAP);
        let miss = Miss { iova: start, len, want: Want::Map(access) };
        if !self.is_full() && !self.noted.iter().any(|other| other.holds(&miss)) {
            self.noted.push(miss);
        }
    }

    /// Notes an indirect table of the chain at an index.
    pub(super) fn note_table(&mut self, at: u16, iova: u64, len: u32) {
        if !self.is_full() {
            self.noted.push(Miss { iova, len: len.into(), want: Want::Table(at) });
        }
    }

    /// Keeps what was found out.
    pub(super) fn found(&mut self, miss: Miss, finding: Finding) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push((miss, finding));
        }
    }

    /// Forgets what was found out.
    pub(super) fn forget(&mut self) {
        self.findings.clear();
    }

    /// What was found out about the page of an address.
    pub(super) fn finding_of_page(&self, iova: u64, access: Access) -> Option<Finding> {
        let page = Miss { iova: iova - iova % PAGE_SIZE, len: PAGE_SIZE, want: Want::Map(access) };
        self.findings.iter().find(|(miss, _)| miss.holds(&page)).map(|(_, finding)| *finding)
    }

    /// What was found out about an indirect table.
    pub(super) fn finding_of_table(&self, at: u16, iova: u64, len: u32) -> Option<Finding> {
        let table = Miss { iova, len: len.into(), want: Want::Table(at) };
        self.findings.iter().find(|(miss, _)| *miss == table).map(|(_, finding)| *finding)
    }
}

impl Miss {
    /// Whether the other is for the same and inside this one.
    fn holds(&self, other: &Self) -> bool {
        self.want == other.want
            && other
                .iova
                .checked_sub(self.iova)
                .is_some_and(|into| into.checked_add(other.len).is_some_and(|end| end <= self.len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Access = Access::READ;

    #[test]
    fn ranges_are_noted_in_whole_pages_and_once() {
        let mut misses = Misses::default();
        misses.note_map(4096 + 100, 10, READ);
        misses.note_map(4096 + 200, 3000, READ);
        misses.note_map(4096 + 4000, 97, READ);
        misses.note_map(4096, 10, Access::WRITE);
        misses.note_map(u64::MAX, 1, READ);
        misses.note_map(0, u32::MAX, READ);
        let noted: Vec<_> = misses.noted().iter().map(|miss| (miss.iova, miss.len)).collect();
        let last = u64::MAX - 4095;
        assert_eq!(noted, [(4096, 4096), (4096, 8192), (4096, 4096), (last, 4096), (0, MAX_MAP)]);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut misses = Misses::default();
        for page in 0..10_000 {
            misses.note_map(page << 20, 1, READ);
            misses.note_table(0, page << 20, 16);
            misses.found(Miss { iova: page << 20, len: 16, want: Want::Table(0) }, Finding::Copy);
        }
        assert_eq!((misses.noted().len(), misses.findings.len()), (MAX_MISSES, MAX_FINDINGS));
    }

    #[test]
    fn a_finding_is_about_its_pages_its_access_and_its_chain() {
        let mut misses = Misses::default();
        misses.found(Miss { iova: 8192, len: 8192, want: Want::Map(READ) }, Finding::Copy);
        misses.found(Miss { iova: 100, len: 32, want: Want::Table(7) }, Finding::Fetched(5));
        assert_eq!(misses.finding_of_page(8192, READ), Some(Finding::Copy));
        assert_eq!(misses.finding_of_page(16383, READ), Some(Finding::Copy));
        assert_eq!(misses.finding_of_page(16384, READ), None);
        assert_eq!(misses.finding_of_page(8191, READ), None);
        assert_eq!(misses.finding_of_page(8192, Access::WRITE), None);
        assert_eq!(misses.finding_of_table(7, 100, 32), Some(Finding::Fetched(5)));
        for (at, iova, len) in [(8, 100, 32), (7, 116, 32), (7, 100, 16)] {
            assert_eq!(misses.finding_of_table(at, iova, len), None);
        }
        misses.forget();
        assert_eq!(misses.finding_of_page(8192, READ), None);
    }
}
