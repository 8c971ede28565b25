//! What other device halves of virtio rings got wrong, by name: DPDK's history, against ours, on
//! split and packed rings. Each says what went wrong there, and shows that it does not here. What
//! concerns messages of a VMM is in `switch/tests/bad_input/cve.rs`.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod net_support;

use std::time::{Duration, Instant};

use guest_driver_model::link::{Access, Mapping};
use guest_driver_model::ring::{ChainBurst, DeviceRing, Direction, Fault, Place, RingConfig, RingFeatures};
use guest_driver_model::translate::Translation;
use net_support::{Done, HandRing, INDIRECT, IOVA, NEXT};
use vhost_pci_device::abi::FaultKind;

/// Buffers start here in the owner's memory.
const DATA: u64 = 0x1_0000;
/// The bit of a packed descriptor that makes it available in the first lap.
const AVAIL: u16 = 1 << 7;
const PACKED: RingFeatures = RingFeatures { indirect: true, event_idx: true, packed: true, in_order: false };

/// A ring that an owner fills by hand, of either format.
struct Ring {
    hand: HandRing,
    packed: bool,
}

impl Ring {
    fn both(size: u16) -> [Self; 2] {
        [false, true].map(|packed| Self { hand: HandRing::new(size), packed })
    }

    fn device(&self) -> Result<DeviceRing, Fault> {
        if !self.packed {
            return self.hand.device();
        }
        let config = RingConfig::new(&self.hand.places.info(IOVA), PACKED).unwrap();
        let translation = Translation::new(&self.hand.mappings);
        DeviceRing::new(3, &config, &self.hand.views.window, translation, PACKED)
    }

    /// Buffer `slot` of the owner's, alone in its chain: `addr` counts from `IOVA`.
    fn post(&self, slot: u16, addr: u64, len: u32, flags: u16) {
        if self.packed {
            let at = self.hand.places.desc + 16 * u64::from(slot);
            self.hand.descriptor_at(at, IOVA.wrapping_add(addr), len, slot, flags | AVAIL);
        } else {
            self.hand.descriptor(slot, addr, len, flags, slot + 1);
            self.hand.avail_slot(slot, slot);
            self.hand.avail_index(slot + 1);
        }
    }

    fn pop(&self, burst: &mut ChainBurst) -> Result<usize, FaultKind> {
        burst.clear();
        self.device().unwrap().pop_burst(32, Direction::Both, burst).map_err(|fault| fault.kind)
    }
}

/// CVE-2018-1059. DPDK translated a buffer's first address, and reached for the whole buffer from
/// there: past the end of a memory region it read and wrote what was not the guest's.
#[test]
fn cve_2018_1059_of_a_buffer_past_a_mappings_end_only_what_is_mapped_is_reached() {
    for mut ring in Ring::both(8) {
        // Neighbours as addresses; in the window the second is far behind, and between them lies
        // what was never mapped.
        let whole = ring.hand.views.mapping();
        let end = DATA + 4096;
        let far = whole.window_offset + (1 << 20);
        let second = Mapping { iova: IOVA + end, len: 4096, window_offset: far, access: Access::READ_WRITE };
        ring.hand.mappings = vec![Mapping { len: end, ..whole }, second];
        let mut burst = ChainBurst::default();
        ring.post(0, end - 100, 300, 0);
        assert_eq!(ring.pop(&mut burst), Ok(1));
        let chain = burst.chain(0).unwrap();
        let places: Vec<_> = chain.segments.iter().map(|segment| (segment.place, segment.len)).collect();
        let first = whole.window_offset + end - 100;
        assert_eq!(places, [(Place::Window(first), 100), (Place::Window(far), 200)]);
        // One byte past the second, and one before the first.
        ring.post(0, end - 100, 100 + 4096 + 1, 0);
        assert_eq!(ring.pop(&mut burst), Err(FaultKind::Unmapped));
        ring.post(0, u64::MAX - IOVA - 1, 4, 0);
        assert_eq!(ring.pop(&mut burst), Err(FaultKind::Unmapped));
        // A table of descriptors that goes on past the end.
        ring.post(0, end + 4096 - 16, 32, INDIRECT);
        assert_eq!(ring.pop(&mut burst), Err(FaultKind::Unmapped));
        // The ring itself.
        ring.hand.mappings = vec![Mapping { len: 64, ..whole }];
        assert!(ring.device().is_err());
    }
}

/// CVE-2020-10725. DPDK's fast path for packed rings took descriptors four at a time, and did not look
/// whether each one's address could be translated: it wrote to address 0.
#[test]
fn cve_2020_10725_each_descriptor_of_a_batch_is_checked() {
    for ring in Ring::both(32) {
        let mut burst = ChainBurst::default();
        for bad in 0..32 {
            for slot in 0..32 {
                let addr = if slot == bad { 2 << 20 } else { DATA + 64 * u64::from(slot) };
                ring.post(slot, addr, 64, 0);
            }
            let mut device = ring.device().unwrap();
            let mut good = 0;
            // What came before it is served; then the ring is broken, and stays so.
            let fault = loop {
                burst.clear();
                match device.pop_burst(32, Direction::Both, &mut burst) {
                    Ok(0) => panic!("descriptor {bad} was passed over"),
                    Ok(count) => good += count,
                    Err(fault) => break fault.kind,
                }
            };
            assert_eq!((good, fault), (usize::from(bad), FaultKind::Unmapped), "packed: {}", ring.packed);
        }
    }
}

/// A class of 2026: DPDK believed an available index: the difference to its own became a number of descriptors
/// to take, however many the ring has.
#[test]
fn class_2026_an_available_index_is_no_further_ahead_than_the_ring_is_long() {
    let [split, packed] = Ring::both(8);
    let mut burst = ChainBurst::default();
    (0..8).for_each(|slot| split.post(slot, DATA, 64, 0));
    for index in [9, 100, 0x7fff, 0x8000, u16::MAX] {
        split.hand.avail_index(index);
        assert_eq!(split.pop(&mut burst), Err(FaultKind::AvailJump), "{index}");
        assert_eq!(split.device().unwrap().poll_avail().unwrap_err().kind, FaultKind::AvailJump);
    }
    // A packed ring has no index: all of its slots are available at once, and none twice.
    (0..8).for_each(|slot| packed.post(slot, DATA, 64, 0));
    let mut device = packed.device().unwrap();
    burst.clear();
    assert_eq!(device.pop_burst(32, Direction::Both, &mut burst), Ok(8));
    (0..8).for_each(|slot| {
        let at = packed.hand.places.desc + 16 * u64::from(slot);
        packed.hand.descriptor_at(at, IOVA + DATA, 64, slot, 1 << 15);
    });
    burst.clear();
    assert_eq!(device.pop_burst(32, Direction::Both, &mut burst), Ok(0));
}

/// A class of 2026: DPDK kept a table of buffers in flight that had the size of a ring before: numbers that were
/// inside the one were outside the other. Whoever serves a vring anew begins with its new size.
#[test]
fn class_2026_what_a_longer_ring_left_is_checked_against_the_shorter_one() {
    for mut ring in Ring::both(8) {
        ring.post(0, DATA, 64, 0);
        let mut burst = ChainBurst::default();
        assert_eq!(ring.pop(&mut burst), Ok(1));
        // The same memory, with half the entries: a head, and a place, of the longer ring.
        ring.hand.places.size = 4;
        if ring.packed {
            for place in [4, 5, 0x8007] {
                ring.hand.views.owner.store_u16(ring.hand.places.used, place).unwrap();
                assert_eq!(ring.device().unwrap_err().kind, FaultKind::Geometry, "{place:#x}");
            }
            ring.hand.views.owner.store_u16(ring.hand.places.used, 0).unwrap();
            ring.hand.descriptor_at(ring.hand.places.desc, IOVA + DATA, 64, 7, AVAIL);
        } else {
            ring.hand.offer(7);
        }
        assert_eq!(ring.pop(&mut burst), Err(FaultKind::DescriptorIndex));
    }
}

/// Pops as long as another thread makes `change`; gives the faults that were seen.
fn while_it_changes(
    ring: &Ring,
    change: impl Fn(u32) + Sync,
    check: impl Fn(&ChainBurst),
) -> std::collections::BTreeSet<FaultKind> {
    let done = Done::default();
    let mut faults = std::collections::BTreeSet::new();
    std::thread::scope(|scope| {
        let _at_end = done.at_end();
        scope.spawn(|| {
            for round in 0.. {
                if done.is_raised() {
                    break;
                }
                change(round);
            }
        });
        let start = Instant::now();
        let mut burst = ChainBurst::default();
        while start.elapsed() < Duration::from_millis(200) {
            match ring.pop(&mut burst) {
                Ok(_) => check(&burst),
                Err(kind) => _ = faults.insert(kind),
            }
        }
    });
    faults
}

/// A class of 2026: DPDK fetched an indirect table's length once to check it and once more to use it. (That no
/// byte is fetched twice is counted in `src/ring/fetch_tests.rs`.)
#[test]
fn class_2026_an_indirect_tables_length_that_changes_is_the_one_that_was_checked() {
    for ring in Ring::both(8) {
        ring.hand.descriptor_at(DATA, IOVA + 2 * DATA, 100, 0, 0);
        ring.post(0, DATA, 16, INDIRECT);
        let lens = [16, 0xffff_fff0, 17, 16 * 1000];
        let change = |round: u32| ring.hand.views.owner.store_u32(8, lens[round as usize % 4]).unwrap();
        let faults = while_it_changes(&ring, change, |burst| {
            assert!(burst.iter().all(|chain| chain.len == 100 && chain.segments.len() == 1));
        });
        assert!(faults.iter().all(|kind| *kind == FaultKind::Indirect), "{faults:?}");
        // Each of the others, had it been there when it was looked at.
        for len in &lens[1..] {
            ring.post(0, DATA, *len, INDIRECT);
            assert_eq!(ring.pop(&mut ChainBurst::default()), Err(FaultKind::Indirect));
        }
    }
}

/// A class of 2026: DPDK fetched a descriptor's `next` once to check it and once more to follow it. A packed ring
/// has none: there the buffer's number changes, which is one too.
#[test]
fn class_2026_a_next_that_changes_is_the_one_that_was_checked() {
    for ring in Ring::both(8) {
        ring.post(1, DATA, 36, 0);
        ring.post(0, DATA, 64, if ring.packed { 0 } else { NEXT });
        let at = ring.hand.places.desc + if ring.packed { 12 } else { 14 };
        let values = if ring.packed { [0, 8, u16::MAX, 0x7fff] } else { [1, 8, u16::MAX, 9] };
        let change = |round: u32| ring.hand.views.owner.store_u16(at, values[round as usize % 4]).unwrap();
        let faults = while_it_changes(&ring, change, |burst| {
            let first = burst.chain(0).unwrap();
            assert!(first.head < 8 && first.segments.len() <= 2 && first.len <= 100, "{first:?}");
        });
        assert!(faults.iter().all(|kind| *kind == FaultKind::DescriptorIndex), "{faults:?}");
        for value in [8, u16::MAX] {
            ring.hand.views.owner.store_u16(at, value).unwrap();
            assert_eq!(ring.pop(&mut ChainBurst::default()), Err(FaultKind::DescriptorIndex));
        }
    }
}
