//! A model of the owner's VMM: the vhost-user front-end of a virtio-net card, in the
//! order of messages that QEMU has.
//!
//! Knows nothing of packets: rings are addresses in the owner's memory.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

use super::OwnerMemory;
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

/// The front-end.
pub struct OwnerVmm {
    socket: String,
    front_end: Frontend,
    /// A second descriptor of the connection, to see its end.
    main: UnixStream,
    offered: u64,
    vrings: Vec<Notifications>,
    started: usize,
}

impl OwnerVmm {
    /// Connects to the owner socket of a broker and negotiates the protocol.
    ///
    /// # Errors
    /// If nobody listens, or it is no vhost-user back-end with `vrings` queues.
    pub fn connect(socket: &Path, vrings: u16) -> Result<Self, OwnerError> {
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
            stream.try_clone()
        };
        let main = limit(&stream).map_err(BrokerError::from).map_err(failed("setting up the socket"))?;
        let (front_end, offered) =
            negotiate(stream, vrings).map_err(|(step, source)| failed(step)(source))?;
        let vrings = (0..vrings)
            .map(|_| Ok(Notifications { kick: Event::new()?, call: Event::new()? }))
            .collect::<std::io::Result<_>>()
            .map_err(BrokerError::from)
            .map_err(failed("making eventfds"))?;
        Ok(Self { socket: name, front_end, main, offered, vrings, started: 0 })
    }

    /// The virtio features that the back-end offers.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// Starts the device: features, memory, then every vring of `rings`, each from the
    /// available index that `base` gives for it (0 for fresh rings).
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
        let result = self.start_steps(features, memory, rings, base);
        result.map_err(|(step, source)| OwnerError { socket: self.socket.clone(), step, source })
    }

    fn start_steps(
        &mut self,
        features: u64,
        memory: &OwnerMemory,
        rings: &[RingPlaces],
        base: impl Fn(u16) -> u16,
    ) -> Result<(), Failed> {
        let front_end = &mut self.front_end;
        let features = features & self.offered | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        step("SET_FEATURES", front_end.set_features(features))?;
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: memory.guest_start(),
            memory_size: memory.len(),
            userspace_addr: memory.front_end_address(),
            mmap_offset: 0,
            mmap_handle: memory.raw_fd(),
        };
        step("SET_MEM_TABLE", front_end.set_mem_table(&[region]))?;
        for (vring, (places, notifications)) in rings.iter().zip(&self.vrings).enumerate() {
            // vhost-user tells ring addresses as the front-end's own.
            let address = |offset| memory.front_end_address() + offset;
            let rings = VringConfigData {
                queue_max_size: places.size,
                queue_size: places.size,
                flags: 0,
                desc_table_addr: address(places.desc),
                avail_ring_addr: address(places.avail),
                used_ring_addr: address(places.used),
                log_addr: None,
            };
            step("SET_VRING_NUM", front_end.set_vring_num(vring, places.size))?;
            step("SET_VRING_BASE", front_end.set_vring_base(vring, base(vring as u16)))?;
            step("SET_VRING_ADDR", front_end.set_vring_addr(vring, &rings))?;
            step("SET_VRING_KICK", front_end.set_vring_kick(vring, notifications.kick.inner()))?;
            step("SET_VRING_CALL", front_end.set_vring_call(vring, notifications.call.inner()))?;
            self.started = vring + 1;
        }
        for vring in 0..self.started {
            step("SET_VRING_ENABLE", front_end.set_vring_enable(vring, true))?;
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
        let front_end = &mut self.front_end;
        let mut stop = |vring| {
            step("SET_VRING_ENABLE", front_end.set_vring_enable(vring, false))?;
            // The index is 16 bits of a 32-bit field (vhost-user, GET_VRING_BASE).
            step("GET_VRING_BASE", front_end.get_vring_base(vring)).map(|base| base as u16)
        };
        (0..vrings).map(&mut stop).collect::<Result<_, _>>().map_err(|(step, source)| OwnerError {
            socket: self.socket.clone(),
            step,
            source,
        })
    }

    /// The eventfd that becomes readable when the device calls for a vring.
    pub fn call_fd(&self, vring: u16) -> Option<BorrowedFd<'_>> {
        Some(self.vrings.get(usize::from(vring))?.call.as_fd())
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

type Failed = (&'static str, BrokerError);

fn step<T, E: Into<BrokerError>>(name: &'static str, result: Result<T, E>) -> Result<T, Failed> {
    result.map_err(|error| (name, error.into()))
}

/// GET_FEATURES to SET_OWNER: what QEMU does when it has connected.
fn negotiate(stream: UnixStream, vrings: u16) -> Result<(Frontend, u64), Failed> {
    let mut front_end = Frontend::from_stream(stream, vrings.into());
    let offered = step("GET_FEATURES", front_end.get_features())?;
    if offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
        return Err(("GET_FEATURES", BrokerError::Missing { what: "VHOST_USER_F_PROTOCOL_FEATURES" }));
    }
    let protocol = step("GET_PROTOCOL_FEATURES", front_end.get_protocol_features())?;
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    let accepted = protocol & wanted;
    step("SET_PROTOCOL_FEATURES", front_end.set_protocol_features(accepted))?;
    if accepted.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    // GET_QUEUE_NUM is not asked: for a network card some back-ends answer it in pairs
    // of queues, some in queues, and the crate takes the answer for queues. A vring too
    // many is refused when it is set up.
    step("SET_OWNER", front_end.set_owner())?;
    Ok((front_end, offered))
}
