//! A virtio PCI function (virtio 1.3, 4.1) with a vhost-pci device in it: what is
//! the same whether its BARs and config space are reached through sysfs or VFIO. Parts
//! of it serve a network card as well.

pub mod capability;
pub mod config_space;
pub mod initialise;

use std::any::Any;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use vhost_pci_device::abi::{self, DeviceConfig};

pub use self::capability::{Capabilities, CapabilityError, Place, Structures};
pub use self::config_space::ConfigSpace;
pub use self::initialise::{InitError, QueuePages, Started, start};
use super::sys::event::Event;
use super::sys::mmio::Mmio;
use super::{Transport, TransportError, check_config};
use crate::shm::SharedMemory;
use crate::shm::mapping::MappedRange;

/// Little-endian device registers; offsets are bytes from the structure's start.
pub trait Registers {
    /// Loads a byte.
    fn read8(&self, at: u64) -> u8;
    /// Loads two bytes.
    fn read16(&self, at: u64) -> u16;
    /// Loads four bytes.
    fn read32(&self, at: u64) -> u32;
    /// Stores a byte.
    fn write8(&self, at: u64, value: u8);
    /// Stores two bytes.
    fn write16(&self, at: u64, value: u16);
    /// Stores four bytes.
    fn write32(&self, at: u64, value: u32);
}

/// How the parts of a PCI function are reached.
pub(super) trait PciAccess: ConfigSpace {
    /// Domain, bus, device and function, as Linux writes them.
    fn address(&self) -> &str;
    /// Length of a BAR, 0 if there is none.
    fn bar_len(&self, bar: u8) -> u64;
    /// Maps a page-aligned part of a BAR.
    fn map_bar(&self, bar: u8, offset: u64, len: usize) -> io::Result<MappedRange>;
}

/// Where and how a queue is notified.
pub(super) struct Doorbell {
    register: Mmio,
    at: u64,
    queue: u16,
}

impl Doorbell {
    /// That of a queue whose `queue_notify_off` is `offset`. `notify` is the notify area.
    pub(super) fn new(
        notify: &Mmio,
        structures: &Structures,
        queue: u16,
        offset: u16,
    ) -> Result<Self, InitError> {
        let len = structures.notify.len;
        let at = u64::from(offset) * u64::from(structures.notify_off_multiplier);
        if at + 2 > len || !at.is_multiple_of(2) {
            return Err(InitError::Doorbell { queue, at, len });
        }
        Ok(Self { register: notify.clone(), at, queue })
    }

    /// Notifies the queue.
    pub(super) fn ring(&self) {
        // 4.1.5.2: without VIRTIO_F_NOTIFICATION_DATA the 16-bit queue index.
        self.register.write16(self.at, self.queue);
    }
}

/// A started function.
pub(super) struct VirtioPci {
    name: String,
    config: DeviceConfig,
    window: SharedMemory,
    doorbells: Vec<Doorbell>,
    /// One eventfd a vector; empty if the driver polls.
    interrupts: Vec<Event>,
    common: Mmio,
    /// The queues' memory and whatever else must outlive the device's work.
    _keep: Box<dyn Any + Send + Sync>,
}

/// What a function needs from its transport to be started.
pub(super) struct Resources {
    /// Where the device finds the queues' memory.
    pub rings: QueuePages,
    /// An eventfd for each MSI-X vector in use; empty to poll.
    pub interrupts: Vec<Event>,
    /// Owner of the queues' memory and of the device's files.
    pub keep: Box<dyn Any + Send + Sync>,
}

/// The function's structures, mapped; not touched beyond reading.
pub(super) struct Function {
    capabilities: Capabilities,
    common: Mmio,
    notify: Mmio,
    config: Mmio,
}

impl Function {
    /// Finds and maps the function's structures, and reads the config space's magic:
    /// only a vhost-pci device passes. Nothing is written.
    pub(super) fn open(pci: &dyn PciAccess) -> Result<Self, TransportError> {
        let lens = std::array::from_fn(|bar| pci.bar_len(bar as u8));
        let capabilities = Capabilities::read(pci, &lens)
            .map_err(|source| TransportError::Capability { address: pci.address().into(), source })?;
        let function = Self {
            common: registers(pci, capabilities.structures.common)?,
            notify: registers(pci, capabilities.structures.notify)?,
            config: registers(pci, capabilities.structures.device)?,
            capabilities,
        };
        let config = initialise::read_config(&function.common, &function.config);
        check_config(&config, capabilities.window.len)
            .map_err(|source| TransportError::Config { device: pci.address().into(), source })?;
        Ok(function)
    }

    /// Starts the device (virtio 1.3, 3.1.1).
    pub(super) fn start(
        self,
        pci: &dyn PciAccess,
        resources: Resources,
    ) -> Result<VirtioPci, TransportError> {
        let address = || pci.address().to_owned();
        // Until it is started, nothing of the window is used: map it first, so that
        // a failure leaves the device as it was.
        let window = memory(pci, self.capabilities.window)?;
        let vectors = u16::try_from(resources.interrupts.len()).unwrap_or(u16::MAX);
        let window_len = self.capabilities.window.len;
        let started = initialise::start(&self.common, &self.config, window_len, &resources.rings, vectors)
            .map_err(|error| match error {
                InitError::Config(source) => TransportError::Config { device: address(), source },
                source => TransportError::Init { address: address(), source },
            })?;
        let mut device = VirtioPci {
            name: address(),
            config: started.config,
            window,
            doorbells: Vec::new(),
            interrupts: resources.interrupts,
            common: self.common,
            _keep: resources.keep,
        };
        // From here on a failure drops `device`, which resets it.
        for (queue, offset) in (0..).zip(started.notify_offsets) {
            let doorbell = Doorbell::new(&self.notify, &self.capabilities.structures, queue, offset)
                .map_err(|source| TransportError::Init { address: address(), source })?;
            device.doorbells.push(doorbell);
        }
        Ok(device)
    }
}

impl Transport for VirtioPci {
    fn name(&self) -> &str {
        &self.name
    }

    fn config(&self) -> &DeviceConfig {
        &self.config
    }

    fn window(&self) -> &SharedMemory {
        &self.window
    }

    fn doorbell(&self, queue: u16) {
        if let Some(doorbell) = self.doorbells.get(usize::from(queue)) {
            doorbell.ring();
        }
    }

    fn interrupt_fd(&self, queue: u16) -> Option<BorrowedFd<'_>> {
        let vectors = u16::try_from(self.interrupts.len()).unwrap_or(u16::MAX);
        let vector = initialise::vector_of_queue(queue, vectors)?;
        let event = self.interrupts.get(usize::from(vector))?;
        Some(event.as_fd())
    }

    fn check(&self) -> Result<(), TransportError> {
        let gone = |why| Err(TransportError::Gone { device: self.name.clone(), why });
        match self.common.read8(initialise::DEVICE_STATUS) {
            u8::MAX => gone("the device answers no more (unplugged?)"),
            0 => gone("the device was reset"),
            status if status & initialise::STATUS_NEEDS_RESET != 0 => {
                gone("the device reports DEVICE_NEEDS_RESET: its broker may have gone")
            }
            _ => Ok(()),
        }
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        // The device lets go of the queues' memory before it is freed (`_keep`).
        self.common.write8(initialise::DEVICE_STATUS, 0);
    }
}

/// The page-aligned range around a place.
fn pages_around(place: Place) -> Option<(u64, usize, usize)> {
    let start = place.offset & !(abi::PAGE_SIZE - 1);
    let into = usize::try_from(place.offset - start).ok()?;
    let len = usize::try_from(place.len).ok()?.checked_add(into)?;
    Some((start, len.checked_next_multiple_of(abi::PAGE_SIZE as usize)?, into))
}

fn map(pci: &dyn PciAccess, place: Place) -> Result<(MappedRange, usize), TransportError> {
    let error = |source| TransportError::Bar {
        address: pci.address().to_owned(),
        bar: place.bar,
        offset: place.offset,
        len: place.len,
        source,
        advice: " (run as root; another driver or a locked-down kernel may hold the BAR)",
    };
    let (start, len, into) = pages_around(place).ok_or_else(|| error(io::ErrorKind::InvalidInput.into()))?;
    let mapping = pci.map_bar(place.bar, start, len).map_err(error)?;
    Ok((mapping, into))
}

pub(super) fn registers(pci: &dyn PciAccess, place: Place) -> Result<Mmio, TransportError> {
    // Structures longer than their registers are not mapped whole.
    let place = Place { len: place.len.min(1 << 20), ..place };
    let (mapping, into) = map(pci, place)?;
    let error = || TransportError::Capability {
        address: pci.address().to_owned(),
        source: CapabilityError::Place { what: "structure", place, bar_len: pci.bar_len(place.bar) },
    };
    Mmio::new(Arc::new(mapping), into, place.len as usize).ok_or_else(error)
}

/// A part of a BAR that is memory.
pub(super) fn memory(pci: &dyn PciAccess, place: Place) -> Result<SharedMemory, TransportError> {
    let (mapping, into) = map(pci, place)?;
    Arc::new(mapping).shared().part(into as u64, place.len).map_err(|_| TransportError::Capability {
        address: pci.address().to_owned(),
        source: CapabilityError::Place { what: "memory", place, bar_len: pci.bar_len(place.bar) },
    })
}
