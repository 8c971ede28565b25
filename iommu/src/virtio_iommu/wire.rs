//! The bytes of virtio-iommu (virtio 1.3, 5.13): requests, properties, fault reports
//! and the config space. This file owns numbers and layouts; what they mean is in
//! the files beside it.
//!
//! A request has a part that the device reads, which is a `Req` structure here, and
//! one that it writes, which ends with a [`ReqTail`]. All fields are little-endian and
//! none is aligned: a buffer of a guest's starts anywhere.

use core::mem::offset_of;
use core::ops::RangeInclusive;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

// --- 5.13.3 Feature bits ------------------------------------------------------

/// `input_range` says which addresses can be mapped (5.13.3).
pub const VIRTIO_IOMMU_F_INPUT_RANGE: u32 = 0;
/// `domain_range` says which domains there can be (5.13.3).
pub const VIRTIO_IOMMU_F_DOMAIN_RANGE: u32 = 1;
/// MAP and UNMAP are available (5.13.3).
pub const VIRTIO_IOMMU_F_MAP_UNMAP: u32 = 2;
/// PROBE is available (5.13.3).
pub const VIRTIO_IOMMU_F_PROBE: u32 = 4;
/// [`VIRTIO_IOMMU_MAP_F_MMIO`] is available (5.13.3).
pub const VIRTIO_IOMMU_F_MMIO: u32 = 5;
/// `bypass` and [`VIRTIO_IOMMU_ATTACH_F_BYPASS`] are available (5.13.3).
pub const VIRTIO_IOMMU_F_BYPASS_CONFIG: u32 = 6;

// --- 5.13.4 Device configuration layout ---------------------------------------

/// `struct virtio_iommu_config` (5.13.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Config {
    /// Page sizes that can be mapped; the lowest bit is the granularity.
    pub page_size_mask: U64,
    /// First address that can be mapped.
    pub input_start: U64,
    /// Last address that can be mapped.
    pub input_end: U64,
    /// First domain.
    pub domain_start: U32,
    /// Last domain.
    pub domain_end: U32,
    /// Length of a PROBE request's properties, bytes.
    pub probe_size: U32,
    /// 1: endpoints that are in no domain are in bypass mode.
    pub bypass: u8,
    /// 0.
    pub reserved: [u8; 3],
}
const _: () = assert!(size_of::<Config>() == 40);
const _: () = assert!(offset_of!(Config, domain_start) == 24 && offset_of!(Config, bypass) == 36);

// --- 5.13.6 Device operations -------------------------------------------------

/// Attach an endpoint to a domain (5.13.6.3).
pub const VIRTIO_IOMMU_T_ATTACH: u8 = 1;
/// Detach an endpoint from its domain (5.13.6.4).
pub const VIRTIO_IOMMU_T_DETACH: u8 = 2;
/// Map a range (5.13.6.5).
pub const VIRTIO_IOMMU_T_MAP: u8 = 3;
/// Unmap a range (5.13.6.6).
pub const VIRTIO_IOMMU_T_UNMAP: u8 = 4;
/// Ask for an endpoint's properties (5.13.6.7).
pub const VIRTIO_IOMMU_T_PROBE: u8 = 5;

/// What became of a request: `VIRTIO_IOMMU_S_*` (5.13.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// `VIRTIO_IOMMU_S_OK`.
    Ok = 0,
    /// `VIRTIO_IOMMU_S_IOERR`: virtio communication error.
    IoErr = 1,
    /// `VIRTIO_IOMMU_S_UNSUPP`: unsupported request.
    Unsupp = 2,
    /// `VIRTIO_IOMMU_S_DEVERR`: internal device error.
    DevErr = 3,
    /// `VIRTIO_IOMMU_S_INVAL`: invalid parameters.
    Inval = 4,
    /// `VIRTIO_IOMMU_S_RANGE`: out-of-range parameters.
    Range = 5,
    /// `VIRTIO_IOMMU_S_NOENT`: entry not found.
    NoEnt = 6,
    /// `VIRTIO_IOMMU_S_FAULT`: bad address.
    Fault = 7,
    /// `VIRTIO_IOMMU_S_NOMEM`: insufficient resources.
    NoMem = 8,
}

impl Status {
    /// The status with this number.
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Ok,
            1 => Self::IoErr,
            2 => Self::Unsupp,
            3 => Self::DevErr,
            4 => Self::Inval,
            5 => Self::Range,
            6 => Self::NoEnt,
            7 => Self::Fault,
            8 => Self::NoMem,
            _ => return None,
        })
    }

    /// Its number.
    pub const fn code(self) -> u8 {
        self as u8
    }
}

/// `struct virtio_iommu_req_head` (5.13.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReqHead {
    /// `VIRTIO_IOMMU_T_*`.
    pub kind: u8,
    /// Not looked at.
    pub reserved: [u8; 3],
}
const _: () = assert!(size_of::<ReqHead>() == 4);

impl ReqHead {
    /// The head of a request of this type.
    pub const fn new(kind: u8) -> Self {
        Self { kind, reserved: [0; 3] }
    }
}

/// `struct virtio_iommu_req_tail` (5.13.6): the last thing that the device writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReqTail {
    /// A [`Status`].
    pub status: u8,
    /// 0.
    pub reserved: [u8; 3],
}
const _: () = assert!(size_of::<ReqTail>() == 4);

/// The domain lets its endpoints reach all memory untranslated (5.13.6.3).
pub const VIRTIO_IOMMU_ATTACH_F_BYPASS: u32 = 1 << 0;

/// `struct virtio_iommu_req_attach` without its tail (5.13.6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReqAttach {
    /// [`VIRTIO_IOMMU_T_ATTACH`].
    pub head: ReqHead,
    /// The domain, which is made if there is none.
    pub domain: U32,
    /// The endpoint.
    pub endpoint: U32,
    /// `VIRTIO_IOMMU_ATTACH_F_*`.
    pub flags: U32,
    /// 0.
    pub reserved: [u8; 4],
}
const _: () = assert!(size_of::<ReqAttach>() == 20);

impl ReqAttach {
    /// Attaches `endpoint` to `domain`.
    pub const fn new(domain: u32, endpoint: u32, flags: u32) -> Self {
        let (domain, endpoint, flags) = (U32::new(domain), U32::new(endpoint), U32::new(flags));
        Self { head: ReqHead::new(VIRTIO_IOMMU_T_ATTACH), domain, endpoint, flags, reserved: [0; 4] }
    }
}

/// `struct virtio_iommu_req_detach` without its tail (5.13.6.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReqDetach {
    /// [`VIRTIO_IOMMU_T_DETACH`].
    pub head: ReqHead,
    /// The domain.
    pub domain: U32,
    /// The endpoint.
    pub endpoint: U32,
    /// Not looked at.
    pub reserved: [u8; 8],
}
const _: () = assert!(size_of::<ReqDetach>() == 20);

impl ReqDetach {
    /// Detaches `endpoint` from `domain`.
    pub const fn new(domain: u32, endpoint: u32) -> Self {
        let (domain, endpoint) = (U32::new(domain), U32::new(endpoint));
        Self { head: ReqHead::new(VIRTIO_IOMMU_T_DETACH), domain, endpoint, reserved: [0; 8] }
    }
}

/// Read access is allowed (5.13.6.5).
pub const VIRTIO_IOMMU_MAP_F_READ: u32 = 1 << 0;
/// Write access is allowed (5.13.6.5).
pub const VIRTIO_IOMMU_MAP_F_WRITE: u32 = 1 << 1;
/// What is mapped is registers of a device, no memory (5.13.6.5).
pub const VIRTIO_IOMMU_MAP_F_MMIO: u32 = 1 << 2;

/// `struct virtio_iommu_req_map` without its tail (5.13.6.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReqMap {
    /// [`VIRTIO_IOMMU_T_MAP`].
    pub head: ReqHead,
    /// The domain.
    pub domain: U32,
    /// First address of the range.
    pub virt_start: U64,
    /// Last address of the range.
    pub virt_end: U64,
    /// The guest-physical address that `virt_start` leads to.
    pub phys_start: U64,
    /// `VIRTIO_IOMMU_MAP_F_*`.
    pub flags: U32,
}
const _: () = assert!(size_of::<ReqMap>() == 36 && offset_of!(ReqMap, phys_start) == 24);

impl ReqMap {
    /// Maps the addresses `virt` of `domain` to those from `phys_start` on.
    pub fn new(domain: u32, virt: RangeInclusive<u64>, phys_start: u64, flags: u32) -> Self {
        Self {
            head: ReqHead::new(VIRTIO_IOMMU_T_MAP),
            domain: U32::new(domain),
            virt_start: U64::new(*virt.start()),
            virt_end: U64::new(*virt.end()),
            phys_start: U64::new(phys_start),
            flags: U32::new(flags),
        }
    }
}

/// `struct virtio_iommu_req_unmap` without its tail (5.13.6.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReqUnmap {
    /// [`VIRTIO_IOMMU_T_UNMAP`].
    pub head: ReqHead,
    /// The domain.
    pub domain: U32,
    /// First address of the range.
    pub virt_start: U64,
    /// Last address of the range.
    pub virt_end: U64,
    /// 0.
    pub reserved: [u8; 4],
}
const _: () = assert!(size_of::<ReqUnmap>() == 28 && offset_of!(ReqUnmap, virt_end) == 16);

impl ReqUnmap {
    /// Unmaps the addresses `virt` of `domain`.
    pub fn new(domain: u32, virt: RangeInclusive<u64>) -> Self {
        Self {
            head: ReqHead::new(VIRTIO_IOMMU_T_UNMAP),
            domain: U32::new(domain),
            virt_start: U64::new(*virt.start()),
            virt_end: U64::new(*virt.end()),
            reserved: [0; 4],
        }
    }
}

/// `struct virtio_iommu_req_probe` without what the device writes (5.13.6.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReqProbe {
    /// [`VIRTIO_IOMMU_T_PROBE`].
    pub head: ReqHead,
    /// The endpoint.
    pub endpoint: U32,
    /// Not looked at.
    pub reserved: [u8; 64],
}
const _: () = assert!(size_of::<ReqProbe>() == 72);

impl ReqProbe {
    /// Asks for the properties of `endpoint`.
    pub const fn new(endpoint: u32) -> Self {
        Self { head: ReqHead::new(VIRTIO_IOMMU_T_PROBE), endpoint: U32::new(endpoint), reserved: [0; 64] }
    }
}

// --- 5.13.6.8 PROBE properties --------------------------------------------------

/// A property that is a range which cannot be mapped (5.13.6.8.1).
pub const VIRTIO_IOMMU_PROBE_T_RESV_MEM: u16 = 1;
/// The bits of a property's `kind` that are its type (5.13.6.7); the others are 0.
pub const VIRTIO_IOMMU_PROBE_T_MASK: u16 = 0xfff;

/// `struct virtio_iommu_probe_property` (5.13.6.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PropertyHead {
    /// 12 bits of type: `VIRTIO_IOMMU_PROBE_T_*`, 0 at the end of the list.
    pub kind: U16,
    /// Length of what follows, bytes.
    pub len: U16,
}
const _: () = assert!(size_of::<PropertyHead>() == 4);

/// The range is the device's own (5.13.6.8.1).
pub const VIRTIO_IOMMU_RESV_MEM_T_RESERVED: u8 = 0;
/// The range is the doorbell of message-signalled interrupts (5.13.6.8.1).
pub const VIRTIO_IOMMU_RESV_MEM_T_MSI: u8 = 1;

/// `struct virtio_iommu_probe_resv_mem` (5.13.6.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ResvMem {
    /// [`VIRTIO_IOMMU_PROBE_T_RESV_MEM`], 20 bytes.
    pub head: PropertyHead,
    /// `VIRTIO_IOMMU_RESV_MEM_T_*`.
    pub subtype: u8,
    /// 0.
    pub reserved: [u8; 3],
    /// First address.
    pub start: U64,
    /// Last address.
    pub end: U64,
}
const _: () = assert!(size_of::<ResvMem>() == 24 && offset_of!(ResvMem, start) == 8);

// --- 5.13.6.9 Fault reporting ---------------------------------------------------

/// The endpoint was in no domain (5.13.6.9).
pub const VIRTIO_IOMMU_FAULT_R_DOMAIN: u8 = 1;
/// The address was not mapped, or not for this access (5.13.6.9).
pub const VIRTIO_IOMMU_FAULT_R_MAPPING: u8 = 2;
/// The access was a read (5.13.6.9).
pub const VIRTIO_IOMMU_FAULT_F_READ: u32 = 1 << 0;
/// The access was a write (5.13.6.9).
pub const VIRTIO_IOMMU_FAULT_F_WRITE: u32 = 1 << 1;
/// `address` is there (5.13.6.9).
pub const VIRTIO_IOMMU_FAULT_F_ADDRESS: u32 = 1 << 8;

/// `struct virtio_iommu_fault` (5.13.6.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FaultReport {
    /// `VIRTIO_IOMMU_FAULT_R_*`.
    pub reason: u8,
    /// 0.
    pub reserved: [u8; 3],
    /// `VIRTIO_IOMMU_FAULT_F_*`.
    pub flags: U32,
    /// The endpoint.
    pub endpoint: U32,
    /// 0.
    pub reserved1: U32,
    /// The address.
    pub address: U64,
}
const _: () = assert!(size_of::<FaultReport>() == 24 && offset_of!(FaultReport, address) == 16);
