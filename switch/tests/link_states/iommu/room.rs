//! A window with room for few mappings: which go, which stay, and that it ends.

use vhost_pci_device::abi;
use vhost_pci_switch::config::LinkConfig;

use super::owner_vmm::{BUFFERS, Kind, RINGS, RW, ring_in};
use super::page_table::PAGE;
use crate::bench::{Bench, config};

fn with(max_mappings: usize) -> Bench {
    let mut bench = Bench::iommu_with(LinkConfig { max_mappings, ..config() }, Kind::Asked, false);
    bench.guest_maps(0..64, RW);
    bench
}

/// Every second page: no two neighbours.
fn page(index: u64) -> u64 {
    BUFFERS + 2 * index * PAGE
}

#[test]
fn the_range_that_was_asked_for_longest_ago_makes_room() {
    let mut bench = with(5);
    for index in 0..3 {
        let map = bench.map(page(index), PAGE, 3);
        assert_eq!(bench.status(map), abi::CTRL_OK);
    }
    // The first is asked for again: the second is now the oldest.
    let map = bench.map(page(0), PAGE, 3);
    assert_eq!(bench.status(map), abi::CTRL_OK);
    let map = bench.map(page(3), PAGE, 3);
    assert_eq!(bench.status(map), abi::CTRL_OK);
    let shown: Vec<_> = (0..4).map(|index| bench.shows(page(index))).collect();
    assert_eq!(shown, [true, false, true, true]);
    assert!(bench.shows(RINGS) && bench.shows(RINGS + PAGE));
    assert_eq!(bench.shown().len(), 5);
    assert_eq!(bench.report().counters.mappings_evicted, 1);
}

#[test]
fn commands_that_exclude_each_other_are_served_one_after_the_other() {
    let mut bench = with(3);
    let maps: Vec<_> = (0..10).map(|index| bench.map(page(index), PAGE, 3)).collect();
    for map in maps {
        assert_eq!(bench.status(map), abi::CTRL_OK);
    }
    assert_eq!(bench.report().counters.mappings_evicted, 9);
}

#[test]
fn commands_that_wait_for_a_link_that_is_down_do_not_take_turns_in_the_window() {
    let mut bench = with(1);
    bench.guest_unmaps(0, u64::MAX - PAGE + 1);
    bench.guest_maps(0..64, RW);
    bench.gives(abi::CTRL_MAP, page(0), 1, 3);
    bench.gives(abi::CTRL_MAP, page(5), 1, 2);
    bench.gives(abi::CTRL_MAP, page(5), 1, 1);
    loop {
        bench.work();
        if !bench.try_answer_miss() {
            break;
        }
    }
    assert!(!bench.is_up());
    assert!(bench.report().counters.mappings_evicted <= 2);
}

#[test]
fn vrings_are_never_evicted() {
    let mut bench = with(3);
    for index in 0..30 {
        let map = bench.map(page(index), PAGE, 3);
        assert_eq!(bench.status(map), abi::CTRL_OK);
        assert!(bench.shows(RINGS) && bench.shows(RINGS + PAGE));
    }
}

#[test]
fn without_room_map_says_so_and_all_is_as_before() {
    let mut bench = with(2);
    let shown = bench.shown();
    let map = bench.map(page(0), PAGE, 3);
    assert_eq!(bench.status(map), abi::CTRL_NO_ROOM);
    assert_eq!(bench.shown(), shown);
    let fetch = bench.fetch(page(0), 64);
    assert!(bench.copies(fetch));
}

#[test]
fn a_map_of_ranges_that_do_not_fit_together_says_no_room() {
    let mut bench = Bench::iommu_with(LinkConfig { max_mappings: 4, ..config() }, Kind::Asked, false);
    // Neighbours whose memory is apart.
    for index in 0..8 {
        bench.shared.table.map(BUFFERS + index * PAGE, PAGE, 0x10_0000 + index * 0x3000, RW);
    }
    let map = bench.map(BUFFERS, 8 * PAGE, 3);
    assert_eq!(bench.status(map), abi::CTRL_NO_ROOM);
    assert!(bench.shows(RINGS));
    let map = bench.map(BUFFERS, 2 * PAGE, 3);
    assert_eq!(bench.status(map), abi::CTRL_OK);
}

#[test]
fn two_maps_that_exclude_each_other_are_both_answered() {
    let mut bench = with(3);
    let (one, other) = (bench.map(page(0), PAGE, 3), bench.map(page(1), PAGE, 3));
    assert_eq!(bench.status(one), abi::CTRL_OK);
    assert_eq!(bench.status(other), abi::CTRL_OK);
}

#[test]
fn a_window_that_is_too_small_is_no_room() {
    let config = LinkConfig { window_len: (2 << 20) + 16 * PAGE, ..config() };
    let mut bench = Bench::iommu_with(config, Kind::Asked, false);
    bench.guest_maps(0..64, RW);
    let map = bench.map(BUFFERS, 32 * PAGE, 3);
    assert_eq!(bench.status(map), abi::CTRL_NO_ROOM);
    assert!(bench.shows(RINGS));
    for index in 0..20 {
        let map = bench.map(page(index), PAGE, 3);
        assert_eq!(bench.status(map), abi::CTRL_OK, "{index}");
    }
    assert!(bench.shows(RINGS));
}

#[test]
fn a_vring_for_which_there_is_no_room_is_a_fault_and_the_link_goes_on() {
    for max in 1..4 {
        let mut bench = Bench::with(LinkConfig { max_mappings: max, ..config() });
        bench.iommu_owner(Kind::Asked);
        let parts = |ring: u64| [0, 1, 2].map(|part| RINGS - (ring * 3 + part) * 2 * PAGE);
        for ring in 0..2 {
            for (index, part) in parts(ring).into_iter().enumerate() {
                bench.shared.table.map(part, PAGE, 0x2000 * (3 * ring + index as u64), RW);
            }
            bench.start_ring(ring as u32, parts(ring));
        }
        bench.peer_up();
        bench.settle();
        assert_eq!(bench.is_up(), max == 3, "one vring needs three mappings");
        assert_eq!(bench.faults("window_too_small"), if max == 3 { 1 } else { 2 });
        bench.wait(std::time::Duration::from_secs(1));
        assert!(bench.misses_asked().is_empty());
        if max == 3 {
            assert_eq!(bench.published.0.vrings[0].flags.value(), abi::VRING_F_ENABLED);
        }
    }
}

#[test]
fn a_vring_without_room_leaves_a_page_that_it_shares_with_another() {
    let mut bench = Bench::with(LinkConfig { max_mappings: 1, ..config() });
    bench.iommu_owner(Kind::Asked);
    bench.shared.table.map(RINGS, PAGE, 0, RW);
    bench.shared.table.map(RINGS - 4 * PAGE, PAGE, 0x8000, RW);
    bench.start_ring(0, ring_in(RINGS));
    bench.peer_up();
    bench.settle();
    assert!(bench.is_up());
    bench.forget();
    bench.start_ring(1, [RINGS + 0xa00, RINGS + 0xe00, RINGS - 4 * PAGE]);
    bench.settle();
    assert!(bench.is_up());
    let unmapped = bench.trace.iter().any(|effect| {
        matches!(
            effect,
            vhost_pci_switch::link::Effect::Window(_, vhost_pci_switch::link::message::WindowOp::Unmap(_))
        )
    });
    assert!(!unmapped, "the first vring lost its page for a moment");
}
