//! INVALIDATE is answered when the peer has lost the range, and at once if it never had it.

use vhost_pci_device::abi;
use vhost_pci_switch::link::message::{Reply, WindowOp};
use vhost_pci_switch::link::{Effect, Side};

use super::owner_vmm::{BEHIND, BUFFERS, Kind, RO, RW};
use super::page_table::PAGE;
use super::peer_driver::Outcome;
use crate::bench::{Bench, TIMEOUT, config};
use crate::front_end::Ask;
use crate::vmm::{Kind as Held, Manner, kind};

/// A bench in which the first two pages of buffers are in the window.
fn mapped(strict: bool) -> Bench {
    let mut bench = Bench::iommu_with(config(), Kind::Asked, strict);
    bench.guest_maps(0..4, RW);
    for page in [0, 2] {
        let map = bench.map(BUFFERS + page * PAGE, PAGE, 3);
        assert_eq!(bench.status(map), abi::CTRL_OK);
    }
    bench.forget();
    bench
}

#[test]
fn an_invalidation_of_what_is_not_shown_is_answered_at_once_and_changes_nothing_in_the_window() {
    for strict in [false, true] {
        let mut bench = mapped(strict);
        let fetch = bench.fetch(BUFFERS + PAGE, 64);
        assert!(bench.copies(fetch));
        bench.forget();
        for (iova, len) in [(BUFFERS + PAGE, PAGE), (BUFFERS + 500 * PAGE, PAGE), (8, 1)] {
            bench.guest_unmaps(iova, len);
            assert!(matches!(bench.owner_reply, Some(Reply::Done)));
        }
        assert!(!bench.trace.iter().any(|effect| matches!(effect, Effect::Window(..))));
        let fetch = bench.fetch(BUFFERS + PAGE, 64);
        assert_eq!(bench.status(fetch), abi::CTRL_DENIED);
    }
}

#[test]
fn an_invalidation_of_a_shown_range_waits_for_unmap_and_witness() {
    let mut bench = mapped(false);
    bench.guest_unmaps(BUFFERS, PAGE);
    assert!(bench.owner_reply.is_none());
    assert!(!bench.shows(BUFFERS) && bench.held(BUFFERS));
    let generation = bench.published.1;
    // Answered, not done: the witness tells.
    while bench.step(Manner::AnswersFirst) {}
    assert!(bench.owner_reply.is_none());
    bench.vmm.catch_up();
    bench.look();
    assert!(matches!(bench.owner_reply, Some(Reply::Done)));
    assert!(!bench.held(BUFFERS) && bench.held(BUFFERS + 2 * PAGE));
    assert_eq!(bench.published.1, generation, "the link stays as it is");
    assert!(bench.is_up());
    let unmapped: Vec<_> = bench
        .trace
        .iter()
        .filter_map(|effect| match effect {
            Effect::Window(_, WindowOp::Unmap(content)) => Some(kind(content)),
            _ => None,
        })
        .collect();
    assert_eq!(unmapped, [Held::Owner, Held::Witness]);
}

#[test]
fn an_invalidation_with_a_strict_vmm_waits_for_its_word_alone() {
    let mut bench = mapped(true);
    bench.guest_unmaps(BUFFERS, PAGE);
    assert!(bench.owner_reply.is_none());
    assert!(bench.step(Manner::Honest));
    assert!(matches!(bench.owner_reply, Some(Reply::Done)));
    assert!(!bench.held(BUFFERS));
    let changes = bench.trace.iter().filter(|effect| matches!(effect, Effect::Window(..))).count();
    assert_eq!(changes, 1, "no witness is changed");
    assert!(!bench.step(Manner::Honest));
}

#[test]
fn the_table_loses_a_range_before_its_unmap_is_asked_for() {
    for strict in [false, true] {
        let mut bench = mapped(strict);
        bench.guest_unmaps(BUFFERS, PAGE);
        let place = |wanted: &dyn Fn(&Effect) -> bool| bench.trace.iter().position(wanted).unwrap();
        let table = place(&|effect| matches!(effect, Effect::PublishTable(..)));
        let unmap = place(&|effect| matches!(effect, Effect::Window(_, WindowOp::Unmap(_))));
        assert!(table < unmap);
    }
}

#[test]
fn an_invalidation_of_a_part_takes_the_whole_of_what_it_touches() {
    let mut bench = Bench::iommu();
    bench.shared.table.map(BUFFERS, 16 * PAGE, BEHIND, RW);
    let map = bench.map(BUFFERS, 16 * PAGE, 3);
    assert_eq!(bench.status(map), abi::CTRL_OK);
    bench.owner(Ask::Invalidate(BUFFERS + 5 * PAGE + 7, 1));
    bench.work();
    assert!(bench.owner_reply.is_some());
    assert!(!bench.held(BUFFERS));
}

#[test]
fn an_invalidation_of_everything_may_be_told_in_any_way() {
    for (iova, size) in [(0, 0), (0, u64::MAX), (0, 1 << 63), (0, 1 << 40), (BUFFERS, u64::MAX)] {
        let mut bench = mapped(false);
        bench.owner(Ask::Invalidate(iova, size));
        bench.work();
        assert!(matches!(bench.owner_reply, Some(Reply::Done)), "{iova:#x} {size:#x}");
        assert!(!bench.held(BUFFERS) && !bench.held(BUFFERS + 2 * PAGE));
    }
}

#[test]
fn an_invalidated_range_can_be_mapped_again_elsewhere() {
    let mut bench = mapped(false);
    for round in 1..20 {
        bench.guest_unmaps(BUFFERS, PAGE);
        bench.work();
        assert!(bench.owner_reply.is_some());
        bench.shared.table.map(BUFFERS, PAGE, BEHIND + round * 0x8000, RW);
        let map = bench.map(BUFFERS, PAGE, 3);
        assert_eq!(bench.status(map), abi::CTRL_OK);
    }
    assert_eq!(bench.vmm.owner_ranges().count(), bench.shown().len());
}

#[test]
fn a_map_that_waits_is_not_granted_after_its_range_was_unmapped() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RW);
    let map = bench.map(BUFFERS, PAGE, 3);
    while bench.answer_miss() {}
    assert!(bench.commands.outcome(map).is_none(), "the VMM has not mapped it yet");
    bench.guest_unmaps(BUFFERS, PAGE);
    assert!(bench.owner_reply.is_none(), "a map is on its way");
    assert_eq!(bench.status(map), abi::CTRL_DENIED);
    assert!(bench.owner_reply.is_some());
    assert!(!bench.held(BUFFERS));
}

#[test]
fn a_peer_that_does_not_give_a_range_back_is_disconnected_and_the_owner_unanswered() {
    let mut bench = mapped(false);
    bench.guest_unmaps(BUFFERS, PAGE);
    bench.wait(TIMEOUT);
    assert!(!bench.is_connected(Side::Peer));
    assert!(bench.owner_reply.is_none());
    bench.wait(TIMEOUT);
    assert!(!bench.is_connected(Side::Owner));
    assert!(bench.owner_reply.is_none());
}

#[test]
fn a_paused_peer_holds_up_an_invalidation_of_what_it_has_and_no_other() {
    let mut bench = mapped(false);
    bench.peer_stops(false);
    bench.guest_unmaps(BUFFERS + PAGE, PAGE);
    assert!(bench.owner_reply.is_some(), "the peer never had it");
    bench.guest_unmaps(BUFFERS, PAGE);
    assert!(bench.owner_reply.is_none());
    bench.vmm.reset();
    bench.look();
    assert!(bench.owner_reply.is_some());
}

#[test]
fn an_update_that_changes_what_is_behind_a_shown_range_takes_it_away() {
    let mut bench = mapped(false);
    bench.shared.table.unmap(BUFFERS, PAGE);
    bench.shared.table.map(BUFFERS, PAGE, BEHIND + 0x20_000, RW);
    bench.owner(Ask::Update(BUFFERS, PAGE, BEHIND + 0x20_000, RW));
    bench.work();
    assert!(!bench.held(BUFFERS));
    let map = bench.map(BUFFERS, PAGE, 3);
    assert_eq!(bench.status(map), abi::CTRL_OK);
}

#[test]
fn a_copy_that_waits_is_denied_when_its_page_goes() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..2, RO);
    let fetch = bench.fetch(BUFFERS + 4000, 200);
    assert!(bench.answer_miss(), "the first page is known now");
    bench.guest_unmaps(BUFFERS, PAGE);
    assert!(matches!(bench.owner_reply, Some(Reply::Done)));
    assert_eq!(bench.outcome(fetch), Outcome::Status(abi::CTRL_DENIED));
}
