//! The three areas of a split virtqueue (virtio 1.3, 2.7): how long they are, and what
//! is where in them. Touches no memory.

use crate::ring::layout::{DESC_LEN, RingPlaces};

/// Length of a used ring element (2.7.8), bytes.
pub const USED_ELEMENT_LEN: u32 = 8;
/// Where the flags are in the available ring (2.7.6) and in the used ring (2.7.8).
pub const FLAGS_AT: u64 = 0;
/// Where the index is in either ring.
pub const INDEX_AT: u64 = 2;
/// Where the slots start in either ring.
pub const SLOTS_AT: u64 = 4;

/// Length of the descriptor table (2.7), bytes.
pub const fn desc_len(size: u16) -> u32 {
    DESC_LEN * size as u32
}

/// Length of the available ring (2.7) with its event field, bytes.
pub const fn avail_len(size: u16) -> u32 {
    6 + 2 * size as u32
}

/// Length of the used ring (2.7) with its event field, bytes.
pub const fn used_len(size: u16) -> u32 {
    6 + USED_ELEMENT_LEN * size as u32
}

/// Where the driver's event index is, `used_event` (2.7.7): behind the available ring.
pub const fn used_event(places: &RingPlaces) -> u64 {
    places.avail + SLOTS_AT + 2 * places.size as u64
}

/// Where the device's event index is, `avail_event` (2.7.10): behind the used ring.
pub const fn avail_event(places: &RingPlaces) -> u64 {
    places.used + SLOTS_AT + USED_ELEMENT_LEN as u64 * places.size as u64
}
