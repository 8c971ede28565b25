//! Everything at once: a guest that resets, a broker that maps, wires and dies, vCPUs that use the
//! window and ring.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use support::broker::{NOTIFY, ON, SHMEM_MAP, SHMEM_UNMAP, WIRE, ask, longs};
use support::sys::borrow;
use support::{Bench, HALF, PAGE, VRINGS, eventually, file};
use vmm_sys_util::eventfd::EventFd;

const DATA: u64 = 2 << 20;
const TIME: Duration = Duration::from_secs(2);

#[test]
fn a_revoked_range_is_written_no_more_and_no_load_ever_finds_a_hole() {
    let bench = Bench::started();
    let memory = file(PAGE);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let (guest, stop) = (&bench.guest, &stop);
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                guest.window_store(DATA, u64::MAX).unwrap();
                guest.window_load(DATA).unwrap();
                guest.window_load(HALF + DATA).unwrap();
            }
        });
        let end = Instant::now() + TIME;
        while Instant::now() < end {
            assert!(bench.broker.map(DATA, PAGE, &memory, 0, true));
            assert!(bench.broker.map(HALF + DATA, PAGE, &memory, 0, false));
            assert!(bench.broker.unmap(DATA, PAGE));
            rustix::io::pwrite(&memory, &[7; 8], 0).unwrap();
            let mut bytes = [0; 8];
            for _ in 0..20 {
                rustix::io::pread(&memory, &mut bytes[..], 0).unwrap();
                assert_eq!(bytes, [7; 8]);
            }
            assert!(bench.broker.unmap(HALF + DATA, PAGE));
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn resets_requests_and_lost_brokers_at_once_end_in_a_device_that_works() {
    let bench = Bench::started();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let (bench, stop) = (&bench, &stop);
        scope.spawn(move || {
            let memory = file(64 * PAGE);
            let event = EventFd::new(0).unwrap();
            let fd = borrow(&event);
            for round in 0_u64.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let Some(channel) = bench.broker.try_channel() else {
                    thread::yield_now();
                    continue;
                };
                let offset = DATA + round % 64 * PAGE;
                let queue = (round % (u64::from(VRINGS) + 1)) as u32;
                let wire = |flags: u32| [queue.to_ne_bytes(), flags.to_ne_bytes()].concat();
                // Whatever is answered, or whether.
                let _ = ask(&channel, SHMEM_MAP, &longs(&[0, 0, offset, PAGE, 1]), &[memory.as_fd()]);
                let _ = ask(&channel, WIRE, &wire(ON | (round as u32 & NOTIFY)), &[fd]);
                if round % 3 == 0 {
                    let _ = ask(&channel, SHMEM_UNMAP, &longs(&[0, 0, offset, PAGE, 0]), &[]);
                }
            }
        });
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(150));
                bench.broker.die(false);
            }
        });
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                for page in 0..64 {
                    bench.guest.window_load(DATA + page * PAGE).unwrap();
                }
                bench.guest.pending();
                thread::yield_now();
            }
        });
        let end = Instant::now() + TIME;
        let mut longest = Duration::ZERO;
        while Instant::now() < end {
            let before = Instant::now();
            bench.guest.set_status(0);
            longest = longest.max(before.elapsed());
            assert_eq!(bench.vmm.registered(), (0, 0));
            for page in 0..64 {
                assert_eq!(bench.guest.window_load(DATA + page * PAGE), Ok(0));
            }
            bench.guest.start();
            thread::sleep(Duration::from_millis(2));
        }
        assert!(longest < Duration::from_secs(1), "a reset took {longest:?}");
        stop.store(true, Ordering::Relaxed);
    });
    bench.guest.set_status(0);
    bench.guest.start();
    let memory = file(PAGE);
    eventually("the window of the next broker", || {
        let range = longs(&[0, 0, DATA + 128 * PAGE, PAGE, 1]);
        let ask = |channel: UnixStream| ask(&channel, SHMEM_MAP, &range, &[memory.as_fd()]);
        bench.broker.try_channel().map(ask).is_some_and(|answer| answer.unwrap_or(false))
    });
    assert_eq!(bench.guest.window_load(DATA + 128 * PAGE), Ok(1));
}
