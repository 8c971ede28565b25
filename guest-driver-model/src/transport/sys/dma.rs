//! Pages that a device behind an IOMMU may reach.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_TYPE, vfio_iommu_type1_dma_map,
};
use vfio_ioctls::{VfioContainer, VfioError};
use vmm_sys_util::errno::Error;

use crate::shm::SharedMemory;
use crate::translate::Access;

/// `VFIO_IOMMU_MAP_DMA`, which vfio-ioctls has for both directions only.
const MAP_DMA: u64 = nix::request_code_none!(VFIO_TYPE, VFIO_BASE + 13);

/// Pages of this process, or of a BAR that it has mapped, mapped for DMA: taken from the device before
/// they are freed.
pub struct DmaPages {
    container: Arc<VfioContainer>,
    iova: u64,
    /// `None`: taken from the device already.
    pages: Option<SharedMemory>,
}

impl DmaPages {
    /// Lets the devices of `container` reach `pages` at `iova`: read them, write them,
    /// or both.
    ///
    /// # Errors
    /// What the kernel answers to the mapping.
    pub fn new(
        container: Arc<VfioContainer>,
        iova: u64,
        pages: SharedMemory,
        access: Access,
    ) -> Result<Self, VfioError> {
        let flag = |wanted, flag| if access.allows(wanted) { flag } else { 0 };
        let map = vfio_iommu_type1_dma_map {
            argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
            flags: flag(Access::READ, VFIO_DMA_MAP_FLAG_READ) | flag(Access::WRITE, VFIO_DMA_MAP_FLAG_WRITE),
            vaddr: pages.address(),
            iova,
            size: pages.len(),
        };
        // SAFETY: the request's number and structure belong together, and the kernel only
        // reads the structure. `pages` keeps the range mapped and nobody has a reference into it,
        // and this value keeps `pages` until the DMA mapping is undone (see `unmap`),
        // so the device never reaches memory that has become something else.
        match unsafe { libc::ioctl(container.as_raw_fd(), MAP_DMA, &raw const map) } {
            0 => Ok(Self { container, iova, pages: Some(pages) }),
            _ => Err(VfioError::IommuDmaMap(Error::last())),
        }
    }

    /// Takes the pages from the device, and says how that went. The platform's IOMMU has
    /// forgotten them when this returns.
    ///
    /// # Errors
    /// What the kernel answers; the pages then stay what they are for ever.
    pub fn unmap(mut self) -> Result<(), VfioError> {
        self.take()
    }

    fn take(&mut self) -> Result<(), VfioError> {
        let Some(pages) = self.pages.take() else {
            return Ok(());
        };
        let unmapped = self.container.vfio_dma_unmap(self.iova, pages.len() as usize);
        if unmapped.is_err() {
            // The device may still reach the pages: they must stay what they are.
            std::mem::forget(pages);
        }
        unmapped
    }
}

impl Drop for DmaPages {
    fn drop(&mut self) {
        // Whoever wants to know calls `unmap`.
        let _ = self.take();
    }
}
