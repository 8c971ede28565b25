//! The back-end channel to a VMM. The link sends on it and never waits: what a VMM
//! does not read at once is kept, in order, until it answers something. A thread
//! reads the answers, which come in the order of the requests.
//!
//! A VMM is sent the next request before it has answered the one before, so that a
//! row of changes costs one round trip.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use crossbeam_channel::Sender;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::backend_message::{HEADER_LEN, Message, REPLY_LEN, is_done, replied};
use super::rate::Rate;
use super::{ChannelId, Input, LinkPort, SessionId};
use crate::link::message::{Flood, MissId, OpId, Reply};
use crate::link::wiring::WireId;
use crate::link::{Fault, Side};

/// Requests that are sent and not answered, at most: descriptors on their way count
/// against a limit of the broker's user.
const MAX_OPEN: usize = 64;

/// What an answer is the answer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// A change of the window; of one that unmaps, where: window offset and length, bytes.
    Window(OpId, Option<(u64, u64)>),
    /// A change of the wiring.
    Wire(WireId),
    /// A miss.
    Miss(MissId),
    /// Something that has no answer.
    Nothing,
}

/// The channel to one VMM. Closes when dropped.
#[derive(Debug)]
pub struct Channel {
    id: ChannelId,
    stream: Arc<UnixStream>,
    /// Sent and not answered: what, the number of the request, and what it asks for in words.
    open: VecDeque<(Asked, u32, String)>,
    unsent: VecDeque<(Asked, Message)>,
}

impl Channel {
    /// Starts the thread. Answers go to the link as those of this session, no faster than `rate`.
    ///
    /// # Errors
    /// When the host gives no descriptor or thread.
    pub fn open(
        stream: UnixStream,
        port: LinkPort,
        side: Side,
        ids: (SessionId, ChannelId),
        name: &str,
        mut rate: Rate,
    ) -> io::Result<Self> {
        let stream = Arc::new(stream);
        let answers = Arc::clone(&stream);
        let (session, channel) = ids;
        thread::Builder::new().name(format!("{name} {} answers", side.name())).spawn(move || {
            let error = loop {
                while let Some(wait) = rate.take(Instant::now()) {
                    port.send(Input::TooOften(side, Flood::Messages));
                    thread::sleep(wait);
                }
                match read_answer(&answers) {
                    Ok((request, done)) => {
                        port.send(Input::ChannelAnswer { side, session, channel, request, done });
                    }
                    Err(error) => break error,
                }
            };
            if error.kind() == io::ErrorKind::InvalidData {
                let fault = Some(Fault::Message("what came on the back-end channel is no answer".into()));
                port.send(Input::Ended { side, session, fault });
            }
            port.send(Input::ChannelEnded { side, session, channel });
        })?;
        Ok(Self { id: channel, stream, open: VecDeque::new(), unsent: VecDeque::new() })
    }

    /// Its connection.
    pub fn connection(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Its number.
    pub fn id(&self) -> ChannelId {
        self.id
    }

    /// Asks. The answer comes as [`Input::ChannelAnswer`].
    ///
    /// # Errors
    /// When the VMM is gone.
    pub fn ask(&mut self, asked: Asked, message: Message) -> io::Result<()> {
        self.unsent.push_back((asked, message));
        self.send()
    }

    /// Sends what was kept, as far as the VMM reads.
    ///
    /// # Errors
    /// When the VMM is gone.
    pub fn send(&mut self) -> io::Result<()> {
        while let Some((asked, message)) = self.unsent.front().filter(|_| self.open.len() < MAX_OPEN) {
            match send(&self.stream, message) {
                Ok(()) if message.has_answer => {
                    self.open.push_back((*asked, message.code(), message.what.clone()));
                }
                Ok(()) => {}
                Err(error) if is_passing(&error) && !self.open.is_empty() => return Ok(()),
                Err(error) => return Err(error),
            }
            self.unsent.pop_front();
        }
        Ok(())
    }

    /// An answer to a request of this number came: to what, in words too. `None`: to nothing that was
    /// asked.
    ///
    /// # Errors
    /// When something else was to be answered first: what.
    pub fn answered(&mut self, request: u32) -> Result<Option<(Asked, String)>, String> {
        match self.open.pop_front() {
            Some((_, expected, what)) if expected != request => Err(what),
            open => Ok(open.map(|(asked, _, what)| (asked, what))),
        }
    }

    /// Whether the VMM was asked for something that it has not answered.
    pub fn owes_answers(&self) -> bool {
        !self.open.is_empty() || !self.unsent.is_empty()
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // Wakes the thread, also where the VMM keeps its end open and silent.
        drop(self.stream.shutdown(Shutdown::Both));
    }
}

/// Whether the VMM has not read enough, or the host has too little at the moment: to be
/// tried again.
pub(crate) fn is_passing(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::AGAIN, Errno::NOBUFS, Errno::NOMEM, Errno::TOOMANYREFS]
        .into_iter()
        .any(|passing| error.raw_os_error() == Some(passing.raw_os_error()))
}

/// Sends a message at once or not at all. (The kernel takes so short a one whole.)
fn send(stream: &UnixStream, message: &Message) -> io::Result<()> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let fds: Vec<_> = message.descriptor().into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    }
    match sendmsg(stream, &[IoSlice::new(&message.bytes)], &mut ancillary, flags) {
        Ok(sent) if sent == message.bytes.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(rustix::io::Errno::INTR) => send(stream, message),
        Err(error) => Err(error.into()),
    }
}

/// Sends an acknowledgement to a front-end at once; says whether the front-end took it.
pub fn send_now(stream: BorrowedFd<'_>, bytes: &[u8]) -> bool {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    rustix::net::send(stream, bytes, flags).is_ok_and(|sent| sent == bytes.len())
}

/// Sends an acknowledgement to a front-end that does not read, by a thread that waits for it,
/// and then tells the session, which takes no other message before. So there is one such
/// thread a session at most; it ends when the session's connection does.
///
/// # Errors
/// When the host gives no descriptor or thread.
pub fn send_later(
    stream: BorrowedFd<'_>,
    bytes: [u8; HEADER_LEN + REPLY_LEN],
    session: Sender<Reply>,
    reply: Reply,
) -> io::Result<()> {
    let mut stream = UnixStream::from(stream.try_clone_to_owned()?);
    thread::Builder::new().name("late answer".into()).spawn(move || {
        // An error is the connection's end, which the session sees by itself.
        drop(stream.write_all(&bytes));
        drop(session.send(reply));
    })?;
    Ok(())
}

/// The next answer: to which request, and whether it was done.
fn read_answer(mut stream: &UnixStream) -> io::Result<(u32, bool)> {
    let (mut header, mut payload) = ([0; HEADER_LEN], [0; REPLY_LEN]);
    // Descriptors that come along are closed by the kernel, as nobody asks for them.
    stream.read_exact(&mut header)?;
    let request = replied(&header).ok_or(io::ErrorKind::InvalidData)?;
    stream.read_exact(&mut payload)?;
    Ok((request, is_done(payload)))
}
