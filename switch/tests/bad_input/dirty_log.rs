//! Dirty logs that the broker cannot mark pages in.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_pci_device::abi;

use crate::bench::Bench;
use crate::iommu::ends;
use crate::iommu_owner::{
    ACCESS_PLATFORM, BACKEND_REQ, BEHIND, BUFFERS, PAGE, Peer, answer, next_miss, owner, update,
};
use crate::raw::{
    FRONTEND, IOTLB_MSG, LOG_SHMFD, OWNER_PROTOCOL, PROTOCOL_FEATURES, Raw, SET_FEATURES, VERSION_1, longs,
    memfd,
};

const SET_LOG_BASE: u32 = 6;
const LOG_ALL: u64 = 1 << 26;

/// A file in huge pages, of which the host need not have any.
fn huge() -> OwnedFd {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_HUGETLB;
    let file = File::from(memfd_create(c"log", flags).expect("a kernel with hugetlbfs"));
    file.set_len(2 << 20).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    file.into()
}

/// A page of it that is not there faults when it is written; one that is cannot be unmapped alone.
#[test]
fn a_log_in_huge_pages_is_not_used_and_a_vring_stops_without_it() {
    let bench = Bench::start();
    let mut owner = Raw::connect(&bench.left().0);
    owner.negotiate(OWNER_PROTOCOL | LOG_SHMFD);
    owner.set_up();
    owner.ask(SET_LOG_BASE, &longs(&[4096, 0]), &[huge()]);
    owner.answered(SET_LOG_BASE);
    let used = owner.done(SET_FEATURES, &longs(&[VERSION_1 | PROTOCOL_FEATURES | LOG_ALL]), &[]);
    owner.start();
    owner.owner_stops();
    assert_eq!(bench.report(0).owner.state, "connected");
    assert!(!used);
    bench.logged("hugetlbfs");
    assert_eq!(bench.faults()["dirty_log"], 2);
    bench.right_link_works();
}

/// The seal against new writable mappings (fcntl(2)); the nix crate has no name for it.
const F_SEAL_FUTURE_WRITE: i32 = 0x10;

#[test]
fn a_store_that_cannot_be_marked_is_not_done() {
    let bench = Bench::start();
    let (owner_socket, peer_socket) = bench.left();
    let mut peer = Peer::start(&peer_socket);
    let (mut owner, mut channel) = owner(&owner_socket, BACKEND_REQ | LOG_SHMFD, memfd());
    owner.start_at_iovas();
    owner.tells_rings(&mut channel);
    let log = File::from(memfd());
    owner.ask(SET_LOG_BASE, &longs(&[128, 0]), &[log.try_clone().unwrap().into()]);
    owner.answered(SET_LOG_BASE);
    let features = VERSION_1 | PROTOCOL_FEATURES | ACCESS_PLATFORM | LOG_ALL;
    assert!(owner.done(SET_FEATURES, &longs(&[features]), &[]));
    bench.wait_until("logs", |report| report.state == "up" && report.dirty_log.is_some());
    let store = peer.gives(abi::CTRL_STORE, BUFFERS, 64);
    assert_eq!(next_miss(&mut channel).0, BUFFERS);
    assert!(owner.done(IOTLB_MSG, &update(BUFFERS, PAGE, BEHIND), &[]));
    answer(&channel, &longs(&[0]));
    assert_eq!(peer.status(store), abi::CTRL_OK);
    let marked = || {
        let mut byte = [0];
        log.read_exact_at(&mut byte, (BEHIND - FRONTEND) / PAGE / 8).unwrap();
        byte[0]
    };
    assert_eq!(marked(), 1);
    // The VMM changes its mind.
    log.write_all_at(&[0], (BEHIND - FRONTEND) / PAGE / 8).unwrap();
    fcntl(&log, FcntlArg::F_ADD_SEALS(SealFlag::from_bits_retain(F_SEAL_FUTURE_WRITE))).unwrap();
    for count in 1..=100 {
        assert_eq!(peer.does(abi::CTRL_STORE, BUFFERS, 64), abi::CTRL_FAILED);
        assert_eq!((bench.faults()["dirty_log"], marked()), (count, 0));
    }
    let lines = crate::bench::log().matches("what was stored cannot be marked").count();
    assert!((1..=7).contains(&lines), "{lines} lines for a hundred");
    assert_eq!(bench.report(0).state, "up");
    ends(&bench, owner, peer);
}
