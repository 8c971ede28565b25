//! Two questions to the kernel, and one to the C library, that no crate in use asks. With `session::sys` the broker's only
//! `unsafe` code.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::libc;

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

/// The groups besides its first one of the process that connected a Unix stream socket, as they
/// were at that time: SO_PEERGROUPS of unix(7).
///
/// # Errors
/// What getsockopt(2) answers.
pub fn supplementary_groups<F: AsFd>(socket: F) -> io::Result<Vec<u32>> {
    let mut groups = vec![0_u32; 32];
    loop {
        let mut len = libc::socklen_t::try_from(size_of_val(groups.as_slice())).unwrap_or(0);
        // SAFETY: the option writes at most `len` bytes to the place given, which is a buffer of
        // that length, of numbers for which every pattern of bits is one; it writes back to `len`
        // how many. Both live until the call returns; the descriptor is borrowed for as long.
        let result = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        let count = len as usize / size_of::<u32>();
        match io::Error::last_os_error() {
            _ if result == 0 => {
                groups.truncate(count);
                return Ok(groups);
            }
            // It says how much room it needs. A process has 65,536 groups at most.
            error if error.raw_os_error() == Some(libc::ERANGE) && count > groups.len() => {
                groups.resize(count, 0);
            }
            error => return Err(error),
        }
    }
}

/// Has all threads of this process allocate from one heap, instead of from eight a processor that each keep their own
/// free room: the broker's threads come and go with its connections, and one heap holds what all of them together
/// need at once. For a program's `main`, before its threads; does nothing with a C library other than GNU's.
pub fn one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes two numbers and has no conditions; 1 heap is one of the values it knows.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
