//! The learning switch between many owners, on devices made of memory: what owners, links and cables can do to
//! it.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use guest_driver_model::net::{
    NetHeader, OwnerConfig, OwnerPort, Packet, PacketBurst, receive_vring, transmit_vring,
};
use guest_driver_model::programs::ProgramError;
use guest_driver_model::programs::bridge::counters::PortReport;
use guest_driver_model::programs::bridge::{BridgeArgs, run_until, run_with};
use guest_driver_model::programs::run::RunArgs;
use guest_driver_model::programs::stop::Stop;
use guest_driver_model::programs::traffic::Traffic;
use guest_driver_model::programs::waiting::{Wait, WaitArgs};
use guest_driver_model::transport::sysfs::Kind;
use guest_driver_model::transport::{Transport, TransportError};
use net_support::frame;
use net_support::side::{Opened, Side, beside};
use vhost_pci_device::abi;

const PATIENCE: Duration = Duration::from_secs(20);
const WAITS: [Wait; 3] = [Wait::Poll, Wait::Interrupt, Wait::Adaptive(Duration::from_micros(20))];
const ALL: [u8; 6] = [0xff; 6];
const CONFIG: OwnerConfig = OwnerConfig {
    pairs: 1,
    ring_size: 256,
    buffer_len: 2048,
    mergeable: true,
    indirect: false,
    event_idx: true,
    packed: false,
    in_order: false,
    offloads: false,
};

fn args(wait: Wait) -> BridgeArgs {
    let run = RunArgs { wait: WaitArgs { wait, idle_us: 0 }, ..RunArgs::default() };
    BridgeArgs { run, ..BridgeArgs::default() }
}

/// Runs the program while `test` plays the owners.
fn run(args: &BridgeArgs, sides: &[&Side], test: impl FnOnce()) -> (Traffic, Vec<PortReport>) {
    run_plugged(args, sides, &|_| true, test)
}

/// The same, where a device can be had when it is plugged.
fn run_plugged(
    args: &BridgeArgs,
    sides: &[&Side],
    is_plugged: &(dyn Fn(usize) -> bool + Sync),
    test: impl FnOnce(),
) -> (Traffic, Vec<PortReport>) {
    let open = |port: usize| -> Result<Box<dyn Transport + '_>, ProgramError> {
        match is_plugged(port) {
            true => Ok(Box::new(Opened::of(sides[port]))),
            false => Err(TransportError::NotFound { kind: Kind::VhostPci, tried: Vec::new() }.into()),
        }
    };
    let names = (0..sides.len()).map(|port| port.to_string()).collect();
    let program = |stop: &Stop| run_with(names, &open, args, stop);
    let (result, traffic, ports) = beside(sides, program, test);
    result.unwrap();
    (traffic, ports)
}

fn station(number: u8) -> [u8; 6] {
    [0x02, 0, 0, 0, 0, number]
}

/// A frame of a station, whose bytes tell it from others.
fn from_to(from: u8, to: [u8; 6], seed: u64, len: usize) -> Vec<u8> {
    let mut frame = frame(seed, len);
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&station(from));
    frame
}

/// An owner at work.
struct Owner<'a> {
    side: &'a Side,
    port: OwnerPort,
    received: Vec<Vec<u8>>,
}

impl<'a> Owner<'a> {
    fn start(side: &'a Side, generation: u64) -> Self {
        Self { side, port: side.start(generation), received: Vec::new() }
    }

    fn send(&mut self, frames: &[Vec<u8>]) {
        let (mut sent, start) = (0, Instant::now());
        while sent < frames.len() {
            sent += self.port.tx_burst(0, frames.iter().skip(sent).map(Vec::as_slice)).unwrap();
            self.side.kick(&mut self.port, transmit_vring(0));
            assert!(start.elapsed() < PATIENCE, "{sent} of {} are sent", frames.len());
            thread::yield_now();
        }
        while self.port.reap_transmitted(0) != Ok(0) {
            assert!(start.elapsed() < PATIENCE, "a packet stays where it is");
            thread::yield_now();
        }
    }

    fn receive(&mut self) {
        let mut burst = PacketBurst::default();
        self.port.rx_burst(0, &mut burst, 64).unwrap();
        self.side.kick(&mut self.port, receive_vring(0));
        self.received.extend(burst.frames().map(<[u8]>::to_vec));
    }

    /// What has come when so many are there; or more.
    fn take(&mut self, count: usize) -> Vec<Vec<u8>> {
        let start = Instant::now();
        while self.received.len() < count {
            self.receive();
            assert!(start.elapsed() < PATIENCE, "{} of {count} came", self.received.len());
            thread::yield_now();
        }
        std::mem::take(&mut self.received)
    }
}

/// Has each owner, whose station is of its number, say that it is there. All others hear that, once.
fn introduce(owners: &mut [Owner<'_>]) {
    for from in 0..owners.len() {
        let hello = vec![from_to(from as u8, ALL, 1000 + from as u64, 60)];
        owners[from].send(&hello);
        for (to, owner) in owners.iter_mut().enumerate() {
            if to != from {
                assert_eq!(owner.take(1), hello, "from {from} to {to}");
            }
        }
    }
}

/// Sends frames from one to another.
fn cross(owners: &mut [Owner<'_>], from: usize, to: usize, count: u64) {
    let frames: Vec<_> =
        (0..count).map(|seed| from_to(from as u8, station(to as u8), seed, 60 + seed as usize)).collect();
    for frames in frames.chunks(100) {
        owners[from].send(frames);
        assert_eq!(owners[to].take(frames.len()), frames, "from {from} to {to}");
    }
}

#[test]
fn frames_go_to_their_station_and_broadcasts_to_all_others_once() {
    for wait in WAITS {
        let sides =
            [CONFIG, OwnerConfig { mergeable: false, ..CONFIG }, OwnerConfig { packed: true, ..CONFIG }];
        let sides = sides.map(Side::new);
        let (traffic, ports) = run(&args(wait), &[&sides[0], &sides[1], &sides[2]], || {
            let mut owners: Vec<_> = sides.iter().map(|side| Owner::start(side, 2)).collect();
            thread::sleep(Duration::from_millis(20));
            introduce(&mut owners);
            for (from, to) in [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)] {
                cross(&mut owners, from, to, 150);
            }
            // Each has got what was for it, and nothing else.
            for owner in &mut owners {
                owner.receive();
                assert_eq!(owner.received.len(), 0);
            }
        });
        assert_eq!((traffic.rx_packets, traffic.tx_packets, traffic.dropped), (903, 906, 0));
        assert_eq!(traffic.copied_bytes, Some(traffic.tx_bytes), "one copy for each");
        assert_eq!((traffic.links, traffic.faults, traffic.rescued), (3, 0, 0));
        assert!(wait == Wait::Poll || traffic.sleeps > 0);
        for port in &ports {
            let counters = port.counters;
            assert_eq!(
                (counters.rx_packets, counters.tx_packets, counters.flooded),
                (301, 302, 1),
                "{port:?}"
            );
            assert_eq!((counters.learned, counters.moved, port.stations, port.up), (1, 0, 1, true));
        }
    }
}

#[test]
fn an_owner_that_takes_nothing_holds_up_nobody() {
    for wait in WAITS {
        let sides = [CONFIG, CONFIG, OwnerConfig { ring_size: 16, ..CONFIG }].map(Side::new);
        let (traffic, ports) = run(&args(wait), &[&sides[0], &sides[1], &sides[2]], || {
            let mut owners: Vec<_> = sides.iter().map(|side| Owner::start(side, 2)).collect();
            thread::sleep(Duration::from_millis(20));
            introduce(&mut owners);
            let frames: Vec<_> = (0..100).map(|seed| from_to(0, ALL, seed, 60)).collect();
            owners[0].send(&frames);
            assert_eq!(owners[1].take(100), frames);
            cross(&mut owners, 0, 1, 100);
            // What it had room for it has.
            assert_eq!(owners[2].take(16), frames[..16]);
            cross(&mut owners, 1, 2, 10);
        });
        assert_eq!((traffic.dropped, ports[2].counters.dropped.full), (84, 84));
        assert_eq!(traffic.rescued, 0);
    }
}

/// What the third one's VMM is asked it does not answer, or says after a long time that it cannot. Each time the
/// others go on: if they waited for it, this would take longer than anybody has patience.
#[test]
fn an_owner_whose_vmm_does_not_answer_holds_up_nobody() {
    for wait in WAITS {
        let sides = [Side::new(CONFIG), Side::new(CONFIG), Side::behind_iommu(CONFIG)];
        let device = &sides[2].device;
        let (traffic, ports) = run(&args(wait), &sides.each_ref(), || {
            let mut owners: Vec<_> = sides.iter().map(|side| Owner::start(side, 2)).collect();
            thread::sleep(Duration::from_millis(20));
            let start = Instant::now();
            for ask in 0..8 {
                while device.asked() == 0 {
                    for (from, to) in [(0, 1), (1, 0)] {
                        owners[from].send(&[from_to(from as u8, ALL, ask, 60)]);
                        assert_eq!(owners[to].take(1).len(), 1);
                    }
                    assert!(start.elapsed() < PATIENCE, "it is not asked");
                }
                cross(&mut owners, 0, 1, 50);
                cross(&mut owners, 1, 0, 50);
                assert!(device.asked() > 0, "nobody has answered");
                device.answer(abi::CTRL_FAILED);
            }
            assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
            // It is found when its VMM answers, after all.
            sides[2].show_all(2);
            device.answer(abi::CTRL_OK);
            let hello = from_to(0, ALL, 99, 60);
            while owners[2].received.is_empty() {
                owners[0].send(std::slice::from_ref(&hello));
                owners[2].receive();
                assert!(start.elapsed() < PATIENCE, "it gets nothing any more");
            }
            assert_eq!(owners[2].take(1)[0], hello);
        });
        assert_eq!((traffic.faults, traffic.links), (0, 3));
        assert!(traffic.put_off > 0 && ports[2].counters.dropped.full > 0, "{traffic:?} {ports:?}");
        assert_eq!(ports[0].counters.dropped.full, 0, "{ports:?}");
    }
}

/// An owner that starts anew, and one whose device is gone, cost the others nothing.
#[test]
fn links_and_devices_come_and_go_and_the_others_go_on() {
    for wait in WAITS {
        let sides = [CONFIG; 4].map(Side::new);
        let (traffic, ports) = run(&args(wait), &[&sides[0], &sides[1], &sides[2], &sides[3]], || {
            let mut owners: Vec<_> = sides.iter().map(|side| Owner::start(side, 2)).collect();
            thread::sleep(Duration::from_millis(20));
            introduce(&mut owners);
            sides[2].show(4, 0);
            thread::sleep(Duration::from_millis(20));
            cross(&mut owners, 0, 1, 100);
            // Its stations are forgotten: this is for all, and it is not there.
            owners[0].send(&[from_to(0, station(2), 1, 60)]);
            assert_eq!((owners[1].take(1).len(), owners[3].take(1).len()), (1, 1));
            owners[2] = Owner::start(&sides[2], 6);
            thread::sleep(Duration::from_millis(20));
            owners[0].send(&[from_to(0, ALL, 2, 60)]);
            (1..4).for_each(|to| assert_eq!(owners[to].take(1).len(), 1, "{to}"));
            owners[2].send(&[from_to(2, station(1), 2, 60)]);
            assert_eq!(owners[1].take(1).len(), 1);
            sides[3].device.gone.store(true, Ordering::Relaxed);
            sides[3].device.interrupt.write(1).unwrap();
            for (from, to) in [(0, 1), (1, 0), (0, 2), (2, 1)] {
                cross(&mut owners, from, to, 100);
            }
        });
        assert_eq!((traffic.dropped, traffic.faults, traffic.rescued), (0, 0, 0));
        // The others' sessions went on: no link came up anew but that of who had gone.
        assert_eq!(traffic.links, 5);
        assert_eq!(ports.iter().map(|port| port.up).collect::<Vec<_>>(), [true, true, true, false]);
        assert_eq!((ports[3].stations, ports[2].counters.learned), (0, 2));
    }
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Its window is in nobody's hands then, though nothing has come by another port since it sent.
#[test]
fn a_device_that_is_gone_is_let_go_at_once_with_all_that_is_mapped_of_it() {
    let sides = [CONFIG; 3].map(Side::new);
    run(&args(Wait::Interrupt), &sides.each_ref(), || {
        let mut owners: Vec<_> = sides.iter().map(|side| Owner::start(side, 2)).collect();
        thread::sleep(Duration::from_millis(20));
        introduce(&mut owners);
        cross(&mut owners, 2, 1, 1);
        // The owner's memory, its window, and the bridge's.
        assert_eq!(sides[2].views.mappings(), 3);
        sides[2].device.gone.store(true, Ordering::Relaxed);
        sides[2].device.interrupt.write(1).unwrap();
        wait_until("its window is held", || sides[2].views.mappings() == 2);
        assert_eq!(sides[2].device.opened.load(Ordering::Relaxed), 0);
    });
}

/// Each says so once: who was not looked after then would not be until the kernel says it again.
#[test]
fn two_devices_that_are_wanted_back_at_once_are_both_let_go() {
    let sides = [CONFIG; 4].map(Side::new);
    let (_, ports) = run(&args(Wait::Interrupt), &sides.each_ref(), || {
        let mut owners: Vec<_> = sides.iter().map(|side| Owner::start(side, 2)).collect();
        thread::sleep(Duration::from_millis(20));
        introduce(&mut owners);
        for wanted in [&sides[1], &sides[3]] {
            wanted.device.wanted.store(true, Ordering::Relaxed);
        }
        for side in [&sides[1], &sides[3]] {
            wait_until("it is kept", || side.device.opened.load(Ordering::Relaxed) == 0);
        }
        cross(&mut owners, 0, 2, 100);
        cross(&mut owners, 2, 0, 100);
    });
    assert_eq!(ports.iter().map(|port| port.up).collect::<Vec<_>>(), [true, false, true, false]);
    assert_eq!((ports[1].stations, ports[3].stations), (0, 0));
}

/// A bridge in a chain may be started before its links are plugged.
#[test]
fn a_device_that_is_not_there_yet_is_waited_for_if_that_is_asked_for() {
    let sides = [CONFIG; 3].map(Side::new);
    let is_plugged = AtomicBool::new(false);
    let opens = |port: usize| port != 1 || is_plugged.load(Ordering::Relaxed);
    let mut args = args(Wait::Interrupt);
    args.run.wait_for_device = true;
    run_plugged(&args, &sides.each_ref(), &opens, || {
        let mut owners: Vec<_> = sides.iter().map(|side| Owner::start(side, 2)).collect();
        let hello = [from_to(2, ALL, 1, 60)];
        wait_until("nothing goes on", || {
            owners[2].send(&hello);
            owners[0].receive();
            !owners[0].received.is_empty()
        });
        owners[0].send(&[from_to(0, ALL, 1, 60)]);
        owners[2].take(1);
        cross(&mut owners, 0, 2, 50);
        is_plugged.store(true, Ordering::Relaxed);
        wait_until("it is not found", || sides[1].device.opened.load(Ordering::Relaxed) == 1);
        let hello = [from_to(0, ALL, 2, 60)];
        wait_until("it gets nothing", || {
            owners[0].send(&hello);
            owners[1].receive();
            !owners[1].received.is_empty()
        });
    });
    // Otherwise its address is a mistake.
    args.run.wait_for_device = false;
    let open = |_| Err(TransportError::NotFound { kind: Kind::VhostPci, tried: Vec::new() }.into());
    let (result, ..) = run_with(vec!["0".to_owned()], &open, &args, &Stop::default());
    assert!(matches!(result, Err(ProgramError::Transport(TransportError::NotFound { .. }))));
}

/// What was sent by a link that is gone has taken its verdicts along: the packets of the next link go where they
/// are to go, and nowhere else.
#[test]
fn packets_of_a_new_link_go_nowhere_by_the_verdicts_of_the_old_one() {
    let (from, denied, open, other) =
        (Side::new(CONFIG), Side::behind_iommu(CONFIG), Side::behind_open_iommu(CONFIG), Side::new(CONFIG));
    let sides = [&from, &denied, &open, &other];
    let (traffic, _) = run(&args(Wait::Interrupt), &sides, || {
        let [mut sender, mut reader, mut receiver] = [&from, &open, &other].map(|side| Owner::start(side, 2));
        thread::sleep(Duration::from_millis(20));
        reader.send(&[from_to(2, ALL, 1, 60)]);
        assert_eq!((sender.take(1).len(), receiver.take(1).len()), (1, 1));
        receiver.send(&[from_to(3, ALL, 1, 60)]);
        assert_eq!((sender.take(1).len(), reader.take(1).len()), (1, 1));
        let _denied = Owner::start(&denied, 2);
        thread::sleep(Duration::from_millis(20));
        let (asks, asked) = mpsc::channel();
        let (go_on, goes_on) = mpsc::channel::<()>();
        *denied.device.on_control.lock().unwrap() = Some(Box::new(move || {
            if asks.send(()).is_ok() {
                let _ = goes_on.recv_timeout(PATIENCE);
            }
        }));
        let broadcast = from_to(0, ALL, 2, 60);
        assert_eq!(sender.port.tx_burst(0, [broadcast.as_slice()]), Ok(1));
        from.kick(&mut sender.port, transmit_vring(0));
        // While the second one's VMM is asked where its buffers are, the first one starts anew.
        asked.recv_timeout(PATIENCE).unwrap();
        assert!(denied.device.asked() > 0);
        let mut sender = Owner::start(&from, 4);
        let secret = from_to(0, station(3), 7, 99);
        assert_eq!(sender.port.tx_burst(0, [secret.as_slice()]), Ok(1));
        from.kick(&mut sender.port, transmit_vring(0));
        denied.device.answer(abi::CTRL_DENIED);
        drop((asked, go_on));
        assert_eq!(receiver.take(1), [secret]);
        reader.receive();
        assert_eq!(reader.received.len(), 0, "it was not for this one");
    });
    assert_eq!((traffic.faults, traffic.links), (1, 5));
}

#[test]
fn an_owner_that_breaks_a_ring_breaks_nobody_elses() {
    let sides = [CONFIG; 3].map(Side::new);
    let (traffic, ports) = run(&args(Wait::Interrupt), &[&sides[0], &sides[1], &sides[2]], || {
        let mut owners: Vec<_> = sides.iter().map(|side| Owner::start(side, 2)).collect();
        thread::sleep(Duration::from_millis(20));
        introduce(&mut owners);
        // Both of its rings.
        for vring in [0, 1] {
            let avail = sides[2].layout.vrings()[vring].places.avail;
            sides[2].views.owner.store_u16_release(avail + 2, 40_000).unwrap();
        }
        sides[2].device.interrupt.write(1).unwrap();
        // Some go into buffers that were posted before.
        for _ in 0..3 {
            owners[0].send(&(0..100).map(|seed| from_to(0, ALL, seed, 60)).collect::<Vec<_>>());
            assert_eq!(owners[1].take(100).len(), 100);
        }
        cross(&mut owners, 0, 1, 200);
        cross(&mut owners, 1, 0, 200);
    });
    let counters = ports[2].counters;
    assert_eq!((traffic.faults, counters.tx_packets + counters.dropped.no_link), (2, 302), "{ports:?}");
    assert!(counters.dropped.no_link > 0, "{counters:?}");
}

/// What one owner accepts another does not: the header passes, or the checksum is completed.
#[test]
fn owners_of_other_offloads_get_what_they_accept() {
    let with = OwnerConfig { offloads: true, ..CONFIG };
    let sides = [with, CONFIG, with].map(Side::new);
    let (traffic, _) = run(&args(Wait::Interrupt), &[&sides[0], &sides[1], &sides[2]], || {
        let mut owners: Vec<_> = sides.iter().map(|side| Owner::start(side, 2)).collect();
        thread::sleep(Duration::from_millis(20));
        introduce(&mut owners);
        let header = NetHeader { flags: 1, csum_start: 34, csum_offset: 16, ..NetHeader::default() };
        let bytes = from_to(0, ALL, 1, 100);
        assert_eq!(owners[0].port.tx_burst(0, [Packet { header, frame: &bytes }]), Ok(1));
        sides[0].kick(&mut owners[0].port, transmit_vring(0));
        for to in [1, 2] {
            let (mut burst, start) = (PacketBurst::default(), Instant::now());
            while owners[to].port.rx_burst(0, &mut burst, 8).unwrap() == 0 {
                assert!(start.elapsed() < PATIENCE);
                thread::yield_now();
            }
            let packet = burst.packet(0).unwrap();
            let passes = to == 2;
            assert_eq!((packet.header.flags, packet.frame == bytes), (u8::from(passes), passes));
            assert_eq!(packet.frame[..50], bytes[..50]);
        }
    });
    assert_eq!((traffic.tx_packets, traffic.dropped), (8, 0));
}

/// A cable: what comes out at one end goes in at the other.
fn carry(one: &mut Owner<'_>, other: &mut Owner<'_>) -> usize {
    fn one_way(from: &mut Owner<'_>, to: &mut Owner<'_>) -> usize {
        from.receive();
        let frames = std::mem::take(&mut from.received);
        // What the ring has no room for a cable does not carry either.
        to.port.reap_transmitted(0).unwrap();
        to.port.tx_burst(0, frames.iter().map(Vec::as_slice)).unwrap();
        to.side.kick(&mut to.port, transmit_vring(0));
        frames.len()
    }
    one_way(one, other) + one_way(other, one)
}

/// Two bridges with two cables between them: a circle. Broadcasts come back, are stopped, and stations on both
/// bridges reach each other all the time.
#[test]
fn two_bridges_in_a_circle_do_not_melt_and_carry_what_has_an_address() {
    let (left, right) = ([CONFIG; 3].map(Side::new), [CONFIG; 3].map(Side::new));
    let mut ports = Vec::new();
    let outer = run(&args(Wait::Interrupt), &left.each_ref(), || {
        ports = run(&args(Wait::Interrupt), &right.each_ref(), || {
            let [mut one, mut a1, mut a2] = left.each_ref().map(|side| Owner::start(side, 2));
            let [mut two, mut b1, mut b2] = right.each_ref().map(|side| Owner::start(side, 2));
            thread::sleep(Duration::from_millis(20));
            let mut carried = 0;
            let mut settle =
                |one: &mut Owner<'_>, two: &mut Owner<'_>, carried: &mut usize, until: Instant| {
                    let mut quiet = Instant::now();
                    // Until nothing goes round any more.
                    while quiet.elapsed() < Duration::from_millis(50) {
                        let now = carry(&mut a1, &mut b1) + carry(&mut a2, &mut b2);
                        *carried += now;
                        if now > 0 {
                            quiet = Instant::now();
                        }
                        one.receive();
                        two.receive();
                        assert!(Instant::now() < until, "it goes round for ever: {carried} frames");
                        thread::yield_now();
                    }
                };
            let until = Instant::now() + PATIENCE;
            one.send(&[from_to(1, ALL, 1, 60)]);
            settle(&mut one, &mut two, &mut carried, until);
            two.send(&[from_to(2, ALL, 2, 60)]);
            settle(&mut one, &mut two, &mut carried, until);
            assert!(carried < 200, "{carried} frames went round");
            assert!(!two.received.is_empty() && !one.received.is_empty());
            let seen = (one.received.len(), two.received.len());
            assert!(seen.0 < 50 && seen.1 < 50, "{seen:?}");
            for seed in 0..10 {
                for number in [1, 2] {
                    let sent = from_to(number, station(3 - number), seed, 100);
                    let (from, to) = if number == 1 { (&mut one, &mut two) } else { (&mut two, &mut one) };
                    from.received.clear();
                    to.received.clear();
                    from.send(std::slice::from_ref(&sent));
                    settle(from, to, &mut carried, until);
                    assert_eq!(to.received, [sent], "{seed}: once, and whole");
                }
            }
        })
        .1;
    });
    let looped = |ports: &[PortReport]| ports.iter().map(|port| port.counters.dropped.looped).sum::<u64>();
    assert!(looped(&outer.1) + looped(&ports) > 0, "{outer:?} {ports:?}");
    for port in outer.1.iter().chain(&ports) {
        assert_eq!((port.counters.dropped.storm, port.counters.dropped.full), (0, 0), "{port:?}");
    }
}

/// An owner that sends nothing but broadcasts gets as many through as may be; the others' frames all pass.
#[test]
fn an_owner_that_floods_is_cut_off_and_the_others_go_on() {
    let sides = [CONFIG; 3].map(Side::new);
    let args = BridgeArgs { flood_limit: 50, ..args(Wait::Interrupt) };
    let (_, ports) = run(&args, &sides.each_ref(), || {
        let mut owners: Vec<_> = sides.iter().map(|side| Owner::start(side, 2)).collect();
        thread::sleep(Duration::from_millis(20));
        introduce(&mut owners);
        for burst in 0..20 {
            let frames: Vec<_> = (0..100).map(|seed| from_to(0, ALL, burst * 100 + seed, 60)).collect();
            owners[0].send(&frames);
            owners.iter_mut().skip(1).for_each(|owner| {
                owner.receive();
                owner.received.clear();
            });
        }
        owners[1].receive();
        owners[2].receive();
        owners.iter_mut().for_each(|owner| owner.received.clear());
        cross(&mut owners, 1, 2, 200);
        cross(&mut owners, 2, 1, 200);
        cross(&mut owners, 0, 1, 200);
    });
    let counters = ports[0].counters;
    assert_eq!(counters.flooded + counters.dropped.storm, 2001);
    assert!(counters.dropped.storm > 1000, "{counters:?}");
    assert_eq!((ports[1].counters.dropped.storm, ports[2].counters.dropped.storm), (0, 0));
}

#[test]
fn several_devices_are_asked_for() {
    let result = run_until(&BridgeArgs::default(), &Stop::default());
    assert!(matches!(result, Err(ProgramError::NotSeveral { given: 0, most: 64 })));
}
