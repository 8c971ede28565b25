//! One question to the kernel that no crate in use asks. With `session::sys` the broker's only
//! `unsafe` code.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

mod request {
    // SIOCOUTQ of unix(7) has the number of TIOCOUTQ.
    nix::ioctl_read_bad!(outq, nix::libc::TIOCOUTQ, nix::libc::c_int);
}

/// Whether the other end of a Unix stream socket has read all that was sent on it.
///
/// # Errors
/// What ioctl(2) answers.
pub fn all_is_read<F: AsFd>(socket: F) -> io::Result<bool> {
    let mut unread = 0;
    // SAFETY: the request writes one int to the place given, which is one and lives until
    // the call returns; the descriptor is borrowed for as long.
    unsafe { request::outq(socket.as_fd().as_raw_fd(), &raw mut unread) }?;
    Ok(unread == 0)
}
