//! A link's buffers, lent to a network card: what the owner transmits the card sends, and what the card
//! receives it writes into the buffers that the owner posted.
//!
//! Owns: what the card may reach, which is what the mapping table shows, and the order in which things go:
//! a range that leaves the table leaves the card's reach when the card has given back what it holds of it,
//! and then the device may be told (`docs/vhost-pci-device.md`, 9.5). A range that the card can reach is in
//! the window, and one that it has a buffer in, it can reach.

use std::time::Duration;

use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::{Lent, Nic, NicError, Piece, Way};
use crate::control::Exchange;
use crate::link::{LinkError, LinkPage, LinkSnapshot, Mapping};
use crate::net::passage::{Burst, Completed, Passage, Passed};
use crate::net::{HEADER_LEN, receive_vring, transmit_vring};
use crate::port::{self, PortError};
use crate::reach::Demand;
use crate::ring::{Chain, Completion, Direction, Fault, Place, RingFeatures};
use crate::shm::SharedMemory;
use crate::translate::Translation;

/// The features of an owner that can be served.
const SERVED: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_F_ACCESS_PLATFORM
    | RingFeatures::BITS
    | 1 << VIRTIO_NET_F_MRG_RXBUF;
/// The most buffers of a burst.
const BURST: usize = 64;

/// Why a link is not served, or not any more.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The owner's device is no network card of virtio 1.0 or later.
    #[error(transparent)]
    Port(PortError),
    /// The owner's driver leaves work to its card.
    #[error(
        "the owner's driver accepted features {features:#x}, which a card that is lent its buffers does not \
         serve: set offloads = false for the link in the broker's configuration, and start the owner anew"
    )]
    Features {
        /// Those features alone.
        features: u64,
    },
    /// The owner's driver uses more queues than the card is driven with.
    #[error(
        "the owner's driver uses other queues than one pair: set queue_pairs = 1 for the link, or \
         `ethtool -L IFACE combined 1` in the owner"
    )]
    Queues,
    /// What the owner allows in one direction only, its VMM shows nobody.
    #[error(
        "the buffer at IOVA {iova:#x} is not in the window, and is not to be shown: the owner's IOMMU allows one \
         direction of access to it only, and its link says one_way = \"refuse\". A card cannot be lent what the \
         window does not show: set one_way = \"widen\" for the link, or have the owner's driver map its memory once \
         and both ways (DPDK, VFIO; Linux: iommu=pt)"
    )]
    NotShown {
        /// The buffer's first address, as the owner names it.
        iova: u64,
    },
    /// The owner is being migrated.
    #[error(
        "the owner is being migrated, and its VMM wants to know of each page that is written, which a card does not \
         say: it gets its buffers back until that is over (`tap` or `forward` would serve the owner meanwhile)"
    )]
    Logged,
    /// A vring's geometry cannot be used.
    #[error(transparent)]
    Vring(#[from] Fault),
    /// The link page cannot be read.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The card.
    #[error(transparent)]
    Nic(#[from] NicError),
}

/// What has passed, and what it took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// Packets of the owner's that the card has sent.
    pub tx_packets: u64,
    /// Bytes of their frames.
    pub tx_bytes: u64,
    /// Buffers of the owner's that the card has received into.
    pub rx_packets: u64,
    /// Bytes of the frames in them.
    pub rx_bytes: u64,
    /// Packets and buffers that the card can never take.
    pub dropped: u64,
    /// Times that the card had to stop because the owner took back what it held.
    pub quiesced: u64,
    /// Buffers that it gave back for that, or because it failed: lent anew, as far as they are still there.
    pub given_back: u64,
    /// Times that the card failed, or was reset by somebody else, and was started again.
    pub nic_resets: u64,
    /// Ranges that the card was let reach.
    pub reached: u64,
    /// Ranges that were taken out of its reach.
    pub forgotten: u64,
}

counts!(Counts {
    tx_packets,
    tx_bytes,
    rx_packets,
    rx_bytes,
    dropped,
    quiesced,
    given_back,
    nic_resets,
    reached,
    forgotten
});

impl From<PortError> for PassError {
    fn from(error: PortError) -> Self {
        match error {
            // That can be mended.
            PortError::Unknown { features } => Self::Features { features },
            other => Self::Port(other),
        }
    }
}

/// What a round came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Buffers that were lent or completed.
    pub moved: usize,
    /// The device may be told that all that is not in the table of this generation was let go of.
    pub release: Option<u64>,
    /// Whether the owner wants to be called for what it receives, and for what it transmits.
    pub calls: [bool; 2],
    /// Vrings that were found broken: what the owner receives by, and transmits by. They are not served any more.
    pub faults: [Option<Fault>; 2],
}

/// The buffers of a link at one generation.
#[derive(Debug)]
pub struct Pass {
    window: SharedMemory,
    page: LinkPage,
    generation: u64,
    table_generation: u64,
    /// What the card reaches, at most: the mapping table of that generation, in its order.
    reached: Vec<Mapping>,
    /// How often the table was read because it had changed.
    table_reads: u64,
    receive: Passage,
    send: Passage,
    mergeable: bool,
    counts: Counts,
    collected: Vec<Completion>,
    pieces: Vec<Piece>,
    faults: Vec<Fault>,
    /// The card had no room for more to receive into, and to send.
    full: [bool; 2],
    /// Buffers that came back and are no owner's.
    strays: u64,
    /// The device waits for more than was let go of.
    release_again: bool,
}

impl Pass {
    /// Lets the card reach what the snapshot shows, which was taken of this page of this window, and starts
    /// it. The device must have been told that one uses the window.
    ///
    /// # Errors
    /// Why this owner cannot be served by this card; then the card reaches nothing of it.
    pub fn start(
        window: &SharedMemory,
        page: &LinkPage,
        snapshot: &LinkSnapshot,
        nic: &mut dyn Nic,
    ) -> Result<Self, PassError> {
        port::check(snapshot, (VIRTIO_ID_NET, "a network card"), SERVED)?;
        if snapshot.log.is_some() {
            return Err(PassError::Logged);
        }
        let vrings = [receive_vring(0), transmit_vring(0)];
        let enabled = (0..).zip(&snapshot.vrings).filter(|(_, vring)| vring.enabled);
        if !enabled.map(|(number, _): (u16, _)| number).eq(vrings) {
            return Err(PassError::Queues);
        }
        let [receive, transmit] = vrings;
        let mut pass = Self {
            window: window.clone(),
            page: page.clone(),
            generation: snapshot.generation,
            table_generation: snapshot.table_generation,
            reached: snapshot.mappings.clone(),
            table_reads: 0,
            receive: Passage::new(window, page, snapshot, receive, Direction::DeviceWrites)?,
            send: Passage::new(window, page, snapshot, transmit, Direction::DeviceReads)?,
            mergeable: snapshot.has_feature(VIRTIO_NET_F_MRG_RXBUF),
            counts: Counts::default(),
            collected: Vec::new(),
            pieces: Vec::new(),
            faults: Vec::new(),
            full: [false; 2],
            strays: 0,
            release_again: false,
        };
        // Nobody needs to be kicked before the first sleep.
        pass.receive.set_kicks(false)?;
        pass.send.set_kicks(false)?;
        let started = pass.reach(nic, &snapshot.mappings).and_then(|()| nic.start(pass.mergeable));
        match started {
            Ok(()) => Ok(pass),
            Err(error) => {
                pass.end(nic)?;
                Err(error.into())
            }
        }
    }

    /// The link generation that it belongs to.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What has passed.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Buffers that the card has: to receive into, and to send.
    pub fn lent(&self) -> [usize; 2] {
        [self.receive.out(), self.send.out()]
    }

    /// Buffers that the card gave back and that are no owner's.
    pub fn strays(&self) -> u64 {
        self.strays
    }

    /// What the device was asked for.
    pub fn demand(&self) -> Demand {
        let table_reads = self.table_reads;
        self.receive.demand() + self.send.demand() + Demand { table_reads, ..Demand::default() }
    }

    /// How long it will be before the device is asked again for what it did not have, if there is such a
    /// thing.
    pub fn pause(&self) -> Option<Duration> {
        [self.receive.pause(), self.send.pause()].into_iter().flatten().min()
    }

    /// The first bus address behind all that the card reaches of the window.
    pub fn end_of_reach(&self, nic: &dyn Nic) -> u64 {
        let end = self.reached.iter().map(|range| range.window_offset + range.len).max();
        nic.bus(end.unwrap_or(0))
    }

    /// Follows the mapping table, completes what the card has given back, and lends what the owner has
    /// made available. Nothing, if the link is another one; and nothing is lent before the device was told of
    /// what was let go of, as it answers nothing else before.
    ///
    /// # Errors
    /// Why the link cannot be served any more.
    pub fn round(&mut self, nic: &mut dyn Nic, exchange: &mut dyn Exchange) -> Result<Round, PassError> {
        let mut round = Round::default();
        if !self.follow(nic, &mut round)? {
            return Ok(round);
        }
        if round.release.is_some() {
            // There is more to do, whatever has moved.
            round.moved = round.moved.max(1);
            round.calls = self.calls();
            return Ok(round);
        }
        if let Err(error) = self.collect(nic, &mut round) {
            self.recover(nic, &error)?;
        }
        for (way, at) in [(Way::Send, 1), (Way::Receive, 0)] {
            let burst = match self.pass(way, nic, exchange) {
                Ok(burst) => burst,
                Err(fault) => {
                    if !self.faults.contains(&fault)
                        && let Some(new) = round.faults.get_mut(at)
                    {
                        self.faults.push(fault);
                        *new = Some(fault);
                    }
                    continue;
                }
            };
            if let Some(full) = self.full.get_mut(at) {
                *full = burst.no_room;
            }
            round.moved += burst.passed + burst.dropped;
            if burst.passed > 0 {
                nic.publish(way);
            }
            if let Some(iova) = burst.not_shown {
                return Err(PassError::NotShown { iova });
            }
        }
        round.calls = self.calls();
        Ok(round)
    }

    fn calls(&mut self) -> [bool; 2] {
        [self.receive.needs_call(), self.send.needs_call()]
    }

    /// For once in a while: starts the card again if it does not work any more.
    ///
    /// # Errors
    /// If it does not start, or is not to be had any more.
    pub fn check(&mut self, nic: &mut dyn Nic) -> Result<(), PassError> {
        match nic.check() {
            Ok(()) => Ok(()),
            Err(error @ NicError::Transport(_)) => Err(error.into()),
            Err(error) => self.recover(nic, &error),
        }
    }

    /// Asks owner and card to notify, or not to. Whether there is something to do already.
    ///
    /// # Errors
    /// If the card broke a rule.
    pub fn set_notified(&mut self, nic: &mut dyn Nic, enabled: bool) -> Result<bool, PassError> {
        let mut any = false;
        for (passage, full) in [&mut self.receive, &mut self.send].into_iter().zip(self.full) {
            // A fault shows again with the next burst. What waits because the card is full is no work: the
            // card says when it is not. Nor is what waits for the device to be asked again.
            any |= passage.set_kicks(enabled).unwrap_or(false) && !full && passage.pause().is_none();
        }
        any |= nic.set_interrupts(enabled)?;
        Ok(any || self.page.table_generation() != self.table_generation)
    }

    /// The device did not take the last release for all that it waits for: more has left the table, and the
    /// next is due when that was followed.
    pub fn release_again(&mut self) {
        self.release_again = true;
    }

    /// Stops the card and takes all of the window out of its reach. When this returns without an error the
    /// device may be told.
    ///
    /// # Errors
    /// If the card does not stop, though it reaches nothing any more, or if the system does not take
    /// something from it: it may then still reach the owner's memory.
    pub fn end(&mut self, nic: &mut dyn Nic) -> Result<(), NicError> {
        // What keeps the card out in any case is its IOMMU.
        let stopped = nic.stop();
        self.counts.given_back += (self.receive.take_back() + self.send.take_back()) as u64;
        let all = std::mem::take(&mut self.reached);
        self.forget(nic, &all).and(stopped)
    }

    /// Follows the mapping table. Whether the link is still the same.
    fn follow(&mut self, nic: &mut dyn Nic, round: &mut Round) -> Result<bool, PassError> {
        if self.page.table_generation() == self.table_generation {
            return Ok(true);
        }
        let table = match self.page.table() {
            Ok(table) if table.generation == self.generation => table,
            // It is being changed, or is another link's: whoever looks at the generation sees it.
            Ok(_) | Err(LinkError::Changing | LinkError::NotMapped) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        if table.log.is_some() {
            return Err(PassError::Logged);
        }
        self.table_reads += 1;
        let (lost, new) = (missing(&self.reached, &table.mappings), missing(&table.mappings, &self.reached));
        let held = self.receive.has_out(&lost) || self.send.has_out(&lost);
        if held {
            // It gives nothing back but all of it.
            self.counts.quiesced += 1;
            self.stop(nic, round)?;
        }
        self.forget(nic, &lost)?;
        let translation = Translation::new(&table.mappings);
        self.reached = table.mappings;
        self.table_generation = table.table_generation;
        if !lost.is_empty() || std::mem::take(&mut self.release_again) {
            round.release = Some(table.table_generation);
        }
        self.reach(nic, &new)?;
        self.receive.follow(table.table_generation, &translation);
        self.send.follow(table.table_generation, &translation);
        if held {
            nic.start(self.mergeable)?;
        }
        Ok(true)
    }

    /// Stops the card. What it had given back before is completed, and the rest is lent anew later.
    fn stop(&mut self, nic: &mut dyn Nic, round: &mut Round) -> Result<(), NicError> {
        nic.stop()?;
        // A card that breaks its rings now has given nothing back.
        let _ = self.collect(nic, round);
        self.counts.given_back += (self.receive.take_back() + self.send.take_back()) as u64;
        Ok(())
    }

    /// The card does not work any more: it is started again, with what it had.
    fn recover(&mut self, nic: &mut dyn Nic, error: &NicError) -> Result<(), PassError> {
        tracing::warn!(lent = ?self.lent(), "{error}; it is started again");
        self.counts.nic_resets += 1;
        self.stop(nic, &mut Round::default())?;
        nic.start(self.mergeable)?;
        Ok(())
    }

    /// Takes back what the card has given back, and completes it.
    fn collect(&mut self, nic: &mut dyn Nic, round: &mut Round) -> Result<(), NicError> {
        let counts = &mut self.counts;
        for (way, passage) in [(Way::Send, &mut self.send), (Way::Receive, &mut self.receive)] {
            self.collected.clear();
            let collected = nic.collect(way, &mut self.collected);
            // Of another link nothing is written and nothing completed.
            let is_same_link = || self.page.generation() == self.generation;
            let count_buffers = way == Way::Receive && !nic.is_mergeable() && is_same_link();
            for completion in &self.collected {
                if !passage.back(completion.token, completion.len, count_buffers) {
                    self.strays += 1;
                }
            }
            if is_same_link() {
                let Completed { packets, bytes, dropped } = passage.complete();
                let (all, all_bytes) = match way {
                    Way::Send => (&mut counts.tx_packets, &mut counts.tx_bytes),
                    Way::Receive => (&mut counts.rx_packets, &mut counts.rx_bytes),
                };
                *all += packets;
                *all_bytes += bytes;
                counts.dropped += dropped;
                round.moved += packets as usize;
            }
            collected?;
        }
        Ok(())
    }

    /// Lends what the owner has made available.
    fn pass(&mut self, way: Way, nic: &mut dyn Nic, exchange: &mut dyn Exchange) -> Result<Burst, Fault> {
        let (passage, skip) = match way {
            Way::Send => (&mut self.send, HEADER_LEN as u32),
            Way::Receive => (&mut self.receive, 0),
        };
        let pieces = &mut self.pieces;
        passage.pass(BURST, self.table_generation, exchange, &mut |token, chain| {
            lent_pieces(chain, skip, nic, pieces);
            match nic.lend(way, pieces, token) {
                Lent::Yes => Passed::On,
                Lent::NoRoom => Passed::NoRoom,
                Lent::Never => Passed::Dropped,
            }
        })
    }

    fn reach(&mut self, nic: &mut dyn Nic, ranges: &[Mapping]) -> Result<(), NicError> {
        for range in ranges {
            nic.reach(&self.window, range)?;
            self.counts.reached += 1;
        }
        Ok(())
    }

    fn forget(&mut self, nic: &mut dyn Nic, ranges: &[Mapping]) -> Result<(), NicError> {
        for range in ranges {
            nic.forget(range)?;
            self.counts.forgotten += 1;
        }
        Ok(())
    }
}

/// What of one table is not in another as it is. Both are sorted by IOVA.
fn missing(of: &[Mapping], from: &[Mapping]) -> Vec<Mapping> {
    let mut from = from.iter().peekable();
    let is_missing = |range: &&Mapping| {
        while from.next_if(|other| other.iova < range.iova).is_some() {}
        from.peek() != Some(range)
    };
    of.iter().filter(is_missing).copied().collect()
}

/// Where a chain's bytes are for the card, but for the first `skip`.
fn lent_pieces(chain: &Chain<'_>, mut skip: u32, nic: &dyn Nic, pieces: &mut Vec<Piece>) {
    pieces.clear();
    for segment in chain.segments {
        // What is not in the window was not passed on.
        let Place::Window(offset) = segment.place else { continue };
        let skipped = skip.min(segment.len);
        skip -= skipped;
        if skipped < segment.len {
            pieces.push(Piece { bus: nic.bus(offset + u64::from(skipped)), len: segment.len - skipped });
        }
    }
}
