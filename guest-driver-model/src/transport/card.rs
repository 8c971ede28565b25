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
use super::sys::event::Event;
use super::sys::mmio::Mmio;
use super::sysfs::{Kind, PciDevice, first_of};
use super::vfio::{DRIVER, VfioPci};
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
    config: Mmio,
    structures: Structures,
    /// Readable when the kernel wants the card back, as for its removal.
    wanted_back: Event,
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

/// The card wants to be reset.
pub const NEEDS_RESET: u8 = initialise::STATUS_NEEDS_RESET;

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

    /// Takes the function at a PCI address, which nobody else may have, nor anything that its IOMMU does not
    /// part it from, and resets it.
    ///
    /// # Errors
    /// What stands in the way, and what to do about it.
    pub fn open_function(address: &str) -> Result<Self, TransportError> {
        let device = PciDevice::at(address)?;
        device.check_kind(Kind::NetworkCard)?;
        device.check_isolated(DRIVER)?;
        Self::take(device)
    }

    fn take(device: PciDevice) -> Result<Self, TransportError> {
        let pci = VfioPci::open(&device)?;
        let lens = std::array::from_fn(|bar| pci.bar_len(bar as u8));
        let structures = Structures::read(&pci, &lens, CONFIG_LEN)
            .map_err(|source| TransportError::Capability { address: pci.address().into(), source })?;
        let card = Self {
            common: registers(&pci, structures.common)?,
            notify: registers(&pci, structures.notify)?,
            config: registers(&pci, structures.device)?,
            wanted_back: pci.request_event()?,
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
        self.map_shared(iova, pages.memory(), access)
    }

    /// Lets the card reach memory that is mapped here, such as a part of another device's BAR, at the bus
    /// address `iova`.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn map_shared(
        &self,
        iova: u64,
        memory: SharedMemory,
        access: Access,
    ) -> Result<Mapped, TransportError> {
        let pages = self.pci.map_dma(iova, memory, access)?;
        Ok(Mapped { address: self.name().to_owned(), pages })
    }

    /// Starts the card (3.1.1) with these features and queues, whose places are bus
    /// addresses of memory that was mapped.
    ///
    /// # Errors
    /// At which step it did not start; it is reset then.
    pub fn start(&mut self, features: u64, queues: &[VringInfo]) -> Result<(), TransportError> {
        // Without ACCESS_PLATFORM the card would take our bus addresses for physical ones.
        self.negotiate(features, 0)?;
        self.drive(queues, 0)
    }

    /// Steps 1 to 6 of 3.1.1: the features accepted, all of `required` and what the card has of
    /// `understood`.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn negotiate(&mut self, required: u64, understood: u64) -> Result<u64, TransportError> {
        self.doorbells.clear();
        let accepted =
            initialise::negotiate(&self.common, required | 1 << VIRTIO_F_ACCESS_PLATFORM, understood);
        self.or_reset(accepted)
    }

    /// Steps 7 and 8, with these queues and so many MSI-X vectors: the last queues share one if there are fewer.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn drive(&mut self, queues: &[VringInfo], vectors: u16) -> Result<(), TransportError> {
        let driven = self.steps(queues, vectors);
        self.or_reset(driven)
    }

    fn or_reset<T>(&self, result: Result<T, initialise::InitError>) -> Result<T, TransportError> {
        result.map_err(|source| {
            self.reset();
            TransportError::Init { address: self.name().to_owned(), source }
        })
    }

    fn steps(&mut self, queues: &[VringInfo], vectors: u16) -> Result<(), initialise::InitError> {
        let places = queues.iter().map(|at| (at.size as u16, [at.desc, at.avail, at.used]));
        let offsets = initialise::queues_up(&self.common, places, vectors)?;
        for (queue, offset) in (0..).zip(offsets) {
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

    /// Its Ethernet address, if it has one of its own (it accepted VIRTIO_NET_F_MAC).
    pub fn mac(&self) -> [u8; 6] {
        std::array::from_fn(|at| self.config.read8(at as u64))
    }

    /// What it says of itself: 0 when it was reset, all ones when it is gone.
    pub fn status(&self) -> u8 {
        self.common.read8(initialise::DEVICE_STATUS)
    }

    /// Whether the card can be kept: the kernel does not want it back.
    ///
    /// # Errors
    /// [`TransportError::Gone`]: whoever wants it waits until this card is dropped.
    pub fn check(&self) -> Result<(), TransportError> {
        match self.wanted_back.take() {
            true => Err(TransportError::Gone {
                device: self.name().to_owned(),
                why: "the kernel wants the card back, to unplug it or for another driver",
            }),
            false => Ok(()),
        }
    }

    /// MSI-X vectors.
    pub fn vectors(&self) -> u32 {
        self.pci.msix_vectors()
    }

    /// Lets the first vectors signal these eventfds.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn arm(&self, events: &[Event]) -> Result<(), TransportError> {
        let events: Vec<_> = events.iter().map(Some).collect();
        self.pci.arm(0, &events)
    }

    /// Stops the card, and waits until it has stopped: it reaches no queue and no buffer any more.
    ///
    /// # Errors
    /// If it does not come out of its reset.
    pub fn stop(&self) -> Result<(), TransportError> {
        let stopped = initialise::reset_and_answer(&self.common);
        stopped.map_err(|source| TransportError::Init { address: self.name().to_owned(), source })
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
