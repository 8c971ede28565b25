//! Ends of connections and of listening sockets. What a VMM has sent already, or waits for a door to
//! open with, is unread, and the kernel closes descriptors in it together with the socket: which takes
//! as long as somebody likes, if one is a TCP connection that lingers. So a few threads do that, for
//! whom nobody waits.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use crossbeam_channel::bounded;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use rustix::net::{Shutdown, shutdown, sockopt::set_socket_oobinline};

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
        let crowded = Arc::strong_count(&self.0) > CROWD;
        if crowded {
            // The host may have had no thread when they came.
            start_thread(closing());
        }
        crowded
    }
}

struct Closing {
    waiting: VecDeque<(Box<dyn Send>, Pass)>,
    threads: usize,
}

static CLOSING: Mutex<Closing> = Mutex::new(Closing { waiting: VecDeque::new(), threads: 0 });

fn closing() -> MutexGuard<'static, Closing> {
    CLOSING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends a connection of which something may be unread, or a listening socket: whoever has its last
/// descriptor, which this is to be. Never waits.
pub fn turn_away(socket: impl AsFd + Send + 'static, pass: Pass) {
    // Nothing more comes after this.
    let _ = shutdown(&socket, Shutdown::Both);
    if is_empty(&socket) {
        return;
    }
    let mut closing = closing();
    closing.waiting.push_back((Box::new(socket), pass));
    start_thread(closing);
}

/// Whether nothing is in a connection that its close would close; `false` of what is none.
fn is_empty(socket: &impl AsFd) -> bool {
    // A look passes over a byte that was sent out of band, and over the descriptors that came with it.
    if set_socket_oobinline(socket, true).is_err() {
        return false;
    }
    let look = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    matches!(recv(socket.as_fd().as_raw_fd(), &mut [0], look), Ok(0) | Err(Errno::EAGAIN))
}

/// Starts one more, if something waits and there may be one.
fn start_thread(mut closing: MutexGuard<'_, Closing>) {
    if closing.waiting.is_empty() || closing.threads == MOST {
        return;
    }
    closing.threads += 1;
    drop(closing);
    // Without a thread it waits for the next one's.
    if thread::Builder::new().name("closing".into()).spawn(close_all).is_err() {
        self::closing().threads -= 1;
    }
}

fn close_all() {
    while let Some((socket, pass)) = next() {
        // In this order: it takes as long as it takes.
        drop(socket);
        drop(pass);
    }
}

/// The next one; without any the thread is no more.
fn next() -> Option<(Box<dyn Send>, Pass)> {
    let mut closing = closing();
    let next = closing.waiting.pop_front();
    if next.is_none() {
        closing.threads -= 1;
    }
    next
}

/// Starts a thread of this name that does something with what it is given.
///
/// # Errors
/// When the host gives no thread: with what it was to have, which would else be closed here and now.
pub fn spawn<T: Send + 'static>(
    name: String,
    given: T,
    work: impl FnOnce(T) + Send + 'static,
) -> Result<(), (io::Error, T)> {
    let (gives, takes) = bounded(1);
    let thread = thread::Builder::new().name(name).spawn(move || {
        if let Ok(given) = takes.recv() {
            work(given);
        }
    });
    match thread {
        Ok(_) => gives.send(given).map_err(|unsent| (io::ErrorKind::BrokenPipe.into(), unsent.0)),
        Err(error) => Err((error, given)),
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::IoSlice;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::time::{Duration, Instant};

    use nix::sys::socket::{ControlMessage, sendmsg};

    /// What takes up to a minute to close: until the other end is.
    pub fn slow_to_close() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut slow = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (other, _) = listener.accept().unwrap();
        rustix::net::sockopt::set_socket_linger(&slow, Some(Duration::from_secs(60))).unwrap();
        slow.set_nonblocking(true).unwrap();
        while slow.write(&[0; 65536]).is_ok() {}
        (slow, other)
    }

    /// Has it come, and stay, unread on a connection.
    pub fn send(connection: &UnixStream, slow: TcpStream, flags: MsgFlags) -> nix::Result<()> {
        let slow = [slow.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&slow)];
        sendmsg::<()>(connection.as_raw_fd(), &[IoSlice::new(&[0])], &rights, flags, None).map(drop)
    }

    /// That something is let go of which takes long to close: it is not closed before the other end is.
    pub fn is_closed_elsewhere(lets_go: impl FnOnce(Pass), other: TcpStream) {
        let unclosed = Unclosed::default();
        lets_go(unclosed.pass());
        assert_eq!(Arc::strong_count(&unclosed.0), 2, "it was waited for");
        drop(other);
        let end = Instant::now() + Duration::from_secs(30);
        while Arc::strong_count(&unclosed.0) > 1 {
            assert!(Instant::now() < end);
            thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn what_came_out_of_band_is_not_closed_by_who_turns_its_sender_away() {
        let (slow, other) = slow_to_close();
        let (ours, vmm) = UnixStream::pair().unwrap();
        match send(&vmm, slow, MsgFlags::MSG_OOB) {
            // A kernel without CONFIG_AF_UNIX_OOB.
            Err(Errno::EOPNOTSUPP) => println!("skipped: nothing comes out of band here"),
            sent => {
                sent.unwrap();
                is_closed_elsewhere(|pass| turn_away(ours, pass), other);
            }
        }
    }

    #[test]
    fn what_waits_at_a_listening_socket_is_not_closed_by_who_closes_it() {
        let (slow, other) = slow_to_close();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        send(&UnixStream::connect(&path).unwrap(), slow, MsgFlags::empty()).unwrap();
        is_closed_elsewhere(|pass| turn_away(listener, pass), other);
        assert!(UnixStream::connect(&path).is_err(), "who comes later waits for nobody");
    }

    #[test]
    fn a_thread_has_what_it_was_given() {
        let (gives, takes) = bounded(1);
        spawn("given".into(), 7, move |given| gives.send(given).unwrap()).unwrap();
        assert_eq!(takes.recv(), Ok(7));
    }

    #[test]
    fn a_door_is_crowded_while_what_came_through_it_is_not_closed() {
        let (unclosed, elsewhere) = (Unclosed::default(), Unclosed::default());
        let others: Vec<_> = (0..CROWD)
            .map(|_| {
                let (slow, other) = slow_to_close();
                let (connection, vmm) = UnixStream::pair().unwrap();
                send(&vmm, slow, MsgFlags::empty()).unwrap();
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
