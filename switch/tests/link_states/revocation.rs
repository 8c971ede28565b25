//! Whatever takes memory away from the peer is answered when the peer has lost it.

use vhost_pci_device::abi;
use vhost_pci_switch::link::message::{Reply, Request, WindowOp};
use vhost_pci_switch::link::{Effect, Side};

use crate::bench::{Bench, REGIONS};
use crate::front_end::{Ask, Region};
use crate::vmm::{Kind, Manner, kind};

/// Lets the VMM work change by change; the owner has to be unanswered while any
/// range outside `kept` is held, and answered at the end.
fn revokes(bench: &mut Bench, ask: Ask, kept: usize) {
    bench.forget();
    bench.owner(ask);
    assert!(bench.owner_reply.is_none(), "answered at once");
    assert!(!bench.is_up());
    let mut steps = 0;
    while bench.owner_reply.is_none() {
        assert!(bench.step(Manner::Honest), "nobody does anything and the owner waits");
        steps += 1;
        assert!(steps < 50);
    }
    assert_eq!(bench.vmm.owner_ranges().count(), kept);
    assert!(!matches!(bench.owner_reply, Some(Reply::Refused(_))));
}

#[test]
fn a_vring_stop_is_answered_when_everything_is_unmapped() {
    let mut bench = Bench::up();
    revokes(&mut bench, Ask::Stop(0), 0);
    assert!(matches!(bench.owner_reply, Some(Reply::VringBase(_))));
    // The second ring's memory is gone already.
    bench.owner(Ask::Stop(1));
    assert!(matches!(bench.owner_reply, Some(Reply::VringBase(_))));
}

#[test]
fn every_kind_of_revoking_request_waits_for_the_peer() {
    revokes(&mut Bench::up(), Ask::RemoveRegion(REGIONS[1]), 1);
    revokes(&mut Bench::up(), Ask::MemTable(vec![REGIONS[0]]), 1);
    revokes(&mut Bench::up(), Ask::MemTable(vec![REGIONS[0], Region::new(4 << 20, 1 << 20, 2, 0)]), 1);
    revokes(&mut Bench::up(), Ask::ResetOwner, 0);
    let mut bench = Bench::up();
    bench.owner(Ask::Enable(1, false));
    assert!(matches!(bench.owner_reply, Some(Reply::Done)), "the other vring runs on");
    bench.work();
    revokes(&mut bench, Ask::Enable(0, false), 0);
}

#[test]
fn a_memory_table_that_takes_nothing_away_is_answered_at_once() {
    let mut bench = Bench::up();
    bench.owner(Ask::MemTable(REGIONS.to_vec()));
    assert!(matches!(bench.owner_reply, Some(Reply::Done)));
    assert!(bench.is_up());
    assert!(!bench.trace.iter().any(|effect| matches!(effect, Effect::Window(..))));
}

#[test]
fn confirmed_unmaps_are_not_enough_while_the_witness_is_held() {
    let mut bench = Bench::up();
    bench.owner(Ask::Stop(0));
    // The VMM answers each unmap and carries it out later.
    while bench.step(Manner::AnswersFirst) {}
    assert!(bench.owner_reply.is_none());
    bench.vmm.catch_up();
    bench.look();
    assert!(matches!(bench.owner_reply, Some(Reply::VringBase(_))));
}

#[test]
fn an_unmapped_witness_is_not_enough_while_an_unmap_is_unconfirmed() {
    let mut bench = Bench::up();
    bench.owner(Ask::Stop(0));
    while bench.owner_reply.is_none() {
        assert!(bench.vmm.act(Manner::Honest), "nobody does anything and the owner waits");
        bench.look();
        assert!(bench.owner_reply.is_none(), "the VMM has not said so");
        bench.deliver();
    }
    assert_eq!(bench.vmm.owner_ranges().count(), 0);
}

#[test]
fn the_link_page_and_the_wires_go_down_before_the_first_unmap() {
    let mut bench = Bench::up();
    assert_eq!(bench.wires.len(), 4);
    bench.owner(Ask::RemoveRegion(REGIONS[1]));
    let position = |wanted: &dyn Fn(&Effect) -> bool| bench.trace.iter().position(wanted).unwrap();
    let down = position(
        &|effect| matches!(effect, Effect::Publish(contents, _) if contents.status & abi::LINK_S_UP == 0),
    );
    let unwired = position(&|effect| matches!(effect, Effect::Wire(wires) if wires.is_empty()));
    let notified = position(&|effect| matches!(effect, Effect::NotifyPeer(_)));
    let unmap = position(&|effect| matches!(effect, Effect::Window(_, WindowOp::Unmap(_))));
    assert!(unwired < unmap && down < unmap && down < notified);
}

#[test]
fn a_revocation_unmaps_what_goes_and_a_witness_and_nothing_else() {
    let mut bench = Bench::up();
    let before = bench.vmm.kinds();
    bench.owner(Ask::RemoveRegion(REGIONS[1]));
    bench.work();
    let unmapped: Vec<_> = bench
        .trace
        .iter()
        .filter_map(|effect| match effect {
            Effect::Window(_, WindowOp::Unmap(content)) => Some(kind(content)),
            _ => None,
        })
        .collect();
    assert_eq!(unmapped, [Kind::Owner, Kind::Witness], "the witness goes last");
    assert_eq!(before.len() - 1, bench.vmm.kinds().len());
    assert!(bench.is_up(), "it goes on with the region that is left");
    assert_eq!(bench.published.0.mappings.len(), 1);
    assert_eq!(bench.report().counters.mappings_revoked, 1);
    assert_eq!(bench.report().counters.mappings_made, 2);
}

#[test]
fn removing_and_adding_regions_again_and_again_ends_where_it_began() {
    let mut bench = Bench::up();
    for round in 0..20 {
        let mapped = bench.vmm.kinds().len();
        bench.owner(Ask::RemoveRegion(REGIONS[1]));
        if round % 2 == 0 {
            bench.work();
        }
        while bench.question.is_some() {
            assert!(bench.step(Manner::Honest));
        }
        bench.owner(Ask::AddRegion(REGIONS[1]));
        bench.work();
        assert!(bench.is_up());
        assert_eq!(bench.vmm.kinds().len(), mapped);
    }
}

#[test]
fn a_started_vring_cannot_lose_its_memory() {
    let mut bench = Bench::up();
    bench.owner(Ask::RemoveRegion(REGIONS[0]));
    assert!(matches!(&bench.owner_reply, Some(Reply::Refused(reason)) if reason.contains("vring 0")));
    assert!(!bench.is_connected(Side::Owner));
    assert_eq!(bench.faults("vring"), 1);
    bench.work();
    assert_eq!(bench.vmm.owner_ranges().count(), 0);
}

#[test]
fn an_owner_that_leaves_takes_its_memory_with_it() {
    let mut bench = Bench::up();
    bench.leave(Side::Owner);
    assert!(!bench.is_up());
    assert_eq!(bench.published.0.status, 0);
    bench.work();
    assert_eq!(bench.vmm.owner_ranges().count(), 0);
    assert!(bench.report().reason.unwrap().contains("owner's VMM is not connected"));
}

#[test]
fn an_owner_that_leaves_in_mid_revocation_and_returns_gets_a_fresh_start() {
    for steps in 0..6 {
        let mut bench = Bench::up();
        bench.owner(Ask::Stop(0));
        for _ in 0..steps {
            bench.step(Manner::Honest);
        }
        bench.leave(Side::Owner);
        bench.forget();
        bench.connect(Side::Owner);
        bench.owner(Ask::Features(1 << 30));
        assert!(bench.owner_reply.is_some(), "what takes nothing away does not wait");
        bench.work();
        assert!(
            !bench
                .trace
                .iter()
                .any(|effect| matches!(effect, Effect::Reply(Side::Owner, Reply::VringBase(_)))),
            "the new session got the old one's answer"
        );
        bench.leave(Side::Owner);
        bench.work();
        bench.connect(Side::Owner);
        bench.owner_up(&REGIONS);
        bench.work();
        assert!(bench.is_up(), "after {steps} steps");
    }
}

#[test]
fn a_new_owners_first_table_waits_for_the_old_owners_memory() {
    let mut bench = Bench::up();
    bench.leave(Side::Owner);
    bench.connect(Side::Owner);
    bench.owner(Ask::MemTable(vec![Region::new(0, 1 << 20, 2, 0)]));
    assert!(bench.owner_reply.is_none());
    bench.work();
    assert!(matches!(bench.owner_reply, Some(Reply::Done)));
}

#[test]
fn an_owner_without_a_peer_never_waits() {
    let mut bench = Bench::new();
    bench.connect(Side::Owner);
    bench.owner_up(&REGIONS);
    for ask in [Ask::RemoveRegion(REGIONS[1]), Ask::Stop(0), Ask::Stop(1), Ask::MemTable(vec![REGIONS[1]])] {
        bench.owner(ask);
        assert!(bench.owner_reply.is_some());
    }
    bench.owner_raw(Request::ResetOwner);
    assert!(bench.owner_reply.is_some());
}
