//! The driver half of a virtqueue, whatever its format.
//!
//! Owns: which format it is, and what the formats' halves have in common. What an
//! operation does to the ring is the format's own affair.

use std::fmt;

use super::features::RingFeatures;
use super::layout::{DESC_LEN, RingPlaces};
use super::packed::driver::PackedDriver;
use super::split::driver::SplitDriver;
use crate::shm::{SharedMemory, ShmError};

/// A piece of a buffer that the driver makes available.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Where it is, bytes from the start of the driver's memory.
    pub offset: u64,
    /// Length, bytes; not 0.
    pub len: u32,
    /// The device writes it; otherwise the device reads it. Readable ones come first.
    pub writable: bool,
}

impl Buffer {
    /// A piece that the device reads.
    pub const fn readable(offset: u64, len: u32) -> Self {
        Self { offset, len, writable: false }
    }

    /// A piece that the device writes.
    pub const fn writable(offset: u64, len: u32) -> Self {
        Self { offset, len, writable: true }
    }
}

/// Where indirect tables may be put: one for each descriptor of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndirectTables {
    /// Where they start, bytes from the start of the driver's memory; a multiple of 16.
    pub offset: u64,
    /// Descriptors for which each has room; at most the ring's size.
    pub entries: u16,
}

impl IndirectTables {
    /// Length of all tables of a ring, bytes.
    pub const fn len(entries: u16, ring_size: u16) -> u64 {
        entries as u64 * DESC_LEN as u64 * ring_size as u64
    }
}

/// Why a buffer was not added. The ring is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// Not enough free descriptors: reap first.
    #[error("no descriptors are free")]
    Full,
    /// The buffer has no piece, an empty one, more pieces than the ring has
    /// descriptors, or a readable one after a writable one.
    #[error("the buffer cannot be described")]
    Invalid,
}

/// What a device did wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DriverFaultKind {
    /// The used index is ahead by more than there are buffers in flight.
    UsedJump,
    /// A used element names no buffer in flight.
    UsedId,
    /// A used element claims more bytes than the buffer's writable part has.
    UsedLength,
}

/// A device that broke the specification. The ring is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub struct DriverFault {
    /// What rule it broke.
    pub kind: DriverFaultKind,
    /// The vring's number.
    pub vring: u16,
    /// The index, id or length that was seen.
    pub value: u32,
}

impl fmt::Display for DriverFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the device broke vring {}: {:?} ({:#x})", self.vring, self.kind, self.value)
    }
}

/// A buffer that the device has given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// What [`DriverRing::add`] was given.
    pub token: u64,
    /// Bytes that the device says it wrote; at most the buffer's writable length.
    pub len: u32,
}

/// The driver half of one vring.
#[derive(Debug)]
pub enum DriverRing {
    /// A split virtqueue (virtio 1.3, 2.7).
    Split(SplitDriver),
    /// A packed virtqueue (2.8).
    Packed(PackedDriver),
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

impl DriverRing {
    /// A fresh split ring, with both indices 0, in `memory`. Addresses given to the device
    /// are `iova_base` + offset in the memory.
    pub fn new(
        vring: u16,
        places: &RingPlaces,
        memory: &SharedMemory,
        iova_base: u64,
        indirect: Option<IndirectTables>,
    ) -> Result<Self, ShmError> {
        Self::with_features(vring, places, memory, iova_base, indirect, RingFeatures::default())
    }

    /// As [`Self::new`], in the format and with the features that were negotiated. `indirect`
    /// is what counts of indirect descriptors.
    pub fn with_features(
        vring: u16,
        places: &RingPlaces,
        memory: &SharedMemory,
        iova_base: u64,
        indirect: Option<IndirectTables>,
        features: RingFeatures,
    ) -> Result<Self, ShmError> {
        match features.packed {
            false => SplitDriver::new(vring, places, memory, iova_base, indirect, features).map(Self::Split),
            true => PackedDriver::new(vring, places, memory, iova_base, indirect, features).map(Self::Packed),
        }
    }

    /// The vring's number.
    #[inline]
    pub fn vring(&self) -> u16 {
        either!(self, ring => ring.vring())
    }

    /// Entries.
    #[inline]
    pub fn size(&self) -> u16 {
        either!(self, ring => ring.size())
    }

    /// Free descriptors.
    #[inline]
    pub fn free(&self) -> u16 {
        either!(self, ring => ring.free())
    }

    /// Buffers added and not reaped.
    #[inline]
    pub fn in_flight(&self) -> u16 {
        either!(self, ring => ring.in_flight())
    }

    /// Adds one buffer, made of pieces. The device sees it after [`Self::publish`].
    /// `token` comes back with its completion.
    ///
    /// A buffer of several pieces takes one descriptor and an indirect table if the
    /// ring has tables of that length, and a descriptor for each piece otherwise.
    #[inline]
    pub fn add(&mut self, pieces: &[Buffer], token: u64) -> Result<(), AddError> {
        either!(self, ring => ring.add(pieces, token))
    }

    /// [`Self::add`] of a buffer in one piece.
    #[inline]
    pub fn add_one(&mut self, piece: Buffer, token: u64) -> Result<(), AddError> {
        either!(self, ring => ring.add_one(piece, token))
    }

    /// Shows all added buffers to the device, by one release store.
    #[inline]
    pub fn publish(&mut self) {
        either!(self, ring => ring.publish())
    }

    /// Whether the device wants a kick for what was published since this was last
    /// asked (2.7.10).
    #[inline]
    pub fn needs_kick(&mut self) -> bool {
        either!(self, ring => ring.needs_kick())
    }

    /// Asks the device for calls, or not to call (2.7.7). Returns whether completions
    /// are waiting already: after enabling, who gets `true` must reap, not sleep. To be
    /// enabled before each sleep: with VIRTIO_F_EVENT_IDX the device calls once for each
    /// time.
    #[inline]
    pub fn set_calls(&mut self, enabled: bool) -> Result<bool, DriverFault> {
        either!(self, ring => ring.set_calls(enabled))
    }

    /// Asks the device to call when `count` completions are waiting, not for each of them,
    /// if VIRTIO_F_EVENT_IDX was negotiated. As many buffers must be in flight. Returns
    /// whether they are waiting already, or, of a packed ring, whether one is.
    #[inline]
    pub fn set_calls_after(&mut self, count: u16) -> Result<bool, DriverFault> {
        either!(self, ring => ring.set_calls_after(count))
    }

    /// How many buffers the device has given back at least, and 0 if it has none: one acquire
    /// load. Only a split ring says how many there are. Errors: [`DriverFaultKind::UsedJump`].
    #[inline]
    pub fn poll_used(&mut self) -> Result<u16, DriverFault> {
        either!(self, ring => ring.poll_used())
    }

    /// Takes back up to `budget` buffers and appends them to `completions`. Returns
    /// how many. A broken element ends the burst: the ones before it are returned
    /// first, and the fault by the next call.
    #[inline]
    pub fn reap(&mut self, budget: usize, completions: &mut Vec<Completion>) -> Result<usize, DriverFault> {
        either!(self, ring => ring.reap(budget, completions))
    }
}

/// How much of a buffer the device writes, bytes, if it can be described in a ring of `size`.
#[inline]
pub(super) fn writable_len(pieces: &[Buffer], size: u16) -> Result<u32, AddError> {
    let (mut len, mut writable_seen) = (0_u32, false);
    for piece in pieces {
        if piece.len == 0 || (writable_seen && !piece.writable) {
            return Err(AddError::Invalid);
        }
        writable_seen |= piece.writable;
        if piece.writable {
            len = len.saturating_add(piece.len);
        }
    }
    if pieces.is_empty() || pieces.len() > usize::from(size) {
        return Err(AddError::Invalid);
    }
    Ok(len)
}
