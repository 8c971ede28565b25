//! An address range of this process that is reserved once and stays reserved: what it shows
//! changes by `mmap(MAP_FIXED)` inside it, so that no other mapping of the process can ever
//! land there, and no address of it is ever without a mapping. What is shown where is not
//! decided here, except that nothing reaches outside the range.

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Alignment of a range of at least this length: that of the largest pages.
const LARGEST: usize = 1 << 30;
/// Alignment of every other range.
const LARGE: usize = 2 << 20;

const READ_WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// A reserved range. At first all of it reads as zero and cannot be written.
#[derive(Debug)]
pub struct Reservation {
    base: NonNull<c_void>,
    len: usize,
}

// SAFETY: the range belongs to the process, not to a thread; the methods only change what is
// mapped in it, and the kernel serialises that.
unsafe impl Send for Reservation {}
// SAFETY: as above. Nobody holds a Rust reference into the range; loads and stores of vCPUs
// during a change see the old or the new pages.
unsafe impl Sync for Reservation {}

fn invalid() -> io::Error {
    io::ErrorKind::InvalidInput.into()
}

impl Reservation {
    /// Reserves `len` bytes, rounded up to 2 MiB and aligned to that, or to 1 GiB if there is
    /// as much.
    ///
    /// # Errors
    /// What mmap answers; `InvalidInput` for 0 or more than the address space.
    pub fn new(len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| invalid())?;
        let len = len.checked_next_multiple_of(LARGE).filter(|len| *len != 0).ok_or_else(invalid)?;
        let align = if len < LARGEST { LARGE } else { LARGEST };
        let room = len.checked_add(align).ok_or_else(invalid)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses replaces nothing.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), room, ProtFlags::READ, flags) }?;
        let head = start.align_offset(align);
        // An offset that cannot be computed (which is not so for bytes) would leave no room.
        let tail = room.checked_sub(len).and_then(|spare| spare.checked_sub(head)).ok_or_else(invalid)?;
        let base = start.wrapping_byte_add(head);
        // SAFETY: the ranges before `base` and after `base + len` are parts of the mapping just
        // made, and nothing refers to them. Should an unmapping fail, address space is lost
        // and nothing else.
        unsafe {
            if head != 0 {
                let _ = munmap(start, head);
            }
            if tail != 0 {
                let _ = munmap(base.wrapping_byte_add(len), tail);
            }
        }
        Ok(Self { base: NonNull::new(base).ok_or_else(invalid)?, len })
    }

    /// Where the range starts in this process.
    pub fn address(&self) -> u64 {
        self.base.as_ptr().addr() as u64
    }

    /// Shows `len` bytes of the file from `file_offset` on at `offset`.
    ///
    /// # Errors
    /// `InvalidInput` outside the range, else what mmap answers. What was there before may be
    /// gone then: the caller puts something there.
    pub fn show(
        &self,
        offset: u64,
        len: u64,
        file: BorrowedFd<'_>,
        file_offset: u64,
        writable: bool,
    ) -> io::Result<()> {
        let (at, len) = self.part(offset, len)?;
        let protection = if writable { READ_WRITE } else { ProtFlags::READ };
        // SAFETY: `part` checked that the range lies in the reservation, which is ours for as
        // long as `self` lives: MAP_FIXED replaces only our own pages. Nobody holds a Rust
        // reference into them: no method hands one out.
        unsafe { mmap(at, len, protection, MapFlags::SHARED | MapFlags::FIXED, file, file_offset) }?;
        Ok(())
    }

    /// Shows private zero pages at `offset`, which cost nothing until they are written.
    ///
    /// # Errors
    /// As [`show`](Self::show).
    pub fn show_zeros(&self, offset: u64, len: u64, writable: bool) -> io::Result<()> {
        let (at, len) = self.part(offset, len)?;
        let protection = if writable { READ_WRITE } else { ProtFlags::READ };
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: as in `show`.
        unsafe { mmap_anonymous(at, len, protection, flags) }?;
        Ok(())
    }

    /// The address and length of a part; not empty, and inside.
    fn part(&self, offset: u64, len: u64) -> io::Result<(*mut c_void, usize)> {
        let part = || {
            let offset = usize::try_from(offset).ok()?;
            let len = usize::try_from(len).ok().filter(|len| *len != 0)?;
            let end = offset.checked_add(len)?;
            (end <= self.len).then(|| (self.base.as_ptr().wrapping_byte_add(offset), len))
        };
        part().ok_or_else(invalid)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the range is the one that `new` kept, whatever is mapped in it is ours, and
        // whoever was told its address let go of it: slots are dropped before (`vmm::WindowSlot`).
        let _ = unsafe { munmap(self.base.as_ptr(), self.len) };
    }
}
