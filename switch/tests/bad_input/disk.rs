//! A disk's configuration space, on the wire: what cannot be answered costs nobody the link.

use std::thread;
use std::time::Duration;

use crate::bench::Bench;
use crate::raw::{GET_CONFIG, OWNER_PROTOCOL, Raw, SET_CONFIG, words};

const CONFIG: u64 = 1 << 9;

fn ask(owner: &mut Raw, offset: u32, len: u32) -> Vec<u8> {
    let mut payload = words(&[offset, len, 0]);
    payload.resize(12 + len as usize, 0);
    owner.question(GET_CONFIG, &payload)
}

#[test]
fn what_is_not_in_a_disks_configuration_space_is_answered_empty_and_the_session_goes_on() {
    let bench = Bench::start();
    let mut owner = Raw::connect(&bench.sockets(2).0);
    owner.negotiate(OWNER_PROTOCOL | CONFIG);
    let whole = ask(&mut owner, 0, 60);
    // 8 MiB are 16384 sectors.
    assert_eq!(whole[..20], [&words(&[0, 60, 0])[..], &16384_u64.to_ne_bytes()].concat());
    for (number, (offset, len)) in [(0, 257), (256, 1), (4095, 1), (200, 100)].into_iter().enumerate() {
        assert_eq!(ask(&mut owner, offset, len), words(&[offset, 0, 0]), "{offset} {len}");
        assert_eq!(bench.report(2).counters.faults["config"], number as u64 + 1);
    }
    let mut write = words(&[32, 1, 0]);
    write.push(1);
    assert!(!owner.done(SET_CONFIG, &write, &[]), "it is read-only");
    assert_eq!(bench.report(2).counters.faults["config"], 5);
    assert_eq!(ask(&mut owner, 0, 60), whole);
    // A length that is not the payload's is no message.
    owner.ask(GET_CONFIG, &words(&[0, 60, 0]), &[]);
    owner.closed();
    while bench.report(2).owner.state != "absent" {
        thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(bench.report(2).counters.faults["message"], 1);
    let mut owner = Raw::connect(&bench.sockets(2).0);
    owner.negotiate(OWNER_PROTOCOL | CONFIG);
    assert_eq!(ask(&mut owner, 0, 60), whole);
}
