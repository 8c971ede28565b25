//! What a front-end or a guest can do wrong on a link. Every fault is counted
//! under its kind's name, ends in one log line that names the link, and reaches no
//! other link.

use iommu::{LayoutError, MapError, MemoryError};
use thiserror::Error;
use vhost_pci_device::abi;

use super::message::Flood;

/// Something that one side of a link did wrong, or failed to do.
#[derive(Debug, Error)]
pub enum Fault {
    /// Bytes or descriptors that are no valid vhost-user message.
    #[error("not a valid vhost-user message: {0}")]
    Message(String),
    /// A message that this back-end does not take part in.
    #[error("{0} was not negotiated or is not supported by this back-end")]
    Unsupported(&'static str),
    /// A request about the owner's configuration space that cannot be carried out.
    #[error("configuration space: {0}")]
    Config(String),
    /// A message that has no place in the present state.
    #[error("{0}")]
    OutOfOrder(String),
    /// Two front-ends want the same place.
    #[error("one VMM more than may be connected here was turned away: another has to leave before")]
    Occupied,
    /// Somebody connected who may not join.
    #[error(
        "process {pid} of user {uid} was turned away: the configuration does not let this user join here"
    )]
    NotPermitted {
        /// The process.
        pid: i32,
        /// Its user.
        uid: u32,
    },
    /// A side asked for features that were not offered.
    #[error("features {0:#x} were acknowledged but not offered")]
    Features(u64),
    /// A memory region that cannot be taken.
    #[error("memory region refused: {0}{remedy}", remedy = remedy(.0))]
    Memory(#[from] MemoryError),
    /// The address map that follows from the memory table is impossible.
    #[error("address map refused: {0}")]
    Map(#[from] MapError),
    /// A descriptor of the wrong kind.
    #[error("{0}")]
    Descriptor(String),
    /// Memory that its VMM can take away while the peer's VM has it mapped.
    #[error(
        "memory region refused: the VMM can shorten its file, and what the peer's VM has mapped of it would then \
         stop or kill that VM: use a sealed memfd (QEMU's memory-backend-memfd with share=on is one), or, if the \
         peer trusts this owner, set unsealed_memory = true in the link's configuration"
    )]
    Unsealed,
    /// A dirty log that cannot be used.
    #[error("dirty log refused, so that the owner cannot be migrated: {0}")]
    Log(String),
    /// Something comes more often than it may.
    #[error("more than {limit} {} a second come; they are taken no faster ({} in the link's configuration)", flood.name(), flood.key())]
    TooOften {
        /// What.
        flood: Flood,
        /// How often it may, a second.
        limit: u32,
    },
    /// The broker's host did not let it look at what was sent: nobody's fault.
    #[error("{0}")]
    Host(String),
    /// A vring index, size or address that cannot be used.
    #[error("vring {index}: {reason}")]
    Vring {
        /// The vring's number.
        index: u32,
        /// What is wrong with it.
        reason: String,
    },
    /// An IOTLB message or a pushed mapping that cannot be taken.
    #[error("IOMMU: {0}")]
    Iommu(String),
    /// The owner's memory does not fit the window.
    #[error("the owner's memory does not fit the window: {0}")]
    Window(#[from] LayoutError),
    /// The peer's VMM refused a change of its window.
    #[error("the peer's VMM refused to {0}")]
    Refused(String),
    /// The peer's VMM did not confirm a change of its window in time.
    #[error("the peer's VMM did not confirm within {0} ms that the window changed")]
    Unconfirmed(u128),
    /// The peer's driver did not say in time that its device has let go of what leaves the window.
    #[error(
        "the peer's driver did not release within {0} ms what it had lent to a device of its VM; it is taken \
         away all the same"
    )]
    Unreleased(u128),
    /// The peer's VMM did not answer a change of its wiring in time, or did not take back what it
    /// must.
    #[error("the peer's VMM {0}")]
    Wiring(String),
    /// The VMM with the link's doorbell function sent something.
    #[error(
        "the VMM with the doorbell function sent something, which QEMU never does; notifications are relayed until it hangs up"
    )]
    DoorbellSpoke,
    /// The VMM with the link's doorbell function did not read what it was sent in time.
    #[error(
        "the VMM with the doorbell function did not read within {0} ms what it was sent; notifications are relayed until it hangs up"
    )]
    DoorbellUnread(u128),
    /// The peer's driver broke a rule of the control ring.
    #[error("control ring: {0}")]
    ControlRing(String),
    /// The peer's driver found one of the owner's vrings broken.
    #[error("the peer's driver found vring {vring} broken: {} (saw {value:#x})", kind.name())]
    Ring {
        /// The owner's vring.
        vring: u16,
        /// What is broken.
        kind: abi::FaultKind,
        /// What the driver saw.
        value: u64,
    },
}

/// What an operator can do about it.
fn remedy(error: &MemoryError) -> &'static str {
    match error {
        MemoryError::TooMany { .. } => " (memory_regions in the link's configuration)",
        _ => "",
    }
}

impl Fault {
    /// The name under which `status` counts the fault.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Message(_) => "message",
            Self::Unsupported(_) => "unsupported",
            Self::Config(_) => "config",
            Self::OutOfOrder(_) => "out_of_order",
            Self::Occupied => "occupied",
            Self::NotPermitted { .. } => "not_permitted",
            Self::Features(_) => "features",
            Self::Memory(_) | Self::Map(_) => "memory_region",
            Self::Unsealed => "unsealed_memory",
            Self::Log(_) => "dirty_log",
            Self::TooOften { flood, .. } => flood.key(),
            Self::Descriptor(_) => "descriptor",
            Self::Host(_) => "host",
            Self::Vring { .. } => "vring",
            Self::Iommu(_) => "iommu",
            Self::Window(_) => "window_too_small",
            Self::Refused(_) => "window_refused",
            Self::Unconfirmed(_) => "window_unconfirmed",
            Self::Unreleased(_) => "window_unreleased",
            Self::Wiring(_) => "wiring",
            Self::DoorbellSpoke | Self::DoorbellUnread(_) => "doorbell",
            Self::ControlRing(_) => "control_ring",
            Self::Ring { kind, .. } => match kind {
                abi::FaultKind::AvailJump => "ring_avail_jump",
                abi::FaultKind::DescriptorIndex => "ring_descriptor_index",
                abi::FaultKind::ChainTooLong => "ring_chain_too_long",
                abi::FaultKind::Unmapped => "ring_unmapped",
                abi::FaultKind::Access => "ring_access",
                abi::FaultKind::Direction => "ring_direction",
                abi::FaultKind::Indirect => "ring_indirect",
                abi::FaultKind::Length => "ring_length",
                abi::FaultKind::Geometry => "ring_geometry",
            },
        }
    }
}
