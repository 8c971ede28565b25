//! A virtio network card (virtio 1.3, 5.1) through VFIO: what an owner's driver works
//! with when it is a program, as DPDK's is, in a guest with an IOMMU.
//!
//! The card reaches what was mapped with [`Card::map`], at the bus addresses given
//! there, and nothing else of the guest. It is polled: it has no interrupts.

use std::sync::Arc;

use vhost_pci_device::abi::PAGE_SIZE;
use virtio_bindings::virtio_config::VIRTIO_F_ACCESS_PLATFORM;

use super::TransportError;
use super::sys::dma::DmaPages;
use super::sys::mmio::Mmio;
use super::sysfs::{Kind, PciDevice, first_of};
use super::vfio::VfioPci;
use super::virtio_pci::{Doorbell, PciAccess, Registers, Structures, initialise, registers};
use crate::link::VringInfo;
use crate::shm::SharedMemory;
use crate::shm::mapping::MappedRange;
use crate::translate::Access;

/// `struct virtio_net_config` up to its MAC address and status.
const CONFIG_LEN: u64 = 8;

/// The card. Dropping it resets it. The device is last to go: VFIO does not let go of
/// one whose registers are mapped.
pub struct Card {
    doorbells: Vec<Doorbell>,
    common: Mmio,
    notify: Mmio,
    structures: Structures,
    pci: VfioPci,
}

/// Locked pages of this process that a card can be let reach.
#[derive(Clone)]
pub struct Pages(Arc<MappedRange>);

impl Pages {
    /// The pages, as the driver uses them.
    pub fn memory(&self) -> SharedMemory {
        self.0.clone().shared()
    }
}

/// Pages that the card reaches while this is held.
pub struct Mapped {
    address: String,
    pages: DmaPages,
}

impl Mapped {
    /// Takes the pages from the card. When this returns, the guest's IOMMU has forgotten
    /// them, and whoever works the card has been told.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn unmap(self) -> Result<(), TransportError> {
        let Self { address, pages } = self;
        pages.unmap().map_err(|source| TransportError::Vfio {
            address,
            step: "unmapping memory",
            source,
            advice: "",
        })
    }
}

impl Card {
    /// Takes the card at a PCI address, or, for `None`, the first one that no driver of
    /// the kernel's is using, and resets it.
    ///
    /// # Errors
    /// If there is none, or VFIO cannot have it.
    pub fn open(address: Option<&str>) -> Result<Self, TransportError> {
        first_of(Kind::NetworkCard, address, Self::take)
    }

    fn take(device: PciDevice) -> Result<Self, TransportError> {
        let pci = VfioPci::open(&device)?;
        let lens = std::array::from_fn(|bar| pci.bar_len(bar as u8));
        let structures = Structures::read(&pci, &lens, CONFIG_LEN)
            .map_err(|source| TransportError::Capability { address: pci.address().into(), source })?;
        let card = Self {
            common: registers(&pci, structures.common)?,
            notify: registers(&pci, structures.notify)?,
            pci,
            structures,
            doorbells: Vec::new(),
        };
        card.reset();
        Ok(card)
    }

    /// Its PCI address.
    pub fn name(&self) -> &str {
        self.pci.address()
    }

    /// Zeroed pages that the card does not reach yet; `len` is rounded up to whole ones.
    ///
    /// # Errors
    /// What the system answers.
    pub fn pages(&self, len: u64) -> Result<Pages, TransportError> {
        let whole =
            usize::try_from(len).ok().and_then(|len| len.checked_next_multiple_of(PAGE_SIZE as usize));
        // More than the address space has is more than can be locked.
        self.pci.locked_pages(whole.unwrap_or(usize::MAX)).map(Pages)
    }

    /// Lets the card reach pages at the bus address `iova`.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn map(&self, iova: u64, pages: &Pages, access: Access) -> Result<Mapped, TransportError> {
        let pages = self.pci.map_dma(iova, pages.0.clone(), access)?;
        Ok(Mapped { address: self.name().to_owned(), pages })
    }

    /// Starts the card (3.1.1) with these features and queues, whose places are bus
    /// addresses of memory that was mapped.
    ///
    /// # Errors
    /// At which step it did not start; it is reset then.
    pub fn start(&mut self, features: u64, queues: &[VringInfo]) -> Result<(), TransportError> {
        let started = self.steps(features, queues);
        if started.is_err() {
            self.reset();
        }
        started.map_err(|source| TransportError::Init { address: self.name().to_owned(), source })
    }

    fn steps(&mut self, features: u64, queues: &[VringInfo]) -> Result<(), initialise::InitError> {
        // Without ACCESS_PLATFORM the card would take our bus addresses for physical ones.
        initialise::negotiate(&self.common, features | 1 << VIRTIO_F_ACCESS_PLATFORM, 0)?;
        self.doorbells.clear();
        for (queue, at) in (0..).zip(queues) {
            let size = at.size as u16;
            let places = [at.desc, at.avail, at.used];
            let offset =
                initialise::queue_up(&self.common, queue, size..=size, places, initialise::NO_VECTOR)?;
            self.doorbells.push(Doorbell::new(&self.notify, &self.structures, queue, offset)?);
        }
        initialise::drive(&self.common);
        Ok(())
    }

    /// Tells the card that there is something in a queue.
    pub fn kick(&self, queue: u16) {
        if let Some(doorbell) = self.doorbells.get(usize::from(queue)) {
            doorbell.ring();
        }
    }

    /// Stops the card: it reaches no queue and no buffer any more.
    pub fn reset(&self) {
        self.common.write8(initialise::DEVICE_STATUS, 0);
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        self.reset();
    }
}
