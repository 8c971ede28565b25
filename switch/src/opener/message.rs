//! What broker and opener say to each other, over a Unix stream: the length of a JSON text, 4 bytes in
//! the host's order, then the text. Sockets come with the length. Each question has one answer, and
//! the first answer is to none: the opener is ready, or why it is not.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::config::{Config, LinkConfig};
use crate::runtime::admission::Rule;

/// The longest text, bytes: far more than that of a configuration with all links that it may have.
const MAX_LEN: u32 = 64 << 20;
/// Sockets of one answer.
const MAX_SOCKETS: usize = 3;

/// What the broker asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// Read the configuration.
    Read,
    /// Make the control socket.
    Control,
    /// Make this link's sockets, as the configuration that was read last has them.
    Open(String),
    /// Remove this link's sockets.
    Close(String),
    /// Remove all.
    CloseAll,
}

/// What the opener answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The configuration.
    Config(Box<Config>),
    /// The link, with its sockets.
    Opened {
        /// Its configuration.
        config: Box<LinkConfig>,
        /// Who may be the owner.
        owner_rule: Rule,
        /// Who may be the peer.
        peer_rule: Rule,
    },
    /// Done; of [`Question::Control`] with the socket.
    Done,
    /// It cannot be done.
    Refused {
        /// A line for each mistake of the configuration.
        mistakes: Vec<String>,
        /// Why.
        summary: String,
    },
}

/// Sends a message with sockets, three at most.
///
/// # Errors
/// When the socket's time limit passes, or the other end is closed.
pub fn send<M: Serialize>(stream: &UnixStream, message: &M, sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let len = u32::try_from(text.len()).ok().filter(|len| *len <= MAX_LEN);
    let len = len.ok_or(io::ErrorKind::InvalidInput)?.to_ne_bytes();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !sockets.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(sockets)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // So few bytes go at once, or not at all.
    loop {
        match sendmsg(stream.as_fd(), &[IoSlice::new(&len)], &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(4) => break,
            Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut stream = stream;
    stream.write_all(&text)
}

/// Waits for a message and its sockets. `None`: the other end is closed.
///
/// # Errors
/// When the socket fails or its time limit passes, or a message is none, or comes in part.
pub fn receive<M: DeserializeOwned>(stream: &UnixStream) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
    let mut len = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
    let (read, flags) = loop {
        match recvmsg(stream.as_fd(), &mut [IoSliceMut::new(&mut len)], &mut ancillary, flags) {
            Ok(message) => break (message.bytes, message.flags),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    let rights = ancillary.drain().filter_map(|part| match part {
        RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
        _ => None,
    });
    let sockets: Vec<_> = rights.flatten().collect();
    match read {
        0 => return Ok(None),
        4 if flags.contains(ReturnFlags::CTRUNC) => return Err(io::Error::other("no room for a socket")),
        4 => {}
        _ => return Err(io::ErrorKind::UnexpectedEof.into()),
    }
    let len = u32::from_ne_bytes(len);
    if len > MAX_LEN {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut text = vec![0; len as usize];
    let mut stream = stream;
    stream.read_exact(&mut text)?;
    Ok(Some((serde_json::from_slice(&text)?, sockets)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::fs::File;

    #[test]
    fn messages_arrive_whole_and_with_their_sockets() {
        let (here, there) = UnixStream::pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        let questions = [
            (Question::Read, 0),
            (Question::Open("ü".repeat(1000)), 3),
            (Question::Close(String::new()), 1),
            (Question::CloseAll, 0),
        ];
        for (question, sockets) in questions {
            send(&here, &question, &vec![null.as_fd(); sockets]).unwrap();
            let (received, came): (Question, _) = receive(&there).unwrap().unwrap();
            assert_eq!((received, came.len()), (question, sockets));
        }
        drop(here);
        assert!(receive::<Question>(&there).unwrap().is_none());
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        for bytes in [&[1, 0][..], &[255; 4], &[2, 0, 0, 0, b'{'], &[1, 0, 0, 0, b'{']] {
            let (mut here, there) = UnixStream::pair().unwrap();
            here.write_all(bytes).unwrap();
            drop(here);
            assert!(receive::<Question>(&there).is_err(), "{bytes:?}");
        }
    }
}
