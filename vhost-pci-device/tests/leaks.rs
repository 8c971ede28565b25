//! Nothing stays registered, mapped or open: one test, so that nobody else opens descriptors.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::os::fd::AsFd;

use support::broker::{NOTIFY, ON, SHMEM_MAP, SHMEM_UNMAP, WIRE, ask, longs};
use support::sys::borrow;
use support::{Bench, PAGE, VRINGS, descriptors, eventually, file};
use vmm_sys_util::eventfd::EventFd;

const ROUNDS: usize = 1000;
const DATA: u64 = 2 << 20;

#[test]
fn no_descriptor_registration_or_mapping_outlives_what_it_was_for() {
    // What the test's own libraries keep is there before anything is counted.
    drop(Bench::started());
    let none = descriptors();
    let bench = Bench::started();
    let memory = file(4 * PAGE);
    let before = descriptors();

    impossible_requests(&bench);
    assert_eq!(descriptors(), before);

    bench.guest.set_status(0);
    let stopped = descriptors();
    bench.broker.wait_until_stopped();
    bench.start();
    assert_eq!(descriptors(), before);

    for round in 0..ROUNDS {
        let events: Vec<EventFd> = (0..4).map(|_| EventFd::new(0).unwrap()).collect();
        for (queue, pair) in (1..=u32::from(VRINGS)).zip(events.chunks(2)) {
            assert!(bench.broker.wire(queue, ON, &[borrow(&pair[0])]));
            assert!(bench.broker.wire(queue, ON | NOTIFY, &[borrow(&pair[1])]));
        }
        assert!(bench.broker.map(DATA, 4 * PAGE, &memory, 0, true));
        assert_eq!(bench.vmm.registered(), (usize::from(VRINGS) * 2 + 2, usize::from(VRINGS) + 1));
        match round % 2 {
            0 => bench.guest.set_status(0),
            _ => bench.guest.flr(),
        }
        assert_eq!(bench.vmm.registered(), (0, 0), "round {round}");
        drop(events);
        assert_eq!(descriptors(), stopped, "round {round}");
        bench.broker.wait_until_stopped();
        bench.start();
        eventually("the start is settled", || bench.broker.map(DATA + 8 * PAGE, PAGE, &memory, 0, true));
        bench.broker.take_told();
    }

    // Connections come and go.
    for round in 1..6 {
        bench.broker.die(false);
        eventually("another connection", || bench.broker.connections() == round + 1);
        bench.broker.wait_until_started(VRINGS + 1);
    }
    eventually("the old connections' threads end", || descriptors() <= before);

    let vmm = bench.vmm.clone();
    drop((bench, memory));
    assert_eq!(vmm.registered(), (0, 0));
    assert!(vmm.slots().is_empty() && vmm.traps().is_empty());
    drop(vmm);
    eventually("everything is closed", || descriptors() == none);
}

fn impossible_requests(bench: &Bench) {
    let channel = bench.broker.channel();
    let memory = file(PAGE);
    let fd = memory.as_fd();
    let map = |flags: u64| longs(&[0, 0, DATA, PAGE, flags]);
    let wire = |queue: u32, flags: u32| [queue.to_ne_bytes(), flags.to_ne_bytes()].concat();
    for _ in 0..100 {
        for (code, payload, fds, why) in [
            (SHMEM_MAP, map(1), vec![], "a mapping of nothing"),
            (SHMEM_MAP, map(1), vec![fd, fd], "a mapping of two files"),
            (SHMEM_MAP, map(1), vec![fd; 8], "a mapping of eight files"),
            (SHMEM_MAP, map(3), vec![fd], "an unknown flag"),
            (SHMEM_MAP, longs(&[1, 0, DATA, PAGE, 1]), vec![fd], "another region"),
            (SHMEM_UNMAP, map(0), vec![fd], "an unmapping with a file"),
            (WIRE, wire(1, ON), vec![], "a wire without descriptor"),
            (WIRE, wire(1, ON), vec![fd, fd], "a wire with two"),
            (WIRE, wire(1, 0), vec![fd], "the end of a wire with one"),
            (WIRE, wire(1, 4), vec![], "an unknown flag"),
            (WIRE, wire(1, ON), vec![fd], "a wire of a file"),
            (WIRE, wire(1, ON | NOTIFY), vec![fd], "a wire of a file"),
            (WIRE, wire(u32::from(VRINGS) + 1, 0), vec![], "no such queue"),
            (WIRE, wire(u32::MAX, ON), vec![fd], "no such queue"),
        ] {
            assert!(!ask(&channel, code, &payload, &fds).unwrap(), "{why}");
        }
    }
}
