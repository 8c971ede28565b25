//! The peer's session: its front-end's set-up of the vhost-pci device.
//!
//! The broker uses none of the peer's memory: the device's virtqueues carry no
//! buffers and its control ring is in the window, so memory tables are answered
//! and let go of, and ring addresses are not looked at.

use std::os::unix::net::UnixStream;

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost_pci_device::abi;

use super::descriptor::Eventfd;
use super::fault::Fault;
use super::features;
use super::link_page;
use super::message::{Reply, Request, VringBase};
use super::vring::Format;
use crate::config::LinkConfig;

/// Memory slots that a peer's front-end may use; it reports every mapping of the
/// window back as one.
const MEMORY_SLOTS: u64 = 509;
/// The most bytes of the config space in one answer: no config space of vhost-user is longer.
const MAX_CONFIG_LEN: u32 = 4096;

/// Protocol features offered to a peer's front-end.
pub fn protocol_features() -> u64 {
    let standard =
        needed_protocol_features() | Protocol::MQ | Protocol::CONFIG | Protocol::CONFIGURE_MEM_SLOTS;
    standard.bits() | features::PROTOCOL_SHMEM_STRICT | features::PROTOCOL_WIRING
}

/// Protocol features without which there is no window.
fn needed_protocol_features() -> Protocol {
    Protocol::REPLY_ACK | Protocol::BACKEND_REQ | Protocol::SHMEM
}

/// What changed for the link by a request of the peer's front-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerChange {
    /// Nothing.
    None,
    /// The guest's driver has started the device.
    Started,
    /// The device was stopped.
    Stopped,
}

/// A virtqueue of the vhost-pci device: a pair of notifications.
#[derive(Debug, Default)]
pub struct PeerQueue {
    /// The guest's doorbell.
    pub kick: Option<Eventfd>,
    /// The guest's interrupt.
    pub call: Option<Eventfd>,
    enabled: bool,
}

impl PeerQueue {
    /// Whether the VMM lets it notify.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }
}

/// The driver in the peer's guest, since it attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachedDriver {
    /// The generation of the link page that it serves.
    pub generation: u64,
    /// Whether it waits for interrupts; otherwise it polls.
    pub interrupt: bool,
    /// Vectors of the link's doorbell function that it waits for; 0: it uses none.
    pub vectors: u32,
    /// A device of its VM uses the window, and has to let go of what leaves it.
    pub quiesces: bool,
    /// It keeps its word of what it serves at each moment.
    pub says_served: bool,
}

/// What the peer's front-end has told so far.
#[derive(Debug)]
pub struct PeerSession {
    features: u64,
    protocol: u64,
    queues: Vec<PeerQueue>,
    started: bool,
    has_channel: bool,
    /// Of the link; a strict VMM has it twice.
    window_len: u64,
    max_vrings: u16,
    /// The guest's driver.
    pub driver: Option<AttachedDriver>,
}

impl PeerSession {
    /// A session in which nothing was said yet.
    pub fn new(config: &LinkConfig) -> Self {
        Self {
            features: 0,
            protocol: 0,
            queues: (0..=config.max_vrings()).map(|_| PeerQueue::default()).collect(),
            started: false,
            has_channel: false,
            window_len: config.window_len,
            max_vrings: config.max_vrings(),
            driver: None,
        }
    }

    /// The virtio features that the guest's driver accepted.
    pub fn features(&self) -> u64 {
        self.features & !features::PROTOCOL_FEATURES
    }

    /// The vhost-user protocol features that the front-end accepted.
    pub fn protocol(&self) -> u64 {
        self.protocol
    }

    /// Whether the front-end answers a change of the window when it has taken effect, and
    /// enforces its access.
    pub fn is_strict(&self) -> bool {
        self.protocol & features::PROTOCOL_SHMEM_STRICT != 0
    }

    /// Whether the front-end takes the owner's eventfds.
    pub fn has_wiring(&self) -> bool {
        self.protocol & features::PROTOCOL_WIRING != 0
    }

    /// Length of the VMM's window, bytes. One that enforces access has an aperture for
    /// read-only ranges behind the other (`docs/vhost-user-extensions.md`, SHMEM_STRICT).
    pub fn window_len(&self) -> u64 {
        if self.is_strict() { 2 * self.window_len } else { self.window_len }
    }

    /// Whether the guest's driver has started the device.
    pub fn is_started(&self) -> bool {
        self.started
    }

    /// The virtqueue that stands for the control ring.
    pub fn control_queue(&self) -> Option<&PeerQueue> {
        self.queues.get(usize::from(abi::QUEUE_CONTROL))
    }

    /// The virtqueue that stands for the owner's vring.
    pub fn queue_of_vring(&self, vring: u16) -> Option<&PeerQueue> {
        self.queues.get(usize::from(abi::queue_of_vring(vring)))
    }

    /// Takes the stream for requests to the front-end.
    ///
    /// # Errors
    /// When the channel was not negotiated.
    pub fn take_channel(&mut self, stream: UnixStream) -> Result<UnixStream, Fault> {
        if self.protocol & Protocol::BACKEND_REQ.bits() == 0 {
            return Err(Fault::Unsupported("BACKEND_REQ"));
        }
        self.has_channel = true;
        Ok(stream)
    }

    /// Takes one request.
    ///
    /// # Errors
    /// The fault of a request that cannot be taken.
    pub fn apply(&mut self, request: Request) -> Result<(Reply, PeerChange), Fault> {
        let mut change = PeerChange::None;
        let reply = match request {
            Request::GetFeatures => Reply::Number(features::offered_to_peer()),
            Request::SetFeatures(acked) => {
                features::check(acked, features::offered_to_peer())?;
                self.features = acked;
                Reply::Done
            }
            Request::GetProtocolFeatures => Reply::Number(protocol_features()),
            Request::SetProtocolFeatures(acked) => {
                features::check(acked, protocol_features())?;
                features::check_needs(acked, features::PROTOCOL_SHMEM_STRICT, needed_protocol_features())?;
                let needs = Protocol::BACKEND_REQ | Protocol::REPLY_ACK;
                features::check_needs(acked, features::PROTOCOL_WIRING, needs)?;
                let ours = features::PROTOCOL_SHMEM_STRICT | features::PROTOCOL_WIRING;
                let changed = (acked ^ self.protocol) & ours;
                if self.started && changed != 0 {
                    return Err(Fault::OutOfOrder(format!(
                        "{} changes while the device is started",
                        features::protocol_names(changed).join(", ")
                    )));
                }
                self.protocol = acked;
                Reply::Done
            }
            Request::GetQueueNum => Reply::Number(self.queues.len() as u64),
            Request::GetMaxMemSlots => Reply::Number(MEMORY_SLOTS),
            Request::GetConfig { len, .. } if len > MAX_CONFIG_LEN => {
                return Err(Fault::Message(format!(
                    "{len} bytes of the config space are asked for at once; at most {MAX_CONFIG_LEN} can be"
                )));
            }
            Request::GetConfig { offset, len } => Reply::Config(self.config_bytes(offset, len)),
            // The config space is read-only: a guest that writes it changes nothing.
            Request::SetConfig => Reply::Done,
            Request::GetShmemConfig => Reply::ShmemLen(self.window_len()),
            // QEMU reports each range of the window back as memory of its VM. It drops them
            // by itself on a device reset, and QEMU 11.1.3 then crashes at the next start when
            // it wants to take back what it had reported and had accepted.
            Request::AddMemReg(_) if self.started => Reply::Declined,
            Request::SetOwner
            | Request::SetMemTable(_)
            | Request::AddMemReg(_)
            | Request::RemMemReg { .. }
            | Request::SetVringErr { .. }
            | Request::Iotlb(_) => Reply::Done,
            Request::SetVringNum { index, .. }
            | Request::SetVringAddr { index, .. }
            | Request::SetVringBase { index, .. } => {
                self.queue(index)?;
                Reply::Done
            }
            Request::SetVringKick { index, fd } => {
                self.queue(index)?.kick = fd;
                // Without the feature bit a ring is enabled from its kick on.
                if self.features & features::PROTOCOL_FEATURES == 0 {
                    change = self.enable(index, true)?;
                }
                Reply::Done
            }
            Request::SetVringCall { index, fd } => {
                self.queue(index)?.call = fd;
                Reply::Done
            }
            Request::SetVringEnable { index, enable } => {
                change = self.enable(index, enable)?;
                Reply::Done
            }
            Request::GetVringBase { index } => {
                change = self.enable(index, false)?;
                self.queue(index)?.kick = None;
                Reply::VringBase(VringBase {
                    index,
                    place: None,
                    format: Format::Split,
                    size: 0,
                    fallback: 0,
                    marks: None,
                })
            }
            Request::ResetOwner => {
                let indices = 0..self.queues.len() as u32;
                for index in indices {
                    if self.enable(index, false)? == PeerChange::Stopped {
                        change = PeerChange::Stopped;
                    }
                }
                Reply::Done
            }
            Request::SetBackendChannel(_) => return Err(Fault::Unsupported("BACKEND_REQ")),
            Request::IommuPush { .. } => return Err(Fault::Unsupported("IOMMU_PUSH")),
            Request::SetLogBase { .. } => return Err(Fault::Unsupported("LOG_SHMFD")),
        };
        Ok((reply, change))
    }

    fn enable(&mut self, index: u32, enable: bool) -> Result<PeerChange, Fault> {
        self.queue(index)?.enabled = enable;
        let control = self.control_queue().is_some_and(|queue| queue.enabled);
        match (self.started, control) {
            (false, true) => {
                let missing = needed_protocol_features().bits() & !self.protocol;
                if missing != 0 || !self.has_channel {
                    return Err(Fault::OutOfOrder(format!(
                        "the device was started without {}, which the window needs: \
                         use a VMM with VIRTIO shared-memory regions over vhost-user, as QEMU 11.1 is",
                        if missing != 0 {
                            features::protocol_names(missing).join(", ")
                        } else {
                            "a back-end channel".into()
                        },
                    )));
                }
                self.started = true;
                Ok(PeerChange::Started)
            }
            (true, false) => {
                self.started = false;
                self.driver = None;
                Ok(PeerChange::Stopped)
            }
            _ => Ok(PeerChange::None),
        }
    }

    /// Bytes of the config space; zero past its end.
    fn config_bytes(&self, offset: u32, len: u32) -> Vec<u8> {
        let config = link_page::config_space(self.window_len(), self.max_vrings);
        let mut bytes: Vec<u8> = config.iter().copied().skip(offset as usize).take(len as usize).collect();
        bytes.resize(len as usize, 0);
        bytes
    }

    fn queue(&mut self, index: u32) -> Result<&mut PeerQueue, Fault> {
        let count = self.queues.len();
        self.queues.get_mut(index as usize).ok_or_else(|| Fault::Vring {
            index,
            reason: format!("the link's device has {count} virtqueues: give the VMM num_vqs={count}"),
        })
    }
}
