//! Geometry of a virtqueue (virtio 1.3, 2.7 and 2.8): sizes, alignments and places of
//! its three areas. Touches no memory.

use vhost_pci_device::abi::FaultKind;
use virtio_bindings::virtio_ring::{VRING_AVAIL_ALIGN_SIZE, VRING_DESC_ALIGN_SIZE, VRING_USED_ALIGN_SIZE};

use super::features::RingFeatures;
use super::packed;
use super::split::layout::{avail_len, desc_len, used_len};
use crate::link::VringInfo;
use crate::translate::{Access, Translation};

/// The largest queue size (virtio 1.3, 2.7).
pub const MAX_SIZE: u16 = 1 << 15;
/// Length of a descriptor (2.7.5), bytes.
pub const DESC_LEN: u32 = 16;
/// Whether a queue may have this size.
pub const fn is_valid_size(size: u32) -> bool {
    size.is_power_of_two() && size <= MAX_SIZE as u32
}

/// A vring with a possible size and well-aligned addresses. Made from what the link
/// page says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingConfig {
    packed: bool,
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
}

impl TryFrom<&VringInfo> for RingConfig {
    type Error = FaultKind;

    /// Of a split ring.
    fn try_from(info: &VringInfo) -> Result<Self, FaultKind> {
        Self::new(info, RingFeatures::default())
    }
}

impl RingConfig {
    /// Of a ring in the format that its driver accepted.
    ///
    /// # Errors
    /// [`FaultKind::Geometry`].
    pub fn new(info: &VringInfo, features: RingFeatures) -> Result<Self, FaultKind> {
        let VringInfo { desc, avail, used, .. } = *info;
        let size = u16::try_from(info.size).map_err(|_| FaultKind::Geometry)?;
        let (possible, avail_align, used_align) = match features.packed {
            false => (
                is_valid_size(info.size),
                u64::from(VRING_AVAIL_ALIGN_SIZE),
                u64::from(VRING_USED_ALIGN_SIZE),
            ),
            // 2.8.10.1: any size up to the largest one.
            true => {
                ((1..=MAX_SIZE).contains(&size), packed::layout::EVENT_ALIGN, packed::layout::EVENT_ALIGN)
            }
        };
        let aligned = desc.is_multiple_of(u64::from(VRING_DESC_ALIGN_SIZE))
            && avail.is_multiple_of(avail_align)
            && used.is_multiple_of(used_align);
        let config = Self { packed: features.packed, size, desc, avail, used };
        if possible && aligned { Ok(config) } else { Err(FaultKind::Geometry) }
    }

    /// Whether it is a packed ring.
    pub fn is_packed(&self) -> bool {
        self.packed
    }

    /// Entries; a power of two in a split ring.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Finds the three areas in the window. Each must be there in one piece, and those that the
    /// device writes must be readable too, for there it finds where to start.
    pub fn place(&self, translation: &Translation) -> Result<RingPlaces, FaultKind> {
        let find = |iova, len, access| translation.contiguous(iova, len, access).ok_or(FaultKind::Geometry);
        let size = self.size;
        let (desc, avail, used) = match self.packed {
            false => (
                find(self.desc, desc_len(size), Access::READ)?,
                find(self.avail, avail_len(size), Access::READ)?,
                find(self.used, used_len(size), Access::READ_WRITE)?,
            ),
            true => (
                find(self.desc, packed::layout::desc_len(size), Access::READ_WRITE)?,
                find(self.avail, packed::layout::EVENT_LEN, Access::READ)?,
                find(self.used, packed::layout::EVENT_LEN, Access::READ_WRITE)?,
            ),
        };
        Ok(RingPlaces { size, desc, avail, used })
    }
}

/// Where a ring's areas are in a memory, bytes from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingPlaces {
    /// Entries; a power of two in a split ring, at most [`MAX_SIZE`].
    pub size: u16,
    /// Descriptor table; descriptor ring of a packed ring.
    pub desc: u64,
    /// Available ring; driver event suppression area of a packed ring.
    pub avail: u64,
    /// Used ring; device event suppression area of a packed ring.
    pub used: u64,
}

impl RingPlaces {
    /// The three areas from `offset` on, each on cache lines of its own, and the
    /// first offset behind them. `offset` is a multiple of 64. There is room for a ring of
    /// either format.
    pub fn at(offset: u64, size: u16) -> (Self, u64) {
        let line = |end: u64| end.next_multiple_of(64);
        let avail = line(offset + u64::from(desc_len(size)));
        let used = line(avail + u64::from(avail_len(size)));
        let end = line(used + u64::from(used_len(size)));
        (Self { size, desc: offset, avail, used }, end)
    }

    /// The vring as the link page would tell it, if the memory started at `iova_base`.
    pub fn info(&self, iova_base: u64) -> VringInfo {
        let iova = |offset: u64| iova_base.wrapping_add(offset);
        VringInfo {
            enabled: true,
            size: u32::from(self.size),
            desc: iova(self.desc),
            avail: iova(self.avail),
            used: iova(self.used),
            base: 0,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::ring::split::layout::{avail_event, used_event};
    use crate::translate::Mapping;

    fn info() -> VringInfo {
        VringInfo { enabled: true, size: 256, desc: 0x1000, avail: 0x2000, used: 0x3000, base: 0 }
    }

    #[test]
    fn sizes_other_than_powers_of_two_up_to_32768_are_refused() {
        for size in [0, 3, 255, 257, 65_536, 1 << 31, u32::MAX] {
            assert_eq!(
                RingConfig::try_from(&VringInfo { size, ..info() }),
                Err(FaultKind::Geometry),
                "{size}"
            );
        }
        for power in 0..=15 {
            assert!(RingConfig::try_from(&VringInfo { size: 1 << power, ..info() }).is_ok());
        }
    }

    #[test]
    fn misaligned_areas_are_refused() {
        for bad in [
            VringInfo { desc: 0x1008, ..info() },
            VringInfo { avail: 0x2001, ..info() },
            VringInfo { used: 0x3002, ..info() },
        ] {
            assert_eq!(RingConfig::try_from(&bad), Err(FaultKind::Geometry));
        }
    }

    #[test]
    fn an_area_not_in_one_piece_or_without_its_access_is_refused() {
        let config = RingConfig::try_from(&info()).unwrap();
        let page = |iova: u64, access| Mapping { iova, len: 0x1000, window_offset: iova << 4, access };
        let good = Translation::new(&[
            page(0x1000, Access::READ),
            page(0x2000, Access::READ),
            page(0x3000, Access::READ_WRITE),
        ]);
        let places = RingPlaces { size: 256, desc: 0x1_0000, avail: 0x2_0000, used: 0x3_0000 };
        assert_eq!(config.place(&good), Ok(places));
        let read_only = Translation::new(&[Mapping { len: 0x3000, ..page(0x1000, Access::READ) }]);
        assert_eq!(config.place(&read_only), Err(FaultKind::Geometry));
        // It runs on into the next mapping, which is elsewhere in the window, or next to it.
        let across = RingConfig::try_from(&VringInfo { desc: 0x1010, ..info() }).unwrap();
        assert_eq!(across.place(&good), Err(FaultKind::Geometry));
        let beside = |iova, access| Mapping { window_offset: iova, ..page(iova, access) };
        let touching = Translation::new(&[
            beside(0x1000, Access::READ),
            beside(0x2000, Access::READ),
            beside(0x3000, Access::READ_WRITE),
        ]);
        assert_eq!(across.place(&touching).map(|places| places.desc), Ok(0x1010));
    }

    #[test]
    fn areas_laid_out_do_not_overlap_and_are_aligned() {
        for power in 0..=15 {
            let size = 1 << power;
            let (places, end) = RingPlaces::at(4096, size);
            assert!(places.desc + u64::from(desc_len(size)) <= places.avail);
            assert!(places.avail + u64::from(avail_len(size)) <= places.used);
            assert_eq!(used_event(&places) + 2, places.avail + u64::from(avail_len(size)));
            assert_eq!(avail_event(&places) + 2, places.used + u64::from(used_len(size)));
            assert!(places.used + u64::from(used_len(size)) <= end);
            assert!(RingConfig::try_from(&places.info(0)).is_ok());
        }
    }
}
