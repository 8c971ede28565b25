//! A front-end that does not read its answers, and a host that gives the broker nothing to keep them with: its session
//! ends, and the link knows. A program of its own, as the limit is the process's.
#![allow(clippy::unwrap_used, clippy::panic, dead_code)]

#[path = "bad_input/bench.rs"]
mod bench;
#[path = "bad_input/raw.rs"]
mod raw;

use std::thread;
use std::time::{Duration, Instant};

use bench::{Bench, log};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use raw::{NEED_REPLY, OWNER_PROTOCOL, Raw, SET_VRING_ENABLE, VERSION, message, words};

/// Far more answers than a socket takes that nobody reads.
const MESSAGES: usize = 4000;

/// Asks so often without reading that the broker has to keep an answer, when it may open no descriptor.
fn asks_without_end(raw: &mut Raw) {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 3, hard).unwrap();
    let disable = message(SET_VRING_ENABLE, VERSION | NEED_REPLY, &words(&[0, 0]));
    let before = said();
    raw.send(&disable.repeat(MESSAGES), &[]);
    let end = Instant::now() + Duration::from_secs(30);
    while said() == before {
        assert!(Instant::now() < end, "it is answered for ever: {}", log());
        thread::sleep(Duration::from_millis(2));
    }
    raw.closed();
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
}

/// How often the broker has said that it cannot answer.
fn said() -> usize {
    log().matches("an answer cannot be sent").count()
}

fn negotiated(bench: &Bench) -> Raw {
    let mut raw = Raw::connect(&bench.left().0);
    raw.negotiate(OWNER_PROTOCOL);
    raw
}

#[test]
fn a_session_that_cannot_be_answered_ends_for_the_link_too() {
    let bench = Bench::start();
    let mut first = negotiated(&bench);
    let mut waits = negotiated(&bench);
    assert!(bench.report(0).waiting_owner.is_some());
    asks_without_end(&mut waits);
    bench.wait_until("alone", |report| report.waiting_owner.is_none() && report.owner.state == "connected");
    // The one that has the link: whoever waits for it has it then.
    let mut waits = negotiated(&bench);
    asks_without_end(&mut first);
    bench.wait_until("another's", |report| report.waiting_owner.is_none());
    let (peer, window) = Raw::peer(&bench.left().1);
    waits.set_up();
    waits.start();
    bench.wait_until("up", |report| report.state == "up");
    asks_without_end(&mut waits);
    bench.wait_until("nobody's", |report| report.owner.state == "absent" && report.state != "up");
    drop(peer);
    window.join().unwrap();
    bench.wait_until("nobody there", |report| report.peer.state == "absent");
}
