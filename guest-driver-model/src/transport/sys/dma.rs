//! Pages that a device behind an IOMMU may reach.

use std::sync::Arc;

use vfio_ioctls::{VfioContainer, VfioError};

use super::mapping::MappedRange;

/// Locked pages mapped for DMA, taken from the device before they are freed.
pub struct DmaPages {
    container: Arc<VfioContainer>,
    iova: u64,
    pages: Option<MappedRange>,
}

impl DmaPages {
    /// Lets the devices of `container` reach `pages` at `iova`.
    ///
    /// # Errors
    /// What the kernel answers to the mapping.
    pub fn new(container: Arc<VfioContainer>, iova: u64, pages: MappedRange) -> Result<Self, VfioError> {
        // SAFETY: `pages` owns the range and makes no reference into it, and this
        // value keeps it mapped until the DMA mapping is undone (see `drop`), so
        // the device never reaches memory that has become something else.
        unsafe { container.vfio_dma_map(iova, pages.len(), pages.base().as_ptr()) }?;
        Ok(Self { container, iova, pages: Some(pages) })
    }
}

impl Drop for DmaPages {
    fn drop(&mut self) {
        let Some(pages) = self.pages.take() else {
            return;
        };
        if self.container.vfio_dma_unmap(self.iova, pages.len()).is_err() {
            // The device may still reach the pages: they must stay what they are.
            std::mem::forget(pages);
        }
    }
}
