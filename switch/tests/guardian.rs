//! A broker that is killed, with a guardian: no owner is let go while its peer has its memory.
#![allow(clippy::unwrap_used, clippy::panic, dead_code)]

#[path = "confinement/bench.rs"]
mod bench;
#[path = "bad_input/raw.rs"]
mod raw;
#[path = "guardian/vmm.rs"]
mod vmm;

use std::io::{ErrorKind, Read};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use bench::{Place, Running, Who};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use raw::{Raw, VERSION, message, words};
use vhost_pci_device::abi;
use vm_memory::{Bytes, GuestAddress};
use vmm::{Asked, Vmm};

/// Whether the other end is open, whatever it sent.
fn is_open(connection: &Raw) -> bool {
    connection.stream.set_nonblocking(true).unwrap();
    let end = loop {
        match (&connection.stream).read(&mut [0; 64]) {
            Ok(1..) => {}
            end => break end,
        }
    };
    connection.stream.set_nonblocking(false).unwrap();
    matches!(end, Err(error) if error.kind() == ErrorKind::WouldBlock)
}

/// A broker with a link that is up.
fn up(timeout_ms: u64) -> (Place, Running, Raw, Vmm) {
    let place = Place::of(Who::Nobody);
    let broker = place.start(&format!("confirm_timeout_ms = {timeout_ms}"), "");
    let vmm = Vmm::start(&place);
    let owner = Raw::owner(&place.at("link-owner"));
    place.wait_until("up", |report| report["links"][0]["state"] == "up");
    (place, broker, owner, vmm)
}

fn is_owners(asked: &Asked) -> bool {
    asked.1 >= abi::DATA_OFFSET
}

fn ends_with_its_peers_view(signal: Signal) {
    let (place, mut broker, mut owner, mut vmm) = up(60_000);
    let area = vmm.areas.recv().unwrap();
    let status = || {
        let header = |at| area.read_obj::<u64>(GuestAddress(at)).unwrap();
        (header(8), area.read_obj::<u32>(GuestAddress(16)).unwrap())
    };
    let mapped: Vec<_> = vmm.asked.try_iter().filter(|asked| asked.0 && is_owners(asked)).collect();
    let (before, up) = status();
    assert!(!mapped.is_empty() && up & abi::LINK_S_UP != 0);
    broker.signal(signal);
    broker.ends();
    let unmapped = vmm.until(|asked| asked.1 == abi::WITNESS_OFFSET);
    let gone: Vec<_> =
        unmapped.iter().filter(|asked| is_owners(asked)).map(|asked| (true, asked.1, asked.2)).collect();
    assert_eq!(gone, mapped, "all is unmapped, once, before the witness is");
    let (after, down) = status();
    assert!(after > before && after % 2 == 0 && down & abi::LINK_S_UP == 0, "{before} {after} {down}");
    // What QEMU does before anything else.
    assert!(vmm.connection.done(raw::REM_MEM_REG, &[0; 40], &[]));
    // The witness is mapped: so might be what was beside it.
    thread::sleep(Duration::from_millis(100));
    assert!(is_open(&owner) && is_open(&vmm.connection));
    vmm.may.send(()).unwrap();
    owner.closed();
    vmm.connection.closed();
    broker.logs("its guardian took back");
    // Whoever comes next finds everything as it should be.
    let again = place.start("", "");
    let next = Vmm::start(&place);
    let _owner = Raw::owner(&place.at("link-owner"));
    place.wait_until("up again", |report| report["links"][0]["state"] == "up");
    drop((next, again));
}

#[test]
fn an_owner_is_let_go_when_its_peer_has_nothing_of_it_and_the_broker_was_killed() {
    ends_with_its_peers_view(Signal::SIGKILL);
}

#[test]
fn an_owner_is_let_go_when_its_peer_has_nothing_of_it_and_the_broker_was_told_to_end() {
    ends_with_its_peers_view(Signal::SIGTERM);
}

#[test]
fn an_owner_whose_peer_never_lets_go_is_let_go_when_the_time_is_over_and_that_is_said() {
    let (_place, broker, mut owner, mut vmm) = up(700);
    drop(std::mem::replace(&mut vmm.may, channel().0));
    let killed = Instant::now();
    broker.signal(Signal::SIGKILL);
    owner.closed();
    assert!(killed.elapsed() >= Duration::from_millis(700));
    broker.logs("did not let go of the owner's memory in time");
    broker.logs("still_held=1");
}

#[test]
fn a_driver_that_says_that_it_serves_is_waited_for_a_while() {
    let (_place, broker, mut owner, vmm) = up(60_000);
    let area = vmm.areas.recv().unwrap();
    let served = GuestAddress(abi::CONTROL_OFFSET + abi::CONTROL_LEN - abi::CONTROL_SERVED_FROM_END);
    // It was killed in the middle of a burst.
    area.write_obj(2_u64, served).unwrap();
    let killed = Instant::now();
    broker.signal(Signal::SIGKILL);
    vmm.until(|asked| !asked.0 && is_owners(asked));
    assert!(killed.elapsed() >= Duration::from_millis(500), "{:?}", killed.elapsed());
    vmm.may.send(()).unwrap();
    owner.closed();
}

#[test]
fn an_owner_without_a_peer_is_let_go_at_once() {
    let place = Place::of(Who::Nobody);
    let broker = place.start("confirm_timeout_ms = 60000", "");
    let mut owner = Raw::owner(&place.at("link-owner"));
    broker.signal(Signal::SIGKILL);
    owner.closed();
    broker.logs("windows=0");
}

#[test]
fn a_broker_whose_guardian_is_gone_says_so_and_goes_on() {
    let place = Place::of(Who::Nobody);
    let broker = place.start("", "");
    let guardian = place.report()["guardian"].as_i64().unwrap();
    kill(Pid::from_raw(guardian as i32), Signal::SIGKILL).unwrap();
    place.wait_until("without a guardian", |report| report["guardian"].is_null());
    let vmm = Vmm::start(&place);
    broker.logs("nobody takes back what peers have mapped if this broker is killed");
    let mut owner = Raw::owner(&place.at("link-owner"));
    place.wait_until("up", |report| report["links"][0]["state"] == "up");
    broker.signal(Signal::SIGKILL);
    owner.closed();
    drop(vmm);
}

#[test]
fn a_guardian_gives_up_what_the_broker_gives_up_and_ends_after_it() {
    let place = Place::of(Who::Nobody);
    let broker = place.start("confine = \"require\"", "");
    let guardian = place.report()["guardian"].as_i64().unwrap();
    let path = format!("/proc/{guardian}/status");
    let status = std::fs::read_to_string(&path).unwrap();
    let field =
        |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1".into(), "2".into()));
    assert_eq!((field("CapEff:"), field("CapPrm:")), ("0".repeat(16), "0".repeat(16)));
    // The terminal's and the service manager's word is not for it.
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        kill(Pid::from_raw(guardian as i32), signal).unwrap();
    }
    thread::sleep(Duration::from_millis(50));
    assert_eq!(place.report()["guardian"].as_i64(), Some(guardian));
    broker.signal(Signal::SIGKILL);
    let end = Instant::now() + bench::PATIENCE;
    // Nobody may have waited for it.
    while std::fs::read_to_string(&path).is_ok_and(|status| !status.contains("State:\tZ")) {
        assert!(Instant::now() < end, "the guardian stays");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_owner_whose_peer_said_yes_is_held_until_the_kernel_says_so_whoever_asked() {
    let (_place, broker, mut owner, vmm) = up(60_000);
    let _ = vmm.asked.try_iter().count();
    for vring in 0..2 {
        owner.ask(raw::GET_VRING_BASE, &words(&[vring, 0]), &[]);
    }
    // The broker's own revocation: all is answered, and the witness is mapped still.
    let asked = vmm.until(|asked| !asked.0 && asked.1 == abi::WITNESS_OFFSET);
    assert!(asked.iter().any(|asked| !asked.0 && is_owners(asked)));
    broker.signal(Signal::SIGKILL);
    thread::sleep(Duration::from_millis(150));
    assert!(is_open(&owner));
    vmm.may.send(()).unwrap();
    owner.closed();
    broker.logs("still_held=0");
}

/// A second link's keys.
fn second(place: &Place) -> String {
    let at = |name: &str| place.at(name).display().to_string();
    let (owner, peer) = (at("second-owner"), at("second-peer"));
    format!("[[link]]\nname = \"second\"\nowner_socket = \"{owner}\"\npeer_socket = \"{peer}\"\n")
}

#[test]
fn a_vmm_that_writes_without_end_holds_up_its_own_link_only() {
    let place = Place::of(Who::Nobody);
    let broker = place.start("confirm_timeout_ms = 3000", &second(&place));
    let vmm = Vmm::start(&place);
    let mut owner = Raw::owner(&place.at("link-owner"));
    place.wait_until("up", |report| report["links"][0]["state"] == "up");
    let mut other = Raw::owner(&place.at("second-owner"));
    broker.signal(Signal::SIGSTOP);
    // More than is read at once, and more and more of it.
    let flood = vmm.connection.stream.try_clone().unwrap();
    let flooded = thread::spawn(move || {
        let message = message(raw::SET_VRING_NUM, VERSION, &words(&[0, 64])).repeat(512);
        while std::io::Write::write_all(&mut &flood, &message).is_ok() {}
    });
    thread::sleep(Duration::from_millis(50));
    let killed = Instant::now();
    broker.signal(Signal::SIGKILL);
    other.closed();
    assert!(killed.elapsed() < Duration::from_secs(2), "{:?}", killed.elapsed());
    // What held its witness is let go when the time is over.
    owner.closed();
    broker.logs("still_held=1");
    drop(vmm);
    flooded.join().unwrap();
}
