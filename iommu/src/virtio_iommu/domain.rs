//! An address space of the IOMMU: the mappings that single MAP requests made. This
//! file owns overlap, the refusal to split, and the walk over several mappings; it
//! knows no endpoints and no requests.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use super::wire::{Status, VIRTIO_IOMMU_MAP_F_MMIO, VIRTIO_IOMMU_MAP_F_READ, VIRTIO_IOMMU_MAP_F_WRITE};
use crate::address::{Gpa, Iova, Span};
use crate::map::Access;

/// What one MAP request made (virtio 1.3, 5.13.6.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The addresses as endpoints name them.
    pub iova: Span<Iova>,
    /// The guest-physical address that the first one leads to.
    pub gpa: Gpa,
    /// `VIRTIO_IOMMU_MAP_F_*`.
    pub flags: u32,
}

impl Mapping {
    /// What endpoints may do with the memory. `None` if nothing: the mapping allows
    /// neither, or leads to a device's registers, which are no memory.
    pub fn access(&self) -> Option<Access> {
        if self.flags & VIRTIO_IOMMU_MAP_F_MMIO != 0 {
            return None;
        }
        // The flags have the bits of an access.
        Access::from_bits(self.flags & (VIRTIO_IOMMU_MAP_F_READ | VIRTIO_IOMMU_MAP_F_WRITE))
    }

    fn allows(&self, wanted: Access) -> bool {
        self.access().is_some_and(|access| access.allows(wanted))
    }
}

/// A piece of guest-physical memory that an access reaches: wholly in one mapping.
pub type Reached = Span<Gpa>;

/// A domain (virtio 1.3, 5.13.6.3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Domain {
    /// Its endpoints reach all memory untranslated.
    Bypass,
    /// Its endpoints reach what is mapped; by first address, none overlap.
    Translated(BTreeMap<Iova, Mapping>),
}

impl Domain {
    pub(super) fn new(bypass: bool) -> Self {
        if bypass { Self::Bypass } else { Self::Translated(BTreeMap::new()) }
    }

    pub(super) fn is_bypass(&self) -> bool {
        matches!(self, Self::Bypass)
    }

    /// All mappings, by rising address; none of a bypass domain.
    pub(super) fn mappings(&self) -> impl Iterator<Item = &Mapping> {
        let mappings = match self {
            Self::Bypass => None,
            Self::Translated(mappings) => Some(mappings.values()),
        };
        mappings.into_iter().flatten()
    }

    /// How many mappings there are.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Bypass => 0,
            Self::Translated(mappings) => mappings.len(),
        }
    }

    /// Whether a mapping has an address in the range.
    pub(super) fn touches(&self, range: &RangeInclusive<u64>) -> bool {
        match self {
            Self::Bypass => false,
            Self::Translated(mappings) => overlapping(mappings, range).next().is_some(),
        }
    }

    /// Adds a mapping. Refuses one that overlaps another, even to the same place.
    pub(super) fn map(&mut self, mapping: Mapping) -> Result<(), Status> {
        let Self::Translated(mappings) = self else { return Err(Status::Inval) };
        let (start, last) = (mapping.iova.start(), mapping.iova.last());
        if overlapping(mappings, &(start.raw()..=last.raw())).next().is_some() {
            return Err(Status::Inval);
        }
        mappings.insert(start, mapping);
        Ok(())
    }

    /// Removes all mappings in the range and returns them, by rising address; none is
    /// no error. Refuses, without a change, if one would be split.
    pub(super) fn unmap(&mut self, range: &RangeInclusive<u64>) -> Result<Vec<Mapping>, Status> {
        let Self::Translated(mappings) = self else { return Err(Status::Inval) };
        let inside = |mapping: &Mapping| {
            range.contains(&mapping.iova.start().raw()) && range.contains(&mapping.iova.last().raw())
        };
        if !overlapping(mappings, range).all(inside) {
            return Err(Status::Range);
        }
        let starts: Vec<Iova> = overlapping(mappings, range).map(|mapping| mapping.iova.start()).collect();
        Ok(starts.iter().filter_map(|start| mappings.remove(start)).collect())
    }

    /// Where an access leads: a piece for each mapping that it goes through, each of
    /// which allows it. The error is the first address that is not reached.
    pub(super) fn translate(&self, span: Span<Iova>, wanted: Access) -> Result<Vec<Reached>, Iova> {
        if self.is_bypass() {
            return Ok(vec![span.identity()]);
        }
        let mut pieces = Vec::new();
        let mut at = span.start();
        loop {
            let mapping = self.mapping_at(at).filter(|mapping| mapping.allows(wanted)).ok_or(at)?;
            let offset = mapping.iova.offset_of(at).ok_or(at)?;
            let last = mapping.iova.last().min(span.last());
            // A mapping's end does not wrap in guest-physical space: the device checks.
            let gpa = Gpa::new(mapping.gpa.raw().wrapping_add(offset));
            pieces.push(Span::new(gpa, last.raw() - at.raw() + 1).map_err(|_| at)?);
            match last.raw().checked_add(1) {
                Some(next) if last < span.last() => at = Iova::new(next),
                _ => return Ok(pieces),
            }
        }
    }

    /// The mapping that has the address in it.
    pub(super) fn mapping_at(&self, iova: Iova) -> Option<&Mapping> {
        let Self::Translated(mappings) = self else { return None };
        let (_, mapping) = mappings.range(..=iova).next_back()?;
        mapping.iova.contains(iova).then_some(mapping)
    }
}

/// The mappings that have an address in the range, by rising address.
fn overlapping<'a>(
    mappings: &'a BTreeMap<Iova, Mapping>,
    range: &RangeInclusive<u64>,
) -> impl Iterator<Item = &'a Mapping> {
    let (start, end) = (Iova::new(*range.start()), Iova::new(*range.end()));
    // Only the last one that starts before the range can reach into it.
    let before = mappings.range(..start).next_back().filter(|(_, mapping)| mapping.iova.last() >= start);
    let after = mappings.range(start..).take_while(move |(first, _)| **first <= end);
    before.into_iter().chain(after).map(|(_, mapping)| mapping)
}
