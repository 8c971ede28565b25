//! What crosses the link's border: requests of the two front-ends and the answers,
//! events from the runtime and the effects that it has to run.
//!
//! Everything here is data. A [`Request`] came through syntax checks (sizes,
//! number and kind of descriptors); whether it makes sense is the link's to judge.

use std::os::unix::net::UnixStream;

use iommu::{Access, Iova, Placement, WindowOffset};
use vhost_pci_device::abi;

use super::descriptor::{Eventfd, MemoryFile};
use super::doorbell::DoorbellMessage;
use super::fault::Fault;
use super::iommu::demand::Task;
use super::iommu::iotlb::Piece;
use super::log::{DirtyLog, Pages, PlacedLog};
use super::vring::Format;
use super::wiring::{WireId, WireRequest};

/// One of a link's two front-ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// The VMM whose memory is shared.
    Owner,
    /// The VMM that shows it to its guest.
    Peer,
}

impl Side {
    /// The name in logs and `status`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Owner => "owner",
            Self::Peer => "peer",
        }
    }
}

/// A memory region as a front-end describes it (vhost-user: Single memory region
/// description).
#[derive(Debug)]
pub struct RegionRequest {
    /// Guest-physical address of its first byte.
    pub guest: u64,
    /// Front-end virtual address of its first byte.
    pub frontend: u64,
    /// Length, bytes.
    pub len: u64,
    /// Where it starts in the file.
    pub offset: u64,
    /// The file.
    pub file: MemoryFile,
    /// The file's length when the message came, bytes.
    pub file_len: u64,
}

/// A vhost-user request of a front-end.
#[derive(Debug)]
pub enum Request {
    /// VHOST_USER_SET_OWNER.
    SetOwner,
    /// VHOST_USER_RESET_OWNER.
    ResetOwner,
    /// VHOST_USER_GET_FEATURES.
    GetFeatures,
    /// VHOST_USER_SET_FEATURES.
    SetFeatures(u64),
    /// VHOST_USER_GET_PROTOCOL_FEATURES.
    GetProtocolFeatures,
    /// VHOST_USER_SET_PROTOCOL_FEATURES.
    SetProtocolFeatures(u64),
    /// VHOST_USER_GET_QUEUE_NUM.
    GetQueueNum,
    /// VHOST_USER_GET_MAX_MEM_SLOTS.
    GetMaxMemSlots,
    /// VHOST_USER_SET_MEM_TABLE.
    SetMemTable(Vec<RegionRequest>),
    /// VHOST_USER_ADD_MEM_REG.
    AddMemReg(RegionRequest),
    /// VHOST_USER_REM_MEM_REG.
    RemMemReg {
        /// Guest-physical address of the region.
        guest: u64,
        /// Front-end virtual address of the region.
        frontend: u64,
        /// Length, bytes.
        len: u64,
    },
    /// VHOST_USER_SET_LOG_BASE.
    SetLogBase {
        /// The log's file.
        file: MemoryFile,
        /// The file's length when the message came, bytes.
        file_len: u64,
        /// Where the log starts in the file.
        offset: u64,
        /// Its length, bytes.
        len: u64,
    },
    /// VHOST_USER_SET_VRING_NUM.
    SetVringNum {
        /// The vring.
        index: u32,
        /// Entries.
        num: u32,
    },
    /// VHOST_USER_SET_VRING_ADDR; addresses are front-end virtual.
    SetVringAddr {
        /// The vring.
        index: u32,
        /// Descriptor table.
        desc: u64,
        /// Available ring.
        avail: u64,
        /// Used ring.
        used: u64,
    },
    /// VHOST_USER_SET_VRING_BASE.
    SetVringBase {
        /// The vring.
        index: u32,
        /// Where the vring goes on: for split rings the next available index, for packed ones
        /// both places with their wrap counters (vhost-user, SET_VRING_BASE).
        base: u32,
    },
    /// VHOST_USER_GET_VRING_BASE.
    GetVringBase {
        /// The vring.
        index: u32,
    },
    /// VHOST_USER_SET_VRING_KICK.
    SetVringKick {
        /// The vring.
        index: u32,
        /// None: the vring is to be polled.
        fd: Option<Eventfd>,
    },
    /// VHOST_USER_SET_VRING_CALL.
    SetVringCall {
        /// The vring.
        index: u32,
        /// None: nobody waits.
        fd: Option<Eventfd>,
    },
    /// VHOST_USER_SET_VRING_ERR.
    SetVringErr {
        /// The vring.
        index: u32,
        /// None: nobody waits.
        fd: Option<Eventfd>,
    },
    /// VHOST_USER_SET_VRING_ENABLE.
    SetVringEnable {
        /// The vring.
        index: u32,
        /// Whether it is to be served.
        enable: bool,
    },
    /// VHOST_USER_GET_CONFIG.
    GetConfig {
        /// First byte.
        offset: u32,
        /// Bytes.
        len: u32,
    },
    /// VHOST_USER_SET_CONFIG.
    SetConfig,
    /// VHOST_USER_GET_SHMEM_CONFIG.
    GetShmemConfig,
    /// VHOST_USER_SET_BACKEND_REQ_FD.
    SetBackendChannel(UnixStream),
    /// VHOST_USER_IOTLB_MSG.
    Iotlb(IotlbMessage),
    /// VHOST_USER_IOMMU_PUSH (`docs/vhost-user-extensions.md`).
    IommuPush {
        /// Everything that was pushed before is unmapped first.
        reset: bool,
        /// Changes, in this order.
        entries: Vec<PushEntry>,
    },
}

/// `struct vhost_iotlb_msg`: a change of the owner's IOMMU that concerns a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IotlbMessage {
    /// First address.
    pub iova: u64,
    /// Length, bytes.
    pub size: u64,
    /// Where it is in the front-end's process.
    pub frontend: u64,
    /// `VHOST_ACCESS_*`: 1 to read, 2 to write, 3 both.
    pub perm: u8,
    /// `VHOST_IOTLB_*`: 1 miss, 2 update, 3 invalidate, 4 access fail.
    pub kind: u8,
}

impl IotlbMessage {
    /// A back-end does not know a translation.
    pub const MISS: u8 = 1;
    /// A front-end tells one.
    pub const UPDATE: u8 = 2;
    /// A front-end takes one back.
    pub const INVALIDATE: u8 = 3;
    /// A back-end found that a translation does not allow the access.
    pub const ACCESS_FAIL: u8 = 4;
}

/// An entry of VHOST_USER_IOMMU_PUSH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PushEntry {
    /// First address.
    pub iova: u64,
    /// Length, bytes.
    pub size: u64,
    /// Where it is in the front-end's process.
    pub frontend: u64,
    /// 0: the range is unmapped. Else as [`IotlbMessage::perm`].
    pub perm: u8,
}

/// The answer to a [`Request`].
#[derive(Debug)]
pub enum Reply {
    /// Done; nothing to tell.
    Done,
    /// A number that was asked for.
    Number(u64),
    /// The index at which a stopped vring goes on.
    VringBase(VringBase),
    /// Bytes of the config space.
    Config(Vec<u8>),
    /// Length of the one shared-memory region, bytes.
    ShmemLen(u64),
    /// The request is declined; the session goes on.
    Declined,
    /// The request was at fault; the session ends.
    Refused(String),
}

/// Where to find how far a stopped vring is: in the ring itself, since the peer completes in
/// order. Read by the session's own thread when the peer has lost the memory.
#[derive(Debug)]
pub struct VringBase {
    /// The vring.
    pub index: u32,
    /// The 16-bit field that says it: the file and the offset in it.
    pub place: Option<(MemoryFile, u64)>,
    /// What the field means.
    pub format: Format,
    /// The vring's entries.
    pub size: u16,
    /// The answer where that cannot be read, or cannot be.
    pub fallback: u32,
    /// What of the vring's own memory is to be marked before the answer.
    pub marks: Option<Marks>,
}

/// Pages of the owner's that have been written.
#[derive(Clone, Debug, PartialEq)]
pub struct Marks {
    /// Where they are to be marked.
    pub log: DirtyLog,
    /// Which.
    pub pages: Vec<Pages>,
}

/// Numbers one change of the window that the peer's VMM has to confirm. Changes
/// are confirmed in the order in which they were asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OpId(pub u64);

/// Numbers a command of the peer's driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CommandId(pub u64);

/// Numbers a miss that the owner's VMM was told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissId(pub u64);

/// What can be mapped into the window.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// The link area.
    LinkArea,
    /// The control area.
    ControlArea,
    /// The page by which the kernel tells whether the peer's VMM still holds the
    /// window (`docs/architecture.md`, Revocation). A new one goes into the slot that
    /// the one before it is not in.
    Witness {
        /// 0 or 1.
        slot: u8,
    },
    /// A page that is mapped and unmapped in turn, for the answer alone: a VMM that answers
    /// it has carried out what it answered before.
    Fence,
    /// The owner's dirty log.
    Log(PlacedLog),
    /// A range of the owner's memory.
    Owner(Placement<MemoryFile>),
}

impl Content {
    /// Where it is in the window of a link whose window is `window_len` bytes long, and how
    /// long it is, bytes.
    pub fn place(&self, window_len: u64) -> (WindowOffset, u64) {
        match self {
            Self::LinkArea => (WindowOffset::new(abi::LINK_OFFSET), abi::LINK_LEN),
            Self::ControlArea => (WindowOffset::new(abi::CONTROL_OFFSET), abi::CONTROL_LEN),
            Self::Witness { slot } => {
                let offset = abi::WITNESS_OFFSET + u64::from(*slot) * abi::PAGE_SIZE;
                (WindowOffset::new(offset), abi::PAGE_SIZE)
            }
            Self::Fence => (WindowOffset::new(abi::FENCE_OFFSET), abi::PAGE_SIZE),
            Self::Log(placed) => (placed.window.start(), placed.window.len()),
            Self::Owner(placement) => (shown_at(placement, window_len), placement.window().len()),
        }
    }
}

/// Where a range of the owner's is in the window: as the layout says, or in the read-only
/// aperture, which is a window's length higher (`docs/vhost-user-extensions.md`, SHMEM_STRICT;
/// no other VMM is asked for read-only ranges).
pub fn shown_at(placement: &Placement<MemoryFile>, window_len: u64) -> WindowOffset {
    let aperture = if placement.range().access().allows(Access::Write) { 0 } else { window_len };
    // Both are at most the longest window.
    WindowOffset::new(placement.offset().raw() + aperture)
}

/// A change of the peer's window, to be asked of its VMM.
#[derive(Clone, Debug, PartialEq)]
pub enum WindowOp {
    /// SHMEM_MAP.
    Map(Content),
    /// SHMEM_UNMAP of exactly what was mapped.
    Unmap(Content),
}

/// Joins an eventfd that one VMM signals to one that another waits on.
#[derive(Clone, Debug, PartialEq)]
pub struct Wire {
    /// The owner's vring.
    pub vring: u16,
    /// Whom the signal comes from.
    pub from: Side,
    /// Signalled by the VMM of `from`.
    pub source: Eventfd,
    /// To be signalled for the other VMM.
    pub target: Eventfd,
}

/// The generations of the link area and of its mapping table
/// (`docs/vhost-pci-device.md`, 7.2). Both even.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generations {
    /// Of the link area.
    pub link: u64,
    /// Of the mapping table.
    pub table: u64,
}

/// What the link area is to say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LinkContents {
    /// `LINK_S_*` bits.
    pub status: u32,
    /// The owner's virtio device number.
    pub owner_device: u32,
    /// The virtio features that the owner's driver accepted.
    pub features: u64,
    /// Window offset and length in bytes of the owner's dirty log; without one, both 0.
    pub log: (u64, u64),
    /// Entries of the mapping table.
    pub mappings: Vec<abi::Mapping>,
    /// Entries of the vring table.
    pub vrings: Vec<abi::Vring>,
    /// The owner's device configuration space, at most `MAX_OWNER_CONFIG` bytes.
    pub config: Vec<u8>,
}

impl LinkContents {
    /// Whether the other says the same, but for the mapping table.
    pub fn is_but_for_mappings(&self, other: &Self) -> bool {
        let Self { status, owner_device, features, log, mappings: _, vrings, config } = self;
        (status, owner_device, features, log, vrings, config)
            == (&other.status, &other.owner_device, &other.features, &other.log, &other.vrings, &other.config)
    }
}

/// What reaches a link from outside.
#[derive(Debug)]
pub enum Event {
    /// A front-end connected.
    Connected(Side),
    /// One more front-end connected than a side may have, and was turned away.
    TurnedAway(Side),
    /// Somebody connected who may not join, and was turned away.
    NotPermitted {
        /// Where: a side's name, or `doorbell`.
        door: &'static str,
        /// The process.
        pid: i32,
        /// Its user.
        uid: u32,
    },
    /// A front-end asks.
    Request(Side, Request),
    /// Something about the second VMM of the owner's side, which waits for the link.
    Waiting(WaitingEvent),
    /// A front-end's session ended, with the fault if one ended it.
    Disconnected(Side, Option<Fault>),
    /// The peer's VMM confirmed a change of its window, or refused it.
    WindowDone(OpId, Result<(), String>),
    /// The kernel says that the peer's VMM holds the oldest witness page no more.
    WitnessGone,
    /// The peer's driver serves no earlier generation of the link than that of [`Effect::WatchServed`].
    Unserved,
    /// The peer's VMM answered what it was asked about its wiring.
    WireDone(WireId, Result<(), String>),
    /// A VMM connected the link's doorbell function.
    DoorbellConnected,
    /// Another doorbell function connected beside the one that is served, and was turned away.
    DoorbellTurnedAway,
    /// The VMM with the doorbell function has read everything that it was sent.
    DoorbellRead,
    /// The VMM with the doorbell function sent something.
    DoorbellSpoke,
    /// The doorbell function is gone.
    DoorbellGone,
    /// The owner's VMM answered a miss: whether it has told the translation.
    MissDone(MissId, bool),
    /// The peer's driver gave a command, with so many bytes behind the request in the
    /// readable part of its chain, and behind the response in the writable one.
    Command(CommandId, abi::ControlRequest, u64, u64),
    /// What the peer's driver stored could not be marked in the owner's dirty log, and it was told that it failed: why.
    Unmarked(String),
    /// The peer's driver broke a rule of the control ring.
    ControlRingBroken(String),
    /// A side did something more often than it may, and was made to wait.
    TooOften(Side, Flood),
    /// The link is to end: the peer is to lose what it has of the owner.
    Unplug,
    /// A deadline may have passed.
    Tick,
}

/// What reaches a link from an owner's VMM that waits.
#[derive(Debug)]
pub enum WaitingEvent {
    /// It connected beside the one that has the link.
    Connected,
    /// It asks.
    Request(Request),
    /// Its session ended, with the fault if one ended it.
    Disconnected(Option<Fault>),
}

/// What a side may do only so often: its name, and the configuration's for the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flood {
    /// Messages of a front-end.
    Messages,
    /// Notifications that the relay passes on, and doorbells of the control ring.
    Notifications,
    /// Connections to one of the link's sockets.
    Connections,
}

impl Flood {
    /// For people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Messages => "messages",
            Self::Notifications => "relayed notifications",
            Self::Connections => "connections",
        }
    }

    /// The key of the limit in a link's configuration.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Messages => "messages_per_second",
            Self::Notifications => "notifications_per_second",
            Self::Connections => "connections_per_second",
        }
    }
}

/// What the runtime has to do for a link.
#[derive(Debug)]
pub enum Effect {
    /// Answer the request that is open on this side.
    Reply(Side, Reply),
    /// The same of the owner's VMM that waits.
    ReplyWaiting(Reply),
    /// The owner's VMM that waits has the link from now on, and the one that had it, if there is one,
    /// waits.
    SwapOwners,
    /// End the session of the owner's VMM that waits.
    DisconnectWaiting,
    /// Use this stream for requests to the owner's VMM that waits.
    OpenWaitingChannel(UnixStream),
    /// End this side's session.
    Disconnect(Side),
    /// Use this stream for requests to this side's VMM.
    OpenChannel(Side, UnixStream),
    /// Tell the owner's VMM of a miss: the page, reading or writing.
    Miss(MissId, Iova, Access),
    /// Tell the owner's VMM that a translation does not allow an access.
    AccessFail(Iova, Access),
    /// Answer a command of the peer's driver with this `CTRL_*` status; `true`: the
    /// mapping table has changed.
    Answer(CommandId, u32, bool),
    /// Copy between these parts of the owner's memory, in this order, and the command's
    /// buffer, mark what was written, then answer it.
    Copy(CommandId, Task, Vec<Piece>, Option<Marks>),
    /// Ask the peer's VMM for a change of its window.
    Window(OpId, WindowOp),
    /// Ask the peer's VMM for a change of its wiring.
    WirePeer(WireId, WireRequest),
    /// Send this to the VMM with the doorbell function.
    Doorbell(DoorbellMessage),
    /// Start to ask the kernel whether that VMM has read everything, until it has.
    WatchDoorbell,
    /// Let the doorbell page say this, at this generation of it.
    PublishDoorbell(Vec<abi::DoorbellEntry>, u64),
    /// Start to ask the kernel whether the oldest witness page that was not told to be
    /// gone is still held, until it is not or until `StopWatching`.
    WatchWitness,
    /// Stop to ask.
    StopWatching,
    /// Start to look in the control area whether the peer's driver serves an earlier generation of the link
    /// than this, until it does not or [`Link::awaits_served`](super::Link::awaits_served) is over.
    WatchServed(u64),
    /// Forget the control ring's state; its area is zeroed before the driver sees it.
    ResetControlRing,
    /// Let the link area say this, at this generation of its own and this of its mapping
    /// table.
    Publish(LinkContents, Generations),
    /// Let the link area's mapping table alone say this, at this generation of it.
    PublishTable(Vec<abi::Mapping>, u64),
    /// Interrupt the peer's driver through the control queue's vector.
    NotifyPeer(Eventfd),
    /// These wires, and no others, are to be relayed.
    Wire(Vec<Wire>),
    /// The doorbell of the control ring, if there is one.
    ControlDoorbell(Option<Eventfd>),
    /// Signal an eventfd once: a vring's error.
    Signal(Eventfd),
    /// The link may end. Whether the peer has nothing of the owner's any more, as far as the kernel and its
    /// VMM tell; else the time is over.
    Unplugged(bool),
    /// One line for the operator.
    Log(Log),
}

/// One line for the operator.
#[derive(Debug, PartialEq, Eq)]
pub enum Log {
    /// Something changed.
    Info(String),
    /// Somebody did something wrong.
    Fault(String),
}
