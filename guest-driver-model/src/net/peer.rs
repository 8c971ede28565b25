//! The peer's port: the device half of the owner's network queues, through the
//! window.
//!
//! Owns: one [`DeviceRing`] for each vring, and the copying between the owner's
//! buffers and private ones. A broken vring faults by itself; the others go on. A
//! port belongs to one link generation and is made anew for the next.

use vhost_pci_device::abi::FaultKind;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use super::burst::PacketBurst;
use super::header::{HEADER_LEN, MAX_FRAME};
use super::transmit::Transmitter;
use super::{Counters, receive_vring, transmit_vring};
use crate::link::{LinkSnapshot, VringInfo};
use crate::ring::{Chain, ChainBurst, DeviceRing, Direction, Fault, RingConfig};
use crate::shm::{SharedMemory, ShmError};
use crate::translate::Translation;

/// The most packets of one burst, whatever the budget.
pub const MAX_BURST: usize = 256;

/// The features that a port serves.
const SERVED: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// Why a link gives no port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// The link is not up.
    #[error("the link is not up")]
    NotUp,
    /// The owner's device is no network card.
    #[error("the owner's device has virtio number {device}, not that of a network card")]
    NotNetwork {
        /// The virtio device number.
        device: u32,
    },
    /// The owner's driver is a legacy one.
    #[error("the owner's driver did not accept VIRTIO_F_VERSION_1 (features {features:#x})")]
    Legacy {
        /// What it accepted.
        features: u64,
    },
    /// The owner's driver accepted features that this port does not serve.
    #[error("the owner's driver accepted features that are not known here: {features:#x}")]
    Unknown {
        /// Those features alone.
        features: u64,
    },
}

/// A vring of the owner.
#[derive(Debug)]
enum PortVring {
    /// The owner's front-end has not enabled it.
    Absent,
    /// Its geometry cannot be used.
    Broken(Fault),
    /// In use, or dead from a fault of its own.
    Live(Box<DeviceRing>),
}

impl PortVring {
    fn new(
        vring: u16,
        info: &VringInfo,
        window: &SharedMemory,
        translation: &Translation,
        indirect_allowed: bool,
    ) -> Self {
        if !info.enabled {
            return Self::Absent;
        }
        let ring = RingConfig::try_from(info)
            .map_err(|kind| Fault { kind, vring, value: u64::from(info.size) })
            .and_then(|config| {
                DeviceRing::new(vring, &config, window, translation.clone(), indirect_allowed)
            });
        match ring {
            Ok(ring) => Self::Live(Box::new(ring)),
            Err(fault) => Self::Broken(fault),
        }
    }

    #[inline]
    fn ring(&mut self) -> Result<Option<&mut DeviceRing>, Fault> {
        match self {
            Self::Absent => Ok(None),
            Self::Broken(fault) => Err(*fault),
            Self::Live(ring) => Ok(Some(ring)),
        }
    }
}

/// The peer's port on an owner's network card.
#[derive(Debug)]
pub struct PeerPort {
    window: SharedMemory,
    generation: u64,
    vrings: Vec<PortVring>,
    /// By pair: chains of the owner's receive queue, popped ahead.
    transmitters: Vec<Transmitter>,
    /// Chains of the owner's transmit queue, for the time of one burst.
    chains: ChainBurst,
    counters: Counters,
}

impl PeerPort {
    /// Starts to serve all enabled vrings of the snapshot.
    pub fn new(window: &SharedMemory, snapshot: &LinkSnapshot) -> Result<Self, PortError> {
        if !snapshot.up {
            return Err(PortError::NotUp);
        }
        if snapshot.owner_device != VIRTIO_ID_NET {
            return Err(PortError::NotNetwork { device: snapshot.owner_device });
        }
        if !snapshot.has_feature(VIRTIO_F_VERSION_1) {
            return Err(PortError::Legacy { features: snapshot.features });
        }
        // What the owner's driver accepted changes its rings and packets: what is not
        // known here cannot be served.
        let unknown = snapshot.features & !SERVED;
        if unknown != 0 {
            return Err(PortError::Unknown { features: unknown });
        }
        let translation = Translation::from(snapshot);
        let indirect_allowed = snapshot.has_feature(VIRTIO_RING_F_INDIRECT_DESC);
        let mergeable = snapshot.has_feature(VIRTIO_NET_F_MRG_RXBUF);
        let vrings: Vec<_> = (0_u16..)
            .zip(&snapshot.vrings)
            .map(|(vring, info)| PortVring::new(vring, info, window, &translation, indirect_allowed))
            .collect();
        Ok(Self {
            window: window.clone(),
            generation: snapshot.generation,
            transmitters: (0..vrings.len() / 2).map(|_| Transmitter::new(mergeable)).collect(),
            vrings,
            chains: ChainBurst::with_capacity(MAX_BURST),
            counters: Counters::default(),
        })
    }

    /// The link generation that the port belongs to.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Queue pairs; some may not be enabled.
    pub fn pairs(&self) -> u16 {
        self.transmitters.len() as u16
    }

    /// Whether the owner's front-end has enabled the vring.
    pub fn is_enabled(&self, vring: u16) -> bool {
        !matches!(self.vrings.get(usize::from(vring)), None | Some(PortVring::Absent))
    }

    /// All faults so far, one for each broken vring.
    pub fn faults(&self) -> impl Iterator<Item = Fault> {
        self.vrings.iter().filter_map(|vring| match vring {
            PortVring::Absent => None,
            PortVring::Broken(fault) => Some(*fault),
            PortVring::Live(ring) => ring.fault(),
        })
    }

    /// What has passed since the port was made.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    #[inline]
    fn ring(vrings: &mut [PortVring], vring: u16) -> Result<Option<&mut DeviceRing>, Fault> {
        vrings.get_mut(usize::from(vring)).map_or(Ok(None), PortVring::ring)
    }

    /// Receives up to `budget` (and [`MAX_BURST`]) packets that the owner transmitted,
    /// appends them to `burst` and completes their descriptors. Returns how many;
    /// 0 for a pair that is not enabled.
    ///
    /// The owner may want a call afterwards: see [`Self::needs_call`].
    #[inline]
    pub fn rx_burst(&mut self, pair: u16, burst: &mut PacketBurst, budget: usize) -> Result<usize, Fault> {
        let Some(ring) = Self::ring(&mut self.vrings, transmit_vring(pair))? else {
            return Ok(0);
        };
        self.chains.clear();
        ring.pop_burst(budget.min(MAX_BURST), Direction::DeviceReads, &mut self.chains)?;
        let mut received = 0;
        let mut bytes = 0;
        for chain in self.chains.iter() {
            let Some(len) = packet_len(&chain) else {
                let fault = ring.fail(FaultKind::Length, chain.len);
                if received == 0 {
                    return Err(fault);
                }
                break;
            };
            if copy_out(&self.window, &chain, burst).is_err() {
                // Translation only yields what is in the window.
                let fault = ring.fail(FaultKind::Unmapped, chain.len);
                if received == 0 {
                    return Err(fault);
                }
                break;
            }
            burst.finish(len);
            ring.push_used(chain.head, 0);
            received += 1;
            bytes += len - HEADER_LEN;
        }
        ring.flush_used();
        self.counters.rx_packets += received as u64;
        self.counters.rx_bytes += bytes as u64;
        Ok(received)
    }

    /// Transmits frames into the owner's receive buffers. Returns how many of them
    /// are done with: sent, or dropped because no buffer of the owner could ever take
    /// them. The others are the caller's to offer again.
    ///
    /// The owner may want a call afterwards: see [`Self::needs_call`].
    #[inline]
    pub fn tx_burst<'a>(
        &mut self,
        pair: u16,
        frames: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<usize, Fault> {
        let Some(ring) = Self::ring(&mut self.vrings, receive_vring(pair))? else {
            return Ok(0);
        };
        let Some(transmitter) = self.transmitters.get_mut(usize::from(pair)) else {
            return Ok(0);
        };
        let result = transmitter.send(ring, &self.window, frames, &mut self.counters);
        ring.flush_used();
        result
    }

    /// Whether the owner's driver wants a call for what was completed on the vring
    /// since this was last asked. To be asked after each burst, for transmit queues
    /// too: recent Linux stops transmitting without these calls.
    #[inline]
    pub fn needs_call(&mut self, vring: u16) -> bool {
        Self::ring(&mut self.vrings, vring).ok().flatten().is_some_and(DeviceRing::needs_call)
    }

    /// Asks the owner's driver for kicks of the vring, or not to kick. Returns whether
    /// chains are waiting already: who gets `true` must not sleep.
    pub fn set_kicks(&mut self, vring: u16, enabled: bool) -> Result<bool, Fault> {
        let Some(ring) = Self::ring(&mut self.vrings, vring)? else {
            return Ok(false);
        };
        ring.set_kicks(enabled)
    }
}

/// Length of header and frame, if the chain can be a packet.
#[inline]
fn packet_len(chain: &Chain<'_>) -> Option<usize> {
    let len = usize::try_from(chain.len).ok()?;
    (HEADER_LEN..=HEADER_LEN + MAX_FRAME).contains(&len).then_some(len)
}

/// Copies header and frame out of shared memory, each byte once.
#[inline]
fn copy_out(window: &SharedMemory, chain: &Chain<'_>, burst: &mut PacketBurst) -> Result<(), ShmError> {
    let mut filled = 0;
    for segment in chain.segments {
        let len = segment.len as usize;
        window.read(segment.offset, burst.room(filled, len))?;
        filled += len;
    }
    Ok(())
}
