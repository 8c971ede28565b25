//! What the device needs from the VMM that embeds it: one trait of four methods, each of
//! which puts something in force until what it returns is dropped.
//!
//! Rules for whoever implements it:
//!
//! - Methods are called by vCPU threads, from within [`Device::config_write`] and
//!   [`Device::bar_write`], and by the device's own threads, with the device's registers
//!   locked. They must not call the device, and must not wait for anybody who may be doing
//!   so; a bus lock of the VMM's must not be held while it calls the device.
//! - They do what they say before they return, and so does the drop of what they return.
//! - An error is for the device to cope with: it never panics on one.
//!
//! [`Device::config_write`]: crate::Device::config_write
//! [`Device::bar_write`]: crate::Device::bar_write

use std::io;

use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// What stays in force until it is dropped: dropping it takes back what the method that
/// returned it did, before the drop returns. Nothing else ever takes it back, so what
/// is no more in force is known by who owns the value.
pub type Held = Box<dyn Send + Sync>;

/// An MSI message: a write of `data` to the address, as the guest programmed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Low half of the address.
    pub address_lo: u32,
    /// High half of the address.
    pub address_hi: u32,
    /// What is written.
    pub data: u32,
    /// Who writes: [`Options::requester_id`](crate::Options::requester_id), which a GIC's
    /// ITS and an interrupt-remapping IOMMU want to know.
    pub requester_id: u32,
}

/// A placed BAR: guest-physical addresses at which accesses are the device's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarRange {
    /// Number of the BAR: what to call [`Device::bar_read`](crate::Device::bar_read) and
    /// [`Device::bar_write`](crate::Device::bar_write) with.
    pub bar: u8,
    /// Where it starts.
    pub address: GuestAddress,
    /// Length, bytes: a power of two.
    pub len: u64,
}

/// A part of the window as a memory slot of the hypervisor: the fields of
/// `kvm_userspace_memory_region` but for the slot's number, which is the VMM's to choose.
///
/// While what [`Vmm::map`] returned lives, `host_address` to `host_address + len` is
/// mapped in this process, never with a hole, and nothing else of the process is ever
/// there: what it shows is changed by `mmap(MAP_FIXED)` underneath. No thread of the VMM's
/// may load or store there itself: a part may be read-only, and may be a file that
/// another VM shortens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowSlot {
    /// Where the guest sees it; a multiple of 4096.
    pub address: GuestAddress,
    /// Length, bytes; a multiple of 4096.
    pub len: u64,
    /// Where it is in this process; a multiple of 4096, and of 2 MiB (1 GiB) where
    /// `address` is one, as far as the part's place in the window allows.
    pub host_address: u64,
    /// The guest may only load: `KVM_MEM_READONLY`. Its stores are accesses to the BAR,
    /// which the device ignores.
    pub read_only: bool,
}

/// What the device needs from its VMM.
pub trait Vmm: Send + Sync {
    /// Puts a BAR at an address: the guest's accesses there go to
    /// [`Device::bar_read`](crate::Device::bar_read) and
    /// [`Device::bar_write`](crate::Device::bar_write), as far as no slot of
    /// [`map`](Self::map) and no eventfd of [`ioeventfd`](Self::ioeventfd) takes them. That
    /// includes stores to read-only slots (`KVM_EXIT_MMIO`).
    ///
    /// The device has two BARs, and places each when the guest enables memory decoding or
    /// moves it; the drop takes it away again.
    ///
    /// # Errors
    /// If something else is there, or the address is none that the guest has. The BAR then
    /// does not answer until the guest moves it.
    fn trap(&self, range: BarRange) -> io::Result<Held>;

    /// Gives the guest a part of the window as memory: `KVM_SET_USER_MEMORY_REGION` with a
    /// free slot, and the same slot with length 0 at the drop. Called for exactly three
    /// parts whenever the window's BAR is placed, and never in between: what the window
    /// shows changes underneath.
    ///
    /// # Errors
    /// If the hypervisor has no slot. The window's BAR then reads as zero.
    fn map(&self, slot: WindowSlot) -> io::Result<Held>;

    /// Makes each signal of the eventfd the MSI, in the kernel: a route for the message
    /// (`KVM_SET_GSI_ROUTING`), then `KVM_IRQFD`; `KVM_IRQFD_FLAG_DEASSIGN` at the drop. The
    /// route must be there before the eventfd is assigned, else a signal is lost.
    ///
    /// A count that is there already makes the interrupt, once. KVM leaves the count; the device takes
    /// it away when this has returned. A hypervisor without irqfds, for which the VMM plays them by
    /// a thread, has to have delivered such a count before.
    ///
    /// Several eventfds may have the same message, which can share a route. The eventfd can
    /// be another VM's: do not write it, do not read it other than by `KVM_IRQFD`, and do not
    /// keep a duplicate past the drop.
    ///
    /// # Errors
    /// What the hypervisor answers: `EBUSY` if the eventfd feeds another interrupt of the
    /// host's.
    fn irqfd(&self, message: MsiMessage, event: &EventFd) -> io::Result<Held>;

    /// Makes each store of the guest to the address, of 1, 2 or 4 bytes and any value, a
    /// signal of the eventfd instead of an exit: `KVM_IOEVENTFD` without datamatch and with
    /// length 0 (where the hypervisor has `KVM_CAP_IOEVENTFD_ANY_LENGTH`, else 2). A store
    /// that comes as an exit nevertheless goes to [`Device::bar_write`](crate::Device::bar_write)
    /// and is not lost.
    ///
    /// # Errors
    /// What the hypervisor answers. The guest's notifications are then exits.
    fn ioeventfd(&self, address: GuestAddress, event: &EventFd) -> io::Result<Held>;
}
