//! Packed rings: what one side may find in the other's slots, what is left for a successor,
//! and what goes into the ring for a batch.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use guest_driver_model::link::{Access, Mapping, VringInfo};
use guest_driver_model::ring::{
    Buffer, ChainBurst, Completion, DeviceRing, Direction, DriverFaultKind, DriverRing, Fault, Finding, Miss,
    OnMiss, RingConfig, RingFeatures, RingPlaces, Want, next_base,
};
use guest_driver_model::translate::Translation;
use net_support::{INDIRECT, IOVA, NEXT, TwoViews, WRITE};
use vhost_pci_device::abi::{FaultKind, PAGE_SIZE};

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Buffers start here in the owner's memory.
const DATA: u64 = 0x1_0000;

const PACKED: RingFeatures = RingFeatures { indirect: true, event_idx: true, packed: true, in_order: false };
const IN_ORDER: RingFeatures = RingFeatures { in_order: true, ..PACKED };

/// A slot as it is in memory: address, length, id, flags.
type Slot = (u64, u32, u16, u16);

struct Ring {
    views: TwoViews,
    places: RingPlaces,
    mappings: Vec<Mapping>,
    features: RingFeatures,
}

impl Ring {
    fn new(size: u16, features: RingFeatures) -> Self {
        let views = TwoViews::new(2 << 20);
        let (places, _) = RingPlaces::at(0, size);
        let mappings = vec![views.mapping()];
        Self { views, places, mappings, features }
    }

    fn device(&self) -> Result<DeviceRing, Fault> {
        let config = RingConfig::new(&self.places.info(IOVA), self.features).unwrap();
        DeviceRing::new(3, &config, &self.views.window, Translation::new(&self.mappings), self.features)
    }

    fn driver(&self) -> DriverRing {
        DriverRing::with_features(5, &self.places, &self.views.owner, IOVA, None, self.features).unwrap()
    }

    fn put_at(&self, offset: u64, (addr, len, id, flags): Slot) {
        let memory = &self.views.owner;
        memory.store_u64(offset, addr).unwrap();
        memory.store_u32(offset + 8, len).unwrap();
        memory.store_u16(offset + 12, id).unwrap();
        memory.store_u16_release(offset + 14, flags).unwrap();
    }

    /// `addr` counts from `IOVA`.
    fn put(&self, slot: u16, addr: u64, len: u32, id: u16, flags: u16) {
        self.put_at(self.places.desc + 16 * u64::from(slot), (IOVA + addr, len, id, flags));
    }

    fn slot(&self, slot: u16) -> Slot {
        let (memory, at) = (&self.views.owner, self.places.desc + 16 * u64::from(slot));
        let load16 = |at| memory.load_u16(at).unwrap();
        (memory.load_u64(at).unwrap(), memory.load_u32(at + 8).unwrap(), load16(at + 12), load16(at + 14))
    }

    /// The place that a device half leaves for the next one.
    fn left(&self) -> u16 {
        self.views.owner.load_u16(self.places.used).unwrap()
    }

    fn leave(&self, place: u16) {
        self.views.owner.store_u16(self.places.used, place).unwrap();
    }
}

fn pop(device: &mut DeviceRing, direction: Direction) -> Result<usize, FaultKind> {
    let mut burst = ChainBurst::default();
    device.pop_burst(64, direction, &mut burst).map_err(|fault| {
        assert!(burst.is_empty());
        fault.kind
    })
}

/// Pops up to `count` chains and completes them, without a flush. Returns their ids.
fn serve(device: &mut DeviceRing, count: usize, written: u32) -> Vec<u16> {
    let mut burst = ChainBurst::default();
    let direction = if written == 0 { Direction::DeviceReads } else { Direction::DeviceWrites };
    device.pop_burst(count, direction, &mut burst).unwrap();
    burst.iter().for_each(|chain| device.push_used(chain.head, written));
    burst.iter().map(|chain| chain.head).collect()
}

fn reap(driver: &mut DriverRing) -> Result<Vec<u64>, DriverFaultKind> {
    let mut completions = Vec::new();
    let result = driver.reap(64, &mut completions).map_err(|fault| fault.kind);
    result.map(|_| completions.iter().map(|completion| completion.token).collect())
}

fn post(driver: &mut DriverRing, tokens: std::ops::Range<u64>, writable: bool) {
    for token in tokens {
        driver.add(&[Buffer { offset: DATA, len: 64, writable }], token).unwrap();
    }
    driver.publish();
}

#[test]
fn only_the_flags_of_this_lap_make_a_slot_the_devices() {
    for (flags, popped) in [(0, 0), (AVAIL, 1), (USED, 0)] {
        let ring = Ring::new(8, PACKED);
        ring.put(0, DATA, 64, 0, flags);
        assert_eq!(pop(&mut ring.device().unwrap(), Direction::Both), Ok(popped), "{flags:#x}");
    }
    // In the second lap it is the other way round.
    for (flags, popped) in [(AVAIL | USED, 0), (AVAIL, 0), (USED, 1)] {
        let ring = Ring::new(8, PACKED);
        ring.leave(1 << 15);
        ring.put(0, DATA, 64, 0, flags);
        assert_eq!(pop(&mut ring.device().unwrap(), Direction::Both), Ok(popped), "{flags:#x}");
    }
}

#[test]
fn an_id_or_a_chain_that_is_not_in_the_ring_is_refused() {
    let ring = Ring::new(8, PACKED);
    for id in [8, u16::MAX] {
        ring.put(0, DATA, 64, id, AVAIL);
        let mut device = ring.device().unwrap();
        assert_eq!(pop(&mut device, Direction::Both), Err(FaultKind::DescriptorIndex));
        ring.put(0, DATA, 64, 0, AVAIL);
        assert_eq!(pop(&mut device, Direction::Both), Err(FaultKind::DescriptorIndex), "dead is dead");
    }
    // All round.
    (0..8).for_each(|slot| ring.put(slot, DATA, 64, 0, AVAIL | NEXT));
    assert_eq!(pop(&mut ring.device().unwrap(), Direction::Both), Err(FaultKind::ChainTooLong));
    // Into what is in flight: four slots are, and four are left.
    (0..4).for_each(|slot| ring.put(slot, DATA, 64, slot, AVAIL));
    ring.put(4, DATA, 64, 0, 0);
    let mut device = ring.device().unwrap();
    assert_eq!(pop(&mut device, Direction::Both), Ok(4));
    ring.put(0, DATA, 64, 0, USED);
    ring.put(4, DATA, 64, 0, AVAIL | NEXT);
    assert_eq!(pop(&mut device, Direction::Both), Err(FaultKind::ChainTooLong));
}

#[test]
fn slots_in_flight_are_not_taken_again_whatever_their_flags_say() {
    let ring = Ring::new(4, PACKED);
    (0..4).for_each(|slot| ring.put(slot, DATA, 64, 0, AVAIL));
    let mut device = ring.device().unwrap();
    assert_eq!(pop(&mut device, Direction::Both), Ok(4));
    (0..4).for_each(|slot| ring.put(slot, DATA, 64, 0, USED));
    assert_eq!((pop(&mut device, Direction::Both), device.poll_avail()), (Ok(0), Ok(0)));
    // All had the same id, which is their driver's affair: they take the slots that they took.
    for _ in 0..4 {
        device.push_used(0, 7);
    }
    device.flush_used();
    for slot in 0..4 {
        assert_eq!(ring.slot(slot), (IOVA + DATA, 7, 0, AVAIL | USED | WRITE));
    }
    assert_eq!(ring.left(), 1 << 15, "the second lap starts");
}

#[test]
fn an_indirect_table_is_read_from_start_to_end() {
    let ring = Ring::new(8, PACKED);
    // Neither NEXT nor its absence means anything in there (2.8.7).
    ring.put_at(DATA, (IOVA + 2 * DATA, 10, 9, 0));
    ring.put_at(DATA + 16, (IOVA + 2 * DATA, 20, 9, NEXT));
    ring.put_at(DATA + 32, (IOVA + 2 * DATA, 30, 9, WRITE | NEXT));
    ring.put(0, DATA, 48, 5, AVAIL | INDIRECT);
    let mut burst = ChainBurst::default();
    assert_eq!(ring.device().unwrap().pop_burst(8, Direction::Both, &mut burst), Ok(1));
    let chain = burst.chain(0).unwrap();
    let seen: Vec<_> = chain.segments.iter().map(|segment| (segment.len, segment.writable)).collect();
    assert_eq!((chain.head, seen), (5, vec![(10, false), (20, false), (30, true)]));

    let fault = |features, len, flags| {
        ring.put(0, DATA, len, 5, AVAIL | flags);
        let config = RingConfig::new(&ring.places.info(IOVA), features).unwrap();
        let translation = Translation::new(&ring.mappings);
        let mut device = DeviceRing::new(3, &config, &ring.views.window, translation, features).unwrap();
        pop(&mut device, Direction::Both)
    };
    for (len, flags) in [(0, 0), (8, 0), (17, 0), (9 * 16, 0), (u32::MAX, 0), (16, NEXT)] {
        assert_eq!(fault(PACKED, len, INDIRECT | flags), Err(FaultKind::Indirect), "{len} {flags}");
    }
    assert_eq!(fault(RingFeatures { indirect: false, ..PACKED }, 16, INDIRECT), Err(FaultKind::Indirect));
    ring.put_at(DATA, (IOVA + 2 * DATA, 16, 0, INDIRECT));
    assert_eq!(fault(PACKED, 16, INDIRECT), Err(FaultKind::Indirect));
}

#[test]
fn a_packed_ring_may_have_any_size_and_has_aligned_areas() {
    let good = VringInfo { enabled: true, size: 100, desc: 0x1000, avail: 0x2000, used: 0x3000, base: 0 };
    for size in [1, 3, 100, 32_767, 32_768] {
        assert!(RingConfig::new(&VringInfo { size, ..good }, PACKED).is_ok());
    }
    for bad in [
        VringInfo { size: 0, ..good },
        VringInfo { size: 32_769, ..good },
        VringInfo { size: 65_537, ..good },
        VringInfo { desc: 0x1008, ..good },
        VringInfo { avail: 0x2002, ..good },
        VringInfo { used: 0x3002, ..good },
    ] {
        assert_eq!(RingConfig::new(&bad, PACKED), Err(FaultKind::Geometry), "{bad:?}");
    }
    // The device writes the descriptors and its own area.
    let mut ring = Ring::new(8, PACKED);
    ring.mappings = vec![Mapping { access: Access::READ, ..ring.views.mapping() }];
    assert_eq!(ring.device().unwrap_err().kind, FaultKind::Geometry);
}

#[test]
fn a_place_outside_the_ring_is_refused() {
    let ring = Ring::new(8, PACKED);
    for place in [8, 0x7fff, 0x8008, 0xffff] {
        ring.leave(place);
        let fault = ring.device().unwrap_err();
        assert_eq!((fault.kind, fault.value), (FaultKind::Geometry, u64::from(place)));
        assert_eq!(next_base(&ring.places, &ring.views.owner, PACKED), Ok(0x8000));
    }
    ring.leave(0x8007);
    assert!(ring.device().is_ok());
    assert_eq!(next_base(&ring.places, &ring.views.owner, PACKED), Ok(7));
}

#[test]
fn a_batch_in_order_is_one_used_descriptor_unless_something_was_written() {
    let ring = Ring::new(8, IN_ORDER);
    let (mut driver, mut device) = (ring.driver(), ring.device().unwrap());
    post(&mut driver, 0..5, false);
    let before: Vec<_> = (1..5).map(|slot| ring.slot(slot)).collect();
    let ids = serve(&mut device, 8, 0);
    device.flush_used();
    assert_eq!(ring.slot(0), (5, 0, ids[4], AVAIL | USED));
    assert!((1..5).map(|slot| ring.slot(slot)).eq(before), "they were left alone");
    assert_eq!(reap(&mut driver), Ok(vec![0, 1, 2, 3, 4]));
    // How much was written has to be said of each.
    post(&mut driver, 5..8, true);
    let ids = serve(&mut device, 8, 9);
    device.flush_used();
    for (slot, id) in (5..8).zip(ids) {
        assert_eq!(ring.slot(slot), (IOVA + DATA, 9, id, AVAIL | USED | WRITE));
    }
    assert_eq!(reap(&mut driver), Ok(vec![5, 6, 7]));
    // Each flush has one of its own, and without VIRTIO_F_IN_ORDER each chain.
    post(&mut driver, 8..12, false);
    for _ in 0..2 {
        serve(&mut device, 2, 0);
        device.flush_used();
    }
    assert_eq!([0, 1, 2, 3].map(|slot| ring.slot(slot).3 & (AVAIL | USED)), [0, USED, 0, USED]);
    assert_eq!(reap(&mut driver), Ok(vec![8, 9, 10, 11]));
    let ring = Ring::new(8, PACKED);
    let (mut driver, mut device) = (ring.driver(), ring.device().unwrap());
    post(&mut driver, 0..3, false);
    serve(&mut device, 3, 0);
    device.flush_used();
    assert_eq!([0, 1, 2].map(|slot| ring.slot(slot).3), [AVAIL | USED; 3]);
}

/// Half of a slot was stored: what is still available is still its driver's.
#[test]
fn a_slot_of_which_a_dead_device_half_stored_a_part_is_served_as_its_driver_filled_it() {
    let ring = Ring::new(8, PACKED);
    let (mut driver, mut device) = (ring.driver(), ring.device().unwrap());
    post(&mut driver, 0..4, true);
    let before: Vec<_> = (0..4).map(|slot| ring.slot(slot)).collect();
    serve(&mut device, 4, 9);
    device.flush_used();
    ring.leave(0);
    // All of the addresses of the flush are there, and nothing else.
    for (slot, (_, len, id, flags)) in (0..).zip(before) {
        ring.put_at(ring.places.desc + 16 * slot, (ring.slot(slot as u16).0, len, id, flags));
    }
    let mut burst = ChainBurst::default();
    assert_eq!(ring.device().unwrap().pop_burst(8, Direction::DeviceWrites, &mut burst), Ok(4));
    assert!(burst.iter().all(|chain| chain.segments[0].iova == IOVA + DATA));
}

/// Addresses from 1 on are numbers of slots, too.
#[test]
fn a_used_slot_says_how_far_the_next_is_where_its_address_would_say_otherwise() {
    for (addr, left) in [(0, 1), (1, 1), (5, 1), (0xffff, 1), (0x1_0000, 0x1_0000), (0x1_0003, 0x1_0003)] {
        let mut ring = Ring::new(8, PACKED);
        ring.mappings.insert(0, Mapping { iova: 0, len: 0x2_0000, ..ring.views.mapping() });
        let slot = |slot: u64| ring.places.desc + 16 * slot;
        ring.put_at(slot(0), (addr, 64, 0, AVAIL));
        ring.put_at(slot(1), (addr, 64, 1, AVAIL | NEXT));
        ring.put_at(slot(2), (IOVA + DATA, 64, 1, AVAIL));
        ring.put_at(slot(3), (IOVA + DATA, 64, 2, AVAIL));
        let mut device = ring.device().unwrap();
        assert_eq!(serve(&mut device, 2, 0), [0, 1], "{addr:#x}");
        device.flush_used();
        assert_eq!([ring.slot(0).0, ring.slot(1).0], [left, 2], "{addr:#x}");
        ring.leave(0);
        assert_eq!(serve(&mut ring.device().unwrap(), 8, 0), [2], "{addr:#x}");
    }
}

/// One side of it dies between any two stores of a flush: nothing is lost, and nothing comes
/// twice.
#[test]
fn a_flush_that_a_dead_device_half_did_not_finish_is_gone_on_with() {
    // The slots from here on were used; the place was not left.
    for reached in 0..4_u16 {
        let ring = Ring::new(8, PACKED);
        let (mut driver, mut device) = (ring.driver(), ring.device().unwrap());
        post(&mut driver, 0..6, true);
        let before: Vec<_> = (0..8).map(|slot| ring.slot(slot)).collect();
        serve(&mut device, 4, 9);
        device.flush_used();
        drop(device);
        ring.leave(0);
        for (slot, (addr, len, id, flags)) in (0..reached).zip(before) {
            ring.put_at(ring.places.desc + 16 * u64::from(slot), (addr, len, id, flags));
        }
        let mut successor = ring.device().unwrap();
        let mut served = Vec::new();
        for _ in 0..4 {
            served.extend(serve(&mut successor, 8, 9));
            successor.flush_used();
        }
        assert_eq!(served.len(), usize::from(reached) + 2, "used up to slot {reached} of 4");
        assert!(reached > 0 || successor.needs_call(), "the dead one may not have called");
        assert_eq!(reap(&mut driver), Ok(vec![0, 1, 2, 3, 4, 5]));
        assert_eq!(ring.left(), 6);
        post(&mut driver, 6..14, true);
        assert_eq!(serve(&mut successor, 8, 9).len(), 8);
        successor.flush_used();
        assert_eq!(reap(&mut driver), Ok((6..14).collect()));
    }
    // In order, one used descriptor stands for all four.
    let ring = Ring::new(8, IN_ORDER);
    let (mut driver, mut device) = (ring.driver(), ring.device().unwrap());
    post(&mut driver, 0..6, false);
    serve(&mut device, 4, 0);
    device.flush_used();
    ring.leave(0);
    let mut successor = ring.device().unwrap();
    assert_eq!(serve(&mut successor, 8, 0).len(), 2);
    successor.flush_used();
    assert_eq!((reap(&mut driver), ring.left()), (Ok(vec![0, 1, 2, 3, 4, 5]), 6));
}

#[test]
fn used_slots_keep_a_device_half_busy_for_one_round_at_most() {
    let ring = Ring::new(8, PACKED);
    // It says that the next one is anywhere; each lap's flags are there when it comes.
    (0..8).for_each(|slot| ring.put_at(ring.places.desc + 16 * slot, (u64::MAX - slot, 1, 0, AVAIL | USED)));
    let mut device = ring.device().unwrap();
    for _ in 0..3 {
        assert_eq!(device.poll_avail(), Ok(0));
        (0..8).for_each(|slot| ring.put(slot, DATA, 1, 0, 0));
    }
    // It has gone round once, and no further.
    assert_eq!(ring.left(), 1 << 15);
}

#[test]
fn a_device_that_completes_what_was_never_added_is_refused() {
    let used = |features, id, len| {
        let ring = Ring::new(8, features);
        let mut driver = ring.driver();
        post(&mut driver, 0..2, true);
        ring.put(0, 0, len, id, AVAIL | USED);
        let result = reap(&mut driver);
        assert!(result.is_ok() || reap(&mut driver) == result, "dead is dead");
        result
    };
    for features in [PACKED, IN_ORDER] {
        for id in [2, 7, 8, u16::MAX] {
            assert_eq!(used(features, id, 0), Err(DriverFaultKind::UsedId));
        }
        assert_eq!(used(features, 0, 65), Err(DriverFaultKind::UsedLength));
        assert_eq!(used(features, 0, 64), Ok(vec![0]));
    }
    assert_eq!(used(PACKED, 1, 64), Ok(vec![1]));
    // In order that says that the first one is done with, too, and full.
    assert_eq!(used(IN_ORDER, 1, 5), Ok(vec![0, 1]));
    let ring = Ring::new(8, IN_ORDER);
    let mut driver = ring.driver();
    post(&mut driver, 0..2, true);
    ring.put(0, 0, 5, 1, AVAIL | USED);
    let mut completions = Vec::new();
    // Also when there is room for one of them only.
    assert_eq!((driver.reap(1, &mut completions), driver.reap(8, &mut completions)), (Ok(1), Ok(1)));
    let expected = [(0, 64), (1, 5)].map(|(token, len)| Completion { token, len });
    assert_eq!(completions, expected);
}

#[test]
fn a_used_element_of_a_split_ring_in_order_stands_for_all_before_it() {
    let ring = Ring::new(8, RingFeatures { packed: false, ..IN_ORDER });
    let mut driver = ring.driver();
    let mut completions = Vec::new();
    for round in 0..5_u64 {
        for token in 0..3 {
            driver.add(&[Buffer::writable(DATA, 64)], 3 * round + token).unwrap();
        }
        driver.publish();
        let memory = &ring.views.owner;
        let at = |index: u64| ring.places.used + 4 + 8 * (index % 8);
        // The id of the third, where the first would have its own.
        let third = memory.load_u16(ring.places.avail + 4 + 2 * ((3 * round + 2) % 8)).unwrap();
        memory.store_u32(at(3 * round), third.into()).unwrap();
        memory.store_u32(at(3 * round) + 4, 9).unwrap();
        memory.store_u16_release(ring.places.used + 2, 3 * (round as u16 + 1)).unwrap();
        assert_eq!(driver.reap(2, &mut completions), Ok(2));
        assert_eq!(driver.reap(8, &mut completions), Ok(1));
    }
    let expected = (0..15).map(|token| Completion { token, len: if token % 3 == 2 { 9 } else { 64 } });
    assert!(completions.into_iter().eq(expected));
}

#[test]
fn a_call_comes_for_the_descriptor_that_was_named_and_for_no_other() {
    for features in [PACKED, IN_ORDER] {
        let ring = Ring::new(8, features);
        let (mut driver, mut device) = (ring.driver(), ring.device().unwrap());
        let mut complete = |count| {
            serve(&mut device, count, 0);
            device.flush_used();
            device.needs_call()
        };
        for round in 0..20_u64 {
            post(&mut driver, 8 * round..8 * round + 8, false);
            assert_eq!(driver.set_calls(true), Ok(false));
            assert!(complete(1) && !complete(1), "round {round}");
            assert_eq!(driver.set_calls(true), Ok(true), "completions are waiting: do not sleep");
            assert_eq!(reap(&mut driver).unwrap().len(), 2);
            // For the fourth from here.
            assert_eq!(driver.set_calls_after(4), Ok(false));
            assert_eq!([complete(1), complete(2), complete(1), complete(1)], [false, false, true, false]);
            assert_eq!(driver.set_calls(false), Ok(true));
            assert!(!complete(1));
            assert_eq!(reap(&mut driver).unwrap().len(), 6);
        }
    }
}

#[test]
fn a_kick_for_a_published_descriptor_comes_whatever_is_added_behind_it() {
    for features in [PACKED, RingFeatures { packed: false, ..PACKED }] {
        for behind in 0..4 {
            let ring = Ring::new(8, features);
            let (mut driver, mut device) = (ring.driver(), ring.device().unwrap());
            post(&mut driver, 0..5, false);
            assert!(driver.needs_kick());
            serve(&mut device, 5, 0);
            device.flush_used();
            assert_eq!(reap(&mut driver), Ok(vec![0, 1, 2, 3, 4]));
            // A device that names the next descriptor (2.8.14).
            if features.packed {
                ring.views.owner.store_u32(ring.places.used, 1 << 15 | 5 | 2 << 16).unwrap();
            } else {
                assert_eq!(device.set_kicks(true), Ok(false));
            }
            post(&mut driver, 5..6, false);
            for token in 6..6 + behind {
                driver.add(&[Buffer::readable(DATA, 64)], token).unwrap();
            }
            assert!(driver.needs_kick(), "{behind} behind it");
            assert!(!driver.needs_kick());
            // And for none of what is not the device's yet.
            let ahead = 6 | 1 << 15 | 2 << 16;
            if features.packed {
                ring.views.owner.store_u32(ring.places.used, ahead).unwrap();
                assert!(!driver.needs_kick());
                driver.publish();
                assert_eq!(driver.needs_kick(), behind > 0);
            }
        }
    }
}

#[test]
fn a_ring_stops_before_what_is_missing_and_looks_ahead() {
    let mut ring = Ring::new(8, PACKED);
    ring.mappings = vec![Mapping { len: DATA, ..ring.views.mapping() }];
    ring.put(0, 0x8000, 64, 0, AVAIL);
    ring.put(1, DATA + 100, 64, 1, AVAIL | NEXT);
    ring.put(2, DATA + 2 * PAGE_SIZE, 64, 1, AVAIL | WRITE);
    ring.put(3, DATA + 200, 32, 2, AVAIL | INDIRECT);
    ring.put(4, DATA + 5 * PAGE_SIZE - 1, 2, 3, AVAIL);
    let mut device = ring.device().unwrap().on_miss(OnMiss::Map);
    let miss = |page: u64, pages, access| Miss {
        iova: IOVA + DATA + page * PAGE_SIZE,
        len: pages * PAGE_SIZE,
        want: Want::Map(access),
    };
    let mut burst = ChainBurst::default();
    for popped in [1, 0] {
        assert_eq!(device.pop_burst(8, Direction::Both, &mut burst), Ok(popped));
        let expected = [miss(0, 1, Access::READ), miss(2, 1, Access::WRITE), miss(4, 2, Access::READ)];
        assert_eq!(device.misses(), expected);
    }
    device.found(miss(0, 6, Access::READ), Finding::Copy);
    device.found(miss(2, 1, Access::WRITE), Finding::Copy);
    assert_eq!(device.pop_burst(8, Direction::Both, &mut burst), Ok(1), "then a table is missing");
    assert!(matches!(device.misses(), [Miss { len: 32, want: Want::Table(_), .. }]));
    ring.put_at(DATA + 200, (IOVA + DATA, 20, 0, 0));
    ring.put_at(DATA + 216, (IOVA + DATA, 30, 0, 0));
    device.set_translation(Translation::new(&[ring.views.mapping()]));
    assert_eq!(device.pop_burst(8, Direction::Both, &mut burst), Ok(2));
    let chains: Vec<_> = burst.iter().map(|chain| (chain.head, chain.len)).collect();
    assert_eq!(chains, [(0, 64), (1, 128), (2, 50), (3, 2)]);
}
