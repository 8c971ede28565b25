//! The doorbell function of a peer's VM: what its VMM is sent, what its page says, and what is
//! relayed meanwhile.

use vhost_pci_device::abi;
use vhost_pci_switch::link::descriptor::Eventfd;
use vhost_pci_switch::link::doorbell::DoorbellMessage;
use vhost_pci_switch::link::message::Request;
use vhost_pci_switch::link::{Effect, Event, Side};

use crate::bench::{Bench, TIMEOUT};
use crate::front_end::{Ask, eventfd};

/// A link that is up, whose peer has a doorbell function; nobody is attached.
fn connected() -> Bench {
    let mut bench = Bench::up();
    bench.apply(Event::DoorbellConnected);
    bench.apply(Event::DoorbellRead);
    bench.forget();
    bench
}

fn attach(bench: &mut Bench, vectors: u64) {
    let flags = abi::ATTACH_F_INTERRUPT | abi::ATTACH_F_DOORBELL;
    let request = abi::ControlRequest {
        command: abi::CTRL_ATTACH.into(),
        flags: flags.into(),
        value: bench.published.1.into(),
        len: vectors.into(),
        ..Default::default()
    };
    let (status, effects) = bench.command(&request);
    assert_eq!(status, abi::CTRL_OK);
    bench.run(effects);
}

/// What the VMM was sent since the last look.
fn sent(bench: &Bench) -> (Vec<Eventfd>, Vec<(u16, Eventfd)>) {
    let (mut own, mut peers) = (Vec::new(), Vec::new());
    for effect in &bench.trace {
        match effect {
            Effect::Doorbell(DoorbellMessage::OwnVector(eventfd)) => own.push(eventfd.clone()),
            Effect::Doorbell(DoorbellMessage::Peer(number, eventfd)) => {
                peers.push((*number, eventfd.clone()))
            }
            _ => {}
        }
    }
    (own, peers)
}

/// What the page says of each vring last: vector and doorbell.
fn page(bench: &Bench) -> Vec<(Option<u32>, Option<u32>)> {
    let last = bench.trace.iter().rev().find_map(|effect| match effect {
        Effect::PublishDoorbell(entries, _) => Some(entries.clone()),
        _ => None,
    });
    let has = |entry: &abi::DoorbellEntry, flag| entry.flags.value() & flag != 0;
    last.unwrap_or_default()
        .iter()
        .map(|entry| {
            let vector = has(entry, abi::DOORBELL_F_KICK).then(|| entry.vector.value());
            (vector, has(entry, abi::DOORBELL_F_CALL).then(|| entry.doorbell.value()))
        })
        .collect()
}

fn relayed_kicks(bench: &Bench) -> usize {
    bench.wires.iter().filter(|wire| wire.from == Side::Owner).count()
}

fn ways(bench: &Bench) -> Vec<(String, String)> {
    bench.report().vrings.iter().map(|vring| (vring.kicks.clone(), vring.calls.clone())).collect()
}

#[test]
fn each_vring_gets_a_vector_and_a_number_that_count_when_the_vmm_has_read_them() {
    let mut bench = connected();
    assert_eq!(relayed_kicks(&bench), 0, "kicks wait for the driver's word");
    let report = bench.report();
    assert_eq!(report.vrings[0].kicks, "waiting");
    assert_eq!(
        report.vrings[0].indirect_because.as_deref(),
        Some("kicks wait for the peer's driver to attach")
    );
    attach(&mut bench, 8);
    let (own, peers) = sent(&bench);
    assert_eq!((own.len(), peers.len()), (2, 2));
    assert_eq!(page(&bench), [], "nothing new as long as it has not read");
    assert!(bench.trace.iter().any(|effect| matches!(effect, Effect::WatchDoorbell)));
    bench.apply(Event::DoorbellRead);
    assert_eq!(page(&bench), [(Some(0), Some(1 << 16)), (Some(1), Some(2 << 16))]);
    assert!(bench.trace.iter().any(|effect| matches!(effect, Effect::NotifyPeer(_))));
    assert_eq!(relayed_kicks(&bench), 0);
    assert_eq!(ways(&bench), vec![("doorbell".to_owned(), "doorbell".to_owned()); 2]);
}

#[test]
fn a_driver_without_it_gets_its_kicks_by_the_relay() {
    let mut bench = connected();
    attach(&mut bench, 0);
    assert_eq!((relayed_kicks(&bench), sent(&bench).0.len()), (2, 0));
    let reason = bench.report().vrings[0].indirect_because.clone();
    assert_eq!(reason.as_deref(), Some("the peer's driver does not use the doorbell function"));
}

#[test]
fn new_kicks_take_new_vectors_until_none_is_left_and_are_then_relayed() {
    let mut bench = connected();
    attach(&mut bench, 3);
    bench.apply(Event::DoorbellRead);
    bench.owner_raw(Request::SetVringKick { index: 0, fd: Some(eventfd()) });
    bench.apply(Event::DoorbellRead);
    assert_eq!(page(&bench)[0].0, Some(2));
    bench.owner_raw(Request::SetVringKick { index: 1, fd: Some(eventfd()) });
    assert_eq!(page(&bench), [(Some(2), Some(1 << 16)), (None, Some(2 << 16))]);
    assert_eq!(relayed_kicks(&bench), 1);
    let reason = bench.report().vrings[1].indirect_because.clone();
    assert_eq!(reason.as_deref(), Some("the doorbell function has no vector left; plug it anew"));
    // Plugged anew it begins with vector 0, when the driver has said so.
    bench.apply(Event::DoorbellGone);
    assert_eq!(relayed_kicks(&bench), 2);
    bench.forget();
    bench.apply(Event::DoorbellConnected);
    attach(&mut bench, 3);
    bench.apply(Event::DoorbellRead);
    assert_eq!(page(&bench), [(Some(0), Some(1 << 16)), (Some(1), Some(2 << 16))]);
}

#[test]
fn a_call_that_comes_back_has_its_number_still() {
    let mut bench = connected();
    attach(&mut bench, 2);
    bench.apply(Event::DoorbellRead);
    let (masked, other) = (eventfd(), sent(&bench).1[0].1.clone());
    bench.owner_raw(Request::SetVringCall { index: 0, fd: Some(masked) });
    assert_eq!(page(&bench)[0].1, None, "nobody has read of the new one");
    bench.apply(Event::DoorbellRead);
    assert_eq!(page(&bench)[0].1, Some(3 << 16));
    bench.forget();
    bench.owner_raw(Request::SetVringCall { index: 0, fd: Some(other) });
    assert_eq!(page(&bench)[0].1, Some(1 << 16));
    assert_eq!(sent(&bench).1.len(), 0);
}

#[test]
fn numbers_are_used_up_and_calls_then_relayed_and_nothing_grows() {
    let mut bench = connected();
    attach(&mut bench, 2);
    for _ in 0..2000 {
        bench.owner_raw(Request::SetVringCall { index: 0, fd: Some(eventfd()) });
        bench.apply(Event::DoorbellRead);
    }
    assert_eq!(sent(&bench).1.len(), 16);
    assert_eq!(ways(&bench)[0], ("doorbell".to_owned(), "relayed".to_owned()));
}

#[test]
fn a_guest_with_as_many_vectors_as_there_can_be_costs_the_broker_few_descriptors() {
    let mut bench = connected();
    attach(&mut bench, 2048);
    for _ in 0..2000 {
        bench.owner_raw(Request::SetVringKick { index: 0, fd: Some(eventfd()) });
    }
    assert_eq!(sent(&bench).0.len(), 64);
}

#[test]
fn a_function_that_is_plugged_anew_is_given_nothing_before_its_driver_has_said_so() {
    let mut bench = connected();
    attach(&mut bench, 64);
    bench.apply(Event::DoorbellRead);
    bench.apply(Event::DoorbellGone);
    bench.forget();
    bench.apply(Event::DoorbellConnected);
    assert!(sent(&bench).0.is_empty() && sent(&bench).1.is_empty());
    assert!(
        bench.trace.iter().any(|effect| matches!(effect, Effect::WatchDoorbell)),
        "it is to read its greeting"
    );
}

#[test]
fn a_function_that_breaks_the_rules_carries_nothing_more_and_keeps_its_place() {
    let mut bench = connected();
    attach(&mut bench, 8);
    bench.apply(Event::DoorbellRead);
    let known = sent(&bench).1[0].1.clone();
    bench.owner_raw(Request::SetVringCall { index: 0, fd: Some(eventfd()) });
    bench.owner_raw(Request::SetVringCall { index: 0, fd: Some(known) });
    assert_eq!(page(&bench)[0].1, Some(1 << 16));
    bench.forget();
    assert!(bench.link.awaits_doorbell());
    bench.wait(TIMEOUT);
    assert!(!bench.link.awaits_doorbell(), "the clock would wake for it for ever");
    assert_eq!(page(&bench), [(None, None); 2]);
    let published = bench.trace.iter().position(|effect| matches!(effect, Effect::PublishDoorbell(..)));
    let told = bench.trace.iter().position(|effect| matches!(effect, Effect::NotifyPeer(_)));
    assert!(published < told);
    bench.apply(Event::DoorbellRead);
    assert_eq!(ways(&bench), vec![("relayed".to_owned(), "relayed".to_owned()); 2]);
    for _ in 0..100 {
        bench.apply(Event::DoorbellSpoke);
    }
    let lines = bench.trace.iter().filter(|effect| matches!(effect, Effect::Log(_))).count();
    assert_eq!((bench.faults("doorbell"), lines), (101, 7));
}

#[test]
fn an_owner_that_stops_takes_its_vrings_out_of_the_page() {
    let mut bench = connected();
    attach(&mut bench, 8);
    bench.apply(Event::DoorbellRead);
    bench.owner(Ask::Stop(0));
    bench.work();
    assert_eq!(page(&bench), [(None, None); 2]);
}

#[test]
fn a_vmm_that_reads_nothing_loses_its_doorbell_and_kicks_are_relayed() {
    let mut bench = connected();
    attach(&mut bench, 8);
    assert_eq!(relayed_kicks(&bench), 0);
    bench.wait(TIMEOUT);
    assert_eq!((relayed_kicks(&bench), bench.faults("doorbell")), (2, 1));
    assert!(bench.is_up());
}
