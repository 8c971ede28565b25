//! The vhost-pci device as its driver uses it, whatever is in between.
//!
//! | module | how the device is reached |
//! |---|---|
//! | [`sysfs`] | a PCI device in a guest, through /sys, by polling |
//! | [`vfio`] | a PCI device in a guest, through VFIO, with interrupts |
//! | [`model`] | no VM: a model of the peer's VMM connects to the broker |
//!
//! `doorbell` is a second function beside the device, by which notifications need no help of
//! the host. [`virtio_pci`] is what the first two share. [`card`] is no vhost-pci device but the
//! other end: an owner's network card, and [`bare`] either of them for who obeys no rule. Rings and packets are not known here.

pub mod bare;
pub mod card;
mod doorbell;
pub mod error;
pub mod model;
pub mod ring_memory;
pub(crate) mod sys;
pub mod sysfs;
pub mod vfio;
pub mod virtio_pci;

use std::array;
use std::iter::Flatten;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use vhost_pci_device::abi::{
    ABI_VERSION, CONFIG_LEN, CONFIG_MAGIC, DeviceConfig, LinkHeader, MAX_VRINGS, PAGE_SIZE,
};

pub use self::error::{BrokerError, ConfigError, TransportError};
use crate::shm::SharedMemory;

/// How long a broker may take to answer a vhost-user request. It waits for the other
/// side's VMM, but not as long as this.
pub(crate) const ANSWER_TIME: Duration = Duration::from_secs(10);

/// The eventfds by which a queue's interrupts arrive: see [`Transport::interrupt_fds`].
pub type InterruptFds<'a> = Flatten<array::IntoIter<Option<BorrowedFd<'a>>, 2>>;

/// The doorbell function that a device has been paired with (12.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pairing {
    /// Its MSI-X vectors: what ATTACH says.
    pub vectors: u16,
    /// Counts the pairings of a device: another number is another function, or the same one
    /// plugged anew.
    pub number: u32,
}

/// A started vhost-pci device.
pub trait Transport: Send + Sync {
    /// What to call the device in messages.
    fn name(&self) -> &str;

    /// The config space; it does not change.
    fn config(&self) -> &DeviceConfig;

    /// The whole window: link area, control area, and the owner's memory.
    fn window(&self) -> &SharedMemory;

    /// Notifies a virtqueue: one store, or one eventfd write. Queue
    /// `QUEUE_VRING_FIRST + i` is a call to the owner for its vring `i`. A queue
    /// that the device does not have is ignored.
    fn doorbell(&self, queue: u16);

    /// A non-blocking eventfd that becomes readable by the queue's interrupt, or
    /// `None` if the driver has to poll. Queues may share one.
    fn interrupt_fd(&self, queue: u16) -> Option<BorrowedFd<'_>>;

    /// Every eventfd that becomes readable by the queue's interrupts: its own, and that of the
    /// doorbell function's vector. To wait for the queue is to wait for all of them.
    fn interrupt_fds(&self, queue: u16) -> InterruptFds<'_> {
        [self.interrupt_fd(queue), None].into_iter().flatten()
    }

    /// Looks for the doorbell function of the link with this number, or whether the one found is
    /// still there (12.3). Costs some system calls: for once a second and once a link. After the
    /// answer has changed the driver has to ATTACH, with this answer.
    fn pair(&self, _link_id: u64) -> Option<Pairing> {
        None
    }

    /// Does as the doorbell page says (12.2), if it has changed: a load if it has not. To be
    /// called before the driver looks at the rings a last time and then waits.
    fn follow_doorbell(&self) {}

    /// Whether the device is known to be gone, as far as that can be told for nothing: then
    /// [`Self::check`] need not wait for its second.
    fn is_over(&self) -> bool {
        false
    }

    /// Whether the device is still there. Costs an exit or a system call: for once
    /// a second, not once a packet.
    ///
    /// # Errors
    /// [`TransportError::Gone`]; then the transport has to be made anew.
    fn check(&self) -> Result<(), TransportError>;
}

/// Reads the little-endian bytes of a config space.
pub fn parse_config(bytes: &[u8; CONFIG_LEN]) -> DeviceConfig {
    zerocopy::transmute!(*bytes)
}

/// Checks that a config space is one that this driver understands, and that its
/// areas lie in the window. `present` is the length of the region that the device
/// really has.
///
/// # Errors
/// The first thing that does not fit.
pub fn check_config(config: &DeviceConfig, present: u64) -> Result<(), ConfigError> {
    if config.magic.value() != CONFIG_MAGIC {
        return Err(ConfigError::Magic { found: config.magic.value() });
    }
    if config.version.value() != ABI_VERSION {
        return Err(ConfigError::Version { found: config.version.value() });
    }
    let vrings = config.max_vrings.value();
    if vrings == 0 || vrings > MAX_VRINGS {
        return Err(ConfigError::Vrings { found: vrings });
    }
    let window_len = config.window_len.value();
    if window_len > present {
        return Err(ConfigError::Window { announced: window_len, present });
    }
    let area = |area, offset: u64, len: u64, least: u64| {
        let inside = offset.checked_add(len).is_some_and(|end| end <= window_len);
        if inside && len >= least && offset.is_multiple_of(PAGE_SIZE) {
            Ok(())
        } else {
            Err(ConfigError::Area { area, offset, len, window_len })
        }
    };
    let (link, link_len) = (config.link_offset.value(), config.link_len.value());
    let (control, control_len) = (config.control_offset.value(), config.control_len.value());
    let header = size_of::<LinkHeader>() as u64;
    area("link", link, link_len, header)?;
    area("control", control, control_len, crate::control::AREA_LEN)?;
    // In bounds, so the sums do not wrap. Data starts behind both.
    if link < control + control_len && control < link + link_len {
        return Err(ConfigError::Area { area: "control", offset: control, len: control_len, window_len });
    }
    let data = config.data_offset.value();
    if data < link + link_len || data < control + control_len || data > window_len {
        return Err(ConfigError::Area { area: "data", offset: data, len: 0, window_len });
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use vhost_pci_device::abi;

    pub(crate) fn config_bytes(window_len: u64, vrings: u16) -> [u8; CONFIG_LEN] {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(b"VPCI");
        bytes.extend_from_slice(&1_u16.to_le_bytes());
        bytes.extend_from_slice(&vrings.to_le_bytes());
        let words = [
            window_len,
            abi::LINK_OFFSET,
            abi::LINK_LEN,
            abi::CONTROL_OFFSET,
            abi::CONTROL_LEN,
            abi::DATA_OFFSET,
            u64::from(abi::MAX_MAPPINGS),
        ];
        bytes.extend(words.into_iter().flat_map(u64::to_le_bytes));
        bytes.try_into().unwrap()
    }

    #[test]
    fn a_config_space_is_read_field_by_field() {
        let config = parse_config(&config_bytes(4 << 20, 2));
        assert_eq!(config.control_offset.value(), abi::CONTROL_OFFSET);
        assert_eq!(config.max_mappings.value(), abi::MAX_MAPPINGS);
        assert_eq!(config.reserved.value(), 0);
        assert_eq!(check_config(&config, 4 << 20), Ok(()));
    }

    #[test]
    fn a_config_space_that_does_not_fit_is_refused() {
        let good = parse_config(&config_bytes(4 << 20, 2));
        let check = |change: &dyn Fn(&mut DeviceConfig)| {
            let mut config = good;
            change(&mut config);
            check_config(&config, 4 << 20).unwrap_err()
        };
        assert!(matches!(check(&|c| c.magic = 1.into()), ConfigError::Magic { found: 1 }));
        assert!(matches!(check(&|c| c.version = 2.into()), ConfigError::Version { found: 2 }));
        assert!(matches!(check(&|c| c.max_vrings = 65.into()), ConfigError::Vrings { found: 65 }));
        assert!(matches!(check(&|c| c.max_vrings = 0.into()), ConfigError::Vrings { found: 0 }));
        assert!(matches!(check(&|c| c.window_len = (8 << 20).into()), ConfigError::Window { .. }));
        assert!(matches!(
            check(&|c| c.link_offset = u64::MAX.into()),
            ConfigError::Area { area: "link", .. }
        ));
        assert!(matches!(check(&|c| c.control_offset = (4 << 20).into()), ConfigError::Area { .. }));
        assert!(matches!(check(&|c| c.control_len = 8.into()), ConfigError::Area { area: "control", .. }));
    }
}
