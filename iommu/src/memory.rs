//! The owner's memory table, as its front-end describes it. This file owns the
//! checks of a table from outside and the translation from guest and front-end
//! addresses to places in files; it never opens, maps or reads a file.

use std::fmt;

use thiserror::Error;

use crate::address::{Address, FrontendVa, Gpa, LookupError, PAGE_SIZE, Span, SpanError, offset_in};

/// The first byte of a piece of a file. How long the piece is, the value that
/// holds the backing says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing<R> {
    /// The file.
    pub handle: R,
    /// Bytes from the start of the file.
    pub offset: u64,
}

/// A region as a front-end announces it: not checked yet.
#[derive(Clone, Debug)]
pub struct NewRegion<R> {
    /// First address in the owner's guest.
    pub guest: Gpa,
    /// First address in the front-end's process.
    pub frontend: FrontendVa,
    /// Length, bytes.
    pub len: u64,
    /// The file that came with the region.
    pub handle: R,
    /// Where in the file the region starts, bytes.
    pub offset: u64,
    /// Length of the file, bytes, as the caller found it by fstat.
    pub file_len: u64,
}

/// A checked region: everything in it is page-aligned, nothing wraps, and it was
/// inside its file when it was added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region<R> {
    guest: Span<Gpa>,
    frontend: Span<FrontendVa>,
    backing: Backing<R>,
}

impl<R> Region<R> {
    /// Where the region is in the owner's guest.
    pub fn guest(&self) -> Span<Gpa> {
        self.guest
    }

    /// Where the region is in the front-end's process; as long as [`Self::guest`].
    pub fn frontend(&self) -> Span<FrontendVa> {
        self.frontend
    }

    /// The file and the offset at which the region starts.
    pub fn backing(&self) -> &Backing<R> {
        &self.backing
    }
}

/// Where a range of addresses is: wholly inside one region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place<R> {
    /// Position of the region in [`MemoryTable::regions`], until the table changes.
    pub region: usize,
    /// The range's first address in the owner's guest.
    pub guest: Gpa,
    /// The range's first byte in the file.
    pub backing: Backing<R>,
}

/// A number of a region that has to be a multiple of [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionField {
    /// The guest address.
    Guest,
    /// The front-end address.
    Frontend,
    /// The length.
    Len,
    /// The offset in the file.
    Offset,
}

impl fmt::Display for RegionField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Guest => "guest address",
            Self::Frontend => "front-end address",
            Self::Len => "length",
            Self::Offset => "file offset",
        })
    }
}

/// What is wrong with a memory table or a change to it: the front-end's fault.
/// `index` is the region's position in the list given to [`MemoryTable::replace`],
/// or for [`MemoryTable::add`] the position it would have had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MemoryError {
    /// More regions than the table may have.
    #[error("{count} memory regions, {max} are allowed")]
    TooMany {
        /// Regions there would be.
        count: usize,
        /// Regions there may be.
        max: usize,
    },
    /// The region is empty or wraps in guest space.
    #[error("memory region {index}, guest addresses: {source}")]
    GuestRange {
        /// The region.
        index: usize,
        /// What is wrong.
        source: SpanError,
    },
    /// The region wraps in the front-end's address space.
    #[error("memory region {index}, front-end addresses: {source}")]
    FrontendRange {
        /// The region.
        index: usize,
        /// What is wrong.
        source: SpanError,
    },
    /// A number is not a multiple of [`PAGE_SIZE`].
    #[error("memory region {index}: {field} {value:#x} is not page-aligned")]
    Unaligned {
        /// The region.
        index: usize,
        /// Which number.
        field: RegionField,
        /// Its value.
        value: u64,
    },
    /// The region is not wholly inside its file, or its end in the file wraps.
    #[error("memory region {index}: {len:#x} bytes at {offset:#x} of a file of {file_len:#x} bytes")]
    OutsideFile {
        /// The region.
        index: usize,
        /// Where it starts in the file, bytes.
        offset: u64,
        /// Its length, bytes.
        len: u64,
        /// Length of the file, bytes.
        file_len: u64,
    },
    /// Two regions share guest addresses.
    #[error("memory region {index} at {span} overlaps region {other} in guest addresses")]
    GuestOverlap {
        /// The region.
        index: usize,
        /// Its guest addresses.
        span: Span<Gpa>,
        /// The region before it that it overlaps.
        other: usize,
    },
    /// Two regions share front-end addresses.
    #[error("memory region {index} at {span} overlaps region {other} in front-end addresses")]
    FrontendOverlap {
        /// The region.
        index: usize,
        /// Its front-end addresses.
        span: Span<FrontendVa>,
        /// The region before it that it overlaps.
        other: usize,
    },
    /// No region has exactly these numbers.
    #[error("no memory region at guest {guest}, front-end {frontend} with {len:#x} bytes")]
    NoSuchRegion {
        /// First guest address asked for.
        guest: Gpa,
        /// First front-end address asked for.
        frontend: FrontendVa,
        /// Length asked for, bytes.
        len: u64,
    },
}

/// The owner's memory: regions that overlap neither in guest nor in front-end
/// addresses, in the order in which they came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryTable<R> {
    regions: Vec<Region<R>>,
    max_regions: usize,
}

impl<R: Clone + PartialEq> MemoryTable<R> {
    /// An empty table that takes up to `max_regions` regions.
    pub fn new(max_regions: usize) -> Self {
        Self { regions: Vec::new(), max_regions }
    }

    /// The table that has exactly `regions`, under this table's limit. This table
    /// stays as it is, so that the caller can compare, and can keep it on error.
    /// Refuses what [`Self::add`] refuses.
    pub fn replace(&self, regions: Vec<NewRegion<R>>) -> Result<Self, MemoryError> {
        // Before any work: a list that is too long is not looked at.
        if regions.len() > self.max_regions {
            return Err(MemoryError::TooMany { count: regions.len(), max: self.max_regions });
        }
        let mut table = Self::new(self.max_regions);
        for region in regions {
            table.add(region)?;
        }
        Ok(table)
    }

    /// Adds a region behind the others. On error nothing has changed.
    ///
    /// Refuses one region too many, a range that is empty, wraps, is not
    /// page-aligned or not inside its file, and one that overlaps another region
    /// in guest or in front-end addresses.
    pub fn add(&mut self, region: NewRegion<R>) -> Result<&Region<R>, MemoryError> {
        let index = self.regions.len();
        if index >= self.max_regions {
            return Err(MemoryError::TooMany { count: index + 1, max: self.max_regions });
        }
        let region = checked(index, region)?;
        for (other, present) in self.regions.iter().enumerate() {
            if present.guest.overlaps(region.guest) {
                return Err(MemoryError::GuestOverlap { index, span: region.guest, other });
            }
            if present.frontend.overlaps(region.frontend) {
                return Err(MemoryError::FrontendOverlap { index, span: region.frontend, other });
            }
        }
        self.regions.push(region);
        Ok(&self.regions[index])
    }

    /// Takes out the region with exactly these addresses and this length in bytes.
    /// Refuses, without a change, if there is none.
    pub fn remove(&mut self, guest: Gpa, frontend: FrontendVa, len: u64) -> Result<Region<R>, MemoryError> {
        let position = self.regions.iter().position(|region| {
            region.guest.start() == guest && region.frontend.start() == frontend && region.guest.len() == len
        });
        match position {
            Some(position) => Ok(self.regions.remove(position)),
            None => Err(MemoryError::NoSuchRegion { guest, frontend, len }),
        }
    }

    /// The same without regions of some files.
    #[must_use]
    pub fn without(&self, is_left_out: impl Fn(&R) -> bool) -> Self {
        let regions = self.regions.iter().filter(|region| !is_left_out(&region.backing.handle));
        Self { regions: regions.cloned().collect(), max_regions: self.max_regions }
    }

    /// The regions that another table has too, with equal addresses and backing.
    pub fn common(&self, other: &Self) -> Self {
        let regions = self.regions.iter().filter(|region| other.regions.contains(region)).cloned();
        Self { regions: regions.collect(), max_regions: self.max_regions }
    }

    /// The regions, in the order in which they came.
    pub fn regions(&self) -> &[Region<R>] {
        &self.regions
    }

    /// How many regions there may be.
    pub fn max_regions(&self) -> usize {
        self.max_regions
    }

    /// Where the `len` bytes from front-end address `start` on are. Refuses a range
    /// that is not wholly inside one region, even if another region follows.
    pub fn by_frontend(&self, start: FrontendVa, len: u64) -> Result<Place<R>, LookupError<FrontendVa>> {
        let span = Span::new(start, len)?;
        self.find(span, |region| region.frontend)
    }

    /// Where the `len` bytes from guest address `start` on are. Refuses a range
    /// that is not wholly inside one region, even if another region follows.
    pub fn by_guest(&self, start: Gpa, len: u64) -> Result<Place<R>, LookupError<Gpa>> {
        let span = Span::new(start, len)?;
        self.find(span, |region| region.guest)
    }

    /// Whether the `len` bytes of the file that start at `backing` are inside one
    /// region.
    pub fn backs(&self, backing: &Backing<R>, len: u64) -> bool {
        self.guest_of(backing, len).is_some()
    }

    /// Where the guest has the `len` bytes of the file that start at `backing`, if they are inside one
    /// region: the first such one.
    pub fn guest_of(&self, backing: &Backing<R>, len: u64) -> Option<Gpa> {
        self.regions.iter().find_map(|region| {
            let offset = backing.offset.checked_sub(region.backing.offset)?;
            let room = region.guest.len().checked_sub(offset)?;
            let inside = region.backing.handle == backing.handle && len <= room;
            inside.then(|| Gpa::new(region.guest.start().raw() + offset))
        })
    }

    fn find<A: Address>(
        &self,
        span: Span<A>,
        space: impl Fn(&Region<R>) -> Span<A>,
    ) -> Result<Place<R>, LookupError<A>> {
        let found = self.regions.iter().enumerate().find(|(_, region)| space(region).contains(span.start()));
        let (index, region) = found.ok_or(LookupError::Unknown { span })?;
        let offset = offset_in(space(region), span)?;
        Ok(Place {
            region: index,
            // `offset` is inside the region, whose spans and file range do not wrap.
            guest: Gpa::new(region.guest.start().raw() + offset),
            backing: Backing {
                handle: region.backing.handle.clone(),
                offset: region.backing.offset + offset,
            },
        })
    }
}

/// The checks that concern one region alone.
fn checked<R>(index: usize, new: NewRegion<R>) -> Result<Region<R>, MemoryError> {
    let guest = Span::new(new.guest, new.len).map_err(|source| MemoryError::GuestRange { index, source })?;
    let frontend =
        Span::new(new.frontend, new.len).map_err(|source| MemoryError::FrontendRange { index, source })?;
    for (field, value) in [
        (RegionField::Guest, new.guest.raw()),
        (RegionField::Frontend, new.frontend.raw()),
        (RegionField::Len, new.len),
        (RegionField::Offset, new.offset),
    ] {
        if !value.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Unaligned { index, field, value });
        }
    }
    let end = new.offset.checked_add(new.len);
    if end.is_none_or(|end| end > new.file_len) {
        return Err(MemoryError::OutsideFile {
            index,
            offset: new.offset,
            len: new.len,
            file_len: new.file_len,
        });
    }
    Ok(Region { guest, frontend, backing: Backing { handle: new.handle, offset: new.offset } })
}
