//! Descriptors that take long to close, for whoever sends them.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// A connection whose last close takes a minute, as its other end, which comes second, reads nothing.
fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut slow = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (other, _) = listener.accept().unwrap();
    rustix::net::sockopt::set_socket_linger(&slow, Some(Duration::from_secs(60))).unwrap();
    slow.set_nonblocking(true).unwrap();
    while slow.write(&[0; 65536]).is_ok() {}
    (slow, other)
}

/// Connects and sends one: whoever closes the other end has it. Gives this end, and what lets it go at once
/// when it is dropped.
pub fn sent_to(socket: &Path) -> (UnixStream, TcpStream) {
    let (slow, other) = lingering();
    let stream = UnixStream::connect(socket).unwrap();
    let _ = stream.send_with_fds(&[[0; 12].as_slice()], &[slow.as_raw_fd()]);
    // Where it was not sent, this one's own close takes its time.
    thread::spawn(move || drop(slow));
    (stream, other)
}
