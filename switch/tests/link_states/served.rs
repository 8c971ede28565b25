//! A driver that says what it serves completes the burst that it is in the middle of in a window that is there.

use std::time::Duration;

use vhost_pci_device::abi;
use vhost_pci_switch::link::message::{Reply, WindowOp};
use vhost_pci_switch::link::{Effect, Side};

use crate::bench::{Bench, REGIONS, TIMEOUT};
use crate::front_end::Ask;

/// A link whose driver says what it serves, or not, and does not stop.
fn serving(flags: u32) -> Bench {
    let mut bench = Bench::up();
    let request = abi::ControlRequest {
        command: abi::CTRL_ATTACH.into(),
        flags: flags.into(),
        value: bench.published.1.into(),
        ..Default::default()
    };
    let (status, effects) = bench.command(&request);
    bench.run(effects);
    assert_eq!(status, abi::CTRL_OK);
    bench.serves_on = true;
    bench.forget();
    bench
}

fn unmaps(bench: &Bench) -> usize {
    bench.trace.iter().filter(|effect| matches!(effect, Effect::Window(_, WindowOp::Unmap(_)))).count()
}

#[test]
fn nothing_leaves_the_window_while_the_driver_serves_the_link_that_has_ended() {
    for ask in [Ask::Stop(0), Ask::RemoveRegion(REGIONS[1])] {
        let mut bench = serving(abi::ATTACH_F_SERVED);
        bench.owner(ask);
        bench.work();
        assert_eq!((unmaps(&bench), bench.owner_reply.is_none(), bench.is_up()), (0, true, false));
        bench.serves_on = false;
        bench.look();
        bench.work();
        assert!(unmaps(&bench) > 0 && bench.owner_reply.is_some());
    }
}

#[test]
fn a_driver_that_was_killed_while_it_served_holds_nobody_up_for_long() {
    let mut bench = serving(abi::ATTACH_F_SERVED);
    bench.owner(Ask::Stop(0));
    bench.wait(TIMEOUT / 5 - Duration::from_millis(1));
    bench.work();
    assert!(bench.owner_reply.is_none());
    bench.wait(Duration::from_millis(1));
    bench.work();
    assert!(matches!(bench.owner_reply, Some(Reply::VringBase(_))));
    // An owner that leaves: the same.
    let mut bench = serving(abi::ATTACH_F_SERVED);
    bench.leave(Side::Owner);
    bench.work();
    assert_eq!((unmaps(&bench), bench.vmm.owner_ranges().count()), (0, 2));
    bench.wait(TIMEOUT / 5);
    bench.work();
    assert_eq!(bench.vmm.owner_ranges().count(), 0);
}

#[test]
fn a_driver_that_says_nothing_is_not_looked_at() {
    let mut bench = serving(0);
    bench.owner(Ask::Stop(0));
    bench.work();
    assert!(matches!(bench.owner_reply, Some(Reply::VringBase(_))));
    assert!(!bench.trace.iter().any(|effect| matches!(effect, Effect::WatchServed(_))));
}
