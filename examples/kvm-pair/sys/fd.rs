//! Descriptors between crates that do not know each other's types.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use vmm_sys_util::eventfd::EventFd;

/// A descriptor that is an eventfd, as rust-vmm's crates take it.
pub fn eventfd(descriptor: OwnedFd) -> EventFd {
    // SAFETY: the descriptor was owned and is not used otherwise any more.
    unsafe { EventFd::from_raw_fd(descriptor.into_raw_fd()) }
}

/// The descriptor of an eventfd.
pub fn borrow(eventfd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the eventfd owns the descriptor, and closes it only on drop, which the borrow
    // prevents.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}
