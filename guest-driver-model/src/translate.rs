//! IOVA to window: where a buffer that the owner's driver names lies in the window.
//!
//! Owns: the mappings of one state of the mapping table, an index over them, and the
//! last one that was hit. Never touches the window itself.
//!
//! [`Translation::translate`] finds a buffer inside one mapping, or refuses it. A buffer
//! that runs from one mapping into the next is taken apart by [`Translation::part`], which
//! looks each part up by itself: what continues in IOVA space may continue elsewhere, or
//! nowhere, in the window, and with another access (CVE-2018-1059).

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

/// What is at an IOVA, from there on up to where something else is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The first `len` bytes of the buffer are at `offset` of the window.
    Mapped {
        /// Bytes from the start of the window.
        offset: u64,
        /// Bytes; not 0.
        len: u32,
    },
    /// The first `len` bytes are not to be had.
    Missing {
        /// Bytes; not 0.
        len: u32,
        /// [`FaultKind::Unmapped`], or [`FaultKind::Access`] where a mapping does not
        /// allow it.
        why: FaultKind,
    },
}

/// Buckets for each mapping: more make a search shorter and the index larger.
const BUCKETS_PER_RANGE: usize = 2;

/// The mappings, sorted, and an index over them: the IOVAs from the first mapping's on
/// are cut into equal buckets, of which each knows the mapping that its start falls behind.
/// Where the mappings lie evenly a search is two loads; where they lie in heaps, it is a
/// binary search in one heap.
#[derive(Debug, Default)]
struct Table {
    ranges: Box<[Mapping]>,
    /// By bucket, and one more: the last mapping that starts at or before the bucket does.
    buckets: Box<[u32]>,
    first: u64,
    /// Length of a bucket, as a power of two.
    shift: u32,
}

impl Table {
    fn new(mappings: &[Mapping]) -> Self {
        debug_assert!(mappings.is_sorted_by_key(|mapping| mapping.iova));
        let (Some(first), Some(last)) = (mappings.first(), mappings.last()) else {
            return Self::default();
        };
        let span = last.iova.wrapping_sub(first.iova);
        // At most `most + 1` buckets: 2^shift is at least span / most, rounded up.
        let most = (mappings.len() * BUCKETS_PER_RANGE).next_power_of_two();
        let shift = (u64::BITS - span.leading_zeros()).saturating_sub(most.ilog2());
        let count = (span >> shift) as usize + 1;
        let mut buckets = Vec::with_capacity(count + 1);
        let mut at = 0_u32;
        for bucket in 0..count as u64 {
            // In bounds of the span, so it does not wrap.
            let start = first.iova + (bucket << shift);
            while mappings.get(at as usize + 1).is_some_and(|next| next.iova <= start) {
                at += 1;
            }
            buckets.push(at);
        }
        buckets.push(mappings.len() as u32 - 1);
        Self { ranges: mappings.into(), buckets: buckets.into(), first: first.iova, shift }
    }

    /// The last mapping that starts at or before `iova`, and its place.
    #[inline]
    fn before(&self, iova: u64) -> Option<(usize, &Mapping)> {
        let into = iova.checked_sub(self.first)?;
        let last = self.buckets.len().checked_sub(2)?;
        let bucket = usize::try_from(into >> self.shift).map_or(last, |bucket| bucket.min(last));
        let low = *self.buckets.get(bucket)? as usize;
        let high = *self.buckets.get(bucket + 1)? as usize;
        let behind = self.ranges.get(low + 1..=high)?.partition_point(|mapping| mapping.iova <= iova);
        let at = low + behind;
        Some((at, self.ranges.get(at)?))
    }
}

/// Translates the buffers of one vring. Clones share the table and have a last-hit
/// range of their own.
#[derive(Clone, Debug)]
pub struct Translation {
    table: Arc<Table>,
    last: Mapping,
    searches: u64,
}

impl Translation {
    /// From mappings sorted by `iova` that do not overlap.
    pub fn new(mappings: &[Mapping]) -> Self {
        let table = Table::new(mappings);
        Self { last: table.ranges.first().copied().unwrap_or_default(), table: Arc::new(table), searches: 0 }
    }

    /// Where the `len` bytes at `iova` are in the window, bytes from its start, if they
    /// are inside one mapping.
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

    /// The same, if it is in the mapping that was hit last.
    #[inline]
    pub(crate) fn last_hit(&self, iova: u64, len: u32, access: Access) -> Option<u64> {
        let into = iova.wrapping_sub(self.last.iova);
        let end = into.checked_add(u64::from(len))?;
        let found = len != 0 && end <= self.last.len && self.last.access.allows(access);
        found.then(|| self.last.window_offset.wrapping_add(into))
    }

    /// How often a buffer was not in the range of the one before, and was searched for.
    pub fn searches(&self) -> u64 {
        self.searches
    }

    fn search(&mut self, iova: u64, len: u32, access: Access) -> Result<u64, FaultKind> {
        self.searches += 1;
        let (_, mapping) = self.table.before(iova).ok_or(FaultKind::Unmapped)?;
        let found = mapping.place(iova, len, access).ok_or(FaultKind::Unmapped)?;
        self.last = *mapping;
        found
    }

    /// What is at the start of the `len` bytes at `iova`, and how far that goes. `len` is
    /// not 0. Of bytes that go past the end of the address space nothing is to be had.
    pub fn part(&self, iova: u64, len: u32, access: Access) -> Part {
        let missing = |most: u64, why| Part::Missing { len: most.min(u64::from(len)) as u32, why };
        if iova.checked_add(u64::from(len).saturating_sub(1)).is_none() {
            return missing(u64::MAX, FaultKind::Unmapped);
        }
        let before = self.table.before(iova);
        if let Some((_, mapping)) = before
            && let into = iova - mapping.iova
            && into < mapping.len
        {
            let left = mapping.len - into;
            return match mapping.access.allows(access) {
                true => Part::Mapped {
                    offset: mapping.window_offset.wrapping_add(into),
                    len: left.min(u64::from(len)) as u32,
                },
                false => missing(left, FaultKind::Access),
            };
        }
        let next = self.table.ranges.get(before.map_or(0, |(at, _)| at + 1));
        missing(next.map_or(u64::MAX, |next| next.iova.saturating_sub(iova)), FaultKind::Unmapped)
    }

    /// Where the `len` bytes at `iova` are in the window, if they are all there and in one
    /// piece, in however many mappings.
    pub fn contiguous(&self, iova: u64, len: u32, access: Access) -> Option<u64> {
        let mut start = None;
        let mut done = 0;
        while done < len {
            match self.part(iova.checked_add(done.into())?, len - done, access) {
                Part::Mapped { offset, len } => {
                    let first = *start.get_or_insert(offset);
                    if first.checked_add(done.into())? != offset {
                        return None;
                    }
                    done += len;
                }
                Part::Missing { .. } => return None,
            }
        }
        start
    }
}

impl From<&LinkSnapshot> for Translation {
    fn from(snapshot: &LinkSnapshot) -> Self {
        Self::new(&snapshot.mappings)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{Just, prop_assert, prop_assert_eq, prop_oneof, proptest};

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
    fn a_buffer_that_runs_into_the_next_mapping_is_not_in_one() {
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

    #[test]
    fn a_buffer_is_taken_apart_where_a_mapping_ends_and_each_part_is_checked() {
        let table = two_that_touch();
        let mapped = |offset, len| Part::Mapped { offset, len };
        let missing = |len, why| Part::Missing { len, why };
        assert_eq!(table.part(2 * PAGE - 1, 2, Access::READ), mapped(17 * PAGE - 1, 1));
        assert_eq!(table.part(2 * PAGE, 5000, Access::READ), mapped(17 * PAGE, 4096));
        assert_eq!(table.part(2 * PAGE - 1, 9, Access::WRITE), missing(1, FaultKind::Access));
        assert_eq!(table.part(3 * PAGE, 9, Access::READ), missing(9, FaultKind::Unmapped));
        assert_eq!(table.part(10, 9000, Access::READ), missing(4086, FaultKind::Unmapped));
        assert_eq!(table.part(u64::MAX, 2, Access::READ), missing(2, FaultKind::Unmapped));
        assert_eq!(Translation::new(&[]).part(0, 7, Access::READ), missing(7, FaultKind::Unmapped));
    }

    #[test]
    fn an_area_is_in_one_piece_or_is_not_found() {
        let mut apart = [PAGE, 2 * PAGE, 4 * PAGE].map(|iova| Mapping {
            iova,
            len: PAGE,
            window_offset: 16 * PAGE + iova,
            access: Access::READ_WRITE,
        });
        let find = |mappings: &[Mapping], iova, len, access| {
            Translation::new(mappings).contiguous(iova, len, access)
        };
        assert_eq!(find(&apart, PAGE + 1, 8000, Access::READ_WRITE), Some(17 * PAGE + 1));
        assert_eq!(find(&apart, 2 * PAGE, 4097, Access::READ), None, "a hole");
        apart[1].access = Access::READ;
        assert_eq!(find(&apart, PAGE, 4097, Access::WRITE), None);
        assert_eq!(find(&apart, PAGE, 4097, Access::READ), Some(17 * PAGE));
        apart[1].window_offset += PAGE;
        assert_eq!(find(&apart, PAGE, 4097, Access::READ), None, "it continues elsewhere");
        assert_eq!(find(&apart, PAGE, 4096, Access::READ), Some(17 * PAGE));
    }

    /// Every byte looked up by a walk over all mappings.
    fn naive(mappings: &[Mapping], iova: u64, access: Access) -> Result<u64, FaultKind> {
        let holds = |mapping: &&Mapping| mapping.iova <= iova && iova - mapping.iova < mapping.len;
        let mapping = mappings.iter().find(holds).ok_or(FaultKind::Unmapped)?;
        let allowed = mapping.access.allows(access);
        allowed.then(|| mapping.window_offset + (iova - mapping.iova)).ok_or(FaultKind::Access)
    }

    proptest! {
        #[test]
        fn what_is_found_is_what_a_walk_over_all_mappings_finds(
            // Distances and lengths in 16ths of a page; the base puts them anywhere.
            steps in vec((prop_oneof![Just(0_u64), 0_u64..3, 0_u64..1 << 20], 1_u64..4, 0_u32..4, 0_u64..64), 0..40),
            base in prop_oneof![Just(0_u64), Just(1 << 32), Just(u64::MAX - (1 << 30))],
            probes in vec((0_usize..40, -40_i64..40, 1_u32..100, 1_u32..4), 1..60),
        ) {
            const UNIT: u64 = 16;
            let mut next = base;
            let mut mappings = Vec::new();
            for (gap, len, access, place) in steps {
                next += gap * UNIT;
                let access = Access::from_bits(access);
                mappings.push(Mapping { iova: next, len: len * UNIT, window_offset: place << 20, access });
                next += len * UNIT;
            }
            let mut table = Translation::new(&mappings);
            for (near, distance, len, access) in probes {
                let access = Access::from_bits(access);
                let iova = mappings.get(near).map_or(base, |mapping| mapping.iova);
                let iova = iova.saturating_add_signed(distance);
                let wraps = iova.checked_add(u64::from(len) - 1).is_none();
                let bytes: Vec<_> = (0..u64::from(len))
                    .map(|at| if wraps { Err(FaultKind::Unmapped) } else { naive(&mappings, iova + at, access) })
                    .collect();
                // Taken apart, it is the same, byte for byte.
                let mut seen = Vec::new();
                while seen.len() < bytes.len() {
                    match table.part(iova.wrapping_add(seen.len() as u64), len - seen.len() as u32, access) {
                        Part::Mapped { offset, len } => seen.extend((0..u64::from(len)).map(|at| Ok(offset + at))),
                        Part::Missing { len, why } => seen.extend((0..len).map(|_| Err(why))),
                    }
                    prop_assert!(seen.len() <= bytes.len());
                }
                prop_assert_eq!(&seen, &bytes);
                // In one mapping: all bytes of it, one behind the other, and none refused.
                let whole = mappings.iter().any(|mapping| {
                    mapping.iova <= iova && iova - mapping.iova < mapping.len
                        && u64::from(len) <= mapping.len - (iova - mapping.iova)
                });
                let expected = if whole { bytes[0] } else { Err(FaultKind::Unmapped) };
                prop_assert_eq!(table.translate(iova, len, access), expected);
                let in_a_row = bytes.iter().zip(0..).all(|(byte, at)| *byte == bytes[0].map(|first| first + at));
                let contiguous = bytes[0].ok().filter(|_| in_a_row);
                prop_assert_eq!(table.contiguous(iova, len, access), contiguous);
            }
        }
    }
}
