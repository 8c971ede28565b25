//! A virtio function of a guest, bare: its registers, its configuration space and memory that it
//! reaches, for who obeys no rule. No driver; the programs that try what the other side bears use it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use vhost_pci_device::abi::{DeviceConfig, PAGE_SIZE};
use virtio_bindings::virtio_config::VIRTIO_F_ACCESS_PLATFORM;

use super::sys::dma::DmaPages;
use super::sys::mmio::Mmio;
use super::sysfs::{Kind, PciDevice, SysfsPci, first_of};
use super::vfio::VfioPci;
use super::virtio_pci::initialise::{self, InitError};
use super::virtio_pci::{
    Capabilities, Doorbell, PciAccess, QueuePages, Registers, Structures, config_space, memory, registers,
};
use super::{TransportError, ring_memory};
use crate::link::VringInfo;
use crate::shm::SharedMemory;
use crate::shm::mapping::MappedRange;
use crate::translate::Access;

/// Length of [`Reached`], bytes: a huge page.
pub const REACHED_LEN: u64 = 2 << 20;
/// Where a card behind an IOMMU finds it.
const IOVA: u64 = 0x1000_0000;
/// `struct virtio_net_config` up to its MAC address and status.
const NET_CONFIG_LEN: u64 = 8;

/// Memory of this program that a function reaches, and where.
pub struct Reached {
    /// The memory.
    pub memory: SharedMemory,
    /// Its bus address.
    pub bus: u64,
    pages: Arc<MappedRange>,
    mapped: Option<DmaPages>,
}

/// A function. Fields in the order of release: VFIO does not let go of one whose registers are mapped.
pub struct Bare {
    common: Mmio,
    notify: Mmio,
    device: Mmio,
    window: Option<SharedMemory>,
    structures: Structures,
    pci: Way,
    address: String,
    folder: PathBuf,
    config: File,
}

/// How it is reached.
enum Way {
    Vfio(VfioPci),
    Sysfs(SysfsPci),
}

impl Way {
    fn access(&self) -> &dyn PciAccess {
        match self {
            Self::Vfio(pci) => pci,
            Self::Sysfs(pci) => pci,
        }
    }
}

impl Bare {
    /// Takes the first function of a kind that no driver of the kernel's is using, through VFIO or through
    /// sysfs. It is not reset.
    ///
    /// # Errors
    /// If there is none, or it cannot be had.
    pub fn open(kind: Kind, vfio: bool) -> Result<Self, TransportError> {
        first_of(kind, None, |device| Self::take(kind, device, vfio))
    }

    fn take(kind: Kind, device: PciDevice, vfio: bool) -> Result<Self, TransportError> {
        let (address, folder) = (device.address().to_owned(), device.folder().to_owned());
        let path = folder.join("config");
        let config = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|source| device.file_error("open", path, source))?;
        let way = match vfio {
            true => Way::Vfio(VfioPci::open(&device)?),
            false => {
                device.unbind()?;
                device.store("enable", "1")?;
                let pci = SysfsPci::open(device.clone())?;
                config_space::enable(&pci)
                    .map_err(|source| device.file_error("write to", folder.join("config"), source))?;
                Way::Sysfs(pci)
            }
        };
        let pci = way.access();
        let lens = std::array::from_fn(|bar| pci.bar_len(bar as u8));
        let failed = |source| TransportError::Capability { address: address.clone(), source };
        let (structures, window) = match kind {
            Kind::VhostPci => {
                let found = Capabilities::read(pci, &lens).map_err(failed)?;
                (found.structures, Some(memory(pci, found.window)?))
            }
            _ => (Structures::read(pci, &lens, NET_CONFIG_LEN).map_err(failed)?, None),
        };
        Ok(Self {
            common: registers(pci, structures.common)?,
            notify: registers(pci, structures.notify)?,
            device: registers(pci, structures.device)?,
            window,
            structures,
            pci: way,
            address,
            folder,
            config,
        })
    }

    /// The common configuration (virtio 1.3, 4.1.4.3).
    pub fn common(&self) -> &impl Registers {
        &self.common
    }

    /// The notification area (4.1.4.4).
    pub fn notify(&self) -> &impl Registers {
        &self.notify
    }

    /// Its length, bytes.
    pub fn notify_len(&self) -> u64 {
        self.structures.notify.len.min(1 << 20)
    }

    /// The device-specific configuration (4.1.4.6).
    pub fn device(&self) -> &impl Registers {
        &self.device
    }

    /// The window of a vhost-pci device.
    pub fn window(&self) -> Option<&SharedMemory> {
        self.window.as_ref()
    }

    /// What a vhost-pci device says of itself.
    pub fn device_config(&self) -> DeviceConfig {
        initialise::read_config(&self.common, &self.device)
    }

    /// Reads the function's own configuration space, not what VFIO makes of it.
    ///
    /// # Errors
    /// What the system answers.
    pub fn read_config_space(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.config.read_exact_at(bytes, offset)
    }

    /// Writes to it.
    ///
    /// # Errors
    /// What the system answers.
    pub fn write_config_space(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.config.write_all_at(bytes, offset)
    }

    /// Resets the function (FLR), not the device as virtio does.
    ///
    /// # Errors
    /// What the system answers.
    pub fn reset_function(&self) -> io::Result<()> {
        match &self.pci {
            Way::Vfio(pci) => {
                pci.reset_function();
                Ok(())
            }
            Way::Sysfs(_) => fs::write(self.folder.join("reset"), "1"),
        }
    }

    /// Memory that the function reaches: by VFIO where that is how it is reached itself, else a huge page.
    ///
    /// # Errors
    /// What the system answers.
    pub fn reached(&self) -> Result<Reached, TransportError> {
        let problem = |problem: String| TransportError::RingMemory { address: self.address.clone(), problem };
        let (pages, bus) = match &self.pci {
            Way::Vfio(pci) => (pci.locked_pages(REACHED_LEN as usize)?, IOVA),
            Way::Sysfs(_) => {
                let failed = |error| problem(format!("a huge page: {error}"));
                fs::write("/proc/sys/vm/nr_hugepages", "4").map_err(failed)?;
                let pages = MappedRange::huge_page(REACHED_LEN as usize).map_err(failed)?;
                let bus = ring_memory::physical(&pages, 0).map_err(problem)?;
                (Arc::new(pages), bus)
            }
        };
        let mut reached = Reached { memory: pages.clone().shared(), bus, pages, mapped: None };
        self.map(&mut reached)?;
        Ok(reached)
    }

    /// Lets the function reach the memory, if it is behind an IOMMU and does not.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn map(&self, reached: &mut Reached) -> Result<(), TransportError> {
        if let (Way::Vfio(pci), None) = (&self.pci, &reached.mapped) {
            reached.mapped =
                Some(pci.map_dma(reached.bus, reached.pages.clone().shared(), Access::READ_WRITE)?);
        }
        Ok(())
    }

    /// Takes the memory from the function, if it is behind an IOMMU.
    pub fn unmap(&self, reached: &mut Reached) {
        reached.mapped = None;
    }

    /// Starts a network card as the specification has it (3.1.1), with these features and queues.
    ///
    /// # Errors
    /// At which step it does not start.
    pub fn start_card(&self, features: u64, queues: &[VringInfo]) -> Result<(), InitError> {
        let platform = match self.pci {
            Way::Vfio(_) => 1 << VIRTIO_F_ACCESS_PLATFORM,
            Way::Sysfs(_) => 0,
        };
        initialise::negotiate(&self.common, features | platform, 0)?;
        for (queue, at) in (0..).zip(queues) {
            let size = at.size as u16;
            let places = [at.desc, at.avail, at.used];
            let sizes = size..=size;
            initialise::queue_up(&self.common, queue, sizes, places, initialise::NO_VECTOR)?;
        }
        initialise::drive(&self.common);
        Ok(())
    }

    /// Starts a vhost-pci device without interrupts, its virtqueues in the memory that it reaches.
    ///
    /// # Errors
    /// At which step it does not start.
    pub fn start_device(&self, reached: &Reached) -> Result<(), InitError> {
        let pages = (0..REACHED_LEN / PAGE_SIZE).map(|page| reached.bus + page * PAGE_SIZE);
        let rings = QueuePages { pages: pages.collect() };
        let window_len = self.window.as_ref().map_or(0, SharedMemory::len);
        initialise::start(&self.common, &self.device, window_len, &rings, 0).map(drop)
    }

    /// Goes through the steps of a start with these features, whether or not the device takes them.
    pub fn negotiate_blindly(&self, features: u64) {
        self.reset();
        for status in [1, 3] {
            self.common.write8(initialise::DEVICE_STATUS, status);
        }
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.common.write32(initialise::DRIVER_FEATURE_SELECT, select);
            self.common.write32(initialise::DRIVER_FEATURE, half);
        }
        self.common.write8(initialise::DEVICE_STATUS, 11);
    }

    /// Sets up queues and says DRIVER_OK, whatever was before.
    pub fn queues_blindly(&self, queues: &[VringInfo]) {
        for (queue, at) in (0..).zip(queues) {
            let size = at.size as u16;
            let places = [at.desc, at.avail, at.used];
            // What the device answers is of no interest.
            let _ = initialise::queue_up(&self.common, queue, 0..=size, places, initialise::NO_VECTOR);
        }
        self.set_status(15);
    }

    /// Sets the device's status.
    pub fn set_status(&self, status: u8) {
        self.common.write8(initialise::DEVICE_STATUS, status);
    }

    /// Whether it is behind an IOMMU.
    pub fn is_behind_iommu(&self) -> bool {
        matches!(self.pci, Way::Vfio(_))
    }

    /// What its configuration space has in its first 256 bytes.
    pub fn keep_config_space(&self) -> [u8; 256] {
        let mut bytes = [0; 256];
        // Who cannot read it cannot write it either.
        let _ = self.read_config_space(0, &mut bytes);
        bytes
    }

    /// Writes that back.
    pub fn restore_config_space(&self, bytes: &[u8; 256]) {
        for (at, word) in (0..).step_by(4).zip(bytes.chunks_exact(4)) {
            let _ = self.write_config_space(at, word);
        }
    }

    /// Notifies a queue, if there is one of this number.
    pub fn kick(&self, queue: u16) {
        self.common.write16(initialise::QUEUE_SELECT, queue);
        let offset = self.common.read16(initialise::QUEUE_NOTIFY_OFF);
        if let Ok(doorbell) = Doorbell::new(&self.notify, &self.structures, queue, offset) {
            doorbell.ring();
        }
    }

    /// Resets the device and waits until it says so, but not for ever.
    pub fn reset(&self) {
        self.common.write8(initialise::DEVICE_STATUS, 0);
        for _ in 0..1000 {
            if self.common.read8(initialise::DEVICE_STATUS) == 0 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.common.write8(initialise::DEVICE_STATUS, 0);
    }
}
