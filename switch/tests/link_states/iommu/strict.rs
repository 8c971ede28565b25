//! A peer's VMM that keeps SHMEM_STRICT: read-only ranges are mapped, and only for as long
//! as such a VMM is the one that is connected.

use vhost_pci_device::abi;
use vhost_pci_switch::link::Side;

use super::owner_vmm::{BUFFERS, Kind, RINGS, RO, RW, WO, ring_in};
use super::page_table::PAGE;
use crate::bench::{Bench, TIMEOUT, config};

#[test]
fn read_only_memory_is_mapped_read_only_and_write_only_memory_is_copied() {
    let mut bench = Bench::iommu_with(config(), Kind::Asked, true);
    bench.guest_maps(0..1, RO);
    bench.guest_maps(1..2, WO);
    let map = bench.map(BUFFERS, 64, 1);
    assert_eq!(bench.status(map), abi::CTRL_OK);
    let map = bench.map(BUFFERS + PAGE, 64, 2);
    assert_eq!(bench.status(map), abi::CTRL_COPY);
    let held = bench.vmm.owner_ranges().find(|placement| placement.range().iova().start().raw() == BUFFERS);
    assert_eq!(held.unwrap().range().access(), iommu::Access::Read);
    let map = bench.map(BUFFERS, 64, 3);
    assert_eq!(bench.status(map), abi::CTRL_DENIED);
}

#[test]
fn a_range_that_was_mapped_to_read_is_mapped_anew_to_write() {
    let mut bench = Bench::iommu_with(config(), Kind::Asked, true);
    bench.guest_maps(0..1, RW);
    let map = bench.map(BUFFERS, 64, 1);
    assert_eq!(bench.status(map), abi::CTRL_OK);
    let map = bench.map(BUFFERS, 64, 3);
    assert_eq!(bench.status(map), abi::CTRL_OK);
    let entry = bench.published.0.mappings.iter().find(|entry| entry.iova.value() == BUFFERS).unwrap();
    assert_eq!(entry.access.value(), 3);
}

#[test]
fn a_vring_in_a_page_that_was_mapped_to_read_can_be_written() {
    let mut bench = Bench::with(config());
    bench.strict = true;
    bench.iommu_owner(Kind::Asked);
    for index in 0..2 {
        bench.shared.table.map(RINGS + PAGE * index, PAGE, PAGE * index, RW);
    }
    bench.start_ring(0, ring_in(RINGS));
    bench.peer_up();
    bench.settle();
    let map = bench.map(RINGS + PAGE, 64, 1);
    assert_eq!(bench.status(map), abi::CTRL_OK);
    bench.start_ring(1, ring_in(RINGS + PAGE));
    bench.settle();
    assert_eq!(bench.published.0.vrings[1].flags.value(), abi::VRING_F_ENABLED);
    let page = iommu::Iova::new(RINGS + PAGE);
    let held = bench.vmm.owner_ranges().find(|placement| placement.range().iova().contains(page)).unwrap();
    assert_eq!(held.range().access(), iommu::Access::ReadWrite);
}

#[test]
fn what_a_strict_vmm_had_read_only_the_next_one_does_not_get() {
    let mut bench = Bench::iommu_with(config(), Kind::Asked, true);
    bench.guest_maps(0..1, RO);
    let map = bench.map(BUFFERS, 64, 1);
    assert_eq!(bench.status(map), abi::CTRL_OK);
    bench.leave(Side::Peer);
    bench.vmm.dies();
    bench.look();
    bench.strict = false;
    bench.peer_up();
    // The bench judges each map by what the connected VMM enforces.
    for _ in 0..3 {
        bench.settle();
        bench.wait(TIMEOUT);
    }
    assert!(bench.is_up());
    assert!(!bench.held(BUFFERS));
    let map = bench.map(BUFFERS, 64, 1);
    assert_eq!(bench.status(map), abi::CTRL_COPY);
}

#[test]
fn what_was_mapped_read_only_lasts_over_a_restart_of_a_strict_device() {
    let mut bench = Bench::iommu_with(config(), Kind::Asked, true);
    bench.guest_maps(0..1, RO);
    let map = bench.map(BUFFERS, 64, 1);
    assert_eq!(bench.status(map), abi::CTRL_OK);
    bench.peer_stops(true);
    bench.peer_starts();
    for _ in 0..3 {
        bench.settle();
        bench.wait(TIMEOUT);
    }
    assert!(bench.is_up());
    bench.guest_unmaps(BUFFERS, PAGE);
    bench.settle();
    assert!(bench.owner_reply.is_some() && !bench.held(BUFFERS));
}
