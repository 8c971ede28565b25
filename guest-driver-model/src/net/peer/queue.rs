//! One pair of the owner's queues, from the peer's side.
//!
//! Owns: all that a burst works with, so that no two queues have anything to wait for each other
//! with: each can be driven by a thread of its own. What all of them read, and the device alone writes,
//! is the link page.

use std::time::Duration;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::MAX_BURST;
use crate::control::{Exchange, Nobody};
use crate::link::{LinkPage, LinkSnapshot, VringInfo};
use crate::net::burst::{Packet, PacketBurst};
use crate::net::forward::{Destination, Origin};
use crate::net::lent::{LentBurst, lend, take_back};
use crate::net::offload::{self, Offloads};
use crate::net::receive::receive;
use crate::net::transmit::Transmitter;
use crate::net::vring::{LiveVring, Packets, PortVring};
use crate::net::{Counters, receive_vring, transmit_vring};
use crate::reach::{Demand, Reach, Tables};
use crate::ring::{ChainBurst, Fault, OnMiss};
use crate::shm::{SharedMemory, ShmError};

/// The peer's side of a pair: of the vring that the owner transmits by, and of the one that it
/// receives by.
///
/// On cache lines of its own: what one thread writes here is not what another one's queue is
/// beside.
#[derive(Debug)]
#[repr(align(128))]
pub struct PeerQueue {
    pair: u16,
    window: SharedMemory,
    tables: Tables,
    demand: Demand,
    /// The owner's receive queue.
    target: PortVring,
    /// The owner's transmit queue.
    source: PortVring,
    /// Chains of the owner's receive queue, popped ahead.
    transmitter: Transmitter,
    /// Chains of the owner's transmit queue, for the time of one burst.
    chains: ChainBurst,
    counters: Counters,
}

impl PeerQueue {
    /// Starts to serve both vrings of a pair, as far as they are enabled.
    pub(super) fn new(
        pair: u16,
        [target, source]: &[VringInfo; 2],
        (window, page, snapshot): (&SharedMemory, &LinkPage, &LinkSnapshot),
    ) -> Result<Self, ShmError> {
        // By this the queue writes, whatever it writes.
        let (window, log) = snapshot.serving(window)?;
        let tables = Tables::new(page, snapshot, log);
        let window = &window;
        let headers = snapshot.features & offload::TRANSMITTED != 0;
        let vring =
            |vring, info| PortVring::new(vring, info, window, &tables, snapshot, Packets::new(headers));
        Ok(Self {
            pair,
            window: window.clone(),
            demand: Demand::default(),
            target: vring(receive_vring(pair), target),
            source: vring(transmit_vring(pair), source),
            transmitter: Transmitter::new(
                snapshot.has_feature(VIRTIO_NET_F_MRG_RXBUF),
                Offloads::to_owner(snapshot.features),
            ),
            chains: ChainBurst::with_capacity(MAX_BURST),
            counters: Counters::default(),
            tables,
        })
    }

    /// Its number.
    pub fn pair(&self) -> u16 {
        self.pair
    }

    /// The link generation that the queue belongs to.
    pub fn generation(&self) -> u64 {
        self.tables.generation()
    }

    /// What the owner's driver accepts in the headers of what it receives.
    pub fn offloads(&self) -> Offloads {
        self.transmitter.offloads
    }

    /// Whether the owner's front-end has enabled the vring, which is one of this pair's.
    pub fn is_enabled(&self, vring: u16) -> bool {
        let vrings = self.numbered().into_iter();
        vrings.filter(|(number, _)| *number == vring).any(|(_, vring)| vring.is_enabled())
    }

    /// Both vrings, in the order of their numbers.
    fn numbered(&self) -> [(u16, &PortVring); 2] {
        [(receive_vring(self.pair), &self.target), (transmit_vring(self.pair), &self.source)]
    }

    /// The faults so far: one at most for each vring.
    pub fn faults(&self) -> impl Iterator<Item = Fault> {
        self.numbered().into_iter().filter_map(|(_, vring)| vring.fault())
    }

    /// How often a buffer was not in the mapping of the one before and had to be searched for, since
    /// the mapping table changed: all others cost a comparison.
    pub fn searches(&self) -> u64 {
        let searches = |(_, vring): (u16, &PortVring)| match vring {
            PortVring::Live(live) => live.ring.searches(),
            PortVring::Absent | PortVring::Broken(_) => 0,
        };
        self.numbered().into_iter().map(searches).sum()
    }

    /// What has passed since the queue was made.
    #[inline]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// What the device was asked for since the queue was made.
    pub fn demand(&self) -> Demand {
        Demand { table_reads: self.tables.reads(), ..self.demand }
    }

    /// How long it will be before the device is asked again for what it did not have, if
    /// there is such a thing: until then packets may wait in the owner's rings.
    pub fn pause(&self) -> Option<Duration> {
        self.numbered().into_iter().filter_map(|(_, vring)| vring.pause()).min()
    }

    /// A vring by its number; `None` of another pair's, and of one that is not enabled.
    #[inline]
    fn live(&mut self, vring: u16) -> Result<Option<&mut LiveVring>, Fault> {
        match vring {
            _ if vring == receive_vring(self.pair) => self.target.live(),
            _ if vring == transmit_vring(self.pair) => self.source.live(),
            _ => Ok(None),
        }
    }

    /// As [`Self::rx_burst_by`], where no device can be asked: enough for an owner without
    /// an IOMMU.
    #[inline]
    pub fn rx_burst(&mut self, burst: &mut PacketBurst, budget: usize) -> Result<usize, Fault> {
        self.rx_burst_by(&mut Nobody, burst, budget)
    }

    /// Receives up to `budget` (and [`MAX_BURST`]) packets that the owner transmitted,
    /// appends them to `burst` and completes their descriptors. Returns how many;
    /// 0 where the owner's front-end has not enabled the vring, and from a link that has changed.
    ///
    /// What the mapping table does not show is had by `exchange`; a packet that it cannot
    /// have now stays with the owner. The owner may want a call afterwards: see
    /// [`Self::needs_call`].
    #[inline]
    pub fn rx_burst_by(
        &mut self,
        exchange: &mut dyn Exchange,
        burst: &mut PacketBurst,
        budget: usize,
    ) -> Result<usize, Fault> {
        let Some(Origin { live, mut reach, chains, counters }) = self.source(exchange)? else {
            return Ok(0);
        };
        receive(live, &mut reach, chains, burst, budget.min(MAX_BURST), counters)
    }

    /// As [`Self::rx_lend_by`], where no device can be asked: enough for an owner without
    /// an IOMMU.
    #[inline]
    pub fn rx_lend(&mut self, burst: &mut LentBurst, budget: usize) -> Result<usize, Fault> {
        self.rx_lend_by(&mut Nobody, burst, budget)
    }

    /// Lends up to `budget` (and [`MAX_BURST`]) packets that the owner transmitted: `burst`,
    /// whatever it held before, has them then, and they stay in the owner's buffers until
    /// [`Self::rx_return`]. Returns how many; 0 where the owner's front-end has not enabled the
    /// vring, and from a link that has changed.
    ///
    /// A queue has one burst out at a time. What was lent before and not returned comes
    /// first, and the burst that had it returns nothing any more.
    ///
    /// What the mapping table does not show `exchange` has mapped. Of an owner whose IOMMU lets a
    /// packet be copied only, it cannot be lent: the burst ends before it and
    /// [`LentBurst::needs_copy`] says so. It is [`Self::rx_burst_by`]'s.
    #[inline]
    pub fn rx_lend_by(
        &mut self,
        exchange: &mut dyn Exchange,
        burst: &mut LentBurst,
        budget: usize,
    ) -> Result<usize, Fault> {
        let pair = self.pair;
        let Some(Origin { live, mut reach, .. }) = self.source(exchange)? else {
            return Ok(0);
        };
        lend(live, &mut reach, burst, pair, budget.min(MAX_BURST))
    }

    /// Whether what was read of the burst up to now is what the owner transmitted, as far as its
    /// mappings go: it is what this queue has lent, and no mapping has changed since. To be asked
    /// after the bytes were read and before they mean anything, of an owner with an IOMMU:
    /// what is taken out of the window reads as zeros. (That the owner rewrites its
    /// own buffers nobody can tell.)
    pub fn is_in_place(&mut self, burst: &LentBurst) -> bool {
        let lender = self.source.live().ok().flatten();
        let generation = lender.and_then(|live| burst.table_generation(&live.kind.lender));
        generation.is_some_and(|generation| self.tables.is_at(generation))
    }

    /// Gives all packets of the burst back to their owner: completes their descriptors. Returns
    /// how many; the burst is empty then. The owner may want a call afterwards: see
    /// [`Self::needs_call`].
    ///
    /// A burst that is not what this queue has lent, or is no more, completes nothing and stays
    /// what it is. Nor does one of a link that has changed; it is empty then.
    #[inline]
    pub fn rx_return(&mut self, burst: &mut LentBurst) -> Result<usize, Fault> {
        let Some(live) = self.source.live()? else {
            return Ok(0);
        };
        let (packets, bytes) = take_back(live, self.tables.is_same_link(), burst);
        self.counters.rx_packets += packets as u64;
        self.counters.rx_bytes += bytes;
        Ok(packets)
    }

    /// Whether the headers of what the owner transmits have something to say: it accepted an offload.
    pub fn has_headers(&mut self) -> bool {
        self.source.live().ok().flatten().is_some_and(|live| live.kind.headers)
    }

    /// What is done about what the owner transmits and the window does not show.
    pub(in crate::net) fn miss_policy(&mut self) -> OnMiss {
        let live = self.source.live().ok().flatten();
        live.map_or(OnMiss::Fault, |live| live.ring.miss_policy())
    }

    /// As [`Self::tx_burst_by`], where no device can be asked: enough for an owner without
    /// an IOMMU.
    #[inline]
    pub fn tx_burst<'a>(
        &mut self,
        packets: impl IntoIterator<Item: Into<Packet<'a>>>,
    ) -> Result<usize, Fault> {
        self.tx_burst_by(&mut Nobody, packets)
    }

    /// Transmits packets, or frames alone, into the owner's receive buffers. Returns how many of them
    /// are done with: sent, or dropped because no buffer of the owner could ever take
    /// them. The others are the caller's to offer again. None where the link has changed.
    ///
    /// What a packet's header leaves to the receiver is judged by what its driver accepted: a checksum
    /// that it wants whole is completed; a packet that it wants cut, or whose header cannot be its own,
    /// is dropped.
    ///
    /// What the mapping table does not show is reached by `exchange`. The owner may want a
    /// call afterwards: see [`Self::needs_call`].
    #[inline]
    pub fn tx_burst_by<'a>(
        &mut self,
        exchange: &mut dyn Exchange,
        packets: impl IntoIterator<Item: Into<Packet<'a>>>,
    ) -> Result<usize, Fault> {
        let Some(Destination { live, transmitter, mut reach, counters }) = self.target(exchange)? else {
            return Ok(0);
        };
        if live.ring.miss_policy() == OnMiss::Fault {
            let result = transmitter.send(&mut live.ring, reach.window, packets, counters);
            live.ring.flush_used();
            return result;
        }
        transmitter.send_reaching(live, &mut reach, packets, counters)
    }

    /// For one burst that takes what the owner transmitted: of the table of now, with no loan out.
    #[inline]
    pub(in crate::net) fn source<'a>(
        &'a mut self,
        exchange: &'a mut dyn Exchange,
    ) -> Result<Option<Origin<'a>>, Fault> {
        let Self { window, tables, demand, source, chains, counters, .. } = self;
        let Some(live) = source.live()?.filter(|_| tables.is_current()) else {
            return Ok(None);
        };
        live.end_loan();
        live.follow(tables);
        let reach = Reach { window, tables, exchange, demand };
        Ok(Some(Origin { live, reach, chains, counters }))
    }

    /// For one burst into the owner's receive buffers: of the table of now.
    #[inline]
    pub(in crate::net) fn target<'a>(
        &'a mut self,
        exchange: &'a mut dyn Exchange,
    ) -> Result<Option<Destination<'a>>, Fault> {
        let Self { window, tables, demand, target, transmitter, counters, .. } = self;
        let Some(live) = target.live()?.filter(|_| tables.is_current()) else {
            return Ok(None);
        };
        if live.follow(tables) {
            transmitter.put_back(&mut live.ring);
        }
        let reach = Reach { window, tables, exchange, demand };
        Ok(Some(Destination { live, transmitter, reach, counters }))
    }

    /// Whether the owner's driver wants a call for what was completed on the vring, which is one
    /// of this pair's, since this was last asked. To be asked after each burst, for transmit queues
    /// too: recent Linux stops transmitting without these calls.
    #[inline]
    pub fn needs_call(&mut self, vring: u16) -> bool {
        self.live(vring).ok().flatten().is_some_and(|live| live.ring.needs_call())
    }

    /// Asks the owner's driver for kicks of the vring, which is one of this pair's, or not to
    /// kick. Returns whether chains are waiting already: who gets `true` must not sleep. To be asked
    /// for before each sleep. Packets that are lent are waiting: who forgot them gets them by the
    /// next [`rx_lend`](Self::rx_lend), for which nobody kicks any more.
    pub fn set_kicks(&mut self, vring: u16, enabled: bool) -> Result<bool, Fault> {
        let Some(live) = self.live(vring)? else { return Ok(false) };
        let waiting = live.ring.set_kicks(enabled)?;
        Ok(waiting || enabled && live.kind.lender.is_out())
    }
}
