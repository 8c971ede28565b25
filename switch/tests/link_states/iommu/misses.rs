//! Misses that are answered late, twice, wrongly, or never.

use std::time::Duration;

use iommu::Access;
use vhost_pci_device::abi;
use vhost_pci_switch::link::message::{IotlbMessage, MissId, Reply};
use vhost_pci_switch::link::{Effect, Event, Side};

use super::owner_vmm::{BEHIND, BUFFERS, Kind, RINGS, RO, RW, WO, ring_in};
use super::page_table::PAGE;
use super::peer_driver::Outcome;
use crate::bench::{Bench, TIMEOUT};
use crate::front_end::{Ask, FRONTEND};

#[test]
fn a_miss_that_is_never_answered_fails_the_command_in_time_and_is_not_repeated() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..2, RW);
    let first = bench.fetch(BUFFERS, 64);
    let second = bench.fetch(BUFFERS + PAGE, 64);
    bench.wait(TIMEOUT - Duration::from_millis(1));
    assert_eq!(bench.commands.open(), 2);
    bench.wait(Duration::from_millis(1));
    for id in [first, second] {
        assert_eq!(bench.commands.outcome(id), Some(&Outcome::Status(abi::CTRL_FAILED)));
    }
    let asked = bench.trace.iter().filter(|effect| matches!(effect, Effect::Miss(..))).count();
    assert_eq!(asked, 1);
    // The late answer is taken, and harmless.
    let fetch = bench.fetch(BUFFERS, 64);
    assert!(bench.copies(fetch));
    assert_eq!(bench.link.deadline(), None);
}

#[test]
fn a_probe_that_is_never_answered_does_not_make_the_link_spin() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..2, RW);
    // One page whose both directions are proven, and that lasts; then one to be probed.
    for _ in 0..4 {
        for id in [bench.fetch(BUFFERS, 64), bench.store(BUFFERS, 64)] {
            assert!(bench.copies(id));
        }
    }
    for _ in 0..8 {
        let fetch = bench.fetch(BUFFERS + PAGE, 64);
        bench.work();
        if bench.commands.outcome(fetch).is_none() {
            bench.settle();
        }
    }
    assert!(bench.miss.is_some(), "the other direction of the second page is asked for");
    bench.wait(Duration::from_millis(200));
    bench.wait(Duration::from_secs(5));
    assert!(bench.link.deadline().is_none_or(|deadline| deadline > bench.now));
    bench.settle();
    bench.wait(Duration::from_millis(200));
    bench.settle();
    assert!(bench.shows(BUFFERS) && bench.shows(BUFFERS + PAGE));
}

#[test]
fn answers_to_other_misses_change_nothing() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RW);
    let fetch = bench.fetch(BUFFERS, 64);
    let (id, page, access) = bench.miss.unwrap();
    assert_eq!((page.raw(), access), (BUFFERS, Access::Read));
    for other in [0, id.0 - 1, id.0 + 1, u64::MAX] {
        bench.apply(Event::MissDone(MissId(other), false));
        bench.apply(Event::MissDone(MissId(other), true));
    }
    assert_eq!(bench.commands.open(), 1);
    assert!(bench.copies(fetch));
    bench.apply(Event::MissDone(id, false));
    bench.apply(Event::MissDone(id, true));
    let again = bench.fetch(BUFFERS, 64);
    assert!(bench.copies(again));
}

#[test]
fn an_update_of_another_page_proves_nothing() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..2, RW);
    let fetch = bench.fetch(BUFFERS, 64);
    bench.owner(Ask::Update(BUFFERS + PAGE, PAGE, BEHIND + PAGE, RW));
    assert!(matches!(bench.owner_reply, Some(Reply::Done)));
    assert_eq!(bench.commands.open(), 1);
    // The VMM says that it told, and did not: it is asked again, though not for ever.
    for _ in 0..8 {
        let id = bench.miss.take().unwrap().0;
        bench.apply(Event::MissDone(id, true));
        assert_eq!(bench.commands.open(), 1);
    }
    let id = bench.miss.take().unwrap().0;
    bench.apply(Event::MissDone(id, true));
    assert_eq!(bench.commands.outcome(fetch), Some(&Outcome::Status(abi::CTRL_DENIED)));
    let other = bench.fetch(BUFFERS + PAGE, 64);
    assert!(bench.commands.outcome(other).is_none(), "it is asked for, as nothing is known");
}

#[test]
fn an_update_with_less_than_was_asked_for_proves_no_more_than_it_says() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, WO);
    let fetch = bench.fetch(BUFFERS, 64);
    bench.owner(Ask::Update(BUFFERS, PAGE, BEHIND, WO));
    let id = bench.miss.take().unwrap().0;
    bench.apply(Event::MissDone(id, true));
    assert!(bench.trace.iter().any(|effect| matches!(effect, Effect::AccessFail(..))));
    assert_eq!(bench.status(fetch), abi::CTRL_DENIED);
}

#[test]
fn an_update_answers_a_miss_before_the_miss_is_answered() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RO);
    let fetch = bench.fetch(BUFFERS, 64);
    bench.owner(Ask::Update(BUFFERS, PAGE, BEHIND, RW));
    assert!(matches!(bench.commands.outcome(fetch), Some(Outcome::Copied(_))));
    // And proves no writing, though the miss is still open.
    let store = bench.store(BUFFERS, 64);
    bench.owner(Ask::Update(BUFFERS, PAGE, BEHIND, RW));
    assert_eq!(bench.commands.outcome(store), None);
    let id = bench.miss.take().unwrap().0;
    bench.apply(Event::MissDone(id, true));
    assert_eq!(bench.miss.map(|miss| miss.2), Some(Access::Write));
    assert_eq!(bench.status(store), abi::CTRL_DENIED);
}

#[test]
fn an_invalidation_between_update_and_answer_is_no_denial() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RW);
    // Two pages are needed, so that the command still waits when its first page goes.
    bench.guest_maps(1..2, RW);
    let fetch = bench.fetch(BUFFERS + 4000, 200);
    bench.owner(Ask::Update(BUFFERS, PAGE, BEHIND, RW));
    // The guest flushed more than it unmapped.
    bench.owner(Ask::Invalidate(BUFFERS, 4 * PAGE));
    bench.work();
    let id = bench.miss.take().unwrap().0;
    bench.apply(Event::MissDone(id, true));
    assert!(bench.copies(fetch), "it is asked for again");
    assert_eq!(bench.faults("vring"), 0);
}

#[test]
fn an_invalidation_while_a_vrings_page_is_asked_for_does_not_refuse_the_vring() {
    let mut bench = Bench::new();
    bench.iommu_owner(Kind::Asked);
    bench.iommu_rings(Kind::Asked);
    bench.peer_up();
    bench.work();
    bench.owner(Ask::Update(RINGS, PAGE, 0, RW));
    bench.owner(Ask::Invalidate(RINGS, PAGE));
    bench.work();
    let id = bench.miss.take().unwrap().0;
    bench.apply(Event::MissDone(id, true));
    bench.settle();
    assert_eq!(bench.faults("vring"), 0);
    assert_eq!(bench.published.0.vrings[0].flags.value(), abi::VRING_F_ENABLED);
}

#[test]
fn a_failed_miss_disproves_what_an_update_that_nobody_asked_for_said() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, WO);
    let fetch = bench.fetch(BUFFERS, 64);
    // QEMU tells the pages of used rings by itself when a device starts; here a page that
    // is being asked about at that moment, for the other direction.
    let id = bench.miss.take().unwrap().0;
    bench.apply(Event::MissDone(id, false));
    assert_eq!(bench.commands.outcome(fetch), Some(&Outcome::Status(abi::CTRL_DENIED)));
    let map = bench.map(BUFFERS, 64, 1);
    let id = bench.miss.take().unwrap().0;
    bench.shared.table.unmap(BUFFERS, PAGE);
    bench.shared.table.map(BUFFERS, PAGE, BEHIND, RO);
    bench.owner(Ask::Update(BUFFERS, PAGE, BEHIND, RW));
    bench.shared.table.unmap(BUFFERS, PAGE);
    bench.apply(Event::MissDone(id, false));
    assert_eq!(bench.status(map), abi::CTRL_COPY, "answered before the miss was");
    let fetch = bench.fetch(BUFFERS, 64);
    assert_eq!(bench.status(fetch), abi::CTRL_DENIED, "nothing is known of it any more");
}

#[test]
fn an_answer_to_a_miss_of_before_a_stop_proves_nothing_after_it() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, WO);
    // A miss to write is open when the device stops, and starts again.
    let store = bench.store(BUFFERS, 64);
    let old = bench.miss.unwrap().0;
    for index in 0..2 {
        bench.owner(Ask::Stop(index));
        bench.work();
    }
    assert_eq!(bench.commands.outcome(store), Some(&Outcome::Status(abi::CTRL_FAILED)));
    for index in 0..2 {
        bench.owner(Ask::Kick(index));
        bench.owner(Ask::Enable(index, true));
    }
    // The driver now reads the page; the old miss's update arrives.
    let fetch = bench.fetch(BUFFERS, 64);
    bench.owner(Ask::Update(BUFFERS, PAGE, BEHIND, RW));
    assert_eq!(bench.commands.outcome(fetch), None, "an update for writing let it read");
    if bench.miss.is_some_and(|miss| miss.0 == old) {
        bench.miss = None;
    }
    bench.apply(Event::MissDone(old, true));
    // The link comes up meanwhile: what was asked before belongs to another.
    assert_eq!(bench.status(fetch), abi::CTRL_STALE);
    let fetch = bench.fetch(BUFFERS, 64);
    assert_eq!(bench.status(fetch), abi::CTRL_DENIED);
    assert!(bench.is_up());
}

#[test]
fn a_device_that_starts_and_stops_in_a_loop_is_asked_no_more_than_it_answers() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RW);
    bench.fetch(BUFFERS, 64);
    // The bench panics at a second miss while one is open.
    for _ in 0..100 {
        for index in 0..2 {
            bench.owner(Ask::Stop(index));
            bench.work();
        }
        for index in 0..2 {
            bench.owner(Ask::Kick(index));
            bench.owner(Ask::Enable(index, true));
        }
        bench.work();
    }
    bench.settle();
    assert!(bench.is_up());
}

#[test]
fn a_new_back_end_channel_is_asked_what_the_old_one_was() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RW);
    let fetch = bench.fetch(BUFFERS, 64);
    bench.miss = None;
    bench.owner(Ask::Channel);
    assert!(bench.miss.is_some());
    assert!(bench.copies(fetch));
}

#[test]
fn messages_that_cannot_be_taken_are_declined_and_counted() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RW);
    let known = bench.fetch(BUFFERS, 64);
    assert!(bench.copies(known));
    let message = |iova: u64, size: u64, guest: u64, perm: u8, kind: u8| IotlbMessage {
        iova,
        size,
        frontend: FRONTEND.wrapping_add(guest),
        perm,
        kind,
    };
    let bad = [
        message(BUFFERS, 0, BEHIND, RW, IotlbMessage::UPDATE),
        message(BUFFERS + 1, PAGE, BEHIND, RW, IotlbMessage::UPDATE),
        message(BUFFERS, PAGE + 1, BEHIND, RW, IotlbMessage::UPDATE),
        message(BUFFERS, PAGE, BEHIND + 1, RW, IotlbMessage::UPDATE),
        message(BUFFERS, PAGE, BEHIND, 0, IotlbMessage::UPDATE),
        message(BUFFERS, PAGE, BEHIND, 4, IotlbMessage::UPDATE),
        message(BUFFERS, PAGE, 3 << 20, RW, IotlbMessage::UPDATE),
        message(BUFFERS, 4 << 20, BEHIND, RW, IotlbMessage::UPDATE),
        message(u64::MAX - PAGE + 1, 2 * PAGE, BEHIND, RW, IotlbMessage::UPDATE),
        message(BUFFERS, u64::MAX, BEHIND, RW, IotlbMessage::UPDATE),
        message(BUFFERS, PAGE, u64::MAX, RW, IotlbMessage::UPDATE),
        message(BUFFERS, PAGE, BEHIND, RW, IotlbMessage::MISS),
        message(BUFFERS, PAGE, BEHIND, RW, IotlbMessage::ACCESS_FAIL),
        message(BUFFERS, PAGE, BEHIND, RW, 0),
        message(BUFFERS, PAGE, BEHIND, RW, 255),
    ];
    for (count, bad) in (1..).zip(bad) {
        bench.iotlb(bad);
        assert!(matches!(bench.owner_reply, Some(Reply::Declined)), "{bad:x?}");
        assert_eq!(bench.faults("iommu"), count);
    }
    assert!(bench.is_connected(Side::Owner) && bench.is_up());
    // What was known is known still: no miss.
    let known = bench.fetch(BUFFERS, 64);
    assert!(matches!(bench.commands.outcome(known), Some(Outcome::Copied(_))));
}

#[test]
fn a_vring_is_asked_for_while_commands_wait() {
    let mut bench = Bench::iommu();
    bench.guest_maps(0..1, RO);
    bench.shared.table.map(RINGS + 4 * PAGE, PAGE, 0x8000, RW);
    bench.owner(Ask::Stop(1));
    bench.settle();
    bench.start_ring(1, ring_in(RINGS + 4 * PAGE));
    let fetch = bench.fetch(BUFFERS, 64);
    bench.settle();
    assert!(bench.shows(RINGS + 4 * PAGE));
    assert_eq!(bench.status(fetch), abi::CTRL_STALE, "the link has one vring more");
    let fetch = bench.fetch(BUFFERS, 64);
    assert!(bench.copies(fetch));
}
