//! What a peer's driver asks for does not hold the owner up, and costs its guest no more
//! faults than are allowed.

use std::time::Duration;

use iommu::Access;
use vhost_pci_device::abi;
use vhost_pci_switch::config::LinkConfig;
use vhost_pci_switch::link::Side;

use super::owner_vmm::{BUFFERS, Kind, RO, RW};
use super::page_table::PAGE;
use crate::bench::{Bench, config};
use crate::front_end::Ask;
use crate::vmm::Manner;

/// Pages that do not touch.
fn page(index: u64) -> u64 {
    BUFFERS + 2 * index * PAGE
}

/// A driver that asks for one more page than the window has room for, again and again,
/// while the owner asks. Gives how long the owner waited.
fn owner_waits(ask: Ask, strict: bool) -> Duration {
    let config = LinkConfig { max_mappings: 102, ..config() };
    let mut bench = Bench::iommu_with(config, Kind::Asked, strict);
    bench.guest_maps(0..250, RW);
    for index in 0..125 {
        let (store, fetch) = (bench.store(page(index), 64), bench.fetch(page(index), 64));
        assert!(bench.copies(store) && bench.copies(fetch));
    }
    for index in 0..100 {
        let map = bench.map(page(index), PAGE, 3);
        assert_eq!(bench.status(map), abi::CTRL_OK);
    }
    let mut next = 100;
    bench.map(page(next), PAGE, 3);
    bench.owner(ask);
    let start = bench.now;
    while bench.question.is_some() {
        next = (next + 1) % 125;
        if bench.commands.open() < 60 {
            bench.map(page(next), PAGE, 3);
        }
        if strict {
            // It answers one request each 5 ms.
            bench.step(Manner::Honest);
            bench.wait(Duration::from_millis(5));
        } else {
            // As QEMU: what it answered takes effect 40 ms later.
            for _ in 0..8 {
                bench.step(Manner::AnswersFirst);
            }
            bench.wait(Duration::from_millis(40));
            bench.vmm.catch_up();
            bench.look();
        }
    }
    assert!(bench.is_connected(Side::Owner) && bench.owner_reply.is_some());
    bench.now - start
}

#[test]
fn evictions_do_not_hold_the_owner_up() {
    for strict in [false, true] {
        let unshown = Ask::Invalidate(page(124), PAGE);
        assert_eq!(owner_waits(unshown, strict), Duration::ZERO);
        let update = Ask::Update(BUFFERS + 0x400_0000, PAGE, 0x10_0000, RW);
        assert_eq!(owner_waits(update, strict), Duration::ZERO);
        // What is shown has to go, and nothing else.
        let longest = Duration::from_millis(if strict { 100 } else { 120 });
        let waited = owner_waits(Ask::Invalidate(page(50), PAGE), strict);
        assert!(waited > Duration::ZERO && waited <= longest, "{waited:?}");
    }
}

#[test]
fn pages_that_last_and_go_one_way_cost_the_owner_no_more_faults_than_are_allowed() {
    let mut bench = Bench::iommu();
    let mut failed = 0;
    for _ in 0..500 {
        bench.guest_maps(0..1, RO);
        for _ in 0..8 {
            let fetch = bench.fetch(BUFFERS, 64);
            failed += bench.misses_asked().iter().filter(|(_, access)| *access == Access::Write).count();
            bench.outcome(fetch);
        }
        bench.guest_unmaps(BUFFERS, PAGE);
    }
    assert!(failed <= 64, "{failed} faults in the owner's guest with no time passing");
}

#[test]
fn an_update_that_allows_less_than_before_takes_the_rest_away() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RW);
    let map = bench.map(BUFFERS, PAGE, 3);
    assert_eq!(bench.status(map), abi::CTRL_OK);
    bench.shared.table.unmap(BUFFERS, PAGE);
    bench.guest_maps(0..1, RO);
    bench.owner(Ask::Update(BUFFERS, PAGE, 0x10_0000, RO));
    assert!(bench.question.is_some(), "answered while the peer can write it");
    bench.work();
    assert!(bench.question.is_none() && !bench.held(BUFFERS));
    let store = bench.store(BUFFERS, 64);
    assert_eq!(bench.status(store), abi::CTRL_DENIED);
}
