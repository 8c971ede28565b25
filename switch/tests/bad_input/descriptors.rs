//! Descriptors of the wrong kind, and too many of them.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};

use crate::bench::{Bench, settled_descriptors};
use crate::raw::{
    ADD_MEM_REG, FRONTEND, GET_FEATURES, GET_MAX_MEM_SLOTS, MEMORY, NEED_REPLY, OWNER_PROTOCOL,
    PEER_PROTOCOL, Raw, SET_BACKEND_REQ_FD, SET_MEM_TABLE, SET_VRING_CALL, SET_VRING_KICK, VERSION, eventfd,
    longs, memfd, message, region, table,
};

/// Things that are neither shared memory nor eventfds.
fn others() -> Vec<(&'static str, OwnedFd)> {
    let (pipe, _) = nix::unistd::pipe().unwrap();
    // A file of a file system on a disk, or as near to one as the host has.
    let disk = File::open(std::env::current_exe().unwrap()).unwrap();
    vec![
        ("a pipe", pipe),
        ("a file on disk", disk.into()),
        ("a socket", UnixStream::pair().unwrap().0.into()),
        ("/dev/null", OpenOptions::new().read(true).write(true).open("/dev/null").unwrap().into()),
        ("a file of /proc", File::open("/proc/self/maps").unwrap().into()),
        ("a folder", File::open("/").unwrap().into()),
    ]
}

/// One session that sends this and has to end as a fault of the descriptor.
fn refused(bench: &Bench, peer: bool, name: &str, bytes: &[u8], fds: Vec<OwnedFd>) {
    let open = settled_descriptors() - fds.len();
    let before = bench.faults().get("descriptor").copied().unwrap_or(0);
    let (owner_socket, peer_socket) = bench.left();
    let mut raw = Raw::connect(if peer { &peer_socket } else { &owner_socket });
    raw.negotiate(if peer { PEER_PROTOCOL } else { OWNER_PROTOCOL });
    raw.send(bytes, &fds);
    raw.closed();
    drop((raw, fds));
    bench.wait_until(name, |report| report.counters.faults.get("descriptor") == Some(&(before + 1)));
    bench.descriptors_are(open);
}

#[test]
fn what_is_no_shared_memory_is_refused_as_memory() {
    let bench = Bench::start();
    let one = message(SET_MEM_TABLE, VERSION, &table(&[region()]));
    let mut add = longs(&[0]);
    add.extend(longs(&region()));
    let add = message(ADD_MEM_REG, VERSION, &add);
    for bytes in [&one, &add] {
        for (name, fd) in others() {
            refused(&bench, false, name, bytes, vec![fd]);
        }
        refused(&bench, false, "an eventfd", bytes, vec![eventfd()]);
    }
    bench.logged("memory-backend-memfd");
    bench.right_link_works();
}

#[test]
fn one_wrong_descriptor_among_good_ones_is_enough() {
    let bench = Bench::start();
    let regions =
        [region(), [1 << 30, 4096, FRONTEND + (1 << 30), 0], [2 << 30, 4096, FRONTEND + (2 << 30), 0]];
    let bytes = message(SET_MEM_TABLE, VERSION, &table(&regions));
    refused(&bench, false, "one of three", &bytes, vec![memfd(), eventfd(), memfd()]);
}

#[test]
fn memory_that_the_peer_could_not_map_for_writing_is_the_owners_fault() {
    let bench = Bench::start();
    let one = message(SET_MEM_TABLE, VERSION, &table(&[region()]));
    let ram = memfd();
    let again = format!("/proc/self/fd/{}", ram.as_raw_fd());
    let flags = nix::libc::O_PATH;
    refused(&bench, false, "read-only", &one, vec![File::open(&again).unwrap().into()]);
    let path = OpenOptions::new().read(true).custom_flags(flags).open(&again).unwrap();
    refused(&bench, false, "a path", &one, vec![path.into()]);
}

#[test]
fn what_is_no_eventfd_is_refused_as_kick_and_call() {
    let bench = Bench::start();
    for peer in [false, true] {
        for request in [SET_VRING_KICK, SET_VRING_CALL] {
            let bytes = message(request, VERSION, &longs(&[0]));
            for (name, fd) in others() {
                refused(&bench, peer, name, &bytes, vec![fd]);
            }
            refused(&bench, peer, "a memfd", &bytes, vec![memfd()]);
        }
    }
    bench.logged("no eventfd");
    bench.right_link_works();
}

#[test]
fn what_is_no_unix_stream_is_refused_as_channel() {
    let bench = Bench::start();
    let bytes = message(SET_BACKEND_REQ_FD, VERSION, &[]);
    for (name, fd) in others().into_iter().filter(|(name, _)| *name != "a socket") {
        refused(&bench, true, name, &bytes, vec![fd]);
    }
    refused(&bench, true, "an eventfd", &bytes, vec![eventfd()]);
    refused(&bench, true, "datagrams", &bytes, vec![UnixDatagram::pair().unwrap().0.into()]);
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    refused(&bench, true, "UDP", &bytes, vec![udp.into()]);
}

#[test]
fn a_channel_that_is_sent_again_and_again_leaves_no_descriptor() {
    let bench = Bench::start();
    let open = settled_descriptors();
    let mut peer = Raw::connect(&bench.left().1);
    peer.negotiate(PEER_PROTOCOL);
    for _ in 0..100 {
        let (_mine, theirs) = UnixStream::pair().unwrap();
        assert!(peer.done(SET_BACKEND_REQ_FD, &[], &[theirs.into()]));
    }
    drop(peer);
    bench.descriptors_are(open);
}

#[test]
fn calls_that_are_replaced_again_and_again_leave_no_descriptor() {
    let bench = Bench::start();
    let open = settled_descriptors();
    let (owner_socket, peer_socket) = bench.left();
    let mut owner = Raw::owner(&owner_socket);
    let (mut peer, window) = Raw::peer(&peer_socket);
    bench.wait_until("up", |report| report.state == "up");
    for _ in 0..300 {
        assert!(owner.done(SET_VRING_CALL, &longs(&[0]), &[eventfd()]));
        assert!(peer.done(SET_VRING_CALL, &longs(&[1]), &[eventfd()]));
    }
    drop((owner, peer));
    window.join().unwrap();
    bench.descriptors_are(open);
}

#[test]
fn more_descriptors_than_a_message_may_have_are_all_closed() {
    let bench = Bench::start();
    let open = settled_descriptors();
    for count in [32usize, 33, 34, 100, 200] {
        for peer in [false, true] {
            let (owner_socket, peer_socket) = bench.left();
            let socket = if peer { peer_socket } else { owner_socket };
            let regions: Vec<_> =
                (0..count as u64).map(|index| [index << 30, 4096, FRONTEND + (index << 30), 0]).collect();
            let bodies = [
                message(SET_MEM_TABLE, VERSION, &table(&regions)),
                message(GET_FEATURES, VERSION, &[]),
                message(SET_VRING_KICK, VERSION, &longs(&[0])),
            ];
            for bytes in bodies {
                let ram = memfd();
                let fds: Vec<OwnedFd> = (0..count).map(|_| ram.try_clone().unwrap()).collect();
                let mut raw = Raw::connect(&socket);
                raw.negotiate(if peer { PEER_PROTOCOL } else { OWNER_PROTOCOL });
                raw.send(&bytes, &fds);
                raw.half_close();
                raw.closed();
                drop((raw, fds, ram));
                bench.descriptors_are(open);
            }
        }
    }
    bench.wait_until("counted", |report| report.counters.faults.contains_key("message"));
    bench.right_link_works();
}

#[test]
fn descriptors_on_a_payload_without_its_header_are_closed() {
    let bench = Bench::start();
    let open = settled_descriptors();
    let mut raw = Raw::connect(&bench.left().0);
    raw.negotiate(OWNER_PROTOCOL);
    let whole = message(SET_MEM_TABLE, VERSION, &table(&[region()]));
    raw.send(&whole[..12], &[]);
    raw.send(&whole[12..], &[memfd()]);
    raw.closed();
    drop(raw);
    bench.descriptors_are(open);
    bench.wait_until("counted", |report| report.counters.faults.get("message") == Some(&1));
}

#[test]
fn what_a_peers_vmm_keeps_of_its_window_is_not_its_successors() {
    let bench = Bench::start();
    let (owner_socket, peer_socket) = bench.left();
    let _owner = Raw::owner(&owner_socket);
    let areas = || {
        let (mut peer, window) = Raw::peer(&peer_socket);
        bench.wait_until("up", |report| report.state == "up");
        peer.half_close();
        peer.closed();
        drop(peer);
        bench.wait_until("gone", |report| report.peer.state == "absent");
        let files = window.join().unwrap().into_iter().flatten();
        files.filter(|file| file.metadata().unwrap().len() != MEMORY).collect::<Vec<_>>()
    };
    let kept = areas();
    let inode = |file: &File| file.metadata().unwrap().ino();
    assert!(kept.len() >= 3, "link area, control area and witness: {kept:?}");
    let old: Vec<_> = kept.iter().map(inode).collect();
    let new: Vec<_> = areas().iter().map(inode).collect();
    assert!(new.len() >= 3 && !new.iter().any(|file| old.contains(file)), "{new:?} of {old:?}");
}

#[test]
fn an_owner_brings_no_more_regions_than_its_link_may_have() {
    let bench = Bench::start();
    let mut owner = Raw::connect(&bench.left().0);
    owner.negotiate(OWNER_PROTOCOL);
    let slots = owner.question(GET_MAX_MEM_SLOTS, &[]);
    let slots = u64::from_ne_bytes(slots.try_into().unwrap());
    assert_eq!(slots, 16);
    let mut add = |slot: u64| {
        let mut payload = longs(&[0]);
        payload.extend(longs(&[slot << 30, MEMORY, FRONTEND + (slot << 30), 0]));
        owner.send(&message(ADD_MEM_REG, VERSION | NEED_REPLY, &payload), &[memfd()]);
    };
    (0..=slots).for_each(&mut add);
    owner.closed();
    bench.logged("17 memory regions, 16 are allowed (memory_regions in the link's configuration)");
    let limits = bench.report(0).limits;
    assert_eq!((limits.memory_regions, limits.unsealed_memory), (16, true));
    assert_eq!((limits.connections_per_second, limits.messages_per_second), (1_000_000, 50_000));
}
