//! Random histories against naive models: sets of single bytes or pages. Addresses
//! are drawn from a few pages at the bottom and at the very top of each space.

#![allow(clippy::unwrap_used, clippy::panic)]

mod map;
mod memory;
mod span;
mod virtio_iommu;
mod window;

use proptest::prelude::{Just, Strategy, prop_oneof};

pub(crate) const PAGE: u64 = iommu::PAGE_SIZE;
/// Pages at either end of a space.
pub(crate) const PAGES: u64 = 24;

/// The first address of a page near the bottom or the top of a space.
pub(crate) fn page() -> impl Strategy<Value = u64> {
    let base = prop_oneof![Just(0), Just(u64::MAX - (PAGES * PAGE - 1))];
    (base, 0..PAGES).prop_map(|(base, page)| base + page * PAGE)
}

/// The pages, or bytes with a `unit` of 1, of a range, unless it is empty or wraps.
pub(crate) fn units(start: u64, len: u64, unit: u64) -> Option<Vec<u128>> {
    let (start, len, unit) = (u128::from(start), u128::from(len), u128::from(unit));
    let end = start + len;
    (len > 0 && end <= 1 << 64).then(|| (start / unit..end.div_ceil(unit)).collect())
}
