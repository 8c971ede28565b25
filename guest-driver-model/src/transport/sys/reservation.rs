//! An address range whose parts show files, or nothing, as a VMM's BAR does.
//!
//! The range is reserved once and stays reserved: showing and hiding is
//! `mmap(MAP_FIXED)` inside it, so no other mapping of the process can ever land
//! there. Who may be where is not decided here (see `model::window`), except that
//! nothing reaches outside the range.

use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::shm::SharedMemory;

/// Alignment of the range: that of large pages.
const ALIGNMENT: usize = 2 << 20;

/// A reserved range. Parts without a file read as zero until written.
#[derive(Debug)]
pub struct Reservation {
    base: NonNull<c_void>,
    len: usize,
}

// SAFETY: the range belongs to the process, not to a thread; the methods only
// change what is mapped in it, and the kernel serialises that.
unsafe impl Send for Reservation {}
// SAFETY: as above. Loads and stores of other threads during a change see the old
// or the new pages, never unmapped addresses: MAP_FIXED replaces atomically.
unsafe impl Sync for Reservation {}

impl Reservation {
    /// Reserves `len` bytes, rounded up to 2 MiB, aligned to 2 MiB.
    ///
    /// # Errors
    /// What mmap answers; `InvalidInput` for 0 or more than the address space.
    pub fn new(len: u64) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let len = usize::try_from(len).map_err(|_| invalid())?;
        let len = len.checked_next_multiple_of(ALIGNMENT).ok_or_else(invalid)?;
        let room = len
            .checked_add(ALIGNMENT)
            .and_then(NonZeroUsize::new)
            .filter(|_| len != 0)
            .ok_or_else(invalid)?;
        // SAFETY: a new mapping at an address that the kernel chooses replaces
        // nothing.
        let start = unsafe { mmap_anonymous(None, room, PROTECTION, RESTING) }?;
        let head = start.as_ptr().align_offset(ALIGNMENT);
        let base = start.as_ptr().wrapping_byte_add(head);
        let tail = room.get() - head - len;
        let base = NonNull::new(base).ok_or_else(invalid)?;
        // SAFETY: the ranges before `base` and after `base + len` are parts of the
        // mapping just made, and nothing refers to them. Should an unmapping fail,
        // address space is lost and nothing else.
        unsafe {
            if head != 0 {
                let _ = munmap(start, head);
            }
            if let Some(rest) = NonNull::new(base.as_ptr().wrapping_byte_add(len))
                && tail != 0
            {
                let _ = munmap(rest, tail);
            }
        }
        Ok(Self { base, len })
    }

    /// Where the range starts in this process.
    pub fn base(&self) -> NonNull<u8> {
        self.base.cast()
    }

    /// The first `len` bytes of the range as shared memory, which keeps it reserved.
    pub fn shared(self: Arc<Self>, len: u64) -> SharedMemory {
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(self.len);
        let base = self.base();
        // SAFETY: the range is mapped while `self` lives, which becomes what the
        // memory keeps: a part shows a file, or zero pages. A part may be read-only
        // (a store is then a fault that ends the process, as in any driver that
        // ignores a mapping's access), and so is a page past the end of a file that
        // its owner shortened. Neither is undefined behaviour.
        unsafe { SharedMemory::from_raw_parts(base, len, self) }
    }

    /// Shows `len` bytes of `file` from `file_offset` at `offset`.
    ///
    /// # Errors
    /// `InvalidInput` outside the range, else what mmap answers; then what was
    /// there before is still there.
    pub fn show(
        &self,
        offset: u64,
        len: u64,
        file: &dyn AsRawFd,
        file_offset: u64,
        writable: bool,
    ) -> io::Result<()> {
        let (at, len) = self.part(offset, len)?;
        let file_offset = file_offset.try_into().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let protection = if writable { PROTECTION } else { ProtFlags::PROT_READ };
        // SAFETY: `part` checked that the range lies in the reservation, which is
        // ours for as long as `self` lives: MAP_FIXED replaces only our own pages.
        // Nobody holds a Rust reference into them (crate::shm hands out none). The
        // descriptor may be any number: mmap refuses one that is not open.
        let shown = unsafe {
            libc::mmap(
                at.get() as *mut c_void,
                len.get(),
                protection.bits(),
                libc::MAP_SHARED | libc::MAP_FIXED,
                file.as_raw_fd(),
                file_offset,
            )
        };
        if shown == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Hides what is at `offset`: the range reads as zero again.
    ///
    /// # Errors
    /// As [`show`](Self::show).
    pub fn hide(&self, offset: u64, len: u64) -> io::Result<()> {
        let (at, len) = self.part(offset, len)?;
        // SAFETY: as in `show`.
        unsafe { mmap_anonymous(Some(at), len, PROTECTION, RESTING | MapFlags::MAP_FIXED) }?;
        Ok(())
    }

    fn part(&self, offset: u64, len: u64) -> io::Result<(NonZeroUsize, NonZeroUsize)> {
        let part = || {
            let offset = usize::try_from(offset).ok()?;
            let len = NonZeroUsize::new(usize::try_from(len).ok()?)?;
            let end = offset.checked_add(len.get())?;
            let at = self.base.addr().checked_add(offset)?;
            (end <= self.len).then_some((at, len))
        };
        part().ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the range is the one `new` kept, whatever is mapped in it is
        // ours, and users of the address keep the reservation alive.
        let _ = unsafe { munmap(self.base, self.len) };
    }
}

const PROTECTION: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);
/// How a part without a file is mapped: private zero pages that cost nothing.
const RESTING: MapFlags = MapFlags::MAP_PRIVATE.union(MapFlags::MAP_NORESERVE);
