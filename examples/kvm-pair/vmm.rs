//! What the device needs of its VMM, for KVM: memory slots, irqfds with their routes,
//! ioeventfds. This is all that there is to embedding it, besides handing it the guest's
//! accesses (see `bus`) and configuration cycles (see `driver`).

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vhost_pci_device::{BarRange, Held, MsiMessage, Vmm, WindowSlot};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::Bus;
use crate::relay::Relay;
use crate::sys::slots::HostRange;
use crate::vm::{Msi, Vm};

/// The first slot that is not the guest's memory.
const FIRST_SLOT: u32 = 1;
/// Slots for windows.
const SLOTS: usize = 16;

/// The VMM.
pub struct KvmVmm {
    vm: Arc<Vm>,
    bus: Arc<Bus>,
    /// Which slots are taken, and with which part of a window.
    slots: Arc<Mutex<[Option<WindowSlot>; SLOTS]>>,
    /// A process between each eventfd and what is registered, to measure what that costs.
    relay: Option<Relay>,
}

impl KvmVmm {
    /// Of this VM, with this bus.
    pub fn new(vm: Arc<Vm>, bus: Arc<Bus>, relay: Option<Relay>) -> Self {
        Self { vm, bus, slots: Arc::default(), relay }
    }

    /// The parts of the window that the guest sees, in no order.
    pub fn window(&self) -> Vec<WindowSlot> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).iter().flatten().copied().collect()
    }
}

impl Vmm for KvmVmm {
    fn trap(&self, range: BarRange) -> io::Result<Held> {
        self.bus.trap(range)?;
        let bus = Arc::clone(&self.bus);
        Ok(held(move || bus.release(range)))
    }

    fn map(&self, slot: WindowSlot) -> io::Result<Held> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let free = slots.iter().position(Option::is_none).ok_or(io::ErrorKind::StorageFull)?;
        let number = FIRST_SLOT + free as u32;
        self.vm.show(number, slot.address.0, HostRange::of_window(&slot), slot.read_only)?;
        slots[free] = Some(slot);
        drop(slots);
        let (vm, slots) = (Arc::clone(&self.vm), Arc::clone(&self.slots));
        Ok(held(move || {
            // KVM refuses this only for a slot that is not there.
            let _ = vm.show(number, slot.address.0, HostRange::none(), slot.read_only);
            slots.lock().unwrap_or_else(PoisonError::into_inner)[free] = None;
        }))
    }

    fn irqfd(&self, message: MsiMessage, event: &EventFd) -> io::Result<Held> {
        let address = u64::from(message.address_hi) << 32 | u64::from(message.address_lo);
        // Open for as long as it is registered: KVM lets go of an eventfd that nobody has open.
        let (event, joint) = match &self.relay {
            Some(relay) => relay.after(event).map(|joint| (joint.own, Some(joint.held)))?,
            None => (event.try_clone()?, None),
        };
        let gsi = self.vm.add_route(Msi { address, data: message.data })?;
        if let Err(error) = self.vm.add_irqfd(&event, gsi) {
            self.vm.remove_route(gsi);
            return Err(error);
        }
        let vm = Arc::clone(&self.vm);
        Ok(held(move || {
            let _ = vm.remove_irqfd(&event, gsi);
            vm.remove_route(gsi);
            drop(joint);
        }))
    }

    fn ioeventfd(&self, address: GuestAddress, event: &EventFd) -> io::Result<Held> {
        let (event, joint) = match &self.relay {
            Some(relay) => relay.before(event).map(|joint| (joint.own, Some(joint.held)))?,
            None => (event.try_clone()?, None),
        };
        self.vm.add_ioeventfd(&event, address.0)?;
        let vm = Arc::clone(&self.vm);
        Ok(held(move || {
            let _ = vm.remove_ioeventfd(&event, address.0);
            drop(joint);
        }))
    }
}

/// Something that lasts until it is dropped.
pub fn held(undo: impl FnOnce() + Send + Sync + 'static) -> Held {
    Box::new(Undo(Some(undo)))
}

struct Undo<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> Drop for Undo<F> {
    fn drop(&mut self) {
        if let Some(undo) = self.0.take() {
            undo();
        }
    }
}
