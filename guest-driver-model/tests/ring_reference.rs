//! Our two halves against rust-vmm's `virtio-queue`, on the same ring in the same
//! memory: what it pops is what ours pops, and our driver understands what it
//! completes.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::fs::File;
use std::os::fd::AsFd;

use guest_driver_model::link::{Access, Mapping};
use guest_driver_model::ring::{
    Buffer, ChainBurst, Completion, DeviceRing, Direction, DriverRing, IndirectTables, RingConfig,
    RingFeatures, RingPlaces,
};
use guest_driver_model::shm::SharedMemory;
use guest_driver_model::translate::Translation;
use net_support::memfd;
use proptest::collection::vec;
use proptest::prelude::{ProptestConfig, Strategy, any, proptest};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

const LEN: usize = 1 << 20;

struct Bench {
    memory: SharedMemory,
    reference_memory: GuestMemoryMmap,
    driver: DriverRing,
    ours: DeviceRing,
    reference: Queue,
}

fn bench(size: u16, features: RingFeatures) -> Bench {
    let file = File::from(memfd(LEN as u64));
    let memory = SharedMemory::map(file.as_fd(), 0, LEN).unwrap();
    let range = (GuestAddress(0), LEN, Some(FileOffset::new(file, 0)));
    let reference_memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
    // virtio-queue takes address 0 for "not set".
    let (places, end) = RingPlaces::at(4096, size);
    let tables = features.indirect.then_some(IndirectTables { offset: end, entries: size.min(8) });
    let driver = DriverRing::with_features(0, &places, &memory, 0, tables, features).unwrap();
    let whole = Mapping { iova: 0, len: LEN as u64, window_offset: 0, access: Access::READ_WRITE };
    let config = RingConfig::try_from(&places.info(0)).unwrap();
    let ours = DeviceRing::new(0, &config, &memory, Translation::new(&[whole]), features).unwrap();
    let mut reference = Queue::new(256).unwrap();
    reference.set_size(size);
    reference.try_set_desc_table_address(GuestAddress(places.desc)).unwrap();
    reference.try_set_avail_ring_address(GuestAddress(places.avail)).unwrap();
    reference.try_set_used_ring_address(GuestAddress(places.used)).unwrap();
    reference.set_event_idx(features.event_idx);
    reference.set_ready(true);
    assert!(reference.is_valid(&reference_memory));
    Bench { memory, reference_memory, driver, ours, reference }
}

fn chain() -> impl Strategy<Value = Vec<Buffer>> {
    let piece = (0x8_0000_u64..0xf_0000, 1_u32..5000, any::<bool>());
    vec(piece, 1..6).prop_map(|pieces| {
        let mut chain: Vec<_> =
            pieces.into_iter().map(|(offset, len, writable)| Buffer { offset, len, writable }).collect();
        chain.sort_by_key(|piece| piece.writable);
        chain
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_reference_device_sees_the_same_chains_and_is_understood(
        size_log in 3_u32..9,
        indirect in any::<bool>(),
        chains in vec(chain(), 1..300),
        reversed in any::<bool>(),
    ) {
        let Bench { reference_memory: memory, mut driver, mut ours, mut reference, memory: _memory } =
            bench(1 << size_log, RingFeatures { indirect, event_idx: false, ..RingFeatures::default() });
        let mut burst = ChainBurst::default();
        let mut waiting = chains.iter().zip(0_u64..).peekable();
        while waiting.peek().is_some() {
            let mut told = Vec::new();
            while let Some((chain, token)) = waiting.peek() {
                if driver.add(chain, *token).is_err() {
                    break;
                }
                told.push(*token);
                waiting.next();
            }
            driver.publish();
            burst.clear();
            assert_eq!(ours.pop_burst(usize::MAX, Direction::Both, &mut burst), Ok(told.len()));
            let mut heads = Vec::new();
            for chain in burst.iter() {
                let theirs = reference.pop_descriptor_chain(&memory).unwrap();
                assert_eq!(theirs.head_index(), chain.head);
                let segments: Vec<_> =
                    theirs.map(|descriptor| (descriptor.addr().0, descriptor.len(), descriptor.is_write_only())).collect();
                let same: Vec<_> = chain.segments.iter().map(|seen| (seen.iova, seen.len, seen.writable)).collect();
                assert_eq!(segments, same);
                let room: u32 = chain.segments.iter().filter(|seen| seen.writable).map(|seen| seen.len).sum();
                heads.push((chain.head, room / 2));
            }
            assert!(reference.pop_descriptor_chain(&memory).is_none());
            let mut expected: Vec<_> =
                told.iter().zip(&heads).map(|(token, (_, len))| Completion { token: *token, len: *len }).collect();
            if reversed {
                heads.reverse();
                expected.reverse();
            }
            // The reference completes; our device half only counts along.
            for (head, len) in heads {
                reference.add_used(&memory, head, len).unwrap();
                ours.push_used(head, len);
            }
            ours.flush_used();
            let mut completions = Vec::new();
            assert_eq!(driver.reap(usize::MAX, &mut completions), Ok(expected.len()));
            assert_eq!(completions, expected);
        }
    }
}

#[test]
fn flags_mean_the_same_to_the_reference() {
    let Bench { memory, reference_memory, mut driver, mut ours, mut reference } =
        bench(8, RingFeatures::default());
    memory.write(0x8_0000, b"for the device").unwrap();
    for calls in [true, false, true] {
        driver.set_calls(calls).unwrap();
        driver.add(&[Buffer::readable(0x8_0000, 14)], 0).unwrap();
        driver.publish();
        let mut burst = ChainBurst::default();
        ours.pop_burst(1, Direction::DeviceReads, &mut burst).unwrap();
        let descriptor = reference.pop_descriptor_chain(&reference_memory).unwrap().next().unwrap();
        let mut seen = [0; 14];
        reference_memory.read_slice(&mut seen, descriptor.addr()).unwrap();
        assert_eq!(&seen, b"for the device");
        reference.add_used(&reference_memory, burst.chain(0).unwrap().head, 0).unwrap();
        ours.push_used(burst.chain(0).unwrap().head, 0);
        ours.flush_used();
        assert_eq!(ours.needs_call(), calls);
        // Without EVENT_IDX the reference calls always, which a driver must bear.
        assert!(reference.needs_notification(&reference_memory).unwrap());
        driver.reap(8, &mut Vec::new()).unwrap();
    }
    for kicks in [true, false, true] {
        if kicks {
            reference.enable_notification(&reference_memory).unwrap();
        } else {
            reference.disable_notification(&reference_memory).unwrap();
        }
        driver.add(&[Buffer::readable(0x8_0000, 14)], 0).unwrap();
        driver.publish();
        assert_eq!(driver.needs_kick(), kicks);
    }
}

/// Any bursts in both directions, with both sides asking to be notified or not at any moment:
/// whatever the reference decides ours decides, and the other way round.
#[test]
fn event_indices_mean_the_same_to_the_reference() {
    let features = RingFeatures { indirect: false, event_idx: true, ..RingFeatures::default() };
    let Bench { reference_memory, mut driver, mut ours, mut reference, memory: _memory } =
        bench(16, features);
    let mut state = 1_u32;
    let mut random = |below: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) % below
    };
    let (mut kicks, mut calls) = (0, 0);
    // More than once round the index.
    for _ in 0..40_000 {
        let posted = 1 + random(4);
        for _ in 0..posted {
            driver.add(&[Buffer::readable(0x8_0000, 14)], 0).unwrap();
        }
        driver.publish();
        // The reference asks for kicks only when it has nothing to do.
        let kicked = driver.needs_kick();
        kicks += u32::from(kicked);
        let mut burst = ChainBurst::default();
        assert_eq!(ours.pop_burst(8, Direction::DeviceReads, &mut burst), Ok(posted as usize));
        for chain in burst.iter() {
            let theirs = reference.pop_descriptor_chain(&reference_memory).unwrap();
            assert_eq!(theirs.head_index(), chain.head);
            reference.add_used(&reference_memory, chain.head, 0).unwrap();
            ours.push_used(chain.head, 0);
        }
        ours.flush_used();
        assert_eq!(ours.needs_call(), {
            let called = reference.needs_notification(&reference_memory).unwrap();
            calls += u32::from(called);
            called
        });
        driver.reap(16, &mut Vec::new()).unwrap();
        let asleep = random(4) == 0;
        assert_eq!(driver.set_calls(asleep), Ok(false));
        if random(4) == 0 {
            assert!(!reference.enable_notification(&reference_memory).unwrap());
        }
    }
    assert!((5_000..15_000).contains(&kicks) && (5_000..15_000).contains(&calls), "{kicks} {calls}");
}
