//! A front-end that pushes: what it pushed is mapped, and nothing else is.

use std::time::Duration;

use vhost_pci_device::abi;
use vhost_pci_switch::link::Side;
use vhost_pci_switch::link::message::Reply;

use super::owner_vmm::{BEHIND, BUFFERS, Kind, RINGS, RO, RW, WO};
use super::page_table::PAGE;
use crate::bench::{Bench, REGIONS, config};
use crate::front_end::Ask;

fn pushing() -> Bench {
    Bench::iommu_with(config(), Kind::Pushes, false)
}

fn done(bench: &Bench) -> bool {
    matches!(bench.owner_reply, Some(Reply::Done))
}

fn refused(bench: &Bench) -> bool {
    matches!(bench.owner_reply, Some(Reply::Declined))
}

#[test]
fn mappings_that_were_pushed_before_the_kick_bring_the_link_up_without_a_miss() {
    let bench = pushing();
    assert!(bench.shows(RINGS) && bench.shows(RINGS + PAGE));
    assert_eq!(bench.report().counters.iotlb_misses, 0);
}

#[test]
fn mappings_that_are_pushed_after_the_kick_bring_the_link_up_too() {
    let mut bench = Bench::new();
    bench.iommu_owner(Kind::Pushes);
    for index in 0..2 {
        bench.start_ring(index, super::owner_vmm::ring_in(RINGS + PAGE * u64::from(index)));
    }
    bench.peer_up();
    bench.settle();
    assert!(!bench.is_up());
    bench.owner(Ask::Push(false, vec![(RINGS, 2 * PAGE, 0, RW)]));
    bench.settle();
    assert!(bench.is_up());
}

#[test]
fn access_is_as_pushed() {
    let mut bench = pushing();
    for (page, perm) in [(0, RO), (1, WO), (2, RW), (3, 0)] {
        if perm != 0 {
            bench.guest_maps(page..page + 1, perm);
        }
        let iova = BUFFERS + page * PAGE;
        let (fetch, store) = (bench.fetch(iova, 64), bench.store(iova, 64));
        assert_eq!(bench.copies(fetch), perm & RO != 0);
        assert_eq!(bench.copies(store), perm & WO != 0);
        let map = bench.map(iova, 64, 3);
        assert_eq!(bench.status(map), if perm == RW { abi::CTRL_OK } else { abi::CTRL_DENIED });
    }
    assert_eq!(bench.report().counters.iotlb_misses, 0);
}

#[test]
fn denials_are_not_limited_as_nobody_is_asked() {
    let mut bench = pushing();
    for _ in 0..500 {
        let fetch = bench.fetch(BUFFERS, 64);
        assert_eq!(bench.status(fetch), abi::CTRL_DENIED);
    }
}

#[test]
fn an_unmap_is_answered_when_the_peer_has_lost_the_range() {
    for strict in [false, true] {
        let mut bench = Bench::iommu_with(config(), Kind::Pushes, strict);
        bench.guest_maps(0..2, RW);
        let map = bench.map(BUFFERS, 2 * PAGE, 3);
        assert_eq!(bench.status(map), abi::CTRL_OK);
        bench.guest_unmaps(BUFFERS, PAGE);
        assert!(bench.owner_reply.is_none());
        bench.work();
        assert!(done(&bench));
        assert!(!bench.held(BUFFERS));
        let fetch = bench.fetch(BUFFERS + PAGE, 64);
        assert!(bench.copies(fetch));
    }
}

#[test]
fn a_message_at_fault_changes_nothing_wherever_its_fault_is() {
    let good = [(BUFFERS + 16 * PAGE, PAGE, BEHIND, RW), (BUFFERS, PAGE, 0, 0)];
    let bad = [
        (BUFFERS + 16 * PAGE, PAGE, BEHIND, RW),
        (BUFFERS + 3 * PAGE, 2 * PAGE, BEHIND, RO),
        (BUFFERS + 2 * PAGE, 3 * PAGE, 0, 0),
        (BUFFERS + 5 * PAGE, PAGE, 0, 0),
        (BUFFERS + 32 * PAGE, 0, BEHIND, RW),
        (BUFFERS + 32 * PAGE, PAGE, BEHIND, 4),
        (BUFFERS + 32 * PAGE, PAGE, BEHIND + 1, RW),
        (BUFFERS + 32 * PAGE + 1, PAGE, BEHIND, RW),
        (BUFFERS + 32 * PAGE, PAGE - 1, BEHIND, RW),
        (BUFFERS + 32 * PAGE, PAGE, 3 << 20, RW),
        (BUFFERS + 32 * PAGE, 4 << 20, BEHIND, RW),
        (u64::MAX - PAGE + 1, 2 * PAGE, BEHIND, RW),
        (u64::MAX, 2, 0, 0),
        (BUFFERS, 0, 0, 0),
    ];
    for reset in [false, true] {
        for bad in bad {
            if reset && [3, 2, 5].iter().any(|page| bad.0 == BUFFERS + page * PAGE) {
                continue;
            }
            let mut bench = pushing();
            bench.owner(Ask::Push(
                false,
                vec![(BUFFERS, PAGE, BEHIND, RW), (BUFFERS + 4 * PAGE, 2 * PAGE, BEHIND, RO)],
            ));
            let map = bench.map(BUFFERS, PAGE, 3);
            assert_eq!(bench.status(map), abi::CTRL_OK);
            bench.forget();
            let mut entries = good.to_vec();
            entries.push(bad);
            bench.owner(Ask::Push(reset, entries));
            assert!(refused(&bench), "{bad:x?}");
            assert_eq!(bench.faults("iommu"), 1);
            assert!(bench.is_up() && bench.shows(BUFFERS), "{bad:x?}");
            bench.work();
            assert!(
                bench
                    .trace
                    .iter()
                    .all(|effect| { !matches!(effect, vhost_pci_switch::link::Effect::Window(..)) })
            );
            // As it was: the bench knows what may be fetched.
            for (iova, known) in [(BUFFERS, true), (BUFFERS + 5 * PAGE, true), (BUFFERS + 16 * PAGE, false)] {
                let fetch = bench.fetch(iova, 64);
                assert_eq!(bench.copies(fetch), known);
            }
        }
    }
}

#[test]
fn a_reset_forgets_all_that_the_message_does_not_map_again() {
    let mut bench = pushing();
    bench.guest_maps(0..3, RW);
    let map = bench.map(BUFFERS, 3 * PAGE, 3);
    assert_eq!(bench.status(map), abi::CTRL_OK);
    bench.owner(Ask::Push(true, vec![(RINGS, 2 * PAGE, 0, RW), (BUFFERS + PAGE, PAGE, BEHIND + PAGE, RW)]));
    assert!(bench.owner_reply.is_none());
    bench.settle();
    assert!(done(&bench));
    assert!(bench.is_up() && !bench.held(BUFFERS));
    let fetch = bench.fetch(BUFFERS + PAGE, 64);
    assert!(bench.copies(fetch));
    let fetch = bench.fetch(BUFFERS, 64);
    assert_eq!(bench.status(fetch), abi::CTRL_DENIED);
}

#[test]
fn an_unmap_and_a_map_of_the_same_place_in_one_message_take_the_old_away() {
    let mut bench = pushing();
    bench.guest_maps(0..1, RW);
    let map = bench.map(BUFFERS, PAGE, 3);
    assert_eq!(bench.status(map), abi::CTRL_OK);
    bench.owner(Ask::Push(false, vec![(BUFFERS, PAGE, 0, 0), (BUFFERS, PAGE, BEHIND + 0x4_0000, RO)]));
    bench.work();
    assert!(done(&bench) && !bench.held(BUFFERS));
    let fetch = bench.fetch(BUFFERS, 64);
    assert!(bench.copies(fetch));
}

#[test]
fn an_unmap_may_be_larger_than_all_that_is_mapped() {
    let mut bench = pushing();
    bench.guest_maps(0..3, RW);
    bench.owner(Ask::Push(false, vec![(0, u64::MAX - PAGE + 1, 0, 0)]));
    bench.work();
    assert!(done(&bench));
    assert_eq!(bench.vmm.owner_ranges().count(), 0);
    assert!(!bench.is_up());
}

#[test]
fn no_more_are_kept_than_the_limit_and_room_comes_back() {
    let mut bench = pushing();
    let mut pushed = 2;
    let at = |index: u64| (BUFFERS + 2 * index * PAGE, PAGE, BEHIND, RO);
    let mut index = 0;
    while pushed < 131_072 {
        let count = (131_072 - pushed).min(64);
        // Past the bench's own table, which copies itself each time.
        bench.owner_raw(Ask::Push(false, (index..index + count).map(at).collect()).request(&bench.files));
        assert!(done(&bench), "{pushed}");
        index += count;
        pushed += count;
    }
    bench.owner_raw(Ask::Push(false, vec![at(index)]).request(&bench.files));
    assert!(refused(&bench));
    bench.owner_raw(Ask::Push(false, vec![(at(0).0, PAGE, 0, 0), at(index)]).request(&bench.files));
    assert!(done(&bench));
    let fetch = bench.fetch(at(0).0, 64);
    assert_eq!(bench.status(fetch), abi::CTRL_DENIED);
    bench.owner(Ask::Push(true, vec![(RINGS, 2 * PAGE, 0, RW)]));
    bench.settle();
    assert!(done(&bench));
}

#[test]
fn the_table_outlives_a_vring_that_stops_while_another_runs() {
    let mut bench = pushing();
    bench.guest_maps(0..1, RW);
    bench.owner(Ask::Stop(1));
    bench.settle();
    assert_eq!(bench.vmm.owner_ranges().count(), 0);
    bench.owner(Ask::Kick(1));
    bench.settle();
    assert!(bench.is_up());
    let fetch = bench.fetch(BUFFERS, 64);
    assert!(bench.copies(fetch));
}

#[test]
fn the_table_is_empty_when_the_last_vring_has_stopped() {
    let mut bench = pushing();
    bench.guest_maps(0..1, RW);
    bench.owner_stops();
    bench.owner(Ask::Push(false, vec![(RINGS, 2 * PAGE, 0, RW)]));
    assert!(done(&bench), "else it would overlap");
    for index in 0..2 {
        bench.owner(Ask::Kick(index));
    }
    bench.settle();
    assert!(bench.is_up());
    let fetch = bench.fetch(BUFFERS, 64);
    assert_eq!(bench.status(fetch), abi::CTRL_DENIED);
}

#[test]
fn a_region_that_leaves_takes_its_mappings_and_room_for_new_ones_is_there() {
    let mut bench = pushing();
    bench.owner(Ask::Push(false, vec![(BUFFERS, PAGE, 4 << 20, RW)]));
    let map = bench.map(BUFFERS, PAGE, 3);
    assert_eq!(bench.status(map), abi::CTRL_OK);
    bench.owner(Ask::RemoveRegion(REGIONS[1]));
    bench.work();
    assert!(done(&bench) && !bench.held(BUFFERS));
    bench.owner(Ask::Push(false, vec![(BUFFERS, PAGE, BEHIND, RW)]));
    assert!(done(&bench));
}

#[test]
fn a_map_that_waits_for_the_window_is_denied_when_its_range_is_unmapped() {
    let mut bench = pushing();
    bench.guest_maps(0..1, RW);
    let map = bench.map(BUFFERS, PAGE, 3);
    bench.guest_unmaps(BUFFERS, PAGE);
    assert_eq!(bench.status(map), abi::CTRL_DENIED);
    assert!(!bench.held(BUFFERS));
}

#[test]
fn what_lasts_is_mapped_without_a_question() {
    let mut bench = pushing();
    bench.guest_maps(0..2, RW);
    bench.guest_maps(2..3, RO);
    for page in 0..3 {
        for _ in 0..10 {
            let fetch = bench.fetch(BUFFERS + page * PAGE, 64);
            assert!(bench.copies(fetch));
        }
    }
    bench.wait(Duration::from_millis(100));
    bench.settle();
    assert!(bench.shown().contains(&(BUFFERS, 2 * PAGE)));
    assert!(!bench.held(BUFFERS + 2 * PAGE));
    assert!(bench.is_connected(Side::Owner));
}
