//! The guest's driver of its IOMMU: finds addresses, and makes the requests. What a
//! kernel's DMA API is made of.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use iommu::virtio_iommu::{Status, parse_properties, wire};
use iommu::{Access, PAGE_SIZE};
use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};
use zerocopy::{FromBytes, IntoBytes};

use super::iommu::{ENDPOINT, OwnerIommu, TellError};
use crate::net::owner::BufferMapping;
use crate::ring::Buffer;

/// The domain of the card.
const DOMAIN: u32 = 1;
/// Room for the answer to a PROBE request: the device's `probe_size`, and the tail.
const PROBE_ROOM: usize = 512 + size_of::<wire::ReqTail>();

/// Why something is not mapped, or not unmapped.
#[derive(Debug, thiserror::Error)]
pub enum DmaError {
    /// The IOMMU refused.
    #[error("the IOMMU refused request {kind}: {status:?}")]
    Refused {
        /// `VIRTIO_IOMMU_T_*`.
        kind: u8,
        /// Its answer; `None` if it gave none.
        status: Option<Status>,
    },
    /// No address is left below 4 GiB.
    #[error("no addresses are left for {len:#x} bytes")]
    NoAddress {
        /// Length that was wanted, bytes.
        len: u64,
    },
    /// It is done, but the broker did not follow.
    #[error(transparent)]
    Told(#[from] TellError),
}

/// The driver. Its clones share the addresses.
#[derive(Clone)]
pub struct IommuDriver {
    iommu: OwnerIommu,
    /// Those below 4 GiB.
    addresses: Arc<Mutex<AddressAllocator>>,
}

impl fmt::Debug for IommuDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IommuDriver").field("iommu", &self.iommu).finish_non_exhaustive()
    }
}

impl IommuDriver {
    /// Attaches the card to a fresh domain.
    ///
    /// # Errors
    /// If the IOMMU refuses.
    pub fn attach(iommu: OwnerIommu) -> Result<Self, DmaError> {
        // Not page 0, in which nobody expects to find anything.
        let mut addresses = AddressAllocator::new(PAGE_SIZE, (1 << 32) - PAGE_SIZE)
            .map_err(|_| DmaError::NoAddress { len: 1 << 32 })?;
        let (answer, _) = iommu.request(wire::ReqProbe::new(ENDPOINT.0).as_bytes(), PROBE_ROOM);
        for reserved in parse_properties(&answer) {
            let (start, len) = (*reserved.range.start(), reserved.range.end() - reserved.range.start() + 1);
            // What is not below 4 GiB is never chosen anyway.
            let _ = addresses.allocate(len, PAGE_SIZE, AllocPolicy::ExactMatch(start));
        }
        let driver = Self { iommu, addresses: Arc::new(Mutex::new(addresses)) };
        driver
            .request(wire::VIRTIO_IOMMU_T_ATTACH, wire::ReqAttach::new(DOMAIN, ENDPOINT.0, 0).as_bytes())?;
        Ok(driver)
    }

    /// The IOMMU.
    pub fn iommu(&self) -> &OwnerIommu {
        &self.iommu
    }

    /// Maps `len` bytes of guest-physical memory at an address that is free: the
    /// highest one below 4 GiB that is a multiple of the length rounded up to a power
    /// of two, as Linux chooses. `gpa` and `len` are whole pages.
    ///
    /// # Errors
    /// If the IOMMU refuses, no address is left, or the broker did not follow.
    pub fn map(&self, gpa: u64, len: u64, access: Access) -> Result<u64, DmaError> {
        let no_address = DmaError::NoAddress { len };
        let alignment = len.checked_next_power_of_two().unwrap_or(1 << 63);
        let found = self.addresses().allocate(len, alignment, AllocPolicy::LastMatch);
        let Ok(range) = found else { return Err(no_address) };
        match self.map_at(range.start(), gpa, len, access) {
            Err(error @ DmaError::Refused { .. }) => {
                let _ = self.addresses().free(&range);
                Err(error)
            }
            done => done.map(|()| range.start()),
        }
    }

    /// Maps `len` bytes of guest-physical memory at `iova`, which the caller keeps
    /// apart from those that [`Self::map`] chooses.
    ///
    /// # Errors
    /// As there.
    pub fn map_at(&self, iova: u64, gpa: u64, len: u64, access: Access) -> Result<(), DmaError> {
        let virt = iova..=iova.wrapping_add(len.wrapping_sub(1));
        // The flags have the bits of an access.
        let request = wire::ReqMap::new(DOMAIN, virt, gpa, access.bits());
        self.request(wire::VIRTIO_IOMMU_T_MAP, request.as_bytes())
    }

    /// Unmaps what one call has mapped. When this returns without an error, neither
    /// the broker nor its peer can reach it. The address is free again in any case.
    ///
    /// # Errors
    /// If the IOMMU refuses, or the broker did not follow.
    pub fn unmap(&self, iova: u64, len: u64) -> Result<(), DmaError> {
        let last = iova.wrapping_add(len.wrapping_sub(1));
        let request = wire::ReqUnmap::new(DOMAIN, iova..=last);
        let done = self.request(wire::VIRTIO_IOMMU_T_UNMAP, request.as_bytes());
        if !matches!(done, Err(DmaError::Refused { .. }))
            && let Ok(range) = RangeInclusive::new(iova, last)
        {
            // One that was not chosen here is not known here.
            let _ = self.addresses().free(&range);
        }
        done
    }

    fn request(&self, kind: u8, bytes: &[u8]) -> Result<(), DmaError> {
        let (answer, told) = self.iommu.request(bytes, size_of::<wire::ReqTail>());
        let tail = wire::ReqTail::read_from_bytes(&answer).ok();
        match tail.and_then(|tail| Status::from_code(tail.status)) {
            Some(Status::Ok) => Ok(told?),
            status => Err(DmaError::Refused { kind, status }),
        }
    }

    fn addresses(&self) -> std::sync::MutexGuard<'_, AddressAllocator> {
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A page-aligned range as it was mapped.
#[derive(Clone, Copy, Debug)]
struct Mapped {
    iova: u64,
    len: u64,
}

/// Maps each buffer of a vring when it is made available, at an address of its own,
/// and unmaps it when it comes back: a kernel in strict mode. Buffers that the device
/// only reads are mapped to read, the others to write.
///
/// The pages that a buffer touches are mapped whole. What the broker does not follow is
/// counted by the IOMMU.
#[derive(Debug)]
pub struct BufferMappings {
    driver: IommuDriver,
    /// What the ring adds to the offsets of buffers.
    ring_base: u64,
    guest_start: u64,
    /// By buffer.
    mapped: Box<[Option<Mapped>]>,
}

impl BufferMappings {
    /// For a ring with this many buffers that adds `ring_base` to their offsets, in
    /// memory at the guest-physical address `guest_start`.
    pub fn new(driver: &IommuDriver, ring_base: u64, guest_start: u64, buffers: u16) -> Self {
        let mapped = vec![None; usize::from(buffers)].into();
        Self { driver: driver.clone(), ring_base, guest_start, mapped }
    }

    fn release(&self, mapped: Mapped) {
        match self.driver.unmap(mapped.iova, mapped.len) {
            // A kernel does not learn of it either, and it was counted.
            Ok(()) | Err(DmaError::Told(_)) => {}
            Err(error) => tracing::error!(iova = mapped.iova, "a buffer cannot be unmapped: {error}"),
        }
    }
}

impl BufferMapping for BufferMappings {
    const ACTIVE: bool = true;

    fn map(&mut self, buffer: u16, piece: Buffer) -> Option<Buffer> {
        let slot = self.mapped.get_mut(usize::from(buffer))?;
        let start = piece.offset & !(PAGE_SIZE - 1);
        let end = piece.offset.checked_add(u64::from(piece.len))?.checked_next_multiple_of(PAGE_SIZE)?;
        let access = if piece.writable { Access::Write } else { Access::Read };
        let (gpa, len) = (self.guest_start.checked_add(start)?, end - start);
        let iova = match self.driver.map(gpa, len, access) {
            Ok(iova) => iova,
            Err(error) => {
                tracing::debug!("a buffer cannot be mapped: {error}");
                return None;
            }
        };
        *slot = Some(Mapped { iova, len });
        let offset = iova.wrapping_add(piece.offset - start).wrapping_sub(self.ring_base);
        Some(Buffer { offset, ..piece })
    }

    fn unmap(&mut self, buffer: u16) {
        if let Some(mapped) = self.mapped.get_mut(usize::from(buffer)).and_then(Option::take) {
            self.release(mapped);
        }
    }
}

impl Drop for BufferMappings {
    fn drop(&mut self) {
        for mapped in std::mem::take(&mut self.mapped).into_iter().flatten() {
            self.release(mapped);
        }
    }
}
