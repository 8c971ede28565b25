//! The requests of the back-end channel: bytes and descriptors to typed requests (sizes,
//! flags, number of descriptors; not whether they make sense), and answers to bytes.
//!
//! Native-endian, as everything of vhost-user. The vhost crate's reader does not know WIRE
//! (`docs/vhost-user-extensions.md`) and takes a request it does not know for a broken
//! connection.

use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vhost::vhost_user::message::BackendReq;

use crate::window::Request as Range;

/// Length of a header: request, flags, size of the payload.
const HEADER_LEN: usize = 12;
/// The longest payload, that of SHMEM_MAP: bytes.
const MAX_PAYLOAD: usize = 40;
/// Header flags: the version, that it is an answer, that one is wanted.
const FLAG_VERSION: u32 = 0x1;
const FLAG_REPLY: u32 = 0x4;
const FLAG_NEED_REPLY: u32 = 0x8;

const SHMEM_MAP: u32 = BackendReq::SHMEM_MAP as u32;
const SHMEM_UNMAP: u32 = BackendReq::SHMEM_UNMAP as u32;
/// `VHOST_USER_BACKEND_WIRE`.
pub const WIRE: u32 = 0x5650_0101;

/// Flag of SHMEM_MAP: the guest shall be able to store.
const MAP_WRITABLE: u64 = 1;
/// Flag of WIRE: the guest's notification of the queue; else the queue's interrupt.
pub const WIRE_NOTIFY: u32 = 1 << 0;
/// Flag of WIRE: join them with the eventfd that comes along; else part them.
pub const WIRE_ON: u32 = 1 << 1;

/// A direction of a queue's notifications.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Owner to driver: the owner's kick, the queue's interrupt.
    Interrupt,
    /// Driver to owner: the queue's notification, the owner's call.
    Notify,
}

/// What the broker asks for.
#[derive(Debug)]
pub enum Request {
    /// VHOST_USER_BACKEND_SHMEM_MAP.
    Map(Range, OwnedFd),
    /// VHOST_USER_BACKEND_SHMEM_UNMAP.
    Unmap(Range),
    /// VHOST_USER_BACKEND_WIRE. `None`: unwire.
    Wire {
        /// The device's virtqueue.
        queue: u32,
        /// Which of its notifications.
        direction: Direction,
        /// The eventfd, as the broker says.
        event: Option<OwnedFd>,
    },
    /// Well-formed, and not to be carried out, whatever the state: why.
    Impossible(&'static str),
}

/// A message of the broker's.
#[derive(Debug)]
pub struct Message {
    /// The number of the request, for the answer.
    code: u32,
    /// Whether there is to be an answer.
    wants_answer: bool,
    /// What it asks for.
    pub request: Request,
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Receives the next message; `None` at the end of the connection. Never keeps more than its
/// fixed buffers, nor more than two descriptors, for which the kernel closes the rest.
///
/// # Errors
/// When the connection fails, or what comes is no request that this front-end negotiated: the
/// connection is then of no more use.
pub fn receive(mut stream: &UnixStream, wiring: bool) -> io::Result<Option<Message>> {
    let mut header = [0; HEADER_LEN];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let buffers = &mut [IoSliceMut::new(&mut header)];
        match recvmsg(stream, buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut files = Vec::new();
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = part {
            files.extend(fds);
        }
    }
    // Descriptors that come with later bytes are dropped by the kernel.
    stream.read_exact(header.get_mut(received.bytes..).unwrap_or_default())?;
    let [code, flags, size] = words(&header);
    if flags & !FLAG_NEED_REPLY != FLAG_VERSION {
        return Err(malformed("the header's flags are not those of a request"));
    }
    let size = size as usize;
    let mut payload = [0; MAX_PAYLOAD];
    let payload = payload.get_mut(..size).ok_or_else(|| malformed("the payload is too long"))?;
    stream.read_exact(payload)?;
    let request = decode(code, payload, files, wiring)?;
    Ok(Some(Message { code, wants_answer: flags & FLAG_NEED_REPLY != 0, request }))
}

/// The first `N` 32-bit numbers; zeros past the end.
fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    words
}

fn long(low: u32, high: u32) -> u64 {
    let (low, high) = (low.to_ne_bytes(), high.to_ne_bytes());
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&low);
    bytes[4..].copy_from_slice(&high);
    u64::from_ne_bytes(bytes)
}

fn decode(code: u32, payload: &[u8], mut files: Vec<OwnedFd>, wiring: bool) -> io::Result<Request> {
    let count = files.len();
    match (code, payload.len()) {
        (SHMEM_MAP | SHMEM_UNMAP, 40) => {
            let (range, flags) = range(payload);
            if flags & !MAP_WRITABLE != 0 {
                return Ok(Request::Impossible("a flag of the mapping is not known"));
            }
            Ok(match (code, files.pop(), count) {
                (SHMEM_MAP, Some(file), 1) => Request::Map(range, file),
                (SHMEM_UNMAP, None, _) => Request::Unmap(range),
                (SHMEM_MAP, ..) => Request::Impossible("a mapping has exactly one descriptor"),
                _ => Request::Impossible("an unmapping has no descriptor"),
            })
        }
        (WIRE, 8) if wiring => {
            let [queue, flags] = words(payload);
            if flags & !(WIRE_NOTIFY | WIRE_ON) != 0 {
                return Ok(Request::Impossible("a flag of the wire is not known"));
            }
            let direction = if flags & WIRE_NOTIFY != 0 { Direction::Notify } else { Direction::Interrupt };
            let wanted = usize::from(flags & WIRE_ON != 0);
            if count != wanted {
                return Ok(Request::Impossible("a wire has exactly one descriptor, its end none"));
            }
            Ok(Request::Wire { queue, direction, event: files.pop() })
        }
        (SHMEM_MAP | SHMEM_UNMAP | WIRE, _) => {
            Err(malformed("the payload has another size, or WIRING is off"))
        }
        _ => Err(malformed("the request is not known")),
    }
}

/// `struct VhostUserMMap`: shmid and padding, offset into the file, offset into the
/// region, length, flags; 64 bits each.
fn range(payload: &[u8]) -> (Range, u64) {
    let words: [u32; 10] = words(payload);
    let field = |index: usize| long(words[2 * index], words[2 * index + 1]);
    let flags = field(4);
    let range = Range {
        shmid: payload.first().copied().unwrap_or(0),
        file_offset: field(1),
        offset: field(2),
        len: field(3),
        writable: flags & MAP_WRITABLE != 0,
    };
    (range, flags)
}

impl Message {
    /// Answers, if an answer is wanted: 0 for done, else refused.
    ///
    /// # Errors
    /// When the broker does not take it.
    pub fn answer(&self, mut stream: &UnixStream, done: bool) -> io::Result<()> {
        if !self.wants_answer {
            return Ok(());
        }
        let mut bytes = [0; HEADER_LEN + 8];
        for (place, word) in bytes.chunks_exact_mut(4).zip([self.code, FLAG_VERSION | FLAG_REPLY, 8, 0, 0]) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes[HEADER_LEN..].copy_from_slice(&u64::from(!done).to_ne_bytes());
        stream.write_all(&bytes)
    }
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
