//! The guest's own initialisation code (`guest-driver-model`) starts the device: both sides of the
//! registers are checked against each other.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use guest_driver_model::transport::virtio_pci::{InitError, Place, QueuePages, Registers, start};
use support::guest::{Guest, REGISTERS_AT};
use support::{Bench, HALF, VRINGS};

/// A structure, by the traps of the guest's hypervisor.
struct Structure<'a>(&'a Guest, Place);

impl Structure<'_> {
    fn at(&self, at: u64) -> u64 {
        assert!(at < self.1.len);
        REGISTERS_AT + self.1.offset + at
    }

    fn load<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.load(self.at(at), &mut bytes);
        bytes
    }
}

impl Registers for Structure<'_> {
    fn read8(&self, at: u64) -> u8 {
        u8::from_le_bytes(self.load(at))
    }
    fn read16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.load(at))
    }
    fn read32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.load(at))
    }
    fn write8(&self, at: u64, value: u8) {
        self.0.store(self.at(at), &value.to_le_bytes());
    }
    fn write16(&self, at: u64, value: u16) {
        self.0.store(self.at(at), &value.to_le_bytes());
    }
    fn write32(&self, at: u64, value: u32) {
        self.0.store(self.at(at), &value.to_le_bytes());
    }
}

/// Addresses that the device never looks at.
fn pages() -> QueuePages {
    QueuePages { pages: vec![0x10_0000; QueuePages::pages_for(VRINGS + 1)] }
}

#[test]
fn the_projects_driver_starts_the_device_with_interrupts_and_without() {
    let bench = Bench::new();
    bench.guest.enable();
    bench.guest.enable_msix();
    let found = bench.guest.capabilities();
    let common = Structure(&bench.guest, found.structures.common);
    let device = Structure(&bench.guest, found.structures.device);
    // As many vectors as queues; one for all; none.
    for (vectors, irqfds) in [(VRINGS + 1, usize::from(VRINGS) + 1), (1, usize::from(VRINGS) + 1), (0, 0)] {
        let started = start(&common, &device, found.window.len, &pages(), vectors).unwrap();
        assert_eq!(started.config.max_vrings.value(), VRINGS);
        assert_eq!(started.notify_offsets, [0, 1, 2]);
        bench.broker.wait_until_started(VRINGS + 1);
        assert_eq!(bench.vmm.registered(), (irqfds, usize::from(VRINGS) + 1));
        bench.guest.notify(2);
        assert_eq!(bench.broker.kicks(2), 1);
        bench.guest.set_status(0);
        bench.broker.wait_until_stopped();
    }
}

#[test]
fn the_projects_driver_refuses_more_vectors_than_there_are_and_leaves_the_device_reset() {
    let bench = Bench::new();
    bench.guest.enable();
    let found = bench.guest.capabilities();
    let common = Structure(&bench.guest, found.structures.common);
    let device = Structure(&bench.guest, found.structures.device);
    let error = start(&common, &device, HALF, &pages(), 3).unwrap_err();
    assert!(matches!(error, InitError::Config(_)), "a window that is too short");
    assert_eq!(bench.guest.status(), 0);
    assert_eq!(bench.vmm.registered(), (0, 0));
}
