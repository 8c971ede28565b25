//! What a vhost-pci device looks like to its guest: numbers and layouts, no
//! behaviour. Section numbers are those of `docs/vhost-pci-device.md`.
//!
//! All multi-byte fields are little-endian. Every structure has a fixed size, no
//! implicit padding, and its offsets are asserted at compile time.

use core::mem::{offset_of, size_of};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Declares a little-endian integer that keeps the alignment of the native one,
/// so that a field can be read by a single load.
macro_rules! little_endian {
    ($name:ident, $native:ty) => {
        #[doc = concat!("A little-endian `", stringify!($native), "` of natural alignment.")]
        #[repr(transparent)]
        #[derive(Clone, Copy, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
        pub struct $name($native);

        impl $name {
            /// Stores a native value in little-endian order.
            pub const fn new(value: $native) -> Self {
                Self(value.to_le())
            }

            /// The value in native order.
            pub const fn value(self) -> $native {
                <$native>::from_le(self.0)
            }
        }

        impl From<$native> for $name {
            fn from(value: $native) -> Self {
                Self::new(value)
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, "{:#x}", self.value())
            }
        }
    };
}
little_endian!(Le16, u16);
little_endian!(Le32, u32);
little_endian!(Le64, u64);

// --- 2 Identity -----------------------------------------------------------

/// The PCI vendor of every virtio device (virtio 1.3, 4.1.2).
pub const PCI_VENDOR_ID: u16 = 0x1af4;
/// The virtio device number under which an unmodified QEMU presents the device
/// (section 2): a number that QEMU has a name for and Linux has no driver for.
/// A driver recognises the device by [`DeviceConfig::magic`], not by this.
pub const VIRTIO_ID_STAND_IN: u16 = 38;
/// The PCI device number that follows from [`VIRTIO_ID_STAND_IN`].
pub const PCI_DEVICE_ID_STAND_IN: u16 = 0x1040 + VIRTIO_ID_STAND_IN;
/// The `shmid` of the VIRTIO shared-memory region that is the window (virtio
/// 1.3, 4.1.4.7).
pub const SHMID_WINDOW: u8 = 0;
/// Page size of everything in the window, bytes. Mappings start and end on it.
pub const PAGE_SIZE: u64 = 4096;

// --- 3 Virtqueues: notification pairs ---------------------------------------

/// The virtqueue whose notifications belong to the control ring (section 3).
pub const QUEUE_CONTROL: u16 = 0;
/// The virtqueue that stands for the owner's vring 0; vring `i` has
/// `QUEUE_VRING_FIRST + i` (section 3).
pub const QUEUE_VRING_FIRST: u16 = 1;

/// The device's virtqueue for the owner's vring number `vring`.
pub const fn queue_of_vring(vring: u16) -> u16 {
    QUEUE_VRING_FIRST + vring
}

// --- 5 Config space -----------------------------------------------------------

/// `"VPCI"`, little-endian: [`DeviceConfig::magic`].
pub const CONFIG_MAGIC: u32 = u32::from_le_bytes(*b"VPCI");
/// The version of this layout: [`DeviceConfig::version`] and [`LinkHeader::version`].
pub const ABI_VERSION: u16 = 1;

/// The device-specific configuration space (section 5). Read-only and constant
/// while the device exists.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DeviceConfig {
    /// [`CONFIG_MAGIC`].
    pub magic: Le32,
    /// [`ABI_VERSION`].
    pub version: Le16,
    /// How many of the owner's vrings the device can show. Its virtqueues are
    /// one more.
    pub max_vrings: Le16,
    /// Length of the window, bytes.
    pub window_len: Le64,
    /// Where the link area starts, as window offset.
    pub link_offset: Le64,
    /// Length of the link area, bytes.
    pub link_len: Le64,
    /// Where the control area starts, as window offset.
    pub control_offset: Le64,
    /// Length of the control area, bytes.
    pub control_len: Le64,
    /// The first window offset at which the owner's memory can appear.
    pub data_offset: Le64,
    /// How many mappings the link area has room for.
    pub max_mappings: Le32,
    /// Zero.
    pub reserved: Le32,
}

/// Length of [`DeviceConfig`], bytes: `config_size` for QEMU.
pub const CONFIG_LEN: usize = size_of::<DeviceConfig>();

const _: () = {
    assert!(CONFIG_LEN == 64);
    assert!(offset_of!(DeviceConfig, window_len) == 8);
    assert!(offset_of!(DeviceConfig, data_offset) == 48);
    assert!(offset_of!(DeviceConfig, max_mappings) == 56);
};

// --- 6 The window ----------------------------------------------------------------

/// Window offset of the link area.
pub const LINK_OFFSET: u64 = 0;
/// Length of the link area, bytes.
pub const LINK_LEN: u64 = 64 << 10;
/// Window offset of the control area.
pub const CONTROL_OFFSET: u64 = LINK_OFFSET + LINK_LEN;
/// Length of the control area, bytes: most of it is room for what FETCH and STORE
/// carry (section 9.4).
pub const CONTROL_LEN: u64 = 256 << 10;
/// Window offset of the two witness pages (section 6.4): the driver leaves them alone.
pub const WITNESS_OFFSET: u64 = CONTROL_OFFSET + CONTROL_LEN;
/// Window offset of the fence page (section 6.4): the driver leaves it alone.
pub const FENCE_OFFSET: u64 = WITNESS_OFFSET + 2 * PAGE_SIZE;
/// Window offset of an owner's dirty log that is not longer than [`MAX_LOW_LOG`]; a longer one is at
/// the end of the window (section 6.3). The driver takes it from [`LinkHeader::log`].
pub const LOG_OFFSET: u64 = 512 << 10;
/// The longest dirty log at [`LOG_OFFSET`], bytes: that of 48 GiB of guest-physical addresses.
pub const MAX_LOW_LOG: u64 = DATA_OFFSET - LOG_OFFSET;
/// Window offset from which on the owner's memory appears: a multiple of 2 MiB,
/// so that offsets keep the alignment that large pages need.
pub const DATA_OFFSET: u64 = 2 << 20;

const _: () = {
    assert!(LINK_OFFSET + LINK_LEN <= CONTROL_OFFSET);
    assert!(CONTROL_OFFSET + CONTROL_LEN <= WITNESS_OFFSET);
    assert!(FENCE_OFFSET + PAGE_SIZE <= LOG_OFFSET && LOG_OFFSET < DATA_OFFSET);
};

// --- 7 The link page ---------------------------------------------------------------

/// `"VPLP"`, little-endian: [`LinkHeader::magic`]. An unmapped window reads as
/// zero, so the link area exists from the moment this value is read.
pub const LINK_MAGIC: u32 = u32::from_le_bytes(*b"VPLP");

/// [`LinkHeader::status`]: the owner's VMM is connected to the broker.
pub const LINK_S_OWNER: u32 = 1 << 0;
/// [`LinkHeader::status`]: every mapping of the table is in place and the vrings
/// may be used.
pub const LINK_S_UP: u32 = 1 << 1;
/// [`LinkHeader::status`]: the owner has an IOMMU. The table holds what is mapped now;
/// it changes while the link is up, and [`CTRL_MAP`] asks for what it lacks.
pub const LINK_S_IOMMU: u32 = 1 << 2;
/// [`LinkHeader::status`]: ranges that the owner allows one direction of access to
/// only are not mapped: [`CTRL_FETCH`] and [`CTRL_STORE`] reach them.
pub const LINK_S_COPY: u32 = 1 << 3;
/// [`LinkHeader::status`]: the owner is being migrated, and its VMM wants to know each page that the
/// driver writes: by bits of the dirty log at [`LinkHeader::log`] (section 8.7).
pub const LINK_S_LOG: u32 = 1 << 4;

/// The link page: the header of the link area (section 7.1). Written by the
/// device only.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct LinkHeader {
    /// [`LINK_MAGIC`].
    pub magic: Le32,
    /// [`ABI_VERSION`].
    pub version: Le16,
    /// Length of this header, bytes.
    pub header_len: Le16,
    /// Odd while the device changes the link area, even otherwise; larger after
    /// each change but those of the mapping table alone (section 7.2).
    pub generation: Le64,
    /// `LINK_S_*` bits.
    pub status: Le32,
    /// The virtio device number of the owner's device, 1 for a network card.
    pub owner_device: Le32,
    /// The virtio features that the owner's driver accepted.
    pub features: Le64,
    /// Entries of the mapping table in use.
    pub mapping_count: Le32,
    /// Where the mapping table starts, bytes from the start of the link area.
    pub mapping_table: Le32,
    /// Entries of the vring table in use.
    pub vring_count: Le32,
    /// Where the vring table starts, bytes from the start of the link area.
    pub vring_table: Le32,
    /// Odd while the device changes the mapping table or `mapping_count`, even
    /// otherwise; larger after each change (section 7.2).
    pub table_generation: Le64,
    /// The number that the link's doorbell page has as well ([`DoorbellHeader::link_id`]);
    /// 0: the link has no doorbell function.
    pub link_id: Le64,
    /// Length of the copy of the owner's device-specific configuration space, bytes, at most
    /// [`MAX_OWNER_CONFIG`]; 0: there is none.
    pub config_len: Le32,
    /// Where that copy starts, bytes from the start of the link area.
    pub config: Le32,
    /// Window offset of the owner's dirty log; 0 without [`LINK_S_LOG`].
    pub log: Le64,
    /// Length of the dirty log, bytes; 0 without [`LINK_S_LOG`].
    pub log_len: Le64,
}

/// Where the device puts the copy of the owner's configuration space, bytes from the start of the
/// link area.
pub const OWNER_CONFIG: u32 = 256;
/// The most bytes of that copy.
pub const MAX_OWNER_CONFIG: u32 = 256;
/// Where the device puts the vring table, bytes from the start of the link area.
pub const VRING_TABLE: u32 = 4096;
/// Vring entries that the link area has room for.
pub const MAX_VRINGS: u16 = 64;
/// Where the device puts the mapping table, bytes from the start of the link area.
pub const MAPPING_TABLE: u32 = 8192;
/// Mapping entries that the link area has room for.
pub const MAX_MAPPINGS: u32 = ((LINK_LEN - MAPPING_TABLE as u64) / size_of::<Mapping>() as u64) as u32;

const _: () = {
    assert!(size_of::<LinkHeader>() == 88);
    assert!(offset_of!(LinkHeader, generation) == 8);
    assert!(offset_of!(LinkHeader, status) == 16);
    assert!(offset_of!(LinkHeader, features) == 24);
    assert!(offset_of!(LinkHeader, mapping_count) == 32);
    assert!(offset_of!(LinkHeader, vring_count) == 40);
    assert!(offset_of!(LinkHeader, table_generation) == 48);
    assert!(offset_of!(LinkHeader, link_id) == 56);
    assert!(offset_of!(LinkHeader, config_len) == 64);
    assert!(offset_of!(LinkHeader, config) == 68);
    assert!(offset_of!(LinkHeader, log) == 72);
    assert!(offset_of!(LinkHeader, log_len) == 80);
    assert!(size_of::<LinkHeader>() <= OWNER_CONFIG as usize);
    assert!(OWNER_CONFIG + MAX_OWNER_CONFIG <= VRING_TABLE);
    assert!(MAPPING_TABLE as u64 + MAX_MAPPINGS as u64 * 32 <= LINK_LEN);
    assert!(VRING_TABLE as usize + MAX_VRINGS as usize * size_of::<Vring>() <= MAPPING_TABLE as usize);
};

/// [`Mapping::access`]: the driver may load from the range.
pub const ACCESS_READ: u32 = 1 << 0;
/// [`Mapping::access`]: the driver may store to the range.
pub const ACCESS_WRITE: u32 = 1 << 1;

/// One range of the owner's memory with its place in the window (section 7.3).
/// The table is sorted by `iova` and its ranges do not overlap.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Mapping {
    /// First address of the range, as the owner's driver names it.
    pub iova: Le64,
    /// Length, bytes; a multiple of [`PAGE_SIZE`], never 0.
    pub len: Le64,
    /// Where `iova` is in the window.
    pub window_offset: Le64,
    /// `ACCESS_*` bits.
    pub access: Le32,
    /// Number of the range's first page in the dirty log: its guest-physical address in the owner,
    /// divided by [`PAGE_SIZE`]. 0 without [`LINK_S_LOG`].
    pub log_page: Le32,
}

const _: () = {
    assert!(size_of::<Mapping>() == 32);
    assert!(offset_of!(Mapping, access) == 24);
    assert!(offset_of!(Mapping, log_page) == 28);
};

/// [`Vring::flags`]: the owner's front-end has started and enabled the vring.
pub const VRING_F_ENABLED: u32 = 1 << 0;

/// One of the owner's vrings (section 7.4). Addresses are IOVAs.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Vring {
    /// `VRING_F_*` bits.
    pub flags: Le32,
    /// Entries; at most 32768, and a power of two in a split ring (virtio 1.3, 2.7, 2.8).
    pub size: Le32,
    /// IOVA of the descriptor table, or of a packed ring's descriptors (descriptor area).
    pub desc: Le64,
    /// IOVA of the available ring, or of a packed ring's driver event suppression (driver
    /// area).
    pub avail: Le64,
    /// IOVA of the used ring, or of a packed ring's device event suppression (device area).
    pub used: Le64,
    /// What the owner's front-end named when it started the vring: an available index, or
    /// two places of a packed ring. A driver starts where the ring itself says (section
    /// 8.2).
    pub base: Le32,
    /// Zero.
    pub reserved: [Le32; 7],
}

const _: () = {
    assert!(size_of::<Vring>() == 64);
    assert!(offset_of!(Vring, desc) == 8);
    assert!(offset_of!(Vring, base) == 32);
};

// --- 9 The control ring ---------------------------------------------------------------

/// Entries of the control ring (section 9.1).
pub const CONTROL_RING_SIZE: u16 = 64;
/// Descriptor table of the control ring, bytes from the start of the control area.
pub const CONTROL_DESC: u64 = 0;
/// Available ring of the control ring, bytes from the start of the control area.
pub const CONTROL_AVAIL: u64 = 1024;
/// Used ring of the control ring, bytes from the start of the control area.
pub const CONTROL_USED: u64 = 1280;
/// From here to its two words at the end the control area is the driver's, for buffers.
pub const CONTROL_BUFFERS: u64 = 2048;
/// The driver's mark, 8 bytes: bytes from the *end* of the control area (section 9.1).
pub const CONTROL_MARK_FROM_END: u64 = 8;
/// The driver's word of which generation of the link it serves at this moment, 8 bytes: bytes from the
/// *end* of the control area (section 9.1).
pub const CONTROL_SERVED_FROM_END: u64 = 16;

const _: () = {
    assert!(CONTROL_DESC + 16 * CONTROL_RING_SIZE as u64 <= CONTROL_AVAIL);
    assert!(CONTROL_AVAIL + 6 + 2 * CONTROL_RING_SIZE as u64 <= CONTROL_USED);
    assert!(CONTROL_USED + 6 + 8 * CONTROL_RING_SIZE as u64 <= CONTROL_BUFFERS);
    assert!(CONTROL_BUFFERS + CONTROL_SERVED_FROM_END <= CONTROL_LEN);
};

/// [`ControlRequest::command`]: the driver serves the vrings of the generation in
/// `value` (section 9.2).
pub const CTRL_ATTACH: u16 = 1;
/// [`ControlRequest::command`]: the driver has let go of all vrings.
pub const CTRL_DETACH: u16 = 2;
/// [`ControlRequest::command`]: the driver found a vring broken and stopped
/// serving it; `kind` is a `FAULT_*` number and `value` what was seen.
pub const CTRL_FAULT: u16 = 3;

/// [`ControlRequest::command`]: the driver needs the `len` bytes from the IOVA in
/// `value` on in the window, for the `ACCESS_*` in `flags` (section 9.4).
pub const CTRL_MAP: u16 = 4;
/// [`ControlRequest::command`]: copy the `len` bytes from the IOVA in `value` on into
/// the device-writable part of the chain, behind the response (section 9.4).
pub const CTRL_FETCH: u16 = 5;
/// [`ControlRequest::command`]: copy the `len` bytes behind the request in the
/// device-readable part of the chain to the IOVA in `value` (section 9.4).
pub const CTRL_STORE: u16 = 6;

/// [`ControlRequest::command`]: the driver's device has let go of all that is not in the mapping
/// table of the `table_generation` in `value` (section 9.5).
pub const CTRL_RELEASE: u16 = 7;

/// The most bytes of one [`CTRL_FETCH`] or [`CTRL_STORE`].
pub const MAX_COPY: u32 = 64 << 10;
/// The most bytes of one [`CTRL_MAP`].
pub const MAX_MAP: u64 = 1 << 20;

/// [`ControlRequest::flags`] of [`CTRL_ATTACH`]: the driver waits for interrupts.
/// Without it, it polls.
pub const ATTACH_F_INTERRUPT: u32 = 1 << 0;
/// [`ControlRequest::flags`] of [`CTRL_ATTACH`]: the driver has the link's doorbell
/// function, which has [`ControlRequest::len`] MSI-X vectors (section 12).
pub const ATTACH_F_DOORBELL: u32 = 1 << 1;
/// [`ControlRequest::flags`] of [`CTRL_ATTACH`]: a device of the peer's VM uses the window. What is
/// to leave it stays until the driver says [`CTRL_RELEASE`] (section 9.5).
pub const ATTACH_F_QUIESCE: u32 = 1 << 2;
/// [`ControlRequest::flags`] of [`CTRL_ATTACH`]: the driver keeps its word of what it serves
/// ([`CONTROL_SERVED_FROM_END`]).
pub const ATTACH_F_SERVED: u32 = 1 << 3;

/// The device-readable part of a control buffer (section 9.2).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ControlRequest {
    /// `CTRL_*` number.
    pub command: Le16,
    /// The owner's vring that the command is about; 0 where it is about none.
    pub vring: Le16,
    /// Bits that depend on the command.
    pub flags: Le32,
    /// `FAULT_*` number of [`CTRL_FAULT`]; 0 elsewhere.
    pub kind: Le32,
    /// Zero.
    pub reserved: Le32,
    /// What the command carries.
    pub value: Le64,
    /// Bytes that the command is about; 0 where it is about none.
    pub len: Le64,
}

/// [`ControlResponse::status`]: done.
pub const CTRL_OK: u32 = 0;
/// [`ControlResponse::status`]: the command's number is not known.
pub const CTRL_UNKNOWN: u32 = 1;
/// [`ControlResponse::status`]: a field has a value that the command does not allow.
pub const CTRL_INVALID: u32 = 2;
/// [`ControlResponse::status`]: the generation is not the current one.
pub const CTRL_STALE: u32 = 3;
/// [`ControlResponse::status`]: the owner's IOMMU does not allow the access.
pub const CTRL_DENIED: u32 = 4;
/// [`ControlResponse::status`] of [`CTRL_MAP`]: allowed, but this device cannot map it
/// with its access: FETCH or STORE reach it.
pub const CTRL_COPY: u32 = 5;
/// [`ControlResponse::status`]: too many denials lately; the owner was not asked.
pub const CTRL_BUSY: u32 = 6;
/// [`ControlResponse::status`]: the window has no room for it.
pub const CTRL_NO_ROOM: u32 = 7;
/// [`ControlResponse::status`]: the owner's side did not answer, or left.
pub const CTRL_FAILED: u32 = 8;

/// [`ControlResponse::flags`]: the mapping table has changed since the command before.
pub const RESPONSE_F_TABLE: u32 = 1 << 0;

/// The device-writable part of a control buffer (section 9.2).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ControlResponse {
    /// `CTRL_OK` or another result.
    pub status: Le32,
    /// `RESPONSE_F_*` bits.
    pub flags: Le32,
}

const _: () = {
    assert!(size_of::<ControlRequest>() == 32);
    assert!(offset_of!(ControlRequest, value) == 16);
    assert!(offset_of!(ControlRequest, len) == 24);
    assert!(size_of::<ControlResponse>() == 8);
};

/// What a driver can find wrong with a vring (section 9.3): the number in
/// [`ControlRequest::kind`], and its name in `status`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FaultKind {
    /// The available index is ahead of the used index by more than the ring's size.
    AvailJump = 1,
    /// The head of a chain, or the `next` of a descriptor, is not inside its table.
    DescriptorIndex = 2,
    /// A chain has more descriptors than the ring (or table) it is in: it loops.
    ChainTooLong = 3,
    /// A buffer, or a part of it, is in no mapping.
    Unmapped = 4,
    /// A buffer is in a mapping that does not allow the access.
    Access = 5,
    /// A device-readable descriptor follows a device-writable one, or the chain's
    /// direction is not the queue's.
    Direction = 6,
    /// An indirect table is empty, not a multiple of a descriptor, too long,
    /// nested, or in a chain with a `next`.
    Indirect = 7,
    /// A chain is too short for the packet header, or describes more than the
    /// largest packet.
    Length = 8,
    /// The vring's geometry in the link page cannot be used.
    Geometry = 9,
}

impl FaultKind {
    /// Every kind, in the order of the numbers.
    pub const ALL: [Self; 9] = [
        Self::AvailJump,
        Self::DescriptorIndex,
        Self::ChainTooLong,
        Self::Unmapped,
        Self::Access,
        Self::Direction,
        Self::Indirect,
        Self::Length,
        Self::Geometry,
    ];

    /// The kind with this number.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u32 == number)
    }

    /// The name that `status` and logs use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::AvailJump => "avail_jump",
            Self::DescriptorIndex => "descriptor_index",
            Self::ChainTooLong => "chain_too_long",
            Self::Unmapped => "unmapped",
            Self::Access => "access",
            Self::Direction => "direction",
            Self::Indirect => "indirect",
            Self::Length => "length",
            Self::Geometry => "geometry",
        }
    }
}

// --- 12 The doorbell function ------------------------------------------------------------

/// The PCI vendor of QEMU's `ivshmem-doorbell`.
pub const DOORBELL_VENDOR_ID: u16 = 0x1af4;
/// The PCI device number of QEMU's `ivshmem-doorbell`.
pub const DOORBELL_DEVICE_ID: u16 = 0x1110;
/// The doorbell register, bytes from the start of the function's BAR 0: 32 bits wide.
pub const DOORBELL_REGISTER: u64 = 12;
/// The function's BAR with the doorbell page.
pub const DOORBELL_PAGE_BAR: u8 = 2;
/// Length of the doorbell page, bytes.
pub const DOORBELL_PAGE_LEN: u64 = PAGE_SIZE;
/// `"VPDB"`, little-endian: [`DoorbellHeader::magic`].
pub const DOORBELL_MAGIC: u32 = u32::from_le_bytes(*b"VPDB");

/// The start of the doorbell page (section 12.2). Written by the device only.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DoorbellHeader {
    /// [`DOORBELL_MAGIC`].
    pub magic: Le32,
    /// [`ABI_VERSION`].
    pub version: Le16,
    /// Length of this header, bytes.
    pub header_len: Le16,
    /// The link whose notifications the function carries: [`LinkHeader::link_id`].
    pub link_id: Le64,
    /// Odd while the device changes the page, even otherwise; larger after each change.
    pub generation: Le64,
    /// Entries in use: one for each of the owner's vrings.
    pub vring_count: Le32,
    /// Where the entries start, bytes from the start of the page.
    pub entries: Le32,
    /// Zero.
    pub reserved: [Le64; 4],
}

/// Where the device puts the entries, bytes from the start of the doorbell page.
pub const DOORBELL_ENTRIES: u32 = 64;

/// [`DoorbellEntry::flags`]: the owner's kicks arrive as MSI-X vector
/// [`DoorbellEntry::vector`] of the doorbell function.
pub const DOORBELL_F_KICK: u32 = 1 << 0;
/// [`DoorbellEntry::flags`]: a store of [`DoorbellEntry::doorbell`] to the doorbell register is
/// a call to the owner.
pub const DOORBELL_F_CALL: u32 = 1 << 1;

/// How the notifications of one of the owner's vrings go (section 12.2).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DoorbellEntry {
    /// `DOORBELL_F_*` bits. What has no bit goes by the virtqueue of section 3.
    pub flags: Le32,
    /// An MSI-X vector of the doorbell function.
    pub vector: Le32,
    /// A value for the doorbell register.
    pub doorbell: Le32,
    /// Zero.
    pub reserved: Le32,
}

const _: () = {
    assert!(size_of::<DoorbellHeader>() == 64);
    assert!(offset_of!(DoorbellHeader, link_id) == 8);
    assert!(offset_of!(DoorbellHeader, generation) == 16);
    assert!(offset_of!(DoorbellHeader, vring_count) == 24);
    assert!(size_of::<DoorbellEntry>() == 16);
    assert!(
        DOORBELL_ENTRIES as u64 + MAX_VRINGS as u64 * size_of::<DoorbellEntry>() as u64 <= DOORBELL_PAGE_LEN
    );
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_numbers_are_unique_and_found_again() {
        for (position, kind) in FaultKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, position + 1);
            assert_eq!(FaultKind::from_number(kind as u32), Some(kind));
        }
        assert_eq!(FaultKind::from_number(0), None);
    }
}
