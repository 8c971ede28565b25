//! Owns one `mmap`ped range, and hands out its address.
//!
//! It never makes a reference into the range: what is behind it (a BAR, memory of
//! another VM) changes by itself.

use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::mman::{MapFlags, ProtFlags, mlock, mmap, mmap_anonymous, munmap};

use crate::shm::SharedMemory;

/// A mapped range, unmapped on drop.
#[derive(Debug)]
pub struct MappedRange {
    base: NonNull<c_void>,
    len: NonZeroUsize,
}

// SAFETY: the range belongs to the process, not to a thread, and `MappedRange` itself
// reads and writes nothing in it. It is unmapped once, by the drop of the value.
unsafe impl Send for MappedRange {}
// SAFETY: as above; the shared methods only return the address and the length.
unsafe impl Sync for MappedRange {}

impl MappedRange {
    /// Maps `len` bytes of `file` from `offset`, shared, for loads and stores.
    ///
    /// # Errors
    /// What mmap answers; `InvalidInput` if `len` is 0 or `offset` too large.
    pub fn of_file<F: AsFd>(file: F, offset: u64, len: usize) -> io::Result<Self> {
        let len = length(len)?;
        let offset = offset.try_into().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: a new mapping at an address that the kernel chooses replaces
        // nothing; it is given back by `Drop` alone.
        let base = unsafe {
            mmap(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, file, offset)
        }?;
        Ok(Self { base, len })
    }

    /// Zeroed pages that stay in memory: a device may reach them by DMA.
    ///
    /// # Errors
    /// What mmap or mlock answers, the latter `ENOMEM` if `ulimit -l` is too low.
    pub fn locked_pages(len: usize) -> io::Result<Self> {
        let pages = Self::anonymous(len, MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE)?;
        // SAFETY: the range is the mapping just made, which `pages` owns.
        unsafe { mlock(pages.base, pages.len.get()) }?;
        Ok(pages)
    }

    /// Zeroed pages of this process alone.
    ///
    /// # Errors
    /// What mmap answers; `InvalidInput` if `len` is 0.
    pub fn private(len: usize) -> io::Result<Self> {
        Self::anonymous(len, MapFlags::MAP_PRIVATE)
    }

    fn anonymous(len: usize, flags: MapFlags) -> io::Result<Self> {
        let len = length(len)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses replaces
        // nothing; it is given back by `Drop` alone.
        let base = unsafe { mmap_anonymous(None, len, access, flags) }?;
        Ok(Self { base, len })
    }

    /// The same in huge pages, each of which is in one piece in the machine's memory.
    ///
    /// # Errors
    /// What mmap answers, `ENOMEM` if the kernel has no huge pages to give.
    pub fn huge_page(len: usize) -> io::Result<Self> {
        Self::anonymous(len, MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE | MapFlags::MAP_HUGETLB)
    }

    /// Where the range starts in this process.
    pub fn base(&self) -> NonNull<u8> {
        self.base.cast()
    }

    /// Length, bytes.
    pub fn len(&self) -> usize {
        self.len.get()
    }
}

impl MappedRange {
    /// The range as shared memory, which keeps it mapped.
    pub fn shared(self: Arc<Self>) -> SharedMemory {
        let (base, len) = (self.base(), self.len());
        // SAFETY: the range is mapped for loads and stores while `self` lives, which
        // becomes what the memory keeps; this file never accesses it, and registers
        // (`mmio`) only do by volatile accesses.
        unsafe { SharedMemory::from_raw_parts(base, len, self) }
    }
}

impl Drop for MappedRange {
    fn drop(&mut self) {
        // SAFETY: `base` and `len` are what mmap returned in a constructor, nobody
        // else unmaps them, and users of the address keep the `MappedRange` alive.
        // An error would mean that the range is gone already.
        let _ = unsafe { munmap(self.base, self.len.get()) };
    }
}

fn length(len: usize) -> io::Result<NonZeroUsize> {
    NonZeroUsize::new(len).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}
