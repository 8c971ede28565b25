//! No byte of a ring is fetched twice: with one fetch, it does not matter that the
//! other VM changes it between two (CVE-2026 group, and before it every double fetch).
#![allow(clippy::unwrap_used)]

use super::{
    Buffer, ChainBurst, DeviceRing, Direction, DriverRing, IndirectTables, RingConfig, RingFeatures,
    RingPlaces,
};
use crate::shm::{SharedMemory, trace};
use crate::translate::{Access, Mapping, Translation};

pub(crate) fn memory(len: u64) -> SharedMemory {
    SharedMemory::private(len as usize).unwrap()
}

/// Panics if two of the ranges share a byte.
pub(crate) fn assert_fetched_once(mut fetched: Vec<(usize, usize)>) {
    fetched.sort_unstable();
    for pair in fetched.windows(2) {
        assert!(pair[0].0 + pair[0].1 <= pair[1].0, "bytes are fetched twice: {pair:x?}");
    }
}

fn rings(indirect: bool, packed: bool) -> (DriverRing, DeviceRing) {
    let features = RingFeatures { indirect, packed, ..RingFeatures::default() };
    let memory = memory(1 << 20);
    let (places, end) = RingPlaces::at(0, 64);
    let tables = indirect.then_some(IndirectTables { offset: end, entries: 8 });
    let driver = DriverRing::with_features(0, &places, &memory, 0, tables, features).unwrap();
    let whole = Mapping { iova: 0, len: 1 << 20, window_offset: 0, access: Access::READ_WRITE };
    let config = RingConfig::new(&places.info(0), features).unwrap();
    let device = DeviceRing::new(0, &config, &memory, Translation::new(&[whole]), features).unwrap();
    (driver, device)
}

#[test]
fn a_burst_fetches_each_byte_of_the_ring_once() {
    for (indirect, packed) in [(false, false), (true, false), (false, true), (true, true)] {
        let (mut driver, mut device) = rings(indirect, packed);
        for chain in 0..20 {
            let buffers =
                [Buffer::readable(0x8000, 10), Buffer::readable(0x9000, 20), Buffer::writable(0xa000, 30)];
            driver.add(&buffers[..1 + chain % 3], chain as u64).unwrap();
        }
        driver.publish();
        let mut burst = ChainBurst::default();
        let (popped, fetched) = trace::fetches_of(|| device.pop_burst(32, Direction::Both, &mut burst));
        assert_eq!(popped, Ok(20));
        // The index, the slots, and the descriptors or tables were noted at all.
        assert!(fetched.len() > 40, "{}", fetched.len());
        assert_fetched_once(fetched);
    }
}

#[test]
fn a_reap_fetches_each_used_element_once() {
    reap_fetches_once(false);
    reap_fetches_once(true);
}

fn reap_fetches_once(packed: bool) {
    let (mut driver, mut device) = rings(false, packed);
    for token in 0..20 {
        driver.add(&[Buffer::writable(0x8000, 10)], token).unwrap();
    }
    driver.publish();
    let mut burst = ChainBurst::default();
    device.pop_burst(32, Direction::Both, &mut burst).unwrap();
    for chain in burst.iter() {
        device.push_used(chain.head, 5);
    }
    device.flush_used();
    let mut completions = Vec::new();
    let (reaped, fetched) = trace::fetches_of(|| driver.reap(32, &mut completions));
    assert_eq!((reaped, completions.len()), (Ok(20), 20));
    assert!(fetched.len() >= 20, "{}", fetched.len());
    assert_fetched_once(fetched);
}
