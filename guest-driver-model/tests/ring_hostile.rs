//! Each way in which an owner's driver can break a ring, and the fault that names it;
//! then each way in which a device can.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use guest_driver_model::link::{Access, Mapping};
use guest_driver_model::ring::device::MAX_CHAIN;
use guest_driver_model::ring::split::layout::{avail_event, used_event};
use guest_driver_model::ring::walk::MAX_SEGMENTS;
use guest_driver_model::ring::{
    AddError, Buffer, ChainBurst, Completion, DeviceRing, Direction, DriverFaultKind, DriverRing, Place,
    RingPlaces,
};
use net_support::{HandRing, INDIRECT, IOVA, NEXT, WRITE, shared};
use vhost_pci_device::abi::FaultKind;

/// Buffers start here in the owner's memory.
const DATA: u64 = 0x1_0000;

fn pop(device: &mut DeviceRing, direction: Direction) -> Result<usize, FaultKind> {
    let mut burst = ChainBurst::default();
    device.pop_burst(64, direction, &mut burst).map_err(|fault| {
        assert!(burst.is_empty());
        assert_eq!(fault.vring, 3);
        fault.kind
    })
}

/// The fault of a ring that offers chain 0; and that the ring stays dead.
fn fault_of(ring: &HandRing, direction: Direction) -> FaultKind {
    ring.offer(0);
    let mut device = ring.device().unwrap();
    let kind = pop(&mut device, direction).unwrap_err();
    ring.descriptor(0, DATA, 64, 0, 0);
    assert_eq!(pop(&mut device, direction), Err(kind), "a broken ring came back to life");
    assert!(device.poll_avail().is_err() && device.set_kicks(true).is_err());
    assert_eq!(device.fault().map(|fault| fault.kind), Some(kind));
    kind
}

#[test]
fn an_available_index_more_than_the_ring_ahead_is_a_jump() {
    let ring = HandRing::new(8);
    for slot in 0..8 {
        ring.descriptor(slot, DATA, 64, 0, 0);
        ring.avail_slot(slot, slot);
    }
    for index in [9, 0x8000, u16::MAX] {
        ring.avail_index(index);
        assert_eq!(pop(&mut ring.device().unwrap(), Direction::Both), Err(FaultKind::AvailJump));
    }
    ring.avail_index(8);
    assert_eq!(pop(&mut ring.device().unwrap(), Direction::Both), Ok(8));
}

#[test]
fn an_available_index_that_goes_back_or_past_what_is_in_flight_is_a_jump() {
    let ring = HandRing::new(8);
    ring.descriptor(0, DATA, 64, 0, 0);
    ring.avail_index(4);
    let mut device = ring.device().unwrap();
    assert_eq!(pop(&mut device, Direction::Both), Ok(4));
    ring.avail_index(3);
    assert_eq!(device.poll_avail().unwrap_err().kind, FaultKind::AvailJump);
    // Four are in flight: five more cannot be posted in a ring of eight.
    ring.avail_index(4);
    let mut device = ring.device().unwrap();
    assert_eq!(pop(&mut device, Direction::Both), Ok(4));
    ring.avail_index(9);
    assert_eq!(device.poll_avail().unwrap_err().kind, FaultKind::AvailJump);
}

#[test]
fn a_head_or_next_outside_the_table_is_refused() {
    let ring = HandRing::new(8);
    ring.descriptor(0, DATA, 64, NEXT, 8);
    assert_eq!(fault_of(&ring, Direction::Both), FaultKind::DescriptorIndex);
    for head in [8, u16::MAX] {
        ring.offer(head);
        assert_eq!(pop(&mut ring.device().unwrap(), Direction::Both), Err(FaultKind::DescriptorIndex));
    }
}

#[test]
fn a_looped_chain_ends_after_the_rings_size() {
    let ring = HandRing::new(8);
    ring.descriptor(0, DATA, 64, NEXT, 1);
    ring.descriptor(1, DATA, 64, NEXT, 0);
    assert_eq!(fault_of(&ring, Direction::Both), FaultKind::ChainTooLong);
}

#[test]
fn a_chain_longer_than_the_most_that_is_served_is_refused() {
    let ring = HandRing::new(2048);
    for index in 0..2048 {
        ring.descriptor(index, DATA, 64, NEXT, index + 1);
    }
    assert_eq!(fault_of(&ring, Direction::Both), FaultKind::ChainTooLong);
    ring.descriptor(0, DATA, 64, NEXT, 1);
    ring.descriptor(MAX_CHAIN - 1, DATA, 64, 0, 0);
    assert_eq!(pop(&mut ring.device().unwrap(), Direction::Both), Ok(1));
}

#[test]
fn a_buffer_in_no_mapping_is_refused() {
    let ring = HandRing::new(8);
    ring.descriptor(0, 2 << 20, 64, 0, 0);
    assert_eq!(fault_of(&ring, Direction::Both), FaultKind::Unmapped);
    for addr in [IOVA - 1, u64::MAX, 0] {
        ring.descriptor_at(ring.places.desc, addr, 64, 0, 0);
        assert_eq!(pop(&mut ring.device().unwrap(), Direction::Both), Err(FaultKind::Unmapped));
    }
    ring.descriptor(0, (2 << 20) - 63, 64, 0, 0);
    assert_eq!(pop(&mut ring.device().unwrap(), Direction::Both), Err(FaultKind::Unmapped));
}

/// Two mappings that touch in IOVA space, and lie apart or together in the window.
fn split(ring: &mut HandRing, second_offset: u64, second_access: Access) {
    let whole = ring.views.mapping();
    let second = Mapping {
        iova: IOVA + DATA + 4096,
        len: 4096,
        window_offset: whole.window_offset + second_offset,
        access: second_access,
    };
    ring.mappings = vec![Mapping { len: DATA + 4096, ..whole }, second];
}

/// CVE-2018-1059: what continues in IOVA space continues elsewhere in the window.
#[test]
fn a_buffer_that_crosses_two_mappings_is_taken_apart_and_each_part_is_checked() {
    for second_offset in [1 << 20, DATA + 4096] {
        let mut ring = HandRing::new(8);
        split(&mut ring, second_offset, Access::READ_WRITE);
        ring.descriptor(0, DATA + 4000, 97, 0, 0);
        ring.offer(0);
        let mut burst = ChainBurst::default();
        assert_eq!(ring.device().unwrap().pop_burst(1, Direction::Both, &mut burst), Ok(1));
        let chain = burst.chain(0).unwrap();
        let base = ring.views.mapping().window_offset;
        let places: Vec<_> = chain.segments.iter().map(|segment| (segment.place, segment.len)).collect();
        assert_eq!(
            places,
            [(Place::Window(base + DATA + 4000), 96), (Place::Window(base + second_offset), 1)]
        );
        assert_eq!(chain.len, 97);
        // Past the second mapping there is nothing, and the second may not be written.
        ring.descriptor(0, DATA + 4000, 96 + 4096 + 1, 0, 0);
        assert_eq!(fault_of(&ring, Direction::Both), FaultKind::Unmapped);
        split(&mut ring, second_offset, Access::READ);
        ring.descriptor(0, DATA + 4000, 97, WRITE, 0);
        assert_eq!(fault_of(&ring, Direction::Both), FaultKind::Access);
        ring.descriptor(0, DATA + 4000, 96, WRITE, 0);
        assert_eq!(pop(&mut ring.device().unwrap(), Direction::Both), Ok(1));
    }
}

/// Each mapping is a page; a buffer over all of them is one segment a page, and no more
/// than a chain may have.
#[test]
fn a_buffer_over_more_mappings_than_a_chain_may_have_segments_is_refused() {
    let mut ring = HandRing::new(8);
    let whole = ring.views.mapping();
    let page = |page: u64| Mapping {
        iova: IOVA + (page << 12),
        len: 4096,
        // All the same page, but those of the ring.
        window_offset: whole.window_offset + (page.min(16) << 12),
        access: if page < 16 { Access::READ_WRITE } else { Access::READ },
    };
    ring.mappings = (0..4096).map(page).collect();
    ring.descriptor(0, DATA, MAX_SEGMENTS as u32 * 4096, 0, 0);
    ring.offer(0);
    assert_eq!(pop(&mut ring.device().unwrap(), Direction::Both), Ok(1));
    ring.descriptor(0, DATA, MAX_SEGMENTS as u32 * 4096 + 1, 0, 0);
    assert_eq!(fault_of(&ring, Direction::Both), FaultKind::ChainTooLong);
}

#[test]
fn a_write_into_a_read_only_mapping_is_refused() {
    let mut ring = HandRing::new(8);
    split(&mut ring, 1 << 20, Access::READ);
    ring.descriptor(0, DATA + 4096, 64, WRITE, 0);
    assert_eq!(fault_of(&ring, Direction::Both), FaultKind::Access);
    split(&mut ring, 1 << 20, Access::WRITE);
    ring.descriptor(0, DATA + 4096, 64, 0, 0);
    assert_eq!(fault_of(&ring, Direction::Both), FaultKind::Access);
}

#[test]
fn an_empty_buffer_is_refused() {
    let ring = HandRing::new(8);
    ring.descriptor(0, DATA, 0, 0, 0);
    assert_eq!(fault_of(&ring, Direction::Both), FaultKind::Length);
}

#[test]
fn a_direction_that_the_queue_or_the_order_forbids_is_refused() {
    let ring = HandRing::new(8);
    ring.descriptor(0, DATA, 64, WRITE, 0);
    assert_eq!(fault_of(&ring, Direction::DeviceReads), FaultKind::Direction);
    ring.descriptor(0, DATA, 64, 0, 0);
    assert_eq!(fault_of(&ring, Direction::DeviceWrites), FaultKind::Direction);
    ring.descriptor(0, DATA, 64, WRITE | NEXT, 1);
    ring.descriptor(1, DATA, 64, 0, 0);
    assert_eq!(fault_of(&ring, Direction::Both), FaultKind::Direction);
}

#[test]
fn indirect_tables_that_the_specification_forbids_are_refused() {
    let ring = HandRing::new(8);
    for index in 0..64 {
        ring.descriptor_at(DATA + 16 * index, IOVA + 2 * DATA, 64, 0, 0);
    }
    for (len, flags) in [(0, 0), (8, 0), (17, 0), (9 * 16, 0), (u32::MAX, 0), (16, NEXT)] {
        ring.descriptor(0, DATA, len, INDIRECT | flags, 1);
        assert_eq!(fault_of(&ring, Direction::Both), FaultKind::Indirect, "{len} {flags}");
    }
    // One direct descriptor and a table of eight: nine in a ring of eight.
    ring.descriptor(0, DATA, 64, NEXT, 1);
    ring.descriptor(1, DATA, 8 * 16, INDIRECT, 0);
    assert_eq!(fault_of(&ring, Direction::Both), FaultKind::Indirect);
    // A table inside a table.
    ring.descriptor_at(DATA, IOVA + DATA, 16, INDIRECT, 0);
    ring.descriptor(0, DATA, 16, INDIRECT, 0);
    assert_eq!(fault_of(&ring, Direction::Both), FaultKind::Indirect);
}

#[test]
fn an_indirect_table_without_the_feature_is_refused() {
    let mut ring = HandRing::new(8);
    ring.features.indirect = false;
    ring.descriptor_at(DATA, IOVA + 2 * DATA, 64, 0, 0);
    ring.descriptor(0, DATA, 16, INDIRECT, 0);
    assert_eq!(fault_of(&ring, Direction::Both), FaultKind::Indirect);
}

#[test]
fn chains_inside_an_indirect_table_stay_inside_and_end() {
    let ring = HandRing::new(8);
    ring.descriptor_at(DATA, IOVA + 2 * DATA, 64, NEXT, 1);
    ring.descriptor_at(DATA + 16, IOVA + 2 * DATA, 64, NEXT, 2);
    // Descriptor 2 would be valid, but is outside the table.
    ring.descriptor_at(DATA + 32, IOVA + 2 * DATA, 64, 0, 0);
    ring.descriptor(0, DATA, 32, INDIRECT, 0);
    assert_eq!(fault_of(&ring, Direction::Both), FaultKind::DescriptorIndex);
    ring.descriptor_at(DATA + 16, IOVA + 2 * DATA, 64, NEXT, 0);
    ring.descriptor(0, DATA, 32, INDIRECT, 0);
    assert_eq!(fault_of(&ring, Direction::Both), FaultKind::ChainTooLong);
}

#[test]
fn an_indirect_table_not_wholly_in_mappings_that_allow_it_is_refused() {
    let mut ring = HandRing::new(8);
    ring.descriptor(0, 2 << 20, 32, INDIRECT, 0);
    assert_eq!(fault_of(&ring, Direction::Both), FaultKind::Unmapped);
    split(&mut ring, 1 << 20, Access::READ_WRITE);
    ring.descriptor(0, DATA + 8176, 32, INDIRECT, 0);
    assert_eq!(fault_of(&ring, Direction::Both), FaultKind::Unmapped);
    split(&mut ring, 1 << 20, Access::WRITE);
    for at in [4096, 4080] {
        ring.descriptor(0, DATA + at, 32, INDIRECT, 0);
        assert_eq!(fault_of(&ring, Direction::Both), FaultKind::Access);
    }
}

#[test]
fn an_indirect_table_that_crosses_two_mappings_is_read_from_both() {
    let mut ring = HandRing::new(8);
    split(&mut ring, 1 << 20, Access::READ_WRITE);
    ring.descriptor(0, DATA + 4080, 32, INDIRECT, 0);
    ring.descriptor_at(DATA + 4080, IOVA + DATA, 20, NEXT, 1);
    // Where the table goes on in the window, and where it would if the mappings touched.
    ring.descriptor_at(1 << 20, IOVA + DATA, 30, 0, 0);
    ring.descriptor_at(DATA + 4096, IOVA + DATA, 99, 0, 0);
    ring.offer(0);
    let mut burst = ChainBurst::default();
    assert_eq!(ring.device().unwrap().pop_burst(1, Direction::Both, &mut burst), Ok(1));
    assert_eq!(burst.chain(0).unwrap().len, 50);
}

#[test]
fn a_table_behind_direct_descriptors_continues_the_chain() {
    let ring = HandRing::new(8);
    // The write flag of the table's own descriptor means nothing.
    ring.descriptor(0, DATA, 10, NEXT, 5);
    ring.descriptor(5, 2 * DATA, 32, INDIRECT | WRITE, 0);
    ring.descriptor_at(2 * DATA, IOVA + 3 * DATA, 20, NEXT, 1);
    ring.descriptor_at(2 * DATA + 16, IOVA + 4 * DATA, 30, WRITE, 0);
    ring.offer(0);
    let mut burst = ChainBurst::default();
    assert_eq!(ring.device().unwrap().pop_burst(1, Direction::Both, &mut burst), Ok(1));
    let chain = burst.chain(0).unwrap();
    let seen: Vec<_> = chain.segments.iter().map(|segment| (segment.len, segment.writable)).collect();
    assert_eq!((chain.head, chain.len), (0, 60));
    assert_eq!(seen, [(10, false), (20, false), (30, true)]);
}

#[test]
fn geometry_outside_a_mapping_is_refused() {
    let mut ring = HandRing::new(8);
    ring.places.used = 2 << 20;
    assert_eq!(ring.device().unwrap_err().kind, FaultKind::Geometry);
    let mut ring = HandRing::new(8);
    ring.mappings = vec![Mapping { access: Access::READ, ..ring.views.mapping() }];
    assert_eq!(ring.device().unwrap_err().kind, FaultKind::Geometry);
    // A mapping that claims to be where the window is not.
    ring.mappings = vec![Mapping { window_offset: u64::MAX - 100, ..ring.views.mapping() }];
    assert_eq!(ring.device().unwrap_err().kind, FaultKind::Geometry);
}

#[test]
fn good_chains_before_a_broken_one_are_served() {
    let ring = HandRing::new(8);
    ring.descriptor(0, DATA, 64, 0, 0);
    ring.descriptor(1, DATA, 64, 0, 0);
    ring.avail_slot(0, 0);
    ring.avail_slot(1, 1);
    ring.avail_slot(2, 99);
    ring.avail_index(3);
    let mut device = ring.device().unwrap();
    let mut burst = ChainBurst::default();
    assert_eq!(device.pop_burst(8, Direction::Both, &mut burst), Ok(2));
    assert_eq!(burst.len(), 2);
    for chain in burst.iter() {
        device.push_used(chain.head, 7);
    }
    device.flush_used();
    assert_eq!((ring.used_index(), ring.used_element(0), ring.used_element(1)), (2, (0, 7), (1, 7)));
    assert_eq!(
        device.pop_burst(8, Direction::Both, &mut burst).unwrap_err().kind,
        FaultKind::DescriptorIndex
    );
}

// The other way round: a hostile device.

struct HandDevice {
    memory: guest_driver_model::shm::SharedMemory,
    places: RingPlaces,
}

impl HandDevice {
    fn new() -> (Self, DriverRing) {
        let memory = shared(1 << 16);
        let (places, _) = RingPlaces::at(0, 8);
        let driver = DriverRing::new(5, &places, &memory, IOVA, None).unwrap();
        (Self { memory, places }, driver)
    }

    fn complete(&self, slot: u64, id: u32, len: u32, index: u16) {
        self.memory.store_u32(self.places.used + 4 + 8 * slot, id).unwrap();
        self.memory.store_u32(self.places.used + 8 + 8 * slot, len).unwrap();
        self.memory.store_u16_release(self.places.used + 2, index).unwrap();
    }
}

fn reap(driver: &mut DriverRing) -> Result<Vec<Completion>, DriverFaultKind> {
    let mut completions = Vec::new();
    driver.reap(64, &mut completions).map(|_| completions).map_err(|fault| {
        assert_eq!(fault.vring, 5);
        fault.kind
    })
}

#[test]
fn a_device_that_completes_what_was_never_added_is_refused() {
    let (device, mut driver) = HandDevice::new();
    driver.add(&[Buffer::writable(0x8000, 100)], 1).unwrap();
    driver.publish();
    device.complete(0, 0, 0, 2);
    assert_eq!(reap(&mut driver), Err(DriverFaultKind::UsedJump));
    for id in [1, 8, u32::MAX] {
        let (device, mut driver) = HandDevice::new();
        driver.add(&[Buffer::writable(0x8000, 100)], 1).unwrap();
        driver.publish();
        device.complete(0, id, 0, 1);
        assert_eq!(reap(&mut driver), Err(DriverFaultKind::UsedId));
        assert_eq!(reap(&mut driver), Err(DriverFaultKind::UsedId), "dead is dead");
    }
}

#[test]
fn a_device_that_completes_twice_is_refused() {
    let (device, mut driver) = HandDevice::new();
    driver.add(&[Buffer::writable(0x8000, 100)], 1).unwrap();
    driver.add(&[Buffer::writable(0x9000, 100)], 2).unwrap();
    driver.publish();
    device.complete(0, 0, 100, 1);
    assert_eq!(reap(&mut driver), Ok(vec![Completion { token: 1, len: 100 }]));
    device.complete(1, 0, 100, 2);
    assert_eq!(reap(&mut driver), Err(DriverFaultKind::UsedId));
}

#[test]
fn a_device_that_claims_more_than_it_could_write_is_refused() {
    let (device, mut driver) = HandDevice::new();
    driver.add(&[Buffer::readable(0x7000, 500), Buffer::writable(0x8000, 100)], 1).unwrap();
    driver.publish();
    device.complete(0, 0, 101, 1);
    assert_eq!(reap(&mut driver), Err(DriverFaultKind::UsedLength));
}

#[test]
fn what_cannot_be_described_is_not_added() {
    let (_, mut driver) = HandDevice::new();
    let piece = Buffer::readable(0x8000, 1);
    assert_eq!(driver.add(&[], 0), Err(AddError::Invalid));
    assert_eq!(driver.add(&[Buffer::readable(0, 0)], 0), Err(AddError::Invalid));
    assert_eq!(driver.add(&[Buffer::writable(0, 1), piece], 0), Err(AddError::Invalid));
    assert_eq!(driver.add(&[piece; 9], 0), Err(AddError::Invalid));
    assert_eq!(driver.add(&[piece; 6], 0), Ok(()));
    assert_eq!(driver.add(&[piece; 3], 0), Err(AddError::Full));
    assert_eq!(driver.add(&[piece; 2], 0), Ok(()));
    assert_eq!(driver.add(&[piece], 0), Err(AddError::Full));
    assert_eq!((driver.free(), driver.in_flight()), (0, 2));
}

/// Whatever an owner says of the calls that it wants: it gets them or not, and that is all.
#[test]
fn an_event_index_decides_about_calls_and_nothing_else() {
    let ring = HandRing::new(8);
    ring.descriptor(0, 0x1_0000, 64, 0, 0);
    (0..8).for_each(|slot| ring.avail_slot(slot, 0));
    let mut device = ring.device().unwrap();
    let mut burst = ChainBurst::default();
    let mut calls = 0;
    for index in 0..=u16::MAX {
        // Also this side's own word, which the owner can write as well.
        for at in [used_event(&ring.places), avail_event(&ring.places)] {
            ring.views.owner.store_u16(at, index.wrapping_mul(40_503)).unwrap();
        }
        ring.avail_index(index.wrapping_add(1));
        assert_eq!(device.set_kicks(index % 3 == 0), Ok(true));
        burst.clear();
        assert_eq!(device.pop_burst(8, Direction::DeviceReads, &mut burst), Ok(1));
        device.push_used(0, 0);
        device.flush_used();
        calls += u32::from(device.needs_call());
        assert_eq!(ring.used_index(), index.wrapping_add(1));
    }
    // 40503 is odd, so that each value was there once.
    assert!(calls < 10, "{calls} times the value was the one that asks for a call");
}
