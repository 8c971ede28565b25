//! A peer's VMM that refuses, stalls or lies loses its link; the owner never gets a
//! false answer.

use std::time::Duration;

use vhost_pci_switch::link::message::OpId;
use vhost_pci_switch::link::message::{Log, Reply, WindowOp};
use vhost_pci_switch::link::{Effect, Event, Side};

use crate::bench::{Bench, REGIONS, TIMEOUT};
use crate::front_end::Ask;
use crate::vmm::Manner;

const MOMENT: Duration = Duration::from_millis(1);

fn fault_lines(bench: &Bench) -> usize {
    bench.trace.iter().filter(|effect| matches!(effect, Effect::Log(Log::Fault(_)))).count()
}

#[test]
fn a_refused_unmap_costs_the_peer_its_session_and_the_owner_waits_for_the_kernel() {
    let mut bench = Bench::up();
    bench.owner(Ask::Stop(0));
    bench.step(Manner::Refuses);
    assert!(!bench.is_connected(Side::Peer));
    assert_eq!(bench.report().state, "failed");
    assert!(bench.report().reason.unwrap().contains("refused"));
    assert_eq!((bench.faults("window_refused"), fault_lines(&bench)), (1, 1));
    assert!(bench.owner_reply.is_none(), "the VMM may hold the memory still");
    bench.vmm.dies();
    bench.look();
    assert!(matches!(bench.owner_reply, Some(Reply::VringBase(_))));
    assert_eq!(bench.report().state, "failed", "failed until it works again");
}

#[test]
fn a_refused_map_costs_the_peer_its_session_whichever_map_it_is() {
    for maps in 0..5 {
        let mut bench = Bench::new();
        bench.connect(Side::Owner);
        bench.owner_up(&REGIONS);
        bench.peer_up();
        for _ in 0..maps {
            assert!(bench.step(Manner::Honest));
        }
        assert!(bench.step(Manner::Refuses));
        assert!(!bench.is_connected(Side::Peer), "map {maps}");
        assert!(bench.is_connected(Side::Owner));
        assert!(!bench.is_up());
        assert_eq!(bench.report().state, "failed");
    }
}

#[test]
fn a_peer_that_never_confirms_is_disconnected_when_its_time_is_over() {
    let mut bench = Bench::up();
    bench.owner(Ask::Stop(0));
    bench.wait(TIMEOUT - MOMENT);
    assert!(bench.is_connected(Side::Peer));
    bench.wait(MOMENT);
    assert!(!bench.is_connected(Side::Peer));
    assert!(bench.owner_reply.is_none());
    assert_eq!(bench.faults("window_unconfirmed"), 1);
    assert_eq!(bench.report().state, "failed");
    bench.vmm.dies();
    bench.look();
    assert!(matches!(bench.owner_reply, Some(Reply::VringBase(_))));
}

#[test]
fn an_owner_whose_memory_stays_held_is_disconnected_unanswered() {
    let mut bench = Bench::up();
    bench.owner(Ask::Stop(0));
    bench.wait(TIMEOUT);
    bench.wait(TIMEOUT - MOMENT);
    assert!(bench.is_connected(Side::Owner));
    bench.wait(MOMENT);
    assert!(!bench.is_connected(Side::Owner));
    assert!(bench.owner_reply.is_none());
    assert_eq!(bench.report().state, "failed");
    assert!(bench.report().reason.unwrap().contains("unanswered"));
    // Nothing is left that could wake the link again and again.
    bench.wait(TIMEOUT * 100);
    assert_eq!(bench.link.deadline(), None);
}

#[test]
fn a_vmm_that_says_yes_and_does_nothing_is_caught_by_the_witness() {
    let mut bench = Bench::up();
    bench.owner(Ask::RemoveRegion(REGIONS[1]));
    while bench.step(Manner::AnswersFirst) {}
    bench.wait(TIMEOUT);
    assert!(!bench.is_connected(Side::Peer));
    assert!(bench.owner_reply.is_none());
    assert_eq!(bench.faults("window_unconfirmed"), 1);
}

#[test]
fn a_map_that_is_never_answered_ends_the_peers_session_too() {
    let mut bench = Bench::new();
    bench.connect(Side::Owner);
    bench.owner_up(&REGIONS);
    bench.peer_up();
    bench.wait(TIMEOUT);
    assert!(!bench.is_connected(Side::Peer));
    assert_eq!(bench.faults("window_unconfirmed"), 1);
    // The owner was asked nothing and lost nothing.
    assert!(bench.is_connected(Side::Owner));
    bench.owner(Ask::Stop(0));
    assert!(bench.owner_reply.is_some());
}

#[test]
fn a_failed_link_works_again_with_the_next_peer() {
    let mut bench = Bench::up();
    bench.owner(Ask::RemoveRegion(REGIONS[1]));
    bench.step(Manner::Refuses);
    bench.vmm.dies();
    bench.look();
    assert!(bench.owner_reply.is_some());
    bench.peer_up();
    bench.work();
    assert!(bench.is_up());
    assert_eq!(bench.report().state, "up");
    assert_eq!(bench.report().reason, None);
}

#[test]
fn a_peer_that_fails_again_and_again_does_not_fill_the_log() {
    let mut bench = Bench::new();
    for _ in 0..100 {
        bench.peer_up();
        bench.step(Manner::Refuses);
        assert!(!bench.is_connected(Side::Peer));
        bench.vmm.dies();
        bench.look();
    }
    assert_eq!(bench.faults("window_refused"), 100);
    assert_eq!(fault_lines(&bench), 7, "at powers of two only");
}

#[test]
fn confirmations_that_nobody_waits_for_change_nothing() {
    let mut bench = Bench::up();
    let before = bench.report();
    for op in [0, 1, 3, 99, u64::MAX] {
        bench.apply(Event::WindowDone(OpId(op), Ok(())));
        bench.apply(Event::WindowDone(OpId(op), Err("no".into())));
        bench.apply(Event::WitnessGone);
    }
    assert_eq!(bench.report(), before);
    assert!(bench.trace.is_empty());
}

#[test]
fn an_answer_out_of_order_confirms_nothing() {
    let mut bench = Bench::up();
    bench.owner(Ask::Stop(0));
    let asked: Vec<OpId> = bench
        .trace
        .iter()
        .filter_map(|effect| match effect {
            Effect::Window(op, WindowOp::Unmap(_)) => Some(*op),
            _ => None,
        })
        .collect();
    assert!(asked.len() >= 2);
    for op in asked.iter().rev() {
        bench.apply(Event::WindowDone(*op, Ok(())));
    }
    assert!(bench.owner_reply.is_none());
}
