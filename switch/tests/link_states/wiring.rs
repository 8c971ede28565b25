//! Which eventfds are joined, and when.

use vhost_pci_switch::config::{LinkConfig, WiringPolicy};
use vhost_pci_switch::link::message::{Request, Wire};
use vhost_pci_switch::link::{Effect, Side};

use crate::bench::{Bench, REGIONS, TIMEOUT, config};
use crate::front_end::{Ask, eventfd};
use crate::vmm::Manner;

fn wire(bench: &Bench, vring: u16, from: Side) -> Option<&Wire> {
    bench.wires.iter().find(|wire| wire.vring == vring && wire.from == from)
}

#[test]
fn wires_join_kicks_and_calls_of_the_same_vring_while_the_link_is_up() {
    let mut bench = Bench::up();
    let (kick, call, doorbell, interrupt) = (eventfd(), eventfd(), eventfd(), eventfd());
    bench.owner_raw(Request::SetVringKick { index: 1, fd: Some(kick.clone()) });
    bench.owner_raw(Request::SetVringCall { index: 1, fd: Some(call.clone()) });
    bench.peer(Request::SetVringKick { index: 2, fd: Some(doorbell.clone()) });
    bench.peer(Request::SetVringCall { index: 2, fd: Some(interrupt.clone()) });
    let out = wire(&bench, 1, Side::Owner).unwrap();
    assert_eq!((&out.source, &out.target), (&kick, &interrupt));
    let back = wire(&bench, 1, Side::Peer).unwrap();
    assert_eq!((&back.source, &back.target), (&doorbell, &call));
    assert_eq!(bench.wires.len(), 4);
    let report = bench.report();
    assert_eq!((report.vrings[1].kicks.as_str(), report.vrings[1].calls.as_str()), ("relayed", "relayed"));
}

#[test]
fn there_are_no_wires_before_the_link_is_up_nor_after() {
    let mut bench = Bench::new();
    bench.connect(Side::Owner);
    bench.owner_up(&REGIONS);
    bench.peer_up();
    assert!(bench.wires.is_empty());
    bench.work();
    assert_eq!(bench.wires.len(), 4);
    bench.leave(Side::Peer);
    assert!(bench.wires.is_empty());
}

#[test]
fn a_replaced_call_is_used_from_then_on_and_a_withdrawn_one_no_more() {
    let mut bench = Bench::up();
    for _ in 0..3 {
        let call = eventfd();
        bench.owner_raw(Request::SetVringCall { index: 0, fd: Some(call.clone()) });
        assert_eq!(wire(&bench, 0, Side::Peer).unwrap().target, call);
        assert_eq!(bench.wires.len(), 4);
    }
    bench.owner_raw(Request::SetVringCall { index: 0, fd: None });
    assert!(wire(&bench, 0, Side::Peer).is_none());
    assert_eq!(bench.wires.len(), 3);
    assert!(bench.is_up());
}

#[test]
fn a_disabled_vring_has_no_wires_while_the_other_keeps_its_own() {
    let mut bench = Bench::up();
    bench.owner(Ask::Enable(0, false));
    bench.work();
    assert!(wire(&bench, 0, Side::Owner).is_none() && wire(&bench, 0, Side::Peer).is_none());
    assert_eq!(bench.wires.len(), 2);
    bench.owner(Ask::Enable(0, true));
    bench.work();
    assert_eq!(bench.wires.len(), 4);
}

#[test]
fn an_unchanged_link_is_not_wired_again() {
    let mut bench = Bench::up();
    bench.owner(Ask::MemTable(REGIONS.to_vec()));
    bench.peer(Request::GetFeatures);
    assert!(!bench.trace.iter().any(|effect| matches!(effect, Effect::Wire(_))));
}

#[test]
fn the_control_doorbell_lives_as_long_as_the_device_runs() {
    let mut bench = Bench::up();
    let doorbell = eventfd();
    bench.peer(Request::SetVringKick { index: 0, fd: Some(doorbell.clone()) });
    let last = |bench: &Bench| {
        bench.trace.iter().rev().find_map(|effect| match effect {
            Effect::ControlDoorbell(doorbell) => Some(doorbell.clone()),
            _ => None,
        })
    };
    assert_eq!(last(&bench), Some(Some(doorbell)));
    bench.peer_stops(true);
    assert_eq!(last(&bench), Some(None));
}

/// Both sides up, and the peer's VMM takes the owner's eventfds.
fn wired() -> Bench {
    let mut bench = Bench::new();
    bench.wiring = true;
    bench.connect(Side::Owner);
    bench.owner_up(&REGIONS);
    bench.peer_up();
    bench.work();
    assert!(bench.is_up());
    bench.forget();
    bench
}

/// The same, with every WIRE on its way.
fn about_to_be_wired() -> Bench {
    let mut bench = Bench::new();
    bench.wiring = true;
    bench.connect(Side::Owner);
    bench.owner_up(&REGIONS);
    bench.peer_up();
    while bench.vmm.act(Manner::Honest) {
        bench.deliver();
        bench.look();
    }
    bench
}

fn ways(bench: &Bench, vring: usize) -> [String; 2] {
    let report = bench.report();
    [report.vrings[vring].kicks.clone(), report.vrings[vring].calls.clone()]
}

#[test]
fn a_vmm_that_can_is_handed_every_live_vrings_eventfds_and_no_kick_is_relayed() {
    let bench = wired();
    assert_eq!(bench.wirer.count(), 4);
    assert_eq!(ways(&bench, 0), ["direct", "direct"]);
    assert!(bench.wires.iter().all(|wire| wire.from == Side::Peer), "a wired kick would be taken away");
}

#[test]
fn what_the_vmm_refuses_is_relayed_and_not_asked_again_until_it_is_another_eventfd() {
    let mut bench = Bench::new();
    bench.wiring = true;
    bench.connect(Side::Owner);
    bench.owner_up(&REGIONS);
    bench.peer_up();
    while bench.vmm.act(Manner::Honest) | bench.wirer.act(Manner::Refuses) {
        bench.deliver();
        bench.look();
    }
    assert!(bench.is_up());
    assert_eq!((bench.wirer.count(), bench.wires.len()), (0, 4));
    let report = bench.report();
    assert_eq!(report.vrings[0].indirect_because.as_deref(), Some("the peer's VMM refused the eventfd"));
    bench.forget();
    bench.owner(Ask::MemTable(REGIONS.to_vec()));
    bench.work();
    assert!(!bench.trace.iter().any(|effect| matches!(effect, Effect::WirePeer(..))));
    let kick = eventfd();
    bench.owner_raw(Request::SetVringKick { index: 0, fd: Some(kick.clone()) });
    bench.work();
    assert_eq!(bench.wirer.wired(0, Side::Owner), Some(&kick));
}

#[test]
fn an_owner_that_stops_a_vring_is_answered_when_its_eventfds_were_taken_back() {
    let mut bench = wired();
    bench.owner(Ask::Stop(0));
    while bench.vmm.act(Manner::Honest) {
        bench.deliver();
        bench.look();
    }
    assert!(bench.owner_reply.is_none(), "answered while the peer still has the eventfds");
    bench.work();
    assert!(bench.owner_reply.is_some());
}

#[test]
fn a_replaced_call_is_answered_when_the_peer_has_the_new_one_and_that_is_signalled_once() {
    let mut bench = wired();
    let call = eventfd();
    bench.owner_raw(Request::SetVringCall { index: 0, fd: Some(call.clone()) });
    assert!(bench.owner_reply.is_none());
    bench.work();
    assert!(bench.owner_reply.is_some());
    assert_eq!(bench.wirer.wired(0, Side::Peer), Some(&call));
    let signals = bench.trace.iter().filter(|effect| matches!(effect, Effect::Signal(to) if *to == call));
    assert_eq!(signals.count(), 1);
}

#[test]
fn a_request_that_meets_a_device_started_again_is_said_again() {
    let mut bench = about_to_be_wired();
    // All four requests are on their way. The first is carried out; then the device is reset.
    assert!(bench.wirer.act(Manner::Honest));
    bench.peer_stops(true);
    bench.peer_starts();
    bench.deliver();
    bench.wait(std::time::Duration::from_millis(300));
    bench.work();
    assert!(bench.is_up());
    assert_eq!(bench.wirer.count(), 4, "{:?}", bench.report().vrings);
}

#[test]
fn a_vmm_that_does_not_answer_loses_its_link() {
    let mut bench = wired();
    bench.owner(Ask::Stop(1));
    while bench.vmm.act(Manner::Honest) {
        bench.deliver();
        bench.look();
    }
    bench.wait(TIMEOUT);
    assert!(!bench.is_connected(Side::Peer));
    assert_eq!((bench.faults("wiring"), bench.faults("window_unconfirmed")), (1, 0));
}

#[test]
fn a_queue_whose_kick_comes_anew_is_wired_anew() {
    let mut bench = wired();
    // It takes back what was wired before it says this.
    bench.peer(Request::SetVringKick { index: 1, fd: Some(eventfd()) });
    assert_eq!(bench.wirer.count(), 2);
    bench.work();
    assert_eq!(bench.wirer.count(), 4);
}

#[test]
fn a_stopped_device_is_asked_to_take_nothing_back_and_holds_no_owner_up() {
    let mut bench = about_to_be_wired();
    assert!(bench.wirer.act(Manner::Honest));
    bench.peer_stops(true);
    bench.deliver();
    bench.work();
    bench.forget();
    bench.owner(Ask::Stop(0));
    bench.work();
    assert!(bench.owner_reply.is_some() && bench.is_connected(Side::Peer));
    assert!(!bench.trace.iter().any(|effect| matches!(effect, Effect::WirePeer(..))));
}

#[test]
fn with_the_policy_relay_no_vmm_is_handed_anything() {
    let mut bench = Bench::with(LinkConfig { wiring: WiringPolicy::Relay, ..config() });
    bench.wiring = true;
    bench.connect(Side::Owner);
    bench.owner_up(&REGIONS);
    bench.peer_up();
    bench.work();
    assert_eq!((bench.wirer.count(), bench.wires.len()), (0, 4));
    assert_eq!(bench.report().vrings[0].indirect_because.as_deref(), Some("the link's wiring is \"relay\""));
}
