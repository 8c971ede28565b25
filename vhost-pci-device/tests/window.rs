//! What the window shows, to whom, and what it refuses to show.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use support::broker::{SHMEM_MAP, SHMEM_UNMAP, WIRE, longs, message, send};
use support::{Bench, HALF, PAGE, eventually, file};

/// Window offsets in the three apertures.
const LINK: u64 = 0;
const DATA: u64 = 2 << 20;
const READ_ONLY: u64 = HALF + (2 << 20);

#[test]
fn a_granted_range_shows_the_file_and_a_revoked_one_rests() {
    let bench = Bench::started();
    let guest = &bench.guest;
    let memory = file(8 * PAGE);
    assert!(bench.broker.map(DATA, 4 * PAGE, &memory, 2 * PAGE, true));
    assert!(bench.broker.map(READ_ONLY, 2 * PAGE, &memory, PAGE, false));
    assert!(bench.broker.map(LINK, PAGE, &memory, 0, false));
    assert_eq!(guest.window_load(DATA + PAGE), Ok(4));
    assert_eq!(guest.window_load(READ_ONLY), Ok(2));
    assert_eq!(guest.window_load(LINK), Ok(1));
    guest.window_store(DATA, 77).unwrap();
    let mut bytes = [0; 8];
    rustix::io::pread(&memory, &mut bytes[..], 2 * PAGE).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 77, "the store reached the owner");

    assert!(bench.broker.unmap(DATA, 4 * PAGE));
    assert!(bench.broker.unmap(READ_ONLY, 2 * PAGE));
    assert_eq!(guest.window_load(DATA), Ok(0));
    assert_eq!(guest.window_load(READ_ONLY), Ok(0));
    guest.window_store(DATA, 78).unwrap();
    rustix::io::pread(&memory, &mut bytes[..], 2 * PAGE).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 77, "stores to an empty part reach nobody");
    guest.assert_no_hole();
}

#[test]
fn a_read_only_range_cannot_be_written_mapped_or_empty() {
    let bench = Bench::started();
    let memory = file(PAGE);
    for offset in [LINK, READ_ONLY] {
        assert_eq!(bench.guest.window_store(offset, 5), Err(Errno::EFAULT), "empty");
        assert!(bench.broker.map(offset, PAGE, &memory, 0, false));
        assert_eq!(bench.guest.window_store(offset, 5), Err(Errno::EFAULT));
        assert_eq!(bench.guest.window_load(offset), Ok(1));
        assert!(bench.broker.unmap(offset, PAGE));
        assert_eq!(bench.guest.window_store(offset, 5), Err(Errno::EFAULT), "empty again");
    }
}

#[test]
fn no_request_maps_against_an_aperture_or_what_a_file_does_not_have() {
    let bench = Bench::started();
    let memory = file(4 * PAGE);
    let boundary = support::HALF;
    for (offset, len, file_offset, writable, why) in [
        (DATA, PAGE, 0, false, "a read-only range in the read-write aperture"),
        (READ_ONLY, PAGE, 0, true, "a writable range in the read-only aperture"),
        (LINK, PAGE, 0, true, "a writable link area"),
        (boundary - PAGE, 2 * PAGE, 0, true, "across apertures"),
        (2 * HALF - PAGE, 2 * PAGE, 0, false, "past the end"),
        (2 * HALF, PAGE, 0, false, "outside"),
        (u64::MAX - PAGE + 1, PAGE, 0, false, "far outside"),
        (DATA, u64::MAX - DATA + 1, 0, true, "the sum wraps"),
        (DATA, PAGE, u64::MAX - PAGE + 1, true, "the sum in the file wraps"),
        (DATA, PAGE, 4 * PAGE, true, "past the file's end"),
        (DATA, 2 * PAGE, 3 * PAGE, true, "over the file's end"),
        (DATA + 1, PAGE, 0, true, "offset not aligned"),
        (DATA, PAGE + 1, 0, true, "length not aligned"),
        (DATA, PAGE, 8, true, "file offset not aligned"),
        (DATA, 0, 0, true, "empty"),
    ] {
        assert!(!bench.broker.map(offset, len, &memory, file_offset, writable), "{why}");
    }
    assert!(bench.broker.map(DATA, 2 * PAGE, &memory, 0, true));
    assert!(!bench.broker.map(DATA + PAGE, PAGE, &memory, 0, true), "over another mapping");
    assert!(!bench.broker.unmap(DATA, PAGE), "a part of a mapping");
    assert!(!bench.broker.unmap(DATA, 4 * PAGE), "more than a mapping");
    assert!(bench.broker.unmap(DATA + 8 * PAGE, PAGE), "what is not mapped is gone");
    let read_only = rustix::fs::open(
        format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memory)),
        rustix::fs::OFlags::RDONLY,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    assert!(!bench.broker.map(DATA + 8 * PAGE, PAGE, &read_only, 0, true), "a file open for reading");
    assert_eq!(bench.guest.window_load(DATA + 8 * PAGE), Ok(0), "and no hole");
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(PAGE).unwrap();
    let (pipe, _end) = nix::unistd::pipe().unwrap();
    let disk = std::os::fd::OwnedFd::from(disk);
    let on_disk = rustix::fs::fstatfs(&disk).unwrap().f_type != 0x0102_1994;
    assert!(!on_disk || !bench.broker.map(DATA + 8 * PAGE, PAGE, &disk, 0, true), "a file on a disk");
    assert!(!bench.broker.map(DATA + 8 * PAGE, PAGE, &pipe, 0, true), "a pipe");
    bench.guest.assert_no_hole();
    assert!(bench.broker.unmap(DATA, 2 * PAGE), "the channel still works");
}

#[test]
fn nothing_is_mapped_while_the_device_is_not_started() {
    let bench = Bench::new();
    bench.guest.enable();
    eventually("the connection", || bench.guest.device.snapshot().connected);
    let memory = file(PAGE);
    assert!(!bench.broker.map(DATA, PAGE, &memory, 0, true));
    assert!(bench.broker.unmap(DATA, PAGE), "nothing is there, so it is gone");
    bench.start();
    assert!(bench.broker.map(DATA, PAGE, &memory, 0, true));
}

/// Lines of /proc/self/maps that lie in the window.
fn mappings(bench: &Bench) -> Vec<String> {
    let slots = bench.vmm.slots();
    let (start, end) = (slots[0].host_address, slots[2].host_address + slots[2].len);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let inside = |line: &&str| {
        let at = u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
        (start..end).contains(&at)
    };
    maps.lines().filter(inside).map(str::to_owned).collect()
}

#[test]
fn a_guest_that_fills_the_empty_window_fills_the_bucket_and_no_more() {
    let bench = Bench::started();
    let at_rest = mappings(&bench).len();
    for offset in (support::broker_link_len()..HALF).step_by(PAGE as usize) {
        bench.guest.window_store(offset, offset).unwrap();
    }
    let buckets = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| Some(entry.ok()?.path()));
    for path in buckets {
        let is = std::fs::read_link(&path).is_ok_and(|to| to.to_string_lossy().contains("vhost-pci-bucket"));
        if let Some(file) = std::fs::File::open(path).ok().filter(|_| is) {
            let stat = rustix::fs::fstat(&file).unwrap();
            assert!(stat.st_blocks as u64 * 512 <= 2 << 20, "{} blocks", stat.st_blocks);
        }
    }
    let memory = support::file(64 * PAGE);
    for page in 0..32 {
        assert!(bench.broker.map(DATA + 2 * page * PAGE, PAGE, &memory, page * PAGE, true));
    }
    for page in 0..32 {
        assert!(bench.broker.unmap(DATA + 2 * page * PAGE, PAGE));
    }
    assert_eq!(mappings(&bench).len(), at_rest, "what was cut grows together");
}

#[test]
fn malformed_messages_end_the_connection_and_nothing_else() {
    let pages = longs(&[0, 0, DATA, PAGE, 1]);
    let big = 0x7fff_ffff_u32;
    let mut huge = message(SHMEM_MAP, 9, &[]);
    huge[8..12].copy_from_slice(&big.to_ne_bytes());
    for (bytes, why) in [
        (message(SHMEM_MAP, 8, &pages), "no version"),
        (message(SHMEM_MAP, 13, &pages), "an answer"),
        (message(SHMEM_MAP, 0xffff_ffff, &pages), "unknown flags"),
        (message(SHMEM_MAP, 9, &pages[..39]), "a short payload"),
        (message(SHMEM_MAP, 9, &[0; 41]), "a long payload"),
        (message(SHMEM_UNMAP, 9, &[]), "no payload"),
        (message(WIRE, 9, &[0; 4]), "a short wire"),
        (message(0, 9, &[]), "no such request"),
        (message(u32::MAX, 9, &[]), "no such request"),
        (huge, "a payload of 2 GiB"),
    ] {
        let bench = Bench::started();
        let memory = file(PAGE);
        assert!(bench.broker.map(DATA + PAGE, PAGE, &memory, 0, true));
        let mut channel = bench.broker.channel();
        send(&channel, &bytes, &[memory.as_fd()]).unwrap();
        assert!(matches!(channel.read(&mut [0; 32]), Ok(0) | Err(_)), "{why}");
        eventually("another connection", || bench.broker.connections() == 2);
        assert_eq!(bench.guest.window_load(DATA + PAGE), Ok(0), "{why}");
        assert_eq!(bench.guest.status(), 15, "the driver sees nothing of it");
    }
}

#[test]
fn answers_come_in_the_order_of_the_requests_and_only_where_they_are_wanted() {
    let bench = Bench::started();
    let channel: UnixStream = bench.broker.channel();
    let memory = file(PAGE);
    let map = |page: u64| longs(&[0, 0, DATA + page * PAGE, PAGE, 1]);
    for page in 0..8 {
        // Every second one twice, which is refused; one without an answer.
        send(&channel, &message(SHMEM_MAP, 9, &map(page / 2)), &[memory.as_fd()]).unwrap();
    }
    send(&channel, &message(SHMEM_MAP, 1, &map(20)), &[memory.as_fd()]).unwrap();
    send(&channel, &message(SHMEM_UNMAP, 9, &map(0)), &[]).unwrap();
    let answers: Vec<bool> = (0..8).map(|_| support::broker::answer(&channel, SHMEM_MAP).unwrap()).collect();
    assert_eq!(answers, [true, false].repeat(4));
    assert!(support::broker::answer(&channel, SHMEM_UNMAP).unwrap());
    assert_eq!(bench.guest.window_load(DATA + 20 * PAGE), Ok(1));
}

#[test]
fn huge_pages_are_shown_whole_or_not_at_all() {
    const HUGE: u64 = 2 << 20;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    let memory = memfd_create(c"huge", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB);
    let Some(memory) = memory.ok().filter(|memory| ftruncate(memory, 2 * HUGE).is_ok()) else {
        println!("skipped: no huge pages on this machine");
        return;
    };
    let bench = Bench::started();
    // mmap would take the length for that of a whole page, over what is next.
    assert!(bench.broker.map(DATA + HUGE, PAGE, &file(PAGE), 0, true));
    assert!(!bench.broker.map(DATA, PAGE, &memory, 0, true));
    assert!(!bench.broker.map(DATA + 8 * PAGE, PAGE, &memory, PAGE, true));
    assert_eq!(bench.guest.window_load(DATA + HUGE), Ok(1));
    // Where none is free the kernel refuses, and the window is as it was.
    let shown = bench.broker.map(DATA + 2 * HUGE, HUGE, &memory, HUGE, true);
    println!("a huge page {} shown", if shown { "is" } else { "is not free to be" });
    assert_eq!(bench.guest.window_load(DATA + 2 * HUGE), Ok(0));
    assert!(bench.broker.unmap(DATA + 2 * HUGE, HUGE));
    bench.guest.assert_no_hole();
}
