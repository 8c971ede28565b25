//! Commands of the peer's driver.

use vhost_pci_device::abi;
use vhost_pci_switch::link::message::{Log, Request};
use vhost_pci_switch::link::{Effect, Event, Side};

use crate::bench::Bench;
use crate::front_end::{eventfd, eventfd_pair};

fn command(command: u16) -> abi::ControlRequest {
    abi::ControlRequest { command: command.into(), ..Default::default() }
}

fn attach(generation: u64, flags: u32) -> abi::ControlRequest {
    abi::ControlRequest { value: generation.into(), flags: flags.into(), ..command(abi::CTRL_ATTACH) }
}

fn fault(vring: u16, kind: u32) -> abi::ControlRequest {
    abi::ControlRequest {
        vring: vring.into(),
        kind: kind.into(),
        value: 7.into(),
        ..command(abi::CTRL_FAULT)
    }
}

#[test]
fn a_driver_attaches_to_the_current_generation_only() {
    let mut bench = Bench::up();
    let current = bench.published.1;
    for stale in [0, current - 2, current - 1, current + 1, current + 2, u64::MAX] {
        assert_eq!(bench.command(&attach(stale, 0)).0, abi::CTRL_STALE);
        assert_eq!(bench.report().peer.driver, None);
    }
    assert_eq!(bench.command(&attach(current, 0)).0, abi::CTRL_OK);
    assert_eq!(bench.report().peer.driver.as_deref(), Some("polling"));
    assert_eq!(bench.command(&attach(current, abi::ATTACH_F_INTERRUPT)).0, abi::CTRL_OK);
    assert_eq!(bench.report().peer.driver.as_deref(), Some("interrupt"));
    assert_eq!(bench.command(&command(abi::CTRL_DETACH)).0, abi::CTRL_OK);
    assert_eq!(bench.report().peer.driver, None);
    assert_eq!(bench.report().counters.control_commands, 9);
}

#[test]
fn an_attached_driver_is_forgotten_when_its_device_stops() {
    let mut bench = Bench::up();
    assert_eq!(bench.command(&attach(bench.published.1, 0)).0, abi::CTRL_OK);
    bench.peer_stops(true);
    assert_eq!(bench.report().peer.driver, None);
}

#[test]
fn unknown_commands_are_unknown_and_do_nothing() {
    let mut bench = Bench::up();
    let before = bench.report();
    for number in (0..=u16::MAX).filter(|number| !(1..=7).contains(number)) {
        let (status, effects) = bench.command(&command(number));
        assert_eq!(status, abi::CTRL_UNKNOWN);
        assert!(effects.is_empty());
    }
    assert_eq!(bench.report().window, before.window);
}

#[test]
fn a_reported_fault_is_counted_by_kind_logged_sparely_and_signalled_to_the_owner() {
    let mut bench = Bench::up();
    let (mine, theirs) = eventfd_pair();
    bench.owner_raw(Request::SetVringErr { index: 1, fd: Some(theirs.clone()) });
    let mut lines = 0;
    for _ in 0..1000 {
        let (status, effects) = bench.command(&fault(1, abi::FaultKind::Unmapped as u32));
        assert_eq!(status, abi::CTRL_OK);
        lines += effects.iter().filter(|effect| matches!(effect, Effect::Log(Log::Fault(_)))).count();
        assert!(effects.iter().any(|effect| matches!(effect, Effect::Signal(fd) if *fd == theirs)));
    }
    assert_eq!(bench.faults("ring_unmapped"), 1000);
    assert_eq!(lines, 10, "1000 faults are 10 lines");
    assert!(bench.is_up(), "a fault report stops nothing by itself");
    drop(mine);
}

#[test]
fn every_kind_of_fault_has_its_own_count() {
    let mut bench = Bench::up();
    for kind in abi::FaultKind::ALL {
        bench.command(&fault(0, kind as u32));
        assert_eq!(bench.faults(&format!("ring_{}", kind.name())), 1);
    }
    assert_eq!(bench.report().counters.faults.len(), abi::FaultKind::ALL.len());
}

#[test]
fn a_fault_of_a_vring_or_kind_that_does_not_exist_is_invalid() {
    let mut bench = Bench::up();
    for bad in [fault(2, 1), fault(u16::MAX, 1), fault(0, 0), fault(0, 10), fault(0, u32::MAX)] {
        let (status, effects) = bench.command(&bad);
        assert_eq!(status, abi::CTRL_INVALID);
        assert!(effects.is_empty());
    }
    assert!(bench.report().counters.faults.is_empty());
}

#[test]
fn without_an_owner_a_fault_is_counted_and_without_a_peer_a_command_is_invalid() {
    let mut bench = Bench::up();
    bench.leave(Side::Owner);
    assert_eq!(bench.command(&fault(0, 1)).0, abi::CTRL_OK);
    assert_eq!(bench.faults("ring_avail_jump"), 1);
    bench.leave(Side::Peer);
    assert_eq!(bench.command(&command(abi::CTRL_DETACH)).0, abi::CTRL_INVALID);
}

#[test]
fn a_broken_control_ring_is_counted_as_the_peers_fault() {
    let mut bench = Bench::up();
    let effects = bench.link.apply(Event::ControlRingBroken("an index jumped".into()), bench.now);
    assert!(
        matches!(&effects[..], [Effect::Log(Log::Fault(line))] if line.contains("peer: control ring: an index jumped"))
    );
    assert_eq!(bench.faults("control_ring"), 1);
    assert!(bench.is_up());
}

#[test]
fn changes_of_the_link_page_interrupt_the_driver_by_the_control_queues_call() {
    let mut bench = Bench::up();
    let call = eventfd();
    bench.peer(Request::SetVringCall { index: 0, fd: Some(call.clone()) });
    assert_eq!(bench.link.control_call(), Some(call.clone()));
    bench.leave(Side::Owner);
    assert!(bench.trace.iter().any(|effect| matches!(effect, Effect::NotifyPeer(fd) if *fd == call)));
}

#[test]
fn a_new_interrupt_of_the_control_queue_is_signalled_since_the_old_one_may_have_been_missed() {
    let mut bench = Bench::up();
    let call = eventfd();
    bench.peer(Request::SetVringCall { index: 0, fd: Some(call.clone()) });
    let notified = |effect: &Effect| matches!(effect, Effect::NotifyPeer(to) if *to == call);
    assert_eq!(bench.trace.iter().filter(|effect| notified(effect)).count(), 1);
}
