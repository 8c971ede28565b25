//! One virtqueue's registers. The addresses are kept for the driver to read back and for
//! nothing else: no virtqueue carries buffers (`docs/vhost-pci-device.md`, 3), so the device
//! never reaches the memory they name.

/// `VIRTIO_MSI_NO_VECTOR`.
pub const NO_VECTOR: u16 = 0xffff;
/// Entries that a queue has if the driver wants no other number.
pub const MAX_SIZE: u16 = 256;

/// A virtqueue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue {
    /// `queue_size`: a power of two.
    pub size: u16,
    /// `queue_msix_vector`.
    pub vector: u16,
    /// `queue_enable`.
    pub enabled: bool,
    /// `queue_desc`, `queue_driver`, `queue_device`: low and high half of each.
    pub addresses: [u32; 6],
}

impl Default for Queue {
    fn default() -> Self {
        Self { size: MAX_SIZE, vector: NO_VECTOR, enabled: false, addresses: [0; 6] }
    }
}

impl Queue {
    /// Writes `queue_size`; a number that no queue can have is ignored (4.1.5.1.3: the driver
    /// reduces it, to a power of two).
    pub fn set_size(&mut self, size: u16) {
        if !self.enabled && size.is_power_of_two() && size <= MAX_SIZE {
            self.size = size;
        }
    }

    /// Writes half of an address.
    pub fn set_address(&mut self, half: usize, value: u32) {
        if let Some(place) = self.addresses.get_mut(half).filter(|_| !self.enabled) {
            *place = value;
        }
    }
}
