//! Eventfds: the device's own, and those that it was given.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{ReadWriteFlags, preadv2};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A non-blocking eventfd with no count.
///
/// # Errors
/// What eventfd(2) answers.
pub fn new() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// A descriptor that came with a message, as the eventfd it is said to be: the kernel is asked,
/// before anything is done with it. Polling or closing a file of another kind can take as long as
/// its server likes.
///
/// # Errors
/// `InvalidInput` if it is none; what the system answers where there is no /proc.
pub fn from_descriptor(descriptor: OwnedFd) -> io::Result<EventFd> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", descriptor.as_raw_fd()))?;
    if !info.lines().any(|line| line.starts_with("eventfd-count:")) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is no eventfd"));
    }
    // SAFETY: `into_raw_fd` gives up the descriptor, so the new value is its only owner.
    Ok(unsafe { EventFd::from_raw_fd(descriptor.into_raw_fd()) })
}

/// The descriptor, for calls that take one.
pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` owns the descriptor and closes it only on drop, which the borrow
    // prevents.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

const NO_TIME: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

fn is(event: &EventFd, flag: PollFlags) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(borrow(event), flag)];
    poll(&mut fds, Some(&NO_TIME)).is_ok() && fds[0].revents().contains(flag)
}

/// Whether it has a count. Leaves the count.
pub fn has_count(event: &EventFd) -> bool {
    is(event, PollFlags::IN)
}

/// Whether a signal would have to wait.
pub fn is_full(event: &EventFd) -> bool {
    !is(event, PollFlags::OUT)
}

/// Makes an eventfd readable that only this process has: never waits.
pub fn signal(event: &EventFd) {
    // An error is a full count: readable already.
    let _ = event.write(1);
}

/// Makes an eventfd readable of which another process has a duplicate. That process can have it
/// wait, until somebody drains it: not for a thread that anybody waits for.
pub fn signal_shared(event: &EventFd) {
    // Full is readable already. Who fills it after this look has its way.
    if !is_full(event) {
        let _ = event.write(1);
    }
}

/// Takes the count away, if there is one. Never waits, whatever others have made of the flags of
/// the file that they share.
pub fn drain(event: &EventFd) {
    let mut count = [0; 8];
    let buffers = &mut [IoSliceMut::new(&mut count)];
    // An error is an empty count. (The greatest offset means none: an eventfd has no place.)
    let _ = preadv2(borrow(event), buffers, u64::MAX, ReadWriteFlags::NOWAIT);
}
