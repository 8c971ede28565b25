//! What of a ring's format the driver accepted.

use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// What of a ring's format the driver accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingFeatures {
    /// VIRTIO_F_INDIRECT_DESC: descriptors may name tables of descriptors (virtio 1.3,
    /// 2.7.5.3).
    pub indirect: bool,
    /// VIRTIO_F_EVENT_IDX: each side names the entry that it wants to be notified of
    /// (2.7.7.2, 2.7.10.2).
    pub event_idx: bool,
    /// VIRTIO_F_RING_PACKED: the rings are packed ones (2.8); otherwise split ones (2.7).
    pub packed: bool,
    /// VIRTIO_F_IN_ORDER: buffers are used in the order in which they were made available, and
    /// the device need not say so of each (2.7.9, 2.8.8).
    pub in_order: bool,
}

impl RingFeatures {
    /// The virtio features by which a ring has them.
    pub const BITS: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC
        | 1 << VIRTIO_RING_F_EVENT_IDX
        | 1 << VIRTIO_F_RING_PACKED
        | 1 << VIRTIO_F_IN_ORDER;

    /// As a driver's virtio features have it.
    pub const fn of(features: u64) -> Self {
        Self {
            indirect: features & 1 << VIRTIO_RING_F_INDIRECT_DESC != 0,
            event_idx: features & 1 << VIRTIO_RING_F_EVENT_IDX != 0,
            packed: features & 1 << VIRTIO_F_RING_PACKED != 0,
            in_order: features & 1 << VIRTIO_F_IN_ORDER != 0,
        }
    }

    /// As virtio features.
    pub const fn bits(self) -> u64 {
        (self.indirect as u64) << VIRTIO_RING_F_INDIRECT_DESC
            | (self.event_idx as u64) << VIRTIO_RING_F_EVENT_IDX
            | (self.packed as u64) << VIRTIO_F_RING_PACKED
            | (self.in_order as u64) << VIRTIO_F_IN_ORDER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_four_bits_of_the_drivers_features() {
        for bits in 0..16_u8 {
            let features = RingFeatures {
                indirect: bits & 1 != 0,
                event_idx: bits & 2 != 0,
                packed: bits & 4 != 0,
                in_order: bits & 8 != 0,
            };
            assert_eq!(RingFeatures::of(features.bits()), features);
            assert_eq!(RingFeatures::of(features.bits() | !RingFeatures::BITS), features);
        }
        assert_eq!(RingFeatures::BITS, 1 << 28 | 1 << 29 | 1 << 34 | 1 << 35);
    }
}
