//! What may be mapped where in the window, and what is. Decides, touches no memory.
//!
//! With SHMEM_STRICT the region is 2 x W long (`docs/vhost-user-extensions.md`): the link area,
//! read-only; a read-write aperture up to W; and a read-only one from there on. An aperture
//! never changes its access, so a hypervisor's slot for it never has to change either.

use std::collections::BTreeMap;

use crate::abi::{LINK_LEN, PAGE_SIZE, SHMID_WINDOW};

/// The most ranges that are mapped at once: far below the kernel's limit of mappings of a process
/// (`vm.max_map_count`, 65530), and above what the link area's table has room for.
const MAX_RANGES: usize = 8192;

/// A part of the window whose access never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aperture {
    /// Window offset, bytes.
    pub offset: u64,
    /// Length, bytes.
    pub len: u64,
    /// Whether the guest may store to what is shown.
    pub writable: bool,
}

/// The apertures of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Apertures {
    half: u64,
}

impl Apertures {
    /// Those of a region of this length, or `None` if there are none of such a length: it is
    /// two times a multiple of 2 MiB, and not so long that sums wrap.
    pub fn new(region_len: u64) -> Option<Self> {
        let half = region_len / 2;
        let fits = region_len.is_multiple_of(4 << 20) && half > LINK_LEN && region_len <= 1 << 52;
        fits.then_some(Self { half })
    }

    /// Length of the region, bytes.
    pub const fn region_len(self) -> u64 {
        2 * self.half
    }

    /// All three, in the order of their offsets, without a gap.
    pub const fn all(self) -> [Aperture; 3] {
        [
            Aperture { offset: 0, len: LINK_LEN, writable: false },
            Aperture { offset: LINK_LEN, len: self.half - LINK_LEN, writable: true },
            Aperture { offset: self.half, len: self.half, writable: false },
        ]
    }
}

/// A SHMEM_MAP or SHMEM_UNMAP request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Which shared-memory region.
    pub shmid: u8,
    /// Offset into the file; means nothing for an unmap.
    pub file_offset: u64,
    /// Offset into the window.
    pub offset: u64,
    /// Length, bytes.
    pub len: u64,
    /// Whether the guest shall be able to store there; means nothing for an unmap.
    pub writable: bool,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The window is region 0.
    #[error("there is no shared-memory region {0}")]
    NoRegion(u8),
    /// Offsets and lengths are whole pages, and not zero pages.
    #[error("not a range of pages")]
    NotPages,
    /// The range does not end inside the window, or not in the aperture in which it starts.
    #[error("not inside one aperture of the window")]
    Outside,
    /// The aperture has another access.
    #[error("the aperture has another access than the mapping")]
    Access,
    /// Something is mapped there: nothing is ever replaced.
    #[error("it overlaps what is mapped at {offset:#x}, {len:#x} bytes")]
    Overlap {
        /// Where a mapping in the way starts.
        offset: u64,
        /// Its length.
        len: u64,
    },
    /// An unmap names exactly one mapping, or none.
    #[error("a part of it is mapped, and no mapping is exactly this")]
    NotMapped,
    /// More ranges than the process should have mappings.
    #[error("{MAX_RANGES} ranges are mapped already")]
    TooMany,
    /// The device is not started.
    #[error("the device is not started")]
    Closed,
}

/// What is mapped in a window.
#[derive(Clone, Debug)]
pub struct Ranges {
    apertures: Apertures,
    open: bool,
    /// Length by window offset; whole and disjoint ranges of pages inside one aperture.
    mapped: BTreeMap<u64, u64>,
}

impl Ranges {
    /// An empty and closed window.
    pub fn new(apertures: Apertures) -> Self {
        Self { apertures, open: false, mapped: BTreeMap::new() }
    }

    /// Whether there may be mappings.
    pub fn set_open(&mut self, open: bool) {
        self.open = open;
    }

    /// What is mapped: offset and length.
    pub fn mapped(&self) -> impl Iterator<Item = (u64, u64)> {
        self.mapped.iter().map(|(offset, len)| (*offset, *len))
    }

    /// Notes a mapping. Its aperture is what it is carried out in.
    ///
    /// # Errors
    /// If it is impossible; then nothing has changed.
    pub fn map(&mut self, request: Request) -> Result<Aperture, Refusal> {
        let (aperture, end) = self.place(request)?;
        if !self.open {
            return Err(Refusal::Closed);
        }
        if !request.file_offset.is_multiple_of(PAGE_SIZE) {
            return Err(Refusal::NotPages);
        }
        if request.writable != aperture.writable {
            return Err(Refusal::Access);
        }
        if let Some((&offset, &len)) = self.mapped.range(..end).next_back()
            && offset + len > request.offset
        {
            return Err(Refusal::Overlap { offset, len });
        }
        if self.mapped.len() == MAX_RANGES {
            return Err(Refusal::TooMany);
        }
        self.mapped.insert(request.offset, request.len);
        Ok(aperture)
    }

    /// Whether exactly this is mapped; `false` if nothing of it is.
    ///
    /// # Errors
    /// If a part of it is, or it is no range of the window.
    pub fn has(&self, request: Request) -> Result<bool, Refusal> {
        let (_, end) = self.place(request)?;
        match self.mapped.range(..end).next_back() {
            Some((offset, len)) if offset + len > request.offset => {
                let is_it = (*offset, *len) == (request.offset, request.len);
                is_it.then_some(true).ok_or(Refusal::NotMapped)
            }
            _ => Ok(false),
        }
    }

    /// Forgets the mapping at an offset.
    pub fn forget(&mut self, offset: u64) {
        self.mapped.remove(&offset);
    }

    /// The aperture that the range lies in, and where it ends.
    fn place(&self, request: Request) -> Result<(Aperture, u64), Refusal> {
        let Request { shmid, offset, len, .. } = request;
        if shmid != SHMID_WINDOW {
            return Err(Refusal::NoRegion(shmid));
        }
        if !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) || len == 0 {
            return Err(Refusal::NotPages);
        }
        let end = offset.checked_add(len).ok_or(Refusal::Outside)?;
        let inside = |a: &Aperture| a.offset <= offset && end <= a.offset + a.len;
        self.apertures.all().into_iter().find(inside).map(|a| (a, end)).ok_or(Refusal::Outside)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const PAGE: u64 = PAGE_SIZE;
    const HALF: u64 = 4 << 20;

    fn at(offset: u64, len: u64, writable: bool) -> Request {
        Request { shmid: 0, file_offset: 0, offset, len, writable }
    }

    fn open() -> Ranges {
        let mut ranges = Ranges::new(Apertures::new(2 * HALF).unwrap());
        ranges.set_open(true);
        ranges
    }

    #[test]
    fn apertures_cover_the_region_without_a_gap() {
        let apertures = Apertures::new(2 * HALF).unwrap();
        let end = apertures.all().iter().fold(0, |end, aperture| {
            assert_eq!(aperture.offset, end);
            end + aperture.len
        });
        assert_eq!(end, apertures.region_len());
        for len in [0, PAGE, 2 << 20, (4 << 20) + PAGE, 1 << 53, u64::MAX] {
            assert_eq!(Apertures::new(len), None, "{len:#x}");
        }
    }

    #[test]
    fn a_range_is_mapped_with_its_apertures_access_only() {
        let cases = [
            (0, LINK_LEN, false, Ok(())),
            (0, PAGE, true, Err(Refusal::Access)),
            (LINK_LEN, PAGE, true, Ok(())),
            (LINK_LEN, PAGE, false, Err(Refusal::Access)),
            (LINK_LEN - PAGE, 2 * PAGE, true, Err(Refusal::Outside)),
            (HALF - PAGE, 2 * PAGE, true, Err(Refusal::Outside)),
            (HALF, HALF, false, Ok(())),
            (HALF, PAGE, true, Err(Refusal::Access)),
            (2 * HALF, PAGE, false, Err(Refusal::Outside)),
            (HALF, HALF + PAGE, false, Err(Refusal::Outside)),
            (HALF, u64::MAX - PAGE + 1, false, Err(Refusal::Outside)),
            (PAGE, u64::MAX - PAGE + 1, false, Err(Refusal::Outside)),
            (0, 0, false, Err(Refusal::NotPages)),
            (1, PAGE, false, Err(Refusal::NotPages)),
            (0, PAGE + 1, false, Err(Refusal::NotPages)),
        ];
        for (offset, len, writable, expected) in cases {
            let result = open().map(at(offset, len, writable)).map(|_| ());
            assert_eq!(result, expected, "{offset:#x} {len:#x} {writable}");
        }
        let other = Request { shmid: 1, ..at(0, PAGE, false) };
        assert_eq!(open().map(other), Err(Refusal::NoRegion(1)));
        let unaligned = Request { file_offset: 1, ..at(0, PAGE, false) };
        assert_eq!(open().map(unaligned), Err(Refusal::NotPages));
    }

    #[test]
    fn nothing_is_mapped_over_something_and_only_what_was_mapped_is_unmapped() {
        let mut ranges = open();
        ranges.map(at(LINK_LEN + 4 * PAGE, 4 * PAGE, true)).unwrap();
        for (offset, len) in [(4, 4), (3, 2), (7, 2), (0, 16), (5, 1)] {
            let request = at(LINK_LEN + offset * PAGE, len * PAGE, true);
            assert!(matches!(ranges.map(request), Err(Refusal::Overlap { .. })), "{offset} {len}");
        }
        for (offset, len) in [(4, 3), (5, 3), (3, 5), (0, 16)] {
            let request = at(LINK_LEN + offset * PAGE, len * PAGE, true);
            assert_eq!(ranges.has(request), Err(Refusal::NotMapped));
        }
        assert_eq!(ranges.has(at(LINK_LEN + 4 * PAGE, 4 * PAGE, false)), Ok(true));
        assert_eq!(ranges.has(at(LINK_LEN + 8 * PAGE, 4 * PAGE, false)), Ok(false));
        assert_eq!(ranges.has(at(LINK_LEN, 4 * PAGE, false)), Ok(false));
        ranges.forget(LINK_LEN + 4 * PAGE);
        assert_eq!(ranges.mapped().count(), 0);
    }

    #[test]
    fn a_closed_window_maps_nothing_and_a_full_one_no_more() {
        let mut ranges = Ranges::new(Apertures::new(256 << 20).unwrap());
        assert_eq!(ranges.map(at(0, PAGE, false)), Err(Refusal::Closed));
        ranges.set_open(true);
        for index in 0..MAX_RANGES as u64 {
            ranges.map(at(LINK_LEN + 2 * index * PAGE, PAGE, true)).unwrap();
        }
        assert_eq!(ranges.map(at(0, PAGE, false)), Err(Refusal::TooMany));
    }
}
