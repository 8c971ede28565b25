//! An endpoint's properties (virtio 1.3, 5.13.6.8): as the device writes them and as a
//! driver reads them.

use std::ops::RangeInclusive;

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::wire::{
    PropertyHead, ResvMem, VIRTIO_IOMMU_PROBE_T_MASK, VIRTIO_IOMMU_PROBE_T_RESV_MEM,
    VIRTIO_IOMMU_RESV_MEM_T_MSI, VIRTIO_IOMMU_RESV_MEM_T_RESERVED,
};

/// A range of addresses that cannot be mapped for an endpoint (5.13.6.8.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reserved {
    /// The addresses.
    pub range: RangeInclusive<u64>,
    /// It is the doorbell of message-signalled interrupts.
    pub msi: bool,
}

impl Reserved {
    /// Length of its property with head, bytes.
    pub(super) const LEN: usize = size_of::<ResvMem>();

    /// Whether the two ranges have an address in common.
    pub(super) fn overlaps(&self, range: &RangeInclusive<u64>) -> bool {
        self.range.start() <= range.end() && range.start() <= self.range.end()
    }

    fn property(&self) -> ResvMem {
        let len = (size_of::<ResvMem>() - size_of::<PropertyHead>()) as u16;
        ResvMem {
            head: PropertyHead { kind: U16::new(VIRTIO_IOMMU_PROBE_T_RESV_MEM), len: U16::new(len) },
            subtype: if self.msi { VIRTIO_IOMMU_RESV_MEM_T_MSI } else { VIRTIO_IOMMU_RESV_MEM_T_RESERVED },
            reserved: [0; 3],
            start: U64::new(*self.range.start()),
            end: U64::new(*self.range.end()),
        }
    }
}

/// The properties of an endpoint with these ranges, one behind the other.
pub(super) fn properties(reserved: &[Reserved]) -> Vec<u8> {
    reserved.iter().flat_map(|reserved| reserved.property().as_bytes().to_vec()).collect()
}

/// What a driver finds in the answer to a PROBE request (5.13.6.7, the driver's rules):
/// properties that it does not know are skipped, and subtypes that it does not know
/// are reserved. A list that is cut off ends there; a range that is none is skipped.
pub fn parse_properties(mut bytes: &[u8]) -> Vec<Reserved> {
    let mut found = Vec::new();
    while let Ok((head, rest)) = PropertyHead::read_from_prefix(bytes) {
        let (kind, len) = (head.kind.get(), usize::from(head.len.get()));
        if kind & VIRTIO_IOMMU_PROBE_T_MASK == 0 || len > rest.len() {
            break;
        }
        // With reserved bits set it is to be ignored, so the whole field is compared.
        if kind == VIRTIO_IOMMU_PROBE_T_RESV_MEM
            && let Ok((property, _)) = ResvMem::read_from_prefix(bytes)
            && len + size_of::<PropertyHead>() >= size_of::<ResvMem>()
            && property.start.get() <= property.end.get()
        {
            let range = property.start.get()..=property.end.get();
            found.push(Reserved { range, msi: property.subtype == VIRTIO_IOMMU_RESV_MEM_T_MSI });
        }
        bytes = rest.get(len..).unwrap_or_default();
    }
    found
}
