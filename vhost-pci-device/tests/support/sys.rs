//! The `unsafe` code of the tests.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use guest_driver_model::shm::SharedMemory;
use vhost_pci_device::{Device, WindowSlot};
use vmm_sys_util::eventfd::EventFd;

/// The descriptor of an eventfd.
pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd owns the descriptor and closes it only on drop, which the borrow prevents.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// The window of a device, in this process: its slots, which lie one after the other. Its user
/// stores only to what the device's table allows.
pub fn window(device: &Arc<Device>, slots: &[WindowSlot]) -> SharedMemory {
    for pair in slots.windows(2) {
        assert_eq!(pair[0].host_address + pair[0].len, pair[1].host_address);
    }
    let base = std::ptr::with_exposed_provenance_mut::<u8>(slots[0].host_address as usize);
    let len: u64 = slots.iter().map(|slot| slot.len).sum();
    // SAFETY: the slots are one range, see above, which stays mapped while the device lives, and the
    // memory keeps that.
    unsafe { SharedMemory::from_raw_parts(NonNull::new(base).unwrap(), len as usize, device.clone()) }
}
