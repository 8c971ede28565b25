//! IOVA to window: where a buffer that the owner's driver names lies in the window.
//!
//! Owns: the mappings of one link generation, with the last one that was hit. Never
//! touches the window itself.
//!
//! A buffer lies inside one mapping or it is refused. It never runs from one into
//! the next, even where both touch: what continues in IOVA space may continue
//! elsewhere, or nowhere, in the window (CVE-2018-1059).

use std::ops::BitOr;
use std::sync::Arc;

use vhost_pci_device::abi::{ACCESS_READ, ACCESS_WRITE, FaultKind};

use crate::link::LinkSnapshot;

/// What may be done to a mapping, or is about to be done to a buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Access(u8);

impl Access {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Loads.
    pub const READ: Self = Self(ACCESS_READ as u8);
    /// Stores.
    pub const WRITE: Self = Self(ACCESS_WRITE as u8);
    /// Loads and stores.
    pub const READ_WRITE: Self = Self(Self::READ.0 | Self::WRITE.0);

    /// From the `ACCESS_*` bits of the link page; unknown bits allow nothing.
    pub const fn from_bits(bits: u32) -> Self {
        Self((bits & (ACCESS_READ | ACCESS_WRITE)) as u8)
    }

    /// The `ACCESS_*` bits of the link page.
    pub const fn bits(self) -> u32 {
        self.0 as u32
    }

    /// Whether everything in `wanted` is allowed.
    #[inline]
    pub const fn allows(self, wanted: Self) -> bool {
        self.0 & wanted.0 == wanted.0
    }
}

impl BitOr for Access {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// A range of the owner's memory with its place in the window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    /// First address, as the owner's driver names it.
    pub iova: u64,
    /// Length, bytes.
    pub len: u64,
    /// Where `iova` is in the window.
    pub window_offset: u64,
    /// What the peer may do to it.
    pub access: Access,
}

impl Mapping {
    /// Where the buffer is in the window; `None` if it does not start in here.
    /// Precondition of a sensible result: `len` is not 0.
    #[inline]
    fn place(&self, iova: u64, len: u32, access: Access) -> Option<Result<u64, FaultKind>> {
        let into = iova.wrapping_sub(self.iova);
        if into >= self.len {
            return None;
        }
        Some(if u64::from(len) > self.len - into {
            Err(FaultKind::Unmapped)
        } else if !self.access.allows(access) {
            Err(FaultKind::Access)
        } else {
            Ok(self.window_offset.wrapping_add(into))
        })
    }
}

/// Translates the buffers of one vring. Clones share the table and have a last-hit
/// range of their own.
#[derive(Clone, Debug)]
pub struct Translation {
    ranges: Arc<[Mapping]>,
    last: Mapping,
}

impl Translation {
    /// From mappings sorted by `iova` that do not overlap.
    pub fn new(mappings: &[Mapping]) -> Self {
        debug_assert!(mappings.is_sorted_by_key(|mapping| mapping.iova));
        Self { ranges: mappings.into(), last: mappings.first().copied().unwrap_or_default() }
    }

    /// Where the `len` bytes at `iova` are in the window, bytes from its start.
    ///
    /// Errors: [`FaultKind::Length`] of an empty buffer, [`FaultKind::Unmapped`] if a
    /// part of it is not in the mapping in which it starts, [`FaultKind::Access`] if
    /// that mapping does not allow `access`.
    #[inline]
    pub fn translate(&mut self, iova: u64, len: u32, access: Access) -> Result<u64, FaultKind> {
        if len == 0 {
            return Err(FaultKind::Length);
        }
        if let Some(found) = self.last.place(iova, len, access) {
            return found;
        }
        self.search(iova, len, access)
    }

    #[cold]
    #[inline(never)]
    fn search(&mut self, iova: u64, len: u32, access: Access) -> Result<u64, FaultKind> {
        let after = self.ranges.partition_point(|mapping| mapping.iova <= iova);
        let mapping = after.checked_sub(1).and_then(|at| self.ranges.get(at)).ok_or(FaultKind::Unmapped)?;
        let found = mapping.place(iova, len, access).ok_or(FaultKind::Unmapped)?;
        self.last = *mapping;
        found
    }
}

impl From<&LinkSnapshot> for Translation {
    fn from(snapshot: &LinkSnapshot) -> Self {
        Self::new(&snapshot.mappings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn two_that_touch() -> Translation {
        let first = Mapping { iova: PAGE, len: PAGE, window_offset: 16 * PAGE, access: Access::READ };
        let second =
            Mapping { iova: 2 * PAGE, len: PAGE, window_offset: 17 * PAGE, access: Access::READ_WRITE };
        Translation::new(&[first, second])
    }

    #[test]
    fn a_buffer_is_found_in_its_mapping_in_any_order() {
        let mut table = two_that_touch();
        for _ in 0..3 {
            assert_eq!(table.translate(2 * PAGE + 1, 10, Access::WRITE), Ok(17 * PAGE + 1));
            assert_eq!(table.translate(PAGE, 4096, Access::READ), Ok(16 * PAGE));
        }
    }

    #[test]
    fn a_buffer_that_runs_into_the_next_mapping_is_refused() {
        let mut table = two_that_touch();
        assert_eq!(table.translate(2 * PAGE - 1, 2, Access::READ), Err(FaultKind::Unmapped));
        assert_eq!(table.translate(3 * PAGE - 1, 2, Access::READ), Err(FaultKind::Unmapped));
        assert_eq!(table.translate(PAGE - 1, 2, Access::READ), Err(FaultKind::Unmapped));
    }

    #[test]
    fn the_ends_of_the_address_space_do_not_wrap() {
        let mut table = two_that_touch();
        assert_eq!(table.translate(u64::MAX, 2, Access::READ), Err(FaultKind::Unmapped));
        assert_eq!(table.translate(0, u32::MAX, Access::READ), Err(FaultKind::Unmapped));
        let top = Mapping { iova: u64::MAX - PAGE + 1, len: PAGE, window_offset: 0, access: Access::READ };
        let mut table = Translation::new(&[top]);
        assert_eq!(table.translate(u64::MAX, 1, Access::READ), Ok(PAGE - 1));
        assert_eq!(table.translate(u64::MAX, 2, Access::READ), Err(FaultKind::Unmapped));
    }

    #[test]
    fn access_and_length_are_checked() {
        let mut table = two_that_touch();
        assert_eq!(table.translate(PAGE, 8, Access::WRITE), Err(FaultKind::Access));
        assert_eq!(table.translate(PAGE, 8, Access::READ_WRITE), Err(FaultKind::Access));
        assert_eq!(table.translate(PAGE, 0, Access::READ), Err(FaultKind::Length));
        assert_eq!(Translation::new(&[]).translate(0, 1, Access::READ), Err(FaultKind::Unmapped));
    }
}
