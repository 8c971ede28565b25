//! QEMU's `ivshmem-doorbell` function through VFIO: its register, its page, its vectors; and what
//! of them the rest of the folder needs, so that it can be tried without a PCI function.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use vhost_pci_device::abi;

use super::page::{DoorbellPage, PageError};
use crate::transport::TransportError;
use crate::transport::sys::event::Event;
use crate::transport::sys::mmio::Mmio;
use crate::transport::sysfs::{Kind, PciDevice};
use crate::transport::vfio::VfioPci;
use crate::transport::virtio_pci::{self, PciAccess, Place, Registers};

/// The BAR of the registers, and their length.
const REGISTERS: Place = Place { bar: 0, offset: 0, len: 256 };
const PAGE: Place = Place { bar: abi::DOORBELL_PAGE_BAR, offset: 0, len: abi::DOORBELL_PAGE_LEN };
/// IVPosition, which reads as the function's own number: never all ones.
const POSITION: u64 = 8;
/// The doorbell register has eight bits for a vector.
const MOST_VECTORS: u32 = 256;
/// The BAR that starts with the MSI-X table.
const MSIX_BAR: u8 = 1;
/// Bytes of an entry of that table.
const MSIX_ENTRY: u64 = 16;
/// An address that an interrupt message can have.
const MSI_ADDRESS: u32 = 0xfee0_0000;
/// How long an interrupt of one's own may take.
const TRIAL: Duration = Duration::from_millis(500);

/// Why a function is not the link's, or cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FunctionError {
    /// Another driver has it.
    #[error("the driver {driver} has it: it stays with that driver")]
    Driver {
        /// The driver's name.
        driver: String,
    },
    /// VFIO cannot have it.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// Its page is not the link's.
    #[error(transparent)]
    Page(#[from] PageError),
    /// It has no MSI-X vectors.
    #[error("it has no MSI-X vectors: give it vectors=8")]
    NoVectors,
}

/// A function that is the link's, opened.
pub trait Function: Send + Sync {
    /// PCI address.
    fn address(&self) -> &str;

    /// The page.
    fn page(&self) -> &DoorbellPage;

    /// MSI-X vectors.
    fn vectors(&self) -> u16;

    /// Stores to the doorbell register.
    fn ring(&self, value: u32);

    /// Unmasks a vector, which then signals the eventfd, and rings it once to see that it
    /// does. Says whether it did.
    ///
    /// # Errors
    /// If the kernel does not do it.
    fn arm(&self, vector: u16, event: &Event) -> Result<bool, TransportError>;

    /// Why the function has to be let go, if it has to.
    fn has_to_go(&self) -> Option<&'static str>;
}

/// Where functions are plugged.
pub trait Slots: Send + Sync {
    /// Those that may be a link's.
    fn plugged(&self) -> Vec<Plugged>;

    /// Opens one, if it is that of the link. No vector is unmasked yet.
    ///
    /// # Errors
    /// [`FunctionError`].
    fn open(&self, address: &str, link_id: u64) -> Result<Box<dyn Function>, FunctionError>;
}

/// A function that may be a link's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plugged {
    /// PCI address.
    pub address: String,
    /// Another one when a function was plugged anew at the same address.
    pub plugging: u64,
}

/// Such a function through VFIO. The device is last to go: VFIO does not let go of one
/// whose registers are mapped.
struct VfioFunction {
    page: DoorbellPage,
    registers: Mmio,
    /// Readable when the kernel wants the function back, as for its removal.
    wanted_back: Event,
    vectors: u16,
    pci: VfioPci,
}

impl VfioFunction {
    /// Opens a function, if it is that of the link. Binds it to vfio-pci if no driver has it.
    /// No vector is unmasked yet.
    fn open(device: &PciDevice, link_id: u64) -> Result<Self, FunctionError> {
        match device.driver() {
            Some(driver) if !VfioPci::is_driver(&driver) => return Err(FunctionError::Driver { driver }),
            _ => {}
        }
        let pci = VfioPci::open(device)?;
        let page = DoorbellPage::new(virtio_pci::memory(&pci, PAGE)?, link_id)?;
        let vectors = pci.msix_vectors().min(MOST_VECTORS) as u16;
        if vectors == 0 {
            return Err(FunctionError::NoVectors);
        }
        let registers = virtio_pci::registers(&pci, REGISTERS)?;
        let wanted_back = pci.request_event()?;
        seed_messages(&pci, vectors);
        // Allocates all: afterwards each can be unmasked by itself.
        pci.arm(0, &vec![None; vectors.into()])?;
        Ok(Self { page, registers, wanted_back, vectors, pci })
    }
}

/// The slots of this system.
pub struct PciSlots;

impl Slots for PciSlots {
    fn plugged(&self) -> Vec<Plugged> {
        let plugged = |device: PciDevice| {
            // The folder in sysfs is another one for what is plugged later.
            let plugging = fs::metadata(device.folder()).ok()?.ino();
            Some(Plugged { address: device.address().to_owned(), plugging })
        };
        PciDevice::candidates(Kind::Doorbell).into_iter().filter_map(plugged).collect()
    }

    fn open(&self, address: &str, link_id: u64) -> Result<Box<dyn Function>, FunctionError> {
        Ok(Box::new(VfioFunction::open(&PciDevice::at(address)?, link_id)?))
    }
}

impl Function for VfioFunction {
    fn address(&self) -> &str {
        self.pci.address()
    }

    fn page(&self) -> &DoorbellPage {
        &self.page
    }

    fn vectors(&self) -> u16 {
        self.vectors
    }

    fn ring(&self, value: u32) {
        self.registers.write32(abi::DOORBELL_REGISTER, value);
    }

    fn arm(&self, vector: u16, event: &Event) -> Result<bool, TransportError> {
        self.pci.arm(vector.into(), &[Some(event)])?;
        // One that was there before proves nothing, and is looked after by whoever waits.
        event.take();
        let position = self.registers.read32(POSITION);
        self.ring(position << 16 | u32::from(vector));
        let start = Instant::now();
        while let Some(left) = TRIAL.checked_sub(start.elapsed()) {
            if event.wait(left) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn has_to_go(&self) -> Option<&'static str> {
        if self.wanted_back.take() {
            Some("the kernel wants it back, to unplug it or for another driver")
        } else if self.registers.read32(POSITION) == u32::MAX {
            Some("it answers no more (unplugged?)")
        } else {
            None
        }
    }
}

/// Lets each vector have a message that could be one, while MSI-X is off. Linux switches
/// MSI-X on before it writes the messages, and QEMU on KVM then makes the routes of the vectors
/// that it has eventfds for: behind a virtual IOMMU that remaps interrupts it fails for
/// all of them if one's address is no interrupt's, as 0 is. Where the table cannot be mapped, a
/// vector that does not interrupt is found by its trial.
fn seed_messages(pci: &VfioPci, vectors: u16) {
    let place = Place { bar: MSIX_BAR, offset: 0, len: u64::from(vectors) * MSIX_ENTRY };
    match virtio_pci::registers(pci, place) {
        Ok(table) => {
            for vector in 0..u64::from(vectors) {
                table.write32(vector * MSIX_ENTRY, MSI_ADDRESS);
            }
        }
        Err(error) => tracing::debug!("the MSI-X table is left as it is: {error}"),
    }
}
