//! What the broker tells its guardian: a datagram each, on a socket of type SOCK_SEQPACKET, which
//! keeps their order. The first is answered with the same, when the guardian is ready; no other is.
//!
//! Bytes: the kind, 1; 3 of padding; the link's number, 4; its `link_id`, 8; the rest is its name.
//! In the host's order: both ends are the same program.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

const HEADER_LEN: usize = 16;
/// The longest name of a link that is told whole, bytes.
const MAX_NAME: usize = 240;
/// Descriptors of one message.
const MAX_DESCRIPTORS: usize = 2;

/// What a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// How many links there are. With the file of the table.
    Table,
    /// A link begins, under a number that no other has now.
    Link,
    /// It has ended, and its number may become another's.
    LinkGone,
    /// With the connection of its owner's VMM.
    Owner,
    /// That is closed.
    OwnerGone,
    /// With the connection of the owner's VMM that waits for the link.
    Waiting,
    /// That is closed.
    WaitingGone,
    /// Those two have changed places.
    OwnersSwapped,
    /// With the connection of its peer's VMM, and the file of the areas.
    Peer,
    /// That is closed, and its back-end channel with it.
    PeerGone,
    /// With the peer's back-end channel.
    Channel,
    /// With a witness page.
    Witness,
}

impl Kind {
    const ALL: [Self; 12] = [
        Self::Table,
        Self::Link,
        Self::LinkGone,
        Self::Owner,
        Self::OwnerGone,
        Self::Waiting,
        Self::WaitingGone,
        Self::OwnersSwapped,
        Self::Peer,
        Self::PeerGone,
        Self::Channel,
        Self::Witness,
    ];
}

/// A message, but for its descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// What it is about.
    pub kind: Kind,
    /// The link's number; of [`Kind::Table`], how many there are.
    pub link: u32,
    /// Of [`Kind::Link`]: what its page names it.
    pub link_id: u64,
    /// Of [`Kind::Link`]: its name.
    pub name: String,
}

impl Message {
    /// One that says no more than this.
    pub fn new(kind: Kind, link: u32) -> Self {
        Self { kind, link, link_id: 0, name: String::new() }
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![self.kind as u8, 0, 0, 0];
        bytes.extend(self.link.to_ne_bytes());
        bytes.extend(self.link_id.to_ne_bytes());
        bytes.extend(self.name.bytes().take(MAX_NAME));
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (header, name) = bytes.split_at_checked(HEADER_LEN)?;
        Some(Self {
            kind: Kind::ALL.into_iter().find(|kind| *kind as u8 == header[0])?,
            link: u32::from_ne_bytes(header[4..8].try_into().ok()?),
            link_id: u64::from_ne_bytes(header[8..16].try_into().ok()?),
            name: String::from_utf8_lossy(name).into_owned(),
        })
    }
}

/// Sends a message with descriptors, two at most.
///
/// # Errors
/// When the socket's time limit passes, or the other end is closed.
pub fn send(socket: BorrowedFd<'_>, message: &Message, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let bytes = message.encode();
    loop {
        match sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A message as it came.
#[derive(Debug)]
pub struct Received {
    /// What it says.
    pub message: Message,
    /// What came with it.
    pub descriptors: Vec<OwnedFd>,
    /// Whether all that was sent with it is there: this process may have no room for it.
    pub is_whole: bool,
}

/// Waits for a message. `None`: the other end is closed.
///
/// # Errors
/// When the socket fails, or a message is none.
pub fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<Received>> {
    let mut bytes = [0; HEADER_LEN + MAX_NAME];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let (len, flags) = loop {
        let buffers = &mut [IoSliceMut::new(&mut bytes)];
        match recvmsg(socket, buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) => break (message.bytes, message.flags),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    if len == 0 {
        return Ok(None);
    }
    let rights = ancillary.drain().filter_map(|part| match part {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptors = rights.flatten().collect();
    let message = Message::decode(&bytes[..len]).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Some(Received { message, descriptors, is_whole: !flags.contains(ReturnFlags::CTRUNC) }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    #[test]
    fn messages_arrive_whole_in_order_and_with_their_descriptors() {
        let (here, there) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let null = File::open("/dev/null").unwrap();
        for (number, kind) in Kind::ALL.into_iter().enumerate() {
            let link = Message { name: "ü".repeat(number), link_id: 7, ..Message::new(kind, number as u32) };
            let descriptors = vec![null.as_fd(); number % (MAX_DESCRIPTORS + 1)];
            send(here.as_fd(), &link, &descriptors).unwrap();
            let received = receive(there.as_fd()).unwrap().unwrap();
            assert_eq!((received.message, received.descriptors.len()), (link, descriptors.len()));
            assert!(received.is_whole);
        }
        send(here.as_fd(), &Message { name: "n".repeat(1000), ..Message::new(Kind::Link, 1) }, &[]).unwrap();
        assert_eq!(receive(there.as_fd()).unwrap().unwrap().message.name.len(), MAX_NAME);
        drop(here);
        assert!(receive(there.as_fd()).unwrap().is_none());
    }
}
