//! VMMs that answer wrong what the broker asks them on the back-end channel: each request that there
//! is, and each way to answer it. Who is at fault is disconnected, or is ignored where that harms nobody; in each
//! case the other side and the other link go on.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::bench::{Bench, settled_descriptors};
use crate::iommu_owner::{BACKEND_REQ, Peer, next_miss, owner};
use crate::raw::{
    GET_FEATURES, GET_VRING_BASE, MEMORY, NEED_REPLY, OWNER_PROTOCOL, PEER_PROTOCOL, REPLY, Raw,
    SET_BACKEND_REQ_FD, SET_MEM_TABLE, SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_KICK, VERSION, eventfd,
    header, longs, memfd, message, region, table, words,
};

const IOTLB: u32 = 1;
const MAP: u32 = 9;
const UNMAP: u32 = 10;
const WIRE: u32 = 0x5650_0101;
const WIRING: u64 = 1 << 60;
/// Flag of WIRE: joins.
const ON: u32 = 1 << 1;

/// What the VMM is asked when it errs.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Question {
    Map,
    Unmap,
    Wire,
    Unwire,
    Miss,
}

const QUESTIONS: [Question; 5] =
    [Question::Map, Question::Unmap, Question::Wire, Question::Unwire, Question::Miss];

/// A VMM that was asked, and the other side.
struct Asked {
    vmm: Raw,
    channel: UnixStream,
    /// The number of the question.
    code: u32,
    other: Other,
}

enum Other {
    Owner(Raw),
    Peer(Peer),
    Gone,
}

/// The next request: its number and payload.
fn next(channel: &mut UnixStream) -> (u32, Vec<u8>) {
    let mut header = [0; 12];
    channel.read_exact(&mut header).unwrap();
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    let mut payload = vec![0; word(8) as usize];
    channel.read_exact(&mut payload).unwrap();
    (word(0), payload)
}

fn yes(code: u32) -> Vec<u8> {
    message(code, VERSION | REPLY, &longs(&[0]))
}

/// Answers until it is asked what `is` says, or, without that, until nothing more comes.
fn agree_until(channel: &mut UnixStream, is: impl Fn(u32, &[u8]) -> bool) -> u32 {
    loop {
        let (code, payload) = next(channel);
        if is(code, &payload) {
            return code;
        }
        channel.write_all(&yes(code)).unwrap();
    }
}

fn agree_to_all(mut channel: UnixStream) {
    let mut header = [0; 12];
    while channel.read_exact(&mut header).is_ok() {
        let len = u32::from_ne_bytes(header[8..].try_into().unwrap());
        let mut payload = vec![0; len as usize];
        let code = u32::from_ne_bytes(header[..4].try_into().unwrap());
        if channel.read_exact(&mut payload).is_err() || channel.write_all(&yes(code)).is_err() {
            return;
        }
    }
}

/// A peer's VMM that has started its device and answers nothing by itself.
fn peer(bench: &Bench, wiring: bool) -> (Raw, UnixStream) {
    let mut raw = Raw::connect(&bench.left().1);
    raw.negotiate(PEER_PROTOCOL | if wiring { WIRING } else { 0 });
    let (mine, theirs) = UnixStream::pair().unwrap();
    mine.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    assert!(raw.done(SET_BACKEND_REQ_FD, &[], &[theirs.into()]));
    for index in 0..3u32 {
        assert!(raw.done(SET_VRING_CALL, &longs(&[index.into()]), &[eventfd()]));
        assert!(raw.done(SET_VRING_KICK, &longs(&[index.into()]), &[eventfd()]));
        assert!(raw.done(SET_VRING_ENABLE, &words(&[index, 1]), &[]));
    }
    (raw, mine)
}

fn ask(bench: &Bench, question: Question) -> Asked {
    if question == Question::Miss {
        let peer = Peer::start(&bench.left().1);
        let (mut vmm, mut channel) = owner(&bench.left().0, BACKEND_REQ, memfd());
        vmm.start_at_iovas();
        next_miss(&mut channel);
        return Asked { vmm, channel, code: IOTLB, other: Other::Peer(peer) };
    }
    let owner = Raw::owner(&bench.left().0);
    let (vmm, mut channel) = peer(bench, matches!(question, Question::Wire | Question::Unwire));
    let wire = |on: bool| {
        move |code: u32, payload: &[u8]| {
            code == WIRE && (u32::from_ne_bytes(payload[4..].try_into().unwrap()) & ON != 0) == on
        }
    };
    let owners = |code: u32, payload: &[u8]| code == MAP && payload[24..32] == MEMORY.to_ne_bytes();
    let (code, other) = match question {
        Question::Map => (agree_until(&mut channel, owners), Other::Owner(owner)),
        Question::Wire => (agree_until(&mut channel, wire(true)), Other::Owner(owner)),
        Question::Unmap => {
            agree_until(&mut channel, owners);
            channel.write_all(&yes(MAP)).unwrap();
            drop(owner);
            (agree_until(&mut channel, |code, _| code == UNMAP), Other::Gone)
        }
        _ => {
            let mut asked = agree_until(&mut channel, wire(true));
            for _ in 0..3 {
                channel.write_all(&yes(asked)).unwrap();
                asked = agree_until(&mut channel, wire(true));
            }
            channel.write_all(&yes(asked)).unwrap();
            owner.ask(GET_VRING_BASE, &words(&[0, 0]), &[]);
            (agree_until(&mut channel, wire(false)), Other::Owner(owner))
        }
    };
    Asked { vmm, channel, code, other }
}

/// The other side is served, whatever has become of the VMM.
fn goes_on(other: &mut Other, question: Question) {
    match other {
        Other::Owner(owner) => {
            if question == Question::Unwire {
                let mut answer = [0; 20];
                owner.stream.read_exact(&mut answer).unwrap();
                assert_eq!(answer[..4], GET_VRING_BASE.to_ne_bytes());
            }
            assert_eq!(owner.question(GET_FEATURES, &[]).len(), 8);
        }
        Other::Peer(peer) => peer.answers(),
        Other::Gone => {}
    }
}

/// Both sides come anew, and the link is up.
fn starts_anew(bench: &Bench, asked: Asked) {
    drop(asked.vmm);
    drop(asked.channel);
    match asked.other {
        Other::Owner(owner) => drop(owner),
        Other::Peer(peer) => peer.leaves(),
        Other::Gone => {}
    }
    bench.wait_until("gone", |report| report.owner.state == "absent" && report.peer.state == "absent");
    let (peer, window) = Raw::peer(&bench.left().1);
    let owner = Raw::owner(&bench.left().0);
    bench.wait_until("up", |report| report.state == "up");
    drop((owner, peer));
    window.join().unwrap();
    bench.right_link_works();
}

/// Each question, answered by `bytes`, is the VMM's fault at once.
fn at_fault(bytes: impl Fn(u32) -> Vec<u8>, words: &str) {
    for question in QUESTIONS {
        let bench = Bench::start();
        let open = settled_descriptors();
        let mut asked = ask(&bench, question);
        asked.channel.write_all(&bytes(asked.code)).unwrap();
        asked.vmm.closed();
        bench.wait_until("counted", |report| report.counters.faults.get("message") == Some(&1));
        assert_eq!(bench.faults().len(), 1, "{question:?}");
        bench.logged("back-end channel");
        bench.logged(words);
        goes_on(&mut asked.other, question);
        starts_anew(&bench, asked);
        bench.descriptors_are(open);
    }
}

#[test]
fn an_answer_to_another_request_is_a_fault() {
    at_fault(|code| yes(code + 2), "an answer to request");
}

#[test]
fn an_answer_of_another_size_is_a_fault_though_no_more_of_it_comes() {
    for size in [0, 4, 16, u32::MAX] {
        at_fault(|code| header(code, VERSION | REPLY, size), "no answer");
    }
}

#[test]
fn what_is_not_marked_as_an_answer_is_a_fault() {
    at_fault(|code| message(code, VERSION, &longs(&[0])), "no answer");
    at_fault(|code| message(code, VERSION | NEED_REPLY, &longs(&[0])), "no answer");
}

/// Each question, answered well by `answer`, though strangely: nothing comes of it.
fn no_fault(answer: impl Fn(&mut UnixStream, u32)) {
    for question in QUESTIONS {
        let bench = Bench::start();
        let open = settled_descriptors();
        let mut asked = ask(&bench, question);
        answer(&mut asked.channel, asked.code);
        let others = asked.channel.try_clone().unwrap();
        let thread = thread::spawn(move || agree_to_all(others));
        goes_on(&mut asked.other, question);
        if matches!(question, Question::Map | Question::Wire) {
            bench.wait_until("up", |report| report.state == "up");
        }
        assert_eq!(asked.vmm.question(GET_FEATURES, &[]).len(), 8, "{question:?}");
        // The owner's yes without a translation leaves its vring unknown.
        let is_known = |kind: &String| question == Question::Miss && kind == "vring";
        assert!(bench.faults().keys().all(is_known), "{question:?}: {:?}", bench.faults());
        asked.channel.shutdown(std::net::Shutdown::Both).unwrap();
        thread.join().unwrap();
        starts_anew(&bench, asked);
        bench.descriptors_are(open);
    }
}

#[test]
fn descriptors_that_come_with_an_answer_are_closed() {
    no_fault(|channel, code| {
        let fds: Vec<_> = (0..64).map(|_| eventfd()).collect();
        let raw: Vec<_> = fds.iter().map(std::os::fd::AsRawFd::as_raw_fd).collect();
        channel.send_with_fds(&[yes(code).as_slice()], &raw).unwrap();
    });
}

#[test]
fn an_answer_in_pieces_is_an_answer() {
    no_fault(|channel, code| {
        let answer = yes(code);
        for piece in [&answer[..5], &answer[5..12], &answer[12..15], &answer[15..]] {
            channel.write_all(piece).unwrap();
            thread::sleep(Duration::from_millis(20));
        }
    });
}

/// Of an answer to nothing the next question's answer cannot be told if it has the same number: that is
/// what the witness page is for.
#[test]
fn answers_to_nothing_are_ignored() {
    let bench = Bench::start();
    let open = settled_descriptors();
    let mut owner = Raw::owner(&bench.left().0);
    let (mut vmm, mut channel) = peer(&bench, false);
    channel.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut header = [0; 12];
    loop {
        match channel.read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
            Err(error) => panic!("{error}"),
        }
        channel.read_exact(&mut [0; 40]).unwrap();
        let code = u32::from_ne_bytes(header[..4].try_into().unwrap());
        channel.write_all(&yes(code)).unwrap();
    }
    bench.wait_until("up", |report| report.state == "up");
    for code in [IOTLB, MAP, UNMAP, WIRE, 0, u32::MAX].into_iter().cycle().take(300) {
        channel.write_all(&yes(code)).unwrap();
    }
    assert_eq!(vmm.question(GET_FEATURES, &[]).len(), 8);
    assert_eq!(owner.question(GET_FEATURES, &[]).len(), 8);
    thread::sleep(Duration::from_millis(50));
    assert_eq!((bench.report(0).state.as_str(), bench.faults().len()), ("up", 0));
    let asked = Asked { vmm, channel, code: MAP, other: Other::Owner(owner) };
    starts_anew(&bench, asked);
    bench.descriptors_are(open);
}

#[test]
fn an_answer_that_comes_twice_is_taken_for_the_next_ones_or_a_fault() {
    for question in QUESTIONS {
        let bench = Bench::start();
        let open = settled_descriptors();
        let mut asked = ask(&bench, question);
        let twice = [yes(asked.code), yes(asked.code)].concat();
        asked.channel.write_all(&twice).unwrap();
        let others = asked.channel.try_clone().unwrap();
        let thread = thread::spawn(move || agree_to_all(others));
        goes_on(&mut asked.other, question);
        thread::sleep(Duration::from_millis(50));
        // The owner's yes without a translation leaves its vring unknown.
        let expected = if question == Question::Miss { "vring" } else { "message" };
        assert!(bench.faults().keys().all(|kind| kind == expected), "{question:?}: {:?}", bench.faults());
        drop(asked.channel.shutdown(std::net::Shutdown::Both));
        thread.join().unwrap();
        starts_anew(&bench, asked);
        bench.descriptors_are(open);
    }
}

#[test]
fn a_no_is_a_fault_where_it_has_to_be_done_and_none_where_it_has_not() {
    for (question, fault) in [
        (Question::Map, Some("window_refused")),
        (Question::Unmap, Some("window_refused")),
        (Question::Unwire, Some("wiring")),
        (Question::Wire, None),
        (Question::Miss, None),
    ] {
        for value in [1, u64::MAX, 1 << 63] {
            let bench = Bench::start();
            let open = settled_descriptors();
            let mut asked = ask(&bench, question);
            asked.channel.write_all(&message(asked.code, VERSION | REPLY, &longs(&[value]))).unwrap();
            let others = asked.channel.try_clone().unwrap();
            let thread = thread::spawn(move || agree_to_all(others));
            match fault {
                Some(kind) => {
                    asked.vmm.closed();
                    bench.wait_until("counted", |report| report.counters.faults.get(kind) == Some(&1));
                    bench.logged("refused to");
                }
                None => assert_eq!(asked.vmm.question(GET_FEATURES, &[]).len(), 8),
            }
            goes_on(&mut asked.other, question);
            // What the owner's own IOMMU does not know cannot be a vring.
            let expected = fault.unwrap_or("vring");
            assert!(bench.faults().keys().all(|kind| kind == expected), "{question:?}: {:?}", bench.faults());
            drop(asked.channel.shutdown(std::net::Shutdown::Both));
            thread.join().unwrap();
            starts_anew(&bench, asked);
            bench.descriptors_are(open);
        }
    }
}

#[test]
fn an_answer_that_comes_too_late_or_never_is_a_fault_of_a_peer_and_costs_an_owner_its_command() {
    for question in QUESTIONS {
        let is_peers = question != Question::Miss;
        let bench = Bench::start();
        let open = settled_descriptors();
        let mut asked = ask(&bench, question);
        if is_peers {
            // Half an answer is none. Those to what was asked after it are missing, too.
            asked.channel.write_all(&yes(asked.code)[..13]).unwrap();
            asked.vmm.closed();
            bench.wait_until("counted", |report| report.counters.faults.len() == 1);
            let kind = bench.faults().into_keys().next().unwrap();
            assert!(["wiring", "window_unconfirmed"].contains(&kind.as_str()), "{question:?}: {kind}");
            bench.logged("within 2000 ms");
        } else {
            thread::sleep(Duration::from_millis(2500));
            assert_eq!(asked.vmm.question(GET_FEATURES, &[]).len(), 8);
        }
        // An error is a channel that is closed already.
        let _ = asked.channel.write_all(&yes(asked.code));
        goes_on(&mut asked.other, question);
        assert_eq!(bench.faults().len(), usize::from(is_peers), "{question:?}");
        starts_anew(&bench, asked);
        bench.descriptors_are(open);
    }
}

#[test]
fn ten_thousand_descriptors_in_many_messages_of_one_connection_leave_none() {
    let bench = Bench::start();
    let open = settled_descriptors();
    let mut owner = Raw::connect(&bench.left().0);
    owner.negotiate(OWNER_PROTOCOL);
    // What has descriptors: memory again and again, calls again and again.
    owner.set_up();
    for index in 0..5000u64 {
        assert!(owner.done(SET_VRING_CALL, &longs(&[index % 2]), &[eventfd()]));
    }
    for _ in 0..1000 {
        assert!(owner.done(SET_MEM_TABLE, &table(&[region()]), &[memfd()]));
    }
    assert_eq!(owner.question(GET_FEATURES, &[]).len(), 8);
    assert!(settled_descriptors() < open + 20, "no more than are in use");
    // And on the channel, with answers to nothing: 63 messages of 64.
    let (vmm, channel) = peer(&bench, false);
    let thread = thread::spawn({
        let others = channel.try_clone().unwrap();
        move || agree_to_all(others)
    });
    bench.wait_until("started", |report| report.peer.state == "started");
    let fds: Vec<_> = (0..64).map(|_| eventfd()).collect();
    let raw: Vec<_> = fds.iter().map(std::os::fd::AsRawFd::as_raw_fd).collect();
    for _ in 0..63 {
        // An error: it was disconnected, as something else is to be answered.
        let _ = channel.send_with_fds(&[yes(WIRE).as_slice()], &raw);
    }
    drop(fds);
    assert_eq!(owner.question(GET_FEATURES, &[]).len(), 8);
    bench.right_link_works();
    drop(channel.shutdown(std::net::Shutdown::Both));
    thread.join().unwrap();
    drop((owner, vmm, channel));
    bench.descriptors_are(open);
}
