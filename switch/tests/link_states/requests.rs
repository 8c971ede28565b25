//! Requests that a front-end gets wrong: each ends its session, is counted under the
//! right kind, and says what would be right.

use vhost_pci_switch::link::Side;
use vhost_pci_switch::link::message::{IotlbMessage, RegionRequest, Reply, Request};

use crate::bench::{Bench, REGIONS};
use crate::front_end::{Ask, FEATURES, FILE_LEN, FRONTEND, Region, eventfd, peer_set_up};

const PAGE: u64 = 4096;

/// The owner's session ends by this request, as a fault of this kind; the reason
/// has these words.
fn refused(bench: &mut Bench, request: Request, kind: &str, words: &str) {
    let what = format!("{request:?}");
    let before = bench.faults(kind);
    bench.owner_raw(request);
    match &bench.owner_reply {
        Some(Reply::Refused(reason)) => assert!(reason.contains(words), "{what}: {reason}"),
        other => panic!("{what}: {other:?}"),
    }
    assert_eq!(bench.faults(kind), before + 1, "{what}: {:?}", bench.report().counters.faults);
    assert!(!bench.is_connected(Side::Owner), "{what}");
    assert_eq!(bench.report().owner.state, "absent");
    bench.connect(Side::Owner);
    bench.owner_reply = None;
}

fn owner() -> Bench {
    let mut bench = Bench::new();
    bench.connect(Side::Owner);
    bench
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let mut bench = owner();
    for bit in [0, 5, 36, 40, 63] {
        refused(&mut bench, Request::SetFeatures(FEATURES | 1 << bit), "features", "not offered");
    }
    for bit in [4, 12, 19, 22, 61, 63] {
        refused(&mut bench, Request::SetProtocolFeatures(1 << bit), "features", "not offered");
    }
    let mut bench = Bench::new();
    bench.connect(Side::Peer);
    bench.peer(Request::SetFeatures(1 << 15));
    assert!(matches!(bench.peer_reply, Some(Reply::Refused(_))));
    assert!(!bench.is_connected(Side::Peer));
}

#[test]
fn regions_that_are_impossible_are_refused() {
    let mut bench = owner();
    let good = bench.files.request(REGIONS[0]);
    let region = |change: &dyn Fn(&mut RegionRequest)| {
        let mut region = RegionRequest { file: good.file.clone(), ..good };
        change(&mut region);
        region
    };
    let bad: [(&str, RegionRequest); 11] = [
        ("empty", region(&|r| r.len = 0)),
        ("", region(&|r| r.guest = u64::MAX - PAGE + 1)),
        ("", region(&|r| r.frontend = u64::MAX - PAGE + 1)),
        ("file of", region(&|r| r.offset = u64::MAX - PAGE + 1)),
        ("file of", region(&|r| r.offset = FILE_LEN)),
        ("file of", region(&|r| r.len = FILE_LEN + PAGE)),
        ("file of", region(&|r| r.file_len = 0)),
        ("page-aligned", region(&|r| r.guest = 1)),
        ("page-aligned", region(&|r| r.frontend += 8)),
        ("page-aligned", region(&|r| r.len -= 1)),
        ("page-aligned", region(&|r| r.offset = 512)),
    ];
    for (words, region) in bad {
        let again = RegionRequest { file: region.file.clone(), ..region };
        refused(&mut bench, Request::SetMemTable(vec![region]), "memory_region", words);
        refused(&mut bench, Request::AddMemReg(again), "memory_region", words);
    }
}

#[test]
fn regions_that_overlap_are_refused() {
    let mut bench = owner();
    let one =
        |bench: &Bench, guest, frontend| RegionRequest { guest, frontend, ..bench.files.request(REGIONS[0]) };
    let len = REGIONS[0].len;
    for (guest, frontend, words) in [
        (len - PAGE, FRONTEND + len, "guest addresses"),
        (0, FRONTEND + len, "guest addresses"),
        (len, FRONTEND + len - PAGE, "front-end addresses"),
    ] {
        let table = vec![one(&bench, 0, FRONTEND), one(&bench, guest, frontend)];
        refused(&mut bench, Request::SetMemTable(table), "memory_region", words);
    }
}

#[test]
fn one_region_too_many_and_one_that_is_not_there_are_refused() {
    let mut bench = owner();
    let regions = |count: u64| (0..count).map(|index| Region::new(index * PAGE, PAGE, 0, 0)).collect();
    bench.owner(Ask::MemTable(regions(64)));
    assert!(matches!(bench.owner_reply, Some(Reply::Done)));
    let more = bench.files.request(Region::new(64 * PAGE, PAGE, 0, 0));
    refused(&mut bench, Request::AddMemReg(more), "memory_region", "64 are allowed");
    let none = Request::RemMemReg { guest: 0, frontend: FRONTEND, len: PAGE };
    refused(&mut bench, none, "memory_region", "no memory region");
}

#[test]
fn memory_that_does_not_fit_the_window_is_refused_with_advice() {
    let mut bench = owner();
    let far = Region::new(0x1_0000_0000, 1 << 20, 1, 0);
    let many: Vec<_> = (0..16).map(|index| Region::new(index << 23, FILE_LEN, 0, 0)).collect();
    for ask in Ask::bring_up(&many).into_iter().filter(|ask| !matches!(ask, Ask::Enable(..))) {
        bench.owner(ask);
    }
    let enable = Request::SetVringEnable { index: 0, enable: true };
    refused(&mut bench, enable, "window_too_small", "a window of 256 MiB would do");
    // Far apart is no problem: the window is packed then.
    bench.owner_up(&[REGIONS[0], far]);
    bench.peer_up();
    bench.work();
    assert!(bench.is_up());
}

#[test]
fn vring_sizes_that_are_no_power_of_two_are_refused() {
    let mut bench = owner();
    for num in [0, 3, 63, 65, 65_536, 1 << 20, u32::MAX] {
        refused(&mut bench, Request::SetVringNum { index: 0, num }, "vring", "power of two");
    }
    for num in [1, 64, 32_768] {
        bench.owner(Ask::Num(0, num));
        assert!(matches!(bench.owner_reply, Some(Reply::Done)));
    }
    refused(&mut bench, Request::SetVringBase { index: 0, base: 0x1_0000 }, "vring", "16 bits");
}

/// VIRTIO_F_RING_PACKED and VIRTIO_F_IN_ORDER.
const PACKED: u64 = 1 << 34 | 1 << 35;

#[test]
fn packed_vrings_have_any_size_areas_of_their_own_and_a_base_of_two_places() {
    let mut bench = owner();
    bench.owner(Ask::Features(FEATURES | PACKED));
    for num in [0, 32_769, 65_536, u32::MAX] {
        refused(&mut bench, Request::SetVringNum { index: 0, num }, "vring", "at least 1, at most 32768");
        bench.owner(Ask::Features(FEATURES | PACKED));
    }
    bench.owner(Ask::MemTable(REGIONS.to_vec()));
    for num in [1, 100, 32_768, 100] {
        bench.owner(Ask::Num(0, num));
        assert!(matches!(bench.owner_reply, Some(Reply::Done)));
    }
    bench.owner_raw(Request::SetVringBase { index: 0, base: 0x8063_8063 });
    // The last 1,600 bytes of the region, and the 4 before them.
    let end = FRONTEND + REGIONS[0].guest + REGIONS[0].len;
    let desc = end - 1600;
    bench.owner_raw(Request::SetVringAddr { index: 0, desc, avail: desc - 8, used: desc - 4 });
    bench.owner(Ask::Kick(0));
    assert!(matches!(bench.owner_reply, Some(Reply::Done)), "{:?}", bench.owner_reply);
    refused(&mut bench, Request::SetFeatures(FEATURES), "out_of_order", "VIRTIO_F_RING_PACKED");
    for (desc, avail, used, words) in [
        (desc + 16, desc, desc, "descriptor ring"),
        (desc, end, desc, "driver event suppression area"),
        (desc, desc, end - 2, "not aligned to 4"),
        (desc, desc, end, "device event suppression area"),
    ] {
        bench.owner(Ask::Features(FEATURES | PACKED));
        bench.owner(Ask::MemTable(REGIONS.to_vec()));
        bench.owner(Ask::Num(0, 100));
        bench.owner_raw(Request::SetVringAddr { index: 0, desc, avail, used });
        refused(&mut bench, Request::SetVringKick { index: 0, fd: None }, "vring", words);
    }
    // What was said before the features were counts for what they turn out to be.
    bench.owner(Ask::Features(FEATURES | PACKED));
    bench.owner(Ask::MemTable(REGIONS.to_vec()));
    bench.owner(Ask::Num(0, 100));
    bench.owner(Ask::Addr(0, REGIONS[0].guest));
    bench.owner(Ask::Features(FEATURES));
    refused(&mut bench, Request::SetVringKick { index: 0, fd: None }, "vring", "power of two");
}

#[test]
fn vrings_that_the_link_does_not_have_are_refused_in_every_request() {
    let mut bench = owner();
    for index in [2, 255, u32::MAX] {
        let requests = [
            Request::SetVringNum { index, num: 64 },
            Request::SetVringAddr { index, desc: 0, avail: 0, used: 0 },
            Request::SetVringBase { index, base: 0 },
            Request::GetVringBase { index },
            Request::SetVringKick { index, fd: None },
            Request::SetVringCall { index, fd: Some(eventfd()) },
            Request::SetVringErr { index, fd: None },
            Request::SetVringEnable { index, enable: false },
        ];
        for request in requests {
            refused(&mut bench, request, "vring", "2 vrings (queue_pairs");
        }
    }
    let mut bench = Bench::new();
    for index in [3, u32::MAX] {
        bench.connect(Side::Peer);
        bench.peer(Request::SetVringKick { index, fd: None });
        assert!(matches!(&bench.peer_reply, Some(Reply::Refused(reason)) if reason.contains("num_vqs=3")));
    }
}

#[test]
fn ring_addresses_outside_every_mapping_are_refused_when_the_vring_starts() {
    let mut bench = owner();
    let end = REGIONS[0].len;
    let (desc, avail, used) = (FRONTEND, FRONTEND + 0x400, FRONTEND + 0x600);
    let bad = [
        (FRONTEND + end, avail, used, "descriptor table"),
        (FRONTEND + end - 1008, avail, used, "descriptor table"),
        (0, avail, used, "descriptor table"),
        (u64::MAX - 15, avail, used, "descriptor table"),
        (FRONTEND + 8, avail, used, "aligned to 16"),
        (desc, FRONTEND + end - 2, used, "available ring"),
        (desc, avail + 1, used, "aligned to 2"),
        (desc, u64::MAX - 1, used, "available ring"),
        (desc, avail, FRONTEND + end - 512, "used ring"),
        (desc, avail, used + 2, "aligned to 4"),
        // From one region into the next: they are two mappings.
        (FRONTEND + (3 << 20), avail, used, "descriptor table"),
    ];
    for (desc, avail, used, words) in bad {
        bench.owner(Ask::MemTable(REGIONS.to_vec()));
        bench.owner(Ask::Num(0, 64));
        bench.owner_raw(Request::SetVringAddr { index: 0, desc, avail, used });
        refused(&mut bench, Request::SetVringKick { index: 0, fd: Some(eventfd()) }, "vring", words);
    }
}

#[test]
fn a_kick_before_its_set_up_and_a_set_up_after_the_kick_are_out_of_order() {
    let mut bench = owner();
    refused(&mut bench, Request::SetVringKick { index: 0, fd: None }, "out_of_order", "before");
    let late = [
        Request::SetVringNum { index: 0, num: 128 },
        Request::SetVringAddr { index: 0, desc: 0, avail: 0, used: 0 },
        Request::SetVringBase { index: 0, base: 0 },
    ];
    for request in late {
        bench.owner_up(&REGIONS);
        refused(&mut bench, request, "out_of_order", "after GET_VRING_BASE");
    }
}

#[test]
fn a_memory_table_that_moves_a_started_vring_is_refused() {
    let mut bench = owner();
    bench.owner_up(&REGIONS);
    let moved = RegionRequest { guest: 16 << 20, ..bench.files.request(REGIONS[0]) };
    refused(&mut bench, Request::SetMemTable(vec![moved]), "vring", "moves it");
}

#[test]
fn requests_of_the_other_side_are_refused() {
    let mut bench = owner();
    for request in [
        Request::GetShmemConfig,
        Request::GetConfig { offset: 0, len: 4 },
        Request::SetConfig,
        Request::Iotlb(IotlbMessage {
            iova: 0,
            size: 4096,
            frontend: 0,
            perm: 3,
            kind: IotlbMessage::UPDATE,
        }),
    ] {
        refused(&mut bench, request, "unsupported", "not negotiated");
    }
    let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    refused(&mut bench, Request::SetBackendChannel(stream), "unsupported", "BACKEND_REQ");
}

#[test]
fn the_peers_memory_and_ring_addresses_are_not_looked_at() {
    let mut bench = Bench::new();
    bench.connect(Side::Peer);
    for request in peer_set_up(3, false, false) {
        bench.peer(request);
    }
    let nonsense = RegionRequest { len: 0, ..bench.files.request(REGIONS[0]) };
    bench.peer(Request::SetMemTable(vec![nonsense]));
    bench.peer(Request::SetVringNum { index: 0, num: 3 });
    bench.peer(Request::SetVringAddr { index: 0, desc: 1, avail: u64::MAX, used: 3 });
    bench.peer(Request::RemMemReg { guest: 1, frontend: 2, len: 3 });
    assert!(bench.is_connected(Side::Peer));
}

#[test]
fn more_of_the_config_space_than_an_answer_can_hold_is_refused_and_not_made() {
    for (len, is_taken) in [(4096, true), (4097, false), (u32::MAX, false)] {
        let mut bench = Bench::new();
        bench.connect(Side::Peer);
        bench.peer(Request::GetConfig { offset: 0, len });
        assert_eq!(bench.is_connected(Side::Peer), is_taken, "{len}");
        assert_eq!(matches!(bench.peer_reply, Some(Reply::Config(_))), is_taken, "{len}");
    }
}

#[test]
fn the_config_space_reads_as_zero_past_its_end_and_takes_no_writes() {
    let mut bench = Bench::new();
    bench.connect(Side::Peer);
    for (offset, len) in [(0, 64), (60, 8), (64, 4), (u32::MAX, 256), (0, 0)] {
        bench.peer(Request::GetConfig { offset, len });
        let Some(Reply::Config(bytes)) = bench.peer_reply.take() else { panic!() };
        assert_eq!(bytes.len(), len as usize);
        let inside = 64u32.saturating_sub(offset) as usize;
        assert!(bytes.iter().skip(inside).all(|byte| *byte == 0));
    }
    bench.peer(Request::SetConfig);
    bench.peer(Request::GetConfig { offset: 0, len: 4 });
    assert!(matches!(&bench.peer_reply, Some(Reply::Config(bytes)) if bytes == b"VPCI"));
}
