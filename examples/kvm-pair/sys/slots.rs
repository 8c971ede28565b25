//! Memory slots: what of a process's memory is a guest's.

use std::io;

use guest_driver_model::owner::OwnerMemory;
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vhost_pci_device::WindowSlot;

/// A range of this process's memory that stays mapped, with something or other, for as long
/// as any VM of the process runs.
///
/// What is mapped there may change; whoever changes it leaves no hole.
#[derive(Clone, Copy, Debug)]
pub struct HostRange {
    start: u64,
    len: u64,
}

impl HostRange {
    /// The memory of a guest, whose owner keeps it until its VM is gone.
    pub fn of_memory(memory: &OwnerMemory) -> Self {
        Self { start: memory.front_end_address(), len: memory.len() }
    }

    /// A part of the device's window, which the device keeps mapped for as long as the slot is
    /// there.
    pub fn of_window(slot: &WindowSlot) -> Self {
        Self { start: slot.host_address, len: slot.len }
    }

    /// No range: takes a slot away.
    pub fn none() -> Self {
        Self { start: 0, len: 0 }
    }
}

/// Shows the range to the guest at `guest_start`, in the slot of this number. `read_only`: a
/// store of the guest leaves it, as to an address at which nothing is.
///
/// # Errors
/// What KVM answers.
pub fn show(vm: &VmFd, slot: u32, guest_start: u64, range: HostRange, read_only: bool) -> io::Result<()> {
    let region = kvm_userspace_memory_region {
        slot,
        flags: if read_only { KVM_MEM_READONLY } else { 0 },
        guest_phys_addr: guest_start,
        memory_size: range.len,
        userspace_addr: range.start,
    };
    // SAFETY: a `HostRange` is a guest's memory, which lives as long as its VM and is touched by
    // atomics and raw copies only, or a part of the window, of which the device promises that it
    // stays mapped until the slot is taken away, and which nobody of this process touches.
    unsafe { vm.set_user_memory_region(region) }.map_err(|error| io::Error::from_raw_os_error(error.errno()))
}
