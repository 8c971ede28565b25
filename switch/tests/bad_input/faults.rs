//! Every malformed, truncated, oversized or out-of-order message: the session ends,
//! the fault is counted under its kind, one line names the link, no descriptor is
//! lost, and both links can be used again.

use std::os::fd::OwnedFd;

use crate::bench::{Bench, settled_descriptors};
use crate::raw::{
    ADD_MEM_REG, FRONTEND, GET_CONFIG, GET_FEATURES, GET_QUEUE_NUM, GET_VRING_BASE, IOTLB_MSG, MEMORY,
    NEED_REPLY, OWNER_PROTOCOL, PEER_PROTOCOL, PROTOCOL_FEATURES, REM_MEM_REG, REPLY, RESET_DEVICE, Raw,
    SET_BACKEND_REQ_FD, SET_CONFIG, SET_FEATURES, SET_MEM_TABLE, SET_PROTOCOL_FEATURES, SET_VRING_ADDR,
    SET_VRING_BASE, SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_KICK, SET_VRING_NUM, VERSION, VERSION_1,
    eventfd, header, longs, memfd, message, region, table, words,
};

/// How far the front-end has come before it errs.
#[derive(Clone, Copy, PartialEq)]
enum Stage {
    Connected,
    Owner,
    OwnerSetUp,
    OwnerStarted,
    Peer,
}

struct Case {
    name: &'static str,
    stage: Stage,
    bytes: Vec<u8>,
    fds: fn() -> Vec<OwnedFd>,
    kind: &'static str,
}

fn case(name: &'static str, stage: Stage, kind: &'static str, bytes: Vec<u8>) -> Case {
    Case { name, stage, bytes, fds: Vec::new, kind }
}

fn with(fds: fn() -> Vec<OwnedFd>, case: Case) -> Case {
    Case { fds, ..case }
}

fn run(cases: Vec<Case>) {
    let bench = Bench::start();
    let (owner, peer) = bench.left();
    let open = settled_descriptors();
    for case in cases {
        let socket = if case.stage == Stage::Peer { &peer } else { &owner };
        let before = bench.faults();
        let mut raw = Raw::connect(socket);
        match case.stage {
            Stage::Connected => {}
            Stage::Peer => raw.negotiate(PEER_PROTOCOL),
            _ => raw.negotiate(OWNER_PROTOCOL),
        }
        if matches!(case.stage, Stage::OwnerSetUp | Stage::OwnerStarted) {
            raw.set_up();
        }
        if case.stage == Stage::OwnerStarted {
            raw.start();
        }
        let fds = (case.fds)();
        raw.send(&case.bytes, &fds);
        raw.half_close();
        raw.closed();
        drop((raw, fds));
        let counted =
            |faults: &std::collections::BTreeMap<String, u64>| faults.get(case.kind).copied().unwrap_or(0);
        bench.wait_until(case.name, |report| counted(&report.counters.faults) == counted(&before) + 1);
        let (now, then) = (bench.faults(), before);
        assert_eq!(
            now.values().sum::<u64>(),
            then.values().sum::<u64>() + 1,
            "{}: one fault is one",
            case.name
        );
        bench.descriptors_are(open);
    }
    bench.logged(" WARN ");
    // Both sides of the link can be used as if nothing had been.
    let (mut good_peer, window) = Raw::peer(&peer);
    let mut good_owner = Raw::owner(&owner);
    bench.wait_until("the link comes up", |report| report.state == "up");
    good_owner.owner_stops();
    good_peer.half_close();
    good_peer.closed();
    drop((good_owner, good_peer));
    window.join().unwrap();
    bench.right_link_works();
    bench.descriptors_are(open);
}

#[test]
fn broken_headers_are_faults_of_the_message() {
    let kind = "message";
    run(vec![
        case("an unknown request", Stage::Owner, kind, message(99, VERSION, &[])),
        case("request 0", Stage::Connected, kind, message(0, VERSION, &[])),
        case("a huge request", Stage::Connected, kind, message(u32::MAX, VERSION, &[])),
        case("version 0", Stage::Connected, kind, message(GET_FEATURES, 0, &[])),
        case("version 2", Stage::Owner, kind, message(GET_FEATURES, 2, &[])),
        case("a reply as request", Stage::Owner, kind, message(SET_FEATURES, VERSION | REPLY, &longs(&[0]))),
        case("reserved flags", Stage::Owner, kind, message(GET_FEATURES, VERSION | 1 << 30, &[])),
        case("one byte too long", Stage::Owner, kind, header(SET_CONFIG, VERSION, 0x1001)),
        case("4 GiB long", Stage::Owner, kind, header(SET_MEM_TABLE, VERSION, u32::MAX)),
    ]);
}

#[test]
fn a_message_that_ends_in_its_middle_is_a_fault() {
    let whole = message(SET_FEATURES, VERSION, &longs(&[VERSION_1]));
    let ends = [1, 4, 11, 12, 13, 19];
    let cut = |end: usize| case("cut", Stage::Owner, "message", whole[..end].to_vec());
    let mut cases: Vec<Case> = ends.into_iter().map(cut).collect();
    cases.extend([1, 7, 11].map(|end| case("cut first", Stage::Connected, "message", whole[..end].to_vec())));
    let channel = message(SET_BACKEND_REQ_FD, VERSION, &longs(&[0]));
    cases.extend([11, 14].map(|end| case("cut channel", Stage::Peer, "message", channel[..end].to_vec())));
    run(cases);
}

#[test]
fn payloads_of_the_wrong_length_are_faults_of_the_message() {
    let (kind, owner) = ("message", Stage::Owner);
    run(vec![
        case("short SET_FEATURES", owner, kind, message(SET_FEATURES, VERSION, &words(&[0]))),
        case("long SET_FEATURES", owner, kind, message(SET_FEATURES, VERSION, &longs(&[0, 0]))),
        case("GET_FEATURES with a payload", owner, kind, message(GET_FEATURES, VERSION, &longs(&[0]))),
        case("an empty SET_VRING_NUM", owner, kind, message(SET_VRING_NUM, VERSION, &[])),
        case("a short SET_VRING_ADDR", owner, kind, message(SET_VRING_ADDR, VERSION, &words(&[0, 0]))),
        case("a short kick", owner, kind, message(SET_VRING_KICK, VERSION, &words(&[0x100]))),
        case("an empty table", owner, kind, message(SET_MEM_TABLE, VERSION, &[])),
        case("a table of none", owner, kind, message(SET_MEM_TABLE, VERSION, &words(&[0, 0]))),
        case("a table without its regions", owner, kind, message(SET_MEM_TABLE, VERSION, &words(&[1, 0]))),
        case("a table of 2^32 - 1", owner, kind, message(SET_MEM_TABLE, VERSION, &words(&[u32::MAX, 0]))),
        case("a region cut short", owner, kind, message(REM_MEM_REG, VERSION, &longs(&[0, 0, 0]))),
        case("a long IOTLB message", owner, kind, message(IOTLB_MSG, VERSION, &[0; 65])),
        case("a short SET_CONFIG", Stage::Peer, kind, message(SET_CONFIG, VERSION, &[0; 4])),
        case(
            "GET_CONFIG past 4096",
            Stage::Peer,
            kind,
            message(GET_CONFIG, VERSION, &{
                let mut bytes = words(&[0xff8, 16, 0]);
                bytes.extend([0; 16]);
                bytes
            }),
        ),
        case(
            "GET_CONFIG that wraps",
            Stage::Peer,
            kind,
            message(GET_CONFIG, VERSION, &{
                let mut bytes = words(&[u32::MAX, 8, 0]);
                bytes.extend([0; 8]);
                bytes
            }),
        ),
    ]);
}

#[test]
fn a_wrong_number_of_descriptors_is_a_fault_of_the_message() {
    let (kind, owner) = ("message", Stage::Owner);
    let one = message(SET_MEM_TABLE, VERSION, &table(&[region()]));
    let kick = |value: u64| message(SET_VRING_KICK, VERSION, &longs(&[value]));
    let mut add = longs(&[0]);
    add.extend(longs(&region()));
    run(vec![
        with(
            || vec![memfd()],
            case("GET_FEATURES with one", owner, kind, message(GET_FEATURES, VERSION, &[])),
        ),
        case("a table without", owner, kind, one.clone()),
        with(|| vec![memfd(), memfd()], case("a table with one too many", owner, kind, one)),
        case("ADD_MEM_REG without", owner, kind, message(ADD_MEM_REG, VERSION, &add)),
        with(
            || vec![memfd(), memfd()],
            case("ADD_MEM_REG with two", owner, kind, message(ADD_MEM_REG, VERSION, &add)),
        ),
        case("a kick without", owner, kind, kick(0)),
        with(|| vec![eventfd()], case("a kick that says it has none", owner, kind, kick(0x100))),
        with(|| vec![eventfd(), eventfd()], case("a kick with two", owner, kind, kick(0))),
        with(
            || vec![eventfd()],
            case("an IOTLB message with one", owner, kind, message(IOTLB_MSG, VERSION, &[0; 32])),
        ),
        case("a channel without", Stage::Peer, kind, message(SET_BACKEND_REQ_FD, VERSION, &[])),
        with(
            || vec![eventfd(), eventfd()],
            case("a channel with two", Stage::Peer, kind, message(SET_BACKEND_REQ_FD, VERSION, &[])),
        ),
    ]);
}

#[test]
fn memory_that_overlaps_or_exceeds_its_file_is_a_fault_of_the_region() {
    let kind = "memory_region";
    let tables: [(&str, Vec<[u64; 4]>); 6] = [
        ("same guest addresses", vec![region(), [0, MEMORY, FRONTEND + MEMORY, 0]]),
        ("one page in common", vec![region(), [MEMORY - 4096, 4096, FRONTEND + MEMORY, 0]]),
        ("same front-end addresses", vec![region(), [MEMORY, MEMORY, FRONTEND, 0]]),
        ("one page past its file", vec![[0, MEMORY + 4096, FRONTEND, 0]]),
        ("an offset past its file", vec![[0, 4096, FRONTEND, MEMORY]]),
        ("no whole pages", vec![[0, MEMORY - 1, FRONTEND, 0]]),
    ];
    let mut cases: Vec<Case> = tables
        .into_iter()
        .map(|(name, regions)| {
            let fds: fn() -> Vec<OwnedFd> =
                if regions.len() == 1 { || vec![memfd()] } else { || vec![memfd(), memfd()] };
            with(fds, case(name, Stage::Owner, kind, message(SET_MEM_TABLE, VERSION, &table(&regions))))
        })
        .collect();
    let mut gone = longs(&[0]);
    gone.extend(longs(&[1 << 30, 4096, FRONTEND, 0]));
    cases.push(case(
        "a region that is not there",
        Stage::OwnerSetUp,
        kind,
        message(REM_MEM_REG, VERSION, &gone),
    ));
    run(cases);
}

#[test]
fn memory_that_is_empty_or_wraps_is_a_fault_of_the_message() {
    let page_from_the_top = u64::MAX - 4095;
    let regions = [
        ("empty", [0, 0, FRONTEND, 0]),
        ("wraps in guest addresses", [page_from_the_top, 8192, FRONTEND, 0]),
        ("wraps in front-end addresses", [0, 8192, page_from_the_top, 0]),
        ("wraps in its file", [0, 8192, FRONTEND, page_from_the_top]),
    ];
    let case = |(name, region)| {
        with(
            || vec![memfd()],
            case(name, Stage::Owner, "message", message(SET_MEM_TABLE, VERSION, &table(&[region]))),
        )
    };
    run(regions.map(case).into());
}

#[test]
fn vrings_that_cannot_be_are_faults_of_the_vring() {
    let (kind, set_up) = ("vring", Stage::OwnerSetUp);
    let addr = |index: u32, desc: u64| {
        let mut bytes = words(&[index, 0]);
        bytes.extend(longs(&[desc, FRONTEND + 0x600, FRONTEND + 0x400, 0]));
        message(SET_VRING_ADDR, VERSION, &bytes)
    };
    let kick = |index: u64| message(SET_VRING_KICK, VERSION, &longs(&[index | 0x100]));
    let outside = |desc| [addr(0, desc), kick(0)].concat();
    let mut cases = vec![
        case("an index past the last", set_up, kind, message(SET_VRING_NUM, VERSION, &words(&[2, 64]))),
        case("a huge index", set_up, kind, message(SET_VRING_ENABLE, VERSION, &words(&[u32::MAX, 1]))),
        case("a huge index to stop", set_up, kind, message(GET_VRING_BASE, VERSION, &words(&[u32::MAX, 0]))),
        case("a kick of vring 255", set_up, kind, kick(255)),
        case("a base of 17 bits", set_up, kind, message(SET_VRING_BASE, VERSION, &words(&[0, 1 << 16]))),
        case("a table past all memory", set_up, kind, outside(FRONTEND + MEMORY)),
        case("a table across the end", set_up, kind, outside(FRONTEND + MEMORY - 1008)),
        case("a table at 0", set_up, kind, outside(0)),
        case("a table at the top", set_up, kind, outside(u64::MAX - 15)),
        case("queue 3 of the peer", Stage::Peer, kind, message(SET_VRING_ENABLE, VERSION, &words(&[3, 1]))),
    ];
    for num in [0, 3, 65, 1 << 16, u32::MAX] {
        cases.push(case("no power of two", set_up, kind, message(SET_VRING_NUM, VERSION, &words(&[0, num]))));
    }
    run(cases);
}

#[test]
fn messages_out_of_order_are_faults_of_the_order() {
    let kind = "out_of_order";
    run(vec![
        case("GET_QUEUE_NUM before MQ", Stage::Connected, kind, message(GET_QUEUE_NUM, VERSION, &[])),
        case("RESET_DEVICE", Stage::Owner, kind, message(RESET_DEVICE, VERSION, &[])),
        case("CONFIG of an owner", Stage::Owner, kind, message(GET_CONFIG, VERSION, &words(&[0, 4, 0, 0]))),
        case("a kick first", Stage::Owner, kind, message(SET_VRING_KICK, VERSION, &longs(&[0x100]))),
        case(
            "a size while started",
            Stage::OwnerStarted,
            kind,
            message(SET_VRING_NUM, VERSION, &words(&[0, 64])),
        ),
        case(
            "a base while started",
            Stage::OwnerStarted,
            kind,
            message(SET_VRING_BASE, VERSION, &words(&[0, 0])),
        ),
        case(
            "a start without a channel",
            Stage::Peer,
            kind,
            message(SET_VRING_ENABLE, VERSION, &words(&[0, 1])),
        ),
    ]);
}

#[test]
fn what_was_not_offered_is_a_fault_of_its_own_kind() {
    let (owner, features) = (Stage::Owner, "features");
    let all = longs(&[u64::MAX]);
    run(vec![
        case("all features", owner, features, message(SET_FEATURES, VERSION, &all)),
        case("all protocol features", owner, features, message(SET_PROTOCOL_FEATURES, VERSION, &all)),
        case("the peer's all", Stage::Peer, features, message(SET_FEATURES, VERSION, &all)),
        case("an IOTLB message", owner, "unsupported", message(IOTLB_MSG, VERSION, &[0; 32])),
        with(
            || vec![std::os::unix::net::UnixStream::pair().unwrap().0.into()],
            case("an owner's channel", owner, "unsupported", message(SET_BACKEND_REQ_FD, VERSION, &[])),
        ),
        case("ENABLE 2", owner, "message", message(SET_VRING_ENABLE, VERSION, &words(&[0, 2]))),
    ]);
}

#[test]
fn a_refusal_is_answered_if_an_answer_was_wanted_or_the_session_just_ends() {
    let bench = Bench::start();
    let mut raw = Raw::connect(&bench.left().0);
    raw.negotiate(OWNER_PROTOCOL);
    raw.send(&message(SET_VRING_NUM, VERSION | NEED_REPLY, &words(&[0, 3])), &[]);
    let last = raw.closed();
    let refusal = message(SET_VRING_NUM, VERSION | REPLY, &longs(&[1]));
    assert!(last.is_empty() || last == refusal, "never a 'done': {last:?}");
    bench.wait_until("counted", |report| report.counters.faults.get("vring") == Some(&1));
    bench.logged("vring 0: its size is 3");
}

#[test]
fn the_log_has_a_line_for_the_first_fault_and_few_for_a_thousand() {
    let bench = Bench::start();
    let owner = bench.left().0;
    for _ in 0..300 {
        let mut raw = Raw::connect(&owner);
        raw.send(&message(SET_FEATURES, VERSION, &longs(&[VERSION_1 | PROTOCOL_FEATURES | 1 << 5])), &[]);
        raw.closed();
    }
    bench.wait_until("counted", |report| report.counters.faults.get("features") == Some(&300));
    bench.logged("owner: features 0x20 were acknowledged but not offered");
    let lines = crate::bench::log().lines().filter(|line| line.contains("not offered")).count();
    assert_eq!(lines, 9, "at powers of two");
}

#[test]
fn a_call_for_a_vring_that_the_link_does_not_have_keeps_no_descriptor() {
    let bench = Bench::start();
    let open = settled_descriptors();
    let mut raw = Raw::connect(&bench.left().0);
    raw.negotiate(OWNER_PROTOCOL);
    raw.ask(SET_VRING_CALL, &longs(&[77]), &[eventfd()]);
    raw.closed();
    drop(raw);
    bench.descriptors_are(open);
}

#[test]
fn a_vring_that_is_enabled_before_features_as_qemu_does_is_no_fault() {
    let bench = Bench::start();
    let mut raw = Raw::connect(&bench.left().0);
    raw.ask(SET_VRING_ENABLE, &words(&[0, 1]), &[]);
    raw.negotiate(OWNER_PROTOCOL);
    raw.set_up();
    raw.start();
    assert!(bench.faults().is_empty());
}
