//! MAP, FETCH and STORE, each answered as the device's specification says.

use std::time::Duration;

use vhost_pci_device::abi;
use vhost_pci_switch::config::{LinkConfig, OneWay};
use vhost_pci_switch::link::{Effect, Side};

use super::owner_vmm::{BEHIND, BUFFERS, Kind, RO, RW, WO};
use super::page_table::PAGE;
use super::peer_driver::Outcome;
use crate::bench::{Bench, TIMEOUT, config};
use crate::front_end::Ask;

#[test]
fn fetch_needs_permission_to_read_and_store_to_write() {
    let mut bench = Bench::iommu();
    for (page, perm) in [(0, RO), (1, WO), (2, RW)] {
        bench.guest_maps(page..page + 1, perm);
        let iova = BUFFERS + page * PAGE;
        let fetch = bench.fetch(iova + 16, 100);
        let store = bench.store(iova + 16, 100);
        let fetched = bench.outcome(fetch);
        let stored = bench.outcome(store);
        let denied = Outcome::Status(abi::CTRL_DENIED);
        assert_eq!(fetched != denied, perm & RO != 0, "{fetched:?}");
        assert_eq!(stored != denied, perm & WO != 0, "{stored:?}");
        assert!(!bench.held(iova));
    }
    let counters = bench.report().counters;
    assert_eq!(counters.faults.get("vring"), None);
}

#[test]
fn a_copy_goes_over_all_pages_that_it_touches() {
    let mut bench = Bench::iommu();
    bench.shared.table.map(BUFFERS, PAGE, BEHIND, RO);
    bench.shared.table.map(BUFFERS + PAGE, PAGE, BEHIND + 8 * PAGE, RO);
    bench.shared.table.map(BUFFERS + 2 * PAGE, 2 * PAGE, 4 << 20, RO);
    let fetch = bench.fetch(BUFFERS + 4000, 10_000);
    let Outcome::Copied(pieces) = bench.outcome(fetch) else { panic!("denied") };
    let lens: Vec<_> = pieces.iter().map(|piece| piece.len).collect();
    assert_eq!(lens, [96, 4096, 10_000 - 4192]);
}

#[test]
fn a_copy_into_a_page_that_is_not_mapped_is_denied_whole() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RW);
    for iova in [BUFFERS + 4000, BUFFERS - 50] {
        let fetch = bench.fetch(iova, 200);
        let store = bench.store(iova, 200);
        assert_eq!(bench.status(fetch), abi::CTRL_DENIED);
        assert_eq!(bench.status(store), abi::CTRL_DENIED);
    }
}

#[test]
fn requests_with_fields_that_are_not_allowed_are_invalid() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..64, RW);
    let request = |command: u16, iova: u64, len: u64, flags: u32| abi::ControlRequest {
        command: command.into(),
        value: iova.into(),
        len: len.into(),
        flags: flags.into(),
        ..Default::default()
    };
    let copy = u64::from(abi::MAX_COPY);
    let cases = [
        (request(abi::CTRL_MAP, BUFFERS, 0, 3), 0, 0),
        (request(abi::CTRL_MAP, BUFFERS, PAGE, 0), 0, 0),
        (request(abi::CTRL_MAP, BUFFERS, PAGE, 4), 0, 0),
        (request(abi::CTRL_MAP, BUFFERS, PAGE, u32::MAX), 0, 0),
        (request(abi::CTRL_MAP, BUFFERS, abi::MAX_MAP + 1, 3), 0, 0),
        (request(abi::CTRL_MAP, u64::MAX, 2, 3), 0, 0),
        (request(abi::CTRL_FETCH, BUFFERS, 0, 0), 9, 9),
        (request(abi::CTRL_FETCH, BUFFERS, 10, 0), 9, 9),
        (request(abi::CTRL_FETCH, BUFFERS, copy + 1, 0), copy + 1, copy + 1),
        (request(abi::CTRL_FETCH, u64::MAX - 4, 9, 0), 9, 9),
        (request(abi::CTRL_STORE, BUFFERS, 10, 0), 9, 10),
        (request(abi::CTRL_STORE, BUFFERS, u64::MAX, 0), u64::MAX, 0),
        (request(abi::CTRL_STORE, BUFFERS, copy + 1, 0), copy + 1, copy + 1),
    ];
    for (request, readable, writable) in cases {
        let id = bench.gives_raw(&request, readable, writable);
        assert_eq!(bench.commands.outcome(id), Some(&Outcome::Status(abi::CTRL_INVALID)), "{request:?}");
    }
    assert!(bench.misses_asked().is_empty());
}

#[test]
fn map_of_read_write_memory_is_answered_when_the_link_page_shows_it() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..3, RW);
    let id = bench.map(BUFFERS + 100, 2 * PAGE, 3);
    let generation = (bench.published.1, bench.table_generation);
    bench.settle();
    assert_eq!(bench.commands.outcome(id), Some(&Outcome::Status(abi::CTRL_OK)));
    assert!((0..3).all(|page| bench.shows(BUFFERS + page * PAGE)));
    assert_eq!(bench.published.1, generation.0, "the link goes on as it is");
    assert!(bench.table_generation > generation.1);
    let place = |wanted: &dyn Fn(&Effect) -> bool| bench.trace.iter().position(wanted).unwrap();
    let shown = place(&|effect| matches!(effect, Effect::PublishTable(mappings, _) if mappings.len() > 2));
    let answered = place(&|effect| matches!(effect, Effect::Answer(_, abi::CTRL_OK, true)));
    assert!(shown < answered);
    assert!(!bench.trace.iter().any(|effect| matches!(effect, Effect::NotifyPeer(_))));
    // Again: at once.
    let id = bench.map(BUFFERS, 3 * PAGE, 3);
    assert_eq!(bench.commands.outcome(id), Some(&Outcome::Status(abi::CTRL_OK)));
}

#[test]
fn map_of_what_is_allowed_in_one_direction_says_copy_and_maps_nothing() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RO);
    bench.guest_maps(1..2, WO);
    for (page, access) in [(0, 1), (1, 2)] {
        let id = bench.map(BUFFERS + page * PAGE, 64, access);
        assert_eq!(bench.status(id), abi::CTRL_COPY);
    }
    for (page, access) in [(0, 2), (1, 1), (0, 3), (1, 3), (2, 1)] {
        let id = bench.map(BUFFERS + page * PAGE, 64, access);
        assert_eq!(bench.status(id), abi::CTRL_DENIED);
    }
    assert!((0..3).all(|page| !bench.held(BUFFERS + page * PAGE)));
}

#[test]
fn widen_maps_what_is_allowed_in_one_direction_and_the_table_says_what_is_allowed() {
    let config = LinkConfig { one_way: OneWay::Widen, ..config() };
    let mut bench = Bench::iommu_with(config, Kind::Asked, false);
    assert_eq!(bench.published.0.status & abi::LINK_S_COPY, 0);
    bench.guest_maps(0..1, RO);
    bench.guest_maps(1..2, WO);
    for (page, access) in [(0, 1), (1, 2)] {
        let id = bench.map(BUFFERS + page * PAGE, 64, access);
        assert_eq!(bench.status(id), abi::CTRL_OK);
        let entry =
            bench.published.0.mappings.iter().find(|entry| entry.iova.value() == BUFFERS + page * PAGE);
        assert_eq!(entry.unwrap().access.value(), access);
    }
    let id = bench.map(BUFFERS, 64, 2);
    assert_eq!(bench.status(id), abi::CTRL_DENIED);
    assert!(bench.report().window.widened);
}

#[test]
fn widen_shows_a_vring_to_read_and_write_that_was_mapped_to_read_before() {
    let config = LinkConfig { one_way: OneWay::Widen, ..config() };
    let mut bench = Bench::with(config);
    bench.iommu_owner(Kind::Asked);
    for index in 0..2 {
        bench.shared.table.map(super::owner_vmm::RINGS + PAGE * index, PAGE, PAGE * index, RW);
    }
    bench.start_ring(0, super::owner_vmm::ring_in(super::owner_vmm::RINGS));
    bench.peer_up();
    bench.settle();
    let id = bench.map(super::owner_vmm::RINGS + PAGE, 64, 1);
    assert_eq!(bench.status(id), abi::CTRL_OK);
    bench.start_ring(1, super::owner_vmm::ring_in(super::owner_vmm::RINGS + PAGE));
    // The bench sees to it that an enabled vring is in entries to read and write.
    bench.settle();
    assert_eq!(bench.published.0.vrings[1].flags.value(), abi::VRING_F_ENABLED);
}

#[test]
fn a_page_that_a_miss_read_proved_is_never_stored_to_because_an_update_said_more() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RO);
    let fetch = bench.fetch(BUFFERS, 64);
    assert!(bench.copies(fetch));
    for _ in 0..50 {
        let store = bench.store(BUFFERS, 64);
        assert_eq!(bench.status(store), abi::CTRL_DENIED);
        let map = bench.map(BUFFERS, 64, 3);
        assert_eq!(bench.status(map), abi::CTRL_DENIED);
        bench.wait(Duration::from_millis(100));
    }
    assert!(!bench.held(BUFFERS));
}

#[test]
fn many_denials_are_limited_and_the_limit_ends() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RW);
    let mut busy = 0;
    for _ in 0..1000 {
        let fetch = bench.fetch(BUFFERS + 100 * PAGE, 64);
        busy += u64::from(bench.status(fetch) == abi::CTRL_BUSY);
    }
    assert!((900..1000).contains(&busy), "{busy}");
    // What is known is served all the while; what is not waits for its turn.
    let fetch = bench.fetch(super::owner_vmm::RINGS, 64);
    assert!(bench.copies(fetch));
    let fetch = bench.fetch(BUFFERS, 64);
    assert_eq!(bench.status(fetch), abi::CTRL_BUSY);
    bench.wait(Duration::from_secs(2));
    let fetch = bench.fetch(BUFFERS, 64);
    assert!(bench.copies(fetch));
}

#[test]
fn commands_of_a_driver_that_is_not_attached_to_the_present_link_are_stale() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RW);
    let request = abi::ControlRequest {
        command: abi::CTRL_STORE.into(),
        value: BUFFERS.into(),
        len: 64.into(),
        ..Default::default()
    };
    let early = bench.gives_unattached(&request, 64, 64);
    assert_eq!(bench.status(early), abi::CTRL_STALE);
    bench.attaches();
    let store = bench.gives_unattached(&request, 64, 64);
    assert!(bench.copies(store));
    // The owner's device starts again: to its new driver, that page may be another's.
    bench.owner_stops();
    let late = bench.gives_unattached(&request, 64, 64);
    assert_eq!(bench.status(late), abi::CTRL_STALE);
}

#[test]
fn commands_without_a_running_iommu_fail() {
    let mut bench = Bench::up();
    for command in [abi::CTRL_MAP, abi::CTRL_FETCH, abi::CTRL_STORE] {
        let id = bench.gives(command, 0, 64, 3);
        assert_eq!(bench.commands.outcome(id), Some(&Outcome::Status(abi::CTRL_FAILED)));
    }
    let mut bench = Bench::iommu();
    bench.owner_stops();
    let id = bench.fetch(BUFFERS, 64);
    assert_eq!(bench.commands.outcome(id), Some(&Outcome::Status(abi::CTRL_FAILED)));
    bench.leave(Side::Owner);
    let id = bench.fetch(BUFFERS, 64);
    assert_eq!(bench.commands.outcome(id), Some(&Outcome::Status(abi::CTRL_FAILED)));
}

#[test]
fn open_commands_fail_when_the_owner_stops_or_leaves() {
    for leaves in [false, true] {
        let mut bench = Bench::iommu();
        bench.guest_maps(0..4, RW);
        let open = [bench.fetch(BUFFERS, 64), bench.store(BUFFERS + PAGE, 64), bench.map(BUFFERS, PAGE, 3)];
        if leaves {
            bench.leave(Side::Owner);
        } else {
            bench.owner(Ask::Stop(0));
        }
        for id in open {
            assert_eq!(bench.commands.outcome(id), Some(&Outcome::Status(abi::CTRL_FAILED)));
        }
        bench.settle();
        assert_eq!(bench.vmm.owner_ranges().count(), 0);
    }
}

#[test]
fn a_peer_that_resets_gets_no_answer_to_what_it_asked_before() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..4, RW);
    bench.fetch(BUFFERS, 64);
    bench.map(BUFFERS + PAGE, PAGE, 3);
    assert_eq!(bench.commands.open(), 2);
    bench.peer_stops(true);
    bench.peer_starts();
    // An answer to either would panic: the bench's ring is empty.
    for _ in 0..4 {
        bench.settle();
        bench.wait(TIMEOUT);
    }
    assert!(bench.is_up());
    let fetch = bench.fetch(BUFFERS, 64);
    assert!(bench.copies(fetch));
}

#[test]
fn an_owner_that_returns_with_commands_open_starts_afresh() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RW);
    let open = bench.fetch(BUFFERS, 64);
    let old = bench.miss.unwrap();
    bench.leave(Side::Owner);
    assert_eq!(bench.commands.outcome(open), Some(&Outcome::Status(abi::CTRL_FAILED)));
    bench.work();
    bench.iommu_owner(Kind::Asked);
    bench.iommu_rings(Kind::Asked);
    bench.settle();
    assert!(bench.is_up());
    assert!(bench.miss.is_none());
    bench.apply(vhost_pci_switch::link::Event::MissDone(old.0, true));
    let fetch = bench.fetch(BUFFERS, 64);
    assert_eq!(bench.status(fetch), abi::CTRL_DENIED, "this owner maps nothing there");
}
