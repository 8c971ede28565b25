//! What the owner's IOMMU lets its device reach: a sorted map of IOVA ranges to
//! pieces of files. This file owns overlap, access and the refusal to split; it
//! never knows where in the window a range appears.

use std::collections::BTreeMap;
use std::fmt;

use thiserror::Error;

use crate::address::{Iova, LookupError, PAGE_SIZE, Span, offset_in};
use crate::memory::{Backing, MemoryTable};

/// What the owner allows the peer to do with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Load only.
    Read,
    /// Store only.
    Write,
    /// Load and store.
    ReadWrite,
}

impl Access {
    /// The access with these bits: 1 to read, 2 to write, as in vhost-user's IOTLB
    /// `perm` field and in the link page. `None` for no access and unknown bits.
    pub const fn from_bits(bits: u32) -> Option<Self> {
        match bits {
            1 => Some(Self::Read),
            2 => Some(Self::Write),
            3 => Some(Self::ReadWrite),
            _ => None,
        }
    }

    /// The bits that [`Self::from_bits`] takes.
    pub const fn bits(self) -> u32 {
        match self {
            Self::Read => 1,
            Self::Write => 2,
            Self::ReadWrite => 3,
        }
    }

    /// Whether all of `wanted` may be done.
    pub const fn allows(self, wanted: Self) -> bool {
        self.bits() & wanted.bits() == wanted.bits()
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::ReadWrite => "read-write",
        })
    }
}

/// A range of IOVAs with the piece of a file behind it, page-aligned in both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappedRange<R> {
    iova: Span<Iova>,
    access: Access,
    backing: Backing<R>,
}

impl<R> MappedRange<R> {
    /// Joins a range to the piece of a file that starts at `backing`. Refuses
    /// numbers that are not page-aligned and a piece whose end in the file wraps.
    pub fn new(iova: Span<Iova>, access: Access, backing: Backing<R>) -> Result<Self, MapError> {
        let offset = backing.offset;
        if !iova.is_aligned(PAGE_SIZE) || !offset.is_multiple_of(PAGE_SIZE) {
            return Err(MapError::Unaligned { iova, offset });
        }
        if offset.checked_add(iova.len()).is_none() {
            return Err(MapError::FileWraps { iova, offset });
        }
        Ok(Self { iova, access, backing })
    }

    /// The range, as the owner's driver names it.
    pub fn iova(&self) -> Span<Iova> {
        self.iova
    }

    /// What the peer may do with it.
    pub fn access(&self) -> Access {
        self.access
    }

    /// The file and the offset of the range's first byte.
    pub fn backing(&self) -> &Backing<R> {
        &self.backing
    }
}

/// A part of an access: wholly inside one mapped range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece<R> {
    /// Where its first byte is.
    pub backing: Backing<R>,
    /// Length, bytes; never 0.
    pub len: u64,
}

/// What is wrong with a change to the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MapError {
    /// A start, length or file offset is not a multiple of [`PAGE_SIZE`].
    #[error("IOVA range {iova} at file offset {offset:#x} is not page-aligned")]
    Unaligned {
        /// The range.
        iova: Span<Iova>,
        /// Its offset in the file, bytes.
        offset: u64,
    },
    /// The end of the range in its file is past what a file can have.
    #[error("IOVA range {iova} wraps in its file at offset {offset:#x}")]
    FileWraps {
        /// The range.
        iova: Span<Iova>,
        /// Its offset in the file, bytes.
        offset: u64,
    },
    /// Some of the range is mapped already.
    #[error("IOVA range {iova} overlaps {present}, which is mapped")]
    Overlap {
        /// The range to map.
        iova: Span<Iova>,
        /// The first mapped range that it overlaps.
        present: Span<Iova>,
    },
    /// The removal would leave a part of a mapped range behind.
    #[error("removing {iova} would split the mapped range {present}")]
    Split {
        /// What was to be removed.
        iova: Span<Iova>,
        /// The mapped range that is only partly in it.
        present: Span<Iova>,
    },
}

/// Why the device's view of an address does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum TranslateError {
    /// The range is not wholly inside one mapped range.
    #[error(transparent)]
    Lookup(#[from] LookupError<Iova>),
    /// The range is mapped, but not for this access.
    #[error("{wanted} access to {span}, which allows {allowed}")]
    Access {
        /// The range asked for.
        span: Span<Iova>,
        /// The access asked for.
        wanted: Access,
        /// The access that its mapping allows.
        allowed: Access,
    },
}

/// Mapped ranges that do not overlap, sorted by IOVA.
///
/// Ranges stay as they were inserted, so that each can be removed again alone;
/// [`Self::merged`] gives the same map in fewer ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IovaMap<R> {
    ranges: BTreeMap<Iova, MappedRange<R>>,
}

impl<R> Default for IovaMap<R> {
    fn default() -> Self {
        Self { ranges: BTreeMap::new() }
    }
}

impl<R: Clone + PartialEq> IovaMap<R> {
    /// The empty map: an IOMMU that lets nothing through.
    pub fn new() -> Self {
        Self::default()
    }

    /// The map of an owner without a virtual IOMMU: each region of its memory, at
    /// IOVA = GPA, to read and write.
    pub fn identity(memory: &MemoryTable<R>) -> Self {
        // A memory table's regions are aligned, in their file, and do not overlap.
        let ranges = memory.regions().iter().map(|region| {
            let range = MappedRange {
                iova: region.guest().identity(),
                access: Access::ReadWrite,
                backing: region.backing().clone(),
            };
            (range.iova.start(), range)
        });
        Self { ranges: ranges.collect() }
    }

    /// Maps a range. Refuses, without a change, if any of it is mapped already,
    /// be it to the same place.
    pub fn insert(&mut self, range: MappedRange<R>) -> Result<(), MapError> {
        if let Some(present) = self.overlapping(range.iova).next() {
            return Err(MapError::Overlap { iova: range.iova, present: present.iova });
        }
        self.ranges.insert(range.iova.start(), range);
        Ok(())
    }

    /// Unmaps every range inside `span` and returns them by rising IOVA; none is
    /// no error. Refuses, without a change, if a range is only partly in `span`.
    pub fn remove(&mut self, span: Span<Iova>) -> Result<Vec<MappedRange<R>>, MapError> {
        let split = self.overlapping(span).find(|range| !span.contains_span(range.iova));
        if let Some(present) = split {
            return Err(MapError::Split { iova: span, present: present.iova });
        }
        Ok(self.remove_overlapping(span))
    }

    /// Unmaps every range that has a byte in `span`, wholly, and returns them by
    /// rising IOVA: how a cache obeys an invalidation. What it loses too much, a
    /// miss brings back.
    pub fn remove_overlapping(&mut self, span: Span<Iova>) -> Vec<MappedRange<R>> {
        let starts: Vec<Iova> = self.overlapping(span).map(|r| r.iova.start()).collect();
        let removed = starts.iter().filter_map(|start| self.ranges.remove(start));
        removed.collect()
    }

    /// Unmaps every range whose piece of a file is no longer inside one region of
    /// `memory`, and returns them by rising IOVA. To be called when the owner's
    /// memory has changed under its IOMMU's map.
    pub fn remove_unbacked(&mut self, memory: &MemoryTable<R>) -> Vec<MappedRange<R>> {
        self.ranges
            .extract_if(.., |_, range| !memory.backs(&range.backing, range.iova.len()))
            .map(|(_, range)| range)
            .collect()
    }

    /// Where the device finds the `len` bytes from `iova` on, for this access.
    /// Refuses a range that is not wholly inside one mapped range, even if
    /// another follows, and an access that the mapping does not allow.
    pub fn translate(&self, iova: Iova, len: u64, wanted: Access) -> Result<Backing<R>, TranslateError> {
        let span = Span::new(iova, len).map_err(LookupError::from)?;
        let range = self.range_at(iova).ok_or(LookupError::Unknown { span })?;
        let offset = offset_in(range.iova, span)?;
        if !range.access.allows(wanted) {
            return Err(TranslateError::Access { span, wanted, allowed: range.access });
        }
        Ok(Backing { handle: range.backing.handle.clone(), offset: range.backing.offset + offset })
    }

    /// Where the device finds the `len` bytes from `iova` on, for this access, as
    /// pieces in the order of the bytes: one for each mapped range that they go
    /// through, each of which is looked up and allows the access by itself. Refuses
    /// the whole access if a byte is not mapped or not allowed; the error then names
    /// what was left of the access there.
    pub fn pieces(&self, iova: Iova, len: u64, wanted: Access) -> Result<Vec<Piece<R>>, TranslateError> {
        let mut span = Span::new(iova, len).map_err(LookupError::from)?;
        let mut pieces = Vec::new();
        loop {
            let range = self.range_at(span.start()).ok_or(LookupError::Unknown { span })?;
            let part = range.iova.intersection(span).ok_or(LookupError::Unknown { span })?;
            let offset = offset_in(range.iova, part)?;
            if !range.access.allows(wanted) {
                return Err(TranslateError::Access { span: part, wanted, allowed: range.access });
            }
            let handle = range.backing.handle.clone();
            let backing = Backing { handle, offset: range.backing.offset + offset };
            pieces.push(Piece { backing, len: part.len() });
            let Some(rest) = span.at(part.len()) else { return Ok(pieces) };
            span = Span::new(rest, span.len() - part.len()).map_err(LookupError::from)?;
        }
    }

    /// The mapped range that has `iova` in it.
    pub fn range_at(&self, iova: Iova) -> Option<&MappedRange<R>> {
        let (_, range) = self.ranges.range(..=iova).next_back()?;
        range.iova.contains(iova).then_some(range)
    }

    /// The mapped ranges that have a byte in `span`, by rising IOVA.
    pub fn overlapping(&self, span: Span<Iova>) -> impl Iterator<Item = &MappedRange<R>> {
        // Only the last range that starts before the span can reach into it.
        let first = match self.range_at(span.start()) {
            Some(range) => range.iova.start(),
            None => span.start(),
        };
        self.ranges.range(first..=span.last()).map(|(_, range)| range)
    }

    /// All mapped ranges, by rising IOVA.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &MappedRange<R>> {
        self.ranges.values()
    }

    /// How many ranges are mapped.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The same map with neighbours joined: ranges of equal access that follow
    /// each other both in IOVA and in the same file become one.
    pub fn merged(&self) -> Self {
        let mut merged: Vec<MappedRange<R>> = Vec::with_capacity(self.len());
        for range in self.iter() {
            if let Some(joined) = merged.last().and_then(|before| join(before, range)) {
                merged.pop();
                merged.push(joined);
            } else {
                merged.push(range.clone());
            }
        }
        let ranges = merged.into_iter().map(|range| (range.iova.start(), range));
        Self { ranges: ranges.collect() }
    }
}

/// `low` and `high` as one range, if they are one but for where they were cut.
fn join<R: Clone + PartialEq>(low: &MappedRange<R>, high: &MappedRange<R>) -> Option<MappedRange<R>> {
    let touch = low.iova.last().raw().checked_add(1) == Some(high.iova.start().raw());
    let follow = low.backing.offset + low.iova.len() == high.backing.offset;
    let same = low.backing.handle == high.backing.handle && low.access == high.access;
    if !(touch && follow && same) {
        return None;
    }
    let iova = Span::new(low.iova.start(), low.iova.len().checked_add(high.iova.len())?).ok()?;
    Some(MappedRange { iova, access: low.access, backing: low.backing.clone() })
}
