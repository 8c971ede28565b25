//! An owner's front-end with an IOMMU that sends nonsense, floods, or falls silent: each
//! message has an answer, memory stays bounded, and the other link goes on.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::Duration;

use vhost_pci_device::abi;

use crate::bench::{Bench, settled_descriptors};
use crate::iommu_owner::{
    BACKEND_REQ, BEHIND, BUFFERS, IOMMU_PUSH, PAGE, PUSH, Peer, RINGS, answer, invalidate, iotlb, next_miss,
    owner, push, resident, update,
};
use crate::raw::{
    FRONTEND, IOTLB_MSG, MEMORY, NEED_REPLY, Raw, SET_BACKEND_REQ_FD, VERSION, eventfd, longs, memfd,
    message, unsealed_memfd,
};

/// A link whose owner is asked for translations, up.
pub fn up(bench: &Bench) -> (Raw, std::os::unix::net::UnixStream, Peer) {
    up_with(bench, memfd())
}

fn up_with(bench: &Bench, memory: OwnedFd) -> (Raw, std::os::unix::net::UnixStream, Peer) {
    let (owner_socket, peer_socket) = bench.left();
    let peer = Peer::start(&peer_socket);
    let (owner, channel) = Raw::asked_owner(&owner_socket, memory);
    bench.wait_until("up", |report| report.state == "up");
    (owner, channel, peer)
}

pub fn ends(bench: &Bench, owner: Raw, peer: Peer) {
    drop(owner);
    peer.leaves();
    bench.wait_until("gone", |report| report.owner.state == "absent" && report.peer.state == "absent");
    bench.right_link_works();
}

#[test]
fn iotlb_messages_at_fault_are_refused_one_by_one_and_the_link_stays_up() {
    let bench = Bench::start();
    let (mut owner, _channel, peer) = up(&bench);
    let bad = [
        update(BUFFERS, 0, BEHIND),
        update(BUFFERS + 1, PAGE, BEHIND),
        update(BUFFERS, PAGE, BEHIND + 7),
        update(BUFFERS, PAGE, 0),
        update(BUFFERS, PAGE, FRONTEND - PAGE),
        update(BUFFERS, PAGE, FRONTEND + MEMORY),
        update(BUFFERS, 2 * PAGE, FRONTEND + MEMORY - PAGE),
        update(BUFFERS, MEMORY + PAGE, FRONTEND),
        update(u64::MAX - PAGE + 1, 2 * PAGE, BEHIND),
        update(BUFFERS, u64::MAX, BEHIND),
        update(BUFFERS, PAGE, u64::MAX - 8),
        iotlb(BUFFERS, PAGE, BEHIND, 0, 2),
        iotlb(BUFFERS, PAGE, BEHIND, 4, 2),
        iotlb(BUFFERS, PAGE, BEHIND, 255, 2),
        iotlb(BUFFERS, PAGE, BEHIND, 3, 0),
        iotlb(BUFFERS, PAGE, BEHIND, 3, 1),
        iotlb(BUFFERS, PAGE, BEHIND, 3, 4),
        iotlb(BUFFERS, PAGE, BEHIND, 3, 5),
        iotlb(BUFFERS, PAGE, BEHIND, 3, 255),
        invalidate(u64::MAX, 0),
    ];
    for (count, bad) in (1..).zip(bad) {
        assert!(!owner.done(IOTLB_MSG, &bad, &[]), "{bad:x?}");
        assert_eq!(bench.faults().get("iommu"), Some(&count));
    }
    bench.logged("IOMMU");
    assert_eq!(bench.report(0).state, "up");
    ends(&bench, owner, peer);
}

#[test]
fn invalidations_of_what_was_never_mapped_are_done_and_take_nothing() {
    let bench = Bench::start();
    let (mut owner, _channel, peer) = up(&bench);
    for (iova, size) in [(0, PAGE), (BUFFERS, 1), (BUFFERS + 5, 1 << 30), (u64::MAX - 1, 1)] {
        assert!(owner.done(IOTLB_MSG, &invalidate(iova, size), &[]));
    }
    assert_eq!(bench.report(0).state, "up");
    assert!(bench.faults().is_empty());
    ends(&bench, owner, peer);
}

/// A session of an owner that ends with a fault of this kind after these bytes.
fn refused(bench: &Bench, protocol: u64, kind: &str, name: &str, bytes: &[u8], fds: &[OwnedFd]) {
    let before = bench.faults().get(kind).copied().unwrap_or(0);
    let (mut raw, _channel) = owner(&bench.left().0, protocol, memfd());
    raw.send(bytes, fds);
    raw.half_close();
    raw.closed();
    drop(raw);
    bench.wait_until(name, |report| report.counters.faults.get(kind) == Some(&(before + 1)));
}

#[test]
fn malformed_messages_end_the_session_and_leave_no_descriptor() {
    let bench = Bench::start();
    let open = settled_descriptors();
    let entry = (BUFFERS, PAGE, BEHIND, 3);
    let mut padded = push(0, &[entry]);
    *padded.last_mut().unwrap() = 1;
    let mut more = push(0, &[entry]);
    more[0] = 2;
    let mut fewer = push(0, &[entry, entry]);
    fewer[0] = 1;
    let mut huge = push(0, &[entry]);
    huge[..4].copy_from_slice(&u32::MAX.to_ne_bytes());
    let cases = [
        (BACKEND_REQ, IOTLB_MSG, vec![0; 31], "a short IOTLB message"),
        (BACKEND_REQ, IOTLB_MSG, vec![0; 33], "a long IOTLB message"),
        (BACKEND_REQ, IOTLB_MSG, vec![0; 3000], "a very long IOTLB message"),
        (BACKEND_REQ, IOTLB_MSG, Vec::new(), "an empty IOTLB message"),
        (PUSH, IOMMU_PUSH, Vec::new(), "an empty push"),
        (PUSH, IOMMU_PUSH, vec![0; 7], "a short push"),
        (PUSH, IOMMU_PUSH, push(0, &[]), "a push of nothing"),
        (PUSH, IOMMU_PUSH, push(2, &[entry]), "unknown flags"),
        (PUSH, IOMMU_PUSH, push(1 << 31, &[entry]), "unknown flags"),
        (PUSH, IOMMU_PUSH, push(0, &[entry; 65]), "65 entries"),
        (PUSH, IOMMU_PUSH, padded, "padding"),
        (PUSH, IOMMU_PUSH, more, "less than counted"),
        (PUSH, IOMMU_PUSH, fewer, "more than counted"),
        (PUSH, IOMMU_PUSH, huge, "2^32 - 1 entries"),
    ];
    for (protocol, request, payload, name) in cases {
        refused(&bench, protocol, "message", name, &message(request, VERSION | NEED_REPLY, &payload), &[]);
    }
    for (protocol, request, payload) in
        [(BACKEND_REQ, IOTLB_MSG, update(BUFFERS, PAGE, BEHIND)), (PUSH, IOMMU_PUSH, push(0, &[entry]))]
    {
        let bytes = message(request, VERSION, &payload);
        refused(&bench, protocol, "message", "with a descriptor", &bytes, &[eventfd()]);
        refused(&bench, protocol, "message", "cut short", &bytes[..bytes.len() - 5], &[]);
    }
    let bytes = message(IOMMU_PUSH, VERSION, &push(0, &[entry]));
    refused(&bench, BACKEND_REQ, "unsupported", "a push that was not negotiated", &bytes, &[]);
    bench.descriptors_are(open);
    bench.right_link_works();
}

#[test]
fn pushes_at_fault_are_refused_whole_and_the_link_stays_up() {
    let bench = Bench::start();
    let (owner_socket, peer_socket) = bench.left();
    let mut peer = Peer::start(&peer_socket);
    let mut owner = Raw::pushing_owner(&owner_socket, memfd());
    bench.wait_until("up", |report| report.state == "up");
    let good = (BUFFERS, PAGE, BEHIND, 3);
    let bad = [
        (BUFFERS, PAGE, BEHIND, 3),
        (RINGS + PAGE, PAGE, BEHIND, 3),
        (RINGS + PAGE, PAGE, 0, 0),
        (BUFFERS + PAGE, 0, BEHIND, 3),
        (BUFFERS + PAGE, PAGE, FRONTEND + MEMORY, 3),
        (BUFFERS + PAGE, PAGE, BEHIND, 4),
        (u64::MAX - PAGE + 1, 2 * PAGE, BEHIND, 3),
        (0, 0, 0, 0),
    ];
    for bad in bad {
        assert!(!owner.done(IOMMU_PUSH, &push(0, &[good, bad]), &[]), "{bad:x?}");
        assert_eq!(peer.does(abi::CTRL_FETCH, BUFFERS, 64), abi::CTRL_DENIED);
    }
    assert_eq!(bench.faults().get("iommu"), Some(&(bad.len() as u64)));
    // An IOTLB message has no place here; it is refused and the session goes on.
    assert!(!owner.done(IOTLB_MSG, &invalidate(0, 0), &[]));
    assert!(owner.done(IOMMU_PUSH, &push(0, &[good]), &[]));
    assert_eq!(peer.does(abi::CTRL_FETCH, BUFFERS, 64), abi::CTRL_OK);
    assert_eq!(bench.report(0).state, "up");
    ends(&bench, owner, peer);
}

#[test]
fn a_hundred_thousand_pushed_mappings_are_taken_and_given_back_in_bounded_memory() {
    let bench = Bench::start();
    let mut owner = Raw::pushing_owner(&bench.left().0, memfd());
    let entry =
        |index: u64, perm: u8| (BUFFERS + 2 * index * PAGE, PAGE, if perm == 0 { 0 } else { BEHIND }, perm);
    let before = resident();
    let mut taken = 1;
    for message in 0..2100u64 {
        let entries: Vec<_> = (64 * message..64 * (message + 1)).map(|index| entry(index, 3)).collect();
        let done = owner.done(IOMMU_PUSH, &push(0, &entries), &[]);
        assert_eq!(done, taken + 64 <= 131_072, "message {message}");
        taken += if done { 64 } else { 0 };
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 96 << 20, "{} MiB", grown >> 20);
    for message in 0..1000u64 {
        let entries: Vec<_> = (64 * message..64 * (message + 1)).map(|index| entry(index, 0)).collect();
        assert!(owner.done(IOMMU_PUSH, &push(0, &entries), &[]));
    }
    assert!(owner.done(IOMMU_PUSH, &push(1, &[]), &[]));
    bench.right_link_works();
    drop(owner);
}

#[test]
fn a_hundred_thousand_updates_that_nobody_asked_for_are_answered_and_remembered_by_nobody() {
    let bench = Bench::start();
    let (mut owner, _channel, peer) = up(&bench);
    let before = resident();
    for index in 0..100_000 {
        assert!(owner.done(IOTLB_MSG, &update(BUFFERS + index * PAGE, PAGE, BEHIND), &[]));
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 16 << 20, "{} MiB", grown >> 20);
    assert_eq!(bench.report(0).counters.iotlb_misses, 4);
    ends(&bench, owner, peer);
}

#[test]
fn a_storm_of_maps_and_unmaps_is_answered_one_by_one() {
    let bench = Bench::start();
    let (owner_socket, peer_socket) = bench.left();
    let mut peer = Peer::start(&peer_socket);
    let mut owner = Raw::pushing_owner(&owner_socket, memfd());
    bench.wait_until("up", |report| report.state == "up");
    for round in 0..1000u64 {
        let iova = BUFFERS + (round % 7) * PAGE;
        assert!(owner.done(IOMMU_PUSH, &push(0, &[(iova, PAGE, BEHIND, 3)]), &[]));
        if round % 50 == 0 {
            assert_eq!(peer.does(abi::CTRL_MAP, iova, 64), abi::CTRL_OK);
        }
        assert!(owner.done(IOMMU_PUSH, &push(0, &[(iova, PAGE, 0, 0)]), &[]));
        if round % 50 == 0 {
            assert_eq!(peer.does(abi::CTRL_FETCH, iova, 64), abi::CTRL_DENIED);
        }
    }
    let report = bench.report(0);
    assert_eq!(report.window.mappings.len(), 1, "the vrings");
    assert!(report.counters.faults.is_empty());
    ends(&bench, owner, peer);
}

#[test]
fn misses_answered_late_twice_or_never_cost_a_command_and_nothing_more() {
    let bench = Bench::start();
    let (mut owner, mut channel, mut peer) = up(&bench);
    // Never: the command fails by its deadline, and more wait no longer than it.
    let slots: Vec<u16> = (0..8).map(|page| peer.gives(abi::CTRL_FETCH, BUFFERS + page * PAGE, 64)).collect();
    assert_eq!(next_miss(&mut channel), (BUFFERS, 1));
    assert!(slots.into_iter().all(|slot| peer.status(slot) == abi::CTRL_FAILED));
    // Late, and more than once: the second is an answer to nothing.
    assert!(owner.done(IOTLB_MSG, &update(BUFFERS, PAGE, BEHIND), &[]));
    answer(&channel, &longs(&[0]));
    assert_eq!(peer.does(abi::CTRL_FETCH, BUFFERS, 64), abi::CTRL_OK);
    answer(&channel, &longs(&[0]));
    bench.report(0);
    let slot = peer.gives(abi::CTRL_FETCH, BUFFERS + PAGE, 64);
    assert_eq!(next_miss(&mut channel), (BUFFERS + PAGE, 1));
    answer(&channel, &longs(&[1]));
    assert_eq!(peer.status(slot), abi::CTRL_DENIED);
    assert_eq!(bench.report(0).state, "up");
    assert!(bench.faults().is_empty());
    ends(&bench, owner, peer);
}

#[test]
fn garbage_on_the_back_end_channel_is_a_fault_of_the_owner() {
    let garbage: [Vec<u8>; 4] = [
        message(1, VERSION | 8, &longs(&[1])),
        message(1, VERSION, &longs(&[0])),
        message(1, VERSION | 4, &longs(&[0, 0])),
        vec![0xff; 20],
    ];
    for bytes in garbage {
        let bench = Bench::start();
        let (mut owner, mut channel, mut peer) = up(&bench);
        let slot = peer.gives(abi::CTRL_FETCH, BUFFERS, 64);
        next_miss(&mut channel);
        std::io::Write::write_all(&mut channel, &bytes).unwrap();
        owner.closed();
        assert_eq!(peer.status(slot), abi::CTRL_FAILED);
        bench.wait_until("counted", |report| report.counters.faults.get("message") == Some(&1));
        bench.logged("back-end channel");
        ends(&bench, owner, peer);
    }
}

#[test]
fn the_end_of_a_channel_that_was_replaced_is_not_the_end_of_its_successor() {
    let bench = Bench::start();
    let (mut owner, mut channel, mut peer) = up(&bench);
    let slot = peer.gives(abi::CTRL_FETCH, BUFFERS, 64);
    next_miss(&mut channel);
    let (mut mine, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(owner.done(SET_BACKEND_REQ_FD, &[], &[theirs.into()]));
    assert_eq!(next_miss(&mut mine), (BUFFERS, 1), "asked again");
    // The old channel's end has come by now.
    drop(channel);
    std::thread::sleep(Duration::from_millis(50));
    assert!(owner.done(IOTLB_MSG, &update(BUFFERS, PAGE, BEHIND), &[]));
    answer(&mine, &longs(&[0]));
    assert_eq!(peer.status(slot), abi::CTRL_OK);
    ends(&bench, owner, peer);
}

#[test]
fn a_closed_channel_holds_nobody_up() {
    let bench = Bench::start();
    let (mut owner, channel, mut peer) = up(&bench);
    drop(channel);
    assert_eq!(peer.does(abi::CTRL_FETCH, BUFFERS, 64), abi::CTRL_FAILED);
    // What is told without being asked for is answered all the while.
    assert!(owner.done(IOTLB_MSG, &invalidate(BUFFERS, PAGE), &[]));
    assert_eq!(bench.report(0).state, "up");
    ends(&bench, owner, peer);
}

#[test]
fn a_file_that_got_shorter_fails_copies_and_does_not_grow() {
    let bench = Bench::start();
    let memory = unsealed_memfd();
    let file = File::from(memory.try_clone().unwrap());
    let (mut owner, mut channel, mut peer) = up_with(&bench, memory);
    for (command, perm) in [(abi::CTRL_FETCH, 1), (abi::CTRL_STORE, 2)] {
        let slot = peer.gives(command, BUFFERS, 64);
        assert_eq!(next_miss(&mut channel), (BUFFERS, perm));
        assert!(owner.done(IOTLB_MSG, &update(BUFFERS, PAGE, BEHIND), &[]));
        answer(&channel, &longs(&[0]));
        assert_eq!(peer.status(slot), abi::CTRL_OK);
    }
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, BEHIND - FRONTEND).unwrap();
    assert_eq!(byte, [0xab], "the store arrived");
    let len = BEHIND - FRONTEND + 32;
    file.set_len(len).unwrap();
    for command in [abi::CTRL_FETCH, abi::CTRL_STORE] {
        assert_eq!(peer.does(command, BUFFERS, 64), abi::CTRL_FAILED);
    }
    assert_eq!(file.metadata().unwrap().len(), len);
    file.set_len(MEMORY).unwrap();
    assert_eq!(peer.does(abi::CTRL_FETCH, BUFFERS, 64), abi::CTRL_OK);
    ends(&bench, owner, peer);
}

#[test]
fn a_file_that_was_set_to_append_does_not_grow() {
    let bench = Bench::start();
    let memory = memfd();
    let file = File::from(memory.try_clone().unwrap());
    let (mut owner, mut channel, mut peer) = up_with(&bench, memory);
    let slot = peer.gives(abi::CTRL_STORE, BUFFERS, 64);
    next_miss(&mut channel);
    assert!(owner.done(IOTLB_MSG, &update(BUFFERS, PAGE, BEHIND), &[]));
    answer(&channel, &longs(&[0]));
    assert_eq!(peer.status(slot), abi::CTRL_OK);
    let append = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_APPEND);
    nix::fcntl::fcntl(&file, append).unwrap();
    assert_eq!(peer.does(abi::CTRL_STORE, BUFFERS, 64), abi::CTRL_FAILED);
    assert_eq!(file.metadata().unwrap().len(), MEMORY);
    ends(&bench, owner, peer);
}

#[test]
fn a_device_that_is_started_and_stopped_in_a_loop_while_it_answers_nothing_stays_bounded() {
    let bench = Bench::start();
    let (mut raw, _channel) = owner(&bench.left().0, BACKEND_REQ, memfd());
    let before = resident();
    for _ in 0..500 {
        raw.start_at_iovas();
        raw.owner_stops();
    }
    assert_eq!(bench.report(0).counters.iotlb_misses, 1, "one question, and no more until its answer");
    assert!(resident().saturating_sub(before) < 8 << 20);
    bench.right_link_works();
    drop(raw);
}
