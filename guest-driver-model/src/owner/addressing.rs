//! What the card's driver maps for its device, and when: everything, its rings and
//! buffers for good, or each buffer for the time that it is with the device.

use iommu::{Access, PAGE_SIZE};

use super::dma::{BufferMappings, DmaError, IommuDriver};
use super::{OwnerIommu, OwnerMemory};
use crate::net::owner::{BufferMapping, Fixed};
use crate::net::{OwnerLayout, OwnerPort};
use crate::shm::ShmError;

/// Where static mappings start: an address that is no guest-physical one of a small
/// VM's, below the 39 bits that the shortest IOMMUs have.
pub const STATIC_IOVA: u64 = 32 << 32;

/// How the device is given its addresses.
pub trait Addressing {
    /// What is done for each buffer.
    type Buffers: BufferMapping;

    /// Fresh rings with all their buffers. The mappings of an earlier port's buffers
    /// go with that.
    ///
    /// # Errors
    /// If `layout` is not inside the memory.
    fn port(&self, memory: &OwnerMemory, layout: &OwnerLayout) -> Result<OwnerPort<Self::Buffers>, ShmError>;

    /// What is added to a ring's offset in the memory to tell the device's VMM of it.
    fn ring_base(&self, memory: &OwnerMemory, vring: u16) -> u64;

    /// The IOMMU, if there is one.
    fn iommu(&self) -> Option<&OwnerIommu>;
}

/// No IOMMU: all memory, at its guest-physical address.
#[derive(Clone, Copy, Debug, Default)]
pub struct Untranslated;

impl Addressing for Untranslated {
    type Buffers = Fixed;

    fn port(&self, memory: &OwnerMemory, layout: &OwnerLayout) -> Result<OwnerPort, ShmError> {
        OwnerPort::new(memory.shared(), layout, memory.guest_start())
    }

    fn ring_base(&self, memory: &OwnerMemory, _: u16) -> u64 {
        // vhost-user tells ring addresses as the front-end's own.
        memory.front_end_address()
    }

    fn iommu(&self) -> Option<&OwnerIommu> {
        None
    }
}

/// Rings and buffers are mapped once, from [`STATIC_IOVA`] on, and nothing else is: a
/// driver in user space.
#[derive(Clone, Debug)]
pub struct StaticMappings {
    driver: IommuDriver,
}

impl StaticMappings {
    /// Maps the rings and buffers of `layout`. If `directed`, transmit buffers are
    /// only for reading and receive buffers only for writing.
    ///
    /// # Errors
    /// If the IOMMU refuses.
    pub fn new(
        driver: IommuDriver,
        memory: &OwnerMemory,
        layout: &OwnerLayout,
        directed: bool,
    ) -> Result<Self, DmaError> {
        let map = |start: u64, end: u64, access| {
            let gpa = memory.guest_start().wrapping_add(start);
            driver.map_at(STATIC_IOVA.wrapping_add(start), gpa, end - start, access)
        };
        for vring in 0..layout.vrings().len() as u16 {
            let (ring, buffers, end) = areas(layout, vring);
            if directed {
                let access = if vring.is_multiple_of(2) { Access::Write } else { Access::Read };
                map(ring, buffers, Access::ReadWrite)?;
                map(buffers, end, access)?;
            } else {
                map(ring, end, Access::ReadWrite)?;
            }
        }
        Ok(Self { driver })
    }
}

impl Addressing for StaticMappings {
    type Buffers = Fixed;

    fn port(&self, memory: &OwnerMemory, layout: &OwnerLayout) -> Result<OwnerPort, ShmError> {
        OwnerPort::new(memory.shared(), layout, STATIC_IOVA)
    }

    fn ring_base(&self, _: &OwnerMemory, _: u16) -> u64 {
        STATIC_IOVA
    }

    fn iommu(&self) -> Option<&OwnerIommu> {
        Some(self.driver.iommu())
    }
}

/// Rings are mapped once, each buffer while it is with the device: a kernel in strict
/// mode.
#[derive(Clone, Debug)]
pub struct PacketMappings {
    driver: IommuDriver,
    /// By vring.
    ring_bases: Vec<u64>,
}

impl PacketMappings {
    /// Maps the rings of `layout`.
    ///
    /// # Errors
    /// If the IOMMU refuses.
    pub fn new(driver: IommuDriver, memory: &OwnerMemory, layout: &OwnerLayout) -> Result<Self, DmaError> {
        let map = |vring| {
            let (ring, buffers, _) = areas(layout, vring);
            let gpa = memory.guest_start().wrapping_add(ring);
            let iova = driver.map(gpa, buffers - ring, Access::ReadWrite)?;
            Ok(iova.wrapping_sub(ring))
        };
        let ring_bases = (0..layout.vrings().len() as u16).map(map).collect::<Result<_, DmaError>>()?;
        Ok(Self { driver, ring_bases })
    }

    fn base(&self, vring: u16) -> u64 {
        self.ring_bases.get(usize::from(vring)).copied().unwrap_or(0)
    }
}

impl Addressing for PacketMappings {
    type Buffers = BufferMappings;

    fn port(
        &self,
        memory: &OwnerMemory,
        layout: &OwnerLayout,
    ) -> Result<OwnerPort<BufferMappings>, ShmError> {
        let (start, buffers) = (memory.guest_start(), layout.config().ring_size);
        OwnerPort::with_mapping(memory.shared(), layout, |vring| {
            let base = self.base(vring);
            (base, BufferMappings::new(&self.driver, base, start, buffers))
        })
    }

    fn ring_base(&self, _: &OwnerMemory, vring: u16) -> u64 {
        self.base(vring)
    }

    fn iommu(&self) -> Option<&OwnerIommu> {
        Some(self.driver.iommu())
    }
}

/// The offsets of a vring's rings, of its buffers, and of their end: whole pages. A
/// vring that is not there has none.
fn areas(layout: &OwnerLayout, vring: u16) -> (u64, u64, u64) {
    let number = usize::from(vring);
    let Some(at) = layout.vrings().get(number) else { return (0, 0, 0) };
    let config = layout.config();
    let len = u64::from(config.buffer_len) * u64::from(config.ring_size);
    // The layout is inside a memory, hence no wrap.
    (at.places.desc, at.buffers, (at.buffers + len).next_multiple_of(PAGE_SIZE))
}
