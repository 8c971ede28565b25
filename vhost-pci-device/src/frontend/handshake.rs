//! What the device asks of the broker: negotiation, starting, stopping.
//!
//! The broker needs none of the guest's memory, and gets none: no SET_MEM_TABLE and no
//! SET_VRING_ADDR is ever sent, so no descriptor of the VM's RAM ever leaves this process. The
//! virtqueues are pairs of eventfds.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use crate::abi::{ABI_VERSION, CONFIG_LEN, CONFIG_MAGIC, DeviceConfig, MAX_VRINGS, QUEUE_VRING_FIRST};
use crate::device::events::Pair;
use crate::window::Apertures;

/// How long the broker may take for each message.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// VHOST_USER_PROTOCOL_F_SHMEM_STRICT (`docs/vhost-user-extensions.md`).
const SHMEM_STRICT: u64 = 1 << 61;
/// VHOST_USER_PROTOCOL_F_WIRING.
const WIRING: u64 = 1 << 60;
const REQUIRED: Protocol = Protocol::CONFIG
    .union(Protocol::BACKEND_REQ)
    .union(Protocol::REPLY_ACK)
    .union(Protocol::SHMEM)
    .union(Protocol::MQ)
    .union(Protocol::from_bits_retain(SHMEM_STRICT));

const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

/// Which word a feature is a bit of.
#[derive(Clone, Copy)]
enum Of {
    Virtio,
    Protocol,
}

/// What the device cannot do without, and what it is called.
const NEEDED: [(Of, u64, &str); 8] = [
    (Of::Virtio, PROTOCOL_FEATURES, "VHOST_USER_F_PROTOCOL_FEATURES"),
    (Of::Virtio, VERSION_1, "VIRTIO_F_VERSION_1"),
    (Of::Protocol, Protocol::MQ.bits(), "VHOST_USER_PROTOCOL_F_MQ"),
    (Of::Protocol, Protocol::CONFIG.bits(), "VHOST_USER_PROTOCOL_F_CONFIG"),
    (Of::Protocol, Protocol::REPLY_ACK.bits(), "VHOST_USER_PROTOCOL_F_REPLY_ACK"),
    (Of::Protocol, Protocol::BACKEND_REQ.bits(), "VHOST_USER_PROTOCOL_F_BACKEND_REQ"),
    (Of::Protocol, Protocol::SHMEM.bits(), "VHOST_USER_PROTOCOL_F_SHMEM (bit 22)"),
    (Of::Protocol, SHMEM_STRICT, "VHOST_USER_PROTOCOL_F_SHMEM_STRICT (bit 61)"),
];

/// Number of GET_PROTOCOL_FEATURES.
const GET_PROTOCOL_FEATURES: u32 = 15;
/// Flags of a message's header: the version, and that it is a reply.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;

/// Why a broker cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The socket fails.
    #[error("the socket: {0}")]
    Socket(io::Error),
    /// A message fails.
    #[error("{step}: {error}")]
    Message {
        /// Which message.
        step: &'static str,
        /// What is wrong.
        error: vhost::Error,
    },
    /// Something that the device needs is not offered.
    #[error("the back-end does not offer {0}: is it the peer socket of a vhost-pci-switch of this version?")]
    Missing(&'static str),
    /// What it says of the device is not of this version, or does not fit together.
    #[error("the back-end describes no device of this version: {0}")]
    Geometry(&'static str),
    /// It is not the device that the guest has.
    #[error(
        "the broker's link has changed: its window or its number of vrings is another one; restart the VM"
    )]
    Changed,
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        Self::Socket(error)
    }
}

/// What the guest sees of the device for as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Device-specific configuration.
    pub config: [u8; CONFIG_LEN],
    /// Number of virtqueues.
    pub queues: u16,
    /// The window.
    pub apertures: Apertures,
}

/// A negotiated connection.
pub struct Connection {
    front_end: Frontend,
    /// The main socket, to watch and to shut down.
    pub main: UnixStream,
    /// This side's end of the back-end channel.
    pub channel: UnixStream,
    /// What the broker says that the device is.
    pub geometry: Geometry,
    /// Whether the broker may send WIRE.
    pub wiring: bool,
}

fn at<T>(step: &'static str, result: vhost::Result<T>) -> Result<T, HandshakeError> {
    result.map_err(|error| HandshakeError::Message { step, error })
}

/// GET_PROTOCOL_FEATURES with the bits that the vhost crate does not know, which it leaves out.
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

impl Connection {
    /// Negotiates over a fresh connection.
    ///
    /// # Errors
    /// If it is no broker's, or fails.
    pub fn negotiate(stream: UnixStream) -> Result<Self, HandshakeError> {
        stream.set_read_timeout(Some(ANSWER_TIME))?;
        stream.set_write_timeout(Some(ANSWER_TIME))?;
        let main = stream.try_clone()?;
        // The number of queues is known when GET_QUEUE_NUM is answered.
        let mut front_end = Frontend::from_stream(stream, 1);
        let features = at("GET_FEATURES", front_end.get_features())?;
        // The crate wants to have seen this answer before it lets others be sent.
        let protocol = match features & PROTOCOL_FEATURES {
            0 => 0,
            _ => {
                at("GET_PROTOCOL_FEATURES", front_end.get_protocol_features())?;
                all_protocol_features(&main)?
            }
        };
        for (offered, bits, name) in NEEDED.map(|(of, bits, name)| match of {
            Of::Virtio => (features, bits, name),
            Of::Protocol => (protocol, bits, name),
        }) {
            if offered & bits != bits {
                return Err(HandshakeError::Missing(name));
            }
        }
        let wiring = protocol & WIRING != 0;
        let accepted = REQUIRED | Protocol::from_bits_retain(protocol & WIRING);
        at("SET_PROTOCOL_FEATURES", front_end.set_protocol_features(accepted))?;
        // From here on each request without an answer of its own asks for one.
        front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let queues = at("GET_QUEUE_NUM", front_end.get_queue_num())?;
        at("SET_OWNER", front_end.set_owner())?;
        let bytes = [0; CONFIG_LEN];
        let config = front_end.get_config(0, CONFIG_LEN as u32, VhostUserConfigFlags::empty(), &bytes);
        let (_, config) = at("GET_CONFIG", config)?;
        let regions = at("GET_SHMEM_CONFIG", front_end.get_shmem_config())?;
        let region_len = if regions.nregions == 0 { 0 } else { regions.memory_sizes[0] };
        let geometry = geometry(&config, queues, region_len)?;
        let (channel, brokers) = UnixStream::pair()?;
        channel.set_read_timeout(Some(ANSWER_TIME))?;
        channel.set_write_timeout(Some(ANSWER_TIME))?;
        at("SET_BACKEND_REQ_FD", front_end.set_backend_request_fd(&brokers))?;
        Ok(Self { front_end, main, channel, geometry, wiring })
    }

    /// Starts the device with these queues (number and size) and their eventfds.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn start(&mut self, queues: &[(u16, u16)], pairs: &[Pair]) -> Result<(), HandshakeError> {
        let front_end = &mut self.front_end;
        // Not ACCESS_PLATFORM, which is between the driver and its platform: the broker
        // is told of no address that would need an IOMMU.
        at("SET_FEATURES", front_end.set_features(PROTOCOL_FEATURES | VERSION_1))?;
        for (queue, size) in queues {
            let index = usize::from(*queue);
            let Some(pair) = pairs.get(index) else { continue };
            at("SET_VRING_NUM", front_end.set_vring_num(index, *size))?;
            at("SET_VRING_BASE", front_end.set_vring_base(index, 0))?;
            at("SET_VRING_KICK", front_end.set_vring_kick(index, &pair.kick))?;
            at("SET_VRING_CALL", front_end.set_vring_call(index, &pair.call))?;
        }
        for (queue, _) in queues {
            at("SET_VRING_ENABLE", front_end.set_vring_enable((*queue).into(), true))?;
        }
        Ok(())
    }

    /// Tells that the device is stopped, which it is already.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn stop(&mut self, queues: &[(u16, u16)]) -> Result<(), HandshakeError> {
        for (queue, _) in queues {
            at("SET_VRING_ENABLE", self.front_end.set_vring_enable((*queue).into(), false))?;
        }
        for (queue, _) in queues {
            at("GET_VRING_BASE", self.front_end.get_vring_base((*queue).into()))?;
        }
        Ok(())
    }
}

fn geometry(config: &[u8], queues: u64, region_len: u64) -> Result<Geometry, HandshakeError> {
    let wrong = HandshakeError::Geometry;
    let bytes: [u8; CONFIG_LEN] = config.try_into().map_err(|_| wrong("the config space's length"))?;
    let config: DeviceConfig = zerocopy::transmute!(bytes);
    if config.magic.value() != CONFIG_MAGIC || config.version.value() != ABI_VERSION {
        return Err(wrong("the config space's magic or version"));
    }
    let vrings = config.max_vrings.value();
    if vrings == 0 || vrings > MAX_VRINGS || queues != u64::from(vrings) + u64::from(QUEUE_VRING_FIRST) {
        return Err(wrong("the number of virtqueues"));
    }
    if config.window_len.value() != region_len {
        return Err(wrong("the window's length"));
    }
    let apertures = Apertures::new(region_len).ok_or(wrong("the window is not two times some 2 MiB"))?;
    Ok(Geometry { config: bytes, queues: vrings + QUEUE_VRING_FIRST, apertures })
}
