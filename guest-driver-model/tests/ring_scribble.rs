//! The owner's VM rewrites everything while the peer serves it: rings, tables,
//! headers. Nothing panics, nothing runs away, and each burst stays bounded.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use guest_driver_model::net::{Counters, OwnerConfig, OwnerLayout, OwnerPort, PacketBurst, PeerPort};
use guest_driver_model::ring::{ChainBurst, Direction, Place};
use net_support::{Done, HandRing, INDIRECT, IOVA, NEXT, WRITE, join, link_page};
use vhost_pci_device::abi::FaultKind;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }
}

/// Values that are often right, so that the deeper checks are reached.
fn scribble(ring: &HandRing, random: &mut Random) {
    let size = u64::from(ring.places.size);
    match random.below(12) {
        0 => ring.avail_index(ring.used_index().wrapping_add(random.below(size + size / 8) as u16)),
        1 | 2 => ring.avail_slot(random.below(size) as u16, random.below(size + 1) as u16),
        3 => {
            // Anything, anywhere; mostly in the ring.
            let end = [4096, ring.views.owner.len()][random.below(2) as usize];
            let word = random.below(end / 8) * 8;
            ring.views.owner.store_u64(word, random.next()).unwrap();
        }
        _ => {
            let table = random.below(3) == 0;
            let at = if table { 0x1_0000 + 16 * random.below(64) } else { 16 * random.below(size) };
            let flags = [0, 0, 0, 0, NEXT, WRITE, WRITE | NEXT, INDIRECT, random.next() as u16]
                [random.below(9) as usize];
            let addr =
                if random.below(50) == 0 { random.next() } else { IOVA + 0x1_0000 + 16 * random.below(64) };
            let len = [16, 32, 48, 64, 160, random.next() as u32 % 10_000][random.below(6) as usize];
            ring.descriptor_at(at, addr, len, flags, random.below(size + 1) as u16);
        }
    }
}

#[test]
fn a_device_half_survives_a_ring_that_changes_at_random() {
    let ring = HandRing::new(64);
    let done = Done::default();
    let mut kinds = BTreeSet::new();
    let (mut good, mut slowest) = (0_u64, Duration::ZERO);
    std::thread::scope(|scope| {
        let _at_end = done.at_end();
        scope.spawn(|| {
            let mut random = Random(0x1234_5678_9abc_def1);
            while !done.is_raised() {
                scribble(&ring, &mut random);
                if random.below(8) == 0 {
                    std::thread::yield_now();
                }
            }
        });
        let start = Instant::now();
        let mut burst = ChainBurst::default();
        let directions = [Direction::Both, Direction::DeviceReads, Direction::DeviceWrites];
        let end = ring.views.window.len();
        for direction in directions.into_iter().cycle() {
            if start.elapsed() > Duration::from_secs(1) {
                break;
            }
            let mut device = ring.device().unwrap();
            for _ in 0..10 {
                burst.clear();
                let began = Instant::now();
                let popped = device.pop_burst(32, direction, &mut burst);
                slowest = slowest.max(began.elapsed());
                match popped {
                    Ok(count) => {
                        assert!(count <= 32 && burst.len() == count);
                        for chain in burst.iter() {
                            assert!(!chain.segments.is_empty() && chain.segments.len() <= 64);
                            assert!(chain.segments.iter().all(|seen| match seen.place {
                                Place::Window(offset) => offset + u64::from(seen.len) <= end,
                                Place::Owner => false,
                            }));
                            device.push_used(chain.head, 1);
                            good += 1;
                        }
                        device.flush_used();
                        device.needs_call();
                    }
                    Err(fault) => {
                        kinds.insert(fault.kind);
                        // The next device starts behind the broken chain.
                        let next = ring.used_index().wrapping_add(1);
                        ring.views.owner.store_u16(ring.places.used + 2, next).unwrap();
                        break;
                    }
                }
            }
        }
    });
    println!("{good} chains, slowest burst {slowest:?}, faults {kinds:?}");
    assert!(good > 100, "the scribbler is too wild");
    assert!(kinds.len() >= 4, "the scribbler is too tame");
}

/// The indirect table's length, and the table, change between what would be two
/// fetches: each chain must be one of the two that were ever valid.
#[test]
fn a_table_that_changes_is_seen_whole_or_refused() {
    let ring = HandRing::new(8);
    ring.descriptor_at(0x1_0000, IOVA + 0x2_0000, 100, 0, 0);
    for slot in 0..8 {
        ring.avail_slot(slot, 0);
    }
    ring.descriptor(0, 0x1_0000, 16, INDIRECT, 0);
    ring.avail_index(8);
    let done = Done::default();
    let mut seen = BTreeSet::new();
    std::thread::scope(|scope| {
        let _at_end = done.at_end();
        scope.spawn(|| {
            while !done.is_raised() {
                for len in [16, 0xffff_fff0, 17, 16 * 1000] {
                    ring.views.owner.store_u32(8, len).unwrap();
                }
            }
        });
        let start = Instant::now();
        let mut burst = ChainBurst::default();
        while start.elapsed() < Duration::from_millis(300) {
            burst.clear();
            let mut device = ring.device().unwrap();
            match device.pop_burst(8, Direction::Both, &mut burst) {
                Ok(_) => {
                    assert!(burst.iter().all(|chain| chain.len == 100 && chain.segments.len() == 1));
                    seen.insert(None);
                }
                Err(fault) => {
                    seen.insert(Some(fault.kind));
                }
            }
        }
    });
    assert!(seen.iter().all(|kind| matches!(kind, None | Some(FaultKind::Indirect))), "{seen:?}");
}

/// Ports over memory that a third party scribbles into: the whole of it.
#[test]
fn ports_survive_memory_that_changes_at_random() {
    let config = OwnerConfig { ring_size: 64, buffer_len: 256, indirect: true, ..OwnerConfig::default() };
    let joined = join(config);
    let (views, snapshot) = (&joined.views, &joined.snapshot);
    let page = link_page(&views.window);
    let done = Done::default();
    let (mut faults, mut passed) = (0, 0);
    std::thread::scope(|scope| {
        let _at_end = done.at_end();
        scope.spawn(|| {
            let mut random = Random(99);
            let rings = joined.layout.vrings();
            while !done.is_raised() {
                // Mostly the rings, which are small, and now and then a header.
                let vring = &rings[random.below(2) as usize];
                let at = match random.below(4) {
                    0 => vring.buffers + 256 * random.below(64),
                    _ => vring.places.desc + 8 * random.below(2400 / 8),
                };
                let value = if random.below(2) == 0 { random.next() } else { random.below(64) };
                views.owner.store_u64(at & !7, value).unwrap();
                std::thread::sleep(Duration::from_micros(random.below(3)));
            }
        });
        let frames: Vec<Vec<u8>> = (0..16).map(|n| net_support::frame(n, 100 + 40 * n as usize)).collect();
        let start = Instant::now();
        let mut burst = PacketBurst::default();
        while start.elapsed() < Duration::from_secs(1) {
            let layout = OwnerLayout::new(config, 0, views.owner.len()).unwrap();
            let mut owner = OwnerPort::new(&views.owner, &layout, IOVA).unwrap();
            let mut peer = PeerPort::new(&views.window, &page, snapshot).unwrap();
            for _ in 0..20 {
                let slices = || frames.iter().map(Vec::as_slice);
                burst.clear();
                let mut count = |failed: bool| faults += u64::from(failed);
                count(owner.tx_burst(0, slices()).is_err());
                count(peer.rx_burst(0, &mut burst, 32).is_err());
                count(peer.tx_burst(0, slices()).is_err());
                count(owner.rx_burst(0, &mut burst, 32).is_err());
                assert!(burst.len() <= 32 + 64);
                assert!(burst.frames().all(|frame| frame.len() <= 65_550));
            }
            let Counters { rx_packets, .. } = peer.counters();
            passed += rx_packets;
        }
    });
    println!("{passed} packets, {faults} faults");
    assert!(faults > 0 && passed > 0);
}
