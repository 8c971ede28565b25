//! Where the BARs are in the guest's address space: what the VMM has in force for them.

use vm_memory::GuestAddress;

use crate::pci::bar::{Bar, WINDOW_BAR};
use crate::vmm::{BarRange, Held, Vmm, WindowSlot};
use crate::window::Window;

/// A BAR at an address, as far as the VMM let it.
struct Place {
    bar: u8,
    address: GuestAddress,
    // Dropped in this order: memory before the trap beneath it.
    _slots: Vec<Held>,
    trap: Option<Held>,
}

/// All BARs that are somewhere.
#[derive(Default)]
pub struct Places {
    places: Vec<Place>,
    /// The operator was told that there are no slots.
    told: bool,
}

impl Places {
    /// Where a BAR was put, whether the VMM let it or not.
    pub fn at(&self, bar: u8) -> Option<GuestAddress> {
        self.places.iter().find(|place| place.bar == bar).map(|place| place.address)
    }

    /// Where a BAR answers. An address that the VMM refused may be another device's.
    pub fn answering(&self, bar: u8) -> Option<GuestAddress> {
        let mut its = self.places.iter().filter(|place| place.bar == bar && place.trap.is_some());
        its.next().map(|place| place.address)
    }

    /// Puts a BAR at an address or, with `None`, nowhere. What the VMM refuses is told, and tried
    /// again when the BAR moves.
    pub fn put(&mut self, vmm: &dyn Vmm, bar: Bar, address: Option<GuestAddress>, window: &Window) {
        if self.at(bar.number) == address {
            return;
        }
        self.places.retain(|place| place.bar != bar.number);
        let Some(address) = address else { return };
        let range = BarRange { bar: bar.number, address, len: bar.len };
        let trap = vmm.trap(range);
        let slots = match &trap {
            Ok(_) if bar.number == WINDOW_BAR => slots(vmm, address, window),
            _ => Ok(Vec::new()),
        };
        let slots = slots.unwrap_or_else(|error| {
            if !std::mem::replace(&mut self.told, true) {
                tracing::warn!(%error, "the hypervisor has no slots for the window (told once)");
            }
            Vec::new()
        });
        // A guest can do this as often as it likes: no line for the operator's log.
        let trap = trap.inspect_err(|error| tracing::debug!(%error, ?range, "no place for a BAR")).ok();
        self.places.push(Place { bar: bar.number, address, _slots: slots, trap });
    }
}

/// The apertures as memory: all of them or none.
fn slots(vmm: &dyn Vmm, start: GuestAddress, window: &Window) -> std::io::Result<Vec<Held>> {
    let slots = window.apertures().all().map(|aperture| WindowSlot {
        address: GuestAddress(start.0 + aperture.offset),
        len: aperture.len,
        host_address: window.address(aperture.offset),
        read_only: !aperture.writable,
    });
    slots.into_iter().map(|slot| vmm.map(slot)).collect()
}
