//! The messages that are taken from the socket before the vhost crate sees them:
//! SET_BACKEND_REQ_FD, whose stream the broker must be able to shut down when its
//! VMM stalls (the crate's `Backend` keeps it to itself); IOTLB_MSG, which the
//! crate refuses; SET_VRING_ENABLE, which QEMU sends before SET_FEATURES and the crate
//! takes after it only; and IOMMU_PUSH, which is this project's own
//! (`docs/vhost-user-extensions.md`).

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vhost::vhost_user::message::FrontendReq;

use crate::link::Fault;
use crate::link::message::{IotlbMessage, PushEntry, Request};
use crate::session::inspect;

/// Length of a vhost-user header: request, flags, size of the payload, each 32
/// bits in native order (vhost-user: Header).
const HEADER_LEN: usize = 12;
/// Header flags: protocol version 1, a reply is wanted.
const FLAG_VERSION: u32 = 0x1;
const FLAG_NEED_REPLY: u32 = 0x8;
/// `struct vhost_iotlb_msg`: three 64-bit fields, two bytes and padding, bytes.
const IOTLB_LEN: usize = 32;
/// Header and entries of IOMMU_PUSH, bytes.
const PUSH_HEADER_LEN: usize = 8;
const PUSH_ENTRY_LEN: usize = 32;
/// Entries of one IOMMU_PUSH.
const MAX_PUSH_ENTRIES: usize = 64;
/// The flag of IOMMU_PUSH by which all earlier mappings go.
const PUSH_RESET: u32 = 0x1;
/// The longest payload of an intercepted message, bytes.
const MAX_PAYLOAD: usize = PUSH_HEADER_LEN + MAX_PUSH_ENTRIES * PUSH_ENTRY_LEN;

/// What is next on the socket.
#[derive(Debug)]
pub enum Next {
    /// A message for the vhost crate.
    Ordinary,
    /// A message that was taken.
    Taken(Intercepted),
    /// The front-end closed the connection.
    End,
}

/// A message that was taken from the socket.
#[derive(Debug)]
pub struct Intercepted {
    code: Code,
    flags: u32,
    payload: Vec<u8>,
    file: Option<OwnedFd>,
}

/// The messages that are taken, by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Code {
    SetBackendReqFd = FrontendReq::SET_BACKEND_REQ_FD as isize,
    Iotlb = FrontendReq::IOTLB_MSG as isize,
    SetVringEnable = FrontendReq::SET_VRING_ENABLE as isize,
    IommuPush = 0x5650_0001,
}

impl Code {
    const ALL: [Self; 4] = [Self::SetBackendReqFd, Self::Iotlb, Self::SetVringEnable, Self::IommuPush];

    const fn number(self) -> u32 {
        self as u32
    }

    const fn name(self) -> &'static str {
        match self {
            Self::SetBackendReqFd => "SET_BACKEND_REQ_FD",
            Self::Iotlb => "IOTLB_MSG",
            Self::SetVringEnable => "SET_VRING_ENABLE",
            Self::IommuPush => "IOMMU_PUSH",
        }
    }
}

/// The 32-bit number at this place, counted in such numbers; 0 past the end.
fn word(bytes: &[u8], index: usize) -> u32 {
    bytes.get(4 * index..4 * index + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// The 64-bit number at this place, counted in 32-bit ones; 0 past the end.
fn long(bytes: &[u8], index: usize) -> u64 {
    bytes.get(4 * index..4 * index + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

/// Waits for a message and takes it if it is one of ours.
///
/// # Errors
/// When the socket fails, or the message's size is wrong.
pub fn next(stream: BorrowedFd<'_>) -> io::Result<Next> {
    let mut header = [0; HEADER_LEN];
    let mut pause = Duration::from_millis(1);
    loop {
        match recv(stream.as_raw_fd(), &mut header, MsgFlags::MSG_PEEK) {
            Ok(0) => return Ok(Next::End),
            Ok(HEADER_LEN) => break,
            // A header in pieces: a peek does not wait for the rest, nor does it tell
            // that there will be none.
            Ok(_) => {
                if ended(stream, pause)? {
                    return Err(invalid("the connection ended in the middle of a header".into()));
                }
                pause = (pause * 2).min(Duration::from_millis(50));
            }
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let request = word(&header, 0);
    let Some(code) = Code::ALL.into_iter().find(|code| code.number() == request) else {
        return Ok(Next::Ordinary);
    };
    let (flags, size) = (word(&header, 1), word(&header, 2) as usize);
    if size > MAX_PAYLOAD || flags & !FLAG_NEED_REPLY != FLAG_VERSION {
        let name = code.name();
        return Err(invalid(format!("{name} with flags {flags:#x} and a payload of {size} bytes")));
    }
    let mut message = [0; HEADER_LEN + MAX_PAYLOAD];
    let message = &mut message[..HEADER_LEN + size];
    let (len, mut files) = receive(stream, message)?;
    // What was looked at before is what comes: nobody else reads.
    read_exact(stream, message.get_mut(len..).unwrap_or_default()).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            invalid(format!("{} ended in the middle of its payload", code.name()))
        }
        _ => error,
    })?;
    let payload = message[HEADER_LEN..].to_vec();
    Ok(Next::Taken(Intercepted { code, flags, payload, file: files.pop() }))
}

/// Receives bytes and their descriptors. More than the buffer holds are closed by
/// the kernel. (`ScmSocket::recv_with_fd` of vmm-sys-util 0.15 leaks the second of two
/// descriptors: the kernel fills the padding of its buffer with it.)
fn receive(stream: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(stream, &mut [IoSliceMut::new(bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut files = Vec::new();
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = part {
            files.extend(fds);
        }
    }
    if files.len() > 1 {
        return Err(invalid(format!("a message with {} or more descriptors; it may have one", files.len())));
    }
    Ok((message.bytes, files))
}

/// Fills `bytes`, however long that takes.
fn read_exact(stream: BorrowedFd<'_>, mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match recv(stream.as_raw_fd(), bytes, MsgFlags::empty()) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(len) => bytes = bytes.get_mut(len..).unwrap_or_default(),
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// Whether the front-end will send nothing more; waits up to `pause` for that.
fn ended(stream: BorrowedFd<'_>, pause: Duration) -> io::Result<bool> {
    let hang_up = PollFlags::from_bits_retain(nix::libc::POLLRDHUP);
    let mut wait = [PollFd::new(stream, hang_up)];
    let pause = PollTimeout::try_from(pause).unwrap_or(PollTimeout::ZERO);
    match poll(&mut wait, pause) {
        Ok(count) => Ok(count > 0),
        Err(nix::Error::EINTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

impl Intercepted {
    /// The request that the message makes.
    ///
    /// # Errors
    /// When the payload has another size, or a descriptor is missing or one too many.
    pub fn request(&mut self) -> Result<Request, Fault> {
        let code = self.code;
        let fault = |reason: String| Err(Fault::Message(format!("{} {reason}", code.name())));
        match (code, self.file.take(), self.payload.len()) {
            (Code::SetBackendReqFd, Some(fd), 0) => inspect::channel(fd).map(Request::SetBackendChannel),
            (Code::SetBackendReqFd, None, 0) => fault("without a descriptor".into()),
            (Code::Iotlb, None, IOTLB_LEN) => Ok(Request::Iotlb(IotlbMessage {
                iova: long(&self.payload, 0),
                size: long(&self.payload, 2),
                frontend: long(&self.payload, 4),
                perm: self.payload[24],
                kind: self.payload[25],
            })),
            (Code::IommuPush, None, len) if len >= PUSH_HEADER_LEN => match self.pushed() {
                Ok(request) => Ok(request),
                Err(reason) => fault(reason),
            },
            (Code::SetVringEnable, None, 8) => match word(&self.payload, 1) {
                enable @ (0 | 1) => {
                    Ok(Request::SetVringEnable { index: word(&self.payload, 0), enable: enable == 1 })
                }
                other => fault(format!("with the value {other}: it is 0 or 1")),
            },
            (_, Some(_), _) => fault("with a descriptor".into()),
            (_, None, len) => fault(format!("with a payload of {len} bytes")),
        }
    }

    /// Reads IOMMU_PUSH.
    fn pushed(&self) -> Result<Request, String> {
        let (count, flags) = (word(&self.payload, 0) as usize, word(&self.payload, 1));
        let entries = &self.payload[PUSH_HEADER_LEN..];
        if count > MAX_PUSH_ENTRIES || entries.len() != count * PUSH_ENTRY_LEN {
            return Err(format!("with {count} entries in {} bytes", entries.len()));
        }
        if flags & !PUSH_RESET != 0 || (count == 0 && flags == 0) {
            return Err(format!("with {count} entries and flags {flags:#x}"));
        }
        let entries = entries.chunks_exact(PUSH_ENTRY_LEN);
        if entries.clone().any(|entry| entry[25..].iter().any(|byte| *byte != 0)) {
            return Err("with padding that is not 0".into());
        }
        let entries = entries.map(|entry| PushEntry {
            iova: long(entry, 0),
            size: long(entry, 2),
            frontend: long(entry, 4),
            perm: entry[24],
        });
        Ok(Request::IommuPush { reset: flags & PUSH_RESET != 0, entries: entries.collect() })
    }

    /// The message's number, if the front-end wants to hear that it was done.
    pub fn wants_answer(&self, reply_ack: bool) -> Option<u32> {
        (reply_ack && self.flags & FLAG_NEED_REPLY != 0).then(|| self.code.number())
    }
}
