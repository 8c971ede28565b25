//! One pair of an owner's queues.
//!
//! Owns: both rings and their buffers, so that no two queues have anything to wait for each other
//! with: each can be driven by a thread of its own.

use super::BufferMapping;
use super::receive::Receiver;
use super::transmit::Transmitter;
use crate::net::burst::{Packet, PacketBurst};
use crate::net::layout::{OwnerLayout, VringLayout};
use crate::net::{Counters, receive_vring, transmit_vring};
use crate::ring::{DriverFault, DriverRing};
use crate::shm::{SharedMemory, ShmError};

/// The owner's side of a pair: of the vring that it receives by, and of the one that it transmits
/// by.
///
/// On cache lines of its own: what one thread writes here is not what another one's queue is
/// beside.
#[derive(Debug)]
#[repr(align(128))]
pub struct OwnerQueue<M = super::Fixed> {
    pair: u16,
    receiver: Receiver<M>,
    transmitter: Transmitter<M>,
    counters: Counters,
}

impl<M: BufferMapping> OwnerQueue<M> {
    /// Makes fresh rings and posts all receive buffers.
    pub(super) fn new(
        pair: u16,
        [receive, transmit]: &[VringLayout; 2],
        (memory, layout): (&SharedMemory, &OwnerLayout),
        vring_mapping: &mut impl FnMut(u16) -> (u64, M),
    ) -> Result<Self, ShmError> {
        let config = layout.config();
        let mut ring = |vring: u16, at: &VringLayout| {
            let (iova_base, mapping) = vring_mapping(vring);
            let features = config.ring_features();
            DriverRing::with_features(vring, &at.places, memory, iova_base, at.tables, features)
                .map(|ring| (ring, mapping))
        };
        let receive_ring = ring(receive_vring(pair), receive)?;
        Ok(Self {
            pair,
            receiver: Receiver::new(receive_ring, memory, receive.buffers, config)?,
            transmitter: Transmitter::new(
                ring(transmit_vring(pair), transmit)?,
                memory,
                transmit.buffers,
                layout.max_frame(),
                config,
            )?,
            counters: Counters::default(),
        })
    }

    /// Its number.
    pub fn pair(&self) -> u16 {
        self.pair
    }

    /// What has passed since the queue was made.
    #[inline]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Transmits packets, or frames alone. Returns how many of them are done with: queued, or dropped
    /// for being too long, or for a header that asks for what was not negotiated. The others are the caller's to offer again.
    ///
    /// The device may want a kick afterwards: see [`Self::needs_kick`].
    #[inline]
    pub fn tx_burst<'a>(
        &mut self,
        packets: impl IntoIterator<Item: Into<Packet<'a>>>,
    ) -> Result<usize, DriverFault> {
        self.transmitter.send(packets, &mut self.counters)
    }

    /// Receives up to `budget` packets, appends them to `burst` and posts their
    /// buffers again. Returns how many.
    ///
    /// The device may want a kick afterwards: see [`Self::needs_kick`].
    #[inline]
    pub fn rx_burst(&mut self, burst: &mut PacketBurst, budget: usize) -> Result<usize, DriverFault> {
        self.receiver.receive(burst, budget, &mut self.counters)
    }

    /// Takes back the buffers of transmitted packets. `tx_burst` does so by itself when
    /// they run short; this is for who was called for them. Returns how many packets
    /// are still with the device.
    pub fn reap_transmitted(&mut self) -> Result<u16, DriverFault> {
        self.transmitter.reap()?;
        Ok(self.transmitter.ring.in_flight())
    }

    /// A ring by the number of its vring; `None` of another pair's.
    #[inline]
    fn ring(&mut self, vring: u16) -> Option<&mut DriverRing> {
        match vring {
            _ if vring == receive_vring(self.pair) => Some(&mut self.receiver.ring),
            _ if vring == transmit_vring(self.pair) => Some(&mut self.transmitter.ring),
            _ => None,
        }
    }

    /// Whether the device wants a kick for what was published on the vring, which is one of this
    /// pair's, since this was last asked. To be asked after each burst, and once before the
    /// first.
    #[inline]
    pub fn needs_kick(&mut self, vring: u16) -> bool {
        self.ring(vring).is_some_and(DriverRing::needs_kick)
    }

    /// Asks the device for calls of the vring, which is one of this pair's, or not to call. Returns
    /// whether completions are waiting already: who gets `true` must not sleep. To be asked for
    /// before each sleep.
    pub fn set_calls(&mut self, vring: u16, enabled: bool) -> Result<bool, DriverFault> {
        self.ring(vring).map_or(Ok(false), |ring| ring.set_calls(enabled))
    }

    /// Asks the device to call when most of what is being transmitted is done, for
    /// who waits for room: one call, if VIRTIO_F_EVENT_IDX was negotiated, however many
    /// bursts that takes. Returns whether it is done already.
    pub fn set_calls_for_room(&mut self) -> Result<bool, DriverFault> {
        let ring = &mut self.transmitter.ring;
        // As many as Linux waits for (virtqueue_enable_cb_delayed).
        let most = ring.in_flight() / 4 * 3;
        ring.set_calls_after(most)
    }
}
