//! The program between two owners, on two devices made of memory: what owners and links can do to
//! it.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use guest_driver_model::net::{
    NetHeader, OwnerConfig, OwnerPort, Packet, PacketBurst, receive_vring, transmit_vring,
};
use guest_driver_model::programs::ProgramError;
use guest_driver_model::programs::forward::{ForwardArgs, run_on, run_until};
use guest_driver_model::programs::run::RunArgs;
use guest_driver_model::programs::stop::Stop;
use guest_driver_model::programs::traffic::Traffic;
use guest_driver_model::programs::waiting::{Wait, WaitArgs};
use guest_driver_model::transport::Transport;
use net_support::frame;
use net_support::side::{Side, beside};
use vhost_pci_device::abi;

/// Sends frames by a pair of one owner, and takes them from a pair of the other.
fn cross(
    (one, from, pair): (&Side, &mut OwnerPort, u16),
    (other, to, to_pair): (&Side, &mut OwnerPort, u16),
    count: u64,
) {
    let frames: Vec<_> = (0..count).map(|seed| frame(seed, 60 + seed as usize)).collect();
    let (mut sent, mut burst) = (0, PacketBurst::default());
    let deadline = Instant::now() + Duration::from_secs(20);
    while burst.len() < frames.len() {
        sent += from.tx_burst(pair, frames.iter().skip(sent).map(Vec::as_slice)).unwrap();
        one.kick(from, transmit_vring(pair));
        to.rx_burst(to_pair, &mut burst, 64).unwrap();
        other.kick(to, 2 * to_pair);
        assert!(Instant::now() < deadline, "{} of {sent} packets came", burst.len());
        thread::yield_now();
    }
    assert!(burst.frames().eq(frames.iter().map(Vec::as_slice)));
}

/// Runs the program while `test` plays the owners.
fn run(wait: Wait, sides: [&Side; 2], test: impl FnOnce()) -> Traffic {
    let args = ForwardArgs {
        run: RunArgs { wait: WaitArgs { wait, idle_us: 0 }, ..RunArgs::default() },
        ..ForwardArgs::default()
    };
    let program = |stop: &Stop| run_on(sides.map(|side| &side.device as &dyn Transport), &args, stop);
    let (result, traffic) = beside(&sides, program, test);
    result.unwrap();
    traffic
}

const WAITS: [Wait; 3] = [Wait::Poll, Wait::Interrupt, Wait::Adaptive(Duration::from_micros(20))];

#[test]
fn packets_pass_both_ways_and_either_owner_may_start_late_and_again() {
    let config = OwnerConfig { ring_size: 64, ..OwnerConfig::default() };
    for wait in WAITS {
        let (left, right) = (Side::new(config), Side::new(OwnerConfig { mergeable: false, ..config }));
        let traffic = run(wait, [&left, &right], || {
            let mut one = left.start(2);
            thread::sleep(Duration::from_millis(5));
            let mut other = right.start(2);
            cross((&left, &mut one, 0), (&right, &mut other, 0), 200);
            cross((&right, &mut other, 0), (&left, &mut one, 0), 200);
            // What is sent while the other one is away waits for it.
            right.show(4, 0);
            thread::sleep(Duration::from_millis(5));
            let waiting = frame(7, 99);
            assert_eq!(one.tx_burst(0, [waiting.as_slice()]), Ok(1));
            left.kick(&mut one, 1);
            thread::sleep(Duration::from_millis(5));
            assert_eq!(one.reap_transmitted(0), Ok(1));
            let mut other = right.start(6);
            let (mut burst, start) = (PacketBurst::default(), Instant::now());
            while other.rx_burst(0, &mut burst, 8).unwrap() == 0 {
                assert!(start.elapsed() < Duration::from_secs(20));
                thread::yield_now();
            }
            assert_eq!(burst.packet(0).unwrap().frame, waiting);
            left.show(4, 0);
            thread::sleep(Duration::from_millis(5));
            let mut one = left.start(6);
            cross((&left, &mut one, 0), (&right, &mut other, 0), 200);
            cross((&right, &mut other, 0), (&left, &mut one, 0), 200);
        });
        assert_eq!((traffic.rx_packets, traffic.tx_packets, traffic.dropped), (801, 801, 0));
        assert_eq!(traffic.copied_bytes, Some(traffic.tx_bytes));
        assert_eq!((traffic.links, traffic.faults, traffic.rescued), (4, 0, 0));
        assert!(wait == Wait::Poll || traffic.sleeps > 0);
    }
}

#[test]
fn pairs_pass_to_those_that_the_other_owner_has() {
    let config = OwnerConfig { ring_size: 64, ..OwnerConfig::default() };
    let (left, right) =
        (Side::new(OwnerConfig { pairs: 3, ..config }), Side::new(OwnerConfig { pairs: 2, ..config }));
    let traffic = run(Wait::Interrupt, [&left, &right], || {
        let (mut one, mut other) = (left.start(2), right.start(2));
        for (pair, to) in [(0, 0), (1, 1), (2, 0)] {
            cross((&left, &mut one, pair), (&right, &mut other, to), 50);
        }
        for pair in [1, 0] {
            cross((&right, &mut other, pair), (&left, &mut one, pair), 50);
        }
    });
    assert_eq!((traffic.rx_packets, traffic.tx_packets), (250, 250));
}

/// What one's VMM is asked it does not answer, or says after a long time that it cannot. The program sees to the
/// other's link meanwhile: if it waited, this would take longer than anybody has patience.
#[test]
fn a_vmm_that_does_not_answer_keeps_nobody_from_the_other_link() {
    let config = OwnerConfig { ring_size: 64, ..OwnerConfig::default() };
    let (left, right) = (Side::behind_iommu(config), Side::new(config));
    let bytes = frame(1, 60);
    let traffic = run(Wait::Poll, [&left, &right], || {
        let (mut one, mut other) = (left.start(2), right.start(2));
        let (start, most) = (Instant::now(), Duration::from_secs(20));
        let wait_until = |done: &dyn Fn() -> bool, what: &str| {
            while !done() {
                assert!(start.elapsed() < most, "{what}");
                thread::yield_now();
            }
        };
        assert_eq!(one.tx_burst(0, [bytes.as_slice()]), Ok(1));
        for _ in 0..8 {
            wait_until(&|| left.device.asked() > 0, "it is not asked");
            let looks = right.device.looks.load(Ordering::Relaxed);
            wait_until(&|| right.device.looks.load(Ordering::Relaxed) > looks + 20, "nobody looks");
            assert!(left.device.asked() > 0, "nobody has answered");
            left.device.answer(abi::CTRL_FAILED);
        }
        // It is found when its VMM answers, after all.
        left.show_all(2);
        left.device.answer(abi::CTRL_OK);
        let mut burst = PacketBurst::default();
        while other.rx_burst(0, &mut burst, 8).unwrap() == 0 {
            assert!(start.elapsed() < most, "it does not come");
            thread::yield_now();
        }
        assert_eq!(burst.packet(0).unwrap().frame, bytes);
    });
    assert_eq!((traffic.rx_packets, traffic.dropped, traffic.faults), (1, 0, 0));
}

/// A ring that stands still, because nobody takes what is in it, is waited for, not looked at; and
/// what it is to take is not lost.
#[test]
fn an_owner_without_room_is_slept_for() {
    let config = OwnerConfig { ring_size: 16, ..OwnerConfig::default() };
    let (left, right) = (Side::new(config), Side::new(config));
    let traffic = run(Wait::Interrupt, [&left, &right], || {
        let (mut one, mut other) = (left.start(2), right.start(2));
        let frames: Vec<_> = (0..24).map(|seed| frame(seed, 60)).collect();
        let (mut sent, mut burst, start) = (0, PacketBurst::default(), Instant::now());
        while sent < 24 {
            sent += one.tx_burst(0, frames.iter().skip(sent).map(Vec::as_slice)).unwrap();
            left.kick(&mut one, 1);
            assert!(start.elapsed() < Duration::from_secs(20), "{sent}");
            thread::yield_now();
        }
        // 16 are with the other owner, which takes none.
        thread::sleep(Duration::from_millis(50));
        assert_eq!(one.reap_transmitted(0), Ok(8));
        while burst.len() < 24 {
            other.rx_burst(0, &mut burst, 64).unwrap();
            right.kick(&mut other, 0);
            assert!(start.elapsed() < Duration::from_secs(20), "{}", burst.len());
            thread::yield_now();
        }
        assert!(burst.frames().eq(frames.iter().map(Vec::as_slice)));
    });
    assert_eq!((traffic.tx_packets, traffic.dropped, traffic.rescued), (24, 0, 0));
    assert!(traffic.sleeps < 100, "{}", traffic.sleeps);
    assert_eq!(traffic.sleeps, traffic.notified, "nobody waited for the clock");
}

/// Has more packets sent by a pair than the other owner, who takes none, has room for.
fn fill((side, owner, pair): (&Side, &mut OwnerPort, u16), packets: &[Packet<'_>], room: u32) {
    let (mut sent, start) = (0, Instant::now());
    while sent < packets.len() {
        sent += owner.tx_burst(pair, packets.iter().skip(sent).copied()).unwrap();
        side.kick(owner, transmit_vring(pair));
        assert!(start.elapsed() < Duration::from_secs(20), "{sent}");
        thread::yield_now();
    }
    // All others stay with their owner.
    let left = packets.len() as u32 - room;
    while owner.reap_transmitted(pair).map(u32::from) != Ok(left) {
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", owner.reap_transmitted(pair));
        thread::yield_now();
    }
}

/// The program sleeps, although there are packets that it cannot move.
#[track_caller]
fn assert_asleep(side: &Side) {
    let looks = || side.device.looks.load(Ordering::Relaxed);
    // What has just been done to it is over.
    thread::sleep(Duration::from_millis(50));
    let before = looks();
    thread::sleep(Duration::from_millis(200));
    let looked = looks() - before;
    // Some for each look at the clock; by the thousand if it does not sleep.
    assert!(looked < 50, "{looked} looks in a moment in which nothing can move");
}

fn plain(frame: &[u8]) -> Packet<'_> {
    Packet { header: NetHeader::default(), frame }
}

/// More buffers than the program takes at a time: some are left for it to see.
const LONG: OwnerConfig = OwnerConfig {
    pairs: 1,
    ring_size: 128,
    buffer_len: 1600,
    mergeable: true,
    indirect: false,
    event_idx: true,
    packed: false,
    in_order: false,
    offloads: false,
};

/// What was waited for by a pair that its owner came back without is waited for no more.
#[test]
fn a_pair_that_an_owner_no_longer_has_does_not_keep_the_program_awake() {
    let config = OwnerConfig { ring_size: 16, ..OwnerConfig::default() };
    let (left, right) = (Side::new(OwnerConfig { pairs: 2, ..config }), Side::new(LONG));
    let traffic = run(Wait::Interrupt, [&left, &right], || {
        let (mut one, mut other) = (left.start(2), right.start(2));
        let bytes = frame(1, 60);
        fill((&left, &mut one, 1), &[plain(&bytes); 136], 128);
        assert_asleep(&left);
        left.show(4, 0);
        thread::sleep(Duration::from_millis(50));
        let mut one = left.start_as(config, 6, 2);
        let mut burst = PacketBurst::default();
        assert_eq!(other.rx_burst(0, &mut burst, 128), Ok(128));
        right.kick(&mut other, receive_vring(0));
        cross((&left, &mut one, 0), (&right, &mut other, 0), 50);
        assert_asleep(&left);
    });
    assert_eq!((traffic.rx_packets, traffic.tx_packets, traffic.dropped), (178, 178, 0));
}

/// Nor is room waited for where it is of no use, nor packets that nobody can take.
#[test]
fn room_in_another_pair_does_not_keep_the_program_awake() {
    let config = OwnerConfig { ring_size: 16, pairs: 2, ..OwnerConfig::default() };
    let (left, right) = (Side::new(config), Side::new(OwnerConfig { pairs: 2, ..LONG }));
    let traffic = run(Wait::Interrupt, [&left, &right], || {
        let (mut one, mut other) = (left.start(2), right.start(2));
        let bytes = frame(1, 60);
        fill((&left, &mut one, 1), &[plain(&bytes); 136], 128);
        assert_asleep(&left);
        cross((&left, &mut one, 0), (&right, &mut other, 0), 50);
        let mut burst = PacketBurst::default();
        while burst.len() < 136 {
            other.rx_burst(1, &mut burst, 64).unwrap();
            right.kick(&mut other, receive_vring(1));
            thread::yield_now();
        }
    });
    assert_eq!((traffic.rx_packets, traffic.tx_packets, traffic.rescued), (186, 186, 0));
}

#[test]
fn packets_that_no_queue_can_take_do_not_keep_the_program_awake() {
    let config = OwnerConfig { ring_size: 16, ..OwnerConfig::default() };
    for broken in [false, true] {
        let (left, right) = (Side::new(config), Side::new(config));
        let traffic = run(Wait::Interrupt, [&left, &right], || {
            // One whose driver uses no queue; or that writes an index into it that cannot be.
            let (mut one, _) = (left.start(2), right.start_as(config, 2, if broken { 2 } else { 0 }));
            if broken {
                let avail = right.layout.vrings()[0].places.avail;
                right.views.owner.store_u16_release(avail + 2, 40_000).unwrap();
            }
            thread::sleep(Duration::from_millis(50));
            let bytes = frame(1, 60);
            fill((&left, &mut one, 0), &[plain(&bytes); 4], 0);
            assert_asleep(&left);
            let mut other = right.start_as(config, 6, 2);
            let mut burst = PacketBurst::default();
            let start = Instant::now();
            while burst.len() < 4 {
                other.rx_burst(0, &mut burst, 64).unwrap();
                assert!(start.elapsed() < Duration::from_secs(20));
                thread::yield_now();
            }
        });
        assert_eq!((traffic.tx_packets, traffic.dropped, traffic.faults), (4, 0, u64::from(broken)));
    }
}

/// Packets whose checksum the other owner wants whole are taken before there is room for them. They
/// go with the pair, and with the link, that they were held for, and are counted.
#[test]
fn what_is_held_for_a_pair_or_an_owner_that_is_gone_is_dropped_and_counted() {
    let config = OwnerConfig { ring_size: 64, offloads: true, pairs: 2, ..OwnerConfig::default() };
    let sink = OwnerConfig { ring_size: 16, pairs: 1, offloads: false, ..config };
    let header = NetHeader { flags: 1, csum_start: 34, csum_offset: 16, ..NetHeader::default() };
    for by_pair in [true, false] {
        let (left, right) = (Side::new(config), Side::new(sink));
        let traffic = run(Wait::Interrupt, [&left, &right], || {
            let (mut one, mut other) = (left.start(2), right.start(2));
            let bytes = frame(1, 60);
            fill((&left, &mut one, 1), &[Packet { header, frame: &bytes }; 24], 24);
            assert_asleep(&left);
            if by_pair {
                one = left.start_as(OwnerConfig { pairs: 1, ..config }, 6, 2);
                let mut burst = PacketBurst::default();
                assert_eq!(other.rx_burst(0, &mut burst, 64), Ok(16));
                right.kick(&mut other, receive_vring(0));
            } else {
                // It is gone and there again before anybody looks.
                other = right.start(6);
                assert_asleep(&left);
                assert_eq!(other.rx_burst(0, &mut PacketBurst::default(), 64), Ok(0));
            }
            cross((&left, &mut one, 0), (&right, &mut other, 0), 50);
            // Nor do they come when it has that pair again.
            let mut one = left.start(10);
            cross((&left, &mut one, 1), (&right, &mut other, 0), 50);
        });
        assert_eq!((traffic.rx_packets, traffic.tx_packets, traffic.dropped), (124, 116, 8), "{by_pair}");
    }
}

/// A broken vring is told of once, and the other direction goes on.
#[test]
fn an_owner_that_breaks_a_ring_keeps_the_other_direction() {
    let config = OwnerConfig { ring_size: 64, ..OwnerConfig::default() };
    let (left, right) = (Side::new(config), Side::new(config));
    let traffic = run(Wait::Adaptive(Duration::ZERO), [&left, &right], || {
        let (mut one, mut other) = (left.start(2), right.start(2));
        cross((&left, &mut one, 0), (&right, &mut other, 0), 50);
        let avail = left.layout.vrings()[1].places.avail;
        left.views.owner.store_u16_release(avail + 2, 40_000).unwrap();
        left.device.interrupt.write(1).unwrap();
        for _ in 0..5 {
            cross((&right, &mut other, 0), (&left, &mut one, 0), 50);
        }
        left.show(4, 0);
        thread::sleep(Duration::from_millis(5));
        let mut one = left.start(6);
        cross((&left, &mut one, 0), (&right, &mut other, 0), 50);
    });
    assert_eq!((traffic.tx_packets, traffic.faults, traffic.links), (350, 1, 3));
}

#[test]
fn two_devices_are_asked_for() {
    let result = run_until(&ForwardArgs::default(), &Stop::default());
    assert!(matches!(result, Err(ProgramError::NotTwo { given: 0 })));
}
