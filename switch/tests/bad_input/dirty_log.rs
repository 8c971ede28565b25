//! Dirty logs that the broker cannot mark pages in.

use std::fs::File;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::bench::Bench;
use crate::raw::{LOG_SHMFD, OWNER_PROTOCOL, PROTOCOL_FEATURES, Raw, SET_FEATURES, VERSION_1, longs};

pub const SET_LOG_BASE: u32 = 6;
pub const LOG_ALL: u64 = 1 << 26;

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
