//! The guest's IOMMU as a list of ranges. Written to be obviously right, not fast.

use std::collections::BTreeMap;

use crate::front_end::Region;

pub const PAGE: u64 = 4096;
/// What a front-end may push.
const MAX_PUSHED: usize = 131_072;

/// IOVA to length, guest-physical address and permission.
#[derive(Clone, Debug, Default)]
pub struct PageTable {
    ranges: BTreeMap<u64, (u64, u64, u8)>,
    /// Whether the last push was one to be carried out.
    pub accepted: bool,
}

impl PageTable {
    pub fn map(&mut self, iova: u64, len: u64, guest: u64, perm: u8) {
        assert!(!self.touches(iova, len), "{iova:#x} is mapped already");
        self.ranges.insert(iova, (len, guest, perm));
    }

    /// Removes what is inside.
    pub fn unmap(&mut self, iova: u64, len: u64) {
        self.ranges.retain(|start, (range, ..)| !(*start >= iova && start + *range <= iova + len));
    }

    pub fn touches(&self, iova: u64, len: u64) -> bool {
        self.ranges.range(..iova + len).next_back().is_some_and(|(start, (range, ..))| start + range > iova)
    }

    /// The mapping at an address: IOVA, length, guest-physical address, permission.
    pub fn at(&self, iova: u64) -> Option<(u64, u64, u64, u8)> {
        let (start, (len, guest, perm)) = self.ranges.range(..=iova).next_back()?;
        (iova < start + len).then_some((*start, *len, *guest, *perm))
    }

    /// The file and the place in it that a device reaches by this address and access.
    pub fn place(&self, iova: u64, bits: u8, regions: &[Region]) -> Option<(usize, u64)> {
        let (start, _, guest, perm) = self.at(iova)?;
        if perm & bits != bits {
            return None;
        }
        let guest = guest + (iova - start);
        let region =
            regions.iter().find(|region| (region.guest..region.guest + region.len).contains(&guest))?;
        Some((region.file, region.offset + (guest - region.guest)))
    }

    /// A push: all or nothing.
    pub fn push(&mut self, reset: bool, entries: &[(u64, u64, u64, u8)], regions: &[Region]) {
        let mut next = self.clone();
        if reset {
            next.ranges.clear();
        }
        self.accepted = entries.iter().all(|entry| next.change(*entry, regions));
        if self.accepted {
            *self = Self { accepted: true, ..next };
        }
    }

    fn change(&mut self, (iova, len, guest, perm): (u64, u64, u64, u8), regions: &[Region]) -> bool {
        if len == 0 || iova.checked_add(len - 1).is_none() {
            return false;
        }
        if perm == 0 {
            let last = iova + (len - 1);
            let cut = self.ranges.iter().any(|(start, (range, ..))| {
                let end = start + range - 1;
                *start <= last && end >= iova && !(*start >= iova && end <= last)
            });
            if !cut {
                self.ranges.retain(|start, _| !(iova..=last).contains(start));
            }
            return !cut;
        }
        let inside = |region: &Region| {
            guest >= region.guest && len <= region.len && guest - region.guest <= region.len - len
        };
        let fits = perm <= 3
            && (iova | len | guest).is_multiple_of(PAGE)
            && regions.iter().any(inside)
            && !self.touches(iova, len)
            && self.ranges.len() < MAX_PUSHED;
        if fits {
            self.ranges.insert(iova, (len, guest, perm));
        }
        fits
    }

    /// The memory table changed.
    pub fn keep_backed(&mut self, regions: &[Region]) {
        self.ranges.retain(|_, (len, guest, _)| {
            regions.iter().any(|region| {
                (region.guest..region.guest + region.len).contains(guest)
                    && *len <= region.guest + region.len - *guest
            })
        });
    }
}
