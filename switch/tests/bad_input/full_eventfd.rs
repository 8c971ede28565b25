//! A VMM can take back the O_NONBLOCK of an eventfd that it gave away (the flag is
//! the open file's, not the descriptor's) and fill its count. Whoever signals it
//! then waits for as long as the VMM likes.

use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::bench::Bench;
use crate::raw::{OWNER_PROTOCOL, Raw, SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_KICK, longs, words};

fn eventfd() -> (EventFd, OwnedFd) {
    let mine = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
    let theirs = mine.as_fd().try_clone_to_owned().unwrap();
    (mine, theirs)
}

#[test]

fn a_full_and_blocking_call_of_one_link_stops_no_other_links_notifications() {
    let bench = Bench::start();
    let up = |link: usize, call: OwnedFd, kick: OwnedFd| {
        let (owner_socket, peer_socket) = bench.sockets(link);
        let (mut peer, window) = Raw::peer(&peer_socket);
        assert!(peer.done(SET_VRING_CALL, &longs(&[1]), &[call]));
        let mut owner = Raw::connect(&owner_socket);
        owner.negotiate(OWNER_PROTOCOL);
        owner.set_up();
        assert!(owner.done(SET_VRING_KICK, &longs(&[0]), &[kick]));
        assert!(owner.done(SET_VRING_ENABLE, &words(&[0, 1]), &[]));
        (peer, owner, window)
    };
    let (hostile_call, call) = eventfd();
    let (left_kick, kick) = eventfd();
    let left = up(0, call, kick);
    let (right_call, call) = eventfd();
    let (right_kick, kick) = eventfd();
    let right = up(1, call, kick);
    bench.wait_until("up", |report| report.state == "up");

    fcntl(&hostile_call, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    hostile_call.write(u64::MAX - 1).unwrap();
    left_kick.write(1).unwrap();
    let end = Instant::now() + Duration::from_secs(5);
    let mut arrived = false;
    while !arrived && Instant::now() < end {
        right_kick.write(1).unwrap();
        thread::sleep(Duration::from_millis(10));
        arrived = right_call.read().is_ok();
    }
    // Lets a broker that hangs go on, so that the test ends either way.
    let _ = hostile_call.read();
    drop((left.0, left.1, right.0, right.1));
    assert!(arrived, "the right link's kicks wait for the left link's VMM");
}
