//! The device half of a virtqueue, whatever its format.
//!
//! Owns: which format it is, and what the formats' halves have in common. A port works on
//! this; what an operation does to the ring is the format's own affair.

use std::fmt;

use vhost_pci_device::abi::FaultKind;

use super::chain::{ChainBurst, Direction};
use super::features::RingFeatures;
use super::layout::{RingConfig, RingPlaces};
use super::miss::{Finding, Miss, OnMiss};
use super::packed::device::PackedDevice;
use super::packed::position::Position;
use super::split::device::SplitDevice;
use super::{packed, split};
use crate::shm::{SharedMemory, ShmError};
use crate::translate::Translation;

/// The most descriptors of one chain, in the ring and an indirect table together:
/// what Linux's vhost takes (UIO_MAXIOV). A ring smaller than that sets the limit
/// itself (virtio 1.3, 2.7.5.3.1).
pub const MAX_CHAIN: u16 = 1024;

/// What is wrong with a vring: its driver broke the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Fault {
    /// What rule it broke.
    pub kind: FaultKind,
    /// The owner's vring number.
    pub vring: u16,
    /// What was seen: an index, a length or an address, as the kind has it.
    pub value: u64,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vring {} is broken: {} ({:#x})", self.vring, self.kind.name(), self.value)
    }
}

/// Where a device half would start to serve a ring now, as a front-end names that in
/// SET_VRING_BASE: an available index, or the slot of a packed ring with the wrap counter in
/// bit 15.
///
/// # Errors
/// The ring is not inside the memory.
pub fn next_base(
    places: &RingPlaces,
    memory: &SharedMemory,
    features: RingFeatures,
) -> Result<u16, ShmError> {
    match features.packed {
        false => memory.load_u16(places.used + split::layout::INDEX_AT),
        true => {
            let left = memory.load_u16(places.used + packed::layout::EVENT_AT)?;
            Ok(Position::of_left(left, places.size).unwrap_or(Position::START).event())
        }
    }
}

/// The device half of one vring.
#[derive(Debug)]
pub enum DeviceRing {
    /// A split virtqueue (virtio 1.3, 2.7).
    Split(SplitDevice),
    /// A packed virtqueue (2.8).
    Packed(PackedDevice),
}

/// Does the same to a ring of either format.
macro_rules! either {
    ($self:ident, $ring:ident => $operation:expr) => {
        match $self {
            Self::Split($ring) => $operation,
            Self::Packed($ring) => $operation,
        }
    };
}

impl DeviceRing {
    /// Starts to serve vring number `vring` where the ring says that the device half before it
    /// left off (`docs/vhost-pci-device.md`, 8.2): what was available but not used before is
    /// popped again.
    ///
    /// `features`: what the driver accepted.
    /// Errors: [`FaultKind::Geometry`].
    pub fn new(
        vring: u16,
        config: &RingConfig,
        window: &SharedMemory,
        translation: Translation,
        features: RingFeatures,
    ) -> Result<Self, Fault> {
        match config.is_packed() {
            false => SplitDevice::new(vring, config, window, translation, features).map(Self::Split),
            true => PackedDevice::new(vring, config, window, translation, features).map(Self::Packed),
        }
    }

    /// The same ring, with another answer to a buffer that is not in the mapping table.
    pub fn on_miss(self, on_miss: OnMiss) -> Self {
        match self {
            Self::Split(ring) => Self::Split(ring.on_miss(on_miss)),
            Self::Packed(ring) => Self::Packed(ring.on_miss(on_miss)),
        }
    }

    /// What the ring does about a buffer that is not in the mapping table.
    #[inline]
    pub fn miss_policy(&self) -> OnMiss {
        either!(self, ring => ring.miss_policy())
    }

    /// How often a buffer was not in the mapping of the one before, since the table was set.
    pub fn searches(&self) -> u64 {
        either!(self, ring => ring.searches())
    }

    /// From now on chains are popped by another mapping table. The ring itself stays where
    /// it is, and what was popped is the caller's to put back.
    #[inline]
    pub fn set_translation(&mut self, translation: Translation) {
        either!(self, ring => ring.set_translation(translation))
    }

    /// The owner's vring number.
    #[inline]
    pub fn vring(&self) -> u16 {
        either!(self, ring => ring.vring())
    }

    /// Entries.
    #[inline]
    pub fn size(&self) -> u16 {
        either!(self, ring => ring.size())
    }

    /// Why the ring is dead, if it is.
    #[inline]
    pub fn fault(&self) -> Option<Fault> {
        either!(self, ring => ring.fault())
    }

    /// How many chains can be popped at least, and 0 if there is none: one acquire load. Only
    /// a split ring says how many there are.
    /// Errors: [`FaultKind::AvailJump`].
    #[inline]
    pub fn poll_avail(&mut self) -> Result<u16, Fault> {
        either!(self, ring => ring.poll_avail())
    }

    /// Pops up to `budget` chains and appends them to `burst`. Returns how many.
    ///
    /// A broken chain ends the burst: the chains before it are returned first, and
    /// the fault by the next call. So does a chain of which something is missing: what it
    /// lacks, and what the chains behind it lack, is in [`Self::misses`] afterwards.
    #[inline]
    pub fn pop_burst(
        &mut self,
        budget: usize,
        direction: Direction,
        burst: &mut ChainBurst,
    ) -> Result<usize, Fault> {
        either!(self, ring => ring.pop_burst(budget, direction, burst))
    }

    /// What the last burst ended for, if it was not for want of chains.
    #[inline]
    pub fn misses(&self) -> &[Miss] {
        either!(self, ring => ring.misses())
    }

    /// What was found out about a miss. The next bursts go by it until it is forgotten,
    /// except where the mapping table says more.
    #[inline]
    pub fn found(&mut self, miss: Miss, finding: Finding) {
        either!(self, ring => ring.found(miss, finding))
    }

    /// Forgets what was found out.
    #[inline]
    pub fn forget_findings(&mut self) {
        either!(self, ring => ring.forget_findings())
    }

    /// Puts the last `count` popped chains back: the next burst starts with them. They must
    /// not have been completed.
    #[inline]
    pub fn put_back(&mut self, count: usize) {
        either!(self, ring => ring.put_back(count))
    }

    /// Takes all used elements back that were pushed and not flushed.
    #[inline]
    pub fn take_back_used(&mut self) {
        either!(self, ring => ring.take_back_used())
    }

    /// Gives a popped chain back with the number of bytes that were written to it.
    /// The driver sees it after [`Self::flush_used`].
    #[inline]
    pub fn push_used(&mut self, head: u16, written: u32) {
        either!(self, ring => ring.push_used(head, written))
    }

    /// Shows all pushed elements to the driver, by one release store.
    #[inline]
    pub fn flush_used(&mut self) {
        either!(self, ring => ring.flush_used())
    }

    /// Whether the driver wants a call for what was flushed since this was last
    /// asked (2.7.7). Linux drivers of network cards rely on calls of their transmit queues,
    /// too.
    #[inline]
    pub fn needs_call(&mut self) -> bool {
        either!(self, ring => ring.needs_call())
    }

    /// Asks the driver for kicks, or not to kick (2.7.10). Returns whether chains are
    /// waiting already: after enabling, who gets `true` must pop, not sleep. To be enabled
    /// before each sleep: with VIRTIO_F_EVENT_IDX the driver kicks once for each time.
    #[inline]
    pub fn set_kicks(&mut self, enabled: bool) -> Result<bool, Fault> {
        either!(self, ring => ring.set_kicks(enabled))
    }

    /// Marks the ring dead for a rule that only the user of its buffers can check,
    /// such as [`FaultKind::Length`].
    #[cold]
    pub fn fail(&mut self, kind: FaultKind, value: u64) -> Fault {
        either!(self, ring => ring.fail(kind, value))
    }
}
