//! The `unsafe` code of the targets: memory between guards, and two questions to the kernel.
#![allow(unsafe_code)]

use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use guest_driver_model::shm::SharedMemory;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use nix::sys::signal::{SigHandler, Signal, signal};

/// Length of what is before and behind such memory and may not be touched, bytes.
const GUARD: usize = 1 << 30;

/// What is mapped.
struct Guarded {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: an address and a length, used by `drop` alone.
unsafe impl Send for Guarded {}
// SAFETY: as for Send.
unsafe impl Sync for Guarded {}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: `guarded` made this range, and whoever used it is gone: it held an Arc of this.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}

/// Zeroed memory of `len` bytes, whole pages, such that an access beyond its ends is a fault:
/// also one by instructions that the address sanitizer does not see.
pub fn guarded(len: usize) -> SharedMemory {
    let whole = NonZeroUsize::new(len + 2 * GUARD).expect("not empty");
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    // SAFETY: the kernel chooses a free range.
    let start = unsafe { mmap_anonymous(None, whole, ProtFlags::PROT_NONE, flags) }.expect("address space");
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: inside what was just mapped.
    let base = unsafe { start.cast::<u8>().add(GUARD) };
    // SAFETY: the same range, which nobody uses yet.
    unsafe { mprotect(base.cast(), len, access) }.expect("memory");
    let keep = Arc::new(Guarded { start: start.cast(), len: whole.get() });
    // SAFETY: mapped for reading and writing as long as `keep` lives; nothing else names it.
    unsafe { SharedMemory::from_raw_parts(base, len, keep) }
}

/// Lets writes to closed connections fail, as every Rust program does: the fuzzer's `main` is
/// not Rust's.
pub fn ignore_sigpipe() {
    // SAFETY: it installs no handler of this program.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) }.expect("a signal's disposition");
}

nix::ioctl_read_bad!(unread, libc::TIOCOUTQ, libc::c_int);

/// Whether the other end of a socket has read everything.
pub fn all_is_read(socket: BorrowedFd<'_>) -> bool {
    let mut left = 0;
    // SAFETY: the kernel writes one int, for which there is room.
    unsafe { unread(socket.as_raw_fd(), &mut left) }.is_err() || left == 0
}
