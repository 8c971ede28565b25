//! The common configuration structure (virtio 1.3, 4.1.4.3) and the device status (2.1, 3.1.1).

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1,
};

use super::queue::{NO_VECTOR, Queue};

/// Length of the structure: up to and with `queue_device`. What follows it belongs to features
/// that are not offered (NOTIF_CONFIG_DATA, RING_RESET, ADMIN_VQ).
pub const LEN: usize = 56;

/// The features of every vhost-pci device (`docs/vhost-pci-device.md`, 4). With ACCESS_PLATFORM the
/// driver gives the queues addresses of its IOMMU: all the same to a device that does not
/// use them.
pub const OFFERED: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_ACCESS_PLATFORM;
const REQUIRED: u64 = 1 << VIRTIO_F_VERSION_1;

const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
/// Bits of the status that are the driver's to set.
const DRIVERS_BITS: u8 = (VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED) as u8;

/// What a write means to the rest of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// Nothing.
    #[default]
    None,
    /// A queue has another vector.
    Vectors,
    /// The driver has set DRIVER_OK.
    Started,
    /// The driver has written 0 to the status: to be carried out before the write returns.
    Reset,
}

/// The registers.
#[derive(Clone, Debug)]
pub struct Common {
    vectors: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    status: u8,
    queue_select: u16,
    queues: Vec<Queue>,
}

/// The registers in the order of their offsets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigVector,
    NumQueues,
    Status,
    ConfigGeneration,
    QueueSelect,
    QueueSize,
    QueueVector,
    QueueEnable,
    QueueNotifyOff,
    /// A half of `queue_desc`, `queue_driver` or `queue_device`.
    QueueAddress(usize),
}

/// Offset and width in bytes of each register. The 64-bit ones are two of 32 bits (4.1.3.1).
const FIELDS: [(usize, usize, Field); 19] = [
    (0, 4, Field::DeviceFeatureSelect),
    (4, 4, Field::DeviceFeature),
    (8, 4, Field::DriverFeatureSelect),
    (12, 4, Field::DriverFeature),
    (16, 2, Field::ConfigVector),
    (18, 2, Field::NumQueues),
    (20, 1, Field::Status),
    (21, 1, Field::ConfigGeneration),
    (22, 2, Field::QueueSelect),
    (24, 2, Field::QueueSize),
    (26, 2, Field::QueueVector),
    (28, 2, Field::QueueEnable),
    (30, 2, Field::QueueNotifyOff),
    (32, 4, Field::QueueAddress(0)),
    (36, 4, Field::QueueAddress(1)),
    (40, 4, Field::QueueAddress(2)),
    (44, 4, Field::QueueAddress(3)),
    (48, 4, Field::QueueAddress(4)),
    (52, 4, Field::QueueAddress(5)),
];

impl Common {
    /// The registers of a device with so many queues and MSI-X vectors, after reset.
    pub fn new(queues: u16, vectors: u16) -> Self {
        Self {
            vectors,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            status: 0,
            queue_select: 0,
            queues: vec![Queue::default(); queues.into()],
        }
    }

    /// As after [`new`](Self::new).
    pub fn reset(&mut self) {
        *self = Self::new(self.queues.len() as u16, self.vectors);
    }

    /// The queues.
    pub fn queues(&self) -> &[Queue] {
        &self.queues
    }

    /// The vector of configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// Whether the driver has set DRIVER_OK.
    pub fn is_live(&self) -> bool {
        self.status & DRIVER_OK != 0
    }

    /// Sets DEVICE_NEEDS_RESET. Whether the driver is to be told.
    pub fn fail(&mut self) -> bool {
        self.status |= NEEDS_RESET;
        self.is_live()
    }

    /// Fills `data` from `offset` on; zero outside.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let mut image = [0; LEN];
        for (at, width, field) in FIELDS {
            image[at..at + width].copy_from_slice(&self.load(field).to_le_bytes()[..width]);
        }
        data.fill(0);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (value, byte) in data.iter_mut().zip(image.iter().skip(from)) {
            *value = *byte;
        }
    }

    /// Writes each register that `data` covers whole. The largest [`Change`] of them.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Change {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut change = Change::None;
        for (at, width, field) in FIELDS {
            let Some(bytes) = at.checked_sub(from).and_then(|start| data.get(start..start + width)) else {
                continue;
            };
            let mut value = [0; 4];
            value[..width].copy_from_slice(bytes);
            change = change.max(self.store(field, u32::from_le_bytes(value)));
        }
        change
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(usize::from(self.queue_select))
    }

    fn load(&self, field: Field) -> u32 {
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        // 4.1.4.3.1: the registers of a queue that is not there read as zero.
        let queue = |value: fn(&Queue) -> u32| self.queue().map_or(0, value);
        match field {
            Field::DeviceFeatureSelect => self.device_feature_select,
            Field::DeviceFeature => half(OFFERED, self.device_feature_select),
            Field::DriverFeatureSelect => self.driver_feature_select,
            Field::DriverFeature => half(self.driver_features, self.driver_feature_select),
            Field::ConfigVector => self.config_vector.into(),
            Field::NumQueues => self.queues.len() as u32,
            Field::Status => self.status.into(),
            Field::ConfigGeneration => 0,
            Field::QueueSelect => self.queue_select.into(),
            Field::QueueSize => queue(|queue| queue.size.into()),
            Field::QueueVector => self.queue().map_or(NO_VECTOR, |queue| queue.vector).into(),
            Field::QueueEnable => queue(|queue| queue.enabled.into()),
            Field::QueueNotifyOff => self.queue().map_or(0, |_| self.queue_select).into(),
            Field::QueueAddress(half) => {
                self.queue().and_then(|queue| queue.addresses.get(half)).copied().unwrap_or(0)
            }
        }
    }

    fn store(&mut self, field: Field, value: u32) -> Change {
        let live = self.is_live();
        let vector = if value < self.vectors.into() { value as u16 } else { NO_VECTOR };
        let select = usize::from(self.queue_select);
        let queue = self.queues.get_mut(select);
        match (field, queue) {
            (Field::DeviceFeatureSelect, _) => self.device_feature_select = value,
            (Field::DriverFeatureSelect, _) => self.driver_feature_select = value,
            (Field::DriverFeature, _) => self.accept(value),
            (Field::ConfigVector, _) => {
                self.config_vector = vector;
                return Change::Vectors;
            }
            (Field::Status, _) => return self.set_status(value as u8),
            (Field::QueueSelect, _) => self.queue_select = value as u16,
            (Field::QueueSize, Some(queue)) => queue.set_size(value as u16),
            (Field::QueueVector, Some(queue)) => {
                queue.vector = vector;
                return Change::Vectors;
            }
            // A queue is enabled before DRIVER_OK (3.1.1), and disabled by a reset only.
            (Field::QueueEnable, Some(queue)) => queue.enabled |= value == 1 && !live,
            (Field::QueueAddress(half), Some(queue)) => queue.set_address(half, value),
            _ => {}
        }
        Change::None
    }

    /// Writes half of the features; they are fixed from FEATURES_OK on (2.2.1).
    fn accept(&mut self, value: u32) {
        let shift = match self.driver_feature_select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        if self.status & FEATURES_OK == 0 {
            self.driver_features = self.driver_features & !(0xffff_ffff << shift) | u64::from(value) << shift;
        }
    }

    fn set_status(&mut self, value: u8) -> Change {
        if value == 0 {
            return Change::Reset;
        }
        // 2.1.1: the driver clears no bit but by a reset.
        let mut status = self.status | value & DRIVERS_BITS;
        let acceptable = self.driver_features & REQUIRED == REQUIRED && self.driver_features & !OFFERED == 0;
        // 2.2.2: the device does not set FEATURES_OK where it cannot do with the features.
        if self.status & FEATURES_OK == 0 && !acceptable {
            status &= !FEATURES_OK;
        }
        // 3.1.1: no device is live without its features.
        if status & FEATURES_OK == 0 {
            status &= !DRIVER_OK;
        }
        let started = status & !self.status & DRIVER_OK != 0;
        self.status = status;
        if started { Change::Started } else { Change::None }
    }
}

#[cfg(test)]
#[path = "common_config_tests.rs"]
mod tests;
