//! The peer's device is stopped, reset, paused and resumed, and its VMM comes and
//! goes; the owner is never asked anything for it.

use std::time::Duration;

use vhost_pci_device::abi;
use vhost_pci_switch::link::message::{Reply, WindowOp};
use vhost_pci_switch::link::{Effect, Side};

use crate::bench::{Bench, REGIONS, TIMEOUT};
use crate::front_end::Ask;
use crate::vmm::{Kind, Manner, kind};

/// Longer than the time that a restarted device is given to drop what it held.
const GRACE: Duration = Duration::from_millis(300);

fn unmaps(bench: &Bench) -> usize {
    let unmap = |effect: &&Effect| matches!(effect, Effect::Window(_, WindowOp::Unmap(content)) if kind(content) != Kind::Fence);
    bench.trace.iter().filter(unmap).count()
}

#[test]
fn a_stopped_device_leaves_what_it_held_in_question() {
    let mut bench = Bench::up();
    bench.peer_stops(false);
    assert!(!bench.is_up());
    assert_eq!(bench.report().window.phase, "residue");
    assert_eq!(bench.report().window.mappings.len(), 2);
    assert!(bench.wires.is_empty());
    bench.vmm.reset();
    bench.look();
    assert_eq!(bench.report().window.phase, "closed");
    assert_eq!(bench.report().window.mappings.len(), 0);
}

#[test]
fn a_reset_device_that_starts_again_gets_fresh_maps_at_once() {
    let mut bench = Bench::up();
    bench.peer_stops(true);
    bench.peer_starts();
    bench.work();
    assert_eq!(unmaps(&bench), 0, "a reset dropped everything by itself");
    assert!(bench.is_up());
    assert_eq!(bench.vmm.kinds().len(), 3 + REGIONS.len());
}

#[test]
fn a_device_that_is_reset_only_after_it_started_again_gets_fresh_maps() {
    let mut bench = Bench::up();
    bench.peer_stops(false);
    bench.peer_starts();
    assert_eq!(bench.report().window.phase, "reopening");
    bench.vmm.reset();
    bench.look();
    bench.work();
    assert!(bench.is_up());
    assert_eq!(unmaps(&bench), 0);
}

#[test]
fn a_device_that_was_paused_and_goes_on_is_cleared_first() {
    let mut bench = Bench::up();
    bench.peer_stops(false);
    bench.peer_starts();
    bench.work();
    assert!(!bench.is_up());
    assert_eq!(unmaps(&bench), 0, "it may be about to drop it all");
    bench.wait(GRACE);
    assert_eq!(unmaps(&bench), 2 + REGIONS.len(), "the witness stays until the rest is confirmed");
    bench.work();
    let last = bench.trace.iter().rev().find_map(|effect| match effect {
        Effect::Window(_, WindowOp::Unmap(content)) => Some(kind(content)),
        _ => None,
    });
    assert_eq!(last, Some(Kind::Witness), "it stands for all that went before");
    assert_eq!(unmaps(&bench), 3 + REGIONS.len());
    assert!(bench.is_up());
    assert_eq!(bench.vmm.kinds().len(), 3 + REGIONS.len());
    assert!(bench.is_connected(Side::Peer));
}

#[test]
fn a_resumed_vmm_that_keeps_a_range_is_not_believed_gone_when_its_witness_could_go() {
    let mut bench = Bench::up();
    bench.peer_stops(false);
    bench.owner(Ask::Stop(0));
    bench.peer_starts();
    bench.wait(GRACE);
    while bench.step(Manner::Refuses) {}
    bench.look();
    assert!(bench.owner_reply.is_none());
    bench.wait(TIMEOUT);
    assert!(!bench.is_connected(Side::Peer) && bench.owner_reply.is_none());
}

#[test]
fn each_start_resets_the_control_ring_before_anything_is_mapped() {
    let mut bench = Bench::up();
    bench.peer_stops(true);
    bench.peer_starts();
    let reset = bench.trace.iter().position(|effect| matches!(effect, Effect::ResetControlRing));
    let map = bench.trace.iter().position(|effect| matches!(effect, Effect::Window(_, WindowOp::Map(_))));
    assert!(reset.unwrap() < map.unwrap());
}

#[test]
fn an_owners_stop_while_the_peer_is_paused_waits_for_the_peer() {
    let mut bench = Bench::up();
    bench.peer_stops(false);
    bench.owner(Ask::Stop(0));
    assert!(bench.owner_reply.is_none());
    bench.vmm.reset();
    bench.look();
    assert!(matches!(bench.owner_reply, Some(Reply::VringBase(_))));
}

#[test]
fn a_peer_that_stays_paused_loses_its_link_before_the_owner_does() {
    let mut bench = Bench::up();
    bench.peer_stops(false);
    bench.owner(Ask::Stop(0));
    bench.wait(TIMEOUT);
    assert!(!bench.is_connected(Side::Peer));
    assert!(bench.is_connected(Side::Owner) && bench.owner_reply.is_none());
    assert_eq!((bench.report().state.as_str(), bench.faults("window_unconfirmed")), ("failed", 1));
    // Its VMM keeps the window: the owner gets no answer, never a false one.
    bench.wait(TIMEOUT);
    assert!(!bench.is_connected(Side::Owner) && bench.owner_reply.is_none());
}

#[test]
fn a_stop_in_mid_revocation_never_loses_sight_of_what_is_still_held() {
    for steps in 0..8 {
        let mut bench = Bench::up();
        bench.owner(Ask::RemoveRegion(REGIONS[1]));
        for _ in 0..steps {
            bench.step(Manner::Honest);
        }
        bench.peer_stops(false);
        bench.work();
        if bench.question.is_none() {
            // The paused peer still has the region that was not removed.
            assert_eq!(bench.vmm.owner_ranges().count(), 1);
            bench.forget();
            bench.owner(Ask::Stop(0));
            bench.look();
        }
        assert!(bench.owner_reply.is_none(), "after {steps} steps");
        bench.vmm.reset();
        bench.look();
        assert!(bench.owner_reply.is_some(), "after {steps} steps");
        bench.peer_starts();
        bench.work();
        assert!(bench.is_connected(Side::Peer), "after {steps} steps: {:?}", bench.report().reason);
    }
}

#[test]
fn a_stop_while_maps_are_on_their_way_never_loses_sight_of_them() {
    for steps in 0..5 {
        let mut bench = Bench::new();
        bench.connect(Side::Owner);
        bench.owner_up(&REGIONS);
        bench.peer_up();
        for _ in 0..steps {
            bench.step(Manner::Honest);
        }
        bench.peer_stops(false);
        bench.forget();
        bench.owner(Ask::Stop(0));
        bench.look();
        // The VMM takes what it was sent before.
        let answered = bench.owner_reply.is_some();
        bench.work();
        assert!(!answered || bench.vmm.owner_ranges().count() == 0, "after {steps} steps");
        bench.peer_starts();
        bench.wait(GRACE);
        bench.work();
        assert!(bench.owner_reply.is_some());
        assert!(bench.is_connected(Side::Peer), "after {steps} steps: {:?}", bench.report().reason);
    }
}

#[test]
fn a_map_that_arrives_after_the_reset_is_taken_back() {
    for steps in 3..5 {
        let mut bench = Bench::new();
        bench.connect(Side::Owner);
        bench.owner_up(&REGIONS);
        bench.peer_up();
        for _ in 0..steps {
            bench.step(Manner::Honest);
        }
        bench.peer_stops(true);
        bench.owner(Ask::Stop(0));
        bench.work();
        assert!(bench.owner_reply.is_some());
        assert_eq!(bench.vmm.owner_ranges().count(), 0, "after {steps} steps");
    }
}

#[test]
fn a_peer_that_leaves_and_returns_is_given_everything_again_without_the_owner() {
    let mut bench = Bench::up();
    let owner_messages = bench.report().counters.owner_messages;
    for _ in 0..3 {
        bench.leave(Side::Peer);
        assert!(!bench.is_up());
        bench.vmm.dies();
        bench.look();
        bench.peer_up();
        bench.work();
        assert!(bench.is_up());
    }
    assert_eq!(bench.report().counters.owner_messages, owner_messages);
    assert!(!bench.trace.iter().any(|effect| matches!(effect, Effect::Reply(Side::Owner, _))));
    assert_eq!(bench.report().counters.mappings_revoked, 6);
}

#[test]
fn what_a_peer_that_left_may_hold_keeps_the_owner_waiting_and_then_unanswered() {
    let mut bench = Bench::up();
    bench.leave(Side::Peer);
    bench.owner(Ask::Stop(0));
    assert!(bench.owner_reply.is_none());
    bench.wait(2 * TIMEOUT);
    assert!(bench.owner_reply.is_none());
    assert!(!bench.is_connected(Side::Owner));
    assert_eq!(bench.report().state, "failed");
}

#[test]
fn a_new_peer_gets_nothing_while_the_old_one_may_hold_something() {
    let mut bench = Bench::up();
    bench.leave(Side::Peer);
    bench.forget();
    bench.peer_up();
    bench.work();
    let maps =
        bench.trace.iter().filter(|effect| matches!(effect, Effect::Window(_, WindowOp::Map(_)))).count();
    assert_eq!(maps, 0);
    bench.vmm.dies();
    bench.look();
    bench.work();
    assert!(bench.is_up());
}

#[test]
fn generations_grow_and_are_even_over_every_change() {
    let mut bench = Bench::up();
    let mut last = bench.published.1;
    for _ in 0..5 {
        bench.peer_stops(true);
        bench.peer_starts();
        bench.work();
        assert!(bench.published.1 > last && bench.published.1.is_multiple_of(2));
        last = bench.published.1;
    }
    assert_ne!(bench.published.0.status & abi::LINK_S_UP, 0);
}
