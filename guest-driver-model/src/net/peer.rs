//! The peer's port: the device half of the owner's network queues, through the
//! window.
//!
//! Owns: one [`DeviceRing`] for each vring. A broken vring faults by itself; the others
//! go on. A port belongs to one link generation and is made anew for the next; it follows
//! the mapping table of that link by itself.

use std::time::Duration;

use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MRG_RXBUF,
};

use super::burst::PacketBurst;
use super::forward::{Destination, Origin};
use super::lent::{LentBurst, lend, take_back};
use super::reach::{Demand, LiveVring, Reach, Tables, on_miss};
use super::receive::receive;
use super::transmit::Transmitter;
use super::{Counters, receive_vring, transmit_vring};
use crate::control::{Exchange, Nobody};
use crate::link::{LinkPage, LinkSnapshot, VringInfo};
use crate::ring::{ChainBurst, DeviceRing, Fault, OnMiss, RingConfig, RingFeatures};
use crate::shm::SharedMemory;

/// The most packets of one burst, whatever the budget.
pub const MAX_BURST: usize = 256;

/// The features that a port serves.
const SERVED: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_F_ACCESS_PLATFORM
    | RingFeatures::BITS
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// The features with which the headers of what the owner transmits have something to say
/// (5.1.6.2). None of them is served yet.
const OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_HOST_UFO
    | 1 << VIRTIO_NET_F_HOST_USO;

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
    Live(Box<LiveVring>),
}

impl PortVring {
    fn new(
        vring: u16,
        info: &VringInfo,
        window: &SharedMemory,
        tables: &Tables,
        snapshot: &LinkSnapshot,
    ) -> Self {
        if !info.enabled {
            return Self::Absent;
        }
        let features = RingFeatures::of(snapshot.features);
        let ring = RingConfig::new(info, features)
            .map_err(|kind| Fault { kind, vring, value: u64::from(info.size) })
            .and_then(|config| {
                DeviceRing::new(vring, &config, window, tables.translation().clone(), features)
            });
        match ring {
            Ok(ring) => {
                let headers = snapshot.features & OFFLOADS != 0;
                Self::Live(Box::new(LiveVring::new(ring.on_miss(on_miss(snapshot)), tables, headers)))
            }
            Err(fault) => Self::Broken(fault),
        }
    }

    #[inline]
    fn live(&mut self) -> Result<Option<&mut LiveVring>, Fault> {
        match self {
            Self::Absent => Ok(None),
            Self::Broken(fault) => Err(*fault),
            Self::Live(live) => Ok(Some(live)),
        }
    }
}

/// The peer's port on an owner's network card.
#[derive(Debug)]
pub struct PeerPort {
    window: SharedMemory,
    tables: Tables,
    demand: Demand,
    vrings: Vec<PortVring>,
    /// By pair: chains of the owner's receive queue, popped ahead.
    transmitters: Vec<Transmitter>,
    /// Chains of the owner's transmit queue, for the time of one burst.
    chains: ChainBurst,
    counters: Counters,
}

impl PeerPort {
    /// Starts to serve all enabled vrings of the snapshot, which was taken of this page of
    /// this window.
    pub fn new(window: &SharedMemory, page: &LinkPage, snapshot: &LinkSnapshot) -> Result<Self, PortError> {
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
        let tables = Tables::new(page, snapshot);
        let mergeable = snapshot.has_feature(VIRTIO_NET_F_MRG_RXBUF);
        let vrings: Vec<_> = (0_u16..)
            .zip(&snapshot.vrings)
            .map(|(vring, info)| PortVring::new(vring, info, window, &tables, snapshot))
            .collect();
        Ok(Self {
            window: window.clone(),
            tables,
            demand: Demand::default(),
            transmitters: (0..vrings.len() / 2).map(|_| Transmitter::new(mergeable)).collect(),
            vrings,
            chains: ChainBurst::with_capacity(MAX_BURST),
            counters: Counters::default(),
        })
    }

    /// The link generation that the port belongs to.
    pub fn generation(&self) -> u64 {
        self.tables.generation()
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
            PortVring::Live(live) => live.ring.fault(),
        })
    }

    /// How often a buffer was not in the mapping of the one before and had to be searched for, since
    /// the mapping table changed: all others cost a comparison.
    pub fn searches(&self) -> u64 {
        let searches = |vring: &PortVring| match vring {
            PortVring::Live(live) => live.ring.searches(),
            PortVring::Absent | PortVring::Broken(_) => 0,
        };
        self.vrings.iter().map(searches).sum()
    }

    /// What has passed since the port was made.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// What the device was asked for since the port was made.
    pub fn demand(&self) -> Demand {
        Demand { table_reads: self.tables.reads(), ..self.demand }
    }

    /// How long it will be before the device is asked again for what it did not have, if
    /// there is such a thing: until then packets may wait in the owner's rings.
    pub fn pause(&self) -> Option<Duration> {
        let pauses = self.vrings.iter().filter_map(|vring| match vring {
            PortVring::Live(live) => live.backoff.left(),
            PortVring::Absent | PortVring::Broken(_) => None,
        });
        pauses.min()
    }

    #[inline]
    fn live(vrings: &mut [PortVring], vring: u16) -> Result<Option<&mut LiveVring>, Fault> {
        vrings.get_mut(usize::from(vring)).map_or(Ok(None), PortVring::live)
    }

    /// As [`Self::rx_burst_by`], where no device can be asked: enough for an owner without
    /// an IOMMU.
    #[inline]
    pub fn rx_burst(&mut self, pair: u16, burst: &mut PacketBurst, budget: usize) -> Result<usize, Fault> {
        self.rx_burst_by(&mut Nobody, pair, burst, budget)
    }

    /// Receives up to `budget` (and [`MAX_BURST`]) packets that the owner transmitted,
    /// appends them to `burst` and completes their descriptors. Returns how many;
    /// 0 for a pair that is not enabled, and from a link that has changed.
    ///
    /// What the mapping table does not show is had by `exchange`; a packet that it cannot
    /// have now stays with the owner. The owner may want a call afterwards: see
    /// [`Self::needs_call`].
    #[inline]
    pub fn rx_burst_by(
        &mut self,
        exchange: &mut dyn Exchange,
        pair: u16,
        burst: &mut PacketBurst,
        budget: usize,
    ) -> Result<usize, Fault> {
        let Some(live) = Self::live(&mut self.vrings, transmit_vring(pair))? else {
            return Ok(0);
        };
        if !self.tables.is_current() {
            return Ok(0);
        }
        live.end_loan();
        live.follow(&self.tables);
        let Self { window, tables, demand, chains, counters, .. } = self;
        let mut reach = Reach { window, tables, exchange, demand };
        receive(live, &mut reach, chains, burst, budget.min(MAX_BURST), counters)
    }

    /// As [`Self::rx_lend_by`], where no device can be asked: enough for an owner without
    /// an IOMMU.
    #[inline]
    pub fn rx_lend(&mut self, pair: u16, burst: &mut LentBurst, budget: usize) -> Result<usize, Fault> {
        self.rx_lend_by(&mut Nobody, pair, burst, budget)
    }

    /// Lends up to `budget` (and [`MAX_BURST`]) packets that the owner transmitted: `burst`,
    /// whatever it held before, has them then, and they stay in the owner's buffers until
    /// [`Self::rx_return`]. Returns how many; 0 for a pair that is not enabled, and from a link
    /// that has changed.
    ///
    /// A pair has one burst out at a time. What was lent before and not returned comes
    /// first, and the burst that had it returns nothing any more.
    ///
    /// What the mapping table does not show `exchange` has mapped. Of an owner whose IOMMU lets a
    /// packet be copied only, it cannot be lent: the burst ends before it and
    /// [`LentBurst::needs_copy`] says so. It is [`Self::rx_burst_by`]'s.
    #[inline]
    pub fn rx_lend_by(
        &mut self,
        exchange: &mut dyn Exchange,
        pair: u16,
        burst: &mut LentBurst,
        budget: usize,
    ) -> Result<usize, Fault> {
        let Some(live) = Self::live(&mut self.vrings, transmit_vring(pair))? else {
            return Ok(0);
        };
        if !self.tables.is_current() {
            return Ok(0);
        }
        live.follow(&self.tables);
        let Self { window, tables, demand, .. } = self;
        let mut reach = Reach { window, tables, exchange, demand };
        lend(live, &mut reach, burst, pair, budget.min(MAX_BURST))
    }

    /// Whether what was read of the burst up to now is what the owner transmitted, as far as its
    /// mappings go: it is what this port has lent, and no mapping has changed since. To be asked
    /// after the bytes were read and before they mean anything, of an owner with an IOMMU:
    /// what is taken out of the window reads as zeros. (That the owner rewrites its
    /// own buffers nobody can tell.)
    pub fn is_in_place(&mut self, burst: &LentBurst) -> bool {
        let lender = burst.pair().and_then(|pair| Self::live(&mut self.vrings, transmit_vring(pair)).ok()?);
        let generation = lender.and_then(|live| burst.table_generation(&live.lender));
        generation.is_some_and(|generation| self.tables.is_at(generation))
    }

    /// Gives all packets of the burst back to their owner: completes their descriptors. Returns
    /// how many; the burst is empty then. The owner may want a call afterwards: see
    /// [`Self::needs_call`].
    ///
    /// A burst that is not what this port has lent, or is no more, completes nothing and stays
    /// what it is. Nor does one of a link that has changed; it is empty then.
    #[inline]
    pub fn rx_return(&mut self, burst: &mut LentBurst) -> Result<usize, Fault> {
        let Some(pair) = burst.pair() else { return Ok(0) };
        let Some(live) = Self::live(&mut self.vrings, transmit_vring(pair))? else {
            return Ok(0);
        };
        let (packets, bytes) = take_back(live, self.tables.is_same_link(), burst);
        self.counters.rx_packets += packets as u64;
        self.counters.rx_bytes += bytes;
        Ok(packets)
    }

    /// As [`Self::tx_burst_by`], where no device can be asked: enough for an owner without
    /// an IOMMU.
    #[inline]
    pub fn tx_burst<'a>(
        &mut self,
        pair: u16,
        frames: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<usize, Fault> {
        self.tx_burst_by(&mut Nobody, pair, frames)
    }

    /// Transmits frames into the owner's receive buffers. Returns how many of them
    /// are done with: sent, or dropped because no buffer of the owner could ever take
    /// them. The others are the caller's to offer again. None where the link has changed.
    ///
    /// What the mapping table does not show is reached by `exchange`. The owner may want a
    /// call afterwards: see [`Self::needs_call`].
    #[inline]
    pub fn tx_burst_by<'a>(
        &mut self,
        exchange: &mut dyn Exchange,
        pair: u16,
        frames: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<usize, Fault> {
        let Some(live) = Self::live(&mut self.vrings, receive_vring(pair))? else {
            return Ok(0);
        };
        let Some(transmitter) = self.transmitters.get_mut(usize::from(pair)) else {
            return Ok(0);
        };
        if !self.tables.is_current() {
            return Ok(0);
        }
        if live.follow(&self.tables) {
            transmitter.put_back(&mut live.ring);
        }
        let Self { window, tables, demand, counters, .. } = self;
        if live.ring.miss_policy() == OnMiss::Fault {
            let result = transmitter.send(&mut live.ring, window, frames, counters);
            live.ring.flush_used();
            return result;
        }
        let mut reach = Reach { window, tables, exchange, demand };
        transmitter.send_reaching(live, &mut reach, frames, counters)
    }

    /// For one burst that takes what the owner transmitted on a pair.
    #[inline]
    pub(super) fn source<'a>(
        &'a mut self,
        exchange: &'a mut dyn Exchange,
        pair: u16,
    ) -> Result<Option<Origin<'a>>, Fault> {
        let Self { window, tables, demand, vrings, counters, .. } = self;
        let Some(live) = Self::live(vrings, transmit_vring(pair))?.filter(|_| tables.is_current()) else {
            return Ok(None);
        };
        live.end_loan();
        live.follow(tables);
        Ok(Some(Origin { live, reach: Reach { window, tables, exchange, demand }, counters }))
    }

    /// For one burst into the owner's receive buffers of a pair.
    #[inline]
    pub(super) fn target<'a>(
        &'a mut self,
        exchange: &'a mut dyn Exchange,
        pair: u16,
    ) -> Result<Option<Destination<'a>>, Fault> {
        let Self { window, tables, demand, vrings, transmitters, counters, .. } = self;
        let Some(live) = Self::live(vrings, receive_vring(pair))?.filter(|_| tables.is_current()) else {
            return Ok(None);
        };
        let Some(transmitter) = transmitters.get_mut(usize::from(pair)) else {
            return Ok(None);
        };
        if live.follow(tables) {
            transmitter.put_back(&mut live.ring);
        }
        let reach = Reach { window, tables, exchange, demand };
        Ok(Some(Destination { live, transmitter, reach, counters }))
    }

    /// Whether the owner's driver wants a call for what was completed on the vring
    /// since this was last asked. To be asked after each burst, for transmit queues
    /// too: recent Linux stops transmitting without these calls.
    #[inline]
    pub fn needs_call(&mut self, vring: u16) -> bool {
        Self::live(&mut self.vrings, vring).ok().flatten().is_some_and(|live| live.ring.needs_call())
    }

    /// Asks the owner's driver for kicks of the vring, or not to kick. Returns whether
    /// chains are waiting already: who gets `true` must not sleep. To be asked for before
    /// each sleep.
    pub fn set_kicks(&mut self, vring: u16, enabled: bool) -> Result<bool, Fault> {
        let Some(live) = Self::live(&mut self.vrings, vring)? else {
            return Ok(false);
        };
        live.ring.set_kicks(enabled)
    }
}
