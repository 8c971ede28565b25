//! A link that is to end takes everything back from its peer first, and shows nothing any more.

use std::time::Duration;

use vhost_pci_switch::link::message::Reply;
use vhost_pci_switch::link::{Effect, Event, Side};

use crate::bench::{Bench, REGIONS, TIMEOUT, config};
use crate::front_end::Ask;
use crate::iommu_owner::owner_vmm::{BUFFERS, Kind, RW};
use crate::vmm::Manner;

const MOMENT: Duration = Duration::from_millis(1);

/// Whether it was said that the link may end, and how.
fn ended(bench: &Bench) -> Option<bool> {
    let said: Vec<_> = bench
        .trace
        .iter()
        .filter_map(|effect| match effect {
            Effect::Unplugged(confirmed) => Some(*confirmed),
            _ => None,
        })
        .collect();
    assert!(said.len() <= 1, "it is said once");
    said.first().copied()
}

#[test]
fn a_link_may_end_when_its_peer_has_lost_everything_and_both_are_connected_until_then() {
    let mut bench = Bench::up();
    bench.apply(Event::Unplug);
    assert!(!bench.is_up());
    let mut steps = 0;
    while ended(&bench).is_none() {
        assert!(bench.is_connected(Side::Owner) && bench.is_connected(Side::Peer));
        assert!(bench.step(Manner::Honest), "nobody does anything and the link does not end");
        steps += 1;
        assert!(steps < 50);
    }
    assert_eq!((ended(&bench), bench.vmm.owner_ranges().count()), (Some(true), 0));
}

#[test]
fn an_owner_of_a_link_that_ends_is_answered_and_shown_no_more() {
    let mut bench = Bench::up();
    // It waits already.
    bench.owner(Ask::Stop(0));
    bench.apply(Event::Unplug);
    bench.work();
    assert!(matches!(bench.owner_reply, Some(Reply::VringBase(_))));
    assert_eq!(ended(&bench), Some(true));
    bench.forget();
    bench.owner(Ask::Stop(1));
    bench.owner(Ask::MemTable(REGIONS.to_vec()));
    bench.owner_up(&REGIONS);
    bench.work();
    assert!(!bench.is_up() && bench.vmm.owner_ranges().count() == 0);
    assert_eq!(ended(&bench), None);
}

#[test]
fn a_link_with_an_iommu_ends_likewise() {
    let mut bench = Bench::iommu_with(config(), Kind::Asked, true);
    bench.guest_maps(0..1, RW);
    let map = bench.map(BUFFERS, 64, 3);
    let _ = bench.status(map);
    assert!(bench.vmm.owner_ranges().count() > 0);
    bench.apply(Event::Unplug);
    bench.settle();
    assert_eq!((ended(&bench), bench.vmm.owner_ranges().count()), (Some(true), 0));
}

#[test]
fn a_link_whose_peer_has_nothing_ends_at_once() {
    let mut bench = Bench::new();
    bench.apply(Event::Unplug);
    assert_eq!(ended(&bench), Some(true));
    let mut bench = Bench::new();
    bench.connect(Side::Owner);
    bench.owner_up(&REGIONS);
    bench.apply(Event::Unplug);
    assert_eq!(ended(&bench), Some(true));
}

#[test]
fn a_peer_that_never_confirms_does_not_hold_the_end_up_and_that_is_said() {
    let mut bench = Bench::up();
    bench.apply(Event::Unplug);
    bench.wait(TIMEOUT);
    assert!(!bench.is_connected(Side::Peer), "it had its time");
    assert_eq!(ended(&bench), None, "the kernel may tell still");
    bench.wait(TIMEOUT - MOMENT);
    assert_eq!(ended(&bench), None);
    bench.wait(MOMENT);
    assert_eq!(ended(&bench), Some(false));
}

#[test]
fn a_peer_that_dies_instead_of_confirming_has_nothing_either() {
    let mut bench = Bench::up();
    bench.apply(Event::Unplug);
    bench.leave(Side::Peer);
    assert_eq!(ended(&bench), None);
    bench.vmm.dies();
    bench.look();
    assert_eq!(ended(&bench), Some(true));
}
