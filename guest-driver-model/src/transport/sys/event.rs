//! Eventfds, as the vhost crate and poll(2) both want them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A non-blocking eventfd.
#[derive(Debug)]
pub struct Event(EventFd);

impl Event {
    /// A new one, not signalled.
    ///
    /// # Errors
    /// What eventfd(2) answers.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Self)
    }

    /// As the vhost and VFIO crates take it.
    pub fn inner(&self) -> &EventFd {
        &self.0
    }

    /// Whether it was signalled since this was last asked.
    pub fn take(&self) -> bool {
        self.0.read().is_ok()
    }

    /// Waits until it is signalled, at most so long; says whether it was.
    pub fn wait(&self, most: Duration) -> bool {
        let most = u16::try_from(most.as_millis()).unwrap_or(u16::MAX);
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        // An error (EINTR) is an early end of the wait.
        let _ = poll(&mut fds, PollTimeout::from(most));
        self.take()
    }

    /// Makes it readable. A counter that is full is readable already.
    pub fn signal(&self) {
        let _ = self.0.write(1);
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: `self.0` owns the descriptor and closes it only on drop, which the
        // borrow of `self` prevents.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}
