//! A model of the owner's VMM: the vhost-user front-end of a virtio-net card, in the
//! order of messages that QEMU has.
//!
//! Knows nothing of packets: rings are addresses in the owner's memory.

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use iommu::Access;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_ACCESS_PLATFORM;
use zerocopy::IntoBytes;

use super::iommu::{IommuProtocol, State};
use super::iotlb::{
    VHOST_USER_GET_PROTOCOL_FEATURES, VHOST_USER_IOTLB_MSG, VHOST_USER_PROTOCOL_F_IOMMU_PUSH, exchange,
};
use super::misses::MissThread;
use super::{OwnerIommu, OwnerMemory};
use crate::ring::RingPlaces;
use crate::transport::sys::event::Event;
use crate::transport::{ANSWER_TIME, BrokerError};

/// Why the broker does not serve the owner.
#[derive(Debug, thiserror::Error)]
#[error("{socket}: {step}: {source}")]
pub struct OwnerError {
    /// The socket's path.
    socket: String,
    /// What was asked.
    step: &'static str,
    /// The answer.
    source: BrokerError,
}

/// Kick and call of one vring.
struct Notifications {
    kick: Event,
    call: Event,
}

/// Kicks the device: what the driver does with its doorbell.
pub trait Kicks {
    /// Kicks a vring.
    fn kick(&self, vring: u16);
}

/// The main channel: the vhost crate's front-end, and the same socket for the messages
/// that the crate does not have. Whoever has it exclusively exchanges one message at a
/// time.
pub(super) struct Wire {
    front_end: Frontend,
    raw: UnixStream,
}

impl Wire {
    /// Sends a message and waits for its reply.
    pub(super) fn exchange(&self, request: u32, body: &[u8]) -> io::Result<u64> {
        exchange(&self.raw, request, body)
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").field("raw", &self.raw).finish_non_exhaustive()
    }
}

/// The IOMMU of an owner's VM, and how the front-end tells of it.
#[derive(Clone, Debug)]
pub struct IommuLink {
    /// The IOMMU.
    pub iommu: OwnerIommu,
    /// The messages.
    pub protocol: IommuProtocol,
}

/// The front-end.
pub struct OwnerVmm {
    socket: String,
    wire: Arc<Mutex<Wire>>,
    /// Another descriptor of the connection, to see its end.
    main: UnixStream,
    offered: u64,
    vrings: Vec<Notifications>,
    started: usize,
    iommu: Option<IommuLink>,
    /// Ends when it is dropped.
    _misses: Option<MissThread>,
}

impl OwnerVmm {
    /// Connects to the owner socket of a broker and negotiates the protocol, for an
    /// owner without an IOMMU.
    ///
    /// # Errors
    /// If nobody listens, or it is no vhost-user back-end with `vrings` queues.
    pub fn connect(socket: &Path, vrings: u16) -> Result<Self, OwnerError> {
        Self::connect_with(socket, vrings, None)
    }

    /// As [`Self::connect`], for an owner with an IOMMU if `iommu` is there.
    ///
    /// # Errors
    /// As there, and if the back-end does not offer what `iommu` needs.
    pub fn connect_with(socket: &Path, vrings: u16, iommu: Option<IommuLink>) -> Result<Self, OwnerError> {
        let name = socket.display().to_string();
        let failed = |step| {
            let socket = name.clone();
            move |source| OwnerError { socket, step, source }
        };
        let stream = UnixStream::connect(socket)
            .map_err(BrokerError::from)
            .map_err(failed("connecting (is the broker running, and may you use its socket?)"))?;
        let limit = |stream: &UnixStream| {
            stream.set_read_timeout(Some(ANSWER_TIME))?;
            stream.set_write_timeout(Some(ANSWER_TIME))?;
            Ok((stream.try_clone()?, stream.try_clone()?))
        };
        let (main, raw) =
            limit(&stream).map_err(|error: io::Error| failed("setting up the socket")(error.into()))?;
        let mut wire = Wire { front_end: Frontend::from_stream(stream, vrings.into()), raw };
        let (offered, misses) =
            negotiate(&mut wire, iommu.as_ref()).map_err(|(step, source)| failed(step)(source))?;
        let vrings = (0..vrings)
            .map(|_| Ok(Notifications { kick: Event::new()?, call: Event::new()? }))
            .collect::<io::Result<_>>()
            .map_err(BrokerError::from)
            .map_err(failed("making eventfds"))?;
        let wire = Arc::new(Mutex::new(wire));
        Ok(Self { socket: name, wire, main, offered, vrings, started: 0, iommu, _misses: misses })
    }

    /// The virtio features that the back-end offers.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// Starts the device: features, memory, then every vring of `rings`, each from the
    /// available index that `base` gives for it (0 for fresh rings). For an owner
    /// without an IOMMU.
    ///
    /// # Errors
    /// The step that the broker did not take.
    pub fn start(
        &mut self,
        features: u64,
        memory: &OwnerMemory,
        rings: &[RingPlaces],
        base: impl Fn(u16) -> u16,
    ) -> Result<(), OwnerError> {
        // vhost-user tells ring addresses as the front-end's own.
        self.start_at(features, memory, rings, |_| memory.front_end_address(), base)
    }

    /// As [`Self::start`], with each vring's areas told as `ring_base` + offset in the
    /// memory (wrapping): with an IOMMU, I/O virtual addresses.
    ///
    /// # Errors
    /// As there.
    pub fn start_at(
        &mut self,
        features: u64,
        memory: &OwnerMemory,
        rings: &[RingPlaces],
        ring_base: impl Fn(u16) -> u64,
        base: impl Fn(u16) -> u16,
    ) -> Result<(), OwnerError> {
        let addresses = |(vring, places): (usize, &RingPlaces)| {
            // There are fewer vrings than 2^16.
            let vring = vring as u16;
            let address = |offset: u64| ring_base(vring).wrapping_add(offset);
            let config = VringConfigData {
                queue_max_size: places.size,
                queue_size: places.size,
                flags: 0,
                desc_table_addr: address(places.desc),
                avail_ring_addr: address(places.avail),
                used_ring_addr: address(places.used),
                log_addr: None,
            };
            (config, base(vring))
        };
        let rings: Vec<_> = rings.iter().enumerate().map(addresses).collect();
        // The IOMMU before the channel, as everybody. Nothing is mapped, and no miss
        // answered, until the device is started: QEMU has one lock for all of it.
        let link = self.iommu.clone();
        let mut iommu = link.as_ref().map(|link| (link.iommu.lock(), link.protocol));
        let wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
        let features = features & self.offered
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | u64::from(iommu.is_some()) << VIRTIO_F_ACCESS_PLATFORM;
        let state = iommu.as_mut().map(|(state, protocol)| (&mut **state, *protocol));
        let steps = Steps { wire: &wire, vrings: &self.vrings, started: &mut self.started };
        steps.start(features, memory, &rings, state).map_err(|(step, source)| OwnerError {
            socket: self.socket.clone(),
            step,
            source,
        })?;
        if let Some((state, protocol)) = &mut iommu {
            state.start(&self.wire, *protocol);
        }
        Ok(())
    }

    /// Stops the device. Returns the available index at which each vring goes on.
    /// When this returns, the peer cannot reach the memory any more.
    ///
    /// # Errors
    /// The step that the broker did not take.
    pub fn stop(&mut self) -> Result<Vec<u16>, OwnerError> {
        let vrings = std::mem::take(&mut self.started);
        let mut iommu = self.iommu.as_ref().map(|link| link.iommu.lock());
        let wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
        let front_end = &wire.front_end;
        let mut stop = |vring| {
            step("SET_VRING_ENABLE", set_enabled(front_end, vring, false))?;
            // The index is 16 bits of a 32-bit field (vhost-user, GET_VRING_BASE).
            step("GET_VRING_BASE", front_end.get_vring_base(vring)).map(|base| base as u16)
        };
        let stopped = (0..vrings).map(&mut stop).collect::<Result<_, _>>();
        if let Some(state) = &mut iommu {
            state.stop();
        }
        stopped.map_err(|(step, source)| OwnerError { socket: self.socket.clone(), step, source })
    }

    /// The eventfd that becomes readable when the device calls for a vring.
    pub fn call_fd(&self, vring: u16) -> Option<BorrowedFd<'_>> {
        Some(self.vrings.get(usize::from(vring))?.call.as_fd())
    }

    /// Becomes readable when the broker hangs up.
    pub fn connection(&self) -> BorrowedFd<'_> {
        self.main.as_fd()
    }

    /// Whether the broker has hung up. A system call.
    pub fn is_gone(&self) -> bool {
        let mut fds = [PollFd::new(self.main.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

impl Kicks for OwnerVmm {
    fn kick(&self, vring: u16) {
        if let Some(notifications) = self.vrings.get(usize::from(vring)) {
            notifications.kick.signal();
        }
    }
}

impl Drop for OwnerVmm {
    fn drop(&mut self) {
        // Whoever waits for an answer of the broker's on it need not any longer.
        let _ = self.main.shutdown(Shutdown::Both);
        if let Some(link) = &self.iommu {
            link.iommu.lock().stop();
        }
    }
}

type Failed = (&'static str, BrokerError);

fn step<T, E: Into<BrokerError>>(name: &'static str, result: Result<T, E>) -> Result<T, Failed> {
    result.map_err(|error| (name, error.into()))
}

/// The crate wants it exclusively, for nothing.
fn set_enabled(front_end: &Frontend, vring: usize, enabled: bool) -> vhost::Result<()> {
    front_end.clone().set_vring_enable(vring, enabled)
}

/// The start of a device, message by message.
struct Steps<'a> {
    wire: &'a Wire,
    vrings: &'a [Notifications],
    started: &'a mut usize,
}

impl Steps<'_> {
    fn start(
        self,
        features: u64,
        memory: &OwnerMemory,
        rings: &[(VringConfigData, u16)],
        mut iommu: Option<(&mut State, IommuProtocol)>,
    ) -> Result<(), Failed> {
        let front_end = &self.wire.front_end;
        step("SET_FEATURES", front_end.set_features(features))?;
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: memory.guest_start(),
            memory_size: memory.len(),
            userspace_addr: memory.front_end_address(),
            mmap_offset: 0,
            mmap_handle: memory.raw_fd(),
        };
        step("SET_MEM_TABLE", front_end.set_mem_table(&[region]))?;
        if let Some((state, IommuProtocol::Push)) = &mut iommu {
            step("IOMMU_PUSH", state.push_all(self.wire).map_err(io::Error::other))?;
        }
        for (vring, ((config, base), notifications)) in rings.iter().zip(self.vrings).enumerate() {
            step("SET_VRING_NUM", front_end.set_vring_num(vring, config.queue_size))?;
            step("SET_VRING_BASE", front_end.set_vring_base(vring, *base))?;
            step("SET_VRING_ADDR", front_end.set_vring_addr(vring, config))?;
            step("SET_VRING_KICK", front_end.set_vring_kick(vring, notifications.kick.inner()))?;
            step("SET_VRING_CALL", front_end.set_vring_call(vring, notifications.call.inner()))?;
            *self.started = vring + 1;
        }
        if let Some((state, protocol @ IommuProtocol::IotlbLikeQemu)) = &iommu {
            // QEMU's vhost_dev_start does so for the kernel's vhost.
            for (config, _) in rings {
                let update = state.translation(*protocol, config.used_ring_addr, Access::Write.bits() as u8);
                let update = update.ok_or(BrokerError::System(io::ErrorKind::AddrNotAvailable.into()));
                let update = update.map_err(|error| ("IOTLB update of a used ring", error))?;
                let answer = self.wire.exchange(VHOST_USER_IOTLB_MSG, update.as_bytes());
                let refused = || io::Error::other("refused");
                let answer = answer.and_then(|answer| if answer == 0 { Ok(()) } else { Err(refused()) });
                step("IOTLB update of a used ring", answer)?;
            }
        }
        for vring in 0..*self.started {
            step("SET_VRING_ENABLE", set_enabled(front_end, vring, true))?;
        }
        Ok(())
    }
}

/// GET_FEATURES to SET_OWNER: what QEMU does when it has connected.
fn negotiate(wire: &mut Wire, iommu: Option<&IommuLink>) -> Result<(u64, Option<MissThread>), Failed> {
    let front_end = &mut wire.front_end;
    let offered = step("GET_FEATURES", front_end.get_features())?;
    let missing = |step, what: &str| {
        let told = format!("the broker does not offer {what}, which the owner's front-end needs");
        Err((step, BrokerError::System(io::Error::new(io::ErrorKind::Unsupported, told))))
    };
    if offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
        return missing("GET_FEATURES", "VHOST_USER_F_PROTOCOL_FEATURES");
    }
    if iommu.is_some() && offered & 1 << VIRTIO_F_ACCESS_PLATFORM == 0 {
        return missing("GET_FEATURES", "VIRTIO_F_ACCESS_PLATFORM");
    }
    let protocol = step("GET_PROTOCOL_FEATURES", front_end.get_protocol_features())?;
    let mut wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    let push = match iommu.map(|link| link.protocol) {
        None => false,
        Some(_) if !protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) => {
            return missing("GET_PROTOCOL_FEATURES", "VHOST_USER_PROTOCOL_F_REPLY_ACK");
        }
        Some(IommuProtocol::Push) => true,
        Some(IommuProtocol::Iotlb | IommuProtocol::IotlbLikeQemu) => {
            wanted |= VhostUserProtocolFeatures::BACKEND_REQ;
            if !protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
                return missing("GET_PROTOCOL_FEATURES", "VHOST_USER_PROTOCOL_F_BACKEND_REQ");
            }
            false
        }
    };
    let mut accepted = protocol & wanted;
    if push {
        // The crate's own answer has no bits that it does not know.
        let all = step("GET_PROTOCOL_FEATURES", exchange(&wire.raw, VHOST_USER_GET_PROTOCOL_FEATURES, &[]))?;
        if all & VHOST_USER_PROTOCOL_F_IOMMU_PUSH == 0 {
            return missing("GET_PROTOCOL_FEATURES", "VHOST_USER_PROTOCOL_F_IOMMU_PUSH");
        }
        let bits = accepted.bits() | VHOST_USER_PROTOCOL_F_IOMMU_PUSH;
        accepted = VhostUserProtocolFeatures::from_bits_retain(bits);
    }
    step("SET_PROTOCOL_FEATURES", front_end.set_protocol_features(accepted))?;
    if accepted.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    let misses = match iommu {
        Some(link) if !push => {
            let (ours, theirs) = step("making a back-end channel", UnixStream::pair())?;
            step("SET_BACKEND_REQ_FD", front_end.set_backend_request_fd(&theirs))?;
            let thread = MissThread::spawn(ours, link.iommu.clone());
            Some(step("starting a thread", thread)?)
        }
        _ => None,
    };
    // GET_QUEUE_NUM is not asked: for a network card some back-ends answer it in pairs
    // of queues, some in queues, and the crate takes the answer for queues. A vring too
    // many is refused when it is set up.
    step("SET_OWNER", front_end.set_owner())?;
    Ok((offered, misses))
}
