//! The three areas of a packed virtqueue (virtio 1.3, 2.8): how long they are, and what
//! is where in them. Touches no memory.

use crate::ring::layout::DESC_LEN;

/// Length of the descriptor ring (2.8), bytes.
pub const fn desc_len(size: u16) -> u32 {
    DESC_LEN * size as u32
}

/// Length of the driver's and of the device's event suppression area (2.8.14), bytes.
pub const EVENT_LEN: u32 = 4;
/// Alignment of these areas, bytes.
pub const EVENT_ALIGN: u64 = 4;
/// Where an event suppression area names a descriptor.
pub const EVENT_AT: u64 = 0;
/// Where its flags are.
pub const FLAGS_AT: u64 = 2;
