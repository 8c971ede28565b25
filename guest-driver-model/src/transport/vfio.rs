//! The device through VFIO, with MSI-X interrupts as eventfds.
//!
//! Needs an IOMMU in the guest (`intel_iommu=on` and `-device intel-iommu` for
//! QEMU), since VFIO has none-IOMMU mode switched off in most kernels.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
};
use vfio_ioctls::{VfioContainer, VfioError, VfioRegionInfoCap};
use vhost_pci_device::abi::{DeviceConfig, MAX_VRINGS, PAGE_SIZE, QUEUE_VRING_FIRST, queue_of_vring};

use super::doorbell::{ByVirtqueue, Doorbells};
use super::sys::device::Device;
use super::sys::dma::DmaPages;
use super::sys::event::Event;
use super::sys::fd::borrow_device;
use super::sys::irq::set_triggers;
use super::sysfs::{Kind, PciDevice, first_of};
use super::virtio_pci::{ConfigSpace, Function, PciAccess, QueuePages, Resources, VirtioPci, config_space};
use super::{InterruptFds, Pairing, Transport, TransportError};
use crate::shm::SharedMemory;
use crate::shm::mapping::MappedRange;
use crate::translate::Access;

/// The kernel driver that gives a device to VFIO.
pub(super) const DRIVER: &str = "vfio-pci";
/// Where the device finds the queues' memory: below 4 GiB, away from 0 and from the
/// interrupt window at 0xfee0_0000.
const RING_IOVA: u64 = 16 << 20;
/// How long udev or devtmpfs may take to make the group's node.
const NODE_TIME: Duration = Duration::from_secs(2);

/// The device, reached through VFIO, and the doorbell function beside it.
pub struct VfioTransport {
    device: VirtioPci,
    doorbells: Doorbells,
    /// Readable when the kernel wants the device back, as for its removal.
    wanted_back: Event,
}

/// A VFIO device as a PCI function.
pub(super) struct VfioPci {
    address: String,
    device: Arc<Device>,
    container: Arc<VfioContainer>,
}

/// What must outlive the device's work, in this order of release.
struct Keep {
    _rings: DmaPages,
    _device: Arc<Device>,
}

impl VfioPci {
    /// Opens a device, with bus mastering enabled and a container, an empty IO address
    /// space, of its own. Binds it to vfio-pci if it is not.
    pub(super) fn open(pci: &PciDevice) -> Result<Self, TransportError> {
        bind(pci)?;
        let address = pci.address().to_owned();
        let failed = |step, advice| {
            let address = address.clone();
            move |source| TransportError::Vfio { address, step, source, advice }
        };
        let container = Arc::new(VfioContainer::new(None).map_err(failed(
            "opening a container",
            " (is the module vfio_iommu_type1 loaded, and /dev mounted?)",
        ))?);
        let device = Device::open(pci.folder(), container.clone()).map_err(failed(
            "opening the device",
            " (every device of its IOMMU group must be bound to vfio-pci or to no driver, nobody else may use it, \
             and the platform must remap interrupts: intremap=on)",
        ))?;
        let opened = Self { address, device: Arc::new(device), container };
        // VFIO enables memory, but not bus mastering: without it neither DMA nor MSI-X
        // arrives.
        config_space::enable(&opened)
            .map_err(|source| opened.event_error("enabling bus mastering through VFIO", source))?;
        Ok(opened)
    }

    /// Resets the function, if it can be.
    pub(super) fn reset_function(&self) {
        self.device.reset();
    }

    /// Lets the device reach pages at a bus address.
    pub(super) fn map_dma(
        &self,
        iova: u64,
        pages: SharedMemory,
        access: Access,
    ) -> Result<DmaPages, TransportError> {
        DmaPages::new(self.container.clone(), iova, pages, access).map_err(|source| TransportError::Vfio {
            address: self.address.clone(),
            step: "mapping memory for DMA",
            source,
            advice: " (see `ulimit -l`)",
        })
    }

    /// Zeroed pages that stay in memory.
    pub(super) fn locked_pages(&self, len: usize) -> Result<Arc<MappedRange>, TransportError> {
        MappedRange::locked_pages(len).map(Arc::new).map_err(|error| TransportError::RingMemory {
            address: self.address.clone(),
            problem: format!("mlock of {len} bytes: {error} (see `ulimit -l`)"),
        })
    }
}

/// Interrupts, for what asks for them one by one.
impl VfioPci {
    /// Whether a kernel driver of this name leaves the device to VFIO.
    pub(super) fn is_driver(name: &str) -> bool {
        name == DRIVER
    }

    /// MSI-X vectors.
    pub(super) fn msix_vectors(&self) -> u32 {
        self.device.get_irq_info(VFIO_PCI_MSIX_IRQ_INDEX).map_or(0, |irq| irq.count)
    }

    /// Lets the MSI-X vectors from `first` on signal these eventfds; those without stay masked.
    /// The first call names all vectors that will be used.
    pub(super) fn arm(&self, first: u32, events: &[Option<&Event>]) -> Result<(), TransportError> {
        set_triggers(&self.device, VFIO_PCI_MSIX_IRQ_INDEX, first, events)
            .map_err(|source| self.event_error("enabling MSI-X vectors through VFIO", source))
    }

    /// An eventfd that is signalled when the kernel wants the device back.
    pub(super) fn request_event(&self) -> Result<Event, TransportError> {
        let event = Event::new();
        let event =
            event.map_err(|source| self.event_error("an eventfd for the kernel's requests", source))?;
        set_triggers(&self.device, VFIO_PCI_REQ_IRQ_INDEX, 0, &[Some(&event)])
            .map_err(|source| self.event_error("asking VFIO for the kernel's requests", source))?;
        Ok(event)
    }

    fn event_error(&self, what: &'static str, source: io::Error) -> TransportError {
        TransportError::Event { device: self.address.clone(), what, source }
    }
}

impl VfioTransport {
    /// Starts the device at a PCI address, or, for `None`, the first vhost-pci device.
    /// Binds it to vfio-pci if it is not.
    ///
    /// # Errors
    /// If there is none, VFIO cannot have it, or it does not start.
    pub fn open(address: Option<&str>) -> Result<Self, TransportError> {
        first_of(Kind::VhostPci, address, Self::start)
    }

    fn start(pci: PciDevice) -> Result<Self, TransportError> {
        let opened = VfioPci::open(&pci)?;
        let function = Function::open(&opened)?;
        let pages = QueuePages::pages_for(QUEUE_VRING_FIRST + MAX_VRINGS) as u64;
        let memory = opened.locked_pages((pages * PAGE_SIZE) as usize)?;
        let rings = opened.map_dma(RING_IOVA, memory.shared(), Access::READ_WRITE)?;
        let places = (0..pages).map(|page| RING_IOVA + page * PAGE_SIZE);
        let resources = Resources {
            rings: QueuePages { pages: places.collect() },
            interrupts: enable_msix(&opened.device, &opened.address)?,
            keep: Box::new(Keep { _rings: rings, _device: opened.device.clone() }),
        };
        let device = function.start(&opened, resources)?;
        let doorbells = Doorbells::new(&opened.address, device.config().max_vrings.value())
            .map_err(|source| opened.event_error("eventfds for the doorbell function", source))?;
        Ok(Self { device, doorbells, wanted_back: opened.request_event()? })
    }
}

impl ByVirtqueue for VirtioPci {
    fn notify(&self, vring: u16) {
        self.doorbell(queue_of_vring(vring));
    }
}

/// Gives each MSI-X vector an eventfd: as many as there are queues, or fewer if the
/// device has fewer vectors. None at all means polling.
fn enable_msix(device: &Device, address: &str) -> Result<Vec<Event>, TransportError> {
    let count = device.get_irq_info(VFIO_PCI_MSIX_IRQ_INDEX).map_or(0, |irq| irq.count);
    let count = count.min(u32::from(QUEUE_VRING_FIRST + MAX_VRINGS));
    if count == 0 {
        tracing::warn!(device = address, "the device has no MSI-X vectors: polling only");
        return Ok(Vec::new());
    }
    let events = (0..count).map(|_| Event::new()).collect::<io::Result<Vec<_>>>().map_err(|source| {
        TransportError::Event { device: address.to_owned(), what: "an eventfd for an interrupt", source }
    })?;
    device.enable_msix(events.iter().map(Event::inner).collect()).map_err(|source| TransportError::Vfio {
        address: address.to_owned(),
        step: "enabling MSI-X",
        source,
        advice: "",
    })?;
    Ok(events)
}

/// Binds the device to vfio-pci, unless it is already, and says so.
fn bind(pci: &PciDevice) -> Result<(), TransportError> {
    let group = fs::read_link(pci.folder().join("iommu_group")).map_err(|_| TransportError::Vfio {
        address: pci.address().to_owned(),
        step: "finding its IOMMU group",
        source: VfioError::InvalidPath,
        advice: ": the guest has no IOMMU (start it with `-device intel-iommu,intremap=on` and intel_iommu=on), \
                 or use the device without --vfio",
    })?;
    if pci.driver().as_deref() != Some(DRIVER) {
        let probe = Path::new("/sys/bus/pci/drivers_probe");
        pci.unbind()?;
        tracing::info!(device = pci.address(), "binding the device to vfio-pci");
        pci.store("driver_override", DRIVER)?;
        fs::write(probe, pci.address()).map_err(|source| pci.file_error("write to", probe.into(), source))?;
        if pci.driver().as_deref() != Some(DRIVER) {
            return Err(TransportError::File {
                address: pci.address().to_owned(),
                action: "bind the device to vfio-pci through",
                path: probe.into(),
                source: io::ErrorKind::NotFound.into(),
                advice: " (load the module vfio-pci first)",
            });
        }
    }
    let node = Path::new("/dev/vfio").join(group.file_name().unwrap_or_default());
    let deadline = Instant::now() + NODE_TIME;
    while !node.exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

impl ConfigSpace for VfioPci {
    fn read(&self, offset: u16, bytes: &mut [u8]) -> io::Result<()> {
        // The library answers a failed read by leaving the bytes: make that visible.
        let len = self.device.get_region_size(VFIO_PCI_CONFIG_REGION_INDEX);
        if u64::from(offset) + bytes.len() as u64 > len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.device.region_read(VFIO_PCI_CONFIG_REGION_INDEX, bytes, offset.into());
        Ok(())
    }

    fn write(&self, offset: u16, bytes: &[u8]) -> io::Result<()> {
        self.device.region_write(VFIO_PCI_CONFIG_REGION_INDEX, bytes, offset.into());
        Ok(())
    }
}

impl PciAccess for VfioPci {
    fn address(&self) -> &str {
        &self.address
    }

    fn bar_len(&self, bar: u8) -> u64 {
        self.device.get_region_size(bar.into())
    }

    fn map_bar(&self, bar: u8, offset: u64, len: usize) -> io::Result<MappedRange> {
        let bar = u32::from(bar);
        if self.device.get_region_flags(bar) & VFIO_REGION_INFO_FLAG_MMAP == 0 {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "VFIO does not let this BAR be mapped"));
        }
        if !can_map(&self.device.get_region_caps(bar), offset, len as u64) {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "VFIO keeps a part of this range for MSI-X",
            ));
        }
        let start =
            self.device.get_region_offset(bar).checked_add(offset).ok_or(io::ErrorKind::InvalidInput)?;
        MappedRange::of_file(borrow_device(&self.device), start, len)
    }
}

/// Whether a range of a region can be mapped. A region with a sparse-mmap capability
/// is mappable in the listed areas only: the kernel keeps the MSI-X table.
fn can_map(capabilities: &[VfioRegionInfoCap], offset: u64, len: u64) -> bool {
    let mut sparse = None;
    for capability in capabilities {
        match capability {
            VfioRegionInfoCap::MsixMappable => return true,
            VfioRegionInfoCap::SparseMmap(areas) => sparse = Some(&areas.areas),
            _ => {}
        }
    }
    let inside = |start: u64, size: u64| {
        let into = offset.checked_sub(start);
        into.and_then(|into| size.checked_sub(into)).is_some_and(|rest| len <= rest)
    };
    sparse.is_none_or(|areas| areas.iter().any(|area| inside(area.offset, area.size)))
}

impl Transport for VfioTransport {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn config(&self) -> &DeviceConfig {
        self.device.config()
    }

    fn window(&self) -> &SharedMemory {
        self.device.window()
    }

    fn doorbell(&self, queue: u16) {
        match queue.checked_sub(QUEUE_VRING_FIRST) {
            Some(vring) => self.doorbells.call(vring, &self.device),
            None => self.device.doorbell(queue),
        }
    }

    fn interrupt_fd(&self, queue: u16) -> Option<BorrowedFd<'_>> {
        self.device.interrupt_fd(queue)
    }

    fn interrupt_fds(&self, queue: u16) -> InterruptFds<'_> {
        let kick = queue.checked_sub(QUEUE_VRING_FIRST).and_then(|vring| self.doorbells.kick_fd(vring));
        [self.interrupt_fd(queue), kick].into_iter().flatten()
    }

    fn pair(&self, link_id: u64) -> Option<Pairing> {
        self.doorbells.pair(link_id)
    }

    fn follow_doorbell(&self) {
        self.doorbells.follow(&self.device);
    }

    fn check(&self) -> Result<(), TransportError> {
        if self.wanted_back.take() {
            let why = "the kernel wants the device back, to unplug it or for another driver";
            return Err(TransportError::Gone { device: self.name().to_owned(), why });
        }
        self.device.check()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use vfio_ioctls::{VfioRegionInfoCapSparseMmap, VfioRegionSparseMmapArea};

    #[test]
    fn only_listed_areas_of_a_sparse_region_are_mapped() {
        let areas = vec![
            VfioRegionSparseMmapArea { offset: 0, size: 0x1000 },
            VfioRegionSparseMmapArea { offset: 0x2000, size: 0x2000 },
        ];
        let sparse = [VfioRegionInfoCap::SparseMmap(VfioRegionInfoCapSparseMmap { areas })];
        assert!(can_map(&sparse, 0, 0x1000));
        assert!(can_map(&sparse, 0x3000, 0x1000));
        assert!(!can_map(&sparse, 0, 0x2000));
        assert!(!can_map(&sparse, 0x1000, 0x1000));
        assert!(!can_map(&sparse, 0x3000, u64::MAX));
        assert!(can_map(&[], 0x1000, 0x1000));
        assert!(can_map(&[VfioRegionInfoCap::MsixMappable], 0x1000, 0x1000));
    }
}
