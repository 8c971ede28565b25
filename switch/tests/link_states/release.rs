//! What a device of the peer's VM uses stays in the window until its driver says that the device
//! has let go of it; the owner is answered after that, and never waits for long.

use std::time::Duration;

use vhost_pci_device::abi;
use vhost_pci_switch::link::message::{Reply, WindowOp};
use vhost_pci_switch::link::{Effect, Side};

use crate::bench::{Bench, REGIONS, TIMEOUT, config};
use crate::front_end::Ask;
use crate::iommu_owner::owner_vmm::{BUFFERS, Kind, RW};
use crate::iommu_owner::page_table::PAGE;

fn unmaps(bench: &Bench) -> usize {
    bench.trace.iter().filter(|effect| matches!(effect, Effect::Window(_, WindowOp::Unmap(_)))).count()
}

fn lent() -> Bench {
    let mut bench = Bench::up();
    assert_eq!(bench.lends(), abi::CTRL_OK);
    assert!(bench.report().peer.quiesces);
    bench.forget();
    bench
}

#[test]
fn the_vmm_is_asked_to_unmap_when_the_device_has_let_go_and_not_before() {
    let mut bench = lent();
    bench.owner(Ask::RemoveRegion(REGIONS[1]));
    bench.work();
    assert_eq!((unmaps(&bench), bench.report().window.phase.as_str()), (0, "releasing"));
    assert!(bench.owner_reply.is_none() && !bench.is_up());
    assert!(bench.trace.iter().any(|effect| matches!(effect, Effect::NotifyPeer(_))));

    let now = bench.table_generation;
    assert_eq!(bench.says_released(now - 2), abi::CTRL_STALE);
    assert_eq!(bench.says_released(now + 2), abi::CTRL_INVALID);
    bench.work();
    assert_eq!(unmaps(&bench), 0);
    assert_eq!(bench.releases(), abi::CTRL_OK);
    bench.work();
    assert!(matches!(bench.owner_reply, Some(Reply::Done)) && bench.is_up());
    let counters = bench.report().counters;
    assert_eq!((counters.releases_asked, counters.releases_given), (1, 1));
    assert!(counters.faults.is_empty());
}

#[test]
fn a_stop_of_the_vrings_and_an_owner_that_leaves_wait_too() {
    let mut bench = lent();
    bench.owner(Ask::Stop(0));
    bench.work();
    assert!(bench.owner_reply.is_none() && unmaps(&bench) == 0);
    bench.releases();
    bench.work();
    assert!(matches!(bench.owner_reply, Some(Reply::VringBase(_))));

    let mut bench = lent();
    bench.leave(Side::Owner);
    bench.work();
    assert_eq!((unmaps(&bench), bench.vmm.owner_ranges().count()), (0, 2));
    bench.releases();
    bench.work();
    assert_eq!(bench.vmm.owner_ranges().count(), 0);
}

#[test]
fn a_driver_that_says_nothing_has_half_the_time_of_a_vmm_and_is_counted() {
    let mut bench = lent();
    bench.owner(Ask::Stop(0));
    bench.wait(TIMEOUT / 2 - Duration::from_millis(1));
    bench.work();
    assert!(bench.owner_reply.is_none());
    bench.wait(Duration::from_millis(1));
    bench.work();
    assert!(matches!(bench.owner_reply, Some(Reply::VringBase(_))));
    assert_eq!(bench.faults("window_unreleased"), 1);
    assert!(bench.is_connected(Side::Peer), "its VMM did what it was asked");
    assert_eq!(bench.report().counters.releases_given, 0);
}

#[test]
fn a_driver_without_a_device_is_not_waited_for() {
    for end in [abi::CTRL_ATTACH, abi::CTRL_DETACH] {
        let mut bench = lent();
        bench.owner(Ask::Stop(0));
        let request = abi::ControlRequest {
            command: end.into(),
            value: bench.published.1.into(),
            ..Default::default()
        };
        let (status, effects) = bench.command(&request);
        assert_eq!(status, abi::CTRL_OK);
        bench.run(effects);
        bench.work();
        assert!(bench.owner_reply.is_some());
        assert_eq!(bench.says_released(bench.table_generation), abi::CTRL_INVALID);
    }
    // Nor one whose device stopped meanwhile.
    let mut bench = lent();
    bench.owner(Ask::Stop(0));
    bench.peer_stops(true);
    bench.work();
    assert!(bench.owner_reply.is_some() && bench.faults("window_unreleased") == 0);
    assert_eq!(bench.link.deadline(), None);
}

#[test]
fn what_an_iommu_takes_back_waits_and_what_it_brings_waits_for_nobody() {
    for kind in [Kind::Asked, Kind::Pushes] {
        let mut bench = Bench::iommu_with(config(), kind, false);
        bench.guest_maps(0..2, RW);
        let mapped = bench.map(BUFFERS, 2 * PAGE, 3);
        assert_eq!(bench.status(mapped), abi::CTRL_OK);
        assert_eq!(bench.lends(), abi::CTRL_OK);
        let (generation, lent) = (bench.published.1, bench.lent());
        bench.forget();

        bench.guest_unmaps(BUFFERS, 2 * PAGE);
        bench.work();
        assert!(bench.owner_reply.is_none() && unmaps(&bench) == 0);
        assert!(bench.is_up() && bench.published.1 == generation, "the vrings go on");
        assert!(bench.trace.iter().any(|effect| matches!(effect, Effect::NotifyPeer(_))));
        assert!(!bench.shows(BUFFERS) && bench.held(BUFFERS));
        assert_eq!(bench.releases(), abi::CTRL_OK);
        bench.work();
        assert!(bench.owner_reply.is_some() && !bench.held(BUFFERS));
        assert!(bench.lent() < lent, "the rings are lent still");

        // What comes interrupts nobody and waits for nobody.
        bench.forget();
        bench.guest_maps(4..5, RW);
        let mapped = bench.map(BUFFERS + 4 * PAGE, PAGE, 3);
        assert_eq!(bench.status(mapped), abi::CTRL_OK);
        assert!(!bench.trace.iter().any(|effect| matches!(effect, Effect::NotifyPeer(_))));
        assert_eq!(bench.report().counters.releases_asked, 1);
    }
}
