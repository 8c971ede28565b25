//! Device initialisation (virtio 1.3, 3.1.1) through the common configuration
//! structure (4.1.4.3): the steps that every virtio device has, and all of them for a
//! vhost-pci device. Knows registers, not how they are reached.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use vhost_pci_device::abi::{CONFIG_LEN, DeviceConfig, QUEUE_VRING_FIRST};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1,
};

use super::Registers;
use crate::transport::{ConfigError, check_config, parse_config};

// struct virtio_pci_common_cfg, offsets in bytes.
const DEVICE_FEATURE_SELECT: u64 = 0;
const DEVICE_FEATURE: u64 = 4;
pub(in crate::transport) const DRIVER_FEATURE_SELECT: u64 = 8;
pub(in crate::transport) const DRIVER_FEATURE: u64 = 12;
const CONFIG_MSIX_VECTOR: u64 = 16;
const NUM_QUEUES: u64 = 18;
/// `device_status`.
pub(in crate::transport) const DEVICE_STATUS: u64 = 20;
const CONFIG_GENERATION: u64 = 21;
pub(in crate::transport) const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_MSIX_VECTOR: u64 = 26;
const QUEUE_ENABLE: u64 = 28;
pub(in crate::transport) const QUEUE_NOTIFY_OFF: u64 = 30;
const QUEUE_DESC: u64 = 32;
const QUEUE_DRIVER: u64 = 40;
const QUEUE_DEVICE: u64 = 48;

/// `VIRTIO_MSI_NO_VECTOR`.
pub(in crate::transport) const NO_VECTOR: u16 = 0xffff;
const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
/// The device has failed and wants to be reset.
pub(in crate::transport) const STATUS_NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;

/// How long a reset may take. A VMM answers the write itself when it is done.
const RESET_TIME: Duration = Duration::from_secs(5);
/// Reads of the config space until two agree.
const CONFIG_READS: usize = 8;

/// Entries of each queue: the queues carry nothing, but VMMs want rings.
pub const RING_ENTRIES: u16 = 8;
/// Bytes that one queue's three areas take: 128 + 24 + 72, rounded up.
const RING_BYTES: u64 = 256;
const RING_DRIVER: u64 = 128;
const RING_DEVICE: u64 = 160;
const RINGS_A_PAGE: u64 = 4096 / RING_BYTES;

/// At which step a device did not start, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InitError {
    /// 3.1.1, step 1.
    #[error("the device does not come out of reset (device_status stays {status:#x})")]
    Reset {
        /// The status last read.
        status: u8,
    },
    /// Step 4.
    #[error(
        "the device offers the features {offered:#x}, which lack {missing:#x} (bit 32: VIRTIO_F_VERSION_1)"
    )]
    Missing {
        /// The features offered.
        offered: u64,
        /// Those that the driver cannot do without.
        missing: u64,
    },
    /// Step 6.
    #[error("the device refuses the features {features:#x}")]
    Features {
        /// What the driver accepted.
        features: u64,
    },
    /// Step 7.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Step 7.
    #[error("the device has {present} virtqueues and {vrings} vrings: start the VMM with num_vqs={}", vrings + 1)]
    Queues {
        /// Queues that the device has.
        present: u16,
        /// Vrings in its config space.
        vrings: u16,
    },
    /// Step 7.
    #[error("virtqueue {queue} has {most} entries at most; the driver needs {least}")]
    QueueSize {
        /// The queue.
        queue: u16,
        /// Its largest size; 0 if it is not available.
        most: u16,
        /// What the driver has to have.
        least: u16,
    },
    /// Step 7.
    #[error("there is no memory for {queues} virtqueues")]
    Rings {
        /// How many queues need it.
        queues: u16,
    },
    /// Step 7.
    #[error("the device has no interrupt resources for virtqueue {queue} (vector {vector})")]
    Vector {
        /// The queue.
        queue: u16,
        /// The vector asked for.
        vector: u16,
    },
    /// Step 7.
    #[error(
        "the notify address of virtqueue {queue} ({at:#x}) is not inside the notify area of {len:#x} bytes"
    )]
    Doorbell {
        /// The queue.
        queue: u16,
        /// Offset into the notify area.
        at: u64,
        /// Length of the notify area.
        len: u64,
    },
}

/// Bus addresses of the queues' memory: zeroed pages that stay where they are.
#[derive(Clone, Debug, Default)]
pub struct QueuePages {
    /// Bus address of each page.
    pub pages: Vec<u64>,
}

impl QueuePages {
    /// Pages that `queues` virtqueues need.
    pub const fn pages_for(queues: u16) -> usize {
        (queues as u64).div_ceil(RINGS_A_PAGE) as usize
    }

    /// Bus addresses of the descriptor, driver and device area of a queue.
    fn of(&self, queue: u16) -> Option<[u64; 3]> {
        let page = self.pages.get((u64::from(queue) / RINGS_A_PAGE) as usize)?;
        let start = page.checked_add(u64::from(queue) % RINGS_A_PAGE * RING_BYTES)?;
        start.checked_add(RING_BYTES)?;
        Some([start, start + RING_DRIVER, start + RING_DEVICE])
    }
}

/// What initialisation found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Started {
    /// The config space.
    pub config: DeviceConfig,
    /// `queue_notify_off` of each queue.
    pub notify_offsets: Vec<u16>,
}

/// The vector that a queue's interrupts use: its own if there are enough, else the
/// last. `None` without vectors.
pub(super) fn vector_of_queue(queue: u16, vectors: u16) -> Option<u16> {
    Some(queue.min(vectors.checked_sub(1)?))
}

/// Reads the config space, again if it changed meanwhile (2.5.1).
pub(in crate::transport) fn read_config<R: Registers>(common: &R, device: &R) -> DeviceConfig {
    let mut bytes = [0; CONFIG_LEN];
    for _ in 0..CONFIG_READS {
        let before = common.read8(CONFIG_GENERATION);
        for (index, word) in bytes.chunks_exact_mut(4).enumerate() {
            word.copy_from_slice(&device.read32(index as u64 * 4).to_le_bytes());
        }
        if common.read8(CONFIG_GENERATION) == before {
            break;
        }
    }
    parse_config(&bytes)
}

/// Starts the device: the steps of 3.1.1. With `vectors` MSI-X vectors enabled, or 0
/// for a driver that polls. `window_len` is the length of the region that is the window.
/// On an error the device is reset.
pub fn start<R: Registers>(
    common: &R,
    device: &R,
    window_len: u64,
    rings: &QueuePages,
    vectors: u16,
) -> Result<Started, InitError> {
    let started = steps(common, device, window_len, rings, vectors);
    if started.is_err() {
        // Queues that are set up already must not point at memory that is freed next.
        common.write8(DEVICE_STATUS, 0);
    }
    started
}

fn steps<R: Registers>(
    common: &R,
    device: &R,
    window_len: u64,
    rings: &QueuePages,
    vectors: u16,
) -> Result<Started, InitError> {
    // ACCESS_PLATFORM: our bus addresses are what the platform's IOMMU expects.
    negotiate(common, 1 << VIRTIO_F_VERSION_1, 1 << VIRTIO_F_ACCESS_PLATFORM)?;
    // 7. Device-specific set-up: a config space that can be used, then the virtqueues.
    let config = read_config(common, device);
    check_config(&config, window_len)?;
    let notify_offsets = queues(common, config.max_vrings.value(), rings, vectors)?;
    drive(common);
    Ok(Started { config, notify_offsets })
}

/// Stops a device, and waits until it says that it has stopped (4.1.4.3.2).
pub(in crate::transport) fn reset<R: Registers>(common: &R) -> Result<(), InitError> {
    common.write8(DEVICE_STATUS, 0);
    wait_for_reset(common)
}

/// The same of a device that somebody else may be resetting, too: its registers may read as 0 meanwhile,
/// which says nothing. It has stopped when it offers features again.
pub(in crate::transport) fn reset_and_answer<R: Registers>(common: &R) -> Result<(), InitError> {
    let deadline = Instant::now() + RESET_TIME;
    loop {
        reset(common)?;
        match offered(common) {
            offered if offered & 1 << VIRTIO_F_VERSION_1 != 0 => return Ok(()),
            _ if Instant::now() > deadline => return Err(InitError::Reset { status: 0 }),
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Steps 1 to 6 for a device of any kind: accepts all of `required`, and what is offered
/// of `understood`. Returns what was accepted.
pub(in crate::transport) fn negotiate<R: Registers>(
    common: &R,
    required: u64,
    understood: u64,
) -> Result<u64, InitError> {
    // 1. Reset the device, and wait until it says so (4.1.4.3.2).
    reset(common)?;
    // 2. and 3. We have noticed the device; we know how to drive it.
    common.write8(DEVICE_STATUS, ACKNOWLEDGE);
    common.write8(DEVICE_STATUS, ACKNOWLEDGE | DRIVER);
    // 4. Accept the subset of features that we understand.
    let offered = offered(common);
    let missing = required & !offered;
    if missing != 0 {
        return Err(InitError::Missing { offered, missing });
    }
    let features = offered & (required | understood);
    for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
        common.write32(DRIVER_FEATURE_SELECT, select);
        common.write32(DRIVER_FEATURE, half);
    }
    // 5. and 6. The device must agree.
    common.write8(DEVICE_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    match common.read8(DEVICE_STATUS) & FEATURES_OK {
        0 => Err(InitError::Features { features }),
        _ => Ok(features),
    }
}

/// Step 8: the device is live.
pub(in crate::transport) fn drive<R: Registers>(common: &R) {
    common.write8(DEVICE_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

fn wait_for_reset<R: Registers>(common: &R) -> Result<(), InitError> {
    let deadline = Instant::now() + RESET_TIME;
    loop {
        match common.read8(DEVICE_STATUS) {
            0 => return Ok(()),
            status if Instant::now() > deadline => return Err(InitError::Reset { status }),
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn offered<R: Registers>(common: &R) -> u64 {
    [0, 1].into_iter().fold(0, |features, select| {
        common.write32(DEVICE_FEATURE_SELECT, select);
        features | u64::from(common.read32(DEVICE_FEATURE)) << (32 * select)
    })
}

/// Sets up queue 0 and one for each vring (4.1.5.1.3), and returns their notify
/// offsets.
fn queues<R: Registers>(
    common: &R,
    vrings: u16,
    rings: &QueuePages,
    vectors: u16,
) -> Result<Vec<u16>, InitError> {
    let present = common.read16(NUM_QUEUES);
    let wanted =
        vrings.checked_add(QUEUE_VRING_FIRST).ok_or(InitError::Queues { present, vrings: u16::MAX - 1 })?;
    if present < wanted {
        return Err(InitError::Queues { present, vrings });
    }
    // Configuration changes need no vector: there are none (section 5).
    common.write16(CONFIG_MSIX_VECTOR, NO_VECTOR);
    (0..wanted)
        .map(|queue| {
            let places = rings.of(queue).ok_or(InitError::Rings { queues: wanted })?;
            let vector = vector_of_queue(queue, vectors).unwrap_or(NO_VECTOR);
            queue_up(common, queue, 1..=RING_ENTRIES, places, vector)
        })
        .collect()
}

/// Step 7 for the queues of a device of any kind, from queue 0 on, of which each has just so many entries, and the bus
/// addresses of its descriptor, driver and device area. With `vectors` MSI-X vectors. Returns their notify offsets.
pub(in crate::transport) fn queues_up<R: Registers>(
    common: &R,
    queues: impl IntoIterator<Item = (u16, [u64; 3])>,
    vectors: u16,
) -> Result<Vec<u16>, InitError> {
    let up = |(queue, (size, places))| {
        let vector = vector_of_queue(queue, vectors).unwrap_or(NO_VECTOR);
        queue_up(common, queue, size..=size, places, vector)
    };
    (0..).zip(queues).map(up).collect()
}

/// Step 7 for one queue: its size, as large as the device has it within `sizes`, its
/// vector, and the bus addresses of its descriptor, driver and device area. Returns its
/// notify offset.
pub(in crate::transport) fn queue_up<R: Registers>(
    common: &R,
    queue: u16,
    sizes: RangeInclusive<u16>,
    places: [u64; 3],
    vector: u16,
) -> Result<u16, InitError> {
    common.write16(QUEUE_SELECT, queue);
    let most = common.read16(QUEUE_SIZE);
    if most < *sizes.start() {
        return Err(InitError::QueueSize { queue, most, least: *sizes.start() });
    }
    common.write16(QUEUE_SIZE, most.min(*sizes.end()));
    common.write16(QUEUE_MSIX_VECTOR, vector);
    // 4.1.5.1.2.2: the device answers NO_VECTOR if it cannot.
    if common.read16(QUEUE_MSIX_VECTOR) != vector {
        return Err(InitError::Vector { queue, vector });
    }
    for (at, address) in [QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE].into_iter().zip(places) {
        // 4.1.3.1: 64-bit fields as two 32-bit accesses.
        common.write32(at, address as u32);
        common.write32(at + 4, (address >> 32) as u32);
    }
    let notify = common.read16(QUEUE_NOTIFY_OFF);
    common.write16(QUEUE_ENABLE, 1);
    Ok(notify)
}

#[cfg(test)]
#[path = "initialise_tests.rs"]
mod tests;
