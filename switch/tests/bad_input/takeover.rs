//! An owner with an IOMMU that is migrated, and what was asked of the VMM that no longer has the link.

use std::thread;
use std::time::Duration;

use vhost_pci_device::abi;

use crate::bench::Bench;
use crate::iommu::{ends, up};
use crate::iommu_owner::{BEHIND, BUFFERS, PAGE, answer, next_miss, update};
use crate::raw::{IOTLB_MSG, Raw, longs, memfd};

#[test]
fn a_miss_that_is_answered_after_the_link_was_taken_over_keeps_no_later_one_from_being_asked() {
    let bench = Bench::start();
    let (mut source, mut channel, mut peer) = up(&bench);
    let fetch = peer.gives(abi::CTRL_FETCH, BUFFERS, 64);
    assert_eq!(next_miss(&mut channel).0, BUFFERS);
    source.owner_stops();
    assert_ne!(peer.status(fetch), abi::CTRL_OK);
    let (destination, destinations) = Raw::asked_owner(&bench.left().0, memfd());
    bench.wait_until("taken over", |report| report.counters.takeovers == 1 && report.state == "up");
    answer(&channel, &longs(&[1]));
    // It comes while the source waits, or at least is to; where it comes later nothing else follows.
    thread::sleep(Duration::from_millis(100));
    drop((destination, destinations));
    bench.wait_until("the source's again", |report| report.waiting_owner.is_none() && report.state != "up");
    source.start_at_iovas();
    source.tells_rings(&mut channel);
    bench.wait_until("up again", |report| report.state == "up");
    let fetch = peer.gives(abi::CTRL_FETCH, BUFFERS, 64);
    assert_eq!(next_miss(&mut channel).0, BUFFERS);
    assert!(source.done(IOTLB_MSG, &update(BUFFERS, PAGE, BEHIND), &[]));
    answer(&channel, &longs(&[0]));
    assert_eq!(peer.status(fetch), abi::CTRL_OK);
    assert!(bench.faults().is_empty());
    ends(&bench, source, peer);
}
