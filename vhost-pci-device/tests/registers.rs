//! The PCI function's registers as a guest meets them.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use proptest::prelude::{any, prop, proptest};
use proptest::strategy::Strategy;
use proptest::test_runner::Config;
use support::broker::Features;
use support::guest::{REGISTERS_AT, WINDOW_AT};
use support::{Bench, HALF, VRINGS};
use vm_memory::GuestAddress;

#[test]
fn the_function_is_found_and_sized_and_its_structures_lie_in_its_bars() {
    let bench = Bench::new();
    let guest = &bench.guest;
    assert_eq!(guest.config32(0), 0x1066_1af4);
    assert_eq!(guest.config32(8), 0x00ff_0001, "class of virtio-pci, revision 1");
    assert_eq!(guest.config32(0x3c) >> 8 & 0xff, 0, "no interrupt pin");
    let lens = guest.size_bars();
    assert_eq!([lens[0], lens[2]], [32 << 10, 2 * HALF]);
    assert_eq!(guest.device.bars().map(|bar| (bar.bar, bar.len)), [(0, 32 << 10), (2, 2 * HALF)]);
    let found = guest.capabilities();
    assert_eq!((found.window.bar, found.window.offset, found.window.len), (2, 0, 2 * HALF));
    assert_eq!(found.structures.notify_off_multiplier, 4);
    let flags = guest.config32(guest.msix()) >> 16;
    assert_eq!(flags, u32::from(VRINGS) + 1, "a vector a queue, and one for the configuration, less 1");
    let express = guest.capability(0x10);
    assert_ne!(guest.config32(express + 4) & 1 << 28, 0, "function-level reset");
}

#[test]
fn bars_are_placed_when_decoding_is_on_and_move_and_go() {
    let bench = Bench::new();
    let (guest, vmm) = (&bench.guest, &bench.vmm);
    guest.device.assign_bar(0, GuestAddress(REGISTERS_AT));
    assert!(vmm.traps().is_empty(), "no decoding yet");
    guest.enable();
    assert_eq!(vmm.traps().iter().map(|trap| trap.address.0).collect::<Vec<_>>(), [REGISTERS_AT, WINDOW_AT]);
    let slots = vmm.slots();
    assert_eq!(slots.iter().map(|slot| slot.read_only).collect::<Vec<_>>(), [true, false, true]);
    let end = slots.iter().fold(WINDOW_AT, |at, slot| {
        assert_eq!(slot.address.0, at);
        assert_eq!(slot.host_address - slots[0].host_address, at - WINDOW_AT);
        at + slot.len
    });
    assert_eq!(end, WINDOW_AT + 2 * HALF);

    guest.device.assign_bar(2, GuestAddress(2 * WINDOW_AT));
    assert_eq!(vmm.slots()[0].address.0, 2 * WINDOW_AT);
    assert_eq!((vmm.slots().len(), vmm.traps().len()), (3, 2));
    // On top of the other BAR, and outside what the guest has: nowhere.
    for address in [REGISTERS_AT, 1 << 50] {
        guest.device.assign_bar(2, GuestAddress(address));
        assert_eq!((vmm.slots().len(), vmm.traps().len()), (0, 1));
    }
    guest.device.assign_bar(2, GuestAddress(WINDOW_AT));
    assert_eq!(vmm.slots().len(), 3);
    guest.device.config_write(4, &0_u16.to_le_bytes());
    assert_eq!((vmm.slots().len(), vmm.traps().len()), (0, 0));
}

#[test]
fn a_window_of_2_gib_is_placed_at_odd_multiples_of_its_length() {
    let len = 2 << 30;
    let bench = Bench::with(Features { window_len: len, config_window_len: len, ..Features::default() });
    bench.guest.enable();
    for address in [0x10_8000_0000, 0x11_0000_0000, 0x8000_0000] {
        bench.guest.device.assign_bar(0, GuestAddress(0x6000_0000));
        bench.guest.device.assign_bar(2, GuestAddress(address));
        assert_eq!(bench.vmm.slots().len(), 3, "{address:#x}");
        assert_eq!(bench.vmm.slots()[0].address.0, address);
    }
}

#[test]
fn a_bar_that_has_no_place_has_no_notifications_there() {
    let bench = Bench::started();
    assert_eq!(bench.vmm.registered().1, usize::from(VRINGS) + 1);
    // On top of the window, and outside what the guest has: refused.
    for address in [WINDOW_AT, 1 << 50] {
        bench.guest.device.assign_bar(0, GuestAddress(address));
        assert_eq!((bench.vmm.traps().len(), bench.vmm.registered().1), (1, 0), "{address:#x}");
    }
    bench.guest.device.assign_bar(0, GuestAddress(REGISTERS_AT));
    assert_eq!(bench.vmm.registered().1, usize::from(VRINGS) + 1);
}

#[test]
fn without_decoding_a_bar_reads_as_ones_and_takes_nothing() {
    let bench = Bench::new();
    let device = &bench.guest.device;
    let mut data = [0; 4];
    device.bar_read(0, 20, &mut data);
    assert_eq!(data, [0xff; 4]);
    device.bar_write(0, 22, &[1, 0]);
    bench.guest.enable();
    device.bar_read(0, 22, &mut data[..2]);
    assert_eq!(data[..2], [0, 0]);
}

#[test]
fn the_config_access_capability_reaches_the_registers() {
    let bench = Bench::new();
    let (guest, device) = (&bench.guest, &bench.guest.device);
    // The fifth kind of virtio capability, by its own list walk.
    let mut at = (guest.config32(0x34) & 0xff) as u16;
    while guest.config32(at) as u8 != 9 || guest.config32(at) >> 24 != 5 {
        at = (guest.config32(at) >> 8 & 0xff) as u16;
    }
    let access = |bar: u8, offset: u32, len: u32| {
        device.config_write(at + 4, &[bar]);
        guest.set_config32(at + 8, offset);
        guest.set_config32(at + 12, len);
    };
    access(0, 18, 2);
    assert_eq!(guest.config32(at + 16), u32::from(VRINGS) + 1, "num_queues");
    access(0, 20, 1);
    device.config_write(at + 16, &[3]);
    assert_eq!(guest.config32(at + 16), 3, "device_status");
    for (bar, offset, len) in [(0, 21, 4), (0, 20, 3), (0, 20, 0), (1, 20, 1), (9, 20, 1), (2, 0, 4)] {
        access(bar, offset, len);
        device.config_write(at + 16, &[0xff; 4]);
    }
    access(0, 20, 1);
    assert_eq!(guest.config32(at + 16), 3, "nothing of that was an access");
    access(0, u32::MAX - 3, 4);
    assert_eq!(guest.config32(at + 16), 0);
}

#[test]
fn the_device_configuration_is_the_brokers_and_cannot_be_written() {
    let bench = Bench::new();
    bench.guest.enable();
    let device = &bench.guest.device;
    device.bar_write(0, 0x2000, &[0; 64]);
    let mut bytes = [0; 64];
    device.bar_read(0, 0x2000, &mut bytes);
    assert_eq!(bytes, support::config_bytes());
}

#[test]
fn reset_by_flr_leaves_a_function_as_it_was_made() {
    let bench = Bench::new();
    let image = || {
        let mut bytes = [0; 256];
        bench.guest.device.config_read(0, &mut bytes);
        bytes
    };
    let fresh = image();
    bench.start();
    bench.guest.flr();
    assert_eq!(image(), fresh);
    assert!(bench.vmm.traps().is_empty() && bench.vmm.slots().is_empty());
    assert_eq!(bench.vmm.registered(), (0, 0));
    bench.start();
}

#[derive(Clone, Debug)]
enum Access {
    ConfigRead(u16, usize),
    ConfigWrite(u16, Vec<u8>),
    BarRead(u8, u64, usize),
    BarWrite(u8, u64, Vec<u8>),
}

fn data() -> impl Strategy<Value = Vec<u8>> {
    // Half of the bytes are such that something happens.
    prop::collection::vec(prop::sample::select(vec![0, 1, 2, 3, 8, 15, 16, 0x80, 0xff]), 1..9)
}

fn offset() -> impl Strategy<Value = u64> {
    proptest::prop_oneof![
        8 => 0_u64..0x60,
        2 => 0x3000_u64..0x3020,
        4 => 0x4000_u64..0x4050,
        1 => 0x5000_u64..0x5010,
        1 => any::<u64>(),
    ]
}

fn access() -> impl Strategy<Value = Access> {
    let config = proptest::prop_oneof![8 => 0_u16..0x110, 1 => any::<u16>()];
    proptest::prop_oneof![
        1 => (config.clone(), 0_usize..9).prop_map(|(at, len)| Access::ConfigRead(at, len)),
        2 => (config, data()).prop_map(|(at, data)| Access::ConfigWrite(at, data)),
        1 => (any::<u8>(), offset(), 0_usize..9).prop_map(|(bar, at, len)| Access::BarRead(bar % 4, at, len)),
        4 => (offset(), data()).prop_map(|(at, data)| Access::BarWrite(0, at, data)),
    ]
}

proptest! {
    #![proptest_config(Config { cases: 64, failure_persistence: None, ..Config::default() })]

    #[test]
    fn whatever_a_guest_does_the_function_stays_and_starts_afterwards(
        accesses in prop::collection::vec(access(), 1..200)
    ) {
        let bench = Bench::new();
        let device = &bench.guest.device;
        bench.guest.enable();
        for access in accesses {
            match access {
                Access::ConfigRead(at, len) => device.config_read(at, &mut vec![0; len]),
                Access::ConfigWrite(at, data) => device.config_write(at, &data),
                Access::BarRead(bar, at, len) => device.bar_read(bar, at, &mut vec![0; len]),
                Access::BarWrite(bar, at, data) => device.bar_write(bar, at, &data),
            }
            assert_eq!(bench.guest.config32(0), 0x1066_1af4);
            assert!(bench.vmm.slots().len() == 3 || bench.vmm.slots().is_empty());
        }
        bench.guest.flr();
        assert_eq!(bench.vmm.registered(), (0, 0));
        bench.start();
    }
}
