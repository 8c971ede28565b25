//! The vrings of an owner with an IOMMU: their pages are asked for, shown, taken away and
//! brought back.

use iommu::Access;
use vhost_pci_device::abi;
use vhost_pci_switch::link::Side;
use vhost_pci_switch::link::message::Reply;

use super::owner_vmm::{BUFFERS, Kind, RINGS, RO, RW, WO, ring_in};
use super::page_table::PAGE;
use crate::bench::{Bench, config};
use crate::front_end::Ask;

#[test]
fn the_pages_of_vrings_are_asked_for_to_read_and_to_write_before_the_link_is_up() {
    let mut bench = Bench::new();
    bench.iommu_owner(Kind::Asked);
    bench.iommu_rings(Kind::Asked);
    bench.peer_up();
    bench.work();
    assert!(!bench.is_up());
    let asked = bench.misses_asked();
    let pages = [RINGS, RINGS + PAGE];
    let wanted: Vec<_> =
        pages.iter().flat_map(|page| [(*page, Access::Read), (*page, Access::Write)]).collect();
    assert_eq!(asked, wanted);
    assert!(bench.is_up());
    assert!(pages.iter().all(|page| bench.shows(*page)));
    assert_eq!(bench.published.0.status & abi::LINK_S_IOMMU, abi::LINK_S_IOMMU);
    assert_eq!(bench.published.0.status & abi::LINK_S_COPY, abi::LINK_S_COPY);
    assert_eq!(bench.published.0.vrings[1].desc.value(), RINGS + PAGE);
}

#[test]
fn nothing_but_the_vrings_is_shown_unasked() {
    let mut bench = Bench::new();
    bench.iommu_owner(Kind::Asked);
    bench.guest_maps(0..8, RW);
    bench.iommu_rings(Kind::Asked);
    bench.peer_up();
    bench.settle();
    assert!(bench.is_up());
    assert_eq!(bench.shown().iter().map(|(_, len)| len).sum::<u64>(), 2 * PAGE);
    assert!(!bench.held(BUFFERS));
}

#[test]
fn a_vring_that_the_device_may_not_write_is_not_served_and_not_asked_for_again() {
    for perm in [RO, WO] {
        let mut bench = Bench::new();
        bench.iommu_owner(Kind::Asked);
        bench.shared.table.map(RINGS, PAGE, 0, perm);
        bench.start_ring(0, ring_in(RINGS));
        bench.peer_up();
        let asked = bench.misses_asked();
        assert!(asked.len() <= 2, "{asked:x?}");
        assert!(!bench.is_up());
        assert_eq!(bench.faults("vring"), 1);
        bench.wait(std::time::Duration::from_secs(10));
        assert!(bench.misses_asked().is_empty());
        assert!(!bench.held(RINGS));
    }
}

#[test]
fn a_vring_that_was_refused_is_asked_for_again_when_it_is_started_again() {
    let mut bench = Bench::new();
    bench.iommu_owner(Kind::Asked);
    bench.start_ring(0, ring_in(RINGS));
    bench.peer_up();
    bench.settle();
    assert!(!bench.is_up());
    bench.owner(Ask::Stop(0));
    bench.settle();
    bench.shared.table.map(RINGS, PAGE, 0, RW);
    bench.start_ring(0, ring_in(RINGS));
    bench.settle();
    assert!(bench.is_up());
}

#[test]
fn one_vring_is_served_while_the_other_ones_page_is_missing() {
    let mut bench = Bench::new();
    bench.iommu_owner(Kind::Asked);
    bench.shared.table.map(RINGS, PAGE, 0, RW);
    bench.start_ring(0, ring_in(RINGS));
    bench.start_ring(1, ring_in(RINGS + PAGE));
    bench.peer_up();
    bench.settle();
    assert!(bench.is_up());
    let enabled: Vec<_> = bench.published.0.vrings.iter().map(|ring| ring.flags.value()).collect();
    assert_eq!(enabled, [abi::VRING_F_ENABLED, 0]);
}

#[test]
fn a_vring_over_three_pages_that_lie_apart_is_shown_in_three_mappings() {
    let mut bench = Bench::new();
    bench.iommu_owner(Kind::Asked);
    let parts = [RINGS, RINGS - 8 * PAGE, RINGS + 8 * PAGE - 0x1000 * 9];
    for (index, part) in parts.iter().enumerate() {
        bench.shared.table.map(*part, PAGE, 0x4000 * index as u64, RW);
    }
    bench.start_ring(0, parts);
    bench.peer_up();
    bench.settle();
    assert!(bench.is_up());
    assert!(parts.iter().all(|part| bench.shows(*part)));
}

#[test]
fn an_invalidated_vring_page_takes_the_vring_away_before_it_is_unmapped_and_brings_it_back() {
    let mut bench = Bench::iommu();
    let generation = bench.published.1;
    // The guest's mapping stays: its driver flushed more than it unmapped.
    bench.owner(Ask::Invalidate(RINGS, PAGE));
    assert!(bench.owner_reply.is_none(), "the peer has it still");
    assert!(!bench.shows(RINGS));
    assert!(bench.published.1 > generation, "the vring is not there any more");
    assert!(!bench.is_up(), "a vring is waited for");
    assert!(bench.held(RINGS + PAGE), "the other one's page stays");
    bench.settle();
    assert!(matches!(bench.owner_reply, Some(Reply::Done)));
    assert!(bench.shows(RINGS));
    assert_eq!(bench.published.0.vrings[0].flags.value(), abi::VRING_F_ENABLED);
    assert!(bench.faults("vring") == 0);
}

#[test]
fn both_vrings_pages_invalidated_take_the_link_down_and_up_again() {
    let mut bench = Bench::iommu();
    bench.owner(Ask::Invalidate(0, 0));
    assert!(!bench.is_up());
    assert!(bench.wires.is_empty());
    bench.settle();
    assert!(bench.is_up());
    assert_eq!(bench.wires.len(), 4);
}

#[test]
fn a_device_that_stops_loses_everything_and_its_iotlb_is_forgotten() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RW);
    let fetch = bench.fetch(BUFFERS, 64);
    assert!(bench.copies(fetch));
    bench.owner_stops();
    assert!(!bench.is_up());
    assert_eq!(bench.vmm.owner_ranges().count(), 0);
    // Unmapped while nobody is told.
    bench.shared.table.unmap(BUFFERS, PAGE);
    for index in 0..2 {
        bench.owner(Ask::Kick(index));
        bench.owner(Ask::Enable(index, true));
    }
    bench.settle();
    assert!(bench.is_up());
    let fetch = bench.fetch(BUFFERS, 64);
    assert_eq!(bench.status(fetch), abi::CTRL_DENIED);
}

#[test]
fn a_stopped_vring_goes_on_where_its_used_ring_says() {
    let mut bench = Bench::iommu();
    bench.owner(Ask::Stop(1));
    bench.settle();
    let Some(Reply::VringBase(base)) = &bench.owner_reply else { panic!("{:?}", bench.owner_reply) };
    let (_, offset) = base.place.clone().unwrap();
    // The page of vring 1 is the second of the first file; its used ring is at 0x600.
    assert_eq!(offset, PAGE + 0x600 + 2);
}

#[test]
fn a_region_that_leaves_the_memory_table_takes_its_mappings_with_it() {
    let mut bench = Bench::iommu();
    // From the second region, at 4 MiB.
    bench.shared.table.map(BUFFERS, PAGE, 4 << 20, RW);
    let map = bench.map(BUFFERS, PAGE, 3);
    assert_eq!(bench.status(map), abi::CTRL_OK);
    bench.owner(Ask::RemoveRegion(crate::bench::REGIONS[1]));
    bench.shared.table.unmap(BUFFERS, PAGE);
    bench.settle();
    assert!(matches!(bench.owner_reply, Some(Reply::Done)));
    assert!(!bench.held(BUFFERS));
    assert!(bench.is_up(), "the vrings are in the other region");
}

#[test]
fn the_region_of_a_vring_may_leave_and_takes_the_vring_away() {
    let mut bench = Bench::iommu();
    bench.owner(Ask::RemoveRegion(crate::bench::REGIONS[0]));
    bench.work();
    assert!(matches!(bench.owner_reply, Some(Reply::Done)));
    assert!(!bench.is_up());
    assert_eq!(bench.vmm.owner_ranges().count(), 0);
}

#[test]
fn features_cannot_lose_or_gain_the_iommu_while_a_vring_runs() {
    let mut bench = Bench::iommu();
    bench.owner(Ask::Features(crate::front_end::FEATURES));
    assert!(!bench.is_connected(Side::Owner), "vring addresses change their meaning");
    bench.work();
    assert_eq!(bench.vmm.owner_ranges().count(), 0);
    let mut bench = Bench::up();
    bench
        .owner(Ask::Features(crate::front_end::FEATURES | vhost_pci_switch::link::features::ACCESS_PLATFORM));
    assert!(!bench.is_connected(Side::Owner));
    bench.work();
    assert_eq!(bench.vmm.owner_ranges().count(), 0);
}

#[test]
fn an_iommu_without_a_way_to_ask_is_refused_at_the_kick() {
    let mut bench = Bench::with(config());
    bench.connect(Side::Owner);
    let asks = vhost_pci_switch::link::features::PROTOCOL_IOMMU_PUSH;
    bench.owner(Ask::Protocol(crate::front_end::owner_protocol_features() & !asks));
    bench
        .owner(Ask::Features(crate::front_end::FEATURES | vhost_pci_switch::link::features::ACCESS_PLATFORM));
    bench.owner(Ask::MemTable(crate::bench::REGIONS.to_vec()));
    bench.owner(Ask::Num(0, 64));
    bench.owner(Ask::AddrIova(0, ring_in(RINGS)));
    bench.owner(Ask::Kick(0));
    assert!(matches!(&bench.owner_reply, Some(Reply::Refused(reason)) if reason.contains("channel")));
}
