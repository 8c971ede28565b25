//! What an IOMMU is like, and who is behind it: chosen by the host, never by a driver.

use std::ops::RangeInclusive;

use thiserror::Error;

/// The number of an endpoint: a device whose accesses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointId(pub u32);

/// The number of a domain, which the driver chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainId(pub u32);

/// What an IOMMU is like (5.13.4), and how much it keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Page sizes that can be mapped; the lowest bit is the granularity, in bytes. 0
    /// stands for 4 KiB.
    pub page_size_mask: u64,
    /// Addresses that can be mapped.
    pub input_range: RangeInclusive<u64>,
    /// Domains that there can be.
    pub domain_range: RangeInclusive<u32>,
    /// At first, endpoints that are in no domain reach all memory.
    pub bypass: bool,
    /// Mappings of devices' registers are taken (`VIRTIO_IOMMU_F_MMIO`).
    pub mmio: bool,
    /// Length of a PROBE request's properties, bytes; 0 to do without PROBE.
    pub probe_size: u32,
    /// Mappings of all domains together. One more is refused with `S_NOMEM`.
    pub max_mappings: usize,
}

impl Default for Settings {
    /// Pages of 4 KiB, all addresses and domains, no bypass, 131,072 mappings.
    fn default() -> Self {
        Self {
            page_size_mask: !0xfff,
            input_range: 0..=u64::MAX,
            domain_range: 0..=u32::MAX,
            bypass: false,
            mmio: true,
            probe_size: 512,
            max_mappings: 1 << 17,
        }
    }
}

/// Why there cannot be such an endpoint: the host's mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum EndpointError {
    /// There is one with this number.
    #[error("endpoint {} exists", .0.0)]
    Exists(EndpointId),
    /// Its reserved ranges are empty, overlap, or have two doorbells (5.13.6.8.1).
    #[error("the reserved ranges of endpoint {} are empty, overlap, or have two doorbells", .0.0)]
    Reserved(EndpointId),
    /// Its properties are longer than the device says.
    #[error("the properties of endpoint {} take {needed} bytes, probe_size is {probe_size}", .endpoint.0)]
    ProbeSize {
        /// The endpoint.
        endpoint: EndpointId,
        /// Length of its properties, bytes.
        needed: usize,
        /// Length that there is, bytes.
        probe_size: u32,
    },
}
