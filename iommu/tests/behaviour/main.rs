//! What each call does and refuses, case by case. Never a random input: those are
//! in `tests/model`.

#![allow(clippy::unwrap_used, clippy::panic)]

mod map;
mod memory;
mod virtio_iommu;
mod window;

use iommu::{Access, Backing, Iova, MapError, MappedRange, Span, WindowOffset};

pub(crate) const MIB: u64 = 1 << 20;
/// The last page of an address space.
pub(crate) const TOP_PAGE: u64 = u64::MAX - 0xfff;

pub(crate) fn iova(start: u64, len: u64) -> Span<Iova> {
    Span::new(Iova::new(start), len).unwrap()
}

pub(crate) fn window(start: u64, len: u64) -> Span<WindowOffset> {
    Span::new(WindowOffset::new(start), len).unwrap()
}

/// `len` bytes at `start`, to read and write, from `offset` of the file 'A' on.
pub(crate) fn try_range(start: u64, len: u64, offset: u64) -> Result<MappedRange<char>, MapError> {
    let handle = 'A';
    MappedRange::new(iova(start, len), Access::ReadWrite, Backing { handle, offset })
}

pub(crate) fn range(start: u64, len: u64, offset: u64) -> MappedRange<char> {
    try_range(start, len, offset).unwrap()
}
