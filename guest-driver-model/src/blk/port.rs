//! The peer's port: the device half of the vrings of the owner's disk, through the window.
//!
//! Owns: one queue for each vring, which share nothing. A broken vring faults by itself; the others go on.

use std::ops::Add;
use std::time::Duration;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX,
};
use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::Counters;
use super::disk::Disk;
use super::queue::BlkQueue;
use super::request::SECTOR;
use crate::control::Exchange;
use crate::link::{LinkPage, LinkSnapshot};
use crate::port::{self, Port, PortError};
use crate::reach::Demand;
use crate::ring::{Fault, RingFeatures};
use crate::shm::SharedMemory;

/// The features that a port serves. BLK_SIZE, SEG_MAX, SIZE_MAX and MQ bind the driver only.
const SERVED: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_F_ACCESS_PLATFORM
    | RingFeatures::BITS
    | 1 << VIRTIO_BLK_F_SIZE_MAX
    | 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_RO
    | 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_MQ;

/// The peer's port on an owner's disk.
#[derive(Debug)]
pub struct BlkPort {
    generation: u64,
    capacity: u64,
    queues: Vec<BlkQueue>,
}

impl BlkPort {
    /// Bytes of the disk, as the owner was told.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Serves the next request of a vring, in the order in which they became available; to be called
    /// again until there is none. Whether there was one. The owner may want a call afterwards: see
    /// [`Self::needs_call`].
    ///
    /// What the mapping table does not show is reached by `exchange`.
    ///
    /// # Errors
    /// If the vring is broken.
    pub fn serve(
        &mut self,
        exchange: &mut dyn Exchange,
        vring: u16,
        disk: &mut dyn Disk,
    ) -> Result<bool, Fault> {
        self.queue(vring).map_or(Ok(false), |queue| queue.serve(exchange, disk))
    }

    /// Whether the owner's driver wants a call for what was completed on the vring since this was last
    /// asked.
    pub fn needs_call(&mut self, vring: u16) -> bool {
        self.queue(vring).is_some_and(BlkQueue::needs_call)
    }

    /// What has been served since the port was made, by all vrings.
    pub fn counters(&self) -> Counters {
        self.queues.iter().map(|queue| queue.counters).fold(Counters::default(), Add::add)
    }

    fn queue(&mut self, vring: u16) -> Option<&mut BlkQueue> {
        self.queues.get_mut(usize::from(vring))
    }
}

impl Port for BlkPort {
    fn open(window: &SharedMemory, page: &LinkPage, snapshot: &LinkSnapshot) -> Result<Self, PortError> {
        port::check(snapshot, (VIRTIO_ID_BLOCK, "a disk"), SERVED)?;
        // The capacity is the first field (virtio 1.3, 5.2.4).
        let needed = size_of::<u64>();
        let sectors = snapshot.config.first_chunk().copied().map(u64::from_le_bytes);
        let sectors = sectors.ok_or(PortError::Config { len: snapshot.config.len(), needed })?;
        let queue = |(vring, info)| BlkQueue::new(vring, info, (window, page, snapshot));
        Ok(Self {
            generation: snapshot.generation,
            capacity: sectors.saturating_mul(SECTOR),
            queues: (0..).zip(&snapshot.vrings).map(queue).collect::<Result<_, _>>()?,
        })
    }

    fn generation(&self) -> u64 {
        self.generation
    }

    fn vrings(&self) -> u16 {
        // The link area has room for 64.
        self.queues.len() as u16
    }

    fn is_enabled(&self, vring: u16) -> bool {
        self.queues.get(usize::from(vring)).is_some_and(|queue| queue.vring().is_enabled())
    }

    fn set_kicks(&mut self, vring: u16, enabled: bool) -> Result<bool, Fault> {
        self.queue(vring).map_or(Ok(false), |queue| queue.set_kicks(enabled))
    }

    fn faults(&self) -> Vec<Fault> {
        self.queues.iter().filter_map(|queue| queue.vring().fault()).collect()
    }

    fn demand(&self) -> Demand {
        self.queues.iter().map(BlkQueue::demand).fold(Demand::default(), Add::add)
    }

    fn pause(&self) -> Option<Duration> {
        self.queues.iter().filter_map(BlkQueue::pause).min()
    }
}
