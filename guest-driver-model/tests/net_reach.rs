//! A peer's port on an owner that has an IOMMU: what the mapping table does not show is
//! fetched, stored or mapped, and nothing is lost on the way.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use guest_driver_model::control::{Exchange, Job, Outcome, Request};
use guest_driver_model::link::{Access, Mapping};
use guest_driver_model::net::{OwnerConfig, PacketBurst};
use net_support::device::{Apart, Device, Mode, PAGE, apart, willing};
use net_support::{Done, IOVA, LinkWriter, frame, pass};
use proptest::collection::vec;
use proptest::prelude::{Just, ProptestConfig, any, prop_oneof, proptest};
use vhost_pci_device::abi::{self, FaultKind};

const DEFAULT: OwnerConfig = OwnerConfig {
    pairs: 1,
    ring_size: 64,
    buffer_len: 2048,
    mergeable: true,
    indirect: false,
    event_idx: true,
    packed: false,
    in_order: false,
    offloads: false,
};

fn frames(count: u64, len: usize) -> Vec<Vec<u8>> {
    (0..count).map(|seed| frame(seed, len)).collect()
}

fn slices(frames: &[Vec<u8>]) -> impl Iterator<Item = &[u8]> {
    frames.iter().map(Vec::as_slice)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// In either mode, with any part of the memory in the table with any access, and with a
    /// device that puts off one request in `patience`.
    #[test]
    fn frames_arrive_whole_in_order_and_once_whatever_the_table_shows(
        mode in prop_oneof![Just(Mode::Copy), Just(Mode::Map)],
        size_log in 6_u32..8,
        buffer_len in prop_oneof![Just(128_u32), Just(1536), Just(8192)],
        mergeable in any::<bool>(),
        indirect in any::<bool>(),
        (packed, in_order) in any::<(bool, bool)>(),
        shown in vec((0_u64..400, 1_u64..8, 0_u32..4), 0..20),
        to_copy in 0_u64..3,
        // More than any packet takes.
        patience in 300_u64..600,
        lens in vec(prop_oneof![0_usize..200, 0_usize..2000, 0_usize..9000], 1..60),
        bursts in vec((0_usize..40, 1_usize..40), 1..6),
    ) {
        let config = OwnerConfig { pairs: 1, ring_size: 1 << size_log, buffer_len, mergeable, indirect, packed, in_order, ..DEFAULT };
        let mut asked = 0;
        let rule = move |request: &Request| {
            asked += 1;
            match request {
                _ if asked % patience == 0 => Outcome::Later,
                // Some ranges can only be copied.
                Request::Map { iova, .. } if (iova / PAGE) % 4 < to_copy => Outcome::Copy,
                _ => Outcome::Done,
            }
        };
        let Apart { views, layout, mut owner, mut peer, mut device, .. } = apart(config, mode, Box::new(rule));
        let pages = views.owner.len() / PAGE;
        for (page, count, access) in shown {
            let access = Access::from_bits(access);
            device.show(page % pages * PAGE, count.min(pages - page % pages) * PAGE, access);
        }
        let make = |limit: usize| -> Vec<_> {
            lens.iter().zip(0..).map(|(len, seed)| frame(seed, *len.min(&limit))).collect()
        };
        let bursts: Vec<_> = bursts.into_iter().chain([(8, 8)]).collect();
        // What was put off is tried again a little later.
        let rest = |moved: usize, pause: Option<Duration>| {
            std::thread::sleep(pause.filter(|_| moved == 0).unwrap_or_default());
            moved
        };
        let list = make(layout.max_frame());
        pass(
            &list,
            &bursts,
            |frames| owner.tx_burst(0, frames.iter().copied()).unwrap(),
            |burst, budget| {
                let moved = peer.rx_burst_by(&mut device, 0, burst, budget).unwrap();
                rest(moved, peer.pause())
            },
        );
        let list = make(if mergeable { layout.max_frame() } else { config.room() });
        pass(
            &list,
            &bursts,
            |frames| {
                let moved = peer.tx_burst_by(&mut device, 0, frames.iter().copied()).unwrap();
                rest(moved, peer.pause())
            },
            |burst, budget| owner.rx_burst(0, burst, budget).unwrap(),
        );
        let (theirs, ours) = (owner.counters(), peer.counters());
        assert_eq!((theirs.tx_packets, theirs.tx_bytes), (ours.rx_packets, ours.rx_bytes));
        assert_eq!((theirs.rx_packets, theirs.rx_bytes), (ours.tx_packets, ours.tx_bytes));
        assert_eq!((ours.tx_drops, peer.faults().count()), (0, 0));
    }
}

#[test]
fn what_the_table_does_not_show_is_fetched_and_stored_in_batches() {
    let Apart { mut owner, mut peer, mut device, .. } = apart(DEFAULT, Mode::Copy, willing());
    let list = frames(40, 1000);
    assert_eq!(owner.tx_burst(0, slices(&list)), Ok(40));
    let mut burst = PacketBurst::default();
    assert_eq!(peer.rx_burst_by(&mut device, 0, &mut burst, 64), Ok(40));
    assert!(burst.frames().eq(slices(&list)));
    assert_eq!(device.log.len(), 1, "one batch, one doorbell");
    let demand = peer.demand();
    assert_eq!((demand.fetched, demand.fetched_bytes, demand.maps), (40, 40 * 1012, 0));
    assert_eq!(owner.reap_transmitted(0), Ok(0), "none is in flight");

    assert_eq!(peer.tx_burst_by(&mut device, 0, slices(&list)), Ok(40));
    assert_eq!(device.log.len(), 2);
    let demand = peer.demand();
    assert_eq!((demand.stored, demand.stored_bytes, demand.put_off), (40, 40 * 1012, 0));
    burst.clear();
    assert_eq!(owner.rx_burst(0, &mut burst, 64), Ok(40));
    assert!(burst.frames().eq(slices(&list)));
}

#[test]
fn what_was_mapped_once_is_not_asked_for_again() {
    let Apart { mut owner, mut peer, mut device, .. } = apart(DEFAULT, Mode::Map, willing());
    let list = frames(64, 1000);
    let mut burst = PacketBurst::default();
    for round in 0..3 {
        let asked = device.requests();
        assert_eq!(owner.tx_burst(0, slices(&list)), Ok(64));
        burst.clear();
        let received: usize = (0..2).map(|_| peer.rx_burst_by(&mut device, 0, &mut burst, 64).unwrap()).sum();
        assert_eq!(received, 64);
        assert!(burst.frames().eq(slices(&list)));
        assert_eq!(peer.tx_burst_by(&mut device, 0, slices(&list)), Ok(64));
        burst.clear();
        assert_eq!(owner.rx_burst(0, &mut burst, 64), Ok(64));
        assert!(burst.frames().eq(slices(&list)));
        // Two buffers of 2 KiB a page, 64 buffers each way.
        assert_eq!(device.requests() - asked, if round == 0 { 64 } else { 0 });
    }
    let demand = peer.demand();
    assert_eq!((demand.maps, demand.fetched, demand.stored), (64, 0, 0));
    assert!(demand.table_reads >= 2);
    // Chains were looked at ahead, so that a batch holds what many of them lack.
    assert!(device.log.iter().any(|batch| batch.len() == 32), "{:?}", device.log);
}

#[test]
fn an_indirect_table_that_is_not_shown_is_had_too() {
    for (mode, to_copy) in [(Mode::Copy, false), (Mode::Map, false), (Mode::Map, true)] {
        let config = OwnerConfig { indirect: true, buffer_len: 128, ring_size: 128, ..DEFAULT };
        let rule = move |request: &Request| match request {
            Request::Map { .. } if to_copy => Outcome::Copy,
            _ => Outcome::Done,
        };
        let Apart { mut owner, mut peer, mut device, layout, .. } = apart(config, mode, Box::new(rule));
        let tables = layout.vrings()[1].tables.unwrap();
        let list = frames(10, 600);
        assert_eq!(owner.tx_burst(0, slices(&list)), Ok(10));
        let mut burst = PacketBurst::default();
        let mut received = 0;
        for _ in 0..10 {
            received += peer.rx_burst_by(&mut device, 0, &mut burst, 64).unwrap();
        }
        assert_eq!(received, 10, "{mode:?} {to_copy}");
        assert!(burst.frames().eq(slices(&list)));
        let end = tables.offset + 128 * 64 * 16;
        let of_tables = |request: &&Request| match **request {
            Request::Map { iova, .. } | Request::Fetch { iova, .. } | Request::Store { iova, .. } => {
                (tables.offset - PAGE..end).contains(&(iova - IOVA))
            }
        };
        assert!(device.log.iter().flatten().filter(of_tables).count() > 0, "the tables were shown all along");
    }
}

/// A rule that denies one page.
fn denies(page: u64) -> Box<dyn FnMut(&Request) -> Outcome> {
    Box::new(move |request| {
        let (iova, len) = match *request {
            Request::Map { iova, len, .. } => (iova, len),
            Request::Fetch { iova, len } | Request::Store { iova, len } => (iova, u64::from(len)),
        };
        let (first, last) = ((iova - IOVA) / PAGE, (iova - IOVA + len - 1) / PAGE);
        if (first..=last).contains(&page) { Outcome::Denied } else { Outcome::Done }
    })
}

#[test]
fn what_the_owner_denies_is_a_fault_of_its_vring_after_what_came_before() {
    for mode in [Mode::Copy, Mode::Map] {
        let layout = apart(DEFAULT, mode, willing()).layout;
        // The seventh buffer and the eighth, of each vring.
        for vring in [0_usize, 1] {
            let page = layout.vrings()[vring].buffers / PAGE + 3;
            let Apart { mut owner, mut peer, mut device, .. } = apart(DEFAULT, mode, denies(page));
            let list = frames(20, 1000);
            let mut burst = PacketBurst::default();
            owner.tx_burst(0, slices(&list)).unwrap();
            let received = peer.rx_burst_by(&mut device, 0, &mut burst, 64);
            let sent = peer.tx_burst_by(&mut device, 0, slices(&list));
            let faults: Vec<_> = peer.faults().map(|fault| (fault.vring, fault.kind)).collect();
            let (moved, all) = if vring == 1 { (received, sent) } else { (sent, received) };
            assert_eq!((moved, all), (Ok(6), Ok(20)), "{mode:?} {vring}");
            let again = match vring {
                1 => peer.rx_burst_by(&mut device, 0, &mut burst, 64),
                _ => peer.tx_burst_by(&mut device, 0, slices(&list)),
            };
            let fault = again.unwrap_err();
            assert_eq!((fault.vring, fault.kind), (vring as u16, FaultKind::Unmapped), "{mode:?}");
            assert!(faults.len() <= 1 && peer.faults().count() == 1);
        }
    }
}

/// What the device puts off is neither lost nor completed; and it is not asked all the time.
#[test]
fn what_the_device_cannot_do_now_stays_with_the_owner() {
    for mode in [Mode::Copy, Mode::Map] {
        let mut left = 10;
        // Ten requests are good, and then none until the test says so.
        let good = Rc::new(Cell::new(false));
        let rule = {
            let good = good.clone();
            Box::new(move |_: &Request| {
                left -= 1;
                if left >= 0 || good.get() { Outcome::Done } else { Outcome::Later }
            })
        };
        let Apart { mut owner, mut peer, mut device, .. } =
            apart(OwnerConfig { buffer_len: 4096, ..DEFAULT }, mode, rule);
        let list = frames(30, 1000);
        owner.tx_burst(0, slices(&list)).unwrap();
        let mut burst = PacketBurst::default();
        assert_eq!(peer.rx_burst_by(&mut device, 0, &mut burst, 64), Ok(10), "{mode:?}");
        assert_eq!(owner.reap_transmitted(0), Ok(20));
        let batches = device.log.len();
        let until = Instant::now() + Duration::from_millis(30);
        let mut paused = false;
        while Instant::now() < until {
            paused |= peer.pause().is_some();
            assert_eq!(peer.rx_burst_by(&mut device, 0, &mut burst, 64), Ok(0));
            assert_eq!(peer.tx_burst_by(&mut device, 0, slices(&list)), Ok(0));
        }
        // 1, 2, 4, 8, 16 ms, each way.
        let asked = device.log.len() - batches;
        assert!((2..=14).contains(&asked), "asked {asked} times in 30 ms");
        assert!(paused);
        good.set(true);
        let (mut received, mut sent) = (10, 0);
        let until = Instant::now() + Duration::from_secs(5);
        while (received < 30 || sent < 30) && Instant::now() < until {
            received += peer.rx_burst_by(&mut device, 0, &mut burst, 64).unwrap();
            sent += peer.tx_burst_by(&mut device, 0, slices(&list).skip(sent)).unwrap();
        }
        assert!(burst.frames().eq(slices(&list)));
        burst.clear();
        assert_eq!(owner.rx_burst(0, &mut burst, 64), Ok(30));
        assert!(burst.frames().eq(slices(&list)));
        assert!(peer.pause().is_none() && peer.demand().put_off > 0);
        assert_eq!(peer.faults().count(), 0);
    }
}

#[test]
fn where_nobody_can_be_asked_packets_wait() {
    for mode in [Mode::Copy, Mode::Map] {
        let Apart { mut owner, mut peer, mut device, .. } = apart(DEFAULT, mode, willing());
        let list = frames(5, 100);
        owner.tx_burst(0, slices(&list)).unwrap();
        let mut burst = PacketBurst::default();
        assert_eq!(peer.rx_burst(0, &mut burst, 64), Ok(0));
        assert_eq!(peer.tx_burst(0, slices(&list)), Ok(0));
        std::thread::sleep(peer.pause().unwrap());
        assert_eq!(peer.rx_burst_by(&mut device, 0, &mut burst, 64), Ok(5));
        assert!(burst.frames().eq(slices(&list)));
    }
}

#[test]
fn chains_that_were_popped_ahead_go_by_the_table_of_now() {
    let Apart { mut owner, mut peer, mut device, layout, views, .. } = apart(DEFAULT, Mode::Copy, willing());
    let buffers = layout.vrings()[0].buffers;
    device.show(buffers, views.owner.len() / 4, Access::READ_WRITE);
    let list = frames(8, 500);
    assert_eq!(peer.tx_burst_by(&mut device, 0, slices(&list).take(1)), Ok(1));
    assert_eq!(peer.demand().stored, 0);
    // The next seven were popped by a table that showed them.
    device.hide_all_but(|page| page < buffers / PAGE);
    assert_eq!(peer.tx_burst_by(&mut device, 0, slices(&list).skip(1)), Ok(7));
    assert_eq!(peer.demand().stored, 7);
    let mut burst = PacketBurst::default();
    assert_eq!(owner.rx_burst(0, &mut burst, 64), Ok(8));
    assert!(burst.frames().eq(slices(&list)));
}

/// The table changes while the seventh frame of a burst is made: it and its successors are
/// completed only if it is certain that their buffers were there all along.
#[test]
fn a_buffer_whose_mapping_went_while_it_was_written_is_not_completed() {
    // Which page goes (two buffers a page), how many changes there are, how many frames are
    // sent at once, and how many of the others have to be stored.
    for (gone, changes, sent, stored) in [(3, 1, 6, 2), (2, 1, 8, 0), (100, 1, 8, 0), (100, 2, 6, 0)] {
        let Apart { mut owner, mut peer, mut device, layout, views, .. } =
            apart(DEFAULT, Mode::Copy, willing());
        let buffers = layout.vrings()[0].buffers;
        device.show(buffers, 64 * 2048, Access::READ_WRITE);
        let mut idle = apart(DEFAULT, Mode::Copy, willing()).device;
        let list = frames(8, 500);
        let made = slices(&list).enumerate().map(|(at, frame)| {
            if at == 6 {
                let mut writer = device.writer.clone();
                writer.mappings.retain(|mapping| mapping.iova != IOVA + buffers + gone * PAGE);
                writer.table_generation += 2 * changes;
                writer.write(&views.window);
            }
            frame
        });
        assert_eq!(peer.tx_burst_by(&mut idle, 0, made), Ok(sent), "{gone} {changes}");
        let mut burst = PacketBurst::default();
        assert_eq!(owner.rx_burst(0, &mut burst, 64), Ok(sent));
        assert!(idle.log.is_empty());
        if sent < 8 {
            assert_eq!(peer.tx_burst_by(&mut device, 0, slices(&list).skip(sent)), Ok(8 - sent));
            assert_eq!(owner.rx_burst(0, &mut burst, 64), Ok(8 - sent));
        }
        assert_eq!(peer.demand().stored, stored);
        assert!(burst.frames().eq(slices(&list)));
    }
}

/// Says that it mapped what somebody else maps.
struct Pretender(Device);

impl Exchange for Pretender {
    fn clear(&mut self) {
        self.0.clear();
    }

    fn reserve(&mut self, len: u32) -> Option<u64> {
        self.0.reserve(len)
    }

    fn carry_out(&mut self, jobs: &mut [Job]) {
        jobs.iter_mut().for_each(|job| job.outcome = Outcome::Done);
    }
}

/// The owner's buffers come and go in the window all the time; where they are not, it reads
/// as zero. No packet is delivered that is not what the owner sent.
#[test]
fn a_packet_whose_mapping_went_while_it_was_copied_is_not_delivered() {
    let config = OwnerConfig { ring_size: 256, ..DEFAULT };
    let Apart { mut owner, mut peer, device, layout, views, .. } = apart(config, Mode::Map, willing());
    let writer = device.writer.clone();
    let mut pretender = Pretender(device);
    // All packets are the same, so that it does not matter when they were copied.
    let packet = frame(7, 1900);
    let buffers = layout.vrings()[1].buffers;
    let len = views.owner.len() - buffers;
    // In the receive queue's buffers, which this test has no use for.
    let shown_at = layout.vrings()[0].buffers;
    let mut good = vec![0; len as usize];
    for buffer in good.chunks_mut(2048) {
        buffer[64..64 + packet.len()].copy_from_slice(&packet);
    }
    let entry = Mapping {
        iova: IOVA + buffers,
        len,
        window_offset: abi::DATA_OFFSET + shown_at,
        access: Access::READ,
    };
    let done = Done::default();
    let mut received = 0;
    std::thread::scope(|scope| {
        let _at_end = done.at_end();
        scope.spawn(|| {
            let mut generation = writer.table_generation;
            let mut change = |shown: bool| {
                views.window.store_u64(48, generation + 1).unwrap();
                std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
                generation += 2;
                let mut writer = LinkWriter { table_generation: generation, ..writer.clone() };
                writer.mappings.extend(shown.then_some(entry));
                writer.mappings.sort_by_key(|mapping| mapping.iova);
                writer.write(&views.window);
            };
            while !done.is_raised() {
                views.owner.write(shown_at, &good).unwrap();
                change(true);
                std::thread::sleep(Duration::from_micros(100));
                change(false);
                views.owner.zero(shown_at, len).unwrap();
            }
        });
        let start = Instant::now();
        let mut burst = PacketBurst::default();
        while received < 2000 || peer.demand().table_reads < 50 {
            owner.tx_burst(0, std::iter::repeat_n(packet.as_slice(), 64)).unwrap();
            burst.clear();
            received += peer.rx_burst_by(&mut pretender, 0, &mut burst, 64).unwrap();
            assert!(burst.frames().all(|frame| frame == packet));
            assert!(start.elapsed() < Duration::from_secs(20), "{received} packets");
        }
    });
}

/// What was fetched, or stored, when the link had changed is another link's.
#[test]
fn a_link_that_changes_while_the_device_is_asked_completes_nothing() {
    for mode in [Mode::Copy, Mode::Map] {
        let Apart { mut owner, mut peer, mut device, layout, views, .. } = apart(DEFAULT, mode, willing());
        let list = frames(5, 100);
        owner.tx_burst(0, slices(&list)).unwrap();
        device.before = Box::new(|writer, window| {
            writer.generation += 2;
            writer.table_generation += 2;
            writer.write(window);
        });
        let mut burst = PacketBurst::default();
        assert_eq!(peer.rx_burst_by(&mut device, 0, &mut burst, 64), Ok(0));
        assert!(burst.is_empty());
        device.before = Box::new(|_, _| {});
        assert_eq!(peer.rx_burst_by(&mut device, 0, &mut burst, 64), Ok(0), "it is not this port's link");
        assert_eq!(peer.tx_burst_by(&mut device, 0, slices(&list)), Ok(0));
        assert_eq!(views.owner.load_u16(layout.vrings()[1].places.used + 2), Ok(0), "{mode:?}");

        let Apart { mut peer, mut device, views, .. } = apart(DEFAULT, mode, willing());
        device.before = Box::new(|writer, window| {
            writer.generation += 2;
            writer.table_generation += 2;
            writer.write(window);
        });
        assert_eq!(peer.tx_burst_by(&mut device, 0, slices(&list)), Ok(0));
        assert_eq!(views.owner.load_u16(layout.vrings()[0].places.used + 2), Ok(0), "{mode:?}");
    }
}
