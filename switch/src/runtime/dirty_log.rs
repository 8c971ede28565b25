//! Marks pages in an owner's dirty log, in the few cases in which not the peer's driver has to: what the
//! broker stored by the driver's command, and a vring's own memory when it stops. The log is mapped
//! for that moment, as other programs set bits in it at the same time. It is memory of the owner's
//! VMM, not of its guest, in ordinary pages, and cannot be shortened: no access to it faults.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use iommu::PAGE_SIZE;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory};

use crate::link::log::{DirtyLog, Pages};
use crate::link::message::Marks;

/// Marks pages.
///
/// # Errors
/// When a page has no bit in the log, or the host gives no memory or descriptor.
pub fn mark(marks: &Marks) -> io::Result<()> {
    marks.pages.iter().try_for_each(|pages| mark_pages(&marks.log, *pages))
}

fn mark_pages(log: &DirtyLog, pages: Pages) -> io::Result<()> {
    let Pages { first, count } = pages;
    let end = first.checked_add(count).filter(|end| end.div_ceil(8) <= log.len());
    let Some(end) = end.filter(|_| count > 0) else {
        return Err(io::Error::other(format!(
            "pages {first} to {count} more have no bit in a dirty log of {} bytes",
            log.len()
        )));
    };
    let start = first / 8 / PAGE_SIZE * PAGE_SIZE;
    let len = ((end - 1) / 8 + 1 - start).next_multiple_of(PAGE_SIZE);
    let file = Arc::new(File::from(log.file().as_fd().try_clone_to_owned()?));
    let file = FileOffset::from_arc(file, log.offset() + start);
    let memory = GuestMemoryMmap::<()>::from_ranges_with_files([(GuestAddress(0), len as usize, Some(file))]);
    let memory = memory.map_err(io::Error::other)?;
    let bytes = memory.get_slice(GuestAddress(0), len as usize).map_err(io::Error::other)?;
    for page in first..end {
        let byte = bytes.get_atomic_ref::<AtomicU8>((page / 8 - start) as usize).map_err(io::Error::other)?;
        // Release: after what was written to the page, for the VMM, which takes the bits and copies then.
        byte.fetch_or(1 << (page % 8), Ordering::Release);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::FileExt;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::link::descriptor::MemoryFile;

    #[test]
    fn exactly_the_pages_are_marked_and_none_outside_of_the_log() {
        let file = File::from(memfd_create(c"log", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(4 * PAGE_SIZE).unwrap();
        file.write_at(&[0x80], PAGE_SIZE).unwrap();
        let memory = MemoryFile::new(file.try_clone().unwrap().into(), 0, 0);
        let log = DirtyLog::new(memory, 4 * PAGE_SIZE, PAGE_SIZE, 2 * PAGE_SIZE + 1).unwrap();
        let mark = |first, count| mark(&Marks { log: log.clone(), pages: vec![Pages { first, count }] });
        // On both sides of a page of the log, and its last bit.
        mark(0, 1).unwrap();
        mark(8 * PAGE_SIZE - 1, 3).unwrap();
        mark(8 * (2 * PAGE_SIZE) + 7, 1).unwrap();
        let byte = |at| {
            let mut byte = [0];
            file.read_at(&mut byte, PAGE_SIZE + at).unwrap();
            byte[0]
        };
        assert_eq!(
            [byte(0), byte(PAGE_SIZE - 1), byte(PAGE_SIZE), byte(2 * PAGE_SIZE)],
            [0x81, 0x80, 3, 0x80]
        );
        for (first, count) in
            [(8 * (2 * PAGE_SIZE) + 8, 1), (8 * (2 * PAGE_SIZE), 9), (u64::MAX, 2), (1 << 40, 1), (0, 0)]
        {
            assert!(mark(first, count).is_err(), "{first} {count}");
        }
        let mut all = vec![0; 4 * PAGE_SIZE as usize];
        file.read_exact_at(&mut all, 0).unwrap();
        assert_eq!(all.iter().map(|byte| byte.count_ones()).sum::<u32>(), 6);
    }
}
