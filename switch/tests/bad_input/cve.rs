//! What other back-ends of vhost-user got wrong, by name: DPDK's history, against the broker. Each
//! says what went wrong there, and shows that it does not here. What concerns rings, which the broker does
//! not serve, is in `guest-driver-model/tests/cve.rs`.

use std::os::fd::OwnedFd;

use vhost_pci_device::abi;

use crate::bench::{Bench, settled_descriptors};
use crate::iommu::{ends, up};
use crate::iommu_owner::{BEHIND, BUFFERS, PAGE, answer, next_miss, resident, update};
use crate::raw::{
    FRONTEND, GET_FEATURES, GET_VRING_BASE, IOTLB_MSG, LOG_SHMFD, MEMORY, OWNER_PROTOCOL, PEER_PROTOCOL,
    PROTOCOL_FEATURES, Raw, SET_FEATURES, SET_MEM_TABLE, SET_VRING_ADDR, SET_VRING_BASE, SET_VRING_CALL,
    SET_VRING_ENABLE, SET_VRING_KICK, SET_VRING_NUM, VERSION, VERSION_1, eventfd, longs, memfd, message,
    region, table, unsealed_memfd, words,
};

const SET_LOG_BASE: u32 = 6;
const SET_LOG_FD: u32 = 7;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const LOG_ALL: u64 = 1 << 26;

/// `VhostUserInflight`: length, offset, queues, entries.
fn inflight(len: u64, offset: u64, queues: u16, size: u16) -> Vec<u8> {
    let mut bytes = longs(&[len, offset]);
    bytes.extend(queues.to_ne_bytes());
    bytes.extend(size.to_ne_bytes());
    bytes
}

/// A session of the left link's owner, or its peer, that has to end as one fault more of this kind,
/// or of any.
fn refused(bench: &Bench, peer: bool, kind: Option<&str>, name: &str, bytes: &[u8], fds: Vec<OwnedFd>) {
    let count = |faults: &std::collections::BTreeMap<String, u64>| match kind {
        Some(kind) => faults.get(kind).copied().unwrap_or(0),
        None => faults.values().sum(),
    };
    let before = count(&bench.faults());
    let (owner_socket, peer_socket) = bench.left();
    let mut raw = Raw::connect(if peer { &peer_socket } else { &owner_socket });
    raw.negotiate(if peer { PEER_PROTOCOL } else { OWNER_PROTOCOL });
    if !peer {
        raw.set_up();
    }
    raw.send(bytes, &fds);
    raw.half_close();
    raw.closed();
    drop((raw, fds));
    bench.wait_until(name, |report| count(&report.counters.faults) == before + 1);
}

/// CVE-2018-1059. DPDK translated an address, and not a range: what a guest's buffer had past the end
/// of a memory region was read and written wherever the region's neighbour in the
/// host's address space happened to be.
#[test]
fn cve_2018_1059_a_range_that_goes_on_past_a_mappings_end_is_translated_to_its_end() {
    let bench = Bench::start();
    let (mut owner, mut channel, mut peer) = up(&bench);
    let slot = peer.gives(abi::CTRL_FETCH, BUFFERS, 64);
    assert_eq!(next_miss(&mut channel), (BUFFERS, 1));
    assert!(owner.done(IOTLB_MSG, &update(BUFFERS, PAGE, BEHIND), &[]));
    answer(&channel, &longs(&[0]));
    assert_eq!(peer.status(slot), abi::CTRL_OK);
    // The file goes on behind the page, the mapping does not: the owner is asked for what follows.
    for (command, permission) in [(abi::CTRL_FETCH, 1), (abi::CTRL_STORE, 2)] {
        let slot = peer.gives(command, BUFFERS + PAGE - 32, 64);
        if command == abi::CTRL_STORE {
            assert_eq!(next_miss(&mut channel), (BUFFERS, 2));
            assert!(owner.done(IOTLB_MSG, &update(BUFFERS, PAGE, BEHIND), &[]));
            answer(&channel, &longs(&[0]));
        }
        assert_eq!(next_miss(&mut channel), (BUFFERS + PAGE, permission));
        answer(&channel, &longs(&[1]));
        assert_eq!(peer.status(slot), abi::CTRL_DENIED);
    }
    let counters = bench.report(0).counters;
    assert_eq!((counters.bytes_fetched, counters.bytes_stored), (64, 0));
    // Nor does the owner's VMM map what goes on past its memory.
    assert!(!owner.done(IOTLB_MSG, &update(BUFFERS + PAGE, 2 * PAGE, FRONTEND + MEMORY - PAGE), &[]));
    ends(&bench, owner, peer);
    let bench_of_vrings = bench;
    for desc in [FRONTEND + MEMORY - 1008, FRONTEND + MEMORY, u64::MAX - 15] {
        let mut addr = words(&[0, 0]);
        addr.extend(longs(&[desc, FRONTEND + 0x600, FRONTEND + 0x400, 0]));
        let bytes =
            [message(SET_VRING_ADDR, VERSION, &addr), message(SET_VRING_KICK, VERSION, &longs(&[0x100]))]
                .concat();
        refused(&bench_of_vrings, false, Some("vring"), "a table past the end", &bytes, Vec::new());
    }
    bench_of_vrings.right_link_works();
}

/// CVE-2019-14818. DPDK allocated what belongs to a vring's size with each message that told one, and
/// forgot what was there: a front-end that repeated it took the host's memory and descriptors.
#[test]
fn cve_2019_14818_messages_that_are_repeated_take_nothing_more() {
    let bench = Bench::start();
    let mut owner = Raw::connect(&bench.left().0);
    owner.negotiate(OWNER_PROTOCOL);
    owner.set_up();
    let (open, before) = (settled_descriptors(), resident());
    for round in 0..10_000u32 {
        assert!(owner.done(SET_VRING_NUM, &words(&[round % 2, 16 << (round % 6)]), &[]));
        if round % 50 == 0 {
            assert!(owner.done(SET_MEM_TABLE, &table(&[region()]), &[memfd()]));
            assert!(owner.done(SET_VRING_CALL, &longs(&[u64::from(round % 2)]), &[eventfd()]));
        }
    }
    bench.descriptors_are(open);
    let more = resident().saturating_sub(before);
    assert!(more < 4 << 20, "{more} bytes");
    assert!(bench.faults().is_empty());
    drop(owner);
    bench.right_link_works();
}

/// CVE-2022-0669. DPDK did not close the descriptors that came with messages which take none, or
/// fewer (GET_INFLIGHT_FD, SET_INFLIGHT_FD): a front-end could use them all up.
#[test]
fn cve_2022_0669_descriptors_that_nobody_asked_for_are_closed() {
    let bench = Bench::start();
    let open = settled_descriptors();
    let none = |request, payload: &[u8]| message(request, VERSION, payload);
    let messages = [
        none(GET_INFLIGHT_FD, &inflight(0, 0, 2, 64)),
        none(SET_INFLIGHT_FD, &inflight(MEMORY, 0, 2, 64)),
        none(GET_FEATURES, &[]),
        none(SET_VRING_NUM, &words(&[0, 64])),
        none(SET_VRING_KICK, &longs(&[0])),
    ];
    for count in [1, 2, 8, 31] {
        for peer in [false, true] {
            for bytes in &messages {
                let ram = memfd();
                // Those that take one get one more.
                let fds = (0..=count).map(|_| ram.try_clone().unwrap()).collect();
                let name = format!("request {} with {count} too many, peer: {peer}", bytes[0]);
                refused(&bench, peer, None, &name, bytes, fds);
            }
        }
    }
    bench.descriptors_are(open);
    bench.right_link_works();
}

/// CVE-2020-10722. DPDK added length and offset of a dirty log without a look at the sum: a smaller
/// part was mapped than was written to. The broker has no log, and maps nothing.
#[test]
fn cve_2020_10722_a_dirty_log_whose_end_wraps_is_not_mapped() {
    let bench = Bench::start();
    let open = settled_descriptors();
    for (len, offset) in [(MEMORY, u64::MAX - 4095), (u64::MAX, 4096), (4096, 0), (0, 0)] {
        let bytes = message(SET_LOG_BASE, VERSION, &longs(&[len, offset]));
        refused(&bench, false, None, "SET_LOG_BASE", &bytes, vec![memfd()]);
    }
    refused(&bench, false, None, "SET_LOG_FD", &message(SET_LOG_FD, VERSION, &[]), vec![eventfd()]);
    let all = longs(&[VERSION_1 | PROTOCOL_FEATURES | LOG_ALL]);
    // The memory has 1024 pages.
    for (len, offset, log) in [
        (127, 0, memfd()),
        (128, 8, memfd()),
        (128, MEMORY, memfd()),
        (4097, MEMORY - 4096, memfd()),
        (128, 0, unsealed_memfd()),
    ] {
        let before = bench.faults().get("dirty_log").copied().unwrap_or(0);
        let mut raw = Raw::connect(&bench.left().0);
        raw.negotiate(OWNER_PROTOCOL | LOG_SHMFD);
        raw.set_up();
        raw.ask(SET_LOG_BASE, &longs(&[len, offset]), &[log]);
        raw.answered(SET_LOG_BASE);
        assert!(!raw.done(SET_FEATURES, &all, &[]), "a log of {len} bytes at {offset:#x} is used");
        assert_eq!(bench.faults()["dirty_log"], before + 2);
        // The session goes on, and a log that will do is used.
        raw.ask(SET_LOG_BASE, &longs(&[128, 4096]), &[memfd()]);
        raw.answered(SET_LOG_BASE);
        assert!(raw.done(SET_FEATURES, &all, &[]));
    }
    bench.descriptors_are(open);
    assert_eq!(bench.guest_bytes_mapped(), 0);
    bench.right_link_works();
}

/// CVE-2020-10723. DPDK checked a vring's number after it had been cut to 16 bits, and used the whole
/// one as an index.
#[test]
fn cve_2020_10723_a_vrings_number_is_checked_whole() {
    let bench = Bench::start();
    let open = settled_descriptors();
    for index in [0x1_0000, 0x1_0001, 0x8000_0000, u32::MAX] {
        let mut addr = words(&[index, 0]);
        addr.extend(longs(&[FRONTEND, FRONTEND + 0x600, FRONTEND + 0x400, 0]));
        let messages = [
            (SET_VRING_NUM, words(&[index, 64])),
            (SET_VRING_BASE, words(&[index, 0])),
            (SET_VRING_ADDR, addr),
            (SET_VRING_ENABLE, words(&[index, 1])),
            (GET_VRING_BASE, words(&[index, 0])),
        ];
        for (request, payload) in messages {
            let bytes = message(request, VERSION, &payload);
            refused(
                &bench,
                false,
                Some("vring"),
                &format!("{request} of vring {index:#x}"),
                &bytes,
                Vec::new(),
            );
        }
    }
    bench.descriptors_are(open);
    bench.right_link_works();
}

/// CVE-2020-10724. DPDK's vhost-crypto took lengths out of a guest's request as they were, and copied
/// that much. Here a guest's request is a command of the peer's driver to the broker.
#[test]
fn cve_2020_10724_a_command_whose_lengths_do_not_fit_copies_nothing() {
    let bench = Bench::start();
    let (owner, _channel, mut peer) = up(&bench);
    let cases = [
        (abi::CTRL_FETCH, BUFFERS, 64, 16),
        (abi::CTRL_FETCH, BUFFERS, u64::MAX, 64),
        (abi::CTRL_FETCH, u64::MAX - 8, 64, 64),
        (abi::CTRL_STORE, BUFFERS, 2000, 64),
        (abi::CTRL_STORE, BUFFERS, u64::from(u32::MAX) + 1, 64),
        (abi::CTRL_STORE, u64::MAX, 2, 64),
        (abi::CTRL_MAP, BUFFERS, u64::MAX, 0),
        (abi::CTRL_MAP, u64::MAX, 2, 0),
    ];
    let before = bench.report(0).counters;
    for (command, iova, len, room) in cases {
        let slot = peer.gives_with_room(command, iova, len, room);
        assert_eq!(peer.status(slot), abi::CTRL_INVALID, "{command} {iova:#x} {len:#x} {room}");
    }
    let after = bench.report(0).counters;
    assert_eq!((after.bytes_fetched, after.bytes_stored), (0, 0));
    assert_eq!(after.iotlb_misses, before.iotlb_misses, "the owner was not asked either");
    ends(&bench, owner, peer);
}

/// CVE-2020-10726. DPDK made new in-flight memory each time that a front-end asked for it, and kept
/// the old.
#[test]
fn cve_2020_10726_in_flight_memory_that_is_asked_for_again_and_again_takes_nothing() {
    let bench = Bench::start();
    let (open, before) = (settled_descriptors(), resident());
    for peer in [false, true] {
        for round in 0..200 {
            let (owner_socket, peer_socket) = bench.left();
            let mut raw = Raw::connect(if peer { &peer_socket } else { &owner_socket });
            raw.negotiate(if peer { PEER_PROTOCOL } else { OWNER_PROTOCOL });
            let sizes = [(2, 64), (2, 32_768), (u16::MAX, u16::MAX), (0, 0)];
            let (queues, size) = sizes[round % sizes.len()];
            for _ in 0..3 {
                raw.ask(GET_INFLIGHT_FD, &inflight(0, 0, queues, size), &[]);
            }
            raw.half_close();
            raw.closed();
        }
    }
    bench.descriptors_are(open);
    let more = resident().saturating_sub(before);
    assert!(more < 8 << 20, "{more} bytes");
    bench.right_link_works();
}

/// A class of 2026: DPDK took a new size for a vring whose table of buffers in flight had the old one, and
/// counted past its end. A vring that was started keeps its size until it is stopped.
#[test]
fn class_2026_a_vring_that_was_started_keeps_its_size() {
    let bench = Bench::start();
    for size in [1, 32, 128, 32_768] {
        let before = bench.faults().get("out_of_order").copied().unwrap_or(0);
        let mut owner = Raw::owner(&bench.left().0);
        owner.ask(SET_VRING_NUM, &words(&[0, size]), &[]);
        owner.half_close();
        owner.closed();
        drop(owner);
        bench.wait_until("refused", |report| {
            report.counters.faults.get("out_of_order") == Some(&(before + 1))
        });
    }
    // Stopped, it may have another, and everything that has the size is made anew.
    let (peer, window) = Raw::peer(&bench.left().1);
    let mut owner = Raw::owner(&bench.left().0);
    bench.wait_until("up", |report| report.state == "up" && report.vrings[0].size == 64);
    owner.owner_stops();
    assert!(owner.done(SET_VRING_NUM, &words(&[0, 16]), &[]));
    owner.start();
    bench.wait_until("up with 16", |report| report.state == "up" && report.vrings[0].size == 16);
    drop((owner, peer));
    window.join().unwrap();
    bench.right_link_works();
}
