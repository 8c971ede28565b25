//! What of a ring's format the driver accepted.

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
}

impl RingFeatures {
    /// The virtio features by which a ring has them.
    pub const BITS: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

    /// As a driver's virtio features have it.
    pub const fn of(features: u64) -> Self {
        Self {
            indirect: features & 1 << VIRTIO_RING_F_INDIRECT_DESC != 0,
            event_idx: features & 1 << VIRTIO_RING_F_EVENT_IDX != 0,
        }
    }

    /// As virtio features.
    pub const fn bits(self) -> u64 {
        (self.indirect as u64) << VIRTIO_RING_F_INDIRECT_DESC
            | (self.event_idx as u64) << VIRTIO_RING_F_EVENT_IDX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_two_bits_of_the_drivers_features() {
        for (indirect, event_idx) in [(false, false), (true, false), (false, true), (true, true)] {
            let features = RingFeatures { indirect, event_idx };
            assert_eq!(RingFeatures::of(features.bits()), features);
            assert_eq!(RingFeatures::of(features.bits() | !RingFeatures::BITS), features);
        }
        assert_eq!(RingFeatures::BITS, 1 << 28 | 1 << 29);
    }
}
