//! The way to the broker's socket, without waiting: dropping the device waits for the thread that
//! connects, and connect(2) to a listener whose queue is full waits until somebody accepts.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect as connect_to, socket_with,
};

/// Connects to the socket at a path.
///
/// # Errors
/// What the system answers: `WouldBlock` if nobody accepts.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect_to(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    // From here on there are time limits, and whoever ends the device shuts it down.
    stream.set_nonblocking(false)?;
    Ok(stream)
}
