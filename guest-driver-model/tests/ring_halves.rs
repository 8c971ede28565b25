//! Both halves of a ring against each other: any chains, indices that wrap, and
//! notifications that are suppressed and never lost.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

use guest_driver_model::ring::{
    Buffer, ChainBurst, Completion, DeviceRing, Direction, DriverRing, IndirectTables, Place, RingConfig,
    RingFeatures, RingPlaces,
};
use guest_driver_model::shm::SharedMemory;
use guest_driver_model::translate::Translation;
use net_support::{IOVA, TwoViews};
use proptest::collection::vec;
use proptest::prelude::{ProptestConfig, Strategy, any, proptest};
use vhost_pci_device::abi::{self, DATA_OFFSET};

struct Halves {
    views: TwoViews,
    driver: DriverRing,
    device: DeviceRing,
}

const PLAIN: RingFeatures =
    RingFeatures { indirect: false, event_idx: false, packed: false, in_order: false };
const EVENT_IDX: RingFeatures = RingFeatures { event_idx: true, ..PLAIN };
const IN_ORDER: RingFeatures = RingFeatures { in_order: true, ..PLAIN };
const PACKED: RingFeatures = RingFeatures { packed: true, ..PLAIN };
const PACKED_EVENT: RingFeatures = RingFeatures { event_idx: true, ..PACKED };
const PACKED_IN_ORDER: RingFeatures = RingFeatures { in_order: true, ..PACKED_EVENT };

fn halves(size: u16, features: RingFeatures) -> Halves {
    let views = TwoViews::new(8 << 20);
    let (places, end) = RingPlaces::at(0, size);
    let tables = features.indirect.then_some(IndirectTables { offset: end, entries: size.min(8) });
    let driver = DriverRing::with_features(1, &places, &views.owner, IOVA, tables, features).unwrap();
    let config = RingConfig::new(&places.info(IOVA), features).unwrap();
    let translation = Translation::new(&[views.mapping()]);
    let device = DeviceRing::new(1, &config, &views.window, translation, features).unwrap();
    Halves { views, driver, device }
}

/// Where and how long the pieces are; the readable ones first.
fn chain() -> impl Strategy<Value = Vec<Buffer>> {
    let piece = (0x40_0000_u64..0x70_0000, 1_u32..5000, any::<bool>());
    vec(piece, 1..6).prop_map(|pieces| {
        let mut chain: Vec<_> =
            pieces.into_iter().map(|(offset, len, writable)| Buffer { offset, len, writable }).collect();
        chain.sort_by_key(|piece| piece.writable);
        chain
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Every buffer arrives as it was described, comes back once with its own token
    /// and the length written, whatever the bursts and the order of completion are.
    #[test]
    fn buffers_arrive_as_described_and_come_back_once(
        size in 1_u16..70,
        (indirect, event_idx) in any::<(bool, bool)>(),
        (packed, in_order) in any::<(bool, bool)>(),
        chains in vec(chain(), 1..200),
        bursts in vec((1_usize..20, 1_usize..20, any::<bool>(), 0_usize..3), 8),
    ) {
        // Only a packed ring may have any size.
        let size = if packed { size } else { 1 << size.ilog2() };
        let features = RingFeatures { indirect, event_idx, packed, in_order };
        let Halves { mut driver, mut device, .. } = halves(size, features);
        let mut burst = ChainBurst::default();
        let mut completions = Vec::new();
        let mut expected = Vec::new();
        // A queue of one direction only, so that there is something to leave out.
        let direction = if chains.len() % 2 == 0 { Direction::Both } else { Direction::DeviceReads };
        let (mut added, mut popped, mut back) = (0, 0, Vec::new());
        let mut chains = chains;
        if direction == Direction::DeviceReads {
            chains.iter_mut().flatten().for_each(|piece| piece.writable = false);
        }
        let fits: Vec<_> = chains.into_iter().filter(|chain| chain.len() <= usize::from(size)).collect();
        for (add, take, reversed, again) in bursts.into_iter().cycle() {
            while added < fits.len() && added - popped < add && driver.add(&fits[added], added as u64).is_ok() {
                added += 1;
            }
            driver.publish();
            burst.clear();
            let count = device.pop_burst(take, direction, &mut burst).unwrap();
            // What is put back, or used and taken back, comes again.
            if again > 0 {
                for chain in burst.iter().take(if again > 1 { count / 2 } else { 0 }) {
                    device.push_used(chain.head, 0);
                }
                device.take_back_used();
                device.put_back(count);
                burst.clear();
                assert_eq!(device.pop_burst(take, direction, &mut burst), Ok(count));
            }
            let mut done = Vec::new();
            for chain in burst.iter() {
                let seen = chain.segments.iter().map(|segment| (segment.place, segment.len, segment.writable));
                let told = fits[popped].iter().map(|piece| (Place::Window(DATA_OFFSET + piece.offset), piece.len, piece.writable));
                assert!(seen.eq(told));
                let room: u32 = fits[popped].iter().filter(|piece| piece.writable).map(|piece| piece.len).sum();
                done.push((chain.head, popped as u64, room - room / 3));
                popped += 1;
            }
            if reversed && !in_order {
                done.reverse();
            }
            for (head, token, len) in done {
                device.push_used(head, len);
                expected.push(Completion { token, len });
            }
            device.flush_used();
            completions.clear();
            assert_eq!(driver.reap(usize::MAX, &mut completions), Ok(count));
            back.append(&mut completions);
            if back.len() == fits.len() {
                break;
            }
        }
        assert_eq!(back, expected);
        assert_eq!((driver.in_flight(), driver.free()), (0, size));
    }
}

#[test]
fn a_ring_works_on_after_its_indices_wrap_three_times() {
    for (size, features) in [
        (1, EVENT_IDX),
        (2, EVENT_IDX),
        (64, EVENT_IDX),
        (32_768, EVENT_IDX),
        (64, IN_ORDER),
        (1, PACKED_EVENT),
        (3, PACKED_EVENT),
        (32_768, PACKED_EVENT),
        (1, PACKED_IN_ORDER),
        (100, PACKED_IN_ORDER),
        (32_767, PACKED_IN_ORDER),
    ] {
        let Halves { mut driver, mut device, .. } = halves(size, features);
        let mut burst = ChainBurst::default();
        let mut completions = Vec::new();
        let (mut added, mut back) = (0_u64, 0_u64);
        while back < 3 * 65_536 + 5 {
            while driver.add(&[Buffer::writable(0x40_0000, 64)], added).is_ok() {
                added += 1;
            }
            driver.publish();
            burst.clear();
            device.pop_burst(usize::MAX, Direction::DeviceWrites, &mut burst).unwrap();
            for chain in burst.iter() {
                device.push_used(chain.head, 1);
            }
            device.flush_used();
            completions.clear();
            driver.reap(usize::MAX, &mut completions).unwrap();
            for completion in &completions {
                assert_eq!(completion.token, back);
                back += 1;
            }
        }
    }
}

#[test]
fn a_device_made_anew_goes_on_where_the_one_before_it_was() {
    for features in [PLAIN, IN_ORDER, PACKED, PACKED_IN_ORDER] {
        made_anew(features);
    }
}

fn made_anew(features: RingFeatures) {
    let Halves { views, mut driver, mut device } = halves(8, features);
    for token in 0..6 {
        driver.add(&[Buffer::writable(0x40_0000, 64)], token).unwrap();
    }
    driver.publish();
    let mut burst = ChainBurst::default();
    device.pop_burst(4, Direction::Both, &mut burst).unwrap();
    // Four popped, two completed, then the peer dies.
    for chain in burst.iter().take(2) {
        device.push_used(chain.head, 0);
    }
    device.flush_used();
    drop(device);
    let (places, _) = RingPlaces::at(0, 8);
    let config = RingConfig::new(&places.info(IOVA), features).unwrap();
    let translation = Translation::new(&[views.mapping()]);
    let mut device = DeviceRing::new(1, &config, &views.window, translation, features).unwrap();
    burst.clear();
    assert_eq!(device.pop_burst(8, Direction::Both, &mut burst), Ok(4));
    for chain in burst.iter() {
        device.push_used(chain.head, 0);
    }
    device.flush_used();
    let mut completions = Vec::new();
    assert_eq!(driver.reap(8, &mut completions), Ok(6));
    assert!(completions.iter().map(|completion| completion.token).eq(0..6));
}

#[test]
fn suppressed_notifications_are_not_asked_for() {
    suppressed(PLAIN);
    suppressed(PACKED);
}

fn suppressed(features: RingFeatures) {
    let Halves { mut driver, mut device, .. } = halves(8, features);
    assert!(!driver.needs_kick() && !device.needs_call(), "nothing has happened yet");
    let post = |driver: &mut DriverRing| {
        driver.add(&[Buffer::writable(0x40_0000, 64)], 0).unwrap();
        driver.publish();
        driver.needs_kick()
    };
    assert!(post(&mut driver));
    assert!(!driver.needs_kick(), "one publication, one kick");
    assert_eq!(device.set_kicks(false), Ok(true));
    assert!(!post(&mut driver));
    assert_eq!(device.set_kicks(true), Ok(true), "a chain is waiting: do not sleep");
    assert!(post(&mut driver));

    let complete = |device: &mut DeviceRing| {
        let mut burst = ChainBurst::default();
        device.pop_burst(1, Direction::Both, &mut burst).unwrap();
        device.push_used(burst.chain(0).unwrap().head, 0);
        assert!(!device.needs_call(), "not flushed yet");
        device.flush_used();
        device.needs_call()
    };
    assert!(complete(&mut device));
    assert!(!device.needs_call(), "one flush, one call");
    assert_eq!(driver.set_calls(false), Ok(true));
    assert!(!complete(&mut device));
    assert_eq!(driver.set_calls(true), Ok(true), "a completion is waiting: do not sleep");
    assert!(complete(&mut device));
    assert_eq!(device.set_kicks(true), Ok(false));
}

#[test]
fn by_event_indices_each_sleep_is_ended_once() {
    let Halves { mut driver, mut device, .. } = halves(8, EVENT_IDX);
    assert!(!driver.needs_kick() && !device.needs_call(), "nothing has happened yet");
    let post = |driver: &mut DriverRing, count: u64| {
        for token in 0..count {
            driver.add(&[Buffer::writable(0x40_0000, 64)], token).unwrap();
        }
        driver.publish();
        driver.needs_kick()
    };
    // As the ring is made: the first entry is waited for.
    assert!(post(&mut driver, 1));
    assert!(!post(&mut driver, 1), "whoever was woken for the first one finds the second");
    assert_eq!(device.set_kicks(true), Ok(true), "chains are waiting: do not sleep");
    assert!(!post(&mut driver, 1), "nobody sleeps");

    let complete = |device: &mut DeviceRing, count: usize| {
        let mut burst = ChainBurst::default();
        assert_eq!(device.pop_burst(count, Direction::Both, &mut burst), Ok(count));
        for chain in burst.iter() {
            device.push_used(chain.head, 0);
        }
        assert!(!device.needs_call(), "not flushed yet");
        device.flush_used();
        device.needs_call()
    };
    assert!(complete(&mut device, 1));
    assert!(!complete(&mut device, 1));
    assert_eq!(driver.set_calls(true), Ok(true), "completions are waiting: do not sleep");
    assert_eq!(driver.reap(8, &mut Vec::new()), Ok(2));
    assert_eq!(driver.set_calls(true), Ok(false));
    assert!(complete(&mut device, 1));
    assert_eq!(driver.reap(8, &mut Vec::new()), Ok(1));
    assert_eq!(device.set_kicks(true), Ok(false));
    assert_eq!(driver.set_calls(true), Ok(false));
    assert!(post(&mut driver, 5) && complete(&mut device, 5));
    // Awake: nothing is asked for, however much there is to do.
    assert_eq!(driver.reap(8, &mut Vec::new()), Ok(5));
    assert_eq!((device.set_kicks(false), driver.set_calls(false)), (Ok(false), Ok(false)));
    for _ in 0..100_000 {
        assert!(!post(&mut driver, 3) && !complete(&mut device, 3));
        assert_eq!(driver.reap(8, &mut Vec::new()), Ok(3));
    }
}

/// Both sides sleep whenever they may. A lost wake-up is a time-out.
#[test]
fn no_wake_up_is_lost_when_both_sides_sleep() {
    both_sides_sleep(PLAIN);
}

#[test]
fn no_wake_up_is_lost_when_both_sides_sleep_by_event_indices() {
    both_sides_sleep(EVENT_IDX);
}

#[test]
fn no_wake_up_is_lost_when_both_sides_of_a_packed_ring_sleep() {
    for features in [PACKED, PACKED_EVENT, PACKED_IN_ORDER] {
        both_sides_sleep(features);
    }
}

fn both_sides_sleep(features: RingFeatures) {
    let Halves { mut driver, mut device, views: _views } = halves(4, features);
    let (kick, kicked) = mpsc::channel();
    let (call, called) = mpsc::channel();
    let wait = |signal: &mpsc::Receiver<()>| {
        signal.recv_timeout(std::time::Duration::from_secs(20)).expect("a wake-up was lost");
        while signal.try_recv().is_ok() {}
    };
    let slept = &AtomicU64::new(0);
    const TOTAL: u64 = 30_000;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut burst = ChainBurst::default();
            let mut done = 0;
            while done < TOTAL {
                burst.clear();
                let count = device.pop_burst(2, Direction::Both, &mut burst).unwrap();
                if count == 0 {
                    if !device.set_kicks(true).unwrap() {
                        slept.fetch_add(1, Ordering::Relaxed);
                        wait(&kicked);
                    }
                    device.set_kicks(false).unwrap();
                }
                for chain in burst.iter() {
                    device.push_used(chain.head, 0);
                }
                device.flush_used();
                if device.needs_call() {
                    call.send(()).unwrap();
                }
                done += count as u64;
            }
        });
        let mut completions = Vec::new();
        let (mut added, mut back) = (0, 0);
        while back < TOTAL {
            while added < TOTAL && driver.add(&[Buffer::writable(0x40_0000, 64)], added).is_ok() {
                added += 1;
                if added % 3 == 0 {
                    break;
                }
            }
            driver.publish();
            if driver.needs_kick() {
                kick.send(()).unwrap();
            }
            completions.clear();
            let count = driver.reap(8, &mut completions).unwrap();
            if count == 0 {
                if !driver.set_calls(true).unwrap() {
                    slept.fetch_add(1, Ordering::Relaxed);
                    wait(&called);
                }
                driver.set_calls(false).unwrap();
            }
            back += count as u64;
        }
    });
    assert!(slept.load(Ordering::Relaxed) > 0, "nobody ever slept");
}

/// The control ring: 16 entries in a page, a request to read and a response to write.
#[test]
fn the_control_ring_fits_its_page() {
    let window = TwoViews::new(4096).window;
    let area: SharedMemory = window.part(abi::CONTROL_OFFSET, abi::CONTROL_LEN).unwrap();
    let places = RingPlaces {
        size: abi::CONTROL_RING_SIZE,
        desc: abi::CONTROL_DESC,
        avail: abi::CONTROL_AVAIL,
        used: abi::CONTROL_USED,
    };
    let mut driver = DriverRing::new(0, &places, &area, 0, None).unwrap();
    let config = RingConfig::try_from(&places.info(0)).unwrap();
    let whole = guest_driver_model::link::Mapping {
        iova: 0,
        len: abi::CONTROL_LEN,
        window_offset: 0,
        access: guest_driver_model::link::Access::READ_WRITE,
    };
    let mut device = DeviceRing::new(0, &config, &area, Translation::new(&[whole]), PLAIN).unwrap();
    area.write(abi::CONTROL_BUFFERS, b"a request of thirty-two bytes...").unwrap();
    let response = abi::CONTROL_BUFFERS + 32;
    driver.add(&[Buffer::readable(abi::CONTROL_BUFFERS, 32), Buffer::writable(response, 8)], 7).unwrap();
    driver.publish();
    let mut burst = ChainBurst::default();
    assert_eq!(device.pop_burst(16, Direction::Both, &mut burst), Ok(1));
    let chain = burst.chain(0).unwrap();
    let mut request = [0; 32];
    area.read(chain.segments[0].iova, &mut request).unwrap();
    assert_eq!(&request, b"a request of thirty-two bytes...");
    area.store_u32(chain.segments[1].iova, 3).unwrap();
    device.push_used(chain.head, 8);
    device.flush_used();
    let mut completions = Vec::new();
    assert_eq!(driver.reap(16, &mut completions), Ok(1));
    assert_eq!(completions, [Completion { token: 7, len: 8 }]);
    assert_eq!(area.load_u32(response), Ok(3));
}
