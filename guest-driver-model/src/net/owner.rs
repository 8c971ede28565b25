//! The owner's port: the driver half of a network card's queues, with rings and
//! buffers in the owner's own memory.
//!
//! Owns: one [`OwnerQueue`] for each pair, which share nothing. Plays what an owner's guest would
//! run; the device on the other side is as little trusted as a peer is.

use std::ops::Add;

use super::Counters;
use super::burst::{Packet, PacketBurst};
use super::layout::OwnerLayout;
use crate::ring::{Buffer, DriverFault};
use crate::shm::{SharedMemory, ShmError};

mod queue;
mod receive;
mod transmit;

pub use queue::OwnerQueue;

/// How the buffers of one vring become reachable for the device: what a kernel's DMA
/// API does for a driver.
pub trait BufferMapping {
    /// Whether it does anything.
    const ACTIVE: bool;

    /// A buffer is about to be made available. Returns it as the ring's descriptor
    /// names it (the ring adds its `iova_base`), or `None` if the device cannot reach
    /// it: then it is not made available.
    fn map(&mut self, buffer: u16, piece: Buffer) -> Option<Buffer>;

    /// The device has given the buffer back. It is looked at, and used again, only
    /// when this has returned.
    fn unmap(&mut self, buffer: u16);
}

/// Buffers that the device always reaches, where the ring expects them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fixed;

impl BufferMapping for Fixed {
    const ACTIVE: bool = false;

    #[inline]
    fn map(&mut self, _: u16, piece: Buffer) -> Option<Buffer> {
        Some(piece)
    }

    #[inline]
    fn unmap(&mut self, _: u16) {}
}

/// The owner's port on its network card: its queues, one a pair. As with a
/// [`PeerPort`](super::PeerPort), one thread may drive all of them, or each one its own.
#[derive(Debug)]
pub struct OwnerPort<M = Fixed> {
    queues: Vec<OwnerQueue<M>>,
}

impl OwnerPort {
    /// Makes fresh rings in `memory` and posts all receive buffers. Addresses given to
    /// the device are `iova_base` + offset in the memory.
    pub fn new(memory: &SharedMemory, layout: &OwnerLayout, iova_base: u64) -> Result<Self, ShmError> {
        Self::with_mapping(memory, layout, |_| (iova_base, Fixed))
    }
}

impl<M: BufferMapping> OwnerPort<M> {
    /// As [`OwnerPort::new`], with an `iova_base` and a way to map buffers for each
    /// vring.
    pub fn with_mapping(
        memory: &SharedMemory,
        layout: &OwnerLayout,
        mut vring_mapping: impl FnMut(u16) -> (u64, M),
    ) -> Result<Self, ShmError> {
        let (pairs, _) = layout.vrings().as_chunks();
        let queue = |(pair, both)| OwnerQueue::new(pair, both, (memory, layout), &mut vring_mapping);
        // A layout has at most 2^14 pairs.
        Ok(Self { queues: (0..).zip(pairs).map(queue).collect::<Result<_, _>>()? })
    }

    /// Queue pairs.
    pub fn pairs(&self) -> u16 {
        self.queues.len() as u16
    }

    /// The queues, by pair: each for a thread of its own, if that is wanted.
    pub fn queues_mut(&mut self) -> &mut [OwnerQueue<M>] {
        &mut self.queues
    }

    /// The queues, by pair, for threads that outlive this call.
    pub fn into_queues(self) -> Vec<OwnerQueue<M>> {
        self.queues
    }

    /// The queue of a pair.
    #[inline]
    pub fn queue(&mut self, pair: u16) -> Option<&mut OwnerQueue<M>> {
        self.queues.get_mut(usize::from(pair))
    }

    /// What has passed since the port was made, by all queues.
    pub fn counters(&self) -> Counters {
        self.queues.iter().map(OwnerQueue::counters).fold(Counters::default(), Add::add)
    }

    /// [`OwnerQueue::tx_burst`]; 0 for a pair that there is not.
    #[inline]
    pub fn tx_burst<'a>(
        &mut self,
        pair: u16,
        packets: impl IntoIterator<Item: Into<Packet<'a>>>,
    ) -> Result<usize, DriverFault> {
        self.queue(pair).map_or(Ok(0), |queue| queue.tx_burst(packets))
    }

    /// [`OwnerQueue::rx_burst`]; 0 for a pair that there is not.
    #[inline]
    pub fn rx_burst(
        &mut self,
        pair: u16,
        burst: &mut PacketBurst,
        budget: usize,
    ) -> Result<usize, DriverFault> {
        self.queue(pair).map_or(Ok(0), |queue| queue.rx_burst(burst, budget))
    }

    /// [`OwnerQueue::reap_transmitted`]; 0 for a pair that there is not.
    pub fn reap_transmitted(&mut self, pair: u16) -> Result<u16, DriverFault> {
        self.queue(pair).map_or(Ok(0), OwnerQueue::reap_transmitted)
    }

    /// [`OwnerQueue::needs_kick`].
    #[inline]
    pub fn needs_kick(&mut self, vring: u16) -> bool {
        self.queue(vring / 2).is_some_and(|queue| queue.needs_kick(vring))
    }

    /// [`OwnerQueue::set_calls`].
    pub fn set_calls(&mut self, vring: u16, enabled: bool) -> Result<bool, DriverFault> {
        self.queue(vring / 2).map_or(Ok(false), |queue| queue.set_calls(vring, enabled))
    }

    /// [`OwnerQueue::set_calls_for_room`].
    pub fn set_calls_for_room(&mut self, pair: u16) -> Result<bool, DriverFault> {
        self.queue(pair).map_or(Ok(false), OwnerQueue::set_calls_for_room)
    }
}
