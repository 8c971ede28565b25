//! Pages that last are mapped: counted copies, the question about the other direction, and
//! neighbours as one.

use std::time::Duration;

use iommu::Access;
use vhost_pci_device::abi;
use vhost_pci_switch::config::{LinkConfig, OneWay};

use super::owner_vmm::{BUFFERS, Kind, RO, RW, WO};
use super::page_table::PAGE;
use crate::bench::{Bench, config};

const COLLECT: Duration = Duration::from_millis(100);

fn copies(bench: &mut Bench, page: u64, times: u32) {
    for _ in 0..times {
        let fetch = bench.fetch(BUFFERS + page * PAGE, 64);
        assert!(bench.copies(fetch));
    }
}

#[test]
fn a_page_that_was_copied_eight_times_is_asked_about_and_then_mapped() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RW);
    copies(&mut bench, 0, 7);
    assert!(bench.misses_asked().is_empty());
    bench.wait(COLLECT * 2);
    assert!(!bench.held(BUFFERS));
    let fetch = bench.fetch(BUFFERS, 64);
    assert_eq!(bench.misses_asked(), [(BUFFERS, Access::Write)]);
    assert!(bench.copies(fetch));
    assert!(!bench.held(BUFFERS), "its neighbours are waited for");
    bench.wait(COLLECT);
    bench.settle();
    assert!(bench.shows(BUFFERS));
    assert_eq!(bench.faults("vring"), 0);
}

#[test]
fn a_page_that_is_stored_to_is_asked_about_for_reading() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RW);
    for _ in 0..8 {
        let store = bench.store(BUFFERS, 64);
        bench.work();
        while bench.miss.is_some_and(|miss| miss.2 == Access::Write) {
            bench.answer_miss();
        }
        assert!(bench.commands.outcome(store).is_some());
    }
    assert_eq!(bench.misses_asked(), [(BUFFERS, Access::Read)]);
    bench.wait(COLLECT);
    bench.settle();
    assert!(bench.shows(BUFFERS));
}

#[test]
fn a_page_that_is_allowed_in_one_direction_is_asked_about_once_and_never_mapped() {
    for perm in [RO, WO] {
        let mut bench = Bench::iommu();
        bench.guest_maps(0..1, perm);
        let mut asked = 0;
        for _ in 0..100 {
            let id = if perm == RO { bench.fetch(BUFFERS, 64) } else { bench.store(BUFFERS, 64) };
            asked += bench.misses_asked().len();
            assert!(bench.copies(id));
            bench.wait(COLLECT);
        }
        assert_eq!(asked, 2, "once for the copy, once for the other direction");
        assert!(!bench.held(BUFFERS));
        assert_eq!(bench.report().counters.faults.get("vring"), None);
    }
}

#[test]
fn an_unmap_between_makes_the_count_start_again() {
    let mut bench = Bench::iommu();
    for _ in 0..10 {
        bench.guest_maps(0..1, RW);
        copies(&mut bench, 0, 7);
        bench.guest_unmaps(BUFFERS, PAGE);
    }
    bench.wait(COLLECT * 2);
    bench.settle();
    assert!(!bench.held(BUFFERS));
    let asked = bench
        .trace
        .iter()
        .filter(|effect| matches!(effect, vhost_pci_switch::link::Effect::Miss(_, _, Access::Write)));
    assert_eq!(asked.count(), 0);
}

#[test]
fn neighbours_that_last_come_into_the_window_as_one_mapping() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..32, RW);
    let before = bench.shown().len();
    for page in 0..32 {
        copies(&mut bench, page, 8);
    }
    bench.wait(COLLECT);
    bench.settle();
    assert!(bench.shown().contains(&(BUFFERS, 32 * PAGE)), "{:x?}", bench.shown());
    assert_eq!(bench.shown().len(), before + 1);
}

#[test]
fn one_page_of_a_merged_mapping_unmapped_takes_all_and_the_rest_can_come_back() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..8, RW);
    for page in 0..8 {
        copies(&mut bench, page, 8);
    }
    bench.wait(COLLECT);
    bench.settle();
    assert!(bench.held(BUFFERS));
    bench.guest_unmaps(BUFFERS + 3 * PAGE, PAGE);
    bench.work();
    assert!(bench.owner_reply.is_some());
    assert!(!bench.held(BUFFERS + 3 * PAGE));
    for page in (0..8).filter(|page| *page != 3) {
        let fetch = bench.fetch(BUFFERS + page * PAGE, 64);
        assert!(bench.copies(fetch));
    }
}

#[test]
fn a_page_that_goes_while_its_neighbours_are_waited_for_is_not_mapped() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..2, RW);
    copies(&mut bench, 0, 8);
    copies(&mut bench, 1, 8);
    bench.guest_unmaps(BUFFERS, PAGE);
    assert!(bench.owner_reply.is_some());
    bench.wait(COLLECT);
    bench.settle();
    assert!(!bench.held(BUFFERS) && bench.held(BUFFERS + PAGE));
}

#[test]
fn a_page_that_goes_while_it_is_asked_about_is_not_mapped() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RW);
    copies(&mut bench, 0, 7);
    bench.fetch(BUFFERS, 64);
    assert!(bench.miss.is_some());
    bench.guest_unmaps(BUFFERS, PAGE);
    bench.settle();
    bench.wait(COLLECT);
    bench.settle();
    assert!(!bench.held(BUFFERS));
    assert_eq!(bench.faults("vring"), 0);
}

#[test]
fn widen_maps_what_lasts_without_a_question() {
    let config = LinkConfig { one_way: OneWay::Widen, ..config() };
    let mut bench = Bench::iommu_with(config, Kind::Asked, false);
    bench.guest_maps(0..1, RO);
    copies(&mut bench, 0, 8);
    bench.wait(COLLECT);
    assert!(bench.misses_asked().is_empty());
    assert!(bench.held(BUFFERS));
    let entry = bench.published.0.mappings.iter().find(|entry| entry.iova.value() == BUFFERS).unwrap();
    assert_eq!(entry.access.value(), 1);
}

#[test]
fn what_lasts_evicts_nothing_and_goes_on_being_copied() {
    let mut bench = Bench::iommu_with(LinkConfig { max_mappings: 4, ..config() }, Kind::Asked, false);
    bench.guest_maps(0..6, RW);
    let map = bench.map(BUFFERS, PAGE, 3);
    assert_eq!(bench.status(map), abi::CTRL_OK);
    let shown = bench.shown();
    for page in [2, 4] {
        copies(&mut bench, page, 10);
    }
    bench.wait(COLLECT);
    bench.settle();
    // Two vrings and page 0: one place is left.
    assert!(shown.iter().all(|entry| bench.shown().contains(entry)));
    assert!(bench.shown().len() <= 4);
    assert_eq!(bench.report().counters.faults.len(), 0);
    copies(&mut bench, 4, 1);
    copies(&mut bench, 2, 1);
}
