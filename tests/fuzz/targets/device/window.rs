//! What the guest is to find in the window, and whether it does.

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::{IoSlice, pwrite};
use vhost_pci_device::abi::LINK_LEN;
use vhost_pci_fuzz::front::Pool;
use vhost_pci_fuzz::input::Input;

use crate::support::broker::take_count;
use crate::support::{Bench, PAGE};

/// Pages of a file.
pub const PAGES: u64 = 64;
/// Where an honest broker's data would start.
pub const DATA: u64 = 1 << 20;

/// What a page of a file begins with.
pub fn mark(file: usize, page: u64) -> u64 {
    0x5ec2_e700_0000_0000 | (file as u64) << 32 | page
}

/// Two files whose pages are marked.
pub fn files() -> &'static [OwnedFd; 2] {
    static FILES: OnceLock<[OwnedFd; 2]> = OnceLock::new();
    FILES.get_or_init(|| {
        std::array::from_fn(|number| {
            let file = memfd_create(c"shown", MemfdFlags::CLOEXEC).expect("a memfd");
            ftruncate(&file, PAGES * PAGE).expect("memory");
            for page in 0..PAGES {
                pwrite(&file, &mark(number, page).to_ne_bytes(), page * PAGE).expect("memory");
            }
            file
        })
    })
}

/// No input finds the signals of another.
pub fn empty_eventfds() {
    use std::os::fd::AsFd;
    for eventfd in &Pool::of_process().eventfds {
        take_count(eventfd.as_fd());
    }
}

/// What is mapped.
#[derive(Clone, Copy, Debug)]
struct Part {
    len: u64,
    file: usize,
    file_offset: u64,
}

/// The window as it has to be.
pub struct Shown {
    len: u64,
    parts: BTreeMap<u64, Part>,
    /// Where it is in this process, once that is known.
    host: Option<u64>,
}

impl Shown {
    pub fn new(len: u64) -> Self {
        Self { len, parts: BTreeMap::new(), host: None }
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn clear(&mut self) {
        self.parts.clear();
    }

    /// Something that is mapped.
    pub fn some_part(&self, number: usize) -> Option<(u64, u64)> {
        let part = self.parts.iter().nth(number % self.parts.len().max(1))?;
        Some((*part.0, part.1.len))
    }

    /// The device has mapped it: then it was right to ask.
    pub fn mapped(&mut self, shmid: u64, file: usize, [file_offset, offset, len, flags]: [u64; 4]) {
        let what = || format!("{shmid} {file} {file_offset:#x} {offset:#x} {len:#x} {flags}");
        let end = offset.checked_add(len).unwrap_or_else(|| panic!("{}", what()));
        let inside = |from: u64, to: u64| offset >= from && end <= to;
        let writable = inside(LINK_LEN, self.len / 2);
        assert!(writable || inside(0, LINK_LEN) || inside(self.len / 2, self.len), "{}", what());
        assert_eq!((flags, shmid as u8), (u64::from(writable), 0), "{}", what());
        assert!(len > 0 && (offset | len | file_offset).is_multiple_of(PAGE), "{}", what());
        assert!(
            file < 2 && file_offset.checked_add(len).is_some_and(|end| end <= PAGES * PAGE),
            "{}",
            what()
        );
        let over = self.parts.iter().find(|(at, part)| **at < end && offset < **at + part.len);
        assert!(over.is_none(), "{} over {over:x?}", what());
        self.parts.insert(offset, Part { len, file, file_offset });
    }

    /// The device has taken it out, or it was not there.
    pub fn unmapped(&mut self, offset: u64, len: u64) {
        let gone = self.parts.remove(&offset);
        assert!(gone.is_none_or(|part| part.len == len), "{offset:#x} {len:#x} of {gone:x?}");
        let over = self.parts.iter().find(|(at, part)| **at < offset + len && offset < **at + part.len);
        assert!(over.is_none(), "{offset:#x} {len:#x} is unmapped, and {over:x?} is there");
    }

    fn expected(&self, offset: u64) -> u64 {
        let below = self.parts.range(..=offset).next_back();
        let part = below.filter(|(at, part)| offset - **at < part.len);
        part.map_or(0, |(at, part)| mark(part.file, (offset - at + part.file_offset) / PAGE))
    }

    /// A load of each page where it may have gone wrong.
    pub fn check(&mut self, bench: &Bench) {
        self.host = self.host.or_else(|| bench.vmm.slots().first().map(|slot| slot.host_address));
        let Some(host) = self.host else { return };
        let half = self.len / 2;
        let mut pages = vec![0, LINK_LEN - PAGE, LINK_LEN, DATA, half - PAGE, half, self.len - PAGE];
        for (at, part) in &self.parts {
            pages.extend([at.saturating_sub(PAGE), *at, at + part.len - PAGE, at + part.len]);
        }
        pages.retain(|page| *page < self.len);
        pages.truncate(256);
        let mut bytes = vec![0; 8 * pages.len()];
        let remote: Vec<_> =
            pages.iter().map(|page| RemoteIoVec { base: (host + page) as usize, len: 8 }).collect();
        let read = process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut bytes)], &remote);
        assert_eq!(read, Ok(bytes.len()), "a hole: {pages:x?} {:x?}", self.parts);
        for (page, value) in pages.iter().zip(bytes.chunks_exact(8)) {
            let value = u64::from_ne_bytes(value.try_into().expect("8 bytes"));
            assert_eq!(value, self.expected(*page), "{page:#x} of {:x?}", self.parts);
        }
    }

    /// A guest's store. Behind the mark of a page, which stays.
    pub fn store(&mut self, bench: &Bench, input: &mut Input<'_>) {
        self.host = self.host.or_else(|| bench.vmm.slots().first().map(|slot| slot.host_address));
        let Some(host) = self.host else { return };
        let part = self.some_part(usize::from(input.byte()));
        let page = match part {
            Some((at, len)) if input.coin() => at + input.below(4) * PAGE % len,
            _ => u64::from(input.word()) * PAGE % self.len,
        };
        let remote = [RemoteIoVec { base: (host + page + 8) as usize, len: 8 }];
        let stored = process_vm_writev(Pid::this(), &[IoSlice::new(&[0xbb; 8])], &remote);
        let writable = (LINK_LEN..self.len / 2).contains(&page);
        assert_eq!(stored.is_ok(), writable, "a store at {page:#x}");
    }
}
