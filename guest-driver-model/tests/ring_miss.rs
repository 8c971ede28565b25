//! What the device half of a ring does about buffers that the mapping table does not show.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::time::{Duration, Instant};

use guest_driver_model::link::{Access, Mapping};
use guest_driver_model::ring::miss::MAX_MISSES;
use guest_driver_model::ring::{ChainBurst, DeviceRing, Direction, Finding, Miss, OnMiss, Place, Want};
use guest_driver_model::translate::Translation;
use net_support::{HandRing, INDIRECT, IOVA, NEXT, WRITE};
use vhost_pci_device::abi::{self, FaultKind};

const PAGE: u64 = abi::PAGE_SIZE;
/// Buffers start here in the owner's memory; the pages before it are shown.
const DATA: u64 = 0x1_0000;

/// A ring of whose memory the table shows only what is before `DATA`.
fn hidden(size: u16) -> HandRing {
    let mut ring = HandRing::new(size);
    ring.mappings = vec![Mapping { len: DATA, ..ring.views.mapping() }];
    ring
}

/// Makes `count` chains available, whose heads are their numbers.
fn offer(ring: &HandRing, count: u16) {
    (0..count).for_each(|slot| ring.avail_slot(slot, slot));
    ring.avail_index(count);
}

fn device(ring: &HandRing, on_miss: OnMiss) -> DeviceRing {
    ring.device().unwrap().on_miss(on_miss)
}

fn map(page: u64, pages: u64, access: Access) -> Miss {
    Miss { iova: IOVA + DATA + page * PAGE, len: pages * PAGE, want: Want::Map(access) }
}

#[test]
fn a_ring_stops_before_what_is_missing_and_looks_ahead() {
    let ring = hidden(8);
    ring.descriptor(0, 0x8000, 64, 0, 0);
    ring.descriptor(1, DATA + 100, 64, NEXT, 6);
    ring.descriptor(6, DATA + 2 * PAGE, 64, WRITE, 0);
    ring.descriptor(2, DATA + 200, 64, 0, 0);
    ring.descriptor(3, 0x8000, 64, 0, 0);
    ring.descriptor(4, DATA + 5 * PAGE - 1, 2, 0, 0);
    offer(&ring, 5);
    let mut device = device(&ring, OnMiss::Map);
    let mut burst = ChainBurst::default();
    for popped in [1, 0, 0] {
        assert_eq!(device.pop_burst(8, Direction::Both, &mut burst), Ok(popped));
        assert_eq!(burst.len(), 1);
        let expected = [map(0, 1, Access::READ), map(2, 1, Access::WRITE), map(4, 2, Access::READ)];
        assert_eq!(device.misses(), expected);
    }
    // No further than the budget.
    assert_eq!(device.pop_burst(1, Direction::Both, &mut burst), Ok(0));
    assert_eq!(device.misses().len(), 2);
    // The table shows all of it: the ring goes on where it was.
    device.set_translation(Translation::new(&[ring.views.mapping()]));
    assert_eq!(device.pop_burst(8, Direction::Both, &mut burst), Ok(4));
    let heads: Vec<_> = burst.iter().map(|chain| (chain.head, chain.len)).collect();
    assert_eq!(heads, [(0, 64), (1, 128), (2, 64), (3, 64), (4, 2)]);
    assert!(device.misses().is_empty() && !burst.is_outside());
}

#[test]
fn a_broken_chain_behind_a_missing_one_is_a_fault_in_its_turn() {
    let ring = hidden(8);
    ring.descriptor(0, DATA, 64, 0, 0);
    ring.avail_slot(1, 99);
    ring.avail_index(2);
    let mut device = device(&ring, OnMiss::Map);
    let mut burst = ChainBurst::default();
    assert_eq!(device.pop_burst(8, Direction::Both, &mut burst), Ok(0));
    assert_eq!((device.misses().len(), device.fault()), (1, None));
    device.found(device.misses()[0], Finding::Copy);
    assert_eq!(device.pop_burst(8, Direction::Both, &mut burst), Ok(1));
    assert_eq!(
        device.pop_burst(8, Direction::Both, &mut burst).unwrap_err().kind,
        FaultKind::DescriptorIndex
    );
}

#[test]
fn what_is_to_be_copied_is_cut_where_a_mapping_starts_and_at_the_most_of_a_command() {
    let mut ring = hidden(8);
    let whole = ring.views.mapping();
    let shown = Mapping {
        iova: IOVA + DATA + 3 * PAGE,
        len: PAGE,
        window_offset: whole.window_offset + 0x8000,
        access: Access::READ,
    };
    ring.mappings.push(shown);
    let start = DATA + PAGE + 100;
    let len = 3 * abi::MAX_COPY;
    ring.descriptor(0, start, len, 0, 0);
    ring.descriptor(1, start, len, WRITE, 0);
    offer(&ring, 2);
    let mut burst = ChainBurst::default();
    assert_eq!(device(&ring, OnMiss::Copy).pop_burst(8, Direction::Both, &mut burst), Ok(2));
    assert!(burst.is_outside());
    let segments = |at: usize| -> Vec<_> {
        let chain = burst.chain(at).unwrap();
        assert_eq!(chain.len, u64::from(len));
        let offset = |place| if let Place::Window(offset) = place { Some(offset) } else { None };
        chain.segments.iter().map(|seen| (seen.iova - IOVA, seen.len, offset(seen.place))).collect()
    };
    let most = abi::MAX_COPY;
    let before = 2 * PAGE as u32 - 100;
    let behind = DATA + 4 * PAGE;
    let left = len - before - PAGE as u32 - 2 * most;
    assert_eq!(
        segments(0),
        [
            (start, before, None),
            (DATA + 3 * PAGE, PAGE as u32, Some(shown.window_offset)),
            (behind, most, None),
            (behind + u64::from(most), most, None),
            (behind + 2 * u64::from(most), left, None),
        ]
    );
    // What may only be read is not in the window for who writes.
    assert_eq!(segments(1).iter().map(|segment| segment.2).collect::<Vec<_>>(), [None; 5]);
}

#[test]
fn a_finding_is_what_the_next_try_goes_by_until_it_is_forgotten() {
    let ring = hidden(8);
    ring.descriptor(0, DATA + 100, 2 * PAGE as u32, WRITE, 0);
    offer(&ring, 1);
    let mut device = device(&ring, OnMiss::Map);
    let mut burst = ChainBurst::default();
    assert_eq!(device.pop_burst(8, Direction::DeviceWrites, &mut burst), Ok(0));
    assert_eq!(device.misses(), [map(0, 3, Access::WRITE)]);
    device.found(map(0, 3, Access::WRITE), Finding::Copy);
    assert_eq!(device.pop_burst(8, Direction::DeviceWrites, &mut burst), Ok(1));
    let segments = burst.chain(0).unwrap().segments;
    assert_eq!((segments.len(), segments[0].place, segments[0].len), (1, Place::Owner, 2 * PAGE as u32));
    device.put_back(1);
    burst.clear();
    device.forget_findings();
    assert_eq!(device.pop_burst(8, Direction::DeviceWrites, &mut burst), Ok(0));
    assert_eq!(device.misses().len(), 1);
    // One page of three is denied.
    device.found(map(0, 2, Access::WRITE), Finding::Copy);
    device.found(map(2, 1, Access::WRITE), Finding::Denied);
    let fault = device.pop_burst(8, Direction::DeviceWrites, &mut burst).unwrap_err();
    assert_eq!((fault.kind, fault.value), (FaultKind::Unmapped, IOVA + DATA + 100));
}

#[test]
fn an_indirect_table_is_asked_for_and_read_from_where_it_was_put() {
    let ring = hidden(8);
    ring.descriptor(0, DATA, 32, INDIRECT, 0);
    ring.descriptor(1, DATA, 32, INDIRECT, 0);
    offer(&ring, 2);
    let table = |at| Miss { iova: IOVA + DATA, len: 32, want: Want::Table(at) };
    let mut device = device(&ring, OnMiss::Copy);
    let mut burst = ChainBurst::default();
    assert_eq!(device.pop_burst(8, Direction::Both, &mut burst), Ok(0));
    assert_eq!(device.misses(), [table(0), table(1)]);
    // The device put the first chain's table elsewhere.
    let put = abi::CONTROL_OFFSET + abi::CONTROL_BUFFERS;
    for (at, len, flags) in [(0, 20_u32, NEXT), (1, 30, 0)] {
        let at = put + 16 * at;
        ring.views.window.store_u64(at, IOVA + 0x8000).unwrap();
        ring.views.window.store_u32(at + 8, len).unwrap();
        ring.views.window.store_u16(at + 12, flags).unwrap();
        ring.views.window.store_u16(at + 14, 1).unwrap();
    }
    device.found(table(0), Finding::Fetched(put));
    assert_eq!(device.pop_burst(8, Direction::Both, &mut burst), Ok(1));
    assert_eq!(burst.chain(0).unwrap().len, 50);
    // That of the second is at the same address, and another one.
    assert_eq!(device.misses(), [table(1)]);
    device.found(table(1), Finding::Denied);
    assert_eq!(device.pop_burst(8, Direction::Both, &mut burst).unwrap_err().kind, FaultKind::Unmapped);
}

/// The most that an owner can ask for: chains as long as they may be, of buffers as long as
/// they may be, at addresses that wrap and that do not.
#[test]
fn what_an_owner_can_make_a_ring_do_is_bounded() {
    let ring = hidden(1024);
    for index in 0..1024 {
        ring.descriptor(index, (1 << 40) + (u64::from(index) << 33), u32::MAX, NEXT, (index + 1) % 1024);
    }
    ring.descriptor(1023, 1 << 50, u32::MAX, 0, 0);
    offer(&ring, 1024);
    let start = Instant::now();
    let mut burst = ChainBurst::default();
    let mut asking = device(&ring, OnMiss::Map);
    assert_eq!(asking.pop_burst(256, Direction::Both, &mut burst), Ok(0));
    assert_eq!(asking.misses().len(), MAX_MISSES);
    assert!(asking.misses().iter().all(|miss| miss.len <= abi::MAX_MAP));
    let kind = device(&ring, OnMiss::Copy).pop_burst(256, Direction::Both, &mut burst).unwrap_err().kind;
    assert_eq!(kind, FaultKind::ChainTooLong);
    for on_miss in [OnMiss::Map, OnMiss::Copy] {
        for flags in [0, INDIRECT] {
            ring.descriptor_at(0, u64::MAX - 8, 16, flags, 0);
            let fault = device(&ring, on_miss).pop_burst(1, Direction::Both, &mut burst).unwrap_err();
            assert_eq!((fault.kind, fault.value), (FaultKind::Unmapped, u64::MAX - 8));
        }
    }
    assert!(start.elapsed() < Duration::from_secs(2));
}
