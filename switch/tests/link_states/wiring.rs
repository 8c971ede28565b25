//! Which eventfds are joined, and when.

use vhost_pci_switch::link::message::{Request, Wire};
use vhost_pci_switch::link::{Effect, Side};

use crate::bench::{Bench, REGIONS};
use crate::front_end::{Ask, eventfd};

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
    assert_eq!(bench.report().vrings[1].wiring, "relayed");
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
