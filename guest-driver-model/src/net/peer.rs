//! The peer's port: the device half of the owner's network queues, through the
//! window.
//!
//! Owns: one [`PeerQueue`] for each pair, which share nothing. A broken vring faults by itself;
//! the others go on. A port belongs to one link generation and is made anew for the next; its
//! queues follow the mapping table of that link by themselves.

use std::ops::Add;
use std::time::Duration;

use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::Counters;
use super::burst::{Packet, PacketBurst};
use super::lent::LentBurst;
use super::offload::{self, Offloads};
use crate::control::Exchange;
use crate::link::{LinkPage, LinkSnapshot};
use crate::port::{self, Port, PortError};
use crate::reach::Demand;
use crate::ring::{Fault, RingFeatures};
use crate::shm::SharedMemory;

mod queue;

pub use queue::PeerQueue;

/// The most packets of one burst, whatever the budget.
pub const MAX_BURST: usize = 256;

/// The features that a port serves.
const SERVED: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_F_ACCESS_PLATFORM
    | RingFeatures::BITS
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | offload::FEATURES;

/// The peer's port on an owner's network card: its queues, one a pair.
///
/// Whoever drives them with one thread has the pair as an argument here. For one thread a
/// queue there is [`queues_mut`](Self::queues_mut):
///
/// ```no_run
/// # use guest_driver_model::net::{PacketBurst, PeerPort, receive_vring, transmit_vring};
/// # fn call(vring: u16) {}
/// # fn serve(mut port: PeerPort, is_current: impl Fn() -> bool + Sync) {
/// std::thread::scope(|scope| {
///     for queue in port.queues_mut() {
///         scope.spawn(|| {
///             let mut burst = PacketBurst::with_capacity(64, 2048);
///             while is_current() {
///                 burst.clear();
///                 if queue.rx_burst(&mut burst, 64) != Ok(0) {
///                     let _ = queue.tx_burst(burst.iter());
///                     for vring in [transmit_vring(queue.pair()), receive_vring(queue.pair())] {
///                         if queue.needs_call(vring) {
///                             call(vring);
///                         }
///                     }
///                 }
///             }
///         });
///     }
/// });
/// # }
/// ```
///
/// Each queue follows the mapping table by itself. An [`Exchange`] is one thread's: of an owner
/// with an IOMMU the others get at what the table shows, and nothing more.
#[derive(Debug)]
pub struct PeerPort {
    generation: u64,
    offloads: Offloads,
    queues: Vec<PeerQueue>,
}

impl PeerPort {
    /// Starts to serve all enabled vrings of the snapshot, which was taken of this page of
    /// this window. A last vring without its pair is not looked at.
    pub fn new(window: &SharedMemory, page: &LinkPage, snapshot: &LinkSnapshot) -> Result<Self, PortError> {
        port::check(snapshot, (VIRTIO_ID_NET, "a network card"), SERVED)?;
        let (pairs, _) = snapshot.vrings.as_chunks();
        let queue = |(pair, both)| PeerQueue::new(pair, both, (window, page, snapshot));
        Ok(Self {
            generation: snapshot.generation,
            offloads: Offloads::to_owner(snapshot.features),
            queues: (0..).zip(pairs).map(queue).collect::<Result<_, _>>()?,
        })
    }

    /// The link generation that the port belongs to.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What the owner's driver accepts in the headers of what it receives.
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// Queue pairs; some may not be enabled.
    pub fn pairs(&self) -> u16 {
        self.queues.len() as u16
    }

    /// The queues, by pair: each for a thread of its own, if that is wanted.
    pub fn queues_mut(&mut self) -> &mut [PeerQueue] {
        &mut self.queues
    }

    /// The queues, by pair, for threads that outlive this call.
    pub fn into_queues(self) -> Vec<PeerQueue> {
        self.queues
    }

    /// The queue of a pair.
    #[inline]
    pub fn queue(&mut self, pair: u16) -> Option<&mut PeerQueue> {
        self.queues.get_mut(usize::from(pair))
    }

    /// The queue whose vring it is.
    #[inline]
    fn queue_of(&mut self, vring: u16) -> Option<&mut PeerQueue> {
        self.queue(vring / 2)
    }

    /// [`PeerQueue::is_enabled`].
    pub fn is_enabled(&self, vring: u16) -> bool {
        self.queues.get(usize::from(vring / 2)).is_some_and(|queue| queue.is_enabled(vring))
    }

    /// All faults so far, one for each broken vring.
    pub fn faults(&self) -> impl Iterator<Item = Fault> {
        self.queues.iter().flat_map(PeerQueue::faults)
    }

    /// [`PeerQueue::searches`], of all queues.
    pub fn searches(&self) -> u64 {
        self.queues.iter().map(PeerQueue::searches).sum()
    }

    /// What has passed since the port was made, by all queues.
    pub fn counters(&self) -> Counters {
        self.queues.iter().map(PeerQueue::counters).fold(Counters::default(), Add::add)
    }

    /// What the device was asked for since the port was made, by all queues.
    pub fn demand(&self) -> Demand {
        self.queues.iter().map(PeerQueue::demand).fold(Demand::default(), Add::add)
    }

    /// [`PeerQueue::pause`], the shortest.
    pub fn pause(&self) -> Option<Duration> {
        self.queues.iter().filter_map(PeerQueue::pause).min()
    }

    /// [`PeerQueue::rx_burst`]; 0 for a pair that there is not.
    #[inline]
    pub fn rx_burst(&mut self, pair: u16, burst: &mut PacketBurst, budget: usize) -> Result<usize, Fault> {
        self.queue(pair).map_or(Ok(0), |queue| queue.rx_burst(burst, budget))
    }

    /// [`PeerQueue::rx_burst_by`]; 0 for a pair that there is not.
    #[inline]
    pub fn rx_burst_by(
        &mut self,
        exchange: &mut dyn Exchange,
        pair: u16,
        burst: &mut PacketBurst,
        budget: usize,
    ) -> Result<usize, Fault> {
        self.queue(pair).map_or(Ok(0), |queue| queue.rx_burst_by(exchange, burst, budget))
    }

    /// [`PeerQueue::rx_lend`]; 0 for a pair that there is not.
    #[inline]
    pub fn rx_lend(&mut self, pair: u16, burst: &mut LentBurst, budget: usize) -> Result<usize, Fault> {
        self.queue(pair).map_or(Ok(0), |queue| queue.rx_lend(burst, budget))
    }

    /// [`PeerQueue::rx_lend_by`]; 0 for a pair that there is not.
    #[inline]
    pub fn rx_lend_by(
        &mut self,
        exchange: &mut dyn Exchange,
        pair: u16,
        burst: &mut LentBurst,
        budget: usize,
    ) -> Result<usize, Fault> {
        self.queue(pair).map_or(Ok(0), |queue| queue.rx_lend_by(exchange, burst, budget))
    }

    /// [`PeerQueue::is_in_place`], of the queue that has lent the burst.
    pub fn is_in_place(&mut self, burst: &LentBurst) -> bool {
        burst.pair().and_then(|pair| self.queue(pair)).is_some_and(|queue| queue.is_in_place(burst))
    }

    /// [`PeerQueue::rx_return`], to the queue that has lent the burst.
    #[inline]
    pub fn rx_return(&mut self, burst: &mut LentBurst) -> Result<usize, Fault> {
        let lender = burst.pair().and_then(|pair| self.queue(pair));
        lender.map_or(Ok(0), |queue| queue.rx_return(burst))
    }

    /// [`PeerQueue::tx_burst`]; 0 for a pair that there is not.
    #[inline]
    pub fn tx_burst<'a>(
        &mut self,
        pair: u16,
        packets: impl IntoIterator<Item: Into<Packet<'a>>>,
    ) -> Result<usize, Fault> {
        self.queue(pair).map_or(Ok(0), |queue| queue.tx_burst(packets))
    }

    /// [`PeerQueue::tx_burst_by`]; 0 for a pair that there is not.
    #[inline]
    pub fn tx_burst_by<'a>(
        &mut self,
        exchange: &mut dyn Exchange,
        pair: u16,
        packets: impl IntoIterator<Item: Into<Packet<'a>>>,
    ) -> Result<usize, Fault> {
        self.queue(pair).map_or(Ok(0), |queue| queue.tx_burst_by(exchange, packets))
    }

    /// [`PeerQueue::needs_call`].
    #[inline]
    pub fn needs_call(&mut self, vring: u16) -> bool {
        self.queue_of(vring).is_some_and(|queue| queue.needs_call(vring))
    }

    /// [`PeerQueue::set_kicks`].
    pub fn set_kicks(&mut self, vring: u16, enabled: bool) -> Result<bool, Fault> {
        self.queue_of(vring).map_or(Ok(false), |queue| queue.set_kicks(vring, enabled))
    }
}

impl Port for PeerPort {
    fn open(window: &SharedMemory, page: &LinkPage, snapshot: &LinkSnapshot) -> Result<Self, PortError> {
        Self::new(window, page, snapshot)
    }

    fn generation(&self) -> u64 {
        self.generation
    }

    fn vrings(&self) -> u16 {
        2 * self.pairs()
    }

    fn is_enabled(&self, vring: u16) -> bool {
        PeerPort::is_enabled(self, vring)
    }

    fn set_kicks(&mut self, vring: u16, enabled: bool) -> Result<bool, Fault> {
        PeerPort::set_kicks(self, vring, enabled)
    }

    fn faults(&self) -> Vec<Fault> {
        PeerPort::faults(self).collect()
    }

    fn demand(&self) -> Demand {
        PeerPort::demand(self)
    }

    fn pause(&self) -> Option<Duration> {
        PeerPort::pause(self)
    }
}
