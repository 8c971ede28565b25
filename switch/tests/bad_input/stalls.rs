//! A front-end that stops in the middle stalls itself and nothing else.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::bench::{Bench, settled_descriptors};
use crate::lingering::sent_to;
use crate::raw::{
    GET_FEATURES, NEED_REPLY, OWNER_PROTOCOL, PEER_PROTOCOL, REPLY, Raw, SET_BACKEND_REQ_FD, SET_FEATURES,
    SET_VRING_ENABLE, VERSION, VERSION_1, longs, message, words,
};

fn stalled(socket: &Path, bytes: &[u8]) -> Raw {
    let raw = Raw::connect(socket);
    raw.send(bytes, &[]);
    raw
}

/// A front-end of either side that stalls after so many bytes of a message.
fn stalls(bytes: &[u8]) {
    let bench = Bench::start();
    let open = settled_descriptors();
    let (owner_socket, peer_socket) = bench.left();

    let slow = stalled(&owner_socket, bytes);
    bench.wait_until("connected", |report| report.owner.state == "connected");
    let (mut peer, window) = Raw::peer(&peer_socket);
    assert_eq!(bench.report(0).peer.state, "started", "the same link's other side goes on");
    bench.right_link_works();
    peer.half_close();
    peer.closed();
    drop(peer);
    window.join().unwrap();
    drop(slow);
    bench.wait_until("gone", |report| report.owner.state == "absent");

    let slow = stalled(&peer_socket, bytes);
    bench.wait_until("connected", |report| report.peer.state == "connected");
    let mut owner = Raw::owner(&owner_socket);
    owner.owner_stops();
    bench.right_link_works();
    drop((slow, owner));
    bench.wait_until("gone", |report| report.peer.state == "absent" && report.owner.state == "absent");
    bench.descriptors_are(open);
}

#[test]
fn a_stall_before_the_first_byte_stalls_nobody_else() {
    stalls(&[]);
}

#[test]
fn a_stall_in_mid_header_stalls_nobody_else() {
    stalls(&message(SET_FEATURES, VERSION, &longs(&[0]))[..7]);
}

#[test]
fn a_stall_before_the_payload_stalls_nobody_else() {
    stalls(&message(SET_FEATURES, VERSION, &longs(&[0]))[..12]);
}

#[test]
fn a_stall_in_the_channels_payload_stalls_nobody_else() {
    stalls(&message(SET_BACKEND_REQ_FD, VERSION, &longs(&[0]))[..15]);
}

#[test]
fn a_header_in_single_bytes_is_a_header() {
    let bench = Bench::start();
    let mut raw = Raw::connect(&bench.left().0);
    for byte in message(GET_FEATURES, VERSION, &[]) {
        raw.send(&[byte], &[]);
    }
    let mut answer = [0; 20];
    std::io::Read::read_exact(&mut raw.stream, &mut answer).unwrap();
    assert_ne!(u64::from_ne_bytes(answer[12..].try_into().unwrap()) & VERSION_1, 0);
    assert!(bench.faults().is_empty());
}

#[test]
fn a_vmm_too_many_is_turned_away_and_the_first_goes_on() {
    let bench = Bench::start();
    let open = settled_descriptors();
    let (owner_socket, peer_socket) = bench.left();
    for (socket, protocol) in [(owner_socket, OWNER_PROTOCOL), (peer_socket, PEER_PROTOCOL)] {
        let mut first = Raw::connect(&socket);
        first.negotiate(protocol);
        // At the owner's socket one more may wait.
        let second = (protocol == OWNER_PROTOCOL).then(|| {
            let mut second = Raw::connect(&socket);
            second.negotiate(protocol);
            second
        });
        for _ in 0..20 {
            assert!(Raw::connect(&socket).closed().is_empty());
        }
        assert_eq!(first.question(GET_FEATURES, &[]).len(), 8);
        bench.logged("turned away");
        drop(second);
        first.half_close();
        first.closed();
        drop(first);
        // Its place is free again.
        let mut next = Raw::connect(&socket);
        next.negotiate(protocol);
    }
    bench.descriptors_are(open);
}

#[test]
fn descriptors_whose_close_takes_its_time_stall_nobody_though_their_sender_is_turned_away() {
    let bench = Bench::start();
    let open = settled_descriptors();
    let (owner_socket, _) = bench.left();
    let mut first = Raw::connect(&owner_socket);
    first.negotiate(OWNER_PROTOCOL);
    // Some are sent before the broker has closed.
    let others: Vec<_> = (0..30).map(|_| sent_to(&owner_socket).1).collect();
    assert_eq!(first.question(GET_FEATURES, &[]).len(), 8);
    bench.right_link_works();
    drop((first, others));
    bench.descriptors_are(open);
}

#[test]
fn a_vmm_that_never_answers_on_its_channel_is_disconnected_and_the_owner_goes_on() {
    let bench = Bench::start();
    let open = settled_descriptors();
    let (owner_socket, peer_socket) = bench.left();
    let mut owner = Raw::owner(&owner_socket);
    let mut peer = Raw::connect(&peer_socket);
    peer.negotiate(PEER_PROTOCOL);
    let (silent, theirs) = UnixStream::pair().unwrap();
    assert!(peer.done(SET_BACKEND_REQ_FD, &[], &[theirs.into()]));
    assert!(peer.done(SET_VRING_ENABLE, &words(&[0, 1]), &[]));
    peer.closed();
    bench.wait_until("failed", |report| report.state == "failed" && report.owner.state == "started");
    assert_eq!(bench.faults().get("window_unconfirmed"), Some(&1));
    bench.logged("did not confirm");
    owner.owner_stops();
    bench.right_link_works();
    drop((owner, peer, silent));
    bench.descriptors_are(open);
}

#[test]
fn an_owner_that_leaves_without_a_word_in_mid_message_leaves_its_place_free() {
    let bench = Bench::start();
    for len in 0..20 {
        let socket = bench.left().0;
        let whole = message(SET_FEATURES, VERSION, &longs(&[0]));
        drop(stalled(&socket, &whole[..len]));
        bench.wait_until("gone", |report| report.owner.state == "absent");
    }
    drop(Raw::owner(&bench.left().0));
}

#[test]
fn a_front_end_that_reads_its_answers_late_gets_each_once_and_in_order() {
    const MESSAGES: usize = 3000;
    let bench = Bench::start();
    let mut owner = Raw::owner(&bench.left().0);
    let mut writer = owner.stream.try_clone().unwrap();
    // More than sockets hold in either direction: the broker waits for its reader.
    let thread = std::thread::spawn(move || {
        for index in 0..MESSAGES as u32 {
            let enable = message(SET_VRING_ENABLE, VERSION | NEED_REPLY, &words(&[index % 2, index / 2 % 2]));
            std::io::Write::write_all(&mut writer, &enable).unwrap();
        }
    });
    bench.right_link_works();
    std::thread::sleep(Duration::from_millis(200));
    let expected = message(SET_VRING_ENABLE, VERSION | REPLY, &longs(&[0]));
    for index in 0..MESSAGES {
        let mut answer = [0; 20];
        std::io::Read::read_exact(&mut owner.stream, &mut answer).unwrap();
        assert_eq!(answer[..], expected, "answer {index}");
    }
    thread.join().unwrap();
    // Nothing comes twice.
    assert_eq!(owner.question(GET_FEATURES, &[]).len(), 8);
    assert!(bench.faults().is_empty());
}
