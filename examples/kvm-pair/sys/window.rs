//! The window as memory of this process: for a driver that runs in the VMM's process in place
//! of a guest.

use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;

use anyhow::{Context, ensure};
use guest_driver_model::shm::SharedMemory;
use vhost_pci_device::WindowSlot;

/// The window whose parts these are. `device` is what keeps it. The driver stores to its
/// control area only.
///
/// # Errors
/// If they are not one window in one piece.
pub fn memory(
    mut slots: Vec<WindowSlot>,
    device: Arc<dyn Any + Send + Sync>,
) -> anyhow::Result<SharedMemory> {
    slots.sort_by_key(|slot| slot.address);
    let first = *slots.first().context("the window has no parts")?;
    let mut len = 0;
    for slot in &slots {
        let in_place =
            slot.host_address == first.host_address + len && slot.address.0 == first.address.0 + len;
        ensure!(in_place, "the window's parts do not touch: {slots:x?}");
        len += slot.len;
    }
    let base = NonNull::new(first.host_address as *mut u8).context("a window at 0")?;
    // SAFETY: the device keeps the range mapped, without a hole, for as long as it lives. What
    // is shown there are files of fixed length: the broker's, and the owner's, which is of
    // this example and sealed. Stores to read-only parts would fault, but the driver makes none,
    // and all accesses are those of `SharedMemory`.
    Ok(unsafe { SharedMemory::from_raw_parts(base, usize::try_from(len)?, device) })
}
