//! Ends of connections that are turned away. What their VMM has sent already is unread, and the
//! kernel closes descriptors in it together with the socket: which takes as long as somebody
//! likes, if one is a TCP connection that lingers. So a few threads do that, for whom nobody
//! waits.

use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::sys::socket::{MsgFlags, recv};

/// Threads at most. What comes while all of them are kept waits, and counts against the broker's
/// limit of descriptors, near which it takes no more connections.
const MOST: usize = 8;

/// Connections of one door that may be open, or on their way to be closed, before it is kept shut.
const CROWD: usize = 8;

/// The connections of one door that are not closed.
#[derive(Debug, Default)]
pub struct Unclosed(Arc<()>);

/// One of them: whoever has the connection keeps this until it is closed. The default is of no door.
#[derive(Debug, Default)]
pub struct Pass {
    _of: Arc<()>,
}

impl Unclosed {
    /// For one connection more.
    pub fn pass(&self) -> Pass {
        Pass { _of: Arc::clone(&self.0) }
    }

    /// Whether there are so many that no more are to come: somebody sends what is slow to close.
    pub fn is_crowded(&self) -> bool {
        Arc::strong_count(&self.0) > CROWD
    }
}

struct Closing {
    waiting: VecDeque<(UnixStream, Pass)>,
    threads: usize,
}

static CLOSING: Mutex<Closing> = Mutex::new(Closing { waiting: VecDeque::new(), threads: 0 });

fn closing() -> MutexGuard<'static, Closing> {
    CLOSING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends a connection of which nobody has read anything. Never waits.
pub fn turn_away(stream: UnixStream, pass: Pass) {
    // Nothing more comes after this.
    let _ = stream.shutdown(Shutdown::Both);
    let look = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    if !matches!(recv(stream.as_raw_fd(), &mut [0], look), Ok(1..)) {
        return;
    }
    let mut closing = closing();
    closing.waiting.push_back((stream, pass));
    if closing.threads < MOST {
        closing.threads += 1;
        drop(closing);
        // Without a thread it waits for the next one's.
        if thread::Builder::new().name("closing".into()).spawn(close_all).is_err() {
            self::closing().threads -= 1;
        }
    }
}

fn close_all() {
    while let Some((stream, pass)) = next() {
        // In this order: it takes as long as it takes.
        drop(stream);
        drop(pass);
    }
}

/// The next one; without any the thread is no more.
fn next() -> Option<(UnixStream, Pass)> {
    let mut closing = closing();
    let next = closing.waiting.pop_front();
    if next.is_none() {
        closing.threads -= 1;
    }
    next
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    /// A connection on which came, unread, what takes up to a minute to close: until the other end is.
    fn slow_to_close() -> (UnixStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut slow = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (other, _) = listener.accept().unwrap();
        rustix::net::sockopt::set_socket_linger(&slow, Some(Duration::from_secs(60))).unwrap();
        slow.set_nonblocking(true).unwrap();
        while slow.write(&[0; 65536]).is_ok() {}
        let (ours, vmm) = UnixStream::pair().unwrap();
        vmm.send_with_fds(&[[0; 12].as_slice()], &[slow.as_raw_fd()]).unwrap();
        (ours, other)
    }

    #[test]
    fn a_door_is_crowded_while_what_came_through_it_is_not_closed() {
        let (unclosed, elsewhere) = (Unclosed::default(), Unclosed::default());
        let others: Vec<_> = (0..CROWD)
            .map(|_| {
                let (connection, other) = slow_to_close();
                assert!(!unclosed.is_crowded());
                turn_away(connection, unclosed.pass());
                other
            })
            .collect();
        assert!(unclosed.is_crowded());
        // Another door is not, and one on which nothing came is closed at once.
        turn_away(UnixStream::pair().unwrap().0, elsewhere.pass());
        assert_eq!(Arc::strong_count(&elsewhere.0), 1);
        drop(others);
        let end = Instant::now() + Duration::from_secs(30);
        while unclosed.is_crowded() {
            assert!(Instant::now() < end);
            thread::sleep(Duration::from_millis(2));
        }
    }
}
