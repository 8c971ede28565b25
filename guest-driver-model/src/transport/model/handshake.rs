//! The vhost-user exchange of the model VMM with the broker, in QEMU's order.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, FrontendReqHandler, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_pci_device::abi::{CONFIG_LEN, DeviceConfig};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::Vmm;
use super::channel::Window;
use crate::shm::mapping::MappedRange;
use crate::transport::sys::event::Event;
use crate::transport::virtio_pci::initialise::RING_ENTRIES;
use crate::transport::{BrokerError, parse_config};

/// An error and the step that it came from.
pub(super) type Failed = (&'static str, BrokerError);

/// What the broker offers.
pub(super) struct Offer {
    pub config: DeviceConfig,
    /// Length of shared-memory region 0.
    pub window_len: u64,
}

/// The connection, and the memory that the device was told of.
pub(super) struct Session {
    front_end: Frontend,
    memory: Option<GuestMemory>,
}

/// "Guest RAM": room for the queues' rings, which carry nothing.
struct GuestMemory {
    file: OwnedFd,
    /// The mapping, for its address only.
    mapping: MappedRange,
}

impl GuestMemory {
    fn new() -> std::io::Result<Self> {
        let file = memfd_create(c"vhost-pci-model-ram", MFdFlags::MFD_CLOEXEC)?;
        ftruncate(&file, RAM_LEN as i64)?;
        let mapping = MappedRange::of_file(&file, 0, RAM_LEN as usize)?;
        Ok(Self { file, mapping })
    }
}

const RAM_LEN: u64 = 1 << 20;
/// Where the memory is, to the device: as a VM's first megabyte.
const RAM_START: u64 = 0;
/// Bytes a queue's rings take.
const RING_STRIDE: u64 = 512;

const REQUIRED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::CONFIG
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::SHMEM)
    .union(VhostUserProtocolFeatures::MQ);

/// VHOST_USER_PROTOCOL_F_SHMEM_STRICT (`docs/vhost-user-extensions.md`).
pub(super) const SHMEM_STRICT: u64 = 1 << 61;
/// Number of GET_PROTOCOL_FEATURES.
const GET_PROTOCOL_FEATURES: u32 = 15;
/// Flags of a message's header: the version, and that it is a reply.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;

/// GET_PROTOCOL_FEATURES with the bits that the vhost crate does not know, which it leaves
/// out.
fn all_protocol_features(mut stream: &UnixStream) -> io::Result<u64> {
    let words = |words: [u32; 3]| words.map(u32::to_ne_bytes);
    stream.write_all(words([GET_PROTOCOL_FEATURES, VERSION, 0]).as_flattened())?;
    let (mut header, mut features) = ([0; 12], [0; 8]);
    stream.read_exact(&mut header)?;
    if header != words([GET_PROTOCOL_FEATURES, VERSION | REPLY, 8]).as_flattened() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    stream.read_exact(&mut features)?;
    Ok(u64::from_ne_bytes(features))
}

fn step<T, E: Into<BrokerError>>(name: &'static str, result: Result<T, E>) -> Result<T, Failed> {
    result.map_err(|error| (name, error.into()))
}

/// Negotiates features and reads what the device is like.
pub(super) fn negotiate(stream: UnixStream, vmm: Vmm) -> Result<(Session, Offer), Failed> {
    let beside = step("duplicating the socket", stream.try_clone())?;
    // The number of queues is known when GET_QUEUE_NUM is answered.
    let mut front_end = Frontend::from_stream(stream, 1);
    let offered = step("GET_FEATURES", front_end.get_features())?;
    let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    let version_1 = 1_u64 << VIRTIO_F_VERSION_1;
    for (bit, what) in [(protocol, "VHOST_USER_F_PROTOCOL_FEATURES"), (version_1, "VIRTIO_F_VERSION_1")] {
        if offered & bit == 0 {
            return Err(("GET_FEATURES", BrokerError::Missing { what }));
        }
    }
    let protocol_offered = step("GET_PROTOCOL_FEATURES", front_end.get_protocol_features())?;
    for (feature, what) in [
        (VhostUserProtocolFeatures::SHMEM, "VHOST_USER_PROTOCOL_F_SHMEM (bit 22)"),
        (VhostUserProtocolFeatures::BACKEND_REQ, "VHOST_USER_PROTOCOL_F_BACKEND_REQ"),
        (VhostUserProtocolFeatures::CONFIG, "VHOST_USER_PROTOCOL_F_CONFIG"),
        (VhostUserProtocolFeatures::REPLY_ACK, "VHOST_USER_PROTOCOL_F_REPLY_ACK"),
        (VhostUserProtocolFeatures::MQ, "VHOST_USER_PROTOCOL_F_MQ"),
    ] {
        if !protocol_offered.contains(feature) {
            return Err(("GET_PROTOCOL_FEATURES", BrokerError::Missing { what }));
        }
    }
    let mut accepted = REQUIRED | protocol_offered & VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    if vmm == Vmm::Strict {
        let offered = step("GET_PROTOCOL_FEATURES", all_protocol_features(&beside))?;
        accepted |= VhostUserProtocolFeatures::from_bits_retain(offered & SHMEM_STRICT);
    }
    step("SET_PROTOCOL_FEATURES", front_end.set_protocol_features(accepted))?;
    // From here on each request without an answer of its own asks for one.
    front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    let queues = step("GET_QUEUE_NUM", front_end.get_queue_num())?;
    step("SET_OWNER", front_end.set_owner())?;

    let bytes = [0; CONFIG_LEN];
    let config = front_end.get_config(0, CONFIG_LEN as u32, VhostUserConfigFlags::empty(), &bytes);
    let (_, bytes) = step("GET_CONFIG", config)?;
    let bytes: [u8; CONFIG_LEN] = bytes.try_into().unwrap_or([0; CONFIG_LEN]);
    let config = parse_config(&bytes);
    let regions = step("GET_SHMEM_CONFIG", front_end.get_shmem_config())?;
    let window_len =
        if regions.nregions == 0 { 0 } else { regions.memory_sizes.first().copied().unwrap_or(0) };
    if window_len == 0 {
        return Err(("GET_SHMEM_CONFIG", BrokerError::NoWindow));
    }
    let vrings = config.max_vrings.value();
    if queues != u64::from(vrings) + 1 {
        return Err(("GET_QUEUE_NUM", BrokerError::Queues { queues, vrings }));
    }
    Ok((Session { front_end, memory: None }, Offer { config, window_len }))
}

impl Session {
    /// Opens the back-end channel.
    pub(super) fn channel(&mut self, window: Arc<Window>) -> Result<FrontendReqHandler<Window>, Failed> {
        let mut handler = step("making the back-end channel", FrontendReqHandler::new(window))?;
        handler.set_reply_ack_flag(true);
        let end = handler.get_tx_raw_fd();
        step("SET_BACKEND_REQ_FD", self.front_end.set_backend_request_fd(&end))?;
        Ok(handler)
    }

    /// Starts the device, as a VMM does when the driver sets DRIVER_OK.
    pub(super) fn start<'a>(
        &mut self,
        queues: impl Iterator<Item = (&'a Event, &'a Event)>,
    ) -> Result<(), Failed> {
        let memory = step("making guest memory", GuestMemory::new())?;
        let front_end = &mut self.front_end;
        // Not ACCESS_PLATFORM: with it the addresses below would be IOVAs and need a
        // device IOTLB, and the model VMM has no IOMMU.
        let features = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | 1 << VIRTIO_F_VERSION_1;
        step("SET_FEATURES", front_end.set_features(features))?;
        let user_address = memory.mapping.base().addr().get() as u64;
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: RAM_START,
            memory_size: RAM_LEN,
            userspace_addr: user_address,
            mmap_offset: 0,
            mmap_handle: memory.file.as_raw_fd(),
        };
        step("SET_MEM_TABLE", front_end.set_mem_table(&[region]))?;
        let mut count = 0;
        for (queue, (kick, call)) in queues.enumerate() {
            let base = user_address + RING_STRIDE * queue as u64;
            let rings = VringConfigData {
                queue_max_size: RING_ENTRIES,
                queue_size: RING_ENTRIES,
                flags: 0,
                desc_table_addr: base,
                avail_ring_addr: base + 128,
                used_ring_addr: base + 192,
                log_addr: None,
            };
            step("SET_VRING_NUM", front_end.set_vring_num(queue, RING_ENTRIES))?;
            step("SET_VRING_BASE", front_end.set_vring_base(queue, 0))?;
            step("SET_VRING_ADDR", front_end.set_vring_addr(queue, &rings))?;
            step("SET_VRING_KICK", front_end.set_vring_kick(queue, kick.inner()))?;
            step("SET_VRING_CALL", front_end.set_vring_call(queue, call.inner()))?;
            count += 1;
        }
        for queue in 0..count {
            step("SET_VRING_ENABLE", front_end.set_vring_enable(queue, true))?;
        }
        self.memory = Some(memory);
        Ok(())
    }
}
