//! The device's thread: it has the vhost-user conversation with the broker, so that no vCPU
//! waits for it, and connects again when the broker has gone.
//!
//! What the driver wants is a number and a list of queues, which each start and reset of the
//! device replaces ([`Desired`]). The thread takes the broker from what it was last told to what
//! is wanted now; what came and went in between the broker never hears of.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::channel::Channel;
use super::ending;
use super::handshake::{Connection, Geometry, HandshakeError};
use crate::device::{Desired, Shared};
use crate::sys::event;

/// The pause before the first attempt to connect again.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How long the answers to a stopped device's requests may take.
const ANSWERS_TIME: Duration = Duration::from_secs(1);

/// How often the VMM is asked again for an interrupt that it refused.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// How the broker is reached, each time anew.
pub type Connector = Box<dyn FnMut() -> io::Result<UnixStream> + Send>;

/// The thread's work, until the device is dropped.
pub fn run(shared: &Arc<Shared>, geometry: Geometry, mut connect: Connector, first: Connection) {
    let mut next = Some(first);
    let mut pause = FIRST_PAUSE;
    let mut told = None;
    while !shared.is_ending() {
        let connection = match next.take() {
            Some(connection) => Ok(connection),
            None => again(shared, geometry, &mut connect),
        };
        match connection {
            Ok(connection) => {
                told = None;
                let since = Instant::now();
                if let Err(error) = serve(shared, connection)
                    && shared.may_tell()
                {
                    tracing::warn!(%error, "the connection to the broker has ended");
                }
                // A broker that hangs up soon is asked less and less often.
                if since.elapsed() >= LONGEST_PAUSE {
                    pause = FIRST_PAUSE;
                }
            }
            Err(error) => {
                // Once for each cause, not for each attempt.
                let words = error.to_string();
                if told.as_ref() != Some(&words) && shared.may_tell() {
                    tracing::warn!(error = words, "no broker; trying again");
                    told = Some(words);
                }
            }
        }
        wait(shared, pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn again(shared: &Shared, geometry: Geometry, connect: &mut Connector) -> Result<Connection, HandshakeError> {
    let stream = connect()?;
    shared.set_current(Some(stream.try_clone()?));
    let connection = Connection::negotiate(stream);
    match connection {
        Ok(connection) if connection.geometry == geometry => Ok(connection),
        other => {
            shared.set_current(None);
            other.and(Err(HandshakeError::Changed))
        }
    }
}

/// A time limit for a wait; none without `left`, unless the VMM is to be asked again before.
fn limit(shared: &Shared, left: Option<Duration>) -> Option<Timespec> {
    let again = shared.is_refused().then_some(ASK_AGAIN);
    let left = left.into_iter().chain(again).min()?;
    Some(Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() })
}

/// Waits, or until the device is dropped.
fn wait(shared: &Shared, pause: Duration) {
    let until = Instant::now() + pause;
    while let Some(left) = until.checked_duration_since(Instant::now()).filter(|_| !shared.is_ending()) {
        let time = limit(shared, Some(left));
        // What woke it is looked at when there is a broker again.
        if poll(&mut [PollFd::from_borrowed_fd(event::borrow(&shared.wake), PollFlags::IN)], time.as_ref())
            .is_ok_and(|count| count > 0)
        {
            event::drain(&shared.wake);
        }
        shared.settle_again();
    }
}

/// Waits until the channel's thread has answered what the broker asked for before it knew of the
/// stop: that is about a device that is no more, not about the next start's. Not for long, and not if the
/// driver wants something else meanwhile.
fn answer_all(shared: &Shared, channel: &Channel, socket: &UnixStream, desired: &Desired) -> io::Result<()> {
    let until = Instant::now() + ANSWERS_TIME;
    while !shared.is_ending() && Instant::now() < until && shared.desired() == *desired {
        if let Some(_idle) = channel.try_idle()
            && rustix::io::ioctl_fionread(socket)? == 0
        {
            break;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

/// One connection's life.
fn serve(shared: &Arc<Shared>, mut connection: Connection) -> Result<(), HandshakeError> {
    shared.set_current(Some(connection.main.try_clone()?));
    let channel = Channel::spawn(shared, &connection.channel, &connection.main, connection.wiring)?;
    shared.connected(connection.wiring);
    let result = converse(shared, &mut connection, &channel);
    // Locally first: whoever looks at the sockets' end finds nothing in the guest's reach.
    shared.lost();
    shared.set_current(None);
    let _ = connection.main.shutdown(Shutdown::Both);
    let _ = connection.channel.shutdown(Shutdown::Both);
    channel.end();
    ending::close(connection);
    result
}

fn converse(shared: &Shared, connection: &mut Connection, channel: &Channel) -> Result<(), HandshakeError> {
    let mut told = Desired::default();
    loop {
        event::drain(&shared.wake);
        if shared.is_ending() {
            return Ok(());
        }
        let desired = shared.desired();
        if desired != told {
            if !told.queues.is_empty() {
                connection.stop(&told.queues)?;
                shared.settled(desired.epoch);
                answer_all(shared, channel, &connection.channel, &desired)?;
            }
            if shared.begin(&desired) {
                connection.start(&desired.queues, &shared.pairs)?;
            }
            shared.settled(desired.epoch);
            told = desired;
            continue;
        }
        let mut fds = [
            PollFd::from_borrowed_fd(event::borrow(&shared.wake), PollFlags::IN),
            PollFd::from_borrowed_fd(connection.main.as_fd(), PollFlags::IN | PollFlags::RDHUP),
        ];
        match poll(&mut fds, limit(shared, None).as_ref()) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other.map_err(io::Error::from)?,
        };
        shared.settle_again();
        // Nothing was asked, so nothing comes but the end.
        if !fds[1].revents().is_empty() {
            return Ok(());
        }
    }
}
